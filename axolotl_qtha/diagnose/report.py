"""What the diagnostics found: tables, and diagnose.json, which says of each number what it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from ..version import __version__, versions
from .study import DATA, DRAWS, INPUTS, SERIES, Slope, Study
from .trained import AtAngles, TrainedCircuit

JSON, PICTURES = "diagnose.json", ("diagnose.png", "diagnose.pdf")
SHOWN = 10_000  # data points whose effective dimension the tables have
PACKAGES = ("torch", "numpy", "scipy", "qiskit")
DEFINITIONS = {
    "initialisation": "z standard normal, encoded as the configuration's angle_scale says; trained angles uniform in [-a, a], a "
    "its init_angles; both drawn anew for each initialisation and state",
    "variance.readouts": "sum_i Var d<Z_i>/d theta_k over initialisations, mean over all trained angles k; what a loss sees "
    "whose gradients at the <Z_i> are uncorrelated and of variance 1. McClean et al., arXiv 1803.11173",
    "variance.local": "the same of the cost 1 - mean_i <|0><0|_i. Cerezo et al., arXiv 2001.00550",
    "variance.global": "the same of the cost 1 - <|0...0><0...0|>. Cerezo et al., arXiv 2001.00550",
    "error": "standard error over initialisations, or states",
    "slope": "of log2 of a variance against the qubits, least squares; error: standard error of the fit",
    "expressibility.kl": "KL(fidelities of pairs of states || Haar) in nats, 75 equal bins. Sim et al., arXiv 1905.10876. Biased "
    "upwards by about (occupied bins - 1) / (2 pairs): `haar` is what as many fidelities of Haar-random states give on average "
    "(their true value is 0), `haar_std` how far that scatters. With many qubits nearly all of Haar lies in the first bin, and "
    "the number then tells little",
    "entangling": "Meyer and Wallach's Q = 2 (1 - mean_k Tr rho_k^2), arXiv quant-ph/0108104, in the form of Brennen, arXiv "
    "quant-ph/0305094, mean over states; `entangling_haar`: that of Haar-random states, (N - 2) / (N + 1)",
    "fourier": f"|c_w| of <Z_i> as a function of one encoded input (in radians), the others held: root mean square over {SERIES} "
    "draws (at initialisation) or tokens (trained), all inputs and outputs. Accessible: above 1e-9 in any. Schuld et al., arXiv "
    "2008.08605",
    "effective": "2 log(mean over angles of sqrt det(1 + k F)) / log k, k = n / (2 pi log n), gamma 1, by the number of data n; "
    "F: the Fisher information of a model with outputs <Z_i> and Gaussian noise of variance 1, mean J^T J over z, normalised to "
    f"a mean trace of the number of angles; {DRAWS} draws of the angles, at initialisation {INPUTS} of z for each, trained the "
    "tokens' z. Abbas et al., arXiv 2011.00027",
    "local_effective": "the same at one point, F of these angles alone (the limit of a small ball). Abbas, Figalli, Woerner, "
    "arXiv 2112.04807",
    "gradient": "sum_i (d<Z_i>/d theta_k)^2 at given angles, mean over tokens and angles k",
    "trained": f"z of the layers on the data; `random`: {DRAWS} draws of uniform angles on the same z. Pairs of states are of "
    "two tokens whose z differ by 1e-3 radians or more (in the first layer a word has one z), and pairs share tokens: their "
    "fidelities scatter more than independent ones",
}


@dataclass
class Diagnosis:
    """What was asked, and what came out."""

    circuit: dict[str, Any]  # of the configuration
    options: dict[str, Any]
    studies: list[Study]
    slopes: list[Slope]
    trained: list[TrainedCircuit]
    text: str | None  # the data that z is from

    def own(self) -> Study:
        """Return the study of the configuration's own circuit."""
        wanted = self.circuit["qubits"], self.circuit["layers"]
        return next(each for each in self.studies if (each.qubits, each.layers) == wanted)

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        found = _renamed(dataclasses.asdict(self))
        for at in (at for each in found["trained"] for at in each["random"]):
            del at["expressibility"]["histogram"]  # most of the file would be these
        package = {"axolotl_qtha": __version__, **versions(PACKAGES)}
        result: dict[str, Any] = {"definitions": DEFINITIONS, "versions": package, **found}
        return result

    def write(self, folder: Path) -> None:
        """Write diagnose.json."""
        (folder / JSON).write_text(json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n")


def _renamed(value: Any) -> Any:
    """Return the same with `global` in the place of the name that Python does not allow."""
    if isinstance(value, dict):
        return {("global" if key == "global_" else key): _renamed(each) for key, each in value.items()}
    return [_renamed(each) for each in value] if isinstance(value, list | tuple) else value


def study_table(found: Diagnosis) -> Table:
    """Return the circuits at initialisation."""
    asked = found.options
    table = Table(
        title=f"at initialisation: {asked['initialisations']:,} initialisations, {asked['pairs']:,} pairs of states",
        caption="Var: of gradients over initialisations, mean over the trained angles: summed over the <Z_i>; of the local cost; "
        "of the global cost. KL: of fidelities to Haar's, in nats; what Haar-random states give. Q: Meyer-Wallach, and Haar's "
        f"mean. w: the frequencies of <Z> in an input. d_eff / d: effective dimension for {SHOWN:,} data, by the angles. *: the "
        "configuration's own circuit.",
        caption_justify="left",
    )
    for head in ("qubits", "layers", "Var <Z>", "Var local", "Var global", "KL", "Haar", "Q", "Haar", "w", "d_eff / d"):
        table.add_column(head, justify="right")
    own = found.own()
    for each in found.studies:
        kl = each.expressibility
        table.add_row(
            f"{'* ' if each is own else ''}{each.qubits}",
            str(each.layers),
            *(f"{each.variance.readouts.value:.3f}", f"{each.variance.local.value:.2g}", f"{each.variance.global_.value:.2g}"),
            *(f"{kl.kl:.3f}", f"{kl.haar:.3f}", f"{each.entangling.value:.3f}", f"{each.entangling_haar:.3f}"),
            *(_series(each.fourier.accessible), f"{each.effective[SHOWN] / each.angles:.2f}"),
        )
    return table


def _series(values: list[float]) -> str:
    """Return frequencies in short.

    >>> _series([0.0, 1.0, 2.0]), _series([0.5, 2.0]), _series([1.0])
    ('0-2', '0.5, 2', '1')
    """
    if len(values) > 2 and values == [values[0] + i for i in range(len(values))]:
        return f"{values[0]:g}-{values[-1]:g}"
    return ", ".join(f"{value:g}" for value in values)


def slope_lines(slopes: Iterable[Slope]) -> list[str]:
    """Return how the variances fall, in words."""
    return [
        f"{each.layers} layer{'s' * (each.layers > 1)}, {each.cost}: log2 Var changes by {each.slope:+.2f} ± {each.error:.2f} "
        f"a qubit ({each.qubits[0]} to {each.qubits[-1]})"
        for each in slopes
    ]


def trained_table(found: Diagnosis) -> Table:
    """Return the trained circuits, each beside the same with random angles."""
    table = Table(
        title=f"trained, on z of {found.text}",
        caption=f"Trained, and beside it mean ± std for {DRAWS} draws of random angles on the same z. grad: squared "
        "gradients, sum over <Z_i>, mean over tokens and angles. KL, Q: of the tokens' states. d_loc / d: local effective "
        f"dimension for {SHOWN:,} data, by the angles.",
        caption_justify="left",
    )
    table.add_column("layer", overflow="fold")
    for head in ("grad", "KL", "Q", "d_loc / d"):
        table.add_column(head, justify="right")
        table.add_column("random", justify="right")
    for each in found.trained:
        cells: list[str] = []
        for value, digits in ((gradient, 3), (divergence, 2), (entangling, 3), (local, 3)):
            own, middle, off = beside(each, value)
            cells += [f"{own:.{digits}f}", f"{middle:.{digits}f} ± {off:.{digits}f}"]
        table.add_row(short_name(each, found), *cells)
    return table


def short_name(circuit: TrainedCircuit, found: Diagnosis) -> str:
    """Return the end of a layer's name, and which of its circuits it is if layers have several."""
    name = ".".join(circuit.layer.split(".")[-3:])
    return f"{name}, {circuit.block}" if any(other.block for other in found.trained) else name


def gradient(circuit: TrainedCircuit, at: AtAngles) -> float:
    """Return the squared gradients."""
    return at.gradient


def divergence(circuit: TrainedCircuit, at: AtAngles) -> float:
    """Return KL(fidelities || Haar), in nats."""
    return at.expressibility.kl


def entangling(circuit: TrainedCircuit, at: AtAngles) -> float:
    """Return Meyer and Wallach's Q."""
    return at.entangling


def local(circuit: TrainedCircuit, at: AtAngles) -> float:
    """Return the local effective dimension, by the number of angles."""
    return at.local_effective[SHOWN] / circuit.angles


def beside(circuit: TrainedCircuit, value: Callable[[TrainedCircuit, AtAngles], float]) -> tuple[float, float, float]:
    """Return a value of a trained circuit, and its mean and standard deviation for random angles."""
    others = [value(circuit, at) for at in circuit.random]
    return value(circuit, circuit.trained), mean(others), stdev(others)


assert SHOWN in DATA
