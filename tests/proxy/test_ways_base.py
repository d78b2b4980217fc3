"""What the ways in have in common: resets, and words for failures."""

from __future__ import annotations

import errno
import socket
import sys

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from support.tcp import connected_pair

from hbone.address import Authority
from hbone.errors import (
    BadTarget,
    CertificateUnavailable,
    ConnectFailed,
    IdentityRefused,
    PeerIdentityMismatch,
    PolicyDenied,
    RequestRejected,
    SessionClosed,
    StreamRefused,
    Unreachable,
)
from hbone.proxy._ways import BadHandshake, Failure, accept_forward, failure_of, reset
from hbone.proxy._ways._failure import one_line


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def hidden(error: BaseException, context: BaseException) -> BaseException:
    error.__context__ = context
    error.__suppress_context__ = True
    return error


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (PolicyDenied(401), Failure.DENIED),
        (RequestRejected(403), Failure.DENIED),
        (Unreachable(503), Failure.TARGET),
        (BadTarget(400), Failure.OTHER),
        (CertificateUnavailable("a", "b"), Failure.UNAVAILABLE),
        (StreamRefused("x"), Failure.UNAVAILABLE),
        (IdentityRefused("x"), Failure.OTHER),
        (PeerIdentityMismatch(expected=["a"], presented="b"), Failure.OTHER),
        (SessionClosed("x"), Failure.UNREACHABLE),
        (ConnectFailed("x"), Failure.UNREACHABLE),
        (caused(ConnectFailed("x"), ConnectionRefusedError()), Failure.REFUSED),
        (caused(ConnectFailed("x"), TimeoutError()), Failure.TIMEOUT),
        (caused(ConnectFailed("x"), trio.TooSlowError()), Failure.TIMEOUT),
        (caused(OSError("all"), ExceptionGroup("x", [OSError(errno.ENETUNREACH, "x")])), Failure.UNREACHABLE),
        (caused(OSError("all"), ExceptionGroup("x", [ConnectionRefusedError()])), Failure.REFUSED),
        (hidden(ConnectFailed("x"), trio.TooSlowError()), Failure.TIMEOUT),
        (socket.gaierror("x"), Failure.UNREACHABLE),
        (OSError("x"), Failure.OTHER),
    ],
)
def test_failures(error: BaseException, failure: Failure) -> None:
    assert failure_of(error) is failure


def test_every_failure_has_both_words() -> None:
    for failure in Failure:
        assert 1 <= failure.socks_reply <= 8
        assert failure.http_status in (403, 502, 503, 504)


def test_a_loop_of_causes_ends() -> None:
    one, two = ValueError(), ValueError()
    one.__cause__, two.__cause__ = two, one
    assert failure_of(one) is Failure.OTHER


@given(st.text())
def test_one_line(text: str) -> None:
    line = one_line(ValueError(text))
    assert line.isprintable()
    assert len(line) <= 303
    assert line


async def assert_reset(application: trio.SocketStream) -> None:
    with pytest.raises(trio.BrokenResourceError) as caught:
        await application.receive_some()
    assert isinstance(caught.value.__cause__, ConnectionResetError)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_forward(host: str) -> None:
    try:
        application, sock = connected_pair(host)
    except OSError as error:
        pytest.skip(f"no {host} here: {error}")
    target = Authority.parse("cart.shop:80")
    async with application:
        way = await accept_forward(sock, target)
        assert way.target is target
        assert way.source.sockaddr[:2] == application.socket.getsockname()[:2]
        assert way.leftover == b""
        await way.succeeded()
        assert "cart.shop:80" in repr(way)
        await application.send_all(b"unread")
        await way.failed(ConnectFailed("no"))
        assert sock.fileno() == -1
        await assert_reset(application)
        reset(sock)  # again is harmless


async def test_forward_for_an_application_that_left() -> None:
    application, sock = connected_pair()
    application.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    await application.aclose()
    await trio.lowlevel.wait_readable(sock)
    with pytest.raises(BadHandshake, match="left"):
        await accept_forward(sock, Authority.parse("a:1"))
    assert sock.fileno() == -1


@pytest.mark.skipif(sys.platform == "linux", reason="Linux has it")
def test_capture_is_for_linux() -> None:
    with pytest.raises(ImportError, match="needs Linux"):
        import hbone.proxy._ways._capture  # noqa: F401
