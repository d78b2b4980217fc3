"""Cancelled at every step (`support.steps`): the session stays usable, and nothing is left behind."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from support.pairs import SMALL, Pair, client_svid, memory_pair, server_svid, socket_pair
from support.steps import WAIT, CancelAtStep, everywhere, in_one_order
from support.tcp import connected_pair

from hbone import (
    Authority,
    FixedTarget,
    ForwardHandler,
    HBONEClient,
    HboneError,
    HBONEServer,
    SessionClosed,
    Timeouts,
    TunnelRequest,
    relay,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Awaitable, Callable

PATIENT = Timeouts(ping_interval=1000, ping_timeout=1000)


@pytest.fixture(autouse=True)
def always_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_order(monkeypatch)


async def by_port(request: TunnelRequest) -> None:
    """What the far end does is in the port: 1 echo, 2 sink, 3 source."""
    async with await request.accept() as tunnel:
        if request.target.port == 3:
            await tunnel.send_all(bytes(200_000))
        else:
            while data := await tunnel.receive_some():
                if request.target.port == 1:
                    await tunnel.send_all(data)
        await tunnel.send_eof()
        while await tunnel.receive_some():
            pass


async def use(client: HBONEClient) -> None:
    """One more tunnel works."""
    async with await client.open_tunnel("echo:1") as tunnel:
        await tunnel.send_all(b"still here")
        await tunnel.send_eof()
        got = b""
        while data := await tunnel.receive_some():
            got += data
        assert got == b"still here"


def checking(pair: Pair) -> Callable[[], Awaitable[None]]:
    async def check() -> None:
        await use(pair.client)
        await settled(pair)

    return check


async def settled(pair: Pair) -> None:
    """Until both sides have forgotten every stream."""
    sessions = [pair.near_session, pair.far_session]
    with trio.fail_after(WAIT):
        while any(session.engine.streams or session.open_streams for session in sessions):
            await trio.sleep(0)
    assert pair.near_session.available_streams == 200


both_moments = pytest.mark.parametrize("waking", [False, True], ids=["waiting", "waking"])
both_kinds = pytest.mark.parametrize("make", [memory_pair, socket_pair], ids=["memory", "sockets"])


def pair_for(make: Any, handler: Any = by_port) -> Any:
    return make(handler=handler, limits=SMALL, timeouts=PATIENT, server_options={"timeouts": PATIENT})


# === what one does with a tunnel ===


@both_kinds
@both_moments
async def test_open_tunnel(make: Any, waking: bool) -> None:
    async with pair_for(make) as pair:

        async def operation() -> None:
            async with await pair.client.open_tunnel("echo:1"):
                pass

        assert await everywhere(operation, checking(pair), waking=waking) > 3


OPERATIONS: dict[str, tuple[str, Callable[[Any], Awaitable[Any]]]] = {
    "send_all": ("sink:2", lambda tunnel: tunnel.send_all(bytes(200_000))),
    "receive_some": ("source:3", lambda tunnel: receive(tunnel, 200_000)),
    "send_eof": ("sink:2", lambda tunnel: tunnel.send_eof()),
    "wait_send_all_might_not_block": ("sink:2", lambda tunnel: tunnel.wait_send_all_might_not_block()),
    "aclose": ("source:3", lambda tunnel: tunnel.aclose()),
}


async def receive(tunnel: Any, size: int) -> None:
    while size > 0:
        size -= len(await tunnel.receive_some(20_000))


@both_kinds
@both_moments
@pytest.mark.parametrize("name", OPERATIONS)
async def test_what_one_does_with_a_tunnel(make: Any, waking: bool, name: str) -> None:
    target, work = OPERATIONS[name]
    async with pair_for(make) as pair:
        tunnels = []

        async def before() -> None:
            tunnels.append(await pair.client.open_tunnel(target))

        async def check() -> None:
            for tunnel in tunnels:
                tunnel.abort()
                await tunnel.aclose()
            tunnels.clear()
            await checking(pair)()

        assert await everywhere(lambda: work(tunnels[-1]), check, waking=waking, before=before) >= 2


@both_moments
async def test_a_cancelled_send_or_receive_harms_no_byte(waking: bool) -> None:
    """A receiver that is cancelled takes nothing, a sender that is cancelled sends whole frames: the rest is intact."""
    async with pair_for(memory_pair) as pair:
        got = bytearray()
        sent = 0

        async def operation() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                while len(got) < 400_000:
                    got.extend(await tunnel.receive_some(1000))

        async def send() -> None:
            nonlocal sent
            while sent < 400_000:
                before = tunnel.statistics().bytes_sent
                try:
                    await tunnel.send_all(pattern[sent : sent + 5000])
                finally:
                    sent += tunnel.statistics().bytes_sent - before

        pattern = random.Random(3).randbytes(400_000)
        main = trio.lowlevel.current_task()
        async with await pair.client.open_tunnel("echo:1") as tunnel:
            step = 0
            while len(got) < 400_000:
                step = step % 40 + 1
                async with trio.open_nursery() as nursery:
                    scope = trio.CancelScope()

                    async def run(scope: trio.CancelScope = scope) -> None:
                        with scope:
                            await operation()

                    instrument = CancelAtStep(step, scope, main, waking=waking)
                    trio.lowlevel.add_instrument(instrument)
                    nursery.start_soon(run)
                trio.lowlevel.remove_instrument(instrument)
            assert got == pattern


@both_kinds
@both_moments
async def test_relay(make: Any, waking: bool) -> None:
    async with pair_for(make) as pair:
        applications: list[trio.SocketStream] = []
        socks: list[socket.socket] = []
        tunnels = []

        async def before() -> None:
            application, sock = connected_pair()
            applications.append(application)
            socks.append(sock)
            tunnels.append(await pair.client.open_tunnel("echo:1"))
            await application.send_all(bytes(100_000))

        async def operation() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(relay, socks[-1], tunnels[-1])
                await applications[-1].send_eof()
                while await applications[-1].receive_some():
                    pass

        async def check() -> None:
            for sock, tunnel in zip(socks, tunnels, strict=True):
                if sock.fileno() != -1:  # cancelled before the relay began
                    sock.close()
                tunnel.abort()
            for application in applications:
                await trio.aclose_forcefully(application)
            applications.clear()
            socks.clear()
            tunnels.clear()
            await checking(pair)()

        assert await everywhere(operation, check, waking=waking, before=before) > 5


@both_moments
async def test_relay_of_streams(waking: bool) -> None:
    async with pair_for(memory_pair) as pair, pair_for(memory_pair) as other:
        ends: list[Any] = []

        async def before() -> None:
            near, far = trio.testing.memory_stream_pair()
            ends[:] = [near, far, await pair.client.open_tunnel("echo:1")]
            await near.send_all(bytes(100_000))
            await near.send_eof()

        async def operation() -> None:
            await relay(ends[1], ends[2])

        async def check() -> None:
            if ends:
                ends[2].abort()
            await checking(pair)()
            await checking(other)()

        assert await everywhere(operation, check, waking=waking, before=before) > 5


# === sessions ===


@contextlib.asynccontextmanager
async def server(handler: Any = by_port, **options: Any) -> AsyncIterator[tuple[HBONEServer, int]]:
    made = HBONEServer(server_svid(), handler, timeouts=PATIENT, **options)
    async with trio.open_nursery() as nursery:
        endpoint = await nursery.start(made.serve, "127.0.0.1", 0)
        yield made, endpoint.port
        nursery.cancel_scope.cancel()


async def idle(made: HBONEServer) -> None:
    """Until the server has forgotten every connection."""
    with trio.fail_after(WAIT):
        while made.statistics().sessions or made.statistics().half_open:
            await trio.sleep(0)


@pytest.mark.parametrize("made_of", ["socket", "stream"])
@both_moments
async def test_connect_and_close(made_of: str, waking: bool) -> None:
    """The server's side is cut off at every step with it, and forgets it."""
    async with server() as (made, port):

        async def operation() -> None:
            if made_of == "socket":
                async with HBONEClient.connect("127.0.0.1", port, svid=client_svid(), timeouts=PATIENT) as client:
                    await use(client)
            else:
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                async with HBONEClient.over_stream(stream, svid=client_svid(), timeouts=PATIENT) as client:
                    await use(client)

        async def check() -> None:
            await idle(made)
            async with HBONEClient.connect("127.0.0.1", port, svid=client_svid(), timeouts=PATIENT) as client:
                await use(client)
            await idle(made)

        assert await everywhere(operation, check, waking=waking) > 20


@both_moments
async def test_aclose_of_a_session(waking: bool) -> None:
    async with server() as (made, port):

        async def operation() -> None:
            await clients[-1].aclose()

        clients: list[HBONEClient] = []
        stacks: list[contextlib.AsyncExitStack] = []

        async def before() -> None:
            stack = contextlib.AsyncExitStack()
            stacks.append(stack)
            connect = HBONEClient.connect("127.0.0.1", port, svid=client_svid(), timeouts=PATIENT)
            clients.append(await stack.enter_async_context(connect))
            await clients[-1].open_tunnel("echo:1")

        async def check() -> None:
            while stacks:
                await stacks.pop().aclose()
                assert clients.pop().closed
            await idle(made)

        assert await everywhere(operation, check, waking=waking, before=before) > 3


@both_moments
async def test_drain(waking: bool) -> None:
    """A drain that was cancelled can be done again, and then everything ends."""

    async def operation() -> None:
        await running[-1].drain(1000)

    running: list[HBONEServer] = []
    stacks: list[contextlib.AsyncExitStack] = []

    async def before() -> None:
        stack = contextlib.AsyncExitStack()
        stacks.append(stack)
        made, port = await stack.enter_async_context(server())
        running.append(made)
        connect = HBONEClient.connect("127.0.0.1", port, svid=client_svid(), timeouts=PATIENT)
        client = await stack.enter_async_context(connect)
        await use(client)

    async def check() -> None:
        while stacks:
            await running[-1].drain(0)
            assert running.pop().statistics().sessions == 0
            await stacks.pop().aclose()

    assert await everywhere(operation, check, waking=waking, before=before) > 3


# === handlers ===


@both_moments
async def test_accept(waking: bool) -> None:
    """A handler that is cancelled around its `accept` answers all the same: the peer is never left waiting."""
    scope = trio.CancelScope()
    began, go = trio.Event(), trio.Event()

    async def handler(request: TunnelRequest) -> None:
        if request.target.host != "cancelled":
            await by_port(request)
            return
        began.set()
        await go.wait()
        with scope:
            await by_port(request)

    async with pair_for(memory_pair, handler) as pair:

        async def operation() -> None:
            nonlocal scope
            scope = mine = trio.CancelScope()
            try:
                with contextlib.suppress(HboneError, trio.BrokenResourceError):
                    async with trio.open_nursery() as nursery:

                        async def ask() -> None:
                            with contextlib.suppress(HboneError, trio.BrokenResourceError):
                                async with await pair.client.open_tunnel("cancelled:1") as tunnel:
                                    await tunnel.send_eof()
                                    assert await tunnel.receive_some() == b""

                        nursery.start_soon(ask)
                        await began.wait()
                        go.set()
            except BaseException:
                mine.cancel()
                raise

        async def before() -> None:
            nonlocal began, go
            began, go = trio.Event(), trio.Event()

        assert await everywhere(operation, checking(pair), waking=waking, before=before) > 5


@both_moments
async def test_a_forwarded_request(waking: bool) -> None:
    """From the dial to the end of the relay, on both sides, with an application behind."""

    async def application(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async for data in stream:
                await stream.send_all(data)
            await stream.send_eof()

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, application, [listener])
        port = listener.socket.getsockname()[1]
        forward = ForwardHandler(FixedTarget(Authority("127.0.0.1", port)))
        async with pair_for(socket_pair, forward) as pair:
            streams: list[trio.SocketStream] = []

            async def operation() -> None:
                app, sock = connected_pair()
                streams.append(app)
                try:
                    tunnel = await pair.client.open_tunnel("any:1")
                except BaseException:
                    sock.close()
                    raise
                async with trio.open_nursery() as inner:
                    inner.start_soon(relay, sock, tunnel)
                    await app.send_all(bytes(100_000))
                    await app.send_eof()
                    size = 0
                    while data := await app.receive_some():
                        size += len(data)
                    assert size == 100_000

            async def check() -> None:
                while streams:
                    await trio.aclose_forcefully(streams.pop())
                await checking(pair)()

            assert await everywhere(operation, check, waking=waking) > 10
        nursery.cancel_scope.cancel()


async def test_a_session_that_dies_while_one_asks_is_told() -> None:
    """Killed at every step of an open: an error of ours, never a wait without end."""
    for step in range(1, 40):
        async with pair_for(memory_pair) as pair:
            main = trio.lowlevel.current_task()
            scope = trio.CancelScope()
            session = pair.near_session

            class Kill(CancelAtStep):
                def _count(self, task: trio.lowlevel.Task, session: Any = session, main: Any = main) -> None:
                    self.steps += 1
                    if self.steps == self._step:
                        session.kill()

            instrument = Kill(step, scope, main, waking=False)
            trio.lowlevel.add_instrument(instrument)
            with trio.fail_after(WAIT):
                try:
                    tunnel = await pair.client.open_tunnel("echo:1")
                    await tunnel.send_all(b"x")
                    assert await tunnel.receive_some() == b"x"
                except (SessionClosed, trio.BrokenResourceError):
                    pass
            trio.lowlevel.remove_instrument(instrument)


def test_the_seed_is_where_it_is_thought_to_be() -> None:
    import trio._core._run

    assert isinstance(trio._core._run._r, random.Random)
