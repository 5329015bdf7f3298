"""How errors are worded: the YAML key, the value, and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any


class IncompleteAdapter(RuntimeError):
    """What would be saved is not the whole adapter.

    No ValueError, which transformers takes for a setting of DeepSpeed's when it saves, and goes on.
    """


class Diverged(RuntimeError):
    """The loss of a training, or the norm of its gradients, is not a number any more."""


class PrivateSettings(RuntimeError):
    """Settings that may hold a credential are refused, without showing them.

    No ValueError, around which pydantic would print the settings, credential and all.
    """


def refusal(key: str, value: Any, why: str, works: str) -> ValueError:
    """Return the error for a bad `qtha:` key, or command-line option (--key): it names the key, the value and what would work."""
    return ValueError(f"{key if key.startswith('--') else f'qtha.{key}'}: {value!r} {why}. What works: {works}.")


def alternatives(name: str, names: Iterable[str]) -> str:
    """Return what could have been meant by a name that is none of `names`: up to five that look like it, else all.

    >>> alternatives("rnak", ["rank", "alpha", "dropout"])
    '`rank`'
    >>> alternatives("xyz", ["rank", "alpha"])
    '`alpha`, `rank`'
    """
    known = sorted(set(names))
    return ", ".join(f"`{found}`" for found in difflib.get_close_matches(name, known, n=5, cutoff=0.5) or known)


def unknown_keys(data: Any, known: Iterable[str]) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, what works) of each key of a dictionary that is not known; of anything else nothing.

    >>> list(unknown_keys({"rnak": 4, "alpha": 8}, ["rank", "alpha"]))
    [('rnak', 4, '`rank`')]
    """
    names = list(known)
    for key, value in data.items() if isinstance(data, dict) else ():
        if key not in names:
            yield str(key), value, alternatives(str(key), names)
