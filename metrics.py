"""Reports of a run: lines of metrics.jsonl, its clock, speed, load of the experts, evaluation, progress, profile.

Fields of a line of `metrics.jsonl`; figures of speed and load are of the steps since the line before:

    step               steps taken: in every line, as are the next two
    elapsed_s          seconds of the run so far, with those of the runs that it resumes
    bytes              bytes trained on so far
    train_loss         of the step's own bytes, nats per byte
    mtp_loss           the same of the MTP modules, if the model has some
    balance_loss       of the experts' balance in each sequence, as it enters the sum that is minimised
    index_loss         of the indexers: their divergence from attention, nats, summed over layers
    lr                 learning rate of the step: of embedding, head and norms
    router_lr          of the routers, if there are any
    matrix_lr          of the hidden matrices
    index_lr           of the indexers' norms, if there are any
    index_matrix_lr    of their matrices
    grad_norm          of all gradients, before they are clipped
    bytes_per_s        speed
    mfu                model FLOP utilisation: share of the measured peak; null where that comes out above 1
    data_wait          share of the time in which the first process read data; a GPU may have been at work meanwhile
    peak_memory_bytes  the most memory so far: of the GPU by tensors, elsewhere of the process
    expert_load        of each MoE layer, each expert: tokens routed to it, relative to the layer's mean
    max_load           the largest of them
    val_loss           in the line of an evaluation: over the validation split, nats per byte
    val_bpb            the same in bits per byte
    val_windows        number of sequences that were evaluated, where it was not all
    window             their length in bytes, where it is shorter than the context
"""

import heapq
import json
import math
import os
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import command
import fp8_ops
from byte_tokenizer import EOS_ID, StreamDecoder
from checkpoint import Run
from data.prepare import DataError
from data.sampler import Corpus, EvaluationBatches, read_batch
from model import Experts, KVCache, Linear, Transformer
from parallel import CollectiveError, ParallelContext
from safetensors_io import inside, open_append, open_regular, reporting, temporary_path, write_json

EVALUATION_SHARE = 0.05  # of a run, at most, for the evaluations before the last
SAVING_SHARE = 0.03  # of a run by the clock, at most, for the saves before the last
METRICS_FILE = "metrics.jsonl"
SETTINGS_FILE = "settings.json"  # the flags and the model of a run, for plot.py
TENSORBOARD_FOLDER = "tensorboard"
RUN_FILES = rf"{METRICS_FILE}|{SETTINGS_FILE}|{TENSORBOARD_FOLDER}|profile-\d{{8,}}\.json\.gz"  # written here
MAX_METRICS_BYTES = 1 << 34  # of a file that is read; a line of the largest models has some 100 KB
MAX_LINE_BYTES = 1 << 24
N_WORST = 5  # sequences of a file that are reported
MEASURING_S = 0.05  # how long a product of each size is repeated
FIRST_LOG_S, LONGEST_LOG_S = 10.0, 300.0  # between lines of a log without a terminal: each takes twice the last
WARM_UP_STEPS = 4  # before a profile: they compile, allocate memory, and are recorded as a CUDA graph
N_COSTLIEST = 10  # operations of a profile that are printed


@dataclass
class Metrics:
    """The lines of `metrics.jsonl`: one JSON object for each log and evaluation.

    The file appears with its first line, so that a run that fails earlier leaves nothing behind. Lines of steps after
    `step`, which will be repeated, are dropped, as is that step's evaluation if it is to be repeated (not `evaluated`).
    Without a run nothing is kept. A file that cannot be read or written is a CheckpointError.
    """

    run: Run | None
    step: int
    evaluated: bool = True
    settings: dict[str, Any] | None = None  # go to `settings.json` before the first line
    tensorboard: bool = False  # whether the figures go to event files as well

    def __post_init__(self) -> None:
        self._file: FileIO | None = None
        self._writer: Any = None
        if self.run is not None and os.path.lexists(self.run.path / METRICS_FILE):
            self._drop_later_lines(self.run.path / METRICS_FILE)

    def _drop_later_lines(self, path: Path) -> None:
        step, end, last = self.step, 0, b""
        with open_regular(path, max_bytes=MAX_METRICS_BYTES) as raw:
            old = BufferedReader(raw)
            while line := old.readline(MAX_LINE_BYTES):
                with suppress(ValueError, KeyError, TypeError, RecursionError):  # a crash may have cut a line
                    values = json.loads(line)
                    if values["step"] < step or values["step"] == step and (self.evaluated or "val_loss" not in values):
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
        if self.settings is not None:
            write_json(self.run.path / SETTINGS_FILE, self.settings, folder_fd)
            self.settings = None
        self._file = self._file or open_append(path, folder_fd)
        line = json.dumps({key: _rounded(value) for key, value in values.items()}).encode() + b"\n"
        with reporting(path):
            while line:
                line = line[self._file.write(line) :]
        if self.tensorboard:
            self._write_events(self.run.path, values)

    def _write_events(self, folder: Path, values: dict[str, Any]) -> None:
        """Writes the figures of a line for TensorBoard, under their names; of each MoE layer, its load's histogram."""
        with reporting(folder / TENSORBOARD_FOLDER):
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter  # takes seconds, and an optional package

                path = str(inside(folder, TENSORBOARD_FOLDER))
                self._writer = SummaryWriter(path, purge_step=self.step + 1)  # hides steps that are repeated
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, values["step"])
                elif isinstance(value, list):
                    for i, row in enumerate(value):
                        self._writer.add_histogram(f"{name}/{i}", torch.tensor(row), values["step"])
            self._writer.flush()  # so that a kill loses nothing


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return [_rounded(v) for v in value] if isinstance(value, list) else value


@dataclass
class Clock:
    """How much of a run is done: by steps, or by the time since the process began.

    Time for the last evaluation and save is reserved, so that the process of a run by time ends when the time does. A
    resumed run has the time left that it had when it was saved.
    """

    steps: int | None
    minutes: float | None  # of the process, start-up included
    now: Callable[[], float] = time.monotonic
    started: float = field(default_factory=lambda: command.STARTED)  # when the process began, by `now`
    earlier_s: float = 0.0  # time of the runs before this one
    startup_s: float = 0.0  # before training and of the first step of each process, which the schedule leaves out
    save_s: float = 0.0  # duration of the last save, estimated
    first_step_s: float | None = None  # of this process

    def __post_init__(self) -> None:
        self.seconds = None if self.minutes is None else 60 * self.minutes
        self.eval_s = EVALUATION_SHARE * (self.seconds or 0.0)  # of the last evaluation with its sample; until measured
        self._recent: deque[float] = deque(maxlen=9)  # durations of steps, without the first

    def elapsed_s(self) -> float:
        """Seconds of training so far, with those of the runs that this one resumes."""
        return self.earlier_s + self.now() - self.started

    def left_s(self) -> float:
        """Seconds until the process must end; infinite for a run by steps."""
        if self.seconds is None:
            return math.inf
        exit_s = min(max(0.5, 0.018 * self.seconds), 2.0)  # on a GPU, about 1
        return self.seconds - self.elapsed_s() - exit_s

    def add_step(self, seconds: float) -> None:
        """Counts a step by its duration."""
        if self.first_step_s is None:
            self.first_step_s = seconds
            self.startup_s += self.now() - self.started
        else:
            self._recent.append(seconds)

    def step_s(self) -> float:
        """The median time of recent steps, as some compile, and some meet a busy machine; 0 until there were two."""
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
    forward only, so by steps it is reckoned as a third of training on as many bytes. By the clock, a save after the
    first is left out until `SAVING_SHARE` of the time since the last one is as long. This process begins at `step`.
    """

    def __init__(self, clock: Clock, step: int, step_bytes: int, val_bytes: int):
        self.clock, self.step_bytes, self.val_bytes = clock, step_bytes, val_bytes
        self._tenth, self._saved_s = int(10 * clock.progress(step)), -math.inf  # the first save is measured
        # a resumed run by steps evaluates where it would have done: its last tenth began with this step
        self._affordable = self._count(max(0, -(-(self._tenth * (clock.steps or 0) - 5) // 10)))

    def _count(self, step: int) -> int:
        if self.clock.steps is None:
            return int(EVALUATION_SHARE * self.clock.elapsed_s() / max(self.clock.eval_s, 1e-9))
        return int(EVALUATION_SHARE * step * self.step_bytes / (self.val_bytes / 3))

    def after(self, step: int, eval_interval: int, save_interval: int) -> tuple[bool, bool]:
        """Whether to evaluate (which saves as well), and whether to save at least, after a step; 0: no interval."""
        before, self._tenth = self._tenth, int(10 * self.clock.progress(step))
        self._tenth = max(before, self._tenth)  # a save that was shorter than estimated takes progress back
        is_tenth, now = before < self._tenth < 10, self.clock.now()
        is_cheap = self.clock.steps is not None or self.clock.save_s <= SAVING_SHARE * (now - self._saved_s)
        saves = step % save_interval == 0 if save_interval else is_tenth and is_cheap and not eval_interval
        if eval_interval:
            return step % eval_interval == 0 and self._tenth < 10, saves
        affordable = self._affordable
        if is_tenth:
            self._affordable = self._count(step)
        evaluates = self._affordable > affordable
        self._saved_s = now if evaluates or saves else self._saved_s
        return evaluates, saves


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
    """Speed, load of the experts and memory since the last line of metrics.

    All devices together reach `peak_flops`, in FLOP/s; this process has one, `device`. Waiting is timed by `now`.
    """

    def __init__(self, peak_flops: float, device: str = "cpu", now: Callable[[], float] = time.monotonic):
        self.peak_flops, self.device, self.now = peak_flops, device, now
        self._reset()

    def _reset(self) -> None:
        self._seconds, self._n_bytes, self._flops, self._waited_s = 0.0, 0, 0.0, 0.0
        self._load = torch.zeros(())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within it as waiting for data."""
        began = self.now()
        yield
        self._waited_s += self.now() - began

    def add(self, seconds: float, n_bytes: int, flops: float) -> None:
        """Counts a step: its duration, bytes, and floating-point operations."""
        self._seconds += seconds
        self._n_bytes += n_bytes
        self._flops += flops

    def add_load(self, load: torch.Tensor) -> None:
        """Counts the load of the experts (MoE layers, experts) in a step."""
        self._load = load + self._load

    def pop(self) -> dict[str, Any]:
        """Returns the figures, and begins anew. `mfu` is None if it would be above 1: then the peak is wrong."""
        seconds, load = max(self._seconds, 1e-9), self._load
        mfu = self._flops / seconds / self.peak_flops
        figures: dict[str, Any] = {"bytes_per_s": self._n_bytes / seconds, "mfu": mfu if mfu <= 1 else None}
        figures |= {"data_wait": min(1.0, self._waited_s / seconds), "peak_memory_bytes": peak_memory(self.device)}
        self._reset()
        if load.numel():  # of each expert, relative to its layer's mean
            load = load / load.mean(dim=-1, keepdim=True)
            figures["expert_load"] = [[round(x, 3) for x in row] for row in load.tolist()]
            figures["max_load"] = load.max().item()
        return figures


def peak_memory(device: str) -> int:
    """The most bytes that tensors took on a GPU so far; of another device, those of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


def measure_peak(device: str, dtype: torch.dtype) -> float:
    """Measures the speed of large matrix products, in FLOP/s: the best of some sizes, repetitions and two dtypes.

    These are that of training and float32, which is the faster one where bfloat16 is emulated.
    """
    sizes, best = [256, 512, 1024] if torch.device(device).type == "cpu" else [1024, 4096, 8192], 0.0
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
    a, times = torch.randn(size, size, device=device).to(dtype), list[float]()
    while len(times) < 2 or sum(times[1:]) < MEASURING_S:  # the first one warms up
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        times.append(time.perf_counter() - began)
    return min(times)


@contextmanager
def reading(ctx: ParallelContext) -> Iterator[None]:
    """Encloses reading of the corpus: an error of one process is raised as a DataError in all of them."""
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
    left_s: Callable[[], float] = lambda: math.inf,
) -> tuple[float, int | None] | None:
    """Measures the loss over a split, in sequences of `seq_len` bytes (default: the context) that do not overlap.

    Args:
        max_sequences: If the split has more sequences than these, that many are taken, evenly spread over it.
        stop: Asked before each batch; True ends the evaluation.
        left_s: The time that is left, the same in all processes. If it is shorter than the last batch took, the
            evaluation ends with what it has, which is spread over the split as well.

    Returns:
        Nats per byte, where every byte but the first is predicted once; and the number of sequences, None for all of
        the split. None after `stop`.
    """
    batches = EvaluationBatches(len(data), seq_len or model.args.max_seq_len, batch_size, max_sequences)
    n_batches, sums, left = len(batches), torch.zeros(3, dtype=torch.float64), left_s()
    model.eval()
    for i, is_mine in _deal(n_batches, ctx):
        if stop():
            return None
        before, left = left, left_s()
        if i >= ctx.dp_size and left < before - left:
            break
        starts, length = batches[_spread(i, n_batches)]
        with reading(ctx):
            tokens, targets = read_batch(data, starts, length, ctx.device)
        loss = model.next_byte_loss(tokens, targets).item()
        if is_mine:
            n_targets = len(starts) * length
            sums += torch.tensor([loss * n_targets, n_targets, len(starts)], dtype=torch.float64)
    model.train()
    total, n_targets, n_sequences = ctx.all_reduce_dp(sums).tolist()
    return total / n_targets, None if n_targets == len(data) - 1 else int(n_sequences)


def _spread(i: int, n: int) -> int:
    """The i-th of the numbers below n in an order whose beginnings are evenly spread: multiples of the golden ratio."""
    step = round(0.618 * n)
    while math.gcd(step, n) > 1:
        step += 1
    return i * step % n


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
    """Measures the loss over all of a file of two bytes or more, in sequences of the model's context.

    Each byte is predicted once, but for the first, before which there is nothing. The batches are the same however many
    processes there are.

    Args:
        batch_size: Sequences that a process computes at a time.
        stride: Distance of the sequences; by default the context, so that they do not overlap.

    Returns:
        Figures ready for JSON: "val_loss" in nats per byte, "val_bpb" in bits; "standard_error" of val_loss over the
        sequences, None for a single one; how many "bytes" were predicted in how many "sequences", with "context" and
        "stride", and in which "dtype"; and the "worst" sequences: "offset" of the first byte that each predicts, their
        number, their loss.

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
    dtype = str(model.compute_dtype).removeprefix("torch.")
    figures = _loss_figures(ctx.all_reduce_dp(sums)) | {"context": seq_len, "stride": batches.stride, "dtype": dtype}
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
        f"{figures['sequences']:,} sequences of {figures['context']:,} bytes{apart}, computed in {figures['dtype']}",
        "the worst sequences: offset of the first byte predicted, bytes predicted, nats/byte",
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

    Where stderr is no terminal, lines with the same figures take its place: after 10 seconds, then after twice as many
    each time, up to 5 minutes. Nothing is shown unless `is_shown`. The run has `clock`, and `progress` of it is done.
    """

    def __init__(self, is_shown: bool, clock: Clock, progress: float):
        form = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        disable = None if is_shown else True  # None: unless stderr is a terminal
        self._bar = tqdm(total=100, disable=disable, bar_format=form, initial=100 * progress)
        self._clock, self._is_log, self._figures = clock, is_shown and self._bar.disable, ""
        self._interval_s, self._last_s, self._last_progress = FIRST_LOG_S, clock.now(), progress  # of the last line
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
        since_s = self._clock.now() - self._last_s
        if not self._is_log or since_s < self._interval_s:
            return
        left_s = self._clock.left_s()
        if math.isinf(left_s) and progress > self._last_progress:  # by steps: at the speed since the last line
            left_s = since_s * (1 - progress) / (progress - self._last_progress)
        left = "" if math.isinf(left_s) else f"; {tqdm.format_interval(max(0.0, left_s))} left"
        command.note(f"step {step} ({progress:.1%}){self._figures}{left}")
        self._last_s, self._last_progress = self._last_s + since_s, progress
        self._interval_s = min(2 * self._interval_s, LONGEST_LOG_S)

    def show_figures(self, figures: dict[str, Any]) -> None:
        """Sets the figures of the last line of metrics."""
        mfu = "" if figures["mfu"] is None else f", MFU {figures['mfu']:.0%}"
        text = f"loss {figures['train_loss']:.3f}, {figures['bytes_per_s']:,.0f} bytes/s{mfu}, "
        text += f"{figures['peak_memory_bytes'] / 1e9:.3g} GB, data wait {figures['data_wait']:.0%}"
        self._figures = f": {text}"
        self._bar.set_postfix_str(text, refresh=False)

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._ticker.is_alive():
            self._ticker.join()
        self._bar.close()


class Profile(AbstractContextManager):
    """Traces `n_steps` steps of training, after some that warm up, and prints the costliest operations.

    The trace, in Chrome's format, goes into the folder of `run`. It includes an evaluation between these steps. If the
    run ends before, it is of fewer steps; after an error there is none. 0 steps: nothing happens.
    """

    def __init__(self, n_steps: int, run: Run | None, device: str):
        self.n_steps, self.run, self.is_cuda = n_steps, run, torch.device(device).type == "cuda"
        self._n_begun, self._first = 0, 0
        self._profiler: Any = None

    def begin_step(self, step: int) -> None:
        """Begins a step; `step` is its number."""
        self._n_begun += 1
        if self.n_steps and self._n_begun == WARM_UP_STEPS + 1:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's library reports each start on stderr
            self._first, activities = step, [ProfilerActivity.CPU]
            if self.is_cuda:
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.synchronize()  # kernels of earlier steps do not count
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def end_step(self) -> None:
        """Ends a step; after the last to be traced, writes the trace and prints the table."""
        if self._profiler is not None and self._n_begun == WARM_UP_STEPS + self.n_steps:
            self._finish()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._profiler is not None and kind is not None:
            self._profiler.stop()
        elif self._profiler is not None:
            self._finish()
        elif kind is None and self.n_steps and self._n_begun <= WARM_UP_STEPS:
            text = f"--profile needs more than {WARM_UP_STEPS} steps, which warm up; this run took {self._n_begun}"
            command.warn("train.py", text)

    def _finish(self) -> None:
        profiler, self._profiler, n_traced = self._profiler, None, self._n_begun - WARM_UP_STEPS
        profiler.stop()
        self.run.folder_fd()  # an error if the folder was moved
        path = self.run.path / f"profile-{self._first:08d}.json.gz"
        trace, temporary = command.private_temporary_folder() / path.name, temporary_path(path)
        profiler.export_chrome_trace(str(trace))
        with reporting(path):
            temporary.unlink(missing_ok=True)
            try:
                with temporary.open("xb") as file:  # which follows no link
                    file.write(trace.read_bytes())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        trace.unlink()
        steps = f"{n_traced} step{'s' if n_traced > 1 else ''} from step {self._first}"
        command.say(f"profile of {steps}, in {path}\n{costliest(profiler.key_averages(), n_traced, self.is_cuda)}")


def costliest(events: Any, n_steps: int, is_cuda: bool) -> str:
    """A table of the operations of a profile (its `key_averages`) that took the most time of their own."""
    wanted = DeviceType.CUDA if is_cuda else DeviceType.CPU
    events = [event for event in events if event.device_type == wanted and not event.is_user_annotation]
    times = [(e.self_device_time_total if is_cuda else e.self_cpu_time_total, e.count, e.key) for e in events]
    total = sum(time for time, *_ in times) or 1.0  # microseconds
    lines = [f"{'ms/step':>9} {'share':>6} {'calls/step':>10}  {'CUDA kernel' if is_cuda else 'operation on the CPU'}"]
    for us, count, name in sorted(times, reverse=True)[:N_COSTLIEST]:
        calls = f"{count / n_steps:.4g}"
        lines.append(f"{us / 1000 / n_steps:9.3f} {us / total:6.1%} {calls:>10}  {command.shorten(name, 60)}")
    return "\n".join([*lines, f"{total / 1000 / n_steps:9.3f} {1:6.0%} {'':>10}  all"])


# --- Decoding ---------------------------------------------------------------------------------------------------------

MBU_STEPS = 100  # of decoding, for which it is worth 0.1 s to measure the memory's bandwidth


class MemoryReads:
    """Counts what decoding has to read from memory: the weights of each step, and the KV cache.

    Of the routed experts, a call for n positions reads those that it chooses; counted are as many as n positions reach
    that are routed evenly and independently. Of the embedding, it reads a row for each, which is not counted.

    Attributes:
        sizes: Bytes of this process's weights, of the main layers and then of each MTP module, as pairs: what every
            call reads, the head included, and all routed experts.
        steps: The counted steps.
        seconds: How long they took.
        bytes: What they had to read.
    """

    def __init__(self, model: Transformer):
        self.args, self.steps, self.seconds, self.bytes = model.args, 0, 0.0, 0.0
        self.sizes: list[tuple[float, float]] = []
        copies = getattr(model.decoder, "kept", []) if fp8_ops.gemm_impl == "bf16" else []  # perhaps of another width
        scale = sum(tensor.nbytes for tensor in copies) / _stored_bytes(model) if copies else 1.0
        for modules in ([*model.layers, model.norm, model.head], *([module, model.head] for module in model.mtp)):
            stacks = [m for module in modules for m in module.modules() if isinstance(m, Experts)]
            total, routed = sum(map(_stored_bytes, modules)), sum(map(_stored_bytes, stacks))
            self.sizes.append((scale * (total - routed), scale * routed))

    def count(self, cache: KVCache, n_drafted: int, seconds: float, n_steps: int = 1) -> None:
        """Counts steps that took so long: each `n_drafted` calls of modules, and one of the model for all drafts."""
        args, n_rows = self.args, len(cache.lengths)
        calls = [(0, n_rows * (1 + n_drafted)), *((min(i + 1, args.n_mtp_layers), n_rows) for i in range(n_drafted))]
        for stack, n_positions in calls:
            always, routed = self.sizes[stack]
            unused = (1 - args.n_activated_experts / max(args.n_routed_experts, 1)) ** n_positions
            layers = cache.layers[: args.n_layers] if stack == 0 else [cache.layers[args.n_layers + stack - 1]]
            cached = sum(tensor.nbytes for layer in layers for tensor in layer)
            read = always + routed * (1 - unused) + cached * sum(cache.lengths) / (n_rows * cache.capacity)
            self.bytes += n_steps * read
        self.steps += n_steps
        self.seconds += seconds

    def mbu(self, device: torch.device) -> str:
        """Describes the achieved share of the memory's bandwidth; empty after too few steps to measure that for."""
        if self.steps < MBU_STEPS or not (bandwidth := read_bandwidth(device)):
            return ""
        return f"MBU {self.bytes / max(self.seconds, 1e-9) / bandwidth:.0%} of {bandwidth / 1e9:,.1f} GB/s"


@dataclass
class Tally:
    """Counts bytes drafted for rows that could take them, those accepted, bytes written, and the time it took.

    `reads` counts what the steps that did nothing but decode had to read from memory.
    """

    drafted: int = 0
    accepted: int = 0
    written: int = 0
    seconds: float = 0.0
    reads: MemoryReads | None = None

    def measure(self, pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        """Passes on what `generate` yields, and counts the bytes and the time."""
        start = time.perf_counter()
        try:
            for row, piece in pieces:
                self.written += len(piece)
                yield row, piece
        finally:
            self.seconds += time.perf_counter() - start

    def __str__(self) -> str:
        text = f"{self.written:,} bytes in {self.seconds:.1f} s: {self.written / max(self.seconds, 1e-9):,.1f} bytes/s"
        if not self.drafted:
            return text
        return f"{text}, {self.accepted / self.drafted:.0%} of {self.drafted:,} drafts accepted"


def _stored_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's weights; of those that FP8 products read quantised, of these copies."""
    total = sum(tensor.nbytes for tensor in module.state_dict().values())
    for layer in module.modules():
        if fp8_ops.gemm_impl == "fp8" and isinstance(layer, Linear) and layer.weight_q is not None:
            quantized = layer.quantized()
            total += quantized.q.nbytes + quantized.s.nbytes - layer.weight.nbytes
    return total


def read_bandwidth(device: torch.device) -> float | None:
    """Measures how many bytes a second this device reads from memory, in about 0.1 s; None where there is no room."""
    # more than caches hold; on a GPU several passes at a time, to which waiting adds little
    n_bytes, n_passes = (1 << 30, 4) if device.type == "cuda" else (1 << 27, 1)
    try:
        numbers = torch.ones(n_bytes // 4, device=device)
    except (MemoryError, RuntimeError):
        return None
    seconds = []
    for _ in range(8):  # other programs may disturb some
        start = time.perf_counter()
        torch.stack([numbers.sum() for _ in range(n_passes)]).tolist()  # waits for all
        seconds.append(time.perf_counter() - start)
    return n_bytes * n_passes / min(seconds)
