"""Corpora by name, file or folder, as one file of raw bytes.

    python data/prepare.py stdlib                       # this Python's own library: about 12 MB, no download
    python data/prepare.py enwik8 --from enwik8.zip     # downloaded before, by other means
    python data/prepare.py notes.txt                    # any file that is not compressed: used as it is
    python data/prepare.py logs.xz                      # by gzip, bzip2, xz or Zstandard: its content
    python data/prepare.py a.jsonl.gz --text-key body   # JSON lines: the text in a field of each
    python data/prepare.py ~/src/project                # any folder: its text files, joined

A name wins over a file of the same name: `shakespeare` is the corpus, `./shakespeare` the file.

Byte 0 (`EOS_ID`) stands between documents: the texts of a file whose name ends in `.jsonl`, compressed or not, and the
files of a folder, in the order of their names. So a byte 0 within the text of a JSON line ends the document there;
empty texts are left out. Of a folder, files that are no text are left out too: text is a regular, non-empty file,
compressed as above or not at all, that has no byte 0 and whose first 64 KiB are UTF-8 or else, in an older 8-bit
encoding, have at most one control character in a hundred bytes. Names that start with a dot, links to folders, prepared
files of this data folder, and the folders of training runs are skipped: a corpus never feeds on itself.

Prepared files are streamed to the disk and get their names when they are complete, so that memory stays small; one
process prepares a file, and the others of this machine wait. Temporary files that a crash left are removed after an
hour.
"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import command

    command.start()

import codecs
import copy
import fcntl
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from http.client import HTTPException
from importlib import import_module
from io import BufferedReader
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

import command
from byte_tokenizer import EOS_ID, one_line

StrPath = str | os.PathLike
Documents = list[tuple[str, int, int]]  # files: path, bytes, modification time in ns
DATA_DIR = Path(__file__).resolve().parent
CACHE_NAME = ".cache"  # the folder in the data folder for prepared files and folders of users
RUN_FILE = "checkpoints.json"  # marks the folder of a training run
TIMEOUT_S = 30.0  # for each wait on the network, not for a download as a whole

_CHUNK = 1 << 20  # bytes in memory at a time
_HEAD = 1 << 16  # leading bytes of a file by which its encoding is judged
_CONTROLS = bytes(set(range(32)) - set(b"\b\t\n\v\f\r\x1b")) + b"\x7f"
_RECIPE = 3  # part of every cache name; raise it when the rules for joining documents change
_MAX_LINE = 1 << 28  # bytes of a JSON line, which is held in memory
_LEFT_S = 3600  # a temporary file without writes for so long was left by a crash
_JSON_LINES = re.compile(r"\.jsonl(\.(gz|bz2|xz|zst))?\Z", re.IGNORECASE)  # how such a file's name ends
# fmt: off
_COMPRESSED = {  # how the files of each format begin
    "gzip": rb"\x1f\x8b\x08", "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "xz": rb"\xfd7zXZ\x00",
    "LZMA": rb"\x5d\x00\x00..(\xff{8}|.{5}\x00{3})", "Zstandard": rb"[\x1e-\x28]\xb5/\xfd|[\x50-\x5f]\*M\x18",
    "LZ4": rb"\x04\x22M\x18|\x02\x21L\x18", "zip": rb"PK(\x03\x04|\x05\x06|\x07\x08)", "7z": rb"7z\xbc\xaf\x27\x1c",
    "RAR": rb"Rar!\x1a\x07", "lzip": rb"LZIP[\x00\x01]", "lzop": rb"\x89LZO\x00", "Snappy": rb"\xff\x06\x00\x00sNaPpY",
    "compress": rb"\x1f[\x9d\xa0]", "Parquet": rb"PAR1\x15", "Arrow": rb"ARROW1\x00\x00",
}
# fmt: on


class DataError(ValueError):
    """A mistake of the user or a failure outside this program, in one line that names the thing and the remedy."""


class Download(NamedTuple):
    """A file on a server: a corpus, or a zip file with a corpus as its only member."""

    url: str
    size: int
    sha256: str


class Tree(NamedTuple):
    """A corpus joined from the files of a folder whose names end in `suffix`, but for those below `skip`."""

    file: str  # its name in the data folder; it is never rebuilt, so the name must change with the content
    root: Path
    suffix: str
    skip: frozenset[str]


# fmt: off
_NO_CORPUS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
CORPORA: dict[str, Download | Tree] = {
    "stdlib": Tree(
        f"stdlib-{platform.python_version()}.bin", Path(sysconfig.get_path("stdlib")), ".py", _NO_CORPUS),
    "shakespeare": Download(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "enwik8": Download(
        "http://mattmahoney.net/dc/enwik8.zip",
        36_445_475, "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"),
}
# fmt: on


class ByteFile:
    """A regular, non-empty file of bytes that is read on demand: memory does not grow with it. DataError if it is none.

    It is not mapped into memory: an access to a mapped file that another program has shortened ends the process.
    """

    def __init__(self, path: StrPath):
        self.path = path
        self._file = _open(path)  # views share it; it is closed with the last of them
        self._first, self._len = 0, os.fstat(self._file.fileno()).st_size
        if not self._len:
            raise DataError(f"{_quote(path)} is empty; there is nothing to learn from it")

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, key: slice) -> np.ndarray:
        """Reads `data[start:stop]` into memory, uint8; DataError as `read`."""
        if not isinstance(key, slice) or key.step not in (None, 1):
            raise TypeError("a ByteFile takes slices without a step, such as data[10:20]")
        start, stop, _ = key.indices(self._len)
        return self.read(np.array([start]), max(stop - start, 0))[0]

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Reads sequences of `length` bytes from the offsets `starts`, integers (n,); returns uint8 (n, length).

        IndexError if one is not within the data; DataError if the file became shorter, or cannot be read any more.
        """
        offsets = starts.tolist()
        if offsets and not 0 <= min(offsets) <= max(offsets) <= self._len - length:
            raise IndexError(f"{length} bytes from offset {min(offsets)} to {max(offsets)}, of {self._len} bytes")
        data = bytearray().join(self._pread(self._first + offset, length) for offset in offsets)
        return np.frombuffer(data, dtype=np.uint8).reshape(len(offsets), length)

    def split(self, at: int) -> tuple["ByteFile", "ByteFile"]:
        """Returns views of the bytes before offset `at` and of those from there on; nothing is read."""
        head, tail = copy.copy(self), copy.copy(self)
        head._len, tail._first, tail._len = at, self._first + at, self._len - at
        return head, tail

    def _pread(self, offset: int, length: int) -> bytes:
        data = b""
        with _data_error("read", self.path):
            while len(data) < length:  # one call returns 2 GiB at most
                more = os.pread(self._file.fileno(), length - len(data), offset + len(data))
                if not more:
                    raise DataError(f"{_quote(self.path)} became shorter while it was being read; restore it")
                data += more
        return data


open_bytes = ByteFile  # a file, for instance the result of `resolve`, to read sequences from


def read_sequences(data: Any, starts: np.ndarray, length: int) -> np.ndarray:
    """Reads sequences of a corpus, a file or an array, as `ByteFile.read` does."""
    if isinstance(data, np.ndarray):
        return data[starts.astype(np.int64)[:, None] + np.arange(length)]
    return data.read(starts, length)


def compressed_format(head: bytes) -> str | None:
    """Names the compressed format of a file by its first bytes, of which 16 suffice; None if it is not compressed."""
    return next((name for name, magic in _COMPRESSED.items() if re.match(magic, head, re.DOTALL)), None)


def resolve(
    source: StrPath = "stdlib", *, text_key: str = "text", from_file: StrPath | None = None, data_dir: Path = DATA_DIR
) -> Path:
    """Finds the file of raw bytes behind a name, a file or a folder, and prepares it first if need be.

    A prepared file is used again until the path, size or modification time of one of its sources changes, or
    `text_key`.

    Args:
        source: A name in `CORPORA` (a `str`: a `Path` is always a path), a file or a folder.
        text_key: The field of a JSON line that holds a document.
        from_file: A local copy of the download of `source`.
        data_dir: The folder for prepared files; created if missing.

    Raises:
        DataError: The source is of no known kind or has no text, or something cannot be read or written.
    """
    data_dir = Path(data_dir)
    name = source if isinstance(source, str) else ""
    corpus = CORPORA.get(name)
    if isinstance(corpus, Download):
        return _resolve_download(name, corpus, from_file, data_dir)
    if from_file is not None:
        names = ", ".join(name for name, entry in CORPORA.items() if isinstance(entry, Download))
        raise DataError(f"--from replaces a download, and {_quote(source)} is none; it goes with: {names}")
    if isinstance(corpus, Tree):
        root, suffix, skip = corpus.root.resolve(), corpus.suffix, corpus.skip
        join = lambda out: _join(_list_documents(root, data_dir, suffix, skip), root, text_key, out)  # noqa: E731
        return _prepare(data_dir / corpus.file, join)
    path = Path(os.fsdecode(source))
    if not os.fspath(source) or not os.path.lexists(path):
        raise DataError(f"no file, folder or corpus {_quote(source)}; the corpora are: {', '.join(CORPORA)}")
    if path.is_dir():
        path = path.resolve()
        return _resolve_documents(path, _list_documents(path, data_dir), text_key, data_dir)
    path = path.parent.resolve() / path.name  # a link keeps its name, by which JSON lines are known
    is_packed = compressed_format(open_bytes(path)[:16].tobytes()) is not None
    if compression := compressed_format(next(_read(path), b"")):
        raise DataError(f"{_quote(path)} is compressed ({compression}); unpack it first, and name the unpacked file")
    if not is_packed and not _JSON_LINES.search(path.name):
        return Path(os.fsdecode(source))
    info = path.stat()
    return _resolve_documents(path, [(str(path), info.st_size, info.st_mtime_ns)], text_key, data_dir)


# --- Downloads -------------------------------------------------------------------------------------------------------


def _resolve_download(name: str, corpus: Download, from_file: StrPath | None, data_dir: Path) -> Path:
    """Takes a corpus with a server from the data folder, a given file or the network."""
    part = data_dir / f"{name}.part"
    given = part if from_file is None else Path(from_file)
    if from_file is not None:
        _check(given, corpus, f"{_quote(given)} is not the download of {name}")

    def unpack(out: BinaryIO) -> None:
        if from_file is None:
            _download(corpus, part)
        with _open(given) as file, zipfile.ZipFile(file) if zipfile.is_zipfile(given) else nullcontext() as archive:
            shutil.copyfileobj(archive.open(archive.namelist()[0]) if archive else file, out, _CHUNK)
        if from_file is None:
            part.unlink()

    return _prepare(data_dir / f"{name}.bin", unpack)


def _check(path: Path, corpus: Download, failure: str, remedy: str = "") -> None:
    """Raises a DataError if a file is not the download of a corpus, by its size and SHA-256."""
    with _open(path) as file, _data_error("read", path):
        size = os.fstat(file.fileno()).st_size
        # of another size, that suffices
        digest = hashlib.file_digest(file, "sha256").hexdigest() if size == corpus.size else ""
    if digest != corpus.sha256:
        found = f"{size:,} bytes" + (f", sha256 {digest}" if digest else "")
        raise DataError(f"{failure}: expected {corpus.size:,} bytes, sha256 {corpus.sha256}; found {found}{remedy}")


def _download(corpus: Download, part: Path) -> None:
    """Completes `part`, from its beginning where the server does not resume; DataError if it cannot be had."""
    remedy = "; run again (what has arrived is kept), or get the file by other means and pass it with --from FILE"
    if not _exists(part):
        part.unlink(missing_ok=True)
    size = part.stat().st_size if part.exists() else 0
    if size < corpus.size:
        headers = {"User-Agent": "ByteGPT"} | ({"Range": f"bytes={size}-"} if size else {})
        request = urllib.request.Request(corpus.url, headers=headers)
        with (
            _data_error("download", corpus.url, remedy),
            urllib.request.urlopen(request, timeout=TIMEOUT_S) as response,
            open(part, "ab" if response.status == 206 else "wb") as out,
            _progress(part.stem, corpus.size, size := out.tell()) as bar,
        ):
            while size <= corpus.size and (chunk := response.read1(_CHUNK)):  # an answer may have no end
                size += out.write(chunk)
                bar.update(len(chunk))
            if size < corpus.size:
                raise ConnectionError(f"the connection ended after {size:,} of {corpus.size:,} bytes")
    try:
        _check(part, corpus, f"{corpus.url} sent something else", "; run again to retry")
    except DataError:
        part.unlink()
        raise


# --- Documents -------------------------------------------------------------------------------------------------------


def _resolve_documents(path: Path, documents: Documents, text_key: str, data_dir: Path) -> Path:
    """Joins the documents of a user's file or folder into a cache file, whose name has a hash of them."""
    stem = re.sub(r"[^\w.-]", "_", path.name, flags=re.ASCII).lstrip(".")[:40] or "folder"
    family = f"{stem}-{_hash((str(path), text_key))[:12]}"
    target = data_dir / CACHE_NAME / f"{family}-{_hash((_RECIPE, documents))[:16]}.bin"
    _prepare(target, lambda out: _join(documents, path, text_key, out))
    for other in target.parent.glob(f"{family}-*.bin"):
        if other != target:
            other.unlink(missing_ok=True)  # by a process like this one
    return target


def _list_documents(root: Path, data_dir: Path, suffix: str = "", skip: Iterable[str] = ()) -> Documents:
    """Lists the files below `root` that may be text, sorted by their names."""

    def fail(error: OSError) -> None:
        raise DataError(f"cannot read {_quote(error.filename)}: {error.strerror}") from error

    prepared = {data_dir.resolve(), (data_dir / CACHE_NAME).resolve()}
    documents = []
    for folder, subfolders, files in os.walk(root, onerror=fail):
        if RUN_FILE in files:  # a run that trains on this folder would change its own data
            subfolders.clear()
            continue
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skip]
        for file in files:
            path = Path(folder, file)
            if file.startswith(".") or not file.endswith(suffix) or not os.path.isfile(path):
                continue
            real = path.resolve() if path.is_symlink() else path
            if real.parent in prepared and real.suffix in (".bin", ".zip", ".part"):
                continue
            with _data_error("read", path):
                info = path.stat()
            if info.st_size:
                documents.append((str(path), info.st_size, info.st_mtime_ns))
    return sorted(documents)


def _join(documents: Documents, root: Path, text_key: str, out: BinaryIO) -> None:
    """Writes the documents of a folder, or of a file that is the only one; DataError if none of them is text."""
    is_folder = root.is_dir()
    with _progress(root.name, sum(size for _, size, _ in documents)) as bar:
        for name, _, _ in documents:
            if _JSON_LINES.search(name):
                for text in _read_json_lines(Path(name), text_key, bar):
                    _append([text], out, only_text=False)
            else:
                _append(_read(Path(name), bar), out, only_text=is_folder)
    if not out.tell():
        wanted = "free of zero bytes, and UTF-8 or an 8-bit encoding"
        found = f"none of its {len(documents)} non-empty files (hidden ones apart) is {wanted}"
        reason = f"folder {_quote(root)} holds no text: {found}" if is_folder else f"{_quote(root)} holds no text"
        raise DataError(f"{reason}; name another")


def _append(chunks: Iterable[bytes], out: BinaryIO, only_text: bool) -> None:
    """Appends a document, but for an empty one, or with `only_text` one that proves to be no text."""
    start = out.tell()
    out.write(bytes([EOS_ID]) if start else b"")
    size = 0
    for chunk in chunks:
        if only_text and (EOS_ID in chunk or not size and not _looks_like_text(chunk[:_HEAD])):
            size = 0
            break
        size += out.write(chunk)
    if not size:
        out.seek(start)
        out.truncate()


def _looks_like_text(head: bytes) -> bool:
    """Judges the first bytes of a file, without zeros; the module's docstring has the rule."""
    if compressed_format(head):
        return False
    try:
        # without final=True, an incremental decoder accepts a character that is cut off at the end
        codecs.getincrementaldecoder("utf-8")().decode(head)
        return True
    except UnicodeDecodeError:
        controls = len(head) - len(head.translate(None, _CONTROLS))
        return controls * 100 <= len(head)


def _open(path: StrPath) -> BufferedReader:
    """Opens a regular file to read it; any other kind is a DataError, and no pipe makes it wait."""
    with _data_error("read", path):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DataError(f"{_quote(path)} is not a regular file; save the bytes to a file first")
    return open(fd, "rb")


def _read(path: Path, bar: Any = None) -> Iterator[bytes]:
    """Yields the content of a file, unpacked if it is compressed in a way that is understood."""
    with _open(path) as file:
        with _data_error("read", path):
            compression = compressed_format(file.peek(16))
        unpack = _UNPACK.get(compression, lambda file: file)
        try:
            content, done = unpack(file), 0
        except ImportError as error:
            remedy = "install that, or unpack the file first"
            raise DataError(f"{_quote(path)} is compressed ({compression}): {error}; {remedy}") from error
        remedy = "; it is damaged or was cut short: get it anew" if content is not file else ""
        while True:
            with _data_error("read", path, remedy, Exception):  # each format has errors of its own
                if not (chunk := content.read(_CHUNK)):
                    return
            if bar is not None:
                bar.update(file.tell() - done)
                done = file.tell()
            yield chunk


def _unpack_streams(file: BufferedReader, new: Callable[[], Any]) -> Any:
    """Reads streams that follow each other. Python's own readers take a damaged one after the first for the end."""

    def chunks() -> Iterator[bytes]:
        data = file.read(_CHUNK)
        while data:
            stream = new()
            while not stream.eof:
                if not data and stream.needs_input and not (data := file.read(_CHUNK)):
                    raise EOFError("the last stream has no end")
                if chunk := stream.decompress(data, _CHUNK):
                    yield chunk
                data = b""
            data = stream.unused_data.lstrip(b"\0") or file.read(_CHUNK).lstrip(b"\0")  # xz allows zeros in between

    unpacked = chunks()
    return SimpleNamespace(read=lambda size: next(unpacked, b""))


def _unpack_zstd(file: BufferedReader) -> Any:
    try:
        from compression import zstd  # of Python 3.14
    except ImportError:
        import zstandard
    else:
        return zstd.ZstdFile(file, options={zstd.DecompressionParameter.window_log_max: 31})
    # `zstandard` does not mind that the last frame is cut short. Therefore one that is to be skipped follows, longer
    # than any block: a frame that is cut takes it for blocks of its own, and these are invalid.
    end = iter([b"\x50\x2a\x4d\x18" + (1 << 18).to_bytes(4, "little") + b"\xff" * (1 << 18)])
    closed: Any = SimpleNamespace(read=lambda size: file.read(size) or next(end, b""))
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(closed, read_across_frames=True)


_UNPACK: dict[str | None, Callable[[BufferedReader], Any]] = {  # modules that a Python may have been built without
    "gzip": lambda file: import_module("gzip").GzipFile(fileobj=file),
    "bzip2": lambda file: _unpack_streams(file, import_module("bz2").BZ2Decompressor),
    "xz": lambda file: _unpack_streams(file, import_module("lzma").LZMADecompressor),
    "Zstandard": _unpack_zstd,
}


def _read_json_lines(path: Path, key: str, bar: Any) -> Iterator[bytes]:
    """Yields the text under a key of each line, in UTF-8; DataError with the line's number where there is none."""
    for number, line in enumerate(_lines(path, bar), 1):
        where = f"{_quote(path)}, line {number}:"
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} no JSON in UTF-8: {command.shorten(error)}") from error
        if not isinstance(record, dict) or key not in record:
            there = f"has {command.shorten(', '.join(record))}" if isinstance(record, dict) else "is no object"
            raise DataError(f"{where} no field {_quote(key)}, the line {there}; name the field with --text-key")
        if not isinstance(text := record[key], str):
            raise DataError(f"{where} {_quote(key)} must be a string, got {command.shorten(json.dumps(text))}")
        try:
            yield text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where} {_quote(key)} has half a character, {text[error.start]!a}; mend it") from error


def _lines(path: Path, bar: Any) -> Iterator[bytes]:
    rest, n_lines = b"", 0
    for chunk in _read(path, bar):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        n_lines += len(lines)
        if len(rest) > _MAX_LINE:
            raise DataError(f"{_quote(path)}, line {n_lines + 1}: longer than {_MAX_LINE >> 20} MiB; are these lines?")
    yield rest


# --- Files -----------------------------------------------------------------------------------------------------------


def _exists(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()  # links, pipes and devices are not of this module


def _prepare(target: Path, fill: Callable[[BinaryIO], None]) -> Path:
    """Returns `target`, which `fill` writes if it is not there; waits for another process that writes the same."""
    lock = target.with_name(f".{target.name}.lock")
    with _data_error("write", target):
        while not _exists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(lock, "a+b", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o666)) as file:
                with suppress(OSError):  # there are file systems without locks: then each process writes its own
                    fcntl.flock(file, fcntl.LOCK_EX)
                if not os.fstat(file.fileno()).st_nlink:  # another process held the lock, and has removed it
                    file.seek(0)
                    if error := file.read().decode():
                        raise DataError(error)
                    continue
                try:
                    if not _exists(target):
                        _write(target, fill)
                except DataError as error:
                    file.write(str(error).encode(errors="backslashreplace"))  # for those that wait
                    file.flush()
                    raise
                finally:
                    lock.unlink(missing_ok=True)
    return target


def _write(target: Path, fill: Callable[[BinaryIO], None]) -> None:
    """Fills a temporary file that becomes `target`, or vanishes after an error."""
    for left in target.parent.glob(f".*.{'[0-9a-f]' * 16}.tmp"):
        with suppress(OSError):
            if left.lstat().st_mtime < time.time() - _LEFT_S:
                left.unlink()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with _data_error("write", target), open(temporary, "xb") as out:
            fill(out)
            out.flush()
            os.fsync(out.fileno())
            os.replace(temporary, target)
    except BaseException:  # Ctrl-C as well
        temporary.unlink(missing_ok=True)
        raise


def _progress(name: str, total: int, done: int = 0) -> tqdm:
    """A progress bar of bytes, on a terminal."""
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}
    return tqdm(desc=one_line(os.path.basename(name)), total=total, initial=done, **options)


@contextmanager
def _data_error(action: str, thing: StrPath, remedy: str = "", kind: Any = (OSError, HTTPException)) -> Any:
    """Turns a failure outside this program into a DataError that names the action, the thing and the reason."""
    try:
        yield
    except kind as error:
        reason = error.reason if type(error) is urllib.error.URLError else getattr(error, "strerror", None) or error
        raise DataError(f"cannot {action} {_quote(thing)}: {reason or type(error).__name__}{remedy}") from error


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _quote(thing: StrPath) -> str:
    """Quotes a path for a message, which stays one printable line whatever the path holds."""
    return command.shorten(repr(os.fsdecode(thing)), 1000)


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the given arguments, or those of the process; returns the exit code (see `command.run`)."""
    about = "Find or prepare files of raw bytes to train on, and print their paths and sizes."
    parser = command.Parser("prepare.py", description=about)
    names = ", ".join(CORPORA)
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help=f"a corpus ({names}), a file or a folder")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="of .jsonl: the field that holds the text")
    parser.add_argument("--from", dest="from_file", metavar="FILE", help="a local copy, to be used as the download")

    def run() -> None:
        flags = parser.parse_args(argv)
        for source in flags.sources:
            path = resolve(source, text_key=flags.text_key, from_file=flags.from_file, data_dir=DATA_DIR)
            command.say(one_line(f"{path}: {len(open_bytes(path)):,} bytes"))

    return command.run("prepare.py", run, mistakes=(DataError,))


if __name__ == "__main__":
    sys.exit(main())
