"""Sharding of a model and its batches over many processes, and the collectives between them.

`torchrun` starts N = data-parallel × tensor-parallel processes (ranks). With `--model-parallel M`, each M consecutive
ranks are a tensor-parallel group, which has one model; ranks with the same number in their groups have copies of one
shard and are a data-parallel group. With M = 2, the two ranks of a tensor-parallel group have of a block:

                     rank 0                     rank 1
    embed            bytes 0-127                bytes 128-255           each looks up its own, then all-reduce
    attn_norm        replicated                 replicated
    attn   wq, wkv_b heads of the first half    of the second           column-parallel
           wkv_a, …  replicated                 replicated
           indexer   replicated                 replicated             all-reduce of the attention that it learns from
           wo        inputs from its heads      inputs from its heads   row-parallel: all-reduce of the outputs
    ffn    w1, w3    first half of the outputs  second half             column-parallel
           w2        its inputs                 its inputs              row-parallel: all-reduce of the outputs
           experts   the first half of them     the second              all-reduce of the outputs
           gate      replicated                 replicated
    head             logits of bytes 0-127      of bytes 128-255        concatenated

So a block has two all-reduces forward, at the ends of `attn` and `ffn`, and two backward, at their beginnings, where
each rank has only the gradient through its own shard (Megatron-LM, Shoeybi et al. 2019, section 3, calls these g and
f). A replicated weight between the two computes the same everywhere, but gets only a term of its gradient on each rank:
`finish_gradients` adds these up. `SHARDED_DIM` has the rules, which are those of a native checkpoint.

Each data-parallel rank takes its slice of every batch. Their gradients are averaged, or FSDP2 shards parameters,
gradients and optimizer state over them.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, NoReturn, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.distributed_c10d import AllreduceCoalescedOptions, _get_default_store, _set_pg_timeout

import command
import fp8_ops
from model import Losses, ModelArgs, Routing, Transformer, draw_weight
from safetensors_io import CheckpointError, Slice2D

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13

BUCKET_BYTES = 32 << 20  # of gradients that are averaged at a time: so many that their start costs little
TIMEOUT = timedelta(minutes=10)  # for another rank; a step or the saving of a checkpoint takes less
MAX_PROCESSES = 1 << 20
FAILED = "failed rank"  # key in the store: the first rank that failed
graphs: weakref.WeakSet[Any] = weakref.WeakSet()  # CUDA graphs that have collectives


class ParallelError(ValueError):
    """Numbers of processes or settings that do not fit together: the same error on all ranks."""


class LaunchError(ParallelError):
    """Processes that were not started properly: an error that a rank may have for itself."""


class CollectiveError(ValueError):
    """An error of some rank, raised on all of them."""


# --- Sharding rules --------------------------------------------------------------------------------------------------

# The dimension of a layer's weight (outputs, inputs) that is divided among tensor-parallel ranks: "column-parallel"
# layers by outputs, "row-parallel" ones by inputs. Of routed experts, each is on one rank. All else is replicated.
SHARDED_DIM = {
    **dict.fromkeys(("wq", "wq_b", "wkv_b", "wk", "wv", "w1", "w3", "embed", "head"), 0),
    **dict.fromkeys(("wo", "w2"), 1),
}


def sharded_dim(name: str) -> int | None:
    """Returns the dimension of a tensor of `state_dict` that tensor-parallel ranks divide; None: replicated."""
    if ".indexer." in name:  # all ranks must choose the same positions
        return None
    # routed experts are stacked along dimension 0
    return 0 if ".experts." in name else SHARDED_DIM.get(name.rsplit(".", 2)[-2])


def ranks_with(name: str, n_experts: int, world: int) -> range:
    """Returns the tensor-parallel ranks that have something of a native tensor: one for a routed expert's, else all."""
    _, is_routed, rest = name.partition(".experts.")
    if not is_routed:
        return range(world)
    owner = int(rest.split(".")[0]) // (n_experts // world)
    return range(owner, owner + 1)


def native_slice(name: str, shape: tuple[int, ...], n_experts: int, rank: int, world: int) -> Slice2D | None:
    """Returns the rectangle of a full tensor that a rank's file of a native checkpoint has; None: nothing of it.

    There, each of the `n_experts` routed experts has tensors of its own. A vector counts as one row. `world` is a
    number of tensor-parallel ranks that `check_model_parallel` accepts.
    """
    if rank not in ranks_with(name, n_experts, world):
        return None
    return state_slice(name, shape, 0, 1) if ".experts." in name else state_slice(name, shape, rank, world)


def state_slice(name: str, shape: tuple[int, ...], rank: int, world: int) -> Slice2D:
    """Returns the rectangle of a full tensor of `state_dict` that a rank has; stacked matrices are below each other."""
    rows, cols, dim = math.prod(shape[:-1]), shape[-1], sharded_dim(name)
    if dim == 0:
        return Slice2D(rows * rank // world, rows * (rank + 1) // world, 0, cols)
    if dim == 1:
        return Slice2D(0, rows, cols * rank // world, cols * (rank + 1) // world)
    return Slice2D(0, rows, 0, cols)


def local_slice(name: str, tensor: torch.Tensor, shape: tuple[int, ...], ctx: ParallelContext) -> Slice2D:
    """Returns the rectangle that this process has of a full tensor: of its `state_slice`, the rows that FSDP leaves.

    `name` is that of `state_dict`, `tensor` is the one in this rank's model, and `shape` the full one's.
    """
    box = state_slice(name, shape, ctx.mp_rank, ctx.mp_size)
    shard, first = ctx.local_shard(tensor)
    if first is None:
        return box
    last = first + len(shard)
    if len(shape) == 1:
        return box._replace(left=box.left + first, right=box.left + last)
    rows = math.prod(tensor.shape[1:-1])  # of one matrix of a stack
    return box._replace(top=box.top + first * rows, bottom=box.top + last * rows)


def full_shapes(model: Transformer, ctx: ParallelContext) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the full model's parameters and buffers, by their names in its `state_dict`."""
    if ctx.mp_size > 1:
        with torch.device("meta"):
            model = Transformer(model.args, fp8_weights=True)
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has the dtype that the model computes in: norms and the router have their own."""
    return len(shape) > 1 and not name.endswith("gate.weight")


def check_model_parallel(args: ModelArgs, world: int, flag: str = "--model-parallel") -> None:
    """Raises a CheckpointError, with numbers that would do, if `world` shards, set by `flag`, do not divide a model."""
    sizes = {"vocab_size": args.vocab_size, "n_heads": args.n_heads}
    layers = [args.is_moe(i) for i in range(args.n_layers + args.n_mtp_layers)]
    if any(layers):
        sizes["n_routed_experts"] = args.n_routed_experts
        sizes["n_shared_experts * moe_inter_dim"] = args.n_shared_experts * args.moe_inter_dim
    if not all(layers):
        sizes["inter_dim"] = args.inter_dim
    works = _divisors(math.gcd(*sizes.values()))
    for key, size in sizes.items():
        if size % world:
            raise CheckpointError(f"{key} = {size} cannot be cut into {world}; {flag} can be {works}")


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, min(n, 1024) + 1) if n % d == 0)


# --- The machine ------------------------------------------------------------------------------------------------------


class DeviceError(ValueError):
    """A device that this machine, or this build of torch, does not have."""


def pick_device(name: str | None = None) -> str:
    """Returns the device asked for, or else the best of this machine; raises a DeviceError where it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return next(device for device, available in there.items() if available)
    if not there.get(name, False):
        raise DeviceError(f"device {name!r} is not available here; there is {', '.join(d for d in there if there[d])}")
    return name


def pick_dtype(device: str, name: str = "auto") -> torch.dtype:
    """Chooses what to compute in: "fp32", "bf16", or by "auto" bfloat16 where the hardware multiplies it natively."""
    is_native = name == "bf16"
    if name == "auto" and device == "cuda":
        is_native = torch.cuda.get_device_capability() >= (8, 0)
    elif name == "auto" and device == "cpu":
        is_native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if is_native else torch.float32


def require_compiler(device: str) -> None:
    """Raises a DeviceError on a CPU without the C++ compiler that torch.compile needs there."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        raise DeviceError(f"--compile needs a C++ compiler, and there is no {compiler}; install one, or leave it out")


def keep_freed_memory() -> None:
    """Asks glibc's malloc, where there is one, to keep what is freed instead of returning it to the system.

    Activations are a few megabytes that come and go hundreds of times a second. By default each is a new mapping
    whose pages the kernel must clear, which costs more than the arithmetic on them.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, (1 << 31) - 1)


# --- Launching and ending processes ----------------------------------------------------------------------------------


class Launch(NamedTuple):
    """The environment variables of a launcher such as torchrun."""

    world_size: int
    rank: int
    local_rank: int
    local_world_size: int
    restart_count: int  # how often torchrun has started these workers again
    master_addr: str
    master_port: int


def read_launch() -> Launch:
    """Reads the environment variables of a launcher; without them, this is one process alone.

    Raises a LaunchError that names the variable that is missing or invalid.
    """

    def integer(name: str, low: int, high: int, default: str = "nothing") -> int:
        try:
            return command.integer(low, high)(os.environ.get(name, default))
        except argparse.ArgumentTypeError as error:
            raise LaunchError(
                f"the environment variable {name} {error}; "
                "start several processes with torchrun, or unset WORLD_SIZE and RANK to start one"
            ) from None

    world = integer("WORLD_SIZE", 1, MAX_PROCESSES, "1")
    rank = integer("RANK", 0, world - 1, "0" if world == 1 else "nothing")
    here = integer("LOCAL_WORLD_SIZE", 1, world, "1")
    local_rank = integer("LOCAL_RANK", 0, (here if here > 1 else world) - 1, "0")
    restarts = integer("TORCHELASTIC_RESTART_COUNT", 0, 1 << 31, "0")
    host, port = os.environ.get("MASTER_ADDR", ""), integer("MASTER_PORT", 1, 65535) if world > 1 else 0
    if world > 1 and not host:
        raise LaunchError("the environment variable MASTER_ADDR must be the host of process 0; start with torchrun")
    return Launch(world, rank, local_rank, here, restarts, host, port)


def is_rank_zero() -> bool:
    """Whether this process prints results; before there is a process group, too."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def process_group(prog: str, mistakes: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Around the body of a command that may join a process group: destroys the group at the end.

    An error of this rank alone ends its process here and at once, reported as `command.run` would: the other ranks get
    an error when its connections break. An error that all ranks have (CollectiveError, ParallelError, and a mistake
    before there is a group) is reported by one process a machine. Without a group, exceptions go on to `command.run`,
    whose arguments these are.
    """
    try:
        yield
        destroy()
    except BaseException as error:  # noqa: BLE001 - each kind has its exit code
        is_shared = isinstance(error, (CollectiveError, ParallelError))
        if dist.is_initialized() and not is_shared:
            abort(_report(prog, error, mistakes))
        destroy()
        is_shared = (is_shared or isinstance(error, mistakes)) and not isinstance(error, LaunchError)
        if is_shared and not command.is_local_rank_zero():
            sys.exit(2)
        raise


def _report(prog: str, error: BaseException, mistakes: tuple[type[Exception], ...]) -> int:
    """Reports an error of this rank; returns the exit code."""
    code, message = command.explain(error, mistakes)
    if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo's errors have no class of their own
        code, message = 1, f"another process is gone or does not answer: {_first_line(error)}"
    if message is not None:
        command.complain(prog, message)
    elif code == 1:
        traceback.print_exc()
    return code


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]  # frames of C++ follow


def destroy() -> None:
    """Destroys the process group, if this process has joined one, and the graphs that have its collectives."""
    if dist.is_initialized():
        for graph in graphs:  # NCCL would wait for their end
            graph.reset()
        dist.destroy_process_group()


def abort(code: int) -> NoReturn:
    """Ends this process, which has joined others, at once: they get an error when its connections break.

    Destroying the group, or Python's own way to end, would wait for threads that wait for the other ranks.
    """
    with suppress(dist.DistError):
        _get_default_store().set(FAILED, str(dist.get_rank()))  # without waiting for an answer
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def _watch(store: dist.Store, rank: int) -> None:
    """Ends this process when another rank has failed: it may be waiting in a kernel of NCCL, which notices nothing.

    Python handles no signal then either, so torchrun would wait for half a minute before it kills.
    """
    try:
        while not store.check([FAILED]):
            time.sleep(0.5)
            if not dist.is_initialized():
                return
        failed = store.get(FAILED).decode()
    except dist.DistError:  # rank 0 has ended, with the store; if it has succeeded, so will this one in a moment
        time.sleep(5)
        failed = "0"
    if dist.is_initialized() and failed != str(rank):
        if command.is_local_rank_zero():
            command.note(f"error: another process is gone: number {failed} has failed")
        os._exit(1)


def _connect(launch: Launch, timeout: timedelta) -> dist.Store:
    """Connects to the key-value store of rank 0, or of torchrun; raises a LaunchError if it is not at its port."""
    is_server = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    place, result = (launch.master_addr, launch.master_port), list[Any]()

    def connect() -> None:
        try:
            while not is_server:  # torch would wait as well, and write a page of warnings
                with suppress(OSError, UnicodeError), socket.create_connection(place, 5):
                    break
                time.sleep(0.1)
            result.append(dist.TCPStore(*place, None, is_server, timeout=timeout, wait_for_workers=False))
        except (RuntimeError, ValueError) as error:
            result.append(error)

    # in a thread: a signal would have to wait for it, and another program at the port might never answer
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout.total_seconds())
    store = result[0] if result else TimeoutError(f"no answer within {timeout}")
    if isinstance(store, Exception):
        where = f"MASTER_ADDR {command.shorten(launch.master_addr)}, MASTER_PORT {launch.master_port}"
        doing = "cannot be process 0" if is_server else f"process {launch.rank} does not reach process 0"
        raise LaunchError(f"{doing} at {where}: {_first_line(store)}; start all processes, with a free port")
    store.set_timeout(timeout)
    return store


def _rendezvous(launch: Launch, timeout: timedelta) -> dist.Store:
    """Waits for all ranks; returns the store in which they leave their addresses, under a prefix of this start alone.

    torchrun keeps one store for all starts of its workers (still so in torch 2.13): there, a rank that is quicker than
    others would find the addresses of processes that were killed. Its count of restarts is no prefix, as it differs
    between nodes. So rank 0 draws one, and sends it to each rank in answer to a key that this rank's process has drawn,
    which then confirms it: the request of an earlier process is answered too, but no process reads that answer.
    """
    store, key, deadline = _connect(launch, timeout), secrets.token_hex(8), time.monotonic() + timeout.total_seconds()

    def wait(missing: list[int]) -> None:
        """Waits a moment for these ranks; in Python, since a signal would have to wait for the store's own waiting."""
        if time.monotonic() > deadline:
            names = command.shorten(", ".join(map(str, missing)), 60)
            raise LaunchError(f"process {names} of {launch.world_size} has not come within {timeout}; start all")
        time.sleep(0.01)

    try:
        if launch.rank > 0:
            store.set(f"request of {launch.rank}", key)
            while not store.check([f"answer to {key}"]):
                wait([0])
            prefix = store.get(f"answer to {key}").decode()
            store.set(f"{prefix} known to {launch.rank}", "")
            return dist.PrefixStore(prefix, store)
        missing = list(range(1, launch.world_size))
        while missing := [rank for rank in missing if not store.check([f"{key} known to {rank}"])]:
            for rank in missing:
                if store.check([f"request of {rank}"]):  # read again each time: the first may be of an earlier process
                    store.set(f"answer to {store.get(f'request of {rank}').decode()}", key)
            wait(missing)
        return dist.PrefixStore(key, store)
    except dist.DistError as error:
        raise ParallelError(f"process 0 has ended before all processes had come: {_first_line(error)}") from None


# --- Ranks and collectives -------------------------------------------------------------------------------------------


class ParallelContext:
    """The ranks of this process, and the collectives between all of them.

    Constructed directly it does not communicate: one process alone, or with a `world_size` the plan of a run, which
    counts the bytes that would be sent. `join` is for the processes of torchrun. Each `model_parallel` consecutive
    ranks have one model; with `fsdp`, the data-parallel ranks shard it.

    Attributes:
        mp_size, mp_rank: Size of the tensor-parallel group, and the rank in it.
        dp_size, dp_rank: Size of the data-parallel group, and the rank in it.
        writes_replicated: Whether this process writes the tensors of which several processes have a copy.
        timeout: How long to wait for other processes.
        averages_gradients: Whether the backward pass averages gradients over the data-parallel ranks, as it should in
            the last of several batches that make one step.
        bucket: Complete gradients that are to be averaged.
        averaging: The averages that are on their way.
        counted: Bytes that tensor-parallel ranks would have sent, where there are no groups.

    Raises:
        ParallelError: The number of processes is no multiple of `model_parallel`, or too large.
    """

    dp_mesh: dist.DeviceMesh | None = None
    dp_group: dist.ProcessGroup | None = None
    mp_group: dist.ProcessGroup | None = None
    timeout = TIMEOUT

    def __init__(
        self, device: str = "cpu", world_size: int = 1, rank: int = 0, model_parallel: int = 1, fsdp: bool = False
    ):
        if world_size > MAX_PROCESSES:
            raise ParallelError(f"{world_size} processes are too many: at most {MAX_PROCESSES} are possible")
        if world_size % model_parallel:
            raise ParallelError(
                f"{world_size} processes are no multiple of --model-parallel {model_parallel}, "
                f"which can be {_divisors(world_size)}"
            )
        self.device, self.world_size, self.rank = device, world_size, rank
        self.mp_size, self.dp_size = model_parallel, world_size // model_parallel
        self.mp_rank, self.dp_rank = rank % self.mp_size, rank // self.mp_size
        self.fsdp = fsdp and self.dp_size > 1
        self.writes_replicated = self.dp_rank == 0
        self.counted = self._n_texts = 0
        self.averages_gradients = True
        self.bucket: list[torch.Tensor] = []
        self.averaging: list[dist.Work] = []

    @classmethod
    def join(
        cls, device: str, model_parallel: int = 1, fsdp: bool = False, timeout: timedelta = TIMEOUT
    ) -> ParallelContext:
        """Joins the processes that torchrun started, as the environment has them; one process alone without torchrun.

        Raises a ParallelError where the environment makes no sense, the device cannot be shared, processes do not come,
        or one of them has other flags.
        """
        launch, gpus = read_launch(), torch.cuda.device_count()
        if launch.world_size > 1 and device == "mps":
            raise ParallelError("several processes cannot share an mps device; add --device cpu, or start one process")
        here = max(launch.local_world_size, launch.local_rank + 1)
        if device == "cuda" and here > gpus:
            raise ParallelError(f"{here} processes cannot share {gpus} GPUs; start at most {gpus} on this machine")
        if "TORCHELASTIC_RUN_ID" in os.environ:  # else workers of a torchrun that is killed would go on
            torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]
        ctx = cls(device, launch.world_size, launch.rank, model_parallel, fsdp)
        if launch.world_size > 1:
            ctx._init_groups(launch, timeout)
        return ctx

    def _init_groups(self, launch: Launch, timeout: timedelta) -> None:
        """Creates the process groups, after a comparison of the settings that they follow from."""
        device, self.timeout = self.device, timeout
        if device == "cuda":
            self.device = f"cuda:{launch.local_rank}"
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        self._store = _rendezvous(launch, timeout)
        dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.world_size, timeout=timeout)
        if device == "cuda":
            store = _get_default_store().clone()  # type: ignore[attr-defined]
            threading.Thread(target=_watch, args=(store, self.rank), daemon=True).start()
        self.require_equal({"--device": device, "--model-parallel": self.mp_size, "--fsdp": self.fsdp})
        mesh = dist.init_device_mesh(device, (self.dp_size, self.mp_size), mesh_dim_names=("dp", "mp"))
        self.dp_mesh, self.dp_group, self.mp_group = mesh["dp"], mesh["dp"].get_group(), mesh["mp"].get_group()
        for group in (self.dp_group, self.mp_group):  # a mesh's own time-out is half an hour
            _set_pg_timeout(timeout, group)

    def raise_if_any_failed(self, error: Exception | None = None) -> None:
        """Waits for all ranks; if one of them has an error, all raise a CollectiveError with its message."""
        if self.world_size == 1 and error is not None:
            raise error
        if self.all_reduce_max(0.0 if error is None else 1.0)[0]:
            errors: list[str | None] = [None] * self.world_size
            dist.all_gather_object(errors, error and command.explain(error, (ValueError,))[1])
            raise CollectiveError(next(text for text in errors if text is not None)) from error

    @contextmanager
    def collective_section(self) -> Iterator[None]:
        """Around work of each rank: at its end, an error of one of them is raised on all."""
        error: Exception | None = None
        try:
            yield
        except (OSError, ValueError) as caught:
            error = caught
        self.raise_if_any_failed(error)

    def all_reduce_max(self, *values: float) -> list[float]:
        """Returns the largest of each value over all ranks."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def broadcast(self, *values: float) -> list[float]:
        """Returns rank 0's values."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.broadcast(tensor, 0)
        return tensor.tolist()

    def broadcast_bytes(self, read: Callable[[], bytes | None]) -> bytes | None:
        """Returns what `read` returns on rank 0, where a user may be typing: the others wait as long as it takes."""
        if self.world_size == 1:
            return read()
        texts = [read() if self.rank == 0 else None]
        self._n_texts += 1  # the others poll the store, since a collective would time out
        if self.rank == 0:
            self._store.set(f"text {self._n_texts}", "")
        while self.rank and not self._store.check([f"text {self._n_texts}"]):
            time.sleep(0.02)
        dist.broadcast_object_list(texts, 0)
        return texts[0]

    def require_equal(self, settings: dict[str, Any]) -> None:
        """Raises a ParallelError on all ranks if one has other settings: each has a command and files of its own."""
        if self.world_size == 1:
            return
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, {name: str(value) for name, value in settings.items()})
        for rank, others in enumerate(gathered):
            for name in gathered[0] | others:
                first, other = gathered[0].get(name), others.get(name)
                if first != other:
                    raise ParallelError(
                        f"process 0 has {name} = {command.shorten(first)}, "
                        f"process {rank} has {command.shorten(other)}; give all the same"
                    )

    def wait_for(self, event: torch.cuda.Event) -> None:
        """Waits for a GPU, whose collectives wait for others: those of a CUDA graph have no time-out of NCCL's.

        Raises a DistError after `timeout`.
        """
        until = time.monotonic() + self.timeout.total_seconds()
        while self.world_size > 1 and not event.query():
            if time.monotonic() > until:
                raise dist.DistError(f"a step has not ended within {self.timeout}")
            time.sleep(1e-4)
        event.synchronize()

    def all_reduce_dp(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the data-parallel ranks, in place; returns it."""
        if self.dp_size > 1:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def data_parallel_slice(self, count: int) -> slice:
        """Returns this rank's slice of a batch of `count` sequences, a number that `check_divisible` accepts."""
        each = count // self.dp_size
        return slice(self.dp_rank * each, (self.dp_rank + 1) * each)

    def check_divisible(self, args: ModelArgs, batch_size: int | None = None) -> None:
        """Refuses a model, or a batch of all data-parallel ranks, that cannot be divided among the ranks.

        Raises a CheckpointError or ParallelError with what does not divide, and numbers that would.
        """
        check_model_parallel(args, self.mp_size)
        if batch_size is not None and batch_size % self.dp_size:
            near = batch_size - batch_size % self.dp_size
            works = " or ".join(str(n) for n in (near, near + self.dp_size) if n)
            raise ParallelError(f"--batch-size {batch_size} cannot be shared by {self.dp_size} processes; take {works}")

    def local_shard(self, tensor: Any) -> tuple[torch.Tensor, int | None]:
        """Returns this rank's FSDP shard of a tensor and its first row, or the tensor and None without."""
        if not self.fsdp or not hasattr(tensor, "device_mesh"):
            return tensor, None
        chunk = -(-tensor.shape[0] // self.dp_size)  # as torch.chunk and FSDP divide
        return tensor.to_local(), min(tensor.shape[0], chunk * self.dp_rank)


# --- A sharded model -------------------------------------------------------------------------------------------------


def build(ctx: ParallelContext, args: ModelArgs, dtype: torch.dtype, fp8_weights: bool = False) -> Transformer:
    """Builds this rank's shard of a model, its weights undefined; only the shard's memory is touched.

    `args` is what `check_divisible` accepts, `dtype` that of the activations; with `fp8_weights` there is room for
    weights stored in FP8.
    """
    if ctx.mp_size == 1:
        return Transformer(args, dtype, fp8_weights, init=False)
    model = Transformer(args, dtype, init=False)
    for name, p in model.named_parameters():
        p.data = torch.empty_like(_shard(name, p.data, ctx), memory_format=torch.contiguous_format)
    for layer in model.fp8_layers() if fp8_weights else []:
        layer.store_fp8()
    _add_collectives(ctx, model)
    return model


def init_weights(ctx: ParallelContext, model: Transformer, seed: int) -> None:
    """Draws the weights of the full model as `Transformer.init_weights` does; each rank keeps its shard."""
    shapes = full_shapes(model, ctx)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            p.copy_(_shard(name, draw_weight(name, i, shapes[name], seed), ctx))
        for name, buffer in model.named_buffers():
            if name.endswith("gate.bias"):
                buffer.zero_()


def _shard(name: str, full: torch.Tensor, ctx: ParallelContext) -> torch.Tensor:
    """Returns a view of a tensor-parallel rank's shard of a full parameter."""
    dim = sharded_dim(name)
    return full if dim is None else full.chunk(ctx.mp_size, dim)[ctx.mp_rank]


def _add_collectives(ctx: ParallelContext, model: Transformer) -> None:
    """Puts the collectives between tensor-parallel ranks at the ends of `attn`, `ffn`, `embed` and `head`."""

    def copy_input(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return fp8_ops.replace_values(inputs[0], lambda x: _Copy.apply(x, ctx)), *inputs[1:]

    def sum_output(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return _Sum.apply(output, ctx)
        y, extra = output  # of `attn` the indexer's loss or None, of `ffn` its statistics
        if isinstance(extra, Routing):
            extra = extra._replace(balance_loss=divided(extra.balance_loss))
        return _Sum.apply(y, ctx), divided(extra) if isinstance(extra, torch.Tensor) else extra

    def divided(loss: Any) -> torch.Tensor:
        """A loss of which each rank computes all, and then adds up the gradients."""
        term = loss / ctx.mp_size
        return term + (loss - term).detach()

    def concatenate_logits(_module: nn.Module, _inputs: tuple[Any, ...], logits: torch.Tensor) -> torch.Tensor:
        width = logits.shape[-1]
        before, after = ctx.mp_rank * width, (ctx.mp_size - 1 - ctx.mp_rank) * width
        return _Sum.apply(F.pad(logits, (before, after)), ctx)

    for block in [*model.layers, *(module.block for module in model.mtp)]:
        block.attn.n_heads //= ctx.mp_size
        if block.attn.indexer is not None:
            block.attn.indexer.sum_over_ranks = lambda x: _all_reduce(x, ctx)
        for half in (block.attn, block.ffn):
            half.register_forward_pre_hook(copy_input)
            half.register_forward_hook(sum_output)
        if hasattr(block.ffn, "experts"):
            block.ffn.experts.first_expert = ctx.mp_rank * (model.args.n_routed_experts // ctx.mp_size)
    embed = _Embedding(cast(nn.Parameter, model.embed.weight), ctx, model.compute_dtype)
    model.embed = embed  # type: ignore[assignment]
    model.head.register_forward_pre_hook(copy_input)
    model.head.register_forward_hook(concatenate_logits)


def parallelize(
    ctx: ParallelContext, model: Transformer, compiles: bool
) -> Callable[[torch.Tensor, torch.Tensor], Losses]:
    """Connects the data-parallel ranks and compiles; returns the function that computes the loss.

    FSDP shards the model further, which is this rank's shard. Without it, gradients are averaged as soon as they are
    complete.
    """
    if ctx.fsdp:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for layer in [*model.layers, *model.mtp]:
            if compiles:
                _compile_training(layer)
            fully_shard(layer, mesh=ctx.dp_mesh)
        fully_shard(model, mesh=ctx.dp_mesh, reshard_after_forward=True)  # so that all parameters stay sharded between
        register_fsdp_forward_method(model, "loss")
        register_fsdp_forward_method(model, "next_byte_loss")
        loss = model.loss
    else:
        loss = torch.compile(model.loss, fullgraph=True) if compiles else model.loss
    note_sharded_dims(ctx, model)  # of parameters that FSDP has replaced
    if ctx.dp_size > 1 and not ctx.fsdp:
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(partial(_average_gradient, ctx))
    return loss


def _average_gradient(ctx: ParallelContext, p: nn.Parameter) -> None:
    """Adds a complete gradient to the bucket; a full one is averaged while the backward pass goes on."""
    if ctx.averages_gradients:
        ctx.bucket.append(p.grad)
        if sum(grad.nbytes for grad in ctx.bucket) >= BUCKET_BYTES:
            _average_bucket(ctx)


def _average_bucket(ctx: ParallelContext) -> None:
    """Begins to average the gradients of the bucket, in place and in one kernel; see `finish_gradients`."""
    grads, ctx.bucket = ctx.bucket, []
    options = AllreduceCoalescedOptions()  # torch deprecates its own function of them, but not what it calls
    options.asyncOp = True
    if grads[0].is_cuda:
        options.reduceOp = cast(Any, dist.ReduceOp.AVG)
    else:  # gloo cannot average
        torch._foreach_div_(grads, ctx.dp_size)
    ctx.averaging.append(cast(Any, ctx.dp_group).allreduce_coalesced(grads, options))


def forget_step(ctx: ParallelContext, model: Transformer) -> None:
    """Clears what a step leaves that ended halfway, in a recording: nothing of it has been sent.

    FSDP's own `reset_iter_state` (torch 2.13) would wait for events of the recording, which CUDA forbids.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    ctx.bucket.clear()
    ctx.averaging.clear()
    modules: Iterator[Any] = model.modules()
    for state in [module._get_fsdp_state() for module in modules if hasattr(module, "_get_fsdp_state")]:
        state._training_state, group = TrainingState.IDLE, state._fsdp_param_group
        state._state_ctx.iter_forward_root, state._state_ctx.post_backward_final_callback_queued = None, False
        comm = state._comm_ctx
        comm.all_gather_state, comm.reduce_scatter_state = None, None
        for left in ("reduce_scatter_states", "_last_post_reduce_events", "post_forward_order"):  # some by version
            getattr(comm, left, []).clear()
        if group is not None:
            group._training_state, group._all_gather_result, group._post_reduce_event = TrainingState.IDLE, None, None
            group._post_forward_indices.clear()
            group._to_sharded()
            for p in group.fsdp_params:
                p.unsharded_accumulated_grad = None
                if hasattr(p, "_unsharded_param"):
                    p._unsharded_param.grad = None


def note_sharded_dims(ctx: ParallelContext, model: Transformer) -> None:
    """Notes on each parameter along which dimension tensor-parallel ranks hold shards of it, for the optimizer."""
    for name, p in model.named_parameters():
        p.sharded_dim = sharded_dim(name) if ctx.mp_size > 1 else None  # type: ignore[attr-defined]


def _compile_training(layer: nn.Module) -> None:
    """Compiles a layer for training alone: evaluations and samples have many lengths, and each would be compiled."""
    plain, compiled = layer.forward, torch.compile(layer.forward, fullgraph=True)
    layer.forward = lambda *inputs: compiled(*inputs) if layer.training else plain(*inputs)


def _all_reduce(x: torch.Tensor, ctx: ParallelContext) -> torch.Tensor:
    """Returns the sum of a tensor over the tensor-parallel ranks: in its place, so nothing else may need its terms."""
    if ctx.mp_group is None:
        ctx.counted += x.numel() * x.element_size()
        return x
    x = x.contiguous()
    if not torch.compiler.is_compiling():
        dist.all_reduce(x, group=ctx.mp_group)
        return x
    import torch.distributed._functional_collectives as functional

    return functional.wait_tensor(functional.all_reduce(x, "sum", ctx.mp_group))


class _Copy(torch.autograd.Function):
    """Megatron's f, before column-parallel layers: forward the same tensor, backward the sum over the ranks."""

    @staticmethod
    def forward(node: Any, x: torch.Tensor, ctx: ParallelContext) -> torch.Tensor:
        node.ctx = ctx
        return x.view_as(x)

    @staticmethod
    def backward(node: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_reduce(grad, node.ctx), None  # in place: products have made it, for this alone


class _Sum(torch.autograd.Function):
    """Megatron's g, after row-parallel layers: forward the sum over the ranks, backward the same gradient."""

    @staticmethod
    def forward(_node: Any, x: torch.Tensor, ctx: ParallelContext) -> torch.Tensor:
        return _all_reduce(x, ctx)

    @staticmethod
    def backward(_node: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Embedding(nn.Module):
    """This rank's rows of an embedding, in `dtype`; those of other ranks are added by the sum."""

    def __init__(self, weight: nn.Parameter, ctx: ParallelContext, dtype: torch.dtype):
        super().__init__()
        self.weight, self.ctx, self.dtype = weight, ctx, dtype

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        index = tokens - self.ctx.mp_rank * len(self.weight)
        is_here = (index >= 0) & (index < len(self.weight))
        rows = F.embedding(index.where(is_here, 0), self.weight).where(is_here.unsqueeze(-1), 0)
        return _Sum.apply(rows.to(self.dtype), self.ctx)  # rounded before it is sent: the other terms are zeros


def quantize_weights(ctx: ParallelContext, model: Transformer) -> None:
    """Quantises the weights once for the FP8 products to come; FSDP's shards are quantised when they are gathered."""
    if fp8_ops.gemm_impl == "fp8" and not ctx.fsdp:
        model.quantize_weights()


# --- Gradients and updates -------------------------------------------------------------------------------------------


def replicated_parameters(ctx: ParallelContext, model: Transformer) -> list[nn.Parameter]:
    """Returns the parameters of which each tensor-parallel rank has a copy and only a term of the gradient."""
    if ctx.mp_size == 1:
        return []
    inside = [(name, p) for name, p in model.named_parameters() if ".attn." in name or ".ffn." in name]
    return [p for name, p in inside if sharded_dim(name) is None and p.requires_grad]


def finish_gradients(ctx: ParallelContext, model: Transformer) -> None:
    """After a backward pass: waits for averages, sums gradients of replicated parameters over tensor-parallel ranks."""
    if ctx.bucket:
        _average_bucket(ctx)
    while ctx.averaging:
        ctx.averaging.pop(0).wait()
    grads = [ctx.local_shard(p.grad)[0] for p in replicated_parameters(ctx, model)]
    if grads:
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat, group=ctx.mp_group)
        for g, new in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(new.view_as(g))


def clip_grad_norm(ctx: ParallelContext, model: Transformer, max_norm: float) -> torch.Tensor:
    """Clips like `nn.utils.clip_grad_norm_` on the full model; returns the norm before."""
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    if ctx.world_size == 1:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    grads = [ctx.local_shard(p.grad)[0] for p in parameters]
    copies = [(ctx.mp_size if sharded_dim(name) is None else 1) * (1 if ctx.fsdp else ctx.dp_size) for name in names]
    norms = torch._foreach_div(torch._foreach_norm(grads), [math.sqrt(n) for n in copies])
    total = torch.stack(norms).double().square().sum()
    dist.all_reduce(total)
    norm = total.sqrt().float()
    torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


class MatrixShards(NamedTuple):
    """How matrices (n, rows, columns) lie on a group of processes: sharded along a dimension, or replicated (None)."""

    group: dist.ProcessGroup | None
    size: int
    rank: int
    dim: int | None
    length: int  # of the full matrix in that dimension; the last of FSDP's shards may be shorter than the others


def matrix_shards(ctx: ParallelContext, p: Any) -> tuple[list[MatrixShards], tuple[int, int]]:
    """Returns on which groups the matrices of a parameter are divided or replicated, and their full shape.

    Experts are never divided: of a stack of them, only replicas of data-parallel processes count.
    """
    found, shape = [], list(p.shape[-2:])
    if ctx.dp_size > 1 and (p.ndim == 2 or not ctx.fsdp):
        found.append(MatrixShards(ctx.dp_group, ctx.dp_size, ctx.dp_rank, 1 if ctx.fsdp else None, shape[0]))
    if ctx.mp_size > 1 and p.ndim == 2:
        dim = None if p.sharded_dim is None else p.sharded_dim + 1
        if dim is not None:
            shape[dim - 1] *= ctx.mp_size
        found.append(MatrixShards(ctx.mp_group, ctx.mp_size, ctx.mp_rank, dim, shape[(dim or 1) - 1]))
    return found, (shape[0], shape[1])


def map_full_matrices(
    shards: Sequence[MatrixShards], x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, dist.Work | None]:
    """Applies a function to full matrices, each on one process, and brings the results to where the shards were.

    Args:
        shards: As `matrix_shards` returns them.
        x: This process's shards of n matrices, (n, rows, columns), the same n on all processes.
        function: (matrices, rows, columns) to the same shape; it gets about n / size full matrices.

    Returns:
        The shards of the results, and the last exchange, after whose `wait` they are there; None: they are.

    Sharded matrices go to the process that takes them, and back, in one all-to-all each; of replicated ones the results
    are gathered. So the work is divided, and FSDP sends 2/size of the matrices where gathering all would send 1.
    """
    if not shards:
        return function(x), None
    group, size, rank, dim, length = shards[0]
    n = -(-len(x) // size)
    padded = F.pad(x, (0, 0, 0, 0, 0, n * size - len(x))).contiguous()  # with matrices of zeros
    result = torch.empty_like(padded)
    if dim is None:
        mine = _map_and_wait(shards[1:], padded[rank * n : (rank + 1) * n], function)
        return result[: len(x)], _all_gather(result, mine.contiguous(), group=group, async_op=True)
    dist.all_to_all_single(result, padded, group=group)
    mine = torch.cat(result.chunk(size), dim=dim)
    padding = mine.shape[dim] - length  # only FSDP's, of rows
    full = _map_and_wait(shards[1:], mine.narrow(dim, 0, length), function)
    pieces = torch.cat(F.pad(full, (0, 0, 0, padding)).chunk(size, dim))
    return result[: len(x)], dist.all_to_all_single(result, pieces, group=group, async_op=True)


def _map_and_wait(
    shards: Sequence[MatrixShards], x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    result, exchange = map_full_matrices(shards, x, function)
    if exchange is not None:
        exchange.wait()
    return result


def numbers_sent(shards: Sequence[MatrixShards], n: int, rows: int, columns: int) -> int:
    """Returns how many numbers `map_full_matrices` sends, or gathers, for n shards of rows × columns."""
    if not shards:
        return 0
    _, size, _, dim, length = shards[0]
    mine, shape = -(-n // size), [rows, columns]
    sent = mine * size * rows * columns * (1 if dim is None else 2)  # a gather of results, or there and back
    if dim is not None:
        shape[dim - 1] = length
    return sent + numbers_sent(shards[1:], mine, *shape)


def local_matrices(ctx: ParallelContext, p: Any, update: Any) -> torch.Tensor:
    """Returns this process's shards (n, rows, columns) of an update, or of its local shard, of equal size on all."""
    local, _ = ctx.local_shard(update)
    if ctx.local_shard(p)[1] is not None and p.ndim == 2:
        local = F.pad(local, (0, 0, 0, -(-len(p) // ctx.dp_size) - len(local)))
    return local.reshape(-1, *local.shape[-2:])
