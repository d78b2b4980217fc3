"""The pool over sessions made of nothing: what it asks of them, and what it does when they, or its callers, go away."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
import trio.testing

from hbone.address import Authority, Endpoint
from hbone.errors import (
    CertificateUnavailable,
    ConnectFailed,
    HboneError,
    InvalidAddress,
    InvalidIdentity,
    LocalProtocolError,
    PeerIdentityMismatch,
    PolicyDenied,
    SessionClosed,
    StreamRefused,
)
from hbone.identity import SpiffeIdentity
from hbone.tls import PeerPolicy
from hbone.transport._pool import ConnectionPool
from hbone.transport._pool_state import PoolLimits, SessionState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from hbone.transport._pool_state import PoolKey

ME = SpiffeIdentity.parse("spiffe://cluster.local/ns/shop/sa/web")
CART = "spiffe://cluster.local/ns/shop/sa/cart"
TARGET = "10.0.0.7:8080"


@dataclass(eq=False)
class FakeTunnel:
    session: FakeSession
    target: Authority

    def end(self) -> None:
        self.session.end(self)


class FakeSession:
    """Speaks no protocol; the test says what becomes of it."""

    def __init__(self, key: PoolKey, svid: object, limit: int) -> None:
        self.key = key
        self.svid = svid
        self.limit = limit
        self.on_change: Callable[[], None] | None = None
        self.tunnels: list[FakeTunnel] = []
        self.draining = False
        self.closed = False
        self.requests = 0
        self.close_asked = 0
        self.most = 0
        self.headers: list[object] = []
        self.script: list[Exception | None] = []  # what becomes of the next requests
        self.gate: trio.Event | None = None  # unanswered until then
        self.lingers = 0.0  # how long a graceful end takes

    @property
    def open_streams(self) -> int:
        return len(self.tunnels)

    @property
    def available_streams(self) -> int:
        return max(self.limit - len(self.tunnels), 0)

    @property
    def usable(self) -> bool:
        return self.available_streams > 0 and not (self.draining or self.closed or self.close_asked)

    async def open_tunnel(self, target: Authority, *, headers: Iterable[tuple[Any, Any]] = ()) -> FakeTunnel:
        assert self.usable
        tunnel = FakeTunnel(self, target)
        self.tunnels.append(tunnel)
        self.requests += 1
        self.headers.append(headers)
        self.most = max(self.most, len(self.tunnels))
        try:
            await trio.lowlevel.checkpoint()
            if self.gate is not None:
                await self.gate.wait()
            problem = self.script.pop(0) if self.script else None
            if problem is None and self.closed:
                problem = SessionClosed("broken under way")
            if problem is not None:
                raise problem
        except BaseException:
            self.end(tunnel)
            raise
        return tunnel

    def changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def end(self, tunnel: FakeTunnel) -> None:
        if tunnel in self.tunnels:
            self.tunnels.remove(tunnel)
            self.changed()

    def set_limit(self, limit: int) -> None:
        self.limit = limit
        self.changed()

    def goaway(self) -> None:
        self.draining = True
        self.changed()

    def die(self) -> None:
        self.closed = True
        self.tunnels.clear()
        self.changed()

    def close_soon(self) -> None:
        assert not self.tunnels
        self.close_asked += 1
        trio.lowlevel.spawn_system_task(self.aclose)

    async def aclose(self) -> None:
        self.draining = True
        try:
            if not self.closed:
                await trio.sleep(self.lingers)
            await trio.lowlevel.checkpoint()
        finally:
            if not self.closed:
                self.die()

    def statistics(self) -> Any:
        return f"{len(self.tunnels)} open"


@dataclass
class FakeSource:
    """An `SvidSource` whose SVIDs are made of nothing."""

    identity: SpiffeIdentity = ME
    svid: object = "first"

    def current(self) -> Any:
        if isinstance(self.svid, Exception):
            raise self.svid
        return self.svid


@dataclass
class FakeDialler:
    limit: int = 100
    delay: float = 0.1
    gate: trio.Event | None = None
    script: list[BaseException | None] = field(default_factory=list)
    prepare: Callable[[FakeSession], None] = lambda session: None
    sessions: list[FakeSession] = field(default_factory=list)
    dials: int = 0
    running: int = 0
    stubborn: bool = False

    async def __call__(self, nursery: trio.Nursery, key: PoolKey, svid: object) -> Any:
        self.dials += 1
        self.running += 1
        try:
            with trio.CancelScope(shield=self.stubborn):
                await trio.sleep(self.delay)
                if self.gate is not None:
                    await self.gate.wait()
            problem = self.script.pop(0) if self.script else None
            if problem is not None:
                raise problem
        finally:
            self.running -= 1
        session = FakeSession(key, svid, self.limit)
        self.prepare(session)
        self.sessions.append(session)
        return session


def make_pool(
    dial: FakeDialler | None = None, source: FakeSource | None = None, **limits: Any
) -> tuple[ConnectionPool, FakeDialler]:
    dial = dial or FakeDialler()
    pool = ConnectionPool(cast("Any", source or FakeSource()), limits=PoolLimits(**limits), dial=cast("Any", dial))
    return pool, dial


async def open_one(pool: ConnectionPool, target: str = TARGET, **how: Any) -> FakeTunnel:
    return cast("FakeTunnel", await pool.open_tunnel(target, **how))


def counts(pool: ConnectionPool) -> tuple[int, int, int, int]:
    now = pool.statistics()
    return now.connecting, now.ready, now.full, now.draining


@dataclass(eq=False)
class Asked:
    """A call of `open_tunnel` in a task of its own."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    tunnel: FakeTunnel | None = None
    error: Exception | None = None
    done: bool = False


def ask(nursery: trio.Nursery, pool: ConnectionPool, target: str = TARGET, **how: Any) -> Asked:
    asked = Asked()

    async def call() -> None:
        with asked.scope:
            try:
                asked.tunnel = await open_one(pool, target, **how)
            except HboneError as error:
                asked.error = error
        asked.done = True

    nursery.start_soon(call)
    return asked


async def ask_in_order(nursery: trio.Nursery, pool: ConnectionPool, n: int, target: str = TARGET) -> list[Asked]:
    asked = []
    for _ in range(n):
        asked.append(ask(nursery, pool, target))
        await trio.testing.wait_all_tasks_blocked()
    return asked


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.wire("W-POOL-1")
async def test_who_shares_a_session_and_who_does_not(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    same: list[dict[str, Any]] = [
        {},
        {"expect": PeerPolicy.trust_domain("cluster.local")},
        {"via": "10.0.0.7"},
        {"via": "10.0.0.7:15008"},
        {"via": Authority("10.0.0.7", 15008)},
        {"via": Endpoint.parse("10.0.0.7:15008")},
        {"via": "::ffff:10.0.0.7"},
        {"target": "10.0.0.7:9999"},
        {"target": cast("Any", Authority("10.0.0.7", 1))},
        {"target": "other:80", "via": "10.0.0.7"},
    ]
    other: list[dict[str, Any]] = [
        {"expect": CART},
        {"expect": [CART, "spiffe://cluster.local/ns/shop/sa/b"]},
        {"expect": PeerPolicy.trust_domain("example.org")},
        {"via": "10.0.0.7:15009"},
        {"via": "10.0.0.8"},
        {"via": "waypoint"},
        {"via": "waypoint:15009"},
        {"via": "::1"},
        {"via": "[::1]:15009"},
        {"via": "[fe80::1%eth0]:15008"},
        {"source_ip": "127.0.0.2"},
        {"source_ip": "127.0.0.3"},
    ]
    async with pool:
        for equal in same:
            await open_one(pool, **equal)
        assert dial.dials == 1
        for n, how in enumerate(other, 2):
            await open_one(pool, **how)
            await open_one(pool, **how)
            assert dial.dials == n
        # However it is written, it is the same.
        spelled: list[dict[str, Any]] = [
            {"expect": {CART}},
            {"expect": SpiffeIdentity.parse(CART)},
            {"expect": iter([CART])},
            {"via": "[::1]"},
            {"source_ip": ip_address("127.0.0.2")},
        ]
        for how in spelled:
            await open_one(pool, **how)
        assert dial.dials == 1 + len(other)
        for session in dial.sessions:
            assert session.key.source == ME
        assert str(dial.sessions[2].key.next_hop) == "10.0.0.7:15008"
        assert isinstance(dial.sessions[0].key.next_hop, Endpoint)
        assert isinstance(dial.sessions[6].key.next_hop, Authority)


async def test_a_list_of_expected_peers_is_read_at_each_call(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    async with pool:
        expect = [CART]
        await open_one(pool, expect=expect)
        expect[0] = "spiffe://cluster.local/ns/shop/sa/other"
        await open_one(pool, expect=expect)
        assert dial.dials == 2


async def test_bad_arguments_dial_nobody() -> None:
    pool, dial = make_pool()
    async with pool:
        for how in ({"target": "no-port"}, {"via": "1.2.3.4:0"}, {"via": "a b"}, {"source_ip": "localhost"}):
            with pytest.raises(InvalidAddress):
                await open_one(pool, **cast("Any", how))
        with pytest.raises(InvalidIdentity):
            await open_one(pool, expect="cart")
        assert pool.statistics().waiting == 0
    assert dial.dials == 0


async def test_what_is_remembered_of_arguments_is_bounded(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hbone.transport._pool._REMEMBERED", 3)
    pool, dial = make_pool()
    async with pool:
        for port in range(1, 10):
            await open_one(pool, f"10.0.0.7:{port}")
            assert len(pool._resolved) <= 3
    assert dial.dials == 1


async def test_target_and_headers_reach_the_session(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    dial.prepare = lambda session: session.script.append(StreamRefused("not now") if dial.dials == 1 else None)
    async with pool:
        tunnel = await open_one(pool, headers=iter([("a", "b")]))
        assert tunnel.target == Authority("10.0.0.7", 8080)
        # Sent again, they are still there.
        assert [session.headers for session in dial.sessions] == [[(("a", "b"),)]] * 2


# --- reuse, growth, waiting ------------------------------------------------------------------------------------------


@pytest.mark.wire("W-POOL-4")
async def test_one_hundred_at_once_share_one_dial(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    async with pool, trio.open_nursery() as nursery:
        asked = [ask(nursery, pool) for _ in range(100)]
        await trio.testing.wait_all_tasks_blocked()
        assert counts(pool) == (1, 0, 0, 0)
        assert pool.statistics().waiting == 100
        await trio.sleep(1)
        assert dial.dials == 1
        assert all(one.tunnel for one in asked)
        assert dial.sessions[0].most == 100
        now = pool.statistics()
        assert (now.full, now.tunnels, now.waiting, now.requests, now.reused) == (1, 100, 0, 100, 99)
        assert now.sessions[0].served == 100
        assert now.sessions[0].session == cast("Any", "100 open")


async def test_a_session_with_room_costs_no_task_and_no_checkpoint(autojump_clock: trio.testing.MockClock) -> None:
    pool, _ = make_pool()
    async with pool:
        await open_one(pool)
        steps = 0

        class Steps(trio.abc.Instrument):
            def before_task_step(self, task: trio.lowlevel.Task) -> None:
                nonlocal steps
                steps += 1

        instrument = Steps()
        trio.lowlevel.add_instrument(instrument)
        await open_one(pool)
        trio.lowlevel.remove_instrument(instrument)
        # The one checkpoint of the session's own open_tunnel.
        assert steps == 1


async def test_sessions_are_added_one_by_one_as_streams_run_out(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool(FakeDialler(limit=10, delay=1))
    async with pool, trio.open_nursery() as nursery:
        asked = [ask(nursery, pool) for _ in range(35)]
        for seconds, served in ((1.5, 10), (1, 20), (1, 30), (1, 35)):
            await trio.sleep(seconds)
            assert sum(one.tunnel is not None for one in asked) == served
            assert dial.running == (served < 35)
        assert dial.dials == 4
        assert counts(pool) == (0, 1, 3, 0)


async def test_a_full_session_is_used_again_after_streams_end(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool(FakeDialler(limit=5))
    async with pool:
        for _ in range(3):
            tunnels = [await open_one(pool) for _ in range(5)]
            for tunnel in tunnels:
                tunnel.end()
    assert dial.dials == 1


async def test_waiters_are_served_in_order_as_tunnels_end(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool(FakeDialler(limit=2), max_sessions_per_key=1)
    async with pool, trio.open_nursery() as nursery:
        held = [await open_one(pool), await open_one(pool)]
        waiting = await ask_in_order(nursery, pool, 4)
        for n, one in enumerate(waiting):
            assert not one.done
            held[n].end()
            await trio.testing.wait_all_tasks_blocked()
            assert one.tunnel is not None
            held.append(one.tunnel)
        assert dial.sessions[0].most == 2


async def test_limits_as_they_are_now(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool(FakeDialler(limit=1), max_sessions_per_key=1)
    async with pool, trio.open_nursery() as nursery:
        held = [await open_one(pool)]
        waiting = await ask_in_order(nursery, pool, 3)
        dial.sessions[0].set_limit(3)
        await trio.testing.wait_all_tasks_blocked()
        assert [one.done for one in waiting] == [True, True, False]
        dial.sessions[0].set_limit(1)
        held[0].end()
        await trio.testing.wait_all_tasks_blocked()
        assert not waiting[2].done
        for one in waiting[:2]:
            assert one.tunnel is not None
            one.tunnel.end()
        await trio.testing.wait_all_tasks_blocked()
        assert waiting[2].done


async def test_a_limit_that_sinks_before_the_reservation_is_used(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool(FakeDialler(limit=5), max_sessions_per_key=1)

    def sink(session: FakeSession) -> None:
        # On its first change the pool is about to hand out five streams; two ticks later there is only one.
        trio.lowlevel.spawn_system_task(lower, session)

    async def lower(session: FakeSession) -> None:
        session.set_limit(1)

    dial.prepare = sink
    async with pool, trio.open_nursery() as nursery:
        asked = [ask(nursery, pool) for _ in range(4)]
        await trio.sleep(10)
        assert sum(one.tunnel is not None for one in asked) <= 4
        session = dial.sessions[0]
        while not all(one.done for one in asked):
            for tunnel in list(session.tunnels):
                tunnel.end()
            await trio.testing.wait_all_tasks_blocked()
        assert all(one.tunnel for one in asked)


async def test_the_pool_is_full_of_other_keys(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool(max_sessions=2)
    async with pool, trio.open_nursery() as nursery:
        one, two = await open_one(pool, "10.0.0.1:80"), await open_one(pool, "10.0.0.2:80")
        third = ask(nursery, pool, "10.0.0.3:80")
        await trio.sleep(5)
        assert not third.done
        two.end()
        await trio.sleep(5)
        assert third.tunnel is not None
        assert dial.sessions[1].closed
        assert not dial.sessions[0].closed
        assert one.session.tunnels == [one]


# --- dials that fail -------------------------------------------------------------------------------------------------


@pytest.mark.wire("W-POOL-4")
async def test_a_failed_dial_reaches_all_who_wait_each_with_an_error_of_its_own(
    autojump_clock: trio.testing.MockClock,
) -> None:
    cause = OSError("connection refused")
    failure = PeerIdentityMismatch(expected=["a"], presented="b")
    failure.__cause__ = cause
    pool, dial = make_pool(FakeDialler(script=[failure]))
    async with pool, trio.open_nursery() as nursery:
        asked = [ask(nursery, pool) for _ in range(5)]
        await trio.sleep(0.01)  # so that its dial ends first
        elsewhere = ask(nursery, pool, "10.0.0.8:80")
        await trio.sleep(1)
        errors = [one.error for one in asked]
        assert len({id(error) for error in errors}) == 5
        for error in errors:
            assert isinstance(error, PeerIdentityMismatch)
            assert str(error) == str(failure)
            assert (error.expected, error.presented) == (("a",), "b")
            assert error.__cause__ is cause
        assert elsewhere.tunnel is not None
        # Nothing is remembered of it.
        await open_one(pool)
        assert dial.dials == 3
        assert pool.statistics().dials_failed == 1


async def test_a_dialler_that_breaks_ends_nobody_but_who_waits(autojump_clock: trio.testing.MockClock) -> None:
    bug = ZeroDivisionError("oops")
    pool, _ = make_pool(FakeDialler(script=[bug]))
    async with pool:
        with pytest.raises(ConnectFailed, match=r"dial of 10\.0\.0\.7:15008 failed: ZeroDivisionError") as caught:
            await open_one(pool)
        assert caught.value.__cause__ is bug
        await open_one(pool)


async def test_a_dial_that_fails_after_all_have_gone(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool(FakeDialler(script=[ConnectFailed("no")]))
    async with pool:
        with trio.move_on_after(0.01):
            await open_one(pool)
        assert dial.running == 1
        await trio.sleep(1)
        assert pool.statistics().sessions == ()


async def test_keyboard_interrupt_in_a_dial_is_not_hidden(autojump_clock: trio.testing.MockClock) -> None:
    pool, _ = make_pool(FakeDialler(script=[KeyboardInterrupt()]))
    with pytest.RaisesGroup(KeyboardInterrupt):
        async with pool:
            await open_one(pool)


# --- callers that go away --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", range(5))
async def test_a_cancelled_waiter_harms_nobody(position: int, autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool(FakeDialler(limit=3, delay=1))
    async with pool, trio.open_nursery() as nursery:
        asked = await ask_in_order(nursery, pool, 5)
        gone = asked.pop(position)
        gone.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert gone.done
        assert pool.statistics().waiting == 4
        await trio.sleep(5)
        assert all(one.tunnel for one in asked)
        assert gone.tunnel is None
        assert dial.dials == 2


async def test_all_waiters_cancelled_and_the_session_is_kept_until_idle(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool(idle_timeout=300)
    async with pool, trio.open_nursery() as nursery:
        asked = [ask(nursery, pool) for _ in range(5)]
        await trio.testing.wait_all_tasks_blocked()
        for one in asked:
            one.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert counts(pool) == (1, 0, 0, 0)
        await trio.sleep(1)
        assert counts(pool) == (0, 1, 0, 0)
        tunnel = await open_one(pool)
        assert dial.dials == 1
        tunnel.end()
        await trio.sleep(299)
        assert [session.closed for session in dial.sessions] == [False]
        await trio.sleep(2)
        assert dial.sessions[0].closed
        assert pool.statistics().sessions == ()


async def test_cancelled_between_reservation_and_use(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool(FakeDialler(limit=1), max_sessions_per_key=1)
    async with pool, trio.open_nursery() as nursery:
        held = await open_one(pool)
        first, second = await ask_in_order(nursery, pool, 2)
        held.end()  # the stream is promised to `first`, which has not run yet
        first.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        # Whether the wake-up or the cancellation was first, the stream is not lost.
        assert first.done
        assert second.tunnel is not None
        assert dial.sessions[0].most == 1


async def test_cancelled_during_the_request(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    gate = trio.Event()
    dial.prepare = lambda session: setattr(session, "gate", gate)
    async with pool:
        with trio.move_on_after(5):
            await open_one(pool)
        assert pool.statistics().tunnels == 0
        gate.set()
        await open_one(pool)
        assert dial.dials == 1


class CancelAtStep(trio.abc.Instrument):
    """Cancels the n-th checkpoint of one task: the task is then cancelled where it waits, or at its next checkpoint."""

    def __init__(self, step: int) -> None:
        self.left = step
        self.scope = trio.CancelScope()
        self.task: trio.lowlevel.Task | None = None

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.left -= 1
            if self.left == 0:
                self.scope.cancel()


async def cancel_everywhere(
    attempt: Callable[[Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]], Any],
) -> int:
    """Run ``attempt(cancellable)`` with the n-th checkpoint of what it gives to ``cancellable`` cancelled, n = 1, 2...

    Returns how many checkpoints there were.
    """
    for step in range(1, 200):
        instrument = CancelAtStep(step)

        async def cancellable(body: Callable[[], Awaitable[None]], instrument: CancelAtStep = instrument) -> None:
            instrument.task = trio.lowlevel.current_task()
            trio.lowlevel.add_instrument(instrument)
            try:
                with instrument.scope:
                    await body()
            finally:
                trio.lowlevel.remove_instrument(instrument)

        await attempt(cancellable)
        if instrument.left > 0:
            return step - 1
    raise AssertionError("it never ends")


@asynccontextmanager
async def nothing_left(pool: ConnectionPool, dial: FakeDialler) -> AsyncIterator[None]:
    """Inside an open pool: afterwards it must be as good as new, and after closing it nothing must be left."""
    async with pool:
        yield
        await trio.testing.wait_all_tasks_blocked()
        now = pool.statistics()
        assert now.waiting == 0
        assert now.tunnels == sum(session.open_streams for session in dial.sessions)
        for entry in pool._state.entries:
            assert entry.reserved == 0
        dial.script.clear()
        for session in dial.sessions:
            session.script.clear()
            for tunnel in list(session.tunnels):
                tunnel.end()
        if not pool._state.closing:
            tunnel = await open_one(pool)
            assert pool.statistics().tunnels == 1
            tunnel.end()
    assert pool.statistics().sessions == ()
    assert dial.running == 0
    assert pool._dials == {}
    assert all(session.closed for session in dial.sessions)


async def test_cancelled_at_every_checkpoint_of_an_open_that_dials(autojump_clock: trio.testing.MockClock) -> None:
    async def attempt(cancellable: Any) -> None:
        pool, dial = make_pool()

        async def body() -> None:
            await open_one(pool)

        async with nothing_left(pool, dial):
            await cancellable(body)

    assert await cancel_everywhere(attempt) >= 2


async def test_cancelled_at_every_checkpoint_of_an_open_that_is_retried(autojump_clock: trio.testing.MockClock) -> None:
    async def attempt(cancellable: Any) -> None:
        pool, dial = make_pool()
        dial.prepare = lambda session: session.script.extend([StreamRefused("no")] if dial.dials < 3 else [])

        async def body() -> None:
            await open_one(pool)

        async with nothing_left(pool, dial):
            await cancellable(body)

    assert await cancel_everywhere(attempt) >= 6


async def test_cancelled_at_every_checkpoint_of_an_open_that_waits_for_a_stream(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def attempt(cancellable: Any) -> None:
        pool, dial = make_pool(FakeDialler(limit=1), max_sessions_per_key=1)

        async def body() -> None:
            await open_one(pool)

        async with nothing_left(pool, dial), trio.open_nursery() as nursery:
            held = await open_one(pool)
            nursery.start_soon(cancellable, body)
            await trio.sleep(1)
            after = ask(nursery, pool)
            await trio.sleep(1)
            held.end()
            await trio.sleep(1)
            for tunnel in list(dial.sessions[0].tunnels):
                tunnel.end()
            await trio.sleep(1)
            assert after.tunnel is not None

    assert await cancel_everywhere(attempt) >= 2


@pytest.mark.parametrize("how", ["drain", "aclose"])
async def test_cancelled_at_every_checkpoint_of_closing(how: str, autojump_clock: trio.testing.MockClock) -> None:
    async def attempt(cancellable: Any) -> None:
        pool, dial = make_pool()

        async def body() -> None:
            await (pool.drain(5) if how == "drain" else pool.aclose())

        async with nothing_left(pool, dial), trio.open_nursery() as nursery:
            await open_one(pool, "10.0.0.1:80")
            (await open_one(pool, "10.0.0.2:80")).end()
            waiter = ask(nursery, pool, "10.0.0.3:80")
            await trio.testing.wait_all_tasks_blocked()
            for session in dial.sessions:
                session.lingers = 1
            await cancellable(body)
            await trio.testing.wait_all_tasks_blocked()
            assert isinstance(waiter.error, SessionClosed)

    assert await cancel_everywhere(attempt) >= 2


async def test_cancelled_at_every_checkpoint_of_the_whole_block(autojump_clock: trio.testing.MockClock) -> None:
    async def attempt(cancellable: Any) -> None:
        pool, dial = make_pool()

        async def body() -> None:
            async with pool:
                await open_one(pool)

        await cancellable(body)
        assert pool.statistics().sessions == ()
        assert dial.running == 0
        assert all(session.closed for session in dial.sessions)

    assert await cancel_everywhere(attempt) >= 4


# --- sessions that go away -------------------------------------------------------------------------------------------


async def test_goaway_lets_tunnels_finish_and_others_go_to_a_new_session(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pool, dial = make_pool()
    async with pool:
        old = await open_one(pool)
        dial.sessions[0].goaway()
        assert counts(pool) == (0, 0, 0, 1)
        new = await open_one(pool)
        assert new.session is dial.sessions[1]
        await trio.sleep(1000)
        assert [session.closed for session in dial.sessions] == [False, False]
        old.end()
        await trio.testing.wait_all_tasks_blocked()
        assert dial.sessions[0].closed
        assert dial.sessions[0].close_asked == 1
        assert counts(pool) == (0, 1, 0, 0)


async def test_a_session_that_dies_is_replaced(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    async with pool:
        await open_one(pool)
        dial.sessions[0].die()
        assert pool.statistics().sessions == ()
        assert (await open_one(pool)).session is dial.sessions[1]


@pytest.mark.parametrize("how", ["goaway", "die"])
async def test_a_session_that_is_gone_before_its_dial_was_told(
    how: str, autojump_clock: trio.testing.MockClock
) -> None:
    pool, dial = make_pool()
    dial.prepare = lambda session: getattr(session, how)() if dial.dials == 1 else None
    async with pool:
        assert (await open_one(pool)).session is dial.sessions[1]
        await trio.testing.wait_all_tasks_blocked()
        assert dial.sessions[0].closed


async def test_a_peer_that_takes_down_each_session_at_once_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    dial.prepare = lambda session: session.goaway()
    async with pool:
        with pytest.raises(SessionClosed, match="drains each new session"):
            await open_one(pool)
        assert dial.dials == 3


@pytest.mark.wire("W-POOL-5")
async def test_idle_sessions_expire_and_used_ones_do_not(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool(idle_timeout=60)
    async with pool:
        await open_one(pool, "10.0.0.1:80")
        (await open_one(pool, "10.0.0.2:80")).end()
        await trio.sleep(30)
        (await open_one(pool, "10.0.0.3:80")).end()
        await trio.sleep(31)
        assert [session.closed for session in dial.sessions] == [False, True, False]
        await trio.sleep(31)
        assert [session.closed for session in dial.sessions] == [False, True, True]
        await trio.sleep(1000)
        assert not dial.sessions[0].closed


async def test_idle_sessions_can_be_kept_for_ever(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool(idle_timeout=math.inf)
    async with pool:
        (await open_one(pool)).end()
        await trio.sleep(10**6)
        assert not dial.sessions[0].closed


# --- what is asked again, and what is not ----------------------------------------------------------------------------


async def test_refused_stream_is_asked_again_on_a_fresh_session(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    async with pool:
        tunnel = await open_one(pool)
        dial.sessions[0].script.append(StreamRefused("too many"))
        assert (await open_one(pool)).session is dial.sessions[1]
        assert tunnel.session.tunnels == [tunnel]
        assert pool.statistics().retried == 1
        # The first takes no more than it had when it refused, for now.
        assert counts(pool) == (0, 1, 1, 0)
        for _ in range(3):
            assert (await open_one(pool)).session is dial.sessions[1]
        tunnel.end()
        assert counts(pool) == (0, 2, 0, 0)
        assert (await open_one(pool)).session is dial.sessions[0]


async def test_unprocessed_by_goaway_is_asked_again(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    gate = trio.Event()
    async with pool, trio.open_nursery() as nursery:
        live = await open_one(pool)
        dial.sessions[0].gate = gate
        dial.sessions[0].script.append(StreamRefused("GOAWAY"))
        asked = ask(nursery, pool)
        await trio.testing.wait_all_tasks_blocked()
        dial.sessions[0].goaway()
        gate.set()
        await trio.sleep(1)
        assert asked.tunnel is not None
        assert asked.tunnel.session is dial.sessions[1]
        assert live.session.tunnels == [live]


async def test_a_peer_that_refuses_all_is_asked_three_times(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    dial.prepare = lambda session: session.script.extend([StreamRefused("no")] * 9)
    async with pool:
        with pytest.raises(StreamRefused):
            await open_one(pool)
        assert sum(session.requests for session in dial.sessions) == 3
        assert dial.dials == 3
        await trio.testing.wait_all_tasks_blocked()
        assert pool.statistics().sessions == ()


async def test_a_repeated_request_goes_before_those_who_came_later(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool(FakeDialler(limit=2), max_sessions_per_key=1)
    gate = trio.Event()
    async with pool, trio.open_nursery() as nursery:
        held = await open_one(pool)
        session = dial.sessions[0]
        session.gate = gate
        session.script.append(StreamRefused("no"))
        refused = ask(nursery, pool)
        await trio.testing.wait_all_tasks_blocked()
        later = ask(nursery, pool)
        await trio.testing.wait_all_tasks_blocked()
        session.gate = None
        gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert not refused.done
        assert not later.done
        held.end()
        await trio.testing.wait_all_tasks_blocked()
        assert refused.tunnel is not None


async def test_a_session_that_breaks_under_a_request_is_not_asked_again(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    gate = trio.Event()
    dial.prepare = lambda session: setattr(session, "gate", gate)
    async with pool, trio.open_nursery() as nursery:
        asked = ask(nursery, pool)
        await trio.sleep(1)
        dial.sessions[0].die()
        gate.set()
        await trio.sleep(1)
        assert isinstance(asked.error, SessionClosed)
        assert dial.dials == 1
        assert pool.statistics().sessions == ()


async def test_a_status_is_an_answer(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    dial.prepare = lambda session: session.script.append(PolicyDenied(401))
    async with pool:
        with pytest.raises(PolicyDenied):
            await open_one(pool)
        await open_one(pool)
        assert dial.dials == 1
        assert dial.sessions[0].requests == 2
        assert pool.statistics().retried == 0


async def test_a_request_that_fails_before_it_has_a_stream_costs_no_place(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pool, dial = make_pool(FakeDialler(limit=2))

    class Picky(FakeSession):
        async def open_tunnel(self, target: Authority, *, headers: Iterable[tuple[Any, Any]] = ()) -> FakeTunnel:
            if headers:
                raise LocalProtocolError("a header that cannot be sent")
            return await super().open_tunnel(target, headers=headers)

    def make_picky(session: FakeSession) -> None:
        session.__class__ = Picky

    dial.prepare = make_picky
    async with pool:
        for _ in range(5):
            with pytest.raises(LocalProtocolError):
                await open_one(pool, headers=[("a", "b")])
        await open_one(pool)
        await open_one(pool)
        assert dial.dials == 1


# --- rotation --------------------------------------------------------------------------------------------------------


async def test_a_new_svid_gets_new_sessions_and_live_tunnels_go_on(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource()
    pool, dial = make_pool(source=source)
    async with pool:
        live = await open_one(pool)
        (await open_one(pool, "10.0.0.8:80")).end()
        source.svid = "second"
        new = await open_one(pool)
        assert [session.svid for session in dial.sessions] == ["first", "first", "second"]
        assert new.session is dial.sessions[2]
        await trio.sleep(1)
        assert [session.closed for session in dial.sessions] == [False, True, False]
        assert live.session.tunnels == [live]
        live.end()
        await trio.sleep(1)
        assert dial.sessions[0].closed


@pytest.mark.parametrize("stubborn", [False, True])
async def test_a_new_svid_during_a_dial(stubborn: bool, autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource()
    pool, dial = make_pool(FakeDialler(delay=5, stubborn=stubborn), source=source)
    async with pool, trio.open_nursery() as nursery:
        first = ask(nursery, pool)
        await trio.sleep(1)
        source.svid = "second"
        second = ask(nursery, pool)
        await trio.sleep(20)
        assert first.tunnel is not None
        assert second.tunnel is not None
        assert first.tunnel.session is second.tunnel.session
        assert first.tunnel.session.svid == "second"
        assert counts(pool) == (0, 1, 0, 0)
        assert len(dial.sessions) == 1 + stubborn
        assert sum(session.closed for session in dial.sessions) == stubborn


async def test_no_svid_now(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(svid=CertificateUnavailable(ME, "the CA does not answer"))
    pool, _ = make_pool(source=source)
    async with pool:
        with pytest.raises(CertificateUnavailable):
            await open_one(pool)
        source.svid = "there"
        await open_one(pool)


# --- closing ---------------------------------------------------------------------------------------------------------


async def test_the_pool_must_be_open() -> None:
    pool, _ = make_pool()
    assert repr(pool) == f"<ConnectionPool of {ME}: not open>"
    with pytest.raises(LocalProtocolError, match="async with"):
        await open_one(pool)
    async with pool:
        pass
    with pytest.raises(LocalProtocolError, match="the pool is closed"):
        await open_one(pool)
    with pytest.raises(LocalProtocolError, match="only once"):
        async with pool:
            pass  # pragma: no cover


async def test_repr_and_statistics(autojump_clock: trio.testing.MockClock) -> None:
    pool, _ = make_pool(FakeDialler(limit=2), max_sessions_per_key=1)
    async with pool, trio.open_nursery() as nursery:
        await open_one(pool)
        await open_one(pool)
        ask(nursery, pool)
        cancelled = ask(nursery, pool, "10.0.0.8:80")
        await trio.testing.wait_all_tasks_blocked()
        assert repr(pool) == (
            f"<ConnectionPool of {ME}: 1 connecting, 0 ready, 1 full, 0 draining; 2 tunnels, 2 waiting>"
        )
        full, connecting = pool.statistics().sessions
        assert (full.state, full.tunnels, full.limit, full.served) == (SessionState.FULL, 2, 2, 2)
        assert (connecting.state, connecting.session) == (SessionState.CONNECTING, None)
        cancelled.scope.cancel()
        nursery.cancel_scope.cancel()
    assert repr(pool) == (
        f"<ConnectionPool of {ME}: closed, 0 connecting, 0 ready, 0 full, 0 draining; 0 tunnels, 0 waiting>"
    )


async def test_leaving_the_block_closes_whatever_there_is(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool(FakeDialler(limit=2), max_sessions=5)
    async with trio.open_nursery() as nursery:
        async with pool:
            await open_one(pool, "10.0.0.1:80")
            await open_one(pool, "10.0.0.1:80")
            (await open_one(pool, "10.0.0.2:80")).end()
            draining = await open_one(pool, "10.0.0.3:80")
            draining.session.goaway()
            dialling = ask(nursery, pool, "10.0.0.4:80")
            queued = ask(nursery, pool, "10.0.0.1:80")
            await trio.testing.wait_all_tasks_blocked()
            assert counts(pool) == (2, 1, 1, 1)
            for session in dial.sessions:
                session.lingers = 1
            begin = trio.current_time()
        assert trio.current_time() - begin == 1
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(dialling.error, SessionClosed)
        assert isinstance(queued.error, SessionClosed)
    assert all(session.closed for session in dial.sessions)
    assert pool.statistics().sessions == ()
    assert dial.running == 0


async def test_a_session_that_does_not_close_is_not_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    dial.prepare = lambda session: setattr(session, "lingers", 10**6)
    begin = trio.current_time()
    async with pool:
        await open_one(pool)
    assert trio.current_time() - begin < 10
    assert dial.sessions[0].closed


async def test_an_exception_leaves_the_block_as_it_is(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()

    async def use() -> None:
        async with pool:
            await open_one(pool)
            raise KeyError

    with pytest.raises(KeyError):
        await use()
    assert dial.sessions[0].closed


async def test_cancelled_from_outside_it_closes_at_once(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    dial.prepare = lambda session: setattr(session, "lingers", 1)
    begin = trio.current_time()
    with trio.move_on_after(5) as scope:
        async with pool:
            await open_one(pool)
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert trio.current_time() - begin == 5
    assert dial.sessions[0].closed


async def test_cancelled_from_outside_others_that_wait_are_told(autojump_clock: trio.testing.MockClock) -> None:
    pool, _ = make_pool(FakeDialler(delay=100))
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with pool:
                asked = ask(nursery, pool)
                await trio.testing.wait_all_tasks_blocked()
                # Stay in the block, so that only the cancellation can end the dial.
                with trio.CancelScope(shield=True):
                    scope.cancel()
                    await trio.testing.wait_all_tasks_blocked()
                    assert isinstance(asked.error, SessionClosed)
    assert pool.statistics().sessions == ()


async def test_closed_under_a_request_that_would_be_repeated(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    gate = trio.Event()

    def prepare(session: FakeSession) -> None:
        session.gate = gate
        session.script.append(StreamRefused("GOAWAY"))

    dial.prepare = prepare
    async with pool, trio.open_nursery() as nursery:
        asked = ask(nursery, pool)
        await trio.sleep(1)
        nursery.start_soon(pool.drain, 5)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
        await trio.sleep(1)
        assert isinstance(asked.error, StreamRefused)


async def test_drain_waits_for_tunnels(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    async with pool, trio.open_nursery() as nursery:
        tunnel = await open_one(pool)
        (await open_one(pool, "10.0.0.8:80")).end()
        begin = trio.current_time()
        nursery.start_soon(pool.drain, 60)
        await trio.sleep(5)
        assert [session.closed for session in dial.sessions] == [False, True]
        with pytest.raises(LocalProtocolError):
            await open_one(pool)
        nursery.start_soon(pool.drain, 60)
        tunnel.end()
    assert trio.current_time() - begin == 5
    assert all(session.closed for session in dial.sessions)


async def test_drain_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    async with pool:
        await open_one(pool)
        begin = trio.current_time()
        await pool.drain(60)
        assert trio.current_time() - begin == 60
        assert dial.sessions[0].closed
        # Nothing is there any more: nothing to wait for.
        await pool.drain(60)
        assert trio.current_time() - begin == 60


async def test_drain_of_an_empty_pool() -> None:
    pool, _ = make_pool()
    async with pool:
        await pool.drain(1000)


async def test_aclose_may_come_from_another_task_and_twice(autojump_clock: trio.testing.MockClock) -> None:
    pool, dial = make_pool()
    async with pool:
        await open_one(pool)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.aclose)
            nursery.start_soon(pool.aclose)
        assert dial.sessions[0].closed
        with pytest.raises(LocalProtocolError):
            await open_one(pool)
