"""Every suite in example_configs/bench/ is valid, and so is Axolotl's YAML of each of its runs, up to the download."""

import pytest
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer

from axolotl_qtha.bench.suite import execution as module
from axolotl_qtha.bench.suite.execution import Execution
from axolotl_qtha.bench.suite.score import question_and_answer
from axolotl_qtha.bench.suite.spec import LINEAR, read_suite, search
from axolotl_qtha.bench.tasks import high_rank

from ...e2e.commands import QUICKSTART
from ...test_examples import MODELS, SUITES

SHAPES = MODELS | {  # the last two: what a make_base.py would make
    "base-384": (4, 384, 1056, 384, 192),
    "smollm2/base": (30, 576, 1536, 576, 192),
}
HUB = [path for path in SUITES if "-" in path.stem or path.stem == "paper"]


@pytest.fixture
def made(request, monkeypatch):
    """The execution of a suite, which is given the layers of its base if that is not here."""
    path = request.param
    suite = read_suite(path)
    if name := next((name for name in SHAPES if suite.base_model.endswith(f"/{name}")), None):
        count, hidden, inter, query, kv = SHAPES[name]
        sizes = [(hidden, query), (hidden, kv), (hidden, kv), (query, hidden), (hidden, inter), (hidden, inter), (inter, hidden)]
        each = count if suite.variants else 1  # what layers share depends on their number; else one block is as all others
        layers = [{name: nn.Linear(*size, device="meta") for name, size in zip(LINEAR, sizes, strict=True)} for _ in range(each)]
        monkeypatch.setattr(module, "read_base", lambda _: nn.ModuleDict({"layers": nn.ModuleList(map(nn.ModuleDict, layers))}))
    if path not in HUB:
        monkeypatch.chdir(QUICKSTART.parents[1])
    for split in high_rank.COUNTS:
        monkeypatch.setitem(high_rank.COUNTS, split, 1)
    return Execution(suite)


@pytest.mark.slow
@pytest.mark.parametrize("made", SUITES, indirect=True, ids=lambda path: path.stem)
def test_every_run_is_valid(made, tmp_path):
    made.folder = tmp_path  # of the tasks' data
    seen = set()
    for cell in search(made.suite):
        if (cell.task, cell.method) in seen:  # rates differ in a number alone
            continue
        seen.add((cell.task, cell.method))
        task = made.prepared(cell.task)
        for test in [False, True] if task.test else [False]:
            raw = {**made.keys(cell), **task.keys(test), "output_dir": str(tmp_path / "out")}
            config = DictDefault(raw)
            prepare_plugins(config)
            valid = validate_config(config)
            assert set(raw) <= set(valid), "Axolotl dropped a key it does not know"
            assert valid.test_datasets[0].split in raw["test_datasets"][0]["split"]
    assert len(seen) == len(made.suite.task_names) * len(made.sizes)
    counts = {(method.adapter, method.rank): size.parameters for method, size in made.sizes.items()}
    if made.suite.qtha:  # sizes of its own
        return
    for rank in made.suite.ranks:
        if "smollm2" in made.suite.output_dir:
            assert all(counts[name, rank] <= 0.24 * counts["lora", rank] for name in made.suite.variants)
        assert counts["qtha", rank] <= 0.24 * counts["lora", rank]
        assert counts["lora-equal", rank] >= counts["qtha", rank] if "lora-equal" in made.suite.adapters else True


# Rows with the fields of the Hub's data sets: question, answer, others.
ROWS = {
    "gsm8k": {"question": "What is 3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    "CAS-SIAT-XinHai/CPsyCoun": {"instruction": "我睡不好。", "output": "从什么时候开始的。", "input": "", "history": []},
    "meta-math/MetaMathQA": {"query": "What is 3 + 4?", "response": "3 + 4 = 7. The answer is: 7", "type": "GSM_Rephrased"},
}


@pytest.mark.parametrize("path", HUB, ids=lambda path: path.stem)
def test_rows_of_the_hub_become_questions_and_answers(path):
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    (task,) = read_suite(path).tasks
    for entry in [task.train, task.validation, task.test]:
        row = next(row for name, row in ROWS.items() if name in entry["path"])
        config = DictDefault({**task.settings, "datasets": [entry], "dataset_num_proc": 1})
        data = config.datasets[0]
        kind = data.type if isinstance(data.type, str) else None
        made, _ = get_dataset_wrapper(data, tokenizer, config, kind, Dataset.from_list([row]))
        question, answer = (tokenizer.decode(ids, skip_special_tokens=True) for ids in question_and_answer(made[0]))
        first, last = (row[key] for key in list(row)[:2])
        assert first in question
        assert last not in question
        assert answer.strip() == last
