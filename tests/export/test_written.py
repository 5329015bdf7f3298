"""A folder that does not hold what was measured is found by opening it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from axolotl_qtha.export import written
from axolotl_qtha.export.measure import Kept, ModelError, measure
from axolotl_qtha.export.written import Opener, Written
from axolotl_qtha.trained.calibration_text import IGNORED, Sequence, predicting
from axolotl_qtha.trained.passes import adapters_of

from ..export_models import text_pass
from ..models import VOCABULARY, adapted, llama, train
from .test_whole import exact


@pytest.fixture
def kept(tmp_path):
    """A merged model's folder, and what was measured."""
    llama().save_pretrained(tmp_path / "base")
    model = train(adapted(llama(), quantum="none"))
    kept = Kept()
    measure(text_pass(model), exact(model), {}, kept)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    return kept


def opener(base):
    return Opener(LlamaForCausalLM, str(base), {}, torch.float32, {}, None, tied=False)


def compared(kept, folder):
    with written.opened(lambda: opener(folder).merged(folder)) as model:
        return written.compare(model, kept, "the merged model")


def test_the_right_one_passes(kept, tmp_path):
    found = compared(kept, tmp_path / "merged")
    assert found.kl < 1e-7
    assert found.largest < 1e-4
    assert found.model.top1 == 1.0
    written.check(found, torch.float32, "merged")


def test_another_model_is_refused(kept, tmp_path):
    assert compared(kept, tmp_path / "base").kl > 1e-3
    folder = shutil.copytree(tmp_path / "merged", tmp_path / "off")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]  # what a config.json that ties the two does to an export
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"--format: 'merged' does not hold the model that was measured.*`--format lora`"):
        written.check(compared(kept, folder), torch.float32, "merged")


def test_nan_is_refused(kept, tmp_path):
    folder = shutil.copytree(tmp_path / "merged", tmp_path / "off")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = compared(kept, folder)
    with pytest.raises(ValueError, match="does not hold the model"):
        written.check(found, torch.float32, "merged")
    assert found.largest != found.largest


def test_rounding_to_sixteen_bits_is_let_through():
    close = Written(ModelError(10.0), 5e-3, 0.1, "it")
    written.check(close, torch.bfloat16, "merged")
    with pytest.raises(ValueError, match=r"at most 0\.1 in a log-probability"):
        written.check(close, torch.float32, "merged")


def test_what_is_kept_is_what_was_run(kept):
    model = train(adapted(llama(), quantum="none"))
    assert len(adapters_of(model)) > 2
    assert len(kept.batches) == len(kept.qtha) == len(kept.export)
    for batch, qtha, export in zip(kept.batches, kept.qtha, kept.export, strict=True):
        assert qtha.shape == export.shape == (len(batch.targets()), VOCABULARY)
        torch.testing.assert_close(qtha, export, rtol=0, atol=1e-4)


def test_the_text_is_cut_where_the_memory_for_it_ends():
    rows = [Sequence([1, 2, 3], [IGNORED, 2, 3]), Sequence([4, 5, 6, 7], [IGNORED, IGNORED, 6, 7])]
    for most, expected in ((9, rows), (4, rows), (3, [rows[0], Sequence([4, 5, 6], [IGNORED, IGNORED, 6])]), (2, rows[:1])):
        assert predicting(rows, most) == expected
    assert predicting(rows, 1) == [Sequence([1, 2], [IGNORED, 2])]
