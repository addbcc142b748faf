"""The kernels that decode on a CUDA GPU, in Triton: a step of up to 64 positions through all layers, by latents.

A step for one position reads each active weight once and computes little, so two things cost time: bytes, and the start
of kernels, each of which waits for the one before. There are 7 to 9 kernels a layer, and 5 more where an indexer
chooses positions (`kernel_sparse.Chooser`); `kernel_products` has those that read most of the weights:

    attn_norm, wq_a and wkv_a → q_norm and wq_b → W_k, kv_norm, rotary angles and KV cache → attention, divided over
    positions → its combination and W_v → wo → ffn_norm and router → the choice of experts, w1 and w3 of the experts
    and the shared ones (or of the dense MLP) → w2 of all

For more positions, one more kernel norms each row. For one position, on Hopper GPUs, kernels start while the one before
runs, and load their first weights before they wait for its end: "programmatic dependent launch", PDL.

Nothing in a launch depends on data: positions, rows and addresses of KV caches are read on the device, so that a whole
step with the choice of the byte is one CUDA graph. The residual stream and all sums are in float32.

In shapes: N positions of the step (each of its own row, or several of one), H heads, C `kv_lora_rank`,
R `qk_rope_head_dim`, E experts, K columns of a matrix.
"""

import math
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from triton.language import constexpr

import kernel_sparse
from kernel import compiling_ahead
from kernel_products import (
    BLOCK,
    block_columns,
    down_kernel,
    down_one_kernel,
    gate_up_kernel,
    gate_up_one_kernel,
    inverse_rms,
    matmul_kernel,
    project_kernel,
    route_kernel,
    sum_columns,
    wait_for_kernels,
)
from model import LATENT_NORM_EPS, MLP, Block, KVCache, Linear, MoE, MTPModule, RMSNorm, Transformer

# bytes that a program sorts, experts that it compares in pairs, positions whose rotary angles are kept
MAX_VOCAB, MAX_EXPERTS, MAX_CONTEXT = 1024, 512, 1 << 20
SPAN = 32  # positions that attention reads at a time
MAX_STEPS = 32  # of a block
POSITIONS = (1, 4, 16, 64)  # numbers of positions that there are steps for
PROGRAMS, TILE, WARPS = 528, 64, 4  # of a product with one position, the tile in blocks of 128 numbers
COLUMNS = 64  # that a program multiplies at a time with several positions
ROUTED = 16384  # numbers of the router's weights that it does
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# --- Attention by latents, for any number of positions --------------------------------------------------------------


@triton.jit
def _rotated(x_ptr, i, cos_ptr, sin_ptr, position, R: constexpr, CONTEXT: constexpr):
    """`apply_rotary_emb`: pairs i of some x (R,) rotated by the angles of a position (past the context: discarded)."""
    inside = i < R // 2
    at = tl.minimum(position, CONTEXT - 1) * (R // 2) + i
    cos, sin = tl.load(cos_ptr + at, mask=inside, other=0.0), tl.load(sin_ptr + at, mask=inside, other=0.0)
    even, odd = tl.load(x_ptr + 2 * i, mask=inside, other=0.0), tl.load(x_ptr + 2 * i + 1, mask=inside, other=0.0)
    return even * cos - odd * sin, odd * cos + even * sin


@triton.jit
def _latent_queries(
    q_ptr, wkv_b_ptr, skv_ptr, out_ptr, h, part, TYPE: constexpr, Q_STRIDE: constexpr, H: constexpr, NOPE: constexpr,
    R: constexpr, V: constexpr, C: constexpr, SCALE: constexpr, N: constexpr, NP: constexpr, BC: constexpr,
    PRECISION: constexpr, PDL: constexpr,
):  # fmt: skip
    """BC numbers, of one block, of SCALE · W_kᵀ q for head h at each position."""
    d, c = tl.arange(0, NP), part * BC + tl.arange(0, BC)
    rows, mask = h * (NOPE + V) + d, (d < NOPE)[:, None] & (c < C)[None, :]
    key = tl.load(wkv_b_ptr + rows[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if skv_ptr is not None:
        at = rows // BLOCK * ((C + BLOCK - 1) // BLOCK) + part * BC // BLOCK
        key *= tl.load(skv_ptr + at, mask=d < NOPE, other=0.0)[:, None]
    q_ptr += h * (NOPE + R)
    wait_for_kernels(PDL)
    if N == 1:
        q = tl.load(q_ptr + d, mask=d < NOPE, other=0.0)
        tl.store(out_ptr + h * (C + R) + c, tl.sum(q[:, None] * key, axis=0) * SCALE, mask=c < C)
    else:
        n = tl.arange(0, N)[:, None]
        q = tl.load(q_ptr + n * Q_STRIDE + d[None, :], mask=(d < NOPE)[None, :], other=0.0)
        y = tl.dot(q.to(TYPE), key.to(TYPE), input_precision=PRECISION) * SCALE
        tl.store(out_ptr + (n * H + h) * (C + R) + c[None, :], y, mask=(c < C)[None, :])


@triton.jit(do_not_specialize=["layer"])
def _queries_kernel(
    a_ptr, q_ptr, wkv_b_ptr, skv_ptr, kv_norm_ptr, cos_ptr, sin_ptr, positions_ptr, rows_ptr, caches_ptr, capacity_ptr,
    out_ptr, layer, TYPE: constexpr, CACHE: constexpr, Q_STRIDE: constexpr, A_STRIDE: constexpr, H: constexpr,
    NOPE: constexpr, R: constexpr, V: constexpr, C: constexpr, CONTEXT: constexpr, SCALE: constexpr, EPS: constexpr,
    N: constexpr, NP: constexpr, HALF: constexpr, HP: constexpr, CP: constexpr, BC: constexpr, PRECISION: constexpr,
    PDL: constexpr,
):  # fmt: skip
    """The rotary queries of `MLA._queries`, W_kᵀ q of `_attend_absorbed`, kv_norm, the rotary key, `KVCache.update`.

    Reads q (N, H·(NOPE + R)), and the output of wkv_a, the last C + R columns of a (N, A_STRIDE). Each of the first
    programs writes BC of the C numbers that queries of one head have in the latent space, times SCALE; those after
    them, of one position each, the R rotated ones behind these, (N, H, C + R), and the latent and the rotary key to the
    KV cache. Reads W_k once. Bound by latency.
    """
    program, half = tl.program_id(0), tl.arange(0, HALF)
    PARTS: constexpr = (C + BC - 1) // BC
    if program < H * PARTS:
        _latent_queries(
            q_ptr, wkv_b_ptr, skv_ptr, out_ptr, program // PARTS, program % PARTS, TYPE, Q_STRIDE, H, NOPE, R, V, C,
            SCALE, N, NP, BC, PRECISION, PDL,
        )  # fmt: skip
    else:
        n, i, is_pair = program - H * PARTS, tl.arange(0, CP), half < R // 2
        g = tl.load(kv_norm_ptr + i, mask=i < C, other=0.0)
        wait_for_kernels(PDL)
        row, capacity, position = tl.load(rows_ptr + n), tl.load(capacity_ptr), tl.load(positions_ptr + n).to(tl.int32)
        h = tl.minimum(tl.arange(0, HP), H - 1)[:, None]
        head_ptr = q_ptr + n * Q_STRIDE + h * (NOPE + R) + NOPE
        even, odd = _rotated(head_ptr, half[None, :], cos_ptr, sin_ptr, position, R, CONTEXT)
        to_ptr = out_ptr + (n * H + h) * (C + R) + C + half[None, :]
        tl.store(to_ptr, even * SCALE, mask=is_pair[None, :])
        tl.store(to_ptr + R // 2, odd * SCALE, mask=is_pair[None, :])
        cache_ptr = tl.load(caches_ptr + layer).to(tl.pointer_type(CACHE)) + (row * capacity + position) * (C + R)
        a_ptr += n * A_STRIDE + A_STRIDE - C - R
        if (row >= 0) & (position < capacity):
            latent = tl.load(a_ptr + i, mask=i < C, other=0.0) * g * inverse_rms(a_ptr, C, CP, EPS)
            tl.store(cache_ptr + i, latent.to(CACHE), mask=i < C)
            key_even, key_odd = _rotated(a_ptr + C, half, cos_ptr, sin_ptr, position, R, CONTEXT)
            tl.store(cache_ptr + C + half, key_even.to(CACHE), mask=is_pair)
            tl.store(cache_ptr + C + R // 2 + half, key_odd.to(CACHE), mask=is_pair)


@triton.jit
def _length(positions_ptr, rows_ptr, capacity_ptr, n):
    """How many positions of the KV cache position n of the step attends to: none where it is no row's."""
    end = tl.minimum(tl.load(positions_ptr + n) + 1, tl.load(capacity_ptr)).to(tl.int32)
    return tl.where(tl.load(rows_ptr + n) >= 0, end, 0)


@triton.jit(do_not_specialize=["layer"])
def _attend_kernel(
    q_ptr, positions_ptr, rows_ptr, caches_ptr, capacity_ptr, out_ptr, sums_ptr, layer, chosen_ptr, TYPE: constexpr,
    CACHE: constexpr, H: constexpr, C: constexpr, R: constexpr, SPLITS: constexpr, CP: constexpr, RP: constexpr,
    BT: constexpr, PRECISION: constexpr, CHOSEN: constexpr, PDL: constexpr,
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
    wait_for_kernels(PDL)
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
    else:
        at = (n * H + h) * SPLITS + split
        tl.store(sums_ptr + at, tl.full((16,), float("-inf"), tl.float32), mask=is_head)


@triton.jit
def _values_few_kernel(
    parts_ptr, sums_ptr, wkv_b_ptr, skv_ptr, out_ptr, H: constexpr, NOPE: constexpr, V: constexpr, C: constexpr,
    SPLITS: constexpr, KB: constexpr, SPLITS_P: constexpr, BS: constexpr, BV: constexpr, PDL: constexpr,
):  # fmt: skip
    """Combines the parts of `_attend_kernel`, and the product with W_v of `MLA._attend_absorbed`, for few positions.

    Program (h, n, i) computes BV numbers of the output (N, H, V) of head h at position n. Reads the parts in use, and
    BV rows of the head's W_v (V, C), for each position, mostly from L2: bound by latency.
    """
    h, n, v = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV + tl.arange(0, BV)
    rows, inside, c = h * (NOPE + V) + NOPE + v, v < V, block_columns(0, KB)[None, :, :]
    w_v = tl.load(wkv_b_ptr + rows[:, None, None] * C + c, mask=inside[:, None, None] & (c < C), other=0.0)
    w_v = w_v.to(tl.float32)
    if skv_ptr is not None:
        BLOCKS: constexpr = (C + BLOCK - 1) // BLOCK
        b = tl.arange(0, KB)[None, :]
        at, mask = (rows // BLOCK * BLOCKS)[:, None] + b, inside[:, None] & (b < BLOCKS)
        w_v *= tl.load(skv_ptr + at, mask=mask, other=0.0)[:, :, None]
    s, first = tl.arange(0, SPLITS_P), (n * H + h) * SPLITS
    wait_for_kernels(PDL)
    sums = tl.load(sums_ptr + first + s, mask=s < SPLITS, other=float("-inf"))
    best, n_parts = tl.max(sums, axis=0), tl.sum((sums != float("-inf")).to(tl.int32))
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
    y = sum_columns(w_v * latent[None, :, :])
    tl.store(out_ptr + (n * H + h) * V + v, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _values_kernel(
    parts_ptr, sums_ptr, wkv_b_ptr, skv_ptr, out_ptr, TYPE: constexpr, H: constexpr, NOPE: constexpr, V: constexpr,
    C: constexpr, SPLITS: constexpr, BM: constexpr, BV: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """`_values_few_kernel` for a multiple of BM positions, by tensor cores.

    Program (h, i, j) computes BV numbers of the output (N, H, V) of head h, at BM positions. Reads their parts in use,
    and BV rows of the head's W_v (V, C). Bound by latency.
    """
    h, n, v = tl.program_id(0), tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(2) * BV + tl.arange(0, BV)
    rows, first = h * (NOPE + V) + NOPE + v, (n * H + h) * SPLITS
    best = tl.load(sums_ptr + first)  # no parts: the output is 0
    is_row = best != float("-inf")
    best = tl.where(is_row, best, 0.0)
    for split in tl.static_range(1, SPLITS):
        best = tl.maximum(best, tl.load(sums_ptr + first + split))
    total, acc = tl.where(is_row, 0.0, 1.0), tl.zeros((BM, BV), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.exp2(tl.load(sums_ptr + first + split) - best)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        latent = tl.zeros((BM, BLOCK), tl.float32)
        for split in tl.static_range(SPLITS):
            power = tl.load(sums_ptr + first + split)
            mask = (power != float("-inf"))[:, None] & (c < C)[None, :]
            part = tl.load(parts_ptr + (first + split)[:, None] * C + c[None, :], mask=mask, other=0.0)
            latent += part * (tl.exp2(power - best) / total)[:, None]
        mask = (v < V)[None, :] & (c < C)[:, None]
        w = tl.load(wkv_b_ptr + rows[None, :] * C + c[:, None], mask=mask, other=0.0).to(TYPE)
        y = tl.dot(latent.to(TYPE), w, input_precision=PRECISION)
        if skv_ptr is not None:
            at = rows // BLOCK * ((C + BLOCK - 1) // BLOCK) + start // BLOCK
            y *= tl.load(skv_ptr + at, mask=v < V, other=0.0)[None, :]
        acc += y
    at = (n * H + h)[:, None] * V + v[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(v < V)[None, :])


# --- The ends of a step ---------------------------------------------------------------------------------------------


@triton.jit
def _norm_kernel(
    x_ptr, parts_ptr, g_ptr, out_ptr, N: constexpr, D: constexpr, STRIDE: constexpr, PARTS: constexpr, EPS: constexpr,
    DP: constexpr, PDL: constexpr,
):  # fmt: skip
    """`RMSNorm.add`: adds the parts of an update (PARTS, N, D) to the residual stream x, and norms it.

    Program n takes a row of D numbers; rows of x are STRIDE apart. Reads each part once, writes x and its norm (N, D),
    in the dtype of that. Bound by memory.
    """
    n, d = tl.program_id(0), tl.arange(0, DP)
    g = tl.load(g_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    wait_for_kernels(PDL)
    x = tl.load(x_ptr + n * STRIDE + d, mask=d < D, other=0.0)
    for i in tl.static_range(PARTS):
        x += tl.load(parts_ptr + (i * N + n) * D + d, mask=d < D, other=0.0)
    y = x * tl.rsqrt(tl.sum(x * x) / D + EPS) * g
    tl.store(out_ptr + n * D + d, y.to(out_ptr.dtype.element_ty), mask=d < D)
    if PARTS > 0:  # after the sum, for which all threads have read x: several read the same numbers of a short row
        tl.store(x_ptr + n * STRIDE + d, x, mask=d < D)


@triton.jit
def _embed_kernel(tokens_ptr, w_ptr, x_ptr, D: constexpr, DP: constexpr, PDL: constexpr):
    """`Transformer.embed`: program n copies the embedding (D,) of a token to the residual stream, in float32."""
    n, d = tl.program_id(0), tl.arange(0, DP)
    wait_for_kernels(PDL)
    token = tl.load(tokens_ptr + n)
    row = tl.load(w_ptr + token * D + d, mask=d < D, other=0.0)
    tl.store(x_ptr + n * D + d, row.to(tl.float32), mask=d < D)


@triton.jit
def _choose_kernel(
    logits_ptr, sampling_ptr, uniforms_ptr, counts_ptr, chosen_ptr, tokens_ptr, positions_ptr, N: constexpr,
    V: constexpr, VP: constexpr, PDL: constexpr,
):  # fmt: skip
    """`distribution`, `_truncate` and `draw` of generate.py, for a byte of each row, which the next step reads.

    Program n takes row n of the logits, float32 (N, V). `sampling` has temperature, top-k and top-p, float64. Number
    counts[n] of the row's uniform numbers (steps, N) is used; the byte, or -1 if the model's output is not a number,
    goes to the same place of `chosen`, and to `tokens`; the position advances. Computes in float64, bound by latency.
    """
    n, v = tl.program_id(0), tl.arange(0, VP)
    wait_for_kernels(PDL)
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
        self.is_hopper = self.on_gpu and torch.cuda.get_device_capability(device) >= (9, 0)
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
        own_or_float = floats if n == 1 else own
        # parts of the sums over columns of wo, and of w2, so many that programs fill a GPU
        self.n_parts = 4, min(_power(PROGRAMS // 2 // -(-args.dim // 64) + 1, 4), 16)
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
        self.x, self.normed, self.updates = floats(n, args.dim), own(n, args.dim), floats(16, n, args.dim)
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
            self._block(i, layer, 0 if i == 0 else self.n_parts[1])
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
        if "PDL" in kernel.arg_names:
            constants["PDL"] = self.is_hopper and self.n == 1  # what several positions take is longer than a start
            constants |= {"launch_pdl": True} if constants["PDL"] else {}
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
        """Rows that a program of a product with one position takes, in all and at a time, and blocks of columns."""
        rows, blocks = min(_power(-(-height // PROGRAMS)), 16), _power(-(-width // 128))
        some = min(max(TILE // (blocks * matrices), 1), rows)
        return {"ROWS": rows, "R": some, "KB": blocks, "num_warps": WARPS if blocks <= 16 else 2 * WARPS}

    def _norm(self, norm: RMSNorm, x: torch.Tensor, out: torch.Tensor, n_parts: int = 0) -> None:
        """Adds so many updates to the residual stream, or none to another x, and norms it."""
        buffers, size = (x, self.updates, self._float(norm.weight), out), len(norm.weight)
        shape = self.height, size, x.shape[-1], n_parts, norm.eps
        self._launch(_norm_kernel, (self.n,), *buffers, *shape, DP=_power(size), num_warps=8)

    def _project(
        self, x: torch.Tensor, norm: RMSNorm | None, out: torch.Tensor, a: Matrix, b: Matrix | None = None,
        add: bool = False,
    ) -> None:  # fmt: skip
        """`project_kernel` or `matmul_kernel`; for several positions x is normed, and `add` writes updates."""
        width, heights = a.w.shape[-1], [a.w.shape[-2], 0 if b is None else b.w.shape[-2]]
        second = (None, None) if b is None else b
        if self.n == 1:
            tiles = self._rows(sum(heights), width)
            grid = sum(-(-height // tiles["ROWS"]) for height in heights)
            weight, eps = (None, 0.0) if norm is None else (self._float(norm.weight), norm.eps)
            buffers = x, weight, *a, *second, out
            self._launch(project_kernel, (grid,), *buffers, *heights, width, eps, add, **tiles)
        else:
            splits = self.n_parts[0] if add else 1
            tiles = self._tiles(sum(heights), splits)
            grid = sum(-(-height // tiles["BN"]) for height in heights)
            buffers = x, *a, *second, self.updates if add else out
            stages = 4 if self.is_hopper else 3
            shape = *heights, width, splits
            self._launch(matmul_kernel, (grid, splits), *buffers, *shape, **tiles, num_stages=stages)

    def _tiles(self, height: int, splits: int, matrices: int = 1) -> dict[str, Any]:
        """Rows of a matrix and columns that a program of a product with several positions takes."""
        most = 32 if self.dtype == torch.float32 else 64  # which some GPUs have shared memory for
        rows = next((rows for rows in (64, 32) if rows <= most and height * splits * 5 >= rows * PROGRAMS), 16)
        tiles = {"N": self.height, "BN": rows, "BK": COLUMNS, "PRECISION": self.precision}
        return tiles | {"num_warps": 8 if rows * matrices > 64 else 4}

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
            self._norm(block.ffn_norm, self.x, self.normed, self.n_parts[0])
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
        n, cp, norm = self.n, _power(rank, 16), self._float(attn.kv_norm.weight)
        wkv_b, where = self._matrix(attn.wkv_b), (self.positions, self.rows, self.caches, self.capacity)
        rows = _power(nope, 16)
        columns, scale = min(cp, max(8192 // rows, 16), 128), attn.softmax_scale * math.log2(math.e)
        self._launch(
            _queries_kernel, (heads * -(-rank // columns) + n,), self.a, self.queries, *wkv_b, norm, self.cos, self.sin,
            *where, self.q, index, TYPES[self.dtype], TYPES[self.cache_dtype], self.queries.shape[-1], self.a.shape[-1],
            heads, nope, rope, args.v_head_dim, rank, args.max_seq_len, scale, LATENT_NORM_EPS, N=self.height, NP=rows,
            HALF=_power(rope // 2), HP=_power(heads), CP=cp, BC=columns, PRECISION=self.precision,
        )  # fmt: skip
        chooser, topk = self.chooser, args.index_topk
        places, chosen = (self.positions, None) if chooser is None else (chooser.places, chooser.rows)
        self._launch(
            _attend_kernel, (self.splits, n, -(-heads // 16)), self.q, places, *where[1:], self.parts, self.sums, index,
            chosen, TYPES[self.dtype], TYPES[self.cache_dtype], heads, rank, rope, self.splits, CP=cp,
            RP=_power(rope, 16), BT=SPAN, PRECISION=self.precision, CHOSEN=topk,
        )  # fmt: skip
        parts = self.parts, self.sums, *wkv_b, self.values
        shape: dict[str, Any] = {"H": heads, "NOPE": nope, "V": args.v_head_dim, "C": rank, "SPLITS": self.splits}
        if n < 16:
            blocks, splits = _power(-(-rank // 128)), _power(self.splits)
            rows = min(max((32 if n == 1 else 128) // blocks, 4), _power(args.v_head_dim))
            shape |= {"KB": blocks, "SPLITS_P": splits, "BS": min(splits, max(32 // blocks, 1))}
            self._launch(_values_few_kernel, (heads, n, -(-args.v_head_dim // rows)), *parts, **shape, BV=rows)
        else:
            rows = 64 if args.v_head_dim > 32 else 32
            shape |= {"TYPE": TYPES[self.dtype], "PRECISION": self.precision, "BM": 16, "BV": rows}
            grid = heads, n // 16, -(-args.v_head_dim // rows)
            self._launch(_values_kernel, grid, *parts, **shape, num_stages=2)

    def _router(self, moe: MoE | None) -> tuple[dict[str, Any], torch.Tensor | None]:
        """Constants of the router, and its bias."""
        args = self.args
        experts, groups = (args.n_routed_experts, args.n_expert_groups) if moe else (0, 1)
        constants: dict[str, Any] = {"E": experts, "GROUPS": groups, "LIMITED": args.n_limited_groups}
        constants |= {"TOPK": args.n_activated_experts if moe else 0, "SOFTMAX": args.score_func == "softmax"}
        constants |= {"EP": _power(experts // groups), "GP": _power(groups), "ROUTE_SCALE": args.route_scale}
        return constants, None if moe is None or moe.gate.bias is None else self._float(moe.gate.bias)

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
        if moe is not None:
            self._project(self.x, block.ffn_norm, self.router_logits, Matrix(moe.gate.weight))
        constants, bias = self._router(moe)
        n_chosen = constants["TOPK"]
        shape: dict[str, Any] = {"D": args.dim, "INTER": width, "TOPK": n_chosen, "SHARED": other_width}
        tiles = self._rows(n_chosen * width + other_width, args.dim, 2)
        grid = -(-other_width // tiles["ROWS"]) + n_chosen * -(-width // tiles["ROWS"])
        self._launch(
            gate_up_one_kernel, (grid,), self.x, self._float(block.ffn_norm.weight), self.router_logits, bias,
            *routed[0], *routed[1], *other[0], *other[1], self.h, self.experts, self.weights, INTER=width,
            SHARED=other_width, K=args.dim, EPS=block.ffn_norm.eps, ACT=args.hidden_act,
            **constants, **tiles,
        )  # fmt: skip
        rows = min(_power(-(-args.dim // PROGRAMS)), 8)
        blocks = min(_power(-(-max(width, other_width) // 128)), TILE // 2 // rows)
        buffers = self.h, self.experts, self.weights, *routed[2], *other[2], self.x
        self._launch(down_one_kernel, (-(-args.dim // rows),), *buffers, **shape, R=rows, KB=blocks)

    def _experts(self, block: Block) -> None:
        """The feed-forward layer for several positions; its updates are to be added."""
        args, (moe, routed, other, width, other_width) = self.args, self._stacks(block)
        constants, bias = self._router(moe)
        n_experts = constants["E"]
        if moe is not None:
            buffers = self.normed, moe.gate.weight, bias, self.rows, self.shares
            columns = min(max(ROUTED // (constants["GP"] * constants["EP"]), 16), _power(args.dim))
            self._launch(route_kernel, (self.n,), *buffers, **constants, K=args.dim, BK=columns, num_warps=8)
        tiles = self._tiles(n_experts * width + other_width, 1, 2)
        grid = n_experts * -(-width // tiles["BN"]) + -(-other_width // tiles["BN"])
        weights = *routed[0], *routed[1], *other[0], *other[1]
        shape = {"E": n_experts, "INTER": width, "SHARED": other_width}
        self._launch(
            gate_up_kernel, (grid,), self.normed, self.shares, *weights, self.h, K=args.dim, ACT=args.hidden_act,
            **shape, **tiles,
        )  # fmt: skip
        splits = self.n_parts[1]
        tiles, buffers = self._tiles(args.dim, splits), (self.h, self.shares, *routed[2], *other[2], self.updates)
        grid = -(-args.dim // tiles["BN"]), splits
        self._launch(down_kernel, grid, *buffers, D=args.dim, SPLITS=splits, **shape, **tiles)

    def _end(self, norm: RMSNorm) -> None:
        """The last norm, whose output the head and MTP modules read, and the head."""
        self._norm(norm, self.x, self.states, self.n_parts[1] if self.n > 1 else 0)
        self._project(self.states, None, self.logits, self._matrix(self.model.head))


@torch.no_grad()
def compile_ahead(model: Transformer) -> None:
    """Compiles the kernels of all steps of a model on a GPU, in parallel."""
    with compiling_ahead(model.head.weight.device):
        for step in [Step(model, n) for n in POSITIONS]:
            step.run()
            for depth in range(len(model.mtp)):
                step.run_mtp(depth)
