"""A LoRA or QLoRA YAML, written again with `adapter: qtha`: what becomes of each key.

Every key that `args.py` knows as LoRA's, or refuses, is translated, falls away (which is said), or stops the translation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import yaml

from . import fsdp2
from .args import LORA_KEYS, REFUSED
from .optimisers import MATRICES
from .parallel import DATA_PARALLEL, SPLIT_MODEL
from .yaml_lines import Entry, YamlLines

PLUGIN = "axolotl_qtha.QTHAPlugin"
BUDGET = 0.24
SUFFIX = "-qtha"
WHAT_BUDGET_IS = "trainable parameters, as a share of LoRA's of this rank"
KERNEL = "LoRA's own kernels"
FALLS_AWAY = {
    "lora_mlp_kernel": KERNEL,
    "lora_qkv_kernel": KERNEL,
    "lora_o_kernel": KERNEL,
    "lora_embedding_kernel": KERNEL,
    "dsv4_shared_mlp_lora_kernel": KERNEL,
    "dsv4_fp8_lora_kernel": KERNEL,
    "lora_fan_in_fan_out": "transposed layers are recognised by themselves",
    "loraplus_lr_ratio": "LoRA+ gives LoRA's two matrices rates of their own; all of QTHA learns at learning_rate",
    "loraplus_lr_embedding": "part of LoRA+",
    "peft_ensure_weight_tying": "what it ties are LoRA's weights",
    "qlora_sharded_model_loading": "a way to load the base of `adapter: qlora`",
    "unfrozen_parameters": "the base stays frozen; `exclude_modules` keeps adapters off a part of it",
}
# Initial values of LoRA's that are as good as QTHA's own; any other names a method.
PLAIN_INIT = (True, False, "gaussian")
READ_BY_US = ("lora_model_dir", "lora_on_cpu", "peft_autocast_adapter_dtype")
LORAS_OWN = ("lora_", "loraplus_", "qlora_", "peft", "relora")  # how such keys begin


@dataclass
class Translation:
    """The new YAML, and what is to be told about it."""

    text: str = ""
    renamed: list[str] = field(default_factory=list)  # "lora_r -> rank"
    notes: list[str] = field(default_factory=list)  # what else changed and why, a sentence each


def translate(text: str, force: bool = False, budget: float = BUDGET) -> Translation:
    """Return a LoRA YAML with `adapter: qtha`: comments and order stay, and all lines that have nothing to do with it.

    Args:
        text: the YAML.
        force: whether what has no counterpart becomes a comment, instead of an error.
        budget: the new `param_budget`.

    Raises:
        ValueError: if it is no LoRA YAML, or a key of it has no counterpart.
    """
    document = YamlLines(text)
    values = document.values
    _check_lora(values)
    stops = {key: why for key, why in _stops(values).items() if key in document.entries}
    if stops and not force:
        listed = "\n".join(f"  - {key}: {values[key]!r}: {why}." for key, why in stops.items())
        raise ValueError(
            f"this has no counterpart with `adapter: qtha`:\n{listed}\n"
            "What works: a YAML without it, or --force, which keeps it as a comment."
        )
    made = Translation()
    for key, why in stops.items():
        document.comment_out(document.entries[key], f"no counterpart with `adapter: qtha`: {why}")
        made.notes.append(f"{key}: now a comment; {why}")
        values[key] = None
    if values.get("qtha") is not None:
        raise ValueError(
            "qtha: a block is there already, beside LoRA's keys. What works: take it out, or `adapter: qtha` with it."
        )
    _adapter(document, made)
    done = _block(document, made, budget) | set(stops)
    _drop(document, made, done)
    _own_places(document, made)
    made.notes += fsdp2.translate(document)
    made.text = document.text()
    _check_edits(text, made.text)
    return made


def _check_lora(values: dict[str, Any]) -> None:
    adapter = values.get("adapter")
    if adapter == "qtha":
        raise ValueError("adapter: 'qtha' is there already. What works: a YAML with `adapter: lora` or `qlora`.")
    if adapter not in ("lora", "qlora"):
        raise ValueError(f"adapter: {adapter!r} is not LoRA's. What works: a YAML with `adapter: lora` or `qlora`.")
    for key, example in (("lora_r", 8), ("lora_alpha", 16)):
        if values.get(key) is None:
            raise ValueError(f"{key}: is not set, and LoRA cannot be trained without it. What works: `{key}: {example}`.")


def _stops(values: dict[str, Any]) -> dict[str, str]:
    """Return what has no counterpart, and why."""
    translated = ("lora_target_linear", "peft_use_rslora")
    found = {key: why for key, why in REFUSED.items() if values.get(key) and key not in FALLS_AWAY and key not in translated}
    if values.get("peft_init_lora_weights") in PLAIN_INIT:
        found.pop("peft_init_lora_weights", None)
    for key in ("lora_rank_pattern", "lora_alpha_pattern") if values.get("peft_use_rslora") else ():
        if values.get(key):
            found[key] = "peft_use_rslora divides by the root of each layer's rank; write `alpha_pattern` by hand"
    for key in SPLIT_MODEL:
        if (values.get(key) or 1) != 1:
            found[key] = f"the model cannot be split yet; use {DATA_PARALLEL}"
    if values.get("lora_model_dir"):
        found["lora_model_dir"] = "a trained LoRA cannot be gone on with as QTHA, which starts anew; leave it out"
    if why := MATRICES.get(str(values.get("optimizer"))):
        found["optimizer"] = f"{values['optimizer']} {why}; use `optimizer: adamw_torch`"
    if values.get("load_in_8bit") and (values.get("fsdp") or values.get("fsdp_config")):
        found["load_in_8bit"] = "FSDP2 cannot shard 8-bit weights; use `load_in_4bit: true`, DDP, or ZeRO-1 or 2"
    companions = {"relora": "relora_", "expert_parallel_size": "expert_parallel_", "nvfp4_merge_aware": "nvfp4_merge_aware_"}
    for key, prefix in companions.items():
        if key in found:
            found |= {other: f"goes with {key}" for other in values if other.startswith(prefix) and other != key}
    return {key: why.partition("; leave it out")[0] for key, why in found.items()}


def _own(document: YamlLines, key: str) -> Entry:
    """Return where a key stands, which must be in the document itself."""
    if key not in document.entries:
        raise ValueError(f"{key}: comes through a merge key (`<<`) and cannot be changed there. What works: write it as a line.")
    return document.entries[key]


def _adapter(document: YamlLines, made: Translation) -> None:
    """Write `adapter: qtha`, the plugin and, for QLoRA, the 4 bits it stands for."""
    adapter, values = _own(document, "adapter"), document.values
    document.set_value(adapter, "qtha")
    if values["adapter"] == "qlora" and not values.get("load_in_4bit") and not values.get("load_in_8bit"):
        made.notes.append("load_in_4bit: true, which qlora stands for")
        if "load_in_4bit" in document.entries:
            document.set_value(document.entries["load_in_4bit"], "true")
        else:
            document.put_below(adapter, ["load_in_4bit: true"])
        values["load_in_4bit"] = True  # which FSDP2's keys depend on
    elif values["adapter"] == "lora" and values.get("load_in_4bit"):
        made.notes.append(
            "load_in_4bit: stays, and the base is now quantised; with `adapter: lora` Axolotl loads it in full precision"
        )
    if PLUGIN in (values.get("plugins") or []):
        return
    if "plugins" in values:
        document.append(_own(document, "plugins"), PLUGIN)
    else:
        document.put_below(adapter, ["plugins:", f"  - {PLUGIN}"])


def _block(document: YamlLines, made: Translation, budget: float) -> set[str]:
    """Put the `qtha:` block where the first of LoRA's keys stood that it takes over; return the keys that are done with."""
    values, lines = document.values, list[str]()
    kept = {key: name for key, name in LORA_KEYS.items() if values.get(key) not in (None, [], {}, "")}
    done = set(kept)
    if values.get("lora_target_linear"):
        kept["lora_target_linear"] = "target_modules"
        done.add("lora_target_linear")
        if kept.pop("lora_target_modules", None):
            document.remove(_own(document, "lora_target_modules"))
            made.notes.append("lora_target_modules: part of lora_target_linear, which is all linear layers but the output head")
    entries = sorted((_own(document, key) for key in kept), key=lambda entry: entry.first)
    for i, entry in enumerate(entries):
        name = kept[entry.key]
        value = None
        if entry.key == "lora_target_linear":
            value = "all-linear"
        elif entry.key == "lora_r" and isinstance(values["lora_r"], str) and values["lora_r"].strip().isdigit():
            value = values["lora_r"].strip()  # Axolotl takes a number in quotes for LoRA's rank
        elif entry.key == "lora_alpha" and values.get("peft_use_rslora"):
            alpha = float(values["lora_alpha"]) * math.sqrt(int(values["lora_r"]))
            value = f"{alpha:.6g}  # {values['lora_alpha']} times the root of the rank (peft_use_rslora)"
            made.notes.append("peft_use_rslora: divides alpha by the root of the rank, QTHA by the rank; alpha made up for it")
            done.add("peft_use_rslora")
            document.remove(_own(document, "peft_use_rslora"))
        lines += [
            *document.take(entry, name, 2, comments=i > 0, value=value),
            *([f"  param_budget: {budget:g}  # {WHAT_BUDGET_IS}\n"] if entry.key == "lora_r" else []),
        ]
        made.renamed.append(f"{entry.key} -> {name}")
    if "target_modules" not in kept.values():
        lines.append("  target_modules: all-linear\n")
        made.notes.append("target_modules: all-linear, since no modules are named")
    document.put_above(entries[0], ["qtha:", *lines])
    return done


def _own_places(document: YamlLines, made: Translation) -> None:
    """Have the training write beside LoRA's and not over it."""
    for key in ("output_dir", "hub_model_id"):
        value, entry = document.values.get(key), document.entries.get(key)
        if isinstance(value, str) and value and entry is not None:
            document.set_value(entry, f"{value.rstrip('/')}{SUFFIX}")
            made.notes.append(f"{key}: {value.rstrip('/')}{SUFFIX}, so that nothing of the training with LoRA is overwritten")


def _drop(document: YamlLines, made: Translation, done: set[str]) -> None:
    """Take out what is LoRA's and means nothing beside `adapter: qtha`."""
    reasons: dict[str, list[str]] = {}
    for key, entry in document.entries.items():
        if key in done or key in READ_BY_US or not (key in FALLS_AWAY or key.startswith(LORAS_OWN)):
            continue
        document.remove(entry)
        if document.values[key] is not None:
            reasons.setdefault(FALLS_AWAY.get(key, "not read beside `adapter: qtha`"), []).append(key)
    made.notes += [f"{', '.join(keys)}: left out; {why}" for why, keys in reasons.items()]


def _check_edits(before: str, after: str) -> None:
    """Make sure that the new text is YAML, and that keys which have nothing to do with this kept their values.

    Raises:
        ValueError: if an anchor was taken out that another key needs, or LoRA's keys come through a merge; and for whatever else
            was not foreseen.
    """
    works = "What works: write the values of LoRA's keys out."
    try:
        old, new = yaml.safe_load(before), yaml.safe_load(after)
        YamlLines(after)  # no key twice
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"its lines hang together, as through anchors ({' '.join(str(error).split())}). {works}") from error
    changing = {"adapter", "plugins", "load_in_4bit", "output_dir", "hub_model_id", *fsdp2.KEYS}
    if wrong := sorted(key for key in {*old} & {*new} - changing if old[key] != new[key]):
        raise ValueError(f"{', '.join(wrong)}: would get another value, through anchors. {works}")
    if left := sorted(key for key in new if key.startswith(LORAS_OWN) and key not in READ_BY_US and new[key] is not None):
        raise ValueError(f"{', '.join(left)}: come through a merge key (`<<`) and cannot be taken out there. {works}")
