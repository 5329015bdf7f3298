"""What the diagnostics of a training say, as a table and a picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from . import checkpoints

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STATE = "trainer_state.json"
SHARE = "qtha/quantum_share"
PARTS = ("angles", "cores", "classical")
NAMES = {
    "loss": "training loss (nats a token)",
    "eval_loss": "evaluation loss (nats a token)",
    SHARE: "||W_Q q|| / ||W_C z||",
    "qtha/z_variance": "variance of <Z> over tokens",
    "qtha/wrapped": "share of angles beyond pi",
    "qtha/effective_rank": "effective rank of B W_C A",
    **{f"qtha/grad_norm_{part}": f"gradient norm, {part}" for part in PARTS},
}
Row = dict[str, Any]


def read_log(folder: Path) -> list[Row]:
    """Return the rows of a training's log.

    Raises:
        ValueError: if there is no log in the folder or its checkpoints, or none with diagnostics.
    """
    folders = (folder, *reversed(checkpoints.of_run(folder)))
    path = next((path / STATE for path in folders if (path / STATE).is_file()), None)
    if path is None:
        works = "the output_dir of a training that saved a checkpoint (`save_steps`)"
        raise ValueError(f"OUTPUT_DIR: {str(folder)!r} and its checkpoints hold no {STATE}. What works: {works}.")
    try:
        rows: list[Row] = json.loads(path.read_text())["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"OUTPUT_DIR: {path} cannot be read ({type(error).__name__}). What works: an undamaged one.") from error
    if not any(key.startswith("qtha/") for row in rows for key in row):
        works = "a training with `adapter: qtha` and `qtha: {diagnostics_steps: 10}`"
        raise ValueError(f"OUTPUT_DIR: {path} holds no diagnostics. What works: {works}.")
    return rows


def series(rows: list[Row], key: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of what was logged under a name."""
    found = {row["step"]: float(row[key]) for row in rows if key in row}
    return sorted(found), [found[step] for step in sorted(found)]


def table(rows: list[Row]) -> Table:
    """Return the first and last value of each."""
    result = Table(title="first and last measurement")
    for head in ("", "first", "at step", "last", "at step"):
        result.add_column(head, justify="right" if head else "left")
    for key, name in NAMES.items():
        steps, values = series(rows, key)
        if steps:
            result.add_row(name, f"{values[0]:.4g}", f"{steps[0]}", f"{values[-1]:.4g}", f"{steps[-1]}")
    return result


def draw(rows: list[Row], path: Path) -> None:
    """Write the picture; a quantity that was not measured says so."""
    from matplotlib.figure import Figure  # with a canvas of its own: pyplot's state is the caller's

    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(2, 3).flat
    _lines(panels[0], rows, ["loss", "eval_loss"], "loss (nats a token)", ["training", "evaluation"])
    _share(panels[1], rows)
    _lines(panels[2], rows, [f"qtha/grad_norm_{part}" for part in PARTS], "norm of the gradients", list(PARTS), log=True)
    for axes, key in zip(list(panels)[3:], ("qtha/z_variance", "qtha/wrapped", "qtha/effective_rank"), strict=True):
        _lines(axes, rows, [key], NAMES[key], [None])
    figure.savefig(path, dpi=150)


def _lines(axes: Axes, rows: list[Row], keys: list[str], title: str, labels: list[Any], log: bool = False) -> None:
    drawn = False
    for key, label in zip(keys, labels, strict=True):
        steps, values = series(rows, key)
        if log:  # which has no place for the zeros of the first step
            steps, values = [step for step, value in zip(steps, values, strict=True) if value > 0], [v for v in values if v > 0]
        if steps:
            axes.plot(steps, values, marker="o" if len(steps) < 60 else None, ms=4, label=label)
            drawn = True
    _finish(axes, title, drawn)
    if drawn and log:
        axes.set_yscale("log")
    if drawn and labels[0]:
        axes.legend(frameon=False)


def _share(axes: Axes, rows: list[Row]) -> None:
    """Draw the quantum share of each layer, the deeper the darker, and their mean."""
    from matplotlib import colormaps

    layers = sorted({key for row in rows for key in row if key.startswith(f"{SHARE}/")}, key=_depth)
    for i, key in enumerate(layers):
        steps, values = series(rows, key)
        colour = colormaps["viridis_r"](0.15 + 0.85 * i / max(1, len(layers) - 1))
        label = key.rpartition("/")[2].replace("_", " ") if i in (0, len(layers) - 1) else None
        axes.plot(steps, values, color=colour, lw=1, label=label)
    steps, values = series(rows, SHARE)
    if steps:
        axes.plot(steps, values, color="black", lw=2, marker="o", ms=4, label="mean of all layers")
        axes.legend(frameon=False)
    _finish(axes, NAMES[SHARE], bool(steps))


def _depth(key: str) -> tuple[int, str]:
    number = re.search(r"(\d+)$", key)
    return int(number.group(1)) if number else -1, key


def _finish(axes: Axes, title: str, drawn: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="step", title=title)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not drawn:
        axes.text(0.5, 0.5, "not measured here", transform=axes.transAxes, ha="center", color="grey")
