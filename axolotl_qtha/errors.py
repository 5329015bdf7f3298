"""How errors are worded: the YAML key, the value, and what would work."""

from __future__ import annotations

import difflib
import re
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


class Hidden:
    """Stands in an error for a value that may be a credential: only its type is told.

    >>> Hidden("abc")
    (str, value not shown)
    """

    def __init__(self, value: Any) -> None:
        self.type = "dict" if isinstance(value, dict) else type(value).__name__  # Axolotl's are of a class of its own

    def __repr__(self) -> str:
        return f"({self.type}, value not shown)"


def key_shown(key: Any) -> str:
    """Return an unknown key for an error; one that could be a credential, or more than one line, only by its length.

    >>> key_shown("rnak"), key_shown("a" * 40)
    ('rnak', '(a key of 40 characters, not shown)')
    """
    text = str(key)
    return text if re.fullmatch(r"[A-Za-z0-9_ .-]{1,24}", text) else f"(a key of {len(text)} characters, not shown)"


def alternatives(name: str, names: Iterable[str]) -> str:
    """Return what could have been meant by a name that is none of `names`: up to five that look like it, else all.

    >>> alternatives("rnak", ["rank", "alpha", "dropout"])
    '`rank`'
    >>> alternatives("xyz", ["rank", "alpha"])
    '`alpha`, `rank`'
    """
    known = sorted(set(names))
    return ", ".join(f"`{found}`" for found in difflib.get_close_matches(name, known, n=5, cutoff=0.5) or known)


def unknown_keys(data: Any, known: Iterable[str]) -> Iterator[tuple[str, Hidden, str]]:
    """Yield (key, value, what works) of each key of a dictionary that is not known; of anything else nothing.

    What stands under a key that is not known may be anything, a credential too: the value is hidden, and a key that may be one.

    >>> list(unknown_keys({"rnak": 4, "alpha": 8}, ["rank", "alpha"]))
    [('rnak', (int, value not shown), '`rank`')]
    """
    names = list(known)
    for key, value in data.items() if isinstance(data, dict) else ():
        if key not in names:
            yield key_shown(key), Hidden(value), alternatives(str(key), names)
