"""The pictures of a suite: quality against size, loss curves, time and memory; single runs are dots, as PNG, PDF and SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .adapters import ADAPTERS
from .execution import Execution
from .statistics import interval
from .table import Entry

PICTURES = ("pareto", "costs")
FORMATS = ("png", "pdf", "svg")
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = (
    *("#000000", "#777777", "#E69F00", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#882255", "#CC79A7", "#B8A800"),
    "#332288",
)
LOOKS = dict(zip(ADAPTERS, zip(COLOURS, "soDX^v<d>Pp", strict=True), strict=True))
ROOM = 1.15  # around the sizes
BESIDE = 1.025  # where a seed's dot is, of its adapter's place
MARKERS_OF_VARIANTS = "*h8H"
Looks = dict[str, tuple[Any, str]]  # colour and marker, by adapter


def draw(found: list[Entry], execution: Execution) -> None:
    """Write the pictures into the suite's folder."""
    tasks, looks = execution.suite.task_names, _looks(execution.suite.variants)
    made = dict(zip(PICTURES, (_pareto(found, tasks, looks), _costs(found, looks)), strict=True))
    for task in tasks:
        of_task = [entry for entry in found if entry.task == task]
        made[f"curves-{task}"] = _curves(of_task, execution.prepared(task).floor, looks)
    for name, figure in made.items():
        _save(figure, execution.folder / name)


def _save(figure: Any, path: Path) -> None:
    """Write a picture in all formats; the same figures give the same bytes, and texts stay texts in the PDF."""
    from matplotlib import rc_context

    undated: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    with rc_context({"svg.hashsalt": path.name, "pdf.fonttype": 42}):
        for kind in FORMATS:
            figure.savefig(path.with_name(f"{path.name}.{kind}"), dpi=150, metadata=undated.get(kind))


def _looks(variants: Iterable[str]) -> Looks:
    """Return the looks of the adapters, and of as many variants as there are."""
    from matplotlib import colormaps

    colours = [colormaps["tab20b"](4 * (i % 5) + i // 5) for i in range(20)]  # neighbours differ in hue
    marks = MARKERS_OF_VARIANTS
    return LOOKS | {name: (colours[i % len(colours)], marks[i % len(marks)]) for i, name in enumerate(variants)}


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # with a canvas of its own: pyplot's state is the caller's

    return Figure(figsize=(width, height), layout="constrained")


def _pareto(found: list[Entry], tasks: list[str], looks: Looks) -> Any:
    figure = _figure(4.6 * len(tasks) + 1.6, 4.2)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for entry in found:
            value = entry.mean("valid loss")
            if entry.task == task and value is not None:
                colour, marker = looks[entry.method.adapter]
                seeds = list(entry.values("valid loss").values())
                axes.plot([entry.parameters * BESIDE] * len(seeds), seeds, ".", color=colour, ms=5, zorder=3)
                style = {"fmt": marker, "color": colour, "capsize": 3, "ms": 7, "mfc": "none"}
                axes.errorbar(entry.parameters, value.mean, yerr=value.half or 0, label=_name(entry), **style)
        axes.set(xscale="log", xlabel="trainable parameters", ylabel="validation loss (nats a token)", title=task)
        sizes = [entry.parameters for entry in found]
        axes.set_xlim(min(sizes) / ROOM, max(sizes) * ROOM)  # of every task the same, and of one without figures yet
        _plain_ticks(axes)
        axes.grid(alpha=0.3)
    _legend(figure, panels)
    return figure


def _plain_ticks(axes: Any) -> None:
    """Write round sizes out: 20,000; on a logarithmic axis that spans little, where there are few of them, at equal distances."""
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_xlim()
    digits = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    shown = [step * 10**power for power in digits for step in (1, 2, 5) if low <= step * 10**power <= high]
    if len(shown) < 3:
        shown = [value for value in MaxNLocator(4).tick_values(low, high) if low <= value <= high]
    axes.set_xticks(shown, [f"{value:,.0f}" for value in shown])
    axes.minorticks_off()


def _curves(found: list[Entry], floor: dict[str, float], looks: Looks) -> Any:
    figure = _figure(11, 4.4)
    panels = figure.subplots(1, 2)
    for axes, key, title in zip(panels, ("train loss", "valid loss"), ("training", "validation"), strict=True):
        late: list[float] = []  # ends of the bands after a quarter of the steps
        for entry in found:
            curve = _smooth(entry.curve(key)) if key == "train loss" else entry.curve(key)
            bands = {step: interval(values) for step, values in sorted(curve.items())}
            points = [(step, band.mean, band.half or 0.0) for step, band in bands.items() if band is not None]
            if not points:
                continue
            steps, means, halves = (list(column) for column in zip(*points, strict=True))
            colour, marker = looks[entry.method.adapter]
            style = {"marker": marker, "ms": 5, "markevery": max(1, len(steps) // 10), "lw": 1.3}
            axes.plot(steps, means, color=colour, label=_name(entry), **style)
            if key == "valid loss":  # the training's are too many
                single = [(step, value) for step, values in sorted(curve.items()) for value in values]
                aside = 0.012 * steps[-1]
                axes.plot([step + aside for step, _ in single], [value for _, value in single], ".", color=colour, ms=4)
            low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
            late += [end for step, *ends in zip(steps, low, high, strict=True) if step >= steps[-1] / 4 for end in ends]
        axes.set(xlabel="step", ylabel="loss (nats a token)", title=f"{title}, mean and 95 % interval over seeds")
        axes.grid(alpha=0.3)
        bottom, top = axes.get_ylim()
        if late and 0 < (room := max(late) - min(late)) < (top - bottom) / 2:  # a steep start would leave the rest no room
            axes.set_ylim(min(late) - room / 10, max(late) + room / 10)
            axes.set_title(f"{axes.get_title()}\n(the start is above)")
    if floor:
        panels[1].axhline(floor["validation"], color="black", linestyle=":", label="the teacher")
    _legend(figure, panels[1:])
    return figure


def _smooth(curve: dict[int, list[float]], width: int = 10) -> dict[int, list[float]]:
    """Return means over `width` steps, seed by seed."""
    steps, found = sorted(curve), {}
    for start in range(0, len(steps) - width + 1, width):
        part = [curve[step] for step in steps[start : start + width]]
        found[steps[start + width - 1]] = [sum(values) / len(values) for values in zip(*part, strict=False)]
    return found or curve


def _costs(found: list[Entry], looks: Looks) -> Any:
    names = list(dict.fromkeys(_name(entry) for entry in found))
    figure = _figure(11, 1.2 + 0.32 * len(names))
    time, memory = figure.subplots(1, 2, sharey=True)
    for axes, keys, scale, label in (
        (time, ("train_time",), 1.0, "seconds of training: median; dots: runs"),
        (
            memory,
            ("accelerator_memory_max", "cpu_memory_max"),
            2**20,
            "peak memory of the process, MiB: median; dots: runs",
        ),
    ):
        for place, name in enumerate(names):
            of_name = [entry for entry in found if _name(entry) == name]
            values = sorted(value for entry in of_name if (value := _cost(entry, keys)))
            if values:
                axes.barh(place, values[len(values) // 2] / scale, color=looks[name.split(",")[0]][0], alpha=0.7)
                single = [value / scale for entry in of_name for value in entry.each(keys)]
                axes.plot(single, [place] * len(single), ".", color="black", ms=3, alpha=0.6)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3, axis="x")
    time.set_yticks(range(len(names)), names)
    time.invert_yaxis()
    return figure


def _cost(entry: Entry, keys: tuple[str, ...]) -> float | None:
    return next((value for key in keys if (value := entry.largest(key))), None)


def _name(entry: Entry) -> str:
    return entry.method.label


def _legend(figure: Any, panels: Any) -> None:
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    title = "dots: single seeds"
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, title=title)
