"""The FP8 kernels for CUDA GPUs of compute capability 8.9 and more, in Triton.

What they compute is defined in `fp8_ops.py`, whose functions are the only callers and have checked the arguments; that
file says what a tile, a block and a scale are. Two things govern how they are written.

Quantisation moves bytes. A kernel reads each number once, from memory to registers, and writes it once, at a quarter or
half of its size; the largest value of a tile and the division by its scale are free beside that. So each program takes
a square of 128×128, which holds whole tiles of both directions, and one reading serves both.

A product of FP8 numbers moves few bytes and multiplies at twice the rate of bfloat16, but tensor cores sum FP8 products
with only some 14 bits (DeepSeek-V3 report, section 3.3.2). So a sum runs over 128 products, which is as far as a scale
reaches anyway, and is then multiplied by both scales and added to an accumulator in float32. Both operands are read
along the dimension that is summed over, as Hopper's tensor cores want them: `a` (M, K) and `b` (N, K). They are read
through tensor descriptors, which Hopper's copy engine (TMA) follows by itself: what lies beyond a matrix comes as
zeros, so that loads need no masks.

There are two such kernels. A portable one in plain Triton waits for each product before it scales it, so the tensor
cores idle. Large products on Hopper run one in Gluon, the layer below Triton, where warps have different tasks: while
some scale, others multiply.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as HopperDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK = tl.constexpr(128)
E4M3_MAX = tl.constexpr(448.0)
SMALLEST_SCALE_BITS = tl.constexpr(0x00800000)  # float32's smallest normal number
INFINITY_BITS = tl.constexpr(0x7F800000)
MANTISSA_BITS = tl.constexpr(0x007FFFFF)


@triton.jit
def _scale(x, axis: tl.constexpr, UE8M0: tl.constexpr):
    """The scale that stores the largest of |x| as 448, and its reciprocal.

    Positive floats are ordered as the integers of the same bits, NaN above infinity: so as integers the maximum keeps
    a NaN, which as floats it would drop.
    """
    amax = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=axis).to(tl.float32, bitcast=True)
    bits = tl.div_rn(amax, tl.full(amax.shape, E4M3_MAX, tl.float32)).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.maximum(bits, SMALLEST_SCALE_BITS)
    if UE8M0:  # all mantissa bits that are not 0 carry into the exponent
        bits = tl.where(bits < INFINITY_BITS, (bits + MANTISSA_BITS) & INFINITY_BITS, bits)
    s = bits.to(tl.float32, bitcast=True)
    return s, tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)


@triton.jit
def _act_quant_kernel(
    x_ptr, q_ptr, s_ptr, qt_ptr, st_ptr, M, K, stride_m, stride_k, UE8M0: tl.constexpr, BOTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Activations (M, K) to FP8 in tiles of 1×128 and, with BOTH, transposed (K, M) in tiles of 1×128 along M.

    Program (i, j) takes BLOCK_M×128 numbers. Reads each once and writes it once, twice with BOTH. Bound by memory.
    """
    # 64-bit offsets for the first number of the square alone
    m_start, k_start = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.program_id(1).to(tl.int64) * BLOCK
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK)
    m_inside, k_inside = m < M - m_start, k < K - k_start
    x_ptr += m_start * stride_m + k_start * stride_k
    inside = m_inside[:, None] & k_inside[None, :]
    loaded = tl.load(x_ptr + m[:, None] * stride_m + k[None, :] * stride_k, mask=inside, other=0.0)
    x = loaded.to(tl.float32)
    s, r = _scale(x, 1, UE8M0)
    q = (x * r[:, None]).to(tl.float8e4nv)
    tl.store(q_ptr + m_start * K + k_start + m[:, None] * K + k[None, :], q, mask=inside)
    tl.store(s_ptr + (m_start + m) * tl.num_programs(1) + tl.program_id(1), s, mask=m_inside)
    if BOTH:
        inside = k_inside[:, None] & m_inside[None, :]
        x = tl.trans(loaded).to(tl.float32)
        s, r = _scale(x, 1, UE8M0)
        q = (x * r[:, None]).to(tl.float8e4nv)
        tl.store(qt_ptr + k_start * M + m_start + k[:, None] * M + m[None, :], q, mask=inside)
        tl.store(st_ptr + tl.program_id(0).to(tl.int64) * K + k_start + k, s, mask=k_inside)


def act_quant(x: torch.Tensor, scale_fmt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fp8_ops.act_quant`; `x` has shape (M, K)."""
    m, k = x.shape
    q, s = _new(x, m, k)
    grid = (triton.cdiv(m, 32), triton.cdiv(k, 128))
    _act_quant_kernel[grid](x, q, s, q, s, m, k, *x.stride(), UE8M0=scale_fmt == "ue8m0", BOTH=False, BLOCK_M=32)
    return q, s


def act_quant_both(
    x: torch.Tensor, scale_fmt: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `fp8_ops.act_quant_both`."""
    m, k = x.shape
    q_t, s_t = _new(x, k, m)
    s_t = s_t.view(-1, k).T  # the scales of 128 rows side by side, as the weight gradient reads them
    outputs = *_new(x, m, k), q_t, s_t
    grid = (triton.cdiv(m, 128), triton.cdiv(k, 128))
    _act_quant_kernel[grid](
        x, *outputs, m, k, *x.stride(), UE8M0=scale_fmt == "ue8m0", BOTH=True, BLOCK_M=128, num_warps=4
    )
    return outputs


def _new(x: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for quantised activations and their scales."""
    q = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    return q, torch.empty(rows, triton.cdiv(columns, 128), dtype=torch.float32, device=x.device)


@triton.jit
def _weight_quant_kernel(
    w_ptr, q_ptr, s_ptr, N, K, stride_e, stride_n, stride_k, UE8M0: tl.constexpr
):  # fmt: skip
    """A stack of weights (E, N, K) to FP8 in blocks of 128×128; program (i, j, e) takes one.

    Reads each number once and writes it once. Bound by memory.
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    e = tl.program_id(2).to(tl.int64)
    inside = (n < N)[:, None] & (k < K)[None, :]
    n, k = n.to(tl.int64), k.to(tl.int64)
    where = e * stride_e + n[:, None] * stride_n + k[None, :] * stride_k
    w = tl.load(w_ptr + where, mask=inside, other=0.0).to(tl.float32)
    s, r = _scale(tl.reshape(w, [BLOCK * BLOCK]), 0, UE8M0)
    tl.store(q_ptr + (e * N + n[:, None]) * K + k[None, :], (w * r).to(tl.float8e4nv), mask=inside)
    tl.store(s_ptr + (e * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1), s)


def weight_quant(w: torch.Tensor, scale_fmt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fp8_ops.weight_quant`."""
    *stack, n, k = w.shape
    w = w.reshape(-1, n, k)
    blocks = triton.cdiv(n, 128), triton.cdiv(k, 128)
    q = torch.empty(*stack, n, k, dtype=torch.float8_e4m3fn, device=w.device)
    s = torch.empty(*stack, *blocks, dtype=torch.float32, device=w.device)
    _weight_quant_kernel[(*blocks, len(w))](w, q, s, n, k, *w.stride(), UE8M0=scale_fmt == "ue8m0", num_warps=8)
    return q, s


@triton.jit
def _weight_dequant_kernel(
    q_ptr, s_ptr, w_ptr, N, K, q_stride_e, q_stride_n, q_stride_k, s_stride_e, s_stride_n, s_stride_k
):  # fmt: skip
    """A stack of quantised weights (E, N, K) back to floats; program (i, j, e) takes a block of 128×128.

    Reads each number once and writes it once. Bound by memory, and there by what is written.
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    e = tl.program_id(2).to(tl.int64)
    inside = (n < N)[:, None] & (k < K)[None, :]
    n, k = n.to(tl.int64), k.to(tl.int64)
    q = tl.load(q_ptr + e * q_stride_e + n[:, None] * q_stride_n + k[None, :] * q_stride_k, mask=inside, other=0.0)
    s = tl.load(s_ptr + e * s_stride_e + tl.program_id(0) * s_stride_n + tl.program_id(1) * s_stride_k)
    w = (q.to(tl.float32) * s).to(w_ptr.dtype.element_ty)
    tl.store(w_ptr + (e * N + n[:, None]) * K + k[None, :], w, mask=inside)


def weight_dequant(q: torch.Tensor, s: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See `fp8_ops.weight_dequant`."""
    n, k = q.shape[-2:]
    w = torch.empty(q.shape, dtype=dtype, device=q.device)
    q, s = q.reshape(-1, n, k), s.reshape(-1, *s.shape[-2:])
    grid = (triton.cdiv(n, 128), triton.cdiv(k, 128), len(q))
    _weight_dequant_kernel[grid](q, s, w, n, k, *q.stride(), *s.stride(), num_warps=8)
    return w


def _set_block_shapes(args: dict[str, object]) -> None:
    """Cuts the descriptors of both operands to the tiles about to be tried or run."""
    args["a_desc"].block_shape = [args["BLOCK_M"], 128]
    args["b_desc"].block_shape = [args["BLOCK_N"], 128]


# (BLOCK_M, BLOCK_N, warps, stages): large tiles for many rows, small ones for decoding and for small GPUs
TILES = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages, pre_hook=_set_block_shapes)
    for m, n, warps, stages in [(128, 128, 8, 4), (64, 128, 4, 4), (64, 128, 4, 3), (64, 64, 4, 3), (16, 64, 4, 4)]
]


def _copyable(q: torch.Tensor) -> torch.Tensor:
    """A quantised matrix whose rows are whole multiples of 16 bytes, as the copy engine needs them."""
    if q.shape[-1] % 16:
        q = torch.nn.functional.pad(q.view(torch.int8), (0, -q.shape[-1] % 16)).view(q.dtype)
    return q.contiguous()


def _descriptor(q: torch.Tensor) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(_copyable(q), [128, 128])


@triton.autotune(TILES, key=["N", "K", "M_BUCKET"], cache_results=True)
@triton.jit
def _gemm_kernel(
    a_desc, as_ptr, b_desc, bs_ptr, c_ptr, offsets_ptr, M, N, K,
    as_stride_m, as_stride_k, bs_stride_e, bs_stride_n, bs_stride_k, M_BUCKET,
    B_IN_BLOCKS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """c (M, N) = a (M, K) · b (N, K)ᵀ; with GROUPS, rows `offsets[e-1]` to `offsets[e]` by matrix e of b (E, N, K).

    A program makes BLOCK_M×BLOCK_N of c in steps of 128 along K: it reads (BLOCK_M + BLOCK_N)·128 bytes and multiplies
    BLOCK_M·BLOCK_N·128 times in each. Programs run in bands of 8 tiles of rows, whose operands stay in the L2 cache.
    With large tiles it is bound by the tensor cores; with few rows (decoding), by reading b once.

    With GROUPS, each program finds its group by itself, so the host need not know their sizes: the grid has room for
    one ragged tile per group, and programs beyond the last tile leave. Rows beyond the group's end are multiplied, but
    not stored.
    """
    n_tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    if GROUPS == 0:
        n_tiles_m = tl.cdiv(M, BLOCK_M)
        band = pid // (8 * n_tiles_n)
        band_rows = tl.minimum(n_tiles_m - band * 8, 8)
        start = (band * 8 + pid % (8 * n_tiles_n) % band_rows) * BLOCK_M
        tile_n = pid % (8 * n_tiles_n) // band_rows
        end = M
        e = 0
    else:
        tile, tile_n = pid // n_tiles_n, pid % n_tiles_n
        groups = tl.arange(0, GROUPS_POW2)
        ends = tl.load(offsets_ptr + groups, mask=groups < GROUPS, other=0)
        starts = tl.load(offsets_ptr + groups - 1, mask=(groups > 0) & (groups < GROUPS), other=0)
        last_tile = tl.cumsum(tl.where(groups < GROUPS, tl.cdiv(ends - starts, BLOCK_M), 0), 0)
        e = tl.sum(((last_tile <= tile) & (groups < GROUPS)).to(tl.int32), 0)
        if e >= GROUPS:
            return
        before = tl.sum(tl.where(groups == e - 1, last_tile, 0), 0)
        start = tl.sum(tl.where(groups == e, starts, 0), 0) + (tile - before) * BLOCK_M
        end = tl.sum(tl.where(groups == e, ends, 0), 0)
    m = start + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    as_ptr += (m % M).to(tl.int64) * as_stride_m
    bs_ptr += e * bs_stride_e
    if B_IN_BLOCKS:  # a tile is no wider than a block: one scale for all of it
        bs_ptr += tile_n * BLOCK_N // BLOCK * bs_stride_n
    else:
        bs_ptr += (n % N).to(tl.int64) * bs_stride_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(0, tl.cdiv(K, BLOCK)):
        a = a_desc.load([start, i * BLOCK])
        b = b_desc.load([e * N + tile_n * BLOCK_N, i * BLOCK])
        a_s = tl.load(as_ptr + i * as_stride_k)
        b_s = tl.load(bs_ptr + i * bs_stride_k)
        if B_IN_BLOCKS:
            acc += tl.dot(a, b.T) * (a_s * b_s)[:, None]
        else:
            acc += tl.dot(a, b.T) * a_s[:, None] * b_s[None, :]
    c = c_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(c, acc.to(c_ptr.dtype.element_ty), mask=(m < end)[:, None] & (n < N)[None, :])


def gemm(a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See `fp8_ops.fp8_gemm`; `a` has shape (M, K)."""
    return _gemm(a, a_s, b.unsqueeze(0), b_s.unsqueeze(0), None, dtype)


def grouped_gemm(
    a: torch.Tensor,
    a_s: torch.Tensor,
    b: torch.Tensor,
    b_s: torch.Tensor,
    offsets: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `fp8_ops.fp8_grouped_gemm`."""
    return _gemm(a, a_s, b, b_s, offsets, dtype)


def _gemm(
    a: torch.Tensor,
    a_s: torch.Tensor,
    b: torch.Tensor,
    b_s: torch.Tensor,
    offsets: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    (m, k), (e, n, _) = a.shape, b.shape
    groups = 0 if offsets is None else e
    c = torch.empty(m, n, dtype=dtype, device=a.device)
    if rows := _hopper_rows(m, n, groups, a.device):
        _launch_hopper(rows, a, a_s, b.reshape(-1, k), b_s, c, offsets, outer=False)
        return c

    def grid(meta: dict[str, int]) -> tuple[int]:
        return ((triton.cdiv(m, meta["BLOCK_M"]) + groups) * triton.cdiv(n, meta["BLOCK_N"]),)

    _gemm_kernel[grid](
        _descriptor(a), a_s, _descriptor(b.reshape(-1, k)), b_s, c, offsets, m, n, k, *a_s.stride(), *b_s.stride(),
        _bucket(m // max(groups, 1)), B_IN_BLOCKS=b_s.shape[1] != n,
        GROUPS=groups, GROUPS_POW2=triton.next_power_of_2(max(groups, 1)),
    )  # fmt: skip
    return c


def _bucket(rows: int) -> int:
    """Row counts that share a choice of tiles."""
    return min(max(triton.next_power_of_2(max(rows, 1)), 16), 4096)


@triton.autotune(TILES[:4], key=["N", "K", "ROWS_BUCKET"], cache_results=True)
@triton.jit
def _grouped_outer_kernel(
    a_desc, as_ptr, b_desc, bs_ptr, c_ptr, offsets_ptr, N, K,
    as_stride_n, as_stride_i, bs_stride_k, bs_stride_i, ROWS_BUCKET,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """c[e] (N, K) = a[:, group e] · b[:, group e]ᵀ for a (N, rows) and b (K, rows).

    Program (i, e) makes BLOCK_M×BLOCK_N of c[e], in steps of 128 rows that begin at multiples of 128, as the scales do:
    the first and the last step may reach into a neighbouring group, whose rows count as zero in `a`. Bound by the
    tensor cores with many rows per group, by writing c with few.
    """
    e = tl.program_id(1)
    begin = tl.load(offsets_ptr + e - 1, mask=e > 0, other=0)
    end = tl.load(offsets_ptr + e)
    n_tiles_k = tl.cdiv(K, BLOCK_N)
    n_start, k_start = tl.program_id(0) // n_tiles_k * BLOCK_M, tl.program_id(0) % n_tiles_k * BLOCK_N
    n, k = n_start + tl.arange(0, BLOCK_M), k_start + tl.arange(0, BLOCK_N)
    as_ptr += (n % N).to(tl.int64) * as_stride_n
    bs_ptr += (k % K).to(tl.int64) * bs_stride_k
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(begin // BLOCK, tl.where(end > begin, tl.cdiv(end, BLOCK), 0)):
        row = i * BLOCK + tl.arange(0, BLOCK)
        a = a_desc.load([n_start, i * BLOCK])
        b = b_desc.load([k_start, i * BLOCK])
        a = tl.where(((row >= begin) & (row < end))[None, :], a, 0.0)
        a_s, b_s = tl.load(as_ptr + i * as_stride_i), tl.load(bs_ptr + i * bs_stride_i)
        acc += tl.dot(a.to(tl.float8e4nv), b.T) * a_s[:, None] * b_s[None, :]
    c = c_ptr + (e.to(tl.int64) * N + n[:, None]) * K + k[None, :]
    tl.store(c, acc.to(c_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


def grouped_outer(
    a: torch.Tensor,
    a_s: torch.Tensor,
    b: torch.Tensor,
    b_s: torch.Tensor,
    offsets: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `fp8_ops.fp8_grouped_outer`."""
    n, k, e = len(a), len(b), len(offsets)
    c = torch.empty(e, n, k, dtype=dtype, device=a.device)
    if rows := _hopper_rows(n * e, k, e, a.device):
        _launch_hopper(rows, a, a_s, b, b_s.unsqueeze(0), c, offsets, outer=True)
        return c

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(n, meta["BLOCK_M"]) * triton.cdiv(k, meta["BLOCK_N"]), e

    _grouped_outer_kernel[grid](
        _descriptor(a),
        a_s,
        _descriptor(b),
        b_s,
        c,
        offsets,
        n,
        k,
        *a_s.stride(),
        *b_s.stride(),
        _bucket(a.shape[1] // e),
    )
    return c


# --- On Hopper ----------------------------------------------------------------------------------------------------

_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name up to Triton 3.6
OPERAND = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)  # as the tensor cores read it
BAND = gl.constexpr(16)  # tiles of rows


@gluon.jit
def _group(offsets_ptr, e, M, K, GROUPED: gl.constexpr, OUTER: gl.constexpr):
    """Where in M, and where in K, group e begins and ends."""
    if GROUPED:
        begin = gl.load(offsets_ptr + e - 1, mask=e > 0, other=0)
        end = gl.load(offsets_ptr + e)
    if OUTER:
        return 0, M, begin, end
    elif GROUPED:
        return begin, end, 0, K
    else:
        return 0, M, 0, K


@gluon.jit
def _corner(tile, n_tiles_m, n_tiles_n):
    """Row and column of a tile, in tiles; they are numbered in bands, whose operands stay in the L2 cache."""
    band, rest = tile // (BAND * n_tiles_n), tile % (BAND * n_tiles_n)
    band_rows = gl.minimum(n_tiles_m - band * BAND, BAND)
    return band * BAND + rest % band_rows, rest // band_rows


@gluon.jit
def _steps(k_begin, k_end):
    """Steps of 128 along K that a group takes part in: the first, and the one after the last."""
    return k_begin // 128, gl.where(k_end > k_begin, gl.cdiv(k_end, 128), 0)


@gluon.jit
def _load_tiles(
    a_desc, as_ptr, as_stride_m, as_stride_k, b_desc, bs_ptr, bs_stride_e, bs_stride_n, bs_stride_k, ring,
    offsets_ptr, M, N, K, GROUPS: gl.constexpr, GROUPED: gl.constexpr, OUTER: gl.constexpr, B_IN_BLOCKS: gl.constexpr,
):  # fmt: skip
    """The one warp that loads: as long as there is room in the ring, operands by TMA and scales by itself."""
    a_ring, b_ring, as_ring, bs_ring, full, empty = ring
    STAGES: gl.constexpr = a_ring.type.shape[0]
    BLOCK_M: gl.constexpr = a_ring.type.shape[1]
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    n_tiles_n = gl.cdiv(N, 128)
    tile = gl.program_id(0)
    step = 0
    for e in range(GROUPS):
        m_begin, m_end, k_begin, k_end = _group(offsets_ptr, e, M, K, GROUPED, OUTER)
        n_tiles_m = gl.cdiv(m_end - m_begin, BLOCK_M)
        first, last = _steps(k_begin, k_end)
        while tile < n_tiles_m * n_tiles_n:
            tile_m, tile_n = _corner(tile, n_tiles_m, n_tiles_n)
            row, col = m_begin + tile_m * BLOCK_M, tile_n * 128
            # Beyond the last row, the last row's scale: what it belongs to is not stored.
            m = gl.minimum(gl.arange(0, BLOCK_M, flat), M - 1 - row)
            a_s_at = as_ptr + row.to(gl.int64) * as_stride_m + m * as_stride_m
            if B_IN_BLOCKS:  # a tile is as wide as a block: one scale for all of it
                b_s_at = bs_ptr + e.to(gl.int64) * bs_stride_e + tile_n * bs_stride_n
                b_row = e * N + col
            else:
                n = gl.minimum(gl.arange(0, 128, flat), N - 1 - col)
                b_s_at = bs_ptr + col.to(gl.int64) * bs_stride_n + n * bs_stride_n
                b_row = col
            for i in range(first, last):
                stage = step % STAGES
                a_s, b_s = gl.load(a_s_at + i * as_stride_k), gl.load(b_s_at + i * bs_stride_k)
                mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
                mbarrier.expect(full.index(stage), (BLOCK_M + 128) * 128)
                _tma_load(a_desc, [row, i * 128], full.index(stage), a_ring.index(stage))
                _tma_load(b_desc, [b_row, i * 128], full.index(stage), b_ring.index(stage))
                if B_IN_BLOCKS:
                    as_ring.index(stage).store(a_s * b_s)
                else:
                    as_ring.index(stage).store(a_s)
                    bs_ring.index(stage).store(b_s)
                mbarrier.arrive(full.index(stage), count=1)
                step += 1
            tile += gl.num_programs(0)
        tile -= n_tiles_m * n_tiles_n


@gluon.jit
def _add_scaled(acc, product, a_s, b_s, B_IN_BLOCKS: gl.constexpr):
    """acc + product · scales; the scales of b are read here, not earlier, as there are no registers for them."""
    if B_IN_BLOCKS:
        acc += product * a_s[:, None]
    else:
        acc += product * a_s[:, None] * b_s.load(gl.SliceLayout(0, acc.type.layout))[None, :]
    # Nothing is in flight here. This keeps the compiler from moving the additions behind the next product, which needs
    # the registers of this one.
    return warpgroup_mma_wait(0, deps=(acc,))


@gluon.jit
def _keep_columns(a, k, k_begin, k_end):
    """Zeroes what of 64×128 numbers in shared memory, which begin in column k, is another group's."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    k += gl.arange(0, 128, gl.SliceLayout(0, layout))
    x = a.load(layout)
    a.store(gl.where(((k >= k_begin) & (k < k_end))[None, :], x, gl.zeros_like(x)))


@gluon.jit
def _store(c_ptr, acc, row, m_end, col, N):
    """Writes 64×128 of c. Two bytes a number: first rearranged, so that each thread writes 16 bytes."""
    if c_ptr.dtype.element_ty.primitive_bitwidth == 16:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    else:
        layout: gl.constexpr = acc.type.layout
    out = gl.convert_layout(acc.to(c_ptr.dtype.element_ty), layout)
    m = row + gl.arange(0, 64, gl.SliceLayout(1, layout))
    n = col + gl.arange(0, 128, gl.SliceLayout(0, layout))
    gl.store(c_ptr + m.to(gl.int64)[:, None] * N + n[None, :], out, mask=(m < m_end)[:, None] & (n < N)[None, :])


@gluon.jit
def _multiply_tiles(
    c_ptr, ring, offsets_ptr, M, N, K, HALF: gl.constexpr,
    GROUPS: gl.constexpr, GROUPED: gl.constexpr, OUTER: gl.constexpr, B_IN_BLOCKS: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply the upper or lower half of each tile, and scale, add up and store it.

    With 256 rows a tile, theirs are two of 64×128: 128 registers a thread to add up in, and 64 that both products use.
    """
    a_ring, b_ring, as_ring, bs_ring, full, empty = ring
    STAGES: gl.constexpr = a_ring.type.shape[0]
    BLOCK_M: gl.constexpr = a_ring.type.shape[1]
    TWO: gl.constexpr = BLOCK_M == 256
    top: gl.constexpr = HALF * BLOCK_M // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    never = N < 0  # the compiler must not know: so each product goes where the last one was
    n_tiles_n = gl.cdiv(N, 128)
    tile = gl.program_id(0)
    step = 0
    for e in range(GROUPS):
        m_begin, m_end, k_begin, k_end = _group(offsets_ptr, e, M, K, GROUPED, OUTER)
        n_tiles_m = gl.cdiv(m_end - m_begin, BLOCK_M)
        first, last = _steps(k_begin, k_end)
        c = c_ptr
        if OUTER:
            c += e.to(gl.int64) * M * N
        while tile < n_tiles_m * n_tiles_n:
            tile_m, tile_n = _corner(tile, n_tiles_m, n_tiles_n)
            product = gl.zeros([64, 128], gl.float32, layout)
            acc0, acc1 = product, product
            for i in range(first, last):
                stage = step % STAGES
                a, b = a_ring.index(stage), b_ring.index(stage).permute([1, 0])
                a_s, b_s = as_ring.index(stage), bs_ring.index(stage)
                mbarrier.wait(full.index(stage), step // STAGES & 1)
                if OUTER and ((i * 128 < k_begin) | (i * 128 + 128 > k_end)):
                    _keep_columns(a.slice(top, 64), i * 128, k_begin, k_end)
                    if TWO:
                        _keep_columns(a.slice(top + 64, 64), i * 128, k_begin, k_end)
                    fence_async_shared()
                product = warpgroup_mma(a.slice(top, 64), b, product, use_acc=never, is_async=True)
                a_s0 = a_s.slice(top, 64).load(rows)
                if TWO:
                    a_s1 = a_s.slice(top + 64, 64).load(rows)
                product = warpgroup_mma_wait(0, deps=(product,))
                acc0 = _add_scaled(acc0, product, a_s0, b_s, B_IN_BLOCKS)
                if TWO:
                    product = warpgroup_mma(a.slice(top + 64, 64), b, product, use_acc=never, is_async=True)
                    product = warpgroup_mma_wait(0, deps=(product,))
                    acc1 = _add_scaled(acc1, product, a_s1, b_s, B_IN_BLOCKS)
                mbarrier.arrive(empty.index(stage), count=1)
                step += 1
            row = m_begin + tile_m * BLOCK_M + top
            _store(c, acc0, row, m_end, tile_n * 128, N)
            if TWO:
                _store(c, acc1, row + 64, m_end, tile_n * 128, N)
            tile += gl.num_programs(0)
        tile -= n_tiles_m * n_tiles_n


@gluon.jit
def _hopper_kernel(
    a_desc, as_ptr, b_desc, bs_ptr, c_ptr, offsets_ptr, M, N, K,
    as_stride_m, as_stride_k, bs_stride_e, bs_stride_n, bs_stride_k,
    GROUPS: gl.constexpr, GROUPED: gl.constexpr, OUTER: gl.constexpr, B_IN_BLOCKS: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All three products: `_gemm_kernel`'s, and with OUTER `_grouped_outer_kernel`'s, in tiles of BLOCK_M×128.

    There is a program for each multiprocessor, which takes every so manieth tile. One warp fills a ring of STAGES in
    shared memory, each of them a step of 128 along K: (BLOCK_M + 128)·128 bytes of operands, and their scales. Two
    groups of four warps empty it, each for one half of the tile's rows; they run on their own, so that the tensor cores
    multiply for one while the other scales, or stores its tile. A stage is full when its bytes have been counted and
    its scales stored, and empty when both groups have said so.

    Bound by the tensor cores; by the scaling where b has a scale per row, which makes it twice the work.
    """
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BLOCK_M, 128], a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, 128, 128], b_desc.layout)
    as_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], flat)
    bs_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 128], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=2)
    ring = a_ring, b_ring, as_ring, bs_ring, full, empty
    gl.warp_specialize(
        [
            (_multiply_tiles, (c_ptr, ring, offsets_ptr, M, N, K, 0, GROUPS, GROUPED, OUTER, B_IN_BLOCKS)),
            (_multiply_tiles, (c_ptr, ring, offsets_ptr, M, N, K, 1, GROUPS, GROUPED, OUTER, B_IN_BLOCKS)),
            (
                _load_tiles,
                (
                    a_desc, as_ptr, as_stride_m, as_stride_k, b_desc, bs_ptr, bs_stride_e, bs_stride_n, bs_stride_k,
                    ring, offsets_ptr, M, N, K, GROUPS, GROUPED, OUTER, B_IN_BLOCKS,
                ),
            ),
        ],
        [4, 1],  # warps of the second and third
        [232, 40],  # their registers; the first has what is left of 12 warps of 168: 232 too
    )  # fmt: skip


@cache
def _processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 1 for other devices, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _hopper_processors(device: torch.device) -> int:
    """How many multiprocessors a Hopper GPU has; 0 for other devices."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    return _processors(device)


def _hopper_rows(m: int, n: int, groups: int, device: torch.device) -> int:
    """Rows of the Hopper kernel's tiles: 256 or 128, whichever should be faster, or 0 for the portable kernel.

    A tile of 128 rows takes somewhat more than half the time of one of 256.
    """
    processors, groups = _hopper_processors(device), max(groups, 1)
    if not processors or m // groups < 128:
        return 0
    columns = (n + 127) // 128 * groups
    small, large = ((m // groups + rows - 1) // rows * columns for rows in (128, 256))  # how many tiles
    if 2 * small < processors:
        return 0
    return 256 if 2 * -(-large // processors) <= 1.07 * -(-small // processors) else 128


def _launch_hopper(
    rows: int, a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor, c: torch.Tensor,
    offsets: torch.Tensor | None, outer: bool,
) -> None:  # fmt: skip
    m, k, n = *a.shape, c.shape[-1]
    _hopper_kernel[(_hopper_processors(a.device),)](
        HopperDescriptor.from_tensor(_copyable(a), [rows, 128], OPERAND), a_s,
        HopperDescriptor.from_tensor(_copyable(b), [128, 128], OPERAND), b_s,
        c, offsets, m, n, k, *a_s.stride(), *b_s.stride(),
        GROUPS=1 if offsets is None else len(offsets), GROUPED=offsets is not None, OUTER=outer,
        B_IN_BLOCKS=b_s.shape[1] != n, BLOCK_M=rows, STAGES=4 if rows == 256 else 6, num_warps=4, maxnreg=168,
    )  # fmt: skip


# --- Between the products -----------------------------------------------------------------------------------------
# Everything here is bound by memory. Each function replaces a chain of element-wise operations, forward and backward,
# by one kernel each that reads and writes every tensor once; sums and products are in float32.

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
        return _Rope.forward(ctx, grad, *ctx.angles, True), None, None, None


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


SYMMETRIC_TILE = 128, 128, 64  # rows, columns, and numbers along the sum
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
