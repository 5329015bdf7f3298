"""`axolotl qtha-draw`: gates counted by hand, errors, the picture."""

import pytest
from click.testing import CliRunner
from PIL import Image
from qiskit import qpy

from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.draw import costs, text
from axolotl_qtha.cli.circuit import draw

from ..e2e.commands import write_config


def invoke(*arguments):
    return CliRunner().invoke(draw, [str(argument) for argument in arguments])


def test_gates_are_counted_before_and_after():
    written, compiled = costs(Ansatz(3, 2).circuit(), "simulator")
    assert written.gates == {"ry": 18, "crz": 12}  # three RY and two CRZ a qubit and layer
    assert (written.qubits, written.two_qubit_gates, written.two_qubit_depth) == (3, 12, 12)  # three qubits: one CRZ at a time
    assert compiled.gates == {"ry": 18, "rz": 24, "cx": 24}  # a CRZ is two CX and two RZ
    assert (compiled.two_qubit_gates, compiled.two_qubit_depth) == (24, 24)
    written, compiled = costs(Ansatz(2, 1).circuit(), "simulator")
    assert (written.depth, written.two_qubit_depth, compiled.two_qubit_depth) == (1 + 2 + 1 + 2 + 1, 4, 8)


def test_a_device_needs_swaps():
    compiled = costs(Ansatz(4, 1).circuit(), "fake:manila")[1]  # a line of five qubits, the ring wants a circle
    assert set(compiled.gates) <= {"rz", "sx", "x", "cx"}
    assert compiled.two_qubit_gates > 2 * 8
    assert compiled.qubits in (4, 5)


def test_the_text_has_every_angle():
    drawn = text(Ansatz(2, 2).circuit(), 80)
    assert all(f"theta[{k}]" in drawn for k in range(16))
    assert drawn.count("z[0]") == drawn.count("z[1]") == 2
    assert max(map(len, drawn.splitlines())) <= 81


def test_command(tmp_path):
    config, picture = write_config(tmp_path), tmp_path / "circuit.png"
    done = invoke(config, "--output", picture)
    assert done.exit_code == 0, done.output
    for word in ("theta[31]", "16 crz, 24 ry", "on simulator", "32 cx", f"{picture} written"):
        assert word in done.output
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width > 500
        assert len(image.convert("L").getcolors()) > 2  # something is drawn


def test_one_of_several_is_drawn(tmp_path):
    output = invoke(write_config(tmp_path, qtha={"rank": 32})).output
    assert "Rank 32: each token has 8 of these circuits side by side in every adapted layer" in " ".join(output.split())
    assert "theta[31]" in output
    assert "theta[32]" not in output


def test_the_backend_of_the_configuration(tmp_path):
    config = write_config(tmp_path, qtha={"quantum_backend": "aer", "noise_model": "fake:manila", "rank": 2})
    assert "on fake:manila" in invoke(config).output
    assert "on fake:lima" in invoke(config, "--backend", "fake:lima").output


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({}, ["--backend", "fake:manilla"], "--backend: 'fake:manilla' names no device. What works: `fake:manila`"),
        ({}, ["--backend", "aer"], "--backend: 'aer' is unknown. What works: `simulator`, or `fake:`"),
        ({"qtha": {"rank": 6}}, ["--backend", "fake:manila"], "has 5 qubits, the circuit 6"),
        ({"qtha": {"quantum": "none"}}, [], "qtha.quantum: 'none' runs no circuit"),
    ],
)
def test_errors(tmp_path, changes, arguments, words):
    done = invoke(write_config(tmp_path, **changes), *arguments)
    assert done.exit_code == 1
    assert words in done.output


def test_the_circuit_with_its_symbols_as_files(tmp_path):
    path = tmp_path / "new" / "circuit.qpy"
    assert invoke(write_config(tmp_path), "--output", path).exit_code == 0
    (circuit,) = qpy.load(path.open("rb"))
    assert dict(circuit.count_ops()) == {"ry": 24, "crz": 16}
    assert {parameter.vector.name for parameter in circuit.parameters} == {"z", "theta"}
    picture = tmp_path / "picture"
    assert invoke(write_config(tmp_path), "--output", picture, "--format", "svg").exit_code == 0
    assert "<svg" in picture.read_text()
