"""Who is told when a socket is ready: one place for all sockets of a thread that carry bytes.

Theory of operation
===================

trio's `wait_readable` costs a task, a system call to arm the socket, and a turn of the event loop, for each wait. In
the path of every message that is most of the cost, and nothing there needs it: to read one socket and write another is
no waiting. So sessions, relays and listeners register their sockets here, and get a plain call, outside of any task,
when one is ready.

The poller of the hub contains trio's own epoll. Where trio is about to wait for that one, the hub waits for both
(`_BesideTrio`, an instrument). As long as only its own sockets have something, it serves them and waits again; trio
turns when a task is to run, when a deadline has come, and when one of trio's sockets is ready. A third of what a
message cost a node went away with that (docs/design/performance.md). What it needs of trio is not public, so it is
looked for first, and where it is missing (as in guest mode, whose waiting is the host's) a task waits for the whole
poller.

Rules for who is told: neither wait nor block; wake tasks as one does elsewhere, by `trio.lowlevel.reschedule`, an
event, a cancel scope; there is no current task. Nobody is told twice in a round.
"""

from __future__ import annotations

import logging
import math
from operator import attrgetter
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from hbone.transport._poller import READABLE, Poller

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Flusher", "Hub", "Watcher", "shared_hub"]

_log: Final = logging.getLogger("hbone")


class Watcher(Protocol):
    """Who is told of one socket."""

    def io_ready(self, what: int) -> None:
        """The socket is `READABLE`, `WRITABLE`, or both, as it also is when it has broken. May be told in vain."""

    def io_failed(self, error: Exception) -> None:
        """`io_ready` or `flush` raised this, which is a bug: end what the socket is for."""


class Flusher(Protocol):
    """Who writes at the end of a round."""

    def flush(self) -> None:
        """Write what was queued in this round."""

    def io_failed(self, error: Exception) -> None:
        """See `Watcher`."""


class Hub:
    """Tells watchers of their sockets, level-triggered. One for each run of trio: `shared_hub`."""

    def __init__(self) -> None:
        self._poller = Poller()
        self._watchers: dict[int, Watcher] = {}
        self._flushers: dict[Flusher, None] = {}
        self._ended = False
        self.at_end: list[Callable[[], None]] = []
        """Called when the run ends."""
        self._beside_trio = _beside_trio(self)
        self._as_a_task = trio.Event()
        if self._beside_trio is not None:
            trio.lowlevel.add_instrument(self._beside_trio)
        else:
            self._as_a_task.set()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await self._as_a_task.wait()
            while True:
                await trio.lowlevel.wait_readable(self._poller)
                self.dispatch(self.poll())
        finally:
            self._ended = True  # who ends later than this lets go of its socket in vain
            self._leave_trio_alone()
            trio.lowlevel.notify_closing(self._poller)
            self._poller.close()
            for callback in self.at_end:
                callback()

    def fall_back(self) -> None:
        """Waiting in trio's place has failed: go on as a task."""
        self._leave_trio_alone()
        self._as_a_task.set()

    def _leave_trio_alone(self) -> None:
        beside, self._beside_trio = self._beside_trio, None
        if beside is not None:
            trio.lowlevel.remove_instrument(beside)
            self._watchers.pop(beside.fd)
            self._poller.remove(beside.fd)

    def add(self, fd: int, watcher: Watcher, interest: int) -> None:
        """Tell `watcher` of this file descriptor from now on; of its breaking also without any interest."""
        if not self._ended:
            self._watchers[fd] = watcher
            self._poller.add(fd, interest)

    def change(self, fd: int, interest: int) -> None:
        """What its watcher is told of from now on."""
        if not self._ended:
            self._poller.change(fd, interest)

    def remove(self, fd: int) -> None:
        """Tell nobody of it any more, if anybody was; to be called before it is closed."""
        if self._watchers.pop(fd, None) is not None and not self._ended:
            self._poller.remove(fd)

    def flush_later(self, flusher: Flusher) -> None:
        """Have it write at the end of this round, once, what it and others have queued for it.

        For who is told; outside of a round it is the end of the next one.
        """
        self._flushers[flusher] = None

    def poll(self, timeout: float = 0) -> list[tuple[int, int]]:
        """What is ready now, or the first of it within as many seconds."""
        return self._poller.poll(timeout)

    def dispatch(self, ready: list[tuple[int, int]]) -> None:
        """One round: tell whom it concerns."""
        watchers = self._watchers
        for fd, what in ready:
            watcher = watchers.get(fd)
            if watcher is not None:
                try:
                    watcher.io_ready(what)
                except Exception as exc:  # noqa: BLE001 - its failure is its own
                    _failed(watcher, exc)
        if self._flushers:
            flushers, self._flushers = self._flushers, {}
            for flusher in flushers:
                try:
                    flusher.flush()
                except Exception as exc:  # noqa: BLE001 - the same
                    _failed(flusher, exc)


def _failed(who: Watcher | Flusher, error: Exception) -> None:
    _log.error("%r failed", who, exc_info=error)
    try:
        who.io_failed(error)
    except Exception:  # noqa: BLE001 - nothing may end the hub
        _log.exception("and ending it failed as well")


class _BesideTrio(trio.abc.Instrument):
    """Lets the hub wait where trio would; see the module's theory of operation."""

    def __init__(self, hub: Hub, runner: Any) -> None:
        self._hub = hub
        self._runner = runner
        self._trio_ready = False
        self.fd: int = runner.io_manager._epoll.fileno()  # noqa: SLF001
        hub.add(self.fd, self, READABLE)

    def io_ready(self, what: int) -> None:
        """There is something in trio's epoll."""
        self._trio_ready = True

    def io_failed(self, error: Exception) -> None:
        """Never: `io_ready` does not fail."""

    def before_io_wait(self, timeout: float) -> None:
        """When trio is about to look at its epoll, or to wait for it `timeout` seconds: wait here in its place."""
        try:
            self._wait(timeout)
        except Exception:  # noqa: BLE001 - trio would switch us off, and nobody would be told of anything any more
            _log.exception("waiting beside trio failed; bytes go the slower way from now on")
            self._hub.fall_back()

    def _wait(self, timeout: float) -> None:
        """Whatever it is that ends the waiting here, trio's own must not begin: `force_wakeup` sees to that."""
        hub, runner = self._hub, self._runner
        if runner.runq:  # trio only looks
            hub.dispatch(hub.poll())
            return
        deadline = runner.deadlines.next_deadline()
        ends, left = monotonic() + timeout, timeout
        moved = self._trio_ready = False
        while ready := hub.poll(left):
            hub.dispatch(ready)
            if self._trio_ready and len(ready) == 1:
                return  # it finds that at once
            moved = True
            left = ends - monotonic()
            if self._trio_ready or runner.runq or left <= 0 or runner.deadlines.next_deadline() < deadline:
                break
        # When trio waits for everything to be idle (mock clocks, wait_all_tasks_blocked), a wait without any event
        # is what tells it: it was one here, and is to be one there.
        if moved or not (runner.waiting_for_idle or runner.clock_autojump_threshold < math.inf):
            runner.io_manager.force_wakeup()


#: What `_BesideTrio` uses of trio's runner.
_NEEDED: Final = (
    *("runq", "deadlines.next_deadline", "waiting_for_idle", "clock_autojump_threshold", "is_guest"),
    *("io_manager._epoll.fileno", "io_manager.force_wakeup"),
)


def _beside_trio(hub: Hub) -> _BesideTrio | None:
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT

        runner: Any = GLOBAL_RUN_CONTEXT.runner
        for name in _NEEDED:
            attrgetter(name)(runner)
    except (ImportError, AttributeError):  # another trio, or a system without epoll
        return None
    return None if runner.is_guest else _BesideTrio(hub, runner)


_hub: trio.lowlevel.RunVar[Hub] = trio.lowlevel.RunVar("hbone-hub")


def shared_hub() -> Hub:
    """The hub of this run of trio. It is nothing but a sleeping task while nobody uses it."""
    try:
        return _hub.get()
    except LookupError:
        hub = Hub()
        _hub.set(hub)
        trio.lowlevel.spawn_system_task(hub.run, name="hbone: sockets")
        return hub
