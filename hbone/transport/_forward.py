"""`ForwardHandler`: the ready-made handler of a server that forwards to TCP, with an explicit rule of where to."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import trio

from hbone.errors import ConnectFailed, HboneError, InvalidAddress, RequestRejected
from hbone.protocol import ConnectResponse
from hbone.transport._ends import reset_socket
from hbone.transport._relay import relay
from hbone.transport._tcp import connect_tcp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hbone.address import Authority, Endpoint
    from hbone.identity import IdentityPattern
    from hbone.transport._server import TunnelRequest

__all__ = ["AllowNetworks", "DialledAddress", "FixedTarget", "ForwardHandler", "ForwardResult", "TargetRule"]

#: Ports of the mesh itself: forwarding to them would go round in a circle, or reach an admin port.
MESH_PORTS: Final = frozenset((15000, 15001, 15006, 15008, 15020, 15021, 15053, 15080))

_OK: Final = ConnectResponse(status=200)


class TargetRule(Protocol):
    """Where a request may go. Pure."""

    def resolve(self, target: Authority, dialled: Endpoint | None) -> Authority:
        """The address to connect to.

        Args:
            target: what the peer asks for.
            dialled: the address that the peer dialled to reach us.

        Raises:
            RequestRejected: 400, or 503 for ports that are never forwarded to.
        """


def _refuse_mesh_port(port: int, dialled: Endpoint | None) -> None:
    if port in MESH_PORTS or (dialled is not None and port == dialled.port):
        raise RequestRejected(503, flag="CONNECT", reason=f"port {port} belongs to the mesh and is never forwarded to")


@dataclass(frozen=True, slots=True)
class DialledAddress:
    """What ztunnel does: the target's address must be the one that the peer dialled (wire profile, statuses)."""

    def resolve(self, target: Authority, dialled: Endpoint | None) -> Authority:
        """See `TargetRule`."""
        if dialled is None or target.ip is None or target.ip != dialled.ip:
            why = f"target {target} is not the address that was dialled ({dialled.ip if dialled else 'none'})"
            raise RequestRejected(400, flag="CONNECT", reason=why)
        _refuse_mesh_port(target.port, dialled)
        return target


@dataclass(frozen=True, slots=True)
class FixedTarget:
    """Everything goes to one application, whatever was asked for."""

    address: Authority

    def resolve(self, target: Authority, dialled: Endpoint | None) -> Authority:
        """See `TargetRule`."""
        return self.address


@dataclass(frozen=True, slots=True)
class AllowNetworks:
    """IP targets inside given networks, each with all ports or one."""

    networks: tuple[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, int | None], ...]

    @classmethod
    def parse(cls, texts: Iterable[str]) -> AllowNetworks:
        """From ``CIDR``, ``CIDR:PORT``, ``[CIDR]:PORT`` texts; an address alone is a network of one.

        Raises:
            InvalidAddress: one is not of that form.
        """
        return cls(tuple(_parse_network(text) for text in texts))

    def resolve(self, target: Authority, dialled: Endpoint | None) -> Authority:
        """See `TargetRule`."""
        ip = target.ip
        if ip is not None:
            for network, port in self.networks:
                if ip.version == network.version and ip in network and port in (None, target.port):
                    if port is None:
                        _refuse_mesh_port(target.port, dialled)
                    return target
        raise RequestRejected(400, flag="CONNECT", reason=f"target {target} is not allowed here")


def _parse_network(text: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, int | None]:
    cidr, port_text = text, ""
    if text.startswith("["):
        cidr, bracket, rest = text[1:].partition("]")
        port_text = rest.removeprefix(":")
        if not bracket or (rest and (rest[0] != ":" or not port_text)):
            raise InvalidAddress(f"{text!r} is not [CIDR] or [CIDR]:PORT")
    elif text.count(":") == 1:
        cidr, _, port_text = text.partition(":")
    try:
        network = ipaddress.ip_network(cidr)
        if port_text and not (port_text.isascii() and port_text.isdigit() and 1 <= int(port_text) <= 65535):
            raise ValueError(f"{port_text!r} is not a port")
        port = int(port_text) if port_text else None
    except ValueError as exc:
        raise InvalidAddress(f"{text!r} is not CIDR or CIDR:PORT: {exc}") from exc
    return network, port


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardResult:
    """One request that a `ForwardHandler` has dealt with."""

    request: TunnelRequest
    upstream: Authority | None
    """Where it went; None when it was refused before that was known."""
    status: int
    """What the peer got as its answer."""
    flag: str | None
    """A word for what went wrong: ``DENY``, ``CONNECT``; None when nothing did."""
    bytes_up: int
    """From the peer to the application."""
    bytes_down: int
    """From the application to the peer."""
    seconds: float
    error: Exception | None
    """None when the tunnel was opened and both directions ended as they should."""


class ForwardHandler:
    """Dials TCP for each request that the rules allow, and relays until both directions have ended.

    200 is sent only when policy has allowed it and the connection to the target stands (wire profile, statuses):
    401 for a peer that is not allowed, 400 for a target that is not, 503 for one that cannot be reached.
    """

    def __init__(
        self,
        allow: TargetRule,
        *,
        peers: Iterable[IdentityPattern] | None = None,
        connect_timeout: float = 10.0,
        on_done: Callable[[ForwardResult], None] | None = None,
        on_open: Callable[[TunnelRequest], None] | None = None,
    ) -> None:
        """
        Args:
            allow: where to. There is no default: an open relay must be somebody's decision.
            peers: who may ask; everybody who can open a session when None.
            connect_timeout: seconds for the connection to the target (as ztunnel).
            on_done: told of each request when it is over, once, also when it was refused or cancelled.
            on_open: told when a tunnel was opened.
        """
        self._allow = allow
        self._peers = None if peers is None else tuple(peers)
        self._connect_timeout = connect_timeout
        self._on_done = on_done
        self._on_open = on_open

    async def __call__(self, request: TunnelRequest) -> None:
        """Deal with one request.

        Raises:
            RequestRejected: the rules say no, or the target cannot be reached.
        """
        began = trio.current_time()
        upstream: Authority | None = None
        status, flag = 200, None
        up = down = 0
        error: Exception | None = None
        try:
            upstream = self._allow.resolve(request.target, request.local_address)
            identity = request.peer.identity
            if self._peers is not None and not any(pattern.matches(identity) for pattern in self._peers):
                raise RequestRejected(401, flag="DENY", reason=f"{identity} is not allowed to connect")
            try:
                sock = await connect_tcp(upstream.host, upstream.port, timeout=self._connect_timeout)
            except ConnectFailed as exc:
                raise RequestRejected(503, flag="CONNECT", reason=str(exc)) from exc
            try:
                tunnel = request.accept_nowait(_OK)
            except BaseException:
                reset_socket(sock)
                raise
            if self._on_open is not None:
                self._on_open(request)
            result = await relay(tunnel, sock)
            up, down, error = result.bytes_up, result.bytes_down, result.error
        except RequestRejected as exc:
            status, flag, error = exc.status, exc.flag, exc
            raise
        except trio.BrokenResourceError as exc:
            cause = exc.__cause__
            error = cause if isinstance(cause, HboneError) else exc
            status = 0
        except trio.Cancelled:
            error = ConnectFailed("cancelled: the request was taken back, or the proxy is stopping")
            raise
        finally:
            if self._on_done is not None:
                self._on_done(
                    ForwardResult(
                        request=request,
                        upstream=upstream,
                        status=status,
                        flag=flag,
                        bytes_up=up,
                        bytes_down=down,
                        seconds=trio.current_time() - began,
                        error=error,
                    )
                )
