"""docs/host.md names every place where Axolotl compares `adapter`, and every key that the command knows."""

import re
from pathlib import Path

import axolotl

from axolotl_qtha.settings.args import LORA_KEYS, REFUSED
from axolotl_qtha.settings.from_lora import FALLS_AWAY, READ_BY_US
from axolotl_qtha.settings.fsdp2 import GONE, STATE_DICTS
from axolotl_qtha.settings.parallel import SPLIT_MODEL

from .e2e.commands import REPOSITORY

PAGE = (REPOSITORY / "docs" / "host.md").read_text()
# `self.adapter in ["lora", ...]`, `data.get("adapter") == "qlora"`, `if cfg.adapter and ...`
COMPARED = re.compile(r"""adapter"?[\])]*\s*(==|!=|not\s+in|in)\s*[\[(]?\s*"q?lora|\b(if|and|or|not)\s+(self\.)?cfg\.adapter\b""")
ANOTHERS = ("integrations/mora/",)  # a plugin with an adapter of its own


def compared_in() -> set[str]:
    root = Path(axolotl.__file__).parent
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if COMPARED.search(path.read_text())}
    return {name for name in found if not name.startswith(ANOTHERS)}


def test_every_file_that_compares_adapters_is_named():
    files = compared_in()
    assert len(files) >= 12
    assert {name for name in files if f"`{name}`" not in PAGE} == set()


def test_every_key_is_named():
    keys = {*LORA_KEYS, *REFUSED, *FALLS_AWAY, *READ_BY_US, *SPLIT_MODEL, *GONE, *STATE_DICTS}
    named = set(re.findall(r"`([a-z0-9_]+)(?::[^`]*)?`", PAGE))
    assert keys - named - {"backward_prefetch_policy"} == set()
