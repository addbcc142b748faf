"""What a ctx would hold and send, without building anything: the model is made, run forward and backward once, on
torch's meta device, where tensors have shapes and no memory.

    python train.py --config configs/base.json --plan --world-size 8 --fsdp --device-memory 80

So nothing here is a formula that could forget a layer: the sizes are those of the tensors that a process would have,
the activations are what autograd saves for the backward pass, and the sums between model-parallel processes are counted
where they would be sent. What a kernel needs besides for a moment is not in it, nor what the allocator wastes.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from model import ModelArgs, Transformer
from parallel import ParallelContext


@dataclass
class Plan:
    """Bytes by what they are for.

    Attributes:
        held: What a process holds while it trains.
        cache: What it would hold beside bfloat16 weights to generate, `max_batch_size` sequences of `max_seq_len`.
        sent: What it sends in a step, counted once: a ring of n processes moves 2 (n - 1) / n times the bytes of a sum,
            and (n - 1) / n times those that are gathered or scattered.
    """

    held: dict[str, int] = field(default_factory=dict)
    cache: int = 0
    sent: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes held in all."""
        return sum(self.held.values())


def make_plan(
    args: ModelArgs, flags: argparse.Namespace, dtype: torch.dtype, n_states: Callable[[str, nn.Parameter], int]
) -> Plan:
    """Works out what each process of a ctx would hold and send.

    Args:
        args: The model's shape.
        flags: train.py's flags: of the ctx, the batch and the precision.
        dtype: Dtype of the activations.
        n_states: Says how many numbers the optimizer keeps for each of a parameter, by its name and the parameter.

    Raises:
        ParallelError: The ctx cannot be.
    """
    ctx = ParallelContext("cpu", flags.world_size, 0, flags.model_parallel, flags.fsdp)
    ctx.check_divisible(args, flags.batch_size)
    with torch.device("meta"):
        model = ctx.build(args, dtype).train()
        model.gradient_checkpointing = flags.gradient_checkpointing
        ctx.register_sharded_parameters(model)
        tokens = torch.zeros(flags.batch_size // ctx.dp_size, args.max_seq_len, dtype=torch.int64)
        activations = run_once(model, tokens, ctx)
    plan, per_batch = Plan(), ctx.counted
    sizes = {name: ctx.local_numel(p) for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    plan.held["parameters"] = 4 * sum(sizes.values())
    plan.held["gradients"] = 4 * sum(sizes.values())
    plan.held["optimizer state"] = sum(4 * n * n_states(name, parameters[name]) for name, n in sizes.items())
    if flags.gemm_impl == "fp8" and not ctx.fsdp:
        plan.held["FP8 copies of the weights"] = sum(2 * layer.weight.numel() for layer in model.fp8_layers())
    if ctx.fsdp:
        blocks = [sum(p.numel() for p in block.parameters()) for block in [*model.layers, *model.mtp]]
        plan.held["a block, gathered"] = 4 * max(blocks)
    plan.held["activations"] = activations
    numbers = args.cache_numbers_per_position()[0] // (ctx.mp_size if args.kv_lora_rank == 0 else 1)
    plan.cache = numbers * args.max_seq_len * args.max_batch_size * 2
    by_muon = [p for name, p in parameters.items() if n_states(name, p) == 1]
    plan.sent = _sent(model, ctx, flags, per_batch, by_muon)
    return plan


def run_once(model: Transformer, tokens: torch.Tensor, ctx: ParallelContext) -> int:
    """Runs a batch forward and backward; returns the bytes that are saved in between."""
    weights = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage  # kept, so that no other is taken for it
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


def _sent(
    model: Transformer, ctx: ParallelContext, flags: argparse.Namespace, per_batch: int, by_muon: list[nn.Parameter]
) -> dict[str, int]:
    sent = {}
    size = sum(p.numel() for p in model.parameters()) * 4
    if ctx.mp_size > 1:
        sent["sums of activations between parts"] = per_batch * flags.accumulation
        sent["gradients that parts share"] = ctx.replicated_numel() * 4
    if ctx.fsdp:
        sent["parameters gathered for each batch"] = 2 * size * flags.accumulation
        sent["gradients scattered"] = size * flags.accumulation
    elif ctx.dp_size > 1:
        sent["gradients averaged"] = size
    sent["matrices gathered for Muon"] = ctx.gathered_numel(by_muon) * model.compute_dtype.itemsize
    return {name: n for name, n in sent.items() if n}


def show(plan: Plan, args: ModelArgs, flags: argparse.Namespace, device_memory: float | None) -> str:
    """The plan as text, and whether it fits.

    Args:
        plan: The plan.
        args: The model's shape.
        flags: train.py's flags.
        device_memory: GB (10⁹ bytes) of a device, or None.
    """
    with torch.device("meta"):
        total, active = Transformer(args).n_params()
    dp = flags.world_size // flags.model_parallel
    windows = flags.batch_size // dp
    lines = [
        f"{total:,} parameters, {active:,} active per position",
        f"{flags.world_size} processes: {dp} data-parallel × {flags.model_parallel} model-parallel"
        f"{', sharded' if flags.fsdp and dp > 1 else ''}, {windows} × {args.max_seq_len} positions at a time in each",
        "",
        "each process holds, to train:",
        *(f"  {name:<36}{_gb(n)}" for name, n in plan.held.items()),
        f"  {'in all':<36}{_gb(plan.total)}",
        f"to generate, a cache of {args.max_batch_size} × {args.max_seq_len} positions: {_gb(plan.cache).strip()}",
        *(["", "each process sends in a step:"] if plan.sent else []),
        *(f"  {name:<36}{_gb(n)}" for name, n in plan.sent.items()),
    ]
    if device_memory is not None:
        share = plan.total / (device_memory * 1e9)
        verdict = "fits" if share <= 1 else "does not fit"
        lines += ["", f"{verdict} in {device_memory:g} GB: {share:.0%} of it"]
    return "\n".join(lines)


def _gb(n: int) -> str:
    return f"{n / 1e9:>12,.3f} GB" if n >= 1e6 else f"{n / 1e6:>12,.3f} MB"
