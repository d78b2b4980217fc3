"""A malformed CONNECT costs its own stream, with the right answer, while DATA on another stream goes on."""

from __future__ import annotations

import pytest
from support import frames
from support.engines import only, opened, refusals
from support.frames import Code, Kind

from hbone.protocol import DataReceived, InvalidRequest, RequestReceived, StreamEnded

METHOD = (":method", "CONNECT")
AUTHORITY = (":authority", "10.0.0.7:8080")
RESET = None
"""No status: RST_STREAM(PROTOCOL_ERROR), RFC 9113 section 8.1.1."""

MALFORMED = {
    # :authority
    "no_authority": ([METHOD], RESET),
    "host_only": ([METHOD, ("host", "10.0.0.7:8080")], RESET),
    "authority_empty": ([METHOD, (":authority", "")], 400),
    "authority_twice": ([METHOD, AUTHORITY, AUTHORITY], RESET),
    "authority_twice_and_different": ([METHOD, AUTHORITY, (":authority", "10.0.0.8:80")], RESET),
    "authority_spaced_inside": ([METHOD, (":authority", "10.0.0.7 :8080")], 400),
    "authority_spaced_before": ([METHOD, (":authority", " 10.0.0.7:8080")], RESET),
    "authority_spaced_behind": ([METHOD, (":authority", "10.0.0.7:8080 ")], RESET),
    "authority_with_line_feed": ([METHOD, (":authority", "10.0.0.7:8080\nx")], RESET),
    "authority_with_nul": ([METHOD, (":authority", "10.0.0.7\0:8080")], RESET),
    "authority_without_port": ([METHOD, (":authority", "10.0.0.7")], 400),
    "authority_with_port_0": ([METHOD, (":authority", "10.0.0.7:0")], 400),
    "authority_with_port_65536": ([METHOD, (":authority", "10.0.0.7:65536")], 400),
    "authority_with_user": ([METHOD, (":authority", "root@10.0.0.7:80")], 400),
    "authority_with_leading_zero": ([METHOD, (":authority", "10.0.0.07:80")], 400),
    "authority_not_ascii": ([METHOD, (":authority", b"\xc3\xa9:80")], 400),
    "authority_without_brackets": ([METHOD, (":authority", "fd00::1:80")], 400),
    "host_differs": ([METHOD, AUTHORITY, ("host", "10.0.0.8:8080")], RESET),
    "host_twice": ([METHOD, AUTHORITY, ("host", "10.0.0.7:8080"), ("host", "10.0.0.7:8080")], RESET),
    # other pseudo-headers
    "scheme": ([METHOD, AUTHORITY, (":scheme", "https")], RESET),
    "path": ([METHOD, AUTHORITY, (":path", "/")], RESET),
    "scheme_and_path": ([METHOD, (":scheme", "https"), AUTHORITY, (":path", "/")], RESET),
    "extended_connect": (
        [METHOD, (":protocol", "websocket"), (":scheme", "https"), AUTHORITY, (":path", "/")],
        RESET,
    ),
    "protocol_alone": ([METHOD, AUTHORITY, (":protocol", "connect-udp")], RESET),
    "protocol_with_get": ([(":method", "GET"), (":protocol", "x"), (":scheme", "https"), (":path", "/")], RESET),
    "unknown_pseudo_header": ([METHOD, AUTHORITY, (":tunnel", "x")], RESET),
    "status_in_a_request": ([METHOD, AUTHORITY, (":status", "200")], RESET),
    "no_method": ([AUTHORITY], RESET),
    "method_twice": ([METHOD, METHOD, AUTHORITY], RESET),
    "late_pseudo_header": ([METHOD, ("baggage", "a=b"), AUTHORITY], RESET),
    "late_pseudo_header_behind_any_field": ([METHOD, ("x-any", "b"), AUTHORITY], RESET),
    "nothing": ([], RESET),
    # another method
    "get": ([(":method", "GET"), (":scheme", "https"), (":path", "/"), AUTHORITY], 400),
    "get_without_path": ([(":method", "GET"), (":scheme", "https"), AUTHORITY], RESET),
    "lower_case_connect": ([(":method", "connect"), AUTHORITY], RESET),
    # names and values
    "upper_case_name": ([METHOD, AUTHORITY, ("Baggage", "a=b")], RESET),
    "upper_case_pseudo_header": ([(":Method", "CONNECT"), AUTHORITY], RESET),
    "empty_name": ([METHOD, AUTHORITY, ("", "x")], RESET),
    "space_in_name": ([METHOD, AUTHORITY, ("a b", "x")], RESET),
    "carriage_return_in_value": ([METHOD, AUTHORITY, ("baggage", "a\rb")], RESET),
    "line_feed_in_value": ([METHOD, AUTHORITY, ("baggage", "a\nb")], RESET),
    "nul_in_value": ([METHOD, AUTHORITY, ("baggage", "a\0b")], RESET),
    "space_before_value": ([METHOD, AUTHORITY, ("baggage", " a=b")], RESET),
    "tab_behind_value": ([METHOD, AUTHORITY, ("baggage", "a=b\t")], RESET),
    # fields of the connection
    "connection": ([METHOD, AUTHORITY, ("connection", "keep-alive")], RESET),
    "transfer_encoding": ([METHOD, AUTHORITY, ("transfer-encoding", "chunked")], RESET),
    "upgrade": ([METHOD, AUTHORITY, ("upgrade", "h2c")], RESET),
    "te": ([METHOD, AUTHORITY, ("te", "gzip")], RESET),
    # content-length
    "content_length_is_no_number": ([METHOD, AUTHORITY, ("content-length", "many")], RESET),
    "content_length_is_negative": ([METHOD, AUTHORITY, ("content-length", "-1")], RESET),
    "content_lengths_differ": ([METHOD, AUTHORITY, ("content-length", "1"), ("content-length", "2")], RESET),
}

HARMLESS = {
    "content_length": [METHOD, AUTHORITY, ("content-length", "5")],
    "content_length_twice": [METHOD, AUTHORITY, ("content-length", "0"), ("content-length", "0")],
    "host_that_agrees": [METHOD, AUTHORITY, ("host", "10.0.0.7:8080")],
    "te_trailers": [METHOD, AUTHORITY, ("te", "trailers")],
    "other_fields": [METHOD, AUTHORITY, ("user-agent", "Go-http-client/2.0"), ("x-y", "")],
    "pseudo_headers_in_the_other_order": [AUTHORITY, METHOD],
}


def serving():
    """A server with an open tunnel, stream 1."""
    server = opened(client=False)
    server.receive(frames.connect(1, "10.0.0.7:8080"))
    server.accept(1)
    server.sent()
    return server


@pytest.mark.wire("W-REQ-3", "W-REQ-4", "W-REQ-5", "W-REQ-6", "W-REQ-7", "W-REQ-8", "W-REQ-9", "W-ERR-1", "W-RSP-5")
@pytest.mark.parametrize("ends", [False, True], ids=["open", "ended"])
@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_connect_costs_its_own_stream(name, ends):
    fields, status = MALFORMED[name]
    server = serving()
    told = server.receive(
        frames.data(1, b"before")
        + frames.headers(3, fields, end_stream=ends)
        + (b"" if ends else frames.data(3, b"body", end=True))
        + frames.data(1, b"behind")
    )
    assert refusals(told) == [(3, status)]
    assert only(told, InvalidRequest).why
    assert [type(e) for e in told] == [DataReceived, InvalidRequest, DataReceived]
    said = [(f.kind, f.stream, f.status if f.kind == Kind.HEADERS else f.code) for f in server.sent()]
    if status is None:
        assert said == [(Kind.RST_STREAM, 3, Code.PROTOCOL_ERROR)]
    elif ends:
        assert said == [(Kind.HEADERS, 3, status)]
    else:
        assert said == [(Kind.HEADERS, 3, status), (Kind.RST_STREAM, 3, Code.NO_ERROR)]
    assert list(server.engine.streams) == [1]
    # and the session is as good as before
    assert server.send(1, b"answer") == 6
    assert only(server.receive(frames.connect(5, "10.0.0.8:80")), RequestReceived).stream_id == 5
    assert server.receive(frames.data(1, b"tail", end=True)) == [DataReceived(1, b"tail"), StreamEnded(1)]


@pytest.mark.wire("W-REQ-8", "W-REQ-9", "W-REQ-10")
@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_looks_odd_opens_a_tunnel(name):
    server = serving()
    assert only(server.receive(frames.headers(3, HARMLESS[name])), RequestReceived).request.authority == "10.0.0.7:8080"
    server.accept(3)
    assert server.receive(frames.data(3, b"more than five")) == [DataReceived(3, b"more than five")]
    assert server.receive(frames.data(3, end=True)) == [StreamEnded(3)]


@pytest.mark.wire("W-REQ-5", "W-RST-8")
def test_many_malformed_requests_between_the_pieces_of_one_transfer():
    server = serving()
    got = b""
    for i, (fields, _) in enumerate(MALFORMED.values()):
        raw = frames.data(1, b"%03d" % i) + frames.headers(2 * i + 3, fields) + frames.data(2 * i + 3, b"early")
        got += b"".join(e.data for e in server.receive(raw) if isinstance(e, DataReceived))
    assert got == b"".join(b"%03d" % i for i in range(len(MALFORMED)))
    assert list(server.engine.streams) == [1]
    assert not server.engine.closed


def test_a_malformed_request_may_come_in_pieces():
    server = serving()
    block = frames.block(MALFORMED["upper_case_name"][0])
    raw = frames.headers(3, block[:5], end_headers=False, pad=7, priority=bytes(5))
    raw += frames.continuation(3, b"") + frames.continuation(3, block[5:], end_headers=True)
    assert refusals(server.receive(raw)) == [(3, RESET)]
    good = frames.block(frames.connect_headers("10.0.0.8:80"))
    raw = frames.headers(5, good[:5], end_headers=False, pad=0, priority=bytes(5))
    raw += frames.continuation(5, good[5:], end_headers=True)
    assert only(server.receive(raw), RequestReceived).request.authority == "10.0.0.8:80"
