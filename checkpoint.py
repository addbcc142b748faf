"""Checkpoints: the files that a model is stored in, the names of its tensors there, and the folder of a training run.

A checkpoint is a folder, in one of two formats, distinguished by its config.json:

    native                                           Hugging Face
    config.json              the `ModelArgs`         config.json                    of a class of transformers
    model0-mp2.safetensors   shards of rank 0 of 2   model-00001-of-00007.safetensors
    model1-mp2.safetensors   shards of rank 1 of 2   model.safetensors.index.json   which tensor is in which file

Native files are those of DeepSeek's own inference code: `parallel.native_slice` has the slices of each tensor-parallel
rank, so that any number of ranks can load what any other number has written. The names are DeepSeek's too, with a
`scale` beside each `weight` in FP8, and one tensor for each expert, where a model stacks them.

The folder of a run holds native checkpoints `step-00000500`, each with `state.json` (where training stood) and
`state0-mp1.safetensors` (the optimizer's tensors), and `checkpoints.json`, which names the last and the best of them.
Commands that take a checkpoint take a run's folder too, and use its best.

Nothing is seen half-written: a checkpoint is written under a temporary name, flushed to disk and renamed; then
`checkpoints.json` is replaced; only then is an older checkpoint removed. A crash leaves a `checkpoints.json` that names
complete checkpoints, and leftovers that the next save removes.
"""

import math
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
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
    inside,
    leads_to,
    lock,
    naming,
    new_folder,
    read_header,
    read_json,
    remove_folder,
    remove_leftover,
    reporting,
    shard_slice,
    temporary_path,
    write_all,
    write_json,
)

CONFIG_FILE, GENERATION_FILE, INDEX_FILE = "config.json", "generation_config.json", "model.safetensors.index.json"
STATE_FILE, POINTER_FILE = "state.json", "checkpoints.json"
CONFIG_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", E4M3: "fp8"}
WEIGHT_DTYPES = {*CONFIG_DTYPES, torch.float16, torch.float64}
_Header = dict[str, TensorInfo]  # of a file, by the tensor's name
_Headers = dict[Path, _Header]
_Shapes = dict[str, tuple[int, ...]]  # of full tensors, by name
_Slice = tuple[str, Slice2D, torch.Tensor]  # name, rectangle of the full tensor, and its content
_State = dict[str, dict[str, torch.Tensor]]  # of an optimizer, by the parameter's name and a key
STEP_NAME = re.compile(r"step-[0-9]{8,15}")  # of a run's checkpoint
# Fields of a config in which a run may differ from the checkpoint that it begins with: they change neither the shape of
# a weight that both have, nor what a position computes from what it attends to; and those of YaRN, where it is new.
FREE_FIELDS = {"max_batch_size", "max_seq_len", "dtype", "scale_fmt", "n_mtp_layers", "index_topk"}
FREE_FIELDS |= {"bias_update_speed", "aux_loss_alpha", "mtp_loss_weight"}  # of training alone
YARN_FIELDS = {"use_yarn", "original_seq_len", "rope_factor", "beta_fast", "beta_slow", "mscale"}

OLD_NAMES = {"windows": "sequences", "eval_windows": "eval_sequences", "short_windows": "short_seq_len"}
NEW_STATE = {"n_not_better": 0, "progress": 0.0, "stretch_from": 0.0, "stretch_to": 0.0, "origin": None}
NEW_STATE |= {"gate_balance": None}
# Settings in a run's state that --override may change, and the flag of each. With another seed, batch or optimizer,
# the positions and tensors that a run goes on from would be of no use.
OVERRIDABLE = {key: key for key in ("steps", "minutes", "lr", "matrix_lr", "weight_decay", "grad_clip", "momentum")}
OVERRIDABLE |= {key: key for key in ("beta1", "beta2", "schedule", "warmup", "decay", "gemm_impl", "index_warmup")}
OVERRIDABLE |= dict.fromkeys(("training_bytes", "training_crc32", "data_weights"), "data")
OVERRIDABLE |= dict.fromkeys(("validation_bytes", "validation_crc32"), "val_data")
OVERRIDE_HELP = f"""
A resumed run keeps its settings, but for those that --override names with commas between, out of
{", ".join(dict.fromkeys(OVERRIDABLE.values()))}.
If its length is one of them, what is left of the schedule is stretched over what is left of the run, so that the
learning rate does not jump: a stable phase lasts longer, a decay that has begun becomes slower, and so does the fall of
a cosine. A schedule that has ended begins anew, warm-up and short sequences included. A line says what changes, and
where the schedule stands.
"""


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_config(path: str | os.PathLike) -> tuple[ModelArgs, dict[str, Any]]:
    """Reads a config file: the model's shape, and the object under "train", defaults for train.py's flags, if any.

    Raises:
        ConfigError: The file is missing or no JSON object, or a key of it is wrong; the message names both.
    """
    values = read_json(Path(path), ConfigError, follow=True)
    train = values.pop("train", {})
    if not isinstance(train, dict):
        raise ConfigError(f"{path}: train must be an object of flags, got {train!r}")
    with naming(path):
        return ModelArgs.from_dict(values), train


@dataclass
class Checkpoint:
    """A checkpoint whose headers fit its config: each tensor of the model is there, of its shape, and no other."""

    folder: Path
    args: ModelArgs
    tensors: dict[str, ShardedTensor]  # the weights, by native name
    fp8_layers: set[str]  # names of the weights that an FP8 checkpoint stores in FP8
    config: dict[str, Any] = field(default_factory=dict)  # config.json, if it is in Hugging Face's format

    @property
    def is_fp8(self) -> bool:
        """Whether any weight is stored in FP8."""
        return any(source.dtype == E4M3 for source in self.tensors.values())

    def lacks_indexers(self, args: ModelArgs) -> bool:
        """Whether a model of `args` has indexers, and the checkpoint none."""
        return args.index_topk > 0 and self.args.index_topk == 0

    def has_all_of(self, args: ModelArgs) -> bool:
        """Whether it has all weights of a model that `check_same_model` accepts; else some must be drawn."""
        return args.n_mtp_layers <= self.args.n_mtp_layers and not self.lacks_indexers(args)

    def origin(self, path: str | os.PathLike) -> dict[str, Any]:
        """Returns what the state of a run that begins with it records, ready for JSON; it was opened by `path`."""
        step = int(self.folder.name[5:]) if STEP_NAME.fullmatch(self.folder.name) else None
        return {"path": os.path.abspath(path), "kind": "huggingface" if self.config else "native", "step": step}

    def fingerprint(self) -> int:
        """A CRC-32 of the last norm and the first row of the head, which differ between any two trained models."""
        norm, head = self.tensors["norm.weight"], self.tensors["head.weight"]
        parts = norm.read(norm.box, torch.float32), head.read(head.box._replace(bottom=1), torch.float32)
        return zlib.crc32(torch.cat(parts, dim=-1).numpy().tobytes())

    def check_same_model(self, args: ModelArgs) -> None:
        """Raises a ConfigError unless a model of `args` can begin with these weights and compute what they are for."""
        ours, theirs, free = args.to_dict(), self.args.to_dict(), FREE_FIELDS
        if not (args.index_topk and self.args.index_topk):
            free = free | {"index_n_heads", "index_head_dim"}
        if args.max_seq_len > self.args.max_seq_len or not (args.use_yarn or self.args.use_yarn):
            free = free | YARN_FIELDS
        for key in ours:
            if ours[key] != theirs[key] and key not in free:
                remedy = f"set it to {theirs[key]}, or leave --config out"
                raise ConfigError(f"{self.folder} has {key} = {theirs[key]}, but --config {ours[key]}; {remedy}")


def native_scale_name(name: str) -> str:
    """The native name of a weight's scales."""
    return name.removesuffix("weight") + "scale"


def open_native(path: str | os.PathLike, which: str = "best") -> Checkpoint:
    """Finds the tensors of a native checkpoint, or of a run's "best" or "last"; reads headers only, and checks them.

    Raises:
        CheckpointError: There is none, or something in it does not fit.
        ConfigError: Its config is not one of a model.
    """
    folder = resolve_run(Path(path), which)
    args, _ = read_config(inside(folder, CONFIG_FILE))
    files = _native_files(folder)
    return collect_tensors(folder, args, files, [read_header(file) for file in files])


def collect_tensors(
    folder: Path,
    args: ModelArgs,
    files: list[Path],
    headers: list[_Header],
    stored_name: Callable[[str], str] = lambda name: name,
    scale_name: Callable[[str], str] = native_scale_name,
    replicas: Iterable[tuple[str, str]] = (),
) -> Checkpoint:
    """Finds each tensor of a model in the headers of a checkpoint's files, and checks that there are no others.

    Args:
        folder, args: The checkpoint's folder and the model's shape.
        files, headers: The file of each rank, for messages, and its header, from which what is found is removed.
        stored_name: The name in the files of a tensor with a native name.
        scale_name: The name in the files of the scales of a weight with a stored name.
        replicas: Native name of a tensor and stored name of a copy; copies that are there must be equal to it.

    Raises:
        CheckpointError: Something is missing, superfluous, or does not fit the model.
    """
    shapes, fp8_layers = _weights_of(args, folder, sum(map(len, headers)))
    check_model_parallel(args, len(headers), f"the number of files, {files[0]} and so on,")
    tensors = {name: ShardedTensor(stored_name(name), shape) for name, shape in shapes.items()}
    copies = [(native, headers[0].pop(name)) for native, name in replicas if name in headers[0]]
    for rank, (left, file) in enumerate(zip(headers, files, strict=True)):
        for name, source in tensors.items():
            box = native_slice(name, source.shape, args.n_routed_experts, rank, len(headers))
            if box is not None:
                dtypes = WEIGHT_DTYPES if name in fp8_layers else WEIGHT_DTYPES - {E4M3}
                _take(source, box, left, file, {source.dtype} if source.shards else dtypes, scale_name)
        if left:
            raise CheckpointError(f"{next(iter(left.values()))} has no place in the model of {CONFIG_FILE}")
    for name, info in copies:
        if (info.dtype, info.shape) != (tensors[name].dtype, tensors[name].shape):
            raise CheckpointError(f"{info} must be a copy of {tensors[name].name}, but has another shape or dtype")
        tensors[name].replicas.append(ShardSlice(info, tensors[name].box))
    return Checkpoint(folder, args, tensors, fp8_layers)


def resolve_run(path: Path, which: str) -> Path:
    """Returns the folder of a checkpoint: the path itself, or the "last" or "best" of the run there, never of both."""
    try:
        os.lstat(path / CONFIG_FILE)
    except PermissionError as error:  # as which `lexists` finds nothing
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (OSError, ValueError):
        pass  # there may be a run
    is_checkpoint, is_run = os.path.lexists(path / CONFIG_FILE), has_run(path)
    if is_checkpoint and is_run:
        raise CheckpointError(f"{path} has both {CONFIG_FILE}, a checkpoint's, and {POINTER_FILE}, a run's; move one")
    if is_run:
        name = str(_pointer(path).get(which))
        if not STEP_NAME.fullmatch(name) or not os.path.lexists(inside(path, name) / CONFIG_FILE):
            raise CheckpointError(f"{path / POINTER_FILE} names {shorten(name)}, which is no checkpoint beside it")
        return path / name
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: no such folder; train.py --save-path {path} makes one")
    if not is_checkpoint:
        raise CheckpointError(f"{path} holds no checkpoint: neither {CONFIG_FILE} nor {POINTER_FILE} is in it")
    return path


def _take(
    source: ShardedTensor, box: Slice2D, left: _Header, file: Path, dtypes: set[torch.dtype], scale_name: Callable
) -> None:
    """Moves a rank's slice of a tensor, and its scales, from what is left of a file's header to `source`."""
    name, shape, info = source.name, _file_shape(source.shape, box), left.pop(source.name, None)
    if info is None:
        raise CheckpointError(f"{file}: tensor {name} is missing; the model of {CONFIG_FILE} needs it")
    if info.shape != shape:
        raise CheckpointError(f"{info} has shape {list(info.shape)}, not {list(shape)} as the model of {CONFIG_FILE}")
    if info.dtype not in dtypes:
        wanted = " or ".join(sorted(DTYPE_NAMES[dtype] for dtype in dtypes))
        raise CheckpointError(f"{info} is {DTYPE_NAMES[info.dtype]}, not {wanted} as it must be, or as in other files")
    scale = left.pop(scale_name(name), None) if info.dtype == E4M3 else None
    source.dtype, is_replica = info.dtype, any(box == other.box for other in source.shards)
    (source.replicas if is_replica else source.shards).append(shard_slice(info, box, scale))


def _file_shape(shape: tuple[int, ...], box: Slice2D) -> tuple[int, ...]:
    """The shape in a file of a rectangle of a tensor: of stacked matrices, that of a smaller stack."""
    return (box.shape[0] // shape[1], *shape[1:]) if len(shape) == 3 else box.shape[2 - len(shape) :]


def _weights_of(args: ModelArgs, folder: Path, count: int) -> tuple[_Shapes, set[str]]:
    """Asks the model, made without memory, for the shapes of its weights, and for those that may be FP8.

    A config that wants many more than the `count` tensors that there are is refused first.
    """
    moe = sum(args.is_moe(i) for i in range(min(args.n_layers + args.n_mtp_layers, count)))
    if args.n_layers + args.n_mtp_layers + moe * args.n_routed_experts > count:
        raise CheckpointError(f"{folder / CONFIG_FILE} wants more than the {count} tensors here: tensors are missing")
    # blocks of a kind are alike: a dense one, an MoE one and an MTP module stand for all, however many there are
    two = replace(args, n_layers=2, n_dense_layers=1, moe_layer_freq=1, n_mtp_layers=1, inter_dim=args.inter_dim or 1)
    try:
        with torch.device("meta"):
            prototype = Transformer(two, fp8_weights=True)
    except (RuntimeError, OverflowError) as error:
        raise too_large(folder, error) from None
    groups: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, _, tensor in _native_slices(prototype, ParallelContext()):
        prefix = re.match(r"layers\.\d+\.|mtp\.0\.(block\.)?|\w+\.", name)[0]
        if not name.endswith(".scale"):
            groups[prefix][name.removeprefix(prefix)] = tensor
    kinds = ["layers.1." if args.is_moe(i) else "layers.0." for i in range(args.n_layers + args.n_mtp_layers)]
    prefixes = [("embed.", "embed."), *((f"layers.{i}.", kinds[i]) for i in range(args.n_layers))]
    prefixes += [("norm.", "norm."), ("head.", "head.")]
    for k in range(args.n_mtp_layers):
        prefixes += [(f"mtp.{k}.", "mtp.0."), (f"mtp.{k}.block.", kinds[args.n_layers + k])]
    tensors = {prefix + leaf: tensor for prefix, group in prefixes for leaf, tensor in groups[group].items()}
    fp8_layers = {name for name, tensor in tensors.items() if tensor.dtype == E4M3}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, fp8_layers


def too_large(folder: Path, error: Exception) -> CheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(f"{folder / CONFIG_FILE} is of a model that is too large: {shorten(reason)}")


def native_file(rank: int, world: int, kind: str = "model") -> str:
    """The name of a rank's file."""
    return f"{kind}{rank}-mp{world}.safetensors"


def _native_files(folder: Path, kind: str = "model") -> list[Path]:
    """The files of a native checkpoint, one a rank; a safetensors file that is none of them is refused by name."""
    found, files = sorted(path.name for path in folder.glob("*.safetensors")), {}
    for k in ("model", "state"):
        matches = [re.fullmatch(rf"{k}[0-9]+-mp([1-9][0-9]{{0,3}})\.safetensors", name) for name in found]
        world = max((int(match[1]) for match in matches if match), default=1)
        files[k] = [native_file(rank, world, k) for rank in range(world)]
    if strays := [folder / name for name in found if name not in files["model"] + files["state"]]:
        raise CheckpointError(f"{strays[0]} is none of the {len(files['model'])} files of this checkpoint; remove it")
    return [folder / name for name in files[kind]]


# --- Models ----------------------------------------------------------------------------------------------------------


def save_model(model: Transformer, path: str | os.PathLike) -> None:
    """Writes a model as a native checkpoint, FP8 weights as they are; `path` appears complete, or not at all.

    Raises:
        CheckpointError: `path` exists and is no empty folder, or cannot be written.
    """
    with new_folder(Path(path)) as folder:
        _write_config(model, folder)
        _write_weights(model, Path(path), ParallelContext())


def _native_slices(model: Transformer, ctx: ParallelContext, to_write: bool = False) -> Iterator[_Slice]:
    """The tensors that a process holds, or is to write, under native names; of stacked experts one by one."""
    shapes = full_shapes(model, ctx)
    for name, tensor in model.state_dict().items():
        box, (local, first) = local_slice(name, tensor, shapes[name], ctx), ctx.local_shard(tensor)
        if to_write and not ctx.writes_replicated and first is None:
            continue
        owner, is_routed, leaf = name.partition(".experts.")
        if is_routed:
            rows = shapes[name][1]
            for e, matrix in enumerate(local, box.top // rows):
                yield f"{owner}.experts.{e}.{leaf}", Slice2D(0, rows, 0, shapes[name][2]), matrix
        elif local.numel():
            yield name, box, local


@torch.no_grad()
def load_weights(model: Transformer, checkpoint: Checkpoint, ctx: ParallelContext) -> None:
    """Fills the local tensors of a model, band by band, in the dtypes that it was made with."""
    slices = {name: (box, tensor) for name, box, tensor in _native_slices(model, ctx)}
    for name, (box, target) in slices.items():
        if name not in checkpoint.tensors:  # scales, which go with their weights
            continue
        source = checkpoint.tensors[name]
        if target.dtype == E4M3:
            q, s = source.read_fp8(box, checkpoint.args.scale_fmt)
            target.copy_(q)
            slices[native_scale_name(name)][1].copy_(s)
        else:
            rows = target.view(box.shape)
            for band in source.bands(box, BLOCK):
                rows[band.within(box)] = source.read(band, target.dtype)


def _write_config(model: Transformer, folder: Path) -> None:
    is_fp8 = any(tensor.dtype == E4M3 for tensor in model.state_dict().values())
    dtype = "fp8" if is_fp8 else "fp32" if model.head.weight.dtype == torch.float32 else "bf16"
    write_json(folder / CONFIG_FILE, model.args.to_dict() | {"dtype": dtype})


def _write_weights(model: Transformer, path: Path, ctx: ParallelContext) -> None:
    shapes, tensors = full_shapes(model, ctx), {}
    for name, tensor in model.state_dict().items():
        owner, is_routed, leaf = name.partition(".experts.")
        shape = shapes[name][1:] if is_routed else shapes[name]
        for native in [f"{owner}.experts.{e}.{leaf}" for e in range(shapes[name][0])] if is_routed else [name]:
            box = native_slice(native, shape, model.args.n_routed_experts, ctx.mp_rank, ctx.mp_size)
            if box is not None:
                tensors[native] = tensor.dtype, shape, box
    _write_shards("model", path, tensors, list(_native_slices(model, ctx, to_write=True)), ctx)


def _write_shards(kind: str, path: Path, tensors: dict, slices: list[_Slice], ctx: ParallelContext) -> None:
    """Writes a file of `path` for each tensor-parallel rank, named by `kind`.

    `tensors` has dtype, full shape and rectangle of each tensor in the file, `slices` what this process writes of them.
    """
    contents = {name: (dtype, _file_shape(shape, box)) for name, (dtype, shape, box) in tensors.items()}
    output = SafetensorsWriter(native_file(ctx.mp_rank, ctx.mp_size, kind), contents)
    with ctx.collective_section(), reporting(path):
        if ctx.writes_replicated:
            output.create(temporary_path(path))
    file = temporary_path(path) / output.name
    with ctx.collective_section(), reporting(path), open(file, "r+b", buffering=0) as out:
        for name, box, tensor in slices:
            info, (_, _, around) = output.infos[name], tensors[name]
            start = (box.top - around.top) * around.shape[1] + box.left - around.left
            out.seek(info.offset + start * info.dtype.itemsize)
            write_all(out, tensor.detach().cpu())
        os.fsync(out.fileno())


# --- Runs ------------------------------------------------------------------------------------------------------------


class Run(AbstractContextManager):
    """The folder of a training run while a job writes there: made when it is first needed, held open, and locked.

    The first process of the job, `ctx`, holds it.

    Raises:
        CheckpointError: Another job writes there, it is no folder, a checkpoint is in it, or it cannot be written.
    """

    def __init__(self, path: str | os.PathLike, ctx: ParallelContext | None = None):
        self.path, self.ctx = Path(path), ctx or ParallelContext()
        self._held: Path | None = None
        self._fd, self._is_new = -1, False
        with self.ctx.collective_section():
            if self.ctx.rank == 0:  # until it is made, the nearest folder above: a disk may be unmounted meanwhile
                self._hold(next(path for path in (self.path, *self.path.parents) if os.path.lexists(path)))

    def __fspath__(self) -> str:
        return str(self.path)

    def __exit__(self, *_: object) -> None:
        """Releases the folder; one that was made and never filled is removed."""
        if self._held is None:
            return
        if self._is_new and leads_to(self.path, self._fd):
            with suppress(OSError):
                self.path.rmdir()
        os.close(self._fd)
        self._held = None

    def _hold(self, path: Path) -> None:
        with ExitStack() as stack:
            with reporting(path):
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, fd)
            if not os.access(path, os.W_OK | os.X_OK):
                raise CheckpointError(f"{path} cannot be written; choose another --save-path")
            if path == self.path:
                lock(fd, path, path)
            if path == self.path and os.path.lexists(path / CONFIG_FILE):
                raise CheckpointError(f"{path} holds a checkpoint ({CONFIG_FILE}), no run; choose another --save-path")
            if self._held is not None and os.listdir(fd):
                raise CheckpointError(f"{path} was written by another process meanwhile; choose another --save-path")
            stack.pop_all()
            if self._held is not None:
                os.close(self._fd)
            self._held, self._fd = path, fd

    def folder_fd(self) -> int:
        """Returns, in the first process, a descriptor of the folder, which is made if there is none yet.

        Raises:
            CheckpointError: The path does not lead to the folder any more that was opened, or it cannot be made.
        """
        if not leads_to(self._held, self._fd):
            reason = "the folder that this run began in was renamed, removed or unmounted"
            raise CheckpointError(f"{self._held}: {reason}; put it back and go on with --resume")
        if self._held != self.path:
            self._is_new = not os.path.lexists(self.path)
            with reporting(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            self._hold(self.path)
        return self._fd


def has_run(run: str | os.PathLike) -> bool:
    """Whether a folder holds a run that can be resumed."""
    return os.path.lexists(Path(run) / POINTER_FILE) or bool(_pointer(Path(run)))


def _pointer(run: Path) -> dict[str, Any]:
    """The names of a run's last and best checkpoint: the newest, if the pointer was not yet written, or is lost."""
    if os.path.lexists(run / POINTER_FILE):
        return read_json(run / POINTER_FILE, CheckpointError)
    steps = [file.parent.name for file in run.glob(f"step-*/{STATE_FILE}") if STEP_NAME.fullmatch(file.parent.name)]
    return dict.fromkeys(("last", "best"), max(steps, key=lambda name: int(name[5:]))) if steps else {}


def save_run(
    run: Run, model: Transformer, optimizer: _State, state: dict[str, Any], is_best: bool, keep: int = 0
) -> Path:
    """Writes a checkpoint of a training run, points to it, and removes those that are neither last nor best any more.

    All processes of the run call it, and it returns the checkpoint's folder. `optimizer` has the optimizer's state of
    each parameter, by the parameter's name; `state` has the rest, ready for JSON; its "step" gives the folder its name.
    Of the checkpoints before it that are not the best, the newest `keep` stay.

    Raises:
        CheckpointError: It cannot be written. The checkpoints that were there before are still complete.
    """
    ctx, path = run.ctx, run.path / f"step-{state['step']:08d}"
    with ctx.collective_section():
        if ctx.rank == 0:
            run.folder_fd()
        pointer = _pointer(run.path)
    if path.name not in pointer.values():
        _save_step(path, model, optimizer, state, ctx)
    with ctx.collective_section(), reporting(run.path):
        if ctx.rank == 0:
            if path.name in pointer.values():  # saved before it was evaluated: the tensors are these
                write_json(inside(run.path, path.name) / STATE_FILE, state)
            pointer["last"] = path.name
            if is_best or "best" not in pointer:
                pointer["best"] = path.name
            write_json(run.path / POINTER_FILE, pointer, run.folder_fd())
            _sweep(run.path, set(pointer.values()), state["step"], keep)
    return path


def _save_step(path: Path, model: Transformer, optimizer: _State, state: dict[str, Any], ctx: ParallelContext) -> None:
    """Writes the folder of a step: the first process makes it and renames it, all write into it."""
    with ExitStack() as stack:
        with ctx.collective_section(), reporting(path):
            if ctx.rank == 0:
                remove_folder(path)  # complete, but never pointed to: the leftover of a crash
                folder = stack.enter_context(new_folder(path))
                write_json(folder / STATE_FILE, state)
                _write_config(model, folder)
        _write_weights(model, path, ctx)
        _write_state(model, optimizer, path, ctx)
        with ctx.collective_section():
            stack.close()


def _sweep(run: Path, kept: set[str], step: int, keep: int) -> None:
    """Removes checkpoints and leftovers of dead processes; nothing with other names.

    Stay those that are named in `kept`, and beside them the newest `keep` of those before `step`: one of a later step
    was left by a process that died before it could point to it.
    """
    steps = {int(old.name[5:]): old.name for old in run.iterdir() if STEP_NAME.fullmatch(old.name)}
    others = sorted((n for n, name in steps.items() if n < step and name not in kept), reverse=True)
    kept = kept | {steps[n] for n in others[:keep]}
    for old in list(run.iterdir()):
        if STEP_NAME.fullmatch(old.name) and old.name not in kept:
            remove_folder(old)
        elif match := re.fullmatch(rf"\.({STEP_NAME.pattern})\.(tmp|lock)", old.name):
            remove_leftover(run / match[1])


def _write_state(model: Transformer, optimizer: _State, path: Path, ctx: ParallelContext) -> None:
    shapes, tensors, slices = full_shapes(model, ctx), {}, []
    for name, values in optimizer.items():
        for key, value in values.items():
            full_name, shape = f"{name}.{key}", shapes[name] if value.ndim else ()
            around = state_slice(name, shape, ctx.mp_rank, ctx.mp_size) if shape else Slice2D(0, 1, 0, 1)
            tensors[full_name] = value.dtype, shape, around
            local, first = ctx.local_shard(value)
            if ctx.writes_replicated or first is not None:
                slices.append((full_name, local_slice(name, value, shape, ctx) if shape else around, local))
    _write_shards("state", path, tensors, slices, ctx)


def load_run(
    run: str | os.PathLike, model: Transformer, ctx: ParallelContext | None = None
) -> tuple[Callable[[str, nn.Parameter, Collection[str]], dict[str, torch.Tensor]], dict[str, Any]]:
    """Loads the last checkpoint of a run, or of its folder, into `model`, or this process's shards of it.

    The processes of `ctx`, which hold the model together, need not be as many as wrote the checkpoint.

    Returns:
        A function that reads the optimizer's state of a parameter, from the parameter's name, itself, and the keys of
        the state ("step" is a float32 number, others have the parameter's local shape and dtype); it raises a
        CheckpointError unless each is there and fits, and returns nothing after step 0. And the state of `save_run`.

    Raises:
        CheckpointError: There is no run, it is damaged, or it is one of another model.
    """
    ctx = ctx or ParallelContext()
    checkpoint = open_native(run, "last")
    folder, ours, theirs = checkpoint.folder, model.args.to_dict(), checkpoint.args.to_dict()
    for key in ["index_topk", *ours]:  # without indexers, their sizes say nothing
        if ours[key] != theirs[key] and key not in ("dtype", "max_batch_size"):
            remedy = "resume with the config it began with, or choose another --save-path"
            raise CheckpointError(f"{folder} was trained with {key} = {theirs[key]}, not {ours[key]}; {remedy}")
    state, names = read_json(folder / STATE_FILE, CheckpointError), dict(model.named_parameters())
    headers = {path: read_header(path) for path in _native_files(folder, "state")}
    infos = [info for header in headers.values() for info in header.values()]
    if strays := [info for info in infos if info.name.rpartition(".")[0] not in names]:
        raise CheckpointError(f"{strays[0]} belongs to no parameter of this model; start a new run")
    load_weights(model, checkpoint, ctx)
    if state.get("step") == 0 and not any(headers.values()):  # no optimizer has taken a step yet
        return lambda *_: {}, state
    return partial(_read_state, headers, full_shapes(model, ctx), ctx), state


@torch.no_grad()
def _read_state(
    headers: _Headers, shapes: _Shapes, ctx: ParallelContext, name: str, p: nn.Parameter, keys: Collection[str]
) -> dict[str, torch.Tensor]:
    """Reads the local slices of the optimizer's state of one parameter; see `load_run`."""
    found = {}
    for key in keys:
        is_number = key == "step"
        shape, dtype = ((), torch.float32) if is_number else (shapes[name], p.dtype)
        source = ShardedTensor(f"{name}.{key}", shape, dtype)
        for rank, (path, header) in enumerate(headers.items()):
            box = source.box if is_number else state_slice(name, shape, rank, len(headers))
            _take(source, box, dict(header), path, {dtype}, native_scale_name)
        local_shape = () if is_number else ctx.local_shard(p)[0].shape
        box = source.box if is_number else local_slice(name, p, shape, ctx)
        found[key] = source.read_bytes(box).view(dtype).view(local_shape)
        lowest = {"step": 1, "exp_avg_sq": 0}.get(key, -math.inf)  # AdamW divides by the roots of what they give
        if (found[key] < lowest).any():
            raise CheckpointError(f"{source.shards[0].info} has a number below {lowest}; start a new run")
    return found


def check_state(run: Path, stored: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Returns the state in a run's checkpoint, by current names; a CheckpointError unless it has every key of ours."""
    state = NEW_STATE | {OLD_NAMES.get(key, key): value for key, value in stored.items()}
    for key in ours:
        if not _is_state(key, state.get(key, "missing"), ours[key]):
            raise CheckpointError(f"{run}: {key!r} in the state of its last checkpoint is damaged; start a new run")
    settings = {OLD_NAMES.get(key, key): value for key, value in state["settings"].items()}
    return state | {"settings": {"freeze": []} | settings}


def _is_state(key: str, value: Any, ours: Any) -> bool:
    """Whether a value can be what train.py's `Trainer.state` has under a key, where a new run has `ours`."""
    if key == "gate_balance":
        return value is None or _is_nested(value, ours)
    if key == "settings" or key == "origin" and value is not None:
        return isinstance(value, dict)
    if value is None:
        return key in ("best_val", "val_step", "val_loss", "eval_sequences", "origin")
    is_count = key in ("step", "sequences", "val_step", "eval_sequences", "n_not_better")
    lowest = 1 if key == "eval_sequences" else 0
    highest = {"progress": 1, "stretch_to": 1, "stretch_from": math.nextafter(1, 0)}.get(key, 2**53 - 1)
    return type(value) in ((int,) if is_count else (int, float)) and lowest <= value <= highest


def _is_nested(value: Any, ours: Any) -> bool:
    """Whether a value has numbers in nested lists as `ours` has; those of a gate's balance are small."""
    if isinstance(ours, list):
        return isinstance(value, list) and len(value) == len(ours) and all(map(_is_nested, value, ours))
    return type(value) in (int, float) and abs(value) <= 1


def check_settings(run: Path, was: dict[str, Any], now: dict[str, Any], override: list[str]) -> dict[str, Any]:
    """Returns those of a run's settings that are others now; a CheckpointError unless `override` has their flags."""
    changed = {key: value for key, value in was.items() if now.get(key) != value}
    refused = [key for key in changed if OVERRIDABLE.get(key) not in override]
    if not refused:
        for key, value in changed.items():
            if not _is_setting(key, value, now.get(key)):
                raise CheckpointError(f"{run}: {key!r} in the state of its last checkpoint is damaged; start a new run")
        return changed
    remedy = "choose another --save-path"
    if all(key in OVERRIDABLE for key in refused):
        remedy = "add --override " + ",".join(dict.fromkeys(OVERRIDABLE[key] for key in changed))
    listed = ", ".join(f"{shorten(key)} = {shorten(was[key])} (now {shorten(now.get(key))})" for key in refused)
    raise CheckpointError(f"{run} was trained with {listed}; resume with what it began with, or {remedy}")


def _is_setting(key: str, value: Any, now: Any) -> bool:
    """Whether a value can be a setting that --override changes to `now`."""
    if key == "data_weights":
        return value is None or isinstance(value, list) and all(type(weight) in (int, float) for weight in value)
    if value is None or isinstance(value, str):
        return key in ("steps", "minutes") if value is None else isinstance(now, str)
    return type(value) in (int, float) and 0 <= value < 2**53 and not isinstance(now, str)


def check_origin(run: Path, origin: dict[str, Any] | None, path: str | os.PathLike | None) -> None:
    """Raises a CheckpointError if a run did not begin with the weights of `path`, where one is given."""
    began = None if origin is None else origin.get("path")
    if path is not None and began != os.path.abspath(path):
        weights = "random weights" if began is None else f"the weights of {shorten(began)}"
        remedy = "leave --init-from out to go on with its own, or choose another --save-path"
        raise CheckpointError(f"{run} began with {weights}, not of {path}; {remedy}")
