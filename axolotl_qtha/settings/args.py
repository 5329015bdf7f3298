"""The `qtha:` block of an Axolotl YAML, and the combinations it refuses.

The block's keys are `QTHAConfig`'s fields, and those of `_Block`, which concern the training and not the adapter. Axolotl drops
unknown top-level keys without a word, so everything of ours is nested in one block that forbids them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, create_model, model_validator

from ..circuit import noise
from ..errors import PrivateSettings, refusal
from ..ibm.options import refuse_too_wide
from ..tuner.arguments import LORA_NAMES, check_patterns
from ..tuner.config import QTHAConfig
from ..tuner.table import CIRCUIT
from . import optimisers, parallel, private, quantization, sharing, trainers

# LoRA keys that `adapter: qtha` does not read, and what to write instead.
LORA_KEYS = {
    **{key: ours for key, ours in LORA_NAMES.items() if key.startswith("lora_")},
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
}
# Keys that Axolotl would accept beside `adapter: qtha` and that would do nothing, or harm.
REFUSED = {
    "lora_target_linear": "write `qtha: {target_modules: all-linear}` instead",
    "lora_mlp_kernel": "these kernels are LoRA's own; leave it out",
    "lora_qkv_kernel": "these kernels are LoRA's own; leave it out",
    "lora_o_kernel": "these kernels are LoRA's own; leave it out",
    "lora_embedding_kernel": "these kernels are LoRA's own; leave it out",
    "dsv4_shared_mlp_lora_kernel": "these kernels are LoRA's own; leave it out",
    "dsv4_fp8_lora_kernel": "these kernels are LoRA's own; leave it out",
    "lora_target_parameters": "only modules can be adapted, with `qtha: {target_modules: ...}`; leave it out",
    "lora_fan_in_fan_out": "GPT-2's transposed layers are recognised by themselves; leave it out",
    "loraplus_lr_ratio": "LoRA+ knows LoRA's two matrices only; leave it out, and see `qtha: {circuit_lr: ...}`",
    "peft_use_dora": "DoRA is another method; leave it out, or use `adapter: lora`",
    "peft_use_rslora": "scale by `qtha: {alpha: ...}`; leave it out",
    "peft_layer_replication": "it repeats layers under LoRA's matrices; leave it out",
    "peft_init_lora_weights": "write `qtha: {init: kaiming}` or `tt_svd` instead",
    "peft_trainable_token_indices": "train new tokens with `qtha: {modules_to_save: [embed_tokens, lm_head]}`",
    "peft_ensure_weight_tying": "leave it out",
    "peft": "its `loftq_config` is LoRA's own; leave it out",
    "relora": "it merges LoRA's matrices as it trains; leave it out, or use `adapter: lora`",
    "lisa_n_layers": "it trains the base model's own layers; leave it out",
    "unfrozen_parameters": "the base stays frozen; train modules in full with `qtha: {modules_to_save: [...]}`",
    "flash_attn_fuse_mlp": "it replaces the layers that carry adapters; leave it out",
    "use_onebitllms": "it replaces the layers that carry adapters; leave it out",
    "qat": "it replaces the layers that carry adapters; leave it out",
    "nvfp4_merge_aware": "it rounds LoRA's own change to the base's 4-bit grid; leave it out, or use `adapter: lora`",
    "ple_cpu_offload": "Axolotl has it for `adapter: lora` and `qlora` only; leave it out",
}
DIAGNOSTICS_STEPS = 10
# The angles (or a classical network's weights), by the names the trainer sees.
CIRCUIT_PARAMETERS = [f"qtha_adapter.default.{name}" for name in CIRCUIT]


class _Block(BaseModel):
    """What the generated block adds to the plain fields."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    circuit_lr: float | None = Field(
        default=None,
        gt=0,
        description="Learning rate of the circuit's angles (`quantum: silu`, `sine`: of the weights in their place). Default: "
        "learning_rate.",
    )

    diagnostics_steps: int = Field(
        default=DIAGNOSTICS_STEPS,
        strict=True,
        ge=0,
        description="Measure what circuit, cores and matrices do once in this many steps, for the trainer's log; 0: never.",
    )

    @model_validator(mode="before")
    @classmethod
    def _names_known(cls, data: Any) -> Any:
        private.refuse_private(data, cls.model_fields)
        if isinstance(data, dict):  # here, since pydantic would take true for a rank of 1
            check_patterns(data.get("rank_pattern"), data.get("alpha_pattern"), None, "none", False)
        return data

    @model_validator(mode="after")
    def _values_work(self) -> _Block:
        config = QTHAConfig(**self.adapter_settings())
        if self.circuit_lr is not None and config.quantum in ("none", "frozen"):
            raise refusal("circuit_lr", self.circuit_lr, f"has nothing to train with `quantum: {config.quantum}`", "leave it out")
        if config.has_circuit and config.noise_model != "none":
            noise.check(config.noise_model, max(map(config.qubits_at, config.ranks)))
        if config.ibm is not None and config.ibm.is_fake:
            choices = "`least_busy`, a device's name, or `fake:manila`"
            try:
                found = noise.device(config.ibm.backend, config.circuit_qubits, "ibm.backend", choices)
                refuse_too_wide(config.ibm.pack, config.circuit_qubits, config.ibm.backend, found.num_qubits)
            except ValueError as error:  # around which pydantic would print the block
                raise PrivateSettings(str(error)) from None
        return self

    def adapter_settings(self) -> dict[str, Any]:
        """Return the keys that were set, as arguments of `QTHAConfig`."""
        return self.model_dump(exclude_none=True, exclude=set(_Block.model_fields))


def _block_fields() -> dict[str, Any]:
    hints = get_type_hints(QTHAConfig)
    return {
        field.name: (
            hints[field.name],
            # strict where a boolean would pass as a number; floats stay lax, since YAML reads 1e-3 as text
            Field(
                default=field.default,
                description=field.metadata["help"],
                strict=True if field.type.startswith("int") else None,
            ),
        )
        for field in dataclasses.fields(QTHAConfig)
        if field.name in QTHAConfig.__annotations__
    }


QTHABlock = create_model("QTHABlock", __base__=_Block, __doc__="The `qtha:` block.", **_block_fields())


class QTHAArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    qtha: QTHABlock | None = Field(  # type: ignore[valid-type]
        default=None, description="Quantum Tensor Hybrid Adaptation, read with `adapter: qtha`."
    )

    @model_validator(mode="wrap")
    @classmethod
    def qtha_speak_first(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        """Refuse what cannot work before Axolotl's own checks do, which would advise `adapter: lora`.

        Axolotl's checks are "before" validators of its own classes, which run ahead of such ones of ours; a "wrap" validator
        runs around all of them. `quantize_moe_experts` is kept from them and put back: they want LoRA, its loader does not.
        """
        if isinstance(data, dict):
            refuse_private(data)
        if not isinstance(data, dict) or data.get("adapter") != "qtha":
            return handler(data)
        _refuse(data, block if isinstance(block := data.get("qtha"), dict) else {})
        if not data.get("quantize_moe_experts"):
            return handler(data)
        quantization.check_experts_asked(data)
        result = handler({key: value for key, value in data.items() if key != "quantize_moe_experts"})
        result.quantize_moe_experts = True
        return result

    @model_validator(mode="before")
    @classmethod
    def qtha_check_and_connect(cls, data: Any) -> Any:
        """Connect the `qtha:` block to Axolotl's own keys, and refuse ways to share the run that cannot work."""
        if not isinstance(data, dict):
            return data
        if data.get("adapter") != "qtha":
            if data.get("qtha") is not None:
                raise ValueError(
                    f"qtha: the block has no effect with `adapter: {data.get('adapter')}`. "
                    "What works: `adapter: qtha`, or no `qtha:` block."
                )
            return data
        block = data.get("qtha")
        block = block if isinstance(block, dict) else {}
        parallel.connect(data)
        sharing.connect(data, block)
        quantization.connect(data)
        data["merge_method"] = "legacy"  # the other method reads the adapter as LoRA and may write an unmerged base
        if block.get("modules_to_save"):  # Axolotl asks for this key when tokens are added
            data["lora_modules_to_save"] = block["modules_to_save"]
        if block.get("circuit_lr") is not None:
            groups = [group for group in data.get("lr_groups") or [] if group.get("name") != "qtha_circuit"]
            lr = float(block["circuit_lr"])
            # the first group that names a part of a tensor's name gets it
            data["lr_groups"] = [{"name": "qtha_circuit", "modules": CIRCUIT_PARAMETERS, "lr": lr}, *groups]
        return data


def refuse_private(data: Any) -> None:
    """Refuse what may be a credential, without showing it; to be called before anything prints the YAML.

    Args:
        data: Axolotl's configuration as the YAML has it; of its `qtha:` block the instance is hidden.

    Raises:
        PrivateSettings: naming the key, the type of its value, and what works.
    """
    private.refuse_misplaced(data)
    private.refuse_private(data.get("qtha"), QTHABlock.model_fields)
    private.hide_instance(data.get("qtha"))


def _refuse(data: dict[str, Any], block: dict[str, Any]) -> None:
    for key, ours in LORA_KEYS.items():
        if (value := data.get(key)) and value != block.get(ours):
            raise ValueError(f"{key}: {value!r} is not read by `adapter: qtha`. What works: `qtha: {{{ours}: {value}}}`.")
    for key, advice in REFUSED.items():
        if value := data.get(key):
            raise ValueError(f"{key}: {value!r} does not work with `adapter: qtha`: {advice}.")
    optimisers.refuse(data)
    trainers.refuse(data, block)
    trainers.refuse_reentrant(data)
