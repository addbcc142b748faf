"""Exit codes, messages, number types and streams of the commands: in this process, but for the streams at the start."""

import argparse
import errno
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import command
from command import INTERRUPTED, Parser, Terminated, complain, explain, integer, real, run, say, shorten

ROOT = Path(command.__file__).parent
ESCAPES = "a\x1b[2J\x9b\u202e\u2028z"


class Mistake(Exception):
    pass


class BadStream(io.StringIO):
    """A stdout that fails with one error at each write, of text or bytes."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    @property
    def buffer(self) -> "BadStream":
        return self

    def write(self, data: str | bytes) -> int:
        raise self.error


def raising(error: BaseException) -> Callable[[], int]:
    def body() -> int:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), INTERRUPTED, None),
        (Terminated(), INTERRUPTED, None),
        (BrokenPipeError(), 141, None),
        (Mistake("no such field"), 2, "no such field"),
        (Mistake(), 2, "Mistake"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x/y"), 2, "No such file or directory: x/y"),
        (OSError("odd"), 2, "odd"),
        (OSError(), 2, "OSError"),
        (MemoryError(), 2, "not enough memory; take a smaller model, batch or context"),
        (
            RuntimeError("can't allocate memory: 9 bytes"),
            2,
            "not enough memory; take a smaller model, batch or context",
        ),
        (RuntimeError("a fault"), 1, None),
        (ValueError("not announced as a mistake"), 1, None),
    ],
)
def test_exit_codes_and_messages(error: BaseException, code: int, message: str | None, capsys) -> None:
    assert explain(error, (Mistake,)) == (code, message)
    assert run("x.py", raising(error), (Mistake,)) == code
    out, err = capsys.readouterr()
    assert out == ""
    if code == 1:
        assert err.startswith("Traceback") and str(error) in err
    else:
        assert err == ("" if message is None else f"x.py: error: {message}\n")


def test_a_body_gives_its_own_exit_code() -> None:
    assert run("x.py", lambda: None) == 0 and run("x.py", lambda: 7) == 7
    with pytest.raises(SystemExit) as end:
        run("x.py", lambda: sys.exit(5))
    assert end.value.code == 5


@pytest.mark.parametrize(("signum", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_unwinds_once_and_handlers_come_back(signum: int, error: type[BaseException]) -> None:
    caught = []

    def body() -> None:
        try:
            signal.raise_signal(signum)
        except BaseException as interrupt:
            caught.append(type(interrupt))
            signal.raise_signal(signal.SIGTERM)  # does not disturb the clean-up
            raise

    before = signal.getsignal(signum), sys.unraisablehook
    assert run("x.py", body) == INTERRUPTED and caught == [error]
    assert (signal.getsignal(signum), sys.unraisablehook) == before


def test_an_interrupt_in_a_destructor_is_sent_again() -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def body() -> None:
        dying = Dying()
        del dying  # Python drops what is raised here
        threading.Event().wait(20)
        raise AssertionError("it was lost")

    assert run("x.py", body) == INTERRUPTED


def test_nothing_printed_controls_a_terminal(capsys) -> None:
    say(ESCAPES + "\n\tb")
    complain("x.py", ESCAPES + "\nb")
    command.warn("x.py", ESCAPES)
    command.note(ESCAPES)
    out, err = capsys.readouterr()
    visible = r"a\x1b[2J\x9b\u202e\u2028z"
    assert out == f"{visible}\n\tb\n"
    assert err == f"x.py: error: {visible} b\nx.py: warning: {visible}\n{visible}\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        (OSError(errno.EPIPE, "Broken pipe"), 141, None),
        (ValueError("I/O operation on closed file"), 2, os.strerror(errno.EBADF)),
    ],
)
def test_a_stdout_that_fails_is_reported_once(error, code: int, message: str | None, monkeypatch, capsys) -> None:
    line = f"x.py: error: cannot write to standard output: {message}\n" if message else ""
    for body in (lambda: say("result") or say("more"), lambda: command.write(b"bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", BadStream(error))
            assert run("x.py", body) == code
        assert capsys.readouterr().err == line
    assert run("x.py", lambda: None) == 0  # it is not remembered


def test_shorten() -> None:
    assert shorten("abc") == "abc" and shorten(12) == "12" and shorten("") == "''"
    assert shorten("é" * 200, 10) == "é" * 10 + "…"
    assert shorten(ESCAPES).isprintable() and "\\x1b" in shorten(ESCAPES)


@pytest.mark.parametrize("local_rank", [None, "0", "1"])
def test_errors_of_the_parser(local_rank: str | None, monkeypatch, capsys) -> None:
    for name, value in (("LOCAL_RANK", local_rank), ("RANK", None)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    parser = Parser("x.py", description="Does it.")
    parser.add_argument("--steps", type=integer(1))
    for flags in (["--steps", "0"], ["--step", "3"], ["--\x1b[2J\n"]):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(flags)
        err = capsys.readouterr().err
        assert end.value.code == 2
        assert err == "" if local_rank == "1" else re.fullmatch(r"x\.py: error: [ -~]+\n", err)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--help"])
    assert end.value.code == 0 and "Does it." in capsys.readouterr().out


NUMBERS = [
    (integer(0), ["0", "1", "999999"], ["-1", "1.0", "01", "+1", " 1", "1_0", "１", "", "x", "9" * 5000]),
    (integer(-3, 3), ["-3", "3"], ["-4", "4", "-0"]),
    (real(0), ["0", "1e9", "0.5"], ["-1e-9", "nan", "inf", "", "x"]),
    (real(0, 1), ["0", "1"], ["1.0001", "-1"]),
    (real(0, 1, open_low=True), ["1e-9", "1"], ["0", "2"]),
    (real(0, 1, open_high=True), ["0", "0.999"], ["1"]),
]


@pytest.mark.parametrize(("kind", "right", "wrong"), NUMBERS)
def test_numbers(kind: Callable[[str], float], right: list[str], wrong: list[str]) -> None:
    assert [kind(text) for text in right] == [float(text) for text in right]
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match="must be an? (integer|number)") as error:
            kind(text)
        assert len(str(error.value)) < 120


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (integer(1), "must be an integer, 1 or more, got 'x'"),
        (integer(1, 9), "must be an integer from 1 to 9, got 'x'"),
        (real(0), "must be a number from 0, got 'x'"),
        (real(0, 1), "must be a number from 0 to 1, got 'x'"),
        (real(0, 2, True, True), "must be a number above 0 to below 2, got 'x'"),
    ],
)
def test_messages_of_numbers(kind: Callable[[str], float], message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as error:
        kind("x")
    assert str(error.value) == message


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "<&- 2>&-"])
def test_closed_streams_are_replaced_in_place(closed: str, tmp_path: Path) -> None:
    """The next file is not opened as a standard stream, and printing goes nowhere."""
    code = "import command; command.start(); command.say('x'); command.note('y'); import os, sys\n"
    code += "sys.stdin.read(); sys.exit(command.run('x.py', lambda: os.open('new', os.O_WRONLY | os.O_CREAT) > 2))"
    script = f'exec {sys.executable} -c "$CODE" {closed}'
    environment = {"CODE": code, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, input="", capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1  # True: the descriptor is above 2
    assert done.stdout == ("" if ">&-" in closed.split() else "x\n")
    assert done.stderr == ("" if "2>&-" in closed else "y\n")
