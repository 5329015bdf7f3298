"""What a configuration will cost on IBM Quantum, before anything is submitted: `axolotl qtha-estimate`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ..errors import refusal
from ..ibm.circuits import ISACircuit
from ..ibm.cost import SUB_JOB_SECONDS, USAGE, Cost, Rate, gradient_circuits, rate
from ..ibm.journal import Ledger
from ..ibm.options import IBMOptions
from ..ibm.service import connect
from ..settings.training_run import TrainingRun
from ..tuner.config import QTHAConfig
from ..tuner.sizes import ansatz
from ..tuner.targets import select_targets

if TYPE_CHECKING:
    from qiskit.providers import BackendV2


@dataclass(frozen=True)
class Estimate:
    """What a configuration will cost."""

    backend: str
    calibration: str
    options: IBMOptions
    qubits: int  # of one of our circuits
    blocks: int  # of our circuits, for each token and layer
    layers: int  # adapted ones with circuits of their own
    micro_batches: int  # of a training step
    tokens: int  # of each micro-batch that go to the device
    gradient_circuits: int  # of one of our circuits
    rate: Rate
    step: Cost
    steps: int | None  # of the run; None: not known
    used: float  # QPU seconds of the journal's jobs, those under way included
    evaluating: Cost  # one batch of `axolotl evaluate`
    asked: int  # tokens of the rows on reading and writing
    reading: Cost  # that many in one pass
    writing: Cost  # one after the other
    packed: tuple[int, float] | None = None  # how many of ours `pack: auto` would have in one, and the QPU seconds of a step then

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
    wide: ISACircuit | None = None,
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
        asked: tokens of the table's rows on reading and writing.
        wide: its circuit as `pack: auto` would have it, to say what that saves.
    """
    options = config.ibm
    assert options is not None
    price, some = rate(isa, options, backend), min(tokens, options.tokens_per_step)
    backward = gradient_circuits(isa.gates, options, (True, config.quantum != "frozen"))
    blocks, read = config.blocks, min(asked, options.tokens_per_step)

    def step_of(price: Rate) -> Cost:
        return (price.cost(some * blocks) + price.cost(some * blocks * backward)) * (layers * micro_batches)

    step, packed = step_of(price), None
    if wide is not None and wide.pack > isa.pack:
        packed = wide.pack, step_of(rate(wide, options, backend)).qpu_seconds
    return Estimate(
        backend=str(backend.name),
        calibration=calibration,
        options=options,
        qubits=ansatz(config).qubits,
        blocks=blocks,
        layers=layers,
        micro_batches=micro_batches,
        tokens=some,
        gradient_circuits=backward,
        rate=price,
        step=step,
        steps=steps,
        used=used,
        evaluating=price.cost(min(evaluated, options.tokens_per_step) * blocks) * layers,
        asked=asked,
        reading=price.cost(read * blocks) * layers,
        writing=price.cost(blocks) * (layers * asked),
        packed=packed,
    )


def estimate_run(run: TrainingRun, steps: int | None, asked: int) -> Estimate:
    """Return what a training and its adapter will cost; this loads no weights and submits nothing.

    Args:
        run: the training.
        steps: of it, if not those of its YAML.
        asked: tokens of the table's rows on reading and writing.

    Raises:
        ValueError: if it does not run on IBM Quantum, the base cannot be built, or the device cannot be had.
    """
    config = run.adapter
    options = config.ibm
    if options is None:
        works = "`quantum_backend: ibm` with e.g. `ibm: {backend: fake:manila}`"
        raise refusal("quantum_backend", config.quantum_backend, "costs no QPU time", works)
    layers = sum(size.owned.runs for size in select_targets(config, run.base()).values())
    ledger = Ledger.read(Path(options.journal))
    circuit = ansatz(config)
    service = connect(options, circuit.qubits, ledger.last_backend())
    placed = "initial_layout" in (options.transpiler or {})  # one circuit, where its user wants it
    packed = None if options.pack != 1 or placed else options.model_copy(update={"pack": "auto"})
    wide = None if packed is None else ISACircuit(circuit, service.backend, packed)
    return estimate(
        config,
        layers,
        ISACircuit(circuit, service.backend, options),
        service.backend,
        service.calibration,
        tokens=run.tokens,
        micro_batches=run.accumulation,
        steps=run.max_steps if steps is None else steps,
        used=ledger.used(service.local) + ledger.under_way(service.local),
        evaluated=run.evaluated,
        asked=asked,
        wide=wide,
    )


def table(result: Estimate) -> Table:
    """Return the estimate as a table."""
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
        f"One circuit: {_width(result)}, {gates}; depth {price.depth}, {price.two_qubit_gates} two-qubit gates; "
        f"{options.executions:,} shots, {price.executions:,} executions of {price.seconds * 1e6:,.1f} us "
        f"({'typical, the device does not say' if price.assumed else 'from the device'}); calibration {result.calibration}.",
        f"A step: {result.layers} adapted layers x {result.micro_batches} micro-batches x {result.tokens} tokens on the device x "
        f"{result.blocks} block{'s' * (result.blocks > 1)} of {result.qubits} qubits, each run once and at most "
        f"{result.gradient_circuits} times for its gradient ({options.gradient}; not where nothing depends on the token). A "
        f"circuit of the device holds {price.pack} of them, a job at most {price.circuits_per_job:,} circuits.{_packed(result)}",
        f"By IBM's formula ({USAGE}): {SUB_JOB_SECONDS:g} s a job, and repetition delay and circuit length an execution. A base "
        "line of unknown error: IBM may split jobs, error mitigation adds circuits of IBM's choosing"
        + (", and a session is billed while it waits: a lower bound." if options.mode == "session" else "."),
        "Evaluations while training run on the exact simulator and cost nothing. `axolotl evaluate` and `inference` run on the "
        "device, `evaluate` every batch of the training and the test data.",
        verdict(result),
    ]
    return "\n".join(lines)


def _width(result: Estimate) -> str:
    pack = result.rate.pack
    return f"{result.qubits} qubits" if pack == 1 else f"{pack} blocks of {result.qubits} qubits side by side"


def _packed(result: Estimate) -> str:
    if result.packed is None:
        return ""
    blocks, seconds = result.packed
    return f" With `ibm: {{pack: auto}}` a circuit would hold {blocks}, and a step take {seconds:,.1f} QPU seconds."


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
