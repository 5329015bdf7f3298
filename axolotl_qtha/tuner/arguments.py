"""What may stand in a `QTHAConfig` or a `qtha:` block: names, choices, patterns, factors, and what goes together."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from ..errors import Hidden, alternatives, refusal, unknown_keys
from ..ibm.options import IBMOptions
from . import blocks
from .rings import CLASSICAL

# LoRA's names, in PEFT and in Axolotl's YAML, for what has another one here.
LORA_NAMES = {
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "init_lora_weights": "init",
}
LORA_WORKS = {
    "init_lora_weights": "`init: kaiming` or `init: tt_svd`",
    "bias": "leave it out, biases stay frozen; train modules in full with `modules_to_save`",
    "lora_bias": "leave it out, biases stay frozen; train modules in full with `modules_to_save`",
    "fan_in_fan_out": "leave it out, GPT-2's transposed layers are recognised by themselves",
    "use_rslora": "leave it out, and multiply `alpha` by the root of the rank",
    "use_dora": "leave it out, DoRA is another method: PEFT's `LoraConfig(use_dora=True)`",
    "target_parameters": "leave it out, only modules can be adapted: `target_modules`",
    "trainable_token_indices": "`modules_to_save: [embed_tokens, lm_head]`",
}
# Far above what a model of 100 billion parameters can use, and far below what would keep a machine busy for minutes. Bonds are
# cut to what the factors allow, so that any large one stands for the whole weight.
MOST = {"rank": 16_384, "bond_dim": 1_000_000, "mid_dim": 65_536, "num_cores": 12, "circuit_layers": 1_000}
USUAL = {"num_cores": 2, "circuit_layers": 2}
# Settings of the branch, and the values of `quantum` beside which they do nothing.
IDLE = {
    "branch_init": ("none",),
    "qubits": ("none", "product"),
    "circuit_layers": ("none",),
    "angle_scale": ("none", *CLASSICAL),
    "init_angles": ("none", *CLASSICAL),
    "gate_order": ("none", *CLASSICAL, "product"),
    "circuit": ("none", *CLASSICAL),
}


def refuse_unknown(data: Any, known: Iterable[str], where: str) -> None:
    """Refuse names that are not known; those of LoRA's are told what to write instead. What may be a credential is not shown.

    Args:
        data: names and values.
        known: the names that may be there.
        where: what they are given to, in words: "the `qtha:` block".

    Raises:
        ValueError: naming the first.
    """
    loras = {field.name for field in dataclasses.fields(LoraConfig)} | LORA_NAMES.keys()
    value: Any
    for key, value, works in unknown_keys(data, known):
        if key in loras:
            ours, number = LORA_NAMES.get(key), isinstance(data[key], (int, float))  # which is no credential
            value = data[key] if number else value
            works = LORA_WORKS.get(key) or (f"`{ours}: {value if number else '...'}`" if ours else "leave it out")
            raise refusal(key, value, f"is LoRA's, and not known to {where}", works)
        raise refusal(key, value, f"is not known to {where}", works)


def check_choice(key: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse a value that is none of the choices; one for a backend is not shown, where accounts and addresses land.

    Raises:
        ValueError: naming them.
    """
    if value not in choices:
        value = Hidden(value) if key == "quantum_backend" else value
        raise refusal(key, value, "is not a choice", ", ".join(f"`{choice}`" for choice in choices if choice is not None))


def check_count(key: str, value: Any, optional: bool) -> None:
    """Refuse a value that is no positive whole number up to `MOST`, nor None where that may be.

    Raises:
        ValueError: naming the key.
    """
    if value is None and optional:
        return
    if type(value) is not int or value < 1:
        raise refusal(key, value, "is not a positive whole number", f"`{key}: {USUAL.get(key, 8)}`")
    if value > MOST[key]:
        raise refusal(key, value, f"is more than {MOST[key]:,}", f"`{key}: {USUAL.get(key, 8)}`")


def check_number(key: str, value: Any, fits: Callable[[float], bool], what: str, works: str) -> None:
    """Refuse a value that is no number, or does not fit.

    Args:
        key: its name.
        value: it.
        fits: whether a number does.
        what: a number that does, in words.
        works: an example.

    Raises:
        ValueError: naming the key.
    """
    if type(value) not in (int, float) or not fits(value):
        raise refusal(key, value, f"is not {what}", f"`{key}: {works}`")


def check_names(key: str, value: Any, words: bool) -> None:
    """Refuse what are no names of modules.

    Args:
        key: the setting.
        value: a list or set of names, None, or where `words` says so one expression.
        words: whether it may be a text.

    Raises:
        ValueError: naming the key and the first name at fault.
    """
    if value is None:
        return
    works = f"`{key}: [q_proj, v_proj]`"
    if not isinstance(value, (str, list, tuple, set) if words else (list, tuple, set)):
        raise refusal(key, value, "is no list of modules' names", works)
    for name in [value] if isinstance(value, str) else value:
        if not isinstance(name, str) or not name or not name.isprintable():
            raise refusal(key, name, "is no name of a module", works)


def check_indices(key: str, value: Any) -> None:
    """Refuse what is neither None, nor an index, nor a list of them.

    Raises:
        ValueError: naming the key.
    """
    for index in [] if value is None else value if isinstance(value, (list, tuple, set)) else [value]:
        if type(index) is not int or index < 0:
            raise refusal(key, value, "is neither the index of a layer nor a list of them", f"`{key}: [0, 1]`")


def check_backend(
    backend: str, no_circuit: str | None, ibm: IBMOptions | None, aers: Mapping[str, Any], ranks: Mapping[str, int] | None
) -> None:
    """Refuse settings that what runs the circuits does not read.

    Args:
        backend: what does.
        no_circuit: the branch, where it runs none.
        ibm: the settings of a device.
        aers: Aer's settings, where another backend runs the circuits.
        ranks: `rank_pattern`.

    Raises:
        ValueError: naming the first.
    """
    if backend != "torch" and no_circuit is not None:
        raise refusal("quantum_backend", backend, f"has no circuit to run with `quantum: {no_circuit}`", "leave it out")
    if ibm is not None and backend != "ibm":
        why = f"has no effect with `quantum_backend: {backend}`"
        raise refusal("ibm", Hidden(ibm), why, "`quantum_backend: ibm`, or no `ibm:` block")
    if ranks and backend == "ibm":
        why = "gives layers circuits of several sizes, and a device runs those of one"
        raise refusal("rank_pattern", ranks, why, "leave it out, or `quantum_backend: torch`")
    for key, value in aers.items():
        if value in (None, "none") or (backend == "ibm" and key == "seed_simulator"):
            continue
        if backend == "torch":
            why, works = "is Aer's: `quantum_backend: torch` is exact", f"leave {key} out, or `quantum_backend: aer`"
        else:
            ours = f"`ibm: {{{key}: ...}}`" if key in IBMOptions.model_fields else "a device has its own noise: leave it out"
            why, works = "is Aer's, not of `quantum_backend: ibm`", ours
        raise refusal(key, value, why, works)


def whole_factors(key: str, given: Any) -> dict[int, list[int]] | None:
    """Return factors as whole numbers.

    Raises:
        ValueError: if they are none.
    """
    if given is None:
        return None
    try:
        return {int(size): [int(i) for i in sizes] for size, sizes in given.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise refusal(key, given, "are no lists of whole numbers by sizes", f"`{key}: {{3584: [64, 56]}}`") from None


def check_factors(key: str, given: Mapping[int, list[int]] | None, cores: int) -> None:
    """Check how sizes are factorised.

    Args:
        key: `in_factors` or `out_factors`.
        given: the factors of each size.
        cores: how many there must be.

    Raises:
        ValueError: if there are more or fewer, or their product is not the size, or a little more.
    """
    for size, factors in (given or {}).items():
        if len(factors) != cores or any(i < 1 for i in factors) or math.prod(factors) < size:
            raise refusal(
                key,
                {size: factors},
                f"is not {cores} (num_cores) positive factors whose product is {size}, or more to pad",
                f"leave {size} out, or e.g. `num_cores: 2` with `{{3584: [64, 56]}}`",
            )
        if math.prod(factors) >= 2 * size:
            raise refusal(key, {size: factors}, f"has a product of {math.prod(factors)}, not {size}", f"leave {size} out")


def check_patterns(ranks: Any, alphas: Any, qubits: int | None, quantum: str, has_circuit: bool) -> None:
    """Check `rank_pattern` and `alpha_pattern`.

    Args:
        ranks: the first.
        alphas: the second.
        qubits: of each circuit, where the settings name them.
        quantum: the branch.
        has_circuit: whether it runs circuits.

    Raises:
        ValueError: if a name is no regular expression, a value no rank or alpha, or circuits of `qubits` do not share a rank.
    """
    for key, pattern, example in (("rank_pattern", ranks, 16), ("alpha_pattern", alphas, 32)):
        if pattern is None:
            continue
        works = f"`{key}: {{down_proj: {example}}}`"
        if not isinstance(pattern, dict):
            raise refusal(key, pattern, "is no dictionary of layers' names", works)
        for name, value in pattern.items():
            try:
                re.compile(name)
            except (re.error, TypeError) as error:
                raise refusal(
                    key, name, f"is neither the end of a layer's name nor a regular expression ({error})", works
                ) from None
            number = type(value) is int if key == "rank_pattern" else type(value) in (int, float) and math.isfinite(value)
            if not number or not 0 < value <= (MOST["rank"] if key == "rank_pattern" else math.inf):
                raise refusal(
                    key, {name: value}, f"is no {'positive whole number' if example == 16 else 'positive number'}", works
                )
            if key == "rank_pattern":
                try:
                    blocks.check(value, qubits, quantum, has_circuit)
                except ValueError as error:
                    raise ValueError(
                        f"qtha.rank_pattern: {{{name!r}: {value!r}}} does not go with the circuits. {error}"
                    ) from None


def matched(pattern: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """Return the value that a pattern has for a layer, by PEFT's rule: the first whose expression ends the layer's name.

    >>> matched({"k_proj": 4, "layers.1.*": 2}, "layers.1.q_proj", 8), matched({"k_proj": 4}, "layers.1.q_proj", 8)
    (2, 8)
    """
    return (pattern or {}).get(get_pattern_key(list(pattern or {}), name), otherwise)


def refuse_unmatched(patterns: Mapping[str, Mapping[str, Any] | None], names: Iterable[str]) -> None:
    """Refuse patterns that no layer has its value from.

    Args:
        patterns: by their keys, `rank_pattern` and `alpha_pattern`.
        names: of the adapted layers.

    Raises:
        ValueError: naming the first.
    """
    layers = list(names)
    for key, pattern in patterns.items():
        if not pattern:
            continue
        used = {get_pattern_key(list(pattern), name) for name in layers}
        for name, value in pattern.items():
            if name not in used:
                works = alternatives(name, {layer.rsplit(".", 1)[-1] for layer in layers})
                raise refusal(key, {name: value}, "matches no adapted layer that an entry before it does not", works)
