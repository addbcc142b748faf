"""FP8 on the CPU, against float64 and torch's own casts, from single codes to models that train in it.

The format: every quantised value is as near as e4m3 allows at its block's scale, bit for bit what torch's cast makes of
it, and NaN and infinity stay visible. The products: what float64 makes of the dequantised operands, up to float32's
summation. The layers: outputs and gradients of "quantise, dequantise, multiply", little enough kept for the backward
pass. The model: which layers take part, when weights are quantised, and that checkpoints stored in FP8 compute alike.
"""

import gc
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from conftest import randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fp8_ops
import model
from fp8_ops import E4M3, act_dequant, act_quant, act_quant_both, fp8_linear, quantize, weight_dequant, weight_quant
from model import Linear, ModelArgs, Transformer, project

VOCAB = 23
TINY = 2.0**-126  # the smallest normal float32
UNIT = 2.0**-24  # half a unit in the last place of a float32 in [1, 2)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FORMATS = [None, "ue8m0"]
dtypes = st.sampled_from(DTYPES)
formats = st.sampled_from(FORMATS)
seeds = st.integers(0, 2**31)


def draws(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products this small only lose by being shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def switches_restored() -> Iterator[None]:
    before = fp8_ops.gemm_impl, model.attn_impl
    yield
    fp8_ops.gemm_impl, model.attn_impl = before


@contextmanager
def switched(gemm: str, attention: str = "naive") -> Iterator[None]:
    """Sets both switches for a while."""
    before = fp8_ops.gemm_impl, model.attn_impl
    fp8_ops.gemm_impl, model.attn_impl = gemm, attention
    try:
        yield
    finally:
        fp8_ops.gemm_impl, model.attn_impl = before


# --- the format in float64: one block after the other ----------------------------------------------------------------


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def blocks_of(size: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, size)) for start in range(0, size, block)]


def scale_of(amax: torch.Tensor, scale_fmt: str | None) -> torch.Tensor:
    """amax/448 in float32 but no subnormal; or the smallest power of two that is not below it. Returned in float64."""
    wanted = (amax / 448).clamp(min=TINY)
    if scale_fmt is None:
        # a quotient rounded to float64 first rounds to the same float32 as the exact one: 53 >= 2 · 24 + 2 bits
        return wanted.float().double()
    mantissa, exponent = torch.frexp(wanted)  # wanted = mantissa · 2^exponent, mantissa in [0.5, 1)
    return 2.0 ** (exponent - (mantissa == 0.5).int()).double()


def quantised(
    x: torch.Tensor, kind: str, block_size: int = 128, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finite `x` in "tiles" or "blocks", by torch's own cast to e4m3 of x · (1/s), each step rounded to float32."""
    if kind == "tiles":  # each row is a matrix of its own
        q, s = quantised(x.unsqueeze(-2), "blocks", block_size, scale_fmt)
        return q.squeeze(-2), s.squeeze(-2)
    x = x.float().double()
    q = torch.empty(x.shape, dtype=E4M3)
    heights, widths = (blocks_of(n, block_size) for n in x.shape[-2:])
    s = torch.empty(*x.shape[:-2], len(heights), len(widths), dtype=torch.float64)
    for i, rows in enumerate(heights):
        for j, columns in enumerate(widths):
            block = x[..., rows, columns]
            scale = scale_of(block.abs().amax(dim=(-2, -1)), scale_fmt)
            s[..., i, j] = scale
            # products of two float32 are exact in float64
            q[..., rows, columns] = (block * (1 / scale).float().double()[..., None, None]).float().to(E4M3)
    return q, s.float()


def spread(s: torch.Tensor, kind: str, shape: torch.Size, block_size: int = 128) -> torch.Tensor:
    """Scales in float64, one for each element."""
    s = s.double().repeat_interleave(block_size, dim=-1)[..., : shape[-1]]
    return s if kind == "tiles" else s.repeat_interleave(block_size, dim=-2)[..., : shape[-2], :]


def exact(q: torch.Tensor, s: torch.Tensor, kind: str, block_size: int = 128) -> torch.Tensor:
    """q · s in float64, where it is exact, with torch's own cast from e4m3."""
    return q.double() * spread(s, kind, q.shape, block_size)


def round_trip(x: torch.Tensor, kind: str, scale_fmt: str | None = None) -> torch.Tensor:
    q, s = quantised(x, kind, scale_fmt=scale_fmt)
    return exact(q, s, kind)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Equal in dtype, shape and every bit, the sign of zeros included; NaN is NaN."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.dtype.itemsize]
    nan, wanted_nan = actual.double().isnan(), expected.double().isnan()
    assert torch.equal(nan, wanted_nan), what
    different = (actual.contiguous().view(bits) != expected.contiguous().view(bits)) & ~nan
    assert not different.any(), f"{what}: {int(different.sum())} of {different.numel()} differ"


def assert_within(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor, what: str = "") -> None:
    """Every element within its own bound; NaN never is."""
    assert actual.shape == expected.shape, what
    error = (actual.detach().double() - expected).abs()
    good = error <= bound
    assert good.all(), (
        f"{what}: {int((~good).sum())} of {good.numel()} off, by up to {(error / bound).max():.3f} bounds"
    )


def spy(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """Records the arguments of every call of a function of fp8_ops."""
    calls: list[tuple[Any, ...]] = []
    function = getattr(fp8_ops, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(fp8_ops, name, wrapper)
    return calls


# --- quantising ------------------------------------------------------------------------------------------------------


def values(kind: str, shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers of one kind, in the whole range of `dtype`, or of float32 where that is narrower."""
    source = generator(seed)
    info = torch.finfo(dtype if dtype != torch.float64 else torch.float32)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=source, dtype=torch.float64)

    sign = torch.where(uniform(-1, 1) < 0, -1.0, 1.0).double()
    smallest, largest = float(info.smallest_normal) * info.eps, float(info.max)
    if kind == "normal":
        x = sign * (-2 * uniform(1e-9, 1).log()).sqrt()
    elif kind == "tiny":  # around and below the smallest normal number
        x = sign * smallest * torch.floor(2 ** uniform(0, math.log2(1 / info.eps) + 10))
    elif kind == "huge":
        x = sign * largest * uniform(0.25, 1)
        x[..., :1] = largest
    elif kind == "zeros":
        x = 0 * sign
    elif kind == "outlier":
        x = 1e-3 * uniform(-1, 1)
        if x.numel():
            x.view(-1)[int(torch.randint(x.numel(), (), generator=source))] = 3e4
    elif kind == "wide":  # all exponents there are
        x = sign * 2 ** uniform(math.log2(smallest), math.log2(largest))
    else:  # "ties": halfway between neighbours, or nearly so, once the scale is 1
        codes = torch.arange(127, dtype=torch.uint8).view(E4M3).double()
        middle = (codes[1:] + codes[:-1]) / 2
        pick = torch.randint(len(middle), tuple(shape), generator=source)
        x = sign * middle[pick] * (1 + info.eps * torch.randint(-1, 2, tuple(shape), generator=source))
        x[..., :1] = 448
    return x.to(dtype)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, not contiguous."""
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "strided":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "reordered":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    return x


KINDS = ["normal", "tiny", "huge", "zeros", "outlier", "wide", "ties"]
LAYOUTS = ["contiguous", "transposed", "strided", "reordered"]


class Sample(NamedTuple):
    """A tensor to quantise, and how."""

    x: torch.Tensor
    block_size: int
    scale_fmt: str | None


@st.composite
def samples(draw: st.DrawFn, stacked: bool = True) -> Sample:
    block_size = draw(st.sampled_from([128, 128, 1, 7, 32, 64, 200]))
    side = st.one_of(st.integers(0, 2 * block_size + 3), st.sampled_from([block_size, 2 * block_size]))
    stack = draw(st.lists(st.integers(0, 3), max_size=2)) if stacked else []
    shape = [*stack, draw(side) if math.prod(stack) < 4 else draw(st.integers(0, 40)), draw(side)]
    x = values(draw(st.sampled_from(KINDS)), shape, draw(dtypes), draw(seeds))
    return Sample(laid_out(x, draw(st.sampled_from(LAYOUTS))), block_size, draw(formats))


def check_quantised(sample: Sample, kind: str, q: torch.Tensor, s: torch.Tensor) -> None:
    """The format's definition, the format's bound, and equality with torch's own cast."""
    x, block_size, scale_fmt = sample
    assert q.is_contiguous()
    assert s.is_contiguous()
    expected_q, expected_s = quantised(x, kind, block_size, scale_fmt)
    assert_same_bits(s, expected_s, "scales")
    assert_same_bits(q, expected_q, "values")
    if x.numel() == 0:
        return
    # |x - q s| is at most half of the distance that e4m3 numbers have at |x|/s: 2^(e - 3), but not below 2^-9.
    # On top come the roundings to float32 of x (from float64 only), 1/s and x · (1/s), each 2^-24 of the value,
    # or 2^-150 where x is subnormal. In all less than 2e-7 of |x|.
    scale, x = spread(s, kind, x.shape, block_size), x.double()
    _, exponent = torch.frexp(x.abs() / scale)  # |x|/s in [2^(exponent - 1), 2^exponent)
    half_ulp = 2.0 ** (exponent - 4).clamp(min=-9).double() / 2
    assert_within(exact(q, s, kind, block_size), x, scale * half_ulp + 3 * UNIT * x.abs() + 2.0**-150)


@draws(30)
@given(samples())
def test_act_quant(sample: Sample) -> None:
    q, s = act_quant(*sample)
    check_quantised(sample, "tiles", q, s)
    assert_same_bits(act_dequant(q, s, sample.block_size), exact(q, s, "tiles", sample.block_size).float())


@draws(30)
@given(samples(stacked=False))
def test_act_quant_both(sample: Sample) -> None:
    x, scale_fmt = sample.x, sample.scale_fmt
    q, s, q_t, s_t = act_quant_both(x, scale_fmt)
    check_quantised(Sample(x, 128, scale_fmt), "tiles", q, s)
    assert s_t.T.is_contiguous()  # the scales of the same 128 rows side by side
    check_quantised(Sample(x.T, 128, scale_fmt), "tiles", q_t, s_t.contiguous())


@draws(30)
@given(samples())
def test_weight_quant(sample: Sample) -> None:
    q, s = weight_quant(*sample)
    check_quantised(sample, "blocks", q, s)


@pytest.mark.parametrize("scale_fmt", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_in_every_dtype(kind: str, dtype: torch.dtype, scale_fmt: str | None) -> None:
    x = values(kind, (2, 130, 259), dtype, seed=1)
    check_quantised(Sample(x, 128, scale_fmt), "tiles", *act_quant(x, scale_fmt=scale_fmt))
    check_quantised(Sample(x, 128, scale_fmt), "blocks", *weight_quant(x, scale_fmt=scale_fmt))


def test_vectors_and_many_dimensions() -> None:
    """Tiles are along the last dimension of whatever there is, a single row or none before it."""
    x = normal(2, 3, 4, 5, 150)
    q, s = act_quant(x)
    assert (q.shape, s.shape) == ((2, 3, 4, 5, 150), (2, 3, 4, 5, 2))
    row_q, row_s = act_quant(x[1, 2, 3, 4])
    assert_same_bits(q[1, 2, 3, 4], row_q)
    assert_same_bits(s[1, 2, 3, 4], row_s)
    check_quantised(Sample(x[0, 0, 0], 128, None), "tiles", q[0, 0, 0], s[0, 0, 0])


@pytest.mark.parametrize("scale_fmt", FORMATS)
def test_scales_next_to_powers_of_two(scale_fmt: str | None) -> None:
    """Largest values at, just below and just above 448 · 2^k, for every k that float32 has."""
    powers = 448 * 2.0 ** torch.arange(-149, 119, dtype=torch.float64)
    around = powers.float()
    around = torch.cat([around, around.nextafter(torch.tensor(0.0)), around.nextafter(torch.tensor(math.inf))])
    around = around[around.isfinite()]
    q, s = act_quant(around[:, None], scale_fmt=scale_fmt)
    assert_same_bits(s, scale_of(around.double(), scale_fmt).float()[:, None])
    if scale_fmt == "ue8m0":
        wanted = (around.double() / 448).clamp(min=TINY)
        mantissa, _ = torch.frexp(s.flatten())
        assert (mantissa == 0.5).all()
        assert (s.flatten().double() >= wanted).all()
        assert (s.flatten().double() / 2 < wanted).all()
    # the largest value of a block is stored as 448, or the power of two below that the scale was rounded up by
    full = s.flatten().double() * 448 <= around.double() * (1 + 1e-6)
    assert (q.double().flatten()[full] == 448).all()
    assert full.sum() > 200


def test_all_zero_block_gives_zeros() -> None:
    x = torch.zeros(130, 300, dtype=torch.bfloat16)
    x[129, 299] = 1.0
    for q, s in (act_quant(x), weight_quant(x)):
        assert q.double().count_nonzero() == 1
        assert s.isfinite().all()
        assert (s > 0).all()


@pytest.mark.parametrize("scale_fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_stays_visible_in_its_block_alone(bad: float, dtype: torch.dtype, scale_fmt: str | None) -> None:
    """Read back, the block is NaN throughout, and every other block is what it is without."""
    clean = normal(2, 200, 300, dtype=dtype)
    clean[1, 5] = 0  # a NaN among zeros too
    for row, column in ((5, 140), (150, 299), (0, 0), (127, 128)):
        x = clean.clone()
        x[1, row, column] = bad
        tile = torch.zeros_like(x, dtype=torch.bool)
        tile[1, row, column // 128 * 128 : column // 128 * 128 + 128] = True
        q, s = act_quant(x, scale_fmt=scale_fmt)
        back, without = act_dequant(q, s), act_dequant(*act_quant(clean, scale_fmt=scale_fmt))
        assert torch.equal(back.isnan(), tile)
        assert torch.equal(back[~tile], without[~tile])

        block = torch.zeros_like(tile)
        block[1, row // 128 * 128 : row // 128 * 128 + 128, column // 128 * 128 : column // 128 * 128 + 128] = True
        q, s = weight_quant(x, scale_fmt=scale_fmt)
        for out in (torch.float32, torch.bfloat16):
            back = weight_dequant(q, s, dtype=out)
            without = weight_dequant(*weight_quant(clean, scale_fmt=scale_fmt), dtype=out)
            assert torch.equal(back.isnan(), block)
            assert torch.equal(back[~block], without[~block])

        parts = act_quant_both(x[1], scale_fmt)
        assert torch.equal(act_dequant(*parts[:2]).isnan(), tile[1])
        across = torch.zeros_like(tile[1])
        across[row // 128 * 128 : row // 128 * 128 + 128, column] = True
        assert torch.equal(act_dequant(*parts[2:]).isnan(), across.T)


def test_too_large_for_float32_stays_visible() -> None:
    x = torch.tensor([[1e300, 1.0]], dtype=torch.float64)
    for q, s in (act_quant(x), weight_quant(x)):
        assert act_dequant(q, s).isnan().all()


@pytest.mark.parametrize("scale_fmt", FORMATS)
def test_quantising_changes_nothing_else(scale_fmt: str | None) -> None:
    """The input stays as it is, and no output shares its memory."""
    x = normal(130, 130)
    before = x.clone()
    outputs = [*act_quant(x, 128, scale_fmt), *act_quant_both(x, scale_fmt), *weight_quant(x, 128, scale_fmt)]
    pointers = {t.untyped_storage().data_ptr() for t in [x, *outputs]}
    assert len(pointers) == 1 + len(outputs)
    assert_same_bits(x, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: act_quant(torch.ones(3, 4, dtype=torch.int32)), "float.*int32"),
        (lambda: act_quant(torch.ones(3, 4, dtype=torch.bool)), "float.*bool"),
        (lambda: act_quant(torch.ones(3, 4).to(E4M3)), "float.*float8_e4m3fn"),
        (lambda: act_quant(torch.ones(3, 4, dtype=torch.complex64)), "float.*complex64"),
        (lambda: act_quant(torch.ones(3, 4), 0), "block_size.*0"),
        (lambda: act_quant(torch.ones(3, 4), -1), "block_size.*-1"),
        (lambda: act_quant(torch.ones(3, 4), 128, "e8m0"), "scale_fmt.*e8m0"),
        (lambda: act_quant_both(torch.ones(3, 4, dtype=torch.int8)), "float.*int8"),
        (lambda: act_quant_both(torch.ones(3, 4), ""), "scale_fmt"),
        (lambda: weight_quant(torch.ones(3, 4, dtype=torch.int64)), "float.*int64"),
        (lambda: weight_quant(torch.ones(3, 4).to(E4M3)), "float.*float8_e4m3fn"),
        (lambda: weight_quant(torch.ones(3, 4), 0), "block_size.*0"),
        (lambda: weight_quant(torch.ones(3, 4), 128, "UE8M0"), "scale_fmt.*UE8M0"),
        (lambda: weight_quant(torch.ones(4)), r"two dimensions.*\[4\]"),
        (lambda: weight_dequant(torch.ones(3, 4), torch.ones(1, 1)), "float32"),
        (lambda: weight_dequant(torch.ones(3, 4).to(torch.float8_e5m2), torch.ones(1, 1)), "float8_e5m2"),
        (lambda: weight_dequant(torch.ones(200, 4).to(E4M3), torch.ones(1, 1)), r"\[2, 1\].*\[1, 1\]"),
        (lambda: weight_dequant(torch.ones(200, 4).to(E4M3), torch.ones(2, 1), 64), r"\[4, 1\].*\[2, 1\]"),
        (lambda: weight_dequant(torch.ones(2, 9, 4).to(E4M3), torch.ones(1, 1)), r"\[2, 1, 1\].*\[1, 1\]"),
        (lambda: weight_dequant(torch.ones(9, 4).to(E4M3), torch.ones(1)), r"\[1, 1\].*\[1\]"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- dequantising ----------------------------------------------------------------------------------------------------


def codes(*shape: int, seed: int = 0, nan: bool = False) -> torch.Tensor:
    """Random codes of e4m3, of which two in 256 are NaN."""
    drawn = torch.randint(256, shape, generator=generator(seed), dtype=torch.uint8)
    if not nan:
        drawn[drawn & 0x7F == 0x7F] = 0x3A
    return drawn.view(E4M3)


def test_all_codes() -> None:
    """Each of the 256, NaN and both zeros among them, is what torch's own cast makes of it."""
    every = torch.arange(256, dtype=torch.uint8).view(E4M3)
    expected = every.float()
    assert expected.isnan().sum() == 2
    assert_same_bits(act_dequant(every, torch.ones(2)), expected)
    for q in (every.view(16, 16), every.view(16, 16).T, every[None, ::3], every.view(2, 8, 16)):
        ones = torch.ones(*q.shape[:-2], 1, -(-q.shape[-1] // 128))
        for dtype in DTYPES:
            assert_same_bits(weight_dequant(q, ones, dtype=dtype), q.float().to(dtype))


def dequantised_blockwise(q: torch.Tensor, s: torch.Tensor, block_size: int) -> torch.Tensor:
    """`q.to(float32) * s`, block after block."""
    out = torch.empty(q.shape)
    for i, rows in enumerate(blocks_of(q.shape[-2], block_size)):
        for j, columns in enumerate(blocks_of(q.shape[-1], block_size)):
            out[..., rows, columns] = q[..., rows, columns].to(torch.float32) * s[..., i, j, None, None]
    return out


def check_dequantised(q: torch.Tensor, s: torch.Tensor, block_size: int, dtype: torch.dtype) -> None:
    out = weight_dequant(q, s, block_size, dtype)
    assert out.is_contiguous()
    expected = dequantised_blockwise(q, s, block_size)
    assert_same_bits(out, expected.to(dtype))
    # and correctly rounded: half a unit in the last place, after the product's own rounding to float32
    true, info = exact(q, s, "blocks", block_size), torch.finfo(dtype)
    fits = true.abs() < float(info.max)
    bound = (float(info.eps) / 2 + UNIT) * true.abs() + float(info.smallest_normal * info.eps) / 2 + 2.0**-150
    assert_within(out[fits], true[fits], bound[fits])


@st.composite
def stored_weights(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    block_size = draw(st.sampled_from([128, 128, 1, 7, 64, 200]))
    side = st.one_of(st.integers(0, 2 * block_size + 3), st.sampled_from([block_size, 2 * block_size]))
    shape = [*draw(st.lists(st.integers(1, 3), max_size=2)), draw(side), draw(side)]
    seed = draw(seeds)
    q = laid_out(
        codes(*shape, seed=seed, nan=draw(st.booleans())).view(torch.uint8), draw(st.sampled_from(LAYOUTS[:2]))
    )
    grid = [-(-n // block_size) for n in shape[-2:]]
    s = torch.exp(normal(*shape[:-2], *grid, seed=seed)) * draw(st.sampled_from([1e-3, 1.0, 1e-38, 1e35]))
    return q.view(E4M3), laid_out(s, draw(st.sampled_from(LAYOUTS[:2]))), block_size


@draws(30)
@given(stored_weights(), dtypes)
def test_weight_dequant(stored: tuple[torch.Tensor, torch.Tensor, int], dtype: torch.dtype) -> None:
    check_dequantised(*stored, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        ((300, 4096), 128),  # bands of 1 block, the last of them ragged
        ((300, 5000), 128),  # more than a band in one block
        ((700, 1100), 128),  # 3 blocks, then 2 whole ones and a ragged one
        ((768, 2048), 128),  # all whole
        ((520, 1024), 128),  # 4 blocks, then nothing but a ragged one
        ((3, 400, 700), 128),  # a stack: 1 block of each
        ((2, 2, 300, 400), 128),
        ((90, 9000), 16),
        ((1, 600000), 128),
        ((600000, 1), 128),
    ],
)
def test_weight_dequant_in_bands(shape: tuple[int, ...], block_size: int, dtype: torch.dtype) -> None:
    """Sizes at which it works in several bands of rows."""
    q = codes(*shape)
    s = torch.exp(normal(*shape[:-2], *(-(-n // block_size) for n in shape[-2:])))
    expected = (q.float() * spread(s, "blocks", q.shape, block_size).float()).to(dtype)
    assert_same_bits(weight_dequant(q, s, block_size, dtype), expected)


def test_weight_dequant_defaults_to_bfloat16() -> None:
    q, s = weight_quant(normal(130, 130))
    assert_same_bits(weight_dequant(q, s), weight_dequant(q, s, 128, torch.bfloat16))
    assert weight_dequant(q, s).dtype == torch.bfloat16


@draws(20)
@given(st.integers(1, 300), st.integers(1, 300), seeds, formats)
def test_quantising_twice_is_quantising_once(n: int, k: int, seed: int, scale_fmt: str | None) -> None:
    """What has gone through FP8 goes through it unharmed: values in power-of-two scales, and their products."""
    w = normal(n, k, seed=seed)
    once = weight_dequant(*weight_quant(w, 128, scale_fmt), dtype=torch.float32)
    twice = weight_dequant(*weight_quant(once, 128, scale_fmt), dtype=torch.float32)
    torch.testing.assert_close(twice, once, rtol=2**-22, atol=0)


# --- products --------------------------------------------------------------------------------------------------------


def sum_bound(terms: int, magnitude: torch.Tensor, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far a sum of products may be off.

    Args:
        terms: Number of products summed.
        magnitude: The sum of their absolute values.
        value: The exact sum.
        dtype: What it was rounded to in the end.

    Returns:
        In float32, two roundings for each operand (its own and the product's) and one for each addition, in whatever
        order: (terms + 3) · 2^-24 of the magnitude. Then half a unit in the last place of `dtype`.
    """
    in_float32 = 1.01 * (terms + 3) * UNIT * magnitude
    return in_float32 + torch.finfo(dtype).eps / 2 * (value.abs() + in_float32) + 1e-40


def rows_quantised(rows: int, k: int, seed: int, scale_fmt: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    return act_quant(normal(rows, k, seed=seed) * torch.exp(3 * normal(rows, 1, seed=seed + 1)), 128, scale_fmt)


edges = st.one_of(st.integers(1, 300), st.sampled_from([1, 127, 128, 129, 256]))
out_dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@draws(30)
@given(
    st.lists(st.integers(0, 4), max_size=2),
    edges,
    edges,
    edges,
    st.sampled_from(["blocks", "tiles"]),
    out_dtypes,
    seeds,
)
def test_fp8_gemm(batch: list[int], rows: int, n: int, k: int, kind: str, dtype: torch.dtype, seed: int) -> None:
    """Against float64, with weights by blocks or by rows, and any dimensions in front."""
    shape = [*batch, rows if not batch else min(rows, 9)]
    a, a_s = act_quant(normal(*shape, k, seed=seed))
    b, b_s = (weight_quant if kind == "blocks" else act_quant)(normal(n, k, seed=seed + 1))
    out = fp8_ops.fp8_gemm(a, a_s, b, b_s, dtype)
    assert out.dtype == dtype
    left, right = exact(a, a_s, "tiles"), exact(b, b_s, kind)
    value, magnitude = left @ right.T, left.abs() @ right.abs().T
    assert out.shape == (*shape, n)
    assert_within(out, value, sum_bound(k, magnitude, value, dtype))


def test_fp8_gemm_takes_transposed_weights() -> None:
    """The gradient of the input multiplies by the same blocks, transposed, without copying them."""
    a, a_s = act_quant(normal(5, 300))
    b, b_s = weight_quant(normal(300, 200, seed=1))
    out = fp8_ops.fp8_gemm(a, a_s, b.T, b_s.T, torch.float32)
    left, right = exact(a, a_s, "tiles"), exact(b, b_s, "blocks")
    assert_within(out, left @ right, sum_bound(300, left.abs() @ right.abs(), left @ right, torch.float32))
    assert fp8_ops.fp8_gemm(a, a_s, b.T, b_s.T).dtype == torch.bfloat16


def ends_of(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def slices_of(counts: Sequence[int]) -> list[slice]:
    ends = ends_of(counts).tolist()
    return [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]


counts_of_rows = st.one_of(
    st.lists(st.one_of(st.just(0), st.integers(0, 150), st.sampled_from([127, 128, 129])), min_size=1, max_size=4),
    st.sampled_from([[0, 0], [0, 200, 0], [128, 128], [1, 1, 1], [64, 64, 72], [300]]),
)


@draws(30)
@given(counts_of_rows, st.integers(1, 200), st.integers(1, 280), out_dtypes, seeds)
def test_fp8_grouped_gemm(counts: list[int], n: int, k: int, dtype: torch.dtype, seed: int) -> None:
    """Group by group against float64; groups may be empty and end anywhere."""
    a, a_s = rows_quantised(sum(counts), k, seed)
    b, b_s = weight_quant(normal(len(counts), n, k, seed=seed + 2))
    out = fp8_ops.fp8_grouped_gemm(a, a_s, b, b_s, ends_of(counts), dtype)
    assert (out.dtype, out.shape) == (dtype, (sum(counts), n))
    left, right = exact(a, a_s, "tiles"), exact(b, b_s, "blocks")
    for rows, weight in zip(slices_of(counts), right, strict=True):
        value, magnitude = left[rows] @ weight.T, left[rows].abs() @ weight.abs().T
        assert_within(out[rows], value, sum_bound(k, magnitude, value, dtype))


@draws(30)
@given(counts_of_rows, st.integers(1, 200), st.integers(1, 200), out_dtypes, formats, seeds)
def test_fp8_grouped_outer(
    counts: list[int], n: int, k: int, dtype: torch.dtype, scale_fmt: str | None, seed: int
) -> None:
    """Group by group against float64, where a border runs through a tile; zeros for a group that is empty."""
    rows = sum(counts)
    a, a_s = rows_quantised(n, rows, seed, scale_fmt)
    b, b_s = rows_quantised(k, rows, seed + 2, scale_fmt)
    out = fp8_ops.fp8_grouped_outer(a, a_s, b, b_s, ends_of(counts), dtype)
    assert (out.dtype, out.shape) == (dtype, (len(counts), n, k))
    assert out.is_contiguous()
    left, right = exact(a, a_s, "tiles"), exact(b, b_s, "tiles")
    for columns, count, actual in zip(slices_of(counts), counts, out, strict=True):
        one, two = left[:, columns], right[:, columns]
        value, magnitude = one @ two.T, one.abs() @ two.abs().T
        assert_within(actual, value, sum_bound(count, magnitude, value, dtype))
        assert count or not actual.count_nonzero()


@pytest.mark.parametrize("name", ["fp8_gemm", "fp8_grouped_gemm", "fp8_grouped_outer"])
def test_products_keep_nan_visible(name: str) -> None:
    x, w = normal(4, 140), normal(3, 140, seed=1)
    x[1, 130] = math.nan
    (a, a_s), ends = act_quant(x), ends_of([2, 2])
    if name == "fp8_gemm":
        nan = fp8_ops.fp8_gemm(a, a_s, *weight_quant(w)).isnan()
        expected = torch.tensor([0, 1, 0, 0])[:, None].expand(4, 3)
    elif name == "fp8_grouped_gemm":
        nan = fp8_ops.fp8_grouped_gemm(a, a_s, *weight_quant(w.expand(2, 3, 140)), ends).isnan()
        expected = torch.tensor([0, 1, 0, 0])[:, None].expand(4, 3)
    else:
        nan = fp8_ops.fp8_grouped_outer(a, a_s, *act_quant(w), ends_of([128, 12])).isnan()
        expected = torch.zeros(2, 4, 3)
        expected[1, 1] = 1
    assert torch.equal(nan, expected.bool())


def test_bad_operands() -> None:
    """Operands and scales that do not fit each other are refused, and the message shows what was given."""
    (a, a_s), (b, b_s), (stack, stack_s) = (
        act_quant(normal(6, 200)),
        weight_quant(normal(140, 200)),
        weight_quant(normal(3, 140, 200)),
    )
    ends = ends_of([1, 2, 3])
    gemm, grouped, outer = fp8_ops.fp8_gemm, fp8_ops.fp8_grouped_gemm, fp8_ops.fp8_grouped_outer
    wrong: list[tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...], str]] = [
        (gemm, (a.float(), a_s, b, b_s), "float32 and torch.float8"),
        (gemm, (a, a_s, b.bfloat16(), b_s), "bfloat16"),
        (gemm, (a[:, :150], a_s, b, b_s), r"\[6, 150\] and \[140, 200\]"),
        (gemm, (a, a_s[:, :1], b, b_s), r"\[6, 2\].*\[6, 1\]"),
        (gemm, (a, a_s[:5], b, b_s), r"\[6, 2\].*\[5, 2\]"),
        (gemm, (a, a_s, b, b_s[:1]), r"\[1, 2\].*\[140, 200\]"),
        (gemm, (a, a_s, b, b_s[:, :1]), r"\[2, 1\].*\[140, 200\]"),
        (grouped, (a, a_s, stack, stack_s, ends[:2]), r"\[3, 140, 200\]"),
        (grouped, (a, a_s, stack, stack_s[:2], ends), r"\[2, 2, 2\] fit neither"),
        (grouped, (a, a_s, stack, act_quant(normal(1, 140, 200))[1], ends), r"\[1, 140, 2\] fit neither"),
        (grouped, (a, a_s, stack, b_s, ends), r"\[2, 2\] fit neither"),
        (grouped, (a, a_s[:, :1], stack, stack_s, ends), r"\[6, 1\]"),
        (outer, (a, a_s, b[:, :199], act_quant(normal(140, 199))[1], ends), r"\[140, 199\]"),
        (outer, (a, a_s, b, act_quant(normal(139, 200))[1], ends), r"\[139, 2\]"),
        (outer, (a, a_s, b.float(), b_s, ends), "float32"),
    ]
    for function, operands, message in wrong:
        with pytest.raises(ValueError, match=message):
            function(*operands)


# --- linear layers ---------------------------------------------------------------------------------------------------


class Products(NamedTuple):
    """The three products of a linear layer in float64, or of the absolute values of all that they multiply."""

    y: torch.Tensor
    dx: torch.Tensor
    dw: torch.Tensor


def three_products(
    x: torch.Tensor, w: torch.Tensor, g: torch.Tensor, counts: Sequence[int] | None, scale_fmt: str | None
) -> tuple[Products, Products]:
    """Quantises, dequantises and multiplies, group by group: the values, and the magnitudes for their bounds."""
    tiles = [round_trip(t, "tiles", scale_fmt) for t in (x, g, x.T, g.T)]
    weights = round_trip(w if counts else w[None], "blocks", scale_fmt)
    groups = slices_of(counts or [len(x)])
    both = []
    for sign in (lambda t: t, torch.abs):
        rows, grads, rows_t, grads_t = map(sign, tiles)
        pairs = list(zip(groups, sign(weights), strict=True))
        y = torch.cat([rows[group] @ weight.T for group, weight in pairs])
        dx = torch.cat([grads[group] @ weight for group, weight in pairs])
        dw = torch.stack([grads_t[:, group] @ rows_t[:, group].T for group in groups])
        both.append(Products(y, dx, dw.view(w.shape)))
    return both[0], both[1]


def run_layer(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    counts: Sequence[int] | None = None,
    scale_fmt: str | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """Forward and backward: the outputs, the gradient of the input, and those of the weights."""
    x, leaves = x.detach().requires_grad_(), [w.detach().requires_grad_() for w in weights]
    ends = None if counts is None else ends_of(counts)
    outputs = fp8_linear(x, leaves, [quantize(w, scale_fmt) for w in leaves], ends, scale_fmt)
    torch.autograd.backward(outputs, grads)
    return [y.detach() for y in outputs], x.grad, [w.grad for w in leaves]


@draws(25)
@given(
    st.one_of(st.none(), counts_of_rows),
    st.integers(1, 260),
    st.integers(1, 200),
    st.integers(1, 200),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    formats,
    seeds,
)
def test_fp8_linear_is_quantise_dequantise_multiply(
    counts: list[int] | None,
    rows: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    scale_fmt: str | None,
    seed: int,
) -> None:
    """Output and both gradients, plain and in groups, up to the float32 summation and the last rounding."""
    rows = rows if counts is None else sum(counts)
    x = normal(rows, k, seed=seed, dtype=dtype)
    w = normal(*([] if counts is None else [len(counts)]), n, k, seed=seed + 1, dtype=weight_dtype)
    g = (normal(rows, n, seed=seed + 2) / 8).to(dtype)
    (y,), dx, (dw,) = run_layer(x, [w], [g], counts, scale_fmt)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, weight_dtype)
    value, magnitude = three_products(x, w, g, counts, scale_fmt)
    denormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # gradients may be that small in float16
    assert_within(y, value.y, sum_bound(k, magnitude.y, value.y, dtype) + denormal, "y")
    assert_within(dx, value.dx, sum_bound(n, magnitude.dx, value.dx, dtype) + denormal, "dx")
    assert_within(dw, value.dw, sum_bound(rows, magnitude.dw, value.dw, weight_dtype), "dw")


@pytest.mark.parametrize("counts", [None, [100, 0, 28, 172]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_linear_has_the_error_of_the_format(counts: list[int] | None, dtype: torch.dtype) -> None:
    """All three products against the layer that is not quantised, in float64.

    Rounding x = m · 2^e, m in [1, 2), to e4m3 is off by up to 2^(e - 4), evenly spread: a variance of 2^(2e - 6) / 12.
    Its ratio to the mean of x² is 2^-6 / 12 over the mean of m²: 7/3 if m is evenly spread, 3 / (2 ln 2) if its
    logarithm is, so 2.4 to 2.5% of the value, and √2 times that, 3.3 to 3.5%, for a product of two. Errors are
    independent, so sums of products have it too. 10% either way is for the distribution of the values in the blocks.
    """
    rows, n, k = 300, 200, 384
    x, g = normal(rows, k, dtype=dtype), normal(rows, n, seed=2, dtype=dtype)
    w = normal(*([] if counts is None else [len(counts)]), n, k, seed=1)
    (y,), dx, (dw,) = run_layer(x, [w], [g], counts)
    xs, gs, ws = x.double(), g.double(), (w if counts else w[None]).double()
    pairs = list(zip(slices_of(counts or [rows]), ws, strict=True))
    true = Products(
        torch.cat([xs[group] @ weight.T for group, weight in pairs]),
        torch.cat([gs[group] @ weight for group, weight in pairs]),
        torch.stack([gs[group].T @ xs[group] for group, _ in pairs]).view(w.shape),
    )
    for actual, expected in zip((y, dx, dw), true, strict=True):
        error = ((actual.double() - expected).norm() / expected.norm()).item()
        assert 0.9 * 0.033 < error < 1.1 * 0.035


@pytest.mark.parametrize("counts", [None, [10, 0, 33]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_weights_at_once(counts: list[int] | None, dtype: torch.dtype) -> None:
    """Each as if it were alone; the input gets the sum."""
    x, stack = normal(43, 150, dtype=dtype), [] if counts is None else [len(counts)]
    weights = [normal(*stack, n, 150, seed=n, dtype=t) for n, t in ((7, torch.bfloat16), (140, torch.float32))]
    weights.append(normal(*stack, 140, 150, seed=3))
    grads = [normal(43, w.shape[-2], seed=w.shape[-2], dtype=dtype) for w in weights]
    outputs, dx, dws = run_layer(x, weights, grads, counts)
    total = torch.zeros(43, 150, dtype=dtype)
    for w, g, y, dw in zip(weights, grads, outputs, dws, strict=True):
        (alone,), alone_dx, (alone_dw,) = run_layer(x, [w], [g], counts)
        assert_same_bits(y, alone)
        assert_same_bits(dw, alone_dw)
        total = total + alone_dx
    assert_same_bits(dx, total)


def test_an_output_that_is_not_used_gets_a_zero_gradient() -> None:
    x, w, v = (normal(5, 9).requires_grad_() for _ in range(3))
    y, _ = fp8_linear(x, [w, v], [quantize(w), quantize(v)])
    y.sum().backward()
    assert not v.grad.count_nonzero()
    assert_same_bits(x.grad, run_layer(x, [w], [torch.ones(5, 5)])[1])


@pytest.mark.parametrize("batch", [(), (6,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_leading_dimensions(batch: tuple[int, ...]) -> None:
    """As many as there are, none at all, and no rows; the gradients have the shapes of what they belong to."""
    x, w, g = normal(*batch, 150), normal(140, 150, seed=1), normal(*batch, 140, seed=2)
    (y,), dx, (dw,) = run_layer(x, [w], [g])
    rows = math.prod(batch)
    (flat_y,), flat_dx, (flat_dw,) = run_layer(x.reshape(rows, 150), [w], [g.reshape(rows, 140)])
    assert_same_bits(y, flat_y.view(*batch, 140))
    assert_same_bits(dx, flat_dx.view(*batch, 150))
    assert_same_bits(dw, flat_dw)
    assert rows or not dw.count_nonzero()


def test_inputs_that_are_not_contiguous() -> None:
    x, w, g = normal(3, 50, 140), normal(130, 140, seed=1), normal(3, 50, 130, seed=2)
    plain, shuffled = run_layer(x, [w], [g]), run_layer(*(laid_out(x, "reordered"), [laid_out(w, "transposed")]), [g])
    assert_same_bits(shuffled[0][0], plain[0][0])
    assert_same_bits(shuffled[1], plain[1])
    assert_same_bits(shuffled[2][0], plain[2][0])
    # a gradient that autograd made by expanding one number
    leaf = x.clone().requires_grad_()
    fp8_linear(leaf, [w], [quantize(w)])[0].sum().backward()
    assert_same_bits(leaf.grad, run_layer(x, [w], [torch.ones(3, 50, 130)])[1])


@pytest.mark.parametrize(("x_learns", "w_learns"), [(True, False), (False, True), (False, False)])
def test_only_trained_tensors_get_a_gradient(x_learns: bool, w_learns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other products are made."""
    products = spy(monkeypatch, "fp8_gemm")
    x, w = normal(4, 20).requires_grad_(x_learns), normal(3, 20, seed=1).requires_grad_(w_learns)
    (y,) = fp8_linear(x, [w], [quantize(w)])
    assert y.requires_grad == (x_learns or w_learns)
    if y.requires_grad:
        y.sum().backward()
    assert len(products) == 1 + x_learns + w_learns
    _, dx, (dw,) = run_layer(x, [w], [torch.ones(4, 3)])
    for leaf, learns, expected in ((x, x_learns, dx), (w, w_learns, dw)):
        assert (leaf.grad is not None) == learns
        if learns:
            assert_same_bits(leaf.grad, expected)


@contextmanager
def saved_tensors() -> Iterator[list[torch.Tensor]]:
    """Collects what autograd keeps for backward passes."""
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("counts", [None, [10, 0, 290]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_kept_for_the_backward_pass(counts: list[int] | None, dtype: torch.dtype) -> None:
    """One FP8 copy of the input for two weights, the FP8 weights, and scales: nothing in bfloat16 or float32."""
    rows, k, ns = 300, 260, (140, 200)
    stack = [] if counts is None else [len(counts)]
    layers = [Linear(ModelArgs(), k, n, *stack) for n in ns]
    leaf = normal(rows, k, dtype=dtype).requires_grad_()
    x = leaf * 2
    ends = None if counts is None else ends_of(counts)
    for layer in layers:
        nn.init.normal_(layer.weight)
        layer.quantize()
    with switched("fp8"), saved_tensors() as kept:
        outputs = project(x, *layers, offsets=ends)
    sizes = {t.untyped_storage().data_ptr(): t for t in kept if t is not ends}
    found = sorted((t.dtype.itemsize, t.numel()) for t in sizes.values())
    experts = 1 if counts is None else len(counts)
    expected = [(1, rows * k), (4, k * math.ceil(rows / 128))]
    expected += [(1, experts * n * k) for n in ns]
    expected += [(4, experts * math.ceil(n / 128) * math.ceil(k / 128)) for n in ns]
    assert found == sorted(expected)
    assert {t.dtype for t in sizes.values()} == {E4M3, torch.float32}
    # and nothing else keeps the input alive
    watched = weakref.ref(x)
    del x, kept, sizes
    gc.collect()
    assert watched() is None
    sum(y.sum() for y in outputs).backward()
    assert leaf.grad.isfinite().all()


def test_nothing_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the input quantised the other way, for a backward pass that will not come."""
    both_ways = spy(monkeypatch, "act_quant_both")
    x, w = normal(4, 20), normal(3, 20, seed=1).requires_grad_()
    with saved_tensors() as kept:
        with torch.no_grad():
            (y,) = fp8_linear(x.requires_grad_(), [w], [quantize(w)])
        assert not y.requires_grad
        (z,) = fp8_linear(x.detach(), [w.detach()], [quantize(w)])
    assert kept == []
    assert both_ways == []
    assert_same_bits(y, z)
    assert_same_bits(y, run_layer(x, [w], [torch.ones(4, 3)])[0][0])


@pytest.mark.parametrize("scale_fmt", FORMATS)
def test_quantize_a_weight(scale_fmt: str | None) -> None:
    w = normal(2, 140, 150).requires_grad_()
    q, s, q_t = quantize(w, scale_fmt)
    check_quantised(Sample(w.detach(), 128, scale_fmt), "blocks", q, s)
    assert_same_bits(q_t, q.mT)
    assert not any(t.requires_grad for t in (q, s, q_t))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shapes", "scale_fmt"),
    [(((5, 200), (130, 200)), None), (((300, 3), (1, 3)), "ue8m0"), (((0, 20), (30, 20)), None)],
)
def test_operators_are_well_formed(shapes: tuple[tuple[int, int], tuple[int, int]], scale_fmt: str | None) -> None:
    """torch's own check: declared shapes, dtypes and strides, behaviour when traced, no hidden mutation.

    It cannot compare FP8 inputs before and after, so for those the bytes are compared here.
    """
    ops, (rows, weights) = torch.ops.bytegpt, [normal(*shape) for shape in shapes]
    for x in (rows.T.contiguous().T, rows.bfloat16()):
        torch.library.opcheck(ops.act_quant.default, (x, 128, scale_fmt))
        torch.library.opcheck(ops.act_quant.default, (x[None], 64, scale_fmt))
        torch.library.opcheck(ops.act_quant_both.default, (x, scale_fmt))
        torch.library.opcheck(ops.weight_quant.default, (x, 128, scale_fmt))
        torch.library.opcheck(ops.weight_quant_both.default, (x, scale_fmt))
        torch.library.opcheck(ops.weight_quant.default, (x.expand(2, *x.shape), 64, scale_fmt))
    a, a_s, a_t, a_ts = act_quant_both(rows, scale_fmt)
    b, b_s = weight_quant(weights, 128, scale_fmt)
    g_t, g_ts = act_quant(normal(7, len(rows)))
    stack, stack_s = b.expand(2, *b.shape), b_s.expand(2, *b_s.shape)
    ends = ends_of([len(rows), 0])
    for op, arguments in [
        (ops.weight_dequant, (b, b_s)),
        (ops.weight_dequant, (stack, stack_s, 128, torch.float32)),
        (ops.fp8_gemm, (a, a_s, b, b_s)),
        (ops.fp8_gemm, (a[None], a_s[None], b, b_s, torch.float32)),
        (ops.fp8_grouped_gemm, (a, a_s, stack, stack_s, ends, torch.float32)),
        (ops.fp8_gemm_sum, (a, a_s, b, b_s, a, a_s, b, b_s)),
        (ops.fp8_gemm_sum, (a, a_s, stack, stack_s, a, a_s, stack, stack_s, ends)),
        (ops.fp8_grouped_outer, (g_t, g_ts, a_t, a_ts, ends, torch.bfloat16)),
    ]:
        tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
        before = [t.clone() for t in tensors]
        checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(op.default, arguments, test_utils=checks)
        for tensor, copy in zip(tensors, before, strict=True):
            assert_same_bits(tensor, copy)


# --- the model -------------------------------------------------------------------------------------------------------


def small(**fields: Any) -> ModelArgs:
    """One model with everything on: a dense block, one with experts, and an MTP module."""
    defaults: dict[str, Any] = {
        "max_seq_len": 64,
        "vocab_size": VOCAB,
        "dim": 144,  # more than a block
        "inter_dim": 40,
        "moe_inter_dim": 24,
        "n_layers": 2,
        "n_heads": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_activated_experts": 2,
        "score_func": "sigmoid",
        "route_scale": 2.5,
        "aux_loss_alpha": 0.01,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_mtp_layers": 1,
    }
    return ModelArgs(**(defaults | fields))


def build(args: ModelArgs, seed: int = 0, compute_dtype: torch.dtype = torch.float32) -> Transformer:
    net = Transformer(args, compute_dtype)
    randomise(net, seed)
    return net


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=generator(seed))


def loss_and_grads(
    net: Transformer, seed: int = 3, loss: Callable[..., model.Losses] | None = None
) -> tuple[model.Losses, dict[str, torch.Tensor]]:
    full = tokens(2, 17, seed=seed)
    net.zero_grad()
    losses = (loss or net.loss)(full[:, :-1], full[:, 1:])
    losses.total.backward()
    return losses, {name: p.grad.clone() for name, p in net.named_parameters()}


Results = tuple[model.Losses, dict[str, torch.Tensor]]


def assert_same_results(actual: Results, expected: Results) -> None:
    for part, wanted in zip(actual[0], expected[0], strict=True):
        assert_same_bits(part.detach(), wanted.detach())
    for name, grad in expected[1].items():
        assert_same_bits(actual[1][name], grad, name)


NEVER = ("embed.weight", "head.weight", "gate.weight", "eh_proj.weight", "norm.weight")
ATTENTION = ["wq_a", "wq_b", "wkv_a", "wkv_b", "wo"]


@pytest.mark.parametrize(
    ("fields", "attention", "projections"),
    [
        ({}, "naive", ATTENTION),
        ({}, "absorb", ["wq_a", "wq_b", "wkv_a", "wo"]),  # wkv_b is part of the attention there
        ({"q_lora_rank": 0}, "naive", ["wq", "wkv_a", "wkv_b", "wo"]),
        ({"kv_lora_rank": 0}, "naive", ["wq_a", "wq_b", "wk", "wv", "wo"]),
    ],
)
def test_which_layers_multiply_in_fp8(
    fields: dict[str, Any], attention: str, projections: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The projections of the attention and all MLPs; never embedding, head, router, norms and `eh_proj`."""
    net = build(small(**fields))
    names = {id(p): name.removesuffix(".weight") for name, p in net.named_parameters()}
    in_fp8, plain = spy(monkeypatch, "fp8_linear"), spy(monkeypatch, "linear")
    mlp = ["w1", "w2", "w3"]
    expected = [f"layers.0.ffn.{w}" for w in mlp]
    for block in ("layers.0", "layers.1", "mtp.0.block"):
        expected += [f"{block}.attn.{w}" for w in projections]
    for moe in ("layers.1.ffn", "mtp.0.block.ffn"):
        expected += [f"{moe}.{part}.{w}" for part in ("experts", "shared_experts") for w in mlp]
    with switched("fp8", attention):
        loss_and_grads(net)
    assert sorted(names[id(w)] for call in in_fp8 for w in call[1]) == sorted(expected)  # each of them once
    assert {names[id(call[1])] for call in plain} == {"head", "mtp.0.eh_proj"}
    all_layers = {names[id(layer.weight)] for layer in net.fp8_layers()}
    assert all_layers >= set(expected)
    for name, _ in net.named_parameters():
        assert (name.removesuffix(".weight") in all_layers) != name.endswith(NEVER), name
    in_fp8.clear()
    with switched("bf16", attention):
        loss_and_grads(net)
    assert in_fp8 == []


def test_inputs_are_quantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that read the same activations share them: query and latent, gate and up projection."""
    net = build(small(n_mtp_layers=0, n_routed_experts=0))
    net.quantize_weights()
    calls = spy(monkeypatch, "act_quant_both")
    with switched("fp8"):
        net.loss(tokens(2, 16), tokens(2, 16))
    # attention: wq_a with wkv_a, wq_b, wkv_b, wo; MLP: w1 with w3, w2
    assert len(calls) == 2 * (4 + 2)


def test_fp8_changes_little() -> None:
    """The loss in FP8 is not that of float32, and near it."""
    net = build(small(n_activated_experts=4))  # so that rounding cannot switch between experts
    plain, grads = loss_and_grads(net)
    with switched("fp8"):
        losses, in_fp8 = loss_and_grads(net)
    assert losses.total.item() != plain.total.item()
    assert losses.total.item() == pytest.approx(plain.total.item(), rel=0.02)
    for name, grad in grads.items():
        error = ((in_fp8[name] - grad).norm() / grad.norm()).item()
        assert 0 < error < 0.4, name


@pytest.mark.parametrize("scale_fmt", FORMATS)
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_weights_quantised_once_a_step(
    scale_fmt: str | None, compute_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as quantising at each use, without doing it; and they follow the weights when told to."""
    net = build(small(scale_fmt=scale_fmt), compute_dtype=compute_dtype)
    calls = spy(monkeypatch, "weight_quant")
    with switched("fp8"):
        at_each_use = loss_and_grads(net)
        assert len(calls) == len(net.fp8_layers())
        assert all(call[2] == scale_fmt for call in calls)
        calls.clear()
        net.quantize_weights()
        assert len(calls) == len(net.fp8_layers())
        calls.clear()
        assert_same_results(loss_and_grads(net), at_each_use)
        loss_and_grads(net, seed=4)
        assert calls == []

        addresses = {name: b.data_ptr() for name, b in net.named_buffers()}
        randomise(net, seed=1)
        net.quantize_weights()
        other = build(small(scale_fmt=scale_fmt), seed=1, compute_dtype=compute_dtype)
        assert_same_results(loss_and_grads(net), loss_and_grads(other))
        assert addresses == {name: b.data_ptr() for name, b in net.named_buffers()}  # in place
    kept = [name for name in net.state_dict() if "weight_" in name]
    assert kept == []  # the copies are not part of a checkpoint


def test_scale_format_of_activations_and_gradients() -> None:
    """The configuration's `scale_fmt` is that of weights, activations and gradients."""
    args = small(scale_fmt="ue8m0")
    layer = Linear(args, 150, 140)
    x, g = normal(30, 150), normal(30, 140, seed=1)
    with torch.no_grad():
        layer.weight.copy_(normal(140, 150, seed=2))
    leaf = x.clone().requires_grad_()
    with switched("fp8"):
        y = layer(leaf)
        y.backward(g)
    value, magnitude = three_products(x, layer.weight.detach(), g, None, "ue8m0")
    assert_within(y, value.y, sum_bound(150, magnitude.y, value.y, torch.float32))
    assert_within(leaf.grad, value.dx, sum_bound(140, magnitude.dx, value.dx, torch.float32))
    assert_within(layer.weight.grad, value.dw, sum_bound(30, magnitude.dw, value.dw, torch.float32))


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_nothing(compute_dtype: torch.dtype) -> None:
    net = build(small(), compute_dtype=compute_dtype)
    net.quantize_weights()
    with switched("fp8"):
        plain = loss_and_grads(net)
        calls: list[nn.Module] = []
        for block in net.layers:
            block.register_forward_pre_hook(lambda block, _: calls.append(block))
        net.gradient_checkpointing = True
        assert_same_results(loss_and_grads(net), plain)
    assert len(calls) == 2 * 2  # each block ran again in the backward pass


@pytest.mark.slow
@pytest.mark.parametrize(("compute_dtype", "at_once"), [(torch.float32, True), (torch.bfloat16, False)])
def test_compiles_as_one_graph(compute_dtype: torch.dtype, at_once: bool) -> None:
    """`fullgraph` raises at a graph break; the graph follows when the weights are quantised anew.

    Where traced code keeps in float32 what eager code rounds, as in bfloat16, e4m3 rounds some numbers the other way:
    gradients are then as near as FP8 is to itself.
    """
    args = small(n_layers=1, n_dense_layers=0, n_mtp_layers=0, n_activated_experts=4)
    net = build(args, compute_dtype=compute_dtype)
    torch._dynamo.reset()
    compiled = torch.compile(net.loss, fullgraph=True, backend="aot_eager")
    with switched("fp8"):
        for seed in (0, 1) if at_once else (0,):
            randomise(net, seed)
            if at_once:
                net.quantize_weights()
            plain, grads = loss_and_grads(net)
            losses, traced = loss_and_grads(net, loss=compiled)
            near = 1e-5 if compute_dtype == torch.float32 else 2**-7
            assert losses.total.item() == pytest.approx(plain.total.item(), rel=near)
            for name, grad in grads.items():
                error = ((traced[name] - grad).norm() / grad.norm()).item()
                assert error < (0.005 if compute_dtype == torch.float32 else 0.1), name


def test_accumulation() -> None:
    """Two batches in a row leave the sum of their gradients; both read the weights quantised before."""
    net = build(small())
    net.quantize_weights()
    with switched("fp8"):
        first, second = loss_and_grads(net, seed=4)[1], loss_and_grads(net, seed=5)[1]
        net.zero_grad()
        for seed in (4, 5):
            full = tokens(2, 17, seed=seed)
            net.loss(full[:, :-1], full[:, 1:]).total.backward()
    for name, p in net.named_parameters():
        assert_same_bits(p.grad, first[name] + second[name], name)


def test_half_batches_accumulate_to_a_full_one() -> None:
    """A dense model, halves that fill whole tiles: the sum is the whole batch's gradient up to rounding."""
    net = build(small(n_routed_experts=0, n_mtp_layers=0))
    full = tokens(8, 33)
    with switched("fp8"):
        net.quantize_weights()
        net.loss(full[:, :-1], full[:, 1:]).total.backward()
        whole = {name: p.grad.clone() for name, p in net.named_parameters()}
        net.zero_grad()
        for half in full.split(4):
            (net.loss(half[:, :-1], half[:, 1:]).total / 2).backward()
    for name, p in net.named_parameters():
        assert (p.grad - whole[name]).norm() < 0.005 * whole[name].norm(), name


def stored_in_fp8(net: Transformer) -> Transformer:
    """A model whose weights are FP8, filled with those of `net`."""
    stored = Transformer(net.args, net.compute_dtype, fp8_weights=True)
    state = dict(net.state_dict())
    for name, module in net.named_modules():
        if isinstance(module, Linear) and not module.high_precision:
            state[f"{name}.weight"], state[f"{name}.scale"] = weight_quant(module.weight.detach())
    assert sorted(stored.state_dict()) == sorted(state)
    stored.load_state_dict(state)
    return stored


def through_fp8(net: Transformer, dtype: torch.dtype) -> Transformer:
    """A plain model with weights that have been through FP8, rounded to `dtype`."""
    other = Transformer(net.args, net.compute_dtype)
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        for layer in other.fp8_layers():
            layer.weight.copy_(round_trip(layer.weight, "blocks").float().to(dtype))
    return other


def decode(net: Transformer, cached: bool) -> torch.Tensor:
    """Logits of all positions: in one call, or after a cache of six positions one by one."""
    ids = tokens(2, 10, seed=8)
    with torch.no_grad():
        if not cached:
            return net(ids)
        cache = net.new_cache(2, 16)
        return torch.cat([net(part, cache) for part in ids.split([6, 1, 1, 1, 1], dim=1)], dim=1)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("attention", ["naive", "absorb"])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_weights_stored_in_fp8(compute_dtype: torch.dtype, attention: str, cached: bool) -> None:
    """Plain products see the dequantised weights; FP8 products are those of the model they were quantised from.

    Except that "absorb" reads `wkv_b` outside the FP8 products: there the trained model has its master weight, the
    stored one what FP8 left of it. So the trained one is given that too.
    """
    net = build(small(), compute_dtype=compute_dtype)
    stored = stored_in_fp8(net)
    assert {p.dtype for layer in stored.fp8_layers() for p in layer.parameters()} == {E4M3}
    with switched("bf16", attention):
        assert_same_bits(decode(stored, cached), decode(through_fp8(net, compute_dtype), cached))
        assert (decode(stored, cached) - decode(net, cached)).abs().max() > 1e-3
    with torch.no_grad():
        for block in net.layers if attention == "absorb" else []:
            block.attn.wkv_b.weight.copy_(round_trip(block.attn.wkv_b.weight, "blocks"))
    with switched("fp8", attention):
        in_fp8 = decode(stored, cached)
        assert_same_bits(in_fp8, decode(net, cached))
        net.quantize_weights()
        assert_same_bits(in_fp8, decode(net, cached))
    with switched("bf16", attention):
        plain = decode(stored, cached)
    error = ((in_fp8 - plain).norm() / plain.norm()).item()
    assert 0.01 < error < 0.15  # activations are quantised now


@pytest.mark.parametrize("attention", ["naive", "absorb"])
def test_cached_decoding_equals_one_forward_pass(attention: str) -> None:
    """Rows are quantised one by one, so it matters little how many come at once: less than what FP8 itself does."""
    net = build(small(n_activated_experts=4))
    with switched("fp8", attention):
        whole, stepwise = decode(net, False), decode(net, True)
    assert ((whole - stepwise).norm() / whole.norm()).item() < 0.01


def test_gradient_through_stored_weights() -> None:
    """Weights stored in FP8 do not learn; what is before them may."""
    layer = Linear(ModelArgs(), 150, 140)
    w, x, g = normal(140, 150), normal(30, 150, seed=1), normal(30, 140, seed=2)
    layer.store_fp8()
    layer.weight.data, layer.scale = weight_quant(w)
    leaf = x.clone().requires_grad_()
    with switched("fp8"):
        y = layer(leaf)
        y.backward(g)
    (expected,), dx, _ = run_layer(x, [w], [g])
    assert_same_bits(y.detach(), expected)
    assert_same_bits(leaf.grad, dx)
    assert layer.weight.grad is None


@st.composite
def shapes(draw: st.DrawFn) -> ModelArgs:
    """Small models of all sorts."""
    rope = 2 * draw(st.integers(0, 3))
    return small(
        dim=draw(st.integers(4, 140)),
        inter_dim=draw(st.integers(1, 140)),
        moe_inter_dim=draw(st.integers(1, 30)),
        n_heads=draw(st.integers(1, 3)),
        n_dense_layers=draw(st.integers(0, 2)),
        n_routed_experts=draw(st.sampled_from([0, 4, 4])),
        n_shared_experts=draw(st.integers(0, 2)),
        score_func=draw(st.sampled_from(["softmax", "sigmoid"])),
        hidden_act=draw(st.sampled_from(["silu", "gelu", "relu2"])),
        q_lora_rank=draw(st.sampled_from([0, 3, 16])),
        kv_lora_rank=draw(st.sampled_from([0, 5, 16])),
        qk_nope_head_dim=draw(st.integers(0 if rope else 1, 9)),
        qk_rope_head_dim=rope,
        v_head_dim=draw(st.integers(1, 9)),
        scale_fmt=draw(formats),
    )


@draws(12)
@given(shapes(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from(["naive", "absorb"]))
def test_every_parameter_gets_a_finite_gradient(args: ModelArgs, compute_dtype: torch.dtype, attention: str) -> None:
    """In the parameter's own precision, and not zero."""
    net = build(args, compute_dtype=compute_dtype)
    net.quantize_weights()
    with switched("fp8", attention):
        losses, grads = loss_and_grads(net)
    assert losses.total.isfinite()
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert grad.isfinite().all(), name


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_training_in_fp8_is_like_training_in_float32(kind: str) -> None:
    """From the same start on the same batches, the loss falls as far, give or take a hundredth of the way."""
    falls = {}
    for gemm in ("bf16", "fp8"):  # with activations in float32
        net = Transformer(small(aux_loss_alpha=0.0))
        net.init_weights(0)
        optimizer = getattr(torch.optim, kind)(net.parameters(), lr={"SGD": 0.2, "AdamW": 3e-3}[kind])
        history = []
        with switched(gemm):
            for _ in range(12):
                if gemm == "fp8":
                    net.quantize_weights()
                losses, _ = loss_and_grads(net)
                optimizer.step()
                history.append(losses.next_byte.item())
        falls[gemm] = history[0] - history[-1]
        assert history[0] == pytest.approx(math.log(VOCAB), rel=1e-4)
    assert falls["bf16"] > 2
    assert falls["fp8"] == pytest.approx(falls["bf16"], rel=0.01)
    assert falls["fp8"] != falls["bf16"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_compiles_for_lengths_that_vary(dtype: torch.dtype) -> None:
    compiled = torch.compile(fp8_ops.attention, fullgraph=True, dynamic=True, backend="eager")
    for length in (8, 16, 5):
        q, k, v = torch.randn(3, 2, length, 2, 4, dtype=dtype)
        torch.testing.assert_close(compiled(q, k, v, None, 0.5), fp8_ops.attention(q, k, v, None, 0.5))
