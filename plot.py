"""Draws curves of runs from their metrics.jsonl, and tabulates sweeps.

    python plot.py out/nano out/gpt                          # in the terminal
    python plot.py out/sweep --x minutes --output loss.svg   # a picture, by matplotlib
    python plot.py out/sweep --table                         # a row for each setting

A run is the folder that train.py wrote, or its metrics.jsonl; a folder of runs stands for all below it. Runs whose
settings differ in nothing but the seed are one curve as far as all of them go: their mean, with a band of one standard
deviation around it.
"""

if __name__ == "__main__":
    import command

    command.start()

import argparse
import io
import json
import logging
import math
import os
import re
import shutil
import statistics
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import command
from command import shorten

X_FIELDS = {"steps": "step", "bytes": "bytes", "minutes": "elapsed_s"}
FAINT, MARKED = {"alpha": 0.35, "linewidth": 0.8}, {"marker": "o", "markersize": 3}
SOLID, DASHED, DOTTED = {"linestyle": "-"}, {"linestyle": "--"}, {"linestyle": ":"}
PANELS: dict[str, tuple[str, dict[str, Any]]] = {  # title; fields of metrics.jsonl and min_load, with their styles
    "loss": ("nats per byte", {"train_loss": FAINT, "val_loss": MARKED}),
    "load": ("load relative to the mean expert's", {"max_load": SOLID, "min_load": DASHED}),
    "lr": ("learning rate", {"lr": SOLID, "router_lr": DASHED, "matrix_lr": DOTTED}),
    "grad-norm": ("gradient norm", {"grad_norm": SOLID}),
}
# flags of a run that do not change what it learns: runs that differ in these alone are one setting
NO_SETTINGS = {"seed", "save_path", "resume", "override", "timeout", "log_interval", "eval_interval", "save_interval"}
NO_SETTINGS |= {"keep", "sample_bytes", "tensorboard", "profile"}
START = 0.05  # part of the curves of losses that does not set the height of the axis: a loss begins with 5.5
MAX_LINE_BYTES = 1 << 24  # of metrics.jsonl, and of a file of settings
MARKS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of the curves in a terminal


class PlotError(ValueError):
    """There is nothing to draw, or no means to draw it."""


# --- Runs ------------------------------------------------------------------------------------------------------------


@dataclass
class RunLog:
    """A run from its files: its lines of metrics in the order of steps, and its settings (none if not known)."""

    path: Path
    name: str
    rows: list[dict[str, Any]]
    settings: dict[str, Any]

    def curve(self, x: str, field: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns x and y of the lines that have both, with x rising."""
        pairs = [(row.get(X_FIELDS[x]), row.get(field)) for row in self.rows]
        points = {float(at): float(value) for at, value in pairs if is_finite(at) and is_finite(value)}  # the last of x
        xs = np.array(sorted(points), dtype=float)
        return xs / (60 if x == "minutes" else 1), np.array([points[value] for value in xs], dtype=float)


def is_finite(value: Any) -> bool:
    """Whether a value of a JSON file is a number that can be drawn."""
    return type(value) in (int, float) and abs(value) < 1e300


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the complete lines of metrics.jsonl; of steps that were taken twice, the second time counts."""
    rows: list[dict[str, Any]] = []
    place = lambda row: (row["step"], "val_loss" in row)  # noqa: E731 - a step's evaluation follows its other figures
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            row: Any = None
            with suppress(ValueError, RecursionError):  # torn by a kill, or being written
                row = json.loads(line)
            if isinstance(row, dict) and is_finite(row.get("step")):
                while rows and place(rows[-1]) >= place(row):
                    rows.pop()
                with suppress(KeyError, ValueError, TypeError):
                    row["min_load"] = min(map(min, row.pop("expert_load")))  # of large models, most of the file
                rows.append(row)
    return rows


def read_object(path: Path) -> Any:
    """Reads a JSON file; a ValueError if it is no regular one, as a pipe would block and a device may have no end."""
    if not path.is_file():
        raise ValueError(f"{path} is no regular file")
    with path.open("rb") as file:
        return json.loads(file.read(MAX_LINE_BYTES))


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads the flags of a run, and fields of its model as "model.dim"; of an earlier version, from a checkpoint."""
    with suppress(OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        if (file := folder / "settings.json").exists():
            settings = read_object(file)
            model = settings.pop("model")
        else:
            file = max(folder.glob("step-*/state.json"), key=lambda file: int(file.parent.name[5:]))
            settings = read_object(file)["settings"]
            model = read_object(file.parent / "config.json")
        return settings | {f"model.{name}": value for name, value in model.items()}
    return {}


def _fail(error: OSError) -> None:
    """Ends a walk at a folder that cannot be read: a run in it would be left out silently. Another error is no run."""
    if isinstance(error, PermissionError):
        raise error


def find_runs(paths: list[Path]) -> list[RunLog]:
    """Reads the runs at or below paths; those without a line of metrics yet are left out, with a warning.

    Raises:
        PlotError: There is none, or a path leads to none.
    """
    files: list[Path] = []
    for path in paths:
        places = (Path(folder, "metrics.jsonl") for folder, *_ in os.walk(path, onerror=_fail))
        found = [path] if path.is_file() else sorted(filter(Path.is_file, places))
        if not found:
            reason = "holds no run: no metrics.jsonl is in it or below" if path.is_dir() else "is no file or folder"
            raise PlotError(f"{path} {reason}; name what train.py was given as --save-path, or a folder of such")
        files += [file.resolve() for file in found]
    files = list(dict.fromkeys(files))  # a folder may be named twice
    above = os.path.commonpath([file.parent.parent for file in files])
    runs, begun = [], []
    for file in files:
        name = shorten(os.path.relpath(file.parent if file.name == "metrics.jsonl" else file, above))
        if rows := read_rows(file):
            runs.append(RunLog(file, name, rows, read_settings(file.parent)))
        else:
            begun.append(f"{file} has no line of metrics yet")
    if not runs:
        raise PlotError(f"there is nothing to draw: {begun[0]}")
    for text in begun:
        command.warn("plot.py", text)
    return runs


# --- Settings --------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """Runs that differ in the seed alone; `values` are the settings in which it differs from others."""

    runs: list[RunLog]
    values: dict[str, Any]

    @property
    def label(self) -> str:
        """The name of its curves."""
        if len(self.runs) == 1:
            return self.runs[0].name
        values = ", ".join(f"{name} {written(value)}" for name, value in self.values.items())
        return f"{values or self.runs[0].name + ', …'} ({len(self.runs)} runs)"

    def curve(self, x: str, field: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns x, mean and standard deviation of a field where all of its runs that have the field have values."""
        curves = [curve for run in self.runs if len((curve := run.curve(x, field))[0])]
        if not curves:
            return (np.empty(0),) * 3
        low, high = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
        grid = np.unique(np.concatenate([xs for xs, _ in curves]))
        grid = grid[(grid >= low) & (grid <= high)]
        values = np.stack([np.interp(grid, *curve) for curve in curves])
        differs = np.ptp(values, axis=0) > 0  # else what std returns is rounding
        spread = np.where(differs, values.std(axis=0, ddof=1), 0.0) if len(curves) > 1 else np.zeros_like(grid)
        return grid, values.mean(axis=0), spread


def written(value: Any) -> str:
    """A setting's value in the form of the command line; of a long one, such as paths, the end."""
    values = value if isinstance(value, list) else ["-" if value is None else value]
    text = " ".join(v if isinstance(v, str) else json.dumps(v) for v in values)
    return shorten(text if len(text) <= 40 else "…" + text[-39:])


def group(runs: list[RunLog]) -> list[Setting]:
    """Puts runs of one setting together; a run whose settings are not known is one of its own."""
    groups: dict[str, list[RunLog]] = {}
    for run in runs:
        # the config's name is left out: its content is in the settings, as the model and the flags
        key = {name: value for name, value in run.settings.items() if name not in NO_SETTINGS | {"config"}}
        groups.setdefault(json.dumps(key or str(run.path), sort_keys=True), []).append(run)
    firsts = [members[0].settings for members in groups.values()]
    names = dict.fromkeys(name for settings in firsts for name in settings if name not in NO_SETTINGS)
    shown = [name for name in names if len({json.dumps(settings.get(name)) for settings in firsts}) > 1]
    if "config" in shown:  # its name stands for the differences within
        shown = [name for name in shown if not name.startswith("model.")]
    return [Setting(members, {name: members[0].settings.get(name) for name in shown}) for members in groups.values()]


def table(settings: list[Setting]) -> str:
    """One row a setting, best first: its flags, number of runs, steps, mean and spread of the last val_loss, best."""
    rows = []
    for setting in settings:
        losses = {run.name: run.curve("steps", "val_loss")[1].tolist() for run in setting.runs}
        last = [values[-1] for values in losses.values() if values]
        best, best_run = min((min(values, default=math.inf), name) for name, values in losses.items())
        mean = statistics.fmean(last) if last else math.inf
        spread = f"{statistics.stdev(last):.4f}" if len(last) > 1 else "-"
        steps = sorted({run.rows[-1]["step"] for run in setting.runs})
        row = [written(value) for value in setting.values.values()]
        row += [f"{len(losses)}" if len(last) == len(losses) else f"{len(last)} of {len(losses)}"]
        row += [f"{steps[0]}" if len(steps) == 1 else f"{steps[0]}-{steps[-1]}"]
        row += [f"{mean:.4f}", spread, f"{best:.4f}", best_run] if last else ["-", "-", "-", best_run]
        rows.append((mean, row))
    header = [*map(shorten, settings[0].values), "runs", "steps", "mean", "spread", "best", "best run"]
    lines = [header, *(row for _, row in sorted(rows, key=lambda row: row[0]))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


# --- Drawing ---------------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """A field of a setting: its mean and standard deviation over x."""

    label: str
    field: str
    i_setting: int
    x: np.ndarray
    y: np.ndarray
    spread: np.ndarray


def curves_of(settings: list[Setting], panel: str, x: str) -> Iterator[Curve]:
    """The curves of a panel that have a point."""
    fields = PANELS[panel][1]
    for i, setting in enumerate(settings):
        for field in fields:
            points = setting.curve(x, field)
            if len(points[0]):
                yield Curve(setting.label if len(fields) == 1 else f"{setting.label}: {field}", field, i, *points)


def top(curves: list[Curve], panel: str) -> float:
    """The largest value that the axis must hold; for losses, without their start."""
    start = START * max(c.x[-1] for c in curves) if panel == "loss" else -math.inf
    return max(float(c.y[c.x >= min(start, c.x[-1])].max()) for c in curves)


def draw_text(curves: list[Curve], panel: str, x: str, width: int, height: int) -> str:
    """Draws curves in characters, each as a letter; the legend has their last values."""
    high, low = top(curves, panel), min(float(c.y.min()) for c in curves)
    left, right = min(c.x[0] for c in curves), max(c.x[-1] for c in curves)
    rows = max(5, height)
    labels = {0: f"{high:.4g}", (rows - 1) // 2: f"{(high + low) / 2:.4g}", rows - 1: f"{low:.4g}"}
    margin = max(map(len, labels.values()))
    columns = max(10, width - margin - 2)
    canvas = [[" "] * columns for _ in range(rows)]
    positions = np.linspace(left, right, columns)
    half = (right - left) / (columns - 1) / 2
    legend = []
    for i, c in enumerate(curves):
        mark = MARKS[i % len(MARKS)]
        for column in np.flatnonzero((positions >= c.x[0] - half) & (positions <= c.x[-1] + half)):
            value = float(np.interp(positions[column], c.x, c.y))
            line = canvas[round((high - value) / ((high - low) or 1.0) * (rows - 1))] if value <= high else []
            if line and (line[column] == " " or column % len(curves) == i):  # where curves meet, letters alternate
                line[column] = mark
        last = f" {c.y[-1]:.4g}" + (f" ± {c.spread[-1]:.2g}" if c.spread.any() else "")
        legend.append(f"{mark} {shorten(c.label, max(10, width - len(last) - 3))}{last}")
    lines = [f"{labels.get(i, ''):>{margin}} |{''.join(line)}".rstrip() for i, line in enumerate(canvas)]
    ends = f"{left:.6g}", f"{right:.6g}"
    scale = f"{ends[0]}{x:^{max(len(x) + 2, columns - len(ends[0]) - len(ends[1]))}}{ends[1]}"
    return "\n".join([PANELS[panel][0], *lines, f"{'':{margin}} +{'-' * columns}", f"{'':{margin}}  {scale}", *legend])


def draw_picture(panels: dict[str, list[Curve]], x: str, output: Path) -> None:
    """Writes a figure of the panels: a colour a setting, a style a field, losses of training faint."""
    try:
        import matplotlib
    except ImportError:
        raise PlotError("--output needs matplotlib (pip install matplotlib); --text draws without it") from None
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # else it writes about its own folders
    matplotlib.use("svg" if output.suffix == ".svg" else "agg")
    matplotlib.rcParams["svg.hashsalt"] = "bytegpt"  # the same curves give the same file
    from matplotlib import pyplot as plt

    n_columns = min(2, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    size = 7 * n_columns, 3.5 * n_rows
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, layout="constrained", squeeze=False)
    for axis, (panel, curves) in zip(axes.flat, panels.items(), strict=False):
        title, styles = PANELS[panel]
        for c in curves:
            color = f"C{c.i_setting % 10}"
            label = re.sub("^_", " _", c.label.replace("$", r"\$"))  # no formula; matplotlib hides labels like "_x"
            axis.plot(c.x, c.y, color=color, label=label, gid=f"{c.field}-{c.i_setting}", **styles[c.field])
            if c.spread.any():
                axis.fill_between(c.x, c.y - c.spread, c.y + c.spread, color=color, alpha=0.2, linewidth=0)
        axis.set(xlabel=x, ylabel=title)
        axis.locator_params(axis="x", integer=x != "minutes")
        if panel == "loss":
            axis.set_ylim(None, 1.02 * top(curves, panel))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font does not have, drawn as boxes
        figure.savefig(picture, format=output.suffix[1:], metadata={"Date": None} if output.suffix == ".svg" else None)
    plt.close(figure)
    write_file(output, picture.getvalue())


def write_file(path: Path, data: bytes) -> None:
    """Writes a file, and the folders to it; it appears complete, or the old one stays. PlotError if it cannot be."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # a leftover, or a link that would be followed
        try:
            with temporary.open("xb") as file:
                file.write(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: no path has a zero byte
        reason = getattr(error, "strerror", None) or error
        raise PlotError(f"{path} cannot be written: {reason}; name another --output") from None


# --- The command -----------------------------------------------------------------------------------------------------


def plot(argv: list[str] | None) -> int:
    """Runs the command; returns its exit code."""
    parser = command.Parser("plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run's folder, its metrics.jsonl, a sweep")
    parser.add_argument("--what", choices=[*PANELS, "all"], default="loss", help="figures to draw (default: loss)")
    parser.add_argument("--x", choices=list(X_FIELDS), default="steps", help="the horizontal axis (default: steps)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--text", action="store_true", help="draw in characters (the default)")
    form.add_argument("--output", type=Path, metavar="FILE", help="draw a picture: .svg or .png; needs matplotlib")
    help = "print a row for each setting: mean and standard deviation of its runs' last val_loss, and the best of all"
    form.add_argument("--table", action="store_true", help=f"{help}; --what and --x are for curves")
    args = parser.parse_args(argv)
    if args.output is not None and args.output.suffix not in (".svg", ".png"):
        parser.error(f"--output must end in .svg or .png, got {shorten(args.output)}")
    settings = group(find_runs(args.runs))
    if args.table:
        command.say(table(settings))
        return 0
    chosen = PANELS if args.what == "all" else [args.what]
    panels = {panel: curves for panel in chosen if (curves := list(curves_of(settings, panel, args.x)))}
    if not panels:
        raise PlotError(f"no line of metrics has the fields that --what {args.what} draws")
    if args.output is not None:
        draw_picture(panels, args.x, args.output)
        return 0
    width, lines = shutil.get_terminal_size()
    for panel, curves in panels.items():
        command.say(draw_text(curves, panel, args.x, width, min(lines, 40) - len(curves) - 4))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command.run("plot.py", lambda: plot(argv), (PlotError,))


if __name__ == "__main__":
    sys.exit(main())
