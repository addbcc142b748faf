"""Reports of a training run: the lines of metrics.jsonl, speed, load of the experts, a sample, the progress bar."""

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


class Metrics:
    """The lines of `metrics.jsonl`: one JSON object for each log and evaluation.

    The file appears with its first line, so that a run that fails earlier leaves nothing behind.

    Args:
        run: The run, or None to keep nothing.
        step: Step to go on from: later lines, of steps that will be repeated, are dropped.
        evaluated: Whether that step was evaluated; if not, its evaluation will be repeated as well.

    Raises:
        CheckpointError: The file that is there cannot be read or written.
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
        """Appends a line; floats are kept to 6 significant digits.

        Raises:
            CheckpointError: It cannot be written, or the folder is not where it was.
        """
        if self.run is None:
            return
        path, folder_fd = self.run.path / METRICS_FILE, self.run.folder_fd()
        if self._file is None:
            self._file = open_append(path, folder_fd)
        line = json.dumps({key: _rounded(value) for key, value in values.items()}).encode() + b"\n"
        with reporting(path):
            while line:
                line = line[self._file.write(line) :]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return [_rounded(v) for v in value] if isinstance(value, list) else value


# --- Time ------------------------------------------------------------------------------------------------------------


class Clock:
    """How much of a run is done: by steps, or by the time since the process began.

    By time, what the last evaluation and save will take is held back, so that the process is over when the time is. A
    resumed run has the time left that it had when it was saved.

    Args:
        steps: Number of steps, or None.
        minutes: Time for the whole process, or None.
        now: Returns the time in seconds.
        started: When the process began, by `now`.

    Attributes:
        earlier_s: Time of the runs before this one.
        startup_s: Time before training and of the first step of each process, which the schedule leaves out.
        eval_s: Time that the last evaluation and its sample will take, about.
        save_s: Time that the last save will take, about.
    """

    def __init__(
        self,
        steps: int | None,
        minutes: float | None,
        now: Callable[[], float] = time.monotonic,
        started: float | None = None,
    ):
        self.steps, self.seconds = steps, None if minutes is None else 60 * minutes
        self.now, self.started = now, command.STARTED if started is None else started
        self.earlier_s, self.startup_s, self.save_s = 0.0, 0.0, 0.0
        self.eval_s = EVALUATION_SHARE * (self.seconds or 0.0)  # until it is measured
        self.first_step_s: float | None = None  # of this process
        self._recent: deque[float] = deque(maxlen=9)  # durations of steps, without the first

    def elapsed_s(self) -> float:
        """Seconds of training so far, with those of the runs that this one resumes."""
        return self.earlier_s + self.now() - self.started

    def add_step(self, seconds: float) -> None:
        """Notes how long a step took."""
        if self.first_step_s is None:
            self.first_step_s = seconds
            self.startup_s += self.now() - self.started
        else:
            self._recent.append(seconds)

    def step_s(self) -> float:
        """What a step takes, about: the median of recent ones, as some compile, and some meet a busy machine.

        Until there were two steps it is 0: the first compiles and warms up.
        """
        ordered = sorted(self._recent)
        return ordered[len(ordered) // 2 if len(ordered) > 2 else 0] if ordered else 0.0

    def progress(self, step: int) -> float:
        """How much is done in the middle of `step`, 0 to 1; 1 means that it is not to be taken."""
        if self.steps is not None:
            return (step + 0.5) / self.steps if step < self.steps else 1.0
        leaving_s = min(max(0.5, 0.01 * self.seconds), 2.0)
        left = self.seconds - self.elapsed_s() - 1.05 * (self.eval_s + self.save_s) - leaving_s
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
    forward only, so by steps it is reckoned as a third of training on as many bytes.

    Args:
        clock: The clock of the run.
        step: The step at which this process begins.
        step_bytes: Bytes of a step.
        val_bytes: Bytes of an evaluation.
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


# --- Figures ---------------------------------------------------------------------------------------------------------


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
    """Speed and load of the experts since the last line of metrics.

    Args:
        peak_flops: What the devices reach in a large matrix product, in FLOP/s.
    """

    def __init__(self, peak_flops: float):
        self.peak_flops = peak_flops
        self._reset()

    def _reset(self) -> None:
        self._seconds, self._bytes, self._flops, self._load = 1e-9, 0, 0.0, 0

    def add(self, seconds: float, n_bytes: int, flops: float, load: torch.Tensor) -> None:
        """Counts a step: its duration, bytes, floating-point operations, and load (MoE layers, experts)."""
        self._seconds += seconds
        self._bytes += n_bytes
        self._flops += flops
        self._load = self._load + load

    def pop(self) -> dict[str, Any]:
        """Returns the figures, and begins anew. `mfu` is None if it would be above 1: then the peak is wrong."""
        mfu = self._flops / self._seconds / self.peak_flops
        figures = {"bytes_per_s": self._bytes / self._seconds, "mfu": mfu if mfu <= 1 else None}
        figures |= load_summary(self._load)
        self._reset()
        return figures


def load_summary(load: torch.Tensor) -> dict[str, Any]:
    """Each expert's load relative to its layer's mean, and the largest of all."""
    if not load.numel():
        return {}
    relative = load / load.mean(dim=-1, keepdim=True)
    return {"expert_load": [[round(x, 3) for x in row] for row in relative.tolist()], "max_load": relative.max().item()}


def measure_peak(device: str, dtype: torch.dtype) -> float:
    """Measures how many floating-point operations a second a large matrix product reaches, in FLOP/s.

    The best of some sizes and repetitions, in the dtype of training and in float32: where the hardware has no bfloat16,
    its products are emulated, and those in float32 are the faster ones.
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


# --- Evaluation ------------------------------------------------------------------------------------------------------


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
    device: str,
    max_sequences: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    ctx: ParallelContext | None = None,
    seq_len: int | None = None,
) -> float | None:
    """Measures the loss over a whole split, in sequences that do not overlap.

    Args:
        model: The model.
        data: The split, uint8.
        batch_size: Sequences at a time.
        device: Where the model is.
        max_sequences: If the split has more sequences than these, that many are taken, evenly spread over it.
        stop: Asked before each batch; True ends the evaluation.
        ctx: The processes that share the batches.
        seq_len: Bytes of a sequence; by default the model's context.

    Returns:
        Nats per byte; every byte but the first is predicted once. None after `stop`.
    """
    ctx = ctx or ParallelContext(device)
    batches = EvaluationBatches(len(data), seq_len or model.args.max_seq_len, batch_size, max_sequences)
    total = torch.zeros((), dtype=torch.float64)
    model.eval()
    for i in range(0, len(batches), ctx.dp_size):
        if stop():
            return None
        # all ranks must go through the model equally often: one with no batch left repeats the last, for nothing
        starts, length = batches[min(i + ctx.dp_rank, len(batches) - 1)]
        with reading(ctx):
            tokens, targets = read_batch(data, starts, length, device)
        loss = model.next_byte_loss(tokens, targets).item()
        if i + ctx.dp_rank < len(batches):
            total += loss * len(starts) * length
    model.train()
    return ctx.all_reduce_dp(total).item() / batches.n_targets


@torch.inference_mode()
def sample_text(model: Transformer, n_bytes: int, device: str) -> str:
    """Samples from the start of a document: at most `n_bytes` and the context, at temperature 0.8, seed 0."""
    generator, decoder = torch.Generator().manual_seed(0), StreamDecoder()
    model.eval()
    cache = model.new_cache(1, model.args.max_seq_len)
    text, token = "", EOS_ID
    for _ in range(min(n_bytes, model.args.max_seq_len)):
        logits = model(torch.tensor([[token]], device=device), cache)[0, -1]
        token = torch.multinomial((logits.cpu() / 0.8).softmax(dim=-1), 1, generator=generator).item()
        if token == EOS_ID:
            break
        text += decoder.feed([token])
    model.train()
    return text + decoder.flush()


# --- Progress --------------------------------------------------------------------------------------------------------


class ProgressBar:
    """A bar on the terminal: the step, percent of the run, time, loss and speed. It moves twice a second.

    Args:
        is_shown: Whether this process shows it; nothing is shown where stderr is no terminal.
        progress: How much of the run is done, 0 to 1.
    """

    def __init__(self, is_shown: bool, progress: float):
        self._bar = tqdm(
            total=100,
            disable=None if is_shown else True,  # None: unless stderr is a terminal
            bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
            initial=100 * progress,
        )
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

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._ticker.is_alive():
            self._ticker.join()
        self._bar.close()
