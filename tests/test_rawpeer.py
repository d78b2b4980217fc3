"""The hand-made peer is right before it is used to judge others."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import h2.config
import h2.connection
import h2.events
import pytest
from support import frames
from support.certs import CLIENT, pki
from support.frames import Code, Frame, Kind, Parser, Setting
from support.rawpeer import WAIT, Ended, RawListener, RawPeer


def both(client_leaf=None, server_leaf=None):
    """A connected client and server peer, and the listener."""
    listener = RawListener(server_leaf or pki().server)
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(listener.accept)
        client = RawPeer.dial(listener.port, client_leaf or pki().client)
        return listener, client, accepted.result(WAIT)


def parallel(*jobs):
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(WAIT) for future in [pool.submit(job) for job in jobs]]


def test_a_frame_is_nine_bytes_and_its_payload():
    assert frames.data(5, b"abc", end=True) == bytes.fromhex("000003 00 01 00000005") + b"abc"
    assert frames.data(1, b"x", pad=2) == bytes.fromhex("000004 00 08 00000001") + b"\x02x\0\0"
    assert frames.frame(0, 0, 0x80000001, length=7) == bytes.fromhex("000007 00 00 80000001")


def test_our_frames_are_what_a_real_stack_reads():
    server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
    raw = frames.PREFACE + frames.settings({Setting.INITIAL_WINDOW_SIZE: 70000})
    raw += frames.connect(1, "10.0.0.1:80", ("baggage", "a=b")) + frames.data(1, b"hello", pad=255)
    raw += frames.priority(3) + frames.ping(b"12345678") + frames.window_update(1, 5) + frames.frame(0x77, 9, 0, b"??")
    raw += frames.rst(1, Code.CANCEL)
    events = server.receive_data(raw)
    assert [type(event).__name__ for event in events] == [
        "RemoteSettingsChanged",
        "RequestReceived",
        "DataReceived",
        "PriorityUpdated",
        "PingReceived",
        "WindowUpdated",
        "UnknownFrameReceived",
        "StreamReset",
    ]
    assert events[1].headers == [(":method", "CONNECT"), (":authority", "10.0.0.1:80"), ("baggage", "a=b")]
    assert (events[2].data, events[2].flow_controlled_length) == (b"hello", 5 + 256)


@pytest.mark.parametrize("cut", [1, 2, 9, 10, 1000])
def test_the_parser_reads_at_any_split_and_joins_continuations(cut):
    whole = frames.block(frames.connect_headers("10.0.0.1:80", ("X-Odd", b"\xff\r\n")))
    raw = frames.headers(1, whole[:7], end_headers=False)
    raw += frames.continuation(1, whole[7:20]) + frames.continuation(1, whole[20:], end_headers=True)
    raw += frames.data(1, b"abc", pad=3, end=True) + frames.goaway(5, 2, b"why")
    parser = Parser()
    got: list[Frame] = []
    for at in range(0, len(raw), cut):
        got += parser.feed(raw[at : at + cut])
    assert [frame.kind for frame in got] == [Kind.HEADERS, Kind.DATA, Kind.GOAWAY]
    assert got[0].headers == ((":method", "CONNECT"), (":authority", "10.0.0.1:80"), ("X-Odd", "\xff\r\n"))
    assert (got[1].data, got[1].end_stream) == (b"abc", True)
    assert (got[2].last_stream, got[2].code, got[2].payload[8:]) == (5, 2, b"why")
    assert "GOAWAY" in str(got[2])


def test_two_raw_peers_open_and_talk():
    listener, client, server = both()
    with listener, client, server:
        seen = parallel(client.open, lambda: server.open({Setting.MAX_CONCURRENT_STREAMS: 7}))
        assert seen == [{3: 7}, {4: 1 << 22}]

        def answer():
            request = server.wait_for(Kind.HEADERS, stream=1)
            server.send(frames.response(1) + frames.data(1, b"down", end=True))
            return request

        status, request = parallel(lambda: client.tunnel(1, "10.0.0.1:80"), answer)
        assert status == 200
        assert dict(request.headers)[":authority"] == "10.0.0.1:80"
        assert client.take_data(1) == b"down"
        parallel(client.fence, lambda: server.wait_for(Kind.PING))


def test_bulk_both_ways_at_once_does_not_lock_up():
    listener, client, server = both()
    chunk = frames.data(1, bytes(16384)) * 64
    with listener, client, server:
        totals = {"client": 0, "server": 0}
        for name, peer in (("client", client), ("server", server)):
            peer.keep_data = peer.give_credit = False
            peer.on_data = lambda got, name=name: totals.__setitem__(name, totals[name] + len(got.data))
        parallel(client.open, server.open)

        def work(peer):
            for _ in range(8):
                peer.send(chunk)
            peer.send(frames.data(1, end=True))
            peer.keep_data = True
            peer.fence()

        def until_ping(peer):
            work(peer)
            peer.wait_for(Kind.PING)

        parallel(lambda: until_ping(client), lambda: until_ping(server))
        assert totals == {"client": 8 << 20, "server": 8 << 20}


def test_an_upload_keeps_within_the_other_sides_windows():
    listener, client, server = both()
    with listener, client, server:
        parallel(client.open, lambda: server.open({Setting.INITIAL_WINDOW_SIZE: 50_000}, connection_window=90_000))
        size = 1 << 20
        sent, got = parallel(lambda: client.upload(1, [bytes(size)], pad=7), lambda: server.take_data(1))
        assert (sent, len(got)) == (size, size)
        server.give_credit = False
        filled, _ = parallel(lambda: (client.fill_window(3), client.fence(b"the end!")), lambda: until_end(server))
        assert filled[0] == 50_000
        assert client.stream_credit(3) == 0


def until_end(server):
    server.wait_for(Kind.PING, where=lambda got: got.payload == b"the end!")
    server.send(b"")


@pytest.mark.parametrize(
    ("end", "how"),
    [("reset", "reset"), ("fin", "eof"), ("close_notify", "close_notify")],
)
def test_each_way_of_ending_is_seen_as_itself(end, how):
    listener, client, server = both()
    with listener, client, server:
        parallel(client.open, server.open)
        getattr(server, end)()
        assert client.wait_end() == how
        with pytest.raises(Ended):
            client.wait_for(Kind.DATA)


def test_a_peer_that_does_not_read_is_noticed():
    listener, client, server = both()
    with listener, client, server:
        client.reading = False
        with pytest.raises(TimeoutError):
            client.send(bytes(64 << 20), timeout=0.2)


def test_certificates_of_a_foreign_root_are_refused():
    listener = RawListener(pki().server)
    with listener, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(listener.accept)
        with RawPeer.dial(listener.port, pki().foreign) as client:
            assert client.wait_end() in ("alert", "reset")
        with pytest.raises(Exception, match="CERTIFICATE_VERIFY_FAILED"):
            accepted.result(WAIT)


def test_leaves_are_made_once_and_say_who_they_are():
    assert pki() is pki()
    assert pki().client is pki().leaf(CLIENT)
    for name in ("expired", "ca_flagged", "no_uri", "two_uris", "wrong_key", "not_yet_valid", "cert_sign"):
        assert getattr(pki(), name).cert.read_bytes().startswith(b"-----BEGIN CERTIFICATE")
    assert threading.active_count() >= 1
