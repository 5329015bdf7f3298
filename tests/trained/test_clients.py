"""What other programs read: the rules, and who is told what. `tests/clients/` holds them against the programs."""

import re

import pytest

from axolotl_qtha.trained.clients import Exported, limits, told, unmergeable, vllm_rank


@pytest.mark.parametrize(
    ("lora", "clients", "words"),
    [
        (Exported(8, bias=True), ["vLLM", "llama.cpp"], "lora_bias"),
        (Exported(8, whole=("embed_tokens",)), ["vLLM", "llama.cpp"], r"modules_to_save: \['embed_tokens'\]"),
        (Exported(8, vocabulary=2049), ["vLLM", "llama.cpp"], "2,049 rows"),
        (Exported(513), ["vLLM"], "rank is 513"),
        (Exported(8, overrides={"rope_theta": 2.0}), ["vLLM", "llama.cpp"], r"overrides_of_model_config: \['rope_theta'\]"),
        (Exported(8, model_type="gpt2"), ["vLLM"], "no LoRA for gpt2"),
        (Exported(8, head="lm_head", tied=True, model_type="llama"), ["llama.cpp"], "lm_head has a LoRA, and its weight"),
        (Exported(8, head="lm_head", model_type="qwen2"), ["vLLM"], "lm_head has a LoRA, which vLLM reads for few models"),
    ],
)
def test_what_is_not_read(lora, clients, words):
    ((limit, found),) = told(lora).items()
    assert found == clients
    assert re.search(words, limit)
    assert limits("PEFT", lora) == []


def test_a_plain_one_is_read_by_all():
    assert told(Exported(8, head="lm_head", model_type="llama")) == {}
    assert told(Exported(512)) == {}
    assert unmergeable(Exported(512)) is None


@pytest.mark.parametrize(("rank", "option"), [(4, None), (16, None), (17, 32), (320, 320), (400, 512), (600, None)])
def test_vllms_rank(rank, option):
    assert vllm_rank(rank) == option
