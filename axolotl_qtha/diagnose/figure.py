"""The diagnostics as one figure: at initialisation above, the trained circuits below."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..circuit.expressibility import BINS, log_haar
from .report import SHOWN, Diagnosis, beside, entangling, gradient, local, short_name
from .study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # told apart by the colour-blind as well
GREY = "#888888"


def draw(found: Diagnosis, paths: Iterable[Path]) -> None:
    """Write the figure to each path, in the format of its ending."""
    from matplotlib.figure import Figure  # with a canvas of its own: pyplot's state is the caller's

    rows = 3 if found.trained else 2
    figure = Figure(figsize=(13, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, 3)
    _variance(panels[0, 0], found)
    _lines(panels[0, 1], found, "KL(fidelities || Haar), nats", lambda each: each.expressibility.kl)
    _haar(panels[0, 1], found, lambda each: each.expressibility.haar, "Haar-random states, same sample")
    panels[0, 1].set_yscale("log")
    _lines(panels[0, 2], found, "entangling capability Q", lambda each: each.entangling.value)
    _haar(panels[0, 2], found, lambda each: each.entangling_haar, "Haar-random states")
    panels[0, 2].set_ylim(0, 1.05)
    _fourier(panels[1, 0], found)
    title = f"effective dimension / angles ({SHOWN:,} data)"
    _lines(panels[1, 1], found, title, lambda each: each.effective[SHOWN] / each.angles)
    panels[1, 1].set_ylim(0, 1)
    panels[1, 1].legend(fontsize=8)
    _fidelities(panels[1, 2], found)
    if found.trained:
        _trained(panels[2, 0], found, gradient, "squared gradients of <Z>")
        _trained(panels[2, 1], found, entangling, "Q of the tokens' states")
        _trained(panels[2, 2], found, local, f"local effective dimension / angles\n({SHOWN:,} data)")
    for path in paths:
        figure.savefig(path, dpi=150)


def _by_layers(found: Diagnosis) -> dict[int, list[Study]]:
    """Return the studies of each number of layers, by qubits."""
    numbers = sorted({each.layers for each in found.studies})
    return {n: sorted((s for s in found.studies if s.layers == n), key=lambda each: each.qubits) for n in numbers}


def _label(layers: int) -> str:
    return f"{layers} layer{'s' * (layers > 1)}"


def _at_qubits(axes: Axes, found: Diagnosis, title: str) -> None:
    axes.set(xlabel="qubits", ylabel=title, xticks=sorted({each.qubits for each in found.studies}))


def _lines(axes: Axes, found: Diagnosis, title: str, value: Callable[[Study], float]) -> None:
    for colour, (layers, studies) in zip(COLOURS * 9, _by_layers(found).items(), strict=False):
        axes.plot([s.qubits for s in studies], [value(s) for s in studies], "o-", color=colour, label=_label(layers), ms=4)
    _at_qubits(axes, found, title)


def _haar(axes: Axes, found: Diagnosis, value: Callable[[Study], float], label: str) -> None:
    at = {each.qubits: value(each) for each in found.studies}
    axes.plot(sorted(at), [at[n] for n in sorted(at)], "s:", color=GREY, label=label, ms=3)
    axes.legend(fontsize=8)


def _variance(axes: Axes, found: Diagnosis) -> None:
    costs = {"readouts": ("o-", "sum over <Z>"), "local": ("^-.", "local cost"), "global_": ("s--", "global cost")}
    for cost, (style, name) in costs.items():
        for colour, (layers, studies) in zip(COLOURS * 9, _by_layers(found).items(), strict=False):
            spreads = [getattr(each.variance, cost) for each in studies]
            axes.errorbar(
                [each.qubits for each in studies],
                [spread.value for spread in spreads],
                [spread.error for spread in spreads],
                fmt=style,
                color=colour,
                ms=4,
                label=f"{name}, {_label(layers)}" if cost == "readouts" or layers == min(_by_layers(found)) else None,
            )
    axes.set_yscale("log", base=2)
    axes.legend(fontsize=7)
    _at_qubits(axes, found, "variance of gradients")


def _fourier(axes: Axes, found: Diagnosis) -> None:
    own = found.own().fourier
    series = [("initialisation", own.frequencies, own.amplitudes, COLOURS[0])]
    longest = max((each.fourier.frequencies for each in found.trained), key=len, default=[])
    if found.trained:
        powers = [np.pad(each.fourier.amplitudes, (0, len(longest) - len(each.fourier.amplitudes))) for each in found.trained]
        mean = np.sqrt(np.mean(np.square(powers), axis=0))
        series.append(("trained, root mean square over layers", longest, mean.tolist(), COLOURS[1]))
    width = 0.8 / len(series)
    for k, (name, frequencies, amplitudes, colour) in enumerate(series):
        places = np.array(frequencies) + (k - (len(series) - 1) / 2) * width
        axes.bar(places, amplitudes, width, color=colour, label=name)
    axes.set(xlabel="frequency of <Z> in an encoded input (1 / radian)", ylabel="|c| (root mean square)")
    axes.set_xticks(sorted({*own.frequencies, *longest}))
    axes.set_title(_own(found), fontsize=9)
    axes.legend(fontsize=8)


def _fidelities(axes: Axes, found: Diagnosis) -> None:
    own, edges = found.own(), np.linspace(0, 1, BINS + 1)
    axes.stairs(np.exp(log_haar(own.qubits)) * BINS, edges, color=GREY, fill=True, alpha=0.4, label="Haar")
    axes.stairs(np.array(own.expressibility.histogram) * BINS, edges, color=COLOURS[0], label="initialisation")
    same = [each.trained.expressibility.histogram for each in found.trained if each.qubits == own.qubits]
    if same:
        axes.stairs(np.mean(same, axis=0) * BINS, edges, color=COLOURS[1], label="trained, pairs of tokens, mean over layers")
    axes.set(xlabel="fidelity of two states", ylabel="density", yscale="log")
    axes.set_ylim(BINS / own.expressibility.pairs / 3, 2 * BINS)  # below: less than one of the pairs
    axes.set_title(_own(found), fontsize=9)
    axes.legend(fontsize=8)


def _own(found: Diagnosis) -> str:
    own = found.own()
    return f"the configuration's circuit: {own.qubits} qubits, {_label(own.layers)}"


def _trained(axes: Axes, found: Diagnosis, value: Any, title: str) -> None:
    rows = [beside(each, value) for each in found.trained]
    places = np.arange(len(rows))
    middle, off = [row[1] for row in rows], [row[2] for row in rows]
    axes.errorbar(places, middle, off, fmt="s", color=COLOURS[0], ms=4, label="random angles, mean ± std")
    axes.plot(places, [row[0] for row in rows], "o", color=COLOURS[1], label="trained")
    shown = places if len(places) <= 32 else places[:: len(places) // 16]
    axes.set_xticks(shown, [short_name(found.trained[place], found) for place in shown], rotation=90, fontsize=6)
    axes.set(ylabel=title)
    axes.legend(fontsize=8)
