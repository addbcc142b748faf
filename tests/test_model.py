"""The model against transformers, brute force, the papers' formulas, gradcheck, and DeepSeek's published sizes."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
)

import decode
import fp8_ops
import model
from fp8_ops import linear
from model import ConfigError, ModelArgs, Transformer

TOLERANCE = 1e-5  # float32, logits of order 1
VOCAB = 23
draws = settings(max_examples=20, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products this small only lose by being shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def attention(impl: str, net: Transformer | None = None) -> Iterator[None]:
    """Sets the attention implementation for a while; "decoder" is what "absorb" uses for few positions on a CPU."""
    before, model.attn_impl = model.attn_impl, "absorb" if impl == "decoder" else impl
    if impl == "decoder":
        net.decoder = decode.CDecoder(net) if decode.CDecoder.suits(net) else None
    try:
        yield
    finally:
        model.attn_impl = before


@st.composite
def shapes(draw: st.DrawFn, **fixed: Any) -> ModelArgs:
    """Small models of all sorts; `fixed` overrides what is drawn."""

    def integers(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    heads, layers, groups = integers(1, 4), integers(1, 4), draw(st.sampled_from([1, 2, 4]))
    per_group = integers(2, 8 // groups)
    limited = integers(1, groups)
    rope = 2 * integers(0, 4)
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "dim": heads * integers(4, 16),
        "inter_dim": integers(1, 48),
        "moe_inter_dim": integers(1, 24),
        "n_layers": layers,
        "n_dense_layers": integers(0, layers),
        "moe_layer_freq": integers(1, 3),
        "n_heads": heads,
        "n_routed_experts": draw(st.sampled_from([0] + 3 * [groups * per_group])),
        "n_shared_experts": integers(0, 2),
        "n_activated_experts": integers(1, min(4, limited * per_group)),
        "n_expert_groups": groups,
        "n_limited_groups": limited,
        "score_func": draw(st.sampled_from(["softmax", "sigmoid"])),
        "gate_bias": draw(st.sampled_from([None, True, False])),
        "route_scale": draw(st.sampled_from([1.0, 2.5])),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "relu2"])),
        "q_lora_rank": draw(st.sampled_from([0, 3, 16])),
        "kv_lora_rank": draw(st.sampled_from([0, 5, 16])),
        "qk_nope_head_dim": integers(0 if rope else 1, 9),
        "qk_rope_head_dim": rope,
        "v_head_dim": integers(1, 9),
        "rope_theta": draw(st.sampled_from([100.0, 10000.0])),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "max_seq_len": 64,
        "aux_loss_alpha": 0.0,
        "n_mtp_layers": integers(0, 2),
    }
    if draw(st.booleans()):
        original = draw(st.sampled_from([32, 256, 4096]))
        values |= {
            "original_seq_len": original,
            "max_seq_len": 2 * original,
            "rope_factor": draw(st.sampled_from([2.0, 40.0])),
            "beta_fast": integers(2, 32),
            "mscale": draw(st.sampled_from([0.707, 1.0])),
            "use_yarn": draw(st.sampled_from([None, True, False])),
        }
        if draw(st.booleans()):  # a context that YaRN is not needed for
            values["max_seq_len"] = min(64, original)
    values |= fixed
    if values["qk_rope_head_dim"] == 0:
        values["qk_nope_head_dim"] = max(1, values["qk_nope_head_dim"])
    return ModelArgs(**values)


def small(**values: Any) -> ModelArgs:
    """One model with everything on."""
    defaults = {
        "max_seq_len": 64,
        "vocab_size": VOCAB,
        "dim": 32,
        "inter_dim": 40,
        "moe_inter_dim": 24,
        "n_layers": 3,
        "n_heads": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_activated_experts": 2,
        "n_expert_groups": 2,
        "n_limited_groups": 2,
        "score_func": "sigmoid",
        "route_scale": 2.5,
        "aux_loss_alpha": 0.01,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_mtp_layers": 2,
    }
    return ModelArgs(**(defaults | values))


def build(args: ModelArgs, seed: int = 0, compute_dtype: torch.dtype = torch.float32) -> Transformer:
    """A model of random parameters: see `randomise`."""
    net = Transformer(args, compute_dtype)
    randomise(net, seed)
    return net


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, what: str = "", tolerance: float = TOLERANCE) -> None:
    """Compares elementwise, within `tolerance` of the largest entry, or of 1 where that is larger."""
    assert_within(actual, expected, what, tolerance * max(1.0, largest(expected)))


def assert_near_grads(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compares gradients by name, relative to the largest entry of each.

    They are harder on float32 than logits: behind norms of a few numbers, rounding errors grow with 1/norm.
    """
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert_within(actual[name], grad, name, 1e-4 * max(1e-2, largest(grad)))


def largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def assert_within(actual: torch.Tensor, expected: torch.Tensor, what: str, bound: float) -> None:
    assert actual.shape == expected.shape, what
    error = largest(actual.detach().double() - expected.detach().double())
    assert error <= bound, f"{what}: off by {error:.2e}, more than {bound:.2e}"


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by name; zeros where nothing arrived."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}


# --- transformers ----------------------------------------------------------------------------------------------------

NAMES = {
    "embed": "embed_tokens",
    "head": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn": "self_attn",
    "wq": "q_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
    "ffn": "mlp",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "bias": "e_score_correction_bias",
    "block": "mtp_block",
}


def to_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames parameters, or their gradients, to those of transformers; experts are stacked there as gate over up."""
    renamed = {}
    for name, tensor in tensors.items():
        parts = [NAMES.get(part, part) for part in name.split(".")]
        if parts[0] not in ("lm_head", "mtp"):
            parts.insert(0, "model")
        elif parts[0] == "mtp" and parts[2] == "norm":
            parts[2] = "post_norm"
        if tensor.ndim == 3:
            if name.endswith("w3.weight"):
                continue
            if name.endswith("w1.weight"):
                tensor = torch.cat([tensor, tensors[name.replace("w1", "w3")]], dim=1)
                parts[-2] = "gate_up_proj"
            parts.pop()
        renamed[".".join(parts)] = tensor
    return renamed


def reference(net: Transformer, kind: str) -> PreTrainedModel:
    """The same model in transformers, with the same weights."""
    args = net.args
    yarn = args.use_yarn
    rope: dict[str, Any] = {"rope_type": "yarn" if yarn else "default", "rope_theta": args.rope_theta}
    if yarn:
        rope |= {"factor": args.rope_factor, "original_max_position_embeddings": args.original_seq_len}
        rope |= {"beta_fast": args.beta_fast, "beta_slow": args.beta_slow}
        rope |= {"mscale": args.mscale, "mscale_all_dim": args.mscale}
    common = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": args.inter_dim,
        "moe_intermediate_size": args.moe_inter_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_heads,
        "n_shared_experts": args.n_shared_experts,
        "n_routed_experts": args.n_routed_experts,
        "num_experts_per_tok": args.n_activated_experts,
        "n_group": args.n_expert_groups,
        "topk_group": args.n_limited_groups,
        "routed_scaling_factor": args.route_scale,
        "q_lora_rank": args.q_lora_rank or None,
        "kv_lora_rank": args.kv_lora_rank,
        "qk_nope_head_dim": args.qk_nope_head_dim,
        "qk_rope_head_dim": args.qk_rope_head_dim,
        "v_head_dim": args.v_head_dim,
        "hidden_act": args.hidden_act,
        "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": args.max_seq_len,
        "rope_parameters": rope,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    if kind == "v3":
        config = DeepseekV3Config(**common, first_k_dense_replace=args.n_dense_layers, norm_topk_prob=True)
        theirs = DeepseekV3ForCausalLM(config)
    elif kind == "v2":
        method = "group_limited_greedy" if args.n_expert_groups > 1 else "greedy"
        config = DeepseekV2Config(**common, first_k_dense_replace=args.n_dense_layers, topk_method=method)
        theirs = DeepseekV2ForCausalLM(config)
    else:
        layout = ["sparse" if args.is_moe(i) else "dense" for i in range(args.n_layers)]
        theirs = Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**common, mlp_layer_types=layout))
    weights = {name: t for name, t in net.state_dict().items() if not name.startswith("mtp.")}
    theirs.load_state_dict(to_transformers(weights), strict=True)
    return theirs


def compare_with(kind: str, args: ModelArgs, seed: int) -> None:
    """Logits, the loss and the gradient of every parameter against transformers."""
    net = build(args, seed)
    theirs = reference(net, kind)
    full = random_tokens(2, 12, seed=seed)
    tokens, targets = full[:, :-1], full[:, 1:]
    with torch.no_grad():
        assert_near(net(tokens), theirs(tokens).logits, "logits")
    ours, expected = net.loss(tokens, targets).total, theirs(input_ids=full, labels=full).loss
    assert_near(ours, expected, "loss")
    ours.backward()
    expected.backward()
    assert_near_grads(to_transformers(gradients(net)), gradients(theirs))


oracle = {"n_shared_experts": 1, "n_mtp_layers": 0}  # transformers always has shared experts


@st.composite
def oracle_shapes(draw: st.DrawFn, **fixed: Any) -> ModelArgs:
    """Shapes that transformers can build too: it needs a latent, rotary dimensions, shared and routed experts."""
    args = draw(shapes(**(oracle | {"kv_lora_rank": 16} | fixed)))
    values = args.to_dict()
    if not args.qk_rope_head_dim:
        values["qk_rope_head_dim"] = 4
    if not args.n_routed_experts:
        values |= {"n_routed_experts": 8, "n_expert_groups": 4, "n_limited_groups": 2, "n_activated_experts": 3}
    return ModelArgs(**values)


@draws
@given(oracle_shapes(score_func="sigmoid", gate_bias=True, moe_layer_freq=1), st.integers(0, 99))
def test_deepseek_v3(args: ModelArgs, seed: int) -> None:
    compare_with("v3", args, seed)


@draws
@given(oracle_shapes(score_func="softmax", gate_bias=False, moe_layer_freq=1), st.integers(0, 99), st.integers(0, 4))
def test_deepseek_v2(args: ModelArgs, seed: int, half: int) -> None:
    """There the width without position must be even, for the rotary one is viewed as complex numbers."""
    compare_with("v2", ModelArgs(**(args.to_dict() | {"qk_nope_head_dim": 2 * half})), seed)


@draws
@given(oracle_shapes(score_func="sigmoid", gate_bias=True), st.integers(0, 99))
def test_glm4_moe_lite(args: ModelArgs, seed: int) -> None:
    """Of the three it alone can place dense layers between sparse ones."""
    compare_with("glm", args, seed)


def test_yarn_frequencies_at_deepseeks_size() -> None:
    """The frequencies of DeepSeek-V3 itself, which stretch from 4096 to 16384 positions and more."""
    args = ModelArgs()
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096}
    rope |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = DeepseekV3Config(rope_parameters=rope, max_position_embeddings=163840)
    theirs = DeepseekV3RotaryEmbedding(config)
    torch.testing.assert_close(model.rope_frequencies(args), theirs.inv_freq, rtol=1e-6, atol=0)
    assert theirs.attention_scaling == 1


@pytest.mark.parametrize("theta", [2.0, 100.0, 1e7])
@pytest.mark.parametrize("original", [2, 5, 37, 4096, 1 << 20])
@pytest.mark.parametrize(("fast", "slow"), [(32, 1), (1, 1), (700, 3)])
def test_yarn_frequencies_where_its_range_is_cut(original: int, theta: float, fast: int, slow: int) -> None:
    """The frequencies between which it ramps may lie outside of those that there are, on either side."""
    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": 7.0, "original_max_position_embeddings": original}
    rope |= {"beta_fast": fast, "beta_slow": slow, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = DeepseekV3Config(rope_parameters=rope, max_position_embeddings=32, qk_rope_head_dim=12)
    args = ModelArgs(max_seq_len=32, original_seq_len=original, use_yarn=True, rope_theta=theta, rope_factor=7.0)
    args = replace(args, beta_fast=fast, beta_slow=slow, qk_rope_head_dim=12)
    ours, theirs = model.rope_frequencies(args), DeepseekV3RotaryEmbedding(config).inv_freq
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_yarn_belongs_to_the_weights() -> None:
    """As in DeepSeek's code, the context decides whether it is used; but once, when a model is made."""
    assert ModelArgs().use_yarn and ModelArgs(max_seq_len=4097).use_yarn
    assert not ModelArgs(max_seq_len=4096).use_yarn and not ModelArgs(max_seq_len=9, original_seq_len=9).use_yarn
    args = small(max_seq_len=64, original_seq_len=16, rope_factor=40.0)
    net, tokens = build(args), random_tokens(1, 12)
    for length in (12, 16, 17, 400):
        other = build(ModelArgs.from_dict(args.to_dict() | {"max_seq_len": length}))
        assert torch.equal(other(tokens), net(tokens))
    plain = small(max_seq_len=16, original_seq_len=16, rope_factor=40.0)
    assert torch.equal(build(plain)(tokens), build(replace(plain, max_seq_len=64))(tokens))
    assert not torch.equal(build(plain)(tokens), net(tokens))


# --- multi-token prediction ------------------------------------------------------------------------------------------


def mtp_layers(net: Transformer, theirs: PreTrainedModel) -> nn.ModuleList:
    """The MTP modules in transformers, with the same weights."""
    first, count = net.args.n_layers, net.args.n_mtp_layers
    layers = nn.ModuleList(
        MtpLayer(theirs.config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, first + k) for k in range(count)
    )
    weights = {name: tensor for name, tensor in net.state_dict().items() if name.startswith("mtp.")}
    layers.load_state_dict({name[4:]: tensor for name, tensor in to_transformers(weights).items()}, strict=True)
    return layers


def run_mtp_layer(layer: nn.Module, theirs: PreTrainedModel, embedded: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """One MTP module of transformers over full sequences."""
    where = torch.arange(h.shape[1])[None]
    mask = torch.full((h.shape[1], h.shape[1]), -math.inf).triu(1)[None, None]
    return layer(embedded, h, theirs.model.rotary_emb(h, where), mask, where, None)


mtp_shapes = oracle_shapes(score_func="sigmoid", gate_bias=True, moe_layer_freq=1, n_mtp_layers=2, mtp_loss_weight=0.7)


@draws
@given(mtp_shapes, st.integers(0, 99))
def test_mtp_module(args: ModelArgs, seed: int) -> None:
    """States of one module: order of the concatenation, norms, block."""
    net = build(args, seed)
    theirs = reference(net, "v3")
    h, embedded = torch.randn(2, 2, 7, args.dim, generator=torch.Generator().manual_seed(seed)).unbind()
    with torch.no_grad():
        for ours, layer in zip(net.mtp, mtp_layers(net, theirs), strict=True):
            states, _ = ours(h, embedded, net.positions(7, None), None)
            assert_near(states, run_mtp_layer(layer, theirs, embedded, h))


@settings(draws, max_examples=30)
@given(mtp_shapes, st.integers(0, 99))
def test_mtp_loss(args: ModelArgs, seed: int) -> None:
    """The total loss and all its gradients: transformers' modules, chained by plain indexing into the full sequence."""
    net, batch, seq_len = build(args, seed), 2, 8
    theirs = reference(net, "v3")
    layers = mtp_layers(net, theirs)
    full = random_tokens(batch, seq_len + 1, seed=seed)
    losses = net.loss(full[:, :-1], full[:, 1:])
    losses.total.backward()

    h = theirs.model(full[:, :-1]).last_hidden_state
    means = []
    for k in range(args.n_mtp_layers + 1):
        seen = range(seq_len - k)  # module k, or the main model for 0, has states where byte i+k+1 exists
        if k:
            embedded = torch.stack(
                [torch.stack([theirs.model.embed_tokens.weight[full[b, i + k]] for i in seen]) for b in range(batch)]
            )
            h = run_mtp_layer(layers[k - 1], theirs, embedded, h[:, : len(seen)])
        log_p = theirs.lm_head(h).log_softmax(-1)
        means.append(-torch.stack([log_p[b, i, full[b, i + k + 1]] for b in range(batch) for i in seen]).mean())
    mtp = sum(means[1:]) / args.n_mtp_layers
    total = means[0] + 0.7 * mtp
    total.backward()

    assert_near(losses.next_byte, means[0], "next byte")
    assert_near(losses.mtp, mtp, "mtp")
    assert_near(losses.total, total, "total")
    wanted = gradients(theirs) | {f"mtp.{name}": grad for name, grad in gradients(layers).items()}
    assert_near_grads(to_transformers(gradients(net)), wanted)


# --- caches and implementations of attention -------------------------------------------------------------------------


@draws
@given(shapes(), st.data())
@torch.no_grad()
def test_naive_absorb_and_caches_agree(args: ModelArgs, data: st.DataObject) -> None:
    """The oracle is the uncached forward pass, which the tests above compare with transformers."""
    net, seq_len = build(args, 1), 12
    tokens = random_tokens(2, seq_len, seed=2)
    expected = net(tokens)
    cuts = data.draw(st.sets(st.integers(1, seq_len - 1)))
    for impl in ("naive", "absorb", "decoder"):
        with attention(impl, net):
            assert_near(net(tokens), expected, f"{impl} uncached")
            cache = net.new_cache(2, data.draw(st.integers(seq_len, 20)))
            chunks = [tokens[:, a:b] for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), seq_len], strict=True)]
            cached = torch.cat([net(chunk, cache) for chunk in chunks], dim=1)
            assert_near(cached, expected, f"{impl} cached, cut at {sorted(cuts)}")
            assert cache.lengths == [seq_len, seq_len]


@draws
@given(shapes(), st.data())
@torch.no_grad()
def test_rows_of_different_lengths(args: ModelArgs, data: st.DataObject) -> None:
    """Padded prompts, then more of each row, again of different lengths: as each row alone without a cache."""
    net, rows = build(args, 1), 3
    steps = data.draw(st.lists(st.lists(st.integers(1, 5), min_size=rows, max_size=rows), min_size=2, max_size=4))
    totals = [sum(step[row] for step in steps) for row in range(rows)]
    texts = [random_tokens(1, total, seed=row) for row, total in enumerate(totals)]
    expected = [net(text)[0] for text in texts]
    for impl in ("naive", "absorb", "decoder"):
        with attention(impl, net):
            cache, done = net.new_cache(rows, 25), [0] * rows
            for step in steps:
                chunk = random_tokens(rows, max(step), seed=9)  # the padding is noise
                for row, n in enumerate(step):
                    chunk[row, :n] = texts[row][0, done[row] : done[row] + n]
                logits = net(chunk, cache)
                for row, n in enumerate(step):
                    assert_near(logits[row, :n], expected[row][done[row] : done[row] + n], f"{impl}, row {row}")
                    done[row] += n
                    cache.lengths[row] = done[row]


@draws
@given(shapes(n_mtp_layers=2), st.sampled_from(["naive", "absorb", "decoder"]), st.integers(1, 9))
@torch.no_grad()
def test_mtp_modules_with_a_cache(args: ModelArgs, impl: str, cut: int) -> None:
    """The modules' layers have their own place in the cache."""
    net, tokens = build(args, 1), random_tokens(2, 11)
    h, _ = net.forward_hidden(tokens[:, :10])
    expected = h
    for module in net.mtp:
        expected, _ = module(expected, net.embed(tokens[:, 1:]), net.positions(10, None), None)
    with attention(impl, net):
        cache, chunks = net.new_cache(2, 10), []
        for start, end in ((0, cut), (cut, 10)):
            states, _ = net.forward_with_hidden(tokens[:, start:end], cache)
            for depth in range(len(net.mtp)):
                states, _ = net.mtp_forward(depth, states, tokens[:, start + 1 : end + 1], cache)
            chunks.append(states)
            cache.lengths = [end, end]
    # two blocks more than logits have gone through, and as many norms of few numbers, which enlarge rounding
    assert_near(torch.cat(chunks, dim=1), expected, tolerance=3 * TOLERANCE)


@draws
@given(shapes(), st.integers(1, 3), st.integers(1, 9))
def test_cache_size(args: ModelArgs, rows: int, capacity: int) -> None:
    """Under "absorb" no more than the latent and the rotary key (V2 report, section 2.1.4)."""
    net = build(args)
    latent = args.kv_lora_rank + args.qk_rope_head_dim
    plain = args.n_heads * (args.qk_nope_head_dim + args.qk_rope_head_dim + args.v_head_dim)
    for impl in ("naive", "absorb"):
        with attention(impl):
            cache = net.new_cache(rows, capacity)
        width = latent if impl == "absorb" and args.kv_lora_rank else plain
        assert len(cache.layers) == args.n_layers + args.n_mtp_layers
        for tensors in cache.layers:
            assert {t.shape[:2] for t in tensors} == {(rows, capacity)}
            assert sum(t[0, 0].numel() for t in tensors) == width
            if impl == "absorb" and args.kv_lora_rank:
                assert len(tensors) == 1
    counted = (latent if args.kv_lora_rank else plain, plain)
    assert args.cache_numbers_per_position() == tuple(args.n_layers * n for n in counted)


@torch.no_grad()
@pytest.mark.parametrize("impl", ["naive", "absorb"])
def test_overflow(impl: str) -> None:
    net = build(small(max_seq_len=10))
    with attention(impl):
        assert net(random_tokens(1, 10)).shape == (1, 10, VOCAB)
        with pytest.raises(ValueError, match="max_seq_len = 10"):
            net(random_tokens(1, 11))
        for capacity, message in ((6, "cache holds 6"), (20, "max_seq_len = 10")):
            cache, room = net.new_cache(2, capacity), min(capacity, 10)
            net(random_tokens(2, room - 2), cache)
            cache.lengths[0] = 1  # the longer row counts
            with pytest.raises(ValueError, match=message):
                net(random_tokens(2, 3), cache)
            assert cache.lengths == [1, room - 2]
            net(random_tokens(2, 2), cache)
            assert cache.lengths == [3, room]
            with pytest.raises(ValueError, match=message):
                net(random_tokens(2, 1), cache)


# --- mixture of experts ----------------------------------------------------------------------------------------------

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu2": lambda x: torch.relu(x) ** 2}


def choose(scores: list[float], bias: list[float] | None, args: ModelArgs) -> list[int]:
    """The experts of one position (V3 report, equation 16; group scores as in DeepSeek's inference code)."""
    experts, size = range(len(scores)), len(scores) // args.n_expert_groups
    choice = [scores[e] + (bias[e] if bias else 0.0) for e in experts]
    groups = [choice[g * size : (g + 1) * size] for g in range(args.n_expert_groups)]
    rank = [sum(sorted(group)[-2:]) if bias else max(group) for group in groups]
    open_groups = sorted(range(args.n_expert_groups), key=lambda g: -rank[g])[: args.n_limited_groups]
    allowed = [e for e in experts if e // size in open_groups]
    return sorted(allowed, key=lambda e: -choice[e])[: args.n_activated_experts]


def moe_by_hand(moe: nn.Module, x: torch.Tensor, args: ModelArgs) -> tuple[torch.Tensor, list[int]]:
    """The layer in float64, one position and one expert at a time, and how often each was visited."""
    p = dict(moe.named_parameters())
    bias = None if moe.gate.bias is None else moe.gate.bias.tolist()
    act, rows, load = ACTIVATIONS[args.hidden_act], [], [0] * args.n_routed_experts
    for row in x.flatten(0, 1):
        logits = p["gate.weight"] @ row
        softmax = args.score_func == "softmax"
        scores = logits.exp() / logits.exp().sum() if softmax else 1 / (1 + (-logits).exp())
        chosen = choose(scores.tolist(), bias, args)
        total = 1.0 if softmax else sum(scores[e] for e in chosen)
        y = torch.zeros_like(row)
        for e in chosen:
            load[e] += 1
            hidden = act(p["experts.w1.weight"][e] @ row) * (p["experts.w3.weight"][e] @ row)
            y = y + args.route_scale * scores[e] / total * (p["experts.w2.weight"][e] @ hidden)
        if args.n_shared_experts:
            hidden = act(p["shared_experts.w1.weight"] @ row) * (p["shared_experts.w3.weight"] @ row)
            y = y + p["shared_experts.w2.weight"] @ hidden
        rows.append(y)
    return torch.stack(rows).view_as(x), load


def compare_moe_with_hand(args: ModelArgs, moe: nn.Module, x: torch.Tensor) -> list[int]:
    """SafetensorsWriter and all gradients of an MoE layer against the loop; returns the load."""
    by_hand = model.MoE(args).double()
    by_hand.load_state_dict(moe.state_dict())
    x64 = x.detach().double().requires_grad_()
    x = x.detach().clone().requires_grad_()
    y, routing = moe(x)
    expected, load = moe_by_hand(by_hand, x64, args)
    assert_near(y, expected, "output")
    assert routing.load.tolist() == load
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    y.backward(upstream)
    expected.backward(upstream.double())
    assert_near(x.grad, x64.grad, "x")
    assert_near_grads(gradients(moe), gradients(by_hand))
    assert moe.gate.bias is None or not moe.gate.bias.requires_grad
    for name in ("w1", "w2", "w3"):
        grad = getattr(moe.experts, name).weight.grad
        idle = [e for e, n in enumerate(load) if not n]
        assert torch.equal(grad[idle], torch.zeros_like(grad[idle]))
    return load


def an_moe(args: ModelArgs, seed: int) -> model.MoE:
    return (
        build(ModelArgs(**(args.to_dict() | {"n_layers": 1, "n_dense_layers": 0, "n_mtp_layers": 0})), seed)
        .layers[0]
        .ffn
    )


moe_shapes = shapes().filter(lambda args: args.n_routed_experts > 0)


@draws
@given(moe_shapes, st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_moe_by_hand(args: ModelArgs, batch: int, seq_len: int, seed: int) -> None:
    x = torch.randn(batch, seq_len, args.dim, generator=torch.Generator().manual_seed(seed))
    compare_moe_with_hand(args, an_moe(args, seed), x)


@pytest.mark.parametrize("n_shared_experts", [0, 1])
def test_idle_experts_and_all_experts(n_shared_experts: int) -> None:
    """A bias that shuts experts out leaves them without a gradient; with all of them active, none is left out."""
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    args = small(n_shared_experts=n_shared_experts, n_expert_groups=1, n_limited_groups=1, aux_loss_alpha=0.0)
    moe = an_moe(args, 0)
    moe.gate.bias.copy_(torch.tensor([5.0, -5.0, 5.0, -5.0]))
    assert compare_moe_with_hand(args, moe, x) == [10, 0, 10, 0]
    args.n_activated_experts = 4
    assert compare_moe_with_hand(args, an_moe(args, 0), x) == [10, 10, 10, 10]


def test_bias_chooses_but_does_not_weigh() -> None:
    """A bias common to all experts changes neither the choice nor one bit of the weights."""
    args = small()
    gate, x = an_moe(args, 0).gate, torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    weights, indices, scores = gate(x)
    gate.bias += 0.25
    shifted = gate(x)
    assert all(torch.equal(a, b) for a, b in zip((weights, indices, scores), shifted, strict=True))
    torch.testing.assert_close(weights.sum(dim=1), torch.full((9,), 2.5))
    gate.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 9.0]))
    weights, indices, scores = gate(x)
    assert indices.sort(dim=1).values.tolist() == [[1, 3]] * 9
    pair = scores.gather(1, indices)
    torch.testing.assert_close(weights, 2.5 * pair / pair.sum(dim=1, keepdim=True))


sizes = st.lists(st.integers(0, 4), min_size=1, max_size=5)


def grouped_inputs(counts: list[int], n_in: int, n_out: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), n_in, generator=generator, dtype=torch.float64)
    weight = torch.randn(len(counts), n_out, n_in, generator=generator, dtype=torch.float64)
    return x, weight, torch.tensor(counts).cumsum(0).int()


@draws
@given(sizes, st.integers(1, 5), st.integers(1, 5))
def test_grouped_linear(counts: list[int], n_in: int, n_out: int) -> None:
    """Values against one product per row, gradients against finite differences; with groups that are empty."""
    x, weight, offsets = grouped_inputs(counts, n_in, n_out)
    group = [g for g, n in enumerate(counts) for _ in range(n)]
    expected = torch.einsum("ni,noi->no", x, weight[group])
    torch.testing.assert_close(linear(x, weight, offsets), expected)
    x.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w: linear(a, w, offsets), (x, weight))
    linear(x, weight, offsets).sum().backward()
    empty = [g for g, n in enumerate(counts) if not n]
    assert torch.equal(weight.grad[empty], torch.zeros(len(empty), n_out, n_in, dtype=torch.float64))


@draws
@given(st.lists(st.integers(0, 150), min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 40))
def test_grouped_linear_in_bfloat16(counts: list[int], n_in: int, n_out: int) -> None:
    """Groups padded to one size, or where that is wasteful not: values and gradients of one product per row."""
    x, weight, offsets = (t.bfloat16() if t.is_floating_point() else t for t in grouped_inputs(counts, n_in, n_out))
    group = [g for g, n in enumerate(counts) for _ in range(n)]
    ours, exact = [[t.detach().to(d).requires_grad_() for t in (x, weight)] for d in (torch.bfloat16, torch.float64)]
    y, expected = linear(*ours, offsets), torch.einsum("ni,noi->no", exact[0], exact[1][group])
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    results = [y, *torch.autograd.grad(y, ours, grad)]
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for name, ours, exact, terms in zip(("y", "dx", "dw"), results, wanted, (n_in, n_out, max(counts)), strict=True):
        # summed in float32 and rounded once; terms are below 20 in magnitude
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=20 * (terms + 1) * 2**-22, msg=name)


@draws
@given(st.integers(1, 3), st.integers(2, 600), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40))
def test_blockwise_attention(bsz: int, seqlen: int, heads: int, d: int, d_v: int) -> None:
    """Values and gradients against torch's attention in float64, as near as bfloat16 scores of order 1 let them be."""
    generator = torch.Generator().manual_seed(seqlen)
    q, k, v, grad = (torch.randn(bsz, seqlen, heads, n, generator=generator).bfloat16() for n in (d, d, d_v, d_v))
    ours, exact = [[t.detach().to(dtype).requires_grad_() for t in (q, k, v)] for dtype in (q.dtype, torch.float64)]
    scale = d**-0.5
    out = fp8_ops.blockwise_attention(*ours, scale)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in exact), is_causal=True, scale=scale)
    expected = expected.transpose(1, 2)
    pairs = zip(
        [out, *torch.autograd.grad(out, ours, grad)],
        [expected, *torch.autograd.grad(expected, exact, grad.double())],
        strict=True,
    )
    for mine, theirs in pairs:
        assert mine.dtype == torch.bfloat16
        error = (mine.double() - theirs).square().mean().sqrt() / theirs.square().mean().sqrt().clamp(min=0.5)
        assert error < 2**-5


@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0], [5]])
def test_grouped_operators_are_well_formed(counts: list[int]) -> None:
    """torch's own check: declared shapes and strides, no hidden mutation, gradients when traced."""
    x, weight, offsets = grouped_inputs(counts, 3, 5)
    x, weight = x.requires_grad_(), weight.transpose(1, 2).requires_grad_()
    torch.library.opcheck(torch.ops.bytegpt.grouped_mm.default, (x, weight, offsets))
    grad = torch.randn(sum(counts), 5, dtype=torch.float64)
    torch.library.opcheck(torch.ops.bytegpt.grouped_outer.default, (x.detach(), grad, offsets))


def test_master_weights_keep_their_precision() -> None:
    """Products are in the dtype of the activations, gradients in that of the weights."""
    x, weight, offsets = grouped_inputs([2, 0, 3], 3, 5)
    for product in (lambda a, w: linear(a, w, offsets), lambda a, w: linear(a, w[0])):
        w = weight.float().requires_grad_()
        y = product(x.bfloat16(), w)
        torch.testing.assert_close(y, product(x.bfloat16(), w.bfloat16()), rtol=0, atol=0)
        y.sum().backward()
        assert (y.dtype, w.grad.dtype) == (torch.bfloat16, torch.float32)


@draws
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_permute(rows: int, k: int, width: int, seed: int) -> None:
    """Values against indexing, gradients against finite differences."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(rows * k, generator=generator)
    places = order.argsort().view(rows, k)
    assert torch.equal(fp8_ops._Permute.apply(x, order, places), x.repeat_interleave(k, dim=0)[order])
    assert torch.autograd.gradcheck(lambda a: fp8_ops._Permute.apply(a, order, places), (x,))


# --- losses and balance ----------------------------------------------------------------------------------------------


def balance_by_hand(scores: list[list[list[float]]], chosen: list[list[list[int]]]) -> float:
    """Equations 17 to 20 of the V3 report without alpha: scores [B][T][E] and chosen experts [B][T][K] of one layer."""
    total = 0.0
    for sequence, choices in zip(scores, chosen, strict=True):
        t_count, e_count, k = len(sequence), len(sequence[0]), len(choices[0])
        for i in range(e_count):
            f_i = e_count / (k * t_count) * sum(1 for t in range(t_count) if i in choices[t])
            p_i = 1 / t_count * sum(sequence[t][i] / sum(sequence[t]) for t in range(t_count))
            total += f_i * p_i
    return total / len(scores)


@draws
@given(moe_shapes, st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_sequence_balance_loss(args: ModelArgs, batch: int, seq_len: int, seed: int) -> None:
    gate = an_moe(args, seed).gate
    x = torch.randn(batch * seq_len, args.dim, generator=torch.Generator().manual_seed(seed))
    _, indices, scores = gate(x)
    loss = model.sequence_balance_loss(scores, indices, batch)
    nested = [t.unflatten(0, (batch, seq_len)).tolist() for t in (scores, indices)]
    assert loss.item() == pytest.approx(balance_by_hand(*nested), rel=1e-5)
    # the choice is a constant, the scores are not
    loss.backward()
    assert gate.weight.grad.isfinite().all()


def test_balanced_experts_cost_one() -> None:
    scores, indices = torch.full((8, 4), 0.3), torch.tensor([[0, 1], [2, 3]] * 4)
    assert model.sequence_balance_loss(scores, indices, 2).item() == pytest.approx(1.0)


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_loss_is_the_sum_of_its_parts(score_func: str) -> None:
    """Balance and load from the recorded outputs of each router, in the order of `gates`, MTP modules last."""
    net = build(small(score_func=score_func, mtp_loss_weight=0.7, aux_loss_alpha=0.05, moe_layer_freq=2))
    seen: dict[nn.Module, tuple[torch.Tensor, ...]] = {}
    for gate in net.gates():
        gate.register_forward_hook(lambda gate, _, out: seen.__setitem__(gate, out))
    full = random_tokens(3, 11)
    losses = net.loss(full[:, :-1], full[:, 1:])
    assert [gate for gate in net.gates()] == [net.layers[1].ffn.gate, net.mtp[0].block.ffn.gate]
    assert set(seen) == set(net.gates())

    balance = 0.0
    for gate, load in zip(net.gates(), losses.load, strict=True):
        _, indices, scores = seen[gate]
        balance += 0.05 * balance_by_hand(*(t.unflatten(0, (3, -1)).tolist() for t in (scores, indices)))
        assert load.tolist() == [(indices == e).sum().item() for e in range(4)]
    assert losses.load.sum(dim=1).tolist() == [3 * 10 * 2, 3 * 9 * 2]  # MTP module 1 has one position fewer
    assert losses.balance.item() == pytest.approx(balance, rel=1e-5)
    total = losses.next_byte + 0.7 * losses.mtp + losses.balance
    torch.testing.assert_close(losses.total.detach(), total)
    expected = F.cross_entropy(net(full[:, :-1]).flatten(0, 1), full[:, 1:].flatten())
    torch.testing.assert_close(losses.next_byte, expected.detach())
    assert torch.equal(net.next_byte_loss(full[:, :-1], full[:, 1:]), losses.next_byte)
    assert not any(term.requires_grad for term in losses[1:])

    net.eval()
    quiet = net.loss(full[:, :-1], full[:, 1:])
    assert quiet.balance.item() == 0
    torch.testing.assert_close(quiet.total.detach(), (losses.next_byte + 0.7 * losses.mtp).detach())


def test_dense_model_has_no_load() -> None:
    losses = build(small(n_routed_experts=0, n_mtp_layers=0)).loss(random_tokens(2, 5), random_tokens(2, 5, seed=1))
    assert torch.equal(losses.total, losses.next_byte)
    assert (losses.mtp.item(), losses.balance.item(), losses.load.shape) == (0, 0, (0, 0))


# --- training: checkpointing, compilation, precision, gradient flow --------------------------------------------------


def loss_and_grads(net: Transformer, loss: Any = None) -> tuple[model.Losses, dict[str, torch.Tensor]]:
    full = random_tokens(2, 17, seed=3)
    net.zero_grad()
    losses = (loss or net.loss)(full[:, :-1], full[:, 1:])
    losses.total.backward()
    assert all(p.grad is not None for p in net.parameters())
    return losses, {name: grad.clone() for name, grad in gradients(net).items()}


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_nothing(compute_dtype: torch.dtype) -> None:
    net = build(small(), compute_dtype=compute_dtype)
    plain, grads = loss_and_grads(net)
    calls: list[nn.Module] = []
    for block in [*net.layers, *net.mtp]:
        block.register_forward_pre_hook(lambda block, _: calls.append(block))
    net.gradient_checkpointing = True
    checkpointed, recomputed = loss_and_grads(net)
    assert len(calls) == 2 * (3 + 2)  # each block ran again in the backward pass
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)
    for name in grads:
        assert torch.equal(grads[name], recomputed[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("compute_dtype", "impl"), [(torch.float32, "absorb"), (torch.bfloat16, "naive")])
def test_compiles_as_one_graph(compute_dtype: torch.dtype, impl: str) -> None:
    """`fullgraph` raises at a graph break; traced and run by the same kernels, the numbers are eager's."""
    net = build(small(n_layers=2, n_mtp_layers=1), compute_dtype=compute_dtype)
    with attention(impl):
        plain, grads = loss_and_grads(net)
        torch._dynamo.reset()
        compiled, traced = loss_and_grads(net, torch.compile(net.loss, fullgraph=True, backend="aot_eager"))
    # in bfloat16 the traced graph may keep an intermediate in float32 that eager rounds
    tolerance = 1e-5 if compute_dtype == torch.float32 else 2**-7
    for a, b in zip(plain, compiled, strict=True):
        assert_near(b.float(), a.float(), tolerance=tolerance)
    for name in grads:
        assert_within(traced[name], grads[name], name, tolerance * max(largest(grads[name]), 1e-2))


def test_bfloat16_compute() -> None:
    """Weights, gradients, router and logits stay in float32; logits are those of float32 up to bfloat16's rounding.

    All experts are active, so that rounding cannot switch between them. bfloat16 rounds by up to 2^-9 of a value, and
    a logit of order 1 has gone through some dozens of roundings that add up like a random walk: about 2^-6 typically.
    """
    args = small(n_activated_experts=4, n_mtp_layers=1)
    exact, net = build(args), build(args, compute_dtype=torch.bfloat16)
    tokens, seen = random_tokens(4, 16), []
    for gate in net.gates():
        gate.register_forward_hook(lambda gate, inputs, out: seen.append((inputs[0].dtype, out[0].dtype, out[2].dtype)))
    logits, expected = net(tokens), exact(tokens)
    assert logits.dtype == torch.float32
    assert seen == 2 * [(torch.bfloat16, torch.float32, torch.float32)]
    error = (logits - expected).square().mean().sqrt().item() / expected.square().mean().sqrt().item()
    assert 1e-4 < error < 2**-5
    losses, grads = loss_and_grads(net)
    assert all(term.dtype == torch.float32 for term in losses)
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())
    assert losses.total.item() == pytest.approx(loss_and_grads(exact)[0].total.item(), rel=0.02)


def test_router_is_exact_in_bfloat16() -> None:
    """Scores of bfloat16 inputs against float64: far closer than a product rounded to bfloat16 could be."""
    gate = an_moe(small(), 0).gate
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    scores = gate(x)[2]
    torch.testing.assert_close(scores.double(), (x.double() @ gate.weight.double().T).sigmoid(), rtol=1e-6, atol=1e-6)


@draws
@given(shapes(aux_loss_alpha=0.01), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_parameter_gets_a_finite_gradient(args: ModelArgs, compute_dtype: torch.dtype) -> None:
    _, grads = loss_and_grads(build(args, compute_dtype=compute_dtype))
    for name, grad in grads.items():
        assert grad.isfinite().all(), name


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_gradient_flow_from_initial_weights(score_func: str) -> None:
    """Zeros at the start block all but the head; from the third step on everything learns."""
    net = Transformer(small(score_func=score_func, aux_loss_alpha=0.0))
    net.init_weights(0)
    losses, grads = loss_and_grads(net)
    uniform = math.log(VOCAB)
    assert (losses.next_byte.item(), losses.mtp.item()) == pytest.approx((uniform, uniform))
    assert {name for name, grad in grads.items() if grad.count_nonzero()} == {"head.weight"}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.step()
        losses, grads = loss_and_grads(net)
    assert losses.next_byte.item() < uniform
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
        assert grad.count_nonzero() > 0.5 * grad.numel() or name == "embed.weight", name


def test_init_weights() -> None:
    """The same for the same seed, whatever came before; another for another; scaled as documented."""
    args = small(dim=64, inter_dim=128, q_lora_rank=48)
    first, again, other = (Transformer(args) for _ in range(3))
    for net in (again, other):
        with torch.no_grad():
            for tensor in net.state_dict().values():
                tensor.fill_(7)
    torch.manual_seed(1)
    first.init_weights(3)
    torch.manual_seed(2)
    again.init_weights(3)
    other.init_weights(4)
    equal = [name for name, t in first.state_dict().items() if torch.equal(t, other.state_dict()[name])]
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in first.state_dict().items())
    drawn: dict[str, torch.Tensor] = {}
    for name, p in first.named_parameters():
        if p.ndim == 1:
            assert (p == 1).all()
        elif re.search(r"(wo|head)\.weight$|w2(\.weight)?$", name):
            assert (p == 0).all(), name
        else:
            drawn[name] = p.detach()
            std = 0.3 if name == "embed.weight" else p.shape[-1] ** -0.5
            assert p.std().item() == pytest.approx(std, rel=5 * p.numel() ** -0.5), name
    assert not drawn.keys() & set(equal)
    assert all((gate.bias == 0).all() for gate in first.gates())
    flat = [t.flatten()[:64] for t in drawn.values()]
    assert len({tuple((t / t.norm()).tolist()) for t in flat}) == len(flat)  # no two parameters share their noise


def test_a_model_has_weights_from_the_start() -> None:
    """Without `init_weights` being called; not with init=False, nor on the meta device."""
    first, again = Transformer(small()), Transformer(small())
    again.init_weights(0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert first(random_tokens(1, 5)).isfinite().all()
    with torch.device("meta"):
        assert Transformer(small()).head.weight.is_meta


def test_loading_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transformer, "init_weights", lambda *_: pytest.fail("drew weights"))
    Transformer(small(), init=False)
    Transformer(small(), fp8_weights=True)


def test_print_shows_sizes() -> None:
    text = str(Transformer(small(dim=64, inter_dim=136, moe_inter_dim=24, n_routed_experts=6)))
    for line in ("Embedding(23, 64)", "Linear(136 × 64)", "Linear(6 × 24 × 64)", "RMSNorm(64, eps=1e-06)"):
        assert line in text
    assert "Gate(64 -> 2 of 6, from 2 of 2 groups)" in text


@torch.no_grad()
def test_tokens_of_one_sequence() -> None:
    net = build(small(vocab_size=256))
    text = b"to be, \x00\xff"
    expected = net(torch.tensor([list(text)]))
    for tokens in (text, bytearray(text), torch.tensor(list(text)), torch.tensor(list(text), dtype=torch.uint8)):
        assert torch.equal(net(tokens), expected[0])
    cache = net.new_cache(1, 16)
    assert torch.cat([net(text[:4], cache), net(text[4:], cache)]).shape == (len(text), 256)
    assert cache.lengths == [len(text)]


@pytest.mark.parametrize(
    "tokens", [torch.zeros(1, 2, 3, dtype=torch.int64), torch.tensor(3), torch.rand(2, 5), "text", [1, 2], b"", None]
)
def test_invalid_tokens(tokens: Any) -> None:
    with pytest.raises(ValueError, match=r"tokens must be bytes, or integers .*, got \S+"):
        build(small())(tokens)


@torch.no_grad()
def test_rope_tables_are_as_long_as_the_positions_used() -> None:
    """A context of 20 million positions takes no memory before it is used; grown tables give the same bits."""
    net, short = build(small(max_seq_len=20_000_000, rope_factor=1.0)), build(small())
    tokens = random_tokens(1, 1500)
    with torch.inference_mode():
        net(tokens[:, :9])
    decode.CDecoder(net)
    assert len(net._rope_cos) <= 1024
    net(tokens)
    assert 1500 <= len(net._rope_cos) <= 3000
    for grown, full in zip(net.rope_tables(1), (net.rope_tables(3000)), strict=True):
        assert torch.equal(grown, full[: len(grown)])
    assert [table.shape for table in short.rope_tables(64)] == 2 * [(64, 1, 4)]
    with torch.enable_grad():
        net.loss(tokens[:, :-1], tokens[:, 1:]).total.backward()


# --- configurations --------------------------------------------------------------------------------------------------

LITE = {  # DeepSeek's configs/config_16B.json
    "vocab_size": 102400,
    "dim": 2048,
    "inter_dim": 10944,
    "moe_inter_dim": 1408,
    "n_layers": 27,
    "n_dense_layers": 1,
    "n_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "n_activated_experts": 6,
    "route_scale": 1.0,
    "q_lora_rank": 0,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "mscale": 0.707,
}
V3 = {  # DeepSeek's configs/config_671B.json
    "vocab_size": 129280,
    "dim": 7168,
    "inter_dim": 18432,
    "moe_inter_dim": 2048,
    "n_layers": 61,
    "n_dense_layers": 3,
    "n_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_activated_experts": 8,
    "n_expert_groups": 8,
    "n_limited_groups": 4,
    "route_scale": 2.5,
    "score_func": "sigmoid",
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "dtype": "fp8",
}


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [pytest.param(LITE, 15.7e9, 2.4e9, id="16B"), pytest.param(V3, 671.0e9, 37e9, id="671B")],
)
def test_published_sizes(config: dict[str, Any], total: float, active: float) -> None:
    """Sizes as published, 15.7B with 2.4B active and 671B with 37B: the latter are of two digits."""
    args = ModelArgs.from_dict(config)
    assert all(getattr(args, key) == value for key, value in config.items())
    with torch.device("meta"):
        net = Transformer(args)
    counted, visited = net.n_params()
    assert counted == pytest.approx(total, rel=0.001)
    assert visited == sum(p.numel() for p in net.parameters()) - sum(
        p.numel() * (args.n_routed_experts - args.n_activated_experts) // args.n_routed_experts
        for name, p in net.named_parameters()
        if ".experts." in name
    )
    assert visited - net.embed.weight.numel() == pytest.approx(active, rel=0.025)  # a position reads one row of it


def test_mtp_module_of_deepseek_v3() -> None:
    """Published: the 685B of the released weights are 671B of the main model and 14B of the MTP module (its own part
    11.5B; the rest are copies of embedding and head)."""
    with torch.device("meta"):
        plain, more = Transformer(ModelArgs(**V3)), Transformer(ModelArgs(**V3, n_mtp_layers=1))
    assert more.n_params()[0] - plain.n_params()[0] == pytest.approx(11.5e9, rel=0.01)


@pytest.mark.parametrize(
    ("freq", "layout"), [(1, "--mmmmm"), (2, "--m-m-m"), (3, "--m--m-")], ids=["every", "second", "third"]
)
def test_is_moe(freq: int, layout: str) -> None:
    args = small(n_layers=5, n_mtp_layers=2, n_dense_layers=2, moe_layer_freq=freq)
    assert "".join("-m"[args.is_moe(i)] for i in range(7)) == layout
    net = build(args)
    blocks = [*net.layers, *(module.block for module in net.mtp)]
    assert "".join("-m"[isinstance(block.ffn, model.MoE)] for block in blocks) == layout


def test_from_dict_and_back() -> None:
    args = small(gate_bias=None, scale_fmt="ue8m0")
    assert args.gate_bias is True
    assert ModelArgs.from_dict(args.to_dict()) == args
    assert ModelArgs.from_dict({}) == ModelArgs()
    assert ModelArgs().gate_bias is False
    assert isinstance(ModelArgs(rope_theta=100).rope_theta, float)
    assert isinstance(ModelArgs(bias_update_speed=1).bias_update_speed, float)


OF_TYPE = {field.name: field.type for field in fields(ModelArgs)}
WRONG_TYPES = {
    int: [True, "3", None, 1.5, 2.0, [1]],
    float: [False, "1.0", None, math.nan, math.inf, -math.inf, {}],
    float | None: [False, "1.0", math.nan, math.inf, -math.inf, {}],
    str: [1, None, True, ["fp8"], "FP8", ""],
    str | None: [1, False, "e8m0", ""],
    bool | None: [1, 0, "true", 1.0],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, wanted in OF_TYPE.items() for value in WRONG_TYPES[wanted]]
)
def test_wrong_type(key: str, value: Any) -> None:
    """Every key refuses every value that is not of its type, or not one of its choices."""
    with pytest.raises(ConfigError, match=rf"^{key} must be"):
        ModelArgs.from_dict({key: value})


POSITIVE = "max_batch_size max_seq_len vocab_size dim n_layers moe_layer_freq n_heads v_head_dim norm_eps rope_factor"
NOT_NEGATIVE = "inter_dim n_dense_layers n_routed_experts n_shared_experts n_mtp_layers q_lora_rank kv_lora_rank mscale"


@pytest.mark.parametrize(
    ("key", "values"),
    [(key, {key: bad}) for key in [*POSITIVE.split(), "original_seq_len", "beta_fast", "beta_slow"] for bad in (0, -1)]
    + [(key, {key: -1}) for key in [*NOT_NEGATIVE.split(), "qk_nope_head_dim", "qk_rope_head_dim"]]
    + [(key, {key: -0.5}) for key in ("bias_update_speed", "aux_loss_alpha", "mtp_loss_weight")]
    + [
        ("moe_inter_dim", {"moe_inter_dim": 0}),
        ("inter_dim", {"inter_dim": 0}),
        ("inter_dim", {"inter_dim": 0, "n_dense_layers": 0, "moe_layer_freq": 2}),
        ("rope_theta", {"rope_theta": 1.0}),
        ("qk_rope_head_dim", {"qk_rope_head_dim": 7}),
        ("qk_rope_head_dim", {"qk_rope_head_dim": 0, "qk_nope_head_dim": 0}),
        ("n_activated_experts", {"n_activated_experts": 0}),
        ("n_activated_experts", {"n_activated_experts": 65}),
        ("n_activated_experts", {"n_activated_experts": 6, "n_expert_groups": 16, "n_limited_groups": 1}),
        ("n_expert_groups", {"n_expert_groups": 0}),
        ("n_expert_groups", {"n_expert_groups": 7}),
        ("n_expert_groups", {"n_expert_groups": 64, "n_limited_groups": 8, "score_func": "sigmoid"}),
        ("n_limited_groups", {"n_limited_groups": 0}),
        ("n_limited_groups", {"n_limited_groups": 2}),
        ("n_layer", {"n_layer": 3}),
        ("", {"": 3}),
    ],
)
def test_impossible_configuration(key: str, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"\b{key}\b"):
        ModelArgs.from_dict(values)


@pytest.mark.parametrize("key", [key for key, wanted in OF_TYPE.items() if wanted in (int, float)])
def test_numbers_that_no_model_has(key: str) -> None:
    """Refused by name before anything is computed from them, however many digits they have."""
    for value in (1 << 63, 1 << 64, 10**22 + 1, 10**400, 10**5000, -(1 << 64)):
        with pytest.raises(ConfigError, match=rf"^{key} must be .{{,200}}$"):
            ModelArgs.from_dict({key: value})
    if OF_TYPE[key] is float:
        for value in (1.7e308, -1e30):
            with pytest.raises(ConfigError, match=rf"^{key} must be"):
                ModelArgs.from_dict({key: value})


def test_weights_within_the_bounds_can_be_counted() -> None:
    """No product of sizes overflows torch's 63 bits, so that only memory is a limit."""
    high = {key: int(high) for key, (_, high) in model._BOUNDS.items() if OF_TYPE[key] is int}
    high |= {"n_layers": 1, "n_dense_layers": 0, "moe_layer_freq": 1, "n_mtp_layers": 1, "max_seq_len": 1 << 20}
    for dense in (0, 1):
        with torch.device("meta"):
            net = Transformer(ModelArgs.from_dict(high | {"n_dense_layers": dense}))
        assert all(0 < p.numel() * p.itemsize < 1 << 63 for p in net.parameters())


@pytest.mark.parametrize(
    "values",
    [
        {"inter_dim": 0, "n_dense_layers": 0},
        {"n_routed_experts": 0, "n_activated_experts": 0, "moe_inter_dim": 0},
        {"n_expert_groups": 64, "n_limited_groups": 8},
        {"n_activated_experts": 64},
        {"qk_rope_head_dim": 0},
        {"n_dense_layers": 99},
    ],
)
def test_possible_configuration(values: dict[str, Any]) -> None:
    ModelArgs.from_dict(values)


def test_default_positions_are_not_saved() -> None:
    """The state dict holds parameters and router biases alone, so a checkpoint fits any context length."""
    short, long = build(small(max_seq_len=16)), build(small(max_seq_len=32), seed=1)
    long.load_state_dict(short.state_dict(), strict=True)
    tokens = random_tokens(1, 16)
    assert torch.equal(long(tokens), short(tokens))
