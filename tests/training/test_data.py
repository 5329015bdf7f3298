"""Data with nothing to train on: refused before the base is loaded, or before the first step where they are streamed."""

import json

import pytest
from datasets import Dataset

from axolotl_qtha.training import data
from tests.e2e.commands import train_here, write_config
from tests.e2e.ranks import config_for

pytestmark = pytest.mark.e2e
LONG = "word " * 400


def alpaca(instruction="hi", output="there"):
    return {"instruction": instruction, "input": "", "output": output}


def intel(question="hi", chosen="yes", rejected="no"):
    return {"system": "", "question": question, "chosen": chosen, "rejected": rejected}


def messages(*roles):
    return {"messages": [{"role": role, "content": "words"} for role in roles]}


def config(folder, rows, kind="alpaca", key="datasets", **changes):
    file = folder / "rows" / "rows.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"path": str(file), "ds_type": "json", "type": kind, "split": "train"}
    if key == "pretraining_dataset":
        changes["datasets"], entry = None, {"path": str(file.parent), "split": "train", "type": "pretrain"}
    if key != "test_datasets":
        changes["test_datasets"] = None
    changes = {"max_steps": 1, "save_steps": None, "eval_steps": None, "micro_batch_size": 2, **changes}
    return write_config(folder, **{key: [entry], **changes})


ROWS = {
    "long, dropped": ([alpaca(LONG)] * 4, {}, ["no row is left", "Dropped 4 sequences", "sequence_len:` (now 256)"]),
    "long, cut": ([alpaca(LONG)] * 4, {"excess_length_strategy": "truncate"}, ["none of 4 rows", "(-100)", "Truncated"]),
    "null answers": ([alpaca(output=None)] * 4, {}, ["none of 4 rows", "(-100)", "column 'output'", "train_on_inputs: true"]),
    "no file content": ([], {}, ["no row is left"]),
    "no column": ([{"instruction": "a", "input": ""}] * 4, {}, ["there is no column 'output'", "(type: alpaca)"]),
    "packed, long": ([alpaca(LONG)] * 4, {"sample_packing": True}, ["no row is left", "Dropped 4 sequences"]),
    "packed, cut": ([alpaca(LONG)] * 4, {"sample_packing": True, "excess_length_strategy": "truncate"}, ["no trainable tokens"]),
    "no texts": ([{"text": ""}] * 4, {"kind": "completion"}, ["no row is left", "column 'text'"]),
    "null messages": ([{"messages": None}] * 4, {"kind": "chat_template", "chat_template": "chatml"}, ["a row cannot be read"]),
    "no assistant": ([messages("user")] * 4, {"kind": "chat_template", "chat_template": "chatml"}, ["(-100)", "'messages'"]),
    "test, null": ([alpaca(output=None)] * 4, {"key": "test_datasets"}, ["test_datasets: ", "none of 4 rows", "evaluate on"]),
    "test, no column": ([{"a": 1}] * 4, {"key": "test_datasets"}, ["test_datasets: ", "no column 'instruction'"]),
    "test, empty": ([], {"key": "test_datasets"}, ["test_datasets: ", "no row is left"]),
    "dpo, long": ([intel(LONG)] * 4, {"rl": "dpo", "kind": "chatml.intel"}, ["no row is left", "Dropped 4 long samples"]),
    "dpo, null": ([intel(chosen=None, rejected=None)] * 4, {"rl": "dpo", "kind": "chatml.intel"}, ["answers are empty"]),
    "dpo, empty": ([], {"rl": "dpo", "kind": "chatml.intel"}, ["no row is left"]),
    "dpo, no column": ([{"question": "a", "chosen": "b"}] * 4, {"rl": "dpo", "kind": "chatml.intel"}, ["no column 'rejected'"]),
    "streamed, null": ([alpaca(output=None)] * 40, {"streaming": True, "max_steps": 2}, ["all labels of the first", "(-100)"]),
    "streamed, empty": ([], {"streaming": True, "max_steps": 2}, ["no row is left"]),
    "streamed, no column": ([{"a": "b"}] * 40, {"streaming": True, "max_steps": 2}, ["no column 'instruction'"]),
    "pretraining, empty": ([], {"key": "pretraining_dataset", "max_steps": 2}, ["pretraining_dataset: ", "no row is left"]),
    "pretraining, no column": ([{"a": "b"}] * 9, {"key": "pretraining_dataset", "max_steps": 2}, ["no column 'text'"]),
}


@pytest.mark.parametrize(("rows", "changes", "words"), ROWS.values(), ids=ROWS)
def test_nothing_to_train_on(tmp_path, rows, changes, words):
    path = config(tmp_path, rows, **changes)
    with pytest.raises(ValueError, match=r"leaves nothing to .*What works: ") as error:
        train_here(path)
    for word in (*words, "sequence_len", str(tmp_path / "rows")):
        assert word in str(error.value)
    assert not list(tmp_path.rglob("adapter_model*"))


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [None, True])
def test_every_rank_stops(servers, tmp_path, streaming):
    file = tmp_path / "rows.jsonl"
    file.write_text((json.dumps(alpaca(output=None)) + "\n") * 40)
    entry = {"path": str(file), "ds_type": "json", "type": "alpaca", "split": "train"}
    changes = {"streaming": streaming, "test_datasets": None, "eval_steps": None}
    printed = servers.train(config_for(tmp_path / "run", "ddp", datasets=[entry], **changes), "ddp", fails=True)
    assert printed.count("ValueError: datasets: ") >= 2, printed[-3000:]
    assert "leaves nothing to train on" in printed
    assert not list(tmp_path.rglob("adapter_model*"))


HEALTHY = {
    "alpaca, packed": ([alpaca()] * 40, {"sample_packing": True}),
    "chat": ([messages("user", "assistant")] * 4, {"kind": "chat_template", "chat_template": "chatml"}),
    "completion": ([{"text": "some words"}] * 4, {"kind": "completion"}),
    "dpo": ([intel()] * 4, {"rl": "dpo", "kind": "chatml.intel"}),
    "streamed": ([alpaca()] * 40, {"streaming": True}),
    "streamed, labels late": ([alpaca(output=None)] * 6 + [alpaca()] * 34, {"streaming": True}),
    "pretraining": ([{"text": "some words of text"}] * 40, {"key": "pretraining_dataset"}),
}


@pytest.mark.parametrize(("rows", "changes"), HEALTHY.values(), ids=HEALTHY)
def test_healthy_data_train(tmp_path, rows, changes):
    trainer = train_here(config(tmp_path, rows, **{"max_steps": 5, **changes}))[2]
    assert trainer.state.global_step == 5
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


class Cfg(dict):
    """As Axolotl's: what is not set is None."""

    def __getattr__(self, name):
        return self.get(name)

    def __missing__(self, name):
        return None


CFG = Cfg(datasets=[{"path": "rows", "type": "alpaca"}], sequence_len=9)


def test_rows_are_looked_at_until_one_counts(caplog):
    masked, counted = [[-100, -100]], [[-100, 5]]
    data.check(CFG, "datasets", Dataset.from_dict({"labels": masked * 2500 + counted}), [])
    assert "1,000 of the first 1,000 rows have nothing to learn from" in caplog.text
    caplog.clear()
    data.check(CFG, "datasets", Dataset.from_dict({"labels": masked * 3 + counted * 3}), [])
    assert not caplog.text
    with pytest.raises(ValueError, match=r"none of 2,500 rows"):
        data.check(CFG, "datasets", Dataset.from_dict({"labels": masked * 2500}), [])


def test_what_axolotl_says_itself_is_left():
    assert data._why(ValueError("unhandled prompt tokenization strategy: x")) is None
