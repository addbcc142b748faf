"""FP8 measured: dequantisation, casting a checkpoint, the GPU's kernels, and training against bfloat16.

    python tests/bench/bench_fp8.py dequant cast           a CPU will do
    python tests/bench/bench_fp8.py kernels                needs a GPU of compute capability 8.9 or more
    python tests/bench/bench_fp8.py step                   so does this; --top N lists the kernels that take longest
    python tests/bench/bench_fp8.py train --data FILE   shakespeare.json in both; --figure draws the curves (matplotlib)

Each part compares two ways in the same run, repeats them alternately and prints the medians. With no part named, all
that this machine can do are run.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import fp8_ops  # noqa: E402
import model  # noqa: E402
import parallel  # noqa: E402
from fp8_ops import BLOCK, act_quant, act_quant_both, fp8_gemm, weight_dequant, weight_quant  # noqa: E402

# M, N, K of DeepSeek-V3's matrices, and what DeepGEMM's README (commit 327ec92) gives for them on an H800, in TFLOP/s
SHAPES = [
    (4096, 2112, 7168, 1127),
    (4096, 24576, 1536, 1212),
    (4096, 32768, 512, 775),
    (4096, 7168, 16384, 1520),
    (4096, 4096, 7168, 1410),
    (4096, 7168, 2048, 1168),
]


def seconds(*ways: Callable[[], object], repeats: int = 5) -> list[float]:
    """The median time of each way; they take turns, after one round that does not count."""
    times: list[list[float]] = [[] for _ in ways]
    for i in range(repeats + 1):
        for way, taken in zip(ways, times, strict=True):
            began = time.perf_counter()
            way()
            if i:
                taken.append(time.perf_counter() - began)
    return [statistics.median(t) for t in times]


def block_by_block(q: torch.Tensor, s: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Dequantisation as one would first write it."""
    out = torch.empty(q.shape, dtype=dtype)
    for i in range(s.shape[0]):
        for j in range(s.shape[1]):
            rows, columns = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            out[rows, columns] = q[rows, columns].to(torch.float32) * s[i, j]
    return out


def bench_dequant() -> None:
    """Dequantisation on the CPU, against the plain way block by block."""
    print("\n## Dequantisation on the CPU\n")
    print("| weight | to | block by block | weight_dequant | ratio |\n|---|---|---|---|---|")
    for shape in [(7168, 2048), (8192, 8192), (1000, 3000)]:
        q, s = weight_quant(torch.randn(shape))
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(block_by_block(q, s, dtype), weight_dequant(q, s, dtype=dtype))
            plain, ours = seconds(
                lambda q=q, s=s, dtype=dtype: block_by_block(q, s, dtype),
                lambda q=q, s=s, dtype=dtype: weight_dequant(q, s, dtype=dtype),
            )
            print(
                f"| {shape[0]}×{shape[1]} | {str(dtype)[6:]} | {1e3 * plain:.0f} ms | {1e3 * ours:.0f} ms "
                f"({q.numel() / ours / 1e9:.1f} GB/s read) | {plain / ours:.1f} |",
                flush=True,
            )


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """Writes an FP8 checkpoint in DeepSeek's published layout, with matrices of DeepSeek-V3's expert size."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    weight_map, per_file = {}, 32
    n_files = max(1, round(gigabytes * 1e9 / (7168 * 2048) / per_file))
    for i in range(n_files):
        file, tensors = f"model-{i + 1:05d}-of-{n_files:05d}.safetensors", {}
        for j in range(per_file):
            name = f"model.layers.{i}.mlp.experts.{j}.down_proj.weight"
            q, s = weight_quant(torch.randn(7168, 2048))
            tensors |= {name: q, f"{name}_scale_inv": s}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "quantization_config": quantization}))


def bench_cast(gigabytes: float, workspace: Path | None) -> None:
    """fp8_cast_bf16.py against `cp` of its input, both from the page cache."""
    with tempfile.TemporaryDirectory(dir=workspace) as folder:
        source, copy, target = (Path(folder) / name for name in ("fp8", "copy", "bf16"))
        make_checkpoint(source, gigabytes)
        size = sum(file.stat().st_size for file in source.iterdir())
        command = [sys.executable, str(ROOT / "fp8_cast_bf16.py")]
        command += ["--input-fp8-hf-path", str(source), "--output-bf16-hf-path", str(target)]

        def copying(from_: Path) -> None:
            shutil.rmtree(copy, ignore_errors=True)
            subprocess.run(["cp", "-r", from_, copy], check=True)
            os.sync()

        peaks = []

        def casting() -> None:
            shutil.rmtree(target, ignore_errors=True)
            peaks.append(peak_memory(command))
            os.sync()

        casting()
        copied, cast, copied_back = seconds(lambda: copying(source), casting, lambda: copying(target), repeats=3)
        print(f"\n## fp8_cast_bf16.py, {size / 1e9:.2f} GB of FP8, each flushed to disk\n")
        print(
            "| cp of the input | cp of the output, twice the bytes | cast | cp of input / cast | cp of output / cast |"
        )
        print("|---|---|---|---|---|")
        ratios = f"{copied / cast:.2f} | {copied_back / cast:.2f}"
        print(f"| {copied:.2f} s | {copied_back:.2f} s | {cast:.2f} s | {ratios} |")
        print(f"\npeak memory {max(peaks):,.0f} MiB", flush=True)


def peak_memory(command: list[str]) -> float:
    """Runs a command; returns the most memory that it had at a time, in MiB.

    What the system tells about children is of no use: a child begins with the peak of the process that started it.
    """
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 0
    while process.poll() is None:
        with suppress(OSError, IndexError):  # over, or about to begin
            peak = int(Path(f"/proc/{process.pid}/status").read_text().split("VmHWM:")[1].split()[0])
        time.sleep(0.02)
    assert process.returncode == 0, command
    return peak / 1024


def gpu_seconds(way: Callable[[], object]) -> float:
    """The median time of some work on the GPU."""
    from triton.testing import do_bench

    return do_bench(way, warmup=20, rep=80, return_mode="median") / 1e3


def scaled_mm(a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor) -> Callable[[], object] | None:
    """torch's own block-wise FP8 product, or None where this build of torch has none for this GPU."""
    try:
        from torch.nn.functional import ScalingType

        a_s, b_s = a_s.T.contiguous().T, b_s.contiguous().T
        recipes = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128

        def way() -> torch.Tensor:
            return F.scaled_mm(a, b.T, a_s, recipes[0], b_s, recipes[1])

        way()
        return way
    except (AttributeError, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        print(f"<!-- scaled_mm: {str(error).splitlines()[0][:160]} -->")
        return None


def bench_kernels() -> None:
    """The kernels on this GPU: products in TFLOP/s, and quantisers as a share of the copy bandwidth."""
    print(f"\n## Kernels, {torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| M×N×K | bf16 | fp8_gemm | of bf16 | weight gradient | scaled_mm block-wise | DeepGEMM, published, H800 |")
    print("|---|---|---|---|---|---|---|")
    for m, n, k, published in SHAPES:
        x, w, grad = (torch.randn(shape, device="cuda").bfloat16() for shape in ((m, k), (n, k), (m, n)))
        q, s, x_t, x_ts = act_quant_both(x)
        b, b_s = weight_quant(w)
        _, _, grad_t, grad_ts = act_quant_both(grad)
        theirs = scaled_mm(q, s, b, b_s)
        bf16, ours, gradient, torchs = (
            2e-12 * m * n * k / gpu_seconds(way) if way else float("nan")
            for way in (
                lambda x=x, w=w: x @ w.T,
                lambda q=q, s=s, b=b, b_s=b_s: fp8_gemm(q, s, b, b_s),
                lambda a=grad_t, a_s=grad_ts, b=x_t, b_s=x_ts: fp8_gemm(a, a_s, b, b_s, torch.float32),
                theirs,
            )
        )
        figures = f"{bf16:.0f} | {ours:.0f} | {ours / bf16:.2f} | {gradient:.0f} | {torchs:.0f} | {published}"
        print(f"| {m}×{n}×{k} | {figures} |", flush=True)
    x = torch.randn(16384, 7168, device="cuda").bfloat16()
    y, (q, s) = torch.empty_like(x), weight_quant(x)
    copy = 4 * x.numel() / gpu_seconds(lambda: y.copy_(x))
    print(f"\n| 16384×7168, bfloat16 | bytes moved, of the copy bandwidth ({copy / 1e12:.2f} TB/s) |\n|---|---|")
    for name, bytes_each, way in (
        ("act_quant", 3, lambda: act_quant(x)),
        ("act_quant_both", 4, lambda: act_quant_both(x)),
        ("weight_quant", 3, lambda: weight_quant(x)),
        ("weight_dequant", 3, lambda: weight_dequant(q, s)),
    ):
        print(f"| {name} | {bytes_each * x.numel() / gpu_seconds(way) / copy:.0%} |", flush=True)


def model_of(config: Path) -> tuple[model.Transformer, torch.Tensor]:
    """A config's model in bfloat16 with random weights, and a batch of sequences with the bytes after them."""
    args = json.loads(config.read_text())
    batch_size = args.pop("train")["batch_size"]
    with torch.device("cuda"):
        net = model.Transformer(model.ModelArgs.from_dict(args), torch.bfloat16, init=False)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1) if p.ndim == 1 else p.normal_(0, p.shape[-1] ** -0.5)
    return net, torch.randint(256, (batch_size, net.args.max_seq_len + 1), device="cuda")


def captured(net: model.Transformer, batch: torch.Tensor) -> torch.cuda.CUDAGraph:
    """Forward and backward as a CUDA graph, for as long as the model and the batch stay."""

    def step() -> None:
        net.zero_grad()
        net.loss(batch[:, :-1], batch[:, 1:]).total.backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles kernels, and picks their tiles
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def bench_step(configs: list[Path], top: int) -> None:
    """Forward and backward in bfloat16 and in FP8, without launches, the loop and the optimizer."""
    print(f"\n## Forward and backward as a CUDA graph, {torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| config | bytes | bf16 | fp8 | bf16 / fp8 | quantising the weights, once a step |")
    print("|---|---|---|---|---|---|")
    listings = []
    for config in configs:
        net, batch = model_of(config)
        times = []
        for gemm_impl in ("bf16", "fp8"):
            fp8_ops.gemm_impl = gemm_impl  # type: ignore[assignment]
            if gemm_impl == "fp8":
                net.quantize_weights()
            graph = captured(net, batch)
            times.append(gpu_seconds(graph.replay))
            listings.append((f"{config.stem}, {gemm_impl}", kernel_times(graph.replay)[: top + 1]))
            del graph
            net.zero_grad()
            torch.cuda.empty_cache()
        bf16, fp8 = times
        quantising = kernel_times(net.quantize_weights)[0][0]
        figures = f"{1e3 * bf16:.1f} ms | {1e3 * fp8:.1f} ms | {bf16 / fp8:.2f} | {quantising:.1f} ms"
        print(f"| {config.name} | {batch.numel() - len(batch):,} | {figures} |", flush=True)
    for title, rows in listings if top else []:
        print(f"\n| ms | launches | kernel ({title}) |\n|---|---|---|")
        for ms, count, name in rows:
            print(f"| {ms:.2f} | {count} | {name[:90]} |")


def kernel_times(way: Callable[[], object]) -> list[tuple[float, int, str]]:
    """Milliseconds and launches of all kernels together, then of each by name, the longest first."""
    way()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        way()
        torch.cuda.synchronize()
    rows = [(e.self_device_time_total / 1e3, e.count, e.key) for e in profile.key_averages()]
    rows = sorted((row for row in rows if row[0] > 0), reverse=True)
    return [(sum(row[0] for row in rows), sum(row[1] for row in rows), "all"), *rows]


def smoothed(losses: list[float], window: int) -> list[float]:
    """Means over the last `window` values, from where there are so many."""
    return [statistics.fmean(losses[i : i + window]) for i in range(len(losses) - window + 1)]


def train_once(args: argparse.Namespace, folder: Path, gemm_impl: str, seed: int) -> tuple[list[float], float]:
    """Trains one model; returns its training loss at each step and its validation loss at the end."""
    run = folder / f"{gemm_impl}-{seed}"
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(args.config), "--data", args.data]
    command += ["--steps", str(args.steps), "--seed", str(seed), "--gemm-impl", gemm_impl, "--save-path", str(run)]
    command += ["--log-interval", "1", "--eval-interval", str(args.steps), "--sample-bytes", "0"]
    subprocess.run(command + args.train_flags.split(), check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    return losses, [line["val_loss"] for line in lines if "val_loss" in line][-1]


def bench_train(args: argparse.Namespace) -> None:
    """The same runs in bfloat16 and in FP8: how far the smoothed training loss differs, over several seeds."""
    todo = [(gemm_impl, seed) for seed in range(args.seeds) for gemm_impl in ("bf16", "fp8")]
    with tempfile.TemporaryDirectory(dir=args.workspace) as folder, ThreadPoolExecutor(args.jobs) as pool:
        done = dict(zip(todo, pool.map(lambda job: train_once(args, Path(folder), *job), todo), strict=True))
    curves = {name: [done[name, seed][0] for seed in range(args.seeds)] for name in ("bf16", "fp8")}
    val = {name: [done[name, seed][1] for seed in range(args.seeds)] for name in curves}
    if args.curves:
        args.curves.write_text(json.dumps({"train": curves, "val": val}))
    ends, means = [], []
    for a, b in zip(curves["bf16"], curves["fp8"], strict=True):
        differences = relative(smoothed(a, args.window), smoothed(b, args.window))
        ends.append(differences[-1])
        means.append(statistics.fmean(differences))
    title = f"{args.config.name}, {args.steps} steps, {args.seeds} seeds, loss smoothed over {args.window} steps"
    print(f"\n## Training {title}\n\n| | bf16 | fp8 | relative difference |\n|---|---|---|---|")
    last = {name: statistics.fmean(smoothed(c, args.window)[-1] for c in curves[name]) for name in curves}
    print(f"| smoothed training loss at the end | {last['bf16']:.4f} | {last['fp8']:.4f} | {spread(ends)} |")
    print(f"| mean along the way | | | {spread(means)} |")
    ends = relative(val["bf16"], val["fp8"])
    last = {name: statistics.fmean(val[name]) for name in val}
    print(f"| validation loss at the end | {last['bf16']:.4f} | {last['fp8']:.4f} | {spread(ends)} |", flush=True)
    if args.figure:
        draw(curves, args.window, args.figure)


def relative(a: list[float], b: list[float]) -> list[float]:
    """By which share of `a` each value of `b` is above it."""
    return [y / x - 1 for x, y in zip(a, b, strict=True)]


def spread(values: list[float]) -> str:
    """The mean of several seeds' values, and its standard error."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3%}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.3%}{error}"


def draw(curves: dict[str, list[list[float]]], window: int, path: Path) -> None:
    """Draws both smoothed curves, each the mean of its seeds, and their relative difference below."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bytegpt"
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 4), sharex=True, layout="constrained", height_ratios=[3, 1])
    a, b = (
        smoothed([statistics.fmean(step) for step in zip(*curves[name], strict=True)], window)
        for name in ("bf16", "fp8")
    )
    steps = range(window, window + len(a))
    above.plot(steps, a, label="bf16")
    above.plot(steps, b, "--", label="fp8")
    above.set(ylabel="nats per byte")
    above.legend()
    below.plot(steps, [100 * d for d in relative(a, b)], color="C3")
    below.axhspan(-0.25, 0.25, alpha=0.15)
    below.set(xlabel=f"step (means over {window})", ylabel="difference, %", ylim=(-0.5, 0.5))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Runs the parts that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="dequant, cast, kernels, step, train")
    parser.add_argument("--workspace", type=Path, help="where temporary files go; default: the system's place")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint to cast")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "shakespeare.json", help="of train")
    parser.add_argument("--top", type=int, default=0, help="how many of a step's kernels to list")
    parser.add_argument("--data", default="shakespeare", help="what train.py --data takes")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1, help="how many times to train both, from other seeds")
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at once, where the machine has room")
    parser.add_argument("--window", type=int, default=50, help="steps over which the training loss is smoothed")
    parser.add_argument("--train-flags", default="", help="further flags of train.py, in one string")
    parser.add_argument("--curves", type=Path, help="write both loss curves to this JSON file")
    parser.add_argument("--figure", type=Path, help="draw the curves into this .svg file")
    args = parser.parse_args()
    parallel.keep_freed_memory()  # as the commands do
    if unknown := set(args.parts) - {"dequant", "cast", "kernels", "step", "train"}:
        parser.error(f"no part {unknown.pop()!r}")
    on_gpu = fp8_ops.multiplies_fp8(torch.device("cuda"))
    parts = args.parts or ["dequant", "cast", *(["kernels", "step"] if on_gpu else []), "train"]
    if {"kernels", "step"} & set(parts) and not on_gpu:
        parser.error("kernels, step: no GPU of compute capability 8.9 or more, or no Triton, here")
    if "dequant" in parts:
        bench_dequant()
    if "cast" in parts:
        bench_cast(args.gigabytes, args.workspace)
    if "kernels" in parts:
        bench_kernels()
    if "step" in parts:
        bench_step([ROOT / "configs" / f"{name}.json" for name in ("base", "large")], args.top)
    if "train" in parts:
        bench_train(args)


if __name__ == "__main__":
    main()
