"""How fast checkpoints are converted, as a fraction of copying them, and in how much memory.

    python tests/bench/bench_convert.py [--gb 4] [--folder DIR] [--repeat 3]

Each line is the median of several runs in processes of their own, copying and converting in turn, of which Python's
start and its imports are left out. "cp" copies the files that are read and, like a conversion, waits until they are on
the disk; "at once" loads the checkpoint with safetensors, does the same to its tensors and saves them.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import checkpoint  # noqa: E402
import convert  # noqa: E402
from model import ModelArgs, Transformer  # noqa: E402

SHAPE = {"dim": 2048, "inter_dim": 8192, "moe_inter_dim": 1024, "n_layers": 4, "n_dense_layers": 1, "n_heads": 16}
SHAPE |= {"n_routed_experts": 32, "n_shared_experts": 1, "n_activated_experts": 4, "score_func": "sigmoid"}
SHAPE |= {"q_lora_rank": 768, "kv_lora_rank": 512, "max_seq_len": 4096}
AT_ONCE = """
from pathlib import Path; from safetensors.torch import load_file, save_file; import torch, fp8_ops
source, target = Path(sys.argv[1]), Path(sys.argv[2]); target.mkdir()
world, dtype = int(sys.argv[3]), sys.argv[4]
tensors = {name: t for file in sorted(source.glob("*.safetensors")) for name, t in load_file(file).items()}
if dtype == "bf16":
    scales = {n: t for n, t in tensors.items() if n.endswith(("_scale_inv", ".scale"))}
    for n in [n for n in tensors if n not in scales]:
        s = scales.get(n + "_scale_inv", scales.get(n.removesuffix("weight") + "scale"))
        tensors[n] = tensors[n].bfloat16() if s is None else fp8_ops.weight_dequant(tensors[n], s)
    tensors = {n: t for n, t in tensors.items() if n not in scales}
for rank in range(world):
    cut = lambda t: t.chunk(world, 0)[rank].contiguous() if t.ndim == 2 and t.shape[0] % world == 0 else t
    save_file({n: cut(t) for n, t in tensors.items()}, target / f"{rank}.safetensors")
os.sync()
"""


def run(code: str, *flags: object) -> tuple[float, float]:
    """Seconds and peak memory in MB of Python code, in a process of its own."""
    ready = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import checkpoint, convert, parallel, torch
torch.set_num_threads(1)
parallel.keep_freed_memory()
torch.empty(2, device="meta").normal_()  # torch loads what the meta device needs
begin = time.perf_counter()
"""
    done = """
status = checkpoint.Path("/proc/self/status").read_text()
print(time.perf_counter() - begin, status.split("VmHWM:")[1].split()[0])
"""
    process = subprocess.run(
        [sys.executable, "-c", ready + code + done, *map(str, flags)], capture_output=True, text=True
    )
    if process.returncode:
        sys.exit(process.stderr)
    seconds, peak = process.stdout.split()
    return float(seconds), float(peak) / 1024


def alternate(target: Path, repeat: int, *codes: str, flags: tuple[object, ...]) -> list[tuple[float, float]]:
    """The median time and the highest peak of several ways to make `target`, which take turns."""
    runs: list[list[tuple[float, float]]] = [[] for _ in codes]
    for _ in range(repeat):
        for code, results in zip(codes, runs, strict=True):
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            results.append(run(code, *flags))
    shutil.rmtree(target, ignore_errors=True)
    return [(statistics.median(time for time, _ in r), max(peak for _, peak in r)) for r in runs]


def make(folder: Path, gb: float) -> None:
    """A float32 checkpoint of random numbers, of about so many gigabytes."""
    args = ModelArgs(**SHAPE)
    with torch.device("meta"):
        per_layer = Transformer(args).n_params()[0] * 4 / args.n_layers / 1e9
    args = ModelArgs(**SHAPE | {"n_layers": max(2, round(gb / per_layer))})
    model = Transformer(args)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(
                torch.randn(1 << 16).repeat(-(-tensor.numel() // (1 << 16)))[: tensor.numel()].view(tensor.shape)
            )
    checkpoint.save_model(model, folder)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the float32 checkpoint (default: 4)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each, of which the median counts (default: 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make(folder / "fp32", args.gb)
        convert.convert(folder / "fp32", folder / "hf8", is_hf=True, dtype="fp8")
        code = "convert.convert(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[5] == 'hf', "
        code += "None if sys.argv[4] == 'None' else sys.argv[4])"
        cast = "import fp8_cast_bf16; from pathlib import Path\n"
        cast += "fp8_cast_bf16.cast(Path(sys.argv[1]), Path(sys.argv[2]))"
        copy = "import shutil; shutil.copytree(sys.argv[1], sys.argv[2]); os.sync()"
        print(
            "| conversion | GB read | s | GB/s | fraction of cp | peak MB | at once: s | peak MB |\n"
            + "| --- " * 8
            + "|"
        )
        for title, source, what, world, dtype, kind in (
            ("mp1 → mp1", "fp32", code, 1, None, "native"),
            ("mp1 → mp2", "fp32", code, 2, None, "native"),
            ("mp1 → Hugging Face", "fp32", code, 1, None, "hf"),
            ("fp32 → bf16", "fp32", code, 1, "bf16", "native"),
            ("fp8_cast_bf16", "hf8", cast, 1, "bf16", "hf"),
        ):
            size = sum(file.stat().st_size for file in (folder / source).iterdir()) / 1e9
            flags = (folder / source, folder / "out", world, dtype, kind)
            (copied, _), (seconds, peak) = alternate(folder / "out", args.repeat, copy, what, flags=flags)
            ((once, once_peak),) = alternate(folder / "out", 1, AT_ONCE, flags=flags)
            row = f"{title} | {size:.2f} | {seconds:.2f} | {size / seconds:.2f} | {copied / seconds:.2f} | {peak:.0f}"
            print(f"| {row} | {once:.2f} | {once_peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
