"""Many identities' SVIDs: when each is asked for, in which order, and what there is meanwhile. Time is trio's clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from hbone.certs import LocalCA, SvidManager, SvidState, SvidStatus, local_ca_issuer
from hbone.certs._manager import retry_delay
from hbone.errors import CertificateUnavailable, HboneError
from hbone.identity import SpiffeIdentity

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

    from hbone.tls import Svid

START = datetime(2030, 1, 1, tzinfo=UTC)
HOUR = 3600.0


def identity(name: str) -> SpiffeIdentity:
    return SpiffeIdentity.parse(f"spiffe://cluster.local/ns/shop/sa/{name}")


A, B, C, D = (identity(name) for name in "abcd")


class Authority:
    """A CA that takes its time, says no when told to, and keeps a record."""

    def __init__(self, *, ttl: float = HOUR, takes: float = 0.0) -> None:
        self._ca = LocalCA.in_memory()
        self._began = trio.current_time()
        self.slept = 0.0
        """What trio's clock has missed."""
        self.ttl = ttl
        self.takes = takes
        self.refusing: dict[SpiffeIdentity, str] = {}
        self.asked: list[tuple[float, SpiffeIdentity]] = []
        self.running = 0
        self.most_running = 0

    def time(self) -> float:
        return trio.current_time() - self._began

    def now(self) -> datetime:
        return START + timedelta(seconds=self.time() + self.slept)

    async def issue(self, identity: SpiffeIdentity) -> Svid:
        self.asked.append((round(self.time(), 6), identity))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await trio.sleep(self.takes)
        finally:
            self.running -= 1
        if identity in self.refusing:
            raise HboneError(self.refusing[identity])
        return self._ca.issue(identity, ttl=timedelta(seconds=self.ttl), now=self.now())

    def times(self, identity: SpiffeIdentity) -> list[float]:
        return [when for when, who in self.asked if who == identity]


class Running:
    """A manager that runs beside the test."""

    def __init__(
        self,
        ca: Authority,
        *,
        issue: Callable[[SpiffeIdentity], Awaitable[Svid]] | None = None,
        concurrency: int = 8,
        timeout: float = 30.0,
        chance: float = 0.5,
    ) -> None:
        self.told: list[SvidStatus] = []
        self.manager = SvidManager(
            issue or ca.issue,
            concurrency=concurrency,
            timeout=timeout,
            on_change=self.told.append,
            now=ca.now,
            chance=lambda: chance,
        )
        self._nursery = trio.open_nursery()

    async def __aenter__(self) -> SvidManager:
        nursery = await self._nursery.__aenter__()
        self.cancel = nursery.cancel_scope.cancel
        await nursery.start(self.manager.run)
        return self.manager

    async def __aexit__(self, *exc: object) -> None:
        self.cancel()
        await self._nursery.__aexit__(*exc)  # type: ignore[arg-type]


def state(manager: SvidManager, identity: SpiffeIdentity) -> str:
    (found,) = (str(status) for status in manager.states() if status.identity == identity)
    return found


def refusal(source: object) -> str:
    with pytest.raises(CertificateUnavailable) as caught:
        source.current()  # type: ignore[attr-defined]
    return str(caught.value)


# === ahead, and renewed ===


async def test_what_is_wanted_is_there_before_it_is_asked_for(autojump_clock: MockClock) -> None:
    ca = Authority(takes=2)
    async with Running(ca) as manager:
        early = manager.source(A)
        assert early.identity == A
        assert "not served here" in refusal(early)
        manager.want([A, B])
        await trio.sleep(1)
        assert [str(status) for status in manager.states()] == ["Initializing", "Initializing"]
        assert "has not come yet" in refusal(early)
        await trio.sleep(1.5)
        assert [status.state for status in manager.states()] == [SvidState.AVAILABLE, SvidState.AVAILABLE]
        svid = early.current()
        assert svid.identity == A
        assert manager.source(A).current() is svid is await manager.get(A)
        assert sorted(ca.asked, key=str) == [(0, A), (0, B)]


async def test_each_is_renewed_when_half_of_its_time_is_over(autojump_clock: MockClock) -> None:
    ca = Authority(ttl=HOUR, takes=1)
    async with Running(ca) as manager:
        manager.want([A])
        first = await manager.get(A)
        (status,) = manager.states()
        assert status.next_attempt == START + timedelta(seconds=1 + HOUR / 2)
        await trio.sleep(1.6 * HOUR)
        second = manager.source(A).current()
        assert second is not first
        assert len(ca.times(A)) == 4
        assert ca.times(A)[1] == pytest.approx(HOUR / 2, abs=2)
        assert ca.times(A)[2] == pytest.approx(HOUR, abs=4)


async def test_sources_hand_out_the_newest(autojump_clock: MockClock) -> None:
    ca = Authority()
    async with Running(ca) as manager:
        source = manager.source(A)
        first = await manager.get(A)
        assert source.current() is first
        await trio.sleep(0.6 * HOUR)
        assert source.current() is not first


async def test_svids_that_hardly_live_are_not_asked_for_all_the_time(autojump_clock: MockClock) -> None:
    ca = Authority(ttl=1)
    async with Running(ca) as manager:
        manager.want([A])
        await trio.sleep(100)
        assert len(ca.times(A)) <= 101


async def test_a_machine_that_slept_renews_when_it_wakes(autojump_clock: MockClock) -> None:
    """The wall clock jumps, trio's does not."""
    ca = Authority()
    async with Running(ca) as manager:
        await manager.get(A)
        ca.slept = 48 * HOUR
        assert "expired at 2030-01-01 01:00:00 UTC, a new one is asked for" in refusal(manager.source(A))
        await trio.sleep(61)
        assert len(ca.times(A)) == 2
        assert manager.source(A).current().not_after > ca.now()


@pytest.mark.parametrize("valid", [True, False])
async def test_a_new_one_can_be_asked_for_before_its_time(autojump_clock: MockClock, valid: bool) -> None:
    ca = Authority()
    if not valid:
        ca.refusing[A] = "no"
    async with Running(ca) as manager:
        manager.want([A])
        await trio.sleep(0.5)
        ca.takes = 10
        manager.renew(A)
        manager.renew(B)  # not wanted
        await trio.sleep(1)
        assert str(manager.states()[0]) == ("Available" if valid else "Unavailable: no")
        ca.refusing.clear()
        manager.renew(A)  # what is under way may know nothing of the reason
        await trio.sleep(25)
        assert ca.asked == [(0, A), (0.5, A), (10.5, A)]
        assert state(manager, A) == "Available"


async def test_renewals_that_fail_can_be_seen_before_the_end(autojump_clock: MockClock) -> None:
    """In the status of each identity, and in the numbers of all."""
    ca = Authority(ttl=HOUR)
    async with Running(ca) as manager:

        def numbers() -> tuple[int, ...]:
            summary = manager.summary()
            states = [(status.state, status.renewal_fails) for status in manager.states()]
            counts = (summary.available, summary.renewal_fails, summary.initializing, summary.unavailable)
            assert counts == (
                states.count((SvidState.AVAILABLE, False)),
                states.count((SvidState.AVAILABLE, True)),
                states.count((SvidState.INITIALIZING, False)),
                states.count((SvidState.UNAVAILABLE, False)),
            )
            return counts

        assert manager.summary().first_expiry is None
        manager.want([A, B])
        assert numbers() == (0, 0, 2, 0)
        await trio.sleep(0.1 * HOUR)
        assert numbers() == (2, 0, 0, 0)
        assert manager.summary().first_expiry == START + timedelta(seconds=HOUR)
        ca.refusing[A] = "no"
        await trio.sleep(0.5 * HOUR)
        assert numbers() == (1, 1, 0, 0)
        assert state(manager, A) == "Available"
        assert manager.summary().first_expiry == START + timedelta(seconds=HOUR)
        await trio.sleep(0.5 * HOUR)
        assert numbers() == (1, 0, 0, 1)
        summary = manager.summary()
        assert summary.first_expiry == manager.source(B).current().not_after
        assert (summary.requests, summary.requests_failed) == (len(ca.asked), len(ca.times(A)) - 1)
        ca.refusing.clear()
        await trio.sleep(200)
        assert numbers() == (2, 0, 0, 0)


# === order and bound ===


async def test_so_many_at_once_and_not_more(autojump_clock: MockClock) -> None:
    ca = Authority(takes=1)
    async with Running(ca, concurrency=8) as manager:
        manager.want(identity(str(number)) for number in range(20))
        await trio.sleep(10)
        assert ca.most_running == 8
        assert [when for when, _ in ca.asked] == [0] * 8 + [1] * 8 + [2] * 4
        assert {status.state for status in manager.states()} == {SvidState.AVAILABLE}


async def test_who_is_waited_for_comes_first_then_the_new_then_renewals(autojump_clock: MockClock) -> None:
    ca = Authority(ttl=100, takes=0)
    async with Running(ca, concurrency=1) as manager:
        manager.want([A])
        await trio.sleep(49.5)
        ca.takes = 10
        manager.want([A, B, C, D])  # A becomes due while B is asked for
        await trio.sleep(0.1)
        assert ca.asked[-1] == (49.5, B)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(manager.get, D)
        await trio.sleep(30)
        assert [who for _, who in ca.asked] == [A, B, D, C, A]
        assert [when for when, _ in ca.asked][1:] == [49.5, 59.5, 69.5, 79.5]


async def test_a_handshake_that_cannot_wait_hurries_too(autojump_clock: MockClock) -> None:
    ca = Authority(takes=1)
    async with Running(ca, concurrency=1) as manager:
        manager.want([A, B, C])
        refusal(manager.source(C))
        await trio.sleep(5)
        assert [who for _, who in ca.asked] == [C, A, B]


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 7), st.sampled_from(["want", "get", "forget"])), max_size=12)
)
def test_every_wanted_one_comes_in_any_order_of_events(events: list[tuple[int, int, str]]) -> None:
    async def run() -> None:
        ca = Authority(takes=3)
        wanted: dict[SpiffeIdentity, None] = {}
        async with Running(ca, concurrency=2) as manager, trio.open_nursery() as nursery:

            async def get(one: SpiffeIdentity) -> None:
                try:
                    assert (await manager.get(one)).identity == one
                except CertificateUnavailable:
                    assert one not in wanted

            for pause, number, what in events:
                one = identity(str(number))
                if what == "get":
                    wanted[one] = None
                    nursery.start_soon(get, one)
                    await trio.testing.wait_all_tasks_blocked()
                    continue
                if what == "want":
                    wanted[one] = None
                else:
                    wanted.pop(one, None)
                manager.want(wanted)
                await trio.sleep(pause / 10)
            await trio.sleep(60)
            assert {status.identity: str(status) for status in manager.states()} == dict.fromkeys(wanted, "Available")
        assert ca.most_running <= 2

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


# === failures ===


async def test_what_fails_is_tried_again_later_and_later(autojump_clock: MockClock) -> None:
    ca = Authority()
    ca.refusing[A] = "the CA is away"
    async with Running(ca) as manager:
        manager.want([A])
        await trio.sleep(1000)
        gaps = [later - earlier for earlier, later in zip(ca.times(A), ca.times(A)[1:], strict=False)]
        assert gaps == pytest.approx([1, 2, 4, 8, 16, 32, 64] + [125] * 6)
        assert state(manager, A) == "Unavailable: the CA is away"
        assert refusal(manager.source(A)) == f"no certificate for {A}: the CA is away"
        del ca.refusing[A]
        await trio.sleep(150)
        assert state(manager, A) == "Available"
        assert manager.states()[0].problem is None


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_the_delay_doubles_within_its_spread(failures: int, chance: float) -> None:
    assert 0.8 <= retry_delay(failures, chance) <= 150
    assert retry_delay(failures, 0) <= retry_delay(failures, chance) <= retry_delay(failures, 1)
    assert retry_delay(failures, 1) == pytest.approx(1.5 * retry_delay(failures, 0))
    assert retry_delay(1, chance) <= retry_delay(failures, chance) * 1.0001
    if failures <= 7:
        assert retry_delay(failures, chance) == pytest.approx(2 ** (failures - 1) * (0.8 + 0.4 * chance))


@pytest.mark.parametrize(("chance", "second"), [(0.0, 0.8), (1.0, 1.2)])
async def test_the_spread_comes_from_outside(autojump_clock: MockClock, chance: float, second: float) -> None:
    ca = Authority()
    ca.refusing[A] = "no"
    async with Running(ca, chance=chance) as manager:
        manager.want([A])
        await trio.sleep(1.5)
        assert ca.times(A) == [0, pytest.approx(second)]


async def test_a_success_starts_the_delays_anew(autojump_clock: MockClock) -> None:
    ca = Authority(ttl=100)
    ca.refusing[A] = "no"
    async with Running(ca) as manager:
        manager.want([A])
        await trio.sleep(6.9)  # asked at 0, 1, 3
        del ca.refusing[A]
        await trio.sleep(1)  # and at 7
        assert state(manager, A) == "Available"
        ca.refusing[A] = "no"
        await trio.sleep(51)  # due at 57
        assert ca.times(A) == pytest.approx([0, 1, 3, 7, 57, 58])


async def test_a_valid_one_stays_while_its_renewal_fails_and_no_longer(autojump_clock: MockClock) -> None:
    ca = Authority(ttl=HOUR)
    async with Running(ca) as manager:
        manager.want([A])
        svid = await manager.get(A)
        ca.refusing[A] = "the CA is away"
        await trio.sleep(0.99 * HOUR)
        assert manager.source(A).current() is svid is await manager.get(A)
        (status,) = manager.states()
        assert (str(status), status.problem) == ("Available", "the CA is away")
        await trio.sleep(0.02 * HOUR)
        assert state(manager, A) == "Unavailable: the CA is away"
        message = refusal(manager.source(A))
        assert "expired at 2030-01-01 01:00:00 UTC" in message
        assert "the CA is away" in message
        with pytest.raises(CertificateUnavailable, match="the CA is away"):
            await manager.get(A)
        del ca.refusing[A]
        await trio.sleep(150)
        assert state(manager, A) == "Available"


async def test_who_waits_gets_the_failure_at_once_and_does_not_shorten_the_delay(autojump_clock: MockClock) -> None:
    ca = Authority(takes=1)
    ca.refusing[A] = "no such workload"
    async with Running(ca) as manager:
        with pytest.raises(CertificateUnavailable, match="no such workload"):
            await manager.get(A)
        assert ca.time() == 1
        with pytest.raises(CertificateUnavailable, match="no such workload"):
            await manager.get(A)
        assert ca.time() == 1
        await trio.sleep(1.5)
        assert ca.times(A) == [0, 2]


async def test_what_a_bad_issuer_does_is_a_failure(autojump_clock: MockClock) -> None:
    ca = Authority()
    ways: dict[SpiffeIdentity, str] = {
        A: "the CA issued a certificate for spiffe://cluster.local/ns/shop/sa/d",
        B: "the CA issued a certificate that expired at 2029-12-31 23:59:59 UTC",
        C: "ZeroDivisionError('oh')",
        D: "no answer within 5 s",
    }

    async def issue(one: SpiffeIdentity) -> Svid:
        if one == A:
            return await ca.issue(D)
        if one == B:
            return ca._ca.issue(B, ttl=timedelta(seconds=1), now=START - timedelta(seconds=2))
        if one == C:
            raise ZeroDivisionError("oh")
        return await trio.sleep_forever()

    async with Running(ca, issue=issue, timeout=5) as manager:
        manager.want(ways)
        await trio.sleep(5.5)
        assert {status.identity: str(status) for status in manager.states()} == {
            one: f"Unavailable: {problem}" for one, problem in ways.items()
        }


# === leaving ===


async def test_what_is_not_wanted_any_more_is_forgotten(autojump_clock: MockClock) -> None:
    ca = Authority(takes=1)
    async with Running(ca) as manager:
        manager.want([A, B])
        source = manager.source(A)
        await trio.sleep(2)
        assert source.current().identity == A
        manager.want([B, C])
        assert "not served here" in refusal(source)
        assert [status.identity for status in manager.states()] == [B, C]
        await trio.sleep(HOUR)
        assert ca.times(A) == [0]
        manager.want([A])
        await trio.sleep(2)
        assert source.current().identity == A


async def test_a_request_for_a_forgotten_one_is_given_up_and_waiters_told(
    autojump_clock: MockClock,
) -> None:
    ca = Authority(takes=100)
    async with Running(ca, concurrency=1, timeout=1000) as manager:
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(CertificateUnavailable, match="not served here any more"):
                    await manager.get(A)

            nursery.start_soon(wait)
            await trio.sleep(1)
            manager.want([B])
        assert ca.time() == 1
        await trio.sleep(0.5)
        assert ca.running == 1
        manager.want([B, A])  # anew, and not the one that was given up
        assert (await manager.get(A)).identity == A
        assert ca.times(A) == [0, 101]


async def test_a_cancelled_waiter_only_leaves(autojump_clock: MockClock) -> None:
    ca = Authority(takes=10)
    async with Running(ca) as manager:
        with trio.move_on_after(1) as scope:
            await manager.get(A)
        assert scope.cancelled_caught
        svids = []

        async def wait() -> None:
            svids.append(await manager.get(A))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)
        assert svids[0] is svids[1]
        assert ca.asked == [(0, A)]


async def test_get_is_a_checkpoint_also_when_it_does_not_wait(autojump_clock: MockClock) -> None:
    async with Running(Authority()) as manager:
        await manager.get(A)
        with trio.testing.assert_checkpoints():
            await manager.get(A)


async def test_waiters_are_told_when_the_manager_stops(autojump_clock: MockClock) -> None:
    ca = Authority(takes=100)
    running = Running(ca)
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(CertificateUnavailable, match="the proxy stops"):
                await running.manager.get(A)

        nursery.start_soon(wait)
        async with running:
            await trio.sleep(1)
    assert ca.running == 0


async def test_it_can_be_told_what_is_wanted_before_it_runs(autojump_clock: MockClock) -> None:
    ca = Authority()
    running = Running(ca)
    running.manager.want([A])
    async with running as manager:
        assert (await manager.get(A)).identity == A


# === who listens ===


async def test_changes_are_told(autojump_clock: MockClock) -> None:
    ca = Authority(ttl=100)
    running = Running(ca)
    async with running as manager:
        manager.want([A])
        await trio.sleep(1)
        ca.refusing[A] = "no"
        await trio.sleep(50)
        assert [(str(status), status.problem) for status in running.told][:2] == [
            ("Available", None),
            ("Available", "no"),
        ]
        assert "1 identities" in repr(manager)


async def test_a_listener_that_fails_stops_nothing(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    def fail(status: SvidStatus) -> None:
        raise ZeroDivisionError

    ca = Authority()
    manager = SvidManager(ca.issue, on_change=fail, now=ca.now)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        await manager.get(A)
        await trio.sleep(HOUR)
        assert len(ca.times(A)) == 2
        nursery.cancel_scope.cancel()
    assert "on_change" in caplog.text


async def test_a_local_ca_as_issuer(autojump_clock: MockClock) -> None:
    ca = LocalCA.in_memory()
    manager = SvidManager(local_ca_issuer(ca, ttl=timedelta(hours=1)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        svid = await manager.get(A)
        assert (svid.identity, svid.bundles[A.trust_domain]) == (A, ca.roots)
        other = SpiffeIdentity.parse("spiffe://elsewhere/x")
        with pytest.raises(CertificateUnavailable, match="cannot issue"):
            await manager.get(other)
        nursery.cancel_scope.cancel()


async def test_a_local_ca_signs_one_at_a_time(autojump_clock: MockClock) -> None:
    """With room for others in between, however many are asked for at once."""
    ca = LocalCA.in_memory()
    signed = 0

    def issue(*args: Any, **options: Any) -> Any:
        nonlocal signed
        signed += 1
        return LocalCA.issue(ca, *args, **options)

    ca.issue = issue  # type: ignore[method-assign]
    identities = [SpiffeIdentity.parse(f"spiffe://cluster.local/ns/shop/sa/{number}") for number in range(30)]
    manager = SvidManager(local_ca_issuer(ca))
    manager.want(identities)
    assert (manager.unanswered, set(manager.identities)) == (30, set(identities))
    most = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        while manager.unanswered:
            before = signed
            await trio.lowlevel.checkpoint()
            most = max(most, signed - before)
        nursery.cancel_scope.cancel()
    assert (signed, most) == (30, 1)


async def test_how_many_are_unanswered(autojump_clock: MockClock) -> None:
    ca = Authority()
    manager = SvidManager(ca.issue, now=ca.now)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        manager.want([A, B])
        assert manager.unanswered == 2
        manager.want([B, C])  # one that never came is forgotten
        assert manager.unanswered == 2
        await manager.get(B)
        await manager.get(C)
        assert manager.unanswered == 0
        manager.want([])
        assert (manager.unanswered, set(manager.identities)) == (0, set())
        nursery.cancel_scope.cancel()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="concurrency"):
        SvidManager(local_ca_issuer(LocalCA.in_memory()), concurrency=0)
