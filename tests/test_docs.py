"""The documentation says what the code says, and its links lead somewhere. Its commands are run in tests/e2e/test_docs.py."""

import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

from axolotl_qtha import QTHAConfig
from axolotl_qtha.settings.reference import markdown
from axolotl_qtha.tuner.fitting import settle
from axolotl_qtha.tuner.share import LayerSize, owned
from axolotl_qtha.tuner.sizes import count_lora_parameters, count_parameters, resolve

from .e2e.commands import REPOSITORY
from .test_examples import MODELS
from .test_layout import ROOT, STOREYS

README = (REPOSITORY / "README.md").read_text()
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
TEXTS = [
    *(REPOSITORY / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *PAGES,
    *(REPOSITORY / "example_configs").rglob("README.md"),
]
LINK = re.compile(r"\[[^\]\n]*(?:\n[^\]\n]*)?\]\(([^)\s]+)\)")


def name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


def broken(path: Path, text: str) -> list[str]:
    """Return the links of a page that lead nowhere; those to other sites are not followed."""
    faults = []
    for link in LINK.findall(without_code(text)):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            faults.append(link)
    return faults


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_links_lead_somewhere(path):
    assert broken(path, path.read_text()) == []


def test_broken_links_are_found():
    page = REPOSITORY / "README.md"
    assert broken(page, "[a](docs/no.md) [b](docs/ibm.md#no) [c](docs/ibm.md) [d](#set-up) [e](https://x.y) `[f](z)`") == [
        "docs/no.md",
        "docs/ibm.md#no",
        "z",
    ]


def test_the_readme_is_a_front_page():
    assert len(README.splitlines()) <= 210
    linked = set(LINK.findall(README))
    assert {f"docs/{path.name}" for path in PAGES} | {"ARCHITECTURE.md", "CONTRIBUTING.md"} <= linked


def test_the_page_of_settings_is_what_its_command_writes():
    assert (REPOSITORY / "docs" / "settings.md").read_text() == markdown()


def test_architecture_names_every_storey_in_its_order():
    text = (REPOSITORY / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| `([\w/]+)` \|", text.partition("## The storeys")[2].partition("## ")[0], flags=re.MULTILINE)
    assert [row.rstrip("/") for row in rows] == list(STOREYS)
    assert all((ROOT / row).is_dir() == row.endswith("/") for row in rows)


def test_files_that_are_named_exist():
    """Each `folder/file.py` of the pages for developers is in the repository, or in the package."""
    for page in ("ARCHITECTURE.md", "CONTRIBUTING.md"):
        for file in re.findall(r"`((?:\w+/)+[\w.]+\.(?:py|cpp|md|toml|yml))", (REPOSITORY / page).read_text()):
            assert (REPOSITORY / file).exists() or (ROOT / file).exists(), f"{page}: {file}"


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_commands_in_the_text_have_these_options(path):
    """Commands in a sentence are not run, unlike those in a `bash` block; but they are there, and so are their options."""
    commands = {point.name: point for point in entry_points(group="axolotl.cli_commands") if point.name.startswith("qtha-")}
    for command, rest in re.findall(r"`axolotl\s+(qtha-[a-z-]+)((?:\s+[^`]*)?)`", path.read_text()):
        assert command in commands
        known = {option for parameter in commands[command].load().params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, f"{command}{rest}"


def test_pre_commit_checks_what_ci_checks():
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    checks = [line.removesuffix(" .") for line in (REPOSITORY / ".ci" / "run").read_text().splitlines()]
    assert all(hook["entry"].removesuffix(" --force-exclude") in checks for hook in hooks)
    assert {"ruff check", "ruff format --check", "mypy"} <= set(checks)
    workflow = (REPOSITORY / ".github" / "workflows" / "ci.yml").read_text()
    assert yaml.safe_load(workflow)["jobs"]["test"]["steps"][-1] == {"run": "bash .ci/run"}


@pytest.mark.parametrize("model", MODELS)
def test_table_of_parameters(model):
    layers, hidden, inter, query, kv = MODELS[model]
    block = {"q": (hidden, query), "k": (hidden, kv), "v": (hidden, kv), "o": (query, hidden)}
    block |= {"gate": (hidden, inter), "up": (hidden, inter), "down": (inter, hidden)}
    sizes = {f"layers.{k}.{name}_proj": LayerSize(*size) for k in range(layers) for name, size in block.items()}
    config = QTHAConfig(rank=8)
    settle(config, sizes)
    ours, lora = count_parameters(config, owned(config.share, sizes).values()), count_lora_parameters(8, sizes.values())
    networks = resolve(QTHAConfig(rank=8, mpo="tt"), list(sizes.values()))
    theirs = f"{count_parameters(networks, sizes.values()):,} | {networks.bond_dim} |"
    row = f"| {model} | {lora:,} | {ours:,} | {1 - ours / lora:.1%} | {layers / config.share.layers:.0f} of {layers} | {theirs}"
    assert row in README
    assert ours <= 0.24 * lora


def test_python_example_runs():
    from .models import llama

    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {"model": llama()}
    exec(example.replace("rank=8", "rank=4, param_budget=1.0"), names)  # the tiny model is too narrow for rank 8
    assert names["model"].active_peft_config.peft_type.value == "QTHA"
