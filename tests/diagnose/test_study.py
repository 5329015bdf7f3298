"""A circuit at initialisation, and a trained one: the numbers are those of the functions they are made of, and repeat."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from qiskit.quantum_info import Statevector

from axolotl_qtha import QTHAConfig
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.expressibility import expressibility, fidelities, meyer_wallach
from axolotl_qtha.circuit.statevector import statevector, statevectors
from axolotl_qtha.circuit.torch_engine import expectation_values
from axolotl_qtha.diagnose import study as module
from axolotl_qtha.diagnose.figure import draw
from axolotl_qtha.diagnose.report import DEFINITIONS, Diagnosis, slope_lines
from axolotl_qtha.diagnose.study import draws, generator, sized, slopes, study, uniform
from axolotl_qtha.diagnose.trained import trained_circuit
from axolotl_qtha.tuner.bottleneck import bounded

FEW = {"encode": bounded, "initialisations": 20, "pairs": 200, "seed": 3}


def test_draws():
    """z is standard normal, bounded; the angles are uniform over a turn: both means and variances within 5 standard errors."""
    z, angles = draws(Ansatz(4, 2), 4000, lambda z: z, generator(0, 4, 2))
    assert abs(float(z.mean())) < 5 / 16_000**0.5
    assert abs(float(z.var()) - 1) < 5 * (2 / 16_000) ** 0.5
    assert angles.shape == (4000, 8, 4)
    assert abs(float(angles.var()) - math.pi**2 / 3) < 5 * math.pi**2 * (4 / 45 / 128_000) ** 0.5
    assert float(angles.abs().max()) < math.pi
    bounded_z, same = draws(Ansatz(4, 2), 4000, bounded, generator(0, 4, 2))
    assert torch.equal(bounded_z, bounded(z))
    assert torch.equal(same, angles)


def test_small_initial_angles_start_near_the_encoding_alone():
    """With angles of at most 1e-3 states are those of the encoding, which entangles nothing; Q is quadratic in the angles."""
    found = study(Ansatz(3, 2), **FEW, most=1e-3)
    assert float(uniform(Ansatz(3, 2), 50, generator(0), 1e-3).abs().max()) <= 1e-3
    assert 0 < found.entangling.value < 1e-5 < study(Ansatz(3, 2), **FEW).entangling.value


def test_a_study_is_a_function_of_its_seed_and_size(monkeypatch):
    first, second, other = (study(Ansatz(3, 2), **{**FEW, "seed": seed}) for seed in (3, 3, 4))
    assert first.variance == second.variance
    assert first.expressibility == second.expressibility
    assert first.fourier == second.fourier
    assert first.effective == second.effective
    assert first.variance != other.variance
    monkeypatch.setattr(module, "AMPLITUDES", 16 * 11)  # in parts
    parts = study(Ansatz(3, 2), **FEW)
    assert parts.expressibility.pairs == 200
    assert parts.variance == first.variance


def test_known_parts_of_a_study():
    found = study(Ansatz(3, 2), **FEW)
    assert (found.qubits, found.layers, found.angles) == (3, 2, 24)
    assert found.fourier.accessible == found.fourier.frequencies == [0, 1, 2]
    assert 0 < found.entangling.value < 1
    assert found.entangling_haar == 6 / 9
    assert list(found.effective) == sorted(found.effective)
    assert all(0 < value <= 24 for value in found.effective.values())
    one = study(Ansatz(1, 1), **FEW)
    assert one.entangling.value == pytest.approx(0, abs=1e-14)
    assert one.fourier.accessible == [1]


def test_slopes_are_those_of_a_line():
    """Studies whose variances are made to lie on a line: 2^-n."""
    made = study(Ansatz(2, 1), **FEW)

    def at(qubits, layers):
        spread = type(made.variance.readouts)(2.0**-qubits, 0.0)
        return replace(made, qubits=qubits, layers=layers, variance=type(made.variance)(spread, spread, spread))

    found = slopes([at(n, layers) for n in (4, 5, 7) for layers in (1, 2)] + [at(3, 1)], [4, 5, 7])
    assert [(each.cost, each.layers) for each in found] == [(c, n) for n in (1, 2) for c in ("readouts", "local", "global")]
    assert all(each.slope == pytest.approx(-1) for each in found)
    assert all(each.qubits == [4, 5, 7] for each in found)
    assert slopes([at(4, 1), at(5, 1)], [4, 5]) == []
    assert slope_lines(found)[5] == "2 layers, global: log2 Var changes by -1.00 ± 0.00 a qubit (4 to 7)"


@pytest.fixture(scope="module")
def circuit():
    """Return z (40, 3) with a token that comes twice, and angles of a circuit, and what is said of them."""
    random = torch.Generator().manual_seed(1)
    z, angles = (
        torch.randn(40, 3, generator=random, dtype=torch.float64),
        torch.randn(8, 3, generator=random, dtype=torch.float64),
    )
    z[1] = z[0] + 1e-6
    return z, angles, trained_circuit("a.b.c.d", 1, z, angles, Ansatz(3, 2), 500, 0)


def test_a_trained_circuit(circuit):
    z, angles, found = circuit
    states = statevector(z, angles, Ansatz(3, 2))
    assert found.trained.entangling == pytest.approx(float(meyer_wallach(states).mean()), abs=1e-12)
    assert (found.layer, found.block, found.tokens, found.angles) == ("a.b.c.d", 1, 40, 24)
    assert len(found.random) == module.DRAWS
    assert found.fourier.accessible == [0, 1, 2]
    # squared gradients, by central differences with a step of 1e-5, good to 1e-9
    total = 0.0
    for k in range(angles.numel()):
        step = 1e-5 * torch.eye(angles.numel(), dtype=torch.float64)[k].view_as(angles)
        values = [expectation_values(z, angles + s * step, Ansatz(3, 2)) for s in (1, -1)]
        total += float(((values[0] - values[1]) / 2e-5).square().sum(1).mean())
    assert found.trained.gradient == pytest.approx(total / angles.numel(), rel=1e-7)


def test_pairs_are_of_tokens_that_differ(circuit):
    """Two tokens with the same z have a fidelity of 1, which would be all that is seen; the others are pairs at random."""
    z, angles, found = circuit
    assert 450 < found.trained.expressibility.pairs <= 500
    states = statevector(z[2:], angles, Ansatz(3, 2))
    all_pairs = torch.combinations(torch.arange(38))
    everything = expressibility(fidelities(states[all_pairs[:, 0]], states[all_pairs[:, 1]]), 3)
    assert found.trained.expressibility.kl == pytest.approx(everything.kl, abs=0.15)  # 500 of 703 pairs
    same = trained_circuit("a", 0, z[:1].expand(10, -1), angles, Ansatz(3, 2), 100, 0)
    assert same.trained.expressibility.histogram[-1] == 1


def test_files(circuit, tmp_path):
    studies = [study(sized(QTHAConfig(rank=3), n, 2), **FEW) for n in (2, 3, 4)]
    facts = {"qubits": 3, "layers": 2, "angles": 24}
    options = {"initialisations": 20, "pairs": 200, "seed": 3}
    found = Diagnosis(facts, options, studies, slopes(studies, [2, 3, 4]), [circuit[2]], "data")
    found.write(tmp_path)
    read = json.loads((tmp_path / "diagnose.json").read_text())
    assert read["definitions"] == DEFINITIONS
    assert {"axolotl_qtha", "torch", "qiskit"} <= set(read["versions"])
    assert read["studies"][1]["variance"]["global"]["value"] == studies[1].variance.global_.value
    assert read["trained"][0]["trained"]["local_effective"].keys() == {"1000", "10000", "100000", "1000000"}
    assert len(read["trained"][0]["trained"]["expressibility"]["histogram"]) == 75
    assert read["trained"][0]["random"][1]["expressibility"]["kl"] == circuit[2].random[1].expressibility.kl
    assert "histogram" not in read["trained"][0]["random"][1]["expressibility"]
    draw(found, [tmp_path / "a.png", tmp_path / "a.pdf"])
    assert (tmp_path / "a.png").stat().st_size > 20_000
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_a_product_has_no_entanglement_at_any_size():
    circuit = sized(QTHAConfig(rank=4, quantum="product"), 4, 2)
    assert circuit.qubits == 4
    found = study(circuit, **FEW)
    assert abs(found.entangling.value) < 1e-12
    assert found.fourier.accessible == [0.0, 2.0], "<Z_i> is cos(2 z_i + a sum of angles), constant in the other inputs"


def test_a_circuit_of_the_users_own():
    """A CZ ladder: its states are entangled, each input enters twice a layer, so there are frequencies up to 2; the single state
    of one draw is Qiskit's.
    """
    config = QTHAConfig(rank=3, circuit="axolotl_qtha.circuit.examples:cz_ladder", circuit_layers=1)
    circuit = sized(config, 3, 1)
    assert circuit.is_own
    found = study(circuit, **FEW)
    assert found.angles == 6
    assert found.entangling.value > 0.05
    assert max(found.fourier.accessible) <= 2
    z, angles = draws(circuit, 1, lambda z: z, generator(0))
    state = statevectors(z, angles, circuit)[0].numpy()
    assert np.abs(state - Statevector(circuit.bound(z[0], angles[0])).data).max() <= 1e-12
