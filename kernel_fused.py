"""Fused kernels for CUDA GPUs, in Triton: the operations between a model's matrix products, and Muon.

Outside of the matrix products a step moves bytes. One operation at a time, a tensor of the residual stream is read and
written some ten times a layer; each kernel here reads its inputs and writes its outputs once, forward and backward, and
computes in float32 in between. So they are bound by memory, unless a docstring names another bound.

The functions equal the plain torch of their callers up to rounding. None of them synchronises, so a step can be
captured as a CUDA graph. Those that quantise do it with `kernel.store_quantized`, bit for bit as a quantiser would that
reads their result in the dtype of their inputs.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernel import (
    QUANT_ROWS,
    QUANT_WARPS,
    Quantized,
    empty_quantized,
    gather_quant,
    magnitude,
    store_column_scales,
    store_quantized,
    tile_start,
)

SILU, GELU, RELU2 = 0, 1, 2
ACTIVATIONS = {"silu": SILU, "gelu": GELU, "relu2": RELU2}


@triton.jit
def _rms_norm_kernel(
    x_ptr, update_ptr, w_ptr, sum_ptr, y_ptr, r_ptr, N, D, stride, eps,
    UPDATE: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = (x + update) / rms(x + update) · w for N rows of D.

    A program takes ROWS complete rows. Reads x, update and w, writes the sum, 1/rms, and with VALUES y.
    """
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (n < N)[:, None] & (d < D)[None, :]
    at = n[:, None] * D + d[None, :]
    x = tl.load(x_ptr + n[:, None] * stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if UPDATE:
        x += tl.load(update_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)  # rounded as the backward pass reads it
        tl.store(sum_ptr + at, x, mask=inside)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(r_ptr + n, r, mask=n < N)
    if VALUES:
        w = tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, x * r[:, None] * w[None, :], mask=inside)


@triton.jit
def _normalised_rows(x_ptr, w_ptr, r_ptr, n_start, d_start, N, D, stride, ROWS: tl.constexpr):
    """ROWS×128 numbers at (n_start, d_start) of what `_rms_norm_kernel` writes to y, from the sum x and 1/rms."""
    n, d = tl.arange(0, ROWS), tl.arange(0, 128)
    n_inside, d_inside = n < N - n_start, d < D - d_start
    inside = n_inside[:, None] & d_inside[None, :]
    at = n_start * stride + d_start + n[:, None] * stride + d[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    r = tl.load(r_ptr + n_start + n, mask=n_inside, other=0.0)
    w = tl.load(w_ptr + d_start + d, mask=d_inside, other=0.0).to(tl.float32)
    return (x.to(tl.float32) * r[:, None] * w[None, :]).to(x.dtype)


@triton.jit
def _norm_quant_kernel(
    x_ptr, w_ptr, r_ptr, q_ptr, s_ptr, qt_ptr, st_ptr, N, D, stride,
    UE8M0: tl.constexpr, BOTH: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`_act_quant_kernel` of a norm, which is not in memory, from its sum x (N, D) and 1/rms.

    Reads x and writes the norm in FP8 twice: with `_rms_norm_kernel` without y, 10 bytes an element in bfloat16, 6
    without an update. A norm and a quantiser after it are 12 and 8. Bound by memory.
    """
    n_start, d_start = tile_start(D, SIZE)
    r_t = 0.0
    if BOTH:
        largest = tl.zeros([ROWS, 128], tl.int32)
        for n in range(0, SIZE, ROWS):
            y = _normalised_rows(x_ptr, w_ptr, r_ptr, n_start + n, d_start, N, D, stride, ROWS)
            largest = tl.maximum(largest, magnitude(y))
        r_t = store_column_scales(largest, n_start, d_start, D, st_ptr, UE8M0)
    for n in range(0, SIZE, ROWS):
        y = _normalised_rows(x_ptr, w_ptr, r_ptr, n_start + n, d_start, N, D, stride, ROWS)
        store_quantized(y, r_t, n_start + n, d_start, N, D, q_ptr, s_ptr, qt_ptr, UE8M0, BOTH, ROWS)


@triton.jit
def _rms_norm_backward_kernel(
    dy_ptr, dsum_ptr, x_ptr, w_ptr, r_ptr, dx_ptr, dw_ptr, N, D, stride,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx = r·(w·dy - x̂·mean(w·dy·x̂)) + dsum, and a partial dw per program; reads dy, dsum, x, w, r, writes dx.

    Programs are few and each loops over many tiles of ROWS rows, so that few partial sums of dw are left to add.
    """
    d = tl.arange(0, BLOCK_D)
    w = tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        n = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (n < N)[:, None] & (d < D)[None, :]
        at = n[:, None] * D + d[None, :]
        r = tl.load(r_ptr + n, mask=n < N, other=0.0)
        x = tl.load(x_ptr + n[:, None] * stride + d[None, :], mask=inside, other=0.0).to(tl.float32) * r[:, None]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dw += tl.sum(dy * x, axis=0)
        dy *= w[None, :]
        dx = r[:, None] * (dy - x * (tl.sum(dy * x, axis=1) / D)[:, None])
        if RESIDUAL:
            dx += tl.load(dsum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask=inside)
    tl.store(dw_ptr + tl.program_id(0) * D + d, dw, mask=d < D)


NORM_PROGRAMS, NORM_WARPS = 8, 4


@cache
def _sm_count(device: torch.device) -> int:
    """How many SMs a GPU has; 1 for other devices, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class _RMSNorm(torch.autograd.Function):
    """`add_rms_norm`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, update: torch.Tensor | None, w: torch.Tensor, eps: float) -> Any:
        total, _, y = _norm(ctx, x, update, w, eps, with_values=True)
        return x.view_as(x) if update is None else total, y

    @staticmethod
    def backward(ctx: Any, dsum: torch.Tensor | None, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return *_rms_norm_backward(ctx, dsum, dy), None


class _QuantizedRMSNorm(torch.autograd.Function):
    """`_RMSNorm`, and y quantised; unless `with_values`, y itself is a placeholder that only gradients pass through."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, update: torch.Tensor | None, w: torch.Tensor, eps: float,
        scale_fmt: str | None, both: bool, with_values: bool,
    ) -> Any:  # fmt: skip
        total, r, y = _norm(ctx, x, update, w, eps, with_values)
        rows, size = _rows(total), 128 if both else QUANT_ROWS
        n, dim = rows.shape
        quantized = empty_quantized(n, dim, x.device, both)
        _norm_quant_kernel[(triton.cdiv(n, size) * triton.cdiv(dim, 128),)](
            rows, w, r, *quantized, n, dim, rows.stride(0), UE8M0=scale_fmt == "ue8m0", BOTH=both,
            SIZE=size, ROWS=QUANT_ROWS, num_warps=QUANT_WARPS,
        )  # fmt: skip
        ctx.mark_non_differentiable(*quantized[: 4 if both else 2])
        return x.view_as(x) if update is None else total, y, *quantized

    @staticmethod
    def backward(ctx: Any, dsum: torch.Tensor | None, dy: torch.Tensor | None, *_: None) -> Any:
        return *_rms_norm_backward(ctx, dsum, dy), None, None, None, None


def _norm(
    ctx: Any, x: torch.Tensor, update: torch.Tensor | None, w: torch.Tensor, eps: float, with_values: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs `_rms_norm_kernel`; returns the sum, 1/rms, and y or a placeholder. Saves what the backward pass reads."""
    ctx.set_materialize_grads(False)
    rows, dim = _rows(x), x.shape[-1]
    total = x if update is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    r = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if with_values else placeholder(x.shape, x)
    block, tile = _row_tile(dim)
    _rms_norm_kernel[(triton.cdiv(len(rows), tile),)](
        rows, x if update is None else update.contiguous(), w, total, y, r, len(rows), dim, rows.stride(0), eps,
        UPDATE=update is not None, VALUES=with_values, ROWS=tile, BLOCK_D=block,
    )  # fmt: skip
    ctx.save_for_backward(total, w, r)
    ctx.updated = update is not None
    return total, r, y


def _rms_norm_backward(ctx: Any, dsum: torch.Tensor | None, dy: torch.Tensor | None) -> tuple[Any, Any, Any]:
    """The gradients of x, the update and w."""
    total, w, r = ctx.saved_tensors
    if dy is None:
        return dsum, dsum if ctx.updated else None, None
    rows, dim = _rows(total), total.shape[-1]
    block, tile = _row_tile(dim)
    programs = min(triton.cdiv(len(rows), tile), NORM_PROGRAMS * _sm_count(dy.device))
    dx = torch.empty(total.shape, dtype=total.dtype, device=dy.device)
    dw = torch.empty(programs, dim, dtype=torch.float32, device=dy.device)
    dy = dy.contiguous()
    _rms_norm_backward_kernel[(programs,)](
        dy, dy if dsum is None else dsum.contiguous(), rows, w, r, dx, dw, len(rows), dim, rows.stride(0),
        RESIDUAL=dsum is not None, ROWS=tile, BLOCK_D=block, num_warps=NORM_WARPS,
    )  # fmt: skip
    return dx, dx if ctx.updated else None, dw.sum(dim=0).to(w.dtype)


def placeholder(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """A tensor of a shape, and of the dtype and device of `like`, that holds a single NaN: to carry gradients."""
    return torch.full((), float("nan"), dtype=like.dtype, device=like.device).expand(shape)


def add_rms_norm(
    x: torch.Tensor, update: torch.Tensor | None, w: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x + update (x without one) and its RMS norm times `w`; the gradients of both meet in one pass."""
    return _RMSNorm.apply(x, update, w, eps)


def add_rms_norm_quant(
    x: torch.Tensor, update: torch.Tensor | None, w: torch.Tensor, eps: float, scale_fmt: str | None,
    both: bool, with_values: bool,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """`add_rms_norm`, and the norm's rows as `fp8_ops.act_quant_both` (not `both`: `act_quant`) quantises them.

    Returns the sum, the norm (`placeholder` unless `with_values`) and the four tensors of `kernel.empty_quantized`.
    """
    return _QuantizedRMSNorm.apply(x, update, w, eps, scale_fmt, both, with_values)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(..., D) as (N, D) with a single stride between rows, which a slice of a wider matrix has too."""
    x = x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _row_tile(dim: int) -> tuple[int, int]:
    """Width and height of a tile of complete rows, some 4,096 elements."""
    block = triton.next_power_of_2(dim)
    return block, max(1, NORM_TILE // block)


NORM_TILE = 4096


@triton.jit
def _erf_gelu(x):
    """GELU and its derivative."""
    cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def _act(x, ACT: tl.constexpr):
    """An activation and its derivative."""
    if ACT == 0:
        root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * x))  # fewer instructions than a division and `exp`
        s = root * root  # the sigmoid of x
        y = x * s
        dy = s + y * (1 - s)
    elif ACT == 1:
        y, dy = _erf_gelu(x)
    else:
        positive = tl.maximum(x, 0.0)
        y, dy = positive * positive, 2 * positive
    return y, dy


@triton.jit
def _glu_kernel(
    gate_ptr, up_ptr, dy_ptr, y_ptr, dgate_ptr, dup_ptr, N, D, stride,
    BACKWARD: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y = act(gate) · up, or with BACKWARD the gradients of both, for a tile of ROWS×COLS of N rows of D.

    Rows of gate and up, and of their gradients, are `stride` apart. Reads gate and up and writes y: 6 bytes an element
    in bfloat16. BACKWARD reads dy as well and writes both gradients: 10 bytes.
    """
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (n < N)[:, None] & (d < D)[None, :]
    at, narrow = n[:, None] * stride + d[None, :], n[:, None] * D + d[None, :]
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y, slope = _act(gate, ACT)
    if BACKWARD:
        dy = tl.load(dy_ptr + narrow, mask=inside, other=0.0).to(tl.float32)
        tl.store(dgate_ptr + at, dy * up * slope, mask=inside)
        tl.store(dup_ptr + at, dy * y, mask=inside)
    else:
        tl.store(y_ptr + narrow, y * up, mask=inside)


class _GLU(torch.autograd.Function):
    """`glu`, with the number of its activation."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, act: int) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        ctx.act = act
        y = torch.empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2, dtype=gate_up.dtype, device=gate_up.device)
        _launch_glu(gate_up, y, gate_up, y, act, backward=False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        grad, dy = torch.empty_like(gate_up), dy.contiguous()
        _launch_glu(gate_up, dy, grad, dy, ctx.act, backward=True)
        return grad, None


# Multiplications and additions are not fused in what computes an activation: which ones a compiler fuses differs from
# one kernel to another, and so would the last bits of the same formula with and without quantisation.
UNFUSED = {"enable_fp_fusion": False}


def _launch_glu(
    gate_up: torch.Tensor, dy: torch.Tensor, grad: torch.Tensor, y: torch.Tensor, act: int, backward: bool
) -> None:
    """Runs `_glu_kernel`, which fills y, or grad if `backward`."""
    dim = y.shape[-1]
    n = y.numel() // dim
    up, dup = (t.view(-1)[dim:] for t in (gate_up, grad))
    _glu_kernel[(triton.cdiv(n, 4), triton.cdiv(dim, 512))](
        gate_up, up, dy, y, grad, dup, n, dim, 2 * dim, BACKWARD=backward, ACT=act, ROWS=4, COLS=512, **UNFUSED
    )


def glu(gate_up: torch.Tensor, hidden_act: str) -> torch.Tensor:
    """act(gate) · up for gate and up side by side in one tensor (..., 2n); returns (..., n)."""
    return _GLU.apply(gate_up, ACTIVATIONS[hidden_act])


@triton.jit
def _gated_rows(
    gate_ptr, up_ptr, dy_ptr, limit_ptr, n_start, d_start, N, D,
    BACKWARD: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS×128 numbers at (n_start, d_start) of what `_glu_kernel` writes: y twice, or BACKWARD both gradients.

    With LIMIT, rows from `limit` on count as zeros.
    """
    n, d = tl.arange(0, ROWS), tl.arange(0, 128)
    n_inside = n < N - n_start
    if LIMIT:
        n_inside &= n_start + n < tl.load(limit_ptr)
    inside = n_inside[:, None] & (d < D - d_start)[None, :]
    at = n_start * D + d_start + n[:, None] * D + d[None, :]
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y, slope = _act(gate, ACT)
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    if BACKWARD:
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        first, second = (dy * up * slope).to(dtype), (dy * y).to(dtype)
    else:
        first = (y * up).to(dtype)
        second = first
    return first, second


@triton.jit
def _glu_quant_kernel(
    gate_ptr, up_ptr, dy_ptr, limit_ptr, q_ptr, s_ptr, qt_ptr, st_ptr, q2_ptr, s2_ptr, qt2_ptr, st2_ptr, N, D,
    BACKWARD: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr, UE8M0: tl.constexpr, BOTH: tl.constexpr,
    SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`_glu_kernel` for SIZE×128 numbers of contiguous matrices (N, D), quantised as by `_act_quant_kernel`.

    Reads gate and up and writes y in FP8 twice: 6 bytes an element in bfloat16, where `_glu_kernel` and a quantiser are
    10. BACKWARD reads dy as well and writes both gradients twice: 10 bytes instead of 18. Bound by memory.
    """
    n_start, d_start = tile_start(D, SIZE)
    r_t, r2_t = 0.0, 0.0
    if BOTH:
        largest = tl.zeros([ROWS, 128], tl.int32)
        largest2 = largest
        for n in range(0, SIZE, ROWS):
            first, second = _gated_rows(
                gate_ptr, up_ptr, dy_ptr, limit_ptr, n_start + n, d_start, N, D, BACKWARD, ACT, LIMIT, ROWS
            )  # fmt: skip
            largest = tl.maximum(largest, magnitude(first))
            largest2 = tl.maximum(largest2, magnitude(second))
        r_t = store_column_scales(largest, n_start, d_start, D, st_ptr, UE8M0)
        if BACKWARD:
            r2_t = store_column_scales(largest2, n_start, d_start, D, st2_ptr, UE8M0)
    for n in range(0, SIZE, ROWS):
        first, second = _gated_rows(
            gate_ptr, up_ptr, dy_ptr, limit_ptr, n_start + n, d_start, N, D, BACKWARD, ACT, LIMIT, ROWS
        )  # fmt: skip
        store_quantized(first, r_t, n_start + n, d_start, N, D, q_ptr, s_ptr, qt_ptr, UE8M0, BOTH, ROWS)
        if BACKWARD:
            store_quantized(second, r2_t, n_start + n, d_start, N, D, q2_ptr, s2_ptr, qt2_ptr, UE8M0, BOTH, ROWS)


def glu_quant(
    gate: torch.Tensor, up: torch.Tensor, hidden_act: str, offsets: torch.Tensor | None, scale_fmt: str | None,
    both: bool,
) -> Quantized:  # fmt: skip
    """act(gate) · up of matrices (N, D), quantised into `kernel.empty_quantized`.

    Rows from `offsets[-1]` on, which no group of a grouped product wrote, count as zeros.
    """
    out = empty_quantized(len(gate), gate.shape[1], gate.device, both)
    _launch_glu_quant(gate, up, None, offsets, out, out, hidden_act, scale_fmt, both)
    return out


def glu_backward_quant(
    gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor, hidden_act: str, offsets: torch.Tensor | None,
    scale_fmt: str | None,
) -> tuple[Quantized, Quantized]:  # fmt: skip
    """The gradients of gate and up from that of `glu_quant`'s result, quantised both ways."""
    dgate, dup = (empty_quantized(len(gate), gate.shape[1], gate.device, True) for _ in range(2))
    _launch_glu_quant(gate, up, dy, offsets, dgate, dup, hidden_act, scale_fmt, True)
    return dgate, dup


def _launch_glu_quant(
    gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor | None, offsets: torch.Tensor | None,
    out: Quantized, out2: Quantized, hidden_act: str, scale_fmt: str | None, both: bool,
) -> None:  # fmt: skip
    """Runs `_glu_quant_kernel`, which fills `out`; with `dy` both, with the gradients of gate and up."""
    (n, dim), size = gate.shape, 128 if both else QUANT_ROWS
    _glu_quant_kernel[(triton.cdiv(n, size) * triton.cdiv(dim, 128),)](
        gate, up, dy, None if offsets is None else offsets[-1:], *out, *out2, n, dim, BACKWARD=dy is not None,
        ACT=ACTIVATIONS[hidden_act], LIMIT=offsets is not None, UE8M0=scale_fmt == "ue8m0", BOTH=both,
        SIZE=size, ROWS=QUANT_ROWS, num_warps=2 * QUANT_WARPS, **UNFUSED,
    )  # fmt: skip


@triton.jit
def _rotate(first, second, cos, sin, BACKWARD: tl.constexpr):
    """Rotates pairs by their angles, or BACKWARD by the negative angles."""
    if BACKWARD:
        sin = -sin
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, N, S, H, NOPE, HALF, BACKWARD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_NOPE: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Rotates the last 2·HALF elements of ROWS heads, of N = B·S·H, and copies the NOPE before them.

    Pairs lie side by side in x and in halves in y; BACKWARD, the other way round. Reads and writes each element once.
    """
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i, j, both = tl.arange(0, BLOCK_NOPE)[None, :], tl.arange(0, BLOCK_HALF)[None, :], tl.arange(0, 2 * BLOCK_HALF)
    x_ptr += n * (NOPE + 2 * HALF)
    y_ptr += n * (NOPE + 2 * HALF)
    inside = (n < N) & (i < NOPE)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=inside), mask=inside)
    inside = (n < N) & (j < HALF)
    in_pairs = (n < N) & (both < 2 * HALF)[None, :]
    angle = n // H % S * HALF + j
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
    if BACKWARD:
        first = tl.load(x_ptr + NOPE + j, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + NOPE + HALF + j, mask=inside, other=0.0).to(tl.float32)
        first, second = _rotate(first, second, cos, sin, BACKWARD)
        pairs = tl.reshape(tl.join(first, second), [ROWS, 2 * BLOCK_HALF])
        tl.store(y_ptr + NOPE + both[None, :], pairs, mask=in_pairs)
    else:
        pairs = tl.load(x_ptr + NOPE + both[None, :], mask=in_pairs, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(pairs, [ROWS, BLOCK_HALF, 2]))
        first, second = _rotate(first, second, cos, sin, BACKWARD)
        tl.store(y_ptr + NOPE + j, first, mask=inside)
        tl.store(y_ptr + NOPE + HALF + j, second, mask=inside)


class _Rope(torch.autograd.Function):
    """`rope`; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool = False) -> Any:
        bsz, seqlen, heads, width = x.shape
        half = cos.shape[-1]
        ctx.angles = cos, sin
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        n, rows = bsz * seqlen * heads, max(1, 4096 // triton.next_power_of_2(width))
        _rope_kernel[(triton.cdiv(n, rows),)](
            x.contiguous(), cos, sin, y, n, seqlen, heads, width - 2 * half, half, BACKWARD=backward, ROWS=rows,
            **_head_tile(nope=width - 2 * half, half=half),
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cos, sin = ctx.angles
        return _Rope.forward(ctx, grad, cos, sin, True), None, None, None


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the last elements of each head of x (B, S, H, d), as `model.apply_rotary_emb`; cos is (S, 1, R/2)."""
    return _Rope.apply(x, cos, sin)


def _head_tile(**sizes: int) -> dict[str, int]:
    """BLOCK_NAME for each `name=size`: powers of two, which sizes of tiles must be."""
    return {f"BLOCK_{name.upper()}": triton.next_power_of_2(max(size, 1)) for name, size in sizes.items()}


@triton.jit
def _keys_kernel(
    kv_ptr, pe_ptr, cos_ptr, sin_ptr, k_ptr, S, H, NOPE, HALF, V, pe_stride,
    BLOCK_H: tl.constexpr, BLOCK_NOPE: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """The keys of one position: NOPE elements of each head from kv (N, H, NOPE + V), then the rotated shared key.

    Reads NOPE of NOPE + V elements of kv and the shared key; writes the keys (N, H, NOPE + 2·HALF).
    """
    n = tl.program_id(0).to(tl.int64)
    h, i, j = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_NOPE)[None, :], tl.arange(0, BLOCK_HALF)[None, :]
    kv_ptr += n * H * (NOPE + V) + h * (NOPE + V)
    k_ptr += n * H * (NOPE + 2 * HALF) + h * (NOPE + 2 * HALF)
    inside = (h < H) & (i < NOPE)
    tl.store(k_ptr + i, tl.load(kv_ptr + i, mask=inside), mask=inside)
    cos = tl.load(cos_ptr + n % S * HALF + j, mask=j < HALF, other=0.0)
    sin = tl.load(sin_ptr + n % S * HALF + j, mask=j < HALF, other=0.0)
    first = tl.load(pe_ptr + n * pe_stride + 2 * j, mask=j < HALF, other=0.0).to(tl.float32)
    second = tl.load(pe_ptr + n * pe_stride + 2 * j + 1, mask=j < HALF, other=0.0).to(tl.float32)
    first, second = _rotate(first, second, cos, sin, False)
    inside = (h < H) & (j < HALF)
    tl.store(k_ptr + NOPE + j, tl.broadcast_to(first, [BLOCK_H, BLOCK_HALF]), mask=inside)
    tl.store(k_ptr + NOPE + HALF + j, tl.broadcast_to(second, [BLOCK_H, BLOCK_HALF]), mask=inside)


@triton.jit
def _keys_backward_kernel(
    dk_ptr, dv_ptr, cos_ptr, sin_ptr, dkv_ptr, dpe_ptr, S, H, NOPE, HALF, V,
    BLOCK_H: tl.constexpr, BLOCK_NOPE: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradients of `_keys_kernel` at one position, with those of the values between those of the keys.

    Reads and writes each element once.
    """
    n = tl.program_id(0).to(tl.int64)
    h, i, j = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_NOPE)[None, :], tl.arange(0, BLOCK_HALF)[None, :]
    v = tl.arange(0, BLOCK_V)[None, :]
    dk_ptr += n * H * (NOPE + 2 * HALF) + h * (NOPE + 2 * HALF)
    dkv_ptr += n * H * (NOPE + V) + h * (NOPE + V)
    inside = (h < H) & (i < NOPE)
    tl.store(dkv_ptr + i, tl.load(dk_ptr + i, mask=inside), mask=inside)
    inside = (h < H) & (v < V)
    tl.store(dkv_ptr + NOPE + v, tl.load(dv_ptr + n * H * V + h * V + v, mask=inside), mask=inside)
    inside = (h < H) & (j < HALF)
    first = tl.sum(tl.load(dk_ptr + NOPE + j, mask=inside, other=0.0).to(tl.float32), axis=0)
    second = tl.sum(tl.load(dk_ptr + NOPE + HALF + j, mask=inside, other=0.0).to(tl.float32), axis=0)
    j = tl.arange(0, BLOCK_HALF)
    cos = tl.load(cos_ptr + n % S * HALF + j, mask=j < HALF, other=0.0)
    sin = tl.load(sin_ptr + n % S * HALF + j, mask=j < HALF, other=0.0)
    first, second = _rotate(first, second, cos, sin, True)
    tl.store(dpe_ptr + n * 2 * HALF + 2 * j, first, mask=j < HALF)
    tl.store(dpe_ptr + n * 2 * HALF + 2 * j + 1, second, mask=j < HALF)


class _KeysAndValues(torch.autograd.Function):
    """`keys_and_values`; the values are a view of the input."""

    @staticmethod
    def forward(
        ctx: Any, kv: torch.Tensor, k_pe: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, nope: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bsz, seqlen, heads, width = kv.shape
        half, kv, pe = cos.shape[-1], kv.contiguous(), _rows(k_pe)
        ctx.angles, ctx.sizes = (cos, sin), (seqlen, heads, nope, half, width - nope)
        k = torch.empty(bsz, seqlen, heads, nope + 2 * half, dtype=kv.dtype, device=kv.device)
        _keys_kernel[(bsz * seqlen,)](
            kv, pe, cos, sin, k, *ctx.sizes, pe.stride(0), **_head_tile(h=heads, nope=nope, half=half)
        )  # fmt: skip
        return k, kv[..., nope:]

    @staticmethod
    def backward(ctx: Any, dk: torch.Tensor, dv: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        seqlen, heads, nope, half, v = ctx.sizes
        dkv = torch.empty(*dk.shape[:3], nope + v, dtype=dk.dtype, device=dk.device)
        dpe = torch.empty(*dk.shape[:2], 2 * half, dtype=dk.dtype, device=dk.device)
        _keys_backward_kernel[(dk.shape[0] * seqlen,)](
            dk.contiguous(), dv.contiguous(), *ctx.angles, dkv, dpe, *ctx.sizes,
            **_head_tile(h=heads, nope=nope, half=half, v=v),
        )  # fmt: skip
        return dkv, dpe, None, None, None


def keys_and_values(
    kv: torch.Tensor, k_pe: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, nope: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each head's keys and values from kv (B, S, H, nope + v) and the shared rotary key (B, S, R), not yet rotated."""
    return _KeysAndValues.apply(kv, k_pe, cos, sin, nope)


@triton.jit
def _route_kernel(
    scores_ptr, bias_ptr, indices_ptr, N, E, BIAS: tl.constexpr, GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr,
    TOPK: tl.constexpr, ROWS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The TOPK experts of ROWS positions, from the TOPK_GROUPS best groups; as `model.Gate.choose`.

    A program's tile is (ROWS, BLOCK_G groups, BLOCK_E experts of a group). Reads the scores once, writes the indices.
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    g, i = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_E)
    size = E // GROUPS
    e = g[:, None] * size + i[None, :]
    exists = (g < GROUPS)[:, None] & (i < size)[None, :]
    inside = (n < N)[:, None, None] & exists[None, :, :]
    x = tl.load(scores_ptr + n[:, None, None] * E + e[None, :, :], mask=inside, other=float("-inf"))
    if BIAS:
        x += tl.load(bias_ptr + e, mask=exists, other=0.0)[None, :, :]
    if GROUPS > 1:
        rank = tl.max(x, axis=2)
        if BIAS:  # the best two of a group rank it
            best = tl.argmax(x, axis=2, tie_break_left=True)
            rank += tl.max(tl.where(i[None, None, :] == best[:, :, None], float("-inf"), x), axis=2)
        allowed = tl.zeros([ROWS, BLOCK_G], tl.int32)
        for _ in tl.static_range(TOPK_GROUPS):
            chosen = g[None, :] == tl.argmax(rank, axis=1, tie_break_left=True)[:, None]
            allowed = tl.where(chosen, 1, allowed)
            rank = tl.where(chosen, float("-inf"), rank)
        x = tl.where((allowed > 0)[:, :, None], x, float("-inf"))
    x = tl.reshape(x, [ROWS, BLOCK_G * BLOCK_E])
    slot = tl.arange(0, BLOCK_G * BLOCK_E)
    for k in tl.static_range(TOPK):
        best = tl.argmax(x, axis=1, tie_break_left=True)
        x = tl.where(slot[None, :] == best[:, None], float("-inf"), x)
        tl.store(indices_ptr + n * TOPK + k, (best // BLOCK_E * size + best % BLOCK_E).to(tl.int64), mask=n < N)


def route(scores: torch.Tensor, bias: torch.Tensor | None, groups: int, topk_groups: int, topk: int) -> torch.Tensor:
    """The experts that `model.Gate` chooses by `scores`, float32 (N, E); int64 (N, topk), the best first."""
    n, e = scores.shape
    indices = torch.empty(n, topk, dtype=torch.int64, device=scores.device)
    block_g, block_e = triton.next_power_of_2(groups), triton.next_power_of_2(e // groups)
    rows = max(1, 1024 // (block_g * block_e))
    _route_kernel[(triton.cdiv(n, rows),)](
        scores, scores if bias is None else bias, indices, n, e, BIAS=bias is not None, GROUPS=groups,
        TOPK_GROUPS=topk_groups, TOPK=topk, ROWS=rows, BLOCK_G=block_g, BLOCK_E=block_e,
    )  # fmt: skip
    return indices


@triton.jit
def _count_kernel(
    experts_ptr, counts_ptr, before_ptr, places_ptr, rows_ptr, n, blocks,
    PLACE: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A stable counting sort of n choices in two launches: of SIZE choices a program counts those of each expert.

    With PLACE, it computes each choice's place from the counts before it, and writes there which row the choice is of,
    with K choices a row. Reads 8 bytes a choice and writes 8. Bound by the launch: the rows to move are far larger.
    """
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    e = tl.arange(0, BLOCK_E)
    expert = tl.load(experts_ptr + i, mask=i < n, other=BLOCK_E).to(tl.int32)
    chosen = (expert[:, None] == e[None, :]).to(tl.int32)
    at = e * blocks + tl.program_id(0)
    if PLACE:
        place = tl.cumsum(chosen, axis=0) - 1 + tl.load(before_ptr + at)[None, :]
        place = tl.sum(tl.where(chosen > 0, place, 0), axis=1)
        tl.store(places_ptr + i, place, mask=i < n)
        tl.store(rows_ptr + place, i // K, mask=i < n)
    else:
        tl.store(counts_ptr + at, tl.sum(chosen, axis=0))


def sort_by_expert(experts: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sorts choices (N, K) by expert, stably; all results are int32.

    Returns where each choice stands among the sorted ones (N, K), which row each of the sorted is for (N·K,), and where
    each expert's end (n_experts,).
    """
    flat = experts.flatten().contiguous()
    block_e = triton.next_power_of_2(n_experts)
    size = max(16, 8192 // block_e)
    blocks = triton.cdiv(flat.numel(), size)
    counts = torch.empty(block_e, blocks, dtype=torch.int32, device=flat.device)
    places, rows = (torch.empty(flat.numel(), dtype=torch.int32, device=flat.device) for _ in range(2))
    constants = {"K": experts.shape[1], "SIZE": size, "BLOCK_E": block_e}
    _count_kernel[(blocks,)](flat, counts, counts, places, rows, flat.numel(), blocks, PLACE=False, **constants)
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    before = ends - counts.flatten()
    _count_kernel[(blocks,)](flat, counts, before, places, rows, flat.numel(), blocks, PLACE=True, **constants)
    return places.view(experts.shape), rows, ends.view(block_e, blocks)[:n_experts, -1].contiguous()


@triton.jit
def _permute_kernel(x_ptr, places_ptr, y_ptr, D, K: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copies row n of x to its K places in y. Program n takes a row of D: reads it once, writes it K times."""
    n, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + n * D + d, mask=d < D)
    for k in tl.static_range(K):
        place = tl.load(places_ptr + n * K + k).to(tl.int64)
        tl.store(y_ptr + place * D + d, x, mask=d < D)


@triton.jit
def _combine_kernel(
    x_ptr, places_ptr, w_ptr, limit_ptr, base_ptr, y_ptr, D, K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """y[n] = base[n] + the sum of the K rows of x at its places, weighted by w, of rows before `limit` alone.

    Each of base, w and limit may be None. Program n takes a row of D. Reads x and base once, writes y.
    """
    n, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    y = tl.zeros([BLOCK_D], tl.float32)
    if base_ptr is not None:
        y += tl.load(base_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places_ptr + n * K + k).to(tl.int64)
        width = D
        if limit_ptr is not None:
            width = tl.where(place < tl.load(limit_ptr), D, 0)
        x = tl.load(x_ptr + place * D + d, mask=d < width, other=0.0).to(tl.float32)
        if w_ptr is not None:
            x *= tl.load(w_ptr + n * K + k)
        y += x
    tl.store(y_ptr + n * D + d, y, mask=d < D)


@triton.jit
def _combine_backward_kernel(
    dy_ptr, x_ptr, places_ptr, w_ptr, dx_ptr, dw_ptr, D, K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The gradients of `_combine_kernel`: dx at the K places of row n, and dw = x · dy.

    Program n takes a row of D. Reads x and dy once, writes dx.
    """
    n, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    dy = tl.load(dy_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places_ptr + n * K + k).to(tl.int64)
        x = tl.load(x_ptr + place * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(dw_ptr + n * K + k, tl.sum(x * dy))
        tl.store(dx_ptr + place * D + d, dy * tl.load(w_ptr + n * K + k), mask=d < D)


class _Permute(torch.autograd.Function):
    """`permute`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(places)
        (n, dim), k = x.shape, places.shape[1]
        y = torch.empty(n * k, dim, dtype=x.dtype, device=x.device)
        _permute_kernel[(n,)](x.contiguous(), places, y, dim, K=k, BLOCK_D=triton.next_power_of_2(dim))
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, dx: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        return _combine(dy, places, base=dx), None


class _QuantizedPermute(torch.autograd.Function):
    """`_Permute` into FP8; the permuted rows themselves are a placeholder that only gradients pass through."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, places: torch.Tensor, rows: torch.Tensor, limit: torch.Tensor,
        scale_fmt: str | None, both: bool,
    ) -> Any:  # fmt: skip
        ctx.set_materialize_grads(False)  # no zeros for what is quantised
        ctx.save_for_backward(places, limit)
        quantized = gather_quant(x, rows, limit, scale_fmt, both)
        ctx.mark_non_differentiable(*quantized[: 4 if both else 2])
        return placeholder((len(rows), x.shape[1]), x), x.view_as(x), *quantized

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, dx: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        places, limit = ctx.saved_tensors
        return _combine(dy, places, limit=limit, base=dx), None, None, None, None, None


class _Combine(torch.autograd.Function):
    """`combine`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, base: torch.Tensor | None
    ) -> torch.Tensor:
        x, weights = x.contiguous(), weights.contiguous()
        ctx.save_for_backward(x, places, weights)
        return _combine(x, places, weights, base=base)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, places, weights = ctx.saved_tensors
        (n, k), dim = places.shape, x.shape[1]
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dw = torch.empty(n, k, dtype=weights.dtype, device=x.device)
        _combine_backward_kernel[(n,)](
            dy.contiguous(), x, places, weights, dx, dw, dim, K=k, BLOCK_D=triton.next_power_of_2(dim)
        )
        return dx, None, dw, dy if ctx.needs_input_grad[3] else None


def _combine(
    x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None = None, limit: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Runs `_combine_kernel`."""
    (n, k), dim = places.shape, x.shape[1]
    y, base = torch.empty(n, dim, dtype=x.dtype, device=x.device), None if base is None else base.contiguous()
    block = triton.next_power_of_2(dim)
    _combine_kernel[(n,)](x.contiguous(), places, weights, limit, base, y, dim, K=k, BLOCK_D=block)
    return y


def permute(x: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies each row of x (N, dim) to its `places` (N, k): (N·k, dim).

    Also returns x, for what else reads it: its gradient and that of the copies are summed in one kernel.
    """
    return _Permute.apply(x, places)


def permute_quant(
    x: torch.Tensor, places: torch.Tensor, rows: torch.Tensor, limit: torch.Tensor, scale_fmt: str | None, both: bool
) -> tuple[torch.Tensor | None, ...]:
    """`permute`, quantised: a `placeholder` for the rows (N·k, dim), x, and the tensors of `kernel.empty_quantized`.

    `places` and `rows` are `sort_by_expert`'s. Rows from `limit` on, int32 (1,), are zeros, and get no gradient.
    """
    return _QuantizedPermute.apply(x, places, rows, limit, scale_fmt, both)


def combine(
    x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, base: torch.Tensor | None = None
) -> torch.Tensor:
    """`base` plus sums (N, dim) of rows of x (N·k, dim) at `places` (N, k), weighted by `weights`, float32 (N, k)."""
    return _Combine.apply(x, places, weights, base)


# --- Muon ---------------------------------------------------------------------------------------------------------


@triton.jit
def _symmetric_kernel(
    left_desc, right_desc, gram_desc, scale_ptr, factor_ptr, y_desc, K, a, b, c,
    POLYNOMIAL: tl.constexpr, TALL: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """y = u vᵀ for matrices u, v (R, K), or with TALL uᵀ v of (K, R); with POLYNOMIAL, y = as·I + bs³·gram + cs⁵·u vᵀ.

    u = v, or both are symmetric and commute. s is a matrix's `scale`, 1 without; all is multiplied by its `factor`.

    The result is symmetric: a program computes one tile of SIZE×SIZE of the lower triangle and writes it twice, the
    second time transposed, so that half of the products are computed. All goes by TMA, which loads zeros beyond a
    matrix and stores nothing there. A step reads 2·SIZE·STEP elements and does SIZE²·STEP multiplications: bound by the
    tensor cores. Two programs share an SM, so that one multiplies while the other writes.
    """
    tile, e = tl.program_id(0), tl.program_id(1)
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)  # row of tiles: the last with i(i+1)/2 ≤ tile
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2
    row, col = i * SIZE, j * SIZE
    acc = tl.zeros([SIZE, SIZE], tl.float32)
    for k in range(0, K, STEP):
        if TALL:
            u = left_desc.load([e, k, row]).reshape(STEP, SIZE).T
            v = right_desc.load([e, k, col]).reshape(STEP, SIZE)
        else:
            u = left_desc.load([e, row, k]).reshape(SIZE, STEP)
            v = right_desc.load([e, col, k]).reshape(SIZE, STEP).T
        acc = tl.dot(u, v, acc)
    n = tl.arange(0, SIZE)
    if POLYNOMIAL:
        s = 1.0 if scale_ptr is None else tl.load(scale_ptr + e)
        acc *= c * s * s * s * s * s
        acc += b * s * s * s * gram_desc.load([e, row, col]).reshape(SIZE, SIZE).to(tl.float32)
        acc += tl.where(row + n[:, None] == col + n[None, :], a * s, 0.0)
    if factor_ptr is not None:
        acc *= tl.load(factor_ptr + e)
    y = acc.to(y_desc.dtype)
    if i == j:  # without symmetry to the bit, the rounding errors of many products grow
        y = tl.where(n[:, None] >= n[None, :], y, y.T)
    else:
        y_desc.store([e, col, row], y.T.reshape(1, SIZE, SIZE))
    y_desc.store([e, row, col], y.reshape(1, SIZE, SIZE))


def _symmetric(
    x: torch.Tensor, other: torch.Tensor | None = None, tall: bool = False,
    coefficients: tuple[float, float, float] | None = None, scale: torch.Tensor | None = None,
    factor: torch.Tensor | None = None, dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Products x xᵀ (n, R, R), with `tall` xᵀ x; or x · other of symmetric matrices that commute.

    With `coefficients` a, b, c and `scale` s (n,), the polynomial as·I + bs³·x + cs⁵·x xᵀ of symmetric x. The result
    is multiplied by `factor` (n,) before it is rounded to `dtype`; both numbers of a matrix are float32, 1 by default.
    """
    r, k = x.shape[1:][::-1] if tall else x.shape[1:]
    y = torch.empty(len(x), r, r, dtype=dtype or x.dtype, device=x.device)
    size, step = SYMMETRIC_TILE
    block = [1, step, size] if tall else [1, size, step]
    left, right = (TensorDescriptor.from_tensor(t, block) for t in (x, x if other is None else other))
    gram, out = (TensorDescriptor.from_tensor(t, [1, size, size]) for t in (x if coefficients else y, y))
    n = triton.cdiv(r, size)
    _symmetric_kernel[(n * (n + 1) // 2, len(x))](
        left, right, gram, scale, factor, out, k, *(coefficients or (0.0, 0.0, 0.0)),
        POLYNOMIAL=coefficients is not None, TALL=tall, SIZE=size, STEP=step, **SYMMETRIC_LAUNCH,
    )  # fmt: skip
    return y


SYMMETRIC_TILE = 128, 64  # rows and columns, and elements along the sum
SYMMETRIC_LAUNCH = {"num_warps": 4, "num_stages": 3}


# Ratio of a matrix's sides from which Muon iterates on its Gram matrix. With sides r and k ≥ r, five usual steps take
# 15·r²·k + 5·r³ FLOPs, symmetric products counted half, and five on the Gram matrix 6·r²·k + 14·r³: equal at k = r.
GRAM_RATIO = 1.25


def newton_schulz(x: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """Normalises matrices x (n, rows, columns), then `steps` times x ← (a·I + b·x xᵀ + c·(x xᵀ)²) x.

    The products are over the shorter side. TMA needs rows and columns of a multiple of 16 bytes.
    """
    if max(x.shape[1:]) >= GRAM_RATIO * min(x.shape[1:]):
        return _gram_newton_schulz(x, coefficients, steps)
    tall = x.shape[1] > x.shape[2]
    for i in range(steps):
        gram = _symmetric(x, tall=tall)
        p = _symmetric(gram, coefficients=coefficients, scale=None if i else _inverse_norm(gram))
        x = torch.bmm(x, p) if tall else torch.bmm(p, x)
    return x


def _inverse_norm(gram: torch.Tensor) -> torch.Tensor:
    """1 / ‖x‖ of each x, float32 (n,), from x xᵀ: the trace is the square of the norm, so no pass over x is needed."""
    return gram.diagonal(dim1=1, dim2=2).sum(dim=1, dtype=torch.float32).sqrt().clamp(min=1e-7).reciprocal()


def _gram_newton_schulz(x: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """`newton_schulz` with few products of the long side.

    A step multiplies x by p, a polynomial of its Gram matrix g. These are symmetric and commute, so the product q of
    the steps' p is computed in r×r, and g follows as g ← p g p. There are two runs of steps, each from the Gram matrix
    of its first x: in a single one, rounding errors of g grow until small singular values are lost. Matrices of r×r
    are float16, in which no entry here overflows: with its three bits more than bfloat16, the result is nearer to the
    exact iteration than the usual one's. The norms come from a pass over x, so that g and q are written normalised:
    passes over them afterwards would read and write ten times as much.
    """
    dtype = torch.float16 if x.dtype == torch.bfloat16 else x.dtype
    tall = x.shape[1] > x.shape[2]
    scale: torch.Tensor | None = (
        torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float32).clamp(min=1e-7).reciprocal()
    )
    for count in filter(None, (steps - steps // 2, steps // 2)):
        g, q = _symmetric(x, tall=tall, factor=None if scale is None else scale.square(), dtype=dtype), None
        for i in range(1, count + 1):
            factor, q_dtype = (scale, x.dtype) if i == count else (None, dtype)
            if q is None:
                q = p = _symmetric(g, coefficients=coefficients, factor=factor, dtype=q_dtype)
            else:
                p = _symmetric(g, coefficients=coefficients)
                q = _symmetric(q, p, factor=factor, dtype=q_dtype)
            if i < count:
                g = _symmetric(_symmetric(g, p), p)
        x, scale = torch.bmm(x, q) if tall else torch.bmm(q, x), None
    return x


@triton.jit
def _momentum_kernel(grad_ptr, buffer_ptr, update_ptr, n, momentum, SIZE: tl.constexpr):
    """buffer ← lerp(grad, buffer), update = lerp(grad, buffer): reads grad and buffer, writes buffer and update."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    grad = tl.load(grad_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    old = tl.load(buffer_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    buffer = grad + momentum * (old - grad)
    tl.store(update_ptr + i, grad + momentum * (buffer - grad), mask=i < n)
    tl.store(buffer_ptr + i, buffer, mask=i < n)


def momentum_update(grad: torch.Tensor, buffer: torch.Tensor, update: torch.Tensor, momentum: float) -> None:
    """Advances Muon's running mean in `buffer` and writes the Nesterov update, all contiguous."""
    _momentum_kernel[(triton.cdiv(grad.numel(), 4096),)](grad, buffer, update, grad.numel(), momentum, SIZE=4096)


@triton.jit
def _apply_kernel(p_ptr, update_ptr, lr_ptr, n, decay, factor, SIZE: tl.constexpr):
    """p ← (1 - lr·decay)·p - lr·factor·update: reads both, writes p."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    p = tl.load(p_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    update = tl.load(update_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    lr = tl.load(lr_ptr)
    tl.store(p_ptr + i, (1 - lr * decay) * p - lr * factor * update, mask=i < n)


def apply_update(p: torch.Tensor, update: torch.Tensor, lr: torch.Tensor, decay: float, factor: float) -> None:
    """p ← (1 - lr·decay)·p - lr·factor·update, both contiguous; `lr` is a float32 scalar on the device."""
    _apply_kernel[(triton.cdiv(p.numel(), 4096),)](p, update, lr, p.numel(), decay, factor, SIZE=4096)
