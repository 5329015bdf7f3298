"""One batch for several adapters: `adapter_names=[...]` in forward and generate, a name for each sequence, as LoRA has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

BASE = "__base__"  # the name that stands for no adapter


@contextmanager
def mixed(model: Any, names: Sequence[str], adapters: Sequence[str], arguments: Mapping[str, Any]) -> Iterator[None]:
    """Have every adapted layer of a model use the adapter of each sequence, inside.

    The names reach the layers, and modules_to_save, as an argument of their forward, by hooks.

    Args:
        model: the base model with adapters.
        names: an adapter, or `__base__`, for each sequence of the batch.
        adapters: the adapters there are.
        arguments: the others of forward or generate, which repeats each sequence for beams and returned sequences.

    Raises:
        ValueError: if a name is unknown, or the model is in training mode.
    """
    check(names, adapters)
    if model.training:
        raise ValueError(
            f"adapter_names={list(names)}: the model is in training mode. What works: model.eval(), or set_adapter to train."
        )
    copies = _copies(arguments)
    repeated = [name for name in names for _ in range(copies)]
    # before generate repeats sequences an encoder has run
    encoder = model.get_encoder() if copies > 1 and getattr(model.config, "is_encoder_decoder", False) else None
    early = set() if encoder is None else set(encoder.modules())
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                given = list(names) if module in early else repeated
                if isinstance(module, AuxiliaryTrainingWrapper):  # of some adapters only; PEFT would look for all
                    given = [name if name in module._get_available_adapters() else BASE for name in given]
                hook = cast(nn.Module, module).register_forward_pre_hook(partial(_hand_over, given), with_kwargs=True)
                hooks.callback(hook.remove)
        yield


def check(names: Any, adapters: Sequence[str]) -> None:
    """Refuse names of adapters that are not there.

    Args:
        names: what was given as `adapter_names`.
        adapters: the adapters there are.

    Raises:
        ValueError: naming them.
    """
    works = f"a list with one of {sorted({*adapters, BASE})} for each sequence of the batch"
    if not isinstance(names, (list, tuple)):
        raise ValueError(f"adapter_names={names!r} is no list. What works: {works}.")
    if unknown := sorted({str(name) for name in names if name != BASE and name not in adapters}):
        raise ValueError(f"adapter_names: {unknown} are no adapters of this model. What works: {works}.")


def rows(names: Sequence[str], size: int, layer: str) -> dict[str, list[int]]:
    """Return which sequences each adapter has.

    Args:
        names: an adapter for each sequence.
        size: sequences of the batch, the first axis of what the layer is given.
        layer: its name, for the error.

    Raises:
        ValueError: if there are more or fewer names.
    """
    if size != len(names):
        raise ValueError(
            f"adapter_names: {len(names)} names, and {layer} is given a batch of {size}. What works: one name for each sequence, "
            "and layers whose input has the sequences as its first axis."
        )
    found: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        found.setdefault(name, []).append(row)
    return found


def _copies(arguments: Mapping[str, Any]) -> int:
    """Return how often generate repeats each sequence."""
    config = arguments.get("generation_config")
    counts = (arguments.get(key) or getattr(config, key, None) or 1 for key in ("num_beams", "num_return_sequences"))
    return max(count for count in counts if isinstance(count, int))


def _hand_over(names: list[str], _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"adapter_names": names}
