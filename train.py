"""Trains a model on bytes: flags, schedule, the loop, evaluation, resuming.

    python train.py --config configs/nano.json --data my.txt --save-path out --minutes 5
    python train.py --init-from out --data other.txt --save-path tuned --minutes 1
    python train.py --init-from tuned --eval-only --val-data other.txt

Three rules make a run repeatable and safe to stop at any moment:

- With --steps, a step depends on its number and the seed alone: its sequences follow from a position.
- A checkpoint holds all that the next step reads: weights, optimizer, routing biases, position. A run that was killed
  and resumed repeats the steps since, and on a CPU gives the same losses bit for bit.
- A step whose loss or gradient is not finite ends the run, before anything of it is saved.

Weights are float32; the model computes in bfloat16 where the hardware does.
"""

if __name__ == "__main__":
    import command

    command.start()  # before torch is imported, which takes seconds

import argparse
import json
import math
import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, field, fields, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast, get_args, get_origin

import numpy as np
import torch

import checkpoint
import command
import fp8_ops
import metrics
import optim
import parallel
import plan
from byte_tokenizer import VOCAB_SIZE
from checkpoint import Checkpoint, Run, has_run, load_run, load_weights, read_config, save_run
from command import integer, real, shorten
from convert import open_checkpoint
from data.prepare import DataError, open_bytes, resolve
from data.sampler import Corpus, JoinedCorpus, MixtureSampler, fingerprint, read_bytes, split
from metrics import RUN_FILES, Clock, Due, Meter, Metrics, Profile, ProgressBar, describe, evaluate, sample_text
from model import ConfigError, Losses, ModelArgs, Transformer
from optim import is_hidden_matrix, load_optimizer_tensors, make_optimizers, optimizer_tensors, schedule
from parallel import CollectiveError, DeviceError, ParallelContext, ParallelError, is_rank_zero
from safetensors_io import CheckpointError

SHORT_UNTIL = 0.5  # of a run: until then, sequences have --short-seq-len bytes
LAST_EVALUATION_SHARE, SAMPLE_SHARE = 0.05, 0.01  # of the time of a run by the clock, at most
FEW_STEPS = 10  # a run by the clock with fewer is reported
LEFTOVER = re.compile(rf"{RUN_FILES}|step-\d{{8,}}|\..*\.(tmp|lock)")  # of a run killed before it saved
# attributes of a trainer that are in its state
KEPT = ["step", "best_val", "val_step", "val_loss", "eval_sequences", "n_not_better"]
KEPT += ["progress", "stretch_from", "stretch_to", "origin"]


class NotFinite(RuntimeError):
    """The loss or the gradient of a step is NaN or infinite."""


MISTAKES = (ConfigError, DataError, CheckpointError, DeviceError, ParallelError, CollectiveError)


# --- Flags -----------------------------------------------------------------------------------------------------------


EVAL_FLAGS = {"context", "stride", "json"}  # of --eval-only alone, and those that it shares with training
SHARED_FLAGS = {"config", "data", "text_key", "val_data", "init_from", "eval_only", "batch_size"}
SHARED_FLAGS |= {"device", "dtype", "gemm_impl", "model_parallel", "fsdp", "timeout"}
_POSITIVE, _BELOW_ONE, _FRACTION = real(0, open_low=True), real(0, 1, open_high=True), real(0, 1)
_MINUTES = real(0, 1e6, open_low=True)


def _flag(default: Any, help: str, parse: Callable[[str], Any] = str, **options: Any) -> Any:
    """A field of `TrainFlags`: its default, help, the function that checks and converts its text, argparse's options.

    `group` begins a group in --help; a flag that is `fixed` is for the command line alone, not for a config. Without a
    `metavar`, a number is N or X there.
    """
    return field(default=default, metadata={"help": help, "type": parse, **options})


def _names(text: str) -> list[str]:
    """Parses the names of --override."""
    names = text.replace("-", "_").split(",")
    if unknown := [name for name in names if name not in checkpoint.OVERRIDABLE.values()]:
        known = ", ".join(dict.fromkeys(checkpoint.OVERRIDABLE.values()))
        raise argparse.ArgumentTypeError(f"must be of {known}, with commas between, got {shorten(unknown[0], 40)!r}")
    return names


@dataclass
class TrainFlags:
    """The flags of train.py: the command line, --help, and the object "train" of a config follow from these fields."""

    config: str | None = _flag(
        None, "JSON file of ModelArgs; its key 'train' sets defaults", metavar="FILE", fixed=True
    )
    data: list[str] | None = _flag(
        None, "files, .jsonl, .gz, folders, stdlib, shakespeare, enwik8 (default: stdlib)", nargs="+", action="extend"
    )
    data_weights: list[float] | None = _flag(
        None, "share of each DATA in training; default, and in validation: by size", _POSITIVE, nargs="+", metavar="W"
    )
    text_key: str = _flag("text", "of .jsonl: the field of each line that holds the text", metavar="KEY")
    val_data: str | None = _flag(None, "what to evaluate on; default: the last tenth of --data", metavar="DATA")
    save_path: Path | None = _flag(
        None, "folder of the run; without it nothing is kept", Path, metavar="DIR", fixed=True
    )
    resume: bool = _flag(False, "go on from the last checkpoint in --save-path, if any", fixed=True)
    override: list[str] | None = _flag(
        None, "names of flags that --resume may change, 'steps,lr'; see below", _names, metavar="FLAGS", fixed=True
    )
    init_from: Path | None = _flag(
        None,
        "a checkpoint or run to begin with, of any format",
        Path,
        metavar="CKPT",
        fixed=True,
        group="given weights",
    )
    freeze: list[str] | None = _flag(
        None, "parameters that stay, 'layers.0.*'; repeatable", metavar="PATTERN", action="append", fixed=True
    )
    eval_only: bool = _flag(
        False, "print the loss of --init-from over all of --val-data, or the last tenth of --data, and end", fixed=True
    )
    context: int | None = _flag(None, "with --eval-only: length of its sequences", integer(1, 1 << 30), fixed=True)
    stride: int | None = _flag(
        None, "with --eval-only: bytes from a sequence to the next; default: the context", integer(1), fixed=True
    )
    json: bool = _flag(False, "with --eval-only: print one JSON object", fixed=True)
    steps: int | None = _flag(None, "optimizer steps", integer(1), group="length of the run (one of them)")
    minutes: float | None = _flag(None, "minutes of the process, start-up included", _MINUTES)
    batch_size: int = _flag(32, "sequences of max_seq_len bytes at a time", integer(1, 10**6), group="batch")
    short_seq_len: int = _flag(0, "bytes of the sequences in the first half of the run; 0: as later", integer(0))
    accumulation: int = _flag(1, "batches whose gradients make one step", integer(1, 10**6))
    index_warmup: float = _flag(0.0, "fraction of the run in which indexers learn from dense attention", _FRACTION)
    indexer_only: bool = _flag(False, "in that fraction nothing else learns: for --init-from a model without indexers")
    optimizer: str = _flag("muon", "for the hidden matrices", choices=["muon", "adamw"], group="optimizer")
    matrix_lr: float = _flag(0.01, "peak learning rate of hidden matrices", _POSITIVE, metavar="LR")
    lr: float = _flag(0.003, "peak learning rate of all else, by AdamW", _POSITIVE, metavar="LR")
    weight_decay: float = _flag(0.1, "of the hidden matrices", real(0))
    momentum: float = _flag(0.95, "of Muon", _BELOW_ONE)
    beta1: float = _flag(0.9, "of AdamW", _BELOW_ONE)
    beta2: float = _flag(0.95, "of AdamW", _BELOW_ONE)
    grad_clip: float = _flag(1.0, "largest gradient norm; 0 for none", real(0))
    schedule: str = _flag("wsd", "warm-up, stable, decay; or cosine", choices=["wsd", "cosine"])
    warmup: float = _flag(0.02, "fraction of the run in which the rates rise", _FRACTION)
    decay: float = _flag(0.5, "fraction of the run in which they fall (wsd)", _FRACTION)
    device: str | None = _flag(None, "default: the best there is", choices=["cuda", "mps", "cpu"], group="compute")
    dtype: str = _flag("auto", "of the activations; auto: bf16 where it is fast", choices=["auto", "fp32", "bf16"])
    gemm_impl: str | None = _flag(None, "linear layers; default: by the dtype of --config", choices=["bf16", "fp8"])
    compile: bool = _flag(False, "torch.compile the step: on a CPU that takes a C++ compiler")
    cuda_graph: bool = _flag(True, "on one GPU: replay a recorded step, for a model whose steps are all alike")
    gradient_checkpointing: bool = _flag(False, "recompute blocks: less memory, slower")
    model_parallel: int = _flag(1, "processes that share one model's layers", integer(1, 10**4))
    fsdp: bool = _flag(False, "shard parameters, gradients and optimizer state over the data-parallel processes")
    timeout: float = _flag(parallel.TIMEOUT / timedelta(minutes=1), "minutes to wait for another process", _MINUTES)
    seed: int = _flag(0, "of the weights and the order of the data; default: 0", integer(0, 2**32 - 1))
    plan: bool = _flag(False, "print what each process would hold and send, and end", group="planning", fixed=True)
    world_size: int | None = _flag(None, "processes to plan for", integer(1, 10**6), fixed=True)
    device_memory: float | None = _flag(None, "of a device: will it fit?", _POSITIVE, metavar="GB", fixed=True)
    log_interval: int = _flag(10, "steps between lines of metrics", integer(1), group="reports")
    eval_interval: int = _flag(0, "steps between evaluations; 0: tenths of the run, if long enough", integer(0))
    save_interval: int = _flag(0, "steps between checkpoints; 0: tenths of the run, if long enough", integer(0))
    keep: int = _flag(0, "checkpoints that stay beside the last and the best", integer(0))
    patience: int = _flag(0, "evaluations without a better loss that end the run; 0: none do", integer(0))
    sample_bytes: int = _flag(200, "bytes of the text after an evaluation; 0 for none", integer(0, 10**6))
    tensorboard: bool = _flag(False, "write the metrics for TensorBoard as well, into --save-path")
    profile: int = _flag(0, "trace N steps, into --save-path; 0: none", integer(0, 10**4), fixed=True)


def build_parser() -> command.Parser:
    """Builds the parser of the command line from the fields of `TrainFlags`; it returns the flags that are given."""
    options: Any = {"epilog": checkpoint.OVERRIDE_HELP, "argument_default": argparse.SUPPRESS}
    parser = command.Parser("train.py", description="Train a model on bytes.", **options)
    group: Any = parser
    for flag in fields(TrainFlags):
        options = dict(flag.metadata)
        if "group" in options:
            group = parser.add_argument_group(options.pop("group"))
        is_fixed = options.pop("fixed", False)
        if flag.type is bool:
            del options["type"]
            options["action"] = "store_true" if is_fixed else argparse.BooleanOptionalAction
        kind, *_ = get_args(flag.type) or (flag.type,)  # int of `int | None`
        if kind in (int, float):
            options.setdefault("metavar", "N" if kind is int else "X")
        if flag.default not in (None, False, MISSING):
            options["help"] += f" (default: {flag.default})"
        group.add_argument("--" + flag.name.replace("_", "-"), **options)
    return parser


def config_flags(path: str, values: dict[str, Any]) -> dict[str, Any]:
    """Checks what a config has under "train" by the types and bounds of the flags; a ConfigError names the key."""
    if "short_windows" in values and command.is_local_rank_zero():
        command.warn("train.py", f"{path}: train.short_windows is called short_seq_len now")
    flags = {flag.name: flag for flag in fields(TrainFlags) if not flag.metadata.get("fixed")}
    checked: dict[str, Any] = {}
    for given, value in values.items():
        key = checkpoint.OLD_NAMES.get(given, given)
        if key not in flags:
            raise ConfigError(f"{path}: train.{shorten(given)} is not a flag of train.py that a config may set")
        if key in checked:
            raise ConfigError(f"{path}: train.{key} is set twice, under its old name too")
        try:
            checked[key] = _check_value(flags[key], value)
        except (TypeError, argparse.ArgumentTypeError) as error:
            raise ConfigError(f"{path}: train.{given} {error}") from None
    return checked


def _check_value(flag: Any, value: Any) -> Any:
    """Returns a JSON value as the type of a flag; raises TypeError or ArgumentTypeError where it is none."""
    kind, *_ = get_args(flag.type) or (flag.type,)  # int of `int | None`
    if get_origin(kind) is list:
        values = value if isinstance(value, list) and value else [value]
        return [_check_item(flag, get_args(kind)[0], item) for item in values]
    return _check_item(flag, kind, value)


def _check_item(flag: Any, kind: type, value: Any) -> Any:
    if type(value) is not kind and (kind is not float or type(value) is not int):
        raise TypeError(f"must be of type {kind.__name__}, got {shorten(json.dumps(value))}")
    if value not in flag.metadata.get("choices", [value]):
        raise TypeError(f"must be one of {', '.join(flag.metadata['choices'])}, got {shorten(value)}")
    return value if kind is bool else flag.metadata["type"](str(value))


def parse_args(argv: list[str] | None) -> tuple[TrainFlags, ModelArgs]:
    """Parses the command line over the defaults under "train" in the config; returns the flags and the model's args."""
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    defaults: dict[str, Any] = {}
    if "config" in given:
        shape, train_object = read_config(given["config"])
        defaults = config_flags(given["config"], train_object)
    elif "init_from" in given:
        shape = open_checkpoint(given["init_from"]).args
    else:
        parser.error("give --config, a JSON file of ModelArgs, or --init-from, a checkpoint")
    if given.keys() & {"steps", "minutes"}:
        defaults = {key: value for key, value in defaults.items() if key not in ("steps", "minutes")}
    if "data" in given:
        defaults.pop("data_weights", None)
    flags = TrainFlags(**defaults | given)
    flags.data = flags.data or ["stdlib"]
    if flags.data_weights and len(flags.data_weights) != len(flags.data):
        parser.error(f"--data-weights must be as many as --data: {len(flags.data)}, got {len(flags.data_weights)}")
    flags.data_weights = flags.data_weights if len(flags.data) > 1 else None  # of one corpus it changes nothing
    flags.gemm_impl = flags.gemm_impl or ("fp8" if "config" in given and shape.dtype == "fp8" else "bf16")
    barred, use = EVAL_FLAGS, "--eval-only"
    if flags.eval_only:
        barred, use = given.keys() - EVAL_FLAGS - SHARED_FLAGS, "training, not for --eval-only"
    if misplaced := [name for name in given if name in barred]:
        parser.error(f"--{misplaced[0].replace('_', '-')} is for {use}")
    if shape.vocab_size != VOCAB_SIZE and not flags.plan:
        source = flags.config or flags.init_from
        raise ConfigError(f"{source}: vocab_size must be {VOCAB_SIZE} to train on bytes, got {shape.vocab_size}")
    if flags.eval_only:
        check_evaluation(parser, flags, shape)
    elif not flags.plan:
        check_flags(parser, flags, shape)
    elif flags.freeze:
        parser.error("--plan is of a run that trains all parameters; leave --freeze out")
    return flags, shape


def check_evaluation(parser: command.Parser, flags: TrainFlags, shape: ModelArgs) -> None:
    """Refuses flags of --eval-only that do not go together, or not with the model."""
    if flags.init_from is None:
        parser.error("--eval-only needs --init-from, the checkpoint to evaluate")
    context, reach = flags.context or shape.max_seq_len, shape.max_seq_len
    if flags.stride and flags.stride > context:
        parser.error(f"--stride must be at most the context ({context}), so that no byte is left out")
    if shape.use_yarn:
        reach = max(reach, int(shape.original_seq_len * shape.rope_factor))
        if context > reach:
            parser.error(f"--context can be {reach} at most: original_seq_len · rope_factor, where YaRN's angles end")
    elif context > reach and command.is_local_rank_zero():
        command.warn("train.py", f"--context {context} has positions that a model of max_seq_len {reach} has not seen")


def check_flags(parser: command.Parser, flags: TrainFlags, shape: ModelArgs) -> None:
    """Refuses flags of training that do not go together, or not with the model."""
    if flags.world_size is not None or flags.device_memory is not None:
        parser.error("--world-size and --device-memory are for --plan; torchrun sets the number of processes")
    if (flags.steps is None) == (flags.minutes is None):
        parser.error("give one of --steps and --minutes: how long to train")
    if flags.resume and flags.save_path is None:
        parser.error("--resume needs the --save-path of the run to go on with")
    if flags.save_path is None and (flags.tensorboard or flags.profile):
        parser.error("--tensorboard and --profile write into the folder of --save-path; give one")
    if flags.tensorboard and find_spec("tensorboard") is None:
        parser.error("--tensorboard needs a package that is not installed: pip install tensorboard")
    if flags.override and not flags.resume:
        parser.error("--override is for --resume: a new run has its flags as they are")
    if flags.short_seq_len and shape.max_seq_len % flags.short_seq_len:
        parser.error(f"--short-seq-len must divide max_seq_len ({shape.max_seq_len}), got {flags.short_seq_len}")
    if (flags.index_warmup or flags.indexer_only) and not (shape.index_topk and flags.index_warmup):
        parser.error("--index-warmup needs a model with index_topk, and --indexer-only needs --index-warmup above 0")
    source = flags.config or flags.init_from
    if shape.n_mtp_layers >= (shortest := flags.short_seq_len or shape.max_seq_len):
        raise ConfigError(f"{source}: n_mtp_layers must be below the length of the sequences ({shortest})")


# --- The trainer -----------------------------------------------------------------------------------------------------


@dataclass
class Trainer:
    """A run: the model, its optimizers, and how far training is."""

    flags: TrainFlags
    ctx: ParallelContext
    model: Transformer  # this process's shards
    full_model: Transformer  # the same, or with tensor parallelism the unsharded model on the meta device
    loss: Callable[[torch.Tensor, torch.Tensor], Losses]
    optimizers: list[torch.optim.Optimizer]
    train_data: Corpus
    val_data: Corpus
    peak_flops: float  # of the matrix products of all devices, each second
    run: Run | None = None  # where it is saved
    metrics: Metrics = field(default_factory=lambda: Metrics(None, 0))
    step: int = 0
    best_val: float | None = None
    val_step: int | None = None  # the step last evaluated, and its loss
    val_loss: float | None = None
    eval_sequences: int | None = None  # number of sequences of an evaluation; None: all
    n_validated: int | None = None  # of the last one, which may have ended earlier
    n_not_better: int = 0  # evaluations since the best one
    progress: float = 0.0  # of the schedule, at the last step
    stretch_from: float = 0.0  # when the run's length was last changed: how much of the new length was done,
    stretch_to: float = 0.0  # and how much of the schedule
    origin: dict[str, Any] | None = None  # of the first weights; see `Checkpoint.origin`
    stop_signal: int | None = None

    def __post_init__(self) -> None:
        flags, data, self.context = self.flags, self.train_data, self.model.args.max_seq_len
        self.clock = Clock(flags.steps, flags.minutes)
        self.meter = Meter(self.peak_flops, self.ctx.device, self.clock.now)
        self.settings = resume_settings(flags, data, self.val_data)
        self.settings["freeze"] = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        grad_clip, replays = flags.grad_clip or math.inf, flags.cuda_graph and optim.can_replay(self.ctx, self.model)
        step_args = self.ctx, self.model, self.loss, self.optimizers, grad_clip, replays
        self.training_step = optim.TrainingStep(*step_args)
        self.launched: deque[tuple[int, dict[str, float], optim.Figures]] = deque()  # steps whose figures are to come
        self.figures: dict[str, Any] = {}  # metrics of the last step that is known to be finite
        parallel.quantize_weights(self.ctx, self.model)
        sizes, weights = data.sizes if isinstance(data, JoinedCorpus) else [len(data)], flags.data_weights
        self.sampler = MixtureSampler(sizes, self.context, flags.seed, weights)
        self.short_sampler = MixtureSampler(sizes, flags.short_seq_len or self.context, flags.seed, weights)
        self.seq_len = self.context  # of the last step
        self.step_sequences = flags.batch_size * flags.accumulation
        self.step_bytes = self.step_sequences * self.context

    def state(self) -> dict[str, Any]:
        """Returns the state of a run besides tensors, ready for JSON."""
        state = {name: getattr(self, name) for name in KEPT}
        state |= {"elapsed_s": self.clock.elapsed_s(), "startup_s": self.clock.startup_s}
        state["gate_balance"] = self.training_step.balance.state.tolist()
        return state | {"sequences": self.step * self.step_sequences, "settings": self.settings}

    def resume(self, run: Path) -> dict[str, Any]:
        """Goes on from the last checkpoint of `run`; returns its settings that --override changes, as they were.

        Raises a CheckpointError if other flags or data made it.
        """
        read, stored = load_run(run, self.model, self.ctx)
        state = checkpoint.check_state(run, stored, self.state())
        checkpoint.check_origin(run, state["origin"], self.flags.init_from)
        changed = checkpoint.check_settings(run, state["settings"], self.settings, self.flags.override or [])
        load_optimizer_tensors(self.model, self.optimizers, read, self.ctx)
        parallel.quantize_weights(self.ctx, self.model)
        if state["gate_balance"] is not None:
            balance = self.training_step.balance.state
            balance.copy_(torch.tensor(state["gate_balance"]).view_as(balance))
        for name in KEPT:
            setattr(self, name, state[name])
        self.clock.earlier_s, self.clock.startup_s = state["elapsed_s"], state["startup_s"]
        return changed

    def override(self, changed: dict[str, Any]) -> None:
        """Goes on with other settings than those in `changed`, and says what that means; see `OVERRIDE_HELP`."""
        now, was = self.settings, self.settings | changed
        is_over = self.progress == 1 or (was.get("steps") or self.step + 1) <= self.step
        progress, before = self.progress, optim.rate(self.progress, was)
        phase = "is over" if is_over else f"stands at {progress:.1%}"
        if changed.keys() & {"steps", "minutes"}:
            (done,) = self.ctx.broadcast(self.step / now["steps"] if now["steps"] else self.clock.progress(self.step))
            self.stretch_from, self.stretch_to = (done, 0.0 if is_over else progress) if done < 1 else (0.0, 0.0)
            progress = self.stretch_to
            phase += ", begins anew" if is_over else ", what is left of it is stretched over what is left of the run"
        if any(key.startswith(("training", "validation")) for key in changed):  # losses on other data do not compare
            self.best_val, self.eval_sequences, self.n_not_better = None, None, 0
        if was["schedule"] == "wsd" and not is_over and self.progress > 1 - was["decay"]:
            phase += ", its decay has begun"
        changes = ", ".join(f"{key} from {shorten(value)} to {now.get(key)}" for key, value in changed.items())
        rates = f"lr from {before:.3g} to {optim.rate(progress, now):.3g}, its peak is {now['lr']:.3g}"
        say(f"--override changes {changes}; the schedule ({now['schedule']}) {phase}: {rates}")

    def train_step(self, progress: float) -> dict[str, Any]:
        """Takes one step; returns `figures`. A DataError has changed nothing.

        A step as a CUDA graph is at work when this returns, and the figures are those of the step before. Raises a
        NotFinite where a loss or a gradient is not finite, after which the run must end: see `TrainingStep`.
        """
        flags, progress = self.flags, optim.stretch(progress, self.stretch_from, self.stretch_to)
        self.model.dense_attention = progress < flags.index_warmup
        self.model.indexer_only = flags.indexer_only and progress < flags.index_warmup
        batches = self._read_batches(self.short_sampler if progress < SHORT_UNTIL else self.sampler)
        rates = self.training_step.set_rates(schedule(progress, flags.schedule, flags.warmup, flags.decay))
        self.launched.append((self.step + 1, rates, self.training_step(batches)))
        self.finish_steps(n_running=0 if self.training_step.graph is None else 1)
        self.step, self.progress = self.step + 1, progress
        return self.figures

    def _read_batches(self, sampler: MixtureSampler) -> torch.Tensor:
        """Reads this process's sequences of a step, uint8 (batches, B, S + 1)."""
        ctx, n_batches, self.seq_len = self.ctx, self.flags.accumulation, sampler.seq_len
        count = self.flags.batch_size * self.context // self.seq_len  # as many bytes, in shorter sequences
        mine = ctx.data_parallel_slice(count)
        with metrics.reading(ctx), self.meter.waiting():
            starts = [sampler.starts((self.step * n_batches + i) * count, count)[mine] for i in range(n_batches)]
            sequences = read_bytes(self.train_data, np.concatenate(starts), self.seq_len, ctx.device)
        return sequences.unflatten(0, (n_batches, -1))

    def finish_steps(self, n_running: int = 0) -> None:
        """Waits for all steps but the last `n_running`, and notes their figures; a NotFinite names a step."""
        while len(self.launched) > n_running:
            step, rates, figures = self.launched.popleft()
            (next_byte, mtp, balance, indexer, norm), load = figures.read()
            if not math.isfinite(next_byte + mtp + balance + indexer + norm):
                raise NotFinite(f"step {step}: the loss is {next_byte}, the gradient's norm {norm}")
            self.meter.add_load(load)
            self.figures = {"train_loss": next_byte, **rates, "grad_norm": norm, "balance_loss": balance}
            self.figures |= {"index_loss": indexer} if self.model.args.index_topk else {}
            self.figures |= {"mtp_loss": mtp} if len(self.model.mtp) else {}

    def evaluate(self, n_sequences: int | None, seq_len: int) -> tuple[float, int | None] | None:
        """The validation loss of as many bytes as `n_sequences` of the context have (None: of all); see `evaluate`."""
        shorter, data, ctx = self.context // seq_len, self.val_data, self.ctx
        batch_size, limit = 4 * shorter * self.flags.batch_size // ctx.dp_size, n_sequences and shorter * n_sequences
        return evaluate(self.model, data, batch_size, ctx, seq_len, limit, self.stopped, self.left_s)

    def left_s(self) -> float:
        """Seconds until a checkpoint must be written for a run by the clock to end in time, in all processes."""
        if self.clock.seconds is None:
            return math.inf
        return self.ctx.broadcast(self.clock.left_s() - 1.05 * self.clock.save_s)[0]  # a busy machine is slower

    def evaluate_and_save(self) -> float | None:
        """Evaluates in sequences as long as those of the last step, saves, prints the figures and a sample.

        Returns the loss in nats per byte; None if a signal came first. Then, and after NotFinite, nothing is saved.
        """
        if self.val_step == self.step:  # before the run was seen to be over, or resumed after its last step
            if self.progress == 1:
                self.save(is_best=False)  # its state alone
            return self.val_loss
        self.finish_steps()
        began = self.clock.now()
        evaluated = self.evaluate(self.eval_sequences, self.seq_len)
        if evaluated is None:
            return None
        val_loss, self.n_validated = evaluated
        if not math.isfinite(val_loss):
            raise NotFinite(f"step {self.step}: the validation loss is {val_loss}")
        self.val_step, self.val_loss = self.step, val_loss
        bpb, shorter = val_loss / math.log(2), self.context // self.seq_len
        length = {"window": self.seq_len} if shorter > 1 else {}
        limit = {"val_windows": self.n_validated} if self.n_validated else {}
        self.write({"val_loss": val_loss, "val_bpb": bpb} | limit | length)
        is_best = self.best_val is None or val_loss < self.best_val
        self.best_val, self.n_not_better = (val_loss, 0) if is_best else (self.best_val, self.n_not_better + 1)
        self.save(is_best)
        where = f" in sequences of {self.seq_len} bytes" if length else ""
        say(f"step {self.step}: val_loss {val_loss:.4f} nats/byte, {bpb:.4f} bits/byte{where}")
        if self.flags.sample_bytes:
            is_over = lambda: self.ctx.broadcast(self.clock.left_s())[0] <= 0  # noqa: E731 - a busy machine is slower
            if sample := sample_text(self.model, self.flags.sample_bytes, self.ctx.device, is_over):
                say(sample)
        if shorter == 1:  # as the last one is
            self.clock.eval_s = self.clock.now() - began - self.clock.save_s
        return val_loss

    def write(self, figures: dict[str, Any]) -> None:
        """Writes a line of metrics of the last step."""
        elapsed_s, n_bytes = self.clock.elapsed_s(), self.step * self.step_bytes
        self.metrics.write(step=self.step, elapsed_s=elapsed_s, bytes=n_bytes, **figures)

    def measure_closing(self) -> None:
        """Times an evaluation of few sequences and a short sample, to know what the last ones of a run will take.

        If the whole split would take more than its share of the time, evaluations take only so many of its sequences.
        """
        clock, n_available = self.clock, max(1, len(self.val_data) // self.context)
        count = min(4 * self.flags.batch_size, n_available)  # a batch of `evaluate`
        began, n_bytes = clock.now(), min(self.flags.sample_bytes, self.context)
        for _ in range(2):  # the first warms up: kernels are compiled for these sizes
            times = [clock.now()]
            self.evaluate(count, self.context)
            times.append(clock.now())
            sample_text(self.model, min(n_bytes, 2), self.ctx.device)
            times.append(clock.now())
        clock.startup_s += times[2] - began
        bound = LAST_EVALUATION_SHARE * clock.seconds
        (expected,) = self.ctx.broadcast((times[1] - times[0]) * n_available / count)
        if expected > bound and self.best_val is None:  # a resumed run keeps to the sequences of its best loss
            self.eval_sequences = max(1, int(n_available * bound / expected))
        # the text ends when the time does, or earlier, with its document: hardly any time is reserved for it
        clock.eval_s = min(expected, bound) + min((times[2] - times[1]) / 2 * n_bytes, SAMPLE_SHARE * clock.seconds)
        if self.flags.save_path is not None:
            clock.save_s = 12 * self.full_model.n_params()[0] / 3e8  # float32 weights and averages, to a disk

    def save(self, is_best: bool) -> None:
        """Writes a checkpoint, if the run has a folder."""
        self.finish_steps()
        if self.run is not None:
            began = self.clock.now()
            tensors = optimizer_tensors(self.model, self.optimizers)
            save_run(self.run, self.model, tensors, self.state(), is_best, self.flags.keep)
            self.clock.save_s = self.clock.now() - began

    def out_of_patience(self) -> bool:
        """Whether as many evaluations as --patience were no better than the best."""
        return 0 < self.flags.patience <= self.n_not_better

    def stop(self, signum: int, _frame: object) -> None:
        """Signal handler: ends the run after this step; the second time, at once."""
        if self.stop_signal is not None:
            handle_signals(signal.SIG_IGN)  # a third one must not disturb the clean-up
            raise KeyboardInterrupt
        self.stop_signal = signum

    def stopped(self) -> bool:
        """Whether a signal has come, to whichever process."""
        (signum,) = self.ctx.all_reduce_max(self.stop_signal or 0)
        self.stop_signal = int(signum) or None
        return self.stop_signal is not None


def handle_signals(handler: Any) -> None:
    """Sets the handler of the signals that end a run; Python allows that in the main thread alone."""
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, handler)


def resume_settings(flags: TrainFlags, data: Corpus, val_data: Corpus) -> dict[str, Any]:
    """Returns the settings that must be equal when a run is resumed, unless --override names them."""
    names = ["seed", "batch_size", "accumulation", "optimizer", "lr", "matrix_lr", "momentum", "beta1", "beta2"]
    names += ["short_seq_len", "weight_decay", "grad_clip", "schedule", "warmup", "decay", "gemm_impl"]
    names += ["index_warmup", "indexer_only"]
    settings = {name: getattr(flags, name) for name in [*names, "steps", "minutes", "data_weights"]}
    settings |= {"training_bytes": len(data), "training_crc32": fingerprint(data)}
    own = {"validation_bytes": len(val_data), "validation_crc32": fingerprint(val_data)}
    return settings | (own if flags.val_data is not None else {})  # else it follows from --data


# --- The loop --------------------------------------------------------------------------------------------------------


def run(trainer: Trainer) -> int:
    """Trains until the time or a signal ends it, saves the last step, and prints it; returns the exit code."""
    path, val_loss = trainer.flags.save_path, None
    with trainer.ctx.collective_section():
        folder = trainer.run if is_rank_zero() else None
        values = vars(trainer.flags) | {"model": trainer.full_model.args.to_dict()}
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        is_evaluated = trainer.val_step == trainer.step
        trainer.metrics = Metrics(folder, trainer.step, is_evaluated, settings, trainer.flags.tensorboard)
    handle_signals(trainer.stop)
    try:
        try:
            train_steps(trainer)
            if not trainer.stopped():
                require_steps(trainer)
                val_loss = trainer.evaluate_and_save()
            if val_loss is None:
                trainer.save(is_best=False)
        except DataError as error:  # in all processes: see `reading`
            is_saved = path is not None and trainer.step > 0
            if is_saved:
                trainer.save(is_best=False)
            where = f"; step {trainer.step} is saved in {path}" if is_saved else ""
            raise CollectiveError(f"{error}{where}") from None
    except NotFinite as error:
        if is_rank_zero():
            kept = f"; the last good checkpoint is in {path}" if path is not None and has_run(path) else ""
            command.complain("train.py", f"{error}{kept}; train anew with a lower --lr or --matrix-lr")
        return 1
    where = f"model in {path}" if path is not None else "not saved (no --save-path)"
    if val_loss is None:
        say(f"stopped by {signal.Signals(trainer.stop_signal).name} after step {trainer.step}: {where}")
        return 0
    if trainer.out_of_patience():
        say(f"--patience: no better loss than {trainer.best_val:.4f} in {trainer.n_not_better} evaluations")
    if n := trainer.n_validated or trainer.eval_sequences:
        say(f"validated on {n:,} sequences, evenly spread: all would have taken too long")
    best = "" if trainer.best_val in (None, val_loss) else f" (the best: {trainer.best_val:.4f})"
    say(f"step {trainer.step}, {trainer.clock.elapsed_s():.1f} s: val_loss {val_loss:.4f} nats/byte{best}, {where}")
    return 0


def train_steps(trainer: Trainer) -> None:
    """Takes the steps of a run, with its logs, evaluations and saves."""
    flags, clock, ctx = trainer.flags, trainer.clock, trainer.ctx
    due, meter = Due(clock, trainer.step, trainer.step_bytes, len(trainer.val_data)), trainer.meter
    profile = Profile(flags.profile if is_rank_zero() else 0, trainer.run, ctx.device)
    with ProgressBar(is_rank_zero(), clock, clock.progress(trainer.step)) as bar, profile:
        while True:
            began = clock.now()
            (progress,) = ctx.broadcast(clock.progress(trainer.step))
            bar.show(trainer.step, progress)
            if trainer.stopped() or trainer.out_of_patience():
                break
            if progress >= 1:
                trainer.progress = 1.0
                break
            if clock.first_step_s is None and not flags.compile:
                lengths = trainer.context, trainer.short_sampler.seq_len
                trainer.training_step.compile_ahead(trainer.context * flags.batch_size // ctx.dp_size, *lengths)
            profile.begin_step(trainer.step + 1)
            trainer.train_step(progress)
            if logs := trainer.step % flags.log_interval == 0:
                trainer.finish_steps()
            seconds, is_first = clock.now() - began, clock.first_step_s is None
            clock.add_step(seconds)
            flops = trainer.full_model.flops_per_position(trainer.seq_len) * trainer.step_bytes
            meter.add(seconds, trainer.step_bytes, flops)
            profile.end_step()
            if logs:
                figures = trainer.figures | meter.pop()
                bar.show_figures(figures)
                trainer.write(figures)
            if is_first and clock.seconds is not None:
                trainer.measure_closing()
            evaluates, saves = ctx.broadcast(*due.after(trainer.step, flags.eval_interval, flags.save_interval))
            if evaluates or saves:
                began = clock.now()
                trainer.finish_steps()
                meter.add(clock.now() - began, 0, 0.0)  # what was left of a step that was counted as launched
            if evaluates:
                trainer.evaluate_and_save()
            elif saves:
                trainer.save(is_best=False)


def require_steps(trainer: Trainer) -> None:
    """Refuses a run by the clock that had no time for a step, and warns of one that had time for a few."""
    clock, step = trainer.clock, trainer.step
    if clock.seconds is None or step >= FEW_STEPS or trainer.out_of_patience():
        return
    first_s, end_s = clock.first_step_s or 0.0, clock.eval_s + clock.save_s
    took = f"{clock.elapsed_s() - clock.trained_s() - first_s:.1f} s to start, {first_s:.1f} s for the first step"
    text = f"--minutes {clock.minutes:g} left time for {step} steps only after {took} and {end_s:.1f} s to evaluate"
    text += " and save; give more"
    if step == 0:
        raise CollectiveError(text)
    if is_rank_zero():
        command.warn("train.py", text)


# --- The command -----------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Prints a result, in the first process alone."""
    if is_rank_zero():
        command.say(text)


def open_data(flags: TrainFlags, seq_len: int) -> tuple[Corpus, Corpus]:
    """Opens the bytes to train on, which must hold a sequence of `seq_len`, and those to evaluate on."""

    def open_source(source: str) -> Corpus:
        return open_bytes(resolve(source, text_key=flags.text_key))

    val_data = None if flags.val_data is None else open_source(flags.val_data)
    if val_data is not None and len(val_data) < 2:
        raise DataError("--val-data has 1 bytes, too few: at least 2 are needed")
    if flags.eval_only and val_data is not None:
        return val_data, val_data
    return split([open_source(source) for source in flags.data or []], seq_len, val_data)


def open_initial(flags: TrainFlags, shape: ModelArgs, ctx: ParallelContext) -> Checkpoint | None:
    """Opens the checkpoint of --init-from, if any, and names the MTP modules in which the model differs from it."""
    if flags.init_from is None:
        return None
    with ctx.collective_section():
        initial = open_checkpoint(flags.init_from)
        initial.check_same_model(shape)
        if flags.eval_only and initial.lacks_indexers(shape):
            raise ConfigError(f"{flags.init_from} has no indexers to evaluate: set index_topk to 0, or omit --config")
        crc32 = initial.fingerprint()
    ctx.require_equal({"in the weights of --init-from a CRC-32": crc32})
    ours, theirs = shape.n_mtp_layers, initial.args.n_mtp_layers
    if ours != theirs and not flags.eval_only:
        names = ", ".join(f"mtp.{k}" for k in range(min(ours, theirs), max(ours, theirs)))
        say(f"{names}: {'not taken from' if ours < theirs else 'drawn anew, as it is not in'} {flags.init_from}")
    if initial.lacks_indexers(shape):
        say(f"indexers: drawn anew, as they are not in {flags.init_from}")
    return initial


def build_model(
    flags: TrainFlags, shape: ModelArgs, ctx: ParallelContext, initial: Checkpoint | None
) -> tuple[Transformer, Callable[[torch.Tensor, torch.Tensor], Losses]]:
    """Builds the model, sharded over the processes, and the function of its loss; each process reads its slices.

    Weights that `initial` does not have are drawn.
    """
    dtype = parallel.pick_dtype(torch.device(ctx.device).type, flags.dtype)
    fp8_ops.gemm_impl = cast(Any, flags.gemm_impl)
    model = parallel.build(ctx, shape, dtype)
    if initial is None or not initial.has_all_of(shape):
        parallel.init_weights(ctx, model, flags.seed)
    model = model.to(ctx.device).train()
    model.gradient_checkpointing = flags.gradient_checkpointing
    with ctx.collective_section():
        optim.freeze(model, flags.freeze or [])
        if flags.index_warmup and not any(".indexer." in name for name in optim.trainable(model)):
            raise ConfigError("--freeze leaves no indexer for --index-warmup to train; narrow its patterns")
    loss: Any = model.loss
    if ctx.fsdp or not flags.eval_only:
        loss = parallel.parallelize(ctx, model, flags.compile)
    if initial is not None:
        with ctx.collective_section():
            load_weights(model, initial, ctx)
    return model, loss


def build_trainer(flags: TrainFlags, shape: ModelArgs, ctx: ParallelContext, resumes: bool = False) -> Trainer:
    """Opens the data and builds the model and its optimizers; a run that `resumes` loads its own weights later."""
    dtype = parallel.pick_dtype(torch.device(ctx.device).type, flags.dtype)
    with ctx.collective_section():
        ctx.check_divisible(shape, flags.batch_size)
        train_data, val_data = open_data(flags, shape.max_seq_len)
    ctx.require_equal({"the dtype": dtype} | resume_settings(flags, train_data, val_data))
    initial = None if resumes else open_initial(flags, shape, ctx)
    model, loss = build_model(flags, shape, ctx, initial)
    full_model = model
    if ctx.mp_size > 1:
        with torch.device("meta"):
            full_model = Transformer(shape, dtype)
        optim.freeze(full_model, flags.freeze or [])
    peak_flops = ctx.world_size * metrics.measure_peak(ctx.device, dtype)
    optimizers = make_optimizers(model, flags, dtype, ctx)
    trainer = Trainer(flags, ctx, model, full_model, loss, optimizers, train_data, val_data, peak_flops)
    trainer.origin = None if initial is None else initial.origin(flags.init_from)
    return trainer


def evaluate_only(flags: TrainFlags, shape: ModelArgs, ctx: ParallelContext) -> int:
    """Prints the loss of the weights of --init-from over a file; returns the exit code."""
    with ctx.collective_section():
        ctx.check_divisible(shape)
        others, data = open_data(flags, 1)
    ctx.require_equal({"the bytes to evaluate": len(data), "their CRC-32": fingerprint(data)})
    initial = open_initial(flags, shape, ctx)
    context = flags.context or shape.max_seq_len
    batch_size = max(1, flags.batch_size * shape.max_seq_len // context)  # as many bytes at a time
    model, _ = build_model(flags, replace(shape, max_seq_len=context, n_mtp_layers=0), ctx, initial)
    parallel.quantize_weights(ctx, model)
    figures = metrics.evaluate_file(model, data, batch_size, ctx, flags.stride)
    if not math.isfinite(figures["val_loss"]):
        raise CollectiveError(f"the loss of {flags.init_from} is {figures['val_loss']}; try --dtype fp32")
    data_name = flags.val_data or f"the last tenth of {', '.join(flags.data or [])}"
    if flags.val_data is None and len(flags.data or []) == 1:
        data_name += f", from byte {len(others)} on"
    figures = initial.origin(flags.init_from) | {"data": data_name, **figures}
    say(json.dumps(figures) if flags.json else metrics.describe_loss(figures))
    return 0


def find_run(flags: TrainFlags, ctx: ParallelContext) -> bool:
    """Checks that nothing in --save-path would be mixed with the run; returns whether it holds one to go on with."""
    path = flags.save_path
    # workers that the elastic agent starts again go on where they were, with those of a node that has just come
    (restarts,) = ctx.all_reduce_max(parallel.read_launch().restart_count)
    is_run = False
    with ctx.collective_section():
        names = os.listdir(path) if path is not None and ctx.rank == 0 and path.exists() else []
        if flags.resume or restarts:
            is_run = bool(names) and has_run(path)
            if foreign := [name for name in names if not is_run and not LEFTOVER.fullmatch(name)]:
                raise CheckpointError(f"--resume: {path} holds {shorten(foreign[0])}, but no run; choose another path")
        elif names:
            raise CheckpointError(f"--save-path {path} is not empty; go on with --resume, or choose another path")
    if flags.resume and not is_run:
        say(f"nothing to resume in {path}, starting")
    return ctx.broadcast(float(is_run))[0] > 0  # where another process sees another disk, it must fail, not begin anew


@parallel.process_group("train.py", MISTAKES)
def train(argv: list[str] | None) -> int:
    """Runs the command; returns its exit code."""
    flags, shape = parse_args(argv)
    if flags.plan:
        is_muon, dtype = flags.optimizer == "muon", torch.float32 if flags.dtype == "fp32" else torch.bfloat16
        n_states = lambda name, p: 1 if is_muon and is_hidden_matrix(name, p) else 2  # noqa: E731
        flags.world_size = flags.world_size or parallel.read_launch().world_size
        fp8_ops.gemm_impl = cast(Any, flags.gemm_impl)
        say(plan.show(plan.make_plan(shape, flags, dtype, n_states), shape, flags, flags.device_memory))
        return 0
    parallel.keep_freed_memory()
    device = parallel.pick_device(flags.device)
    if flags.compile:
        parallel.require_compiler(device)
    ctx = ParallelContext.join(device, flags.model_parallel, flags.fsdp, timeout=timedelta(minutes=flags.timeout))
    # before any other collective; files may have other paths on other machines, their content is compared
    paths = "config", "data", "val_data", "init_from", "device"
    ctx.require_equal({name: value for name, value in vars(flags).items() if name not in paths} | shape.to_dict())
    if flags.eval_only:
        return evaluate_only(flags, shape, ctx)
    with nullcontext() if flags.save_path is None else Run(flags.save_path, ctx) as kept:
        resumes = find_run(flags, ctx)
        trainer = build_trainer(flags, shape, ctx, resumes)
        trainer.run = kept
        say(describe(trainer.full_model, ctx, trainer.peak_flops, len(trainer.train_data), len(trainer.val_data)))
        if resumes:
            with ctx.collective_section():
                changed = trainer.resume(flags.save_path)
            say(f"resumed {flags.save_path} at step {trainer.step}")
            if changed:
                trainer.override(changed)
        elif trainer.origin is not None:
            say(f"begins with the weights of {metrics.describe_origin(trainer.origin)}")
        return run(trainer)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command.run("train.py", lambda: train(argv), MISTAKES)


if __name__ == "__main__":
    sys.exit(main())
