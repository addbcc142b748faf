"""Checkpoints: the one place that knows what files a model is kept in, and what its tensors are called there.

The same tensors are kept in two formats, which are told apart by looking:

    native                                           Hugging Face
    config.json              the `ModelArgs`         config.json                    of a class of transformers
    model0-mp2.safetensors   what rank 0 of 2 holds  model-00001-of-00007.safetensors
    model1-mp2.safetensors   what rank 1 of 2 holds  model.safetensors.index.json   which tensor is in which file
                                                     generation_config.json, tokenizer.json, tokenizer_config.json

Native files are what DeepSeek's own inference code reads. That of rank 0 of 2 has the upper half of `wq`, the left half
of `wo`, half of the experts, and all of a norm: one function, `cut`, says which rectangle of a tensor a rank holds. The
names are DeepSeek's too, with a `scale` beside each `weight` in FP8, and every expert's tensors by themselves, which a
model has stacked.

A run's folder holds checkpoints `step-00000500`, native ones with `state.json` (where training stood) and
`state0-mp1.safetensors` (the optimizer's tensors), and `checkpoints.json`, which says which of them is the last and
which the best. Whatever takes a checkpoint takes a run's folder too, and means its best.

Nothing here is ever seen half-written. A folder is filled under a temporary name, flushed to disk and renamed; then
`checkpoints.json` is replaced; only then is an older checkpoint removed. A crash between any two of these leaves a
`checkpoints.json` that names complete folders, and litter that the next save sweeps up.
"""

import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from command import shorten
from fp8_ops import BLOCK, E4M3
from model import ConfigError, ModelArgs, Transformer
from parallel import ParallelContext, check_model_parallel, full_shapes, local_slice, native_slice, state_slice
from safetensors_io import (
    DTYPE_NAMES,
    CheckpointError,
    SafetensorsWriter,
    ShardedTensor,
    ShardSlice,
    Slice2D,
    TensorInfo,
    final_path,
    inside,
    naming,
    new_folder,
    read_header,
    read_json,
    remove_leftover,
    replace_json,
    reporting,
    shard_slice,
    temporary_path,
    write_all,
    write_json,
)

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
INDEX_FILE = "model.safetensors.index.json"
STATE_FILE = "state.json"
POINTER_FILE = "checkpoints.json"
CONFIG_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", E4M3: "fp8"}
WEIGHT_DTYPES = {*CONFIG_DTYPES, torch.float16, torch.float64}


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_config(path: str | os.PathLike) -> tuple[ModelArgs, dict[str, Any]]:
    """Reads a config file.

    Args:
        path: A JSON file of `ModelArgs` fields; its nested key "train" holds defaults for train.py's flags.

    Returns:
        The model's shape, and the object under "train" (empty without one).

    Raises:
        ConfigError: The file is missing or no JSON object, or a key of it is wrong; the message names both.
    """
    values = read_json(Path(path), ConfigError)
    train = values.pop("train", {})
    if not isinstance(train, dict):
        raise ConfigError(f"{path}: train must be an object of flags, got {train!r}")
    with naming(path):
        return ModelArgs.from_dict(values), train


@dataclass
class Checkpoint:
    """A checkpoint whose headers were read and checked: every tensor is there, of its shape, and none besides.

    Attributes:
        folder: Where it is.
        args: The model's shape.
        tensors: Its weights by native name.
        fp8_layers: Those of them that are FP8 in an FP8 checkpoint.
        config: Its config.json, if that is in Hugging Face's format.
    """

    folder: Path
    args: ModelArgs
    tensors: dict[str, ShardedTensor]
    fp8_layers: set[str]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def is_fp8(self) -> bool:
        """Whether any weight is stored in FP8."""
        return any(source.dtype == E4M3 for source in self.tensors.values())


def native_scale_name(name: str) -> str:
    """The native name of a weight's scales."""
    return name.removesuffix("weight") + "scale"


def open_native(path: str | os.PathLike, which: str = "best") -> Checkpoint:
    """Finds the tensors of a native checkpoint and checks them against its config; reads none of them.

    Args:
        path: A checkpoint's folder, of any number of shards, or a run's.
        which: Which checkpoint of a run, the "best" or the "last".

    Raises:
        CheckpointError: There is none, or something in it does not fit.
        ConfigError: Its config is not one of a model.
    """
    folder = resolve_run(Path(path), which)
    args, _ = read_config(folder / CONFIG_FILE)
    files = _native_files(folder)
    return collect_tensors(folder, args, files, [read_header(file) for file in files])


def collect_tensors(
    folder: Path,
    args: ModelArgs,
    files: list[Path],
    headers: list[dict[str, TensorInfo]],
    stored_name: Callable[[str], str] = lambda name: name,
    scale_name: Callable[[str], str] = native_scale_name,
    replicas: Iterable[tuple[str, str]] = (),
) -> Checkpoint:
    """Finds each tensor of a model in the headers of a checkpoint's files, and checks that there are no others.

    Args:
        folder: The checkpoint's folder.
        args: The model's shape.
        files: The file of each rank, for messages.
        headers: The header of each rank's file; what belongs to the model is removed from them.
        stored_name: The name in the files of a tensor with a native name.
        scale_name: The name in the files of the scales of a weight with a stored name.
        replicas: Native name of a tensor and stored name of a copy, which may be there and must be equal.

    Raises:
        CheckpointError: Something is missing, superfluous, or does not fit the model.
    """
    shapes, fp8_layers = _weights_of(args, folder, sum(map(len, headers)))
    try:
        check_model_parallel(args, len(headers), "the number of files")
    except CheckpointError as error:
        raise CheckpointError(f"{files[0]} and the others are not of the model of {CONFIG_FILE}: {error}") from None
    tensors = {name: ShardedTensor(stored_name(name), shape) for name, shape in shapes.items()}
    copies = [(native, headers[0].pop(name)) for native, name in replicas if name in headers[0]]
    for rank, (left, file) in enumerate(zip(headers, files, strict=True)):
        for name, source in tensors.items():
            box = native_slice(name, source.shape, args.n_routed_experts, rank, len(headers))
            if box is not None:
                _take(left, source, box, file, scale_name)
        for info in left.values():
            raise CheckpointError(f"{info} has no place in the model of {CONFIG_FILE}")
    for name, info in copies:
        if (info.dtype, info.shape) != (tensors[name].dtype, tensors[name].shape):
            raise CheckpointError(f"{info} must be a copy of {tensors[name].name}, but has another shape or dtype")
        tensors[name].replicas.append(ShardSlice(info, tensors[name].box))
    for name, source in tensors.items():
        if source.dtype == E4M3 and name not in fp8_layers:
            raise CheckpointError(f"{source.shards[0].info} is FP8, which it never is here")
    return Checkpoint(folder, args, tensors, fp8_layers)


def resolve_run(path: Path, which: str) -> Path:
    """The checkpoint's folder that `path` means: itself, or the "last" or "best" of a run."""
    if (path / CONFIG_FILE).is_file():
        return path
    if has_run(path):
        name = _pointer(path).get(which)
        for folder in path.iterdir():  # a name that leads elsewhere is not among these
            if folder.name == name and (folder / CONFIG_FILE).is_file():
                return folder
        raise CheckpointError(f"{path / POINTER_FILE} names {shorten(name)}, which is no checkpoint beside it")
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder; train.py --save-path {path} makes one")
    raise CheckpointError(f"{path} holds no checkpoint: neither {CONFIG_FILE} nor {POINTER_FILE} is in it")


def _take(
    left: dict[str, TensorInfo], source: ShardedTensor, box: Slice2D, where: Path, scale_name: Callable[[str], str]
) -> None:
    """Takes a rank's part of a tensor, and its scales, out of what is left of a shard; checks both."""
    name = source.name
    if name not in left:
        raise CheckpointError(f"{where}: tensor {name} is missing; {CONFIG_FILE} wants it")
    info = left.pop(name)
    shape, dtype = source.shape if len(source.shape) == 1 else box.shape, DTYPE_NAMES[info.dtype]
    if info.shape != shape:
        sizes = f"{list(info.shape)}, {CONFIG_FILE} wants {list(shape)}"
        raise CheckpointError(f"{info} has shape {sizes}")
    if info.dtype not in WEIGHT_DTYPES or source.shards and source.dtype != info.dtype:
        raise CheckpointError(f"{info} is {dtype}: no dtype of weights, or not that in the other files")
    scale = left.pop(scale_name(name), None) if info.dtype == E4M3 else None
    piece = shard_slice(info, box, scale)
    source.dtype = info.dtype
    (source.replicas if any(box == other.box for other in source.shards) else source.shards).append(piece)


def _weights_of(args: ModelArgs, folder: Path, count: int) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Asks the model, made without memory, for the shapes of its weights, and for those that may be FP8.

    A config that wants many more than the `count` tensors that there are is refused before such a model is made.
    """
    moe = sum(args.is_moe(i) for i in range(min(args.n_layers + args.n_mtp_layers, count)))
    if args.n_layers + args.n_mtp_layers + moe * args.n_routed_experts > count:
        raise CheckpointError(f"{folder / CONFIG_FILE} wants more than the {count} tensors here: tensors are missing")
    try:
        with torch.device("meta"):
            whole = Transformer(args, fp8_weights=True)
    except (RuntimeError, OverflowError) as error:
        raise too_large(folder, error) from None
    tensors = {name: tensor for name, _, tensor in _native_parts(whole, ParallelContext())}
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if not name.endswith(".scale")}
    return shapes, {name for name in shapes if tensors[name].dtype == E4M3}


def too_large(folder: Path, error: Exception) -> CheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(f"{folder / CONFIG_FILE} is of a model that is too large: {shorten(reason)}")


def native_file(rank: int, world: int, kind: str = "model") -> str:
    """The name of a rank's file."""
    return f"{kind}{rank}-mp{world}.safetensors"


def _native_files(folder: Path, kind: str = "model") -> list[Path]:
    """The files of a native checkpoint, one a rank, and beside "model" those of "state"; there may be no others."""
    found, worlds = sorted(path.name for path in folder.glob("*.safetensors")), {"model": 1, "state": 1}
    for name in found:
        if match := re.fullmatch(r"(model|state)\d+-mp([1-9]\d{0,3})\.safetensors", name):
            worlds[match[1]] = max(worlds[match[1]], int(match[2]))
    names = {k: [native_file(rank, world, k) for rank in range(world)] for k, world in worlds.items()}
    for name in found:
        if not any(name in expected for expected in names.values()):
            count = len(names["model"])
            raise CheckpointError(f"{folder / name} is none of the {count} files of this checkpoint; remove it")
    return [inside(folder, name) for name in names[kind]]


@contextmanager
def _new_folder_together(path: Path, ctx: ParallelContext) -> Iterator[Path]:
    """`new_folder`, by the first of a ctx for all."""
    with ExitStack() as stack:
        with ctx.collective_section():
            if ctx.rank == 0:
                stack.enter_context(new_folder(path))
        yield temporary_path(path)
        with ctx.collective_section():
            stack.close()


# --- Models ----------------------------------------------------------------------------------------------------------


def save_model(model: Transformer, path: str | os.PathLike) -> None:
    """Writes a model as a native checkpoint; `path` appears when it is complete, or not at all.

    Weights stored in FP8 are written as they are, with their scales.

    Raises:
        CheckpointError: `path` exists and is no empty folder, or cannot be written.
    """
    with new_folder(Path(path)) as folder:
        _write_weights(model, folder, ParallelContext())


def _native_parts(model: Transformer, ctx: ParallelContext) -> Iterator[tuple[str, Slice2D, torch.Tensor]]:
    """What a process holds of a model: native names, rectangles of the whole tensors, and tensors of those shapes.

    Stacked experts come one by one, as views.
    """
    shapes = full_shapes(model, ctx)
    for name, tensor in model.state_dict().items():
        box, (part, _) = local_slice(name, tensor, shapes[name], ctx), ctx.local_shard(tensor)
        owner, is_routed, leaf = name.partition(".experts.")
        if is_routed:
            rows = shapes[name][1]
            for e, matrix in enumerate(part, box.top // rows):
                yield f"{owner}.experts.{e}.{leaf}", Slice2D(0, rows, 0, shapes[name][2]), matrix
        elif part.numel():
            yield name, box, part


def _write_weights(model: Transformer, folder: Path, ctx: ParallelContext) -> None:
    shapes = full_shapes(model, ctx)
    is_fp8 = any(t.dtype == E4M3 for t in model.state_dict().values())
    whole = {}
    for name, tensor in model.state_dict().items():
        shape, (owner, is_routed, leaf) = shapes[name], name.partition(".experts.")
        names = [f"{owner}.experts.{e}.{leaf}" for e in range(shape[0])] if is_routed else [name]
        whole |= dict.fromkeys(names, (tensor.dtype, shape[1:] if is_routed else shape))
    if ctx.rank == 0:
        dtype = "fp8" if is_fp8 else "fp32" if model.head.weight.dtype == torch.float32 else "bf16"
        write_json(folder / CONFIG_FILE, model.args.to_dict() | {"dtype": dtype})
    boxes = lambda name, rank: native_slice(name, whole[name][1], model.args.n_routed_experts, rank, ctx.mp_size)  # noqa: E731
    copies = {name for name, t in model.state_dict().items() if ctx.local_shard(t)[1] is None}
    owned = [part for part in _native_parts(model, ctx) if ctx.writes_replicated or _stacked(part[0]) not in copies]
    _write_shards("model", folder, whole, boxes, owned, ctx)


def _stacked(name: str) -> str:
    """The name in `state_dict` of a tensor with a native name."""
    return re.sub(r"\.experts\.\d+\.", ".experts.", name)


def _write_shards(
    kind: str,
    folder: Path,
    whole: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    boxes: Callable[[str, int], Slice2D | None],
    parts: list[tuple[str, Slice2D, torch.Tensor]],
    ctx: ParallelContext,
) -> None:
    """Writes one file for each part of the model, each process what it holds into the file of its part.

    Args:
        kind: First word of the files' names.
        folder: Where to.
        whole: Dtype and whole shape of every tensor.
        boxes: What a rank's file has of a tensor, by its name.
        parts: What this process writes: names, rectangles, and tensors that lie in them row by row.
        ctx: The processes.
    """

    def in_file(name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        (dtype, shape), box = whole[name], boxes(name, ctx.mp_rank)
        if len(shape) == 3:
            return dtype, (box.shape[0] // shape[1], *shape[1:])
        return dtype, box.shape if len(shape) == 2 else (box.shape[1],) if shape else ()

    tensors = {name: in_file(name) for name in whole if boxes(name, ctx.mp_rank) is not None}
    output = SafetensorsWriter(native_file(ctx.mp_rank, ctx.mp_size, kind), tensors)
    with ctx.collective_section():
        if ctx.writes_replicated:
            with reporting(final_path(folder)):
                output.create(folder)
    with (
        ctx.collective_section(),
        reporting(final_path(folder)),
        open(folder / output.name, "r+b", buffering=0) as file,
    ):
        for name, box, tensor in parts:
            info, around = output.infos[name], boxes(name, ctx.mp_rank)
            start = (box.top - around.top) * around.shape[1] + box.left - around.left
            file.seek(info.offset + start * info.dtype.itemsize)
            write_all(file, tensor.detach().cpu())
        os.fsync(file.fileno())


@torch.no_grad()
def load_weights(model: Transformer, checkpoint: Checkpoint, ctx: ParallelContext) -> None:
    """Fills what a process holds of a model, band by band, in whatever dtypes it was made with."""
    parts = {name: (box, tensor) for name, box, tensor in _native_parts(model, ctx)}
    for name, (box, target) in parts.items():
        if name not in checkpoint.tensors:  # scales, which go with their weights
            continue
        source = checkpoint.tensors[name]
        if target.dtype == E4M3:
            q, s = source.read_fp8(box, checkpoint.args.scale_fmt)
            target.copy_(q)
            parts[native_scale_name(name)][1].copy_(s)
        else:
            rows = target.view(box.shape)
            for band in source.bands(box, BLOCK):
                rows[band.within(box)] = source.read(band, target.dtype)


# --- Runs ------------------------------------------------------------------------------------------------------------


def has_run(run: Path) -> bool:
    """Whether a folder holds a run that can be resumed."""
    return (run / POINTER_FILE).exists() or bool(_pointer(run))


def _pointer(run: Path) -> dict[str, Any]:
    """The names of a run's last and best checkpoint: the newest, if the pointer was not yet written, or is lost."""
    if (run / POINTER_FILE).exists():
        return read_json(run / POINTER_FILE, CheckpointError)
    steps = [file.parent.name for file in run.glob(f"step-*/{STATE_FILE}")]
    steps = [name for name in steps if re.fullmatch(r"step-\d{8,}", name)]
    return dict.fromkeys(("last", "best"), max(steps, key=lambda name: int(name[5:]))) if steps else {}


def save_run(
    run: Path,
    model: Transformer,
    optimizer: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    is_best: bool,
    ctx: ParallelContext | None = None,
) -> Path:
    """Writes a checkpoint of a training run, points to it, and removes those that are neither last nor best any more.

    Every process of a ctx calls it, and writes what it holds into files that all share.

    Args:
        run: The run's folder; made if there is none.
        model: The model.
        optimizer: The optimizer's state of each parameter, by the parameter's name.
        state: The rest of it, ready for JSON; "step" gives the checkpoint its name.
        is_best: Whether this is the best checkpoint so far.
        ctx: The processes that write it together.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: It cannot be written. What was there before is still whole.
    """
    ctx = ctx or ParallelContext()
    path = run / f"step-{state['step']:08d}"
    with ctx.collective_section():
        pointer = _pointer(run)
    if path.name in pointer.values():  # saved before it was evaluated: the tensors are these
        with ctx.collective_section(), reporting(path):
            if ctx.rank == 0:
                replace_json(path / STATE_FILE, state)
    else:
        if ctx.rank == 0:
            shutil.rmtree(path, ignore_errors=True)  # complete, but never pointed to: the leftover of a crash
        with _new_folder_together(path, ctx) as folder:
            if ctx.rank == 0:
                write_json(folder / STATE_FILE, state)
            _write_weights(model, folder, ctx)
            _write_state(model, optimizer, folder, ctx)
    with ctx.collective_section(), reporting(run):
        if ctx.rank == 0:
            pointer["last"] = path.name
            if is_best or "best" not in pointer:
                pointer["best"] = path.name
            replace_json(run / POINTER_FILE, pointer)
            _sweep(run, set(pointer.values()))
    return path


def _sweep(run: Path, kept: set[str]) -> None:
    """Removes checkpoints other than those named, and what processes that died have left; nothing with other names."""
    for old in list(run.iterdir()):
        if re.fullmatch(r"step-\d{8,}", old.name) and old.name not in kept:
            shutil.rmtree(old, ignore_errors=True)
        elif match := re.fullmatch(r"\.(step-\d{8,})\.(tmp|lock)", old.name):
            remove_leftover(run / match[1])


def load_run(
    run: Path, model: Transformer, ctx: ParallelContext | None = None
) -> tuple[Callable[[str, nn.Parameter], dict[str, torch.Tensor]], dict[str, Any]]:
    """Loads the last checkpoint of a run into `model`.

    Args:
        run: The run's folder.
        model: The model, or this process's part of it.
        ctx: The processes that hold it together; they need not be as many as wrote the checkpoint.

    Returns:
        A function that reads the optimizer's state of a parameter, from its name and the parameter itself: tensors in
        its shape, or of a single number; and the state that `save_run` was given.

    Raises:
        CheckpointError: There is none, it is damaged, or it is one of another model.
    """
    ctx = ctx or ParallelContext()
    checkpoint = open_native(run, "last")
    folder = checkpoint.folder
    ours, theirs = model.args.to_dict(), checkpoint.args.to_dict()
    for key in ours:
        if ours[key] != theirs[key] and key not in ("dtype", "max_batch_size"):
            raise CheckpointError(
                f"{folder} was trained with {key} = {theirs[key]}, the config says {ours[key]}; "
                "resume with the config it began with, or choose another --save-path"
            )
    load_weights(model, checkpoint, ctx)
    shards, names = [read_header(path) for path in _native_files(folder, "state")], dict(model.named_parameters())
    for name, info in shards[0].items():
        if name.rpartition(".")[0] not in names:
            raise CheckpointError(f"{info} belongs to no parameter of this model; start a new run")
    read = partial(_read_state, shards, full_shapes(model, ctx), ctx)
    return read, read_json(folder / STATE_FILE, CheckpointError)


def _write_state(
    model: Transformer, optimizer: dict[str, dict[str, torch.Tensor]], folder: Path, ctx: ParallelContext
) -> None:
    shapes, whole, parts = full_shapes(model, ctx), {}, []
    parameters = dict(model.named_parameters())
    for name, values in optimizer.items():
        p = parameters[name]
        for key, value in values.items():
            is_number = value.ndim == 0
            whole[f"{name}.{key}"] = value.dtype, () if is_number else shapes[name]
            box = Slice2D(0, 1, 0, 1) if is_number else local_slice(name, p, shapes[name], ctx)
            part, first = ctx.local_shard(value)
            if ctx.writes_replicated or first is not None:
                parts.append((f"{name}.{key}", box, part))

    def boxes(name: str, rank: int) -> Slice2D:
        if not whole[name][1]:
            return Slice2D(0, 1, 0, 1)
        return state_slice(name.rpartition(".")[0], whole[name][1], rank, ctx.mp_size)

    _write_shards("state", folder, whole, boxes, parts, ctx)


@torch.no_grad()
def _read_state(
    shards: list[dict[str, TensorInfo]],
    shapes: dict[str, tuple[int, ...]],
    ctx: ParallelContext,
    name: str,
    p: nn.Parameter,
) -> dict[str, torch.Tensor]:
    """Reads what a process needs of the optimizer's state of one parameter; see `load_run`."""
    found = {}
    for full_name, info in shards[0].items():
        owner, _, key = full_name.rpartition(".")
        if owner != name:
            continue
        if not info.shape:
            found[key] = info.read()
            continue
        source = ShardedTensor(full_name, shapes[name], info.dtype)
        for rank, shard in enumerate(shards):
            box = state_slice(name, shapes[name], rank, len(shards))
            if full_name not in shard or math.prod(shard[full_name].shape) != math.prod(box.shape):
                raise CheckpointError(f"{info.path.parent}: optimizer state {full_name} does not fit the model")
            source.shards.append(ShardSlice(shard[full_name], box))
            if box == source.box:  # every rank has all of it
                break
        box = local_slice(name, p, shapes[name], ctx)
        found[key] = source.read_bytes(box).view(info.dtype).view(ctx.local_shard(p)[0].shape)
    return found
