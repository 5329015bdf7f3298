"""The same text with circuits run in several ways: exactly, with shots, with a device's noise model, and on the device.

The answers are given, not written: writing one would take a job per layer and token. What a device does to the circuits is
compared at the inputs it was given itself; what that does to the model, over all layers together.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from ..circuit import torch_engine
from ..circuit.aer import Engine, to_numpy
from ..circuit.simulation import Simulation
from ..ibm.runner import Runner
from ..trained.calibration_text import IGNORED, Batch
from ..trained.passes import Pass
from ..tuner.adapter import QTHAAdapter
from ..tuner.bottleneck import Bottleneck, Circuit

EXACT, SHOTS, NOISE, DEVICE = "exact", "shots", "noise model", "device"
POINTS = 2000  # pairs of <Z> kept of each way, for the plot

Values = tuple[np.ndarray, np.ndarray]  # <Z> and their standard errors, (circuits, n)
Measurement = Callable[..., Values]  # of gate angles, (circuits, gates) in radians; the device's also of the draws' keys


@dataclass
class Deviation:
    """<Z> less the exact <Z> of the same circuits, for each qubit over layers and tokens."""

    bias: list[float]  # mean
    std: list[float]
    worst: list[float]  # largest absolute value
    standard_error: list[float]  # root mean square of what the shots alone explain


@dataclass
class Way:
    """What became of the text with circuits run in one way."""

    name: str
    perplexity: float = 1.0
    difference: float = 0.0  # log-likelihood of an answer's token, mean, less the exact one; in nats
    standard_error: float | None = 0.0  # of the difference, over answers; None for one alone
    token_agreement: float = 1.0  # share of answers' tokens with the exact first choice
    answer_agreement: float = 1.0  # share of answers all of whose tokens have it
    kl: float = 0.0  # KL(exact || this), nats per token
    deviation: Deviation | None = None  # None: exact
    seconds: float = 0.0  # wall clock
    points: list[tuple[float, float]] = field(default_factory=list)  # some exact <Z> and what was found
    by_place: list[float] = field(default_factory=list)  # root mean square of <Z> less the exact one in each place of a circuit


@dataclass
class _Seen:
    """Circuits of one way."""

    run: Measurement
    limit: int | None  # tokens of a sequence, its last ones; None: all
    placed: bool = False  # whether it is asked for which place of the device's circuit each was run in
    drawn: Counter[bytes] | None = None  # the device's circuits so far: an equal one is run again, with shots of its own
    mask: Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.bool))  # of the batch: which tokens are run
    exact: list[np.ndarray] = field(default_factory=list)
    found: list[np.ndarray] = field(default_factory=list)
    errors: list[np.ndarray] = field(default_factory=list)
    places: list[np.ndarray] = field(default_factory=list)  # of the device's circuit, that each circuit was run in


def ways(runner: Runner, simulation: Simulation) -> dict[str, Measurement | None]:
    """Return the ways to run the circuits, the exact one first."""
    shots = runner.options.executions
    ideal = Simulation("aer", shots=shots, seed=simulation.seed, transpiler=runner.options.transpiling)
    engines = {SHOTS: Engine(runner.ansatz, ideal, None), NOISE: Engine(runner.ansatz, ideal, None, runner.service.backend)}
    sampled = {name: partial(_sampled, engine, shots) for name, engine in engines.items()}
    return {EXACT: None, **sampled, DEVICE: runner.expectations}


def _sampled(engine: Engine, shots: int, points: np.ndarray) -> Values:
    values = engine.expectations(points)
    return values, np.sqrt((1 - values**2).clip(0) / shots)


def chosen(mask: Tensor, limit: int | None) -> Tensor:
    """Return which tokens are run: of each sequence of mask (sequences, length) all, or the last `limit`."""
    if limit is None:
        return mask
    after = mask.flip(1).cumsum(1).flip(1)  # counted from the end
    return mask & (after <= limit)


@torch.no_grad()
def evaluate(run: Pass, runner: Runner, how: dict[str, Measurement | None], limit: int | None) -> list[Way]:
    """Evaluate a model on the same text with its circuits run in each way.

    Args:
        run: the model, its adapters, and the text.
        runner: has the circuit.
        how: the ways, the exact one first; see `ways`.
        limit: tokens of each sequence, its last ones, whose circuits are run; the others are exact. None: all.

    Raises:
        ValueError: if the cap does not allow the device's circuits.
        JobFailed: if the device fails.
    """
    totals: dict[str, _Totals] = {}
    seen = {name: _Seen(way or _never, limit) for name, way in how.items()}
    if DEVICE in seen:
        seen[DEVICE].placed, seen[DEVICE].drawn = runner.isa.pack > 1, Counter()
    for batch in track(run.batches(), "evaluating", run.count, transient=True):
        wanted = batch.labels[:, 1:] != IGNORED
        reference: Tensor | None = None
        for name, way in how.items():
            start = time.perf_counter()
            with _circuits(run.adapters, runner, None if way is None else seen[name]):
                seen[name].mask = chosen(batch.mask, limit)
                logs = _log_probabilities(run, batch, wanted)
            reference = logs if reference is None else reference
            totals.setdefault(name, _Totals()).add(batch, wanted, logs, reference, time.perf_counter() - start)
    result = [total.way(name, totals[EXACT]) for name, total in totals.items()]
    for done in result:
        if how[done.name] is not None:
            done.deviation, done.points = _deviation(seen[done.name])
            if seen[done.name].placed:
                done.by_place = _by_place(seen[done.name], runner.isa.pack)
    return result


def _never(points: np.ndarray) -> Values:
    raise AssertionError


def _log_probabilities(run: Pass, batch: Batch, wanted: Tensor) -> Tensor:
    """Return the logarithms of the next-token distributions at the tokens of the answers, (N, vocabulary), float32."""
    logits = run.model(**batch.inputs(run.device), use_cache=False).logits[:, :-1]
    return F.log_softmax(logits[wanted.to(logits.device)].float(), dim=-1)


@contextmanager
def _circuits(adapters: dict[str, QTHAAdapter], runner: Runner, seen: _Seen | None) -> Iterator[None]:
    """Run the circuits of adapters in one way; None: exactly."""
    try:
        for adapter in adapters.values():
            join = adapter.bottleneck()
            assert isinstance(join.branch, Circuit)
            parts = runner, seen, join, join.branch, *adapter.folds()
            adapter.forward = partial(_forward, *parts)  # type: ignore[method-assign]
        yield
    finally:
        for adapter in adapters.values():
            adapter.__dict__.pop("forward", None)


def _forward(runner: Runner, seen: _Seen | None, join: Bottleneck, circuit: Circuit, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Stand for an adapter's forward."""
    join.branch = partial(_branch, runner, seen, circuit)
    z = F.linear(x, a.to(x.dtype))
    return F.linear(join(z), b.to(x.dtype))


def _branch(runner: Runner, seen: _Seen | None, circuit: Circuit, z: Tensor) -> Tensor:
    encoded = circuit.encode(z)
    exact: Tensor = torch_engine.expectation_values(encoded, circuit.angles, circuit.ansatz)
    if seen is None:
        return exact
    # an expert's tokens come without their places: then all of them are run
    mask = seen.mask if seen.mask.shape == z.shape[:-1] else torch.ones(z.shape[:-1], dtype=torch.bool)
    mask = mask.to(z.device)
    points = runner.isa.gates.points(to_numpy(encoded[mask]), to_numpy(circuit.angles))
    keys = () if seen.drawn is None else (runner.draws.keys(points, seen.drawn),)
    values, errors = seen.run(points, *keys)
    seen.exact.append(to_numpy(exact[mask]).reshape(values.shape))
    seen.found.append(values)
    seen.errors.append(errors)
    if seen.placed:
        seen.places.append(runner.places(points, *keys))
    result = exact.clone()
    result[mask] = torch.from_numpy(values).to(exact).reshape(-1, z.shape[-1])
    return result


def _by_place(seen: _Seen, pack: int) -> list[float]:
    off, places = np.concatenate(seen.found) - np.concatenate(seen.exact), np.concatenate(seen.places)
    return [float(np.sqrt((off[places == place] ** 2).mean())) if (places == place).any() else 0.0 for place in range(pack)]


def _deviation(seen: _Seen) -> tuple[Deviation, list[tuple[float, float]]]:
    exact, found, errors = (np.concatenate(parts) for parts in (seen.exact, seen.found, seen.errors))
    off = found - exact
    figures = off.mean(axis=0), off.std(axis=0), np.abs(off).max(axis=0), np.sqrt((errors**2).mean(axis=0))
    some = np.linspace(0, exact.size - 1, min(POINTS, exact.size)).astype(int)
    points = list(zip(exact.ravel()[some].tolist(), found.ravel()[some].tolist(), strict=True))
    return Deviation(*(figure.tolist() for figure in figures)), points


@dataclass
class _Totals:
    """Sums over answers, one entry each."""

    tokens: list[int] = field(default_factory=list)
    logs: list[float] = field(default_factory=list)  # log-likelihood
    same: list[int] = field(default_factory=list)  # tokens with the exact first choice
    kl: float = 0.0
    seconds: float = 0.0

    def add(self, batch: Batch, wanted: Tensor, logs: Tensor, reference: Tensor, seconds: float) -> None:
        targets = batch.labels[:, 1:][wanted].to(logs.device)
        counts = wanted.sum(dim=1).tolist()
        likely = logs.gather(1, targets[:, None])[:, 0].double()
        same = logs.argmax(1) == reference.argmax(1)
        self.tokens += counts
        self.logs += [float(part.sum()) for part in likely.split(counts)]
        self.same += [int(part.sum()) for part in same.split(counts)]
        self.kl += float(F.kl_div(logs, reference, reduction="sum", log_target=True).double())
        self.seconds += seconds

    def way(self, name: str, exact: _Totals) -> Way:
        tokens, logs, same = (np.array(part, dtype=np.float64) for part in (self.tokens, self.logs, self.same))
        count, off = tokens.sum(), logs - np.array(exact.logs)
        difference = off.sum() / count
        return Way(
            name,
            perplexity=float(np.exp(-logs.sum() / count)),
            difference=float(difference),
            standard_error=ratio_error(off, tokens),
            token_agreement=float(same.sum() / count),
            answer_agreement=float((same == tokens).mean()),
            kl=max(0.0, self.kl / count),
            seconds=self.seconds,
        )


def ratio_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Return the standard error of sum(sums) / sum(counts) over independent groups, None for one alone (Cochran, 1977, ch. 6)."""
    groups = len(sums)
    if groups < 2:
        return None
    residuals = sums - counts * sums.sum() / counts.sum()
    return float(np.sqrt(groups / (groups - 1) * (residuals**2).sum()) / counts.sum())


def circuits_of(run: Pass, limit: int | None) -> list[int]:
    """Return how many circuits each batch has in one layer."""
    blocks = next(iter(run.adapters.values())).config.blocks
    return [blocks * int(chosen(batch.mask, limit).sum()) for batch in run.batches()]


def facts(runner: Runner) -> dict[str, Any]:
    """Return what the device's figures rest on; neither names nor accounts of people."""
    service, isa = runner.service, runner.isa
    return {
        "device": service.name,
        "simulated_here": service.local,
        "calibration": service.calibration,
        "qubits": isa.qubits,  # place by place
        "pack": isa.pack,
        "observables": isa.gates.observables,  # of one circuit, Pauli labels: the last letter is its qubit 0
        "gates": dict(isa.circuit.count_ops()),
        "depth": isa.circuit.depth(),
        "two_qubit_gates": isa.circuit.num_nonlocal_gates(),
        **runner.options.measurement(),
    }


def evidence(runner: Runner) -> dict[str, Any]:
    """Return what the device's results are from: circuit, layout, calibration, versions, seed, adapter, and each job."""
    jobs = [runner.journal.entries[tag] for tag in runner.answered]
    kept = ("job_id", "tag", "time", "circuits", "calibration", "seed", "made", "qpu_seconds", "metadata")
    return {
        **runner.made,
        "seed": runner.seed,  # of the simulated shots; a real device has none
        "adapter_sha256": runner.adapter,
        "jobs": [{name: getattr(job, name) for name in kept} for job in sorted(jobs, key=lambda job: (job.time, job.tag))],
    }
