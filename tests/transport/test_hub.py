"""The hub: who is told when, and trio beside it. Everything both ways: in trio's place, and as a task of trio."""

from __future__ import annotations

import gc
import math
import queue
import socket
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from support.pairs import memory_pair
from support.tcp import connected_pair, receive_all

from hbone.transport import _hub, relay
from hbone.transport._hub import Hub, shared_hub
from hbone.transport._poller import READABLE, WRITABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT = 60.0


@pytest.fixture(params=["in trio's place", "as a task"], autouse=True)
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "as a task":
        monkeypatch.setattr(_hub, "_beside_trio", lambda _: None)
    return str(request.param)


class Ear:
    """Watches one end of a pair of sockets; what comes is read, unless it shall stay."""

    def __init__(self, hub: Hub, *, reads: bool = True, then: Callable[[], object] = lambda: None) -> None:
        self.sock, self.other = socket.socketpair()
        self.sock.setblocking(False)
        self.heard: list[bytes] = []
        self.told = 0
        self.flushed = 0
        self.errors: list[Exception] = []
        self.changed = trio.Event()
        self._reads = reads
        self._then = then
        self._hub = hub
        hub.add(self.sock.fileno(), self, READABLE)

    def io_ready(self, what: int) -> None:
        self.told += 1
        if what & READABLE and self._reads:
            self.heard.append(self.sock.recv(1000))
        self._then()
        self.changed.set()
        self.changed = trio.Event()

    def io_failed(self, error: Exception) -> None:
        self.errors.append(error)
        self.changed.set()
        self.changed = trio.Event()

    def flush(self) -> None:
        self.flushed += 1

    async def until(self, condition: Callable[[], object]) -> None:
        with trio.fail_after(WAIT):
            while not condition():
                await self.changed.wait()

    def close(self) -> None:
        self._hub.remove(self.sock.fileno())
        self.sock.close()
        self.other.close()


@contextmanager
def ear(**options: Any) -> Iterator[Ear]:
    it = Ear(shared_hub(), **options)
    try:
        yield it
    finally:
        it.close()


def test_this_trio_has_what_the_hub_needs(how: str) -> None:
    """If not, everything works as before, and slower: then `_hub` is to be looked at."""

    async def main() -> bool:
        return shared_hub()._beside_trio is not None

    assert trio.run(main) == (how == "in trio's place")


@pytest.mark.parametrize("name", [name.partition(".")[0] for name in _hub._NEEDED])
async def test_another_trio(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.undo()

    class Runner:
        def __getattr__(self, asked: str) -> Any:
            if asked == name:
                raise AttributeError(asked)
            return self

    from trio._core import _run

    class Context:
        runner = Runner()

    with monkeypatch.context() as patch:
        patch.setattr(_run, "GLOBAL_RUN_CONTEXT", Context())
        assert _hub._beside_trio(None) is None  # type: ignore[arg-type]
    hub = shared_hub()
    assert hub is shared_hub()


async def test_a_trio_that_is_not_as_it_seemed(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It has all the names, and something is amiss with one: the rest of the run goes the other way."""
    hub = shared_hub()
    if hub._beside_trio is not None:
        monkeypatch.setattr(hub._beside_trio, "_runner", None)
    with ear() as one:
        for data in (b"a", b"b", b"c"):
            one.other.send(data)
            await one.until(lambda: one.heard[-1:] == [data])  # noqa: B023 - waited for here
    assert hub._beside_trio is None
    assert ("slower way" in caplog.text) == (how == "in trio's place")
    caplog.clear()


async def test_who_is_told() -> None:
    with ear() as one, ear() as two:
        one.other.send(b"a")
        await one.until(lambda: one.heard == [b"a"])
        two.other.send(b"b")
        await two.until(lambda: two.heard == [b"b"])
        one.other.send(b"c")
        await one.until(lambda: one.heard == [b"a", b"c"])
        assert two.heard == [b"b"]


async def test_what_one_is_told_of() -> None:
    told: list[int] = []
    with ear(reads=False) as one:
        hub, fd = shared_hub(), one.sock.fileno()
        one.io_ready = lambda what: (told.append(what), hub.change(fd, 0))  # type: ignore[method-assign,assignment]
        hub.change(fd, WRITABLE)
        await trio.testing.wait_all_tasks_blocked()
        assert told == [WRITABLE]
        one.other.send(b"a")
        await trio.testing.wait_all_tasks_blocked()
        assert told == [WRITABLE]
        hub.change(fd, READABLE | WRITABLE)
        await trio.testing.wait_all_tasks_blocked()
        assert told == [WRITABLE, READABLE | WRITABLE]


async def test_level_triggered() -> None:
    with ear(reads=False) as one:
        one.other.send(b"a")
        await one.until(lambda: one.told > 3)


async def test_who_is_removed_in_a_round_is_not_told_in_it() -> None:
    hub = shared_hub()
    ears: list[Ear] = []

    def remove_others() -> None:
        for one in ears:
            hub.remove(one.sock.fileno())

    try:
        ears += [Ear(hub, then=remove_others) for _ in range(3)]
        for one in ears:
            one.other.send(b"a")
        await trio.testing.wait_all_tasks_blocked()
        assert sum(one.told for one in ears) == 1
    finally:
        for one in ears:
            one.close()


async def test_a_flush_at_the_end_of_a_round() -> None:
    """Once a round for each who asked, after everybody was told."""
    hub = shared_hub()
    flushed_when_told: list[int] = []

    def later() -> None:
        flushed_when_told.append(first.flushed)
        hub.flush_later(first)
        hub.flush_later(first)

    with ear(then=later) as first, ear(then=later) as second:
        first.other.send(b"a")
        second.other.send(b"a")
        await first.until(lambda: first.heard)
        await second.until(lambda: second.heard)
        await trio.testing.wait_all_tasks_blocked()
        assert first.flushed in (1, 2)  # in one round, or in one each
        assert flushed_when_told == ([0, 0] if first.flushed == 1 else [0, 1])
        before = first.flushed
        second._then = lambda: None
        second.other.send(b"b")
        await second.until(lambda: len(second.heard) == 2)
        await trio.testing.wait_all_tasks_blocked()
        assert (first.flushed, second.flushed) == (before, 0)


@pytest.mark.parametrize("where", ["told", "flushed", "told, and its end"])
async def test_a_bug_is_its_own(where: str, caplog: pytest.LogCaptureFixture) -> None:
    def boom() -> None:
        raise ValueError("a bug")

    with ear(then=boom if where.startswith("told") else lambda: shared_hub().flush_later(bad)) as bad, ear() as good:
        bad.flush = boom  # type: ignore[method-assign]
        if where.endswith("end"):
            real = bad.io_failed
            bad.io_failed = lambda error: (real(error), boom())  # type: ignore[method-assign,assignment]
        bad.other.send(b"a")
        await bad.until(lambda: bad.errors)
        good.other.send(b"a")
        await good.until(lambda: good.heard)
        assert str(bad.errors[0]) == "a bug"
    assert "failed" in caplog.text
    caplog.clear()


async def test_tasks_get_their_turn_beside_endless_traffic() -> None:
    """Deadlines, other sockets, threads, and tasks that watchers wake."""
    woken = trio.Event()
    with ear(reads=False, then=lambda: woken.set()) as busy:
        busy.other.send(b"a")  # never read: ready for ever
        with trio.fail_after(WAIT):
            await woken.wait()
            await trio.sleep(0.01)
            with trio.move_on_after(0.01) as scope:
                await trio.sleep_forever()
            assert scope.cancelled_caught
            await trio.to_thread.run_sync(lambda: None)
            here, there = trio.socket.socketpair()
            with here, there:
                await here.send(b"x")
                assert await there.recv(1) == b"x"


async def test_sockets_get_their_turn_beside_a_task_that_never_rests() -> None:
    with ear() as one, trio.fail_after(WAIT):
        one.other.send(b"a")
        while not one.heard:
            await trio.lowlevel.checkpoint()


async def test_the_rest_of_trio_while_the_hub_waits() -> None:
    """Nothing to do for the hub: what trio waits for comes through."""
    with ear() as one, trio.fail_after(WAIT):
        here, there = trio.socket.socketpair()
        with here, there:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(there.recv, 1)
                await trio.testing.wait_all_tasks_blocked()
                await here.send(b"x")
        event = trio.Event()
        token = trio.lowlevel.current_trio_token()
        timer = threading.Timer(0.01, token.run_sync_soon, (event.set,))
        timer.start()
        await event.wait()
        timer.join()
        await trio.sleep(0.01)
        timer = threading.Timer(0.01, one.other.send, (b"a",))
        timer.start()
        await one.until(lambda: one.heard)
        timer.join()


async def test_a_deadline_that_a_watcher_sets() -> None:
    """Earlier than the one that was waited for."""
    for _ in range(3):  # the first time trio itself would look after it
        scope = trio.CancelScope()

        def now(scope: trio.CancelScope = scope) -> None:
            scope.deadline = trio.current_time()

        with ear(then=now) as one, trio.fail_after(WAIT):
            one.other.send(b"a")
            with scope:
                await trio.sleep_forever()
            assert scope.cancelled_caught


async def test_a_task_that_a_watcher_starts() -> None:
    started = trio.Event()

    async def work() -> None:
        started.set()

    async with trio.open_nursery() as nursery:
        with ear(then=lambda: nursery.start_soon(work)) as one, trio.fail_after(WAIT):
            one.other.send(b"a")
            await started.wait()


async def test_idle_is_when_nothing_is_under_way(autojump_clock: trio.testing.MockClock) -> None:
    """A message that goes round between sockets of the hub keeps a mock clock from jumping."""
    rounds = 0
    with ear(reads=False) as one, ear(reads=False) as two:

        def hop(here: Ear, there: Ear) -> None:
            nonlocal rounds
            rounds += 1
            data = here.sock.recv(1)
            if rounds < 200:
                there.other.send(data)

        one._then = lambda: hop(one, two)
        two._then = lambda: hop(two, one)
        one.other.send(b"x")
        await trio.sleep(1)
        assert rounds == 200


@pytest.mark.parametrize("cushion", [0.0, 0.01])
async def test_wait_all_tasks_blocked(cushion: float) -> None:
    with ear() as one:
        await trio.testing.wait_all_tasks_blocked(cushion)
        one.other.send(b"a")
        await trio.testing.wait_all_tasks_blocked(cushion)
        assert one.heard == [b"a"]


def test_the_end_of_the_run_is_the_end_of_the_hub() -> None:
    left: list[Any] = []

    async def main() -> None:
        hub = shared_hub()
        one = Ear(hub)
        hub.at_end.append(lambda: left.append("told"))
        left.append(hub)
        left.append(one)
        await trio.lowlevel.checkpoint()

    def files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    trio.run(main)
    left[1].close()
    left.clear()
    gc.collect()  # of tests before, too
    before = files()
    trio.run(main)
    hub, one, told = left
    assert told == "told"
    hub.change(one.sock.fileno(), 0)
    hub.add(0, one, READABLE)
    hub.remove(0)
    one.close()
    assert files() == before


def test_in_guest_mode_the_host_waits(how: str) -> None:
    """There `before_io_wait` runs in the host's loop, which it must not block."""
    todo: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
    outcomes: list[Any] = []

    async def main() -> bytes:
        assert shared_hub()._beside_trio is None
        with ear() as one:
            one.other.send(b"a")
            await one.until(lambda: one.heard)
            await trio.sleep(0.01)
            return one.heard[0]

    trio.lowlevel.start_guest_run(main, run_sync_soon_threadsafe=todo.put, done_callback=outcomes.append)
    while not outcomes:
        todo.get(timeout=WAIT)()
    assert outcomes[0].unwrap() == b"a"


async def test_a_relay_both_ways_at_full_speed(how: str) -> None:
    async with memory_pair() as pair, trio.open_nursery() as nursery:
        near, far = await pair.open()
        app, sock = connected_pair()
        nursery.start_soon(relay, sock, near)
        data = bytes(range(256)) * 8000
        got = bytearray()

        async def send(stream: Any) -> None:
            await stream.send_all(data)
            await stream.send_eof()

        async def receive() -> None:
            async for chunk in far:
                got.extend(chunk)

        async with app, far:
            with trio.fail_after(WAIT):
                async with trio.open_nursery() as all_of_it:
                    for stream in (app, far):
                        all_of_it.start_soon(send, stream)
                    all_of_it.start_soon(receive)
                    assert await receive_all(app) == data
            assert got == data


def test_a_hub_costs_no_deadline() -> None:
    """Where there is nothing but a far deadline, trio still sleeps as long as it should."""

    async def main() -> float:
        with ear():
            before = trio.current_time()
            await trio.sleep(0.05)
            return trio.current_time() - before

    assert 0.05 <= trio.run(main) < math.inf
