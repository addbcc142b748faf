"""Draws the loss curves of runs, from their metrics.jsonl, as the README shows them.

python tests/bench/plot_loss.py --out .github/loss.svg out/nano out/gpt
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "bytegpt"  # the same curves give the same file
from matplotlib import pyplot as plt  # noqa: E402


def curve(run: Path, value: str) -> tuple[list[float], list[float]]:
    """Returns minutes of training and `value` from each line of a run's metrics that has it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    points = [(line["elapsed_s"] / 60, line[value]) for line in lines if value in line]
    return [x for x, _ in points], [y for _, y in points]


def main() -> None:
    """Reads the runs named on the command line and writes one figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders that train.py wrote with --save-path")
    parser.add_argument("--out", type=Path, required=True, help="the figure, an .svg file")
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for color, run in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], args.runs, strict=False):
        axes.plot(*curve(run, "train_loss"), color=color, alpha=0.35, linewidth=0.8)
        axes.plot(*curve(run, "val_loss"), "o-", color=color, markersize=3, label=f"{run.name}, validation")
    axes.set(xlabel="minutes", ylabel="nats per byte", ylim=(None, 3.5))
    axes.grid(alpha=0.3)
    axes.legend()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
