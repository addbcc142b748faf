"""Settings of all tests, and the tiny model that they have in common.

Tests run in two processes at a time (see pyproject.toml), each on one thread: threads that wait for others on a busy
machine take ten times as long. Without a GPU, kernels run in Triton's interpreter.
"""

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and in processes of tests

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

hypothesis.settings.register_profile("tests", deadline=None)  # on a busy machine, time says nothing of the code
hypothesis.settings.load_profile("tests")

import fp8_ops  # noqa: E402
import model as model_module  # noqa: E402
from model import ModelArgs, Transformer  # noqa: E402

TINY = {
    "max_seq_len": 16,
    "original_seq_len": 16,
    "dtype": "fp32",
    "dim": 16,
    "inter_dim": 24,
    "moe_inter_dim": 8,
    "n_layers": 3,
    "n_dense_layers": 1,
    "moe_layer_freq": 2,
    "n_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_activated_experts": 2,
    "score_func": "sigmoid",
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "n_mtp_layers": 1,
}


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """Puts back the implementations that a test, or a command in it, has chosen for the process."""
    before = fp8_ops.gemm_impl, model_module.attn_impl
    yield
    fp8_ops.gemm_impl, model_module.attn_impl = before


def tiny(seed: int = 1, **changes: object) -> Transformer:
    """A small model of random numbers, norms and routing biases included; `changes` are of `TINY`."""
    model = Transformer(ModelArgs.from_dict(TINY | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model.eval()


def randomise(model: Transformer, seed: int = 0) -> None:
    """Random numbers for every parameter: matrices keep activations at order 1, norms and biases are uneven."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(1 + 0.2 * noise)
            else:
                p.copy_(noise if name == "embed.weight" else noise * p.shape[-1] ** -0.5)
        for gate in model.gates():
            if gate.bias is not None:
                gate.bias.copy_(0.3 * torch.randn(gate.bias.shape, generator=generator))


def one_line(error: pytest.ExceptionInfo, *names: object) -> None:
    """Checks that an error's message is one line with all these names."""
    message = str(error.value)
    assert message and "\n" not in message
    for name in names:
        assert str(name) in message
