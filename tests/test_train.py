"""Training against brute force, torch's own Muon, and real processes that are interrupted, killed and resumed."""

import contextlib
import ctypes
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint as checkpoints
import fp8_ops
import metrics
import model as model_module
import parallel
import train
from byte_tokenizer import visible
from checkpoint import load_run, save_model
from convert import convert, load_model
from data.prepare import resolve
from data.sampler import Corpus, SequenceSampler
from metrics import Clock, Metrics, evaluate
from model import ConfigError, ModelArgs, Transformer
from optim import STATE_KEYS, is_hidden_matrix, stretch
from parallel import ParallelContext, keep_freed_memory
from safetensors_io import CheckpointError
from train import Trainer, main, schedule

FOLDER = Path(train.__file__).parent
TRAIN_PY = str(FOLDER / "train.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER)}
TINY = conftest.TINY | {"max_seq_len": 32, "original_seq_len": 32, "dim": 32, "inter_dim": 48, "moe_inter_dim": 16}
TINY |= {"n_layers": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
UNIFORM = math.log(256)
draws = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def text(n_bytes: int, seed: int = 0) -> bytes:
    """Words of a small vocabulary in random order: easy to learn, and like text."""
    sentence = "the quick brown fox jumps over a lazy dog while we train small models on plain bytes"
    chosen = random.Random(seed).choices(sentence.split(), k=n_bytes // 2)
    return " ".join(chosen).encode()[:n_bytes]


@pytest.fixture(autouse=True)
def unchanged_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, for products this small; and the signal handlers that a run in this process leaves behind go."""
    monkeypatch.setattr(metrics, "MEASURING_S", 0.0)
    threads = torch.get_num_threads()
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    yield
    fp8_ops.gemm_impl = "bf16"
    torch.set_num_threads(threads)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


class Here:
    """A folder with a config and data, and the flags of a short run on them."""

    def __init__(self, path: Path):
        self.path, self.run = path, path / "run"
        self.config, self.data = path / "config.json", path / "data.txt"
        self.write_config()
        self.data.write_bytes(text(4000))

    def write_config(self, **changes: Any) -> None:
        self.config.write_text(json.dumps(TINY | changes))

    def flags(self, *extra: object, save: bool = True, data: object = None) -> list[str]:
        """The command line; later flags override earlier ones."""
        flags = ["--config", self.config, "--data", self.data if data is None else data]
        flags += ["--batch-size", 4, "--log-interval", 1]
        flags += ["--sample-bytes", 0, "--dtype", "fp32", "--device", "cpu", *extra]
        return [str(flag) for flag in flags + (["--save-path", self.run] if save else [])]

    def trainer(self, *extra: object) -> Trainer:
        args, shape = train.parse_args(self.flags("--steps", 10, *extra, save=False))
        return train.build_trainer(args, shape, ParallelContext("cpu"))


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path)


def lines(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run without what differs from run to run: times, memory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    differing = ("elapsed_s", "bytes_per_s", "mfu", "data_wait", "peak_memory_bytes")
    return [{k: v for k, v in row.items() if k not in differing} for row in rows]


def checkpoint(run: Path, which: str = "last") -> Path:
    return run / json.loads((run / "checkpoints.json").read_text())[which]


def assert_same_run(ours: Path, theirs: Path, steps: int) -> None:
    """Bit for bit: every step's metrics, once each and in order, the weights, and the optimizer's state."""
    assert lines(ours) == lines(theirs)
    assert [row["step"] for row in lines(ours) if "train_loss" in row] == list(range(1, steps + 1))
    assert checkpoint(ours, "best").name == checkpoint(theirs, "best").name
    for file in ("model0-mp1.safetensors", "state0-mp1.safetensors"):
        assert (checkpoint(ours) / file).read_bytes() == (checkpoint(theirs) / file).read_bytes(), file
    a, b = (json.loads((checkpoint(run) / "state.json").read_text())["gate_balance"] for run in (ours, theirs))
    assert a == b


def assert_refused(capsys: pytest.CaptureFixture[str], argv: list[str], *parts: object) -> str:
    """The command ends with exit code 2 and one line on stderr that names all of `parts`."""
    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.count("\n") == 1 and err.startswith("train.py: error: "), err
    for part in parts:
        assert str(part) in err
    return err


# --- Evaluation -------------------------------------------------------------------------------------------------------


def shake(model: nn.Module, seed: int = 0) -> None:
    """Random weights everywhere: fresh ones are zero where it matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("n_bytes", [2, 20, 33, 34, 65, 500])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_evaluation_is_the_mean_over_every_byte(here: Here, n_bytes: int, batch_size: int) -> None:
    model = here.trainer().model
    shake(model)
    data = np.frombuffer(text(n_bytes, 5), np.uint8)
    total = 0.0
    with torch.no_grad():
        for start in range(0, n_bytes - 1, 32):
            window = torch.tensor(data[start : start + 33].astype(np.int64))
            logits = model(window[None, :-1])[0].double()
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    found, n_sequences = evaluate(model, data, batch_size, ParallelContext("cpu"))
    assert found == pytest.approx(total / (n_bytes - 1), rel=1e-6) and n_sequences is None
    assert model.training


@pytest.mark.parametrize(("n_bytes", "n_batches"), [(500, 1), (3001, 7), (6500, 25), (6500, 60)])
def test_an_evaluation_without_time_is_of_an_even_subset(
    here: Here, monkeypatch: pytest.MonkeyPatch, n_bytes: int, n_batches: int
) -> None:
    """It ends where the next batch would be late, and is the mean over the bytes of those before."""
    model, left, offsets, n_read = here.trainer().model, 2.0 * n_batches + 1.5, list[int](), 0
    shake(model)
    data = np.frombuffer(text(n_bytes, 5), np.uint8)
    read_batch = metrics.read_batch

    def read(data: np.ndarray, starts: np.ndarray, *more: Any) -> Any:
        nonlocal left, n_read
        left, n_read = left - 2.0, n_read + 1
        offsets.extend(starts.tolist())
        return read_batch(data, starts, *more)

    monkeypatch.setattr(metrics, "read_batch", read)
    found, n_sequences = evaluate(model, data, 3, ParallelContext("cpu"), left_s=lambda: left)
    assert n_sequences == len(offsets) == len(set(offsets)) and n_read == n_batches
    total = n_targets = 0.0
    for start in offsets:
        window = torch.tensor(data[start : start + 33].astype(np.int64))
        with torch.no_grad():
            total += F.cross_entropy(model(window[None, :-1])[0].double(), window[1:], reduction="sum").item()
        n_targets += len(window) - 1
    assert found == pytest.approx(total / n_targets, rel=1e-6) and model.training
    gaps = np.diff([0, *sorted(offsets), n_bytes])
    assert n_batches == 1 or gaps.max() <= 3 * n_bytes / n_batches
    assert evaluate(model, data, 3, ParallelContext("cpu"), left_s=lambda: 1.0)[1] is None  # batches take no time


def test_short_sequences_of_the_first_half(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes a step, none of them twice, and evaluations in the sequences that are being trained on."""
    seen: list[Any] = []

    def spy(read: Callable[..., Any], data: Corpus, starts: np.ndarray, seq_len: int, device: str) -> Any:
        seen.append((torch.is_grad_enabled(), seq_len, starts.tolist()))
        return read(data, starts, seq_len, device)

    monkeypatch.setattr(train, "read_bytes", functools.partial(spy, train.read_bytes))
    monkeypatch.setattr(metrics, "read_batch", functools.partial(spy, metrics.read_batch))
    assert main(here.flags("--steps", 8, "--accumulation", 2, "--short-seq-len", 8, "--eval-interval", 3)) == 0
    steps = [(length, starts) for trains, length, starts in seen if trains]
    assert [(length, len(starts)) for length, starts in steps] == [(8, 32)] * 4 + [(32, 8)] * 4
    first = sorted(start for length, starts in steps if length == 8 for start in starts)
    assert len(first) == 128 and all(b - a >= 8 for a, b in zip(first[1:], first[2:-1], strict=False))
    rows = [row for row in lines(here.run) if "val_loss" in row]
    assert [(row["step"], row.get("window")) for row in rows] == [(3, 8), (6, None), (8, None)]
    n_targets = {8: 0, 32: 0}
    for trains, length, starts in seen:
        if not trains and length in n_targets:
            n_targets[length] += length * len(starts)
    val_bytes = here.data.stat().st_size - int(0.9 * here.data.stat().st_size)
    assert n_targets == {8: (val_bytes - 1) // 8 * 8, 32: 2 * ((val_bytes - 1) // 32 * 32)}


# --- Schedule ---------------------------------------------------------------------------------------------------------

fractions = st.floats(0, 1)


@draws
@given(st.sampled_from(["wsd", "cosine"]), fractions, fractions, fractions)
def test_schedule_is_a_fraction(kind: str, progress: float, warmup: float, decay: float) -> None:
    assert 0 <= schedule(progress, kind, warmup, decay) <= 1


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
@pytest.mark.parametrize(("warmup", "decay"), [(0.02, 0.5), (0.0, 1.0), (0.3, 0.2), (0.0, 0.0)])
def test_schedule_goes_up_stays_and_goes_down(kind: str, warmup: float, decay: float) -> None:
    at = np.linspace(0, 1, 1001)
    values = np.array([schedule(x, kind, warmup, decay) for x in at])
    up, rest = values[at < warmup], values[at >= warmup]
    assert np.allclose(up, at[at < warmup] / max(warmup, 1e-9))
    assert (np.diff(rest) <= 1e-12).all() and rest[0] == pytest.approx(1)
    if kind == "wsd":
        assert np.allclose(values[(at >= warmup) & (at <= 1 - decay)], 1)
        assert schedule(1 - decay / 2, kind, warmup, decay) == pytest.approx(0.5 if decay else 1)
    else:
        assert schedule((1 + warmup) / 2, kind, warmup, decay) == pytest.approx(0.5)
    assert values[-1] == pytest.approx(1 if kind == "wsd" and decay == 0 else 0)


# --- Steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_accumulation_is_a_larger_batch(here: Here, optimizer: str) -> None:
    here.write_config(aux_loss_alpha=0.01)  # per sequence, so it does not notice either
    results = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        trainer = here.trainer("--batch-size", batch, "--accumulation", accumulation, "--optimizer", optimizer)
        shake(trainer.model)
        steps = [trainer.train_step(0.3) for _ in range(3)]
        state = train.optimizer_tensors(trainer.model, trainer.optimizers)
        results.append((steps, trainer.model.state_dict(), state, trainer.state()["sequences"]))
    first = results[0]
    assert first[0][0]["balance_loss"] > 0 and first[3] == 24
    for steps, weights, state, sequences in results[1:]:
        assert sequences == 24
        for a, b in zip(first[0], steps, strict=True):
            assert all(b[key] == pytest.approx(a[key], rel=1e-4) for key in a)
        torch.testing.assert_close(weights, first[1], rtol=0, atol=2e-4)
        torch.testing.assert_close(state, first[2], rtol=1e-3, atol=1e-4)


def test_step_equals_torchs(here: Here) -> None:
    """One step by hand: the loss of the sampler's sequences, gradients clipped, rates by the schedule, biases moved."""
    here.write_config(bias_update_speed=0.003)
    flags = ["--optimizer", "adamw", "--grad-clip", 0.1, "--weight-decay", 0.2, "--lr", 0.01, "--matrix-lr", 0.02]
    trainer, other = here.trainer(*flags), here.trainer(*flags)
    shake(trainer.model), shake(other.model)
    model, before = other.model, {name: p.detach().clone() for name, p in other.model.named_parameters()}
    data = other.train_data
    batch = np.stack([data[s : s + 33] for s in other.sampler.starts(0, 4)]).astype(np.int64)
    losses = model.loss(torch.from_numpy(batch[:, :-1]), torch.from_numpy(batch[:, 1:]))
    losses.total.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert norm > 0.1
    metrics = trainer.train_step(0.75)
    factor = schedule(0.75, trainer.flags.schedule, trainer.flags.warmup, trainer.flags.decay)
    assert metrics["train_loss"] == pytest.approx(losses.next_byte.item()) and trainer.step == 1
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5) and metrics["lr"] == pytest.approx(0.01 * factor)
    assert metrics["matrix_lr"] == pytest.approx(0.02 * factor)
    after = dict(trainer.model.named_parameters())
    outside = [n for n in after if n in ("embed.weight", "head.weight") or "norm" in n or n.endswith("gate.weight")]
    for name, p in model.named_parameters():
        lr, decay = (0.01, 0.0) if name in outside else (0.02, 0.2)
        grad = p.grad * 0.1 / (norm + 1e-6)
        expected = before[name] * (1 - lr * factor * decay) - lr * factor * grad / (grad.abs() + 1e-10)
        sure = grad.abs() > 1e-6  # below, the sign of a gradient is a matter of rounding
        torch.testing.assert_close(after[name][sure], expected[sure], rtol=0, atol=1e-5)
    for gate, load in zip(trainer.model.gates(), losses.load, strict=True):
        expected = trainer.model.args.bias_update_speed * torch.sign(load.mean() - load)
        torch.testing.assert_close(gate.bias, expected)


def test_training_learns(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    here.data.write_bytes(text(30_000))
    assert main(here.flags("--steps", 120, "--batch-size", 8, "--eval-interval", 12, save=False)) == 0
    out = capsys.readouterr().out.splitlines()
    first, last = (float(line.split("val_loss ")[1].split()[0]) for line in (out[1], out[-1]))
    assert first > last and last < 0.5 * UNIFORM
    assert out[-1].startswith("step 120, ") and "not saved" in out[-1]


@pytest.mark.parametrize("gemm_impl", ["bf16", "fp8"])
def test_gradient_checkpointing_changes_nothing(here: Here, gemm_impl: str) -> None:
    flags = ["--gemm-impl", gemm_impl]
    plain, saving = here.trainer(*flags), here.trainer(*flags, "--gradient-checkpointing")
    assert saving.model.gradient_checkpointing and not plain.model.gradient_checkpointing
    for trainer in (plain, saving):
        shake(trainer.model)
        parallel.quantize_weights(trainer.ctx, trainer.model)
    for _ in range(5):
        assert plain.train_step(0.3) == saving.train_step(0.3)
    for p, q in zip(plain.model.parameters(), saving.model.parameters(), strict=True):
        assert torch.equal(p, q)


class RecordedStep:
    """What a test has for a CUDA graph: recording takes no step, a replay takes one on what was recorded."""

    step: Any = None
    recorded = 0

    def __enter__(self) -> None:
        self.run, self.step._run = self.step._run, lambda batches: torch.full((4,), math.nan)
        type(self).recorded += 1

    def __exit__(self, *_: object) -> None:
        self.step._run = self.run

    def replay(self) -> None:
        self.step._figures = self.run(self.step._batches)


def test_replayed_steps_are_the_same_steps(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each length of sequences is recorded once, and the figures that come a step late are of the right steps."""
    flags = ["--short-seq-len", 8, "--accumulation", 2, "--momentum", 0.9]
    plain, replaying = here.trainer(*flags), here.trainer(*flags)
    for trainer in (plain, replaying):
        shake(trainer.model)
    RecordedStep.step, RecordedStep.recorded = replaying.training_step, 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedStep)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    replaying.training_step.replays = True
    expected = [plain.train_step(progress) for progress in [0.2] * 6 + [0.7] * 6]
    found = [replaying.train_step(progress) for progress in [0.2] * 6 + [0.7] * 6]
    ahead = [3, 4, 5, 9, 10, 11]  # the steps after LAUNCHED_STEPS of each length
    assert found == [expected[i - 1 if i in ahead else i] for i in range(12)] and RecordedStep.recorded == 2
    replaying.finish_steps()
    assert replaying.figures == expected[-1] and replaying.step == 12
    for p, q in zip(plain.model.parameters(), replaying.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_that_cannot_be_recorded_goes_on(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_graph: object, **_: object) -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        finally:  # as where torch.cuda.graph ends a recording that failed
            raise RuntimeError("operation failed due to a previous error during capture")

    plain, replaying = here.trainer(), here.trainer()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", fail)
    replaying.training_step.replays = True
    for _ in range(5):
        assert plain.train_step(0.4) == replaying.train_step(0.4)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "operation not permitted when stream is capturing" in err


def test_a_replayed_step_that_is_not_finite_ends_the_run(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known one step later, but before anything is saved."""
    trainer = here.trainer()
    RecordedStep.step = trainer.training_step
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedStep)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    trainer.training_step.replays = True
    for _ in range(4):
        trainer.train_step(0.5)
    trainer.model.head.weight.register_hook(lambda grad: grad * math.inf)
    trainer.train_step(0.5)
    with pytest.raises(train.NotFinite, match="step 5"):
        trainer.save(is_best=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", [[], ["--gemm-impl", "fp8"], ["--optimizer", "adamw", "--gradient-checkpointing"]])
def test_cuda_graphs_train_as_launched_kernels(here: Here, flags: list[str]) -> None:
    """To rounding: the embedding's gradient is a sum in any order. In FP8, a quantised number may be the next one."""
    here.write_config(dim=128, inter_dim=256, moe_inter_dim=128, original_seq_len=32)
    results = []
    for graph in ("--cuda-graph", "--no-cuda-graph"):
        args = here.flags("--steps", 10, "--short-seq-len", 16, "--accumulation", 2, "--lr", 1e-4, *flags, graph)
        parsed, shape = train.parse_args([*args, "--device", "cuda", "--dtype", "bf16"])
        trainer = train.build_trainer(parsed, shape, ParallelContext("cuda"))
        figures = []
        for progress in [0.2] * 6 + [0.7] * 6:
            trainer.train_step(progress)
            trainer.finish_steps()
            figures.append(trainer.figures)
        results.append((figures, trainer.training_step.graph is not None))
    assert results[0][1] and not results[1][1]
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert a == pytest.approx(b, rel=0.02)


@pytest.mark.slow
def test_compile_changes_nothing(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is traced whole, forward and backward; the compiler behind it is torch's own matter."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    flags = ["--gemm-impl", "fp8"]
    plain, compiled = here.trainer(*flags), here.trainer(*flags, "--compile")
    for trainer in (plain, compiled):
        shake(trainer.model)
        parallel.quantize_weights(trainer.ctx, trainer.model)
    for _ in range(3):
        a, b = plain.train_step(0.3), compiled.train_step(0.3)
        assert b == pytest.approx(a, rel=1e-4)
    torch._dynamo.reset()


def test_weights_are_quantised_once_a_step(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches a step has; and a step ends with the FP8 copies of the weights that it ends with."""
    trainer = here.trainer("--gemm-impl", "fp8", "--accumulation", 3)
    calls, quantize = [], fp8_ops.quantize
    monkeypatch.setattr(fp8_ops, "quantize", lambda *args: calls.append(args) or quantize(*args))
    trainer.train_step(0.3)
    layers = trainer.model.fp8_layers()
    assert len(calls) == len(layers) > 10
    for layer in layers:
        q, s = fp8_ops.weight_quant(layer.weight.detach())
        assert torch.equal(layer.weight_q.view(torch.uint8), q.view(torch.uint8)) and torch.equal(layer.weight_s, s)


def test_training_learns_in_fp8_as_well(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    here.data.write_bytes(text(8_000))
    losses = []
    for gemm_impl in ("bf16", "fp8"):
        assert main(here.flags("--steps", 40, "--batch-size", 8, "--gemm-impl", gemm_impl, save=False)) == 0
        out = capsys.readouterr().out.splitlines()
        assert ("products in FP8" in out[0]) == (gemm_impl == "fp8")
        assert out[-1].startswith("step 40, ") and "not saved" in out[-1]
        losses.append(float(out[-1].split("val_loss ")[1].split()[0]))
    assert losses[0] < 0.6 * UNIFORM and losses[1] == pytest.approx(losses[0], rel=0.05) and losses[1] != losses[0]


@pytest.mark.parametrize(("dtype", "flags", "expected"), [
    ("fp8", [], "fp8"), ("bf16", [], "bf16"), ("fp32", [], "bf16"),
    ("fp8", ["--gemm-impl", "bf16"], "bf16"), ("fp32", ["--gemm-impl", "fp8"], "fp8"),
])  # fmt: skip
def test_products_follow_the_config(here: Here, dtype: str, flags: list[str], expected: str) -> None:
    here.write_config(dtype=dtype)
    here.trainer(*flags)
    assert fp8_ops.gemm_impl == expected


def test_balancing_works(here: Here) -> None:
    """One expert of eight takes over on its own; with biases that follow the load, none does."""
    here.data.write_bytes(text(20_000))
    tail = {}
    one_layer = {"n_layers": 1, "n_dense_layers": 0, "n_mtp_layers": 0, "n_routed_experts": 8, "n_activated_experts": 1}
    for speed in (0.0, 0.01):
        here.write_config(**one_layer, aux_loss_alpha=0.0, bias_update_speed=speed)
        here.run = here.path / f"run-{speed}"
        assert main(here.flags("--steps", 120, "--log-interval", 40, "--eval-interval", 1000)) == 0
        last = [row for row in lines(here.run) if "train_loss" in row][-1]
        tail[speed] = last["max_load"]
        (loads,) = last["expert_load"]
        assert len(loads) == 8 and np.mean(loads) == pytest.approx(1, abs=1e-3)
        assert max(loads) == pytest.approx(last["max_load"], abs=1e-3)
    assert tail[0.0] > 1.5 > tail[0.01], tail


# --- Not finite -------------------------------------------------------------------------------------------------------


def break_loss(monkeypatch: pytest.MonkeyPatch, step: int, value: float = math.nan) -> None:
    """Makes the loss of one step `value`."""
    calls, loss = iter(range(1, 1000)), model_module.Transformer.loss

    def broken(self: model_module.Transformer, *batch: torch.Tensor) -> model_module.Losses:
        losses = loss(self, *batch)
        bad = losses.next_byte * value if next(calls) == step else losses.next_byte
        return losses._replace(total=losses.total + bad - losses.next_byte, next_byte=bad)

    monkeypatch.setattr(model_module.Transformer, "loss", broken)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_ends_the_run(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    break_loss(monkeypatch, 6, value)
    assert main(here.flags("--steps", 10, "--save-interval", 2, "--eval-interval", 100)) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("train.py: error: step 6: ") and str(here.run) in err
    assert checkpoint(here.run).name == "step-00000004"
    assert all(t.isfinite().all() for t in load_model(here.run).state_dict().values())
    assert [row["step"] for row in lines(here.run)] == [1, 2, 3, 4, 5]
    monkeypatch.undo()
    assert main(here.flags("--steps", 10, "--resume", "--override", "steps")) == 0  # it can go on from there


def test_loss_that_is_not_finite_without_a_checkpoint(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_loss(monkeypatch, 1)
    assert main(here.flags("--steps", 10)) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "step 1: " in err and str(here.run) not in err


def test_gradient_that_is_not_finite_changes_nothing(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = here.trainer()
    shake(trainer.model)
    trainer.train_step(0.5)
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    trainer.model.head.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(train.NotFinite, match="step 2"):
        trainer.train_step(0.5)
    assert all(torch.equal(t, before[name]) for name, t in trainer.model.state_dict().items())
    assert trainer.step == 1


def test_learning_rate_that_explodes(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that overflow the model are noticed one way or another, and never become a checkpoint."""
    flags = ["--optimizer", "adamw", "--lr", 1e36, "--matrix-lr", 1e36, "--warmup", 0]
    assert main(here.flags("--steps", 8, "--eval-interval", 1, *flags)) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "step " in err
    if (here.run / "checkpoints.json").exists():
        for which in ("best", "last"):
            tensors = load_model(checkpoint(here.run, which)).state_dict().values()
            assert all(t.isfinite().all() for t in tensors)
    assert all(math.isfinite(row.get("val_loss", 0)) for row in lines(here.run))


def test_validation_loss_that_is_not_finite(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last step can spoil the weights with no further step to notice: the evaluation does."""
    values = iter([2.0, math.nan])
    monkeypatch.setattr(train, "evaluate", lambda *_: (next(values), None))
    assert main(here.flags("--steps", 4, "--eval-interval", 2)) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "step 4" in err
    assert checkpoint(here.run).name == checkpoint(here.run, "best").name == "step-00000002"


# --- Saves ------------------------------------------------------------------------------------------------------------


def test_best_and_last_are_kept(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    values, seen = iter([3.0, 2.0, 2.5, 1.5, 1.5, 4.0]), []
    monkeypatch.setattr(train, "evaluate", lambda *_: (next(values), None))
    save_run = train.save_run

    def spy(held: checkpoints.Run, *rest: Any) -> Path:
        path, run = save_run(held, *rest), held.path
        folders = sorted(int(p.name.removeprefix("step-")) for p in run.glob("step-*"))
        pointer = json.loads((run / "checkpoints.json").read_text())
        seen.append((pointer["best"][-2:], pointer["last"][-2:], folders))
        return path

    monkeypatch.setattr(train, "save_run", spy)
    assert main(here.flags("--steps", 6, "--eval-interval", 1)) == 0
    expected = [("01", "01", [1]), ("02", "02", [2]), ("02", "03", [2, 3]), ("04", "04", [4])]
    assert seen == [*expected, ("04", "05", [4, 5]), ("04", "06", [4, 6])]
    assert {p.name for p in here.run.iterdir()} == {
        *("checkpoints.json", "metrics.jsonl", "settings.json", "step-00000004", "step-00000006")
    }
    state = json.loads((checkpoint(here.run) / "state.json").read_text())
    assert state["best_val"] == 1.5 and state["step"] == 6 and state["sequences"] == 24


def test_best_is_remembered_by_a_resumed_run(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the last step was saved before it was evaluated."""
    values = iter([2.0, 1.0, 1.5, 1.6])
    monkeypatch.setattr(train, "evaluate", lambda *_: (next(values), None))
    flags = ["--eval-interval", 2, "--save-interval", 1]
    assert main(here.flags("--steps", 4, *flags)) == 0
    assert checkpoint(here.run, "best").name == "step-00000004"
    assert main(here.flags("--steps", 8, *flags, "--resume", "--override", "steps")) == 0
    assert checkpoint(here.run, "best").name == "step-00000004"
    assert checkpoint(here.run).name == "step-00000008"


def test_full_disk(here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(here.flags("--steps", 2)) == 0
    before = {p: p.read_bytes() for p in here.run.rglob("*.safetensors")}
    write_all = checkpoints.write_all

    def full_disk(file: Any, tensor: torch.Tensor) -> None:
        if "state" in Path(file.name).name:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        write_all(file, tensor)

    monkeypatch.setattr(checkpoints, "write_all", full_disk)
    assert_refused(
        capsys, here.flags("--steps", 4, "--resume", "--override", "steps"), here.run, "No space left on device"
    )
    assert {p: p.read_bytes() for p in here.run.rglob("*.safetensors")} == before
    assert not list(here.run.glob(".*"))
    monkeypatch.undo()
    assert main(here.flags("--steps", 4, "--resume", "--override", "steps")) == 0


def test_full_disk_for_metrics(here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(metrics, "open_append", lambda *_: open("/dev/full", "ab", buffering=0))  # noqa: SIM115
    assert_refused(capsys, here.flags("--steps", 2), "metrics.jsonl", "No space left on device")


def crash() -> None:
    raise Crash


class Crash(BaseException):
    """The end of the process, as far as the code can tell."""


def test_litter_of_other_steps_is_swept(here: Here) -> None:
    """Steps of a run by the clock never come again, so their leftovers are only found by looking for them."""
    here.run.mkdir()
    for name in (".step-00000007.tmp", "step-00000009"):
        (here.run / name).mkdir()
        (here.run / name / "model0-mp1.safetensors").write_bytes(b"torn")
    (here.run / ".checkpoints.json.tmp").write_text("{")
    assert main(here.flags("--steps", 2, "--resume")) == 0
    names = {"checkpoints.json", "metrics.jsonl", "settings.json", "step-00000002"}
    assert {p.name for p in here.run.iterdir()} == names


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], Any]) -> None:
    """Does something before one step of a run."""
    train_step = Trainer.train_step

    def acting(self: Trainer, progress: float) -> dict[str, Any]:
        if self.step == step:
            action()
        return train_step(self, progress)

    monkeypatch.setattr(Trainer, "train_step", acting)


def test_a_first_step_that_fails_leaves_nothing(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with monkeypatch.context() as patch:
        before_step(patch, 0, too_large)
        assert_refused(capsys, here.flags("--steps", 2), "not enough memory")
        assert not here.run.exists()
        here.run.mkdir()
        assert_refused(capsys, here.flags("--steps", 2), "not enough memory")
        assert not list(here.run.iterdir())
    assert main(here.flags("--steps", 2)) == 0


@pytest.mark.parametrize("when", ["training", "evaluation", "first step"])
def test_data_that_shrinks(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    """The file is named, the last step is saved, and the run goes on once the file is back."""
    whole, content = here.path / "whole", here.data.read_bytes()
    whole, here.run = here.run, whole
    flags = ["--steps", 6, "--eval-interval", 100]
    assert main(here.flags(*flags)) == 0
    whole, here.run = here.run, whole
    size = 3700 if when == "evaluation" else 10
    with monkeypatch.context() as patch:
        before_step(patch, 0 if when == "first step" else 3, lambda: os.truncate(here.data, size))
        err = assert_refused(capsys, here.flags(*flags), here.data)
    if when == "first step":
        assert not here.run.exists() and "saved" not in err
    else:
        assert checkpoint(here.run).name == ("step-00000006" if when == "evaluation" else "step-00000003")
        assert str(here.run) in err
    here.data.write_bytes(content)
    assert main(here.flags(*flags, "--resume")) == 0
    assert_same_run(here.run, whole, 6)


def test_a_run_folder_that_is_moved(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = here.path / "moved"
    before_step(monkeypatch, 3, lambda: here.run.rename(moved))
    assert_refused(capsys, here.flags("--steps", 6, "--save-interval", 2), here.run)
    assert not here.run.exists() and checkpoint(moved).name == "step-00000002"


# --- Resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "gemm_impl"), [("muon", "bf16"), ("adamw", "fp8")])
def test_resume_at_every_step(here: Here, monkeypatch: pytest.MonkeyPatch, optimizer: str, gemm_impl: str) -> None:
    flags = ["--steps", 4, "--eval-interval", 2, "--save-interval", 1, "--optimizer", optimizer, "--accumulation", 2]
    flags += ["--gemm-impl", gemm_impl, "--short-seq-len", 16]
    assert_resumes(here, monkeypatch, flags, 4, (0, 1, 3))


def assert_resumes(
    here: Here, monkeypatch: pytest.MonkeyPatch, flags: list[object], n_steps: int, stops: tuple[int, ...]
) -> None:
    """A run of `n_steps` is the same to the bit if it crashes after any number of `stops` and is resumed."""
    assert main(here.flags(*flags)) == 0
    whole, train_step = here.run, Trainer.train_step
    for stop_at in stops:
        here.run = here.path / f"stopped-at-{stop_at}"

        def step(self: Trainer, progress: float, stop_at: int = stop_at) -> dict[str, Any]:
            if self.step == stop_at:
                raise Crash
            return train_step(self, progress)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", step)
            with contextlib.suppress(Crash):
                main(here.flags(*flags))
        assert main(here.flags(*flags, "--resume")) == 0
        assert_same_run(here.run, whole, n_steps)


def test_resumed_run_can_be_made_longer(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(here.flags("--steps", 2)) == 0
    assert main(here.flags("--steps", 5, "--resume", "--override", "steps")) == 0
    assert [row["step"] for row in lines(here.run) if "train_loss" in row] == [1, 2, 3, 4, 5]
    assert f"resumed {here.run} at step 2" in capsys.readouterr().out


def test_crash_between_the_last_evaluation_and_its_save(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step may have been saved already: then the evaluation is all that a resumed run repeats."""
    flags, saves = ["--steps", 4, "--eval-interval", 100, "--save-interval", 2], []
    assert main(here.flags(*flags)) == 0
    whole, here.run, save_run = here.run, here.path / "crashed", train.save_run

    def dying(*args: Any) -> Path:
        saves.append(args)
        if len(saves) == 3:
            raise Crash
        return save_run(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_run", dying)
        assert main(here.flags(*flags)) == 1
    assert main(here.flags(*flags, "--resume")) == 0
    assert_same_run(here.run, whole, 4)


def test_resuming_a_finished_run_repeats_nothing(here: Here) -> None:
    assert main(here.flags("--steps", 3)) == 0
    before = lines(here.run)
    assert main(here.flags("--steps", 3, "--resume")) == 0
    assert lines(here.run) == before


def test_resume_of_nothing_starts_anew(here: Here) -> None:
    assert main(here.flags("--steps", 2, "--resume")) == 0  # no folder
    whole, here.run = here.run, here.path / "empty"
    here.run.mkdir()
    assert main(here.flags("--steps", 2, "--resume")) == 0
    assert_same_run(here.run, whole, 2)
    here.run = here.path / "killed-before-the-first-save"
    here.run.mkdir()
    (here.run / "metrics.jsonl").write_text('{"step": 1, "train_loss": 9}\n{"step": 2, "tra')
    assert main(here.flags("--steps", 2, "--resume")) == 0
    assert_same_run(here.run, whole, 2)


def test_resume_of_another_folder(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with something else in it is left alone, whatever that is."""
    for name in ("model.safetensors.index.json", "config.json", "notes.txt", "photos"):
        here.run = here.path / f"folder-{name}"
        here.run.mkdir()
        (here.run / name).mkdir() if name == "photos" else (here.run / name).write_text("{}")
        assert_refused(capsys, here.flags("--steps", 2, "--resume"), here.run, name)
        assert [path.name for path in here.run.iterdir()] == [name]


def test_resume_of_nothing_is_reported(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(here.flags("--steps", 1, "--resume")) == 0
    assert f"nothing to resume in {here.run}, starting" in capsys.readouterr().out
    assert main(here.flags("--steps", 2, "--resume", "--override", "steps")) == 0
    assert "nothing to resume" not in capsys.readouterr().out


def test_states_of_earlier_versions_are_resumed(here: Here) -> None:
    """Their keys have older names."""
    flags = ["--short-seq-len", 8, "--eval-interval", 2]
    assert main(here.flags("--steps", 4, *flags)) == 0
    whole, here.run = here.run, here.path / "older"
    shutil.copytree(whole, here.run)
    file = checkpoint(here.run) / "state.json"
    state = json.loads(file.read_text())
    state["windows"], state["eval_windows"] = state.pop("sequences"), state.pop("eval_sequences")
    state["settings"]["short_windows"] = state["settings"].pop("short_seq_len")
    file.write_text(json.dumps(state))
    for run in (whole, here.run):
        here.run = run
        assert main(here.flags("--steps", 6, *flags, "--resume", "--override", "steps")) == 0
    assert_same_run(here.run, whole, 6)


def test_a_run_without_the_state_of_the_balance_is_resumed(here: Here) -> None:
    """One of an earlier version: the gains begin anew; those of a run that has it go on, in a model of any kind."""
    assert main(here.flags("--steps", 10)) == 0
    file, last = checkpoint(here.run) / "state.json", here.trainer()
    state, new = json.loads(file.read_text()), last.training_step.balance.state.clone()
    last.resume(here.run)
    assert last.training_step.balance.state.tolist() == state["gate_balance"] and not torch.equal(
        last.training_step.balance.state, new
    )
    del state["gate_balance"]
    file.write_text(json.dumps(state))
    last = here.trainer()
    last.resume(here.run)
    assert torch.equal(last.training_step.balance.state, new) and (last.training_step.balance.errors == 0).all()
    here.write_config(n_dense_layers=3, n_mtp_layers=0)
    here.run = here.path / "dense"
    assert main(here.flags("--steps", 2)) == main(here.flags("--steps", 2, "--resume")) == 0


def test_one_writer_at_a_time(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(here.flags("--steps", 2)) == 0
    before = {path: path.stat().st_mtime_ns for path in here.run.rglob("*")}
    with checkpoints.Run(here.run):
        assert_refused(capsys, here.flags("--steps", 4, "--resume", "--override", "steps"), here.run, "another process")
    assert {path: path.stat().st_mtime_ns for path in here.run.rglob("*")} == before
    assert main(here.flags("--steps", 4, "--resume", "--override", "steps")) == 0


def test_torn_metrics_are_dropped(here: Here) -> None:
    assert main(here.flags("--steps", 3)) == 0
    before = lines(here.run)
    with (here.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train_loss": 1}\n{"step": 5, "expert_load": [[1.0]')
    Metrics(checkpoints.Run(here.run), 3).write(step=4, x=0.123456789)
    assert lines(here.run) == [*before, {"step": 4, "x": 0.123457}]


def test_existing_run_is_refused_without_resume(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(here.flags("--steps", 2)) == 0
    before = {p: p.read_bytes() for p in here.run.rglob("*") if p.is_file()}
    assert_refused(capsys, here.flags("--steps", 2), here.run, "--resume")
    assert {p: p.read_bytes() for p in here.run.rglob("*") if p.is_file()} == before


def test_resume_with_another_flag_is_refused(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--optimizer", "muon", "--schedule", "wsd"]
    assert main(here.flags("--steps", 1, *common)) == 0
    before = (here.run / "metrics.jsonl").read_bytes()
    others = {"seed": 1, "batch_size": 3, "accumulation": 2, "optimizer": "adamw", "lr": 0.123, "matrix_lr": 0.123}
    others |= {"momentum": 0.5, "beta1": 0.5, "beta2": 0.5, "weight_decay": 0.5, "grad_clip": 0.5, "warmup": 0.9}
    for key, value in (others | {"schedule": "cosine", "decay": 0.9, "gemm_impl": "fp8"}).items():
        again = ["--steps", 2, "--resume", *common, "--" + key.replace("_", "-"), value]
        assert_refused(capsys, here.flags(*again), here.run, f"{key} = ", str(value))
        assert (here.run / "metrics.jsonl").read_bytes() == before


def test_resume_with_another_config_or_data_is_refused(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(here.flags("--steps", 1)) == 0
    resume = here.flags("--steps", 2, "--resume", "--override", "steps")
    here.write_config(bias_update_speed=0.5)
    assert_refused(capsys, resume, here.run, "bias_update_speed = ", "0.5")
    here.write_config(n_layers=3)
    assert_refused(capsys, resume, here.run, "n_layers = 2", "3")
    here.write_config()
    here.data.write_bytes(text(5000))
    assert_refused(capsys, resume, here.run, "training_bytes = 3600", "4500")
    here.data.write_bytes(text(4000))
    assert main(resume) == 0


def test_garbage_in_metrics_is_dropped(here: Here) -> None:
    assert main(here.flags("--steps", 2)) == 0
    whole = lines(here.run)
    with (here.run / "metrics.jsonl").open("a") as file:
        file.write('{"no": "step"}\nnull}\n{"step": 3, "trai')
    assert main(here.flags("--steps", 2, "--resume")) == 0
    assert lines(here.run) == whole


def test_resume_with_other_data_of_the_same_size_is_refused(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(here.flags("--steps", 1)) == 0
    here.data.write_bytes(text(4000, seed=1))
    assert_refused(capsys, here.flags("--steps", 2, "--resume"), here.run)


def test_damaged_runs_are_refused(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(here.flags("--steps", 1)) == 0
    resume, folder = here.flags("--steps", 2, "--resume"), checkpoint(here.run)
    for file in (folder / "model0-mp1.safetensors", folder / "state0-mp1.safetensors", folder / "state.json"):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert_refused(capsys, resume, file)
        file.write_bytes(whole)
    (here.run / "checkpoints.json").write_text('{"last": "../x"}')
    assert_refused(capsys, resume, here.run / "checkpoints.json")


# --- Given weights ----------------------------------------------------------------------------------------------------


def given_weights(here: Here, **changes: Any) -> Path:
    """A native checkpoint whose weights are far from fresh ones."""
    model = Transformer(ModelArgs.from_dict(TINY | changes))
    shake(model, 4)
    with torch.no_grad():
        for gate in model.gates():
            gate.bias.copy_(torch.linspace(-0.1, 0.1, 4))
    save_model(model, here.path / "given")
    return here.path / "given"


def tune(here: Here, source: Path, run: str, *extra: object) -> list[dict[str, Any]]:
    """The metrics of a short run from given weights, without --config."""
    here.run = here.path / run
    assert main([*here.flags("--steps", 3, "--eval-interval", 2, "--init-from", source, *extra)[2:]]) == 0
    return lines(here.run)


@pytest.mark.parametrize("dtype", [None, "fp8", "bf16"])
def test_formats_and_shards_train_alike(here: Here, dtype: str | None) -> None:
    """Bit for bit; and the first step begins where the model that is loaded for use stands."""
    source = given_weights(here)
    convert(source, here.path / "mp1", dtype=dtype)
    convert(source, here.path / "mp2", 2, dtype=dtype)
    convert(source, here.path / "hf", is_hf=True, dtype=dtype)
    first = tune(here, here.path / "mp1", "run-mp1")
    for name in ("mp2", "hf"):
        assert tune(here, here.path / name, f"run-{name}") == first
        assert_same_run(here.run, here.path / "run-mp1", 3)
        assert json.loads((checkpoint(here.run) / "state.json").read_text())["origin"] == {
            "path": str(here.path / name),
            "kind": "huggingface" if name == "hf" else "native",
            "step": None,
        }
    model, data = load_model(here.path / "hf").train(), np.fromfile(here.data, np.uint8)[:3600]
    batch = torch.from_numpy(np.stack([data[s : s + 33] for s in SequenceSampler(3600, 32, 0).starts(0, 4)])).long()
    assert first[0]["train_loss"] == pytest.approx(model.loss(batch[:, :-1], batch[:, 1:]).next_byte.item(), abs=1e-5)


def test_weights_of_a_run(here: Here, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its best, or a step that is named; the new run begins at step 0, and keeps where it came from."""
    values = iter([1.0, 2.0])
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *_: (next(values), None))
        assert main(here.flags("--steps", 4, "--eval-interval", 2)) == 0
    source = here.run
    for path, step in ((source, 2), (source / "step-00000002", 2), (source / "step-00000004", 4)):
        rows = tune(here, path, f"tuned-{len(str(path))}-{step}")
        assert [row["step"] for row in rows if "train_loss" in row] == [1, 2, 3]
        state = json.loads((checkpoint(here.run) / "state.json").read_text())
        assert state["origin"] == {"path": str(path), "kind": "native", "step": step}
    assert lines(here.path / f"tuned-{len(str(source))}-2") == lines(here.path / f"tuned-{len(str(path))}-2")
    assert lines(here.path / f"tuned-{len(str(path))}-4") != lines(here.path / f"tuned-{len(str(path))}-2")
    # a restart goes on with the run, without its origin too, but not with another
    same = here.flags("--steps", 3, "--eval-interval", 2, "--resume")
    assert main([*same, "--init-from", str(path)]) == 0 and main(same) == 0
    assert_refused(capsys, [*same, "--init-from", str(source)], here.run, path, source)
    here.run = source
    again = here.flags("--steps", 4, "--eval-interval", 2, "--resume", "--init-from", path)
    assert_refused(capsys, again, source, "random weights", path)


def test_a_config_must_be_of_the_given_model(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    source = given_weights(here)
    flags = here.flags("--steps", 2, "--init-from", source, save=False)
    others: dict[str, Any] = {"dim": 64, "n_heads": 4, "n_routed_experts": 8, "score_func": "softmax", "norm_eps": 1e-3}
    others |= {"hidden_act": "gelu", "rope_theta": 5e5, "route_scale": 2.0, "n_layers": 3, "kv_lora_rank": 0}
    others |= {"use_yarn": True, "n_activated_experts": 1, "q_lora_rank": 8, "v_head_dim": 4}
    for key, value in others.items():
        here.write_config(**{key: value})
        was = ModelArgs.from_dict(TINY).to_dict()[key]
        assert_refused(capsys, flags, source, f"{key} = {was}", value)
    # what is free: the context, with YaRN where it becomes longer, storage, and hyper-parameters of training
    free: dict[str, Any] = {"dtype": "bf16", "max_batch_size": 3, "aux_loss_alpha": 0.0, "bias_update_speed": 0.1}
    for changes in (free, {"max_seq_len": 16, "original_seq_len": 16}, {"max_seq_len": 64, "rope_factor": 2.0}):
        here.write_config(**changes)
        args, shape = train.parse_args(flags)
        trainer = train.build_trainer(args, shape, ParallelContext("cpu"))
        assert torch.equal(trainer.model.head.weight, load_model(source).head.weight)
        assert shape.use_yarn == (shape.max_seq_len == 64)
    here.write_config(max_seq_len=64, original_seq_len=64, rope_theta=5e5)
    assert_refused(capsys, flags, source, "rope_theta")


def test_mtp_modules_may_differ(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    source = given_weights(here)
    theirs = load_model(source).state_dict()
    for count, note in ((0, "mtp.0: not taken from"), (2, "mtp.1: drawn anew")):
        here.write_config(n_mtp_layers=count)
        args, shape = train.parse_args(here.flags("--steps", 2, "--init-from", source, "--seed", 7, save=False))
        capsys.readouterr()
        ours = train.build_trainer(args, shape, ParallelContext("cpu")).model
        out = capsys.readouterr().out
        assert note in out and str(source) in out and out.count("\n") == 1
        fresh = Transformer(shape)
        fresh.init_weights(7)
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.get(name, fresh.state_dict()[name])), name
        assert [f"mtp.{k}.norm.weight" in ours.state_dict() for k in range(3)] == [k < count for k in range(3)]


FROZEN = ["--freeze", "layers.0.*", "--freeze", "*gate.weight", "--freeze", "embed.weight"]


@pytest.mark.parametrize("flags", [["--optimizer", "muon"], ["--optimizer", "adamw", "--gradient-checkpointing"]])
def test_frozen_parameters_stay(here: Here, flags: list[object]) -> None:
    """The others move, in the first step, as they do where nothing is frozen."""
    source, built = given_weights(here), []
    before = load_model(source).state_dict()
    for frozen in ([], FROZEN):
        more = ["--steps", 4, "--init-from", source, "--grad-clip", 0, *flags, *frozen]
        args, shape = train.parse_args(here.flags(*more, save=False))
        built.append(train.build_trainer(args, shape, ParallelContext("cpu")))
        built[-1].train_step(0.3)
    plain, trainer = built
    after = trainer.model.state_dict()
    is_frozen = {n: n.startswith(("layers.0.", "embed.")) or ".gate." in n for n in after}
    assert 10 < sum(is_frozen.values()) < len(after) - 10
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name] if is_frozen[name] else plain.model.state_dict()[name]), name
        assert is_frozen[name] or not torch.equal(tensor, before[name]), name
    tensors = train.optimizer_tensors(trainer.model, trainer.optimizers)
    assert tensors.keys() == {name for name, _ in trainer.model.named_parameters() if not is_frozen[name]}
    assert trainer.settings["freeze"] == [n for n, _ in trainer.model.named_parameters() if is_frozen[n]]
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_run_with_frozen_parameters_is_resumed(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = given_weights(here)
    flags = ["--save-interval", 1, *FROZEN]
    tune(here, source, "whole", *flags)
    with monkeypatch.context() as patch:
        before_step(patch, 2, crash)
        here.run = here.path / "crashed"
        assert main(here.flags("--steps", 3, "--eval-interval", 2, "--init-from", source, *flags)) == 1
    # other patterns for the same parameters
    same = [*flags[:-2], "--freeze", "embed.*"]
    tune(here, source, "crashed", *same, "--resume")
    assert_same_run(here.run, here.path / "whole", 3)
    names = set(load_file(checkpoint(here.run) / "state0-mp1.safetensors"))
    assert names and not any(name.startswith(("layers.0.", "embed.")) or ".gate." in name for name in names)
    for other in ([], ["--freeze", "layers.0.*"]):
        again = here.flags("--steps", 3, "--eval-interval", 2, "--resume", "--init-from", source, *other)
        assert_refused(capsys, again, here.run, "freeze = ", "--save-path")


@pytest.mark.parametrize(("pattern", "part"), [("layer.*", "embed.weight"), ("*", "nothing"), ("", "matches no")])
def test_patterns_that_cannot_be(here: Here, capsys: pytest.CaptureFixture[str], pattern: str, part: str) -> None:
    part = "no parameter to train" if part == "nothing" else part
    assert_refused(capsys, here.flags("--steps", 2, "--freeze", pattern), "--freeze", part)
    assert not here.run.exists()


@pytest.mark.parametrize("patterns", [["*norm*", "*gate*", "embed*", "head*"], ["*.w*.weight", "*eh_proj*"]])
def test_one_optimizer_may_have_nothing_to_do(here: Here, patterns: list[str]) -> None:
    """Of matrices and all else, one is frozen whole."""
    args, shape = train.parse_args(here.flags("--steps", 2, *(f"--freeze={pattern}" for pattern in patterns)))
    trainer = train.build_trainer(args, shape, ParallelContext("cpu"))
    trainer.train_step(0.3)
    tensors = train.optimizer_tensors(trainer.model, trainer.optimizers)
    kinds = {is_hidden_matrix(name, dict(trainer.model.named_parameters())[name]) for name in tensors}
    assert kinds == {"head*" in patterns}


# --- Evaluation of a file ---------------------------------------------------------------------------------------------


def loss_of(capsys: pytest.CaptureFixture[str], *flags: object) -> dict[str, Any]:
    """What --eval-only prints as JSON."""
    capsys.readouterr()
    common = ["--eval-only", "--json", "--device", "cpu", "--dtype", "fp32"]
    assert main([str(flag) for flag in (*common, *flags)]) == 0
    return json.loads(capsys.readouterr().out)


@settings(draws, max_examples=12)
@given(st.integers(2, 80), st.integers(1, 30), st.data())
def test_each_byte_is_predicted_once(n_bytes: int, context: int, data: st.DataObject) -> None:
    """Against a loop over bytes: each from the sequence that must predict it, at least context - stride before it."""
    stride, batch_size = data.draw(st.integers(1, context)), data.draw(st.integers(1, 5))
    model = Transformer(ModelArgs.from_dict(TINY | {"max_seq_len": context, "n_mtp_layers": 0}))
    shake(model)
    corpus = np.frombuffer(text(n_bytes, n_bytes), np.uint8)
    found = metrics.evaluate_file(model, corpus, batch_size, ParallelContext("cpu"), stride)
    losses: dict[int, list[float]] = {}
    for target in range(1, n_bytes):
        number = max(0, -(-(target - context) // stride))
        first = number * stride
        assert first == 0 or target - first >= context - stride
        tokens = torch.from_numpy(corpus[first:target].astype(np.int64))[None]
        with torch.no_grad():
            loss = F.cross_entropy(model(tokens)[0, -1:].double(), torch.tensor([int(corpus[target])])).item()
        losses.setdefault(number, []).append(loss)
    every = [loss for group in losses.values() for loss in group]
    assert found["val_loss"] == pytest.approx(np.mean(every), rel=1e-5)
    assert found["val_bpb"] == pytest.approx(np.mean(every) / math.log(2), rel=1e-5)
    assert (found["bytes"], found["sequences"]) == (n_bytes - 1, len(losses))
    means = [np.mean(group) for group in losses.values()]
    if len(losses) > 1 and len({len(group) for group in losses.values()}) == 1:
        assert found["standard_error"] == pytest.approx(np.std(means, ddof=1) / len(means) ** 0.5, rel=1e-3, abs=1e-6)
    assert (found["standard_error"] is None) == (len(losses) == 1)
    expected = sorted(means, reverse=True)[:5]
    assert [row["loss"] for row in found["worst"]] == pytest.approx(expected, rel=1e-5)
    for row in found["worst"]:
        number = max(0, -(-(row["offset"] - context) // stride))
        assert row["bytes"] == len(losses[number]) and row["loss"] == pytest.approx(np.mean(losses[number]), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"moe_layer_freq": 1, "n_mtp_layers": 0}])
def test_the_loss_of_transformers(here: Here, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    source, val = given_weights(here, **changes), here.path / "val.bin"
    convert(source, here.path / "hf", is_hf=True)
    val.write_bytes(text(501, 3))
    data = torch.from_numpy(np.fromfile(val, np.uint8).astype(np.int64))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(here.path / "hf").eval()
    for context in (32, 48):
        total = 0.0
        for first in range(0, 500, context):
            tokens = data[first : first + context + 1]
            with torch.no_grad():
                logits = theirs(tokens[None, :-1], use_cache=False).logits[0]
            total += F.cross_entropy(logits.double(), tokens[1:], reduction="sum").item()
        for path in (source, here.path / "hf"):
            found = loss_of(capsys, "--init-from", path, "--val-data", val, "--context", context)
            assert found["val_loss"] == pytest.approx(total / 500, abs=1e-5) and found["bytes"] == 500


def test_evaluation_writes_nothing(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    source = given_weights(here)
    before = {path: path.stat().st_mtime_ns for path in here.path.rglob("*")}
    val = here.path / "data.txt"
    whole = loss_of(capsys, "--init-from", source, "--val-data", val)
    assert (whole["kind"], whole["step"], whole["path"], whole["bytes"]) == ("native", None, str(source), 3999)
    assert whole["dtype"] == "float32"  # of --dtype fp32
    tenth = loss_of(capsys, "--init-from", source, "--data", val, "--config", here.config)
    assert tenth["bytes"] == 399 and tenth["sequences"] == 13 and "last tenth" in tenth["data"]
    model = load_model(source).eval()
    ours, _ = evaluate(model, np.fromfile(val, np.uint8)[3600:], 7, ParallelContext("cpu"))
    assert tenth["val_loss"] == pytest.approx(ours, rel=1e-6)
    flags = ["--init-from", source, "--val-data", val, "--eval-only", "--device", "cpu", "--dtype", "fp32"]
    assert main([*map(str, flags)]) == 0
    shown = capsys.readouterr().out
    assert f"{whole['val_loss']:.4f} ± {whole['standard_error']:.4f} nats/byte" in shown
    assert f"{whole['worst'][0]['offset']:,}  " in shown and shown.count("\n") == 8
    fp8 = loss_of(capsys, *flags[:4], "--gemm-impl", "fp8")
    assert fp8["val_loss"] == pytest.approx(whole["val_loss"], rel=0.02) and fp8["val_loss"] != whole["val_loss"]
    assert {path: path.stat().st_mtime_ns for path in here.path.rglob("*")} == before


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--eval-only"], "--init-from"),
        (["--eval-only", "--init-from", "SOURCE", "--steps", 2], "--steps is for training"),
        (["--eval-only", "--init-from", "SOURCE", "--save-path", "RUN"], "--save-path is for training"),
        (["--eval-only", "--init-from", "SOURCE", "--freeze", "*"], "--freeze"),
        (["--eval-only", "--init-from", "SOURCE", "--tensorboard"], "--tensorboard is for training"),
        (["--eval-only", "--init-from", "SOURCE", "--device-memory", 3], "--device-memory is for training"),
        (["--eval-only", "--init-from", "SOURCE", "--stride", 33], "--stride must be at most the context (32)"),
        (["--eval-only", "--init-from", "SOURCE", "--stride", 9, "--context", 8], "--stride"),
        (["--eval-only", "--init-from", "SOURCE", "--context", 2**31], "--context"),
        (["--eval-only", "--init-from", "SOURCE", "--val-data", "BYTE"], "--val-data has 1 bytes"),
        (["--eval-only", "--init-from", "SOURCE", "--val-data", "NONE"], "NONE"),
        (["--eval-only", "--init-from", "NONE"], "NONE"),
        (["--steps", 2, "--init-from", "SOURCE", "--json"], "--json is for --eval-only"),
        (["--steps", 2, "--init-from", "SOURCE", "--context", 8], "--context is for --eval-only"),
        (["--steps", 2, "--init-from", "SOURCE", "--val-data", "BYTE"], "--val-data has 1 bytes"),
        (["--steps", 2, "--init-from", "SOURCE", "--data", "BYTE", "--val-data", "DATA"], "byte: 1 bytes are too few"),
        (["--steps", 2], "--config"),
        (["--init-from", "SOURCE", "--steps", 2, "--override", "steps"], "--resume"),
        (["--init-from", "SOURCE", "--steps", 2, "--override", "seed"], "'seed'"),
        (["--init-from", "SOURCE", "--plan", "--freeze", "*"], "--freeze"),
    ],
)
def test_flags_of_given_weights(here: Here, capsys: pytest.CaptureFixture[str], flags: list[object], part: str) -> None:
    given_weights(here)
    (here.path / "byte").write_bytes(b"x")
    places = {"SOURCE": here.path / "given", "BYTE": here.path / "byte", "NONE": here.path / "NONE", "RUN": here.run}
    places["DATA"] = here.data
    argv = [str(places.get(flag, flag)) for flag in flags]
    assert_refused(capsys, argv if "--data" in flags else ["--data", str(here.data), *argv], part)
    assert not here.run.exists()


def test_evaluation_has_no_flag_without_effect(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    source = ["--init-from", str(given_weights(here)), "--data", str(here.data), "--eval-only"]
    used = {"help", "init_from", "data", "eval_only"} | train.SHARED_FLAGS | train.EVAL_FLAGS
    for flag in fields(train.TrainFlags):
        if flag.name not in used:
            name, number = f"--{flag.name.replace('_', '-')}", "0.5" if flag.type is float else "1"
            choices = ["lr"] if flag.name == "override" else flag.metadata.get("choices", [number])
            value = [] if flag.type is bool else choices[:1]
            assert_refused(capsys, [*source, name, *value], f"{name} is for training, not for --eval-only")


def test_contexts_beyond_the_angles(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    source = given_weights(here, original_seq_len=8, rope_factor=8.0)  # YaRN: 64 positions
    flags = ["--init-from", source, "--val-data", here.data]
    assert loss_of(capsys, *flags, "--context", 64)["context"] == 64
    argv = [str(flag) for flag in ("--eval-only", *flags, "--context", 65)]
    assert_refused(capsys, argv, "--context can be 64 at most", "YaRN")


def test_evaluation_on_a_file_of_ones_own(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    """In training, all of --data is trained on then; the two of a resumed run are compared."""
    val = here.path / "val.txt"
    val.write_bytes(text(700, 9))
    assert main(here.flags("--steps", 2, "--val-data", val)) == 0
    assert "4,000 bytes to train on, 700 to validate" in capsys.readouterr().out
    rows = lines(here.run)
    found = loss_of(capsys, "--init-from", here.run, "--val-data", val)
    assert rows[-1]["val_loss"] == pytest.approx(found["val_loss"], rel=1e-5) and found["step"] == 2
    state = json.loads((checkpoint(here.run) / "state.json").read_text())
    assert state["settings"]["training_bytes"] == 4000 and state["settings"]["validation_bytes"] == 700
    val.write_bytes(text(700, 10))
    again = here.flags("--steps", 2, "--resume", "--val-data", val)
    assert_refused(capsys, again, here.run, "validation_crc32", "--override val_data")
    assert_refused(capsys, here.flags("--steps", 2, "--resume"), "--override data,val_data")


# --- Going on with other settings -------------------------------------------------------------------------------------


@draws
@given(fractions, fractions, st.floats(0, 0.999))
def test_a_stretched_schedule_goes_on(progress: float, done: float, begin: float) -> None:
    assert stretch(progress, 0.0, 0.0) == progress  # to the bit
    assert stretch(begin, begin, done) == done and stretch(1.0, begin, done) == pytest.approx(1)
    assert done <= stretch(max(progress, begin), begin, done) <= 1 + 1e-12


def rates_of(run: Path) -> list[float]:
    return [row["lr"] for row in lines(run) if "lr" in row]


def stopped_at(here: Here, monkeypatch: pytest.MonkeyPatch, step: int, *flags: object) -> None:
    with monkeypatch.context() as patch:
        before_step(patch, step, crash)
        assert main(here.flags(*flags, "--save-interval", 1, "--eval-interval", 100)) == 1
    assert checkpoint(here.run).name == f"step-{step:08d}"


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
@pytest.mark.parametrize("stop_at", [0, 1, 8, 17, 20])
def test_a_run_of_another_length_has_no_jump(
    here: Here, capsys: pytest.CaptureFixture[str], kind: str, stop_at: int
) -> None:
    """Warming up, stable, decaying, or over: the rate goes on from where it was, and ends at 0."""
    usual = [0.0, *(schedule((step + 0.5) / 20, kind, 0.2, 0.5) for step in range(20))]
    largest = 1.001 * max(abs(b - a) for a, b in itertools.pairwise(usual))
    for steps in (30, 200):
        trainer = here.trainer("--steps", steps, "--schedule", kind, "--warmup", 0.2)
        trainer.step, trainer.progress = stop_at, max(0.0, (stop_at - 0.5) / 20)
        trainer.override({"steps": 20})
        progress = [trainer.clock.progress(step) for step in range(stop_at, steps)]
        done = [stretch(p, trainer.stretch_from, trainer.stretch_to) for p in progress]
        factors = [usual[stop_at], *(schedule(d, kind, 0.2, 0.5) for d in done)]
        slope = largest * (2 if stop_at == 20 else 1)  # a schedule of the added steps alone
        assert all(abs(b - a) <= slope for a, b in itertools.pairwise(factors)) and factors[-1] <= slope
        is_falling = stop_at == 17 or (stop_at == 8 and kind == "cosine")
        assert max(factors[1:]) == pytest.approx(usual[stop_at] if is_falling else 1, rel=0.1)
        assert not is_falling or factors == sorted(factors, reverse=True)
        out = capsys.readouterr().out
        assert f"--override changes steps from 20 to {steps}; the schedule ({kind}) " in out and "lr from " in out
        assert ("is over, begins anew" in out) == (stop_at == 20)
        assert ("its decay has begun" in out) == (kind == "wsd" and stop_at == 17)


def test_a_changed_run_is_repeated_to_the_bit(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command again, after a crash, when there is nothing left to change."""
    stopped_at(here, monkeypatch, 3, "--steps", 6, "--short-seq-len", 16)
    other = here.path / "other"
    shutil.copytree(here.run, other)
    flags = ["--steps", 9, "--lr", 0.001, "--short-seq-len", 16, "--resume", "--override", "lr,steps"]
    flags += ["--save-interval", 1, "--eval-interval", 4]
    assert main(here.flags(*flags)) == 0
    whole, here.run = here.run, other
    with monkeypatch.context() as patch:
        before_step(patch, 4, crash)  # the first after 3 is its first call
        assert main(here.flags(*flags)) == 1
    assert main(here.flags(*flags)) == 0
    assert_same_run(here.run, whole, 9)


def test_other_rates_and_data_are_taken(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(here.flags("--steps", 4, "--decay", 0, "--warmup", 0)) == 0
    here.data.write_bytes(text(6000, 5))
    flags = ["--steps", 8, "--decay", 0, "--warmup", 0, "--resume", "--lr", 0.0005]
    err = assert_refused(capsys, here.flags(*flags), "--override lr,steps,data", "lr = 0.003 (now 0.0005)")
    assert "training_bytes = 3600 (now 5400)" in err
    assert_refused(capsys, here.flags(*flags, "--override", "lr,steps"), "--override lr,steps,data")
    assert main(here.flags(*flags, "--override", "lr,steps,data")) == 0
    out = capsys.readouterr().out
    assert "lr from 0.003 to 0.0005" in out and "training_bytes from 3600 to 5400" in out and "steps from 4 to 8" in out
    assert rates_of(here.run) == pytest.approx([0.003] * 4 + [0.0005] * 4)
    state = json.loads((checkpoint(here.run, "best") / "state.json").read_text())
    assert state["step"] == 8  # however good a loss on other data was
    assert main(here.flags(*flags)) == 0  # nothing changes any more


def test_data_of_ones_own_is_given_up(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    val = here.path / "val.txt"
    val.write_bytes(text(300, 9))
    assert main(here.flags("--steps", 2, "--val-data", val)) == 0
    assert main(here.flags("--steps", 2, "--resume", "--override", "data,val-data")) == 0
    assert "validation_bytes from 300 to None" in capsys.readouterr().out


def test_runs_of_earlier_versions_have_no_length(here: Here) -> None:
    """Nor a place in the schedule: they go on as they did, whatever their new length."""
    assert main(here.flags("--steps", 4)) == 0
    file = checkpoint(here.run) / "state.json"
    state = json.loads(file.read_text())
    for key in ("progress", "stretch_from", "stretch_to", "n_not_better", "origin"):
        del state[key]
    for key in ("steps", "minutes", "freeze"):
        del state["settings"][key]
    file.write_text(json.dumps(state))
    assert main(here.flags("--steps", 6, "--resume")) == 0
    usual = [0.003 * schedule((step + 0.5) / 6, "wsd", 0.02, 0.5) for step in (4, 5)]
    assert rates_of(here.run)[4:] == pytest.approx(usual)


def test_an_evaluation_at_the_end_ends_the_schedule(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the clock, it may turn out only afterwards that no time is left."""
    clock = Turned(monkeypatch)
    clock.takes(Trainer, "train_step", lambda n: 3.0)
    clock.takes(train, "evaluate", lambda n: 0.1 if n < 2 else 30.0)
    flags = ["--eval-interval", 8, "--schedule", "wsd"]
    assert main(here.flags("--minutes", 1, *flags)) == 0
    state = json.loads((checkpoint(here.run) / "state.json").read_text())
    assert state["progress"] == 1 and state["step"] == 8
    clock.now = 3.0
    assert main(here.flags("--minutes", 3, *flags, "--resume", "--override", "minutes")) == 0
    assert "is over, begins anew" in capsys.readouterr().out


def test_other_minutes(here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By the clock too, the rate goes on from where it was; and from steps to minutes."""
    clock = Turned(monkeypatch)
    clock.takes(Trainer, "train_step", lambda n: 2.0)
    before_step(monkeypatch, 20, lambda: signal.raise_signal(signal.SIGTERM))
    assert main(here.flags("--minutes", 1, "--eval-interval", 10**6)) == 0
    n_before = len(rates_of(here.run))
    clock.now = 3.0
    assert_refused(capsys, here.flags("--minutes", 3, "--resume"), "minutes = 1.0 (now 3.0)", "--override minutes")
    assert main(here.flags("--minutes", 3, "--resume", "--override", "minutes", "--eval-interval", 10**6)) == 0
    rates = rates_of(here.run)
    assert n_before == 21 and len(rates) > 2.5 * n_before
    falling = rates[n_before - 1 :]
    assert all(b <= a * 1.01 for a, b in itertools.pairwise(falling)) and falling[1] > 0.95 * falling[0]
    assert rates[-1] < 0.05 * max(rates) and "its decay has begun" in capsys.readouterr().out
    other = here.flags("--steps", len(rates) + 5, "--resume")
    assert_refused(capsys, other, "--override steps,minutes")


# --- What is kept, and when a run ends --------------------------------------------------------------------------------


def test_kept_checkpoints(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([5.0, 1.0, 4.0, 3.0, 2.0, 2.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: (next(values), None))
    assert main(here.flags("--steps", 12, "--eval-interval", 2, "--save-interval", 1, "--keep", 3)) == 0
    assert sorted(int(path.name[5:]) for path in here.run.glob("step-*")) == [4, 9, 10, 11, 12]
    assert load_model(here.run / "step-00000009").args.dim == 32


def test_patience(here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    values = itertools.chain([3.0, 2.0, 2.5, 2.0, 2.1, 1.0], itertools.repeat(1.5))
    monkeypatch.setattr(train, "evaluate", lambda *_: (next(values), None))
    flags = ["--steps", 20, "--eval-interval", 2, "--log-interval", 1]
    assert main(here.flags(*flags, "--patience", 2)) == 0
    out = capsys.readouterr().out
    assert "--patience: no better loss than 2.0000 in 2 evaluations" in out
    assert out.splitlines()[-1].startswith("step 8, ") and checkpoint(here.run).name == "step-00000008"
    assert "val_loss 2.0000 nats/byte, model in" in out.splitlines()[-1]
    assert checkpoint(here.run, "best").name == "step-00000004"
    before = lines(here.run)
    assert main(here.flags(*flags, "--patience", 2, "--resume")) == 0  # it has ended
    assert lines(here.run) == before and "step 8, " in capsys.readouterr().out.splitlines()[-1]
    assert main(here.flags(*flags, "--patience", 4, "--resume")) == 0  # not yet: the next but one is better
    assert "val_loss 1.5000 nats/byte (the best: 1.0000), model in" in capsys.readouterr().out.splitlines()[-1]
    assert [row["val_loss"] for row in lines(here.run) if "val_loss" in row][:6] == [3.0, 2.0, 2.5, 2.0, 2.1, 1.0]
    assert checkpoint(here.run, "best").name == "step-00000012"


# --- Several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_given_weights_at_every_layout(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes train from given weights, some frozen, and evaluate a file, as one does."""
    import test_parallel

    convert(given_weights(here), here.path / "hf", 1, True)
    here.write_config(n_mtp_layers=0)
    tuned = ["--steps", 3, "--init-from", here.path / "hf", *FROZEN]
    evaluated = ["--init-from", here.path / "given", "--val-data", here.data, "--stride", 24, "--batch-size", 6]
    one = loss_of(capsys, *evaluated)
    assert main(here.flags(*tuned)) == 0
    expected, scenarios = lines(here.run), []
    layouts = {"dp2": [], "mp2": ["--model-parallel", 2], "fsdp2": ["--fsdp"]}
    for name, flags in layouts.items():
        here.run = here.path / name
        resumed = ["--resume", "--override", "steps", *flags]
        scenarios += [{"flags": here.flags(*tuned, *flags)}, {"flags": here.flags(*tuned, *resumed, "--steps", 4)}]
        evaluation = ["--eval-only", "--json", "--device", "cpu", "--dtype", "fp32", *evaluated, *flags]
        scenarios += [{"flags": [str(flag) for flag in evaluation]}]
    first, second = test_parallel.launch(2, scenarios)
    found = [json.loads(line) for line in first.splitlines() if line.startswith("{")]
    assert len(found) == 3 and "{" not in second
    for row in found:
        assert [(w["offset"], w["bytes"]) for w in row["worst"]] == [(w["offset"], w["bytes"]) for w in one["worst"]]
        for key in ("val_loss", "val_bpb", "standard_error", "bytes", "sequences"):
            assert row[key] == pytest.approx(one[key], rel=1e-5)
    weights = load_model(here.path / "hf").state_dict()
    for name in layouts:
        rows = lines(here.path / name)
        assert [row["step"] for row in rows if "train_loss" in row] == [1, 2, 3, 4]
        for ours, theirs in zip(rows[:3], expected, strict=False):
            for key in ("train_loss", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (name, key)
        for key, tensor in load_model(checkpoint(here.path / name)).state_dict().items():
            is_frozen = key.startswith(("layers.0.", "embed.")) or ".gate." in key
            assert torch.equal(tensor, weights[key]) == is_frozen, (name, key)


# --- Real processes ---------------------------------------------------------------------------------------------------

SERVER = """
import json, os, sys, time, traceback
import torch
torch.set_num_threads(1)
import train
for line in sys.stdin:
    argv, log = json.loads(line)
    if (pid := os.fork()) == 0:
        code = 1
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for target in (1, 2):
                os.dup2(out, target)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            train.command.STARTED = time.monotonic()
            code = train.main(argv)
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Processes:
    """Starts the command in a process of its own, without waiting for imports each time: a clean one is forked."""

    def __init__(self, log: Path):
        self.log = log
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )

    def start(self, argv: list[str]) -> int:
        """Starts the command and returns its process id."""
        self.server.stdin.write(json.dumps([argv, str(self.log)]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self) -> int:
        """Waits for its end and returns its exit code, negative for a signal."""
        return int(self.server.stdout.readline())

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(60)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path / "log.txt")
    yield processes
    processes.close()


@pytest.mark.slow
def test_killed_at_random_moments(here: Here, processes: Processes) -> None:
    """SIGKILL while it steps, saves, evaluates, starts or resumes: in the end nobody can tell."""
    steps, kills = 30, 8
    flags = ["--steps", steps, "--eval-interval", 5, "--save-interval", 1, "--batch-size", 2]
    processes.start(here.flags(*flags))
    assert processes.wait() == 0, processes.log.read_text()
    whole, here.run = here.run, here.path / "killed"
    chance, resumed_at, killed = random.Random(kills), [], 0
    pointer = here.run / "checkpoints.json"
    while killed < kills:
        before = pointer.read_bytes() if pointer.exists() else None
        resumed_at.append(json.loads(before)["last"] if before else None)
        pid = processes.start(here.flags(*flags, "--resume"))
        if chance.random() < 0.8:  # else it may die before its first step
            deadline = time.monotonic() + 30
            while (pointer.read_bytes() if pointer.exists() else None) == before and time.monotonic() < deadline:
                time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.08))
        os.kill(pid, signal.SIGKILL)
        code = processes.wait()
        assert code in (0, -signal.SIGKILL), processes.log.read_text()
        if code == 0:
            break
        killed += 1
        if chance.random() < 0.3 and pointer.exists():
            load_model(here.run)  # anybody can read it at any time
    assert killed == kills and len(set(resumed_at)) > killed / 2, resumed_at
    processes.start(here.flags(*flags, "--resume"))
    assert processes.wait() == 0, processes.log.read_text()
    assert_same_run(here.run, whole, steps)
    assert [row["val_loss"] for row in lines(here.run) if "val_loss" in row]
    assert "Traceback" not in processes.log.read_text()


def wait_for_step(here: Here, step: int, process: subprocess.Popen[str]) -> None:
    """Waits until a run has logged a step."""
    deadline, file = time.monotonic() + 60, here.run / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and file.read_text().count("\n") > step:
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached: {process.communicate(timeout=30) if process.poll() is not None else ''}")


@pytest.mark.slow
def test_interrupted_by_the_user(here: Here, processes: Processes) -> None:
    """Ctrl-C, then the system's polite request to end: each is obeyed, saved and told, and can be resumed."""
    flags = ["--steps", 100_000, "--eval-interval", 1_000_000]
    process = subprocess.Popen(
        [sys.executable, TRAIN_PY, *here.flags(*flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    wait_for_step(here, 3, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)  # a bound for a hang alone: the steps left would take hours
    assert process.returncode == 0 and err == ""
    step = json.loads((checkpoint(here.run) / "state.json").read_text())["step"]
    assert f"stopped by SIGINT after step {step}: model in {here.run}" in out.splitlines()[-1]
    assert step >= 3 and lines(here.run)[-1]["step"] == step

    pid = processes.start(here.flags(*flags, "--resume"))
    deadline = time.monotonic() + 60
    while lines(here.run)[-1]["step"] < step + 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(pid, signal.SIGTERM)
    assert processes.wait() == 0
    log = processes.log.read_text()
    later = json.loads((checkpoint(here.run) / "state.json").read_text())["step"]
    assert f"resumed {here.run} at step {step}\n" in log and "Traceback" not in log
    assert f"stopped by SIGTERM after step {later}: model in {here.run}" in log
    assert [row["step"] for row in lines(here.run)] == list(range(1, later + 1)) and later > step


def two_processes(first: list[str], second: list[str]) -> list[tuple[int, str]]:
    """Runs the command in two processes that share a batch; returns their exit codes and what they wrote to stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, TRAIN_PY, *argv],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, argv in enumerate((first, second))
    ]
    errors = [process.communicate(timeout=250)[1] for process in started]
    return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]


@pytest.mark.slow
def test_processes_with_different_flags_are_refused(here: Here) -> None:
    """Before they wait for each other: also where one of them alone would save."""
    (code, err), (other_code, other) = two_processes(here.flags("--steps", 2), here.flags("--steps", 2, save=False))
    assert code == other_code == 2 and not here.run.exists()
    assert f"train.py: error: process 0 has save_path = {here.run}, process 1 has None" in err
    assert err.count("\n") == 1 and other == ""


@pytest.mark.slow
def test_data_of_one_process_that_shrinks(here: Here) -> None:
    """All end with what the last step has made, as the first names the file."""
    short = here.path / "copy.txt"
    short.write_bytes(here.data.read_bytes())
    flags = ["--steps", 100_000, "--eval-interval", 10**6, "--save-interval", 10**6]
    metrics_file = here.run / "metrics.jsonl"

    def shrink() -> None:
        while not metrics_file.exists() or metrics_file.read_text().count("\n") < 3:
            time.sleep(0.02)
        os.truncate(short, 10)

    thread = threading.Thread(target=shrink, daemon=True)
    thread.start()
    (code, err), (other_code, other) = two_processes(here.flags(*flags), here.flags(*flags, data=short))
    assert code == other_code == 2 and other == ""
    assert err.count("\n") == 1 and str(short) in err and str(here.run) in err
    step = json.loads((checkpoint(here.run) / "state.json").read_text())["step"]
    assert step >= 3 and step == lines(here.run)[-1]["step"]


def test_signal_before_the_first_step_and_twice(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_steps = train.train_steps

    def interrupted(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        train_steps(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_steps", interrupted)
        assert main(here.flags("--steps", 2)) == 0
    assert "after step 0" in capsys.readouterr().out
    assert main(here.flags("--steps", 2, "--resume", "--override", "steps")) == 0
    whole, here.run = here.run, here.path / "other"
    assert main(here.flags("--steps", 2)) == 0
    assert lines(here.run) == lines(whole)

    def impatient(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        train_steps(trainer)

    monkeypatch.setattr(train, "train_steps", impatient)
    assert main(here.flags("--steps", 4, "--resume", "--override", "steps")) == 130

    def panicking(*_: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # while the stack is unwound

    monkeypatch.setattr(train, "train_steps", panicking)
    capsys.readouterr()
    assert main(here.flags("--steps", 4, "--resume", "--override", "steps")) == 130
    assert capsys.readouterr().err == ""


def test_a_run_that_lost_its_pointer_goes_on(here: Here) -> None:
    """As after a crash between a checkpoint and the pointer to it: nothing that was trained is swept away."""
    assert main(here.flags("--steps", 4)) == 0
    (here.run / "checkpoints.json").unlink()
    assert main(here.flags("--steps", 6, "--resume", "--override", "steps")) == 0
    assert [row["step"] for row in lines(here.run) if "train_loss" in row] == list(range(1, 7))


def test_a_damaged_state_is_refused(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    """By the name of what is damaged or not there, before anything is changed."""
    assert main(here.flags("--steps", 2)) == 0
    (path,) = here.run.glob("step-*/state.json")
    state, before = json.loads(path.read_text()), (here.run / "metrics.jsonl").read_bytes()
    damaged = [("step", -5), ("step", "x"), ("step", True), ("step", 1.5), ("step", None), ("elapsed_s", "x")]
    damaged += [("stretch_from", 1.0), ("stretch_to", 2), ("progress", None), ("origin", "x"), ("n_not_better", 0.5)]
    damaged += [("elapsed_s", -1e9), ("elapsed_s", None), ("best_val", []), ("eval_sequences", 0), ("settings", 3)]
    balance = state["gate_balance"]
    for value in ("x", 0.5, [], balance[:1], [balance[0], 1], [balance[0], [[0.1]]]):
        damaged.append(("gate_balance", value))
    damaged += [("gate_balance", [balance[0], [[x] * 4] * len(balance[1])]) for x in ("1", None, 2, 10**400)]
    lacking = [{k: v for k, v in state.items() if k != key} for key in ("step", "settings", "best_val", "elapsed_s")]
    bad = [(key, state | {key: value}) for key, value in [*damaged, ("val_loss", -1)]]
    bad += list(zip(("step", "settings", "best_val", "elapsed_s"), lacking, strict=True))
    for key, values in bad:
        path.write_text(json.dumps(values))
        assert_refused(capsys, here.flags("--steps", 4, "--resume"), here.run, repr(key))
        assert (here.run / "metrics.jsonl").read_bytes() == before


def test_damaged_settings_are_not_overridden(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(here.flags("--steps", 2)) == 0
    path = checkpoint(here.run) / "state.json"
    state = json.loads(path.read_text())
    resume = here.flags("--steps", 4, "--resume", "--override", "steps,lr,schedule,data")
    damaged = [("steps", "x"), ("steps", [3]), ("lr", None), ("lr", True), ("lr", -1.0), ("lr", 10**400)]
    for key, value in [*damaged, ("schedule", 3), ("training_bytes", {"a": 1})]:
        path.write_text(json.dumps(state | {"settings": state["settings"] | {key: value}}))
        assert_refused(capsys, resume, here.run, repr(key), "damaged")


class Turned:
    """A clock that the test turns: functions take as long as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, startup_s: float = 3.0):
        self.now, self.monkeypatch = startup_s, monkeypatch
        monkeypatch.setattr(train, "Clock", functools.partial(Clock, now=lambda: self.now, started=0.0))

    def takes(self, owner: Any, name: str, seconds: Callable[[int], float]) -> None:
        """Makes the n-th call of a function, from 0 on, take `seconds(n)`."""
        function, calls = getattr(owner, name), itertools.count()

        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.now += seconds(next(calls))
            return result

        self.monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("minutes", "step", "first", "evaluation", "save"),
    [(0.5, 0.25, 0.25, 1.0, 0.0), (0.8, 0.2, 30.0, 0.4, 0.3), (1, 0.5, 6.0, 3.0, 1.0), (2.8, 0.8, 65.0, 4.0, 2.0)],
)
def test_minutes_are_kept(
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    minutes: float,
    step: float,
    first: float,
    evaluation: float,
    save: float,
) -> None:
    """A run ends in the last 3% of its time, however long its first step, the evaluation and the save take."""
    here.write_config(n_layers=1, n_mtp_layers=0)
    here.data.write_bytes(text(1000))
    clock, seconds = Turned(monkeypatch), 60 * minutes
    clock.takes(Trainer, "train_step", lambda n: step if n else first)
    clock.takes(train, "evaluate", lambda n: evaluation)
    clock.takes(train, "save_run", lambda n: save)
    assert main(here.flags("--minutes", minutes, "--sample-bytes", 20)) == 0
    assert 0.97 * seconds <= clock.now <= seconds
    rows, done = lines(here.run), capsys.readouterr()
    last_step = rows[-1]["step"]
    last = done.out.splitlines()[-1]
    shown = float(re.search("val_loss ([0-9.]+) nats/byte", last)[1])
    assert last.startswith(f"step {last_step}, ") and shown == pytest.approx(rows[-1]["val_loss"], abs=6e-5)
    assert str(here.run) in last and checkpoint(here.run).name == f"step-{last_step:08d}"
    assert all(re.match(r"step \d+ \(", line) for line in done.err.splitlines())  # no warning
    rates = [row["lr"] for row in rows if "lr" in row]
    assert rates[-1] < 0.05 * max(rates) and max(rates) == pytest.approx(0.003)
    assert rates[1] < 0.5 * max(rates)  # the first step does not count as warm-up
    assert len({row["step"] for row in rows if "val_loss" in row}) == sum("val_loss" in row for row in rows)
    assert sum("val_loss" in row for row in rows) * evaluation <= 0.05 * seconds + evaluation


def test_a_sample_ends_when_the_time_does(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine became a hundred times slower after it was measured, the text is shorter."""
    clock = Turned(monkeypatch)
    clock.takes(Trainer, "train_step", lambda n: 0.5)
    clock.takes(model_module.Transformer, "forward", lambda n: 0.5 if n > 3 else 0.005)
    assert main(here.flags("--minutes", 1, "--sample-bytes", 32, "--eval-interval", 10**6)) == 0
    assert 0.97 * 60 <= clock.now <= 60


def test_speed_counts_the_wait_for_a_step_before_an_evaluation(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a wait takes a second: one in each step, one before the line, and one before an evaluation."""
    Turned(monkeypatch).takes(Trainer, "finish_steps", lambda n: 1.0)
    assert main(here.flags("--steps", 8, "--log-interval", 4, "--eval-interval", 3)) == 0
    rows = [json.loads(line) for line in (here.run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "bytes_per_s" in row]
    assert [row["bytes"] / (i + 1) / row["bytes_per_s"] for i, row in enumerate(rows)] == pytest.approx([6.0, 6.0])


@pytest.mark.parametrize("sample_bytes", [0, 16])
def test_kernels_that_are_compiled_first_are_no_measure(
    here: Here, monkeypatch: pytest.MonkeyPatch, sample_bytes: int
) -> None:
    """The first evaluation and the first bytes of a sample take a hundred times as long as later ones, as on a GPU."""
    clock = Turned(monkeypatch)
    clock.takes(Trainer, "train_step", lambda n: 0.2 if n else 4.0)
    clock.takes(model_module.Transformer, "next_byte_loss", lambda n: 0.02 if n else 3.0)
    clock.takes(model_module.Transformer, "forward", lambda n: 0.02 if n > 1 else 2.0)
    assert main(here.flags("--minutes", 1, "--sample-bytes", sample_bytes, "--eval-interval", 10**6)) == 0
    assert 0.97 * 60 <= clock.now <= 60
    trained_s = 0.2 * (lines(here.run)[-1]["step"] - 1)
    assert trained_s > 60 - 3.0 - 4.0 - 3.0 - (4.0 if sample_bytes else 0.0) - 0.06 * 60  # all that was left


def test_a_closing_evaluation_ends_when_the_time_does(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the machine became ten times slower after it was measured, fewer sequences are evaluated."""
    here.data.write_bytes(text(200_000))
    clock = Turned(monkeypatch)
    clock.takes(Trainer, "train_step", lambda n: 0.5)
    clock.takes(model_module.Transformer, "next_byte_loss", lambda n: 0.5 if n > 2 else 0.05)
    clock.takes(train, "save_run", lambda n: 0.5)
    assert main(here.flags("--minutes", 1, "--sample-bytes", 32, "--eval-interval", 10**6)) == 0
    assert 0.95 * 60 <= clock.now <= 60
    row, done = lines(here.run)[-1], capsys.readouterr().out
    assert 32 < row["val_windows"] < 20_000 // 32
    assert f"validated on {row['val_windows']} sequences" in done and "\n\n" not in done


def test_a_run_of_few_steps_is_reported(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one whose first step leaves little time: it goes on while there is any."""
    clock = Turned(monkeypatch, startup_s=5.0)
    clock.takes(Trainer, "train_step", lambda n: 2.0 if n else 41.0)
    assert main(here.flags("--minutes", 0.9)) == 0
    log, err = capsys.readouterr().err.splitlines()
    assert err.startswith("train.py: warning: --minutes 0.9 left time for 4 steps only") and log.startswith("step 1 (")
    assert "5.0 s to start" in err and "41.0 s for the first step" in err
    assert lines(here.run)[-1]["step"] == 4


@pytest.mark.parametrize("save", [False, True])
def test_a_run_without_a_step_fails(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], save: bool
) -> None:
    Turned(monkeypatch, startup_s=7.0)
    assert_refused(capsys, here.flags("--minutes", 0.11, save=save), "--minutes 0.11", "7.0 s to start")
    assert not here.run.exists()


def test_warm_up_is_of_the_training_not_of_the_imports(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run by the clock begins at a low rate, however long the process took to get there."""
    clock = Turned(monkeypatch, startup_s=10.0)
    clock.takes(Trainer, "train_step", lambda n: 0.1)
    rates: list[float] = []
    train_step = Trainer.train_step

    def step(self: Trainer, progress: float) -> dict[str, Any]:
        figures = train_step(self, progress)
        rates.append(figures["lr"] / self.flags.lr)
        if len(rates) == 3:
            self.stop(signal.SIGINT, None)
        return figures

    monkeypatch.setattr(Trainer, "train_step", step)
    assert main(here.flags("--minutes", 1, "--warmup", 0.1, save=False)) == 0
    assert rates[0] < 0.2


# --- Flags and mistakes -----------------------------------------------------------------------------------------------


def test_config_sets_defaults_that_flags_override(here: Here) -> None:
    defaults = {"minutes": 3, "batch_size": 7, "lr": 0.5, "optimizer": "adamw", "compile": True, "grad_clip": 0}
    here.write_config(train=defaults | {"gradient_checkpointing": False})
    plain = ["--config", str(here.config)]
    args, shape = train.parse_args(plain)
    assert (args.minutes, args.steps, args.batch_size, args.lr) == (3, None, 7, 0.5)
    assert args.optimizer == "adamw" and args.compile and not args.gradient_checkpointing and args.grad_clip == 0
    assert shape.dim == 32
    args, _ = train.parse_args([*plain, "--steps", "5", "--lr", "0.25", "--optimizer", "muon"])
    assert (args.minutes, args.steps, args.lr, args.optimizer, args.batch_size) == (None, 5, 0.25, "muon", 7)
    args, _ = train.parse_args([*plain, "--minutes", "9"])
    assert (args.minutes, args.steps) == (9, None)
    here.write_config(train={"steps": 4})
    args, _ = train.parse_args([*plain, "--minutes", "9"])
    assert (args.minutes, args.steps) == (9, None)


@pytest.mark.parametrize(
    "defaults",
    [
        {"stepz": 3},
        {"save_path": "x"},
        {"resume": True},
        {"config": "x"},
        {"help": True},
        {"batch_size": True},
        {"batch_size": "many"},
        {"batch_size": 1.5},
        {"batch_size": None},
        {"batch_size": [3]},
        {"batch_size": 0},
        {"compile": "yes"},
        {"compile": 1},
        {"optimizer": "sgd"},
        {"lr": {}},
        {"steps": -5},
        {"lr": "0.1"},
        {"batch_size": "8"},
        {"seed": 10**40},
        {"minutes": 1e300},
        {"momentum": 1},
        {"schedule": 3},
        {"fsdp": 0},
        {"data": ["a", 3]},
        {"data": []},
        {"data_weights": [1, 0]},
        {"windows": 3},
    ],
)
def test_bad_defaults_in_a_config(here: Here, capsys: pytest.CaptureFixture[str], defaults: dict[str, Any]) -> None:
    here.write_config(train=defaults)
    (key,) = defaults
    err = assert_refused(capsys, here.flags("--lr", 0.1) + (["--steps", "2"] if "steps" not in defaults else []))
    assert key in err or key.replace("_", "-") in err
    assert not here.run.exists()


def test_short_windows_of_older_configs(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    """The old name of --short-seq-len is understood in a config, and a line says so."""
    here.write_config(train={"short_windows": 16, "steps": 3})
    flags, _ = train.parse_args(["--config", str(here.config)])
    assert flags.short_seq_len == 16
    err = capsys.readouterr().err
    assert err.startswith("train.py: warning: ") and "short_seq_len" in err and err.count("\n") == 1
    here.write_config(train={"short_windows": 16, "short_seq_len": 8, "steps": 3})
    with pytest.raises(ConfigError, match="short_seq_len"):
        train.parse_args(["--config", str(here.config)])


@pytest.mark.parametrize("config", sorted(FOLDER.glob("configs/*.json")), ids=lambda path: path.stem)
def test_shipped_configs_are_read(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, _ = train.parse_args(["--config", str(config)])
    assert flags.steps or flags.minutes
    assert capsys.readouterr().err == ""


def test_weights_are_as_many_as_corpora(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, here.flags("--steps", 2, "--data-weights", 1, 2), "--data-weights", "1, got 2")
    assert_refused(capsys, here.flags("--steps", 2, "--data-weights", 0), "--data-weights", "above 0")
    here.write_config(train={"data": ["a", "b"], "data_weights": [3, 0.5], "text_key": "t", "steps": 1})
    flags, _ = train.parse_args(["--config", str(here.config)])
    assert (flags.data, flags.data_weights, flags.text_key) == (["a", "b"], [3.0, 0.5], "t")
    flags, _ = train.parse_args(["--config", str(here.config), "--data", "c", "--data", "d", "e"])
    assert (flags.data, flags.data_weights) == (["c", "d", "e"], None)


def test_a_mixture_is_resumed_to_the_bit(
    here: Here, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "resolve", functools.partial(resolve, data_dir=here.path / "prepared"))
    documents = [text(300, seed).decode("latin-1") for seed in range(10)]
    (here.path / "b.jsonl").write_text("".join(json.dumps({"body": document}) + "\n" for document in documents))
    flags = ["--data", here.path / "b.jsonl", "--text-key", "body", "--data-weights", 3, 1, "--short-seq-len", 8]
    flags = ["--steps", 6, "--accumulation", 2, "--save-interval", 2, *flags]
    assert main(here.flags(*flags)) == 0
    whole, here.run = here.run, here.path / "crashed"

    def crash() -> None:
        raise Crash

    with monkeypatch.context() as patch:
        before_step(patch, 3, crash)
        assert main(here.flags(*flags)) == 1
    assert_refused(capsys, here.flags(*flags, "--data-weights", 1, 1, "--resume"), "data_weights = [3.0, 1.0]")
    assert main(here.flags(*flags, "--resume")) == 0
    assert_same_run(here.run, whole, 6)


NUMBERS = [flag.name for flag in fields(train.TrainFlags) if {int, float} & {flag.type, *get_args(flag.type)}]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["7" * 400, "-" + "8" * 5000, "nan", "1e999", "0x10", "", "\u0663\x1b[2J"])
def test_numbers_beyond_reason(here: Here, capsys: pytest.CaptureFixture[str], name: str, value: str) -> None:
    err = assert_refused(capsys, here.flags(f"--{name.replace('_', '-')}={value}"), name.replace("_", "-"))
    assert len(err) < 300 and err[:-1].isprintable()


def test_help_names_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text_ = " ".join(capsys.readouterr().out.split())
    for flag in fields(train.TrainFlags):
        assert "--" + flag.name.replace("_", "-") in text_ and flag.metadata["help"] in text_
    assert "(default: 0.003)" in text_ and "(default: stdlib)" in text_ and "(default: 10.0)" in text_


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "no such file"),
        ("", "JSON"),
        ("{'dim': 3}", "JSON"),
        ("[]", "object"),
        ('{"dimm": 3}', "dimm"),
        ('{"dim": "3"}', "dim "),
        ('{"dim": true}', "dim "),
        ('{"dim": -1}', "dim "),
        ('{"norm_eps": NaN}', "norm_eps"),
        ('{"train": []}', "train"),
        (json.dumps(TINY | {"vocab_size": 255}), "vocab_size"),
        (json.dumps(TINY | {"n_mtp_layers": 32}), "n_mtp_layers"),
        (json.dumps(TINY | {"n_mtp_layers": 8, "train": {"short_seq_len": 8}}), "length of the sequences (8)"),
        (json.dumps(TINY | {"n_activated_experts": 5}), "n_activated_experts"),
    ],
)
def test_bad_config(here: Here, capsys: pytest.CaptureFixture[str], content: str | None, part: str) -> None:
    here.config.unlink() if content is None else here.config.write_text(content)
    assert_refused(capsys, here.flags("--steps", 2), here.config, part)
    assert not here.run.exists()


def test_bad_data(here: Here, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "resolve", functools.partial(resolve, data_dir=here.path / "prepared"))
    empty, short, folder, binary = (here.path / name for name in ("empty", "short", "folder", "binary"))
    empty.write_bytes(b"")
    short.write_bytes(b"x" * 36)
    folder.mkdir()
    binary.mkdir()
    (binary / "x.bin").write_bytes(bytes(range(256)))
    for data, part in ((here.path / "none", "none"), (empty, empty), (short, "36 bytes"), (folder, folder)):
        assert_refused(capsys, here.flags("--steps", 2, data=data), part)
    assert_refused(capsys, here.flags("--steps", 2, data=binary), binary)
    assert_refused(capsys, here.flags("--steps", 2, data=""))
    assert not here.run.exists()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ([], "--minutes"),
        (["--steps", 2, "--minutes", 1], "--steps"),
        (["--steps", 0], "--steps"),
        (["--steps", -1], "--steps"),
        (["--steps", "x"], "--steps"),
        (["--steps", 1.5], "--steps"),
        (["--minutes", 0], "--minutes"),
        (["--minutes", -1], "--minutes"),
        (["--minutes", "nan"], "--minutes"),
        (["--minutes", "inf"], "--minutes"),
        (["--steps", 2, "--batch-size", 0], "--batch-size"),
        (["--steps", 2, "--accumulation", -2], "--accumulation"),
        (["--steps", 2, "--short-seq-len", 5], "--short-seq-len must divide max_seq_len (32)"),
        (["--steps", 2, "--lr", -0.1], "--lr"),
        (["--steps", 2, "--lr", "nan"], "--lr"),
        (["--steps", 2, "--matrix-lr", 0], "--matrix-lr"),
        (["--steps", 2, "--weight-decay", -1], "--weight-decay"),
        (["--steps", 2, "--momentum", 1.1], "--momentum"),
        (["--steps", 2, "--beta1", -0.1], "--beta1"),
        (["--steps", 2, "--beta1", 1], "--beta1"),
        (["--steps", 2, "--beta2", 1], "--beta2"),
        (["--steps", 2, "--warmup", 2], "--warmup"),
        (["--steps", 2, "--seed", -1], "--seed"),
        (["--steps", 2, "--seed", 10**30], "--seed"),
        (["--steps", 2, "--log-interval", 0], "--log-interval"),
        (["--steps", 2, "--eval-interval", -1], "--eval-interval"),
        (["--steps", 2, "--optimizer", "sgd"], "--optimizer"),
        (["--steps", 2, "--step", 3], "--step"),
        (["--steps", 2, "extra"], "extra"),
    ],
)
def test_bad_flags(here: Here, capsys: pytest.CaptureFixture[str], flags: list[object], part: str) -> None:
    assert_refused(capsys, here.flags(*flags), part)
    assert not here.run.exists()


def test_resume_needs_a_path(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, here.flags("--steps", 2, "--resume", save=False), "--resume", "--save-path")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_missing_device(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, here.flags("--steps", 2, "--device", "cuda"), "cuda")
    assert not here.run.exists()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_save_path_that_cannot_be(here: Here, capsys: pytest.CaptureFixture[str], resume: bool, inside: bool) -> None:
    (here.path / "file").write_text("mine")
    here.run = here.path / "file" / "run" if inside else here.path / "file"
    assert_refused(capsys, here.flags("--steps", 2, *(["--resume"] if resume else [])), here.path / "file")
    assert (here.path / "file").read_text() == "mine"


# --- Terminals and systems --------------------------------------------------------------------------------------------


@given(st.text())
@draws
def test_printable_obeys_no_text(value: str) -> None:
    shown = visible(value)
    assert all(unicodedata.category(c) not in ("Cc", "Cf") or c in "\n\t" for c in shown)
    kept = [c for c in value if unicodedata.category(c) not in ("Cc", "Cf") or c in "\n\t"]
    assert len(shown) >= len(value) and (len(kept) < len(value) or shown == value)


def test_sample_cannot_write_escapes(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "sample_text", lambda *_: "a\x1b[31mred\x07\r\x9b\u202e\x7fé\n\tb")
    assert main(here.flags("--steps", 1, "--sample-bytes", 9, save=False)) == 0
    out = capsys.readouterr().out
    assert "a\\x1b[31mred\\x07\\r\\x9b\\u202e\\x7fé\n\tb\n" in out
    assert all(unicodedata.category(c) not in ("Cc", "Cf") or c in "\n\t" for c in out)


def test_sample_is_text_of_the_model(here: Here) -> None:
    model = here.trainer().model
    shake(model)
    sample = train.sample_text(model, 1000, "cpu")
    assert sample == train.sample_text(model, 1000, "cpu") and len(sample) <= 32 and model.training
    assert train.sample_text(model, 0, "cpu") == ""


@pytest.mark.slow
def test_output_that_takes_ascii_only(here: Here) -> None:
    """A log file may have an encoding that a fresh model's sample does not fit: that is no reason to die."""
    command = [sys.executable, TRAIN_PY, *here.flags("--steps", 1, "--sample-bytes", 32)]
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=200)
    assert done.returncode == 0 and not done.stderr and done.stdout.isascii() and b"\\" in done.stdout


def test_without_mallopt(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        """A C library that has no such function."""

    def missing(error: Exception) -> Callable[[None], None]:
        def load(_: None) -> None:
            raise error

        return load

    for load in (lambda _: Library(), missing(OSError("none")), missing(TypeError("no name"))):
        monkeypatch.setattr(ctypes, "CDLL", load)
        keep_freed_memory()


def test_optimizer_state_goes_where_its_parameter_is(here: Here) -> None:
    """AdamW's fused kernel wants its step count on the device too; the meta device stands for a GPU here."""
    trainer = here.trainer()
    trainer.train_step(0.3)
    tensors = train.optimizer_tensors(trainer.model, trainer.optimizers)
    model = trainer.model.to("meta")
    optimizers = train.make_optimizers(model, trainer.flags, torch.float32)
    train.load_optimizer_tensors(model, optimizers, lambda name, *_: tensors[name], ParallelContext("cpu"))
    for optimizer in optimizers:
        assert {t.device.type for state in optimizer.state.values() for t in state.values()} == {"meta"}


def test_checkpoint_loads_back_into_the_trainer(here: Here) -> None:
    """The state that is saved is all there is: names of parameters, and two figures or one for each."""
    assert main(here.flags("--steps", 2)) == 0
    trainer = here.trainer()
    read, state = load_run(here.run, trainer.model)
    kinds = set()
    for name, p in trainer.model.named_parameters():
        found = read(name, p, STATE_KEYS["Muon" if is_hidden_matrix(name, p) else "AdamW"])
        assert found and all(tensor.shape in ((), p.shape) for tensor in found.values())
        kinds |= found.keys()
    assert kinds == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    assert state["step"] == 2 and state["settings"]["training_bytes"] == 3600
    file = checkpoint(here.run) / "state0-mp1.safetensors"
    save_file(load_file(file) | {"other.weight.exp_avg": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="other.weight.exp_avg"):
        load_run(here.run, trainer.model)
