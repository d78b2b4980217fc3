"""Whatever the policies and the flow: the three ways to decide say what the tables say."""

from __future__ import annotations

import random
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st
from support.policies import any_flows, any_policies, any_workloads, exact, naive, naive_matches

from hbone.identity import SpiffeIdentity
from hbone.mesh import (
    Action,
    AuthorizationPolicy,
    Match,
    MeshSnapshot,
    Scope,
    ServiceAccount,
    StringMatch,
    StringMatchKind,
    Workload,
)
from hbone.rbac import Authorizer, ChangeKind, Flow, authorize, explain_verdict

if TYPE_CHECKING:
    from hbone.rbac import Explanation, MatchFinding, Verdict


def plain(verdict: Verdict) -> dict[str, object]:
    return {
        "allowed": verdict.allowed,
        "policy": verdict.policy,
        "reason": verdict.reason,
        "dry_run": [(found.policy, found.action.value) for found in verdict.dry_run],
    }


def snapshot_of(policies: dict[str, AuthorizationPolicy]) -> MeshSnapshot:
    return MeshSnapshot.build(policies=policies.values())


@given(any_policies, any_workloads, st.lists(any_flows, min_size=1, max_size=5))
def test_all_ways_to_decide_say_what_the_tables_say(
    policies: dict[str, AuthorizationPolicy], workload: Workload, flows: list[Flow]
) -> None:
    snapshot = snapshot_of(policies)
    authorizer = Authorizer()
    for flow in flows:
        wanted = naive(policies, workload, flow)
        assert plain(authorize(snapshot, workload, flow)) == wanted
        assert plain(authorizer.authorize(snapshot, workload, flow)) == wanted
        explanation = explain_verdict(snapshot, workload, flow)
        assert plain(explanation.verdict) == wanted
        for finding in explanation.policies:
            assert finding.matched is naive_matches(policies[finding.policy], flow)


@given(st.lists(st.tuples(any_policies, st.booleans()), min_size=2, max_size=4), any_workloads, any_flows)
def test_one_authorizer_follows_whatever_comes(
    changes: list[tuple[dict[str, AuthorizationPolicy], bool]], workload: Workload, flow: Flow
) -> None:
    """Each snapshot has all the policies of those before it, but for what it changes, prepared ahead or not."""
    authorizer = Authorizer()
    snapshot = MeshSnapshot.build()
    kept: dict[str, AuthorizationPolicy] = {}
    for policies, prepared in changes:
        snapshot = snapshot.with_changes(upsert=policies.values())
        kept |= policies
        if prepared:
            authorizer.prepare(snapshot, [workload])
        for moment in (workload, replace(workload, authorization_policies=())):
            assert plain(authorizer.authorize(snapshot, moment, flow)) == naive(kept, moment, flow)


@given(any_policies, any_workloads, any_flows)
def test_an_explanation_holds(policies: dict[str, AuthorizationPolicy], workload: Workload, flow: Flow) -> None:
    explanation = explain_verdict(snapshot_of(policies), workload, flow)
    for finding in explanation.policies:
        assert finding.matched is any(rule.matched for rule in finding.rules)
        assert finding.decides is (finding.policy == explanation.verdict.policy)
        for rule in finding.rules:
            assert rule.matched is all(clause.matched for clause in rule.clauses)
            for clause in rule.clauses:
                assert clause.matched is (not clause.matches or any(match.matched for match in clause.matches))
                for match in clause.matches:
                    check_match(match)
    check_changes(explanation, policies, workload, flow)
    assert list(explanation.lines())
    assert explanation.to_dict()["allowed"] is explanation.verdict.allowed


def check_match(match: MatchFinding) -> None:
    assert match.matched is (bool(match.fields) and all(field.holds for field in match.fields))
    for field in match.fields:
        assert field.holds is ((field.fits is None) is field.field.startswith("not"))
        assert field.fits is None or field.fits in field.values


def check_changes(
    explanation: Explanation, policies: dict[str, AuthorizationPolicy], workload: Workload, flow: Flow
) -> None:
    """What is said to change the verdict does, and where nothing is said, nothing does."""
    said = {finding.policy: finding for finding in explanation.policies}
    for change in explanation.changes:
        if change.kind is ChangeKind.REMOVE:
            rest = {key: policy for key, policy in policies.items() if key not in change.policies}
            assert naive(rest, workload, flow)["allowed"] is change.allowed
        elif change.kind is ChangeKind.ENFORCE:
            (key,) = change.policies
            enforced = policies | {key: replace(policies[key], dry_run=False)}
            assert naive(enforced, workload, flow)["allowed"] is change.allowed is not explanation.verdict.allowed
        elif change.rule:
            (key,) = change.policies
            assert not said[key].matched
            assert change.allowed is not explanation.verdict.allowed
            rule = said[key].rules[change.rule - 1]
            holding = {f for clause in rule.clauses for match in clause.matches for f in match.fields if f.holds}
            assert change.fields
            assert not holding & set(change.fields)
            for clause in rule.clauses:
                assert clause.matched or any(
                    match.fields and {f for f in match.fields if not f.holds} <= set(change.fields)
                    for match in clause.matches
                )
        else:
            assert all(said[key].matched and said[key].action is Action.DENY for key in change.policies)
            assert all(field.holds for field in change.fields)
    if not explanation.changes:
        assert explanation.verdict.allowed
        assert explanation.verdict.policy is None


# Hypothesis' policies are few, to be readable. Of many, the values that are rare and those that are common are kept in
# different ways.


class Chance:
    """Policies, flows and workloads, as many as wanted, from one seed."""

    def __init__(self, seed: int, *, values: int) -> None:
        self._random = random.Random(seed)
        self._values = values

    def number(self) -> int:
        """Small ones more often."""
        return int(self._values * self._random.random() ** 3)

    def text(self) -> StringMatch:
        text = self.principal()
        at = self._random.randrange(len(text))
        match self._random.randrange(8):
            case 0:
                return StringMatch(StringMatchKind.PREFIX, text[:at])
            case 1:
                return StringMatch(StringMatchKind.SUFFIX, text[at:])
            case 2:
                return StringMatch(StringMatchKind.PRESENCE)
        return exact(text)

    def principal(self) -> str:
        return f"cluster.local/ns/n{self.number()}/sa/a{self.number()}"

    def namespace(self) -> StringMatch:
        return exact(f"n{self.number()}")

    def account(self) -> ServiceAccount:
        return ServiceAccount(namespace=f"n{self.number()}", service_account=f"a{self.number()}")

    def ip(self) -> IPv4Address | IPv6Address:
        number = self.number()
        if self._random.random() < 0.7:
            return IPv4Address((10 << 24) + number * 997)
        return IPv6Address((0x20010DB8 << 96) + number * 9_999_991**4)

    def network(self) -> IPv4Network | IPv6Network:
        ip = self.ip()
        length = self._random.randrange(ip.max_prefixlen // 4, ip.max_prefixlen + 1)
        if ip.version == 4:
            return IPv4Network((ip, length), strict=False)
        return IPv6Network((ip, length), strict=False)

    def port(self) -> int:
        return 8000 + self.number()

    def match(self) -> Match:
        r = self._random
        makers = {
            "namespaces": self.namespace,
            "service_accounts": self.account,
            "principals": self.text,
            "source_ips": self.network,
            "destination_ips": self.network,
            "destination_ports": self.port,
        }
        chosen = r.sample(sorted(makers), r.randrange(1, 4))
        fields = {
            ("not_" if r.random() < 0.4 else "") + name: tuple(makers[name]() for _ in range(r.randrange(1, 5)))
            for name in chosen
        }
        return Match(**fields)

    def policy(self, number: int) -> AuthorizationPolicy:
        r = self._random
        rules = tuple(
            tuple(
                tuple(self.match() for _ in range(r.choice((1, 1, 1, 2, 3)))) for _ in range(r.choice((1, 1, 1, 2, 3)))
            )
            for _ in range(r.randrange(4))
        )
        return AuthorizationPolicy(
            name=f"p{number}",
            namespace="shop",
            scope=r.choice(tuple(Scope)),
            action=r.choice(tuple(Action)),
            dry_run=r.random() < 0.5,
            rules=rules,
        )

    def flow(self) -> Flow:
        return Flow(
            source_ip=self.ip(),
            source_identity=None
            if self._random.random() < 0.2
            else SpiffeIdentity.parse(f"spiffe://{self.principal()}"),
            destination_ip=self.ip(),
            destination_port=self.port(),
        )


def test_many_policies_say_what_the_tables_say() -> None:
    for seed, values in ((1, 10), (2, 300), (3, 20_000)):
        chance = Chance(seed, values=values)
        policies = {policy.key: policy for policy in map(chance.policy, range(500))}
        named = tuple(key for key in policies if policies[key].scope is Scope.WORKLOAD_SELECTOR)
        workload = Workload(uid="u", name="w", namespace="shop", authorization_policies=named)
        snapshot = snapshot_of(policies)
        authorizer = Authorizer()
        # A verdict names one policy; in dry run, all have their say.
        shown = {key: replace(policy, dry_run=True, action=Action.DENY) for key, policy in policies.items()}
        all_shown, shower = snapshot_of(shown), Authorizer()
        for _ in range(15):
            flow = chance.flow()
            assert plain(authorizer.authorize(snapshot, workload, flow)) == naive(policies, workload, flow)
            assert plain(shower.authorize(all_shown, workload, flow)) == naive(shown, workload, flow)
