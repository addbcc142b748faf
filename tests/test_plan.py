"""Plans of training runs, compared with the memory and traffic of real steps."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parallel import CONFIG, Runs, launch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import parallel
import plan
import train
from checkpoint import read_config
from model import ModelArgs
from train import is_hidden_matrix, optimizer_tensors

# DeepSeek's configs/config_671B.json
V3 = {"vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61, "n_dense_layers": 3}
V3 |= {"n_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "n_activated_experts": 8, "n_expert_groups": 8}
V3 |= {"n_limited_groups": 4, "route_scale": 2.5, "score_func": "sigmoid", "q_lora_rank": 1536, "kv_lora_rank": 512}
V3 |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "dtype": "fp8"}


OPERATORS = {
    "c10d::allreduce_": "sum",
    "c10d::allreduce_coalesced_": "sum of a bucket",
    "c10d::_allgather_base_": "gather",
    "c10d::_reduce_scatter_base_": "scatter",
    "c10d::allgather_": "all gather",
    "c10d::alltoall_base_": "all to all",
}
ACTIVATIONS, REPLICATED = "activations, all-reduced", "replicated gradients, all-reduced"
GRADIENTS = "gradients, all-reduced"
GATHERED, SCATTERED = "parameters, all-gathered", "gradients, reduce-scattered"
MUON = "matrices for Muon, exchanged"


class Traffic(TorchDispatchMode):
    """Counts the bytes that this process sends by operator, of full tensors where they are gathered or scattered."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.is_muon = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (what := OPERATORS.get(func._schema.name)) is not None:
            sizes = [t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            if func._schema.name == "c10d::allgather_":  # has a list of shards, and this process's own
                sizes = [sum(sizes) - sizes[-1]]
            sizes = [sum(sizes)] if "coalesced" in func._schema.name else sizes
            self.sent["Muon" if self.is_muon else what] += max(sizes)
        return result


class Saved:
    """Counts the bytes that autograd saves in the last forward pass of a trainer's loss, but for the weights."""

    def __init__(self, trainer: train.Trainer):
        self.loss, self.storages, self.weights = trainer.loss, {}, list(trainer.model.state_dict().values())
        trainer.training_step.loss = self

    def __call__(self, *inputs: torch.Tensor) -> Any:
        self.storages.clear()
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
            return self.loss(*inputs)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage  # kept, so that no other is taken for it
        return tensor

    @property
    def size(self) -> int:
        weights = {t.untyped_storage().data_ptr() for t in self.weights}
        return sum(s.nbytes() for s in self.storages.values() if s.data_ptr() not in weights)


def check_plan(flags: list[str]) -> None:
    """Compares the plan of these processes with the memory and traffic of a step."""
    args, shape = train.parse_args(flags)
    world = int(os.environ["WORLD_SIZE"])
    planned_args, _ = train.parse_args([*flags, "--plan", "--world-size", str(world)])
    states = lambda name, p: 1 if args.optimizer == "muon" and is_hidden_matrix(name, p) else 2  # noqa: E731
    planned = plan.make_plan(shape, planned_args, torch.float32, states)
    ctx = parallel.ParallelContext.join("cpu", args.model_parallel, args.fsdp)
    trainer = train.build_trainer(args, shape, ctx)
    traffic, saved = Traffic(), Saved(trainer)
    trainer.optimizers[0].register_step_pre_hook(lambda *_: setattr(traffic, "is_muon", True))
    trainer.optimizers[0].register_step_post_hook(lambda *_: setattr(traffic, "is_muon", False))
    with traffic:
        trainer.train_step(0.5)
    figures = traffic.sent["sum"] - sum(planned.traffic.get(name, 0) for name in (ACTIVATIONS, REPLICATED))
    assert 0 <= figures < 200, figures  # the losses, the norm and the load of each expert
    for what, name in (("sum of a bucket", GRADIENTS), ("gather", GATHERED), ("scatter", SCATTERED), ("Muon", MUON)):
        assert traffic.sent[what] == planned.traffic.get(name, 0), (what, traffic.sent, planned.traffic)
    if not args.fsdp and not args.gradient_checkpointing:  # else not all is saved in the forward pass
        assert saved.size == pytest.approx(planned.memory["activations"], rel=2e-3)
    here = sum(ctx.local_shard(p)[0].numel() for p in trainer.model.parameters())
    most = max(ctx.all_reduce_max(here))
    assert 4 * most == planned.memory["parameters"] == planned.memory["gradients"]
    kept = optimizer_tensors(trainer.model, trainer.optimizers)
    numbers = sum(ctx.local_shard(t)[0].numel() for state in kept.values() for t in state.values() if t.ndim)
    assert 4 * max(ctx.all_reduce_max(numbers)) == planned.memory["optimizer state"]
    parallel.destroy()


class Flags:
    """The flags of train.py that a plan reads, at their defaults."""

    batch_size, accumulation, world_size, model_parallel = 4, 1, 1, 1
    fsdp = gradient_checkpointing = False
    gemm_impl, optimizer, dtype, device, compile = "bf16", "adamw", "fp32", "cpu", False

    def __init__(self, **values: Any):
        vars(self).update(values)


def planned(**flags: Any) -> plan.Plan:
    return plan.make_plan(ModelArgs.from_dict(CONFIG), Flags(**flags), torch.float32, lambda name, p: 2)


def test_a_plan_of_one_process_counts_every_parameter() -> None:
    alone = planned()
    with torch.device("meta"):
        numel = sum(p.numel() for p in plan.Transformer(ModelArgs.from_dict(CONFIG)).parameters())
    assert alone.memory["parameters"] == alone.memory["gradients"] == 4 * numel
    assert alone.memory["optimizer state"] == 8 * numel and alone.traffic == {}


def test_plans_divide_among_ranks() -> None:
    """FSDP keeps a quarter on each of 4 ranks, rounded up; tensor parallelism halves activations' inner sizes alone."""
    alone, fsdp, tensor = planned(), planned(world_size=4, fsdp=True), planned(world_size=2, model_parallel=2)
    assert alone.memory["parameters"] / 4 <= fsdp.memory["parameters"] < alone.memory["parameters"] / 3.9
    assert alone.memory["parameters"] / 2 < tensor.memory["parameters"] < alone.memory["parameters"]
    assert set(tensor.traffic) == {ACTIVATIONS, REPLICATED} and set(fsdp.traffic) == {GATHERED, SCATTERED}
    with pytest.raises(parallel.ParallelError, match="--batch-size 4 cannot be shared by 3 processes; take 3 or 6"):
        planned(world_size=3)
    with pytest.raises(parallel.ParallelError, match="at most"):
        planned(world_size=10**15)


@pytest.mark.parametrize("layers", [(5, 0, 1), (8, 3, 2), (2, 4, 1)])
@pytest.mark.parametrize(
    "flags", [{}, {"world_size": 4, "model_parallel": 2, "fsdp": True, "gradient_checkpointing": True}]
)
def test_deep_models_are_measured_by_their_kinds_of_layers(layers: tuple[int, int, int], flags: dict[str, Any]) -> None:
    names = ("n_layers", "n_dense_layers", "moe_layer_freq")
    args = ModelArgs.from_dict(CONFIG | dict(zip(names, layers, strict=True)) | {"n_mtp_layers": 2})
    flags, states = Flags(**flags), lambda name, p: 1 if p.ndim == 2 else 2
    ctx = parallel.ParallelContext("cpu", flags.world_size, 0, flags.model_parallel, flags.fsdp)
    full = plan._measure(args, flags, torch.float32, states, ctx)
    made = plan.make_plan(args, flags, torch.float32, states)
    made.traffic.pop(MUON, None)  # follows from the matrices, which the processes divide
    assert (made.memory, made.traffic, made.n_params) == (full.memory, full.traffic, full.n_params)
    assert made.matrices == full.matrices


def test_many_layers_cost_no_more_than_few(monkeypatch: pytest.MonkeyPatch) -> None:
    args, depths, measure = ModelArgs.from_dict(CONFIG | {"n_layers": 4000, "n_dense_layers": 1500}), [], plan._measure
    monkeypatch.setattr(plan, "_measure", lambda args, *more: depths.append(args.n_layers) or measure(args, *more))
    made = plan.make_plan(args, Flags(), torch.float32, lambda name, p: 2)
    assert depths == [2, 3, 3]
    assert made.memory["parameters"] == 4 * made.n_params[0] > 4000 * 4 * 32 * 64


def test_a_plan_shows_whether_it_fits() -> None:
    args, flags = ModelArgs.from_dict(CONFIG), Flags(world_size=2)
    made = planned(world_size=2)
    for memory, verdict in ((made.total / 1e9, "\nfits in"), (made.total / 1.01e9, "\ndoes not fit in"), (None, None)):
        text = plan.show(made, args, flags, memory)
        assert (verdict in text) if verdict else ("fit" not in text)
        assert "2 processes: 2 data-parallel × 1 tensor-parallel, 2 × 32 positions" in text


# configs, batch size, accumulation, and the peak that torch.cuda.max_memory_allocated() found on an H100, in GB, when
# each router kept a copy of its input in float32, which is subtracted
MEASURED = [("small", 64, 1, 5.7), ("bytegpt", 16, 1, 7.6), ("bytegpt", 64, 1, 26.5), ("base", 16, 4, 15.2)]
MEASURED += [("base", 32, 1, 23.3), ("base", 32, 2, 24.8), ("base", 64, 1, 42.4), ("large", 8, 1, 46.8)]


@pytest.mark.parametrize(("config", "batch_size", "accumulation", "peak"), MEASURED)
def test_plans_are_what_a_gpu_held(
    config: str, batch_size: int, accumulation: int, peak: float, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(plan.__file__).parent / "configs" / f"{config}.json"
    flags = ["--config", path, "--batch-size", batch_size, "--accumulation", accumulation, "--plan"]
    assert train.main([str(flag) for flag in flags]) == 0
    text, args = capsys.readouterr().out, read_config(path)[0]
    routers = sum(args.is_moe(i) for i in range(args.n_layers + args.n_mtp_layers))
    peak -= routers * batch_size * args.max_seq_len * args.dim * 4 / 1e9
    assert float(re.search(r"(?m)^  at most at a time +([\d.]+) GB$", text)[1]) == pytest.approx(peak, rel=0.05)


@pytest.mark.slow
def test_plans_equal_the_memory_and_traffic_of_a_step(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    layouts: list[list[object]] = [[], ["--model-parallel", 2, "--gradient-checkpointing"]]
    layouts += [["--fsdp", "--optimizer", "adamw", "--accumulation", 2], ["--accumulation", 2]]
    for world, flags in ((2, layouts), (4, [["--model-parallel", 2, "--fsdp"], ["--model-parallel", 2]])):
        scenarios = [{"flags": runs.flags("planned", *more, steps=2)} for more in flags]
        launch(world, [{"call": "test_plan.check_plan", "args": scenario} for scenario in scenarios])


def test_plan_of_the_671b_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of 16 ranks has a sixteenth of nearly all 682.6 billion numbers, and FSDP divides that again."""
    (tmp_path / "v3.json").write_text(json.dumps(V3 | {"n_mtp_layers": 1, "max_seq_len": 4096}))
    flags = ["--config", str(tmp_path / "v3.json"), "--plan", "--world-size", "2048", "--model-parallel", "16"]
    flags += ["--batch-size", "128", "--gradient-checkpointing", "--device-memory", "80"]
    assert train.main([*flags, "--fsdp"]) == 0
    text = capsys.readouterr().out
    memory = {m[1].strip(): float(m[2].replace(",", "")) for m in re.finditer(r"(?m)^  (.{36}) *([\d.,]+) GB$", text)}
    assert "682,6" in text and "128 data-parallel × 16 tensor-parallel" in text and "\nfits in 80 GB" in text
    experts = 59 * 16 * 3 * 7168 * 2048 * 4 / 1e9  # of a tensor-parallel rank, which has 16 of a layer's
    assert experts / 16 < memory["parameters"] < experts / 16 + 0.05 * experts
    assert train.main(flags) == 0
    assert "does not fit in 80 GB" in capsys.readouterr().out
