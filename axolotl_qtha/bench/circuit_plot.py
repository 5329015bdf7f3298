"""The picture of `bench/circuit.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart; ours in black.
COLOURS = ("#000000", "#666666", "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS = "osD^v<>P"


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Write time against qubits and against tokens, one line per engine, on logarithmic axes."""
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    layers, tokens, qubits = ([*sorted({row[key] for row in rows})] for key in ("layers", "tokens", "qubits"))
    depth, width = layers[len(layers) // 2], max((q for q in qubits if q <= 8), default=qubits[0])
    batch = tokens[len(tokens) // 2]
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)  # no display needed
    left, right = figure.subplots(1, 2)
    by_qubits = [row for row in rows if (row["layers"], row["tokens"]) == (depth, batch)]
    by_tokens = [row for row in rows if (row["layers"], row["qubits"]) == (depth, width)]
    _panel(left, by_qubits, engines, "qubits", f"{depth} layers, {batch:,} tokens")
    _panel(right, by_tokens, engines, "tokens", f"{depth} layers, {width} qubits")
    right.set_xscale("log", base=2)
    right.set_xticks(tokens, [f"{count:,}" for count in tokens], minor=False)
    right.minorticks_off()
    left.set_xticks(qubits)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _panel(axes: Axes, rows: list[dict[str, Any]], engines: list[str], key: str, title: str) -> None:
    for engine, colour, marker in zip(engines, COLOURS, MARKERS, strict=False):
        points = sorted((row[key], row["milliseconds"]) for row in rows if row["engine"] == engine)
        axes.plot(*zip(*points, strict=True) if points else ([], []), color=colour, marker=marker, label=engine, lw=1.5, ms=5)
    axes.set(yscale="log", xlabel=key, ylabel="milliseconds", title=title)
    axes.grid(alpha=0.3, which="major")
