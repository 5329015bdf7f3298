"""The circuit on Qiskit Aer: exact or with shots, with or without noise, on the CPU or a GPU.

Every angle of every gate is a parameter of its own, so one circuit, compiled once, serves the forward pass and the parameter
shift. A call is one job of many bindings of that circuit, `CIRCUITS` at most at a time.
"""

from __future__ import annotations

import hashlib
import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from qiskit.circuit import ClassicalRegister, Parameter, QuantumCircuit
from torch import Tensor

from ..errors import refusal
from . import torch_engine
from .ansatz import Ansatz
from .noise import Compiled, compile_circuit, compile_for
from .observables import Group, groups
from .shifts import GateAngles, Slopes
from .simulation import Simulation

if TYPE_CHECKING:
    from qiskit.providers import BackendV2
    from qiskit_aer import AerSimulator

CIRCUITS = 4096  # of a job at most; fewer where their results would fill RESULT_BYTES
RESULT_BYTES = 2**26
GPU_BUILD = (
    "an NVIDIA GPU and Aer's GPU build, which takes the place of the CPU one: `pip uninstall -y qiskit-aer qiskit-aer-gpu && "
    "pip install qiskit-aer-gpu` (CUDA 12); or `quantum_backend: aer`"
)

LOG = logging.getLogger(__name__)


class Engine:
    """One circuit, compiled for one way to simulate it."""

    def __init__(self, ansatz: Ansatz, simulation: Simulation, gpu: int | None, device: BackendV2 | None = None) -> None:
        """Compile the circuit.

        Args:
            ansatz: the circuit.
            simulation: how to run it.
            gpu: index of the GPU to run on, None for the CPU.
            device: whose gates and noise to take, instead of `noise_model`.

        Raises:
            ValueError: if there is no GPU, or the memory it needs.
        """
        from qiskit_aer import AerSimulator

        if gpu is not None and "GPU" not in AerSimulator().available_devices():
            raise refusal("quantum_backend", "aer_gpu", "finds no GPU it can use", GPU_BUILD)
        self.ansatz, self.simulation = ansatz, simulation
        self.gates = GateAngles(ansatz)
        options = {} if gpu is None else {"device": "GPU", "batched_shots_gpu": True, "target_gpus": [gpu]}
        self.measurements = []
        for group in groups(self.gates.observables):
            circuit = group.turned(self.gates.circuit)
            if device:
                compiled = compile_for(circuit, device, simulation.transpiler)
            else:
                compiled = compile_circuit(circuit, simulation.noise_model, simulation.strengths)
            method = self._method(compiled)
            self._check_memory(method, compiled.width, gpu)
            simulator = AerSimulator(
                method=method,
                noise_model=compiled.noise,
                precision=simulation.precision,
                runtime_parameter_bind_enable=True,
                **options,
            )
            self.measurements.append(_Measurement(group, compiled, list(self.gates.angles), simulation.shots, simulator))
        self.chunk = max(1, min(CIRCUITS, RESULT_BYTES // (8 * 2**ansatz.qubits)))

    def _method(self, compiled: Compiled) -> str:
        """Return Aer's method: with noise the density matrix, unless one state vector per shot is less work."""
        shots = self.simulation.shots
        if compiled.noise is None or (shots is not None and shots < 2**compiled.width):
            return "statevector"
        return "density_matrix"

    def _check_memory(self, method: str, width: int, gpu: int | None) -> None:
        import psutil

        amplitudes = 2**width if method == "statevector" else 4**width
        needed = amplitudes * (8 if self.simulation.precision == "single" else 16)
        free = psutil.virtual_memory().available if gpu is None else torch.cuda.mem_get_info(gpu)[0]
        if needed > free:
            raise refusal(
                "qubits",
                self.ansatz.qubits,
                f"needs {needed / 2**30:,.1f} GiB for a {method.replace('_', ' ')} of {width} qubits "
                f"(`noise_model: {self.simulation.noise_model}`), and {free / 2**30:,.1f} GiB are free",
                f"fewer qubits, `noise_model: none`, or `shots` below {2**width:,} (one state vector per shot)",
            )

    def expectations(self, gate_angles: np.ndarray) -> np.ndarray:
        """Return <Z_i>, (circuits, n), of circuits with these gate angles (circuits, gates) in radians."""
        result = np.empty((len(gate_angles), self.ansatz.width))
        for start in range(0, len(gate_angles), self.chunk):
            part = slice(start, start + self.chunk)
            # The seed is made of the inputs and the rank: the same call gives the same shots, also when recomputed for
            # checkpointing, and no two calls of a training share theirs. Aer itself counts on from circuit to circuit.
            key, rank = self.simulation.seed.to_bytes(8, "big"), dist.get_rank() if dist.is_initialized() else 0
            for i, measurement in enumerate(self.measurements):
                data = gate_angles[part].tobytes() + (bytes([i]) if i else b"")
                digest = hashlib.blake2b(data, digest_size=4, key=key, salt=rank.to_bytes(8, "big")).digest()
                result[part, measurement.group.which] = measurement.run(gate_angles[part], int.from_bytes(digest, "big") >> 1)
        return result

    def gradients(
        self, grad: np.ndarray, z: np.ndarray, angles: np.ndarray, wants: tuple[bool, bool] = (True, True)
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradients of sum(grad * <Z>) by parameter shift: (tokens, width) for z and (rows, width) for the angles.

        `wants` says which of the two are needed; the other is left zero and costs nothing.
        """
        return Slopes(self.gates, self.expectations, grad, z, angles, wants).by_parameter_shift(self.chunk)


class _Measurement:
    """A compiled circuit with its read-out of some observables."""

    def __init__(
        self, group: Group, compiled: Compiled, angles: list[Parameter], shots: int | None, simulator: AerSimulator
    ) -> None:
        self.group, self.shots, self.simulator = group, shots, simulator
        self.circuit, self.parameters, self.mix, self.offset = _unmixed(compiled.circuit, angles)
        if shots is None:
            self.circuit.save_probabilities(compiled.qubits)
            self.values = group.values(compiled.confusion[:, 0], compiled.confusion[:, 1])
        else:  # read out by Aer
            self.circuit.add_register(ClassicalRegister(len(compiled.qubits), "z"))
            self.circuit.measure(compiled.qubits, range(len(compiled.qubits)))
            self.values = group.values()

    def run(self, gate_angles: np.ndarray, seed: int) -> np.ndarray:
        """Return the expectation values of the group's observables, (circuits, observables)."""
        columns = (gate_angles @ self.mix + self.offset).T
        binds = {parameter: column.tolist() for parameter, column in zip(self.parameters, columns, strict=True)}
        job = self.simulator.run([self.circuit], parameter_binds=[binds], shots=self.shots or 1, seed_simulator=seed)
        result = job.result()
        if not result.success:
            raise RuntimeError(f"Qiskit Aer failed on {len(gate_angles)} circuits: {result.status}")
        data = [experiment.data for experiment in result.results]
        if self.shots is None:
            exact: np.ndarray = np.array([entry.probabilities for entry in data]) @ self.values
            return exact
        values = np.zeros((len(data), len(self.group.which)))
        for row, entry in zip(values, data, strict=True):
            for state, count in entry.counts.items():
                row += count * self.values[int(state, 16)]
        return values / self.shots


def _unmixed(circuit: QuantumCircuit, angles: list[Parameter]) -> tuple[QuantumCircuit, list[Parameter], np.ndarray, np.ndarray]:
    """Give every rotation of a compiled circuit a parameter of its own: angles @ mix + offset.

    Compiling leaves expressions such as -angle / 2 + pi in the gates, which Aer would evaluate one by one in Python, most of the
    time of a job.
    """
    parameters: list[Parameter] = []
    columns, offsets = [], []
    result = circuit.copy_empty_like()
    result.global_phase = 0  # <Z> does not see it
    index = {angle: k for k, angle in enumerate(angles)}
    for gate in circuit.data:
        if not gate.operation.is_parameterized():
            result.append(gate)
            continue
        (expression,) = gate.operation.params
        parameters.append(Parameter(f"rotation_{len(parameters)}"))
        result.append(type(gate.operation)(parameters[-1]), gate.qubits)
        zero = dict.fromkeys(expression.parameters, 0.0)
        offset = float(expression.bind(zero))
        column = np.zeros(len(angles))
        for angle in expression.parameters:  # sums of angles: what compilers make of rotations is linear
            column[index[angle]] = float(expression.bind(zero | {angle: 1.0})) - offset
        columns.append(column)
        offsets.append(offset)
    return result, parameters, np.stack(columns, axis=1), np.array(offsets)


@lru_cache(maxsize=16)
def _engine(ansatz: Ansatz, simulation: Simulation, gpu: int | None) -> Engine:
    if simulation.gradient == "adjoint":
        LOG.warning("gradient: adjoint: Aer runs the circuits forward; gradients are those of the exact, noiseless circuit.")
    return Engine(ansatz, simulation, gpu)


def engine(ansatz: Ansatz, simulation: Simulation, device: torch.device | None = None) -> Engine:
    """Return the compiled circuit; with `aer_gpu`, on the GPU the tensors are on, else on this process's current one."""
    gpu = None
    if simulation.backend == "aer_gpu":
        gpu = device.index if device is not None and device.type == "cuda" else None
        gpu = gpu if gpu is not None else (torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return _engine(ansatz, simulation, gpu)


class _Circuits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, angles: Tensor, ansatz: Ansatz, simulation: Simulation) -> Tensor:
        ctx.save_for_backward(z, angles)
        ctx.circuit = ansatz, simulation
        if z.device.type == "meta":
            return torch.empty_like(z)
        run = engine(ansatz, simulation, z.device)
        values = run.expectations(run.gates.points(to_numpy(z), to_numpy(angles)))
        return torch.from_numpy(values).to(z).view(z.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        z, angles = ctx.saved_tensors
        ansatz, simulation = ctx.circuit
        if z.device.type == "meta":
            return torch.empty_like(z), torch.empty_like(angles), None, None
        if simulation.gradient == "adjoint":
            return *torch_engine.gradients(grads[0], z, angles, ansatz), None, None
        run = engine(ansatz, simulation, z.device)
        grad_z, grad_angles = run.gradients(to_numpy(grads[0]), to_numpy(z), to_numpy(angles), ctx.needs_input_grad[:2])
        return torch.from_numpy(grad_z).to(z), torch.from_numpy(grad_angles).to(angles), None, None


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a tensor as float64 on the CPU."""
    result: np.ndarray = tensor.detach().to("cpu", torch.float64).numpy()
    return result


def prepare(ansatz: Ansatz, simulation: Simulation) -> None:
    """Compile the circuit.

    Raises:
        ValueError: naming the key, where there is no GPU, no such device, or not enough memory.
    """
    engine(ansatz, simulation)


@torch.compiler.disable
def expectation_values(z: Tensor, angles: Tensor, ansatz: Ansatz, simulation: Simulation) -> Tensor:
    """Run the circuit on Aer; for the arguments see `tuner/backends.py`."""
    torch_engine.check_shapes(z, angles, ansatz)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    flat, angles = z.reshape(-1, z.shape[-1]).to(dtype), angles.to(dtype)
    if z.device.type != "meta":
        torch_engine.check_finite(flat, angles, ansatz)
    result: Tensor = _Circuits.apply(flat, angles, ansatz, simulation)
    return result.reshape(z.shape)
