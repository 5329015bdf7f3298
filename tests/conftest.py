"""Settings every test runs under: no network, no telemetry, one core a worker of pytest-xdist; what `slow`, `clients` imply."""

import os
from collections import Counter

import pytest

os.environ |= {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
}
if "PYTEST_XDIST_WORKER" in os.environ:  # workers that share cores would wait for each other inside OpenMP
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def forked():
    """A process that forks commands, for the tests of a worker: what runs one, and returns what `commands.run` does."""
    from .e2e.servers import Commands

    made = Commands()
    yield made
    made.stop()


@pytest.fixture(scope="session")
def servers():
    """Processes that fork ranks, for the tests of a worker."""
    from .e2e.ranks import Servers

    made = Servers()
    yield made
    made.stop()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Have `-m "not e2e"` leave out what is slow, too, and all but `-m long` what is long; and start with the long
    files, so that both workers end together.
    """
    if "long" not in config.getoption("markexpr"):
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    for item in items:
        if item.get_closest_marker("slow") or item.get_closest_marker("clients"):
            item.add_marker(pytest.mark.e2e)
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: ("e2e" not in item.path.parts, -tests[item.path], item.path))
