"""What `Authorizer` remembers, for how long, and what it costs."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from support.policies import exact, flow, policy, rule

from hbone.mesh import Action, Match, MeshSnapshot, Scope, Workload
from hbone.rbac import Authorizer, PolicyFailed, Verdict, _index, authorize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hbone.mesh import AuthorizationPolicy

WORKLOAD = Workload(uid="u", name="stock-0", namespace="shop")
FITS = rule(Match(destination_ports=(8080,)))


def many(count: int, *, namespace: str = "shop", scope: Scope = Scope.NAMESPACE) -> list[AuthorizationPolicy]:
    """Policies that deny a principal each, none of them ours."""
    return [
        policy(
            f"p{number}",
            Action.DENY,
            *(rule(Match(principals=(exact(f"{namespace}{number}-{which}"),))) for which in range(10)),
            namespace=namespace,
            scope=scope,
        )
        for number in range(count)
    ]


def steps(work: Callable[[], object]) -> int:
    """How many calls work makes, of Python and of C."""
    count = 0

    def watch(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("scope", Scope)
def test_an_evaluation_takes_as_many_steps_for_many_policies_as_for_few(scope: Scope) -> None:
    counts = set()
    for size in (1, 10, 300):
        policies = many(size, scope=scope)
        workload = replace(WORKLOAD, authorization_policies=tuple(each.key for each in policies))
        snapshot = MeshSnapshot.build(policies=policies)
        authorizer = Authorizer()
        assert authorizer.authorize(snapshot, workload, flow()).allowed
        counts.add(steps(lambda a=authorizer, s=snapshot, w=workload: a.authorize(s, w, flow())))
    assert len(counts) == 1


def pauses(authorizer: Authorizer, snapshot: MeshSnapshot, workloads: list[Workload] | None = None) -> int:
    count = 0

    def pause() -> None:
        nonlocal count
        count += 1

    authorizer.prepare(snapshot, workloads, pause=pause)
    return count


@pytest.mark.parametrize("workloads", [None, [WORKLOAD]])
def test_what_is_prepared_is_not_worked_out_again(workloads: list[Workload] | None) -> None:
    authorizer = Authorizer()
    snapshot = MeshSnapshot.build(policies=many(300))
    assert pauses(authorizer, snapshot, workloads) > 10
    prepared = steps(lambda: authorizer.authorize(snapshot, WORKLOAD, flow()))
    assert prepared < 200
    assert pauses(authorizer, snapshot, workloads) < 5


def test_preparing_again_takes_over_what_did_not_change() -> None:
    authorizer = Authorizer()
    snapshot = MeshSnapshot.build(policies=[*many(300), *many(2, namespace="web")])
    first = pauses(authorizer, snapshot)
    authorizer.authorize(snapshot, WORKLOAD, flow())
    changed = snapshot.with_changes(upsert=[policy("p1", Action.DENY, FITS, namespace="web")])
    assert pauses(authorizer, changed) < first / 2
    assert authorizer.authorize(changed, WORKLOAD, flow()).allowed
    assert not authorizer.authorize(changed, replace(WORKLOAD, namespace="web"), flow()).allowed
    # One that is the same in all but itself is another one.
    again = changed.with_changes(upsert=[policy("p1", Action.DENY, FITS)])
    pauses(authorizer, again)
    assert not authorizer.authorize(again, WORKLOAD, flow()).allowed


def test_what_is_prepared_counts_only_when_it_is_in_force() -> None:
    authorizer = Authorizer()
    now = MeshSnapshot.build(policies=[policy("p", Action.ALLOW, FITS)])
    coming = now.with_changes(upsert=[policy("q", Action.DENY, FITS)])
    never = now.with_changes(upsert=[policy("r", Action.DENY, FITS)])
    assert authorizer.authorize(now, WORKLOAD, flow()).allowed
    authorizer.prepare(never)
    authorizer.prepare(coming)
    assert authorizer.authorize(now, WORKLOAD, flow()).policy == "shop/p"
    assert authorizer.authorize(coming, WORKLOAD, flow()).policy == "shop/q"
    assert authorizer.authorize(never, WORKLOAD, flow()).policy == "shop/r"
    assert authorizer.authorize(now, WORKLOAD, flow()).policy == "shop/p"


def test_preparing_twice_costs_once() -> None:
    authorizer = Authorizer()
    coming = MeshSnapshot.build(policies=many(300))
    first = pauses(authorizer, coming)
    assert pauses(authorizer, coming) < first / 10
    assert authorizer.authorize(coming, WORKLOAD, flow()).allowed


def test_preparing_in_a_thread() -> None:
    authorizer = Authorizer()
    now = MeshSnapshot.build(policies=[policy("p", Action.DENY, FITS)])
    assert not authorizer.authorize(now, WORKLOAD, flow()).allowed
    coming = now.with_changes(upsert=many(100, namespace="web"), remove_policies=["shop/p"])
    seen: list[Verdict] = []

    def prepare() -> None:
        # In the middle of it, the other thread decides by what is in force.
        def pause() -> None:
            if len(seen) < 10:
                asked.set()
                assert answered.wait(60)
                answered.clear()

        authorizer.prepare(coming, pause=pause)
        done.set()
        asked.set()

    asked, answered, done = threading.Event(), threading.Event(), threading.Event()
    thread = threading.Thread(target=prepare)
    thread.start()
    while True:
        assert asked.wait(60)
        asked.clear()
        if done.is_set():
            break
        seen.append(authorizer.authorize(now, WORKLOAD, flow()))
        answered.set()
    thread.join()
    assert len(seen) == 10
    assert not any(verdict.allowed for verdict in seen)
    assert authorizer.authorize(coming, WORKLOAD, flow()).allowed


def test_a_uid_that_is_another_workload_now() -> None:
    authorizer = Authorizer()
    snapshot = MeshSnapshot.build(
        policies=[policy("p", Action.DENY, FITS, scope=Scope.WORKLOAD_SELECTOR), policy("q", Action.DENY, FITS)]
    )
    web = replace(WORKLOAD, namespace="web")
    assert authorizer.authorize(snapshot, WORKLOAD, flow()).policy == "shop/q"
    assert authorizer.authorize(snapshot, web, flow()).policy is None
    assert authorizer.authorize(snapshot, replace(web, authorization_policies=("shop/p",)), flow()).policy == "shop/p"
    assert authorizer.authorize(snapshot, web, flow()).policy is None


def test_many_workloads_are_forgotten_and_worked_out_again() -> None:
    authorizer = Authorizer()
    policies = [policy(f"p{n}", Action.DENY, FITS, scope=Scope.WORKLOAD_SELECTOR) for n in range(2)]
    snapshot = MeshSnapshot.build(policies=policies)
    for number in range(5000):
        workload = replace(WORKLOAD, uid=f"u{number}", authorization_policies=(f"shop/p{number % 3}",))
        assert authorizer.authorize(snapshot, workload, flow()).allowed is (number % 3 == 2)


def test_lists_of_selected_policies_are_bounded() -> None:
    policies = [policy(f"p{n}", Action.DENY, FITS, scope=Scope.WORKLOAD_SELECTOR) for n in range(92)]
    snapshot = MeshSnapshot.build(policies=policies)
    authorizer = Authorizer()
    for a in range(92):
        for b in range(a, 92):
            names = (f"shop/p{a}", f"shop/p{b}")
            workload = replace(WORKLOAD, uid=f"{a}-{b}", authorization_policies=names)
            assert authorizer.authorize(snapshot, workload, flow()).policy == min(names)


def test_it_says_what_authorize_says_when_nothing_is_prepared() -> None:
    snapshot = MeshSnapshot.build(policies=many(50))
    assert Authorizer().authorize(snapshot, WORKLOAD, flow()) == authorize(snapshot, WORKLOAD, flow())


# === policies that nothing can be made of ===


class Broken:
    """Makes an index fail for one policy, as a fault in it would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.asked: list[str] = []
        real = _index._Builder.place

        def place(builder: Any, key: str, policy: AuthorizationPolicy) -> Iterator[None]:
            self.asked.append(key)
            if key == name:
                raise KeyError("surprise")
            return real(builder, key, policy)

        monkeypatch.setattr(_index._Builder, "place", place)


@pytest.mark.parametrize("prepared", [True, False])
def test_a_policy_that_cannot_be_evaluated_is_named_and_concerns_its_workloads_only(
    monkeypatch: pytest.MonkeyPatch, prepared: bool
) -> None:
    broken = Broken(monkeypatch, "shop/p1")
    elsewhere = replace(WORKLOAD, uid="v", namespace="bank")
    snapshot = MeshSnapshot.build([], [], [*many(3), *many(2, namespace="bank")])
    authorizer = Authorizer()
    if prepared:
        with pytest.raises(PolicyFailed):
            authorizer.prepare(snapshot, [WORKLOAD, elsewhere])
        assert broken.asked == ["shop/p0", "shop/p1", "bank/p0", "bank/p1"]
    for _ in range(3):
        with pytest.raises(PolicyFailed) as caught:
            authorizer.authorize(snapshot, WORKLOAD, flow())
        assert (caught.value.policy, caught.value.why) == ("shop/p1", "KeyError('surprise')")
        assert str(caught.value) == "policy shop/p1 cannot be evaluated: KeyError('surprise')"
        assert authorizer.authorize(snapshot, elsewhere, flow()) == authorize(snapshot, elsewhere, flow())
    assert broken.asked.count("shop/p0") == 1  # it fails at once the next time
    right = snapshot.with_changes(remove_policies=["shop/p1"])
    authorizer.prepare(right)
    assert authorizer.authorize(right, WORKLOAD, flow()) == authorize(right, WORKLOAD, flow())


def test_one_that_is_selected_fails_for_whom_it_is_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    Broken(monkeypatch, "shop/p1")
    snapshot = MeshSnapshot.build([], [], many(2, scope=Scope.WORKLOAD_SELECTOR))
    authorizer = Authorizer()
    authorizer.prepare(snapshot)
    selected = replace(WORKLOAD, authorization_policies=("shop/p0", "shop/p1"))
    for _ in range(2):
        with pytest.raises(PolicyFailed, match="policy shop/p1 cannot be evaluated"):
            authorizer.authorize(snapshot, selected, flow())
    one = replace(WORKLOAD, uid="v", authorization_policies=("shop/p0",))
    assert authorizer.authorize(snapshot, one, flow()) == authorize(snapshot, one, flow())


def test_whatever_is_prepared_when_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken(monkeypatch, "bank/p0")
    snapshot = MeshSnapshot.build([], [], [*many(2, namespace="bank"), *many(2)])
    authorizer = Authorizer()
    with pytest.raises(PolicyFailed, match="policy bank/p0 "):
        authorizer.prepare(snapshot)
    assert authorizer.authorize(snapshot, WORKLOAD, flow()) == authorize(snapshot, WORKLOAD, flow())
    assert broken.asked == ["bank/p0", "shop/p0", "shop/p1"]
