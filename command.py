"""Start, flags, output and end of every command.

A script begins with

    if __name__ == "__main__":
        import command

        command.start()  # before torch is imported, which takes seconds

and its `main` returns `command.run("convert.py", lambda: ..., mistakes=(CheckpointError,))`. From then on

* Ctrl-C or SIGTERM at any moment ends the process with exit code 130 and no traceback, after unfinished files have been
  removed; a user's mistake is one line on stderr and exit code 2; any other exception is shown with its traceback, 1;
* nothing that came from a model, a file or the command line reaches a terminal as a control character;
* a closed standard stream is replaced by /dev/null, and a full one is reported once, with exit code 2.

Standard library only, so that it is there before anything else is.
"""

import argparse
import errno
import io
import math
import os
import re
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

from byte_tokenizer import one_line, visible

STARTED = time.monotonic()  # train.py's --minutes counts from here: torch is not imported yet
INTERRUPTED = 130  # exit code after Ctrl-C or SIGTERM
MIN_CACHE_BYTES = 1 << 24  # free space below which a cache folder counts as full
BROKEN_PIPE = 141  # exit code when the reader of stdout has gone
_SIGNALS = signal.SIGINT, signal.SIGTERM

_write_error: OSError | None = None  # the first failure to write stdout
_is_script = False  # whether `start` was called: then the process ends with the command


# --- Start and end ---------------------------------------------------------------------------------------------------


def start() -> None:
    """Prepares the process of a script: its signals and its standard streams."""
    global _is_script
    _is_script = True
    _set_handlers(lambda *_: os._exit(INTERRUPTED))  # nothing has been begun yet
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one, which the next file would get
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # a model writes characters that a terminal may not have
        cast(io.TextIOWrapper, stream).reconfigure(errors="backslashreplace")
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        with suppress(OSError):  # many functions of torch, optimizers for one, open its compiler's folder, used or not
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private_cache_folder() / "torchinductor")


def _set_handlers(handler: Any) -> None:
    for signum in _SIGNALS:
        signal.signal(signum, handler)


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a command even where Ctrl-C only stops a reply."""


def _interrupt(signum: int, _frame: Any) -> None:
    """Signal handler: unwinds the stack once; further signals do not disturb the clean-up."""
    _set_handlers(signal.SIG_IGN)
    raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt


def _unraisable(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wraps `sys.unraisablehook`: an interrupt that hit a destructor, where Python drops it, is sent again."""

    def handle(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            return hook(unraisable)
        _set_handlers(_interrupt)
        signum = signal.SIGTERM if isinstance(unraisable.exc_value, Terminated) else signal.SIGINT
        signal.signal(signal.SIGALRM, lambda *_: _interrupt(signum, None))
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # by when this hook, where exceptions are dropped too, is left
        return None

    return handle


def run(prog: str, body: Callable[[], int | None], mistakes: tuple[type[Exception], ...] = ()) -> int:
    """Runs the body of a command and turns whatever happens into an exit code.

    Args:
        prog: Name of the script, for messages.
        body: The command; returns its exit code, None for 0.
        mistakes: Exception classes that mean a user's mistake. OSError and lack of memory always do.

    Returns:
        0, 1 after a fault of this project, 2 after a mistake, 130 after a signal, 141 without a reader of stdout.
    """
    before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    hook = sys.unraisablehook
    try:
        _set_handlers(_interrupt)
        sys.unraisablehook = _unraisable(hook)
        code = body() or 0
        return _flush(prog) or code
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - each kind has its exit code
        code, message = explain(error, mistakes)
        if message is not None:
            complain(prog, message)
        elif code == 1:
            traceback.print_exc()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        return code
    finally:
        _settle_stderr()
        sys.unraisablehook = hook
        for signum, handler in before.items():  # of a script, the process ends now: a signal has nothing left to stop
            signal.signal(signum, signal.SIG_IGN if _is_script else handler)


def explain(error: BaseException, mistakes: tuple[type[Exception], ...]) -> tuple[int, str | None]:
    """Returns the exit code for an exception, and the error message in one line; None: none is printed."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, None
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE, None
    text = str(error) or type(error).__name__  # no message is ever empty
    if isinstance(error, mistakes):
        return 2, text
    if isinstance(error, OSError):
        name = f": {error.filename}" if error.filename else ""
        return 2, f"{error.strerror or text}{name}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in text:
        return 2, "not enough memory; take a smaller model, batch or context"
    return 1, None


def _flush(prog: str) -> int:
    """Flushes stdout; returns the exit code of a failure to write it, now or before, else 0."""
    _to_stdout(lambda: None)
    if (failure := _take_write_error()) is None:
        return 0
    code, message = explain(failure, ())
    if message:
        complain(prog, f"cannot write to standard output: {message}")
    return code


def _to_stdout(send: Callable[[], Any]) -> None:
    """Writes and flushes; where that fails, keeps the error, and sends the rest of the buffer to /dev/null."""
    global _write_error
    try:
        send()
        sys.stdout.flush()
    except (OSError, ValueError) as error:  # ValueError: it is closed
        _write_error = error if isinstance(error, OSError) else OSError(errno.EBADF, os.strerror(errno.EBADF))
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _take_write_error() -> OSError | None:
    global _write_error
    error, _write_error = _write_error, None
    return error


# --- Printing --------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Prints text to stdout, with its control characters made visible. A stdout that fails is reported by `run`."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)  # a bar on the terminal must step aside
    _to_stdout(lambda: (tqdm.write if tqdm else print)(visible(text)))


def write(data: bytes) -> None:
    """Writes bytes to stdout as they are, at once.

    Raises:
        OSError: Stdout cannot be written, so the command is to end; `run` reports it.
    """
    _to_stdout(lambda: sys.stdout.buffer.write(data))
    if failure := _take_write_error():
        raise OSError(failure.errno, f"cannot write to standard output: {failure.strerror}")


def warn(prog: str, message: str) -> None:
    """Prints a warning in one line to stderr."""
    _to_stderr(f"{prog}: warning: {one_line(message)}")


def complain(prog: str, message: str) -> None:
    """Prints an error in one line to stderr."""
    _to_stderr(f"{prog}: error: {one_line(message)}")


def note(line: str) -> None:
    """Prints a line to stderr that is neither a result nor an error, such as a speed."""
    _to_stderr(one_line(line))


def is_local_rank_zero() -> bool:
    """Whether this process is the one of this machine that reports errors which all of them have."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def _to_stderr(line: str) -> None:
    with suppress(OSError, ValueError, AttributeError):  # where stderr fails, nothing can be reported
        print(line, file=sys.stderr, flush=True)


def _settle_stderr() -> None:
    """Drops output that stderr does not take: at the end of the process, it would turn the exit code into 120."""
    try:
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def shorten(value: Any, limit: int = 150) -> str:
    """Returns text from a file or a user in a form that fits one line of a message."""
    text = str(value)
    text = text if len(text) <= limit else text[:limit] + "…"
    return text if text.isprintable() and text else ascii(text)


# --- Flags -----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which takes no abbreviated flags."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog=prog, allow_abbrev=False, **options)

    def error(self, message: str) -> Any:
        if is_local_rank_zero():  # all processes of a machine were given the same flags
            complain(self.prog, shorten(message, 500))
        self.exit(2)

    def print_help(self, file: Any = None) -> None:
        say(self.format_help().rstrip())

    def exit(self, status: int = 0, message: str | None = None) -> Any:
        super().exit(_flush(self.prog) or status, message)


def integer(low: int, high: int = 10**12) -> Callable[[str], int]:
    """Returns an argparse type: an integer from `low` to `high`, ends included."""

    def parse(text: str) -> int:
        with suppress(ValueError):
            if re.fullmatch("0|-?[1-9][0-9]*", text) and low <= (value := int(text)) <= high:
                return value
        wanted = f"an integer from {low} to {high}" if high < 10**12 else f"an integer, {low} or more"
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {shorten(text, 40)!r}")

    return parse


def real(low: float, high: float = math.inf, open_low: bool = False, open_high: bool = False) -> Callable[[str], float]:
    """Returns an argparse type: a finite number from `low` to `high`, either end excluded if it is open."""
    ends = f"{'above' if open_low else 'from'} {low:g}"
    if math.isfinite(high):
        ends += f"{' to below' if open_high else ' to'} {high:g}"

    def parse(text: str) -> float:
        with suppress(ValueError):
            value = float(text)
            is_end = open_low and value == low or open_high and value == high
            if low <= value <= high and math.isfinite(value) and not is_end:
                return value
        raise argparse.ArgumentTypeError(f"must be a number {ends}, got {shorten(text, 40)!r}")

    return parse


# --- Folders for what runs as code ------------------------------------------------------------------------------------


def private_cache_folder() -> Path:
    """Returns a folder for compiled code, which only this user (and root) can write to.

    It is `bytegpt` in `$XDG_CACHE_HOME` or `~/.cache`, created if needed; or `private_temporary_folder()` where that is
    full, cannot be written or run from, belongs to another user, or stands where others could replace it.
    """
    with suppress(OSError, RuntimeError, ValueError):  # RuntimeError: no home
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not base.is_absolute():  # a relative path would follow the working folder, so its standard has it ignored
            base = Path.home() / ".cache"
        if base.is_absolute():
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = base.resolve() / "bytegpt"
            if all(map(_is_guarded, (base, *base.parents, *folder.parents))):
                folder.mkdir(mode=0o700, exist_ok=True)
                if is_private(folder.lstat()) and folder.is_dir() and _is_usable(folder):
                    return folder
    return private_temporary_folder()


@cache
def private_temporary_folder() -> Path:
    """Returns a new folder of this user alone, the same at each call, which is removed when the process ends."""
    import atexit  # imported here, since they take longer than the rest of `start`
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="bytegpt-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def is_private(info: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user, is no link, and cannot be written by others."""
    return info.st_uid == os.geteuid() and not stat.S_ISLNK(info.st_mode) and not info.st_mode & 0o022


def _is_usable(folder: Path) -> bool:
    """Whether files can be written to a folder, and code be loaded from it."""
    disk = os.statvfs(folder)
    is_executable = not disk.f_flag & getattr(os, "ST_NOEXEC", 0)
    return is_executable and disk.f_bavail * disk.f_frsize >= MIN_CACHE_BYTES and os.access(folder, os.W_OK | os.X_OK)


def _is_guarded(path: Path) -> bool:
    """Whether only root and this user can replace entries of a folder, as in a sticky one (`/tmp`)."""
    info = path.lstat()
    is_fixed = stat.S_ISLNK(info.st_mode) or not info.st_mode & 0o022 or bool(info.st_mode & stat.S_ISVTX)
    return info.st_uid in (0, os.geteuid()) and is_fixed
