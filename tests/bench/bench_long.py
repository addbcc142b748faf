"""What a long context is worth, and what sparse attention to it costs: three models, trained for equal steps.

    python tests/bench/bench_long.py --config configs/long.json --data FILE --steps 4000 --batch-size 4 \
        --contexts 200 --device cuda --seed 0 --save-path DIR

or a smaller run, with four of its eight layers, and one evaluation at the end:

    python tests/bench/bench_long.py --config configs/long.json --layers 4 --data FILE --steps 600 --batch-size 4 \
        --contexts 200 --device cuda --seed 0 --save-path DIR --eval-interval 600 --save-interval 600

- sparse: the config as it is;
- dense: the same without indexers;
- short: the dense one with an eighth of the context, and eight times the sequences, so that a step has as many bytes.

All are measured on the same bytes: the last quarter of each context of the validation split, which the first two
predict from all that is before it. The short one gets half of its own context before the first byte that counts, or
more. The time of a step is the median at the end of the run, where sequences are long and attention is what it is for.
A run that is there already is not trained again, and one that was stopped goes on.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import parallel  # noqa: E402
from checkpoint import read_config, resolve_run  # noqa: E402
from convert import load_model  # noqa: E402
from data.prepare import open_bytes, resolve  # noqa: E402
from data.sampler import Corpus, split  # noqa: E402
from model import Transformer  # noqa: E402

SHORTER = 8  # contexts of the short model in one of the others
INDEXED = ("index_n_heads", "index_head_dim", "index_topk")


def variants(config: Path, batch_size: int | None, layers: int | None) -> dict[str, dict[str, Any]]:
    """The configs of the three models, with their training flags."""
    values = json.loads(config.read_text())
    values["n_layers"] = layers or values["n_layers"]
    flags = values.pop("train", {})
    flags["batch_size"] = batch_size or flags.get("batch_size", 4)
    dense = {key: value for key, value in values.items() if key not in INDEXED}
    dense_flags = {key: value for key, value in flags.items() if key not in ("index_warmup", "indexer_only")}
    short = dense | {"max_seq_len": values["max_seq_len"] // SHORTER}
    short_flags = dense_flags | {"batch_size": SHORTER * flags["batch_size"], "short_seq_len": 0}
    return {
        "sparse": values | {"train": flags},
        "dense": dense | {"train": dense_flags},
        "short": short | {"train": short_flags},
    }


def train(name: str, values: dict[str, Any], options: argparse.Namespace) -> Path:
    """Trains a model, or goes on; returns the run's folder."""
    config, run = options.save_path / f"{name}.json", options.save_path / name
    config.write_text(json.dumps(values, indent=2))
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config), "--data", options.data]
    command += ["--steps", str(options.steps), "--save-path", str(run), "--resume", "--sample-bytes", "0"]
    command += ["--device", options.device, "--seed", str(options.seed), *options.flags]
    print(f"{name}: {' '.join(command)}", file=sys.stderr)
    if code := subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode:
        sys.exit(code)
    return run


def seconds_per_step(run: Path, step_bytes: int) -> float:
    """The median of the last quarter of the lines of metrics."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["bytes_per_s"] for row in rows if row.get("bytes_per_s")]
    return step_bytes / statistics.median(speeds[-max(1, len(speeds) // 4) :])


@torch.inference_mode()
def last_quarter(model: Transformer, data: Corpus, context: int, limit: int) -> float:
    """Bits per byte of the last quarter of each `context` of the data, of at most `limit` contexts."""
    own, device = model.args.max_seq_len, model.head.weight.device
    first, total, count = context - context // 4, 0.0, 0
    n_contexts = min(limit, (len(data) - 1) // context)
    for start in (i * ((len(data) - 1) // n_contexts) for i in range(n_contexts)):
        text = torch.from_numpy(data[start : start + context + 1]).long().to(device)
        counted = own // 2 if own < context else context // 4  # bytes at the end of each sequence
        ends = range(first + counted, context + 1, counted)
        for end in ends:
            tokens = text[max(0, end - own) : end + 1]
            logits = model(tokens[:-1])[-counted:].float()
            total += F.cross_entropy(logits, tokens[-counted:], reduction="sum").item()
            count += counted
    return total / count / math.log(2)


def main() -> None:
    """Trains the three and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "long.json")
    parser.add_argument("--layers", type=int, help="blocks of each model; default: the config's")
    parser.add_argument("--data", default="stdlib", help="as for train.py")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, help="sequences of the long context in a step; default: the config's")
    parser.add_argument("--save-path", type=Path, required=True, help="folder for the three runs")
    parser.add_argument("--contexts", type=int, default=200, help="of the validation split that are measured at most")
    parser.add_argument("--device", default=parallel.pick_device(None))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=["sparse", "dense", "short"], default=["sparse", "dense", "short"])
    options, options.flags = parser.parse_known_args()  # others are train.py's
    options.save_path.mkdir(parents=True, exist_ok=True)
    shape, _ = read_config(options.config)
    source = open_bytes(resolve(options.data))
    _, val_data = split([source], shape.max_seq_len, None)
    dtype = parallel.pick_dtype(options.device)
    found: dict[str, tuple[float, float]] = {}
    for name, values in variants(options.config, options.batch_size, options.layers).items():
        if name in options.only:
            run = train(name, values, options)
            step_bytes = values["max_seq_len"] * values["train"]["batch_size"] * values["train"].get("accumulation", 1)
            model = load_model(resolve_run(run, "last"), options.device, dtype)
            bits = last_quarter(model, val_data, shape.max_seq_len, options.contexts)
            found[name] = bits, seconds_per_step(run, step_bytes)
            print(f"{name}: {bits:.4f} bits per byte, {found[name][1] * 1000:.1f} ms a step", file=sys.stderr)
    reference = "dense" if "dense" in found else next(iter(found))
    bits, seconds = found[reference]
    layers = options.layers or shape.n_layers
    print(f"\n{options.config.name}, {layers} layers, context {shape.max_seq_len}, {options.steps} steps, ", end="")
    print(f"{options.device}, {dtype}; a step of {reference}: {seconds * 1000:.1f} ms\n")
    print(f"| | bits per byte, last quarter | of {reference} | a step, of {reference}'s time |\n|---|---|---|---|")
    for name, (ours, taken) in found.items():
        print(f"| {name} | {ours:.4f} | {ours / bits:.4f} | {taken / seconds:.2f} |")


if __name__ == "__main__":
    main()
