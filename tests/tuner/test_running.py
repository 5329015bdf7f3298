"""How circuits are run: what follows from the keys, and what a saved adapter does not hold."""

import json

import pytest

from axolotl_qtha import QTHAConfig
from axolotl_qtha.circuit.simulation import STRENGTHS, Strengths
from axolotl_qtha.settings.public_facts import Facts, Source
from axolotl_qtha.training.model_card import make_card, shown

PATH = "tests.circuit.own_models:MODEL"
OWN = {"rank": 2, "quantum_backend": "aer", "noise_model": PATH}


@pytest.mark.parametrize(
    ("settings", "strengths"),
    [
        ({"noise_model": "depolarizing"}, STRENGTHS),
        ({"noise_model": "depolarizing", "depolarizing_2q": 0.05, "readout_error": 0.03}, Strengths(1e-3, 0.05, (0.03, 0.03))),
        ({"noise_model": "readout"}, Strengths(readout=(0.02, 0.02))),
        ({"noise_model": "readout", "readout_error": [0.01, 0.04]}, Strengths(readout=(0.01, 0.04))),
        ({"noise_model": "fake:manila"}, STRENGTHS),
    ],
    ids=str,
)
def test_strengths(settings, strengths):
    simulation = QTHAConfig(rank=2, quantum_backend="aer", **settings).simulation
    assert simulation.strengths == strengths
    hash(simulation)


def test_a_saved_adapter_names_no_code(tmp_path):
    config = QTHAConfig(**OWN)
    config.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    assert "own_models" not in path.read_text()
    assert QTHAConfig.from_pretrained(str(tmp_path)).noise_model == "none"
    path.write_text(json.dumps({**json.loads(path.read_text()), "noise_model": "os:getcwd"}))
    with pytest.raises(ValueError, match=r"qtha.noise_model: 'os:getcwd' names code to import, and a saved adapter may not"):
        QTHAConfig.from_pretrained(str(tmp_path))


def test_the_card_says_that_the_noise_was_its_own_and_not_where_it_is():
    config = QTHAConfig(**OWN, bond_dim=2, mid_dim=2, target_modules=["q_proj"])
    text = str(make_card(config, Facts(Source("base", "local", "model")), [(8, 8)]))
    assert "own_models" not in text
    assert "a noise model of its own, which is not published" in text
    assert "noise_model: none" not in text
    flips = {"quantum_backend": "aer", "noise_model": "readout", "readout_error": [0.04, 0.01]}
    assert shown(QTHAConfig(rank=2, **flips))["readout_error"] == [0.04, 0.01]
