"""What a second process brings: training speed, memory and waiting of one process and two, each on one thread.

    python tests/bench/bench_scaling.py [--config configs/shakespeare.json] [--steps 10] [--repeat 3]

The batch is the same in each ctx, so two processes have half of it each, or half of the model. Layouts take turns,
in processes of their own, and each number is the median of their runs; the first steps do not count.

"Waits" is the share of the steps' time in which the thread that computes is not on a core: its wall-clock time less its
CPU time, in the process where that is more. Gloo sends and receives in threads of its own while the computing thread
sleeps until they are done, so this is the time lost to the other process, to the transfer, and to other threads that
want the core; what one process shows is the noise. Memory is the peak of the larger process, and what of it came after
Python and its imports.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from parallel import ParallelContext, destroy, keep_freed_memory  # noqa: E402

WARM_UP = 3  # steps
LAYOUTS = {
    "one process": (1, []),
    "two, data-parallel": (2, []),
    "two, `--fsdp`": (2, ["--fsdp"]),
    "two, `--model-parallel 2`": (2, ["--model-parallel", "2"]),
}


def memory(key: str) -> float:
    """A figure of /proc/self/status, in MB."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def work(flags: list[str], steps: int) -> None:
    """One of the processes: trains, and the first prints bytes/s, share of waiting, peak memory, and of it our own."""
    imported = memory("VmRSS")
    args, shape = train.parse_args(flags)
    keep_freed_memory()
    ctx = ParallelContext.join("cpu", args.model_parallel, args.fsdp)
    trainer = train.build_trainer(args, shape, ctx)
    for _ in range(WARM_UP):
        trainer.train_step(0.5)
    ctx.raise_if_any_failed()
    began, busy = time.perf_counter(), time.thread_time()
    for _ in range(steps):
        trainer.train_step(0.5)
    seconds, busy = time.perf_counter() - began, time.thread_time() - busy
    peak = memory("VmHWM")
    waits, peak, own = ctx.all_reduce_max(1 - busy / seconds, peak, peak - imported)
    if ctx.rank == 0:
        print(json.dumps([steps * trainer.step_bytes / seconds, waits, peak, own]))
    destroy()


def run(processes: int, flags: list[str], steps: int) -> list[float]:
    """What `work` prints in so many processes."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), __file__]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--work", json.dumps(flags), "--steps", str(steps)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "shakespeare.json")
    parser.add_argument("--data", default="stdlib", help="what train.py --data takes (default: stdlib)")
    parser.add_argument("--steps", type=int, default=10, help="that are timed, in each run (default: 10)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each, of which the median counts (default: 3)")
    parser.add_argument("--train-flags", default="", help="further flags of train.py, in one string")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        return work(args.work, args.steps)
    flags = ["--config", str(args.config), "--data", args.data, "--device", "cpu", "--steps", str(args.steps)]
    flags += args.train_flags.split()
    results: dict[str, list[list[float]]] = {name: [] for name in LAYOUTS}
    for _ in range(args.repeat):
        for name, (processes, extra) in LAYOUTS.items():
            results[name].append(run(processes, flags + extra, args.steps))
    print("| | bytes/s | of one process's | waits | peak memory | of it after imports |\n" + "| --- " * 6 + "|")
    alone = statistics.median(speed for speed, *_ in results["one process"])
    for name, runs in results.items():
        speed, waits, peak, own = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"| {name} | {speed:,.0f} | {speed / alone:.2f} | {waits:.0%} | {peak:,.0f} MB | {own:,.0f} MB |")
    return None


if __name__ == "__main__":
    main()
