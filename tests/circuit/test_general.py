"""Circuits run gate by gate, against Qiskit's matrices, Aer's parameter shift and PennyLane."""

import numpy as np
import pytest
import torch
from qiskit.circuit import ParameterVector, QuantumCircuit
from qiskit.quantum_info import Operator, Pauli, Statevector
from scipy.linalg import expm

from axolotl_qtha.circuit import gates, general, torch_engine
from axolotl_qtha.circuit.aer import Engine
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.own import described
from axolotl_qtha.circuit.recognised import ansatz_of
from axolotl_qtha.circuit.simulation import Simulation
from axolotl_qtha.ibm.options import IBMOptions
from axolotl_qtha.tuner.backends import prepare

# Both are exact in double precision; each of some hundred gates rounds by 1e-16, of values and slopes of about 1.
TOLERANCE = 1e-10


@pytest.mark.parametrize("name", gates._GENERATORS)
def test_generators_are_those_of_qiskits_gates(name):
    qubits, angle = len(gates._GENERATORS[name][0]), 0.7
    circuit = QuantumCircuit(qubits)
    getattr(circuit, name)(angle, *range(qubits))
    assert np.abs(Operator(circuit).data - expm(-1j * angle * gates.generator(name))).max() <= 1e-14


def expressions(qubits, z, theta):
    """Every kind of gate and of expression: sums, products, fixed angles, gates that must be taken apart, a barrier."""
    circuit = QuantumCircuit(qubits)
    for i in range(qubits):
        circuit.h(i)
        circuit.rx(2 * z[i] - theta[0] + 0.3, i)
        circuit.u(theta[1], z[i] * theta[2], 0.4, i)
    circuit.barrier()
    circuit.crx(theta[3], 0, 1)
    circuit.cry(z[0], 1, 2)
    circuit.crz(-theta[4] / 2, 2, 0)
    circuit.cp((np.pi - z[0]) * (np.pi - z[1]), 0, 2)  # as in a ZZ feature map
    circuit.rxx(theta[5], 0, 1)
    circuit.ryy(theta[6] + z[2], 1, 2)
    circuit.rzz(theta[7], 2, 0)
    circuit.rzx(theta[7], 0, 1)
    circuit.p(theta[8].sin() * z[1], 1)
    circuit.ry(theta[8].sign() * z[0], 1)  # which Qiskit does not differentiate
    circuit.rz(0.3, 2)
    circuit.cu(theta[9], 0.1, theta[10], 0.2, 1, 0)
    circuit.ccx(0, 1, 2)
    circuit.ecr(0, 2)
    circuit.sx(1)
    circuit.unitary(Operator.from_label("Y").data, [0])
    return circuit


def case(name):
    if name == "expressions":
        circuit = expressions(3, ParameterVector("z", 3), ParameterVector("theta", 11))
        return described("mine", {"circuit": circuit, "observables": ["IZX", "YYI", "IIY"]}, 3)
    if name == "more qubits than numbers":
        z, theta = ParameterVector("z", 2), ParameterVector("theta", 3)
        circuit = QuantumCircuit(4)
        for i in range(4):
            circuit.ry(z[i % 2], i)
            circuit.cx(i, (i + 1) % 4)
        for i in range(3):
            circuit.rzz(theta[i], i, i + 1)
            circuit.rx(theta[i], i)
        return described("mine", {"circuit": circuit, "observables": ["ZZZZ", "XIIX"]}, 2)
    from axolotl_qtha.circuit import examples

    return described("mine", getattr(examples, name)(3, 2), 3)


CASES = ("cz_ladder", "zz_observables", "expressions", "more qubits than numbers")


def run(ansatz, z, angles, weights, dtype=torch.float64):
    inputs = [torch.tensor(array, dtype=dtype, requires_grad=True) for array in (z, angles)]
    values = torch_engine.expectation_values(*inputs, ansatz)
    return values.detach().numpy(), *(g.numpy() for g in torch.autograd.grad((values * torch.tensor(weights)).sum(), inputs))


def draws(ansatz, tokens=4, blocks=1, seed=0):
    random = np.random.default_rng(seed)
    z = random.uniform(-np.pi, np.pi, (tokens, blocks * ansatz.width))
    return z, random.uniform(-np.pi, np.pi, (ansatz.rows, ansatz.columns(z.shape[1]))), random.normal(size=z.shape)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("blocks", [1, 2])
def test_against_qiskit_and_aer(name, blocks):
    own = case(name)
    ansatz = ansatz_of(own)
    assert ansatz.is_own
    z, angles, weights = draws(ansatz, blocks=blocks)
    values, *grads = run(ansatz, z, angles, weights)
    for token in range(len(z)):
        for block in range(blocks):
            mine = slice(block * ansatz.width, (block + 1) * ansatz.width)
            bound = dict(zip(own.inputs, z[token, mine], strict=True)) | dict(zip(own.trained, angles[:, block], strict=True))
            state = Statevector(own.circuit.assign_parameters(bound))
            expected = [state.expectation_value(Pauli(label)).real for label in own.observables]
            assert np.abs(values[token, mine] - expected).max() <= TOLERANCE
    aer = Engine(ansatz, Simulation("aer"), None)
    assert np.abs(aer.expectations(aer.gates.points(z, angles)).reshape(z.shape) - values).max() <= TOLERANCE
    for mine, its in zip(grads, aer.gradients(weights, z, angles), strict=True):
        assert np.abs(mine - its).max() <= TOLERANCE


def ladder(qml, z, theta, qubits, layers):
    """`examples.cz_ladder`, written again in PennyLane's words."""
    angles = iter(theta)
    for _ in range(layers):
        for i in range(qubits):
            qml.RX(z[i], wires=i)
            qml.RY(next(angles), wires=i)
        for i in range(qubits - 1):
            qml.CZ(wires=[i, i + 1])
        for i in range(qubits):
            qml.RZ(next(angles), wires=i)
            qml.RX(z[i], wires=i)
    return [qml.expval(qml.PauliZ(i)) for i in range(qubits)]


def pairs(qml, z, theta, qubits, layers):
    """`examples.zz_observables`."""
    angles = iter(theta)
    for _ in range(layers):
        for i in range(qubits):
            qml.RY(z[i], wires=i)
        for i in range(qubits):
            qml.IsingXX(next(angles), wires=[i, (i + 1) % qubits])
        for i in range(qubits):
            qml.RY(next(angles), wires=i)
    return [qml.expval(qml.PauliZ(i) @ qml.PauliZ((i + 1) % qubits)) for i in range(qubits)]


@pytest.mark.parametrize(("name", "words"), [("cz_ladder", ladder), ("zz_observables", pairs)])
def test_against_pennylane(name, words):
    qml = pytest.importorskip("pennylane")
    ansatz = ansatz_of(case(name))
    z, angles, weights = draws(ansatz, tokens=3)
    node = qml.qnode(qml.device("default.qubit", wires=3), interface="torch", diff_method="backprop")(
        lambda z, theta: words(qml, z, theta, 3, 2)
    )
    inputs = [torch.tensor(array, requires_grad=True) for array in (z, angles[:, 0])]
    theirs = torch.stack([torch.stack(node(token, inputs[1])) for token in inputs[0]])
    grads = torch.autograd.grad((theirs * torch.tensor(weights)).sum(), inputs)
    values, of_z, of_angles = run(ansatz, z, angles, weights)
    assert np.abs(values - theirs.detach().numpy()).max() <= TOLERANCE
    assert np.abs(of_z - grads[0].numpy()).max() <= TOLERANCE
    assert np.abs(of_angles[:, 0] - grads[1].numpy()).max() <= TOLERANCE


def test_the_built_in_circuit_gate_by_gate():
    """The two engines have nothing in common but the description."""
    built_in = Ansatz(4, 2)
    own = described("mine", built_in.circuit(), 4)
    gate_by_gate = Ansatz(4, 1, own.gate_order)
    z, angles, weights = draws(built_in)
    values, of_z, of_angles = run(built_in, z, angles, weights)
    mine = run(gate_by_gate, z, angles.reshape(-1, 1), weights)
    assert np.abs(mine[0] - values).max() <= TOLERANCE
    assert np.abs(mine[1] - of_z).max() <= TOLERANCE
    assert np.abs(mine[2].reshape(angles.shape) - of_angles).max() <= TOLERANCE


def test_in_single_precision():
    """Each of 28 gates rounds by 6e-8; 1e-5 leaves ten times what adds up."""
    ansatz = ansatz_of(case("cz_ladder"))
    z, angles, weights = draws(ansatz, tokens=16)
    for single, double in zip(run(ansatz, z, angles, weights, torch.float32), run(ansatz, z, angles, weights), strict=True):
        assert np.abs(single - double).max() <= 1e-5


def test_the_first_call_of_a_compiled_function():
    """PyTorch runs it below some of its dispatch keys, among them the one that resolves lazy conjugates."""
    ansatz = ansatz_of(case("expressions"))
    z, angles, weights = draws(ansatz)
    inputs = [torch.tensor(array, requires_grad=True) for array in (z, angles)]
    compiled = torch.compile(torch_engine.expectation_values, fullgraph=True, backend="aot_eager")
    found = compiled(*inputs, ansatz)
    grads = torch.autograd.grad((found * torch.tensor(weights)).sum(), inputs)
    expected = run(ansatz, z, angles, weights)
    for mine, its in zip((found, *grads), expected, strict=True):
        assert np.abs(mine.detach().numpy() - its).max() <= TOLERANCE


def test_chunks_of_tokens_change_nothing(monkeypatch):
    ansatz = ansatz_of(case("zz_observables"))
    z, angles, weights = draws(ansatz, tokens=7, blocks=2)
    whole = run(ansatz, z, angles, weights)
    monkeypatch.setattr(general, "CHUNK_AMPLITUDES", 2 * 2**3 * 2)  # two tokens at a time
    for part, all_at_once in zip(run(ansatz, z, angles, weights), whole, strict=True):
        assert np.abs(part - all_at_once).max() <= 1e-12


def test_angles_that_are_not_finite_are_named():
    ansatz = ansatz_of(case("cz_ladder"))
    z, angles, _ = draws(ansatz, tokens=2, blocks=2)
    at_angle, at_z = r"trained angle \(row 5, circuit 1\)", r"encoded input of input 1 \(token 1, circuit 1\)"
    for array, place, words in ((angles, (5, 1), at_angle), (z, (1, 4), at_z)):
        broken = array.copy()
        broken[place] = np.nan
        given = [broken if array is each else each for each in (z, angles)]
        with pytest.raises(torch_engine.NonFiniteAngle, match=words):
            torch_engine.expectation_values(*map(torch.tensor, given), ansatz)


def test_shapes_that_do_not_fit_are_refused():
    ansatz = ansatz_of(case("cz_ladder"))
    with pytest.raises(ValueError, match=r"expected \(..., n\) and \(12, n / 3\)"):
        torch_engine.expectation_values(torch.zeros(2, 6), torch.zeros(12, 6), ansatz)


@pytest.mark.parametrize("noise", ["depolarizing", "fake:manila"])
def test_observables_of_several_bases_under_noise(noise):
    """Shots, of each basis its own, against the exact values of the same noise; read-out errors of both qubits included."""
    own = case("expressions")
    ansatz = ansatz_of(own)
    z, angles, _ = draws(ansatz, tokens=2)
    exact = Engine(ansatz, Simulation("aer", noise_model=noise), None)
    assert len(exact.measurements) == 2  # IZX with YYI agree on no qubit; IIY goes with one of them
    shots = 40_000
    sampled = Engine(ansatz, Simulation("aer", shots=shots, noise_model=noise), None)
    expected = exact.expectations(exact.gates.points(z, angles))
    found = sampled.expectations(sampled.gates.points(z, angles))
    assert (np.abs(found - expected) <= 4.5 * np.sqrt((1 - expected**2) / shots) + 1e-6).all()
    ideal = Engine(ansatz, Simulation("aer"), None)
    assert np.abs(expected - ideal.expectations(ideal.gates.points(z, angles))).max() > 1e-3


def test_more_qubits_than_the_device_has_are_refused(tmp_path):
    """Four numbers on six qubits: what counts is the circuit's own."""
    z, theta = ParameterVector("z", 4), ParameterVector("theta", 4)
    circuit = QuantumCircuit(6)
    for i in range(4):
        circuit.rx(z[i], i)
        circuit.crx(theta[i], i, i + 2)
    ansatz = ansatz_of(described("mine", {"circuit": circuit, "observables": ["IIIIIZ", "IIIIZI", "IZIIII", "ZIIIII"]}, 4))
    with pytest.raises(ValueError, match=r"noise_model: 'fake:manila' has 5 qubits, the circuit 6"):
        prepare(ansatz, Simulation("aer", noise_model="fake:manila"))
    with pytest.raises(ValueError, match=r"ibm.backend.*has 5 qubits, the circuit 6"):
        prepare(ansatz, Simulation("ibm", ibm=IBMOptions(backend="fake:manila", journal=str(tmp_path / "journal"))))
