"""Reports of a run: the lines of metrics.jsonl, its clock, speed, load of the experts, evaluation, progress bar."""

import heapq
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

import numpy as np
import torch
import torch.nn.functional as F
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
N_WORST = 5  # sequences of a file that are reported
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
    n_frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    frozen = f" ({n_frozen:,} frozen)" if n_frozen else ""
    ranks = f"; {ctx.dp_size} data-parallel × {ctx.mp_size} model-parallel processes" if ctx.world_size > 1 else ""
    return (
        f"{total:,} parameters{frozen}, {active:,} active per byte; cache {latent:,} bytes per position "
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
    for i, is_mine in _deal(len(batches), ctx):
        if stop():
            return None
        starts, length = batches[i]
        with reading(ctx):
            tokens, targets = read_batch(data, starts, length, ctx.device)
        loss = model.next_byte_loss(tokens, targets).item()
        if is_mine:
            total += loss * len(starts) * length
    model.train()
    return ctx.all_reduce_dp(total).item() / batches.n_targets


def _deal(n_batches: int, ctx: ParallelContext) -> Iterator[tuple[int, bool]]:
    """Deals batches out to the data-parallel ranks: yields the number of each, and whether it counts.

    All ranks must go through the model equally often: one with no batch left repeats the last, for nothing.
    """
    for i in range(ctx.dp_rank, n_batches + ctx.dp_rank, ctx.dp_size):
        yield min(i, n_batches - 1), i < n_batches


class OverlappingBatches:
    """Batches of sequences of `seq_len` bytes, `stride` apart, which together predict each byte but the first once.

    A sequence predicts what the one before it has not: the first all that it reaches, the others their last `stride`
    bytes, each from at least `seq_len - stride` bytes before it. What remains at the end is one shorter sequence.
    """

    def __init__(self, n_bytes: int, seq_len: int, stride: int, batch_size: int):
        self.n_targets, self.seq_len, self.stride, self.batch_size = n_bytes - 1, seq_len, stride, batch_size
        self.n_full = max(0, (self.n_targets - seq_len) // stride + 1)
        self.rest = self.n_targets - (seq_len + (self.n_full - 1) * stride if self.n_full else 0)

    def __len__(self) -> int:
        return -(-self.n_full // self.batch_size) + (self.rest > 0)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Returns offsets, int64 (sequences,), the targets of each sequence, and how many of its first do not count."""
        numbers = np.arange(i * self.batch_size, min((i + 1) * self.batch_size, self.n_full))
        if len(numbers):
            return numbers * self.stride, self.seq_len, np.where(numbers == 0, 0, self.seq_len - self.stride)
        start = self.n_full * self.stride
        length = self.n_targets - start
        return np.array([start]), length, np.array([length - self.rest])


@torch.inference_mode()
def evaluate_file(
    model: Transformer, data: Corpus, batch_size: int, ctx: ParallelContext, stride: int | None = None
) -> dict[str, Any]:
    """Measures the loss over a whole file of two bytes or more, in sequences of the model's context.

    Each byte is predicted once, but for the first, before which there is nothing. The batches are the same however many
    processes there are.

    Args:
        batch_size: Sequences that a process computes at a time.
        stride: Distance of the sequences; by default the context, so that they do not overlap.

    Returns:
        Figures ready for JSON: "val_loss" in nats per byte, "val_bpb" in bits; "standard_error" of val_loss over the
        sequences, None for a single one; how many "bytes" were predicted in how many "sequences", with "context" and
        "stride"; and the "worst" sequences: "offset" of the first byte that each predicts, their number, their loss.

    Raises:
        DataError: The file cannot be read.
    """
    seq_len = model.args.max_seq_len
    batches = OverlappingBatches(len(data), seq_len, stride or seq_len, batch_size)
    sums, worst = torch.zeros(6, dtype=torch.float64), list[tuple[float, int, int]]()
    model.eval()
    bar = tqdm(total=len(batches), disable=None if ctx.rank == 0 else True, unit="batch")
    for i, is_mine in _deal(len(batches), ctx):
        starts, length, skips = batches[i]
        with reading(ctx):
            tokens, targets = read_batch(data, starts, length, ctx.device)
        losses = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        bar.update(ctx.dp_size)
        if is_mine:
            counts = torch.from_numpy(length - skips)
            is_predicted = torch.arange(length) >= length - counts[:, None]
            totals = losses.cpu().double().where(is_predicted, 0.0).sum(dim=1)
            n = counts.double()
            terms = n, totals, n * n, n * totals, totals * totals, torch.ones_like(n)
            sums += torch.stack([term.sum() for term in terms])
            worst += zip((totals / n).tolist(), (-1 - starts - skips).tolist(), counts.tolist(), strict=True)
            worst = heapq.nlargest(N_WORST, worst)  # of equals, those that come first
    bar.close()
    figures = _loss_figures(ctx.all_reduce_dp(sums)) | {"context": seq_len, "stride": batches.stride}
    return figures | {"worst": _gather_worst(worst, ctx)}


def _loss_figures(sums: torch.Tensor) -> dict[str, Any]:
    """From sums over sequences of n bytes whose loss is L: of n, L, n², nL, L² and 1.

    The loss is a ratio of two sums, so its variance is that of L - loss·n, as of any ratio estimator.
    """
    n, total, n_n, n_total, total_total, count = sums.tolist()
    loss = total / n
    squares = max(0.0, total_total - 2 * loss * n_total + loss * loss * n_n)
    error = math.sqrt(squares * count / (count - 1)) / n if count > 1 else None
    return {
        "val_loss": loss,
        "val_bpb": loss / math.log(2),
        "standard_error": error,
        "bytes": int(n),
        "sequences": int(count),
    }


def _gather_worst(worst: list[tuple[float, int, int]], ctx: ParallelContext) -> list[dict[str, Any]]:
    """The worst sequences of all data-parallel ranks, from those of each: loss, minus offset, bytes."""
    table = torch.zeros(ctx.dp_size, N_WORST, 3, dtype=torch.float64)
    table[ctx.dp_rank, : len(worst)] = torch.tensor(worst, dtype=torch.float64).view(-1, 3)
    rows = [row for row in ctx.all_reduce_dp(table).flatten(0, 1).tolist() if row[2] > 0]
    return [{"offset": int(-at), "bytes": int(n), "loss": loss} for loss, at, n in heapq.nlargest(N_WORST, rows)]


def describe_origin(origin: dict[str, Any]) -> str:
    """Describes where weights are from; see `Checkpoint.origin`."""
    step = "" if origin["step"] is None else f", step {origin['step']}"
    return f"{origin['path']} ({origin['kind']}{step})"


def describe_loss(figures: dict[str, Any]) -> str:
    """Describes figures of `evaluate_file`, those of `Checkpoint.origin` and the name of the "data" in some lines."""
    loss, bpb, error = figures["val_loss"], figures["val_bpb"], figures["standard_error"]
    errors = ["" if error is None else f" ± {e:.4f}" for e in (error, error and error / math.log(2))]
    apart = "" if figures["stride"] == figures["context"] else f", {figures['stride']:,} apart"
    lines = [
        f"{describe_origin(figures)} on {figures['data']}:",
        f"{loss:.4f}{errors[0]} nats/byte, {bpb:.4f}{errors[1]} bits/byte: {figures['bytes']:,} bytes predicted, in "
        f"{figures['sequences']:,} sequences of {figures['context']:,} bytes{apart}",
        "the worst sequences: offset of the first byte that each predicts, their number, nats/byte",
    ]
    lines += [f"  {row['offset']:>15,}  {row['bytes']:>7,} bytes  {row['loss']:.4f}" for row in figures["worst"]]
    return "\n".join(lines)


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
