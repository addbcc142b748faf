"""Kernels of sparse attention for CUDA GPUs, in Triton: the indexer's choice, attention to what it chose, its loss.

As operations of torch, each query's `index_topk` latents would be gathered into memory, K·(C + R) numbers of it for a
query, and read again for each product. Here a program takes one query with all its heads, which read the same latents:
it gathers them in tiles, from the L2 cache as a sequence's latents are small, and keeps what it computes in registers.
The backward pass does the same once more, and adds the gradients of latents in float32 where they are in memory, in no
fixed order. So the work for a query is that of K positions, whatever the context is; only the indexer reads all.

The indexer's scores of some queries at a time are in memory, SCORES numbers at most. A program reads the row of a query
into registers and finds its best K by halving: it counts the scores above a bound, which needs no sorting.

While an indexer learns from dense attention, tiles of scores and probabilities take the place of chosen positions. And
`kernel_decode` has its positions chosen here.

Results are those of `model.MLA._attend_to_chosen` and `_index_loss` up to rounding. Nothing waits for the device. In
shapes: B sequences, S queries and T positions of each, H heads, h heads of the indexer of width d, C `kv_lora_rank`,
R `qk_rope_head_dim`, K positions chosen for a query, of which those after the query itself are not attended to.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

SCORES = 1 << 24  # numbers of the indexer's scores in memory at a time
MAX_WIDTH = 1 << 15  # of a row of scores that fits the registers of a program; for wider ones, torch chooses
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-(2**31))
PRIME = tl.constexpr(1299709)  # a step from one program's query to the next one's: see `_spread`


# --- The indexer's choice ---------------------------------------------------------------------------------------------


@triton.jit
def _scores_kernel(
    q_ptr, k_ptr, w_ptr, seen_ptr, out_ptr, first, n_rows, S, end, k_stride, seen_stride, width,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out = sum_h w_h relu(q_h·k) for `n_rows` queries from `first` on and `end` keys of a sequence.

    A program computes a tile of ROWS×COLS, or nothing where no query sees a key. The keys stay in registers, the
    queries of each head are read: 2·h·d operations a score, bound by the tensor cores and the 3 instructions that relu,
    weight and sum of a product take. Of bfloat16 factors the products are exact, as those of torch in float32.
    """
    m = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t, d = tl.program_id(1) * COLS + tl.arange(0, COLS), tl.arange(0, DP)
    b = tl.program_id(2).to(tl.int64)
    inside = m < first + n_rows
    last = tl.load(seen_ptr + b * seen_stride + m, mask=inside, other=-1)
    if tl.max(last) >= tl.program_id(1) * COLS:
        row = b * S + m
        k = tl.load(k_ptr + b * k_stride + t[None, :] * D + d[:, None], mask=(t < end)[None, :] & (d < D)[:, None])
        k = tl.where((t < end)[None, :] & (d < D)[:, None], k, 0.0).to(q_ptr.dtype.element_ty)
        scores = tl.zeros([ROWS, COLS], tl.float32)
        for h in range(HEADS):
            at = (row * HEADS + h)[:, None] * D + d[None, :]
            q = tl.load(q_ptr + at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
            w = tl.load(w_ptr + row * HEADS + h, mask=inside, other=0.0)
            scores += w[:, None] * tl.maximum(tl.dot(q, k, input_precision="ieee"), 0.0)
        at = (b * n_rows + m - first)[:, None] * width + t[None, :]
        tl.store(out_ptr + at, scores, mask=inside[:, None] & (t < end)[None, :])


@triton.jit
def _ordered(scores_ptr, t, last):
    """Scores at t, and integers in the same order; the lowest one after `last`, the last that a query sees."""
    x = tl.load(scores_ptr + t, mask=t < (last // 16 + 1) * 16)  # so many that loads are of 16 bytes
    x = tl.where(t <= last, x + t * 1e-30, float("-inf"))  # of several that no head looks for (0), the last ones
    bits = x.to(tl.int32, bitcast=True)
    key = tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST + 1)
    return x, tl.where(t <= last, key, LOWEST)


@triton.jit
def _bound(scores_ptr, last, TOPK: tl.constexpr, BLOCK: tl.constexpr):
    """The highest integer of `_ordered` that at least TOPK are not below, and how many these are."""
    t = tl.arange(0, BLOCK)
    _, key = _ordered(scores_ptr, t, last)
    low, high, count = tl.min(key).to(tl.int64), tl.max(key).to(tl.int64), last + 1
    while (low < high) & (count != TOPK):
        middle = low + (high - low + 1) // 2
        above = tl.sum((key >= middle.to(tl.int32)).to(tl.int32))
        count = tl.where(above >= TOPK, above, count)
        low = tl.where(above >= TOPK, middle, low)
        high = tl.where(above >= TOPK, high, middle - 1)
    return low.to(tl.int32), count


@triton.jit
def _choose_kernel(
    scores_ptr, seen_ptr, rows_ptr, values_ptr, first, n_rows, S, seen_stride, width,
    TOPK: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The positions of the TOPK best scores of a query, ascending, and their scores.

    A program takes one query. It halves the range of the scores, some 20 times, until as many as wanted are above: 2
    instructions a score and time. Then it goes over the row again in tiles; of equal scores at the bound the last ones
    are taken. It reads a row of float32 twice, from caches: bound by the instructions.
    """
    program = tl.program_id(0)
    b, s = (program // n_rows).to(tl.int64), first + program % n_rows
    last = tl.load(seen_ptr + b * seen_stride + s).to(tl.int32)
    scores_ptr += program.to(tl.int64) * width
    rows_ptr += (b * S + s) * TOPK
    values_ptr += (b * S + s) * TOPK
    if last < TOPK:
        for start in range(0, TOPK, TILE):
            t = start + tl.arange(0, TILE)
            tl.store(rows_ptr + t, t, mask=t < TOPK)
            tl.store(values_ptr + t, _ordered(scores_ptr, t, last)[0], mask=t < TOPK)
    else:
        bound, count = _bound(scores_ptr, last, TOPK, BLOCK)
        surplus, before = count - TOPK, count * 0
        for start in range(0, last + 1, TILE):
            t = start + tl.arange(0, TILE)
            x, key = _ordered(scores_ptr, t, last)
            # both are counted in one sum: those above the bound, and those at it in the higher 16 bits
            ones = (key > bound).to(tl.int32) + ((key == bound).to(tl.int32) << 16)
            ranks = tl.cumsum(ones) + before
            equal = (ranks >> 16) & 0xFFFF
            chosen = (key > bound) | ((key == bound) & (equal > surplus))
            to = (ranks & 0xFFFF) + tl.maximum(equal - surplus, 0) - 1
            tl.store(rows_ptr + to, t, mask=chosen)
            tl.store(values_ptr + to, x, mask=chosen)
            before += tl.sum(ones)


def _room(q: torch.Tensor, n_keys: int) -> tuple[torch.Tensor, int]:
    """Memory for the scores of some queries of each sequence, float32 (B·n, `n_keys` or more), and how many n."""
    bsz, width = len(q), triton.cdiv(n_keys, 64) * 64
    size = min(q.shape[1], max(1, SCORES // (bsz * width)))
    return torch.empty(bsz * size, width, dtype=torch.float32, device=q.device), size


def _score(
    q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, seen: torch.Tensor, scores: torch.Tensor, first: int,
    n: int, end: int,
) -> None:  # fmt: skip
    """Fills `scores` of n queries of each sequence, from `first` on, with those of `end` keys: see `choose`."""
    bsz, seqlen, heads, dim = q.shape
    tile = 64 if n > 16 else 16
    _scores_kernel[(triton.cdiv(n, tile), triton.cdiv(end, 64), bsz)](
        q, k, weights, seen, scores, first, n, seqlen, end, k.shape[1] * dim, seqlen if len(seen) > 1 else 0,
        scores.shape[1], HEADS=heads, D=dim, DP=_power(dim), ROWS=tile, COLS=64,
    )  # fmt: skip


def choose(
    q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, n_keys: int, seen: torch.Tensor, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `topk` positions with the best scores for each query, int32 (B, S, K), and their scores, float32.

    Args:
        q: The indexer's queries (B, S, h, d).
        k: Its keys (B, T, d), of which the first `n_keys`, more than `topk`, are filled.
        weights: Of the heads, float32 (B, S, h).
        seen: The last position that a query may attend to, integers (B or 1, S). One that sees fewer than `topk` gets
            all of them, and some after it, with scores of minus infinity.
    """
    q, k, weights, seen = (x.detach().contiguous() for x in (q, k, weights, seen))
    bsz, seqlen = q.shape[:2]
    rows = torch.empty(bsz, seqlen, topk, dtype=torch.int32, device=q.device)
    values = torch.empty(rows.shape, dtype=torch.float32, device=q.device)
    scores, size = _room(q, n_keys)
    seen_stride, width = seqlen if len(seen) > 1 else 0, scores.shape[1]
    for first in range(0, seqlen, size):
        n = min(size, seqlen - first)
        end = max(topk, n_keys - (seqlen - first - n))  # no query of the chunk sees more
        _score(q, k, weights, seen, scores, first, n, end)
        block = triton.next_power_of_2(end)
        if block > MAX_WIDTH:
            part = slice(first, first + n)
            _choose_by_torch(scores, seen[:, part], rows[:, part], values[:, part], end)
            continue
        _choose_kernel[(bsz * n,)](
            scores, seen, rows, values, first, n, seqlen, seen_stride, width, TOPK=topk, **_choice(block)
        )
    return rows, values


def _choice(width: int) -> dict[str, int]:
    """Sizes of a program that chooses in rows of up to `width` scores: few sizes, each of which is another kernel."""
    block = max(triton.next_power_of_2(width), 2048)
    return {"BLOCK": block, "TILE": max(block // 4, 1024), "num_warps": max(4, block // 1024), "maxnreg": 64}


def _choose_by_torch(
    scores: torch.Tensor, seen: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, end: int
) -> None:
    """`_choose_kernel` in rows of any width; `seen`, `rows` and `values` are of the queries with scores alone."""
    bsz, n, topk = rows.shape
    keys = torch.arange(end, device=seen.device)
    x = scores[: bsz * n, :end].unflatten(0, (bsz, n)) + keys * 1e-30
    best = x.masked_fill_(keys > seen.unsqueeze(-1), float("-inf")).topk(topk, sorted=False)
    rows.copy_(best.indices)
    values.copy_(best.values)


# --- Attention to the chosen positions --------------------------------------------------------------------------------


@triton.jit
def _queries(q_ptr, n, head, c, r, H, C: tl.constexpr, R: tl.constexpr):
    """The latent and the rotary numbers of query n: (heads, C), (heads, R)."""
    at, inside = (n * H + head)[:, None] * (C + R), (head < H)[:, None]
    latent = tl.load(q_ptr + at + c[None, :], mask=inside & (c < C)[None, :], other=0.0)
    return latent, tl.load(q_ptr + at + C + r[None, :], mask=inside & (r < R)[None, :], other=0.0)


@triton.jit
def _chosen(rows_ptr, kv_ptr, n, k, last, c, r, TOPK: tl.constexpr, C: tl.constexpr, R: tl.constexpr):
    """Of the positions chosen for query n, those at k: where they are, whether the query sees them, and both keys."""
    row = tl.load(rows_ptr + n * TOPK + k, mask=k < TOPK, other=0)
    visible = (k < TOPK) & (row <= last)
    at = kv_ptr + row[:, None] * (C + R)
    latent = tl.load(at + c[None, :], mask=visible[:, None] & (c < C)[None, :], other=0.0)
    return row, visible, latent, tl.load(at + C + r[None, :], mask=visible[:, None] & (r < R)[None, :], other=0.0)


@triton.jit
def _attend_kernel(
    q_ptr, kv_ptr, rows_ptr, seen_ptr, out_ptr, lse_ptr, p_ptr, S, kv_stride, seen_stride, H,
    C: tl.constexpr, R: tl.constexpr, TOPK: tl.constexpr, PROBABILITIES: tl.constexpr, ADDS: tl.constexpr,
    CP: tl.constexpr, RP: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Softmax attention of a query to its chosen positions: out (N, H, C), and the log₂ of the sum (N, H).

    With PROBABILITIES, a second pass over the same positions sums those of all heads, p (N, K). A program takes HEADS
    heads of a query, and with ADDS there are several, which add to p. A query reads K·(C + R) numbers by single rows,
    from the L2 cache, which bounds it, and does 2·H·K·(2C + R) operations.
    """
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    b, c, r = n // S, tl.arange(0, CP), tl.arange(0, RP)
    last = tl.load(seen_ptr + b * seen_stride + n % S).to(tl.int32)
    q_c, q_r = _queries(q_ptr, n, head, c, r, H, C, R)
    kv_ptr += b * kv_stride
    most = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, CP], tl.float32)
    for first in range(0, TOPK, KEYS):
        k = first + tl.arange(0, KEYS)
        row, visible, k_c, k_r = _chosen(rows_ptr, kv_ptr, n, k, last, c, r, TOPK, C, R)
        k_c, k_r = k_c.to(q_c.dtype), k_r.to(q_c.dtype)
        s = tl.dot(q_r, k_r.T, tl.dot(q_c, k_c.T, input_precision="ieee"), input_precision="ieee")
        s = tl.where(visible[None, :], s * LOG2E, float("-inf"))
        higher = tl.maximum(most, tl.max(s, axis=1))
        p, factor = tl.exp2(s - higher[:, None]), tl.exp2(most - higher)
        total = total * factor + tl.sum(p, axis=1)
        acc = tl.dot(p.to(k_c.dtype), k_c, acc * factor[:, None], input_precision="ieee")
        most = higher
    at = (n * H + head)[:, None] * C + c[None, :]
    tl.store(out_ptr + at, acc / total[:, None], mask=(head < H)[:, None] & (c < C)[None, :])
    lse = most + tl.log2(total)
    tl.store(lse_ptr + n * H + head, lse, mask=head < H)
    if PROBABILITIES:
        for first in range(0, TOPK, KEYS):
            k = first + tl.arange(0, KEYS)
            row, visible, k_c, k_r = _chosen(rows_ptr, kv_ptr, n, k, last, c, r, TOPK, C, R)
            k_c, k_r = k_c.to(q_c.dtype), k_r.to(q_c.dtype)
            s = tl.dot(q_r, k_r.T, tl.dot(q_c, k_c.T, input_precision="ieee"), input_precision="ieee")
            p = tl.where((head < H)[:, None] & visible[None, :], tl.exp2(s * LOG2E - lse[:, None]), 0.0)
            if ADDS:
                tl.atomic_add(p_ptr + n * TOPK + k, tl.sum(p, axis=0), mask=k < TOPK, sem="relaxed")
            else:
                tl.store(p_ptr + n * TOPK + k, tl.sum(p, axis=0), mask=k < TOPK)


@triton.jit
def _spread(program, S):
    """The query of a program that adds to rows: neighbours choose alike, so those at work are far from each other."""
    b, i = (program // S).to(tl.int64), (program % S).to(tl.int64)
    return b * S + tl.where(S % PRIME == 0, i, i * PRIME % S)


@triton.jit
def _attend_backward_kernel(
    q_ptr, kv_ptr, rows_ptr, seen_ptr, out_ptr, lse_ptr, dout_ptr, dq_ptr, dkv_ptr, S, kv_stride, seen_stride, H,
    C: tl.constexpr, R: tl.constexpr, TOPK: tl.constexpr,
    CP: tl.constexpr, RP: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradients of `_attend_kernel`: writes dq, and adds to dkv, float32 in the shape of kv, contiguous.

    A program takes HEADS heads of a query, gathers the K latents again and computes the probabilities from the sums.
    2·H·K·(5C + 3R) operations and K·(C + R) additions in the L2 cache, which bound it.
    """
    n, head = _spread(tl.program_id(0), S), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    b, c, r = n // S, tl.arange(0, CP), tl.arange(0, RP)
    last = tl.load(seen_ptr + b * seen_stride + n % S).to(tl.int32)
    q_c, q_r = _queries(q_ptr, n, head, c, r, H, C, R)
    dkv_ptr += b * kv_stride
    kv_ptr += b * kv_stride
    at, inside = (n * H + head)[:, None] * C + c[None, :], (head < H)[:, None] & (c < C)[None, :]
    dout = tl.load(dout_ptr + at, mask=inside, other=0.0)
    out = tl.load(out_ptr + at, mask=inside, other=0.0)
    mean = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)  # of the probabilities' gradients
    lse = tl.load(lse_ptr + n * H + head, mask=head < H, other=0.0)
    dq_c, dq_r = tl.zeros([HEADS, CP], tl.float32), tl.zeros([HEADS, RP], tl.float32)
    for first in range(0, TOPK, KEYS):
        k = first + tl.arange(0, KEYS)
        row, visible, k_c, k_r = _chosen(rows_ptr, kv_ptr, n, k, last, c, r, TOPK, C, R)
        k_c, k_r = k_c.to(q_c.dtype), k_r.to(q_c.dtype)
        s = tl.dot(q_r, k_r.T, tl.dot(q_c, k_c.T, input_precision="ieee"), input_precision="ieee")
        p = tl.where(visible[None, :], tl.exp2(s * LOG2E - lse[:, None]), 0.0)
        ds = p * (tl.dot(dout, k_c.T, input_precision="ieee") - mean[:, None])
        p, ds = p.to(k_c.dtype), ds.to(k_c.dtype)
        dq_c = tl.dot(ds, k_c, dq_c, input_precision="ieee")
        dq_r = tl.dot(ds, k_r, dq_r, input_precision="ieee")
        d_c = tl.dot(ds.T, q_c, tl.dot(p.T, dout, input_precision="ieee"), input_precision="ieee")
        d_r = tl.dot(ds.T, q_r, input_precision="ieee")
        to = dkv_ptr + row[:, None] * (C + R)
        tl.atomic_add(to + c[None, :], d_c, mask=visible[:, None] & (c < C)[None, :], sem="relaxed")
        tl.atomic_add(to + C + r[None, :], d_r, mask=visible[:, None] & (r < R)[None, :], sem="relaxed")
    to = dq_ptr + (n * H + head)[:, None] * (C + R)
    tl.store(to + c[None, :], dq_c, mask=inside)
    tl.store(to + C + r[None, :], dq_r, mask=(head < H)[:, None] & (r < R)[None, :])


class _Attend(torch.autograd.Function):
    """`attend`."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, latent: torch.Tensor, rows: torch.Tensor, seen: torch.Tensor, rank: int,
        with_probabilities: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        q, latent, seen = (x.contiguous() for x in (q, latent, seen))
        bsz, seqlen, heads, _ = q.shape
        out = torch.empty(bsz, seqlen, heads, rank, dtype=q.dtype, device=q.device)
        lse = torch.empty(bsz, seqlen, heads, dtype=torch.float32, device=q.device)
        tiles = _tiles(q, rank)
        blocks, p = triton.cdiv(heads, tiles["HEADS"]), None
        if with_probabilities:
            make = torch.empty if blocks == 1 else torch.zeros
            p = make(rows.shape, dtype=torch.float32, device=q.device)
            ctx.mark_non_differentiable(p)
        _attend_kernel[(bsz * seqlen, blocks)](
            q, latent, rows, seen, out, lse, p, *_strides(q, latent, seen), TOPK=rows.shape[-1],
            PROBABILITIES=with_probabilities, ADDS=blocks > 1, **tiles,
        )  # fmt: skip
        ctx.save_for_backward(q, latent, rows, seen, out, lse)
        return out, p

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        q, latent, rows, seen, out, lse = ctx.saved_tensors
        bsz, seqlen, heads, _ = q.shape
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dkv = torch.zeros(latent.shape, dtype=torch.float32, device=q.device)
        tiles = _tiles(q, out.shape[-1], backward=True)
        _attend_backward_kernel[(bsz * seqlen, triton.cdiv(heads, tiles["HEADS"]))](
            q, latent, rows, seen, out, lse, dout.contiguous(), dq, dkv, *_strides(q, latent, seen),
            TOPK=rows.shape[-1], **tiles,
        )  # fmt: skip
        return dq, dkv.to(latent.dtype), None, None, None, None


def attend(
    q: torch.Tensor, latent: torch.Tensor, rows: torch.Tensor, seen: torch.Tensor, rank: int,
    with_probabilities: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Attends to chosen latents: (B, S, H, C), and float32 (B, S, K) the probabilities, summed over the heads.

    Args:
        q: Absorbed queries, with the scale of the scores in them (B, S, H, C + R).
        latent: Latents and rotary keys (B, T, C + R).
        rows: Positions, int32 (B, S, K); those after `seen` are not attended to.
        seen: As for `choose`.
        rank: C.
    """
    return _Attend.apply(q, latent, rows, seen, rank, with_probabilities)


def _strides(q: torch.Tensor, latent: torch.Tensor, seen: torch.Tensor) -> tuple[int, ...]:
    """The sizes S, of a sequence's latents, of a row of `seen` where rows differ, and H."""
    seqlen, heads = q.shape[1:3]
    return seqlen, latent.shape[1] * latent.shape[2], seqlen if len(seen) > 1 else 0, heads


def _power(n: int) -> int:
    """The width of a tile that holds n numbers, 16 at least for the tensor cores."""
    return max(16, triton.next_power_of_2(n))


def _tiles(q: torch.Tensor, rank: int, backward: bool = False) -> dict[str, int]:
    """Sizes of the tiles of a program that attends: all that it has in float32 fits the registers."""
    if rank > 128:
        most, keys, warps, stages = 16, 32, 8, 1 if backward else 2
    else:
        most, keys, warps, stages = 32, 64 if backward else 128, 4, 2
    keys = min(keys, 16 if rank > 128 else 32) if q.dtype == torch.float32 else keys
    sizes = {"C": rank, "R": q.shape[-1] - rank, "CP": _power(rank), "RP": _power(q.shape[-1] - rank)}
    return sizes | {"HEADS": min(_power(q.shape[2]), most), "KEYS": keys, "num_warps": warps, "num_stages": stages}


# --- The indexer's loss -----------------------------------------------------------------------------------------------


@triton.jit
def _chosen_scores(rows_ptr, p_ptr, scores_ptr, n, t, last, TOPK: tl.constexpr):
    """Of the positions chosen for query n, those at t: where they are, whether it sees them, p and scores."""
    row = tl.load(rows_ptr + n * TOPK + t, mask=t < TOPK, other=0)
    visible = (t < TOPK) & (row <= last)
    p = tl.load(p_ptr + n * TOPK + t, mask=visible, other=0.0)
    return row, visible, p, tl.load(scores_ptr + n * TOPK + t, mask=visible, other=float("-inf"))


@triton.jit
def _index_loss_kernel(
    q_ptr, k_ptr, w_ptr, rows_ptr, seen_ptr, p_ptr, scores_ptr, loss_ptr, dq_ptr, dk_ptr, dw_ptr,
    S, k_stride, seen_stride,
    H: tl.constexpr, D: tl.constexpr, TOPK: tl.constexpr,
    HP: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """KL(p ‖ softmax of the scores) of a query, and its gradients: writes dq and dw, and adds to dk, all in float32.

    The gradient of a score is softmax - p. A program takes a query: reads p and the scores, K numbers each, gathers K
    keys of d, does 6·h·K·d operations and adds K·d numbers in the L2 cache, which bounds it.
    """
    n = _spread(tl.program_id(0), S)
    b = n // S
    last = tl.load(seen_ptr + b * seen_stride + n % S).to(tl.int32)
    _, _, p, x = _chosen_scores(rows_ptr, p_ptr, scores_ptr, n, tl.arange(0, KP), last, TOPK)
    heads, most = tl.sum(p), tl.max(x)
    total = tl.sum(tl.exp(x - most))
    loss = tl.where(p > 0, p / heads * (tl.log(p / heads) - (x - most - tl.log(total))), 0.0)
    tl.store(loss_ptr + n, tl.sum(loss))
    h, d = tl.arange(0, HP), tl.arange(0, DP)
    at, inside = (n * H + h)[:, None] * D + d[None, :], (h < H)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + at, mask=inside, other=0.0)
    w = tl.load(w_ptr + n * H + h, mask=h < H, other=0.0)
    dq, dw = tl.zeros([HP, DP], tl.float32), tl.zeros([HP], tl.float32)
    for first in range(0, TOPK, KEYS):
        t = first + tl.arange(0, KEYS)
        row, visible, share, score = _chosen_scores(rows_ptr, p_ptr, scores_ptr, n, t, last, TOPK)
        slope = tl.exp(score - most) / total - share / heads
        is_inside = visible[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + b * k_stride + row[:, None] * D + d[None, :], mask=is_inside, other=0.0).to(q.dtype)
        product = tl.dot(q, k.T, input_precision="ieee")
        dw += tl.sum(tl.maximum(product, 0.0) * slope[None, :], axis=1)
        dproduct = tl.where(product > 0, w[:, None] * slope[None, :], 0.0).to(q.dtype)
        dq = tl.dot(dproduct, k, dq, input_precision="ieee")
        dk = tl.dot(dproduct.T, q, input_precision="ieee")
        tl.atomic_add(dk_ptr + b * k_stride + row[:, None] * D + d[None, :], dk, mask=is_inside, sem="relaxed")
    tl.store(dq_ptr + at, dq, mask=inside)
    tl.store(dw_ptr + n * H + h, dw, mask=h < H)


class _IndexLoss(torch.autograd.Function):
    """`index_loss`: its gradients but for a factor are computed with it, and kept instead of what they depend on."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor, seen: torch.Tensor,
        p: torch.Tensor, scores: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        q, k, weights, seen = (x.contiguous() for x in (q, k, weights, seen))
        (bsz, seqlen, heads, dim), topk, device = q.shape, rows.shape[-1], q.device
        losses = torch.empty(bsz * seqlen, dtype=torch.float32, device=device)
        dq = torch.empty(q.shape, dtype=q.dtype, device=device)
        dk = torch.zeros(k.shape, dtype=torch.float32, device=device)
        dw = torch.empty(weights.shape, dtype=torch.float32, device=device)
        _index_loss_kernel[(bsz * seqlen,)](
            q, k, weights, rows, seen, p, scores, losses, dq, dk, dw, seqlen, k.shape[1] * dim,
            seqlen if len(seen) > 1 else 0, H=heads, D=dim, TOPK=topk, HP=_power(heads), DP=_power(dim),
            KP=triton.next_power_of_2(topk), KEYS=min(64, _power(topk)), num_warps=4 if heads * dim < 4096 else 8,
        )  # fmt: skip
        ctx.save_for_backward(dq, dk.to(k.dtype), dw)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(x * grad for x in ctx.saved_tensors), None, None, None, None


def index_loss(
    q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor, seen: torch.Tensor, p: torch.Tensor,
    scores: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The indexer's loss, summed over queries, a float32 scalar: `Indexer.divergence` of the chosen positions.

    `q`, `k`, `weights` and `seen` are those of `choose`, `rows` and `scores` what it returned; `p` is `attend`'s, of
    the heads of all ranks.
    """
    return _IndexLoss.apply(q, k, weights, rows, seen, p, scores)


# --- Its loss where attention is dense --------------------------------------------------------------------------------


@triton.jit
def _head_rows(x_ptr, row, inside, h, d, H, D: tl.constexpr):
    """Rows of head h of x (·, H, D): (rows, D)."""
    return tl.load(x_ptr + (row * H + h)[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _sums_kernel(
    q_ptr, k_ptr, lse_ptr, S, H, scale,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The log₂ of the sums of the causal softmax, (B, H, S).

    A program takes ROWS queries of a head, and reads all their keys: bound by the tensor cores and exponentials.
    """
    m, h, b = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, DP)
    q = _head_rows(q_ptr, b * S + m, m < S, h, d, H, D)
    most, total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, tl.minimum((tl.program_id(0) + 1) * ROWS, S), COLS):
        t = start + tl.arange(0, COLS)
        k = _head_rows(k_ptr, b * S + t, t < S, h, d, H, D)
        s = tl.dot(q, k.T, input_precision="ieee") * scale
        s = tl.where(t[None, :] <= m[:, None], s, float("-inf"))
        higher = tl.maximum(most, tl.max(s, axis=1))
        total = total * tl.exp2(most - higher) + tl.sum(tl.exp2(s - higher[:, None]), axis=1)
        most = higher
    tl.store(lse_ptr + (b * H + h) * S + m, most + tl.log2(total), mask=m < S)


@triton.jit
def _probabilities_kernel(
    q_ptr, k_ptr, lse_ptr, p_ptr, first, n_rows, S, H, width, scale,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The probabilities of `n_rows` queries from `first` on, summed over heads: a tile of p (B·n, width)."""
    i, t = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLS + tl.arange(0, COLS)
    d, m, b = tl.arange(0, DP), first + i, tl.program_id(2).to(tl.int64)
    if tl.program_id(1) * COLS < first + (tl.program_id(0) + 1) * ROWS:
        p = tl.zeros([ROWS, COLS], tl.float32)
        for h in range(H):
            q = _head_rows(q_ptr, b * S + m, i < n_rows, h, d, H, D)
            k = _head_rows(k_ptr, b * S + t, t < S, h, d, H, D)
            lse = tl.load(lse_ptr + (b * H + h) * S + m, mask=i < n_rows, other=0.0)
            p += tl.exp2(tl.dot(q, k.T, input_precision="ieee") * scale - lse[:, None])
        at = (b * n_rows + i)[:, None] * width + t[None, :]
        tl.store(p_ptr + at, p, mask=(i < n_rows)[:, None] & (t[None, :] <= m[:, None]))


@triton.jit
def _divergence_kernel(scores_ptr, p_ptr, loss_ptr, first, n_rows, S, width, BLOCK: tl.constexpr):
    """KL(p ‖ softmax of the scores) of a query to all that it sees; writes the scores' gradients in their place.

    A program reads a row of both twice, from the L2 cache.
    """
    row = tl.program_id(0).to(tl.int64)
    m = first + tl.program_id(0) % n_rows
    most = tl.full([BLOCK], -1e30, tl.float32)
    total, heads = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, m + 1, BLOCK):
        t = start + tl.arange(0, BLOCK)
        x = tl.load(scores_ptr + row * width + t, mask=t <= m, other=float("-inf"))
        higher = tl.maximum(most, x)
        total = total * tl.exp(most - higher) + tl.exp(x - higher)
        heads += tl.load(p_ptr + row * width + t, mask=t <= m, other=0.0)
        most = higher
    highest, share = tl.max(most), 1 / tl.sum(heads)
    log_sum = highest + tl.log(tl.sum(total * tl.exp(most - highest)))
    loss = tl.zeros([BLOCK], tl.float32)
    for start in range(0, m + 1, BLOCK):
        t = start + tl.arange(0, BLOCK)
        x = tl.load(scores_ptr + row * width + t, mask=t <= m, other=float("-inf")) - log_sum
        p = tl.load(p_ptr + row * width + t, mask=t <= m, other=0.0) * share
        loss += tl.where(p > 0, p * (tl.log(p) - x), 0.0)
        tl.store(scores_ptr + row * width + t, tl.exp(x) - p, mask=t <= m)
    tl.store(loss_ptr + row // n_rows * S + m, tl.sum(loss))


@triton.jit
def _scores_backward_kernel(
    q_ptr, k_ptr, w_ptr, slope_ptr, dq_ptr, dk_ptr, dw_ptr, first, n_rows, S, H, width,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Adds the gradients of `_scores_kernel` under a causal mask, from those of the scores, in float32.

    A program takes ROWS queries of a head and SPAN keys: 6·d operations a score.
    """
    blocks = tl.cdiv(n_rows, ROWS)
    i, begin = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS), tl.program_id(0) // blocks * SPAN
    d, m, h, b = tl.arange(0, DP), first + i, tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, inside = b * S + m, i < n_rows
    q = _head_rows(q_ptr, row, inside, h, d, H, D)
    w = tl.load(w_ptr + row * H + h, mask=inside, other=0.0)
    dq, dw = tl.zeros([ROWS, DP], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(begin, tl.minimum(begin + SPAN, tl.max(tl.where(inside, m, -1)) + 1), COLS):
        t = start + tl.arange(0, COLS)
        k = _head_rows(k_ptr, b * S + t, t < S, 0, d, 1, D)
        at = (b * n_rows + i)[:, None] * width + t[None, :]
        slope = tl.load(slope_ptr + at, mask=inside[:, None] & (t[None, :] <= m[:, None]), other=0.0)
        product = tl.dot(q, k.T, input_precision="ieee")
        dw += tl.sum(tl.maximum(product, 0.0) * slope, axis=1)
        dproduct = tl.where(product > 0, slope * w[:, None], 0.0).to(q.dtype)
        dq = tl.dot(dproduct, k, dq, input_precision="ieee")
        dk = tl.dot(dproduct.T, q, input_precision="ieee")
        to = dk_ptr + (b * S + t)[:, None] * D + d[None, :]
        tl.atomic_add(to, dk, mask=(t < S)[:, None] & (d < D)[None, :], sem="relaxed")
    to = dq_ptr + (row * H + h)[:, None] * D + d[None, :]
    tl.atomic_add(to, dq, mask=inside[:, None] & (d < D)[None, :], sem="relaxed")
    tl.atomic_add(dw_ptr + row * H + h, dw, mask=inside, sem="relaxed")


SPAN = 1024  # keys of a program of `_scores_backward_kernel`, so that there are enough programs


class _DenseIndexLoss(_IndexLoss):
    """`dense_index_loss`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, index_q: torch.Tensor, index_k: torch.Tensor, weights: torch.Tensor, q: torch.Tensor,
        k: torch.Tensor, scale: float, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        index_q, index_k, weights, q, k = (x.contiguous() for x in (index_q, index_k, weights, q, k))
        (bsz, seqlen, heads, dim), device, scale = q.shape, q.device, scale * LOG2E.value
        own = index_q, index_k, weights
        grads = dq, dk, dw = [torch.zeros(x.shape, dtype=torch.float32, device=device) for x in own]
        losses, lse = (torch.empty(bsz * n, seqlen, dtype=torch.float32, device=device) for n in (1, heads))
        seen, (scores, size) = torch.arange(seqlen, device=device).unsqueeze(0), _room(q, seqlen)
        p, own_heads, own_dim = torch.empty_like(scores), *index_q.shape[2:]
        tile = {"D": dim, "DP": _power(dim), "ROWS": 64, "COLS": 64 if dim <= 128 else 32, "num_stages": 2}
        own_tile = {**tile, "D": own_dim, "DP": _power(own_dim), "SPAN": SPAN}
        _sums_kernel[(triton.cdiv(seqlen, 64), heads, bsz)](q, k, lse, seqlen, heads, scale, **tile)
        for first in range(0, seqlen, size):
            n = min(size, seqlen - first)
            end, blocks, where = first + n, triton.cdiv(n, 64), (first, n, seqlen)
            _score(*own, seen, scores, first, n, end)
            grid = blocks, triton.cdiv(end, tile["COLS"]), bsz
            _probabilities_kernel[grid](q, k, lse, p, *where, heads, p.shape[1], scale, **tile)
            p = sum_over_ranks(p)
            _divergence_kernel[(bsz * n,)](scores, p, losses, *where, p.shape[1], BLOCK=2048, num_warps=8)
            _scores_backward_kernel[(blocks * triton.cdiv(end, SPAN), own_heads, bsz)](
                *own, scores, dq, dk, dw, *where, own_heads, p.shape[1], **own_tile
            )
        ctx.save_for_backward(*(grad.to(x.dtype) for grad, x in zip(grads, own, strict=True)))
        return losses.sum()


def dense_index_loss(
    q: torch.Tensor, k: torch.Tensor, index: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scale: float,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """`model.MLA._index_loss`: the indexer's mean loss where each query attends to all positions up to its own.

    `q` and `k` (B, S, H, D) are the heads' queries and keys, `scale` is the factor of their scores, and `index` has the
    indexer's queries, keys and weights.
    """
    return _DenseIndexLoss.apply(*index, q, k, scale, sum_over_ranks) / (q.shape[0] * q.shape[1])


# --- The choice of a decoded position ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["layer"])
def _index_kernel(
    q_ptr, keys_ptr, g_ptr, bias_ptr, cos_ptr, sin_ptr, positions_ptr, cache_rows_ptr, caches_ptr, capacity_ptr,
    seen_ptr, places_ptr, layer, eps, TYPE: tl.constexpr, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    CONTEXT: tl.constexpr, TOPK: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """`Indexer.forward` after its products, and `KVCache.update` of the index key.

    Program n rotates the queries q (N, H·D) of a position in place, norms and rotates its key, the first D of keys
    (N, D + H), and writes it to the cache. It writes the last position to choose from, -1 where n is no row's, and the
    last place among the chosen ones.
    """
    n, h, i, d = tl.program_id(0), tl.arange(0, HP), tl.arange(0, HALF), tl.arange(0, DP)
    position, row, capacity = tl.load(positions_ptr + n), tl.load(cache_rows_ptr + n), tl.load(capacity_ptr)
    last = tl.where(row >= 0, tl.minimum(tl.minimum(position, capacity - 1), CONTEXT - 1), -1)
    tl.store(seen_ptr + n, last.to(tl.int32))
    tl.store(places_ptr + n, tl.minimum(last, TOPK - 1))
    is_pair = i < R // 2
    at = tl.minimum(position, CONTEXT - 1) * (R // 2) + i
    cos, sin = tl.load(cos_ptr + at, mask=is_pair, other=0.0), tl.load(sin_ptr + at, mask=is_pair, other=0.0)
    to, inside = q_ptr + n * (H * D) + h[:, None] * D + i[None, :], (h < H)[:, None] & is_pair[None, :]
    q_a, q_b = tl.load(to, mask=inside, other=0.0), tl.load(to + R // 2, mask=inside, other=0.0)
    tl.store(to, q_a * cos[None, :] - q_b * sin[None, :], mask=inside)
    tl.store(to + R // 2, q_b * cos[None, :] + q_a * sin[None, :], mask=inside)
    if (row >= 0) & (position < capacity):
        keys_ptr += n * (D + H)
        cache_ptr = tl.load(caches_ptr + layer).to(tl.pointer_type(TYPE)) + (row * capacity + position) * D
        x = tl.load(keys_ptr + d, mask=d < D, other=0.0)
        mean = tl.sum(x) / D
        x = tl.where(d < D, x - mean, 0.0)
        r = tl.rsqrt(tl.sum(x * x) / D + eps)
        x = x * r * tl.load(g_ptr + d, mask=d < D, other=0.0) + tl.load(bias_ptr + d, mask=d < D, other=0.0)
        tl.store(cache_ptr + d, x.to(TYPE), mask=(d >= R) & (d < D))
        a, b = tl.load(keys_ptr + i, mask=is_pair, other=0.0), tl.load(keys_ptr + R // 2 + i, mask=is_pair, other=0.0)
        a = (a - mean) * r * tl.load(g_ptr + i, mask=is_pair) + tl.load(bias_ptr + i, mask=is_pair)
        b = (b - mean) * r * tl.load(g_ptr + R // 2 + i, mask=is_pair) + tl.load(bias_ptr + R // 2 + i, mask=is_pair)
        tl.store(cache_ptr + i, (a * cos - b * sin).to(TYPE), mask=is_pair)
        tl.store(cache_ptr + R // 2 + i, (b * cos + a * sin).to(TYPE), mask=is_pair)


@triton.jit(do_not_specialize=["layer"])
def _cached_scores_kernel(
    q_ptr, keys_ptr, cache_rows_ptr, caches_ptr, capacity_ptr, seen_ptr, scores_ptr, layer, TYPE: tl.constexpr,
    CACHE: tl.constexpr, H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """The scores (N, WIDTH) of all cached keys that a position sees: program (i, n) computes COLS. Bound by memory."""
    t, n = tl.program_id(0) * COLS + tl.arange(0, COLS), tl.program_id(1)
    last, h, d = tl.load(seen_ptr + n), tl.arange(0, HP), tl.arange(0, DP)
    if tl.program_id(0) * COLS <= last:
        row, capacity = tl.load(cache_rows_ptr + n), tl.load(capacity_ptr)
        cache_ptr = tl.multiple_of(tl.load(caches_ptr + layer).to(tl.pointer_type(CACHE)), 16) + row * capacity * D
        mask = (t <= last)[None, :] & (d < D)[:, None]
        k = tl.load(cache_ptr + t[None, :] * D + d[:, None], mask=mask, other=0.0).to(TYPE)
        mask = (h < H)[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + n * (H * D) + h[:, None] * D + d[None, :], mask=mask, other=0.0).to(TYPE)
        w = tl.load(keys_ptr + n * (D + H) + D + h, mask=h < H, other=0.0)
        scores = tl.sum(tl.maximum(tl.dot(q, k, input_precision="ieee"), 0.0) * w[:, None], axis=0)
        tl.store(scores_ptr + n * WIDTH + t, scores, mask=t <= last)


class Chooser:
    """The choice of positions in a step of `kernel_decode`, whose buffers it reads: for each of up to n positions.

    A caller writes `q`, an indexer's queries (N, h·d), and `keys`, its key and the heads' weights (N, d + h), before
    rotation and norm, all float32, for N of `height` positions. Then `launch` writes `rows`, the chosen positions
    int32 (n, K), and `places`, the index of the last of them that a position attends to.
    """

    def __init__(self, args: Any, n: int, height: int, device: torch.device):
        self.args, self.width = args, triton.cdiv(args.max_seq_len, 64) * 64
        heads, dim = args.index_n_heads, args.index_head_dim
        zeros = partial(torch.zeros, device=device)
        self.q, self.keys, self.scores = zeros(height, heads * dim), zeros(height, dim + heads), zeros(n, self.width)
        self.seen, self.places = zeros(n, dtype=torch.int32), zeros(n, dtype=torch.int64)
        self.rows, self.values = zeros(n, args.index_topk, dtype=torch.int32), zeros(n, args.index_topk)

    def launch(self, step: Any, norm: tuple[torch.Tensor, torch.Tensor], eps: float, layer: int, types: Any) -> None:
        """Chooses for a `kernel_decode.Step`; `norm` is the key's, `layer` the place of the cache's address."""
        args, n = self.args, len(self.seen)
        heads, dim, (own, cached) = args.index_n_heads, args.index_head_dim, types
        cache = step.rows, step.caches, step.capacity
        sizes = {"H": heads, "D": dim, "HP": _power(heads), "DP": _power(dim)}
        _index_kernel[(n,)](
            self.q, self.keys, *norm, step.cos, step.sin, step.positions, *cache, self.seen, self.places, layer, eps,
            TYPE=cached, R=args.qk_rope_head_dim, CONTEXT=args.max_seq_len, TOPK=args.index_topk,
            HALF=triton.next_power_of_2(max(args.qk_rope_head_dim // 2, 1)), **sizes,
        )  # fmt: skip
        _cached_scores_kernel[(triton.cdiv(self.width, 128), n)](
            self.q, self.keys, *cache, self.seen, self.scores, layer, TYPE=own, CACHE=cached, WIDTH=self.width,
            COLS=128, **sizes,
        )  # fmt: skip
        _choose_kernel[(n,)](
            self.scores, self.seen, self.rows, self.values, 0, 1, 1, 1, self.width, TOPK=args.index_topk,
            **_choice(self.width),
        )  # fmt: skip


# --- What the model calls ---------------------------------------------------------------------------------------------


def attend_to_chosen(
    q: torch.Tensor, latent: torch.Tensor, index: tuple[torch.Tensor, torch.Tensor, torch.Tensor], n_keys: int,
    seen: torch.Tensor, indexer: Any, rank: int, learns: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """`model.MLA._attend_to_chosen`: chooses, attends, and if the `model.Indexer` learns, computes its mean loss.

    `index` are the indexer's queries, keys and weights; the other arguments are those of `choose` and `attend`.
    """
    rows, scores = choose(*index, n_keys, seen, indexer.topk)
    out, p = attend(q, latent, rows, seen, rank, learns)
    if not learns:
        return out, None
    return out, index_loss(*index, rows, seen, indexer.sum_over_ranks(p), scores) / (q.shape[0] * q.shape[1])
