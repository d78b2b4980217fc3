"""The 23 faults that were measured in other implementations of tunnels over HTTP/2: ours has none of them.

docs/design/foreign-peers.md lists them, by the numbers that the names of these tests carry. 1 to 13 are faults of
servers: a hand-made client asks an `HBONEServer` for plain TCP backends. 14 to 23 are faults of clients: a hand-made
server answers an `HBONEClient` or a `ConnectionPool`.
"""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import threading

import pytest
import trio
from support import frames
from support.backends import (
    Backend,
    echo,
    ends_first,
    generate,
    hard_close,
    hold,
    pattern,
    pattern_sha,
    refused_port,
    resets_after,
    send_then_receive,
)
from support.certs import SERVER
from support.frames import Code, Kind, Setting
from support.ours import PATIENCE, against, forwarding, run, svid
from support.rawpeer import Ended
from support.tcp import connected_pair

from hbone import (
    ConnectFailed,
    ConnectionPool,
    HBONEClient,
    Limits,
    StreamRefused,
    Timeouts,
    relay,
)

MIB = 1 << 20
TARGET = "10.0.0.1:80"

#: For a peer that takes its time to read our last words.
UNHURRIED = Timeouts(close=PATIENCE)


def sha(payload):
    return hashlib.sha256(payload).hexdigest()


def is_end(got):
    """Whether a frame ends the peer's half of a stream, one way or the other."""
    return got.kind == Kind.RST_STREAM or got.end_stream


# --- as a server


@pytest.mark.parametrize("sent", [0, 100_000])
@pytest.mark.parametrize("uploading", [False, True])
@pytest.mark.wire("W-RST-1")
async def test_fault_01_a_reset_of_the_backend_is_no_clean_end(sent, uploading):
    def script():
        with near.dial() as peer:
            peer.open()
            assert peer.tunnel(1, app.target) == 200
            peer.upload(1, [bytes(1000)], end=False)
            end = None
            if uploading:
                with contextlib.suppress(TimeoutError):
                    while end is None:
                        peer.upload(1, [bytes(16_384)], end=False, timeout=0.5)
                        end = next((f for f in peer.pending if is_end(f)), None)
            end = end or peer.wait_for(stream=1, where=is_end)
            assert (end.kind, end.code) == (Kind.RST_STREAM, Code.CONNECT_ERROR)
            peer.fence()  # the session lives

    with Backend(resets_after(sent, read=1000)) as app:
        async with forwarding() as near:
            await run(script)


@pytest.mark.parametrize(
    "end",
    ["rst_cancel", "rst_no_error", "rst_internal_error", "tcp_reset", "tcp_fin", "close_notify", "goaway_and_fin"],
)
@pytest.mark.wire("W-RST-3", "W-RST-4")
async def test_fault_02_a_client_that_breaks_off_is_a_reset_for_the_backend(end):
    def script():
        with near.dial() as peer:
            peer.open()
            assert peer.tunnel(1, app.target) == 200
            peer.upload(1, [bytes(100_000)], end=False)
            peer.fence()
            match end:
                case "rst_cancel":
                    peer.send(frames.rst(1, Code.CANCEL))
                case "rst_no_error":
                    peer.send(frames.rst(1, Code.NO_ERROR))
                case "rst_internal_error":
                    peer.send(frames.rst(1, Code.INTERNAL_ERROR))
                case "tcp_reset":
                    peer.reset()
                case "tcp_fin":
                    peer.fin()
                case "close_notify":
                    peer.close_notify()
                case "goaway_and_fin":
                    peer.send(frames.goaway(0, Code.INTERNAL_ERROR))
                    peer.fin()
            assert app.wait_connection(0).end == "reset"

    with Backend(hold) as app:
        async with forwarding() as near:
            await run(script)


@pytest.mark.parametrize("order", ["client_first", "backend_first", "client_during_download", "backend_during_upload"])
@pytest.mark.wire("W-CLOSE-1", "W-CLOSE-2", "W-CLOSE-3", "W-CLOSE-4", "W-CLOSE-5")
async def test_fault_03_half_close_is_exact_in_all_four_orders(order):
    size = 16 * MIB
    habit = {
        "client_first": generate(size),
        "backend_first": ends_first(size),
        "client_during_download": send_then_receive(size),
        "backend_during_upload": ends_first(MIB),
    }[order]
    down = MIB if order == "backend_during_upload" else size

    def script():
        with near.dial() as peer:
            peer.open()
            assert peer.tunnel(1, app.target) == 200
            if order == "backend_first":
                assert sha(peer.take_data(1)) == pattern_sha(down)
                peer.upload(1, pattern(size))
            else:
                peer.upload(1, pattern(size))
                assert sha(peer.take_data(1)) == pattern_sha(down)
            seen = app.wait_connection(0)
            assert (seen.end, seen.sha) == ("eof", pattern_sha(size))
            assert not [f for f in peer.log if f.kind == Kind.RST_STREAM]

    with Backend(habit) as app:
        async with forwarding() as near:
            await run(script)


@pytest.mark.wire("W-REQ-12")
async def test_fault_03_a_connect_that_ends_at_once_still_gets_the_whole_answer():
    def script():
        with near.dial() as peer:
            peer.open()
            peer.send(frames.connect(1, app.target, end_stream=True))
            assert peer.wait_for(Kind.HEADERS, stream=1).status == 200
            assert sha(peer.take_data(1)) == pattern_sha(MIB)

    with Backend(generate(MIB)) as app:
        async with forwarding() as near:
            await run(script)


@pytest.mark.parametrize("who", ["client_says_goaway", "server_drains"])
@pytest.mark.wire("W-GOAWAY-1", "W-GOAWAY-5")
async def test_fault_04_the_tail_of_a_download_survives_a_drain(who):
    size = 8 * MIB

    def script(drain):
        for _ in range(6):
            # A small buffer here keeps the tail in the server's socket while our WINDOW_UPDATEs are under way.
            with near.dial(receive_buffer=16_384) as peer:
                peer.open()
                assert peer.tunnel(1, app.target) == 200
                if who == "client_says_goaway":
                    peer.send(frames.goaway(0, Code.NO_ERROR))
                else:
                    drain()
                peer.send(frames.data(1, end=True))
                got = hashlib.sha256()
                while True:
                    piece = peer.wait_for(Kind.DATA, stream=1)
                    got.update(piece.data)
                    if piece.end_stream:
                        break
                    with contextlib.suppress(Ended):  # all may have been sent, and be read here only now
                        for _ in range(4):
                            peer.send(frames.window_update(1, 1))
                assert got.hexdigest() == pattern_sha(size)
                with contextlib.suppress(Ended):
                    for _ in range(20):
                        peer.send(frames.window_update(0, 1))
                assert peer.wait_end() in ("close_notify", "eof")
            if who == "server_drains":
                return

    with Backend(generate(size)) as app:
        async with forwarding(timeouts=UNHURRIED) as near:
            async with trio.open_nursery() as nursery:

                def drain():
                    trio.from_thread.run_sync(nursery.start_soon, near.server.drain, PATIENCE)

                await run(script, drain)


@pytest.mark.parametrize(
    "attack",
    [
        frames.headers(3, frames.connect_headers(TARGET, ("Upper", "x"))),
        frames.headers(3, frames.connect_headers(TARGET, ("baggage", "a\rb"))),
        frames.headers(3, frames.connect_headers(TARGET, ("baggage", "a\nb"))),
        frames.headers(3, frames.connect_headers(TARGET, ("baggage", "a\0b"))),
        frames.headers(3, [*frames.connect_headers(TARGET), (":odd", "x")]),
        "window_update_0",
    ],
    ids=["upper_case", "cr", "lf", "nul", "unknown_pseudo_header", "window_update_0"],
)
@pytest.mark.wire("W-ERR-1", "W-FLOW-7")
async def test_fault_05_one_bad_request_leaves_the_other_tunnels_alone(attack):
    def script():
        with near.dial() as peer:
            peer.open()
            assert peer.tunnel(1, app.target) == 200
            if attack == "window_update_0":
                assert peer.tunnel(3, app.target) == 200
                peer.send(frames.window_update(3, 0))
            else:
                peer.send(attack)
            assert peer.wait_for(Kind.RST_STREAM, stream=3).code == Code.PROTOCOL_ERROR
            peer.send(frames.data(1, b"alive", end=True))
            assert peer.take_data(1) == b"alive"
            assert peer.goaway_code() is None

    with Backend(echo) as app:
        async with forwarding() as near:
            await run(script)


def never_reads(stop):
    def habit(sock, seen):
        stop.wait(PATIENCE)

    return habit


@pytest.mark.wire("W-FLOW-1", "W-FLOW-2")
async def test_fault_06_five_stalled_backends_do_not_freeze_the_sixth():
    stop = threading.Event()

    def script():
        with near.dial() as peer:
            peer.open()
            for stream in (1, 3, 5, 7, 9):
                assert peer.tunnel(stream, stalled.target) == 200
                assert peer.fill_window(stream) >= 256 * 1024
            assert peer.tunnel(11, app.target) == 200
            peer.upload(11, pattern(4 * MIB))
            assert sha(peer.take_data(11)) == pattern_sha(4 * MIB)

    limits = Limits(stream_window=256 * 1024, connection_window=1024 * 1024)
    with Backend(never_reads(stop), receive_buffer=4096) as stalled, Backend(echo) as app:
        async with forwarding(limits=limits) as near:
            await run(script)
        stop.set()


@pytest.mark.wire("W-RSP-1", "W-RSP-3")
async def test_fault_07_a_refused_target_is_503_and_never_200():
    def script():
        with near.dial() as peer:
            peer.open()
            assert peer.tunnel(1, f"127.0.0.1:{port}") == 503
            assert [f.status for f in peer.log if f.kind == Kind.HEADERS] == [503]

    with refused_port() as port:
        async with forwarding() as near:
            await run(script)


@pytest.mark.wire("W-RST-9")
async def test_fault_08_beyond_the_stream_limit_only_the_extra_stream_is_refused():
    def script():
        with near.dial() as peer:
            assert peer.open()[Setting.MAX_CONCURRENT_STREAMS] == 3
            for stream in (1, 3, 5):
                assert peer.tunnel(stream, app.target) == 200
            peer.send(frames.connect(7, app.target))
            assert peer.wait_for(Kind.RST_STREAM, stream=7).code == Code.REFUSED_STREAM
            for stream in (1, 3, 5):
                peer.send(frames.data(stream, b"alive", end=True))
                assert peer.take_data(stream) == b"alive"
            assert peer.tunnel(9, app.target) == 200

    with Backend(echo) as app:
        async with forwarding(limits=Limits(max_concurrent_streams=3)) as near:
            await run(script)


@pytest.mark.parametrize("stage", ["nothing", "half_a_client_hello", "no_preface", "half_a_preface", "no_settings"])
@pytest.mark.wire("W-TLS-9", "W-SET-8")
async def test_fault_09_a_client_that_stalls_is_let_go(stage):
    def script():
        with near.dial(handshake=shakes, quiet=True) as peer:
            with contextlib.suppress(Ended, ConnectionError):  # if we are slower than it is patient
                match stage:
                    case "half_a_client_hello":
                        peer.sock.send(bytes.fromhex("16030106000100"))
                    case "half_a_preface":
                        peer.send(frames.PREFACE[:10])
                    case "no_settings":
                        peer.send(frames.PREFACE)
            assert peer.wait_end() in ("eof", "close_notify", "reset", "alert")

    shakes = stage not in ("nothing", "half_a_client_hello")
    async with forwarding(timeouts=Timeouts(handshake=60 if shakes else 0.3, settings=0.3, close=0.3)) as near:
        await run(script)


@pytest.mark.wire("W-RST-10")
async def test_fault_10_everything_of_a_dead_session_ends_with_it():
    def script():
        with near.dial() as peer:
            peer.open()
            for stream in range(1, 20_001, 2):
                raw = frames.connect(stream, app.target) + frames.rst(stream)
                try:
                    peer.send(raw)
                except Ended:
                    break
            peer.wait_end()
            assert peer.goaway_code() == Code.ENHANCE_YOUR_CALM
        for index in range(len(app.connections)):
            assert app.connections[index].done.wait(60), "a connection to the backend is still open"

    with Backend(hold) as app:
        async with forwarding() as near:
            await run(script)


@pytest.mark.wire("W-RST-10", "W-RST-4")
async def test_fault_10_the_backends_of_live_tunnels_end_too_when_their_session_is_cut_off():
    def script():
        with near.dial() as peer:
            peer.open()
            for stream in range(1, 101, 2):
                assert peer.tunnel(stream, app.target) == 200
            for _ in range(20_000):
                try:
                    peer.send(frames.ping())
                except Ended:
                    break
            peer.wait_end()
        for index in range(50):
            assert app.wait_connection(index).end == "reset"

    with Backend(hold) as app:
        async with forwarding() as near:
            await run(script)


@pytest.mark.wire("W-FLOW-4")
async def test_fault_11_padding_is_credited_to_the_last_byte():
    size = 12_000

    def script():
        with near.dial() as peer:
            peer.open()
            assert peer.tunnel(1, app.target) == 200
            peer.upload(1, [bytes([n % 251]) for n in range(size)], pad=255, end=False)
            app_bytes = bytes(n % 251 for n in range(size))
            assert peer.take_data(1, size) == app_bytes
            peer.fence()
            # 3 MB on the wire for 12 kB: all but the last quarter of a window has come back
            assert peer.stream_credit(1) >= 65_536 * 3 // 4 - 1
            assert peer.credit[0] >= 262_144 * 3 // 4 - 1

    with Backend(echo) as app:
        async with forwarding(limits=Limits(stream_window=65_536, connection_window=262_144)) as near:
            await run(script)


@pytest.mark.parametrize("end_stream", [True, False])
@pytest.mark.wire("W-DATA-3")
async def test_fault_12_headers_inside_a_tunnel_are_a_stream_error(end_stream):
    def script():
        with near.dial() as peer:
            peer.open()
            assert peer.tunnel(1, app.target) == 200
            assert peer.tunnel(3, other.target) == 200
            peer.send(frames.data(1, b"not all of it"))
            peer.send(frames.headers(1, [("grpc-status", "0")], end_stream=end_stream))
            assert peer.wait_for(Kind.RST_STREAM, stream=1).code == Code.PROTOCOL_ERROR
            assert app.wait_connection(0).end == "reset"
            peer.send(frames.data(3, b"alive", end=True))
            assert peer.take_data(3) == b"alive"

    with Backend(hold) as app, Backend(echo) as other:
        async with forwarding() as near:
            await run(script)


SESSION_ERRORS = {
    "session_window_overflows": (frames.window_update(0, 2**31 - 1), Code.FLOW_CONTROL_ERROR),
    "window_update_0_on_the_session": (frames.window_update(0, 0), Code.PROTOCOL_ERROR),
    "window_update_of_3_bytes": (frames.frame(Kind.WINDOW_UPDATE, 0, 1, b"\0\0\1"), Code.FRAME_SIZE_ERROR),
    "window_update_on_an_idle_stream": (frames.window_update(99, 1), Code.PROTOCOL_ERROR),
    "initial_window_too_large": (frames.settings({Setting.INITIAL_WINDOW_SIZE: 2**31}), Code.FLOW_CONTROL_ERROR),
    "initial_window_overflows_a_stream": (
        frames.window_update(1, 2**30) + frames.settings({Setting.INITIAL_WINDOW_SIZE: 2**31 - 1}),
        Code.FLOW_CONTROL_ERROR,
    ),
    "max_frame_size_too_small": (frames.settings({Setting.MAX_FRAME_SIZE: 16_383}), Code.PROTOCOL_ERROR),
    "max_frame_size_too_large": (frames.settings({Setting.MAX_FRAME_SIZE: 2**24}), Code.PROTOCOL_ERROR),
    "enable_push_2": (frames.settings({Setting.ENABLE_PUSH: 2}), Code.PROTOCOL_ERROR),
    "settings_of_5_bytes": (frames.frame(Kind.SETTINGS, 0, 0, bytes(5)), Code.FRAME_SIZE_ERROR),
    "settings_ack_with_payload": (frames.frame(Kind.SETTINGS, 1, 0, bytes(6)), Code.FRAME_SIZE_ERROR),
    "settings_on_a_stream": (frames.frame(Kind.SETTINGS, 0, 1), Code.PROTOCOL_ERROR),
    "ping_of_7_bytes": (frames.ping(bytes(7)), Code.FRAME_SIZE_ERROR),
    "ping_on_a_stream": (frames.frame(Kind.PING, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "goaway_of_7_bytes": (frames.frame(Kind.GOAWAY, 0, 0, bytes(7)), Code.FRAME_SIZE_ERROR),
    "goaway_on_a_stream": (frames.frame(Kind.GOAWAY, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "rst_stream_of_3_bytes": (frames.frame(Kind.RST_STREAM, 0, 1, bytes(3)), Code.FRAME_SIZE_ERROR),
    "rst_stream_on_the_session": (frames.rst(0), Code.PROTOCOL_ERROR),
    "rst_stream_on_an_idle_stream": (frames.rst(99), Code.PROTOCOL_ERROR),
    "data_on_the_session": (frames.data(0, b"x"), Code.PROTOCOL_ERROR),
    "data_on_an_idle_stream": (frames.data(99, b"x"), Code.PROTOCOL_ERROR),
    "data_padding_too_long": (frames.frame(Kind.DATA, frames.PADDED, 1, b"\x05abc"), Code.PROTOCOL_ERROR),
    "data_padded_and_empty": (frames.frame(Kind.DATA, frames.PADDED, 1), Code.FRAME_SIZE_ERROR),
    "frame_too_large": (frames.frame(Kind.DATA, 0, 1, length=2**20 + 1), Code.FRAME_SIZE_ERROR),
    "headers_on_the_session": (frames.connect(0, TARGET), Code.PROTOCOL_ERROR),
    "headers_on_an_even_stream": (frames.connect(2, TARGET), Code.PROTOCOL_ERROR),
    "headers_padding_too_long": (
        frames.frame(Kind.HEADERS, frames.PADDED | frames.END_HEADERS, 3, b"\xff" + bytes(9)),
        Code.PROTOCOL_ERROR,
    ),
    "header_block_broken": (frames.headers(3, b"\xff\xff\xff\xff\xff\xff"), Code.COMPRESSION_ERROR),
    "header_index_unknown": (frames.headers(3, b"\xbe"), Code.COMPRESSION_ERROR),
    "header_table_size_too_large": (frames.headers(3, b"\x3f\xe1\xff\x03"), Code.COMPRESSION_ERROR),
    "header_block_cut": (frames.headers(3, b"\x00\x0aabc"), Code.COMPRESSION_ERROR),
    "continuation_without_headers": (frames.continuation(3, b"", end_headers=True), Code.PROTOCOL_ERROR),
    "header_block_interrupted": (
        frames.headers(3, b"", end_headers=False) + frames.ping(),
        Code.PROTOCOL_ERROR,
    ),
    "header_block_of_another_stream": (
        frames.headers(3, b"", end_headers=False) + frames.continuation(5, b"", end_headers=True),
        Code.PROTOCOL_ERROR,
    ),
    "push_promise": (frames.frame(Kind.PUSH_PROMISE, frames.END_HEADERS, 1, bytes(4)), Code.PROTOCOL_ERROR),
}

STREAM_ERRORS = {
    "stream_window_overflows": (frames.window_update(1, 2**31 - 1), Code.FLOW_CONTROL_ERROR),
    "window_update_0": (frames.window_update(1, 0), Code.PROTOCOL_ERROR),
    "data_after_end_stream": (frames.data(1, end=True) + frames.data(1, b"x"), Code.STREAM_CLOSED),
    "headers_after_end_stream": (
        frames.data(1, end=True) + frames.headers(1, [("a", "b")], end_stream=True),
        Code.STREAM_CLOSED,
    ),
    "priority_of_4_bytes": (frames.frame(Kind.PRIORITY, 0, 1, bytes(4)), Code.FRAME_SIZE_ERROR),
}


@pytest.mark.parametrize("name", SESSION_ERRORS)
@pytest.mark.wire("W-ERR-2", "W-ERR-3", "W-LIM-3")
async def test_fault_13_a_session_error_has_the_code_of_the_rfc(name):
    raw, code = SESSION_ERRORS[name]

    def script():
        with near.dial() as peer:
            peer.open()
            assert peer.tunnel(1, app.target) == 200
            peer.send(raw)
            assert peer.wait_for(Kind.GOAWAY).code == code
            peer.wait_end()
            assert app.wait_connection(0).end == "reset"

    with Backend(hold) as app:
        async with forwarding() as near:
            await run(script)


@pytest.mark.parametrize("name", STREAM_ERRORS)
@pytest.mark.wire("W-ERR-2", "W-CLOSE-6", "W-FLOW-7")
async def test_fault_13_a_stream_error_has_the_code_of_the_rfc(name):
    raw, code = STREAM_ERRORS[name]

    def script():
        with near.dial() as peer:
            peer.open()
            assert peer.tunnel(1, app.target) == 200
            peer.send(raw)
            assert peer.wait_for(Kind.RST_STREAM, stream=1).code == code
            assert peer.tunnel(3, other.target) == 200
            assert peer.goaway_code() is None

    stop = threading.Event()
    with Backend(never_reads(stop)) as app, Backend(echo) as other:
        async with forwarding() as near:
            await run(script)
        stop.set()


@pytest.mark.parametrize("which", ["stream", "session"])
@pytest.mark.wire("W-FLOW-6")
async def test_fault_13_more_data_than_the_window_is_a_flow_control_error(which):
    stop = threading.Event()

    def script():
        with near.dial() as peer:
            peer.open()
            assert peer.tunnel(1, app.target) == 200
            peer.fill_window(1)
            if which == "stream":
                peer.send_some(frames.data(1, bytes(16_384)) * 4)
                assert peer.wait_for(Kind.RST_STREAM, stream=1).code == Code.FLOW_CONTROL_ERROR
                peer.fence()
            else:  # one burst of more than the whole session may have under way
                peer.reading = False
                peer.send_some(frames.data(1, bytes(2**20)) * 8)
                peer.reading = True
                peer.wait_end()
                codes = [f.code for f in peer.log if f.kind in (Kind.GOAWAY, Kind.RST_STREAM)]
                assert codes[0] == Code.FLOW_CONTROL_ERROR

    with Backend(never_reads(stop), receive_buffer=4096) as app:
        async with forwarding(limits=Limits(stream_window=65_536, connection_window=262_144)) as near:
            await run(script)
        stop.set()


# --- as a client


def connected(port, **options):
    return HBONEClient.connect("127.0.0.1", port, svid=svid_of_client(), expect=SERVER, **options)


def svid_of_client():
    from support.certs import pki

    return svid(pki().client)


async def drain(stream):
    """Everything that arrives until the end, and how it ended: ``eof`` or the exception."""
    got = bytearray()
    try:
        while chunk := await stream.receive_some(65_536):
            got += chunk
    except trio.BrokenResourceError as error:
        return bytes(got), error
    return bytes(got), "eof"


def breaks(peer, how):
    match how:
        case "tcp_reset":
            peer.reset()
        case "bare_fin":
            peer.fin()
        case "close_notify":
            peer.close_notify()
            peer.fin()
        case "goaway_with_error":
            peer.send(frames.goaway(1, Code.INTERNAL_ERROR))
            peer.fin()
        case "goaway_no_error":
            peer.send(frames.goaway(1, Code.NO_ERROR))
            peer.fin()


BREAKS = ["tcp_reset", "bare_fin", "close_notify", "goaway_with_error", "goaway_no_error"]


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.wire("W-RST-4")
async def test_fault_14_a_session_that_breaks_in_mid_download_is_never_an_end(how):
    def script(listener):
        with listener.accept() as peer:
            peer.open()
            peer.wait_for(Kind.HEADERS, stream=1)
            peer.send(frames.response(1) + frames.data(1, bytes(100_000)[:16_384]))
            peer.fence()
            breaks(peer, how)
            if how != "tcp_reset":
                peer.wait_end()

    async with against(script) as port, connected(port) as client:
        tunnel = await client.open_tunnel(TARGET)
        got, end = await drain(tunnel)
        assert isinstance(end, trio.BrokenResourceError)
        assert end.__cause__ is not None
        assert len(got) == 16_384


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.wire("W-RST-3", "W-RST-4")
async def test_fault_14_the_application_behind_the_relay_sees_a_reset(how):
    def script(listener):
        with listener.accept() as peer:
            peer.open()
            peer.wait_for(Kind.HEADERS, stream=1)
            peer.send(frames.response(1) + frames.data(1, bytes(16_384)))
            peer.wait_for(Kind.DATA, stream=1)
            breaks(peer, how)
            if how != "tcp_reset":
                peer.wait_end()

    async with against(script) as port, connected(port) as client:
        application, ours = connected_pair()
        async with application, trio.open_nursery() as nursery:
            nursery.start_soon(relay, ours, await client.open_tunnel(TARGET))
            assert await application.receive_some(1)
            await application.send_all(b"got it")
            _, end = await drain(application)
            assert isinstance(end, trio.BrokenResourceError)


@pytest.mark.parametrize("code", [Code.INTERNAL_ERROR, Code.CONNECT_ERROR, Code.CANCEL, Code.NO_ERROR])
@pytest.mark.wire("W-RST-5")
async def test_fault_15_a_reset_stream_is_never_an_end(code):
    def script(listener):
        with listener.accept() as peer:
            peer.open()
            peer.wait_for(Kind.HEADERS, stream=1)
            peer.send(frames.response(1) + frames.data(1, bytes(16_384)) + frames.rst(1, code))
            with contextlib.suppress(Ended):
                peer.fence()
                peer.wait_end()

    async with against(script) as port, connected(port) as client:
        tunnel = await client.open_tunnel(TARGET)
        got, end = await drain(tunnel)
        assert len(got) in (0, 16_384)
        assert isinstance(end, trio.BrokenResourceError)
        assert end.__cause__.error_code == code
        assert end.__cause__.remote


@pytest.mark.parametrize("code", [Code.INTERNAL_ERROR, Code.CONNECT_ERROR, Code.CANCEL])
@pytest.mark.wire("W-RST-3")
async def test_fault_15_a_reset_stream_is_a_reset_for_the_application(code):
    def script(listener):
        with listener.accept() as peer:
            peer.open()
            peer.wait_for(Kind.HEADERS, stream=1)
            peer.send(frames.response(1) + frames.data(1, bytes(16_384)))
            peer.wait_for(Kind.DATA, stream=1)
            peer.send(frames.rst(1, code))
            with contextlib.suppress(Ended):
                peer.wait_end()

    async with against(script) as port, connected(port) as client:
        application, ours = connected_pair()
        async with application, trio.open_nursery() as nursery:
            nursery.start_soon(relay, ours, await client.open_tunnel(TARGET))
            assert await application.receive_some(1)
            await application.send_all(b"got it")
            _, end = await drain(application)
            assert isinstance(end, trio.BrokenResourceError)


@pytest.mark.wire("W-RST-2")
async def test_fault_15_the_applications_own_reset_is_no_end_stream():
    def script(listener):
        with listener.accept() as peer:
            peer.open()
            peer.wait_for(Kind.HEADERS, stream=1)
            peer.send(frames.response(1))
            peer.wait_for(Kind.DATA, stream=1)
            end = peer.wait_for(stream=1, where=is_end)
            assert (end.kind, end.code) == (Kind.RST_STREAM, Code.CONNECT_ERROR)

    async with against(script) as port, connected(port) as client:
        application, ours = connected_pair()
        async with application, trio.open_nursery() as nursery:
            tunnel = await client.open_tunnel(TARGET)
            nursery.start_soon(relay, ours, tunnel)
            await application.send_all(b"half of it")
            while tunnel.statistics().bytes_sent < 10:
                await trio.sleep(0.001)
            hard_close(application.socket)


@pytest.mark.wire("W-RST-7")
async def test_fault_15_abort_is_a_reset():
    def script(listener):
        with listener.accept() as peer:
            peer.open()
            peer.wait_for(Kind.HEADERS, stream=1)
            peer.send(frames.response(1))
            end = peer.wait_for(stream=1, where=is_end)
            assert (end.kind, end.code) == (Kind.RST_STREAM, Code.CANCEL)

    async with against(script) as port, connected(port) as client:
        tunnel = await client.open_tunnel(TARGET)
        await tunnel.send_all(b"half of it")
        tunnel.abort()


@pytest.mark.wire("W-GOAWAY-1", "W-GOAWAY-5")
async def test_fault_16_the_tail_of_an_upload_survives_goaway():
    size = 8 * MIB

    def script(listener):
        for _ in range(6):
            with listener.accept() as peer:
                peer.open()
                peer.wait_for(Kind.HEADERS, stream=1)
                peer.send(frames.response(1) + frames.goaway(1, Code.NO_ERROR) + frames.data(1, end=True))
                got = hashlib.sha256()
                while True:
                    piece = peer.wait_for(Kind.DATA, stream=1)
                    got.update(piece.data)
                    if piece.end_stream:
                        break
                    with contextlib.suppress(Ended):  # all may have been sent, and be read here only now
                        peer.send(frames.window_update(1, 1))
                assert got.hexdigest() == pattern_sha(size)
                with contextlib.suppress(Ended):
                    for _ in range(20):
                        peer.send(frames.window_update(0, 1))
                assert peer.wait_end() in ("close_notify", "eof")

    async with against(script, receive_buffer=16_384) as port:
        for _ in range(6):
            connecting = connected(port, timeouts=UNHURRIED)
            async with connecting as client, await client.open_tunnel(TARGET) as tunnel:
                for piece in pattern(size):
                    await tunnel.send_all(piece)
                await tunnel.send_eof()
                assert await tunnel.receive_some() == b""


@pytest.mark.parametrize("how", ["refused_stream", "goaway_below"])
@pytest.mark.wire("W-POOL-6", "W-GOAWAY-2")
async def test_fault_17_what_the_peer_did_not_process_is_asked_again_elsewhere(how):
    def script(listener):
        with listener.accept() as first:
            first.open()
            first.wait_for(Kind.HEADERS, stream=1)
            if how == "refused_stream":
                first.send(frames.rst(1, Code.REFUSED_STREAM))
            else:
                first.send(frames.goaway(0, Code.NO_ERROR))
            with listener.accept() as second:
                second.open()
                second.wait_for(Kind.HEADERS, stream=1)
                second.send(frames.response(1) + frames.data(1, b"here", end=True))
                second.wait_for(Kind.DATA, stream=1)
                with contextlib.suppress(Ended):
                    second.wait_end()

    async with against(script) as port, ConnectionPool(svid_of_client()) as pool:
        async with await pool.open_tunnel(TARGET, via=f"127.0.0.1:{port}", expect=SERVER) as tunnel:
            assert await tunnel.receive_some() == b"here"
            await tunnel.send_all(b"thanks")
            await tunnel.send_eof()


async def test_fault_17_without_a_pool_it_says_that_asking_again_is_safe():
    def script(listener):
        with listener.accept() as peer:
            peer.open()
            peer.wait_for(Kind.HEADERS, stream=1)
            peer.send(frames.rst(1, Code.REFUSED_STREAM))
            with contextlib.suppress(Ended):
                peer.wait_end()

    async with against(script) as port, connected(port) as client:
        with pytest.raises(StreamRefused):
            await client.open_tunnel(TARGET)


@pytest.mark.wire("W-POOL-2")
async def test_fault_17_a_server_of_ten_streams_serves_forty_tunnels():
    sessions = []

    def one(peer):
        """A session that allows ten streams, and refuses what comes beyond."""
        with peer, contextlib.suppress(Ended, TimeoutError):
            peer.open({Setting.MAX_CONCURRENT_STREAMS: 10})
            count = 0
            while True:
                got = peer.wait_for(Kind.HEADERS, timeout=PATIENCE)
                count += 1
                if count > 10:
                    peer.send(frames.rst(got.stream, Code.REFUSED_STREAM))
                    sessions.append("overrun")
                    continue
                peer.send(frames.response(got.stream) + frames.data(got.stream, b"hello"))

    def script(listener):
        threads = []
        for _ in range(4):
            peer = listener.accept()
            sessions.append(peer)
            threads.append(threading.Thread(target=one, args=(peer,), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join(PATIENCE)

    async with against(script) as port, ConnectionPool(svid_of_client()) as pool:
        hellos = []

        async def open_one():
            tunnel = await pool.open_tunnel(TARGET, via=f"127.0.0.1:{port}", expect=SERVER)
            hellos.append((await tunnel.receive_some(), tunnel))

        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(open_one)
        assert [hello for hello, _ in hellos] == [b"hello"] * 40
        for _, tunnel in hellos:
            tunnel.abort()
        assert len(sessions) == 4


@pytest.mark.wire("W-SET-3")
async def test_fault_17_no_request_leaves_before_the_peers_settings():
    def script(listener):
        with listener.accept(quiet=True) as peer:  # an acknowledgement must not come before our own SETTINGS
            peer.wait_for(Kind.SETTINGS)
            with pytest.raises(TimeoutError):
                peer.wait_for(Kind.HEADERS, timeout=0.3)
            peer.send(frames.settings({Setting.MAX_CONCURRENT_STREAMS: 1}) + frames.settings(ack=True))
            peer.wait_for(Kind.HEADERS, stream=1)
            peer.send(frames.response(1, end_stream=True))
            peer.wait_for(stream=1, where=is_end)

    async with against(script) as port, connected(port) as client, await client.open_tunnel(TARGET) as tunnel:
        assert await tunnel.receive_some() == b""
        await tunnel.send_eof()


BAD_ANSWERS = {
    "no_status": frames.headers(1, [("server", "x")]),
    "status_twice": frames.headers(1, [(":status", "200"), (":status", "200")]),
    "status_no_number": frames.headers(1, [(":status", "ok")]),
    "status_101": frames.response(1, 101),
    "late_status": frames.headers(1, [("server", "x"), (":status", "200")]),
    "request_pseudo_header": frames.headers(1, [(":status", "200"), (":path", "/")]),
    "upper_case_name": frames.response(1, 200, ("Server", "x")),
    "connection_header": frames.response(1, 200, ("connection", "close")),
    "data_first": frames.data(1, b"x"),
    "informational_that_ends": frames.response(1, 103, end_stream=True),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
@pytest.mark.wire("W-RSP-6", "W-RSP-7", "W-RSP-13", "W-ERR-1")
async def test_fault_18_a_malformed_answer_opens_no_tunnel_and_costs_its_stream(name):
    def script(listener):
        with listener.accept() as peer:
            peer.open()
            peer.wait_for(Kind.HEADERS, stream=1)
            peer.send(BAD_ANSWERS[name])
            assert peer.wait_for(Kind.RST_STREAM, stream=1).code == Code.PROTOCOL_ERROR
            peer.wait_for(Kind.HEADERS, stream=3)
            peer.send(frames.response(3, 200, end_stream=True))
            peer.wait_for(stream=3, where=is_end)

    async with against(script) as port, connected(port) as client:
        with pytest.raises(ConnectFailed):
            await client.open_tunnel(TARGET)
        async with await client.open_tunnel(TARGET) as tunnel:
            await tunnel.send_eof()
            assert await tunnel.receive_some() == b""


@pytest.mark.parametrize("length", ["0", "5", "1000000"])
@pytest.mark.wire("W-RSP-6", "W-RSP-9")
async def test_fault_18_a_content_length_on_the_200_is_ignored(length):
    def script(listener):
        with listener.accept() as peer:
            peer.open()
            peer.wait_for(Kind.HEADERS, stream=1)
            peer.send(frames.response(1, 103) + frames.response(1, 200, ("content-length", length)))
            peer.send(frames.data(1, b"a tunnel has no length", end=True))
            peer.wait_for(stream=1, where=is_end)

    async with against(script) as port, connected(port) as client, await client.open_tunnel(TARGET) as tunnel:
        assert (await drain(tunnel)) == (b"a tunnel has no length", "eof")
        await tunnel.send_eof()


@pytest.mark.wire("W-SET-5")
async def test_fault_18_a_server_must_not_announce_push():
    def script(listener):
        with listener.accept() as peer:
            peer.send(frames.settings({Setting.ENABLE_PUSH: 1}))
            assert peer.wait_for(Kind.GOAWAY).code == Code.PROTOCOL_ERROR

    async with against(script) as port:
        with pytest.raises(ConnectFailed, match="ENABLE_PUSH"):
            async with connected(port):
                pytest.fail("connected")


@pytest.mark.wire("W-RSP-10")
async def test_fault_19_a_200_that_ends_its_half_leaves_the_other_open():
    def script(listener):
        with listener.accept() as peer:
            peer.open()
            peer.wait_for(Kind.HEADERS, stream=1)
            peer.send(frames.response(1, end_stream=True))
            assert sha(peer.take_data(1)) == pattern_sha(MIB)

    async with against(script) as port, connected(port) as client, await client.open_tunnel(TARGET) as tunnel:
        assert await tunnel.receive_some() == b""
        for piece in pattern(MIB):
            await tunnel.send_all(piece)
        await tunnel.send_eof()


@pytest.mark.wire("W-FLOW-8", "W-FLOW-5")
async def test_fault_20_tunnels_take_fair_turns_for_the_sessions_window():
    step = 16_384
    both_wait = threading.Event()

    def script(listener):
        with listener.accept() as peer:
            peer.give_credit = False
            peer.open({Setting.INITIAL_WINDOW_SIZE: 2**30}, connection_window=65_535)
            for stream in (1, 3):
                peer.wait_for(Kind.HEADERS, stream=stream)
                peer.send(frames.response(stream))
            assert both_wait.wait(60)
            spent = 0
            while spent < 65_535:  # by the greedy one alone
                spent += len(peer.wait_for(Kind.DATA, stream=1).data)
            share = {1: 0, 3: 0}
            for _ in range(16):
                peer.send(frames.window_update(0, step))
                left = step
                while left:
                    got = peer.wait_for(Kind.DATA)
                    share[got.stream] += len(got.data)
                    left -= len(got.data)
            assert share[3] >= 4 * step, share

    async with against(script) as port, connected(port) as client:
        greedy = await client.open_tunnel(TARGET)
        modest = await client.open_tunnel(TARGET)
        async with trio.open_nursery() as nursery:

            async def upload(tunnel):
                with contextlib.suppress(trio.BrokenResourceError):
                    while True:
                        await tunnel.send_all(bytes(MIB))

            nursery.start_soon(upload, greedy)
            while greedy.statistics().bytes_sent < 65_535:
                await trio.sleep(0.01)
            nursery.start_soon(upload, modest)
            await trio.sleep(0.05)
            both_wait.set()


@pytest.mark.wire("W-FLOW-1", "W-FLOW-2", "W-LIM-8")
async def test_fault_21_eight_unread_downloads_block_nobody():
    window = 256 * 1024

    def script(listener):
        with listener.accept() as peer:
            peer.open()
            for stream in range(1, 17, 2):
                peer.wait_for(Kind.HEADERS, stream=stream)
                peer.send(frames.response(stream))
                assert peer.upload(stream, [bytes(window)], end=False) == window
            peer.wait_for(Kind.HEADERS, stream=17)
            peer.send(frames.response(17))
            peer.upload(17, pattern(4 * MIB))
            peer.wait_for(stream=17, where=is_end)

    limits = Limits(stream_window=window, connection_window=4 * window)
    async with against(script) as port, connected(port, limits=limits) as client:
        unread = [await client.open_tunnel(TARGET) for _ in range(8)]
        async with await client.open_tunnel(TARGET) as tunnel:
            got, end = await drain(tunnel)
            assert (sha(got), end) == (pattern_sha(4 * MIB), "eof")
            await tunnel.send_eof()
        assert [tunnel.statistics().receive_buffered for tunnel in unread] == [window] * 8


@pytest.mark.wire("W-RSP-12")
async def test_fault_22_an_unanswered_connect_ends():
    def script(listener):
        with listener.accept() as peer:
            peer.open()
            peer.wait_for(Kind.HEADERS, stream=1)
            assert peer.wait_for(Kind.RST_STREAM, stream=1).code == Code.CANCEL
            peer.wait_for(Kind.HEADERS, stream=3)
            peer.send(frames.response(3, end_stream=True))
            peer.wait_for(stream=3, where=is_end)

    async with against(script) as port, connected(port, timeouts=Timeouts(request=0.3)) as client:
        with pytest.raises(Exception, match="answer"):
            await client.open_tunnel(TARGET)
        client._session.timeouts = Timeouts()  # this one is answered, but perhaps not so soon
        async with await client.open_tunnel(TARGET) as tunnel:
            await tunnel.send_eof()


@pytest.mark.parametrize("stage", ["handshake", "settings"])
@pytest.mark.wire("W-TLS-9", "W-SET-8")
async def test_fault_22_an_opening_that_stalls_ends(stage):
    def script(listener):
        with listener.accept(handshake=stage != "handshake", quiet=True) as peer:
            with contextlib.suppress(ssl.SSLError):
                peer.wait_end()

    async with against(script) as port:
        handshake = 0.3 if stage == "handshake" else 60
        with pytest.raises(Exception, match=r"0\.3 s|in time|timed out|within"):
            async with connected(port, timeouts=Timeouts(handshake=handshake, settings=0.3, close=0.3)):
                pytest.fail("connected")


@pytest.mark.wire("W-PING-3", "W-RST-4")
async def test_fault_22_a_peer_that_answers_no_ping_is_given_up():
    def script(listener):
        with listener.accept() as peer:
            peer.open()
            peer.wait_for(Kind.HEADERS, stream=1)
            peer.ack_pings = False
            peer.send(frames.response(1))
            peer.wait_for(Kind.PING)
            peer.wait_end()

    async with against(script) as port:
        async with connected(port, timeouts=Timeouts(ping_interval=0.2, ping_timeout=3, close=0.3)) as client:
            tunnel = await client.open_tunnel(TARGET)
            _, end = await drain(tunnel)
            assert isinstance(end, trio.BrokenResourceError)
            assert "PING" in str(end.__cause__)


@pytest.mark.wire("W-POOL-3")
async def test_fault_23_a_session_that_was_full_is_used_again():
    def script(listener):
        with listener.accept() as peer:
            peer.open({Setting.MAX_CONCURRENT_STREAMS: 2})
            for stream in (1, 3, 5, 7):
                peer.wait_for(Kind.HEADERS, stream=stream)
                peer.send(frames.response(stream, end_stream=True))
                peer.wait_for(stream=stream, where=is_end) if stream in (3, 7) else None
            with contextlib.suppress(Ended):
                peer.wait_end()
            assert not listener.has_more()

    async with against(script) as port, ConnectionPool(svid_of_client()) as pool:
        for _ in range(2):
            tunnels = [await pool.open_tunnel(TARGET, via=f"127.0.0.1:{port}", expect=SERVER) for _ in range(2)]
            for tunnel in tunnels:
                await tunnel.send_eof()
                assert await tunnel.receive_some() == b""
                await tunnel.aclose()


@pytest.mark.wire("W-SET-4")
async def test_fault_23_the_limit_is_the_one_of_now():
    def script(listener):
        with listener.accept() as first:
            first.open({Setting.MAX_CONCURRENT_STREAMS: 100})
            first.wait_for(Kind.HEADERS, stream=1)
            # lowered below what is open, before the answer: the next tunnel must go elsewhere
            first.send(frames.settings({Setting.MAX_CONCURRENT_STREAMS: 1}) + frames.response(1))
            with listener.accept() as second:
                second.open()
                second.wait_for(Kind.HEADERS, stream=1)
                second.send(frames.response(1))
                # raised again: the first session has room
                first.send(frames.settings({Setting.MAX_CONCURRENT_STREAMS: 100}))
                first.fence()
                second.send(frames.settings({Setting.MAX_CONCURRENT_STREAMS: 0}))
                second.fence()
                second.send(frames.data(1, b"now"))
                first.wait_for(Kind.HEADERS, stream=3)
                first.send(frames.response(3))
                with contextlib.suppress(Ended):
                    second.wait_end()

    async with against(script) as port, ConnectionPool(svid_of_client()) as pool:
        via = f"127.0.0.1:{port}"
        first = await pool.open_tunnel(TARGET, via=via, expect=SERVER)
        second = await pool.open_tunnel(TARGET, via=via, expect=SERVER)
        assert await second.receive_some() == b"now"
        third = await pool.open_tunnel(TARGET, via=via, expect=SERVER)
        for tunnel in (first, second, third):
            tunnel.abort()
