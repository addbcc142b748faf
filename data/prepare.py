"""Corpora by name, file or folder, as one file of raw bytes.

    python data/prepare.py stdlib                     # this Python's own library: about 12 MB, no download
    python data/prepare.py shakespeare                # downloads 1 MB
    python data/prepare.py enwik8 --from enwik8.zip   # downloaded before, by other means
    python data/prepare.py notes.txt                  # any file that is not compressed: used as it is
    python data/prepare.py ~/src/project              # any folder: its text files, joined

A name wins over a file of the same name: `shakespeare` is the corpus, `./shakespeare` the file.

The text files of a folder are joined in the order of their names, with byte 0 (`EOS_ID`) between two of them. Text is a
regular, non-empty file without a byte 0, not compressed, whose first 64 KiB are UTF-8 or else, in an older 8-bit
encoding, have at most one control character in a hundred bytes. Names that start with a dot, links to folders, what
was prepared in this data folder, and the folders of training runs are skipped: a corpus never feeds on itself.

A file in the data folder gets its name when its last byte is on disk; a download is a `.part` until then, to be
resumed. Temporary files that a crash left are removed after a day.
"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import command

    command.start()

import codecs
import contextlib
import copy
import fcntl
import hashlib
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
from collections.abc import Iterator
from http.client import HTTPException
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

import command
from byte_tokenizer import EOS_ID, one_line

DATA_DIR = Path(__file__).resolve().parent
CACHE_NAME = ".cache"  # the folder in the data folder that holds the joined folders
RUN_FILE = "checkpoints.json"  # marks the folder of a training run
TIMEOUT_S = 30.0  # for each wait on the network, not for a download as a whole

_CHUNK = 1 << 20  # bytes in memory at a time
_HEAD = 1 << 16  # leading bytes of a file by which its encoding is judged
_CONTROLS = bytes(set(range(32)) - set(b"\b\t\n\v\f\r\x1b")) + b"\x7f"
_RECIPE = b"2"  # part of every cache name; raise it when the rules for joining a folder change
# fmt: off
_COMPRESSED = {  # how the files of each format begin
    "gzip": rb"\x1f\x8b\x08", "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "xz": rb"\xfd7zXZ\x00",
    "LZMA": rb"\x5d\x00\x00..(\xff{8}|.{5}\x00{3})", "Zstandard": rb"[\x1e-\x28]\xb5/\xfd|[\x50-\x5f]\*M\x18",
    "LZ4": rb"\x04\x22M\x18|\x02\x21L\x18", "zip": rb"PK(\x03\x04|\x05\x06|\x07\x08)", "7z": rb"7z\xbc\xaf\x27\x1c",
    "RAR": rb"Rar!\x1a\x07", "lzip": rb"LZIP[\x00\x01]", "lzop": rb"\x89LZO\x00", "Snappy": rb"\xff\x06\x00\x00sNaPpY",
    "compress": rb"\x1f[\x9d\xa0]",
}
# fmt: on


class DataError(ValueError):
    """A mistake of the user or a failure outside this program, in one line that names the thing and the remedy."""


class Blob(NamedTuple):
    """A file in the data folder whose content is known beforehand."""

    file: str
    size: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.size:,} bytes, sha256 {self.sha256}"


class Download(NamedTuple):
    """A corpus on a server, which may send it as the only member of a zip file."""

    url: str
    raw: Blob
    zipped: Blob | None = None


class Tree(NamedTuple):
    """A corpus joined from the files of a folder whose names end in `suffix`, but for those below `skip`."""

    file: str  # its name in the data folder; such a file is never rebuilt, so what changes belongs in the name
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
        Blob("shakespeare.bin", 1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")),
    "enwik8": Download(
        "http://mattmahoney.net/dc/enwik8.zip",
        Blob("enwik8.bin", 100_000_000, "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"),
        Blob("enwik8.zip", 36_445_475, "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc")),
}
# fmt: on


class ByteFile:
    """A regular, non-empty file of bytes that is read on demand: memory does not grow with it. DataError if it is none.

    It is not mapped into memory: an access to a mapped file that another program has shortened ends the process.
    """

    def __init__(self, path: str | os.PathLike):
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

        Raises:
            DataError: The file became shorter since it was opened, or cannot be read any more.
            IndexError: A sequence is not within the data.
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


def open_bytes(path: str | os.PathLike) -> ByteFile:
    """Opens a file, for instance the result of `resolve`, to read sequences from it; errors as `ByteFile`."""
    return ByteFile(path)


def read_sequences(data: ByteFile | np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Reads sequences of a corpus, a file or an array, as `ByteFile.read` does."""
    if isinstance(data, ByteFile):
        return data.read(starts, length)
    return data[starts.astype(np.int64)[:, None] + np.arange(length)]


def compressed_format(head: bytes) -> str | None:
    """Names the compressed format of a file by its first bytes, of which 16 suffice; None if it is not compressed."""
    return next((name for name, magic in _COMPRESSED.items() if re.match(magic, head, re.DOTALL)), None)


def resolve(
    source: str | os.PathLike = "stdlib", *, from_file: str | os.PathLike | None = None, data_dir: Path = DATA_DIR
) -> Path:
    """Finds the file of raw bytes behind a name, a file or a folder, and makes it first if need be.

    What was made is used again: a download if its size is right, a joined folder until the path, size or modification
    time of one of its files changes.

    Args:
        source: A name in `CORPORA` (a `str`: a `Path` is always a path), a file, which is used as it is, or a folder.
        from_file: A local copy to take instead of downloading `source`. A zipped corpus may come zipped or unpacked.
        data_dir: Where to put what is made; created if missing.

    Raises:
        DataError: The source is not what it should be or has no text, or something cannot be read or written.
    """
    data_dir = Path(data_dir)
    name = source if isinstance(source, str) else ""
    corpus = CORPORA.get(name)
    if isinstance(corpus, Download):
        return _resolve_download(corpus, name, from_file, data_dir)
    if from_file is not None:
        names = ", ".join(name for name, entry in CORPORA.items() if isinstance(entry, Download))
        raise DataError(f"--from replaces a download, and {_quote(source)} is none; it goes with: {names}")
    if isinstance(corpus, Tree):
        target = data_dir / corpus.file
        if not _is_made(target):
            root = corpus.root.resolve()
            _join(_list_documents(root, data_dir, corpus.suffix, corpus.skip), root, target)
        return target
    path = Path(os.fsdecode(source))
    if not os.fspath(source) or not os.path.lexists(path):
        raise DataError(f"no file, folder or corpus {_quote(source)}; the corpora are: {', '.join(CORPORA)}")
    if path.is_dir():
        return _resolve_folder(path.resolve(), data_dir)
    if compression := compressed_format(open_bytes(path)[:16].tobytes()):
        raise DataError(f"{_quote(path)} is compressed ({compression}); unpack it first, and name the unpacked file")
    return path


def _resolve_download(corpus: Download, name: str, from_file: str | os.PathLike | None, data_dir: Path) -> Path:
    """Takes a corpus with a server from the data folder, a given file or the network."""
    target = data_dir / corpus.raw.file
    if from_file is None:
        if _is_made(target, corpus.raw.size):
            return target
        sent = corpus.zipped or corpus.raw
        from_file = data_dir / sent.file
        if not _is_blob(from_file, sent):
            _download(corpus.url, sent, from_file)
        if not corpus.zipped:
            return target
    _import(Path(from_file), corpus, name, target)
    return target


def _import(given: Path, corpus: Download, name: str, target: Path) -> None:
    """Makes `target` from a file that should be the corpus or its zip file; DataError if it is neither."""
    blobs = [blob for blob in (corpus.raw, corpus.zipped) if blob]
    with _open(given) as file:
        size = os.fstat(file.fileno()).st_size
        digest = _sha256(given) if size in [blob.size for blob in blobs] else ""  # else the size says enough
        if digest not in [blob.sha256 for blob in blobs]:
            expected, found = " or ".join(map(str, blobs)), f"{size:,} bytes" + (f", sha256 {digest}" if digest else "")
            raise DataError(f"{_quote(given)} is not {name}: expected {expected}; found {found}")
        is_raw = digest == corpus.raw.sha256
        with _replacing(target) as out, contextlib.nullcontext() if is_raw else zipfile.ZipFile(file) as archive:
            shutil.copyfileobj(archive.open(archive.namelist()[0]) if archive else file, out, _CHUNK)


def _download(url: str, blob: Blob, target: Path) -> None:
    """Downloads into `<target>.part`, resuming what is there, and renames that to `target` if it is `blob`."""
    part = target.with_name(target.name + ".part")
    with _data_error("write", part):
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            info = part.lstat()
            if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:  # what lies elsewhere is not written
                part.unlink()
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        with open(part, "r+b", opener=lambda path, _: os.open(path, flags, 0o666)) as out:
            with contextlib.suppress(OSError):  # there are file systems without locks
                fcntl.flock(out, fcntl.LOCK_EX)  # waits for another process that downloads the same
            if not os.fstat(out.fileno()).st_nlink:  # and that removed the part in the end
                return _download(url, blob, target)
            try:
                if not _is_blob(target, blob):
                    _receive(url, blob, out, part)
                    _publish(out, part, target)
            finally:
                if not out.seek(0, os.SEEK_END):
                    part.unlink(missing_ok=True)


def _receive(url: str, blob: Blob, out: BinaryIO, part: Path) -> None:
    """Completes a download, from its beginning where the server does not resume; empties it if it is not `blob`."""
    size = out.seek(0, os.SEEK_END)
    headers = {"User-Agent": "ByteGPT"} | ({"Range": f"bytes={size}-"} if size else {})
    remedy = "; run again (what has arrived is kept), or get the file by other means and pass it with --from FILE"
    with _data_error("download", url, remedy), contextlib.ExitStack() as stack:
        if size < blob.size:
            request = urllib.request.Request(url, headers=headers)
            response = stack.enter_context(urllib.request.urlopen(request, timeout=TIMEOUT_S))
            resumed = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            size = out.seek(min(size, int(resumed[1])) if resumed else 0)
            out.truncate()
            options = {"initial": size, "unit": "B", "unit_scale": True, "leave": False}
            bar = stack.enter_context(tqdm(desc=blob.file, total=blob.size, disable=None, **options))  # on a terminal
            while size <= blob.size and (chunk := response.read1(_CHUNK)):  # an endless answer must not fill the disk
                with _data_error("write", part):
                    size += out.write(chunk)
                bar.update(len(chunk))
        if size < blob.size:
            raise ConnectionError(f"the connection ended after {size:,} of {blob.size:,} bytes")
    out.flush()
    if (digest := _sha256(part)) != blob.sha256:
        out.truncate(0)
        found = "more than that" if size > blob.size else f"{size:,} bytes, sha256 {digest}"
        raise DataError(f"{url} did not send {blob.file}: expected {blob}; found {found}; run again to retry")


def _resolve_folder(root: Path, data_dir: Path) -> Path:
    """Joins a user's folder into a cache file, whose name changes with whatever changes in the folder."""
    documents = _list_documents(root, data_dir)
    stem = re.sub(r"[^\w.-]", "_", root.name, flags=re.ASCII).lstrip(".")[:40] or "folder"
    family = f"{stem}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"
    listing = os.fsencode("".join(f"{name}\0{size}\0{mtime_ns}\0" for name, size, mtime_ns in documents))
    target = data_dir / CACHE_NAME / f"{family}-{hashlib.sha256(_RECIPE + listing).hexdigest()[:16]}.bin"
    if not _is_made(target):
        _join(documents, root, target)
    for other in target.parent.glob(f"{family}-*.bin"):
        if other != target:
            other.unlink(missing_ok=True)  # by a process like this one
    return target


def _list_documents(
    root: Path, data_dir: Path, suffix: str = "", skip: frozenset[str] = frozenset()
) -> list[tuple[str, int, int]]:
    """Lists the files below `root` that may be text, as (relative path, bytes, modification time in ns), sorted."""

    def fail(error: OSError) -> None:
        raise DataError(f"cannot read {_quote(error.filename)}: {error.strerror}") from error

    made_in = {data_dir.resolve(), (data_dir / CACHE_NAME).resolve()}
    documents = []
    for folder, subfolders, files in os.walk(root, onerror=fail):
        if RUN_FILE in files:  # a run that trains on this folder would change what it trains on
            subfolders.clear()
            continue
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skip]
        for file in files:
            path = Path(folder, file)
            if file.startswith(".") or not file.endswith(suffix) or not os.path.isfile(path):
                continue
            real = path.resolve() if path.is_symlink() else path
            if real.parent in made_in and real.suffix in (".bin", ".zip", ".part"):
                continue
            with _data_error("read", path):
                info = path.stat()
            if info.st_size:
                documents.append((path.relative_to(root).as_posix(), info.st_size, info.st_mtime_ns))
    return sorted(documents)


def _join(documents: list[tuple[str, int, int]], root: Path, target: Path) -> None:
    """Joins those documents that are text into `target`; DataError if none is."""
    with _replacing(target) as out:
        for name, _, _ in tqdm(documents, one_line(root.name), leave=False, unit=" files", disable=None):
            start = out.tell()
            if start:
                out.write(bytes([EOS_ID]))
            if not _append_text(root / name, out):
                out.seek(start)
                out.truncate()
        if not out.tell():
            wanted = "uncompressed, free of zero bytes, and UTF-8 or an 8-bit encoding"
            found = f"none of its {len(documents)} non-empty files (hidden ones apart) is {wanted}"
            raise DataError(f"folder {_quote(root)} holds no text: {found}; name another folder")


def _append_text(path: Path, out: BinaryIO) -> bool:
    """Copies a file until it proves to be no text; returns whether it is: if not, the caller removes the copy."""
    is_text = False
    for chunk in _chunks(path):
        is_text = EOS_ID not in chunk and (is_text or _looks_like_text(chunk[:_HEAD]))
        if not is_text:
            break
        out.write(chunk)
    return is_text


def _looks_like_text(head: bytes) -> bool:
    """Judges the first bytes of a file, without zeros; the module's docstring has the rule."""
    if compressed_format(head):
        return False
    try:
        # An incremental decoder, not told that this is the end, does not mind a character cut off there.
        codecs.getincrementaldecoder("utf-8")().decode(head)
        return True
    except UnicodeDecodeError:
        controls = len(head) - len(head.translate(None, _CONTROLS))
        return controls * 100 <= len(head)


def _open(path: str | os.PathLike) -> BufferedReader:
    """Opens a regular file to read it; any other kind is a DataError, and no pipe makes it wait."""
    with _data_error("read", path):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DataError(f"{_quote(path)} is not a regular file; save the bytes to a file first")
    return open(fd, "rb")


def _chunks(path: Path) -> Iterator[bytes]:
    with _data_error("read", path), _open(path) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _is_made(path: Path, size: int | None = None) -> bool:
    """Whether there is a file of this name and size; a link, a pipe or a device is none that was made here."""
    return path.is_file() and not path.is_symlink() and size in (None, path.stat().st_size)


def _is_blob(path: Path, blob: Blob) -> bool:
    return _is_made(path, blob.size) and _sha256(path) == blob.sha256


def _sha256(path: Path) -> str:
    with _open(path) as file, _data_error("read", path):
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that becomes `target` when the block ends well, and vanishes when it does not."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    with _data_error("write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".*.{'[0-9a-f]' * 16}.tmp"):  # by a process that was killed
            with contextlib.suppress(OSError):
                if left.lstat().st_mtime < time.time() - 86_400:
                    left.unlink()
        try:
            with open(temporary, "xb") as out:
                yield out
                _publish(out, temporary, target)
        except BaseException:  # Ctrl-C as well
            temporary.unlink(missing_ok=True)
            raise


def _publish(out: BinaryIO, path: Path, target: Path) -> None:
    """Gives the open file at `path` its final name, once its bytes are on disk for certain."""
    out.flush()
    os.fsync(out.fileno())
    os.replace(path, target)


@contextlib.contextmanager
def _data_error(action: str, thing: str | os.PathLike, remedy: str = "") -> Iterator[None]:
    """Turns a failure outside this program into a DataError: what could not be done, to what, and why."""
    try:
        yield
    except (OSError, HTTPException) as error:
        reason = error.reason if type(error) is urllib.error.URLError else getattr(error, "strerror", None) or error
        raise DataError(f"cannot {action} {_quote(thing)}: {reason or type(error).__name__}{remedy}") from error


def _quote(thing: str | os.PathLike) -> str:
    """Quotes a path for a message, which stays one printable line whatever the path holds."""
    return command.shorten(repr(os.fsdecode(thing)), 1000)


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the given arguments, or those of the process; returns the exit code (see `command.run`)."""
    about = "Find or make a file of raw bytes to train on, and print its path and size."
    parser = command.Parser("prepare.py", description=about)
    parser.add_argument("source", metavar="SOURCE", help=f"a corpus ({', '.join(CORPORA)}), a file or a folder")
    parser.add_argument("--from", dest="from_file", metavar="FILE", help="a local copy, to be used as the download")

    def run() -> None:
        arguments = parser.parse_args(argv)
        path = resolve(arguments.source, from_file=arguments.from_file, data_dir=DATA_DIR)
        command.say(one_line(f"{path}: {len(open_bytes(path)):,} bytes"))

    return command.run("prepare.py", run, mistakes=(DataError,))


if __name__ == "__main__":
    sys.exit(main())
