"""Corpora by name, file or folder, as one file of raw bytes on disk.

A byte-level model reads a corpus as it lies on disk: no tokenization, no vocabulary, no shards. All there is to prepare
is *one file of bytes*, which training maps into memory with `open_bytes`. `resolve` finds or makes that file:

    python data/prepare.py stdlib                     # this Python's own library: about 12 MB, no download
    python data/prepare.py shakespeare                # downloads 1 MB
    python data/prepare.py enwik8 --from enwik8.zip   # downloaded before, by other means
    python data/prepare.py notes.txt                  # any file: used as it is
    python data/prepare.py ~/src/project              # any folder: its text files, joined

A name wins over a file of the same name: `shakespeare` is the corpus, `./shakespeare` the file.

Documents
    Where a corpus is joined from many files, byte 0 stands between two documents, never before the first or after the
    last. The model learns it as "the end" (`EOS_ID` in byte_tokenizer.py). A single file is taken as it is; whoever
    wants documents in it puts the zeros there.

Which files of a folder are text
    A document is a regular, non-empty file without a single byte 0 whose first 64 KiB are UTF-8. Where they are not,
    they may still be text in an older 8-bit encoding such as Latin-1: then at most one in a hundred of those bytes may
    be a control character (of random or compressed bytes, ten are). The bytes are never recoded. UTF-16 is full of
    zeros, so it is not text here. Files and folders whose name starts with a dot are skipped. A link to a file is
    followed, a link to a folder is not, which rules out loops. If the folder contains this data folder, then what was
    prepared there (`*.bin`, `*.zip`, `*.part`) is skipped, and so are the folders of training runs, so that a corpus
    never feeds on itself.

What a crash leaves behind
    A file gets its final name in one step, after its last byte is safely on disk: whatever has the name is complete.
    Until then it has a temporary name, under a lock that the kernel drops however the process ends. That is how a later
    run tells the leftovers of a dead process, which it removes, from the work of a living one, which it leaves alone.
    A download is kept as `.part`, to be resumed.
"""

import argparse
import codecs
import contextlib
import hashlib
import os
import platform
import re
import secrets
import stat
import sys
import sysconfig
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows, where an open file can be neither removed nor renamed: that is lock enough there
    fcntl = None

DATA_DIR = Path(__file__).resolve().parent
CACHE_NAME = ".cache"  # the folder in the data folder that holds the joined folders
RUN_FILE = "checkpoints.json"  # what a folder of checkpoints and metrics has
SEPARATOR = b"\0"  # byte_tokenizer.EOS_ID, which cannot be imported when this file runs as a script
TIMEOUT_S = 30.0  # for each wait on the network, not for a download as a whole

_CHUNK = 1 << 20  # bytes in memory at a time
_HEAD = 1 << 16  # leading bytes of a file by which its encoding is judged
_CONTROLS = bytes(set(range(32)) - set(b"\b\t\n\v\f\r\x1b")) + b"\x7f"
_PRODUCT_SUFFIXES = (".bin", ".zip", ".part")
_TEMPORARY_GLOB = ".*." + "[0-9a-f]" * 16 + ".tmp"
_RECIPE = b"1"  # part of every cache name; raise it when the rules for joining a folder change
_RESUME = "; run again (what has arrived is kept), or get the file by other means and pass it with --from FILE"


class DataError(ValueError):
    """A user's mistake or the outside world's, in one line that names the thing and, where there is one, the remedy."""


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
    """A corpus that lies on a server.

    Attributes:
        url: Where.
        raw: The corpus itself.
        zipped: What the server sends, if that is a zip file with the corpus as its only member; else None.
    """

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
        DataError: There is no such source, it cannot be read, it is not what it should be, it holds no text, or the
            result cannot be written.
    """
    data_dir = Path(data_dir)
    corpus = CORPORA.get(source) if isinstance(source, str) else None
    if isinstance(corpus, Download):
        _remove_dead_temporaries(data_dir)
        return _resolve_download(corpus, source, from_file, data_dir, progress)
    if from_file is not None:
        names = ", ".join(name for name, entry in CORPORA.items() if isinstance(entry, Download))
        raise DataError(f"--from replaces a download, and {_quote(source)} is none; it goes with: {names}")
    if isinstance(corpus, Tree):
        _remove_dead_temporaries(data_dir)
        return _resolve_tree(corpus, data_dir, progress)
    path = _existing(source)
    if path.is_dir():
        _remove_dead_temporaries(data_dir)
        return _resolve_folder(path, data_dir, progress)
    _check_file(path)
    return path


def open_bytes(path: str | os.PathLike) -> np.memmap:
    """Maps a file into memory, so that reading a slice of it costs that slice, whatever the size of the file.

    Args:
        path: A file, for instance the result of `resolve`.

    Returns:
        A read-only array, shape (bytes in the file,), dtype uint8.

    Raises:
        DataError: It is missing, unreadable, empty, or no regular file.
    """
    _check_file(Path(path))
    with _blame("read", path):
        return np.memmap(path, dtype=np.uint8, mode="r")


# --- Downloads --------------------------------------------------------------------------------------------------------


def _resolve_download(
    corpus: Download, name: str, from_file: str | os.PathLike | None, data_dir: Path, progress: bool
) -> Path:
    """`resolve` for a corpus with a server: takes it from the data folder, a given file or the network."""
    target = data_dir / corpus.raw.file
    if from_file is not None:
        _import(Path(from_file), corpus, name, target, progress)
    elif _has_size(target, corpus.raw):
        pass
    elif corpus.zipped is None:
        _download(corpus.url, corpus.raw, target, progress)
    else:
        packed = data_dir / corpus.zipped.file
        if not _is_blob(packed, corpus.zipped):
            _download(corpus.url, corpus.zipped, packed, progress)
        _write_blob(_unpack(packed), corpus.raw, target, packed, progress)
    return target


def _import(given: Path, corpus: Download, name: str, target: Path, progress: bool) -> None:
    """Makes `target` from a file that the user says is the corpus, or is its zip file; refuses any other."""
    _check_file(given)
    if corpus.zipped is not None and _is_blob(given, corpus.zipped):
        _write_blob(_unpack(given), corpus.raw, target, given, progress)
        return
    if _is_blob(given, corpus.raw):
        _write_blob(_chunks(given), corpus.raw, target, given, progress)
        return
    blobs = [blob for blob in (corpus.raw, corpus.zipped) if blob is not None]
    expected = " or ".join(map(str, blobs))
    size = given.stat().st_size
    # Hashing takes its time, and a wrong size says enough.
    digest = f", sha256 {_sha256(given)}" if size in {blob.size for blob in blobs} else ""
    raise DataError(f"{_quote(given)} is not {name}: expected {expected}; found {size:,} bytes{digest}")


def _download(url: str, blob: Blob, target: Path, progress: bool) -> None:
    """Downloads into `<target>.part`, resuming what is there, checks it, and renames it to `target`.

    The lock on the part makes a second process wait for the first, and then find the work done. A network that fails
    leaves the part to resume from; a part that is complete but wrong is removed.
    """
    part = target.with_name(target.name + ".part")
    with _blame("write", part):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _open_locked(part) as out:
            try:
                if not _is_blob(target, blob):
                    _receive(url, blob, out, progress)
                    _check_part(url, blob, out, part)
                    _publish(out, part, target)
            finally:
                if not out.closed and out.seek(0, os.SEEK_END) == 0:
                    _discard(out, part)


def _receive(url: str, blob: Blob, out: BinaryIO, progress: bool) -> None:
    """Appends the bytes still missing from `out`, or begins again where the server does not resume."""
    size = out.seek(0, os.SEEK_END)
    if size >= blob.size:
        return
    with _blame("download", url, _RESUME):
        response, size = _request(url, size)
    out.seek(size)
    out.truncate()
    with _bar(blob.file, blob.size, progress, done=size) as bar:
        for chunk in _body(response, url):
            size += out.write(chunk)
            bar.update(len(chunk))
            if size > blob.size:  # wrong already; an endless answer must not fill the disk
                break
    out.flush()


def _request(url: str, start: int) -> tuple[HTTPResponse, int]:
    """Asks a server for what follows the first `start` bytes.

    Returns:
        The response, and the offset in bytes where its body begins: `start`, or 0 if the server does not resume.
    """
    headers = {"User-Agent": "ByteGPT"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if start and error.code == 416:  # "range not satisfiable": the file there is no longer than ours
            return _request(url, 0)
        raise
    if start and response.status == 206:
        if response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            return response, start
        response.close()
        return _request(url, 0)
    return response, 0


def _body(response: HTTPResponse, url: str) -> Iterator[bytes]:
    """Yields the body of a response as it arrives; DataError if it ends before the length that was announced."""
    announced, received = response.length, 0
    with response, _blame("download", url, _RESUME):
        while chunk := response.read1(_CHUNK):
            received += len(chunk)
            yield chunk
        if announced is not None and received < announced:
            raise ConnectionError(f"the connection broke after {received:,} of {announced:,} bytes")


def _check_part(url: str, blob: Blob, out: BinaryIO, part: Path) -> None:
    """Removes a finished download that is not `blob`, with a DataError; `out` is `part`, open and flushed."""
    size = part.stat().st_size
    digest = _sha256(part) if size == blob.size else None
    if digest == blob.sha256:
        return
    _discard(out, part)
    more = "more than that" if size > blob.size else f"{size:,} bytes" + (f", sha256 {digest}" if digest else "")
    raise DataError(f"{url} did not send {blob.file}: expected {blob}; found {more}; removed it, run again to retry")


def _unpack(path: Path) -> Iterator[bytes]:
    """Yields the only member of a zip file in chunks."""
    with _blame("unpack", path), zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as member:
        while chunk := member.read(_CHUNK):
            yield chunk


def _write_blob(chunks: Iterable[bytes], blob: Blob, target: Path, origin: Path, progress: bool) -> None:
    """Writes `blob` to `target`; a DataError, and nothing written, if the chunks from `origin` are not `blob`."""
    digest = hashlib.sha256()
    with _replacing(target) as out, _bar(blob.file, blob.size, progress) as bar:
        for chunk in chunks:
            digest.update(chunk)
            out.write(chunk)
            bar.update(len(chunk))
        if digest.hexdigest() != blob.sha256:
            found = f"{out.tell():,} bytes, sha256 {digest.hexdigest()}"
            raise DataError(f"{_quote(origin)} does not hold {blob.file}: expected {blob}; found {found}")


def _has_size(path: Path, blob: Blob) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) == blob.size


def _is_blob(path: Path, blob: Blob) -> bool:
    return _has_size(path, blob) and _sha256(path) == blob.sha256


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


# --- Folders ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Document:
    """A file that may turn out to be a document.

    Attributes:
        name: Its path relative to the folder, with forward slashes; the order of documents is the order of names.
        path: Its path on this machine.
        size: In bytes, at least 1.
        mtime_ns: When it was last changed, in nanoseconds.
    """

    name: str
    path: Path
    size: int
    mtime_ns: int


def _resolve_tree(corpus: Tree, data_dir: Path, progress: bool) -> Path:
    """`resolve` for a corpus in a known folder."""
    target = data_dir / corpus.file
    if not os.path.isfile(target):
        root = corpus.root.resolve()
        _build(_list_documents(root, data_dir, corpus.suffix, corpus.skip), root, target, progress)
    return target


def _resolve_folder(folder: Path, data_dir: Path, progress: bool) -> Path:
    """`resolve` for a user's folder: its cache file, whose name changes with whatever changes in the folder."""
    root = folder.resolve()
    documents = _list_documents(root, data_dir)
    stem = re.sub(r"[^\w.-]", "_", root.name, flags=re.ASCII).lstrip(".")[:40] or "folder"
    family = f"{stem}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"
    target = data_dir / CACHE_NAME / f"{family}-{_fingerprint(documents)}.bin"
    if not os.path.isfile(target):
        _build(documents, root, target, progress)
    for other in target.parent.glob(f"{family}-*.bin"):
        if other != target:
            with contextlib.suppress(OSError):  # in use on Windows, or removed by a process like this one
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
    own_folders = {data_dir.resolve(), (data_dir / CACHE_NAME).resolve()}
    documents = []
    for folder, subfolders, files in _walk(root):
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
                name = path.relative_to(root).as_posix()
                documents.append(_Document(name, path, info.st_size, info.st_mtime_ns))
    return sorted(documents, key=lambda document: document.name)


def _walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` that complains about an unreadable folder instead of leaving it out in silence."""

    def complain(error: OSError) -> None:
        with _blame("read", error.filename):
            raise error

    return os.walk(root, onerror=complain)


def _fingerprint(documents: list[_Document]) -> str:
    """Hashes what tells that a folder changed, without reading its files."""
    digest = hashlib.sha256(_RECIPE)
    for document in documents:
        digest.update(os.fsencode(f"{document.name}\0{document.size}\0{document.mtime_ns}\0"))
    return digest.hexdigest()[:16]


def _build(documents: list[_Document], root: Path, target: Path, progress: bool) -> None:
    """Joins those documents that are text into `target`; DataError if none is."""
    with _replacing(target) as out:
        _join(documents, out, _bar(root.name, sum(document.size for document in documents), progress))
        if not out.tell():
            raise DataError(
                f"folder {_quote(root)} holds no text: none of its {len(documents)} non-empty files (hidden ones apart)"
                " is free of zero bytes and UTF-8 or an 8-bit encoding; name another folder"
            )


def _join(documents: list[_Document], out: BinaryIO, bar: tqdm) -> None:
    """Appends the documents that are text to the empty file `out`, with separators between them."""
    with bar:
        listed = 0
        for document in documents:
            start = out.tell()
            if start:
                out.write(SEPARATOR)
            if not _append_text(document.path, out, bar):
                out.seek(start)
                out.truncate()
            listed += document.size
            bar.update(listed - bar.n)  # a file that is no text was not read to its end


def _append_text(path: Path, out: BinaryIO, bar: tqdm) -> bool:
    """Copies a file until it proves to be no text.

    Returns:
        Whether it is text. If not, the caller takes back what was written: one pass over a huge file is enough then.
    """
    first = True
    for chunk in _chunks(path):
        if SEPARATOR in chunk or (first and not _looks_like_text(chunk[:_HEAD])):
            return False
        out.write(chunk)
        bar.update(len(chunk))
        first = False
    return not first  # emptied since it was listed


def _looks_like_text(head: bytes) -> bool:
    """Judges the first bytes of a file, without zeros; the module's docstring has the rule."""
    try:
        # An incremental decoder, not told that this is the end, does not mind a character cut off there.
        codecs.getincrementaldecoder("utf-8")().decode(head)
        return True
    except UnicodeDecodeError:
        controls = len(head) - len(head.translate(None, _CONTROLS))
        return controls * 100 <= len(head)


# --- Files ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that becomes `target` when the block ends well, and vanishes when it does not."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")  # must match _TEMPORARY_GLOB
    with _blame("write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _open_locked(temporary) as out:
            try:
                yield out
                _publish(out, temporary, target)
            except BaseException:  # Ctrl-C as well
                _discard(out, temporary)
                raise


def _open_locked(path: Path) -> BinaryIO:
    """Opens a file for appending, created if missing, under an exclusive lock that ends with the file or the process.

    Waits while another process holds the lock. That one may then have renamed or removed the file, so the name is
    opened again until it leads to the file that is locked.
    """
    while True:
        file = open(path, "ab")  # noqa: SIM115 - the caller closes it
        try:
            _lock(file, path)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: BinaryIO, path: Path) -> None:
    """Locks an open file; says so if it has to wait. Does without where the system has no locks."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process to finish {path}", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks: temporary names are unique anyway, and downloads are hashed
        pass


def _publish(out: BinaryIO, path: Path, target: Path) -> None:
    """Gives the open file at `path` its final name, once its bytes are on disk for certain."""
    out.flush()
    os.fsync(out.fileno())
    if fcntl is None:
        out.close()
    os.replace(path, target)


def _discard(out: BinaryIO, path: Path) -> None:
    """Removes the open file at `path`."""
    if fcntl is None:
        out.close()
    path.unlink(missing_ok=True)


def _remove_dead_temporaries(data_dir: Path) -> None:
    """Removes the temporary files whose process is gone: those whose lock is free."""
    for folder in (data_dir, data_dir / CACHE_NAME):
        for path in folder.glob(_TEMPORARY_GLOB):
            with contextlib.suppress(OSError):  # BlockingIOError is an OSError: locked, so its process lives
                if fcntl is None:
                    path.unlink()
                else:
                    with open(path, "r+b") as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        path.unlink()


def _chunks(path: Path) -> Iterator[bytes]:
    """Yields the content of a file in chunks of bounded size."""
    with _blame("read", path), open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _existing(source: str | os.PathLike) -> Path:
    """Returns the path of a file or folder that exists; else the DataError that lists what would have been possible."""
    path = Path(os.fsdecode(source))
    try:
        if os.fspath(source):  # the empty path would be the current folder
            with _blame("read", path):
                path.stat()
            return path
    except DataError as error:
        if not isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            raise
    except ValueError:  # a zero in the path
        pass
    raise DataError(f"no file, folder or corpus {_quote(source)}; the corpora are: {', '.join(CORPORA)}")


def _check_file(path: Path) -> None:
    """Makes sure that a path leads to a regular, readable, non-empty file."""
    with _blame("read", path):
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # asked before it is opened: opening a pipe would wait for its other end
            raise DataError(f"{_quote(path)} is not a regular file; save the bytes to a file first")
        with open(path, "rb"):
            pass
    if info.st_size == 0:
        raise DataError(f"{_quote(path)} is empty; there is nothing to learn from it")


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
        desc=title,
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None if progress else True,  # None: unless stderr is a terminal
    )


# --- Command ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The arguments; those of the process if None.

    Returns:
        The exit code: 0, 2 for a user's mistake, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="prepare.py", description="Find or make a file of raw bytes to train on, and print its path and size."
    )
    parser.add_argument("source", metavar="SOURCE", help=f"a corpus ({', '.join(CORPORA)}), a file or a folder")
    parser.add_argument("--from", dest="from_file", metavar="FILE", help="a local copy, to be used as the download")
    arguments = parser.parse_args(argv)
    try:
        path = resolve(arguments.source, from_file=arguments.from_file, data_dir=DATA_DIR)
        line = f"{path}: {len(open_bytes(path)):,} bytes"
    except DataError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))  # the name of a file may be no text
    return 0


if __name__ == "__main__":
    sys.exit(main())
