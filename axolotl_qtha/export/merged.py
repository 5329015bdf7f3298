"""A full checkpoint with an export merged in, written shard by shard."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..tuner.layer import PREFIX
from .lowrank import LowRank

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Beside the weights: configurations, tokenizers, templates, code of models that bring their own, licences.
BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "LICENSE*", "NOTICE*")
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


def merge(layers: dict[str, LowRank], transposed: Collection[str], others: dict[str, Tensor], base: Path, folder: Path) -> Merged:
    """Write the base's checkpoint with the export added to its weights, holding no more than one file of it in memory.

    Args:
        layers: the export, by the names of the base's layers.
        transposed: the layers whose weight is stored as (d, o), GPT-2's Conv1D.
        others: tensors that take the place of the base's (modules_to_save), as they are named in the adapter's file.
        base: folder of the base.
        folder: where to; it exists.

    Raises:
        ValueError: if a layer's weight is not in the checkpoint, does not fit, or if nothing would be changed.
    """
    replacing = {name.removeprefix(PREFIX): tensor for name, tensor in others.items()}
    headers = dict(_headers(base))
    _check(layers, transposed, replacing, headers)
    done = Merged()
    index: dict[str, str] = {}
    plan = _plan({name: size for name, (_, _, size) in headers.items()})
    for number, names in enumerate(track(plan, "merging", transient=True), 1):
        file = SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        tensors = {name: _tensor(base / headers[name][0], name) for name in names}
        for name in names:
            module, _, kind = name.rpartition(".")
            if name in replacing:
                tensors[name] = replacing[name].to(tensors[name].dtype).contiguous()
            elif module in layers and kind == "weight":
                delta = layers[module].b @ layers[module].a
                tensors[name] = _add(tensors[name], delta.T if module in transposed else delta, done)
            elif module in layers and kind == "bias" and (bias := layers[module].bias) is not None:
                tensors[name] = (tensors[name].float() + bias).to(tensors[name].dtype)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
        done.files.append(file)
    if layers and not done.layers:
        raise ValueError(
            "--format merged: rounding to the base's dtype takes away every change the adapter makes; nothing was written. "
            "What works: `--format lora`, which keeps it in float32, or a longer training."
        )
    if len(plan) > 1:
        total = sum(size for _, _, size in headers.values())
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
    _copy_beside(base, folder, replacing)
    return done


def _headers(base: Path) -> Iterator[tuple[str, tuple[str, tuple[int, ...], int]]]:
    """Yield every tensor's name with its file, shape and bytes."""
    for file in _shards(base):
        with safe_open(base / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  # no mapping
                part = shard.get_slice(name)
                width = torch.empty(0, dtype=_dtype(part.get_dtype())).element_size()
                shape = tuple(part.get_shape())
                yield name, (file, shape, width * torch.Size(shape).numel())


def _shards(base: Path) -> list[str]:
    if (base / INDEX).is_file():
        return sorted(set(json.loads((base / INDEX).read_text())["weight_map"].values()))
    return [SINGLE] if (base / SINGLE).is_file() else []


def _check(
    layers: dict[str, LowRank], transposed: Collection[str], replacing: dict[str, Tensor], headers: dict[str, Any]
) -> None:
    for name, layer in layers.items():
        shape = headers[f"{name}.weight"][1] if f"{name}.weight" in headers else None
        fits = (len(layer.b), layer.a.shape[1])[:: -1 if name in transposed else 1]
        if shape is None:
            raise ValueError(
                f"--format merged: the base's checkpoint has no {name}.weight to merge into (it is tied to another, or stored "
                "under another name). What works: `--format lora`."
            )
        if shape != fits:
            raise ValueError(
                f"--format merged: {name}.weight has shape {shape} in the checkpoint, the adapter is for {fits}. "
                "What works: the base the adapter was trained on."
            )
        if layer.bias is not None and f"{name}.bias" not in headers:
            raise ValueError(f"--constant bias: the base's checkpoint has no {name}.bias. What works: `--constant auto`.")
        if f"{name}.weight" in replacing:
            raise ValueError(f"--format merged: {name} is both adapted and in modules_to_save. What works: `--format lora`.")
    if missing := sorted(replacing.keys() - headers.keys()):
        raise ValueError(
            f"--format merged: the base's checkpoint has no {missing[0]}, which the adapter replaces. What works: "
            "`--format lora`."
        )


def _plan(sizes: dict[str, int]) -> list[list[str]]:
    """Split the tensors, in their order, into files of at most SHARD bytes, or one tensor."""
    plan: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if plan[-1] and used + size > SHARD:
            plan.append([])
            used = 0
        plan[-1].append(name)
        used += size
    return plan


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as shard:
        tensor: Tensor = shard.get_tensor(name)
    return tensor


def _add(weight: Tensor, delta: Tensor, done: Merged) -> Tensor:
    """Return weight + delta in the weight's dtype, and note what rounding took."""
    merged = (weight.float() + delta).to(weight.dtype)
    change = merged.float() - weight.float()
    done.layers += bool(change.any())
    norm = float(delta.norm())
    done.rounding = max(done.rounding, float((change - delta).norm()) / norm if norm else 0.0)
    return merged.contiguous()


def _copy_beside(base: Path, folder: Path, replacing: dict[str, Tensor]) -> None:
    """Copy what lies beside the weights; the vocabulary is as large as the embeddings are now."""
    for pattern in BESIDE:
        for file in base.glob(pattern):
            if file.is_file() and not re.search(r"\.index\.json$", file.name) and not (folder / file.name).exists():
                shutil.copy(file, folder / file.name)
    sizes = {tensor.shape[0] for name, tensor in replacing.items() if re.search(r"(embed_tokens|wte|lm_head)\.weight$", name)}
    if len(sizes) == 1:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["vocab_size"] = sizes.pop()
        path.write_text(json.dumps(config, indent=2) + "\n")


def _dtype(name: str) -> torch.dtype:
    """Return the dtype of a name that safetensors uses."""
    known = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
    known |= {"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    dtype: torch.dtype = getattr(torch, known[name])
    return dtype
