"""The operators of `model.py` that differ by device: FP8, products of groups, rows of experts, attention on a CPU.

FP8 here is `float8_e4m3fn`: a sign, 4 bits of exponent, 3 of mantissa, values up to 448. That is too little range for a
tensor, so each small block of it carries a float32 scale that maps the block's maximum to 448 (DeepSeek-V3
report, section 3.3.2):

    activations and gradients   one scale per 1×128 tile along the inner dimension     (rows, K) -> (rows, ⌈K/128⌉)
    weights                     one scale per 128×128 block                            (N, K) -> (⌈N/128⌉, ⌈K/128⌉)

A scale is what the stored value is multiplied by to get back: x ≈ q · s. The last block may be ragged.

A linear layer y = x Wᵀ is three products, all of them in FP8 while training: y itself, the gradient dx = dy W, and the
gradient dW = dyᵀ x. FP8 tensor cores read both operands along the dimension that is summed over, and so do the scales.
Hence the dimension of the sum decides how operands are quantised:

    y  = x · Wᵀ     over K      x in tiles along K         W in blocks
    dx = dy · W     over N      dy in tiles along N        the same blocks, transposed
    dW = dyᵀ · x    over rows   dyᵀ in tiles along rows    xᵀ in tiles along rows

So activations and gradients are quantised both ways in one pass, and a layer keeps xᵀ in FP8 for the backward pass,
half the memory of bfloat16. On a GPU, large activations are quantised by the kernel that computes them (a norm, the
gated activation of an MLP, the permutation to experts) and exist in FP8 only: `QuantizedActivation`.

Each function here is one function on all devices. Where a CUDA GPU multiplies FP8 (compute capability 8.9 or more) it
runs a kernel of `kernel.py`. Everywhere else it is plain torch with the same results: the products are those of the
dequantised operands in float32. `gemm_impl` chooses what linear layers do.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

gemm_impl: Literal["bf16", "fp8"] = "bf16"

BLOCK = 128
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # so that a scale's reciprocal is finite; all-zero blocks get this one
SCALE_FORMATS = (None, "ue8m0")
QUERY_BLOCK = 256  # of `blockwise_attention`: larger blocks compute more masked scores
meta_capability = 0, 0  # compute capability of the device that tensors on `meta` stand for: see `meta_tensors_of`


@contextmanager
def meta_tensors_of(device_capability: tuple[int, int]) -> Iterator[None]:
    """Within it, tensors on the meta device stand for those of a GPU of this compute capability."""
    global meta_capability
    meta_capability = device_capability
    try:
        yield
    finally:
        meta_capability = 0, 0


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a device that runs Triton kernels; (0, 0) for others."""
    return meta_capability if device.type == "meta" else _device_capability(device)


@cache
def _device_capability(device: torch.device) -> tuple[int, int]:
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None and torch.cuda.is_available()
    if not is_nvidia or importlib.util.find_spec("triton") is None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether a device has FP8 tensor cores that kernel.py can use."""
    return capability(device) >= (8, 9)


def grouped_products_wait(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `linear` and FP8's products wait for a GPU to send the sizes of groups, which no CUDA graph can."""
    if gemm_impl == "fp8":
        return not multiplies_fp8(device)
    return dtype != torch.bfloat16 or capability(device)[0] not in (9, 10)  # those of torch's own kernel


def kernels(x: torch.Tensor) -> Any:
    """The module `kernel_fused` where its kernels take tensors such as `x`: on a GPU, outside of torch.compile.

    None elsewhere: there plain torch computes the same, which torch.compile fuses.
    """
    if torch.compiler.is_compiling() or x.dtype not in (torch.bfloat16, torch.float32) or capability(x.device) < (8, 0):
        return None
    import kernel_fused

    return kernel_fused


def sparse_kernels(x: torch.Tensor, widest: int = 576) -> Any:
    """The module `kernel_sparse` where its kernels take queries such as `x`; else None, as `kernels`."""
    # Queries of more than 1,152 bytes need more than the 99 kB of shared memory that GPUs without HBM have.
    if kernels(x) is None or x.shape[-1] > widest or x.shape[-1] * x.element_size() > 1152:
        return None
    import kernel_sparse

    return kernel_sparse


def fuses_fp8(x: Any) -> bool:
    """Whether kernels quantise an activation such as `x` where they compute it; or it is a `QuantizedActivation`."""
    if isinstance(x, QuantizedActivation):
        return True
    return gemm_impl == "fp8" and kernels(x) is not None and multiplies_fp8(x.device)


def _runs_kernel(x: torch.Tensor, block_size: int = BLOCK) -> bool:
    """Whether a kernel of `kernel.py` takes this tensor."""
    return block_size == BLOCK and x.numel() > 0 and multiplies_fp8(x.device)


def _operator(function: Callable) -> Callable:
    """Makes a function one of torch's operators: to torch.compile each call is one node that it leaves as it is.

    `torch.library.custom_op` would do so too, but loads the compiler, seconds of it, with the first call.
    """
    name = function.__name__.lstrip("_")
    torch.library.define(f"bytegpt::{name}", torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(f"bytegpt::{name}", "default", function)
    operator = getattr(torch.ops.bytegpt, name).default

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Of meta tensors, torch takes the fake implementation, in which no kernel is met; the grouped ones have none.
        is_direct = meta_capability >= (8, 9) and not name.startswith("grouped")
        return (function if is_direct else operator)(*args, **kwargs)

    return call


# --- The format ---------------------------------------------------------------------------------------------------


@_operator
def act_quant(
    x: torch.Tensor, block_size: int = BLOCK, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises activations in tiles of 1×`block_size` along the last dimension.

    Args:
        x: Shape (..., K), any float dtype, contiguous or not. NaN or infinity makes its tile NaN when dequantised.
        block_size: Width of a tile; the last one may be narrower.
        scale_fmt: "ue8m0" rounds scales up to powers of two.

    Returns:
        The tiles' values, float8_e4m3fn (..., K), and their scales, float32 (..., ⌈K/block_size⌉); both contiguous.

    Raises:
        ValueError: `x` is of no float dtype, or another argument is out of range.
    """
    _check(x, block_size, scale_fmt)
    if _runs_kernel(x, block_size):
        import kernel

        q, s = kernel.act_quant(x.reshape(-1, x.shape[-1]), scale_fmt)
        return q.view(x.shape), s.view(*x.shape[:-1], -1)
    tiles = F.pad(x.float(), (0, -x.shape[-1] % block_size)).unflatten(-1, (-1, block_size))
    s = _scale(tiles.abs().amax(dim=-1), scale_fmt)
    return _to_e4m3((tiles * s.reciprocal().unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]]), s


@_operator
def act_quant_both(
    x: torch.Tensor, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantises activations along both dimensions: as the left operand of one product and the right one of another.

    Args:
        x: Shape (M, K), as for `act_quant`.
        scale_fmt: As for `act_quant`.

    Returns:
        `act_quant(x)` followed by `act_quant(x.T)`: (M, K), (M, ⌈K/128⌉), (K, M), (K, ⌈M/128⌉). The last of them lies
        in memory transposed, with the scales of the same 128 rows side by side, as the weight gradient reads them.
    """
    _check(x, BLOCK, scale_fmt)
    if _runs_kernel(x):
        import kernel

        return kernel.act_quant_both(x, scale_fmt)
    q_t, s_t = act_quant(x.T, BLOCK, scale_fmt)
    return *act_quant(x, BLOCK, scale_fmt), q_t, s_t.T.contiguous().T


@_operator
def weight_quant(
    w: torch.Tensor, block_size: int = BLOCK, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises weights in blocks of `block_size`×`block_size`.

    Args:
        w: Shape (..., N, K), any float dtype, contiguous or not; leading dimensions are a stack of matrices. NaN or
            infinity makes its block NaN when dequantised.
        block_size: Width and height of a block; those at the edges may be smaller.
        scale_fmt: "ue8m0" rounds scales up to powers of two.

    Returns:
        The values, float8_e4m3fn (..., N, K), and the scales, float32 (..., ⌈N/block_size⌉, ⌈K/block_size⌉).

    Raises:
        ValueError: `w` is of no float dtype or has less than two dimensions, or another argument is out of range.
    """
    _check(w, block_size, scale_fmt)
    if w.ndim < 2:
        raise ValueError(f"a weight must have two dimensions or more, got shape {list(w.shape)}")
    if _runs_kernel(w, block_size):
        import kernel

        return kernel.weight_quant(w, scale_fmt)
    n, k = w.shape[-2:]
    blocks = F.pad(w.float(), (0, -k % block_size, 0, -n % block_size))
    blocks = blocks.unflatten(-2, (-1, block_size)).unflatten(-1, (-1, block_size))  # (..., N blocks, ·, K blocks, ·)
    s = _scale(blocks.abs().amax(dim=(-3, -1)), scale_fmt)
    return _to_e4m3((blocks * s.reciprocal()[..., :, None, :, None]).flatten(-2).flatten(-3, -2)[..., :n, :k]), s


@_operator
def weight_quant_both(w: torch.Tensor, scale_fmt: str | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`weight_quant` in blocks of 128×128, and the transposed values, float8_e4m3fn (..., K, N), contiguous too."""
    if _runs_kernel(w):
        import kernel

        return kernel.weight_quant_both(w, scale_fmt)
    q, s = weight_quant(w, BLOCK, scale_fmt)
    return q, s, q.mT.clone(memory_format=torch.contiguous_format)


@_operator
def weight_dequant(
    q: torch.Tensor, s: torch.Tensor, block_size: int = BLOCK, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Turns quantised weights back: q · s in float32, then rounded to `dtype`.

    Args:
        q: float8_e4m3fn (..., N, K).
        s: Scales, float32 (..., ⌈N/block_size⌉, ⌈K/block_size⌉).
        block_size: Width and height of a block.
        dtype: Dtype to return.

    Returns:
        Shape (..., N, K), contiguous, on the device of the scales.

    Raises:
        ValueError: `q` is not FP8, or the scales do not fit it.
    """
    n, k = q.shape[-2:]
    wanted = (*q.shape[:-2], -(-n // block_size), -(-k // block_size))
    if q.dtype != E4M3 or s.shape != wanted:
        raise ValueError(
            f"weight {q.dtype} {list(q.shape)} needs scales {list(wanted)} of its {block_size}×{block_size} blocks, "
            f"got {list(s.shape)}"
        )
    if _runs_kernel(q, block_size):
        import kernel

        return kernel.weight_dequant(q, s, dtype)
    out, shift = torch.empty(q.shape, dtype=dtype, device=s.device), _shift(q, s)
    s = s.float().mul(2.0**shift).repeat_interleave(block_size, dim=-1)[..., :k]  # by column: (..., N blocks, K)
    # in bands of rows that stay in the cache from the cast to the store, and in one buffer: page faults of new memory
    # cost more than all of the arithmetic
    height = max(1, (1 << 18) // max(1, q[..., :block_size, :].numel())) * block_size
    buffer = torch.empty(q[..., :height, :].numel())
    bits = torch.empty(buffer.shape, dtype=torch.int16)
    for top in range(0, n, height):
        source, target = q[..., top : top + height, :], out[..., top : top + height, :]
        band = target if dtype == torch.float32 else buffer[: source.numel()].view(source.shape).to(s.device)
        _from_e4m3(source, band, shift, bits)
        scales = s[..., top // block_size : -(-(top + source.shape[-2]) // block_size), :]
        if full_blocks := source.shape[-2] // block_size:
            full_rows = band[..., : full_blocks * block_size, :].unflatten(-2, (full_blocks, block_size))
            full_rows.mul_(scales[..., :full_blocks, None, :])
        if full_blocks < scales.shape[-2]:  # the last block is ragged
            band[..., full_blocks * block_size :, :].mul_(scales[..., full_blocks:, :])
        if band is not target:
            target.copy_(band)
    return out


def act_dequant(q: torch.Tensor, s: torch.Tensor, block_size: int = BLOCK) -> torch.Tensor:
    """Turns quantised activations back: float32 (..., K) from what `act_quant` returns."""
    k, shift = q.shape[-1], _shift(q, s)
    values = torch.empty(q.shape, device=s.device)
    _from_e4m3(q, values, shift, torch.empty(q.numel(), dtype=torch.int16))
    tiles = F.pad(values, (0, -k % block_size)).unflatten(-1, (-1, block_size))
    return (tiles * (s * 2.0**shift).unsqueeze(-1)).flatten(-2)[..., :k]


def _check(x: torch.Tensor, block_size: int, scale_fmt: str | None) -> None:
    """Raises a ValueError for what cannot be quantised, or not so."""
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise ValueError(f"only float tensors of 16 bits or more can be quantised, got {x.dtype}")
    if block_size < 1:
        raise ValueError(f"block_size must be 1 or more, got {block_size}")
    if scale_fmt not in SCALE_FORMATS:
        raise ValueError(f"scale_fmt must be one of {SCALE_FORMATS}, got {scale_fmt!r}")


def _scale(amax: torch.Tensor, scale_fmt: str | None) -> torch.Tensor:
    """The scale that maps `amax`, float32, to E4M3's maximum; infinity and NaN stay as they are."""
    s = (amax / E4M3_MAX).clamp(min=SMALLEST_SCALE)
    if scale_fmt is None:
        return s
    # all mantissa bits that are not 0 carry into the exponent
    up = ((s.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(s.isfinite(), up, s)


@cache
def _fp8_device(device: torch.device) -> torch.device:
    """The device of a device's FP8 tensors: itself, or the CPU if it lacks the type, as MPS does until torch 2.14."""
    try:
        torch.zeros(1, device=device).to(E4M3)
    except (TypeError, RuntimeError):
        return torch.device("cpu")
    return device


def _to_e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.to(_fp8_device(x.device)).to(E4M3, memory_format=torch.contiguous_format)


def _shift(q: torch.Tensor, s: torch.Tensor) -> int:
    """The exponent that `_from_e4m3` leaves to the scales: 8 on a CPU, where it shifts bits, else 0.

    Also 0 if a scale is NaN, infinite or so large that the shifted one would be.
    """
    return 8 if q.device.type == "cpu" and s.numel() and s.abs().max() < 2.0**119 else 0


def _from_e4m3(q: torch.Tensor, out: torch.Tensor, shift: int, bits: torch.Tensor) -> None:
    """Writes FP8 values · 2^-shift as float32; with a shift of 8, by integer operations, faster than torch's cast.

    A float16 has the layout of e4m3 with one more bit of exponent and seven of mantissa. So `seeeemmm` moved to
    `s0eeeemmm0000000` is the value times 2^(7 - 15), subnormals included. NaN has to be restored.
    `out` is float32 in the shape of `q`, `shift` is from `_shift`, and `bits` is a buffer of an int16 per element.
    """
    if not shift:
        out.copy_(q)
    elif q.numel():
        codes = q.view(torch.int8)
        half = bits[: q.numel()].view(q.shape).copy_(codes)
        half.bitwise_left_shift_(7).bitwise_and_(-0x4001)  # the sign was extended, and is in two bits
        out.copy_(half.view(torch.float16))
        if codes.max() == 127 or codes.view(torch.uint8).max() == 255:  # all ones behind either sign
            out.masked_fill_(q.isnan(), float("nan"))


# Fake implementations for torch.compile: the shape, dtype and strides of each result.


@torch.library.register_fake("bytegpt::act_quant")
def _(x, block_size=BLOCK, scale_fmt=None):
    scales = *x.shape[:-1], -(-x.shape[-1] // block_size)
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(scales, dtype=torch.float32)


@torch.library.register_fake("bytegpt::act_quant_both")
def _(x, scale_fmt=None):
    (m, k), new = x.shape, x.new_empty
    s, s_t = (new(a, -(-b // BLOCK), dtype=torch.float32) for a, b in ((m, k), (k, m)))
    return new(m, k, dtype=E4M3), s, new(k, m, dtype=E4M3), s_t.view(-1, k).T


@torch.library.register_fake("bytegpt::weight_quant")
def _(w, block_size=BLOCK, scale_fmt=None):
    scales = *w.shape[:-2], -(-w.shape[-2] // block_size), -(-w.shape[-1] // block_size)
    return w.new_empty(w.shape, dtype=E4M3), w.new_empty(scales, dtype=torch.float32)


@torch.library.register_fake("bytegpt::weight_quant_both")
def _(w, scale_fmt=None):
    n, k = w.shape[-2:]
    q, q_t = (torch.empty(shape, dtype=E4M3, device=w.device) for shape in (w.shape, w.mT.shape))
    return q, w.new_empty(*w.shape[:-2], -(-n // BLOCK), -(-k // BLOCK), dtype=torch.float32), q_t


@torch.library.register_fake("bytegpt::weight_dequant")
def _(q, s, block_size=BLOCK, dtype=torch.bfloat16):
    return torch.empty(q.shape, dtype=dtype, device=s.device)


# --- Products -----------------------------------------------------------------------------------------------------


@_operator
def fp8_gemm(
    a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Multiplies quantised matrices, `a @ b.T`, summing in float32. Returns (..., N).

    Args:
        a: float8_e4m3fn (..., K), quantised by `act_quant`.
        a_s: Its scales, float32 (..., ⌈K/128⌉).
        b: float8_e4m3fn (N, K), quantised by `weight_quant` or by `act_quant`.
        b_s: Its scales, float32 (⌈N/128⌉, ⌈K/128⌉) or (N, ⌈K/128⌉).
        dtype: Dtype to return.

    Raises:
        ValueError: The operands or their scales do not fit each other.
    """
    _check_operands(a, a_s, b, b_s)
    if _runs_kernel(a):
        import kernel

        rows = a.reshape(-1, a.shape[-1]), a_s.reshape(-1, a_s.shape[-1])
        return kernel.gemm(*rows, b, b_s, dtype).view(*a.shape[:-1], len(b))
    return (act_dequant(a, a_s) @ _right_operand(b, b_s).mT).to(dtype)


@_operator
def fp8_grouped_gemm(
    a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor, offsets: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:  # fmt: skip
    """Multiplies consecutive groups of rows by a quantised weight each: `a[group g] @ b[g].T`.

    As `fp8_gemm` for `a` (rows, K), the rows of group 0 first, then those of group 1, ..., and `b` (groups, N, K) with
    scales of blocks; returns (rows, N). `offsets` has where each group's rows end, int32 (groups,), ascending, the last
    equal to `rows`.
    """
    _check_operands(a, a_s, b, b_s, offsets)
    if _runs_kernel(a):
        import kernel

        return kernel.grouped_gemm(a, a_s, b, b_s, offsets, dtype)
    return _grouped_mm(act_dequant(a, a_s), _right_operand(b, b_s).mT, offsets).to(dtype)


@_operator
def fp8_grouped_outer(
    a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor, offsets: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    """Multiplies consecutive groups of columns with each other: `a[:, group g] @ b[:, group g].T`.

    It is the weight gradient of `fp8_grouped_gemm`: (groups, N, K), zeros for an empty group. Both operands are
    transposed outputs of `act_quant_both`, (N, rows) and (K, rows) with scales (·, ⌈rows/128⌉); `offsets` is as there.
    A tile of 128 columns may span two groups, which share its scale.
    """
    _check_operands(a, a_s, b, b_s)
    if _runs_kernel(a):
        import kernel

        return kernel.grouped_outer(a, a_s, b, b_s, offsets, dtype)
    outer = _grouped_outer(act_dequant(b, b_s).mT, act_dequant(a, a_s).mT, offsets)
    return outer.mT.to(dtype, memory_format=torch.contiguous_format)


@_operator
def fp8_gemm_sum(
    a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor,
    a2: torch.Tensor, a2_s: torch.Tensor, b2: torch.Tensor, b2_s: torch.Tensor,
    offsets: torch.Tensor | None = None, dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:  # fmt: skip
    """Adds two products of equal shapes (M, N): each as `fp8_gemm`, or with `offsets` as `fp8_grouped_gemm`.

    A kernel rounds the sum once to `dtype`; plain torch rounds both products and then the sum.
    """
    _check_operands(a, a_s, b, b_s, offsets)
    _check_operands(a2, a2_s, b2, b2_s, offsets)
    if _runs_kernel(a):
        import kernel

        return kernel.gemm_sum([(a, a_s, b, b_s), (a2, a2_s, b2, b2_s)], offsets, dtype)
    return _gemm(a, a_s, b, b_s, offsets, dtype) + _gemm(a2, a2_s, b2, b2_s, offsets, dtype)


def _check_operands(
    a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor, offsets: torch.Tensor | None = None
) -> None:
    """Raises a ValueError for operands or scales that do not fit each other."""
    k_tiles, n = -(-a.shape[-1] // BLOCK), b.shape[-2]
    if a.dtype != E4M3 or b.dtype != E4M3:
        raise ValueError(f"both operands must be {E4M3}, got {a.dtype} and {b.dtype}")
    if a.shape[-1] != b.shape[-1] or (offsets is not None and len(b) != len(offsets)):
        raise ValueError(f"operands of shapes {list(a.shape)} and {list(b.shape)} do not fit each other")
    if a_s.shape != (*a.shape[:-1], k_tiles):
        raise ValueError(f"scales of {list(a.shape)} must be {[*a.shape[:-1], k_tiles]}, got {list(a_s.shape)}")
    if b_s.shape[:-2] != b.shape[:-2] or b_s.shape[-2] not in (n, -(-n // BLOCK)) or b_s.shape[-1] != k_tiles:
        raise ValueError(f"scales {list(b_s.shape)} fit neither the blocks nor the tiles of {list(b.shape)}")


def _right_operand(b: torch.Tensor, b_s: torch.Tensor) -> torch.Tensor:
    """Dequantises the right operand of a product, of blocks or tiles; float32."""
    return act_dequant(b, b_s) if b_s.shape[-2] == b.shape[-2] else weight_dequant(b, b_s, BLOCK, torch.float32)


@torch.library.register_fake("bytegpt::fp8_gemm")
def _(a, a_s, b, b_s, dtype=torch.bfloat16):
    return a_s.new_empty(*a.shape[:-1], b.shape[0], dtype=dtype)


@torch.library.register_fake("bytegpt::fp8_grouped_gemm")
def _(a, a_s, b, b_s, offsets, dtype=torch.bfloat16):
    return a_s.new_empty(a.shape[0], b.shape[1], dtype=dtype)


@torch.library.register_fake("bytegpt::fp8_gemm_sum")
def _(a, a_s, b, b_s, a2, a2_s, b2, b2_s, offsets=None, dtype=torch.bfloat16):
    return a_s.new_empty(a.shape[0], b.shape[-2], dtype=dtype)


@torch.library.register_fake("bytegpt::fp8_grouped_outer")
def _(a, a_s, b, b_s, offsets, dtype=torch.float32):
    return a_s.new_empty(offsets.shape[0], a.shape[0], b.shape[0], dtype=dtype)


# --- Linear layers ------------------------------------------------------------------------------------------------


class QuantizedWeight(NamedTuple):
    """A weight as the FP8 products read it.

    Attributes:
        q: float8_e4m3fn (..., N, K).
        s: Scales of its blocks, float32 (..., ⌈N/128⌉, ⌈K/128⌉).
        q_t: `q` transposed, (..., K, N), for the gradient of the input: contiguous where tensor cores read it.
    """

    q: torch.Tensor
    s: torch.Tensor
    q_t: torch.Tensor


def quantize(weight: torch.Tensor, scale_fmt: str | None = None, out: QuantizedWeight | None = None) -> QuantizedWeight:
    """Quantises the weight of a linear layer, for all products until it changes; into `out`, if given."""
    weight = weight.detach()
    if out is not None and _runs_kernel(weight):
        import kernel

        return QuantizedWeight(*kernel.weight_quant_both(weight, scale_fmt, out))
    if multiplies_fp8(weight.device):
        new = QuantizedWeight(*weight_quant_both(weight, scale_fmt))
    else:
        q, s = weight_quant(weight, BLOCK, scale_fmt)
        new = QuantizedWeight(q, s, q.mT)
    return new if out is None else QuantizedWeight(*(old.copy_(t) for old, t in zip(out, new, strict=True)))


class QuantizedActivation(NamedTuple):
    """An activation (..., K) of M rows in all, quantised by the kernel that computed it.

    Attributes:
        values: The activation itself, or a placeholder of its shape and dtype that holds NaN alone: gradients pass
            through it from the layers that read `q` to the operation that wrote it.
        q, s, q_t, s_t: What `act_quant_both` returns of it, or `act_quant` and twice None where no gradient is wanted.
    """

    values: torch.Tensor
    q: torch.Tensor
    s: torch.Tensor
    q_t: torch.Tensor | None
    s_t: torch.Tensor | None


Activation = Any  # torch.Tensor | QuantizedActivation: a checker of types cannot see from `gemm_impl` which it is


def values_of(x: Activation) -> torch.Tensor:
    """The tensor that gradients pass through: a placeholder if `x` exists in FP8 only."""
    return x.values if isinstance(x, QuantizedActivation) else x


def replace_values(x: Activation, change: Callable[[torch.Tensor], torch.Tensor]) -> Activation:
    """Applies an operation that changes gradients alone, such as a collective."""
    return x._replace(values=change(x.values)) if isinstance(x, QuantizedActivation) else change(x)


def _quantized_rows(x: Activation, scale_fmt: str | None, both: bool) -> tuple[torch.Tensor | None, ...]:
    """The four tensors of a `QuantizedActivation`, made now if it is a tensor."""
    if isinstance(x, QuantizedActivation):
        return x[1:]
    rows = x.reshape(-1, x.shape[-1])
    return act_quant_both(rows, scale_fmt) if both else (*act_quant(rows, BLOCK, scale_fmt), None, None)


def add_rms_norm(
    x: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float,
    scale_fmt: str | None, with_values: bool,
) -> tuple[torch.Tensor, QuantizedActivation]:  # fmt: skip
    """`model.RMSNorm.add` where `fuses_fp8(x)`: the sum, and its norm quantised, with its values if asked for."""
    import kernel_fused

    settings = scale_fmt, torch.is_grad_enabled(), with_values
    total, *norm = kernel_fused.add_rms_norm_quant(x, update, weight, eps, *settings)
    return total, QuantizedActivation(*norm)


def linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
    """Multiplies rows by a weight matrix, or consecutive groups of rows by one each (a mixture of experts).

    The weight is taken as it is stored, master weights in float32 for instance, and cast to the dtype of the
    activations. The cast is in the graph, so the gradient has the weight's own dtype.

    Args:
        x: Activations of shape (..., in_features), any float dtype; with `offsets` (rows, in_features), the rows of
            group 0 first, then those of group 1, and so on.
        weight: Weight of shape (out_features, in_features), any float dtype; with `offsets` one for each group,
            (groups, out_features, in_features).
        offsets: Where each group's rows end, int32 of shape (groups,), ascending, the last equal to `rows`. An empty
            group costs nothing.

    Returns:
        `x @ weight.T` of shape (..., out_features), in the dtype of `x`.
    """
    weight = weight.to(x.dtype)
    if offsets is None:
        return F.linear(x, weight)
    # torch's own kernel is for GPUs: bfloat16, and rows that start at multiples of 16 bytes
    if x.is_cuda and x.dtype == torch.bfloat16 and weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0:
        return F.grouped_mm(x, weight.mT, offs=offsets)
    return _grouped_mm(x, weight.mT, offsets)


def concat_weights(weights: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Concatenates weights (..., out_features, in_features) along out_features in one dtype, to share a product."""
    return _ConcatWeights.apply(dtype, *weights)


class _ConcatWeights(torch.autograd.Function):
    """Casts and concatenates in one pass: each weight is read once and written once; its gradient has its own dtype."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: torch.Tensor) -> torch.Tensor:
        ctx.dtypes, ctx.rows = [w.dtype for w in weights], [w.shape[-2] for w in weights]
        first = weights[0]
        out = torch.empty(*first.shape[:-2], sum(ctx.rows), first.shape[-1], dtype=dtype, device=first.device)
        for w, slot in zip(weights, out.split(ctx.rows, dim=-2), strict=True):
            slot.copy_(w)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = zip(grad.split(ctx.rows, dim=-2), ctx.dtypes, strict=True)
        return None, *(g.to(dtype, memory_format=torch.contiguous_format) for g, dtype in grads)


def fp8_linear(
    x: Activation, weights: Sequence[torch.Tensor], quantized: Sequence[QuantizedWeight],
    offsets: torch.Tensor | None = None, scale_fmt: str | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Multiplies the same rows by several weights, with all three products of each in FP8.

    The input is quantised once for all of them, and only its FP8 copy is kept for the backward pass.

    Args:
        x: As for `linear`, or quantised already.
        weights: The weights that get the gradients, in their own dtype. Their values are not read.
        quantized: The same weights, quantised.
        offsets: As for `linear`.
        scale_fmt: Format of the scales of activations and gradients.

    Returns:
        For each weight what `linear` returns.
    """
    operands, keep = [tensor for weight in quantized for tensor in weight], _needs_grad(x, weights)
    given = x[1:] if isinstance(x, QuantizedActivation) else None
    return _FP8Linear.apply(offsets, scale_fmt, keep, given, values_of(x), *operands, *weights)


def _needs_grad(x: Activation, weights: Sequence[torch.Tensor]) -> bool:
    """Whether there will be a backward pass."""
    return torch.is_grad_enabled() and (values_of(x).requires_grad or any(w.requires_grad for w in weights))


class _FP8Linear(torch.autograd.Function):
    """`fp8_linear`, with its inputs in a row: three tensors of each quantised weight, then the weights."""

    @staticmethod
    def forward(
        ctx: Any, offsets: torch.Tensor | None, scale_fmt: str | None, keep: bool,
        given: tuple[torch.Tensor, ...] | None, x: torch.Tensor, *operands: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        n = len(operands) // 4
        quantized = [QuantizedWeight(*operands[3 * i : 3 * i + 3]) for i in range(n)]
        q, s, q_t, s_t = given or _quantized_rows(x, scale_fmt, keep)
        if keep:
            ctx.save_for_backward(offsets, q_t, s_t, *(t for w in quantized for t in (w.q_t, w.s)))
            ctx.scale_fmt, ctx.shape, ctx.dtypes = scale_fmt, x.shape, [w.dtype for w in operands[3 * n :]]
        return tuple(_gemm(q, s, w.q, w.s, offsets, x.dtype).view(*x.shape[:-1], w.q.shape[-2]) for w in quantized)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (offsets, x_t, x_ts, *weights), n = ctx.saved_tensors, len(grads)
        quantised = [act_quant_both(grad.reshape(-1, grad.shape[-1]), ctx.scale_fmt) for grad in grads]
        grad_x = None
        if ctx.needs_input_grad[4]:
            operands = [(g, g_s, weights[2 * i], weights[2 * i + 1].mT) for i, (g, g_s, *_) in enumerate(quantised)]
            grad_x = _sum_of_products(operands, offsets, grads[0].dtype).view(ctx.shape)
        grad_weights = [
            _weight_grad(g_t, g_ts, x_t, x_ts, offsets, dtype) if needed else None
            for (_, _, g_t, g_ts), dtype, needed in zip(quantised, ctx.dtypes, ctx.needs_input_grad[-n:], strict=True)
        ]
        return None, None, None, None, grad_x, *[None] * (3 * n), *grad_weights


def fp8_mlp(
    x: Activation, weights: Sequence[torch.Tensor], quantized: Sequence[QuantizedWeight], hidden_act: str,
    offsets: torch.Tensor | None = None, scale_fmt: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """The gated MLP `w2(act(w1 x) · w3 x)` where `fuses_fp8(x)`, with all nine products in FP8.

    The hidden activation and the gradients of gate and up exist in FP8 only, written by the kernels that compute them:
    16 bytes of memory traffic an element beside the products, where separate quantisers make it 28.

    Args:
        x: As for `fp8_linear`.
        weights: Those of w1, w2 and w3: (inter_dim, dim), (dim, inter_dim), (inter_dim, dim), or stacks of them.
        quantized: The same weights, quantised.
        hidden_act: Name of the activation.
        offsets: As for `linear`; rows behind the last group are neither read nor written.
        scale_fmt: As for `fp8_linear`.

    Returns:
        Shape (..., dim), in the dtype of `x`.
    """
    operands, keep = [tensor for weight in quantized for tensor in weight], _needs_grad(x, weights)
    given = _quantized_rows(x, scale_fmt, keep)
    return _FP8MLP.apply(offsets, scale_fmt, hidden_act, keep, given, values_of(x), *operands, *weights)


class _FP8MLP(torch.autograd.Function):
    """`fp8_mlp`, with its inputs in a row: three tensors of each quantised weight, then the weights."""

    @staticmethod
    def forward(
        ctx: Any, offsets: torch.Tensor | None, scale_fmt: str | None, hidden_act: str, keep: bool,
        given: tuple[torch.Tensor, ...], x: torch.Tensor, *operands: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        import kernel_fused

        w1, w2, w3 = (QuantizedWeight(*operands[i : i + 3]) for i in (0, 3, 6))
        q, s, q_t, s_t = given
        gate, up = (_gemm(q, s, w.q, w.s, offsets, x.dtype) for w in (w1, w3))
        h, h_s, h_t, h_ts = kernel_fused.glu_quant(gate, up, hidden_act, offsets, scale_fmt, keep)
        if keep:
            weights = [t for w in (w1, w2, w3) for t in (w.q_t, w.s)]
            ctx.save_for_backward(offsets, gate, up, q_t, s_t, h_t, h_ts, *weights)
            ctx.settings, ctx.shape, ctx.dtypes = (hidden_act, scale_fmt), x.shape, [w.dtype for w in operands[9:]]
        return _gemm(h, h_s, w2.q, w2.s, offsets, x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        import kernel_fused

        offsets, gate, up, x_t, x_ts, h_t, h_ts, w1, w1_s, w2, w2_s, w3, w3_s = ctx.saved_tensors
        hidden_act, scale_fmt = ctx.settings
        g, g_s, g_t, g_ts = act_quant_both(grad.reshape(-1, grad.shape[-1]), scale_fmt)
        grad_h = _gemm(g, g_s, w2, w2_s.mT, offsets, grad.dtype)
        dgate, dup = kernel_fused.glu_backward_quant(gate, up, grad_h, hidden_act, offsets, scale_fmt)
        grad_x = None
        if ctx.needs_input_grad[5]:
            operands = [(dgate[0], dgate[1], w1, w1_s.mT), (dup[0], dup[1], w3, w3_s.mT)]
            grad_x = _sum_of_products(operands, offsets, grad.dtype).view(ctx.shape)
        pairs = (*dgate[2:], x_t, x_ts), (g_t, g_ts, h_t, h_ts), (*dup[2:], x_t, x_ts)
        grad_weights = [
            _weight_grad(*pair, offsets, dtype) if needed else None
            for pair, dtype, needed in zip(pairs, ctx.dtypes, ctx.needs_input_grad[15:], strict=True)
        ]
        return *[None] * 5, grad_x, *[None] * 9, *grad_weights


def _sum_of_products(
    operands: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]], offsets: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The sum of the products of each a, a_s, b, b_s: the gradient of an input that several weights read."""
    if len(operands) == 1:
        return _gemm(*operands[0], offsets, dtype)
    total = fp8_gemm_sum(*operands[0], *operands[1], offsets, dtype)
    return sum((_gemm(*operand, offsets, dtype) for operand in operands[2:]), total)


def _weight_grad(
    g_t: torch.Tensor, g_ts: torch.Tensor, x_t: torch.Tensor, x_ts: torch.Tensor, offsets: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The gradient of a weight, from those of the outputs and from the inputs, both quantised along the rows."""
    if offsets is None:
        return fp8_gemm(g_t, g_ts, x_t, x_ts, dtype)
    return fp8_grouped_outer(g_t, g_ts, x_t, x_ts, offsets, dtype)


def _gemm(
    a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor, offsets: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """`fp8_gemm`, or with `offsets` `fp8_grouped_gemm`."""
    if offsets is None:
        return fp8_gemm(a, a_s, b, b_s, dtype)
    return fp8_grouped_gemm(a, a_s, b, b_s, offsets, dtype)


def _rounded_rows(x: torch.Tensor, n: int) -> int:
    """The number of rows, `n` or more, with which a group of `n` is multiplied.

    On a CPU, oneDNN compiles a bfloat16 product for each new number of rows, which takes several times as long as the
    product of a small expert. There it is rounded up to one of eight counts between powers of two, which recur.
    """
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return n
    step = max(8, 1 << (n - 1).bit_length() >> 4)
    return -(-n // step) * step


# A loop over groups needs their sizes in Python: as an operator of its own it is one node of a compiled graph.
@_operator
def _grouped_mm(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`x[group g] @ weight[g]`: (rows, in), (groups, in, out) -> (rows, out)."""
    out = x.new_empty(len(x), weight.shape[2])
    for w, (start, end) in zip(weight, pairwise([0, *offsets.tolist()]), strict=True):
        rows = _rounded_rows(x, end - start)
        if start < end and start + rows <= len(x):  # the next groups overwrite what is behind this one
            torch.mm(x[start : start + rows], w, out=out[start : start + rows])
        elif start < end:
            out[start:end] = torch.mm(F.pad(x[start:end], (0, 0, 0, rows - end + start)), w)[: end - start]
    return out


@_operator
def _grouped_outer(x: torch.Tensor, grad: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`x[group g].T @ grad[group g]`, the gradient of the weights: (rows, in), (rows, out) -> (groups, in, out)."""
    # (groups, out, in) transposed, as the weight is: so the parameter gets a contiguous gradient
    out = x.new_zeros(len(offsets), grad.shape[1], x.shape[1])
    for w, (start, end) in zip(out, pairwise([0, *offsets.tolist()]), strict=True):
        if start < end:
            rows = _rounded_rows(x, end - start)
            padding = 0, 0, 0, rows - (end - start)
            # the next groups' rows are multiplied by zeros: no harm if they are finite, and else the step is skipped
            inputs = x[start : start + rows] if start + rows <= len(x) else F.pad(x[start:end], padding)
            torch.mm(F.pad(grad[start:end], padding).T, inputs, out=w)
    return out.transpose(1, 2)


@torch.library.register_fake("bytegpt::grouped_mm")
def _(x, weight, offsets):
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.register_fake("bytegpt::grouped_outer")
def _(x, grad, offsets):
    return x.new_empty(offsets.shape[0], grad.shape[1], x.shape[1]).transpose(1, 2)


def _grouped_mm_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    x, weight, offsets = ctx.saved_tensors
    grad_x = _grouped_mm(grad, weight.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    grad_weight = _grouped_outer(x, grad, offsets) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


torch.library.register_autograd(
    "bytegpt::grouped_mm",
    _grouped_mm_backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


# --- Routing, and rows of experts ---------------------------------------------------------------------------------


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x (N, dim), as `sort_by_expert` does, and x · weightᵀ, float32 (N, E), to the accuracy of float32."""
    if x.dtype == torch.bfloat16 and kernels(x):
        return _RouterLogits.apply(x, weight)
    return x, F.linear(x.float(), weight.float())


class _RouterLogits(torch.autograd.Function):
    """`router_logits` without a copy of x in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, weight)
        return x.view_as(x), _mm_in_parts(weight, 3, x.T).T.contiguous()

    @staticmethod
    def backward(ctx: Any, grad_x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        grad_x = torch.addmm(grad_x, grad.to(x.dtype), weight.to(x.dtype))
        return grad_x, _mm_in_parts(grad.T, 2, x).to(weight.dtype)


def _mm_in_parts(a: torch.Tensor, n: int, b: torch.Tensor) -> torch.Tensor:
    """a · b, float32, for b in bfloat16 and a as a sum of `n` parts in bfloat16, the first 8·n of its 24 bits."""
    parts = b.new_empty(n, *a.shape)
    for part in parts:
        a = a.float() - part.copy_(a)
    a = parts.flatten(0, 1)
    products = torch.mm(a, b, out_dtype=torch.float32) if b.is_cuda else a.float() @ b.float()
    return products.unflatten(0, (n, -1)).sum(dim=0)


def sort_by_expert(
    x: torch.Tensor, experts: torch.Tensor, n_experts: int, n_local: int, scale_fmt: str | None = None
) -> tuple[Activation, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Repeats each row of x (N, dim) for its `experts` (N, K), sorted by expert.

    Returns the rows (N·K, dim), where each choice stands among them (N, K), where each expert's rows end, int32, and x,
    for what else reads it: gradients are then summed in one pass. Rows of experts from `n_local` on are zeros. Where
    `fuses_fp8(x)`, the rows exist in FP8 only.
    """
    if kernel := kernels(x):
        places, index, ends = kernel.sort_by_expert(experts, n_experts)
        if fuses_fp8(x):
            limit, both = ends[n_local - 1 : n_local], torch.is_grad_enabled()
            values, x, *quantized = kernel.permute_quant(x, places, index, limit, scale_fmt, both)
            return QuantizedActivation(values, *quantized), places, ends, x
        rows, x = kernel.permute(x, places)
    else:
        in_order, order = experts.flatten().sort(stable=True)
        places = order.argsort().view_as(experts)
        ends = torch.searchsorted(in_order, torch.arange(n_experts, device=x.device), right=True).int()
        rows = _Permute.apply(x, order, places)
    if n_local < n_experts:
        rows = rows.where((torch.arange(len(rows), device=x.device) < ends[n_local - 1]).unsqueeze(1), 0)
    return rows, places, ends, x


def combine(
    x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, base: torch.Tensor | None = None
) -> torch.Tensor:
    """`base` plus sums (N, dim) of rows of x (N·K, dim) at `places` (N, K), weighted by `weights`, float32 (N, K)."""
    if kernel := kernels(x):
        return kernel.combine(x, places, weights, base)
    y = _sum_rows(x, places, weights.to(x.dtype))
    return y if base is None else y + base


def _sum_rows(x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """`combine` by torch's own operations, with weights in the dtype of `x`, or without."""
    if x.device.type not in ("cuda", "mps"):  # without a copy of the rows; on a GPU it has no gradient for bfloat16
        return F.embedding_bag(places, x, mode="sum", per_sample_weights=weights)
    rows = x.index_select(0, places.flatten()).unflatten(0, places.shape)
    return (rows if weights is None else rows * weights.unsqueeze(-1)).sum(dim=1)


class _Permute(torch.autograd.Function):
    """Repeats rows of `x` K times and sorts them: the gradient is a gather too, not a scatter of single rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, order // places.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _sum_rows(grad, places), None, None


# --- Attention ----------------------------------------------------------------------------------------------------


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Softmax attention of queries (B, S, H, d) over keys and values (B, T, H, ·); returns (B, S, H, d_v).

    `mask` (B or 1, 1, S, T) is True where a query may look. Without one it is causal with T = S, or of one query that
    may look everywhere. `scale` is the factor of the scores.
    """
    is_causal = False
    if mask is None and q.shape[1] > 1:  # a branch, so that a length that torch.compile leaves open decides here
        is_causal = True
    if is_causal and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[1] == k.shape[1]:
        return blockwise_attention(q, k, v, scale)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.is_meta and meta_capability > (0, 0):  # else the one that keeps all scores is taken, as on no GPU
        fused = torch.ops.aten._scaled_dot_product_cudnn_attention
        return fused(q, k, v, mask, True, 0.0, is_causal)[0].transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale).transpose(1, 2)


def blockwise_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal softmax attention as two matrix products per block of queries, over the keys up to its end.

    torch's fused attention does not use a CPU's bfloat16 products: this is two to three times as fast there, forward
    and backward. It keeps the probabilities for the backward pass: memory grows with the square of S, unlike torch's.

    Queries and keys are (B, S, H, d), values and the result (B, S, H, d_v); `scale` is the factor of the scores.
    """
    bsz, seqlen, heads, _ = q.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # (B·H, S, ·)
    blocks = []
    for start in range(0, seqlen, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, seqlen)
        hidden = torch.full((end - start, end), float("-inf"), dtype=q.dtype, device=q.device).triu(start + 1)
        scores = torch.baddbmm(hidden, q[:, start:end], k[:, :end].mT, alpha=scale)
        blocks.append(torch.bmm(scores.softmax(dim=-1), v[:, :end]))
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
    return out.unflatten(0, (bsz, heads)).transpose(1, 2)
