"""Circuits of the user's own: where they come from, and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from qiskit.circuit import Parameter, ParameterVector, QuantumCircuit
from qiskit.circuit.library import PauliEvolutionGate
from qiskit.quantum_info import Pauli, PauliList, SparsePauliOp, Statevector

from axolotl_qtha.circuit import own, recognised, torch_engine
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.own import called, described, register_circuit
from axolotl_qtha.circuit.recognised import ansatz_of, circuit_of, without_entanglers

LADDER = "axolotl_qtha.circuit.examples:cz_ladder"


def simple(qubits=2, layers=1, **changes):
    z, theta = ParameterVector("z", qubits), ParameterVector("theta", qubits)
    circuit = QuantumCircuit(qubits)
    for i in range(qubits):
        circuit.rx(z[i], i)
        circuit.ry(theta[i], i)
    return {"circuit": circuit, **changes}


def measuring():
    given = simple()
    given["circuit"].measure_all()
    return given


def resetting():
    given = simple()
    given["circuit"].reset(0)
    return given


def one_fixed():
    given = simple()
    return given | {"trained": given["circuit"].parameters[:1]}  # theta[0]; theta[1] stays free


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (measuring(), "measures"),
        (resetting(), "holds 'reset'.*no unitary gate"),
        (simple(3)["circuit"], "takes 3 inputs, and each circuit has 2 numbers.*`qubits: 3`"),
        (QuantumCircuit(2), "takes 0 inputs.*ParameterVector"),
        (simple(observables=["ZZ"]), "gives 1 observables, and each circuit has 2 numbers"),
        (simple(observables=["IZ", "IZI"]), "observable 'IZI', and has 2 qubits.*Z of qubit 0"),
        (simple(observables=[("Z", [0]), ("Z", [2])]), "observes qubit 2 and has 2.*qubits 0 to 1"),
        (simple(observables=["IZ", "II"]), "'II', which is 1 for every state"),
        (simple(observables=["IZ", "QZ"]), "observable 'QZ'"),
        (simple(observables="ZZ"), "a list of Pauli labels"),
        (simple(observables=[("ZZ", [0, 0]), "IZ"]), "a letter for each of its qubits"),
        (one_fixed(), r"leaves theta\[1\] free: neither input nor trained"),
        (simple(inputs=[Parameter("x"), Parameter("y")]), "has no gate with its input 'x'"),
        (simple(shots=5), r"gives unknown \['shots'\]"),
        (7, "gives no circuit, but int"),
        (None, "gives no circuit, but NoneType"),
    ],
)
def test_what_is_no_circuit_is_refused(given, words):
    with pytest.raises(ValueError, match=rf"^qtha\.circuit: 'mine' .*{words}") as error:
        described("mine", given, 2)
    assert "What works: " in str(error.value)


def called_like(name, depth=0):
    given = simple()
    gate = QuantumCircuit(1, name=name)
    gate.h(0)
    for _ in range(depth):
        around = QuantumCircuit(1, name="around")
        around.append(gate.to_gate(), [0])
        gate = around
    given["circuit"].append(gate.to_gate(), [0])
    return given


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", ["x", "ry", "u"])
def test_a_gate_of_ones_own_with_the_name_of_qiskits_is_refused(name, depth):
    with pytest.raises(ValueError, match=rf"^qtha\.circuit: 'mine' has a gate of its own called '{name}', like Qiskit's"):
        described("mine", called_like(name, depth), 2)
    described("mine", called_like("mine", depth), 2)


@pytest.mark.parametrize("function", ["log", "arcsin"])
def test_an_angle_that_is_no_number_everywhere_is_refused(function):
    given = simple()
    given["circuit"].rx(getattr(given["circuit"].parameters[-1], function)(), 0)
    with pytest.raises(ValueError, match=r"^qtha\.circuit: 'mine' has an angle that is no number for all parameters"):
        described("mine", given, 2)


def test_a_circuit_without_angles_is_refused():
    circuit = QuantumCircuit(2)
    for i, z in enumerate(ParameterVector("z", 2)):
        circuit.rx(z, i)
    with pytest.raises(ValueError, match="no parameters besides its inputs"):
        described("mine", circuit, 2)


def test_more_qubits_than_can_be_simulated_are_refused(tmp_path, monkeypatch):
    (tmp_path / "wide_circuits.py").write_text(
        "from axolotl_qtha.circuit.examples import cz_ladder\n\ndef wide(qubits, layers):\n    return cz_ladder(13, 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="13 qubits, more than can be simulated"):
        circuit_of("wide_circuits:wide", 13, 1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:f", "`import no_such_module` fails with ModuleNotFoundError"),
        (
            "axolotl_qtha.circuit.examples:cz_lader",
            "`axolotl_qtha.circuit.examples` was imported and has no `cz_lader`, but .*cz_ladder",
        ),
        ("json:dumps", "called with qubits=2, layers=1 it fails with TypeError"),
        ("unheard-of", "is registered by nothing.*`circuit: my_package.my_module:my_circuit`"),
        ("reupload", "is registered by nothing. What works: .*reuploading"),
        ("a b", "neither an import path nor a name"),
        ("os.path/x:y", "neither an import path nor a name"),
        (7, "neither an import path nor a name"),
    ],
)
def test_a_path_that_leads_nowhere_says_how_far_it_led(name, words):
    with pytest.raises(ValueError, match=rf"^qtha\.circuit: .*{words}"):
        called(name, 2, 1)


def test_a_module_beside_the_yaml_is_found_and_the_path_is_left_as_it_was(tmp_path, monkeypatch):
    import sys

    (tmp_path / "beside_the_yaml.py").write_text("from axolotl_qtha.circuit.examples import cz_ladder as mine\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert called("beside_the_yaml:mine", 3, 1).digest == called(LADDER, 3, 1).digest
    assert sys.path == before


def test_a_registered_name(monkeypatch):
    monkeypatch.setattr(own, "_registered", {})
    register_circuit("my-ladder", simple)
    register_circuit("my-ladder", simple)
    assert called("my-ladder", 2, 1).circuit.num_qubits == 2
    with pytest.raises(ValueError, match=r"'mine' is registered by nothing. What works: `my-ladder`"):
        called("mine", 2, 1)
    for name, function in (("my-ladder", measuring), ("no name", simple)):
        with pytest.raises(ValueError, match="is no name, or that of another circuit"):
            register_circuit(name, function)


def test_an_ansatz_cannot_be_subclassed():
    """A subclass with a circuit of its own would run as the built-in one."""
    with pytest.raises(TypeError, match=r"Mine: .*What works: `qtha: \{circuit: "):
        type("Mine", (Ansatz,), {"circuit": lambda self: QuantumCircuit(2)})


@pytest.mark.parametrize("qubits", [1, 2, 3])
def test_moments_in_any_order_are_recognised(qubits):
    for order in ("encode rotate", "ring encode counter rotate ring", "rotate encode ring rotate encode", "encode encode rotate"):
        ansatz = Ansatz(qubits, 1, order)
        found = recognised.recognised(described("mine", ansatz.circuit(), qubits))
        assert found is not None, order
        assert not found.is_own
        assert found.moments() == ansatz.moments() or qubits <= 2  # on two qubits both rings are the same gates


def test_other_names_of_the_angles_are_recognised():
    z, late, early = ParameterVector("z", 2), ParameterVector("a", 2), ParameterVector("b", 2)
    circuit = QuantumCircuit(2)
    for vector in (z, early, late):
        for i in (1, 0):  # gates side by side in any order
            circuit.ry(vector[i], i)
    assert recognised.recognised(described("mine", circuit, 2)).gate_order == "encode rotate rotate"


def other_gate(circuit):
    circuit.rx(ParameterVector("t", 1)[0], 0)


def angle_twice(circuit):
    for i in range(2):
        circuit.ry(circuit.parameters[0], i)


def not_alike(circuit):
    """Turned by z once in one wall and twice in the next, which the engines cannot."""
    z = [parameter for parameter in circuit.parameters if parameter.name.startswith("z")]
    for _ in range(2):
        for i in range(2):
            circuit.ry(z[i], i)


@pytest.mark.parametrize("change", [other_gate, angle_twice, not_alike])
def test_other_circuits_run_gate_by_gate(change):
    circuit = Ansatz(2, 1).circuit()
    change(circuit)
    assert ansatz_of(described("mine", circuit, 2)).is_own


def test_other_observables_run_gate_by_gate():
    given = {"circuit": Ansatz(2, 1).circuit(), "observables": ["IZ", "ZZ"]}
    assert ansatz_of(described("mine", given, 2)).is_own


def test_what_a_circuit_is_is_told_by_its_digest():
    def digest(**changes):
        return described("mine", simple(**changes), 2).digest

    assert digest() == digest()
    assert digest() != digest(observables=["ZZ", "IZ"])
    shifted = simple()
    shifted["circuit"].rx(0.1, 0)
    assert described("mine", shifted, 2).digest != digest()


def test_an_evolution_is_what_it_is_synthesised_to():
    """Qiskit's Statevector would take the exact matrix of terms that do not commute, and no device would."""
    z, time = ParameterVector("z", 2), Parameter("t")
    circuit = QuantumCircuit(2)
    for i in range(2):
        circuit.rx(z[i], i)
    circuit.append(PauliEvolutionGate(SparsePauliOp(["ZZ", "XI"]), time), range(2))
    own = described("mine", circuit, 2)
    bound = own.circuit.assign_parameters({z[0]: 0.3, z[1]: 0.4, time: 0.7})
    found = torch_engine.expectation_values(
        torch.tensor([[0.3, 0.4]], dtype=torch.float64), torch.tensor([[0.7]], dtype=torch.float64), ansatz_of(own)
    )
    expected = [Statevector(bound).expectation_value(Pauli(label)).real for label in own.observables]
    assert np.abs(found.numpy() - expected).max() <= 1e-12


def test_a_list_of_paulis_names_observables():
    assert described("mine", simple(observables=PauliList(["ZZ", "IX"])), 2).observables == ("ZZ", "IX")


def test_a_module_that_ends_the_process_does_not(tmp_path, monkeypatch):
    (tmp_path / "ends_the_process.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`import ends_the_process` fails with SystemExit: 3"):
        called("ends_the_process:mine", 2, 1)


def test_a_product_circuit_has_no_gate_on_several_qubits():
    full = called(LADDER, 3, 2)
    alone = without_entanglers(LADDER, full)
    assert alone.circuit.num_nonlocal_gates() == 0
    assert full.circuit.num_nonlocal_gates() == 4
    assert alone.trained == full.trained
    assert alone.observables == full.observables


def test_the_product_keeps_what_turns_inside_of_blocks():
    z, theta = ParameterVector("z", 3), ParameterVector("theta", 3)
    flat, inner = QuantumCircuit(3), QuantumCircuit(3)
    for i in range(3):
        inner.ry(theta[i], i)
    inner.cx(0, 1)
    for circuit in (flat, whole := QuantumCircuit(3)):
        for i in range(3):
            circuit.rx(z[i], i)
    flat.compose(inner, [2, 0, 1], inplace=True)
    outer = QuantumCircuit(3)
    outer.append(inner.to_gate(), [2, 0, 1])
    whole.append(outer.to_gate(), range(3))
    alone = [without_entanglers("mine", described("mine", circuit, 3)) for circuit in (flat, whole)]
    assert alone[0].circuit.count_ops() == alone[1].circuit.count_ops() == {"rx": 3, "ry": 3}
    assert alone[0].digest == alone[1].digest


def test_a_circuit_of_nothing_but_entanglers_has_no_product():
    z, theta = ParameterVector("z", 2), ParameterVector("theta", 2)
    circuit = QuantumCircuit(2)
    for i in range(2):
        circuit.ry(z[i], i)
        circuit.crx(theta[i], i, 1 - i)
    with pytest.raises(ValueError, match="all of whose trained gates act on several qubits"):
        without_entanglers("mine", described("mine", circuit, 2))


def test_exponential_scales():
    """Layer l has RY(3^l z_i), and with one layer, or without its scales, it is the built-in circuit, which runs fast."""
    assert not ansatz_of(called("reuploading", 3, 1)).is_own
    own, plain = called("reuploading", 2, 3), Ansatz(2, 3).described()
    z, angles = np.array([0.3, -0.7]), np.random.default_rng(0).uniform(-3, 3, 24)
    encoded = iter([scale * x for scale in (1, 3, 9) for x in z])
    by_hand = QuantumCircuit(2)
    values = dict(zip(plain.trained, angles, strict=True))
    for entry in plain.circuit.data:
        angle = entry.operation.params[0]
        places = [plain.circuit.find_bit(qubit).index for qubit in entry.qubits]
        (by_hand.ry if len(places) == 1 else by_hand.crz)(values[angle] if angle in values else next(encoded), *places)
    bound = own.circuit.assign_parameters(dict(zip([*own.inputs, *own.trained], [*z, *angles], strict=True)))
    assert np.abs(Statevector(bound).data - Statevector(by_hand).data).max() <= 1e-12  # float64 rounding of 30 gates
    with pytest.raises(ValueError, match=r"qtha.circuit: 'reuploading' .*up to `circuit_layers: 8`"):
        called("reuploading", 2, 9)
    with pytest.raises(ValueError, match="that of another circuit"):
        register_circuit("reuploading", lambda qubits, layers: None)


def test_slowness_is_told():
    from axolotl_qtha.circuit.torch_engine import slowness

    text = slowness(ansatz_of(called(LADDER, 3, 1)))
    assert "they run one by one in PyTorch" in text
    times = float(text.split(" times as long")[0].split()[-1])
    assert np.isfinite(times)


def test_the_examples_of_the_docs_are_those_of_the_package():
    text = (Path(__file__).parents[2] / "docs" / "circuit-backends.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    given: dict = {}
    for block in blocks:
        exec(block, given)
    for name in ("cz_ladder", "zz_observables"):
        mine = described("mine", given[name](3, 2), 3)
        assert mine.digest == called(f"axolotl_qtha.circuit.examples:{name}", 3, 2).digest
