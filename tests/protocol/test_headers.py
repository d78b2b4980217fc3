"""The CONNECT header lists: exact bytes out, lenient values in, and RFC 9113's line between malformed and refused."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbone.address import Authority, Endpoint
from hbone.errors import InvalidAddress, LocalProtocolError, RemoteProtocolError
from hbone.protocol._headers import (
    Baggage,
    ConnectRequest,
    ConnectResponse,
    Forwarded,
    MalformedRequest,
    TraceParent,
    WorkloadType,
    connect_request_untrusted,
    connect_response_untrusted,
)

METHOD = (b":method", b"CONNECT")
AUTHORITY = (b":authority", b"10.0.0.7:8080")
STATUS = (b":status", b"200")

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
addresses = st.builds(Endpoint, st.ip_addresses(), st.integers(0, 65535))
hosts = st.from_regex(r"[a-z][a-z0-9]{0,20}(\.[a-z][a-z0-9]{0,20}){0,4}(:[0-9]{1,5})?", fullmatch=True)
names = st.from_regex(rb"[!#$%&'*+\-.^_`|~0-9a-z]{1,20}", fullmatch=True).filter(
    lambda name: (
        name
        not in {
            b"connection",
            b"proxy-connection",
            b"keep-alive",
            b"transfer-encoding",
            b"upgrade",
            b"te",
            b"host",
            b"content-length",
        }
    )
)
values = st.binary(max_size=40).filter(lambda v: v.strip(b" \t") == v and not set(v) & {0, 10, 13})
fields = st.lists(st.tuples(names, values), max_size=6)
authorities = st.one_of(
    st.builds(lambda ip, port: str(Authority(str(ip), port)), st.ip_addresses(), st.integers(1, 65535)),
    st.builds(
        lambda host, port: f"{host}:{port}",
        st.from_regex(r"[a-z][a-z0-9]{0,20}(\.[a-z][a-z0-9]{0,20}){0,4}", fullmatch=True),
        st.integers(1, 65535),
    ),
)


# --- request ---


@pytest.mark.wire("W-REQ-1", "W-REQ-2")
def test_a_request_is_method_authority_and_fields_in_order() -> None:
    request = ConnectRequest.build("10.0.0.7:8080", [("Baggage", "a=b"), (b"x-y", b"\xff")])
    assert request.encode() == [METHOD, AUTHORITY, (b"baggage", b"a=b"), (b"x-y", b"\xff")]


@pytest.mark.wire("W-REQ-3")
@pytest.mark.parametrize(
    ("given_text", "written"),
    [
        ("10.0.0.7:8080", "10.0.0.7:8080"),
        ("[ff06:0::c3]:80", "[ff06::c3]:80"),
        ("[::ffff:10.0.0.7]:80", "10.0.0.7:80"),
        ("cart.shop.svc.cluster.local:80", "cart.shop.svc.cluster.local:80"),
    ],
)
def test_the_authority_is_written_in_one_way(given_text: str, written: str) -> None:
    assert ConnectRequest.build(given_text).authority == written


def test_build_takes_an_authority_as_it_is() -> None:
    target = Authority("10.0.0.7", 8080)
    assert ConnectRequest.build(target).target is target


def test_a_request_made_by_hand_parses_its_target_when_asked() -> None:
    assert ConnectRequest("10.0.0.7:8080").target == Authority("10.0.0.7", 8080)
    with pytest.raises(InvalidAddress):
        _ = ConnectRequest("10.0.0.7").target


@pytest.mark.parametrize(
    "header",
    [
        ("te", "trailers"),
        ("Connection", "close"),
        ("host", "x"),
        ("content-length", "0"),
        (":path", "/"),
        ("a b", "c"),
        ("", "c"),
        ("a", "b\r\nc: d"),
        ("a", "b\0"),
        ("a", " b"),
        ("a", "b\t"),
        ("a", "\u017f"),
        ("\u017f", "a"),
    ],
)
def test_a_user_cannot_send_what_a_peer_would_call_malformed(header: tuple[str, str]) -> None:
    with pytest.raises(LocalProtocolError):
        ConnectRequest.build("10.0.0.7:80", [header])
    with pytest.raises(LocalProtocolError):
        ConnectResponse.build(200, [header])


def test_build_refuses_a_target_that_is_none() -> None:
    with pytest.raises(InvalidAddress):
        ConnectRequest.build("10.0.0.7")


@given(authorities, fields)
def test_requests_come_back_as_they_were(authority: str, headers: list[tuple[bytes, bytes]]) -> None:
    request = ConnectRequest.build(authority, headers)
    again = connect_request_untrusted(request.encode())
    assert again == request
    assert again.target == request.target


def check_reset(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(MalformedRequest) as caught:
        connect_request_untrusted(headers)
    assert caught.value.status is None
    assert caught.value.error_code == 1


def check_answered(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(MalformedRequest) as caught:
        connect_request_untrusted(headers)
    assert caught.value.status == 400


@pytest.mark.wire("W-REQ-5")
@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([], id="empty"),
        pytest.param([AUTHORITY], id="no method"),
        pytest.param([METHOD], id="no authority"),
        pytest.param([METHOD, (b"host", b"10.0.0.7:8080")], id="host only"),
        pytest.param([METHOD, AUTHORITY, AUTHORITY], id="authority twice"),
        pytest.param([METHOD, METHOD, AUTHORITY], id="method twice"),
        pytest.param([METHOD, AUTHORITY, (b":scheme", b"https")], id="scheme"),
        pytest.param([METHOD, AUTHORITY, (b":path", b"/")], id="path"),
        pytest.param([METHOD, AUTHORITY, (b":scheme", b"https"), (b":path", b"/")], id="scheme and path"),
        pytest.param(
            [METHOD, (b":protocol", b"websocket"), (b":scheme", b"https"), (b":path", b"/"), AUTHORITY],
            id="extended connect",
        ),
        pytest.param([METHOD, AUTHORITY, (b":status", b"200")], id="response pseudo-header"),
        pytest.param([METHOD, AUTHORITY, (b":x", b"1")], id="unknown pseudo-header"),
        pytest.param([METHOD, AUTHORITY, (b":", b"1")], id="only a colon"),
        pytest.param([METHOD, (b"baggage", b""), AUTHORITY], id="late pseudo-header"),
        pytest.param([(b":METHOD", b"CONNECT"), AUTHORITY], id="upper-case pseudo-header"),
        pytest.param([(b":method", b"GET"), (b":scheme", b"https"), AUTHORITY], id="GET without path"),
        pytest.param([(b":method", b"connect"), AUTHORITY], id="lower-case method without path"),
        pytest.param(
            [(b":method", b"GET"), (b":protocol", b"x"), (b":scheme", b"https"), (b":path", b"/")], id="GET protocol"
        ),
    ],
)
def test_malformed_pseudo_headers_are_reset(headers: list[tuple[bytes, bytes]]) -> None:
    check_reset(headers)


@pytest.mark.wire("W-REQ-6")
@pytest.mark.parametrize("byte", [*range(0x21), *b'ABZ"(),/:;<=>?@[\\]{}', *range(0x7F, 0x100)])
def test_names_with_other_bytes_than_a_token_are_reset(byte: int) -> None:
    check_reset([METHOD, AUTHORITY, (b"a" + bytes([byte]), b"1")])


@pytest.mark.wire("W-REQ-6")
@pytest.mark.parametrize("value", [b"a\0", b"\0a", b"a\rb", b"a\nb", b"a\r\nb: c", b" a", b"a ", b"\ta", b"a\t", b" "])
@pytest.mark.parametrize("name", [b"baggage", b"x-other"])
def test_values_with_forbidden_bytes_or_edges_are_reset(name: bytes, value: bytes) -> None:
    check_reset([METHOD, AUTHORITY, (name, value)])


@pytest.mark.wire("W-REQ-6")
@pytest.mark.parametrize("value", [b"10.0.0.7:8080\0", b"10.0.0.7:8080\r\n", b" 10.0.0.7:8080", b"10.0.0.7:8080 "])
def test_the_authority_obeys_the_same_rule_for_values(value: bytes) -> None:
    check_reset([METHOD, (b":authority", value)])


@pytest.mark.wire("W-REQ-6")
def test_an_empty_name_is_reset() -> None:
    check_reset([METHOD, AUTHORITY, (b"", b"1")])


@pytest.mark.wire("W-REQ-7")
@pytest.mark.parametrize(
    "header",
    [
        (b"connection", b"close"),
        (b"proxy-connection", b"keep-alive"),
        (b"keep-alive", b"5"),
        (b"transfer-encoding", b"chunked"),
        (b"upgrade", b"h2c"),
        (b"te", b"gzip"),
        (b"te", b"trailers, gzip"),
    ],
)
def test_fields_of_the_connection_are_reset(header: tuple[bytes, bytes]) -> None:
    check_reset([METHOD, AUTHORITY, header])


@pytest.mark.wire("W-REQ-8")
@pytest.mark.parametrize("lengths", [[b"x"], [b""], [b"-1"], [b"+1"], [b"1, 1"], [b"1", b"2"], [b"0x10"]])
def test_a_content_length_that_is_none_is_reset(lengths: list[bytes]) -> None:
    check_reset([METHOD, AUTHORITY, *((b"content-length", length) for length in lengths)])


@pytest.mark.wire("W-REQ-9")
@pytest.mark.parametrize("hosts_given", [[b"other:8080"], [b"10.0.0.7:8080"] * 2])
def test_a_host_that_contradicts_is_reset(hosts_given: list[bytes]) -> None:
    check_reset([METHOD, AUTHORITY, *((b"host", host) for host in hosts_given)])


@pytest.mark.wire("W-REQ-8", "W-REQ-9", "W-REQ-10")
@pytest.mark.parametrize(
    "header",
    [
        (b"content-length", b"0"),
        (b"content-length", b"12"),
        (b"te", b"trailers"),
        (b"host", b"10.0.0.7:8080"),
        (b"user-agent", b"Go-http-client/2.0"),
        (b"accept-encoding", b"gzip"),
        (b"x-anything", b"caf\xc3\xa9"),
        (b"x-empty", b""),
        (b"x-control", b"a\x01b"),
    ],
)
def test_harmless_fields_are_kept_and_mean_nothing(header: tuple[bytes, bytes]) -> None:
    request = connect_request_untrusted([METHOD, AUTHORITY, header])
    assert request.target == Authority("10.0.0.7", 8080)
    assert request.headers == (header,)


@pytest.mark.wire("W-REQ-8")
def test_the_same_content_length_twice_is_harmless() -> None:
    connect_request_untrusted([METHOD, AUTHORITY, (b"content-length", b"5"), (b"content-length", b"5")])


@pytest.mark.wire("W-REQ-4", "W-RSP-3")
@pytest.mark.parametrize("method", [b"GET", b"POST", b"connect", b""])
def test_another_method_is_answered_400(method: bytes) -> None:
    check_answered([(b":method", method), (b":scheme", b"https"), (b":path", b"/"), AUTHORITY])


@pytest.mark.wire("W-REQ-3", "W-RSP-3")
@pytest.mark.parametrize(
    "authority",
    [
        b"",
        b"10.0.0.7",
        b"10.0.0.7:",
        b"10.0.0.7:0",
        b"10.0.0.7:65536",
        b"10.0.0.7:+80",
        b"10.0.0.7: 80",
        b"10.0.0.7 :80",
        b":80",
        b"cart",
        b"ca rt:80",
        b"user@cart:80",
        b"cart/x:80",
        b"::1:80",
        b"[::1]",
        b"[::1:80",
        b"[fe80::1%eth0]:80",
        b"127.1:80",
        b"caf\xc3\xa9:80",
        b"a" * 300 + b":80",
        b"10.0.0.7:80:80",
    ],
)
def test_an_authority_that_is_none_is_answered_400(authority: bytes) -> None:
    check_answered([METHOD, (b":authority", authority)])


@pytest.mark.wire("W-REQ-5")
def test_malformed_comes_before_refused() -> None:
    check_reset([METHOD, (b":authority", b"no port"), (b"Upper", b"1")])
    check_reset([(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/"), (b"te", b"gzip")])


@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.sampled_from(
                    [b":method", b":authority", b":path", b":scheme", b":status", b"te", b"host", b"content-length"]
                ),
                names,
                st.binary(max_size=12),
            ),
            st.one_of(st.sampled_from([b"CONNECT", b"10.0.0.7:8080", b"200"]), st.binary(max_size=30)),
        ),
        max_size=7,
    )
)
def test_header_lists_cause_only_remote_protocol_errors(headers: list[tuple[bytes, bytes]]) -> None:
    try:
        request = connect_request_untrusted(headers)
    except RemoteProtocolError:
        pass
    else:
        assert request.encode()[0] == METHOD
        _ = request.baggage, request.forwarded, request.traceparent, request.forwarded_network, request.target
    try:
        response = connect_response_untrusted(headers)
    except RemoteProtocolError:
        pass
    else:
        _ = response.baggage, response.success, response.informational


# --- response ---


@pytest.mark.wire("W-RSP-2")
def test_a_response_is_status_and_fields() -> None:
    response = ConnectResponse.build(200, [("baggage", "a=b")])
    assert response.encode() == [STATUS, (b"baggage", b"a=b")]
    assert response.success
    assert not response.informational


@pytest.mark.parametrize("status", [0, 100, 199, 600, -200])
def test_only_final_statuses_are_sent(status: int) -> None:
    with pytest.raises(LocalProtocolError):
        ConnectResponse.build(status)


@given(st.integers(200, 599), fields)
def test_responses_come_back_as_they_were(status: int, headers: list[tuple[bytes, bytes]]) -> None:
    response = ConnectResponse.build(status, headers)
    assert connect_response_untrusted(response.encode()) == response


@pytest.mark.wire("W-RSP-6", "W-RSP-8")
@pytest.mark.parametrize(
    ("status", "informational", "success"),
    [(100, True, False), (103, True, False), (200, False, True), (204, False, True), (299, False, True)]
    + [(status, False, False) for status in (300, 400, 401, 404, 503, 999)],
)
def test_what_a_status_means(status: int, informational: bool, success: bool) -> None:
    response = connect_response_untrusted([(b":status", b"%d" % status)])
    assert (response.status, response.informational, response.success) == (status, informational, success)


@pytest.mark.wire("W-RSP-7")
@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([], id="empty"),
        pytest.param([(b"date", b"today")], id="no status"),
        pytest.param([STATUS, STATUS], id="status twice"),
        pytest.param([(b"date", b"today"), STATUS], id="late status"),
        pytest.param([STATUS, (b":authority", b"x:1")], id="request pseudo-header"),
        pytest.param([STATUS, (b"Date", b"today")], id="upper case"),
        pytest.param([STATUS, (b"date", b"a\nb")], id="line feed"),
        pytest.param([STATUS, (b"connection", b"close")], id="connection"),
        pytest.param([STATUS, (b"transfer-encoding", b"chunked")], id="transfer-encoding"),
        pytest.param([(b":status", b"101")], id="101"),
        pytest.param([(b":status", b"503"), (b"content-length", b"x")], id="content-length of a refusal"),
        *(
            pytest.param([(b":status", status)], id=repr(status))
            for status in (b"", b"20", b"2000", b"2x0", b"+20", b"0200", b"000", b"099", b" 200", b"-99")
        ),
    ],
)
def test_malformed_responses(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        connect_response_untrusted(headers)
    assert caught.value.error_code == 1


@pytest.mark.wire("W-RSP-9")
@pytest.mark.parametrize("length", [b"0", b"98", b"nonsense"])
def test_a_content_length_on_success_is_not_looked_at(length: bytes) -> None:
    assert connect_response_untrusted([STATUS, (b"content-length", length)]).success


def test_a_content_length_on_a_refusal_is_kept() -> None:
    response = connect_response_untrusted([(b":status", b"503"), (b"content-length", b"98")])
    assert response.headers == ((b"content-length", b"98"),)


@pytest.mark.wire("W-HDR-3")
def test_the_answer_says_whom_it_is_from() -> None:
    response = connect_response_untrusted([STATUS, (b"baggage", b"service.name=cart")])
    assert response.baggage == Baggage(service="cart")


# --- baggage ---

FULL = Baggage(
    cluster="Kubernetes",
    namespace="shop",
    workload_type=WorkloadType.CRONJOB,
    workload="cart-7d",
    service="cart",
    version="v1",
    region="eu-north-1",
    zone="eu-north-1b",
)


@pytest.mark.wire("W-HDR-1")
def test_baggage_byte_for_byte() -> None:
    assert FULL.encode() == (
        b"k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.cronjob.name=cart-7d,service.name=cart,"
        b"service.version=v1,cloud.region=eu-north-1,cloud.availability_zone=eu-north-1b"
    )
    assert Baggage().encode() == b""
    assert Baggage(service="cart", zone="z").encode() == b"service.name=cart,cloud.availability_zone=z"


@pytest.mark.wire("W-HDR-1")
def test_baggage_escapes_what_would_break_the_list() -> None:
    assert Baggage(service="a,b=c;d e%\u00e5", version="x\r\ny").encode() == (
        b"service.name=a%2Cb%3Dc%3Bd%20e%25%C3%A5,service.version=x%0D%0Ay"
    )


baggages = st.one_of(
    st.builds(
        Baggage,
        cluster=st.none() | text,
        namespace=st.none() | text,
        workload_type=st.sampled_from(WorkloadType),
        workload=text,
        service=st.none() | text,
        version=st.none() | text,
        region=st.none() | text,
        zone=st.none() | text,
    ),
    st.builds(Baggage, cluster=st.none() | text),
)


@given(baggages)
def test_baggage_comes_back_as_it_was(baggage: Baggage) -> None:
    assert Baggage.parse_untrusted([baggage.encode()]) == baggage


@pytest.mark.wire("W-HDR-2")
@pytest.mark.parametrize(
    ("received", "read"),
    [
        ([], Baggage()),
        ([b""], Baggage()),
        ([FULL.encode()], FULL),
        ([b"service.name=a", b"cloud.region=r"], Baggage(service="a", region="r")),
        ([b"service.name=a,service.name=b"], Baggage(service="b")),
        ([b"service.name=a", b"service.name="], Baggage()),
        ([b"other=1,service.name=a,,=,x"], Baggage(service="a")),
        ([b" service.name = a ,\tcloud.region=r"], Baggage(service="a", region="r")),
        ([b"service.name=a%20b%2c"], Baggage(service="a b,")),
        ([b"service.name=a%zz%"], Baggage(service="a%zz%")),
        ([b"service.name=%ff"], Baggage(service="\ufffd")),
        ([b"service.name=a;ttl=5;x"], Baggage(service="a")),
        ([b"service.name=a=b"], Baggage(service="a=b")),
        ([b"k8s.pod.name=p,k8s.job.name=j"], Baggage(workload_type=WorkloadType.JOB, workload="j")),
        ([b"k8s.pod.name="], Baggage()),
        ([b"SERVICE.NAME=a"], Baggage()),
        ([b"service.name=a", b"cloud.region=caf\xc3\xa9"], Baggage()),
        ([b"service.name=a\x01"], Baggage()),
    ],
)
def test_baggage_is_read_leniently(received: list[bytes], read: Baggage) -> None:
    assert Baggage.parse_untrusted(received) == read


@given(st.lists(st.binary(max_size=60) | st.text("k8s.podnamervi=,;% \t", max_size=60).map(str.encode), max_size=3))
def test_reading_baggage_raises_nothing(received: list[bytes]) -> None:
    Baggage.parse_untrusted(received)


@pytest.mark.wire("W-HDR-2")
def test_all_baggage_fields_of_a_request_count() -> None:
    request = connect_request_untrusted(
        [METHOD, AUTHORITY, (b"baggage", b"service.name=a"), (b"x", b"y"), (b"baggage", b"service.version=2")]
    )
    assert request.baggage == Baggage(service="a", version="2")


# --- forwarded ---


@pytest.mark.wire("W-HDR-4")
def test_forwarded_byte_for_byte() -> None:
    v4, v6 = Endpoint.parse("10.0.0.1:40000"), Endpoint.parse("[::1]:80")
    assert Forwarded(source=v4).encode() == b'for="10.0.0.1:40000"'
    assert Forwarded(source=v6).encode() == b'for="[::1]:80"'
    assert Forwarded(source=v4, host="cart.shop.svc.cluster.local").encode() == (
        b'for="10.0.0.1:40000";host=cart.shop.svc.cluster.local'
    )
    assert Forwarded(source=Endpoint.parse("[fe80::1%eth0]:80")).encode() == b'for="[fe80::1]:80"'
    assert Forwarded(host="cart:80").encode() == b'host="cart:80"'


@pytest.mark.wire("W-HDR-5")
@pytest.mark.parametrize(
    ("received", "host"),
    [
        (b"host=cart", "cart"),
        (b'host="cart"', "cart"),
        (b'host="cart', "cart"),
        (b'for="10.0.0.1:1" ; host=cart', "cart"),
        (b"Host=cart;host=other", "cart"),
        (b"host=;host=other", "other"),
        (b"by=x;proto=https;host=cart:80", "cart:80"),
        (b"host=cart, host=other", "cart"),
    ],
)
def test_forwarded_host_is_read_leniently(received: bytes, host: str) -> None:
    forwarded = Forwarded.parse_untrusted(received)
    assert forwarded is not None
    assert forwarded.host == host


@pytest.mark.wire("W-HDR-5")
@pytest.mark.parametrize(
    "received",
    [b"", b";", b"host=", b'host=""', b"for=unknown", b"for=_hidden", b"host=a b", b"host=caf\xc3\xa9", b"x", b"host"],
)
def test_forwarded_that_says_nothing_is_none(received: bytes) -> None:
    assert Forwarded.parse_untrusted(received) is None


def test_forwarded_takes_no_host_that_is_none() -> None:
    with pytest.raises(ValueError, match="not a host"):
        Forwarded(host="a;b")


@given(st.none() | addresses, st.none() | hosts)
def test_forwarded_comes_back_as_it_was(source: Endpoint | None, host: str | None) -> None:
    forwarded = Forwarded(source=source, host=host)
    again = Forwarded.parse_untrusted(forwarded.encode())
    assert again == (None if source is None and host is None else forwarded)


@given(st.binary(max_size=60) | st.text('forhst=";[]:.1, ', max_size=40).map(str.encode))
def test_reading_forwarded_raises_nothing(received: bytes) -> None:
    Forwarded.parse_untrusted(received)


def test_forwarded_of_a_request() -> None:
    header = (b"forwarded", b'for="10.0.0.1:40000";host=cart')
    request = connect_request_untrusted([METHOD, AUTHORITY, (b"baggage", b""), header])
    assert request.forwarded == Forwarded(source=Endpoint(ipaddress.ip_address("10.0.0.1"), 40000), host="cart")
    assert ConnectRequest("10.0.0.7:80").forwarded is None


# --- traceparent ---


@pytest.mark.wire("W-HDR-6")
def test_traceparent_byte_for_byte() -> None:
    assert TraceParent.from_random(bytes(range(1, 25))).encode() == (
        b"00-0102030405060708090a0b0c0d0e0f10-1112131415161718-00"
    )
    assert TraceParent(trace_id=b"\xff" * 16, parent_id=b"\xee" * 8, flags=1).encode() == (
        b"00-" + b"f" * 32 + b"-" + b"e" * 16 + b"-01"
    )


@pytest.mark.wire("W-HDR-7")
@pytest.mark.parametrize(
    "received",
    [
        b"",
        b"0" * 55,
        b"-" * 55,
        b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-0",
        b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-000",
        b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-00\n",
        b"ff-" + b"1" * 32 + b"-" + b"2" * 16 + b"-00",
        b"00-" + b"0" * 32 + b"-" + b"2" * 16 + b"-00",
        b"00-" + b"1" * 32 + b"-" + b"0" * 16 + b"-00",
        b"00-" + b"A" * 32 + b"-" + b"2" * 16 + b"-00",
        b"00-" + b"1" * 31 + b"--" + b"2" * 16 + b"-00",
    ],
)
def test_traceparent_that_is_none(received: bytes) -> None:
    assert TraceParent.parse_untrusted(received) is None
    request = connect_request_untrusted([METHOD, AUTHORITY, (b"traceparent", received.replace(b"\n", b"0"))])
    assert request.traceparent is None


@pytest.mark.wire("W-HDR-7")
def test_a_later_version_of_the_same_length_is_read() -> None:
    read = TraceParent.parse_untrusted(b"cc-" + b"1" * 32 + b"-" + b"2" * 16 + b"-09")
    assert read == TraceParent(trace_id=b"\x11" * 16, parent_id=b"\x22" * 8, flags=9)


@pytest.mark.parametrize(
    ("trace_id", "parent_id", "flags"),
    [(bytes(16), b"1" * 8, 0), (b"1" * 15, b"1" * 8, 0), (b"1" * 16, bytes(8), 0), (b"1" * 16, b"1" * 9, 0)]
    + [(b"1" * 16, b"1" * 8, flags) for flags in (-1, 256)],
)
def test_traceparent_takes_only_what_can_be_written(trace_id: bytes, parent_id: bytes, flags: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        TraceParent(trace_id=trace_id, parent_id=parent_id, flags=flags)


@given(st.binary(min_size=24, max_size=24).filter(lambda b: any(b[:16]) and any(b[16:])), st.integers(0, 255))
def test_traceparent_comes_back_as_it_was(bits: bytes, flags: int) -> None:
    value = TraceParent(trace_id=bits[:16], parent_id=bits[16:], flags=flags)
    assert len(value.encode()) == 55
    assert TraceParent.parse_untrusted(value.encode()) == value


@given(st.binary(min_size=55, max_size=55) | st.text("0123456789abcdef-", min_size=55, max_size=55).map(str.encode))
def test_reading_traceparent_raises_nothing(received: bytes) -> None:
    TraceParent.parse_untrusted(received)


def test_traceparent_of_a_request() -> None:
    value = TraceParent.from_random(b"x" * 24)
    request = connect_request_untrusted([METHOD, AUTHORITY, (b"traceparent", value.encode())])
    assert request.traceparent == value
    assert ConnectRequest("10.0.0.7:80").traceparent is None


# --- x-forwarded-network ---


@pytest.mark.wire("W-HDR-8")
@pytest.mark.parametrize(
    ("value", "network", "crossed"),
    [
        (None, None, False),
        (b"", None, False),
        (b"Net-1", "Net-1", False),
        (b"net2", "net2", True),
        (b"\xff", None, False),
    ],
)
def test_the_network_a_request_comes_from(value: bytes | None, network: str | None, crossed: bool) -> None:
    headers = () if value is None else ((b"x-forwarded-network", value),)
    request = connect_request_untrusted([METHOD, AUTHORITY, *headers])
    assert request.forwarded_network == network
    assert request.crossed_networks("net-1") is crossed
