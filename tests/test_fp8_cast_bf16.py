"""FP8 to BF16 against block-by-block arithmetic, in DeepSeek's layout; and what must be refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fp8_cast_bf16
from fp8_ops import weight_quant
from safetensors_io import CheckpointError, ShardSlice, Slice2D

ROOT = Path(fp8_cast_bf16.__file__).parent
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
SHAPES = {"a.weight": (300, 200), "b.weight": (128, 256), "c.weight": (1, 1), "d.weight": (129, 127)}
FILES = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """A checkpoint of no architecture in particular: the scales of each file's weights are in the other file."""
    folder, generator = tmp_path / "fp8", torch.Generator().manual_seed(0)
    folder.mkdir()
    files: list[dict[str, torch.Tensor]] = [{}, {}]
    for i, (name, shape) in enumerate(SHAPES.items()):
        q, s = weight_quant(torch.randn(shape, generator=generator) * 10.0 ** torch.arange(shape[1]).div(40).floor())
        files[i % 2][name], files[1 - i % 2][name + "_scale_inv"] = q, s
    files[0] |= {"norm.weight": torch.randn(7), "stack": torch.randn(2, 3, 4).bfloat16(), "empty": torch.zeros(0, 5)}
    files[1] |= {"steps": torch.arange(3), "scalar": torch.tensor(2.5)}
    for file, tensors in zip(FILES, files, strict=True):
        save_file(tensors, folder / file, metadata={"format": "pt"})
    where = {name: file for file, tensors in zip(FILES, files, strict=True) for name in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "anything", "hidden_size": 3, "quantization_config": QUANTIZATION}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("a tokenizer")
    (folder / "figures").mkdir()
    return folder


def run(source: Path, target: Path) -> int:
    return fp8_cast_bf16.main(["--input-fp8-hf-path", str(source), "--output-bf16-hf-path", str(target)])


def by_blocks(q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The product, one block at a time, in float64 and rounded once."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for i in range(s.shape[0]):
        for j in range(s.shape[1]):
            block = slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128)
            out[block] = q[block].double() * s[i, j].double()
    return out.float().bfloat16()


def test_every_tensor(fp8: Path, tmp_path: Path) -> None:
    assert run(fp8, tmp_path / "bf16") == 0
    before = {name: tensor for file in FILES for name, tensor in load_file(fp8 / file).items()}
    after: dict[str, torch.Tensor] = {}
    for file in FILES:
        tensors = load_file(tmp_path / "bf16" / file)
        assert tensors.keys() == {name for name in load_file(fp8 / file) if not name.endswith("_scale_inv")}
        after |= tensors
    for name, tensor in after.items():
        expected = by_blocks(before[name], before[name + "_scale_inv"]) if name in SHAPES else before[name]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    index = json.loads((tmp_path / "bf16" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in after.values())
    assert index["weight_map"] == {name: file for file in FILES for name in load_file(tmp_path / "bf16" / file)}
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert config == {"model_type": "anything", "hidden_size": 3}
    assert (tmp_path / "bf16" / "tokenizer.json").read_text() == "a tokenizer"
    assert len(list((tmp_path / "bf16").iterdir())) == 5


def test_one_file_without_index(tmp_path: Path) -> None:
    (tmp_path / "fp8").mkdir()
    q, s = weight_quant(torch.randn(200, 200))
    save_file({"w": q, "w_scale_inv": s}, tmp_path / "fp8" / "model.safetensors")
    (tmp_path / "fp8" / "config.json").write_text("{}")
    assert run(tmp_path / "fp8", tmp_path / "bf16") == 0
    assert sorted(path.name for path in (tmp_path / "bf16").iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load_file(tmp_path / "bf16" / "model.safetensors")["w"], by_blocks(q, s))


def test_bands(fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where a tensor takes many bands."""
    assert run(fp8, tmp_path / "whole") == 0
    monkeypatch.setattr("safetensors_io.BAND_BYTES", 1)
    assert run(fp8, tmp_path / "bands") == 0
    for file in FILES:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "bands" / file).read_bytes()


def edit(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replaces, adds or removes a tensor, in its file and in the index."""
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    file = value["weight_map"].get(name, FILES[0])
    tensors = load_file(folder / file) | {name: tensor}
    value["weight_map"][name] = file
    if tensor is None:
        del tensors[name], value["weight_map"][name]
    save_file(tensors, folder / file)
    index.write_text(json.dumps(value))


def add(folder: Path, weight: torch.Tensor, scale: torch.Tensor) -> None:
    edit(folder, "e.weight", weight.to(E4M3))
    edit(folder, "e.weight_scale_inv", scale)


def nan_in_fp8(*shape: int) -> torch.Tensor:
    q = torch.ones(shape).to(E4M3)
    q.view(torch.uint8)[-1, -1] = 0xFF
    return q


def break_index(folder: Path, **changes: str) -> None:
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"] |= {name.replace("__", "."): file for name, file in changes.items()}
    index.write_text(json.dumps(value))


DAMAGE = {
    "missing scale": (lambda f: edit(f, "a.weight_scale_inv", None), "a.weight"),
    "scale of nothing": (lambda f: edit(f, "a.weight", None), "a.weight_scale_inv"),
    "scale of bf16": (lambda f: edit(f, "a.weight", torch.ones(300, 200).bfloat16()), "a.weight_scale_inv .* BF16"),
    "scale of e5m2": (lambda f: edit(f, "d.weight", torch.ones(129, 127).to(E5M2)), "d.weight_scale_inv .* F8_E5M2"),
    "wrong shape": (lambda f: edit(f, "a.weight_scale_inv", torch.ones(2, 3)), "a.weight_scale_inv"),
    "wrong dtype": (lambda f: edit(f, "a.weight_scale_inv", torch.ones(3, 2).double()), "a.weight_scale_inv"),
    "NaN": (lambda f: edit(f, "a.weight_scale_inv", torch.full((3, 2), torch.nan)), "a.weight_scale_inv"),
    "a stack": (lambda f: edit(f, "e.weight", torch.ones(2, 3, 4).to(E4M3)), "e.weight .* missing"),
    "stack of one scale": (lambda f: add(f, torch.ones(2, 3, 4), torch.ones(1, 1)), r"e.weight .* \[1, 1\]"),
    "shorter stack of scales": (lambda f: add(f, torch.ones(2, 3, 4), torch.ones(1, 1, 1)), r"e.weight .* \[1, 1, 1\]"),
    "stack of wrong scales": (lambda f: add(f, torch.ones(2, 3, 400), torch.ones(2, 1, 3)), "e.weight_scale_inv"),
    "endless stack": (lambda f: add(f, torch.ones(1 << 17, 1, 1), torch.ones(1 << 17, 1, 1)), "e.weight .* 65536"),
    "a vector": (lambda f: add(f, torch.ones(300), torch.ones(3)), r"e.weight .* \[300\]"),
    "scales of half": (lambda f: edit(f, "a.weight_scale_inv", torch.ones(3, 2).half()), "a.weight_scale_inv, .* F16"),
    "zero": (lambda f: edit(f, "b.weight_scale_inv", torch.tensor([[1.0, 0.0]])), "b.weight_scale_inv .* zero"),
    "NaN in FP8": (lambda f: edit(f, "b.weight", nan_in_fp8(128, 256)), "b.weight .* finite"),
    "infinity elsewhere": (lambda f: edit(f, "norm.weight", torch.tensor([1.0, -torch.inf])), "norm.weight .* finite"),
    "NaN elsewhere": (lambda f: edit(f, "stack", torch.full((9, 9), torch.nan).bfloat16()), "stack .* finite"),
    "nothing FP8": (lambda f: [edit(f, n + e, None) for n in SHAPES for e in ("", "_scale_inv")], "nothing to cast"),
    "outside": (lambda f: break_index(f, a__weight="../fp8/" + FILES[0]), "a.weight"),
    "absolute": (lambda f: break_index(f, a__weight=str(f / FILES[0])), "a.weight"),
    "wrong file": (lambda f: break_index(f, a__weight=FILES[1]), "a.weight"),
    "not there": (lambda f: break_index(f, z__weight=FILES[1]), "z.weight"),
    "truncated": (lambda f: os.truncate(f / FILES[0], (f / FILES[0]).stat().st_size - 1), FILES[0]),
    "no file": (lambda f: (f / FILES[1]).unlink(), FILES[1]),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "int8": (
        lambda f: (f / "config.json").write_text('{"quantization_config": {"quant_method": "int8"}}'),
        "quant_method",
    ),
    "no folder": (lambda f: shutil.rmtree(f), "fp8"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_refused(fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    spoil, part = DAMAGE[damage]
    spoil(fp8)
    assert run(fp8, tmp_path / "out") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "B/s]" not in line]
    assert len(lines) == 1 and lines[0].startswith("fp8_cast_bf16.py: error: ") and re.search(part, lines[0]), lines
    assert not list(tmp_path.glob("*out*"))


def test_where_to(fp8: Path, tmp_path: Path) -> None:
    for target in (fp8, fp8 / "inside", tmp_path):
        assert run(fp8, target) == 2
    assert len(list(tmp_path.iterdir())) == 1 and len(list(fp8.iterdir())) == 6


@pytest.mark.slow
def test_killed_and_run_again(fp8: Path, tmp_path: Path) -> None:
    slow = "import time; from safetensors_io import ShardSlice; read = ShardSlice.read\n"
    slow += "ShardSlice.read = lambda *a: (time.sleep(0.1), read(*a))[1]"
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n{slow}\nimport fp8_cast_bf16\nsys.exit(fp8_cast_bf16.main())"
    flags = ["--input-fp8-hf-path", str(fp8), "--output-bf16-hf-path", str(tmp_path / "out")]
    for signum, expected in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = subprocess.Popen([sys.executable, "-c", code, *flags], stderr=subprocess.DEVNULL)
        while not (tmp_path / ".out.tmp" / FILES[1]).exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signum)
        assert process.wait() == expected and not (tmp_path / "out").exists()
        assert (tmp_path / ".out.tmp").exists() == (signum == signal.SIGKILL)
    assert run(fp8, tmp_path / "out") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8", "out"]


def test_nothing_is_read_to_plan() -> None:
    with pytest.raises(CheckpointError):
        fp8_cast_bf16.plan({})


def test_metadata_of_files_and_index_stays(tmp_path: Path) -> None:
    """Of a config, in nested ones too, only the FP8 entry goes; a file of scales is left out."""
    source, target = tmp_path / "fp8", tmp_path / "bf16"
    source.mkdir()
    q, s = weight_quant(torch.randn(200, 200))
    save_file({"w": q}, source / FILES[0], metadata={"format": "pt", "hello": "world"})
    save_file({"w_scale_inv": s}, source / FILES[1])
    where = {"w": FILES[0], "w_scale_inv": FILES[1]}
    told = {"metadata": {"total_size": 1, "total_parameters": 40000}, "weight_map": where}
    (source / "model.safetensors.index.json").write_text(json.dumps(told))
    config = {"model_type": "x", "text_config": {"dim": 3, "quantization_config": QUANTIZATION}}
    (source / "config.json").write_text(json.dumps(config))
    assert run(source, target) == 0
    assert sorted(path.name for path in target.glob("*.safetensors")) == FILES[:1]
    with safe_open(target / FILES[0], "pt") as file:
        assert file.metadata() == {"format": "pt", "hello": "world"}
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 80000, "total_parameters": 40000}, "weight_map": {"w": FILES[0]}}
    assert json.loads((target / "config.json").read_text()) == {"model_type": "x", "text_config": {"dim": 3}}


def test_product_too_large(fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(fp8, "a.weight_scale_inv", torch.full((3, 2), 3e38))
    assert run(fp8, tmp_path / "out") == 2
    assert "a.weight" in (told := capsys.readouterr().err) and "too large for bfloat16" in told
    assert not (tmp_path / "out").exists()


def test_empty_tensor_of_many_rows(tmp_path: Path) -> None:
    (tmp_path / "fp8").mkdir()
    (tmp_path / "fp8" / "config.json").write_text("{}")
    q, s = weight_quant(torch.randn(10, 10))
    save_file({"w": q, "w_scale_inv": s, "z": torch.empty(1 << 40, 0)}, tmp_path / "fp8" / "model.safetensors")
    assert run(tmp_path / "fp8", tmp_path / "out") == 0
    assert load_file(tmp_path / "out" / "model.safetensors")["z"].shape == (1 << 40, 0)


def checkpoint_of(folder: Path, tensors: dict[str, torch.Tensor], config: str = "{}") -> Path:
    """A checkpoint in one file."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(config)
    return folder


@pytest.mark.parametrize("shape", [(3, 130, 257), (1, 128, 5), (4, 1, 1), (2, 256, 128), (0, 5, 5), (5, 0, 5)])
def test_stacks_of_experts(tmp_path: Path, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    pairs = [weight_quant(torch.randn(shape[1:], generator=generator) * (i + 1)) for i in range(shape[0])]
    blocks = [-(-n // 128) for n in shape[1:]]
    q = torch.stack([q for q, _ in pairs]) if pairs else torch.empty(shape).to(E4M3)
    s = torch.stack([s for _, s in pairs]) if pairs else torch.empty(0, *blocks)
    tensors = {"experts.up": q, "experts.up_scale_inv": s, "norm": torch.randn(3)}
    source = checkpoint_of(tmp_path / "fp8", tensors)
    for name, band_bytes in (("a", 1 << 20), ("b", 200)):
        monkeypatch.setattr("safetensors_io.BAND_BYTES", band_bytes)
        assert run(source, tmp_path / name) == 0
        found = load_file(tmp_path / name / "model.safetensors")
        assert found.keys() == {"experts.up", "norm"} and torch.equal(found["norm"], tensors["norm"])
        assert found["experts.up"].shape == shape and found["experts.up"].dtype == torch.bfloat16
        for matrix, (q_one, s_one) in zip(found["experts.up"], pairs, strict=True):
            assert torch.equal(matrix, by_blocks(q_one, s_one))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_in_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    q, s = weight_quant(torch.randn(259, 140, generator=torch.Generator().manual_seed(3)))
    s = s.to(dtype)
    tensors = {"w": q, "w_scale_inv": s, "e": q.view(1, 259, 140).repeat(2, 1, 1), "e_scale_inv": s.repeat(2, 1, 1)}
    assert run(checkpoint_of(tmp_path / "fp8", tensors), tmp_path / "bf16") == 0
    found = load_file(tmp_path / "bf16" / "model.safetensors")
    expected = by_blocks(q, s.float())
    assert torch.equal(found["w"], expected) and torch.equal(found["e"], torch.stack([expected, expected]))


def test_a_scale_of_zero_for_zeros(tmp_path: Path) -> None:
    q, s = weight_quant(torch.randn(256, 128))
    q[:128], s[0] = 0, 0
    assert run(checkpoint_of(tmp_path / "fp8", {"w": q, "w_scale_inv": s}), tmp_path / "bf16") == 0
    assert torch.equal(load_file(tmp_path / "bf16" / "model.safetensors")["w"], by_blocks(q, s))


def test_vectors_are_read_in_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q, s = weight_quant(torch.randn(9, 5000))
    tensors = {"v": torch.randn(10_007), "m": torch.randn(3, 4001).bfloat16(), "w": q, "w_scale_inv": s}
    source = checkpoint_of(tmp_path / "fp8", tensors)
    assert run(source, tmp_path / "whole") == 0
    sizes, read = [], ShardSlice.read

    def recorded(self: ShardSlice, part: Slice2D, out: torch.Tensor) -> None:
        sizes.append(out.numel())
        read(self, part, out)

    monkeypatch.setattr("safetensors_io.BAND_BYTES", 2000)
    monkeypatch.setattr(ShardSlice, "read", recorded)
    assert run(source, tmp_path / "bands") == 0
    assert max(sizes) <= 2000 and sum(sizes) == 4 * 10_007 + 2 * 3 * 4001 + 9 * 5000
    for name in ("whole", "bands"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert torch.equal(found["v"], tensors["v"]) and torch.equal(found["m"], tensors["m"])
        assert torch.equal(found["w"], by_blocks(q, s))


def test_a_config_without_bottom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    q, s = weight_quant(torch.ones(2, 2))
    config = '{"a":' * 700 + "{}" + "}" * 700
    assert run(checkpoint_of(tmp_path / "fp8", {"w": q, "w_scale_inv": s}, config), tmp_path / "out") == 2
    assert "config.json" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--input-fp8-hf-path"], ["--input-fp8", "x"], ["--\x1b[31mred", "y"], []])
def test_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        fp8_cast_bf16.main(flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and line.startswith("fp8_cast_bf16.py: error: ") and line.isprintable()


def test_escapes_of_a_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in (
        tmp_path / "a\x1b]0;b\n",
        checkpoint_of(tmp_path / "c\x9bd\n", {"w\x1b[2J": torch.ones(2).to(E4M3)}),
    ):
        assert run(source, tmp_path / "out") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.isprintable()


@pytest.mark.slow
@pytest.mark.parametrize(("stream", "code"), [("stdout", 2), ("stderr", 0)])
def test_help_into_a_full_stream(stream: str, code: int) -> None:
    with open("/dev/full", "w") as full:
        script = [sys.executable, str(ROOT / "fp8_cast_bf16.py"), "--help"]
        process = subprocess.run(
            script, text=True, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full}
        )
    assert process.returncode == code
    assert "Traceback" not in f"{process.stderr}" and "Exception" not in f"{process.stderr}"
    assert len(process.stderr.splitlines()) == 1 if code else "--output-bf16-hf-path" in process.stdout
