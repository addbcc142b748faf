"""Curves and tables of runs, against brute force, and pictures read back from their SVG."""

import ast
import errno
import json
import os
import random
import re
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics
import plot
import train
from plot import main, read_rows

draws = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def line(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "elapsed_s": 60.0 + 3 * step, "bytes": 100 * step, **values}


def write_run(folder: Path, lines: list[dict[str, Any]], flags: dict[str, Any] | None = None, **model: Any) -> Path:
    """Writes the files of a run that plot.py reads."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in lines))
    if flags is not None:
        values = {"config": "a.json", "save_path": str(folder), "seed": 0} | flags | {"model": {"dim": 8} | model}
        (folder / "settings.json").write_text(json.dumps(values))
    return folder


def losses(*values: float, every: int = 10) -> list[dict[str, Any]]:
    """Lines of a run that was evaluated at each line."""
    pairs = enumerate(values, start=1)
    return [row for i, v in pairs for row in (line(every * i, train_loss=v + 0.1), line(every * i, val_loss=v))]


def sweep(folder: Path, seed: int = 0) -> dict[tuple[float, str], list[list[float]]]:
    """Writes runs of random losses; returns the losses of each setting's runs."""
    generator = random.Random(seed)
    found: dict[tuple[float, str], list[list[float]]] = {}
    for lr in (0.001, 0.01):
        for optimizer in ("muon", "adamw"):
            for i in range(generator.randint(1, 4)):
                values = [round(generator.uniform(1, 5), 4) for _ in range(generator.randint(2, 5))]
                flags = {"lr": lr, "optimizer": optimizer, "seed": i, "steps": 50}
                write_run(folder / f"{optimizer}-{lr}-{i}", losses(*values), flags)
                found.setdefault((lr, optimizer), []).append(values)
    return found


def shown(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    capsys.readouterr()
    assert main([str(flag) for flag in flags]) == 0
    done = capsys.readouterr()
    assert done.err == ""
    return done.out


def refused(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    """The line on stderr with which a command ends, with nothing on stdout."""
    capsys.readouterr()
    try:
        assert main([str(flag) for flag in flags]) == 2
    except SystemExit as error:
        assert error.code == 2
    done = capsys.readouterr()
    assert done.out == "" and done.err.count("\n") == 1
    return done.err


# --- Reading ---------------------------------------------------------------------------------------------------------


@draws
@given(st.data())
def test_repeated_and_torn_lines(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Each process goes on from some step of the last, after a kill that may have torn a line."""
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    expected: dict[tuple[int, bool], int] = {}
    text, first = b"", 0
    for process in range(data.draw(st.integers(1, 4))):
        expected = {place: value for place, value in expected.items() if place[0] <= first}
        last = first + data.draw(st.integers(1, 6))
        for step in range(first + 1, last + 1):
            text += json.dumps(line(step, train_loss=process)).encode() + b"\n"
            expected[step, False] = process
            if data.draw(st.booleans()):
                text += json.dumps(line(step, val_loss=process)).encode() + b"\n"
                expected[step, True] = process
        torn = json.dumps(line(last + 1, train_loss=99)).encode()
        text += data.draw(
            st.sampled_from([b"", torn[: len(torn) // 2] + b"\n", b"\xff{[\n", b"[]\n", b'{"step": "9"}\n'])
        )
        first = data.draw(st.integers(0, last))
    path.write_bytes(text + data.draw(st.sampled_from([b"", b'{"step": 3, "tra', b"\xc3"])))
    found = {(row["step"], "val_loss" in row): row.get("train_loss", row.get("val_loss")) for row in read_rows(path)}
    assert found == expected and len(read_rows(path)) == len(expected)


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = [float("nan"), float("inf"), None, "x", True, [1], 10**400, 2.5]
    write_run(tmp_path / "run", [line(i, grad_norm=value) for i, value in enumerate(values)])
    assert "a run 2.5" in shown(capsys, tmp_path / "run", "--what", "grad-norm")


def test_numbers_that_floats_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [10**17 + 1, 10**18 + 1, 10**299]
    run = write_run(tmp_path / "run", [line(step, val_loss=10**30 + i) for i, step in enumerate(steps)])
    assert "a run: val_loss 1e+30" in shown(capsys, run) and str(10**299) in shown(capsys, run, "--table")


@pytest.mark.parametrize("name", ["settings.json", "step-00000001/state.json", "step-00000001/config.json"])
@pytest.mark.parametrize("target", [None, "/dev/zero"])
def test_settings_that_are_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, target: str | None
) -> None:
    """A pipe would block, and a device has no end; a curve needs no settings."""
    run = write_run(tmp_path / "run", losses(3, 2))
    (run / "step-00000001").mkdir()
    (run / "step-00000001" / "state.json").write_text('{"settings": {}}')
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name) if target is None else (run / name).symlink_to(target)
    if name != "settings.json":
        (run / "settings.json").unlink(missing_ok=True)
    assert "b run: val_loss 2" in shown(capsys, run)


def test_load_is_that_of_the_busiest_and_the_idlest_expert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = [[0.9, 1.1, 1.0], [0.25, 1.25, 1.5]]
    write_run(tmp_path / "run", [line(i, expert_load=load, max_load=1.5) for i in range(3)])
    printed = shown(capsys, tmp_path / "run", "--what", "load")
    assert "a run: max_load 1.5\n" in printed and "b run: min_load 0.25\n" in printed


def test_paths_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder, its file, or a folder of runs at any depth; a run named twice is drawn once."""
    one = write_run(tmp_path / "runs" / "one", losses(3, 2))
    two = write_run(tmp_path / "runs" / "deep" / "two", losses(3, 1))
    for flags in ([tmp_path / "runs"], [one, two], [one / "metrics.jsonl", two, one], [tmp_path / "runs", two]):
        printed = shown(capsys, *flags)
        assert "one: val_loss 2\n" in printed and "deep/two: val_loss 1\n" in printed
        assert len(re.findall("val_loss", printed)) == 2
    assert "run" in shown(capsys, write_run(tmp_path / "run", losses(3, 2)))


def test_a_run_that_may_not_be_read_is_not_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name, losses(3, 2))
    scan = os.scandir

    def forbid(path: Any) -> Any:
        if str(path).endswith("two"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbid)
    assert f"Permission denied: {tmp_path / 'two'}" in refused(capsys, tmp_path)


def test_paths_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} holds no run" in refused(capsys, tmp_path / "empty")
    assert f"{tmp_path / 'none'} is no file or folder" in refused(capsys, tmp_path / "none")
    write_run(tmp_path / "begun", [])
    assert "nothing to draw" in (error := refused(capsys, tmp_path / "begun")) and "no line of metrics yet" in error
    begun = write_run(tmp_path / "run", [line(1, train_loss=5.0)])
    assert "val_loss" not in shown(capsys, begun)  # as there is no evaluation yet
    assert "--what load" in refused(capsys, begun, "--what", "load")
    assert main([str(tmp_path)]) == 0 and "has no line of metrics yet" in capsys.readouterr().err
    assert ".svg or .png" in refused(capsys, begun, "--output", tmp_path / "figure.gif")
    assert "not allowed with" in refused(capsys, begun, "--output", tmp_path / "figure.svg", "--table")


# --- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_table_has_a_row_for_each_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    expected = []
    for (lr, optimizer), runs in sweep(tmp_path, seed).items():
        last = [values[-1] for values in runs]
        lengths = sorted({10 * len(values) for values in runs})
        spread = f"{statistics.stdev(last):.4f}" if len(last) > 1 else "-"
        best, i = min((min(values), i) for i, values in enumerate(runs))
        row = [f"{lr:g}", optimizer, str(len(runs)), "-".join(map(str, sorted({lengths[0], lengths[-1]})))]
        row += [f"{statistics.fmean(last):.4f}", spread, f"{best:.4f}", f"{optimizer}-{lr}-{i}"]
        expected.append((statistics.fmean(last), row))
    header, *found = [row.split() for row in shown(capsys, tmp_path, "--table").splitlines()]
    assert header == ["lr", "optimizer", "runs", "steps", "mean", "spread", "best", "best", "run"]
    assert found == [row for _, row in sorted(expected)]


def test_runs_are_grouped_by_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the seed nor where it was saved; but the model, also if the config's name is the same."""
    for name, flags, model in (
        *(("a", {"seed": 1, "resume": False}, {}), ("b", {"seed": 2, "resume": True, "override": ["lr"]}, {})),
        *(("c", {"seed": 1}, {"dim": 16}), ("d", {"seed": 2, "log_interval": 2, "keep": 3}, {"dim": 16})),
    ):
        write_run(tmp_path / name, losses(3, 2), flags, **model)
    rows = [row.split() for row in shown(capsys, tmp_path, "--table").splitlines()]
    assert rows[0][:2] == ["model.dim", "runs"] and [row[:2] for row in rows[1:]] == [["8", "2"], ["16", "2"]]
    write_run(tmp_path / "e", losses(3, 2), {"config": "b.json"}, dim=32)
    rows = [row.split() for row in shown(capsys, tmp_path, "--table").splitlines()]
    assert rows[0][:2] == ["config", "runs"] and sorted(row[0] for row in rows[1:]) == ["a.json", "a.json", "b.json"]


def test_lists_and_long_values_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As on the command line; of long paths the end, in which they differ."""
    folder = "/a/long/folder/with/many/corpora/in/it/"
    for name, data in (("a", [folder + "old.txt"]), ("b", [folder + "new.txt"]), ("c", ["stdlib", "b.txt"])):
        write_run(tmp_path / name, losses(3), {"data": data})
    rows = [row.split("  ")[0] for row in shown(capsys, tmp_path, "--table").splitlines()[1:]]
    assert sorted(rows) == ["stdlib b.txt", f"…{(folder + 'new.txt')[-39:]}", f"…{(folder + 'old.txt')[-39:]}"]


def test_curves_that_coincide_are_both_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And three runs with the same rates have no spread, not even that of rounding."""
    for i in range(3):
        write_run(tmp_path / f"{i}", [line(s, lr=0.1 + s / 7, router_lr=0.1 + s / 7) for s in range(9)], {"seed": i})
    canvas, legend = shown(capsys, tmp_path, "--what", "lr").split("steps")
    assert min(map(canvas.count, "ab")) > 20 and "±" not in legend


def test_runs_without_settings_stand_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("a", None), ("b", "{"), ("c", "[]"), ("d", '{"lr": 1}'), ("e", '{"model": 3}')):
        write_run(tmp_path / name, losses(3, 2))
        if content is not None:
            (tmp_path / name / "settings.json").write_text(content)
    assert sorted(row.split()[-1] for row in shown(capsys, tmp_path, "--table").splitlines()[1:]) == list("abcde")


def test_settings_of_earlier_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the state of the last checkpoint."""
    for i, lr in enumerate((0.1, 0.2, 0.2)):
        run = write_run(tmp_path / f"run-{i}", losses(3, 2))
        for step, rate in ((9, 7.0), (100, lr)):
            folder = run / f"step-{step:08d}"
            folder.mkdir()
            (folder / "state.json").write_text(json.dumps({"settings": {"seed": i, "lr": rate}}))
            (folder / "config.json").write_text(json.dumps({"dim": 8}))
    rows = [row.split() for row in shown(capsys, tmp_path, "--table").splitlines()]
    assert sorted(row[:2] for row in rows) == [["0.1", "1"], ["0.2", "2"], ["lr", "runs"]]


def test_runs_in_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of three seeds has no evaluation yet."""
    for seed in range(2):
        write_run(tmp_path / str(seed), losses(3, 2 + seed), {"seed": seed})
    write_run(tmp_path / "2", [line(1, train_loss=5.0)], {"seed": 2})
    assert shown(capsys, tmp_path, "--table").splitlines()[1].split()[:3] == ["2", "of", "3"]
    assert "val_loss 2.5 ± 0.71" in shown(capsys, tmp_path)


@draws
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-1, 1), st.integers(2, 9)), min_size=1, max_size=4), st.data())
def test_mean_and_spread_of_runs(lines: list[tuple[float, float, int]], data: st.DataObject) -> None:
    """Runs whose values are on straight lines, logged at other times each: the mean is on a straight line as well."""
    logs, ranges = [], []
    for intercept, slope, n_points in lines:
        times = sorted(data.draw(st.lists(st.integers(0, 60), min_size=n_points, max_size=n_points, unique=True)))
        rows = [{"step": i, "elapsed_s": 60 * t, "x": intercept + slope * t} for i, t in enumerate(times)]
        logs.append(plot.RunLog(Path(), "", rows, {}))
        ranges.append((times[0], times[-1]))
    x, mean, spread = plot.Setting(logs, {}).curve("minutes", "x")
    low, high = max(first for first, _ in ranges), min(last for _, last in ranges)
    assert set(x) == {row["elapsed_s"] / 60 for log in logs for row in log.rows if low <= row["elapsed_s"] / 60 <= high}
    for t, m, s in zip(x, mean, spread, strict=True):
        values = [intercept + slope * t for intercept, slope, _ in lines]
        assert m == pytest.approx(statistics.fmean(values), abs=1e-9)
        assert s == pytest.approx(statistics.stdev(values) if len(values) > 1 else 0, abs=1e-9)


# --- In the terminal -------------------------------------------------------------------------------------------------


def plotted(text: str) -> tuple[list[str], list[str]]:
    """The rows of the first plot in a text, without the axis, and the lines below it."""
    lines = text.splitlines()
    end = next(i for i, one in enumerate(lines) if re.match(r" *\+-+$", one))
    return [one.split("|", 1)[1] for one in lines[1:end]], lines[end + 1 :]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 17), (200, 60), (10, 3)])
def test_text_fits_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", str(height))
    sweep(tmp_path)
    lines = shown(capsys, tmp_path, "--text").splitlines()
    assert width < 40 or max(map(len, lines)) <= width and len(lines) <= height


def test_text_is_at_its_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A straight line from corner to corner, and a single point above its middle."""
    rows = [line(step, lr=5 - step / 20) for step in range(0, 101, 20)]
    run = write_run(tmp_path / "run", [*rows, line(101, matrix_lr=5.0)])
    canvas, below = plotted(shown(capsys, run, "--what", "lr"))
    columns = max(map(len, canvas))
    for column in range(columns - 1):
        expected = round(column / (columns - 1) * 101 / 100 * (len(canvas) - 1))
        assert abs(next(i for i, row in enumerate(canvas) if row[column : column + 1] == "a") - expected) <= 1
    assert canvas[0].endswith("b") and canvas[0].strip() and below[0].split() == ["0", "steps", "101"]
    assert below[1:] == ["a run: lr 0", "b run: matrix_lr 5"]


def test_text_of_one_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canvas, below = plotted(shown(capsys, write_run(tmp_path / "run", [line(1, train_loss=5.0)]), "--x", "bytes"))
    assert "".join(canvas).count("a") >= 1 and below[0].split() == ["100", "bytes", "100"]


def test_the_start_of_a_loss_is_above_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line(step, train_loss=5.5 if step < 4 else 2 - step / 100) for step in range(101)]
    printed = shown(capsys, write_run(tmp_path / "run", rows))
    assert printed.splitlines()[1].lstrip().startswith("1.95 |")


# --- Pictures --------------------------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def group_of(tree: ElementTree.Element, name: str) -> ElementTree.Element:
    (found,) = [group for group in tree.iter(f"{SVG}g") if group.get("id") == name]
    return found


def path_of(group: ElementTree.Element) -> np.ndarray:
    """The points of the first path in a group, (points, 2)."""
    path = next(group.iter(f"{SVG}path")).get("d")
    return np.array(re.findall(r"[ML] (\S+) (\S+)", path), dtype=float)


def scale_of(tree: ElementTree.Element, axis: str) -> np.ndarray:
    """Reads the ticks of an axis: the polynomial from places in the picture to values."""
    places, values = [], []
    for i in range(1, 20):
        if groups := [group for group in tree.iter(f"{SVG}g") if group.get("id") == f"{axis}tick_{i}"]:
            places.append(float(next(groups[0].iter(f"{SVG}use")).get(axis)))
            values.append(float(next(groups[0].iter(f"{SVG}text")).text.replace("\N{MINUS SIGN}", "-")))
    return np.polyfit(places, values, 1)


@pytest.fixture
def svg_text() -> Any:
    """Text in pictures is text, not outlines."""
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none", "path.simplify": False}):
        yield


@pytest.mark.parametrize("x", ["steps", "bytes", "minutes"])
def test_picture_has_the_values_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], svg_text: None, x: str
) -> None:
    """Read back from the SVG by the ticks of its axes: two runs, and a band around the mean of two others."""
    generator = random.Random(x)
    values = {name: [generator.uniform(1, 3) for _ in range(6)] for name in ("_a$b$", "b", "c", "d")}
    for i, (name, run) in enumerate(values.items()):
        write_run(tmp_path / "runs" / name, losses(*run), {"lr": min(i, 2), "seed": i})
    assert shown(capsys, tmp_path / "runs", "--output", tmp_path / "new" / "loss.svg", "--x", x) == ""
    tree = ElementTree.parse(tmp_path / "new" / "loss.svg").getroot()
    steps = np.arange(10, 61, 10)
    xs = {"steps": steps, "bytes": 100 * steps, "minutes": 1 + steps / 20}[x]
    pairs = list(zip(values["c"], values["d"], strict=True))
    x_scale, y_scale = scale_of(tree, "x"), scale_of(tree, "y")
    for i, ys in enumerate([values["_a$b$"], values["b"], list(map(statistics.fmean, pairs))]):
        for field, offset in (("val_loss", 0.0), ("train_loss", 0.1)):
            points = path_of(group_of(tree, f"{field}-{i}"))
            assert np.polyval(x_scale, points[:, 0]) == pytest.approx(xs, rel=1e-3)
            assert np.polyval(y_scale, points[:, 1]) == pytest.approx(np.array(ys) + offset, abs=1e-3)
    _, band = (group for group in tree.iter(f"{SVG}g") if group.get("id", "").startswith("FillBetween"))
    moved = [float(use.get("y")) for use in band.iter(f"{SVG}use")]  # matplotlib writes one path or the other
    edges = np.polyval(y_scale, path_of(band)[:, 1] + sum(moved))
    for pair in pairs:
        for edge in (statistics.fmean(pair) - statistics.stdev(pair), statistics.fmean(pair) + statistics.stdev(pair)):
            assert np.abs(edges - edge).min() < 1e-3
    legend = [text.text.strip() for text in tree.iter(f"{SVG}text") if "loss" in text.text]
    runs, fields = ("_a$b$", "b", "lr 2 (2 runs)"), ("train_loss", "val_loss")
    assert legend == [f"{run}: {field}" for run in runs for field in fields]


@pytest.mark.parametrize("what", ["load", "lr", "grad-norm", "all"])
def test_pictures_of_other_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], svg_text: None, what: str
) -> None:
    """Each has a curve for every field that the run has; the same run gives the same file."""
    fields = {"load": ["max_load", "min_load"], "lr": ["lr", "matrix_lr"], "grad-norm": ["grad_norm"]}
    values = {"expert_load": [[0.5, 1.5]], "max_load": 1.5, "lr": 0.1, "matrix_lr": 0.2, "grad_norm": 3.0}
    run = write_run(tmp_path / "run", [line(i, train_loss=3.0, **values) for i in range(5)])
    shown(capsys, run, "--what", what, "--output", tmp_path / "a.svg")
    shown(capsys, run, "--what", what, "--output", tmp_path / "b.svg")
    groups = {group.get("id", ""): group for group in ElementTree.parse(tmp_path / "a.svg").getroot().iter(f"{SVG}g")}
    ids = groups.keys()
    ticks = [text.text for name in ids if name.startswith("xtick") for text in groups[name].iter(f"{SVG}text")]
    assert len(ticks) > 2 and all(tick.isdecimal() for tick in ticks)  # a step is no fraction
    curves = ["train_loss", *sum(fields.values(), [])] if what == "all" else fields[what]
    assert {name for name in ids if name.endswith("-0")} == {f"{name}-0" for name in curves}
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("matplotlib.image")
    run = write_run(tmp_path / "run", losses(3, 2, 1))
    shown(capsys, run, "--output", tmp_path / "loss.png", "--what", "all")
    pixels = image.imread(tmp_path / "loss.png")
    assert pixels.shape[0] > 300 and pixels[..., :3].std() > 0.01


def test_pictures_are_complete_or_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk leaves the old picture; characters that the font does not have are no warnings."""
    pytest.importorskip("matplotlib")
    run, picture = write_run(tmp_path / "日本🙂", losses(3, 2)), tmp_path / "new" / "loss.svg"
    shown(capsys, run, tmp_path / "日本🙂", "--output", picture)
    before, write = picture.read_bytes(), Path.open

    def full(path: Path, mode: str = "r", *rest: Any) -> Any:
        return write(Path("/dev/full"), "wb") if mode == "xb" else write(path, mode, *rest)

    monkeypatch.setattr(Path, "open", full)
    if Path("/dev/full").exists():
        assert f"{picture} cannot be written: No space left" in refused(capsys, run, "--output", picture)
    monkeypatch.undo()
    (tmp_path / "folder.svg").mkdir()
    assert "folder.svg cannot be written" in refused(capsys, run, "--output", tmp_path / "folder.svg")
    assert picture.read_bytes() == before and [*picture.parent.iterdir()] == [picture]


def test_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = write_run(tmp_path / "run", losses(3, 2, 1))
    assert "pip install matplotlib" in refused(capsys, run, "--output", tmp_path / "loss.svg")
    assert not (tmp_path / "loss.svg").exists()
    assert "val_loss" in shown(capsys, run)


# --- With train.py ---------------------------------------------------------------------------------------------------


def test_a_sweep_of_train(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's loop over rates and seeds, and its table."""
    monkeypatch.setattr(metrics, "MEASURING_S", 0.0)
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"n_layers": 1}))
    (tmp_path / "data.txt").write_bytes(b"the quick brown fox jumps over a lazy dog. " * 60)
    expected: dict[str, list[float]] = {}
    for lr in ("0.01", "0.001"):
        for seed in range(2):
            run = tmp_path / "sweep" / f"{lr}-{seed}"
            flags = ["--config", tmp_path / "config.json", "--data", tmp_path / "data.txt", "--device", "cpu"]
            flags += ["--lr", lr, "--seed", seed, "--save-path", run, "--steps", 3, "--sample-bytes", 0]
            assert train.main(list(map(str, flags))) == 0
            (state,) = run.glob("step-*/state.json")
            expected.setdefault(lr, []).append(json.loads(state.read_text())["val_loss"])
    header, *rows = [row.split() for row in shown(capsys, tmp_path / "sweep", "--table").splitlines()]
    assert header == ["lr", "runs", "steps", "mean", "spread", "best", "best", "run"]
    assert {row[0]: row[1:4] for row in rows} == {
        lr: ["2", "3", f"{statistics.fmean(values):.4f}"] for lr, values in expected.items()
    }
    assert all(float(row[4]) == pytest.approx(statistics.stdev(expected[row[0]]), abs=1e-4) for row in rows)


def test_plot_starts_quickly() -> None:
    """It imports the standard library, numpy, and the room of commands; matplotlib only to draw."""
    tree = ast.parse(Path(plot.__file__).read_text())
    at_the_top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    at_the_top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert at_the_top - sys.stdlib_module_names - {"collections.abc"} == {"numpy", "command"}
