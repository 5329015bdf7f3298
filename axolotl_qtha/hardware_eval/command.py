"""`axolotl qtha-hardware-eval`, from the options to the files."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from axolotl.cli.utils.load import load_model_and_tokenizer
from axolotl.common.datasets import load_datasets
from axolotl.utils.dict import DictDefault
from peft import PeftModel
from rich.console import Console

from ..errors import refusal
from ..files.writable import refuse_taken
from ..ibm.cost import Cost
from ..ibm.engine import runner
from ..ibm.runner import Runner
from ..settings.meta_base import read_yaml
from ..settings.training_run import AdapterSettings, why_unread
from ..trained.adapter_folder import check_trained, configuration, refuse_untrained
from ..trained.calibration_text import IGNORED, Sequence, batches, rows, to_evaluate
from ..trained.passes import Pass, adapters_of
from ..tuner.config import QTHAConfig
from ..tuner.saving import WEIGHTS
from ..tuner.sizes import ansatz
from .evaluate import circuits_of, evaluate, evidence, facts, ways
from .report import JSON, Evaluation, model_table, packing, qubit_table

STARTED = "hardware_eval.started.json"

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationOptions:
    """The command's options."""

    config: Path
    samples: int = 8
    tokens: int | None = None
    out: Path | None = None
    lora_model_dir: Path | None = None
    overwrite: bool = False


def hardware_eval(options: EvaluationOptions, out: Console) -> Evaluation:
    """Evaluate a trained adapter on its device, beside exact, sampled and noisy simulations.

    Raises:
        ValueError: naming the option or YAML key, if something does not fit, or the cap does not allow the circuits.
        JobFailed: if the device fails; what was done is in the journal, and the same command goes on from there.
    """
    folder, adapter = _inputs(options)
    cfg = configuration(options.config, adapter)
    model, tokenizer, _ = load_model_and_tokenizer(cfg=cfg, inference=True)
    model = cast(PeftModel, model).eval()
    config = cast(QTHAConfig, model.active_peft_config)
    adapters = adapters_of(model)
    refuse_untrained(adapters.values(), options.lora_model_dir)
    sequences, source = _text(options, cfg)
    most = (cfg.eval_batch_size or cfg.micro_batch_size) * cfg.sequence_len
    make = partial(batches, sequences, most, tokenizer.pad_token_id or 0)
    run = Pass(cast(Any, model), adapters, make, sum(1 for _ in make()))
    assert config.ibm is not None
    device = runner(ansatz(config), config.ibm, config.simulation.seed)
    device.adapter = hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest()
    device.answered.clear()
    counts = circuits_of(run, options.tokens)
    before = _check_cost(options, device, counts, len(adapters), folder, out)
    try:
        found = evaluate(run, device, ways(device, config.simulation), options.tokens)
    finally:
        device.close()
    result = Evaluation(
        samples=len(sequences),
        tokens=sum(label != IGNORED for sequence in sequences for label in sequence.labels[1:]),
        circuits=sum(counts) * len(adapters),
        layers=len(adapters),
        text=source,
        limit=options.tokens,
        qpu_seconds=device.used() - before,
        facts=facts(device),
        ways=found,
        provenance=evidence(device),
    )
    result.write(folder)
    (folder / STARTED).unlink()
    out.print(qubit_table(result), model_table(result))
    if (text := packing(result)) is not None:
        out.print(text, markup=False, highlight=False)
    out.print(f"{folder / JSON} and the picture beside it written.", markup=False, highlight=False)
    return result


def _inputs(options: EvaluationOptions) -> tuple[Path, Path]:
    """Return where to write and the adapter's folder; refuses what cannot work before anything is loaded."""
    for name, value in (("--samples", options.samples), ("--tokens", options.tokens)):
        if value is not None and value < 1:
            raise refusal(name, value, "is too few", f"`{name} 8`")
    cfg = read_yaml(options.config)
    config = AdapterSettings.of(cfg).parsed
    if config.ibm is None:
        works = "`quantum_backend: ibm` with e.g. `ibm: {backend: fake:manila}`; the adapter may be trained on another one"
        raise refusal("quantum_backend", config.quantum_backend, "names no device to evaluate on", works)
    folder = options.out or Path(cfg.output_dir) / "hardware-eval"
    refuse_taken(folder, JSON, options.overwrite)
    adapter = Path(options.lora_model_dir or cfg.lora_model_dir or cfg.output_dir)
    check_trained(adapter, cfg.base_model)
    return folder, adapter


def _text(options: EvaluationOptions, cfg: DictDefault) -> tuple[list[Sequence], str]:
    """Return the first samples of the evaluation data, else of the training data, that have an answer."""
    if why := why_unread(cfg):
        raise ValueError(f"datasets: not read with {why}. What works: a YAML with `datasets:` of prompts and answers.")
    meta = load_datasets(cfg=cfg)
    data, source = to_evaluate(meta.train_dataset, meta.eval_dataset)
    taken: list[Sequence] = []
    for sequence in rows(data):
        if any(label != IGNORED for label in sequence.labels[1:]):
            taken.append(sequence)
        if len(taken) == options.samples:
            return taken, source
    works = f"`--samples {len(taken)}`" if taken else "data with answers (labels)"
    raise refusal("--samples", options.samples, f"is more than {source} has: {len(taken)} with an answer", works)


def _check_cost(options: EvaluationOptions, device: Runner, counts: list[int], layers: int, folder: Path, out: Console) -> float:
    """Print what it will cost, refuse it above the cap, and return what the journal had used when this evaluation began."""
    cost = sum((device.cost(count) for count in counts), Cost(0, 0, 0, 0.0)) * layers
    used = _used_before(options, device, folder)
    cap = device.options.max_qpu_seconds
    packed = f" of {device.isa.pack} blocks" if device.isa.pack > 1 else ""
    text = (
        f"ESTIMATED cost on {device.service.name}: {cost.circuits:,} circuits{packed} in "
        f"{cost.jobs:,} jobs ({layers} layers, "
        f"{len(counts)} batches), {cost.executions:,} executions, {cost.qpu_seconds:,.1f} QPU seconds by IBM's formula; "
    )
    if cap is None:
        text += "the device is simulated here, free of charge."
    else:
        text += f"max_qpu_seconds: {cap:g}, of which {used:,.1f} were used before."
    out.print(text, markup=False, highlight=False)
    if cap is not None and cost.qpu_seconds > (left := cap - used):
        raise refusal(
            "ibm.max_qpu_seconds",
            cap,
            f"leaves {max(left, 0):,.1f} s, and the evaluation needs about {cost.qpu_seconds:,.1f} s: "
            f"{cost.qpu_seconds - left:,.1f} s too many",
            "fewer --samples, fewer --tokens of each, fewer `shots`, or a larger cap; nothing was submitted",
        )
    if not device.service.local:
        LOG.warning("The device is a real one: this uses QPU time.")
    return used


def _used_before(options: EvaluationOptions, device: Runner, folder: Path) -> float:
    """Return the QPU seconds the journal had used when this evaluation began: one that was stopped has paid for a part."""
    what = repr((device.service.name, device.options.measurement(), options.samples, options.tokens, options.config.read_text()))
    digest, used = hashlib.blake2b(what.encode(), digest_size=16).hexdigest(), device.used()
    try:
        earlier = json.loads((folder / STARTED).read_text())
        if earlier["evaluation"] == digest:
            return float(earlier["used"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STARTED).write_text(json.dumps({"evaluation": digest, "used": used}))
    return used
