"""What the tests of many ranks have in common."""

import pytest

from .ranks import Servers


@pytest.fixture(scope="session")
def servers():
    """Processes that fork ranks, for the tests of a worker."""
    made = Servers()
    yield made
    made.stop()
