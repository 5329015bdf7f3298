"""The text an export is fitted to."""

import json

import pytest
import torch

from axolotl_qtha.trained import calibration_text as text
from axolotl_qtha.trained.calibration_text import IGNORED, Sequence, batches, check, of_datasets, of_file, tokens


def rows(*lengths, labels=None):
    return [{"input_ids": list(range(length)), **({"labels": labels} if labels else {})} for length in lengths]


def letters(document, **_):
    """Stand for a tokenizer: a token a letter."""
    return {"input_ids": [ord(letter) for letter in document]}


def test_data_of_the_configuration():
    found = of_datasets(rows(10, 1, 10, 10), rows(6, 6), wanted=15)
    assert [len(sequence.ids) for sequence in found.fit] == [10, 10]  # until there are 15; one token predicts nothing
    assert [len(sequence.ids) for sequence in found.held_out] == [6]  # a quarter of 15
    assert found.fit[0].labels == found.fit[0].ids


def test_labels_are_kept():
    found = of_datasets(rows(4, labels=[IGNORED, 1, 2, 3]), rows(4, labels=[IGNORED, IGNORED, 2, 3]), wanted=100)
    assert found.fit[0].labels[0] == IGNORED
    assert found.held_out[0].labels[:2] == [IGNORED, IGNORED]


@pytest.mark.parametrize("lengths", [(100,), (50, 50), (78, 22), (80, 20), (1, 3, 96)])
def test_without_evaluation_data_a_fifth_is_held_out(lengths):
    found = of_datasets(rows(*lengths), None, wanted=1000)
    total = sum(length for length in lengths if length > 1)
    assert abs(tokens(found.fit) - 0.8 * total) <= 1  # never more than 4 fifths
    assert tokens(found.fit) + tokens(found.held_out) == total
    fit = {id(sequence) for sequence in found.fit}
    assert not any(id(sequence) in fit for sequence in found.held_out)
    joined = [token for sequence in (*found.fit, *found.held_out) for token in sequence.ids]
    assert joined == [token for row in rows(*lengths) if len(row["input_ids"]) > 1 for token in row["input_ids"]]


def test_a_text_file_is_cut_to_the_models_length(tmp_path):
    (tmp_path / "my.txt").write_text("abcdefgh" * 10)
    found = of_file(tmp_path / "my.txt", letters, length=7, wanted=1000)
    assert max(len(sequence.ids) for sequence in found.fit) == 7
    assert 63 <= tokens(found.fit) <= 64
    assert found.source == "my.txt"
    assert tokens(of_file(tmp_path / "my.txt", letters, length=7, wanted=20).fit) == 16


def test_json_lines(tmp_path):
    lines = [{"text": "abcde"}, {"text": "fghij"}]
    (tmp_path / "my.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    found = of_file(tmp_path / "my.jsonl", letters, length=100, wanted=1000)
    assert "".join(chr(token) for sequence in (*found.fit, *found.held_out) for token in sequence.ids) == "abcdefghij"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("missing.txt", None, "FileNotFoundError"),
        ("picture.txt", b"\xff\xd8\xff\xe0", "UnicodeDecodeError"),
        ("bad.jsonl", b"{", "JSONDecodeError"),
        ("other.jsonl", b'{"prompt": "a"}', "KeyError"),
        ("list.jsonl", b"[1]", "TypeError"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, what):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"--calibration: '.*{name}' cannot be read \({what}.*What works: a text file"):
        of_file(tmp_path / name, letters, length=8, wanted=100)


@pytest.mark.parametrize("content", ["", "a", "abcd" * 10])
def test_too_little_text_says_how_much_it_takes(tmp_path, content):
    (tmp_path / "short.txt").write_text(content)
    found = of_file(tmp_path / "short.txt", letters, length=8, wanted=1000)
    with pytest.raises(ValueError, match=r"--calibration: short.txt gives \d+ tokens .* need 80 to fit to.* at least 101 tokens"):
        check(found, 80, "--calibration")


def test_text_of_which_nothing_is_to_be_predicted():
    found = of_datasets(rows(100), rows(10, labels=[IGNORED] * 10), wanted=100)
    with pytest.raises(ValueError, match=r"datasets: .* 10 held out, 0 of them to predict"):
        check(found, 8, "datasets")
    check(of_datasets(rows(100), rows(10), wanted=100), 8, "datasets")


def test_batches_hold_every_token_once():
    sequences = [Sequence([i + 1] * i, [i + 1] * i) for i in (3, 9, 2, 20, 1, 1)]
    found = list(batches(sequences, most=20, pad=0))
    assert [tuple(batch.ids.shape) for batch in found] == [(2, 9), (1, 2), (1, 20), (2, 1)]
    for batch in found:
        assert torch.equal(batch.mask, batch.ids != 0)
        assert torch.equal(batch.labels != IGNORED, batch.mask)
    real = torch.cat([batch.ids[batch.mask] for batch in found]).tolist()
    assert real == [token for sequence in sequences for token in sequence.ids]
    assert set(found[0].inputs(torch.device("cpu"))) == {"input_ids", "attention_mask"}
    assert text.HELD_OUT == 0.2
