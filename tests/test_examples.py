"""Every YAML in example_configs/ is valid, and named in the README."""

import pytest
import yaml
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault

from .e2e.commands import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
BENCHMARKS = (REPOSITORY / "docs" / "benchmarks.md").read_text()
SUITES = sorted((REPOSITORY / "example_configs" / "bench").glob("*.yml"))  # see tests/bench/suite/test_examples.py
EXAMPLES = sorted(set((REPOSITORY / "example_configs").rglob("*.yml")) - set(SUITES))
# (layers, hidden, intermediate, query width, key/value width), from the models' published configurations
MODELS = {
    "Qwen2.5-7B-Instruct": (28, 3584, 18944, 3584, 512),
    "Llama-3.1-8B": (32, 4096, 14336, 4096, 1024),
    "Llama-3.2-3B": (28, 3072, 8192, 3072, 1024),
    "Qwen3-0.6B": (28, 1024, 3072, 2048, 1024),
    "Mistral-7B-v0.3": (32, 4096, 14336, 4096, 1024),
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_valid(path):
    raw = yaml.safe_load(path.read_text())
    config = DictDefault(raw)
    prepare_plugins(config)
    valid = validate_config(config)
    assert valid.adapter == raw["adapter"]
    assert set(raw) <= set(valid) | {"wandb_project"}, "Axolotl dropped a key it does not know"
    if raw["adapter"] == "qtha":
        for key, value in raw["qtha"].items():
            if isinstance(value, dict):  # a block of its own, whose other keys have their defaults
                assert value.items() <= valid.qtha[key].items()
            else:
                assert valid.qtha[key] == (float(value) if key == "circuit_lr" else value)


@pytest.mark.parametrize("path", EXAMPLES + SUITES, ids=lambda path: path.name)
def test_example_is_named_in_the_readme_or_a_suite_in_its_page(path):
    assert f"`{path.relative_to(REPOSITORY)}`" in (README + BENCHMARKS if path in SUITES else README)
