"""A full checkpoint with an export merged in, written shard by shard."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..tuner.sizes import Size
from .beside import BESIDE
from .lowrank import LowRank
from .whole import Whole

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD = 4 * 2**30  # bytes of a written file, which is also what is held in memory


@dataclass
class Merged:
    """What merging did."""

    layers: int = 0
    rounding: float = 0.0  # largest share of a layer's change that rounding to the checkpoint's dtype took
    files: list[str] = field(default_factory=list)


def base_folder(name: str, revision: str | None) -> Path:
    """Return the folder with the base's files; of a Hub model its cached or downloaded snapshot.

    Raises:
        ValueError: if it holds no safetensors files, or quantised ones.
    """
    folder = Path(name)
    if not folder.is_dir():
        offline = constants.HF_HUB_OFFLINE
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", *BESIDE], local_files_only=offline)
        )
    if not _shards(folder):
        raise ValueError(
            f"base_model: {name!r} has no {SINGLE} nor {INDEX}. What works: a base stored as safetensors; "
            "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)` writes one from older formats."
        )
    config = json.loads((folder / "config.json").read_text())
    if config.get("quantization_config"):
        raise ValueError(
            f"base_model: {name!r} is quantised already ({config['quantization_config'].get('quant_method')}): merging would "
            "round the adapter to its bits. What works: the full-precision model it was made from, or `--format lora`."
        )
    return folder


@dataclass(frozen=True)
class _Source:
    """Where a written tensor's values come from: a tensor of the base's checkpoint."""

    file: str
    name: str
    shape: tuple[int, ...]
    size: int  # bytes


@dataclass(frozen=True)
class Plan:
    """What will be written, and from where; made before anything is fitted."""

    base: Path
    sources: dict[str, _Source]  # by the name of the written tensor
    whole: Whole
    dropped: str = ""  # what the names of the model's modules begin with, and those of the checkpoint do not

    def stored(self, name: str) -> str:
        """Return the name that a module or tensor of the model has in the checkpoint."""
        return name.removeprefix(self.dropped)

    def has(self, name: str) -> bool:
        """Return whether a tensor of the model is in the checkpoint."""
        return self.stored(name) in self.sources

    @property
    def half(self) -> bool:
        """Return whether weights are stored in less than 32 bits."""
        return any(source.size < 4 * torch.Size(source.shape).numel() for source in self.sources.values())


def plan(
    layers: dict[str, Size],
    transposed: Collection[str],
    whole: Whole,
    base: Path,
    modules: Collection[str] = (),
    prefix: str = "",
) -> Plan:
    """Return how a base's checkpoint takes an export, or refuse it before there is one.

    A head that was tied to the embedding and no longer equals it gets a tensor of its own.

    Args:
        layers: (in_features, out_features) of the layers to merge into, by the names of the base's layers.
        transposed: the layers whose weight is stored as (d, o), GPT-2's Conv1D.
        whole: what takes the place of the base's tensors.
        base: folder of the base.
        modules: names of all of the base's; tensors of layers that it has not (`num_hidden_layers`) are left out.
        prefix: of names that checkpoints may leave out, as GPT-2's on the Hub do.

    Raises:
        ValueError: if a weight is not in the checkpoint, or does not fit.
    """
    sources = {name: source for name, source in _headers(base) if not _beyond(name, modules)}
    begin = f"{prefix}."
    dropped = "" if not prefix or any(name.startswith(begin) for name in sources) else begin
    layers = {name.removeprefix(dropped): size for name, size in layers.items()}
    transposed = {name.removeprefix(dropped) for name in transposed}
    tensors = {name.removeprefix(dropped): tensor for name, tensor in whole.tensors.items()}
    whole = replace(whole, tensors=tensors, embedding=(whole.embedding or "").removeprefix(dropped))
    embedding, head = f"{whole.embedding}.weight", f"{whole.head}.weight"
    if whole.head is not None and whole.tied and whole.vocabulary is not None:
        sources.pop(head, None)  # a copy of the embedding as it was, which some checkpoints hold
    if whole.head is not None and whole.base_tied and not whole.tied and head not in sources and embedding in sources:
        sources[head] = sources[embedding]
    _check(layers, transposed, whole, sources)
    return Plan(base, sources, whole, dropped)


def _beyond(name: str, modules: Collection[str]) -> bool:
    """Return whether a tensor is of a layer that the model has not."""
    for found in re.finditer(r"\.(\d+)\.", name):
        layers = name[: found.start()]
        if f"{layers}.0" in modules and f"{layers}.{found.group(1)}" not in modules:
            return True
    return False


def merge(layers: dict[str, LowRank], transposed: Collection[str], plan: Plan, folder: Path) -> Merged:
    """Write the base's checkpoint with the export added to its weights, holding no more than one file of it in memory.

    Args:
        layers: the export, by the names of the base's layers.
        transposed: the layers whose weight is stored as (d, o), GPT-2's Conv1D.
        plan: made for these layers.
        folder: where to; it exists.

    Raises:
        ValueError: if nothing would be changed.
    """
    layers = {plan.stored(name): layer for name, layer in layers.items()}
    transposed = {plan.stored(name) for name in transposed}
    done = Merged()
    index: dict[str, str] = {}
    replacing, total = plan.whole.tensors, 0
    files = _files({name: source.size for name, source in plan.sources.items()})
    for number, names in enumerate(track(files, "merging", transient=True), 1):
        file = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {name: _tensor(plan.base, plan.sources[name]) for name in names}
        for name in names:
            module, _, kind = name.rpartition(".")
            if name in replacing:
                tensors[name] = replacing[name].to(tensors[name].dtype).contiguous()
            if module in layers and kind == "weight":
                delta = layers[module].b @ layers[module].a
                tensors[name] = _add(tensors[name], delta.T if module in transposed else delta, done)
            elif module in layers and kind == "bias" and (bias := layers[module].bias) is not None:
                tensors[name] = (tensors[name].float() + bias).to(tensors[name].dtype)
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
        done.files.append(file)
    if layers and not done.layers:
        raise ValueError(
            "--format merged: rounding to the base's dtype takes away every change the adapter makes; nothing was written. "
            "What works: `--format lora`, which keeps it in float32, or a longer training."
        )
    if len(files) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
    return done


def _headers(base: Path) -> Iterator[tuple[str, _Source]]:
    """Yield every tensor's name with where it is."""
    for file in _shards(base):
        with safe_open(base / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  # no mapping
                part = shard.get_slice(name)
                width = torch.empty(0, dtype=_dtype(part.get_dtype())).element_size()
                shape = tuple(part.get_shape())
                yield name, _Source(file, name, shape, width * torch.Size(shape).numel())


def _shards(base: Path) -> list[str]:
    if (base / SINGLE).is_file():  # where both are, transformers takes it
        return [SINGLE]
    return sorted(set(json.loads((base / INDEX).read_text())["weight_map"].values())) if (base / INDEX).is_file() else []


def _check(layers: dict[str, Size], transposed: Collection[str], whole: Whole, sources: dict[str, _Source]) -> None:
    for name, size in layers.items():
        source, replaced = sources.get(f"{name}.weight"), whole.tensors.get(f"{name}.weight")
        shape = None if source is None else tuple(source.shape if replaced is None else replaced.shape)
        fits = size[:2][:: 1 if name in transposed else -1]
        if shape is None:
            raise ValueError(
                f"--format merged: the base's checkpoint has no {name}.weight to merge into (it is stored under another name). "
                "What works: `--format lora`."
            )
        if shape != fits:
            raise ValueError(
                f"--format merged: {name}.weight has shape {shape} in the checkpoint, the adapter is for {fits}. "
                "What works: the base the adapter was trained on."
            )
        if replaced is not None and whole.vocabulary is None:
            raise ValueError(f"--format merged: {name} is both adapted and in modules_to_save. What works: `--format lora`.")
    if missing := sorted(whole.tensors.keys() - sources.keys()):
        raise ValueError(
            f"--format merged: the base's checkpoint has no {missing[0]}, which the adapter replaces. What works: "
            "`--format lora`."
        )
    # all but the vocabulary's has the base's shape
    for name, tensor in whole.tensors.items():
        if tuple(tensor.shape)[1:] != sources[name].shape[1:]:
            raise ValueError(
                f"--format merged: {name} has shape {sources[name].shape} in the checkpoint and {tuple(tensor.shape)} in the "
                "adapter. What works: the base the adapter was trained on."
            )


def _files(sizes: dict[str, int]) -> list[list[str]]:
    """Split the tensors, in their order, into files of at most SHARD bytes, or one tensor."""
    files: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if files[-1] and used + size > SHARD:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def _tensor(base: Path, source: _Source) -> Tensor:
    with safe_open(base / source.file, framework="pt") as shard:
        tensor: Tensor = shard.get_tensor(source.name)
    return tensor


def _add(weight: Tensor, delta: Tensor, done: Merged) -> Tensor:
    """Return weight + delta in the weight's dtype, and note what rounding took."""
    merged = (weight.float() + delta).to(weight.dtype)
    change = merged.float() - weight.float()
    done.layers += bool(change.any())
    norm = float(delta.norm())
    done.rounding = max(done.rounding, float((change - delta).norm()) / norm if norm else 0.0)
    return merged.contiguous()


def _dtype(name: str) -> torch.dtype:
    """Return the dtype of a name that safetensors uses."""
    known = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
    known |= {"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    dtype: torch.dtype = getattr(torch, known[name])
    return dtype
