"""`axolotl qtha-export`, from the options to the folder."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from axolotl.cli.utils.load import load_model_and_tokenizer
from axolotl.common.datasets import load_datasets
from axolotl.utils.dict import DictDefault
from peft import PeftModel
from rich.console import Console
from transformers.pytorch_utils import Conv1D

from ..errors import refusal
from ..settings.meta_base import base_config, read_yaml
from ..settings.public_facts import Facts, facts_of
from ..settings.training_run import why_unread
from ..trained import calibration_text
from ..trained.adapter_folder import check_trained, configuration, refuse_untrained
from ..trained.clients import Exported, told
from ..trained.passes import Pass, adapters_of
from ..training.model_card import make_card, write_card
from ..tuner.config import QTHAConfig
from ..tuner.layer import adapted_layers, adapted_sizes
from . import lowrank, merged, output_folder, written
from .beside import copy_beside, settle_config, write_tokenizer
from .distil import distilled
from .fit import collect, exact, linear, wide
from .lowrank import LowRank
from .measure import KEPT, WITH_CONSTANTS, Kept, measure
from .report import Report, model_table, module_table, written_line
from .surrogate import Kind
from .whole import Whole, whole_of
from .written import Opener, Written

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
        ValueError: naming the option or YAML key, if something does not fit, the export is further off than `max_kl`, or its
            folder does not hold what was measured.
    """
    options = dataclasses.replace(options, out=options.out.resolve())
    adapter, base = _inputs(options)
    cfg = configuration(options.config, adapter)
    works = "another disk" + ("" if options.format == "lora" else ", or a smaller export: `--format lora`")
    with output_folder.folder_for(options.out, works) as folder:
        fitted = _fit(options, cfg, base, out)
        written.release()  # the model that was measured is gone
        report = fitted.report
        if fitted.plan is None:
            fitted.write_lora(folder)
        else:
            copy_beside(fitted.plan.base, folder)
            done = merged.merge(fitted.layers, fitted.transposed, fitted.plan, folder)
            settle_config(folder, fitted.whole, fitted.opener.tied, fitted.opener.overrides)
            out.print(
                f"{done.layers} of {len(fitted.layers)} layers changed; rounding to the checkpoint's dtype took at most "
                f"{done.rounding:.1%} of a layer's change."
            )
        write_tokenizer(fitted.tokenizer, fitted.opener.base, folder, **fitted.opener.source)
        if cfg.quantize_moe_experts:
            _say(out, "Not opened again: only Axolotl quantises experts as it loads them (quantize_moe_experts).")
        else:
            report.written = _opened(fitted, folder)
            _say(out, written_line(report.written))
            half = fitted.plan is not None and fitted.plan.half
            written.check(report.written, torch.bfloat16 if half else fitted.opener.dtype, options.format)
        report.write(folder)
        card = make_card(fitted.config, fitted.facts, fitted.sizes, options.format, report.as_dict(), fitted.lora)
        write_card(card, folder)
    _say(out, f"{options.out} written.")
    return report


def _say(out: Console, text: str) -> None:
    out.print(text, markup=False, highlight=False)


@dataclass
class _Fitted:
    """An export that was measured, and what it takes to write it; holds no model."""

    report: Report
    layers: dict[str, LowRank]
    whole: Whole
    plan: merged.Plan | None  # of a merged model
    transposed: set[str]
    modules: list[str]  # names of all of the base's
    config: QTHAConfig
    sizes: list[Any]  # of the adapted layers
    lora: Exported
    facts: Facts
    tokenizer: Any
    opener: Opener
    kept: Kept

    def write_lora(self, folder: Path) -> None:
        """Write it as a LoRA adapter."""
        lowrank.write(self.layers, self.config, self.whole, self.modules, bool(self.transposed), folder)


def _fit(options: ExportOptions, cfg: DictDefault, base: Path | None, out: Console) -> _Fitted:
    """Load the model, refuse or tell what cannot be read, and only then fit and measure."""
    model, tokenizer, _ = load_model_and_tokenizer(cfg=cfg, inference=True)
    model = cast(PeftModel, model).eval()
    config = cast(QTHAConfig, model.active_peft_config)
    base_as_stored = base_config(cfg)  # the model's may have another vocabulary
    rows = getattr(base_as_stored.get_text_config(), "vocab_size", None)
    adapted, sizes = adapted_layers(model), adapted_sizes(model)
    whole = whole_of(model, rows, adapted)
    opener = _opener(model, cfg, base_as_stored, whole.vocabulary)
    transposed = {name for name, layer in adapted.items() if isinstance(layer.get_base_layer(), Conv1D)}
    modules = [name for name, _ in model.get_base_model().named_modules()]
    plan = None
    if base is not None:
        prefix = getattr(model.get_base_model(), "base_model_prefix", "")
        plan = merged.plan(dict(zip(adapted, sizes, strict=True)), transposed, whole, base, modules, prefix)
    lora = Exported(
        rank=config.rank,
        bias=options.constant == "bias" and config.quantum != "none",
        whole=tuple(config.modules_to_save or ()),
        vocabulary=whole.vocabulary,
        head=whole.head if whole.head in adapted else None,
        tied=whole.base_tied,
        model_type=model.config.model_type,
        overrides=opener.overrides,
    )
    if options.format == "lora":
        for limit, clients in told(lora).items():
            _say(out, f"{' and '.join(clients)} will not read this adapter: {limit}.")
    most = max(1, KEPT // (4 * (whole.vocabulary or rows or 2**18)))
    texts = _text(options, cfg, config, tokenizer)
    make = partial(_pass, model, cfg, tokenizer)
    biases = {name for name in _with_bias(model) if plan is None or plan.has(f"{name}.bias")}
    layers = _layers(options, make(texts.fit), biases)
    lora = dataclasses.replace(lora, rank=max(len(layer.a) for layer in layers.export.values()))
    kept = Kept()
    measured = measure(make(calibration_text.predicting(texts.held_out, most)), layers.export, layers.others, kept)
    report = Report(
        *(options.format, "exact" if config.quantum == "none" else options.surrogate, layers.constant, lora.rank, texts.source),
        *(calibration_text.tokens(texts.fit), measured),
    )
    out.print(module_table(report), model_table(report))
    _check_error(report, options.max_kl)
    return _Fitted(
        report=report,
        layers=layers.export,
        whole=whole,
        plan=plan,
        transposed=transposed,
        modules=modules,
        config=config,
        sizes=sizes,
        lora=lora,
        facts=facts_of(cfg, model_config=model.config),
        tokenizer=tokenizer,
        opener=opener,
        kept=kept,
    )


def _opener(model: PeftModel, cfg: DictDefault, config: Any, vocabulary: int | None) -> Opener:
    base = model.get_base_model()
    source = {"revision": cfg.revision_of_model, "trust_remote_code": cfg.trust_remote_code}
    stored = getattr(config, "quantization_config", None)  # then transformers sees to it
    return Opener(
        cls=type(base),
        base=cfg.base_model,
        source={key: value for key, value in source.items() if value},
        dtype=cfg.torch_dtype,
        overrides=dict(cfg.overrides_of_model_config or {}),
        quantization=None if stored else getattr(base.config, "quantization_config", None),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        vocabulary=vocabulary,
    )


def _opened(fitted: _Fitted, folder: Path) -> Written:
    """Return what the folder gives, opened as who gets it opens it."""
    if fitted.plan is None:
        with written.opened(lambda: fitted.opener.lora(folder)) as model:
            return written.compare(model, fitted.kept, "the base with it")
    if fitted.opener.quantised:  # what is written is not: compared with the export beside the full-precision base
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            fitted.write_lora(Path(scratch))
            with written.opened(lambda: fitted.opener.full().lora(Path(scratch))) as model:
                written.rebased(model, fitted.kept)
    with written.opened(lambda: fitted.opener.merged(folder)) as model:
        return written.compare(model, fitted.kept, "the merged model")


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
        works = "another disk, or a smaller export: `--format lora`"
        raise refusal("--out", str(out), f"has {_size(free)} free, of {_size(needed)} needed", works)


def _size(count: int) -> str:
    """Return a number of bytes as it is read best.

    >>> [_size(count) for count in (0, 2_000, 5_000_000, 7_000_000_000)]
    ['0.0 KiB', '2.0 KiB', '4.8 MiB', '6.5 GiB']
    """
    unit, name = next(((unit, name) for unit, name in ((2**30, "GiB"), (2**20, "MiB")) if count >= unit), (2**10, "KiB"))
    return f"{count / unit:,.1f} {name}"


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
