"""<Z> of some tokens from a device of IBM Quantum and of the others from the exact simulator, with gradients for all."""

from __future__ import annotations

import atexit
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..circuit import torch_engine
from ..circuit.aer import to_numpy
from ..circuit.ansatz import Ansatz
from ..circuit.shifts import Slopes
from ..circuit.simulation import Simulation
from ..errors import refusal
from .calls import CALLS, Difference
from .journal import open_journal
from .options import IBMOptions
from .runner import Runner
from .service import connect


def prepare(ansatz: Ansatz, simulation: Simulation) -> None:
    """Open the journal and connect.

    Raises:
        ValueError: naming the key, if the journal is in use, or the device cannot be had.
    """
    CALLS.on_device, CALLS.waiting = True, False  # a training that failed may have left it otherwise
    runner(ansatz, _options(simulation), simulation.seed)


def _options(simulation: Simulation) -> IBMOptions:
    assert isinstance(simulation.ibm, IBMOptions)
    return simulation.ibm


@lru_cache(maxsize=8)
def runner(ansatz: Ansatz, options: IBMOptions, seed: int = 0) -> Runner:
    """Return what runs a circuit on the device; the first call opens the journal and connects.

    Args:
        ansatz: the circuit.
        options: the device.
        seed: of the shots, where it is simulated.

    Raises:
        ValueError: naming the key, if the journal is in use, or the device cannot be had.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        works = "one process (`--launcher python`), and no `deepspeed:` or `fsdp_config:`"
        raise refusal(
            "quantum_backend", "ibm", f"has one journal and one cap, {dist.get_world_size()} ranks share neither", works
        )
    journal = open_journal(Path(options.journal))
    service = connect(options, ansatz.qubits, journal.last_backend())
    result = Runner(ansatz, options, service, journal, seed)
    if service.local:
        refuse_unsimulated(result.isa.width, result.isa.pack)
    atexit.register(result.close)
    return result


def refuse_unsimulated(width: int, pack: int) -> None:
    """Refuse circuits of a simulated device whose state does not fit this machine's memory.

    Raises:
        ValueError: naming `ibm.pack`.
    """
    import psutil

    needed, free = 16 * 2**width, psutil.virtual_memory().available
    if needed > free:
        why = f"is {width} qubits in one circuit: its state takes {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free"
        raise refusal("ibm.pack", pack, why, "`pack: auto`, which keeps to what can be simulated")


def gradients(
    run: Runner, grad: np.ndarray, z: np.ndarray, angles: np.ndarray, wants: tuple[bool, bool], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients of sum(grad * <Z>), (tokens, width) for z and (rows, width) for the angles, as `gradient` says.

    A token on which nothing depends (padding, in the last layer the prompt, all of them while the adapter is a no-op) has
    gradient zero without a circuit.

    Raises:
        ValueError: with `gradient: none`.
    """
    options = run.options

    def values(points: np.ndarray) -> np.ndarray:
        return run.expectations(points)[0]

    if options.gradient == "none":
        works = "`gradient: parameter_shift` or `spsa`, or inference and evaluation"
        raise refusal("ibm.gradient", "none", "trains nothing", works)
    grad_z, some = np.zeros(z.shape), np.flatnonzero(grad.any(axis=1))
    if not len(some):
        return grad_z, np.zeros(angles.shape)
    slopes = Slopes(run.isa.gates, values, grad[some], z[some], angles, wants)
    if options.gradient == "spsa":
        grad_z[some], by_angles = slopes.by_spsa(options.spsa_draws, seed)
    else:
        grad_z[some], by_angles = slopes.by_parameter_shift()
    return grad_z, by_angles


class _Circuits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, angles: Tensor, ansatz: Ansatz, simulation: Simulation) -> Tensor:
        ctx.save_for_backward(z, angles)
        ctx.circuit = ansatz, simulation
        run = runner(ansatz, _options(simulation), simulation.seed)
        points = run.isa.gates.points(to_numpy(z), to_numpy(angles))
        values, errors = (each.reshape(z.shape) for each in run.expectations(points))
        off = values - to_numpy(torch_engine.expectation_values(z, angles, ansatz))
        CALLS.record(points, Difference(len(z), float(off.mean()), float(off.var()), float(np.sqrt((errors**2).mean()))))
        return torch.from_numpy(values).to(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        z, angles = ctx.saved_tensors
        ansatz, simulation = ctx.circuit
        run, wants = runner(ansatz, _options(simulation), simulation.seed), ctx.needs_input_grad[:2]
        by_z, by_angles = gradients(run, to_numpy(grads[0]), to_numpy(z), to_numpy(angles), wants, simulation.seed)
        return torch.from_numpy(by_z).to(z), torch.from_numpy(by_angles).to(angles), None, None


def choose(z: Tensor, tokens: int, seed: int) -> Tensor:
    """Return which of the tokens z (all, width) go to the device, sorted: drawn from seed and z, so that it repeats itself."""
    array = to_numpy(z)
    digest = hashlib.blake2b(array.tobytes(), digest_size=8, key=seed.to_bytes(8, "big")).digest()
    random = np.random.default_rng(int.from_bytes(digest, "big"))
    chosen = np.sort(random.choice(len(array), size=min(tokens, len(array)), replace=False))
    return torch.from_numpy(chosen).to(z.device)


@torch.compiler.disable
def expectation_values(z: Tensor, angles: Tensor, ansatz: Ansatz, simulation: Simulation) -> Tensor:
    """Run `tokens_per_step` of the circuits on the device and the others exactly; for the arguments see `tuner/backends.py`."""
    options = _options(simulation)
    if not CALLS.on_device or z.device.type == "meta" or z.numel() == 0:
        return torch_engine.expectation_values(z, angles, ansatz)
    torch_engine.check_shapes(z, angles, ansatz)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    flat, angles = z.reshape(-1, z.shape[-1]).to(dtype), angles.to(dtype)
    torch_engine.check_finite(flat, angles, ansatz)
    chosen = choose(flat, options.tokens_per_step, simulation.seed)
    measured: Tensor = _Circuits.apply(flat[chosen], angles, ansatz, simulation)
    if len(chosen) == len(flat):
        return measured.reshape(z.shape)
    others = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    others[chosen] = False
    exact = torch_engine.expectation_values(flat[others], angles, ansatz)
    result = torch.empty_like(flat).index_put((chosen,), measured).index_put((others,), exact)
    return result.reshape(z.shape)
