"""The memory and traffic of each process of a training run, without training: a model is built and run forward and
backward once on torch's meta device, where tensors have shapes and no memory.

    python train.py --config configs/base.json --plan --world-size 8 --fsdp --device-memory 80

So no formula could forget a layer: the sizes are those of a process's tensors, the activations those that autograd
saves, and all-reduces between tensor-parallel ranks are counted where they would be sent. Temporary memory of kernels
is not in it, nor the allocator's waste. Of a GPU are counted what its kernels save, if Triton is installed here, which
need not have a GPU: on an H100, eight plans of four configs were within 4% of the peak.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

import fp8_ops
from model import ModelArgs, Transformer
from parallel import (
    ParallelContext,
    build,
    matrix_shards,
    note_sharded_dims,
    numbers_sent,
    replicated_parameters,
)

NStates = Callable[[str, nn.Parameter], int]  # how many numbers the optimizer keeps per number of a parameter


@dataclass
class Plan:
    """Bytes by their purpose.

    Attributes:
        n_params: Numbers of parameters of the full model: all, and those that one position goes through.
        memory: Memory of a process that trains, by purpose.
        traffic: Full tensors of the collectives in a step, by purpose.
        cache: Its KV cache if it generated in bfloat16, `max_batch_size` sequences of `max_seq_len`.
        freed: What is freed of the activations before as much of the gradients exists.
        matrices: Numbers of matrices that Muon trains, by their shards and shape, for `parallel.numbers_sent`.
    """

    n_params: tuple[int, int]
    memory: dict[str, int] = field(default_factory=dict)
    traffic: dict[str, int] = field(default_factory=dict)
    cache: int = 0
    freed: int = 0
    matrices: dict[Any, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The most memory at a time, in bytes."""
        return sum(self.memory.values()) - self.freed


def make_plan(args: ModelArgs, flags: Any, dtype: torch.dtype, n_states: NStates) -> Plan:
    """Computes the memory and traffic of each process, with train.py's `flags` and activations in `dtype`.

    All of it is linear in the number of leading dense layers, and in how often the pattern of the layers after them
    repeats. So no more than two of each are measured, however many there are.

    Raises what `check_divisible` does.
    """
    ctx = ParallelContext("cpu", flags.world_size, 0, flags.model_parallel, flags.fsdp)
    ctx.check_divisible(args, flags.batch_size)
    n_dense = min(args.n_dense_layers, args.n_layers)
    n_repeats, rest = divmod(args.n_layers - n_dense, args.moe_layer_freq)

    def measure(dense: int, repeats: int) -> Plan:
        n_layers = dense + repeats * args.moe_layer_freq + rest
        n_dense_layers = args.n_dense_layers - n_dense + dense  # MTP modules, which come after, keep their kind
        return _measure(replace(args, n_layers=n_layers, n_dense_layers=n_dense_layers), flags, dtype, n_states, ctx)

    dense, repeats = min(n_dense, 1), min(n_repeats, 1)
    terms = [(1 - (n_dense - dense) - (n_repeats - repeats), measure(dense, repeats))]
    terms += [(n_dense - 1, measure(2, repeats))] if n_dense > 1 else []
    terms += [(n_repeats - 1, measure(dense, 2))] if n_repeats > 1 else []
    plan = _weighted_sum(terms)
    numbers = args.cache_numbers_per_position()[0] // (ctx.mp_size if args.kv_lora_rank == 0 else 1)
    exchanged = sum(numbers_sent(shards, n, rows, columns) for (shards, rows, columns), n in plan.matrices.items())
    plan.traffic |= {"matrices for Muon, exchanged": exchanged * dtype.itemsize} if exchanged else {}
    plan.cache = numbers * args.max_seq_len * args.max_batch_size * 2
    if flags.accumulation == 1:  # else the first batch leaves gradients for the second
        plan.freed = min(plan.memory["gradients"], plan.memory["activations"])
    return plan


def _weighted_sum(terms: list[tuple[int, Plan]]) -> Plan:
    def add(name: str) -> dict[str, int]:
        return {key: sum(n * getattr(plan, name)[key] for n, plan in terms) for key in getattr(terms[0][1], name)}

    total, active = (sum(n * plan.n_params[i] for n, plan in terms) for i in range(2))
    return Plan((total, active), add("memory"), add("traffic"), matrices=add("matrices"))


def _measure(args: ModelArgs, flags: Any, dtype: torch.dtype, n_states: NStates, ctx: ParallelContext) -> Plan:
    """Does what `make_plan` does, but for the cache and Muon's traffic, with every layer there is."""
    with torch.device("meta"), _kernels(flags):
        plan = Plan(Transformer(args).n_params())
        model = build(ctx, args, dtype).train()
        model.gradient_checkpointing = flags.gradient_checkpointing
        tokens = torch.zeros(flags.batch_size // ctx.dp_size, args.max_seq_len, dtype=torch.int64)
        activations = run_once(model, tokens, ctx)
    parameters = dict(model.named_parameters())
    sizes = {name: _local_numel(ctx, p) for name, p in parameters.items()}
    plan.memory["parameters"] = plan.memory["gradients"] = 4 * sum(sizes.values())
    plan.memory["optimizer state"] = sum(4 * n * n_states(name, parameters[name]) for name, n in sizes.items())
    if flags.gemm_impl == "fp8" and not ctx.fsdp:
        plan.memory["FP8 copies of the weights"] = sum(2 * layer.weight.numel() for layer in model.fp8_layers())
    if ctx.fsdp:
        blocks = [sum(p.numel() for p in block.parameters()) for block in [*model.layers, *model.mtp]]
        plan.memory["a block, all-gathered"] = 4 * max(blocks)
    plan.memory["activations"] = activations
    plan.traffic = _traffic(model, ctx, flags)
    plan.matrices = _matrices(model, ctx, [p for name, p in parameters.items() if n_states(name, p) == 1])
    return plan


@contextmanager
def _kernels(flags: Any) -> Iterator[None]:
    """Within it, tensors on the meta device save what those on a GPU do by kernels: not with torch.compile."""
    if flags.device not in (None, "cuda") or flags.compile or find_spec("triton") is None:
        yield
        return
    import kernel

    with kernel.no_launches(), fp8_ops.meta_tensors_of((9, 0)):
        yield


def _local_numel(ctx: ParallelContext, p: nn.Parameter) -> int:
    """How many numbers of a parameter a process has, in the largest shard: FSDP divides the first dimension."""
    return -(-len(p) // ctx.dp_size) * p[0].numel() if ctx.fsdp else p.numel()


def run_once(model: Transformer, tokens: torch.Tensor, ctx: ParallelContext) -> int:
    """Runs a batch forward and backward; returns the bytes of the tensors that are saved in between."""
    storages = [t.untyped_storage() for t in [*model.parameters(), *model.buffers()]]
    weights = {storage._cdata: storage for storage in storages}  # kept, so that no other is taken for one of them
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    ctx.counted = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model.loss(tokens, tokens)
    inputs = 0
    if model.gradient_checkpointing:  # each block's input, and what one of them saves when it is run again
        x = tokens.new_empty(*tokens.shape, model.args.dim, dtype=model.compute_dtype).requires_grad_()
        inputs, counted = len([*model.layers, *model.mtp]) * x.nbytes, ctx.counted
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.layers[-1](x, model.positions(tokens.shape[1], None), None)
        ctx.counted = counted
    losses.total.backward()
    return inputs + sum(storage.nbytes() for storage in saved.values())


def _traffic(model: Transformer, ctx: ParallelContext, flags: Any) -> dict[str, int]:
    """Returns the bytes of the collectives of a step, but for Muon's."""
    traffic = {}
    size = sum(p.numel() for p in model.parameters()) * 4
    if ctx.mp_size > 1:
        replicated = sum(_local_numel(ctx, p) for p in replicated_parameters(ctx, model))
        traffic["activations, all-reduced"] = ctx.counted * flags.accumulation
        traffic["replicated gradients, all-reduced"] = 4 * replicated
    if ctx.fsdp:
        traffic["parameters, all-gathered"] = 2 * size * flags.accumulation
        traffic["gradients, reduce-scattered"] = size * flags.accumulation
    elif ctx.dp_size > 1:
        traffic["gradients, all-reduced"] = size
    return {name: n for name, n in traffic.items() if n}


def _matrices(model: Transformer, ctx: ParallelContext, by_muon: list[nn.Parameter]) -> dict[Any, int]:
    """Returns how many matrices of each shape and way of sharding Muon trains, which it divides among the processes."""
    note_sharded_dims(ctx, model)
    found: Counter[Any] = Counter()
    for p in by_muon:
        shards, _ = matrix_shards(ctx, p)
        rows = -(-len(p) // ctx.dp_size) if ctx.fsdp and p.ndim == 2 else p.shape[-2]
        found[tuple(shards), rows, p.shape[-1]] += p.numel() // p.shape[-2:].numel()
    return dict(found)


def show(plan: Plan, args: ModelArgs, flags: Any, device_memory: float | None) -> str:
    """Returns the plan as text, and whether it fits a device of so many GB (10⁹ bytes)."""
    total, active = plan.n_params
    dp = flags.world_size // flags.model_parallel
    sequences = flags.batch_size // dp
    lines = [
        f"{total:,} parameters, {active:,} active per position",
        f"{flags.world_size} processes: {dp} data-parallel × {flags.model_parallel} tensor-parallel"
        f"{', sharded' if flags.fsdp and dp > 1 else ''}, {sequences} × {args.max_seq_len} positions at a time in each",
        "",
        "memory of each process, to train:",
        *(f"  {name:<36}{_gb(n)}" for name, n in plan.memory.items()),
        f"  {'at most at a time':<36}{_gb(plan.total)}",
        f"KV cache to generate, of {args.max_batch_size} × {args.max_seq_len} positions: {_gb(plan.cache).strip()}",
        *(["", "collectives of each process in a step:"] if plan.traffic else []),
        *(f"  {name:<36}{_gb(n)}" for name, n in plan.traffic.items()),
    ]
    if device_memory is not None:
        fraction = plan.total / (device_memory * 1e9)
        verdict = "fits" if fraction <= 1 else "does not fit"
        lines += ["", f"{verdict} in {device_memory:g} GB: {fraction:.0%} of it"]
    return "\n".join(lines)


def _gb(n: int) -> str:
    return f"{n / 1e9:>12,.3f} GB" if n >= 1e6 else f"{n / 1e6:>12,.3f} MB"
