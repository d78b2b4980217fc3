"""Which of many sockets are ready: one epoll that trio waits for as a whole.

trio's own `wait_readable` costs a task, a registration and a task switch for each wait of each socket. The relay holds
thousands of sockets, most of them idle, so they are all in one epoll instance, whose file descriptor is itself
readable when any of them is. Where there is no epoll (macOS), `selectors` gives the same by kqueue.
"""

from __future__ import annotations

import select
import selectors
import sys
from typing import Final

__all__ = ["READABLE", "WRITABLE", "Poller"]

READABLE: Final = 1
WRITABLE: Final = 2

if sys.platform == "linux":

    class Poller:
        """Level-triggered. A socket with no interest is still told of when it breaks: as readable and writable."""

        __slots__ = ("_epoll",)

        _MASKS: Final = (0, select.EPOLLIN, select.EPOLLOUT, select.EPOLLIN | select.EPOLLOUT)
        # By what epoll says (IN 1, PRI 2, OUT 4, ERR 8, HUP 16): what we call that.
        _WHAT: Final = tuple(
            READABLE | WRITABLE if mask & 24 else (READABLE if mask & 1 else 0) | (WRITABLE if mask & 4 else 0)
            for mask in range(32)
        )

        def __init__(self) -> None:
            self._epoll = select.epoll()

        def fileno(self) -> int:
            return self._epoll.fileno()

        def add(self, fd: int, interest: int) -> None:
            self._epoll.register(fd, self._MASKS[interest])

        def change(self, fd: int, interest: int) -> None:
            self._epoll.modify(fd, self._MASKS[interest])

        def remove(self, fd: int) -> None:
            self._epoll.unregister(fd)

        def poll(self, timeout: float = 0) -> list[tuple[int, int]]:
            """Ready sockets: (file descriptor, what for). Waits for one as many seconds."""
            what = self._WHAT
            return [(fd, what[mask & 31]) for fd, mask in self._epoll.poll(timeout, 64)]

        def close(self) -> None:
            self._epoll.close()

else:

    class Poller:
        """The same by `selectors`. A socket with no interest is not watched."""

        __slots__ = ("_selector",)

        def __init__(self) -> None:
            self._selector = selectors.KqueueSelector()

        def fileno(self) -> int:
            return self._selector.fileno()

        def add(self, fd: int, interest: int) -> None:
            if interest:
                self._selector.register(fd, interest)

        def change(self, fd: int, interest: int) -> None:
            known = fd in self._selector.get_map()
            if known and interest:
                self._selector.modify(fd, interest)
            elif known:
                self._selector.unregister(fd)
            elif interest:
                self._selector.register(fd, interest)

        def remove(self, fd: int) -> None:
            if fd in self._selector.get_map():
                self._selector.unregister(fd)

        def poll(self, timeout: float = 0) -> list[tuple[int, int]]:
            """Ready sockets: (file descriptor, what for). Waits for one as many seconds."""
            return [(key.fd, mask) for key, mask in self._selector.select(timeout)]

        def close(self) -> None:
            self._selector.close()
