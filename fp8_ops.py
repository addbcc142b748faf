"""The matrix products of every linear layer, behind one function each.

`model.py` multiplies by weights in two ways only: one matrix for all rows (`linear`) and one matrix per expert for rows
that are sorted by expert (`grouped_linear`). Both take the weight as it is stored, master weights in float32 for
instance, and compute in the dtype of the activations: the cast is part of the graph, so the gradient arrives at the
weight in the weight's own precision and accumulates there.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F


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


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiplies every row of `x` by one weight matrix.

    Args:
        x: Activations of shape (..., in_features), any float dtype.
        weight: Weight of shape (out_features, in_features), any float dtype.

    Returns:
        `x @ weight.T` of shape (..., out_features), in the dtype of `x`.
    """
    return F.linear(x, weight.to(x.dtype))


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Multiplies consecutive groups of rows by a weight matrix each: the products of a mixture of experts.

    Args:
        x: Activations of shape (rows, in_features), the rows of group 0 first, then those of group 1, and so on.
        weight: Weights of shape (groups, out_features, in_features), any float dtype.
        offsets: Where each group's rows end, int32 of shape (groups,), ascending, the last equal to `rows`. An empty
            group costs nothing.

    Returns:
        Shape (rows, out_features), in the dtype of `x`.
    """
    weight = weight.to(x.dtype).transpose(-2, -1)
    # torch's own kernel is for GPUs: bfloat16, and rows that start at multiples of 16 bytes
    if x.is_cuda and x.dtype == torch.bfloat16 and weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0:
        return F.grouped_mm(x, weight, offs=offsets)
    return _grouped_mm(x, weight, offsets)


# A loop over groups needs their sizes as Python numbers. As an operator of its own it is one node of a compiled graph.
@torch.library.custom_op("bytegpt::grouped_mm", mutates_args=())
def _grouped_mm(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`x[group g] @ weight[g]`: (rows, in), (groups, in, out) -> (rows, out)."""
    out = x.new_empty(len(x), weight.shape[2])
    for w, (start, end) in zip(weight, pairwise([0, *offsets.tolist()]), strict=True):
        if end > start:
            torch.mm(x[start:end], w, out=out[start:end])
    return out


@torch.library.custom_op("bytegpt::grouped_outer", mutates_args=())
def _grouped_outer(x: torch.Tensor, grad: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`x[group g].T @ grad[group g]`, the gradient of the weights: (rows, in), (rows, out) -> (groups, in, out)."""
    # made as (groups, out, in) and transposed, as the weight is: so the parameter gets a contiguous gradient
    out = x.new_zeros(len(offsets), grad.shape[1], x.shape[1])
    for w, (start, end) in zip(out, pairwise([0, *offsets.tolist()]), strict=True):
        if end > start:
            torch.mm(grad[start:end].T, x[start:end], out=w)
    return out.transpose(1, 2)


@_grouped_mm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@_grouped_outer.register_fake
def _(x: torch.Tensor, grad: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return x.new_empty(offsets.shape[0], grad.shape[1], x.shape[1]).transpose(1, 2)


def _save_for_backward(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    x, weight, offsets = ctx.saved_tensors
    grad_x = _grouped_mm(grad, weight.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    grad_weight = _grouped_outer(x, grad, offsets) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


_grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_save_for_backward)
