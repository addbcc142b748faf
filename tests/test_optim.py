"""Muon against torch's own and against its formulas in float64; the balance of the experts against plain loops."""

import argparse
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fp8_ops
import parallel
from model import ModelArgs, Transformer
from optim import GateBalance, Muon, TrainingStep, can_replay, freeze, make_optimizers, orthogonalize
from parallel import ParallelContext

SHAPES = [(24, 8), (8, 24), (16, 16), (1, 5), (40, 3)]


def steps_of(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], n_steps: int = 5) -> list[torch.Tensor]:
    """Takes steps with gradients that depend on the parameters' order alone; returns the parameters."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(params))]
    for step in range(n_steps):
        for p, generator in zip(params, generators, strict=True):
            p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** (step - 3)
        optimizer.step()
    return [p.detach() for p in params]


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(9))) for s in shapes]


def exact_muon(p: torch.Tensor, lr: float, momentum: float, weight_decay: float, n_steps: int = 5) -> torch.Tensor:
    """Muon of one matrix from the formulas, in float64."""
    generator, p, buffer = torch.Generator().manual_seed(0), p.detach().double(), 0.0
    for step in range(n_steps):
        grad = (torch.randn(p.shape, generator=generator) * 10.0 ** (step - 3)).double()
        buffer = momentum * buffer + (1 - momentum) * grad
        x = (1 - momentum) * grad + momentum * buffer
        x = x / x.norm()
        for _ in range(5):  # U s V' -> U (a s + b s^3 + c s^5) V'
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        p = p * (1 - lr * weight_decay) - lr * 0.2 * max(p.shape) ** 0.5 * x
    return p


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_is_torchs_in_bfloat16(shape: tuple[int, int]) -> None:
    ours, theirs, before = (parameters([shape]) for _ in range(3))
    settings_ = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    (a,) = steps_of(Muon(ours, dtype=torch.bfloat16, **settings_), ours)
    (b,) = steps_of(torch.optim.Muon(theirs, nesterov=True, adjust_lr_fn="match_rms_adamw", **settings_), theirs)
    # the same products, but fused otherwise: some roundings to 8 bits differ, out of about thirty in a row
    assert (a - b).norm() < 0.02 * (a - before[0]).norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_follows_the_formulas_in_float32(shape: tuple[int, int]) -> None:
    params = parameters([shape])
    expected = exact_muon(params[0], 0.02, 0.9, 0.1)
    (a,) = steps_of(Muon(params, lr=0.02, momentum=0.9, weight_decay=0.1, dtype=torch.float32), params)
    torch.testing.assert_close(a.double(), expected, rtol=0, atol=2e-5)  # where the map of 5 iterations is steep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_takes_a_stack_as_separate_matrices(dtype: torch.dtype) -> None:
    stack = nn.Parameter(torch.randn(3, 2, 6, 10, generator=torch.Generator().manual_seed(0)))
    singles = [nn.Parameter(matrix.clone()) for matrix in stack.detach().flatten(0, 1)]
    a, b = Muon([stack], lr=0.1, weight_decay=0.2, dtype=dtype), Muon(singles, lr=0.1, weight_decay=0.2, dtype=dtype)
    for step in range(4):
        stack.grad = torch.randn(stack.shape, generator=torch.Generator().manual_seed(step))
        for p, grad in zip(singles, stack.grad.flatten(0, 1), strict=True):
            p.grad = grad.clone()
        a.step(), b.step()
    torch.testing.assert_close(stack.flatten(0, 1), torch.stack(singles), rtol=0, atol=1e-6)


def test_muon_batches_shapes_without_mixing_them() -> None:
    shapes = [(6, 10), (4, 4), (6, 10), (10, 6), (2, 6, 10), (4, 4)]
    together, alone = parameters(shapes), parameters(shapes)
    optimizer = Muon(together, lr=0.1, dtype=torch.float32)
    optimizers = [Muon([p], lr=0.1, dtype=torch.float32) for p in alone]
    for step in range(3):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            q.grad = p.grad.clone()
        optimizer.step()
        for single in optimizers:
            single.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    together[0].grad = None
    before = together[0].detach().clone()
    optimizer.step()
    assert torch.equal(together[0], before)  # no gradient, no step, no decay


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32), (7, 9)])
def test_orthogonalize_pushes_singular_values_towards_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1e-4, 1.0, 1e4, 1.0])[:, None, None]  # its size does not matter
    y = orthogonalize(x.to(dtype))
    assert y.dtype == dtype and y.shape == x.shape
    values = torch.linalg.svdvals(y.float())
    # a random square matrix has singular values near 0, which five iterations lift only part of the way
    low = torch.linalg.svdvals(x) / x.norm(dim=(1, 2))[:, None] > 0.01
    assert values.max() < 1.3 and values[low].min() > 0.6
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inside = torch.diagonal(u.mT @ y.float() @ v.mT, dim1=1, dim2=2)
    assert inside[low].min() > 0.55  # the same singular vectors
    assert orthogonalize(torch.zeros(1, 3, 4)).abs().max() == 0


def test_no_kernel_gets_a_tensor_without_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process has of fewer experts than processes, with FSDP: TMA has no descriptor of it."""
    monkeypatch.setattr(fp8_ops, "kernels", lambda x: argparse.Namespace(newton_schulz=lambda *_: pytest.fail()))
    assert orthogonalize(torch.empty(0, 16, 8, dtype=torch.bfloat16)).shape == (0, 16, 8)


# --- On a GPU, and the parameter groups ---------------------------------------------------------------------------


def test_muon_by_kernels_is_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels of a GPU (here in Triton's interpreter): the same steps, up to bfloat16's rounding."""
    kernel_fused = pytest.importorskip("kernel_fused")
    shapes = [(8, 24), (24, 8), (2, 8, 24)]
    ours, theirs, before = (parameters(shapes) for _ in range(3))
    expected = steps_of(Muon(theirs, lr=0.02, weight_decay=0.1, dtype=torch.float32), theirs)
    monkeypatch.setattr(fp8_ops, "kernels", lambda _: kernel_fused)
    # a product in the interpreter takes bfloat16 for integers, so torch makes the products of symmetric matrices
    monkeypatch.setattr(kernel_fused, "newton_schulz", lambda x, *_: plain_newton_schulz(x))
    actual = steps_of(Muon(ours, lr=0.02, weight_decay=0.1, dtype=torch.bfloat16), ours)
    for a, b, old in zip(actual, expected, before, strict=True):
        assert (a - b).norm() < 0.1 * (b - old).norm()


def plain_newton_schulz(x: torch.Tensor) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_ops, "kernels", lambda _: None)
        return orthogonalize(x)


@pytest.mark.parametrize("dim", [64, 512])
def test_parameter_groups(dim: int) -> None:
    """Hidden matrices alone decay; routers learn more slowly where they are wide."""
    args = ModelArgs(dim=dim, inter_dim=16, moe_inter_dim=8, n_layers=2, n_heads=2, n_routed_experts=4, kv_lora_rank=8,
                     n_activated_experts=2, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4)  # fmt: skip
    model = Transformer(args)
    flags = argparse.Namespace(
        lr=0.004, matrix_lr=0.01, momentum=0.9, weight_decay=0.1, optimizer="muon", beta1=0.9, beta2=0.95
    )
    found = {}
    for optimizer in make_optimizers(model, flags, torch.float32):
        for group in optimizer.param_groups:
            found |= {p: (type(optimizer).__name__, group["lr"], group["weight_decay"]) for p in group["params"]}
            assert group["peak_lr"] == group["lr"]
    for name, p in model.named_parameters():
        expected = ("AdamW", 0.004, 0.0)
        if name.endswith("gate.weight"):
            expected = ("AdamW", 0.004 * min(1, 128 / dim), 0.0)
        elif p.ndim > 1 and name not in ("embed.weight", "head.weight"):
            expected = ("Muon", 0.01, 0.1)
        assert found.pop(p) == expected, name
    assert not found


@pytest.mark.parametrize(
    ("capability", "dtype", "gemm_impl", "experts", "dense"),
    [
        ((9, 0), torch.bfloat16, "bf16", True, True),
        ((9, 0), torch.float32, "bf16", False, True),
        ((8, 0), torch.bfloat16, "bf16", False, True),
        ((12, 0), torch.bfloat16, "bf16", False, True),
        ((8, 9), torch.float32, "fp8", True, True),
        ((8, 0), torch.bfloat16, "fp8", False, True),
        ((7, 5), torch.float32, "bf16", False, False),
    ],
)
def test_steps_that_wait_are_not_recorded(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, gemm_impl: str,
    experts: bool, dense: bool,
) -> None:  # fmt: skip
    """Where products of the experts' rows wait for their numbers, or Muon has no kernels."""
    pytest.importorskip("triton")
    monkeypatch.setattr(fp8_ops, "meta_capability", capability)
    monkeypatch.setattr(fp8_ops, "gemm_impl", gemm_impl)
    for changes, expected in (({}, experts), ({"n_routed_experts": 0, "n_mtp_layers": 0}, dense)):
        with torch.device("meta"):
            model = Transformer(tiny(**changes).args, dtype)
        assert can_replay(ParallelContext(), model) == expected


# --- Compiling ahead ---------------------------------------------------------------------------------------------


WIDE = {"dim": 256, "inter_dim": 384, "moe_inter_dim": 128, "n_layers": 5, "q_lora_rank": 64, "kv_lora_rank": 64}
WIDE |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32, "max_seq_len": 128, "n_shared_experts": 1}
PLAIN = {"q_lora_rank": 0, "kv_lora_rank": 0, "n_routed_experts": 0, "n_mtp_layers": 0, "hidden_act": "gelu"}
RAGGED = {"dim": 72, "moe_inter_dim": 40, "n_heads": 3, "max_seq_len": 33, "n_dense_layers": 0}
SPARSE = {"index_topk": 32, "index_n_heads": 2, "index_head_dim": 32, "moe_layer_freq": 1, "scale_fmt": "ue8m0"}


@pytest.mark.parametrize(
    ("gemm_impl", "changes", "lengths", "is_frozen"),
    [
        ("bf16", {}, (128, 64), False),
        ("fp8", {}, (128, 64), True),
        ("fp8", PLAIN, (128,), True),
        ("fp8", SPARSE, (128,), False),
        ("bf16", RAGGED, (33,), True),
        ("fp8", RAGGED, (33,), False),
    ],
)
def test_a_step_compiles_nothing_that_was_not_compiled_ahead(
    monkeypatch: pytest.MonkeyPatch, gemm_impl: str, changes: dict[str, Any], lengths: tuple[int, ...], is_frozen: bool
) -> None:
    """Nor does an evaluation or a sample; and all that was compiled is for them. On a GPU with few multiprocessors."""
    kernel, kernel_fused = pytest.importorskip("kernel"), pytest.importorskip("kernel_fused")
    from test_kernel import ZeroedTorch, specialisations

    monkeypatch.setattr(fp8_ops, "gemm_impl", gemm_impl)
    monkeypatch.setattr(fp8_ops, "_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernel, "_sms_of_hopper", lambda device: 8)
    monkeypatch.setattr(kernel, "suppress", lambda _: nullcontext())  # here an exception is a failure
    for module in (kernel, kernel_fused):
        monkeypatch.setattr(module, "torch", ZeroedTorch())
    model = tiny(**WIDE | changes).train()
    model.compute_dtype, model.gradient_checkpointing = torch.bfloat16, is_frozen
    freeze(model, ["embed.weight", "*.w2.weight", "*norm.weight"] if is_frozen else [])
    flags = argparse.Namespace(optimizer="muon", matrix_lr=0.1, momentum=0.9, weight_decay=0.1)
    vars(flags).update(lr=0.1, beta1=0.9, beta2=0.9)
    ctx, n_bytes = ParallelContext(), lengths[0] * (1 if changes is RAGGED else 4)
    step = TrainingStep(ctx, model, model.loss, make_optimizers(model, flags, torch.bfloat16, ctx), 1.0)
    step.replays = True  # a step is taken even if its loss is not finite
    with specialisations() as ahead:
        step.compile_ahead(n_bytes, *lengths)
    with specialisations() as met:
        parallel.quantize_weights(ctx, model)
        for length in lengths:
            for model.dense_attention in (True, False):
                step._run(torch.zeros(1, n_bytes // length, length + 1, dtype=torch.uint8))
        with torch.inference_mode():
            model.eval().next_byte_loss(*[torch.zeros(4 * n_bytes // lengths[0], lengths[0], dtype=torch.int64)] * 2)
            kv_cache = model.new_cache(1, 2)
            for _ in range(2):  # a sample
                model(torch.zeros(1, 1, dtype=torch.uint8), kv_cache)
    assert len(met) > 10 and any(name == "_hopper_kernel" for name, *_ in met) == (gemm_impl == "fp8")
    assert ahead == met


def test_a_failure_ahead_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, model = pytest.importorskip("kernel"), tiny()
    monkeypatch.setattr(fp8_ops, "_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernel, "_sms_of_hopper", lambda device: 8)
    monkeypatch.setattr(Transformer, "loss", lambda *batch: 1 / kernel._hopper_sms(torch.device("meta")) / 0)
    launch = kernel.KernelInterface.__getitem__
    TrainingStep(ParallelContext(), model, model.loss, [], 1.0).compile_ahead(16, 16)
    assert kernel.KernelInterface.__getitem__ is launch
    assert fp8_ops.capability(torch.device("meta")) == (0, 0) and kernel._hopper_sms(torch.device("meta")) == 0


# --- The balance of the experts ----------------------------------------------------------------------------------


def biases(model: Transformer) -> torch.Tensor:
    """The routing biases (gates, experts)."""
    return torch.stack([gate.bias for gate in model.gates()]).clone()


def lopsided(gates: int, experts: int, seed: int, mean: float = 50.0) -> torch.Tensor:
    """Counts of all sizes, zeros included."""
    generator = torch.Generator().manual_seed(seed)
    return (mean * torch.randn(gates, experts, generator=generator).exp() - 0.3 * mean).clamp(min=0).round()


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_fixed_steps(data: st.DataObject) -> None:
    """Down by gamma where an expert had more than the mean, up where it had less, and not at all at the mean."""
    net = tiny(bias_update_speed=0.5)
    counts = [data.draw(st.lists(st.integers(0, 3), min_size=4, max_size=4)) for _ in net.gates()]
    before = biases(net).tolist()
    GateBalance(net).update(torch.tensor(counts, dtype=torch.float32))
    for gate, old, load in zip(net.gates(), before, counts, strict=True):
        for e in range(4):
            mean = sum(load) / 4
            step = -0.5 if load[e] > mean else 0.5 if load[e] < mean else 0.0
            assert gate.bias[e].item() == pytest.approx(old[e] + step)


def test_steps_of_each_expert() -> None:
    """Expert by expert, in Python's own numbers: the gains follow the products of successive errors."""
    net = tiny(n_routed_experts=8)
    balance, n_gates = GateBalance(net), len(net.gates())
    expected = biases(net).double().tolist()
    gains, last = [[0.05] * 8 for _ in range(n_gates)], [[0.0] * 8 for _ in range(n_gates)]
    for step in range(30):
        load = lopsided(n_gates, 8, step // 15)
        load = load.amax() - load if step > 15 and step % 2 else load  # first always the same, then to and fro
        balance.update(load)
        for g, counts in enumerate(load.tolist()):
            mean = sum(counts) / 8
            errors = [max(-1.0, 1 - count / mean) for count in counts]
            typical = math.sqrt(sum(e * e for e in errors) / 8 * sum(e * e for e in last[g]) / 8)
            for e in range(8):
                correlation = errors[e] * last[g][e] / typical if typical else 0.0
                gains[g][e] = min(0.2, gains[g][e] * math.exp(0.1 * (min(2.0, max(-2.0, correlation)) + 0.1)))
                expected[g][e] += gains[g][e] * errors[e]
            last[g] = errors
    torch.testing.assert_close(balance.gains, torch.tensor(gains), rtol=1e-4, atol=0)
    torch.testing.assert_close(biases(net), torch.tensor(expected), rtol=0, atol=1e-4)
    assert max(map(max, gains)) == 0.2 and min(map(min, gains)) < 0.05


@pytest.mark.parametrize("speed", [None, 0.01])
def test_an_even_load_moves_nothing(speed: float | None) -> None:
    """Nor does a step in which a layer had no position at all."""
    net = tiny(bias_update_speed=speed)
    balance, n_gates, before = GateBalance(net), len(net.gates()), biases(net)
    for load in (torch.full((n_gates, 4), 7.0), torch.zeros(n_gates, 4), torch.full((n_gates, 4), 3.0)):
        balance.update(load)
    assert torch.equal(biases(net), before) and balance.state.isfinite().all()


@pytest.mark.parametrize("speed", [None, 0.01])
def test_frozen_routers_keep_their_bias(speed: float | None) -> None:
    net, rows = tiny(bias_update_speed=speed), lopsided(2, 4, 0)
    freeze(net, ["layers.*.gate.weight"])
    frozen, other = net.gates()
    before, alone = frozen.bias.clone(), tiny(bias_update_speed=speed)
    GateBalance(net).update(rows)
    GateBalance(alone).update(rows)
    assert torch.equal(frozen.bias, before) and torch.equal(other.bias, alone.gates()[1].bias)
    assert not torch.equal(alone.gates()[0].bias, before)


@pytest.mark.parametrize("changes", [{"gate_bias": False}, {"n_routed_experts": 0, "n_mtp_layers": 0}])
def test_models_without_routing_biases(changes: dict[str, object]) -> None:
    net = tiny(**changes)
    GateBalance(net).update(torch.rand(len(net.gates()), net.args.n_routed_experts))
    assert all(gate.bias is None for gate in net.gates())


def test_balancing_reads_nothing_back() -> None:
    """On the meta device, where tensors have no values, code that depends on them fails. And all is done in place."""
    with torch.device("meta"):
        net = Transformer(tiny().args)
        balance = GateBalance(net)
        balance.update(torch.empty(len(net.gates()), 4))
    assert balance.state.is_meta
    net = tiny()
    balance, before = GateBalance(net), [gate.bias for gate in net.gates()]
    state = balance.state.clone()
    balance.update(lopsided(2, 4, 0))
    assert all(gate.bias is bias for gate, bias in zip(net.gates(), before, strict=True))
    assert torch.equal(balance.state, torch.stack([balance.gains, balance.errors]))
    assert not torch.equal(balance.state[0], state[0]) and not torch.equal(balance.state[1], state[1])


def test_gains_come_back_from_their_bounds() -> None:
    """However long the load has gone to and fro by itself."""
    net = tiny()
    balance, load = GateBalance(net), lopsided(2, 4, 0)
    for step in range(2000):
        balance.update(load if step % 2 else load.amax() - load)
    assert (balance.gains == 1e-4).any()
    for _ in range(400):
        balance.update(load)
    assert (balance.gains[balance.errors != 0] > 0.05).all()


def routed(n_steps: int, fixed_gain: float | None = None, n_groups: int = 4) -> torch.Tensor:
    """The loads (steps, experts), relative to the mean, of a router that drifts as those of large models do.

    A third of its experts have sigmoids near 0, so that a bias moves far more of their positions than of others'. In
    place of the rule, `fixed_gain` is that of all experts.
    """
    net = tiny(n_layers=1, n_dense_layers=0, n_mtp_layers=0, n_routed_experts=32, n_activated_experts=4)
    net.gates()[0].bias.zero_()
    gate, balance = net.gates()[0], GateBalance(net)
    gate.n_groups, gate.topk_groups, gate.topk = n_groups, max(1, n_groups // 2), 4
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    router, speed, level = draw(32, 24), torch.zeros(32, 24), torch.zeros(32)
    final, loads = 2.6 * draw(32) - 2.4, []
    for _ in range(n_steps):
        speed = 0.8 * speed + 0.6 * draw(32, 24)
        router, level = 0.995 * router + 0.1 * speed, level + (final - level) / 100 + 0.08 * draw(32)
        features = draw(8, 24).repeat_interleave(256, dim=0) * 0.3 + draw(2048, 24) * 0.8  # sequences of a document
        scores = torch.sigmoid(features @ router.T / 24**0.5 + level)
        load = torch.bincount(gate.route(scores).flatten(), minlength=32).float()
        if fixed_gain is None:
            balance.update(load[None])
        else:
            gate.bias += fixed_gain * torch.log(load.mean() / load.clamp(min=0.05 * load.mean()))
        loads.append(load / load.mean())
    return torch.stack(loads)


@pytest.mark.parametrize("n_groups", [1, 4])
def test_drifting_routers_stay_balanced(n_groups: int) -> None:
    """From a tenth of 300 steps on, the busiest has at most 1.5 times the mean in any ten; no gain for all is as good.

    A low one lags, so that ten steps are uneven; a high one overshoots, so that single steps are.
    """
    unevenness = lambda loads: (loads - 1).square().mean().sqrt().item()  # noqa: E731
    tens = lambda loads: loads.unflatten(0, (-1, 10)).mean(dim=1)  # noqa: E731
    ours, *others = (routed(300, gain, n_groups)[30:] for gain in (None, 0.02, 0.1))
    assert tens(ours).max() < 1.5 and tens(ours).min() > 0.5
    for other in others:
        steps, in_tens = unevenness(other) / unevenness(ours), unevenness(tens(other)) / unevenness(tens(ours))
        assert max(steps, in_tens) > 1.1 and min(steps, in_tens) > 0.85
