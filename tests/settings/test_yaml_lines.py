"""Lines of a YAML file that are changed, while all others stay to the byte."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_qtha.settings.yaml_lines import YamlLines

TEXT = """\
# what this is for
base_model: some/model   # two spaces

one: 1
two:
  - a
  # about b
  - b

# not about two
three: "3"  # a string
block:
  inner: {x: 1}
  other: [a,
          b]
last: |
  # no comment
  text
"""


def changed(text, change):
    document = YamlLines(text)
    change(document, document.entries)
    return document.text()


def test_nothing_changed_is_the_same_text():
    for text in (TEXT, TEXT.replace("\n", "\r\n"), TEXT.rstrip("\n"), "---\n" + TEXT + "...\n"):
        assert YamlLines(text).text() == text


@pytest.mark.parametrize(
    ("change", "old", "new"),
    [
        (lambda d, e: d.remove(e["one"]), "one: 1\n", ""),
        (lambda d, e: d.remove(e["two"]), "two:\n  - a\n  # about b\n  - b\n", "# two:\n  # about b\n"),
        (lambda d, e: d.set_value(e["three"], "4"), 'three: "3"  # a', "three: 4  # a"),
        (lambda d, e: d.set_value(e["three"], "4", "four"), 'three: "3"  # a', "four: 4  # a"),
        (lambda d, e: d.set_value(e["two"], "x"), "two:\n  - a\n  # about b\n  - b\n", "two: x\n"),
        (lambda d, e: d.append(e["two"], "c"), "  - b\n", "  - b\n  - c\n"),
        (lambda d, e: d.append(d.inside("block")["other"], "c"), "b]", "b, c]"),
        (lambda d, e: d.comment_out(e["block"], "why"), "block:\n  inner: {x: 1}\n", "# why\n# block:\n#   inner: {x: 1}\n"),
        (lambda d, e: d.set_key(d.inside("block")["other"], "another"), "other: [a,", "another: [a,"),
        (lambda d, e: d.put_above(e["three"], ["a: 1"]), "three:", "a: 1\nthree:"),
        (lambda d, e: d.put_below(e["three"], ["a: 1"]), "# a string\n", "# a string\na: 1\n"),
    ],
)
def test_one_change(change, old, new):
    made = changed(TEXT, change).replace("#           b]", "          b]")  # the rest of the block that became a comment
    expected = TEXT.replace(old, new, 1).replace(
        "  other: [a,\n", "#   other: [a,\n" if new.startswith("# why") else "  other: [a,\n"
    )
    assert made == expected


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("[a]", "[a, c]"),
        ("[a,]", "[a, c,]"),
        ("[\n  a,  # x\n]", "[\n  a, c,  # x\n]"),
        ("[\n  a  # x\n]", "[\n  a, c  # x\n]"),
        ("[]  # y", " # y\n  - c"),
        ("[]", "\n  - c"),
        ("", "\n  - c"),
        ("\n- a", "\n- a\n- c"),
    ],
)
def test_lists_of_all_kinds_get_an_item(before, after):
    assert changed(f"x: {before}\n", lambda d, e: d.append(e["x"], "c")).replace(": \n", ":\n") == f"x: {after}\n".replace(
        ": \n", ":\n"
    )


def test_of_empty_lines_around_what_is_taken_out_one_stays():
    assert changed("a: 1\n\nb: 2\n\nc: 3\n", lambda d, e: d.remove(e["b"])) == "a: 1\n\nc: 3\n"
    assert changed("a: 1\n\n\nc: 3\n", lambda d, e: d.set_value(e["a"], "2")) == "a: 2\n\n\nc: 3\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\n---\nb: 2\n", ["2 documents", "line 3", "What works"]),
        ("a:\n\t- b\n", ["line 2", r"'\t'", "spaces"]),
        ("a: [1\nb: 2\n", ["line 2", "What works"]),
        ("a: 1\nb: 2\na: 3\n", ["a: is there twice", "lines 1 and 3"]),
        ("- a\n- b\n", ["a list", "an Axolotl configuration"]),
        ("", ["nothing"]),
        ("just words", ["a str"]),
        ("{a: 1, b: 2}\n", ["braces", "one `key: value` a line"]),
        ("a: *b\n", ["line 1", "undefined alias"]),
        ("a: \x00\n", ["no YAML"]),
    ],
)
def test_what_cannot_be_changed_is_refused(text, words):
    with pytest.raises(ValueError, match="What works") as error:
        YamlLines(text)
    for word in words:
        assert word in str(error.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab #:-\n'\"", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text("xyz", min_size=1, max_size=3), VALUES, min_size=1, max_size=6), st.booleans(), st.data())
@settings(max_examples=200, deadline=None)
def test_taking_a_key_out_leaves_the_values_of_the_others(values, flow, data):
    gone = data.draw(st.sampled_from(sorted(values)))
    text = yaml.safe_dump(values, default_flow_style=flow or None, sort_keys=False)
    if text.startswith("{"):
        return
    document = YamlLines(text)
    document.remove(document.entries[gone])
    assert (yaml.safe_load(document.text()) or {}) == {key: value for key, value in values.items() if key != gone}
