"""Files that are read and written: their kind, bounds and places; safetensors' headers; slices, bands and scales."""

import errno
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import safetensors_io
from fp8_ops import weight_dequant, weight_quant
from model import ConfigError
from safetensors_io import CheckpointError, ShardedTensor, Slice2D, new_folder, read_header, shard_slice

E4M3 = torch.float8_e4m3fn
draws = settings(deadline=None, derandomize=True, database=None)


# --- Reading ----------------------------------------------------------------------------------------------------------


def put(path: Path, kind: str) -> None:
    """Puts something at a path that is no regular file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            before = os.getcwd()
            os.chdir(path.parent)  # a socket's path has little room
            server.bind(path.name)
            os.chdir(before)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind.startswith("/"):
        path.symlink_to(kind)


READERS: dict[str, Callable[[Path], object]] = {
    "json": lambda path: safetensors_io.read_json(path, ConfigError),
    "json of the user": lambda path: safetensors_io.read_json(path, ConfigError, follow=True),
    "header": read_header,
    "metadata": safetensors_io.read_metadata,
    "text": lambda path: safetensors_io.read_regular(path, 1000, follow=True),
}


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "loop", "nothing", "/dev/zero", "/dev/full", "/dev/tty"])
@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_are_read(tmp_path: Path, kind: str, reader: str) -> None:
    put(tmp_path / "file", kind)
    with pytest.raises(ValueError) as error:
        READERS[reader](tmp_path / "file")
    assert isinstance(error.value, (CheckpointError, ConfigError))
    one_line(error, tmp_path / "file")


def test_reading_has_a_bound(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    assert safetensors_io.read_regular(tmp_path / "file", 1000) == b"x" * 1000
    for path in (tmp_path / "file", Path("/proc/self/status")):  # which has a size of 0
        with pytest.raises(CheckpointError) as error:
            safetensors_io.read_regular(path, 999 if path.parent == tmp_path else 9)
        one_line(error, path, "more than")
    os.truncate(tmp_path / "file", 1 << 40)
    with pytest.raises(ConfigError) as error:
        safetensors_io.read_json(tmp_path / "file", ConfigError)
    one_line(error, tmp_path / "file", "64 MB")


@pytest.mark.parametrize("target", ["../secret.json", "{absolute}", "hop", "../run/../secret.json"])
def test_a_link_leads_out_only_where_the_user_gave_it(tmp_path: Path, target: str) -> None:
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "hop").symlink_to("../secret.json")
    link = tmp_path / "run" / "state.json"
    link.symlink_to(target.format(absolute=tmp_path / "secret.json"))
    with pytest.raises(CheckpointError) as error:
        safetensors_io.read_json(link, ConfigError)
    one_line(error, link, "link")
    assert safetensors_io.read_json(link, ConfigError, follow=True) == {"secret": 1}
    (tmp_path / "run" / "other.json").write_text("{}")
    link.unlink()
    link.symlink_to("other.json")  # which stays inside
    assert safetensors_io.read_json(link, ConfigError) == {}


def test_the_hubs_cache_is_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "c0ffee").write_text('{"dim": 3}')
    save_file({"x": torch.arange(3)}, blobs / "beef")
    (snapshot / "config.json").symlink_to("../../blobs/c0ffee")
    (snapshot / "m.safetensors").symlink_to("../../blobs/beef")
    (tmp_path / "mine").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "mine"):
        assert safetensors_io.read_json(folder / "config.json", ConfigError) == {"dim": 3}
        assert torch.equal(read_header(folder / "m.safetensors")["x"].read(), torch.arange(3))
    (tmp_path / "c0ffee").write_text("{}")
    (blobs / "c0ffee").unlink()
    (blobs / "c0ffee").symlink_to("../c0ffee")
    with pytest.raises(CheckpointError) as error:
        safetensors_io.read_json(snapshot / "config.json", ConfigError)
    one_line(error, "link")


def nested(depth: int, is_list: bool) -> bytes:
    return (
        b'{"a":' * (1 if is_list else depth)
        + (b"[" * depth + b"]" * depth if is_list else b"0")
        + b"}" * (1 if is_list else depth)
    )


@pytest.mark.parametrize("is_list", [False, True])
def test_json_is_not_nested_without_end(tmp_path: Path, is_list: bool) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(nested(30, is_list))
    assert list(safetensors_io.read_json(path, ConfigError)) == ["a"]
    for depth in (60, 500, 5_000, 500_000):
        path.write_bytes(nested(depth, is_list))
        with pytest.raises(ConfigError) as error:
            safetensors_io.read_json(path, ConfigError)
        one_line(error, path)


@pytest.mark.parametrize(
    "text", [b"\xff{}", b"3", b'{"a": 1, "b": 2, "a": 1}', b'{"\\udfff": 1}', b'{"a": -1e400}', b""]
)
def test_json_that_is_none(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ConfigError) as error:
        safetensors_io.read_json(tmp_path / "x.json", ConfigError)
    one_line(error, tmp_path / "x.json", "JSON")


# --- Writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.jsonl", ".metrics.jsonl.tmp"])
@pytest.mark.parametrize("kind", ["victim", "nowhere", "pipe", "socket", "old"])
@pytest.mark.parametrize("is_held", [False, True])
def test_a_json_file_is_written_nowhere_else(tmp_path: Path, name: str, kind: str, is_held: bool) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("precious")
    if kind in ("victim", "nowhere"):
        (run / name).symlink_to(tmp_path / kind)
    elif kind == "old":
        (run / name).write_text("old")
    else:
        put(run / name, kind)
    folder_fd = os.open(run, os.O_RDONLY)
    safetensors_io.write_json(run / "metrics.jsonl", {"a": 1}, folder_fd if is_held else None)
    os.close(folder_fd)
    assert stat.S_ISREG((run / "metrics.jsonl").lstat().st_mode)
    assert json.loads((run / "metrics.jsonl").read_text()) == {"a": 1}
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]
    assert victim.read_text() == "precious" and sorted(p.name for p in tmp_path.iterdir()) == ["run", "victim"]


def test_writes_go_to_the_folder_that_is_held(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    folder_fd = os.open(tmp_path / "run", os.O_RDONLY)
    (tmp_path / "run").rename(tmp_path / "moved")
    safetensors_io.write_json(tmp_path / "run" / "a.json", {"a": 1}, folder_fd)
    with safetensors_io.open_append(tmp_path / "run" / "log", folder_fd) as log:
        log.write(b"line")
    os.close(folder_fd)
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]
    assert json.loads((tmp_path / "moved" / "a.json").read_text()) == {"a": 1}
    assert (tmp_path / "moved" / "log").read_text() == "line"


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_failing_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "write":
        (tmp_path / ".state.json.tmp").mkdir()  # nothing can be unlinked or created there
    else:
        monkeypatch.setattr(os, "fsync" if step == "fsync" else "replace", fails)
    with pytest.raises(CheckpointError) as error:
        safetensors_io.write_json(path, {"new": 1})
    one_line(error, path)
    assert step == "write" or "No space left" in str(error.value) and "free some space" in str(error.value)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == (2 if step == "write" else 1)


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "loop", "/dev/null", "{tmp}/victim", "{tmp}/nowhere"])
def test_appending_to_other_kinds_of_files(tmp_path: Path, kind: str) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    put(tmp_path / "run" / "log", kind.format(tmp=tmp_path))
    with pytest.raises(CheckpointError) as error:
        safetensors_io.open_append(tmp_path / "run" / "log")
    one_line(error, tmp_path / "run" / "log", "regular file")
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "/dev/null", "{tmp}/victim", "{tmp}/nowhere"])
def test_a_lock_that_is_no_file(tmp_path: Path, kind: str) -> None:
    """It is neither waited for nor followed, and stays."""
    (tmp_path / "victim").touch()
    lock = tmp_path / ".step-00000003.lock"
    put(lock, kind.format(tmp=tmp_path))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError) as error, new_folder(tmp_path / "step-00000003"):
        pytest.fail("it was made")
    one_line(error, lock, "move it elsewhere")
    safetensors_io.remove_leftover(tmp_path / "step-00000003")
    assert sorted(tmp_path.iterdir()) == before


def test_folder_of_a_user_under_the_temporary_name(tmp_path: Path) -> None:
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "precious").write_text("mine")
    with pytest.raises(CheckpointError) as error, new_folder(tmp_path / "out"):
        pass
    one_line(error, tmp_path / ".out.tmp", "not ours")
    assert (tmp_path / ".out.tmp" / "precious").read_text() == "mine" and not (tmp_path / ".out.lock").exists()
    (tmp_path / ".b.lock").write_text("mine too")
    with pytest.raises(CheckpointError) as error, new_folder(tmp_path / "b"):
        pass
    one_line(error, tmp_path / ".b.lock")
    assert (tmp_path / ".b.lock").read_text() == "mine too"


def test_a_temporary_folder_that_is_a_link(tmp_path: Path) -> None:
    """Of a process that seems to have died: what it leads to is not emptied."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").write_text("mine")
    (tmp_path / ".out.lock").touch()
    (tmp_path / ".out.tmp").symlink_to("victim")
    with pytest.raises(CheckpointError) as error, new_folder(tmp_path / "out"):
        pass
    one_line(error, tmp_path / "out")
    assert (tmp_path / "victim" / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    ("code", "remedy"), [("ENOSPC", "free some space"), ("EROFS", "may write"), ("EACCES", "may write"), ("EIO", "")]
)
def test_a_failing_write_names_file_and_remedy(tmp_path: Path, code: str, remedy: str) -> None:
    class Full:
        name = str(tmp_path / "out" / "model\x1b[2J")

        def write(self, _: object) -> int:
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    with pytest.raises(CheckpointError) as error, safetensors_io.reporting(tmp_path / "out"):
        safetensors_io.write_all(Full(), torch.ones(3))
    one_line(error, tmp_path / "out", "model\\x1b", os.strerror(getattr(errno, code)), remedy)


def test_an_error_without_words_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error, safetensors_io.reporting(tmp_path):
        raise TimeoutError
    one_line(error, tmp_path, "TimeoutError")


# --- Headers ----------------------------------------------------------------------------------------------------------


def pack(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def info(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> bytes:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more}).encode()


LIES = {
    "no JSON": pack(b"{"),
    "a list": pack(b"[]"),
    "not UTF-8": pack(b"\xff\xfe"),
    "deep": pack(b'{"x":' + b"[" * 100_000),
    "huge number": pack(b'{"x":' + b"9" * 10_000 + b"}"),
    "a longer header": pack(b"{}")[:9],
    "2^63 bytes of header": (1 << 63).to_bytes(8, "little") + b"{}",
    "twice": pack(b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},' + info()[1:], b"8 bytes!"),
    "number for a tensor": pack(b'{"x":3}'),
    "null for a tensor": pack(b'{"x":null}'),
    "dtype": pack(info(dtype="F5"), b"8 bytes!"),
    "dtype that is a list": pack(info(dtype=["F32"]), b"8 bytes!"),
    "shape of text": pack(info(shape="2"), b"8 bytes!"),
    "negative shape": pack(info(shape=[-2, -1]), b"8 bytes!"),
    "true shape": pack(info(shape=[True, 2]), b"8 bytes!"),
    "overflowing shape": pack(info(shape=[1 << 33, 1 << 33]), b"8 bytes!"),
    "fraction": pack(info(shape=[2.0]), b"8 bytes!"),
    "too many dimensions": pack(info(shape=[1] * 1000 + [2]), b"8 bytes!"),
    "offsets backwards": pack(info(offsets=[8, 0]), b"8 bytes!"),
    "offsets outside": pack(info(offsets=[8, 16]), b"8 bytes!"),
    "one offset": pack(info(offsets=[8]), b"8 bytes!"),
    "offsets of another shape": pack(info(shape=[3]), b"8 bytes!"),
    "unknown field": pack(json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "y": 1}}).encode()),
    "overlap": pack(info(y={"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}), b"12 bytes of it"[:12]),
    "gap": pack(info(y={"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}), b"16 bytes of data"),
    "data missing": pack(info(), b"7 bytes"),
    "data left over": pack(info(), b"9 bytes!!"),
    "list for a tensor": pack(b'{"x":["F32",[2],[0,8]]}', b"8 bytes!"),
    "dtype that is an object": pack(info(dtype={"F32": None}), b"8 bytes!"),
    "surrogate in the metadata": pack(b'{"__metadata__":{"by":"\\udc9b"}}'),
    "number in the metadata": pack(b'{"__metadata__":{"by":1}}'),
    "text for the metadata": pack(b'{"__metadata__":"by"}'),
    "a dtype that torch has not": pack(info(dtype="F6_E2M3", shape=[32], offsets=[0, 24]), b"8 bytes!" * 3),
    "escapes": pack(json.dumps({"\x1b[2J\n": {"dtype": "F5"}}).encode()),
    "lone surrogate": pack(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"8 bytes!"),
}


@pytest.mark.parametrize("lie", LIES)
def test_header_that_lies(tmp_path: Path, lie: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(LIES[lie])
    for read in (read_header, safetensors_io.read_metadata):
        if read is read_header or "metadata" in lie:
            with pytest.raises(CheckpointError) as error:
                read(file)
            one_line(error, file)


def test_header_of_100_mb_is_not_even_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "x", "wb") as file:
        file.write((100 << 20).to_bytes(8, "little"))
        file.truncate(101 << 20)
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    monkeypatch.setattr(safetensors_io, "safe_open", lambda *_: pytest.fail("opened"))
    with pytest.raises(CheckpointError) as error:
        read_header(tmp_path / "x")
    one_line(error, tmp_path / "x")


def test_a_key_twice_is_found(tmp_path: Path) -> None:
    """In linear time: 10^10 comparisons would run into the time limit."""
    header = ",".join(f'"{i:07d}":0' for i in range(100_000)) + ',"0099999":0'
    (tmp_path / "x").write_bytes(pack(f"{{{header}}}".encode()))
    with pytest.raises(CheckpointError) as error:
        read_header(tmp_path / "x")
    one_line(error, "0099999", "twice")


@settings(draws, max_examples=60)
@given(st.data())
def test_fuzzed_headers(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever is read is what safetensors reads; what it refuses is refused; and nothing is a traceback."""
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    tensors = {"a": torch.arange(6).view(2, 3), "b.c": torch.ones(3, dtype=torch.bfloat16), "z": torch.zeros(0, 4)}
    save_file(tensors, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.integers(0, 3)):
            case 0:
                content[at] = data.draw(st.integers(0, 255))
            case 1:
                del content[at : at + data.draw(st.integers(1, 9))]
            case 2:
                content[at:at] = data.draw(st.sampled_from([b"0", b"9", b"-", b",", b'"', b"[", b"{", b"\0", b" "]))
            case 3:
                content[at] ^= 1
    file.write_bytes(content)
    try:
        ours = {name: info.read() for name, info in read_header(file).items()}
    except CheckpointError as error:
        assert str(error).isprintable()
        return
    try:
        theirs = load_file(file)
    except SafetensorError:
        pytest.fail("safetensors refuses what was accepted here")
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in ours if name != "z"
    )


def test_metadata(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "a", metadata={"format": "pt", "note": "\u2713"})
    assert safetensors_io.read_metadata(tmp_path / "a") == {"format": "pt", "note": "\u2713"}
    (tmp_path / "b").write_bytes(pack(b'{"__metadata__":null}'))
    assert safetensors_io.read_metadata(tmp_path / "b") == {} == read_header(tmp_path / "b")


def test_a_folder_between_files_that_are_links(tmp_path: Path) -> None:
    """The file of a header may have been replaced by a link since: it is checked again when it is read."""
    (tmp_path / "run").mkdir()
    for folder in (tmp_path, tmp_path / "run"):
        save_file({"x": torch.ones(2)}, folder / "a.safetensors")
    found = read_header(tmp_path / "run" / "a.safetensors")["x"]
    shutil.move(tmp_path / "a.safetensors", tmp_path / "b")
    (tmp_path / "run" / "a.safetensors").unlink()
    (tmp_path / "run" / "a.safetensors").symlink_to("../b")
    with pytest.raises(CheckpointError) as error:
        found.read()
    one_line(error, tmp_path / "run" / "a.safetensors", "link")


# --- Numbers ----------------------------------------------------------------------------------------------------------


FLOATS = {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS |= {"F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}


def source_of(path: Path, *tensors: torch.Tensor) -> ShardedTensor:
    """A tensor "x" in files, one below the other."""
    source = ShardedTensor("x", (sum(t.shape[0] for t in tensors), *tensors[0].shape[1:]), tensors[0].dtype)
    top = 0
    for i, tensor in enumerate(tensors):
        save_file({"x": tensor}, path / f"{i}.safetensors")
        box = Slice2D(top, top + tensor.shape[0], 0, tensor.shape[1])
        source.shards.append(shard_slice(read_header(path / f"{i}.safetensors")["x"], box, None))
        top = box.bottom
    return source


@pytest.mark.parametrize(("dtype", "value"), [(d, v) for d in FLOATS for v in ("nan", "inf", "-inf")])
def test_numbers_that_are_not_finite(tmp_path: Path, dtype: str, value: str) -> None:
    bad = torch.tensor(float(value)).to(FLOATS[dtype])  # NaN, where there is no infinity
    good = torch.ones(5, 4).to(FLOATS[dtype])
    damaged = good.view(torch.uint8).view(-1).clone()
    damaged[-good.itemsize :] = bad.reshape(1).view(torch.uint8)
    damaged = damaged.view(good.dtype).view(good.shape)
    save_file({"bias": damaged}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError) as error:
        read_header(tmp_path / "b.safetensors")["bias"].read()
    one_line(error, tmp_path / "b.safetensors", "bias", "finite")
    source = source_of(tmp_path, good, damaged)
    source.read_bytes(Slice2D(0, 9, 0, 4))
    for read in (source.read_bytes, lambda box: source.read(box, torch.float32)):
        with pytest.raises(CheckpointError) as error:
            read(source.box)
        one_line(error, tmp_path / "1.safetensors", "tensor x", "finite")


@pytest.mark.parametrize("dtype", [t for t in FLOATS.values() if t.itemsize > 1] + [torch.int64, torch.bool])
def test_large_numbers_are_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    """Though their sum is not."""
    value = True if dtype == torch.bool else (torch.finfo if dtype.is_floating_point else torch.iinfo)(dtype).max
    source = source_of(tmp_path, torch.full((40, 30), value, dtype=dtype))
    assert (source.read_bytes(source.box).view(dtype) == value).all()
    assert source.read_bytes(Slice2D(3, 3, 0, 30)).shape == (0, 30 * dtype.itemsize)


def test_numbers_too_large_for_another_dtype(tmp_path: Path) -> None:
    source = source_of(tmp_path, torch.full((3, 3), 1e39, dtype=torch.float64))
    with pytest.raises(CheckpointError) as error:
        source.read(source.box, torch.float32)
    one_line(error, tmp_path / "0.safetensors", "too large for float32")
    assert (source.read(source.box, torch.float64) == 1e39).all()


# --- Slices, bands and scales -----------------------------------------------------------------------------------------


def expand(s: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """A scale for each number of a rectangle."""
    return s.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]


@settings(draws, max_examples=60)
@given(st.data())
def test_scales_are_cut_exactly_or_not_at_all(data: st.DataObject) -> None:
    """Against a scale for each number: the scales found are equal to it, and None is returned where there are none."""
    size = st.sampled_from([1, 32, 64, 96, 128, 192, 256, 300])
    across, heights = data.draw(st.integers(0, 1)), data.draw(st.lists(size, min_size=1, max_size=3))
    other, few = data.draw(size), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    shards, full, at = [], [], 0
    for n in heights:
        rows, cols = (other, n) if across else (n, other)
        shape = -(-rows // 128), -(-cols // 128)
        s = torch.randint(1, 3 if few else 4, shape, generator=generator).float()
        box = Slice2D(*((0, rows, at, at + n) if across else (at, at + n, 0, cols)))
        shards.append((box, s))
        full.append(expand(s, rows, cols))
        at += n
    joined = torch.cat(full, dim=across)
    top, left = data.draw(st.integers(0, joined.shape[0] - 1)), data.draw(st.integers(0, joined.shape[1] - 1))
    box = Slice2D(
        top, data.draw(st.integers(top + 1, joined.shape[0])), left, data.draw(st.integers(left + 1, joined.shape[1]))
    )
    wanted = joined[box.top : box.bottom, box.left : box.right]
    blocks = [[b for b in row.split(128, 1)] for row in wanted.split(128, 0)]
    found = safetensors_io.slice_scales(shards, box)
    if all((b == b[0, 0]).all() for row in blocks for b in row):
        assert found is not None and torch.equal(expand(found, *wanted.shape), wanted)
        assert found.shape == (len(blocks), len(blocks[0]))
    else:
        assert found is None


@settings(draws, max_examples=25)
@given(st.data())
def test_bands_cover_a_slice_once_and_are_small(data: st.DataObject) -> None:
    size, step = st.integers(1, 300), data.draw(st.sampled_from([1, 128]))
    top, left = data.draw(size), data.draw(size)
    box = Slice2D(top, top + data.draw(size), left, left + data.draw(size))
    source, limit = ShardedTensor("x", (2000, 2000), torch.bfloat16), data.draw(st.sampled_from([1, 300, 5000, 10**9]))
    count = torch.zeros(box.shape, dtype=torch.int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_io, "BAND_BYTES", limit)
        for band in source.bands(box, step):
            count[band.within(box)] += 1
            assert (band.top - box.top) % step == 0 and (band.left - box.left) % 128 == 0
            width = 128 if box.shape[1] * 2 > limit else box.shape[1]  # at least that of a row, or of a block
            assert band.shape[0] * band.shape[1] * 2 <= max(limit, step * width * 2)
    assert (count == 1).all()


def test_bands_of_a_long_row_are_small() -> None:
    """3 GB of a vector, or of a few long rows, are read in bands."""
    for shape in ((800_000_000,), (2, 400_000_000)):
        source = ShardedTensor("x", shape, torch.float32)
        for step in (1, 128):
            sizes = [band.shape[0] * band.shape[1] * 4 for band in source.bands(source.box, step)]
            assert max(sizes) <= safetensors_io.BAND_BYTES and sum(sizes) == 3_200_000_000


def test_no_bands_of_nothing() -> None:
    assert list(ShardedTensor("x", (1 << 40, 0)).bands(Slice2D(0, 1 << 40, 0, 0))) == []


def fp8_source(path: Path, q: torch.Tensor, s: torch.Tensor) -> ShardedTensor:
    save_file({"w": q, "w_scale_inv": s}, path / "fp8.safetensors")
    header = read_header(path / "fp8.safetensors")
    source = ShardedTensor("w", tuple(q.shape), q.dtype)
    source.shards.append(shard_slice(header["w"], source.box, header["w_scale_inv"]))
    return source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_are_widened_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    q, s = weight_quant(torch.randn(300, 200, generator=torch.Generator().manual_seed(1)))
    s = s.exp2().to(dtype)
    if dtype.itemsize == 1:  # the smallest and the largest too
        s.view(torch.uint8)[0] = torch.tensor([0, 254], dtype=torch.uint8)
    source = fp8_source(tmp_path, q, s)
    exact = [[2.0 ** (int(x) - 127) for x in row] for row in s.view(torch.uint8)] if dtype.itemsize == 1 else s.tolist()
    ((_, found),) = source.read_scales()
    assert found.dtype == torch.float32 and found.tolist() == exact
    data, found = source.read_fp8(source.box, None)
    assert torch.equal(data.view(torch.uint8), q.view(torch.uint8)) and found.tolist() == exact


@settings(draws, max_examples=25)
@given(st.data())
def test_any_slice_of_fp8(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Against the full tensor, dequantised: the values, and the scales of the blocks around."""
    rows, cols = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 400))
    q, s = weight_quant(torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)) * torch.arange(cols))
    source = fp8_source(tmp_path_factory.getbasetemp(), q, s)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    box = Slice2D(top, data.draw(st.integers(top + 1, rows)), left, data.draw(st.integers(left + 1, cols)))
    full = weight_dequant(q, s, dtype=torch.float32)
    assert torch.equal(source.read(box, torch.float32), full[box.top : box.bottom, box.left : box.right])
    ((around, found),) = source.read_scales(box)
    assert around == (top // 128 * 128, min(-(-box.bottom // 128) * 128, rows), 0, cols)
    assert torch.equal(found, s[top // 128 : -(-box.bottom // 128)])


@pytest.mark.parametrize("corner", [(0, 0), (140, 130), (299, 259), (128, 259)])
def test_a_scale_of_zero_is_one_of_zeros(tmp_path: Path, corner: tuple[int, int]) -> None:
    q, s = weight_quant(torch.randn(300, 260, generator=torch.Generator().manual_seed(1)).abs() + 0.1)
    i, j = corner[0] // 128, corner[1] // 128
    s[i, j] = 0
    block = q.view(torch.uint8)[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
    block.zero_()
    block[0, 0] = 0x80  # minus zero
    source = fp8_source(tmp_path, q, s)
    full = source.read(source.box, torch.float32)
    assert (full == 0).sum() == block.numel() and (source.read_scales()[0][1] == 0).sum() == 1
    q.view(torch.uint8)[corner] = 1
    source = fp8_source(tmp_path, q, s)
    box = Slice2D(corner[0], corner[0] + 1, corner[1], corner[1] + 1)
    reads: list[Callable[[], Any]] = [source.read_scales, lambda: source.read_fp8(source.box, None)]
    for read in [*reads, lambda: source.read(box, torch.bfloat16), lambda: source.read(source.box, torch.float32)]:
        with pytest.raises(CheckpointError) as error:
            read()
        one_line(error, tmp_path / "fp8.safetensors", "w_scale_inv", "zero")


@pytest.mark.parametrize("bad", [-1.0, -1e-30, float("nan"), float("inf")])
def test_scales_that_are_none(tmp_path: Path, bad: float) -> None:
    q, s = weight_quant(torch.randn(130, 5))
    s[1, 0] = bad
    source = fp8_source(tmp_path, q, s)
    source.read(Slice2D(0, 128, 0, 5), torch.float32)
    with pytest.raises(CheckpointError) as error:
        source.read(Slice2D(100, 129, 0, 5), torch.float32)
    one_line(error, tmp_path / "fp8.safetensors", "w_scale_inv", "finite")


def test_weights_that_are_nan_in_fp8(tmp_path: Path) -> None:
    for byte in (0x7F, 0xFF):
        q, s = weight_quant(torch.randn(130, 5))
        q.view(torch.uint8)[129, 4] = byte
        source = fp8_source(tmp_path, q, s)
        for read in (source.read_bytes, lambda box, s=source: s.read(box, torch.bfloat16)):
            read(Slice2D(0, 128, 0, 5))
            with pytest.raises(CheckpointError) as error:
                read(source.box)
            one_line(error, tmp_path / "fp8.safetensors", "tensor w ", "finite")
