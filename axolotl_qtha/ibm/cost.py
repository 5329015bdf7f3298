"""Prices: what circuits cost on a device, before anything is submitted.

IBM's published formula (`USAGE`): about 2 seconds for each sub-job, and (rep_delay + circuit length) for each execution. How far
that is off is not known: how IBM splits a job, and what error mitigation adds, is known to IBM alone. Mitigation is counted as
the documentation of the options describes it. For `mode: session` IBM bills the time it is open, waiting included: this is then a
lower bound.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..circuit.shifts import GateAngles, shift_circuits
from .options import IBMOptions
from .passed_on import at, twirled

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from qiskit.circuit import Qubit
    from qiskit.providers import BackendV2

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
PEA_FACTORS = (1, 1.5, 2, 2.5, 3)  # where noise is injected and not folded in
RANDOMIZATIONS = 32  # of twirling and of learning the read-out: defaults of the runtime's options
LEAST_SHOTS = 64  # per randomisation, likewise
MAX_OVERHEAD = 100  # of PEC, likewise: as many executions at most
LEARNED_LAYERS, LEARNED_DEPTHS, LEARNED_SHOTS = 4, 6, 128  # of learning the noise of layers, likewise
LEARNED_BASES = 9  # pairs of Paulis that a layer is measured in


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
    """What a circuit of the device costs, which holds `pack` of ours (blocks)."""

    gates: dict[str, int]
    depth: int
    two_qubit_gates: int
    executions: int  # of one circuit
    learning: int  # further executions of each job, to calibrate the read-out
    seconds: float  # of one execution
    assumed: bool  # the device does not say how long its gates take
    circuits_per_job: int  # rows of angles
    pack: int = 1

    def job(self, circuits: int) -> Cost:
        """Return the cost of one job of so many of the device's circuits."""
        executions = circuits * self.executions + self.learning
        return Cost(circuits, 1, executions, SUB_JOB_SECONDS + executions * self.seconds)

    def cost(self, blocks: int) -> Cost:
        """Return the cost of blocks that are asked for together, in as few jobs as the limits allow."""
        full, rest = divmod(-(-blocks // self.pack), self.circuits_per_job)
        return self.job(self.circuits_per_job) * full + (self.job(rest) if rest else Cost(0, 0, 0, 0.0))


def rate(isa: ISACircuit, options: IBMOptions, backend: BackendV2) -> Rate:
    """Return what a circuit of a device costs."""
    executions, learning, longer = mitigated(options)
    length = isa.seconds(backend)
    delay = at(options.estimator, "execution.rep_delay") or getattr(backend, "default_rep_delay", None) or REP_DELAY
    circuit = isa.circuit
    instructions = PREPARATION + longer * _instructions(circuit)
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
        pack=isa.pack,
    )


def mitigated(options: IBMOptions) -> tuple[int, int, float]:
    """Return executions of a circuit, those that each job learns from, and how many times as long circuits are on average."""
    further, shots = options.estimator, options.executions
    resilience = at(further, "resilience") or {}
    number, per = (at(further, f"twirling.{name}") for name in ("num_randomizations", "shots_per_randomization"))
    pec, pea = bool(resilience.get("pec_mitigation")), at(further, "resilience.zne.amplifier") == "pea"
    if not isinstance(per, int):
        usual = LEAST_SHOTS if pec else max(LEAST_SHOTS, math.ceil(shots / RANDOMIZATIONS))
        per = math.ceil(shots / number) if isinstance(number, int) else usual
    if twirled(further, options.resilience_level, options.twirling):
        shots = per * math.ceil(shots / per)
    learning, longer = 0, 1.0
    if resilience.get("measure_mitigation", options.resilience_level > 0):
        learn = resilience.get("measure_noise_learning") or {}
        each = learn.get("shots_per_randomization")
        learning = learn.get("num_randomizations", RANDOMIZATIONS) * (each if isinstance(each, int) else per)
    if resilience.get("zne_mitigation", options.resilience_level == 2):
        factors = at(further, "resilience.zne.noise_factors") or (PEA_FACTORS if pea else NOISE_FACTORS)
        shots *= len(factors)
        longer = 1.0 if pea else sum(factors) / len(factors)
    if pec:
        shots = math.ceil(shots * float(at(further, "resilience.pec.max_overhead") or MAX_OVERHEAD))
    if pec or pea:
        layers = resilience.get("layer_noise_learning") or {}
        depths = len(layers.get("layer_pair_depths") or range(LEARNED_DEPTHS))
        learned = layers.get("num_randomizations", RANDOMIZATIONS) * layers.get("shots_per_randomization", LEARNED_SHOTS)
        learning += layers.get("max_layers_to_learn", LEARNED_LAYERS) * LEARNED_BASES * depths * learned
    return shots, learning, longer


def _instructions(circuit: QuantumCircuit) -> int:
    """Return the instructions on the qubit that has the most."""
    counts: Counter[Qubit] = Counter()
    for gate in circuit.data:
        for qubit in gate.qubits:
            counts[qubit] += INSTRUCTIONS.get(gate.operation.name, 5)
    return max(counts.values(), default=0)


def gradient_circuits(gates: GateAngles, options: IBMOptions, wants: tuple[bool, bool] = (True, True)) -> int:
    """Return how many circuits the gradient of one takes, on one token."""
    if options.gradient == "none" or not any(wants):
        return 0
    if options.gradient == "spsa":
        return 2 * options.spsa_draws
    return shift_circuits(gates, wants)
