"""What every command has in common: how it starts, reads its flags, prints, and ends.

A script begins with

    if __name__ == "__main__":
        import command

        command.start()  # before torch is imported, which takes seconds

and its `main` returns `command.run("convert.py", lambda: ..., mistakes=(CheckpointError,))`. Four promises follow,
and no other module has to think of them:

* Ctrl-C or SIGTERM at any moment ends the process with exit code 130 and no traceback, after what is half-done has been
  removed. Until `run` there is nothing to remove.
* A user's mistake is one line on stderr, `convert.py: error: ...`, and exit code 2; anything else is a fault of this
  project, shown with its traceback, exit code 1.
* Nothing that came from a model, a file, a path or the command line reaches a terminal as a control character.
* A standard stream that is closed is replaced by /dev/null; one that is full is reported once, with exit code 2.

Standard library only, so that it is there before anything else is.
"""

import argparse
import errno
import math
import os
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from byte_tokenizer import one_line, visible

STARTED = time.monotonic()  # train.py's --minutes counts from here: torch is not imported yet
INTERRUPTED = 130  # exit code after Ctrl-C or SIGTERM
MIN_CACHE_BYTES = 1 << 24  # free space below which a cache folder counts as full
BROKEN_PIPE = 141  # exit code when nobody reads stdout any more

_write_error: OSError | None = None  # the first failure to write stdout
_is_script = False  # whether `start` was called: then the process ends with the command


# --- Start and end ---------------------------------------------------------------------------------------------------


def start() -> None:
    """Prepares the process of a script: its signals and its standard streams."""
    global _is_script
    _is_script = True
    _set_handlers(lambda *_: os._exit(INTERRUPTED))  # nothing has been begun yet
    for descriptor in range(3):  # else the next file that is opened would be stdout
        try:
            os.fstat(descriptor)
        except OSError:
            while (opened := os.open(os.devnull, os.O_RDWR)) < descriptor:
                pass
            if opened > descriptor:
                os.close(opened)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for the life of the process
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a model writes characters that a terminal may not have
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        with suppress(OSError):  # many functions of torch, optimizers for one, open its compiler's folder, used or not
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private_cache_folder() / "torchinductor")


def _set_handlers(handler: Any) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handler)


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a command even where Ctrl-C only stops a part of it."""


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
        signal.raise_signal(signal.SIGINT)
        return None

    return handle


def run(prog: str, body: Callable[[], int | None], mistakes: tuple[type[Exception], ...] = ()) -> int:
    """Runs the body of a command and turns whatever happens into an exit code.

    Args:
        prog: Name of the script, for messages.
        body: The command; returns its exit code, None for 0.
        mistakes: Exception classes that mean a user's mistake. OSError and lack of memory always do.

    Returns:
        The exit code: 0, 1 after a fault of this project, 2 after a mistake, 130 after a signal, 141 when nobody reads
        stdout.
    """
    is_main = threading.current_thread() is threading.main_thread()  # only there does Python allow handlers
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.unraisablehook
    try:
        if is_main:
            _set_handlers(_interrupt)
            sys.unraisablehook = _unraisable(hook)
        code = body() or 0
        return _flush(prog) or code
    except BaseException as error:  # noqa: BLE001 - each kind has its exit code
        if isinstance(error, SystemExit):  # of the parser; what it printed may not have been written
            if code := _flush(prog):
                return code
            raise
        code, message = explain(error, mistakes)
        if message is not None:
            complain(prog, message)
        elif code == 1:
            traceback.print_exc()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        return code
    finally:
        sys.unraisablehook = hook
        if is_main:  # of a script, the process ends now: a signal has nothing left to stop
            for signum, handler in before.items():
                signal.signal(signum, signal.SIG_IGN if _is_script else handler)


def explain(error: BaseException, mistakes: tuple[type[Exception], ...]) -> tuple[int, str | None]:
    """Returns the exit code for an exception, and the line that says what went wrong; None: there is nothing to say."""
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
    global _write_error
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        _drop_stdout(error)
    error, _write_error = _write_error, None
    if error is None:
        return 0
    if error.errno == errno.EPIPE:
        return BROKEN_PIPE
    complain(prog, f"cannot write to standard output: {error.strerror or error}")
    return 2


def _drop_stdout(error: Exception) -> None:
    """Notes that stdout cannot be written, and lets what is still buffered go nowhere."""
    global _write_error
    _write_error = error if isinstance(error, OSError) else OSError(errno.EBADF, os.strerror(errno.EBADF))
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- Printing --------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Prints text to stdout, with its control characters made visible. A stdout that fails is reported by `run`."""
    try:
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)  # a bar on the terminal must step aside
        (tqdm.write if tqdm else print)(visible(text))
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        _drop_stdout(error)


def write(data: bytes) -> None:
    """Writes bytes to stdout as they are, at once.

    Raises:
        OSError: Stdout cannot be written, so the command is to end; `run` reports it.
    """
    global _write_error
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        _drop_stdout(error)
        failure, _write_error = _write_error, None
        raise OSError(failure.errno, f"cannot write to standard output: {failure.strerror}") from None


def warn(prog: str, message: str) -> None:
    """Prints a warning in one line to stderr."""
    _to_stderr(f"{prog}: warning: {one_line(message)}")


def complain(prog: str, message: str) -> None:
    """Prints an error in one line to stderr."""
    _to_stderr(f"{prog}: error: {one_line(message)}")


def note(line: str) -> None:
    """Prints a line to stderr: what is neither a result nor an error, such as a speed."""
    _to_stderr(one_line(line))


def is_local_rank_zero() -> bool:
    """Whether this process is the one of this machine that reports errors which all of them have."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def _to_stderr(line: str) -> None:
    with suppress(OSError, ValueError, AttributeError):  # where stderr fails there is nobody to tell
        print(line, file=sys.stderr, flush=True)


def shorten(value: Any, limit: int = 150) -> str:
    """What a file or a user says, fit to be quoted in one line of a message."""
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
    """Makes an argparse type: an integer from `low` to `high`, ends included."""

    def parse(text: str) -> int:
        with suppress(ValueError):
            if low <= (value := int(text)) <= high:
                return value
        wanted = f"an integer from {low} to {high}" if high < 10**12 else f"an integer, {low} or more"
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {shorten(text, 40)!r}")

    return parse


def real(low: float, high: float = math.inf, open_low: bool = False, open_high: bool = False) -> Callable[[str], float]:
    """Makes an argparse type: a finite number from `low` to `high`, either end excluded if it is open."""
    ends = f"{'above' if open_low else 'from'} {low:g}" + (
        f"{' to below' if open_high else ' to'} {high:g}" if math.isfinite(high) else ""
    )

    def parse(text: str) -> float:
        with suppress(ValueError):
            value = float(text)
            above = low < value if open_low else low <= value
            below = value < high if open_high else value <= high
            if math.isfinite(value) and above and below:
                return value
        raise argparse.ArgumentTypeError(f"must be a number {ends}, got {shorten(text, 40)!r}")

    return parse


# --- Folders for what runs as code ------------------------------------------------------------------------------------


def private_cache_folder() -> Path:
    """Returns a folder for compiled code, which nobody but this user (and root) can write to.

    It is `bytegpt` in `$XDG_CACHE_HOME` or `~/.cache`, made if needed; or `private_temporary_folder()` where that is
    full, cannot be written or run from, belongs to somebody else, or stands where others could replace it.

    Raises:
        OSError: Not even a temporary folder can be made.
    """
    with suppress(OSError, RuntimeError, ValueError):  # RuntimeError: no home
        named = os.environ.get("XDG_CACHE_HOME", "")
        # a relative path would follow the working folder, so its standard has it ignored
        base = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
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
    import atexit  # these take longer than all that `start` needs
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="bytegpt-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def is_private(info: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user, is no link, and can be written by nobody else."""
    return info.st_uid == os.geteuid() and not stat.S_ISLNK(info.st_mode) and not info.st_mode & 0o022


def _is_usable(folder: Path) -> bool:
    """Whether files can be written to a folder, and code be loaded from it."""
    disk = os.statvfs(folder)
    is_executable = not disk.f_flag & getattr(os, "ST_NOEXEC", 0)
    return is_executable and disk.f_bavail * disk.f_frsize >= MIN_CACHE_BYTES and os.access(folder, os.W_OK | os.X_OK)


def _is_guarded(path: Path) -> bool:
    """Whether nobody but root and this user can replace what is in a folder; a sticky one guards it (`/tmp`)."""
    info = path.lstat()
    is_fixed = stat.S_ISLNK(info.st_mode) or not info.st_mode & 0o022 or bool(info.st_mode & stat.S_ISVTX)
    return info.st_uid in (0, os.geteuid()) and is_fixed
