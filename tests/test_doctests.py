"""The examples in the package's docstrings, run as they are printed there."""

import doctest
from importlib import import_module

import pytest

from .test_layout import FILES, PACKAGE

EXAMPLES = [name for name, path in FILES.items() if ">>>" in path.read_text()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name):
    result = doctest.testmod(import_module(f"{PACKAGE}.{name}"))
    assert result.attempted
    assert not result.failed


def test_there_are_examples():
    assert len(EXAMPLES) >= 8
