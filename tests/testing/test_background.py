"""trio in a thread: results and failures come back, nothing stays."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import trio

from hbone.testing import Background, BackgroundError


def no_thread_is_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name == "hbone testing"]


async def double(value: int) -> int:
    await trio.lowlevel.checkpoint()
    return 2 * value


async def fail_before_started(*, task_status: trio.TaskStatus[str]) -> None:
    raise OSError("no such port")


async def serve_until(event: trio.Event, *, task_status: trio.TaskStatus[str]) -> None:
    task_status.started("serving")
    await event.wait()
    raise LookupError("lost it")


def test_results_come_back() -> None:
    with Background() as background:
        assert background.run(double, 21) == 42
        assert background.run_sync(lambda: trio.lowlevel.current_task().name) != ""
    assert no_thread_is_left()


def test_errors_of_a_call_are_the_callers_and_end_nothing() -> None:
    with Background() as background:
        with pytest.raises(OSError, match="no such port"):
            background.start(fail_before_started)
        with pytest.raises(TypeError):
            background.run(double, None)
        assert background.run(double, 1) == 2
    assert no_thread_is_left()


async def test_calls_from_another_trio() -> None:
    with Background() as background:
        assert background.run(double, 4) == 8
        assert await trio.to_thread.run_sync(background.run, double, 5) == 10
    assert no_thread_is_left()


def test_what_was_started_is_cancelled_at_the_end() -> None:
    seen = []

    async def serve(*, task_status: trio.TaskStatus[str]) -> None:
        try:
            task_status.started("here")
            await trio.sleep_forever()
        finally:
            seen.append("ended")

    with Background() as background:
        assert background.start(serve) == "here"
        assert seen == []
    assert seen == ["ended"]
    assert no_thread_is_left()


def broken_background() -> tuple[Background, trio.Event]:
    background = Background().__enter__()
    event = background.run_sync(trio.Event)
    assert background.start(serve_until, event) == "serving"
    return background, event


def test_a_failure_that_nobody_asked_for_is_raised_at_the_end() -> None:
    background, event = broken_background()
    background.run_sync(event.set)
    with pytest.raises(BackgroundError, match="LookupError: lost it") as caught:
        background.__exit__(None, None, None)
    assert isinstance(caught.value.__cause__, LookupError)
    assert no_thread_is_left()


def test_a_failure_is_raised_by_the_call_that_waits_and_by_those_after_it_but_not_again_at_the_end() -> None:
    background, event = broken_background()

    async def fail_and_wait() -> None:
        event.set()
        await trio.sleep_forever()

    with pytest.raises(BackgroundError, match="lost it"):
        background.run(fail_and_wait)
    with pytest.raises(BackgroundError, match="lost it"):
        background.run(double, 1)
    with pytest.raises(BackgroundError, match="lost it"):
        background.check()
    background.__exit__(None, None, None)


def test_a_failure_beside_the_tests_own_is_a_note_on_that() -> None:
    problem = ValueError("the test's own")

    def script() -> Any:
        with Background() as background:
            event = background.run_sync(trio.Event)
            background.start(serve_until, event)
            background.run_sync(event.set)
            background._thread.join()
            raise problem

    with pytest.raises(ValueError, match="own"):
        script()
    assert problem.__notes__ == ["besides, in the background: LookupError('lost it')"]


def test_noted_failures_end_nothing_and_are_raised_all_the_same() -> None:
    background = Background().__enter__()
    background.note_failure(KeyError("one"))
    background.note_failure(KeyError("two"))
    assert background.run(double, 3) == 6
    with pytest.raises(BackgroundError, match="KeyError: 'one' .and 1 more"):
        background.__exit__(None, None, None)


def test_calls_outside_the_block_say_so() -> None:
    background = Background()
    with pytest.raises(BackgroundError, match="not begun"):
        background.run(double, 1)
    with background:
        pass
    with pytest.raises(BackgroundError, match="has ended"):
        background.run(double, 1)
