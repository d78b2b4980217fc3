"""A malformed CONNECT costs its own stream, and nothing else: not its session, not a transfer beside it."""

from __future__ import annotations

import pytest
from support import frames
from support.backends import Backend, echo, pattern, pattern_sha
from support.frames import Code, Kind
from support.ours import forwarding, run

MIB = 1 << 20

METHOD = (":method", "CONNECT")
AUTHORITY = (":authority", "127.0.0.1:1")

RESET = Code.PROTOCOL_ERROR
"""RFC 9113 section 8.1.1: a malformed request is a stream error of this type."""

MALFORMED = {
    "no_authority": ([METHOD], RESET),
    "host_instead_of_authority": ([METHOD, ("host", "127.0.0.1:1")], RESET),
    "host_other_than_authority": ([METHOD, AUTHORITY, ("host", "127.0.0.2:1")], RESET),
    "authority_twice": ([METHOD, AUTHORITY, AUTHORITY], RESET),
    "authority_twice_different": ([METHOD, AUTHORITY, (":authority", "127.0.0.2:1")], RESET),
    "authority_empty": ([METHOD, (":authority", "")], 400),
    "authority_with_space": ([METHOD, (":authority", "127.0.0.1 :1")], 400),
    "authority_with_space_around": ([METHOD, (":authority", " 127.0.0.1:1")], RESET),
    "authority_with_tab": ([METHOD, (":authority", "127.0.0.1\t:1")], 400),
    "authority_without_port": ([METHOD, (":authority", "127.0.0.1")], 400),
    "authority_with_empty_port": ([METHOD, (":authority", "127.0.0.1:")], 400),
    "authority_with_port_0": ([METHOD, (":authority", "127.0.0.1:0")], 400),
    "authority_with_port_65536": ([METHOD, (":authority", "127.0.0.1:65536")], 400),
    "authority_with_signed_port": ([METHOD, (":authority", "127.0.0.1:+80")], 400),
    "authority_with_userinfo": ([METHOD, (":authority", "root@127.0.0.1:1")], 400),
    "authority_with_path": ([METHOD, (":authority", "127.0.0.1:1/x")], 400),
    "authority_is_a_url": ([METHOD, (":authority", "https://127.0.0.1:1")], 400),
    "authority_without_host": ([METHOD, (":authority", ":80")], 400),
    "authority_ipv6_without_brackets": ([METHOD, (":authority", "fd00::1:80")], 400),
    "authority_ipv6_half_bracket": ([METHOD, (":authority", "[fd00::1:80")], 400),
    "authority_not_ascii": ([METHOD, (":authority", b"\xc3\xa9.example:80")], 400),
    "scheme_present": ([METHOD, AUTHORITY, (":scheme", "https")], RESET),
    "path_present": ([METHOD, AUTHORITY, (":path", "/")], RESET),
    "scheme_and_path_present": ([METHOD, (":scheme", "https"), AUTHORITY, (":path", "/")], RESET),
    "extended_connect": (
        [METHOD, (":protocol", "websocket"), (":scheme", "https"), AUTHORITY, (":path", "/")],
        RESET,
    ),
    "protocol_alone": ([METHOD, AUTHORITY, (":protocol", "connect-tcp")], RESET),
    "method_twice": ([METHOD, METHOD, AUTHORITY], RESET),
    "no_method": ([AUTHORITY], RESET),
    "nothing_at_all": ([], RESET),
    "status_in_a_request": ([METHOD, AUTHORITY, (":status", "200")], RESET),
    "unknown_pseudo_header": ([METHOD, AUTHORITY, (":tunnel", "x")], RESET),
    "late_pseudo_header": ([METHOD, ("baggage", "a=b"), AUTHORITY], RESET),
    "upper_case_name": ([METHOD, AUTHORITY, ("Baggage", "a=b")], RESET),
    "upper_case_pseudo_header": ([(":Method", "CONNECT"), AUTHORITY], RESET),
    "empty_name": ([METHOD, AUTHORITY, ("", "x")], RESET),
    "space_in_name": ([METHOD, AUTHORITY, ("a b", "x")], RESET),
    "colon_in_name": ([METHOD, AUTHORITY, ("a:b", "x")], RESET),
    "line_feed_in_value": ([METHOD, AUTHORITY, ("baggage", "a\nb")], RESET),
    "carriage_return_in_value": ([METHOD, AUTHORITY, ("baggage", "a\rb")], RESET),
    "nul_in_value": ([METHOD, AUTHORITY, ("baggage", "a\0b")], RESET),
    "line_feed_in_authority": ([METHOD, (":authority", "127.0.0.1:1\nx: y")], RESET),
    "connection": ([METHOD, AUTHORITY, ("connection", "close")], RESET),
    "proxy_connection": ([METHOD, AUTHORITY, ("proxy-connection", "keep-alive")], RESET),
    "keep_alive": ([METHOD, AUTHORITY, ("keep-alive", "1")], RESET),
    "transfer_encoding": ([METHOD, AUTHORITY, ("transfer-encoding", "chunked")], RESET),
    "upgrade": ([METHOD, AUTHORITY, ("upgrade", "h2c")], RESET),
    "te_gzip": ([METHOD, AUTHORITY, ("te", "gzip")], RESET),
    "content_length_no_number": ([METHOD, AUTHORITY, ("content-length", "z")], RESET),
    "content_length_contradicts": ([METHOD, AUTHORITY, ("content-length", "1"), ("content-length", "2")], RESET),
    "get": ([(":method", "GET"), (":scheme", "https"), AUTHORITY, (":path", "/")], 400),
    "get_without_path": ([(":method", "GET"), AUTHORITY], RESET),
    "header_list_too_large": ([METHOD, AUTHORITY, *[(f"x-{n}", "v" * 1000) for n in range(90)]], 431),
}


def verdict(peer, stream):
    """What became of a stream: a status, or the code of its reset."""
    got = peer.wait_for(stream=stream, where=lambda f: f.kind in (Kind.HEADERS, Kind.RST_STREAM))
    if got.kind == Kind.HEADERS:
        assert got.end_stream, "a refusal ends its stream"
        return got.status
    return Code(got.code)


def beside_a_transfer(peer, app, stream, attack):
    """Runs `attack` in the middle of an echo on stream 1 of the same session, and sees that nothing else is hurt."""
    peer.open()
    assert peer.tunnel(1, app.target) == 200
    pieces = list(pattern(MIB))
    peer.upload(1, pieces[:2], end=False)
    result = attack()
    peer.upload(1, pieces[2:])
    echoed = b"".join(bytes(f.data) for f in take_all(peer, 1))
    assert echoed == b"".join(pattern(MIB))
    assert peer.tunnel(stream + 2, app.target) == 200, "the session takes new tunnels"
    peer.send(frames.data(stream + 2, b"still here", end=True))
    assert peer.take_data(stream + 2) == b"still here"
    assert peer.goaway_code() is None
    return result


def take_all(peer, stream):
    while True:
        got = peer.wait_for(Kind.DATA, stream=stream)
        yield got
        if got.end_stream:
            return


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.wire("W-REQ-3", "W-REQ-4", "W-REQ-5", "W-REQ-6", "W-REQ-7", "W-REQ-8", "W-REQ-9", "W-ERR-1", "W-LIM-1")
async def test_a_malformed_connect_costs_its_own_stream(name):
    fields, expected = MALFORMED[name]

    def script():
        with near.dial() as peer:

            def attack():
                peer.send(frames.headers(3, fields))
                return verdict(peer, 3)

            assert beside_a_transfer(peer, app, 3, attack) == expected

    with Backend(echo) as app:
        async with forwarding() as near:
            await run(script)
        assert len(app.connections) == 2
        assert app.wait_connection(0).sha == pattern_sha(MIB)


async def test_all_of_them_on_one_session():
    def script():
        with near.dial() as peer:

            def attack():
                for index, (fields, expected) in enumerate(MALFORMED.values()):
                    stream = 3 + 2 * index
                    peer.send(frames.headers(stream, fields))
                    assert verdict(peer, stream) == expected

            beside_a_transfer(peer, app, 3 + 2 * len(MALFORMED), attack)

    with Backend(echo) as app:
        async with forwarding() as near:
            await run(script)
        assert len(app.connections) == 2


HARMLESS = {
    "host_equal_to_authority": lambda target: [("host", target)],
    "content_length": lambda _: [("content-length", "5")],
    "content_length_0": lambda _: [("content-length", "0")],
    "te_trailers": lambda _: [("te", "trailers")],
    "go_client": lambda _: [("user-agent", "Go-http-client/2.0"), ("accept-encoding", "gzip")],
    "baggage_of_bytes": lambda _: [("baggage", b"\xff\xfe")],
    "traceparent_of_nothing": lambda _: [("traceparent", "-" * 55)],
    "unknown_field": lambda _: [("x-anything", "at all")],
    "empty_value": lambda _: [("baggage", "")],
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.wire("W-REQ-8", "W-REQ-9", "W-REQ-10")
async def test_an_odd_but_harmless_header_opens_the_tunnel(name):
    def script():
        with near.dial() as peer:
            peer.open()
            peer.send(frames.connect(1, app.target, *HARMLESS[name](app.target)))
            assert peer.wait_for(Kind.HEADERS, stream=1).status == 200
            peer.send(frames.data(1, b"more than five bytes", end=True))
            assert peer.take_data(1) == b"more than five bytes"

    with Backend(echo) as app:
        async with forwarding() as near:
            await run(script)


@pytest.mark.wire("W-REQ-11", "W-FLOW-9", "W-RST-8")
async def test_data_sent_with_a_refused_connect_is_drained_and_credited():
    # A client may send before it has seen the answer; what it sent must not be lost from the session's window.
    def script():
        with near.dial() as peer:
            peer.open()
            for stream in range(1, 401, 2):
                peer.send(frames.headers(stream, [METHOD, (":authority", "nonsense")]))
                peer.upload(stream, [bytes(16_384)] * 8, end=False)
                assert verdict(peer, stream) == 400
            assert peer.tunnel(401, app.target) == 200
            peer.upload(401, pattern(MIB))
            assert len(peer.take_data(401)) == MIB

    with Backend(echo) as app:
        async with forwarding() as near:
            await run(script)
