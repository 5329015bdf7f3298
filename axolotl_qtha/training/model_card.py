"""The model card that is written with an adapter or an export: the README.md of its folder, in Hugging Face's format.

It is composed of settings of `QTHAConfig` that are named here one by one and of `public_facts.Facts`, never of a dump of the
YAML.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..circuit.noise import is_own
from ..settings.public_facts import Facts, choice, code, plain
from ..trained.clients import Client, Exported, limits, unmergeable, vllm_rank
from ..tuner.arguments import IDLE
from ..tuner.choices import CORES
from ..tuner.config import QTHAConfig
from ..tuner.described import compared
from ..tuner.layer import adapted_sizes
from ..tuner.sizes import Size, adapter_shape, count_lora_parameters, count_parameters
from .card_circuit import drawn

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import Trainer

Kind = Literal["adapter", "lora", "merged"]
FILE = "README.md"
# Settings of the adapter that a card shows.
SETTINGS = (
    *("rank", "rank_pattern", "alpha", "alpha_pattern", "dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save", "share", "seed"),
)
CIRCUIT_SETTINGS = (
    *("circuit", "angle_scale", "init_angles", "gate_order", "quantum_backend", "shots", "noise_model"),
    *("depolarizing_1q", "depolarizing_2q", "readout_error", "precision", "gradient"),
)
FLIPS = "readout_error"  # two numbers in their order
FOLDER = "PATH/TO/THIS/FOLDER"

BRANCHES = {
    "qtha": "and a small simulated quantum circuit",
    "qwthn": "multiplied by a small simulated quantum circuit",
    "frozen": "and a small simulated quantum circuit, random and not trained,",
    "product": "and a small simulated quantum circuit without entangling gates",
    "silu": "and a small classical network in the place of the quantum circuit",
    "sine": "and a small classical network of sines in the place of the quantum circuit",
    "none": "without a quantum circuit",
}


def make_card(
    config: QTHAConfig,
    facts: Facts,
    sizes: Sequence[Size],
    kind: Kind = "adapter",
    measured: Mapping[str, Any] | None = None,
    lora: Exported | None = None,
) -> ModelCard:
    """Return the card of an adapter, or of what was exported from one.

    Args:
        config: of the QTHA adapter, with bond_dim and mid_dim settled.
        facts: of its training.
        sizes: (in_features, out_features) of every adapted layer.
        kind: what the folder holds: the adapter, a plain LoRA, or the base with an export merged in.
        measured: of an export: surrogate, constant, rank, text, fitted_tokens, predicted_tokens; by model (base, qtha, export)
            perplexity, kl_nats_per_token and top1_agreement (a share of 1); perplexity_gain_kept (a share of 1, or None).
        lora: of a plain LoRA: what decides which programs read it.
    """
    lora = lora or Exported(int((measured or {}).get("rank", config.rank)), whole=tuple(config.modules_to_save or ()))
    rank = lora.rank if kind == "lora" else config.rank
    sections = [
        _introduction(config, facts, kind),
        _export(measured) if measured and kind != "adapter" else "",
        _loading(config, facts, kind, lora),
        _parameters(config, sizes, kind, rank),
        _circuit(config, kind) if config.has_circuit else "",
        _training(config, facts),
        "## Licence\n\nNone is set: whoever publishes this chooses one, within the terms of the base model and of the data.",
        "## Framework versions\n\n" + "\n".join(f"- {name} {version}" for name, version in facts.versions.items()),
    ]
    text = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{_metadata(config, facts, kind).to_yaml()}\n---\n\n{text}\n")


def write_own_cards(trainer: Trainer, model: PeftModel, facts: Callable[[], Facts]) -> None:
    """Have PEFT and the trainer write this project's card where they would write their own, which hold the YAML or local paths.

    PEFT's comes with every adapter that is saved, the trainer's at the end and with every push to the Hub.

    Args:
        trainer: of the run.
        model: that it trains.
        facts: what may be told of the run, as it stands when a card is written.
    """

    def card() -> ModelCard:
        return make_card(cast(QTHAConfig, model.active_peft_config), facts(), adapted_sizes(model))

    def write(folder: str, *_: Any) -> None:
        write_card(card(), folder)

    def write_in_output_dir(*_: Any, **__: Any) -> None:
        if trainer.is_world_process_zero():
            write(str(trainer.args.output_dir))

    if trainer.is_world_process_zero():
        card()  # what could go wrong with it does so before the first step
    model.create_or_update_model_card = write  # type: ignore[method-assign, assignment]
    trainer.create_model_card = write_in_output_dir  # type: ignore[method-assign]


def write_card(card: ModelCard, folder: str | os.PathLike[str]) -> None:
    """Write the folder's README.md, all of it at once."""
    scratch = Path(folder, f".{FILE}-{os.getpid()}")
    try:
        card.save(scratch)
        os.replace(scratch, Path(folder, FILE))
    finally:
        scratch.unlink(missing_ok=True)


def _metadata(config: QTHAConfig, facts: Facts, kind: Kind) -> ModelCardData:
    on_hub = facts.base.place == "hub"
    tags = [
        "qtha",
        "axolotl",
        "tensor-network",
        *(["quantum-machine-learning"] if config.has_circuit and kind == "adapter" else []),
    ]
    tags += ["lora"] if kind == "lora" else []
    tags += [f"base_model:adapter:{facts.base.name}"] if on_hub and kind != "merged" else []
    return ModelCardData(
        base_model=facts.base.name if on_hub else None,
        datasets=[data.name for data in facts.datasets if data.place == "hub"] or None,
        library_name="transformers" if kind == "merged" else "peft",
        pipeline_tag="text-generation" if config.task_type == "CAUSAL_LM" else None,
        tags=tags,
    )


def _introduction(config: QTHAConfig, facts: Facts, kind: Kind) -> str:
    networks = "two tensor networks (matrix product operators)" if config.mpo == "tt" else "two matrices"
    method = (
        "[QTHA](https://arxiv.org/abs/2503.12790) (Quantum Tensor Hybrid Adaptation) adapter: "
        f"{networks} {BRANCHES[config.quantum]} beside each adapted linear layer, which stays frozen."
    )
    name = facts.base.name or "a local model"
    title, what = {
        "adapter": (f"QTHA adapter of {name}", f"A {method}"),
        "lora": (f"LoRA of {name}, exported from a QTHA adapter", f"A plain LoRA adapter that stands in for a {method}"),
        "merged": (f"{name} with a QTHA adapter merged in", f"A model with a stand-in merged into its weights for a {method}"),
    }[kind]
    return f"# {title}\n\n{what}\n\nBase model: {facts.base}."


def _export(measured: Mapping[str, Any]) -> str:
    perplexity, kl, same = (measured[key] for key in ("perplexity", "kl_nats_per_token", "top1_agreement"))
    head = ("model", "perplexity", "KL(QTHA, model)", "same first choice as QTHA")
    rows = [
        (name, f"{perplexity[key]:,.3f}", f"{kl[key]:.3g}", f"{same[key]:.1%}")
        for key, name in (("base", "base"), ("qtha", "base with the QTHA adapter"), ("export", "this export"))
    ]
    kept = measured["perplexity_gain_kept"]
    verdict = "The adapter did not lower the perplexity of this text: there is no gain to keep."
    if kept is not None:
        verdict = f"The export keeps {kept:.1%} of the perplexity that the adapter gained over the base."
    surrogate = choice(measured["surrogate"], ("exact", "linear", "wide", "distilled"))
    return (
        f"## Exported from a QTHA adapter\n\nSurrogate: `{surrogate}`, fitted to {measured['fitted_tokens']:,} tokens. Constants "
        f"of the fit: {plain(measured['constant'])}. Measured on {measured['predicted_tokens']:,} held-out tokens of "
        f"{plain(measured['text'])}; KL in nats per token.\n\n{_table(head, rows)}\n\n{verdict}"
    )


def _loading(config: QTHAConfig, facts: Facts, kind: Kind, lora: Exported) -> str:
    base = facts.base.loadable
    opened = f'"{FOLDER}"' if kind == "merged" else f'"{base}"{_overridden(lora)}'
    load = f"AutoModelForCausalLM.from_pretrained({opened})"
    peft = f'model = PeftModel.from_pretrained({load}, "{FOLDER}")'
    if kind == "lora" and lora.vocabulary is not None:  # without its size first, PEFT finds tensors that do not fit
        peft = (
            f'base = {load}\nbase.resize_token_embeddings({lora.vocabulary})\nmodel = PeftModel.from_pretrained(base, "{FOLDER}")'
        )
    imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM"
    settings = {"base_model": base, "plugins": ["axolotl_qtha.QTHAPlugin"], "adapter": "qtha", "lora_model_dir": FOLDER}
    if kind == "adapter":
        return (
            "## How to load\n\nWith PEFT and the Python package `axolotl_qtha`:\n\n"
            + _block("python", f"import axolotl_qtha  # makes the method known to PEFT\n{imports}\n\n{peft}")
            + "\n\nWith [Axolotl](https://github.com/axolotl-ai-cloud/axolotl), in the YAML of a training or evaluation:\n\n"
            + _block("yaml", _yaml(settings | {"qtha": shown(config)}))
            + "\n\nOther programs (vLLM, llama.cpp, lm_eval) do not know the method, and stop with `KeyError: 'QTHA'` or "
            "`'lora_alpha'`. For them, export it as a plain LoRA or a merged model first:\n\n"
            + _block("bash", f"axolotl qtha-export CONFIG.yml --lora-model-dir {FOLDER} --out PATH/TO/EXPORT")
        )
    if kind == "merged":
        text = "## How to load\n\nWith transformers; `axolotl_qtha` is not needed:\n\n"
        text += _block("python", f"from transformers import AutoModelForCausalLM\n\nmodel = {load}")
        text += f"\n\nWith vLLM:\n\n{_block('bash', f'vllm serve {FOLDER}')}"
    else:
        code = f"{imports}\n\n{peft}"
        text = f"## How to load\n\nWith PEFT; `axolotl_qtha` is not needed:\n\n{_block('python', code)}"
        text += _others(base, lora)
    return f"{text}\n\nSettings of the QTHA adapter it was exported from:\n\n{_block('yaml', _yaml({'qtha': shown(config)}))}"


def _overridden(lora: Exported) -> str:
    """Return the arguments with which the base is opened as it was trained on; none that may be a path."""
    shown = {key: value for key, value in lora.overrides.items() if "/" not in f"{key}{value}" and key.isidentifier()}
    return "".join(f", {key}={value!r}" for key, value in shown.items())


def _others(base: str, lora: Exported) -> str:
    """Return how other programs than PEFT read a plain LoRA, or why they do not."""
    most = vllm_rank(lora.rank)
    serve = f"vllm serve {base} --enable-lora --lora-modules qtha={FOLDER}" + (f" --max-lora-rank {most}" if most else "")
    lines: dict[Client, str] = {
        "vLLM": serve,
        "llama.cpp": f"python convert_lora_to_gguf.py {FOLDER} --base PATH/TO/BASE --outfile qtha.gguf",
    }
    text, overrides = "", {plain(key): value for key, value in lora.overrides.items()}
    whole, head = tuple(map(plain, lora.whole)), lora.head and plain(lora.head)
    lora = dataclasses.replace(lora, whole=whole, head=head, overrides=overrides)  # the reasons below name them
    for client, line in lines.items():
        if found := limits(client, lora):
            text += f"\n\n{client} does not read it: {'; '.join(found)}."
        else:
            text += f"\n\nWith {client}:\n\n{_block('bash', line)}"
    if why := unmergeable(lora):
        text += f"\n\nPEFT runs it but cannot merge it: {why}."
    return text


def shown(config: QTHAConfig) -> dict[str, Any]:
    """Return the settings of the adapter that a card shows, as the `qtha:` block has them."""
    keys = [*SETTINGS, "mpo", *((*CORES, "num_cores", "init") if config.mpo == "tt" else ()), "core_gain", "quantum"]
    keys += ["qubits", "circuit_layers"] if config.quantum != "none" else []
    keys += CIRCUIT_SETTINGS if config.has_circuit else ()
    keys = [key for key in keys if config.quantum not in IDLE.get(key, ())]
    saved = config.to_dict()  # which names no device: whoever loads it has another account, or none
    values = {key: saved[key] for key in keys}
    if is_own(config.noise_model):
        del values["noise_model"]
    names = {key: sorted(value) for key, value in values.items() if isinstance(value, (set, list, tuple)) and key != FLIPS}
    values |= names
    return {key: value for key, value in values.items() if value is not None and not _has_path(value)}


def _has_path(value: Any) -> bool:
    return any("/" in str(item) for item in (value if isinstance(value, list) else [value]))


def _parameters(config: QTHAConfig, sizes: Sequence[Size], kind: Kind, rank: int) -> str:
    ours, lora = count_parameters(config, sizes), count_lora_parameters(config.rank, sizes)
    also = " with the same rank_pattern" if config.rank_pattern else ""
    rows = [
        ("this adapter" if kind == "adapter" else "the QTHA adapter", f"{ours:,}"),
        (f"LoRA of rank {config.rank}{also} on the same {len(sizes)} layers", f"{lora:,}"),
    ]
    if kind == "lora":
        rows.append((f"this LoRA, rank {rank}", f"{count_lora_parameters(rank, [size[:2] for size in sizes]):,}"))
    text = f"QTHA trains {compared(ours, lora)} than LoRA of the same rank."
    if config.has_circuit and (angles := sum(adapter_shape(config, *size).parts.get("branch", 0) for size in sizes)):
        text += f" {angles:,} of its parameters are angles of the circuits."
    if config.modules_to_save:
        text += f" Not counted are modules trained in full: {', '.join(map(code, sorted(config.modules_to_save)))}."
    return f"## Trainable parameters\n\n{_table(('', 'parameters'), rows)}\n\n{text}"


def _circuit(config: QTHAConfig, kind: Kind) -> str:
    said, drawing = drawn(config)
    return f"## Circuit{'' if kind == 'adapter' else ' of the QTHA adapter'}\n\n{said}\n\n{_block('text', drawing)}"


def _circuits(config: QTHAConfig) -> str | None:
    """Return what ran the circuits of a training that the settings above do not tell; neither account, instance nor module."""
    if is_own(config.noise_model):
        return "simulated with a noise model of its own, which is not published"
    if (ibm := config.ibm) is None:
        return None
    some = f"{ibm.tokens_per_step} tokens of each forward pass on {code(ibm.backend)}, {ibm.executions:,} shots"
    return f"{some}, gradient by {ibm.gradient}; the others simulated exactly"


def _training(config: QTHAConfig, facts: Facts) -> str:
    rows = {
        "data": ", ".join(map(str, facts.datasets)) or None,
        "evaluated on": ", ".join(map(str, facts.evaluated_on)) or None,
        "method": facts.method,
        "base quantised to": facts.quantisation,
        "precision": facts.precision,
        "sequence length": facts.sequence_length,
        "sequences per step": facts.batch,
        "optimiser": facts.optimizer,
        "learning rate": facts.learning_rate,
        "learning rate of the circuit": facts.circuit_lr,
        "schedule": facts.scheduler,
        "circuits": _circuits(config),
        "seed": facts.seed,
        "steps": facts.steps,
        "epochs": facts.epochs and round(facts.epochs, 4),
        "last training loss": facts.train_loss and round(facts.train_loss, 4),
        f"evaluation loss at step {facts.eval_step}": facts.eval_loss and round(facts.eval_loss, 4),
        "best step, loaded at the end": facts.best_step,
    }
    return "## Training\n\n" + _table(("", "value"), [(key, f"{value}") for key, value in rows.items() if value is not None])


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---", *("---:" for _ in head[1:])), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _block(language: str, text: str) -> str:
    """Return text between fences; what would end it within gets longer ones around."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, width=100, default_flow_style=None)
