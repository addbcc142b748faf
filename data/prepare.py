"""Corpora by name, file or folder, as one file of raw bytes on disk.

A byte-level model reads a corpus as it lies on disk: no tokenization, no vocabulary, no shards. All there is to prepare
is *one file of bytes*, from which training reads sequences with `open_bytes`. `resolve` finds or makes that file:

    python data/prepare.py stdlib                     # this Python's own library: about 12 MB, no download
    python data/prepare.py shakespeare                # downloads 1 MB
    python data/prepare.py enwik8 --from enwik8.zip   # downloaded before, by other means
    python data/prepare.py notes.txt                  # any file that is not compressed: used as it is
    python data/prepare.py ~/src/project              # any folder: its text files, joined

A name wins over a file of the same name: `shakespeare` is the corpus, `./shakespeare` the file.

Documents
    Where a corpus is joined from many files, byte 0 (`EOS_ID`) stands between two documents, never before the first or
    after the last. A single file is taken as it is; whoever wants documents in it puts the zeros there.

Which files of a folder are text
    A document is a regular, non-empty file without a single byte 0, in no compressed format, whose first 64 KiB are
    UTF-8. Where they are not, they may still be text in an older 8-bit encoding such as Latin-1: then at most one in a
    hundred of those bytes may be a control character (of random bytes, ten are). The bytes are never recoded. UTF-16
    is full of zeros, so it is not text here. Files and folders whose name starts with a dot are skipped. A link to a
    file is followed, a link to a folder is not, which rules out loops. If the folder contains this data folder, then
    what was prepared there (`*.bin`, `*.zip`, `*.part`) is skipped, and so are the folders of training runs, so that a
    corpus never feeds on itself.

Files in the data folder
    A file gets its final name in one step, after its last byte is on disk: whatever has the name is complete. Until
    then it has a unique temporary name; what a crash leaves of these is removed when it is a day old. A download is
    kept as `.part`, to be resumed.
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
import stat
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import weakref
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
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
TEMPORARY_AGE_S = 86_400.0  # nothing is written to a temporary file for so long unless its process is dead

_CHUNK = 1 << 20  # bytes in memory at a time
_HEAD = 1 << 16  # leading bytes of a file by which its encoding is judged
_SEPARATOR = bytes([EOS_ID])
_CONTROLS = bytes(set(range(32)) - set(b"\b\t\n\v\f\r\x1b")) + b"\x7f"
_PRODUCT_SUFFIXES = (".bin", ".zip", ".part")
_TEMPORARY_GLOB = ".*." + "[0-9a-f]" * 16 + ".tmp"
_RECIPE = b"2"  # part of every cache name; raise it when the rules for joining a folder change
_RESUME = "; run again (what has arrived is kept), or get the file by other means and pass it with --from FILE"
_COMPRESSED = {  # how the files of each format begin
    "gzip": rb"\x1f\x8b\x08",
    "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\0",
    "LZMA": rb"\x5d\0\0..(\xff{8}|.{5}\0{3})",
    "Zstandard": rb"[\x1e-\x28]\xb5/\xfd|[\x50-\x5f]\*M\x18",
    "LZ4": rb"\x04\x22M\x18|\x02\x21L\x18",
    "zip": rb"PK(\x03\x04|\x05\x06|\x07\x08)",
    "7z": rb"7z\xbc\xaf\x27\x1c",
    "RAR": rb"Rar!\x1a\x07",
    "lzip": rb"LZIP[\x00\x01]",
    "lzop": rb"\x89LZO\0",
    "Snappy": rb"\xff\x06\0\0sNaPpY",
    "compress": rb"\x1f[\x9d\xa0]",
}


class DataError(ValueError):
    """A mistake of the user or a failure outside this program, in one line that names the thing and the remedy."""


# --- Reading ----------------------------------------------------------------------------------------------------------


class ByteFile:
    """A file of bytes that is read where it is asked for, so that memory does not grow with the file.

    It is not mapped into memory: when another program shortens a mapped file, the next access ends the process.

    Args:
        path: A regular, non-empty file. It stays open for the life of this object and of what `split` returned.

    Raises:
        DataError: It is missing, unreadable, empty, or no regular file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self._fd = _open_fd(path)
        weakref.finalize(self, os.close, self._fd)
        self._first, self._len = 0, os.fstat(self._fd).st_size
        if not self._len:
            raise DataError(f"{_quote(path)} is empty; there is nothing to learn from it")

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, key: slice) -> np.ndarray:
        """Reads `data[start:stop]`, uint8, into memory; DataError as `read`."""
        if not isinstance(key, slice) or key.step not in (None, 1):
            raise TypeError("a ByteFile takes slices without a step, such as data[10:20]")
        start, stop, _ = key.indices(self._len)
        return self.read(np.array([start]), max(stop - start, 0))[0]

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Reads sequences of one length.

        Args:
            starts: Their offsets in bytes, any integer dtype, shape (n,).
            length: In bytes, of each.

        Returns:
            The bytes, uint8, shape (n, length).

        Raises:
            DataError: The file became shorter since it was opened, or cannot be read any more.
            IndexError: A sequence is not within the data.
        """
        offsets = starts.tolist()
        if offsets and not 0 <= min(offsets) <= max(offsets) <= self._len - length:
            raise IndexError(f"sequences of {length} bytes from {min(offsets)} to {max(offsets)}, of {self._len} bytes")
        with _blame("read", self.path):
            rows = [os.pread(self._fd, length, self._first + offset) for offset in offsets]
            for i, row in enumerate(rows):
                if len(row) < length:
                    rows[i] = self._read_rest(row, self._first + offsets[i], length)
        return np.frombuffer(bytearray().join(rows), dtype=np.uint8).reshape(len(rows), length)

    def split(self, at: int) -> tuple["ByteFile", "ByteFile"]:
        """Returns views of the bytes before and from offset `at`; nothing is read."""
        if not 0 <= at <= self._len:
            raise IndexError(f"offset {at} of {self._len} bytes")
        return self._view(0, at), self._view(at, self._len)

    def _view(self, start: int, stop: int) -> "ByteFile":
        view = copy.copy(self)
        view._owner = self  # it closes the file when it is collected
        view._first, view._len = self._first + start, stop - start
        return view

    def _read_rest(self, data: bytes, offset: int, length: int) -> bytes:
        """Completes what one call of pread, which returns 2 GiB at most, has read from `offset`."""
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                raise DataError(f"{_quote(self.path)} became shorter while it was being read; restore it and run again")
            data += more
        return data


def open_bytes(path: str | os.PathLike) -> ByteFile:
    """Opens a file to read sequences from, for instance the result of `resolve`; errors as `ByteFile`."""
    return ByteFile(path)


def read_sequences(data: ByteFile | np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Reads sequences of a corpus that is a file or an array.

    Args:
        data: The corpus; an array is uint8, shape (bytes,).
        starts: Offsets in bytes, any integer dtype, shape (n,).
        length: In bytes, of each sequence.

    Returns:
        The bytes, uint8, shape (n, length); a copy.

    Raises:
        DataError: The file became shorter since it was opened, or cannot be read any more.
        IndexError: A sequence is not within the data.
    """
    if isinstance(data, ByteFile):
        return data.read(starts, length)
    return data[starts.astype(np.int64)[:, None] + np.arange(length)]


def compressed_format(head: bytes) -> str | None:
    """Names the compressed format of a file by its first bytes (16 suffice); None if it is not compressed."""
    return next((name for name, magic in _COMPRESSED.items() if re.match(magic, head, re.DOTALL)), None)


# --- Corpora ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blob:
    """A file whose content is known beforehand.

    Attributes:
        file: Its name in the data folder.
        size: In bytes.
        sha256: Of the content, as 64 lower-case hexadecimal digits.
    """

    file: str
    size: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.size:,} bytes, sha256 {self.sha256}"


@dataclass(frozen=True)
class Download:
    """A corpus on a server: where, its raw bytes, and the zip file with them that the server sends, if it is one."""

    url: str
    raw: Blob
    zipped: Blob | None = None


@dataclass(frozen=True)
class Tree:
    """A corpus that is joined from the text files of a folder on this machine.

    Attributes:
        file: Its name in the data folder. A file of that name is never rebuilt, so what changes belongs in the name.
        root: The folder.
        suffix: How the names of its documents end.
        skip: Names of the subfolders to leave out, at any depth.
    """

    file: str
    root: Path
    suffix: str
    skip: frozenset[str]


CORPORA: dict[str, Download | Tree] = {
    "stdlib": Tree(
        file=f"stdlib-{platform.python_version()}.bin",
        root=Path(sysconfig.get_path("stdlib")),
        suffix=".py",
        skip=frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}),
    ),
    "shakespeare": Download(
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        raw=Blob("shakespeare.bin", 1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    ),
    "enwik8": Download(
        url="http://mattmahoney.net/dc/enwik8.zip",
        raw=Blob("enwik8.bin", 100_000_000, "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"),
        zipped=Blob("enwik8.zip", 36_445_475, "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"),
    ),
}


def resolve(
    source: str | os.PathLike = "stdlib",
    *,
    from_file: str | os.PathLike | None = None,
    data_dir: Path = DATA_DIR,
    progress: bool = True,
) -> Path:
    """Finds the file of raw bytes behind a name, a file or a folder, and makes it first if need be.

    What is there already is used at once: a download is hashed when it arrives, afterwards only its size is compared; a
    folder is read again only if the path, size or modification time of one of its files changed.

    Args:
        source: A name in `CORPORA`, a file (returned as it is, however large) or a folder (joined into a cache file).
            Only a `str` can be a name; a `Path` always is a path, since `Path("./stdlib")` forgets its "./".
        from_file: A local copy to take instead of downloading `source`. A zipped corpus may come zipped or unpacked.
        data_dir: Where to put what is made; created if missing.
        progress: Show progress bars, in bytes, if stderr is a terminal.

    Returns:
        The path of a regular, non-empty file. What `resolve` made lies in `data_dir`.

    Raises:
        DataError: There is no such source, it cannot be read, it is compressed, it is not what it should be, it holds
            no text, or the result cannot be written.
    """
    data_dir = Path(data_dir)
    corpus = CORPORA.get(source) if isinstance(source, str) else None
    if isinstance(corpus, Download):
        return _resolve_download(corpus, source, from_file, data_dir, progress)
    if from_file is not None:
        names = ", ".join(name for name, entry in CORPORA.items() if isinstance(entry, Download))
        raise DataError(f"--from replaces a download, and {_quote(source)} is none; it goes with: {names}")
    if isinstance(corpus, Tree):
        target = data_dir / corpus.file
        if not _is_made(target):
            root = corpus.root.resolve()
            _join(_list_documents(root, data_dir, corpus.suffix, corpus.skip), root, target, progress)
        return target
    path = _existing(source)
    if path.is_dir():
        return _resolve_folder(path.resolve(), data_dir, progress)
    data = open_bytes(path)
    if name := compressed_format(data[:16].tobytes()):
        raise DataError(f"{_quote(path)} is compressed ({name}); unpack it first and name what comes out")
    return path


def _existing(source: str | os.PathLike) -> Path:
    """Returns the path of a file or folder that exists; else the DataError that lists what would have been possible."""
    path = Path(os.fsdecode(source))
    with _blame("read", path), contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
        path.stat()  # ValueError: a zero or a lone surrogate in the path
        if os.fspath(source):  # the empty path would be the current folder
            return path
    raise DataError(f"no file, folder or corpus {_quote(source)}; the corpora are: {', '.join(CORPORA)}")


# --- Downloads --------------------------------------------------------------------------------------------------------


def _resolve_download(
    corpus: Download, name: str, from_file: str | os.PathLike | None, data_dir: Path, progress: bool
) -> Path:
    """`resolve` for a corpus with a server: takes it from the data folder, a given file or the network."""
    target = data_dir / corpus.raw.file
    if from_file is not None:
        _import(Path(from_file), corpus, name, target, progress)
    elif _is_made(target, corpus.raw.size):
        pass
    elif corpus.zipped is None:
        _download(corpus.url, corpus.raw, target, progress)
    else:
        packed = data_dir / corpus.zipped.file
        if not _is_blob(packed, corpus.zipped):
            _download(corpus.url, corpus.zipped, packed, progress)
        with _open(packed, os.O_NOFOLLOW) as file:
            _unpack(file, corpus.raw, target, packed, progress)
    return target


def _import(given: Path, corpus: Download, name: str, target: Path, progress: bool) -> None:
    """Makes `target` from a file that the user says is the corpus, or is its zip file; refuses any other."""
    blobs = [blob for blob in (corpus.raw, corpus.zipped) if blob is not None]
    with _open(given) as file:
        size = os.fstat(file.fileno()).st_size
        # Hashing takes its time, and a wrong size says enough.
        digest = _sha256(file, given) if size in {blob.size for blob in blobs} else ""
        if digest == corpus.raw.sha256:
            _write_blob(file, corpus.raw, target, given, progress)
        elif corpus.zipped is not None and digest == corpus.zipped.sha256:
            _unpack(file, corpus.raw, target, given, progress)
        else:
            expected, found = " or ".join(map(str, blobs)), f"{size:,} bytes" + (digest and f", sha256 {digest}")
            raise DataError(f"{_quote(given)} is not {name}: expected {expected}; found {found}")


def _download(url: str, blob: Blob, target: Path, progress: bool) -> None:
    """Downloads into `<target>.part`, resuming what is there, checks it, and renames it to `target`.

    A network that fails leaves the part to resume from; a part that is complete but wrong is removed.
    """
    part = target.with_name(target.name + ".part")
    with _blame("write", part):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _open_part(part) as out:
            if _is_blob(target, blob):  # made by the process that had the part until now
                return
            try:
                _receive(url, blob, out, progress)
            finally:
                if not (size := out.seek(0, os.SEEK_END)):
                    part.unlink()
            found = "more than that" if size > blob.size else f"{size:,} bytes, sha256 {_sha256(out, part)}"
            if not found.endswith(blob.sha256):
                part.unlink()
                raise DataError(
                    f"{url} did not send {blob.file}: expected {blob}; found {found}; removed it, run again to retry"
                )
            _publish(out, part, target)


def _open_part(part: Path) -> BinaryIO:
    """Opens a download that may have been begun, once no other process is writing it; what is no file is replaced."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            info = part.lstat()
            if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:  # nothing that lies elsewhere is written
                part.unlink()
        file = _open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        with contextlib.suppress(OSError):  # a file system without locks: the checksum will tell
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), part.lstat()):
                return file
        file.close()  # the other process finished or removed it


def _receive(url: str, blob: Blob, out: BinaryIO, progress: bool) -> None:
    """Appends the bytes still missing from `out`, or begins again where the server does not resume."""
    size = out.seek(0, os.SEEK_END)
    if size >= blob.size:
        return
    with _blame("download", url, _RESUME):
        response, size = _request(url, size)
        out.seek(size)
        out.truncate()
        with response, _bar(blob.file, blob.size, progress, done=size) as bar:
            while size <= blob.size and (chunk := response.read1(_CHUNK)):  # an endless answer must not fill the disk
                with _blame("write", out.name):
                    size += out.write(chunk)
                bar.update(len(chunk))
        out.flush()
        if size < blob.size:
            raise ConnectionError(f"the connection ended after {size:,} of {blob.size:,} bytes")


def _request(url: str, start: int) -> tuple[HTTPResponse, int]:
    """Asks a server for a file from byte `start` on; returns the response, and the offset where its body begins."""
    headers = {"User-Agent": "ByteGPT"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if start and error.code == 416:  # "range not satisfiable": the file there is no longer than ours
            return _request(url, 0)
        raise
    if response.status != 206:  # all of it
        return response, 0
    if response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        return response, start
    response.close()
    return _request(url, 0)


def _unpack(file: BinaryIO, blob: Blob, target: Path, origin: Path, progress: bool) -> None:
    """Writes the only member of a zip file to `target`; errors as `_write_blob`."""
    with zipfile.ZipFile(file) as archive, archive.open(archive.namelist()[0]) as member:
        _write_blob(member, blob, target, origin, progress)


def _write_blob(source: BinaryIO, blob: Blob, target: Path, origin: Path, progress: bool) -> None:
    """Copies `source` to `target`; a DataError, and nothing written, if what `origin` holds is not `blob`."""
    digest = hashlib.sha256()
    with _replacing(target) as out, _bar(blob.file, blob.size, progress) as bar:
        for chunk in _chunks(source, origin):
            digest.update(chunk)
            out.write(chunk)
            bar.update(len(chunk))
        if digest.hexdigest() != blob.sha256:
            found = f"{out.tell():,} bytes, sha256 {digest.hexdigest()}"
            raise DataError(f"{_quote(origin)} does not hold {blob.file}: expected {blob}; found {found}")


# --- Folders ----------------------------------------------------------------------------------------------------------


class _Document(NamedTuple):
    """A file that may turn out to be text; documents are in the order of their names."""

    name: str  # its path relative to the folder
    size: int  # in bytes, at least 1
    mtime_ns: int


def _resolve_folder(root: Path, data_dir: Path, progress: bool) -> Path:
    """`resolve` for a user's folder: its cache file, whose name changes with whatever changes in the folder."""
    documents = _list_documents(root, data_dir)
    stem = re.sub(r"[^\w.-]", "_", root.name, flags=re.ASCII).lstrip(".")[:40] or "folder"
    family = f"{stem}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"
    listing = os.fsencode("".join(f"{name}\0{size}\0{mtime_ns}\0" for name, size, mtime_ns in documents))
    target = data_dir / CACHE_NAME / f"{family}-{hashlib.sha256(_RECIPE + listing).hexdigest()[:16]}.bin"
    if not _is_made(target):
        _join(documents, root, target, progress)
    for other in target.parent.glob(f"{family}-*.bin"):
        if other != target:
            with contextlib.suppress(OSError):  # removed by a process like this one
                other.unlink()
    return target


def _list_documents(
    root: Path, data_dir: Path, suffix: str = "", skip: frozenset[str] = frozenset()
) -> list[_Document]:
    """Lists the files below a folder that may be documents, by their names and metadata alone.

    Args:
        root: The folder, without links in its path.
        data_dir: The data folder, to know what was made there.
        suffix: How their names end.
        skip: Names of subfolders to leave out.

    Returns:
        The documents, sorted by name.

    Raises:
        DataError: A folder is unreadable.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"cannot read {_quote(error.filename)}: {error.strerror}") from error

    own_folders = {data_dir.resolve(), (data_dir / CACHE_NAME).resolve()}
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
            if real.parent in own_folders and real.name.endswith(_PRODUCT_SUFFIXES):
                continue
            with _blame("read", path):
                info = path.stat()
            if info.st_size:
                documents.append(_Document(path.relative_to(root).as_posix(), info.st_size, info.st_mtime_ns))
    return sorted(documents)


def _join(documents: list[_Document], root: Path, target: Path, progress: bool) -> None:
    """Joins those documents that are text into `target`; DataError if none is."""
    total = sum(document.size for document in documents)
    with _replacing(target) as out, _bar(root.name, total, progress) as bar:
        listed = 0
        for document in documents:
            start = out.tell()
            if start:
                out.write(_SEPARATOR)
            if not _append_text(root / document.name, out, bar):
                out.seek(start)
                out.truncate()
            listed += document.size
            bar.update(listed - bar.n)  # a file that is no text was not read to its end
        if not out.tell():
            raise DataError(
                f"folder {_quote(root)} holds no text: none of its {len(documents)} non-empty files (hidden ones apart)"
                " is free of zero bytes and UTF-8 or an 8-bit encoding, uncompressed; name another folder"
            )


def _append_text(path: Path, out: BinaryIO, bar: tqdm) -> bool:
    """Copies a file until it proves to be no text; returns whether it is, else the caller takes back what was written.

    One pass over a huge file is enough then.
    """
    first = True
    with _open(path) as file:
        for chunk in _chunks(file, path):
            if _SEPARATOR in chunk or (first and not _looks_like_text(chunk[:_HEAD])):
                return False
            out.write(chunk)
            bar.update(len(chunk))
            first = False
    return not first  # emptied since it was listed


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


# --- Files ------------------------------------------------------------------------------------------------------------


def _open_fd(path: str | os.PathLike, flags: int = os.O_RDONLY) -> int:
    """Opens a regular file; DataError for any other kind, without waiting for the other end of a pipe."""
    with _blame("read", path):
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise DataError(f"{_quote(path)} is not a regular file; save the bytes to a file first")


def _open(path: Path, flags: int = os.O_RDONLY) -> BinaryIO:
    return open(_open_fd(path, flags), "r+b" if flags & os.O_RDWR else "rb")


def _is_made(path: Path, size: int | None = None) -> bool:
    """Whether a file of this name, and size, was made; a link, pipe or device under that name is nothing made here."""
    with contextlib.suppress(OSError):
        info = path.lstat()
        return stat.S_ISREG(info.st_mode) and info.st_size > 0 and size in (None, info.st_size)
    return False


def _is_blob(path: Path, blob: Blob) -> bool:
    if not _is_made(path, blob.size):
        return False
    with _open(path, os.O_NOFOLLOW) as file:
        return _sha256(file, path) == blob.sha256


def _sha256(file: BinaryIO, path: Path) -> str:
    """Hashes an open file from its beginning, and leaves it there."""
    with _blame("read", path):
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
    return digest


def _chunks(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yields what is left of an open file in chunks of bounded size."""
    while True:
        with _blame("read", path):
            chunk = file.read(_CHUNK)
        if not chunk:
            return
        yield chunk


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that becomes `target` when the block ends well, and vanishes when it does not."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")  # must match _TEMPORARY_GLOB
    with _blame("write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(_TEMPORARY_GLOB):  # by a process that was killed
            with contextlib.suppress(OSError):
                if left.lstat().st_mtime < time.time() - TEMPORARY_AGE_S:
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
def _blame(action: str, thing: str | os.PathLike, remedy: str = "") -> Iterator[None]:
    """Turns a failure of the outside world into a DataError that says what could not be done, to what, and why."""
    try:
        yield
    except (OSError, HTTPException) as error:
        reason = error.reason if type(error) is urllib.error.URLError else getattr(error, "strerror", None) or error
        raise DataError(f"cannot {action} {_quote(thing)}: {reason or type(error).__name__}{remedy}") from error


def _quote(thing: str | os.PathLike) -> str:
    """Quotes a path for a message, which thereby stays one printable line whatever the path holds."""
    text = os.fsdecode(thing)
    return f"'{text}'" if text.isprintable() else ascii(text)


def _bar(title: str, total: int, progress: bool, done: int = 0) -> tqdm:
    """A progress bar in bytes that is shown on terminals only and leaves no trace."""
    return tqdm(
        desc=one_line(title),
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None if progress else True,  # None: unless stderr is a terminal
    )


# --- Command ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the given arguments, or those of the process; returns the exit code (see `command.run`)."""
    return command.run("prepare.py", lambda: _command(argv), mistakes=(DataError,))


def _command(argv: list[str] | None) -> None:
    parser = command.Parser(
        "prepare.py", description="Find or make a file of raw bytes to train on, and print its path and size."
    )
    parser.add_argument("source", metavar="SOURCE", help=f"a corpus ({', '.join(CORPORA)}), a file or a folder")
    parser.add_argument("--from", dest="from_file", metavar="FILE", help="a local copy, to be used as the download")
    arguments = parser.parse_args(argv)
    path = resolve(arguments.source, from_file=arguments.from_file, data_dir=DATA_DIR)
    command.say(one_line(f"{path}: {len(open_bytes(path)):,} bytes"))


if __name__ == "__main__":
    sys.exit(main())
