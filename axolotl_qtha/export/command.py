"""`axolotl qtha-export`, from the options to the folder."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from axolotl.cli.utils.load import load_model_and_tokenizer
from axolotl.common.datasets import load_datasets
from axolotl.utils.dict import DictDefault
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..errors import refusal
from ..settings.meta_base import read_yaml
from ..settings.public_facts import facts_of
from ..settings.training_run import why_unread
from ..trained import calibration_text
from ..trained.adapter_folder import check_trained, configuration, refuse_untrained
from ..trained.passes import Pass, adapters_of
from ..training.model_card import make_card, write_card
from ..tuner.config import QTHAConfig
from ..tuner.layer import adapted_layers, adapted_sizes
from ..tuner.saving import WEIGHTS
from . import lowrank, merged, output_folder
from .distil import distilled
from .fit import collect, exact, linear, wide
from .lowrank import LowRank
from .measure import WITH_CONSTANTS, measure
from .report import Report, model_table, module_table
from .surrogate import Kind

Format = Literal["lora", "merged"]
Constant = Literal["auto", "bias", "drop"]

TOKENS_PER_RANK = 16  # tokens it takes at least for each row of A
WIDE_MEMORY = 4 * 2**30  # bytes that `--surrogate wide` may hold at one time


@dataclass(frozen=True)
class ExportOptions:
    """The command's options."""

    config: Path
    out: Path
    format: Format = "lora"
    lora_model_dir: Path | None = None
    calibration: Path | None = None
    tokens: int = 32768
    surrogate: Kind = "linear"
    constant: Constant = "auto"
    max_kl: float = 0.1
    overwrite: bool = False


@dataclass
class _Layers:
    """An export, and what it is compared with."""

    export: dict[str, LowRank]
    others: dict[str, dict[str, LowRank]]
    constant: str  # what became of the constants, in words


def export(options: ExportOptions, out: Console) -> Report:
    """Export a trained adapter; the folder appears complete or not at all.

    Raises:
        ValueError: naming the option or YAML key, if something does not fit, or the export is further off than `max_kl`.
    """
    adapter, base = _inputs(options)
    cfg = configuration(options.config, adapter)
    model, tokenizer, _ = load_model_and_tokenizer(cfg=cfg, inference=True)
    model = cast(PeftModel, model).eval()
    config = cast(QTHAConfig, model.active_peft_config)
    texts = _text(options, cfg, config, tokenizer)
    make = partial(_pass, model, cfg, tokenizer)
    layers = _layers(options, make(texts.fit), _with_bias(model))
    tensors = _others(adapter)
    transposed = {name for name, layer in adapted_layers(model).items() if isinstance(layer.get_base_layer(), Conv1D)}
    with output_folder.folder_for(options.out) as folder:
        rank = max(len(layer.a) for layer in layers.export.values())
        if options.format == "lora":
            modules = [name for name, _ in model.get_base_model().named_modules()]
            lora = lowrank.write(layers.export, config, tensors, modules, bool(transposed), folder)
            layers.export = lowrank.read(folder)  # what is measured is what was written
            for limit in lowrank.limits(lora):
                out.print(f"vLLM and llama.cpp will not read this adapter: {limit}.", markup=False, highlight=False)
        measured = measure(make(texts.held_out), layers.export, layers.others)
        report = Report(
            *(options.format, "exact" if config.quantum == "none" else options.surrogate, layers.constant, rank, texts.source),
            *(calibration_text.tokens(texts.fit), measured),
        )
        out.print(module_table(report), model_table(report))
        _check_error(report, options.max_kl)
        if base is not None:
            done = merged.merge(layers.export, transposed, tensors, base, folder)
            tokenizer.save_pretrained(str(folder))
            out.print(
                f"{done.layers} of {len(layers.export)} layers changed; rounding to the checkpoint's dtype took at most "
                f"{done.rounding:.1%} of a layer's change."
            )
        report.write(folder)
        facts = facts_of(cfg, model_config=model.config)
        write_card(make_card(config, facts, adapted_sizes(model), options.format, report.as_dict()), folder)
    out.print(f"{options.out} written.", markup=False, highlight=False)
    return report


def _inputs(options: ExportOptions) -> tuple[Path, Path | None]:
    """Return the adapter's folder and, for merging, the base's; refuses what cannot work before anything is loaded."""
    if options.tokens < 1:
        raise refusal("--tokens", options.tokens, "is no number of tokens", "`--tokens 32768`")
    if not 0 < options.max_kl < math.inf:
        raise refusal("--max-kl", options.max_kl, "is no positive number of nats", "`--max-kl 0.1`")
    cfg = read_yaml(options.config)
    adapter = Path(options.lora_model_dir or cfg.lora_model_dir or cfg.output_dir)
    check_trained(adapter, cfg.base_model)
    local = Path(cfg.base_model)
    output_folder.check(options.out, options.overwrite, [adapter, *([local] if local.is_dir() else [])])
    base = merged.base_folder(cfg.base_model, cfg.revision_of_model) if options.format == "merged" else None
    if base is not None:
        _check_space(options.out, sum(file.stat().st_size for file in base.glob("*.safetensors")))
    return adapter, base


def _check_space(out: Path, needed: int) -> None:
    there = next(folder for folder in out.resolve().parents if folder.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise refusal("--out", str(out), f"has {free / 2**30:.1f} GiB free, of {needed / 2**30:.1f} needed", "another disk")


def _text(options: ExportOptions, cfg: DictDefault, config: QTHAConfig, tokenizer: Any) -> calibration_text.Text:
    """Return the text to fit to and to measure on."""
    if options.calibration:
        found, key = calibration_text.of_file(options.calibration, tokenizer, cfg.sequence_len, options.tokens), "--calibration"
    elif why := why_unread(cfg):
        raise ValueError(f"datasets: not read with {why}. What works: `--calibration FILE` with text like the adapter's.")
    else:
        meta = load_datasets(cfg=cfg)
        found, key = calibration_text.of_datasets(meta.train_dataset, meta.eval_dataset, options.tokens), "datasets"
    calibration_text.check(found, 1 if config.quantum == "none" else TOKENS_PER_RANK * (max(config.ranks) + 1), key)
    return found


def _pass(model: PeftModel, cfg: DictDefault, tokenizer: Any, sequences: list[calibration_text.Sequence]) -> Pass:
    batches = partial(calibration_text.batches, sequences, cfg.sequence_len, tokenizer.pad_token_id or 0)
    return Pass(cast(Any, model), adapters_of(model), batches, sum(1 for _ in batches()))


def _with_bias(model: PeftModel) -> set[str]:
    return {name for name, layer in adapted_layers(model).items() if getattr(layer.get_base_layer(), "bias", None) is not None}


def _layers(options: ExportOptions, run: Pass, with_bias: set[str]) -> _Layers:
    """Return the LoRAs of the export."""
    refuse_untrained(run.adapters.values(), options.lora_model_dir)
    if next(iter(run.adapters.values())).config.quantum == "none":
        return _Layers({name: exact(adapter) for name, adapter in run.adapters.items()}, {}, "none: the adapter is linear")
    moments, rows = collect(run)
    # vLLM and llama.cpp refuse adapters with biases, so one is written only if asked for; a merged model has its own
    biases = {"bias": set(run.adapters), "auto": set[str](), "drop": set[str]()}[options.constant]
    if options.format == "merged":
        biases = set() if options.constant == "drop" else with_bias
    rows = {} if options.constant == "drop" else {name: row for name, row in rows.items() if name not in biases}
    kept = biases | rows.keys()
    fitted = {name: linear(adapter, moments[name], name in kept) for name, adapter in run.adapters.items()}
    whole = {name: linear(adapter, moments[name], constant=True).low_rank() for name, adapter in run.adapters.items()}
    plain = {name: fit.low_rank(rows.get(name)) for name, fit in fitted.items()}
    others = {} if len(kept) == len(fitted) else {WITH_CONSTANTS: whole}
    if options.surrogate != "linear":
        others = {"linear": plain, **others}
    layers = plain
    if options.surrogate == "wide":
        layers = {name: fit.low_rank(rows.get(name)) for name, fit in wide(run, fitted, WIDE_MEMORY).items()}
    if options.surrogate == "distilled":
        layers = distilled(run, plain)
    words = f"of {len(fitted)} layers: {len(biases)} in a bias, {len(rows)} in a row of A, {len(fitted) - len(kept)} left out"
    return _Layers(layers, others, words)


def _check_error(report: Report, most: float) -> None:
    kl = report.measured.models["export"].kl
    if not kl <= most:
        raise ValueError(
            f"--max-kl: KL(QTHA || export) is {kl:.3g} nats per token, more than {most:g}; nothing was written. What works: "
            f"`--surrogate wide` or `distilled`, `--constant bias`, more `--tokens`, or `--max-kl {kl * 1.1:.2g}`."
        )


def _others(adapter: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file that are not of QTHA layers (modules_to_save), by their names there."""
    return {name: tensor for name, tensor in load_file(adapter / WEIGHTS).items() if "qtha_adapter" not in name}
