"""Trains a model on bytes: data, optimizers, schedule, the loop, evaluation, resuming.

    python train.py --config configs/nano.json --data my.txt --save-path out --minutes 5

Three rules make a run repeatable and safe to stop at any moment:

- With --steps, what a step does depends on its number and the seed alone. Which windows it sees follows from a position
  (`SequenceSampler`), not drawn from a generator that somebody might have advanced.
- A checkpoint holds all that the next step reads: weights, optimizer, routing biases, position. A run that was killed
  and resumed repeats the steps since, and on a CPU gives the same losses bit for bit.
- A step whose loss or gradient is not finite is not taken.

Matrices are trained by Muon (or AdamW), all else by AdamW. Weights are float32; the model computes in bfloat16 where
the hardware does.
"""

import time

_STARTED = time.monotonic()  # before torch is imported: --minutes counts that as well

import argparse
import io
import json
import math
import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import command
import fp8_ops
import parallel
import plan
from byte_tokenizer import EOS_ID, VOCAB_SIZE, StreamDecoder, one_line, visible
from checkpoint import has_run, load_run, read_config, save_run
from data.prepare import DataError, open_bytes, resolve
from model import ConfigError, Losses, ModelArgs, Transformer
from parallel import (
    TIMEOUT,
    CollectiveError,
    DeviceError,
    ParallelContext,
    ParallelError,
    end,
    is_matrix,
    is_rank_zero,
    keep_freed_memory,
    pick_device,
    pick_dtype,
    process_group,
    read_launch,
    require_compiler,
)
from safetensors_io import CheckpointError

METRICS_FILE = "metrics.jsonl"
MISTAKES = (CheckpointError, CollectiveError, ConfigError, DataError, DeviceError, ParallelError)
VAL_FRACTION = 0.1
SHORT_UNTIL = 0.5  # which part of a run --short-seq-len is for
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Muon's Newton-Schulz iteration, and how many of them
NS_STEPS = 5


class SequenceSampler:
    """Windows of a corpus in a random order that is a function of position, so that there is no state to lose.

    Each epoch cuts the corpus into windows of `seq_len` targets, at an offset of its own, and goes through all of them
    once in an order of its own. Positions count windows from the start of training. The order is a permutation of
    0..n-1 that needs no table: a Feistel network on the smallest even number of bits, applied again while its result
    is not below n ("cycle walking").

    Args:
        n_bytes: Length of the corpus.
        seq_len: Targets per window; a window is one byte longer.
        seed: Seed of the order.
    """

    _ROUNDS = 4

    def __init__(self, n_bytes: int, seq_len: int, seed: int):
        self.last_start = n_bytes - 1 - seq_len
        self.seq_len = seq_len
        self.seed = seed
        # one more than fit side by side: the first and the last of a shifted cut overlap their neighbours
        self.n_windows = -(-(n_bytes - 1) // seq_len) + 1
        self._half_bits = np.uint64(max(1, math.ceil(math.log2(self.n_windows) / 2)))

    def starts(self, position: int, count: int) -> np.ndarray:
        """Returns where in the corpus the windows at `position` to `position + count - 1` begin, int64 (count,)."""
        positions = np.arange(position, position + count)
        epochs, index = positions // self.n_windows, positions % self.n_windows
        starts = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = np.random.default_rng([self.seed, int(epoch)])
            offset = int(key.integers(self.seq_len))
            keys = key.integers(1 << 63, size=self._ROUNDS, dtype=np.uint64)
            window = self._permute(index[chosen].astype(np.uint64), keys).astype(np.int64)
            starts[chosen] = np.clip((window - 1) * self.seq_len + offset, 0, self.last_start)
        return starts

    def _permute(self, x: np.ndarray, keys: np.ndarray) -> np.ndarray:
        x = self._feistel(x, keys)
        while (outside := x >= self.n_windows).any():
            x[outside] = self._feistel(x[outside], keys)
        return x

    def _feistel(self, x: np.ndarray, keys: np.ndarray) -> np.ndarray:
        bits, mask = self._half_bits, (np.uint64(1) << self._half_bits) - np.uint64(1)
        left, right = x >> bits, x & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # any odd number with well-spread bits
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return left << bits | right


def windows(data: np.ndarray, starts: np.ndarray, seq_len: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads windows of a corpus: tokens and targets, int64 (len(starts), seq_len) each, one byte apart."""
    batch = torch.from_numpy(data[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)).to(device)
    return batch[:, :-1], batch[:, 1:]


def split(data: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a corpus into training and validation split, its last tenth.

    Raises:
        DataError: One of them is too short for a single window.
    """
    cut = int((1 - VAL_FRACTION) * len(data))
    train, val = data[:cut], data[cut:]
    if len(train) < seq_len + 1 or len(val) < 2:
        raise DataError(
            f"{len(data)} bytes are too few: the first nine tenths must hold a window of {seq_len + 1}; "
            "use more data, or a config with a smaller max_seq_len"
        )
    return train, val


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum whose update is replaced by the nearest orthogonal matrix.

    Equals `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, but takes stacks of matrices (..., rows, columns)
    too and orthogonalises all matrices of a shape in one batch: a model has few shapes and many matrices.

    Args:
        params: Parameters of two dimensions or more.
        lr: Learning rate; the update has the size of AdamW's, so that AdamW's rates fit.
        momentum: Decay of the running mean of gradients; Nesterov's look-ahead is on.
        weight_decay: Decoupled weight decay.
        dtype: What to orthogonalise in; bfloat16 is precise enough.
        ctx: The processes over which the matrices are spread; each is orthogonalised as a whole.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        ctx: ParallelContext | None = None,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        self.ctx = ctx

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates all parameters that have a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, torch.Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    update = self._momentum(p, group)
                    by_shape.setdefault(update.shape[1:], []).append((p, update))
            for shape, pairs in by_shape.items():
                updates = orthogonalize(torch.cat([update for _, update in pairs]))
                lr = group["lr"] * 0.2 * math.sqrt(max(shape))
                for (p, _), update in zip(pairs, updates.split([len(u) for _, u in pairs]), strict=True):
                    here = p if self.ctx is None else self.ctx.local_shard(p)[0]
                    here.mul_(1 - group["lr"] * group["weight_decay"])
                    update = update if self.ctx is None else parallel.local_part(self.ctx, p, update)
                    here.add_(update.view_as(here), alpha=-lr)

    def _momentum(self, p: nn.Parameter, group: dict[str, Any]) -> torch.Tensor:
        """Advances the running mean; returns the Nesterov update of whole matrices, (matrices, rows, columns)."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(buffer, group["momentum"]).to(self.dtype)
        return update.view(-1, *p.shape[-2:]) if self.ctx is None else parallel.full_tensor(self.ctx, p, update)


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Pushes the singular values of matrices towards 1 by Newton-Schulz iterations.

    Args:
        x: Matrices (n, rows, columns).

    Returns:
        Matrices of the same shape and dtype.
    """
    a, b, c = NS_COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def is_hidden_matrix(name: str, p: nn.Parameter) -> bool:
    """Whether a parameter is one of those that `--optimizer` is for."""
    return is_matrix(name, p.shape) and name not in ("embed.weight", "head.weight")


def make_optimizers(
    model: Transformer, args: argparse.Namespace, dtype: torch.dtype, ctx: ParallelContext | None = None
) -> list[torch.optim.Optimizer]:
    """Divides the parameters: hidden matrices by `--optimizer`; embedding, head, router and norms by AdamW.

    Only hidden matrices decay: a norm's scale or an embedding that rarely gets a gradient should not shrink.
    """
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if is_hidden_matrix(name, p) else others).append(p)
    groups = [{"params": others, "lr": args.lr, "weight_decay": 0.0}]
    optimizers = []
    if args.optimizer == "muon":
        optimizers.append(Muon(matrices, args.matrix_lr, args.momentum, args.weight_decay, dtype, ctx))
    else:
        groups.append({"params": matrices, "lr": args.matrix_lr, "weight_decay": args.weight_decay})
    optimizers.append(torch.optim.AdamW(groups, betas=(args.beta1, args.beta2), eps=1e-10, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def optimizer_tensors(
    model: Transformer, optimizers: list[torch.optim.Optimizer]
) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the optimizers' state of each parameter, by the parameter's name."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: dict(state) for optimizer in optimizers for p, state in optimizer.state.items()}


@torch.no_grad()
def load_optimizer_tensors(
    model: Transformer,
    optimizers: list[torch.optim.Optimizer],
    read: Callable[[str, nn.Parameter], dict[str, torch.Tensor]],
    ctx: ParallelContext,
) -> None:
    """Puts back what `optimizer_tensors` returned, which `read` knows of each parameter; see `checkpoint.load_run`."""
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        for key, tensor in read(name, p).items():
            owner[p].state[p][key] = state = torch.zeros_like(p) if tensor.ndim else tensor.to(p.device)
            ctx.local_shard(state)[0].copy_(tensor)


def schedule(progress: float, kind: str, warmup: float, decay: float) -> float:
    """The learning rate as a fraction of its peak.

    Args:
        progress: How much of training is done, 0 to 1.
        kind: "wsd": warm up, stay, then go down linearly to 0. "cosine": warm up, then go down along a cosine to 0.
        warmup: Fraction of training spent warming up, linearly.
        decay: Fraction of training spent going down ("wsd").
    """
    if progress < warmup:
        return progress / warmup
    if kind == "wsd":
        return min(1.0, (1 - progress) / decay) if decay > 0 else 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / max(1 - warmup, 1e-9))))


class Clock:
    """How much of a run is done: by steps, or by the time since the process began.

    By time, what the end will take (the last evaluation, the last save) is held back, so that the process is over when
    the time is. A resumed run has the time left that it had when it was saved.

    Args:
        steps: Number of steps, or None.
        minutes: Time for the whole process, or None.
    """

    def __init__(self, steps: int | None, minutes: float | None):
        self.steps = steps
        self.seconds = None if minutes is None else 60 * minutes
        self.earlier_s = 0.0  # what runs before this one took
        self.startup_s = 0.0  # what it took to the first step of all, which the schedule leaves out
        self.step_s = 0.0  # what a step takes, about
        self.closing_s = 0.0  # what the last evaluation and save will take, about

    def elapsed_s(self) -> float:
        """Seconds of training so far, with those of the runs that this one resumes."""
        return self.earlier_s + time.monotonic() - _STARTED

    def progress(self, step: int) -> float:
        """How much is done in the middle of `step`, 0 to 1; 1 means that it is not to be taken."""
        if self.steps is not None:
            return (step + 0.5) / self.steps if step < self.steps else 1.0
        left = self.seconds - self.closing_s - 2.0 - self.elapsed_s()  # some time to leave the process in
        if left < 1.5 * self.step_s:
            return 1.0
        trained = self.elapsed_s() - self.startup_s + self.step_s / 2
        return trained / (trained + left)


@torch.inference_mode()
def evaluate(
    model: Transformer,
    data: np.ndarray,
    batch_size: int,
    device: str,
    max_windows: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    ctx: ParallelContext | None = None,
    seq_len: int | None = None,
) -> float | None:
    """Measures the loss over a whole split, in windows that do not overlap.

    Args:
        model: The model.
        data: The split, uint8.
        batch_size: Windows at a time.
        device: Where the model is.
        max_windows: If the split has more windows than these, that many are taken, evenly spread over it.
        stop: Asked before each batch; True ends the evaluation.
        ctx: The processes that share the batches.
        seq_len: Bytes of a window; by default the model's context.

    Returns:
        Nats per byte; every byte but the first is predicted once. None after `stop`.
    """
    seq_len = seq_len or model.args.max_seq_len
    rest = (len(data) - 1) % seq_len
    starts = np.arange((len(data) - 1) // seq_len) * seq_len
    if max_windows is not None and len(starts) > max_windows:
        starts, rest = starts[np.linspace(0, len(starts) - 1, max_windows).astype(np.int64)], 0
    batches = [(starts[i : i + batch_size], seq_len) for i in range(0, len(starts), batch_size)]
    batches += [(np.array([len(data) - 1 - rest]), rest)] if rest else []
    n_targets = sum(len(firsts) * length for firsts, length in batches)
    rank, world = (ctx.dp_rank, ctx.dp_size) if ctx else (0, 1)
    total = torch.zeros((), dtype=torch.float64)
    model.eval()
    for i in range(0, len(batches), world):
        if stop():
            return None
        # all must go through the model equally often: who has nothing left repeats a batch, for nothing
        firsts, length = batches[min(i + rank, len(batches) - 1)]
        loss = model.next_byte_loss(*windows(data, firsts, length, device)).item()
        total += loss * len(firsts) * length if i + rank < len(batches) else 0
    model.train()
    return (ctx.all_reduce_dp(total) if ctx else total).item() / n_targets


@torch.inference_mode()
def sample_text(model: Transformer, n_bytes: int, device: str) -> str:
    """Lets the model write from the start of a document: at most `n_bytes`, at temperature 0.8, seed 0."""
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


class Metrics:
    """The lines of `metrics.jsonl`: one JSON object for each log and evaluation.

    Args:
        path: The file, or None to keep nothing.
        step: Step to go on from: later lines, of steps that will be repeated, are dropped.
        evaluated: Whether that step was evaluated; if not, its evaluation will be repeated as well.
    """

    def __init__(self, path: Path | None, step: int, evaluated: bool = True):
        self.path = path
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            with suppress(ValueError, KeyError, TypeError, RecursionError):  # a crash may have cut a line
                values = json.loads(line)
                if values["step"] < step or values["step"] == step and (evaluated or "val_loss" not in values):
                    kept.append(line + "\n")
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)

    def write(self, **values: Any) -> None:
        """Appends a line; floats are kept to 6 significant digits."""
        if self.path is not None:
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps({k: _rounded(v) for k, v in values.items()}) + "\n")
            except OSError as error:
                raise CheckpointError(f"cannot write {self.path}: {error.strerror}") from None


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def is_state(key: str, value: Any) -> bool:
    """Whether a value can be what `Trainer.state` has under a key."""
    if key == "settings":
        return isinstance(value, dict)
    if value is None:
        return key in ("best_val", "val_step", "val_loss", "eval_windows")
    whole = key in ("step", "windows", "val_step", "eval_windows")
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    return is_number and (key == "eval_windows") <= value < 2**53


class NotFinite(RuntimeError):
    """The loss or the gradient of a step is NaN or infinite."""


@dataclass
class Trainer:
    """A run: the model, what trains it, and where it stands."""

    args: argparse.Namespace
    model: Transformer
    optimizers: list[torch.optim.Optimizer]
    train_data: np.ndarray
    val_data: np.ndarray
    sampler: SequenceSampler
    short_sampler: SequenceSampler | None  # of the first half of the run
    clock: Clock
    ctx: ParallelContext
    whole: Transformer  # the model, or where processes share it a model on the meta device
    peak_flops: float  # of this device's matrix products, each second
    loss: Callable[[torch.Tensor, torch.Tensor], Losses]
    step: int = 0
    best_val: float = math.inf
    val_step: int | None = None  # the step last evaluated, and its loss
    val_loss: float | None = None
    eval_s: float | None = None  # what the last evaluation took
    eval_windows: int | None = None  # how many windows an evaluation takes; None: all
    stop_signal: int | None = None
    window: int = 0  # bytes of each window of the last step
    flops: float = 0.0  # of all steps of this process

    def __post_init__(self) -> None:
        self.settings = resume_settings(self.args, self.train_data)
        self.quantize_weights()
        self.window = self.sampler.seq_len
        self.step_bytes = self.args.batch_size * self.args.accumulation * self.model.args.max_seq_len

    def state(self) -> dict[str, Any]:
        """What besides tensors a resumed run needs, ready for JSON."""
        return {
            "step": self.step,
            "windows": self.step * self.args.batch_size * self.args.accumulation,
            "elapsed_s": self.clock.elapsed_s(),
            "startup_s": self.clock.startup_s,
            "best_val": None if math.isinf(self.best_val) else self.best_val,
            "val_step": self.val_step,
            "val_loss": self.val_loss,
            "eval_windows": self.eval_windows,
            "settings": self.settings,
        }

    def resume(self, run: Path) -> None:
        """Goes on from the last checkpoint of `run`."""
        read, state = load_run(run, self.model, self.ctx)
        if missing := sorted(self.state().keys() - state.keys()):
            raise CheckpointError(f"{run}: the state of its last checkpoint lacks {missing[0]!r}; start a new run")
        for key in self.state():
            if not is_state(key, state[key]):
                raise CheckpointError(f"{run}: the state of its last checkpoint is damaged at {key!r}; start a new run")
        for key, value in state["settings"].items():
            if self.settings.get(key) != value:
                raise CheckpointError(
                    f"{run} was trained with {key} = {value}, now it is {self.settings.get(key)}; "
                    "resume with what it began with, or choose another --save-path"
                )
        load_optimizer_tensors(self.model, self.optimizers, read, self.ctx)
        self.quantize_weights()
        self.step, self.val_step, self.val_loss = state["step"], state["val_step"], state["val_loss"]
        self.eval_windows = state["eval_windows"]
        self.clock.earlier_s, self.clock.startup_s = state["elapsed_s"], state["startup_s"]
        self.best_val = math.inf if state["best_val"] is None else state["best_val"]

    def quantize_weights(self) -> None:
        """Brings the FP8 copies of the weights up to date: once a step, however many batches it has.

        Shards have none: there a layer's weights are quantised when they have been gathered.
        """
        if fp8_ops.gemm_impl == "fp8" and not self.ctx.fsdp:
            self.model.quantize_weights()

    def train_step(self, progress: float) -> dict[str, Any]:
        """Takes one step; returns its metrics as Python numbers.

        Raises:
            NotFinite: Loss or gradient is; nothing has been changed then.
        """
        args, model, ctx = self.args, self.model, self.ctx
        lr_factor = schedule(progress, args.schedule, args.warmup, args.decay)
        parts, load = 0, 0
        sampler = self.short_sampler if self.short_sampler and progress < SHORT_UNTIL else self.sampler
        self.window, count = sampler.seq_len, args.batch_size * self.sampler.seq_len // sampler.seq_len
        for micro in range(args.accumulation):
            starts = sampler.starts((self.step * args.accumulation + micro) * count, count)[
                ctx.data_parallel_slice(count)
            ]
            with ctx.no_sync(self.loss, micro == args.accumulation - 1):
                losses = self.loss(*windows(self.train_data, starts, self.window, ctx.device))
                (losses.total / args.accumulation).backward()
            parts = parts + torch.stack([losses.next_byte, losses.mtp, losses.balance]) / args.accumulation
            load = load + losses.load
        parallel.all_reduce_replicated_grads(ctx, model)
        parts, load = ctx.all_reduce_dp(parts / ctx.dp_size), ctx.all_reduce_dp(load)
        grad_norm = parallel.clip_grad_norm(ctx, model, args.grad_clip or math.inf)
        next_byte, mtp, balance, norm = torch.cat([parts, grad_norm.view(1)]).tolist()
        if not math.isfinite(next_byte + mtp + balance + norm):
            raise NotFinite(f"step {self.step + 1}: the loss is {next_byte}, the gradient's norm {norm}")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.update_gate_bias(load)
        self.quantize_weights()
        self.step += 1
        self.flops += self.whole.flops_per_position(self.window) * self.step_bytes
        metrics = {"train_loss": next_byte, "lr": args.lr * lr_factor, "grad_norm": norm, "balance_loss": balance}
        return metrics | ({"mtp_loss": mtp} if len(model.mtp) else {}) | {"load": load}

    def evaluate_and_save(self, metrics: Metrics) -> float | None:
        """Evaluates, prints the figures and a sample, and saves.

        Returns:
            The loss in nats per byte; None if a signal came first, and then nothing was saved.

        Raises:
            NotFinite: The loss is. It was the last step's doing, so nothing is saved.
        """
        if self.val_step == self.step:  # resumed after its last step
            return self.val_loss
        began, more = time.monotonic(), self.model.args.max_seq_len // self.window
        val_loss = evaluate(
            self.model,
            self.val_data,
            4 * more * self.args.batch_size // self.ctx.dp_size,
            self.ctx.device,
            self.eval_windows and more * self.eval_windows,
            lambda: self.stopped(),
            self.ctx,
            self.window,
        )
        if val_loss is None:
            return None
        if not math.isfinite(val_loss):
            raise NotFinite(f"step {self.step}: the validation loss is {val_loss}")
        self.eval_s = time.monotonic() - began
        bpb = val_loss / math.log(2)
        metrics.write(
            step=self.step,
            elapsed_s=self.clock.elapsed_s(),
            bytes=self.step * self.step_bytes,
            val_loss=val_loss,
            val_bpb=bpb,
            **({"val_windows": more * self.eval_windows} if self.eval_windows else {}),
            **({"window": self.window} if more > 1 else {}),
        )
        self.val_step, self.val_loss = self.step, val_loss
        is_best, self.best_val = val_loss < self.best_val, min(val_loss, self.best_val)
        self.save(is_best)
        short = f" in windows of {self.window} bytes" if more > 1 else ""
        tqdm.write(f"step {self.step}: val_loss {val_loss:.4f} nats/byte, {bpb:.4f} bits/byte{short}")
        if self.args.sample_bytes:
            tqdm.write(visible(sample_text(self.model, self.args.sample_bytes, self.ctx.device)))
        self.clock.closing_s = 1.2 * (time.monotonic() - began)
        return val_loss

    def plan_evaluation(self, step_s: float) -> None:
        """Estimates, until an evaluation was measured, what one takes from what a step takes: forward is a third.

        A tenth of the run's time is the most that the last evaluation may take: of a split that needs more, only so
        many windows are taken, and a line says so.
        """
        expected = len(self.val_data) / self.step_bytes / 3 * step_s
        bound = 0.1 * self.clock.seconds
        n_windows = len(self.val_data) // self.model.args.max_seq_len
        if self.val_step is None:  # a resumed run keeps to the windows that its best loss is of
            (fits,) = self.ctx.broadcast(bound / expected)
            self.eval_windows = None if fits >= 1 else max(1, int(n_windows * fits))
        self.clock.closing_s = min(2 * min(expected, bound) + 1, 0.25 * self.clock.seconds)

    def save(self, is_best: bool) -> None:
        """Writes a checkpoint, if the run has a folder."""
        if self.args.save_path is not None:
            tensors = optimizer_tensors(self.model, self.optimizers)
            save_run(self.args.save_path, self.model, tensors, self.state(), is_best, self.ctx)

    def stop(self, signum: int, _frame: object) -> None:
        """Signal handler: ends the run after this step; the second time, at once."""
        if self.stop_signal is not None:
            raise KeyboardInterrupt
        self.stop_signal = signum

    def stopped(self) -> bool:
        """Whether a signal has come, to whichever process."""
        (signum,) = self.ctx.all_reduce_max(self.stop_signal or 0)
        self.stop_signal = int(signum) or None
        return self.stop_signal is not None


def resume_settings(args: argparse.Namespace, data: np.ndarray) -> dict[str, Any]:
    """What must not change when a run is resumed, for its steps to be the ones that it would have taken."""
    names = ["seed", "batch_size", "accumulation", "optimizer", "lr", "matrix_lr", "momentum", "beta1", "beta2"]
    names += ["short_seq_len", "weight_decay", "grad_clip", "schedule", "warmup", "decay", "gemm_impl"]
    # of 10 GB, only a few pages are read: 64 of 4 KiB, evenly spread
    pages = [data[i : i + 4096].tobytes() for i in np.linspace(0, max(len(data) - 4096, 0), 64).astype(np.int64)]
    return {
        **{name: getattr(args, name) for name in names},
        "training_bytes": len(data),
        "training_crc32": zlib.crc32(b"".join(pages)),
    }


def load_summary(load: torch.Tensor) -> dict[str, Any]:
    """Each expert's load relative to its layer's mean, and the largest of all."""
    if not load.numel():
        return {}
    relative = load / load.mean(dim=-1, keepdim=True)
    return {"expert_load": [[round(x, 3) for x in row] for row in relative.tolist()], "max_load": relative.max().item()}


def run(trainer: Trainer, metrics: Metrics) -> float | None:
    """Trains until the clock says so or a signal comes; returns the last validation loss, None after a signal."""
    args, clock = trainer.args, trainer.clock
    due, load, logged_at = _due(trainer), 0, (trainer.step, time.monotonic(), trainer.flops)
    fastest = math.inf
    with progress_bar(trainer) as bar:
        while not trainer.stopped():
            began = time.monotonic()
            if trainer.step == 0:
                clock.startup_s = clock.elapsed_s()
            (progress,) = trainer.ctx.broadcast(clock.progress(trainer.step))
            bar.n = round(100 * progress, 1)
            if progress >= 1:
                break
            step_metrics = trainer.train_step(progress)
            load = load + step_metrics.pop("load")
            clock.step_s = max(0.9 * clock.step_s, time.monotonic() - began)
            # the first steps, which warm up, and a busy machine mislead; hence the fastest step
            fastest = min(fastest, time.monotonic() - began)
            if trainer.eval_s is None and clock.seconds is not None:
                trainer.plan_evaluation(fastest)
            if trainer.step % args.log_interval == 0:
                steps, seconds = trainer.step - logged_at[0], time.monotonic() - logged_at[1]
                speed = steps * trainer.step_bytes / seconds
                mfu = (trainer.flops - logged_at[2]) / seconds / trainer.peak_flops
                bar.set_postfix_str(f"loss {step_metrics['train_loss']:.3f}, {speed:,.0f} bytes/s, {mfu:.0%} of peak")
                metrics.write(
                    step=trainer.step,
                    elapsed_s=clock.elapsed_s(),
                    bytes=trainer.step * trainer.step_bytes,
                    **step_metrics,
                    bytes_per_s=speed,
                    mfu=mfu,
                    **load_summary(load),
                )
                load, logged_at = 0, (trainer.step, time.monotonic(), trainer.flops)
            evaluate_now, save_now = trainer.ctx.broadcast(*next(due))
            if evaluate_now:
                trainer.evaluate_and_save(metrics)
                logged_at = (trainer.step, time.monotonic(), trainer.flops)
            elif save_now:
                trainer.save(is_best=False)
    val_loss = None if trainer.stopped() else trainer.evaluate_and_save(metrics)
    if val_loss is None:
        trainer.save(is_best=False)
    return val_loss


def progress_bar(trainer: Trainer) -> tqdm:
    """A bar in percent of the run, on a terminal only."""
    form = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    return tqdm(
        total=100,
        disable=None if is_rank_zero() else True,
        bar_format=form,
        mininterval=0.5,
        initial=100 * trainer.clock.progress(trainer.step),
    )


def _due(trainer: Trainer) -> Iterator[tuple[bool, bool]]:
    """Says after each step whether to evaluate (which saves as well), and whether to save at least.

    Without intervals both are due after each tenth of the run. By the clock, an evaluation is then left out while
    evaluations would have taken more than a twentieth of the time.
    """
    args, clock, spent = trainer.args, trainer.clock, 0.0
    tenth = int(10 * clock.progress(trainer.step))
    while True:
        now = int(10 * clock.progress(trainer.step))
        reached, tenth = tenth < now < 10, now
        evaluate_now = reached
        if args.eval_interval:
            evaluate_now, reached = trainer.step % args.eval_interval == 0 and now < 10, False
        elif reached and clock.seconds is not None:
            expected = trainer.eval_s if trainer.eval_s is not None else clock.closing_s / 2
            evaluate_now = spent + expected <= 0.05 * clock.elapsed_s()
            spent += expected if evaluate_now else 0
        yield evaluate_now, trainer.step % args.save_interval == 0 if args.save_interval else reached


def number(kind: type, accept: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """Makes an argparse type: a number of that kind that is acceptable, or an error that says what is wanted."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            value = kind(text)
            if accept(value):
                return value
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")

    return parse


POSITIVE_INT = number(int, lambda n: n > 0, "an integer above 0")
NOT_NEGATIVE_INT = number(int, lambda n: n >= 0, "an integer, 0 or more")
SEED = number(int, lambda n: 0 <= n < 1 << 32, "an integer from 0 to 2^32 - 1")
POSITIVE = number(float, lambda x: 0 < x < math.inf, "a number above 0")
NOT_NEGATIVE = number(float, lambda x: 0 <= x < math.inf, "a number, 0 or more")
FRACTION = number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
BELOW_ONE = number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, which names the config if they are in there."""

    source = ""

    def error(self, message: str) -> None:
        self.exit(
            2, f"{self.prog}: error: {self.source}{one_line(message)}\n" if command.is_local_rank_zero() else None
        )


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the defaults of flags that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def build_parser() -> Parser:
    """The command line; what a config's "train" may set is all of it but --config, --save-path and --resume."""
    p = Parser(
        prog="train.py",
        description="Train a model on bytes.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--config", required=True, help="JSON file of ModelArgs; its key 'train' sets defaults for the flags"
    )
    p.add_argument("--data", default="stdlib", help="a file, a folder, or stdlib, shakespeare, enwik8")
    p.add_argument(
        "--save-path", type=Path, help="folder for checkpoints and metrics.jsonl; without it nothing is kept"
    )
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --save-path, if any")
    length = p.add_argument_group("length of the run (one of them)")
    length.add_argument("--steps", type=POSITIVE_INT, help="optimizer steps")
    length.add_argument("--minutes", type=POSITIVE, help="time for the whole process, start and end included")
    batch = p.add_argument_group("batch")
    batch.add_argument("--batch-size", type=POSITIVE_INT, default=32, help="windows of max_seq_len bytes at a time")
    batch.add_argument(
        "--short-seq-len",
        type=NOT_NEGATIVE_INT,
        default=0,
        metavar="N",
        help="in the first half of the run, cut each window into windows of N bytes, on which attention costs less; "
        "0: never",
    )
    batch.add_argument("--accumulation", type=POSITIVE_INT, default=1, help="batches whose gradients make one step")
    optim = p.add_argument_group("optimizer")
    optim.add_argument("--optimizer", choices=["muon", "adamw"], default="muon", help="for the hidden matrices")
    optim.add_argument("--matrix-lr", type=POSITIVE, default=0.01, help="peak learning rate of hidden matrices")
    optim.add_argument("--lr", type=POSITIVE, default=0.003, help="peak learning rate of all else, by AdamW")
    optim.add_argument("--weight-decay", type=NOT_NEGATIVE, default=0.1, help="of the hidden matrices")
    optim.add_argument("--momentum", type=BELOW_ONE, default=0.95, help="of Muon")
    optim.add_argument("--beta1", type=BELOW_ONE, default=0.9, help="of AdamW")
    optim.add_argument("--beta2", type=BELOW_ONE, default=0.95, help="of AdamW")
    optim.add_argument("--grad-clip", type=NOT_NEGATIVE, default=1.0, help="largest gradient norm; 0 for none")
    optim.add_argument("--schedule", choices=["wsd", "cosine"], default="wsd", help="warm-up, stable, decay; or cosine")
    optim.add_argument("--warmup", type=FRACTION, default=0.02, help="fraction of the run")
    optim.add_argument("--decay", type=FRACTION, default=0.5, help="fraction of the run (wsd)")
    compute = p.add_argument_group("compute")
    compute.add_argument("--device", choices=["cuda", "mps", "cpu"], help="default: the best there is")
    compute.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="of the activations")
    compute.add_argument(
        "--gemm-impl",
        choices=["bf16", "fp8"],
        help="products of the linear layers; default: as the config's dtype says. FP8 runs on any device, and is fast "
        "on GPUs of compute capability 8.9 or more",
    )
    compute.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile the step: on a CPU that takes a C++ compiler",
    )
    compute.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute blocks: less memory, slower",
    )
    compute.add_argument(
        "--model-parallel", type=POSITIVE_INT, default=1, metavar="M", help="processes that share one model's layers"
    )
    compute.add_argument(
        "--fsdp",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="shard parameters, gradients and optimizer state over the data-parallel processes",
    )
    compute.add_argument(
        "--timeout",
        type=number(float, lambda x: 0 < x <= 1e6, "a number above 0, and at most a million"),
        default=TIMEOUT.total_seconds() / 60,
        metavar="MINUTES",
        help="how long a process waits for another one",
    )
    compute.add_argument("--seed", type=SEED, default=0, help="of the weights and the order of the data")
    planning = p.add_argument_group("planning")
    planning.add_argument("--plan", action="store_true", help="say what each process would hold and send, and end")
    planning.add_argument("--world-size", type=POSITIVE_INT, metavar="N", help="number of processes to plan for")
    planning.add_argument("--device-memory", type=POSITIVE, metavar="GB", help="of a device: will it fit?")
    report = p.add_argument_group("reports")
    report.add_argument("--log-interval", type=POSITIVE_INT, default=10, help="steps between lines of metrics")
    report.add_argument("--eval-interval", type=NOT_NEGATIVE_INT, default=0, help="steps; 0: a tenth of the run")
    report.add_argument(
        "--save-interval", type=NOT_NEGATIVE_INT, default=0, help="steps; 0: with each evaluation or tenth of the run"
    )
    report.add_argument("--sample-bytes", type=NOT_NEGATIVE_INT, default=200, help="bytes of the sample; 0 for none")
    return p


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, ModelArgs]:
    """Parses the command line over the defaults that the config has under "train".

    Returns:
        The flags, and the model's `ModelArgs`.
    """
    parser = build_parser()
    given = parser.parse_args(argv)
    shape, defaults = read_config(given.config)
    flags = {action.dest: action for action in parser._actions}
    fixed = ("help", "config", "save_path", "resume", "plan", "world_size", "device_memory")
    config_argv: list[str] = []
    for key, value in defaults.items():
        action = flags.get(key)
        if action is None or key in fixed:
            raise ConfigError(f"{given.config}: train.{key} is not a flag of train.py that a config may set")
        if key in ("steps", "minutes") and (given.steps or given.minutes):
            continue
        switch = isinstance(action, argparse.BooleanOptionalAction)
        if switch != isinstance(value, bool) or isinstance(value, (list, dict, type(None))):
            raise ConfigError(f"{given.config}: train.{key} cannot be {value!r}")
        config_argv += [action.option_strings[not value]] if switch else [action.option_strings[0], str(value)]
    parser.source = f"{given.config}: train: "
    parser.parse_args(["--config", given.config, *config_argv])
    parser.source = ""
    args = parser.parse_args(config_argv + (sys.argv[1:] if argv is None else argv))
    args.gemm_impl = args.gemm_impl or ("fp8" if shape.dtype == "fp8" else "bf16")
    if args.plan:
        args.world_size = args.world_size or read_launch().world_size
        return args, shape
    if args.world_size is not None or args.device_memory is not None:
        parser.error("--world-size and --device-memory are for --plan; torchrun says how many processes there are")
    if (args.steps is None) == (args.minutes is None):
        parser.error("give one of --steps and --minutes: how long to train")
    if args.resume and args.save_path is None:
        parser.error("--resume needs the --save-path of the run to go on with")
    if shape.vocab_size != VOCAB_SIZE:
        raise ConfigError(f"{args.config}: vocab_size must be {VOCAB_SIZE} to train on bytes, got {shape.vocab_size}")
    if args.short_seq_len and shape.max_seq_len % args.short_seq_len:
        parser.error(f"--short-seq-len must divide max_seq_len ({shape.max_seq_len}), got {args.short_seq_len}")
    if shape.n_mtp_layers >= (shortest := args.short_seq_len or shape.max_seq_len):
        raise ConfigError(f"{args.config}: n_mtp_layers must be below the length of the windows ({shortest})")
    return args, shape


def build_trainer(args: argparse.Namespace, shape: ModelArgs, ctx: ParallelContext) -> Trainer:
    """Loads the data and makes everything that a run needs."""
    dtype = pick_dtype(torch.device(ctx.device).type, args.dtype)
    fp8_ops.gemm_impl = args.gemm_impl
    with ctx.collective_section():
        ctx.check_divisible(shape, args.batch_size)
        data = open_bytes(resolve(args.data))
        train_data, val_data = split(data, shape.max_seq_len)
    names = ["steps", "minutes", "log_interval", "eval_interval", "save_interval", "sample_bytes", "compile"]
    told = {name: getattr(args, name) for name in [*names, "gradient_checkpointing", "resume"]}
    ctx.require_equal(shape.to_dict() | {"the dtype": dtype} | told | resume_settings(args, train_data))
    model = parallel.build(ctx, shape, dtype)
    parallel.init_weights(ctx, model, args.seed)
    model = model.to(ctx.device).train()
    model.gradient_checkpointing = args.gradient_checkpointing
    whole = model
    if ctx.mp_size > 1:
        with torch.device("meta"):
            whole = Transformer(shape, dtype)
    peak = ctx.world_size * measure_peak(ctx.device, dtype)
    describe(whole, args, ctx, peak, train_data, val_data)
    loss = parallel.parallelize(ctx, model, args.compile)
    return Trainer(
        args=args,
        model=model,
        optimizers=make_optimizers(model, args, dtype, ctx),
        train_data=train_data,
        val_data=val_data,
        sampler=SequenceSampler(len(train_data), shape.max_seq_len, args.seed),
        short_sampler=SequenceSampler(len(train_data), args.short_seq_len, args.seed) if args.short_seq_len else None,
        clock=Clock(args.steps, args.minutes),
        ctx=ctx,
        whole=whole,
        peak_flops=peak,
        loss=loss,
    )


@torch.no_grad()
def measure_peak(device: str, dtype: torch.dtype) -> float:
    """Measures how many floating-point operations a second a large product takes: the best of a few, in FLOP/s."""
    size = 1024 if torch.device(device).type == "cpu" else 8192
    a, best = torch.randn(size, size, device=device).to(dtype), math.inf
    for _ in range(6):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for it
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def describe(
    model: Transformer,
    args: argparse.Namespace,
    ctx: ParallelContext,
    peak: float,
    train_data: np.ndarray,
    val_data: np.ndarray,
) -> None:
    """Prints what will be trained, and on what."""
    total, active = model.n_params()
    latent, plain = model.args.cache_numbers_per_position()
    size, dtype = model.compute_dtype.itemsize, str(model.compute_dtype).removeprefix("torch.")
    spread = f"; {ctx.dp_size} data-parallel × {ctx.mp_size} model-parallel processes" if ctx.world_size > 1 else ""
    print(
        f"{total:,} parameters, {active:,} active per byte; cache {latent * size:,} bytes per position "
        f"(plain multi-head attention: {plain * size:,}); {torch.device(ctx.device).type}, {dtype}"
        f" at {peak / 1e12:.3g} TFLOP/s at most"
        f"{', products in FP8' if args.gemm_impl == 'fp8' else ''}{spread}; "
        f"{len(train_data):,} bytes to train on, {len(val_data):,} to validate"
    )


def train(argv: list[str] | None) -> int:
    """Runs the command; returns its exit code."""
    args, shape = parse_args(argv)
    if args.plan:
        dtype = torch.float32 if args.dtype == "fp32" else torch.bfloat16
        fp8_ops.gemm_impl = args.gemm_impl
        states = lambda name, p: 1 if args.optimizer == "muon" and is_hidden_matrix(name, p) else 2  # noqa: E731
        print(plan.show(plan.make_plan(shape, args, dtype, states), shape, args, args.device_memory))
        return 0
    keep_freed_memory()
    timeout = timedelta(minutes=args.timeout)
    device = pick_device(args.device)
    if args.compile:
        require_compiler(device)
    return train_in(ParallelContext.join(device, args.model_parallel, args.fsdp, timeout=timeout), args, shape)


def train_in(ctx: ParallelContext, args: argparse.Namespace, shape: ModelArgs) -> int:
    """Trains in one of the processes; returns its exit code."""
    path = args.save_path
    # workers that the elastic agent starts again go on where they were, with those of a node that has just come
    (restarts,) = ctx.all_reduce_max(read_launch().restart_count)
    resumes = args.resume or path is not None and restarts > 0
    with ctx.collective_section():
        if path is not None and path.exists() and not resumes and (not path.is_dir() or any(path.iterdir())):
            raise CheckpointError(
                f"--save-path {path} is not an empty folder; go on with --resume, or choose another path"
            )
    trainer = build_trainer(args, shape, ctx)
    # as the first sees it: one that sees another disk must fail, not begin anew
    if resumes and ctx.broadcast(has_run(path))[0]:
        with ctx.collective_section():
            trainer.resume(path)
        print(f"resumed {path} at step {trainer.step}")
    with ctx.collective_section():
        kept = path / METRICS_FILE if path is not None and is_rank_zero() else None
        metrics = Metrics(kept, trainer.step, trainer.val_step == trainer.step)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, trainer.stop)
    try:
        val_loss = run(trainer, metrics)
    except NotFinite as error:
        kept = f"; the last good checkpoint is in {path}" if path is not None and has_run(path) else ""
        if is_rank_zero():
            print(f"train.py: error: {error}{kept}; train anew with a lower --lr or --matrix-lr", file=sys.stderr)
        return 1
    where = f"model in {path}" if path is not None else "not saved, for want of --save-path"
    if val_loss is None:
        print(f"stopped by {signal.Signals(trainer.stop_signal).name} after step {trainer.step}: {where}")
    else:
        if trainer.eval_windows is not None:
            print(f"validated on {trainer.eval_windows:,} windows, evenly spread: all would have taken too long")
        print(f"step {trainer.step}, {trainer.clock.elapsed_s():.1f} s: val_loss {val_loss:.4f} nats/byte, {where}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""

    def body() -> int:
        with process_group("train.py", MISTAKES):
            return train(argv)

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a model writes characters that a terminal may not have
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if is_rank_zero() else nowhere):
        return command.run("train.py", body, MISTAKES)


if __name__ == "__main__":
    end(main())
