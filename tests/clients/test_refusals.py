"""What clients do with exports that not all of them read, in their own words: the second table of docs/export.md.

Where a client's next version reads one, its test fails: then the rules in axolotl_qtha/trained/clients.py change, too.
"""

import re

import pytest

from .clients import TOLERANCE, ask, difference, interpreter, prompts, whole_table
from .models import CIRCUIT, LINEAR

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not whole_table(), reason="the whole table needs `bash tests/clients/environments.sh peft`"),
]

HEAD = {**LINEAR, "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"]}
EXPORTS = {
    "`--constant bias`": ("Llama", CIRCUIT, ["--constant", "bias"]),
    "`modules_to_save: [embed_tokens]`": ("Llama", {**LINEAR, "modules_to_save": ["embed_tokens"]}, []),
    "`lm_head` adapted, tied Llama": ("Llama", HEAD, []),
    "`lm_head` adapted, untied Qwen2": ("Qwen2, untied", HEAD, []),
    "rank 32": ("Llama", {**LINEAR, "rank": 32, "param_budget": None}, []),
}
READ = None  # the client computes what PEFT does
ANOTHER = "reads it as another model"
# By client: further options for each run, and what becomes of each export, in the order above
EXPECTED = {
    "peft": ({}, [READ, READ, READ, READ, READ]),
    "peft, merging": ({"merge": True}, ["Impossible to merge LoRA with `lora_bias=True`", READ, ANOTHER, READ, READ]),
    "vllm": (
        {},
        [
            r"vLLM does not support LoRA bias",
            r"Unsupported modules_to_save: \['embed_tokens'\]",
            READ,
            r"expected target modules in .* but received \['lm_head', 'lm_head'\]",
            "LoRA rank 32 is greater than max_lora_rank 16",
        ],
    ),
    "vllm, max_lora_rank 32": ({"max_lora_rank": 32}, [..., ..., ..., ..., READ]),
    "llamacpp": (
        {},
        [
            r"convert_lora_to_gguf.py: Unexpected name '\S+lora_B\.bias': Not a lora_A or lora_B tensor",
            r"convert_lora_to_gguf.py: Unexpected name '\S+embed_tokens\.weight': Not a lora_A or lora_B tensor",
            "llama.cpp: .*LoRA tensor 'output.weight' does not exist in base model",
            READ,
            READ,
        ],
    ),
}


@pytest.fixture(scope="session")
def runs(workshop):
    """Return by title what each client is asked."""
    asked = {}
    for title, (base, block, options) in EXPORTS.items():
        lora = workshop.exported(workshop.trained(base, block)[0], *options)
        asked[title] = {"model": str(workshop.base(base)), "lora": str(lora)}
    return asked


@pytest.fixture(scope="session")
def by_peft(runs, tmp_path_factory):
    return ask("peft", runs, prompts(), tmp_path_factory.mktemp("peft"))


@pytest.mark.parametrize("client", EXPECTED)
def test_what_becomes_of_it(client, request, table, tmp_path):
    program = client.partition(",")[0]
    interpreter(program)  # skips before anything is trained
    runs, by_peft = request.getfixturevalue("runs"), request.getfixturevalue("by_peft")
    options, expected = EXPECTED[client]
    asked = {title: {**runs[title], **options} for title, what in zip(EXPORTS, expected, strict=True) if what is not ...}
    answers = ask(program, asked, prompts(), tmp_path)
    wrong = {}
    for title, what in zip(EXPORTS, expected, strict=True):
        if title not in asked:
            continue
        said = answers[title].get("error", "")
        found = difference(answers[title]["logprobs"], by_peft[title]["logprobs"]) if not said else 0.0
        table.refusals.setdefault(title, {})[client] = said.replace(runs[title]["lora"], "EXPORT") or found
        right = (
            not said and found < TOLERANCE if what is READ else found > TOLERANCE if what is ANOTHER else re.search(what, said)
        )
        if not right:
            wrong[title] = said or found
    assert wrong == {}
