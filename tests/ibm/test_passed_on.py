"""Options of EstimatorV2 and the transpiler that are passed on: to the runtime as they are, or refused by name."""

import numpy as np
import pytest
from pydantic import ValidationError
from qiskit_ibm_runtime import EstimatorV2
from qiskit_ibm_runtime.fake_provider import FakeManilaV2, FakeTorino

from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.noise import compile_for
from axolotl_qtha.errors import PrivateSettings
from axolotl_qtha.ibm.circuits import ISACircuit, estimator_options
from axolotl_qtha.ibm.cost import rate
from axolotl_qtha.ibm.options import IBMOptions
from axolotl_qtha.settings.training_run import AdapterSettings

from ..circuit.reference import angles_and_inputs, expectations
from ..settings.test_args import validated
from .boundary import ANSATZ, PAID, points
from .test_circuits import LINE

REAL = {"backend": "ibm_torino", "max_qpu_seconds": 60, "shots": 4096}
FAKE = {"backend": "fake:manila"}
ZNE = {"resilience": {"zne": {"noise_factors": [1, 3, 5, 7], "extrapolator": ["linear"]}}, "twirling": {"num_randomizations": 16}}
MANILA = FakeManilaV2()


def refused(**settings):
    with pytest.raises(ValidationError) as error:
        IBMOptions(**settings)
    return str(error.value)


def test_the_runtime_gets_them_beside_what_this_project_sets():
    block = IBMOptions(
        **REAL,
        resilience_level=2,
        twirling=True,
        dynamical_decoupling="XX",
        estimator=ZNE
        | {
            "dynamical_decoupling": {"scheduling_method": "asap"},
            "execution": {"rep_delay": 1e-4},
            "seed_estimator": 5,
        },
    )
    options = EstimatorV2(mode=LINE, options=estimator_options(block, "tag", 30)).options
    assert list(options.resilience.zne.noise_factors) == [1, 3, 5, 7]
    assert (options.twirling.num_randomizations, options.twirling.enable_gates, options.twirling.enable_measure) == (
        16,
        True,
        True,
    )
    found = options.dynamical_decoupling
    assert (found.scheduling_method, found.enable, found.sequence_type) == ("asap", True, "XX")
    assert (options.default_shots, options.resilience_level, options.seed_estimator) == (4096, 2, 5)
    assert (options.environment.job_tags, options.max_execution_time) == (["tag"], 30)
    assert options.execution.rep_delay == 1e-4


def test_they_come_through_a_yaml_and_identify_a_measurement():
    ibm = REAL | {"resilience_level": 2, "estimator": ZNE, "transpiler": {"optimization_level": 1, "initial_layout": [3, 4]}}
    options = AdapterSettings.of(validated(qtha={"rank": 2, "quantum_backend": "ibm", "ibm": ibm})).parsed.simulation.ibm
    assert options.estimator == ZNE
    assert options.transpiling == (("initial_layout", (3, 4)), ("optimization_level", 1))
    assert hash(options) == hash(IBMOptions(**ibm))
    assert options.measurement()["estimator"] == ZNE
    assert options.measurement()["transpiler"]["initial_layout"] == [3, 4]
    assert {"estimator", "transpiler"}.isdisjoint(IBMOptions(**REAL).measurement()), "journals of before would not answer"


LEARN = {"measure_noise_learning": {"num_randomizations": 8}}
BAD_ESTIMATOR = [
    ({"default_shots": 100}, ["default_shots: 100 is set by this project", "`ibm: {shots: ...}`"]),
    ({"default_precision": 0.1}, ["default_precision: 0.1", "`ibm: {precision: ...}`"]),
    ({"resilience_level": 2}, ["resilience_level: 2", "`ibm: {resilience_level: ...}`"]),
    ({"max_execution_time": 9}, ["max_execution_time: 9", "`ibm: {max_qpu_seconds: ...}`"]),
    ({"environment": {"job_tags": ["mine"]}}, ["environment: (dict, value not shown)", "tags"]),
    ({"simulator": {"seed_simulator": 1}}, ["simulator", "`seed_simulator`"]),
    ({"experimental": {"image": "x"}}, ["experimental", "leave it out"]),
    ({"dynamical_decoupling": {"enable": True}}, ["dynamical_decoupling.enable: True", "`ibm: {dynamical_decoupling: XY4}`"]),
    ({"dynamical_decoupling": {"skip_reset_qubits": True}}, ["dynamical_decoupling", "`dynamical_decoupling: none`"]),
    ({"twirlin": {}}, ["ibm.estimator.twirlin: (dict, value not shown) is no option", "`twirling`"]),
    ({"twirling": {"num_randomisations": 3}}, ["ibm.estimator.twirling.num_randomisations", "`num_randomizations`"]),
    ({"twirling": {"num_randomizations": "many"}}, ["twirling.num_randomizations: 'many' is refused", "integer", "'auto'"]),
    ({"twirling": {"num_randomizations": 0}}, ["twirling.num_randomizations: 0", ">=1"]),
    ({"twirling": 3}, ["twirling: 3 is no block", "`twirling: {enable_gates: ...}`"]),
    (
        {"twirling": {"num_randomizations": 4, "shots_per_randomization": 4}},
        ["times shots_per_randomization 4", "`ibm: {shots: 16}`"],
    ),
    (
        {"resilience": {"zne": {"noise_factors": [1, 3]}}},
        ["zne", "has no effect without zero-noise", "`ibm: {resilience_level: 2}`"],
    ),
    ({"resilience": {"zne_mitigation": True, "zne": {"noise_factors": [0.5, 1]}}}, ["noise_factors: [0.5, 1]", ">= 1"]),
    ({"resilience": {"zne_mitigation": True, "zne": {"noise_factors": [1]}}}, ["resilience.zne", "is refused"]),
    ({"resilience": {"zne_mitigation": True, "zne": {"amplifier": "tape"}}}, ["zne.amplifier: 'tape'", "'pea'"]),
    ({"resilience": {"pec": {"max_overhead": 5}}}, ["resilience.pec", "`resilience: {pec_mitigation: true}`"]),
    ({"resilience": {"pec_mitigation": True, "pec": {"max_overhead": None}}}, ["max_overhead: None sets no limit"]),
    ({"resilience": LEARN}, ["resilience", "'measure_mitigation' is not set to True"]),
    ({}, ["is no block of options"]),
    (["zne"], ["(list, value not shown) is no block of options"]),
]


@pytest.mark.parametrize(("estimator", "words"), BAD_ESTIMATOR, ids=str)
def test_refused_options_of_the_estimator(estimator, words):
    text = refused(**REAL, estimator=estimator)
    for word in ["qtha.ibm.estimator", "What works: ", *words]:
        assert word in text
    with pytest.raises((ValueError, PrivateSettings), match=r"qtha\.ibm\.estimator"):
        validated(qtha={"rank": 2, "quantum_backend": "ibm", "ibm": {**REAL, "estimator": estimator}})


def test_what_depends_on_the_other_keys():
    text = refused(**REAL, twirling=True, estimator={"twirling": {"enable_gates": False}})
    assert "twirling.enable_gates: False says the same thing as `ibm: {twirling: true}`" in text
    text = refused(**REAL, resilience_level=0, estimator={"twirling": {"num_randomizations": 8}})
    assert "nothing is twirled. What works: `ibm: {twirling: true}`" in text
    text = refused(**FAKE, estimator=ZNE)
    assert "qtha.ibm.estimator" in text
    assert "has no effect on `backend: fake:manila`" in text
    text = refused(**FAKE, pack=2, transpiler={"initial_layout": [0, 1]})
    assert "ibm.transpiler.initial_layout: [0, 1] places one circuit, and `pack: 2`" in text
    IBMOptions(**FAKE, pack=2, transpiler={"optimization_level": 1, "seed_transpiler": 4})


BAD_TRANSPILER = [
    ({"optimization_level": 4}, ["optimization_level: 4", "1, 2 or 3"]),
    ({"seed_transpiler": -1}, ["seed_transpiler: -1", "`seed_transpiler: 7`"]),
    ({"initial_layout": [1, 1]}, ["initial_layout: [1, 1]", "a qubit of the device for each"]),
    ({"initial_layout": {"0": 1}}, ["initial_layout: (dict, value not shown)"]),
    ({"layout_method": "sabr"}, ["layout_method: 'sabr'", "`layout_method: sabre`"]),
    ({"approximation_degree": 2}, ["approximation_degree: 2"]),
    ({"qubits_initially_zero": "x"}, ["qubits_initially_zero: 'x'", "`qubits_initially_zero: true`"]),
    ({"coupling_map": [[0, 1]]}, ["coupling_map", "is answered by the device"]),
    ({"backend": "x"}, ["backend: 'x' is answered by the device"]),
    ({"scheduling_method": "alap"}, ["scheduling_method: 'alap'", "IBM schedules"]),
    ({"hls_config": 1}, ["hls_config", "is no argument"]),
    ({"seed": 1}, ["ibm.transpiler.seed: (int, value not shown)", "`seed_transpiler`"]),
    (3, ["is no block of options"]),
]


@pytest.mark.parametrize(("transpiler", "words"), BAD_TRANSPILER, ids=str)
def test_refused_arguments_of_the_transpiler(transpiler, words):
    text = refused(**FAKE, transpiler=transpiler)
    for word in ["qtha.ibm.transpiler", "What works: ", *words]:
        assert word in text


@pytest.mark.parametrize("layout", [[0, 1, 2], [4, 5]], ids=["too many", "not there"])
def test_a_layout_that_does_not_fit(layout):
    with pytest.raises(ValueError, match=r"qtha.ibm.transpiler.initial_layout: .*What works: as many as the circuit's, up to 4"):
        ISACircuit(Ansatz(2, 1), MANILA, IBMOptions(**FAKE, transpiler={"initial_layout": layout}))
    unconnected = {"initial_layout": [0, 4], "routing_method": "none"}
    with pytest.raises(ValueError, match=r"qtha.ibm.transpiler: .* does not place the circuit"):
        ISACircuit(Ansatz(2, 1), MANILA, IBMOptions(**FAKE, transpiler=unconnected))


def test_the_circuit_is_where_the_layout_says():
    ansatz = Ansatz(2, 1)
    options = IBMOptions(**FAKE, transpiler={"initial_layout": [4, 3], "optimization_level": 1})
    isa = ISACircuit(ansatz, MANILA, options)
    assert isa.qubits == [4, 3]
    assert compile_for(isa.gates.circuit, MANILA, options.transpiling).qubits == [4, 3]
    assert ISACircuit(ansatz, MANILA, IBMOptions(**FAKE)).qubits != [4, 3]
    packed = IBMOptions(backend="fake:torino", pack=2, transpiler={"optimization_level": 0, "seed_transpiler": 3})
    deep = ISACircuit(ansatz, FakeTorino(), packed).circuit.depth()
    assert deep > ISACircuit(ansatz, FakeTorino(), IBMOptions(backend="fake:torino", pack=2)).circuit.depth()


def test_other_options_are_another_measurement(start, cloud):
    asked = None
    for jobs, changes in enumerate(
        [{}, {"transpiler": {"optimization_level": 1}}, {"resilience_level": 2, "estimator": ZNE}], start=1
    ):
        runner = start(**{"shots": 4096, **changes})
        asked = points(runner) if asked is None else asked
        values, _ = runner.expectations(asked)
        assert np.abs(values - expectations(ANSATZ, *angles_and_inputs(ANSATZ, 2))).max() <= 5 / 4096**0.5
        assert len(cloud.jobs) == jobs
        start(**{"shots": 4096, **changes}).expectations(asked)
        assert len(cloud.jobs) == jobs, "the journal answers the same options"
    assert cloud.options[-1]["resilience"] == ZNE["resilience"]
    assert PAID.shots == 64


def test_they_are_in_the_price():
    isa = ISACircuit(Ansatz(2, 1), MANILA)

    def of(estimator, **changes):
        price = rate(isa, IBMOptions(**REAL | changes, estimator=estimator), MANILA)
        return price.executions, price.learning

    assert of(ZNE, resilience_level=2) == (4 * 4096, 32 * 256)  # 16 randomisations of 256 shots, four noise factors
    assert of({"twirling": {"num_randomizations": 16}}) == (4096, 32 * 256)
    assert of({"twirling": {"shots_per_randomization": 1000}}) == (5000, 32 * 1000)
    assert of({"resilience": {"measure_mitigation": True, **LEARN}}) == (4096, 8 * 128)
    assert of({"resilience": {"measure_mitigation": False}}) == (4096, 0)
    layers = 4 * 9 * 6 * 32 * 128  # layers, bases, depths, randomisations, shots
    assert of({"resilience": {"pec_mitigation": True, "pec": {"max_overhead": 10}}}) == (40960, 32 * 64 + layers)
    pea = {"resilience": {"zne_mitigation": True, "zne": {"amplifier": "pea"}}}
    assert of(pea) == (5 * 4096, 32 * 128 + layers)
    slow = IBMOptions(**REAL, estimator={"execution": {"rep_delay": 1e-2}})
    assert rate(isa, slow, MANILA).seconds - rate(isa, IBMOptions(**REAL), MANILA).seconds == pytest.approx(1e-2 - 250e-6)
