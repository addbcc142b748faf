"""Checkpoints: what is written comes back, under DeepSeek's names, and whatever is damaged is told in one line."""

import json
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
from conftest import TINY, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import checkpoint as checkpoints
import convert
import parallel
import safetensors_io
from checkpoint import Run, read_config, save_model, save_run
from convert import load_model, open_checkpoint
from fp8_ops import weight_dequant, weight_quant
from model import ConfigError, ModelArgs, Transformer
from safetensors_io import CheckpointError

WEIGHTS, INDEX = "model0-mp1.safetensors", "model.safetensors.index.json"


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


def test_loading_casts_matrices_once_but_not_the_router(saved: Path) -> None:
    model = load_model(saved, compute_dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        kept = tensor.ndim == 1 or name.endswith("gate.weight")
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
    original = tiny()
    assert torch.equal(model.layers[1].ffn.gate.weight, original.layers[1].ffn.gate.weight)
    assert torch.equal(model.head.weight, original.head.weight.bfloat16())
    assert model(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()


# --- Refusals ---------------------------------------------------------------------------------------------------------


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


# --- Resharding -------------------------------------------------------------------------------------------------------

ROOT = Path(convert.__file__).parent
E4M3 = torch.float8_e4m3fn
draws = settings(max_examples=4, deadline=None, derandomize=True, database=None)
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
        with Run(tmp_path / "run") as held:
            save_run(held, tiny(step), {}, {"step": step}, is_best)
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
        ["--dtype"],
        ["--world", "2"],
        ["--format", "hf", "--model-parallel", "2"],
    ):
        with pytest.raises(SystemExit) as error:
            run(*base, *flags)
        assert error.value.code == 2 and not (tmp_path / "out").exists()
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1 and errors[0].startswith("convert.py: error: ") and flags[0] in errors[0]
    assert run("--ckpt-path", tmp_path / "none", "--save-path", tmp_path / "out") == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


BIG = {"dim": 512, "inter_dim": 2048, "n_layers": 6, "n_dense_layers": 6, "n_routed_experts": 0, "n_mtp_layers": 0}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_streams_that_are_closed_or_full(saved: Path, tmp_path: Path, streams: str) -> None:
    """They hinder no conversion, and what is opened meanwhile does not become one of them."""
    script = Path(convert.__file__).resolve()
    line = f'exec "{sys.executable}" "{script}" --ckpt-path "{saved}" --save-path "{tmp_path / "out"}" {streams}'
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and not done.stdout and not done.stderr
    assert_same(saved, tmp_path / "out")


@pytest.mark.slow
def test_interrupted_while_torch_is_imported(tmp_path: Path) -> None:
    """As after Ctrl-C at any other moment: no traceback."""
    script = Path(convert.__file__).resolve()
    code = (
        f"import runpy, sys, signal; sys.argv = ['convert.py'];\n"
        f"class Raise:\n"
        f"    def find_spec(self, name, *_):\n"
        f"        if name == 'torch':\n"
        f"            signal.raise_signal(signal.SIGINT)\n"
        f"sys.meta_path.insert(0, Raise()); sys.path.insert(0, {str(script.parent)!r})\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def command(*flags: object, before: str = "") -> subprocess.Popen:
    """The command, in a process of its own; `before` is Python to run first."""
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n{before}\nimport convert\nsys.exit(convert.main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_parents_made_in_vain_are_removed(saved: Path, tmp_path: Path) -> None:
    change(saved / WEIGHTS, lambda tensors: tensors["layers.0.attn.wo.weight"].view(-1).__setitem__(5, float("nan")))
    with pytest.raises(CheckpointError):
        convert.convert(saved, tmp_path / "x" / "y" / "out", dtype="fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.slow
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
    def no_memory(*_: object, **__: object) -> Transformer:
        raise MemoryError

    with pytest.raises(CheckpointError) as error:
        load_model(saved, build=no_memory)
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
def test_config_of_mixed_dtypes_has_the_widest(saved: Path, tmp_path: Path, is_hf: bool) -> None:
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


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["layers.1.ffn.gate.bias", "layers.0.attn.kv_norm.weight", "embed.weight"])
def test_no_number_that_is_none_is_passed_on(saved: Path, tmp_path: Path, name: str, bad: float) -> None:
    """Whichever way a checkpoint is read, and whether its dtype changes or not."""
    change(saved / WEIGHTS, lambda tensors: tensors[name].view(-1).__setitem__(-1, bad))
    for attempt in (
        lambda: convert.convert(saved, tmp_path / "same"),
        lambda: convert.convert(saved, tmp_path / "hf", is_hf=True),
        lambda: convert.convert(saved, tmp_path / "fp8", dtype="fp8"),
        lambda: load_model(saved),
    ):
        with pytest.raises(CheckpointError) as error:
            attempt()
        one_line(error, saved / WEIGHTS, name, "not finite")


def test_loaded_model_can_be_trained_on(saved: Path) -> None:
    model = load_model(saved).train()
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:]).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    before = load_file(saved / WEIGHTS)["layers.0.attn.wq.weight"]
    assert not torch.equal(model.layers[0].attn.wq.weight, before)


@pytest.mark.parametrize("changes", [{}, {"n_dense_layers": 0, "moe_layer_freq": 1}, {"n_routed_experts": 0}])
def test_required_tensors_follow_from_two_layers(
    saved: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int]
) -> None:
    """However many layers a config names, no model of that many is built to see what is missing."""
    built = []

    class Counted(Transformer):
        def __init__(self, args: ModelArgs, *rest: Any, **more: Any):
            built.append(args.n_layers + args.n_mtp_layers)
            super().__init__(args, *rest, **more)

    monkeypatch.setattr(checkpoints, "Transformer", Counted)
    args = ModelArgs.from_dict(TINY | {"n_layers": 300, "n_mtp_layers": 2, "vocab_size": 3} | changes)
    header = {f"layers.{i}.attn_norm.weight": torch.zeros(0) for i in range(3000)}
    save_file(header, saved / WEIGHTS)
    (saved / "config.json").write_text(json.dumps(args.to_dict()))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(saved)
    one_line(error, saved / WEIGHTS, "missing")
    assert built and max(built) <= 3
    shapes, fp8_layers = checkpoints._weights_of(args, saved, 3000)
    monkeypatch.undo()
    with torch.device("meta"):
        whole = Transformer(args, fp8_weights=True)
    parts = {name: t for name, _, t in checkpoints._native_slices(whole, parallel.ParallelContext())}
    assert shapes == {name: tuple(t.shape) for name, t in parts.items() if not name.endswith(".scale")}
    assert fp8_layers == {name for name, t in parts.items() if t.dtype == torch.float8_e4m3fn}


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
