"""How errors are worded: the YAML key, the value, and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class IncompleteAdapter(RuntimeError):
    """What would be saved is not the whole adapter.

    No ValueError, which transformers takes for a setting of DeepSpeed's when it saves, and goes on.
    """


class PrivateSettings(RuntimeError):
    """Settings that may hold a credential are refused, without showing them.

    No ValueError, around which pydantic would print the settings, credential and all.
    """


def refusal(key: str, value: Any, why: str, works: str) -> ValueError:
    """Return the error for a bad `qtha:` key, or command-line option (--key): it names the key, the value and what would work."""
    return ValueError(f"{key if key.startswith('--') else f'qtha.{key}'}: {value!r} {why}. What works: {works}.")


def close_names(name: str, names: Iterable[str]) -> list[str]:
    """Return up to five of `names` that look like `name`, the closest first."""
    return difflib.get_close_matches(name, sorted(set(names)), n=5, cutoff=0.5)
