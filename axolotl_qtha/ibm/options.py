"""The `qtha: {ibm: ...}` block: which device runs the circuits, how, and what it may cost."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator

from ..errors import Hidden, PrivateSettings, key_shown, refusal, unknown_keys
from .passed_on import Asked, Frozen, check_effects, check_estimator, check_transpiler

DEFAULT_SHOTS = 4096
FAKE = "fake:"
NAME = re.compile(r"(fake:)?[a-z][a-z0-9_]{0,39}")  # of devices; keys of IBM Cloud have capitals, addresses have colons
SECRET = re.compile(r"token$|api[-_ ]?key|secret|passw|credential|^key$", re.IGNORECASE)


class IBMOptions(BaseModel):
    """How circuits are run on IBM Quantum.

    Raises:
        ValueError: if a value, or a combination of values, cannot work.
        PrivateSettings: if a key looks like a credential, or is unknown: it may be a misspelt one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)

    backend: str = Field(
        default="least_busy",
        description="A device of IBM Quantum by its name, `least_busy`, or `fake:` and a name, e.g. `fake:manila`: a snapshot of "
        "a device that is simulated here, free of charge.",
    )
    instance: SecretStr | None = Field(
        default=None,
        description="The instance (name or CRN) that pays. Default: the one saved with the account, or QISKIT_IBM_INSTANCE. "
        "Better saved there: Axolotl logs the YAML.",
    )
    shots: int | None = Field(
        default=None, strict=True, ge=1, le=10_000_000, description="Measurements per circuit. Default: 4096, or from precision."
    )
    precision: float | None = Field(
        default=None, ge=1e-4, lt=1, description="Standard error aimed at for each <Z>, instead of shots: 1 / precision**2 shots."
    )
    resilience_level: Literal[0, 1, 2] = Field(
        default=1,
        description="IBM's error mitigation: 0 none, 1 of the read-out, 2 also zero-noise extrapolation (3 times the cost).",
    )
    dynamical_decoupling: Literal["none", "XX", "XpXm", "XY4"] = Field(
        default="none", description="Pulses on idle qubits: `none`, `XX`, `XpXm` or `XY4`."
    )
    twirling: bool = Field(
        default=False,
        description="Randomise gates and read-out (Pauli twirling) even where resilience_level does not do so by itself.",
    )
    estimator: dict[str, Any] | None = Field(
        default=None,
        description="Further options of EstimatorV2, as qiskit-ibm-runtime names them, for a device that is not simulated, e.g. "
        "`{resilience: {zne: {noise_factors: [1, 3, 5]}}, twirling: {num_randomizations: 32}}`.",
    )
    transpiler: dict[str, Any] | None = Field(
        default=None,
        description="Arguments of Qiskit's transpiler: `optimization_level`, `seed_transpiler`, `initial_layout` (without pack), "
        "`layout_method`, `routing_method`, ... Default: `{optimization_level: 3, seed_transpiler: 0}`.",
    )
    mode: Literal["job", "batch", "session"] = Field(
        default="batch",
        description="How jobs are queued: `job` each by itself, `batch` together, `session` with the device reserved, idle time "
        "included (not on the Open Plan).",
    )
    max_qpu_seconds: float | None = Field(
        default=None,
        gt=0,
        le=1e7,
        description="QPU seconds that this journal's jobs may use in all. Required unless `backend` begins with `fake:`.",
    )
    tokens_per_step: int = Field(
        default=8,
        strict=True,
        ge=1,
        le=1_000_000,
        description="Tokens of each forward pass whose circuits run on the device; the others run on the exact simulator.",
    )
    gradient: Literal["parameter_shift", "spsa", "none"] = Field(
        default="parameter_shift",
        description="Gradient of these tokens: `parameter_shift`, exact in expectation; `spsa`, all angles perturbed at once, "
        "2 * spsa_draws circuits for each; `none`, inference only.",
    )
    pack: Literal["auto"] | int = Field(
        default=1,
        description="Circuits (blocks) that one circuit of the device holds side by side on qubits of their own: QPU seconds "
        "fall by about as much, and the further ones have worse qubits. `auto`: on all groups of connected qubits on which at "
        "most 1.5 times as many gates fail as on the best; on a simulated device on at most 8 qubits in all.",
    )
    spsa_draws: int = Field(
        default=1, strict=True, ge=1, le=100_000, description="Random directions that `gradient: spsa` averages over."
    )
    timeout_seconds: float = Field(
        default=86400,
        gt=0,
        le=1e8,
        description="Jobs that have not ended after this long, queue included, are cancelled and the run stops.",
    )
    journal: str = Field(
        default="ibm-journal",
        min_length=1,
        description="Folder that keeps jobs and results: a run that was stopped goes on from it, nothing is paid for twice.",
    )

    @model_validator(mode="before")
    @classmethod
    def _keys_known(cls, data: Any) -> Any:
        refuse_secrets(data, "qtha.ibm")
        if not isinstance(data, (dict, IBMOptions)):
            works = "`ibm: {backend: least_busy, max_qpu_seconds: 60}`; accounts go to QiskitRuntimeService.save_account(...)"
            raise PrivateSettings(f"qtha.ibm: {Hidden(data)} is no block of keys. What works: {works}.")
        for key, value, works in unknown_keys(data, cls.model_fields):
            raise PrivateSettings(f"qtha.ibm.{key}: {value} is not a key of the `ibm:` block. What works: {works}.")
        return data

    @field_validator("backend")
    @classmethod
    def _backend_named(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            works = "`least_busy`, a device's name such as `ibm_torino`, or `fake:manila`; accounts are no part of it"
            raise refusal("ibm.backend", Hidden(value), "is no name of a device", works)
        return value

    @field_validator("journal")
    @classmethod
    def _journal_here(cls, value: str) -> str:
        if "://" in value:
            raise refusal("ibm.journal", Hidden(value), "is an address", "a folder of this machine, `journal: ibm-journal`")
        return value

    @field_validator("pack", mode="before")
    @classmethod
    def _pack_counts(cls, value: Any) -> Any:
        if value != "auto" and (type(value) is not int or value < 1):
            value = value if isinstance(value, (int, float)) else Hidden(value)
            raise refusal("ibm.pack", value, "is not a positive whole number", "`pack: 1`, 2, ... or `pack: auto`")
        return value

    @field_validator("estimator", "transpiler", mode="before")
    @classmethod
    def _is_a_block(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            return None
        return check_estimator(value) if info.field_name == "estimator" else check_transpiler(value)

    @field_validator("estimator", "transpiler", mode="after")
    @classmethod
    def _can_be_hashed(cls, value: Any) -> Any:
        return None if value is None else Frozen(value)

    @model_validator(mode="after")
    def _passed_on_works(self) -> IBMOptions:
        if self.estimator is not None:
            if self.is_fake:
                why = f"has no effect on `backend: {self.backend}`, whose circuits are simulated here without error mitigation"
                raise refusal("ibm.estimator", Hidden(self.estimator), why, "a device of IBM Quantum, or leave it out")
            asked = Asked(self.resilience_level, self.twirling, self.dynamical_decoupling, self.executions)
            check_effects(self.estimator, asked)
        if self.pack != 1 and (layout := (self.transpiler or {}).get("initial_layout")) is not None:
            why = f"places one circuit, and `pack: {self.pack}` places several by their errors"
            raise refusal("ibm.transpiler.initial_layout", layout, why, "`pack: 1`, or no layout")
        return self

    @model_validator(mode="after")
    def _values_work(self) -> IBMOptions:
        if self.shots is not None and self.precision is not None:
            raise refusal("ibm.shots", self.shots, f"and precision {self.precision:g} say the same thing", "one of them")
        if not self.is_fake and self.max_qpu_seconds is None:
            works = "`max_qpu_seconds: 60` (`axolotl qtha-estimate` says how many are needed), or `backend: fake:manila`"
            raise refusal("ibm.max_qpu_seconds", None, "sets no limit to what the device may cost", works)
        if self.spsa_draws != 1 and self.gradient != "spsa":
            raise refusal(
                "ibm.spsa_draws", self.spsa_draws, f"has no effect with `gradient: {self.gradient}`", "`gradient: spsa`"
            )
        return self

    @property
    def is_fake(self) -> bool:
        """Whether the device is simulated here."""
        return self.backend.startswith(FAKE)

    @property
    def executions(self) -> int:
        """Measurements of one circuit: the shots, or those that reach the precision."""
        if self.precision is not None:
            return math.ceil(1 / self.precision**2)
        return self.shots or DEFAULT_SHOTS

    def measurement(self) -> dict[str, Any]:
        """Return what decides on a result besides circuit and device; neither names nor accounts."""
        usual = {"shots", "precision", "resilience_level", "dynamical_decoupling", "twirling"}
        passed_on = {"estimator": self.estimator, "transpiler": self.transpiler}
        # where nothing is passed on as before there was anything: journals of that time answer
        given = {key: dict(value) for key, value in passed_on.items() if value}
        return self.model_dump(include=usual) | {"executions": self.executions} | given

    @property
    def transpiling(self) -> tuple[tuple[str, Any], ...]:
        """The transpiler's arguments as `Simulation` has them."""
        return tuple(
            (key, tuple(value) if isinstance(value, list) else value) for key, value in sorted((self.transpiler or {}).items())
        )


def refuse_too_wide(pack: int | str, qubits: int, device: str, width: int) -> None:
    """Refuse more blocks in a circuit than a device of `width` qubits has room for; `auto` passes.

    Raises:
        ValueError: naming `ibm.pack`.
    """
    if isinstance(pack, int) and pack * qubits > width >= qubits:
        why = f"blocks of {qubits} qubits need {pack * qubits}, {device} has {width}"
        raise refusal("ibm.pack", pack, why, "`pack: auto`, or fewer")


def refuse_secrets(data: Any, path: str) -> None:
    """Refuse a credential anywhere in the settings, without its value.

    Raises:
        PrivateSettings: naming the key.
    """
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, (list, tuple)) else ()
    for key, value in items:
        if isinstance(key, str) and SECRET.search(key):
            raise PrivateSettings(
                f"{path}.{key_shown(key)} (value not shown): a credential has no place in a YAML, which is copied into model "
                "cards, logs and (unless AXOLOTL_DO_NOT_TRACK=1) reports. Revoke it. What works: "
                "QiskitRuntimeService.save_account(...) once, in Python, or the environment variable QISKIT_IBM_TOKEN."
            )
        refuse_secrets(value, f"{path}.{key_shown(key)}")
