"""QTHAConfig: the one object that describes an adapter, with or without Axolotl.

The `qtha:` block of an Axolotl YAML is generated from these fields (see `settings/args.py`), so a key is described once, here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ..circuit.ansatz import MAX_QUBITS, Ansatz
from ..circuit.own import check_name
from ..circuit.simulation import Backend, Gradient, Precision
from ..errors import refusal
from ..ibm.options import IBMOptions
from . import arguments, blocks, choices
from .adapter_file import check_adapter_file
from .blocks import LARGEST, ONE_CIRCUIT, SMALLEST, USUAL, usual_qubits
from .choices import CIRCUIT_MODES, AngleScale, BranchInit, CoreGain, GateOrder, Init, Quantum, TensorNetwork
from .own_circuits import OwnCircuits
from .peft_type import QTHA
from .rings import CLASSICAL
from .running import Running
from .share import Share


def _key(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class QTHAConfig(Running, OwnCircuits, PeftConfig):
    """Configuration of a QTHA adapter.

    Raises:
        ValueError: if a value, or a combination of values, cannot work.
    """

    rank: int = _key(
        8,
        "Width r of the adapter's bottleneck, the rank of its linear part. Circuits share its r numbers, see qubits.",
    )
    qubits: int | None = _key(
        None,
        f"Qubits q of each circuit, a divisor of rank, at most {MAX_QUBITS}: the r numbers go through r / q circuits side by "
        "side, with angles of their own (`silu`, `sine`: rings of q units). A circuit costs 2**q a token. Default: rank, if that "
        f"is at most {ONE_CIRCUIT}; above, its divisor from {SMALLEST} to {LARGEST} nearest to {USUAL}.",
    )
    rank_pattern: dict[str, int] | None = _key(
        None,
        "Other ranks for some layers, as LoRA's: `{down_proj: 16}`, by the ends of their names or regular expressions; the first "
        "that matches counts. Circuits follow each layer's rank (see qubits), and so does mid_dim where it is below it.",
    )
    alpha: float = _key(16.0, "The adapter's output is scaled by alpha / rank, as in LoRA.")
    alpha_pattern: dict[str, float] | None = _key(None, "Other values of alpha for some layers, written as rank_pattern.")
    dropout: float = _key(0.0, "Dropout probability on the adapter's input, in [0, 1).")
    param_budget: float | None = _key(
        None,
        "Trainable parameters as a share of LoRA of the same rank on the same modules. Picks how many layers share, or with "
        "`mpo: tt` bond_dim and mid_dim, whichever is not set. Default 0.24 (the paper's 76 % fewer) unless "
        "both are set; where that cannot be met, as on narrow layers, the least that can. One that is set and cannot be met is "
        "refused.",
    )
    bond_dim: int | None = _key(None, "Bond dimension chi of the matrix product operators. Default: from param_budget.")
    mid_dim: int | None = _key(
        None, "Width m between each matrix product operator and the rank-r maps, at least rank. Default: from param_budget."
    )
    num_cores: int = _key(2, "Number of cores K of each matrix product operator.")
    in_factors: dict[int, list[int]] | None = _key(
        None,
        "How to factorise input sizes into K cores, as {size: [factors]}, e.g. {3584: [64, 56]}. "
        "Sizes not named are factorised as evenly as possible.",
    )
    out_factors: dict[int, list[int]] | None = _key(None, "The same for output sizes.")
    target_modules: list[str] | str | None = _key(
        "all-linear",
        "Modules to adapt: a list of name endings, a regular expression for whole names, or `all-linear` "
        "(every linear layer but the output head, and those whose weight the model reads without calling them, as in Mamba).",
    )
    exclude_modules: list[str] | str | None = _key(None, "Modules to leave out: a list of name endings or a regular expression.")
    layers_to_transform: list[int] | int | None = _key(
        None, "Indices of the transformer layers to adapt. Not together with a regular expression in target_modules."
    )
    layers_pattern: list[str] | str | None = _key(
        None, "Name of the model's list of layers, if not found by itself (`layers`, `h`, ...)."
    )
    modules_to_save: list[str] | None = _key(
        None, "Further modules to train in full and save with the adapter, e.g. [embed_tokens, lm_head] after adding tokens."
    )
    share: Share | None = _key(
        None,
        "Tensors that layers share: `{layers: 4}` all but W_C for the same module of 4 neighbouring layers of the transformer, "
        "`auto` by as few as keep to param_budget; `{inputs: true}` one A and one circuit for modules that read the same input "
        "(q, k, v; gate, up). Both together work. Not with `init: tt_svd`.",
    )
    quantum: Quantum = _key(
        "qtha",
        "The branch beside the linear one: `qtha` trained circuit, `frozen` random circuit that is not trained, `product` the "
        "circuit without its two-qubit gates (no entanglement: <Z_i> is the cosine of circuit_layers times the angle of z_i plus "
        "the sum of its trained angles), `silu` classical network of the same wiring and size, `sine` the same with a periodic "
        "nonlinearity, `none` no branch (exactly a low-rank adapter), `qwthn` the paper's first version (product, not sum).",
    )
    mpo: TensorNetwork = _key(
        "auto",
        "The two large matrices: `tt` tensor networks (matrix product operators), `none` full r-wide matrices, as LoRA, `auto` "
        "full ones that layers share, as with `share: {layers: auto, inputs: true}`; but `tt` beside a key of tensor networks, "
        "where layers cannot share, or not within param_budget, and with FSDP2 or ZeRO-3 with gradient checkpointing.",
    )
    circuit_layers: int = _key(
        2, "Layers L of each circuit: 4 * rank * L angles in all, `product` 2 * rank * L. The authors use L = rank."
    )
    angle_scale: AngleScale = _key(
        "tanh",
        "How the bottleneck's z becomes radians: `raw` z itself, as the authors (wraps around), `learned` z times a "
        "trained scale per qubit, `tanh` pi * tanh(z / pi), bounded to (-pi, pi).",
    )
    init_angles: float = _key(
        math.pi,
        "The circuit's angles, trained or frozen, start uniform in [-init_angles, init_angles], in radians, at most pi (a whole "
        "turn). With small ones its rotations start near the identity. For circuits of one's own, too (`circuit`).",
    )
    gate_order: GateOrder = _key(
        "2025-06",
        "Order of the gates: `2025-06` the authors' present one; `2025-05` their earlier one, whose last ring of "
        "rank angles has no effect and no gradient.",
    )
    init: Init = _key(
        "kaiming",
        "`kaiming`: random cores, as the authors, scaled so that z starts with unit variance; `tt_svd`: cores from the "
        "leading singular directions of the pre-trained weight (TensorLy). Both start as an exact no-op.",
    )
    branch_init: BranchInit = _key(
        None,
        "What W_Q starts with: `zero`, where the branch comes in as it learns, which bears larger learning rates; `kaiming`, as "
        "the authors, where it starts larger than the linear path. Default: zero; `quantum: qwthn` knows `kaiming` alone.",
    )
    core_gain: CoreGain = _key(
        "by_rank",
        "`by_rank`: cores are stored divided by a constant, so that at one learning rate they learn as fast as LoRA's matrices, "
        "above rank 8 slower by the root of rank / 8; `balanced`: as fast at every rank; `none`: stored as they are, as the "
        "authors (wants a 3 to 10 times larger learning rate).",
    )
    quantum_backend: Backend = _key(
        "torch",
        "What runs the circuit: `torch`, the exact simulator of this project (compiled, or fused on a GPU); `aer` or `aer_gpu`, "
        "Qiskit Aer: thousands of times slower, for shots, noise and second opinions; `ibm`, a device of IBM Quantum, or a fake "
        "one, see `ibm`.",
    )
    shots: int | None = _key(None, "Aer: measurements per circuit. Default: exact expectation values.")
    seed_simulator: int | None = _key(
        None,
        "Aer: seed of the shots, which also depend on angles and process; `ibm`: of tokens, SPSA and a fake device's shots. "
        "Default: seed.",
    )
    noise_model: str = _key(
        "none",
        "Aer: `none`, `depolarizing` (after each RY and CX, a CRZ being two CX), `readout`, `fake:` and the name of a device, "
        "e.g. `fake:manila`: its gates, coupling and measured noise (needs the `ibm` extra), or the import path of your own, "
        "`my_package.my_module:my_model`: a NoiseModel of Qiskit Aer, a BackendV2 of Qiskit, or a function that returns one.",
    )
    depolarizing_1q: float | None = _key(None, "`depolarizing`: its probability after each RY, in [0, 1]. Default: 0.001.")
    depolarizing_2q: float | None = _key(None, "`depolarizing`: its probability after each CX, in [0, 1]. Default: 0.01.")
    readout_error: float | list[float] | None = _key(
        None,
        "`readout`, `depolarizing`: probability that a bit is read wrongly, or two: `[0.01, 0.03]` of reading 1 for a 0, and 0 "
        "for a 1. Default: 0.02 with `readout`, else 0.",
    )
    precision: Precision | None = _key(None, "Aer: `single` or `double` precision. Default: double.")
    gradient: Gradient | None = _key(
        None,
        "Aer: `parameter_shift`, from shifted circuits run in the same way, exact in expectation; or `adjoint`, the exact "
        "gradient, as if without noise and shots, at no extra circuits. Default: parameter_shift.",
    )
    ibm: IBMOptions | None = _key(
        None,
        "`quantum_backend: ibm`: which device, how, and what it may cost, as a block of keys of its own, e.g. "
        "`{backend: least_busy, max_qpu_seconds: 60}`. Never saved with the adapter.",
    )
    circuit: str | None = _key(
        None,
        "A circuit of your own in place of the built-in one: `my_package.my_module:my_circuit`, a function of (qubits, "
        "circuit_layers) that returns a Qiskit circuit, or the name of a registered one. Inputs are its parameters z[i], all "
        "others are trained. Saved with the adapter as circuit.qpy.",
    )
    stored = None  # names of the tensors beside the file it was read from, until a model has compared them
    seed: int | None = _key(None, "Seed of the adapter's initial values. Default: Axolotl's `seed`, else 42.")

    def __new__(cls, *_: Any, **settings: Any) -> QTHAConfig:
        """Refuse names that are not known; PEFT leaves them out, with a warning, where it reads a file of a later version."""
        if type(settings.get("peft_type")) is not str:
            arguments.refuse_unknown(settings, [each.name for each in fields(cls)], "QTHAConfig")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.peft_type) is str:
            self._complete_saved()
        self.peft_type = QTHA
        for key in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, key), (list, tuple)):
                setattr(self, key, set(value))
        for key in ("in_factors", "out_factors"):  # JSON knows string keys only
            setattr(self, key, arguments.whole_factors(key, getattr(self, key)))
        if isinstance(self.ibm, dict):
            self.ibm = IBMOptions.model_validate(self.ibm)
        if self.share is not None:
            self.share = Share.model_validate(self.share)
        if self.quantum_backend == "ibm" and self.ibm is None:
            self.ibm = IBMOptions()
        if self.seed is None:
            self.seed = 42
        self._check_values()
        self.mpo = choices.form(vars(self))
        self._check_combinations()

    def _complete_saved(self) -> None:
        """Make up for what earlier versions wrote into files."""
        self._refuse_code()
        if self.qubits is None and not self.rank_pattern:
            self.qubits = self.rank  # of a time when a circuit had as many qubits as the rank
        for key, default in self._idle().items():  # they were let through
            setattr(self, key, default)

    def _idle(self) -> dict[str, Any]:
        """Return the defaults of the settings that have another value, and do nothing beside `quantum`."""
        defaults = {each.name: each.default for each in fields(self) if self._is_idle(each.name)}
        return {key: default for key, default in defaults.items() if getattr(self, key) != default}

    def _is_idle(self, key: str) -> bool:
        """Return whether a setting does nothing beside `quantum`; a circuit of the user's own keeps its qubits as a product."""
        own_product = key == "qubits" and self.quantum == "product" and self.circuit is not None
        return self.quantum in arguments.IDLE.get(key, ()) and not own_product

    @property
    def scaling(self) -> float:
        """The factor alpha / rank of the adapter's output."""
        return self.alpha / self.rank

    @property
    def has_circuit(self) -> bool:
        """Whether the quantum branch runs a circuit."""
        return self.quantum in CIRCUIT_MODES

    @property
    def is_classical(self) -> bool:
        """Whether the branch is a classical network in the circuit's place, see `rings`."""
        return self.quantum in CLASSICAL

    @property
    def circuit_qubits(self) -> int:
        """Qubits of each circuit, units of each ring of a classical network: `qubits`, or what stands for it."""
        return self.qubits_at(self.rank)

    def qubits_at(self, rank: int) -> int:
        """Return the qubits of each circuit of a layer of this rank."""
        return 1 if self.quantum == "product" and self.circuit is None else self.qubits or usual_qubits(rank) or rank

    @property
    def ranks(self) -> list[int]:
        """The ranks that layers can have."""
        return [self.rank, *(self.rank_pattern or {}).values()]

    def of_layer(self, name: str) -> QTHAConfig:
        """Return the configuration of one layer, without patterns; the same object where none matches its name."""
        rank = arguments.matched(self.rank_pattern, name, self.rank)
        alpha = arguments.matched(self.alpha_pattern, name, self.alpha)
        if (rank, alpha) == (self.rank, self.alpha):
            return self
        mid_dim = None if self.mid_dim is None else max(self.mid_dim, rank)
        return self.changed(rank=rank, alpha=alpha, mid_dim=mid_dim, rank_pattern=None, alpha_pattern=None)

    @property
    def blocks(self) -> int:
        """Circuits side by side: how many each token has in a layer."""
        return self.rank // self.circuit_qubits

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that are saved; `qubits` is what it stands for.

        The `ibm:` block says who pays and how much, and a noise model's import path names code: they are left out, and the
        adapter then loads on the exact simulator, or without noise.
        """
        result = super().to_dict()
        self._keep_no_code(result)
        result["share"] = self.share.model_dump() if self.share else None
        if not self.rank_pattern:  # else each rank has its own
            result["qubits"] = None if self._is_idle("qubits") else self.circuit_qubits
        return result

    def _check_values(self) -> None:
        choices.check(self)
        if self.circuit is not None:
            check_name(self.circuit)
        for key in ("rank", "bond_dim", "mid_dim", "num_cores", "circuit_layers"):
            arguments.check_count(key, getattr(self, key), key in ("bond_dim", "mid_dim"))
        self._check_simulation_values()
        blocks.check(self.rank, self.qubits, self.quantum, self.has_circuit)
        arguments.check_patterns(self.rank_pattern, self.alpha_pattern, self.qubits, self.quantum, self.has_circuit)
        arguments.check_number("dropout", self.dropout, lambda p: 0 <= p < 1, "a probability below 1", "0.05")
        arguments.check_number("alpha", self.alpha, lambda a: 0 < a < math.inf, "a positive number", "16")
        what = "a number of radians in (0, pi]"
        arguments.check_number("init_angles", self.init_angles, lambda x: 0 < x <= math.pi, what, "0.1")
        if self.param_budget is not None:
            arguments.check_number("param_budget", self.param_budget, lambda p: 0 < p <= 1, "a share in (0, 1]", "0.24")
        for key in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            arguments.check_names(key, getattr(self, key), words=key != "modules_to_save")
        arguments.check_indices("layers_to_transform", self.layers_to_transform)

    def _check_combinations(self) -> None:
        for key, default in self._idle().items():
            why, works = f"has no effect with `quantum: {self.quantum}`", f"leave {key} out (its default: {default})"
            raise refusal(key, getattr(self, key), why, f"{works}, or `quantum: qtha`")
        if self.branch_init == "zero" and self.quantum == "qwthn":
            why = "would leave nothing to train: with `quantum: qwthn` the two paths are multiplied"
            raise refusal("branch_init", self.branch_init, why, "`branch_init: kaiming`, or leave it out")
        if self.circuit is not None and self.gate_order != Ansatz.gate_order:
            raise refusal("gate_order", self.gate_order, "is the built-in circuit's, and `circuit` names another", "leave it out")
        if self.mid_dim is not None and self.mid_dim < self.rank:
            why = f"is below rank {self.rank}: the adapter could not reach its rank"
            raise refusal("mid_dim", self.mid_dim, why, f"`mid_dim: {self.rank}`")
        for key in ("in_factors", "out_factors"):
            arguments.check_factors(key, getattr(self, key), self.num_cores)
        if self.share:
            self.share.check(self.mpo, self.init)
        choices.check_form(self)
        self._check_simulation()
        is_regex = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"
        if is_regex and self.layers_to_transform is not None:
            raise refusal(
                "layers_to_transform",
                self.layers_to_transform,
                "has no effect beside a regular expression in target_modules",
                "name the layers in the expression, or give target_modules as a list",
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        """Read a saved configuration; a damaged adapter file beside it is an error here, before any weight is touched."""
        stored = check_adapter_file(Path(pretrained_model_name_or_path))
        config = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        config.stored = stored
        config.read_circuits(pretrained_model_name_or_path, **kwargs)
        return config
