"""graphs.py against the modules: what is recorded, on any device, and recording itself on a GPU."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import generate
import graphs
import model as model_module
from model import ModelArgs, Transformer

SHAPE = {"max_batch_size": 4, "max_seq_len": 200, "original_seq_len": 200, "dim": 64, "inter_dim": 96}
SHAPE |= {"moe_inter_dim": 32, "n_layers": 3, "n_heads": 4, "n_routed_experts": 6, "n_shared_experts": 1}
SHAPE |= {"n_activated_experts": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
SHAPE |= {"v_head_dim": 16, "n_mtp_layers": 2, "score_func": "sigmoid"}
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
)


@pytest.fixture(autouse=True)
def attn_impl() -> Iterator[None]:
    """Afterwards, attention is what it was."""
    before = model_module.attn_impl
    yield
    model_module.attn_impl = before


def make(device: str = "cpu", dtype: torch.dtype = torch.float32, **changes: Any) -> Transformer:
    """A model with random weights everywhere."""
    model = Transformer(ModelArgs.from_dict(SHAPE | changes), dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (1.0 if p.ndim == 1 else 1.5 * p.shape[-1] ** -0.5))
        model.head.weight[0] = 0  # else it ends too soon
    return model.eval().requires_grad_(False).to(device, dtype)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 150), min_size=1, max_size=4), st.integers(1, 5), st.sampled_from(["naive", "absorb"]))
def test_what_is_recorded_is_what_the_modules_do(lengths: list[int], width: int, impl: str) -> None:
    model_module.attn_impl = impl
    model = make()
    tokens = torch.randint(1, 256, (2, len(lengths), width), generator=torch.Generator().manual_seed(2))
    results = []
    for decoder in (None, graphs.Recorder(model)):
        model.decoder = decoder
        cache = model.new_cache(len(lengths), 190)
        for i, layer in enumerate(cache.layers):
            for tensor in layer:
                tensor.normal_(generator=torch.Generator().manual_seed(i))
        cache.lengths = list(lengths)
        with torch.inference_mode():
            outputs = [*model.forward_with_hidden(tokens[0], cache)]
            for depth in range(2):
                outputs += model.mtp_forward(depth, outputs[2 * depth], tokens[1], cache)
        results.append(outputs + [tensor for layer in cache.layers for tensor in layer])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_nothing_is_recorded_off_a_gpu() -> None:
    assert not graphs.suits(make())


@needs_gpu
@pytest.mark.parametrize("impl", ["naive", "absorb"])
@pytest.mark.parametrize("speculate", [0, 1, 3])
def test_recording_changes_no_byte(impl: str, speculate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model_module.attn_impl = impl
    model = make("cuda", torch.bfloat16)
    assert graphs.suits(model)
    prompts = [b"ab", b"", b"abcdefgh" * 5]
    for temperature in (0.0, 0.8):
        sampling = replace(generate.Sampling(), temperature=temperature, max_new_tokens=150, speculate=speculate)
        texts = []
        for repeats in (10**9, 2):
            monkeypatch.setattr(graphs, "REPEATS", repeats)
            model.decoder = graphs.Recorder(model)
            texts.append([generate.complete(model, prompt, sampling) for prompt in prompts])
            together = [b""] * 3
            for row, piece in generate.generate(model, prompts, sampling):
                together[row] += piece
            texts[-1] += together
            assert bool(model.decoder.graphs) == (repeats == 2)
        assert texts[0] == texts[1] and min(map(len, texts[0])) > 20
