"""``--capture``: where a connection was going before netfilter brought it here. Linux only.

With REDIRECT the kernel rewrote the destination and keeps the original one in its connection table, where
``SO_ORIGINAL_DST`` finds it. With TPROXY nothing was rewritten: the socket's own address is the destination, and the
listener needs ``IP_TRANSPARENT``.

A connection whose destination is our own port did not come through a rule but straight to us. Proxying it would connect
us to ourselves again and again, so it is refused.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from typing import TYPE_CHECKING

from hbone.address import Endpoint
from hbone.errors import InvalidAddress
from hbone.proxy._ways._base import BadHandshake, SilentWayIn, peer_of, reset
from hbone.transport import set_transparent

if TYPE_CHECKING:
    from collections.abc import Collection

    from hbone.address import IPAddress

if sys.platform != "linux":
    raise ImportError(
        "capturing connections needs Linux: SO_ORIGINAL_DST, IP_TRANSPARENT and SO_MARK are not elsewhere"
    )

__all__ = ["accept_captured", "original_destination", "prepare_listener"]

# Not in the socket module; from linux/netfilter_ipv4.h, linux/netfilter_ipv6/ip6_tables.h.
_SO_ORIGINAL_DST = 80
_IP6T_SO_ORIGINAL_DST = 80

_NO_ENTRY = frozenset({errno.ENOENT, errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL})


def original_destination(sock: socket.socket) -> Endpoint:
    """Where the connection of an accepted socket was going: SO_ORIGINAL_DST, or else the socket's own address.

    IPv4 addresses that are mapped into IPv6 (dual-stack listeners) come out as IPv4.

    Raises:
        OSError: the connection is gone.
    """
    local = Endpoint.from_sockaddr(sock.getsockname())
    try:
        if local.ip.version == 4:
            raw = sock.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, 16)
            port, address = struct.unpack_from("!2xH4s", raw)
            return Endpoint.from_sockaddr((socket.inet_ntop(socket.AF_INET, address), port))
        raw = sock.getsockopt(socket.IPPROTO_IPV6, _IP6T_SO_ORIGINAL_DST, 28)
        port, address = struct.unpack_from("!2xH4x16s", raw)
        (scope,) = struct.unpack_from("=I", raw, 24)
        return Endpoint.from_sockaddr((socket.inet_ntop(socket.AF_INET6, address), port, 0, scope))
    except OSError as error:
        if error.errno in _NO_ENTRY:  # no address translation here: TPROXY, or nobody redirected anything
            return local
        raise


async def accept_captured(sock: socket.socket, *, own_ports: Collection[int]) -> SilentWayIn:
    """A way in whose target is the original destination; nothing is read.

    Args:
        sock: of the application; it is closed if this raises.
        own_ports: the ports that this proxy listens on: a destination of this machine with one of them is refused.

    Raises:
        BadHandshake: the application has gone, or it connected to us directly. It saw a reset.
    """
    try:
        source = peer_of(sock)
        destination = original_destination(sock)
        target = destination.authority
        if destination.port in own_ports and _is_ours(destination.ip):
            why = f"{destination} is this proxy itself: nothing redirected the connection here"
            raise BadHandshake(why, target=target)
    except OSError as error:
        reset(sock)
        raise BadHandshake("the application left at once") from error
    except (BadHandshake, InvalidAddress) as error:
        reset(sock)
        bad = error if isinstance(error, BadHandshake) else BadHandshake(f"cannot go to {destination}: {error}")
        bad.source = source
        raise bad from None
    return SilentWayIn(target=target, source=source, sock=sock)


def _is_ours(ip: IPAddress) -> bool:
    """Whether `ip` is an address of this machine: only such can be bound to."""
    if ip.is_loopback or ip.is_unspecified:
        return True
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(Endpoint(ip, 0).sockaddr)
        except OSError:
            return False
    return True


def prepare_listener(sock: socket.socket, *, transparent: bool | None) -> None:
    """Let a listener take TPROXY connections: True, it must; None, where that is allowed; False, it does not.

    Raises:
        PermissionError: `transparent` is True, and the process lacks CAP_NET_ADMIN and CAP_NET_RAW.
    """
    if transparent is not False:
        try:
            set_transparent(sock)
        except PermissionError:
            if transparent:
                raise
