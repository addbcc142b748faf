"""Sparse attention: the indexer's choice, its loss and gradients against brute force, training, caches, layouts.

That logits and texts are those of transformers, test_convert_hf.py shows.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, one_line, randomise, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_parallel import CONFIG, RANK_FLAGS, Runs, launch
from test_train import Here, assert_resumes, checkpoint, here, lines, unchanged_process  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import convert
import decode
import fp8_cast_bf16
import fp8_ops
import model as model_module
import plan
import train
from checkpoint import read_config, save_model
from model import MLA, ConfigError, ModelArgs, Positions, Transformer
from parallel import ParallelContext, sharded_dim
from train import main

SPARSE = {"q_lora_rank": 8, "index_n_heads": 4, "index_head_dim": 6, "index_topk": 4}
INDEXER = {"wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight"}


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(seed))


def grads_of(net: Transformer, batch: torch.Tensor, loss: Any = None) -> tuple[Any, dict[str, torch.Tensor]]:
    """The losses of a batch, and the gradients by name."""
    net.zero_grad()
    losses = (loss or net.loss)(batch[:, :-1], batch[:, 1:])
    losses.total.backward()
    return losses, {name: p.grad.clone() for name, p in net.named_parameters()}


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=rtol * tensor.abs().max().item() + 1e-12, msg=name)


# --- Against brute force ----------------------------------------------------------------------------------------------


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def turn(x: torch.Tensor, position: int, theta: float, pairs: list[tuple[int, int]]) -> torch.Tensor:
    """Rotates the numbers at pairs of places of a vector."""
    out = x.clone()
    for i, (a, b) in enumerate(pairs):
        angle = position * theta ** (-i / len(pairs))
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
    return out


def brute_force(attn: MLA, args: ModelArgs, x: torch.Tensor, is_dense: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence (S, dim) and its indexer's loss, position by position and head by head."""
    p, rope, nope = dict(attn.named_parameters()), args.qk_rope_head_dim, args.qk_nope_head_dim
    rms = lambda y, name: y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[name]  # noqa: E731
    neighbours = [(nope + 2 * i, nope + 2 * i + 1) for i in range(rope // 2)]
    halves = [(i, i + rope // 2) for i in range(rope // 2)]
    latent_q, kv = rms(x @ p["wq_a.weight"].T, "q_norm.weight"), x @ p["wkv_a.weight"].T
    latent, k_pe = rms(kv[:, : args.kv_lora_rank], "kv_norm.weight"), kv[:, args.kv_lora_rank :]
    q = (latent_q @ p["wq_b.weight"].T).unflatten(-1, (args.n_heads, nope + rope))
    kv = (latent @ p["wkv_b.weight"].T).unflatten(-1, (args.n_heads, nope + args.v_head_dim))
    alone, alone_q = x.detach(), latent_q.detach()
    index_q = (alone_q @ p["indexer.wq_b.weight"].T).unflatten(-1, (args.index_n_heads, args.index_head_dim))
    index_k = layer_norm(alone @ p["indexer.wk.weight"].T, p["indexer.k_norm.weight"], p["indexer.k_norm.bias"])
    index_w = alone @ p["indexer.weights_proj.weight"].T
    outs, loss = [], x.new_zeros(())
    for s in range(len(x)):
        scores = []
        for t in range(s + 1):
            key, score = turn(index_k[t], t, args.rope_theta, halves), x.new_zeros(())
            for h in range(args.index_n_heads):
                product = turn(index_q[s, h], s, args.rope_theta, halves) @ key
                score = score + index_w[s, h] * product.clamp(min=0)
            scores.append(score * (args.index_head_dim * args.index_n_heads) ** -0.5)
        chosen = sorted(range(s + 1), key=lambda t: -scores[t].item())
        chosen = sorted(chosen if is_dense else chosen[: args.index_topk])
        heads, total = [], x.new_zeros(len(chosen))
        for h in range(args.n_heads):
            query = turn(q[s, h], s, args.rope_theta, neighbours)
            keys = [turn(torch.cat([kv[t, h, :nope], k_pe[t]]), t, args.rope_theta, neighbours) for t in chosen]
            weights = (torch.stack(keys) @ query * (nope + rope) ** -0.5).softmax(-1)
            heads.append(weights @ kv[chosen, h, nope:])
            total = total + weights.detach()
        target = total / args.n_heads
        log_p = torch.stack([scores[t] for t in chosen]).log_softmax(-1)
        loss = loss + (target * (target.log() - log_p)).sum()
        outs.append(torch.cat(heads) @ p["wo.weight"].T)
    return torch.stack(outs), loss / len(x)


@settings(max_examples=12, derandomize=True, database=None)
@given(st.data())
def test_attention_loss_and_gradients_by_brute_force(data: st.DataObject) -> None:
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    sizes = {"dim": draw(8, 13), "n_heads": draw(1, 2, 3), "q_lora_rank": draw(5, 8), "kv_lora_rank": draw(4, 7)}
    sizes |= {"qk_nope_head_dim": draw(0, 3), "qk_rope_head_dim": draw(2, 4), "v_head_dim": draw(2, 5)}
    sizes |= {"index_n_heads": draw(5, 8), "index_head_dim": draw(4, 7), "index_topk": draw(1, 3, 6)}
    args = ModelArgs.from_dict({"max_seq_len": 32, "original_seq_len": 32, "n_routed_experts": 0} | sizes)
    torch.manual_seed(draw(0, 1, 2))
    attn, length, is_dense = MLA(0, args).double(), draw(1, 7, 12), draw(True, False)
    for p in attn.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    x = torch.randn(1, length, args.dim, dtype=torch.float64, requires_grad=True)
    angles = torch.outer(torch.arange(32.0), model_module.rope_frequencies(args)).unsqueeze(1)[:length].double()
    model_module.CHUNK_NUMBERS, before = draw(1, 300, 1 << 26), model_module.CHUNK_NUMBERS
    out, loss = attn(x, Positions(angles.cos(), angles.sin(), dense=is_dense), None)
    probe = torch.randn_like(out)
    inputs = {"x": x} | dict(attn.named_parameters())
    ours = dict(zip(inputs, torch.autograd.grad((out * probe).sum() + loss, inputs.values()), strict=True))
    model_module.CHUNK_NUMBERS = before
    expected, expected_loss = brute_force(attn, args, x[0], is_dense or length <= args.index_topk)
    theirs = torch.autograd.grad((expected * probe[0]).sum() + expected_loss, inputs.values())
    # scores, probabilities, and gathered latents are float32
    torch.testing.assert_close(out[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-4, atol=1e-6)
    assert_close(ours, dict(zip(inputs, theirs, strict=True)), 1e-4)


def test_up_to_topk_positions_attention_is_dense() -> None:
    sparse = tiny(**SPARSE | {"index_topk": 12})
    dense = tiny(q_lora_rank=8)
    dense.load_state_dict(sparse.state_dict(), strict=False)
    for impl in ("naive", "absorb"):
        model_module.attn_impl = impl
        with torch.inference_mode():
            assert torch.equal(sparse(tokens(2, 12)), dense(tokens(2, 12)))
            assert not torch.allclose(sparse(tokens(2, 16))[:, -1], dense(tokens(2, 16))[:, -1], atol=1e-3)
            assert torch.equal(sparse(tokens(2, 16))[:, :12].argmax(-1), dense(tokens(2, 16))[:, :12].argmax(-1))


def test_the_indexer_and_the_model_learn_apart() -> None:
    """The rest has the gradients of the same attention without the indexer's loss; alone, it has the same ones."""
    net, batch = tiny(**SPARSE).train(), tokens(2, 17)
    losses, both = grads_of(net, batch)
    assert losses.indexer > 0
    torch.testing.assert_close(losses.total - losses.indexer, losses.next_byte + 0.3 * losses.mtp + losses.balance)
    net.indexer_only = True
    alone, own = grads_of(net, batch)
    torch.testing.assert_close(alone.total, losses.indexer)
    for name, grad in both.items():
        if ".indexer." in name:
            assert grad.abs().max() > 0 and torch.equal(own[name], grad), name
        else:
            assert own[name].abs().max() == 0, name
    net.indexer_only = False
    for block in [*net.layers, net.mtp[0].block]:
        block.attn.indexer.divergence = lambda attention, scores, hidden: scores.sum() * 0.0
    _, rest = grads_of(net, batch)
    assert_close(both, {name: grad for name, grad in rest.items() if ".indexer." not in name}, 1e-6)


@pytest.mark.parametrize("is_dense", [True, False])
def test_chunks_and_recomputed_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, is_dense: bool) -> None:
    net, batch = tiny(**SPARSE).train(), tokens(2, 17)
    net.dense_attention = is_dense
    losses, expected = grads_of(net, batch)
    for numbers, recomputes in ((1, False), (2000, True)):
        monkeypatch.setattr(model_module, "CHUNK_NUMBERS", numbers)
        net.gradient_checkpointing = recomputes
        again, ours = grads_of(net, batch)
        torch.testing.assert_close(again.total, losses.total, rtol=1e-6, atol=0)
        assert_close(ours, expected)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is computed, in numbers."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("is_dense", [True, False])
def test_no_tensor_grows_with_the_square_of_the_context(monkeypatch: pytest.MonkeyPatch, is_dense: bool) -> None:
    length, chunk = 512, 1 << 15
    monkeypatch.setattr(model_module, "CHUNK_NUMBERS", chunk)
    net = tiny(**SPARSE | {"max_seq_len": length, "n_layers": 1, "index_topk": 16, "v_head_dim": 8}).train()
    net.dense_attention = is_dense
    with Largest() as largest:
        grads_of(net, tokens(1, length + 1))
    assert largest.numbers <= max(chunk, 256 * length) < length * length  # logits are the largest of the rest


def test_rows_of_a_cache_that_differ_in_length() -> None:
    """Each goes on as alone, in calls of one and of several positions, with rows of other lengths beside it."""
    net = tiny(**SPARSE | {"max_seq_len": 40})
    texts = [tokens(1, 40, seed) for seed in range(3)]
    for impl in ("naive", "absorb"):
        model_module.attn_impl = impl
        with torch.inference_mode():
            expected = [net(text)[0] for text in texts]
            cache = net.new_cache(3, 40)
            net(torch.cat([text[:, :20] for text in texts]), cache)
            cache.lengths = [20, 3, 11]
            for width in (1, 5, 1, 7):
                rows = torch.cat([t[:, n : n + width] for t, n in zip(texts, cache.lengths, strict=True)])
                before, logits = cache.lengths, net(rows, cache)
                for row, n, wanted in zip(logits, before, expected, strict=True):
                    torch.testing.assert_close(row, wanted[n : n + width], rtol=0, atol=1e-5)


def test_cache_keeps_one_index_key_more_a_position() -> None:
    args, dense = tiny(**SPARSE).args, tiny(q_lora_rank=8).args
    assert args.cache_numbers_per_position()[0] == dense.cache_numbers_per_position()[0] + 3 * args.index_head_dim
    for impl in ("naive", "absorb"):
        model_module.attn_impl = impl
        cache = tiny(**SPARSE).new_cache(2, 9)
        assert [[tuple(t.shape) for t in layer] for layer in cache.layers] == 4 * [[(2, 9, 12), (2, 9, 6)]]


# --- Configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"q_lora_rank": 0}, ("index_topk", "q_lora_rank")),
        ({"kv_lora_rank": 0}, ("index_topk", "kv_lora_rank")),
        ({"index_head_dim": 3}, ("index_head_dim", "qk_rope_head_dim", 4, 3)),
        ({"index_topk": -1}, ("index_topk", -1)),
        ({"index_n_heads": 0}, ("index_n_heads", 0)),
    ],
)
def test_impossible_indexers(changes: dict[str, Any], names: tuple[object, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(**SPARSE | changes)
    one_line(error, *names)


def test_config_of_deepseek_v3_2(tmp_path: Path) -> None:
    """That of DeepSeek-V3.2-Exp's inference folder, as it is there."""
    config = {"vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61}
    config |= {"n_dense_layers": 3, "n_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1}
    config |= {"n_activated_experts": 8, "n_expert_groups": 8, "n_limited_groups": 4, "route_scale": 2.5}
    config |= {"score_func": "sigmoid", "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
    config |= {"qk_rope_head_dim": 64, "v_head_dim": 128, "dtype": "fp8", "scale_fmt": "ue8m0"}
    config |= {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args, _ = read_config(tmp_path / "config.json")
    assert args.index_topk == 2048
    with torch.device("meta"):
        net = Transformer(ModelArgs.from_dict(args.to_dict() | {"n_layers": 1, "n_dense_layers": 1}), fp8_weights=True)
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in net.layers[0].attn.indexer.state_dict().items()}
    fp8 = {name for name, (_, dtype) in shapes.items() if dtype == fp8_ops.E4M3}
    assert fp8 == {"wq_b.weight", "wk.weight"} and {name for name in shapes if "scale" not in name} == INDEXER
    assert shapes["wq_b.weight"][0] == (64 * 128, 1536) and shapes["weights_proj.weight"][0] == (64, 7168)


def test_long_json_is_what_it_says() -> None:
    args, defaults = read_config(Path(train.__file__).parent / "configs" / "long.json")
    assert args.max_seq_len == 16384 and args.index_topk == 512
    train.config_flags("long.json", defaults)


def test_operations_that_are_counted() -> None:
    """Up to `index_topk` as many as of the dense model, but for the indexer's weights; then less than it."""
    sparse, dense = tiny(**SPARSE | {"n_heads": 8, "max_seq_len": 512}), tiny(q_lora_rank=8, n_heads=8, max_seq_len=512)
    weights = sum(p.numel() for name, p in sparse.named_parameters() if ".indexer." in name)
    assert sparse.flops_per_position(4) == dense.flops_per_position(4) + 6 * weights
    assert sparse.flops_per_position(512) < dense.flops_per_position(512)


@pytest.mark.parametrize("seed", range(6))
def test_c_decodes_what_the_modules_do(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of other lengths, short ones that choose nothing among them; heads that are no multiple of four."""
    monkeypatch.setattr(model_module, "attn_impl", "absorb")
    draw = random.Random(seed).choice
    shape = SPARSE | {"index_n_heads": draw([1, 4, 5, 8]), "index_head_dim": draw([4, 8, 17, 32])}
    net = tiny(seed, **shape | {"index_topk": draw([1, 4, 30, 60]), "max_seq_len": 80, "dim": 32})
    randomise(net, seed)
    assert decode.attach(net) is None and isinstance(net.decoder, decode.CDecoder)
    text, decoder = tokens(3, 80, seed), net.decoder
    with torch.inference_mode():
        caches = [net.new_cache(3, 80) for _ in range(2)]
        for cache in caches:
            net(text[:, :60], cache)
            cache.lengths = [60, 2, 33]
        for width in (1, 5, 1, 2):
            results = []
            for cache, net.decoder in zip(caches, (decoder, None), strict=True):
                rows = torch.cat([row[n : n + width][None] for row, n in zip(text, cache.lengths, strict=True)])
                results.append(net(rows, cache))
            torch.testing.assert_close(*results, rtol=0, atol=2e-5)
    for ours, theirs in zip(*(cache.layers[0] for cache in caches), strict=True):
        torch.testing.assert_close(ours[0, :69], theirs[0, :69], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("threads", "dtype", "heads", "topk"),
    [
        (1, torch.float32, 4, 20),
        (2, torch.bfloat16, 5, 20),
        (3, torch.float32, 1, 20),  # where its weight is negative, many scores of 0 are the best
        (3, torch.bfloat16, 1, 250),  # where it is positive, some scores of 0 are among the best
    ],
)
def test_threads_choose_what_the_modules_do(
    threads: int, dtype: torch.dtype, heads: int, topk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each from more positions than it keeps, then from all threads'; keys are of whole vectors, in either dtype."""
    net = tiny(**SPARSE | {"index_n_heads": heads, "index_head_dim": 32, "index_topk": topk, "max_seq_len": 400})
    randomise(net)
    assert decode.attach(net) is None and isinstance(net.decoder, decode.CDecoder)
    monkeypatch.setattr(model_module, "attn_impl", "absorb")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    net.decoder.n_alone = 0  # however busy the machine is
    monkeypatch.setattr(net.decoder, "_adapt_threads", lambda is_late: None)
    text, decoder, net.cache_dtype = tokens(2, 400), net.decoder, dtype
    with torch.inference_mode():
        cache = net.new_cache(2, 400)
        net(text[:, :380], cache)
        for width in (1, 3):
            results, stored = [], [[tensor.clone() for tensor in layer] for layer in cache.layers]
            for net.decoder in (decoder, None):
                cache.lengths, cache.layers = [380, 371], [[tensor.clone() for tensor in layer] for layer in stored]
                results.append(net(text[:, 380 : 380 + width], cache))
            # a number that is rounded to bfloat16 may differ in its last place
            torch.testing.assert_close(*results, rtol=0, atol=2e-5 if dtype == torch.float32 else 4e-3)


def test_a_score_that_is_no_number_chooses_within_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "attn_impl", "absorb")
    net = tiny(**SPARSE | {"max_seq_len": 64})
    decode.attach(net)
    with torch.inference_mode():
        cache = net.new_cache(1, 64)
        net(tokens(1, 50), cache)
        for layer in cache.layers:
            layer[1][:, 10:40] = float("nan")
        assert net(tokens(1, 1), cache).shape == (1, 1, 256)


FP8 = {"dim": 128, "q_lora_rank": 128, "kv_lora_rank": 124, "index_head_dim": 128}
FP8 |= {"moe_layer_freq": 1, "index_n_heads": 8, "index_topk": 4}  # no weight with a ragged block after a whole one


def test_fp8_checkpoints_both_ways(tmp_path: Path) -> None:
    """Into transformers' layout and FP8, back, and to BF16: no tensor is lost or left as it was drawn."""
    net = tiny(**FP8)
    save_model(net, tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "hf", is_hf=True, dtype="fp8")
    (stored,) = (tmp_path / "hf").glob("*.safetensors")
    scaled = {n.removesuffix("_scale_inv") for n in load_file(stored) if ".indexer." in n and n.endswith("scale_inv")}
    assert scaled == {f"model.layers.{i}.self_attn.indexer.{n}.weight" for i in range(4) for n in ("wq_b", "wk")}
    convert.convert(tmp_path / "hf", tmp_path / "b", 2)
    kept, dense = (convert.load_model(tmp_path / "b", keep_fp8=keep) for keep in (True, False))
    assert kept.layers[0].attn.indexer.wk.weight.dtype == fp8_ops.E4M3
    with torch.inference_mode():
        torch.testing.assert_close(kept(tokens(2, 12)), dense(tokens(2, 12)), rtol=0, atol=1e-4)
    flags = ["--input-fp8-hf-path", str(tmp_path / "hf"), "--output-bf16-hf-path", str(tmp_path / "bf16")]
    assert fp8_cast_bf16.main(flags) == 0
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "bf16", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(".layers.3." in name for name in info["unexpected_keys"])  # the MTP module
    cast = convert.load_model(tmp_path / "bf16")
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(cast.state_dict()[name], tensor, rtol=2**-8, atol=0, msg=name)
    with torch.inference_mode():
        expected = cast(tokens(2, 12))
        torch.testing.assert_close(theirs(tokens(2, 12)).logits, expected, rtol=0, atol=1e-5 * expected.abs().max())


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sparse(here: Here) -> Here:  # noqa: F811
    here.write_config(**SPARSE | {"index_head_dim": 8})
    return here


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model0-mp1.safetensors")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_in_the_first_stage_only_the_indexer_learns(sparse: Here, optimizer: str) -> None:
    """It begins with a dense model, draws indexers, and then changes nothing else, the routing biases included."""
    sparse.write_config(q_lora_rank=8)
    assert main(sparse.flags("--steps", 3)) == 0
    first, sparse.run = checkpoint(sparse.run), sparse.path / "indexed"
    sparse.write_config(**SPARSE | {"index_head_dim": 8})
    flags = ["--steps", 10, "--init-from", first, "--index-warmup", 0.5, "--indexer-only", "--save-interval", 1]
    flags += ["--keep", 20, "--optimizer", optimizer]
    assert main(sparse.flags(*flags)) == 0
    before, steps = weights(first), [weights(sparse.run / f"step-{i:08d}") for i in (1, 5, 6)]
    for name, tensor in before.items():
        assert torch.equal(steps[0][name], tensor) and torch.equal(steps[1][name], tensor), name
    moved = {name for name, tensor in before.items() if not torch.equal(steps[2][name], tensor)}
    assert len(moved) > 0.9 * len(before)
    drawn = steps[0].keys() - before.keys()
    assert len(drawn) == 3 * len(INDEXER) and all(not torch.equal(steps[0][n], steps[1][n]) for n in drawn)
    rows = [row for row in lines(sparse.run) if "train_loss" in row]
    assert all(row["index_loss"] > 0 for row in rows)
    assert [row["matrix_lr"] > 0 for row in rows] == [row["step"] > 5 for row in rows]


def test_warm_up_attends_to_everything(sparse: Here) -> None:
    trainer = sparse.trainer("--index-warmup", 0.5)
    dense = ModelArgs.from_dict(trainer.model.args.to_dict() | {"index_topk": 0})
    net, batch = Transformer(dense).train(), tokens(2, 33)
    trainer.train_step(0.1)
    net.load_state_dict(trainer.model.state_dict(), strict=False)
    ours, theirs = (m.loss(batch[:, :-1], batch[:, 1:]) for m in (trainer.model, net))
    torch.testing.assert_close(ours.next_byte, theirs.next_byte, rtol=1e-6, atol=0)
    assert ours.indexer > 0 == theirs.indexer
    trainer.train_step(0.6)
    net.load_state_dict(trainer.model.state_dict(), strict=False)
    ours, theirs = (m.loss(batch[:, :-1], batch[:, 1:]) for m in (trainer.model, net))
    assert (ours.next_byte - theirs.next_byte).abs() > 1e-6


def test_the_indexer_learns_where_attention_goes(sparse: Here) -> None:
    trainer = sparse.trainer("--index-warmup", 1.0, "--indexer-only", "--matrix-lr", 0.02)
    with torch.no_grad():  # attention that is worth predicting
        for name, p in trainer.model.named_parameters():
            if ".indexer." not in name and p.ndim == 2:
                torch.nn.init.normal_(
                    p, std=2 * p.shape[-1] ** -0.5, generator=torch.Generator().manual_seed(len(name))
                )
    losses = [trainer.train_step(0.5)["index_loss"] for _ in range(60)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize(("optimizer", "gemm_impl"), [("muon", "bf16"), ("adamw", "fp8")])
def test_resume_in_either_stage(sparse: Here, monkeypatch: pytest.MonkeyPatch, optimizer: str, gemm_impl: str) -> None:
    flags = ["--steps", 6, "--save-interval", 1, "--optimizer", optimizer, "--gemm-impl", gemm_impl]
    flags += ["--index-warmup", 0.4, "--indexer-only", "--accumulation", 2, "--gradient-checkpointing"]
    assert_resumes(sparse, monkeypatch, flags, 6, (1, 4))


def test_stages_are_settings_of_a_run(sparse: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(sparse.flags("--steps", 2, "--index-warmup", 0.5)) == 0
    assert main(sparse.flags("--steps", 3, "--resume", "--override", "steps")) == 2
    assert "index_warmup" in capsys.readouterr().err
    assert main(sparse.flags("--steps", 3, "--resume", "--override", "steps,index_warmup")) == 0
    for flags in (["--indexer-only"], ["--index-warmup", 0.5]):
        if flags[0] == "--index-warmup":
            sparse.write_config(q_lora_rank=8)
        with pytest.raises(SystemExit) as error:
            main(sparse.flags("--steps", 2, *flags, save=False))
        assert error.value.code == 2 and "--index-warmup" in capsys.readouterr().err


def test_frozen_indexers_have_nothing_to_warm_up(sparse: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(sparse.flags("--steps", 2, "--index-warmup", 0.5, "--freeze", "*.indexer.*", save=False)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--freeze leaves no indexer" in err


def test_indexers_can_be_left_behind(sparse: Here, capsys: pytest.CaptureFixture[str]) -> None:
    """A dense model can begin with a sparse one's weights; another `index_topk` is free, other indexers are not."""
    assert main(sparse.flags("--steps", 2)) == 0
    first, sparse.run = checkpoint(sparse.run), sparse.path / "next"
    sparse.write_config(**SPARSE | {"index_head_dim": 8, "index_topk": 7})
    assert main(sparse.flags("--steps", 1, "--init-from", first, save=False)) == 0
    sparse.write_config(q_lora_rank=8)
    assert main(sparse.flags("--steps", 1, "--init-from", first, save=False)) == 0
    sparse.write_config(**SPARSE | {"index_head_dim": 16})
    capsys.readouterr()
    assert main(sparse.flags("--steps", 1, "--init-from", first, save=False)) == 2
    assert "index_head_dim = 8" in capsys.readouterr().err
    sparse.write_config(q_lora_rank=8)
    sparse.run = sparse.path / "dense"
    assert main(sparse.flags("--steps", 1)) == 0
    sparse.write_config(**SPARSE | {"index_head_dim": 8})
    flags = ["--eval-only", "--init-from", sparse.run, "--config", sparse.config, "--data", sparse.data]
    assert main([str(flag) for flag in flags]) == 2
    assert "index_topk" in capsys.readouterr().err


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    net, batch = tiny(**SPARSE | {"n_layers": 2, "n_mtp_layers": 0}).train(), tokens(2, 17)
    compiled = torch.compile(net.loss, fullgraph=True, backend="aot_eager")
    for net.dense_attention in (False, True):
        losses, expected = grads_of(net, batch)
        again, ours = grads_of(net, batch, compiled)
        torch.testing.assert_close(again.total, losses.total, rtol=1e-5, atol=0)
        assert_close(ours, expected, 1e-4)
    torch._dynamo.reset()


def test_plan_of_a_layout(sparse: Here, capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters are counted as they are, and what sparse attention keeps for the backward pass is in it."""
    assert main(sparse.flags("--plan", "--world-size", 4, "--model-parallel", 2, "--fsdp", save=False)) == 0
    out = capsys.readouterr().out
    net = Transformer(read_config(sparse.config)[0])
    assert f"{net.n_params()[0]:,} parameters" in out and "activations, all-reduced" in out


def test_a_plan_counts_the_chosen_positions() -> None:
    """Of each layer, what chunks keep to be computed again: the positions and the absorbed queries among them."""
    batch, length, topk = 2, 64, 32
    with torch.device("meta"):
        shape = TINY | SPARSE | {"max_seq_len": length, "n_mtp_layers": 0}
        nets = [Transformer(ModelArgs.from_dict(shape | {"index_topk": k})).train() for k in (topk, topk // 2)]
        saved = [plan.run_once(n, torch.zeros(batch, length, dtype=torch.int64), ParallelContext()) for n in nets]
    assert saved[0] - saved[1] == 3 * 5 * batch * length * topk // 2  # int32, and whether a query sees it


def test_indexers_are_replicated() -> None:
    names = [name for name, _ in tiny(**SPARSE).named_parameters() if ".indexer." in name]
    assert len(names) == 4 * len(INDEXER) and {sharded_dim(name) for name in names} == {None}


# --- Layouts ----------------------------------------------------------------------------------------------------------

PARALLEL = CONFIG | SPARSE | {"q_lora_rank": 16, "index_n_heads": 8, "index_head_dim": 8, "index_topk": 8}


@pytest.mark.slow
def test_processes_train_as_one(tmp_path: Path) -> None:
    """In both stages, in each layout: gradients of one step, and runs, in which rounding chooses other positions."""
    runs = Runs(tmp_path)
    (tmp_path / "sparse.json").write_text(json.dumps(PARALLEL))

    def scenario(layout: str, *flags: object) -> dict[str, Any]:
        return {"flags": runs.flags(layout, *RANK_FLAGS[layout], "--index-warmup", 0.5, *flags, config="sparse")}

    launch(1, [scenario("one")])
    checks = [
        {"call": "check_gradients", "args": {"config": PARALLEL, "mp": mp, "shards": shards, "checkpointing": saves}}
        for mp, shards, saves in ((1, False, True), (1, True, False), (2, False, False), (2, False, True))
    ]
    launch(2, [*checks, scenario("dp2"), scenario("mp2", "--gradient-checkpointing"), scenario("fsdp2")])
    for layout in ("dp2", "mp2", "fsdp2"):
        runs.assert_same(layout, "one", tolerance=0.01)
        ours, theirs = runs.metrics(layout), runs.metrics("one")
        for step, row in theirs.items():
            assert ours[step]["index_loss"] == pytest.approx(row["index_loss"], rel=1e-4 if step <= 6 else 0.05), step
