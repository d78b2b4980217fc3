"""The table of connections, and the watch over those that policy has let in: alone, and in nodes."""

from __future__ import annotations

import logging
import random
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from support.dataplanes import (
    STOCK,
    TD,
    VIP,
    Refused,
    echo,
    member,
    read_to_end,
    samples,
    shop,
    total,
    traffic,
    until,
)
from support.meshes import policy
from support.tcp import receive_exactly

from hbone import ConnectionPool, Endpoint, ErrorCode, HBONEClient, PolicyDenied, SpiffeIdentity, TunnelReset
from hbone.mesh import Action, Match, MeshSnapshot, MeshState, Scope, StringMatch, StringMatchKind
from hbone.proxy import _connections, _node_inbound
from hbone.proxy._connections import ConnectionTable, InboundConnection
from hbone.rbac import Authorizer, Flow, PolicyFailed, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.dataplanes import Captures, DataPlane

    from hbone.certs import LocalCA
    from hbone.mesh import AuthorizationPolicy, Workload

HELLO = b"hello world"
CART_ID = SpiffeIdentity.parse(f"{TD}/shop/sa/cart")


def principal(name: str) -> Match:
    return Match(principals=(StringMatch(StringMatchKind.EXACT, f"cluster.local/ns/shop/sa/{name}"),))


def deny(*names: str, key: str = "shop/no", **fields: Any) -> AuthorizationPolicy:
    """Denies these; everybody when there are none."""
    rules = ((tuple(map(principal, names)),),) if names else ((),)
    return policy(key, rules=rules, **fields)


def allow(*names: str, key: str = "shop/yes", **fields: Any) -> AuthorizationPolicy:
    return policy(key, action=Action.ALLOW, rules=((tuple(map(principal, names)),),), **fields)


NO_PLAIN_TEXT = policy("shop/strict", rules=(((Match(not_principals=(StringMatch(StringMatchKind.PRESENCE),)),),),))


# === alone ===


class Bench:
    """A table over a mesh of one workload, and connections to it."""

    def __init__(self, *policies: AuthorizationPolicy, authorizer: Authorizer | None = None, **options: Any) -> None:
        self.workload = member("stock", "10.0.0.2")
        self.mesh = MeshState(MeshSnapshot.build([self.workload], [], policies))
        self.verdicts: list[Verdict] = []
        self.table = ConnectionTable(self.mesh, authorizer or Authorizer(), on_verdict=self.verdicts.append, **options)
        self.closed: list[InboundConnection] = []

    def connection(self, who: str | None = "cart", *, workload: Workload | None = None) -> InboundConnection:
        identity = SpiffeIdentity.parse(f"{TD}/shop/sa/{who}") if who is not None else None
        source, target = Endpoint.parse("10.0.0.1:40000"), Endpoint.parse("10.0.0.2:80")
        flow = Flow(source_ip=source.ip, source_identity=identity, destination_ip=target.ip, destination_port=80)
        connection = InboundConnection(
            workload=workload or self.workload,
            source=source,
            original=None,
            actual=target,
            protocol="HBONE",
            flow=flow,
            close=lambda: self.closed.append(connection),
        )
        return connection

    def admit(self, who: str | None = "cart") -> InboundConnection:
        connection = self.connection(who)
        assert self.table.admit(connection).allowed
        return connection

    def change(self, *upsert: Any, **options: Any) -> None:
        self.mesh.replace(self.mesh.snapshot.with_changes(upsert=upsert, **options))


def test_registered_before_it_is_judged() -> None:
    """Whatever happens while it is judged finds it in the table."""
    bench = Bench()
    seen: list[bool] = []
    connection = bench.connection()

    class Looking(Authorizer):
        def authorize(self, *args: Any) -> Verdict:
            seen.append(connection in bench.table.inbound)
            return super().authorize(*args)

    bench.table = ConnectionTable(bench.mesh, Looking())
    assert bench.table.admit(connection).allowed
    assert seen == [True]
    bench.table.release(connection)
    bench.table.release(connection)
    assert not bench.table.inbound


def test_one_that_is_denied_is_in_the_table_until_it_is_released() -> None:
    bench = Bench(deny())
    connection = bench.connection()
    verdict = bench.table.admit(connection)
    assert (verdict.allowed, verdict.reason) == (False, "explicitly denied by: shop/no")
    assert list(bench.table.inbound) == [connection]
    assert (bench.closed, connection.revoked) == ([], None)


def test_outbound_connections_are_shown() -> None:
    table = Bench().table
    first, second = object(), object()
    for one in (first, second):
        table.add_outbound(one)  # type: ignore[arg-type]
    assert list(table.outbound) == [first, second]
    for _ in range(2):
        table.remove_outbound(first)  # type: ignore[arg-type]
    assert list(table.outbound) == [second]


async def test_what_is_not_allowed_any_more_is_closed() -> None:
    bench = Bench()
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.table.watch)
        cart, till, plain = bench.admit("cart"), bench.admit("till"), bench.admit(None)
        bench.change(deny("till"))
        await bench.table.settled()
        assert bench.closed == [till]
        assert till.revoked is not None
        assert till.revoked.reason == "explicitly denied by: shop/no"
        bench.change(NO_PLAIN_TEXT)
        await bench.table.settled()
        assert bench.closed == [till, plain]
        bench.change(allow("cart"))
        await bench.table.settled()
        bench.change(allow("other", key="shop/yes"))
        await bench.table.settled()
        assert bench.closed == [till, plain, cart]  # each once
        assert cart.revoked is not None
        assert cart.revoked.reason == "allow policies exist, but none allowed"
        assert [verdict.allowed for verdict in bench.verdicts] == [True, True, True, False, False, False]
        nursery.cancel_scope.cancel()


async def test_what_has_been_released_is_not_closed() -> None:
    bench = Bench()
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.table.watch)
        bench.table.release(bench.admit())
        bench.change(deny())
        await bench.table.settled()
        assert bench.closed == []
        nursery.cancel_scope.cancel()


async def test_a_workload_that_is_selected_by_a_policy_now() -> None:
    """The newest version of the workload counts; one that has left the mesh stays as it was."""
    bench = Bench(deny(key="shop/selected", scope=Scope.WORKLOAD_SELECTOR))
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.table.watch)
        connection = bench.admit()
        bench.change(remove_workloads=[bench.workload.uid])
        await bench.table.settled()
        assert bench.closed == []
        assert connection.workload is bench.workload
        selected = replace(bench.workload, authorization_policies=("shop/selected",))
        bench.change(selected)
        await bench.table.settled()
        assert bench.closed == [connection]
        assert connection.workload is selected
        nursery.cancel_scope.cancel()


async def test_a_whole_new_mesh() -> None:
    """As a file that was read again: other objects, and no list of changes."""
    bench = Bench(deny("till"))
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.table.watch)
        connection = bench.admit()
        bench.mesh.replace(MeshSnapshot.build([replace(bench.workload)], [], [deny("till"), deny("other")]))
        await bench.table.settled()
        assert bench.closed == []
        bench.mesh.replace(MeshSnapshot.build([replace(bench.workload)], [], [deny("cart")]))
        await bench.table.settled()
        assert bench.closed == [connection]
        nursery.cancel_scope.cancel()


async def test_nothing_is_closed_without_the_watch() -> None:
    bench = Bench()
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.table.watch)
        nursery.cancel_scope.cancel()
    bench.admit()
    bench.change(deny())
    await trio.testing.wait_all_tasks_blocked()
    assert bench.closed == []
    assert not bench.mesh._subscribers


async def test_settled_waits_for_all_changes() -> None:
    bench = Bench()
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.table.watch)
        connections = [bench.admit() for _ in range(10)]
        await bench.table.settled()
        bench.change(deny("till"))
        for step in (deny("cart", key="shop/a"), deny("till"), deny("cart", key="shop/b")):
            bench.change(step)
        await bench.table.settled()
        assert bench.closed == connections
        nursery.cancel_scope.cancel()


# --- in slices


class Ticks(trio.abc.Instrument):
    """Counts turns of the event loop, and tells how long the longest took."""

    def __init__(self) -> None:
        self.steps = 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a millisecond later."""
    now = iter(range(10**9))
    monkeypatch.setattr(_connections.time, "perf_counter", lambda: next(now) / 1000)


async def test_ten_thousand_are_judged_in_slices(slow_clock: None) -> None:
    """With room for others in between."""
    bench = Bench()
    for _ in range(10_000):
        bench.table.admit(bench.connection())
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        await nursery.start(bench.table.watch)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(others)
        bench.change(deny("till"))
        await bench.table.settled()
        assert not bench.closed
        assert turns >= 10_000 // 6
        before = turns
        bench.change(deny("cart"))
        await bench.table.settled()
        assert len(bench.closed) == 10_000
        assert turns - before >= 10_000 // 6
        nursery.cancel_scope.cancel()


async def test_a_mesh_that_never_rests(slow_clock: None) -> None:
    """Each round is finished: those at the end of the table have their turn too."""
    bench = Bench()
    connections = [bench.admit(f"w{number}") for number in range(100)]
    changes = 0

    async def churn() -> None:
        nonlocal changes
        while True:
            await trio.lowlevel.checkpoint()
            changes += 1
            bench.change(deny("w99", f"x{changes}"))

    async with trio.open_nursery() as nursery:
        await nursery.start(bench.table.watch)
        nursery.start_soon(churn)
        while not bench.closed:
            await trio.lowlevel.checkpoint()
        assert bench.closed == [connections[99]]
        assert changes < 200
        nursery.cancel_scope.cancel()


async def test_the_newest_mesh_counts_within_a_round(slow_clock: None) -> None:
    """What is allowed again before its turn comes stays open."""
    bench = Bench()
    connections = [bench.admit() for _ in range(100)]
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.table.watch)
        bench.change(deny("cart"))
        while not bench.closed:
            await trio.lowlevel.checkpoint()
        closed = len(bench.closed)
        assert closed < 100
        bench.change(remove_policies=["shop/no"])
        await bench.table.settled()
        assert bench.closed == connections[:closed]
        nursery.cancel_scope.cancel()


# --- what is told


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "hbone.proxy.connections"]


async def test_decisions_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "hbone.proxy.connections")
    bench = Bench(deny("till"))
    who = f"{TD}/shop/sa/{{}} from 10.0.0.1:40000 to shop/stock-0 port 80"
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.table.watch)
        bench.admit()
        bench.admit(None)
        bench.table.admit(bench.connection("till"))
        assert lines(caplog) == [
            f"policy: {who.format('cart')}: allowed (no allow policies)",
            "policy: a plain-text peer from 10.0.0.1:40000 to shop/stock-0 port 80: allowed (no allow policies)",
            f"policy: {who.format('till')}: denied (explicitly denied by: shop/no)",
        ]
        caplog.clear()
        bench.change(deny("other", key="shop/more"))
        await bench.table.settled()
        assert lines(caplog) == [f"policy: {who.format('till')}: denied (explicitly denied by: shop/no)"]
        caplog.clear()
        bench.change(deny("cart", key="shop/more"))
        await bench.table.settled()
        assert lines(caplog) == [f"policy: {who.format('cart')}: denied (explicitly denied by: shop/more)"]
        nursery.cancel_scope.cancel()


async def test_what_a_dry_run_would_do_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """When a connection comes, and of open ones when it changes."""
    caplog.set_level(logging.INFO, "hbone.proxy.connections")
    bench = Bench(deny(dry_run=True), allow("cart", dry_run=True), log_level=logging.INFO)
    who = f"policy: {TD}/shop/sa/cart from 10.0.0.1:40000 to shop/stock-0 port 80"
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.table.watch)
        bench.admit()
        assert lines(caplog) == [
            f"{who}: allowed (no allow policies)",
            f"{who} would be denied by shop/no",
            f"{who} would be allowed by shop/yes",
        ]
        caplog.clear()
        bench.change(deny("other", key="shop/else"))
        await bench.table.settled()
        assert lines(caplog) == []
        bench.change(deny("cart", key="shop/more", dry_run=True))
        await bench.table.settled()
        assert lines(caplog) == [
            f"{who} would be denied by shop/more",
            f"{who} would be denied by shop/no",
            f"{who} would be allowed by shop/yes",
        ]
        caplog.clear()
        bench.change(remove_policies=["shop/more", "shop/no", "shop/yes"])
        await bench.table.settled()
        assert lines(caplog) == []
        bench.change(deny(dry_run=True))
        await bench.table.settled()
        assert lines(caplog) == [f"{who} would be denied by shop/no"]
        assert len(bench.verdicts) == 1
        assert not bench.closed
        nursery.cancel_scope.cancel()


def test_nothing_is_told_when_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hbone.proxy.connections")
    bench = Bench(deny(dry_run=True))
    bench.table = ConnectionTable(bench.mesh, Authorizer())
    assert bench.table.admit(bench.connection()).allowed
    assert lines(caplog) == []


class Faulty(Authorizer):
    """Cannot judge some."""

    def __init__(self, *names: str, policy: str | None = None) -> None:
        super().__init__()
        self.names = set(names)
        self._policy = policy

    def authorize(self, snapshot: Any, workload: Workload, flow: Flow) -> Verdict:
        identity = flow.source_identity
        if (identity.service_account if identity is not None else None) in self.names:
            raise PolicyFailed(self._policy, "ouch") if self._policy is not None else ZeroDivisionError("ouch")
        return super().authorize(snapshot, workload, flow)


def errors(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (None, "policies cannot be evaluated: ZeroDivisionError('ouch')"),
        ("shop/x", "policy shop/x cannot be evaluated: ouch"),
    ],
)
async def test_who_cannot_be_judged_is_not_let_in(
    caplog: pytest.LogCaptureFixture, policy: str | None, reason: str
) -> None:
    """Nor may it stay; all others are judged as ever."""
    bench = Bench(authorizer=(authorizer := Faulty(policy=policy)))
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.table.watch)
        cart, till, keeper = (bench.admit(name) for name in ("cart", "till", "keeper"))
        authorizer.names |= {"till", "thief"}
        bench.change(deny("keeper"))
        await bench.table.settled()
        assert bench.closed == [till, keeper]
        assert till.revoked == Verdict(allowed=False, policy=policy, reason=reason)
        thief = bench.connection("thief")
        assert bench.table.admit(thief) == till.revoked
        assert bench.verdicts[-1] == till.revoked
        assert [verdict.allowed for verdict in bench.verdicts] == [True, True, True, False, False, False]
        first, second = errors(caplog)
        assert first.getMessage() == (
            f"policy: {TD}/shop/sa/till from 10.0.0.1:40000 to shop/stock-0 port 80: denied ({reason})"
        )
        # The stack once for each picture of the mesh.
        assert (first.exc_info is not None, second.exc_info) == (True, None)
        authorizer.names.clear()
        bench.admit("thief")
        bench.change(deny("cart", key="shop/no-cart"))
        await bench.table.settled()
        assert bench.closed == [till, keeper, cart]  # it has gone on
        nursery.cancel_scope.cancel()


async def test_what_is_told_cannot_stop_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()

    def on_verdict(verdict: Verdict) -> None:
        if not verdict.allowed:
            raise ZeroDivisionError

    bench.table = ConnectionTable(bench.mesh, Authorizer(), on_verdict=on_verdict)
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.table.watch)
        connections = [bench.admit(name) for name in ("cart", "till")]
        bench.change(deny())
        await bench.table.settled()
        assert bench.closed == connections
        assert len(errors(caplog)) == 2
        nursery.cancel_scope.cancel()


# === in nodes ===


def verdicts(plane: DataPlane) -> dict[tuple[str, str], float]:
    return {
        (sample.labels["verdict"], sample.labels["dry_run"]): sample.value
        for sample in samples(plane.metrics, "hbone_policy_verdicts")
    }


CHANGES: dict[str, Callable[[MeshSnapshot], MeshSnapshot]] = {
    "a new policy": lambda mesh: mesh.with_changes(upsert=[deny("cart")]),
    "a policy of all": lambda mesh: mesh.with_changes(upsert=[deny("cart", key="istio/no", scope=Scope.GLOBAL)]),
    "an allow policy for others": lambda mesh: mesh.with_changes(upsert=[allow("till")]),
    "the workload selects a policy": lambda mesh: mesh.with_changes(
        upsert=[
            replace(mesh.workloads["lab//Pod/shop/stock-0"], authorization_policies=("bank/no",)),
        ]
    ),
    "a whole new mesh": lambda mesh: MeshSnapshot.build(
        [replace(each) for each in mesh.workloads.values()],
        [replace(each) for each in mesh.services.values()],
        [deny("cart")],
    ),
}
SELECTABLE = deny("cart", key="bank/no", scope=Scope.WORKLOAD_SELECTOR)


@pytest.mark.parametrize("change", CHANGES)
async def test_an_open_tunnel_is_closed(ca: LocalCA, change: str) -> None:
    """With resets, not with ends: at the peer, and at both applications."""
    async with shop(ca, SELECTABLE, habit=None) as it, await it.near.connect(VIP, 80) as near:
        far = await it.app.accept()
        await near.send_all(HELLO)
        assert await receive_exactly(far, len(HELLO)) == HELLO
        it.mesh.replace(CHANGES[change](it.mesh.snapshot))
        await it.far.context.connections.settled()
        assert await read_to_end(near) == (b"", "reset")
        assert await read_to_end(far) == (b"", "reset")
        out, inn = await it.near.log.next(), await it.far.log.next()
        assert inn.error is not None
        assert inn.error.startswith("connection closed due to policy change: ")
        assert (inn.level, inn.bytes_recv) == ("error", 11)
        assert (out.error, out.reset) == (None, "the peer reset the tunnel: CONNECT_ERROR")
        await it.at_rest()
        counts = traffic(it.far.metrics)
        assert counts == {
            ("destination", "opened"): 1,
            ("destination", "received"): 11,
            ("destination", "closed DENY"): 1,
        }
        assert verdicts(it.far) == {("allow", "false"): 1, ("deny", "false"): 1}


@pytest.mark.parametrize("when", ["open", "half closed by the peer", "half closed by the application"])
@pytest.mark.parametrize("stalled", [False, True], ids=["", "nobody reads"])
async def test_whatever_state_a_tunnel_is_in(ca: LocalCA, when: str, stalled: bool) -> None:
    """The peer sees a reset with an error, and the application a TCP reset; at once, also when neither reads."""
    async with shop(ca, habit=None) as it:
        svid = ca.issue(CART_ID)
        async with HBONEClient.connect(STOCK, it.port, svid=svid) as client:
            tunnel = await client.open_tunnel(f"{STOCK}:{it.app.port}")
            far = await it.app.accept()
            if stalled:
                await tunnel.send_all(bytes(tunnel.statistics().send_window))  # far more than an application is sent
                await trio.testing.wait_all_tasks_blocked(0.01)
            if when == "half closed by the peer":
                await tunnel.send_eof()
            elif when == "half closed by the application":
                await far.send_eof()
                assert await tunnel.receive_some() == b""
            if not stalled and when == "half closed by the peer":
                assert await far.receive_some() == b""
            it.mesh.replace(it.mesh.snapshot.with_changes(upsert=[deny()]))
            await it.far.context.connections.settled()
            await until(lambda: not it.far.context.connections.inbound)
            # The direction that had ended well has ended well; the other one shows it.
            use = send_on(tunnel) if when == "half closed by the application" else tunnel.receive_some()
            with pytest.raises(trio.BrokenResourceError) as caught:
                await use
            assert isinstance(caught.value.__cause__, TunnelReset)
            assert caught.value.__cause__.error_code == ErrorCode.CONNECT_ERROR
            if when != "half closed by the peer" or stalled:
                assert (await read_to_end(far))[1] == "reset"
            else:  # it has had its end already
                with pytest.raises(trio.BrokenResourceError):
                    await send_on(far)
            await it.at_rest()
            assert total(it.far.metrics, "closed", response_flags="DENY") == 1


async def send_on(stream: trio.abc.SendStream) -> None:
    while True:
        await stream.send_all(HELLO)


async def test_one_that_is_forbidden_while_its_application_is_dialled(
    ca: LocalCA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was allowed, and is not any more when the application answers: 401, and the application sees a reset."""
    real, dialling, go_on = _node_inbound.connect_tcp, trio.Event(), trio.Event()

    async def connect_tcp(*args: Any, **options: Any) -> Any:
        dialling.set()
        await go_on.wait()
        return await real(*args, **options)

    monkeypatch.setattr(_node_inbound, "connect_tcp", connect_tcp)
    async with shop(ca, habit=None) as it, trio.open_nursery() as nursery:

        async def connect() -> None:
            with pytest.raises(Refused, match="403"):
                await it.near.connect(VIP, 80, way="http")

        nursery.start_soon(connect)
        await dialling.wait()
        it.mesh.replace(it.mesh.snapshot.with_changes(upsert=[deny()]))
        await it.far.context.connections.settled()
        go_on.set()
        line = await it.far.log.next()
        assert line.error == "connection closed due to policy change: explicitly denied by: shop/no"
        await it.at_rest()
        assert traffic(it.far.metrics) == {("destination", "opened"): 1, ("destination", "closed DENY"): 1}
        assert await read_to_end(await it.app.accept()) == (b"", "reset")


async def test_one_that_is_over_when_it_is_forbidden(ca: LocalCA) -> None:
    """The bytes are through, and the log says so."""
    async with shop(ca, habit=echo) as it:
        assert await it.near.ask(VIP, 80) == HELLO
        await it.at_rest()
        it.mesh.replace(it.mesh.snapshot.with_changes(upsert=[deny()]))
        await it.far.context.connections.settled()
        assert [record.error for record in it.far.log.records] == [None]


async def test_only_those_that_are_forbidden(ca: LocalCA) -> None:
    """Two peers, one of them denied; the other one's tunnel and session go on."""
    async with shop(ca, habit=None) as it:
        target = f"{STOCK}:{it.app.port}"
        async with (
            HBONEClient.connect(STOCK, it.port, svid=ca.issue(CART_ID)) as good,
            HBONEClient.connect(STOCK, it.port, svid=ca.issue(f"{TD}/shop/sa/till")) as bad,
        ):
            kept = await good.open_tunnel(target)
            behind = await it.app.accept()
            lost = await bad.open_tunnel(target)
            it.mesh.replace(it.mesh.snapshot.with_changes(upsert=[allow("cart")]))
            await it.far.context.connections.settled()
            assert await read_to_end(lost) == (b"", "reset")
            with pytest.raises(PolicyDenied):
                await bad.open_tunnel(target)
            await kept.send_all(HELLO)
            assert await receive_exactly(behind, len(HELLO)) == HELLO
            await kept.send_eof()
            await behind.send_eof()
            assert await read_to_end(kept) == (b"", "eof")


async def test_one_that_cannot_be_judged_any_more(
    ca: LocalCA, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is closed, and refused when it comes again; the other peer's tunnel and the node go on."""
    async with shop(ca, habit=None) as it:
        target = f"{STOCK}:{it.app.port}"
        async with (
            HBONEClient.connect(STOCK, it.port, svid=ca.issue(CART_ID)) as good,
            HBONEClient.connect(STOCK, it.port, svid=ca.issue(f"{TD}/shop/sa/till")) as bad,
        ):
            kept = await good.open_tunnel(target)
            behind = await it.app.accept()
            lost = await bad.open_tunnel(target)
            faulty = Faulty("till", policy="shop/x")
            monkeypatch.setattr(it.far.context.authorizer, "authorize", faulty.authorize)
            it.mesh.replace(it.mesh.snapshot.with_changes(upsert=[deny("nobody")]))
            await it.far.context.connections.settled()
            assert await read_to_end(lost) == (b"", "reset")
            why = "policy shop/x cannot be evaluated: ouch"
            line = await it.far.log.next()
            assert (line.level, line.error) == ("error", f"connection closed due to policy change: {why}")
            with pytest.raises(PolicyDenied):
                await bad.open_tunnel(target)
            assert (await it.far.log.next()).error == f"connection closed due to policy rejection: {why}"
            assert len(errors(caplog)) == 2
            faulty.names.clear()
            again = await bad.open_tunnel(target)
            for tunnel, there in ((kept, behind), (again, await _last(it))):
                await tunnel.send_all(HELLO)
                assert await receive_exactly(there, len(HELLO)) == HELLO
                await tunnel.send_eof()
                await there.send_eof()
                assert await read_to_end(tunnel) == (b"", "eof")
            await until(lambda: total(it.far.metrics, "closed") == 4)
            assert total(it.far.metrics, "closed", response_flags="DENY") == 2


async def _last(it: Any) -> trio.SocketStream:
    """The application's end of the tunnel that was opened last: that of the one before it has been reset."""
    await it.app.accept()
    stream: trio.SocketStream = await it.app.accept()
    return stream


async def test_a_failure_that_nobody_has_thought_of_is_no_success(ca: LocalCA, monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop(ca, habit=echo) as it:
        monkeypatch.setattr(it.far.context.connections, "admit", lambda _: 1 / 0)
        with pytest.raises(Refused, match="503"):
            await it.near.ask(VIP, 80, way="http")
        line = await it.far.log.next()
        assert (line.level, line.error) == ("error", "unexpected: ZeroDivisionError('division by zero')")
        await it.at_rest()
        assert total(it.far.metrics, "failed", response_flags="CONNECT") == 1


# --- a race


async def test_policies_that_change_while_a_thousand_connect(ca: LocalCA) -> None:
    """1 000 opens while policies flip many times, seen from the outside.

    In the end nothing that policy denies is open, and nothing was closed after the last time that it was allowed.
    """
    opens, last_flip = 1000, 900
    names = ("cart", "till", "batch")
    draw = random.Random(11)
    denied: set[str] = set()
    flip = 0
    allowed_since = dict.fromkeys(names, 0)
    asked: list[_Asked] = []

    async with shop(ca, habit=hold) as it, AsyncExitStack() as stack:
        table = it.far.context.connections
        target, via = f"{STOCK}:{it.app.port}", Endpoint.parse(f"{STOCK}:{it.port}")
        pools = {
            name: await stack.enter_async_context(ConnectionPool(ca.issue(f"{TD}/shop/sa/{name}"))) for name in names
        }

        async def connect(one: _Asked) -> None:
            try:
                async with await pools[one.name].open_tunnel(target, via=via) as tunnel:
                    one.state = "open"
                    await tunnel.receive_some()
            except PolicyDenied:
                one.state = "refused"
            except trio.BrokenResourceError:
                one.state = "cut"

        async with trio.open_nursery() as nursery:
            for number in range(opens):
                one = _Asked(names[number % 3], flip)
                asked.append(one)
                nursery.start_soon(connect, one)
                await until(lambda: sum(not one.state for one in asked) < 30)  # so many are on their way
                if number % 15 == 0 and number <= last_flip:
                    flip += 1
                    now = {name for name in names if draw.random() < 0.5} if number < last_flip else {"till"}
                    allowed_since |= dict.fromkeys(denied - now, flip)
                    denied = now
                    it.mesh.replace(it.mesh.snapshot.with_changes(upsert=[deny(*denied, "nobody")]))
            await table.settled()
            await until(lambda: all(one.state for one in asked))
            await table.settled()

            def states(name: str) -> Counter[str]:
                return Counter(one.state for one in asked if one.name == name)

            await until(lambda: "open" not in states("till"))
            await until(lambda: not any(each.revoked for each in table.inbound))
            open_here = Counter(each.flow.source_identity.service_account for each in table.inbound)
            assert open_here == +Counter({name: states(name)["open"] for name in names})
            for name in names:
                assert states(name)["refused"] > 10
                assert states(name)["cut"] > 10
            for name in ("cart", "batch"):
                # Asked for after the last change that allowed it again: neither refused nor cut.
                assert {one.state for one in asked if one.name == name and one.flip >= allowed_since[name]} <= {"open"}
                assert states(name)["open"] > 5
            nursery.cancel_scope.cancel()
        await it.at_rest()
        assert total(it.far.metrics, "opened") == total(it.far.metrics, "closed") == opens


class _Asked:
    """One of them."""

    def __init__(self, name: str, flip: int) -> None:
        self.name = name
        self.flip = flip
        self.state = ""


async def hold(stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


# --- plain text


async def test_plain_text_that_is_not_allowed_any_more(ca: LocalCA, captures: Captures) -> None:
    async with shop(ca, habit=None) as it:
        proxy = await it.far.nursery.start(it.far.plaintext.serve, "127.0.0.1", 0)
        async with await captures.dial(proxy, f"{STOCK}:{it.app.port}") as near:
            far = await it.app.accept()
            await near.send_all(HELLO)
            assert await receive_exactly(far, len(HELLO)) == HELLO
            it.mesh.replace(it.mesh.snapshot.with_changes(upsert=[NO_PLAIN_TEXT]))
            await it.far.context.connections.settled()
            assert await read_to_end(near) == (b"", "reset")
            assert await read_to_end(far) == (b"", "reset")
            line = await it.far.log.next()
            assert line.error == "connection closed due to policy change: explicitly denied by: shop/strict"
            await it.at_rest()
            assert total(it.far.metrics, "closed", response_flags="DENY") == 1
