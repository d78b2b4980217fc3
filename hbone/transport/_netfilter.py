"""What Linux lets a privileged proxy do with a socket: packet marks, and addresses that are not this machine's.

Marks are how firewall rules tell the proxy's own packets from those to capture. A transparent socket may bind to a
foreign address, so that an application sees its client and not the proxy; that the replies come back here is the
business of the machine's rules and routes. Everything here is refused with ``ENOTSUP`` on other systems.
"""

from __future__ import annotations

import errno
import functools
import logging
import socket
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hbone.address import IPAddress

__all__ = ["bind_foreign", "set_mark", "set_transparent"]

_log: Final = logging.getLogger("hbone")

# Not in the socket module of every Python; from asm-generic/socket.h, linux/in.h and linux/in6.h.
_SO_MARK: Final = 36
_IP_FREEBIND: Final = 15
_IP_TRANSPARENT: Final = 19
_IP_BIND_ADDRESS_NO_PORT: Final = 24
_IPV6_TRANSPARENT: Final = 75
_IPV6_FREEBIND: Final = 78


def set_mark(sock: socket.socket, mark: int) -> None:
    """Set SO_MARK, by which firewall rules tell the proxy's own connections from those to capture.

    Raises:
        OSError: the process lacks CAP_NET_ADMIN (`PermissionError`), or this is not Linux.
    """
    _only_linux("packet marks")
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, mark)
    except PermissionError:
        why = (
            f"setting the packet mark {mark:#x} needs CAP_NET_ADMIN (run as root, or give the process that capability)"
        )
        raise PermissionError(errno.EPERM, why) from None


def set_transparent(sock: socket.socket) -> None:
    """Set IP_TRANSPARENT: a listener then takes TPROXY connections, a client may bind to a foreign address.

    Raises:
        OSError: the process lacks CAP_NET_ADMIN and CAP_NET_RAW (`PermissionError`), or this is not Linux.
    """
    _only_linux("transparent sockets")
    try:
        sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
    except PermissionError:
        why = "transparent sockets need CAP_NET_ADMIN or CAP_NET_RAW (run as root, or give the process that capability)"
        raise PermissionError(errno.EPERM, why) from None


def bind_foreign(sock: socket.socket, ip: IPAddress) -> bool:
    """Bind to an address that need not be this machine's, with any port.

    Returns:
        Whether that worked. Otherwise `sock` is not bound, and the first time a warning says why: the connection then
        comes from an address of this machine.
    """
    try:
        set_transparent(sock)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        # The port is then chosen by connect(), and only has to be free for its destination.
        sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((str(ip), 0))
    except OSError as exc:
        _warn_once(exc.strerror or str(exc))
        return False
    return True


@functools.cache
def _warn_once(why: str) -> None:
    _log.warning("applications see this proxy's address instead of their clients': %s", why)


def _only_linux(what: str) -> None:
    if sys.platform != "linux":
        raise OSError(errno.ENOTSUP, f"{what} exist on Linux only")
