"""Settings that are passed on as they are, to EstimatorV2 (`ibm: {estimator: ...}`) and to the transpiler (`transpiler: ...`).

They are checked against what is installed: the options of qiskit-ibm-runtime, the arguments and plugins of Qiskit.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import Hidden, alternatives, key_shown, refusal

# Options that have a key of their own in the `ibm:` block, or that the journal and the cap rest on.
OURS = {
    "default_shots": "`ibm: {shots: ...}`",
    "default_precision": "`ibm: {precision: ...}`",
    "resilience_level": "`ibm: {resilience_level: ...}`",
    "dynamical_decoupling.enable": "`ibm: {dynamical_decoupling: XY4}`",
    "dynamical_decoupling.sequence_type": "`ibm: {dynamical_decoupling: XY4}`",
    "max_execution_time": "`ibm: {max_qpu_seconds: ...}`, of which each job gets its share",
    "environment": "leave it out: the journal finds its jobs by tags that it sets there",
    "simulator": "leave it out: noise and seed are the device's, `seed_simulator` sets the seed",
    "experimental": "leave it out: there is nothing to check it against, and no estimate of what it costs",
}
DEVICES = ("backend", "target", "basis_gates", "coupling_map", "dt")  # arguments of the transpiler that the device answers
LEFT = ("hls_config", "unitary_synthesis_method", "unitary_synthesis_plugin_config")  # of gates that no circuit here has
SCHEDULING = "leave it out: IBM schedules the circuit, with `ibm: {dynamical_decoupling: ...}`"


class Frozen(dict[str, Any]):
    """A block of settings that can be hashed, and is not to be changed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


def at(block: Mapping[str, Any] | None, path: str) -> Any:
    """Return the value at a dotted path of a block, None where there is none.

    >>> at({"resilience": {"zne": {"noise_factors": [1, 3]}}}, "resilience.zne.noise_factors"), at(None, "twirling")
    ([1, 3], None)
    """
    value: Any = block
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def plain(value: Any) -> Any:
    """Return settings as plain dictionaries and lists, whatever read them."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def check_estimator(block: Any) -> Frozen:
    """Return the block of EstimatorV2's options.

    Raises:
        ValueError: naming the option, its value, and what works.
    """
    from pydantic import ValidationError

    key = "ibm.estimator"
    try:
        from qiskit_ibm_runtime.options import EstimatorOptions
    except ImportError as error:
        raise refusal(key, Hidden(block), "needs qiskit-ibm-runtime", '`pip install "axolotl-qtha[ibm]"`') from error
    if not isinstance(block, Mapping) or not block:
        raise refusal(key, Hidden(block), "is no block of options", "`estimator: {twirling: {num_randomizations: 32}}`")
    block = plain(block)
    _check_names(block, EstimatorOptions(), "")
    try:
        EstimatorOptions(**block)
    except ValidationError as error:
        path, words = _fault(error, block)
        works = "the values that the documentation of EstimatorV2's options names"
        raise refusal(f"{key}.{path}", _shown(at(block, path)), f"is refused by qiskit-ibm-runtime ({words})", works) from None
    return Frozen(block)


def _check_names(block: dict[str, Any], options: Any, path: str) -> None:
    known = [field.name for field in dataclasses.fields(options) if not field.name.startswith("_")]
    for name, value in block.items():
        where = f"{path}{name}"
        if where in OURS:
            raise refusal(f"ibm.estimator.{where}", _shown(value), "is set by this project", OURS[where])
        if name not in known:
            works = alternatives(name, (other for other in known if f"{path}{other}" not in OURS))
            why = "is no option of the installed qiskit-ibm-runtime's EstimatorV2"
            raise refusal(f"ibm.estimator.{path}{key_shown(name)}", Hidden(value), why, works)
        if dataclasses.is_dataclass(part := getattr(options, name)):
            if not isinstance(value, dict):
                first = next(field.name for field in dataclasses.fields(part) if not field.name.startswith("_"))
                raise refusal(f"ibm.estimator.{where}", _shown(value), "is no block of options", f"`{name}: {{{first}: ...}}`")
            _check_names(value, part, f"{where}.")


def _fault(error: Any, block: dict[str, Any]) -> tuple[str, str]:
    """Return the dotted path and the words of what is wrong: of the alternatives pydantic tried, the one it went deepest into."""
    found = []
    for fault in error.errors(include_input=False, include_url=False):
        path = ""
        for part in fault["loc"]:
            longer = f"{path}.{part}".removeprefix(".")
            path = longer if at(block, longer) is not None else path
        known = "instance of UnsetType" not in fault["msg"] and "instance of Dict" not in fault["msg"]
        found.append((known, path.count("."), path, str(fault["msg"]).removeprefix("Value error, ")))
    _, _, path, _ = max(found, key=lambda each: each[:2])
    return path, "; ".join(dict.fromkeys(words for known, _, where, words in found if known and where == path))


def _shown(value: Any) -> Any:
    """Return a value for an error: numbers and short words as they are; of anything else, which may be a key, its type."""
    if isinstance(value, list) and all(isinstance(_shown(each), (int, float, str)) for each in value):
        return value
    short = isinstance(value, str) and re.fullmatch(r"[a-z_]{1,20}", value)
    return value if value is None or isinstance(value, (bool, int, float)) or short else Hidden(value)


@dataclasses.dataclass(frozen=True)
class Asked:
    """Keys of the `ibm:` block beside which options of EstimatorV2 do something, or nothing."""

    level: int  # resilience_level
    twirling: bool
    decoupling: str
    shots: int


def check_effects(block: Mapping[str, Any], asked: Asked) -> None:
    """Refuse options of EstimatorV2 that do nothing, contradict the block's own keys, or set no limit to what they cost.

    Raises:
        ValueError: naming the first.
    """
    for path, why, works in _without_effect(block, asked):
        if (value := at(block, path)) is not None:
            raise refusal(f"ibm.estimator.{path}", _shown(value), why, works)
    for path in ("resilience.pec.max_overhead", "resilience.layer_noise_learning.max_layers_to_learn"):
        *above, last = path.split(".")
        if last in (at(block, ".".join(above)) or {}) and at(block, path) is None:
            raise refusal(
                f"ibm.estimator.{path}", None, "sets no limit to what a circuit may cost", f"a number, e.g. `{last}: 10`"
            )
    number, each = (at(block, f"twirling.{name}") for name in ("num_randomizations", "shots_per_randomization"))
    if isinstance(number, int) and isinstance(each, int) and number * each != asked.shots:
        why = f"times shots_per_randomization {each} takes the place of the {asked.shots:,} shots asked for"
        works = f"`ibm: {{shots: {number * each}}}`, or one of the two"
        raise refusal("ibm.estimator.twirling.num_randomizations", number, why, works)


def _without_effect(block: Mapping[str, Any], asked: Asked) -> Iterator[tuple[str, str, str]]:
    """Yield (path, why, what works) of the options that must not be there."""
    if asked.twirling:
        for name in ("enable_gates", "enable_measure"):
            yield f"twirling.{name}", "says the same thing as `ibm: {twirling: true}`", "one of them"
    if asked.decoupling == "none":
        yield "dynamical_decoupling", "has no effect with `dynamical_decoupling: none`", "`ibm: {dynamical_decoupling: XX}`"
    resilience = at(block, "resilience") or {}
    if not resilience.get("zne_mitigation", asked.level == 2):
        yield "resilience.zne", "has no effect without zero-noise extrapolation", "`ibm: {resilience_level: 2}`"
    pec, pea = bool(resilience.get("pec_mitigation")), at(block, "resilience.zne.amplifier") == "pea"
    if not pec:
        yield "resilience.pec", "has no effect without probabilistic error cancellation", "`resilience: {pec_mitigation: true}`"
    if not pec and not pea:
        yield "resilience.layer_noise_learning", "has no effect: no noise of layers is learned", "`pec_mitigation: true`"
    if not twirled(block, asked.level, asked.twirling):
        for name in ("num_randomizations", "shots_per_randomization", "strategy"):
            yield f"twirling.{name}", "has no effect: nothing is twirled", "`ibm: {twirling: true}` or `resilience_level: 1`"


def twirled(block: Mapping[str, Any] | None, level: int, twirling: bool) -> bool:
    """Return whether shots are shared out over randomised circuits: of gates, of measurements, or sampled for mitigation."""
    gates, measure = (at(block, f"twirling.{name}") for name in ("enable_gates", "enable_measure"))
    gates = (twirling or level == 2) if gates is None else gates
    measure = (twirling or level > 0) if measure is None else measure
    learned = at(block, "resilience.pec_mitigation") or at(block, "resilience.zne.amplifier") == "pea"
    return bool(gates or measure or learned)


def check_transpiler(block: Any) -> Frozen:
    """Return the block of the transpiler's arguments.

    Raises:
        ValueError: naming the argument, its value, and what works.
    """
    from qiskit import transpile
    from qiskit.transpiler import generate_preset_pass_manager

    key = "ibm.transpiler"
    if not isinstance(block, Mapping) or not block:
        raise refusal(key, Hidden(block), "is no block of options", "`transpiler: {optimization_level: 1, seed_transpiler: 7}`")
    block = plain(block)
    both = inspect.signature(generate_preset_pass_manager).parameters.keys() & inspect.signature(transpile).parameters.keys()
    known = sorted(both - {*DEVICES, *LEFT, "scheduling_method"})
    for name, value in block.items():
        if name in DEVICES:
            raise refusal(
                f"{key}.{name}", _shown(value), "is answered by the device", "leave it out, or another `ibm: {backend: ...}`"
            )
        if name == "scheduling_method":
            raise refusal(f"{key}.{name}", _shown(value), "is not the transpiler's here", SCHEDULING)
        if name not in known:
            why = "is no argument of the installed Qiskit's transpiler for such circuits"
            raise refusal(f"{key}.{key_shown(name)}", Hidden(value), why, alternatives(name, known))
        if works := _unfit(name, value):
            raise refusal(f"{key}.{name}", _shown(value), "is no value of it", works)
    return Frozen(block)


def _unfit(name: str, value: Any) -> str | None:
    """Return what would work for an argument of the transpiler, None where its value does."""
    from qiskit.transpiler.preset_passmanagers.plugin import list_stage_plugins

    whole = type(value) is int
    if name == "optimization_level":
        return None if whole and 0 <= value <= 3 else "`optimization_level: 0`, 1, 2 or 3"
    if name == "seed_transpiler":
        return None if whole and 0 <= value < 2**31 else "`seed_transpiler: 7`, a whole number from 0 to 2**31 - 1"
    if name == "initial_layout":
        fits = isinstance(value, list) and all(type(qubit) is int and qubit >= 0 for qubit in value)
        return None if fits and len(set(value)) == len(value) > 0 else "`initial_layout: [3, 4]`, a qubit of the device for each"
    if name == "approximation_degree":
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1
        return None if fits else "`approximation_degree: 1.0`, a number in [0, 1]"
    if name.endswith("_method"):
        names = list_stage_plugins(name.removesuffix("_method"))
        return None if value in names else ", ".join(f"`{name}: {each}`" for each in names)
    return None if type(value) is bool else f"`{name}: true` or `{name}: false`"
