"""What a hardware evaluation says, against definitions written down here, and circuits whose errors are known."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from qiskit import qpy

from axolotl_qtha.circuit.aer import Engine
from axolotl_qtha.circuit.simulation import Simulation
from axolotl_qtha.hardware_eval.evaluate import (
    DEVICE,
    EXACT,
    NOISE,
    SHOTS,
    chosen,
    circuits_of,
    evaluate,
    evidence,
    facts,
    ratio_error,
    ways,
)
from axolotl_qtha.hardware_eval.report import Evaluation, model_table, packing, qubit_table, verdict
from axolotl_qtha.ibm.journal import Journal
from axolotl_qtha.ibm.options import IBMOptions
from axolotl_qtha.ibm.runner import Runner
from axolotl_qtha.ibm.service import connect
from axolotl_qtha.terminal import console
from axolotl_qtha.trained.calibration_text import IGNORED, Sequence
from axolotl_qtha.tuner.layer import adapted_layers
from axolotl_qtha.tuner.sizes import ansatz

from ..export_models import sequences, text_pass
from ..models import adapted, llama, train

SHOTS_GIVEN = 512
OPTIONS = IBMOptions(backend="fake:manila", shots=SHOTS_GIVEN, resilience_level=0)
QUBITS = 2


@pytest.fixture(scope="module")
def model():
    return train(adapted(llama(), quantum="qtha", rank=QUBITS, circuit_layers=1, target_modules=["o_proj"]))


@pytest.fixture(scope="module")
def text():
    """Six sequences of which the first third is a prompt."""
    return [Sequence(row.ids, [IGNORED] * (len(row.ids) // 3) + row.ids[len(row.ids) // 3 :]) for row in sequences(6)]


@pytest.fixture(scope="module")
def device(model, tmp_path_factory):
    journal = Journal(tmp_path_factory.mktemp("journal"))
    yield Runner(ansatz(model.peft_config["default"]), OPTIONS, connect(OPTIONS, QUBITS), journal)
    journal.close()


@pytest.fixture(scope="module")
def found(model, text, device):
    return {way.name: way for way in evaluate(text_pass(model, text), device, ways(device, Simulation()), None)}


def answers(model, text):
    """Return log-likelihood, tokens, and first choices of each answer, in float64 and without padding."""
    result = []
    for sequence in text:
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([sequence.ids])).logits[0, :-1].double().log_softmax(-1)
        labels = torch.tensor(sequence.labels[1:])
        wanted = labels != IGNORED
        likely = logs[wanted].gather(1, labels[wanted][:, None]).sum()
        result.append((float(likely), int(wanted.sum()), logs[wanted].argmax(1), logs[wanted]))
    return result


@pytest.mark.slow
def test_exact_circuits_are_the_model_itself(model, text, found):
    expected = answers(model, text)
    perplexity = np.exp(-sum(part[0] for part in expected) / sum(part[1] for part in expected))
    assert found[EXACT].perplexity == pytest.approx(perplexity, rel=1e-5)  # float32 logits in batches of other shapes
    assert (found[EXACT].difference, found[EXACT].kl, found[EXACT].answer_agreement) == (0, 0, 1)
    assert found[EXACT].deviation is None


def test_circuits_with_known_errors(model, text, device):
    """<Z> of the first qubit is off by 0.3, that of the second by noise: figures by definition, the model's own by hand."""
    exact = Engine(device.ansatz, Simulation("aer"), None)
    noise = np.random.default_rng(0)
    offsets = []

    def off(points):
        offsets.append(np.stack([np.full(len(points), 0.3), noise.normal(0, 0.2, len(points))], axis=1))
        return exact.expectations(points) + offsets[-1], np.full((len(points), QUBITS), 0.1)

    result = {way.name: way for way in evaluate(text_pass(model, text), device, {EXACT: None, "off": off}, None)}["off"]
    all_offsets = np.concatenate(offsets)
    tolerance = 1e-5  # <Z> in float32
    assert result.deviation.bias == pytest.approx(all_offsets.mean(axis=0), abs=tolerance)
    assert result.deviation.std == pytest.approx(all_offsets.std(axis=0), abs=tolerance)
    assert result.deviation.worst == pytest.approx(np.abs(all_offsets).max(axis=0), abs=tolerance)
    assert result.deviation.standard_error == pytest.approx([0.1] * QUBITS)
    assert len(all_offsets) == sum(circuits_of(text_pass(model, text), None)) * 2, "each token in both layers"


def test_a_constant_error_does_to_the_model_what_it_does_by_hand(model, text, device):
    """All <Z> are zero: the same as an adapter whose W_Q is zero."""
    result = evaluate(text_pass(model, text), device, {EXACT: None, "zero": lambda p: (np.zeros((len(p), 2)),) * 2}, None)[1]
    exact = answers(model, text)
    fusions = [layer.qtha_adapter["default"].stored("w_q") for layer in adapted_layers(model).values()]
    kept = [value.detach().clone() for value in fusions]
    with torch.no_grad():
        for value in fusions:
            value.zero_()
    without = answers(model, text)
    with torch.no_grad():
        for value, before in zip(fusions, kept, strict=True):
            value.copy_(before)
    counts = np.array([part[1] for part in exact])
    off = np.array([part[0] for part in without]) - [part[0] for part in exact]
    assert result.difference == pytest.approx(off.sum() / counts.sum(), rel=1e-3, abs=1e-6)
    assert abs(result.difference) > 1e-5
    assert result.standard_error == pytest.approx(ratio_error(off, counts), rel=1e-3)
    same = [(a[2] == b[2]).double().mean() for a, b in zip(exact, without, strict=True)]
    tokens = sum(int((a[2] == b[2]).sum()) for a, b in zip(exact, without, strict=True))
    assert result.token_agreement == pytest.approx(tokens / counts.sum(), abs=1.01 / counts.sum())
    assert result.answer_agreement == pytest.approx(np.mean([value == 1 for value in same]), abs=1.01 / len(text))
    kl = sum(float((a[3].exp() * (a[3] - b[3])).sum()) for a, b in zip(exact, without, strict=True)) / counts.sum()
    assert result.kl == pytest.approx(kl, rel=1e-2)


def test_shots_alone_scatter_as_shots_do(found):
    """Of about 150 values each: a bias within 5 standard errors, and a spread within a quarter of the binomial one."""
    deviation = found[SHOTS].deviation
    for bias, std, error in zip(deviation.bias, deviation.std, deviation.standard_error, strict=True):
        assert abs(bias) < 5 * error / np.sqrt(100)
        assert std == pytest.approx(error, rel=0.25)
        assert error <= SHOTS_GIVEN**-0.5


def test_the_device_is_off_by_its_noise_and_the_noise_model_says_so(found):
    """A simulated device and its noise model are one and the same, but for the shots."""
    device, model = found[DEVICE].deviation, found[NOISE].deviation
    count = 100
    for i in range(QUBITS):
        spread = np.hypot(device.std[i], model.std[i]) / np.sqrt(count)
        assert abs(device.bias[i] - model.bias[i]) < 5 * spread
        assert device.std[i] == pytest.approx(model.std[i], rel=0.3)
    shots = found[SHOTS].deviation
    assert np.hypot(device.bias, device.std).sum() > 1.2 * np.hypot(shots.bias, shots.std).sum(), "the noise is there"


def test_the_noise_model_of_a_device_is_qiskits(device):
    """The same circuits by Aer's own `from_backend`, read out exactly: within 5 standard errors of the shots."""
    exact = Engine(device.ansatz, Simulation("aer", noise_model="fake:manila"), None)
    points = np.random.default_rng(1).uniform(-3, 3, (40, len(device.isa.gates.kinds)))
    values, errors = ways(device, Simulation(seed=3))[NOISE](points)
    assert np.abs((values - exact.expectations(points)) / np.maximum(errors, 1e-3)).max() < 5


def test_the_noise_model_reads_out_as_the_device_does(model, tmp_path):
    """All angles zero, 400 circuits of 512 shots: <Z> of both within 5 standard errors; the mean of the flips would be 12 off."""
    journal = Journal(tmp_path)
    runner = Runner(ansatz(model.peft_config["default"]), OPTIONS, connect(OPTIONS, QUBITS), journal)
    zeros = np.zeros((400, len(runner.isa.gates.kinds)))
    measured = {
        name: way(zeros)[0].mean(axis=0) for name, way in ways(runner, Simulation(seed=3)).items() if name in (NOISE, DEVICE)
    }
    error = np.sqrt(2 * (1 - measured[DEVICE] ** 2) / (400 * SHOTS_GIVEN))  # of their difference
    assert (np.abs(measured[NOISE] - measured[DEVICE]) <= 5 * error).all()
    journal.close()


def test_last_tokens_of_each_sequence():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    assert chosen(mask, None).equal(mask)
    assert chosen(mask, 2).equal(torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]]).bool())


def test_the_error_of_a_ratio():
    """Equal groups: that of a mean. Otherwise: the spread over many draws, of which the formula is the limit for many groups."""
    values = np.array([1.0, 4.0, 2.0, 7.0])
    assert ratio_error(3 * values, np.full(4, 3)) == pytest.approx(values.std(ddof=1) / 2)
    assert ratio_error(values[:1], np.ones(1)) is None
    random = np.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(2000):
        counts = random.integers(5, 40, 60).astype(float)
        sums = counts * random.normal(0.2, 1, 60) + random.normal(0, 3, 60)
        ratios.append(sums.sum() / counts.sum())
        errors.append(ratio_error(sums, counts))
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.08)


def evaluation(found, device, samples=6):
    return Evaluation(samples, 60, 100, 2, "the evaluation data", None, 0.0, facts(device), list(found.values()))


def test_equal_tokens_have_shots_of_their_own(model, text, tmp_path):
    """The same sequence three times: in a batch and from batch to batch no two circuits share a draw; again it costs nothing."""
    journal = Journal(tmp_path)
    runner = Runner(ansatz(model.peft_config["default"]), OPTIONS, connect(OPTIONS, QUBITS), journal)
    same = text_pass(model, [text[0]] * 3)
    for _ in range(2):
        evaluate(same, runner, {EXACT: None, DEVICE: runner.expectations}, 2)
        entries = list(journal.entries.values())
        assert sum(entry.circuits for entry in entries) == 3 * 2 * 2, "sequences, tokens, layers"
    asked = np.concatenate([journal.asked(entry.tag)["points"] for entry in entries])
    assert len(np.unique(asked, axis=0)) < len(asked), "or there would be no equal tokens"
    assert len(runner.answered) == len(entries)
    journal.close()


def test_what_the_results_are_from(found, device):
    kept = evidence(device)
    json.dumps(kept, allow_nan=False)
    (circuit,) = qpy.load(io.BytesIO(base64.b64decode(kept["circuit_qpy"])))
    assert circuit == device.isa.circuit
    assert kept["layout"] == device.isa.qubits
    assert {job["tag"] for job in kept["jobs"]} == set(device.journal.entries)
    for job in kept["jobs"]:
        assert job["job_id"]
        assert job["seed"] > 0
        assert (device.journal.folder / "made" / f"{job['made']}.json").is_file()
        assert job["metadata"]["pub"]["shots"] == pytest.approx(SHOTS_GIVEN, abs=1)  # the runtime rounds


def test_the_report(found, device, tmp_path):
    report = evaluation(found, device)
    out = console()
    with out.capture() as captured:
        out.print(qubit_table(report), model_table(report))
    for name in (EXACT, SHOTS, NOISE, "fake_manila", "0 (on "):
        assert name in captured.get()
    report.write(tmp_path)
    saved = json.loads((tmp_path / "hardware_eval.json").read_text())
    assert [way["name"] for way in saved["ways"]] == [EXACT, SHOTS, NOISE, DEVICE]
    assert saved["ways"][3]["deviation"]["bias"] == found[DEVICE].deviation.bias
    assert saved["facts"]["executions"] == SHOTS_GIVEN
    assert (tmp_path / "hardware_eval.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("difference", "error", "words"),
    [(-0.5, 0.1, "is lower than"), (0.5, 0.1, "is higher than"), (-0.2, 0.1, "not told apart"), (1.0, None, "more --samples")],
)
def test_the_verdict(found, device, difference, error, words):
    """With 6 answers the 95 % interval is 2.57 standard errors."""
    report = evaluation(found, device)
    way = report.ways[3]
    before = way.difference, way.standard_error
    way.difference, way.standard_error = difference, error
    assert words in verdict(report)
    way.difference, way.standard_error = before


PACKED = IBMOptions(backend="fake:guadalupe", shots=256, resilience_level=0, pack=3)


@pytest.mark.slow
def test_packing_and_what_it_does_to_the_error(text, tmp_path):
    """Rank 4 as two circuits of two qubits, three to a circuit of the device: figures by definition, from what was seen."""
    trained = train(adapted(llama(), rank=4, qubits=2, circuit_layers=1, target_modules=["o_proj"]))
    journal = Journal(tmp_path / "journal")
    runner = Runner(ansatz(trained.peft_config["default"]), PACKED, connect(PACKED, QUBITS), journal)
    asked, of = [], runner.expectations
    runner.expectations = lambda *call: asked.append((*call, of(*call))) or asked[-1][-1]
    run = text_pass(trained, text)
    result = {way.name: way for way in evaluate(run, runner, ways(runner, Simulation()), 4)}
    circuits = sum(len(points) for points, _, _ in asked)
    assert circuits == 2 * sum(circuits_of(run, 4)) == 2 * 2 * sum(min(4, len(row.ids)) for row in text)
    exact = Engine(runner.ansatz, Simulation("aer"), None)
    off = np.concatenate([found[0] - exact.expectations(points) for points, _, found in asked])
    places = np.concatenate([runner.places(points, keys) for points, keys, _ in asked])
    expected = [np.sqrt((off[places == place] ** 2).mean()) for place in range(3)]
    assert result[DEVICE].by_place == pytest.approx(expected, abs=1e-5)  # <Z> in float32
    assert result[NOISE].by_place == []
    evaluation = Evaluation(len(text), 1, circuits, 2, "text", 4, 0.0, facts(runner), list(result.values()))
    said = packing(evaluation)
    assert said.startswith(f"3 blocks a circuit: <Z> is off by {', '.join(f'{one:.3f}' for one in expected)}")
    shown = console(200)
    with shown.capture() as capture:
        shown.print(qubit_table(evaluation))
    for qubit in range(QUBITS):
        where = ", ".join(str(place.qubits[qubit]) for place in runner.isa.places)
        assert f"{qubit} (on {where})" in capture.get()
    evaluation.write(tmp_path)
    assert json.loads((tmp_path / "hardware_eval.json").read_text())["facts"]["pack"] == 3
    journal.close()
