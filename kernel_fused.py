"""Fused kernels for CUDA GPUs, in Triton: what lies between a model's products, and Muon.

Outside of the matrix products a step moves bytes. Done one operation at a time, a tensor of the residual stream is read
and written some ten times a layer; each kernel here reads what it needs once and writes what others need once, forward
and backward, and computes in float32 in between. So they are bound by memory, unless one says otherwise.

The functions equal the plain torch of `model.py` and `optim.py`, their only callers, up to rounding. None of them waits
for the GPU, so that a step can be recorded as a CUDA graph.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

SILU, GELU, RELU2 = 0, 1, 2
ACTIVATIONS = {"silu": SILU, "gelu": GELU, "relu2": RELU2}


@triton.jit
def _rms_norm_kernel(
    x_ptr, update_ptr, w_ptr, sum_ptr, y_ptr, r_ptr, N, D, stride, eps,
    UPDATE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = (x + update) / rms(x + update) · w for ROWS rows of D; reads x, update and w, writes the sum, y and 1/rms."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (n < N)[:, None] & (d < D)[None, :]
    at = n[:, None] * D + d[None, :]
    x = tl.load(x_ptr + n[:, None] * stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if UPDATE:
        x += tl.load(update_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)  # what the backward pass will read
        tl.store(sum_ptr + at, x, mask=inside)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    w = tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, x * r[:, None] * w[None, :], mask=inside)
    tl.store(r_ptr + n, r, mask=n < N)


@triton.jit
def _rms_norm_backward_kernel(
    dy_ptr, dsum_ptr, x_ptr, w_ptr, r_ptr, dx_ptr, dw_ptr, N, D, stride,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx = r·(w·dy - x̂·mean(w·dy·x̂)) + dsum, and each program's share of dw; reads dy, dsum, x, w, r, writes dx.

    Programs are few and go through many tiles of ROWS rows, so that what is left to add up of dw is small.
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
def _processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 1 for other devices, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, update: torch.Tensor | None, w: torch.Tensor, eps: float) -> Any:
        ctx.set_materialize_grads(False)
        dim = x.shape[-1]
        rows = _rows(x)
        total = x if update is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        r = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        block, tile = _row_tile(dim)
        _rms_norm_kernel[(triton.cdiv(len(rows), tile),)](
            rows, x if update is None else update.contiguous(), w, total, y, r, len(rows), dim, rows.stride(0), eps,
            UPDATE=update is not None, ROWS=tile, BLOCK_D=block,
        )  # fmt: skip
        ctx.save_for_backward(total, w, r)
        ctx.updated = update is not None
        return x.view_as(x) if update is None else total, y

    @staticmethod
    def backward(ctx: Any, dsum: torch.Tensor | None, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        total, w, r = ctx.saved_tensors
        if dy is None:
            return dsum, dsum if ctx.updated else None, None, None
        rows, dim = _rows(total), total.shape[-1]
        block, tile = _row_tile(dim)
        programs = min(triton.cdiv(len(rows), tile), NORM_PROGRAMS * _processors(dy.device))
        dx = torch.empty(total.shape, dtype=total.dtype, device=dy.device)
        dw = torch.empty(programs, dim, dtype=torch.float32, device=dy.device)
        dy = dy.contiguous()
        _rms_norm_backward_kernel[(programs,)](
            dy, dy if dsum is None else dsum.contiguous(), rows, w, r, dx, dw, len(rows), dim, rows.stride(0),
            RESIDUAL=dsum is not None, ROWS=tile, BLOCK_D=block, num_warps=NORM_WARPS,
        )  # fmt: skip
        return dx, dx if ctx.updated else None, dw.sum(dim=0).to(w.dtype), None


def add_rms_norm(
    x: torch.Tensor, update: torch.Tensor | None, w: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x + update (x without one) and its RMS norm times `w`; the gradients of both meet in one pass."""
    return _RMSNorm.apply(x, update, w, eps)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(..., D) as (N, D) with a single stride between rows, which a slice of a wider matrix has too."""
    x = x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _row_tile(dim: int) -> tuple[int, int]:
    """Width of a tile that holds whole rows, and how many of them: some 4,096 numbers."""
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
        s = tl.sigmoid(x)
        y, dy = x * s, s * (1 + x * (1 - s))
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
    """y = act(gate) · up, or with BACKWARD the gradients of both, for ROWS×COLS numbers of N rows of D.

    Reads gate and up, which lie `stride` apart from row to row as do their gradients, and writes y; or reads dy too and
    writes both gradients.
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
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor | None, act: int) -> torch.Tensor:
        inputs = [gate.contiguous()] if up is None else [gate.contiguous(), up.contiguous()]
        ctx.save_for_backward(*inputs)
        ctx.act = act
        y = torch.empty(*gate.shape[:-1], gate.shape[-1] // (3 - len(inputs)), dtype=gate.dtype, device=gate.device)
        _launch_glu(inputs, y, inputs, y, act, backward=False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in ctx.saved_tensors]
        dy = dy.contiguous()
        _launch_glu(ctx.saved_tensors, dy, grads, dy, ctx.act, backward=True)
        return *(grads if len(grads) == 2 else (*grads, None)), None


def _launch_glu(
    inputs: Sequence[torch.Tensor], dy: torch.Tensor, grads: Sequence[torch.Tensor], y: torch.Tensor, act: int,
    backward: bool,
) -> None:  # fmt: skip
    """Runs `_glu_kernel` on gate and up, or on one tensor with gate and up side by side."""
    dim, stride = y.shape[-1], inputs[0].shape[-1]
    (gate, up), (dgate, dup) = (
        pair if len(pair) == 2 else (pair[0], pair[0].view(-1)[dim:]) for pair in (inputs, grads)
    )
    n = y.numel() // dim
    _glu_kernel[(triton.cdiv(n, 4), triton.cdiv(dim, 512))](
        gate, up, dy, y, dgate, dup, n, dim, stride, BACKWARD=backward, ACT=act, ROWS=4, COLS=512
    )


def glu(gate: torch.Tensor, up: torch.Tensor | None, hidden_act: str) -> torch.Tensor:
    """act(gate) · up, for two tensors (..., n), or for gate and up side by side in one (..., 2n)."""
    return _GLU.apply(gate, up, ACTIVATIONS[hidden_act])


@triton.jit
def _rotate(first, second, cos, sin, BACKWARD: tl.constexpr):
    """Turns pairs by their angles, or back."""
    if BACKWARD:
        sin = -sin
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, N, S, H, NOPE, HALF, BACKWARD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_NOPE: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Rotates the last 2·HALF numbers of ROWS heads, of the N = B·S·H, and copies the NOPE before them.

    Pairs lie side by side in x and in halves in y; BACKWARD, the other way round. Reads and writes each number once.
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
    """Rotates the last numbers of each head of x (B, S, H, d), as `model.apply_rotary_emb` does; cos is (S, 1, R/2)."""
    return _Rope.apply(x, cos, sin)


def _head_tile(**sizes: int) -> dict[str, int]:
    return {f"BLOCK_{name.upper()}": triton.next_power_of_2(max(size, 1)) for name, size in sizes.items()}


@triton.jit
def _keys_kernel(
    kv_ptr, pe_ptr, cos_ptr, sin_ptr, k_ptr, S, H, NOPE, HALF, V, pe_stride,
    BLOCK_H: tl.constexpr, BLOCK_NOPE: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """The keys of one position: NOPE numbers of each head from kv (N, H, NOPE + V), then the rotated shared key.

    Reads NOPE of NOPE + V numbers of kv and the shared key; writes the keys (N, H, NOPE + 2·HALF).
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
    """The gradients of `_keys_kernel`, that of the values put between those of the keys; reads and writes all once."""
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
    """The TOPK experts of ROWS positions, from the TOPK_GROUPS best groups; as `model.Gate` chooses them.

    A tile is (ROWS, BLOCK_G groups, BLOCK_E experts of a group); reads the scores once, writes the indices.
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
        open_ = tl.zeros([ROWS, BLOCK_G], tl.int32)
        for _ in tl.static_range(TOPK_GROUPS):
            chosen = g[None, :] == tl.argmax(rank, axis=1, tie_break_left=True)[:, None]
            open_ = tl.where(chosen, 1, open_)
            rank = tl.where(chosen, float("-inf"), rank)
        x = tl.where((open_ > 0)[:, :, None], x, float("-inf"))
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
def _count_kernel(experts_ptr, counts_ptr, before_ptr, places_ptr, n, blocks, PLACE: tl.constexpr,
                  SIZE: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """A stable counting sort in two runs: how often each expert comes in SIZE choices, then where each choice goes."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    e = tl.arange(0, BLOCK_E)
    expert = tl.load(experts_ptr + i, mask=i < n, other=BLOCK_E).to(tl.int32)
    chosen = (expert[:, None] == e[None, :]).to(tl.int32)
    at = e * blocks + tl.program_id(0)
    if PLACE:
        place = tl.cumsum(chosen, axis=0) - 1 + tl.load(before_ptr + at)[None, :]
        tl.store(places_ptr + i, tl.sum(tl.where(chosen > 0, place, 0), axis=1), mask=i < n)
    else:
        tl.store(counts_ptr + at, tl.sum(chosen, axis=0))


def sort_by_expert(experts: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each choice stands when all are sorted by expert (int32, as `experts`), and where each one's rows end."""
    flat = experts.flatten().contiguous()
    block_e = triton.next_power_of_2(n_experts)
    size = max(16, 8192 // block_e)
    blocks = triton.cdiv(flat.numel(), size)
    counts = torch.empty(block_e, blocks, dtype=torch.int32, device=flat.device)
    places = torch.empty(flat.numel(), dtype=torch.int32, device=flat.device)
    constants = {"SIZE": size, "BLOCK_E": block_e}
    _count_kernel[(blocks,)](flat, counts, counts, places, flat.numel(), blocks, PLACE=False, **constants)
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    before = ends - counts.flatten()
    _count_kernel[(blocks,)](flat, counts, before, places, flat.numel(), blocks, PLACE=True, **constants)
    return places.view(experts.shape), ends.view(block_e, blocks)[:n_experts, -1].contiguous()


@triton.jit
def _permute_kernel(x_ptr, places_ptr, y_ptr, D, K: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copies row n of x to its K places in y: reads x once, writes y."""
    n, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + n * D + d, mask=d < D)
    for k in tl.static_range(K):
        place = tl.load(places_ptr + n * K + k).to(tl.int64)
        tl.store(y_ptr + place * D + d, x, mask=d < D)


@triton.jit
def _combine_kernel(
    x_ptr, places_ptr, w_ptr, y_ptr, D, WEIGHTS: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """y[n] = the sum of the K rows of x that stand at its places, with WEIGHTS weighted: reads x once, writes y."""
    n, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    y = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places_ptr + n * K + k).to(tl.int64)
        x = tl.load(x_ptr + place * D + d, mask=d < D, other=0.0).to(tl.float32)
        if WEIGHTS:
            x *= tl.load(w_ptr + n * K + k)
        y += x
    tl.store(y_ptr + n * D + d, y, mask=d < D)


@triton.jit
def _combine_backward_kernel(
    dy_ptr, x_ptr, places_ptr, w_ptr, dx_ptr, dw_ptr, D, K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The gradients of `_combine_kernel`: dx at the K places of row n, and dw = x · dy; reads x and dy, writes dx."""
    n, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    dy = tl.load(dy_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places_ptr + n * K + k).to(tl.int64)
        x = tl.load(x_ptr + place * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(dw_ptr + n * K + k, tl.sum(x * dy))
        tl.store(dx_ptr + place * D + d, dy * tl.load(w_ptr + n * K + k), mask=d < D)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        (n, dim), k = x.shape, places.shape[1]
        y = torch.empty(n * k, dim, dtype=x.dtype, device=x.device)
        _permute_kernel[(n,)](x.contiguous(), places, y, dim, K=k, BLOCK_D=triton.next_power_of_2(dim))
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        return _combine(dy.contiguous(), places, None), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        x, weights = x.contiguous(), weights.contiguous()
        ctx.save_for_backward(x, places, weights)
        return _combine(x, places, weights)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        x, places, weights = ctx.saved_tensors
        (n, k), dim = places.shape, x.shape[1]
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dw = torch.empty(n, k, dtype=weights.dtype, device=x.device)
        _combine_backward_kernel[(n,)](
            dy.contiguous(), x, places, weights, dx, dw, dim, K=k, BLOCK_D=triton.next_power_of_2(dim)
        )
        return dx, None, dw


def _combine(x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    (n, k), dim = places.shape, x.shape[1]
    y = torch.empty(n, dim, dtype=x.dtype, device=x.device)
    _combine_kernel[(n,)](
        x, places, x if weights is None else weights, y, dim, WEIGHTS=weights is not None, K=k,
        BLOCK_D=triton.next_power_of_2(dim),
    )  # fmt: skip
    return y


def permute(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Copies each row of x (N, dim) to its `places` (N, k): (N·k, dim)."""
    return _Permute.apply(x, places)


def combine(x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sums (N, dim) of rows of x (N·k, dim) at `places` (N, k), weighted by `weights`, float32 (N, k)."""
    return _Combine.apply(x, places, weights)


# --- Muon ---------------------------------------------------------------------------------------------------------


@triton.jit
def _symmetric_kernel(
    left_desc, right_desc, gram_ptr, scale_ptr, y_ptr, R, K, a, b, c, POLYNOMIAL: tl.constexpr, TALL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x xᵀ for matrices x (R, K), or with TALL xᵀ x of (K, R); with POLYNOMIAL, y = as·I + bs³·gram + cs⁵·x xᵀ.

    The result is symmetric: a program makes a tile of BLOCK_M×BLOCK_N that reaches the lower triangle and writes it
    twice, the second time transposed; the others leave. So little more than half of the products are made. A step of
    BLOCK_K reads (BLOCK_M + BLOCK_N)·BLOCK_K numbers, by the copy engine, which puts zeros beyond a matrix, and
    multiplies BLOCK_M·BLOCK_N·BLOCK_K times. Bound by the tensor cores. s is a matrix's `scale`.
    """
    row, col, e = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N, tl.program_id(2)
    if col >= row + BLOCK_M:
        return
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        if TALL:
            u = left_desc.load([e, k, row]).reshape(BLOCK_K, BLOCK_M).T
            v = right_desc.load([e, k, col]).reshape(BLOCK_K, BLOCK_N)
        else:
            u = left_desc.load([e, row, k]).reshape(BLOCK_M, BLOCK_K)
            v = right_desc.load([e, col, k]).reshape(BLOCK_N, BLOCK_K).T
        acc = tl.dot(u, v, acc)
    i, j = row + tl.arange(0, BLOCK_M)[:, None], col + tl.arange(0, BLOCK_N)[None, :]
    start = e.to(tl.int64) * R * R
    inside = (i < R) & (j < R)
    if POLYNOMIAL:
        s = tl.load(scale_ptr + e)
        acc *= c * s * s * s * s * s
        acc += b * s * s * s * tl.load(gram_ptr + start + i * R + j, mask=inside, other=0.0).to(tl.float32)
        acc += tl.where(i == j, a * s, 0.0)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + start + i * R + j, y, mask=inside)
    tl.store(y_ptr + start + j * R + i, y, mask=inside)


def _symmetric(
    x: torch.Tensor,
    tall: bool = False,
    coefficients: tuple[float, float, float] | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    r, k = x.shape[1:][::-1] if tall else x.shape[1:]
    y = torch.empty(len(x), r, r, dtype=x.dtype, device=x.device)
    m, n, step = SYMMETRIC_TILE
    left, right = (TensorDescriptor.from_tensor(x, [1, step, size] if tall else [1, size, step]) for size in (m, n))
    _symmetric_kernel[(triton.cdiv(r, m), triton.cdiv(r, n), len(x))](
        left, right, x, y if scale is None else scale, y, r, k, *(coefficients or (0.0, 0.0, 0.0)),
        POLYNOMIAL=coefficients is not None, TALL=tall, BLOCK_M=m, BLOCK_N=n, BLOCK_K=step, **SYMMETRIC_LAUNCH,
    )  # fmt: skip
    return y


SYMMETRIC_TILE = 128, 256, 64  # rows, columns, and numbers along the sum
SYMMETRIC_LAUNCH = {"num_warps": 8, "num_stages": 4}


def newton_schulz(x: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """Normalises matrices x (n, rows, columns), then `steps` times x ← (a·I + b·x xᵀ + c·(x xᵀ)²) x.

    The products are over the shorter side. Rows must be whole multiples of 16 bytes, both ways, for the copy engine.
    """
    tall, scale = x.shape[1] > x.shape[2], None
    for _ in range(steps):
        gram = _symmetric(x, tall)
        if scale is None:  # the trace is the square of the norm: so x need not be divided by it
            scale = gram.diagonal(dim1=1, dim2=2).sum(dim=1, dtype=torch.float32).sqrt().clamp(min=1e-7).reciprocal()
        p = _symmetric(gram, False, coefficients, scale)
        x = torch.bmm(x, p) if tall else torch.bmm(p, x)
        scale = torch.ones_like(scale)
    return x


@triton.jit
def _momentum_kernel(
    grad_ptr, buffer_ptr, update_ptr, scale_ptr, skip_ptr, n, momentum, SCALE: tl.constexpr, SKIP: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """buffer ← lerp(grad, buffer), update = lerp(grad, buffer): reads grad and buffer, writes buffer and update."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    grad = tl.load(grad_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    old = tl.load(buffer_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    if SCALE:
        grad /= tl.load(scale_ptr)
    buffer = grad + momentum * (old - grad)
    tl.store(update_ptr + i, grad + momentum * (buffer - grad), mask=i < n)
    if SKIP:
        buffer = tl.where(tl.load(skip_ptr) != 0, old, buffer)
    tl.store(buffer_ptr + i, buffer, mask=i < n)


def momentum_update(
    grad: torch.Tensor,
    buffer: torch.Tensor,
    update: torch.Tensor,
    momentum: float,
    scale: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> None:
    """Advances Muon's running mean in `buffer` and writes the Nesterov update, all contiguous.

    The gradient is divided by `scale`, and the mean stays where `skip` is not 0: both on the device, float32 scalars.
    """
    _momentum_kernel[(triton.cdiv(grad.numel(), 4096),)](
        grad, buffer, update, grad if scale is None else scale, grad if skip is None else skip, grad.numel(), momentum,
        SCALE=scale is not None, SKIP=skip is not None, SIZE=4096,
    )  # fmt: skip


@triton.jit
def _apply_kernel(p_ptr, update_ptr, lr_ptr, skip_ptr, n, decay, factor, SKIP: tl.constexpr, SIZE: tl.constexpr):
    """p ← (1 - lr·decay)·p - lr·factor·update: reads both, writes p."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    p = tl.load(p_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    update = tl.load(update_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    lr = tl.load(lr_ptr)
    new = (1 - lr * decay) * p - lr * factor * update
    if SKIP:
        new = tl.where(tl.load(skip_ptr) != 0, p, new)
    tl.store(p_ptr + i, new, mask=i < n)


def apply_update(
    p: torch.Tensor,
    update: torch.Tensor,
    lr: torch.Tensor,
    decay: float,
    factor: float,
    skip: torch.Tensor | None = None,
) -> None:
    """p ← (1 - lr·decay)·p - lr·factor·update, both contiguous; `lr` and `skip` as in `momentum_update`."""
    _apply_kernel[(triton.cdiv(p.numel(), 4096),)](
        p, update, lr, p if skip is None else skip, p.numel(), decay, factor, SKIP=skip is not None, SIZE=4096
    )
