"""Finding and loading the trained adapter of a configuration, for the commands that come after a training."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..circuit.circuit_file import FILE
from ..errors import refusal
from ..tuner.config import QTHAConfig
from ..tuner.running import SIMULATION_KEYS
from ..tuner.saving import WEIGHTS
from ..tuner.table import LARGEST_RANK
from ..tuner.targets import HEADED, HEADS

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault

    from ..tuner.adapter import QTHAAdapter

# Keys that a trained adapter may have otherwise than the YAML: what it started with and how circuits are run is no part of it.
_ANYWAY = ("seed", "branch_init", "dropout", *SIMULATION_KEYS)
FREE_WHEN_LOADED = ("target_modules", *_ANYWAY)  # by lora_model_dir: the adapter's own folder says which modules it has
FREE_WHEN_RESUMED = ("param_budget", *_ANYWAY)  # from a checkpoint: the sizes that the budget led to are compared instead


def check_trained(folder: Path, base_model: str) -> None:
    """Refuse a folder that holds no adapter, or one of another base.

    Args:
        folder: what `--lora-model-dir` names, or the configuration's own.
        base_model: of the configuration.

    Raises:
        ValueError: naming the folder, or both bases.
    """
    if not (folder / "adapter_config.json").is_file() or not (folder / WEIGHTS).is_file():
        holds = f"holds no trained adapter (adapter_config.json, {WEIGHTS})"
        raise refusal("--lora-model-dir", str(folder), holds, "a training's output_dir")
    trained_on = str(QTHAConfig.from_pretrained(str(folder)).base_model_name_or_path or "")
    if trained_on and Path(trained_on).name != Path(base_model).name:
        raise ValueError(
            f"base_model: {base_model!r} is not the base of {str(folder)!r}, which was trained on {trained_on!r}. "
            f"What works: `base_model: {trained_on}`."
        )


def check_fits(key: str, folder: Path, settings: dict[str, Any], free: Collection[str]) -> None:
    """Refuse an adapter folder that is damaged or contradicts the settings.

    Args:
        key: the YAML key that names the folder.
        folder: it; one that does not exist here is not checked: it may be a name on the Hub, and PEFT says if it is not.
        settings: what the adapter must have, by keys of the `qtha:` block.
        free: keys that may differ all the same, `FREE_WHEN_LOADED` or `FREE_WHEN_RESUMED`.

    Raises:
        ValueError: naming the key, and each setting with both values.
    """
    if not folder.is_dir():
        return
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{key}: {str(folder)!r} holds no adapter_config.json. What works: a folder written by `adapter: qtha`.")
    saved = QTHAConfig.from_pretrained(str(folder))  # refuses a damaged file beside it
    if not isinstance(saved, QTHAConfig):
        raise ValueError(
            f"{key}: {str(folder)!r} is a {saved.peft_type.value} adapter. What works: a folder written by `adapter: qtha`."
        )
    wanted = {name: value for name, value in settings.items() if name in QTHAConfig.__annotations__ and name not in free}
    if rows := differences(saved, wanted):
        raise ValueError(f"{key}: {str(folder)!r} does not fit the YAML. " + "; ".join(rows) + ". What works: the same settings.")


def refuse_other_circuits(key: str, folder: Path, config: QTHAConfig) -> None:
    """Refuse to go on with an adapter whose circuits, the user's own, are not those of today's function.

    Args:
        key: the YAML key that names the folder.
        folder: the adapter's.
        config: of the model that its tensors are loaded into.

    Raises:
        ValueError: naming both.
    """
    if config.circuit is None:
        return
    saved = QTHAConfig.from_pretrained(str(folder))
    if saved.circuit is None:  # settings that differ are compared elsewhere
        return
    if [own.digest for own in saved.circuits_used] != [own.digest for own in config.circuits_used]:
        raise ValueError(
            f"{key}: {str(folder)!r} was trained with another circuit than `circuit: {config.circuit}` gives now. What works: "
            f"the function as it was; the circuit itself is in the folder's {FILE}."
        )


def refuse_unsaid_share(folder: str, config: QTHAConfig) -> None:
    """Refuse to train on an adapter whose layers share tensors with a YAML that does not say so.

    The plan and the checks of checkpointing, ZeRO and FSDP2 go by the YAML.

    Args:
        folder: `lora_model_dir`; a name on the Hub is not looked up here.
        config: the YAML's adapter.

    Raises:
        ValueError: naming both keys.
    """
    try:
        share = json.loads((Path(folder) / "adapter_config.json").read_text()).get("share")
    except (OSError, ValueError, AttributeError):
        return  # said where it is loaded
    if share and not config.share:
        text = ", ".join(f"{key}: {str(value).lower()}" for key, value in sorted(share.items(), reverse=True))
        raise ValueError(
            f"lora_model_dir: {folder!r} holds an adapter whose layers share tensors, which the YAML does not say. "
            f"What works: `qtha: {{share: {{{text}}}}}`."
        )


def configuration(path: Path, folder: Path) -> DictDefault:
    """Return Axolotl's configuration for running the model with its adapter on one device, sequence by sequence."""
    from axolotl.cli.config import load_cfg

    alone = {"deepspeed": None, "fsdp_config": None, "fsdp_version": None}
    plain = {"sample_packing": False, "eval_sample_packing": False, "pad_to_sequence_len": False, "gradient_checkpointing": False}
    return load_cfg(str(path), lora_model_dir=str(folder), **alone, **plain)


def refuse_untrained(adapters: Iterable[QTHAAdapter], given: Path | None) -> None:
    """Refuse adapters that change nothing.

    Raises:
        ValueError: naming their folder.
    """
    if all(adapter.is_no_op() for adapter in adapters):
        raise refusal("--lora-model-dir", str(given or "output_dir"), "is an untrained adapter", "a trained one")


def differences(saved: QTHAConfig, wanted: dict[str, Any]) -> list[str]:
    """Return `key: saved value, wanted value` for each of `wanted`'s keys whose value differs from the saved one."""
    current = json.loads(json.dumps(saved.to_dict(), default=_plain))
    asked = json.loads(json.dumps(wanted, default=_plain))
    rows = []
    for key, value in asked.items():
        have = current.get(key)
        if key == "modules_to_save" and have and saved.task_type in HEADED:
            have = [name for name in dict.fromkeys(have) if name in (value or []) or name not in HEADS]
        if key == "share" and have and value and value["layers"] == "auto":  # the adapter has the number that it became
            value = {**value, "layers": have["layers"]}
        if key == "mpo" and value == "auto":
            continue
        if key == "core_gain" and {have, value} == {"balanced", "by_rank"} and max(saved.ranks) <= LARGEST_RANK:
            continue  # the same up to this rank; adapters of earlier versions have the first
        if isinstance(have, list) and isinstance(value, list):
            have, value = sorted(have), sorted(value)
        if have != value:
            rows.append(f"qtha.{key}: the adapter was made with {have!r}, the YAML says {value!r}")
    return rows


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
