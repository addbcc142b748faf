"""Disturbs a run of several processes again and again, at random moments, and compares it with one undisturbed.

    python tests/bench/soak.py --kills 50 --seed 0 [--processes 2] [--train-flags=--fsdp]

Killed are a worker, after which torchrun starts the others again; torchrun, whose workers must not go on without it;
or all at once, as on a machine that fails; at any moment, in a save or in an evaluation. Where torchrun was killed the
same command is given again. Or the disk is full for some time, if this is run by root, who can mount a small one. After
each of these every checkpoint must load, and at the end every step's loss must be the undisturbed run's.
"""

import argparse
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from checkpoint import has_run, load_run, read_config  # noqa: E402
from convert import load_model  # noqa: E402
from metrics import METRICS_FILE  # noqa: E402
from model import Transformer  # noqa: E402
from optim import STATE_KEYS, is_hidden_matrix  # noqa: E402

FULL = os.strerror(errno.ENOSPC)

CONFIG = {
    **{"dim": 32, "inter_dim": 64, "moe_inter_dim": 32, "n_layers": 2, "moe_layer_freq": 2, "n_heads": 2},
    **{"n_routed_experts": 4, "n_activated_experts": 2, "score_func": "sigmoid", "kv_lora_rank": 16, "max_seq_len": 32},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_mtp_layers": 1, "original_seq_len": 32},
}


def losses(run: Path) -> dict[int, float]:
    """The training loss of every step."""
    lines = map(json.loads, (run / METRICS_FILE).read_text().splitlines())
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
        self.folder, self.processes, self.steps, self.random = folder, processes, steps, random.Random(seed)
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

    def disturb(self, run: Path, kills: int, longest: float = 12.0) -> int:
        """Does up to `kills` things to a run at random moments, then lets it end; returns how many there were."""
        agent, done = self.start(run, self.processes), 0
        while done < kills:
            kind, delay = self.random.choice(KINDS), self.random.uniform(1, longest)
            until = time.monotonic() + delay
            if not self.wait(agent, lambda until=until: time.monotonic() > until):
                break
            done += kind(self, agent, run)
            print(f"{done}: {kind.__doc__} The last checkpoint is of step {self.check(run)}.", flush=True)
            self.release(run)
            if agent.poll() is not None and not self.is_over(run):
                agent = self.start(run, self.processes)
        if agent.wait(timeout=600) != 0 and not self.is_over(run):  # it may be killed as it ends
            sys.exit(self.log(run)[-4000:])
        return done

    def wait(self, agent: subprocess.Popen, is_now: Callable[[], bool]) -> bool:
        """Waits for a moment; returns whether it has come before the run was over."""
        while agent.poll() is None:
            if is_now():
                return True
            time.sleep(0.002)
        return False

    def kill_a_worker(self, agent: subprocess.Popen, run: Path) -> bool:
        """A worker was killed."""
        workers = descendants(agent.pid)
        if workers:
            os.kill(self.random.choice(workers), signal.SIGKILL)
        return bool(workers)

    def kill_the_agent(self, agent: subprocess.Popen, run: Path) -> bool:
        """Torchrun was killed."""
        workers = descendants(agent.pid)
        agent.kill()
        agent.wait()
        time.sleep(1)
        metrics = run / METRICS_FILE
        size = metrics.stat().st_size if metrics.exists() else 0
        time.sleep(0.5)
        assert not size or metrics.stat().st_size == size, "workers go on without torchrun"
        for pid in workers:  # that had not joined yet, and wait for a torchrun that is no more
            with suppress(OSError):
                if str(run).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        return True

    def kill_the_machine(self, agent: subprocess.Popen, run: Path) -> bool:
        """All were killed."""
        kill_all(agent)
        return True

    def kill_in_a_save(self, agent: subprocess.Popen, run: Path) -> bool:
        """Some or all were killed in a save."""
        if not self.wait(agent, lambda: any(run.glob(".step-*.tmp"))):
            return False
        time.sleep(self.random.uniform(0, 0.03))
        return self.random.choice([Soak.kill_a_worker, Soak.kill_the_agent, Soak.kill_the_machine])(self, agent, run)

    def kill_in_an_evaluation(self, agent: subprocess.Popen, run: Path) -> bool:
        """Some or all were killed in an evaluation."""

        def evaluates() -> bool:
            lines = (run / METRICS_FILE).read_text().splitlines() if (run / METRICS_FILE).exists() else []
            return bool(lines) and re.search(r'"step": \d*[02468]0, .*"train_loss".*}$', lines[-1]) is not None

        if not self.wait(agent, evaluates):
            return False
        time.sleep(self.random.uniform(0, 0.03))
        return self.random.choice([Soak.kill_a_worker, Soak.kill_the_agent, Soak.kill_the_machine])(self, agent, run)

    def fill_the_disk(self, agent: subprocess.Popen, run: Path) -> bool:
        """The disk was full."""
        told = self.log(run).count(FULL)
        with open(run / "filler", "wb", buffering=0) as file, suppress(OSError):
            for size in (1 << 16, 1):
                with suppress(OSError):
                    while file.write(bytes(size)):
                        pass
        came = self.wait(agent, lambda: self.log(run).count(FULL) > told)
        time.sleep(self.random.uniform(0, 3))  # torchrun tries again and again
        return came

    def release(self, run: Path) -> None:
        """Makes room again."""
        (run / "filler").unlink(missing_ok=True)

    def is_over(self, run: Path) -> bool:
        """Whether the run has done all its steps."""
        return f"step {self.steps}, " in self.log(run)

    def log(self, run: Path) -> str:
        """What the processes have said."""
        return (self.folder / f"{run.name}.log").read_text(errors="replace")

    def check(self, run: Path) -> int:
        """Loads every checkpoint that there is; returns the last one's step."""
        for folder in run.glob("step-*"):
            load_model(folder)
        if not has_run(run):
            return 0
        model = Transformer(read_config(self.folder / "config.json")[0])
        read, state = load_run(run, model)
        for name, p in model.named_parameters():
            read(name, p, STATE_KEYS["Muon" if is_hidden_matrix(name, p) else "AdamW"])
        return state["step"]


KINDS = [Soak.kill_a_worker, Soak.kill_the_agent, Soak.kill_the_machine, Soak.kill_in_a_save]
KINDS += [Soak.kill_in_an_evaluation, Soak.fill_the_disk]


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of its own for a run, that can be filled; root alone may mount one."""
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], stderr=subprocess.DEVNULL
        ).returncode
        == 0
    )
    if not mounted and Soak.fill_the_disk in KINDS:
        print("no disk is filled, as none can be mounted: that takes root", flush=True)
        KINDS.remove(Soak.fill_the_disk)
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


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
            with small_disk(run):
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
