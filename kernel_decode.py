"""The kernels that decode on a CUDA GPU, in Triton: a step of up to 64 positions through all layers, by latents.

A step for one position reads each active weight once and computes little, so two things cost time: bytes, and the start
of kernels, each of which waits for the one before. There are 7 to 9 kernels a layer:

    attn_norm, wq_a and wkv_a → q_norm and wq_b → W_k, kv_norm, rotary angles and KV cache → attention, divided over
    positions → its combination and W_v → wo → ffn_norm, router, w1 and w3 of the shared experts (or of the dense MLP) →
    the choice of experts, and their w1 and w3 → w2 of all

For one position, a product with a matrix is bound by memory: a program takes a few rows, and multiplies in float32. For
more positions, tensor cores multiply, and one more kernel norms each row. Experts are then divided among programs, not
positions: each reads its weights once, for all rows, and experts that no position chose are skipped.

Nothing in a launch depends on data: positions, rows and addresses of KV caches are read on the device, so that a whole
step with the choice of the byte is one CUDA graph. The residual stream and all sums are in float32; the factors of
products by tensor cores are in the model's dtype. Weights are read as they are stored, FP8 ones with a scale per block
of 128×128.

In shapes: N positions of the step (each of its own row, or several of one), H heads, C `kv_lora_rank`,
R `qk_rope_head_dim`, E experts, K columns of a matrix, INTER hidden width.
"""

import math
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from triton.language import constexpr

import kernel_sparse
from model import LATENT_NORM_EPS, MLP, Block, KVCache, Linear, MoE, MTPModule, RMSNorm, Transformer

BLOCK = tl.constexpr(128)  # columns of FP8 weights that share a scale, and rows
# bytes that a program sorts, experts that it compares in pairs, positions whose rotary angles are kept
MAX_VOCAB, MAX_EXPERTS, MAX_CONTEXT = 1024, 512, 1 << 20
SPAN = 32  # positions that attention reads at a time
MAX_STEPS = 32  # of a block
POSITIONS = (1, 4, 16, 64)  # numbers of positions that there are steps for
PROGRAMS, TILE, WARPS = 528, 32, 4  # of a product with one position, the tile in blocks of 128 numbers
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# --- Products with one position -------------------------------------------------------------------------------------


@triton.jit
def _columns(block, KB: constexpr):
    """Numbers of KB·128 columns from 128·block on, (KB, 128)."""
    return (block + tl.arange(0, KB))[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _vector(x_ptr, block, K: constexpr, KB: constexpr):
    """KB·128 numbers of a vector (K,) from 128·block on, as float32 (KB, 128)."""
    k = _columns(block, KB)
    return tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def _tile(w_ptr, rows, inside, block, K: constexpr, KB: constexpr):
    """Some rows (r,) of a matrix (·, K), where they are inside, and columns from 128·block on: (r, KB, 128)."""
    k = _columns(block, KB)
    mask = inside[:, None, None] & (k < K)[None, :, :]
    return tl.load(w_ptr + rows[:, None, None] * K + k[None, :, :], mask=mask, other=0.0)


@triton.jit
def _dense(w, s_ptr, rows, inside, block, K: constexpr, KB: constexpr):
    """A tile as float32, scaled where it is in FP8."""
    w = w.to(tl.float32)
    if s_ptr is not None:
        BLOCKS: constexpr = (K + BLOCK - 1) // BLOCK
        b = block + tl.arange(0, KB)
        mask = inside[:, None] & (b < BLOCKS)[None, :]
        s = tl.load(s_ptr + (rows // BLOCK)[:, None] * BLOCKS + b[None, :], mask=mask, other=0.0)
        w *= s[:, :, None]
    return w


@triton.jit
def _accumulate(acc, w, w_ptr, s_ptr, rows, inside, x_ptr, g_ptr, factor, K: constexpr, KB: constexpr):
    """Adds rows of a matrix times `factor · x · g`, not summed over columns yet: (r, KB, 128).

    `w` is the first tile; the next one is loaded while one is multiplied.
    """
    BLOCKS: constexpr = (K + BLOCK - 1) // BLOCK
    for block in range(0, BLOCKS, KB):
        following = w
        if BLOCKS > KB:
            following = _tile(w_ptr, rows, inside, block + KB, K, KB)
        x = _vector(x_ptr, block, K, KB) * factor
        if g_ptr is not None:
            x *= _vector(g_ptr, block, K, KB)
        acc += _dense(w, s_ptr, rows, inside, block, K, KB) * x[None, :, :]
        w = following
    return acc


@triton.jit
def _total(acc):
    return tl.sum(tl.sum(acc, axis=2), axis=1)  # over columns: (r, KB, 128) to (r,)


@triton.jit
def _inverse_rms(x_ptr, K: constexpr, KP: constexpr, EPS: constexpr):
    """The factor of RMSNorm for a vector (K,), apart from its weights; KP is a power of two."""
    k = tl.arange(0, KP)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x) / K + EPS)


@triton.jit
def _project_rows(
    x_ptr, g_ptr, w_ptr, s_ptr, out_ptr, tile, HEIGHT: constexpr, K: constexpr, KP: constexpr, EPS: constexpr,
    ADD: constexpr, R: constexpr, KB: constexpr,
):  # fmt: skip
    """Rows tile·R to tile·R + R of `W x`, or of `W norm(x)` where there are a norm's weights g."""
    rows = tile * R + tl.arange(0, R)
    inside = rows < HEIGHT
    w = _tile(w_ptr, rows, inside, 0, K, KB)
    acc = tl.zeros((R, KB, BLOCK), tl.float32)
    y = _total(_accumulate(acc, w, w_ptr, s_ptr, rows, inside, x_ptr, g_ptr, 1.0, K, KB))
    if g_ptr is not None:
        y *= _inverse_rms(x_ptr, K, KP, EPS)
    if ADD:
        y += tl.load(out_ptr + rows, mask=inside, other=0.0)
    tl.store(out_ptr + rows, y, mask=inside)


@triton.jit
def _project_kernel(
    x_ptr, g_ptr, a_ptr, sa_ptr, b_ptr, sb_ptr, out_ptr, OA: constexpr, OB: constexpr, K: constexpr, KP: constexpr,
    EPS: constexpr, ADD: constexpr, R: constexpr, KB: constexpr,
):  # fmt: skip
    """`project` of one or two matrices, A (OA, K) and B (OB, K), and the RMSNorm before it; for one position.

    Of `MLA.forward`: attn_norm, and wq_a or wq with wkv_a; and wo with the residual sum (ADD); also the head. Program i
    takes R rows. Reads the matrices once, the vector x (K,) in each program (from L2). Bound by memory.
    """
    tile = tl.program_id(0)
    TILES: constexpr = (OA + R - 1) // R
    if b_ptr is None:
        _project_rows(x_ptr, g_ptr, a_ptr, sa_ptr, out_ptr, tile, OA, K, KP, EPS, ADD, R, KB)
    else:
        if tile < TILES:
            _project_rows(x_ptr, g_ptr, a_ptr, sa_ptr, out_ptr, tile, OA, K, KP, EPS, ADD, R, KB)
        else:
            _project_rows(x_ptr, g_ptr, b_ptr, sb_ptr, out_ptr + OA, tile - TILES, OB, K, KP, EPS, ADD, R, KB)


@triton.jit
def _activate(gate, ACT: constexpr):
    """`model.ACTIVATIONS`."""
    if ACT == "silu":
        return gate * tl.sigmoid(gate)
    elif ACT == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        return tl.where(gate > 0, gate * gate, gate * 0)  # NaN stays


@triton.jit
def _gate_up_rows(
    x_ptr, g_ptr, w1_ptr, s1_ptr, w3_ptr, s3_ptr, h_ptr, tile, INTER: constexpr, K: constexpr, KP: constexpr,
    EPS: constexpr, ACT: constexpr, R: constexpr, KB: constexpr,
):  # fmt: skip
    """Numbers tile·R to tile·R + R of `act(w1 h) * w3 h`, h = norm(x)."""
    BLOCKS: constexpr = (K + BLOCK - 1) // BLOCK
    rows = tile * R + tl.arange(0, R)
    inside = rows < INTER
    w1, w3 = _tile(w1_ptr, rows, inside, 0, K, KB), _tile(w3_ptr, rows, inside, 0, K, KB)
    gate, up = tl.zeros((R, KB, BLOCK), tl.float32), tl.zeros((R, KB, BLOCK), tl.float32)
    for block in range(0, BLOCKS, KB):
        next1, next3 = w1, w3
        if BLOCKS > KB:
            next1 = _tile(w1_ptr, rows, inside, block + KB, K, KB)
            next3 = _tile(w3_ptr, rows, inside, block + KB, K, KB)
        x = _vector(x_ptr, block, K, KB) * _vector(g_ptr, block, K, KB)
        gate += _dense(w1, s1_ptr, rows, inside, block, K, KB) * x[None, :, :]
        up += _dense(w3, s3_ptr, rows, inside, block, K, KB) * x[None, :, :]
        w1, w3 = next1, next3
    r = _inverse_rms(x_ptr, K, KP, EPS)
    tl.store(h_ptr + rows, _activate(_total(gate) * r, ACT) * (_total(up) * r), mask=inside)


@triton.jit
def _gate_up_one_kernel(
    x_ptr, g_ptr, gate_ptr, logits_ptr, w1_ptr, s1_ptr, w3_ptr, s3_ptr, h_ptr, E: constexpr, INTER: constexpr,
    K: constexpr, KP: constexpr, EPS: constexpr, ACT: constexpr, R: constexpr, KB: constexpr,
):  # fmt: skip
    """ffn_norm with w1, w3 and activation of an `MLP` (dense or shared experts), and `Gate`'s logits, for one position.

    The first programs take R rows of the router's weights (E, K) each, if there is one, the others R rows of both w1
    and w3 (INTER, K). Writes the logits (E,) and `act(w1 h) * w3 h` (INTER,). Bound by memory.
    """
    tile = tl.program_id(0)
    TILES: constexpr = (E + R - 1) // R
    if tile < TILES:
        _project_rows(x_ptr, g_ptr, gate_ptr, None, logits_ptr, tile, E, K, KP, EPS, False, R, KB)
    else:
        tile -= TILES
        _gate_up_rows(x_ptr, g_ptr, w1_ptr, s1_ptr, w3_ptr, s3_ptr, h_ptr, tile, INTER, K, KP, EPS, ACT, R, KB)


@triton.jit
def _experts_up_one_kernel(
    x_ptr, g_ptr, logits_ptr, bias_ptr, w1_ptr, s1_ptr, w3_ptr, s3_ptr, h_ptr, chosen_ptr, weights_ptr, E: constexpr,
    GROUPS: constexpr, LIMITED: constexpr, TOPK: constexpr, SOFTMAX: constexpr, ROUTE_SCALE: constexpr, GP: constexpr,
    EP: constexpr, INTER: constexpr, K: constexpr, KP: constexpr, EPS: constexpr, ACT: constexpr, R: constexpr,
    KB: constexpr,
):  # fmt: skip
    """The rest of `Gate.forward`, and w1, w3 and activation of the chosen `Experts`, for one position.

    Program (i, j) finds the expert at rank j, and takes R rows of its w1 and w3 (INTER, K). Writes h (TOPK, INTER), and
    in the first programs, the experts' numbers and weights. Reads the chosen experts' weights only. Bound by memory.
    """
    tile, slot = tl.program_id(0), tl.program_id(1)
    PER: constexpr = E // GROUPS
    number = tl.arange(0, GP)[:, None] * PER + tl.arange(0, EP)[None, :]
    inside = (tl.arange(0, GP) < GROUPS)[:, None] & (tl.arange(0, EP) < PER)[None, :]
    logits = tl.load(logits_ptr + number, mask=inside, other=0.0)
    scores, rank = _route(logits, bias_ptr, inside, number, LIMITED, GROUPS, SOFTMAX, GP, EP)
    number = tl.reshape(number, (GP * EP,))
    expert = tl.minimum(tl.sum(tl.where(rank == slot, number, 0)), E - 1)  # of scores that are no numbers, too
    if tile == 0:
        weight = tl.sum(tl.where(rank == slot, scores, 0.0))
        if not SOFTMAX:
            weight /= tl.sum(tl.where(rank < TOPK, scores, 0.0)) + 1e-20
        tl.store(chosen_ptr + slot, expert)
        tl.store(weights_ptr + slot, weight * ROUTE_SCALE)
    ROWS: constexpr = (INTER + BLOCK - 1) // BLOCK
    BLOCKS: constexpr = (K + BLOCK - 1) // BLOCK
    if s1_ptr is not None:
        s1_ptr += expert * ROWS * BLOCKS
        s3_ptr += expert * ROWS * BLOCKS
    start = expert.to(tl.int64) * (INTER * K)
    w1_ptr, w3_ptr, h_ptr = w1_ptr + start, w3_ptr + start, h_ptr + slot * INTER
    _gate_up_rows(x_ptr, g_ptr, w1_ptr, s1_ptr, w3_ptr, s3_ptr, h_ptr, tile, INTER, K, KP, EPS, ACT, R, KB)


@triton.jit
def _route(
    logits, bias_ptr, inside, number, LIMITED: constexpr, GROUPS: constexpr, SOFTMAX: constexpr, GP: constexpr,
    EP: constexpr,
):  # fmt: skip
    """`Gate.route` of one position: scores and ranks (GP·EP,) from logits (GP, EP), one row a group of experts.

    An expert's rank is the number of those that come before it. `number` and `inside` are those of each place.
    """
    if SOFTMAX:
        logits = tl.where(inside, logits, float("-inf"))
        powers = tl.exp(logits - tl.max(tl.max(logits, axis=1), axis=0))
        scores = powers / tl.sum(tl.sum(powers, axis=1), axis=0)
    else:
        scores = tl.sigmoid(logits)
    choice = scores
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + number, mask=inside, other=0.0)
    choice = tl.where(inside, choice, float("-inf"))
    if GROUPS > 1:
        best = tl.max(choice, axis=1)
        if bias_ptr is not None:  # the best two rank a group
            first = tl.argmax(choice, axis=1)
            others = tl.where(tl.arange(0, EP)[None, :] == first[:, None], float("-inf"), choice)
            best += tl.max(others, axis=1)
        choice = tl.where((_ranks(best, GP) < LIMITED)[:, None], choice, float("-inf"))
    return tl.reshape(scores, (GP * EP,)), _ranks(tl.reshape(choice, (GP * EP,)), GP * EP)


@triton.jit
def _ranks(values, n: constexpr):
    """How many others are before each of n numbers, in falling order; of equal ones, the first comes first."""
    i = tl.arange(0, n)
    equal = (values[None, :] == values[:, None]) & (i[None, :] < i[:, None])
    return tl.sum(((values[None, :] > values[:, None]) | equal).to(tl.int32), axis=1)


@triton.jit
def _down_one_kernel(
    h_ptr, chosen_ptr, weights_ptr, w2_ptr, s2_ptr, shared_ptr, ss_ptr, x_ptr, D: constexpr, INTER: constexpr,
    TOPK: constexpr, SHARED: constexpr, R: constexpr, KB: constexpr,
):  # fmt: skip
    """w2 of the chosen `Experts`, `combine`, the shared experts or dense MLP, and `Block`'s residual sum, one position.

    Program i adds R numbers of the result to x (D,). Reads h, (TOPK · INTER + SHARED,), and w2 (E, D, INTER) of the
    chosen experts, and (D, SHARED) of the others. Bound by memory.
    """
    rows = tl.program_id(0) * R + tl.arange(0, R)
    inside = rows < D
    acc = tl.zeros((R, KB, BLOCK), tl.float32)
    if SHARED > 0:
        w = _tile(shared_ptr, rows, inside, 0, SHARED, KB)
        acc = _accumulate(acc, w, shared_ptr, ss_ptr, rows, inside, h_ptr + TOPK * INTER, None, 1.0, SHARED, KB)
    for slot in range(TOPK):
        expert, weight = tl.load(chosen_ptr + slot), tl.load(weights_ptr + slot)
        w_ptr, scale_ptr, x = w2_ptr + expert.to(tl.int64) * (D * INTER), s2_ptr, h_ptr + slot * INTER
        if s2_ptr is not None:
            scale_ptr = s2_ptr + expert * (((D + BLOCK - 1) // BLOCK) * ((INTER + BLOCK - 1) // BLOCK))
        first = _tile(w_ptr, rows, inside, 0, INTER, KB)
        acc = _accumulate(acc, first, w_ptr, scale_ptr, rows, inside, x, None, weight, INTER, KB)
    tl.store(x_ptr + rows, tl.load(x_ptr + rows, mask=inside, other=0.0) + _total(acc), mask=inside)


# --- Attention by latents, for any number of positions --------------------------------------------------------------


@triton.jit
def _rotated(x_ptr, cos_ptr, sin_ptr, position, R: constexpr, HALF: constexpr, CONTEXT: constexpr):
    """`apply_rotary_emb`: the pairs of x (R,) rotated by the angles of a position (past the context: discarded)."""
    i = tl.arange(0, HALF)
    inside = i < R // 2
    at = tl.minimum(position, CONTEXT - 1) * (R // 2) + i
    cos, sin = tl.load(cos_ptr + at, mask=inside, other=0.0), tl.load(sin_ptr + at, mask=inside, other=0.0)
    even, odd = tl.load(x_ptr + 2 * i, mask=inside, other=0.0), tl.load(x_ptr + 2 * i + 1, mask=inside, other=0.0)
    return even * cos - odd * sin, odd * cos + even * sin


@triton.jit(do_not_specialize=["layer"])
def _queries_kernel(
    a_ptr, q_ptr, wkv_b_ptr, skv_ptr, kv_norm_ptr, cos_ptr, sin_ptr, positions_ptr, rows_ptr, caches_ptr, capacity_ptr,
    out_ptr, layer, TYPE: constexpr, Q_STRIDE: constexpr, A_STRIDE: constexpr, H: constexpr, NOPE: constexpr,
    R: constexpr, V: constexpr, C: constexpr, CONTEXT: constexpr, SCALE: constexpr, EPS: constexpr, NP: constexpr,
    HALF: constexpr, CP: constexpr, BC: constexpr,
):  # fmt: skip
    """The rotary queries of `MLA._queries`, W_kᵀ q of `_attend_absorbed`, kv_norm, the rotary key, `KVCache.update`.

    Reads q (N, H·(NOPE + R)), and the output of wkv_a, the last C + R columns of a (N, A_STRIDE). Program (h, n, i)
    writes BC of the C numbers that the query of head h has in the latent space at position n, times SCALE, and the
    first one the R rotated ones behind them: (N, H, C + R). Program (H, n, 0) writes the latent and the rotary key to
    the KV cache. W_k of a head is read for each position, mostly from L2: bound by memory for few positions.
    """
    h, n, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    half = tl.arange(0, HALF)
    is_pair = half < R // 2
    position = tl.load(positions_ptr + n).to(tl.int32)
    if h < H:
        d, c = tl.arange(0, NP), part * BC + tl.arange(0, BC)
        rows = h * (NOPE + V) + d
        mask = (d < NOPE)[:, None] & (c < C)[None, :]
        key = tl.load(wkv_b_ptr + rows[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if skv_ptr is not None:  # BC columns are of one block
            at = rows // BLOCK * ((C + BLOCK - 1) // BLOCK) + part * BC // BLOCK
            key *= tl.load(skv_ptr + at, mask=d < NOPE, other=0.0)[:, None]
        q_ptr += n * Q_STRIDE + h * (NOPE + R)
        out_ptr += (n * H + h) * (C + R)
        q = tl.load(q_ptr + d, mask=d < NOPE, other=0.0) * SCALE
        tl.store(out_ptr + c, tl.sum(q[:, None] * key, axis=0), mask=c < C)
        if part == 0:
            even, odd = _rotated(q_ptr + NOPE, cos_ptr, sin_ptr, position, R, HALF, CONTEXT)
            tl.store(out_ptr + C + half, even * SCALE, mask=is_pair)
            tl.store(out_ptr + C + R // 2 + half, odd * SCALE, mask=is_pair)
    else:
        row, capacity, i = tl.load(rows_ptr + n), tl.load(capacity_ptr), tl.arange(0, CP)
        cache_ptr = tl.load(caches_ptr + layer).to(tl.pointer_type(TYPE)) + (row * capacity + position) * (C + R)
        g = tl.load(kv_norm_ptr + i, mask=i < C, other=0.0)
        a_ptr += n * A_STRIDE + A_STRIDE - C - R
        if (row >= 0) & (position < capacity) & (part == 0):
            latent = tl.load(a_ptr + i, mask=i < C, other=0.0) * g * _inverse_rms(a_ptr, C, CP, EPS)
            tl.store(cache_ptr + i, latent.to(TYPE), mask=i < C)
            even, odd = _rotated(a_ptr + C, cos_ptr, sin_ptr, position, R, HALF, CONTEXT)
            tl.store(cache_ptr + C + half, even.to(TYPE), mask=is_pair)
            tl.store(cache_ptr + C + R // 2 + half, odd.to(TYPE), mask=is_pair)


@triton.jit
def _length(positions_ptr, rows_ptr, capacity_ptr, n):
    """How many positions of the KV cache position n of the step attends to: none where it is no row's."""
    end = tl.minimum(tl.load(positions_ptr + n) + 1, tl.load(capacity_ptr)).to(tl.int32)
    return tl.where(tl.load(rows_ptr + n) >= 0, end, 0)


@triton.jit(do_not_specialize=["layer"])
def _attend_kernel(
    q_ptr, positions_ptr, rows_ptr, caches_ptr, capacity_ptr, out_ptr, sums_ptr, layer, chosen_ptr, TYPE: constexpr,
    CACHE: constexpr, H: constexpr, C: constexpr, R: constexpr, SPLITS: constexpr, CP: constexpr, RP: constexpr,
    BT: constexpr, PRECISION: constexpr, CHOSEN: constexpr,
):  # fmt: skip
    """The scores, softmax and sums of latents of `MLA._attend_absorbed`, over a part of the positions.

    Program (s, n, i) takes 16 heads, and one of SPLITS parts of the positions that n attends to, BT at a time. Reads
    q (N, H, C + R) and the KV cache, (row, capacity, C + R), once for 16 heads. Writes the means of latents, float32
    (N, H, SPLITS, C), and the logarithms to base 2 of the sums of powers (N, H, SPLITS). Bound by memory. With CHOSEN,
    that many positions are chosen for n, and `positions` are places among them.
    """
    split, n = tl.program_id(0), tl.program_id(1)
    h = tl.program_id(2) * 16 + tl.arange(0, 16)
    is_head = h < H
    length = _length(positions_ptr, rows_ptr, capacity_ptr, n)
    row, capacity, cache = tl.load(rows_ptr + n), tl.load(capacity_ptr), tl.load(caches_ptr + layer)
    each = tl.cdiv(tl.cdiv(length, BT), SPLITS) * BT
    start = split * each
    end = tl.minimum(start + each, length)
    if start < length:
        cache_ptr = tl.multiple_of(cache.to(tl.pointer_type(CACHE)), 16) + row * capacity * (C + R)
        c, p = tl.arange(0, CP), tl.arange(0, RP)
        q_ptr += n * (H * (C + R))
        mask = is_head[:, None] & (c < C)[None, :]
        q = tl.load(q_ptr + h[:, None] * (C + R) + c[None, :], mask=mask, other=0.0).to(TYPE)
        mask = is_head[:, None] & (p < R)[None, :]
        q_pe = tl.load(q_ptr + h[:, None] * (C + R) + C + p[None, :], mask=mask, other=0.0).to(TYPE)
        best = tl.full((16,), float("-inf"), tl.float32)
        total, acc = tl.zeros((16,), tl.float32), tl.zeros((16, CP), tl.float32)
        for begin in range(start, end, BT):
            t = begin + tl.arange(0, BT)
            at = t
            if CHOSEN > 0:
                at = tl.load(chosen_ptr + n * CHOSEN + t, mask=t < end, other=0)
            at_ptr, is_old = cache_ptr + at[:, None] * (C + R), (t < end)[:, None]
            latent = tl.load(at_ptr + c[None, :], mask=is_old & (c < C)[None, :], other=0.0).to(TYPE)
            key = tl.load(at_ptr + C + p[None, :], mask=is_old & (p < R)[None, :], other=0.0).to(TYPE)
            scores = tl.dot(q, tl.trans(latent), input_precision=PRECISION)
            scores = tl.dot(q_pe, tl.trans(key), scores, input_precision=PRECISION)
            scores = tl.where((t < end)[None, :], scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, axis=1))
            powers, factor = tl.exp2(scores - higher[:, None]), tl.exp2(best - higher)
            total, best = total * factor + tl.sum(powers, axis=1), higher
            acc = tl.dot(powers.to(TYPE), latent, acc * factor[:, None], input_precision=PRECISION)
        at = (n * H + h) * SPLITS + split
        mask = is_head[:, None] & (c < C)[None, :]
        tl.store(out_ptr + at[:, None] * C + c[None, :], acc / total[:, None], mask=mask)
        tl.store(sums_ptr + at, best + tl.log2(total), mask=is_head)


@triton.jit
def _values_kernel(
    parts_ptr, sums_ptr, positions_ptr, rows_ptr, capacity_ptr, wkv_b_ptr, skv_ptr, out_ptr, H: constexpr,
    NOPE: constexpr, V: constexpr, C: constexpr, SPLITS: constexpr, BT: constexpr, KB: constexpr, SPLITS_P: constexpr,
    BS: constexpr, BV: constexpr,
):  # fmt: skip
    """Combines the parts of `_attend_kernel`, and the product with W_v of `MLA._attend_absorbed`.

    Program (h, n, i) computes BV numbers of the output (N, H, V) of head h at position n. Reads the parts in use, and
    BV rows of the head's W_v (V, C), for each position, mostly from L2: bound by memory for few positions.
    """
    h, n, v = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV + tl.arange(0, BV)
    rows, inside, c = h * (NOPE + V) + NOPE + v, v < V, _columns(0, KB)[None, :, :]
    w_v = _dense(_tile(wkv_b_ptr, rows, inside, 0, C, KB), skv_ptr, rows, inside, 0, C, KB)
    length = _length(positions_ptr, rows_ptr, capacity_ptr, n)
    each = tl.maximum(tl.cdiv(tl.cdiv(length, BT), SPLITS) * BT, 1)
    n_parts = tl.cdiv(length, each)
    s, first = tl.arange(0, SPLITS_P), (n * H + h) * SPLITS
    best = tl.max(tl.load(sums_ptr + first + s, mask=s < n_parts, other=float("-inf")), axis=0)
    best = tl.where(n_parts > 0, best, 0.0)  # where it is no row's, the output is 0
    total, acc = tl.zeros((BS,), tl.float32), tl.zeros((BS, KB, BLOCK), tl.float32)
    for start in range(0, n_parts, BS):
        i = start + tl.arange(0, BS)
        share = tl.exp2(tl.load(sums_ptr + first + i, mask=i < n_parts, other=float("-inf")) - best)
        is_used = (i < n_parts)[:, None, None] & (c < C)
        part = tl.load(parts_ptr + (first + i)[:, None, None] * C + c, mask=is_used, other=0.0)
        total += share
        acc += part * share[:, None, None]
    latent = tl.sum(acc, axis=0) / tl.where(n_parts > 0, tl.sum(total), 1.0)
    y = _total(w_v * latent[None, :, :])
    tl.store(out_ptr + (n * H + h) * V + v, y.to(out_ptr.dtype.element_ty), mask=inside)


# --- Products with several positions --------------------------------------------------------------------------------


@triton.jit
def _norm_kernel(
    x_ptr, parts_ptr, g_ptr, out_ptr, N: constexpr, D: constexpr, STRIDE: constexpr, PARTS: constexpr, EPS: constexpr,
    DP: constexpr,
):  # fmt: skip
    """`RMSNorm.add`: adds the parts of an update (PARTS, N, D) to the residual stream x, and norms it.

    Program n takes a row of D numbers; rows of x are STRIDE apart. Reads each part once, writes x and its norm (N, D),
    in the dtype of that. Bound by memory.
    """
    n, d = tl.program_id(0), tl.arange(0, DP)
    g = tl.load(g_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + n * STRIDE + d, mask=d < D, other=0.0)
    for i in range(PARTS):
        x += tl.load(parts_ptr + (i * N + n) * D + d, mask=d < D, other=0.0)
    if PARTS > 0:
        tl.store(x_ptr + n * STRIDE + d, x, mask=d < D)
    y = x * tl.rsqrt(tl.sum(x * x) / D + EPS) * g
    tl.store(out_ptr + n * D + d, y.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _multiply(
    acc, x_ptr, w_ptr, s_ptr, row, n_rows, begin, end, STRIDE: constexpr, K: constexpr, N: constexpr, BN: constexpr,
    BK: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Adds x Wᵀ to acc (N, BN): x (N, ·) with rows STRIDE apart, BN rows of W (n_rows, K), columns begin to end."""
    n, o = tl.arange(0, N), row + tl.arange(0, BN)
    for start in range(begin, end, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_ptr + n[:, None] * STRIDE + k[None, :], mask=(k < end)[None, :], other=0.0)
        mask = (o < n_rows)[None, :] & (k < end)[:, None]
        w = tl.load(w_ptr + o[None, :] * K + k[:, None], mask=mask, other=0.0).to(x.dtype)
        if s_ptr is None:
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        else:  # BN rows and BK columns are of one block
            s = tl.load(s_ptr + row // BLOCK * ((K + BLOCK - 1) // BLOCK) + start // BLOCK)
            acc += tl.dot(x, w, input_precision=PRECISION) * s
    return acc


@triton.jit
def _store_rows(acc, out_ptr, row, n_rows, STRIDE: constexpr, N: constexpr, BN: constexpr):
    """Stores (N, BN) from column `row` on."""
    n, o = tl.arange(0, N), row + tl.arange(0, BN)
    values = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + n[:, None] * STRIDE + o[None, :], values, mask=(o < n_rows)[None, :])


@triton.jit
def _matmul_kernel(
    x_ptr, a_ptr, sa_ptr, b_ptr, sb_ptr, out_ptr, OA: constexpr, OB: constexpr, K: constexpr, SPLITS: constexpr,
    N: constexpr, BN: constexpr, BK: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """`project` of one or two matrices, A (OA, K) and B (OB, K), for N positions: x (N, K) to (SPLITS, N, OA + OB).

    Program (i, s) takes BN rows of a matrix, and one of SPLITS parts of its columns; the next kernel adds these. Reads
    the matrices once, x once a program. Bound by memory up to some 200 positions.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    TILES: constexpr = (OA + BN - 1) // BN
    EACH: constexpr = ((K + BLOCK - 1) // BLOCK + SPLITS - 1) // SPLITS * BLOCK
    begin = split * EACH
    end = tl.minimum(begin + EACH, K)
    out_ptr += split * (N * (OA + OB))
    acc = tl.zeros((N, BN), tl.float32)
    if b_ptr is None:
        acc = _multiply(acc, x_ptr, a_ptr, sa_ptr, tile * BN, OA, begin, end, K, K, N, BN, BK, PRECISION)
        _store_rows(acc, out_ptr, tile * BN, OA, OA + OB, N, BN)
    else:
        if tile < TILES:
            acc = _multiply(acc, x_ptr, a_ptr, sa_ptr, tile * BN, OA, begin, end, K, K, N, BN, BK, PRECISION)
            _store_rows(acc, out_ptr, tile * BN, OA, OA + OB, N, BN)
        else:
            row = (tile - TILES) * BN
            acc = _multiply(acc, x_ptr, b_ptr, sb_ptr, row, OB, begin, end, K, K, N, BN, BK, PRECISION)
            _store_rows(acc, out_ptr + OA, row, OB, OA + OB, N, BN)


@triton.jit
def _route_kernel(
    x_ptr, gate_ptr, bias_ptr, rows_ptr, shares_ptr, E: constexpr, GROUPS: constexpr, LIMITED: constexpr,
    TOPK: constexpr, SOFTMAX: constexpr, ROUTE_SCALE: constexpr, K: constexpr, GP: constexpr, EP: constexpr,
    BK: constexpr,
):  # fmt: skip
    """`Gate.forward` for several positions: the weight of each expert at each, (N, E), 0 of those not chosen.

    Program n takes a position, and none of its experts count if it is no row's. Reads the router's weights (E, K) for
    each position, from L2. Bound by latency.
    """
    n = tl.program_id(0)
    PER: constexpr = E // GROUPS
    number = tl.arange(0, GP)[:, None] * PER + tl.arange(0, EP)[None, :]
    inside = (tl.arange(0, GP) < GROUPS)[:, None] & (tl.arange(0, EP) < PER)[None, :]
    acc = tl.zeros((GP, EP, BK), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_ptr + n * K + k, mask=k < K, other=0.0).to(tl.float32)
        mask = inside[:, :, None] & (k < K)[None, None, :]
        w = tl.load(gate_ptr + number[:, :, None] * K + k[None, None, :], mask=mask, other=0.0).to(tl.float32)
        acc += w * x[None, None, :]
    scores, rank = _route(tl.sum(acc, axis=2), bias_ptr, inside, number, LIMITED, GROUPS, SOFTMAX, GP, EP)
    is_chosen = rank < TOPK
    if not SOFTMAX:
        scores /= tl.sum(tl.where(is_chosen, scores, 0.0)) + 1e-20
    is_chosen &= tl.load(rows_ptr + n) >= 0
    shares = tl.where(is_chosen, scores * ROUTE_SCALE, 0.0)
    tl.store(shares_ptr + n * E + tl.reshape(number, (GP * EP,)), shares, mask=tl.reshape(inside, (GP * EP,)))


@triton.jit
def _gate_up_kernel(
    x_ptr, shares_ptr, w1_ptr, s1_ptr, w3_ptr, s3_ptr, shared1_ptr, ss1_ptr, shared3_ptr, ss3_ptr, h_ptr, E: constexpr,
    INTER: constexpr, SHARED: constexpr, K: constexpr, ACT: constexpr, N: constexpr, BN: constexpr, BK: constexpr,
    PRECISION: constexpr,
):  # fmt: skip
    """w1, w3 and activation of the `Experts`, and of the shared experts or the dense `MLP`, for N positions.

    A program takes BN rows of w1 and w3 of one expert that some position has chosen, for all positions, or of the
    others. Writes h (N, E·INTER + SHARED), times the weight of the choice: 0 where a position has not chosen an expert.
    Experts that no position chose are left out here and in `_down_kernel`. Bound by memory up to some 200 positions.
    """
    tile = tl.program_id(0)
    TILES: constexpr = (INTER + BN - 1) // BN
    n = tl.arange(0, N)
    gate, up = tl.zeros((N, BN), tl.float32), tl.zeros((N, BN), tl.float32)
    if tile < E * TILES:
        expert, row = tile // TILES, tile % TILES * BN
        shares = tl.load(shares_ptr + n * E + expert)
        if tl.sum((shares != 0).to(tl.int32)) > 0:
            start = expert.to(tl.int64) * (INTER * K)
            if s1_ptr is not None:
                s1_ptr += expert * ((INTER + BLOCK - 1) // BLOCK * ((K + BLOCK - 1) // BLOCK))
                s3_ptr += expert * ((INTER + BLOCK - 1) // BLOCK * ((K + BLOCK - 1) // BLOCK))
            gate = _multiply(gate, x_ptr, w1_ptr + start, s1_ptr, row, INTER, 0, K, K, K, N, BN, BK, PRECISION)
            up = _multiply(up, x_ptr, w3_ptr + start, s3_ptr, row, INTER, 0, K, K, K, N, BN, BK, PRECISION)
            h = _activate(gate, ACT) * up * shares[:, None]
            _store_rows(h, h_ptr + expert * INTER, row, INTER, E * INTER + SHARED, N, BN)
    else:
        row = (tile - E * TILES) * BN
        gate = _multiply(gate, x_ptr, shared1_ptr, ss1_ptr, row, SHARED, 0, K, K, K, N, BN, BK, PRECISION)
        up = _multiply(up, x_ptr, shared3_ptr, ss3_ptr, row, SHARED, 0, K, K, K, N, BN, BK, PRECISION)
        _store_rows(_activate(gate, ACT) * up, h_ptr + E * INTER, row, SHARED, E * INTER + SHARED, N, BN)


@triton.jit
def _down_kernel(
    h_ptr, shares_ptr, w2_ptr, s2_ptr, shared_ptr, ss_ptr, out_ptr, E: constexpr, INTER: constexpr, SHARED: constexpr,
    D: constexpr, SPLITS: constexpr, N: constexpr, BN: constexpr, BK: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """w2 of the `Experts` and of the shared experts or the dense `MLP`, for N positions: (SPLITS, N, D), to be added.

    Program (i, s) takes BN numbers of the result, every SPLITS-th expert from s on, if some position has chosen it, and
    one of SPLITS parts of the others. The choice's weights are in h (N, E·INTER + SHARED). Bound by memory.
    """
    row, split = tl.program_id(0) * BN, tl.program_id(1)
    EACH: constexpr = ((SHARED + BLOCK - 1) // BLOCK + SPLITS - 1) // SPLITS * BLOCK
    WIDTH: constexpr = E * INTER + SHARED
    n = tl.arange(0, N)
    acc = tl.zeros((N, BN), tl.float32)
    for expert in range(split, E, SPLITS):
        if tl.sum((tl.load(shares_ptr + n * E + expert) != 0).to(tl.int32)) > 0:
            expert_ptr = w2_ptr + tl.cast(expert, tl.int64) * (D * INTER)
            scale_ptr = s2_ptr
            if s2_ptr is not None:
                scale_ptr = s2_ptr + expert * ((D + BLOCK - 1) // BLOCK * ((INTER + BLOCK - 1) // BLOCK))
            h = h_ptr + expert * INTER
            acc = _multiply(acc, h, expert_ptr, scale_ptr, row, D, 0, INTER, WIDTH, INTER, N, BN, BK, PRECISION)
    if SHARED > 0:
        begin = split * EACH
        end, h = tl.minimum(begin + EACH, SHARED), h_ptr + E * INTER
        acc = _multiply(acc, h, shared_ptr, ss_ptr, row, D, begin, end, WIDTH, SHARED, N, BN, BK, PRECISION)
    _store_rows(acc, out_ptr + split * (N * D), row, D, D, N, BN)


# --- The ends of a step ---------------------------------------------------------------------------------------------


@triton.jit
def _embed_kernel(tokens_ptr, w_ptr, x_ptr, D: constexpr, DP: constexpr):
    """`Transformer.embed`: program n copies the embedding (D,) of a token to the residual stream, in float32."""
    n, d = tl.program_id(0), tl.arange(0, DP)
    token = tl.load(tokens_ptr + n)
    row = tl.load(w_ptr + token * D + d, mask=d < D, other=0.0)
    tl.store(x_ptr + n * D + d, row.to(tl.float32), mask=d < D)


@triton.jit
def _choose_kernel(
    logits_ptr, sampling_ptr, uniforms_ptr, counts_ptr, chosen_ptr, tokens_ptr, positions_ptr, N: constexpr,
    V: constexpr, VP: constexpr,
):  # fmt: skip
    """`distribution`, `_truncate` and `draw` of generate.py, for a byte of each row, which the next step reads.

    Program n takes row n of the logits, float32 (N, V). `sampling` has temperature, top-k and top-p, float64. Number
    counts[n] of the row's uniform numbers (steps, N) is used; the byte, or -1 if the model's output is not a number,
    goes to the same place of `chosen`, and to `tokens`; the position advances. Computes in float64, bound by latency.
    """
    n, v = tl.program_id(0), tl.arange(0, VP)
    logits = tl.load(logits_ptr + n * V + v, mask=v < V, other=float("-inf"))
    n_bad = tl.sum((logits != logits).to(tl.int32))
    logits = tl.where(logits == logits, logits, float("-inf"))
    best = tl.max(logits, axis=0)
    is_bad = (n_bad > 0) | (tl.abs(best) == float("inf"))
    temperature, at = tl.load(sampling_ptr), tl.load(counts_ptr + n)
    byte = tl.argmax(logits, axis=0).to(tl.int32)
    if temperature > 0:
        probs = tl.exp((logits.to(tl.float64) - best.to(tl.float64)) / temperature)
        probs /= tl.sum(probs)
        top_k, top_p = tl.load(sampling_ptr + 1), tl.load(sampling_ptr + 2)
        if ((top_k > 0) & (top_k < V)) | (top_p < 1):
            # as integers, positive numbers are in the same order; the last bits are the byte, of equals the lower first
            keys = probs.to(tl.int64, bitcast=True) // VP * VP + (VP - 1 - v)
            ranked = tl.sort(tl.where(v < V, keys, -1), descending=True)
            kept = tl.where(ranked < 0, 0, ranked // VP * VP).to(tl.float64, bitcast=True)
            most = tl.where(top_k > 0, top_k, V).to(tl.int32)
            kept = tl.where(v < most, kept, 0.0)
            kept /= tl.sum(kept)
            before = tl.where(v == 0, -1.0, tl.cumsum(kept, axis=0) - kept)  # the first one is always needed
            is_kept = (kept > 0) & (before < tl.where(top_p < 1, top_p, 2.0))
            last = tl.min(tl.where(is_kept, ranked, 0x7FFFFFFFFFFFFFFF), axis=0)
            probs = tl.where(keys >= last, probs, 0.0)
        cumulative = tl.cumsum(probs, axis=0)
        limit = tl.load(uniforms_ptr + at * N + n) * tl.max(cumulative, axis=0)
        byte = tl.minimum(tl.sum((cumulative <= limit).to(tl.int32)), V - 1)
    tl.store(chosen_ptr + at * N + n, tl.where(is_bad, -1, byte))
    tl.store(counts_ptr + n, at + 1)
    tl.store(tokens_ptr + n, tl.where(is_bad, 0, byte).to(tl.int64))
    tl.store(positions_ptr + n, tl.load(positions_ptr + n) + 1)


# --- Launching them -------------------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """A weight (…, out, in) as it is stored, and its scales if that is FP8."""

    w: torch.Tensor
    s: torch.Tensor | None = None


def _power(n: int, least: int = 1) -> int:
    """The next power of two."""
    return max(triton.next_power_of_2(n), least)


class Step:
    """The buffers of a step of up to N positions, one of POSITIONS, and the launches of its kernels.

    Besides weights, it reads `tokens`, `positions` in the KV cache, `rows` of it (-1: no position), `caches`, the
    addresses of its layers, and `capacity`. Weights and these buffers must stay where they are.

    Attributes:
        states, logits: The outputs of `Transformer.forward_with_hidden`, (N, dim) and float32 (N, vocab_size).
        before: The states that an MTP module reads, (N, dim).
        sampling: Temperature, top-k and top-p, float64 (3,).
        uniforms: For each step of a block, a uniform number a row, float64 (MAX_STEPS, N).
        counts: How many steps of a block a row has done, int32 (N,).
        chosen: The bytes of a block, int32 (MAX_STEPS, N); -1 where the model's output was not a number.

    Raises:
        ValueError: The model has something that the kernels do not have.
    """

    def __init__(self, model: Transformer, n: int):
        self.model, self.args, self.n = model, model.args, n
        args, device, self.attn = model.args, model.head.weight.device, cast(Block, model.layers[0]).attn
        self.dtype, self.cache_dtype = model.compute_dtype, model.cache_dtype or model.compute_dtype
        if args.n_routed_experts > MAX_EXPERTS or args.max_seq_len > MAX_CONTEXT:
            raise ValueError(f"more than {MAX_EXPERTS} experts or {MAX_CONTEXT:,} positions")
        self.shared, self.on_gpu = args.n_shared_experts * args.moe_inter_dim, device.type == "cuda"
        self.precision = "tf32x3" if self.dtype == torch.float32 else "tf32"
        self.kept: dict[torch.Tensor, torch.Tensor] = {}
        # so many parts of the positions that programs fill a GPU, whatever the lengths are
        self.splits = min(-(-args.max_seq_len // SPAN), max(128 // (n * -(-args.n_heads // 16)), 4))
        layers, zeros = args.n_layers + args.n_mtp_layers, partial(torch.zeros, device=device)
        caches = layers * (2 if args.index_topk else 1)
        self.inputs = zeros(2 * n + caches + 1, dtype=torch.int64)
        self.positions, self.rows, self.caches, self.capacity = self.inputs.split([n, n, caches, 1])
        self.rows.fill_(-1)
        self._allocate(device)
        self.tokens, self.counts = zeros(n, dtype=torch.int64), zeros(n, dtype=torch.int32)
        self.sampling, self.uniforms = (zeros(*shape, dtype=torch.float64) for shape in ((3,), (MAX_STEPS, n)))
        self.chosen = zeros(MAX_STEPS, n, dtype=torch.int32)
        self.cos, self.sin = (table.contiguous() for table in model.rope_tables(args.max_seq_len))

    def _allocate(self, device: torch.device) -> None:
        """Makes the buffers that one kernel writes and the next ones read."""
        args, latent = self.args, self.args.kv_lora_rank + self.args.qk_rope_head_dim
        n = self.height = self.n if self.n == 1 else max(self.n, 16)  # the least that tensor cores multiply
        floats = partial(torch.zeros, device=device, dtype=torch.float32)
        own = partial(torch.zeros, device=device, dtype=self.dtype)
        own_or_float, self.n_parts = (floats, 1) if n == 1 else (own, 4)
        queries = args.n_heads * self.attn.qk_head_dim
        self.a, self.q_normed = floats(n, (args.q_lora_rank or queries) + latent), own(n, args.q_lora_rank)
        self.queries, self.q = floats(n, queries) if args.q_lora_rank else self.a, floats(n, args.n_heads, latent)
        parts = n, args.n_heads, self.splits
        self.parts, self.sums = floats(*parts, args.kv_lora_rank), floats(*parts)
        self.values = own_or_float(n, args.n_heads * args.v_head_dim)
        routed = args.n_activated_experts if n == 1 else args.n_routed_experts
        self.h = own_or_float(n, max(args.inter_dim, routed * args.moe_inter_dim + self.shared))
        self.router_logits, self.shares = floats(args.n_routed_experts + 1), floats(n, args.n_routed_experts + 1)
        self.experts, self.weights = floats(routed + 1).int(), floats(routed + 1)
        self.x, self.normed, self.updates = floats(n, args.dim), own(n, args.dim), floats(self.n_parts, n, args.dim)
        self.joined, self.before, self.states = own(n, 2 * args.dim), own(n, args.dim), own(n, args.dim)
        self.logits = floats(n, args.vocab_size)
        self.chooser = kernel_sparse.Chooser(args, self.n, n, device) if args.index_topk else None

    def place(self, cache: KVCache, rows: list[int], positions: list[int]) -> None:
        """Sets the row of a cache, and the position there, of each of up to N positions."""
        kinds = zip(*cache.layers, strict=True)  # latents, then with an indexer its keys
        free, addresses = self.n - len(rows), [tensor.data_ptr() for kind in kinds for tensor in kind]
        values = [*positions, *[0] * free, *rows, *[-1] * free, *addresses, cache.capacity]
        self.inputs.copy_(torch.tensor(values))
        self.counts.zero_()

    def run(self) -> None:
        """Launches the main layers for `tokens`, and the choice of the byte that is the next token."""
        args = self.args
        buffers = self.tokens, self.model.embed.weight, self.x
        self._launch(_embed_kernel, (self.n,), *buffers, args.dim, DP=_power(args.dim))
        for i, layer in enumerate(self.model.layers):
            self._block(i, layer, 0 if i == 0 else self.n_parts)
        self._end(self.model.norm)
        if args.vocab_size <= MAX_VOCAB:
            self.choose()

    def choose(self) -> None:
        """Launches the choice of a byte by the logits, which is the next token."""
        what = self.logits, self.sampling, self.uniforms, self.counts, self.chosen, self.tokens, self.positions
        size = self.args.vocab_size
        self._launch(_choose_kernel, (self.n,), *what, self.n, size, VP=_power(size), num_warps=8)

    def run_mtp(self, depth: int) -> None:
        """Launches MTP module `depth` for `tokens` and the states `before`."""
        args, module = self.args, cast(MTPModule, self.model.mtp[depth])
        embedded = self.model.embed(self.tokens).to(self.dtype)
        torch.cat([module.enorm(embedded), module.hnorm(self.before[: self.n])], dim=-1, out=self.joined[: self.n])
        self._project(self.joined, None, self.x, self._matrix(module.eh_proj))
        self._block(args.n_layers + depth, module.block, 0)
        self._end(module.norm)

    def _launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, **constants: Any) -> None:
        kernel[grid](*args, **constants, num_warps=num_warps)

    def _matrix(self, layer: Linear) -> Matrix:
        if not layer.weight.is_contiguous():
            raise ValueError("a weight that is not contiguous")
        return Matrix(layer.weight, None if layer.scale is None else self._float(layer.scale))

    def _float(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in float32, contiguous, which is kept."""
        if tensor not in self.kept:
            self.kept[tensor] = tensor.detach().float().contiguous()
        return self.kept[tensor]

    def _rows(self, height: int, width: int, matrices: int = 1) -> dict[str, Any]:
        """Rows and blocks of columns that a program of a product with one position takes."""
        blocks = _power(-(-width // 128))
        rows = min(max(_power(-(-height // PROGRAMS)), 1), 8)
        return {"R": rows, "KB": min(blocks, max(TILE // (rows * matrices), 1)), "num_warps": WARPS}

    def _norm(self, norm: RMSNorm, x: torch.Tensor, out: torch.Tensor, n_parts: int = 0) -> None:
        """Adds so many updates to the residual stream, or none to another x, and norms it."""
        size = len(norm.weight)
        shape = self.height, size, x.shape[-1], n_parts, norm.eps
        self._launch(_norm_kernel, (self.n,), x, self.updates, self._float(norm.weight), out, *shape, DP=_power(size))

    def _project(
        self, x: torch.Tensor, norm: RMSNorm | None, out: torch.Tensor, a: Matrix, b: Matrix | None = None,
        add: bool = False,
    ) -> None:  # fmt: skip
        """`_project_kernel` or `_matmul_kernel`; for several positions x is normed, and `add` writes updates."""
        width, heights = a.w.shape[-1], [a.w.shape[-2], 0 if b is None else b.w.shape[-2]]
        second = (None, None) if b is None else b
        if self.n == 1:
            tiles = self._rows(sum(heights), width)
            grid = sum(-(-height // tiles["R"]) for height in heights)
            weight, eps = (None, 0.0) if norm is None else (self._float(norm.weight), norm.eps)
            buffers = x, weight, *a, *second, out
            self._launch(_project_kernel, (grid,), *buffers, *heights, width, _power(width), eps, add, **tiles)
        else:
            tiles = self._tiles(sum(heights), 1)
            grid = sum(-(-height // tiles["BN"]) for height in heights)
            splits = self.n_parts if add else 1
            buffers = x, *a, *second, self.updates if add else out
            self._launch(_matmul_kernel, (grid, splits), *buffers, *heights, width, splits, **tiles)

    def _tiles(self, height: int, splits: int) -> dict[str, Any]:
        """Rows of a matrix and columns that a program of a product with several positions takes."""
        rows = 64 if height * splits >= 64 * PROGRAMS else 32 if height * splits >= 16 * PROGRAMS else 16
        columns = 64 if self.dtype == torch.float32 else 128
        return {"N": self.height, "BN": rows, "BK": columns, "PRECISION": self.precision}

    def _block(self, index: int, block: Block, n_parts: int) -> None:
        """Launches a block; the updates of the one before, so many, are not added yet."""
        attn, first = block.attn, self.x
        if self.n > 1:
            self._norm(block.attn_norm, self.x, first := self.normed, n_parts)
        wq = attn.wq_a if attn.q_lora_rank else attn.wq
        self._project(first, block.attn_norm, self.a, self._matrix(wq), self._matrix(attn.wkv_a))
        if attn.q_lora_rank:
            if self.n > 1:
                self._norm(attn.q_norm, self.a, self.q_normed)
            x = self.a if self.n == 1 else self.q_normed
            self._project(x, attn.q_norm, self.queries, self._matrix(attn.wq_b))
            if self.chooser is not None:
                self._index(index, block, first, x)
        self._attend(index, block)
        self._project(self.values, None, self.x, self._matrix(attn.wo), add=True)
        if self.n > 1:
            self._norm(block.ffn_norm, self.x, self.normed, self.n_parts)
            self._experts(block)
        else:
            self._experts_of_one(block)

    def _index(self, index: int, block: Block, x: torch.Tensor, latent: torch.Tensor) -> None:
        """Launches the indexer of a block, whose input is x, with the latent of the queries, and its choice."""
        indexer, chooser, layers = block.attn.indexer, self.chooser, self.args.n_layers + self.args.n_mtp_layers
        self._project(latent, block.attn.q_norm, chooser.q, self._matrix(indexer.wq_b))
        matrices = self._matrix(indexer.wk), self._matrix(indexer.weights_proj)
        self._project(x, block.attn_norm, chooser.keys, *matrices)
        norm, types = indexer.k_norm, (TYPES[self.dtype], TYPES[self.cache_dtype])
        weights = self._float(norm.weight), self._float(norm.bias)
        chooser.launch(self, weights, norm.eps, layers + index, types)

    def _attend(self, index: int, block: Block) -> None:
        args, attn = self.args, block.attn
        heads, rank, rope, nope = args.n_heads, args.kv_lora_rank, args.qk_rope_head_dim, args.qk_nope_head_dim
        n, cp, norm = self.n, _power(rank), self._float(attn.kv_norm.weight)
        wkv_b, where = self._matrix(attn.wkv_b), (self.positions, self.rows, self.caches, self.capacity)
        rows = _power(max(nope, 1))
        columns, scale = min(cp, max(8192 // rows, 16), 128), attn.softmax_scale * math.log2(math.e)
        self._launch(
            _queries_kernel, (heads + 1, n, cp // columns), self.a, self.queries, *wkv_b, norm, self.cos, self.sin,
            *where, self.q, index, TYPES[self.cache_dtype], self.queries.shape[-1], self.a.shape[-1], heads, nope,
            rope, args.v_head_dim, rank, args.max_seq_len, scale, LATENT_NORM_EPS, NP=rows, HALF=_power(rope // 2),
            CP=cp, BC=columns,
        )  # fmt: skip
        chooser, topk = self.chooser, args.index_topk
        places, chosen = (self.positions, None) if chooser is None else (chooser.places, chooser.rows)
        self._launch(
            _attend_kernel, (self.splits, n, -(-heads // 16)), self.q, places, *where[1:], self.parts, self.sums, index,
            chosen, TYPES[self.dtype], TYPES[self.cache_dtype], heads, rank, rope, self.splits, CP=max(cp, 16),
            RP=_power(rope, 16), BT=SPAN, PRECISION=self.precision, CHOSEN=topk,
        )  # fmt: skip
        blocks = _power(-(-rank // 128))
        rows = min(max((32 if n == 1 else 128) // blocks, 4), _power(args.v_head_dim))
        self._launch(
            _values_kernel, (heads, n, -(-args.v_head_dim // rows)), self.parts, self.sums, places, self.rows,
            self.capacity, *wkv_b, self.values, heads, nope, args.v_head_dim, rank, self.splits, SPAN,
            KB=blocks, SPLITS_P=_power(self.splits), BS=min(_power(self.splits), max(32 // blocks, 1)), BV=rows,
        )  # fmt: skip

    def _router(self, moe: MoE) -> tuple[dict[str, Any], torch.Tensor | None]:
        """Constants of the router, and its bias."""
        args, groups = self.args, self.args.n_expert_groups
        constants: dict[str, Any] = {"E": args.n_routed_experts, "GROUPS": groups, "LIMITED": args.n_limited_groups}
        constants |= {"TOPK": args.n_activated_experts, "SOFTMAX": args.score_func == "softmax"}
        constants |= {"EP": _power(args.n_routed_experts // groups), "GP": _power(groups)}
        constants["ROUTE_SCALE"] = args.route_scale
        return constants, None if moe.gate.bias is None else self._float(moe.gate.bias)

    def _stacks(self, block: Block) -> tuple[MoE | None, list[Any], list[Any], int, int]:
        """w1, w3 and w2 of the experts, then of the shared ones or the dense MLP, with both hidden widths."""
        ffn, none = block.ffn, [Matrix(self.logits)] * 3  # of which no program reads anything
        if not isinstance(ffn, MoE):
            return None, none, self._matrices(cast(MLP, ffn)), 0, self.args.inter_dim
        shared = none if ffn.shared_experts is None else self._matrices(ffn.shared_experts)
        return ffn, self._matrices(ffn.experts), shared, self.args.moe_inter_dim, self.shared

    def _matrices(self, mlp: MLP) -> list[Matrix]:
        return [self._matrix(layer) for layer in (mlp.w1, mlp.w3, mlp.w2)]

    def _experts_of_one(self, block: Block) -> None:
        """The feed-forward layer for one position, with its norm and the residual sum."""
        args, (moe, routed, other, width, other_width) = self.args, self._stacks(block)
        norm = self.x, self._float(block.ffn_norm.weight)
        shape: dict[str, Any] = {"K": args.dim, "KP": _power(args.dim), "EPS": block.ffn_norm.eps}
        shape["ACT"] = args.hidden_act
        n_chosen, n_experts = (args.n_activated_experts, args.n_routed_experts) if moe else (0, 0)
        gate, h = self.logits if moe is None else moe.gate.weight, self.h[0]
        tiles = self._rows(max(other_width, 1), args.dim, 2)
        grid: tuple[int, ...] = (-(-n_experts // tiles["R"]) + -(-other_width // tiles["R"]),)
        buffers: tuple[Any, ...] = *norm, gate, self.router_logits, *other[0], *other[1], h[n_chosen * width :]
        self._launch(_gate_up_one_kernel, grid, *buffers, E=n_experts, INTER=other_width, **shape, **tiles)
        if moe is not None:
            constants, bias = self._router(moe)
            tiles = self._rows(n_chosen * width, args.dim, 2)
            buffers = *norm, self.router_logits, bias, *routed[0], *routed[1], h, self.experts, self.weights
            grid = -(-width // tiles["R"]), n_chosen
            self._launch(_experts_up_one_kernel, grid, *buffers, INTER=width, **constants, **shape, **tiles)
        tiles = self._rows(args.dim, max(width, other_width))
        buffers = h, self.experts, self.weights, *routed[2], *other[2], self.x
        shape = {"D": args.dim, "INTER": width, "TOPK": n_chosen, "SHARED": other_width}
        self._launch(_down_one_kernel, (-(-args.dim // tiles["R"]),), *buffers, **shape, **tiles)

    def _experts(self, block: Block) -> None:
        """The feed-forward layer for several positions; its updates are to be added."""
        args, (moe, routed, other, width, other_width) = self.args, self._stacks(block)
        n_experts = 0
        if moe is not None:
            n_experts, (constants, bias) = args.n_routed_experts, self._router(moe)
            buffers = self.normed, moe.gate.weight, bias, self.rows, self.shares
            columns = max(4096 // (constants["GP"] * constants["EP"]), 16)
            self._launch(_route_kernel, (self.n,), *buffers, **constants, K=args.dim, BK=columns)
        tiles = self._tiles(n_experts * width + other_width, 1)
        grid = n_experts * -(-width // tiles["BN"]) + -(-other_width // tiles["BN"])
        weights = *routed[0], *routed[1], *other[0], *other[1]
        shape = {"E": n_experts, "INTER": width, "SHARED": other_width}
        self._launch(
            _gate_up_kernel, (grid,), self.normed, self.shares, *weights, self.h, K=args.dim, ACT=args.hidden_act,
            **shape, **tiles,
        )  # fmt: skip
        tiles, buffers = self._tiles(args.dim, self.n_parts), (self.h, self.shares, *routed[2], *other[2], self.updates)
        grid = -(-args.dim // tiles["BN"]), self.n_parts
        self._launch(_down_kernel, grid, *buffers, D=args.dim, SPLITS=self.n_parts, **shape, **tiles)

    def _end(self, norm: RMSNorm) -> None:
        """The last norm, whose output the head and MTP modules read, and the head."""
        self._norm(norm, self.x, self.states, self.n_parts if self.n > 1 else 0)
        self._project(self.states, None, self.logits, self._matrix(self.model.head))
