"""The nursery that users cannot see."""

from __future__ import annotations

import math

import pytest
import trio
import trio.testing

from hbone.transport._background import background_tasks


async def fail_in_a_block(scope: trio.CancelScope) -> None:
    with scope:
        async with background_tasks() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise KeyError


async def test_an_error_of_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError):
        await fail_in_a_block(trio.CancelScope())


async def test_an_error_of_the_block_is_not_lost_when_all_is_cancelled() -> None:
    with pytest.raises(KeyError):
        await fail_in_a_block(trio.CancelScope(deadline=-math.inf))


async def test_tasks_end_with_the_block() -> None:
    ended = False

    async def work() -> None:
        nonlocal ended
        try:
            await trio.sleep_forever()
        finally:
            ended = True

    async with background_tasks() as nursery:
        nursery.start_soon(work)
        await trio.testing.wait_all_tasks_blocked()
    assert ended
