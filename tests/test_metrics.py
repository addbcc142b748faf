"""What a run reports and by which clock, against files that others have planted and figures worked out by hand."""

import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics
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
def test_what_is_no_file_of_metrics_is_refused(tmp_path: Path, kind: str) -> None:
    """Without waiting for a pipe, following a link, or reading what has no end."""
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
    meter, load = Meter(1000.0), torch.tensor([[1.0, 3.0]])
    meter.add(1.0, 100, 600.0, load)
    meter.add(3.0, 100, 600.0, 2 * load)
    figures = meter.pop()
    assert figures["bytes_per_s"] == pytest.approx(50) and figures["mfu"] == pytest.approx(0.3)
    assert figures["expert_load"] == [[0.5, 1.5]] and figures["max_load"] == 1.5
    meter.add(2.0, 100, 500.0, load)
    assert meter.pop()["bytes_per_s"] == pytest.approx(50)


def test_an_impossible_mfu_is_none() -> None:
    """Then the peak was measured on a busy machine, or in a dtype that is emulated."""
    meter = Meter(100.0)
    meter.add(1.0, 1, 109.0, torch.zeros(0, 4))
    assert meter.pop() == {"bytes_per_s": pytest.approx(1), "mfu": None}  # and no load, where there are no experts


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


def test_the_bar_moves_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows the step, and is drawn again while a step is under way."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with ProgressBar(True, 0.0) as bar:
        bar.show(12, 0.345)
        bar.show_figures(1.234, 5678.0, None)
        deadline = time.monotonic() + 60
        while terminal.getvalue().count("step 12") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert terminal.getvalue().count("step 12") >= 2
        assert "34%" in terminal.getvalue() and "loss 1.234, 5,678 bytes/s" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", silent := Terminal())
    with ProgressBar(False, 0.0) as bar:
        bar.show(1, 0.5)
    assert silent.getvalue() == ""
