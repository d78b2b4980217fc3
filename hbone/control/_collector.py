"""Full garbage collections wait while a large mesh is being read.

A full collection walks everything with the interpreter held. While a file is read the old mesh and the new one are
there at once, nothing of either is garbage, and the many new objects are what makes Python think that a full collection
is due, several times. Young objects are collected as ever.
"""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["full_collections_wait"]

_NEVER: Final = 2**31 - 1

_lock = threading.Lock()
_inside = 0
_usual = 0


@contextmanager
def full_collections_wait() -> Iterator[None]:
    """Keep this process from full garbage collections of its own accord, for seconds at most.

    Blocks may overlap, also in several threads; the last one to be left puts things back. Who calls `gc.collect` gets a
    full collection nevertheless, and `gc.set_threshold` in between is respected.
    """
    global _inside, _usual
    with _lock:
        _inside += 1
        if _inside == 1:
            young, middle, _usual = gc.get_threshold()
            gc.set_threshold(young, middle, _NEVER)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                young, middle, full = gc.get_threshold()
                if full == _NEVER:
                    gc.set_threshold(young, middle, _usual)
