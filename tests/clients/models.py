"""Small models, trained as users train them, and exported by the command."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from transformers import Qwen2Config, Qwen2ForCausalLM

from axolotl_qtha.cli.export import export

from ..e2e.commands import QUICKSTART, train_here, write_config

VOCABULARY = 2112  # of the Qwen2: more rows than its tokenizer has tokens, as the published ones have
CIRCUIT = {"rank": 4, "alpha": 8, "param_budget": 0.24}
LINEAR = {"rank": 4, "alpha": 8, "param_budget": 0.4, "quantum": "none"}


def make_qwen2(folder: Path, tied: bool) -> Path:
    """Write a Qwen2 of 2 MB (1 MB more untied) with random weights and biases, and the quickstart's tokenizer."""
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.08,  # wide enough that its predictions are far from uniform
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):  # zeros otherwise, which a client could forget unseen
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    shutil.copy(QUICKSTART / "base" / "tokenizer.json", folder)
    settings = json.loads((QUICKSTART / "base" / "tokenizer_config.json").read_text())
    settings["unk_token"] = "</s>"  # where a Qwen has none, Axolotl adds <|endoftext|> to the tokenizer
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return folder


class Workshop:
    """Trains each adapter and makes each export once, when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bases: dict[str, Path] = {"Llama": QUICKSTART / "base"}
        self._trained: dict[str, tuple[Path, Any]] = {}

    def base(self, name: str) -> Path:
        """Return the folder of `Llama` (tied, the quickstart's), `Qwen2` (tied) or `Qwen2, untied`."""
        if name not in self._bases:
            folder = self.folder / name.replace(", ", "-").lower()
            self._bases[name] = make_qwen2(folder, tied="untied" not in name)
        return self._bases[name]

    def trained(self, base: str, block: dict[str, Any], **changes: Any) -> tuple[Path, Any]:
        """Return the YAML of an adapter trained for ten steps, and its model."""
        key = json.dumps([base, block, changes])
        if key not in self._trained:
            folder = self.folder / f"run-{len(self._trained)}"
            folder.mkdir()
            steps = {"max_steps": 10, "save_steps": 10, "eval_steps": 10, "warmup_steps": 2}
            config = write_config(folder, base_model=str(self.base(base)), qtha=block, **steps, **changes)
            self._trained[key] = config, train_here(config)[0].eval()
        return self._trained[key]

    def exported(self, config: Path, *options: str) -> Path:
        """Run `axolotl qtha-export` on little text; return the folder it wrote."""
        out = self.folder / f"export-{len(list(self.folder.glob('export-*')))}"
        least = ["--out", str(out), "--tokens", "2000", "--max-kl", "10"]
        done = CliRunner().invoke(export, [str(config), *least, *options])
        assert done.exit_code == 0, done.output[-3000:] + repr(done.exception)
        return out
