"""Small bases of many architectures: a folder with a config.json, and the YAML of a run on it."""

import yaml
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GlmConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from axolotl_qtha.settings.training_run import TrainingRun, read_run

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 192,
    "intermediate_size": 448,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# GPT-2 without dropout in the attention, with which torch's CPU kernel keeps all attention weights
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=64),
    "mistral": MistralConfig(**SIZES, sliding_window=64),
    "gemma": GemmaConfig(**SIZES, head_dim=48),
    "phi": PhiConfig(**SIZES),
    "gpt2": GPT2Config(vocab_size=1000, n_embd=192, n_inner=448, n_layer=3, n_head=6, n_positions=512, attn_pdrop=0.0),
    "glm": GlmConfig(**SIZES, head_dim=32),
}
# Mixtral's experts are no linear layers, and their kernel takes no float32 without values
MORE = {"gemma2": Gemma2Config(**SIZES, head_dim=32), "mixtral": MixtralConfig(**SIZES, num_local_experts=4)}
RUN = {
    "plugins": ["axolotl_qtha.QTHAPlugin"],
    "adapter": "qtha",
    "qtha": {"rank": 4, "param_budget": 0.5},
    "datasets": [{"path": "data.jsonl", "type": "alpaca"}],
    "sequence_len": 128,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "optimizer": "adamw_torch",
    "bf16": False,
    "fp16": False,
    "attn_implementation": "sdpa",
    "output_dir": "unused",
}


def write_run(folder, config, **changes):
    """Write the base's config.json (no weights) and the YAML of a run on it; return the YAML's path."""
    config.save_pretrained(folder / "base")
    path = folder / f"run-{len(list(folder.glob('*.yml')))}.yml"
    settings = {**RUN, "base_model": str(folder / "base"), **changes}
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return path


def run_on(folder, config, **changes) -> TrainingRun:
    """Return a training on a base."""
    return read_run(write_run(folder, config, **changes))
