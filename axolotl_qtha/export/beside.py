"""What lies beside the weights of a merged model: the base's own files, byte for byte where the run changed nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from .whole import Whole

# Configurations, tokenizers, templates, code of models that bring their own, licences.
BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "LICENSE*", "NOTICE*")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_beside(base: Path, folder: Path) -> None:
    """Copy the base's files other than weights."""
    for pattern in BESIDE:
        for file in base.glob(pattern):
            if file.is_file() and not file.name.endswith(".index.json"):
                shutil.copy(file, folder / file.name)


def settle_config(folder: Path, whole: Whole, tied: bool, overrides: dict[str, Any]) -> None:
    """Have the model's config.json say what the weights are, where the base's does not.

    Args:
        folder: with the base's config.json.
        whole: the embeddings and the head that were written.
        tied: whether transformers ties the two by the configuration as it is.
        overrides: Axolotl's `overrides_of_model_config`, which the model was trained with.
    """
    changes: dict[str, Any] = {}
    if whole.vocabulary is not None:
        changes["vocab_size"] = whole.vocabulary
    if whole.head is not None and tied != whole.tied:
        changes["tie_word_embeddings"] = whole.tied
    if not changes and not overrides:
        return
    config = json.loads((folder / "config.json").read_text())
    for key, value in overrides.items():  # as transformers takes them: of a configuration inside of it, only what is named
        inside = config.get(key) if key.endswith("_config") else None
        config[key] = inside | value if isinstance(inside, dict) and isinstance(value, dict) else value
    text = config.get("text_config", {})
    for key, value in changes.items():
        if key in text:
            text[key] = value
        if key in config or key not in text or key == "tie_word_embeddings":
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_tokenizer(tokenizer: Any, base: str | Path, folder: Path, **load: Any) -> bool:
    """Write the tokenizer of the run if it is not the base's, and return whether it is another.

    transformers 5 names a class there that version 4 does not know, also where the base's own was known to it: that name stays.

    Args:
        tokenizer: of the run.
        base: the base model's folder or name.
        folder: where to.
        load: how the base's tokenizer is loaded (revision, trust_remote_code).
    """
    own = AutoTokenizer.from_pretrained(str(base), **load)
    if _described(own) == _described(tokenizer):
        return False
    before = _json(folder / "tokenizer_config.json")
    for stale in ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"):
        (folder / stale).unlink(missing_ok=True)
    tokenizer.save_pretrained(str(folder))
    now = _json(folder / "tokenizer_config.json")
    for key in ("local_files_only", "is_local"):
        now.pop(key, None)
    if now.get("tokenizer_class") == "TokenizersBackend" and (known := before.get("tokenizer_class")):
        now["tokenizer_class"] = known
    (folder / "tokenizer_config.json").write_text(json.dumps(now, indent=2, ensure_ascii=False) + "\n")
    _settle_special(tokenizer, own, folder)
    return True


def _settle_special(tokenizer: Any, own: Any, folder: Path) -> None:
    """Have a model start, stop and pad with the run's special tokens, as transformers' trainer has it."""
    changes = {key: getattr(tokenizer, key) for key in SPECIAL if getattr(tokenizer, key) != getattr(own, key)}
    for file in ("config.json", "generation_config.json"):
        if not changes or not (folder / file).is_file():
            continue
        content = _json(folder / file) | changes
        if file == "generation_config.json" and "eos_token_id" in changes:  # what ended a text before still does
            before = _json(folder / file).get("eos_token_id")
            both = [changes["eos_token_id"], *(before if isinstance(before, list) else [before])]
            content["eos_token_id"] = list(dict.fromkeys(token for token in both if token is not None))
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")


def _described(tokenizer: Any) -> Any:
    """Return what makes a tokenizer: not how its last call padded and cut."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    inside = json.loads(fast.to_str()) if fast is not None else tokenizer.get_vocab()
    for key in ("padding", "truncation") if fast is not None else ():
        inside.pop(key, None)
    added = {number: (token.content, token.special) for number, token in tokenizer.added_tokens_decoder.items()}
    return inside, added, dict(tokenizer.special_tokens_map), tokenizer.chat_template


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}
