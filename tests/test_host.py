"""docs/host.md names every place where Axolotl compares `adapter`, every key that the command knows, and every trainer."""

import re
from pathlib import Path

import axolotl
from axolotl.utils.schemas.enums import RLType

from axolotl_qtha.settings.args import LORA_KEYS, REFUSED
from axolotl_qtha.settings.from_lora import FALLS_AWAY, READ_BY_US
from axolotl_qtha.settings.fsdp2 import GONE, STATE_DICTS
from axolotl_qtha.settings.parallel import SPLIT_MODEL

from .e2e.commands import REPOSITORY
from .e2e.test_trainers import REFUSED as REFUSED_TRAINERS
from .e2e.test_trainers import TRAINS

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


def test_the_table_of_trainers_is_what_the_tests_run():
    section = PAGE.split("\n## Trainers\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `([^`]+)` \| (trains|refused) \|", section, flags=re.MULTILINE))
    assert rows == dict.fromkeys(TRAINS, "trains") | dict.fromkeys(REFUSED_TRAINERS, "refused")
    assert {kind.value for kind in RLType} <= set(re.findall(r"`rl: (\w+)", section))  # all of Axolotl's are named
