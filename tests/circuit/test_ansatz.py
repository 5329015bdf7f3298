"""The circuit's description, against the picture in the paper's code: which gate, from which qubit to which, in which order."""

import pytest

from axolotl_qtha.circuit.ansatz import GATE_ORDERS, MAX_QUBITS, Ansatz


def gates(circuit):
    """Return (name, qubits, parameter) of each gate, e.g. ("crz", (0, 1), "theta[0]")."""
    return [
        (gate.name, tuple(circuit.find_bit(qubit).index for qubit in gate.qubits), gate.operation.params[0].name)
        for gate in circuit.data
    ]


def encode():
    return [("ry", (i,), f"z[{i}]") for i in range(3)]


def rotate(row):
    return [("ry", (i,), f"theta[{3 * row + i}]") for i in range(3)]


def ring(row):  # control i, target i + 1
    return [("crz", (i, j), f"theta[{3 * row + i}]") for i, j in [(0, 1), (1, 2), (2, 0)]]


def counter(row):  # control i, target i - 1
    return [("crz", (i, j), f"theta[{3 * row + i}]") for i, j in [(0, 2), (1, 0), (2, 1)]]


def sorted_moments(circuit, qubits):
    """Return the gates, those of one moment (`qubits` gates side by side) in the order of their first qubit."""
    listed = gates(circuit)
    moments = [listed[k : k + qubits] for k in range(0, len(listed), qubits)]
    return [gate for moment in moments for gate in sorted(moment, key=lambda gate: gate[1][0])]


def test_gate_sequence_of_2025_06():
    layers = [encode() + ring(4 * k) + rotate(4 * k + 1) + counter(4 * k + 2) + rotate(4 * k + 3) for k in range(2)]
    assert sorted_moments(Ansatz(3, 2, "2025-06").circuit(), 3) == layers[0] + layers[1]


def test_gate_sequence_of_2025_05():
    layers = [encode() + rotate(4 * k) + ring(4 * k + 1) + rotate(4 * k + 2) + counter(4 * k + 3) for k in range(2)]
    assert sorted_moments(Ansatz(3, 2, "2025-05").circuit(), 3) == layers[0] + layers[1]


@pytest.mark.parametrize("gate_order", GATE_ORDERS)
@pytest.mark.parametrize("qubits", [2, 3, 8, MAX_QUBITS])
@pytest.mark.parametrize("layers", [1, 3])
def test_number_of_parameters(qubits, layers, gate_order):
    circuit = Ansatz(qubits, layers, gate_order).circuit()
    names = [parameter.vector.name for parameter in circuit.parameters]
    assert names.count("theta") == 4 * qubits * layers
    assert names.count("z") == qubits
    assert dict(circuit.count_ops()) == {"ry": 3 * qubits * layers, "crz": 2 * qubits * layers}


@pytest.mark.parametrize("gate_order", GATE_ORDERS)
def test_one_qubit_has_no_entangling_gates(gate_order):
    ansatz = Ansatz(1, 3, gate_order)
    assert ansatz.rows == 6
    assert [parameter for _, _, parameter in gates(ansatz.circuit())] == [
        *["z[0]", "theta[0]", "theta[1]"],
        *["z[0]", "theta[2]", "theta[3]"],
        *["z[0]", "theta[4]", "theta[5]"],
    ]
    assert dict(ansatz.circuit().count_ops()) == {"ry": 9}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "qubits=0 is not supported; use 1 to 12"),
        ((13, 1), "qubits=13 is not supported; use 1 to 12"),
        ((4, 0), "layers=0 is not supported; use 1 or more"),
        ((4, 1, "2025-07"), "gate_order='2025-07' is unknown.*2025-05.*2025-06"),
    ],
)
def test_refuses_what_it_cannot_build(arguments, message):
    with pytest.raises(ValueError, match=message):
        Ansatz(*arguments)
