"""The kernels of decoding compute what the modules of model.py do, and decode.py's blocks of steps give the same texts.

Without a GPU, the kernels run in Triton's interpreter, which takes seconds for a step, so models are tiny. What
schedules steps on the device is tested with the modules in the kernels' place. Compiling needs another process, without
the interpreter: this file, run as a script.
"""

import contextlib
import gc
import itertools
import json
import re
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

from conftest import randomise, tiny  # noqa: E402
from test_kernel import compiled_by, compiling, specialisations  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

import decode  # noqa: E402
import fp8_ops  # noqa: E402
import generate  # noqa: E402
import kernel_decode  # noqa: E402
import kernel_products  # noqa: E402
import model as model_module  # noqa: E402
from generate import Sampling  # noqa: E402
from kernel_decode import Step  # noqa: E402
from model import KVCache, Transformer  # noqa: E402

INTERPRETED = isinstance(kernel_decode._norm_kernel, interpreter.InterpretedFunction)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
runs = pytest.mark.skipif(not (DEVICE.type == "cuda" or INTERPRETED), reason="no GPU, and no interpreter")
on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
)
phases = [phase for phase in Phase if phase not in (Phase.explain, Phase.shrink)]  # minutes in the interpreter
draws = settings(deadline=None, derandomize=True, database=None, phases=phases)


@pytest.fixture(autouse=True)
def absorbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by latents; and few programs, each of which takes the interpreter a millisecond."""
    model_module.attn_impl = "absorb"
    if INTERPRETED:
        monkeypatch.setattr(kernel_decode, "PROGRAMS", 1)


def random_model(**changes: Any) -> Transformer:
    """A tiny model with random weights."""
    model = tiny(**changes).requires_grad_(False)
    randomise(model)
    return model.to(DEVICE)


def filled(model: Transformer, lengths: list[int]) -> KVCache:
    """A cache full of random numbers."""
    cache = model.new_cache(len(lengths), model.args.max_seq_len)
    for layer in cache.layers:
        layer[0].normal_()
    cache.lengths = list(lengths)
    return cache


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def outputs(target: Any, model: Transformer, cache: KVCache, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What the main model and its MTP modules give, and then the cache."""
    results = [*target.forward_with_hidden(tokens, cache)]
    for depth in range(len(model.mtp)):
        results += target.mtp_forward(depth, results[0], (tokens * 7 + depth) % 64, cache)
    return results + [layer[0] for layer in cache.layers]


def check(model: Transformer, lengths: list[int], width: int, tolerance: float = 2e-6) -> None:
    """Compares a decoder's calls with the modules'."""
    torch.manual_seed(0)
    cache = filled(model, lengths)
    other = filled(model, lengths)
    for layer, source in zip(other.layers, cache.layers, strict=True):
        layer[0].copy_(source[0])
    tokens = torch.randint(64, (len(lengths), width), device=DEVICE)
    with torch.inference_mode():
        expected = outputs(model, model, cache, tokens)
        results = outputs(decode.KernelDecoder(model), model, other, tokens)
    for result, wanted in zip(results, expected, strict=True):
        assert distance(result, wanted) < tolerance


@runs
@pytest.mark.parametrize(
    ("changes", "lengths", "width"),
    [
        ({"q_lora_rank": 12, "n_expert_groups": 2}, [5], 1),
        ({"score_func": "softmax", "n_shared_experts": 0, "hidden_act": "gelu", "n_mtp_layers": 0}, [0], 1),
        ({"q_lora_rank": 12, "hidden_act": "relu2", "n_mtp_layers": 0}, [5, 9, 0], 1),
        ({"n_expert_groups": 2, "score_func": "softmax", "qk_rope_head_dim": 2, "n_mtp_layers": 0}, [2, 11], 3),
    ],
)
def test_a_step_is_that_of_the_modules(changes: dict[str, Any], lengths: list[int], width: int) -> None:
    check(random_model(n_layers=2, vocab_size=64, **changes), lengths, width)


@runs
@settings(draws, max_examples=3)
@given(
    st.sampled_from([8, 24, 40]), st.integers(1, 20), st.integers(1, 5), st.sampled_from([1, 4, 6, 18]),
    st.integers(1, 17), st.booleans(),
)  # fmt: skip
def test_odd_sizes(dim: int, inter_dim: int, n_heads: int, rank: int, v_head_dim: int, is_single: bool) -> None:
    sizes = {"dim": dim, "inter_dim": inter_dim, "n_heads": n_heads, "kv_lora_rank": rank, "v_head_dim": v_head_dim}
    model = random_model(**sizes, n_layers=2, n_mtp_layers=0, moe_inter_dim=inter_dim)
    check(model, [3] if is_single else [3, 6], 1, 5e-6)


@runs
@pytest.mark.parametrize("lengths", [[6], [6, 3], [6, 3, 1, 2, 5]])
def test_fp8_weights_are_read_as_they_are(lengths: list[int]) -> None:
    changes = {"dim": 144, "inter_dim": 130, "moe_inter_dim": 140, "q_lora_rank": 136, "kv_lora_rank": 136}
    model = random_model(**changes, n_layers=2, n_mtp_layers=0, v_head_dim=66, vocab_size=64)
    for layer in model.fp8_layers():
        layer.weight.data, layer.scale = fp8_ops.weight_quant(layer.weight)
    check(model, lengths, 1, 5e-6)


@runs
def test_large_matrices_are_read_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_decode, "PROGRAMS", 1)
    monkeypatch.setattr(kernel_decode, "TILE", 16)  # instead of more numbers
    model = random_model(dim=272, inter_dim=300, moe_inter_dim=150, n_layers=2, n_mtp_layers=0, vocab_size=64)
    for layer in model.fp8_layers():
        layer.weight.data, layer.scale = fp8_ops.weight_quant(layer.weight)
    check(model, [6], 1, 5e-6)


@runs
@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("groups", [1, 4])
def test_experts_are_those_of_the_router(score_func: str, groups: int) -> None:
    shape = {"n_routed_experts": 12, "n_expert_groups": groups, "n_limited_groups": min(groups, 2)}
    model = random_model(**shape, n_activated_experts=3, n_layers=2, score_func=score_func, route_scale=1.5)
    step, moe = Step(model, 64), model.layers[1].ffn
    step.normed.copy_(torch.randn(64, model.args.dim))
    step.rows[:60] = 0
    constants, bias = step._router(moe)
    buffers = step.normed, moe.gate.weight, bias, step.rows, step.shares
    step._launch(kernel_products.route_kernel, (64,), *buffers, **constants, K=model.args.dim, BK=16)
    weights, indices, _ = moe.gate(step.normed)
    expected = torch.zeros(64, 12, device=DEVICE).scatter_(1, indices, weights)
    expected[60:] = 0  # no row's
    assert torch.allclose(step.shares.flatten()[: 64 * 12].view(64, 12), expected, atol=1e-6)


@runs
def test_long_contexts_are_divided() -> None:
    model = random_model(max_seq_len=200, n_layers=1, n_mtp_layers=0)
    check(model, [150], 1)
    check(model, [190, 33], 1)
    check(model, [190, 33, 0, 64, 95], 1)


def probabilities(logits: torch.Tensor, sampling: Sampling, numbers: torch.Tensor) -> list[int]:
    """The bytes that generate.py draws with these uniform numbers."""
    probs = generate.distribution(logits, sampling)
    if sampling.temperature == 0:
        return generate.draw(probs, [None] * len(probs))
    cumulative = probs.cumsum(axis=-1)
    return (cumulative <= numbers[:, None].numpy() * cumulative[:, -1:]).sum(axis=-1).tolist()


def choose(step: Step, sampling: Sampling, logits: torch.Tensor, numbers: torch.Tensor) -> list[int]:
    """The bytes that the kernel chooses."""
    step.logits[: len(logits)] = logits.to(DEVICE)
    step.counts.zero_()
    step.sampling.copy_(torch.tensor([sampling.temperature, sampling.top_k, sampling.top_p]))
    step.uniforms[0] = numbers.to(DEVICE)
    step.choose()
    return step.chosen[0].tolist()


@runs
@settings(draws, max_examples=8)
@given(
    st.sampled_from([0.0, 1e-3, 0.8, 3.0]), st.sampled_from([0, 1, 5, 255, 300]),
    st.sampled_from([1e-9, 0.3, 0.95, 1.0]), st.sampled_from([0.0, 0.5, 4.0]), st.integers(0, 99),
)  # fmt: skip
def test_bytes_are_chosen_as_on_a_cpu(temperature: float, top_k: int, top_p: float, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(4, 256, generator=generator) * spread).bfloat16().float()  # of which some are equal
    numbers = torch.rand(4, generator=generator, dtype=torch.float64)
    sampling = Sampling(temperature, top_k, top_p)
    step = Step(random_model(n_layers=1, n_mtp_layers=0), 4)
    assert choose(step, sampling, logits, numbers) == probabilities(logits, sampling, numbers)
    assert step.tokens.tolist() == step.chosen[0].tolist() and step.positions.tolist() == [1] * 4


@runs
def test_what_is_not_a_number_is_seen() -> None:
    logits = torch.zeros(4, 256)
    logits[0, 3], logits[1], logits[2, 7] = float("nan"), float("-inf"), float("inf")
    step = Step(random_model(n_layers=1, n_mtp_layers=0), 4)
    for temperature in (0.0, 1.0):
        assert choose(step, Sampling(temperature), logits, torch.full((4,), 0.5).double())[:3] == [-1, -1, -1]


# --- Blocks of steps -------------------------------------------------------------------------------------------------


class ByModules(Step):
    """A step by the modules and generate.py's sampler, in the kernels' place."""

    def place(self, cache: KVCache, rows: list[int], positions: list[int]) -> None:
        super().place(cache, rows, positions)
        self.cache = cache

    def run(self) -> None:
        before, n = self.cache.lengths, int((self.rows >= 0).sum())
        # a text that has ended may outgrow the cache; what comes of that is discarded
        self.cache.lengths = self.positions[:n].clamp(max=self.cache.capacity - 1).tolist()
        _, logits = by_modules(self.model, self.tokens[:n, None], self.cache)
        self.cache.lengths, self.logits[:n] = before, logits[:, 0]
        temperature, top_k, top_p = self.sampling.tolist()
        at = int(self.counts[0])
        ids = probabilities(logits[:, 0], Sampling(temperature, int(top_k), top_p), self.uniforms[at, :n])
        self.chosen[at, :n] = self.tokens[:n] = torch.tensor(ids)
        self.counts += 1
        self.positions += 1


def by_modules(model: Transformer, tokens: torch.Tensor, cache: KVCache) -> decode.Outputs:
    """What the modules give, without the model's decoder."""
    decoder, model.decoder = model.decoder, None
    try:
        return model.forward_with_hidden(tokens, cache)
    finally:
        model.decoder = decoder


class Decoder(decode.KernelDecoder):
    """Other calls, such as that of a prompt, write to the same buffers."""

    def forward_with_hidden(self, tokens: torch.Tensor, cache: KVCache) -> decode.Outputs:
        step, _ = self.recorded(tokens.numel())
        self.user = None
        step.place(cache, [0] * tokens.numel(), [0] * tokens.numel())
        step.tokens.fill_(7)
        return by_modules(self.model, tokens, cache)


def by_blocks(model: Transformer, n_steps: int) -> Transformer:
    """Has a model decode by blocks of so many steps."""
    model.decoder = Decoder(model)
    shape = {"POSITIONS": (1, 4, 16, 64), "MAX_STEPS": n_steps, "MAX_VOCAB": 256}
    model.decoder.kernels = SimpleNamespace(Step=ByModules, **shape)
    return model


def texts(model: Transformer, prompts: list[bytes], sampling: Sampling, num_samples: int = 1) -> list[bytes]:
    """What `generate` writes after each prompt; each text ends once."""
    results, ended = [b""] * len(prompts) * num_samples, []
    for number, piece in generate.generate(model, prompts, sampling, None, "absorb", num_samples):
        assert number not in ended
        results[number] += piece
        ended += [number] if not piece else []
    assert sorted(ended) == list(range(len(results)))
    return results


@settings(draws, max_examples=10)
@given(
    st.lists(st.binary(max_size=24), min_size=1, max_size=9), st.integers(1, 5), st.sampled_from([0.0, 1.0]),
    st.integers(1, 40), st.sampled_from([b"", b"a", b"\xff\x01"]), st.integers(1, 7), st.integers(1, 2),
)  # fmt: skip
def test_blocks_give_the_texts_of_steps(
    prompts: list[bytes], max_batch_size: int, temperature: float, n: int, stop: bytes, n_steps: int, samples: int
) -> None:
    """Whatever the batch, with prompts beyond the context of 16, and texts that outgrow it."""
    model_module.attn_impl = "absorb"
    model = random_model(max_batch_size=max_batch_size, n_mtp_layers=0).cpu()
    model.head.weight[[0, 97, 255]] += 0.5  # likely to end a text
    sampling = Sampling(temperature, max_new_tokens=n, stop=stop, seed=3)
    expected = texts(model, prompts, sampling, samples)
    assert texts(by_blocks(model, n_steps), prompts, sampling, samples) == expected


def test_two_texts_take_turns() -> None:
    """Of one model, in two calls that are read by turns, and beside a call of the model itself."""
    model = by_blocks(random_model(n_mtp_layers=0).cpu(), 3)
    sampling = Sampling(1.0, max_new_tokens=30)
    alone = [b"".join(piece for _, piece in generate.generate(model, [text], sampling)) for text in (b"one", b"other")]
    both, results = [generate.generate(model, [text], sampling) for text in (b"one", b"other")], [b"", b""]
    for pieces in zip(*both, strict=False):
        results = [text + piece for text, (_, piece) in zip(results, pieces, strict=True)]
        with torch.inference_mode():
            model(b"beside", model.new_cache(1, 16))
    assert all(text.startswith(result) and result for text, result in zip(alone, results, strict=True))


def test_preparing_decodes_a_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = by_blocks(random_model(n_mtp_layers=0).cpu(), 4)
    model.decoder.prepare()
    assert sorted(model.decoder.steps) == [1, 4, 16, 64] and model.decoder.steps[1].chosen[1, 0] > 0
    assert len(texts(model, [b"a"], Sampling(1.0, max_new_tokens=9))[0]) == 9
    monkeypatch.setattr(ByModules, "run", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        by_blocks(model, 4).decoder.prepare()


@torch.no_grad()
def test_all_steps_are_compiled_ahead() -> None:
    model = random_model().cpu()
    with specialisations() as ahead:
        kernel_decode.compile_ahead(model)
    with specialisations() as met:
        decoder = decode.KernelDecoder(model)
        for n, depth in itertools.product(kernel_decode.POSITIONS, (-1, 0)):
            decoder.recorded(n, depth)[1]()
    assert ahead == met and len({name for name, *_ in met}) > 10


def test_preparing_notices_a_wrong_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "probabilities", lambda logits, *_: logits.argmin(-1).tolist())
    with pytest.raises(ValueError, match="not the likeliest"):
        by_blocks(random_model(n_mtp_layers=0).cpu(), 4).decoder.prepare()


def test_preparing_writes_to_a_cache_of_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever attention is set: kernels know no other cache, and would write past the end of one."""
    model, widths, place = by_blocks(random_model(n_mtp_layers=0).cpu(), 4), [], ByModules.place

    def record(self: Step, cache: KVCache, *where: Any) -> None:
        widths.append(cache.layers[0][0].shape[2:])
        place(self, cache, *where)

    monkeypatch.setattr(ByModules, "place", record)
    model_module.attn_impl = "naive"
    try:
        monkeypatch.setattr(ByModules, "run", lambda self: None)
        model.decoder.prepare()
    finally:
        model_module.attn_impl = "absorb"
    assert widths == [(model.args.kv_lora_rank + model.args.qk_rope_head_dim,)]


def test_recording_writes_to_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of earlier calls may be gone."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    step, seen = ByModules(random_model(n_layers=1, n_mtp_layers=0).cpu(), 4), []
    step.rows.fill_(0)
    decode._recorded(lambda: seen.append(step.rows.tolist()), step)
    assert seen == [[-1] * 4] * 2


def test_top_k_of_any_size() -> None:
    model = by_blocks(random_model(n_mtp_layers=0).cpu(), 4)
    wide, none = (Sampling(1.0, top_k=k, top_p=0.5, max_new_tokens=9) for k in (10**400, 0))
    assert texts(model, [b"a"], wide) == texts(model, [b"a"], none)


def test_what_is_done_is_not_kept() -> None:
    """A decoder holds no text's cache after its end."""
    model = by_blocks(random_model(n_mtp_layers=0).cpu(), 4)
    batch = generate.Batch(model, [b"a"], Sampling(0))
    blocks = decode.Blocks(model.decoder, batch, Sampling(0))
    row = generate.Row(0, Sampling(0))
    blocks.advance([row], lambda: generate.fill_stale(batch, generate.Drafter(batch)), None)
    held = weakref.ref(blocks)
    assert model.decoder.user is blocks.key
    del blocks
    gc.collect()
    assert held() is None


@pytest.mark.parametrize(
    ("found", "has_triton", "is_fp8", "reason"),
    [
        ((7, 5), True, False, "compute capability 7.5, and kernel_decode.py needs 8.0"),
        ((8, 6), True, True, "compute capability 8.6, and kernel_decode.py needs 8.9"),
        ((9, 0), False, True, "needs Triton"),
        ((8, 0), True, False, None),
    ],
)
def test_a_gpu_without_the_kernels(
    found: tuple[int, int], has_triton: bool, is_fp8: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(n_layers=1, n_mtp_layers=0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    monkeypatch.setattr(decode, "find_spec", lambda name: has_triton)
    monkeypatch.setattr(decode.KernelDecoder, "has_all", lambda model: True)
    monkeypatch.setattr(decode.CDecoder, "suits", lambda model: False)
    monkeypatch.setattr(decode.KernelDecoder, "__init__", lambda self, model: 1 / 0)  # is not reached
    for layer in model.fp8_layers() if is_fp8 else []:
        layer.store_fp8()
    warning = decode.attach(model)
    # on a GPU, the modules' kernels are recorded instead
    assert not isinstance(model.decoder, decode.KernelDecoder) and (reason or "division by zero") in str(warning)


def test_a_model_whose_output_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model = by_blocks(random_model(n_mtp_layers=0).cpu(), 3)
    monkeypatch.setattr(ByModules, "run", lambda self: self.chosen.fill_(-1))
    with pytest.raises(generate.GenerationError, match="not a number"):
        texts(model, [b"a"], Sampling(0))


def test_what_follows_a_text_does_not_matter() -> None:
    """A block goes on after the end, where the model's output may be no number."""
    row = generate.Row(0, Sampling())
    assert row.take([65, 0, -1]) == b"A" and row.ended
    with pytest.raises(generate.GenerationError, match="not a number"):
        generate.Row(0, Sampling()).take([65, -1])


def test_uniform_numbers_of_a_block_are_those_of_steps() -> None:
    one, other = (generate.row_generator(7, 3) for _ in range(2))
    expected = [generate.uniform(one) for _ in range(50)]
    assert np.array_equal(torch.rand(50, generator=other, dtype=torch.float64).numpy(), expected)


@runs
@pytest.mark.slow
def test_a_changed_model_is_not_decoded_by_unchanged_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode.KernelDecoder, "suits", lambda model: True)
    model = random_model(n_layers=2, n_mtp_layers=0)
    assert decode.attach(model) is None and isinstance(model.decoder, decode.KernelDecoder)
    expected = texts(model, [b"a"], Sampling(1.0, max_new_tokens=3))
    model.decoder = None
    assert texts(model, [b"a"], Sampling(1.0, max_new_tokens=3)) == expected
    forward = model_module.MLP.forward
    monkeypatch.setattr(model_module.MLP, "forward", lambda self, *given: 1.01 * forward(self, *given))
    assert "kernel_decode.py does not fit this model.py" in str(decode.attach(model))
    assert not isinstance(model.decoder, decode.KernelDecoder)


@on_gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_batch_size", [1, 3, 20])
def test_texts_are_those_of_the_modules(temperature: float, max_batch_size: int) -> None:
    """In float32, where few bytes are near ties."""
    model = random_model(max_batch_size=max_batch_size, n_mtp_layers=0, q_lora_rank=12, max_seq_len=64)
    model.head.weight[[0, 97, 255]] += 0.5
    prompts = [bytes(range(65, 65 + n)) for n in range(0, 75, 3)]
    sampling = Sampling(temperature, top_k=200, top_p=0.99, max_new_tokens=50, seed=3)
    expected = texts(model, prompts, sampling)
    assert decode.attach(model) is None and isinstance(model.decoder, decode.KernelDecoder)
    results = texts(model, prompts, sampling)
    assert sum(a == b for a, b in zip(results, expected, strict=True)) >= len(prompts) - 1


@on_gpu
@pytest.mark.parametrize("is_fp8", [False, True])
def test_a_model_in_bfloat16_is_attached(is_fp8: bool) -> None:
    model = random_model(dim=256, n_layers=4, inter_dim=256, moe_inter_dim=128, max_seq_len=64).bfloat16()
    model.compute_dtype = torch.bfloat16
    for layer in model.fp8_layers() if is_fp8 else []:
        layer.weight.data, layer.scale = fp8_ops.weight_quant(layer.weight)
    assert decode.attach(model) is None and isinstance(model.decoder, decode.KernelDecoder)
    assert len(texts(model, [b"a"] * 70, Sampling(1.0, max_new_tokens=20))) == 70


# --- Compilation, without a GPU ---------------------------------------------------------------------------------------

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program may have
COMPILED = {80: (16,), 90: (1, 64), 100: (64,)}  # numbers of positions
SHAPE = {"dim": 256, "inter_dim": 256, "moe_inter_dim": 128, "n_layers": 2, "n_mtp_layers": 0, "q_lora_rank": 128}
SHAPE |= {"kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "n_heads": 16}


def compile_steps(arch: int) -> list[dict[str, Any]]:
    """Compiles the kernels of steps of one position and of many, with FP8 weights where there is such a type."""

    def describe(ptx: str, options: dict[str, Any]) -> dict[str, Any]:
        first = re.search(r"griddepcontrol\.wait|\b(?:st|red|atom)\.global", ptx)
        row = {"starts_early": options.get("launch_pdl", False), "first": first and first[0]}
        return row | {"multiplies": bool(re.search(r"wgmma|mma\.sync|tcgen05\.mma", ptx))}

    with compiling(arch, describe) as compiled:
        model = tiny(**SHAPE).bfloat16().requires_grad_(False)
        model.compute_dtype = torch.bfloat16
        for n in COMPILED[arch]:
            if n == 64:
                for layer in model.fp8_layers():
                    layer.store_fp8()
            step = Step(model, n)
            step.is_hopper = arch >= 90
            step.run()
    return compiled


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiles(tmp_path: Path) -> None:
    """All kernels become machine code, with room for what they share; products of many positions by tensor cores."""
    names = {name for name in vars(kernel_decode) if name.endswith("_kernel")}
    for arch, compiled in compiled_by(__file__, tmp_path).items():
        assert arch != "90" or {row["kernel"] for row in compiled} == names
        for row in compiled:
            assert row["cubin"] > 0 and row["shared"] <= SHARED_MEMORY[int(arch)], row
            # a kernel that starts while others run writes nothing before it has waited
            assert (row["first"] == "griddepcontrol.wait") == row["starts_early"], row
            if row["kernel"] in ("_attend_kernel", "_values_kernel", "matmul_kernel", "gate_up_kernel", "down_kernel"):
                assert row["multiplies"]


if __name__ == "__main__":
    json.dump({arch: compile_steps(arch) for arch in SHARED_MEMORY}, sys.stdout)
