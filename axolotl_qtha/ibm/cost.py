"""What circuits will cost on a device, before anything is submitted.

IBM's published formula (`USAGE`): about 2 seconds for each sub-job, and (rep_delay + circuit length) for each execution. It is a
base line: how IBM splits a job, and what error mitigation adds, is known to IBM alone. Mitigation is counted as the documentation
of the options describes it. For `mode: session` IBM bills the time it is open, waiting included: this is then a lower bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..circuit.shifts import RULES, GateAngles
from .options import IBMOptions

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault
    from qiskit.providers import BackendV2
    from rich.table import Table

    from ..tuner.config import QTHAConfig
    from .circuits import ISACircuit

USAGE = "https://quantum.cloud.ibm.com/docs/guides/estimate-job-run-time"
LIMITS = "https://quantum.cloud.ibm.com/docs/guides/job-limits"
SUB_JOB_SECONDS = 2.0  # USAGE: "approximately"
REP_DELAY = 250e-6  # USAGE: of most devices, where one does not say
CIRCUIT_SECONDS = 100e-6  # USAGE: a typical circuit has 50 to 100 us; where the device does not say
MAX_EXECUTIONS = 5_000_000  # of a job; LIMITS: 5 to 10 million over the years, Estimator jobs of more are split
MAX_INSTRUCTIONS = 26_800_000  # per qubit and job, LIMITS
INSTRUCTIONS = {"rz": 1, "delay": 1, "sx": 2, "x": 2, "cx": 5, "cz": 5, "ecr": 5}  # LIMITS; others are taken as 5
PREPARATION = 50 + 10  # instructions of one initialisation and one measurement, LIMITS
NOISE_FACTORS = (1, 3, 5)  # of resilience_level 2: default of the runtime's ZneOptions
RANDOMIZATIONS = 32  # of twirling and of learning the read-out: defaults of the runtime's options
LEAST_SHOTS = 64  # per randomisation, likewise


@dataclass(frozen=True)
class Cost:
    """What a number of circuits takes; each job is one PUB."""

    circuits: int
    jobs: int
    executions: int
    qpu_seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.circuits + other.circuits,
            self.jobs + other.jobs,
            self.executions + other.executions,
            self.qpu_seconds + other.qpu_seconds,
        )

    def __mul__(self, times: int) -> Cost:
        return Cost(times * self.circuits, times * self.jobs, times * self.executions, times * self.qpu_seconds)


@dataclass(frozen=True)
class Rate:
    """What one circuit costs on a device."""

    gates: dict[str, int]
    depth: int
    two_qubit_gates: int
    executions: int  # of one circuit
    learning: int  # executions of a job beside its circuits'
    seconds: float  # of one execution
    assumed: bool  # the device does not say how long its gates take
    circuits_per_job: int

    def job(self, circuits: int) -> Cost:
        """Return the cost of one job."""
        executions = circuits * self.executions + self.learning
        return Cost(circuits, 1, executions, SUB_JOB_SECONDS + executions * self.seconds)

    def cost(self, circuits: int) -> Cost:
        """Return the cost of circuits that are asked for together, in as few jobs as the limits allow."""
        full, rest = divmod(circuits, self.circuits_per_job)
        return self.job(self.circuits_per_job) * full + (self.job(rest) if rest else Cost(0, 0, 0, 0.0))


def rate(isa: ISACircuit, options: IBMOptions, backend: BackendV2) -> Rate:
    """Return what one circuit costs on a device."""
    shots, learning = options.executions, 0
    per_randomization = max(LEAST_SHOTS, math.ceil(shots / RANDOMIZATIONS))
    if options.resilience_level > 0 or options.twirling:
        shots = per_randomization * math.ceil(shots / per_randomization)
    if options.resilience_level > 0:
        learning = RANDOMIZATIONS * per_randomization
    length, longer = isa.seconds(backend), 1.0
    if options.resilience_level == 2:
        shots *= len(NOISE_FACTORS)
        longer = sum(NOISE_FACTORS) / len(NOISE_FACTORS)
    delay = getattr(backend, "default_rep_delay", None) or REP_DELAY
    executions = math.ceil(shots)
    circuit = isa.circuit
    instructions = PREPARATION + longer * sum(INSTRUCTIONS.get(name, 5) * count for name, count in circuit.count_ops().items())
    most = min((MAX_EXECUTIONS - learning) // executions, int(MAX_INSTRUCTIONS // instructions))
    return Rate(
        gates=dict(circuit.count_ops()),
        depth=circuit.depth(),
        two_qubit_gates=circuit.num_nonlocal_gates(),
        executions=executions,
        learning=learning,
        seconds=delay + longer * (CIRCUIT_SECONDS if length is None else length),
        assumed=length is None,
        circuits_per_job=max(1, most),
    )


def gradient_circuits(gates: GateAngles, options: IBMOptions, wants: tuple[bool, bool] = (True, True)) -> int:
    """Return how many circuits the gradient of one token takes."""
    if options.gradient == "none" or not any(wants):
        return 0
    if options.gradient == "spsa":
        return 2 * options.spsa_draws
    return sum(2 * len(RULES[gates.kinds[k]]) for k in np.flatnonzero(gates.wanted(wants)))


@dataclass(frozen=True)
class Estimate:
    """What a configuration will cost."""

    backend: str
    calibration: str
    options: IBMOptions
    qubits: int
    layers: int  # adapted ones: each has a circuit per token
    micro_batches: int  # of a training step
    tokens: int  # of each micro-batch that go to the device
    gradient_circuits: int  # of one token
    rate: Rate
    step: Cost
    steps: int | None  # of the run; None: not known
    used: float  # QPU seconds of the journal's jobs, those under way included
    evaluating: Cost  # one batch of `axolotl evaluate`
    asked: int  # tokens of the inference rows
    reading: Cost  # that many in one pass
    writing: Cost  # one after the other

    @property
    def run(self) -> Cost | None:
        """What the training will cost at most; None where its number of steps is not known."""
        return None if self.steps is None else self.step * self.steps

    @property
    def left(self) -> float:
        """QPU seconds that the journal has left of max_qpu_seconds."""
        cap = self.options.max_qpu_seconds
        return math.inf if cap is None else cap - self.used

    @property
    def over(self) -> float | None:
        """QPU seconds by which the run, or one step of it, exceeds what is left of max_qpu_seconds; None where it does not."""
        excess = (self.run or self.step).qpu_seconds - self.left
        return excess if excess > 0 else None


def estimate(
    config: QTHAConfig,
    layers: int,
    isa: ISACircuit,
    backend: BackendV2,
    calibration: str,
    *,
    tokens: int,
    micro_batches: int,
    steps: int | None,
    used: float,
    evaluated: int,
    asked: int,
) -> Estimate:
    """Return what training, evaluation and inference will cost.

    Args:
        config: the adapter.
        layers: adapted layers.
        isa: its circuit on the device.
        backend: the device.
        calibration: its date.
        tokens: of one micro-batch.
        micro_batches: of a training step.
        steps: of the run, if known.
        used: QPU seconds of the journal's jobs, those under way included.
        evaluated: tokens of a batch of `axolotl evaluate`.
        asked: tokens of the inference rows.
    """
    options = config.simulation.ibm
    assert options is not None
    price, some = rate(isa, options, backend), min(tokens, options.tokens_per_step)
    backward = gradient_circuits(isa.gates, options, (True, config.quantum != "frozen"))
    step = (price.cost(some) + price.cost(some * backward)) * (layers * micro_batches)
    return Estimate(
        backend=str(backend.name),
        calibration=calibration,
        options=options,
        qubits=config.rank,
        layers=layers,
        micro_batches=micro_batches,
        tokens=some,
        gradient_circuits=backward,
        rate=price,
        step=step,
        steps=steps,
        used=used,
        evaluating=price.cost(min(evaluated, options.tokens_per_step)) * layers,
        asked=asked,
        reading=price.cost(min(asked, options.tokens_per_step)) * layers,
        writing=price.cost(1) * (layers * asked),
    )


def estimate_config(cfg: DictDefault, steps: int | None, asked: int) -> Estimate:
    """Return what a validated Axolotl configuration will cost; neither weights are loaded nor anything submitted.

    Raises:
        ValueError: if it does not run on IBM Quantum, the base cannot be built, or the device cannot be had.
    """
    from ..errors import refusal
    from ..planner.memory import sequences
    from ..settings.args import adapter_config
    from ..settings.meta_base import meta_base
    from ..tuner.model import select_targets
    from ..tuner.sizes import ansatz
    from .circuits import ISACircuit
    from .journal import Ledger
    from .service import connect

    config = adapter_config(cfg)
    options = config.simulation.ibm
    if options is None:
        works = "`quantum_backend: ibm` with e.g. `ibm: {backend: fake:manila}`"
        raise refusal("quantum_backend", config.quantum_backend, "costs no QPU time", works)
    layers = len(select_targets(config, meta_base(cfg)))
    ledger = Ledger.read(Path(options.journal))
    service = connect(options, config.rank, ledger.last_backend())
    if steps is None and cfg.max_steps and cfg.max_steps > 0:
        steps = cfg.max_steps
    return estimate(
        config,
        layers,
        ISACircuit(ansatz(config), service.backend),
        service.backend,
        service.calibration,
        tokens=sequences(cfg) * cfg.sequence_len,
        micro_batches=cfg.gradient_accumulation_steps or 1,
        steps=steps,
        used=ledger.used(service.local) + ledger.under_way(service.local),
        evaluated=(cfg.eval_batch_size or cfg.micro_batch_size) * cfg.sequence_len,
        asked=asked,
    )


def table(result: Estimate) -> Table:
    """Return the estimate as a table."""
    from rich.table import Table

    table = Table(title=f"ESTIMATED cost on {result.backend}, nothing was submitted")
    for column in ("", "circuits", "PUBs = jobs", "executions", "QPU seconds"):
        table.add_column(column, justify="right" if column else "left")
    rows: list[tuple[str, Cost | None]] = [
        ("a training step", result.step),
        (f"the run, {result.steps} steps", result.run),
        ("a batch of `axolotl evaluate`", result.evaluating),
        (f"reading {result.asked:,} tokens in one pass", result.reading),
        (f"writing {result.asked:,} tokens, one after the other", result.writing),
    ]
    for name, cost in rows:
        if cost is not None:
            seconds = f"{cost.qpu_seconds:,.1f}"
            table.add_row(name, f"{cost.circuits:,}", f"{cost.jobs:,}", f"{cost.executions:,}", seconds)
    return table


def explain(result: Estimate) -> str:
    """Return what the table rests on, and how it compares with the cap."""
    price, options = result.rate, result.options
    gates = ", ".join(f"{count} {gate}" for gate, count in sorted(price.gates.items()))
    lines = [
        f"One circuit: {result.qubits} qubits, {gates}; depth {price.depth}, {price.two_qubit_gates} two-qubit gates; "
        f"{options.executions:,} shots, {price.executions:,} executions of {price.seconds * 1e6:,.1f} us "
        f"({'typical, the device does not say' if price.assumed else 'from the device'}); calibration {result.calibration}.",
        f"A step: {result.layers} adapted layers x {result.micro_batches} micro-batches x {result.tokens} tokens on the device, "
        f"each 1 circuit and at most {result.gradient_circuits} for its gradient ({options.gradient}; none where nothing depends "
        f"on the token); a job has at most {price.circuits_per_job:,} circuits.",
        f"By IBM's formula ({USAGE}): {SUB_JOB_SECONDS:g} s a job, and repetition delay and circuit length an execution. A base "
        "line of unknown error: IBM may split jobs, error mitigation adds circuits of IBM's choosing"
        + (", and a session is billed while it waits: a lower bound." if options.mode == "session" else "."),
        "Evaluations while training run on the exact simulator and cost nothing. `axolotl evaluate` and `inference` run on the "
        "device, `evaluate` every batch of the training and the test data.",
        verdict(result),
    ]
    return "\n".join(lines)


def verdict(result: Estimate) -> str:
    """Return how the run compares with what is left of the cap."""
    cap, what = result.options.max_qpu_seconds, "a step" if result.run is None else "the run"
    if cap is None:
        text = "No max_qpu_seconds: the device is simulated here, free of charge; the seconds are what a real one would take."
    else:
        text = f"max_qpu_seconds: {cap:g}, {result.used:,.1f} used by the journal, {max(result.left, 0):,.1f} left: "
        if result.over is None:
            text += f"enough for {what}."
        else:
            text += (
                f"{result.over:,.1f} too few for {what}. Less: fewer tokens_per_step, shots, target_modules or circuit_layers, "
                "`gradient: spsa`, or more per job with a larger micro_batch_size. What the journal holds is not paid for again."
            )
    if result.run is None:
        text += " The number of steps is not known: give `max_steps`, or --steps."
    return text
