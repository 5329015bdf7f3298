"""What clients compute from an export, beside what PEFT computes from the LoRA, in float32.

    bash tests/clients/environments.sh && CLIENTS_TABLE=clients.md pytest -n 0 -s tests/clients

prints the tables of docs/export.md, and writes them to the file.
"""

import pytest
import torch

from .clients import TOLERANCE, ask, difference, interpreter, prompts, whole_table
from .models import CIRCUIT, LINEAR

pytestmark = pytest.mark.clients

ADAPTERS = [
    *((base, surrogate) for base in ("Llama", "Qwen2") for surrogate in ("linear", "wide", "distilled", "none")),
    ("Qwen2, untied", "linear"),
]


@pytest.fixture(scope="session")
def runs(workshop):
    """Return by title what each client is asked, and by title which of PEFT's answers it is to give."""
    asked, expected = {}, {}
    for base, surrogate in ADAPTERS if whole_table() else ADAPTERS[:1]:
        circuit = surrogate != "none"
        config, _ = workshop.trained(base, CIRCUIT if circuit else LINEAR)
        options = ["--surrogate", surrogate] if circuit else []
        title = f"{base}, `{'--surrogate ' + surrogate if circuit else 'quantum: none'}`"
        asked[title] = {"model": str(workshop.base(base)), "lora": str(workshop.exported(config, *options))}
        merged = workshop.exported(config, *options, "--format", "merged", "--constant", "drop")
        asked[f"{title}, merged"] = {"model": str(merged), "lora": None}
        expected[title] = expected[f"{title}, merged"] = title
    if not whole_table():
        return asked, expected
    # a merged model's constants are in the biases that the base has, which no LoRA of the default options holds
    title = "Qwen2, `--surrogate linear`, merged, constants in its biases"
    merged = workshop.exported(workshop.trained("Qwen2", CIRCUIT)[0], "--format", "merged")
    asked[title], expected[title] = {"model": str(merged), "lora": None}, title
    return asked, expected


@pytest.fixture(scope="session")
def by_peft(runs, workshop, tmp_path_factory):
    bases = {base: {"model": str(workshop.base(base)), "lora": None} for base in {title.partition(", `")[0] for title in runs[0]}}
    return ask("peft", {**runs[0], **bases}, prompts(), tmp_path_factory.mktemp("peft"))


def compared(client, answers, by_peft, expected, table):
    """Note all differences, then fail the test if one is too large."""
    wrong = {}
    for title, reference in expected.items():
        said = answers[title].get("error")
        found = said or difference(answers[title]["logprobs"], by_peft[reference]["logprobs"])
        itself = client == "peft" and title == reference
        table.differences.setdefault(title, {})[client] = "compared with" if itself and not said else found
        if said or not found < TOLERANCE:
            wrong[title] = found
    assert wrong == {}


def test_peft_reads_loras_and_merged_models(by_peft, runs, table):
    compared("peft", by_peft, by_peft, runs[1], table)
    for title, run in runs[0].items():
        if run["lora"] is not None:
            unadapted = by_peft[title.rpartition(", ")[0]]["logprobs"]
            assert difference(by_peft[title]["logprobs"], unadapted) > 0.1, title  # it has learnt something


@pytest.mark.skipif(not whole_table(), reason="one adapter only: the whole table needs `bash tests/clients/environments.sh peft`")
@pytest.mark.parametrize("base", ["Llama", "Qwen2"])
def test_without_a_circuit_peft_computes_what_the_trained_adapter_does(base, by_peft, workshop):
    model = workshop.trained(base, LINEAR)[1]
    trained = []
    for ids in map(torch.tensor, prompts()):
        with torch.no_grad():
            of_all = model(ids[None]).logits.float().log_softmax(-1)[0, :-1]
        trained.append(of_all.gather(-1, ids[1:, None])[:, 0].tolist())
    assert difference(trained, by_peft[f"{base}, `quantum: none`"]["logprobs"]) < TOLERANCE


@pytest.mark.parametrize("client", ["vllm", "llamacpp"])
def test_it_computes_what_peft_does(client, request, table, tmp_path):
    interpreter(client)  # skips before anything is trained
    asked, expected = request.getfixturevalue("runs")
    compared(client, ask(client, asked, prompts(), tmp_path), request.getfixturevalue("by_peft"), expected, table)
