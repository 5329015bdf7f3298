"""A training with `quantum_backend: ibm`: what is logged, against the journal; what evaluations cost; what is refused."""

import logging
import re

import numpy as np
import pytest
import torch
from qiskit.quantum_info import Statevector
from transformers import Trainer, TrainingArguments

from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.ibm import engine
from axolotl_qtha.ibm.journal import Journal
from axolotl_qtha.ibm.runner import Runner
from axolotl_qtha.ibm.service import LocalService
from axolotl_qtha.training.device_callback import TrainOnDevice, refuse_untrainable, show_inference_cost
from axolotl_qtha.tuner.backends import prepare

from ..ibm.boundary import NOISELESS
from ..models import VOCABULARY, adapted, config, llama

pytestmark = pytest.mark.filterwarnings("ignore:.*no QubitProperties")

TOKENS, LAYERS = 3, 2
IBM = {"backend": "fake:manila", "shots": 200, "resilience_level": 0, "tokens_per_step": TOKENS, "gradient": "spsa"}
KEYS = ("qpu_bias", "qpu_variance", "qpu_standard_error", "qpu_tokens", "qpu_seconds")
SETTINGS = {"rank": 2, "circuit_layers": 1, "mpo": "none", "target_modules": ["down_proj"], "quantum_backend": "ibm"}
SETTINGS |= {"branch_init": "kaiming"}  # so that the second step has a gradient for the circuit
ROWS = torch.randint(VOCABULARY, (8, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return what makes a trainer on a noiseless device; all of them have one journal."""
    journal = Journal(tmp_path)

    def start(ibm=None, **arguments):
        settings = {**SETTINGS, "ibm": {**IBM, "journal": str(tmp_path), **(ibm or {})}}
        options = config(**settings).ibm
        runner = Runner(Ansatz(2, 1), options, LocalService(NOISELESS, options), journal)
        monkeypatch.setattr(engine, "runner", lambda *_: runner)
        model = adapted(llama(LAYERS), **settings)
        rows = [{"input_ids": row, "labels": row} for row in ROWS]
        common = {"max_steps": 2, "per_device_train_batch_size": 1, "learning_rate": 0.01, "logging_steps": 1}
        common |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        arguments = TrainingArguments(str(tmp_path / "out"), **{**common, **arguments})
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])
        trainer.add_callback(TrainOnDevice(trainer, model.active_peft_config, tokens=7))
        return trainer

    start.journal = journal
    yield start
    engine.CALLS.on_device = True
    engine.CALLS.take()
    journal.close()


def steps(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


def forwards(journal):
    """Return <Z> less the exact one, from Qiskit's state vector, and the standard errors, of each forward pass in the journal."""
    runner, offs, errors = engine.runner(), [], []
    for entry in journal.entries.values():
        if entry.circuits == TOKENS:
            asked = journal.asked(entry.tag)
            circuit, (observables,), values = runner.isa.pub(asked["points"])
            states = [Statevector(circuit.assign_parameters(row[0])) for row in values]
            exact = np.array([[state.expectation_value(z).real for z in observables] for state in states])
            results = [journal.result(entry.calibration, key.tobytes()) for key in asked["hashes"]]
            offs.append(np.array([value for value, _ in results]) - exact)
            errors.append(np.array([error for _, error in results]))
    return offs, errors


CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "calls"),
    [({}, 1), ({"gradient_accumulation_steps": 2}, 2), ({"logging_steps": 2}, 2), (CHECKPOINTING, 1)],
    ids=["a step", "two micro-batches", "two steps a row", "checkpointing"],
)
def test_a_row_of_the_log_has_all_calls_since_the_last(start, arguments, calls):
    trainer = start(**arguments)
    trainer.model(input_ids=ROWS[:1].flip(1))  # before the training
    before = len(start.journal.entries)
    trainer.train()
    offs, errors = forwards(start.journal)
    offs, errors = offs[before:], errors[before:]
    rows, each = steps(trainer), calls * LAYERS
    assert len(offs) == len(errors) == each * len(rows)
    for i, row in enumerate(rows):
        off, error = (np.concatenate(parts[i * each : (i + 1) * each]) for parts in (offs, errors))
        assert row["qpu_tokens"] == TOKENS * each == len(off)
        assert row["qpu_bias"] == pytest.approx(off.mean(), abs=1e-6)
        assert row["qpu_variance"] == pytest.approx(off.var(), abs=1e-6)
        assert row["qpu_standard_error"] == pytest.approx(np.sqrt((error**2).mean()))
        assert 0.2 < row["qpu_standard_error"] ** 2 / row["qpu_variance"] < 5, "without noise all of it is shots"
        assert row["qpu_seconds"] == 0
    assert engine.CALLS.take() == []


def test_evaluations_while_training_cost_nothing_and_do_not_leak(start):
    trainer = start(eval_strategy="steps", eval_steps=1, eval_on_start=True)
    trainer.train()
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert len(evaluations) == 3
    assert not any(key.endswith(KEYS) for row in evaluations for key in row)
    assert [row["qpu_tokens"] for row in steps(trainer)] == [TOKENS * LAYERS] * 2
    assert len(forwards(start.journal)[0]) == 2 * LAYERS
    jobs = len(start.journal.entries)
    exact = adapted(llama(LAYERS), **{**SETTINGS, "quantum_backend": "torch"})
    exact.load_state_dict(trainer.model.state_dict())
    losses = [exact(input_ids=row[None], labels=row[None]).loss.item() for row in ROWS[:2]]
    assert evaluations[-1]["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-6)
    # an evaluation by itself is on the device, with figures of its own
    metrics = trainer.evaluate(metric_key_prefix="test")
    assert len(start.journal.entries) == jobs + LAYERS
    assert metrics["test_qpu_tokens"] == TOKENS * LAYERS
    assert {f"test_{key}" for key in KEYS} < set(metrics)
    assert abs(metrics["test_loss"] - evaluations[-1]["eval_loss"]) > 1e-7
    assert engine.CALLS.take() == []


@pytest.mark.slow
def test_the_same_training_again_is_answered_by_the_journal(start):
    logs = []
    for _ in range(2):
        trainer = start()
        trainer.train()
        logs.append([[row[key] for key in ("loss", *KEYS)] for row in steps(trainer)])
        jobs = len(start.journal.entries)
    assert logs[0] == logs[1]
    assert jobs == len(start.journal.entries) == 2 * LAYERS + LAYERS, "the gradient of the first step is zero: no circuits"


@pytest.mark.parametrize(("cap", "level", "words"), [(None, logging.INFO, "free of charge"), (5, logging.WARNING, "5.0 left")])
def test_the_cost_is_told_before_the_first_step(start, caplog, cap, level, words):
    trainer = start({"max_qpu_seconds": cap})
    seconds = engine.runner().cost(TOKENS).qpu_seconds + engine.runner().cost(2 * TOKENS).qpu_seconds
    trainer.train()
    (told,) = [record for record in caplog.records if "2 steps on" in record.message]
    assert told.levelno == level
    assert f"at most {2 * LAYERS * 3 * TOKENS} circuits in {2 * LAYERS * 2} jobs" in told.message
    assert f"{2 * LAYERS * seconds:,.1f} QPU seconds" in told.message
    assert words in told.message
    assert "Evaluations run on the exact simulator" in told.message


def test_a_training_that_failed_leaves_the_device_to_the_next(start, monkeypatch):
    trainer = start(eval_strategy="steps", eval_steps=1)
    monkeypatch.setattr(trainer, "evaluation_loop", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    z, angles, how = torch.zeros(1, 2), torch.zeros(Ansatz(2, 1).rows, 2), trainer.model.active_peft_config.simulation
    engine.expectation_values(z, angles, Ansatz(2, 1), how)
    assert engine.CALLS.take() == []
    prepare(Ansatz(2, 1), how)
    engine.expectation_values(z, angles, Ansatz(2, 1), how)
    assert len(engine.CALLS.take()) == 1


@pytest.mark.parametrize(
    ("changes", "rl", "words"),
    [
        ({"gradient": "none"}, None, r"qtha.ibm.gradient: 'none' trains nothing.*`gradient: parameter_shift` or `spsa`"),
        (
            {},
            "grpo",
            r"qtha.quantum_backend: 'ibm' with `rl: grpo` would write each answer on the device.*`quantum_backend: torch`",
        ),
    ],
)
def test_trainings_that_cannot_be(changes, rl, words):
    with pytest.raises(ValueError, match=words):
        refuse_untrainable(config(**{**SETTINGS, "ibm": {**IBM, **changes}}), rl)
    refuse_untrainable(config(**SETTINGS, ibm=IBM), "dpo")
    refuse_untrainable(config(**{**SETTINGS, "quantum_backend": "torch"}), "grpo")


@pytest.mark.parametrize(
    ("cap", "words"),
    [
        (None, "The device is simulated here, free of charge."),
        (1000, r"max_qpu_seconds: 1000, 1,000.0 left: enough for about \d+ tokens; then the run stops."),
        (0.5, "max_qpu_seconds: 0.5, 0.5 left: enough for about 0 tokens"),
    ],
)
def test_inference_tells_its_cost_before_the_first_token(start, caplog, cap, words):
    settings = start({"max_qpu_seconds": cap}).model.active_peft_config
    run = engine.runner()
    show_inference_cost(settings, layers=3)
    (line,) = [record.message for record in caplog.records if "Each written token" in record.message]
    assert re.search(words, line), line
    each = run.rate.job(1)
    assert f"takes 3 circuits in 3 jobs on {run.service.name}" in line
    assert f"{3 * each.qpu_seconds:,.1f} QPU seconds" in line
    if cap == 1000:
        prompt = 3 * run.rate.job(settings.ibm.tokens_per_step).qpu_seconds
        assert f"about {int((1000 - prompt) / (3 * each.qpu_seconds)):,} tokens" in line
    assert not run.journal.entries, "nothing was submitted"
