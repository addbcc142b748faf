"""A race in wall-clock against nanoGPT: the same corpus, the same minutes, the loss over the same validation tenth.

    python tests/bench/bench_race.py --nanogpt ../nanoGPT --config configs/bytegpt.json --data FILE --minutes 2.8

Three runs take turns on one device, each with all of it: nanoGPT's own `train.py` (12 layers of 768, its learning rate
schedule fitted to the time, compiled), ours with no other flags than the data, the time and the folder, and a dense
twin of ours whose blocks have as many active parameters. A process's time counts from its start to its end: imports,
compiling with an empty cache, evaluations and the saved checkpoint included. nanoGPT has no clock, so a short run of it
measures start-up and the time of a step, and the iterations follow from these. The losses are then measured here, of
what each run saved, in sequences of each model's own context that do not overlap.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from checkpoint import read_config  # noqa: E402
from convert import load_model  # noqa: E402
from data.prepare import resolve  # noqa: E402
from parallel import pick_device  # noqa: E402

NANOGPT_FLAGS = (  # the shape of its GPT-2, one step of 32 sequences; rates of its configs for characters
    "--n_layer=12 --n_head=12 --n_embd=768 --block_size=1024 --batch_size=32 --gradient_accumulation_steps=1 "
    "--learning_rate=1e-3 --min_lr=1e-4 --warmup_iters=100 --beta2=0.99"
)
TRIAL = 60  # iterations that measure nanoGPT's start-up and step


def timed(command: list[str], folder: Path) -> tuple[float, str]:
    """Runs a command in a folder; returns its seconds and stdout. Its stderr is shown where it fails."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:  # no run finds kernels that another has compiled
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return time.perf_counter() - began, done.stdout


def run_nanogpt(checkout: Path, folder: Path, seconds: float, device: str, flags: list[str]) -> tuple[float, int]:
    """Trains nanoGPT for about `seconds`; returns what it took and its iterations."""
    (folder / "configurator.py").symlink_to(checkout / "configurator.py")  # which its train.py reads from where it runs
    common = [f"--dataset={folder}", f"--device={device}", f"--dtype={'bfloat16' if device == 'cuda' else 'float32'}"]
    common += [*flags, "--eval_iters=1", "--log_interval=10", f"--compile={device == 'cuda'}"]

    def train(iterations: int) -> tuple[float, str]:
        length = [f"--max_iters={iterations}", f"--lr_decay_iters={iterations}", f"--eval_interval={iterations}"]
        return timed([sys.executable, str(checkout / "train.py"), *common, *length], folder)

    taken, out = train(TRIAL)
    step = float(np.median([float(ms) for ms in re.findall(r"iter \d+: .* time ([\d.]+)ms", out)[2:-1]])) / 1000
    iterations = int((seconds - (taken - TRIAL * step)) / step)
    if iterations < TRIAL:
        sys.exit(f"nanoGPT takes {taken:.0f} s for {TRIAL} iterations here: give more --minutes")
    return train(iterations)[0], iterations


def run_ours(config: Path, data: str, folder: Path, minutes: float) -> tuple[float, int]:
    """Trains ours by the clock; returns the seconds it took and the bytes it was trained on."""
    flags = ["--config", str(config), "--data", data, "--minutes", str(minutes), "--save-path", str(folder)]
    taken, _ = timed([sys.executable, str(ROOT / "train.py"), *flags], ROOT)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return taken, rows[-1]["bytes"]


def dense_twin(config: Path, folder: Path) -> Path:
    """Writes the config with dense blocks alone, which have as many active parameters in all as those of `config`."""
    shape, values = read_config(config)[0], json.loads(config.read_text())
    n_moe = sum(shape.is_moe(i) for i in range(shape.n_layers))
    width = n_moe * (shape.n_activated_experts + shape.n_shared_experts) * shape.moe_inter_dim
    width += (shape.n_layers - n_moe) * shape.inter_dim
    values |= {"n_dense_layers": shape.n_layers, "inter_dim": round(width / shape.n_layers / 128) * 128}
    path = folder / "dense.json"
    path.write_text(json.dumps(values))
    return path


@torch.inference_mode()
def validate(forward: Callable[[torch.Tensor], torch.Tensor], val: np.ndarray, context: int, device: str) -> float:
    """The loss in nats per byte of logits (B, S, 256) over sequences of `context` bytes that do not overlap."""
    count, total = (len(val) - 1) // context, 0.0
    for first in range(0, count, 32):
        n = min(32, count - first)
        piece = torch.from_numpy(val[first * context : (first + n) * context + 1].astype(np.int64)).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = forward(piece[:-1].view(n, context))
        total += F.cross_entropy(logits.flatten(0, 1).float(), piece[1:], reduction="sum").item()
    return total / (count * context)


def load_nanogpt(checkout: Path, folder: Path, device: str) -> tuple[torch.nn.Module, int, int]:
    """Loads what nanoGPT's run saved: the model, its context, and the bytes of one of its steps."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    saved = torch.load(folder / "out" / "ckpt.pt", map_location=device, weights_only=True)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
        model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict({name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()})
    config = saved["config"]
    step_bytes = config["batch_size"] * config["gradient_accumulation_steps"] * config["block_size"]
    return model.to(device).eval(), config["block_size"], step_bytes


def logits_of_nanogpt(model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Wraps its forward, which gives the logits of all positions only where it is given targets."""
    return lambda tokens: model(tokens, tokens)[0]


def main() -> None:
    """Runs the race and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "bytegpt.json")
    parser.add_argument("--data", default="stdlib", help="as train.py's")
    parser.add_argument("--minutes", type=float, default=2.8)
    parser.add_argument("--nanogpt-flags", default=NANOGPT_FLAGS, help="of its train.py (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=["nanogpt", "ours", "dense"], choices=["nanogpt", "ours", "dense"])
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder for corpus and checkpoints")
    options = parser.parse_args()
    folder, device, seconds = options.folder.resolve(), pick_device(None), 60 * options.minutes
    folder.mkdir(parents=True)
    corpus = np.fromfile(resolve(options.data), dtype=np.uint8)
    train, val = np.split(corpus, [int(0.9 * len(corpus))])
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPUs"
    print(f"{name}, {len(train):,} bytes to train on, {len(val):,} to validate, {options.minutes} minutes each\n")
    print("| | MB trained on | seconds | nats/byte |\n|---|---|---|---|", flush=True)
    if "nanogpt" in options.only:
        train.astype(np.uint16).tofile(folder / "train.bin")
        val.astype(np.uint16).tofile(folder / "val.bin")
        (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 256}))
        checkout = options.nanogpt.resolve()
        taken, iterations = run_nanogpt(checkout, folder, seconds, device, options.nanogpt_flags.split())
        model, context, step_bytes = load_nanogpt(checkout, folder, device)
        loss = validate(logits_of_nanogpt(model), val, context, device)
        print(f"| nanoGPT | {iterations * step_bytes / 1e6:.1f} | {taken:.1f} | {loss:.4f} |", flush=True)
    configs = {"ours": options.config.resolve(), "dense": dense_twin(options.config, folder)}
    for kind in [kind for kind in configs if kind in options.only]:
        taken, n_bytes = run_ours(configs[kind], options.data, folder / kind, options.minutes)
        model = load_model(folder / kind, device)
        loss = validate(model, val, model.args.max_seq_len, device)
        title = options.config.name + (", dense twin" if kind == "dense" else "")
        print(f"| {title} | {n_bytes / 1e6:.1f} | {taken:.1f} | {loss:.4f} |", flush=True)


if __name__ == "__main__":
    main()
