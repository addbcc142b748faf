"""The Triton kernels: they compile for the GPUs they are for, and compute what `fp8_ops.py` says, bit for bit.

What plain torch makes on the CPU is the reference. Quantised values, scales and dequantised values must equal it in
every bit; products are held against float64, with the error that summation in float32, or by a tensor core, may make.

Where there is a GPU that multiplies FP8, the kernels run on it. Elsewhere they run in Triton's interpreter, as
`conftest.py` has it, and the same tests show the same: only what a tensor core rounds, and what autotuning picks, is
left to a GPU. Every tensor that a kernel is given lies between guards of NaN, and every one that it makes was full of
them: so a kernel that reads or writes beside its tensor, or leaves a number out, shows.

Compilation needs no GPU either, but a Triton that does not interpret. That is another process: this file, run as a
script, compiles the kernels for each compute capability and prints what came of them.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from conftest import tiny  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

import fp8_ops  # noqa: E402
import kernel  # noqa: E402
import kernel_fused  # noqa: E402
import model  # noqa: E402
import optim  # noqa: E402
import parallel  # noqa: E402
from fp8_ops import E4M3  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() and fp8_ops.multiplies_fp8(torch.device("cuda")) else "cpu")
INTERPRETED = isinstance(kernel._weight_quant_kernel, interpreter.InterpretedFunction)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = fp8_ops.SCALE_FORMATS
GEMM_TILES, OUTER_TILES = list(kernel._gemm_kernel.configs), list(kernel._grouped_outer_kernel.configs)
ON_HOPPER = DEVICE.type == "cuda" and torch.cuda.get_device_capability() == (9, 0)
HOPPER_TILES = (256, 128) if ON_HOPPER else ()  # rows of the tiles of Hopper's own kernel
CANDIDATES = len(GEMM_TILES) + len(HOPPER_TILES)
GUARD = 256  # bytes
TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
EPS = 2.0**-24  # the relative rounding error of float32

# One instruction of a tensor core adds 32 products to a sum. It shifts all of them to the exponent of the largest and
# drops what is then below some 14 bits: so each of 128 products, and of 4 sums, loses at most 2^-13 of the largest of
# them, which is at most the sum of their magnitudes.
TENSOR_CORE_WORST = (128 + 4) * 2.0**-13
# That is the worst. What is lost has either sign, and the largest of many numbers is far less than the sum of them:
# adding up normal numbers so in float64 loses 2^-16.4 of the magnitudes on average, 2^-12.2 in one of 40,000 sums.
TENSOR_CORE_MEAN = 2.0**-14

phases = [phase for phase in Phase if phase is not Phase.explain]  # which takes minutes in the interpreter
draws = settings(max_examples=20, deadline=None, derandomize=True, database=None, phases=phases)
runs = pytest.mark.skipif(not (DEVICE.type == "cuda" or INTERPRETED), reason="no GPU for FP8, and no interpreter")
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU of compute capability 8.9 or more")
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of the interpreter's numpy
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="is about Triton's interpreter, which is off")


# --- How kernels are run ------------------------------------------------------------------------------------------

TORCH_DTYPES = {
    "fp64": (torch.int64, torch.float64),
    "fp32": (torch.int32, torch.float32),
    "fp16": (torch.int16, torch.float16),
    "bf16": (torch.int16, torch.bfloat16),
    "fp8e4nv": (torch.int8, E4M3),
}
faulty_casts = interpreter._convert_float


def exact_casts(array: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
    """Casts as a GPU does, instead of `interpreter._convert_float`: bits in, bits out, by torch's own casts."""
    (bits, dtype), (new_bits, new_dtype) = TORCH_DTYPES[source.name], TORCH_DTYPES[target.name]
    x = torch.frombuffer(bytearray(array.tobytes()), dtype=bits).view(dtype)
    new = x.to(new_dtype).view(new_bits).numpy()
    return new.view(f"uint{new.itemsize * 8}").reshape(array.shape)


interpreted_dot = interpreter.InterpreterBuilder.create_dot


def dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """`create_dot`, which would multiply the bits of bfloat16 as integers."""
    if a.dtype.name == "bf16":
        a, b = (
            interpreter.TensorHandle(exact_casts(x.data, x.dtype, tl.float32, None).view(np.float32), tl.float32)
            for x in (a, b)
        )
    return interpreted_dot(self, a, b, *rest)


@pytest.fixture(autouse=True, scope="module")
def small_and_exact() -> Iterator[None]:
    """Kernels in the interpreter cast as GPUs do; tensors this small only lose by being shared out to threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", exact_casts)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_numbers)
        yield
    torch.set_num_threads(before)


@contextmanager
def tiles(which: int) -> Iterator[None]:
    """Uses one candidate of each kernel's tiles, without autotuning, which only a GPU can do; last, Hopper's kernel."""
    rows = HOPPER_TILES[which - len(GEMM_TILES)] if which >= len(GEMM_TILES) else 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_hopper_rows", lambda *args: rows)
        patch.setattr(kernel, "_hopper_parts", lambda *args: 1)
        patch.setattr(kernel._gemm_kernel, "configs", [GEMM_TILES[which % len(GEMM_TILES)]])
        patch.setattr(kernel._grouped_outer_kernel, "configs", [OUTER_TILES[which % len(OUTER_TILES)]])
        yield


class GuardedTorch:
    """`torch` as `kernel.py` uses it, but what `empty` makes is full of NaN and lies between guards."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        shape = torch.Size(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else torch.Size(shape)
        buffer, inside = guarded(shape.numel(), dtype, device)
        self.buffers.append(buffer)
        return inside.view(shape)

    def check(self) -> None:
        for buffer in self.buffers:
            assert (buffer[:GUARD] == 0xFF).all() and (buffer[-GUARD:] == 0xFF).all(), "wrote beside a tensor"


def guarded(numel: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes that are NaN in every float dtype, and the middle of them as `numel` numbers."""
    buffer = torch.full((numel * dtype.itemsize + 2 * GUARD,), 0xFF, dtype=torch.uint8, device=device)
    return buffer, buffer[GUARD:-GUARD].view(dtype)


def framed(x: torch.Tensor) -> torch.Tensor:
    """A copy on the device with the same strides, and NaN around it and in its gaps."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    copy = guarded(span, x.dtype, DEVICE)[1].as_strided(x.shape, x.stride())
    return copy.copy_(x)


def run(wrapper: Callable[..., Any], *args: Any) -> Any:
    """What a function of `kernel.py` returns for tensors on the CPU, on the CPU."""
    guards = GuardedTorch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "torch", guards)
        out = wrapper(*(framed(arg) if isinstance(arg, torch.Tensor) else arg for arg in args))
    guards.check()
    return out.cpu() if isinstance(out, torch.Tensor) else tuple(t.cpu() for t in out if t is not None)


@contextmanager
def dispatched() -> Iterator[set[str]]:
    """Lets `fp8_ops.py` run the kernels where it would not, in the interpreter; yields the names of those that ran."""
    ran: set[str] = set()

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: ran.add(name) or function(*args)

    with pytest.MonkeyPatch.context() as patch:
        for name in "act_quant", "act_quant_both", "weight_quant", "weight_quant_both", "weight_dequant":
            patch.setattr(kernel, name, recorded(name, getattr(kernel, name)))
        for name in "gemm", "gemm_sum", "grouped_gemm", "grouped_outer":
            patch.setattr(kernel, name, recorded(name, getattr(kernel, name)))
        if DEVICE.type == "cpu":
            patch.setattr(fp8_ops, "multiplies_fp8", lambda device: True)
        yield ran


# --- What they are run on -----------------------------------------------------------------------------------------

sizes = st.sampled_from([1, 2, 31, 127, 128, 129, 200, 257]) | st.integers(1, 300)
seeds = st.integers(0, 2**32 - 1)
MAGNITUDES = ("normal", "wide", "subnormal", "huge", "zero", "outlier", "midpoints", "not finite")
LAYOUTS = ("contiguous", "transposed", "every second", "a part")
layouts, dtypes = st.sampled_from(LAYOUTS), st.sampled_from(FLOATS)
candidates = st.integers(0, CANDIDATES - 1)
group_sizes = st.lists(
    st.sampled_from([0, 0, 1, 5, 64, 128, 130]) | st.integers(0, 150), min_size=1, max_size=5
).filter(any)


def numbers(shape: tuple[int, ...], magnitude: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random numbers of one sort; all of them finite in `dtype`, but for "not finite"."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    pick = torch.rand(shape, generator=rng)
    match magnitude:
        case "wide":
            x *= torch.exp2(torch.empty(shape).uniform_(-40, 40, generator=rng))
        case "subnormal":
            x *= 1e-38 if dtype != torch.float16 else 1e-7
        case "huge":
            x *= min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        case "zero":
            x.zero_().copysign_(pick - 0.5)
        case "outlier":
            x[pick < 0.002] *= 1e4
        case "midpoints":  # between neighbours of e4m3, and beside them, where a tile's scale is 1
            values = torch.arange(127, dtype=torch.uint8).view(E4M3).double()
            middles = (values[1:] + values[:-1]) / 2
            x = middles[torch.randint(len(middles), shape, generator=rng)].copysign(x)
            x *= 1 + torch.randint(-1, 2, shape, generator=rng) * torch.finfo(dtype).eps
            x[pick < 0.1] = 448.0
        case "not finite":
            for value, below in (torch.nan, 0.001), (-torch.nan, 0.002), (torch.inf, 0.003), (-torch.inf, 0.004):
                x[(pick < below) & (pick >= below - 0.001)] = value
    if magnitude == "not finite":
        return x.to(dtype)
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return x.clamp(-largest, largest).to(dtype)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers with other strides."""
    if x.dtype == E4M3:
        return laid_out(x.view(torch.int8), layout).view(E4M3)
    match layout:
        case "transposed":
            return x.mT.contiguous().mT
        case "every second":
            return x.repeat_interleave(2, dim=-1)[..., ::2]
        case "a part":
            return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
    return x


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Shape, dtype, NaN where NaN is wanted, and all other numbers bit for bit."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    nan = want.isnan() if want.dtype != E4M3 else want.float().isnan()
    assert torch.equal(got.isnan() if got.dtype != E4M3 else got.float().isnan(), nan)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[want.dtype.itemsize]
    got, want = (t.contiguous().view(bits).masked_fill(nan, 0) for t in (got, want))
    wrong = (got != want).nonzero()
    assert not len(wrong), f"{len(wrong)} of {got.numel()} differ, the first at {wrong[0].tolist()}"


def dequantised(q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Float64 from a matrix in FP8 with scales of its 1×128 tiles or 128×128 blocks."""
    (n, k), rows = q.shape, 1 if len(s) == len(q) else 128
    return q.double() * s.double().repeat_interleave(rows, 0)[:n].repeat_interleave(128, 1)[:, :k]


def assert_product(got: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`got`, float32, is a @ b.T to the accuracy of its sums; `a` and `b` are exact, in float64."""
    want, magnitude = a @ b.T, a.abs() @ b.abs().T
    error = (got.double() - want).abs()
    # Sums in float32, in any order: 127 additions in a tile, 3 multiplications by scales, one addition a tile. And a
    # product of two scales below float32's normal numbers is a multiple of the smallest of all.
    bound = (127 + 3 + -(-a.shape[1] // 128)) * EPS
    underflow = a.shape[1] * fp8_ops.E4M3_MAX**2 * 2.0**-150
    if DEVICE.type == "cuda":
        assert error.numel() < 1000 or error.mean() <= (TENSOR_CORE_MEAN + bound) * magnitude.mean() + underflow
        bound += TENSOR_CORE_WORST
    assert got.shape == want.shape
    assert (error <= bound * magnitude + underflow).all(), f"{(error / magnitude).nan_to_num().max():.2e} > {bound:.2e}"


# --- Quantisation and back ----------------------------------------------------------------------------------------


@runs
@draws
@given(
    m=sizes,
    k=sizes,
    dtype=dtypes,
    magnitude=st.sampled_from(MAGNITUDES),
    layout=layouts,
    scale_fmt=st.sampled_from(FORMATS),
    seed=seeds,
)
def test_activations(
    m: int, k: int, dtype: torch.dtype, magnitude: str, layout: str, scale_fmt: str | None, seed: int
) -> None:
    """Both quantisers, on every sort of numbers and of memory."""
    x = laid_out(numbers((m, k), magnitude, dtype, seed), layout)
    want = fp8_ops.act_quant_both(x, scale_fmt)
    for got, tensor in zip(run(kernel.act_quant, x, scale_fmt), want[:2], strict=True):
        assert_same(got, tensor)
    for got, tensor in zip(run(kernel.act_quant_both, x, scale_fmt), want, strict=True):
        assert_same(got, tensor)


@runs
@settings(draws, max_examples=10)
@given(n=st.integers(1, 300), m=sizes, k=sizes, limit=st.integers(0, 300), dtype=dtypes, both=st.booleans(), seed=seeds)
def test_gathered_activations(n: int, m: int, k: int, limit: int, dtype: torch.dtype, both: bool, seed: int) -> None:
    """Any rows of a matrix, quantised as if they had been gathered before; from a limit on, zeros."""
    x = laid_out(numbers((n, k), "normal", dtype, seed), LAYOUTS[seed % len(LAYOUTS)])
    index = torch.randint(n, (m,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    rows = x[index].masked_fill((torch.arange(m) >= limit)[:, None], 0)
    index[limit:] = 2**30  # is not read
    got = run(kernel.gather_quant, x, index, torch.tensor([limit], dtype=torch.int32), FORMATS[seed % 2], both)
    want = fp8_ops.act_quant_both(rows, FORMATS[seed % 2])
    for g, w in zip(got, want[: 4 if both else 2], strict=True):
        assert_same(g, w)


@runs
@draws
@given(
    stack=st.sampled_from([(), (1,), (3,), (2, 2)]),
    n=sizes,
    k=sizes,
    dtype=dtypes,
    magnitude=st.sampled_from(MAGNITUDES),
    layout=layouts,
    scale_fmt=st.sampled_from(FORMATS),
    seed=seeds,
)
def test_weights(
    stack: tuple[int, ...],
    n: int,
    k: int,
    dtype: torch.dtype,
    magnitude: str,
    layout: str,
    scale_fmt: str | None,
    seed: int,
) -> None:
    """Quantisation of single weights and stacks of them."""
    w = laid_out(numbers((*stack, n, k), magnitude, dtype, seed), layout)
    q, s = fp8_ops.weight_quant(w, 128, scale_fmt)
    for got, want in zip(run(kernel.weight_quant, w, scale_fmt), (q, s), strict=True):
        assert_same(got, want)
    for got, want in zip(run(kernel.weight_quant_both, w, scale_fmt), (q, s, q.mT), strict=True):
        assert_same(got, want)
        assert got.is_contiguous()


@runs
@pytest.mark.parametrize("shape", [(16, 16), (160, 384), (2, 144, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_in_vectors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Where rows of all matrices begin at multiples of 16 bytes, which makes other machine code of the kernels."""
    x, scale_fmt = numbers(shape, "normal", dtype, sum(shape)), FORMATS[shape[-1] % 5 % 2]
    q, s = fp8_ops.weight_quant(x, 128, scale_fmt)
    for got, want in zip(run(kernel.weight_quant_both, x, scale_fmt), (q, s, q.mT), strict=True):
        assert_same(got, want)
    rows = x.flatten(0, -2)
    for got, want in zip(run(kernel.act_quant_both, rows, scale_fmt), quantised(rows, scale_fmt), strict=True):
        assert_same(got, want)
    y = kernel_fused.glu(torch.cat([rows, rows], dim=1).to(DEVICE), "silu")
    results = run(kernel_fused.glu_quant, rows, rows, "silu", None, scale_fmt, True)
    for got, want in zip(results, quantised(y, scale_fmt), strict=True):
        assert_same(got, want)


@runs
def test_weights_are_quantised_in_place() -> None:
    w = numbers((2, 140, 150), "normal", torch.float32, 1).to(DEVICE)
    with dispatched():
        old = fp8_ops.quantize(0 * w)
        addresses = [t.data_ptr() for t in old]
        new = fp8_ops.quantize(w, "ue8m0", old)
    assert [t.data_ptr() for t in new] == [t.data_ptr() for t in old] == addresses
    q, s = fp8_ops.weight_quant(w.cpu(), 128, "ue8m0")
    for got, want in zip(old, (q, s, q.mT), strict=True):
        assert_same(got.cpu(), want)


@runs
@draws
@given(
    stack=st.sampled_from([(), (1,), (3,), (2, 2)]),
    n=sizes,
    k=sizes,
    dtype=dtypes,
    spread=st.sampled_from([0.0, 20.0, 126.0]),
    layout=layouts,
    seed=seeds,
)
def test_dequantisation(
    stack: tuple[int, ...], n: int, k: int, dtype: torch.dtype, spread: float, layout: str, seed: int
) -> None:
    """All 256 values of e4m3, with scales up to where the product overflows, underflows or is NaN."""
    rng = torch.Generator().manual_seed(seed)
    q = laid_out(torch.randint(256, (*stack, n, k), generator=rng, dtype=torch.uint8), layout).view(E4M3)
    blocks = (*stack, -(-n // 128), -(-k // 128))
    s = torch.exp2(torch.empty(blocks).uniform_(-spread, spread, generator=rng))
    s[torch.rand(blocks, generator=rng) < 0.05] = torch.nan
    s = laid_out(s, layout)
    assert_same(run(kernel.weight_dequant, q, s, dtype), fp8_ops.weight_dequant(q, s, 128, dtype))


# --- Products -----------------------------------------------------------------------------------------------------


def spread(*shape: int, seed: int) -> torch.Tensor:
    """Random powers of two."""
    return torch.exp2(torch.randint(-6, 7, shape, generator=torch.Generator().manual_seed(seed)))


def activations(rows: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantised rows, whose tiles differ much in scale."""
    x = numbers((rows, k), "normal", torch.float32, seed)
    x *= spread(rows, -(-k // 128), seed=seed).repeat_interleave(128, 1)[:, :k]
    return fp8_ops.act_quant(x)


def weights(*shape: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantised weights, whose blocks differ much in scale."""
    w = numbers(shape, "normal", torch.float32, seed)
    blocks = spread(*shape[:-2], *(-(-size // 128) for size in shape[-2:]), seed=seed)
    w *= blocks.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., : shape[-2], : shape[-1]]
    return fp8_ops.weight_quant(w)


def ends(counts: list[int]) -> torch.Tensor:
    """Where groups of these sizes end."""
    return torch.tensor(counts).cumsum(0).int()


def check_gemm(m: int, n: int, k: int, per_row: bool, layout: str, dtype: torch.dtype, seed: int) -> None:
    a, a_s = activations(m, k, seed)
    b, b_s = activations(n, k, seed + 1) if per_row else weights(n, k, seed=seed + 1)
    operands = [laid_out(t, layout) for t in (a, a_s, b, b_s)]
    c = run(kernel.gemm, *operands, torch.float32)
    assert_product(c, dequantised(a, a_s), dequantised(b, b_s))
    if dtype != torch.float32:
        assert_same(run(kernel.gemm, *operands, dtype), c.to(dtype))


def check_grouped(counts: list[int], n: int, k: int, layout: str, dtype: torch.dtype, seed: int) -> None:
    rows, offsets = sum(counts), ends(counts)
    a, a_s = activations(rows, k, seed)
    b, b_s = weights(len(counts), n, k, seed=seed + 1)
    b, b_s = laid_out(b, layout), laid_out(b_s, layout)
    c = run(kernel.grouped_gemm, a, a_s, b, b_s, offsets, torch.float32)
    assert c.shape == (rows, n)
    for e, (start, end) in enumerate(pairwise([0, *offsets.tolist()])):
        assert_product(c[start:end], dequantised(a[start:end], a_s[start:end]), dequantised(b[e], b_s[e]))
    if dtype != torch.float32:
        assert_same(run(kernel.grouped_gemm, a, a_s, b, b_s, offsets, dtype), c.to(dtype))


def check_outer(counts: list[int], n: int, k: int, layout: str, dtype: torch.dtype, seed: int) -> None:
    rows, offsets = sum(counts), ends(counts)
    (a, a_s), (b, b_s) = activations(n, rows, seed), activations(k, rows, seed + 1)
    operands = [laid_out(t, layout) for t in (a, a_s, b, b_s)]
    c = run(kernel.grouped_outer, *operands, offsets, torch.float32)
    assert c.shape == (len(counts), n, k)
    a, b = dequantised(a, a_s), dequantised(b, b_s)
    for e, (start, end) in enumerate(pairwise([0, *offsets.tolist()])):
        assert_product(c[e], a[:, start:end], b[:, start:end])
    if dtype != torch.float32:
        assert_same(run(kernel.grouped_outer, *operands, offsets, dtype), c.to(dtype))


@runs
@settings(draws, max_examples=12)
@given(m=sizes, n=sizes, k=sizes, per_row=st.booleans(), layout=layouts, dtype=dtypes, which=candidates, seed=seeds)
def test_product(m: int, n: int, k: int, per_row: bool, layout: str, dtype: torch.dtype, which: int, seed: int) -> None:
    """Any shape, any strides, the right operand with a scale per block or per row."""
    with tiles(which):
        check_gemm(m, n, k, per_row, layout, dtype, seed)


@runs
@settings(draws, max_examples=12)
@given(counts=group_sizes, n=sizes, k=sizes, layout=layouts, dtype=dtypes, which=candidates, seed=seeds)
def test_grouped_product(
    counts: list[int], n: int, k: int, layout: str, dtype: torch.dtype, which: int, seed: int
) -> None:
    """Groups of any sizes, empty ones among them, that begin anywhere."""
    with tiles(which):
        check_grouped(counts, n, k, layout, dtype, seed)


@runs
@settings(draws, max_examples=6)
@given(counts=st.none() | group_sizes, n=sizes, k=sizes, k2=sizes, which=candidates, seed=seeds)
def test_sum_of_products(counts: list[int] | None, n: int, k: int, k2: int, which: int, seed: int) -> None:
    """Of two products, plain or in groups, as one product of both lengths."""
    rows, offsets = sum(counts or [150]), ends(counts or [150])
    a, a2 = (activations(rows, size, seed + size) for size in (k, k2))
    b, b2 = (weights(len(offsets), size, n, seed=seed + size) for size in (k, k2))
    b, b2 = ((q.mT.contiguous(), s.mT) for q, s in (b, b2))  # as weights are for the gradient of their input
    if counts is None:
        b, b2 = ((q[0], s[0]) for q, s in (b, b2))
    with tiles(which):
        c = run(lambda *t: kernel.gemm_sum([t[:4], t[4:8]], t[8], torch.float32), *a, *b, *a2, *b2, counts and offsets)
    for e, (start, end) in enumerate(pairwise([0, *offsets.tolist()])):
        left = torch.cat([dequantised(q[start:end], s[start:end]) for q, s in (a, a2)], dim=1)
        right = torch.cat([dequantised(*((q, s) if counts is None else (q[e], s[e]))) for q, s in (b, b2)], dim=1)
        assert_product(c[start:end], left, right)


@runs
@settings(draws, max_examples=12)
@given(counts=group_sizes, n=sizes, k=sizes, layout=layouts, dtype=dtypes, which=candidates, seed=seeds)
def test_grouped_outer_product(
    counts: list[int], n: int, k: int, layout: str, dtype: torch.dtype, which: int, seed: int
) -> None:
    """The sum runs over the group's own columns, though their tiles and scales reach into its neighbours'."""
    with tiles(which):
        check_outer(counts, n, k, layout, dtype, seed)


@runs
@pytest.mark.parametrize("which", range(CANDIDATES))
def test_every_candidate(which: int) -> None:
    """Each of the tiles that autotuning may pick gives the same product, on shapes that fit none of them."""
    layout, dtype = LAYOUTS[which % len(LAYOUTS)], FLOATS[which % len(FLOATS)]
    with tiles(which):
        if which < len(GEMM_TILES):  # more than a band of 8 tiles, and one column of them and a bit
            block = kernel._gemm_kernel.configs[0].kwargs
            rows, m, n = block["BLOCK_M"], 9 * block["BLOCK_M"] + 5, block["BLOCK_N"] + 5
        else:  # more than a band of 16, and more tiles than SMs
            rows = HOPPER_TILES[which - len(GEMM_TILES)]
            m, n = 17 * rows + 5, 9 * 128 + 5
            check_gemm(m, n, 1000, which % 2 == 0, layout, dtype, 4)
        check_gemm(m, n, 130, which % 2 == 1, layout, dtype, 1)
        check_grouped([0, rows + 1, 1, 0, rows], n, 256, layout, dtype, 2)
        if which < len(OUTER_TILES) or which >= len(GEMM_TILES):
            check_outer([0, 70, 1, 0, 129], 130, 200, layout, dtype, 3)
            check_outer([300, 0, 84, 0], 200, 130, layout, dtype, 5)


@runs
def test_non_finite_numbers_stay_visible() -> None:
    """NaN and infinity make NaN of every product that their tile or block takes part in, and of no other."""
    x, w = numbers((140, 300), "normal", torch.float32, 1), numbers((3, 200, 300), "normal", torch.float32, 2)
    y = numbers((140, 200), "normal", torch.float32, 3)
    x[5, 7] = x[70, 130] = w[0, 1, 2] = y[70, 3] = torch.nan
    x[100, 299] = w[2, 150, 290] = y[130, 50] = -torch.inf
    offsets = ends([60, 0, 80])
    q, s, q_t, s_t = fp8_ops.act_quant_both(x)
    _, _, p_t, p_ts = fp8_ops.act_quant_both(y)
    b, b_s = fp8_ops.weight_quant(w)
    with tiles(3):
        for got, want in (
            (run(kernel.gemm, q, s, b[2], b_s[2], torch.float32), fp8_ops.fp8_gemm(q, s, b[2], b_s[2])),
            (run(kernel.gemm, q_t, s_t, p_t, p_ts, torch.float32), fp8_ops.fp8_gemm(q_t, s_t, p_t, p_ts)),
            (
                run(kernel.grouped_gemm, q, s, b, b_s, offsets, torch.float32),
                fp8_ops.fp8_grouped_gemm(q, s, b, b_s, offsets),
            ),
            (
                run(kernel.grouped_outer, p_t, p_ts, q_t, s_t, offsets, torch.float32),
                fp8_ops.fp8_grouped_outer(p_t, p_ts, q_t, s_t, offsets),
            ),
        ):
            assert want.isnan().any() and not want.isnan().all()
            assert torch.equal(got.isfinite(), want.isfinite())


@runs
@pytest.mark.parametrize("exponents", [(-60, -60), (100, -110), (60, 60)])
def test_products_of_extreme_scales(exponents: tuple[int, int]) -> None:
    """The scales' own product may be too small or too large for float32 where that of the numbers is not."""
    a, b = (numbers((20, 128), "normal", torch.float32, i) * 2.0**e for i, e in enumerate(exponents))
    (a, a_s), (b, b_s) = fp8_ops.act_quant(a), fp8_ops.act_quant(b)
    with tiles(0):
        c = run(kernel.gemm, a, a_s, b, b_s, torch.float32)
    assert_product(c, dequantised(a, a_s), dequantised(b, b_s))


def test_which_products_run_hoppers_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones on Hopper, in tiles of 128 rows where those of 256 would leave too many SMs idle."""
    monkeypatch.setattr(kernel, "_hopper_sms", lambda device: 132)
    for m, n, groups, rows in (
        (4096, 7168, 0, 256),
        (4096, 2112, 0, 128),
        (256, 7168, 0, 128),
        (64, 7168, 0, 0),
        (4096, 128, 0, 0),
        (64 * 512, 2048, 64, 256),
        (64 * 128, 2048, 64, 128),
        (64 * 100, 2048, 64, 0),
    ):
        assert kernel._hopper_rows(m, n, groups, DEVICE) == rows
    # weight gradients of few tiles: their sums over 16,384 rows are divided
    for m, n, parts in (1024, 1024, 2), (384, 1024, 5), (2048, 1024, 1), (2048, 8192, 1), (64, 1024, 1):
        assert kernel._hopper_parts(m, n, 16384, DEVICE) == parts
    monkeypatch.setattr(kernel, "_hopper_sms", lambda device: 0)
    assert kernel._hopper_rows(4096, 7168, 0, DEVICE) == 0
    assert kernel._hopper_parts(1024, 1024, 16384, DEVICE) == 1


# --- What calls them ----------------------------------------------------------------------------------------------


@runs
def test_which_calls_reach_a_kernel() -> None:
    """Any leading dimensions do, a stack of weights too; other block sizes than 128 and empty tensors do not."""
    x = numbers((2, 3, 200), "normal", torch.float32, 1).to(DEVICE)
    for function, args, name in (
        (fp8_ops.act_quant, (x,), "act_quant"),
        (fp8_ops.act_quant_both, (x[0],), "act_quant_both"),
        (fp8_ops.weight_quant, (x,), "weight_quant"),
        (fp8_ops.weight_dequant, fp8_ops.weight_quant(x), "weight_dequant"),
        (fp8_ops.fp8_gemm, (*fp8_ops.act_quant(x), *fp8_ops.weight_quant(x[0])), "gemm"),
    ):
        want = function(*(t.cpu() for t in args))
        with dispatched() as ran, tiles(0):
            got = function(*args)
        assert ran == {name}
        for g, w in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (got, want)), strict=True):
            torch.testing.assert_close(g.cpu().float(), w.float(), rtol=2**-7 if name == "gemm" else 0, atol=0.02)
    with dispatched() as ran:
        for empty in x[:0], x[..., :0]:
            assert fp8_ops.act_quant(empty)[0].shape == empty.shape
            fp8_ops.act_quant_both(empty.flatten(0, -2))
            fp8_ops.weight_dequant(*fp8_ops.weight_quant(empty))
        fp8_ops.act_quant(x, 64)
        fp8_ops.weight_dequant(*fp8_ops.weight_quant(x, 64), 64)
    assert not ran


@runs
def test_shapes_given_to_torch_compile() -> None:
    """A compiled graph trusts the shapes, strides and dtypes announced: kernels and plain torch have to return them."""
    x, w = (numbers(shape, "normal", torch.float32, 1).to(DEVICE) for shape in [(300, 200), (3, 140, 200)])
    offsets = ends([100, 0, 200]).to(DEVICE)
    q, s, q_t, s_t = fp8_ops.act_quant_both(x)
    b, b_s = fp8_ops.weight_quant(w)
    for function, *args in (
        (fp8_ops.act_quant, x),
        (fp8_ops.act_quant, x.T),
        (fp8_ops.act_quant_both, x),
        (fp8_ops.act_quant_both, x.T),
        (fp8_ops.weight_quant, w),
        (fp8_ops.weight_quant, w.mT),
        (fp8_ops.weight_quant_both, w),
        (fp8_ops.weight_quant_both, w.mT),
        (fp8_ops.weight_dequant, b, b_s),
        (fp8_ops.weight_dequant, b.mT, b_s.mT),
        (fp8_ops.fp8_gemm, q, s, b[0], b_s[0]),
        (fp8_ops.fp8_gemm, q_t, s_t, q_t, s_t),
        (fp8_ops.fp8_grouped_gemm, q, s, b, b_s, offsets),
        (fp8_ops.fp8_grouped_outer, q_t, s_t, q_t, s_t, offsets),
        (fp8_ops.fp8_gemm_sum, q, s, b[0], b_s[0], q, s, b[1], b_s[1]),
        (fp8_ops.fp8_gemm_sum, q, s, b, b_s, q, s, b, b_s, offsets),
    ):
        with FakeTensorMode() as mode:
            told = function(*(mode.from_tensor(arg) for arg in args))
        with dispatched() as ran, tiles(0):
            made = function(*args)
        assert ran
        plain = function(*(arg.cpu() for arg in args))
        for out in made, plain:
            for t, m in zip(*((o,) if isinstance(o, torch.Tensor) else o for o in (told, out)), strict=True):
                assert (t.shape, t.stride(), t.dtype) == (m.shape, m.stride(), m.dtype), function


def grads_of(
    x: torch.Tensor,
    ws: list[torch.Tensor],
    offsets: torch.Tensor | None,
    scale_fmt: str | None,
    linear: Callable[..., tuple[torch.Tensor, ...]] = fp8_ops.fp8_linear,
) -> list[torch.Tensor]:
    """Outputs of an FP8 layer of several weights, and the gradients of its input and of them, on the CPU."""
    x, *ws = (t.detach().clone().requires_grad_() for t in (x, *ws))
    quantized = [fp8_ops.quantize(w, scale_fmt) for w in ws]
    ys = linear(x, ws, quantized, offsets, scale_fmt)
    grads = [numbers(tuple(y.shape), "normal", y.dtype, i).to(y.device) for i, y in enumerate(ys)]
    torch.autograd.backward(ys, grads)
    return [t.detach().cpu() for t in (*ys, x.grad, *(w.grad for w in ws))]


def assert_near(got: list[torch.Tensor], want: list[torch.Tensor], dtype: torch.dtype) -> None:
    """The operands are the same bit for bit, so what differs is summation, and at most a rounding to `dtype`."""
    tolerance = 2.0**-9 if DEVICE.type == "cuda" else 2.0**-20
    for g, w in zip(got, want, strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        error = (g.double() - w.double()).norm() / w.double().norm()
        assert error <= max(tolerance, 2 * torch.finfo(dtype).eps)


@runs
@pytest.mark.parametrize(("scale_fmt", "dtype"), [(None, torch.float32), ("ue8m0", torch.bfloat16)])
@pytest.mark.parametrize("counts", [None, [0, 70, 1, 59]])
def test_linear_layer(counts: list[int] | None, scale_fmt: str | None, dtype: torch.dtype) -> None:
    """Forward and backward through the kernels, and through plain torch: the same."""
    offsets = None if counts is None else ends(counts)
    stack = () if counts is None else (len(counts),)
    x = numbers((130, 200) if stack else (2, 65, 200), "normal", dtype, 1)
    ws = [numbers((*stack, n, 200), "normal", torch.float32, n) for n in (136, 50)]
    want = grads_of(x, ws, offsets, scale_fmt)
    on_device = None if offsets is None else offsets.to(DEVICE)
    with dispatched() as ran, tiles(2):
        got = grads_of(x.to(DEVICE), [w.to(DEVICE) for w in ws], on_device, scale_fmt)
    products = {"grouped_gemm", "grouped_outer", "gemm_sum"} if stack else {"gemm", "gemm_sum"}
    assert ran == {"weight_quant_both", "act_quant_both"} | products
    assert_near(got, want, dtype)


# --- Between the products -----------------------------------------------------------------------------------------


def compare(
    ours: Callable[..., Any], reference: Callable[..., Any], inputs: list[torch.Tensor], dtype: torch.dtype
) -> None:
    """Outputs and gradients of a kernel against plain torch in float64, within a rounding of `dtype`."""
    mine = [x.detach().to(DEVICE, dtype, copy=True).requires_grad_() for x in inputs]
    exact = [x.detach().cpu().double().requires_grad_() for x in mine]
    outputs, expected = ours(*mine), reference(*exact)
    pairs = list(zip(outputs, expected, strict=True))
    seeds = [torch.randn(y.shape, generator=generator(i), dtype=torch.float64) for i, y in enumerate(expected)]
    seeds = [seed.to(y.dtype) for seed, (y, _) in zip(seeds, pairs, strict=True)]
    torch.autograd.backward(outputs, [seed.to(DEVICE) for seed in seeds])
    torch.autograd.backward(expected, [seed.double() for seed in seeds])
    pairs += [(a.grad, b.grad) for a, b in zip(mine, exact, strict=True)]
    for actual, wanted in pairs:
        assert actual.shape == wanted.shape
        bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype] * max(1.0, wanted.abs().max().item())
        assert (actual.detach().cpu().double() - wanted.detach()).abs().max() <= bound


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


fused_dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@runs
@settings(draws, max_examples=10)
@given(st.integers(1, 9), st.integers(1, 700), st.booleans(), fused_dtypes, seeds)
def test_rms_norm(rows: int, dim: int, updated: bool, dtype: torch.dtype, seed: int) -> None:
    def ours(x: torch.Tensor, w: torch.Tensor, *update: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return kernel_fused.add_rms_norm(x, update[0] if update else None, w, 1e-6)

    def reference(x: torch.Tensor, w: torch.Tensor, *update: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = (x + update[0]).to(dtype).double() if update else x
        return x, torch.nn.functional.rms_norm(x, w.shape, w, 1e-6)

    inputs = [randn(rows, dim, seed=seed), 1 + 0.2 * randn(dim, seed=seed + 1)]
    compare(ours, reference, inputs + ([randn(rows, dim, seed=seed + 2)] if updated else []), dtype)


@runs
def test_rms_norm_of_a_slice() -> None:
    wide = randn(5, 3, 40).to(DEVICE)
    (x, _), w = wide.split([24, 16], dim=-1), torch.ones(24, device=DEVICE)
    y = kernel_fused.add_rms_norm(x, None, w, 1e-6)[1]
    assert (y - torch.nn.functional.rms_norm(x, (24,), w, 1e-6)).abs().max() < 1e-5


@runs
@settings(draws, max_examples=10)
@given(st.integers(1, 9), st.integers(1, 1200), st.sampled_from(sorted(model.ACTIVATIONS)), fused_dtypes, seeds)
def test_glu(rows: int, n: int, act: str, dtype: torch.dtype, seed: int) -> None:
    def reference(gate: torch.Tensor, up: torch.Tensor) -> list[torch.Tensor]:
        return [model.ACTIVATIONS[act](gate) * up]

    gate_up = torch.cat([2 * randn(rows, n, seed=seed), randn(rows, n, seed=seed + 1)], dim=-1)
    compare(lambda x: [kernel_fused.glu(x, act)], lambda x: reference(*x.split(n, dim=-1)), [gate_up], dtype)


def quantised(x: torch.Tensor, scale_fmt: str | None) -> tuple[torch.Tensor, ...]:
    """What plain torch makes of an activation, on the CPU: the reference of kernels that quantise their results."""
    return fp8_ops.act_quant_both(x.detach().cpu().flatten(0, -2), scale_fmt)


@runs
@settings(draws, max_examples=5)
@given(
    n=st.integers(1, 150), dim=st.integers(1, 150), act=st.sampled_from(sorted(model.ACTIVATIONS)),
    limit=st.integers(1, 150), dtype=fused_dtypes, seed=seeds,
)  # fmt: skip
def test_glu_quantised(n: int, dim: int, act: str, limit: int, dtype: torch.dtype, seed: int) -> None:
    """The same bits as quantising what the kernel without quantisation writes, forward and backward."""
    gate_up, dy = (2 * randn(n, 2 * dim, seed=seed)).to(dtype), randn(n, dim, seed=seed + 1).to(dtype)
    leaf, scale_fmt = gate_up.to(DEVICE).requires_grad_(), FORMATS[seed % 2]
    y = kernel_fused.glu(leaf, act)
    y.backward(dy.to(DEVICE))
    behind, offsets = (torch.arange(n) >= limit)[:, None], torch.tensor([limit // 2, min(n, limit)], dtype=torch.int32)
    expected = [y.detach(), *leaf.grad.split(dim, dim=-1)]
    wanted = [quantised(t.cpu().masked_fill(behind, 0), scale_fmt) for t in expected]
    # what no group wrote is not read
    gate, up = (t.masked_fill(behind, float("nan")) for t in gate_up.split(dim, dim=-1))
    dy = dy.masked_fill(behind, float("nan"))
    for both in (True, False):
        results = run(kernel_fused.glu_quant, gate, up, act, offsets, scale_fmt, both)
        for got, want in zip(results, wanted[0][: len(results)], strict=True):
            assert_same(got, want)

    def backward(*args: Any) -> tuple[torch.Tensor | None, ...]:
        dgate, dup = kernel_fused.glu_backward_quant(*args)
        return *dgate, *dup

    results = run(backward, gate, up, dy, act, offsets, scale_fmt)
    for got, want in zip(results, [*wanted[1], *wanted[2]], strict=True):
        assert_same(got, want)


@runs
@settings(draws, max_examples=6)
@given(
    n=st.integers(1, 150), dim=st.integers(1, 300), updated=st.booleans(), both=st.booleans(),
    with_values=st.booleans(), dtype=fused_dtypes, seed=seeds,
)  # fmt: skip
def test_rms_norm_quantised(
    n: int, dim: int, updated: bool, both: bool, with_values: bool, dtype: torch.dtype, seed: int
) -> None:
    """The same bits as the norm and a quantiser after it, and the same gradients.

    Of integers, whose squares add up exactly: the order of a sum differs between the two kernels.
    """
    scale_fmt, w = FORMATS[seed % 2], (1 + 0.2 * randn(dim, seed=seed)).to(DEVICE)
    x, update = (torch.randint(-9, 9, (1, n, dim), generator=generator(seed + i)).to(dtype) for i in range(2))
    results = []
    for quantises in (True, False):
        leaves = [t.to(DEVICE).requires_grad_() for t in (x, update, w)]
        inputs = leaves[0], leaves[1] if updated else None, leaves[2], 1e-6
        if quantises:
            total, y, *in_fp8 = kernel_fused.add_rms_norm_quant(*inputs, scale_fmt, both, with_values)
            placeholder = y
        else:
            total, y = kernel_fused.add_rms_norm(*inputs)
        grads = [randn(*x.shape, seed=seed + i).to(DEVICE, dtype) for i in range(2)]
        torch.autograd.backward([total, y], grads)
        results.append([total.detach(), *(t.grad for t in leaves if t.grad is not None)])
    for got, want in zip(*results, strict=True):
        assert_same(got.cpu(), want.cpu())
    for got, want in zip(in_fp8[: 4 if both else 2], quantised(y, scale_fmt)[: 4 if both else 2], strict=True):
        assert_same(got.cpu(), want)
    assert (in_fp8[2] is not None) == both
    if with_values:
        assert_same(placeholder.detach().cpu(), y.detach().cpu())
    else:  # without memory, and reading it shows
        assert placeholder.isnan().all() and placeholder.untyped_storage().nbytes() == dtype.itemsize


@runs
@settings(draws, max_examples=5)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(1, 5), st.integers(1, 200), fused_dtypes, seeds)
def test_permute_quantised(n: int, k: int, experts: int, dim: int, dtype: torch.dtype, seed: int) -> None:
    """The rows of the first experts as `permute` has them, quantised; those of others are zeros without a gradient."""
    x, choices = randn(n, dim, seed=seed).to(dtype), torch.randint(experts, (n, k), generator=generator(seed))
    places, index, ends = kernel_fused.sort_by_expert(choices.to(DEVICE), experts)
    here, scale_fmt = 1 + seed % experts, FORMATS[seed % 2]
    behind = (torch.arange(n * k) >= ends[here - 1].cpu())[:, None]
    leaf, twin = (x.to(DEVICE).requires_grad_() for _ in range(2))
    rows, same, *in_fp8 = kernel_fused.permute_quant(leaf, places, index, ends[here - 1 : here], scale_fmt, True)
    permuted, twins_same = kernel_fused.permute(twin, places)
    for got, want in zip(in_fp8, quantised(permuted.cpu().masked_fill(behind, 0), scale_fmt), strict=True):
        assert_same(got.cpu(), want)
    grad, other = randn(n * k, dim, seed=seed + 1).to(dtype), randn(n, dim, seed=seed + 2).to(DEVICE, dtype)
    torch.autograd.backward([rows, same], [grad.masked_fill(behind, float("nan")).to(DEVICE), other])
    torch.autograd.backward([permuted, twins_same], [grad.masked_fill(behind, 0).to(DEVICE), other])
    assert rows.isnan().all() and torch.equal(leaf.grad, twin.grad)


@runs
@pytest.mark.parametrize("counts", [None, [0, 39, 1]])
def test_mlp_in_fp8(counts: list[int] | None) -> None:
    """Output and weights' gradients are those of three FP8 layers and the kernel of the activation, to the bit."""
    offsets = None if counts is None else ends(counts).to(DEVICE)
    stack = () if counts is None else (len(counts),)
    x = numbers((40, 30) if stack else (2, 65, 30), "normal", torch.bfloat16, 1)
    shapes = [(20, x.shape[-1]), (x.shape[-1], 20), (20, x.shape[-1])]
    ws = [numbers((*stack, *shape), "normal", torch.float32, i) for i, shape in enumerate(shapes)]

    def separate_layers(x: torch.Tensor, weights: Any, quantized: Any, act: str, offsets: Any) -> torch.Tensor:
        gate_up = fp8_ops.fp8_linear(x, weights[::2], quantized[::2], offsets)
        h = kernel_fused.glu(torch.cat(gate_up, dim=-1), act)
        return fp8_ops.fp8_linear(h, weights[1:2], quantized[1:2], offsets)[0]

    results = []
    for mlp in (fp8_ops.fp8_mlp, separate_layers):
        leaf, *weights = leaves = [t.to(DEVICE).requires_grad_() for t in (x, *ws)]
        with dispatched(), tiles(3):
            y = mlp(leaf, weights, [fp8_ops.quantize(w) for w in weights], "silu", offsets)
            y.backward(numbers(tuple(x.shape), "normal", torch.bfloat16, 5).to(DEVICE))
        results.append([y.detach(), *(t.grad for t in leaves)])
    (y, dx, *dws), (want_y, want_dx, *want_dws) = results
    for got, want in zip([y, *dws], [want_y, *want_dws], strict=True):
        assert_same(got.cpu(), want.cpu())
    # one sum in float32 there, two rounded ones here
    assert (dx - want_dx).abs().max() <= 2**-7 * want_dx.abs().max()


head_sizes = {
    "bsz": st.integers(1, 2),
    "seqlen": st.integers(1, 5),
    "heads": st.integers(1, 5),
    "nope": st.integers(0, 9),
    "half": st.integers(1, 6),
}


@runs
@settings(draws, max_examples=10)
@given(**head_sizes, dtype=fused_dtypes, seed=seeds)
def test_rope(bsz: int, seqlen: int, heads: int, nope: int, half: int, dtype: torch.dtype, seed: int) -> None:
    angles = 3 * randn(seqlen, 1, half, seed=seed)
    cos, sin = angles.cos(), angles.sin()

    def reference(x: torch.Tensor) -> list[torch.Tensor]:
        x_nope, x_pe = x.split([nope, 2 * half], dim=-1)
        even, odd = x_pe[..., 0::2], x_pe[..., 1::2]
        return [torch.cat([x_nope, even * cos - odd * sin, odd * cos + even * sin], dim=-1)]

    x = randn(bsz, seqlen, heads, nope + 2 * half, seed=seed)
    compare(lambda x: [kernel_fused.rope(x, cos.to(DEVICE), sin.to(DEVICE))], reference, [x], dtype)


@runs
@settings(draws, max_examples=10)
@given(**head_sizes, v=st.integers(1, 9), dtype=fused_dtypes, seed=seeds)
def test_keys_and_values(
    bsz: int, seqlen: int, heads: int, nope: int, half: int, v: int, dtype: torch.dtype, seed: int
) -> None:
    angles = 3 * randn(seqlen, 1, half, seed=seed)
    cos, sin = angles.cos(), angles.sin()

    def reference(kv: torch.Tensor, wide: torch.Tensor) -> list[torch.Tensor]:
        even, odd = wide[..., 4::2].unsqueeze(2), wide[..., 5::2].unsqueeze(2)
        k_pe = torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1).expand(-1, -1, heads, -1)
        return [torch.cat([kv[..., :nope], k_pe], dim=-1), kv[..., nope:]]

    def ours(kv: torch.Tensor, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return kernel_fused.keys_and_values(kv, wide[..., 4:], cos.to(DEVICE), sin.to(DEVICE), nope)

    inputs = [randn(bsz, seqlen, heads, nope + v, seed=seed), randn(bsz, seqlen, 4 + 2 * half, seed=seed + 1)]
    compare(ours, reference, inputs, dtype)


@runs
@settings(draws, max_examples=15)
@given(st.data())
def test_route(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2, 3, 4]))
    per_group, limited = data.draw(st.integers(2, 6)), data.draw(st.integers(1, groups))
    topk, seed = data.draw(st.integers(1, min(4, limited * per_group))), data.draw(seeds)
    args = model.ModelArgs(
        dim=8, n_routed_experts=groups * per_group, n_activated_experts=topk, n_expert_groups=groups,
        n_limited_groups=limited, gate_bias=data.draw(st.booleans()), n_dense_layers=0,
    )  # fmt: skip
    gate, scores = model.Gate(args), randn(data.draw(st.integers(1, 70)), groups * per_group, seed=seed).sigmoid()
    if gate.bias is not None:
        gate.bias.copy_(randn(groups * per_group, seed=seed + 1))
    bias = None if gate.bias is None else gate.bias.to(DEVICE)
    chosen = kernel_fused.route(scores.to(DEVICE), bias, groups, limited, topk)
    assert torch.equal(chosen.cpu(), gate.route(scores))


@runs
@settings(draws, max_examples=10)
@given(st.integers(1, 1500), st.integers(1, 40), st.integers(1, 4), seeds)
def test_sort_by_expert(n: int, experts: int, k: int, seed: int) -> None:
    choices = torch.randint(experts, (n, k), generator=generator(seed))
    places, index, ends = kernel_fused.sort_by_expert(choices.to(DEVICE), experts)
    order = choices.flatten().sort(stable=True).indices
    assert torch.equal(index.cpu().long(), order // k)
    assert torch.equal(places.flatten().cpu().long(), order.argsort())
    assert torch.equal(ends.cpu().long(), choices.flatten().bincount(minlength=experts).cumsum(0))


@runs
@pytest.mark.parametrize("shape", [(1, 8, 1), (130, 264, 32)])
def test_router_logits(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are as accurate as in float32, or another expert would be chosen; gradients of x are bfloat16."""
    (n, dim, experts), results = shape, []
    monkeypatch.setattr(fp8_ops, "kernels", lambda x: kernel_fused)
    x, w = randn(n, dim).bfloat16(), randn(experts, dim, seed=1)
    grads = randn(n, dim, seed=2).bfloat16(), randn(n, experts, seed=3)
    for exact in (False, True):
        leaves = [(t.double() if exact else t.to(DEVICE)).detach().clone().requires_grad_() for t in (x, w)]
        outputs = (leaves[0], leaves[0] @ leaves[1].T) if exact else fp8_ops.router_logits(*leaves)
        torch.autograd.backward(outputs, [g.to(y) for g, y in zip(grads, outputs, strict=True)])
        results.append([t.detach().cpu() for t in (*outputs, *(leaf.grad for leaf in leaves))])
    (same, logits, *ours), (_, wanted, *theirs) = results
    assert torch.equal(same, x) and logits.dtype == torch.float32
    assert (logits - wanted).norm() <= 2 * EPS * (x.double().abs() @ w.double().abs().T).norm()
    for got, want, bound in zip(ours, theirs, (2.0**-7, 2.0**-15), strict=True):
        assert (got - want).norm() <= bound * want.norm()


@runs
@settings(draws, max_examples=8)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 300), fused_dtypes, seeds)
def test_permute_and_combine(n: int, k: int, dim: int, dtype: torch.dtype, seed: int) -> None:
    places = torch.randperm(n * k, generator=generator(seed)).view(n, k)
    order, here = places.flatten().argsort(), places.int().to(DEVICE)
    compare(lambda x: kernel_fused.permute(x, here), lambda x: [x[order // k], x], [randn(n, dim, seed=seed)], dtype)
    weights = randn(n, k, seed=seed + 1).requires_grad_()
    theirs, ours = weights.detach().double().requires_grad_(), weights.detach().to(DEVICE).requires_grad_()
    compare(
        lambda x, *base: [kernel_fused.combine(x, here, ours, *base)],
        lambda x, *base: [(x[places] * theirs.unsqueeze(-1)).sum(1) + (base[0] if base else 0)],
        [randn(n * k, dim, seed=seed + 2), *([randn(n, dim, seed=seed + 3)] if seed % 2 else [])],
        dtype,
    )
    assert (ours.grad.cpu() - theirs.grad).abs().max() <= 1e-2 * max(1.0, theirs.grad.abs().max().item())


INDEXED = {"q_lora_rank": 8, "index_n_heads": 8, "index_head_dim": 6, "index_topk": 3}  # with sparse attention


@runs
@pytest.mark.parametrize("values", [{}, {"kv_lora_rank": 0, "q_lora_rank": 8}, INDEXED])
def test_model_by_kernels(values: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss and all gradients of a model are those of plain torch."""
    sizes = {"dim": 16, "inter_dim": 12, "moe_inter_dim": 8, "n_layers": 2, "n_heads": 2, "kv_lora_rank": 8}
    sizes |= {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 4}
    net = model.Transformer(model.ModelArgs(**{**sizes, "n_activated_experts": 2, **values}))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.2 * randn(*p.shape, seed=i))
    net, tokens = net.to(DEVICE), torch.randint(256, (2, 8), generator=generator(1)).to(DEVICE)
    results = []
    for module in (None, kernel_fused):
        monkeypatch.setattr(fp8_ops, "kernels", lambda x, module=module: module)
        net.zero_grad()
        loss = net.loss(tokens[:, :-1], tokens[:, 1:]).total
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in net.parameters())])
    for by_torch, by_kernels in zip(*results, strict=True):
        assert (by_torch - by_kernels).abs().max() <= 1e-4 * max(1e-2, by_torch.abs().max().item())


@runs
@pytest.mark.parametrize(
    ("values", "ranks"),
    [
        ({"kv_lora_rank": 0, "q_lora_rank": 8, "n_mtp_layers": 0}, 2),
        pytest.param({"hidden_act": "relu2", "scale_fmt": "ue8m0"}, 1, marks=pytest.mark.slow),
        pytest.param(INDEXED | {"n_mtp_layers": 0}, 2, marks=pytest.mark.slow),
    ],
)
def test_model_in_fp8_by_kernels(values: dict[str, Any], ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that quantise what they compute change a model's loss and gradients by roundings of float32 alone.

    Nothing reads a placeholder, whose NaN would spread. On one of two tensor-parallel ranks, whose experts get some of
    the rows, and on a single one with gradient checkpointing.
    """
    sizes = {"dim": 16, "inter_dim": 12, "moe_inter_dim": 8, "n_layers": 2, "n_heads": 2, "kv_lora_rank": 8}
    sizes |= {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 4, "n_mtp_layers": 1}
    args = model.ModelArgs(**{**sizes, "n_activated_experts": 2, "n_shared_experts": 1, **values})
    ctx = parallel.ParallelContext(world_size=ranks, rank=ranks - 1, model_parallel=ranks)
    net = parallel.build(ctx, args, torch.float32)
    parallel.init_weights(ctx, net, 0)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.2 * randn(*p.shape, seed=i))
    net, tokens = net.to(DEVICE), torch.randint(256, (1, 6), generator=generator(1)).to(DEVICE)
    net.gradient_checkpointing = ranks == 1
    monkeypatch.setattr(fp8_ops, "gemm_impl", "fp8")
    monkeypatch.setattr(fp8_ops, "kernels", lambda x: kernel_fused)
    fuses, results, used = fp8_ops.fuses_fp8, [], []
    monkeypatch.setattr(fp8_ops, "fp8_mlp", lambda *args, mlp=fp8_ops.fp8_mlp: used.append(args) or mlp(*args))
    for function in (fuses, lambda x: False):
        monkeypatch.setattr(fp8_ops, "fuses_fp8", function)
        net.zero_grad()
        with dispatched(), tiles(3):
            net.quantize_weights()
            loss = net.loss(tokens[:, :-1], tokens[:, 1:]).total
            loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in net.parameters())])
    mlps = 1 + 2 * (1 + args.n_mtp_layers)  # a dense one, and routed and shared experts
    assert len(used) == mlps * (2 if net.gradient_checkpointing else 1)
    for fused, separate in zip(*results, strict=True):
        assert (fused - separate).norm() <= 0.02 * separate.norm()


@runs
@pytest.mark.parametrize("gemm_impl", ["bf16", "fp8"])
def test_nothing_else_reads_what_ranks_sum_in_its_place(gemm_impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensor-parallel ranks; each sum doubles here. Gradients are those of sums in new tensors."""
    ctx, results = parallel.ParallelContext(world_size=2, rank=1, model_parallel=2), []
    net = parallel.build(ctx, tiny(n_layers=2, n_mtp_layers=0).args, torch.bfloat16).train()
    parallel.init_weights(ctx, net, 0)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.2 * randn(*p.shape, seed=i))
    net, tokens = net.to(DEVICE), torch.randint(256, (1, 6), generator=generator(1)).to(DEVICE)
    monkeypatch.setattr(fp8_ops, "gemm_impl", gemm_impl)
    monkeypatch.setattr(fp8_ops, "kernels", lambda x: kernel_fused)
    for double in (lambda x, _: x.contiguous().mul_(2), lambda x, _: 2 * x):
        monkeypatch.setattr(parallel, "_all_reduce", double)
        net.zero_grad()
        with dispatched(), tiles(3):
            parallel.quantize_weights(ctx, net)
            loss = net.loss(tokens[:, :-1], tokens[:, 1:]).total
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in net.parameters())])
    for in_place, new in zip(*results, strict=True):
        assert torch.equal(in_place, new)


# --- Muon ---------------------------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("shape", [(2, 8, 24), (1, 136, 72), (3, 40, 200), (2, 264, 136)])
def test_newton_schulz(shape: tuple[int, int, int]) -> None:
    x = randn(*shape, seed=sum(shape))
    a, b, c = 3.4445, -4.7750, 2.0315
    expected = x.double() / x.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        wide = expected if shape[1] <= shape[2] else expected.mT
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
        expected = wide if shape[1] <= shape[2] else wide.mT
    # on a GPU, tiles of float32 would need more shared memory than there is: Muon runs in bfloat16
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.06))[DEVICE.type == "cuda" :]:
        actual = kernel_fused.newton_schulz(x.to(dtype).to(DEVICE), (a, b, c), 5)
        assert actual.shape == x.shape
        assert (actual.cpu().double() - expected).norm() <= bound * expected.norm()


@runs
@pytest.mark.parametrize("shape", [(40, 88), (88, 40)])
def test_gram_iteration_keeps_small_singular_values(shape: tuple[int, int]) -> None:
    """Of a matrix whose singular values span four decades, it is nearer to the exact iteration than the usual one."""
    left, right = (torch.linalg.qr(randn(n, min(shape), seed=n).double())[0] for n in shape)
    x = ((left * 10 ** torch.linspace(0, -4, min(shape)).double()) @ right.T)[None].bfloat16()

    def error(y: torch.Tensor) -> float:
        return (y.double().cpu() - exact).norm().item()

    exact = optim.orthogonalize(x.double())
    usual = optim.orthogonalize(x)  # by plain torch, since `x` is on the CPU
    ours = kernel_fused.newton_schulz(x.to(DEVICE), optim.NS_COEFFICIENTS, optim.NS_STEPS)
    assert error(ours) < 0.5 * error(usual) < 0.1 * exact.norm()


@runs
def test_symmetric_product_is_symmetric_to_the_bit() -> None:
    y = kernel_fused._symmetric(randn(2, 200, 56).bfloat16().to(DEVICE))
    assert torch.equal(y, y.mT)


@runs
@pytest.mark.parametrize("n", [1, 4097, 9000])
def test_momentum_and_update(n: int) -> None:
    grad, buffer, p = (randn(n, seed=i).to(DEVICE) for i in range(3))
    update = torch.empty(n, dtype=torch.bfloat16, device=DEVICE)
    expected = buffer.lerp(grad, 1 - 0.95)
    kernel_fused.momentum_update(grad, buffer, update, 0.95)
    assert (buffer - expected).abs().max() < 1e-6
    assert (update.float() - grad.lerp(expected, 0.95)).abs().max() < 0.02
    wanted = (1 - 0.3 * 0.1) * p - 0.3 * 2 * update.float()
    kernel_fused.apply_update(p, update, torch.tensor(0.3, device=DEVICE), 0.1, 2.0)
    assert (p - wanted).abs().max() < 1e-6


# --- What kernels are compiled for --------------------------------------------------------------------------------


@contextmanager
def specialisations() -> Iterator[set[tuple[str, ...]]]:
    """Within it kernels write nothing. Yields what Triton would compile: kernels, with the kinds of their arguments."""
    met: set[tuple[str, ...]] = set()

    @cache
    def binder(fn: Any) -> Any:
        function = JITFunction(fn)
        return create_function_from_signature(function.signature, function.params, CUDABackend)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        met.add((self.fn.__name__, *map(str, binder(self.fn)(*args, **options)[1:])))

    def tune(self: Any, *args: Any, **options: Any) -> None:
        for config in self.configs:
            config.pre_hook({**dict(zip(self.arg_names, args, strict=False)), **config.all_kwargs()})
            self.fn.run(*args, **options, **config.all_kwargs())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "run", run)
        patch.setattr(JITFunction, "run", run)
        patch.setattr(Autotuner, "run", tune)
        yield met


class ZeroedTorch:
    """`torch` whose `empty` makes zeros: what kernels would write there are indices, too."""

    empty = staticmethod(torch.zeros)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


# --- Compilation, without a GPU -----------------------------------------------------------------------------------

ARCHITECTURES = (89, 90, 100)
TENSOR_CORES = {
    89: r"mma\.sync\S*\.e4m3\.e4m3\.",
    90: r"wgmma\.mma_async\S*\.e4m3\.e4m3$",
    100: r"tcgen05\.mma\S*\.kind::f8f6f4$",
}
SHARED_MEMORY = {89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program may have


class DryDriver:
    """As much of a GPU's driver as it takes to compile for it."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(arch: int, describe: Callable[[str, dict[str, Any]], dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Within it, kernels are compiled for a GPU, as for their arguments, but not launched.

    Yields the list of what was compiled, each with what `describe` finds in its PTX and its launch's options.
    """
    compiled: list[dict[str, Any]] = []
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        binary = launch(self, *args, grid=grid, warmup=True, **kwargs)
        row = {"kernel": self.fn.__name__, "shared": binary.metadata.shared, "cubin": len(binary.asm["cubin"])}
        compiled.append(row | describe(binary.asm["ptx"], kwargs))
        return binary

    triton.runtime.driver.set_active(DryDriver(arch))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        yield compiled


def compiled_by(script: str, cache: Path) -> Any:
    """What a script prints, as JSON, in a process of its own, where Triton compiles into an empty cache."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    env |= {
        "PYTHONPATH": os.pathsep.join([str(Path(kernel.__file__).parent), env.get("PYTHONPATH", "")]),
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_INTERPRET": "0",  # conftest.py would have kernels interpreted
    }
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def compile_all(arch: int) -> list[dict[str, Any]]:
    """Calls the functions of `kernel.py` with kernels that are compiled but not launched."""

    def describe(ptx: str, options: dict[str, Any]) -> dict[str, Any]:
        return {
            "block_m": options.get("BLOCK_M"),
            "target": re.findall(r"^\.target (\w+)", ptx, re.M),
            "multiplies": sorted(set(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.[\w.:]*", ptx))),
            "casts": sorted(set(re.findall(r"cvt\.\S*e4m3\S*", ptx))),
            "casts_of_two_stores": casts_of_two_stores(ptx),
        }

    def fp8(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=E4M3)

    with compiling(arch, describe) as compiled, pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_hopper_sms", lambda device: 132)
        x, offsets = torch.empty(256, 384, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int32)
        kernel.act_quant(x, None)
        kernel.act_quant_both(x, "ue8m0")
        kernel.weight_quant(x.float(), None)
        kernel.weight_quant_both(x.float(), "ue8m0")
        kernel.weight_dequant(fp8(256, 384), torch.empty(2, 3), torch.bfloat16)
        if arch == 90:  # other dtypes, strides and sizes of 1, which Triton compiles as constants
            kernel.act_quant(x.T.double(), "ue8m0")
            kernel.act_quant_both(x[:1, ::2].half(), None)
            kernel.weight_quant(torch.empty(3, 1, 1, dtype=torch.float16), "ue8m0")
            kernel.weight_dequant(fp8(3, 384, 256).mT, torch.empty(3, 3, 2).mT, torch.float32)
        for i in range(len(GEMM_TILES)):
            with tiles(i):
                if i % 2:
                    kernel.gemm(fp8(256, 384), torch.empty(256, 3), fp8(256, 384), torch.empty(2, 3), torch.bfloat16)
                else:
                    operands = fp8(256, 384), torch.empty(256, 3), fp8(4, 256, 384), torch.empty(4, 2, 3)
                    kernel.grouped_gemm(*operands, offsets, torch.float32)
        with tiles(0):
            kernel.gemm_sum([(fp8(256, 384), torch.empty(256, 3)) * 2] * 2, None, torch.bfloat16)
        for i in range(len(OUTER_TILES)) if arch == 90 else (0, len(OUTER_TILES) - 1):  # the others lie between
            with tiles(i):
                operands = fp8(256, 512), torch.empty(256, 4), fp8(384, 512), torch.empty(384, 4)
                kernel.grouped_outer(*operands, offsets, [torch.float32, torch.bfloat16][i % 2])
        with tiles(3):  # ragged, and of size 1
            kernel.gemm(fp8(1, 100), torch.empty(1, 1), fp8(200, 100), torch.empty(200, 1), torch.float16)
            if arch == 90:
                kernel.grouped_outer(fp8(1, 1), torch.empty(1, 1), fp8(1, 1), torch.empty(1, 1), offsets[:1], x.dtype)
        for rows in (256, 128) if arch == 90 else ():
            patch.setattr(kernel, "_hopper_rows", lambda *args, rows=rows: rows)
            a, a_s, per_row = fp8(256, 384), torch.empty(256, 3), torch.empty(3, 256).T
            kernel.gemm(a, a_s, a, torch.empty(2, 3), torch.bfloat16)
            kernel.gemm(a, per_row, a, per_row, torch.float32)
            kernel.gemm_sum([(a, a_s, fp8(4, 256, 384), torch.empty(4, 2, 3))] * 2, offsets, torch.bfloat16)
            kernel.gemm(fp8(1, 100), torch.empty(1, 1), fp8(200, 100), torch.empty(200, 1), torch.float64)
            kernel.grouped_gemm(a, a_s, fp8(4, 256, 384), torch.empty(4, 2, 3), offsets, torch.bfloat16)
            kernel.grouped_outer(a, per_row, a, per_row, offsets, torch.float32)
            kernel._launch_hopper(128, [(a, per_row, a, per_row.unsqueeze(0))], torch.empty(2, 256, 256), None, True)
        if arch == 90:
            compile_fused()
    return compiled


def casts_of_two_stores(ptx: str) -> list[str]:
    """The registers of pairs of e4m3 that are packed with a neighbour, as for a store, and used another time too."""
    pairs = re.findall(r"cvt\.\S*\.e4m3x2\.f32\s+(%\w+)", ptx)
    packed = set(re.findall(r"%\w+", " ".join(re.findall(r"mov\.b32\s+%\w+, \{([^}]*)\}", ptx))))
    unpacked = re.sub(r"mov\.b32\s+%\w+, \{[^}]*\}", "", ptx)
    counts = Counter(re.findall(r"%\w+", unpacked))
    return [pair for pair in pairs if pair in packed and counts[pair] > 1]


def compile_fused() -> None:
    """Calls all functions of `kernel_fused.py`, forward and backward, for activations of a small model in bfloat16."""
    x, wide = (torch.empty(4, 32, n, dtype=torch.bfloat16, requires_grad=True) for n in (256, 512))
    w, rows = torch.empty(256, requires_grad=True), x.flatten(0, 1)
    angles = torch.empty(32, 1, 16), torch.empty(32, 1, 16)
    heads, pe = x.unflatten(-1, (4, 64)), torch.empty(4, 32, 32, dtype=torch.bfloat16, requires_grad=True)
    choices, scores = torch.zeros(128, 2, dtype=torch.int64), torch.empty(128, 8)
    places, index, ends = kernel_fused.sort_by_expert(choices, 8)
    outputs = [
        *kernel_fused.add_rms_norm(x, x, w, 1e-6),
        *(kernel_fused.glu(wide, act) for act in model.ACTIVATIONS),
        kernel_fused.rope(heads, *angles),
        *kernel_fused.keys_and_values(heads, pe, *angles, 32),
        *kernel_fused.permute(rows, places),
        *kernel_fused.add_rms_norm_quant(x, x, w, 1e-6, None, True, True)[:2],
        *kernel_fused.permute_quant(rows, places, index, ends[-1:], None, True)[:2],
        kernel_fused.combine(wide.view(256, 256), places, scores[:, :2].clone().requires_grad_()),
    ]
    torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    matrices = [rows.detach()] * 3
    kernel_fused.add_rms_norm_quant(x, None, w, 1e-6, "ue8m0", False, False)
    kernel_fused.glu_quant(*matrices[:2], "gelu", ends, None, True)
    kernel_fused.glu_backward_quant(*matrices, "silu", ends, None)
    kernel_fused.route(scores, torch.empty(8), 4, 2, 2)
    kernel_fused.newton_schulz(x.detach(), (3.4, -4.8, 2.0), 2)  # 32 × 256: on the Gram matrix
    kernel_fused.newton_schulz(x.detach()[..., :32], (3.4, -4.8, 2.0), 1)
    grad, p, one = torch.empty(5000), torch.empty(5000), torch.ones(())
    kernel_fused.momentum_update(grad, p, torch.empty(5000, dtype=torch.bfloat16), 0.95)
    kernel_fused.apply_update(p, grad, one, 0.1, 2.0)


@pytest.fixture(scope="module")
def all_binaries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What another process, in which Triton compiles, made of every kernel for each compute capability."""
    return compiled_by(__file__, tmp_path_factory.mktemp("triton"))


@pytest.fixture(params=ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
def binaries(request: pytest.FixtureRequest, all_binaries: dict[str, list[dict]]) -> tuple[int, list[dict[str, Any]]]:
    """A compute capability, and what compiling for it gave."""
    return request.param, all_binaries[str(request.param)]


@pytest.mark.slow
@pytest.mark.timeout(900)  # of which the fixture may take some minutes on a busy machine
def test_compiles(binaries: tuple[int, list[dict[str, Any]]]) -> None:
    """All kernels become machine code of this compute capability, and their casts the hardware's own."""
    arch, compiled = binaries
    names, fused = (
        {name for name in vars(module) if re.fullmatch(r"_\w+_kernel", name)} for module in (kernel, kernel_fused)
    )
    assert {row["kernel"] for row in compiled} == (names | fused if arch == 90 else names - {"_hopper_kernel"})
    for row in compiled:
        assert row["cubin"] > 0
        assert [target.rstrip("a") for target in row["target"]] == [f"sm_{arch}"]
        if row["kernel"] in ("_act_quant_kernel", "_weight_quant_kernel"):
            if arch == 89 and TRITON_VERSION < (3, 9) and all("e4m3x2.f16x2" in cast for cast in row["casts"]):
                pytest.xfail("Triton 3.6 has sm_89 cast by way of float16, which rounds twice")
            assert row["casts"] and all(cast.startswith("cvt.rn.satfinite.e4m3x2.f32") for cast in row["casts"])


@pytest.mark.slow
def test_no_cast_is_stored_in_two_layouts(binaries: tuple[int, list[dict[str, Any]]]) -> None:
    """CUDA 12.8's ptxas, in Triton 3.6, then loses the numbers of one store: PTX is right, machine code is not."""
    for row in binaries[1]:
        assert not row["casts_of_two_stores"], row["kernel"]


@pytest.mark.slow
def test_multiplies_on_fp8_tensor_cores(binaries: tuple[int, list[dict[str, Any]]]) -> None:
    """With every candidate of 64 rows or more; for fewer, Hopper and Blackwell have FP8 in no tensor core."""
    arch, compiled = binaries
    products = [row for row in compiled if row["kernel"] in ("_gemm_kernel", "_grouped_outer_kernel", "_hopper_kernel")]
    assert len(products) >= len(GEMM_TILES) + 3
    for row in products:
        assert row["multiplies"]
        if arch == 89 or row["block_m"] >= 64:
            assert all(re.match(TENSOR_CORES[arch], name) for name in row["multiplies"]), row


@pytest.mark.slow
def test_shared_memory_suffices(binaries: tuple[int, list[dict[str, Any]]]) -> None:
    """For every kernel, and of a product's candidates for at least two on compute capability 8.9, for all on others."""
    arch, compiled = binaries
    for name in {row["kernel"] for row in compiled}:
        fit = [row["shared"] <= SHARED_MEMORY[arch] for row in compiled if row["kernel"] == name]
        assert sum(fit) >= 2 if arch == 89 and name in ("_gemm_kernel", "_grouped_outer_kernel") else all(fit)


# --- Triton's interpreter -----------------------------------------------------------------------------------------


@in_interpreter
def test_interpreter_casts_wrongly_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """It loses a carry on the way to e4m3, and truncates to bfloat16. When it no longer does, this file is simpler."""
    x = torch.tensor([[448.0, 127.4]])  # the scale is 1
    q, s = torch.ones(1, 1).to(E4M3), torch.tensor([[1 + 2.0**-8 + 2.0**-10]])
    e4m3, bf16 = 128.0, 1 + 2.0**-7
    assert run(kernel.act_quant, x, None)[0][0, 1].float() == e4m3
    assert run(kernel.weight_dequant, q, s, torch.bfloat16) == bf16
    monkeypatch.setattr(interpreter, "_convert_float", faulty_casts)
    mended = (
        run(kernel.act_quant, x, None)[0][0, 1].float() == e4m3,
        run(kernel.weight_dequant, q, s, torch.bfloat16).item() == bf16,
    )
    if all(mended):
        pytest.skip("this Triton's interpreter casts as GPUs do: exact_casts can go once all supported ones do")


# --- What only a GPU shows ----------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 64, 100, 129, 1000, 4096, 5000])
def test_autotuned_product(m: int) -> None:
    """From decoding to training: each number of rows finds its tiles, and all give the product.

    The dtype of the product has a part in which tiles win, so two dtypes may have summed in different orders.
    """
    k = 1000 if m % 2 else 1024
    check_gemm(m, 384, k, False, "contiguous", torch.float32, m)
    (a, a_s), (b, b_s) = activations(m, k, m), weights(384, k, seed=m + 1)
    got = run(kernel.gemm, a, a_s, b, b_s, torch.bfloat16)
    want = dequantised(a, a_s) @ dequantised(b, b_s).T
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).norm() <= 2.0**-7 * want.norm()
    x = numbers((m, 1000), "normal", torch.bfloat16, m)
    for got, want in zip(run(kernel.act_quant_both, x, None), fp8_ops.act_quant_both(x), strict=True):
        assert_same(got, want)


@on_gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs Hopper's kernel")
@pytest.mark.parametrize(("k", "parts"), [(5000, 3), (1024, 8), (640, 7)])
def test_sum_in_parts(k: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal numbers of steps, the last with fewer or none."""
    monkeypatch.setattr(kernel, "_hopper_parts", lambda *args: parts)
    check_gemm(300, 260, k, True, "contiguous", torch.bfloat16, k)


@on_gpu
def test_many_experts() -> None:
    """64 experts, a few of them with most of the rows and some with none, autotuned."""
    torch.manual_seed(0)
    rows = torch.multinomial(torch.rand(64).pow(6), 4096, replacement=True)
    counts = torch.bincount(rows, minlength=64).tolist()
    assert 0 in counts
    check_grouped(counts, 256, 512, "contiguous", torch.bfloat16, 1)
    check_outer(counts, 256, 384, "contiguous", torch.bfloat16, 2)


@on_gpu
@pytest.mark.parametrize("counts", [None, [0, 70, 1, 57]])
def test_compiled_linear_layer(counts: list[int] | None) -> None:
    """Under torch.compile, as one graph, nothing changes."""
    offsets = None if counts is None else ends(counts).to(DEVICE)
    stack = () if counts is None else (len(counts),)
    x = numbers((128, 256), "normal", torch.bfloat16, 1).to(DEVICE)
    ws = [numbers((*stack, n, 256), "normal", torch.float32, n).to(DEVICE) for n in (384, 128)]
    with tiles(2):
        eager = grads_of(x, ws, offsets, None)
        compiled = grads_of(x, ws, offsets, None, torch.compile(fp8_ops.fp8_linear, fullgraph=True))
    for got, want in zip(compiled, eager, strict=True):
        assert torch.equal(got, want)


@on_gpu
def test_more_than_two_billion_numbers() -> None:
    """Offsets in memory do not fit 32 bits."""
    m, k = 2**16 + 3, 2**15 + 128
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of the GPU's memory")
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    tail = slice(m // 128 * 128 - 128, None)  # of whole tiles, and beyond 2^31
    q, s, q_t, s_t = kernel.act_quant_both(x, None)
    want = fp8_ops.act_quant_both(x[tail].cpu())
    for got, tensor in zip((q[tail], s[tail], q_t[:, tail].contiguous(), s_t[:, -2:].contiguous()), want, strict=True):
        assert_same(got.cpu(), tensor)
    b, b_s = (t.to(DEVICE) for t in weights(64, k, seed=1))
    for which in {2, CANDIDATES - 1}:
        with tiles(which):
            c = kernel.gemm(q, s, b, b_s, torch.float32)[tail]
        assert_product(c.cpu(), dequantised(want[0], want[1]), dequantised(b.cpu(), b_s.cpu()))
    del q_t, s_t, c
    q, s = kernel.weight_quant(x, None)
    want = fp8_ops.weight_quant(x[tail].cpu())
    for got, tensor in zip((q[tail], s[-2:]), want, strict=True):
        assert_same(got.cpu(), tensor)
    del x
    w = kernel.weight_dequant(q, s, torch.bfloat16)[tail]
    assert_same(w.cpu(), fp8_ops.weight_dequant(*want))


if __name__ == "__main__":
    json.dump({arch: compile_all(arch) for arch in ARCHITECTURES}, sys.stdout)
