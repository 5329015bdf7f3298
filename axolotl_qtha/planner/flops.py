"""The arithmetic of a training step.

FLOPs of a token, forward + backward (+ forward again with gradient checkpointing):

* frozen linear layers: 2 per weight + 2 (no gradient for the weight) (+ 2, the head aside);
* attention, causal: 2 x length x width per layer, 2.5 times that in backward (FlashAttention makes the scores again) (+ once);
* adapters: 2 r (in + out), folded as they run, + 4 r (in + out) (+ 2 r (in + out)); their r x r parts and the folding, once a
  micro batch, are left out;
* circuits: 6 x 2^qubits a gate, three times that in the adjoint backward (+ once).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

from peft import PeftModel
from torch import nn

from ..tuner.config import QTHAConfig
from ..tuner.layer import QTHALayer
from ..tuner.sizes import ansatz
from .sharding import decoder_blocks

BACKWARD = 2.5  # of attention, times its forward
ADJOINT = 3  # of a circuit: the state and its adjoint are taken back, gate by gate, and compared


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token through a whole training step, by part."""

    linear: float
    attention: float
    adapter: float
    circuit: float

    @property
    def total(self) -> float:
        """All parts."""
        return self.linear + self.attention + self.adapter + self.circuit


def gate_counts(config: QTHAConfig) -> dict[str, int]:
    """Return the gates of one circuit, by name."""
    circuit = ansatz(config)
    if circuit.is_own:
        return dict(circuit.circuit().count_ops())
    kinds = Counter("ry" if moment.kind in ("encode", "rotate") else "crz" for moment in circuit.moments())
    return {gate: moments * circuit.qubits for gate, moments in kinds.items()}


def step_flops(model: PeftModel, length: int, checkpointing: bool) -> Flops:
    """Return the FLOPs of one token, in sequences of `length`, as the module's docstring has them."""
    base: Any = model.get_base_model()
    again = {id(m) for block in decoder_blocks(model) for m in block.modules()} if checkpointing else set()
    text = base.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)  # state-space models have none
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads) if heads else 0
    chosen = getattr(text, "num_experts_per_tok", None) or 1  # experts that a token goes through
    linear = adapter = circuit = 0.0
    for name, module in model.named_modules():
        repeats = 2 + (id(module) in again)
        if isinstance(module, nn.Linear) and "original_module" not in name:
            linear += 2 * module.in_features * module.out_features * (repeats + module.weight.requires_grad)
        elif isinstance(module, QTHALayer):
            own = cast(QTHAConfig, module.qtha_adapter[model.active_adapter].config)
            adapter += 2 * own.rank * (module.in_features + module.out_features) * (repeats + 1)
            if own.has_circuit and own.quantum_backend == "torch":
                gate = 6 * 2 ** ansatz(own).qubits
                circuit += own.blocks * sum(gate_counts(own).values()) * gate * (repeats - 1 + ADJOINT)
        else:
            stacks = [p for p in module.parameters(recurse=False) if p.dim() == 3 and not p.requires_grad]
            linear += sum(2 * p.numel() * min(1.0, chosen / p.shape[0]) * repeats for p in stacks)
    attention = text.num_hidden_layers * 2 * length * width * (1 + BACKWARD + checkpointing)
    return Flops(linear, attention, adapter, circuit)
