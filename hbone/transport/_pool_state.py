"""What a pool of sessions knows and decides, without doing any of it.

Theory of operation
===================

`PoolState` is bookkeeping: no I/O, no clock (``now`` is an argument), no tasks. Each operation is one synchronous
function that takes the state from one consistent whole to the next and returns the actions that follow: `Dial`,
`Wake`, `Close`, `Abandon`. Who calls it carries them out in order. So no cancellation can land in the middle of a
change, and every state a session can be in has a name (`SessionState`), CONNECTING too.

*Isolation.* Everything hangs below a `PoolKey`. A session is dialled for a key and serves only tickets of an equal key.

*Streams.* A session tells how many streams are open and how many more it may open now (`PoolState.update`); nothing is
remembered from its handshake, as the peer may change its limit at any time. Who may open a stream either takes it at
once (`PoolState.acquire`), or queues with a `Ticket`, gets a reservation (``ticket.session``) and turns it into a
stream (`PoolState.start`) or gives it back (`PoolState.cancel`). Open streams and reservations together never exceed
what the session allows; when the limit sinks below them, the newest reservations go back to the head of the queue.

*Dialling.* A dial belongs to the pool. Tickets of a key wait for whatever comes first, a stream that ends or the one
dial of the key; a ticket that is cancelled leaves the queue and nothing else. When a dial fails, all who wait for it
fail. When it succeeds and the queue is longer than the new session's limit, the next dial starts.

*Limits.* A session counts from its dial on until it takes no more tunnels: DRAINING sessions are only waiting for
their tunnels to end, and to count them would let one long tunnel lock out a new session. A key that finds the pool
full makes the longest idle session of another key go, or else waits its turn (first come, first served).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from hbone.errors import SessionClosed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hbone.address import Authority, Endpoint, IPAddress
    from hbone.identity import SpiffeIdentity
    from hbone.tls import PeerPolicy

__all__ = [
    "Abandon",
    "Action",
    "Close",
    "Dial",
    "PoolKey",
    "PoolLimits",
    "PoolState",
    "PooledEntry",
    "SessionState",
    "Ticket",
    "Wake",
]

S = TypeVar("S")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolKey:
    """What two tunnels must have in common to share a session.

    Attributes:
        source: who we are.
        expect: which peers we accept.
        next_hop: where TCP goes; an address is always an `Endpoint`, a name an `Authority`, so that equal places are
            equal keys.
        source_ip: the local address to connect from, or None for the system's choice.
    """

    source: SpiffeIdentity
    expect: PeerPolicy
    next_hop: Endpoint | Authority
    source_ip: IPAddress | None = None
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.source, self.expect, self.next_hop, self.source_ip)))

    # Kept, because each tunnel looks its key up and the parts are compared field by field in Python.
    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLimits:
    """Bounds of a `ConnectionPool`.

    Attributes:
        max_sessions: sessions that are being dialled or take tunnels, in all. 500 as ztunnel's pool.
        max_sessions_per_key: the same, for one key.
        max_streams_per_session: tunnels on one session, however many the peer allows. 100 as ztunnel's pool.
        idle_timeout: seconds without a tunnel until a session is closed; ``math.inf`` for never. 300 as ztunnel's pool.
        max_attempts: how often one tunnel is asked for, when the peer says that it has not processed the request.

    Raises:
        ValueError: one of them is out of range.
    """

    max_sessions: int = 500
    max_sessions_per_key: int = 100
    max_streams_per_session: int = 100
    idle_timeout: float = 300.0
    max_attempts: int = 3

    def __post_init__(self) -> None:
        for name in ("max_sessions", "max_sessions_per_key", "max_streams_per_session", "max_attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.idle_timeout > 0:
            raise ValueError(f"idle_timeout must be above 0 seconds, not {self.idle_timeout}")


class SessionState(Enum):
    """Where a session of the pool is in its life."""

    CONNECTING = "connecting"
    """Being dialled: TCP, TLS or the peer's SETTINGS are still to come."""
    READY = "ready"
    """Takes tunnels."""
    FULL = "full"
    """Has as many tunnels as it may have now; READY again when one ends or the peer allows more."""
    DRAINING = "draining"
    """Takes no tunnel any more; closes when the last one has ended."""
    CLOSED = "closed"
    """Gone, and no part of the pool any more."""


class PooledEntry(Generic[S]):
    """The pool's record of one session. Only `PoolState` changes it; what is not listed here is its own affair.

    Attributes:
        key: what it was dialled for.
        generation: what the pool's ``generation`` was when it was dialled (the SVID).
        state: where it is in its life.
        session: what the dial gave; unset before `PoolState.dial_succeeded`.
        streams: open streams.
        limit: how many may be open now, as the peer, our own bound and refusals have it.
        served: streams opened on it so far.
    """

    __slots__ = (
        "ceiling",
        "closing",
        "generation",
        "group",
        "key",
        "limit",
        "peer_limit",
        "reservations",
        "served",
        "session",
        "state",
        "streams",
    )

    session: S

    def __init__(self, group: _Group[S], generation: object) -> None:
        self.key = group.key
        self.generation = generation
        self.state = SessionState.CONNECTING
        self.streams = 0
        self.limit = 0
        self.served = 0
        self.group = group
        self.reservations: OrderedDict[Ticket[S], None] = OrderedDict()
        self.peer_limit = 0
        self.ceiling: float = inf  # what refusals taught us
        self.closing = False  # whether `Close` was asked for

    @property
    def reserved(self) -> int:
        """Streams promised to tickets and not opened yet."""
        return len(self.reservations)

    @property
    def used(self) -> int:
        """Open streams and reservations."""
        return self.streams + len(self.reservations)

    def __repr__(self) -> str:
        return f"<PooledEntry {self.key.next_hop} {self.state.value} {self.streams}+{self.reserved}/{self.limit}>"


class Ticket(Generic[S]):
    """A place in the queue of a key.

    Attributes:
        key: whose sessions will do.
        owner: the caller's, untouched.
        entry: the session on which one stream is reserved for this ticket, if any.
        error: why it will get none, if so. Shared by all who waited for the same dial.
    """

    __slots__ = ("entry", "error", "key", "owner")

    def __init__(self, key: PoolKey, owner: object) -> None:
        self.key = key
        self.owner = owner
        self.entry: PooledEntry[S] | None = None
        self.error: Exception | None = None

    def __repr__(self) -> str:
        return f"<Ticket for {self.key.next_hop}: {self.entry or self.error or 'waiting'}>"


@dataclass(frozen=True, slots=True)
class Dial(Generic[S]):
    """Open a session for ``entry.key``; tell `PoolState.dial_succeeded` or `PoolState.dial_failed`."""

    entry: PooledEntry[S]


@dataclass(frozen=True, slots=True)
class Wake(Generic[S]):
    """Somebody is to look at the ticket. By then the reservation may be gone again: then wait on."""

    ticket: Ticket[S]


@dataclass(frozen=True, slots=True)
class Close(Generic[S]):
    """Nothing is open on ``entry.session`` and nothing will be: close it, then tell `PoolState.closed`."""

    entry: PooledEntry[S]


@dataclass(frozen=True, slots=True)
class Abandon(Generic[S]):
    """The dial for ``entry`` is not wanted any more: stop it. Tell `PoolState.dial_succeeded` if it was too late."""

    entry: PooledEntry[S]


Action: TypeAlias = Dial[S] | Wake[S] | Close[S] | Abandon[S]

_DRY_DIALS = 3
"""Sessions in a row that may end before they carried a single tunnel, until those who wait are told."""

_used = attrgetter("used")


class _Group(Generic[S]):
    """What belongs to one key."""

    __slots__ = ("dry", "key", "queue", "ready", "sessions")

    def __init__(self, key: PoolKey) -> None:
        self.key = key
        self.sessions: dict[PooledEntry[S], None] = {}
        self.ready: dict[PooledEntry[S], None] = {}
        self.queue: OrderedDict[Ticket[S], None] = OrderedDict()
        self.dry = 0


class PoolState(Generic[S]):
    """The bookkeeping of a pool whose sessions are of type ``S``.

    Args:
        limits: the bounds.
        generation: anything; sessions of an older one than the last given to `rotate` take no new tunnels.

    Attributes:
        generation: the current one.
        closing: whether `close` was called.
        dials: dials begun.
        dials_failed: dials that failed or were abandoned.
        tunnels: streams opened, refused ones included.
        reused: those of them that were not the first of their session.
    """

    def __init__(self, limits: PoolLimits, generation: object = None) -> None:
        self.limits = limits
        self.generation = generation
        self.closing = False
        self.dials = 0
        self.dials_failed = 0
        self.tunnels = 0
        self.reused = 0
        self._groups: dict[PoolKey, _Group[S]] = {}
        self._entries: dict[PooledEntry[S], None] = {}
        self._active = 0
        # In the order in which they became idle, with the time: the first is the next to expire.
        self._idle: dict[PooledEntry[S], float] = {}
        # Keys that may dial as soon as the pool has room, in the order in which they asked.
        self._blocked: dict[PoolKey, None] = {}

    # --- what there is ---

    @property
    def entries(self) -> Sequence[PooledEntry[S]]:
        """All sessions that are not CLOSED, oldest first."""
        return tuple(self._entries)

    @property
    def keys(self) -> Sequence[PoolKey]:
        """All keys with a session that takes tunnels, a dial or a ticket in the queue."""
        return tuple(self._groups)

    @property
    def waiting(self) -> int:
        """Tickets in queues: without a reservation and without an error."""
        return sum(len(group.queue) for group in self._groups.values())

    @property
    def counts(self) -> Mapping[SessionState, int]:
        """Sessions by state, without CLOSED."""
        counts: dict[SessionState, int] = {state: 0 for state in SessionState if state is not SessionState.CLOSED}
        for entry in self._entries:
            counts[entry.state] += 1
        return MappingProxyType(counts)

    def next_deadline(self) -> float | None:
        """When `tick` will have something to do, as far as is known now."""
        for since in self._idle.values():
            return since + self.limits.idle_timeout
        return None

    # --- who wants a stream ---

    def acquire(self, key: PoolKey) -> PooledEntry[S] | None:
        """Count one more stream on a session of ``key`` and return it, or None if none has room.

        The stream must be opened before anything else happens to the state. Whoever waits in the queue does so because
        no session has room, so this overtakes nobody. The session with the fewest streams is taken.
        """
        group = self._groups.get(key)
        if group is None or not group.ready:
            return None
        entry = self._pick(group)
        if not entry.streams:
            self._idle.pop(entry, None)
        self._open(entry)
        if entry.used >= entry.limit:
            entry.state = SessionState.FULL
            del group.ready[entry]
        return entry

    def request(self, key: PoolKey, owner: object, *, first: bool = False) -> tuple[Ticket[S], Sequence[Action[S]]]:
        """Queue for a stream.

        Args:
            key: whose sessions will do.
            owner: kept in the ticket.
            first: stand at the head of the queue, because the ticket has waited before (a request that is repeated).
        """
        assert not self.closing
        ticket: Ticket[S] = Ticket(key, owner)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(key)
        group.queue[ticket] = None
        if first:
            group.queue.move_to_end(ticket, last=False)
        actions: list[Action[S]] = []
        self._settle(group, actions)
        return ticket, actions

    def start(self, ticket: Ticket[S]) -> PooledEntry[S]:
        """Turn the ticket's reservation into a stream, to be opened before anything else happens to the state."""
        entry = ticket.entry
        assert entry is not None
        del entry.reservations[ticket]
        ticket.entry = None
        self._open(entry)
        return entry

    def cancel(self, ticket: Ticket[S], now: float) -> Sequence[Action[S]]:
        """The ticket is not wanted any more, whatever has become of it: queue and reservation are left."""
        actions: list[Action[S]] = []
        entry = ticket.entry
        group = self._groups.get(ticket.key)
        if entry is not None:
            ticket.entry = None
            del entry.reservations[ticket]
            self._reckon(entry, now)
            self._settle(entry.group, actions)
        elif group is not None and ticket in group.queue:
            del group.queue[ticket]
            self._settle(group, actions)
        return actions

    # --- what becomes of dials and sessions ---

    def dial_succeeded(
        self, entry: PooledEntry[S], session: S, *, streams: int, available: int, now: float
    ) -> Sequence[Action[S]]:
        """The session is there. When its dial had been abandoned, it is only to be closed."""
        actions: list[Action[S]] = []
        entry.session = session
        if entry.state is not SessionState.CONNECTING:
            entry.state = SessionState.DRAINING
            entry.streams = streams
            self._entries[entry] = None
            self._close_if_unused(entry, actions)
            return actions
        self._measure(entry, streams, available)
        self._reckon(entry, now)
        self._settle(entry.group, actions)
        return actions

    def dial_failed(self, entry: PooledEntry[S], error: Exception) -> Sequence[Action[S]]:
        """There will be no session: ``error`` goes to all who wait for one of this key."""
        actions: list[Action[S]] = []
        if entry.state is SessionState.CONNECTING:
            self.dials_failed += 1
            self._remove(entry)
            self._fail_all(entry.group, error, actions)
            self._settle(entry.group, actions)
        return actions

    def update(self, entry: PooledEntry[S], *, streams: int, available: int, now: float) -> Sequence[Action[S]]:
        """The session says how many streams are open and how many more it may open: a stream ended, a limit changed."""
        actions: list[Action[S]] = []
        self._measure(entry, streams, available)
        if entry.state is SessionState.DRAINING:
            self._close_if_unused(entry, actions)
        elif entry.state is not SessionState.CLOSED:
            self._reckon(entry, now)
            self._settle(entry.group, actions)
        return actions

    def refused(self, entry: PooledEntry[S], *, streams: int, available: int, now: float) -> Sequence[Action[S]]:
        """The peer refused a stream unprocessed, though it was within its limit.

        So it wants no more than the ``streams`` that are left, until it announces more or all of these have ended;
        a session that refuses even the first stream is retired.
        """
        if streams == 0:
            return self.retire(entry, streams=0)
        entry.ceiling = min(streams, entry.ceiling)
        return self.update(entry, streams=streams, available=available, now=now)

    def retire(self, entry: PooledEntry[S], *, streams: int) -> Sequence[Action[S]]:
        """The session takes no new tunnels (GOAWAY, failed ping); those that it has go on."""
        actions: list[Action[S]] = []
        if entry.state in (SessionState.READY, SessionState.FULL):
            entry.streams = streams
            self._drain(entry, actions)
            self._tell_if_dry(entry, "the peer drains each new session before it carries a tunnel", actions)
            self._settle(entry.group, actions)
        elif entry.state is SessionState.DRAINING:
            entry.streams = streams
            self._close_if_unused(entry, actions)
        return actions

    def closed(self, entry: PooledEntry[S]) -> Sequence[Action[S]]:
        """The session is gone and its streams with it."""
        actions: list[Action[S]] = []
        state = entry.state
        if state is SessionState.CLOSED:
            return actions
        entry.streams = 0
        self._remove(entry)
        if state is not SessionState.DRAINING:
            self._tell_if_dry(entry, "the peer closes each new session before it carries a tunnel", actions)
            self._settle(entry.group, actions)
        return actions

    # --- what comes with time, and from the owner ---

    def tick(self, now: float) -> Sequence[Action[S]]:
        """Retire the sessions that have been idle for ``idle_timeout``."""
        actions: list[Action[S]] = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            entry = next(iter(self._idle))
            self._drain(entry, actions)
            self._settle(entry.group, actions)
        return actions

    def rotate(self, generation: object) -> Sequence[Action[S]]:
        """Sessions of another generation take no new tunnels from now on, and their dials are abandoned."""
        actions: list[Action[S]] = []
        self.generation = generation
        groups = []
        for entry in self.entries:
            if entry.generation is not generation and entry.state is not SessionState.DRAINING:
                groups.append(entry.group)
                self._drain(entry, actions)
        for group in groups:
            self._settle(group, actions)
        return actions

    def close(self, error: Exception) -> Sequence[Action[S]]:
        """Take no new requests, fail all tickets with ``error``, abandon dials, let sessions finish their streams."""
        actions: list[Action[S]] = []
        self.closing = True
        for entry in self.entries:
            if entry.state is not SessionState.DRAINING:
                self._drain(entry, actions)
        groups = tuple(self._groups.values())
        for group in groups:
            self._fail_all(group, error, actions)
        for group in groups:
            self._settle(group, actions)
        return actions

    # --- the small steps; each keeps its own counts right, `_settle` makes the whole right ---

    def _pick(self, group: _Group[S]) -> PooledEntry[S]:
        if len(group.ready) == 1:
            return next(iter(group.ready))
        return min(group.ready, key=_used)

    def _open(self, entry: PooledEntry[S]) -> None:
        entry.streams += 1
        self.tunnels += 1
        if entry.served:
            self.reused += 1
        else:
            entry.group.dry = 0
        entry.served += 1

    def _measure(self, entry: PooledEntry[S], streams: int, available: int) -> None:
        allowed = streams + max(available, 0)
        if streams == 0 or allowed > entry.peer_limit:
            entry.ceiling = inf
        entry.streams = streams
        entry.peer_limit = allowed
        entry.limit = int(min(allowed, self.limits.max_streams_per_session, entry.ceiling))

    def _reckon(self, entry: PooledEntry[S], now: float) -> None:
        """Bring READY or FULL, the reservations and the idle list in line with the counts."""
        group = entry.group
        while entry.reservations and entry.used > entry.limit:
            self._revoke_last(entry)
        if entry.used < entry.limit:
            entry.state = SessionState.READY
            group.ready[entry] = None
        else:
            entry.state = SessionState.FULL
            group.ready.pop(entry, None)
        if entry.used:
            self._idle.pop(entry, None)
        elif entry not in self._idle:
            self._idle[entry] = now

    def _revoke_last(self, entry: PooledEntry[S]) -> None:
        ticket, _ = entry.reservations.popitem()
        ticket.entry = None
        entry.group.queue[ticket] = None
        entry.group.queue.move_to_end(ticket, last=False)

    def _take_out(self, entry: PooledEntry[S]) -> None:
        """From what takes tunnels; reservations go back to the head of the queue, in their order."""
        group = entry.group
        while entry.reservations:
            self._revoke_last(entry)
        del group.sessions[entry]
        group.ready.pop(entry, None)
        self._idle.pop(entry, None)
        self._active -= 1

    def _remove(self, entry: PooledEntry[S]) -> None:
        if entry.state is not SessionState.DRAINING:
            self._take_out(entry)
        entry.state = SessionState.CLOSED
        del self._entries[entry]

    def _drain(self, entry: PooledEntry[S], actions: list[Action[S]]) -> None:
        if entry.state is SessionState.CONNECTING:
            self.dials_failed += 1
            self._remove(entry)
            actions.append(Abandon(entry))
        else:
            self._take_out(entry)
            entry.state = SessionState.DRAINING
            self._close_if_unused(entry, actions)

    def _close_if_unused(self, entry: PooledEntry[S], actions: list[Action[S]]) -> None:
        if not entry.streams and not entry.closing:
            entry.closing = True
            actions.append(Close(entry))

    def _fail_all(self, group: _Group[S], error: Exception, actions: list[Action[S]]) -> None:
        group.dry = 0
        while group.queue:
            ticket, _ = group.queue.popitem(last=False)
            ticket.error = error
            actions.append(Wake(ticket))

    def _tell_if_dry(self, entry: PooledEntry[S], why: str, actions: list[Action[S]]) -> None:
        # Without this, a peer that takes each session down at once would be dialled for as long as anybody waits.
        group = entry.group
        if group.queue and not entry.served:
            group.dry += 1
            if group.dry >= _DRY_DIALS:
                self._fail_all(group, SessionClosed(why), actions)

    def _settle(self, group: _Group[S], actions: list[Action[S]]) -> None:
        """Hand out what there is, in the order of the queues, and dial for the rest."""
        self._assign(group, actions)
        for key in tuple(self._blocked):
            self._grow(self._groups[key], actions)
            if key in self._blocked:
                break
        self._grow(group, actions)
        self._forget_if_empty(group)

    def _assign(self, group: _Group[S], actions: list[Action[S]]) -> None:
        while group.queue and group.ready:
            entry = self._pick(group)
            ticket, _ = group.queue.popitem(last=False)
            if not entry.used:
                del self._idle[entry]
            entry.reservations[ticket] = None
            ticket.entry = entry
            if entry.used >= entry.limit:
                entry.state = SessionState.FULL
                del group.ready[entry]
            actions.append(Wake(ticket))

    def _grow(self, group: _Group[S], actions: list[Action[S]]) -> None:
        if not self._may_dial(group):
            self._blocked.pop(group.key, None)
            return
        if self._active >= self.limits.max_sessions:
            # An idle session that somebody waits for is one whose peer allows no streams at the moment. It is left
            # alone, or two such peers would take the last place from each other for ever.
            victim = next((entry for entry in self._idle if not entry.group.queue), None)
            if victim is None:
                self._blocked.setdefault(group.key)
                return
            self._drain(victim, actions)
            self._forget_if_empty(victim.group)
        self._blocked.pop(group.key, None)
        entry = PooledEntry(group, self.generation)
        group.sessions[entry] = None
        self._entries[entry] = None
        self._active += 1
        self.dials += 1
        actions.append(Dial(entry))

    def _may_dial(self, group: _Group[S]) -> bool:
        if not group.queue or len(group.sessions) >= self.limits.max_sessions_per_key:
            return False
        # One dial at a time: a session that is CONNECTING carries nothing. And a peer that allows not even one stream
        # on a fresh session will not allow one on the next either; it announces when that changes.
        return all(entry.used for entry in group.sessions)

    def _forget_if_empty(self, group: _Group[S]) -> None:
        if not group.sessions and not group.queue:
            self._groups.pop(group.key, None)
