"""What a second process or GPU brings: train.py alone, then as two processes in each layout, on the same batches.

    python tests/bench/bench_scaling.py [--config FILE] [--data FILE] [--steps 25] [--only one ddp]

Each row is a run of train.py with default flags, in processes of its own, and of its own figures: bytes/s are the
median of the lines of metrics after the first, in which kernels are compiled and the step is recorded; peak memory is
the first process's, beside what --plan says; the loss is that of the last step, which all layouts should share but for
rounding. "Waits" is the share of the time in which the first process's thread is not on a core: on a GPU, where it
should be most of it, it waits for kernels; on a CPU, for the other process. There, each process has one thread.

A run that fails or takes longer than --timeout has a row that says so, and the others go on.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

LAYOUTS = {
    "one": ("one process", 1, []),
    "ddp": ("two, DDP", 2, []),
    "fsdp": ("two, `--fsdp`", 2, ["--fsdp"]),
    "mp2": ("two, `--model-parallel 2`", 2, ["--model-parallel", "2"]),
}


def work(out: Path, flags: list[str]) -> None:
    """One of the processes: runs train.py, and the first writes its lines of metrics to a file, as JSON."""
    lines: list[dict[str, Any]] = []

    def note(trainer: train.Trainer, figures: dict[str, Any]) -> None:
        lines.append(figures | {"wall_s": time.perf_counter(), "busy_s": time.thread_time()})

    train.Trainer.write = note  # type: ignore[method-assign, assignment]
    code = train.main(flags)
    if code == 0 and os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps([line for line in lines if "train_loss" in line]))
    sys.exit(code)


def run(processes: int, flags: list[str], timeout: float) -> list[dict[str, Any]] | str:
    """Trains in so many processes; returns the lines of metrics, or why there are none."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | ({} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"})
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lines.json"
        script = [*(launcher if processes > 1 else []), __file__, "--work", str(out), "--", *flags]
        try:
            done = subprocess.run(
                [sys.executable, *script], env=environment, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired as late:
            print((late.stderr or b"").decode(errors="replace")[-3000:], file=sys.stderr)
            return f"took more than {timeout:g} s"
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
            return f"ended with {done.returncode}"
        print(*re.findall(r"(?m)^train.py: warning.*", done.stderr), sep="\n", end="", file=sys.stderr)
        return json.loads(out.read_text())


def start_plan(processes: int, flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--plan", "--world-size", str(processes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def planned(process: subprocess.Popen) -> float:
    """GB that a plan's process prints."""
    found = re.search(r"(?m)^  at most at a time +([\d.]+) ([GM])B$", process.communicate()[0])
    return float(found[1]) / (1 if found[2] == "G" else 1000) if found else float("nan")


def row(name: str, lines: Any, plan: float, alone: Any) -> str:
    """A line of the table; `alone` are the lines of one process."""
    if isinstance(lines, str) or len(lines) < 3:
        return f"| {name} | {lines if isinstance(lines, str) else 'too few steps'} | | | | | |"
    speed = statistics.median(line["bytes_per_s"] for line in lines[1:])
    waits = 1 - (lines[-1]["busy_s"] - lines[0]["busy_s"]) / (lines[-1]["wall_s"] - lines[0]["wall_s"])
    peak, loss, ratio, apart = lines[-1]["peak_memory_bytes"] / 1e9, lines[-1]["train_loss"], "", ""
    if not isinstance(alone, str) and alone:
        ratio = f"{speed / statistics.median(line['bytes_per_s'] for line in alone[1:]):.2f}"
        apart = f" ({loss - alone[-1]['train_loss']:+.4f})"
    return f"| {name} | {speed:,.0f} | {ratio} | {peak:.2f} GB | {plan:.2f} GB | {loss:.4f}{apart} | {waits:.0%} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="default: base.json on a GPU, shakespeare.json elsewhere")
    parser.add_argument("--data", default="stdlib", help="what train.py --data takes (default: stdlib)")
    parser.add_argument("--steps", type=int, default=25, help="of each run (default: 25)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds of each run, at most (default: 60)")
    parser.add_argument("--only", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--train-flags", default="", help="further flags of train.py, in one string")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        return work(args.work, args.flags)
    is_gpu = torch.cuda.is_available()
    config = args.config or ROOT / "configs" / ("base.json" if is_gpu else "shakespeare.json")
    common = ["--config", str(config), "--data", args.data, "--steps", str(args.steps), *args.train_flags.split()]
    common += ["--log-interval", str(max(1, args.steps // 5)), "--eval-interval", "1000000", "--sample-bytes", "0"]
    layouts = {key: LAYOUTS[key] for key in args.only}
    early = {}
    if is_gpu:  # whose machine has other cores for them
        early = {key: start_plan(n, [*common, *flags]) for key, (_, n, flags) in layouts.items()}
    print("| | bytes/s | of one | peak memory | by `--plan` | loss (and one's) | waits |\n" + "| --- " * 7 + "|")
    alone: Any = "not run"
    for key, (name, n, flags) in layouts.items():
        lines = run(n, [*common, *flags], args.timeout)
        alone = lines if key == "one" else alone
        plan = planned(early.get(key) or start_plan(n, [*common, *flags]))
        print(row(name, lines, plan, alone), flush=True)
    return None


if __name__ == "__main__":
    main()
