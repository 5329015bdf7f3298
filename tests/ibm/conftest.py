"""A runner on the stand-in, and another one after the first has died."""

import dataclasses

import pytest

from axolotl_qtha.ibm.journal import Journal
from axolotl_qtha.ibm.options import IBMOptions
from axolotl_qtha.ibm.runner import Runner

from .boundary import ANSATZ, PAID, Cloud, StandIn, hurry


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    hurry(monkeypatch)


@pytest.fixture
def cloud():
    return Cloud()


@pytest.fixture
def start(tmp_path, cloud):
    """Return what starts a new process' runner on the same folder and the same IBM; the one before is dead."""
    journals = []

    def start(ansatz=ANSATZ, size=None, **changes):
        for journal in journals:
            journal.close()
        journals[:] = [Journal(tmp_path)]
        options = IBMOptions.model_validate({**PAID.model_dump(), **changes})
        runner = Runner(ansatz, options, StandIn(options, cloud), journals[0])
        if size is not None:
            runner.rate = dataclasses.replace(runner.rate, circuits_per_job=size)
        return runner

    yield start
    for journal in journals:
        journal.close()
