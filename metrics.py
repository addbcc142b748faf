"""Reports of a run: the lines of metrics.jsonl, its clock, speed, load of the experts, evaluation, progress bar."""

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import command
import fp8_ops
from byte_tokenizer import EOS_ID, StreamDecoder
from checkpoint import Run
from data.prepare import DataError
from data.sampler import Corpus, EvaluationBatches, read_batch
from model import Transformer
from parallel import CollectiveError, ParallelContext
from safetensors_io import open_append, open_regular, reporting

EVALUATION_SHARE = 0.05  # of a run, at most, for the evaluations before the last
METRICS_FILE = "metrics.jsonl"
MAX_METRICS_BYTES = 1 << 34  # of a file that is read; a line of the largest models has some 100 KB
MAX_LINE_BYTES = 1 << 24
MEASURING_S = 0.05  # how long a product of each size is repeated


class Metrics:
    """The lines of `metrics.jsonl`: one JSON object for each log and evaluation.

    The file appears with its first line, so that a run that fails earlier leaves nothing behind. Lines of steps after
    `step`, which will be repeated, are dropped, as is that step's evaluation if it is to be repeated (not `evaluated`).
    Without a run nothing is kept. A file that cannot be read or written is a CheckpointError.
    """

    def __init__(self, run: Run | None, step: int, evaluated: bool = True):
        self.run = run
        self._file: FileIO | None = None
        if run is not None and os.path.lexists(run.path / METRICS_FILE):
            self._drop_after(run.path / METRICS_FILE, step, evaluated)

    def _drop_after(self, path: Path, step: int, evaluated: bool) -> None:
        end, last = 0, b""
        with open_regular(path, max_bytes=MAX_METRICS_BYTES) as raw:
            old = BufferedReader(raw)
            while line := old.readline(MAX_LINE_BYTES):
                with suppress(ValueError, KeyError, TypeError, RecursionError):  # a crash may have cut a line
                    values = json.loads(line)
                    if values["step"] < step or values["step"] == step and (evaluated or "val_loss" not in values):
                        end, last = old.tell(), line
        self._file = open_append(path, self.run.folder_fd())
        with reporting(path):
            self._file.truncate(end)
            if end and not last.endswith(b"\n"):
                self._file.write(b"\n")

    def write(self, **values: Any) -> None:
        """Appends a line; floats are kept to 6 significant digits."""
        if self.run is None:
            return
        path, folder_fd = self.run.path / METRICS_FILE, self.run.folder_fd()  # which fails if the folder was moved
        self._file = self._file or open_append(path, folder_fd)
        line = json.dumps({key: _rounded(value) for key, value in values.items()}).encode() + b"\n"
        with reporting(path):
            while line:
                line = line[self._file.write(line) :]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return [_rounded(v) for v in value] if isinstance(value, list) else value


@dataclass
class Clock:
    """How much of a run is done: by steps, or by the time since the process began.

    By time, what the last evaluation and save will take is held back, so that the process is over when the time is. A
    resumed run has the time left that it had when it was saved.
    """

    steps: int | None
    minutes: float | None  # of the whole process
    now: Callable[[], float] = time.monotonic
    started: float = field(default_factory=lambda: command.STARTED)  # when the process began, by `now`
    earlier_s: float = 0.0  # time of the runs before this one
    startup_s: float = 0.0  # before training and of the first step of each process, which the schedule leaves out
    save_s: float = 0.0  # what the last save will take, about
    first_step_s: float | None = None  # of this process

    def __post_init__(self) -> None:
        self.seconds = None if self.minutes is None else 60 * self.minutes
        self.eval_s = EVALUATION_SHARE * (self.seconds or 0.0)  # the last evaluation with its sample, until measured
        self._recent: deque[float] = deque(maxlen=9)  # durations of steps, without the first

    def elapsed_s(self) -> float:
        """Seconds of training so far, with those of the runs that this one resumes."""
        return self.earlier_s + self.now() - self.started

    def left_s(self) -> float:
        """Seconds until the process must leave, of a run by the clock."""
        leaving_s = 0.0 if self.seconds is None else min(max(0.5, 0.01 * self.seconds), 2.0)
        return math.inf if self.seconds is None else self.seconds - self.elapsed_s() - leaving_s

    def add_step(self, seconds: float) -> None:
        """Notes how long a step took."""
        if self.first_step_s is None:
            self.first_step_s = seconds
            self.startup_s += self.now() - self.started
        else:
            self._recent.append(seconds)

    def step_s(self) -> float:
        """The median of recent steps, as some compile, and some meet a busy machine; 0 until there were two."""
        ordered = sorted(self._recent)
        return ordered[len(ordered) // 2 if len(ordered) > 2 else 0] if ordered else 0.0

    def progress(self, step: int) -> float:
        """How much is done in the middle of `step`, 0 to 1; 1 means that it is not to be taken."""
        if self.steps is not None:
            return (step + 0.5) / self.steps if step < self.steps else 1.0
        left = self.left_s() - 1.05 * (self.eval_s + self.save_s)
        step_s = self.step_s()
        if left <= (step_s or (self.first_step_s or 0.0) / 10):  # a second step may well take a tenth of the first
            return 1.0
        trained = self.trained_s() + step_s / 2
        return trained / (trained + left)

    def trained_s(self) -> float:
        """Seconds of training without starts."""
        starting_s = self.now() - self.started if self.first_step_s is None else 0.0
        return max(0.0, self.elapsed_s() - self.startup_s - starting_s)


class Due:
    """When to evaluate and to save, if no intervals are given: after tenths of a run, the last excluded.

    An evaluation is left out until another one has become affordable by `EVALUATION_SHARE` of the run so far. It runs
    forward only, so by steps it is reckoned as a third of training on as many bytes. This process begins at `step`.
    """

    def __init__(self, clock: Clock, step: int, step_bytes: int, val_bytes: int):
        self.clock, self.step_bytes, self.val_bytes = clock, step_bytes, val_bytes
        self._tenth = int(10 * clock.progress(step))
        # a resumed run by steps evaluates where it would have done: its last tenth began with this step
        self._affordable = self._count(max(0, -(-(self._tenth * (clock.steps or 0) - 5) // 10)))

    def _count(self, step: int) -> int:
        if self.clock.steps is None:
            return int(EVALUATION_SHARE * self.clock.elapsed_s() / max(self.clock.eval_s, 1e-9))
        return int(EVALUATION_SHARE * step * self.step_bytes / (self.val_bytes / 3))

    def after(self, step: int, eval_interval: int, save_interval: int) -> tuple[bool, bool]:
        """Whether to evaluate (which saves as well), and whether to save at least, after a step; 0: no interval."""
        before, self._tenth = self._tenth, int(10 * self.clock.progress(step))
        is_tenth = before < self._tenth < 10
        evaluates, saves = is_tenth, is_tenth
        if eval_interval:
            evaluates, saves = step % eval_interval == 0 and self._tenth < 10, False
        elif is_tenth:
            affordable, self._affordable = self._affordable, self._count(step)
            evaluates = self._affordable > affordable
        return evaluates, step % save_interval == 0 if save_interval else saves


def describe(model: Transformer, ctx: ParallelContext, peak_flops: float, n_train: int, n_val: int) -> str:
    """Describes in a line what will be trained, and on how many bytes."""
    total, active = model.n_params()
    latent, plain = (n * model.compute_dtype.itemsize for n in model.args.cache_numbers_per_position())
    ranks = f"; {ctx.dp_size} data-parallel × {ctx.mp_size} model-parallel processes" if ctx.world_size > 1 else ""
    return (
        f"{total:,} parameters, {active:,} active per byte; cache {latent:,} bytes per position "
        f"(plain multi-head attention: {plain:,}); {torch.device(ctx.device).type}, "
        f"{str(model.compute_dtype).removeprefix('torch.')} at {peak_flops / 1e12:.3g} TFLOP/s at most"
        f"{', products in FP8' if fp8_ops.gemm_impl == 'fp8' else ''}{ranks}; "
        f"{n_train:,} bytes to train on, {n_val:,} to validate"
    )


class Meter:
    """Speed and load of the experts since the last line of metrics; the devices reach `peak_flops`, in FLOP/s."""

    def __init__(self, peak_flops: float):
        self.peak_flops = peak_flops
        self._sums: tuple[Any, ...] | None = None

    def add(self, seconds: float, n_bytes: int, flops: float, load: torch.Tensor) -> None:
        """Counts a step: its duration, bytes, floating-point operations, and load (MoE layers, experts)."""
        step = (max(seconds, 1e-9), n_bytes, flops, load)
        self._sums = step if self._sums is None else tuple(a + b for a, b in zip(self._sums, step, strict=True))

    def pop(self) -> dict[str, Any]:
        """Returns the figures, and begins anew. `mfu` is None if it would be above 1: then the peak is wrong."""
        (seconds, n_bytes, flops, load), self._sums = self._sums, None
        mfu = flops / seconds / self.peak_flops
        figures: dict[str, Any] = {"bytes_per_s": n_bytes / seconds, "mfu": mfu if mfu <= 1 else None}
        if load.numel():  # of each expert, relative to its layer's mean
            load = load / load.mean(dim=-1, keepdim=True)
            figures["expert_load"] = [[round(x, 3) for x in row] for row in load.tolist()]
            figures["max_load"] = load.max().item()
        return figures


def measure_peak(device: str, dtype: torch.dtype) -> float:
    """Measures what a large matrix product reaches, in FLOP/s: the best of some sizes and repetitions.

    That is in the dtype of training and in float32, which is the faster one where bfloat16 is emulated.
    """
    sizes = [256, 512, 1024] if torch.device(device).type == "cpu" else [1024, 4096, 8192]
    best = 0.0
    for kind in {dtype, torch.float32}:
        for size in sizes:
            seconds = _product_seconds(device, kind, size)
            best = max(best, 2 * size**3 / seconds)
            if seconds > 0.1:  # emulated; a larger product would take seconds
                break
    return best


@torch.no_grad()
def _product_seconds(device: str, dtype: torch.dtype, size: int) -> float:
    """The time of the fastest of several products of square matrices."""
    a, fastest, began = torch.randn(size, size, device=device).to(dtype), float("inf"), time.perf_counter()
    (a @ a)[0, 0].item()  # warms up; .item() waits for the device
    while True:
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        fastest = min(fastest, time.perf_counter() - start)
        if time.perf_counter() - began > MEASURING_S:
            return fastest


@contextmanager
def reading(ctx: ParallelContext) -> Iterator[None]:
    """Around reading the corpus: an error of one process is raised as a DataError in all of them."""
    try:
        with ctx.collective_section():
            yield
    except CollectiveError as error:
        raise DataError(str(error)) from None


@torch.inference_mode()
def evaluate(
    model: Transformer,
    data: Corpus,
    batch_size: int,
    ctx: ParallelContext,
    seq_len: int | None = None,
    max_sequences: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Measures the loss over a split, in sequences of `seq_len` bytes (default: the context) that do not overlap.

    Args:
        max_sequences: If the split has more sequences than these, that many are taken, evenly spread over it.
        stop: Asked before each batch; True ends the evaluation.

    Returns:
        Nats per byte; every byte but the first is predicted once. None after `stop`.
    """
    batches = EvaluationBatches(len(data), seq_len or model.args.max_seq_len, batch_size, max_sequences)
    total = torch.zeros((), dtype=torch.float64)
    model.eval()
    for i in range(0, len(batches), ctx.dp_size):
        if stop():
            return None
        # all ranks must go through the model equally often: one with no batch left repeats the last, for nothing
        starts, length = batches[min(i + ctx.dp_rank, len(batches) - 1)]
        with reading(ctx):
            tokens, targets = read_batch(data, starts, length, ctx.device)
        loss = model.next_byte_loss(tokens, targets).item()
        if i + ctx.dp_rank < len(batches):
            total += loss * len(starts) * length
    model.train()
    return ctx.all_reduce_dp(total).item() / batches.n_targets


@torch.inference_mode()
def sample_text(model: Transformer, n_bytes: int, device: str, stop: Callable[[], bool] = lambda: False) -> str:
    """Samples from a document's start, `n_bytes` or the context at most, until `stop`; at temperature 0.8, seed 0."""
    generator, decoder = torch.Generator().manual_seed(0), StreamDecoder()
    model.eval()
    cache = model.new_cache(1, model.args.max_seq_len)
    text, token = "", EOS_ID
    for _ in range(min(n_bytes, model.args.max_seq_len)):
        logits = model(torch.tensor([[token]], device=device), cache)[0, -1]
        token = int(torch.multinomial((logits.cpu() / 0.8).softmax(dim=-1), 1, generator=generator))
        if token == EOS_ID or stop():
            break
        text += decoder.feed([token])
    model.train()
    return text + decoder.flush()


class ProgressBar(AbstractContextManager):
    """A bar on the terminal: the step, percent of the run, time, loss and speed. It moves twice a second.

    Nothing is shown where stderr is no terminal, or unless `is_shown`; of the run, `progress` is done: 0 to 1.
    """

    def __init__(self, is_shown: bool, progress: float):
        form = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        disable = None if is_shown else True  # None: unless stderr is a terminal
        self._bar = tqdm(total=100, disable=disable, bar_format=form, initial=100 * progress)
        self._closed = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        if not self._bar.disable:
            self._ticker.start()

    def _tick(self) -> None:
        while not self._closed.wait(0.5):  # steps, evaluations and compilation may take much longer
            with suppress(OSError, ValueError):
                self._bar.refresh()

    def show(self, step: int, progress: float) -> None:
        """Sets the number of the step, and how much of the run is done."""
        self._bar.n = round(100 * progress, 1)
        self._bar.set_description_str(f"step {step}", refresh=False)

    def show_figures(self, loss: float, bytes_per_s: float, mfu: float | None) -> None:
        """Sets the figures of the last line of metrics."""
        of_peak = "" if mfu is None else f", MFU {mfu:.0%}"
        self._bar.set_postfix_str(f"loss {loss:.3f}, {bytes_per_s:,.0f} bytes/s{of_peak}", refresh=False)

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._ticker.is_alive():
            self._ticker.join()
        self._bar.close()
