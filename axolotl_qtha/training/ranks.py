"""What one rank does for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.utils import broadcast_object_list
from axolotl.utils.distributed import is_distributed, is_main_process


def once(work: Callable[[], Any]) -> Any:
    """Have rank 0 do something, and return or raise on every rank what it returned or raised there; to be called on every rank.

    Raises:
        Exception: what the work raised, so that no rank waits for one that has ended.
    """
    told: list[Any] = [None, None]
    if is_main_process():
        try:
            told[0] = work()
        except Exception as error:
            if not is_distributed():
                raise
            told[1] = error
    if is_distributed():
        broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]
