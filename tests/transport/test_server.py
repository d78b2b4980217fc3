"""`HBONEServer`, its requests, and the handler that forwards."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from support import frames
from support.certs import CLIENT, OTHER, pki
from support.frames import Code, Kind
from support.pairs import (
    TARGET,
    Scripted,
    client_svid,
    memory_pair,
    scripted_client,
    server_svid,
    socket_pair,
    svid_of,
)
from support.tcp import receive_all

from hbone import (
    AllowNetworks,
    Authority,
    BadTarget,
    BaseObserver,
    ConnectFailed,
    DialledAddress,
    Endpoint,
    FixedTarget,
    ForwardHandler,
    ForwardResult,
    HBONEClient,
    HBONEServer,
    IdentityPattern,
    InvalidAddress,
    PeerPolicy,
    PolicyDenied,
    RequestRejected,
    SessionClosed,
    StreamRefused,
    Timeouts,
    TunnelRequest,
    TunnelReset,
    Unreachable,
)
from hbone.transport import _forward, _server, accept_from, listen_tcp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


#: Seconds that only something that hangs needs.
WAIT = 60


class Closed(BaseObserver):
    def __init__(self) -> None:
        self.refused: list[tuple[Any, int | None, str]] = []

    def tunnel_refused(self, session: Any, target: Any, status: int | None, reason: str) -> None:
        self.refused.append((target, status, reason))


# === requests ===


async def test_a_request_says_who_asks_for_what() -> None:
    seen: list[TunnelRequest] = []

    async def handler(request: TunnelRequest) -> None:
        seen.append(request)
        assert not request.answered
        assert request.tunnel_statistics().open
        tunnel = await request.accept(headers=[("Baggage", "k8s.namespace.name=shop")])
        assert request.answered
        async with tunnel:
            await tunnel.send_all(await tunnel.receive_some())

    async with socket_pair(handler=handler) as pair:
        tunnel = await pair.client.open_tunnel("[2001:db8::1]:80", headers=[("X-Extra", "1"), (b"baggage", b"")])
        await tunnel.send_all(b"hello")
        assert await tunnel.receive_some() == b"hello"
        assert tunnel.response is not None
        assert dict(tunnel.response.headers)[b"baggage"] == b"k8s.namespace.name=shop"
    (request,) = seen
    assert str(request.peer.identity) == CLIENT
    assert request.target == Authority("2001:db8::1", 80)
    assert (b"x-extra", b"1") in request.headers.headers
    assert request.local_address == Endpoint(ipaddress.ip_address("127.0.0.1"), pair.port)  # type: ignore[arg-type]
    assert "[2001:db8::1]:80" in repr(request)
    assert "HBONEServer" in repr(pair.server)


async def test_an_answer_is_given_once() -> None:
    checked = trio.Event()

    async def handler(request: TunnelRequest) -> None:
        if request.target.port == 1:
            await request.accept()
        else:
            await request.reject(404, reason="no")
        with pytest.raises(RuntimeError):
            await request.accept()
        with pytest.raises(RuntimeError):
            await request.reject(503)
        checked.set()
        if request.target.port == 1:
            await trio.sleep_forever()

    async with memory_pair(handler=handler) as pair:
        await pair.client.open_tunnel("h:1")
        await checked.wait()
        checked = trio.Event()
        with pytest.raises(Exception, match="404"):
            await pair.client.open_tunnel("h:2")
        await checked.wait()


@pytest.mark.parametrize("way", ["raise", "reject", "fail", "forget"])
async def test_a_handler_that_does_not_accept_refuses(way: str, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: TunnelRequest) -> None:
        match way:
            case "raise":
                raise RequestRejected(401, flag="DENY")
            case "reject":
                await request.reject(401, reason="DENY")
            case "fail":
                raise KeyError("a bug")

    told = Closed()
    async with memory_pair(handler=handler, server_options={"observer": told}) as pair:
        with pytest.raises((PolicyDenied, Unreachable)) as caught:
            await pair.client.open_tunnel(TARGET)
        assert caught.value.status == (401 if way in ("raise", "reject") else 503)
        assert pair.server.statistics().tunnels == 0
    why = {"raise": "DENY", "reject": "DENY", "fail": "the handler failed", "forget": "the handler did not answer"}
    assert told.refused == [(TARGET, caught.value.status, why[way])]
    assert ("a bug" in caplog.text) == (way == "fail")


async def test_a_group_of_errors_refuses_too(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: TunnelRequest) -> None:
        async with trio.open_nursery():
            raise KeyError("in a nursery")

    async with memory_pair(handler=handler) as pair:
        with pytest.raises(Unreachable):
            await pair.client.open_tunnel(TARGET)
    assert "in a nursery" in caplog.text


@pytest.mark.wire("W-RST-7")
@pytest.mark.parametrize("fails", [True, False])
async def test_a_tunnel_that_its_handler_leaves_open_is_reset(fails: bool) -> None:
    async def handler(request: TunnelRequest) -> None:
        tunnel = await request.accept()
        await tunnel.send_all(b"half")
        if fails:
            raise KeyError

    async with memory_pair(handler=handler) as pair:
        tunnel = await pair.client.open_tunnel(TARGET)
        assert await tunnel.receive_some() == b"half"
        with pytest.raises(trio.BrokenResourceError) as caught:
            await tunnel.receive_some()
        assert isinstance(caught.value.__cause__, TunnelReset)
        assert caught.value.__cause__.error_code == (Code.INTERNAL_ERROR if fails else Code.CANCEL)


async def test_a_tunnel_that_breaks_in_its_handler_is_no_fault_of_the_handler(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ended = trio.Event()

    async def handler(request: TunnelRequest) -> None:
        tunnel = await request.accept()
        try:
            await tunnel.receive_some()
        finally:
            ended.set()

    async with memory_pair(handler=handler) as pair:
        (await pair.client.open_tunnel(TARGET)).abort()
        await ended.wait()
    assert not caplog.records


async def test_another_stream_that_breaks_in_a_handler_is_told_and_resets(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: TunnelRequest) -> None:
        await request.accept()
        raise trio.BrokenResourceError("some other stream")

    async with memory_pair(handler=handler) as pair:
        tunnel = await pair.client.open_tunnel(TARGET)
        with pytest.raises(trio.BrokenResourceError):
            await tunnel.receive_some()
    assert "some other stream" in caplog.text


@contextlib.asynccontextmanager
async def hand_made_client(handler: Any, **options: Any) -> AsyncIterator[tuple[Scripted, HBONEServer]]:
    server = HBONEServer(server_svid(), handler, **options)
    async with trio.open_nursery() as nursery:
        peer = scripted_client(server, nursery)
        await peer.open()
        yield peer, server
        nursery.cancel_scope.cancel()


@pytest.mark.wire("W-RST-10")
@pytest.mark.parametrize("how", ["reset", "reset at once", "session"])
async def test_a_request_that_is_taken_back_cancels_its_handler(how: str) -> None:
    began, cancelled = trio.Event(), trio.Event()

    async def handler(request: TunnelRequest) -> None:
        began.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            assert request.answered
            request.reject_nowait(503, "too late")
            with pytest.raises(trio.BrokenResourceError):
                request.accept_nowait(_forward._OK)
            cancelled.set()
            raise

    async with hand_made_client(handler) as (peer, server):
        if how == "reset at once":
            await peer.send(frames.connect(1, TARGET), frames.rst(1))
            await peer.fence()
            assert not began.is_set()
        else:
            await peer.send(frames.connect(1, TARGET))
            await began.wait()
            if how == "reset":
                await peer.send(frames.rst(1))
            else:
                await peer.stream.aclose()
            await cancelled.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert server.statistics().tunnels == 0


@pytest.mark.wire("W-REQ-11")
async def test_data_before_the_answer_is_kept() -> None:
    async def handler(request: TunnelRequest) -> None:
        await answer.wait()
        async with await request.accept() as tunnel:
            assert await receive_all(tunnel) == b"early and late"

    answer = trio.Event()
    async with hand_made_client(handler) as (peer, _):
        await peer.send(frames.connect(1, TARGET), frames.data(1, b"early "))
        await peer.fence()
        answer.set()
        await peer.wait_for(Kind.HEADERS, stream=1)
        await peer.send(frames.data(1, b"and late", end=True))
        assert (await peer.wait_for(Kind.DATA, stream=1)).end_stream


# === the server ===


async def test_serve_stream_never_raises() -> None:
    """Whatever the peer does with it."""

    async def handler(request: TunnelRequest) -> None:
        await request.accept()

    server = HBONEServer(server_svid(), handler, timeouts=Timeouts(handshake=1, settings=1))
    for nonsense in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"\x16\x03\x01\x00\x05hello"):
        near, far = trio.testing.memory_stream_pair()
        await near.send_all(nonsense)
        await near.send_eof()
        with trio.fail_after(WAIT):
            await server.serve_stream(far)
        with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
            await far.send_all(b"x")
    for nonsense in (b"GET / HTTP/1.1\r\n\r\n", frames.PREFACE + frames.ping(), frames.PREFACE[:9], b""):
        near, far = trio.testing.memory_stream_pair()
        peer = Scripted(near, pki().client, server=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_stream, far)
            await peer.handshake()
            if nonsense:
                await peer.send(nonsense)
            await near.aclose()
    assert server.statistics().sessions == 0


@pytest.mark.wire("W-ID-3")
async def test_who_may_open_a_session() -> None:
    async def handler(request: TunnelRequest) -> None:
        await request.accept()

    only_other = HBONEServer(server_svid(), handler, accept=PeerPolicy.exact(OTHER))
    for leaf, accepted in ((pki().other, True), (pki().client, False)):
        near, far = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(only_other.serve_stream, far)
            if accepted:
                async with HBONEClient.over_stream(near, svid=svid_of(leaf)):
                    pass
            else:
                with pytest.raises(ConnectFailed):
                    async with HBONEClient.over_stream(near, svid=svid_of(leaf)):
                        pass
    statistics = only_other.statistics()
    assert (statistics.accepted, statistics.failed, statistics.half_open) == (1, 1, 0)


async def test_max_sessions() -> None:
    async def handler(request: TunnelRequest) -> None:
        await request.accept()

    async with socket_pair(handler=handler, server_options={"max_sessions": 1}) as pair:
        with pytest.raises(ConnectFailed):
            async with HBONEClient.connect("127.0.0.1", pair.port, svid=client_svid()):  # type: ignore[arg-type]
                pass
        statistics = pair.server.statistics()
        assert (statistics.sessions, statistics.accepted, statistics.failed) == (1, 1, 1)


async def wait_end(stream: trio.SocketStream) -> None:
    if await stream.receive_some() == b"":
        raise EOFError


@pytest.mark.wire("W-LIM-9", "W-LIM-10")
async def test_too_many_half_open_connections_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who stall go, oldest first; who shakes hands gets in."""
    monkeypatch.setattr(_server, "_STALLED", 0.02)

    async def handler(request: TunnelRequest) -> None:
        await request.accept()
        await trio.sleep_forever()

    async with socket_pair(handler=handler, server_options={"max_half_open": 3}) as pair:
        stalled = [await trio.open_tcp_stream("127.0.0.1", pair.port) for _ in range(8)]  # type: ignore[arg-type]
        with trio.fail_after(WAIT):
            async with HBONEClient.connect("127.0.0.1", pair.port, svid=client_svid()) as client:  # type: ignore[arg-type]
                await client.open_tunnel(TARGET)
                assert pair.server.statistics().evicted >= 5
                assert pair.server.statistics().half_open <= 3
            with pytest.raises((trio.BrokenResourceError, EOFError)):
                await wait_end(stalled[0])
        for stream in stalled:
            await trio.aclose_forcefully(stream)


@pytest.mark.wire("W-TLS-9", "W-LIM-9")
async def test_a_stalled_handshake_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    server = HBONEServer(server_svid(), lambda request: trio.sleep(0))
    near, far = trio.testing.memory_stream_pair()
    await server.serve_stream(far)
    assert trio.current_time() == pytest.approx(10, abs=0.1)
    assert await near.receive_some() == b""
    assert server.statistics().failed == 1


async def test_a_drain_closes_the_listener_and_ends_serve() -> None:
    async def handler(request: TunnelRequest) -> None:
        tunnel = await request.accept()
        await tunnel.receive_some()
        await tunnel.send_eof()

    server = HBONEServer(server_svid(), handler)
    ended = trio.Event()

    async def serve(*, task_status: Any) -> None:
        await server.serve("127.0.0.1", 0, task_status=task_status)
        ended.set()

    async with trio.open_nursery() as nursery:
        endpoint = await nursery.start(serve)
        half_open = await trio.open_tcp_stream("127.0.0.1", endpoint.port)
        async with HBONEClient.connect("127.0.0.1", endpoint.port, svid=client_svid()) as client:
            tunnel = await client.open_tunnel(TARGET)
            while server.statistics().half_open < 1:
                await trio.sleep(0.001)
            nursery.start_soon(server.drain, WAIT)
            while not client.draining:
                await trio.sleep(0.001)
            assert await half_open.receive_some() == b""
            with pytest.raises(OSError, match=r".+"):
                await trio.open_tcp_stream("127.0.0.1", endpoint.port)
            with pytest.raises(StreamRefused):
                await client.open_tunnel(TARGET)
            assert not ended.is_set()
            await tunnel.send_eof()
            assert await tunnel.receive_some() == b""
            with trio.fail_after(WAIT):
                await ended.wait()
        await half_open.aclose()


async def test_a_server_that_drained_does_not_serve() -> None:
    server = HBONEServer(server_svid(), lambda request: trio.sleep(0))
    await server.drain(1)
    with trio.fail_after(WAIT):
        await server.serve("127.0.0.1", 0)


async def test_a_handshake_that_ends_as_a_drain_begins_is_a_session_that_drains(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drain cancels the handshake, but it is over: there is a session, and the peer must be told to go."""
    server = HBONEServer(server_svid(), lambda request: trio.sleep(0))
    drained = trio.Event()

    async def drain() -> None:
        await server.drain(1000)
        drained.set()

    shake_hands = _server.shake_hands

    async def shake_hands_and_drain(*args: Any, **options: Any) -> Any:
        result = await shake_hands(*args, **options)
        with trio.CancelScope(shield=True):
            nursery.start_soon(drain)
            await trio.testing.wait_all_tasks_blocked()
        assert not drained.is_set()
        return result

    monkeypatch.setattr(_server, "shake_hands", shake_hands_and_drain)
    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, far)
        async with HBONEClient.over_stream(near, svid=client_svid()) as client:
            with pytest.raises(StreamRefused):
                await client.open_tunnel(TARGET)
            await drained.wait()
    assert trio.current_time() < 10
    assert server.statistics() == _server.ServerStatistics(
        sessions=0, tunnels=0, half_open=0, accepted=1, failed=0, evicted=0
    )


async def test_a_connection_that_comes_after_the_drain_has_begun_is_closed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """One that was in the listener's queue. It says nothing, and holds nobody up."""
    server = HBONEServer(server_svid(), lambda request: trio.sleep(0))
    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        await server.drain(1000)
        nursery.start_soon(server.serve_stream, far)
        assert await near.receive_some() == b""
        await server.drain(1000)
    assert trio.current_time() == 0
    assert (server.statistics().half_open, server.statistics().failed) == (0, 1)


async def test_a_port_that_is_taken() -> None:
    server = HBONEServer(server_svid(), lambda request: trio.sleep(0))
    with listen_tcp("127.0.0.1", 0) as taken, pytest.raises(OSError, match=r".+"):
        await server.serve("127.0.0.1", taken.getsockname()[1])


async def test_what_goes_wrong_with_an_accept_does_not_end_the_server(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    results: list[Any] = [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ECONNABORTED, "aborted")]
    got: list[socket.socket] = []

    class Listener:
        def accept(self) -> Any:
            if results:
                raise results.pop(0)
            one, self.other = socket.socketpair(socket.AF_UNIX)
            return Accepted(one), None

        def setsockopt(self, *args: Any) -> None: ...

        def fileno(self) -> int:
            return -1  # never waited for

    class Accepted:
        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock

        def setblocking(self, flag: bool) -> None:
            self.sock.setblocking(flag)

        def setsockopt(self, *args: Any) -> None: ...

        def close(self) -> None:
            self.sock.close()

    listener = Listener()

    def handle(sock: Any) -> None:
        got.append(sock)
        scope.cancel()

    async def room() -> None:
        await trio.lowlevel.checkpoint()

    asked = 0

    def ask() -> Any:
        nonlocal asked
        asked += 1
        return room if asked < 5 or got else None

    with trio.CancelScope() as scope:
        await accept_from(listener, handle, room=ask)  # type: ignore[arg-type]
    assert len(got) == 1
    assert "Too many open files" in caplog.text
    got[0].close()
    listener.other.close()


# === the rules of where to ===


DIALLED = Endpoint.parse("10.0.0.7:15008")


@pytest.mark.wire("W-RSP-5", "W-RSP-3")
@pytest.mark.parametrize(
    ("rule", "target", "result"),
    [
        (DialledAddress(), "10.0.0.7:8080", "10.0.0.7:8080"),
        (DialledAddress(), "10.0.0.8:8080", 400),
        (DialledAddress(), "name.example:8080", 400),
        (DialledAddress(), "10.0.0.7:15008", 503),
        (DialledAddress(), "10.0.0.7:15001", 503),
        (DialledAddress(), "10.0.0.8:15001", 400),
        (FixedTarget(Authority("127.0.0.1", 80)), "anything.example:1", "127.0.0.1:80"),
        (AllowNetworks.parse(["10.0.0.0/8"]), "10.9.9.9:1", "10.9.9.9:1"),
        (AllowNetworks.parse(["10.0.0.0/8"]), "10.9.9.9:15006", 503),
        (AllowNetworks.parse(["10.0.0.0/8:15006"]), "10.9.9.9:15006", "10.9.9.9:15006"),
        (AllowNetworks.parse(["10.0.0.0/8:80"]), "10.9.9.9:81", 400),
        (AllowNetworks.parse(["10.0.0.0/8"]), "11.9.9.9:80", 400),
        (AllowNetworks.parse(["10.0.0.0/8"]), "[::1]:80", 400),
        (AllowNetworks.parse(["10.0.0.0/8"]), "name.example:80", 400),
        (AllowNetworks.parse(["127.0.0.1", "[2001:db8::/32]:443"]), "[2001:db8::5]:443", "[2001:db8::5]:443"),
        (AllowNetworks.parse(["2001:db8::/32"]), "[2001:db8::5]:443", "[2001:db8::5]:443"),
    ],
)
def test_rules(rule: Any, target: str, result: str | int) -> None:
    if isinstance(result, str):
        assert str(rule.resolve(Authority.parse(target), DIALLED)) == result
    else:
        with pytest.raises(RequestRejected) as caught:
            rule.resolve(Authority.parse(target), DIALLED)
        assert caught.value.status == result
        assert caught.value.flag == "CONNECT"


def test_the_dialled_address_is_needed() -> None:
    with pytest.raises(RequestRejected, match="none"):
        DialledAddress().resolve(Authority.parse("10.0.0.7:1"), None)


@pytest.mark.parametrize(
    "text", ["x", "10.0.0.1/8", "10.0.0.0/8:0", "10.0.0.0/8:x", "10.0.0.0/8:70000", "[::1:80", "[::1]80", "[::1]:"]
)
def test_networks_that_are_none(text: str) -> None:
    with pytest.raises(InvalidAddress):
        AllowNetworks.parse([text])


# === forwarding ===


class Forwarding:
    """A `ForwardHandler` and what it reported."""

    def __init__(self, rule: Any = None, **options: Any) -> None:
        self.results: list[ForwardResult] = []
        self.opened: list[TunnelRequest] = []
        self.reported = trio.Event()
        networks = AllowNetworks.parse(["127.0.0.0/8"])
        self.handler = ForwardHandler(rule or networks, on_done=self._done, on_open=self.opened.append, **options)

    def _done(self, result: ForwardResult) -> None:
        self.results.append(result)
        self.reported.set()

    async def result(self) -> ForwardResult:
        with trio.fail_after(WAIT):
            await self.reported.wait()
        (result,) = self.results
        return result


@contextlib.asynccontextmanager
async def application(habit: Any) -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, habit, [listener])
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def upper(stream: trio.SocketStream) -> None:
    await stream.send_all((await receive_all(stream)).upper())
    await stream.send_eof()


@pytest.mark.wire("W-RSP-1", "W-CLOSE-4")
async def test_forwarding() -> None:
    forwarding = Forwarding()
    async with application(upper) as port, socket_pair(handler=forwarding.handler) as pair:
        tunnel = await pair.client.open_tunnel(f"127.0.0.1:{port}")
        await tunnel.send_all(b"hello")
        await tunnel.send_eof()
        assert await receive_all(tunnel) == b"HELLO"
        result = await forwarding.result()
    assert (result.status, result.flag, result.error) == (200, None, None)
    assert (result.bytes_up, result.bytes_down, str(result.upstream)) == (5, 5, f"127.0.0.1:{port}")
    assert result.seconds >= 0
    assert forwarding.opened == [result.request]


@pytest.mark.wire("W-RSP-1", "W-RSP-3", "W-RSP-5")
async def test_no_200_before_the_target_is_connected() -> None:
    with socket.socket() as refusing:
        refusing.bind(("127.0.0.1", 0))
        port = refusing.getsockname()[1]
        forwarding = Forwarding()
        async with memory_pair(handler=forwarding.handler) as pair:
            with pytest.raises(Unreachable):
                await pair.client.open_tunnel(f"127.0.0.1:{port}")
            assert pair.client.statistics().tunnels_opened == 0
            result = await forwarding.result()
    assert (result.status, result.flag, str(result.upstream)) == (503, "CONNECT", f"127.0.0.1:{port}")
    assert "refused" in str(result.error)
    assert forwarding.opened == []


@pytest.mark.wire("W-RSP-3", "W-RSP-5", "W-ID-8")
async def test_the_order_of_the_checks_and_their_statuses() -> None:
    forwarding = Forwarding(peers=[IdentityPattern.parse(OTHER)])
    async with memory_pair(handler=forwarding.handler) as pair:
        with pytest.raises(PolicyDenied):
            await pair.client.open_tunnel("127.0.0.1:1")
        result = await forwarding.result()
        assert (result.status, result.flag, result.upstream) == (401, "DENY", Authority("127.0.0.1", 1))
    for peers in (OTHER, "spiffe://cluster.local/ns/shop/*"):
        await target_that_is_not_served(peers)


async def target_that_is_not_served(peers: str) -> None:
    forwarding = Forwarding(peers=[IdentityPattern.parse(peers)])
    async with memory_pair(handler=forwarding.handler) as pair:
        with pytest.raises(BadTarget):
            await pair.client.open_tunnel("192.0.2.1:1")
        assert (await forwarding.result()).status == 400


async def test_a_target_that_takes_too_long() -> None:
    forwarding = Forwarding(FixedTarget(Authority("127.0.0.1", 9)), connect_timeout=0.01)

    async def never(sock: socket.socket) -> None:
        await trio.sleep_forever()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect_ex", lambda self, address: errno.EINPROGRESS)
        patch.setattr("hbone.transport._tcp._is_decided", lambda sock: False)
        patch.setattr(trio.lowlevel, "wait_writable", never)
        async with memory_pair(handler=forwarding.handler) as pair:
            with pytest.raises(Unreachable):
                await pair.client.open_tunnel(TARGET)
            assert "timed out" in str((await forwarding.result()).error)


@pytest.mark.wire("W-RST-10")
@pytest.mark.parametrize("how", ["reset", "session", "server"])
async def test_a_request_that_is_taken_back_while_its_target_is_dialled(how: str) -> None:
    dialling = trio.Event()
    closed = trio.Event()

    async def ask(client: HBONEClient) -> None:
        with contextlib.suppress(SessionClosed):
            await client.open_tunnel("127.0.0.1:1")

    async def dial(host: str, port: int, *, timeout: float) -> Any:
        dialling.set()
        try:
            await trio.sleep_forever()
        finally:
            closed.set()

    forwarding = Forwarding()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_forward, "connect_tcp", dial)
        async with memory_pair(handler=forwarding.handler) as pair:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ask, pair.client)
                    await dialling.wait()
                    if how == "server":
                        break_off = pair.far_session.kill
                    else:
                        break_off = scope.cancel if how == "reset" else pair.near_session.kill
                    break_off()
                    if how != "reset":
                        await closed.wait()
                        scope.cancel()
            await closed.wait()
            result = await forwarding.result()
            assert "cancelled" in str(result.error)
            assert (result.bytes_up, result.bytes_down) == (0, 0)


async def test_a_request_that_is_gone_in_the_moment_in_which_its_target_answers() -> None:
    """Nobody has cancelled the handler yet, and the socket must not be left open."""
    app = socket.create_server(("127.0.0.1", 0))
    made: list[socket.socket] = []
    forwarding = Forwarding()

    async def dial(host: str, port: int, *, timeout: float) -> socket.socket:
        sock = socket.create_connection(app.getsockname())
        sock.setblocking(False)
        made.append(sock)
        (session,) = pair.server.sessions
        for tunnel in session.tunnels:
            tunnel.on_gone = None  # as if the scheduler had not come round to it
        (near,) = pair.near_session.tunnels
        near.abort()
        await trio.testing.wait_all_tasks_blocked()
        return sock

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_forward, "connect_tcp", dial)
        async with memory_pair(handler=forwarding.handler) as pair:
            with pytest.raises(TunnelReset):
                await pair.client.open_tunnel("127.0.0.1:1")
            result = await forwarding.result()
    assert isinstance(result.error, TunnelReset)
    assert (result.status, made[0].fileno()) == (0, -1)
    app.close()


@pytest.mark.wire("W-RST-1")
async def test_an_application_that_resets_is_reported() -> None:
    async def habit(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await stream.aclose()

    forwarding = Forwarding()
    async with application(habit) as port, socket_pair(handler=forwarding.handler) as pair:
        tunnel = await pair.client.open_tunnel(f"127.0.0.1:{port}")
        await tunnel.send_all(b"x")
        with pytest.raises(trio.BrokenResourceError) as caught:
            await tunnel.receive_some()
        assert isinstance(caught.value.__cause__, TunnelReset)
        assert caught.value.__cause__.error_code == Code.CONNECT_ERROR
        result = await forwarding.result()
    assert (result.status, result.bytes_up) == (200, 1)
    assert result.error is not None


async def test_a_handler_without_anybody_to_tell() -> None:
    async with application(upper) as port:
        handler = ForwardHandler(FixedTarget(Authority("127.0.0.1", port)))
        async with memory_pair(handler=handler) as pair:
            tunnel = await pair.client.open_tunnel("whatever:1")
            await tunnel.send_all(b"abc")
            await tunnel.send_eof()
            assert await receive_all(tunnel) == b"ABC"
