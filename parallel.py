"""Many processes: how a model and its batches are spread over them. `model.py` knows nothing of it.

`torchrun` starts N = data-parallel × model-parallel processes; process r is number r // M of the data-parallel ones and
part r % M of a model. With M = 2 and one block:

                     part 0                     part 1
    embed            bytes 0-127                bytes 128-255           each looks up what it has; the sum is whole
    attn_norm        whole                      whole
    attn   wq, wkv_b heads of the first half    of the second
           wkv_a, …  whole                      whole
           wo        its heads' inputs          its heads' inputs       the sum over parts is the output
    ffn    w1, w3    first half of the columns  second half
           w2        its inputs                 its inputs              the sum is the output
           experts   the first half of them     the second              the sum is the output
           gate      whole                      whole
    head             logits of bytes 0-127      of bytes 128-255        put side by side

So a block has two sums forward, at the ends of `attn` and `ffn`, and two backward, at their beginnings, where every
part has only its share of the input's gradient (Megatron-LM, Shoeybi et al. 2019, section 3, calls these g and f).
Between the two, what is whole computes the same everywhere but gets a share of its gradient:
`all_reduce_replicated_grads` adds these up. `native_slice` has the sharding rules, those of a native checkpoint.

Data-parallel processes take their share of every batch. Gradients are averaged by DDP, or parameters, gradients and
optimizer state are sharded by FSDP2. Nothing that is computed depends on the layout but for the rounding of sums.
"""

from __future__ import annotations

import ctypes
import math
import os
import secrets
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from command import is_local_rank_zero
from model import Losses, ModelArgs, Transformer, draw_weight
from safetensors_io import CheckpointError, Slice2D

STORE_TIMEOUT = timedelta(minutes=1)  # of reaching the store of torchrun
TIMEOUT = timedelta(minutes=10)  # of whatever one process waits for; a step or a saved checkpoint takes less
FAILED = "failed process"  # in the store: which one


class ParallelError(ValueError):
    """A number of processes that cannot share the work so; the message has the numbers that can."""


class CollectiveError(ValueError):
    """What went wrong in some process, raised in all of them; the first one tells it."""


# --- Sharding rules --------------------------------------------------------------------------------------------------

_COLUMN_PARALLEL = {"wq", "wq_b", "wkv_b", "wk", "wv", "w1", "w3", "embed", "head"}
_ROW_PARALLEL = {"wo", "w2"}


def native_slice(name: str, shape: tuple[int, ...], n_experts: int, rank: int, world: int) -> Slice2D | None:
    """Says what a rank holds of a tensor: the one place that knows how native checkpoints are sharded.

    "Column-parallel" layers are split by outputs, the rows of a weight as it is stored, "row-parallel" ones by inputs.
    Routed experts stay whole and are dealt out by number. Everything else is held by every rank.

    Args:
        name: The tensor's native name.
        shape: Its whole shape; a vector counts as one row.
        n_experts: `n_routed_experts`.
        rank: Which part, from 0 on.
        world: Of how many, a number that `check_model_parallel` accepts.

    Returns:
        The rectangle, or None if the rank holds nothing of it.
    """
    rows, cols = (1, *shape)[-2:]
    parts = name.split(".")
    if rank not in ranks_with(name, n_experts, world):
        return None
    if ".experts." in name:
        return Slice2D(0, rows, 0, cols)
    if parts[-2] in _COLUMN_PARALLEL:
        return Slice2D(rows * rank // world, rows * (rank + 1) // world, 0, cols)
    if parts[-2] in _ROW_PARALLEL:
        return Slice2D(0, rows, cols * rank // world, cols * (rank + 1) // world)
    return Slice2D(0, rows, 0, cols)


def ranks_with(name: str, n_experts: int, world: int) -> range:
    """The ranks that hold something of a tensor: one for a routed expert's, else all."""
    _, is_routed, rest = name.partition(".experts.")
    if not is_routed:
        return range(world)
    owner = int(rest.split(".")[0]) // (n_experts // world)
    return range(owner, owner + 1)


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is one of those in the dtype that the model computes in: norms and the router have their own."""
    return len(shape) > 1 and not name.endswith("gate.weight")


def check_model_parallel(args: ModelArgs, world: int, what: str = "--model-parallel") -> None:
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


def full_shapes(model: Transformer, ctx: ParallelContext) -> dict[str, tuple[int, ...]]:
    """The shapes of the whole model's parameters and buffers, by their names in its `state_dict`."""
    if ctx.mp_size > 1:
        with torch.device("meta"):
            model = Transformer(model.args, fp8_weights=True)
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def state_slice(name: str, shape: tuple[int, ...], rank: int, world: int) -> Slice2D:
    """Says which rectangle of a whole tensor of `state_dict`, or of its optimizer's state, one part of a model has.

    Args:
        name: The tensor's name in `state_dict`, where routed experts are stacked.
        shape: Its whole shape; rows of stacked matrices count one after the other.
        rank: Which part.
        world: Of how many.
    """
    if ".experts." in name:
        rows = math.prod(shape[:-1])
        return Slice2D(rows * rank // world, rows * (rank + 1) // world, 0, shape[-1])
    return native_slice(name, shape, 0, rank, world)


def local_slice(name: str, tensor: torch.Tensor, shape: tuple[int, ...], ctx: ParallelContext) -> Slice2D:
    """Says which rectangle of a whole tensor a process holds: of its `state_slice`, what FSDP leaves to it.

    Args:
        name: Its name in `state_dict`.
        tensor: Its tensor in this process's part of the model, of which `ctx.local_shard` may hold some rows.
        shape: Its whole shape.
        ctx: The processes.
    """
    box = state_slice(name, shape, ctx.mp_rank, ctx.mp_size)
    part, first = ctx.local_shard(tensor)
    if first is None:
        return box
    last = first + len(part)
    if len(shape) == 1:
        return box._replace(left=box.left + first, right=box.left + last)
    rows = math.prod(tensor.shape[1:-1])  # of one matrix of a stack
    return box._replace(top=box.top + first * rows, bottom=box.top + last * rows)


# --- The machine ------------------------------------------------------------------------------------------------------


class DeviceError(ValueError):
    """A device that this machine, or this build of torch, does not have."""


def pick_device(name: str | None = None) -> str:
    """Chooses where to compute: the device asked for, or else the best of this machine.

    Raises:
        DeviceError: It is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return next(device for device, available in there.items() if available)
    if not there.get(name, False):
        raise DeviceError(f"device {name!r} is not available here; there is {', '.join(d for d in there if there[d])}")
    return name


def pick_dtype(device: str, name: str = "auto") -> torch.dtype:
    """Chooses what to compute in: bfloat16 where the hardware multiplies it natively, float32 elsewhere.

    Args:
        device: "cuda", "mps" or "cpu".
        name: "fp32" or "bf16" to insist, "auto" to choose.
    """
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    if device == "cuda":
        native = torch.cuda.get_device_capability() >= (8, 0)
    elif device == "cpu":
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def require_compiler(device: str) -> None:
    """Refuses torch.compile on a CPU without the C++ compiler that it needs there.

    Raises:
        DeviceError: There is none.
    """
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        raise DeviceError(f"--compile needs a C++ compiler, and there is no {compiler}; install one, or leave it out")


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


# --- Processes -------------------------------------------------------------------------------------------------------


def is_rank_zero() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def leave() -> None:
    """Leaves the other processes, if this one has joined them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def abort(code: int) -> None:
    """Ends this process at once if it has joined others, who get an error at once when its connections break.

    To leave in good order, or the way that Python ends, would be to wait for threads that wait for the others.
    """
    if dist.is_initialized():
        with suppress(dist.DistError):
            _get_default_store().compare_set(FAILED, "", os.environ["RANK"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch(store: dist.Store) -> None:
    """Ends this process when another has failed, for which it may be waiting in NCCL, whose kernels notice nothing.

    Python heeds no signal then either: torchrun would wait for half a minute before it kills.
    """
    try:
        while not store.check([FAILED]):
            time.sleep(0.5)
            if not dist.is_initialized():
                return
        failed = store.get(FAILED).decode()
    except dist.DistError:  # gone with the first process, which may have ended well, a moment before this one does
        time.sleep(5)
        failed = "0"
    if dist.is_initialized() and failed != os.environ["RANK"]:
        if is_local_rank_zero():
            print(f"error: another process is gone: number {failed} has failed", file=sys.__stderr__, flush=True)
        os._exit(1)


def end(code: int) -> NoReturn:
    """Ends a command that is over; one of several processes does so without what Python tidies up at its end.

    A thread of gloo may outlive its group by a moment. C++ aborts a process that drops such a thread, and torchrun
    would take a run that is over for one that failed.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def process_group(tell: Callable[[str], Any]) -> Iterator[None]:
    """Around a command: the processes that it has joined are left when it ends, abandoned when it fails.

    Args:
        tell: Prints what went wrong, in a line, where that was another process: it has told more. A fault of this one
            is shown in full, and before the others notice.
    """
    try:
        yield
    except BaseException as error:
        if not dist.is_initialized():
            raise
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo's errors have no class of their own
            tell(f"another process is gone or does not answer: {error}")
        else:
            traceback.print_exc()
        abort(1)
    leave()


def _rendezvous(rank: int, world: int, timeout: timedelta) -> dist.Store:
    """Where the processes leave their addresses for each other, in a corner of its own for each start.

    The elastic agent gives all starts the same store. There a quick process would find the address that another had
    before it was killed, and call nobody. Nothing that the agents tell counts the starts for all nodes alike: one that
    comes back counts from 0. So the first process invents a name for the corner, and tells each of the others under the
    name by which that one asks; who asked before a kill is answered as well, and does not confirm.
    """
    # torchrun's own store is there before its workers are: who does not reach it was left behind by a torchrun killed
    is_there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store, _, _ = next(rendezvous("env://", timeout=min(timeout, STORE_TIMEOUT) if is_there else timeout))
    store.set_timeout(timeout)
    name = secrets.token_hex(8)
    if rank:
        store.set(f"asks {rank}", name)
        name = store.get(f"answer to {name}").decode()
        store.set(f"{name} known to {rank}", "")
    absent, deadline = set(range(1, world)) if rank == 0 else set(), time.monotonic() + timeout.total_seconds()
    while absent:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(absent)} of {world} processes have not come within {timeout}")
        for other in sorted(absent):
            if store.check([f"{name} known to {other}"]):
                absent.remove(other)
            elif store.check([f"asks {other}"]):
                store.set(f"answer to {store.get(f'asks {other}').decode()}", name)
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


class ParallelContext:
    """The place of this process among all, and the collectives between them.

    Made by itself it communicates with nobody: one process alone, or with a `world_size` the plan of a layout, which
    counts the bytes that would be sent. `join` makes the one of a torchrun job.

    Args:
        device: Where this process computes.
        world_size: Number of processes.
        rank: Number of this process.
        model_parallel: Number of tensor-parallel ranks that share one model.
        fsdp: Whether FSDP shards parameters over the data-parallel ranks.

    Attributes:
        mp_size, mp_rank: Size of the tensor-parallel group, and the rank in it.
        dp_size, dp_rank: Size of the data-parallel group, and the rank in it.
        writes_replicated: Whether this process writes the tensors of which several processes have a copy.
        counted: Bytes that tensor-parallel ranks would have sent, where there are no groups.

    Raises:
        ParallelError: The number of processes is no multiple of `model_parallel`.
    """

    def __init__(
        self, device: str = "cpu", world_size: int = 1, rank: int = 0, model_parallel: int = 1, fsdp: bool = False
    ):
        if world_size % model_parallel:
            works = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
            raise ParallelError(
                f"{world_size} processes are no multiple of --model-parallel {model_parallel}, which can be {works}"
            )
        self.device, self.world_size, self.rank = device, world_size, rank
        self.mp_size, self.dp_size = model_parallel, world_size // model_parallel
        self.mp_rank, self.dp_rank = rank % self.mp_size, rank // self.mp_size
        self.fsdp = fsdp and self.dp_size > 1
        self.writes_replicated = self.dp_rank == 0
        self._cuts: dict[nn.Parameter, int] = {}  # the dimension in which a parameter is sharded over ranks
        self._shares: list[nn.Parameter] = []  # replicated parameters whose gradients must be summed over ranks
        self._n_texts = 0
        self.counted, self.dp_mesh, self.dp_group, self.mp_group = 0, None, None, None

    @classmethod
    def join(
        cls, device: str, model_parallel: int = 1, fsdp: bool = False, timeout: timedelta = TIMEOUT
    ) -> ParallelContext:
        """Joins the processes that torchrun started, as the environment has them; one process alone without torchrun.

        Args:
            device: "cuda", "mps" or "cpu".
            model_parallel: Number of tensor-parallel ranks.
            fsdp: Whether FSDP shards the model over the data-parallel ranks.
            timeout: How long a process waits for another.

        Raises:
            ParallelError: The environment makes no sense, the device cannot be shared, or a process has other flags.
        """
        world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if world_size > 1 and device == "mps":
            raise ParallelError("several processes cannot share an mps device; add --device cpu, or start one process")
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if device == "cuda" and here > gpus:
            raise ParallelError(f"{here} processes cannot share {gpus} GPUs; start at most {gpus} on this machine")
        if "TORCHELASTIC_RUN_ID" in os.environ:  # no orphans, which would go on beside those that are started next
            torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)
        ctx = cls(device, world_size, rank, model_parallel, fsdp)
        if world_size > 1:
            ctx._init_groups(timeout)
        return ctx

    def _init_groups(self, timeout: timedelta) -> None:
        """Makes the process groups, and compares the layout with that of the other processes."""
        device = self.device
        if device == "cuda":
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        self._store = _rendezvous(self.rank, self.world_size, timeout)
        dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.world_size, timeout=timeout)
        if device == "cuda":
            threading.Thread(target=_watch, args=[_get_default_store()], daemon=True).start()
        self.require_equal({"--device": device, "--model-parallel": self.mp_size, "--fsdp": self.fsdp})
        mesh = dist.init_device_mesh(device, (self.dp_size, self.mp_size), mesh_dim_names=("dp", "mp"))
        self.dp_mesh, self.dp_group, self.mp_group = mesh["dp"], mesh["dp"].get_group(), mesh["mp"].get_group()
        for group in (self.dp_group, self.mp_group):  # which a mesh gives half an hour
            _set_pg_timeout(timeout, group)

    # --- Collectives --------------------------------------------------------------------------------------------------

    def raise_if_any_failed(self, error: Exception | None = None) -> None:
        """Waits for all; if one of them comes with an error, each raises an `CollectiveError` with its words."""
        if self.world_size == 1:
            if error is not None:
                raise error
            return
        if self.all_reduce_max(float(error is not None))[0]:
            errors: list[str | None] = [None] * self.world_size
            dist.all_gather_object(errors, None if error is None else str(error))
            raise CollectiveError(next(text for text in errors if text is not None)) from error

    @contextmanager
    def collective_section(self) -> Iterator[None]:
        """Work of each process, at whose end an error of one of them is raised in all."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.raise_if_any_failed(error)
        else:
            self.raise_if_any_failed()

    def all_reduce_max(self, *values: float) -> list[float]:
        """The largest of each value among all processes."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def broadcast(self, *values: float) -> list[float]:
        """The first process's values: what it has measured or decided."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(tensor, 0)
        return tensor.tolist()

    def broadcast_bytes(self, read: Callable[[], bytes | None]) -> bytes | None:
        """What `read` returns in the first process, where somebody types: for that, others wait as long as it takes."""
        if self.world_size == 1:
            return read()
        texts = [read() if self.rank == 0 else None]
        self._n_texts += 1
        if self.rank == 0:
            self._store.set(f"text {self._n_texts}", "")
        while self.rank and not self._store.check([f"text {self._n_texts}"]):
            time.sleep(0.02)
        dist.broadcast_object_list(texts, 0)
        return texts[0]

    def require_equal(self, settings: dict[str, Any]) -> None:
        """Compares what every process was told, on a machine and by a command of its own.

        Raises:
            ParallelError: In all processes, if one was told something else.
        """
        if self.world_size == 1:
            return
        everybodys: list[Any] = [None] * self.world_size
        dist.all_gather_object(everybodys, {name: str(value) for name, value in settings.items()})
        for rank, others in enumerate(everybodys):
            for name, value in everybodys[0].items():
                if others.get(name) != value:
                    raise ParallelError(f"process 0 has {name} = {value}, process {rank} has {others.get(name)}")

    def all_reduce_dp(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the data-parallel processes."""
        if self.dp_size > 1:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def data_parallel_slice(self, count: int) -> slice:
        """This process's share of a batch of `count` windows, which `check` has found to divide."""
        each = count // self.dp_size
        return slice(self.dp_rank * each, (self.dp_rank + 1) * each)

    def check_divisible(self, args: ModelArgs, batch_size: int | None = None) -> None:
        """Refuses what cannot be shared out.

        Args:
            args: The model's shape.
            batch_size: Windows at a time, of all data-parallel processes.

        Raises:
            ParallelError: With what does not divide, and what would.
        """
        try:
            check_model_parallel(args, self.mp_size)
        except CheckpointError as error:
            raise ParallelError(str(error)) from None
        if batch_size is not None and batch_size % self.dp_size:
            near = batch_size - batch_size % self.dp_size
            works = " or ".join(str(n) for n in (near, near + self.dp_size) if n)
            raise ParallelError(f"--batch-size {batch_size} cannot be shared by {self.dp_size} processes; take {works}")

    # --- Spreading a model --------------------------------------------------------------------------------------------

    def build(self, args: ModelArgs, compute_dtype: torch.dtype, fp8_weights: bool = False) -> Transformer:
        """Makes this process's part of a model, its weights undefined; memory is touched for the part only."""
        if self.mp_size == 1:
            return Transformer(args, compute_dtype, fp8_weights, init=False)
        model = Transformer(args, compute_dtype, init=False)
        for name, p in model.named_parameters():
            box = state_slice(name, p.shape, self.mp_rank, self.mp_size)
            if box.shape != _flat_shape(p.shape):
                p.data = torch.empty_like(_take(p.data, box), memory_format=torch.contiguous_format)
        for layer in model.fp8_layers() if fp8_weights else []:
            layer.store_fp8()
        self._connect(model)
        return model

    def init_weights(self, model: Transformer, seed: int) -> None:
        """`Transformer.init_weights` of the whole model, of which each process keeps its part."""
        if self.mp_size == 1:
            return model.init_weights(seed)
        shapes = full_shapes(model, self)
        with torch.no_grad():
            for i, (name, p) in enumerate(model.named_parameters()):
                box = state_slice(name, shapes[name], self.mp_rank, self.mp_size)
                p.copy_(_take(draw_weight(name, i, shapes[name], seed), box))
            for gate in model.gates():
                if gate.bias is not None:
                    gate.bias.zero_()
        return None

    def _connect(self, model: Transformer) -> None:
        """Puts the sums and copies between the parts into a model that was cut."""
        blocks = [*model.layers, *(module.block for module in model.mtp)]

        def enter(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return _Copy.apply(inputs[0], self), *inputs[1:]

        def leave(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, torch.Tensor):
                return _Sum.apply(output, self)
            y, routing = output
            share = routing.balance_loss / self.mp_size  # each part computes all of it, and its gradients are added up
            balance_loss = share + (routing.balance_loss - share).detach()
            return _Sum.apply(y, self), routing._replace(balance_loss=balance_loss)

        for block in blocks:
            block.attn.n_heads //= self.mp_size
            for half in (block.attn, block.ffn):
                half.register_forward_pre_hook(enter)
                half.register_forward_hook(leave)
            if hasattr(block.ffn, "experts"):
                block.ffn.experts.first_expert = self.mp_rank * (model.args.n_routed_experts // self.mp_size)
        model.embed = _Embedding(model.embed.weight, self)
        model.head.register_forward_pre_hook(enter)
        model.head.register_forward_hook(self._side_by_side)

    def _side_by_side(self, _module: nn.Module, _inputs: tuple[Any, ...], logits: torch.Tensor) -> torch.Tensor:
        width = logits.shape[-1]
        before, after = self.mp_rank * width, (self.mp_size - 1 - self.mp_rank) * width
        return _Sum.apply(F.pad(logits, (before, after)), self)

    def parallelize(self, model: Transformer, compiles: bool) -> Callable[[torch.Tensor, torch.Tensor], Losses]:
        """Lets the data-parallel processes share their gradients; returns the function that computes the loss.

        Args:
            model: This process's part of the model; FSDP shards it here.
            compiles: Whether to use torch.compile.
        """
        if self.fsdp:
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            for layer in [*model.layers, *model.mtp]:
                if compiles:
                    _compile_training(layer)
                fully_shard(layer, mesh=self.dp_mesh)
            fully_shard(model, mesh=self.dp_mesh, reshard_after_forward=True)  # for whoever looks at its parameters
            register_fsdp_forward_method(model, "loss")
            register_fsdp_forward_method(model, "next_byte_loss")
            loss = model.loss
        else:
            loss = torch.compile(model.loss, fullgraph=True) if compiles else model.loss
        self.register_sharded_parameters(model)
        if self.dp_size == 1 or self.fsdp:
            return loss
        return nn.parallel.DistributedDataParallel(
            _LossModule(model, loss), process_group=self.dp_group, gradient_as_bucket_view=True
        )

    def register_sharded_parameters(self, model: Transformer) -> None:
        """Finds the parameters that are cut among the parts, and those whose gradients the parts share."""
        if self.mp_size == 1:
            return
        shapes = full_shapes(model, self)
        for name, p in model.named_parameters():
            box, (rows, cols) = state_slice(name, shapes[name], self.mp_rank, self.mp_size), _flat_shape(shapes[name])
            if box.shape != (rows, cols):
                self._cuts[p] = int(box.shape[0] == rows)
            elif ".attn." in name or ".ffn." in name:
                self._shares.append(p)

    def no_sync(self, loss: Any, is_last: bool) -> Any:
        """A context in which DDP leaves averaging to the last of several batches that make one step."""
        return nullcontext() if is_last or self.dp_size == 1 or self.fsdp else loss.no_sync()

    def local_shard(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int | None]:
        """This process's shard of a tensor, and from which row on; the tensor and None if FSDP has not cut it."""
        if not self.fsdp or not hasattr(tensor, "device_mesh"):
            return tensor, None
        chunk = -(-tensor.shape[0] // self.dp_size)  # as torch.chunk and FSDP cut
        return tensor.to_local(), min(tensor.shape[0], chunk * self.dp_rank)

    # --- Gradients and updates ----------------------------------------------------------------------------------------

    def all_reduce_replicated_grads(self) -> None:
        """Adds up the gradients of which each part of the model has a share."""
        grads = [self.local_shard(p.grad)[0] for p in self._shares]
        if grads:
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat, group=self.mp_group)
            for g, new in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(new.view_as(g))

    def replicated_numel(self) -> int:
        """How many numbers `all_reduce_replicated_grads` sends."""
        return sum(self.local_numel(p) for p in self._shares)

    def local_numel(self, p: nn.Parameter) -> int:
        """How many numbers of a parameter of this part a process holds: FSDP cuts along the first dimension."""
        return -(-len(p) // self.dp_size) * p[0].numel() if self.fsdp else p.numel()

    def gathered_numel(self, matrices: Iterable[nn.Parameter]) -> int:
        """How many numbers `whole` gathers of parameters: the shards of a part, then the parts of a matrix."""
        matrices = [p for p in matrices if p.ndim == 2]
        return sum(p.numel() * (self.fsdp + self.mp_size * (p in self._cuts)) for p in matrices)

    def clip_grad_norm(self, model: Transformer, max_norm: float) -> torch.Tensor:
        """`nn.utils.clip_grad_norm_` of the whole model; returns the norm before."""
        parameters = list(model.parameters())
        if self.world_size == 1:
            return nn.utils.clip_grad_norm_(parameters, max_norm)
        grads = [self.local_shard(p.grad)[0] for p in parameters]
        squares = torch.stack(torch._foreach_norm(grads)).double().square()
        copies = [(1 if p in self._cuts else self.mp_size) * (1 if self.fsdp else self.dp_size) for p in parameters]
        total = (squares / torch.tensor(copies, device=squares.device)).sum()
        dist.all_reduce(total)
        norm = total.sqrt().float()
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def full_tensor(self, p: nn.Parameter, update: torch.Tensor) -> torch.Tensor:
        """Gathers what has the layout of a parameter: matrices (n, rows, columns), none of them cut."""
        if self.fsdp and p.ndim == 2:
            update = update.full_tensor()
        elif self.fsdp:  # whole experts
            update = update.to_local()
        if (dim := self._cuts.get(p)) is not None and p.ndim == 2:
            parts = [torch.empty_like(update) for _ in range(self.mp_size)]
            dist.all_gather(parts, update.contiguous(), group=self.mp_group)
            update = torch.cat(parts, dim=dim)
        return update.reshape(-1, *update.shape[-2:])

    def local_part(self, p: nn.Parameter, update: torch.Tensor) -> torch.Tensor:
        """The part of what `whole` gathered that this process holds."""
        if p.ndim > 2:
            return update
        update = update.squeeze(0)
        if (dim := self._cuts.get(p)) is not None:
            update = update.chunk(self.mp_size, dim)[self.mp_rank]
        held_here, first = self.local_shard(p)
        return update if first is None else update[first : first + len(held_here)]


def _compile_training(layer: nn.Module) -> None:
    """Compiles a layer for training alone: evaluations and samples have many lengths, and each would be compiled."""
    plain, compiled = layer.forward, torch.compile(layer.forward, fullgraph=True)
    layer.forward = lambda *inputs: (compiled if layer.training else plain)(*inputs)


def _flat_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return (1, *shape)[-2:] if len(shape) < 3 else (shape[0] * shape[1], shape[2])


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(_flat_shape(tensor.shape))


def _take(whole: torch.Tensor, box: Slice2D) -> torch.Tensor:
    """Cuts a rectangle, as `checkpoint.state_slice` gives it, out of a whole parameter."""
    part = _flat(whole)[box.top : box.bottom, box.left : box.right]
    return part.reshape(-1, *whole.shape[1:]) if whole.ndim == 3 else part.reshape(part.shape[2 - whole.ndim :])


def _all_reduce(x: torch.Tensor, layout: ParallelContext) -> torch.Tensor:
    """The sum over the parts of a model."""
    if layout.mp_group is None:
        layout.counted += x.numel() * x.element_size()
        return x.clone()
    import torch.distributed._functional_collectives as functional

    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", layout.mp_group))


class _Copy(torch.autograd.Function):
    """Where parts begin to differ: the same forward; backward, the sum of the parts' gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: ParallelContext) -> torch.Tensor:
        ctx.layout = layout
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_reduce(grad, ctx.layout), None


class _Sum(torch.autograd.Function):
    """Where parts meet again: the sum forward; the same gradient for all of them backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: ParallelContext) -> torch.Tensor:
        return _all_reduce(x, layout)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Embedding(nn.Module):
    """The rows of an embedding that this part holds; those of other parts come in with the sum."""

    def __init__(self, weight: nn.Parameter, layout: ParallelContext):
        super().__init__()
        self.weight = weight
        self.layout = layout

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        index = tokens - self.layout.mp_rank * len(self.weight)
        is_here = (index >= 0) & (index < len(self.weight))
        rows = F.embedding(index.where(is_here, 0), self.weight)
        return _Sum.apply(rows.where(is_here.unsqueeze(-1), 0), self.layout)


class _LossModule(nn.Module):
    """The model as DDP wants it: a module whose forward is what is trained."""

    def __init__(self, model: Transformer, loss: Callable[[torch.Tensor, torch.Tensor], Losses]):
        super().__init__()
        self.model = model
        self.loss = loss
        # equal everywhere without being sent with every batch
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> Losses:
        return self.loss(tokens, targets)
