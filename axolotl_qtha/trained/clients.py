"""What other programs read of an export: PEFT, vLLM, and llama.cpp's converter of LoRA adapters.

Their rules stand here and nowhere else; `tests/clients/` holds them against the programs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Client = Literal["PEFT", "vLLM", "llama.cpp"]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
VLLM_DEFAULT_RANK = 16
VLLM_HEADS = ("llama", "qwen3", "qwen3_moe", "mixtral", "granite")  # whose head it lets have a LoRA (`embedding_modules`)
VLLM_WITHOUT = ("gpt2", "gptj", "bloom", "falcon", "stablelm")  # which it lets have none
MERGED = "`--format merged` holds them"


@dataclass(frozen=True)
class Exported:
    """What a plain LoRA adapter consists of, as far as it matters to who reads it."""

    rank: int
    bias: bool = False  # lora_bias
    whole: tuple[str, ...] = ()  # modules trained in full (modules_to_save)
    vocabulary: int | None = None  # rows of the embeddings, where they are not as many as the base's
    head: str | None = None  # name of the head, where it has a LoRA
    tied: bool = False  # whether the base's head is its embedding
    model_type: str | None = None  # of the base, as transformers names it
    overrides: dict[str, Any] = field(default_factory=dict)  # of the base's configuration (overrides_of_model_config)


def limits(client: Client, lora: Exported) -> list[str]:
    """Return why a client does not read an adapter, or not without more, in words; empty if it does.

    PEFT 0.20, vLLM 0.32 (`lora/peft_helper.py`, `lora/lora_model.py`), llama.cpp's `convert_lora_to_gguf.py`.

    >>> limits("vLLM", Exported(rank=8))
    []
    >>> limits("llama.cpp", Exported(rank=8, bias=True))
    ['it has biases (lora_bias), which only PEFT reads: `--constant auto` writes none']
    """
    if client == "PEFT":
        return []
    found = []
    if lora.bias:
        found.append("it has biases (lora_bias), which only PEFT reads: `--constant auto` writes none")
    if lora.whole:
        found.append(f"it has whole modules (modules_to_save: {sorted(lora.whole)}): {MERGED}")
    if lora.vocabulary is not None:
        found.append(f"its embeddings have {lora.vocabulary:,} rows, which are not the base's: {MERGED}")
    if lora.overrides:
        found.append(f"its base is not as its files have it (overrides_of_model_config: {sorted(lora.overrides)}): {MERGED}")
    if client == "vLLM":
        if lora.head and lora.model_type not in VLLM_HEADS:
            found.append(f"{lora.head} has a LoRA, which vLLM reads for few models ({', '.join(VLLM_HEADS)}): `--format merged`")
        if lora.rank > VLLM_RANKS[-1]:
            found.append(f"its rank is {lora.rank}, more than {VLLM_RANKS[-1]}: `--format merged`")
        if lora.model_type in VLLM_WITHOUT:
            found.append(f"vLLM has no LoRA for {lora.model_type}: `--format merged`")
    elif lora.head and lora.tied:
        found.append(f"{lora.head} has a LoRA, and its weight is the embedding too: `--format merged` unties them")
    return found


def told(lora: Exported) -> dict[str, list[Client]]:
    """Return what keeps programs other than PEFT from reading an adapter, with their names."""
    found: dict[str, list[Client]] = {}
    for client in ("vLLM", "llama.cpp"):
        for limit in limits(client, lora):
            found.setdefault(limit, []).append(client)
    return found


def unmergeable(lora: Exported) -> str | None:
    """Return why PEFT's `merge_and_unload` does not give the adapter's model, in words; None if it does."""
    if lora.bias:
        return "the base's layers have no biases to merge its biases into"
    if lora.head and lora.tied:
        return f"merging into {lora.head} would change the embedding too, which is the same tensor"
    return None


def vllm_rank(rank: int) -> int | None:
    """Return the `--max-lora-rank` that vLLM needs for a rank; None if its default does."""
    return None if rank <= VLLM_DEFAULT_RANK else next((most for most in VLLM_RANKS if most >= rank), None)
