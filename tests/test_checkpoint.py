"""Native checkpoints and runs on disk: bytes and names, damage of every file, crashes, links, and second writers."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, tiny
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import Run, has_run, load_run, read_config, save_model, save_run
from convert import convert, load_model, open_checkpoint
from model import ConfigError, ModelArgs, Transformer
from parallel import ParallelContext, build
from safetensors_io import CheckpointError, temporary_path

WEIGHTS = "model0-mp1.safetensors"
ATTENTION = ["wq.weight", "wkv_a.weight", "kv_norm.weight", "wkv_b.weight", "wo.weight"]
MOE = ["gate.weight", "gate.bias"]
MOE += [f"experts.{e}.{w}.weight" for e in range(4) for w in ("w1", "w2", "w3")]
MOE += [f"shared_experts.{w}.weight" for w in ("w1", "w2", "w3")]


def block(name: str, ffn: list[str]) -> list[str]:
    """The tensors of one block, by their native names."""
    parts = [f"attn.{leaf}" for leaf in ATTENTION] + [f"ffn.{leaf}" for leaf in ffn]
    return [f"{name}.{leaf}" for leaf in [*parts, "attn_norm.weight", "ffn_norm.weight"]]


def state_of(model: Transformer, step: int) -> dict[str, dict[str, torch.Tensor]]:
    """An optimizer's state: matrices with a momentum as by Muon, all others as by AdamW; no two numbers are equal."""
    generator, found = torch.Generator().manual_seed(step), {}
    for name, p in model.named_parameters():
        found[name] = {key: torch.rand(p.shape, generator=generator) for key in keys_of(p) if key != "step"}
        if p.ndim == 1:
            found[name]["step"] = torch.tensor(float(step))
    return found


def keys_of(p: torch.Tensor) -> list[str]:
    return ["momentum_buffer"] if p.ndim > 1 else ["step", "exp_avg", "exp_avg_sq"]


def save_step(folder: Path, step: int, is_best: bool = True, **changes: Any) -> Path:
    """Saves a step of a run, with weights and state that are its own."""
    model = tiny(step, **changes)
    with Run(folder) as run:
        return save_run(run, model, state_of(model, step), {"step": step}, is_best)


def read_all(run: Path, model: Transformer) -> dict[str, dict[str, torch.Tensor]]:
    """The state of all parameters, as a trainer reads it."""
    read, _ = load_run(run, model)
    return {name: read(name, p, keys_of(p)) for name, p in model.named_parameters()}


def change(file: Path, what: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Changes the tensors in a file."""
    tensors = load_file(file)
    what(tensors)
    save_file(tensors, file)


def contents(folder: Path) -> dict[Path, bytes]:
    """All regular files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    save_model(tiny(), tmp_path / "saved")
    return tmp_path / "saved"


def one_line(error: pytest.ExceptionInfo, *parts: object) -> None:
    """The message is one line and names all that it should."""
    message = str(error.value)
    assert message and "\n" not in message
    for part in parts:
        assert str(part) in message


# --- Round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": 6}, {"kv_lora_rank": 0}, {"n_routed_experts": 0}, {"gate_bias": False, "n_mtp_layers": 2}],
)
def test_round_trip(tmp_path: Path, changes: dict[str, object]) -> None:
    model, tokens = tiny(**changes), torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "a" / "b")
    loaded = load_model(tmp_path / "a" / "b")
    assert loaded.args == model.args
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    with torch.no_grad():
        assert torch.equal(model(tokens), loaded(tokens))
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_saved_again_is_the_same_bytes(tmp_path: Path) -> None:
    save_model(tiny(), tmp_path / "a")
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.json", WEIGHTS]
    for file in ("config.json", WEIGHTS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_names_and_content_are_native(saved: Path) -> None:
    dense = [f"{w}.weight" for w in ("w1", "w2", "w3")]
    names = ["embed.weight", "norm.weight", "head.weight"]
    names += block("layers.0", dense) + block("layers.1", MOE) + block("layers.2", dense)
    names += [f"mtp.0.{leaf}.weight" for leaf in ("enorm", "hnorm", "eh_proj", "norm")] + block("mtp.0.block", MOE)
    tensors, model = load_file(saved / WEIGHTS), tiny()
    assert sorted(tensors) == sorted(names)
    experts = model.layers[1].ffn.experts
    assert torch.equal(tensors["layers.1.ffn.experts.3.w1.weight"], experts.w1.weight[3])
    assert torch.equal(tensors["layers.1.ffn.experts.0.w2.weight"], experts.w2.weight[0])
    assert torch.equal(tensors["mtp.0.block.ffn.experts.2.w3.weight"], model.mtp[0].block.ffn.experts.w3.weight[2])
    assert torch.equal(tensors["layers.1.ffn.gate.bias"], model.layers[1].ffn.gate.bias)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_config_is_the_model_args(saved: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    assert values == tiny().args.to_dict()
    assert read_config(saved / "config.json") == (tiny().args, {})


def test_bfloat16_survives_the_round_trip(saved: Path, tmp_path: Path) -> None:
    model = load_model(saved, compute_dtype=torch.bfloat16)
    save_model(model, tmp_path / "b")
    again = load_model(tmp_path / "b", compute_dtype=torch.bfloat16)
    assert again.args.dtype == "bf16"
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_existing_target_is_refused_untouched(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("mine")
    elif kind == "link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError) as error:
        save_model(tiny(), target)
    one_line(error, target)
    assert sorted(tmp_path.rglob("*")) == before


def test_failing_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(file: Any, _: torch.Tensor) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_all", full_disk)
    with pytest.raises(CheckpointError) as error:
        save_model(tiny(), tmp_path / "out")
    one_line(error, tmp_path / "out", "No space left")
    assert list(tmp_path.iterdir()) == []


def test_missing_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "none")
    one_line(error, tmp_path / "none")
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path)
    one_line(error, tmp_path, "no checkpoint")
    (tmp_path / "file").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "file")
    one_line(error, tmp_path / "file")


def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    save_step(tmp_path / "run", 1)
    (tmp_path / "run").chmod(0)
    user = os.geteuid()
    if user == 0:  # whom nothing is forbidden
        os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match="run cannot be read: Permission denied"):
            load_model(tmp_path / "run")
    finally:
        os.seteuid(user)
        (tmp_path / "run").chmod(0o700)


def test_missing_weights_file(saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    with pytest.raises(CheckpointError) as error:
        load_model(saved)
    one_line(error, saved / WEIGHTS)
    (saved / WEIGHTS).mkdir()
    with pytest.raises(CheckpointError) as error:
        load_model(saved)
    one_line(error, saved / WEIGHTS)


@pytest.mark.parametrize("name", ["head.weight", "layers.1.ffn.experts.3.w1.weight", "mtp.0.block.ffn.gate.bias"])
@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_wrong_tensor_is_named(saved: Path, name: str, change: str) -> None:
    file = saved / WEIGHTS
    tensors = load_file(file)
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        name = name.replace("weight", "weight_2").replace("bias", "bias_2")
        tensors[name] = torch.zeros(3)
    else:
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as error:
        load_model(saved)
    one_line(error, file, f"tensor {name} ", *(["has shape"] if change == "shape" else []))


@pytest.mark.parametrize("change", [{"n_layers": 4}, {"dim": 32}, {"n_routed_experts": 8}, {"n_mtp_layers": 0}])
def test_config_of_another_model(saved: Path, change: dict[str, int]) -> None:
    (saved / "config.json").write_text(json.dumps(TINY | change))
    with pytest.raises(CheckpointError) as error:
        load_model(saved)
    one_line(error, saved / WEIGHTS, "tensor", "config.json")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "JSON"),
        ("[1]", "object"),
        ("\xff", "JSON"),
        ("[" * 100_000, "JSON"),
        ('{"dim": "wide"}', "dim"),
        ('{"dimension": 3}', "dimension"),
        ('{"dim": 0}', "dim"),
        ('{"train": 3}', "train"),
    ],
)
def test_damaged_config(saved: Path, text: str, part: str) -> None:
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as error:
        load_model(saved)
    one_line(error, saved / "config.json", part)


@pytest.mark.parametrize(
    "name",
    ["._model0-mp1.safetensors", "adapter_model.safetensors", "model0-mp1 (1).safetensors", "model01-mp1.safetensors"],
)
def test_stray_file_is_named(saved: Path, name: str) -> None:
    (saved / name).write_bytes(b"anything")
    with pytest.raises(CheckpointError) as error:
        load_model(saved)
    one_line(error, saved / name, "remove")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["layers.1.ffn.gate.bias", "mtp.0.enorm.weight", "layers.1.ffn.experts.2.w3.weight"])
def test_numbers_that_are_none(tmp_path: Path, name: str, value: float) -> None:
    folder = save_step(tmp_path / "run", 3)
    change(folder / WEIGHTS, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    for load in (load_model, lambda run: load_run(run, tiny())):
        with pytest.raises(CheckpointError) as error:
            load(tmp_path / "run")
        one_line(error, folder / WEIGHTS, name)


def test_full_disk_names_the_file_and_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path / "run", 1)
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # the system's own error, of files of more than so much
    for limit in (20_000, 100, 0):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(CheckpointError) as error:
                save_step(tmp_path / "run", 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        one_line(error, "step-00000002", "File too large")
        assert contents(tmp_path) == before and "Errno" not in str(error.value)

    def full_disk(file: Any, _: torch.Tensor) -> None:
        raise OSError(28, "No space left on device", file.name)

    monkeypatch.setattr(checkpoint, "write_all", full_disk)
    with pytest.raises(CheckpointError) as error:
        save_step(tmp_path / "run", 2)
    one_line(error, "step-00000002", WEIGHTS, "No space left on device", "free some space")


@pytest.mark.parametrize("name", [".step-00000009.tmp", ".step-00000002.tmp", "step-00000009", "step-00000002"])
def test_pipes_in_place_of_folders(tmp_path: Path, name: str) -> None:
    """Nothing waits for somebody to write into them, and they stay."""
    save_step(tmp_path / "run", 1)
    os.mkfifo(tmp_path / "run" / name)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(20)
    try:
        with contextlib.nullcontext() if "9" in name else pytest.raises(CheckpointError, match=name):
            save_step(tmp_path / "run", 2)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "run" / name).is_fifo() and load_run(tmp_path / "run", tiny())[1]["step"] == 1 + ("9" in name)


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_run_folder_means_its_best_and_resumes_its_last(tmp_path: Path) -> None:
    for step, is_best in ((1, True), (2, False)):
        save_step(tmp_path, step, is_best, dim=8)
    assert has_run(tmp_path)
    assert torch.equal(load_model(tmp_path).head.weight, tiny(1, dim=8).head.weight)
    assert torch.equal(load_model(tmp_path / "step-00000002").head.weight, tiny(2, dim=8).head.weight)
    model = tiny(3, dim=8)
    read, state = load_run(tmp_path, model)
    assert torch.equal(model.head.weight, tiny(2, dim=8).head.weight) and state == {"step": 2}
    for name, tensors in state_of(model, 2).items():
        found = read(name, model.get_parameter(name), list(tensors))
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) and found[key].shape == tensors[key].shape for key in found)


def test_lost_pointer(tmp_path: Path) -> None:
    """As after a crash before the pointer was written first: the newest complete checkpoint is taken."""
    for step in (3, 12, 7):
        save_step(tmp_path / str(step), step)
        shutil.copytree(tmp_path / str(step) / f"step-{step:08d}", tmp_path / "run" / f"step-{step:08d}")
    (tmp_path / "run" / "step-00000099").mkdir()  # not complete
    assert has_run(tmp_path / "run") and load_run(tmp_path / "run", tiny())[1] == {"step": 12}
    assert not has_run(tmp_path) and not has_run(tmp_path / "none")


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "..", ".", "", "none", "../other/step-00000001", "{run}/step-00000001", "a" * 300, "a\0b", 3, None),
        *("step-00000002", "step-" + "1" * 300, ["step-00000001"]),
    ],
)
def test_pointer_leads_nowhere_but_beside_itself(tmp_path: Path, name: object) -> None:
    run = tmp_path / "run"
    for folder in (run, tmp_path / "other"):
        save_step(folder, 1)
    save_model(tiny(), tmp_path / "x")
    for file in ("config.json", WEIGHTS):
        shutil.copy(tmp_path / "x" / file, tmp_path / file)  # the parent folder is a checkpoint too
    name = name.replace("{run}", str(run)) if isinstance(name, str) else name
    (run / "checkpoints.json").write_text(json.dumps({"last": name, "best": name}))
    for load in (lambda: load_model(run), lambda: load_run(run, tiny())):
        with pytest.raises(CheckpointError) as error:
            load()
        one_line(error, run / "checkpoints.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"best": "step-00000001"'])
def test_damaged_pointer(tmp_path: Path, text: str) -> None:
    save_step(tmp_path, 1)
    (tmp_path / "checkpoints.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path)
    one_line(error, tmp_path / "checkpoints.json")


@pytest.mark.parametrize("has_pointer", [True, False])
def test_a_checkpoint_and_a_run_in_one_folder(saved: Path, has_pointer: bool) -> None:
    """Neither is taken for the other, and none is written into the other."""
    before = contents(saved)
    assert not has_run(saved)
    with pytest.raises(CheckpointError) as error:
        save_step(saved, 4)
    one_line(error, saved, "config.json", "--save-path")
    assert contents(saved) == before
    shutil.copytree(save_step(saved.parent / "run", 4).parent, saved, dirs_exist_ok=True)
    if not has_pointer:
        (saved / "checkpoints.json").unlink()
    for load in (load_model, lambda run: load_run(run, tiny())):
        with pytest.raises(CheckpointError) as error:
            load(saved)
        one_line(error, saved, "both", "config.json", "checkpoints.json")


def test_damaged_state_of_a_run(tmp_path: Path) -> None:
    folder = save_step(tmp_path, 1)
    whole = (folder / "state0-mp1.safetensors").read_bytes()
    for damaged in (whole[:-1], whole[:9], b""):
        (folder / "state0-mp1.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError) as error:
            load_run(tmp_path, tiny())
        one_line(error, folder / "state0-mp1.safetensors")
    (folder / "state0-mp1.safetensors").write_bytes(whole)
    for text in ("{", "3"):
        (folder / "state.json").write_text(text)
        with pytest.raises(CheckpointError) as error:
            load_run(tmp_path, tiny())
        one_line(error, folder / "state.json")
    (folder / "state.json").unlink()
    with pytest.raises(CheckpointError) as error:
        load_run(tmp_path, tiny())
    one_line(error, folder / "state.json")


MATRIX, NORM, EXPERTS = "layers.0.ffn.w2.weight", "layers.2.attn_norm.weight", "layers.1.ffn.experts.w1.weight"


def damages() -> dict[str, Callable[[dict[str, torch.Tensor]], Any]]:
    """Ways to damage the tensors of an optimizer; the tensor that a message must name comes first."""

    def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], Any]:
        return lambda tensors: tensors.__setitem__(name, make(tensors[name]).contiguous())

    average, square, momentum = f"{NORM}.exp_avg", f"{NORM}.exp_avg_sq", f"{MATRIX}.momentum_buffer"
    return {
        f"{average} a number": put(average, lambda t: t[0]),
        f"{square} a number": put(square, lambda t: t[3]),
        f"{average} empty": put(average, lambda t: t[:0]),
        f"{square} longer": put(square, lambda t: t.repeat(2)),
        f"{average} a matrix": put(average, lambda t: t.view(4, 4)),
        f"{square} bfloat16": put(square, torch.Tensor.bfloat16),
        f"{average} integers": put(average, torch.Tensor.int),
        f"{average} NaN": put(average, lambda t: t.index_fill(0, torch.tensor([5]), float("nan"))),
        f"{square} infinite": put(square, lambda t: t / 0),
        f"{average} missing": lambda tensors: tensors.pop(average),
        f"{square} renamed": lambda tensors: tensors.update({f"{NORM}.exp_avg_sqr": tensors.pop(square)}),
        f"{NORM}.step missing": lambda tensors: tensors.pop(f"{NORM}.step"),
        f"{NORM}.step a vector": put(f"{NORM}.step", lambda t: t.view(1)),
        f"{NORM}.step an integer": put(f"{NORM}.step", torch.Tensor.long),
        f"{NORM}.step 0": put(f"{NORM}.step", torch.zeros_like),
        f"{NORM}.step negative": put(f"{NORM}.step", torch.neg),
        f"{square} negative": put(square, lambda t: t.index_fill(0, torch.tensor([7]), -1e-3)),
        f"{momentum} a vector": put(momentum, torch.Tensor.flatten),
        f"{momentum} transposed": put(momentum, lambda t: t.mT),
        f"{momentum} float64": put(momentum, torch.Tensor.double),
        f"{momentum} as by AdamW": lambda tensors: tensors.update({f"{MATRIX}.exp_avg": tensors.pop(momentum)}),
        f"{EXPERTS}.momentum_buffer flat": put(f"{EXPERTS}.momentum_buffer", lambda t: t.flatten(0, 1)),
        f"{EXPERTS}.momentum_buffer fewer": put(f"{EXPERTS}.momentum_buffer", lambda t: t[:3]),
        f"{NORM}.step all gone": lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(NORM)],
        "embed.weight.momentum_buffer all gone": lambda tensors: tensors.clear(),
        "layers.9.attn_norm.weight.exp_avg extra": lambda tensors: tensors.update(
            {"layers.9.attn_norm.weight.exp_avg": torch.zeros(16)}
        ),
    }


@pytest.mark.parametrize("damage", damages())
def test_damaged_optimizer_state_is_named(tmp_path: Path, damage: str) -> None:
    folder = save_step(tmp_path, 5)
    file = folder / "state0-mp1.safetensors"
    change(file, damages()[damage])
    with pytest.raises(CheckpointError) as error:
        read_all(tmp_path, tiny())
    one_line(error, file, damage.split()[0])


def test_no_optimizer_state_before_the_first_step(tmp_path: Path) -> None:
    """As where a signal came first. After a step it would be state that is lost."""
    for step, is_right in ((0, True), (1, False)):
        with Run(tmp_path / str(step)) as run:
            save_run(run, tiny(), {}, {"step": step}, True)
        if is_right:
            assert not any(read_all(tmp_path / "0", tiny()).values())
        else:
            with pytest.raises(CheckpointError, match="missing"):
                read_all(tmp_path / "1", tiny())


class Rank(ParallelContext):
    """One tensor-parallel rank of several, which take turns in one process."""

    def __init__(self, rank: int, world: int):
        super().__init__("cpu", world, rank, world)

    def raise_if_any_failed(self, error: Exception | None = None) -> None:
        if error is not None:
            raise error


def shard_run(source: Path, target: Path, world: int) -> Path:
    """Writes a run's last checkpoint again as so many ranks would: each fills a folder, and these are joined."""
    for rank in range(world):
        ctx = Rank(rank, world)
        model = build(ctx, ModelArgs.from_dict(TINY), torch.float32)
        read, state = load_run(source, model, ctx)
        found = {name: read(name, p, keys_of(p)) for name, p in model.named_parameters()}
        ctx.rank = 0
        with Run(target / str(rank), ctx) as run:
            folder = save_run(run, model, found, state, True)
        shutil.copytree(target / str(rank), target / "run", dirs_exist_ok=True)
    return target / "run" / folder.name


def test_state_is_resharded_exactly(tmp_path: Path) -> None:
    save_step(tmp_path / "1", 8)
    shard_run(tmp_path / "1", tmp_path / "2", 2)
    folder = shard_run(tmp_path / "2" / "run", tmp_path / "back", 1)
    assert len(list((tmp_path / "2" / "run").rglob("*-mp2.safetensors"))) == 4
    for file in (WEIGHTS, "state0-mp1.safetensors"):
        assert (folder / file).read_bytes() == (tmp_path / "1" / "step-00000008" / file).read_bytes()


@pytest.mark.parametrize("name", [f"{MATRIX}.momentum_buffer", f"{EXPERTS}.momentum_buffer", f"{NORM}.exp_avg"])
def test_damaged_state_of_the_second_rank(tmp_path: Path, name: str) -> None:
    save_step(tmp_path / "1", 8)
    file = shard_run(tmp_path / "1", tmp_path / "2", 2) / "state1-mp2.safetensors"
    whole = file.read_bytes()
    for what in (
        lambda tensors: tensors.pop(name),
        lambda tensors: tensors.update({name: tensors[name][:1].contiguous()}),
        lambda tensors: tensors.update({name: tensors[name].half()}),
        lambda tensors: tensors[name].view(-1)[-1:].fill_(float("inf")),
    ):
        change(file, what)
        with pytest.raises(CheckpointError) as error:
            read_all(tmp_path / "2" / "run", tiny())
        one_line(error, file, name)
        file.write_bytes(whole)
    read_all(tmp_path / "2" / "run", tiny())


def test_run_of_another_config_names_the_key(tmp_path: Path) -> None:
    folder = save_step(tmp_path, 1)
    with pytest.raises(CheckpointError) as error:
        load_run(tmp_path, tiny(norm_eps=1e-5))
    one_line(error, folder, "norm_eps", "1e-06", "1e-05")
    load_run(tmp_path, tiny(max_batch_size=1))  # of no consequence


def test_a_save_sweeps_nothing_of_the_user(tmp_path: Path) -> None:
    save_step(tmp_path, 1, False)
    kept = ["step-00000001-hf", "step-1", "step-notes", ".step-00000001-hf.tmp"]
    litter = ["step-00000007", ".step-00000008.tmp", ".step-123456789.tmp"]
    for name in kept + litter:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".step-00000009.lock").touch()
    save_step(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "checkpoints.json", "step-00000002"])


def test_the_newest_others_are_kept(tmp_path: Path) -> None:
    """Beside the last and the best; what is of a later step was left by a crash, and comes again."""
    for step, is_best in ((1, False), (2, True), (3, False), (4, False), (5, False), (6, False)):
        (tmp_path / "step-00000009").mkdir(parents=True, exist_ok=True)
        with Run(tmp_path) as run:
            save_run(run, tiny(dim=8), {}, {"step": step}, is_best, 2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-0000000{step}" for step in (2, 4, 5, 6)]


def test_weights_are_distinguished(tmp_path: Path) -> None:
    """By a CRC-32 of few of them, which is the same in each format and any number of files."""
    save_model(tiny(1), tmp_path / "a")
    save_model(tiny(2), tmp_path / "b")
    convert(tmp_path / "a", tmp_path / "mp2", 2)
    convert(tmp_path / "a", tmp_path / "hf", is_hf=True)
    first, other, *same = (open_checkpoint(tmp_path / name).fingerprint() for name in ("a", "b", "mp2", "hf"))
    assert first != other and same == [first, first]


class Crash(BaseException):
    """The end of the process, as far as the code can tell."""


def crash_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Makes the process die at the given call of what changes the disk: from then on nothing has an effect."""
    left = [calls]

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] >= 0:
                return function(*args, **options)
            if left[0] == -1 and function is write_shards:  # half of a file
                (temporary_path(args[1]) / f"{args[0]}0-mp1.safetensors").write_bytes(b"torn")
            raise Crash

        return wrapper

    write_shards = checkpoint._write_shards
    monkeypatch.setattr(checkpoint, "_write_shards", dying(write_shards))
    for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    for owner, name in ((shutil, "rmtree"), (os, "fsync"), (os, "replace"), (os, "unlink")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))


def test_crash_at_every_moment_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was the last thing done to the disk, the run goes on from the old or the new checkpoint."""
    run, kept, resumed = tmp_path / "run", tmp_path / "kept", []
    small = {"n_layers": 1, "n_mtp_layers": 0}
    monkeypatch.setattr(os, "fsync", lambda _: None)  # which takes most of the time
    save_step(run, 1, **small)
    shutil.copytree(run, kept)
    for calls in range(100):
        crashed = True
        with monkeypatch.context() as patch, contextlib.suppress(Crash):
            crash_after(patch, calls)
            save_step(run, 2, **small)
            crashed = False
        model = tiny(9, **small)
        resumed.append(load_run(run, model)[1]["step"])
        assert torch.equal(model.head.weight, tiny(resumed[-1], **small).head.weight)
        assert torch.equal(load_model(run).head.weight, model.head.weight)
        # and the next saves, of that step and another, leave no litter
        for step in (resumed[-1], 3):
            save_step(run, step, **small)
        assert {path.name for path in run.iterdir()} == {"checkpoints.json", "step-00000003"}
        shutil.rmtree(run)
        shutil.copytree(kept, run)
        if not crashed:
            break
    assert not crashed and calls > 10
    assert resumed == sorted(resumed) and set(resumed) == {1, 2}


# --- Folders from somebody else ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["checkpoints.json", "step-00000006", "state.json", "config.json", WEIGHTS])
def test_links_out_of_a_run_are_refused(tmp_path: Path, name: str) -> None:
    """Although what they lead to is all right."""
    folder = save_step(tmp_path / "run", 6)
    path = tmp_path / "run" / name if name[0] in "cs" and name not in ("config.json", "state.json") else folder / name
    for target in ("elsewhere", "run-2"):
        path.rename(tmp_path / target)
        path.symlink_to(os.path.relpath(tmp_path / target, path.parent))
        with pytest.raises(CheckpointError) as error:
            load_run(tmp_path / "run", tiny())
        one_line(error, path, "link", tmp_path / target)
        path.unlink()
        (tmp_path / target).rename(path)
    load_run(tmp_path / "run", tiny())


def test_links_into_the_cache_of_a_hub_are_followed(saved: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    for number, file in enumerate(saved.iterdir()):
        shutil.copy(file, snapshot.parents[1] / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    assert torch.equal(load_model(snapshot).norm.weight, tiny().norm.weight)


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device"])
@pytest.mark.parametrize("name", ["checkpoints.json", "state.json", "config.json", WEIGHTS, "state0-mp1.safetensors"])
def test_other_kinds_of_files_are_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    run = tmp_path / "run"
    path = (run if name == "checkpoints.json" else save_step(run, 6)) / name
    save_step(run, 6)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, 0o140644) if os.geteuid() == 0 else os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError) as error:
        load_run(run, tiny())
    one_line(error, path)


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize(
    "name",
    [".checkpoints.json.tmp", "checkpoints.json", "step-00000006/.state.json.tmp", "step-00000006/state.json"]
    + [".step-00000007.lock", ".step-00000007.tmp", "step-00000007"],
)
def test_nothing_is_written_through_links(tmp_path: Path, name: str, is_there: bool) -> None:
    """Saves of the step that is there already, and of the next one: a link is replaced, or refused by its name."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    save_step(run, 6)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside)
    if is_there:
        outside.write_bytes(b"" if name.endswith(".lock") else b'{"mine": 1}')
    for step in (6, 7):
        try:
            save_step(run, step)
        except CheckpointError as error:
            assert "\n" not in str(error) and Path(name).name in str(error), error
    if is_there:
        assert outside.read_bytes() == (b"" if name.endswith(".lock") else b'{"mine": 1}')
    else:
        assert not os.path.lexists(outside)


def test_a_linked_step_is_not_written(tmp_path: Path) -> None:
    save_step(tmp_path / "other", 6)
    save_step(tmp_path / "run", 6)
    shutil.rmtree(tmp_path / "run" / "step-00000006")
    (tmp_path / "run" / "step-00000006").symlink_to("../other/step-00000006")
    before = contents(tmp_path / "other")
    with pytest.raises(CheckpointError) as error:
        save_step(tmp_path / "run", 6)
    one_line(error, tmp_path / "run" / "step-00000006", "link")
    assert contents(tmp_path / "other") == before


# --- One writer, one folder -------------------------------------------------------------------------------------------


def test_nothing_is_made_before_there_is_something_to_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run(tmp_path / "a" / "run") as run:
        assert os.listdir(tmp_path) == [] and os.fspath(run) == str(tmp_path / "a" / "run")
    assert os.listdir(tmp_path) == []
    for is_mine in (False, True):
        if is_mine:
            (tmp_path / "run").mkdir()
        with Run(tmp_path / "run") as run:
            run.folder_fd()
            assert os.listdir(tmp_path) == ["run"]
        assert os.listdir(tmp_path) == (["run"] if is_mine else [])  # nothing came into it
    (tmp_path / "run").rmdir()
    monkeypatch.setattr(checkpoint, "write_all", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(CheckpointError):
        save_step(tmp_path / "run", 1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("is_there", [True, False])
def test_a_second_writer_is_refused(tmp_path: Path, is_there: bool) -> None:
    path = tmp_path / "run"
    if is_there:
        save_step(path, 1)
    with Run(path) as first:
        if is_there:
            with pytest.raises(CheckpointError) as error:
                Run(path)
            one_line(error, path, "another process")
        else:  # it may have begun already, and comes when it has something to keep
            with Run(path) as second:
                save_run(first, tiny(2), state_of(tiny(2), 2), {"step": 2}, True)
                before = contents(path)
                for _ in range(2):
                    with pytest.raises(CheckpointError) as error:
                        save_run(second, tiny(3), state_of(tiny(3), 3), {"step": 3}, True)
                    one_line(error, path, "another process")
                assert contents(path) == before
        other = ParallelContext()
        other.rank = 1  # of the same job, of which the first process has the lock
        Run(path, other)
    save_step(path, 4)


def test_a_run_that_came_and_went_meanwhile_is_kept(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as late:
        save_step(tmp_path / "run", 5)
        before = contents(tmp_path)
        with pytest.raises(CheckpointError) as error:
            save_run(late, tiny(), {}, {"step": 0}, True)
        one_line(error, tmp_path / "run", "meanwhile")
        assert contents(tmp_path) == before


@pytest.mark.parametrize("what", ["renamed", "replaced", "removed", "link turned", "parent renamed", "became a file"])
def test_a_folder_that_is_gone_ends_the_run(tmp_path: Path, what: str) -> None:
    """The path may lead nowhere, or to another folder, such as the bare mount point of a disk."""
    disk, path = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    if what == "link turned":
        (tmp_path / "new").mkdir()
        save_step(tmp_path / "old", 1)
        path.symlink_to(tmp_path / "old")
    with Run(path) as run:
        save_run(run, tiny(2), state_of(tiny(2), 2), {"step": 2}, True)
        if what == "link turned":
            path.unlink()
            path.symlink_to(tmp_path / "new")
        elif what == "parent renamed":
            disk.rename(tmp_path / "away")
            disk.mkdir()
        elif what == "removed":
            shutil.rmtree(path)
        else:
            path.rename(tmp_path / "away")
        if what == "replaced":
            path.mkdir()
        elif what == "became a file":
            path.write_text("mine")
        before = sorted(tmp_path.rglob("*")), contents(tmp_path)
        for use in (run.folder_fd, lambda: save_run(run, tiny(3), state_of(tiny(3), 3), {"step": 3}, True)):
            with pytest.raises(CheckpointError) as error:
                use()
            one_line(error, path, "renamed")
        assert (sorted(tmp_path.rglob("*")), contents(tmp_path)) == before


def test_a_folder_that_moved_behind_a_link_is_found(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        run.folder_fd()
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").symlink_to("moved")
        save_run(run, tiny(2), state_of(tiny(2), 2), {"step": 2}, True)
    assert (tmp_path / "moved" / "checkpoints.json").exists()


def test_a_disk_that_goes_before_the_first_save(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with Run(tmp_path / "disk" / "mine" / "run") as run:
        (tmp_path / "disk").rename(tmp_path / "away")
        (tmp_path / "disk").mkdir()  # the bare mount point
        with pytest.raises(CheckpointError) as error:
            run.folder_fd()
        one_line(error, tmp_path / "disk")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "away", tmp_path / "disk"]


@pytest.mark.parametrize("name", ["file", "file/run", "dangling", "dangling/run"])
def test_a_path_that_can_be_no_folder(tmp_path: Path, name: str) -> None:
    """Is refused at the start, not at the first save."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(CheckpointError) as error:
        Run(tmp_path / name)
    one_line(error, tmp_path / name.split("/")[0])
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file"]


HOLDER = """
import sys, time, torch
from checkpoint import Run
run = Run(sys.argv[1])
run.folder_fd()
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    root = Path(checkpoint.__file__).parent
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, cwd=root)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(CheckpointError) as error:
        save_step(tmp_path / "run", 1)
    one_line(error, tmp_path / "run", "another process")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    save_step(tmp_path / "run", 1)


@pytest.mark.slow
def test_train_py_holds_its_run(tmp_path: Path) -> None:
    """Real processes: a second one is refused in a line, and the first ends with another when its folder is moved."""
    root, path, data = Path(checkpoint.__file__).parent, tmp_path / "run", tmp_path / "data"
    data.write_bytes(b"any text will do. " * 300)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    flags = ["--config", tmp_path / "config.json", "--data", data, "--steps", 10**6, "--save-path", path]
    flags += ["--batch-size", 2, "--log-interval", 1, "--device", "cpu", "--dtype", "fp32", "--resume"]
    command = [sys.executable, root / "train.py", *map(str, flags)]
    options = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **options) as first:
        try:
            while not (path / "metrics.jsonl").exists() and first.poll() is None:
                time.sleep(0.1)
            second = subprocess.run(command, **options)
            assert second.returncode == 2 and re.fullmatch(r"train.py: error: .*another process.*\n", second.stderr)
            assert first.poll() is None
            path.rename(tmp_path / "elsewhere")
            _, error = first.communicate()
        finally:
            first.kill()
    assert first.returncode == 2 and re.fullmatch(r"train.py: error: .*renamed.*\n", error), error
    assert str(path) in error and not path.exists()
    assert json.loads((tmp_path / "elsewhere" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
