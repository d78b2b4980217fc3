"""SOCKS5: the parser at all splits, the answers of RFC 1928, and real clients."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from support.tcp import connected_pair, receive_all

from hbone.address import Authority
from hbone.errors import ConnectFailed, PolicyDenied, Unreachable
from hbone.proxy._ways import BadHandshake, Socks5Parser, accept_socks5

GREETING = b"\x05\x01\x00"
TO_V4 = b"\x05\x01\x00\x01\x0a\x00\x00\x07\x1f\x90"
TO_V6 = b"\x05\x01\x00\x04" + bytes(15) + b"\x01\x1f\x90"
TO_NAME = b"\x05\x01\x00\x03\x0bCart.Shop-1\x1f\x90"
SUCCESS = b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"


def run(*chunks: bytes) -> tuple[Socks5Parser, bytes]:
    parser = Socks5Parser()
    answers = b"".join(parser.feed(chunk) for chunk in chunks)
    return parser, answers


@pytest.mark.parametrize(
    ("request_bytes", "target"),
    [
        (TO_V4, "10.0.0.7:8080"),
        (TO_V6, "[::1]:8080"),
        (TO_NAME, "cart.shop-1:8080"),
        (b"\x05\x01\x00\x03\x0810.0.0.7\x00\x50", "10.0.0.7:80"),
        (b"\x05\x01\x00\x03\x03::1\x00\x50", "[::1]:80"),
        (b"\x05\x01\x00\x04" + bytes(10) + b"\xff\xff\x0a\x00\x00\x07\x00\x50", "10.0.0.7:80"),
    ],
)
@pytest.mark.parametrize("greeting", [GREETING, b"\x05\x02\x02\x00", b"\x05\xff" + bytes(range(255))])
def test_requests_whole_in_bytes_and_in_pieces(greeting: bytes, request_bytes: bytes, target: str) -> None:
    data = greeting + request_bytes + b"first bytes"
    random_ = random.Random(1)
    splits = [[data], [greeting, request_bytes, b"first bytes"], [bytes([byte]) for byte in data]]
    for _ in range(20):
        cuts = sorted(random_.sample(range(1, len(data)), 4))
        splits.append([data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)])
    for chunks in splits:
        parser, answers = run(*chunks)
        assert parser.target == Authority.parse(target)
        assert parser.leftover == b"first bytes"
        assert answers == b"\x05\x00"


def test_nothing_is_known_before_the_last_byte() -> None:
    data = GREETING + TO_NAME
    for cut in range(len(data)):
        parser, _ = run(data[:cut])
        assert parser.target is None
        assert parser.leftover == b""


@pytest.mark.parametrize(
    ("data", "answer", "words"),
    [
        (b"\x04\x01\x00\x50\x0a\x00\x00\x07\x00", b"\x00\x5b" + bytes(6), "SOCKS4"),
        (b"CONNECT a:1 HTTP/1.1\r\n\r\n", b"", "HTTP"),
        (b"\x16\x03\x01", b"", "0x16"),
        (b"\x05\x00", b"\x05\xff", "authenticate"),
        (b"\x05\x01\x02", b"\x05\xff", "authenticate"),
        (GREETING + b"\x05\x02", b"\x05\x07\x00\x01" + bytes(6), "BIND"),
        (GREETING + b"\x05\x03\x00\x01", b"\x05\x07\x00\x01" + bytes(6), "UDP"),
        (GREETING + b"\x05\x09", b"\x05\x07\x00\x01" + bytes(6), "0x09"),
        (GREETING + b"\x05\x01\x00\x02", b"\x05\x08\x00\x01" + bytes(6), "0x02"),
        (GREETING + b"\x04", b"\x05\x01\x00\x01" + bytes(6), "version"),
        (GREETING + b"\x05\x01\x00\x03\x00\x00\x50", b"\x05\x01\x00\x01" + bytes(6), "empty"),
        (GREETING + b"\x05\x01\x00\x03\x03a b\x00\x50", b"\x05\x01\x00\x01" + bytes(6), "host name"),
        (GREETING + b"\x05\x01\x00\x03\x03a\xffb\x00\x50", b"\x05\x01\x00\x01" + bytes(6), "ASCII"),
        (GREETING + b"\x05\x01\x00\x03\x03a\r\n\x00\x50", b"\x05\x01\x00\x01" + bytes(6), "host name"),
        (GREETING + TO_V4[:-2] + b"\x00\x00", b"\x05\x01\x00\x01" + bytes(6), "port"),
    ],
)
def test_refusals(data: bytes, answer: bytes, words: str) -> None:
    for chunks in ([data], [bytes([byte]) for byte in data]):
        parser = Socks5Parser()
        answers = b""
        with pytest.raises(BadHandshake, match=words) as caught:  # noqa: PT012 - what was said before counts too
            for chunk in chunks:
                answers += parser.feed(chunk)
        greeted = b"\x05\x00" if data.startswith(GREETING) else b""
        assert answers + caught.value.answer == greeted + answer


@given(st.lists(st.binary(max_size=40), max_size=8), st.sampled_from([b"", GREETING, GREETING + b"\x05\x01\x00\x03"]))
def test_garbage_raises_nothing_else(chunks: list[bytes], start: bytes) -> None:
    parser = Socks5Parser()
    try:
        for chunk in [start, *chunks]:
            parser.feed(chunk)
    except BadHandshake as error:
        answer = error.answer
        assert parser.target is None
        assert len(answer) in (0, 2, 8, 10, 12)


# -- over sockets ------------------------------------------------------------------------------------------------------


async def test_success_is_said_only_when_the_tunnel_is_up() -> None:
    application, sock = connected_pair()
    async with application:
        await application.send_all(GREETING + TO_V4 + b"early")
        way = await accept_socks5(sock)
        assert str(way.target) == "10.0.0.7:8080"
        assert way.source.sockaddr == application.socket.getsockname()
        assert way.leftover == b"early"
        assert await application.receive_some() == b"\x05\x00"
        await way.succeeded()
        assert await application.receive_some() == SUCCESS
        assert way.sock is sock
        sock.close()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PolicyDenied(401), 2),
        (Unreachable(503), 5),
        (ConnectFailed("no way"), 4),
        (ConnectionRefusedError(), 5),
        (RuntimeError(), 1),
    ],
)
async def test_failure_is_said_even_when_the_application_sent_more(error: Exception, code: int) -> None:
    application, sock = connected_pair("127.0.0.1")
    async with application:
        await application.send_all(GREETING + TO_NAME + b"x" * 10_000)
        way = await accept_socks5(sock)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(way.failed, error)
            assert await application.receive_some() == b"\x05\x00"
            assert await receive_all(application) == b"\x05" + bytes([code]) + b"\x00\x01" + bytes(6)
            await application.aclose()
    assert sock.fileno() == -1


async def test_a_bad_request_is_answered_and_closed() -> None:
    application, sock = connected_pair()
    async with application, trio.open_nursery() as nursery:

        async def accept() -> None:
            with pytest.raises(BadHandshake, match="BIND"):
                await accept_socks5(sock)

        nursery.start_soon(accept)
        await application.send_all(GREETING + b"\x05\x02\x00")
        assert await receive_all(application) == b"\x05\x00\x05\x07\x00\x01" + bytes(6)
        await application.aclose()
    assert sock.fileno() == -1


async def test_an_application_that_says_nothing(autojump_clock: trio.testing.MockClock) -> None:
    application, sock = connected_pair()
    async with application:
        await application.send_all(GREETING[:2])
        with pytest.raises(BadHandshake, match="within 10 s"):
            await accept_socks5(sock)
    assert sock.fileno() == -1
    assert trio.current_time() <= 12.1


async def test_an_application_that_leaves() -> None:
    application, sock = connected_pair()
    await application.send_all(GREETING)
    await application.aclose()
    with pytest.raises(BadHandshake):
        await accept_socks5(sock)
    assert sock.fileno() == -1


async def test_a_cancelled_handshake_closes_its_socket() -> None:
    application, sock = connected_pair()
    async with application:
        with trio.CancelScope() as scope:
            scope.cancel()
            await accept_socks5(sock)
        assert scope.cancelled_caught
        assert sock.fileno() == -1


async def test_an_application_that_left_before_success() -> None:
    application, sock = connected_pair()
    await application.send_all(GREETING + TO_V4)
    way = await accept_socks5(sock)
    application.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    await application.aclose()
    await trio.lowlevel.wait_readable(sock)
    with pytest.raises(BadHandshake, match="left"):
        await way.succeeded()
    assert sock.fileno() == -1
    await way.failed(RuntimeError())  # harmless afterwards
