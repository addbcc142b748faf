"""Kernels of sparse attention: against brute force and autograd in float64, through a model, on no device, compiled.

They run on a GPU where there is one, else in Triton's interpreter.
"""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from conftest import randomise, tiny  # noqa: E402
from test_kernel import DEVICE, compiled_by, compiling, draws, generator, randn, runs, small_and_exact  # noqa: E402, F401
from test_sparse import SPARSE, brute_force, grads_of, tokens  # noqa: E402

import fp8_ops  # noqa: E402
import kernel  # noqa: E402
import kernel_sparse  # noqa: E402
import model as model_module  # noqa: E402
from model import MLA, ModelArgs, Positions  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of the interpreter's numpy
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def on_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def visible_rows(data: st.DataObject, bsz: int, seqlen: int, n_keys: int) -> torch.Tensor:
    """The last positions that queries see: of training, or of rows of a cache that differ in length."""
    last = torch.arange(n_keys - seqlen, n_keys)
    if data.draw(st.booleans()):
        return last.unsqueeze(0)
    return last - torch.randint(n_keys - seqlen + 1, (bsz, 1), generator=generator(seqlen))


@runs
@settings(draws, max_examples=18)
@given(st.data())
def test_choice_by_brute_force(data: st.DataObject) -> None:
    """The best scores, and the last of equal ones; all that a query sees, and none that is not there."""
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    bsz, heads, dim, seqlen = draw(1, 2), draw(1, 3, 4), draw(4, 6, 32), draw(1, 3, 20)
    topk, scores = draw(1, 3, 16), ["normal", "few", "no number"]
    n_keys, kind, dtype = topk + draw(1, 5, 70) + seqlen, draw(*scores), data.draw(dtypes)
    q, k = (randn(bsz, n, *rest, dim, seed=i) for i, (n, *rest) in enumerate([(seqlen, heads), (n_keys + 2,)]))
    w = randn(bsz, seqlen, heads, seed=5)
    if kind == "few":  # equal scores, of which many are 0
        q, k, w = (
            q.sign(),
            k.round().clamp(-1, 1) * (torch.rand(k.shape[:2], generator=generator(3)) < 0.3)[..., None],
            w.round(),
        )
    if kind == "no number":
        k[:, ::3] = float("nan")
    q, k, seen = q.to(dtype), k.to(dtype), visible_rows(data, bsz, seqlen, n_keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_sparse, "SCORES", draw(1, 400, 1 << 20))
        patch.setattr(kernel_sparse, "MAX_WIDTH", draw(0, 1 << 15) if kind == "normal" else 1 << 15)
        rows, values = (x.cpu() for x in kernel_sparse.choose(*on_device(q, k, w), n_keys, seen.to(DEVICE), topk))
    products = torch.einsum("bshd,btd->bsht", q.double(), k.double())
    exact = (w.double().unsqueeze(-2) @ products.relu()).squeeze(-2)
    for b in range(bsz):
        for s in range(seqlen):
            last, found = seen[b % len(seen), s].item(), rows[b, s].tolist()
            assert len(set(found)) == topk and min(found) >= 0 and max(found) < n_keys
            here = [t for t in found if t <= last]
            assert len(here) == min(topk, last + 1)
            if kind != "no number":
                best = sorted(range(last + 1), key=lambda t: (exact[b, s, t].item(), t), reverse=True)[:topk]
                assert sorted(here) == sorted(best)
                wanted = torch.tensor([exact[b, s, t] if t <= last else -math.inf for t in found])
                torch.testing.assert_close(values[b, s], wanted.float(), rtol=1e-4, atol=1e-5)


@runs
def test_as_many_equal_scores_as_a_row_holds() -> None:
    n = kernel_sparse.MAX_WIDTH
    q, k, w = torch.zeros(1, 1, 1, 4), torch.zeros(1, n, 4), torch.full((1, 1, 1), float("nan"))
    rows, _ = kernel_sparse.choose(*on_device(q, k, w), n, torch.full((1, 1), n - 1).to(DEVICE), 5)
    assert rows.flatten().tolist() == list(range(n - 5, n))


def chosen_rows(bsz: int, seqlen: int, n_keys: int, topk: int, seed: int) -> torch.Tensor:
    order = torch.rand(bsz, seqlen, n_keys, generator=generator(seed))
    return order.argsort(dim=-1)[..., :topk].int().contiguous()


def attend_exactly(q: torch.Tensor, latent: torch.Tensor, rows: torch.Tensor, hidden: torch.Tensor, rank: int) -> Any:
    """Outputs and summed probabilities, in float64."""
    keys = latent[torch.arange(len(q))[:, None, None], rows.long()]  # (B, S, K, C + R)
    p = torch.einsum("bshd,bskd->bshk", q, keys).masked_fill(hidden.unsqueeze(2), -math.inf).softmax(-1)
    return torch.einsum("bshk,bskc->bshc", p, keys[..., :rank]), p.sum(2)


def assert_near(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == exact.shape
    error = (ours.detach().cpu().double() - exact.detach()).norm()
    assert error <= {torch.float32: 1e-4, torch.bfloat16: 1.5e-2}[dtype] * (exact.norm() + 1)


@runs
@settings(draws, max_examples=12)
@given(st.data())
def test_attention_and_gradients(data: st.DataObject) -> None:
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    bsz, seqlen, heads, topk = draw(1, 2), draw(1, 5), draw(1, 3, 8, 40), draw(1, 7, 70)
    rank, rope, dtype, n_keys = draw(8, 20, 130), draw(0, 4, 6), data.draw(dtypes), max(topk + draw(0, 9), seqlen)
    rows, seen = chosen_rows(bsz, seqlen, n_keys, topk, 1), visible_rows(data, bsz, seqlen, n_keys)
    seen = torch.maximum(seen, rows.amin(-1))  # a query sees one of them at least, itself
    hidden = rows > seen.unsqueeze(-1)
    inputs = [randn(bsz, seqlen, heads, rank + rope) / 3, randn(bsz, n_keys, rank + rope, seed=3)]
    mine = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]
    exact = [x.detach().cpu().double().requires_grad_() for x in mine]
    out, p = kernel_sparse.attend(*mine, *on_device(rows, seen), rank, True)
    expected, expected_p = attend_exactly(*exact, rows, hidden, rank)
    dout = randn(*out.shape, seed=7).to(dtype)
    out.backward(dout.to(DEVICE))
    expected.backward(dout.double())
    assert_near(out, expected, dtype)
    assert_near(p, expected_p, dtype)
    for ours, theirs in zip(mine, exact, strict=True):
        assert_near(ours.grad, theirs.grad, dtype)


@runs
@settings(draws, max_examples=10)
@given(st.data())
def test_loss_of_an_indexer_and_its_gradients(data: st.DataObject) -> None:
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    bsz, seqlen, heads, dim, topk = draw(1, 2), draw(1, 6), draw(1, 4, 20), draw(6, 32), draw(1, 5, 70)
    dtype, n_keys = data.draw(dtypes), topk + 9
    q, k = randn(bsz, seqlen, heads, dim), randn(bsz, n_keys, dim, seed=1)
    inputs = [q.to(dtype), k.to(dtype), randn(bsz, seqlen, heads, seed=2)]
    mine = [x.to(DEVICE, copy=True).requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    seen = torch.arange(n_keys - seqlen, n_keys).unsqueeze(0)
    rows, scores = kernel_sparse.choose(*mine, n_keys, seen.to(DEVICE), topk)
    p = torch.rand(rows.shape, generator=generator(4))
    p[..., 0] = 0 if topk > 1 else 1
    ours = kernel_sparse.index_loss(*mine, rows, seen.to(DEVICE), p.to(DEVICE), scores)
    keys = exact[1][torch.arange(bsz)[:, None, None], rows.cpu().long()]
    products = torch.einsum("bshd,bskd->bshk", exact[0], keys).relu()
    log_q = torch.einsum("bsh,bshk->bsk", exact[2], products).log_softmax(-1)
    target = p.double() / p.double().sum(-1, keepdim=True)
    theirs = (torch.special.xlogy(target, target) - target * log_q).sum()
    (ours / 3).backward()
    (theirs / 3).backward()
    torch.testing.assert_close(ours.detach().cpu().double(), theirs.detach(), rtol=1e-4, atol=1e-5)
    for x, y in zip(mine, exact, strict=True):
        assert_near(x.grad, y.grad, dtype)


@runs
@settings(draws, max_examples=5)
@given(st.data())
def test_loss_of_an_indexer_under_dense_attention(data: st.DataObject) -> None:
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    bsz, seqlen, heads, dim, index_heads, index_dim = (
        draw(1, 2),
        draw(1, 6, 70),
        draw(1, 3),
        draw(6, 20),
        4,
        draw(6, 17),
    )
    dtype, length = data.draw(dtypes), (bsz, seqlen)
    inputs = [randn(*length, index_heads, index_dim).to(dtype), randn(*length, index_dim, seed=1).to(dtype)]
    inputs += [randn(*length, index_heads, seed=2)]
    mine = [x.to(DEVICE, copy=True).requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    q, k = (randn(*length, heads, dim, seed=i).to(dtype) for i in (3, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_sparse, "SCORES", draw(1, 3000, 1 << 20) if seqlen < 70 else 1 << 13)
        patch.setattr(kernel_sparse, "SPAN", 64)
        ours = kernel_sparse.dense_index_loss(*on_device(q, k), mine, 0.3, lambda p: p)
    hidden = torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)
    s = torch.einsum("bshd,bthd->bhst", q.double(), k.double()) * 0.3
    target = s.masked_fill(hidden, -math.inf).softmax(-1).mean(1)
    products = torch.einsum("bshd,btd->bsht", *exact[:2]).relu()
    scores = torch.einsum("bsh,bsht->bst", exact[2], products)
    log_q = scores.masked_fill(hidden, -1e30).log_softmax(-1)
    theirs = (torch.special.xlogy(target, target) - target * log_q).sum() / (bsz * seqlen)
    (3 * ours).backward()
    (3 * theirs).backward()
    torch.testing.assert_close(ours.detach().cpu().double(), theirs.detach(), rtol=1e-3, atol=1e-5)
    for x, y in zip(mine, exact, strict=True):
        assert_near(x.grad, y.grad, dtype)


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lets the model run these kernels, and no others, wherever it is; yields their calls."""
    calls: list[Any] = []
    attend = kernel_sparse.attend_to_chosen
    monkeypatch.setattr(kernel_sparse, "attend_to_chosen", lambda *args: calls.append(args) or attend(*args))
    monkeypatch.setattr(fp8_ops, "sparse_kernels", lambda x, widest=0: kernel_sparse)
    return calls


@runs
@settings(draws, max_examples=3)
@given(st.data())
def test_a_layer_by_brute_force(data: st.DataObject) -> None:
    """Attention, the indexer's loss and all gradients of a layer, as `test_sparse.py` has them position by position."""
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    sizes = {"dim": 13, "n_heads": draw(1, 3), "q_lora_rank": 5, "kv_lora_rank": draw(4, 7), "index_n_heads": 8}
    sizes |= {"qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 5, "index_head_dim": draw(4, 7)}
    args = ModelArgs.from_dict({"max_seq_len": 32, "n_routed_experts": 0, "index_topk": draw(1, 3, 6)} | sizes)
    torch.manual_seed(draw(0, 1))
    attn = MLA(0, args)
    for p in attn.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    x, probe = torch.randn(1, 12, 13), torch.randn(1, 12, 13)
    angles = torch.outer(torch.arange(12.0), model_module.rope_frequencies(args)).unsqueeze(1)
    results = []
    for dtype in (torch.float32, torch.float64):
        layer = MLA(0, args).to(DEVICE if dtype == torch.float32 else "cpu", dtype)
        layer.load_state_dict(attn.state_dict())
        inputs = [x.to(layer.wo.weight).requires_grad_(), *layer.parameters()]
        if dtype == torch.float64:
            out, loss = brute_force(layer, args, inputs[0][0], False)
            out = out.unsqueeze(0)
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(fp8_ops, "sparse_kernels", lambda x, widest=0: kernel_sparse)
                out, loss = layer(inputs[0], Positions(*(t.to(DEVICE) for t in (angles.cos(), angles.sin()))), None)
        grads = torch.autograd.grad((out * probe.to(out)).sum() + loss, inputs)
        results.append([out, loss, *grads])
    for ours, exact in zip(*results, strict=True):
        error = (ours.detach().cpu().double() - exact.detach()).abs().max()
        assert error <= 1e-4 * exact.abs().max() + 1e-6


@runs
def test_training_and_decoding_are_those_of_torch(by_kernels: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradient checkpointing; and in rows of a cache that differ in length."""
    shape = SPARSE | {"n_layers": 1, "n_mtp_layers": 0, "n_routed_experts": 0}
    net, batch = tiny(**shape).train().to(DEVICE), tokens(2, 13).to(DEVICE)
    net.gradient_checkpointing = True
    stages, ours, theirs = (False, True), [], []
    for net.dense_attention in stages:
        ours.append(grads_of(net, batch))
    assert len(by_kernels) == 2  # again in the backward pass
    with torch.inference_mode():
        results = []
        for module in (kernel_sparse, None):
            monkeypatch.setattr(fp8_ops, "sparse_kernels", lambda x, widest=0, module=module: module)
            cache = net.eval().new_cache(2, 16)
            logits = [net(batch[:, :7], cache)]
            cache.lengths = [7, 3]
            logits += [net(batch[:, n : n + 2], cache) for n in (7, 9)]
            results.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)
    for net.dense_attention in stages:
        theirs.append(grads_of(net.train(), batch))
    for (losses, grads), (again, wanted) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(losses.indexer, again.indexer, rtol=1e-3, atol=0)
        for name, grad in wanted.items():
            assert (grads[name] - grad).abs().max() <= 1e-4 * max(1e-2, grad.abs().max().item()), name


@runs
@pytest.mark.parametrize("lengths", [[30], [30, 2, 17]])
def test_a_decoded_step_is_that_of_the_modules(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In rows that choose, and in those that see all that they could."""
    import decode
    import kernel_decode

    monkeypatch.setattr(fp8_ops, "sparse_kernels", lambda x, widest=0: None)
    monkeypatch.setattr(model_module, "attn_impl", "absorb")
    if DEVICE.type == "cpu":
        monkeypatch.setattr(kernel_decode, "PROGRAMS", 1)
    net = tiny(**SPARSE | {"max_seq_len": 32, "n_layers": 2, "index_n_heads": 3}).requires_grad_(False)
    randomise(net)
    net, results = net.to(DEVICE), []
    text = torch.randint(256, (len(lengths), 1), generator=generator(2)).to(DEVICE)
    with torch.inference_mode():
        for target in (net, decode.KernelDecoder(net)):
            cache = net.new_cache(len(lengths), 32)
            for i, tensor in enumerate(tensor for layer in cache.layers for tensor in layer):
                tensor.copy_(randn(*tensor.shape, seed=i))
            cache.lengths = list(lengths)
            states, logits = target.forward_with_hidden(text, cache)
            drafts = target.mtp_forward(0, states, text, cache)
            results.append([states, logits, *drafts, *(tensor for layer in cache.layers for tensor in layer)])
    for theirs, ours in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm()


def test_which_calls_reach_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on a GPU of compute capability 8.0 or more, or on the meta device that stands for one."""
    x = torch.empty(1, 1, 2, 24, device="meta")
    assert fp8_ops.sparse_kernels(x) is None
    monkeypatch.setattr(fp8_ops, "meta_capability", (9, 0))
    assert fp8_ops.sparse_kernels(x) is kernel_sparse
    assert fp8_ops.sparse_kernels(x.double()) is None
    for width, dtype in ((577, torch.bfloat16), (576, torch.float32), (700, torch.float32)):  # too wide to be shared
        assert fp8_ops.sparse_kernels(torch.empty(1, 1, 2, width, dtype=dtype, device="meta")) is None
    assert fp8_ops.sparse_kernels(torch.empty(1, 1, 2, 576, dtype=torch.bfloat16, device="meta")) is kernel_sparse


def test_tensors_without_memory_have_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a plan computes them: gradients of every parameter, in both stages."""
    monkeypatch.setattr(fp8_ops, "meta_capability", (9, 0))
    monkeypatch.setattr(kernel_sparse, "SCORES", 1 << 12)
    with torch.device("meta"), kernel.no_launches():
        net = model_module.Transformer(tiny(**SPARSE | {"max_seq_len": 256}).args).train()
        for net.dense_attention in (False, True):
            net.loss(*(torch.zeros(1, 256, dtype=torch.int64) for _ in range(2))).total.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())


# --- Compilation, without a GPU ---------------------------------------------------------------------------------------


def compile_all() -> list[dict[str, Any]]:
    """Attends in the shapes of configs/long.json and of DeepSeek-V3.2, with kernels that are only compiled."""

    def describe(ptx: str, _options: dict[str, Any]) -> dict[str, Any]:
        return {"multiplies": "mma" in ptx}

    with compiling(90, describe) as compiled:
        for heads, rank, rope, index_heads, index_dim, topk, dtype in (
            (8, 128, 32, 4, 32, 512, torch.bfloat16),
            (128, 512, 64, 64, 128, 2048, torch.bfloat16),
            (8, 128, 32, 4, 32, 512, torch.float32),
            (16, 256, 32, 16, 128, 512, torch.float32),  # as wide as they take
        ):
            length = 2 * topk
            q, latent = (
                torch.empty(1, length, *n, rank + rope, dtype=dtype, requires_grad=True) for n in ([heads], [])
            )
            index = [
                torch.empty(1, length, *n, index_dim, dtype=dtype, requires_grad=True) for n in ([index_heads], [])
            ]
            weights, seen = torch.empty(1, length, index_heads, requires_grad=True), torch.arange(length).unsqueeze(0)
            indexer = SimpleNamespace(topk=topk, sum_over_ranks=lambda p: p)
            arguments = (q, latent, (*index, weights), length, seen, indexer, rank)
            out, loss = kernel_sparse.attend_to_chosen(*arguments, True)
            (out.float().sum() + loss).backward()
            kernel_sparse.attend_to_chosen(*arguments, False)
            head = torch.empty(1, length, heads, 64 if heads == 8 else 192, dtype=dtype)
            kernel_sparse.dense_index_loss(head, head, (*index, weights), 1.0, lambda p: p).backward()
            args = SimpleNamespace(index_n_heads=index_heads, index_head_dim=index_dim, index_topk=topk)
            args.max_seq_len, args.qk_rope_head_dim = 1 << 14, rope
            numbers, floats = torch.zeros(4, dtype=torch.int64), torch.zeros(4)
            step = {"cos": floats, "sin": floats, "positions": numbers, "rows": numbers, "caches": numbers}
            chooser = kernel_sparse.Chooser(args, 4, 16, numbers.device)
            types = [{torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}[dtype]] * 2
            chooser.launch(SimpleNamespace(**step, capacity=numbers), (floats, floats), 1e-6, 0, types)
    return compiled


@pytest.mark.slow
def test_compiles(tmp_path: Path) -> None:
    """All kernels become machine code for Hopper, with room for what they share, and multiply by tensor cores."""
    compiled = compiled_by(__file__, tmp_path)
    assert {row["kernel"] for row in compiled} == {name for name in vars(kernel_sparse) if name.endswith("_kernel")}
    for row in compiled:
        assert row["cubin"] > 0 and row["shared"] <= 99 * 1024, row  # of an RTX 4090; a Hopper GPU has 227
    assert {row["kernel"] for row in compiled if row["multiplies"]} >= {"_scores_kernel", "_attend_kernel"}


if __name__ == "__main__":
    json.dump(compile_all(), sys.stdout)
