"""`ConnectionPool`: tunnels on shared sessions, which it opens, reuses, retires and closes.

What is to be done is decided in `hbone.transport._pool_state`, synchronously; this module does it. Three rules keep
cancellation harmless: a dial is a task of the pool's own nursery and never of who asked for it; between a reservation
and its use, and between a change of a session and its place in the books, there is no checkpoint; and whoever leaves,
in whatever way, gives back what it held.

A tunnel on a session with room costs two dictionary look-ups on top of the session's own `open_tunnel`: no task, no
lock, no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Protocol, Self, TypeAlias, assert_never

import trio

from hbone.address import Authority, Endpoint
from hbone.errors import ConnectFailed, HboneError, InvalidAddress, LocalProtocolError, SessionClosed, StreamRefused
from hbone.identity import SpiffeIdentity
from hbone.protocol import Limits
from hbone.tls import PeerPolicy
from hbone.transport._background import background_tasks
from hbone.transport._client import HBONE_PORT, expected_peers, open_session
from hbone.transport._pool_state import (
    Abandon,
    Action,
    Close,
    Dial,
    PooledEntry,
    PoolKey,
    PoolLimits,
    PoolState,
    SessionState,
    Wake,
)
from hbone.transport._values import SessionStatistics, Timeouts

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from hbone.address import IPAddress
    from hbone.tls import Svid, SvidSource
    from hbone.transport._observer import Observer
    from hbone.transport._options import SocketOptions
    from hbone.transport._tunnel import Tunnel

__all__ = ["ConnectionPool", "Dialler", "PoolStatistics", "PooledSession", "PooledSessionStatistics"]

Expect: TypeAlias = SpiffeIdentity | str | Iterable[SpiffeIdentity | str] | PeerPolicy | None
Headers: TypeAlias = Iterable[tuple[str | bytes, str | bytes]]

# What may be remembered by value. An iterable is read anew each time: it may be a list that has changed since.
_VALUES = frozenset({type(None), str, SpiffeIdentity, PeerPolicy})
_REMEMBERED = 4096


class PooledSession(Protocol):
    """What the pool needs of a session."""

    on_change: Callable[[], None] | None
    """To be called synchronously whenever one of the properties below has changed, but for streams that were opened."""

    @property
    def open_streams(self) -> int:
        """Streams that count against the peer's limit. `open_tunnel` counts its own before its first checkpoint."""
        raise NotImplementedError

    @property
    def available_streams(self) -> int:
        """How many more streams the peer allows now."""
        raise NotImplementedError

    @property
    def draining(self) -> bool:
        """Whether it takes no new tunnels, because of a GOAWAY for instance."""
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        raise NotImplementedError

    async def open_tunnel(self, target: Authority, *, headers: Headers = ()) -> Tunnel:
        """Ask for a tunnel.

        Raises:
            StreamRefused: it is certain that the peer has not processed the request.
            HboneError: anything else.
        """
        raise NotImplementedError

    def close_soon(self) -> None:
        """Say goodbye and close, in the background and bounded. More than once is fine."""

    async def aclose(self) -> None:
        """Say goodbye and close, bounded; at once when cancelled. More than once, and at the same time, is fine."""

    def statistics(self) -> SessionStatistics:
        """Its numbers, now."""
        raise NotImplementedError


class Dialler(Protocol):
    """Opens sessions for a pool."""

    async def __call__(self, nursery: trio.Nursery, key: PoolKey, svid: Svid) -> PooledSession:
        """Open a session; its background tasks go to ``nursery`` and must not raise.

        Raises:
            ConnectFailed: there is none; the message says why.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledSessionStatistics:
    """One session of a pool, now."""

    key: PoolKey
    state: SessionState
    tunnels: int
    """Open, or being opened."""
    limit: int
    """How many it may have now: the least of the peer's limit and ours."""
    served: int
    """How many were opened on it so far."""
    session: SessionStatistics | None
    """Its own numbers; None while CONNECTING."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatistics:
    """A pool, now."""

    connecting: int
    """Sessions being dialled."""
    ready: int
    """Sessions that take tunnels."""
    full: int
    """Sessions that take none until one of theirs ends."""
    draining: int
    """Sessions that take none any more and close after their last one."""
    tunnels: int
    """Tunnels open or being opened, on all sessions."""
    waiting: int
    """Callers of `open_tunnel` that wait for a session."""
    dials: int
    """Dials begun since the pool was made."""
    dials_failed: int
    """Those that failed or were not wanted any more."""
    requests: int
    """CONNECTs sent since the pool was made."""
    reused: int
    """Those on a session that had carried another before."""
    retried: int
    """Those sent again because the peer had not processed the one before."""
    sessions: tuple[PooledSessionStatistics, ...]
    """Each session, oldest first."""


class ConnectionPool:
    """Tunnels to many peers, on as few sessions as their limits allow.

    Two tunnels share a session only if they have the same expected identities, next hop and source address. Use it as
    an ``async with`` block; leaving the block closes all sessions, gracefully for as long as ``timeouts.close`` allows,
    and thereby resets tunnels that are still open (see `drain`).

    A session is retired, which means that it takes no new tunnels and is closed after its last one, when the peer says
    GOAWAY, when it has been idle for ``limits.idle_timeout``, when the pool needs its place, and when ``svid`` has a
    newer SVID than the one that it was opened with.

    Args:
        svid: who we are; asked for the current SVID before each tunnel.
        limits: bounds of the pool.
        session_limits: bounds of each session.
        timeouts: bounds of each step of a session.
        observer: told of each session and tunnel.
        socket_options: mark and keep-alive of each connection.
        dial: opens the sessions; for tests, and for what is not plain TCP.
    """

    def __init__(
        self,
        svid: SvidSource,
        *,
        limits: PoolLimits | None = None,
        session_limits: Limits | None = None,
        timeouts: Timeouts | None = None,
        observer: Observer | None = None,
        socket_options: SocketOptions | None = None,
        dial: Dialler | None = None,
    ) -> None:
        self.limits: PoolLimits = limits or PoolLimits()
        self._svids = svid
        self._svid: Svid | None = None
        self._source = svid.identity
        self._session_limits = session_limits or Limits()
        self._timeouts = timeouts or Timeouts()
        self._observer = observer
        self._socket_options = socket_options
        self._dialler: Dialler = dial or self._open_session
        self._state: PoolState[PooledSession] = PoolState(self.limits)
        self._dials: dict[PooledEntry[PooledSession], trio.CancelScope] = {}
        self._resolved: dict[object, tuple[Authority, PoolKey]] = {}
        self._retried = 0
        self._emptied = trio.Event()
        self._manager: AbstractAsyncContextManager[trio.Nursery] | None = None
        self._nursery: trio.Nursery | None = None

    async def __aenter__(self) -> Self:
        if self._manager is not None:
            raise LocalProtocolError("a pool can be opened only once")
        manager = self._manager = background_tasks()
        self._nursery = await manager.__aenter__()
        self._nursery.start_soon(self._reap, name="hbone pool: idle sessions")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._manager is not None
        try:
            await self.aclose()
        finally:
            await self._manager.__aexit__(kind, problem, traceback)

    async def open_tunnel(
        self,
        target: str | Authority,
        *,
        expect: Expect = None,
        via: str | Endpoint | Authority | None = None,
        source_ip: str | IPAddress | None = None,
        headers: Headers = (),
    ) -> Tunnel:
        """Open a tunnel, on a session that is there or on a new one.

        A request that the peer certainly has not processed (REFUSED_STREAM, a GOAWAY below it) is sent again on another
        session, up to ``limits.max_attempts`` in all. Nothing else is repeated: a session that breaks under a request
        may have taken it to the target.

        Waiting for a session is bounded by the time-outs of the dial, but while all sessions that there may be are
        full, only by your own cancel scope. Cancelled, it leaves nothing behind; a dial that it began goes on.

        Args:
            target: ``host:port`` that the peer is to connect to.
            expect: whom we accept as the peer: an identity, several, or a policy. Anybody of our own trust domain
                unless given.
            via: ``host[:port]`` of the peer. The target's host, port 15008, unless given.
            source_ip: the local address to connect from.
            headers: more headers for the request.

        Raises:
            TunnelRefused: the peer said no, with this status.
            ConnectFailed: there is no session, or it ended before the answer. All who wait for one dial get its error.
            StreamRefused: the peer took the request at none of the attempts.
            CertificateUnavailable: we have no SVID now.
            InvalidAddress: the target, ``via`` or ``source_ip`` is none.
            InvalidIdentity: ``expect`` has none.
            LocalProtocolError: the pool is not open.
        """
        authority, key = self._resolve(target, expect, via, source_ip)
        headers = tuple(headers)
        state = self._state
        attempt = 1
        while True:
            svid = self._svids.current()
            if svid is not self._svid:
                self._svid = svid
                self._perform(state.rotate(svid))
            entry = state.acquire(key)
            if entry is None:
                entry = await self._wait_for_session(key, again=attempt > 1)
            try:
                return await entry.session.open_tunnel(authority, headers=headers)
            except StreamRefused:
                self._refused(entry)
                if attempt == self.limits.max_attempts or state.closing:
                    raise
                attempt += 1
                self._retried += 1
            except BaseException:
                # It may have ended before it had a stream.
                self._changed(entry)
                raise

    def statistics(self) -> PoolStatistics:
        """The pool's numbers, now."""
        state = self._state
        counts = state.counts
        sessions = tuple(map(_describe, state.entries))
        return PoolStatistics(
            connecting=counts[SessionState.CONNECTING],
            ready=counts[SessionState.READY],
            full=counts[SessionState.FULL],
            draining=counts[SessionState.DRAINING],
            tunnels=sum(session.tunnels for session in sessions),
            waiting=state.waiting,
            dials=state.dials,
            dials_failed=state.dials_failed,
            requests=state.tunnels,
            reused=state.reused,
            retried=self._retried,
            sessions=sessions,
        )

    async def drain(self, deadline: float) -> None:
        """Take no new tunnels and let the open ones finish, then close.

        Who waits for a session gets `SessionClosed`. Cancelled, it closes at once.

        Args:
            deadline: seconds until tunnels that are still open are reset.
        """
        self._shut()
        with trio.move_on_after(deadline):
            await self._emptied.wait()
        await self.aclose()

    async def aclose(self) -> None:
        """Close all sessions; open tunnels are reset. At once when cancelled, else bounded by ``timeouts.close``."""
        self._shut()
        # Each session bounds its own goodbye; this is for one that does not.
        with trio.move_on_after(3 * self._timeouts.close):
            async with trio.open_nursery() as nursery:
                for entry in self._state.entries:
                    nursery.start_soon(entry.session.aclose)
        await trio.lowlevel.checkpoint()

    def __repr__(self) -> str:
        if self._nursery is None:
            return f"<ConnectionPool of {self._source}: not open>"
        state = self._state
        sessions = ", ".join(f"{count} {kind.value}" for kind, count in state.counts.items())
        tunnels = sum(entry.used for entry in state.entries)
        closed = "closed, " if state.closing else ""
        return f"<ConnectionPool of {self._source}: {closed}{sessions}; {tunnels} tunnels, {state.waiting} waiting>"

    # --- who asks ---

    def _resolve(
        self,
        target: str | Authority,
        expect: Expect,
        via: str | Endpoint | Authority | None,
        source_ip: str | IPAddress | None,
    ) -> tuple[Authority, PoolKey]:
        asked = (target, expect, via, source_ip) if expect.__class__ in _VALUES else None
        found = None if asked is None else self._resolved.get(asked)
        if found is None:
            authority = Authority.parse(target) if isinstance(target, str) else target
            key = PoolKey(
                source=self._source,
                expect=expected_peers(expect, self._svids),
                next_hop=_next_hop(via, authority),
                source_ip=_source_ip(source_ip),
            )
            found = authority, key
            if asked is not None:
                if len(self._resolved) >= _REMEMBERED:
                    self._resolved.clear()
                self._resolved[asked] = found
        return found

    async def _wait_for_session(self, key: PoolKey, *, again: bool) -> PooledEntry[PooledSession]:
        if self._nursery is None:
            raise LocalProtocolError("the pool is not open: write `async with ConnectionPool(...) as pool`")
        if self._state.closing:
            raise LocalProtocolError("the pool is closed")
        bell = trio.Event()
        ticket, actions = self._state.request(key, bell, first=again)
        self._perform(actions)
        try:
            while ticket.entry is None:
                if ticket.error is not None:
                    raise _own_copy(ticket.error)
                await bell.wait()
                # A reservation may be gone again when its owner gets to see it.
                bell = ticket.owner = trio.Event()
        except BaseException:
            self._perform(self._state.cancel(ticket, trio.current_time()))
            raise
        return self._state.start(ticket)

    # --- what sessions tell ---

    def _changed(self, entry: PooledEntry[PooledSession]) -> None:
        session = entry.session
        state = self._state
        if session.closed:
            self._perform(state.closed(entry))
            self._note_if_empty()
        elif session.draining:
            self._perform(state.retire(entry, streams=session.open_streams))
        else:
            self._perform(
                state.update(
                    entry,
                    streams=session.open_streams,
                    available=session.available_streams,
                    now=trio.current_time(),
                )
            )

    def _refused(self, entry: PooledEntry[PooledSession]) -> None:
        session = entry.session
        if session.closed or session.draining:
            self._changed(entry)
        else:
            self._perform(
                self._state.refused(
                    entry,
                    streams=session.open_streams,
                    available=session.available_streams,
                    now=trio.current_time(),
                )
            )

    # --- what is to be done ---

    def _perform(self, actions: Sequence[Action[PooledSession]]) -> None:
        for action in actions:
            match action:
                case Wake(ticket):
                    assert isinstance(ticket.owner, trio.Event)
                    ticket.owner.set()
                case Dial(entry):
                    assert self._nursery is not None
                    self._dials[entry] = trio.CancelScope()
                    self._nursery.start_soon(self._dial, entry, self._svid, name=f"hbone dial {entry.key.next_hop}")
                case Close(entry):
                    entry.session.close_soon()
                case Abandon(entry):
                    self._dials[entry].cancel()
                case _:
                    assert_never(action)

    async def _dial(self, entry: PooledEntry[PooledSession], svid: Svid | None) -> None:
        assert self._nursery is not None
        assert svid is not None
        error: Exception = SessionClosed("the pool was closed during the dial")
        try:
            with self._dials[entry]:
                self._arrived(entry, await self._dialler(self._nursery, entry.key, svid))
        except HboneError as problem:
            error = problem
        except Exception as problem:  # noqa: BLE001 - it belongs to who waits, not to the pool's nursery
            error = ConnectFailed(f"the dial of {entry.key.next_hop} failed: {problem!r}")
            error.__cause__ = problem
        finally:
            del self._dials[entry]
            self._perform(self._state.dial_failed(entry, error))

    def _arrived(self, entry: PooledEntry[PooledSession], session: PooledSession) -> None:
        session.on_change = partial(self._changed, entry)
        usable = not (session.closed or session.draining)
        self._perform(
            self._state.dial_succeeded(
                entry,
                session,
                streams=session.open_streams,
                available=session.available_streams if usable else 0,
                now=trio.current_time(),
            )
        )
        if not usable:
            self._changed(entry)

    async def _reap(self) -> None:
        while True:
            # What becomes idle during this sleep expires after it.
            now = trio.current_time()
            deadline = self._state.next_deadline()
            await trio.sleep_until(now + self.limits.idle_timeout if deadline is None else deadline)
            self._perform(self._state.tick(trio.current_time()))

    def _shut(self) -> None:
        if not self._state.closing:
            self._perform(self._state.close(SessionClosed("the pool was closed")))
            self._note_if_empty()

    def _note_if_empty(self) -> None:
        if self._state.closing and not self._state.entries:
            self._emptied.set()

    async def _open_session(self, nursery: trio.Nursery, key: PoolKey, svid: Svid) -> PooledSession:
        hop = key.next_hop
        return await open_session(
            nursery,
            hop.host if isinstance(hop, Authority) else str(hop.ip),
            hop.port,
            svid=svid,
            policy=key.expect,
            source_ip=key.source_ip,
            limits=self._session_limits,
            timeouts=self._timeouts,
            observer=self._observer,
            socket_options=self._socket_options,
        )


def _next_hop(via: str | Endpoint | Authority | None, target: Authority) -> Endpoint | Authority:
    match via:
        case Endpoint():
            return via
        case None:
            hop = Authority(target.host, HBONE_PORT)
        case Authority():
            hop = via
        case str():
            text = _with_port(via)
            if "%" in text:  # a zone, which only an address of our own side may have
                return Endpoint.parse(text)
            hop = Authority.parse(text)
        case _:
            assert_never(via)
    return hop if hop.ip is None else Endpoint(hop.ip, hop.port)


def _with_port(via: str) -> str:
    if via.startswith("["):
        return f"{via}:{HBONE_PORT}" if via.endswith("]") else via
    match via.count(":"):
        case 0:
            return f"{via}:{HBONE_PORT}"
        case 1:
            return via
        case _:
            return f"[{via}]:{HBONE_PORT}"


def _source_ip(source_ip: str | IPAddress | None) -> IPAddress | None:
    if not isinstance(source_ip, str):
        return source_ip
    try:
        return ip_address(source_ip)
    except ValueError:
        raise InvalidAddress(f"the source address {source_ip!r} is not an IP address") from None


def _own_copy(error: Exception) -> Exception:
    """The same error to be raised in one more task: what is raised grows a traceback, so it cannot be shared."""
    copy = error.__class__.__new__(error.__class__, *error.args)
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = error.__cause__
    return copy.with_traceback(error.__traceback__)


def _describe(entry: PooledEntry[PooledSession]) -> PooledSessionStatistics:
    return PooledSessionStatistics(
        key=entry.key,
        state=entry.state,
        tunnels=entry.used,
        limit=entry.limit,
        served=entry.served,
        session=None if entry.state is SessionState.CONNECTING else entry.session.statistics(),
    )
