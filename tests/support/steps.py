"""Cancelled at every step, and nothing is left behind.

`everywhere` runs an operation again and again, cancelled one step of the scheduler later each time, until it completes
before it is cancelled. A step is one turn of any task but the test's own, so cancellation also meets the tasks of
sessions and of the peer in every state that they pass through. It comes either while the task waits, or when it has
been woken and has not run yet. Draw the order in which trio runs tasks from a fixed seed (`in_one_order`).
"""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio
import trio.testing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import pytest

__all__ = ["WAIT", "CancelAtStep", "everywhere", "in_one_order"]

#: Seconds that only something that hangs needs.
WAIT = 60

#: No operation takes more.
MOST_STEPS = 600


def in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that are ready run in the same order each time."""
    monkeypatch.setattr("trio._core._run._r", random.Random(7))


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope at the n-th step of all tasks but one."""

    def __init__(self, step: int, scope: trio.CancelScope, but: trio.lowlevel.Task, *, waking: bool) -> None:
        self._step = step
        self._scope = scope
        self._but = but
        self._waking = waking
        self.steps = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._waking:
            self._count(task)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if not self._waking:
            self._count(task)

    def _count(self, task: trio.lowlevel.Task) -> None:
        if task is not self._but:
            self.steps += 1
            if self.steps == self._step:
                self._scope.cancel()


def what_is_there() -> tuple[int, int]:
    """Open files, and tasks."""
    return len(list(Path("/proc/self/fd").iterdir())), trio.lowlevel.current_statistics().tasks_living


async def what_is_left(expected: tuple[int, int] | None) -> tuple[int, int]:
    """`what_is_there` once it is as expected, or has not changed for a while.

    What is under way in the kernel, from socket to socket, is no task that `wait_all_tasks_blocked` would wait for.
    """
    left, same = (0, 0), 0
    while left != expected and same < (3 if expected is None else 200):
        await trio.sleep(0.01 if same else 0)
        await trio.testing.wait_all_tasks_blocked()
        before, left = left, what_is_there()
        same = same + 1 if left == before else 0
    return left


async def everywhere(
    operation: Callable[[], Awaitable[Any]],
    check: Callable[[], Awaitable[None]],
    *,
    waking: bool,
    before: Callable[[], Awaitable[None]] | None = None,
) -> int:
    """Cancels `operation` at its 1st, 2nd, ... step; `check` after each. Returns how many steps there were.

    What is cancelled may see another part of it break, instead of or besides its own cancellation.
    """
    main = trio.lowlevel.current_task()
    gc.collect()
    normal: tuple[int, int] | None = None
    for step in range(MOST_STEPS):
        with trio.fail_after(WAIT):
            if before is not None:
                await before()
            async with trio.open_nursery() as nursery:
                scope = trio.CancelScope()
                completed = False

                async def run(scope: trio.CancelScope = scope) -> None:
                    nonlocal completed
                    with scope:
                        try:
                            await operation()
                        except* trio.BrokenResourceError:
                            if not scope.cancel_called:
                                raise
                    completed = not scope.cancelled_caught

                instrument = CancelAtStep(step, scope, main, waking=waking)
                trio.lowlevel.add_instrument(instrument)
                nursery.start_soon(run)
            trio.lowlevel.remove_instrument(instrument)
            await check()
            left = await what_is_left(normal)
        if normal is None:  # not cancelled: what stays is there to stay
            assert completed
            normal = left
        # Less than before: what the first one used was still being closed when it was counted.
        normal = min(left[0], normal[0]), min(left[1], normal[1])
        assert left == normal, f"left behind at step {step}: {left}, before: {normal}"
        if step and completed and not scope.cancel_called:
            return step
    raise AssertionError("it never completes")
