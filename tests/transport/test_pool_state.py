"""The pool's bookkeeping: examples for each rule, then a state machine that looks for what they miss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hbone.address import Authority
from hbone.errors import ConnectFailed, SessionClosed
from hbone.identity import SpiffeIdentity
from hbone.transport._pool_state import (
    Abandon,
    Close,
    Dial,
    PooledEntry,
    PoolKey,
    PoolLimits,
    PoolState,
    SessionState,
    Ticket,
    Wake,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hbone.transport._pool_state import Action

ME = SpiffeIdentity.parse("spiffe://cluster.local/ns/a/sa/me")
CONNECTING, READY, FULL, DRAINING, CLOSED = SessionState


def key(name: str = "a", *, expect: str = "anybody", source_ip: str | None = None) -> PoolKey:
    return PoolKey(
        source=ME,
        expect=cast("Any", expect),
        next_hop=Authority(name, 15008),
        source_ip=cast("Any", source_ip),
    )


A, B, C = key("a"), key("b"), key("c")


class Driver:
    """Carries out actions in memory, and keeps what is left to do."""

    def __init__(self, generation: object = "old", **limits: Any) -> None:
        self.state: PoolState[str] = PoolState(PoolLimits(**limits), generation)
        self.dials: list[PooledEntry[str]] = []
        self.woken: list[Ticket[str]] = []
        self.closes: list[PooledEntry[str]] = []
        self.abandoned: list[PooledEntry[str]] = []
        self.count = 0

    def do(self, actions: Any) -> None:
        for action in actions:
            match action:
                case Dial(entry):
                    self.dials.append(entry)
                case Wake(ticket):
                    self.woken.append(ticket)
                case Close(entry):
                    self.closes.append(entry)
                case Abandon(entry):
                    self.dials.remove(entry)
                    self.abandoned.append(entry)

    def request(self, k: PoolKey = A, *, first: bool = False) -> Ticket[str]:
        self.count += 1
        ticket, actions = self.state.request(k, self.count, first=first)
        self.do(actions)
        return ticket

    def requests(self, n: int, k: PoolKey = A) -> list[Ticket[str]]:
        return [self.request(k) for _ in range(n)]

    def dialled(self, *, available: int = 100, now: float = 0) -> PooledEntry[str]:
        entry = self.dials.pop(0)
        name = f"session {self.state.dials}"
        self.do(self.state.dial_succeeded(entry, name, streams=0, available=available, now=now))
        return entry

    def fail(self, error: Exception | None = None) -> Exception:
        error = error or ConnectFailed("no way")
        self.do(self.state.dial_failed(self.dials.pop(0), error))
        return error

    def update(self, entry: PooledEntry[str], streams: int, available: int, now: float = 0) -> None:
        self.do(self.state.update(entry, streams=streams, available=available, now=now))

    def start_all(self) -> list[PooledEntry[str]]:
        started = [self.state.start(ticket) for ticket in self.woken if ticket.entry is not None]
        self.woken.clear()
        return started


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="max_sessions_per_key must be at least 1, not 0"):
        PoolLimits(max_sessions_per_key=0)
    with pytest.raises(ValueError, match="idle_timeout must be above 0 seconds, not -1"):
        PoolLimits(idle_timeout=-1)
    assert PoolLimits(idle_timeout=math.inf).max_sessions == 500


def test_a_key_is_equal_only_when_all_of_it_is() -> None:
    assert key("a") == key("a")
    assert hash(key("a")) == hash(key("a"))
    assert len({key("a"), key("b"), key("a", expect="somebody"), key("a", source_ip="127.0.0.2"), key("a")}) == 4
    assert "hash" not in repr(key("a"))


def test_first_request_dials_and_the_next_ones_wait_for_that_dial() -> None:
    driver = Driver()
    tickets = driver.requests(5)
    assert len(driver.dials) == 1
    assert driver.state.waiting == 5
    assert driver.dials[0].state is CONNECTING
    assert repr(tickets[0]) == "<Ticket for a:15008: waiting>"
    entry = driver.dialled()
    assert driver.woken == tickets
    assert entry.state is READY
    assert (entry.streams, entry.reserved, entry.used, entry.limit) == (0, 5, 5, 100)
    assert repr(entry) == "<PooledEntry a:15008 ready 0+5/100>"
    assert driver.start_all() == [entry] * 5
    assert (entry.streams, entry.reserved, entry.served) == (5, 0, 5)
    assert (driver.state.dials, driver.state.tunnels, driver.state.reused) == (1, 5, 4)


def test_acquire_takes_a_stream_at_once_while_there_is_room() -> None:
    driver = Driver(max_streams_per_session=2)
    assert driver.state.acquire(A) is None
    ticket = driver.request()
    assert driver.state.acquire(A) is None
    entry = driver.dialled()
    driver.do(driver.state.cancel(ticket, 0))
    assert driver.state.acquire(A) is entry
    assert driver.state.next_deadline() is None
    assert driver.state.acquire(A) is entry
    assert entry.state is FULL
    assert driver.state.acquire(A) is None
    driver.update(entry, streams=1, available=99)
    assert entry.state is READY
    assert driver.state.acquire(A) is entry


def test_a_full_session_comes_back_and_hands_streams_out_in_order() -> None:
    driver = Driver(max_sessions_per_key=1)
    first = driver.requests(2)
    entry = driver.dialled(available=2)
    assert driver.woken == first
    driver.start_all()
    later = driver.requests(2)
    assert entry.state is FULL
    assert driver.dials == []
    driver.update(entry, streams=1, available=1)
    assert driver.woken == later[:1]
    assert entry.state is FULL
    driver.start_all()
    driver.update(entry, streams=0, available=2)
    assert driver.woken == later[1:]
    assert entry.state is READY


def test_dials_go_one_after_another_until_all_are_served() -> None:
    driver = Driver()
    driver.requests(25)
    for left in (15, 5, 0):
        assert len(driver.dials) == 1
        driver.dialled(available=10)
        assert driver.state.waiting == left
    assert driver.dials == []
    assert driver.state.dials == 3


def test_streams_go_to_the_session_with_the_fewest() -> None:
    driver = Driver(max_streams_per_session=4)
    driver.requests(5)
    one = driver.dialled()
    two = driver.dialled()
    driver.start_all()
    driver.update(one, streams=2, available=98)
    assert (one.used, two.used) == (2, 1)
    assert [driver.state.acquire(A) for _ in range(3)] == [two, two, one]


def test_a_limit_that_sinks_sends_the_newest_reservations_back_to_the_head_of_the_queue() -> None:
    driver = Driver(max_sessions_per_key=1)
    tickets = driver.requests(4)
    entry = driver.dialled(available=3)
    assert [t.entry for t in tickets] == [entry, entry, entry, None]
    driver.update(entry, streams=0, available=1)
    assert [t.entry for t in tickets] == [entry, None, None, None]
    assert entry.state is FULL
    driver.woken.clear()
    driver.update(entry, streams=0, available=3)
    assert driver.woken == tickets[1:3]


def test_a_limit_below_what_is_open() -> None:
    driver = Driver(max_sessions_per_key=1)
    driver.requests(4)
    entry = driver.dialled()
    driver.start_all()
    driver.request()
    assert entry.reserved == 1
    driver.update(entry, streams=4, available=-2)
    assert (entry.state, entry.reserved, driver.state.waiting) == (FULL, 0, 1)
    driver.update(entry, streams=2, available=0)
    assert (entry.state, entry.reserved, driver.state.waiting) == (FULL, 0, 1)
    driver.update(entry, streams=1, available=1)
    assert (entry.state, entry.reserved, driver.state.waiting) == (FULL, 1, 0)


def test_a_failed_dial_is_told_to_all_who_wait_and_to_nobody_else() -> None:
    driver = Driver()
    here, there = driver.requests(3, A), driver.request(B)
    error = driver.fail()
    assert [t.error for t in here] == [error] * 3
    assert driver.woken == here
    assert there.error is None
    assert repr(here[0]) == "<Ticket for a:15008: no way>"
    assert list(driver.state.keys) == [B]
    assert driver.state.dials_failed == 1
    assert driver.request(A).error is None
    assert len(driver.dials) == 2


def test_a_dial_that_fails_when_nobody_waits_any_more() -> None:
    driver = Driver()
    ticket = driver.request()
    driver.do(driver.state.cancel(ticket, 0))
    assert len(driver.dials) == 1
    entry = driver.dials[0]
    driver.fail()
    assert driver.state.keys == ()
    assert driver.state.dial_failed(entry, ConnectFailed("again")) == []
    assert driver.state.dials_failed == 1


@pytest.mark.parametrize("position", range(4))
def test_a_cancelled_ticket_only_leaves_the_queue(position: int) -> None:
    driver = Driver()
    tickets = driver.requests(4)
    gone = tickets.pop(position)
    driver.do(driver.state.cancel(gone, 0))
    driver.do(driver.state.cancel(gone, 0))
    entry = driver.dialled()
    assert driver.woken == tickets
    assert entry.reserved == 3
    assert gone.entry is None
    assert gone.error is None


@pytest.mark.parametrize("position", range(3))
def test_a_cancelled_reservation_goes_to_the_next(position: int) -> None:
    driver = Driver(max_sessions_per_key=1)
    tickets = driver.requests(5)
    entry = driver.dialled(available=3)
    driver.do(driver.state.cancel(tickets[position], 0))
    assert tickets[position].entry is None
    assert tickets[3].entry is entry
    assert tickets[4].entry is None
    assert entry.reserved == 3


def test_a_failed_ticket_may_be_cancelled() -> None:
    driver = Driver()
    ticket = driver.request()
    driver.fail()
    assert driver.state.cancel(ticket, 0) == []


def test_a_repeated_request_stands_at_the_head() -> None:
    driver = Driver()
    driver.requests(2)
    again = driver.request(first=True)
    driver.dialled(available=1)
    assert driver.woken == [again]


def test_a_session_that_nobody_waits_for_any_more_stays_until_it_has_been_idle() -> None:
    driver = Driver(idle_timeout=300)
    driver.do(driver.state.cancel(driver.request(), 0))
    entry = driver.dialled(now=10)
    assert entry.state is READY
    assert driver.state.next_deadline() == 310
    assert driver.state.tick(309.9) == []
    driver.do(driver.state.tick(310))
    assert driver.closes == [entry]
    assert entry.state is DRAINING
    assert driver.state.keys == ()
    assert driver.state.acquire(A) is None
    assert driver.state.closed(entry) == []
    assert entry.state is CLOSED
    assert driver.state.entries == ()
    assert driver.state.closed(entry) == []
    assert driver.state.update(entry, streams=0, available=1, now=0) == []
    assert driver.state.retire(entry, streams=0) == []


def test_idle_starts_anew_with_each_use_and_never_under_a_tunnel() -> None:
    driver = Driver(idle_timeout=10)
    driver.request()
    entry = driver.dialled(now=0)
    driver.start_all()
    assert driver.state.tick(1000) == []
    driver.update(entry, streams=0, available=100, now=1000)
    assert driver.state.next_deadline() == 1010
    # Told again without a change, it has still been idle since 1000.
    driver.update(entry, streams=0, available=100, now=1009)
    assert driver.state.next_deadline() == 1010
    assert driver.state.acquire(A) is entry
    assert driver.state.next_deadline() is None
    driver.update(entry, streams=0, available=100, now=1011)
    driver.request(B)
    other = driver.dialled(now=1012)
    driver.do(driver.state.cancel(driver.woken[0], 1012))
    driver.do(driver.state.tick(1022))
    assert driver.closes == [entry, other]


def test_goaway_lets_tunnels_go_on_and_sends_reservations_elsewhere() -> None:
    driver = Driver()
    driver.requests(1)
    old = driver.dialled()
    driver.start_all()
    promised = driver.requests(2)
    assert [t.entry for t in promised] == [old, old]
    driver.do(driver.state.retire(old, streams=1))
    assert old.state is DRAINING
    assert driver.closes == []
    assert [t.entry for t in promised] == [None, None]
    new = driver.dialled()
    assert [t.entry for t in promised] == [new, new]
    driver.do(driver.state.retire(old, streams=1))
    driver.update(old, streams=0, available=0)
    assert driver.closes == [old]
    driver.update(old, streams=0, available=0)
    assert driver.closes == [old]
    driver.do(driver.state.closed(old))
    assert list(driver.state.entries) == [new]


def test_a_session_that_dies_frees_its_place_and_its_reservations_move_on() -> None:
    driver = Driver(max_sessions=1)
    driver.request(A)
    entry = driver.dialled()
    driver.start_all()
    promised = driver.request(A)
    other = driver.request(B)
    assert driver.dials == []
    driver.do(driver.state.closed(entry))
    # B has waited longer for a place than A.
    assert [e.key for e in driver.dials] == [B]
    driver.dialled()
    assert other.entry is not None
    assert promised.entry is None
    assert promised.error is None
    driver.start_all()
    driver.update(driver.state.entries[0], streams=0, available=100)
    assert [e.key for e in driver.dials] == [A]


@pytest.mark.parametrize("how", ["closed", "retire"])
def test_a_peer_that_takes_down_each_new_session_is_not_dialled_for_ever(how: str) -> None:
    driver = Driver(max_streams_per_session=1)
    tickets = driver.requests(2)
    for dials in (1, 2, 3):
        assert driver.state.dials == dials
        entry = driver.dialled(available=0)
        driver.do(driver.state.closed(entry) if how == "closed" else driver.state.retire(entry, streams=0))
    assert [type(t.error) for t in tickets] == [SessionClosed] * 2
    assert driver.dials == []
    assert driver.state.keys == ()
    again = driver.request()
    driver.do(driver.state.closed(driver.dialled(available=0)))
    assert again.error is None
    assert len(driver.dials) == 1


def test_a_tunnel_in_between_and_the_count_starts_anew() -> None:
    driver = Driver(max_streams_per_session=1)
    tickets = driver.requests(2)
    for _ in range(2):
        driver.do(driver.state.closed(driver.dialled(available=0)))
    entry = driver.dialled()
    driver.start_all()
    driver.do(driver.state.closed(entry))
    for _ in range(2):
        driver.do(driver.state.closed(driver.dialled(available=0)))
    assert tickets[1].error is None
    assert len(driver.dials) == 1


def test_a_peer_that_allows_no_stream_is_waited_for_and_not_dialled_again() -> None:
    driver = Driver(idle_timeout=300)
    ticket = driver.request()
    entry = driver.dialled(available=0)
    assert entry.state is FULL
    driver.request()
    assert driver.dials == []
    driver.update(entry, streams=0, available=1)
    assert ticket.entry is entry
    driver.do(driver.state.cancel(ticket, now=20))
    driver.update(entry, streams=0, available=0, now=20)
    driver.do(driver.state.tick(320))
    assert driver.closes == [entry]
    assert len(driver.dials) == 1


def test_refused_streams_lower_what_a_session_takes_until_some_end() -> None:
    driver = Driver(max_streams_per_session=10)
    driver.requests(3)
    entry = driver.dialled()
    driver.start_all()
    promised = driver.request()
    driver.do(driver.state.refused(entry, streams=2, available=98, now=0))
    assert entry.state is FULL
    assert entry.limit == 2
    assert promised.entry is None
    assert len(driver.dials) == 1
    driver.do(driver.state.cancel(promised, 0))
    driver.update(entry, streams=1, available=99)
    assert (entry.state, entry.limit) == (READY, 2)
    # Nothing is open: what it refused then says nothing about now.
    driver.update(entry, streams=0, available=100)
    assert entry.limit == 10


def test_refused_then_the_peer_announces_more() -> None:
    driver = Driver(max_streams_per_session=200)
    driver.requests(3)
    entry = driver.dialled()
    driver.start_all()
    driver.do(driver.state.refused(entry, streams=2, available=98, now=0))
    driver.update(entry, streams=2, available=108)
    assert (entry.state, entry.limit) == (READY, 110)


def test_a_session_that_refuses_its_only_stream_is_retired() -> None:
    driver = Driver()
    driver.request()
    entry = driver.dialled()
    driver.start_all()
    driver.do(driver.state.refused(entry, streams=0, available=100, now=0))
    assert entry.state is DRAINING
    assert driver.closes == [entry]
    driver.do(driver.state.refused(entry, streams=0, available=100, now=0))
    assert driver.closes == [entry]


def test_rotation_retires_what_was_made_before_and_dials_anew() -> None:
    driver = Driver(generation="old")
    driver.request(A)
    old = driver.dialled()
    driver.start_all()
    idle = driver.request(B)
    unused = driver.dialled()
    driver.do(driver.state.cancel(idle, 0))
    waiting = driver.request(C)
    late = driver.dials[0]
    driver.do(driver.state.rotate("new"))
    assert (old.state, unused.state, late.state) == (DRAINING, DRAINING, CLOSED)
    assert driver.closes == [unused]
    assert driver.abandoned == [late]
    assert [entry.generation for entry in driver.dials] == ["new"]
    new = driver.dialled()
    assert waiting.entry is new
    driver.do(driver.state.rotate("new"))
    assert new.state is READY
    assert driver.state.acquire(A) is None
    # The abandoned dial came through all the same.
    driver.do(driver.state.dial_succeeded(late, "late", streams=0, available=100, now=0))
    assert driver.closes == [unused, late]
    assert driver.state.counts == {CONNECTING: 0, READY: 1, FULL: 0, DRAINING: 3}
    driver.do(driver.state.closed(late))
    assert late not in driver.state.entries


def test_at_the_total_limit_the_longest_idle_session_of_another_key_goes() -> None:
    driver = Driver(max_sessions=2)
    for k in (A, B):
        driver.do(driver.state.cancel(driver.request(k), 0))
    first, second = driver.dialled(now=1), driver.dialled(now=2)
    driver.request(C)
    assert driver.closes == [first]
    assert second.state is READY
    assert [entry.key for entry in driver.dials] == [C]
    assert A not in driver.state.keys


def test_at_the_total_limit_connecting_counts_and_others_wait_in_order() -> None:
    driver = Driver(max_sessions=1)
    a, b, c = driver.request(A), driver.request(B), driver.request(C)
    assert [entry.key for entry in driver.dials] == [A]
    entry = driver.dialled()
    assert a.entry is entry
    assert driver.dials == []
    driver.start_all()
    # Its end makes it idle, and idle it has to go.
    driver.update(entry, streams=0, available=100)
    assert driver.closes == [entry]
    assert [entry.key for entry in driver.dials] == [B]
    driver.do(driver.state.cancel(b, 0))
    assert c.entry is None
    # The dial for b belongs to the pool; its session is not wanted and gives its place to c.
    second = driver.dialled()
    assert driver.closes == [entry, second]
    assert [entry.key for entry in driver.dials] == [C]


def test_who_leaves_the_wait_for_a_place_is_not_dialled_for() -> None:
    driver = Driver(max_sessions=1)
    driver.request(A)
    b = driver.request(B)
    c = driver.request(C)
    driver.do(driver.state.cancel(b, 0))
    driver.fail()
    assert [entry.key for entry in driver.dials] == [C]
    assert c.error is None


def test_peers_that_allow_nothing_do_not_take_the_last_place_from_each_other() -> None:
    driver = Driver(max_sessions=1)
    a = driver.request(A)
    entry = driver.dialled(available=0)
    driver.request(B)
    assert driver.dials == []
    assert driver.closes == []
    driver.do(driver.state.cancel(a, 0))
    assert driver.closes == [entry]
    assert [entry.key for entry in driver.dials] == [B]


def test_draining_sessions_do_not_count() -> None:
    driver = Driver(max_sessions=1, max_sessions_per_key=1)
    driver.request()
    entry = driver.dialled()
    driver.start_all()
    driver.do(driver.state.retire(entry, streams=1))
    driver.request()
    assert len(driver.dials) == 1


def test_close_in_every_state() -> None:
    driver = Driver(max_streams_per_session=2, max_sessions=5)
    driver.do(driver.state.cancel(driver.request(A), 0))
    idle = driver.dialled()
    driver.requests(2, B)
    full = driver.dialled()
    driver.start_all()
    driver.requests(1, C)
    draining = driver.dialled()
    driver.start_all()
    driver.do(driver.state.retire(draining, streams=1))
    connecting = [driver.request(C), driver.request(B), driver.request(key("d")), driver.request(key("e"))]
    promised = driver.request(A)
    driver.woken.clear()
    error = SessionClosed("the pool is closed")
    driver.do(driver.state.close(error))
    assert driver.state.closing
    assert [t.error for t in [*connecting, promised]] == [error] * 5
    assert set(driver.woken) == {*connecting, promised}
    assert driver.dials == []
    assert len(driver.abandoned) == 4
    assert driver.closes == [idle]
    driver.update(full, streams=0, available=0)
    driver.update(draining, streams=0, available=0)
    assert driver.closes == [idle, full, draining]
    for entry in driver.closes:
        driver.do(driver.state.closed(entry))
    assert driver.state.entries == ()
    assert driver.state.keys == ()
    assert driver.state.waiting == 0
    assert driver.state.next_deadline() is None


# --- the state machine -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Peer:
    """The other end of a session, as the machine has it."""

    entry: PooledEntry[Peer]
    limit: int
    streams: int = 0
    draining: bool = False
    closed: bool = False
    close_asked: bool = False

    @property
    def available(self) -> int:
        return 0 if self.draining else max(self.limit - self.streams, 0)


KEYS = [A, B, key("a", source_ip="127.0.0.2")]
LIMITS = PoolLimits(max_sessions=3, max_sessions_per_key=2, max_streams_per_session=3, idle_timeout=50)


class PoolMachine(RuleBasedStateMachine):
    """Random life of a pool; the invariants are what a pool promises."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.generation = 0
        self.state: PoolState[Peer] = PoolState(LIMITS, 0)
        self.dialling: list[PooledEntry[Peer]] = []
        self.abandoned: list[PooledEntry[Peer]] = []
        self.peers: list[Peer] = []
        self.live: list[Ticket[Peer]] = []  # asked and neither started nor cancelled nor told an error
        self.untouched: dict[Ticket[Peer], int] = {}  # never revoked, never favoured: strictly first come, first served
        self.order = 0
        self.opened = 0

    def do(self, operation: Callable[[], Sequence[Action[Peer]]]) -> None:
        reserved = {ticket: ticket.entry for ticket in self.live if ticket.entry is not None}
        actions = operation()
        for ticket, entry in reserved.items():
            if ticket.entry is not entry:
                self.untouched.pop(ticket, None)
        self.carry_out(actions)

    def carry_out(self, actions: Sequence[Action[Peer]]) -> None:
        for action in actions:
            match action:
                case Dial(entry):
                    assert entry.state is CONNECTING
                    assert entry.generation == self.generation
                    assert all(other.key != entry.key for other in self.dialling)
                    self.dialling.append(entry)
                case Wake(ticket):
                    assert ticket in self.live
                    assert ticket.entry is not None or ticket.error is not None
                    if ticket.error is not None:
                        self.live.remove(ticket)
                        self.untouched.pop(ticket, None)
                    elif ticket in self.untouched:
                        mine = self.untouched[ticket]
                        for other in self.live:
                            if other.key == ticket.key and self.untouched.get(other, mine) < mine:
                                assert other.entry is not None, "a later ticket was served first"
                case Close(entry):
                    peer = entry.session
                    assert peer.streams == 0
                    assert not peer.close_asked
                    assert entry.state is DRAINING
                    peer.close_asked = True
                case Abandon(entry):
                    self.dialling.remove(entry)
                    self.abandoned.append(entry)

    def tell(self, peer: Peer) -> None:
        if peer.closed:
            self.do(lambda: self.state.closed(peer.entry))
        elif peer.draining:
            self.do(lambda: self.state.retire(peer.entry, streams=peer.streams))
        else:
            self.do(lambda: self.state.update(peer.entry, streams=peer.streams, available=peer.available, now=self.now))

    def open(self, peer: Peer, wanted: PoolKey) -> None:
        assert peer.entry.key == wanted
        assert peer.entry.generation == self.generation
        assert not peer.draining
        assert not peer.closed
        assert not peer.close_asked
        assert peer.streams < min(peer.limit, LIMITS.max_streams_per_session)
        peer.streams += 1
        self.opened += 1

    def usable(self) -> list[Peer]:
        return [peer for peer in self.peers if not peer.closed]

    def busy(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.streams]

    # Requests come in bursts, and calamities are few among them, or the pool would hardly ever be busy.

    @rule(k=st.sampled_from(KEYS), count=st.integers(1, 6), first=st.booleans())
    def request(self, k: PoolKey, count: int, first: bool) -> None:
        for _ in range(count):
            entry = self.state.acquire(k)
            if entry is not None:
                self.open(entry.session, k)
                continue
            ticket, actions = self.state.request(k, None, first=first)
            self.live.append(ticket)
            if not first:
                self.order += 1
                self.untouched[ticket] = self.order
            self.carry_out(actions)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 6))
    def start(self, data: st.DataObject, count: int) -> None:
        tickets = [ticket for ticket in self.live if ticket.entry is not None]
        for ticket in data.draw(st.permutations(tickets))[:count]:
            assert ticket.entry is not None
            peer = ticket.entry.session
            assert self.state.start(ticket) is peer.entry
            self.live.remove(ticket)
            self.untouched.pop(ticket, None)
            self.open(peer, ticket.key)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.live))
        self.live.remove(ticket)
        self.untouched.pop(ticket, None)
        self.do(lambda: self.state.cancel(ticket, self.now))
        assert self.state.cancel(ticket, self.now) == []

    @precondition(lambda self: self.dialling)
    @rule(data=st.data(), limit=st.integers(0, 4))
    def dial_succeeds(self, data: st.DataObject, limit: int) -> None:
        entry = data.draw(st.sampled_from(self.dialling))
        self.dialling.remove(entry)
        self.arrive(entry, limit)

    def arrive(self, entry: PooledEntry[Peer], limit: int) -> None:
        peer = Peer(entry, limit)
        self.peers.append(peer)
        self.do(lambda: self.state.dial_succeeded(entry, peer, streams=0, available=peer.available, now=self.now))

    @precondition(lambda self: self.abandoned)
    @rule(data=st.data(), succeeds=st.booleans())
    def abandoned_dial_ends(self, data: st.DataObject, succeeds: bool) -> None:
        entry = data.draw(st.sampled_from(self.abandoned))
        self.abandoned.remove(entry)
        if succeeds:
            self.arrive(entry, 4)
            assert entry.session.close_asked
        else:
            assert self.state.dial_failed(entry, ConnectFailed("cancelled")) == []

    @precondition(lambda self: self.busy())
    @rule(data=st.data(), count=st.integers(1, 3))
    def streams_end(self, data: st.DataObject, count: int) -> None:
        peer = data.draw(st.sampled_from(self.busy()))
        peer.streams -= min(count, peer.streams)
        self.tell(peer)

    @precondition(lambda self: self.usable())
    @rule(data=st.data(), limit=st.integers(0, 4))
    def limit_changes(self, data: st.DataObject, limit: int) -> None:
        peer = data.draw(st.sampled_from(self.usable()))
        peer.limit = limit
        self.tell(peer)

    @precondition(lambda self: self.busy())
    @rule(data=st.data())
    def stream_is_refused(self, data: st.DataObject) -> None:
        peer = data.draw(st.sampled_from(self.busy()))
        peer.streams -= 1
        self.do(lambda: self.state.refused(peer.entry, streams=peer.streams, available=peer.available, now=self.now))

    @rule(data=st.data(), what=st.sampled_from(["goaway", "death", "no dial", "rotation", "idleness"]))
    def calamity(self, data: st.DataObject, what: str) -> None:
        if what == "rotation":
            self.generation += 1
            self.do(lambda: self.state.rotate(self.generation))
        elif what == "idleness":
            self.now += data.draw(st.floats(0.1, 60))
            self.do(lambda: self.state.tick(self.now))
            deadline = self.state.next_deadline()
            assert deadline is None or deadline > self.now
        elif what == "no dial" and self.dialling:
            entry = data.draw(st.sampled_from(self.dialling))
            waited = [t for t in self.live if t.key == entry.key and t.entry is None]
            error = ConnectFailed("no")
            self.dialling.remove(entry)
            self.do(lambda: self.state.dial_failed(entry, error))
            assert all(t.error is error for t in waited)
        elif self.usable():
            peer = data.draw(st.sampled_from(self.usable()))
            peer.draining = True
            if what == "death":
                peer.closed = True
                peer.streams = 0
            self.tell(peer)

    # --- what always holds ---

    @invariant()
    def counts_add_up(self) -> None:
        state = self.state
        counts = state.counts
        assert sum(counts.values()) == len(state.entries)
        assert counts[CONNECTING] == len(self.dialling)
        active = counts[CONNECTING] + counts[READY] + counts[FULL]
        assert active <= LIMITS.max_sessions
        assert state._active == active
        assert state.tunnels == self.opened
        alive = {peer.entry for peer in self.usable()}
        assert alive == {entry for entry in state.entries if entry.state is not CONNECTING}
        for peer in self.usable():
            assert peer.entry.session is peer
            assert peer.entry.streams == peer.streams
            assert peer.close_asked == (peer.entry.state is DRAINING and peer.streams == 0)
            if peer.draining:
                assert peer.entry.state is DRAINING
        for k in KEYS:
            mine = [e for e in state.entries if e.key == k and e.state is not DRAINING]
            assert len(mine) <= LIMITS.max_sessions_per_key
            assert sum(e.state is CONNECTING for e in mine) <= 1

    @invariant()
    def every_ticket_is_in_exactly_one_place(self) -> None:
        places: dict[Ticket[Peer], int] = {}
        for k, group in self.state._groups.items():
            assert group.sessions or group.queue
            for ticket in group.queue:
                assert ticket.key == k
                assert ticket.entry is None
                assert ticket.error is None
                places[ticket] = places.get(ticket, 0) + 1
        for entry in self.state.entries:
            for ticket in entry.reservations:
                assert ticket.key == entry.key
                assert ticket.entry is entry
                assert entry.state in (READY, FULL)
                places[ticket] = places.get(ticket, 0) + 1
        assert places == dict.fromkeys(self.live, 1)
        assert self.state.waiting == sum(t.entry is None for t in self.live)

    @invariant()
    def never_more_streams_than_allowed(self) -> None:
        for peer in self.usable():
            entry = peer.entry
            if entry.state in (READY, FULL):
                room = min(peer.limit, LIMITS.max_streams_per_session) - entry.used
                assert entry.reserved == 0 or room >= 0
                assert entry.state is not READY or room > 0
                assert (entry.used == 0) == (entry in self.state._idle)
            else:
                assert entry not in self.state._idle

    @invariant()
    def nobody_waits_without_need(self) -> None:
        state = self.state
        evictable = [e for e in state._idle if not any(t.key == e.key and t.entry is None for t in self.live)]
        for k in {t.key for t in self.live if t.entry is None}:
            mine = [e for e in state.entries if e.key == k and e.state is not DRAINING]
            assert all(e.state is not READY for e in mine)
            full_house = state._active >= LIMITS.max_sessions and not evictable
            assert (
                any(e.state is CONNECTING for e in mine)
                or len(mine) >= LIMITS.max_sessions_per_key
                or any(e.used == 0 for e in mine)
                or (full_house and k in state._blocked)
            )
        for k in state._blocked:
            assert any(t.key == k and t.entry is None for t in self.live)

    def teardown(self) -> None:
        error = SessionClosed("closed")
        waiting = list(self.live)
        self.do(lambda: self.state.close(error))
        assert self.dialling == []
        assert all(ticket.error is error for ticket in waiting)
        assert all(self.state.dial_failed(entry, error) == [] for entry in self.abandoned)
        for peer in self.usable():
            if peer.streams:
                peer.streams = 0
                self.tell(peer)
            assert peer.close_asked
            peer.closed = True
            self.tell(peer)
        state = self.state
        assert (state.entries, state.keys, state.waiting, state._active) == ((), (), 0, 0)
        assert (state._idle, state._blocked) == ({}, {})
        assert state.next_deadline() is None


TestPoolMachine = PoolMachine.TestCase
