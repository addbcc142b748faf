"""Muon against torch's own and against its formulas in float64."""

import argparse

import pytest
import torch
from torch import nn

import fp8_ops
from model import ModelArgs, Transformer
from optim import Muon, make_optimizers, orthogonalize

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
