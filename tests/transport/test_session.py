"""How sessions open, live and end, and what they tell."""

from __future__ import annotations

import math
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from support import frames
from support.certs import CLIENT, OTHER, SERVER, pki
from support.frames import Code, Kind, Setting
from support.pairs import (
    TARGET,
    Scripted,
    client_svid,
    memory_pair,
    scripted_client,
    scripted_server,
    server_svid,
    socket_pair,
    svid_of,
)

from hbone import (
    Authority,
    BaseObserver,
    CertificateUnavailable,
    ConnectFailed,
    ErrorCode,
    HBONEClient,
    HBONEServer,
    IdentityRefused,
    InvalidIdentity,
    LocalProtocolError,
    PeerIdentityMismatch,
    PeerPolicy,
    PolicyDenied,
    RemoteProtocolError,
    RequestRejected,
    SessionClosed,
    SpiffeIdentity,
    StreamRefused,
    Timeouts,
    TunnelRefused,
    TunnelReset,
    Unreachable,
)
from hbone.protocol import Limits
from hbone.tls import client_connection
from hbone.transport import _carrier, _client, _openssl, connect_tcp, listen_tcp
from hbone.transport._carrier import SocketCarrier
from hbone.transport._client import open_session, shake_hands
from hbone.transport._session import Session
from hbone.transport._tcp import resolve

if TYPE_CHECKING:
    from collections.abc import Callable

LONG = Timeouts(ping_interval=1000, ping_timeout=1000)

#: Seconds that only something that hangs needs.
WAIT = 60


async def accept_all(request: Any) -> None:
    await request.accept()
    await trio.sleep_forever()


class Told(BaseObserver):
    """What an observer hears, as text."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def handshake_finished(self, *, client: bool, seconds: float, peer: Any, error: Any) -> None:
        assert seconds >= 0
        self.heard.append(f"handshake {peer.identity if peer else type(error).__name__}")

    def session_opened(self, session: Any) -> None:
        self.heard.append("session opened")

    def session_closed(self, session: Any, error: Any) -> None:
        self.heard.append(f"session closed {type(error).__name__ if error else None}")

    def tunnel_opened(self, tunnel: Any) -> None:
        self.heard.append(f"tunnel opened {tunnel.target}")

    def tunnel_refused(self, session: Any, target: Any, status: int | None, reason: str) -> None:
        self.heard.append(f"tunnel refused {target} {status} {reason}".strip())

    def tunnel_closed(self, tunnel: Any, error: Any) -> None:
        self.heard.append(f"tunnel closed {type(error).__name__ if error else None}")


# === opening ===


@pytest.mark.wire("W-SET-3")
async def test_connected_means_that_the_peers_settings_have_come() -> None:
    settings = trio.Event()
    connected = False

    async def script(peer: Scripted) -> None:
        peer.ack_settings = False
        await peer.handshake()
        await trio.testing.wait_all_tasks_blocked()
        assert not connected
        await peer.wait_for(Kind.SETTINGS)
        assert {frame.kind for frame in peer.log} <= {Kind.SETTINGS, Kind.WINDOW_UPDATE}
        await peer.send(frames.settings({Setting.MAX_CONCURRENT_STREAMS: 7}))
        settings.set()
        await peer.wait_end()

    async with scripted_server(script) as client:
        connected = True
        assert settings.is_set()
        assert client._session.available_streams == 7
        assert str(client.peer.identity) == SERVER
        assert (client.peer.tls_version, client.draining, client.closed) == ("TLSv1.3", False, False)
        assert "open" in repr(client)


async def test_the_peer_is_as_tls_proved_it() -> None:
    async with socket_pair() as pair:
        near, far = await pair.open()
        assert str(near.peer.identity) == SERVER
        assert str(far.peer.identity) == CLIENT
        assert near.peer.address is not None
        assert near.peer.address.port == pair.port
        assert near.peer.chain
        assert near.peer.group in ("X25519MLKEM768", "x25519", "X25519", None)
        assert pair.far_session.local_address.port == pair.port


@pytest.mark.wire("W-ID-3", "W-ID-6", "W-ID-7")
async def test_a_server_that_refuses_our_identity_says_so() -> None:
    alien = svid_of(pki().other_trust_domain)
    told = Told()
    server = HBONEServer(server_svid(), accept_all, observer=told)
    async with trio.open_nursery() as nursery:
        endpoint = await nursery.start(server.serve, "127.0.0.1", 0)
        policy = PeerPolicy.exact(SERVER)
        with pytest.raises(ConnectFailed):
            async with HBONEClient.connect("127.0.0.1", endpoint.port, svid=alien, expect=policy):
                pass
        ours = svid_of(pki().foreign)
        with pytest.raises(IdentityRefused, match="refused our certificate"):
            async with HBONEClient.connect("127.0.0.1", endpoint.port, svid=ours, expect=policy):
                pass
        while len(told.heard) < 2:
            await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert server.statistics().failed == 2
    assert all(line.startswith("handshake ") and "spiffe" not in line for line in told.heard)


@pytest.mark.wire("W-ID-4", "W-ID-6")
@pytest.mark.parametrize("expect", [OTHER, SpiffeIdentity.parse(OTHER), [OTHER, CLIENT], PeerPolicy.exact(OTHER)])
async def test_a_peer_that_is_somebody_else_is_refused(expect: Any) -> None:
    server = HBONEServer(server_svid(), accept_all)
    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, far)
        with pytest.raises(PeerIdentityMismatch) as caught:
            async with HBONEClient.over_stream(near, svid=client_svid(), expect=expect):
                pass
        assert caught.value.presented == SERVER
        assert OTHER in caught.value.expected
    assert server.statistics().failed == 1


async def test_an_expectation_that_is_no_identity_is_refused_before_anything() -> None:
    with pytest.raises(InvalidIdentity):
        async with HBONEClient.connect("192.0.2.1", svid=client_svid(), expect="cart"):
            pass


class NoSvid:
    identity = SpiffeIdentity.parse(CLIENT)

    def current(self) -> Any:
        raise CertificateUnavailable(self.identity, "the file is gone")


async def test_without_an_svid_nothing_is_left_open() -> None:
    with listen_tcp("127.0.0.1", 0) as listener:
        with pytest.raises(CertificateUnavailable):
            async with HBONEClient.connect("127.0.0.1", listener.getsockname()[1], svid=NoSvid()):
                pass
        near, far = trio.testing.memory_stream_pair()
        with pytest.raises(CertificateUnavailable):
            async with HBONEClient.over_stream(near, svid=NoSvid()):
                pass
        assert await far.receive_some() == b""


async def test_a_server_without_an_svid_takes_nobody_and_lives(caplog: pytest.LogCaptureFixture) -> None:
    server = HBONEServer(NoSvid(), accept_all)
    async with trio.open_nursery() as nursery:
        endpoint = await nursery.start(server.serve, "127.0.0.1", 0)
        with pytest.raises(ConnectFailed):
            async with HBONEClient.connect("127.0.0.1", endpoint.port, svid=client_svid()):
                pass
        near, far = trio.testing.memory_stream_pair()
        await server.serve_stream(far)
        assert await near.receive_some() == b""
        nursery.cancel_scope.cancel()
    assert "the file is gone" in caplog.text


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "HTTP/1"),
        (b"\0\0\0\0\0\0\0\0\0", "not SETTINGS"),
        (frames.ping(), "not SETTINGS"),
        (frames.settings({Setting.MAX_FRAME_SIZE: 5}), "MAX_FRAME_SIZE"),
    ],
)
async def test_a_peer_that_does_not_speak_http2(answer: bytes, why: str) -> None:
    async def script(peer: Scripted) -> None:
        await peer.handshake()
        await peer.send(answer)
        await peer.wait_end()

    with pytest.raises(ConnectFailed, match=why) as caught:
        async with scripted_server(script):
            pass
    assert isinstance(caught.value.__cause__, RemoteProtocolError)


async def test_a_peer_that_does_not_speak_tls() -> None:
    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(far.send_all, b"SSH-2.0-OpenSSH_9.2\r\n")
        with pytest.raises(ConnectFailed, match="TLS handshake failed"):
            async with HBONEClient.over_stream(near, svid=client_svid()):
                pass


@pytest.mark.parametrize("aclose", [True, False])
async def test_a_stream_that_ends_in_the_handshake(aclose: bool) -> None:
    near, far = trio.testing.memory_stream_pair()
    if aclose:
        await far.aclose()
    else:
        await far.send_eof()
    with pytest.raises(ConnectFailed, match="during the TLS handshake"):
        async with HBONEClient.over_stream(near, svid=client_svid()):
            pass


async def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectFailed, match="connection refused"):
            async with HBONEClient.connect("127.0.0.1", taken.getsockname()[1], svid=client_svid()):
                pass


@pytest.mark.wire("W-TLS-9")
async def test_the_handshake_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    near, _far = trio.testing.memory_stream_pair()
    with pytest.raises(ConnectFailed, match="did not end within 10 s"):
        async with HBONEClient.over_stream(near, svid=client_svid()):
            pass
    assert trio.current_time() == pytest.approx(10, abs=0.1)


@pytest.mark.wire("W-SET-3")
async def test_the_wait_for_settings_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    async def script(peer: Scripted) -> None:
        peer.ack_settings = False
        await peer.handshake()
        await peer.wait_end()

    told = Told()
    with pytest.raises(ConnectFailed, match="no SETTINGS within 3 s"):
        async with scripted_server(script, timeouts=Timeouts(settings=3), observer=told):
            pass
    assert trio.current_time() == pytest.approx(3, abs=0.1)
    assert told.heard == [f"handshake {SERVER}", "session closed None"]


@pytest.mark.wire("W-ID-7")
@pytest.mark.parametrize("how", ["close_notify", "fin"])
async def test_an_end_before_settings_is_a_refusal_of_our_identity(how: str) -> None:
    async def script(peer: Scripted) -> None:
        await peer.handshake()
        if how == "close_notify":
            await peer.close_notify()

    with pytest.raises(IdentityRefused, match="it closed before its SETTINGS"):
        async with scripted_server(script):
            pass


async def test_a_session_that_is_killed_before_it_runs_does_not_run() -> None:
    """What a caller does that is cancelled just when the handshake ends."""
    near, far = trio.testing.memory_stream_pair()
    server = HBONEServer(server_svid(), accept_all)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, far)
        session: list[Session] = []

        class Watched(Session):
            async def wait_ready(self) -> None:
                session.append(self)
                raise KeyError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_client, "Session", Watched)
            with pytest.raises(KeyError):
                await _client.open_session_over(
                    nursery, near, svid=client_svid(), policy=PeerPolicy.exact(SERVER), timeouts=LONG
                )
        with trio.fail_after(WAIT):
            await session[0].finished.wait()


# === the protocol's ends ===


@pytest.mark.wire("W-RST-4")
@pytest.mark.parametrize("how", ["close_notify", "fin", "goaway and fin", "break"])
async def test_a_session_that_ends_is_never_the_end_of_a_tunnel(how: str) -> None:
    async def script(peer: Scripted) -> None:
        await peer.open()
        await peer.wait_for(Kind.HEADERS, stream=1)
        last = frames.goaway(1, Code.INTERNAL_ERROR) if how == "goaway and fin" else b""
        await peer.send(frames.response(1) + frames.data(1, b"half") + last)
        if how == "close_notify":
            await peer.close_notify()
            await peer.wait_end()  # TCP stays open
        elif how == "break":
            await trio.aclose_forcefully(peer.stream)

    async with scripted_server(script, timeouts=LONG) as client:
        tunnel = await client.open_tunnel(TARGET)
        with trio.fail_after(WAIT):
            assert await tunnel.receive_some() == b"half"
            with pytest.raises(trio.BrokenResourceError) as caught:
                await tunnel.receive_some()
        assert isinstance(caught.value.__cause__, SessionClosed)
        assert client.closed
        with pytest.raises(SessionClosed):
            await client.open_tunnel(TARGET)


@pytest.mark.wire("W-ERR-3", "W-LIM-3")
async def test_a_connection_error_is_told_and_resets_every_tunnel() -> None:
    told = Told()
    server = HBONEServer(server_svid(), accept_all, observer=told)
    async with trio.open_nursery() as nursery:
        peer = scripted_client(server, nursery)
        await peer.open()
        await peer.send(frames.connect(1, TARGET))
        await peer.wait_for(Kind.HEADERS, stream=1)
        await peer.send(frames.frame(Kind.DATA, 0, 1, length=(1 << 20) + 1))
        goaway = await peer.wait_for(Kind.GOAWAY)
        assert (goaway.code, goaway.last_stream) == (Code.FRAME_SIZE_ERROR, 1)
        assert await peer.wait_end() == "close_notify"
        await peer.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert server.statistics().sessions == 0
        nursery.cancel_scope.cancel()
    assert told.heard[-2:] == ["tunnel closed RemoteProtocolError", "session closed RemoteProtocolError"]


async def test_a_peer_that_floods_while_it_is_sent_away_does_not_stop_the_others() -> None:
    """The last words of a session read what still comes; somebody must get a turn in between."""
    async with socket_pair() as pair:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        near, far = trio.testing.memory_stream_pair()
        turns = 0

        class Endless:
            """A carrier on which there is always something to read."""

            connection = None
            needs_flush = False

            def read_into(self, buffer: memoryview) -> int:
                return len(buffer)

            async def wait_readable(self) -> None:
                await trio.lowlevel.checkpoint()

            def write(self, data: Any) -> int:
                return len(data)

            def shutdown_write(self) -> None: ...

        listener.close()
        session = pair.near_session
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(session, "_carrier", Endless())
            patch.setattr(session, "error", RemoteProtocolError("made up"))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session._say_goodbye)
                for turns in range(100):  # noqa: B007
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        assert turns == 99
        await near.aclose()
        await far.aclose()


async def test_nothing_is_written_once_the_socket_is_closed() -> None:
    """Its number may belong to somebody else by then."""
    async with socket_pair() as pair:
        near, _ = await pair.open()
        session = pair.near_session
        session.kill()
        await session.finished.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert session._carrier._sock.fileno() == -1
        with pytest.MonkeyPatch.context() as patch:

            def write(data: Any) -> int:
                raise AssertionError("written to a socket that is closed")

            patch.setattr(type(session._carrier), "write", lambda self, data: write(data))
            assert not near.statistics().open
            near.abort()
            await near.aclose()
            session.begin_drain()
            session.flush()


# === PING ===


@pytest.mark.wire("W-PING-1")
async def test_a_ping_goes_out_ten_seconds_after_each_answer(autojump_clock: trio.testing.MockClock) -> None:
    times: list[float] = []

    async def script(peer: Scripted) -> None:
        peer.ack_pings = False
        await peer.open()
        for delay in (0, 3, 0, 19, 0):
            ping = await peer.wait_for(Kind.PING)
            times.append(trio.current_time())
            await trio.sleep(delay)
            await peer.send(frames.ping(ping.payload, ack=True))
        times.append(trio.current_time())

    async with scripted_server(script) as client:
        await client._session.finished.wait()
    assert times == pytest.approx([10, 20, 33, 43, 72, 72], abs=0.1)


@pytest.mark.wire("W-PING-3")
@pytest.mark.parametrize("who", ["client", "server"])
async def test_a_ping_without_an_answer_ends_the_session(autojump_clock: trio.testing.MockClock, who: str) -> None:
    async def silent(peer: Scripted) -> None:
        peer.ack_pings = False
        await peer.open()
        if who == "client":
            await peer.wait_for(Kind.HEADERS, stream=1)
            await peer.send(frames.response(1))
        await peer.wait_end()
        ended.append(trio.current_time())

    ended: list[float] = []
    if who == "client":
        async with scripted_server(silent) as client:
            tunnel = await client.open_tunnel(TARGET)
            with pytest.raises(trio.BrokenResourceError, match="did not answer a PING within 20 s") as caught:
                await tunnel.receive_some()
            assert isinstance(caught.value.__cause__, SessionClosed)
            assert trio.current_time() == pytest.approx(30, abs=0.1)
    else:
        server = HBONEServer(server_svid(), accept_all)
        async with trio.open_nursery() as nursery:
            await silent(scripted_client(server, nursery))
        assert server.statistics().sessions == 0
    assert ended == pytest.approx([30], abs=0.1)


@pytest.mark.wire("W-PING-2")
async def test_a_ping_is_answered_ahead_of_data_that_waits() -> None:
    async def fill(request: Any) -> None:
        tunnel = await request.accept()
        await tunnel.send_all(bytes(200_000))

    server = HBONEServer(server_svid(), fill)
    async with trio.open_nursery() as nursery:
        peer = scripted_client(server, nursery)
        await peer.open({Setting.INITIAL_WINDOW_SIZE: 0})
        await peer.send(frames.connect(1, TARGET))
        await peer.wait_for(Kind.HEADERS, stream=1)
        await peer.send(frames.ping(b"12345678"))
        answer = await peer.wait_for(Kind.PING, where=lambda f: f.ack)
        assert answer.payload == b"12345678"
        nursery.cancel_scope.cancel()


# === GOAWAY ===


@pytest.mark.wire("W-GOAWAY-1")
async def test_the_peers_goaway_ends_no_live_tunnel() -> None:
    async def script(peer: Scripted) -> None:
        await peer.open()
        await peer.wait_for(Kind.HEADERS, stream=1)
        await peer.send(frames.response(1))
        await peer.wait_for(Kind.HEADERS, stream=3)
        await peer.send(frames.response(3), frames.goaway(3, Code.NO_ERROR, b"drain"))
        assert (await peer.wait_for(Kind.DATA, stream=1)).data == b"up"
        await peer.send(frames.data(1, b"down", end=True))
        await peer.wait_for(Kind.DATA, stream=1, where=lambda f: f.end_stream)
        await peer.send(frames.data(3, b"last", end=True))
        await peer.wait_for(Kind.DATA, stream=3, where=lambda f: f.end_stream)
        assert (await peer.wait_for(Kind.GOAWAY)).code == Code.NO_ERROR
        assert await peer.wait_end() == "close_notify"

    changes = 0

    def changed() -> None:
        nonlocal changes
        changes += 1

    told = Told()
    async with scripted_server(script, observer=told) as client:
        client._session.on_change = changed
        one, two = await client.open_tunnel(TARGET), await client.open_tunnel(TARGET)
        while not client.draining:
            await trio.lowlevel.checkpoint()
        assert changes == 1
        assert "draining" in repr(client)
        assert client._session.available_streams == 0
        with pytest.raises(StreamRefused, match="GOAWAY"):
            await client.open_tunnel(TARGET)
        await one.send_all(b"up")
        assert await one.receive_some() == b"down"
        await one.send_eof()
        assert await two.receive_some() == b"last"
        await two.send_eof()
        await client._session.finished.wait()
        assert client._session.error is None
    assert told.heard[-3:] == ["tunnel closed None", "tunnel closed None", "session closed None"]


@pytest.mark.parametrize("code", [Code.NO_ERROR, Code.ENHANCE_YOUR_CALM])
async def test_goaway_on_an_idle_session_ends_it(code: int, caplog: pytest.LogCaptureFixture) -> None:
    async def script(peer: Scripted) -> None:
        await peer.open()
        await peer.send(frames.goaway(0, code, b"calm \xff down"))
        await peer.wait_end()

    caplog.set_level("INFO", "hbone")
    async with scripted_server(script) as client:
        await client._session.finished.wait()
        with pytest.raises(StreamRefused):
            await client.open_tunnel(TARGET)
    assert ("ENHANCE_YOUR_CALM" in caplog.text) == (code != Code.NO_ERROR)


@pytest.mark.wire("W-GOAWAY-3", "W-GOAWAY-4", "W-GOAWAY-5")
async def test_a_drain_lets_tunnels_finish_and_refuses_new_ones(autojump_clock: trio.testing.MockClock) -> None:
    released = trio.Event()

    async def handler(request: Any) -> None:
        tunnel = await request.accept()
        await released.wait()
        await tunnel.send_all(b"done")
        await tunnel.send_eof()

    server = HBONEServer(server_svid(), handler)
    async with trio.open_nursery() as nursery:
        peer = scripted_client(server, nursery)
        await peer.open()
        await peer.send(frames.connect(1, TARGET))
        await peer.wait_for(Kind.HEADERS, stream=1)
        nursery.start_soon(server.drain, 60)
        first = await peer.wait_for(Kind.GOAWAY)
        assert (first.last_stream, first.code) == (2**31 - 1, Code.NO_ERROR)
        await peer.send(frames.connect(3, TARGET))
        assert (await peer.wait_for(Kind.RST_STREAM, stream=3)).code == Code.REFUSED_STREAM
        second = await peer.wait_for(Kind.GOAWAY)  # after the answer to its PING
        assert second.last_stream == 1
        released.set()
        assert (await peer.wait_for(Kind.DATA, stream=1)).data == b"done"
        await peer.send(frames.data(1, end=True))
        assert await peer.wait_end() == "close_notify"
        assert trio.current_time() < 1
        await peer.stream.aclose()
    assert server.statistics().sessions == 0


@pytest.mark.wire("W-GOAWAY-6")
async def test_a_drain_resets_what_is_left_at_its_deadline(autojump_clock: trio.testing.MockClock) -> None:
    server = HBONEServer(server_svid(), accept_all)
    async with trio.open_nursery() as nursery:
        peer = scripted_client(server, nursery)
        await peer.open()
        await peer.send(frames.connect(1, TARGET))
        await peer.wait_for(Kind.HEADERS, stream=1)
        async with trio.open_nursery() as draining:
            draining.start_soon(server.drain, 5)
            assert (await peer.wait_for(Kind.RST_STREAM, stream=1)).code == Code.CANCEL
            assert trio.current_time() == pytest.approx(5, abs=0.1)
            await peer.wait_end()
            await peer.stream.aclose()
        assert server.statistics().sessions == 0
        nursery.cancel_scope.cancel()


@pytest.mark.wire("W-GOAWAY-5", "W-TLS-11")
async def test_the_last_tunnels_tail_survives_the_end_of_its_session() -> None:
    """The client closes at once behind its last tunnel, while the server still gives back credit."""
    size = 3 << 20
    got = 0
    done = trio.Event()

    async def handler(request: Any) -> None:
        nonlocal got
        tunnel = await request.accept()
        while data := await tunnel.receive_some(10_000):
            got += len(data)
        done.set()

    async with socket_pair(handler=handler) as pair:
        tunnel = await pair.client.open_tunnel(TARGET)
        await tunnel.send_all(bytes(size))
        await tunnel.send_eof()
        with pytest.raises(trio.BrokenResourceError):
            await tunnel.receive_some()  # the handler has returned: reset
        await pair.client.aclose()
        await done.wait()
    assert got == size


async def test_close_soon_waits_for_the_last_tunnel() -> None:
    async with memory_pair() as pair:
        near, far = await pair.open()
        session = pair.near_session
        session.close_soon()
        assert session.draining
        assert session.available_streams == 0
        with pytest.raises(StreamRefused):
            await session.open_tunnel(TARGET)
        await near.send_eof()
        await far.send_eof()
        await session.finished.wait()
        assert session.error is None


async def test_aclose_resets_what_is_open_and_says_goodbye(autojump_clock: trio.testing.MockClock) -> None:
    async def script(peer: Scripted) -> None:
        await peer.open()
        await peer.wait_for(Kind.HEADERS, stream=1)
        await peer.send(frames.response(1))
        assert (await peer.wait_for(Kind.RST_STREAM, stream=1)).code == Code.CANCEL
        await peer.wait_for(Kind.GOAWAY)
        assert await peer.wait_end() == "close_notify"
        await trio.sleep_forever()  # and does not close its end

    async with scripted_server(script) as client:
        tunnel = await client.open_tunnel(TARGET)
        await client.aclose()
        assert trio.current_time() == pytest.approx(2, abs=0.1)
        assert client.closed
        with pytest.raises(trio.BrokenResourceError) as caught:
            await tunnel.receive_some()
        assert isinstance(caught.value.__cause__, TunnelReset)
        await client.aclose()


async def test_aclose_tells_who_waits_for_an_answer() -> None:
    async def handler(request: Any) -> None:
        await trio.sleep_forever()

    async with memory_pair(handler=handler) as pair, trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(SessionClosed, match="the session was closed"):
                await pair.client.open_tunnel(TARGET)

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(WAIT):
            await pair.client.aclose()


async def test_aclose_in_a_cancelled_scope_ends_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async def script(peer: Scripted) -> None:
        await peer.open()
        opened.set()
        await trio.sleep_forever()

    opened = trio.Event()
    async with scripted_server(script) as client:
        await opened.wait()
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.aclose()
        await client._session.finished.wait()
        assert trio.current_time() == 0


# === answers ===


@pytest.mark.wire("W-RSP-6", "W-RSP-8", "W-RSP-9")
async def test_informational_answers_are_ignored_and_any_2xx_opens() -> None:
    async def script(peer: Scripted) -> None:
        await peer.open()
        await peer.wait_for(Kind.HEADERS, stream=1)
        await peer.send(frames.response(1, 100), frames.response(1, 103, ("link", "</x>")))
        await peer.send(frames.response(1, 204, ("content-length", "5")))
        await peer.wait_end()

    async with scripted_server(script) as client:
        tunnel = await client.open_tunnel(TARGET)
        assert tunnel.response is not None
        assert tunnel.response.status == 204


@pytest.mark.wire("W-RSP-4", "W-RSP-11")
@pytest.mark.parametrize("how", ["end", "reset", "end and reset", "trailers", "no body"])
async def test_a_refusal_with_a_body_says_why_and_harms_nobody(how: str) -> None:
    """Envoy sends one with its 503."""

    async def script(peer: Scripted) -> None:
        await peer.open()
        await peer.wait_for(Kind.HEADERS, stream=1)
        body = b"upstream connect error\nsecond line"
        if how == "no body":
            await peer.send(frames.response(1, 503, end_stream=True))
        else:
            await peer.send(frames.response(1, 503, ("content-length", "34")), frames.data(1, body[:8]))
            await peer.send(frames.data(1, body[8:], end=how.startswith("end")))
        if how == "trailers":
            await peer.send(frames.headers(1, [("x", "y")], end_stream=True))
        if how.endswith("reset"):
            await peer.send(frames.rst(1, Code.CONNECT_ERROR))
        await peer.wait_for(Kind.HEADERS, stream=3)
        await peer.send(frames.response(3))
        await peer.wait_end()

    told = Told()
    async with scripted_server(script, observer=told) as client:
        with pytest.raises(Unreachable) as caught:
            await client.open_tunnel(TARGET)
        assert caught.value.status == 503
        assert caught.value.reason == (None if how == "no body" else "upstream connect error")
        assert client.statistics().tunnels_refused == 1
        await (await client.open_tunnel(TARGET)).aclose()
    assert told.heard[2].startswith(f"tunnel refused {TARGET} 503")


@pytest.mark.wire("W-RSP-11", "W-RSP-12")
async def test_a_refusal_whose_body_never_ends_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    async def script(peer: Scripted) -> None:
        await peer.open()
        await peer.wait_for(Kind.HEADERS, stream=1)
        await peer.send(frames.response(1, 403), frames.data(1, bytes(5000)))
        await peer.wait_for(Kind.RST_STREAM, stream=1)
        await peer.wait_end()

    async with scripted_server(script) as client:
        with pytest.raises(PolicyDenied):
            await client.open_tunnel(TARGET)
        assert trio.current_time() == pytest.approx(20, abs=0.1)


@pytest.mark.wire("W-RSP-3", "W-RSP-4")
@pytest.mark.parametrize("status", [400, 401, 404, 503])
async def test_a_rejection_is_a_status_and_an_end(status: int) -> None:
    async def handler(request: Any) -> None:
        raise RequestRejected(status, flag="DENY", reason="not you")

    told = Told()
    server = HBONEServer(server_svid(), handler, observer=told)
    async with trio.open_nursery() as nursery:
        peer = scripted_client(server, nursery)
        await peer.open()
        await peer.send(frames.connect(1, TARGET))
        answer = await peer.wait_for(Kind.HEADERS, stream=1)
        assert (answer.status, answer.end_stream) == (status, True)
        assert (await peer.wait_for(Kind.RST_STREAM, stream=1)).code == Code.NO_ERROR
        await peer.send(frames.connect(3, TARGET, end_stream=True))
        assert (await peer.wait_for(Kind.HEADERS, stream=3)).end_stream
        await peer.fence()
        assert not [frame for frame in peer.log if frame.kind == Kind.RST_STREAM and frame.stream == 3]
        nursery.cancel_scope.cancel()
    assert told.heard.count(f"tunnel refused {TARGET} {status} not you") == 2
    assert server.statistics().tunnels == 0


async def test_more_tunnels_than_the_peer_allows() -> None:
    async with memory_pair(server_limits=Limits(max_concurrent_streams=2)) as pair:
        assert pair.near_session.available_streams == 2
        first, _ = await pair.open()
        await pair.open()
        assert (pair.near_session.available_streams, pair.near_session.open_streams) == (0, 2)
        with pytest.raises(LocalProtocolError):
            await pair.client.open_tunnel(TARGET)
        first.abort()
        assert pair.near_session.available_streams == 1


async def test_a_reset_of_the_request() -> None:
    async def script(peer: Scripted) -> None:
        await peer.open()
        for stream, code in ((1, Code.CONNECT_ERROR), (3, Code.REFUSED_STREAM)):
            await peer.wait_for(Kind.HEADERS, stream=stream)
            await peer.send(frames.rst(stream, code))
        await peer.wait_for(Kind.HEADERS, stream=5)
        await peer.send(frames.data(5, b"too early"))
        assert (await peer.wait_for(Kind.RST_STREAM, stream=5)).code == Code.PROTOCOL_ERROR
        await peer.wait_for(Kind.HEADERS, stream=7)

    told = Told()
    async with scripted_server(script, observer=told) as client:
        with pytest.raises(TunnelReset, match="CONNECT_ERROR"):
            await client.open_tunnel(TARGET)
        with pytest.raises(StreamRefused):
            await client.open_tunnel(TARGET)
        with pytest.raises(ConnectFailed, match="DATA before the answer"):
            await client.open_tunnel(TARGET)
        with pytest.raises(SessionClosed):
            await client.open_tunnel(TARGET)
    assert [line.split()[:2] for line in told.heard[2:5]] == [["tunnel", "refused"]] * 3


async def test_a_session_error_before_the_answer() -> None:
    async def script(peer: Scripted) -> None:
        await peer.open()
        await peer.wait_for(Kind.HEADERS, stream=1)
        await peer.send(frames.window_update(0, 0))
        assert (await peer.wait_for(Kind.GOAWAY)).code == Code.PROTOCOL_ERROR

    async with scripted_server(script) as client:
        with pytest.raises(SessionClosed, match=r"ended before .* was answered") as caught:
            await client.open_tunnel(TARGET)
        assert isinstance(caught.value.__cause__, RemoteProtocolError)
        with pytest.raises(SessionClosed):
            await client.open_tunnel(TARGET)


@pytest.mark.wire("W-RSP-10")
async def test_a_200_that_ends_its_half() -> None:
    async def script(peer: Scripted) -> None:
        await peer.open()
        await peer.wait_for(Kind.HEADERS, stream=1)
        await peer.send(frames.response(1, end_stream=True))
        assert (await peer.wait_for(Kind.DATA, stream=1)).data == b"up"
        assert (await peer.wait_for(Kind.DATA, stream=1)).end_stream

    async with scripted_server(script) as client:
        tunnel = await client.open_tunnel(TARGET)
        assert await tunnel.receive_some() == b""
        await tunnel.send_all(b"up")
        await tunnel.send_eof()


# === a server's patience ===


@pytest.mark.wire("W-LIM-9")
async def test_a_session_on_which_nothing_is_asked_ends(autojump_clock: trio.testing.MockClock) -> None:
    server = HBONEServer(server_svid(), accept_all)
    async with trio.open_nursery() as nursery:
        peer = scripted_client(server, nursery)
        await peer.open()
        await peer.wait_end()
        assert trio.current_time() == pytest.approx(60, abs=0.1)
        await peer.stream.aclose()
    assert server.statistics().sessions == 0


@pytest.mark.wire("W-LIM-9")
async def test_a_session_whose_tunnels_have_all_ended_ends_later(autojump_clock: trio.testing.MockClock) -> None:
    server = HBONEServer(server_svid(), accept_all, timeouts=Timeouts(idle=7))
    async with trio.open_nursery() as nursery:
        peer = scripted_client(server, nursery)
        await peer.open()
        await peer.send(frames.connect(1, TARGET))
        await peer.wait_for(Kind.HEADERS, stream=1)
        for _ in range(12):
            await trio.sleep(10)
            await peer.fence()
        await peer.send(frames.rst(1))
        await peer.wait_end()
        assert trio.current_time() == pytest.approx(127, abs=0.1)
        await peer.stream.aclose()
        nursery.cancel_scope.cancel()


# === what is told ===


async def test_both_sides_tell_their_observers() -> None:
    near_told, far_told = Told(), Told()
    async with memory_pair(observer=near_told, server_options={"observer": far_told}) as pair:
        near, far = await pair.open()
        await near.send_eof()
        await far.send_eof()
        near, _ = await pair.open("name.example:1")
        near.abort()
        await trio.testing.wait_all_tasks_blocked()
        assert pair.client.statistics().tunnels_opened == 2
        await pair.client.aclose()
    same = ["session opened", f"tunnel opened {TARGET}", "tunnel closed None"]
    same += ["tunnel opened name.example:1", "tunnel closed TunnelReset", "session closed None"]
    assert near_told.heard == [f"handshake {SERVER}", *same]
    assert far_told.heard == [f"handshake {CLIENT}", *same]


async def test_an_observer_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Bad(BaseObserver):
        def tunnel_opened(self, tunnel: Any) -> None:
            raise KeyError("oops")

    async with memory_pair(observer=Bad()) as pair:
        await trio.testing.check_two_way_stream(pair.open, None)
    assert "oops" in caplog.text


async def test_statistics_of_a_session() -> None:
    async with memory_pair() as pair:
        near, _ = await pair.open()
        await near.send_all(bytes(100_000))
        stats = pair.client.statistics()
        assert (stats.open_streams, stats.tunnels_opened, stats.bytes_sent, stats.unsent) == (1, 1, 100_000, 0)
        assert (stats.send_window, stats.draining, stats.closed) == (16 * 2**20 - 100_000, False, False)
        assert near in pair.near_session.tunnels
        await pair.client.aclose()
        assert pair.client.statistics().closed
        assert math.isfinite(pair.near_session.since_idle)


# === the network does not take what we write ===


async def test_a_congested_session_keeps_what_was_written() -> None:
    """Nobody reads for a while: senders wait, nothing is lost, PINGs and other tunnels are not torn apart."""
    stop = trio.Event()

    class Slow:
        """A stream whose other end reads when it is told."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream
            self.open = trio.Event()
            self.open.set()

        async def send_all(self, data: bytes) -> None:
            await self.open.wait()
            await self.stream.send_all(data)

        async def receive_some(self, size: int | None = None) -> bytes:
            data: bytes = await self.stream.receive_some(size)
            return data

        async def send_eof(self) -> None:
            await self.stream.send_eof()

        async def aclose(self) -> None:
            await self.stream.aclose()

    near, far = trio.testing.memory_stream_pair()
    slow = Slow(near)
    async with memory_pair(streams=(slow, far)) as pair, trio.open_nursery() as nursery:
        one, one_far = await pair.open()
        two, two_far = await pair.open()
        slow.open = trio.Event()
        for tunnel in (one, two):
            nursery.start_soon(tunnel.send_all, bytes(2_000_000))
        await trio.testing.wait_all_tasks_blocked()
        assert pair.client.statistics().unsent > 0
        assert pair.near_session.congested
        slow.open.set()
        for tunnel in (one_far, two_far):
            total = 0
            while total < 2_000_000:
                total += len(await tunnel.receive_some())
        stop.set()
    assert stop.is_set()


@pytest.mark.wire("W-LIM-7", "W-FLOW-8")
async def test_credit_for_many_at_once_does_not_flood_a_network_that_is_full() -> None:
    """A hundred senders wait for the session's window; it opens while the network takes nothing."""
    count, size = 100, 100_000
    gate = trio.Event()
    gate.set()

    async def script(peer: Scripted) -> None:
        await peer.open({Setting.INITIAL_WINDOW_SIZE: 1 << 20, Setting.MAX_CONCURRENT_STREAMS: count}, window=0)
        for number in range(count):
            await peer.wait_for(Kind.HEADERS, stream=2 * number + 1)
            await peer.send(frames.response(2 * number + 1))
        total = 0
        while total < 65_535:
            total += len((await peer.wait_for(Kind.DATA)).data)
        full.set()
        await opened.wait()
        await peer.send(frames.window_update(0, 1 << 30))
        await peer.send(frames.ping())
        given.set()
        while total < count * size:
            total += len((await peer.wait_for(Kind.DATA)).data)
        done.set()
        await peer.wait_end()
        await far.aclose()

    full, opened, given, done = trio.Event(), trio.Event(), trio.Event(), trio.Event()
    near, far = trio.testing.memory_stream_pair()

    pump: Any = near.send_stream.send_all_hook

    async def hold() -> None:
        await gate.wait()
        await pump()

    near.send_stream.send_all_hook = hold
    peer = Scripted(far, pki().server, server=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(script, peer)
        async with HBONEClient.over_stream(near, svid=client_svid()) as client:
            tunnels = [await client.open_tunnel(TARGET) for _ in range(count)]
            for tunnel in tunnels:
                nursery.start_soon(tunnel.send_all, bytes(size))
            await full.wait()
            await trio.testing.wait_all_tasks_blocked()
            gate = trio.Event()
            opened.set()
            await given.wait()
            await trio.testing.wait_all_tasks_blocked()
            assert 0 < client.statistics().unsent < 1 << 20
            assert not client.closed
            gate.set()
            with trio.fail_after(WAIT):
                await done.wait()
        nursery.cancel_scope.cancel()


async def test_a_stream_that_breaks_under_a_session_that_writes() -> None:
    near, far = trio.testing.memory_stream_pair()
    async with memory_pair(streams=(near, far)) as pair:
        tunnel, _ = await pair.open()

        async def broken(*_: Any) -> None:
            raise trio.BrokenResourceError

        near.send_stream.send_all_hook = broken
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(near, "send_all", broken)
            await tunnel.send_all(b"x" * 100_000)
            await trio.testing.wait_all_tasks_blocked()
            await tunnel.send_all(b"y")  # nowhere: the reader will tell
            await far.aclose()
            with pytest.raises(trio.BrokenResourceError):
                await tunnel.receive_some()
        assert pair.client.closed


async def test_a_stream_that_cannot_end_one_direction_alone(autojump_clock: trio.testing.MockClock) -> None:
    class Whole(trio.abc.Stream):
        """Only what `trio.abc.Stream` asks for."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream

        async def send_all(self, data: Any) -> None:
            await self.stream.send_all(data)

        async def wait_send_all_might_not_block(self) -> None:
            await self.stream.wait_send_all_might_not_block()

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            data: bytes = await self.stream.receive_some(max_bytes)
            return data

        async def aclose(self) -> None:
            await self.stream.aclose()

    near, far = trio.testing.memory_stream_pair()
    began = trio.current_time()
    async with memory_pair(streams=(Whole(near), Whole(far))) as pair:
        await trio.testing.check_two_way_stream(pair.open, None)
        await pair.client.aclose()
        assert pair.near_session.error is None
    assert trio.current_time() - began < 1.5  # close_notify is enough: nobody waits for an end of the stream


@pytest.mark.parametrize("make", [memory_pair, socket_pair])
async def test_tls_by_the_public_calls_of_pyopenssl(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pyOpenSSL with other internals would get."""
    monkeypatch.setattr(_carrier, "read_records", _openssl._read_public)
    monkeypatch.setattr(_carrier, "write_records", _openssl._write_public)
    async with make(limits=Limits(stream_window=65_535, connection_window=65_535)) as pair:
        await trio.testing.check_half_closeable_stream(pair.open, None)
        near, far = await pair.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.send_all, bytes(1_000_000))
            size = 0
            while size < 1_000_000:
                size += len(await far.receive_some())
        pair.far_session.kill()
        with pytest.raises(trio.BrokenResourceError):
            await near.receive_some()


async def test_a_malformed_request_is_told_too() -> None:
    told = Told()
    server = HBONEServer(server_svid(), accept_all, observer=told)
    async with trio.open_nursery() as nursery:
        peer = scripted_client(server, nursery)
        await peer.open()
        await peer.send(frames.connect(1, "no port"), frames.headers(3, [(":method", "CONNECT")]))
        assert (await peer.wait_for(Kind.HEADERS, stream=1)).status == 400
        assert (await peer.wait_for(Kind.RST_STREAM, stream=3)).code == Code.PROTOCOL_ERROR
        (session,) = server.sessions
        assert session.statistics().tunnels_refused == 2
        nursery.cancel_scope.cancel()
    assert [line.split()[:2] for line in told.heard[2:4]] == [["tunnel", "refused"]] * 2


@pytest.mark.wire("W-LIM-9")
async def test_a_client_that_sends_no_settings_is_let_go(autojump_clock: trio.testing.MockClock) -> None:
    server = HBONEServer(server_svid(), accept_all)
    async with trio.open_nursery() as nursery:
        peer = scripted_client(server, nursery)
        peer.ack_settings = False
        await peer.handshake()
        await peer.wait_end()
        assert trio.current_time() <= 11
        await peer.stream.aclose()
    assert server.statistics().sessions == 0


# === sockets, below sessions ===


async def test_a_target_is_resolved_to_all_its_addresses() -> None:
    assert await resolve(Authority("10.0.0.7", 80)) == (Authority("10.0.0.7", 80),)
    assert Authority("127.0.0.1", 80) in await resolve(Authority("localhost", 80))
    with pytest.raises(ConnectFailed, match="does not resolve"):
        await resolve(Authority("no-such-host.invalid", 80))


async def test_a_name_is_resolved_and_connected() -> None:
    with listen_tcp("127.0.0.1", 0) as listener:
        sock = await connect_tcp("localhost", listener.getsockname()[1], timeout=WAIT)
        assert not sock.getblocking()
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        sock.close()


async def test_a_connection_that_fails_says_why() -> None:
    with pytest.raises(ConnectFailed, match="does not resolve"):
        await connect_tcp("no-such-host.invalid", 80, timeout=WAIT)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectFailed, match="connection refused"):
            await connect_tcp("localhost", taken.getsockname()[1], timeout=WAIT)
        with pytest.raises(ConnectFailed, match=r"127\.0\.0\.1"):
            await connect_tcp("127.0.0.1", taken.getsockname()[1], timeout=WAIT, source_ip="192.0.2.1")


async def test_a_connection_may_come_from_an_address_of_ours() -> None:
    with listen_tcp("127.0.0.1", 0) as listener:
        sock = await connect_tcp("127.0.0.1", listener.getsockname()[1], timeout=WAIT, source_ip="127.0.0.3")
        assert sock.getsockname()[0] == "127.0.0.3"
        sock.close()


@pytest.mark.wire("W-TCP-2")
async def test_a_connection_is_bounded_in_time(autojump_clock: trio.testing.MockClock) -> None:
    async def never(sock: socket.socket) -> None:
        await trio.sleep_forever()

    with listen_tcp("127.0.0.1", 0) as listener, pytest.MonkeyPatch.context() as patch:
        listener.listen(0)
        patch.setattr(trio.lowlevel, "wait_writable", never)
        patch.setattr("hbone.transport._tcp._is_decided", lambda sock: False)
        patch.setattr(socket.socket, "connect_ex", lambda self, address: 115)
        with pytest.raises(ConnectFailed, match=r"timed out after 10 s; a NetworkPolicy"):
            await connect_tcp("192.0.2.1", 15008, timeout=10)
        with pytest.raises(ConnectFailed, match=r"timed out after 10 s$"):
            await connect_tcp("192.0.2.1", 80, timeout=10)


async def test_listening_where_one_cannot() -> None:
    with listen_tcp("127.0.0.1", 0) as listener, pytest.raises(OSError, match=r".+"):
        listen_tcp("127.0.0.1", listener.getsockname()[1])
    options: list[socket.socket] = []
    with listen_tcp("::", 0, prepare=options.append) as listener:
        assert options == [listener]
        sock = await connect_tcp("127.0.0.1", listener.getsockname()[1], timeout=WAIT)
        sock.close()


async def test_a_peer_that_leaves_before_the_handshake() -> None:
    with listen_tcp("127.0.0.1", 0) as listener:
        sock = await connect_tcp("127.0.0.1", listener.getsockname()[1], timeout=WAIT)
        while True:
            try:
                other, _ = listener.accept()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(listener)
            else:
                break
        other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        other.close()
        policy = PeerPolicy.exact(SERVER)
        carrier = SocketCarrier(sock, client_connection(client_svid(), policy, sock))
        with pytest.raises(ConnectFailed):
            await shake_hands(carrier, sock, client=True, timeouts=Timeouts(), observer=Told())
        carrier.close()
        carrier.close()


async def test_the_session_that_the_pool_uses_runs_in_its_nursery() -> None:
    server = HBONEServer(server_svid(), accept_all)
    async with trio.open_nursery() as nursery:
        endpoint = await nursery.start(server.serve, "127.0.0.1", 0)
        session = await open_session(
            nursery, "127.0.0.1", endpoint.port, svid=client_svid(), policy=PeerPolicy.exact(SERVER)
        )
        assert session.ready.is_set()
        tunnel = await session.open_tunnel(TARGET)
        tunnel.abort(ErrorCode.INTERNAL_ERROR)
        await session.aclose()
        assert session.closed
        nursery.cancel_scope.cancel()


async def test_a_refusal_is_of_the_class_that_tells_most() -> None:
    made: Callable[..., TunnelRefused] = TunnelRefused.for_status
    assert type(made(404)) is TunnelRefused
