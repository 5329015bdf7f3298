"""The runner on the stand-in of IBM, as the tests of `ibm` have it."""

from ..ibm.conftest import _hurry, cloud, start

__all__ = ["_hurry", "cloud", "start"]
