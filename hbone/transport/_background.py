"""A nursery that users cannot see: its tasks never raise, so what is raised inside comes out as it is."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["background_tasks"]


@asynccontextmanager
async def background_tasks() -> AsyncIterator[trio.Nursery]:
    """A nursery for tasks that report their failures and do not raise them; cancelled at the end of the block.

    A plain nursery would put the error of the block, which is the user's own or one of ours that the user wants to
    catch by name, into an `ExceptionGroup`. As no task in here raises there is never a second error to group, so it
    is carried around the nursery (trio's documentation, "Designing for multiple errors").
    """
    error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except BaseException as exc:  # noqa: BLE001 - raised again below, whatever it is
            error = exc
        # Shielded, the nursery swallows its tasks' Cancelled also when more than itself is cancelled. It would
        # raise them otherwise, and the error of the block would be lost.
        nursery.cancel_scope.shield = True
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error
