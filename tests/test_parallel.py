"""Training over several processes, on gloo: whatever their layout, they must compute what one process does.

Run as a script, this file is one of the processes: it goes through a list of scenarios, one after the other.
"""

import getpass
import importlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench")]

import soak  # noqa: E402
from conftest import TINY  # noqa: E402

import command  # noqa: E402
import convert  # noqa: E402
import generate  # noqa: E402
import model as model_module  # noqa: E402
import parallel  # noqa: E402
import train  # noqa: E402
from checkpoint import save_model  # noqa: E402
from model import ModelArgs, Transformer  # noqa: E402
from safetensors_io import CheckpointError  # noqa: E402

# twice as wide, so that four ranks have something of each tensor
CONFIG = TINY | {"max_seq_len": 32, "original_seq_len": 32, "dtype": "bf16", "aux_loss_alpha": 0.01}
CONFIG |= {"dim": 32, "inter_dim": 64, "moe_inter_dim": 32, "moe_layer_freq": 1, "n_heads": 4, "q_lora_rank": 16}
CONFIG |= {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
PLAIN = CONFIG | {"q_lora_rank": 0, "kv_lora_rank": 0, "n_routed_experts": 0, "n_mtp_layers": 0}
SMALL = CONFIG | {"n_layers": 1, "n_dense_layers": 0, "n_mtp_layers": 0}  # takes less to compile
STEPS = 12


# --- In each process ----------------------------------------------------------------------------------------------


def noisy(name: str, index: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Weights none of which is zero or equal to another: what starts at zero would hide faults."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + index)) * 0.2 + (len(shape) == 1)


def reference_gradients(args: ModelArgs, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[Transformer, Any]:
    """What a single process computes, without anything of parallel.py."""
    model = Transformer(args)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            p.copy_(noisy(name, i, p.shape, 0))
    losses = model.train().loss(tokens, targets)
    losses.total.backward()
    return model, losses


def check_gradients(config: dict[str, Any], mp: int, shards: bool, checkpointing: bool) -> None:
    """Compares this rank's gradients, and the clipped norm, with their slices of the full model's."""
    args = ModelArgs.from_dict(config)
    batch = torch.randint(256, (8, 33), generator=torch.Generator().manual_seed(5))
    ctx = parallel.ParallelContext.join("cpu", mp, shards)
    full, expected = reference_gradients(args, batch[:, :-1], batch[:, 1:])
    net = parallel.build(ctx, args, torch.float32)
    parallel.init_weights(ctx, net, 0)
    net.train().gradient_checkpointing = checkpointing
    compute = parallel.parallelize(ctx, net, compiles=False)
    mine = batch[ctx.data_parallel_slice(8)]
    losses = compute(mine[:, :-1], mine[:, 1:])
    losses.total.backward()
    parallel.finish_gradients(ctx, net)
    load = ctx.all_reduce_dp(losses.load.clone())
    assert torch.equal(load, expected.load)
    balance = ctx.all_reduce_dp(losses.balance / ctx.dp_size)
    torch.testing.assert_close(balance, expected.balance, rtol=1e-5, atol=0)
    shapes = {name: tuple(p.shape) for name, p in full.named_parameters()}
    gradients = {name: p.grad for name, p in full.named_parameters()}
    norm = nn.utils.get_total_norm(list(gradients.values()))
    for name, p in net.named_parameters():
        box = parallel.local_slice(name, p, shapes[name], ctx)
        shard, _ = ctx.local_shard(p.grad)
        wanted = gradients[name].reshape(-1, shapes[name][-1])[box.top : box.bottom, box.left : box.right]
        torch.testing.assert_close(
            shard.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-5 * gradients[name].abs().max().item(), msg=name
        )
    torch.testing.assert_close(parallel.clip_grad_norm(ctx, net, 0.1), norm, rtol=1e-5, atol=0)
    parallel.destroy()


def check_full_matrices(mp: int, fsdp: bool) -> None:
    """A function of full matrices is computed once for each, and this rank gets its shards of the results."""
    ctx = parallel.ParallelContext.join("cpu", mp, fsdp)
    args = ModelArgs.from_dict(CONFIG | {"q_lora_rank": 5})  # rows that two or four ranks cannot share evenly
    net = parallel.build(ctx, args, torch.float32)
    parallel.init_weights(ctx, net, 0)
    parallel.parallelize(ctx, net, compiles=False)
    full, _ = reference_gradients(args, torch.zeros(1, 4).long(), torch.zeros(1, 4).long())
    matrices = dict(full.named_parameters())
    n_seen = 0

    def transform(x: torch.Tensor) -> torch.Tensor:
        nonlocal n_seen
        n_seen += int((x != 0).any(dim=(1, 2)).sum())
        return x.cumsum(1).cumsum(2)  # of which each number depends on others

    for name, p in net.named_parameters():
        if parallel.is_matrix(name, p.shape):
            shards, shape = parallel.matrix_shards(ctx, p)
            local = parallel.local_matrices(ctx, p, p.detach())
            result, exchange = parallel.map_full_matrices(shards, torch.cat([local, 2 * local, -local]), transform)
            if exchange is not None:
                exchange.wait()
            box = parallel.local_slice(name, p, tuple(matrices[name].shape), ctx)
            wanted = matrices[name].detach().cumsum(-2).cumsum(-1).reshape(-1, shape[1])
            wanted = wanted[box.top : box.bottom, box.left : box.right]
            for scaled, factor in zip(result.chunk(3), (1, 2, -1), strict=True):
                here = scaled.reshape(-1, scaled.shape[-1])[: len(wanted)]  # without the padding of FSDP's last rank
                torch.testing.assert_close(here, factor * wanted, rtol=1e-6, atol=1e-6, msg=name)
    seen = torch.tensor(n_seen)
    torch.distributed.all_reduce(seen)
    assert seen == 3 * sum(
        p.numel() // p.shape[-1] // p.shape[-2] for n, p in matrices.items() if parallel.is_matrix(n, p.shape)
    )
    parallel.destroy()


def check_collectives() -> None:
    """An error or a setting of one rank is an error of both, with its message, and then they go on."""
    ctx = parallel.ParallelContext.join("cpu")
    with pytest.raises(parallel.CollectiveError, match="^Is a directory: some/file$"), ctx.collective_section():
        if ctx.rank == 1:
            raise IsADirectoryError(21, "Is a directory", "some/file")
    with pytest.raises(parallel.CollectiveError, match="^ValueError$"), ctx.collective_section():
        raise ValueError
    ctx.require_equal({"lr": 0.1, "save_path": None})
    with pytest.raises(parallel.ParallelError, match="process 0 has save_path = None, process 1 has there"):
        ctx.require_equal({"lr": 0.1, "save_path": Path("there") if ctx.rank else None})
    with pytest.raises(parallel.ParallelError, match="process 0 has only = None, process 1 has here"):
        ctx.require_equal({"only": "here"} if ctx.rank else {})
    assert ctx.broadcast_bytes(lambda: None if ctx.rank else b"typed") == b"typed"
    assert ctx.all_reduce_max(ctx.rank, -ctx.rank) == [1, 0] and ctx.broadcast(ctx.rank + 5) == [5]
    assert ctx.all_reduce_dp(torch.tensor([2.0])).item() == 4
    parallel.destroy()


def check_recording(flags: list[str]) -> None:
    """All processes replay what they have recorded, or none of them; the steps are those that are launched.

    With FSDP, all fail in a backward pass, as collectives are not recorded here, but wait for those of the others.
    """
    parsed, shape = train.parse_args(flags)
    ctx = parallel.ParallelContext.join("cpu", 1, parsed.fsdp)
    trainers, ended = [], []

    class Graph:
        """Stands for a CUDA graph: what runs within it is not run, but each time that it is replayed."""

        failing: list[int] = []  # ranks that cannot record

        def __enter__(self) -> None:
            self.step = trainers[-1].training_step
            self.run, self.loss = self.step._run, self.step.loss
            if ctx.rank in self.failing:
                self.step.loss = self.fail
                return
            self.run, self.step._run = self.step._run, lambda batches: torch.full((5,), float("nan"))

        def __exit__(self, *_: object) -> None:
            self.step._run = self.run

        def fail(self, *inputs: torch.Tensor) -> None:
            def refuse(*_: object) -> None:
                raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

            self.step.loss = self.loss
            if ctx.fsdp:
                self.loss(*inputs).total.backward()
                norm = self.step.model.norm.register_forward_hook(lambda _, inputs, y: y.register_hook(refuse) and None)
                losses = self.loss(*inputs)
                norm.remove()
                losses.total.backward()
            refuse()

        def replay(self) -> None:
            self.step._figures = self.run(self.step._batches)

        def reset(self) -> None:
            ended.append(self)

    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, lambda graph, **_: graph  # type: ignore[misc, assignment]
    for Graph.failing, replays in (([], False), ([], True), ([0, 1] if ctx.fsdp else [1], True)):
        trainers.append(train.build_trainer(parsed, shape, ctx))
        trainers[-1].training_step.replays = replays
        for _ in range(6):
            trainers[-1].train_step(0.4)
        trainers[-1].finish_steps()
    launched, replayed, refused = trainers
    assert launched.figures == replayed.figures == refused.figures
    assert refused.training_step.graph is None and not refused.training_step.replays
    parallel.destroy()
    assert ended == [replayed.training_step.graph]  # NCCL would wait for ever


def check_rendezvous() -> None:
    """In a store that has the keys of starts before, each start gets a prefix of its own: no rank takes an old one."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    launch = parallel.read_launch()
    kept = parallel._connect(launch, parallel.TIMEOUT)  # rank 0 serves it, as torchrun would
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    kept.set("request of 1", "left by a process that was killed")
    for start in range(3):
        store = parallel._rendezvous(launch, parallel.TIMEOUT)
        store.set(f"address of {launch.rank}", str(start))
        assert store.get(f"address of {1 - launch.rank}").decode() == str(start)  # not of the start before
    kept.set(f"done {launch.rank}", "")
    kept.wait([f"done {1 - launch.rank}"])
    if launch.rank == 0:  # the store ends with it
        time.sleep(0.5)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def work(scenarios: list[dict[str, Any]]) -> None:
    """Goes through the scenarios; each has a port of its own for the rendezvous."""
    model_module.draw_weight = parallel.draw_weight = noisy
    streams = sys.stdout, sys.stderr
    for scenario in scenarios:
        sys.stdout, sys.stderr = streams  # of a process that prints nothing, generate.py closes them
        os.environ["MASTER_PORT"] = str(scenario["port"])
        torch.manual_seed(0)
        if "call" in scenario:
            module, _, function = scenario["call"].rpartition(".")
            owner = importlib.import_module(module) if module else sys.modules[__name__]
            getattr(owner, function)(**scenario.get("args", {}))
        else:
            main = train.main if scenario.get("command", "train") == "train" else generate.main
            try:
                code = main(scenario["flags"] + scenario.get("of_1", []) * int(os.environ["RANK"]))
            except SystemExit as error:
                code = error.code
            assert code == scenario.get("code", 0), (code, scenario)


# --- The tests --------------------------------------------------------------------------------------------------------


def free_port() -> int:
    """A port that stays free: below those that the system gives to connections, of which other tests make many."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def launch(world: int, scenarios: list[dict[str, Any]], timeout: float = 400) -> list[str]:
    """Runs scenarios in `world` processes; returns what each wrote to stdout and stderr together."""
    text = json.dumps([scenario | {"port": free_port()} for scenario in scenarios])
    common = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+", errors="backslashreplace")) for _ in range(world)]
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, text],
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for rank, file in enumerate(files)
        ]
        deadline = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                if any(process.returncode for process in processes):  # the others may wait for it
                    deadline = min(deadline, time.monotonic() + 30)
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        outputs = [file.seek(0) or file.read() for file in files]
    codes = [process.returncode for process in processes]
    assert codes == [0] * world, f"{codes}\n" + "\n".join(outputs)
    return outputs


class Runs:
    """A folder with data, configs and the runs of this module."""

    def __init__(self, folder: Path):
        self.folder = folder
        text = " ".join(f"{i} is {i * i % 97}, so" for i in range(3000)).encode()
        (folder / "data.txt").write_bytes(text)
        for name, config in (("moe", CONFIG), ("plain", PLAIN), ("small", SMALL)):
            (folder / f"{name}.json").write_text(json.dumps(config))

    def flags(self, run: str, *extra: object, config: str = "moe", steps: int = STEPS) -> list[str]:
        flags = ["--config", self.folder / f"{config}.json", "--data", self.folder / "data.txt", "--steps", steps]
        flags += ["--batch-size", 8, "--log-interval", 1, "--eval-interval", 1000, "--sample-bytes", 0]
        flags += ["--dtype", "fp32", "--device", "cpu", "--save-path", self.folder / run, *extra]
        return [str(flag) for flag in flags]

    def metrics(self, run: str) -> dict[int, dict[str, Any]]:
        """Of each step, once; what all processes did together."""
        lines = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        steps = [m for m in map(json.loads, lines) if "train_loss" in m]
        assert len({m["step"] for m in steps}) == len(steps)
        for before, m in zip(steps, steps[1:], strict=False):
            took = m["elapsed_s"] - before["elapsed_s"]
            if m["step"] == before["step"] + 1 and took > 0.02:  # an evaluation or a save between makes it longer
                assert (m["bytes"] - before["bytes"]) / took < 1.2 * m["bytes_per_s"]
        return {m["step"]: m for m in steps}

    def model(self) -> Transformer:
        """A model no two logits of which are equal."""
        net = Transformer(ModelArgs.from_dict(CONFIG))
        with torch.no_grad():
            for i, (name, p) in enumerate(net.named_parameters()):
                p.copy_(noisy(name, i, p.shape, 3))
        return net

    def assert_same(self, run: str, other: str, first: int = 1, tolerance: float = 1e-4) -> None:
        """Losses, norms and loads, step by step, and the validation loss."""
        ours, theirs = self.metrics(run), self.metrics(other)
        assert ours.keys() == theirs.keys() and len(ours) >= 10
        for step in range(first, max(ours) + 1):
            for key in ("train_loss", "balance_loss", "mtp_loss"):
                if key in theirs[step]:
                    assert ours[step][key] == pytest.approx(theirs[step][key], rel=tolerance), (run, step, key)
            assert ours[step]["grad_norm"] == pytest.approx(theirs[step]["grad_norm"], rel=20 * tolerance), (run, step)


# Flags of runs that must be the same in each layout, by a name: what is trained, and how
KINDS: dict[str, list[object]] = {"muon": [], "adamw": ["--optimizer", "adamw"], "plain": []}
KINDS |= {"bf16": ["--dtype", "bf16"], "fp8": ["--gemm-impl", "fp8"]}
LAYOUTS = {
    "dp2": ["muon"],
    "mp2": ["muon", "plain", "fp8"],
    "fsdp2": ["muon", "bf16"],
    "dp2 --batch-size 4 --accumulation 2": ["adamw"],
    "mp2 --gradient-checkpointing": ["adamw"],
    "fsdp2 --gradient-checkpointing": ["adamw"],
}
RANK_FLAGS = {"one": [], "dp2": [], "mp2": ["--model-parallel", 2], "fsdp2": ["--fsdp"], "mp4": ["--model-parallel", 4]}
RANK_FLAGS |= {"fsdp2mp2": ["--fsdp", "--model-parallel", 2]}
LENGTHS = {"one": 3, "mp2": 6, "fsdp2mp2": 9, "back": 12}  # steps after which the moved runs go to another layout


def train_in(runs: Runs, layout: str, kind: str) -> dict[str, Any]:
    ranks, *more = layout.split()
    config = "plain" if kind == "plain" else "moe"
    return {"flags": runs.flags(f"{ranks}-{kind}", *RANK_FLAGS[ranks], *KINDS[kind], *more, config=config)}


def move(runs: Runs, layout: str, run: str = "moved", steps: int | None = None) -> list[dict[str, Any]]:
    """The next steps of the runs that move between layouts; without a schedule, their length changes nothing."""
    flat = ["--warmup", 0, "--decay", 0, "--save-interval", 3, *RANK_FLAGS.get(layout, [])]
    flat += ["--resume", "--override", "steps"]
    steps = steps or LENGTHS[layout]
    return [{"flags": runs.flags(f"{run}-{k}", *flat, *KINDS[k], steps=steps)} for k in ("muon", "adamw")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With the runs of one process, which others are compared with."""
    made = Runs(tmp_path_factory.mktemp("runs"))
    launch(1, [train_in(made, "one", k) for k in KINDS] + move(made, "one") + move(made, "one", "straight", 12))
    return made


@pytest.fixture(scope="module")
def two(runs: Runs) -> list[str]:
    """Runs everything that two processes train; returns what they print."""
    return launch(2, [train_in(runs, name, k) for name, kinds in LAYOUTS.items() for k in kinds] + move(runs, "mp2"))


def grads(*layouts: tuple[int, bool, bool], configs: int = 3) -> list[dict[str, Any]]:
    shapes = [CONFIG, PLAIN | {"kv_lora_rank": 16}, PLAIN | {"n_routed_experts": 4, "score_func": "softmax"}][:configs]
    return [
        {"call": "check_gradients", "args": {"config": config, "mp": mp, "shards": shards, "checkpointing": saves}}
        for mp, shards, saves in layouts
        for config in shapes
    ]


def full_matrices(*layouts: tuple[int, bool]) -> list[dict[str, Any]]:
    return [{"call": "check_full_matrices", "args": {"mp": mp, "fsdp": fsdp}} for mp, fsdp in layouts]


def test_two_ranks(tmp_path: Path) -> None:
    """The basic functions, in two processes that are started once."""
    checks: list[dict[str, Any]] = [{"call": name} for name in ("check_rendezvous", "check_collectives")]
    checks += full_matrices((1, False), (1, True), (2, False))
    for more in ([], ["--fsdp", "--accumulation", 2]):
        flags = Runs(tmp_path).flags("run", *more, config="small")
        checks.append({"call": "check_recording", "args": {"flags": flags}})
    first, second = launch(2, checks + grads((1, False, False), (1, True, False), (2, False, True), configs=1))
    warning = "the step cannot be a CUDA graph (operation not permitted when stream is capturing), which is faster"
    assert first.count(warning) == 2 and "CUDA graph" not in second


@pytest.mark.parametrize("world", [2, 4])
def test_shards_cover_each_tensor_once(world: int) -> None:
    """By a mark on each number: those that ranks share are replicated, and all else is on one rank."""
    args = ModelArgs.from_dict(CONFIG)
    for name, tensor in Transformer(args).state_dict().items():
        count = torch.zeros_like(tensor).reshape(-1, tensor.shape[-1])
        for rank in range(world):
            box = parallel.state_slice(name, tuple(tensor.shape), rank, world)
            count[box.top : box.bottom, box.left : box.right] += 1
        replicated = re.search(r"norm|gate|wq_a|wkv_a|eh_proj", name) is not None
        assert count.unique().tolist() == [world if replicated else 1], name


def test_shards_of_native_tensors() -> None:
    """As DeepSeek's convert.py writes them: dimension 0 or 1 of a matrix in equal chunks, experts whole by number."""
    full = torch.arange(48).view(8, 6)
    for rank in range(2):
        for name, wanted in (("layers.0.attn.wq_b.weight", full.chunk(2, 0)), ("a.w2.scale", full.chunk(2, 1))):
            box = parallel.native_slice(name, (8, 6), 4, rank, 2)
            assert torch.equal(full[box.top : box.bottom, box.left : box.right], wanted[rank])
        assert parallel.native_slice("layers.0.attn_norm.weight", (6,), 4, rank, 2) == (0, 1, 0, 6)
        for expert in range(4):
            box = parallel.native_slice(f"layers.1.ffn.experts.{expert}.w2.weight", (8, 6), 4, rank, 2)
            assert box == ((0, 8, 0, 6) if expert // 2 == rank else None)


def test_numbers_of_processes_that_cannot_be() -> None:
    """Also such that a loop over them would not end."""
    for world, mp, message in (
        (3, 2, "3 processes are no multiple of --model-parallel 2, which can be 1, 3"),
        (10**12, 7, "at most 1048576"),
        (3**40, 1, "at most 1048576"),
        (720720, 7**9, "can be 1, 2, 3, 4, 5, 6, 7"),
    ):
        with pytest.raises(parallel.ParallelError, match=message):
            parallel.ParallelContext("cpu", world, 0, mp)
    with pytest.raises(
        CheckpointError, match=r"vocab_size = 256 cannot be cut into \d+; --model-parallel can be 1, 2, 4$"
    ):
        parallel.check_model_parallel(ModelArgs.from_dict(CONFIG), 5**20)


TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a.host"}
TORCHRUN |= {"MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "7"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_environment_of_a_launcher(environment: pytest.MonkeyPatch) -> None:
    assert parallel.read_launch()[:5] == (1, 0, 0, 1, 0)
    for name, value in TORCHRUN.items():
        environment.setenv(name, value)
    assert parallel.read_launch() == (4, 3, 1, 2, 7, "a.host", 29500)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("WORLD_SIZE", ["", "-4", "four", "4.0", "1" * 5000, str(1 << 40)]),
        ("RANK", [None, "", "4", "-1", "x"]),
        ("LOCAL_RANK", ["2", "x", "-1"]),
        ("LOCAL_WORLD_SIZE", ["", "0", "5", "two"]),
        ("MASTER_ADDR", [None, ""]),
        ("MASTER_PORT", [None, "", "0", "65536", "http", "1" * 5000]),
        ("TORCHELASTIC_RESTART_COUNT", ["", "-1", "often"]),
    ],
)
def test_environments_that_make_no_sense(environment: pytest.MonkeyPatch, name: str, values: list[str | None]) -> None:
    for value in values:
        for each, usual in TORCHRUN.items():
            environment.setenv(each, usual)
        environment.setenv(name, value) if value is not None else environment.delenv(name)
        with pytest.raises(parallel.LaunchError) as caught:
            parallel.ParallelContext.join("cpu")
        assert name in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("error", "rank", "code", "lines"),
    [
        (parallel.ParallelError("no multiple"), "0", 2, 1),
        (parallel.ParallelError("no multiple"), "1", 2, 0),
        (parallel.CollectiveError("of all"), "1", 2, 0),
        (CheckpointError("damaged"), "0", 2, 1),
        (CheckpointError("damaged"), "1", 2, 0),
        (parallel.LaunchError("RANK"), "1", 2, 1),
        (KeyboardInterrupt(), "1", 130, 0),
        (OSError(5, "Input/output error"), "1", 2, 1),
    ],
)
def test_an_error_without_a_group(
    environment: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    rank: str,
    code: int,
    lines: int,
) -> None:
    """Of what all processes find, one of a machine has a line; an error of one is reported by that one."""
    environment.setenv("LOCAL_RANK", rank)
    mistakes = (CheckpointError, parallel.CollectiveError, parallel.ParallelError)

    def body() -> None:
        with parallel.process_group("some.py", mistakes):
            raise error

    try:
        ended = command.run("some.py", body, mistakes)
    except SystemExit as left:
        ended = left.code
    assert (ended, capsys.readouterr().err.count("\n")) == (code, lines)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_train_as_one(runs: Runs, two: list[str], layout: str) -> None:
    """BF16 and FP8 round differently in every layout, but nearly train the same."""
    for kind in LAYOUTS[layout]:
        run = f"{layout.split()[0]}-{kind}"
        runs.assert_same(run, f"one-{kind}", tolerance=0.02 if kind in ("bf16", "fp8") else 1e-4)


@pytest.mark.slow
def test_only_the_first_prints(two: list[str]) -> None:
    first, second = two
    assert "2 data-parallel" in first and "val_loss" in first and re.sub(r"(?m)^\[Gloo\].*\n", "", second) == ""


@pytest.mark.slow
def test_four_processes_compute_as_one_and_runs_move_between_layouts(runs: Runs, two: list[str]) -> None:
    """One process, two, four and one again, 3 steps each, are one run of 12 steps."""
    checks = grads((4, False, False), configs=1) + grads((2, True, True), (2, False, False), (1, True, False))
    checks += full_matrices((1, True), (2, True), (2, False))
    launch(4, checks + [train_in(runs, layout, "muon") for layout in ("fsdp2mp2", "mp4")] + move(runs, "fsdp2mp2"))
    for layout in ("fsdp2mp2", "mp4"):
        runs.assert_same(f"{layout}-muon", "one-muon")
    files = {path.name for path in (runs.folder / "moved-muon" / "step-00000009").iterdir()}
    shards = {f"{kind}{rank}-mp2.safetensors" for kind in ("model", "state") for rank in range(2)}
    assert files == {"config.json", "state.json", *shards}
    launch(1, move(runs, "back"))
    for optimizer in ("muon", "adamw"):
        runs.assert_same(f"moved-{optimizer}", f"straight-{optimizer}")


@pytest.mark.slow
def test_compiled_shards_train_evaluate_and_write_as_plain_ones(runs: Runs) -> None:
    """Only steps are compiled: an evaluation has a shorter sequence at its end, a sample a longer one at each byte."""
    scenarios = []
    for layout in ("fsdp2", "mp2"):
        for name, flags in (("eager", []), ("compiled", ["--compile"])):
            flags = [*RANK_FLAGS[layout], "--eval-interval", 5, "--sample-bytes", 20, *flags]
            scenarios.append({"flags": runs.flags(f"{name}-{layout}", *flags, config="small", steps=10)})
    texts = re.findall(r"(?m)^(step \d+: .*\n.*)$", launch(2, scenarios)[0])
    assert texts[:2] == texts[2:4] and texts[4:6] == texts[6:] and len(texts) == 8
    for layout in ("fsdp2", "mp2"):
        runs.assert_same(f"compiled-{layout}", f"eager-{layout}")


@pytest.mark.slow
def test_layouts_that_cannot_be(runs: Runs) -> None:
    """The first process alone names the numbers that can be, or a mistake in the flags; nothing is left behind."""
    save_model(runs.model(), runs.folder / "uncut")
    model = ["--ckpt-path", str(runs.folder / "uncut"), "--device", "cpu", "--prompt", "7"]
    before = sorted(runs.folder.iterdir())
    asked = [{"flags": runs.flags("never", *flags)} for flags in (["--model-parallel", 2], [], ["--model-parallel", 3])]
    asked += [{"command": "generate", "flags": flags} for flags in (model, [*model, "--top-k", "many"])]
    first, *others = launch(3, [scenario | {"code": 2} for scenario in asked])
    expected = ["3 processes are no multiple of --model-parallel 2, which can be 1, 3"]
    expected += ["--batch-size 8 cannot be shared by 3 processes; take 6 or 9"]
    expected += ["vocab_size = 256 cannot be cut into 3; --model-parallel can be 1, 2, 4"]
    expected += ["vocab_size = 256 cannot be cut into 3; the number of processes can be 1, 2, 4", "--top-k"]
    assert all(part in line for part, line in zip(expected, first.splitlines(), strict=True)), first
    assert others == ["", ""] and sorted(runs.folder.iterdir()) == before


STARTS = """
import os, command
command.start()
import torch
torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # imports torch._dynamo
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["link", "named"])
def test_the_compilers_folder_in_tmp_is_not_touched(tmp_path: Path, kind: str) -> None:
    """Whatever others have put there under the name that torch uses."""
    planted = tmp_path / f"torchinductor_{getpass.getuser()}"
    if kind == "link":
        planted.symlink_to(tmp_path / "elsewhere" / "deep")
    else:
        planted.mkdir(mode=0o777)
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    environment = os.environ | {"TMPDIR": str(tmp_path), "HOME": str(home), "PYTHONPATH": str(ROOT)}
    environment = {k: v for k, v in environment.items() if k not in ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")}
    if kind == "named":
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "mine")
    done = subprocess.run([sys.executable, "-c", STARTS], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder == (tmp_path / "mine" if kind == "named" else home / ".cache" / "bytegpt" / "torchinductor")
    assert folder.is_dir() and not list(planted.glob("*")) and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("kind", ["first", "second", "taken", "stranger", "no host"])
def test_a_process_that_finds_no_others(environment: pytest.MonkeyPatch, kind: str) -> None:
    """It ends within its time-out, in a line that names what to look at."""
    port = free_port()
    place = {"WORLD_SIZE": "2", "RANK": "0" if kind in ("first", "taken") else "1", "MASTER_PORT": str(port)}
    place["MASTER_ADDR"] = "no-such-host.invalid" if kind == "no host" else "127.0.0.1"
    for name, value in place.items():
        environment.setenv(name, value)
    with socket.socket() as stranger:
        if kind in ("taken", "stranger"):  # which accepts connections and never answers
            stranger.bind(("127.0.0.1", port))
            stranger.listen(8)
        with pytest.raises(parallel.LaunchError) as caught:
            parallel.ParallelContext.join("cpu", timeout=timedelta(seconds=0.5))
    assert ("process 1 of 2 has not come" if kind == "first" else f"MASTER_PORT {port}") in str(caught.value)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> soak.Soak:
    """An undisturbed run, short enough for rounding in other layouts not to change how bytes are routed."""
    made = soak.Soak(tmp_path_factory.mktemp("nodes"), 1, 200, [], 0)
    assert made.start(made.folder / "alone", 1).wait() == 0
    return made


def is_running(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.slow
def test_kills_cost_only_the_steps_since_the_checkpoint(alone: soak.Soak) -> None:
    """The beginning of what soak.py does at length: torchrun replaces a worker, and its own end is the workers'."""
    run = alone.folder / "killed"
    made = soak.Soak(alone.folder, 2, 200, ["--fsdp"], 0)

    def has_steps(n: int) -> bool:
        return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("train_loss") >= n

    agent = made.start(run, 2)
    try:
        assert made.wait(agent, lambda: has_steps(20)), made.log(run)
        assert made.kill_a_worker(agent, run)
        assert made.wait(agent, lambda: made.log(run).count("resumed") == 1), made.log(run)
        assert made.wait(agent, lambda: has_steps(60)), made.log(run)
        workers = soak.descendants(agent.pid)
    finally:
        agent.kill()
        agent.wait()
    until = time.monotonic() + 20  # a bound for a hang alone
    while any(is_running(worker) for worker in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(workers) == 2 and not any(is_running(worker) for worker in workers)
    assert 60 <= made.check(run) + 3 < 200
    assert made.start(run, 2).wait() == 0, made.log(run)
    assert soak.losses(run) == pytest.approx(soak.losses(alone.folder / "alone"), rel=1e-4)


# What is done to the second of two processes, before train.py or generate.py begins there
FAULT = """
import os, signal, sys
sys.path[:0] = [{root!r}]
import torch, train, generate, checkpoint, model
calls = [0]
def spoil(owner, name, at, fault):
    old = getattr(owner, name)
    def spoilt(*args, **kwargs):
        calls[0] += 1
        if calls[0] == at:
            fault()
        return old(*args, **kwargs)
    setattr(owner, name, spoilt)
def bug():
    raise KeyError("my own fault")
def bad_disk():
    raise OSError(5, "Input/output error")
def hang():
    os.kill(os.getpid(), signal.SIGSTOP)
if os.environ["RANK"] == "1":
    {fault}
sys.exit({program}.main(sys.argv[1:]))
"""


# A process that waits for others in a way that notices nothing, as a kernel of NCCL does
WAITING = """
import os, sys, threading, time
sys.path[:0] = [{root!r}]
import parallel
parallel.ParallelContext.join("cpu")
store, rank = parallel._get_default_store(), int(os.environ["RANK"])
threading.Thread(target=parallel._watch, args=(store, rank), daemon=True).start()
if os.environ["RANK"] == sys.argv[1]:
    parallel.abort(2)
time.sleep(60)
"""


# One that is interrupted again and again, while the other, which has the store, does not answer
PRESSED = """
import os, signal, sys, threading, time
sys.path[:0] = [{root!r}]
import command, parallel
def press():
    while True:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
def body():
    with parallel.process_group("some.py"):
        ctx = parallel.ParallelContext.join("cpu")
        ctx._store.set(f"joined {{ctx.rank}}", "")
        ctx._store.wait(["joined 0", "joined 1"])
        time.sleep(2)
        if ctx.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1)
        threading.Thread(target=press, daemon=True).start()
        time.sleep(60)
sys.exit(command.run("some.py", body))
"""


def run_spoilt(fault: str, flags: list[list[str]], program: str = "train") -> list[tuple[int | None, str]]:
    """Runs processes, to the second of which something is done; returns what `run_code` does."""
    return run_code(FAULT.format(root=str(ROOT), fault=fault, program=program), flags, "hang" in fault)


def run_code(code: str, flags: list[list[str]], hangs: bool = False) -> list[tuple[int | None, str]]:
    """Runs processes; returns each one's exit code (None: it has not ended in a minute) and its stderr."""
    common = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    common |= {"WORLD_SIZE": str(len(flags)), "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *flags[rank]],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(len(flags))
    ]
    until = time.monotonic() + 60  # far below --timeout
    while time.monotonic() < until:
        ended = [process.poll() is not None for process in processes]
        if all(ended) or (hangs and any(ended)):
            break
        time.sleep(0.01)
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
    errors = [process.communicate()[1] for process in processes]
    return list(zip(codes, errors, strict=True))


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(runs: Runs, tmp_path: Path) -> None:
    """It shows its own fault, in full and first; the other reports in a line that it is gone."""
    flags = runs.flags(str(tmp_path / "run"), "--save-interval", 5, "--fsdp", steps=20)
    first, second = run_spoilt("spoil(model.Transformer, 'loss', 7, bug)", [flags, flags])
    assert first[0] == 1 and re.fullmatch(r"train.py: error: another process is gone.*\n", first[1]), first
    assert second[0] == 1 and "KeyError: 'my own fault'" in second[1], second


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.slow
def test_a_process_that_notices_nothing_is_ended(failing: int) -> None:
    """Also where the first fails, and the store with it; the one that fails keeps its exit code."""
    ended = run_code(WAITING.format(root=str(ROOT)), [[str(failing)]] * 2)
    assert [code for code, _ in ended] == [2 if rank == failing else 1 for rank in range(2)], ended
    assert failing == 0 or "another process is gone: number 1 has failed" in ended[0][1]


@pytest.mark.slow
def test_interrupts_while_the_process_group_is_left() -> None:
    first, second = run_code(PRESSED.format(root=str(ROOT)), [[]] * 2, hangs=True)
    assert first[0] is None and second[:2] == (130, ""), (first, second)


@pytest.mark.slow
def test_a_process_that_fails_to_load_ends_the_others(runs: Runs, two: list[str]) -> None:
    flags = runs.flags("mp2-muon", "--resume", "--model-parallel", 2, steps=STEPS + 5)
    first, second = run_spoilt("spoil(train, 'load_run', 1, bug)", [flags, flags])
    assert first[0] == second[0] == 1 and "another process is gone" in first[1] and "my own fault" in second[1]


@pytest.mark.slow
def test_a_process_that_fails_while_writing_text_ends_the_others(runs: Runs, tmp_path: Path) -> None:
    save_model(runs.model(), tmp_path / "model")
    flags = ["--ckpt-path", str(tmp_path / "model"), "--prompt", "7", "--max-new-tokens", "50", "--device", "cpu"]
    first, second = run_spoilt("spoil(generate, 'write_results', 1, bug)", [flags, flags], "generate")
    assert first[0] == second[0] == 1 and "another process is gone" in first[1] and "my own fault" in second[1]


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up(runs: Runs, tmp_path: Path) -> None:
    """By one that waits for its tensor-parallel group alone."""
    flags = runs.flags(str(tmp_path / "run"), "--timeout", 0.1, "--model-parallel", 2, steps=20)
    first, *_ = run_spoilt("spoil(model.Transformer, 'loss', 7, hang)", [flags] * 2)
    assert first[0] == 1 and "another process is gone or does not answer" in first[1], first


@pytest.mark.slow
def test_processes_with_different_commands(runs: Runs) -> None:
    """As where each machine has a command, a config and a disk of its own."""
    flags, other = runs.flags("never-begun", steps=5), runs.folder / "elsewhere"
    differently = [
        (["--lr", "0.1"], "process 0 has lr = 0.003, process 1 has 0.1"),
        (["--model-parallel", "2"], "process 0 has --model-parallel = 1, process 1 has 2"),
        (["--steps", "7"], "process 0 has steps = 5, process 1 has 7"),
        (["--save-path", str(other)], f"never-begun, process 1 has {other}; give all the same"),
        (["--config", str(runs.folder / "plain.json")], "process 0 has "),
    ]
    first, second = launch(2, [{"flags": flags, "of_1": more, "code": 2} for more, _ in differently])
    lines = first.splitlines()
    assert all(message in line for (_, message), line in zip(differently, lines, strict=True)) and second == "", first
    assert not (runs.folder / "never-begun").exists() and not other.exists()


def test_a_gpu_that_waits_for_ever_is_given_up() -> None:
    """As in a collective of a CUDA graph, after which the figures of a step never come."""

    class Event:
        left = 3

        def query(self) -> bool:
            self.left -= 1
            return self.left == 0

        def synchronize(self) -> None:
            assert self.left == 0

    ctx = parallel.ParallelContext("cpu", 2)
    ctx.wait_for(Event())
    ctx.timeout = timedelta(seconds=0.01)
    Event.left = -1
    with pytest.raises(torch.distributed.DistError, match="not ended within 0:00:00.01"):
        ctx.wait_for(Event())


def test_slices_of_a_batch_cover_it_once() -> None:
    """Every sequence of a batch is read by one data-parallel rank, the same one throughout a tensor-parallel group."""
    ctx = parallel.ParallelContext("cpu", 8, 0, 2)
    sequences = []
    for rank in range(ctx.dp_size):
        ctx.dp_rank = rank
        sequences += range(12)[ctx.data_parallel_slice(12)]
    assert sequences == list(range(12))


@pytest.fixture
def networks() -> Iterator[list[tuple[str, str, str]]]:
    """Two network namespaces joined by a cable: names, addresses and devices; none without root and iproute2."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        yield []
        return
    made = [(f"bytegpt{i}-{os.getpid()}", f"10.77.0.{i}", f"cable{i}") for i in (1, 2)]
    commands = [f"netns add {name}" for name, _, _ in made]
    commands += [f"link add cable1 netns {made[0][0]} type veth peer name cable2 netns {made[1][0]}"]
    for name, address, device in made:
        commands += [f"-n {name} addr add {address}/24 dev {device}", f"-n {name} link set {device} up"]
        commands += [f"-n {name} link set lo up"]
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode:  # as in a container
                made.clear()
                break
        yield made
    finally:
        for i in (1, 2):
            subprocess.run(["ip", "netns", "del", f"bytegpt{i}-{os.getpid()}"], capture_output=True)


@pytest.mark.slow
def test_a_machine_leaves_and_comes_back(alone: soak.Soak, networks: list[tuple[str, str, str]]) -> None:
    """Trains on two nodes until one dies, on one until the other is back, and on two; compares the losses."""
    made, run, port, nodes = alone, alone.folder / "elsewhere", free_port(), []

    def node(i: int) -> subprocess.Popen:
        conf = f"is_host={int(i == 0)},last_call_timeout=1,keep_alive_interval=1"  # to notice in seconds, not a minute
        flags = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-id", run.name, "--rdzv-conf", conf]
        flags += ["--rdzv-endpoint", f"{networks[0][1] if networks else '127.0.0.1'}:{port}"]
        environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else newcomers get no address from torch's agents
        if not networks:
            return made.launch(run, f"{run.name}.log", flags, **environment)
        name, address, environment["GLOO_SOCKET_IFNAME"] = networks[i]
        flags += ["--local-addr", address]
        return made.launch(run, f"{run.name}.log", flags, ["ip", "netns", "exec", name], **environment)

    def wait_for(what: str, times: int) -> None:
        until = time.monotonic() + 60
        while log().count(what) < times:
            assert time.monotonic() < until and all(node.poll() is None for node in nodes), log()
            time.sleep(0.05)

    log = lambda: (made.folder / f"{run.name}.log").read_text(errors="replace")  # noqa: E731
    try:
        nodes += [node(0), node(1)]
        wait_for("step 20: val_loss", 1)
        soak.kill_all(nodes.pop())
        wait_for("resumed", 1)
        nodes.append(node(1))
        wait_for("resumed", 2)
        assert [node.wait(timeout=60) for node in nodes] == [0, 0], log()
    finally:
        for left in nodes:
            soak.kill_all(left)
    assert log().count("2 data-parallel") == 2 and log().count("parameters,") == 3
    losses, expected = soak.losses(run), soak.losses(made.folder / "alone")
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_generating_on_several_ranks_writes_the_same(runs: Runs) -> None:
    """From any form of a checkpoint, greedy and sampled; the first process alone prints."""
    save_model(runs.model(), runs.folder / "mp1")
    convert.convert(runs.folder / "mp1", runs.folder / "cut4", 4)
    convert.convert(runs.folder / "mp1", runs.folder / "hf", is_hf=True)
    (runs.folder / "prompts").write_text("12 is\n\n90\n")
    common = ["--device", "cpu", "--dtype", "fp32", "--max-new-tokens", "10", "--seed", "5"]
    scenarios = []
    asked, many = ["--prompt", "7 is ", "--temperature", "0"], ["--input-file", str(runs.folder / "prompts")]
    for folder, *flags in (("mp1", *asked), ("cut4", *many), ("hf", *asked), ("mp1", *many)):
        flags = ["--ckpt-path", str(runs.folder / folder), *flags, *common]
        scenarios.append({"command": "generate", "flags": flags})
    (alone,) = launch(1, scenarios)
    speed = re.compile(r"\d+ bytes in .*")
    assert len(speed.findall(alone)) == len(scenarios)
    first, *others = launch(2, scenarios)
    assert speed.sub("", first) == speed.sub("", alone)
    assert others == [""] and "7 is" in first


@pytest.mark.parametrize(("name", "by_torchrun"), [("train", True), ("interactive", False)])
@pytest.mark.slow
def test_interrupted_by_the_user(runs: Runs, tmp_path: Path, name: str, by_torchrun: bool) -> None:
    """Ctrl-C, to torchrun or to each process: all end in seconds without a traceback, and a run is saved."""
    run = runs.folder / f"interrupted-{by_torchrun}"
    model = ["--ckpt-path", str(tmp_path / "model"), "--device", "cpu", "--dtype", "fp32"]
    command = {
        "train": ["train.py", *runs.flags(run.name, steps=100_000)],
        "interactive": ["generate.py", *model, "--interactive"],
    }[name]
    save_model(runs.model(), tmp_path / "model")
    starts: list[tuple[list[str], dict[str, str]]] = [([], {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    common = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if by_torchrun:
        starts = [(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], {})]
    out, err = tmp_path / "out", tmp_path / "err"
    processes = [
        subprocess.Popen(
            [sys.executable, *agent, str(ROOT / command[0]), *command[1:]],
            env=os.environ | common | place,
            stdin=subprocess.PIPE,
            stdout=out.open("ab"),
            stderr=err.open("ab"),
        )
        for agent, place in starts
    ]
    if name == "interactive":
        for process in processes:
            process.stdin.write(b"7 is\n")
            process.stdin.flush()
    begun, until = run / "metrics.jsonl" if name == "train" else out, time.monotonic() + 60
    while not begun.exists() or not begun.stat().st_size:
        assert time.monotonic() < until, err.read_text()
        time.sleep(0.05)
    workers = [worker for process in processes for worker in soak.descendants(process.pid)]
    for process in processes:
        process.send_signal(signal.SIGINT)
    codes = [process.wait(timeout=20) for process in processes]
    assert codes == ([1] if by_torchrun else [0, 0] if name == "train" else [130, 130])  # torchrun has its own
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert err.read_text().count("Traceback") == int(by_torchrun)  # its own
    if name == "train":
        (step,) = [int(path.name.removeprefix("step-")) for path in run.glob("step-*")]
        assert f"stopped by SIGINT after step {step}: model in {run}" in out.read_text()
        assert max(runs.metrics(run.name)) == step


@pytest.mark.slow
def test_an_error_of_one_is_raised_on_all_and_the_run_stays(runs: Runs, two: list[str]) -> None:
    """A file that cannot be written by the second process: the first reports it, and the last checkpoint is intact."""
    before = {path: path.read_bytes() for path in (runs.folder / "mp2-plain").rglob("*.safetensors")}
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
    code += "import test_parallel as t, os, checkpoint as c\n"
    code += "write = c.write_all\ndef full(file, tensor):\n    if os.environ['RANK'] == '1':\n"
    code += "        raise OSError(28, 'No space left on device')\n    write(file, tensor)\nc.write_all = full\n"
    code += "import json; t.work(json.loads(sys.argv[1]))\n"
    flags = runs.flags(
        "mp2-plain", "--resume", "--override", "steps", "--model-parallel", 2, config="plain", steps=STEPS + 3
    )
    scenario = {"flags": flags, "code": 2, "port": free_port()}
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps([scenario])],
            env=common | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (process.communicate(timeout=200)[1] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    assert "No space left on device" in first and "No space" not in second
    after = {path: path.read_bytes() for path in (runs.folder / "mp2-plain").rglob("*.safetensors")}
    assert after == before and before and not list((runs.folder / "mp2-plain").glob(".*"))


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
