"""Accepting applications' connections, knowing how many are under way, and stopping in order."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

from hbone.address import Endpoint
from hbone.transport import accept_from, reset_socket

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from hbone.transport import SocketOptions

__all__ = ["Listeners"]

_log: Final = logging.getLogger("hbone.proxy")


class Listeners:
    """The listening sockets of one proxy, and a task for each connection that they accept."""

    def __init__(self) -> None:
        self._listening: set[trio.CancelScope] = set()
        self._serving: set[trio.CancelScope] = set()
        self._live = 0
        self._none_live = trio.Event()
        self._draining = False

    @property
    def live(self) -> int:
        """Connections that are being served."""
        return self._live

    async def serve(
        self,
        listener: socket.socket,
        serve_connection: Callable[[socket.socket], Awaitable[None]],
        *,
        options: SocketOptions | None = None,
        task_status: trio.TaskStatus[Endpoint] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept until `drain` or cancelled. The listener is closed in the end.

        Args:
            listener: listening and non-blocking.
            serve_connection: owns the socket that it is called with. What it raises is logged, and its socket is reset:
                a connection's failure is its own.
            options: keep-alive of what is accepted; none unless given.
            task_status: gets the bound address.
        """

        async def serve_one(sock: socket.socket) -> None:
            try:
                await serve_connection(sock)
            except Exception:  # noqa: BLE001 - one of thousands, and the others know nothing of it
                _log.exception("serving a connection failed")
                reset_socket(sock)
            finally:
                self._live -= 1
                if not self._live:
                    self._none_live.set()

        try:
            async with trio.open_nursery() as nursery:
                self._serving.add(nursery.cancel_scope)

                def handle(sock: socket.socket) -> None:
                    self._live += 1  # not in the task: a drain may come before its first step
                    nursery.start_soon(serve_one, sock)

                with trio.CancelScope() as scope:
                    self._listening.add(scope)
                    if self._draining:
                        scope.cancel()
                    task_status.started(Endpoint.from_sockaddr(listener.getsockname()))
                    await accept_from(listener, handle, options=options)
                trio.lowlevel.notify_closing(listener)
                listener.close()
        finally:
            self._listening.discard(scope)
            self._serving.discard(nursery.cancel_scope)
            listener.close()

    async def drain(self, deadline: float) -> None:
        """Stop accepting, let connections finish for `deadline` seconds, then cancel the rest."""
        self._draining = True
        for scope in self._listening:
            scope.cancel()
        with trio.move_on_after(deadline):
            while self._live:
                self._none_live = trio.Event()
                await self._none_live.wait()
        for scope in self._serving:
            scope.cancel()
