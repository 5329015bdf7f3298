"""Tensors that layers share, the tensor network's leg over layers: which layer has which tensor of its own.

Two ways, which go together:

* `layers: n`: the same module of n neighbouring layers of the transformer has one A and B, one W_Q, and one circuit's angles;
  each keeps its W_C, and runs the circuit by itself.
* `inputs: true`: modules that read the same input (q, k, v; gate, up) have one A, one z, and one circuit with its angles and W_Q,
  which runs once for all of them; each keeps its W_C and B.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..errors import refusal, unknown_keys

# Names of modules that read one input, in the models that Hugging Face's transformers has.
SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
# Of attention to another sequence: q reads one input, k and v another.
CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)
ROUNDING = 1e-9  # 10 / (10 / 3) is not quite 3
QUERIES = ("q_proj", "query", "q_lin", "q")


class Share(BaseModel):
    """Which tensors layers share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: Annotated[int, Field(strict=True, ge=1)] | Annotated[float, Field(strict=True, ge=1)] | Literal["auto"] = Field(
        default=1,
        description="How many neighbouring layers of the transformer have one A and B, one W_Q, and one circuit's angles for the "
        "same module, each with its own W_C; on average, so that 2.5 are groups of 3 and 2. Counted among the adapted layers; "
        "the last group may be smaller. `auto`, with full matrices (`mpo: none`): as few as keep to param_budget.",
    )
    inputs: bool = Field(
        default=False,
        strict=True,
        description="Whether modules that read the same input (q, k, v; gate, up) have one A and one circuit, which runs once.",
    )

    @field_validator("layers")
    @classmethod
    def _whole(cls, layers: float | str) -> float | str:
        return int(layers) if isinstance(layers, float) and layers.is_integer() else layers

    @classmethod
    def in_groups(cls, count: int, layers: int, inputs: bool) -> Share:
        """Return what makes `count` groups, as even as can be, of so many layers."""
        return cls(layers=layers / count, inputs=inputs)

    @model_validator(mode="before")
    @classmethod
    def _says_what(cls, data: Any) -> Any:
        if not isinstance(data, (dict, Share)):
            works = "`share: {layers: 4}`, `share: {inputs: true}`, both, or no `share:`"
            raise refusal("share", data, "does not say what is shared", works)
        for key, value, works in unknown_keys(data, cls.model_fields):
            raise refusal(f"share.{key}", value, "is not a key of the `share:` block", works)
        if isinstance(data, dict):
            layers, inputs = data.get("layers", 1), data.get("inputs", False)
            if layers != "auto" and (type(layers) not in (int, float) or not 1 <= layers < math.inf):
                why = "is no number from 1 on, nor `auto`"
                raise refusal("share.layers", layers, why, "`share: {layers: 4}`")
            if type(inputs) is not bool:
                raise refusal("share.inputs", inputs, "is neither true nor false", "`share: {inputs: true}`")
            if layers == 1 and not inputs:
                raise refusal("share", data, "shares nothing", "`share: {layers: 4}`, `share: {inputs: true}`, or no `share:`")
        return data

    def check(self, mpo: str, init: str) -> None:
        """Refuse what does not go together with it.

        Args:
            mpo: the adapter's `mpo`.
            init: its `init`.

        Raises:
            ValueError: naming the key.
        """
        if self.layers == "auto" and mpo == "tt":
            why = "is by param_budget, which with `mpo: tt` picks bond_dim and mid_dim"
            raise refusal("share", {"layers": "auto"}, why, "`mpo: none`, or a number, as `share: {layers: 4}`")
        if init == "tt_svd":
            raise refusal("init", init, "starts from the weight of one layer, and `share:` is for several", "`init: kaiming`")


class Owned(NamedTuple):
    """Which of the tensors that may be shared a layer has of its own; it uses those of another for the rest."""

    a: bool = True
    b: bool = True
    branch: bool = True  # angles, scale, W_Q
    runs: bool = True  # its z and circuit, unlike those of a module before it that reads its input


ALL = Owned()


class LayerSize(NamedTuple):
    """An adapted layer, for counting."""

    inputs: int  # in_features
    outputs: int  # out_features
    owned: Owned = ALL
    rank: int | None = None  # where it is another than the configuration's


class Owners(NamedTuple):
    """Whose tensors a layer uses, by the names of the layers in the model; its own name for its own."""

    a: str
    b: str
    branch: str
    together: str  # the first of those that read its input

    def owned(self, name: str) -> Owned:
        """Return what the layer of this name has of its own."""
        return Owned(self.a == name, self.b == name, self.branch == name, self.together == name)


def owners(share: Share, sizes: Mapping[str, tuple[int, int] | LayerSize]) -> dict[str, Owners]:
    """Return whose tensors each layer uses.

    Args:
        share: what is shared.
        sizes: (in_features, out_features) of the adapted layers by name, in the model's order; or with a rank of their own.

    Raises:
        ValueError: if layers of a group have different sizes or ranks, or none of them shares anything.
    """
    assert share.layers != "auto"  # `fitting.py` has made it a number
    layers = {name: LayerSize(*size)._replace(owned=ALL) for name, size in sizes.items()}
    firsts: dict[Any, str] = {}  # of those with one input
    together: dict[str, str] = {}
    for name, (inputs, _, _, rank) in layers.items():
        parent, _, leaf = name.rpartition(".")
        kind = _kind(parent, leaf) if share.inputs else None
        together[name] = name if kind is None else firsts.setdefault((parent, kind, inputs, rank), name)
    alike: dict[str, str] = {}  # the first of a layer's group
    for same in groups(sizes).values():
        for place, name in enumerate(same):
            first = same[_first(place, share.layers)]
            if layers[first].rank != layers[name].rank:
                raise refusal(
                    "share",
                    {"layers": share.layers},
                    f"would share the tensors of {first} and {name}, to which rank_pattern gives different ranks",
                    "a rank_pattern that names modules and no layers (`k_proj`), or no `layers:`",
                )
            if layers[first] != layers[name]:
                raise refusal(
                    "share",
                    {"layers": share.layers},
                    f"would share the tensors of {first} and {name}, whose sizes are {layers[first][:2]} and {layers[name][:2]}",
                    "`layers_to_transform` with layers of one size, target_modules of one size, or no `layers:`",
                )
            alike[name] = first
    found: dict[str, Owners] = {}
    for name, first in together.items():
        before = alike[name] if first == name else first
        a, branch = (name, name) if before == name else (found[before].a, found[before].branch)
        found[name] = Owners(a, alike[name], branch, first)
    if all(own.owned(name) == ALL for name, own in found.items()):
        raise refusal(
            "share",
            share.model_dump(),
            "finds no layers that could share: none of the adapted ones is the same module of another layer of the transformer "
            "(`layers`), or reads the input of another (`inputs`: q, k, v; gate, up)",
            "further `target_modules` or `layers_to_transform`, or no `share:`",
        )
    return found


def _first(place: int, layers: float) -> int:
    """Return the place of the first layer of the group in which the layer at a place is.

    >>> [_first(place, 2.5) for place in range(8)], [_first(place, 10 / 3) for place in range(10)]
    ([0, 0, 0, 3, 3, 5, 5, 5], [0, 0, 0, 0, 4, 4, 4, 7, 7, 7])
    """
    group = math.floor(place / layers + ROUNDING)
    return math.ceil(group * layers - ROUNDING)


def owned(share: Share, sizes: Mapping[str, LayerSize]) -> dict[str, LayerSize]:
    """Return the sizes with what each layer has of its own."""
    whose = owners(share, sizes)
    return {name: size._replace(owned=whose[name].owned(name)) for name, size in sizes.items()}


def groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of the same module in all layers of the transformer, in their order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"\.\d+\.", ".*.", f".{name}", count=1), []).append(name)
    return found


def in_words(share: Share | None, names: Iterable[str]) -> str:
    """Return what the layers of these names share; "" for nothing.

    >>> in_words(Share(layers=4), [f"layers.{k}.mlp.up_proj" for k in range(10)])
    'A, B and circuits shared by 4 or 2 neighbouring layers'
    """
    if not share:
        return ""
    words = []
    assert share.layers != "auto"
    if share.layers > 1:
        counted = [Counter(_first(k, share.layers) for k in range(len(same))) for same in groups(names).values()]
        counts = " or ".join(map(str, sorted({n for count in counted for n in count.values()}, reverse=True)))
        words.append(f"A, B and circuits shared by {counts} neighbouring layers")
    if share.inputs:
        words.append("A and circuits shared by modules that read the same input")
    return "; ".join(words)


def _kind(parent: str, leaf: str) -> str | None:
    """Return which input of its parent a module reads, as far as its name tells."""
    for names in SAME_INPUT:
        if leaf in names:
            return "query" if CROSS.search(parent) and leaf in QUERIES else names[0]
    return None
