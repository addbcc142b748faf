"""Corpora by name, file and folder, against hashlib, zipfile, brute force, real servers and processes really killed."""

import bz2
import errno
import fcntl
import gzip
import hashlib
import json
import lzma
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import urllib.request
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from data import prepare
from data.prepare import DataError, Download, Tree, open_bytes, read_sequences, resolve

ROOT = Path(prepare.__file__).parent.parent
MIB = 1 << 20
BODY = bytes((i * i + i // 251) % 256 for i in range(300_000))
TEXT = "What is here is text: äöü €\n".encode()


def download(url: str, content: bytes) -> Download:
    return Download(url, len(content), hashlib.sha256(content).hexdigest())


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Writes files, given by relative name, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def everything_in(folder: Path) -> list[str]:
    """The relative names of all files below a folder, hidden and temporary ones too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "products"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of prepare.py in a repository of its own, so that commands write there."""
    script = tmp_path / "repository" / "data" / "prepare.py"
    script.parent.mkdir(parents=True)
    shutil.copy(prepare.__file__, script)
    for module in ("command.py", "byte_tokenizer.py"):
        shutil.copy(ROOT / module, script.parent.parent)
    return script


def command(script: Path, *arguments: str | bytes | Path, code: str = "", **options) -> subprocess.CompletedProcess:
    """Runs prepare.py as a command, or as a module after `code`."""
    if code:
        code += "\nimport sys; from data import prepare; sys.exit(prepare.main(sys.argv[1:]))"
    start = ["-c", code] if code else [script]
    options = {"cwd": script.parent.parent, "capture_output": True, "text": True, "timeout": 30, **options}
    return subprocess.run([sys.executable, *start, *arguments], **options)


# --- Downloads --------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Serves `content` under every path, as well or badly as the attributes say, and notes what it was asked for."""

    daemon_threads = True
    content = BODY
    ranges = True  # honour Range
    status = 200  # for every answer if it is an error
    breaks_after: int | None = None  # bytes of body after which the connection is cut
    length = True  # send Content-Length
    gate: threading.Event | None = None  # wait for it in the middle of the body

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []  # the Range header of each request
        self.reached = threading.Event()  # the gate

    def handle_error(self, *_: object) -> None:
        """A client that hangs up, as it should when it is sent too much, is no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/corpus"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers["Range"]
        server.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else None
        if server.status != 200 or (start is not None and start >= len(server.content)):
            self.send_error(server.status if server.status != 200 else 416)
            return
        first = start or 0
        body = server.content[first:]
        self.send_response(200 if start is None else 206)
        if start is not None:
            self.send_header("Content-Range", f"bytes {first}-{len(server.content) - 1}/{len(server.content)}")
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.gate:
            self.wfile.write(body[:1000])
            server.reached.set()
            server.gate.wait(10)
            body = body[1000:]
        self.wfile.write(body[: server.breaks_after])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server whose content is the corpus "tiny"; a proxy that the environment may name is kept out of it."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(prepare, "TIMEOUT_S", 5.0)
    with Server() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setitem(prepare.CORPORA, "tiny", download(running.url, BODY))
        yield running
        running.shutdown()


@pytest.fixture
def packed(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Makes "tiny" a corpus that is served as a zip file; returns such a file."""
    path = tmp_path / "given.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny", BODY)
    server.content = path.read_bytes()
    monkeypatch.setitem(prepare.CORPORA, "tiny", download(server.url, server.content))
    return path


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file called "secret" can be opened: permissions do not stop root, who may run the tests."""
    real = os.open

    def refuse(path: object, *arguments: object, **options: object) -> int:
        if os.fsdecode(path).endswith("secret"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("length", [True, False])
def test_a_download_is_complete_and_leaves_nothing_else(server: Server, data_dir: Path, length: bool) -> None:
    server.length = length
    path = resolve("tiny", data_dir=data_dir)
    assert path == data_dir / "tiny.bin"
    assert path.read_bytes() == BODY
    assert everything_in(data_dir) == ["tiny.bin"]
    assert server.asked == [None]


def test_a_corpus_on_disk_is_neither_downloaded_nor_hashed_again(
    server: Server, data_dir: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(data_dir, {"tiny.bin": BODY})
    monkeypatch.setattr(hashlib, "sha256", None)
    assert resolve("tiny", data_dir=data_dir).read_bytes() == BODY


@pytest.mark.parametrize("length", [1, len(BODY) - 1, len(BODY)])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_is_resumed(server: Server, data_dir: Path, length: int, ranges: bool) -> None:
    server.ranges = ranges  # or it sends everything
    write(data_dir, {"tiny.part": BODY[:length]})
    assert resolve("tiny", data_dir=data_dir).read_bytes() == BODY
    assert server.asked == ([f"bytes={length}-"] if length < len(BODY) else [])
    assert everything_in(data_dir) == ["tiny.bin"]


def test_a_broken_connection_leaves_the_part_and_the_next_run_resumes_it(server: Server, data_dir: Path) -> None:
    server.breaks_after = 100_000
    with pytest.raises(DataError, match=r"ended after 100,000 of 300,000 bytes; run again .* --from FILE"):
        resolve("tiny", data_dir=data_dir)
    assert everything_in(data_dir) == ["tiny.part"]
    assert (data_dir / "tiny.part").read_bytes() == BODY[:100_000]
    server.breaks_after = None
    assert resolve("tiny", data_dir=data_dir).read_bytes() == BODY
    assert server.asked == [None, "bytes=100000-"]
    assert everything_in(data_dir) == ["tiny.bin"]


@pytest.mark.parametrize("part", [b"", BODY[:1000], b"rubbish", b"z" * len(BODY)])
def test_a_wrong_checksum_is_refused_and_removed(server: Server, data_dir: Path, part: bytes) -> None:
    write(data_dir, {"tiny.part": part} if part else {})
    if BODY.startswith(part):  # a good beginning, a bad end
        server.content = BODY[:-1] + b"?"
    expected = hashlib.sha256(BODY).hexdigest()
    with pytest.raises(DataError, match=f"expected 300,000 bytes, sha256 {expected}; found 300,000 .*sha256.*again"):
        resolve("tiny", data_dir=data_dir)
    assert everything_in(data_dir) == []


def test_a_part_that_is_too_long_is_removed(server: Server, data_dir: Path) -> None:
    write(data_dir, {"tiny.part": BODY + b"x"})
    with pytest.raises(DataError, match="run again"):
        resolve("tiny", data_dir=data_dir)
    assert resolve("tiny", data_dir=data_dir).read_bytes() == BODY


@pytest.mark.parametrize("content", [BODY + b"x", BODY * 20])
@pytest.mark.parametrize("length", [True, False])
def test_too_much_is_refused_and_removed(server: Server, data_dir: Path, content: bytes, length: bool) -> None:
    server.content, server.length = content, length
    with pytest.raises(DataError, match="expected 300,000 bytes.*found [0-9,]+ bytes"):
        resolve("tiny", data_dir=data_dir)
    assert everything_in(data_dir) == []


@pytest.mark.parametrize("content", [BODY[:-1], b""])
@pytest.mark.parametrize("length", [True, False])
def test_too_little_is_refused_and_kept(server: Server, data_dir: Path, content: bytes, length: bool) -> None:
    server.content, server.length = content, length
    with pytest.raises(DataError, match=f"ended after {len(content):,} of 300,000 bytes"):
        resolve("tiny", data_dir=data_dir)
    assert everything_in(data_dir) == ["tiny.part"]


@pytest.mark.parametrize("status", [403, 404, 500, 416])
def test_an_http_error_is_one_line_and_keeps_the_part(server: Server, data_dir: Path, status: int) -> None:
    server.status = status
    with pytest.raises(DataError, match=f"cannot download '{server.url}': HTTP Error {status}"):
        resolve("tiny", data_dir=data_dir)
    assert everything_in(data_dir) == []
    write(data_dir, {"tiny.part": BODY[:1000]})
    with pytest.raises(DataError, match="--from FILE"):
        resolve("tiny", data_dir=data_dir)
    assert (data_dir / "tiny.part").read_bytes() == BODY[:1000]


def test_an_unreachable_server_is_one_line(server: Server, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but nobody listens: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        monkeypatch.setitem(prepare.CORPORA, "tiny", download(url, BODY))
        with pytest.raises(DataError, match="cannot download .*refused.*--from FILE") as caught:
            resolve("tiny", data_dir=data_dir)
    assert "\n" not in str(caught.value)
    assert everything_in(data_dir) == []


def test_a_server_that_falls_silent_is_given_up(
    server: Server, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "TIMEOUT_S", 0.2)
    server.gate = threading.Event()
    with pytest.raises(DataError, match="timed out"):
        resolve("tiny", data_dir=data_dir)
    server.gate.set()
    assert (data_dir / "tiny.part").read_bytes() == BODY[:1000]


def test_ctrl_c_keeps_the_part_of_a_download(server: Server, data_dir: Path, monkeypatch) -> None:
    def interrupt(self: object, n: int = 1) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare.tqdm, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve("tiny", data_dir=data_dir)
    monkeypatch.undo()
    assert everything_in(data_dir) == ["tiny.part"]
    part = (data_dir / "tiny.part").read_bytes()
    assert part and BODY.startswith(part)


@pytest.mark.parametrize("first_fails", [False, True])
def test_a_download_waits_for_another(server: Server, data_dir: Path, monkeypatch, first_fails: bool) -> None:
    waiting, results = threading.Event(), []
    real = fcntl.flock

    def lock(file: BinaryIO, operation: int) -> None:
        if server.asked:
            waiting.set()
        real(file, operation)

    def run() -> None:
        try:
            results.append(resolve("tiny", data_dir=data_dir).read_bytes())
        except DataError as error:
            results.append(str(error))

    monkeypatch.setattr(fcntl, "flock", lock)
    server.content, server.gate = BODY[:-1] + b"?" if first_fails else BODY, threading.Event()
    threads = [threading.Thread(target=run) for _ in range(2)]
    threads[0].start()
    assert server.reached.wait(5)
    server.content = BODY  # from the second request on
    threads[1].start()
    assert waiting.wait(5)
    server.gate.set()
    for thread in threads:
        thread.join(10)
    if first_fails:  # the other does not try what has just failed
        assert results[0] == results[1] and "sent something else" in results[0]
    else:
        assert results == [BODY, BODY]
    assert server.asked == [None]
    assert everything_in(data_dir) == ([] if first_fails else ["tiny.bin"])


def test_a_zipped_download_is_unpacked(server: Server, packed: Path, data_dir: Path) -> None:
    write(data_dir, {"tiny.part": server.content[:5]})
    assert resolve("tiny", data_dir=data_dir).read_bytes() == BODY
    assert everything_in(data_dir) == ["tiny.bin"]
    assert server.asked == ["bytes=5-"]


def test_a_local_file_replaces_the_download(server: Server, data_dir: Path, tmp_path: Path, offline: None) -> None:
    (tmp_path / "got").write_bytes(BODY)
    path = resolve("tiny", from_file=tmp_path / "got", data_dir=data_dir)
    assert path.read_bytes() == BODY
    assert everything_in(data_dir) == ["tiny.bin"]
    assert (tmp_path / "got").read_bytes() == BODY  # a copy was taken
    assert resolve("tiny", from_file=path, data_dir=data_dir).read_bytes() == BODY  # even from itself


def test_a_local_file_of_a_zipped_corpus_is_unpacked(packed: Path, data_dir: Path, offline: None) -> None:
    assert resolve("tiny", from_file=str(packed), data_dir=data_dir).read_bytes() == BODY
    assert everything_in(data_dir) == ["tiny.bin"]


@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("content", [b"short", BODY[:-1] + b"?"])
def test_a_wrong_local_file_is_refused(server: Server, data_dir: Path, tmp_path, content: bytes, present: bool) -> None:
    (tmp_path / "wrong").write_bytes(content)
    if present:
        write(data_dir, {"tiny.bin": BODY})
    with pytest.raises(DataError) as caught:
        resolve("tiny", from_file=tmp_path / "wrong", data_dir=data_dir)
    message = str(caught.value)
    assert "wrong' is not the download of tiny: expected 300,000 bytes, sha256 " in message
    assert hashlib.sha256(BODY).hexdigest() in message
    assert f"found {len(content):,} bytes" in message
    assert (hashlib.sha256(content).hexdigest() in message) == (len(content) == len(BODY))
    assert everything_in(data_dir) == (["tiny.bin"] if present else [])


@pytest.mark.parametrize("source", ["stdlib", "file", ".", "missing"])
def test_a_local_file_goes_only_with_downloads(source: str, data_dir: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(write(tmp_path / "here", {"file": TEXT}))
    with pytest.raises(DataError, match=f"--from .*'{re.escape(source)}'.*shakespeare, enwik8"):
        resolve(source, from_file="file", data_dir=data_dir)


def test_the_documented_corpora() -> None:
    assert list(prepare.CORPORA) == ["stdlib", "shakespeare", "enwik8"]
    downloads = [corpus for corpus in prepare.CORPORA.values() if isinstance(corpus, Download)]
    assert [each.size for each in downloads] == [1_115_394, 36_445_475]
    assert all(re.fullmatch("[0-9a-f]{64}", each.sha256) for each in downloads)


# --- The standard library ---------------------------------------------------------------------------------------------


def test_the_standard_library_is_this_pythons_without_its_tests(data_dir: Path, offline: None) -> None:
    path = resolve(data_dir=data_dir)
    assert path == data_dir / f"stdlib-{platform.python_version()}.bin"
    documents = path.read_bytes().split(b"\0")
    root = Path(os.__file__).parent
    names = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.py") if p.is_file()}
    out = re.compile(r"(^|/)(tests?|idle_test|site-packages|dist-packages|__pycache__|\.[^/]*)/")
    assert documents == [names[name] for name in sorted(names) if names[name] and not out.search(name)]
    assert 5e6 < path.stat().st_size < 30e6
    assert everything_in(data_dir) == [path.name]


def test_the_standard_library_is_joined_once_and_again_when_missing(data_dir: Path, tmp_path, monkeypatch) -> None:
    root = write(tmp_path / "lib", {"a.py": b"a", "b.txt": b"b", "test/c.py": b"c", "d/e.py": b"e"})
    monkeypatch.setitem(prepare.CORPORA, "stdlib", Tree("lib.bin", root, ".py", frozenset({"test"})))
    path = resolve(data_dir=data_dir)
    assert path.read_bytes() == b"a\0e"
    write(root, {"a.py": b"changed"})
    assert resolve(data_dir=data_dir).read_bytes() == b"a\0e"
    path.unlink()
    assert resolve(data_dir=data_dir).read_bytes() == b"changed\0e"


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"x", TEXT, bytes(256), BODY])
def test_a_file_is_used_as_it_is(tmp_path: Path, data_dir: Path, content: bytes) -> None:
    path = tmp_path / "anything"
    path.write_bytes(content)
    assert resolve(str(path), data_dir=data_dir) == path
    assert resolve(path, data_dir=data_dir) == path
    assert not data_dir.exists()


def test_a_huge_file_costs_nothing(tmp_path: Path, data_dir: Path) -> None:
    path = tmp_path / "huge"
    with open(path, "wb") as file:
        file.truncate(10 << 30)  # 10 GiB, of which none is on disk
    assert resolve(path, data_dir=data_dir) == path
    assert len(open_bytes(path)) == 10 << 30


def test_a_name_wins_over_a_file_and_a_path_over_the_name(
    server: Server, tmp_path: Path, data_dir: Path, monkeypatch
) -> None:
    monkeypatch.chdir(write(tmp_path / "here", {"tiny": TEXT}))
    assert resolve("tiny", data_dir=data_dir).read_bytes() == BODY
    assert resolve("./tiny", data_dir=data_dir).read_bytes() == TEXT
    assert resolve(Path("tiny"), data_dir=data_dir).read_bytes() == TEXT


@pytest.mark.parametrize("source", ["missing", "./stdlib", "", "file/below", "nul\0nul", "new\nline", "\udcff\ud800"])
def test_a_missing_source_is_one_line_that_lists_the_names(source: str, tmp_path: Path, data_dir, monkeypatch) -> None:
    monkeypatch.chdir(write(tmp_path / "here", {"file": TEXT}))
    with pytest.raises(DataError, match="no file, folder or corpus '.*stdlib, shakespeare, enwik8") as caught:
        resolve(source, data_dir=data_dir)
    assert str(caught.value).isprintable()


def test_an_empty_file_is_refused(tmp_path: Path, data_dir: Path) -> None:
    (tmp_path / "empty").touch()
    for use in (lambda path: resolve(path, data_dir=data_dir), open_bytes):
        with pytest.raises(DataError, match="empty' is empty"):
            use(tmp_path / "empty")


def test_an_unreadable_file_is_refused(tmp_path: Path, data_dir: Path, secret: None) -> None:
    folder = write(tmp_path / "folder", {"1": TEXT, "secret": TEXT})
    for source in (folder, folder / "secret"):
        with pytest.raises(DataError, match="cannot read '.*/folder/secret': Permission denied"):
            resolve(source, data_dir=data_dir)
    assert everything_in(data_dir) == []


def test_links_that_go_round_are_refused(tmp_path: Path, data_dir: Path) -> None:
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(DataError, match="cannot read '.*round'"):
        resolve(tmp_path / "round", data_dir=data_dir)


# --- Reading ----------------------------------------------------------------------------------------------------------


def test_open_bytes_is_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BODY)
    data = open_bytes(tmp_path / "file")
    assert len(data) == len(BODY)
    assert data[:].tobytes() == BODY
    assert data[:].dtype == np.uint8
    for wrong, reason in [("missing", "No such file"), (".", "not a regular file")]:
        with pytest.raises(DataError, match=reason):
            open_bytes(tmp_path / wrong)
    for key in (0, slice(0, 10, 2)):
        with pytest.raises(TypeError, match="slices without a step"):
            data[key]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_file_reads_like_an_array(data: st.DataObject) -> None:
    array = np.frombuffer(BODY, dtype=np.uint8)[: data.draw(st.integers(1, 500))]
    with tempfile.NamedTemporaryFile() as file:
        file.write(array.tobytes())
        file.flush()
        at = data.draw(st.integers(0, len(array)))
        whole = open_bytes(file.name)
        for view, expected in zip((whole, *whole.split(at)), (array, array[:at], array[at:]), strict=True):
            a, b = data.draw(st.none() | st.integers(-600, 600)), data.draw(st.none() | st.integers(-600, 600))
            assert np.array_equal(view[a:b], expected[a:b])
            length = data.draw(st.integers(0, len(expected)))
            starts = np.array(data.draw(st.lists(st.integers(0, len(expected) - length), max_size=5)), dtype=np.uint64)
            for corpus in (view, expected):
                rows = read_sequences(corpus, starts, length)
                assert rows.dtype == np.uint8 and rows.shape == (len(starts), length) and rows.flags.writeable
                assert all(
                    np.array_equal(row, expected[int(s) :][:length]) for row, s in zip(rows, starts, strict=True)
                )


def test_a_view_reads_nothing_of_its_neighbour_and_outlives_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BODY)
    head, tail = open_bytes(tmp_path / "file").split(1000)
    assert head[990:2000].tobytes() == BODY[990:1000]
    for view, start in ((head, 995), (head, -1), (tail, -1), (tail, len(tail) - 9)):
        with pytest.raises(IndexError, match="10 bytes from offset"):
            view.read(np.array([start]), 10)
    assert tail.split(5)[1][:7].tobytes() == BODY[1005:1012]


def test_a_closed_file_leaves_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BODY)
    before = os.listdir("/dev/fd")
    head, tail = open_bytes(tmp_path / "file").split(1000)
    del head
    assert len(tail[:10]) == 10
    del tail
    assert os.listdir("/dev/fd") == before


@pytest.mark.parametrize("size", [0, 1, 9_999])
def test_a_file_that_becomes_shorter_is_named(tmp_path: Path, size: int) -> None:
    path = tmp_path / "my\x1b[31m.txt"
    path.write_bytes(BODY[:10_000])
    _, tail = open_bytes(path).split(5_000)
    os.truncate(path, size)
    for read in (lambda: tail[4_000:], lambda: read_sequences(tail, np.array([0, 4_990]), 10)):
        with pytest.raises(DataError, match="became shorter while it was being read") as caught:
            read()
        assert "my\\x1b[31m.txt" in str(caught.value)
        assert str(caught.value).isprintable()


def test_a_read_that_comes_in_pieces_is_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(BODY)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, offset: real(fd, min(n, 1000), offset))
    assert open_bytes(tmp_path / "file")[5:200_000].tobytes() == BODY[5:200_000]


def test_a_device_that_fails_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(BODY)
    data = open_bytes(tmp_path / "file")

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataError, match="cannot read '.*/file': Input/output error"):
        data[:10]


# What compressors of formats that are not read write first, and how the format is called.
HEADS = [
    (lzma.compress(TEXT, lzma.FORMAT_ALONE), "LZMA"),
    (b"\x04\x22\x4d\x18\x64\x40\xa7", "LZ4"),
    (b"7z\xbc\xaf\x27\x1c\0\4", "7z"),
    (b"PK\3\4\x14\0", "zip"),
    (b"PK\5\6" + bytes(18), "zip"),
    (b"Rar!\x1a\7\1\0", "RAR"),
    (b"\x1f\x9d\x90Wh", "compress"),
    (b"LZIP\1\x0c", "lzip"),
    (b"\x89LZO\0\r\n\x1a\n", "lzop"),
    (b"\xff\6\0\0sNaPpY", "Snappy"),
    (b"PAR1\x15\x04\x15", "Parquet"),
    (b"ARROW1\0\0\xff\xff", "Arrow"),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("head", "name"), HEADS)
def test_a_compressed_file_is_refused_by_its_format(
    tmp_path: Path, data_dir: Path, head: bytes, name: str, packed: bool
) -> None:
    (tmp_path / "notes.txt").write_bytes(gzip.compress(head + BODY) if packed else head + BODY)
    with pytest.raises(DataError, match=rf"notes.txt' is compressed \({name}\); unpack it first"):
        resolve(tmp_path / "notes.txt", data_dir=data_dir)
    assert not data_dir.exists()


@pytest.mark.parametrize("head", [head for head, _ in HEADS if 0 not in head] + [b"PK\3\4", b"Rar!\x1a\7\1"])
def test_a_compressed_file_in_a_folder_is_no_text(tmp_path: Path, data_dir: Path, head: bytes) -> None:
    files = {"1": TEXT, "2": head + TEXT * 20, "3": TEXT, "4": gzip.compress(gzip.compress(TEXT * 20))}
    folder = write(tmp_path / "folder", files)
    assert resolve(folder, data_dir=data_dir).read_bytes() == TEXT + b"\0" + TEXT


@pytest.mark.parametrize(
    "text", [b"BZh is how bzip2 begins", b"PK", b"Rar!", b"7z", b"LZIP", b"]", b"P*M", b"\x1f\x8b"]
)
def test_text_that_begins_almost_like_a_compressed_file_is_taken(tmp_path: Path, data_dir: Path, text: bytes) -> None:
    (tmp_path / "corpus.gz").write_bytes(text)
    assert resolve(tmp_path / "corpus.gz", data_dir=data_dir).read_bytes() == text


# --- Compressed files -------------------------------------------------------------------------------------------------


def zstd(content: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(content)


def pack(content: bytes, how: str) -> bytes:
    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}[how](content)


PACKED = pytest.mark.parametrize("how", ["gz", "bz2", "xz", "zst"])
NOISE = np.random.default_rng(0).bytes(300_000)  # does not become smaller: stored as it is
NOISE_TEXT = NOISE[:90_000].translate(b"x" * 32 + bytes(range(32, 127)) + b"x" + bytes(range(128, 256)))  # latin-1


@PACKED
@pytest.mark.parametrize("content", [b"x", bytes(3 * MIB), NOISE])
def test_a_compressed_file_stands_for_its_content(tmp_path: Path, data_dir: Path, how: str, content: bytes) -> None:
    middle = len(content) // 2
    for name, packed in (
        (f"a.{how}", pack(content, how) + bytes(8 if how in ("gz", "xz") else 0)),  # padding
        ("any name", pack(content[:middle], how) + pack(content[middle:], how)),  # streams are joined
    ):
        path = write(tmp_path, {name: packed}) / name
        made = resolve(path, data_dir=data_dir)
        assert made.read_bytes() == content and made.parent == data_dir / ".cache"
        inode = made.stat().st_ino
        assert resolve(str(path), data_dir=data_dir).stat().st_ino == inode
    assert len(everything_in(data_dir)) == 2


@PACKED
@pytest.mark.parametrize("content", [TEXT * 50, b"a" * MIB, NOISE_TEXT])
def test_a_truncated_or_damaged_file_is_refused(tmp_path: Path, data_dir: Path, how: str, content: bytes) -> None:
    packed = pack(content, how)
    ends = sorted({len(packed) - 1, len(packed) - 4, len(packed) * 2 // 3, len(packed) // 2, 20})
    cases = [packed[:end] for end in ends] + [packed + b"no stream"]
    for at in (len(packed) // 2, len(packed) - 6):
        cases.append(packed[:at] + bytes([packed[at] ^ 0x5A]) + packed[at + 1 :])
    cases += [packed + case for case in cases]
    for case in cases:
        for name in (f"x.{how}", "folder/x"):
            path = write(tmp_path, {name: case}) / name
            with pytest.raises(DataError, match="cannot read '.*x.*': .*; it is damaged or was cut short") as caught:
                resolve(path.parent if "/" in name else path, data_dir=data_dir)
            assert str(caught.value).isprintable()
    assert everything_in(data_dir) == []


@PACKED
def test_a_compressed_file_of_nothing_is_refused(tmp_path: Path, data_dir: Path, how: str) -> None:
    write(tmp_path, {"x": pack(b"", how)})
    with pytest.raises(DataError, match="/x' holds no text"):
        resolve(tmp_path / "x", data_dir=data_dir)


def test_a_format_whose_module_is_missing_is_one_line(tmp_path: Path, data_dir: Path, monkeypatch) -> None:
    files = {"x.zst": b"\x28\xb5\x2f\xfd\x24\x1c", "x.xz": lzma.compress(TEXT)}
    for name, module in {"x.zst": "zstandard", "x.xz": "lzma"}.items():
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, "compression", None)
        path = write(tmp_path / name, {name: files[name]})
        for source in (path, path / name):
            with pytest.raises(DataError, match=f"{name}' is compressed .*{module}.*; install that, or unpack"):
                resolve(source, data_dir=data_dir)


def test_the_module_of_python_3_14_is_taken_where_it_is(tmp_path: Path, data_dir: Path, monkeypatch) -> None:
    zstd = pytest.importorskip("backports.zstd")  # the same module, for older Pythons
    monkeypatch.setitem(sys.modules, "compression", type(sys)("compression"))
    monkeypatch.setitem(sys.modules, "compression.zstd", zstd)
    monkeypatch.setattr(sys.modules["compression"], "zstd", zstd, raising=False)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    packed = zstd.compress(NOISE)
    write(tmp_path, {"x": packed + packed, "y": packed[:-1]})
    assert resolve(tmp_path / "x", data_dir=data_dir).read_bytes() == NOISE * 2
    with pytest.raises(DataError, match="cannot read .*/y.*cut short"):
        resolve(tmp_path / "y", data_dir=data_dir)


def test_compressed_text_in_a_folder_is_text(tmp_path: Path, data_dir: Path) -> None:
    files = {"1": gzip.compress(TEXT), "2.bz2": bz2.compress(b"a\0b"), "3.xz": lzma.compress(b"three"), "4": b"four"}
    files["5"] = gzip.compress(b"")
    assert resolve(write(tmp_path / "x", files), data_dir=data_dir).read_bytes() == TEXT + b"\0three\0four"


# --- JSON lines -------------------------------------------------------------------------------------------------------

JSON_KEYS = st.sampled_from(["text", "body", "é", "a b"])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda values: st.lists(values) | st.dictionaries(JSON_KEYS, values),
    max_leaves=5,
)
RECORDS = st.dictionaries(JSON_KEYS, JSON_VALUES, max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(RECORDS, st.text(max_size=30)), min_size=1, max_size=6),
    JSON_KEYS,
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n \t\n"]),
    st.sampled_from(["", "\ufeff"]),
    st.sampled_from(["a.jsonl", "a.JSONL.gz", "x/a.jsonl", "x/b.jsonl.xz"]),
    st.integers(1, 50),
)
def test_json_lines_are_the_texts_under_a_key(
    records: list, key: str, ascii: bool, newline: str, bom: str, name: str, chunk: int
) -> None:
    lines = [json.dumps(record | {key: text}, ensure_ascii=ascii) for record, text in records]
    content = (bom + newline.join(lines) + newline * (chunk % 2)).encode()
    expected = b"\0".join(text.encode() for _, text in records if text)
    how = {"gz": gzip.compress, "xz": lzma.compress}.get(name.rpartition(".")[2], bytes)
    with tempfile.TemporaryDirectory() as base, pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_CHUNK", chunk)
        path = write(Path(base), {name: how(content)}) / name
        source, products = path.parent if "/" in name else path, Path(base, "products")
        if expected:
            made = resolve(source, text_key=key, data_dir=products)
            assert made.read_bytes() == expected
            assert everything_in(products) == [f".cache/{made.name}"]
        else:
            with pytest.raises(DataError, match="holds no text"):
                resolve(source, text_key=key, data_dir=products)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"body": "x", "id": 3}', "no field 'text', the line has body, id; name the field with --text-key"),
        (b"{}", "no field 'text'"),
        (b'["text"]', ".*the line is no object"),
        (b"3", ".*the line is no object"),
        (b'{"text": null}', "'text' must be a string, got null"),
        (b'{"text": ["x"]}', r"'text' must be a string, got \[\"x\"\]"),
        (b'{"text": 3}', "'text' must be a string, got 3"),
        (b'{"text": "a\\ud800b"}', r"'text' has half a character, '\\ud800'"),
        (b'{"text": "x"', "no JSON in UTF-8: "),
        (b'{"text": "x"} {"text": "y"}', "no JSON in UTF-8: "),
        (b"not \x1b[2J JSON", "no JSON in UTF-8: "),
        (b'{"text": "caf\xe9"}', "no JSON in UTF-8: "),
        (b'{"text": "\xed\xa0\x80"}', "no JSON in UTF-8: "),
        (b"[" * 200_000, "no JSON in UTF-8: "),
        (b'{"n": ' + b"9" * 5000 + b', "text": "x"}', "no JSON in UTF-8: "),
        (b'{"' + b"k\\n" * 5000 + b'": 1}', "no field 'text', the line has "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, data_dir: Path, line: bytes, reason: str) -> None:
    write(tmp_path, {"my.jsonl": b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n'})
    with pytest.raises(DataError, match=rf"/my.jsonl', line 3: {reason}") as caught:
        resolve(tmp_path / "my.jsonl", data_dir=data_dir)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700
    assert everything_in(data_dir) == []


def test_json_lines_are_known_by_the_end_of_the_name(tmp_path: Path, data_dir: Path, monkeypatch) -> None:
    monkeypatch.chdir(write(tmp_path, {"a.jsonl.bak": TEXT, "b.jsonl": b'{"text": "b"}', "x.jsonl/c": TEXT}))
    assert resolve("a.jsonl.bak", data_dir=data_dir) == Path("a.jsonl.bak")
    assert resolve("x.jsonl", data_dir=data_dir).read_bytes() == TEXT
    made = resolve("b.jsonl", data_dir=data_dir)
    monkeypatch.chdir(tmp_path / "x.jsonl")
    assert resolve("../b.jsonl", data_dir=data_dir) == made and made.read_bytes() == b"b"


def test_a_zero_in_a_text_ends_the_document_and_empty_texts_are_none(tmp_path: Path, data_dir: Path) -> None:
    write(tmp_path, {"a.jsonl": b'{"text": "a\\u0000b"}\n{"text": ""}\n{"text": "c"}'})
    assert resolve(tmp_path / "a.jsonl", data_dir=data_dir).read_bytes() == b"a\0b\0c"


def test_a_line_without_end_is_refused(tmp_path: Path, data_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(prepare, "_MAX_LINE", 2 * MIB)
    write(tmp_path, {"a.jsonl": b'{"text": "x"}\n"' + b"a" * (9 * MIB)})
    with pytest.raises(DataError, match="a.jsonl', line 2: longer than 2 MiB"):
        resolve(tmp_path / "a.jsonl", data_dir=data_dir)


def test_each_key_has_its_own_product_and_a_change_replaces_it(tmp_path: Path, data_dir: Path) -> None:
    path = write(tmp_path, {"a.jsonl": b'{"text": "one", "body": "two"}'}) / "a.jsonl"
    text, body = (resolve(path, text_key=key, data_dir=data_dir) for key in ("text", "body"))
    assert (text.read_bytes(), body.read_bytes()) == (b"one", b"two")
    path.write_bytes(b'{"text": "three", "body": "four"}')
    changed = resolve(path, data_dir=data_dir)
    assert changed.read_bytes() == b"three"
    assert everything_in(data_dir) == sorted(f".cache/{made.name}" for made in (changed, body))
    os.utime(path, ns=(1, 1))
    assert resolve(path, data_dir=data_dir) != changed


def test_a_link_is_read_by_its_own_name(tmp_path: Path, data_dir: Path) -> None:
    write(tmp_path, {"blob": b'{"text": "linked"}'})
    (tmp_path / "a.jsonl").symlink_to("blob")  # as Hugging Face's cache has them
    assert resolve(tmp_path / "a.jsonl", data_dir=data_dir).read_bytes() == b"linked"
    assert resolve(tmp_path / "blob", data_dir=data_dir) == tmp_path / "blob"


MEASURE = """
import resource, sys
from pathlib import Path
from data import prepare
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = prepare.resolve(sys.argv[1], data_dir=Path(sys.argv[2])).stat().st_size
print(size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


PACKERS = {
    "a.xz": lambda file: lzma.LZMAFile(file, "wb", preset=1),  # noqa: SIM115
    "a.zst": lambda file: pytest.importorskip("zstandard").ZstdCompressor().stream_writer(file),
    "a.jsonl.gz": lambda file: gzip.GzipFile("", "wb", 1, file),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKERS)
def test_memory_does_not_grow_with_the_prepared_file(tmp_path: Path, name: str) -> None:
    """200 MB that compress to a thousandth."""
    line = b'{"text": "' + b"a" * 9987 + b'"}\n' if "jsonl" in name else b"a" * 10**4
    with open(tmp_path / name, "wb") as file, PACKERS[name](file) as packed:
        for _ in range(200):
            packed.write(line * 100)
    arguments = [sys.executable, "-c", MEASURE, tmp_path / name, tmp_path / "products"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)
    size, grown = map(int, done.stdout.split())
    assert size == (20_000 * 9988 - 1 if "jsonl" in name else 200 * 10**6)
    assert grown * (1 if sys.platform == "darwin" else 1024) < 30 * MIB


# --- Folders ----------------------------------------------------------------------------------------------------------

NAMES = st.lists(st.sampled_from(["a", "b", "a.txt", "B", "-", "é", "a b", ".git", ".x"]), min_size=1, max_size=3)
CONTENTS = (
    st.binary(max_size=300)
    | st.text(max_size=100).map(str.encode)
    | st.text("aé\n\x01", min_size=90).map(lambda text: text.encode("latin-1"))
).filter(lambda content: not prepare.compressed_format(content))


def is_text(content: bytes) -> bool:
    """The rule in the documentation, for files below 64 KiB, said in another way."""
    if not content or 0 in content:
        return False
    try:
        content.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and error.end == len(content):
            return True
        return sum(b == 127 or (b < 32 and b not in (8, 9, 10, 11, 12, 13, 27)) for b in content) <= len(content) / 100
    return True


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(NAMES.map("/".join), CONTENTS, max_size=8))
@example({"a/b": b"2", "a.txt": b"1", "a/.x/y": b"no", ".git/a": b"no", "z": b"a\0b", "e": b"", "l": b"caf\xe9"})
def test_a_folder_is_its_text_files_in_order(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base, "folder")
        kept = {}
        for name, content in files.items():
            try:
                write(folder, {name: content})
                kept[name] = content
            except (FileExistsError, IsADirectoryError, NotADirectoryError):
                pass  # a file where a folder should be
        seen = [n for n in sorted(kept) if is_text(kept[n]) and not any(p.startswith(".") for p in n.split("/"))]
        folder.mkdir(exist_ok=True)
        products = Path(base, "products")
        if seen:
            path = resolve(folder, data_dir=products)
            assert path.read_bytes() == b"\0".join(kept[name] for name in seen)
            assert everything_in(products) == [path.relative_to(products).as_posix()]
        else:
            with pytest.raises(DataError, match="holds no text"):
                resolve(folder, data_dir=products)
            assert everything_in(products) == []


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xef\xbb\xbfBOM", True),
        ("é".encode() * MIB, True),
        (b"a" + "é".encode() * MIB, True),  # a character lies across the end of the first 64 KiB
        (b"aa" + "\1é".encode() * MIB, True),  # also with controls, since it is UTF-8
        (b"a" * (1 << 16) + b"\xff\x01" * 9000, True),  # judged by the first 64 KiB
        (b"half a character \xe2\x82", True),
        ("Grüße, Žižek".encode("cp1252"), True),
        ("caf\xe9\n".encode("latin-1") * 50, True),
        (b"\x1b[1mbold\x1b[0m\r\n\f", True),
        ("ab".encode("utf-16"), False),
        (bytes(range(1, 256)), False),
        (b"\xff" + b"a" * 98 + b"\x01", True),  # one control character in a hundred
        (b"\xff" + b"a" * 97 + b"\x01", False),
        (b"a" * (3 * MIB) + b"\0", False),
        (b"a" * (3 * MIB) + b"\0" + b"a" * MIB, False),
    ],
)
def test_text_is_recognised(tmp_path: Path, data_dir: Path, content: bytes, text: bool) -> None:
    folder = write(tmp_path / "folder", {"1": b"before", "2": content, "3": b"after"})
    expected = [b"before", content, b"after"] if text else [b"before", b"after"]
    assert resolve(folder, data_dir=data_dir).read_bytes() == b"\0".join(expected)


def test_a_file_found_binary_late_leaves_nothing_wherever_it_stands(tmp_path: Path, data_dir: Path) -> None:
    late = b"a" * (2 * MIB + 5) + b"\0"
    folder = write(tmp_path / "folder", {"1": late, "2": late, "3": TEXT, "4": late, "5": b"last", "6": late})
    assert resolve(folder, data_dir=data_dir).read_bytes() == TEXT + b"\0last"


def test_memory_stays_bounded(tmp_path: Path, data_dir: Path) -> None:
    folder = write(tmp_path / "folder", {"big": b"a" * (32 * MIB)})
    tracemalloc.start()
    try:
        path = resolve(folder, data_dir=data_dir)
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()
    assert path.stat().st_size == 32 * MIB


def test_an_unchanged_folder_is_reused_and_a_changed_one_rebuilt(tmp_path: Path, data_dir: Path) -> None:
    folder = write(tmp_path / "my folder", {"a": b"1", "b": b"2"})
    other = resolve(write(tmp_path / "x" / "my folder", {"a": b"other"}), data_dir=data_dir)
    first = resolve(folder, data_dir=data_dir)
    assert first.parent == data_dir / ".cache"
    assert first.name.startswith("my_folder-")
    inode = first.stat().st_ino
    assert resolve(str(folder) + "/", data_dir=data_dir) == first
    assert first.stat().st_ino == inode

    def same_size() -> None:
        write(folder, {"a": b"3"})
        for name in "ab":
            os.utime(folder / name, ns=(1, 1))

    changes = [
        (same_size, b"3\x002"),
        (lambda: (folder / "a").rename(folder / "c"), b"2\x003"),  # sizes and times in order are the same as before
        (lambda: write(folder, {"d/e": b"4"}), b"2\x003\x004"),
        (lambda: (folder / "b").unlink(), b"3\x004"),
        (lambda: (folder / "c").rename(folder / "z"), b"4\x003"),
    ]
    for change, expected in changes:
        change()
        path = resolve(folder, data_dir=data_dir)
        assert path.read_bytes() == expected
        assert everything_in(data_dir) == sorted([f".cache/{path.name}", f".cache/{other.name}"])  # the older are gone
    assert other.read_bytes() == b"other"


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path: Path, data_dir: Path) -> None:
    outside = write(tmp_path / "outside", {"text": b"from outside"})
    folder = write(tmp_path / "folder", {"a": b"a", "sub/b": b"b"})
    (folder / "link").symlink_to(outside / "text")
    (folder / "folder-link").symlink_to(outside)
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "dangling").symlink_to(tmp_path / "nowhere")
    (folder / "round").symlink_to("round")
    (folder / "device").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    path = resolve(folder, data_dir=data_dir)
    assert path.read_bytes() == b"a\0from outside\0b"
    (tmp_path / "link").symlink_to(folder)
    assert resolve(tmp_path / "link", data_dir=data_dir) == path


def test_the_name_of_a_file_may_be_no_text(tmp_path: Path, data_dir: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff\n*[a]")
    write(folder, {os.fsdecode(b"\xfe\n"): b"1", "*": b"2"})
    path = resolve(folder, data_dir=data_dir)
    assert sorted(path.read_bytes()) == sorted(b"1\x002")
    assert path.name.isascii()


@pytest.mark.parametrize("files", [{}, {"empty": b""}, {"zero": b"\0", ".hidden": TEXT, ".git/a": TEXT}])
def test_a_folder_without_text_is_refused(tmp_path: Path, data_dir: Path, files: dict[str, bytes]) -> None:
    folder = write(tmp_path / "folder", files)
    with pytest.raises(DataError, match="folder '.*folder' holds no text"):
        resolve(folder, data_dir=data_dir)
    assert everything_in(data_dir) == []


def test_a_folder_around_the_data_folder_does_not_feed_on_its_own_products(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "repository", {"model.py": b"model", "data/prepare.py": b"prepare", "sub/x.bin": b"mine"})
    monkeypatch.setitem(prepare.CORPORA, "text", download(server.url, TEXT))
    server.content = TEXT
    products = folder / "data"
    resolve("text", data_dir=products)
    write(products, {"text.zip": TEXT, "more.bin.part": TEXT})
    (folder / "link").symlink_to(products / "text.bin")
    first = resolve(folder, data_dir=products)
    assert first.read_bytes() == b"prepare\0model\0mine"
    inode = first.stat().st_ino
    write(products, {"text.zip": b"changed"})
    assert resolve(folder, data_dir=products) == first
    assert first.stat().st_ino == inode
    monkeypatch.chdir(folder)
    assert resolve(".", data_dir=Path("data")).read_bytes() == first.read_bytes()
    with pytest.raises(DataError, match="no text"):
        resolve(products / ".cache", data_dir=products)


def test_a_subfolder_that_cannot_be_read_is_named(tmp_path: Path, data_dir: Path, monkeypatch) -> None:
    folder = write(tmp_path / "folder", {"1": TEXT, "secret/2": TEXT})
    real = os.scandir

    def refuse(path: str):
        if str(path).endswith("secret"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot read '.*/folder/secret': Permission denied"):
        resolve(folder, data_dir=data_dir)


def test_a_file_that_is_emptied_meanwhile_is_left_out(tmp_path: Path, data_dir: Path, monkeypatch) -> None:
    folder = write(tmp_path / "folder", {"1": TEXT, "2": b"two", "3": b"three"})
    real = prepare._list_documents

    def empty(*arguments: object) -> list:
        documents = real(*arguments)
        (folder / "2").write_bytes(b"")
        return documents

    monkeypatch.setattr(prepare, "_list_documents", empty)
    assert resolve(folder, data_dir=data_dir).read_bytes() == TEXT + b"\0three"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_an_interruption_leaves_nothing(tmp_path: Path, data_dir: Path, monkeypatch, error: BaseException) -> None:
    folder = write(tmp_path / "folder", {"1": TEXT})

    def fail(_: int) -> None:
        assert len(everything_in(data_dir)) == 2  # the temporary file, and the lock
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((KeyboardInterrupt, DataError)) as caught:
        resolve(folder, data_dir=data_dir)
    if isinstance(error, OSError):
        assert re.search(r"cannot write '.*\.bin': No space left", str(caught.value))
    assert everything_in(data_dir) == []


# --- What others planted ----------------------------------------------------------------------------------------------


def plant(path: Path, kind: str, victim: Path) -> None:
    """Puts something that is no regular file under a name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.relpath(path))  # the length of such a name is limited
    else:
        path.symlink_to({"link": victim, "dangling link": victim.parent / "new", "device": "/dev/zero"}[kind])


@pytest.mark.parametrize("kind", ["pipe", "link", "dangling link", "device"])
@pytest.mark.parametrize("name", ["tiny.bin", "tiny.part", "lib.bin", ".cache"])
def test_links_pipes_and_devices_are_neither_followed_nor_waited_for(
    server: Server, packed: Path, data_dir: Path, tmp_path: Path, monkeypatch, name: str, kind: str
) -> None:
    folder = write(tmp_path / "folder", {"a.py": b"a"})
    victim = write(tmp_path / "elsewhere", {"victim": BODY}) / "victim"
    monkeypatch.setitem(prepare.CORPORA, "lib", Tree("lib.bin", folder, ".py", frozenset()))
    source, expected = {".cache": (folder, b"a"), "lib.bin": ("lib", b"a")}.get(name, ("tiny", BODY))
    planted = data_dir / name
    if name == ".cache":
        planted = resolve(folder, data_dir=data_dir)
    plant(planted, kind, victim)
    path = resolve(source, data_dir=data_dir)
    assert path.read_bytes() == expected
    assert path.is_file() and not path.is_symlink()
    assert victim.read_bytes() == BODY
    assert everything_in(victim.parent) == ["victim"]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_a_source_that_is_no_file_is_refused(
    tmp_path: Path, data_dir: Path, monkeypatch, kind: str, late: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    plant(tmp_path / "planted", kind, tmp_path)
    if late:  # it takes the place of a file while it is being opened
        monkeypatch.setattr(os.path, "isfile", lambda _: True)
    for arguments in ({"source": tmp_path / "planted"}, {"source": "enwik8", "from_file": tmp_path / "planted"}):
        with pytest.raises(
            DataError, match="planted' is not a regular file; save the bytes|cannot read .*planted': No such device"
        ):
            resolve(**arguments, data_dir=data_dir)
    assert not data_dir.exists()


def test_leftovers_of_a_crash_vanish_after_an_hour(tmp_path: Path, data_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e9)
    cache = write(data_dir / ".cache", {f".x.bin.{digit * 16}.tmp": b"" for digit in "ab"} | {".x.tmp": b"", "x": b""})
    for name, age in ((f".x.bin.{'a' * 16}.tmp", 3700), (f".x.bin.{'b' * 16}.tmp", 3500), (".x.tmp", 3700)):
        os.utime(cache / name, (1e9 - age,) * 2)
    made = resolve(write(tmp_path / "folder", {"1": TEXT}), data_dir=data_dir)
    assert everything_in(cache) == sorted([f".x.bin.{'b' * 16}.tmp", ".x.tmp", "x", made.name])


# --- Command ----------------------------------------------------------------------------------------------------------

# Stands still with a file that is written but has no name yet, until a line arrives.
STAND_STILL = """
import os, sys
from data import prepare
def fsync(descriptor):
    print("standing still", flush=True)
    sys.stdin.readline()
os.fsync = fsync
sys.exit(prepare.main(sys.argv[1:]))
"""


@pytest.fixture
def halfway(copy: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen, Path, Path]]:
    """A process that has joined a folder, that folder, and the cache folder with the process's temporary file."""
    folder = write(tmp_path / "folder", {"1": b"a" * (2 * MIB), "2": TEXT})
    process = subprocess.Popen(
        [sys.executable, "-c", STAND_STILL, folder],
        cwd=copy.parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "standing still\n"
        cache = copy.parent / ".cache"
        temporary, lock = everything_in(cache)
        assert temporary.startswith(".") and temporary.endswith(".tmp") and lock.endswith(".lock")
        yield process, folder, cache
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_kill_9_leaves_nothing_that_looks_finished(halfway, copy: Path) -> None:
    process, folder, cache = halfway
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    left, _ = everything_in(cache)
    os.utime(cache / left, (1, 1))
    assert resolve(folder, data_dir=copy.parent).read_bytes() == b"a" * (2 * MIB) + b"\0" + TEXT
    assert len(everything_in(cache)) == 1


@pytest.mark.slow
def test_one_of_two_processes_prepares_and_the_other_waits(halfway, copy: Path, monkeypatch) -> None:
    process, folder, cache = halfway
    waiting, made = threading.Event(), []
    real = fcntl.flock

    def lock(file: BinaryIO, operation: int) -> None:
        waiting.set()
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock)
    monkeypatch.setattr(prepare, "_join", None)  # it is not to be called here
    thread = threading.Thread(target=lambda: made.append(resolve(folder, data_dir=copy.parent)))
    thread.start()
    assert waiting.wait(10)
    assert len(everything_in(cache)) == 2 and not made
    process.communicate("\n" * 10)
    thread.join(10)
    assert process.returncode == 0
    assert made[0].read_bytes() == b"a" * (2 * MIB) + b"\0" + TEXT
    assert everything_in(cache) == [made[0].name]


def test_a_lock_that_a_dead_process_left_and_a_file_system_without_locks(tmp_path: Path, data_dir, monkeypatch) -> None:
    folder = write(tmp_path / "folder", {"1": TEXT})
    made = resolve(folder, data_dir=data_dir)
    made.rename(made.with_name(f".{made.name}.lock"))
    assert resolve(folder, data_dir=data_dir) == made and everything_in(data_dir) == [f".cache/{made.name}"]
    made.unlink()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    assert resolve(folder, data_dir=data_dir) == made and everything_in(data_dir) == [f".cache/{made.name}"]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_exits_with_130_and_leaves_nothing(halfway, signum: int) -> None:
    process, _, cache = halfway
    process.send_signal(signum)
    assert process.wait(10) == 130
    assert everything_in(cache) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirect", "code", "stderr"),
    [
        (">/dev/full", 2, "prepare.py: error: cannot write to standard output: No space left on device\n"),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
        ("<&-", 0, ""),
        ("--help >/dev/full", 2, "prepare.py: error: cannot write to standard output: No space left on device\n"),
    ],
)
def test_a_stream_that_is_closed_or_full_is_no_traceback(copy: Path, redirect: str, code: int, stderr: str) -> None:
    write(copy.parent, {"text.txt": TEXT})
    command = f"exec {shlex.quote(sys.executable)} data/prepare.py data/text.txt {redirect}"
    environment = {"PYTHONUNBUFFERED": "1"} if "--help" in redirect else {}
    options = {"cwd": copy.parent.parent, "env": environment, "capture_output": True, "text": True, "timeout": 30}
    done = subprocess.run(["bash", "-c", command], **options)
    assert (done.returncode, done.stderr) == (code, stderr)


@pytest.mark.slow
def test_the_script_copes_with_names_that_are_no_text(copy: Path, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xc3\xa9"
    Path(os.fsdecode(path)).write_bytes(TEXT)
    for encoding in ("utf-8", "ascii"):
        done = command(copy, path, env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"})
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) == 1
    done = command(copy, path + b"\nmissing", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing(copy: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", {"1": b"a" * (3 * MIB)})
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({2 * MIB + 77},) * 2)"
    done = command(copy, folder, code=limit)  # a real write that really fails
    assert done.returncode == 2
    assert re.fullmatch(r"prepare\.py: error: cannot write '[^\n]+\.bin': File too large\n", done.stderr)
    assert everything_in(copy.parent / ".cache") == []


def test_the_command_takes_several_sources(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(prepare, "DATA_DIR", tmp_path / "products")
    monkeypatch.chdir(write(tmp_path, {"a.jsonl": b'{"body": "x"}', "b.gz": gzip.compress(TEXT), "c": b"ccc"}))
    assert prepare.main(["a.jsonl", "b.gz", "c", "--text-key", "body"]) == 0
    sizes = [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert sizes == ["1 bytes", f"{len(TEXT)} bytes", "3 bytes"]


def test_progress_is_shown_on_a_terminal(tmp_path: Path, data_dir: Path, monkeypatch, capsys) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(30_000))
    write(tmp_path, {"x/1.jsonl": lines, "x/2.gz": gzip.compress(lines), "x/3": lines})
    monkeypatch.setattr(prepare, "_CHUNK", 10_000)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bars = []

    def bar(**options: object) -> tqdm:
        bars.append(tqdm(**options | {"mininterval": 0}))
        return bars[-1]

    monkeypatch.setattr(prepare, "tqdm", bar)
    resolve(tmp_path / "x", data_dir=data_dir)
    assert bars[0].n == bars[0].total == sum(path.stat().st_size for path in (tmp_path / "x").iterdir())
    assert len(capsys.readouterr().err.split("\r")) > 50


def test_the_command_prints_path_and_size(tmp_path: Path, monkeypatch, capsys, server: Server) -> None:
    monkeypatch.setattr(prepare, "DATA_DIR", tmp_path)
    (tmp_path / "given").write_bytes(BODY)
    assert prepare.main(["tiny", "--from", str(tmp_path / "given")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'tiny.bin'}: 300,000 bytes\n"
    assert server.asked == []


USER_MISTAKES = ["missing", "empty", "zeros", ".", "/dev/null", "shakespeare --from empty", "", "a b", "-x"]


@pytest.mark.parametrize("arguments", [line.split() for line in USER_MISTAKES])
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments: list[str]) -> None:
    monkeypatch.chdir(write(tmp_path / "here", {"empty": b"", "zeros/0": b"\0"}))
    monkeypatch.setattr(prepare, "DATA_DIR", tmp_path / "products")
    code = None
    try:
        code = prepare.main(arguments)
    except SystemExit as end:  # of argparse
        code = end.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert re.fullmatch(r"prepare\.py: error: [^\n]+\n", captured.err)


def test_no_terminal_escape_is_printed(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(prepare, "DATA_DIR", tmp_path / "products\x1b]0;title\x07")
    name = "evil\x1b[2J\x9b31m\u202e\n.txt"
    folder = write(tmp_path / name, {name: TEXT, "x.gz": gzip.compress(TEXT)[:-1]})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)  # with the progress bar
    for arguments in ([folder / name], [folder / "x.gz"], [folder], [folder / "missing"], ["enwik8", "--from", folder]):
        prepare.main([str(each) for each in arguments])
    (folder / "x.gz").unlink()
    prepare.main([str(folder)])
    with pytest.raises(SystemExit):
        prepare.main(["a", f"--{name}"])
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "folder 'evil" not in err and "evil\\x1b" in err
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out + err.replace("\r", ""))  # the bar returns by \r


def test_a_data_folder_that_cannot_be_written_is_one_line(tmp_path: Path, server: Server) -> None:
    write(tmp_path, {"file": TEXT, "folder/1": TEXT})
    for source in ("stdlib", "tiny", tmp_path / "folder"):
        with pytest.raises(DataError, match="cannot write '.*/file/.*Not a directory|cannot write .*File exists"):
            resolve(source, data_dir=tmp_path / "file")
