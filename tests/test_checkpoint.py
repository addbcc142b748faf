"""Native checkpoints and runs on disk: bytes and names, damage of every file, crashes, links, and second writers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import load_run, read_config, save_model, save_run
from convert import load_model
from model import ConfigError, ModelArgs, Transformer
from safetensors_io import CheckpointError

WEIGHTS = "model0-mp1.safetensors"
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
ATTENTION = ["wq.weight", "wkv_a.weight", "kv_norm.weight", "wkv_b.weight", "wo.weight"]
MOE = ["gate.weight", "gate.bias"]
MOE += [f"experts.{e}.{w}.weight" for e in range(4) for w in ("w1", "w2", "w3")]
MOE += [f"shared_experts.{w}.weight" for w in ("w1", "w2", "w3")]


def tiny(seed: int = 1, **changes: object) -> Transformer:
    """A small model no two numbers of which are equal, routing biases included."""
    model = Transformer(ModelArgs.from_dict(TINY | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model.eval()


def block(name: str, ffn: list[str]) -> list[str]:
    """The tensors of one block, by their native names."""
    parts = [f"attn.{leaf}" for leaf in ATTENTION] + [f"ffn.{leaf}" for leaf in ffn]
    return [f"{name}.{leaf}" for leaf in [*parts, "attn_norm.weight", "ffn_norm.weight"]]


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
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
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


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_run_folder_means_its_best_and_resumes_its_last(tmp_path: Path) -> None:
    for step, is_best in ((1, True), (2, False)):
        optimizer = {"norm.weight": {"step": torch.tensor(float(step)), "exp_avg": torch.full((8,), 0.5)}}
        save_run(tmp_path, tiny(step, dim=8), optimizer, {"step": step}, is_best)
    assert torch.equal(load_model(tmp_path).head.weight, tiny(1, dim=8).head.weight)
    assert torch.equal(load_model(tmp_path / "step-00000002").head.weight, tiny(2, dim=8).head.weight)
    model = tiny(3, dim=8)
    read, state = load_run(tmp_path, model)
    assert torch.equal(model.head.weight, tiny(2, dim=8).head.weight)
    assert read("head.weight", model.head.weight) == {} and state == {"step": 2}
    found = read("norm.weight", model.norm.weight)
    assert (
        found.keys() == {"step", "exp_avg"} and found["step"] == 2 and (found["exp_avg"] == torch.full((8,), 0.5)).all()
    )


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "", "none", "../other/step-00000001", "{run}/step-00000001", "a" * 300, "a\0b", 3, None]
)
def test_pointer_leads_nowhere_but_beside_itself(tmp_path: Path, name: object) -> None:
    run = tmp_path / "run"
    for folder in (run, tmp_path / "other"):
        save_run(folder, tiny(), {}, {"step": 1}, True)
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
    save_run(tmp_path, tiny(), {}, {"step": 1}, True)
    (tmp_path / "checkpoints.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path)
    one_line(error, tmp_path / "checkpoints.json")


def test_damaged_state_of_a_run(tmp_path: Path) -> None:
    model = tiny()
    optimizer = {"norm.weight": {"exp_avg": torch.ones_like(model.norm.weight)}}
    folder = save_run(tmp_path, model, optimizer, {"step": 1}, True)
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


def test_run_of_another_config_names_the_key(tmp_path: Path) -> None:
    folder = save_run(tmp_path, tiny(), {}, {"step": 1}, True)
    with pytest.raises(CheckpointError) as error:
        load_run(tmp_path, tiny(norm_eps=1e-5))
    one_line(error, folder, "norm_eps", "1e-06", "1e-05")
    load_run(tmp_path, tiny(max_batch_size=1))  # of no consequence


def test_a_save_sweeps_nothing_of_the_user(tmp_path: Path) -> None:
    save_run(tmp_path, tiny(), {}, {"step": 1}, False)
    kept = ["step-00000001-hf", "step-1", "step-notes", ".step-00000001-hf.tmp"]
    litter = ["step-00000007", ".step-00000008.tmp", ".step-123456789.tmp"]
    for name in kept + litter:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".step-00000009.lock").touch()
    save_run(tmp_path, tiny(), {}, {"step": 2}, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "checkpoints.json", "step-00000002"])
