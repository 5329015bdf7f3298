"""`axolotl qtha-diagnose`, from the options to the files."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from axolotl.cli.utils.load import load_model_and_tokenizer
from axolotl.common.datasets import load_datasets
from axolotl.utils.dict import DictDefault
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..circuit.ansatz import MAX_QUBITS, Ansatz
from ..errors import refusal
from ..files.writable import refuse_taken, why_unwritable
from ..settings.meta_base import read_yaml
from ..settings.training_run import AdapterSettings, why_unread
from ..trained.adapter_folder import check_trained, configuration, refuse_untrained
from ..trained.calibration_text import Sequence, batches, rows, to_evaluate, tokens
from ..trained.passes import Pass, Tokens, adapters_of
from ..tuner.adapter import QTHAAdapter
from ..tuner.bottleneck import Circuit, bounded
from ..tuner.config import QTHAConfig
from ..tuner.running import SIMULATION_KEYS
from ..tuner.sizes import ansatz
from .figure import draw
from .report import JSON, PICTURES, Diagnosis, slope_lines, study_table, trained_table
from .study import Encode, Study, sized, slopes, study
from .trained import FEWEST, TrainedCircuit, trained_circuit

TEXT = 8  # times as many tokens are read as are looked at in a layer


@dataclass(frozen=True)
class DiagnosisOptions:
    """The command's options."""

    config: Path
    lora_model_dir: Path | None = None
    qubits: str = "4,6,8,10"
    circuit_layers: str = "1,2,4"
    initialisations: int = 200
    pairs: int = 2000
    tokens: int = 128
    modules: int = 16
    seed: int = 0
    out: Path | None = None
    overwrite: bool = False


def diagnose(options: DiagnosisOptions, out: Console) -> Diagnosis:
    """Diagnose a configuration's circuit at initialisation and, with a trained adapter, on the data's own z.

    Raises:
        ValueError: naming the option or YAML key, if something does not fit.
    """
    config, folder, qubits, layers = _inputs(options)
    circuit = ansatz(config)
    sizes = {(n, m): None for m in layers for n in qubits} | {(config.circuit_qubits, config.circuit_layers): None}
    make = partial(
        study,
        encode=_encoding(config),
        initialisations=options.initialisations,
        pairs=options.pairs,
        seed=options.seed,
        most=config.init_angles,
    )
    steps = track([(sized(config, *size), size[1]) for size in sizes], "at initialisation", transient=True, console=out)
    studies: list[Study] = [make(each, layers=m) for each, m in steps]
    trained, text = _trained(options, out) if options.lora_model_dir else ([], None)
    start = {"angle_scale": config.angle_scale, "init_angles": config.init_angles}
    found = Diagnosis(
        circuit={**_facts(config, circuit), **start, "blocks": config.blocks},
        options={
            **{each.name: getattr(options, each.name) for each in dataclasses.fields(options) if each.type == "int"},
            **{"qubits": qubits, "circuit_layers": layers},
        },
        studies=studies,
        slopes=slopes(studies, qubits),
        trained=trained,
        text=text,
    )
    folder.mkdir(parents=True, exist_ok=True)
    draw(found, [folder / name for name in PICTURES])
    found.write(folder)
    out.print(study_table(found))
    for line in slope_lines(found.slopes):
        out.print(line, markup=False, highlight=False)
    if trained:
        out.print(trained_table(found))
    out.print(f"{folder / JSON}, {' and '.join(PICTURES)} written.", markup=False, highlight=False, soft_wrap=True)
    return found


def _facts(config: QTHAConfig, circuit: Ansatz) -> dict[str, Any]:
    own = {"circuit": config.circuit, "observables": circuit.described().observables} if config.circuit else {}
    order = {} if config.circuit else {"gate_order": config.gate_order}
    return {"qubits": circuit.qubits, "layers": config.circuit_layers, **order, **own, "angles": math.prod(circuit.angle_shape)}


def _encoding(config: QTHAConfig) -> Encode:
    """Return how an adapter's z becomes angles at the start: a learned scale is 1 then."""
    return bounded if config.angle_scale == "tanh" else lambda z: z


def _inputs(options: DiagnosisOptions) -> tuple[QTHAConfig, Path, list[int], list[int]]:
    """Return the adapter's configuration, where to write, and the sizes; refuses what cannot work before anything is loaded."""
    for name, value, least in (
        ("--initialisations", options.initialisations, 2),
        ("--pairs", options.pairs, 100),
        ("--tokens", options.tokens, FEWEST),
        ("--modules", options.modules, 1),
        ("--seed", options.seed, 0),
    ):
        if value < least:
            raise refusal(name, value, f"is below {least}", f"`{name} {max(least, getattr(DiagnosisOptions, name[2:]))}`")
    qubits = _numbers("--qubits", options.qubits, 1, MAX_QUBITS, DiagnosisOptions.qubits)
    layers = _numbers("--circuit-layers", options.circuit_layers, 1, 64, DiagnosisOptions.circuit_layers)
    cfg = read_yaml(options.config)
    config = AdapterSettings.of(cfg).parsed
    if not config.has_circuit:
        raise refusal("quantum", config.quantum, "runs no circuit", "`quantum: qtha`, `frozen` or `qwthn`")
    folder = options.out or Path(cfg.output_dir) / "diagnose"
    refuse_taken(folder, JSON, options.overwrite)
    if why := why_unwritable(folder):
        raise refusal("--out", str(folder), why, "a folder on a disk that can be written to")
    if options.lora_model_dir:
        check_trained(options.lora_model_dir, cfg.base_model)
        if why := why_unread(cfg):
            raise ValueError(f"datasets: not read with {why}. What works: a YAML with `datasets:`, or no --lora-model-dir.")
    return config, folder, qubits, layers


def _numbers(option: str, text: str, least: int, most: int, works: str) -> list[int]:
    """Return the numbers of a list with commas, ascending."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise refusal(option, text, "is no list of whole numbers", f"`{option} {works}`") from None
    if found[0] < least or found[-1] > most:
        raise refusal(option, text, f"is not between {least} and {most}", f"`{option} {works}`")
    return found


def _trained(options: DiagnosisOptions, out: Console) -> tuple[list[TrainedCircuit], str]:
    """Return the trained circuits on the data's z, and where the data is from."""
    assert options.lora_model_dir is not None
    cfg = configuration(options.config, options.lora_model_dir)
    # z is read with exact circuits, whatever the YAML says: nothing is submitted to a device
    cfg.qtha = {key: value for key, value in cfg.qtha.items() if key not in SIMULATION_KEYS}
    model, tokenizer, _ = load_model_and_tokenizer(cfg=cfg, inference=True)
    model = cast(PeftModel, model).eval()
    adapters = adapters_of(model)
    refuse_untrained(adapters.values(), options.lora_model_dir)
    sequences, source = _text(options, cfg)
    make = partial(
        batches, sequences, (cfg.eval_batch_size or cfg.micro_batch_size) * cfg.sequence_len, tokenizer.pad_token_id or 0
    )
    run = Pass(cast(Any, model), adapters, make, sum(1 for _ in make()))
    chosen = _spread_out(list(adapters), options.modules)
    seen: dict[str, list[Tensor]] = {name: [] for name in chosen}
    run.observe(lambda name, passed: _keep(seen[name], passed), "reading z", chosen)
    found: list[TrainedCircuit] = []
    for name in track(chosen, "trained circuits", transient=True, console=out):
        z = torch.cat(seen[name]) if seen[name] else torch.zeros(0)
        if len(z) < FEWEST:  # an expert that the data hardly reaches
            out.print(f"{name}: {len(z)} tokens passed, too few to say anything.", markup=False, highlight=False)
            continue
        some = torch.randperm(len(z), generator=torch.Generator().manual_seed(options.seed))[: options.tokens]
        found += _circuits(name, adapters[name], z[some], options)
    return found, source


def _keep(kept: list[Tensor], passed: Tokens) -> None:
    kept.append(passed.z.detach().cpu())


def _spread_out(names: list[str], most: int) -> list[str]:
    """Return at most so many names, evenly from first to last.

    >>> _spread_out(["a", "b", "c", "d", "e"], 3)
    ['a', 'c', 'e']
    """
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / max(1, most - 1))] for i in range(most)]


@torch.no_grad()
def _circuits(name: str, adapter: QTHAAdapter, z: Tensor, options: DiagnosisOptions) -> list[TrainedCircuit]:
    """Return an adapter's circuits on z (tokens, r), as it encodes it."""
    branch = cast(Circuit, adapter.bottleneck().branch)
    encoded, blocks = branch.encode(z.to(branch.angles)), z.shape[1] // branch.ansatz.width
    parts = enumerate(zip(encoded.chunk(blocks, dim=1), branch.angles.chunk(blocks, dim=1), strict=True))
    fixed = branch.ansatz, options.pairs, options.seed
    return [trained_circuit(name, block, own, angles, *fixed) for block, (own, angles) in parts]


def _text(options: DiagnosisOptions, cfg: DictDefault) -> tuple[list[Sequence], str]:
    """Return the first sequences of the evaluation data, else of the training data, with enough tokens."""
    meta = load_datasets(cfg=cfg)
    data, source = to_evaluate(meta.train_dataset, meta.eval_dataset)
    taken: list[Sequence] = []
    for sequence in rows(data):
        taken.append(sequence)
        if tokens(taken) >= TEXT * options.tokens:
            break
    if (there := tokens(taken)) < options.tokens:
        raise refusal("--tokens", options.tokens, f"is more than {source} has: {there}", f"`--tokens {max(there, FEWEST)}`")
    return taken, source
