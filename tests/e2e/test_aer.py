"""`axolotl train` with the circuits on Qiskit Aer."""

import pytest

from .commands import train_here, write_config

pytestmark = pytest.mark.e2e

# 20 steps of one layer: every token costs 29 circuits
SMALL = {"micro_batch_size": 1, "eval_steps": 20, "save_steps": None, "learning_rate": 0.02}


@pytest.mark.parametrize(
    "qtha",
    [
        {},
        {"shots": 128, "noise_model": "depolarizing"},  # a shot costs 0.7 us: with 1,024, two minutes
        {"shots": 128, "noise_model": "fake:manila", "gradient": "adjoint"},
    ],
    ids=["exact", "shots and noise", "a device, adjoint"],
)
def test_learns(tmp_path, qtha):
    config = write_config(tmp_path, "aer.yml", **SMALL, qtha={"layers_to_transform": [3], **qtha})
    _, _, trainer = train_here(config)
    held_out = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.state.global_step == 20
    assert held_out[-1] < held_out[0] - 0.05
    model = trainer.model.base_model.model
    angles = [p for name, p in model.named_parameters() if name.endswith(".angles")]
    assert len(angles) == 1
    assert angles[0].isfinite().all()
