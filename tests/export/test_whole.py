"""Tied or not x what is trained x format: every export gives the adapter's logits, or is refused.

`pytest -n 0 -s tests/export/test_whole.py` prints the figures of docs/export.md.
"""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from axolotl_qtha.export import fit, lowrank, merged
from axolotl_qtha.export.beside import copy_beside, settle_config
from axolotl_qtha.export.whole import whole_of
from axolotl_qtha.trained.passes import adapters_of
from axolotl_qtha.tuner.layer import adapted_layers, adapted_sizes

from ..models import SIZES, VOCABULARY, adapted, logits, train

MORE = 5  # rows that a resized vocabulary has more, or fewer
TARGETS = ["q_proj", "down_proj"]
TRAINED = {
    "layers": {},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norm": {"modules_to_save": ["norm"]},
    "adapted head": {"target_modules": [*TARGETS, "lm_head"]},
    "adapted head, embedding": {"target_modules": [*TARGETS, "lm_head"], "modules_to_save": ["embed_tokens"]},
}
TOLERANCE = 1e-5  # float32: weights and logits are summed in another order


def made(tied, seed=0):
    torch.manual_seed(seed)
    sizes = {**SIZES, "num_hidden_layers": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).eval()


def is_tied(model):
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture(params=["base", "longer", "shorter"])
def rows(request):
    return VOCABULARY + {"base": 0, "longer": MORE, "shorter": -MORE}[request.param]


@pytest.fixture(params=TRAINED)
def trained(request, tied, rows, tmp_path):
    """Return a trained model, with the folder of its base."""
    base = made(tied)
    base.save_pretrained(tmp_path / "base")
    if rows != VOCABULARY:
        base.resize_token_embeddings(rows, mean_resizing=False)
    model = train(adapted(base, **{"quantum": "none", "target_modules": TARGETS, **TRAINED[request.param]}))
    return model, tmp_path / "base"


# tokens() may be of the last rows: a shorter vocabulary has none there
def given(model):
    most = len(model.get_input_embeddings().weight)
    with torch.no_grad():
        return model(input_ids=torch.arange(2 * 7).reshape(2, 7) * 7 % most).logits


def exact(model):
    return {name: fit.exact(adapter) for name, adapter in adapters_of(model).items()}


def told(request, what, off):
    print(f"\n| {request.node.callspec.id} | {what} | {off:.1e} |")


def test_lora(trained, rows, tmp_path, request):
    model, base = trained
    expected, whole = given(model), whole_of(model, VOCABULARY, adapted_layers(model))
    names = [name for name, _ in model.get_base_model().named_modules()]
    (tmp_path / "lora").mkdir()
    lowrank.write(exact(model), model.peft_config["default"], whole, names, False, tmp_path / "lora")
    opened = AutoModelForCausalLM.from_pretrained(base)
    if whole.vocabulary is not None:
        opened.resize_token_embeddings(rows, mean_resizing=False)
    assert (whole.vocabulary is None) == (rows == VOCABULARY)
    off = (given(PeftModel.from_pretrained(opened, tmp_path / "lora").eval()) - expected).abs().max()
    told(request, "lora", off)
    assert off <= TOLERANCE


def test_merged(trained, tied, rows, tmp_path, request):
    model, base = trained
    expected, layers = given(model), adapted_layers(model)
    whole = whole_of(model, VOCABULARY, layers)
    plan = merged.plan(dict(zip(layers, adapted_sizes(model), strict=True)), (), whole, base)
    folder = tmp_path / "merged"
    folder.mkdir()
    copy_beside(base, folder)
    merged.merge(exact(model), (), plan, folder)
    settle_config(folder, whole, tied, {})
    opened, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    off = (given(opened.eval()) - expected).abs().max()
    told(request, "merged", off)
    assert off <= TOLERANCE
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    # what other programs go by
    stored, said = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    assert said["tie_word_embeddings"] == ("lm_head.weight" not in stored) == is_tied(opened)
    assert said["vocab_size"] == len(stored["model.embed_tokens.weight"]) == rows
    if rows == VOCABULARY and whole.tied == tied:
        assert (folder / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_merge_and_unload(trained, tied, tmp_path, request):
    """As `axolotl merge-lora` does: right, or refused before anything is changed."""
    model, _ = trained
    expected = given(model)
    config = model.peft_config["default"]
    if tied and "lm_head" in config.target_modules and not config.modules_to_save:
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(ValueError, match=r"lm_head has the weight of model\.embed_tokens.*--format merged"):
                merge()
        assert torch.equal(given(model), expected)
        return
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    off = (given(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()) - expected).abs().max()
    told(request, "merge-lora", off)
    assert off <= TOLERANCE


@pytest.mark.parametrize("differs", [False, True])
@pytest.mark.parametrize("what", ["layers", "embedding", "adapted head"])
def test_a_checkpoint_with_a_head_of_its_own_though_tied(what, differs, tmp_path):
    """transformers ties the two where they are equal, and has two where they are not; vLLM drops the second."""
    base = tmp_path / "base"
    made(tied=True).save_pretrained(base)
    stored = load_file(base / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + (0.1 if differs else 0.0)
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    start = AutoModelForCausalLM.from_pretrained(base)
    assert is_tied(start) is not differs
    model = train(adapted(start, **{"quantum": "none", "target_modules": TARGETS, **TRAINED[what]}))
    expected, layers = logits(model), adapted_layers(model)
    whole = whole_of(model, VOCABULARY, layers)
    folder = tmp_path / "merged"
    folder.mkdir()
    copy_beside(base, folder)
    merged.merge(exact(model), (), merged.plan(dict(zip(layers, adapted_sizes(model), strict=True)), (), whole, base), folder)
    settle_config(folder, whole, True, {})
    assert (logits(AutoModelForCausalLM.from_pretrained(folder).eval()) - expected).abs().max() <= TOLERANCE
    said = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert said is (what == "layers" and not differs)


def test_pefts_lora_is_as_wrong_on_a_tied_head_as_ours_was():
    """Why it is refused: the reference does it silently."""
    model = train(get_peft_model(made(tied=True), LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")))
    expected = logits(model)
    assert (logits(model.merge_and_unload()) - expected).abs().max() > 1e-3


def test_a_quantised_head_of_another_size_is_refused():
    model = adapted(made(tied=False), quantum="none", target_modules=TARGETS)
    head = model.get_base_model().lm_head
    head.weight = torch.nn.Parameter(head.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"lm_head is quantised and has another size than the base's"):
        whole_of(model, VOCABULARY - 1, ())
