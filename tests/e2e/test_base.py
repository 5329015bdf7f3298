"""The script that makes the quickstart's base makes bases of other sizes, for suites."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .commands import QUICKSTART, run

pytestmark = pytest.mark.e2e
SCRIPT = ["python", str(QUICKSTART / "make_base.py")]


def test_a_base_of_another_size(tmp_path):
    small = ["--hidden", "64", "--layers", "1", "--steps", "2", "--batch", "2"]
    done = run([*SCRIPT, *small, "--out", str(tmp_path / "base")], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    shipped = AutoConfig.from_pretrained(QUICKSTART / "base")
    layer = model.model.layers[0]
    assert len(model.model.layers) == 1
    assert layer.self_attn.q_proj.weight.shape == (64, 64)
    assert layer.self_attn.k_proj.weight.shape == (32, 64)
    assert layer.mlp.up_proj.weight.shape == (176, 64)
    for key in ("vocab_size", "head_dim", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(model.config, key) == getattr(shipped, key)
    text = "Return the number of qubits."
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_width_that_does_not_split_into_heads(tmp_path):
    done = run([*SCRIPT, "--hidden", "100", "--out", str(tmp_path / "base")], tmp_path)
    assert done.returncode == 2
    assert "--hidden 100: no multiple of 64. What works: 128, 192" in done.stdout
    assert not (tmp_path / "base").exists()
