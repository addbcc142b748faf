"""The FP8 kernels for CUDA GPUs of compute capability 8.9 and more, in Triton.

Their mathematics is defined in `fp8_ops.py`, where tiles, blocks and scales are explained; its functions check the
arguments. Two things govern how the kernels are written.

Quantisation moves bytes: each element is read once from memory and written once or twice, at a quarter or half of its
size. Each program takes a square of 128×128, which holds complete tiles of both directions. It goes through the square
twice, first for the largest numbers of the columns: kept in registers instead, a square leaves room for one program an
SM, with nothing to do while it waits for memory. `kernel_fused.py` has the kernels that quantise what they compute.

A product of FP8 matrices moves few bytes and multiplies at twice the rate of bfloat16, but tensor cores sum products
with only some 14 bits (DeepSeek-V3 report, section 3.3.2). So a sum runs over 128 products, which is as far as a scale
reaches anyway, and is then multiplied by both scales and added to an accumulator in float32. Both operands are read
along the dimension of the sum, as Hopper's tensor cores need them: `a` (M, K) and `b` (N, K). They are read
through tensor descriptors, which Hopper's TMA unit executes: elements beyond a matrix are loaded as zeros, so loads
need no masks.

There are two such kernels. A portable one in plain Triton waits for each product before it scales it, so the tensor
cores idle. Large products on Hopper run one in Gluon, the layer below Triton, where warps have different tasks: while
some scale, others multiply.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from threading import Event
from types import SimpleNamespace
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
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import KernelInterface
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK = tl.constexpr(128)
E4M3 = tl.constexpr(tl.float8e4nv)
E4M3_MAX = tl.constexpr(448.0)
SMALLEST_SCALE_BITS = tl.constexpr(0x00800000)  # float32's smallest normal number
INFINITY_BITS = tl.constexpr(0x7F800000)
MANTISSA_BITS = tl.constexpr(0x007FFFFF)


@triton.jit
def magnitude(x):
    """|x| in float32, as integers of the same bits.

    Positive floats are ordered as these, NaN above infinity: so their maximum keeps a NaN, which that of floats drops.
    """
    return tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True)


@triton.jit
def _scale(largest, UE8M0: tl.constexpr):
    """The scale that maps the largest `magnitude` to 448, and its reciprocal."""
    amax = largest.to(tl.float32, bitcast=True)
    bits = tl.div_rn(amax, tl.full(amax.shape, E4M3_MAX, tl.float32)).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.maximum(bits, SMALLEST_SCALE_BITS)
    if UE8M0:  # all mantissa bits that are not 0 carry into the exponent
        bits = tl.where(bits < INFINITY_BITS, (bits + MANTISSA_BITS) & INFINITY_BITS, bits)
    s = bits.to(tl.float32, bitcast=True)
    return s, tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)


@triton.jit
def tile_start(K, SIZE: tl.constexpr):
    """Where the tile of SIZE×128 of this program begins in a matrix of K columns; rows of tiles one after the other.

    Programs at work at a time thus read long pieces of its rows. Offsets of a tile are of 64 bits, those in it of 32.
    """
    tiles = tl.cdiv(K, BLOCK)
    return (tl.program_id(0) // tiles).to(tl.int64) * SIZE, (tl.program_id(0) % tiles).to(tl.int64) * BLOCK


@triton.jit
def store_column_scales(largest, m_start, k_start, K, st_ptr, UE8M0: tl.constexpr):
    """Writes the scales of 128 rows' columns from `k_start` on; returns their reciprocals (128,).

    `largest` (·, 128) has the largest `magnitude` of a column among all its rows. Scales of the same 128 rows are
    adjacent in st: (⌈M/128⌉, K).
    """
    k = tl.arange(0, BLOCK)
    s_at, inside = st_ptr + m_start // BLOCK * K + k_start + k, k < K - k_start
    tl.store(s_at, tl.max(largest, axis=0).to(tl.float32, bitcast=True), mask=inside)
    # By way of memory, so that a thread divides for one column: a reduction leaves the maxima of many in each thread.
    tl.debug_barrier()
    s, r = _scale(tl.load(s_at, mask=inside, other=0.0).to(tl.int32, bitcast=True), UE8M0)
    tl.debug_barrier()  # with more threads than columns, several read the same maximum
    tl.store(s_at, s, mask=inside)
    return r


@triton.jit
def store_quantized(
    x, r_t, m_start, k_start, M, K, q_ptr, s_ptr, qt_ptr, UE8M0: tl.constexpr, BOTH: tl.constexpr, ROWS: tl.constexpr
):
    """Quantises rows x (ROWS, 128) at (m_start, k_start), both int64, of a matrix (M, K), and writes them.

    In tiles of 1×128 to q (M, K) and s (M, ⌈K/128⌉). With BOTH, also the transposed matrix to qt (K, M), in tiles of
    1×128 along M, the reciprocals of whose scales are `r_t` (128,).
    """
    m, k = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_inside, k_inside = m < M - m_start, k < K - k_start
    values = x.to(tl.float32)
    s, r = _scale(tl.max(magnitude(x), axis=1), UE8M0)
    inside = m_inside[:, None] & k_inside[None, :]
    tl.store(q_ptr + m_start * K + k_start + m[:, None] * K + k[None, :], (values * r[:, None]).to(E4M3), mask=inside)
    tl.store(s_ptr + (m_start + m) * tl.cdiv(K, BLOCK) + k_start // BLOCK, s, mask=m_inside)
    if BOTH:
        q = tl.trans((values * r_t[None, :]).to(E4M3))
        inside = k_inside[:, None] & m_inside[None, :]
        tl.store(qt_ptr + k_start * M + m_start + k[:, None] * M + m[None, :], q, mask=inside)


@triton.jit
def _read_rows(
    x_ptr, index_ptr, limit_ptr, m_start, k_start, M, K, stride_m, stride_k, GATHER: tl.constexpr, ROWS: tl.constexpr
):
    """ROWS×128 numbers of x (M, K) at (m_start, k_start); with GATHER those of rows `index`, zeros from `limit` on."""
    m, k = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_inside = m < M - m_start
    if GATHER:
        m_inside &= m_start + m < tl.load(limit_ptr)
        m = tl.load(index_ptr + m_start + m, mask=m_inside, other=0).to(tl.int64)
    else:
        x_ptr += m_start * stride_m
    inside = m_inside[:, None] & (k < K - k_start)[None, :]
    return tl.load(x_ptr + k_start * stride_k + m[:, None] * stride_m + k[None, :] * stride_k, mask=inside, other=0.0)


@triton.jit
def _act_quant_kernel(
    x_ptr, index_ptr, limit_ptr, q_ptr, s_ptr, qt_ptr, st_ptr, M, K, stride_m, stride_k,
    UE8M0: tl.constexpr, BOTH: tl.constexpr, GATHER: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Quantises activations (M, K), and with BOTH their transpose; see `store_quantized`.

    With GATHER, row m is row `index[m]` of x, and rows from `limit` on are zeros. A program takes SIZE×128 numbers in
    steps of ROWS: with BOTH, 128×128, which it reads twice, for the scales of the columns and then for the numbers. The
    second time they come from a cache, and a step needs so few registers that an SM has several programs at work. Reads
    each element once from memory (2 bytes in bfloat16) and writes it once (1), with BOTH twice (2). Bound by memory, of
    whose rate it reaches some half on an H200. Tokens permuted to K experts each are 4·K bytes an element this way; a
    permutation in bfloat16 before it adds 2 + 2·K.
    """
    m_start, k_start = tile_start(K, SIZE)
    r_t = 0.0
    if BOTH:
        largest = tl.zeros([ROWS, BLOCK], tl.int32)
        for m in range(0, SIZE, ROWS):
            x = _read_rows(x_ptr, index_ptr, limit_ptr, m_start + m, k_start, M, K, stride_m, stride_k, GATHER, ROWS)
            largest = tl.maximum(largest, magnitude(x))
        r_t = store_column_scales(largest, m_start, k_start, K, st_ptr, UE8M0)
    for m in range(0, SIZE, ROWS):
        x = _read_rows(x_ptr, index_ptr, limit_ptr, m_start + m, k_start, M, K, stride_m, stride_k, GATHER, ROWS)
        store_quantized(x, r_t, m_start + m, k_start, M, K, q_ptr, s_ptr, qt_ptr, UE8M0, BOTH, ROWS)


QUANT_ROWS, QUANT_WARPS = 32, 4  # of a step of the kernels that quantise activations, and of their programs


Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def act_quant(x: torch.Tensor, scale_fmt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fp8_ops.act_quant`; `x` has shape (M, K)."""
    return _act_quant(x, scale_fmt, both=False)[:2]


def act_quant_both(
    x: torch.Tensor, scale_fmt: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `fp8_ops.act_quant_both`."""
    return _act_quant(x, scale_fmt, both=True)  # type: ignore[return-value]


def gather_quant(
    x: torch.Tensor, index: torch.Tensor, limit: torch.Tensor, scale_fmt: str | None, both: bool
) -> Quantized:
    """`empty_quantized` filled with rows `index` of x: int32 (M,); zeros from row `limit` on, an int32 scalar."""
    return _act_quant(x, scale_fmt, both, index, limit)


def _act_quant(
    x: torch.Tensor, scale_fmt: str | None, both: bool,
    index: torch.Tensor | None = None, limit: torch.Tensor | None = None,
) -> Quantized:  # fmt: skip
    """Runs `_act_quant_kernel` on x (M, K), or on the rows of it that `index` lists."""
    m, k = len(x if index is None else index), x.shape[1]
    out, size = empty_quantized(m, k, x.device, both), 128 if both else QUANT_ROWS
    _act_quant_kernel[(triton.cdiv(m, size) * triton.cdiv(k, 128),)](
        x, index, limit, *out, m, k, *x.stride(), UE8M0=scale_fmt == "ue8m0", BOTH=both, GATHER=index is not None,
        SIZE=size, ROWS=QUANT_ROWS, num_warps=QUANT_WARPS,
    )  # fmt: skip
    return out


def empty_quantized(m: int, k: int, device: torch.device, both: bool) -> Quantized:
    """Outputs for `store_quantized`: those of `fp8_ops.act_quant_both`, the last two None if not `both`."""
    tiles_m, tiles_k = triton.cdiv(m, 128), triton.cdiv(k, 128)
    q = torch.empty(m, k, dtype=torch.float8_e4m3fn, device=device)
    s = torch.empty(m, tiles_k, dtype=torch.float32, device=device)
    if not both:
        return q, s, None, None
    q_t = torch.empty(k, m, dtype=torch.float8_e4m3fn, device=device)
    return q, s, q_t, torch.empty(tiles_m, k, dtype=torch.float32, device=device).T


@triton.jit
def _weight_quant_kernel(
    w_ptr, q_ptr, s_ptr, qt_ptr, N, K, stride_e, stride_n, stride_k, UE8M0: tl.constexpr, BOTH: tl.constexpr
):  # fmt: skip
    """Quantises a stack of weights (E, N, K) in blocks of 128×128, with BOTH their transpose (E, K, N) too.

    Program (i, j, e) takes a block. Reads each element once (4 bytes of a master weight) and writes it once or twice.
    Bound by memory: 6 bytes an element with BOTH; a transposition of its own and copies of the results into buffers
    that stay made it 11.
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    e = tl.program_id(2).to(tl.int64)
    n_inside, k_inside = n < N, k < K
    inside = n_inside[:, None] & k_inside[None, :]
    n, k = n.to(tl.int64), k.to(tl.int64)
    where = e * stride_e + n[:, None] * stride_n + k[None, :] * stride_k
    w = tl.load(w_ptr + where, mask=inside, other=0.0).to(tl.float32)
    s, r = _scale(tl.max(tl.reshape(magnitude(w), [BLOCK * BLOCK]), axis=0), UE8M0)
    q_at = q_ptr + (e * N + n[:, None]) * K + k[None, :]
    tl.store(q_at, (w * r).to(E4M3), mask=inside)
    tl.store(s_ptr + (e * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1), s)
    if BOTH:
        # The block is read back, for CUDA 12.8's ptxas makes wrong code where the same casts are stored in two layouts
        # (it packs two casts for one store in place, and loses them for the other).
        tl.debug_barrier()
        q = tl.load(q_at, mask=inside, other=0.0)
        inside = k_inside[:, None] & n_inside[None, :]
        tl.store(qt_ptr + (e * K + k[:, None]) * N + n[None, :], tl.trans(q), mask=inside)


def weight_quant(w: torch.Tensor, scale_fmt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fp8_ops.weight_quant`."""
    return _weight_quant(w, scale_fmt, _empty_quantized_weight(w), None)[:2]


def weight_quant_both(
    w: torch.Tensor, scale_fmt: str | None, out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`fp8_ops.weight_quant`'s results and the transposed values, contiguous; written to `out` if it is given."""
    if out is None:
        q_t = torch.empty(w.mT.shape, dtype=torch.float8_e4m3fn, device=w.device)
        out = *_empty_quantized_weight(w), q_t
    return _weight_quant(w, scale_fmt, out[:2], out[2])


def _weight_quant(
    w: torch.Tensor, scale_fmt: str | None, out: tuple[torch.Tensor, torch.Tensor], q_t: torch.Tensor | None
) -> Any:
    """Runs `_weight_quant_kernel` on a stack of weights; returns `out` and `q_t`, which it fills."""
    w = w.reshape(-1, *w.shape[-2:])
    n, k = w.shape[1:]
    _weight_quant_kernel[(triton.cdiv(n, 128), triton.cdiv(k, 128), len(w))](
        w, *out, q_t, n, k, *w.stride(), UE8M0=scale_fmt == "ue8m0", BOTH=q_t is not None, num_warps=8
    )
    return *out, q_t


def _empty_quantized_weight(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised values and scales of `weight_quant`."""
    *stack, n, k = w.shape
    q = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    s = torch.empty(*stack, triton.cdiv(n, 128), triton.cdiv(k, 128), dtype=torch.float32, device=w.device)
    return q, s


@triton.jit
def _weight_dequant_kernel(
    q_ptr, s_ptr, w_ptr, N, K, q_stride_e, q_stride_n, q_stride_k, s_stride_e, s_stride_n, s_stride_k
):  # fmt: skip
    """Dequantises a stack of weights (E, N, K); program (i, j, e) takes a block of 128×128.

    Reads each element once (1 byte) and writes it once (2 or 4). Bound by memory.
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


def _set_block_shapes(args: dict[str, Any]) -> None:
    """Sets the block shapes of both descriptors to the tiles of the configuration about to run."""
    for name, rows in (("a_desc", "BLOCK_M"), ("b_desc", "BLOCK_N"), ("a2_desc", "BLOCK_M"), ("b2_desc", "BLOCK_N")):
        if name in args:
            args[name].block_shape = [args[rows], 128]


# (BLOCK_M, BLOCK_N, warps, stages): large tiles for many rows, small ones for decoding and for small GPUs
TILES = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages, pre_hook=_set_block_shapes)
    for m, n, warps, stages in [(128, 128, 8, 4), (64, 128, 4, 4), (64, 128, 4, 3), (64, 64, 4, 3), (16, 64, 4, 4)]
]


def _tma_aligned(q: torch.Tensor) -> torch.Tensor:
    """Pads the rows of a quantised matrix to multiples of 16 bytes, which TMA needs."""
    if q.shape[-1] % 16:
        q = torch.nn.functional.pad(q.view(torch.int8), (0, -q.shape[-1] % 16)).view(q.dtype)
    return q.contiguous()


def _descriptor(q: torch.Tensor) -> TensorDescriptor:
    """A tensor descriptor of a matrix, for tiles that `_set_block_shapes` sizes later."""
    return TensorDescriptor.from_tensor(_tma_aligned(q), [128, 128])


@triton.jit
def _find_group(offsets_ptr, tile, GROUPS: tl.constexpr, GROUPS_POW2: tl.constexpr, BLOCK_M: tl.constexpr):
    """The group of a tile of rows, the tile's first row and the group's end; group GROUPS beyond the last tile."""
    groups = tl.arange(0, GROUPS_POW2)
    ends = tl.load(offsets_ptr + groups, mask=groups < GROUPS, other=0)
    starts = tl.load(offsets_ptr + groups - 1, mask=(groups > 0) & (groups < GROUPS), other=0)
    last_tile = tl.cumsum(tl.where(groups < GROUPS, tl.cdiv(ends - starts, BLOCK_M), 0), 0)
    e = tl.sum(((last_tile <= tile) & (groups < GROUPS)).to(tl.int32), 0)
    before = tl.sum(tl.where(groups == e - 1, last_tile, 0), 0)
    start = tl.sum(tl.where(groups == e, starts, 0), 0) + (tile - before) * BLOCK_M
    return e, start, tl.sum(tl.where(groups == e, ends, 0), 0)


@triton.jit
def _add_product(
    acc, a_desc, as_ptr, row_a, as_stride_k, b_desc, bs_ptr, row_b, bs_stride_k, K, B_IN_BLOCKS: tl.constexpr
):  # fmt: skip
    """acc plus a tile of a · bᵀ, in steps of 128 along K; the scales' pointers are those of the tile's rows."""
    for i in range(0, tl.cdiv(K, BLOCK)):
        a = a_desc.load([row_a, i * BLOCK])
        b = b_desc.load([row_b, i * BLOCK])
        a_s = tl.load(as_ptr + i * as_stride_k)
        b_s = tl.load(bs_ptr + i * bs_stride_k)
        if B_IN_BLOCKS:
            acc += tl.dot(a, b.T) * (a_s * b_s)[:, None]
        else:
            acc += tl.dot(a, b.T) * a_s[:, None] * b_s[None, :]
    return acc


@triton.autotune(TILES, key=["N", "K", "M_BUCKET", "PAIRS"], cache_results=True)
@triton.jit
def _gemm_kernel(
    a_desc, as_ptr, b_desc, bs_ptr, a2_desc, as2_ptr, b2_desc, bs2_ptr, c_ptr, offsets_ptr, M, N, K,
    as_stride_m, as_stride_k, bs_stride_e, bs_stride_n, bs_stride_k, K2, as2_stride_m, bs2_stride_e, M_BUCKET,
    PAIRS: tl.constexpr, B_IN_BLOCKS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """c (M, N) = a (M, K) · b (N, K)ᵀ; with GROUPS, rows `offsets[e-1]` to `offsets[e]` by matrix e of b (E, N, K).

    With two PAIRS, plus a2 (M, K2) · b2 (N, K2)ᵀ, in groups likewise: c is written once, 2 bytes an element in
    bfloat16, where two products and their sum move 10.

    A program computes a tile of BLOCK_M×BLOCK_N in steps of 128 along K, each of which reads (BLOCK_M + BLOCK_N)·128
    bytes for BLOCK_M·BLOCK_N·128 multiplications. Programs run in bands of 8 tiles of rows, whose operands stay in the
    L2 cache. With large tiles it is bound by the tensor cores; with few rows (decoding), by reading b once.

    With GROUPS, each program finds its group on the device, so the host need not know their sizes: the grid has room
    for one ragged tile per group, and programs beyond the last tile exit. Rows beyond a group's end are multiplied, but
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
        tile_n = pid % n_tiles_n
        e, start, end = _find_group(offsets_ptr, pid // n_tiles_n, GROUPS, GROUPS_POW2, BLOCK_M)
        if e >= GROUPS:
            return
    m = start + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_s = (m % M).to(tl.int64)
    # a tile is no wider than a block, which then has one scale for all of it
    b_s = (tile_n * BLOCK_N // BLOCK if B_IN_BLOCKS else (n % N).to(tl.int64)) * bs_stride_n
    row_b = e * N + tile_n * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = _add_product(
        acc, a_desc, as_ptr + a_s * as_stride_m, start, as_stride_k,
        b_desc, bs_ptr + e * bs_stride_e + b_s, row_b, bs_stride_k, K, B_IN_BLOCKS,
    )  # fmt: skip
    if PAIRS == 2:
        acc = _add_product(
            acc, a2_desc, as2_ptr + a_s * as2_stride_m, start, as_stride_k,
            b2_desc, bs2_ptr + e * bs2_stride_e + b_s, row_b, bs_stride_k, K2, B_IN_BLOCKS,
        )  # fmt: skip
    c = c_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(c, acc.to(c_ptr.dtype.element_ty), mask=(m < end)[:, None] & (n < N)[None, :])


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # a, its scales, b, its scales


def gemm(a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See `fp8_ops.fp8_gemm`; `a` has shape (M, K)."""
    return _gemm([(a, a_s, b.unsqueeze(0), b_s.unsqueeze(0))], None, dtype)


def grouped_gemm(
    a: torch.Tensor,
    a_s: torch.Tensor,
    b: torch.Tensor,
    b_s: torch.Tensor,
    offsets: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `fp8_ops.fp8_grouped_gemm`."""
    return _gemm([(a, a_s, b, b_s)], offsets, dtype)


def gemm_sum(pairs: list[Operands], offsets: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The sum of one or two products, as `gemm` makes them without `offsets`, else as `grouped_gemm`.

    Both have shape (M, N), but K may differ.
    """
    if offsets is None:
        pairs = [(a, a_s, b.unsqueeze(0), b_s.unsqueeze(0)) for a, a_s, b, b_s in pairs]
    return _gemm(pairs, offsets, dtype)


def _gemm(pairs: list[Operands], offsets: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """`gemm_sum` with every b (E, N, K): runs Hopper's own kernel where that is faster, else the portable one."""
    a, a_s, b, b_s = pairs[0]
    (m, k), (e, n, _) = a.shape, b.shape
    groups = 0 if offsets is None else e
    pairs = [(a, a_s, b.reshape(-1, b.shape[-1]), b_s) for a, a_s, b, b_s in pairs]
    is_gradient = not groups and len(pairs) == 1 and b_s.shape[1] == n  # of a weight: b has a scale per row
    if is_gradient and (parts := _hopper_parts(m, n, k, a.device)) > 1:
        partial = torch.empty(parts, m, n, dtype=torch.float32, device=a.device)
        _launch_hopper(128, pairs, partial, None, outer=True)
        return partial.sum(dim=0).to(dtype)
    c = torch.empty(m, n, dtype=dtype, device=a.device)
    if rows := _hopper_rows(m, n, groups, a.device):
        _launch_hopper(rows, pairs, c, offsets, outer=False)
        return c

    def grid(meta: dict[str, int]) -> tuple[int]:
        return ((triton.cdiv(m, meta["BLOCK_M"]) + groups) * triton.cdiv(n, meta["BLOCK_N"]),)

    operands = [(_descriptor(a), a_s, _descriptor(b), b_s) for a, a_s, b, b_s in pairs]
    _gemm_kernel[grid](
        *operands[0], *operands[-1],
        c, offsets, m, n, k, *a_s.stride(), *b_s.stride(), *_second_strides(pairs), _bucket(m // max(groups, 1)),
        PAIRS=len(pairs), B_IN_BLOCKS=b_s.shape[1] != n, GROUPS=groups,
        GROUPS_POW2=triton.next_power_of_2(max(groups, 1)),
    )  # fmt: skip
    return c


def _second_strides(pairs: list[Operands]) -> tuple[int, int, int]:
    """K of the last pair, and the strides of its scales that depend on it; the other strides are the first pair's."""
    (_, a_s, _, b_s), (a2, a2_s, _, b2_s) = pairs[0], pairs[-1]
    if (a2_s.stride(1), *b2_s.stride()[1:]) != (a_s.stride(1), *b_s.stride()[1:]):
        raise ValueError("scales of products that are added must be laid out alike")
    return a2.shape[1], a2_s.stride(0), b2_s.stride(0)


def _bucket(rows: int) -> int:
    """The key under which autotuning keeps its choice for a number of rows."""
    return min(max(triton.next_power_of_2(max(rows, 1)), 16), 4096)


@triton.autotune(TILES[:4], key=["N", "K", "ROWS_BUCKET"], cache_results=True)
@triton.jit
def _grouped_outer_kernel(
    a_desc, as_ptr, b_desc, bs_ptr, c_ptr, offsets_ptr, N, K,
    as_stride_n, as_stride_i, bs_stride_k, bs_stride_i, ROWS_BUCKET,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """c[e] (N, K) = a[:, group e] · b[:, group e]ᵀ for a (N, rows) and b (K, rows).

    Program (i, e) computes BLOCK_M×BLOCK_N of c[e], in steps of 128 rows from multiples of 128 on, as the scales have:
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
        acc += tl.dot(a.to(E4M3), b.T) * a_s[:, None] * b_s[None, :]
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
        _launch_hopper(rows, [(a, a_s, b, b_s.unsqueeze(0))], c, offsets, outer=True)
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
def _group_bounds(offsets_ptr, e, M, K, GROUPS: gl.constexpr, GROUPED: gl.constexpr, OUTER: gl.constexpr):
    """The range of group e along M and along K; with OUTER but not GROUPED, groups are equal parts of K."""
    if GROUPED:
        begin = gl.load(offsets_ptr + e - 1, mask=e > 0, other=0)
        end = gl.load(offsets_ptr + e)
    else:
        part = gl.cdiv(gl.cdiv(K, 128), GROUPS) * 128
        begin, end = gl.minimum(e * part, K), gl.minimum(e * part + part, K)
    if OUTER:
        return 0, M, begin, end
    elif GROUPED:
        return begin, end, 0, K
    else:
        return 0, M, 0, K


@gluon.jit
def _tile_coordinates(tile, n_tiles_m, n_tiles_n):
    """Row and column of a tile, in tiles; tiles are numbered in bands, whose operands stay in the L2 cache."""
    band, rest = tile // (BAND * n_tiles_n), tile % (BAND * n_tiles_n)
    band_rows = gl.minimum(n_tiles_m - band * BAND, BAND)
    return band * BAND + rest % band_rows, rest // band_rows


@gluon.jit
def _k_steps(k_begin, k_end):
    """The range of steps of 128 along K that cover a group: first, and one past the last."""
    return k_begin // 128, gl.where(k_end > k_begin, gl.cdiv(k_end, 128), 0)


@gluon.jit
def _load_tile(
    a_desc, as_ptr, as_stride_m, as_stride_k, b_desc, bs_ptr, bs_stride_e, bs_stride_n, bs_stride_k, ring,
    row, tile_n, e, M, N, first, last, step, B_IN_BLOCKS: gl.constexpr,
):  # fmt: skip
    """Loads what one tile needs in steps `first` to `last` along K; returns the next step of the ring."""
    a_ring, b_ring, as_ring, bs_ring, full, empty = ring
    STAGES: gl.constexpr = a_ring.type.shape[0]
    BLOCK_M: gl.constexpr = a_ring.type.shape[1]
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    col = tile_n * 128
    # rows beyond the last one get its scale, and are not stored
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
    return step


@gluon.jit
def _load_tiles(
    a_desc, as_ptr, as_stride_m, as_stride_k, b_desc, bs_ptr, bs_stride_e, bs_stride_n, bs_stride_k,
    a2_desc, as2_ptr, as2_stride_m, b2_desc, bs2_ptr, bs2_stride_e, K2, ring, offsets_ptr, M, N, K,
    PAIRS: gl.constexpr, GROUPS: gl.constexpr, GROUPED: gl.constexpr, OUTER: gl.constexpr, B_IN_BLOCKS: gl.constexpr,
):  # fmt: skip
    """The warp that loads: while the ring has a free stage, operands by TMA and scales by plain loads."""
    BLOCK_M: gl.constexpr = ring[0].type.shape[1]
    n_tiles_n = gl.cdiv(N, 128)
    tile = gl.program_id(0)
    step = 0
    for e in range(GROUPS):
        m_begin, m_end, k_begin, k_end = _group_bounds(offsets_ptr, e, M, K, GROUPS, GROUPED, OUTER)
        n_tiles_m = gl.cdiv(m_end - m_begin, BLOCK_M)
        first, last = _k_steps(k_begin, k_end)
        while tile < n_tiles_m * n_tiles_n:
            tile_m, tile_n = _tile_coordinates(tile, n_tiles_m, n_tiles_n)
            row = m_begin + tile_m * BLOCK_M
            step = _load_tile(
                a_desc, as_ptr, as_stride_m, as_stride_k, b_desc, bs_ptr, bs_stride_e, bs_stride_n, bs_stride_k, ring,
                row, tile_n, e, M, N, first, last, step, B_IN_BLOCKS,
            )  # fmt: skip
            if PAIRS == 2:
                step = _load_tile(
                    a2_desc, as2_ptr, as2_stride_m, as_stride_k, b2_desc, bs2_ptr, bs2_stride_e, bs_stride_n,
                    bs_stride_k, ring, row, tile_n, e, M, N, 0, gl.cdiv(K2, 128), step, B_IN_BLOCKS,
                )  # fmt: skip
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
def _mask_columns(a, k, k_begin, k_end):
    """Zeroes the columns of other groups in a 64×128 tile in shared memory whose first column is k."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    k += gl.arange(0, 128, gl.SliceLayout(0, layout))
    x = a.load(layout)
    a.store(gl.where(((k >= k_begin) & (k < k_end))[None, :], x, gl.zeros_like(x)))


@gluon.jit
def _store(c_ptr, acc, row, m_end, col, N):
    """Writes a 64×128 tile of c; of 2-byte elements, rearranged first so that each thread writes 16 bytes."""
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
    c_ptr, ring, offsets_ptr, M, N, K, K2, HALF: gl.constexpr, PAIRS: gl.constexpr,
    GROUPS: gl.constexpr, GROUPED: gl.constexpr, OUTER: gl.constexpr, B_IN_BLOCKS: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply the upper or lower half of each tile, and scale, accumulate and store it.

    With 256 rows a tile, their half is two products of 64×128: 128 registers a thread for accumulators, and 64 that
    both products use.
    """
    a_ring, b_ring, as_ring, bs_ring, full, empty = ring
    STAGES: gl.constexpr = a_ring.type.shape[0]
    BLOCK_M: gl.constexpr = a_ring.type.shape[1]
    TWO: gl.constexpr = BLOCK_M == 256
    top: gl.constexpr = HALF * BLOCK_M // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    never = N < 0  # false, but not to the compiler, which thus writes each product over the last one
    n_tiles_n = gl.cdiv(N, 128)
    tile = gl.program_id(0)
    step = 0
    for e in range(GROUPS):
        m_begin, m_end, k_begin, k_end = _group_bounds(offsets_ptr, e, M, K, GROUPS, GROUPED, OUTER)
        n_tiles_m = gl.cdiv(m_end - m_begin, BLOCK_M)
        first, last = _k_steps(k_begin, k_end)
        if PAIRS == 2:  # never OUTER, so the first step is 0
            last += gl.cdiv(K2, 128)
        c = c_ptr
        if OUTER:
            c += e.to(gl.int64) * M * N  # type: ignore[attr-defined]
        while tile < n_tiles_m * n_tiles_n:
            tile_m, tile_n = _tile_coordinates(tile, n_tiles_m, n_tiles_n)
            product = gl.zeros([64, 128], gl.float32, layout)
            acc0, acc1 = product, product
            for i in range(first, last):
                stage = step % STAGES
                a, b = a_ring.index(stage), b_ring.index(stage).permute([1, 0])
                a_s, b_s = as_ring.index(stage), bs_ring.index(stage)
                mbarrier.wait(full.index(stage), step // STAGES & 1)
                if OUTER and ((i * 128 < k_begin) | (i * 128 + 128 > k_end)):
                    _mask_columns(a.slice(top, 64), i * 128, k_begin, k_end)
                    if TWO:
                        _mask_columns(a.slice(top + 64, 64), i * 128, k_begin, k_end)
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
    a_desc, as_ptr, b_desc, bs_ptr, a2_desc, as2_ptr, b2_desc, bs2_ptr, c_ptr, offsets_ptr, M, N, K,
    as_stride_m, as_stride_k, bs_stride_e, bs_stride_n, bs_stride_k, K2, as2_stride_m, bs2_stride_e,
    PAIRS: gl.constexpr,
    GROUPS: gl.constexpr, GROUPED: gl.constexpr, OUTER: gl.constexpr, B_IN_BLOCKS: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All three products: `_gemm_kernel`'s, and with OUTER `_grouped_outer_kernel`'s, in tiles of BLOCK_M×128.

    With OUTER but no groups, c (GROUPS, M, N) gets the products of equal parts of K, for the caller to add.

    A persistent program on each SM computes every P-th tile, of P programs. One warp fills a ring of STAGES in
    shared memory, each of them a step of 128 along K: (BLOCK_M + 128)·128 bytes of operands, and their scales. Two
    groups of four warps empty it, each for one half of the tile's rows, without waiting for each other: so the tensor
    cores multiply for one while the other scales, or stores its tile. A stage is full when its bytes have been counted
    and its scales stored, and empty when both groups have arrived at its barrier.

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
            (_multiply_tiles, (c_ptr, ring, offsets_ptr, M, N, K, K2, 0, PAIRS, GROUPS, GROUPED, OUTER, B_IN_BLOCKS)),
            (_multiply_tiles, (c_ptr, ring, offsets_ptr, M, N, K, K2, 1, PAIRS, GROUPS, GROUPED, OUTER, B_IN_BLOCKS)),
            (
                _load_tiles,
                (
                    a_desc, as_ptr, as_stride_m, as_stride_k, b_desc, bs_ptr, bs_stride_e, bs_stride_n, bs_stride_k,
                    a2_desc, as2_ptr, as2_stride_m, b2_desc, bs2_ptr, bs2_stride_e, K2, ring, offsets_ptr, M, N, K,
                    PAIRS, GROUPS, GROUPED, OUTER, B_IN_BLOCKS,
                ),
            ),
        ],
        [4, 1],  # warps of the second and third
        [232, 40],  # their registers; the first has what is left of 12 warps of 168: 232 too
    )  # fmt: skip


_meta_sms = 0  # of the Hopper GPU that tensors on the meta device stand for: see `compiling_ahead`


def _hopper_sms(device: torch.device) -> int:
    """How many SMs a Hopper GPU has; 0 for other devices."""
    return _meta_sms if device.type == "meta" else _sms_of_hopper(device)


@cache
def _sms_of_hopper(device: torch.device) -> int:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def _hopper_rows(m: int, n: int, groups: int, device: torch.device) -> int:
    """Rows of the Hopper kernel's tiles: 256 or 128, whichever should be faster, or 0 for the portable kernel.

    A tile of 128 rows takes somewhat more than half the time of one of 256.
    """
    processors, groups = _hopper_sms(device), max(groups, 1)
    if not processors or m // groups < 128:
        return 0
    columns = (n + 127) // 128 * groups
    small, large = ((m // groups + rows - 1) // rows * columns for rows in (128, 256))  # how many tiles
    if 2 * small < processors:
        return 0
    return 256 if 2 * -(-large // processors) <= 1.07 * -(-small // processors) else 128


def _hopper_parts(m: int, n: int, k: int, device: torch.device) -> int:
    """In how many parts the sum of a product is divided, for few tiles of 128×128 to occupy all SMs: 1 to 8.

    Costs are estimated in steps of 128 along K of one SM: those of the SM that has most to do, and adding up the parts,
    at 1/12 a tile, the time in which memory moves its 128 KiB, and 5 for the launch.
    """
    processors = _hopper_sms(device)
    if not processors or min(m, n) < 128:
        return 1
    tiles, steps = -(-m // 128) * -(-n // 128), -(-k // 128)

    def cost(parts: int) -> float:
        return -(-tiles * parts // processors) * -(-steps // parts) + (parts > 1) * (5 + tiles * parts / 12)

    return min(range(1, 9), key=cost)


def _launch_hopper(
    rows: int, pairs: list[Operands], c: torch.Tensor, offsets: torch.Tensor | None, outer: bool
) -> None:
    """Runs `_hopper_kernel` with tiles of `rows` rows on one or two pairs of operands; every b is (E·N, K).

    Without `offsets`, `outer` fills c (parts, M, N) with the products of equal parts of K.
    """
    a, a_s, _, b_s = pairs[0]
    m, k, n = *a.shape, c.shape[-1]

    def descriptor(q: torch.Tensor, tile_rows: int) -> HopperDescriptor:
        return HopperDescriptor.from_tensor(_tma_aligned(q), [tile_rows, 128], OPERAND)

    operands = [(descriptor(a, rows), a_s, descriptor(b, 128), b_s) for a, a_s, b, b_s in pairs]
    _hopper_kernel[(_hopper_sms(a.device),)](
        *operands[0], *operands[-1],
        c, offsets, m, n, k, *a_s.stride(), *b_s.stride(), *_second_strides(pairs), PAIRS=len(pairs),
        GROUPS=len(c) if outer else 1 if offsets is None else len(offsets), GROUPED=offsets is not None, OUTER=outer,
        B_IN_BLOCKS=b_s.shape[1] != n, BLOCK_M=rows, STAGES=4 if rows == 256 else 6, num_warps=4, maxnreg=168,
    )  # fmt: skip


@contextmanager
def no_launches(instead: Callable[..., None] = lambda *_args, **_options: None) -> Iterator[None]:
    """Within it kernels do nothing, those of `kernel_fused` too: tensors without memory only have shapes.

    `instead` is called with the kernel, and with all that a launch would have been given but the grid.
    """
    launch = KernelInterface.__getitem__
    KernelInterface.__getitem__ = lambda kernel, _grid: partial(instead, kernel)
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launch


@contextmanager
def compiling_ahead(device: torch.device) -> Iterator[None]:
    """Within it kernels are not launched; at its end they are compiled for `device`, the current GPU, in parallel.

    Else each is compiled by its first launch, one after the other. What a kernel is compiled for are the dtypes and the
    alignment of tensors, which those on the meta device have too, and integers where they are 1 or multiples of 16.
    What fails to compile, or is not met because of an exception, is left to the first launch.
    """
    global _meta_sms
    pool, is_met = ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,)), Event()

    def submit(kernel: Any, *args: Any, **options: Any) -> None:
        if isinstance(kernel, Autotuner):
            for config in kernel.configs:
                config.pre_hook(dict(zip(kernel.arg_names, args, strict=False)) | config.all_kwargs())
                submit(kernel.fn, *args, **options, **config.all_kwargs())
        else:
            kernel.warmup(*args, grid=None, **options)

    def load(compile_kernel: Callable[[], Any]) -> Any:
        is_met.wait()  # threads at work would slow down Python, which meets the other kernels
        compiled = compile_kernel()
        with suppress(Exception):
            _ = compiled.run  # loads it, and compiles the C function that launches it, which takes as long again
        return compiled

    _meta_sms = _hopper_sms(device)
    try:
        executor: Any = SimpleNamespace(submit=lambda compile_kernel: pool.submit(load, compile_kernel))
        with suppress(Exception), triton.AsyncCompileMode(executor, ignore_errors=True), no_launches(submit):
            try:
                yield
            finally:
                is_met.set()
    finally:
        pool.shutdown(cancel_futures=True)
        _meta_sms = 0
