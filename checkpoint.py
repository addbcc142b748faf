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

import ctypes
import math
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from byte_tokenizer import one_line
from fp8_ops import BLOCK, E4M3
from huggingface import args_from_hf, hf_name, mtp_copies
from model import ConfigError, ModelArgs, Transformer
from tensor_files import (
    DTYPE_NAMES,
    Box,
    CheckpointError,
    Entry,
    Output,
    Piece,
    Stored,
    final_path,
    inside,
    make_piece,
    naming,
    new_folder,
    read_header,
    read_json,
    remove_leftover,
    replace_json,
    reporting,
    shown,
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


# --- Who holds what --------------------------------------------------------------------------------------------------

_COLUMN_PARALLEL = {"wq", "wq_b", "wkv_b", "wk", "wv", "w1", "w3", "embed", "head"}
_ROW_PARALLEL = {"wo", "w2"}


def cut(name: str, shape: tuple[int, ...], n_experts: int, rank: int, world: int) -> Box | None:
    """Says what a rank holds of a tensor: the one place that knows how native checkpoints are sharded.

    "Column-parallel" layers are split by outputs, the rows of a weight as it is stored, "row-parallel" ones by inputs.
    Routed experts stay whole and are dealt out by number. Everything else is held by every rank.

    Args:
        name: The tensor's native name.
        shape: Its whole shape; a vector counts as one row.
        n_experts: `n_routed_experts`.
        rank: Which part, from 0 on.
        world: Of how many, a number that `check_parallel` accepts.

    Returns:
        The rectangle, or None if the rank holds nothing of it.
    """
    rows, cols = (1, *shape)[-2:]
    parts = name.split(".")
    if rank not in holders(name, n_experts, world):
        return None
    if ".experts." in name:
        return Box(0, rows, 0, cols)
    if parts[-2] in _COLUMN_PARALLEL:
        return Box(rows * rank // world, rows * (rank + 1) // world, 0, cols)
    if parts[-2] in _ROW_PARALLEL:
        return Box(0, rows, cols * rank // world, cols * (rank + 1) // world)
    return Box(0, rows, 0, cols)


def holders(name: str, n_experts: int, world: int) -> range:
    """The ranks that hold something of a tensor: one for a routed expert's, else all."""
    _, is_routed, rest = name.partition(".experts.")
    if not is_routed:
        return range(world)
    owner = int(rest.split(".")[0]) // (n_experts // world)
    return range(owner, owner + 1)


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is one of those in the dtype that the model computes in: norms and the router have their own."""
    return len(shape) > 1 and not name.endswith("gate.weight")


def check_parallel(args: ModelArgs, world: int, what: str = "--model-parallel") -> None:
    """Refuses a number of shards that a model cannot be cut into.

    Args:
        args: The model's shape.
        world: The number of shards.
        what: Whence that number comes, for the message.

    Raises:
        CheckpointError: It does not divide some size of the model; the message has those that do.
    """
    sizes = {"vocab_size": args.vocab_size, "n_heads": args.n_heads}
    layers = [args.is_moe(i) for i in range(args.n_layers + args.n_mtp_layers)]
    if any(layers):
        sizes["n_routed_experts"] = args.n_routed_experts
        sizes["n_shared_experts * moe_inter_dim"] = args.n_shared_experts * args.moe_inter_dim
    if not all(layers):
        sizes["inter_dim"] = args.inter_dim
    common = math.gcd(*sizes.values())
    for key, size in sizes.items():
        if size % world:
            works = ", ".join(str(n) for n in range(1, min(common, 1024) + 1) if common % n == 0)
            raise CheckpointError(f"{key} = {size} cannot be cut into {world}; {what} can be {works}")


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
        config: What its config.json says.
        args: The model's shape.
        tensors: Its weights by native name.
        fp8_layers: Those of them that are FP8 in an FP8 checkpoint.
    """

    folder: Path
    config: dict[str, Any]
    args: ModelArgs
    tensors: dict[str, Stored]
    fp8_layers: set[str]

    @property
    def is_fp8(self) -> bool:
        """Whether any weight is stored in FP8."""
        return any(source.dtype == E4M3 for source in self.tensors.values())


def open_checkpoint(path: str | os.PathLike, which: str = "best") -> Checkpoint:
    """Finds a checkpoint's tensors and checks them against its config; reads none of them.

    Args:
        path: A checkpoint's folder, native of any number of shards or Hugging Face's; or a run's.
        which: Which checkpoint of a run, the "best" or the "last".

    Raises:
        CheckpointError: There is none, or something in it does not fit.
        ConfigError: Its config is not one of a model.
    """
    folder = _resolve(Path(path), which)
    config = read_json(folder / CONFIG_FILE, ConfigError)
    is_hf = "model_type" in config
    if is_hf:
        with naming(folder / CONFIG_FILE):
            args = args_from_hf(config)
        files, shards = [folder / INDEX_FILE], [read_hf_headers(folder)]
    else:
        args, _ = read_config(folder / CONFIG_FILE)
        files = _native_files(folder)
        shards = [read_header(file) for file in files]
    shapes, fp8_layers = _weights_of(args, folder, sum(map(len, shards)))
    try:
        check_parallel(args, len(shards), "the number of files")
    except CheckpointError as error:
        raise CheckpointError(f"{files[0]} and the others are not of the model of {CONFIG_FILE}: {error}") from None
    tensors = {name: Stored(hf_name(name, args) if is_hf else name, shape) for name, shape in shapes.items()}
    copies = _take_extras(shards[0], args) if is_hf else []
    for rank, (left, file) in enumerate(zip(shards, files, strict=True)):
        for name, source in tensors.items():
            box = cut(name, source.shape, args.n_routed_experts, rank, len(shards))
            if box is not None:
                _take(left, source, box, file, is_hf)
        for entry in left.values():
            raise CheckpointError(f"{entry} has no place in the model of {CONFIG_FILE}")
    for name, entry in copies:
        if (entry.dtype, entry.shape) != (tensors[name].dtype, tensors[name].shape):
            raise CheckpointError(f"{entry} must be a copy of {tensors[name].name}, but has another shape or dtype")
        tensors[name].copies.append(Piece(entry, tensors[name].box))
    for name, source in tensors.items():
        if source.dtype == E4M3 and name not in fp8_layers:
            raise CheckpointError(f"{source.pieces[0].entry} is FP8, which it never is here")
    return Checkpoint(folder, config, args, tensors, fp8_layers)


def _resolve(path: Path, which: str) -> Path:
    """The checkpoint's folder that `path` means: itself, or the "last" or "best" of a run."""
    if (path / CONFIG_FILE).is_file():
        return path
    if has_run(path):
        name = _pointer(path).get(which)
        for folder in path.iterdir():  # a name that leads elsewhere is not among these
            if folder.name == name and (folder / CONFIG_FILE).is_file():
                return folder
        raise CheckpointError(f"{path / POINTER_FILE} names {shown(name)}, which is no checkpoint beside it")
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder; train.py --save-path {path} makes one")
    raise CheckpointError(f"{path} holds no checkpoint: neither {CONFIG_FILE} nor {POINTER_FILE} is in it")


def _take(left: dict[str, Entry], source: Stored, box: Box, where: Path, is_hf: bool) -> None:
    """Takes a rank's part of a tensor, and its scales, out of what is left of a shard; checks both."""
    name = source.name
    if name not in left:
        raise CheckpointError(f"{where}: tensor {name} is missing; {CONFIG_FILE} wants it")
    entry = left.pop(name)
    shape, dtype = source.shape if len(source.shape) == 1 else box.shape, DTYPE_NAMES[entry.dtype]
    if entry.shape != shape:
        sizes = f"{list(entry.shape)}, {CONFIG_FILE} wants {list(shape)}"
        raise CheckpointError(f"{entry} has shape {sizes}")
    if entry.dtype not in WEIGHT_DTYPES or source.pieces and source.dtype != entry.dtype:
        raise CheckpointError(f"{entry} is {dtype}: no dtype of weights, or not that in the other files")
    scale = left.pop(scale_name(name, is_hf), None) if entry.dtype == E4M3 else None
    piece = make_piece(entry, box, scale)
    source.dtype = entry.dtype
    (source.copies if any(box == other.box for other in source.pieces) else source.pieces).append(piece)


def scale_name(name: str, is_hf: bool) -> str:
    """The name of a weight's scales."""
    return name + "_scale_inv" if is_hf else name.removesuffix("weight") + "scale"


def _take_extras(left: dict[str, Entry], args: ModelArgs) -> list[tuple[str, Entry]]:
    """Takes what a Hugging Face checkpoint may have beside the weights; returns the copies among it, to be compared."""
    for layer in range(args.n_layers + args.n_mtp_layers):  # older ones keep the rotary frequencies
        left.pop(f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", None)
    return [(native, left.pop(name)) for native, name in mtp_copies(args) if name in left]


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
        raise _too_large(folder, error) from None
    tensors = {name: tensor for name, _, tensor in _native_parts(whole, Crew())}
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if not name.endswith(".scale")}
    return shapes, {name for name in shapes if tensors[name].dtype == E4M3}


def _too_large(folder: Path, error: Exception) -> CheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(f"{folder / CONFIG_FILE} is of a model that is too large: {shown(reason)}")


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


def read_hf_headers(folder: Path) -> dict[str, Entry]:
    """Reads the headers of a Hugging Face checkpoint's files, by its index if it has one.

    Raises:
        CheckpointError: The index leads out of the folder, or it and the files contradict each other.
    """
    index = folder / INDEX_FILE
    found = {path.name for path in folder.glob("*.safetensors")}
    if index.exists():
        where = read_json(index, CheckpointError).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise CheckpointError(f"{index} has no weight_map that names a file for each tensor")
    elif found == {"model.safetensors"}:
        where = dict.fromkeys(read_header(inside(folder, "model.safetensors")), "model.safetensors")
    else:
        raise CheckpointError(f"{folder} needs {INDEX_FILE}, or model.safetensors and no other such file")
    for name, file in where.items():
        if file != Path(file).name or not file.endswith(".safetensors") or not file.isprintable():
            raise CheckpointError(f"{index}: tensor {shown(name)} is in {shown(file)}, which is no file of the folder")
    entries: dict[str, Entry] = {}
    for file in sorted(found | set(where.values())):
        if file not in where.values():
            raise CheckpointError(f"{folder / file} is none of the files that {INDEX_FILE} names; remove it")
        for name, entry in read_header(inside(folder, file)).items():
            if where.get(name) != file:
                raise CheckpointError(f"{entry} is in it, but not in {INDEX_FILE}")
            entries[name] = entry
    for name in where.keys() - entries.keys():
        raise CheckpointError(f"{folder / where[name]}: tensor {shown(name)} is not in it, but in {INDEX_FILE}")
    return entries


# --- Processes -------------------------------------------------------------------------------------------------------


class Crew:
    """The processes that hold a model together and write its checkpoints; this base class is one process alone.

    Attributes:
        rank: This process among all.
        mp_rank: Which part of the model it holds, of `mp`.
        mp: Into how many parts the model is cut.
        writes_copies: Whether it is the one to write what several processes hold.
    """

    rank = 0
    mp_rank = 0
    mp = 1
    writes_copies = True

    def agree(self, error: Exception | None = None) -> None:
        """Waits for all; if one of them comes with an error, each raises an error."""
        if error is not None:
            raise error

    def local(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int | None]:
        """What this process holds of a tensor of its part of the model, and from which row on; None: all of it."""
        return tensor, None

    @contextmanager
    def together(self) -> Iterator[None]:
        """A part of the work, at the end of which each knows whether all have done theirs."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.agree(error)
        else:
            self.agree()


@contextmanager
def _new_folder_together(path: Path, crew: Crew) -> Iterator[Path]:
    """`new_folder`, by the first of a crew for all."""
    with ExitStack() as stack:
        with crew.together():
            if crew.rank == 0:
                stack.enter_context(new_folder(path))
        yield temporary_path(path)
        with crew.together():
            stack.close()


# --- Models ----------------------------------------------------------------------------------------------------------


def save_model(model: Transformer, path: str | os.PathLike) -> None:
    """Writes a model as a native checkpoint; `path` appears when it is complete, or not at all.

    Weights stored in FP8 are written as they are, with their scales.

    Raises:
        CheckpointError: `path` exists and is no empty folder, or cannot be written.
    """
    with new_folder(Path(path)) as folder:
        _write_weights(model, folder, Crew())


def load_model(
    path: str | os.PathLike,
    device: str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
    keep_fp8: bool = False,
    make: Callable[..., Transformer] = Transformer,
    crew: Crew | None = None,
) -> Transformer:
    """Loads a model for inference: its matrices are cast once, while they are read, to the dtype they compute in.

    Args:
        path: A checkpoint's folder, native of any number of shards or Hugging Face's; or a run's, of which the best
            checkpoint is taken.
        device: Where the model goes.
        compute_dtype: Dtype of activations and of the matrices; the router's stay in float32.
        keep_fp8: Keep weights that are stored in FP8 in it. By default they are dequantised.
        make: Makes the model from its shape, `compute_dtype` and whether it has FP8 weights.
        crew: The processes over which `make` spreads it; this one reads its part only.

    Raises:
        CheckpointError: No checkpoint there, or one that does not fit its own config.
        ConfigError: Its config is not one of a model.
    """
    crew = crew or Crew()
    checkpoint = open_checkpoint(path)
    check_parallel(checkpoint.args, crew.mp, "the number of processes")
    try:
        model = make(checkpoint.args, compute_dtype, fp8_weights=keep_fp8 and checkpoint.is_fp8)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise _too_large(checkpoint.folder, error) from None
    for name, p in model.named_parameters():
        if is_matrix(name, p.shape) and p.dtype != E4M3:
            p.data = torch.empty_like(p, dtype=compute_dtype)
    _read_weights(model, checkpoint, crew)
    return model.to(device).eval().requires_grad_(False)


def whole_shapes(model: Transformer, crew: Crew) -> dict[str, tuple[int, ...]]:
    """The shapes of the whole model's parameters and buffers, by their names in its `state_dict`."""
    if crew.mp > 1:
        with torch.device("meta"):
            model = Transformer(model.args, fp8_weights=True)
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def part_box(name: str, shape: tuple[int, ...], rank: int, world: int) -> Box:
    """Says which rectangle of a whole tensor of `state_dict`, or of its optimizer's state, one part of a model has.

    Args:
        name: The tensor's name in `state_dict`, where routed experts are stacked.
        shape: Its whole shape; rows of stacked matrices count one after the other.
        rank: Which part.
        world: Of how many.
    """
    if ".experts." in name:
        rows = math.prod(shape[:-1])
        return Box(rows * rank // world, rows * (rank + 1) // world, 0, shape[-1])
    return cut(name, shape, 0, rank, world)


def held(name: str, tensor: torch.Tensor, shape: tuple[int, ...], crew: Crew) -> Box:
    """Says which rectangle of a whole tensor a process holds: of its `part_box`, what FSDP leaves to it.

    Args:
        name: Its name in `state_dict`.
        tensor: Its tensor in this process's part of the model, of which `crew.local` may hold some rows.
        shape: Its whole shape.
        crew: The processes.
    """
    box = part_box(name, shape, crew.mp_rank, crew.mp)
    part, first = crew.local(tensor)
    if first is None:
        return box
    last = first + len(part)
    if len(shape) == 1:
        return box._replace(left=box.left + first, right=box.left + last)
    rows = math.prod(tensor.shape[1:-1])  # of one matrix of a stack
    return box._replace(top=box.top + first * rows, bottom=box.top + last * rows)


def _native_parts(model: Transformer, crew: Crew) -> Iterator[tuple[str, Box, torch.Tensor]]:
    """What a process holds of a model: native names, rectangles of the whole tensors, and tensors of those shapes.

    Stacked experts come one by one, as views.
    """
    shapes = whole_shapes(model, crew)
    for name, tensor in model.state_dict().items():
        box, (part, _) = held(name, tensor, shapes[name], crew), crew.local(tensor)
        owner, is_routed, leaf = name.partition(".experts.")
        if is_routed:
            rows = shapes[name][1]
            for e, matrix in enumerate(part, box.top // rows):
                yield f"{owner}.experts.{e}.{leaf}", Box(0, rows, 0, shapes[name][2]), matrix
        elif part.numel():
            yield name, box, part


def _write_weights(model: Transformer, folder: Path, crew: Crew) -> None:
    shapes = whole_shapes(model, crew)
    is_fp8 = any(t.dtype == E4M3 for t in model.state_dict().values())
    whole = {}
    for name, tensor in model.state_dict().items():
        shape, (owner, is_routed, leaf) = shapes[name], name.partition(".experts.")
        names = [f"{owner}.experts.{e}.{leaf}" for e in range(shape[0])] if is_routed else [name]
        whole |= dict.fromkeys(names, (tensor.dtype, shape[1:] if is_routed else shape))
    if crew.rank == 0:
        dtype = "fp8" if is_fp8 else "fp32" if model.head.weight.dtype == torch.float32 else "bf16"
        write_json(folder / CONFIG_FILE, model.args.to_dict() | {"dtype": dtype})
    boxes = lambda name, rank: cut(name, whole[name][1], model.args.n_routed_experts, rank, crew.mp)  # noqa: E731
    copies = {name for name, t in model.state_dict().items() if crew.local(t)[1] is None}
    owned = [part for part in _native_parts(model, crew) if crew.writes_copies or _stacked(part[0]) not in copies]
    _write_shards("model", folder, whole, boxes, owned, crew)


def _stacked(name: str) -> str:
    """The name in `state_dict` of a tensor with a native name."""
    return re.sub(r"\.experts\.\d+\.", ".experts.", name)


def _write_shards(
    kind: str,
    folder: Path,
    whole: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    boxes: Callable[[str, int], Box | None],
    parts: list[tuple[str, Box, torch.Tensor]],
    crew: Crew,
) -> None:
    """Writes one file for each part of the model, each process what it holds into the file of its part.

    Args:
        kind: First word of the files' names.
        folder: Where to.
        whole: Dtype and whole shape of every tensor.
        boxes: What a rank's file has of a tensor, by its name.
        parts: What this process writes: names, rectangles, and tensors that lie in them row by row.
        crew: The processes.
    """

    def in_file(name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        (dtype, shape), box = whole[name], boxes(name, crew.mp_rank)
        if len(shape) == 3:
            return dtype, (box.shape[0] // shape[1], *shape[1:])
        return dtype, box.shape if len(shape) == 2 else (box.shape[1],) if shape else ()

    tensors = {name: in_file(name) for name in whole if boxes(name, crew.mp_rank) is not None}
    output = Output(native_file(crew.mp_rank, crew.mp, kind), tensors)
    with crew.together():
        if crew.writes_copies:
            with reporting(final_path(folder)):
                output.create(folder)
    with crew.together(), reporting(final_path(folder)), open(folder / output.name, "r+b", buffering=0) as file:
        for name, box, tensor in parts:
            entry, around = output.entries[name], boxes(name, crew.mp_rank)
            start = (box.top - around.top) * around.shape[1] + box.left - around.left
            file.seek(entry.offset + start * entry.dtype.itemsize)
            write_all(file, tensor.detach().cpu())
        os.fsync(file.fileno())


@torch.no_grad()
def _read_weights(model: Transformer, checkpoint: Checkpoint, crew: Crew) -> None:
    """Fills what a process holds of a model, band by band, in whatever dtypes it was made with."""
    parts = {name: (box, tensor) for name, box, tensor in _native_parts(model, crew)}
    for name, (box, target) in parts.items():
        if name not in checkpoint.tensors:  # scales, which go with their weights
            continue
        source = checkpoint.tensors[name]
        if target.dtype == E4M3:
            q, s = source.read_fp8(box, checkpoint.args.scale_fmt)
            target.copy_(q)
            parts[scale_name(name, False)][1].copy_(s)
        else:
            rows = target.view(box.shape)
            for band in source.bands(box, BLOCK):
                rows[band.top - box.top : band.bottom - box.top] = source.read(band, target.dtype)


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
    crew: Crew | None = None,
) -> Path:
    """Writes a checkpoint of a training run, points to it, and removes those that are neither last nor best any more.

    Every process of a crew calls it, and writes what it holds into files that all share.

    Args:
        run: The run's folder; made if there is none.
        model: The model.
        optimizer: The optimizer's state of each parameter, by the parameter's name.
        state: The rest of it, ready for JSON; "step" gives the checkpoint its name.
        is_best: Whether this is the best checkpoint so far.
        crew: The processes that write it together.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: It cannot be written. What was there before is still whole.
    """
    crew = crew or Crew()
    path = run / f"step-{state['step']:08d}"
    with crew.together():
        pointer = _pointer(run)
    if path.name in pointer.values():  # saved before it was evaluated: the tensors are these
        with crew.together(), reporting(path):
            if crew.rank == 0:
                replace_json(path / STATE_FILE, state)
    else:
        if crew.rank == 0:
            shutil.rmtree(path, ignore_errors=True)  # complete, but never pointed to: the leftover of a crash
        with _new_folder_together(path, crew) as folder:
            if crew.rank == 0:
                write_json(folder / STATE_FILE, state)
            _write_weights(model, folder, crew)
            _write_state(model, optimizer, folder, crew)
    with crew.together(), reporting(run):
        if crew.rank == 0:
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
    run: Path, model: Transformer, crew: Crew | None = None
) -> tuple[Callable[[str, nn.Parameter], dict[str, torch.Tensor]], dict[str, Any]]:
    """Loads the last checkpoint of a run into `model`.

    Args:
        run: The run's folder.
        model: The model, or this process's part of it.
        crew: The processes that hold it together; they need not be as many as wrote the checkpoint.

    Returns:
        A function that reads the optimizer's state of a parameter, from its name and the parameter itself: tensors in
        its shape, or of a single number; and the state that `save_run` was given.

    Raises:
        CheckpointError: There is none, it is damaged, or it is one of another model.
    """
    crew = crew or Crew()
    checkpoint = open_checkpoint(run, "last")
    folder = checkpoint.folder
    ours, theirs = model.args.to_dict(), checkpoint.args.to_dict()
    for key in ours:
        if ours[key] != theirs[key] and key not in ("dtype", "max_batch_size"):
            raise CheckpointError(
                f"{folder} was trained with {key} = {theirs[key]}, the config says {ours[key]}; "
                "resume with the config it began with, or choose another --save-path"
            )
    _read_weights(model, checkpoint, crew)
    shards, names = [read_header(path) for path in _native_files(folder, "state")], dict(model.named_parameters())
    for name, entry in shards[0].items():
        if name.rpartition(".")[0] not in names:
            raise CheckpointError(f"{entry} belongs to no parameter of this model; start a new run")
    read = partial(_read_state, shards, whole_shapes(model, crew), crew)
    return read, read_json(folder / STATE_FILE, CheckpointError)


def _write_state(model: Transformer, optimizer: dict[str, dict[str, torch.Tensor]], folder: Path, crew: Crew) -> None:
    shapes, whole, parts = whole_shapes(model, crew), {}, []
    parameters = dict(model.named_parameters())
    for name, values in optimizer.items():
        p = parameters[name]
        for key, value in values.items():
            is_number = value.ndim == 0
            whole[f"{name}.{key}"] = value.dtype, () if is_number else shapes[name]
            box = Box(0, 1, 0, 1) if is_number else held(name, p, shapes[name], crew)
            part, first = crew.local(value)
            if crew.writes_copies or first is not None:
                parts.append((f"{name}.{key}", box, part))

    def boxes(name: str, rank: int) -> Box:
        if not whole[name][1]:
            return Box(0, 1, 0, 1)
        return part_box(name.rpartition(".")[0], whole[name][1], rank, crew.mp)

    _write_shards("state", folder, whole, boxes, parts, crew)


@torch.no_grad()
def _read_state(
    shards: list[dict[str, Entry]],
    shapes: dict[str, tuple[int, ...]],
    crew: Crew,
    name: str,
    p: nn.Parameter,
) -> dict[str, torch.Tensor]:
    """Reads what a process needs of the optimizer's state of one parameter; see `load_run`."""
    found = {}
    for full_name, entry in shards[0].items():
        owner, _, key = full_name.rpartition(".")
        if owner != name:
            continue
        if not entry.shape:
            found[key] = entry.read()
            continue
        source = Stored(full_name, shapes[name], entry.dtype)
        for rank, shard in enumerate(shards):
            box = part_box(name, shapes[name], rank, len(shards))
            if full_name not in shard or math.prod(shard[full_name].shape) != math.prod(box.shape):
                raise CheckpointError(f"{entry.path.parent}: optimizer state {full_name} does not fit the model")
            source.pieces.append(Piece(shard[full_name], box))
            if box == source.box:  # every rank has all of it
                break
        box = held(name, p, shapes[name], crew)
        found[key] = source.read_bytes(box).view(entry.dtype).view(crew.local(p)[0].shape)
    return found


# --- Commands --------------------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Asks glibc's malloc to keep what is freed, instead of returning it to the system and fetching it again.

    Bands of a tensor, as activations in training, are a few megabytes that come and go hundreds of times a second. By
    default each is a fresh mapping whose pages the kernel must clear, which costs more than the arithmetic on them.
    Elsewhere than on glibc, nothing happens.
    """
    m_trim_threshold, m_mmap_threshold, two_gib = -1, -3, (1 << 31) - 1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, two_gib)


@contextmanager
def _terminable() -> Iterator[None]:
    """Has SIGTERM end the process as an exception does, so that what is half-done is removed."""

    def end(*_: Any) -> None:
        sys.exit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_command(name: str, command: Callable[[], None]) -> int:
    """Runs a command, with a user's mistake told in one line; returns its exit code."""
    torch.set_num_threads(1)  # several tensors are on their way at a time
    keep_freed_memory()
    try:
        with _terminable():
            command()
    except (CheckpointError, ConfigError, OSError) as error:
        print(f"{name}: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
