"""Plain TCP: connect and listen, on stdlib sockets that trio only waits for."""

from __future__ import annotations

import errno
import ipaddress
import logging
import math
import os
import select
import socket
import sys
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final

import trio

from hbone.address import Authority
from hbone.errors import ConnectFailed
from hbone.transport._hub import shared_hub
from hbone.transport._netfilter import bind_foreign
from hbone.transport._options import SocketOptions
from hbone.transport._poller import READABLE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from hbone.address import IPAddress

__all__ = ["accept_from", "connect_tcp", "listen_tcp", "resolve"]

_log: Final = logging.getLogger("hbone")

_BACKLOG: Final = 1024
_AT_ONCE: Final = 64
"""Connections accepted before others get their turn."""
_RETRY: Final = 0.05
"""Seconds until an accept is tried again that failed."""
_TELL_EVERY: Final = 10.0
"""Seconds between two lines about connections that cannot be accepted."""
#: Linux gives what is accepted the options of its listener: five system calls less for each connection.
_INHERITED: Final = sys.platform == "linux"
#: Addresses of one name that are worth a try.
_MAX_ADDRESSES: Final = 4
#: Seconds that an address of a name gets before the next one is tried beside it (RFC 8305 section 5).
_HEAD_START: Final = 0.25
_DEFAULTS: Final = SocketOptions()
_ACCEPTED: Final = SocketOptions(keepalive=False)


# A proxy connects to few addresses, again and again.
_parse_ip = lru_cache(maxsize=1024)(ipaddress.ip_address)


async def connect_tcp(
    host: str,
    port: int,
    *,
    timeout: float,
    source_ip: str | IPAddress | None = None,
    transparent: bool = False,
    options: SocketOptions | None = None,
) -> socket.socket:
    """Connect.

    Args:
        host: an IP address, or a name; a name's addresses are tried as RFC 8305 says.
        port: the TCP port.
        timeout: seconds for all of it.
        source_ip: bind to this local address first; only with an IP address as `host`.
        transparent: `source_ip` may be anybody's, so that the other side sees it instead of us (Linux, CAP_NET_ADMIN or
            CAP_NET_RAW, and routes that bring the replies back here). Where that is not allowed the connection comes
            from an address of ours, and a warning is logged once. Also from one of ours when `source_ip` is the
            address that is connected to, or of the other IP version.
        options: mark, keep-alive; those of `SocketOptions` unless given.

    Returns:
        A connected, non-blocking socket with TCP_NODELAY.

    Raises:
        ConnectFailed: refused, unreachable, timed out, unknown name; the message says which and where.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    options = options or _DEFAULTS
    try:
        address: IPAddress | None = _parse_ip(host)
    except ValueError:
        address = None
    sock: socket.socket | None = None
    try:
        if address is None:
            with trio.move_on_after(timeout):
                sock = await _connect_name(host, port, options)
        else:
            sock = await _connect_address(address, port, timeout, source_ip, transparent, options)
        if sock is None:
            hint = "; a NetworkPolicy or firewall may block port 15008" if port == 15008 else ""
            raise ConnectFailed(f"connecting to {where} timed out after {timeout:g} s{hint}") from trio.TooSlowError()
        options.tune(sock)
    except socket.gaierror as exc:
        raise ConnectFailed(f"{host} does not resolve: {exc.strerror or exc}") from exc
    except OSError as exc:
        raise ConnectFailed(f"connecting to {where} failed: {_why(exc)}") from exc
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
    text = exc.strerror or str(exc) or type(exc).__name__
    return text[0].lower() + text[1:]


async def _connect_address(
    address: IPAddress,
    port: int,
    timeout: float,
    source_ip: str | IPAddress | None,
    transparent: bool,
    options: SocketOptions,
) -> socket.socket | None:
    """None when it took longer than `timeout` seconds."""
    sock = _open(socket.AF_INET if address.version == 4 else socket.AF_INET6, options)
    try:
        if source_ip is not None:
            _bind(sock, source_ip, address, transparent)
        if _begin_connect(sock, (str(address), port)):
            # Only now: to begin and end a scope costs as much as the system calls before.
            with trio.move_on_after(timeout) as scope:
                await trio.lowlevel.wait_writable(sock)
            if scope.cancelled_caught:
                sock.close()
                return None
        _end_connect(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def _open(family: int, options: SocketOptions) -> socket.socket:
    sock = socket.socket(family)
    try:
        sock.setblocking(False)
        options.prepare(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind(sock: socket.socket, source_ip: str | IPAddress, destination: IPAddress, transparent: bool) -> None:
    if not transparent:
        sock.bind((str(source_ip), 0))
        return
    source = _parse_ip(str(source_ip))
    # Who calls itself must not seem to come from its own address: the reply would never reach us.
    if source != destination and source.version == destination.version:
        bind_foreign(sock, source)


def _begin_connect(sock: socket.socket, address: Any) -> bool:
    """Whether one must wait, until it is writable, to know what came of it."""
    code = sock.connect_ex(address)
    if code == errno.EINPROGRESS:
        return not _is_decided(sock)
    if code:
        raise OSError(code, os.strerror(code))
    return False


def _end_connect(sock: socket.socket) -> None:
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


async def _connect(sock: socket.socket, address: Any) -> None:
    if _begin_connect(sock, address):
        await trio.lowlevel.wait_writable(sock)
    _end_connect(sock)


def _is_decided(sock: socket.socket) -> bool:
    """Whether a connect is over already.

    To an address of this machine it mostly is, and asking is one system call where waiting is a turn of the event
    loop. An inbound proxy connects to little else.
    """
    asked = select.poll()
    asked.register(sock, select.POLLOUT)
    return bool(asked.poll(0))


async def _connect_name(host: str, port: int, options: SocketOptions) -> socket.socket:
    """RFC 8305, in the simple form: each address in turn, with a head start, and the first that answers wins."""
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    errors: list[OSError] = []
    winner: socket.socket | None = None

    async def attempt(family: int, address: object, failed: trio.Event) -> None:
        nonlocal winner
        try:
            sock = _open(family, options)
            try:
                await _connect(sock, address)
                if winner is None:
                    winner, sock = sock, None  # type: ignore[assignment]
                    nursery.cancel_scope.cancel()
            finally:
                if sock is not None:
                    sock.close()
        except OSError as exc:
            errors.append(exc)
            failed.set()

    try:
        async with trio.open_nursery() as nursery:
            for family, address in _in_turns((family, address) for family, *_, address in found):
                failed = trio.Event()
                nursery.start_soon(attempt, family, address, failed)
                with trio.move_on_after(_HEAD_START):
                    await failed.wait()
    except BaseException:
        if winner is not None:
            winner.close()
        raise
    if winner is None:
        raise errors[0]  # one an address: the first tells enough
    return winner


def _in_turns(found: Iterable[tuple[int, object]]) -> list[tuple[int, object]]:
    """IPv6 and IPv4 in turns, beginning with the preferred one (RFC 8305 section 4)."""
    first: list[tuple[int, object]] = []
    others: list[tuple[int, object]] = []
    for one in dict.fromkeys(found):
        (first if not first or one[0] == first[0][0] else others).append(one)
    turns = [one for pair in zip(first, others) for one in pair]  # noqa: B905 - the longer one's rest comes after
    return turns + first[len(others) :] + others[len(first) :]


def listen_tcp(
    host: str,
    port: int,
    *,
    prepare: Callable[[socket.socket], None] | None = None,
    options: SocketOptions | None = None,
) -> socket.socket:
    """Listen on an IP address.

    Args:
        host: an IP address of this machine; ``0.0.0.0`` or ``::`` for all. ``::`` takes IPv4 too.
        port: 0 for a free one.
        prepare: called with the socket before it listens, to set options. It is bound then: an option that would allow
            any address must not hide that this one is not ours.
        options: for what is accepted, which inherits them (on Linux; elsewhere `accept_from` sets all but the mark).

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
        if options is not None:
            options.prepare(sock)
        if _INHERITED:
            (options or _ACCEPTED).tune(sock)
        sock.bind((host, port))
        if prepare is not None:
            prepare(sock)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


async def accept_from(
    listener: socket.socket,
    handle: Callable[[socket.socket], None],
    *,
    room: Callable[[], Callable[[], Awaitable[None]] | None] = lambda: None,
    options: SocketOptions | None = None,
) -> None:
    """Accept connections until cancelled. What goes wrong with one, or with all for a while, does not end it.

    Args:
        listener: non-blocking.
        handle: gets each connection, non-blocking and with TCP_NODELAY; must not raise or wait. Called outside of any
            task.
        room: asked before each accept; None to go on, otherwise what it returns is called and awaited, and it is asked
            again.
        options: keep-alive and user time-out of what is accepted; no keep-alive unless given.
    """
    tune = (options or _ACCEPTED).tune
    if _INHERITED:
        tune(listener)  # once more: it may come from elsewhere
    await _Acceptor(listener, handle, room, tune).run()


class _Acceptor:
    """Accepts in calls of the hub; its task sleeps, and waits for what must be waited for."""

    def __init__(
        self,
        listener: socket.socket,
        handle: Callable[[socket.socket], None],
        room: Callable[[], Callable[[], Awaitable[None]] | None],
        tune: Callable[[socket.socket], None],
    ) -> None:
        self._listener = listener
        self._handle = handle
        self._room = room
        self._tune = tune
        self._told = -math.inf
        self._task: trio.lowlevel.Task | None = None
        self._error: Exception | None = None

    async def run(self) -> None:
        hub, fd = shared_hub(), self._listener.fileno()
        while self._error is None:
            wait = self._accept()
            if wait is not None:
                await wait()
                continue
            self._task = trio.lowlevel.current_task()
            hub.add(fd, self, READABLE)
            try:
                await trio.lowlevel.wait_task_rescheduled(self._abort)
            finally:
                hub.remove(fd)
        raise self._error

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _wake(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def io_ready(self, what: int) -> None:
        """See `Watcher`."""
        if self._task is not None and self._accept() is not None:
            self._wake()

    def io_failed(self, error: Exception) -> None:
        """See `Watcher`."""
        self._error = error
        self._wake()

    def _accept(self) -> Callable[[], Awaitable[None]] | None:
        """Accept who is there. Returns what is to be waited for before there can be another."""
        for _ in range(_AT_ONCE):
            wait = self._room()
            if wait is not None:
                return wait
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                break
            except OSError as exc:
                # A connection that died in the queue, or no file descriptors left: that may be so for long.
                if trio.current_time() - self._told >= _TELL_EVERY:
                    self._told = trio.current_time()
                    _log.warning("accepting a connection failed: %s", exc)
                return partial(trio.sleep, _RETRY)
            sock.setblocking(False)
            try:
                if not _INHERITED:
                    self._tune(sock)
            except OSError:  # it has gone, which some systems say here
                sock.close()
                continue
            self._handle(sock)
        return None
