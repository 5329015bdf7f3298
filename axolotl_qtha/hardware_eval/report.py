"""What a hardware evaluation found: tables, hardware_eval.json, and a picture."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..circuit.own import z_labels
from .evaluate import DEVICE, EXACT, NOISE, Way

if TYPE_CHECKING:
    from matplotlib.axes import Axes

JSON, PICTURE = "hardware_eval.json", "hardware_eval.png"


@dataclass
class Evaluation:
    """What was evaluated, and what came out."""

    samples: int
    tokens: int  # of the answers
    circuits: int  # of each way, over all layers
    layers: int
    text: str  # where it is from
    limit: int | None  # tokens of each sample whose circuits were run; None: all
    qpu_seconds: float  # what the device billed for this evaluation
    facts: dict[str, Any]  # the device, the circuit and how it was run
    ways: list[Way]
    provenance: dict[str, Any] = field(default_factory=dict)  # see `evidence`

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return dataclasses.asdict(self)

    def write(self, folder: Path) -> None:
        """Write hardware_eval.json and hardware_eval.png."""
        folder.mkdir(parents=True, exist_ok=True)
        draw(self, folder / PICTURE)
        (folder / JSON).write_text(json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n")


def model_table(found: Evaluation) -> Table:
    """Return the figures of the whole model."""
    some = "all their tokens" if found.limit is None else f"the last {found.limit} tokens of each"
    table = Table(
        title=f"{found.samples:,} answers, {found.tokens:,} tokens, of {found.text}",
        caption=f"{found.circuits:,} circuits each way: {found.layers} layers, {some}. log-likelihood: mean of an answer's "
        "token, less the exact one, in nats, ± standard error over answers. Agreement: the first choice is the exact one, for "
        f"each token, and for all tokens of an answer. {verdict(found)}",
        caption_justify="left",
    )
    for head in ("circuits", "perplexity", "log-likelihood", "KL to exact", "tokens agree", "answers agree", "wall s"):
        table.add_column(head, justify="left" if head == "circuits" else "right")
    for way in found.ways:
        error = "" if way.standard_error is None else f" ± {way.standard_error:.1g}"
        difference = "" if way.name == EXACT else f"{way.difference:+.2g}{error}"
        agreement = f"{way.token_agreement:.1%}", f"{way.answer_agreement:.1%}"
        table.add_row(
            _label(way, found), f"{way.perplexity:,.3f}", difference, f"{way.kl:.2g}", *agreement, f"{way.seconds:,.1f}"
        )
    return table


def qubit_table(found: Evaluation) -> Table:
    """Return how far each qubit is off."""
    table = Table(
        title="<Z> less the exact <Z> of the same circuits",
        caption="bias: mean over layers and tokens. std: around it; shots alone explain the share given by their standard error.",
        caption_justify="left",
    )
    for head in ("circuits", _read_out(found), "bias", "std", "standard error", "largest"):
        table.add_column(head, justify="left" if head == "circuits" else "right")
    for way in found.ways:
        if way.deviation is None:
            continue
        columns = dataclasses.astuple(way.deviation)
        for i, (bias, std, worst, error) in enumerate(zip(*columns, strict=True)):
            name = _label(way, found) if i == 0 else ""
            where = f"{i}{_places(way, found, i)}" if _read_out(found) == "qubit" else found.facts["observables"][i]
            table.add_row(name, where, f"{bias:+.4f}", f"{std:.4f}", f"{error:.4f}", f"{worst:.4f}")
    return table


def _read_out(found: Evaluation) -> str:
    """Return what <Z> is of: qubits, or observables of a circuit of the user's own."""
    labels = found.facts["observables"]
    return "qubit" if tuple(labels) == z_labels(len(labels[0]))[: len(labels)] else "observable"


def _places(way: Way, found: Evaluation, qubit: int) -> str:
    """Return where on the device a qubit is; the noise model has one block, on the qubits Qiskit takes for it."""
    used, pack = found.facts["qubits"], found.facts["pack"]
    if way.name == DEVICE:
        return f" (on {', '.join(str(where) for where in used[qubit :: len(used) // pack])})"
    return f" (on {used[qubit]})" if way.name == NOISE and pack == 1 else ""


def packing(found: Evaluation) -> str | None:
    """Return what packing does to <Z>, in a sentence; None where a circuit of the device holds one of ours."""
    device = next(way for way in found.ways if way.name == DEVICE)
    if not device.by_place:
        return None
    alone = next(way for way in found.ways if way.name == NOISE).deviation
    assert alone is not None
    each = ", ".join(f"{off:.3f}" for off in device.by_place)
    one = math.sqrt(sum(b**2 + s**2 for b, s in zip(alone.bias, alone.std, strict=True)) / len(alone.bias))
    return (
        f"{found.facts['pack']} blocks a circuit: <Z> is off by {each} (root mean square, shots included) in its places; by the "
        f"noise model of one block alone, on the qubits Qiskit takes for it, by {one:.3f}."
    )


def verdict(found: Evaluation) -> str:
    """Return whether the device changes the likelihood of the answers by more than chance."""
    device = next(way for way in found.ways if way.name == DEVICE)
    if device.standard_error is None:
        return "One answer says nothing about chance: take more --samples."
    half = _half_interval(device, found.samples)
    low, high = device.difference - half, device.difference + half
    interval = f"(95 % interval {low:+.2g} to {high:+.2g} nats a token, {found.samples} answers)"
    if low <= 0 <= high:
        return f"The device's log-likelihood is not told apart from the exact one {interval}."
    return f"The device's log-likelihood is {'lower' if high < 0 else 'higher'} than the exact one {interval}."


def _half_interval(way: Way, samples: int) -> float:
    """Return half the 95 % interval of the difference (Student's t over answers), 0 where it has no standard error."""
    from scipy.stats import t

    return 0.0 if way.standard_error is None else float(t.ppf(0.975, samples - 1)) * way.standard_error


def _label(way: Way, found: Evaluation) -> str:
    return str(found.facts["device"]) if way.name == DEVICE else way.name


def draw(found: Evaluation, path: Path) -> None:
    """Draw the deviation of each qubit, the likelihood, and <Z> against the exact <Z>."""
    from matplotlib.figure import Figure  # with a canvas of its own: pyplot's state is the caller's
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    deviations, likelihoods, scatter = figure.subplots(1, 3)
    others = [way for way in found.ways if way.deviation is not None]
    _draw_deviations(deviations, others, found)
    for i, way in enumerate(others):
        error = _half_interval(way, found.samples)
        likelihoods.errorbar([way.difference], [i], xerr=[error], marker="o", capsize=4, color=f"C{i}")
        scatter.scatter(*zip(*way.points, strict=True), s=5, alpha=0.4, color=f"C{i}", linewidths=0)
    likelihoods.axvline(0, color="grey", linewidth=1)
    likelihoods.set_yticks(range(len(others)), [_label(way, found) for way in others])
    likelihoods.xaxis.set_major_locator(MaxNLocator(4))
    likelihoods.set(xlabel="log-likelihood less the exact one (nats a token), 95 %", ylim=(len(others) - 0.5, -0.5))
    scatter.plot([-1, 1], [-1, 1], color="grey", linewidth=1)
    scatter.set(xlabel="exact <Z>", ylabel="<Z>", xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal")
    for axes in (likelihoods, scatter):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{found.facts['device']}, {found.facts['executions']:,} shots, {found.circuits:,} circuits each way")
    figure.savefig(path, dpi=150)


def _draw_deviations(axes: Axes, ways: list[Way], found: Evaluation) -> None:
    for i, way in enumerate(ways):
        assert way.deviation is not None
        places = [qubit + (i - (len(ways) - 1) / 2) * 0.2 for qubit in range(len(way.deviation.bias))]
        axes.errorbar(places, way.deviation.bias, yerr=way.deviation.std, fmt="o", capsize=4, label=_label(way, found))
    axes.axhline(0, color="grey", linewidth=1)
    labels = found.facts["observables"]
    axes.set_xticks(range(len(labels)), [*map(str, range(len(labels)))] if _read_out(found) == "qubit" else labels)
    axes.set(xlabel=_read_out(found), ylabel="<Z> less the exact <Z>: mean, ± std")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(ways))
