"""Relays between tunnels and sockets: every byte, every end as it was, and a reset for everything else.

Two relays with a session between them, as in the two proxies: application a, its socket, the near tunnel, the far
tunnel, another socket, application b.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import struct
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from support import frames
from support.frames import Code, Kind, Setting
from support.pairs import (
    SMALL,
    TARGET,
    Pair,
    Scripted,
    memory_pair,
    scripted_client,
    scripted_server,
    server_svid,
    socket_pair,
)
from support.tcp import connected_pair as new_pair
from support.tcp import receive_all, receive_exactly

from hbone import ErrorCode, HBONEServer, Limits, RelayResult, SessionClosed, Timeouts, TunnelReset, relay
from hbone.transport import _ends

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

UP = bytes(range(256)) * 1500
DOWN = bytes(reversed(range(256))) * 1700
LONG = Timeouts(ping_interval=1000, ping_timeout=1000)

#: Seconds that only something that hangs needs.
WAIT = 60


_applications: list[trio.SocketStream] = []


def connected_pair() -> tuple[trio.SocketStream, socket.socket]:
    """The application's end, and the relay's."""
    application, sock = new_pair()
    _applications.append(application)
    return application, sock


@pytest.fixture(autouse=True)
def close_applications() -> Iterator[None]:
    yield
    while _applications:
        fd = _applications.pop().socket.detach()
        if fd >= 0:
            os.close(fd)


@dataclass
class Bridge:
    """Both applications' ends, and what is between them."""

    a: trio.SocketStream
    b: trio.SocketStream
    near: Any
    far: Any
    pair: Pair
    results: dict[str, RelayResult] = field(default_factory=dict)
    done: trio.Event = field(default_factory=trio.Event)

    async def results_of_both(self) -> tuple[RelayResult, RelayResult]:
        with trio.fail_after(WAIT):
            await self.done.wait()
        return self.results["near"], self.results["far"]


@contextlib.asynccontextmanager
async def bridge(pair: Pair, *, buffer: int | None = None) -> AsyncIterator[Bridge]:
    """Relays on both sides of one tunnel."""
    near, far = await pair.open()
    (a, sock_a), (b, sock_b) = connected_pair(), connected_pair()
    if buffer:
        for sock in (a.socket, b.socket, sock_a, sock_b):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    made = Bridge(a, b, near, far, pair)

    async def run(name: str, *ends: Any) -> None:
        made.results[name] = await relay(*ends)
        if len(made.results) == 2:
            made.done.set()

    with trio.fail_after(WAIT):
        async with a, b, trio.open_nursery() as nursery:
            nursery.start_soon(run, "near", sock_a, near)
            nursery.start_soon(run, "far", far, sock_b)
            await trio.lowlevel.checkpoint()
            yield made
            nursery.cancel_scope.cancel()


async def expect_reset(stream: trio.SocketStream) -> None:
    """Reads on until the reset; an end of file is what must not be."""
    with pytest.raises(trio.BrokenResourceError) as caught:
        await receive_all(stream)
    assert isinstance(caught.value.__cause__, ConnectionResetError)


def reset(stream: trio.SocketStream) -> None:
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# === ends ===


@pytest.mark.wire("W-CLOSE-1", "W-CLOSE-2", "W-CLOSE-3", "W-CLOSE-4", "W-CLOSE-5")
@pytest.mark.parametrize("limits", [None, SMALL], ids=["windows of 4 MiB", "windows of 64 KiB"])
@pytest.mark.parametrize("order", ["a then b", "b then a", "both at once, a first", "both at once, b first"])
async def test_all_four_orders_of_ending(order: str, limits: Limits | None) -> None:
    async with socket_pair(limits=limits) as pair, bridge(pair) as between:
        got: dict[str, bytes] = {}

        async def receive(name: str, stream: trio.SocketStream) -> None:
            got[name] = await receive_all(stream)

        async def a() -> None:
            if order == "b then a":
                await receive("a", between.a)
            await between.a.send_all(UP)
            await between.a.send_eof()
            if order != "b then a":
                await receive("a", between.a)

        async def b() -> None:
            if order == "a then b":
                await receive("b", between.b)
            await between.b.send_all(DOWN)
            await between.b.send_eof()
            if order != "a then b":
                await receive("b", between.b)

        async with trio.open_nursery() as applications:
            for task in (a, b) if order.endswith("a first") else (b, a):
                applications.start_soon(task)
        near, far = await between.results_of_both()
        assert (near.bytes_up, near.bytes_down, near.error) == (len(UP), len(DOWN), None)
        assert (far.bytes_up, far.bytes_down, far.error) == (len(UP), len(DOWN), None)
        assert got == {"a": DOWN, "b": UP}
        assert pair.client.statistics().open_streams == 0
        assert between.near.statistics().bytes_sent == len(UP)
        assert between.far.statistics().bytes_received == len(UP)


@pytest.mark.wire("W-RST-1", "W-RST-2", "W-RST-3", "W-RST-4", "W-RST-6")
@pytest.mark.parametrize("ended", ["nobody", "a", "b"])
@pytest.mark.parametrize(
    "breaks", ["a resets", "b resets", "near resets", "far resets", "near dies", "far dies", "bare fin"]
)
async def test_a_reset_for_everything_that_breaks(breaks: str, ended: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides' applications: who waits for more gets a reset, who has had its end keeps it."""
    monkeypatch.setattr(_ends, "_LET_READ", 0.01)
    async with socket_pair(timeouts=LONG, server_options={"timeouts": LONG}) as pair, bridge(pair) as between:
        await between.a.send_all(UP)
        await between.b.send_all(DOWN)
        if ended == "a":
            await between.a.send_eof()
            assert await receive_all(between.b) == UP
        elif ended == "b":
            await between.b.send_eof()
            assert await receive_all(between.a) == DOWN
        if ended != "a":
            assert await receive_exactly(between.b, len(UP)) == UP
        if ended != "b":
            assert await receive_exactly(between.a, len(DOWN)) == DOWN
        match breaks:
            case "a resets":
                reset(between.a)
            case "b resets":
                reset(between.b)
            case "near resets":
                between.near.abort()
            case "far resets":
                between.far.abort(ErrorCode.NO_ERROR)
            case "near dies":
                pair.near_session.kill()
            case "far dies":
                pair.far_session.kill()
            case "bare fin":
                pair.near_session._carrier._sock.shutdown(socket.SHUT_WR)
        for name, stream in (("a", between.a), ("b", between.b)):
            if breaks.startswith(name):
                continue
            if ended in ("nobody", name):
                await expect_reset(stream)
        near, far = await between.results_of_both()
        assert near.error is not None
        assert far.error is not None
        assert (near.bytes_down, far.bytes_up) == (len(DOWN), len(UP))


@pytest.mark.wire("W-RST-1", "W-ERR-2")
async def test_a_broken_application_is_connect_error_on_the_wire() -> None:
    told = trio.Event()

    async def script(peer: Scripted) -> None:
        await peer.open()
        await peer.wait_for(Kind.HEADERS, stream=1)
        await peer.send(frames.response(1))
        assert (await peer.wait_for(Kind.RST_STREAM, stream=1)).code == Code.CONNECT_ERROR
        told.set()
        await peer.wait_end()

    async with scripted_server(script) as client, trio.open_nursery() as nursery:
        app, sock = connected_pair()
        results: list[RelayResult] = []

        async def run() -> None:
            results.append(await relay(sock, await client.open_tunnel(TARGET)))

        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        reset(app)
        await told.wait()
    assert "broke" in str(results[0].error)


async def test_nothing_is_left_behind() -> None:
    async with socket_pair() as pair:
        async with bridge(pair):
            pass
        await trio.testing.wait_all_tasks_blocked()
        gc.collect()
        files, tasks = open_files(), trio.lowlevel.current_statistics().tasks_living
        for breaks in ("a", "b", None, "cancel"):
            async with bridge(pair) as between:
                await between.a.send_all(b"x")
                assert await between.b.receive_some() == b"x"
                if breaks is None:
                    await between.a.send_eof()
                    await between.b.send_eof()
                    await between.results_of_both()
                elif breaks != "cancel":
                    reset(getattr(between, breaks))
                    await between.results_of_both()
            tasks += 1  # the handler of `socket_pair`, which stays
            with trio.fail_after(WAIT):
                while (open_files(), trio.lowlevel.current_statistics().tasks_living) != (files, tasks):
                    await trio.sleep(0.001)
        assert pair.client.statistics().open_streams == 0


# === back-pressure ===


@pytest.mark.parametrize("ends", ["well", "by a reset", "cancelled"])
async def test_what_has_ended_is_gone_at_once(ends: str) -> None:
    """Without a garbage collection, which would have to walk what is left of thousands of connections."""
    gone: list[Any] = []

    async def carry(application: trio.SocketStream, sock: socket.socket, tunnel: Any) -> None:
        async with application:
            with trio.CancelScope() as scope, trio.fail_after(WAIT):
                async with trio.open_nursery() as relays:
                    relays.start_soon(relay, sock, tunnel)
                    await application.send_all(b"x")
                    if ends == "well":
                        await application.send_eof()
                        await receive_all(application)
                    elif ends == "by a reset":
                        reset(application)
                    else:
                        scope.cancel()

    gc.collect()
    gc.disable()
    try:
        async with socket_pair() as pair:
            async with trio.open_nursery() as nursery:
                for tunnel in await pair.open():
                    gone.append(weakref.ref(tunnel))
                    nursery.start_soon(carry, *connected_pair(), tunnel)
                del tunnel
        assert [tunnel() for tunnel in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.wire("W-LIM-8", "W-FLOW-3")
@pytest.mark.parametrize("way", ["up", "down"])
async def test_an_application_that_does_not_read_stops_the_other(way: str) -> None:
    async with socket_pair(limits=SMALL) as pair, bridge(pair, buffer=65_536) as between:
        source, sink = (between.a, between.b) if way == "up" else (between.b, between.a)
        tunnel = between.far if way == "up" else between.near
        sent = 0
        with trio.move_on_after(0.3):
            while True:
                await source.send_all(bytes(4096))
                sent += 4096
        assert tunnel.statistics().receive_buffered <= SMALL.stream_window
        assert sent < 3_000_000
        async with trio.open_nursery() as nursery:

            async def rest() -> None:
                await source.send_all(bytes(500_000))
                await source.send_eof()

            nursery.start_soon(rest)
            assert len(await receive_all(sink)) >= sent + 500_000


async def test_the_windows_of_one_stalled_relay_stop_no_other() -> None:
    async with socket_pair(limits=Limits(stream_window=65_535, connection_window=65_535)) as pair:
        async with bridge(pair, buffer=65_536) as stalled, bridge(pair) as between:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stalled.a.send_all, bytes(4_000_000))
                await trio.testing.wait_all_tasks_blocked(0.01)
                nursery.start_soon(between.a.send_all, UP)
                assert await receive_exactly(between.b, len(UP)) == UP
                nursery.cancel_scope.cancel()


@pytest.mark.wire("W-FLOW-8")
async def test_uploads_take_turns_while_the_network_is_slow() -> None:
    """Who is read when the session can write again: not the same ones each time."""
    near, far = trio.testing.memory_stream_pair()
    gate = trio.Semaphore(0)

    async def slowly() -> None:
        await gate.acquire()

    roomy = Limits(stream_window=64 << 20, connection_window=512 << 20)
    async with memory_pair(streams=(near, far), server_limits=roomy) as pair, trio.open_nursery() as nursery:
        apps = []
        sinks = []
        for _ in range(6):
            tunnel, sink = await pair.open()
            app, sock = connected_pair()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # or the kernel gives some much more room
            apps.append(app)
            sinks.append(sink)
            nursery.start_soon(relay, sock, tunnel)
        near.send_stream.send_all_hook = slowly

        async def flood(app: trio.SocketStream) -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while True:
                    await app.send_all(bytes(1 << 20))

        for app in apps:
            nursery.start_soon(flood, app)
        for _ in range(60):
            await trio.testing.wait_all_tasks_blocked(0.001)
            gate.release()
        nursery.cancel_scope.cancel()
        near.send_stream.send_all_hook = None
        sent = sorted(tunnel.statistics().bytes_sent for tunnel in pair.near_session.tunnels)
    assert sent[0] * 2 > sent[-1] > 0, sent
    for app in apps:
        await trio.aclose_forcefully(app)


@pytest.mark.wire("W-LIM-7")
async def test_relays_that_start_while_the_network_is_full_wait_their_turn() -> None:
    """Each application has written already; all of that at once would look like a peer that does not read."""
    near, far = trio.testing.memory_stream_pair()
    gate = trio.Event()
    gate.set()
    pump: Any = near.send_stream.send_all_hook

    async def hold() -> None:
        await gate.wait()
        await pump()

    near.send_stream.send_all_hook = hold
    async with memory_pair(streams=(near, far)) as pair, trio.open_nursery() as nursery:
        tunnels = [await pair.open() for _ in range(30)]
        gate = trio.Event()
        for tunnel, sink in tunnels:
            app, sock = connected_pair()
            app.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            await app.send_all(bytes(100_000))
            await app.send_eof()
            nursery.start_soon(relay, sock, tunnel)
            await sink.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        assert 0 < pair.client.statistics().unsent < 1 << 20
        assert not pair.client.closed
        gate.set()
        with trio.fail_after(WAIT):
            for _, sink in tunnels:
                assert len(await receive_all(sink)) == 100_000


# === before the relay ===


@pytest.mark.wire("W-REQ-11", "W-REQ-12")
@pytest.mark.parametrize("end", [True, False])
async def test_what_came_before_the_relay_comes_first(end: bool) -> None:
    async with memory_pair() as pair, trio.open_nursery() as nursery:
        near, far = await pair.open()
        await near.send_all(b"early ")
        if end:
            await near.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        app, sock = connected_pair()
        nursery.start_soon(relay, far, sock)
        if not end:
            await trio.testing.wait_all_tasks_blocked()
            await near.send_all(b"late")
            await near.send_eof()
        assert await receive_all(app) == (b"early " if end else b"early late")
        await app.send_all(b"answer")
        await app.aclose()
        assert await receive_all(near) == b"answer"


@pytest.mark.parametrize("session", [True, False], ids=["session", "tunnel"])
async def test_a_relay_of_a_tunnel_that_is_broken_already(session: bool) -> None:
    async with memory_pair() as pair:
        near, far = await pair.open()
        await near.send_all(b"lost")
        await trio.testing.wait_all_tasks_blocked()
        if session:
            pair.near_session.kill()
        else:
            near.abort()
        await trio.testing.wait_all_tasks_blocked()
        app, sock = connected_pair()
        result = await relay(far, sock)
        assert isinstance(result.error, SessionClosed if session else TunnelReset)
        await expect_reset(app)
        assert sock.fileno() == -1


@pytest.mark.wire("W-RST-6")
@pytest.mark.parametrize("session", [True, False], ids=["session", "tunnel"])
async def test_what_had_ended_before_the_break_is_whole(session: bool) -> None:
    """All of the upload was there, with its end, when the tunnel broke and before the relay began."""
    async with memory_pair() as pair, trio.open_nursery() as nursery:
        near, far = await pair.open()
        await near.send_all(UP)
        await near.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        if session:
            pair.near_session.kill()
        else:
            near.abort()
        await trio.testing.wait_all_tasks_blocked()
        app, sock = connected_pair()
        results: list[RelayResult] = []

        async def run() -> None:
            results.append(await relay(far, sock))

        nursery.start_soon(run)
        assert await receive_all(app) == UP
        await app.aclose()
        with trio.fail_after(WAIT):
            while not results:
                await trio.sleep(0.001)
        assert results[0].error is not None
        assert results[0].bytes_up == len(UP)


async def test_a_relay_of_a_tunnel_whose_end_we_sent() -> None:
    """Nothing goes up any more: the application still gets its download, and its end."""
    async with memory_pair() as pair, trio.open_nursery() as nursery:
        near, far = await pair.open()
        await near.send_eof()
        app, sock = connected_pair()
        await app.send_all(b"nobody takes this")
        nursery.start_soon(relay, sock, near)
        await far.send_all(DOWN)
        await far.send_eof()
        assert await receive_all(app) == DOWN
        await app.aclose()


async def test_a_relay_after_both_ends() -> None:
    async with memory_pair() as pair:
        near, far = await pair.open()
        await far.send_all(b"down")
        await far.send_eof()
        await near.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        app, sock = connected_pair()
        await app.send_eof()
        result = await relay(sock, near)
        assert result == RelayResult(bytes_up=0, bytes_down=4, error=None)
        assert await receive_all(app) == b"down"


async def test_a_tunnel_that_is_in_use_is_not_relayed() -> None:
    async with memory_pair() as pair, trio.open_nursery() as nursery:
        near, _ = await pair.open()
        app, sock = connected_pair()

        async def receive() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await near.receive_some()

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await relay(sock, near)
        await expect_reset(app)


async def test_a_tunnel_that_is_relayed_is_in_use() -> None:
    async with memory_pair() as pair, bridge(pair) as between:
        await trio.testing.wait_all_tasks_blocked()
        for operation in (between.near.receive_some, between.near.send_eof, between.near.wait_send_all_might_not_block):
            with pytest.raises(trio.BusyResourceError):
                await operation()
        with pytest.raises(trio.BusyResourceError):
            await between.near.send_all(b"x")
        await between.near.aclose()  # gives the relay up
        await expect_reset(between.a)
        await expect_reset(between.b)


async def test_a_closed_tunnel_is_not_relayed() -> None:
    async with memory_pair() as pair:
        near, _ = await pair.open()
        await near.aclose()
        app, sock = connected_pair()
        with pytest.raises(trio.ClosedResourceError):
            await relay(sock, near)
        await expect_reset(app)


# === after the tunnel ===


@pytest.mark.wire("W-CLOSE-4", "W-GOAWAY-5", "W-RST-6")
@pytest.mark.parametrize("how", ["drained", "killed", "reset"])
async def test_a_slow_application_gets_the_tail_though_tunnel_and_session_are_gone(how: str) -> None:
    """Both directions have ended on the wire, or the second is reset, while the first still fills buffers here."""
    async with memory_pair() as pair, trio.open_nursery() as nursery:
        near, far = await pair.open()
        app, sock = connected_pair()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        results: list[RelayResult] = []

        async def run() -> None:
            results.append(await relay(sock, near))

        nursery.start_soon(run)
        await far.send_all(DOWN * 4)
        await far.send_eof()
        if how == "drained":
            await app.send_eof()
            assert await far.receive_some() == b""
            pair.far_session.begin_drain()
        elif how == "reset":
            far.abort()
        else:
            await trio.testing.wait_all_tasks_blocked()
            pair.far_session.kill()
        if how != "reset":
            await pair.near_session.finished.wait()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not results
        assert near.statistics().receive_buffered > 0
        with trio.fail_after(WAIT):
            assert await receive_all(app) == DOWN * 4
            await app.aclose()
            while not results:
                await trio.sleep(0.001)
        assert results[0].bytes_down == len(DOWN * 4)
        assert (results[0].error is None) == (how == "drained")


@pytest.mark.wire("W-RST-3", "W-RST-4")
@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("how", ["reset", "killed"])
async def test_what_came_before_a_reset_comes_first(how: str, reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some peers reset what they have sent in full. An application that does not read does not keep it for ever."""
    if not reads:
        monkeypatch.setattr(_ends, "_LET_READ", 0.01)
    async with memory_pair() as pair, trio.open_nursery() as nursery:
        near, far = await pair.open()
        app, sock = connected_pair()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        results: list[RelayResult] = []

        async def run() -> None:
            results.append(await relay(sock, near))

        nursery.start_soon(run)
        await far.send_all(DOWN * 4)
        await trio.testing.wait_all_tasks_blocked()
        if how == "reset":
            far.abort()
        else:
            pair.far_session.kill()
        with trio.fail_after(WAIT):
            if reads:
                while near.reset_error is None:
                    await trio.sleep(0.001)
                assert await receive_exactly(app, len(DOWN * 4)) == DOWN * 4
            while not results:
                await trio.sleep(0.001)
            await expect_reset(app)
        assert isinstance(results[0].error, TunnelReset if how == "reset" else SessionClosed)
        assert (results[0].bytes_down == len(DOWN * 4)) is reads


async def test_what_came_before_a_reset_is_of_no_use_to_who_has_gone() -> None:
    async with memory_pair() as pair, trio.open_nursery() as nursery:
        near, far = await pair.open()
        app, sock = connected_pair()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        nursery.start_soon(relay, sock, near)
        await far.send_all(DOWN * 4)
        await trio.testing.wait_all_tasks_blocked()
        far.abort()
        with trio.fail_after(WAIT):
            while near.reset_error is None:
                await trio.sleep(0.001)
            reset(app)
            while sock.fileno() != -1:
                await trio.sleep(0.001)


@pytest.mark.parametrize("slow", [False, True])
async def test_what_we_give_up_ends_at_once(slow: bool) -> None:
    """Whoever resets a tunnel on this side wants its relay to end, whatever the application has not got yet."""
    async with memory_pair() as pair, trio.open_nursery() as nursery:
        near, far = await pair.open()
        app, sock = connected_pair()
        nursery.start_soon(relay, sock, near)
        if slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
            await far.send_all(DOWN * 4)
        await far.send_eof()
        with trio.fail_after(WAIT):
            while not near.eof_received:
                await trio.sleep(0.001)
        near.abort()
        with trio.fail_after(WAIT):
            while sock.fileno() != -1:
                await trio.sleep(0.001)
        with pytest.raises(trio.BrokenResourceError):
            await send_on(app)


async def send_on(stream: trio.abc.SendStream) -> None:
    while True:
        await stream.send_all(b"nobody reads this")


@pytest.mark.wire("W-RST-6")
async def test_the_wait_for_a_slow_application_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes long to read its tail; when it resets, or stays without reading on, that is the end."""
    monkeypatch.setattr(_ends, "_LET_READ", 0.01)
    asked: list[int] = []
    unsent = _ends._unsent

    def count(sock: socket.socket) -> int:
        asked.append(unsent(sock))
        return asked[-1]

    monkeypatch.setattr(_ends, "_unsent", count)
    async with memory_pair() as pair, trio.open_nursery() as nursery:
        results: list[RelayResult] = []

        async def run(*ends: Any) -> None:
            results.append(await relay(*ends))

        for expected in (1, 2):
            near, far = await pair.open()
            app, sock = connected_pair()
            nursery.start_soon(run, sock, near)
            await far.send_all(DOWN * 2 if expected == 2 else b"x")
            await far.send_eof()
            far.abort()
            if expected == 1:
                assert await receive_all(app) == b"x"
                await app.send_all(b"nobody reads this")
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
                with trio.fail_after(WAIT):
                    while len([left for left in asked if left]) < 2:
                        await trio.sleep(0.001)
                reset(app)
            with trio.fail_after(WAIT):
                while len(results) < expected:
                    await trio.sleep(0.001)
            await trio.aclose_forcefully(app)


def test_nothing_is_unsent_once_the_connection_is_reset() -> None:
    """Linux goes on counting what it threw away then."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # the application's: it takes little
        sock = socket.create_connection(listener.getsockname())
        application, _ = listener.accept()
    with sock, application:
        sock.setblocking(False)
        sock.send(bytes(1_000_000))
        assert _ends._unsent(sock) > 0
        _ends.reset_socket(application)
        deadline = time.monotonic() + WAIT
        while _ends._unsent(sock) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert _ends._unsent(sock) == 0


# === an application that breaks while nobody looks ===


async def test_a_broken_application_is_noticed_while_its_relay_waits_for_credit() -> None:
    """The window is zero, so the relay does not read; a reset must still come through."""
    told = trio.Event()

    async def script(peer: Scripted) -> None:
        await peer.open({Setting.INITIAL_WINDOW_SIZE: 0})
        await peer.wait_for(Kind.HEADERS, stream=1)
        await peer.send(frames.response(1))
        assert (await peer.wait_for(Kind.RST_STREAM, stream=1)).code == Code.CONNECT_ERROR
        told.set()
        await peer.wait_end()

    async with scripted_server(script) as client, trio.open_nursery() as nursery:
        app, sock = connected_pair()
        await app.send_all(b"waits for credit")
        nursery.start_soon(relay, sock, await client.open_tunnel(TARGET))
        await trio.testing.wait_all_tasks_blocked(0.01)
        reset(app)
        with trio.fail_after(WAIT):
            await told.wait()


async def test_a_relay_whose_application_ended_both_ways_waits_in_peace_for_credit() -> None:
    """The kernel reports such a socket for ever; the pump must not spin, and the bytes must still go when they can."""
    credit = trio.Event()

    async def script(peer: Scripted) -> None:
        await peer.open({Setting.INITIAL_WINDOW_SIZE: 0})
        await peer.wait_for(Kind.HEADERS, stream=1)
        await peer.send(frames.response(1) + frames.data(1, b"down", end=True))
        await credit.wait()
        await peer.send(frames.window_update(1, 5))
        assert (await peer.wait_for(Kind.DATA, stream=1)).data == b"waits"
        await peer.send(frames.window_update(1, 100))
        assert (await peer.wait_for(Kind.DATA, stream=1)).data == b" for credit"
        await peer.wait_for(Kind.DATA, stream=1, where=lambda f: f.end_stream)

    async with scripted_server(script) as client, trio.open_nursery() as nursery:
        app, sock = connected_pair()
        await app.send_all(b"waits for credit")
        await app.send_eof()
        results: list[RelayResult] = []

        async def run() -> None:
            results.append(await relay(sock, await client.open_tunnel(TARGET)))

        nursery.start_soon(run)
        assert await receive_all(app) == b"down"
        with trio.fail_after(WAIT):
            await trio.testing.wait_all_tasks_blocked(0.01)  # never, if the pump spins
        credit.set()
        with trio.fail_after(WAIT):
            while not results:
                await trio.sleep(0.001)
        assert results == [RelayResult(bytes_up=16, bytes_down=4, error=None)]


async def test_relays_that_wait_for_the_sessions_credit_are_woken_by_it() -> None:
    async def script(peer: Scripted) -> None:
        await peer.open({Setting.INITIAL_WINDOW_SIZE: 1 << 20}, window=0)
        for stream in (1, 3, 5):
            await peer.wait_for(Kind.HEADERS, stream=stream)
            await peer.send(frames.response(stream))
        total: dict[int, int] = {1: 0, 3: 0, 5: 0}
        while sum(total.values()) < 600_000:
            got = await peer.wait_for(Kind.DATA)
            total[got.stream] += len(got.data)
            await peer.send(frames.window_update(0, len(got.data)))
        assert set(total.values()) == {200_000}
        enough.set()
        await peer.wait_end()

    enough = trio.Event()
    async with scripted_server(script) as client, trio.open_nursery() as nursery:
        apps = []
        for _ in range(3):
            app, sock = connected_pair()
            apps.append(app)
            nursery.start_soon(relay, sock, await client.open_tunnel(TARGET))
            nursery.start_soon(app.send_all, bytes(200_000))
        with trio.fail_after(WAIT):
            await enough.wait()
        nursery.cancel_scope.cancel()
    for app in apps:
        await expect_reset(app)


# === cancelled ===


@pytest.mark.wire("W-RST-2", "W-RST-7")
async def test_a_cancelled_relay_resets_both_ends() -> None:
    async with socket_pair() as pair:
        near, far = await pair.open()
        app, sock = connected_pair()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(relay, sock, near)
                await app.send_all(b"x")
                assert await far.receive_some() == b"x"
                scope.cancel()
        await expect_reset(app)
        with pytest.raises(trio.BrokenResourceError) as caught:
            await far.receive_some()
        assert isinstance(caught.value.__cause__, TunnelReset)
        assert caught.value.__cause__.error_code == ErrorCode.CANCEL


@pytest.mark.parametrize("pending", [True, False])
async def test_a_relay_that_is_cancelled_behind_its_tunnel_closes_its_socket(pending: bool) -> None:
    async with memory_pair() as pair:
        near, far = await pair.open()
        app, sock = connected_pair()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(relay, sock, near)
                await far.send_all(bytes(3 << 20 if pending else 1))
                await far.send_eof()
                far.abort()
                await trio.testing.wait_all_tasks_blocked(0.01)
                scope.cancel()
        assert scope.cancelled_caught
        assert sock.fileno() == -1
        await app.aclose()


async def test_everything_cancelled_at_once() -> None:
    """Sessions, pumps and relays, in whatever order the scheduler likes."""
    for _ in range(10):
        async with socket_pair() as pair, trio.open_nursery() as nursery:
            socks = []
            for _ in range(3):
                near, far = await pair.open()
                (app_a, sock_a), (app_b, sock_b) = connected_pair(), connected_pair()
                nursery.start_soon(relay, sock_a, near)
                nursery.start_soon(relay, far, sock_b)
                await app_a.send_all(b"x")
                socks += [sock_a, sock_b]
                for app in (app_a, app_b):
                    app.socket.close()
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
            pair.near_session.kill()
            pair.far_session.kill()
        assert all(sock.fileno() == -1 for sock in socks)


# === other kinds of ends ===


async def test_a_socket_stream_is_taken_over() -> None:
    async with memory_pair() as pair:
        near, far = await pair.open()
        app, sock = connected_pair()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay, stream, near)
            await app.send_all(UP)
            await app.send_eof()
            assert await receive_all(far) == UP
            await far.send_all(DOWN)
            await far.send_eof()
            assert await receive_all(app) == DOWN
        assert stream.socket.fileno() == -1


async def test_a_tunnel_to_a_tunnel_and_a_stream_to_a_stream() -> None:
    async with memory_pair() as one, memory_pair() as two:
        near, middle_in = await one.open()
        middle_out, far = await two.open()
        results: list[RelayResult] = []

        async def run(*ends: Any) -> None:
            results.append(await relay(*ends))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, middle_in, middle_out)
            await near.send_all(UP)
            await near.send_eof()
            assert await receive_all(far) == UP
            await far.send_all(DOWN)
            await far.send_eof()
            assert await receive_all(near) == DOWN
        assert results == [RelayResult(bytes_up=len(UP), bytes_down=len(DOWN), error=None)]
        assert (middle_in.statistics().open, middle_out.statistics().open) == (False, False)


async def test_what_broke_is_the_cause_of_the_reset() -> None:
    """So that who tells of it can tell an application that resets from a network that fails."""
    async with memory_pair() as pair, trio.open_nursery() as nursery:
        near, far = await pair.open()
        app, sock = connected_pair()
        nursery.start_soon(relay, sock, near)
        await app.send_all(b"half")
        assert await far.receive_some() == b"half"
        reset(app)
        with pytest.raises(trio.BrokenResourceError):
            await far.receive_some()
        assert isinstance(near.reset_error, TunnelReset)
        assert isinstance(near.reset_error.__cause__, ConnectionResetError)


@pytest.mark.wire("W-RST-3")
async def test_a_reset_goes_through_a_chain_of_tunnels() -> None:
    async with memory_pair() as one, memory_pair() as two, trio.open_nursery() as nursery:
        near, middle_in = await one.open()
        middle_out, far = await two.open()
        nursery.start_soon(relay, middle_in, middle_out)
        await near.send_all(b"half")
        assert await far.receive_some() == b"half"
        near.abort()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await far.receive_some()
        assert isinstance(caught.value.__cause__, TunnelReset)


@pytest.mark.parametrize("how", ["socket", "stream"])
async def test_sockets_without_a_tunnel(how: str) -> None:
    (app_a, sock_a), (app_b, sock_b) = connected_pair(), connected_pair()
    ends = [sock_a, sock_b]
    if how == "stream":
        ends = [trio.SocketStream(trio.socket.from_stdlib_socket(sock)) for sock in ends]  # type: ignore[misc]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(relay, *ends)

        async def send() -> None:
            await app_a.send_all(UP)
            await app_a.send_eof()

        nursery.start_soon(send)
        assert await receive_all(app_b) == UP
        reset(app_b)
        await expect_reset(app_a)
    await app_a.aclose()


async def test_a_cancelled_relay_of_streams_resets_both() -> None:
    async with memory_pair() as one, memory_pair() as two:
        near, middle_in = await one.open()
        middle_out, far = await two.open()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(relay, middle_in, middle_out)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        for tunnel in (near, far):
            with pytest.raises(trio.BrokenResourceError) as caught:
                await tunnel.receive_some()
            assert isinstance(caught.value.__cause__, TunnelReset)
        assert not middle_in.statistics().open
        assert not middle_out.statistics().open


async def test_a_relay_of_streams_that_is_cancelled_while_it_closes_closes_both() -> None:
    closing: list[str] = []

    class Stubborn(trio.abc.HalfCloseableStream):
        """Closing it takes for ever, but for the cancelled."""

        def __init__(self, name: str) -> None:
            self.name = name

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            await trio.lowlevel.checkpoint()
            return b""

        async def send_all(self, data: Any) -> None: ...

        async def wait_send_all_might_not_block(self) -> None: ...

        async def send_eof(self) -> None: ...

        async def aclose(self) -> None:
            closing.append(self.name)
            await trio.sleep_forever()

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay, Stubborn("a"), Stubborn("b"))
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert closing == ["a", "b"]


async def test_a_server_that_ends_keeps_no_relay() -> None:
    async def handler(request: Any) -> None:
        app, sock = connected_pair()
        apps.append(app)
        await relay(await request.accept(), sock)

    apps: list[trio.SocketStream] = []
    server = HBONEServer(server_svid(), handler)
    async with trio.open_nursery() as nursery:
        peer = scripted_client(server, nursery)
        await peer.open()
        await peer.send(frames.connect(1, TARGET), frames.connect(3, TARGET))
        await peer.wait_for(Kind.HEADERS, stream=1)
        await peer.wait_for(Kind.HEADERS, stream=3)
        nursery.cancel_scope.cancel()
    for app in apps:
        await expect_reset(app)


async def test_a_relay_that_begins_while_its_session_is_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """The session takes no pump any more, and has not told its tunnels yet."""
    async with socket_pair() as pair:
        near, _ = await pair.open()
        app, sock = connected_pair()
        async with app:
            await app.send_all(b"written before")
            results: list[RelayResult] = []

            async def run() -> None:
                results.append(await relay(sock, near))

            with trio.fail_after(WAIT):
                async with trio.open_nursery() as nursery:
                    with monkeypatch.context() as ending:
                        ending.setattr(pair.near_session, "_nursery", None)
                        nursery.start_soon(run)
                        await trio.testing.wait_all_tasks_blocked()
                    assert not results
                    pair.near_session.kill()
                assert results[0].error is not None
                assert results[0].bytes_up == 0
                await expect_reset(app)
