"""Decoders against the modules of model.py, in C and by CUDA graphs; how they are compared, and how C is compiled."""

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

import command
import convert
import decode
import fp8_ops
import generate
import model as model_module
import parallel
from checkpoint import save_model
from model import MLA, MLP, Block, Gate, KVCache, Linear, ModelArgs, MoE, MTPModule, Positions, RMSNorm, Transformer

SHAPE = {"max_batch_size": 4, "max_seq_len": 700, "original_seq_len": 700, "dim": 40, "inter_dim": 70}
SHAPE |= {"moe_inter_dim": 26, "n_layers": 3, "n_heads": 3, "n_routed_experts": 6, "n_shared_experts": 1}
SHAPE |= {"n_activated_experts": 2, "kv_lora_rank": 44, "qk_nope_head_dim": 9, "qk_rope_head_dim": 6, "v_head_dim": 11}
SHAPE |= {"n_mtp_layers": 2, "score_func": "sigmoid", "route_scale": 1.5}


@pytest.fixture(autouse=True)
def absorbed() -> Iterator[None]:
    """Attention by latents, and afterwards what there was before; threads likewise."""
    before, threads = model_module.attn_impl, torch.get_num_threads()
    model_module.attn_impl = "absorb"
    yield
    model_module.attn_impl = before
    torch.set_num_threads(threads)


def make(stored: torch.dtype = torch.float32, **changes: Any) -> Transformer:
    """A model with random weights everywhere, each a number of dtype `stored`."""
    model = Transformer(ModelArgs.from_dict(SHAPE | changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            scale = 1.0 if p.ndim == 1 else 1.5 * p.shape[-1] ** -0.5
            p.copy_((torch.randn(p.shape, generator=generator) * scale).to(stored))
    for gate in model.gates():
        if gate.bias is not None:
            gate.bias.normal_(generator=generator)
    return model.eval().requires_grad_(False)


def in_fp8(model: Transformer) -> Transformer:
    """The same model with its linear layers stored in FP8, and what is beside them in bfloat16."""
    for layer in model.fp8_layers():
        layer.weight.data, layer.scale = fp8_ops.weight_quant(layer.weight)
    for name, p in model.named_parameters():
        if parallel.is_matrix(name, p.shape) and p.dtype != fp8_ops.E4M3:
            p.data = p.data.bfloat16()
    return model


def attached(model: Transformer) -> Transformer:
    """The same model with a decoder."""
    assert decode.attach(model) is None and model.decoder is not None
    return model


def remembering(model: Transformer, lengths: list[int], size: float = 1.0) -> KVCache:
    """A cache full of chance, so many positions of each row filled."""
    cache = model.new_cache(len(lengths), model.args.max_seq_len - 1)
    for i, layer in enumerate(cache.layers):
        noise = torch.randn(layer[0].shape, generator=torch.Generator().manual_seed(i)) * size
        layer[0].copy_(noise.bfloat16())  # numbers that each dtype of a cache has
    cache.lengths = list(lengths)
    return cache


def outputs(
    model: Transformer, lengths: list[int], width: int, size: float = 1.0, before: list[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """The states and logits of the main model and of each MTP module, and the new entries of each layer's memory.

    A module makes them of the states before it: the model's own, or those of other outputs, `before`.
    """
    tokens = torch.randint(1, 256, (2, len(lengths), width), generator=torch.Generator().manual_seed(2))
    cache = remembering(model, lengths, size)
    for layer in cache.layers:
        layer[0][:, max(lengths) + width :] = float("nan")  # what is not there yet
    with torch.inference_mode():
        results = [*model.forward_with_hidden(tokens[0], cache)]
        for depth in range(len(model.mtp)):
            states = (before or results)[2 * depth].bfloat16().to(model.compute_dtype)  # as each dtype has them
            results += model.mtp_forward(depth, states, tokens[1], cache)
    return results + [torch.cat([layer[0][i, n : n + width] for i, n in enumerate(lengths)]) for layer in cache.layers]


def distances(results: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """How far results are from others, relative to these."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, expected, strict=True)]


def error(model: Transformer, lengths: list[int], width: int, threads: int, size: float = 1.0) -> float:
    """How far decode.c is from the modules, at most."""
    torch.set_num_threads(threads)
    expected = outputs(model, lengths, width, size)
    model.decoder = decode.CDecoder(model)
    return torch.tensor(distances(outputs(model, lengths, width, size, expected), expected)).max().item()  # or NaN


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.one_of(st.integers(0, 9), st.integers(0, 600)), min_size=1, max_size=4),
    st.integers(1, 16),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0.1, 1.0, 10.0]),
)
@example([250], 16, 1, torch.float32, 1.0)  # some look at 256 positions, others at more
def test_memories_rows_and_threads(
    lengths: list[int], width: int, threads: int, stored: torch.dtype, size: float
) -> None:
    """Weights that bfloat16 holds are read as such, and change nothing; scores are small, or one outweighs all."""
    model = make(stored)
    # the rounding of scores grows with them
    assert error(model, lengths, width, threads, size) < 1e-5 * (1 + size)
    assert model.decoder.main.head.kind == (decode.BF16 if stored == torch.bfloat16 else decode.FP32)


@pytest.mark.parametrize(
    ("values", "threads"),
    [
        ({"kv_lora_rank": 64}, 1),
        ({"kv_lora_rank": 32, "v_head_dim": 32, "dim": 64, "n_heads": 4}, 2),
        ({"kv_lora_rank": 33, "qk_nope_head_dim": 300, "n_heads": 16}, 2),
    ],
)
@pytest.mark.parametrize(("lengths", "width"), [([3, 100, 302], 1), ([3, 100, 302], 3), ([301], 4)])
def test_bfloat16(values: dict[str, int], threads: int, lengths: list[int], width: int) -> None:
    """A model in bfloat16 is nearer to float32 by decode.c than by the modules, which round more often.

    Every expert is chosen: where rounding decides which, results are far apart by right.
    """
    values = {"n_activated_experts": 6} | values
    expected = outputs(make(torch.bfloat16, **values), lengths, width)
    model = make(torch.bfloat16, **values).to(torch.bfloat16)
    model.compute_dtype = torch.bfloat16
    theirs = distances(outputs(model, lengths, width, 1.0, expected), expected)
    torch.set_num_threads(threads)
    model.decoder = decode.CDecoder(model)
    results = outputs(model, lengths, width, 1.0, expected)
    assert [x.dtype for x in results[:4]] == [torch.bfloat16, torch.float32] * 2
    ours = distances(results, expected)
    assert min(ours) > 1e-4 and sum(ours) < sum(theirs)
    assert all(our < 1.5 * their for our, their in zip(ours, theirs, strict=True))  # chance has its part in each
    main = model.decoder.main
    assert main.head.kind == main.blocks[0].wo.kind == decode.PAIRS and main.blocks[1].gate.kind == decode.FP32


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(
    *(st.integers(20, 200) for _ in range(3)),
    st.lists(st.integers(0, 300), min_size=1, max_size=3),
    st.integers(1, 7),
    st.integers(1, 2),
)
@example(256, 384, 130, [40], 1, 2)
def test_fp8(dim: int, inter_dim: int, moe_inter_dim: int, lengths: list[int], width: int, threads: int) -> None:
    """Blocks are whole or ragged, codes subnormal or not; in bfloat16 it is nearer to float32 than the modules are."""
    shape = {"dim": dim, "inter_dim": inter_dim, "moe_inter_dim": moe_inter_dim, "q_lora_rank": 24, "n_mtp_layers": 1}
    model = in_fp8(make(n_layers=2, n_activated_experts=6, **shape))
    weight, generator = model.layers[0].ffn.w1.weight, torch.Generator().manual_seed(4)
    codes = torch.randint(127, weight.shape, generator=generator)  # subnormal ones as well
    codes += 128 * torch.randint(2, weight.shape, generator=generator)
    weight.copy_(codes.byte().view(fp8_ops.E4M3))
    assert error(model, lengths, width, threads) < 1e-5
    main = model.decoder.main
    assert main.head.kind == decode.BF16 and main.blocks[0].wo.kind == main.blocks[1].experts.w2.kind == decode.FP8
    model.decoder = None
    expected = outputs(model, lengths, width)
    model.compute_dtype = torch.bfloat16
    theirs = distances(outputs(model, lengths, width, 1.0, expected), expected)
    model.decoder = decode.CDecoder(model)
    ours = distances(outputs(model, lengths, width, 1.0, expected), expected)
    assert model.decoder.main.blocks[0].wo.kind == decode.FP8_PAIRS and min(ours) > 1e-4 and sum(ours) < sum(theirs)


def test_every_number_of_fp8() -> None:
    """A head that maps each code to a logit of its own, times one number of the state."""
    values = torch.arange(256).byte().view(fp8_ops.E4M3).float()
    for n_in, dtype in ((1, torch.float32), (64, torch.float32), (64, torch.bfloat16)):
        model = make(dim=n_in, n_layers=1, n_mtp_layers=0)
        model.compute_dtype = dtype
        model.head.weight.data, model.head.scale = fp8_ops.weight_quant(model.head.weight)
        model.head.weight.copy_(values[:, None].expand(256, n_in).nan_to_num(0).to(fp8_ops.E4M3))
        model.decoder = decode.CDecoder(model)
        with torch.inference_mode():
            h, logits = model.forward_with_hidden(torch.tensor([[65]]), model.new_cache(1, 8))
        expected = values.nan_to_num(0).double() * h.double().sum() * model.head.scale.double().repeat_interleave(128)
        torch.testing.assert_close(
            logits[0, 0].double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0
        )


def test_fp8_that_is_no_number_stays_visible() -> None:
    model = in_fp8(make())
    model.layers[1].attn.wo.weight.view(torch.uint8)[3, 5] = 0xFF
    assert "not a number" in str(decode.attach(model)) and model.decoder is None
    assert not any(layer.scale is not None for layer in model.fp8_layers()), "modules dequantise once"
    with torch.inference_mode():
        assert model(torch.tensor([[65, 66]]), model.new_cache(1, 8)).isnan().all()


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_kv_caches_are_as_wide_as_the_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attached(make()).new_cache(1, 8).layers[0][0].dtype == torch.float32
    model = as_trained()
    model = in_fp8(model) if kind == "fp8" else model.bfloat16()
    cache = attached(model).new_cache(1, 8)
    assert model.compute_dtype == torch.float32 and cache.layers[0][0].dtype == torch.bfloat16
    monkeypatch.setattr(*CHANGES["norm of latents"][0])
    assert "decode.c" in str(decode.attach(model)) and model.new_cache(1, 8).layers[0][0].dtype == torch.float32


@pytest.mark.parametrize(
    ("act", "values"),
    [
        ("silu", {}),
        ("gelu", {"q_lora_rank": 24}),
        ("relu2", {"n_shared_experts": 0}),
        ("silu", {"n_routed_experts": 0, "q_lora_rank": 24}),
    ],
)
def test_kinds_of_layers(values: dict[str, int], act: str) -> None:
    assert error(make(hidden_act=act, **values), [70, 0], 2, 2) < 1e-5


def test_nan_stays_visible() -> None:
    """A damaged weight gives states that are no numbers, as the modules do, and not a crash."""
    model = make()
    model.layers[1].ffn.gate.weight[2, 3] = float("nan")
    model.layers[0].attn.wo.weight[0] = float("inf")
    attached(model)
    with torch.inference_mode():
        h, logits = model.forward_with_hidden(torch.tensor([[65, 66]]), model.new_cache(1, 8))
    assert h.isnan().all() and logits.isnan().all()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00001, 0x7FC00000])
def test_nan_in_the_kv_cache_stays_visible(bits: int) -> None:
    model = attached(make())
    cache = remembering(model, [5])
    cache.layers[1][0].view(torch.int32)[0, 3, 45] = bits  # of a rotary key: it goes through the softmax
    with torch.inference_mode():
        h, logits = model.forward_with_hidden(torch.tensor([[65]]), cache)
    assert h.isnan().all() and logits.isnan().all()


def test_tokens_out_of_range_are_refused() -> None:
    model = attached(make())
    with torch.inference_mode():
        for token in (-1, 256, 10**12):
            with pytest.raises(IndexError):
                model.forward_with_hidden(torch.tensor([[65, token]]), model.new_cache(1, 8))
        narrow, wide = (
            model.forward_with_hidden(torch.tensor([[65, 66]], dtype=d), model.new_cache(1, 8))[1]
            for d in (torch.int32, torch.int64)
        )
    assert torch.equal(narrow, wide)


def test_too_many_positions_are_refused() -> None:
    model = attached(make())
    with torch.inference_mode():
        for capacity, length, message in ((8, 7, "the cache holds 8"), (800, 699, "the context is")):
            cache = model.new_cache(1, capacity)
            cache.lengths = [length]
            with pytest.raises(ValueError, match=message):
                model.forward_with_hidden(torch.tensor([[65, 66]]), cache)
            with pytest.raises(ValueError, match=message):
                model.mtp_forward(0, torch.zeros(1, 2, 40), torch.tensor([[65, 66]]), cache)


def test_many_positions_and_plain_attention_stay_with_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached(make())
    monkeypatch.setattr(model.decoder, "forward_with_hidden", lambda *_: pytest.fail("decode.c was called"))
    with torch.inference_mode():
        model(torch.full((2, 40), 65), model.new_cache(2, 50))
    plain = make(kv_lora_rank=0)
    assert decode.attach(plain) is None and plain.decoder is None


def test_where_a_thread_was_late_one_does_it_all_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other programs want the processors too, threads that wait for each other are many times slower."""
    model, threads, late = attached(make()), [], [False]

    def watched(*given: Any) -> int:
        threads.append(given[2]._obj.threads)
        return -late[0]

    monkeypatch.setattr(decode, "library", lambda: SimpleNamespace(run=watched))
    torch.set_num_threads(2)

    def calls(n: int) -> list[int]:
        threads.clear()
        with torch.inference_mode():
            for _ in range(n):
                model.forward_with_hidden(torch.tensor([[65]]), model.new_cache(1, 8))
        return threads

    assert calls(3) == [2, 2, 2]
    late[0] = True
    assert calls(1 + 32 + 1 + 64 + 1) == [2] + [1] * 32 + [2] + [1] * 64 + [2]  # twice as long each time
    assert calls(20_000).count(2) <= 25
    late[0] = False
    assert calls(1024 + 2000)[-1000:] == [2] * 1000
    late[0] = True
    assert calls(1 + 32 + 1)[1:] == [1] * 32 + [2], "what was long ago is forgotten"


# --- weights at the width that --weights asks for ---------------------------------------------------------------------


def loaded(path: Path, *flags: str) -> Transformer:
    """What generate.py loads; the products' setting stays as it was."""
    arguments = generate.build_parser().parse_args(
        ["--ckpt-path", str(path), "--prompt", "", "--device", "cpu", *flags]
    )
    gemm_impl = fp8_ops.gemm_impl
    try:
        return generate.load(arguments, parallel.ParallelContext())
    finally:
        fp8_ops.gemm_impl = gemm_impl


def test_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default in bfloat16, or in FP8 where they are stored so; --weights fp8 makes what convert.py makes."""
    save_model(make(dim=130), tmp_path / "fp32")
    convert.convert(tmp_path / "fp32", tmp_path / "fp8", dtype="fp8")
    plain, half = (loaded(tmp_path / "fp32", "--weights", width).state_dict() for width in ("fp32", "bf16"))
    for flags in ((), ("--dtype", "fp32"), ("--weights", "bf16")):
        model = loaded(tmp_path / "fp32", *flags)
        assert isinstance(model.decoder, decode.CDecoder) and model.cache_dtype == torch.bfloat16
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, half[name])
            is_narrow = parallel.is_matrix(name, tensor.shape)
            assert tensor.dtype == (torch.bfloat16 if is_narrow else torch.float32)
            assert torch.equal(tensor, plain[name].to(tensor.dtype))
    half = loaded(tmp_path / "fp8", "--dtype", "bf16")
    assert (
        half.layers[0].attn.wo.weight.dtype == torch.bfloat16
        and half.decoder.main.blocks[0].wo.kind == decode.FP8_PAIRS
    )
    stored = loaded(tmp_path / "fp8", "--dtype", "fp32")
    assert stored.decoder.main.blocks[1].experts.w1.kind == decode.FP8
    made = loaded(tmp_path / "fp32", "--weights", "fp8", "--dtype", "fp32")
    assert made.layers[0].attn.wo.weight.dtype == fp8_ops.E4M3, "what is cast in any case is read in FP8"
    for one, other in zip(stored.decoder.kept, made.decoder.kept, strict=True):
        assert torch.equal(one.float(), other.float())
    dense = loaded(tmp_path / "fp8", "--weights", "fp32", "--dtype", "fp32").layers[0].attn.wo.weight
    assert torch.equal(dense, stored.layers[0].attn.wo.dense_weight(torch.float32))
    flags = ["--ckpt-path", str(tmp_path / "fp32"), "--prompt", "a", "--weights", "fp32", "--dtype", "bf16"]
    assert generate.main(flags) == 2
    assert "--weights fp32" in (message := capsys.readouterr().err) and message.count("\n") == 1


@pytest.mark.slow
def test_narrow_weights_and_caches_cost_little(tmp_path: Path) -> None:
    """What rounding adds to the loss of a trained model, byte after byte by decode.c and its cache."""
    config = json.loads((decode.SOURCE.parent / "configs" / "nano.json").read_text())
    config.pop("train")
    model = Transformer(ModelArgs.from_dict(config | {"max_seq_len": 128}))
    text = b"".join(path.read_bytes() for path in sorted(decode.SOURCE.parent.glob("*.py")))
    ids, generator = torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), torch.Generator().manual_seed(5)
    train, rest = ids[: len(ids) * 9 // 10].unfold(0, 129, 1), ids[len(ids) * 9 // 10 :].unfold(0, 129, 200)[:32]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        rows = train[torch.randint(len(train), (8,), generator=generator)]
        model.loss(rows[:, :-1], rows[:, 1:]).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, tmp_path / "trained")
    losses = {}
    for width in ("fp32", "bf16", "fp8"):
        model = loaded(tmp_path / "trained", "--weights", width, "--dtype", "fp32")
        assert isinstance(model.decoder, decode.CDecoder)
        cache, losses[width] = model.new_cache(len(rest), 128), 0.0
        assert cache.layers[0][0].dtype == (torch.float32 if width == "fp32" else torch.bfloat16)
        with torch.inference_mode():
            for i in range(0, 128, 2):
                logits = model(rest[:, i : i + 2], cache).flatten(0, 1)
                losses[width] += F.cross_entropy(logits, rest[:, i + 1 : i + 3].flatten()).item() / 64
    assert losses["fp32"] < 3.2  # of 5.55 at the start
    assert abs(losses["bf16"] / losses["fp32"] - 1) < 1e-3, losses
    assert abs(losses["fp8"] / losses["fp32"] - 1) < 2.5e-3, losses


# --- the comparison when a decoder is attached ------------------------------------------------------------------------

CHANGED = {"max_seq_len": 220, "original_seq_len": 220, "n_layers": 2, "n_mtp_layers": 1}
CHANGED |= {"kv_lora_rank": 32, "qk_nope_head_dim": 8, "v_head_dim": 16}


def as_trained(dtype: torch.dtype = torch.float32, residual: float = 0.1, **changes: Any) -> Transformer:
    """A random model whose blocks write so much into the residual stream, as after a little training or a lot."""
    model = make(**CHANGED | changes)
    for name, p in model.named_parameters():
        if name.endswith(("wo.weight", "w2.weight")):
            p.mul_(residual)
        elif name.endswith("norm.weight"):
            p.copy_(1 + 0.1 * p)
    model.compute_dtype = dtype
    return model.to(dtype)


def attend(window: int = 1000, cap: float = 0.0, factor: float = 1.0) -> Callable[..., torch.Tensor]:
    """`MLA._attend` for a model of a sliding window, of capped scores, or of another scale."""

    def changed(self: MLA, q: Any, k: Any, v: Any, where: Positions, cache: KVCache | None) -> torch.Tensor:
        if cache is not None:
            k, v = (t.to(q.dtype) for t in cache.update(self.layer_id, where.index, k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = (q.float() @ k.float().mT) * self.softmax_scale * factor
        scores = cap * torch.tanh(scores / cap) if cap else scores
        mask = where.mask
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])[None, None]
        every = torch.arange(scores.shape[-1])
        last = (mask * every).amax(-1, keepdim=True)
        scores = scores.masked_fill(~(mask & (every > last - window)), float("-inf"))
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)

    return changed


def after(owner: Any, name: str, change: Callable[..., Any]) -> tuple[Any, str, Callable[..., Any]]:
    """A method's result changed: `change(result, self, *inputs)`."""
    method = getattr(owner, name)
    return owner, name, lambda self, *given: change(method(self, *given), self, *given)


def head_only(change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Any, str, Callable[..., Any]]:
    return after(Linear, "forward", lambda y, self, *_: change(y) if self.weight.shape[0] == 256 else y)


def of_probabilities(out: Any, self: Gate, *_: torch.Tensor) -> Any:
    """A router that does not normalise."""
    return out[2].gather(1, out[1]) * self.route_scale, *out[1:]


def with_more_shared(out: Any, self: MoE, x: torch.Tensor) -> Any:
    return out[0] + 0.05 * self.shared_experts(x), out[1]


def rotated_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    nope, a, b = x.float().split([x.shape[-1] - 2 * half, half, half], dim=-1)
    return torch.cat([nope, a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def with_the_byte_before(out: Any, self: Block, x: torch.Tensor, *_: Any) -> Any:
    """A token shift, which a call of one position knows nothing of."""
    return torch.cat([out[0][:, :1], out[0][:, 1:] + 0.1 * x[:, :-1]], dim=1), out[1]


# what is changed in model.py, and what then differs from training: C alone, absorbed attention, or all with a cache
CHANGES: dict[str, tuple[tuple[Any, str, Callable[..., Any]], str]] = {
    "window of 150": ((MLA, "_attend", attend(window=150)), "absorb"),
    "window of 7": ((MLA, "_attend", attend(window=7)), "absorb"),
    "capped scores": ((MLA, "_attend", attend(cap=5.0)), "absorb"),
    "scale of scores": ((MLA, "_attend", attend(factor=1.02)), "absorb"),
    "absorbed path alone": (after(MLA, "_attend_absorbed", lambda out, *_: (out[0] * 1.01, out[1])), "absorb"),
    "activation": (after(MLP, "forward", lambda y, *_: y.tanh()), "C"),
    "norm": (after(RMSNorm, "forward", lambda y, self, x: y + 0.01 * x), "C"),
    "epsilon": (
        (RMSNorm, "forward", lambda self, x: F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-2)),
        "C",
    ),
    "norm of latents": (after(RMSNorm, "forward", lambda y, self, x: y * (1 + 0.05 * (len(self.weight) == 32))), "C"),
    "rotation": ((model_module, "apply_rotary_emb", rotated_halves), "C"),
    "router": (after(Gate, "forward", of_probabilities), "C"),
    "shared experts": (after(MoE, "forward", with_more_shared), "C"),
    "residual": (after(Block, "forward", lambda out, *_: (0.9 * out[0], out[1])), "C"),
    "embedding": (after(torch.nn.Embedding, "forward", lambda y, *_: y * 2), "C"),
    "capped logits": (head_only(lambda y: 30 * torch.tanh(y / 30)), "C"),
    "temperature": (head_only(lambda y: y * 1.01), "C"),
    "module": (after(MTPModule, "forward", lambda out, self, h, *_: (out[0] + 0.01 * h, out[1])), "C"),
    "token shift": (after(Block, "forward", with_the_byte_before), "cache"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_model_is_not_decoded_by_unchanged_code(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then it writes what its modules write."""
    change, differs = CHANGES[name]
    model = as_trained(dtype)
    attached(model)
    monkeypatch.setattr(*change)
    warning = decode.attach(model)
    words = {"C": "decode.c", "absorb": "absorbed attention", "cache": "attention with a cache"}[differs]
    assert warning is not None and words in warning and "\n" not in warning
    assert model.decoder is None and model_module.attn_impl == ("absorb" if differs == "C" else "naive")


@pytest.mark.parametrize("size", [600, 1000])
def test_differences_far_back_are_seen(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a pass of the model over so many positions would take too long: by its first layers."""
    monkeypatch.setattr(decode, "MAX_PROBE", decode.MIN_PROBE)
    model = as_trained()
    model.args.max_seq_len = 1024
    assert decode.attach(model) is None and isinstance(model.decoder, decode.CDecoder)
    assert len(model.layers) == model.args.n_layers and len(model.mtp) == model.args.n_mtp_layers
    monkeypatch.setattr(MLA, "_attend", attend(window=size))
    warning = decode.attach(model)
    assert warning is not None and "absorbed attention" in warning and model.decoder is None


@pytest.mark.parametrize("residual", [0.003, 1.0])
def test_small_and_large_differences_are_seen(residual: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a few steps of training, attention hardly counts."""
    model = as_trained(residual=residual)
    attached(model)
    with monkeypatch.context() as patch:
        patch.setattr(MLA, "_attend", attend(window=128))
        assert decode.attach(model) is not None
    # of what C writes, little is read in a call after many others
    monkeypatch.setattr(*CHANGES["norm of latents"][0])
    assert "decode.c" in str(decode.attach(model))


def test_the_same_model_written_otherwise_keeps_its_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MLA, "_attend", attend())
    for dtype in (torch.float32, torch.bfloat16):
        attached(as_trained(dtype))


def test_the_users_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MLA, "_attend", attend(window=20))
    model = as_trained()
    warning = decode.attach(model, keep_attn_impl=True)
    assert warning is not None and "with a cache" in warning and model_module.attn_impl == "absorb"
    model_module.attn_impl = "naive"
    assert decode.attach(model, keep_attn_impl=True) is None, "naive attention is what has changed"
    assert model.decoder is None and model_module.attn_impl == "naive"


def test_attaching_needs_no_setting_before() -> None:
    """`generate.complete` attends through the latent where there is one, whatever `model.attn_impl` is."""
    model_module.attn_impl = "naive"
    model = as_trained()
    assert decode.attach(model) is None and isinstance(model.decoder, decode.CDecoder)
    assert model_module.attn_impl == "naive", "training goes on as before"
    calls, forward = [], model.decoder.forward_with_hidden
    model.decoder.forward_with_hidden = lambda *given: calls.append(1) or forward(*given)
    generate.complete(model, b"ab", generate.Sampling(0, max_new_tokens=5))
    assert calls


def test_differences_in_bfloat16_alone_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, training in bfloat16 attends by another function."""
    monkeypatch.setattr(*after(fp8_ops, "blockwise_attention", lambda out, *_: out.flip(1)))
    assert decode.attach(as_trained(residual=1.0)) is None
    assert "with a cache" in str(decode.attach(as_trained(torch.bfloat16, residual=1.0)))


def test_a_batch_that_masks_wrongly_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One position at a time, rows of different lengths: the shorter ones must not look beyond their ends."""

    def unmasked(where: Positions, self: Transformer, seq_len: int, *_: Any) -> Positions:
        return where._replace(mask=None) if seq_len == 1 else where

    monkeypatch.setattr(*after(Transformer, "positions", unmasked))
    assert "with a cache" in str(decode.attach(as_trained()))


def test_an_activation_or_a_shape_that_c_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither counts as another one, and no weight is read beyond its end."""
    monkeypatch.setitem(model_module.ACTIVATIONS, "tanh", torch.tanh)
    monkeypatch.setitem(model_module._CHOICES, "hidden_act", tuple(model_module.ACTIVATIONS))
    model = as_trained(hidden_act="tanh")
    assert "'tanh'" in str(decode.attach(model)) and model.decoder is None
    for change in ("wo", "wkv_a", "missing"):
        model = as_trained()
        attn = model.layers[1].attn
        if change == "missing":
            attn.add_module("values_norm", attn.kv_norm)
            del attn.kv_norm
            with pytest.raises(AttributeError):  # its modules are at a loss as well
                decode.attach(model)
            continue
        weight = getattr(attn, change).weight
        getattr(attn, change).weight = torch.nn.Parameter(weight[:, :-1].contiguous(), requires_grad=False)
        with pytest.raises(ValueError, match="shape"):
            decode.CDecoder(model)


def test_untrained_and_damaged_models_are_decoded_in_c() -> None:
    """Zeros, where nothing is relative to anything, and what is no number."""
    model = Transformer(ModelArgs.from_dict(SHAPE | CHANGED))
    model.init_weights(0)
    attached(model.eval().requires_grad_(False))
    model.layers[0].ffn.w2.weight[3] = float("nan")
    attached(model)


@st.composite
def trained_models(draw: st.DrawFn) -> Transformer:
    """Models of many kinds; the router decides by small differences."""
    groups = draw(st.sampled_from([1, 2, 4]))
    per_group, limited = draw(st.integers(2, 16 // groups)), draw(st.integers(1, groups))
    values = {
        "n_layers": draw(st.integers(1, 5)),
        "n_dense_layers": draw(st.integers(0, 1)),
        "n_heads": draw(st.integers(1, 4)),
        "n_routed_experts": groups * per_group,
        "n_expert_groups": groups,
        "n_limited_groups": limited,
        "n_activated_experts": draw(st.integers(1, per_group * limited)),
        "score_func": draw(st.sampled_from(["sigmoid", "softmax"])),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "relu2"])),
        "q_lora_rank": draw(st.sampled_from([0, 12])),
        "max_seq_len": draw(st.integers(1, 150)),
        "original_seq_len": draw(st.sampled_from([40, 150])),
        "n_mtp_layers": draw(st.integers(0, 2)),
    }
    dtype, residual = draw(st.sampled_from([torch.float32, torch.bfloat16])), draw(st.sampled_from([0.1, 0.5, 1.5]))
    return as_trained(dtype, residual, **values)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(trained_models())
def test_no_false_alarms(model: Transformer) -> None:
    model_module.attn_impl = "absorb"
    attached(model)


@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(trained_models(), st.integers(1, 9))
def test_all_implementations_agree(model: Transformer, width: int) -> None:
    """Training's forward pass, and each way to go through a text by a cache: whoever changes one sees it here."""
    model = model.float()
    model.compute_dtype = torch.float32
    tokens = torch.randint(1, 256, (2, model.args.max_seq_len), generator=torch.Generator().manual_seed(3))
    model_module.attn_impl = "naive"
    with torch.inference_mode():
        expected = [*model.forward_with_hidden(tokens)]
        for depth in range(len(model.mtp)):
            expected += model.mtp_forward(depth, expected[2 * depth], tokens.roll(-1 - depth, 1), None)
    kernels = decode.GraphDecoder(model)
    ways = [("naive", None), ("absorb", None), ("absorb", decode.CDecoder(model))]
    ways += [(impl, kernels) for impl in ("naive", "absorb")]
    for model_module.attn_impl, model.decoder in ways:
        cache, start = model.new_cache(2, tokens.shape[1]), 0
        for end in [*range(tokens.shape[1] // 2, tokens.shape[1], width), tokens.shape[1]]:  # a prompt, and steps
            if end == start:
                continue
            kernels.reset()  # nothing is recorded off a GPU
            with torch.inference_mode():
                outputs = [*model.forward_with_hidden(tokens[:, start:end], cache)]
                for depth in range(len(model.mtp)):
                    ahead = tokens.roll(-1 - depth, 1)[:, start:end]
                    outputs += model.mtp_forward(depth, expected[2 * depth][:, start:end], ahead, cache)
            cache.lengths = [end] * 2
            for ours, theirs in zip(outputs, expected, strict=True):
                assert torch.tensor(distances([ours], [theirs[:, start:end]])).median() < 1e-4
            start = end


# --- the compiler -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for caches, guarded as a home folder is: pytest's own stands in one that others may write to."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("XDG_CACHE_HOME", folder)
        yield Path(folder).resolve()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, cache_home: Path) -> Iterator[Path]:
    """An empty cache folder, and nothing loaded; what is compiled is not optimised, which takes a tenth of the time."""
    monkeypatch.setattr(decode, "FLAGS", ["-O0", *decode.FLAGS[1:]])
    decode.library.cache_clear()
    yield cache_home / "bytegpt"
    decode.library.cache_clear()


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries are not tried out, which takes as long as importing torch."""
    monkeypatch.setattr(decode, "_try_in_child", lambda path: None)


@pytest.mark.slow
def test_compiles_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode.library() is not None
    (made,) = fresh.iterdir()
    assert made.stat().st_mode & 0o077 == 0 and fresh.stat().st_mode & 0o077 == 0
    time = made.stat().st_mtime_ns
    decode.library.cache_clear()
    monkeypatch.setattr(decode, "_try_in_child", lambda *_: pytest.fail("compiled again"))
    assert decode.library() is not None
    assert list(fresh.iterdir()) == [made] and made.stat().st_mtime_ns == time


@pytest.mark.slow
def test_several_at_a_time(fresh: Path) -> None:
    """Processes that start together each find a whole file."""
    program = "import decode; decode.FLAGS[0] = '-O0'; assert decode.library()"
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=Path(decode.__file__).parent) for _ in range(2)]
    assert [process.wait(240) for process in processes] == [0, 0]
    assert len(list(fresh.iterdir())) == 1


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "true", 'cc "-O2', "cc -no-such-flag", "cat"])
def test_without_a_compiler_the_modules_decode(compiler: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    model = make(n_mtp_layers=1, max_seq_len=40)
    warning = decode.attach(model)
    assert warning is not None and "no C compiler" in warning and "CC" in warning
    assert model.decoder is None and decode.library() is None
    assert not fresh.exists() or not list(fresh.iterdir())
    text = generate.complete(model, b"ab", generate.Sampling(0, max_new_tokens=5, speculate=1))
    assert len(text) <= 5


@pytest.mark.slow
@pytest.mark.usefixtures("untried")
def test_libraries_of_other_users_are_not_loaded(fresh: Path, tmp_path: Path) -> None:
    """Neither damaged files nor planted ones, whose names have the right digest; and none hangs."""
    assert decode.library() is not None
    (made,) = fresh.iterdir()
    content = made.read_bytes()
    source = tmp_path / "planted.c"  # code that leaves a trace when it is loaded
    source.write_text(
        f'#include <stdio.h>\n__attribute__((constructor)) void f(void) {{ fopen("{tmp_path}/ran", "w"); }}\n'
        "int run(void) { return 0; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", tmp_path / "planted.so"], check=True)
    code = (tmp_path / "planted.so").read_bytes()
    planted = made.with_name(f"{made.stem.rpartition('-')[0]}-{decode._digest(code)}.so")
    zeros = content[:0x2000] + bytes(0x2000) + content[0x4000:]
    damages: dict[str, Callable[[], object]] = {
        "cut": lambda: made.write_bytes(content[:4096]),
        "zeros": lambda: made.write_bytes(zeros),
        "empty": lambda: made.write_bytes(b""),
        "folder": made.mkdir,
        "fifo": lambda: os.mkfifo(made, 0o600),
        "link": lambda: planted.symlink_to(tmp_path / "planted.so"),
        "writable": lambda: (planted.write_bytes(code), planted.chmod(0o666)),
    }
    if os.geteuid() == 0:  # only root gives files away
        damages["foreign"] = lambda: (planted.write_bytes(code), os.chown(planted, 12345, 12345))
    for damage, inflict in damages.items():
        for path in (made, planted):
            if path.is_dir():
                path.rmdir()
            path.unlink(missing_ok=True)  # the process has it mapped: no byte of it may change
        inflict()
        decode.library.cache_clear()
        assert decode.library() is not None, damage
        assert error(make(max_seq_len=30), [3], 1, 1) < 1e-5, damage
        assert not (tmp_path / "ran").exists(), damage
        assert damage == "folder" or made.read_bytes() == content, damage


def wrapper(path: Path, script: str) -> str:
    """Makes a compiler: a shell script, which has `cc` do what it does not; only one choice of flags works."""
    last = 'for last; do :; done\ncase "$*" in *native*|*openmp*) exit 1 ;; *-shared*) '
    path.write_text("#!/bin/sh\n" + last + script + ' ;; *) exec cc "$@" ;; esac\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        'echo garbage > "$last"',
        # a trap, a loop without end, and an exponential that is a little off
        "echo 'int run(void) { __builtin_trap(); }' | cc -shared -x c - -o \"$last\"",
        "echo 'int run(void) { for (;;) ; }' | cc -shared -x c - -o \"$last\"",
        'sed s/0.693145752f/0.6945f/ {source} | cc -O0 -std=gnu11 -shared -fPIC -x c - -lm -o "$last"',
    ],
)
def test_output_of_a_strange_compiler_is_not_kept(
    script: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is tried out in another process: this one goes on."""
    script = script.replace("{source}", str(decode.SOURCE))
    monkeypatch.setenv("CC", wrapper(tmp_path / "compiler", script))
    monkeypatch.setattr(decode, "COMPILER_SECONDS", 10.0 if "for (;;)" in script else 60.0)
    assert decode.library() is None and not list(fresh.iterdir())


@pytest.mark.slow
def test_a_right_library_passes_the_trial(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without OpenMP, as with Apple's compiler: one thread does it all."""
    monkeypatch.setenv("CC", wrapper(tmp_path / "compiler", 'exec cc "$@"'))
    assert error(make(), [100, 3], 2, 3) < 1e-5
    assert len(list(fresh.iterdir())) == 1


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits for its parent to read its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Waits until a condition holds; the time is a bound for a hang alone."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux's /proc")
def test_a_compiler_that_hangs_is_ended_with_its_children(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "compiler"
    script.write_text(f"#!/bin/sh\nsleep 1000 &\necho $! >> {tmp_path}/children\nwait\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setattr(decode, "COMPILER_SECONDS", 2.0)
    assert decode.library() is None
    (child,) = (tmp_path / "children").read_text().split()  # one time-out, not one for each choice of flags
    assert eventually(lambda: has_ended(int(child)))  # a killed process takes a moment to end


@pytest.mark.slow
@pytest.mark.usefixtures("untried")
def test_leftovers_of_killed_compilers_are_swept(fresh: Path, tmp_path: Path) -> None:
    fresh.mkdir(mode=0o700)
    for name in ("tmpold", "tmpnew", "other"):
        (fresh / name).mkdir()
        (fresh / name / "decode.so").write_text("half")
    (fresh / "tmplink").symlink_to(tmp_path)
    (tmp_path / "kept").write_text("")
    for name in ("tmpold", "other"):
        os.utime(fresh / name, (1e9, 1e9))
    os.utime(tmp_path, (1e9, 1e9))
    assert decode.library() is not None
    left = {path.name for path in fresh.iterdir() if path.suffix != ".so"}
    assert left == {"tmpnew", "other", "tmplink"} and (tmp_path / "kept").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("untried")
def test_a_cache_that_cannot_be_written_leads_to_a_temporary_folder(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "private_cache_folder", lambda: tmp_path / "missing")
    monkeypatch.setattr(command, "private_temporary_folder", lambda: tmp_path)
    assert decode.library() is not None
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


def test_cache_folder_belongs_to_this_user_alone(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, temporary = cache_home / "bytegpt", command.private_temporary_folder()
    assert temporary.stat().st_mode & 0o077 == 0
    assert command.private_cache_folder() == folder and folder.stat().st_mode & 0o777 == 0o700
    for path, mode in ((folder, 0o722), (folder, 0o770), (cache_home, 0o777), (cache_home, 0o720)):
        path.chmod(mode)
        assert command.private_cache_folder() == temporary, (path, oct(mode))
        path.chmod(0o700)
    cache_home.chmod(0o1777)  # a sticky folder, as /tmp, guards what is in it
    assert command.private_cache_folder() == folder
    if os.geteuid() == 0:  # another user's folder, or one within another user's
        for path in (folder, cache_home):
            os.chown(path, 12345, 12345)
            assert command.private_cache_folder() == temporary
            os.chown(path, 0, 0)
    for other in ("real", "file"):
        folder.rename(cache_home / other)
        if other == "real":
            folder.symlink_to(cache_home / other)
        else:
            folder.write_text("")
        assert command.private_cache_folder() == temporary
        folder.unlink()
        folder.mkdir(mode=0o700)


def test_a_relative_cache_home_is_ignored(cache_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(cache_home))
    monkeypatch.chdir(tmp_path)
    for relative in ("caches", "./x", "", "../y"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert command.private_cache_folder() == cache_home / ".cache" / "bytegpt"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("field", "value"), [("f_bavail", 3), ("f_flag", getattr(os, "ST_NOEXEC", 8))])
def test_a_cache_that_is_full_or_cannot_be_run_from_is_not_used(
    field: str, value: int, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.private_cache_folder().parent == cache_home
    disk = {"f_bavail": 10**9, "f_frsize": 4096, "f_flag": 0} | {field: value}
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(**disk))
    assert command.private_cache_folder() == command.private_temporary_folder()


def test_two_threads_of_one_process() -> None:
    """Each call has its own memory: what two threads decode at once is what they decode in turn."""
    model = attached(make())
    texts = [bytes([65 + i]) * 5 for i in range(4)]
    sampling = generate.Sampling(0, max_new_tokens=30)
    expected = [generate.complete(model, text, sampling) for text in texts]
    results: dict[int, bytes] = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: generate.complete(model, texts[i], sampling)}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(4)] == expected


# --- other processors, and sanitizers: a program with calls of decode.c as constants ----------------------------------


def c_program(calls: list[tuple[Any, ...]]) -> str:
    """Writes a C program that makes recorded calls of `run` and prints their states and logits."""
    lines, main = [f'#include "{decode.SOURCE}"', "#include <stdio.h>"], []
    names: dict[int, str] = {}  # of arrays, by the addresses that they had

    def array(address: int, content: bytes) -> None:
        content += bytes(-len(content) % 4)
        words = ",".join(map(hex, memoryview(content).cast("I")))
        lines.append(f"static uint32_t a{len(lines)}[] = {{{words}}};")
        names[address] = f"(void *)a{len(lines) - 1}"

    def value(kind: Any, given: Any) -> str:
        if issubclass(kind, ctypes.Structure):
            return "{" + ",".join(value(part, getattr(given, name)) for name, part, *_ in kind._fields_) + "}"
        if kind is ctypes.c_void_p:
            return names[given] if given else "0"
        if issubclass(kind, ctypes._Pointer):
            return f"blocks{i}"
        return float(given).hex() if kind is ctypes.c_float else str(given)

    for i, (arrays, pointers, shape, stack, call) in enumerate(calls):
        for address, content in arrays.items():
            array(address, content)
        for field, group in pointers.items():
            lines.append(f"static void *{field}{i}[] = {{{','.join(names[pointer] for pointer in group)}}};")
            names[getattr(call, field)] = f"{field}{i}"
        blocks = ",".join(value(decode._Block, stack.blocks[k]) for k in range(stack.n_blocks))
        lines.append(f"static Block blocks{i}[] = {{{blocks}}};")
        for name, struct in {"Shape shape": shape, "Stack stack": stack, "Call call": call}.items():
            lines.append(f"static {name}{i} = {value(type(struct), struct)};")
        n, n_logits = call.n_rows * call.n_each, shape.vocab
        main += [f"if (run(&shape{i}, &stack{i}, &call{i}) > 0) return 1;"]
        main += [f'for (int i = 0; i < {n * shape.dim}; i++) printf("%a\\n", call{i}.states[i]);']
        main += [f'for (int i = 0; i < {n * n_logits}; i++) printf("%a\\n", call{i}.logits[i]);']
    return "\n".join([*lines, "int main(void) {", *main, "}"])


def recorded(
    model: Transformer, run: Callable[[], list[torch.Tensor]], patch: pytest.MonkeyPatch
) -> list[tuple[Any, ...]]:
    """The calls of decode.c's `run` by a function, each with what its pointers point to: none of them is made."""
    calls: list[tuple[Any, ...]] = []
    model.decoder = decoder = decode.CDecoder(model)

    def record(*given: Any) -> int:
        shape, stack, call = (type(x._obj).from_buffer_copy(x._obj) for x in given)
        n, widths = call.n_rows * call.n_each, {"kv_caches": shape.rank + shape.rope, "index_caches": shape.index_dim}
        array = ctypes.c_void_p * stack.n_blocks
        pointers = {field: list(array.from_address(getattr(call, field))) for field in widths if getattr(call, field)}
        sizes = {t.data_ptr(): t.nbytes for t in (*decoder.kept, *decoder.tables)}
        sizes |= {call.tokens: 8 * n, call.positions: 4 * n, call.before: 4 * n * shape.dim}
        sizes |= {call.states: 4 * n * shape.dim, call.logits: 4 * n * shape.vocab}
        numbers = call.n_rows * call.capacity * (4 if call.kind == decode.FP32 else 2)
        for field, group in pointers.items():
            sizes |= dict.fromkeys(group, numbers * widths[field])
        arrays = {address: ctypes.string_at(address, size) for address, size in sizes.items() if address}
        calls.append((arrays, pointers, shape, stack, call))
        return 0

    patch.setattr(decode, "library", lambda: SimpleNamespace(run=record))
    run()
    model.decoder = None
    return calls


OTHERS = {
    "NEON": (["aarch64-linux-gnu-gcc", "-O2", "-static", "-fopenmp"], ["qemu-aarch64"]),
    "SSE2": (["cc", "-O1", "-march=x86-64", "-fopenmp"], []),
    "AVX2": (["cc", "-O1", "-march=haswell", "-fopenmp"], []),
    "sanitizers": (
        ["cc", "-O1", "-g", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        [],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_processors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """decode.c compiled for them, emulated where need be, computes what the modules compute; no sanitizer reports."""
    compiler, emulator = OTHERS[name]
    for program in (compiler[0], *emulator):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program} (Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user)")
    if name in ("SSE2", "AVX2") and platform.machine() != "x86_64":
        pytest.skip("needs an x86-64")
    torch.set_num_threads(2)
    calls, expected = [], []
    small = {"max_seq_len": 280, "n_layers": 2, "n_mtp_layers": 1, "n_activated_experts": 6, "kv_lora_rank": 32}
    indexed = {"q_lora_rank": 24, "index_n_heads": 5, "index_head_dim": 21, "index_topk": 100}
    for kind, dtype in product((None, "bf16", "fp8", "sparse"), (torch.float32, torch.bfloat16)):
        shape = small | (indexed if kind == "sparse" else {})
        model = make(torch.bfloat16 if kind == "bf16" else torch.float32, dim=70, **shape)
        model = in_fp8(model) if kind == "fp8" else model
        for lengths, width in (([262, 3], 2), ([20], 5)):
            results = outputs(model, lengths, width)[:4]
            expected += results
            model.compute_dtype = dtype
            calls += recorded(model, partial(outputs, model, lengths, width, 1.0, results), monkeypatch)
            model.compute_dtype = torch.float32
    (tmp_path / "calls.c").write_text(c_program(calls))
    program = str(tmp_path / "calls")
    subprocess.run([*compiler, "-std=gnu11", tmp_path / "calls.c", "-lm", "-o", program], check=True)
    printed = subprocess.run([*emulator, program], check=True, capture_output=True, text=True).stdout.split()
    numbers = torch.tensor([float.fromhex(number) for number in printed]).split([x.numel() for x in expected])
    for i, (ours, theirs) in enumerate(zip(numbers, expected, strict=True)):
        is_exact = i // 8 % 2 == 0  # else caches are in bfloat16, and on some processors what is multiplied
        assert distances([ours.view_as(theirs)], [theirs])[0] < (1e-5 if is_exact else 3e-2), (name, i)


# --- CUDA graphs: what is recorded, on any device, and recording itself on a GPU --------------------------------------

GRAPHED = {"max_seq_len": 200, "original_seq_len": 200, "dim": 64, "inter_dim": 96, "moe_inter_dim": 32, "n_heads": 4}
GRAPHED |= {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(0, 150), min_size=1, max_size=4),
    st.integers(1, 5),
    st.sampled_from(["naive", "absorb"]),
    st.sampled_from([{}, {"q_lora_rank": 24, "index_n_heads": 8, "index_head_dim": 16, "index_topk": 40}]),
)
def test_recorded_calls_equal_the_modules(lengths: list[int], width: int, impl: str, indexed: dict[str, int]) -> None:
    model_module.attn_impl = impl
    model = make(**GRAPHED | indexed)
    tokens = torch.randint(1, 256, (2, len(lengths), width), generator=torch.Generator().manual_seed(2))
    results = []
    for decoder in (None, decode.GraphDecoder(model)):
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
    assert not decode.GraphDecoder.suits(make())


@needs_gpu
@pytest.mark.parametrize("impl", ["naive", "absorb"])
@pytest.mark.parametrize("speculate", [0, 1, 3])
def test_recording_changes_no_byte(impl: str, speculate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model_module.attn_impl = impl
    model = make(**GRAPHED).to("cuda", torch.bfloat16)
    model.compute_dtype = torch.bfloat16
    model.head.weight[0] = 0  # else it ends too soon
    assert decode.GraphDecoder.suits(model)
    prompts = [b"ab", b"", b"abcdefgh" * 5]
    for temperature in (0.0, 0.8):
        sampling = replace(generate.Sampling(), temperature=temperature, max_new_tokens=150, speculate=speculate)
        texts = []
        for repeats in (10**9, 2):
            monkeypatch.setattr(decode, "REPEATS", repeats)
            model.decoder = decode.GraphDecoder(model)
            texts.append([generate.complete(model, prompt, sampling) for prompt in prompts])
            together = [b""] * 3
            for row, piece in generate.generate(model, prompts, sampling):
                together[row] += piece
            texts[-1] += together
            assert bool(model.decoder.graphs) == (repeats == 2)
        assert texts[0] == texts[1] and min(map(len, texts[0])) > 20
