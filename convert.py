"""Checkpoints: the one place that knows what files a model is kept in, and what its tensors are called there.

    python convert.py --ckpt-path SRC --save-path DST [--model-parallel N] [--format native|hf] [--dtype fp32|bf16|fp8]

The same tensors are kept in two formats, which are told apart by looking:

    native                                           Hugging Face
    config.json              the `ModelArgs`         config.json                    of a class of transformers
    model0-mp2.safetensors   what rank 0 of 2 holds  model-00001-of-00007.safetensors
    model1-mp2.safetensors   what rank 1 of 2 holds  model.safetensors.index.json   which tensor is in which file
                                                     generation_config.json, tokenizer.json, tokenizer_config.json

A tensor is a matrix, and each file that has some of it has a rectangle: that of rank 0 of 2 the upper half of `wq`, the
left half of `wo`, half of the experts, and all of a norm. One function, `cut`, says which rectangle a rank holds, and
every conversion copies rectangles: read a band of rows from wherever its pieces are, change its dtype if need be, write
its parts to wherever they belong. Nothing larger than a band is in memory, each byte is read and written once, and
several tensors are on their way at a time.

A safetensors file is the length of a header in eight bytes, the header, JSON that says of each tensor its dtype, shape
and place, and then the tensors' bytes. Headers are read here and not believed: what is wrong in one is told in a line
that names the file and the tensor.

FP8 weights have a scale for each block of 128×128, which a file counts from the corner of its own rectangle. So a cut
through a block, or a seam within one, is exact if no new block needs two different scales, and refused otherwise.

A run's folder holds checkpoints `step-00000500`, native ones with `state.json` (where training stood) and
`state0-mp1.safetensors` (the optimizer's tensors), and `checkpoints.json`, which says which of them is the last and
which the best. Whatever takes a checkpoint takes a run's folder too, and means its best.

Nothing here is ever seen half-written. A folder is filled under a temporary name, flushed to disk and renamed; then
`checkpoints.json` is replaced; only then is an older checkpoint removed. A crash between any two of these leaves a
`checkpoints.json` that names complete folders, and litter that the next save sweeps up.
"""

import argparse
import ctypes
import json
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from fp8_ops import BLOCK, E4M3, weight_dequant, weight_quant
from model import ConfigError, ModelArgs, Transformer

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
INDEX_FILE = "model.safetensors.index.json"
STATE_FILE = "state.json"
POINTER_FILE = "checkpoints.json"

BAND_BYTES = 1 << 20  # read of a tensor at a time: much for a disk, little for a cache and for malloc
MAX_HEADER_BYTES = 32 << 20  # a trillion parameters in 400 experts a layer, all in one file, need half of it
MAX_FILE_BYTES = 5 * 10**9  # of a Hugging Face checkpoint's files
MAX_LAYERS = 10_000  # more in a config are not worth a try
# The dtypes of safetensors, in its own order: a file's tensors lie in the opposite one.
DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2, "F8_E4M3": E4M3},
    **{"F8_E8M0": torch.float8_e8m0fnu, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16},
    **{"BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "F64": torch.float64},
    **{"I64": torch.int64, "U64": torch.uint64},
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CONFIG_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", E4M3: "fp8"}
WEIGHT_DTYPES = {*CONFIG_DTYPES, torch.float16, torch.float64}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another model: the message names the file and the remedy."""


# --- Rectangles ------------------------------------------------------------------------------------------------------

_COLUMN_PARALLEL = {"wq", "wq_b", "wkv_b", "wk", "wv", "w1", "w3", "embed", "head"}
_ROW_PARALLEL = {"wo", "w2"}


class Box(NamedTuple):
    """A rectangle of a matrix: rows `top` to `bottom` and columns `left` to `right`, ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    def meet(self, other: "Box") -> "Box | None":
        """The part that two rectangles share; None where there is none."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Box(top, bottom, left, right) if top < bottom and left < right else None

    def within(self, outer: "Box") -> tuple[slice, slice]:
        """Its rows and columns, counted from the corner of a rectangle around it."""
        rows = slice(self.top - outer.top, self.bottom - outer.top)
        return rows, slice(self.left - outer.left, self.right - outer.left)


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
    if rank not in _holders(name, n_experts, world):
        return None
    if ".experts." in name:
        return Box(0, rows, 0, cols)
    if parts[-2] in _COLUMN_PARALLEL:
        return Box(rows * rank // world, rows * (rank + 1) // world, 0, cols)
    if parts[-2] in _ROW_PARALLEL:
        return Box(0, rows, cols * rank // world, cols * (rank + 1) // world)
    return Box(0, rows, 0, cols)


def _holders(name: str, n_experts: int, world: int) -> range:
    """The ranks that hold something of a tensor: one for a routed expert's, else all."""
    _, is_routed, rest = name.partition(".experts.")
    if not is_routed:
        return range(world)
    owner = int(rest.split(".")[0]) // (n_experts // world)
    return range(owner, owner + 1)


def check_parallel(args: ModelArgs, world: int) -> None:
    """Refuses a number of shards that a model cannot be cut into.

    Args:
        args: The model's shape.
        world: The number of shards.

    Raises:
        CheckpointError: It does not divide some size of the model; the message has those that do.
    """
    sizes = {"vocab_size": args.vocab_size, "n_heads": args.n_heads}
    if args.n_routed_experts:
        sizes["n_routed_experts"] = args.n_routed_experts
        sizes["n_shared_experts * moe_inter_dim"] = args.n_shared_experts * args.moe_inter_dim
    if not all(args.is_moe(i) for i in range(args.n_layers + args.n_mtp_layers)):
        sizes["inter_dim"] = args.inter_dim
    common = math.gcd(*sizes.values())
    for key, size in sizes.items():
        if size % world:
            works = ", ".join(str(n) for n in range(1, min(common, 1024) + 1) if common % n == 0)
            raise CheckpointError(f"{key} = {size} cannot be cut into {world}; --model-parallel can be {works}")


def cut_scales(parts: list[tuple[Box, torch.Tensor]], box: Box) -> torch.Tensor | None:
    """Finds the scales of a rectangle of FP8 weights which stay as they are while their blocks become others.

    Args:
        parts: Rectangles side by side, or one above the other, each with its scales (⌈rows/128⌉, ⌈columns/128⌉).
        box: The rectangle asked for, anywhere in them.

    Returns:
        Its scales, or None where a block would need two different ones.
    """
    across = int(len({part.left for part, _ in parts}) > 1)  # the dimension in which they follow each other
    parts = sorted(parts, key=lambda item: item[0])
    scales = torch.cat([s for _, s in parts], dim=across)
    for dim in (0, 1):
        sizes = [part.shape[dim] for part, _ in (parts if dim == across else parts[:1])]
        blocks, first = [], 0  # of each row, or column, the block that it is in
        for size in sizes:
            blocks.append(torch.arange(size) // BLOCK + first)
            first += -(-size // BLOCK)
        start = (box.top - parts[0][0].top, box.left - parts[0][0].left)[dim]
        old = torch.cat(blocks)[start : start + box.shape[dim]]
        new = old[::BLOCK]
        edges = (old.diff(prepend=old[:1] - 1) != 0).nonzero().flatten()  # where an old block begins
        if not torch.equal(scales.index_select(dim, old[edges]), scales.index_select(dim, new[edges // BLOCK])):
            return None
        scales = scales.index_select(dim, new)
    return scales


def _is_aligned(box: Box) -> bool:
    """Whether each block of a rectangle lies within one block of the whole matrix."""
    ends = ((box.top, box.bottom), (box.left, box.right))
    return all(
        x // BLOCK == (min(x + BLOCK, end) - 1) // BLOCK for start, end in ends for x in range(start, end, BLOCK)
    )


# --- safetensors -----------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A tensor in a file: what it is, and at which byte of the file it starts."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def __str__(self) -> str:
        return f"{self.path}: tensor {shown(self.name)}"

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """Reads the whole tensor."""
        out = torch.empty(self.n_bytes, dtype=torch.uint8)
        with _opened(self.path) as file:
            _fill(file, self.offset, out)
        return out.view(self.dtype).view(self.shape)


def read_header(path: Path) -> dict[str, Entry]:
    """Reads the header of a safetensors file and checks all that it says.

    Args:
        path: The file.

    Returns:
        Its tensors by name, not yet read.

    Raises:
        CheckpointError: The file is missing, truncated or no safetensors, or the header contradicts itself or the file.
    """
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length
        if start > size or length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} cannot be read as safetensors: {size} bytes with a header of {length}")
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
        header = {name: value for name, value in header.items() if name != "__metadata__"}
    except (ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors, its header is no JSON object: {error}") from None
    entries, offsets = {}, []
    for name, value in header.items():
        what = f"{path}: tensor {shown(name)}"
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{what} needs dtype, shape and data_offsets in the header")
        dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(f"{what} is of the unknown dtype {shown(dtype)}")
        if not _is_sizes(shape) or not _is_sizes(place) or len(place) != 2:
            raise CheckpointError(f"{what} has impossible shape {shown(shape)} or data_offsets {shown(place)}")
        entries[name] = entry = Entry(path, name, DTYPES[dtype], tuple(shape), start + place[0])
        if place[1] - place[0] != entry.n_bytes:
            raise CheckpointError(f"{what}: {dtype} {shape} takes {entry.n_bytes} bytes, data_offsets say {place}")
        offsets.append((entry.offset, entry.n_bytes, name))
    end = start
    for offset, n_bytes, name in sorted(offsets):
        if offset != end:
            raise CheckpointError(f"{path}: tensor {shown(name)} must start at byte {end}, the header says {offset}")
        end += n_bytes
    if end != size:
        raise CheckpointError(f"{path} is truncated or damaged: it has {size} bytes, its header speaks of {end}")
    return entries


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) < 9 and all(type(x) is int and 0 <= x < 1 << 62 for x in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, no key of which occurs twice or could not be written again."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{shown(next(key for key in keys if keys.count(key) > 1))} is in it twice")
    "".join(found).encode()
    return found


def shown(value: Any) -> str:
    """What a file says, fit for a line of an error message."""
    text = str(value)
    text = text if len(text) < 150 else text[:150] + "…"
    return text if text.isprintable() and text else ascii(text)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens a file to read; what goes wrong with it becomes a CheckpointError that names it."""
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the checkpoint is incomplete") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _fill(file: Any, offset: int, out: torch.Tensor) -> None:
    """Reads bytes from `offset` on into contiguous uint8 memory; other threads run meanwhile."""
    view, done = memoryview(out.reshape(-1).numpy()), 0
    file.seek(offset)
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{file.name} ends before byte {offset + len(view)}: it was truncated meanwhile")
        done += count


# --- Reading ---------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A rectangle of a tensor in a file, and its scales if it is FP8."""

    entry: Entry
    box: Box
    scale: Entry | None = None

    def read(self, part: Box, out: torch.Tensor) -> None:
        """Reads a part of the rectangle, as it is stored, into uint8 (rows, bytes of a row)."""
        size = self.entry.dtype.itemsize
        rows, cols = part.within(self.box)
        stride = self.box.shape[1] * size
        with _opened(self.entry.path) as file:
            if out.is_contiguous() and out.shape[1] == stride:
                _fill(file, self.entry.offset + rows.start * stride, out)
            else:  # only what is asked for of each row, to where it belongs
                for i, row in enumerate(out, rows.start):
                    _fill(file, self.entry.offset + i * stride + cols.start * size, row)

    def read_scales(self) -> torch.Tensor:
        """Reads the scales and checks them."""
        s = self.scale.read()
        if not (s.isfinite() & (s >= 0)).all():
            raise CheckpointError(f"{self.scale} has scales that are not all finite and positive")
        return s


@dataclass
class Stored:
    """A tensor, wherever its pieces are.

    Attributes:
        name: Its name in the files.
        shape: Its whole shape.
        dtype: What it is stored in.
        pieces: Rectangles that cover it.
        copies: More of the whole, which must be equal: replicated to each rank, or to the MTP modules.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    pieces: list[Piece] = field(default_factory=list)
    copies: list[Piece] = field(default_factory=list)

    @property
    def box(self) -> Box:
        shape = (1, *self.shape)
        return Box(0, math.prod(shape[:-1]), 0, shape[-1])

    def bands(self, box: Box, step: int = 1) -> Iterator[Box]:
        """Cuts a rectangle into bands of rows to be read at a time, of a multiple of `step` rows each."""
        height = BAND_BYTES // max(1, box.shape[1] * self.dtype.itemsize)
        height = max(step, height - height % step)
        for top in range(box.top, box.bottom, height):
            yield box._replace(top=top, bottom=min(top + height, box.bottom))

    def read_bytes(self, box: Box) -> torch.Tensor:
        """Reads a rectangle as it is stored: uint8 (rows, bytes of a row). Compares the copies, if there are any."""
        size = self.dtype.itemsize
        out = torch.empty(box.shape[0], box.shape[1] * size, dtype=torch.uint8)
        for piece in self.pieces:
            if (part := piece.box.meet(box)) is not None:
                rows, cols = part.within(box)
                piece.read(part, out[rows, cols.start * size : cols.stop * size])
        for copy in self.copies:
            copy.read(box, other := torch.empty_like(out))
            if not torch.equal(other, out):
                first = self.pieces[0].entry
                raise CheckpointError(f"{copy.entry} differs from {first.name} in {first.path.name}: two models")
        return out

    def read(self, box: Box, dtype: torch.dtype) -> torch.Tensor:
        """Reads a rectangle as numbers of `dtype`: FP8 is dequantised."""
        if self.dtype != E4M3:
            return self.read_bytes(box).view(self.dtype).to(dtype)
        out = torch.empty(box.shape, dtype=dtype)
        for piece in self.pieces:
            if (part := piece.box.meet(box)) is not None:
                rows, cols = part.within(piece.box)
                top, left = rows.start // BLOCK, cols.start // BLOCK  # from where its first block begins
                around = part._replace(top=piece.box.top + top * BLOCK, left=piece.box.left + left * BLOCK)
                s = piece.read_scales()[top : -(-rows.stop // BLOCK), left : -(-cols.stop // BLOCK)]
                piece.read(around, q := torch.empty(around.shape, dtype=torch.uint8))
                out[part.within(box)] = weight_dequant(q.view(E4M3), s, dtype=dtype)[part.within(around)]
        return out

    def read_fp8(self, box: Box, scale_fmt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads a rectangle as FP8 and its scales: as it is stored, or else quantised now."""
        if self.dtype != E4M3:
            return weight_quant(self.read(box, torch.float32), scale_fmt=scale_fmt)
        return self.read_bytes(box).view(E4M3), self.scales([(p.box, p.read_scales()) for p in self.pieces], box)

    def scales(self, parts: list[tuple[Box, torch.Tensor]], box: Box) -> torch.Tensor:
        """`cut_scales`, or an error in its place."""
        found = cut_scales(parts, box)
        if found is None:
            raise CheckpointError(
                f"{self.pieces[0].entry} {list(self.shape)} cannot be cut or joined so in FP8: a block"
                f" of {BLOCK}×{BLOCK} would need two scales; take another --model-parallel, or --dtype bf16"
            )
        return found


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
    check_parallel(args, len(shards))
    tensors = {name: Stored(_hf_name(name, args) if is_hf else name, shape) for name, shape in shapes.items()}
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


def make_piece(entry: Entry, box: Box, scale: Entry | None) -> Piece:
    """Puts a weight and its scales together, once they are checked to fit.

    Raises:
        CheckpointError: An FP8 weight without scales, or with some of another shape or dtype.
    """
    if entry.dtype == E4M3:
        wanted = tuple(-(-n // BLOCK) for n in box.shape)
        if scale is None:
            raise CheckpointError(f"{entry} is FP8, but its scale is missing")
        if (scale.dtype, scale.shape) != (torch.float32, wanted):
            got = f"{DTYPE_NAMES[scale.dtype]} {list(scale.shape)}, not F32 {list(wanted)}"
            raise CheckpointError(f"{scale}, the scale of a weight {list(entry.shape)}, is {got}")
    return Piece(entry, box, scale)


def scale_name(name: str, is_hf: bool) -> str:
    """The name of a weight's scales."""
    return name + "_scale_inv" if is_hf else name.removesuffix("weight") + "scale"


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
        raise CheckpointError(f"{folder / CONFIG_FILE} is of a model that is too large: {error}") from None
    tensors = {name: tensor for name, _, tensor in _native_parts(whole, Crew())}
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if not name.endswith(".scale")}
    return shapes, {name for name in shapes if tensors[name].dtype == E4M3}


def _native_file(rank: int, world: int, kind: str = "model") -> str:
    return f"{kind}{rank}-mp{world}.safetensors"


def _native_files(folder: Path, kind: str = "model") -> list[Path]:
    """The files of a native checkpoint, one a rank, and beside "model" those of "state"; there may be no others."""
    found, worlds = sorted(path.name for path in folder.glob("*.safetensors")), {"model": 1, "state": 1}
    for name in found:
        if match := re.fullmatch(r"(model|state)\d+-mp([1-9]\d{0,3})\.safetensors", name):
            worlds[match[1]] = max(worlds[match[1]], int(match[2]))
    names = {k: [_native_file(rank, world, k) for rank in range(world)] for k, world in worlds.items()}
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


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder, once it is checked that it is no link to elsewhere.

    Raises:
        CheckpointError: It is one, and not just to the blobs beside the snapshot in a cache of Hugging Face's hub.
    """
    home, target = folder.resolve(), (folder / name).resolve()
    if target.parent not in (home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])):
        raise CheckpointError(f"{folder / name} is a link that leads out of the folder, to {target}")
    return folder / name


# --- Models in and out ------------------------------------------------------------------------------------------------


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
    crew: "Crew | None" = None,
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
    check_parallel(checkpoint.args, crew.mp)
    model = make(checkpoint.args, compute_dtype, fp8_weights=keep_fp8 and checkpoint.is_fp8)
    for name, p in model.named_parameters():
        if p.ndim >= 2 and p.dtype != E4M3 and not name.endswith("gate.weight"):
            p.data = torch.empty_like(p, dtype=compute_dtype)
    _read_weights(model, checkpoint, crew)
    return model.to(device).eval().requires_grad_(False)


def has_run(run: Path) -> bool:
    """Whether a folder holds a run that can be resumed."""
    return (run / POINTER_FILE).exists()


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
        pointer = read_json(run / POINTER_FILE, CheckpointError) if has_run(run) else {}
    if path.name in pointer.values():  # saved before it was evaluated: the tensors are these
        with crew.together(), _reported(path):
            if crew.rank == 0:
                _replace_json(path / STATE_FILE, state)
    else:
        if crew.rank == 0:
            shutil.rmtree(path, ignore_errors=True)  # complete, but never pointed to: the leftover of a crash
        with _new_folder_together(path, crew) as folder:
            if crew.rank == 0:
                write_json(folder / STATE_FILE, state)
            _write_weights(model, folder, crew)
            _write_state(model, optimizer, folder, crew)
    with crew.together(), _reported(run):
        if crew.rank == 0:
            pointer["last"] = path.name
            if is_best or "best" not in pointer:
                pointer["best"] = path.name
            _replace_json(run / POINTER_FILE, pointer)
            for old in [*run.glob("step-*"), *run.glob(".step-*.tmp")]:
                if old.name not in pointer.values():
                    shutil.rmtree(old, ignore_errors=True)
    return path


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
    read = partial(_read_state, shards, whole_shapes(model.args), checkpoint.args, crew)
    return read, read_json(folder / STATE_FILE, CheckpointError)


def _resolve(path: Path, which: str) -> Path:
    """The checkpoint's folder that `path` means: itself, or the "last" or "best" of a run."""
    if (path / CONFIG_FILE).is_file():
        return path
    if has_run(path):
        name = read_json(path / POINTER_FILE, CheckpointError).get(which)
        for folder in path.iterdir():  # a name that leads elsewhere is not among these
            if folder.name == name and (folder / CONFIG_FILE).is_file():
                return folder
        raise CheckpointError(f"{path / POINTER_FILE} names {name!r}, which is no checkpoint beside it")
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder; train.py --save-path {path} makes one")
    raise CheckpointError(f"{path} holds no checkpoint: neither {CONFIG_FILE} nor {POINTER_FILE} is in it")


def whole_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The shapes of the whole model's parameters and buffers, by their names in its `state_dict`."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in Transformer(args, fp8_weights=True).state_dict().items()}


def held(name: str, tensor: torch.Tensor, shape: tuple[int, ...], args: ModelArgs, crew: Crew) -> Box:
    """Says which rectangle of a whole parameter, rows of stacked matrices one after the other, a process holds of it.

    Args:
        name: Its name in `state_dict`.
        tensor: Its tensor in this process's part of the model, of which `crew.local` may hold some rows.
        shape: Its whole shape.
        args: The model's shape.
        crew: The processes.
    """
    if ".experts." in name:
        rows = math.prod(shape[:-1])
        box = Box(rows * crew.mp_rank // crew.mp, rows * (crew.mp_rank + 1) // crew.mp, 0, shape[-1])
    else:
        box = cut(name, shape, 0, crew.mp_rank, crew.mp)
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
    shapes = whole_shapes(model.args)
    for name, tensor in model.state_dict().items():
        box, (part, _) = held(name, tensor, shapes[name], model.args, crew), crew.local(tensor)
        owner, is_routed, leaf = name.partition(".experts.")
        if is_routed:
            rows = shapes[name][1]
            for e, matrix in enumerate(part, box.top // rows):
                yield f"{owner}.experts.{e}.{leaf}", Box(0, rows, 0, shapes[name][2]), matrix
        elif part.numel():
            yield name, box, part


def _write_weights(model: Transformer, folder: Path, crew: Crew) -> None:
    shapes = whole_shapes(model.args)
    parts = [(n, b, t) for n, b, t in _native_parts(model, crew)]
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
    owned = [part for part in parts if crew.writes_copies or _stacked(part[0]) not in copies]
    _write_shards("model", folder, whole, boxes, owned, crew)


def _stacked(name: str) -> str:
    """The name in `state_dict` of a tensor with a native name."""
    return re.sub(r"\.experts\.\d+\.", ".experts.", name)


def _write_state(model: Transformer, optimizer: dict[str, dict[str, torch.Tensor]], folder: Path, crew: Crew) -> None:
    shapes, whole, parts = whole_shapes(model.args), {}, []
    parameters = dict(model.named_parameters())
    for name, values in optimizer.items():
        p = parameters[name]
        for key, value in values.items():
            is_number = value.ndim == 0
            whole[f"{name}.{key}"] = value.dtype, () if is_number else shapes[name]
            box = Box(0, 1, 0, 1) if is_number else held(name, p, shapes[name], model.args, crew)
            part, first = crew.local(value)
            if crew.writes_copies or first is not None:
                parts.append((f"{name}.{key}", box, part))

    def boxes(name: str, rank: int) -> Box:
        if not whole[name][1]:
            return Box(0, 1, 0, 1)
        return state_box(name.rpartition(".")[0], whole[name][1], rank, crew.mp)

    _write_shards("state", folder, whole, boxes, parts, crew)


def state_box(name: str, shape: tuple[int, ...], rank: int, world: int) -> Box:
    """What a rank's file has of the optimizer's state of a parameter, whose name in `state_dict` is given."""
    rows = math.prod(shape[:-1])
    if ".experts." in name:
        return Box(rows * rank // world, rows * (rank + 1) // world, 0, shape[-1])
    return cut(name, shape, 0, rank, world)


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
    output = Output(_native_file(crew.mp_rank, crew.mp, kind), tensors)
    with crew.together():
        if crew.writes_copies:
            with _reported(_final(folder)), open(folder / output.name, "xb") as file:
                file.write(output.header)
                file.truncate(output.size)
    with crew.together(), _reported(_final(folder)), open(folder / output.name, "r+b", buffering=0) as file:
        for name, box, tensor in parts:
            entry, around = output.entries[name], boxes(name, crew.mp_rank)
            start = (box.top - around.top) * around.shape[1] + box.left - around.left
            file.seek(entry.offset + start * entry.dtype.itemsize)
            _write_all(file, tensor)
        os.fsync(file.fileno())


def _write_all(file: Any, tensor: torch.Tensor) -> None:
    """Writes a tensor's bytes to an unbuffered file, which may take some of them at a time."""
    view = memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    while view:
        view = view[file.write(view) :]


@torch.no_grad()
def _read_weights(model: Transformer, checkpoint: "Checkpoint", crew: Crew) -> None:
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


@torch.no_grad()
def _read_state(
    shards: list[dict[str, Entry]],
    shapes: dict[str, tuple[int, ...]],
    args: ModelArgs,
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
            box = state_box(name, shapes[name], rank, len(shards))
            if full_name not in shard or math.prod(shard[full_name].shape) != math.prod(box.shape):
                raise CheckpointError(f"{entry.path.parent}: optimizer state {full_name} does not fit the model")
            source.pieces.append(Piece(shard[full_name], box))
            if box == source.box:  # every rank has all of it
                break
        box = held(name, p, shapes[name], args, crew)
        found[key] = source.read_bytes(box).view(entry.dtype).view(crew.local(p)[0].shape)
    return found


# --- Hugging Face ----------------------------------------------------------------------------------------------------

HF_CLASSES = {"deepseek_v3": "DeepseekV3", "deepseek_v2": "DeepseekV2", "glm4_moe_lite": "Glm4MoeLite"}
# fmt: off
HF_KEYS = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "inter_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "moe_inter_dim": "moe_intermediate_size", "n_layers": "num_hidden_layers", "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts", "n_activated_experts": "num_experts_per_tok", "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group", "route_scale": "routed_scaling_factor", "hidden_act": "hidden_act",
    "q_lora_rank": "q_lora_rank", "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim", "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
HF_ROPE_KEYS = {
    "rope_factor": "factor", "original_seq_len": "original_max_position_embeddings", "mscale": "mscale_all_dim",
    "beta_fast": "beta_fast", "beta_slow": "beta_slow",
}
HF_NAMES = {
    "embed": "embed_tokens", "attn": "self_attn", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "wq": "q_proj", "wq_a": "q_a_proj", "q_norm": "q_a_layernorm", "wq_b": "q_b_proj", "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm", "wkv_b": "kv_b_proj", "wo": "o_proj", "ffn": "mlp", "w1": "gate_proj",
    "w2": "down_proj", "w3": "up_proj", "bias": "e_score_correction_bias",
}
# What changes nothing in what a model computes; and what must be said, if anything is, since it is always so here.
HF_IGNORED = {
    "architectures", "auto_map", "bos_token_id", "bytegpt", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "id2label", "initializer_range", "label2id", "model_type", "output_attentions", "output_hidden_states",
    "pad_token_id", "problem_type", "return_dict", "router_aux_loss_coef", "seq_aux", "torch_dtype",
    "transformers_version", "use_cache", "_name_or_path",
}
HF_NEUTRAL = {
    "attention_bias": False, "attention_dropout": 0.0, "ep_size": 1, "is_encoder_decoder": False, "mlp_bias": False,
    "moe_layer_freq": 1, "output_router_logits": False, "partial_rotary_factor": 1.0, "pretraining_tp": 1,
    "rope_interleave": True, "tie_word_embeddings": False, "truncate": True,
}
HF_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
# fmt: on


def args_from_hf(config: dict[str, Any]) -> ModelArgs:
    """Translates the config of a DeepSeek-V2, DeepSeek-V3, Kimi-K2 or GLM-4-MoE-Lite model.

    Fields of `ModelArgs` that such a config cannot tell are in an object "bytegpt", where an export puts them.

    Args:
        config: What config.json says.

    Raises:
        ConfigError: A field is missing, or there is no counterpart for it here; the message names it.
    """
    derived, extra = _derive(config), config.get("bytegpt", {})
    if not isinstance(extra, dict):
        raise ConfigError(f"bytegpt must be an object, got {shown(extra)}")
    args = ModelArgs.from_dict(derived | extra)
    again = _derive(hf_config(args, torch.float32, False)) if extra else derived
    for key in derived:
        if derived[key] != again[key] and key != "scale_fmt":
            raise ConfigError(f"bytegpt contradicts the other fields, which mean {key} = {shown(derived[key])}")
    return args


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ModelArgs` that a Hugging Face config tells."""
    left = {key: value for key, value in config.items() if key not in HF_IGNORED}
    kind = "deepseek_v3" if config["model_type"] == "kimi_k2" else config["model_type"]
    if kind not in HF_CLASSES:
        raise ConfigError(f"model_type {shown(kind)} is not one of {', '.join(HF_CLASSES)}, kimi_k2")
    is_v2 = kind == "deepseek_v2"
    values: dict[str, Any] = {"score_func": "softmax" if is_v2 else "sigmoid"}
    nothing = {"q_lora_rank": 0, "n_shared_experts": 0, "n_expert_groups": 1, "n_limited_groups": 1}
    for ours, theirs in HF_KEYS.items():
        if theirs not in left:
            raise ConfigError(f"{theirs} is missing")
        value = left.pop(theirs)
        values[ours] = value = nothing.get(ours) if value is None else value
        if type(getattr(ModelArgs, ours)) is int and (type(value) is not int or abs(value) >= 1 << 40):
            raise ConfigError(f"{theirs} must be an integer, got {shown(value)}")
    if values["n_layers"] > MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers must be at most {MAX_LAYERS}, got {values['n_layers']}")
    values["n_mtp_layers"] = left.pop("num_nextn_predict_layers", left.pop("num_mtp_layers", None)) or 0
    values["aux_loss_alpha"] = left.pop("aux_loss_alpha", ModelArgs.aux_loss_alpha)
    values |= _derive_layout(left, values["n_layers"])
    values |= _derive_rope(left, values["max_seq_len"])
    values["scale_fmt"] = check_quantization(left.pop("quantization_config", None) or HF_FP8)
    method = left.pop("topk_method", None)
    if is_v2 and method in (None, "greedy"):  # the groups are there, but not looked at
        values |= {"n_expert_groups": 1, "n_limited_groups": 1}
    elif method != ("group_limited_greedy" if is_v2 else "noaux_tc") and (is_v2 or method is not None):
        raise ConfigError(f"topk_method {shown(method)} has no counterpart here with model_type {kind}")
    neutral = {
        "scoring_func": values["score_func"],
        "norm_topk_prob": not is_v2,
        "num_experts": values["n_routed_experts"],
    }
    neutral |= {"num_key_value_heads": values["n_heads"], "head_dim": values["qk_rope_head_dim"]}
    neutral |= {"qk_head_dim": values["qk_nope_head_dim"] + values["qk_rope_head_dim"]}
    _check_neutral(left, HF_NEUTRAL | neutral | {"num_local_experts": values["n_routed_experts"]})
    return values


def _check_neutral(left: dict[str, Any], neutral: dict[str, Any], where: str = "") -> None:
    """Refuses fields that have no counterpart here, unless they say what is always so."""
    for key, value in left.items():
        if key not in neutral or value is not None and value != neutral[key]:
            must = f"; it can only be {neutral[key]!r}" if key in neutral else ""
            raise ConfigError(f"{where}{shown(key)} = {shown(value)} has no counterpart here{must}")


def _derive_layout(left: dict[str, Any], n_layers: int) -> dict[str, Any]:
    """Which layers are MoE: by a list of all, or by the number of dense ones at the start."""
    types, first = left.pop("mlp_layer_types", None), left.pop("first_k_dense_replace", None)
    if types is None:
        if first is None:
            raise ConfigError("first_k_dense_replace is missing")
        return {"n_dense_layers": first, "moe_layer_freq": 1}
    if not isinstance(types, list) or len(types) != n_layers or not all(kind in ("dense", "sparse") for kind in types):
        raise ConfigError(f"mlp_layer_types must have dense or sparse for each of {n_layers} layers")
    sparse = [i for i, kind in enumerate(types) if kind == "sparse"]
    first, second = [*sparse, n_layers, n_layers + 1][:2]
    if sparse != list(range(first, n_layers, second - first)):
        raise ConfigError(
            "mlp_layer_types has no counterpart here: from one sparse layer to the next it must be as far"
        )
    return {"n_dense_layers": first, "moe_layer_freq": second - first}


def _derive_rope(left: dict[str, Any], max_seq_len: int) -> dict[str, Any]:
    """The rotary frequencies, which older and newer configs have in different places."""
    new, old = left.pop("rope_parameters", None), left.pop("rope_scaling", None)
    rope = {"rope_theta": left.pop("rope_theta", None)} | shown_dict("rope_scaling", old or new or {})
    theta, kinds = rope.pop("rope_theta"), {rope.pop("rope_type", None), rope.pop("type", None)} - {None, "default"}
    if theta is None:
        raise ConfigError("rope_theta is missing")
    if not kinds:
        _check_neutral(rope, HF_NEUTRAL, "rope_scaling.")
        return {"rope_theta": theta, "original_seq_len": max_seq_len}
    rope = {"beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": 0.0, "attention_factor": None} | rope
    if kinds != {"yarn"} or not {"factor", "original_max_position_embeddings"} <= rope.keys():
        raise ConfigError("rope_scaling must be of type yarn, with factor and original_max_position_embeddings")
    values = {ours: rope.pop(theirs) for ours, theirs in HF_ROPE_KEYS.items()}
    for key in ("beta_fast", "beta_slow", "original_seq_len"):
        values[key] = (
            int(values[key]) if isinstance(values[key], float) and values[key] == int(values[key]) else values[key]
        )
    mscale, attention = rope.pop("mscale"), rope.pop("attention_factor")
    if attention != 1 and (attention is not None or not mscale or mscale != values["mscale"]):
        raise ConfigError("rope_scaling.mscale must equal mscale_all_dim, or attention_factor be 1")
    if type(values["original_seq_len"]) is not int or max_seq_len <= values["original_seq_len"]:
        raise ConfigError("max_position_embeddings must exceed rope_scaling.original_max_position_embeddings")
    _check_neutral(rope, HF_NEUTRAL, "rope_scaling.")
    return values | {"rope_theta": theta}


def check_quantization(quantization: Any) -> str | None:
    """Refuses a `quantization_config` other than FP8 in blocks of 128×128; returns its scale format.

    Raises:
        ConfigError: It is another; the message names the field.
    """
    left = shown_dict("quantization_config", quantization)
    for key in ("modules_to_not_convert", "ignored_layers", "dequantize"):  # the tensors tell
        left.pop(key, None)
    scale_fmt = left.pop("scale_fmt", None)
    _check_neutral({"quant_method": None} | left, HF_FP8, "quantization_config.")
    return scale_fmt


def shown_dict(name: str, value: Any) -> dict[str, Any]:
    """A copy of an object of a config, or an error if it is none."""
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be an object, got {shown(value)}")
    return dict(value)


def hf_config(args: ModelArgs, dtype: torch.dtype, is_fp8: bool) -> dict[str, Any]:
    """Translates a model's shape into the config of a class of transformers.

    Args:
        args: The shape.
        dtype: What the weights that are not FP8 are stored in.
        is_fp8: Whether the others are.

    Raises:
        ConfigError: No class computes the same; the message names the field and the reason.
    """
    layout = [args.is_moe(i) for i in range(args.n_layers)]
    first = layout.index(True) if any(layout) else args.n_layers
    groups = 1 if args.n_limited_groups == args.n_expert_groups else args.n_expert_groups
    kind = "deepseek_v3" if all(layout[first:]) else "glm4_moe_lite"
    kind = "deepseek_v2" if any(layout) and args.score_func == "softmax" else kind
    is_v2 = kind == "deepseek_v2"
    # fmt: off
    reasons = {
        "kv_lora_rank = 0, plain attention": args.kv_lora_rank == 0,
        "qk_rope_head_dim = 0": args.qk_rope_head_dim == 0,
        "MoE layers without shared experts": any(layout) and args.n_shared_experts == 0,
        "gate_bias with score_func softmax": is_v2 and args.gate_bias,
        "score_func sigmoid without gate_bias": any(layout) and not is_v2 and not args.gate_bias,
        "fewer than two experts in a group": any(layout) and not is_v2 and args.n_routed_experts // groups < 2,
        "moe_layer_freq above 1 with score_func softmax": is_v2 and not all(layout[first:]),
        "n_heads that does not divide dim, with score_func softmax": is_v2 and args.dim % args.n_heads,
        "an odd qk_nope_head_dim with score_func softmax": is_v2 and args.qk_nope_head_dim % 2,
    }
    # fmt: on
    for reason, is_so in reasons.items():
        if is_so:
            raise ConfigError(f"this model cannot be exported: no class of transformers has {reason}")
    config: dict[str, Any] = {"architectures": [HF_CLASSES[kind] + "ForCausalLM"], "model_type": kind}
    config |= {theirs: getattr(args, ours) for ours, theirs in HF_KEYS.items()}
    config |= {"q_lora_rank": args.q_lora_rank or None, "num_key_value_heads": args.n_heads, "n_group": groups}
    config |= {"topk_group": min(groups, args.n_limited_groups), "num_nextn_predict_layers": args.n_mtp_layers}
    config |= {"aux_loss_alpha": args.aux_loss_alpha, "attention_bias": False, "tie_word_embeddings": False}
    config |= {"bos_token_id": 0, "eos_token_id": 0, "torch_dtype": str(dtype).removeprefix("torch.")}
    config |= {
        "scoring_func": "softmax" if is_v2 else "sigmoid",
        "norm_topk_prob": not is_v2,
        "topk_method": "noaux_tc",
    }
    if is_v2:
        config["topk_method"] = "group_limited_greedy" if groups > 1 else "greedy"
    if kind == "glm4_moe_lite":
        config["mlp_layer_types"] = ["sparse" if is_moe else "dense" for is_moe in layout]
    else:
        config |= {"first_k_dense_replace": first, "moe_layer_freq": 1}
    config |= {"rope_theta": args.rope_theta, "rope_scaling": None}
    if args.max_seq_len > args.original_seq_len:
        rope = {theirs: getattr(args, ours) for ours, theirs in HF_ROPE_KEYS.items()} | {"mscale": args.mscale}
        rope |= {"rope_type": "yarn", "type": "yarn"} | ({} if args.mscale else {"attention_factor": 1.0})
        config["rope_scaling"] = rope
    if is_fp8:
        config["quantization_config"] = HF_FP8 | ({"scale_fmt": args.scale_fmt} if args.scale_fmt else {})
    plain = ModelArgs.from_dict(_derive(config)).to_dict()
    extra = {key: value for key, value in args.to_dict().items() if value != plain[key] and key != "dtype"}
    return config | ({"bytegpt": extra} if extra else {})


def _hf_name(name: str, args: ModelArgs) -> str:
    """The Hugging Face name of a weight."""
    parts = name.split(".")
    if parts[0] == "head":
        return "lm_head.weight"
    if parts[0] == "mtp":
        inner = {"block": [], "norm": ["shared_head", "norm"]}.get(parts[2], [parts[2]])
        parts = ["layers", str(args.n_layers + int(parts[1])), *inner, *parts[3:]]
    return ".".join(["model", *(HF_NAMES.get(part, part) for part in parts)])


def _mtp_copies(args: ModelArgs) -> Iterator[tuple[str, str]]:
    """The copies of embedding and head that DeepSeek's files have in each MTP module, so ours too: both their names."""
    for layer in range(args.n_layers, args.n_layers + args.n_mtp_layers):
        yield "embed.weight", f"model.layers.{layer}.embed_tokens.weight"
        yield "head.weight", f"model.layers.{layer}.shared_head.head.weight"


def _take_extras(left: dict[str, Entry], args: ModelArgs) -> list[tuple[str, Entry]]:
    """Takes what a Hugging Face checkpoint may have beside the weights; returns the copies among it, to be compared."""
    for layer in range(args.n_layers + args.n_mtp_layers):  # older ones keep the rotary frequencies
        left.pop(f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", None)
    return [(native, left.pop(name)) for native, name in _mtp_copies(args) if name in left]


def byte_tokenizer(max_seq_len: int) -> dict[str, dict[str, Any]]:
    """The files from which transformers makes a tokenizer whose ids are the bytes of UTF-8, and 0 ends a text.

    It is BPE without merges over GPT-2's alphabet of a visible character for each byte. Only byte 0 stands for itself:
    as the special token it is looked for in the text, before that is spelled in the alphabet.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in visible}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(visible)))}
    end = {"id": 0, "content": "\0", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {letters[byte] if byte else "\0": byte for byte in range(256)}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end | {"special": True}]}
    tokenizer |= {"normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level}
    tokenizer["model"] = {"type": "BPE", "vocab": vocab, "merges": []}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "\0", "pad_token": "\0"}
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": max_seq_len}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


# --- Converting ------------------------------------------------------------------------------------------------------


class Output:
    """A safetensors file to be written, laid out as safetensors itself does it.

    Args:
        name: The file's name.
        tensors: Dtype and shape of each tensor.

    Attributes:
        entries: The tensors and their places.
        header: The bytes before them.
        size: Bytes in all.
    """

    def __init__(self, name: str, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]):
        order, end = list(DTYPES.values()), 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        places = {}
        for key in sorted(tensors, key=lambda key: (-order.index(tensors[key][0]), key)):
            places[key] = Entry(Path(name), key, *tensors[key], end)
            start, end = end, end + places[key].n_bytes
            dtype, shape = DTYPE_NAMES[tensors[key][0]], list(tensors[key][1])
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.name, self.header = name, len(text).to_bytes(8, "little") + text
        self.size = len(self.header) + end
        self.entries = {key: entry._replace(offset=len(self.header) + entry.offset) for key, entry in places.items()}


@dataclass
class Job:
    """A tensor on its way.

    Attributes:
        source: Where it is.
        dtype: What it becomes.
        parts: Where it goes: rectangles in files to be written.
    """

    source: Stored
    dtype: torch.dtype
    parts: list[Piece] = field(default_factory=list)


def make_plan(
    checkpoint: Checkpoint, world: int = 1, is_hf: bool = False, dtype: str | None = None
) -> tuple[list[Output], list[Job], dict[str, dict[str, Any]]]:
    """Lays out a conversion, for which no tensor need be read.

    Args:
        checkpoint: What to convert.
        world: Into how many shards, for the native format.
        is_hf: Into Hugging Face's format, which has no shards.
        dtype: What the linear layers become: "fp32", "bf16", "fp8", or None: what they are.

    Returns:
        The files of tensors, what goes into them, and the JSON files beside them.

    Raises:
        CheckpointError: The model cannot be cut so, or has a dtype that must be changed.
        ConfigError: No class of transformers is like this model.
    """
    args = checkpoint.args
    jobs = {name: Job(source, _new_dtype(checkpoint, name, dtype)) for name, source in checkpoint.tensors.items()}
    is_fp8, rest = any(job.dtype == E4M3 for job in jobs.values()), jobs["head.weight"].dtype
    if not is_hf:
        check_parallel(args, world)
    config = (
        hf_config(args, rest, is_fp8) if is_hf else args.to_dict() | {"dtype": "fp8" if is_fp8 else CONFIG_DTYPES[rest]}
    )
    held = [
        (_hf_name(name, args) if is_hf else name, name, rank)
        for name in jobs
        for rank in _holders(name, args.n_routed_experts, world)
    ]
    held += [(known, name, 0) for name, known in _mtp_copies(args) if is_hf]
    contents: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{} for _ in range(world)]
    boxes = {}
    for known, name, rank in held:
        shape, new = checkpoint.tensors[name].shape, jobs[name].dtype
        box = cut(name, shape, args.n_routed_experts, rank, world)
        if box is not None:
            boxes[known, rank] = name, box
            contents[rank][known] = new, box.shape[-len(shape) :]
            if new == E4M3:
                scales = tuple(-(-n // BLOCK) for n in box.shape)
                contents[rank][scale_name(known, is_hf)] = torch.float32, scales
    if is_hf:
        outputs = _split(contents[0])
    else:
        outputs = [Output(_native_file(rank, world), content) for rank, content in enumerate(contents)]
    places = {(key, 0 if is_hf else i): entry for i, out in enumerate(outputs) for key, entry in out.entries.items()}
    for (known, rank), (name, box) in boxes.items():
        jobs[name].parts.append(Piece(places[known, rank], box, places.get((scale_name(known, is_hf), rank))))
    texts = {CONFIG_FILE: config}
    if is_hf:
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        if args.vocab_size == 256:
            texts |= byte_tokenizer(args.max_seq_len)
        else:  # of a tokenizer that is not here
            ids = {key: checkpoint.config.get(key) for key in ids}
            config |= ids
        texts |= {INDEX_FILE: make_index(outputs), GENERATION_FILE: ids}
    return outputs, list(jobs.values()), texts


def _new_dtype(checkpoint: Checkpoint, name: str, wanted: str | None) -> torch.dtype:
    """What a tensor becomes: norms and the router keep their precision, unless all is to be fp32."""
    source = checkpoint.tensors[name]
    if wanted == "fp8" and name in checkpoint.fp8_layers:
        return E4M3
    if wanted == "bf16" and len(source.shape) > 1 and not name.endswith("gate.weight"):
        return torch.bfloat16
    if wanted is None and source.dtype not in CONFIG_DTYPES:
        raise CheckpointError(f"tensor {source.name} is {DTYPE_NAMES[source.dtype]}: choose a --dtype for the new one")
    return torch.float32 if wanted == "fp32" or source.dtype not in CONFIG_DTYPES else source.dtype


def _split(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[Output]:
    """Deals tensors out to files of at most 5 GB, in their order."""
    groups, size = [], MAX_FILE_BYTES
    for name, (dtype, shape) in tensors.items():
        n_bytes = math.prod(shape) * dtype.itemsize + len(name) + 150  # with what the header says
        if size + n_bytes > MAX_FILE_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = dtype, shape
        size += n_bytes
    return [Output(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def make_index(outputs: list[Output]) -> dict[str, Any]:
    """The index of a Hugging Face checkpoint: the size of its tensors and the file of each."""
    total = sum(entry.n_bytes for output in outputs for entry in output.entries.values())
    where = {name: output.name for output in outputs for name in output.entries}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}


def write_tensors(folder: Path, outputs: list[Output], jobs: list[Job], scale_fmt: str | None, progress: bool) -> None:
    """Writes files of tensors, several tensors at a time; the first error stops all.

    Args:
        folder: Where to.
        outputs: The files.
        jobs: What goes into them.
        scale_fmt: Format of new scales, as in `ModelArgs`.
        progress: Whether to show a bar on stderr.
    """
    stop, lock = threading.Event(), threading.Lock()
    total = sum(output.size for output in outputs)
    for output in outputs:
        with open(folder / output.name, "xb") as file:
            file.write(output.header)
            file.truncate(output.size)

    def write(entry: Entry, offset: int, data: torch.Tensor) -> None:
        view, done = memoryview(data.contiguous().view(torch.uint8).reshape(-1).numpy()), 0
        with open(folder / entry.path, "r+b", buffering=0) as file:
            file.seek(entry.offset + offset)
            while done < len(view) and not stop.is_set():
                done += file.write(view[done:])
        with lock:
            bar.update(done)

    def transfer(job: Job) -> None:
        source, size = job.source, job.dtype.itemsize
        quantises = job.dtype == E4M3 != source.dtype
        # blocks are counted over the whole tensor if they can be cut, else over each part
        whole = not quantises or all(_is_aligned(part.box) for part in job.parts)
        regions = [source.box] if whole else dict.fromkeys(part.box for part in job.parts)
        scales = [] if quantises or job.dtype != E4M3 else [(piece.box, piece.read_scales()) for piece in source.pieces]
        for region in regions:
            found = []
            for band in source.bands(region, 1 if job.dtype == source.dtype else BLOCK):
                if stop.is_set():
                    return
                if quantises:
                    data, s = source.read_fp8(band, scale_fmt)
                    found.append(s)
                else:
                    data = source.read_bytes(band) if job.dtype == source.dtype else source.read(band, job.dtype)
                data = data.view(torch.uint8)
                for part in job.parts:
                    if (shared := part.box.meet(band)) is not None:
                        rows, cols = shared.within(band)
                        start = (shared.top - part.box.top) * part.box.shape[1] * size
                        write(part.entry, start, data[rows, cols.start * size : cols.stop * size])
            if quantises:
                scales.append((region, torch.cat(found)))
                if not scales[-1][1].isfinite().all():
                    raise CheckpointError(f"{source.pieces[0].entry} holds NaN or infinity")
        for part in job.parts if scales else []:
            write(part.scale, 0, source.scales(scales, part.box))

    with (
        tqdm(total=total, unit="B", unit_scale=True, disable=not progress, dynamic_ncols=True) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1), initializer=torch.set_num_threads, initargs=(1,)) as executor,
    ):
        try:
            futures = [executor.submit(transfer, job) for job in jobs]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:
            stop.set()
            executor.shutdown(cancel_futures=True)


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    world: int = 1,
    is_hf: bool = False,
    dtype: str | None = None,
    progress: bool = False,
) -> None:
    """Converts a checkpoint; `target` appears when it is complete, or not at all.

    Args:
        source: A checkpoint's folder, of either format, or a run's, of which the best checkpoint is taken.
        target: The folder to make; it must not exist, or be empty.
        world: Into how many shards, for the native format.
        is_hf: Into Hugging Face's format instead.
        dtype: What the linear layers become: "fp32", "bf16", "fp8", or None: what they are.
        progress: Whether to show a bar on stderr.

    Raises:
        CheckpointError: The source is damaged or cannot be converted so, or the target cannot be written.
        ConfigError: The source's config is not one of a model, or not one that transformers has.
    """
    checkpoint = open_checkpoint(source)
    check_paths(Path(source), Path(target))
    outputs, jobs, texts = make_plan(checkpoint, world, is_hf, dtype)
    with new_folder(Path(target)) as folder:
        if checkpoint.args.vocab_size != 256:  # the tokenizer goes with it
            copy_files(checkpoint.folder, folder, checkpoint.folder.glob("*token*"))
        for name, text in texts.items():
            write_json(folder / name, text)
        write_tensors(folder, outputs, jobs, checkpoint.args.scale_fmt, progress)


def check_paths(source: Path, target: Path) -> None:
    """Refuses a target that is the source, or within it, or is made where the source is.

    Raises:
        CheckpointError: With what is wrong.
    """
    home, end = source.resolve(), target.resolve()
    if end == home or home in end.parents:
        raise CheckpointError(f"{target} is {source} or inside it; choose another path")
    if _temporary(end) in (home, *home.parents):
        raise CheckpointError(f"{source} is where {target} would be made; choose another path")


def copy_files(source: Path, target: Path, paths: Iterable[Path]) -> None:
    """Copies those of a folder's files that are no tensors."""
    for path in paths:
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(inside(source, path.name), target / path.name)


# --- Files ------------------------------------------------------------------------------------------------------------


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _final(temporary: Path) -> Path:
    return temporary.with_name(temporary.name.removeprefix(".").removesuffix(".tmp"))


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Puts the file in front of what a ConfigError says."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turns a failing write into a CheckpointError that names `path`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` at the end; after an error nothing of it remains."""
    temporary = _temporary(path)
    with _reported(path):
        if path.is_symlink() or path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise CheckpointError(f"{path} exists and is no empty folder; choose a path that does not exist")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.iterdir():
                _fsync(file)
            _fsync(temporary)
            if path.exists():  # an empty folder, which Windows would not replace
                path.rmdir()
            temporary.rename(path)
            _fsync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def _new_folder_together(path: Path, crew: Crew) -> Iterator[Path]:
    """`new_folder`, by the first of a crew for all."""
    with ExitStack() as stack:
        with crew.together():
            if crew.rank == 0:
                stack.enter_context(new_folder(path))
        yield _temporary(path)
        with crew.together():
            stack.close()


def _fsync(path: Path) -> None:
    """Forces a file or a folder's entries to disk; Windows lets neither be opened for that."""
    if os.name != "nt":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _replace_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file so that a crash leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_json(temporary, value)
    _fsync(temporary)
    temporary.replace(path)
    _fsync(path.parent)


def read_json(path: Path, error_type: type[ValueError]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error_type(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise error_type(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise error_type(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


# --- The command -----------------------------------------------------------------------------------------------------


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


def run_command(name: str, command: Callable[[], None]) -> int:
    """Runs a command, with a user's mistake told in one line; returns its exit code."""
    torch.set_num_threads(1)  # several tensors are on their way at a time
    keep_freed_memory()
    try:
        command()
    except (CheckpointError, ConfigError, OSError) as error:
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))
        print(f"{name}: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _shards(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:5]) <= 9999):
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 9999, got {text[:20]!r}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description="Converts a checkpoint: cuts it for a number of processes, to Hugging Face's format or back, to "
        "another dtype. The source may be in either format, cut or not, FP8 or not: that is found out."
    )
    parser.add_argument("--ckpt-path", type=Path, required=True, metavar="SRC", help="a checkpoint's or a run's folder")
    parser.add_argument("--save-path", type=Path, required=True, metavar="DST", help="the folder to make")
    parser.add_argument("--model-parallel", type=_shards, default=1, metavar="N", help="number of shards (default: 1)")
    parser.add_argument("--format", choices=("native", "hf"), default="native", help="(default: native)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp8"), help="of linear layers (default: as they are)")
    args = parser.parse_args(argv)
    is_hf = args.format == "hf"
    if is_hf and args.model_parallel > 1:
        parser.error("--model-parallel is for --format native; transformers cuts a model by itself")
    return run_command(
        "convert.py", lambda: convert(args.ckpt_path, args.save_path, args.model_parallel, is_hf, args.dtype, True)
    )


if __name__ == "__main__":
    sys.exit(main())
