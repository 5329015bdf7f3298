"""The report of an export as a person and a program read it."""

import json
import math

import pytest
from matplotlib.image import imread
from rich.console import Console

from axolotl_qtha.export.measure import Measured, ModelError, ModuleError
from axolotl_qtha.export.report import MODULES_SHOWN, Report, model_table, module_table

MODELS = {"base": ModelError(20.0, 0.5, 0.4), "qtha": ModelError(10.0), "export": ModelError(10.5, 0.0123, 0.9)}
MODULES = [ModuleError(f"model.layers.{i}.mlp.{kind}", 0.01 * i, 0.3) for i in range(20) for kind in ("up", "down")]


def report(models=MODELS, modules=MODULES):
    return Report("lora", "linear", "left out", 4, "book.txt", 1000, Measured(250, 249, models, modules))


def printed(*tables):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*tables)
    return console.export_text()


def test_json_and_picture(tmp_path):
    report().write(tmp_path)
    found = json.loads((tmp_path / "export.json").read_text())
    assert found["perplexity"] == {"base": 20.0, "qtha": 10.0, "export": 10.5}
    assert found["perplexity_gain_kept"] == 0.95
    assert (found["held_out_tokens"], found["predicted_tokens"], found["fitted_tokens"]) == (250, 249, 1000)
    assert [module["name"] for module in found["modules"]] == [module.name for module in MODULES]
    picture = imread(tmp_path / "export.png")
    assert picture.shape[0] > 400
    assert picture.std() > 0.01  # something is drawn


def test_tables():
    text = printed(module_table(report()), model_table(report()))
    assert "model.layers.19.mlp.up" in text
    assert "19.0%" in text
    assert text.count("model.layers.") == MODULES_SHOWN
    assert f"The worst {MODULES_SHOWN} of 40" in text
    assert "keeps 95.0% of the perplexity" in " ".join(text.split())
    assert "249 held-out tokens of book.txt" in text


@pytest.mark.parametrize("qtha", [20.0, 25.0, math.inf])
def test_without_a_gain_no_share_of_it_is_claimed(tmp_path, qtha):
    found = report({**MODELS, "qtha": ModelError(qtha)})
    assert found.as_dict()["perplexity_gain_kept"] is None
    assert "there is no gain to keep" in " ".join(printed(model_table(found)).split())
