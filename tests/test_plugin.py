"""The plugin's hooks, as Axolotl calls them in one run."""

import ast

import pytest

from axolotl_qtha import plugin
from axolotl_qtha.settings.training_run import AdapterSettings

from .e2e.commands import train_here, write_config
from .test_layout import FILES


@pytest.mark.e2e
def test_the_block_is_parsed_once_for_a_configuration(tmp_path, monkeypatch):
    parsed, of = [], AdapterSettings.of

    def counted(cfg):
        parsed.append(of(cfg))
        return parsed[-1]

    monkeypatch.setattr(AdapterSettings, "of", counted)
    model, _, _ = train_here(write_config(tmp_path, max_steps=1))
    assert len(parsed) == 1
    assert parsed[0].config.mpo == "auto"  # PEFT writes into a copy
    assert model.active_peft_config.mpo == "none"


def test_another_configuration_is_parsed_anew():
    from axolotl.utils.dict import DictDefault

    hooks = plugin.QTHAPlugin()
    first, second = (DictDefault(adapter="qtha", base_model="x", seed=1, qtha={"rank": rank}) for rank in (4, 6))
    assert hooks._settings(first) is hooks._settings(first)
    assert [hooks._settings(cfg).config.rank for cfg in (first, second, first)] == [4, 6, 4]


def test_the_plugin_holds_hooks_and_nothing_else():
    tree = ast.parse(FILES["plugin"].read_text())
    assert not [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    (hooks,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert {node.name for node in hooks.body if isinstance(node, ast.FunctionDef) and node.name.startswith("_")} == {
        "__init__",
        "_settings",
        "_like",
        "_before_training",
        "_take_over",
    }
    assert max(node.end_lineno - node.lineno for node in hooks.body if isinstance(node, ast.FunctionDef)) < 40
