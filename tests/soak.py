"""Kills a run of several processes again and again, at random moments, and compares what is left with one undisturbed.

    python tests/soak.py --kills 50 --seed 0 [--processes 2] [--train-flags=--fsdp]

Each kill takes a worker, after which torchrun starts the others again, or torchrun and all its workers at once, as a
machine that fails does, after which the same command is given again. Saves are frequent, so that some kills fall into
one. After each kill the last checkpoint must load, and at the end every step's loss must be the undisturbed run's.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import has_run, load_run, read_config  # noqa: E402
from model import Transformer  # noqa: E402

CONFIG = {
    **{"dim": 32, "inter_dim": 64, "moe_inter_dim": 32, "n_layers": 2, "moe_layer_freq": 2, "n_heads": 2},
    **{"n_routed_experts": 4, "n_activated_experts": 2, "score_func": "sigmoid", "kv_lora_rank": 16, "max_seq_len": 32},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_mtp_layers": 1, "original_seq_len": 32},
}


def losses(run: Path) -> dict[int, float]:
    """The training loss of every step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {m["step"]: m["train_loss"] for m in lines if "train_loss" in m}


def descendants(pid: int) -> list[int]:
    """The processes that a process has started; none if it is over."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def kill_all(agent: subprocess.Popen) -> None:
    """Kills an agent and its workers at once, as a machine that fails does."""
    for pid in [agent.pid, *descendants(agent.pid)] if agent.poll() is None else []:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    agent.wait()


class Soak:
    """A run, and what is done to it.

    Args:
        folder: Where to work.
        processes: How many workers.
        steps: Length of the run.
        train_flags: Further flags of train.py.
        seed: Of the moments and targets.
    """

    def __init__(self, folder: Path, processes: int, steps: int, train_flags: list[str], seed: int):
        self.folder, self.processes, self.random = folder, processes, random.Random(seed)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "data.txt").write_bytes(" ".join(f"{i} is {i * i % 97}, so" for i in range(3000)).encode())
        self.flags = ["--config", folder / "config.json", "--data", folder / "data.txt", "--steps", steps]
        self.flags += ["--batch-size", 4, "--log-interval", 1, "--save-interval", 3, "--sample-bytes", 0]
        self.flags += ["--eval-interval", 20, "--dtype", "fp32", "--device", "cpu", "--resume", *train_flags]

    def start(self, run: Path, processes: int) -> subprocess.Popen:
        """Starts or goes on with a run under torchrun."""
        return self.launch(run, f"{run.name}.log", ["--standalone", "--nproc-per-node", processes])

    def launch(
        self, run: Path, log: str, agent_flags: list[object], prefix: list[str] | None = None, **environment: str
    ) -> subprocess.Popen:
        """Starts an agent, whose words go into a file of the folder."""
        command = [*(prefix or []), sys.executable, "-m", "torch.distributed.run", *agent_flags, "--max-restarts", 100]
        command += [ROOT / "train.py", *self.flags, "--save-path", run]
        with open(self.folder / log, "ab") as file:
            return subprocess.Popen(
                [str(part) for part in command],
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

    def kill(self, agent: subprocess.Popen) -> str:
        """Kills a worker or everything; says which."""
        workers = descendants(agent.pid)
        if self.random.random() < 0.6 and workers:
            os.kill(self.random.choice(workers), signal.SIGKILL)
            return "a worker"
        kill_all(agent)
        return "all"

    def check(self, run: Path) -> int:
        """Loads the last checkpoint; returns its step."""
        if not has_run(run):
            return 0
        model = Transformer(read_config(self.folder / "config.json")[0])
        read, state = load_run(run, model)
        for name, p in model.named_parameters():
            read(name, p)
        return state["step"]

    def disturb(self, run: Path, kills: int, longest: float = 12.0) -> int:
        """Kills the run up to `kills` times, then lets it end; returns how often it was killed."""
        agent, done = self.start(run, self.processes), 0
        while done < kills:
            until = time.monotonic() + self.random.uniform(1, longest)
            while time.monotonic() < until and agent.poll() is None:
                time.sleep(0.02)
            if agent.poll() is not None:
                break
            target = self.kill(agent)
            done += 1
            print(f"kill {done}: {target}; the last checkpoint is of step {self.check(run)}", flush=True)
            if agent.poll() is not None:
                agent = self.start(run, self.processes)
        if agent.wait(timeout=600) != 0:
            sys.exit((self.folder / f"{run.name}.log").read_text()[-4000:])
        return done


def main(argv: list[str] | None = None) -> None:
    """Kills, compares, and says what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400, help="length of a run; a new one begins when it is over")
    parser.add_argument("--train-flags", default="", help="further flags of train.py, in one string")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        soak = Soak(Path(name), args.processes, args.steps, args.train_flags.split(), args.seed)
        assert soak.start(Path(name) / "whole", args.processes).wait() == 0
        whole, done, n_runs = losses(Path(name) / "whole"), 0, 0
        while done < args.kills:
            run, n_runs = Path(name) / f"killed-{n_runs}", n_runs + 1
            done += soak.disturb(run, args.kills - done)
            killed = losses(run)
            assert killed.keys() == whole.keys(), f"steps are missing: {sorted(whole.keys() - killed.keys())}"
            worst = max(abs(killed[step] - whole[step]) / whole[step] for step in whole)
            assert worst < 1e-4, f"{run.name}: a loss differs by {worst:.1e}"
            print(
                f"{run.name}: {len(killed)} steps, every loss within {worst:.1e} of the undisturbed run's", flush=True
            )
    print(f"{done} kills in {n_runs} runs: nothing was lost")


if __name__ == "__main__":
    main()
