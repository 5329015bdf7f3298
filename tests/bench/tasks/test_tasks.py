"""The tasks' data: the same each time, in three parts that share nothing, and read by Axolotl as they are meant."""

import json
from collections import Counter

import pytest
import torch
import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_qtha.bench.tasks import TASKS, Data, Task, arithmetic, domain, high_rank, prepare
from axolotl_qtha.bench.tasks.task import SPLITS, read

from ...e2e.commands import QUICKSTART

BASE = QUICKSTART / "base"
FEW = {"train": 12, "validation": 6, "test": 6}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(high_rank, "COUNTS", FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_same_data_each_time_and_no_row_twice_over_the_parts(name, tmp_path, few):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        TASKS[name].write(BASE, tmp_path / folder)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert {f"{split}.jsonl" for split in SPLITS} <= set(files)
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    parts = [{json.dumps(row) for row in read(tmp_path / "first" / f"{split}.jsonl")} for split in SPLITS]
    assert len(parts[0] | parts[1] | parts[2]) == sum(map(len, parts))


def test_arithmetic_is_right_and_its_parts_share_no_numbers(tmp_path):
    arithmetic.write(BASE, tmp_path)
    numbers = {}
    for split in SPLITS:
        rows = read(tmp_path / f"{split}.jsonl")
        assert len(rows) == arithmetic.COUNTS[split]
        for row in rows:
            steps = arithmetic.STEP.findall(row["output"])
            for left, sign, right, result in steps:
                assert (int(left) + int(right) if sign == "+" else int(left) - int(right)) == int(result)
                assert 1 <= int(result) <= arithmetic.MOST
            assert row["output"].endswith(f"The answer is {steps[-1][3]}.")
            assert row["instruction"].startswith(next(name for name in arithmetic.NAMES if name in row["instruction"]))
        numbers[split] = {tuple(arithmetic.STEP.findall(row["output"])) for row in rows}
    assert not numbers["train"] & (numbers["validation"] | numbers["test"])
    assert not numbers["validation"] & numbers["test"]
    # every step of the problems held out is in the training set: what is new is their combination
    known = {step for steps in numbers["train"] for step in steps}
    held_out = {step for steps in numbers["validation"] | numbers["test"] for step in steps}
    assert held_out <= known


def test_domain_is_the_quickstarts_data(tmp_path):
    domain.write(BASE, tmp_path)
    sizes = Counter({split: len(read(tmp_path / f"{split}.jsonl")) for split in SPLITS})
    assert sizes == {"train": 756, "validation": 72, "test": 72}
    with pytest.raises(ValueError, match=r"tasks: 'domain' needs the quickstart's data.*What works"):
        domain.write(tmp_path / "elsewhere" / "base", tmp_path)


def test_the_teachers_update_is_of_high_rank():
    generator = torch.Generator().manual_seed(0)
    for shape in ((128, 352), (64, 128)):
        weight = torch.randn(shape, generator=generator)
        singular = torch.linalg.svdvals(high_rank.update(weight, generator))
        rank = min(high_rank.RANK, *shape)
        assert float(singular[:rank].max() / singular[:rank].min()) == pytest.approx(1, abs=1e-4)
        assert singular[rank:].max() < 1e-4 if len(singular) > rank else True
        assert float(singular.norm() / weight.norm()) == pytest.approx(high_rank.SIZE, rel=1e-4)
        left = singular[8:].norm() / singular.norm()  # of the best approximation of rank 8
        assert float(left) == pytest.approx((1 - 8 / rank) ** 0.5, rel=1e-4)


def test_the_teacher_predicts_its_texts_better_than_the_base():
    model = high_rank.teacher(BASE)
    ids = high_rank.sample(model, 24, 64, torch.Generator().manual_seed(3))
    assert ids.shape == (24, 64)
    assert set(ids[:, 0].tolist()) == {model.config.bos_token_id}
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    assert 0.5 < high_rank.loss(base, ids) - high_rank.loss(model, ids) < 1.5
    # written with its cache as without: the distribution of the last token from the whole text
    with torch.no_grad():
        logits = model(input_ids=ids[:2]).logits
    chosen = logits.log_softmax(-1)[:, :-1].gather(2, ids[:2, 1:, None])
    assert float(chosen.mean()) > -6  # random tokens have -7.6


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TASKS))
def test_axolotl_reads_it_as_it_is_meant(name, tmp_path, few):
    task = prepare(TASKS[name], str(BASE), tmp_path)
    keys = {"base_model": str(BASE), "adapter": "lora", "lora_r": 2, "lora_alpha": 4, "lora_target_modules": ["q_proj"]}
    keys |= {
        "learning_rate": 1e-3,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
        "dataset_num_proc": 1,
    }
    keys |= {"output_dir": str(tmp_path / "out"), "dataset_prepared_path": str(tmp_path / "prepared"), "bf16": False}
    keys |= {"val_set_size": 0.0, "sequence_len": 256, **task.keys()}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(keys))
    meta = load_datasets(cfg=load_cfg(str(tmp_path / "config.yml")))
    rows = read(tmp_path / next(path.name for path in tmp_path.iterdir() if path.name.startswith(name)) / "validation.jsonl")
    assert len(meta.eval_dataset) == len(rows)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    found = sorted(meta.eval_dataset, key=lambda row: row["input_ids"])
    if name == "high_rank":
        assert [row["input_ids"] for row in found] == sorted(row["input_ids"] for row in rows)
        assert all(row["labels"] == row["input_ids"] for row in found)
        assert set(task.floor) == {"validation", "test"}
        return
    answers = Counter(row["output"] for row in rows)
    for row in meta.eval_dataset:
        trained = [label for label in row["labels"] if label != -100]
        assert trained[-1] == tokenizer.eos_token_id
        answers[tokenizer.decode(trained[:-1]).strip()] -= 1
    assert not any(answers.values())
    assert task.rows
    assert task.scoring


def test_data_are_made_once_and_whole(tmp_path):
    calls = []

    def write(base, folder):
        calls.append(folder)
        for split in SPLITS:
            (folder / f"{split}.jsonl").write_text('{"text": "a"}\n')
        if len(calls) == 1:
            raise KeyboardInterrupt

    task = Task("made", "made here", {"ds_type": "json", "type": "completion"}, {}, write)
    with pytest.raises(KeyboardInterrupt):
        prepare(task, str(BASE), tmp_path)
    assert not list(tmp_path.iterdir())
    first, second = (prepare(task, str(BASE), tmp_path) for _ in range(2))
    assert len(calls) == 2
    assert first == second
    assert first.keys()["datasets"][0]["path"].endswith("train.jsonl")
    assert first.keys(test=True)["test_datasets"][0]["path"].endswith("test.jsonl")


def test_a_block_of_ones_own():
    block = Data(name="mine", train={"path": "a"}, validation={"path": "b"}, settings={"sequence_len": 99})
    task = prepare(block, "any", None)
    assert task.keys() == {"sequence_len": 99, "datasets": [{"path": "a"}], "test_datasets": [{"path": "b"}]}
    assert task.test is None
