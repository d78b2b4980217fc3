"""The pool over real sessions and sockets: TLS, HTTP/2 and peers that say GOAWAY, refuse, vanish or fall silent."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from support import frames
from support.backends import refused_port
from support.certs import CLIENT, OTHER, SERVER, pki
from support.frames import Code, Kind, Setting
from support.rawpeer import RawListener, RawPeer

from hbone.errors import (
    ConnectFailed,
    IdentityRefused,
    PeerIdentityMismatch,
    PolicyDenied,
    RequestRejected,
    SessionClosed,
    StreamRefused,
)
from hbone.protocol import Limits
from hbone.tls import PeerPolicy, Svid
from hbone.transport import HBONEServer, Timeouts, Tunnel, TunnelRequest
from hbone.transport._pool import ConnectionPool
from hbone.transport._pool_state import PoolLimits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from support.certs import Leaf

    from hbone.address import Endpoint

TARGET = "10.1.2.3:8080"


def svid(leaf: Leaf | None = None) -> Svid:
    leaf = leaf or pki().client
    return Svid.from_files(leaf.cert, leaf.key, leaf.roots)


async def echo(request: TunnelRequest) -> None:
    """Gives back what comes, and ends when the other side ends."""
    async with await request.accept() as tunnel:
        async for chunk in tunnel:
            await tunnel.send_all(chunk)
        await tunnel.send_eof()


@dataclass
class Place:
    server: HBONEServer
    via: str


@asynccontextmanager
async def serving(handler: Any = echo, *, leaf: Leaf | None = None, **options: Any) -> AsyncIterator[Place]:
    server = HBONEServer(svid(leaf or pki().server), handler, **options)
    with trio.fail_after(100):
        async with trio.open_nursery() as nursery:
            endpoint = await nursery.start(server.serve, "127.0.0.1", 0)
            yield Place(server, str(endpoint))
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def scripted(script: Callable[[RawListener], None]) -> AsyncIterator[str]:
    """A hand-made server; its script must end for the block to end."""
    with RawListener(pki().server) as listener, trio.fail_after(100):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(trio.to_thread.run_sync, script, listener, abandon_on_cancel=True))
            yield f"127.0.0.1:{listener.port}"


async def works(tunnel: Tunnel, data: bytes = b"hello") -> None:
    await tunnel.send_all(data)
    got = b""
    while len(got) < len(data):
        piece = await tunnel.receive_some()
        assert piece
        got += piece
    assert got == data


async def in_parallel(n: int, work: Callable[[], Any]) -> list[Any]:
    """The results of n calls at once; exceptions are results too."""
    results: list[Any] = []

    async def one() -> None:
        try:
            results.append(await work())
        except Exception as problem:
            results.append(problem)

    async with trio.open_nursery() as nursery:
        for _ in range(n):
            nursery.start_soon(one)
    return results


async def until(condition: Callable[[], bool]) -> None:
    """For what the other end of a socket brings about; bounded by the test's own deadline."""
    while not condition():
        await trio.sleep(0.001)


# --- sharing and growing ---------------------------------------------------------------------------------------------


async def test_a_hundred_tunnels_at_once_on_one_session() -> None:
    async with serving() as there, ConnectionPool(svid()) as pool:
        tunnels = await in_parallel(100, lambda: pool.open_tunnel(TARGET, via=there.via, expect=SERVER))
        assert there.server.statistics().accepted == 1
        assert there.server.statistics().tunnels == 100
        assert len({id(tunnel) for tunnel in tunnels}) == 100
        for tunnel in tunnels:
            await works(tunnel)
        now = pool.statistics()
        assert (now.dials, now.full, now.tunnels) == (1, 1, 100)
        assert now.sessions[0].session is not None
        assert now.sessions[0].session.tunnels_opened == 100
        await in_parallel(100, lambda: tunnels.pop().aclose())
        assert pool.statistics().tunnels == 0
        assert pool.statistics().ready == 1


async def test_a_server_that_allows_ten_costs_no_tunnel() -> None:
    async with (
        serving(limits=Limits(max_concurrent_streams=10)) as there,
        ConnectionPool(svid()) as pool,
    ):
        tunnels = await in_parallel(35, lambda: pool.open_tunnel(TARGET, via=there.via))
        assert [type(tunnel) for tunnel in tunnels] == [Tunnel] * 35
        assert there.server.statistics().accepted == 4
        assert sorted(session.open_streams for session in there.server.sessions) == [5, 10, 10, 10]
        assert pool.statistics().retried == 0


async def test_a_session_that_was_full_is_used_again() -> None:
    async with (
        serving(limits=Limits(max_concurrent_streams=3)) as there,
        ConnectionPool(svid(), limits=PoolLimits(max_sessions_per_key=1)) as pool,
    ):

        async def one() -> None:
            async with await pool.open_tunnel(TARGET, via=there.via) as tunnel:
                await works(tunnel)
                await tunnel.send_eof()
                assert await tunnel.receive_some() == b""

        assert await in_parallel(30, one) == [None] * 30
        assert there.server.statistics().accepted == 1
        assert pool.statistics().reused == 29


async def test_the_peers_limit_changes_under_way() -> None:
    announced = trio.Event()

    def script(listener: RawListener) -> None:
        with listener.accept() as peer:
            peer.open({Setting.MAX_CONCURRENT_STREAMS: 1})
            peer.wait_for(Kind.HEADERS, stream=1)
            peer.send(frames.response(1))
            trio.from_thread.run(announced.wait)
            peer.send(frames.settings([(Setting.MAX_CONCURRENT_STREAMS, 2)]))
            peer.wait_for(Kind.HEADERS, stream=3)
            peer.send(frames.response(3))
            peer.wait_end()

    async with scripted(script) as via:
        async with ConnectionPool(svid(), limits=PoolLimits(max_sessions_per_key=1)) as pool:
            await pool.open_tunnel(TARGET, via=via)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(pool.open_tunnel, TARGET, via=via))
                await until(lambda: pool.statistics().waiting == 1)
                announced.set()
            assert pool.statistics().tunnels == 2
            assert pool.statistics().dials == 1


async def test_next_hops_by_name_and_source_addresses() -> None:
    seen: list[Endpoint] = []

    async def handler(request: TunnelRequest) -> None:
        assert request.peer.address is not None
        seen.append(request.peer.address)
        await echo(request)

    async with serving(handler) as there, ConnectionPool(svid()) as pool:
        port = there.via.rpartition(":")[2]
        await works(await pool.open_tunnel(TARGET, via=f"localhost:{port}"))
        if sys.platform == "linux":  # elsewhere the loopback is one address
            await works(await pool.open_tunnel(TARGET, via=there.via, source_ip="127.0.0.2"))
            assert str(seen[-1].ip) == "127.0.0.2"
        assert len(set(seen)) == len(seen)


@pytest.mark.wire("W-POOL-1")
async def test_identities_never_share() -> None:
    async with serving() as there, ConnectionPool(svid()) as pool:
        await works(await pool.open_tunnel(TARGET, via=there.via, expect=SERVER))
        # There is a session to this place, with a peer that is not expected here.
        with pytest.raises(PeerIdentityMismatch) as caught:
            await pool.open_tunnel(TARGET, via=there.via, expect=OTHER)
        assert caught.value.presented == SERVER
        await works(await pool.open_tunnel(TARGET, via=there.via, expect=[OTHER, SERVER]))
        assert pool.statistics().dials == 3


# --- what goes wrong -------------------------------------------------------------------------------------------------


async def test_nobody_listens() -> None:
    with refused_port() as port:
        async with ConnectionPool(svid()) as pool:
            errors = await in_parallel(5, lambda: pool.open_tunnel(TARGET, via=f"127.0.0.1:{port}"))
            assert [type(error) for error in errors] == [ConnectFailed] * 5
            assert len({id(error) for error in errors}) == 5
            assert len({id(error.__cause__) for error in errors}) == 1
            assert isinstance(errors[0].__cause__, ConnectionRefusedError)
            assert pool.statistics().dials == 1


async def test_a_peer_that_does_not_take_us() -> None:
    async with serving(accept=PeerPolicy.exact(OTHER)) as there, ConnectionPool(svid()) as pool:
        errors = await in_parallel(3, lambda: pool.open_tunnel(TARGET, via=there.via))
        assert [type(one) for one in errors] == [IdentityRefused] * 3
        assert pool.statistics().dials == 1


async def test_a_refusal_leaves_the_session_as_it_is() -> None:
    async def handler(request: TunnelRequest) -> None:
        if request.target.port == 1:
            raise RequestRejected(401)
        await echo(request)

    async with serving(handler) as there, ConnectionPool(svid()) as pool:
        for _ in range(3):
            with pytest.raises(PolicyDenied):
                await pool.open_tunnel("10.1.2.3:1", via=there.via)
        await works(await pool.open_tunnel(TARGET, via=there.via))
        assert pool.statistics().dials == 1
        assert pool.statistics().tunnels == 1


async def test_headers_that_cannot_be_sent_cost_no_stream() -> None:
    async with serving() as there, ConnectionPool(svid()) as pool:
        for _ in range(3):
            with pytest.raises(Exception, match="header"):
                await pool.open_tunnel(TARGET, via=there.via, headers=[("a b", "c\r\n")])
        assert pool.statistics().tunnels == 0
        await works(await pool.open_tunnel(TARGET, via=there.via, headers=[("x-a", "b")]))


async def test_goaway_during_a_transfer() -> None:
    data = os.urandom(1 << 20)
    async with serving() as there, ConnectionPool(svid()) as pool, trio.open_nursery() as nursery:
        old = await pool.open_tunnel(TARGET, via=there.via)
        await works(old)
        there.server.sessions[0].begin_drain()
        await until(lambda: pool.statistics().draining == 1)
        new = await pool.open_tunnel(TARGET, via=there.via)
        assert new.session is not old.session

        async def send() -> None:
            for _ in range(8):
                await old.send_all(data)
            await old.send_eof()

        nursery.start_soon(send)
        digest, size = hashlib.sha256(), 0
        async for chunk in old:
            digest.update(chunk)
            size += len(chunk)
        assert size == 8 << 20
        assert digest.digest() == hashlib.sha256(data * 8).digest()
        await works(new)
        await until(lambda: pool.statistics().draining == 0)
        await until(lambda: there.server.statistics().sessions == 1)


async def test_a_session_that_dies_breaks_its_tunnels_and_is_replaced() -> None:
    asked = 0

    async def handler(request: TunnelRequest) -> None:
        nonlocal asked
        if request.target.port == 1:
            asked += 1
            await trio.sleep_forever()
        await echo(request)

    async with serving(handler) as there, ConnectionPool(svid()) as pool:
        tunnel = await pool.open_tunnel(TARGET, via=there.via)
        async with trio.open_nursery() as nursery:

            async def unanswered() -> None:
                with pytest.raises(SessionClosed):
                    await pool.open_tunnel("10.1.2.3:1", via=there.via)

            nursery.start_soon(unanswered)
            await until(lambda: asked == 1)
            there.server.sessions[0].kill()
        with pytest.raises(trio.BrokenResourceError):
            await tunnel.receive_some()
        await works(await pool.open_tunnel(TARGET, via=there.via))
        # It may have reached the target: it was not asked for again.
        assert asked == 1
        assert pool.statistics().dials == 2


async def test_refused_stream_is_asked_again_elsewhere() -> None:
    def script(listener: RawListener) -> None:
        with listener.accept() as first:
            first.open({})
            first.wait_for(Kind.HEADERS, stream=1)
            first.send(frames.response(1))
            first.wait_for(Kind.HEADERS, stream=3)
            first.send(frames.rst(3, Code.REFUSED_STREAM))
            with listener.accept() as second:
                second.open({})
                second.wait_for(Kind.HEADERS, stream=1)
                second.send(frames.response(1))
                second.wait_end()
                first.wait_end()

    async with scripted(script) as via:
        async with ConnectionPool(svid()) as pool:
            one = await pool.open_tunnel(TARGET, via=via)
            two = await pool.open_tunnel(TARGET, via=via)
            assert one.session is not two.session
            assert one.stream.open
            now = pool.statistics()
            assert (now.retried, now.full, now.ready) == (1, 1, 1)


async def test_unprocessed_by_goaway_is_asked_again_elsewhere() -> None:
    def script(listener: RawListener) -> None:
        with listener.accept() as first:
            first.open({})
            first.wait_for(Kind.HEADERS, stream=1)
            first.send(frames.response(1))
            first.wait_for(Kind.HEADERS, stream=3)
            first.send(frames.goaway(1))
            with listener.accept() as second:
                second.open({})
                second.wait_for(Kind.HEADERS, stream=1)
                second.send(frames.response(1))
                second.send(frames.data(1, b"here"))
                first.send(frames.data(1, b"there"))
                second.wait_end()
                first.wait_end()

    async with scripted(script) as via:
        async with ConnectionPool(svid()) as pool:
            one = await pool.open_tunnel(TARGET, via=via)
            two = await pool.open_tunnel(TARGET, via=via)
            assert await one.receive_some() == b"there"
            assert await two.receive_some() == b"here"
            assert (pool.statistics().retried, pool.statistics().draining) == (1, 1)


async def test_a_peer_that_refuses_everything_is_asked_three_times() -> None:
    def script(listener: RawListener) -> None:
        for _ in range(3):
            with listener.accept() as peer:
                peer.open({})
                peer.wait_for(Kind.HEADERS, stream=1)
                peer.send(frames.rst(1, Code.REFUSED_STREAM))
                peer.wait_end()

    async with scripted(script) as via, ConnectionPool(svid()) as pool:
        with pytest.raises(StreamRefused):
            await pool.open_tunnel(TARGET, via=via)
        assert pool.statistics().dials == 3


async def test_a_peer_that_falls_silent_is_left() -> None:
    gone = trio.Event()

    def script(listener: RawListener) -> None:
        def serve() -> RawPeer:
            peer = listener.accept()
            peer.open({})
            peer.wait_for(Kind.HEADERS, stream=1)
            peer.send(frames.response(1))
            return peer

        with serve():  # and from now on it reads nothing
            trio.from_thread.run(gone.wait)
        with serve() as second:
            second.wait_end()

    async with scripted(script) as via:
        timeouts = Timeouts(ping_interval=0.05, ping_timeout=3, close=0.1)  # the second one must answer in time
        async with ConnectionPool(svid(), timeouts=timeouts) as pool:
            tunnel = await pool.open_tunnel(TARGET, via=via)
            with pytest.raises(trio.BrokenResourceError):
                await tunnel.receive_some()
            assert pool.statistics().sessions == ()
            gone.set()
            await pool.open_tunnel(TARGET, via=via)


# --- time and certificates -------------------------------------------------------------------------------------------


@dataclass
class Source:
    now: Svid = field(default_factory=svid)

    @property
    def identity(self) -> Any:
        return self.now.identity

    def current(self) -> Svid:
        return self.now


@pytest.mark.wire("W-TLS-10")
async def test_a_new_svid_gets_a_new_session_and_the_old_one_serves_to_its_end() -> None:
    source = Source()
    async with serving() as there, ConnectionPool(source) as pool:
        old = await pool.open_tunnel(TARGET, via=there.via)
        renewed = pki().ca.issue("renewed", [CLIENT])
        source.now = svid(renewed)
        new = await pool.open_tunnel(TARGET, via=there.via)
        assert there.server.statistics().accepted == 2
        serials = {session.peer.chain[0].serial_number for session in there.server.sessions}
        assert source.now.chain[0].serial_number in serials
        assert len(serials) == 2
        await works(old)
        await works(new)
        assert (pool.statistics().ready, pool.statistics().draining) == (1, 1)
        await old.aclose()
        await until(lambda: there.server.statistics().sessions == 1)
        await works(new)


async def test_idle_sessions_are_closed() -> None:
    async with serving() as there, ConnectionPool(svid(), limits=PoolLimits(idle_timeout=0.05)) as pool:
        await (await pool.open_tunnel(TARGET, via=there.via)).aclose()
        await until(lambda: there.server.statistics().sessions == 0)
        await until(lambda: pool.statistics().sessions == ())


# --- closing and cancellation ----------------------------------------------------------------------------------------


async def test_drain_lets_a_transfer_finish() -> None:
    async with serving() as there, ConnectionPool(svid()) as pool, trio.open_nursery() as nursery:
        tunnel = await pool.open_tunnel(TARGET, via=there.via)
        nursery.start_soon(pool.drain, 100)
        await trio.testing.wait_all_tasks_blocked()
        await works(tunnel, os.urandom(1 << 20))
        assert there.server.statistics().sessions == 1
        await tunnel.aclose()
    assert pool.statistics().sessions == ()


async def test_leaving_the_block_resets_what_is_open() -> None:
    async with serving() as there:
        async with ConnectionPool(svid()) as pool:
            tunnel = await pool.open_tunnel(TARGET, via=there.via)
            await works(tunnel)
        with pytest.raises(trio.BrokenResourceError):
            await tunnel.receive_some()
        await until(lambda: there.server.statistics().sessions == 0)


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope after the n-th step that any task but the given ones has made."""

    def __init__(self, step: int, others: set[trio.lowlevel.Task], scope: trio.CancelScope) -> None:
        self.left = step
        self.others = others
        self.scope = scope

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task not in self.others:
            self.left -= 1
            if self.left == 0:
                self.scope.cancel()


def all_tasks() -> set[trio.lowlevel.Task]:
    root = trio.lowlevel.current_root_task()
    assert root is not None
    found, todo = set(), [root]
    while todo:
        task = todo.pop()
        found.add(task)
        for nursery in task.child_nurseries:
            todo.extend(nursery.child_tasks)
    return found


async def test_cancelled_at_every_step_of_the_pool_its_dial_and_its_session() -> None:
    """Also those of the pool's own tasks: the whole pool goes at each point, and nothing of it is left."""
    async with serving() as there:

        async def use() -> None:
            async with ConnectionPool(svid()) as pool:
                async with await pool.open_tunnel(TARGET, via=there.via) as tunnel:
                    await works(tunnel)

        await use()
        await until(lambda: there.server.statistics().sessions == there.server.statistics().half_open == 0)
        gc.collect()
        files, step, done = open_files(), 0, False
        while not done:
            step += 1
            before = all_tasks()
            scope = trio.CancelScope()
            instrument = CancelAtStep(step, before - {trio.lowlevel.current_task()}, scope)
            trio.lowlevel.add_instrument(instrument)
            with scope:
                await use()
            trio.lowlevel.remove_instrument(instrument)
            done = instrument.left > 0
            await until(lambda: there.server.statistics().sessions == there.server.statistics().half_open == 0)
            await until(lambda before=before: all_tasks() <= before)  # type: ignore[misc]
            assert open_files() == files
        assert step > 10


async def test_cancelled_at_every_step_of_an_open_the_pool_stays_usable() -> None:
    async with serving() as there:
        step, done = 0, False
        while not done:
            step += 1
            async with ConnectionPool(svid()) as pool:
                scope = trio.CancelScope()
                instrument = CancelAtStep(step, all_tasks() - {trio.lowlevel.current_task()}, scope)
                trio.lowlevel.add_instrument(instrument)
                with scope:
                    async with await pool.open_tunnel(TARGET, via=there.via) as tunnel:
                        await works(tunnel)
                trio.lowlevel.remove_instrument(instrument)
                done = instrument.left > 0
                async with await pool.open_tunnel(TARGET, via=there.via) as tunnel:
                    await works(tunnel)
                await until(lambda pool=pool: pool.statistics().tunnels == 0)  # type: ignore[misc]
                assert pool.statistics().waiting == 0
                assert pool.statistics().dials == 1
                assert pool.statistics().ready == 1
        assert step > 5
