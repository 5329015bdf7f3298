"""A part of a suite, for one of several machines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ...errors import refusal

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """The runs that one of several machines does: every `of`th, from the `number`th on."""

    number: int = 1
    of: int = 1

    def pick(self, values: Sequence[T]) -> list[T]:
        """Return this part.

        >>> Part(2, 3).pick("abcdefgh")
        ['b', 'e', 'h']
        """
        return list(values[self.number - 1 :: self.of])

    @staticmethod
    def read(text: str) -> Part:
        """Return what `2/3` stands for.

        Raises:
            ValueError: if it is no part.
        """
        found = re.fullmatch(r"([1-9][0-9]{0,4})/([1-9][0-9]{0,4})", text)
        if found is None or int(found[1]) > int(found[2]):
            raise refusal("--part", text, "is no part of a suite", "`1/3`, `2/3` and `3/3`, one on each of three machines")
        return Part(int(found[1]), int(found[2]))
