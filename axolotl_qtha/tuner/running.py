"""How an adapter's circuits are run: the part of `QTHAConfig` that is no part of a trained adapter."""

from __future__ import annotations

from typing import Any, get_args

from ..circuit.noise import is_own
from ..circuit.simulation import STRENGTHS, Backend, Gradient, Precision, Simulation, Strengths
from ..errors import refusal
from ..ibm.options import IBMOptions
from . import arguments

MAX_SHOTS = 1_000_000  # as Aer itself
STRENGTH_KEYS = {  # and the noise models that read them
    "depolarizing_1q": ("depolarizing",),
    "depolarizing_2q": ("depolarizing",),
    "readout_error": ("depolarizing", "readout"),
}
AER_KEYS = ("shots", "seed_simulator", "noise_model", *STRENGTH_KEYS, "precision", "gradient")
SIMULATION_KEYS = ("quantum_backend", *AER_KEYS, "ibm")  # an adapter may be loaded and run in another way
AER = ("aer", "aer_gpu")  # values of `quantum_backend` that read AER_KEYS
READOUT = 0.02  # probability of either flip of `noise_model: readout`, as on today's devices


class Running:
    """How circuits are run, as `QTHAConfig` has it, whose fields these are."""

    quantum: Any
    has_circuit: Any
    rank_pattern: dict[str, int] | None
    seed: int | None
    quantum_backend: Backend
    shots: int | None
    seed_simulator: int | None
    noise_model: str
    depolarizing_1q: float | None
    depolarizing_2q: float | None
    readout_error: float | list[float] | None
    precision: Precision | None
    gradient: Gradient | None
    ibm: IBMOptions | None

    @property
    def simulation(self) -> Simulation:
        """How the circuit is run."""
        seed = self.seed if self.seed_simulator is None else self.seed_simulator
        assert seed is not None
        if self.quantum_backend == "torch":
            return Simulation()
        if self.quantum_backend not in AER:
            return Simulation(self.quantum_backend, seed=seed, ibm=self.ibm)
        precision, gradient = self.precision or "double", self.gradient or "parameter_shift"
        return Simulation(
            self.quantum_backend, self.shots, seed, self.noise_model, precision, gradient, strengths=self._strengths()
        )

    def _strengths(self) -> Strengths:
        flips = self.readout_error
        if flips is None:
            flips = READOUT if self.noise_model == "readout" else 0.0
        up, down = flips if isinstance(flips, (list, tuple)) else (flips, flips)
        return Strengths(
            STRENGTHS.one_qubit if self.depolarizing_1q is None else self.depolarizing_1q,
            STRENGTHS.two_qubits if self.depolarizing_2q is None else self.depolarizing_2q,
            (up, down),
        )

    def run_as(self, other: Running) -> None:
        """Take over from another configuration how circuits are run."""
        for key in SIMULATION_KEYS:
            setattr(self, key, getattr(other, key))
        self._check_simulation()

    def _keep_no_code(self, saved: dict[str, Any]) -> None:
        """Leave what only this machine and account know out of the settings that are saved."""
        saved.pop("ibm")
        if saved["quantum_backend"] == "ibm":
            saved["quantum_backend"] = "torch"
        if is_own(self.noise_model):
            saved["noise_model"] = "none"

    def _refuse_code(self) -> None:
        """Refuse a saved adapter that names code to import, which whoever made it would have run here."""
        if isinstance(self.noise_model, str) and is_own(self.noise_model):
            why = "names code to import, and a saved adapter may not"
            raise refusal("noise_model", self.noise_model, why, "`none` in its adapter_config.json, and the path in your YAML")

    def _check_simulation_values(self) -> None:
        for key, kind in {"precision": Precision, "gradient": Gradient}.items():
            arguments.check_choice(key, getattr(self, key), (None, *get_args(kind)))
        if self.shots is not None and (type(self.shots) is not int or not 1 <= self.shots <= MAX_SHOTS):
            raise refusal("shots", self.shots, f"is not a whole number from 1 to {MAX_SHOTS:,}", "`shots: 1024`, or none: exact")
        for key, value in (("seed", self.seed), ("seed_simulator", self.seed_simulator)):
            if (value is not None or key == "seed") and (type(value) is not int or not 0 <= value < 2**32):
                raise refusal(key, value, "is not a whole number from 0 to 2**32 - 1", f"`{key}: 42`")
        pair = self.readout_error if isinstance(self.readout_error, (list, tuple)) else None
        if pair is not None and len(pair) != 2:
            why = "is neither a probability nor two of them, of reading 1 for a 0 and 0 for a 1"
            raise refusal("readout_error", pair, why, "`readout_error: [0.01, 0.03]`")
        single = [("readout_error", value) for value in (self.readout_error if pair is None else None, *(pair or ()))]
        for key, value in [("depolarizing_1q", self.depolarizing_1q), ("depolarizing_2q", self.depolarizing_2q), *single]:
            if value is not None:
                arguments.check_number(key, value, lambda p: 0 <= p <= 1, "a probability in [0, 1]", "0.01")

    def _check_simulation(self) -> None:
        other = {key: getattr(self, key) for key in AER_KEYS} if self.quantum_backend not in AER else {}
        no_circuit = None if self.has_circuit else self.quantum
        arguments.check_backend(self.quantum_backend, no_circuit, self.ibm, other, self.rank_pattern)
        for key, models in STRENGTH_KEYS.items():
            if (value := getattr(self, key)) is not None and self.noise_model not in models:
                works = " or ".join(f"`noise_model: {name}`" for name in models)
                raise refusal(key, value, f"has no effect with `noise_model: {self.noise_model}`", f"{works}, or no `{key}`")
