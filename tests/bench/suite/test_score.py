"""Scores of answers to data of one's own."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from axolotl_qtha.bench.suite import score
from axolotl_qtha.bench.suite.block import Block, ready
from axolotl_qtha.bench.tasks.answers import generate, overlap

from ...e2e.commands import QUICKSTART

ENTRY = {"path": "org/data", "type": "alpaca"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(QUICKSTART / "base")


class Copies:
    """A model that answers with the tokens it is told to, question by question."""

    def __init__(self, answers, end):
        self.answers, self.end, self.asked = answers, end, []

    def get_input_embeddings(self):
        return SimpleNamespace(weight=torch.zeros(1))

    def generate(self, input_ids, attention_mask, max_new_tokens, pad_token_id, **_):
        self.asked += [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        rows = [[*self.answers.pop(0), self.end][:max_new_tokens] for _ in input_ids]
        new = torch.tensor([row + [pad_token_id] * (max_new_tokens - len(row)) for row in rows])
        return torch.cat([input_ids, new], dim=1)


@pytest.mark.parametrize(
    ("labels", "question", "answer"),
    [
        ([-100, -100, 7, 8], [5, 6], [7, 8]),
        ([-100, 6, -100, 8], [5, 6, 7], [8]),  # of several turns the last
        ([-100, 6, 7, -100], [5], [6, 7]),
    ],
)
def test_the_question_is_what_comes_before_the_last_answer(labels, question, answer):
    assert score.question_and_answer({"input_ids": [5, 6, 7, 8], "labels": labels}) == (question, answer)


@pytest.mark.parametrize("labels", [[5, 6], [-100, -100]])
def test_rows_without_a_question_are_refused(labels):
    with pytest.raises(ValueError, match=r"score: rows without a question. What works: .*`train_on_inputs: false`"):
        score.question_and_answer({"input_ids": [5, 6], "labels": labels})


def rows_of(tokenizer, pairs):
    rows = []
    for question, answer in pairs:
        before, after = tokenizer(question)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": before + after, "labels": [-100] * len(before) + after})
    return rows


def test_arithmetic(tokenizer):
    rows = rows_of(tokenizer, [("3 + 4?", "#### 7"), ("a longer question: 999 + 1?", "#### 1,000"), ("1 + 1?", "#### 2")])
    texts = ["It is 7", "1000", "It is two"]
    model = Copies([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], tokenizer.eos_token_id)
    found = score.score("arithmetic", 2, 64, model, tokenizer, rows)
    assert found.figures == {"accuracy": 1.0, "answer_completeness": 1.0}
    assert found.answers == [
        {"question": question, "answer": answer, "true": true, "accuracy": True, "answer_completeness": True}
        for question, answer, true in (
            ("3 + 4?", "It is 7", "#### 7"),
            ("a longer question: 999 + 1?", "1000", "#### 1,000"),
        )
    ]
    assert model.asked == [score.question_and_answer(row)[0] for row in rows[:2]], "padding is masked, later rows are not asked"
    marked = score.marks([("It is two", True), ("2", False)], ["#### 2", "#### 2"])
    assert marked == [
        {"accuracy": False, "answer_completeness": False},
        {"accuracy": True, "answer_completeness": False},
    ]
    assert score.means(marked) == {"accuracy": 0.5, "answer_completeness": 0.0}


def test_text_keeps_each_answer_with_its_own_scores(tokenizer):
    rows = rows_of(tokenizer, [("Who?", "the cat sat"), ("What?", "a b c")])
    texts = ["the cat sat", "a x y"]
    model = Copies([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], tokenizer.eos_token_id)
    found = score.score("text", 5, 64, model, tokenizer, rows)
    assert [(row["question"], row["answer"], row["true"]) for row in found.answers] == [
        ("Who?", "the cat sat", "the cat sat"),
        ("What?", "a x y", "a b c"),
    ]
    assert [row["rouge1"] for row in found.answers] == pytest.approx([100, 100 / 3])  # one word of three
    for kind in ("rouge1", "rouge2", "rougeL"):
        assert found.figures[kind] == pytest.approx(sum(row[kind] for row in found.answers) / 2)
    assert "bleu4" in found.figures


def test_an_answer_that_is_cut_off_is_not_complete(tokenizer):
    ids = tokenizer("1 2 3 4 5 6 7 8", add_special_tokens=False)["input_ids"]
    model = Copies([ids], tokenizer.eos_token_id)
    ((_, ended),) = generate(model, tokenizer, [[5, 6]], len(ids))
    assert not ended


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 1,234.5 in all", 1234.5), ("-3", -3.0), ("#### 42.", 42.0), ("7 apples, 8 pears", 8.0), ("none", None), ("", None)],
)
def test_the_last_number(text, number):
    assert score.number(text) == number


def test_text_scores():
    assert overlap(["the same words as there"], ["The same words as there"], score.words) == pytest.approx(
        {"rouge1": 100, "rouge2": 100, "rougeL": 100, "bleu4": 100}
    )
    # of four characters three are shared, and of three pairs one
    chinese = overlap(["我睡不着"], ["我睡得着"], score.words)
    assert (chinese["rouge1"], chinese["rouge2"]) == pytest.approx((75, 100 / 3))
    assert score.words("GPU的温度, 3 Ångström") == ["gpu", "的", "温", "度", "3", "ångström"]


def test_a_block_has_the_scoring_it_names(tmp_path):
    block = Block(name="mine", train=ENTRY, validation=ENTRY, test=ENTRY, score="arithmetic")
    task = ready(block, "base", tmp_path)
    assert set(task.scoring.metrics) == {"accuracy", "answer_completeness"}
    assert task.scoring.score.args == ("arithmetic", 200, 256)
    assert ready(Block(name="mine", train=ENTRY, validation=ENTRY), "base", tmp_path).scoring is None
    assert list(tmp_path.iterdir()) == []


def test_a_block_without_a_test_set_is_not_scored():
    with pytest.raises(ValueError, match=r"score: 'text' needs a test set. What works: a `test:` entry, or no `score`"):
        Block(name="mine", train=ENTRY, validation=ENTRY, score="text")
