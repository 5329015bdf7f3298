"""A merged checkpoint against the export run beside the base."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from axolotl_qtha.export import merged
from axolotl_qtha.export.beside import copy_beside
from axolotl_qtha.export.lowrank import LowRank
from axolotl_qtha.export.whole import Whole

from ..models import gpt2, llama, logits, qwen2


def low_rank(out_features, in_features, rank=3, scale=0.1, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) * scale for shape in ((rank, in_features), (out_features, rank)))
    return LowRank(a, b, torch.randn(out_features, generator=generator) if bias else None)


def chosen(model, endings):
    """Return the adapted layers by name, and those that are stored transposed."""
    layers = {name: module for name, module in model.named_modules() if name.endswith(endings)}
    transposed = {name for name, module in layers.items() if type(module).__name__ == "Conv1D"}
    return layers, transposed


def running(model, layers):
    """Return the logits of the model with the LoRAs beside its layers."""
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _m, x, y, layer=layer: y + layer(x[0]))
        for name, layer in layers.items()
    ]
    try:
        return logits(model)
    finally:
        for hook in hooks:
            hook.remove()


def merge(layers, transposed, base, folder, whole=None):
    folder.mkdir()
    sizes = {name: (layer.a.shape[1], len(layer.b)) for name, layer in layers.items()}
    plan = merged.plan(sizes, transposed, whole or Whole(), base)
    copy_beside(base, folder)
    return merged.merge(layers, transposed, plan, folder)


def written(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# GPT-2's c_proj of the attention is square: whether it is transposed cannot be told from its shape
@pytest.mark.parametrize(
    ("make", "endings"),
    [(llama, ("q_proj", "down_proj")), (qwen2, ("q_proj", "v_proj", "up_proj")), (gpt2, ("c_attn", "c_proj", "c_fc"))],
)
@pytest.mark.parametrize("shard", [None, 20_000])
def test_the_merged_model_computes_what_the_export_does(tmp_path, make, endings, shard, monkeypatch):
    model = make()
    model.save_pretrained(tmp_path / "base", **({"max_shard_size": shard} if shard else {}))
    monkeypatch.setattr(merged, "SHARD", shard or merged.SHARD)
    found, transposed = chosen(model, endings)
    layers = {}
    for seed, (name, module) in enumerate(found.items()):
        sizes = module.weight.shape[::-1] if name in transposed else module.weight.shape
        layers[name] = low_rank(*sizes, bias=module.bias is not None, seed=seed)
    done = merge(layers, transposed, tmp_path / "base", tmp_path / "merged")
    expected = running(model, layers)
    assert (expected - logits(model)).abs().max() > 0.01
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits(loaded) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())  # float32, summed in another order
    assert done.layers == len(layers)
    assert done.rounding < 1e-5
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert [file.name for file in files] == sorted(done.files)
    assert (len(files) > 3) is (shard is not None)
    for file in files:
        tensors = load_file(file).values()
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= merged.SHARD
    changed = {
        f"{name}.{kind}" for name, layer in layers.items() for kind in ("weight", *(["bias"] if layer.bias is not None else []))
    }
    before, after = written(tmp_path / "base"), written(tmp_path / "merged")
    assert after.keys() == before.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == changed
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: tensor.dtype for name, tensor in before.items()}


def test_names_as_the_hub_has_gpt2s(tmp_path):
    """Without the prefix that the model's own names have, in which the layers are named."""
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    found, transposed = chosen(model, ("c_attn", "c_fc"))
    layers = {name: low_rank(*module.weight.shape[::-1], seed=i) for i, (name, module) in enumerate(found.items())}
    sizes = {name: (layer.a.shape[1], len(layer.b)) for name, layer in layers.items()}
    whole = Whole(
        {"transformer.ln_f.weight": model.transformer.ln_f.weight * 2}, embedding="transformer.wte", head="lm_head", tied=True
    )
    (tmp_path / "merged").mkdir()
    plan = merged.plan(sizes, transposed, whole, tmp_path / "base", (), "transformer")
    copy_beside(tmp_path / "base", tmp_path / "merged")
    assert merged.merge(layers, transposed, plan, tmp_path / "merged").layers == len(layers)
    assert plan.has("transformer.h.0.attn.c_attn.bias")
    with torch.no_grad():
        model.transformer.ln_f.weight *= 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits(loaded) - running(model, layers)).abs().max() <= 1e-5
    assert written(tmp_path / "merged").keys() == load_file(path).keys()


def test_layers_that_the_model_has_not_are_left_out(tmp_path):
    """`overrides_of_model_config: {num_hidden_layers: 2}` on a base of three."""
    llama(layers=3).save_pretrained(tmp_path / "base")
    modules = [name for name, _ in llama(layers=2).named_modules()]
    plan = merged.plan({"model.layers.1.mlp.up_proj": (48, 89)}, (), Whole(), tmp_path / "base", modules)
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    assert plan.sources.keys() == {name for name in names if ".layers.2." not in name}


def test_of_a_single_file_and_an_index_the_file_counts(tmp_path):
    """As for transformers."""
    llama().save_pretrained(tmp_path)
    (tmp_path / merged.INDEX).write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    assert "lm_head.weight" in merged.plan({}, (), Whole(), tmp_path).sources


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_finely_weights_are_stored(tmp_path, dtype):
    llama().to(dtype).save_pretrained(tmp_path)
    assert merged.plan({}, (), Whole(), tmp_path).half is (dtype == torch.bfloat16)


def test_one_file_at_a_time(tmp_path, monkeypatch):
    model = llama(layers=3)
    model.save_pretrained(tmp_path / "base", max_shard_size=20_000)
    monkeypatch.setattr(merged, "SHARD", 20_000)
    held, most = 0, 0
    read, save = merged._tensor, merged.save_file

    def tensor(base, source):
        nonlocal held, most
        value = read(base, source)
        held += value.nbytes
        most = max(most, held)
        return value

    def saved(tensors, *args, **kwargs):
        nonlocal held
        held -= sum(tensor.nbytes for tensor in tensors.values())
        save(tensors, *args, **kwargs)

    monkeypatch.setattr(merged, "_tensor", tensor)
    monkeypatch.setattr(merged, "save_file", saved)
    name = "model.layers.0.mlp.up_proj"
    merge({name: low_rank(89, 48)}, (), tmp_path / "base", tmp_path / "merged")
    assert held == 0
    assert most <= 20_000


def test_bfloat16_stays_and_its_rounding_is_told(tmp_path):
    model = llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj"
    layer = low_rank(48, 48)
    done = merge({name: layer}, (), tmp_path / "base", tmp_path / "merged")
    weight, after = model.get_submodule(name).weight, written(tmp_path / "merged")[f"{name}.weight"]
    assert after.dtype == torch.bfloat16
    delta = layer.b @ layer.a
    assert torch.equal(after, (weight.float() + delta).bfloat16())  # rounded once, from float32
    lost = (after.float() - weight.float() - delta).norm() / delta.norm()
    assert done.rounding == pytest.approx(float(lost))
    assert 1e-4 < done.rounding < 0.1


def test_a_merge_that_changes_nothing_is_refused(tmp_path):
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"takes away every change the adapter makes.*What works: `--format lora`"):
        merge({"model.layers.0.self_attn.q_proj": low_rank(48, 48, scale=1e-5)}, (), tmp_path / "base", tmp_path / "merged")


def test_what_lies_beside_the_weights_comes_along(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    for name in (
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "modeling_mine.py",
        "LICENSE",
        "README.md",
        "optimizer.bin",
    ):
        (tmp_path / "base" / name).write_text(name)
    merge({"model.layers.0.self_attn.q_proj": low_rank(48, 48)}, (), tmp_path / "base", tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "merges.txt", "chat_template.jinja"),
        *("modeling_mine.py", "LICENSE"),
    }
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("layers", "others", "message"),
    [
        ({"lm_head": (97, 48)}, [], "has no lm_head.weight to merge into"),
        (
            {"model.layers.0.self_attn.q_proj": (48, 40)},
            [],
            r"has shape \(48, 48\) in the checkpoint, the adapter is for \(48, 40\)",
        ),
        ({"model.layers.0.self_attn.q_proj": (48, 48)}, ["score"], "has no score.weight, which the adapter replaces"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, layers, others, message):
    qwen2().save_pretrained(tmp_path / "base")
    replaced = Whole({f"{name}.weight": torch.zeros(2, 2) for name in others})
    with pytest.raises(ValueError, match=f"--format merged: .*{message}.*What works: "):
        merge({name: low_rank(*sizes) for name, sizes in layers.items()}, (), tmp_path / "base", tmp_path / "merged", replaced)


def test_bases_that_cannot_be_merged_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"base_model: .* has no model\.safetensors"):
        merged.base_folder(str(tmp_path), None)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert merged.base_folder(str(tmp_path), None) == tmp_path
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"base_model: .* is quantised already \(gptq\)"):
        merged.base_folder(str(tmp_path), None)
