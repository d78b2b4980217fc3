"""Plain TCP: connect and listen, on stdlib sockets that trio only waits for."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import select
import socket
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import trio

from hbone.address import Authority
from hbone.errors import ConnectFailed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hbone.address import IPAddress

__all__ = ["accept_from", "connect_tcp", "listen_tcp", "resolve"]

_log: Final = logging.getLogger("hbone")

_BACKLOG: Final = 1024
#: Addresses of one name that are worth a try.
_MAX_ADDRESSES: Final = 4
#: ztunnel's values: a dead peer is noticed after 180 s + 9 * 180 s when it is not noticed by PING before.
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 180, "TCP_KEEPINTVL": 180, "TCP_KEEPCNT": 9}


# A proxy connects to few addresses, again and again.
_parse_ip = lru_cache(maxsize=1024)(ipaddress.ip_address)


async def connect_tcp(
    host: str, port: int, *, timeout: float, source_ip: str | IPAddress | None = None
) -> socket.socket:
    """Connect.

    Args:
        host: an IP address, or a name; a name's addresses are tried as RFC 8305 says.
        port: the TCP port.
        timeout: seconds for all of it.
        source_ip: bind to this local address first; only with an IP address as `host`.

    Returns:
        A connected, non-blocking socket with TCP_NODELAY and keep-alive.

    Raises:
        ConnectFailed: refused, unreachable, timed out, unknown name; the message says which and where.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        address: IPAddress | None = _parse_ip(host)
    except ValueError:
        address = None
    sock: socket.socket | None = None
    try:
        with trio.move_on_after(timeout):
            if address is None:
                sock = await _connect_name(host, port)
            else:
                sock = await _connect_address(address, port, source_ip)
        if sock is None:
            hint = "; a NetworkPolicy or firewall may block port 15008" if port == 15008 else ""
            raise ConnectFailed(f"connecting to {where} timed out after {timeout:g} s{hint}") from trio.TooSlowError()
    except socket.gaierror as exc:
        raise ConnectFailed(f"{host} does not resolve: {exc.strerror or exc}") from exc
    except OSError as exc:
        raise ConnectFailed(f"connecting to {where} failed: {_why(exc)}") from exc
    _tune(sock)
    return sock


async def resolve(target: Authority) -> tuple[Authority, ...]:
    """The same target with addresses for its name, in the order in which to try them; itself if it has an address.

    Raises:
        ConnectFailed: the name does not resolve.
    """
    if target.ip is not None:
        return (target,)
    try:
        found = await trio.socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except OSError as exc:  # gaierror is one
        raise ConnectFailed(f"{target.host} does not resolve: {exc.strerror or exc}") from exc
    addresses = dict.fromkeys(str(sockaddr[0]).partition("%")[0] for *_, sockaddr in found)
    return tuple(Authority(address, target.port) for address in addresses)[:_MAX_ADDRESSES]


def _why(exc: OSError) -> str:
    if exc.errno == errno.ECONNREFUSED:
        return "connection refused (nothing listens there)"
    return (exc.strerror or str(exc) or type(exc).__name__).lower()


async def _connect_address(address: IPAddress, port: int, source_ip: str | IPAddress | None) -> socket.socket:
    sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6)
    try:
        sock.setblocking(False)
        if source_ip is not None:
            sock.bind((str(source_ip), 0))
        code = sock.connect_ex((str(address), port))
        if code == errno.EINPROGRESS:
            if not _is_decided(sock):
                await trio.lowlevel.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise
    return sock


def _is_decided(sock: socket.socket) -> bool:
    """Whether a connect is over already.

    To an address of this machine it mostly is, and asking is one system call where waiting is a turn of the event
    loop. An inbound proxy connects to little else.
    """
    asked = select.poll()
    asked.register(sock, select.POLLOUT)
    return bool(asked.poll(0))


async def _connect_name(host: str, port: int) -> socket.socket:
    try:
        stream = await trio.open_tcp_stream(host, port)
    except OSError as exc:
        group = exc.__cause__
        if isinstance(group, BaseExceptionGroup):  # one failure an address: the first tells enough
            first = group.exceptions[0]
            if isinstance(first, OSError):
                raise first from exc
        raise
    # trio does not hand its socket out: a second descriptor of the same connection is ours.
    sock = socket.fromfd(stream.socket.fileno(), stream.socket.family, stream.socket.type)
    sock.setblocking(False)
    stream.socket.close()
    return sock


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        option = getattr(socket, name, None)  # macOS has not all of them in every Python
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def listen_tcp(host: str, port: int, *, prepare: Callable[[socket.socket], None] | None = None) -> socket.socket:
    """Listen on an IP address.

    Args:
        host: an IP address of this machine; ``0.0.0.0`` or ``::`` for all. ``::`` takes IPv4 too.
        port: 0 for a free one.
        prepare: called with the socket before it is bound, to set options.

    Returns:
        A listening, non-blocking socket.

    Raises:
        OSError: the port is taken, the address is not of this machine, or it needs a privilege.
    """
    address = ipaddress.ip_address(host)
    sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.version == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if prepare is not None:
            prepare(sock)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


async def accept_from(
    listener: socket.socket,
    handle: Callable[[socket.socket], None],
    *,
    room: Callable[[], Awaitable[None] | None] = lambda: None,
) -> None:
    """Accept connections until cancelled. What goes wrong with one, or with all for a while, does not end it.

    Args:
        listener: non-blocking.
        handle: gets each connection, non-blocking and with TCP_NODELAY; must not raise or wait.
        room: asked before each accept; None to go on, otherwise awaited and asked again.
    """
    while True:
        waiting = room()
        if waiting is not None:
            await waiting
            continue
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            await trio.lowlevel.wait_readable(listener)
            continue
        except OSError as exc:
            # A connection that died in the queue, or no file descriptors left.
            _log.warning("accepting a connection failed: %s", exc)
            await trio.sleep(0.05)
            continue
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        handle(sock)
