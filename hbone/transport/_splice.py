"""Between two plain sockets, at full speed: what a proxy does with connections that are not for the mesh.

Theory of operation
===================

Each direction is a `_Way` from one socket to the other, without a task of its own: the hub calls when a socket can be
read or written. The task that called `PlainRelay.run` sleeps until both ways have ended; a relay at rest is that task
and less than a kilobyte.

What is read is written at once. A read that brings much says that there is more than small talk: from then on the
bytes go from socket to socket through a pipe, by ``splice``, and are never copied into this process; until a splice
brings little, or nothing. What ``splice`` says of an end is not believed (urgent data looks like one to it):
``recv`` decides about ends and about waiting.

What the sink does not take stays in the pipe, or in a copy, and the source is not read again before all of that is
gone: its own kernel buffer and window then stop who sends. Pipes belong to all relays together and are lent to a way
while it moves something, so there are only as many as there are sinks that are full now; and only so many. Beyond that,
and where there is no ``splice``, the copy is all there is.

Each way ends by itself: the source's end of file becomes shutdown(SHUT_WR). Trouble goes through as trouble: when one
socket breaks, the other one is reset. But who was told its end before gets all that led to it first.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from typing import TYPE_CHECKING, Final

import trio

from hbone.transport._ends import RelayResult, let_it_read, reset_socket
from hbone.transport._hub import shared_hub
from hbone.transport._poller import READABLE, WRITABLE

if TYPE_CHECKING:
    from hbone.transport._hub import Hub

__all__ = ["PlainRelay", "relay_sockets"]

_log: Final = logging.getLogger("hbone")

#: Read by `recv` at once.
_COPY_SIZE: Final = 256 * 1024
#: What a read must bring for a splice to be worth it the next time.
_BULK: Final = 64 * 1024
#: Moved by one splice, and the size of a pipe.
_PIPE_SIZE: Final = 512 * 1024
#: Pipes in all, and how many of them are kept while nobody needs them.
_MAX_PIPES: Final = 128
_SPARE_PIPES: Final = 8

_SPLICE = hasattr(os, "splice")
#: Nothing to read, or nothing that can be spliced.
_NOT_NOW: Final = frozenset({errno.EAGAIN, errno.EINVAL})


class _Pipe:
    """A pipe with as much room as we may have."""

    __slots__ = ("inlet", "outlet")

    def __init__(self) -> None:
        self.outlet: int
        self.inlet: int
        self.outlet, self.inlet = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.fcntl(self.inlet, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        except OSError:
            pass  # there is a bound for all pipes of a user; a small one serves as well

    def close(self) -> None:
        """Both ends, with what is in it."""
        os.close(self.inlet)
        os.close(self.outlet)


class Pipes:
    """Lends pipes to all relays of a thread."""

    __slots__ = ("_ended", "_spare", "count")

    def __init__(self) -> None:
        self._spare: list[_Pipe] = []
        self._ended = False
        self.count: int = 0
        """Pipes that there are."""

    def lend(self) -> _Pipe | None:
        """An empty pipe, to be given back; None when there are enough."""
        if self._spare:
            return self._spare.pop()
        if self.count >= _MAX_PIPES:
            return None
        try:
            pipe = _Pipe()
        except OSError:  # no file descriptors left
            return None
        self.count += 1
        return pipe

    def give_back(self, pipe: _Pipe, *, empty: bool) -> None:
        """Take a pipe that was lent, to keep it or to close it."""
        if empty and len(self._spare) < _SPARE_PIPES and not self._ended:
            self._spare.append(pipe)
        else:
            self.count -= 1
            pipe.close()

    def close(self) -> None:
        """Close those that nobody has; the others are closed when they are given back."""
        self._ended = True
        while self._spare:
            self.count -= 1
            self._spare.pop().close()


class _Shared:
    """What all relays of a thread use."""

    __slots__ = ("hub", "pipes", "view")

    def __init__(self) -> None:
        self.hub: Hub = shared_hub()
        self.pipes: Pipes = Pipes()
        self.view: memoryview = memoryview(bytearray(_COPY_SIZE))
        """What is copied is read into this."""
        self.hub.at_end.append(self.pipes.close)


_shared: trio.lowlevel.RunVar[_Shared] = trio.lowlevel.RunVar("hbone-plain-relays")


def _get_shared() -> _Shared:
    try:
        return _shared.get()
    except LookupError:
        shared = _Shared()
        _shared.set(shared)
        return shared


class _End:
    """One socket of a relay: the source of one way and the sink of the other."""

    __slots__ = ("_hub", "_interest", "_relay", "_watched", "broken", "fd", "incoming", "outgoing", "sock")

    def __init__(self, relay: PlainRelay, sock: socket.socket, hub: Hub) -> None:
        self._relay = relay
        self._hub = hub
        self._interest = READABLE
        self._watched = False
        self.sock: socket.socket = sock
        self.fd: int = sock.fileno()
        self.broken: bool = False
        self.outgoing: _Way
        """What is read here."""
        self.incoming: _Way
        """What is written here."""

    def watch(self) -> None:
        """Be told by the hub."""
        self._hub.add(self.fd, self, self._interest)
        self._watched = True

    def unwatch(self) -> None:
        """Be told no more; may be called again."""
        if self._watched:
            self._hub.remove(self.fd)
            self._watched = False

    def want(self, what: int, yes: bool) -> None:
        """Be told, or not, of this as well: `READABLE` or `WRITABLE`."""
        interest = self._interest | what if yes else self._interest & ~what
        if interest != self._interest and not self._relay.over:
            self._interest = interest
            if self._watched:
                self._hub.change(self.fd, interest)
            elif interest:
                self.watch()

    def io_failed(self, error: Exception) -> None:
        _log.error("a relay failed", exc_info=error)
        self._relay.fail(self, error)

    def io_ready(self, what: int) -> None:
        """The hub says: readable, writable, or both when the socket has broken."""
        relay = self._relay
        if what & WRITABLE and self.incoming.held:
            self.incoming.write()
        if what & READABLE and not relay.over:
            if self._interest & READABLE:
                self.outgoing.move()
            elif what & WRITABLE and not self.incoming.held:
                self._look_broken()

    def _look_broken(self) -> None:
        """Told of a socket that we want nothing of: it broke, or both its directions ended."""
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._relay.fail(self, OSError(code, os.strerror(code)))
        else:
            self.unwatch()  # level-triggered, epoll would tell us of it for ever


class _Way:
    """From one socket to the other; see the module's theory of operation."""

    __slots__ = (
        "_bulk",
        "_copy",
        "_pipe",
        "_relay",
        "_shared",
        "_sink",
        "_source",
        "count",
        "ended",
        "held",
    )

    def __init__(self, relay: PlainRelay, source: _End, sink: _End, shared: _Shared) -> None:
        self._relay = relay
        self._source = source
        self._sink = sink
        self._shared = shared
        self._bulk = False
        self._pipe: _Pipe | None = None
        self._copy: memoryview | None = None
        self.count: int = 0
        """Bytes that the sink took."""
        self.held: int = 0
        """Bytes that were read and that the sink has not taken."""
        self.ended: bool = False
        """The sink has been told the end."""
        source.outgoing = sink.incoming = self

    def move(self) -> None:
        """The source can be read, and nothing is held."""
        if not (self._bulk and self._splice()):
            self._bulk = False
            self._receive()

    def _splice(self) -> bool:
        """Whether that brought something, or was the end."""
        pipes = self._shared.pipes
        pipe = pipes.lend()
        if pipe is None:
            return False
        try:
            count = os.splice(self._source.fd, pipe.inlet, _PIPE_SIZE, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK)
        except OSError as exc:
            if exc.errno not in _NOT_NOW:
                # Asking again would get an end of file: the kernel tells an error once.
                pipes.give_back(pipe, empty=True)
                self._relay.fail(self._source, exc)
                return True
            count = 0
        if not count:
            pipes.give_back(pipe, empty=True)
            return False
        self._bulk = count >= _BULK
        self._pipe = pipe
        self.held = count
        self.write()
        return True

    def _receive(self) -> None:
        view = self._shared.view
        try:
            count = self._source.sock.recv_into(view)
        except BlockingIOError:
            return
        except OSError as exc:
            self._relay.fail(self._source, exc)
            return
        if not count:
            self._end()
            return
        self._bulk = _SPLICE and count >= _BULK
        self.give(view[:count])

    def give(self, data: memoryview) -> None:
        """Write this, and hold a copy of what is not taken; nothing is held now."""
        try:
            sent = self._sink.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            self._relay.fail(self._sink, exc)
            return
        self.count += sent
        self.held = len(data) - sent
        if self.held:
            self._copy = memoryview(bytes(data[sent:]))
            self._hold()

    def write(self) -> None:
        """Write what is held."""
        pipe = self._pipe
        try:
            if pipe is not None:
                sent = os.splice(pipe.outlet, self._sink.fd, self.held, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK)
            else:
                assert self._copy is not None
                sent = self._sink.sock.send(self._copy)
                self._copy = self._copy[sent:]
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            self._relay.fail(self._sink, exc)
            return
        self.count += sent
        self.held -= sent
        if self.held:
            self._hold()
            return
        self._copy = None
        if pipe is not None:
            self._pipe = None
            self._shared.pipes.give_back(pipe, empty=True)
        self._sink.want(WRITABLE, False)
        self._source.want(READABLE, True)

    def _hold(self) -> None:
        self._source.want(READABLE, False)
        self._sink.want(WRITABLE, True)

    def _end(self) -> None:
        """Nothing more will come, and all was written: nobody reads on while something is held."""
        self._source.want(READABLE, False)
        try:
            self._sink.sock.shutdown(socket.SHUT_WR)
        except OSError as exc:
            self._relay.fail(self._sink, exc)
            return
        self.ended = True
        self._relay.way_ended()

    def drop(self) -> None:
        """Give up what is held."""
        self._copy = None
        if self._pipe is not None:
            pipe, self._pipe = self._pipe, None
            self._shared.pipes.give_back(pipe, empty=not self.held)
        self.held = 0


class PlainRelay:
    """Carries bytes between two sockets, both ways until both have ended; its counters can be read at any time.

    To be made in trio's thread. The sockets are connected and non-blocking, and belong to the relay once `run` runs.

    Args:
        downstream: who asked; `bytes_up` counts what comes from here.
        upstream: who was asked.
        first: bytes of `downstream` that somebody has read already.
    """

    __slots__ = ("_down", "_downstream", "_first", "_up", "_upstream", "_waiter", "error", "over")

    def __init__(self, downstream: socket.socket, upstream: socket.socket, *, first: bytes = b"") -> None:
        shared = _get_shared()
        self._downstream = _End(self, downstream, shared.hub)
        self._upstream = _End(self, upstream, shared.hub)
        self._up = _Way(self, self._downstream, self._upstream, shared)
        self._down = _Way(self, self._upstream, self._downstream, shared)
        self._first = first
        self._waiter: trio.lowlevel.Task | None = None
        self.over: bool = False
        """Whether it has ended, or has nothing to do but to let the ends read what they were sent."""
        self.error: Exception | None = None
        """What broke, if something did."""

    def __repr__(self) -> str:
        return f"<PlainRelay {self.bytes_up} up, {self.bytes_down} down{', over' if self.over else ''}>"

    @property
    def bytes_up(self) -> int:
        """What upstream has taken so far."""
        return self._up.count

    @property
    def bytes_down(self) -> int:
        """What downstream has taken so far."""
        return self._down.count

    @property
    def buffered(self) -> int:
        """Bytes that were read and not taken yet, both ways."""
        return self._up.held + self._down.held

    async def run(self) -> RelayResult:
        """Carry until both directions have ended, then close both sockets.

        Each direction ends by itself, exactly. When one end breaks, the other is reset, so that no cut transfer looks
        complete. Cancelled: both are reset at once.

        Returns:
            How it ended; a broken end is reported in there, not raised.
        """
        ends = self._downstream, self._upstream
        try:
            for end in ends:
                end.watch()
            if self._first:
                self._up.give(memoryview(self._first))
            if not self._up.held:
                self._up.move()  # who asked has mostly written already
            await self._wait()
            if self.error is not None:
                for way, sink in ((self._up, self._upstream), (self._down, self._downstream)):
                    if way.ended and not sink.broken:
                        await _let_it_read(sink.sock)
        finally:
            clean = self._up.ended and self._down.ended and self.error is None
            self.over = True
            self._up.drop()
            self._down.drop()
            for end in ends:
                end.unwatch()
                if clean:
                    end.sock.close()
                else:
                    reset_socket(end.sock)
        return RelayResult(bytes_up=self.bytes_up, bytes_down=self.bytes_down, error=self.error)

    async def _wait(self) -> None:
        if self.over:
            await trio.lowlevel.checkpoint()
        else:
            self._waiter = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._waiter = None
        return trio.lowlevel.Abort.SUCCEEDED

    def way_ended(self) -> None:
        """For the ways: one has ended."""
        if self._up.ended and self._down.ended:
            self._finish()

    def fail(self, end: _End, error: Exception) -> None:
        """For the ways: one end broke."""
        end.broken = True
        if not self.over:
            self.error = error
            self._finish()

    def _finish(self) -> None:
        self.over = True
        self._downstream.unwatch()
        self._upstream.unwatch()
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            trio.lowlevel.reschedule(waiter)


async def _let_it_read(sock: socket.socket) -> None:
    try:
        await let_it_read(sock)
    except OSError:
        pass  # it broke, too


async def relay_sockets(downstream: socket.socket, upstream: socket.socket, *, first: bytes = b"") -> RelayResult:
    """`PlainRelay.run` for who does not look at its counters."""
    return await PlainRelay(downstream, upstream, first=first).run()
