"""Axolotl's own LoRA YAMLs through `axolotl qtha-from-lora`, and what Axolotl's validation says of what it writes.

They are no part of this project: name a checkout of https://github.com/axolotl-ai-cloud/axolotl,

    AXOLOTL_CHECKOUT=~/axolotl pytest -n 0 -s tests/corpus

and the counts and reasons of docs/host.md are printed. A base is put in the place of each YAML's, and what a CPU has not is off.
"""

import os
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from axolotl.integrations.base import PluginManager

from axolotl_qtha.settings.from_lora import translate
from axolotl_qtha.settings.training_run import checked

from ..e2e.commands import QUICKSTART

CHECKOUT = os.environ.get("AXOLOTL_CHECKOUT", "") and str(Path(os.environ["AXOLOTL_CHECKOUT"]).expanduser().resolve())
HERE = {"base_model": str(QUICKSTART / "base"), "bf16": False, "tf32": False, "attn_implementation": "sdpa"}
ATTENTION = ("flash_attention", "sdp_attention", "flex_attention", "xformers_attention", "eager_attention")
TAKEN = "takes it"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUT, reason="AXOLOTL_CHECKOUT names no checkout of Axolotl, whose examples this runs through"),
]


def why_refused(text: str) -> str:
    """Return why Axolotl refuses a YAML on a base of ours, `TAKEN` if it does not."""
    values = yaml.safe_load(text)
    values = {key: value for key, value in values.items() if key not in ATTENTION} | HERE
    PluginManager.get_instance().plugins.clear()  # as in a process of its own: plugins of another YAML would check this one
    return checked(values)[1] or TAKEN


def outcome(text: str) -> str:
    """Return why there is no valid `adapter: qtha` for a YAML, `TAKEN` if there is."""
    try:
        return why_refused(translate(text).text)
    except ValueError as error:
        return str(error)


def short(reason: str) -> str:
    """Return a reason without what differs from file to file."""
    if "has no counterpart" in reason and (keys := re.findall(r"^  - (\w+):", reason, flags=re.MULTILINE)):
        return f"no counterpart: {', '.join(key for key in keys if not key.startswith(('relora_', 'expert_parallel_')))}"
    return re.sub(r"\s+", " ", reason)[:160]


def table(title: str, reasons: dict[Path, str]) -> None:
    print(f"\n{title}")
    for reason, count in Counter(map(short, reasons.values())).most_common():
        names = [str(path.relative_to(Path(CHECKOUT) / "examples")) for path, text in reasons.items() if short(text) == reason]
        print(f"{count:5}  {reason}" + (f"  [{', '.join(names)}]" if reason != TAKEN else ""))


def test_most_of_what_is_valid_with_lora_is_valid_with_qtha(monkeypatch):
    monkeypatch.chdir(CHECKOUT)  # where its YAMLs' paths begin
    texts = {path: path.read_text() for path in sorted(Path("examples").resolve().rglob("*.y*ml"))}
    loras = {path: text for path, text in texts.items() if re.search(r"^adapter:\s*(lora|qlora)\b", text, flags=re.MULTILINE)}
    before = {path: why_refused(text) for path, text in loras.items()}
    valid = [path for path, reason in before.items() if reason == TAKEN]
    after = {path: outcome(loras[path]) for path in valid}
    table(f"{len(loras)} YAMLs with LoRA", before)
    table(f"the {len(valid)} valid ones with QTHA", after)
    assert len(loras) >= 150
    assert Counter(after.values())[TAKEN] >= 0.925 * len(valid)  # 148 of 160


def test_nothing_else_is_changed():
    """Every comment of its own line is still there, and every line that is none of the command's."""
    for path in sorted(Path(CHECKOUT, "examples").rglob("*.y*ml")):
        text = path.read_text()
        if not re.search(r"^adapter:\s*(lora|qlora)\b", text, flags=re.MULTILINE):
            continue
        made = translate(text, force=True).text
        comments = Counter(line.strip() for line in text.splitlines() if re.match(r"\s*#", line))
        assert comments <= Counter(line.strip() for line in made.splitlines()), path
        rest = [line for line in text.splitlines() if re.match(r"(?!lora|peft|fsdp|adapter|plugins|load_in|optimizer)\w+:", line)]
        assert len(rest) - len([line for line in rest if line in made.splitlines()]) <= 3, path
