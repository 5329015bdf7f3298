"""FSDP1's keys as FSDP2's, for a YAML that is translated."""

from __future__ import annotations

from typing import Any

from .yaml_lines import YamlLines

KEYS = ("fsdp", "fsdp_config", "fsdp_version", "fsdp_final_state_dict_type", "optimizer")  # that may change
FULL = "FULL_STATE_DICT"
STATE_DICTS = ("state_dict_type", "final_state_dict_type")
# Settings that FSDP2 has none of.
GONE = (
    "sync_module_states",
    "use_orig_params",
    "limit_all_gathers",
    "forward_prefetch",
    "backward_prefetch",
    "backward_prefetch_policy",
)
RESHARD = {"FULL_SHARD": "true", "1": "true", "SHARD_GRAD_OP": "false", "2": "false"}  # by `sharding_strategy`
OPTIMISERS = ("adamw_8bit", "adamw_bnb_8bit")  # bitsandbytes' own, which cannot step sharded tensors
VERSIONS = ("fsdp_version", "version")


def translate(document: YamlLines) -> list[str]:
    """Change FSDP1's keys to FSDP2's, and what FSDP2 needs otherwise; return what changed.

    Raises:
        ValueError: if a setting has no counterpart.
    """
    values, notes = document.values, list[str]()
    listed, block = str(values.get("fsdp") or "").lower(), values.get("fsdp_config") or {}
    if not listed and not block:
        return notes
    version = values.get("fsdp_version") or next((block[key] for key in VERSIONS if key in block), 1)
    if str(version) != "2":
        notes.append("fsdp_version: 2, since FSDP1 puts frozen and trained parameters into one")
    offload = ["  offload_params: true"] if "offload" in listed else []
    lines = [] if values.get("fsdp_version") or any(key in block for key in VERSIONS) else ["fsdp_version: 2"]
    if block:
        notes += _change_block(document, block, offload)
        document.put_above(document.entries["fsdp_config"], lines)
    else:
        reshard = "false" if "shard_grad_op" in listed else "true"
        lines += ["fsdp_config:", "  auto_wrap_policy: TRANSFORMER_BASED_WRAP", f"  reshard_after_forward: {reshard}", *offload]
    if entry := document.entries.get("fsdp_version"):
        document.set_value(entry, "2")
    if entry := document.entries.get("fsdp"):
        document.replace(entry, [] if block else lines)
        notes.append("fsdp: left out; `fsdp_config:` alone turns FSDP2 on")
    if (entry := document.entries.get("fsdp_final_state_dict_type")) and values[entry.key] not in (None, FULL):
        document.set_value(entry, FULL)
        notes.append(f"fsdp_final_state_dict_type: {FULL}; {values[entry.key]} leaves no adapter that can be loaded")
    if values.get("optimizer") in OPTIMISERS and "optimizer" in document.entries:
        document.set_value(document.entries["optimizer"], "adamw_torch_8bit")
        notes.append(f"optimizer: adamw_torch_8bit, since Axolotl refuses {values['optimizer']} with FSDP2")
    return notes


def _change_block(document: YamlLines, block: dict[str, Any], more: list[str]) -> list[str]:
    """Rename the keys of `fsdp_config:` and change what FSDP2 would not take; add `more` lines."""
    names = {str(key).removeprefix("fsdp_") for key in block}
    notes, gone, last = list[str](), list[str](), None
    for key, entry in document.inside("fsdp_config").items():
        name, value = key.removeprefix("fsdp_"), block[key]
        if key in VERSIONS:
            document.set_value(entry, "2")
        elif name in GONE or (name == "sharding_strategy" and "reshard_after_forward" in names):
            document.remove(entry)
            gone.append(name)
            continue
        elif name == "sharding_strategy":
            document.set_value(entry, _reshard(value), "reshard_after_forward")
            notes.append(f"fsdp_config: sharding_strategy: {value} -> reshard_after_forward: {_reshard(value)}")
        elif name in STATE_DICTS and value not in (None, FULL):
            document.set_value(entry, FULL, name)
            notes.append(f"fsdp_config: {name}: {FULL}; {value} leaves no adapter that can be loaded")
        elif name == "cpu_ram_efficient_loading" and value and document.values.get("load_in_4bit"):
            document.set_value(entry, "false", name)
            notes.append(f"fsdp_config: {name}: false, since Axolotl refuses it with 4 bits under FSDP2")
        elif name != key:
            document.set_key(entry, name)
        last = entry
    if gone:
        notes.append(f"fsdp_config: {', '.join(gone)}: left out; FSDP2 has none of {'it' if len(gone) == 1 else 'them'}")
    if last is None:
        more = ["  reshard_after_forward: true", *more]
    if more and "offload_params" not in names:
        document.put_below(last or document.entries["fsdp_config"], more)
    return notes


def _reshard(strategy: Any) -> str:
    if str(strategy) not in RESHARD:
        raise ValueError(
            f"fsdp_config: {{sharding_strategy: {strategy}}} has no counterpart in FSDP2. "
            "What works: FULL_SHARD or SHARD_GRAD_OP."
        )
    return RESHARD[str(strategy)]
