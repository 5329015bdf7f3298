"""PEFT's own generic test cases, with QTHA in the place of its methods.

They are no part of this project: name a checkout of https://github.com/huggingface/peft, of the version that is installed,

    PEFT_CHECKOUT=~/peft pytest -n 0 -s tests/peft_suite

or have one beside this repository, as `peft`. The counts are printed; a failure that `expected_failures.py` does not list, and an
entry there without one, fail. `qtha_cases.py` says which cases are run.
"""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest

from ..e2e.commands import REPOSITORY
from .expected_failures import EXPECTED

GIVEN = os.environ.get("PEFT_CHECKOUT")
CHECKOUT = Path(GIVEN).expanduser().resolve() if GIVEN else REPOSITORY.parent / "peft"
FILES = ("test_custom_models", "test_decoder_models")
HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHECKOUT / "tests" / "testing_common.py").exists(),
        reason=f"no checkout of PEFT, whose test cases this runs: PEFT_CHECKOUT is {GIVEN!r}, and none is at {CHECKOUT}",
    ),
]


def run_with_qtha(file: str, report: Path) -> dict[str, str | None]:
    """Run a file of PEFT's tests, and return the error of each test by its name: "" if it passed, None if it was skipped."""
    path = os.pathsep.join(map(str, (HERE, REPOSITORY)))
    quiet = ["-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull, f"--rootdir={CHECKOUT}", "-q", "--tb=line", "-rN"]
    command = [sys.executable, "-m", "pytest", "-p", "qtha_cases", *quiet, f"--junitxml={report}", f"tests/{file}.py"]
    made = subprocess.run(
        command, cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert made.returncode in (0, 1), made.stdout[-3000:]  # 1: some tests failed
    outcomes: dict[str, str | None] = {}
    for case in ET.parse(report).iter("testcase"):
        broken = [found for kind in ("failure", "error") if (found := case.find(kind)) is not None]
        error = f"{broken[0].get('message')}\n{broken[0].text}" if broken else ""
        outcomes[str(case.get("name"))] = None if case.find("skipped") is not None else error
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    return {file: run_with_qtha(file, folder / f"{file}.xml") for file in FILES}


def expected(test: str, error: str) -> list[int]:
    """Return the entries of the list that a failure belongs to."""
    name, _, case = test.partition("[")
    return [
        index
        for index, entry in enumerate(EXPECTED)
        if re.fullmatch(entry.tests, name) and re.search(entry.case, case) and re.search(entry.error, error)
    ]


def test_nothing_fails_but_what_is_to_fail(outcomes):
    unexpected = []
    for file, found in outcomes.items():
        failed = {test: error for test, error in found.items() if error}
        counts = Counter(index for test, error in failed.items() for index in expected(test, error))
        unexpected += [f"{file}: {test}: {error[:300]}" for test, error in failed.items() if not expected(test, error)]
        passed = sum(error == "" for error in found.values())
        print(f"\n{file}: {passed} passed, {len(failed)} failed, {len(found) - passed - len(failed)} skipped by PEFT itself")
        for index, count in counts.items():
            print(f"{count:5}  {EXPECTED[index].reason}")
    assert not unexpected, "\n".join(unexpected)


def test_what_is_to_fail_fails(outcomes):
    failed = [(test, error) for found in outcomes.values() for test, error in found.items() if error]
    seen = {index for test, error in failed for index in expected(test, error)}
    assert [entry.reason for index, entry in enumerate(EXPECTED) if index not in seen] == []


def test_the_cases_are_run(outcomes):
    """A checkout whose lists have other names would run nothing, and fail nothing."""
    for file, found in outcomes.items():
        assert sum(error is not None for error in found.values()) >= 250, file
