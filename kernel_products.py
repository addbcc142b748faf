"""Products of matrices with one position, or up to 64, in decoding: Triton kernels that kernel_decode.py launches.

For one position, a product with a matrix is bound by memory: a program takes a few rows, and multiplies in float32. It
keeps the vector in registers, and loads the next rows while it multiplies some. Loops over rows are unrolled: a tile
that a loop carries is taken apart number by number, which for FP8 costs as much as the product.

For more positions, tensor cores multiply. Experts are then divided among programs, not positions: each reads its
weights once, for all rows, and experts that no position chose are skipped.

All sums are in float32; the factors of products by tensor cores are in the model's dtype. Weights are read as they are
stored, FP8 ones with a scale per block of 128×128.

In shapes: N positions of the step, E experts, K columns of a matrix, INTER hidden width.
"""

import triton
import triton.language as tl
from triton.language import constexpr
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK = tl.constexpr(128)  # columns of FP8 weights that share a scale, and rows


# --- Between kernels ------------------------------------------------------------------------------------------------


@triton.jit
def wait_for_kernels(PDL: constexpr):
    """Lets the next kernel start, and waits until those before have ended. Before this, only weights may be read."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


# --- Products with one position -------------------------------------------------------------------------------------


@triton.jit
def block_columns(block, KB: constexpr):
    """Numbers of KB·128 columns from 128·block on, (KB, 128)."""
    return (tl.arange(0, KB) + block)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _vector(x_ptr, block, K: constexpr, KB: constexpr):
    """KB·128 numbers of a vector (K,) from 128·block on, as float32 (KB, 128)."""
    k = block_columns(block, KB)
    return tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def _tile(w_ptr, row, block, HEIGHT: constexpr, K: constexpr, R: constexpr, KB: constexpr):
    """R rows of a matrix (HEIGHT, K), and columns from 128·block on: (R, KB, 128), 0 beyond the matrix."""
    rows, k = row + tl.arange(0, R), block_columns(block, KB)
    mask = (rows < HEIGHT)[:, None, None] & (k < K)[None, :, :]
    return tl.load(w_ptr + rows[:, None, None] * K + k[None, :, :], mask=mask, other=0.0)


@triton.jit
def _scaled(x, s_ptr, row, block, K: constexpr, KB: constexpr):
    """A part of a vector (KB, 128) times the scales of a row's blocks, where the matrix is in FP8."""
    if s_ptr is not None:
        BLOCKS: constexpr = (K + BLOCK - 1) // BLOCK
        b = tl.arange(0, KB) + block
        x *= tl.load(s_ptr + row // BLOCK * BLOCKS + b, mask=b < BLOCKS, other=0.0)[:, None]
    return x


@triton.jit
def sum_columns(products):
    """Sums over columns: (R, KB, 128) to (R,). Those of a thread are added first."""
    return tl.sum(tl.reshape(products, (products.shape[0], products.shape[1] * products.shape[2])), axis=1)


@triton.jit
def inverse_rms(x_ptr, K: constexpr, KP: constexpr, EPS: constexpr):
    """The factor of RMSNorm for a vector (K,), apart from its weights; KP is a power of two."""
    k = tl.arange(0, KP)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x) / K + EPS)


@triton.jit
def _normed(x_ptr, g_ptr, K: constexpr, EPS: constexpr, KB: constexpr):
    """RMSNorm of a vector (K,) with weights g, (KB, 128); or the vector itself without g."""
    x = _vector(x_ptr, 0, K, KB)
    if g_ptr is not None:
        x *= tl.rsqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / K + EPS) * _vector(g_ptr, 0, K, KB)
    return x


@triton.jit
def _project_rows(
    x_ptr, g_ptr, w_ptr, s_ptr, out_ptr, first, HEIGHT: constexpr, K: constexpr, EPS: constexpr, ADD: constexpr,
    ROWS: constexpr, R: constexpr, KB: constexpr, PDL: constexpr,
):  # fmt: skip
    """ROWS rows, of one block, of `W x`, or of `W norm(x)` where there are a norm's weights g; R at a time."""
    w = _tile(w_ptr, first, 0, HEIGHT, K, R, KB)
    wait_for_kernels(PDL)
    x = _scaled(_normed(x_ptr, g_ptr, K, EPS, KB), s_ptr, first, 0, K, KB)
    for i in tl.static_range(0, ROWS, R):
        following = w
        if i + R < ROWS:
            following = _tile(w_ptr, first + i + R, 0, HEIGHT, K, R, KB)
        y, rows = sum_columns(w.to(tl.float32) * x[None, :, :]), first + i + tl.arange(0, R)
        if ADD:
            y += tl.load(out_ptr + rows, mask=rows < HEIGHT, other=0.0)
        tl.store(out_ptr + rows, y, mask=rows < HEIGHT)
        w = following


@triton.jit
def project_kernel(
    x_ptr, g_ptr, a_ptr, sa_ptr, b_ptr, sb_ptr, out_ptr, OA: constexpr, OB: constexpr, K: constexpr, EPS: constexpr,
    ADD: constexpr, ROWS: constexpr, R: constexpr, KB: constexpr, PDL: constexpr,
):  # fmt: skip
    """`project` of one or two matrices, A (OA, K) and B (OB, K), and the RMSNorm before it; for one position.

    Of `MLA.forward`: attn_norm, and wq_a or wq with wkv_a; and wo with the residual sum (ADD). Also ffn_norm and the
    router's logits, and the head. Program i takes ROWS rows. Reads the matrices once, the vector x (K,) in each program
    (from L2). Bound by memory.
    """
    tile = tl.program_id(0)
    TILES: constexpr = (OA + ROWS - 1) // ROWS
    if tile < TILES:
        _project_rows(x_ptr, g_ptr, a_ptr, sa_ptr, out_ptr, tile * ROWS, OA, K, EPS, ADD, ROWS, R, KB, PDL)
    elif b_ptr is not None:
        first = (tile - TILES) * ROWS
        _project_rows(x_ptr, g_ptr, b_ptr, sb_ptr, out_ptr + OA, first, OB, K, EPS, ADD, ROWS, R, KB, PDL)


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
    x_ptr, g_ptr, w1, w3, w1_ptr, s1_ptr, w3_ptr, s3_ptr, h_ptr, first, INTER: constexpr, K: constexpr, EPS: constexpr,
    ACT: constexpr, ROWS: constexpr, R: constexpr, KB: constexpr,
):  # fmt: skip
    """ROWS numbers, of one block, of `act(w1 h) * w3 h`, h = norm(x), R at a time; the first tiles are given."""
    x = _normed(x_ptr, g_ptr, K, EPS, KB)
    x1, x3 = _scaled(x, s1_ptr, first, 0, K, KB), _scaled(x, s3_ptr, first, 0, K, KB)
    for i in tl.static_range(0, ROWS, R):
        next1, next3 = w1, w3
        if i + R < ROWS:
            next1 = _tile(w1_ptr, first + i + R, 0, INTER, K, R, KB)
            next3 = _tile(w3_ptr, first + i + R, 0, INTER, K, R, KB)
        gate = sum_columns(w1.to(tl.float32) * x1[None, :, :])
        up = sum_columns(w3.to(tl.float32) * x3[None, :, :])
        rows = first + i + tl.arange(0, R)
        tl.store(h_ptr + rows, _activate(gate, ACT) * up, mask=rows < INTER)
        w1, w3 = next1, next3


@triton.jit
def gate_up_one_kernel(
    x_ptr, g_ptr, logits_ptr, bias_ptr, w1_ptr, s1_ptr, w3_ptr, s3_ptr, shared1_ptr, ss1_ptr, shared3_ptr, ss3_ptr,
    h_ptr, chosen_ptr, weights_ptr, E: constexpr, GROUPS: constexpr, LIMITED: constexpr, TOPK: constexpr,
    SOFTMAX: constexpr, ROUTE_SCALE: constexpr, GP: constexpr, EP: constexpr, INTER: constexpr, SHARED: constexpr,
    K: constexpr, EPS: constexpr, ACT: constexpr, ROWS: constexpr, R: constexpr, KB: constexpr, PDL: constexpr,
):  # fmt: skip
    """w1, w3 and activation of the chosen `Experts`, and of the shared ones or the dense `MLP`, for one position.

    Also ffn_norm, and the rest of `Gate.forward`. The first programs take ROWS rows of w1 and w3 (SHARED, K), each of
    the others as many of those of one chosen expert (INTER, K). Writes h (TOPK·INTER + SHARED,), and the chosen
    experts' numbers and weights (TOPK,). Reads the weights of no other experts. Bound by memory.
    """
    tile = tl.program_id(0)
    TILES: constexpr = (SHARED + ROWS - 1) // ROWS
    if tile < TILES:
        row = tile * ROWS
        w1, w3 = _tile(shared1_ptr, row, 0, SHARED, K, R, KB), _tile(shared3_ptr, row, 0, SHARED, K, R, KB)
        wait_for_kernels(PDL)
        _gate_up_rows(
            x_ptr, g_ptr, w1, w3, shared1_ptr, ss1_ptr, shared3_ptr, ss3_ptr, h_ptr + TOPK * INTER, row, SHARED, K, EPS,
            ACT, ROWS, R, KB,
        )  # fmt: skip
    elif TOPK > 0:
        row, slot = (tile - TILES) // TOPK * ROWS, (tile - TILES) % TOPK
        PER: constexpr = E // GROUPS
        number = tl.arange(0, GP)[:, None] * PER + tl.arange(0, EP)[None, :]
        inside = (tl.arange(0, GP) < GROUPS)[:, None] & (tl.arange(0, EP) < PER)[None, :]
        wait_for_kernels(PDL)
        logits = tl.load(logits_ptr + number, mask=inside, other=0.0)
        scores, rank = _route(logits, bias_ptr, inside, number, LIMITED, GROUPS, SOFTMAX, GP, EP)
        number = tl.reshape(number, (GP * EP,))
        expert = tl.minimum(tl.sum(tl.where(rank == slot, number, 0)), E - 1)  # of scores that are no numbers, too
        start = expert.to(tl.int64) * (INTER * K)
        w1_ptr, w3_ptr = w1_ptr + start, w3_ptr + start
        w1, w3 = _tile(w1_ptr, row, 0, INTER, K, R, KB), _tile(w3_ptr, row, 0, INTER, K, R, KB)
        if row == 0:
            weight = tl.sum(tl.where(rank == slot, scores, 0.0))
            if not SOFTMAX:
                weight /= tl.sum(tl.where(rank < TOPK, scores, 0.0)) + 1e-20
            tl.store(chosen_ptr + slot, expert)
            tl.store(weights_ptr + slot, weight * ROUTE_SCALE)
        if s1_ptr is not None:
            s1_ptr += expert * ((INTER + BLOCK - 1) // BLOCK * ((K + BLOCK - 1) // BLOCK))
            s3_ptr += expert * ((INTER + BLOCK - 1) // BLOCK * ((K + BLOCK - 1) // BLOCK))
        _gate_up_rows(
            x_ptr, g_ptr, w1, w3, w1_ptr, s1_ptr, w3_ptr, s3_ptr, h_ptr + slot * INTER, row, INTER, K, EPS, ACT, ROWS,
            R, KB,
        )  # fmt: skip


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
def _down_tile(
    w2_ptr, shared_ptr, chosen_ptr, i: constexpr, row, D: constexpr, INTER: constexpr, SHARED: constexpr,
    R: constexpr, KB: constexpr,
):  # fmt: skip
    """Tile i of R rows of the shared experts' or dense MLP's w2, followed by those of the chosen experts."""
    N_SHARED: constexpr = (SHARED + BLOCK * KB - 1) // (BLOCK * KB)
    EACH: constexpr = max((INTER + BLOCK * KB - 1) // (BLOCK * KB), 1)
    if i < N_SHARED:
        w = _tile(shared_ptr, row, i * KB, D, SHARED, R, KB)
    else:
        slot = (i - N_SHARED) // EACH
        expert = tl.load(chosen_ptr + slot).to(tl.int64)
        w = _tile(w2_ptr + expert * (D * INTER), row, (i - N_SHARED - slot * EACH) * KB, D, INTER, R, KB)
    return w


@triton.jit
def down_one_kernel(
    h_ptr, chosen_ptr, weights_ptr, w2_ptr, s2_ptr, shared_ptr, ss_ptr, x_ptr, D: constexpr, INTER: constexpr,
    TOPK: constexpr, SHARED: constexpr, R: constexpr, KB: constexpr, PDL: constexpr,
):  # fmt: skip
    """w2 of the chosen `Experts`, `combine`, the shared experts or dense MLP, and `Block`'s residual sum, one position.

    Program i adds R numbers of the result to x (D,). Reads h, (TOPK · INTER + SHARED,), and w2 (E, D, INTER) of the
    chosen experts, and (D, SHARED) of the others. Bound by memory.
    """
    row = tl.program_id(0) * R
    rows, acc = row + tl.arange(0, R), tl.zeros((R, KB), tl.float32)
    N_SHARED: constexpr = (SHARED + BLOCK * KB - 1) // (BLOCK * KB)
    EACH: constexpr = max((INTER + BLOCK * KB - 1) // (BLOCK * KB), 1)
    TILES: constexpr = N_SHARED + TOPK * EACH
    if N_SHARED > 0:
        w = _down_tile(w2_ptr, shared_ptr, chosen_ptr, 0, row, D, INTER, SHARED, R, KB)
    wait_for_kernels(PDL)
    if N_SHARED == 0:
        w = _down_tile(w2_ptr, shared_ptr, chosen_ptr, 0, row, D, INTER, SHARED, R, KB)
    for i in tl.static_range(TILES):
        following = w
        if i + 1 < TILES:
            following = _down_tile(w2_ptr, shared_ptr, chosen_ptr, i + 1, row, D, INTER, SHARED, R, KB)
        if i < N_SHARED:
            x = _vector(h_ptr + TOPK * INTER, i * KB, SHARED, KB)
            x = _scaled(x, ss_ptr, row, i * KB, SHARED, KB)
        else:
            slot = (i - N_SHARED) // EACH
            block = (i - N_SHARED - slot * EACH) * KB
            x = _vector(h_ptr + slot * INTER, block, INTER, KB) * tl.load(weights_ptr + slot)
            if s2_ptr is not None:
                first = tl.load(chosen_ptr + slot) * ((D + BLOCK - 1) // BLOCK * ((INTER + BLOCK - 1) // BLOCK))
                x = _scaled(x, s2_ptr + first, row, block, INTER, KB)
        acc += tl.sum(w.to(tl.float32) * x[None, :, :], axis=2)
        w = following
    y = tl.load(x_ptr + rows, mask=rows < D, other=0.0) + tl.sum(acc, axis=1)
    tl.store(x_ptr + rows, y, mask=rows < D)


# --- Products with several positions --------------------------------------------------------------------------------


@triton.jit
def _add_product(acc, x, w, s_ptr, row, start, K: constexpr, PRECISION: constexpr):
    """acc + x w, with rows from `row` on and columns from `start` on of a matrix (·, K), which are of one block."""
    if s_ptr is None:
        acc = tl.dot(x, w.to(x.dtype), acc, input_precision=PRECISION)
    else:
        s = tl.load(s_ptr + row // BLOCK * ((K + BLOCK - 1) // BLOCK) + start // BLOCK)
        acc += tl.dot(x, w.to(x.dtype), input_precision=PRECISION) * s
    return acc


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
        w = tl.load(w_ptr + o[None, :] * K + k[:, None], mask=mask, other=0.0)
        acc = _add_product(acc, x, w, s_ptr, row, start, K, PRECISION)
    return acc


@triton.jit
def _gate_up(
    x_ptr, w1_ptr, s1_ptr, w3_ptr, s3_ptr, row, n_rows, K: constexpr, ACT: constexpr, N: constexpr, BN: constexpr,
    BK: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """act(x W1ᵀ) * x W3ᵀ, (N, BN): x (N, K), BN rows of W1 and W3 (n_rows, K)."""
    n, o = tl.arange(0, N), row + tl.arange(0, BN)
    gate, up = tl.zeros((N, BN), tl.float32), tl.zeros((N, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_ptr + n[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        at, mask = o[None, :] * K + k[:, None], (o < n_rows)[None, :] & (k < K)[:, None]
        w1, w3 = tl.load(w1_ptr + at, mask=mask, other=0.0), tl.load(w3_ptr + at, mask=mask, other=0.0)
        gate = _add_product(gate, x, w1, s1_ptr, row, start, K, PRECISION)
        up = _add_product(up, x, w3, s3_ptr, row, start, K, PRECISION)
    return _activate(gate, ACT) * up


@triton.jit
def _store_rows(acc, out_ptr, row, n_rows, STRIDE: constexpr, N: constexpr, BN: constexpr):
    """Stores (N, BN) from column `row` on."""
    n, o = tl.arange(0, N), row + tl.arange(0, BN)
    values = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + n[:, None] * STRIDE + o[None, :], values, mask=(o < n_rows)[None, :])


@triton.jit
def matmul_kernel(
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
    if tile < TILES:
        row = tile * BN
        acc = _multiply(acc, x_ptr, a_ptr, sa_ptr, row, OA, begin, end, K, K, N, BN, BK, PRECISION)
        _store_rows(acc, out_ptr, row, OA, OA + OB, N, BN)
    elif b_ptr is not None:
        row = (tile - TILES) * BN
        acc = _multiply(acc, x_ptr, b_ptr, sb_ptr, row, OB, begin, end, K, K, N, BN, BK, PRECISION)
        _store_rows(acc, out_ptr + OA, row, OB, OA + OB, N, BN)


@triton.jit
def route_kernel(
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
def gate_up_kernel(
    x_ptr, shares_ptr, w1_ptr, s1_ptr, w3_ptr, s3_ptr, shared1_ptr, ss1_ptr, shared3_ptr, ss3_ptr, h_ptr, E: constexpr,
    INTER: constexpr, SHARED: constexpr, K: constexpr, ACT: constexpr, N: constexpr, BN: constexpr, BK: constexpr,
    PRECISION: constexpr,
):  # fmt: skip
    """w1, w3 and activation of the `Experts`, and of the shared experts or the dense `MLP`, for N positions.

    A program takes BN rows of w1 and w3 of one expert that some position has chosen, for all positions, or of the
    others. Writes h (N, E·INTER + SHARED), times the weight of the choice: 0 where a position has not chosen an expert.
    Experts that no position chose are left out here and in `down_kernel`. Bound by memory up to some 200 positions.
    """
    tile, n = tl.program_id(0), tl.arange(0, N)
    TILES: constexpr = (SHARED + BN - 1) // BN
    if tile < TILES:
        row = tile * BN
        h = _gate_up(x_ptr, shared1_ptr, ss1_ptr, shared3_ptr, ss3_ptr, row, SHARED, K, ACT, N, BN, BK, PRECISION)
        _store_rows(h, h_ptr + E * INTER, row, SHARED, E * INTER + SHARED, N, BN)
    elif E > 0:
        EACH: constexpr = (INTER + BN - 1) // BN
        expert, row = (tile - TILES) // EACH, (tile - TILES) % EACH * BN
        start = expert.to(tl.int64) * (INTER * K)
        w1_ptr, w3_ptr = w1_ptr + start, w3_ptr + start
        shares = tl.load(shares_ptr + n * E + expert)
        if tl.sum((shares != 0).to(tl.int32)) > 0:
            if s1_ptr is not None:
                s1_ptr += expert * ((INTER + BLOCK - 1) // BLOCK * ((K + BLOCK - 1) // BLOCK))
                s3_ptr += expert * ((INTER + BLOCK - 1) // BLOCK * ((K + BLOCK - 1) // BLOCK))
            h = _gate_up(x_ptr, w1_ptr, s1_ptr, w3_ptr, s3_ptr, row, INTER, K, ACT, N, BN, BK, PRECISION)
            _store_rows(h * shares[:, None], h_ptr + expert * INTER, row, INTER, E * INTER + SHARED, N, BN)


@triton.jit
def down_kernel(
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
    n, begin = tl.arange(0, N), split * EACH
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
        end, h = tl.minimum(begin + EACH, SHARED), h_ptr + E * INTER
        acc = _multiply(acc, h, shared_ptr, ss_ptr, row, D, begin, end, WIDTH, SHARED, N, BN, BK, PRECISION)
    _store_rows(acc, out_ptr + split * (N * D), row, D, D, N, BN)
