"""Hostile input for every command: whatever is in a folder, in the environment or behind a stream, a command ends with
0 or with one line and exit code 2. No traceback, no hang, no empty message, no escape sequence, no write elsewhere.

Each case takes a good folder, damages one thing in it, and runs a command. Seeds are fixed, so a case that fails can be
run again by its number.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

import convert
import fp8_cast_bf16
import generate
import train

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 30  # for one command on tiny files, which takes a tenth of a second
VALUES = [
    None, True, False, "", "x", "\x1b[31mred", "a\nb", "\udc80", [], {}, [1], {"a": 1}, 0, -1, 1, 3, 2**31, 2**64,
    10**400, 0.5, -0.0, 1e308, "0.1", "step-00000001", "../outside", "/etc/passwd",
]  # fmt: skip
TEXTS = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1, "a": 2}', b"[" * 100_000]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, a Hugging Face export and an FP8 one, and what must not change: `outside`."""
    home = tmp_path_factory.mktemp("fuzz")
    (home / "config.json").write_text(json.dumps(TINY))
    (home / "data.txt").write_bytes(bytes(random.Random(0).choices(b"abc \n", k=4000)))
    flags = ["--config", "config.json", "--data", "data.txt", "--batch-size", "2", "--device", "cpu", "--dtype", "fp32"]
    with inside(home):
        assert train.main([*flags, "--save-path", "run", "--steps", "2", "--sample-bytes", "0"]) == 0
        assert convert.main(["--ckpt-path", "run", "--save-path", "hf", "--format", "hf"]) == 0
        assert convert.main(["--ckpt-path", "run", "--save-path", "fp8", "--format", "hf", "--dtype", "fp8"]) == 0
    (home / "outside").mkdir()
    (home / "outside" / "file").write_text("{}")
    return home


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Works in a folder for a while."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def contents(folder: Path) -> dict[str, bytes]:
    """All that is in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- What is damaged -------------------------------------------------------------------------------------------------


def change_json(path: Path, chance: random.Random) -> str:
    """Puts a strange value somewhere into a JSON file, removes a key, or adds one."""
    value = json.loads(path.read_text())
    places = [(value, key) for key in value]
    for inner in [v for v in value.values() if isinstance(v, dict)]:
        places += [(inner, key) for key in inner]
    where, key = chance.choice(places)
    action, new = chance.randrange(5), chance.choice(VALUES)
    if action == 0:
        del where[key]
    elif action == 1:
        where[chance.choice(["strange", "\x1b[2J", "", "a" * 1000])] = new
    else:
        where[key] = new
    path.write_text(json.dumps(value))
    return f"{path.name}: {key} -> {'removed' if action == 0 else repr(new)[:60]}"


def change_bytes(path: Path, chance: random.Random) -> str:
    """Cuts a file off, flips some bytes near its start, or puts something else in its place."""
    data = bytearray(path.read_bytes())
    action = chance.randrange(3)
    if action == 0:
        data = data[: chance.randrange(len(data) + 1)]
    elif action == 1:
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(min(len(data), 400))] ^= 1 << chance.randrange(8)
    else:
        data = bytearray(chance.choice(TEXTS))
    path.write_bytes(data)
    return f"{path.name}: {['cut', 'flipped', 'replaced'][action]}"


def change_kind(path: Path, chance: random.Random) -> str:
    """Puts a link, a pipe, a device, a folder or nothing in a file's place, or a link under a temporary name."""
    outside = path.parents[1] / "outside" / "file"
    outside = outside if outside.exists() else path.parents[2] / "outside" / "file"
    kind = chance.choice(["link", "dangling", "loop", "fifo", "zero", "folder", "gone", "temporary", "lock"])
    if kind in ("temporary", "lock"):
        name = f".{path.name}.tmp" if kind == "temporary" else f".{path.name}.lock"
        path.with_name(name).symlink_to(outside)
        return f"{path.name}: a link at {name}"
    path.unlink()
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "dangling":
        path.symlink_to(outside.with_name("new"))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    return f"{path.name}: {kind}"


# --- What is run -----------------------------------------------------------------------------------------------------

RESUME = ["--config", "config.json", "--data", "data.txt", "--batch-size", "2", "--device", "cpu", "--dtype", "fp32"]
RESUME += ["--save-path", "run", "--resume", "--override", "steps", "--steps", "3", "--sample-bytes", "0"]
COMMANDS: dict[str, tuple[str, Callable[[list[str]], int], list[str]]] = {
    "resume": ("run", train.main, RESUME),
    "generate": ("run", generate.main, ["--ckpt-path", "run", "--prompt", "a", "--max-new-tokens", "4"]),
    "generate hf": ("hf", generate.main, ["--ckpt-path", "hf", "--prompt", "a", "--max-new-tokens", "4"]),
    "convert": ("run", convert.main, ["--ckpt-path", "run", "--save-path", "new", "--format", "hf"]),
    "convert hf": ("hf", convert.main, ["--ckpt-path", "hf", "--save-path", "new"]),
    "cast": ("fp8", fp8_cast_bf16.main, ["--input-fp8-hf-path", "fp8", "--output-bf16-hf-path", "new"]),
}


@contextmanager
def limited(case: str) -> Iterator[None]:
    """Turns a hang into a failure that names the case."""

    def hang(*_: Any) -> None:
        pytest.fail(f"{case}: hangs")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(case: str, code: int, out: str, err: str) -> None:
    """Checks what a command printed, and its exit code."""
    assert code in (0, 2), (case, code, out, err)
    assert "Traceback" not in err and "Exception ignored" not in err, (case, err)
    is_text = ", generate" in case and code == 0  # into a pipe, a text goes as the model wrote it
    assert "\x1b" not in (err if is_text else out + err), (case, out, err)
    errors = [line for line in err.splitlines() if ": error: " in line or line.endswith("error:")]
    if code == 2:
        assert len(errors) == 1 and re.search(r": error: \S.{5}", errors[0]), (case, err)
    else:
        assert not errors, (case, err)


def damaged_case(good: Path, home: Path, seed: int, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """Runs one case."""
    chance = random.Random(seed)
    name = chance.choice(list(COMMANDS))
    folder, command, flags = COMMANDS[name]
    shutil.copytree(good, home, symlinks=True)
    files = [path for path in sorted((home / folder).rglob("*")) if path.is_file()]
    path = chance.choice(files)
    changes = [change_bytes, change_kind, *([change_json] * 4 if path.suffix == ".json" else [])]
    case = f"seed {seed}, {name}: {chance.choice(changes)(path, chance)}"
    outside = contents(home / "outside")
    capsysbinary.readouterr()
    with inside(home), limited(case):
        try:
            code = command(flags)
        except SystemExit as error:
            code = error.code
    check(case, code, *(text.decode(errors="replace") for text in capsysbinary.readouterr()))
    assert contents(home / "outside") == outside, case
    shutil.rmtree(home)


@pytest.mark.parametrize("block", range(4))
def test_damaged_folders(good: Path, tmp_path: Path, block: int, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    for seed in range(block * 15, block * 15 + 15):
        damaged_case(good, tmp_path / "case", seed, capsysbinary)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(8))
def test_many_damaged_folders(
    good: Path, tmp_path: Path, block: int, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    for seed in range(1000 + block * 60, 1000 + block * 60 + 60):
        damaged_case(good, tmp_path / "case", seed, capsysbinary)


# --- Environment and streams -----------------------------------------------------------------------------------------

ENVIRONMENTS = [
    {"WORLD_SIZE": ""}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "-2"}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "9" * 30},
    {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "2", "RANK": "x"}, {"RANK": "5"},
    {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "x"}, {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
    {"TORCHELASTIC_RESTART_COUNT": "many"}, {"XDG_CACHE_HOME": "relative"}, {"TMPDIR": "/nowhere"}, {"CC": "false"},
    {"CC": "'"}, {"HOME": "/nowhere"}, {"COLUMNS": "x"}, {"OMP_NUM_THREADS": "x"},
]  # fmt: skip
STREAMS = ["2>&-", ">&-", "<&-", ">/dev/full", "2>/dev/full", ">&- 2>&- <&-", "< /dev/zero", ">/dev/full 2>/dev/full"]
SCRIPTS = {
    "train.py": ["--config", "config.json", "--data", "data.txt", "--steps", "1", "--device", "cpu"],
    "generate.py": ["--ckpt-path", "run", "--prompt", "a", "--max-new-tokens", "2", "--device", "cpu"],
    "convert.py": ["--ckpt-path", "run", "--save-path", "new"],
    "fp8_cast_bf16.py": ["--input-fp8-hf-path", "fp8", "--output-bf16-hf-path", "new"],
    "data/prepare.py": ["data.txt"],
}


def run_script(home: Path, script: str, flags: list[str], streams: str = "", **env: str) -> tuple[int, str, str]:
    """Runs a script by a shell, with redirections."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = " ".join([sys.executable, str(ROOT / script), *flags, streams])
    done = subprocess.run(
        command, shell=True, cwd=home, env=clean | env, capture_output=True, text=True, timeout=120, errors="replace"
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("env", ENVIRONMENTS, ids=str)
@pytest.mark.parametrize("script", ["train.py", "generate.py"])
def test_environments(good: Path, tmp_path: Path, env: dict[str, str], script: str) -> None:
    home = tmp_path / "case"
    shutil.copytree(good, home)
    limit = ["--timeout", "0.1"] if script == "train.py" else []
    if "WORLD_SIZE" in env and "MASTER_PORT" not in env and script == "generate.py" and env.get("RANK") == "0":
        pytest.skip("generate.py has no --timeout")
    code, out, err = run_script(home, script, SCRIPTS[script] + limit, **env)
    check(f"{script} {env}", code, out, err)


@pytest.mark.slow
@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_streams(good: Path, tmp_path: Path, streams: str, script: str) -> None:
    home = tmp_path / "case"
    shutil.copytree(good, home)
    code, out, err = run_script(home, script, SCRIPTS[script], streams)
    assert code in (0, 2) and "Traceback" not in err and "Exception ignored" not in err, (code, out, err)
    if ">/dev/full" in streams and "2>" not in streams and script in ("generate.py", "data/prepare.py"):
        assert code == 2 and len(err.splitlines()) <= 2, err
    assert "bytes/s" not in out  # a speed is no result
