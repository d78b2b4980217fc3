"""Standard input and output as one half-closeable stream, whatever they are: pipes, sockets, terminals, files.

Reading never changes a descriptor, because a shell and other programs share it: wait until there is something, then
read once. What cannot be waited for (a file, ``/dev/null``) is read in a thread. Writing must not block on more than
the reader takes: a socket is asked not to wait for each call, a pipe is made non-blocking while we run, and what
remains (terminals, files) is written in a thread. Threads are given up on cancellation; they end with the process.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["StandardStreams"]

_CHUNK: Final = 256 * 1024
_PIPE_SIZE: Final = 1024 * 1024


class StandardStreams(trio.abc.HalfCloseableStream):
    """Receives from one descriptor and sends to another.

    Args:
        source: the descriptor to read; None for one that was closed, that is, an end of data at once.
        sink: the descriptor to write. `send_eof` and `aclose` put ``/dev/null`` in its place.
        on_output_end: called by `send_eof`.

    Attributes:
        failure: what broke first, if anything did.
    """

    def __init__(self, source: int | None, sink: int, *, on_output_end: Callable[[], None] = lambda: None) -> None:
        self._on_output_end = on_output_end
        self.failure: OSError | None = None
        self._source = source
        self._waitable = True
        self._sink = sink
        self._sink_open = True
        self._socket: socket.socket | None = None
        self._made_non_blocking = False
        kind = os.fstat(sink).st_mode
        if stat.S_ISSOCK(kind):
            self._socket = socket.socket(fileno=os.dup(sink))
        elif stat.S_ISFIFO(kind) and os.get_blocking(sink):
            os.set_blocking(sink, False)
            self._made_non_blocking = True
        self._in_thread = self._socket is None and os.get_blocking(sink)
        for descriptor in (source, sink):
            _widen(descriptor)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for input; ``b""`` at its end.

        Raises:
            trio.BrokenResourceError: it cannot be read; see `failure`.
        """
        size = min(max_bytes or _CHUNK, _CHUNK)
        try:
            if self._source is None:
                await trio.lowlevel.checkpoint()
                return b""
            while self._waitable:
                try:
                    await trio.lowlevel.wait_readable(self._source)
                except PermissionError:  # epoll's word for what is always ready
                    self._waitable = False
                    break
                with suppress(BlockingIOError):  # somebody else read it, or made it non-blocking
                    return os.read(self._source, size)
            return await trio.to_thread.run_sync(os.read, self._source, size, abandon_on_cancel=True)
        except OSError as problem:
            raise self._broken(problem) from problem

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of it.

        Raises:
            trio.BrokenResourceError: nobody reads any more, or the disk is full; see `failure`.
        """
        view = memoryview(data)
        try:
            await trio.lowlevel.checkpoint()
            while view:
                view = view[await self._write_some(view) :]
        except OSError as problem:
            raise self._broken(problem) from problem

    async def _write_some(self, view: memoryview) -> int:
        if self._in_thread:
            return await trio.to_thread.run_sync(os.write, self._sink, view, abandon_on_cancel=True)
        while True:
            try:
                if self._socket is not None:
                    return self._socket.send(view, socket.MSG_DONTWAIT)
                return os.write(self._sink, view)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sink)

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        """End the output."""
        self._close_sink()
        self._on_output_end()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """End the output. The input is left as it is."""
        self._close_sink()
        await trio.lowlevel.checkpoint()

    def _close_sink(self) -> None:
        if not self._sink_open:
            return
        self._sink_open = False
        if self._made_non_blocking:
            os.set_blocking(self._sink, True)
        if self._socket is not None:
            with suppress(OSError):  # the other side was quicker
                self._socket.shutdown(socket.SHUT_WR)
            self._socket.close()
        # A number that is free would be taken by whatever is opened next.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._sink)
        os.close(nothing)

    def _broken(self, problem: OSError) -> trio.BrokenResourceError:
        if self.failure is None:
            self.failure = problem
        return trio.BrokenResourceError(str(problem))


def _widen(descriptor: int | None) -> None:
    """Fewer turns for bulk: Linux lets a pipe hold more than its 64 KiB."""
    try:
        import fcntl

        if descriptor is not None and stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    except (ImportError, AttributeError, OSError):
        pass
