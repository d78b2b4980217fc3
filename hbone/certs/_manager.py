"""`SvidManager`: the SVIDs of all the workloads that one process serves, fetched ahead and kept fresh.

Theory of operation
===================

Each identity is an entry: the newest SVID, the last problem, and when to ask for the next SVID. What is due waits in a
queue ordered by urgency (somebody waits for it; it was never there; it is renewed) and then by time, and at most
``concurrency`` requests run at once. An SVID is renewed when half of its remaining time is over. A request that fails
is repeated after 1 s, 2 s, 4 s and so on, each 20 % more or less so that many proxies do not come at once, 150 s at
most; meanwhile an SVID that is still valid stays in use until it expires.

A request belongs to the manager and not to who waits for it: a cancelled waiter only leaves. The wall clock decides, as
it does about certificates; it is looked at once a minute at least, so that a machine that slept renews when it wakes.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Final

import trio

from hbone.certs._local_ca import DEFAULT_TTL
from hbone.errors import CertificateUnavailable, HboneError, InvalidCertificate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Set

    from hbone.certs._local_ca import LocalCA
    from hbone.identity import SpiffeIdentity
    from hbone.tls import Svid, SvidSource

__all__ = ["SvidManager", "SvidState", "SvidStatus", "SvidSummary", "local_ca_issuer", "retry_delay"]

_log: Final = logging.getLogger("hbone")

_FIRST_RETRY: Final = 1.0
_LAST_RETRY: Final = 150.0
_SPREAD: Final = 0.2
#: Seconds between two SVIDs of one identity, however short they live.
_LEAST_LIFE: Final = timedelta(seconds=1)
_LONGEST_SLEEP: Final = 60.0


def _utc_now() -> datetime:
    return datetime.now(UTC)


def retry_delay(failures: int, chance: float) -> float:
    """Seconds from a failure to the next attempt.

    Args:
        failures: how many there were in a row, from 1.
        chance: 0 to 1: where in the spread of +-20 % it falls.
    """
    longest = _LAST_RETRY / (1 + _SPREAD)
    base = min(longest, _FIRST_RETRY * 2.0 ** min(failures - 1, 20))
    return min(_LAST_RETRY, base * (1 - _SPREAD + 2 * _SPREAD * chance))


def local_ca_issuer(ca: LocalCA, *, ttl: timedelta = DEFAULT_TTL) -> Callable[[SpiffeIdentity], Awaitable[Svid]]:
    """What a `SvidManager` needs in order to get its SVIDs from a `LocalCA`.

    Args:
        ca: who signs; in about a millisecond, so in the calling thread. One after the other, with room for others in
            between: a thousand new workloads must not hold up the bytes of one.
        ttl: how long each SVID is valid.
    """
    turn = trio.Lock()

    async def issue(identity: SpiffeIdentity) -> Svid:
        async with turn:
            await trio.lowlevel.checkpoint()
            return ca.issue(identity, ttl=ttl)

    return issue


class SvidState(Enum):
    """Whether there is an SVID."""

    INITIALIZING = "Initializing"
    """Asked for, and nothing has come yet."""
    AVAILABLE = "Available"
    """There is a valid one, whether or not its renewal works."""
    UNAVAILABLE = "Unavailable"
    """There is none, and the last request failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SvidStatus:
    """One identity of a `SvidManager`, now. As text: its state, and why when it is unavailable."""

    identity: SpiffeIdentity
    state: SvidState
    problem: str | None
    """Why the last request failed; None when it did not."""
    svid: Svid | None
    """The newest that came; it has expired unless the state is AVAILABLE."""
    next_attempt: datetime | None
    """When the next one is asked for; None while that is under way."""

    @property
    def renewal_fails(self) -> bool:
        """Whether there is a valid one that the last request could not replace: it serves until it expires."""
        return self.state is SvidState.AVAILABLE and self.problem is not None

    def __str__(self) -> str:
        return f"Unavailable: {self.problem}" if self.state is SvidState.UNAVAILABLE else self.state.value


@dataclass(frozen=True, slots=True, kw_only=True)
class SvidSummary:
    """A `SvidManager` in numbers. Each of its identities is in one of the first four."""

    available: int
    """Have a valid SVID, and the last request for one did not fail."""
    renewal_fails: int
    """Have a valid SVID, but the last request for the next one failed."""
    initializing: int
    """Have been asked for, and nothing has come yet."""
    unavailable: int
    """Have no valid SVID, and the last request failed."""
    first_expiry: datetime | None
    """When the first of the valid ones expires; None when there are none."""
    requests: int
    """Requests for an SVID that have been answered, or have failed, since it was made."""
    requests_failed: int
    """Those of them that failed."""


class _Urgency(IntEnum):
    """Who is asked for first."""

    AWAITED = 0
    NEW = 1
    RENEWAL = 2


class _Entry:
    """One identity."""

    __slots__ = (
        "again",
        "changed",
        "due",
        "expires",
        "failures",
        "fetching",
        "forgotten",
        "identity",
        "problem",
        "svid",
        "ticket",
        "urgency",
    )

    def __init__(self, identity: SpiffeIdentity) -> None:
        self.identity = identity
        self.svid: Svid | None = None
        self.expires: datetime | None = None
        self.problem: str | None = None
        self.failures = 0
        self.due: datetime | None = None
        self.urgency = _Urgency.NEW
        self.ticket = -1
        self.fetching: trio.CancelScope | None = None
        self.forgotten = False
        self.again = False
        """What is under way may have come too early."""
        self.changed = trio.Event()

    def tell(self) -> None:
        changed, self.changed = self.changed, trio.Event()
        changed.set()

    @property
    def unanswered(self) -> bool:
        return self.svid is None and self.problem is None

    def usable(self, now: datetime) -> Svid | None:
        return self.svid if self.expires is not None and now <= self.expires else None

    def why_not(self) -> str:
        problem = self.problem
        if self.forgotten:
            return "it is not served here any more"
        if self.expires is not None:
            expired = f"the last one expired at {self.expires:%F %T} UTC"
            return f"{expired}; {problem}" if problem else f"{expired}, a new one is asked for"
        return problem or "it is asked for and has not come yet"

    def status(self, now: datetime) -> SvidStatus:
        if self.usable(now) is not None:
            state = SvidState.AVAILABLE
        else:
            state = SvidState.INITIALIZING if self.problem is None else SvidState.UNAVAILABLE
        return SvidStatus(
            identity=self.identity, state=state, problem=self.problem, svid=self.svid, next_attempt=self.due
        )


class _Queue:
    """Which entry's turn it is."""

    def __init__(self) -> None:
        self._tickets = itertools.count()
        self._due: list[tuple[_Urgency, datetime, int, _Entry]] = []
        self._later: list[tuple[datetime, int, _Entry]] = []

    def put(self, entry: _Entry, urgency: _Urgency, due: datetime) -> None:
        """Schedule it, instead of what was scheduled for it before."""
        entry.urgency, entry.due, entry.ticket = urgency, due, next(self._tickets)
        heapq.heappush(self._later, (due, entry.ticket, entry))

    def remove(self, entry: _Entry) -> None:
        entry.ticket, entry.due = -1, None

    def take(self, now: datetime) -> _Entry | None:
        """The most urgent one that is due."""
        later = self._later
        while later and later[0][0] <= now:
            due, ticket, entry = heapq.heappop(later)
            if entry.ticket == ticket:
                heapq.heappush(self._due, (entry.urgency, due, ticket, entry))
        while self._due:
            *_, ticket, entry = heapq.heappop(self._due)
            if entry.ticket == ticket:
                self.remove(entry)
                return entry
        return None

    def next_due(self) -> datetime | None:
        """When `take` will have one, if it has none now."""
        later = self._later
        while later and later[0][2].ticket != later[0][1]:
            heapq.heappop(later)
        return later[0][0] if later else None


class _Source:
    """The `SvidSource` of one identity."""

    __slots__ = ("_entry", "_identity", "_manager")

    def __init__(self, manager: SvidManager, identity: SpiffeIdentity) -> None:
        self._manager = manager
        self._identity = identity
        self._entry: _Entry | None = None

    def __repr__(self) -> str:
        return f"<SvidSource {self._identity}>"

    @property
    def identity(self) -> SpiffeIdentity:
        return self._identity

    def current(self) -> Svid:
        entry = self._entry
        if entry is None or entry.forgotten:
            entry = self._entry = self._manager._entries.get(self._identity)  # noqa: SLF001 - made for each other
            if entry is None:
                raise CertificateUnavailable(self._identity, "it is not served here")
        return self._manager._current(entry)  # noqa: SLF001 - made for each other


class SvidManager:
    """Gets and renews the SVIDs of many identities, while `run` runs. For one thread: trio's.

    Args:
        issue: gets one SVID. What it raises is a failed attempt, tried again later.
        concurrency: requests at once (as ztunnel).
        timeout: seconds for a request.
        on_change: told of each new SVID and of each failure, in trio's thread.
        now: tells the wall time.
        chance: random numbers from 0 to 1, for the spread of retries.
    """

    def __init__(
        self,
        issue: Callable[[SpiffeIdentity], Awaitable[Svid]],
        *,
        concurrency: int = 8,
        timeout: float = 30.0,
        on_change: Callable[[SvidStatus], None] | None = None,
        now: Callable[[], datetime] = _utc_now,
        chance: Callable[[], float] = random.random,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency must be 1 or more, not {concurrency}")
        self._issue = issue
        self._free = concurrency
        self._timeout = timeout
        self._on_change = on_change
        self._now = now
        self._chance = chance
        self._entries: dict[SpiffeIdentity, _Entry] = {}
        self._unanswered = 0
        self._requests = self._requests_failed = 0
        self._queue = _Queue()
        self._wake = trio.Event()
        self._stopped = False

    def __repr__(self) -> str:
        return f"<SvidManager of {len(self._entries)} identities>"

    def want(self, identities: Iterable[SpiffeIdentity]) -> None:
        """Keep SVIDs for exactly these: ask for new ones ahead of their use, and forget all others.

        Who waits for one that is forgotten gets `CertificateUnavailable`; sessions that use its SVID go on.
        """
        wanted = dict.fromkeys(identities)
        for identity in [identity for identity in self._entries if identity not in wanted]:
            self._forget(self._entries.pop(identity))
        for identity in wanted:
            if identity not in self._entries:
                self._add(identity)

    def source(self, identity: SpiffeIdentity) -> SvidSource:
        """The `SvidSource` of one identity; may be asked for before the identity is wanted.

        Its `current` raises `CertificateUnavailable` while there is no valid SVID, and says why.
        """
        return _Source(self, identity)

    async def get(self, identity: SpiffeIdentity) -> Svid:
        """The SVID of one identity: at once when there is one, otherwise ahead of all that nobody waits for.

        One that is not wanted is asked for, too, and kept until the next `want` that does not name it. Waiting is
        bounded by the time-out of the request; cancelled, nothing changes.

        Raises:
            CertificateUnavailable: the last attempt failed, or it is not wanted any more, or the manager has stopped.
        """
        entry = self._entries.get(identity)
        if entry is None:
            entry = self._add(identity)
        await trio.lowlevel.checkpoint()
        while True:
            svid = entry.usable(self._now())
            if svid is not None:
                return svid
            if self._stopped:
                raise CertificateUnavailable(identity, "certificates are not kept any more: the proxy stops")
            if entry.forgotten or entry.problem is not None:
                raise CertificateUnavailable(identity, entry.why_not())
            self._hurry(entry)
            await entry.changed.wait()

    def renew(self, identity: SpiffeIdentity) -> None:
        """Ask for a new SVID now, because there is a reason to think that another one is to be had: files changed.

        The one in use stays until the new one is there. Does nothing for one that is not wanted.
        """
        entry = self._entries.get(identity)
        if entry is None:
            return
        if entry.fetching is not None:
            entry.again = True
            return
        urgency = _Urgency.NEW if entry.usable(self._now()) is None else _Urgency.RENEWAL
        self._schedule(entry, urgency, self._now())

    @property
    def identities(self) -> Set[SpiffeIdentity]:
        """Those that are kept: what was wanted, and what was asked for since."""
        return self._entries.keys()

    @property
    def unanswered(self) -> int:
        """How many have been asked for, and have neither come nor failed yet."""
        return self._unanswered

    def states(self) -> tuple[SvidStatus, ...]:
        """Each identity, in the order in which they were first wanted. Takes time for as many as there are."""
        now = self._now()
        return tuple(entry.status(now) for entry in self._entries.values())

    def summary(self) -> SvidSummary:
        """`states` in numbers. A millisecond for ten thousand."""
        now = self._now()
        expiries: list[datetime] = []
        failing = initializing = 0
        for entry in self._entries.values():
            if entry.expires is not None and now <= entry.expires:
                expiries.append(entry.expires)
                failing += entry.problem is not None
            else:
                initializing += entry.problem is None
        valid = len(expiries)
        return SvidSummary(
            available=valid - failing,
            renewal_fails=failing,
            initializing=initializing,
            unavailable=len(self._entries) - valid - initializing,
            first_expiry=min(expiries, default=None),
            requests=self._requests,
            requests_failed=self._requests_failed,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ask for what is due, until cancelled. Once only; raises nothing else."""
        task_status.started()
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    self._wake = trio.Event()
                    now = self._now()
                    while self._free and (entry := self._queue.take(now)) is not None:
                        self._free -= 1
                        entry.fetching = trio.CancelScope()
                        nursery.start_soon(self._fetch, entry, entry.fetching)
                    due = self._queue.next_due() if self._free else None
                    left = _LONGEST_SLEEP if due is None else (due - now).total_seconds()
                    with trio.move_on_after(min(left, _LONGEST_SLEEP)):
                        await self._wake.wait()
        finally:
            self._stopped = True
            for entry in self._entries.values():
                entry.tell()

    # === entries ===

    def _add(self, identity: SpiffeIdentity) -> _Entry:
        entry = self._entries[identity] = _Entry(identity)
        self._unanswered += 1
        self._schedule(entry, _Urgency.NEW, self._now())
        return entry

    def _forget(self, entry: _Entry) -> None:
        entry.forgotten = True
        self._unanswered -= entry.unanswered
        self._queue.remove(entry)
        if entry.fetching is not None:
            entry.fetching.cancel()
        entry.tell()

    def _schedule(self, entry: _Entry, urgency: _Urgency, due: datetime) -> None:
        self._queue.put(entry, urgency, due)
        self._wake.set()

    def _hurry(self, entry: _Entry) -> None:
        """Somebody waits for it. A back-off is waited for nevertheless."""
        if entry.due is not None and entry.urgency is not _Urgency.AWAITED:
            self._schedule(entry, _Urgency.AWAITED, entry.due)

    def _current(self, entry: _Entry) -> Svid:
        svid = entry.usable(self._now())
        if svid is None:
            self._hurry(entry)
            raise CertificateUnavailable(entry.identity, entry.why_not())
        return svid

    # === requests ===

    async def _fetch(self, entry: _Entry, scope: trio.CancelScope) -> None:
        svid: Svid | None = None
        problem = ""
        with scope:
            try:
                with trio.fail_after(self._timeout):
                    svid = await self._issue(entry.identity)
                _check(svid, entry.identity, self._now())
            except trio.TooSlowError:
                problem = f"no answer within {self._timeout:g} s"
            except CertificateUnavailable as exc:
                svid, problem = None, exc.why  # whose it is, is said anyway
            except HboneError as exc:
                svid, problem = None, str(exc)
            except Exception as exc:  # noqa: BLE001 - a failed attempt like others
                svid, problem = None, repr(exc)
        self._free += 1
        self._wake.set()
        entry.fetching = None
        if entry.forgotten:
            return
        self._requests += 1
        self._unanswered -= entry.unanswered
        if svid is not None:
            self._take(entry, svid)
        else:
            self._failed(entry, problem)
        if entry.again:
            entry.again = False
            self.renew(entry.identity)
        entry.tell()
        if self._on_change is not None:
            try:
                self._on_change(entry.status(self._now()))
            except Exception:  # noqa: BLE001 - who listens does not stop the renewals
                _log.exception("on_change of %r failed", self)

    def _take(self, entry: _Entry, svid: Svid) -> None:
        now = self._now()
        entry.svid, entry.expires = svid, svid.not_after
        entry.problem, entry.failures = None, 0
        self._schedule(entry, _Urgency.RENEWAL, now + max((entry.expires - now) / 2, _LEAST_LIFE))

    def _failed(self, entry: _Entry, problem: str) -> None:
        self._requests_failed += 1
        entry.problem = problem
        entry.failures += 1
        now = self._now()
        urgency = _Urgency.NEW if entry.usable(now) is None else _Urgency.RENEWAL
        self._schedule(entry, urgency, now + timedelta(seconds=retry_delay(entry.failures, self._chance())))


def _check(svid: Svid, identity: SpiffeIdentity, now: datetime) -> None:
    if svid.identity != identity:
        raise InvalidCertificate(f"the CA issued a certificate for {svid.identity}")
    if svid.not_after <= now:
        raise InvalidCertificate(f"the CA issued a certificate that expired at {svid.not_after:%F %T} UTC")
