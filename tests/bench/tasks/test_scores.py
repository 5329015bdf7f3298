"""How answers are scored, and written."""

import pytest
import torch
from axolotl.prompters import AlpacaPrompter
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_qtha.bench.tasks.answers import overlap, prompts, write_answers
from axolotl_qtha.bench.tasks.arithmetic import METRICS, grade, marks

from ...e2e.commands import QUICKSTART

TRUE = "5 + 3 = 8. 8 - 2 = 6. The answer is 6."


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (TRUE, (1, 1, 1, 1)),
        (f"{TRUE}\n", (1, 1, 1, 1)),
        ("5 + 3 = 8. 8 - 2 = 6. The answer is 7.", (0, 0, 1, 1)),
        ("5 + 3 = 9. 9 - 2 = 6. The answer is 6.", (0, 1, 1, 1)),  # the right answer by wrong steps
        ("The answer is 6.", (0, 1, 1, 0)),
        ("5 + 3 = 8. The answer is 6.", (0, 1, 1, 0)),
        ("5 + 3 = 8. 8 - 2 = 6.", (0, 1, 0, 1)),  # the last number is right, the line is missing
        ("5 + 3 = 8. 8 - 2 = 6. The answer is 6. The answer is 6.", (0, 1, 0, 1)),
        ("5 + 3 = 8. 8 - 2 = 6. The answer is 6. So", (0, 1, 0, 1)),
        ("5+3=8. 8-2=6. The answer is 6.", (0, 1, 1, 0)),
        ("5 + 3 = 8. 8 - 2 = 6. 6 + 0 = 6. The answer is 6.", (0, 1, 1, 1)),
        ("", (0, 0, 0, 0)),
        ("six", (0, 0, 0, 0)),
    ],
)
def test_marks(written, expected):
    assert tuple(marks(written, TRUE)[name] for name in METRICS) == expected
    assert list(METRICS) == ["strict_accuracy", "accuracy", "answer_completeness", "chain_of_thought_completeness"]


def test_grades_are_means():
    found = grade([TRUE, "The answer is 6.", "no", TRUE], [TRUE] * 4)
    assert found == {
        "strict_accuracy": 0.5,
        "accuracy": 0.75,
        "answer_completeness": 0.75,
        "chain_of_thought_completeness": 0.5,
    }


def test_overlap_by_hand():
    same = overlap(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert same == pytest.approx({"rouge1": 100, "rouge2": 100, "rougeL": 100, "bleu4": 100})
    found = overlap(["the cat sat on the mat", "a b"], ["the cat lay on the mat", "c d"])
    # of 6 words 5 are shared, of 5 pairs 3, in order 5; the other answer shares nothing
    assert found["rouge1"] == pytest.approx(100 * (5 / 6) / 2)
    assert found["rouge2"] == pytest.approx(100 * (3 / 5) / 2)
    assert found["rougeL"] == pytest.approx(100 * (5 / 6) / 2)
    assert 0 < found["bleu4"] < 60


def test_prompts_are_axolotls():
    rows = [{"instruction": "Why?", "input": ""}, {"instruction": "Why?", "input": "this"}]
    assert prompts(rows) == [
        next(iter(AlpacaPrompter().build_prompt("Why?"))),
        next(iter(AlpacaPrompter().build_prompt("Why?", "this"))),
    ]
    assert prompts(rows)[0].endswith("### Response:\n")


def test_answers_written_together_are_those_written_alone():
    base = QUICKSTART / "base"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    rows = [{"instruction": text} for text in ("What is a qubit?", "What does `run` do, and why is it called so often?")]
    together = write_answers(model, tokenizer, rows, 12)
    for row, answer in zip(rows, together, strict=True):
        ids = tokenizer(prompts([row])[0], return_tensors="pt")["input_ids"]
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True).strip() == answer
