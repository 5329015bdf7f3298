"""How the project is cited: the same in CITATION.cff, README.md, pyproject.toml and LICENSE, in the form that each asks for."""

import re

import pytest
import yaml

from axolotl_qtha.version import __version__

from .e2e.commands import REPOSITORY

CITATION = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
README = (REPOSITORY / "README.md").read_text()
PROJECT = (REPOSITORY / "pyproject.toml").read_text()  # Python 3.10 has no reader of TOML
ENTRIES = dict(re.findall(r"@\w+\{(\w+),\n(.*?)\n\}", README, flags=re.DOTALL))


def fields(name):
    """Return the fields of a BibTeX entry of the README."""
    return dict(re.findall(r"^ *(\w+) *= *\{(.*?)\},?$", ENTRIES[name], flags=re.MULTILINE))


def full(person):
    return person.get("name") or f"{person['family-names']}, {person['given-names']}"


def test_what_the_format_requires():
    """Citation File Format 1.2.0: these four keys; a reference has type, title and authors."""
    assert {"cff-version", "message", "title", "authors"} <= set(CITATION)
    assert CITATION["cff-version"] == "1.2.0"
    assert (CITATION["type"], CITATION["license"]) == ("software", "Apache-2.0")
    for reference in CITATION["references"]:
        assert {"type", "title", "authors"} <= set(reference)
    for person in [*CITATION["authors"], *(author for reference in CITATION["references"] for author in reference["authors"])]:
        assert set(person) in ({"name"}, {"given-names", "family-names"})


def test_the_version_is_the_packages():
    assert str(CITATION["version"]) == __version__
    assert fields("axolotl_qtha")["version"] == __version__


def test_the_paper():
    (paper,) = CITATION["references"]
    assert paper["url"] == "https://arxiv.org/abs/2503.12790"
    entry = fields("kong2025quantum")
    assert entry["title"].replace("{", "").replace("}", "") == paper["title"]
    assert entry["author"].split(" and ") == [full(author) for author in paper["authors"]]
    assert (entry["year"], entry["eprint"], entry["archivePrefix"]) == (str(paper["year"]), "2503.12790", "arXiv")


@pytest.mark.parametrize("text", [PROJECT, (REPOSITORY / "LICENSE").read_text()], ids=["pyproject", "LICENSE"])
def test_the_authors_are_the_same_everywhere(text):
    (author,) = CITATION["authors"]
    assert author["name"] in text
    assert fields("axolotl_qtha")["author"] == f"{{{author['name']}}}"
    assert 'license = "Apache-2.0"' in PROJECT
