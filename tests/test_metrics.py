"""What a run reports and by which clock, against files that others have planted and figures worked out by hand."""

import errno
import gzip
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import DeviceType

import command
import metrics
import optim
import train
from checkpoint import Run
from metrics import METRICS_FILE, Clock, Due, Meter, Metrics, ProgressBar, measure_peak
from safetensors_io import CheckpointError

draws = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_the_file_appears_with_its_first_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    report = Metrics(Run(run), 0)
    assert not run.exists()
    report.write(step=1, x=0.123456789, load=[[1.23456789, 2]])
    report.write(step=2)
    assert rows(run) == [{"step": 1, "x": 0.123457, "load": [[1.23457, 2]]}, {"step": 2}]
    Metrics(None, 0).write(step=1)


@pytest.mark.parametrize("end", [b"", b"\n", b'\n{"step": 3, "tra', b'\n\xff\xfe\n[[[[\n{"step": "x"}\n{"step": 9}'])
@pytest.mark.parametrize(("step", "evaluated", "kept"), [(0, True, 0), (1, True, 1), (2, True, 3), (2, False, 2)])
def test_lines_of_later_steps_are_dropped(tmp_path: Path, end: bytes, step: int, evaluated: bool, kept: int) -> None:
    lines = [{"step": 1, "train_loss": 2.0}, {"step": 2, "train_loss": 1.0}, {"step": 2, "val_loss": 1.5}]
    (tmp_path / METRICS_FILE).write_bytes("\n".join(map(json.dumps, lines)).encode() + end)
    Metrics(Run(tmp_path), step, evaluated).write(step=step + 1)
    assert rows(tmp_path) == [*lines[:kept], {"step": step + 1}]


def test_a_crash_before_lines_are_dropped_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What earlier processes wrote is not in any checkpoint: it cannot be computed again."""
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n{"step": 2}\n')
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "open_append", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Metrics(Run(tmp_path), 1)
    assert len(rows(tmp_path)) == 2


@pytest.mark.parametrize("kind", ["pipe", "device", "link", "folder", "huge"])
def test_only_a_regular_metrics_file_is_accepted(tmp_path: Path, kind: str) -> None:
    """Without waiting for a pipe, following a link, or reading a file without an end."""
    run, outside = tmp_path / "run", tmp_path / "mine.txt"
    run.mkdir()
    outside.write_text("mine")
    path = run / METRICS_FILE
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link":
        path.symlink_to(outside)
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(1 << 36)
    with pytest.raises(CheckpointError, match=METRICS_FILE):
        Metrics(Run(run), 1)
    assert outside.read_text() == "mine"


def test_planted_links_are_not_followed(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    report = Metrics(Run(run), 0)
    for name in (METRICS_FILE, f".{METRICS_FILE}.tmp"):
        (run / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=METRICS_FILE):
        report.write(step=1)
    (run / METRICS_FILE).unlink()
    report.write(step=1)
    assert rows(run) == [{"step": 1}] and not outside.exists()


def test_a_folder_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    report = Metrics(Run(run), 0)
    report.write(step=1)
    run.rename(moved)
    with pytest.raises(CheckpointError, match="run"):
        report.write(step=2)
    assert not run.exists() and rows(moved) == [{"step": 1}]


# --- Figures ---------------------------------------------------------------------------------------------------------


def test_meter_means_over_all_steps_since_the_last_line() -> None:
    times = iter([10.0, 10.5, 20.0, 20.25, 30.0, 30.5])
    meter, load = Meter(1000.0, now=lambda: next(times)), torch.tensor([[1.0, 3.0]])
    for _ in range(2):
        with meter.waiting():
            pass
    for seconds, factor in ((1.0, 1), (3.0, 2)):
        meter.add(seconds, 100, 600.0)
        meter.add_load(factor * load)
    figures = meter.pop()
    assert figures["bytes_per_s"] == pytest.approx(50) and figures["mfu"] == pytest.approx(0.3)
    assert figures["expert_load"] == [[0.5, 1.5]] and figures["max_load"] == 1.5
    assert figures["data_wait"] == pytest.approx(0.75 / 4)
    with meter.waiting():
        pass
    meter.add(2.0, 100, 500.0)
    meter.add_load(load)
    figures = meter.pop()
    assert figures["bytes_per_s"] == pytest.approx(50) and figures["data_wait"] == pytest.approx(0.25)


def test_an_impossible_mfu_is_none() -> None:
    """Then the peak was measured on a busy machine, or in a dtype that is emulated."""
    meter = Meter(100.0)
    meter.add(1.0, 1, 109.0)
    meter.add_load(torch.zeros(0, 4))
    figures = meter.pop()
    assert figures["mfu"] is None
    assert not figures.keys() & {"expert_load", "max_load"}  # where there are no experts


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="another system")
def test_peak_memory_is_that_of_the_process() -> None:
    (line,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert metrics.peak_memory("cpu") == pytest.approx(1024 * int(line), rel=0.02)


def test_the_peak_is_that_of_the_faster_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bfloat16 is emulated, products of training that are in float32 are faster; and large ones take too long."""
    asked: list[tuple[torch.dtype, int]] = []

    def seconds(device: str, dtype: torch.dtype, size: int) -> float:
        asked.append((dtype, size))
        return 2 * size**3 / (4e8 if dtype == torch.bfloat16 else 1e11 * size)

    monkeypatch.setattr(metrics, "_product_seconds", seconds)
    assert measure_peak("cpu", torch.bfloat16) == pytest.approx(1024e11)
    assert sum(seconds("cpu", *one) for one in list(asked)) < 1.0
    monkeypatch.undo()
    assert measure_peak("cpu", torch.float32) > 1e8


# --- Time ------------------------------------------------------------------------------------------------------------


class Time:
    """A clock that the test turns."""

    def __init__(self, minutes: float):
        self.now = 0.0
        self.clock = Clock(None, minutes, now=lambda: self.now, started=0.0)

    def step(self, seconds: float) -> None:
        self.now += seconds
        self.clock.add_step(seconds)


@pytest.mark.parametrize("slow", [[0], [0, 1], [0, 7, 30]])
def test_slow_steps_are_no_measure(slow: list[int]) -> None:
    """Steps that compile take a hundred times as long, at the beginning or when the sequences become longer."""
    time_ = Time(5)
    time_.clock.eval_s, n_steps = 4.0, 0
    while time_.clock.progress(n_steps) < 1:
        time_.step(40.0 if n_steps in slow else 0.4)
        n_steps += 1
    assert n_steps > (300 - 40 * len(slow) - 10) / 0.4
    assert 0.97 * 300 <= time_.now + 4.0 <= 300


@draws
@given(st.floats(0.5, 60), st.floats(0, 5), st.floats(0.01, 1), st.floats(0, 3))
def test_time_is_used_and_kept(minutes: float, start_s: float, step_s: float, end_s: float) -> None:
    """However long steps and the end take, if a step is short against the whole: no second above, 3% below."""
    seconds = 60 * minutes
    step_s, end_s = step_s * 0.008 * seconds, end_s * 0.05 * seconds / 3
    time_ = Time(minutes)
    time_.now, time_.clock.eval_s, n_steps = start_s, end_s, 0
    values = []
    while (progress := time_.clock.progress(n_steps)) < 1:
        values.append(progress)
        time_.step(step_s)
        n_steps += 1
    assert 0.97 * seconds <= time_.now + end_s <= seconds
    assert values == sorted(values) and values[0] == 0 and values[-1] > 0.95


def test_a_resumed_run_has_the_time_that_was_left() -> None:
    first, second = Time(2), Time(2)
    for time_ in (first, second):
        time_.now = 5.0
        time_.step(10.0)
    second.clock.earlier_s, second.clock.startup_s = 60.0, 15.0 + second.clock.startup_s
    assert second.clock.elapsed_s() == first.clock.elapsed_s() + 60
    assert first.clock.progress(1) == 0 and 0.4 < second.clock.progress(1) < 0.6


def actions(
    n_steps: int, first: int = 0, step_bytes: int = 1000, val_bytes: int = 9000
) -> list[tuple[int, bool, bool]]:
    due = Due(Clock(n_steps, None), first, step_bytes, val_bytes)
    return [(step, *due.after(step, 0, 0)) for step in range(first + 1, n_steps + 1)]


def test_evaluations_of_a_short_run_are_left_out() -> None:
    """Each costs as much as 3 steps: a run of 57 has one twentieth to spare for none, one of 600 for all ten."""
    assert not [step for step, evaluates, _ in actions(57) if evaluates]
    assert len([step for step, _, saves in actions(57) if saves]) == 9
    assert len([step for step, evaluates, _ in actions(600) if evaluates]) == 9
    assert 2 <= len([step for step, evaluates, _ in actions(240) if evaluates]) <= 4


@pytest.mark.parametrize(("save_s", "n_saves"), [(0.01, 9), (2.5, 5), (9.0, 2)])
def test_saves_of_a_run_by_the_clock_take_a_small_share(save_s: float, n_saves: int) -> None:
    """Of 10 minutes: after each tenth, but for those that come before 3% of the time since the last is as long."""
    time_, saved = Time(10), list[float]()
    time_.clock.eval_s = 0.05 * 600  # too long for evaluations in between
    time_.clock.save_s = 50.0  # a wrong estimate
    due, step = Due(time_.clock, 0, 1000, 9000), 0
    while time_.clock.progress(step) < 1:
        time_.step(0.5)
        step += 1
        evaluates, saves = due.after(step, 0, 0)
        assert not evaluates or step > 500
        if saves or evaluates:
            time_.now, time_.clock.save_s = time_.now + save_s, save_s
            saved.append(time_.now)
    assert len(saved) == n_saves and saved[0] < 0.15 * 600
    assert all(b - a > save_s / 0.03 for a, b in zip(saved, saved[1:], strict=False))


@draws
@given(st.integers(1, 400), st.integers(100, 100_000), st.data())
def test_a_resumed_run_evaluates_where_it_would_have(n_steps: int, val_bytes: int, data: st.DataObject) -> None:
    whole = actions(n_steps, val_bytes=val_bytes)
    first = data.draw(st.integers(0, n_steps - 1))
    assert actions(n_steps, first, val_bytes=val_bytes) == whole[first:]
    n_evaluations = 0
    for step, evaluates, _ in whole:
        n_evaluations += evaluates
        assert n_evaluations * val_bytes / 3 <= 0.05 * step * 1000


# --- Progress --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


FIGURES = {"train_loss": 1.234, "bytes_per_s": 5678.0, "mfu": 0.12, "peak_memory_bytes": 2.5e9, "data_wait": 0.034}
SHOWN = "loss 1.234, 5,678 bytes/s, MFU 12%, 2.5 GB, data wait 3%"


def test_the_bar_moves_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows the step, and is drawn again while a step is under way."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    clock = Clock(100, None)
    with ProgressBar(True, clock, 0.0) as bar:
        bar.show(12, 0.345)
        bar.show_figures(FIGURES)
        deadline = time.monotonic() + 60
        while terminal.getvalue().count("step 12") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert terminal.getvalue().count("step 12") >= 2
        assert "34%" in terminal.getvalue() and SHOWN in terminal.getvalue()
        bar.show_figures(FIGURES | {"mfu": None})
        bar.__exit__()
        assert SHOWN.replace("MFU 12%, ", "") in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", silent := Terminal())
    with ProgressBar(False, clock, 0.0) as bar:
        bar.show(1, 0.5)
    assert silent.getvalue() == ""


@pytest.mark.parametrize("minutes", [None, 60])
def test_a_log_without_a_terminal(monkeypatch: pytest.MonkeyPatch, minutes: float | None) -> None:
    """A line after 10 s, then twice as long each time, up to 5 minutes; steps of 2 s, a start of 4 s."""
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    now, n_steps = 4.0, 1800
    clock = Clock(n_steps if minutes is None else None, minutes, now=lambda: now, started=0.0)
    seen: list[tuple[float, str]] = []
    with ProgressBar(True, clock, clock.progress(0)) as bar:
        for step in range(n_steps):
            bar.show(step, clock.progress(step))
            if log.getvalue():
                seen.append((now, log.getvalue()))
                log.seek(0)
                log.truncate()
            if step == 4:
                bar.show_figures(FIGURES)
            now += 2.0
            clock.add_step(2.0)
    assert [when for when, _ in seen[:8]] == [14, 34, 74, 154, 314, 614, 914, 1214]  # 10, 20, 40, ..., 300, 300
    assert [line.count("\n") for _, line in seen] == [1] * len(seen) and seen[-1][0] > 3600 - 300
    for when, line in seen[1:]:  # the first comes before any figures
        step, percent, left = re.fullmatch(rf"step (\d+) \((.*)%\): {SHOWN}; ([\d:]+) left\n", line).groups()
        assert float(percent) == pytest.approx(100 * int(step) / n_steps, abs=0.1 if minutes is None else 6)
        minutes_left, seconds_left = left.split(":")
        expected = 3600 + 4 - when if minutes is None else 3600 - 2 - when  # 2 s to leave
        assert 60 * int(minutes_left) + int(seconds_left) == pytest.approx(expected, abs=2)


def test_nothing_is_logged_by_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    now = 0.0
    with ProgressBar(False, Clock(10, None, now=lambda: now), 0.0) as bar:
        now = 100.0
        bar.show(1, 0.1)
    assert log.getvalue() == ""


# --- Files of a run --------------------------------------------------------------------------------------------------


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of a tiny run into tmp_path/run, without its length."""
    monkeypatch.setattr(metrics, "MEASURING_S", 0.0)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "data.txt").write_bytes(b"the quick brown fox jumps over a lazy dog. " * 60)
    flags = ["--config", tmp_path / "config.json", "--data", tmp_path / "data.txt", "--save-path", tmp_path / "run"]
    flags += ["--batch-size", 4, "--log-interval", 1, "--sample-bytes", 0, "--dtype", "fp32", "--device", "cpu"]
    return list(map(str, flags))


def test_every_field_is_documented(flags: list[str], tmp_path: Path) -> None:
    """All that a run of every kind writes, and nothing else."""
    indexed = {"q_lora_rank": 4, "index_n_heads": 2, "index_head_dim": 4, "index_topk": 4}
    (tmp_path / "config.json").write_text(json.dumps(TINY | indexed))
    assert train.main([*flags, "--steps", "4", "--short-seq-len", "8", "--eval-interval", "1"]) == 0
    written = set().union(*rows(tmp_path / "run"))
    args, shape = train.parse_args([*flags, "--steps", "4"])
    trainer = train.build_trainer(args, shape, train.ParallelContext("cpu"))
    trainer.metrics, trainer.eval_sequences = Metrics(Run(tmp_path / "limited"), 0), 2
    trainer.evaluate_and_save()
    written |= set().union(*rows(tmp_path / "limited"))
    documented = re.findall(r"^    ([a-z]\w*)  ", metrics.__doc__, re.MULTILINE)
    assert len(documented) == len(set(documented)) and set(documented) == written


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_rate_is_logged(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    monkeypatch.setattr(optim, "ROUTER_LR_DIM", 4)  # of 16: a quarter of the rate
    rates = ["--lr", "0.02", "--matrix-lr", "0.03", "--schedule", "cosine"]
    assert train.main([*flags, "--steps", "5", "--optimizer", optimizer, *rates]) == 0
    lines = [row for row in rows(tmp_path / "run") if "train_loss" in row]
    for i, row in enumerate(lines):
        factor = train.schedule((i + 0.5) / 5, "cosine", 0.02, 0.5)
        expected = {"lr": 0.02 * factor, "router_lr": 0.005 * factor, "matrix_lr": 0.03 * factor}
        assert {name: row[name] for name in row if "lr" in name} == pytest.approx(expected, rel=1e-5)
    assert len(lines) == 5


def test_settings_of_a_run_are_kept(flags: list[str], tmp_path: Path) -> None:
    """As they are after the config's defaults; a resumed run has those of its last process."""
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"train": {"lr": 0.004, "beta1": 0.8}}))
    assert train.main([*flags, "--steps", "1", "--beta1", "0.7"]) == 0
    assert train.main([*flags, "--steps", "2", "--beta1", "0.7", "--resume", "--override", "steps,beta1"]) == 0
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings.pop("model") == json.loads((tmp_path / "run" / "step-00000002" / "config.json").read_text())
    assert settings.keys() == {flag.name for flag in train.fields(train.TrainFlags)}
    assert [settings[name] for name in ("lr", "beta1", "steps", "seed")] == [0.004, 0.7, 2, 0]


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars in a run's event files, as TensorBoard's own reader has them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def assert_same_events(run: Path) -> None:
    """The event files have the numbers of metrics.jsonl, each step once."""
    expected: dict[str, list[tuple[int, Any]]] = {}
    for row in rows(run):
        for name, value in row.items():
            if isinstance(value, (int, float)):
                expected.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-5)))
    assert events(run) == expected


def test_tensorboard_has_the_figures_of_the_file(flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train.main([*flags, "--steps", "4", "--eval-interval", "2", "--tensorboard"]) == 0
    assert_same_events(run)
    assert (
        train.main([*flags, "--steps", "6", "--eval-interval", "2", "--tensorboard", "--resume", "--override", "steps"])
        == 0
    )
    assert_same_events(run)
    assert len(events(run)["train_loss"]) == 6 and len(events(run)["val_loss"]) == 3


def test_tensorboard_hides_repeated_steps(tmp_path: Path) -> None:
    """After a kill, the steps since the last checkpoint are taken again."""
    run = Run(tmp_path)
    for first, last, offset in ((0, 9, 0.0), (4, 7, 100.0), (6, 8, 200.0)):
        report = Metrics(run, first, tensorboard=True)
        for step in range(first + 1, last + 1):
            report.write(step=step, train_loss=step + offset, expert_load=[[0.5, 1.5]], mfu=None)
    assert_same_events(tmp_path)
    assert [value for _, value in events(tmp_path)["train_loss"]] == [1, 2, 3, 4, 105, 106, 207, 208]


def test_tensorboard_stays_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="tensorboard"):
        Metrics(Run(tmp_path / "run"), 0, tensorboard=True).write(step=1)
    assert not os.listdir(tmp_path / "outside")


def test_reports_that_cannot_be(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for more, part in ((["--tensorboard"], "pip install tensorboard"), (["--profile", "-1"], "--profile")):
        with pytest.raises(SystemExit, match="2"):
            train.main([*flags, "--steps", "2", *more])
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1
    i = flags.index("--save-path")
    for flag in (["--tensorboard"], ["--profile", "1"]):
        with pytest.raises(SystemExit, match="2"):
            train.main([*flags[:i], *flags[i + 2 :], "--steps", "2", *flag])
        assert "--save-path" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- Profile ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_flags(flags: list[str], tmp_path: Path) -> list[str]:
    """Of a model with few operations, as torch takes some time to read its own traces."""
    small = TINY | {"n_layers": 1, "n_mtp_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(small))
    return flags


def trace(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """The name of the only trace in a run, and its events."""
    (path,) = run.glob("profile*")
    return path.name, json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_a_profile_changes_no_loss(small_flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Steps 5 and 6 of 7 are traced: each has as many products as the other, and losses are those without it."""
    assert metrics.WARM_UP_STEPS > optim.LAUNCHED_STEPS  # else the first one would be recorded while it is traced
    assert train.main([*small_flags, "--steps", "7", "--profile", "2"]) == 0
    printed, err = capfd.readouterr()
    assert "profiler" not in err
    (tmp_path / "run").rename(tmp_path / "profiled")
    assert train.main([*small_flags, "--steps", "7"]) == 0
    losses = [[row.get("train_loss") for row in rows(tmp_path / name)] for name in ("run", "profiled")]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    name, traced = trace(tmp_path / "profiled")
    assert (
        name == "profile-00000005.json.gz"
        and f"profile of 2 steps from step 5, in {tmp_path / 'run' / name}" in printed
    )
    products = sum(event.get("name") == "aten::mm" for event in traced)
    (row,) = re.findall(r"^ +[\d.]+ +[\d.]+% +([\d.]+)  aten::mm$", printed, re.MULTILINE)
    assert products > 0 and float(row) == products / 2
    assert not os.path.exists(command.private_temporary_folder() / name)
    assert len(re.findall(r"^ +[\d.]+ +[\d.]+% +[\d.]+  \S+", printed, re.MULTILINE)) == 10


@pytest.mark.parametrize(("n_steps", "n_traced"), [(4, 0), (6, 2)])
def test_a_run_too_short_for_its_profile(
    small_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], n_steps: int, n_traced: int
) -> None:
    """Traces what there is, or says that there is nothing."""
    assert train.main([*small_flags, "--steps", str(n_steps), "--profile", "5"]) == 0
    printed = capsys.readouterr()
    if n_traced == 0:
        assert "--profile needs more than 4 steps" in printed.err and not list((tmp_path / "run").glob("profile*"))
    else:
        assert f"profile of {n_traced} step{'s' if n_traced > 1 else ''} from step 5" in printed.out
        assert trace(tmp_path / "run")[1] and "--profile" not in printed.err


def test_an_error_ends_a_profile(small_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left of it, and the next one can begin."""
    step = train.Trainer.train_step

    def fail(trainer: train.Trainer, progress: float) -> dict[str, Any]:
        if trainer.step == 4:
            raise train.NotFinite("planted")
        return step(trainer, progress)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", fail)
        assert train.main([*small_flags, "--steps", "7", "--profile", "2"]) == 1
    assert not list((tmp_path / "run").glob("*profile*"))
    assert train.main([*small_flags, "--steps", "9", "--profile", "2", "--resume", "--override", "steps"]) == 0
    assert trace(tmp_path / "run")[0] == "profile-00000009.json.gz"


def test_a_trace_that_cannot_be_written(
    small_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line names it, torch's profiler has none of its own, and no half of it stays."""
    replace = Path.replace

    def full(path: Path, target: Path) -> Path:
        if "profile" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    assert train.main([*small_flags, "--steps", "7", "--profile", "2"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "profile-00000005.json.gz: No space left" in error
    assert not list((tmp_path / "run").glob("*profile*"))


def test_the_costliest_operations() -> None:
    """By the device's own time, without annotations; what is cheap is in the sum alone."""
    names = [f"kernel_{i:02}" for i in range(12)]
    on = {"device_type": DeviceType.CUDA, "is_user_annotation": False, "self_cpu_time_total": 9e9}
    found = [
        SimpleNamespace(key=name, count=6, self_device_time_total=1000.0 * i, **on) for i, name in enumerate(names)
    ]
    found += [SimpleNamespace(**vars(found[-1]) | {"device_type": DeviceType.CPU})]
    found += [SimpleNamespace(**vars(found[-2]) | {"is_user_annotation": True})]
    lines = metrics.costliest(found, 3, True).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == [*names[:1:-1], "all"]
    assert lines[1].split() == ["3.667", "16.7%", "2", "kernel_11"] and lines[-1].split() == ["22.000", "100%", "all"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.randn(64, 64) @ torch.randn(64, 64)
    averages = profiler.key_averages()
    last = metrics.costliest(averages, 1, False).splitlines()[-1]
    assert float(last.split()[0]) == pytest.approx(averages.self_cpu_time_total / 1000, abs=1e-3)


@pytest.mark.slow
def test_one_of_several_processes_reports(small_flags: list[str], tmp_path: Path) -> None:
    """A trace, event files and a log, each of the first process alone."""
    command_line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [*small_flags, "--steps", "6", "--fsdp", "--tensorboard", "--profile", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script = Path(train.__file__)
    done = subprocess.run([*command_line, str(script), *flags], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("profile of 2 steps from step 5") == 1 and trace(tmp_path / "run")[1]
    assert_same_events(tmp_path / "run")
    assert len(os.listdir(tmp_path / "run" / "tensorboard")) == 1
