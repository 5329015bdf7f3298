"""The layout: storeys, in which everything imports from below, without a circle."""

import ast
import re
from pathlib import Path

import pytest

from axolotl_qtha.tuner.backends import MODULES

from .e2e.commands import REPOSITORY

PACKAGE = "axolotl_qtha"
ROOT = REPOSITORY / PACKAGE
# From the top down: a folder or file imports only what stands below it, and what is in the same folder. This is the one place
# that says so; ARCHITECTURE.md tells what each is for.
STOREYS = (
    "cli",
    "bench",
    "__init__",
    "plugin",
    "export",
    "training",
    "hardware_eval",
    "diagnose",
    "planner",
    "trained",
    "settings",
    "tuner",
    "ibm",
    "circuit",
    "files",
    "timing",
    "terminal",
    "errors",
    "version",
)
LINES = 350  # of a Python file at most
TOP_FILES = 6


def name_of(path: Path) -> str:
    """Return a file's dotted name in the package: `tuner.model`; of a folder's `__init__.py`, `tuner.__init__`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def storey(name: str) -> str:
    return name.partition(".")[0]


def file_of(module: str) -> str | None:
    """Return the file that `import module` runs, None for what is no module of the package."""
    name = module.removeprefix(PACKAGE).removeprefix(".")
    return next((found for found in (name, f"{name}.__init__".removeprefix(".")) if found in FILES), None)


def imported(name: str, source: str) -> set[str]:
    """Return the files of the package that a file imports: at its top, inside functions, and for type checkers."""
    package = [PACKAGE, *name.split(".")[:-1]]
    found: set[str | None] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {file_of(alias.name) for alias in node.names if alias.name.split(".")[0] == PACKAGE}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.split(".")[0] != PACKAGE:
                continue
            for alias in node.names:  # a module, or something in one
                found.add(file_of(f"{module}.{alias.name}") or file_of(module))
    return {file for file in found if file is not None}


IMPORTS = {name: imported(name, path.read_text()) - {name} for name, path in FILES.items()}


def upwards(imports: dict[str, set[str]]) -> list[str]:
    """Return the imports that run from a storey to one that is not below it."""
    rank = {name: i for i, name in enumerate(STOREYS)}
    return [
        f"{name} -> {other}"
        for name, others in imports.items()
        for other in sorted(others)
        if storey(name) != storey(other) and rank[storey(other)] < rank[storey(name)]
    ]


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Return files that import each other in a circle, the first again at the end; empty if there are none."""
    done: set[str] = set()

    def follow(path: list[str]) -> list[str]:
        for other in sorted(imports.get(path[-1], ())):
            if other in path:
                return [*path[path.index(other) :], other]
            if other not in done and (found := follow([*path, other])):
                return found
        done.add(path[-1])
        return []

    return next((found for name in imports if name not in done and (found := follow([name]))), [])


def test_every_folder_and_file_has_its_storey():
    assert {storey(name) for name in FILES} == set(STOREYS)


def test_nothing_is_imported_from_above():
    assert upwards(IMPORTS) == []


def test_no_files_import_each_other_in_a_circle():
    assert circle(IMPORTS) == []


def test_backends_are_opened_by_name_from_below():
    assert upwards({"tuner.backends": {file_of(module) for module in MODULES.values()}}) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from ..training import checkpoints", {"training.checkpoints"}),
        ("def f():\n    from ..training.checkpoints import check", {"training.checkpoints"}),
        ("from . import mpo, sizes", {"tuner.mpo", "tuner.sizes"}),
        ("from .. import QTHAConfig", {"__init__"}),
        ("import axolotl_qtha.plugin", {"plugin"}),
        ("from axolotl_qtha.ibm import engine", {"ibm.engine"}),
        ("import torch\nfrom axolotl.utils import dict", set()),
    ],
)
def test_imports_are_found(source, found):
    assert imported("tuner.model", source) == found


def test_what_is_wrong_is_found():
    assert upwards({"tuner.model": {"training.guards", "circuit.ansatz", "tuner.mpo"}}) == ["tuner.model -> training.guards"]
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]


def at_the_top(path: Path) -> str:
    """Return the imports of a file that run when it is imported itself."""
    body = ast.parse(path.read_text()).body
    return "\n".join(ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom))


def test_the_plugin_does_not_start_qiskit():
    """Its import takes a second of every rank and command, and a training with the native engine needs none of it."""
    top = {name: at_the_top(path) for name, path in FILES.items()}
    reached, waiting = set(), {"plugin"}
    while waiting:
        reached.add(name := waiting.pop())
        waiting |= imported(name, top[name]) - reached
    starting = {name for name, lines in top.items() if re.search(r"^(from|import) qiskit", lines, flags=re.MULTILINE)}
    assert starting >= {"circuit.aer", "ibm.circuits"}
    assert len(reached) > 50
    assert not reached & starting


def test_the_yaml_is_read_in_settings_alone():
    """Others that hold Axolotl's configuration run Axolotl with it: the plugin, what watches its loading of data, and
    the commands that load a model.
    """
    holding = {name for name, path in FILES.items() if re.search(r"\bcfg\b", path.read_text())}
    commands = {"plugin", "training.data", "export.command", "hardware_eval.command", "diagnose.command", "bench.suite.cell"}
    assert {name for name in holding if storey(name) != "settings"} == commands


def test_few_files_at_the_top_and_none_too_long():
    assert len(list(ROOT.glob("*.py"))) <= TOP_FILES
    long = {
        str(path): count
        for path in (*ROOT.rglob("*.py"), *Path(__file__).parent.rglob("*.py"))
        if (count := len(path.read_text().splitlines())) > LINES
    }
    assert long == {}
