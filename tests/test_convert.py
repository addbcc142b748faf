"""Checkpoints: what is written comes back, under DeepSeek's names, and whatever is damaged is told in one line."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config, pipeline

import checkpoint as checkpoints
import convert
import generate
import parallel
import safetensors_io
from checkpoint import load_run, read_config, save_model, save_run
from convert import args_from_hf, hf_config, load_model, open_checkpoint
from fp8_ops import weight_dequant, weight_quant
from model import ConfigError, ModelArgs, Transformer
from safetensors_io import CheckpointError

WEIGHTS, INDEX = "model0-mp1.safetensors", "model.safetensors.index.json"
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


def test_loading_casts_matrices_once_but_not_the_router(saved: Path) -> None:
    model = load_model(saved, compute_dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        kept = tensor.ndim == 1 or name.endswith("gate.weight")
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
    original = tiny()
    assert torch.equal(model.layers[1].ffn.gate.weight, original.layers[1].ffn.gate.weight)
    assert torch.equal(model.head.weight, original.head.weight.bfloat16())
    assert model(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()


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

    monkeypatch.setattr(checkpoints, "write_all", full_disk)
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


def flip_header(data: bytes) -> bytes:
    """Declares a header of 2^60 bytes."""
    return b"\0" * 7 + b"\x10" + data[8:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:4],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data + b"\0",
        lambda data: data[:8] + b"\xff" * 64 + data[72:],
        flip_header,
        lambda data: b"not safetensors at all, but long enough to be something else",
    ],
    ids=["empty", "4 bytes", "in the header", "a byte short", "half", "a byte more", "garbage", "huge header", "text"],
)
def test_damaged_weights_name_the_file(saved: Path, damage: Callable[[bytes], bytes]) -> None:
    file = saved / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError) as error:
        load_model(saved)
    one_line(error, file)


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


# --- A run's folder ---------------------------------------------------------------------------------------------------


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


# --- Resharding -------------------------------------------------------------------------------------------------------

ROOT = Path(convert.__file__).parent
E4M3 = torch.float8_e4m3fn
draws = settings(max_examples=7, deadline=None, derandomize=True, database=None)
TOKENS = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def quiet_and_on_one_thread() -> Iterator[None]:
    """Models this small only lose by being shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of a folder by file, read by safetensors itself."""
    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


def assert_same(a: Path, b: Path) -> None:
    """Two folders hold the same tensors, bit for bit, and the same config."""
    assert json.loads((a / "config.json").read_text()) == json.loads((b / "config.json").read_text())
    ours, theirs = tensors_of(a), tensors_of(b)
    assert ours.keys() == theirs.keys()
    for file in ours:
        assert ours[file].keys() == theirs[file].keys()
        for name, tensor in ours[file].items():
            other = theirs[file][name]
            assert tensor.dtype == other.dtype and tensor.shape == other.shape, name
            assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), name


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder)(TOKENS)


def run(*flags: object) -> int:
    """The command, in this process."""
    return convert.main([str(flag) for flag in flags])


@st.composite
def divisible(draw: st.DrawFn, **fixed: Any) -> dict[str, Any]:
    """Shapes that four ranks can share; some of them of several FP8 blocks, ragged ones among them."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    layers = pick(1, 2, 3)
    groups = pick(1, 2)
    values = {
        "dim": pick(16, 36, 260),
        "inter_dim": pick(8, 40, 256, 512, 516),
        "moe_inter_dim": pick(4, 64, 260),
        "n_layers": layers,
        "n_dense_layers": draw(st.integers(0, layers)),
        "moe_layer_freq": pick(1, 2),
        "n_heads": pick(4, 8),
        "n_routed_experts": pick(0, 4, 8),
        "n_shared_experts": pick(1, 2),
        "n_activated_experts": pick(1, 2),
        "n_expert_groups": groups,
        "n_limited_groups": pick(1, groups),
        "score_func": pick("sigmoid", "softmax"),
        "route_scale": pick(1.0, 2.5),
        "hidden_act": pick("silu", "gelu", "relu2"),
        "q_lora_rank": pick(0, 12, 131),
        "kv_lora_rank": pick(8, 139),
        "qk_nope_head_dim": pick(4, 32),
        "qk_rope_head_dim": pick(2, 8),
        "v_head_dim": pick(4, 32),
        "n_mtp_layers": pick(0, 1, 2),
        "max_batch_size": pick(3, 8),
        "mtp_loss_weight": pick(0.1, 0.3),
        "rope_theta": pick(100.0, 10000.0),
        "norm_eps": pick(1e-6, 1e-2),
    }
    if draw(st.booleans()):
        values |= {"max_seq_len": 32, "rope_factor": pick(2.0, 40.0), "mscale": pick(0.0, 0.707, 1.0), "beta_fast": 4}
    return values | fixed


@draws
@given(divisible(), st.sampled_from(["fp32", "bf16"]))
def test_any_way_round_gives_the_same_bytes(tmp_path_factory: pytest.TempPathFactory, shape: dict, dtype: str) -> None:
    """mp1 → mp2 → mp4 → mp1 → Hugging Face → mp4 → Hugging Face → mp1, and the same logits everywhere."""
    tmp = tmp_path_factory.mktemp("round")
    save_model(tiny(**shape), tmp / "start")
    convert.convert(tmp / "start", tmp / "mp1", dtype=dtype)
    expected = logits(tmp / "mp1")
    where, is_exportable = tmp / "mp1", True
    for i, step in enumerate([2, 4, 1, "hf", 4, "hf", 1]):
        new = tmp / f"{i}-{step}"
        try:
            convert.convert(where, new, 1 if step == "hf" else step, step == "hf")
        except ConfigError as error:
            assert step == "hf" and "no class of transformers" in str(error)
            is_exportable = False
            continue
        where = new
        assert torch.equal(logits(where), expected), step
    assert_same(tmp / "mp1", tmp / "2-1")
    assert_same(tmp / "mp1", tmp / "6-1")
    if is_exportable:
        assert_same(tmp / "3-hf", tmp / "5-hf")
    shutil.rmtree(tmp)


def test_files_are_as_safetensors_writes_them(saved: Path, tmp_path: Path) -> None:
    for world, is_hf in ((1, False), (2, False), (1, True)):
        convert.convert(saved, tmp_path / "out", world, is_hf)
        for file in (tmp_path / "out").glob("*.safetensors"):
            save_file(load_file(file), tmp_path / "again", metadata={"format": "pt"})
            assert file.read_bytes() == (tmp_path / "again").read_bytes()
        shutil.rmtree(tmp_path / "out")


def test_shards_are_deepseeks(saved: Path, tmp_path: Path) -> None:
    """Rank by rank against slices taken by hand, as DeepSeek's own converter takes them."""
    convert.convert(saved, tmp_path / "mp2", 2)
    whole, shards = load_file(saved / WEIGHTS), tensors_of(tmp_path / "mp2")
    assert list(shards) == ["model0-mp2.safetensors", "model1-mp2.safetensors"]
    for rank, shard in enumerate(shards.values()):
        left = dict(shard)
        for name, tensor in whole.items():
            part = name.split(".")[-2]
            if ".experts." in name:
                if int(name.split(".experts.")[1][0]) // 2 != rank:
                    continue
            elif part in ("wq", "wkv_b", "w1", "w3", "embed", "head"):
                tensor = tensor.chunk(2, dim=0)[rank]
            elif part in ("wo", "w2"):
                tensor = tensor.chunk(2, dim=1)[rank]
            assert torch.equal(left.pop(name), tensor), name
        assert not left


@pytest.mark.parametrize(
    ("changes", "world", "key"),
    [
        ({}, 3, "vocab_size = 256"),
        ({}, 4, "n_heads = 2"),
        ({"n_routed_experts": 3}, 2, "n_routed_experts = 3"),
        ({"inter_dim": 25}, 2, "inter_dim = 25"),
        ({"moe_inter_dim": 7}, 2, "n_shared_experts * moe_inter_dim = 7"),
    ],
)
def test_number_of_shards_must_divide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, int], world: int, key: str
) -> None:
    save_model(tiny(**changes), tmp_path / "a")
    assert run("--ckpt-path", tmp_path / "a", "--save-path", tmp_path / "b", "--model-parallel", world) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and key in error[0] and f"into {world}" in error[0] and " 1" in error[0]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_run_means_its_best(tmp_path: Path) -> None:
    for step, is_best in ((1, True), (2, False)):
        save_run(tmp_path / "run", tiny(step), {}, {"step": step}, is_best)
    assert run("--ckpt-path", tmp_path / "run", "--save-path", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", WEIGHTS]
    best = tmp_path / "run" / "step-00000001" / WEIGHTS
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == best.read_bytes()


def test_dtypes(saved: Path, tmp_path: Path) -> None:
    """Matrices change, norms and the router do not, but for fp32; there and back is what rounding once gives."""
    convert.convert(saved, tmp_path / "bf16", dtype="bf16")
    before, after = load_file(saved / WEIGHTS), load_file(tmp_path / "bf16" / WEIGHTS)
    for name, tensor in before.items():
        kept = tensor.ndim == 1 or name.endswith("gate.weight")
        assert torch.equal(after[name], tensor if kept else tensor.bfloat16()), name
    assert read_config(tmp_path / "bf16" / "config.json")[0].dtype == "bf16"
    convert.convert(tmp_path / "bf16", tmp_path / "fp32", dtype="fp32")
    for name, tensor in load_file(tmp_path / "fp32" / WEIGHTS).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, after[name].float())


def test_float16_must_be_converted(saved: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in load_file(saved / WEIGHTS).items()}
    save_file(tensors, saved / WEIGHTS)
    with pytest.raises(CheckpointError) as error:
        convert.convert(saved, tmp_path / "out")
    one_line(error, "tensor", "F16", "--dtype")
    convert.convert(saved, tmp_path / "out", dtype="fp32")
    assert load_file(tmp_path / "out" / WEIGHTS)["head.weight"].dtype == torch.float32
    assert load_model(saved).head.weight.dtype == torch.float32


# --- FP8 --------------------------------------------------------------------------------------------------------------


FP8_SHAPE = {"dim": 256, "inter_dim": 512, "moe_inter_dim": 256, "n_heads": 4, "kv_lora_rank": 139, "q_lora_rank": 131}
FP8_SHAPE |= {"qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128}


def test_quantised_as_fp8_ops_does_it(tmp_path: Path) -> None:
    save_model(tiny(**FP8_SHAPE), tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "fp8", dtype="fp8")
    before, after = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "fp8" / WEIGHTS)
    high = ("embed", "head", "norm", "gate.weight", "gate.bias", "eh_proj")
    for name, tensor in before.items():
        if any(part in name for part in high):
            assert torch.equal(after.pop(name), tensor), name
        else:
            q, s = weight_quant(tensor)
            assert torch.equal(after.pop(name).view(torch.uint8), q.view(torch.uint8)), name
            assert torch.equal(after.pop(name.removesuffix("weight") + "scale"), s), name
    assert not after
    convert.convert(tmp_path / "fp8", tmp_path / "bf16", dtype="bf16")
    convert.convert(tmp_path / "fp8", tmp_path / "fp32", dtype="fp32")
    q, s = weight_quant(before["layers.0.attn.wo.weight"])
    for dtype, folder in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        assert torch.equal(
            load_file(tmp_path / folder / WEIGHTS)["layers.0.attn.wo.weight"], weight_dequant(q, s, dtype=dtype)
        )
    assert [read_config(tmp_path / f / "config.json")[0].dtype for f in ("fp8", "bf16", "fp32")] == [
        "fp8",
        "bf16",
        "fp32",
    ]


@draws
@given(divisible(), st.sampled_from([None, "ue8m0"]))
def test_fp8_any_way_round(tmp_path_factory: pytest.TempPathFactory, shape: dict, scale_fmt: str | None) -> None:
    """Nothing is ever quantised twice: equal bytes, equal logits, or a refusal where the blocks do not fit."""
    tmp = tmp_path_factory.mktemp("fp8")
    save_model(tiny(**shape, scale_fmt=scale_fmt), tmp / "start")
    convert.convert(tmp / "start", tmp / "mp1", dtype="fp8")
    expected, where = logits(tmp / "mp1"), tmp / "mp1"
    refused = set()
    for i, step in enumerate([2, 4, 1, "hf", 2, "hf", 1]):
        new = tmp / f"{i}-{step}"
        try:
            convert.convert(where, new, 1 if step == "hf" else step, step == "hf")
        except (ConfigError, CheckpointError) as error:
            assert str(error).count("would need two scales" if isinstance(step, int) else "transformers") == 1
            refused.add(step)
            continue
        where = new
        torch.testing.assert_close(logits(where), expected, rtol=0, atol=1e-5)
    assert 1 not in refused
    for name in ("2-1", "6-1"):
        assert_same(tmp / "mp1", tmp / name)
    convert.convert(where, tmp / "mp4", 4, dtype="bf16")  # which always works
    convert.convert(tmp / "start", tmp / "cut", 4, dtype="fp8")  # and so does quantising each part
    rows = [t.shape[0] for f in tensors_of(tmp / "cut").values() for n, t in f.items() if n.endswith("attn.wo.weight")]
    assert rows and logits(tmp / "cut").isfinite().all()
    shutil.rmtree(tmp)


def test_kept_in_fp8(tmp_path: Path) -> None:
    """Loaded as it is stored and saved again, it is the same file; an mp2 checkpoint gives the same model."""
    save_model(tiny(**FP8_SHAPE), tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "fp8", dtype="fp8")
    model = load_model(tmp_path / "fp8", keep_fp8=True)
    state = model.state_dict()
    assert state["layers.1.ffn.experts.w1.weight"].dtype == E4M3 and state["layers.0.attn.wq_a.scale"].ndim == 2
    save_model(model, tmp_path / "again")
    assert_same(tmp_path / "fp8", tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), logits(tmp_path / "fp8"), rtol=0, atol=1e-4)
    convert.convert(tmp_path / "fp8", tmp_path / "mp2", 2)
    other = load_model(tmp_path / "mp2", keep_fp8=True).state_dict()
    assert all(torch.equal(state[name].view(torch.uint8), other[name].view(torch.uint8)) for name in state)


def test_fp8_is_read_by_transformers(tmp_path: Path) -> None:
    # which takes sizes that are no multiples of 128 for such with smaller blocks
    even = {"q_lora_rank": 128, "kv_lora_rank": 128, "qk_rope_head_dim": 128, "moe_layer_freq": 1, "n_mtp_layers": 0}
    save_model(tiny(**FP8_SHAPE | even), tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "hf", is_hf=True, dtype="fp8")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, logits(tmp_path / "hf"), rtol=0, atol=2e-2)


def fp8_checkpoint(folder: Path, is_hf: bool, world: int = 1) -> Path:
    save_model(tiny(**FP8_SHAPE), folder / "plain")
    convert.convert(folder / "plain", folder / "fp8", world, is_hf, dtype="fp8")
    return folder / "fp8"


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("is_hf", [False, True])
def test_bad_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: float, is_hf: bool) -> None:
    folder = fp8_checkpoint(tmp_path, is_hf)
    (file,) = folder.glob("*.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv" if is_hf else "layers.0.attn.wo.scale"
    change(file, lambda tensors: tensors[name].view(-1).__setitem__(1, bad))
    for dtype in ((), ("--dtype", "bf16"), ("--model-parallel", 2)):
        assert run("--ckpt-path", folder, "--save-path", tmp_path / "out", *dtype) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert str(file) in error and "finite" in error and name in error
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("what", ["missing", "shape", "dtype", "without weight", "high"])
def test_wrong_scale(tmp_path: Path, what: str) -> None:
    file = fp8_checkpoint(tmp_path, False) / WEIGHTS
    name = "layers.0.attn.wo."
    scale = load_file(file)[name + "scale"]
    edits = {
        "missing": lambda t: t.pop(name + "scale"),
        "shape": lambda t: t.update({name + "scale": torch.ones(7, 1)}),
        "dtype": lambda t: t.update({name + "scale": scale.half()}),
        "without weight": lambda t: t.update({name + "weight": t[name + "weight"].bfloat16()}),
        "high": lambda t: t.update({"embed.weight": t["embed.weight"].to(E4M3), "embed.scale": torch.ones(2, 2)}),
    }
    change(file, edits[what])
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(file.parent)
    one_line(error, file, "tensor", "embed.weight" if what == "high" else name)


def test_quantising_nan_is_refused(saved: Path, tmp_path: Path) -> None:
    change(saved / WEIGHTS, lambda tensors: tensors["layers.0.attn.wo.weight"].view(-1).__setitem__(5, float("nan")))
    with pytest.raises(CheckpointError) as error:
        convert.convert(saved, tmp_path / "out", dtype="fp8")
    one_line(error, saved / WEIGHTS, "layers.0.attn.wo.weight", "NaN")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


# --- Hugging Face -----------------------------------------------------------------------------------------------------

KINDS = {
    "DeepseekV3ForCausalLM": {"score_func": "sigmoid", "moe_layer_freq": 1},
    "Glm4MoeLiteForCausalLM": {"score_func": "sigmoid", "moe_layer_freq": 2, "n_layers": 3, "n_dense_layers": 0},
    "DeepseekV2ForCausalLM": {"score_func": "softmax", "moe_layer_freq": 1, "kv_lora_rank": 140},
}


@pytest.mark.parametrize("kind", KINDS)
@settings(draws, max_examples=5)
@given(st.data())
def test_logits_of_transformers(tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject) -> None:
    fixed = {"n_routed_experts": 8, "dim": 32} | KINDS[kind]
    if "n_dense_layers" not in fixed:
        fixed |= {"n_layers": 2, "n_dense_layers": data.draw(st.integers(0, 1))}
    tmp = tmp_path_factory.mktemp("hf")
    model = tiny(**data.draw(divisible(**fixed)))
    save_model(model, tmp / "a")
    convert.convert(tmp / "a", tmp / "hf", is_hf=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp / "hf")
    assert type(theirs).__name__ == kind and theirs.dtype == torch.float32
    with torch.no_grad():
        expected = model(TOKENS)
        torch.testing.assert_close(theirs(TOKENS).logits, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max()))
    theirs.save_pretrained(tmp / "theirs")  # and back, as transformers itself writes it, which knows no MTP
    config = json.loads((tmp / "theirs" / "config.json").read_text())
    (tmp / "theirs" / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    torch.testing.assert_close(logits(tmp / "theirs"), expected, rtol=0, atol=1e-5 * max(1, expected.abs().max()))
    shutil.rmtree(tmp)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_of_the_pipeline(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes], kind: str) -> None:
    shape = {"max_seq_len": 256, "original_seq_len": 256, "dim": 32, "n_mtp_layers": 0} | KINDS[kind]
    model = tiny(4, **shape)
    with torch.no_grad():
        model.head.weight[0] = 0.0  # byte 0 would end the text
    save_model(model, tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "hf", is_hf=True)
    flags = ["--prompt", "The ", "--temperature", "0", "--max-new-tokens", "200", "--device", "cpu", "--dtype", "fp32"]
    assert generate.main(["--ckpt-path", str(tmp_path / "hf"), *flags]) == 0
    ours = capsysbinary.readouterr().out
    writer = pipeline("text-generation", model=str(tmp_path / "hf"), device="cpu")
    theirs = writer("The ", max_new_tokens=200, do_sample=False)[0]["generated_text"]
    assert len(ours) >= 204 and ours.rstrip(b"\n").decode(errors="replace") == theirs.rstrip("\n")


def test_folder_is_complete(saved: Path, tmp_path: Path) -> None:
    convert.convert(saved, tmp_path / "hf", is_hf=True)
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    names |= {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    assert {path.name for path in (tmp_path / "hf").iterdir()} == names
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.eos_token_id == 0 and config.dtype == torch.float32 and config.vocab_size == 256
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    tensors = load_file(tmp_path / "hf" / "model-00001-of-00001.safetensors")
    assert index["weight_map"] == dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert {"model.layers.3.enorm.weight", "model.layers.3.shared_head.norm.weight"} <= tensors.keys()
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    with safe_open(tmp_path / "hf" / "model-00001-of-00001.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_are_split_by_size(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "MAX_FILE_BYTES", 8000)
    convert.convert(saved, tmp_path / "hf", is_hf=True)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
    assert all(file.stat().st_size <= 8000 or len(load_file(file)) == 1 for file in files)
    assert torch.equal(logits(tmp_path / "hf"), logits(saved))
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


@settings(draws, max_examples=200)
@given(st.text())
def test_tokenizer_is_bytes(byte_tokenizer: Any, text: str) -> None:
    ids = byte_tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert byte_tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tmp = tmp_path_factory.mktemp("tokenizer")
    save_model(tiny(), tmp / "a")
    convert.convert(tmp / "a", tmp / "hf", is_hf=True)
    return AutoTokenizer.from_pretrained(tmp / "hf")


def test_tokenizer_knows_all_bytes(byte_tokenizer: Any) -> None:
    every = "".join(map(chr, range(0x300))) + "\u0100\u0120 \uffff\U0010ffff"
    for text in (every, "\0", "a\0\0b", "\u0100", " a  b ,.\n", "<s></s><|endoftext|>", "a" * 10000):
        ids = byte_tokenizer(text)["input_ids"]
        assert ids == list(text.encode()) and byte_tokenizer.decode(ids) == text
    assert len(byte_tokenizer) == byte_tokenizer.vocab_size == 256
    assert sorted(byte_tokenizer.get_vocab().values()) == list(range(256))
    assert byte_tokenizer.eos_token_id == 0 and byte_tokenizer.pad_token_id == 0
    for value in range(1, 256):  # those too that are no UTF-8 by themselves
        assert byte_tokenizer.decode([value]) == bytes([value]).decode(errors="replace")
    assert byte_tokenizer(["a", "bcd"], padding=True)["input_ids"] in (
        [[97, 0, 0], [98, 99, 100]],
        [[0, 0, 97], [98, 99, 100]],
    )


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank"),
        ({"qk_rope_head_dim": 0}, "qk_rope_head_dim"),
        ({"n_shared_experts": 0}, "shared experts"),
        ({"gate_bias": False}, "gate_bias"),
        ({"score_func": "softmax", "gate_bias": True}, "gate_bias"),
        ({"score_func": "softmax"}, "moe_layer_freq"),
        ({"score_func": "softmax", "moe_layer_freq": 1, "qk_nope_head_dim": 3}, "qk_nope_head_dim"),
        ({"score_func": "softmax", "moe_layer_freq": 1, "kv_lora_rank": 7}, "kv_lora_rank"),
        ({"score_func": "softmax", "moe_layer_freq": 1, "n_heads": 3}, "n_heads"),
        ({"n_routed_experts": 1, "n_activated_experts": 1}, "experts in a group"),
    ],
)
def test_export_refused_by_name(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    save_model(tiny(**changes), tmp_path / "a")
    with pytest.raises(ConfigError) as error:
        convert.convert(tmp_path / "a", tmp_path / "hf", is_hf=True)
    one_line(error, part, "no class of transformers")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("tie_word_embeddings", True),
        ("sliding_window", 128),
        ("rope_interleave", False),
        ("norm_topk_prob", False),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("num_key_value_heads", 1),
        ("hidden_act", "swiglu"),
        ("model_type", "llama"),
        ("index_topk", 2048),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"type": "yarn", "factor": 2.0}),
        ("rope_scaling", {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "mscale": 1.0}),
        ("rope_scaling", 3),
        ("hidden_size", "16"),
        ("hidden_size", 16.5),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", None),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [64, 64]}),
        ("mlp_layer_types", ["dense"]),
        ("mlp_layer_types", ["sparse", "sparse", "dense"]),
        ("bytegpt", 3),
        ("bytegpt", {"dim": 32}),
        ("bytegpt", {"dimension": 32}),
    ],
)
def test_import_refused_by_name(saved: Path, tmp_path: Path, key: str, value: Any) -> None:
    convert.convert(saved, tmp_path / "hf", is_hf=True)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ConfigError) as error:
        open_checkpoint(tmp_path / "hf")
    one_line(error, tmp_path / "hf" / "config.json", "dimension" if value == {"dimension": 32} else key)


@pytest.mark.parametrize("key", ["hidden_size", "n_group", "rope_theta", "mlp_layer_types", "rms_norm_eps"])
def test_import_wants_all_that_matters(saved: Path, tmp_path: Path, key: str) -> None:
    convert.convert(saved, tmp_path / "hf", is_hf=True)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config[key]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as error:
        open_checkpoint(tmp_path / "hf")
    one_line(error, "missing", "first_k_dense_replace" if key == "mlp_layer_types" else key)


def test_mtp_copies_must_be_equal(saved: Path, tmp_path: Path) -> None:
    convert.convert(saved, tmp_path / "hf", is_hf=True)
    file = tmp_path / "hf" / "model-00001-of-00001.safetensors"
    change(file, lambda tensors: tensors["model.layers.3.embed_tokens.weight"].view(-1).__setitem__(-1, 7.0))
    for attempt in (lambda: convert.convert(tmp_path / "hf", tmp_path / "out"), lambda: load_model(tmp_path / "hf")):
        with pytest.raises(CheckpointError) as error:
            attempt()
        one_line(error, file, "embed_tokens")
    copies = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
    change(file, lambda tensors: [tensors.pop(name) for name in copies])
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.unlink()
    file.rename(file.with_name("model.safetensors"))  # one file needs no index, and no copies
    convert.convert(tmp_path / "hf", tmp_path / "out")
    assert_same(saved, tmp_path / "out")


def test_other_vocabularies_keep_their_tokenizer(tmp_path: Path) -> None:
    save_model(tiny(vocab_size=300), tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("theirs")
    convert.convert(tmp_path / "a", tmp_path / "hf", is_hf=True)
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "theirs"
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"eos_token_id": 299}))
    convert.convert(tmp_path / "hf", tmp_path / "again", is_hf=True)
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == 299
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "theirs"


# --- Published models -------------------------------------------------------------------------------------------------

V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI = V3 | {"model_type": "kimi_k2", "aux_loss_alpha": 0.001, "seq_aux": True, "n_group": 1, "topk_group": 1}
KIMI |= {"n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0}
KIMI |= {"first_k_dense_replace": 1, "routed_scaling_factor": 2.827, "rope_theta": 50000.0, "vocab_size": 163840}
KIMI |= {"max_position_embeddings": 131072, "bos_token_id": 163584, "eos_token_id": 163585}
KIMI |= {"rope_scaling": V3["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0}}
V2_LITE = {key: value for key, value in V3.items() if key not in ("quantization_config", "num_nextn_predict_layers")}
V2_LITE |= {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "first_k_dense_replace": 1}
V2_LITE |= {"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27}
V2_LITE |= {"n_group": 1, "topk_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False}
V2_LITE |= {"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts_per_tok": 6, "q_lora_rank": None}
V2_LITE |= {"routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_method": "greedy", "vocab_size": 102400}
V2_LITE |= {"aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1}
V2_LITE |= {"rope_scaling": V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707}}


def published(config: dict[str, Any]) -> Iterator[tuple[int, str, str, list[int]]]:
    """Layer, name, dtype and shape of every tensor of such a model, as the published files have them."""
    dim, heads, experts = config["hidden_size"], config["num_attention_heads"], config["n_routed_experts"]
    nope, rope, v_dim = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    kv_rank, q_rank = config["kv_lora_rank"], config["q_lora_rank"]
    is_fp8, layers = "quantization_config" in config, config["num_hidden_layers"]

    def linear(layer: int, name: str, n_out: int, n_in: int) -> Iterator[tuple[int, str, str, list[int]]]:
        yield layer, f"{name}.weight", "F8_E4M3" if is_fp8 else "BF16", [n_out, n_in]
        if is_fp8:
            yield layer, f"{name}.weight_scale_inv", "F32", [math.ceil(n_out / 128), math.ceil(n_in / 128)]

    def mlp(layer: int, name: str, hidden: int) -> Iterator[tuple[int, str, str, list[int]]]:
        yield from linear(layer, f"{name}.gate_proj", hidden, dim)
        yield from linear(layer, f"{name}.up_proj", hidden, dim)
        yield from linear(layer, f"{name}.down_proj", dim, hidden)

    yield 0, "model.embed_tokens.weight", "BF16", [config["vocab_size"], dim]
    for layer in range(layers + config.get("num_nextn_predict_layers", 0)):
        at = f"model.layers.{layer}"
        if layer >= layers:
            yield layer, f"{at}.embed_tokens.weight", "BF16", [config["vocab_size"], dim]
            yield layer, f"{at}.shared_head.head.weight", "BF16", [config["vocab_size"], dim]
            yield layer, f"{at}.eh_proj.weight", "BF16", [dim, 2 * dim]
            for name in ("enorm", "hnorm", "shared_head.norm"):
                yield layer, f"{at}.{name}.weight", "BF16", [dim]
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield layer, f"{at}.{name}.weight", "BF16", [dim]
        if q_rank:
            yield from linear(layer, f"{at}.self_attn.q_a_proj", q_rank, dim)
            yield layer, f"{at}.self_attn.q_a_layernorm.weight", "BF16", [q_rank]
            yield from linear(layer, f"{at}.self_attn.q_b_proj", heads * (nope + rope), q_rank)
        else:
            yield from linear(layer, f"{at}.self_attn.q_proj", heads * (nope + rope), dim)
        yield from linear(layer, f"{at}.self_attn.kv_a_proj_with_mqa", kv_rank + rope, dim)
        yield layer, f"{at}.self_attn.kv_a_layernorm.weight", "BF16", [kv_rank]
        yield from linear(layer, f"{at}.self_attn.kv_b_proj", heads * (nope + v_dim), kv_rank)
        yield from linear(layer, f"{at}.self_attn.o_proj", dim, heads * v_dim)
        if layer < config["first_k_dense_replace"]:
            yield from mlp(layer, f"{at}.mlp", config["intermediate_size"])
            continue
        yield layer, f"{at}.mlp.gate.weight", "BF16", [experts, dim]
        if config["scoring_func"] == "sigmoid":
            yield layer, f"{at}.mlp.gate.e_score_correction_bias", "F32", [experts]
        for expert in range(experts):
            yield from mlp(layer, f"{at}.mlp.experts.{expert}", config["moe_intermediate_size"])
        yield from mlp(layer, f"{at}.mlp.shared_experts", config["n_shared_experts"] * config["moe_intermediate_size"])
    yield layers, "model.norm.weight", "BF16", [dim]
    yield layers, "lm_head.weight", "BF16", [config["vocab_size"], dim]


SIZES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def sparse_checkpoint(folder: Path, config: dict[str, Any]) -> list[tuple[str, str, list[int]]]:
    """Such a model's folder without its contents: headers, and holes for the tensors. A scale's file is another's."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files: dict[str, dict[str, Any]] = {}
    tensors, last = [], config["num_hidden_layers"]
    for layer, name, dtype, shape in published(config):
        at = (layer + 1) % (last + 1) if name.endswith("scale_inv") else layer
        header = files.setdefault(f"model-{at:05d}-of-{last:05d}.safetensors", {})
        header[name] = {"dtype": dtype, "shape": shape}
        tensors.append((name, dtype, shape))
    for file, header in files.items():
        end = 0
        for value in header.values():
            start, end = end, end + math.prod(value["shape"]) * SIZES[value["dtype"]]
            value["data_offsets"] = [start, end]
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    where = {name: file for file, header in files.items() for name in header}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return tensors


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> tuple[checkpoints.Checkpoint, list[tuple[str, str, list[int]]]]:
    folder = tmp_path_factory.mktemp("published") / "v3"
    tensors = sparse_checkpoint(folder, V3)
    return open_checkpoint(folder), tensors


def test_deepseek_v3_is_understood(v3: tuple[checkpoints.Checkpoint, list]) -> None:
    checkpoint, tensors = v3
    published_args = {"vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61}
    published_args |= {"n_dense_layers": 3, "n_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1}
    published_args |= {"n_activated_experts": 8, "n_expert_groups": 8, "n_limited_groups": 4, "route_scale": 2.5}
    published_args |= {"score_func": "sigmoid", "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
    published_args |= {"qk_rope_head_dim": 64, "v_head_dim": 128, "n_mtp_layers": 1, "max_seq_len": 163840}
    assert checkpoint.args == ModelArgs(**published_args)
    main = sum(math.prod(s.shape) for name, s in checkpoint.tensors.items() if not name.startswith("mtp."))
    assert main == 671_026_419_200  # with the router's biases
    assert sum(math.prod(shape) for name, dtype, shape in tensors if "scale" not in name) > main
    assert checkpoint.tensors["mtp.0.block.attn.wo.weight"].name == "model.layers.61.self_attn.o_proj.weight"


@pytest.mark.parametrize(("world", "dtype"), [(8, None), (16, None), (32, "bf16")])
def test_plan_for_deepseek_v3(v3: tuple[checkpoints.Checkpoint, list], world: int, dtype: str | None) -> None:
    """Files, names, shapes and bytes, from the list of what was published; no tensor is read, or there at all."""
    checkpoint, tensors = v3
    outputs, jobs, texts = convert.make_plan(checkpoint, world, dtype=dtype)
    assert [output.name for output in outputs] == [f"model{i}-mp{world}.safetensors" for i in range(world)]
    assert texts["config.json"]["dtype"] == ("fp8" if dtype is None else "bf16")
    bytes_of_rank = 0
    for name, kind, shape in tensors:
        if name.startswith("model.layers.61.") and name.endswith(("embed_tokens.weight", "shared_head.head.weight")):
            continue
        if dtype == "bf16" and name.endswith("scale_inv"):
            continue
        size = math.prod(shape) * (2 if kind == "F8_E4M3" and dtype == "bf16" else SIZES[kind])
        layer = name.split(".")[-2]
        cut = ".experts." in name or layer in ("embed_tokens", "lm_head", "q_b_proj", "kv_b_proj", "o_proj")
        cut = cut or layer in ("gate_proj", "up_proj", "down_proj")
        assert not cut or size % world == 0 or name.endswith("scale_inv")
        bytes_of_rank += size // world if cut else size
    for rank, output in enumerate(outputs):
        data = sum(info.nbytes for info in output.infos.values())
        if world < 16:
            assert data == bytes_of_rank
        else:  # half a block of a shared expert has a scale of its own
            assert 0 <= data - bytes_of_rank <= 62 * 3 * 56 * 4 * 2
        assert output.size == len(output.header) + data
        experts = {int(key.split(".")[4]) for key in output.infos if ".experts." in key and key.startswith("layers")}
        assert experts == set(range(256 * rank // world, 256 * (rank + 1) // world))
        assert output.infos["layers.0.ffn.w1.weight"].shape == (18432 // world, 7168)
        assert output.infos["layers.60.attn.wo.weight"].shape == (7168, 16384 // world)
        assert output.infos["mtp.0.eh_proj.weight"].shape == (7168, 14336)
        if dtype is None:
            assert output.infos["layers.0.attn.wkv_a.scale"].shape == (5, 56)
            assert output.infos["layers.60.ffn.shared_experts.w2.scale"].shape == (56, math.ceil(2048 / world / 128))


def test_reading_deepseek_v3_needs_only_what_is_asked_for(v3: tuple[checkpoints.Checkpoint, list]) -> None:
    checkpoint, _ = v3
    source = checkpoint.tensors["layers.5.attn.wo.weight"]
    box = parallel.native_slice("layers.5.attn.wo.weight", source.shape, 256, 3, 8)
    q, s = source.read_fp8(box, None)
    assert q.shape == (7168, 2048) and s.shape == (56, 16)


@pytest.mark.parametrize("config", [KIMI, V2_LITE], ids=["Kimi-K2", "DeepSeek-V2-Lite"])
def test_other_published_models(tmp_path: Path, config: dict[str, Any]) -> None:
    sparse_checkpoint(tmp_path / "a", config | {"num_hidden_layers": 3})
    checkpoint = open_checkpoint(tmp_path / "a")
    assert checkpoint.args.score_func == config["scoring_func"] and checkpoint.args.n_mtp_layers == 0
    assert checkpoint.args.q_lora_rank == (config["q_lora_rank"] or 0)
    assert checkpoint.is_fp8 == ("quantization_config" in config)
    outputs, _, texts = convert.make_plan(checkpoint, is_hf=True)
    for key, value in texts["config.json"].items():
        if key in config and key not in ("num_hidden_layers", "model_type", "rope_scaling", "pad_token_id"):
            assert value == config[key], key
    assert args_from_hf(texts["config.json"]) == checkpoint.args
    names = {name for output in outputs for name in output.infos}
    assert names == {name for _, name, _, _ in published(config | {"num_hidden_layers": 3})}


# --- Hostile files ----------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], source: Path, *parts: object, flags: tuple[object, ...] = ()) -> None:
    """The command says one line with all parts in it, returns 2 and leaves nothing; the source is as it was."""
    target = source.parent / "refused"
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    assert run("--ckpt-path", source, "--save-path", target, *flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "B/s]" not in line]
    assert len(lines) == 1 and lines[0].startswith("convert.py: error: "), lines
    for part in parts:
        assert str(part) in lines[0], lines
    assert not target.exists() and not list(source.parent.glob(".refused*"))
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "name",
    ["../../x", "../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\0.safetensors", "c:\\x.safetensors"],
)
def test_index_that_leads_elsewhere(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    convert.convert(saved, tmp_path / "hf", is_hf=True)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    shutil.copy(tmp_path / "hf" / "model-00001-of-00001.safetensors", tmp_path / "x.safetensors")
    value = json.loads(index.read_text())
    value["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(value))
    refused(capsys, tmp_path / "hf", index.parent, "lm_head.weight" if "c:" not in name else "c:")


def test_links(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None may lead out of the folder, but from a snapshot in the hub's cache to the blobs beside it."""
    for folder in (saved, tmp_path / "hf"):
        if not folder.exists():
            convert.convert(saved, folder, is_hf=True)
        (file,) = folder.glob("*.safetensors")
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
        refused(capsys, folder, file, "link")
        file.unlink()
        (tmp_path / "elsewhere").rename(file)
    hub = tmp_path / "models--x"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots").mkdir()
    shutil.move(tmp_path / "hf", hub / "snapshots" / "main")
    for file in (hub / "snapshots" / "main").glob("*.safetensors"):
        file.rename(hub / "blobs" / "0123")
        file.symlink_to("../../blobs/0123")
    convert.convert(hub / "snapshots" / "main", tmp_path / "out")
    assert_same(saved, tmp_path / "out")


def test_files_missing_and_left_over(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert.convert(saved, tmp_path / "mp2", 2)
    convert.convert(saved, tmp_path / "hf", is_hf=True)
    first, second = tmp_path / "mp2" / "model0-mp2.safetensors", tmp_path / "mp2" / "model1-mp2.safetensors"
    second.rename(tmp_path / "kept")
    refused(capsys, tmp_path / "mp2", second)
    shutil.copy(first, second)
    refused(capsys, tmp_path / "mp2", second, "experts")  # the wrong rank's
    (tmp_path / "kept").rename(second)
    for extra in ("model2-mp2.safetensors", "model0-mp1.safetensors", "model0-mp4.safetensors", "other.safetensors"):
        shutil.copy(first, tmp_path / "mp2" / extra)
        refused(capsys, tmp_path / "mp2", tmp_path / "mp2")
        (tmp_path / "mp2" / extra).unlink()
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    shutil.copy(file, tmp_path / "hf" / "other.safetensors")
    refused(capsys, tmp_path / "hf", tmp_path / "hf" / "other.safetensors")
    (tmp_path / "hf" / "other.safetensors").unlink()
    file.rename(tmp_path / "kept")
    refused(capsys, tmp_path / "hf", file)
    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": 3}}'):
        (tmp_path / "hf" / "model.safetensors.index.json").write_text(text)
        refused(capsys, tmp_path / "hf", "model.safetensors.index.json")


@pytest.mark.parametrize("name", ["layers.0.attn.wkv_a.weight", "norm.weight", "layers.1.ffn.gate.bias"])
def test_shards_of_two_models(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """What all ranks hold must be equal; one bit of difference is told."""
    convert.convert(saved, tmp_path / "mp2", 2)
    file = tmp_path / "mp2" / "model1-mp2.safetensors"
    change(file, lambda tensors: tensors[name].view(torch.int32).view(-1)[-1:].bitwise_xor_(1))
    refused(capsys, tmp_path / "mp2", file, name, "model0-mp2.safetensors")
    change(file, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    refused(capsys, tmp_path / "mp2", file, name, "BF16")


def test_index_and_files_that_contradict(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert.convert(saved, tmp_path / "hf", is_hf=True)
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    index = file.with_name("model.safetensors.index.json")
    value = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": value["weight_map"] | {"model.more\nthan.one.line": file.name}}))
    refused(capsys, tmp_path / "hf", file, "more")
    index.write_text(json.dumps(value))
    change(file, lambda tensors: tensors.update({"model.extra\x1b[31m.weight": torch.ones(1)}))
    refused(capsys, tmp_path / "hf", file, "extra")
    value["weight_map"]["model.extra\x1b[31m.weight"] = file.name
    index.write_text(json.dumps(value))
    refused(capsys, tmp_path / "hf", file, "extra", "no place")


def test_config_of_a_model_beyond_the_files(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """However large it says that it is, nothing of that size is made."""
    for huge in (
        {"n_layers": 10**12, "n_dense_layers": 10**12},
        {"n_routed_experts": 10**9},
        {"dim": 1 << 40},
        {"vocab_size": 1 << 62},
    ):
        (saved / "config.json").write_text(json.dumps(TINY | huge))
        refused(capsys, saved, saved)


# --- All or nothing ---------------------------------------------------------------------------------------------------


def test_where_to(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def no(target: Path, source: Path = saved) -> None:
        before = sorted(tmp_path.rglob("*"))
        assert run("--ckpt-path", source, "--save-path", target) == 2
        assert str(target) in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before

    no(saved)
    no(saved / "inside")
    no(saved / "deeper" / "inside")
    no(tmp_path / "x" / ".." / "saved")
    (tmp_path / "link").symlink_to(saved)
    no(tmp_path / "link" / "inside")
    no(saved / "inside", tmp_path / "link")
    no(tmp_path)  # around it: not empty
    shutil.copytree(saved, tmp_path / ".out.tmp")
    no(tmp_path / "out", tmp_path / ".out.tmp")  # the place where it would be made
    (tmp_path / "empty").mkdir()
    assert run("--ckpt-path", saved, "--save-path", tmp_path / "empty") == 0
    assert_same(saved, tmp_path / "empty")


def test_flags(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--ckpt-path", saved, "--save-path", tmp_path / "out"]
    for flags in (
        ["--model-parallel", "0"],
        ["--model-parallel", "-1"],
        ["--model-parallel", "x"],
        ["--model-parallel", "9" * 5000],
        ["--format", "gguf"],
        ["--dtype", "int4"],
        ["--format", "hf", "--model-parallel", "2"],
    ):
        with pytest.raises(SystemExit) as error:
            run(*base, *flags)
        assert error.value.code == 2 and not (tmp_path / "out").exists()
    capsys.readouterr()
    assert run("--ckpt-path", tmp_path / "none", "--save-path", tmp_path / "out") == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


BIG = {"dim": 512, "inter_dim": 2048, "n_layers": 6, "n_dense_layers": 6, "n_routed_experts": 0, "n_mtp_layers": 0}


def command(*flags: object, before: str = "") -> subprocess.Popen:
    """The command, in a process of its own; `before` is Python to run first."""
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n{before}\nimport convert\nsys.exit(convert.main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """The target is there and whole, or not there; the source is as it was; the next run succeeds."""
    save_model(tiny(**BIG), tmp_path / "a")
    source, rng = (tmp_path / "a" / WEIGHTS).read_bytes(), random.Random(0)
    slow = "import time; from safetensors_io import ShardedTensor; f = ShardedTensor.read_bytes\n"
    slow += "ShardedTensor.read_bytes = lambda *a: (time.sleep(0.02), f(*a))[1]"
    interrupted = 0
    for signum in (signal.SIGKILL, signal.SIGINT):
        shutil.rmtree(tmp_path / ".out.tmp", ignore_errors=True)
        process = command(
            "--ckpt-path", tmp_path / "a", "--save-path", tmp_path / "out", "--model-parallel", 2, before=slow
        )
        while not (tmp_path / ".out.tmp" / "model1-mp2.safetensors").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signum)
        process.communicate()
        if (tmp_path / "out").exists():
            shutil.rmtree(tmp_path / "out")
        elif signum == signal.SIGINT:
            assert process.returncode == 130 and not list(tmp_path.glob(".out*"))
            interrupted += 1
        else:
            interrupted += 1
        assert (tmp_path / "a" / WEIGHTS).read_bytes() == source
    assert interrupted
    (tmp_path / ".out.tmp").mkdir(exist_ok=True)
    (tmp_path / ".out.tmp" / "litter").write_text("of a run that was killed")
    (tmp_path / ".out.lock").touch()
    convert.convert(tmp_path / "a", tmp_path / "out", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_disk_full(tmp_path: Path) -> None:
    save_model(tiny(**BIG), tmp_path / "a")
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    process = command("--ckpt-path", tmp_path / "a", "--save-path", tmp_path / "out", before=limit)
    error = process.communicate()[1].decode().splitlines()
    assert process.returncode == 2 and f"cannot write {tmp_path / 'out'}" in error[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_error_while_writing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one thread of several: the others stop, and the first error is the one that is told."""

    def fails(self: safetensors_io.ShardedTensor, box: safetensors_io.Slice2D) -> torch.Tensor:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(safetensors_io.ShardedTensor, "read_bytes", fails)
    with pytest.raises(CheckpointError) as error:
        convert.convert(saved, tmp_path / "out")
    one_line(error, "Input/output error")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_file_that_shrinks_meanwhile(saved: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved)
    os.truncate(saved / WEIGHTS, (saved / WEIGHTS).stat().st_size // 2)
    with pytest.raises(CheckpointError) as error:
        for source in checkpoint.tensors.values():
            source.read_bytes(source.box)
    one_line(error, saved / WEIGHTS, "truncated")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_that_of_a_band(tmp_path: Path) -> None:
    """A checkpoint of 250 MB, all holes, takes no more memory than a small one does."""
    shape = {
        "dim": 4096,
        "inter_dim": 12288,
        "vocab_size": 4096,
        "n_heads": 2,
        "n_mtp_layers": 0,
        "n_routed_experts": 0,
    }
    shape = TINY | shape | {"n_layers": 1, "kv_lora_rank": 512}
    with torch.device("meta"):
        tensors = {name: (t.dtype, tuple(t.shape)) for name, t in Transformer(ModelArgs(**shape)).state_dict().items()}
    layout = safetensors_io.SafetensorsWriter(WEIGHTS, tensors)
    peaks = []
    for folder, is_small in ((tmp_path / "small", True), (tmp_path / "large", False)):
        if is_small:
            save_model(tiny(), folder)
        else:
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(shape))
            (folder / WEIGHTS).write_bytes(layout.header)
            os.truncate(folder / WEIGHTS, layout.size)
            assert layout.size > 230e6
        report = "import atexit\n"  # VmHWM and not ru_maxrss, which a process has from the one that started it
        report += "atexit.register(lambda: print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]))"
        process = command("--ckpt-path", folder, "--save-path", tmp_path / "out", "--dtype", "bf16", before=report)
        out, error = process.communicate()
        assert process.returncode == 0, error
        peaks.append(int(out) / 1024)
        shutil.rmtree(tmp_path / "out")
    assert peaks[1] < peaks[0] + 100, peaks  # MB


# --- Two at once, and what is not ours -------------------------------------------------------------------------------


def test_two_conversions_to_the_same_folder(saved: Path, tmp_path: Path) -> None:
    with safetensors_io.new_folder(tmp_path / "out") as folder:
        (folder / "mine").write_text("of the first")
        for attempt in (lambda: convert.convert(saved, tmp_path / "out"), lambda: save_model(tiny(), tmp_path / "out")):
            with pytest.raises(CheckpointError) as error:
                attempt()
            one_line(error, tmp_path / "out", "another process")
    assert (tmp_path / "out" / "mine").read_text() == "of the first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "saved"]


def test_two_processes_and_the_same_folder(tmp_path: Path) -> None:
    """The second is refused while the first lives, and succeeds when it was killed."""
    save_model(tiny(**BIG), tmp_path / "a")
    slow = "import time; from safetensors_io import ShardedTensor; f = ShardedTensor.read_bytes\n"
    slow += "ShardedTensor.read_bytes = lambda *a: (time.sleep(0.05), f(*a))[1]"
    first = command("--ckpt-path", tmp_path / "a", "--save-path", tmp_path / "out", before=slow)
    while not (tmp_path / ".out.tmp" / WEIGHTS).exists() and first.poll() is None:
        time.sleep(0.01)
    with pytest.raises(CheckpointError) as error:
        convert.convert(tmp_path / "a", tmp_path / "out")
    one_line(error, "another process")
    first.kill()
    first.communicate()
    convert.convert(tmp_path / "a", tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "a" / WEIGHTS).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


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


def test_parents_made_in_vain_are_removed(saved: Path, tmp_path: Path) -> None:
    change(saved / WEIGHTS, lambda tensors: tensors["layers.0.attn.wo.weight"].view(-1).__setitem__(5, float("nan")))
    with pytest.raises(CheckpointError):
        convert.convert(saved, tmp_path / "x" / "y" / "out", dtype="fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_sigterm_cleans_up(tmp_path: Path) -> None:
    save_model(tiny(**BIG), tmp_path / "a")
    slow = "import time; from safetensors_io import ShardedTensor; f = ShardedTensor.read_bytes\n"
    slow += "ShardedTensor.read_bytes = lambda *a: (time.sleep(0.05), f(*a))[1]"
    process = command("--ckpt-path", tmp_path / "a", "--save-path", tmp_path / "x" / "out", before=slow)
    while not (tmp_path / "x" / ".out.tmp" / WEIGHTS).exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    error = process.communicate()[1]
    assert process.returncode == 130 and error == b"", error  # no bar where there is no terminal
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# --- Copies of FP8 tensors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["weight", "scale"])
@pytest.mark.parametrize("to", ["same", "bf16", "load", "load fp8"])
def test_copies_in_fp8_are_compared(tmp_path: Path, part: str, to: str) -> None:
    folder = fp8_checkpoint(tmp_path, False, 2)
    name = f"layers.0.attn.wkv_a.{part}"
    flip = lambda t: t[name].view(torch.uint8).view(-1).__setitem__(6, t[name].view(torch.uint8).view(-1)[6] ^ 1)  # noqa: E731
    change(folder / "model1-mp2.safetensors", flip)
    ways = {
        "same": lambda: convert.convert(folder, tmp_path / "out", 2),
        "bf16": lambda: convert.convert(folder, tmp_path / "out", dtype="bf16"),
        "load": lambda: load_model(folder),
        "load fp8": lambda: load_model(folder, keep_fp8=True),
    }
    with pytest.raises(CheckpointError) as error:
        ways[to]()
    one_line(error, folder / "model1-mp2.safetensors", name, "two models")


@pytest.mark.parametrize(("rows", "is_read"), [(128, True), (192, False), (259, True), (256, True), (320, True)])
def test_blocks_that_transformers_would_misread(tmp_path: Path, rows: int, is_read: bool) -> None:
    shape = {"dim": 128, "inter_dim": rows, "moe_inter_dim": 128, "kv_lora_rank": 64, "qk_rope_head_dim": 64}
    shape |= {"qk_nope_head_dim": 64, "v_head_dim": 64}
    save_model(tiny(**shape, n_mtp_layers=0), tmp_path / "a")
    if is_read:
        convert.convert(tmp_path / "a", tmp_path / "out", is_hf=True, dtype="fp8")
    else:
        with pytest.raises(CheckpointError) as error:
            convert.convert(tmp_path / "a", tmp_path / "out", is_hf=True, dtype="fp8")
        one_line(error, "layers.0.ffn.w1.weight", f"[{rows}, 128]", "--dtype bf16")
    convert.convert(tmp_path / "a", tmp_path / "native", dtype="fp8")
    convert.convert(tmp_path / "a", tmp_path / "bf16", is_hf=True, dtype="bf16")


# --- Configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"score_func": "softmax"}, None),
        ({"score_func": "softmax", "gate_bias": True}, "gate_bias"),
        ({"score_func": "softmax", "n_shared_experts": 0}, "shared experts"),
        ({"score_func": "sigmoid"}, None),
        ({"score_func": "softmax", "gate_bias": True, "n_mtp_layers": 0}, None),
    ],
)
def test_moe_in_mtp_modules_alone(tmp_path: Path, changes: dict[str, Any], refusal: str | None) -> None:
    shape = {"n_layers": 1, "n_dense_layers": 1, "moe_layer_freq": 1} | changes
    save_model(tiny(**shape), tmp_path / "a")
    if refusal:
        with pytest.raises(ConfigError) as error:
            convert.convert(tmp_path / "a", tmp_path / "hf", is_hf=True)
        one_line(error, refusal, tmp_path / "a" / "config.json")
    else:
        convert.convert(tmp_path / "a", tmp_path / "hf", is_hf=True)
        convert.convert(tmp_path / "hf", tmp_path / "b")
        assert_same(tmp_path / "a", tmp_path / "b")


@settings(draws, max_examples=300)
@given(divisible(dim=16, inter_dim=8, moe_inter_dim=4), st.sampled_from([None, True, False]), st.booleans())
def test_exported_configs_say_all(shape: dict[str, Any], gate_bias: bool | None, is_fp8: bool) -> None:
    try:
        args = ModelArgs.from_dict(TINY | shape | {"gate_bias": gate_bias})
        config = hf_config(args, torch.bfloat16, is_fp8)
    except ConfigError:
        return
    again = args_from_hf(json.loads(json.dumps(config)))
    assert again.to_dict() | {"dtype": args.dtype} == args.to_dict()


YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model_type": ["deepseek_v3"]}, "model_type"),
        ({"model_type": {}}, "model_type"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": {}}}, "rope_scaling"),
        ({"rope_scaling": YARN | {"rope_type": "linear"}}, "differ"),
        ({"rope_scaling": YARN | {"beta_fast": float("inf")}}, "Infinity"),
        ({"rope_theta": float("nan")}, "NaN"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "rope_parameters and rope_scaling"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}, "rope_parameters.rope_theta = 99.0"),
        ({"num_mtp_layers": 7}, "num_mtp_layers"),
        ({"first_k_dense_replace": 2}, "first_k_dense_replace"),
        ({"first_k_dense_replace": "x"}, "first_k_dense_replace"),
        ({"quantization_config": []}, "quantization_config"),
        ({"quantization_config": 0}, "quantization_config"),
        ({"num_attention_heads": 0, "num_key_value_heads": 0}, "num_attention_heads"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size"),
        ({"rms_norm_eps": "A" * 100_000}, "rms_norm_eps"),
    ],
)
def test_contradictions_and_worse_in_a_config(saved: Path, tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    convert.convert(saved, tmp_path / "hf", is_hf=True)
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigError) as error:
        open_checkpoint(tmp_path / "hf")
    one_line(error, file, part)
    assert len(str(error.value)) < 1000


def test_keys_that_are_twice_in_json(saved: Path, tmp_path: Path) -> None:
    convert.convert(saved, tmp_path / "hf", is_hf=True)
    for folder, name in ((saved, "config.json"), (tmp_path / "hf", "config.json"), (tmp_path / "hf", INDEX)):
        text = (folder / name).read_text()
        key, value = next(iter(json.loads(text).items()))
        (folder / name).write_text(f"{text.rstrip()[:-1]}, {json.dumps(key)}: {json.dumps(value)}}}")
        with pytest.raises(ValueError) as error:
            open_checkpoint(folder)
        one_line(error, folder / name, key, "twice")
        (folder / name).write_text(text)


@pytest.mark.parametrize("text", ["1e999", "NaN", "-Infinity"])
def test_numbers_that_are_none(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(json.dumps(TINY)[:-1] + f', "norm_eps": {text}}}')
    with pytest.raises(ConfigError) as error:
        open_checkpoint(saved)
    one_line(error, saved / "config.json", "finite")


def test_giant_config(saved: Path) -> None:
    os.truncate(saved / "config.json", 3 << 30)
    with pytest.raises(ConfigError) as error:
        open_checkpoint(saved)
    one_line(error, saved / "config.json", "64 MB")


def test_model_too_large_for_memory(saved: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    values |= {"max_seq_len": 1 << 45, "original_seq_len": 1 << 45}
    (saved / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as error:
        load_model(saved)
    one_line(error, saved / "config.json", "too large")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_named_pipe(saved: Path, name: str) -> None:
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(ValueError) as error:
        open_checkpoint(saved)
    one_line(error, saved)


# --- Paths and flags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", ".", "", "..", "x/..", "loop", "loop/x", "{saved}/../loop"])
def test_targets_that_are_none(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in (tmp_path, tmp_path / "here"):
        (folder / "loop").symlink_to(folder / "loop")
    before = sorted(tmp_path.rglob("*"))
    assert run("--ckpt-path", saved, "--save-path", path.format(saved=saved)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert run("--ckpt-path", "loop", "--save-path", "out") == 2


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_sources_that_link_to_themselves(saved: Path, tmp_path: Path, name: str) -> None:
    (saved / name).unlink()
    (saved / name).symlink_to(saved / name)
    assert run("--ckpt-path", saved, "--save-path", tmp_path / "out") == 2


@pytest.mark.parametrize("text", ["0000100000", "00001", "1e1", "+1", " 2", "\u0661", "10000", "0"])
def test_numbers_of_shards(saved: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(SystemExit) as error:
        run("--ckpt-path", saved, "--save-path", tmp_path / "out", "--model-parallel", text)
    assert error.value.code == 2


def test_experts_of_a_dense_model_are_not_cut(tmp_path: Path) -> None:
    save_model(tiny(n_dense_layers=3, n_mtp_layers=0, n_routed_experts=3), tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b", 2)
    assert torch.equal(logits(tmp_path / "b"), logits(tmp_path / "a"))


def test_source_of_impossible_shards(saved: Path) -> None:
    for rank in range(3):
        shutil.copy(saved / WEIGHTS, saved / f"model{rank}-mp3.safetensors")
    (saved / WEIGHTS).unlink()
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(saved)
    one_line(error, saved / "model0-mp3.safetensors", "into 3")


# --- What would be lost silently -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_hf", [False, True])
def test_mixed_dtypes_say_the_widest(saved: Path, tmp_path: Path, is_hf: bool) -> None:
    change(saved / WEIGHTS, lambda tensors: tensors.update({"head.weight": tensors["head.weight"].bfloat16()}))
    convert.convert(saved, tmp_path / "out", is_hf=is_hf)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"] if is_hf else config["dtype"]) == ("float32" if is_hf else "fp32")


def test_numbers_too_large_for_bfloat16(saved: Path, tmp_path: Path) -> None:
    def edit(value: float) -> None:
        change(saved / WEIGHTS, lambda tensors: tensors["head.weight"].view(-1).__setitem__(3, value))

    edit(3.4e38)
    with pytest.raises(CheckpointError) as error:
        convert.convert(saved, tmp_path / "out", dtype="bf16")
    one_line(error, saved / WEIGHTS, "head.weight", "bfloat16")
    edit(float("inf"))
    with pytest.raises(CheckpointError) as error:
        convert.convert(saved, tmp_path / "out", dtype="bf16")
    one_line(error, saved / WEIGHTS, "head.weight", "infinity")


def test_all_files_of_a_foreign_tokenizer(tmp_path: Path) -> None:
    save_model(tiny(vocab_size=300), tmp_path / "a")
    names = [
        "tokenizer.json",
        "merges.txt",
        "vocab.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "README.md",
    ]
    for name in names:
        (tmp_path / "a" / name).write_text(name)
    (tmp_path / "a" / "pytorch_model.bin").write_text("weights")
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [7, 9], "temperature": 0.6}')
    convert.convert(tmp_path / "a", tmp_path / "b", 2)
    convert.convert(tmp_path / "b", tmp_path / "hf", is_hf=True)
    for name in names:
        assert (tmp_path / "hf" / name).read_text() == name
    assert not (tmp_path / "hf" / "pytorch_model.bin").exists()
    theirs = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert theirs["eos_token_id"] == [7, 9] and theirs["temperature"] == 0.6
