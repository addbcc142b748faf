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
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench")]

import soak  # noqa: E402

import command  # noqa: E402
import convert  # noqa: E402
import generate  # noqa: E402
import model as model_module  # noqa: E402
import parallel  # noqa: E402
import train  # noqa: E402
from checkpoint import save_model  # noqa: E402
from model import ModelArgs, Transformer  # noqa: E402
from safetensors_io import CheckpointError  # noqa: E402

CONFIG = {
    **{"dim": 32, "inter_dim": 64, "moe_inter_dim": 32, "n_layers": 3, "n_dense_layers": 1, "moe_layer_freq": 1},
    **{"n_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "n_activated_experts": 2, "score_func": "sigmoid"},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    **{"n_mtp_layers": 1, "max_seq_len": 32, "original_seq_len": 32, "aux_loss_alpha": 0.01},
}
PLAIN = CONFIG | {"q_lora_rank": 0, "kv_lora_rank": 0, "n_routed_experts": 0, "n_mtp_layers": 0}
STEPS = 100


# --- What a process does ----------------------------------------------------------------------------------------------


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
    whole, expected = reference_gradients(args, batch[:, :-1], batch[:, 1:])
    net = parallel.build(ctx, args, torch.float32)
    parallel.init_weights(ctx, net, 0)
    net.train().gradient_checkpointing = checkpointing
    compute = parallel.parallelize(ctx, net, compiles=False)
    mine = batch[ctx.data_parallel_slice(8)]
    losses = compute(mine[:, :-1], mine[:, 1:])
    losses.total.backward()
    parallel.all_reduce_replicated_grads(ctx, net)
    load = ctx.all_reduce_dp(losses.load.clone())
    assert torch.equal(load, expected.load)
    balance = ctx.all_reduce_dp(losses.balance / ctx.dp_size)
    torch.testing.assert_close(balance, expected.balance, rtol=1e-5, atol=0)
    shapes = {name: tuple(p.shape) for name, p in whole.named_parameters()}
    gradients = {name: p.grad for name, p in whole.named_parameters()}
    norm = nn.utils.get_total_norm(list(gradients.values()))
    for name, p in net.named_parameters():
        box = parallel.local_slice(name, p, shapes[name], ctx)
        shard, _ = ctx.local_shard(p.grad)
        wanted = gradients[name].reshape(-1, shapes[name][-1])[box.top : box.bottom, box.left : box.right]
        torch.testing.assert_close(
            shard.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-5 * gradients[name].abs().max().item(), msg=name
        )
    torch.testing.assert_close(parallel.clip_grad_norm(ctx, net, 0.1), norm, rtol=1e-5, atol=0)
    parallel.leave()


def check_optimizer_updates() -> None:
    """What is gathered for an update is the full matrix, and what is kept of it is this rank's."""
    ctx = parallel.ParallelContext.join("cpu", 2)
    net = parallel.build(ctx, ModelArgs.from_dict(CONFIG), torch.float32)
    parallel.init_weights(ctx, net, 0)
    parallel.parallelize(ctx, net, compiles=False)
    full, _ = reference_gradients(ModelArgs.from_dict(CONFIG), torch.zeros(1, 4).long(), torch.zeros(1, 4).long())
    matrices = dict(full.named_parameters())
    for name, p in net.named_parameters():
        if p.ndim == 2:
            update = parallel.full_tensor(ctx, p, p.detach())
            assert torch.equal(update, matrices[name].unsqueeze(0)), name
            assert torch.equal(parallel.local_part(ctx, p, update), p), name
    parallel.leave()


def check_collectives() -> None:
    """An error or a setting of one rank is an error of both, with its message, and then they go on."""
    ctx = parallel.ParallelContext.join("cpu")
    with pytest.raises(parallel.CollectiveError, match="^Is a directory: some/file$"), ctx.collective_section():
        if ctx.rank == 1:
            raise IsADirectoryError(21, "Is a directory", "some/file")
    with pytest.raises(parallel.CollectiveError, match="^ValueError$"), ctx.collective_section():
        raise ValueError
    ctx.require_equal({"lr": 0.1, "save_path": None})
    told = {"lr": 0.1} | ({"save_path": Path("there")} if ctx.rank else {"save_path": None})
    with pytest.raises(parallel.ParallelError, match="process 0 has save_path = None, process 1 has there"):
        ctx.require_equal(told)
    with pytest.raises(parallel.ParallelError, match="process 0 has only = None, process 1 has here"):
        ctx.require_equal({"only": "here"} if ctx.rank else {})
    assert ctx.broadcast_bytes(lambda: None if ctx.rank else b"typed") == b"typed"
    assert ctx.all_reduce_max(ctx.rank, -ctx.rank) == [1, 0] and ctx.broadcast(ctx.rank + 5) == [5]
    assert ctx.all_reduce_dp(torch.tensor([2.0])).item() == 4
    parallel.leave()


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
    time.sleep(0.5 * (launch.rank == 0))  # the store goes with rank 0
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
                code = main(scenario["flags"])
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
        for name, config in (("moe", CONFIG), ("plain", PLAIN)):
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With the runs of one process, which others are compared with."""
    made = Runs(tmp_path_factory.mktemp("runs"))
    scenarios = [{"flags": made.flags("one")}, {"flags": made.flags("one-adamw", "--optimizer", "adamw", steps=20)}]
    scenarios.append({"flags": made.flags("one-plain", config="plain", steps=20)})
    launch(1, scenarios)
    return made


def grads(*layouts: tuple[int, bool, bool], configs: int = 3) -> list[dict[str, Any]]:
    shapes = [CONFIG, PLAIN | {"kv_lora_rank": 16}, PLAIN | {"n_routed_experts": 4, "score_func": "softmax"}][:configs]
    return [
        {"call": "check_gradients", "args": {"config": config, "mp": mp, "shards": shards, "checkpointing": saves}}
        for mp, shards, saves in layouts
        for config in shapes
    ]


def test_two_ranks() -> None:
    """The basic functions, in two processes that are started once."""
    checks = [{"call": name} for name in ("check_rendezvous", "check_collectives", "check_optimizer_updates")]
    launch(2, checks + grads((1, False, False), (1, True, False), (2, False, True), configs=1))


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
    began = time.process_time()
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
    assert time.process_time() - began < 5  # of processor time: no loop over numbers of processes


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
def test_gradients_of_two_processes() -> None:
    launch(2, grads((1, False, False), (1, True, False), (2, False, True)))


@pytest.mark.slow
def test_gradients_of_four_processes() -> None:
    launch(4, grads((4, False, False), (2, True, True), (2, False, False), (1, True, False)))


@pytest.mark.slow
def test_two_processes_train_as_one(runs: Runs) -> None:
    adamw = ["--optimizer", "adamw"]
    launch(
        2,
        [
            {"flags": runs.flags("dp2")},
            {"flags": runs.flags("mp2", "--model-parallel", 2)},
            {"flags": runs.flags("fsdp2", "--fsdp")},
            {"flags": runs.flags("dp2-adamw", *adamw, "--batch-size", 4, "--accumulation", 2, steps=20)},
            {"flags": runs.flags("mp2-adamw", *adamw, "--model-parallel", 2, "--gradient-checkpointing", steps=20)},
            {"flags": runs.flags("fsdp2-adamw", *adamw, "--fsdp", "--gradient-checkpointing", steps=20)},
            {"flags": runs.flags("mp2-plain", "--model-parallel", 2, config="plain", steps=20)},
        ],
    )
    for run in ("dp2", "mp2", "fsdp2"):
        runs.assert_same(run, "one")
    for run in ("dp2-adamw", "mp2-adamw", "fsdp2-adamw"):
        runs.assert_same(run, "one-adamw")
    runs.assert_same("mp2-plain", "one-plain")


@pytest.mark.slow
def test_four_processes_train_as_one(runs: Runs) -> None:
    layouts = {
        "dp2mp2": ["--model-parallel", 2],
        "fsdp2mp2": ["--model-parallel", 2, "--fsdp"],
        "fsdp4": ["--fsdp"],
        "mp4": ["--model-parallel", 4],
    }
    scenarios = []
    for name, flags in layouts.items():
        scenarios.append({"flags": runs.flags(name, *flags, steps=STEPS if name == "fsdp2mp2" else 12)})
    launch(4, scenarios)
    runs.assert_same("fsdp2mp2", "one")
    launch(1, [{"flags": runs.flags("one-12", steps=12)}])
    for name in ("dp2mp2", "fsdp4", "mp4"):
        runs.assert_same(name, "one-12")


def resume_flags(runs: Runs, run: str, steps: int, *extra: object) -> dict[str, Any]:
    """A run without schedule, so that its length changes nothing."""
    flat = ["--warmup", 0, "--decay", 0, "--save-interval", 5, "--eval-interval", 1000]
    return {"flags": runs.flags(run, *flat, "--resume", *extra, steps=steps)}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.slow
def test_a_run_moves_between_layouts(runs: Runs, optimizer: str) -> None:
    """One process, two, four, two and one again, 5 steps each, are one run of 25 steps."""
    run, flags = f"moved-{optimizer}", ["--optimizer", optimizer]
    launch(1, [resume_flags(runs, f"whole-{optimizer}", 25, *flags), resume_flags(runs, run, 5, *flags)])
    launch(2, [resume_flags(runs, run, 10, "--model-parallel", 2, *flags)])
    launch(4, [resume_flags(runs, run, 15, "--model-parallel", 2, "--fsdp", *flags)])
    files = {path.name for path in (runs.folder / run / "step-00000015").iterdir()}
    shards = {f"{kind}{rank}-mp2.safetensors" for kind in ("model", "state") for rank in range(2)}
    assert files == {"config.json", "state.json", *shards}
    launch(2, [resume_flags(runs, run, 20, "--fsdp", *flags)])
    launch(1, [resume_flags(runs, run, 25, *flags)])
    runs.assert_same(run, f"whole-{optimizer}")


@pytest.mark.slow
def test_other_precisions(runs: Runs) -> None:
    """BF16 and FP8 round differently in every ctx, but nearly train the same."""
    kinds = {"bf16": ["--dtype", "bf16"], "fp8": ["--gemm-impl", "fp8"]}
    launch(1, [{"flags": runs.flags(f"one-{kind}", *flags, steps=12)} for kind, flags in kinds.items()])
    scenarios = []
    for kind, flags in kinds.items():
        scenarios.append({"flags": runs.flags(f"mp2-{kind}", *flags, "--model-parallel", 2, steps=12)})
        scenarios.append({"flags": runs.flags(f"fsdp2-{kind}", *flags, "--fsdp", steps=12)})
    launch(2, scenarios)
    for kind in kinds:
        for ctx in ("mp2", "fsdp2"):
            runs.assert_same(f"{ctx}-{kind}", f"one-{kind}", tolerance=0.02)


@pytest.mark.parametrize("ctx", [["--fsdp"], ["--model-parallel", 2]])
@pytest.mark.slow
def test_compiled_shards_train_evaluate_and_write_as_plain_ones(runs: Runs, ctx: list[str]) -> None:
    """Only steps are compiled: an evaluation has a shorter sequence at its end, a sample a longer one at each byte."""
    flags = [*ctx, "--eval-interval", 5, "--sample-bytes", 20]
    plain, _ = launch(2, [{"flags": runs.flags(f"eager{ctx[0]}", *flags, steps=10)}])
    compiled, _ = launch(2, [{"flags": runs.flags(f"compiled{ctx[0]}", *flags, "--compile", steps=10)}])
    runs.assert_same(f"compiled{ctx[0]}", f"eager{ctx[0]}")
    texts = [re.findall(r"(?m)^(step \d+: .*\n.*)$", output) for output in (plain, compiled)]
    assert texts[0] == texts[1] and len(texts[0]) == 2


@pytest.mark.parametrize(
    ("world", "flags", "parts"),
    [
        (3, ["--model-parallel", "2"], ["3 processes", "--model-parallel 2", "can be 1, 3"]),
        (3, [], ["--batch-size 8", "3 processes", "6 or 9"]),
        (3, ["--model-parallel", "3"], ["vocab_size = 256", "can be 1, 2, 4"]),
    ],
)
@pytest.mark.slow
def test_layouts_that_cannot_be(runs: Runs, world: int, flags: list[str], parts: list[str]) -> None:
    before = sorted(runs.folder.iterdir())
    outputs = launch(world, [{"flags": runs.flags("never", *flags), "code": 2}])
    assert all(part in outputs[0] for part in parts) and outputs[0].count("\n") == 1, outputs[0]
    assert outputs[1:] == [""] * (world - 1)
    assert sorted(runs.folder.iterdir()) == before


STARTS = """
import os, command
command.start()
import torch
torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # imports torch._dynamo
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["link", "file", "folder", "named"])
def test_the_compilers_folder_in_tmp_is_not_touched(tmp_path: Path, kind: str) -> None:
    """Whatever others have put there under the name that torch uses."""
    planted = tmp_path / f"torchinductor_{getpass.getuser()}"
    if kind == "link":
        planted.symlink_to(tmp_path / "elsewhere" / "deep")
    elif kind == "file":
        planted.write_text("")
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


def run_alone(environment: dict[str, str], *flags: str) -> tuple[int, str]:
    """Runs one process with an environment of several; returns its exit code and stderr."""
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]\nimport train; sys.exit(train.main())"
    common = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        env=common | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    return process.returncode, errors


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["first", "second", "taken", "stranger", "no host"])
def test_a_process_that_finds_no_others(tmp_path: Path, kind: str) -> None:
    """It ends within its time-out, in a line that names what to look at."""
    port = free_port()
    place = {"WORLD_SIZE": "2", "RANK": "0" if kind in ("first", "taken") else "1", "MASTER_PORT": str(port)}
    place["MASTER_ADDR"] = "no-such-host.invalid" if kind == "no host" else "127.0.0.1"
    with socket.socket() as stranger:
        if kind in ("taken", "stranger"):  # which accepts connections and never answers
            stranger.bind(("127.0.0.1", port))
            stranger.listen(8)
        code, errors = run_alone(place, *Runs(tmp_path).flags("never", "--timeout", 0.05, steps=1))
    assert code == 2 and errors.count("\n") == 1, errors
    assert ("process 1 of 2 has not come" if kind == "first" else f"MASTER_PORT {port}") in errors


@pytest.mark.slow
def test_workers_end_with_their_torchrun(tmp_path: Path) -> None:
    made = soak.Soak(tmp_path, 2, 100_000, [], 0)
    agent = made.start(tmp_path / "run", 2)
    assert made.wait(agent, lambda: (tmp_path / "run" / "metrics.jsonl").exists()), made.log(tmp_path / "run")
    workers = soak.descendants(agent.pid)
    agent.kill()
    agent.wait()
    until = time.monotonic() + 20  # a bound for a hang alone
    while any(is_running(worker) for worker in workers) and time.monotonic() < until:
        time.sleep(0.05)
    left = [worker for worker in workers if is_running(worker)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert len(workers) == 2 and not left


def is_running(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.slow
def test_kills_cost_only_the_steps_since_the_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    """The beginning of what soak.py does at length."""
    soak.main(["--kills", "3", "--steps", "60", "--seed", "1", "--train-flags=--fsdp"])
    assert "3 kills" in capsys.readouterr().out


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


def run_spoilt(fault: str, flags: list[list[str]], program: str = "train") -> list[tuple[int | None, str, float]]:
    """Runs processes, to the second of which something is done; returns what `run_code` does."""
    return run_code(FAULT.format(root=str(ROOT), fault=fault, program=program), flags, "hang" in fault)


def run_code(code: str, flags: list[list[str]], hangs: bool = False) -> list[tuple[int | None, str, float]]:
    """Runs processes; returns each one's exit code (None: it hangs), what it wrote to stderr, and when it ended."""
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
    ends: list[float | None] = [None] * len(flags)
    until = time.monotonic() + 60
    while None in ends and time.monotonic() < until and not (hangs and any(ends)):
        for rank, process in enumerate(processes):
            if ends[rank] is None and process.poll() is not None:
                ends[rank] = time.time()
        time.sleep(0.01)
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
    errors = [process.communicate()[1] for process in processes]
    return [(code, text, end or time.time()) for code, text, end in zip(codes, errors, ends, strict=True)]


@pytest.mark.parametrize("ctx", [[], ["--fsdp"], ["--model-parallel", "2"]])
@pytest.mark.parametrize(
    "where", ["model.Transformer, 'loss', 7", "torch.optim.AdamW, 'step', 3", "model.Transformer, 'next_byte_loss', 1"]
)
@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(runs: Runs, tmp_path: Path, ctx: list[str], where: str) -> None:
    """It shows its own fault, in full and first; the other tells in a line that it is gone, within seconds."""
    flags = runs.flags(str(tmp_path / "run"), "--save-interval", 5, *ctx, steps=20)
    first, second = run_spoilt(f"spoil({where}, bug)", [flags, flags])
    assert first[0] == 1 and re.fullmatch(r"train.py: error: another process is gone.*\n", first[1]), first
    assert second[0] == 1 and "KeyError: 'my own fault'" in second[1], second
    assert second[2] - 0.5 < first[2] < second[2] + 5


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.slow
def test_a_process_that_notices_nothing_is_ended(failing: int) -> None:
    """Also where it is the first that fails, which has the store that would tell; the one that fails keeps its code."""
    ended = run_code(WAITING.format(root=str(ROOT)), [[str(failing)]] * 2)
    assert [code for code, _, _ in ended] == [2 if rank == failing else 1 for rank in range(2)], ended
    assert failing == 0 or "another process is gone: number 1 has failed" in ended[0][1]
    assert ended[1 - failing][2] < ended[failing][2] + 10


@pytest.mark.slow
def test_interrupts_while_the_process_group_is_left() -> None:
    first, second = run_code(PRESSED.format(root=str(ROOT)), [[]] * 2, hangs=True)
    assert first[0] is None and second[:2] == (130, ""), (first, second)


@pytest.mark.slow
def test_a_process_that_fails_to_load_ends_the_others(runs: Runs, tmp_path: Path) -> None:
    flags = runs.flags(str(tmp_path / "run"), "--resume", "--model-parallel", 2, steps=5)
    launch(2, [{"flags": flags}])
    first, second = run_spoilt("spoil(train, 'load_run', 1, bug)", [flags, flags])
    assert first[0] == second[0] == 1 and "another process is gone" in first[1] and "my own fault" in second[1]
    first, second = run_spoilt("spoil(train, 'load_run', 1, bad_disk)", [flags, flags])
    assert first[0] == second[0] == 2 and "Input/output error" in first[1] + second[1]


@pytest.mark.slow
def test_a_process_that_fails_while_writing_text_ends_the_others(runs: Runs, tmp_path: Path) -> None:
    save_model(runs.model(), tmp_path / "model")
    flags = ["--ckpt-path", str(tmp_path / "model"), "--prompt", "7", "--max-new-tokens", "50", "--device", "cpu"]
    first, second = run_spoilt("spoil(generate, 'write_results', 1, bug)", [flags, flags], "generate")
    assert first[0] == second[0] == 1 and "another process is gone" in first[1] and "my own fault" in second[1]


@pytest.mark.parametrize(("world", "ctx"), [(2, ["--fsdp"]), (4, ["--model-parallel", "2"])])
@pytest.mark.slow
def test_a_process_that_hangs_is_given_up(runs: Runs, tmp_path: Path, world: int, ctx: list[str]) -> None:
    """By one that waits for all ranks, and by one that waits for its tensor-parallel group alone."""
    flags = runs.flags(str(tmp_path / "run"), "--timeout", 0.1, *ctx, steps=20)
    first, *_ = run_spoilt("spoil(model.Transformer, 'loss', 7, hang)", [flags] * world)
    assert first[0] == 1 and "another process is gone or does not answer" in first[1], first


@pytest.mark.parametrize(
    ("differently", "told"),
    [
        (["--lr", "0.1"], "process 0 has lr = 0.003, process 1 has 0.1"),
        (["--model-parallel", "2"], "process 0 has --model-parallel = 1, process 1 has 2"),
        (["--steps", "7"], "process 0 has steps = 5, process 1 has 7"),
        (["--config", "plain"], "process 0 has n_routed_experts = 4, process 1 has 0"),
    ],
)
@pytest.mark.slow
def test_processes_that_were_told_different_things(runs: Runs, differently: list[str], told: str) -> None:
    """As where each machine has a command, a config and a disk of its own."""
    flags = runs.flags("never-begun", steps=5)
    if differently[0] == "--config":
        differently = ["--config", str(runs.folder / "plain.json")]
    first, second = run_spoilt("pass", [flags, [*flags, *differently]])
    assert first[0] == second[0] == 2 and second[1] == ""
    assert first[1].count("\n") == 1 and (told in first[1] or differently[0] == "--config"), first
    assert not (runs.folder / "never-begun").exists()


def test_slices_of_a_batch_cover_it_once() -> None:
    """Every sequence of a batch is read by one data-parallel rank, the same one throughout a tensor-parallel group."""
    ctx = parallel.ParallelContext("cpu", 8, 0, 2)
    sequences = []
    for rank in range(ctx.dp_size):
        ctx.dp_rank = rank
        sequences += range(12)[ctx.data_parallel_slice(12)]
    assert sequences == list(range(12))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> soak.Soak:
    """A run that nobody disturbs, short enough for rounding in other layouts not to change how bytes are routed."""
    made = soak.Soak(tmp_path_factory.mktemp("nodes"), 1, 200, [], 0)
    assert made.start(made.folder / "alone", 1).wait() == 0
    return made


@pytest.fixture
def networks() -> Iterator[list[tuple[str, str, str]]]:
    """Two network namespaces joined by a cable: names, addresses and devices."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2 to make networks")
    made = [(f"bytegpt{i}-{os.getpid()}", f"10.77.0.{i}", f"cable{i}") for i in (1, 2)]
    commands = [f"netns add {name}" for name, _, _ in made]
    commands += [f"link add cable1 netns {made[0][0]} type veth peer name cable2 netns {made[1][0]}"]
    for name, address, device in made:
        commands += [f"-n {name} addr add {address}/24 dev {device}", f"-n {name} link set {device} up"]
        commands += [f"-n {name} link set lo up"]
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"ip {command}: {done.stderr.strip()}")
        yield made
    finally:
        for name, _, _ in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def leave_and_come_back(made: soak.Soak, run: Path, networks: list[tuple[str, str, str]]) -> None:
    """Trains on two nodes until one dies, on one until the other is back, and on two; compares the losses."""
    port, nodes = free_port(), []

    def node(i: int) -> subprocess.Popen:
        conf = f"is_host={int(i == 0)},last_call_timeout=1,keep_alive_interval=1"  # to notice in seconds, not a minute
        flags = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-id", run.name, "--rdzv-conf", conf]
        flags += ["--rdzv-endpoint", f"{networks[0][1] if networks else '127.0.0.1'}:{port}"]
        environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else torch's agents tell newcomers no address
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
def test_a_node_leaves_and_comes_back(alone: soak.Soak) -> None:
    leave_and_come_back(alone, alone.folder / "here", [])


@pytest.mark.slow
def test_a_machine_leaves_and_comes_back(alone: soak.Soak, networks: list[tuple[str, str, str]]) -> None:
    leave_and_come_back(alone, alone.folder / "elsewhere", networks)


@pytest.mark.slow
def test_generating_on_several_ranks_writes_the_same(runs: Runs) -> None:
    """From any form of a checkpoint, greedy and sampled; the first process alone prints."""
    save_model(runs.model(), runs.folder / "mp1")
    convert.convert(runs.folder / "mp1", runs.folder / "cut4", 4)
    convert.convert(runs.folder / "mp1", runs.folder / "hf", is_hf=True)
    (runs.folder / "prompts").write_text("12 is\n\n90\n")
    common = ["--device", "cpu", "--dtype", "fp32", "--max-new-tokens", "30", "--seed", "5"]
    scenarios = []
    for folder in ("mp1", "cut4", "hf"):
        for asked in (["--prompt", "7 is "], ["--input-file", str(runs.folder / "prompts")]):
            for heat in ("0", "0.9"):
                flags = ["--ckpt-path", str(runs.folder / folder), *asked, "--temperature", heat, *common]
                scenarios.append({"command": "generate", "flags": flags})
    (alone,) = launch(1, scenarios)
    speed = re.compile(r"\d+ bytes in .*")
    assert len(speed.findall(alone)) == len(scenarios)
    first, *others = launch(2, scenarios)
    assert speed.sub("", first) == speed.sub("", alone)
    assert others == [""]
    first, *others = launch(4, scenarios[:2])
    assert speed.sub("", alone).startswith(speed.sub("", first).rstrip()) and "7 is" in first
    assert others == [""] * 3


@pytest.mark.slow
def test_numbers_of_ranks_that_do_not_divide_a_model(runs: Runs) -> None:
    """The first process alone names the numbers of processes that can be, and a mistake in the flags."""
    save_model(runs.model(), runs.folder / "uncut")
    flags = ["--ckpt-path", str(runs.folder / "uncut"), "--device", "cpu", "--prompt", "7"]
    asked = [{"command": "generate", "code": 2, "flags": given} for given in (flags, [*flags, "--top-k", "many"])]
    first, *others = launch(3, asked)
    uncut, mistake = first.splitlines()
    assert uncut == "generate.py: error: vocab_size = 256 cannot be cut into 3; the number of processes can be 1, 2, 4"
    assert "--top-k" in mistake and others == ["", ""]


@pytest.mark.parametrize("by_torchrun", [True, False])
@pytest.mark.parametrize("name", ["train", "generate", "interactive"])
@pytest.mark.slow
def test_interrupted_by_the_user(runs: Runs, tmp_path: Path, name: str, by_torchrun: bool) -> None:
    """Ctrl-C, to torchrun or to each process: all end in seconds without a traceback, and a run is saved."""
    run = runs.folder / f"interrupted-{by_torchrun}"
    model = ["--ckpt-path", str(tmp_path / "model"), "--device", "cpu", "--dtype", "fp32"]
    command = {
        "train": ["train.py", *runs.flags(run.name, steps=100_000)],
        "generate": ["generate.py", *model, "--input-file", str(tmp_path / "many")],
        "interactive": ["generate.py", *model, "--interactive"],
    }[name]
    save_model(runs.model(), tmp_path / "model")
    (tmp_path / "many").write_text("12 is\n" * 10_000)
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
def test_only_the_first_prints(runs: Runs) -> None:
    first, second = launch(2, [{"flags": runs.flags("quiet", "--sample-bytes", 20, steps=2)}])
    assert "2 data-parallel" in first and "val_loss" in first and re.sub(r"(?m)^\[Gloo\].*\n", "", second) == ""


@pytest.mark.slow
def test_an_error_of_one_is_everybodys_and_the_run_stays(runs: Runs) -> None:
    """A file that cannot be written by the second process: the first tells, and the checkpoint before is whole."""
    launch(2, [resume_flags(runs, "full", 5, "--model-parallel", 2)])
    before = {path: path.read_bytes() for path in (runs.folder / "full").rglob("*.safetensors")}
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
    code += "import test_parallel as t, os, checkpoint as c\n"
    code += "write = c.write_all\ndef full(file, tensor):\n    if os.environ['RANK'] == '1':\n"
    code += "        raise OSError(28, 'No space left on device')\n    write(file, tensor)\nc.write_all = full\n"
    code += "import json; t.work(json.loads(sys.argv[1]))\n"
    scenario = resume_flags(runs, "full", 10, "--model-parallel", 2) | {"code": 2, "port": free_port()}
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
    after = {path: path.read_bytes() for path in (runs.folder / "full").rglob("*.safetensors")}
    assert after == before and not list((runs.folder / "full").glob(".*"))


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
