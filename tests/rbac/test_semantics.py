"""The tables of docs/design/policy.md, row by row, for each of the three ways to decide."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any

import pytest
from support.policies import exact, flow, policy, rule

from hbone.identity import SpiffeIdentity
from hbone.mesh import Action, Match, MeshSnapshot, Scope, ServiceAccount, StringMatch, StringMatchKind, Workload
from hbone.rbac import Authorizer, DryRunMatch, Flow, Verdict, authorize, explain_verdict, policies_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone.mesh import AuthorizationPolicy

ALLOW, DENY = Action.ALLOW, Action.DENY
CART = "cluster.local/ns/shop/sa/cart"
WORKLOAD = Workload(uid="u", name="stock-0", namespace="shop")


def prefix(text: str) -> StringMatch:
    return StringMatch(StringMatchKind.PREFIX, text)


def suffix(text: str) -> StringMatch:
    return StringMatch(StringMatchKind.SUFFIX, text)


PRESENT = StringMatch(StringMatchKind.PRESENCE)


def plainly(snapshot: MeshSnapshot, workload: Workload, asked: Flow) -> Verdict:
    return authorize(snapshot, workload, asked)


def often(snapshot: MeshSnapshot, workload: Workload, asked: Flow) -> Verdict:
    return Authorizer().authorize(snapshot, workload, asked)


def with_reasons(snapshot: MeshSnapshot, workload: Workload, asked: Flow) -> Verdict:
    return explain_verdict(snapshot, workload, asked).verdict


@pytest.fixture(params=[plainly, often, with_reasons], ids=lambda way: way.__name__)
def ask(request: pytest.FixtureRequest) -> Callable[..., Verdict]:
    way = request.param

    def decide(*policies: AuthorizationPolicy, to: Workload = WORKLOAD, asked: Flow | None = None) -> Verdict:
        return way(MeshSnapshot.build(policies=policies), to, asked or flow())

    return decide


FITS = rule(Match(destination_ports=(8080,)))
FAILS = rule(Match(destination_ports=(1,)))


def denied(key: str) -> tuple[bool, str | None, str]:
    return False, key, f"explicitly denied by: {key}"


def allowed(key: str) -> tuple[bool, str | None, str]:
    return True, key, f"allowed by: {key}"


NONE_ALLOWED = (False, None, "allow policies exist, but none allowed")
NO_ALLOW = (True, None, "no allow policies")


# What is empty.

ALWAYS, NEVER = True, False
FORMS: dict[str, tuple[tuple[Any, ...], bool]] = {
    "no rules": ((), NEVER),
    "rule with no clauses": (((),), ALWAYS),
    "clause with no matches": ((((),),), ALWAYS),
    "match with all fields empty": ((((Match(),),),), NEVER),
    "clause with no matches and one that fits": ((((), FITS[0]),), ALWAYS),
    "clause with no matches and one that fails": ((((), FAILS[0]),), NEVER),
    "empty match beside one that fits": ((((Match(), *FITS[0]),),), ALWAYS),
    "empty match beside one that fails": ((((Match(), *FAILS[0]),),), NEVER),
    "clause of an empty match and one that fits": ((((Match(),), FITS[0]),), NEVER),
    "rule that fails and rule with no clauses": ((FAILS, ()), ALWAYS),
    "rule with no clauses and rule of an empty match": (((), rule(Match())), ALWAYS),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("action", Action)
def test_what_is_empty(ask: Callable[..., Verdict], action: Action, form: str) -> None:
    rules, always = FORMS[form]
    verdict = ask(policy("p", action, *rules))
    assert verdict.allowed is (always if action is ALLOW else not always)
    # It does not depend on the flow, and not on what lies around it.
    around = [policy(name, action, FAILS, (FITS[0], FAILS[0])) for name in ("a", "z")]
    assert (
        ask(*around, policy("p", action, *rules), asked=flow(who=None, ip="::1", to="::1")).allowed is verdict.allowed
    )


# How things are put together: rules any, clauses all, matches any, fields all.

A, B = Match(destination_ports=(8080,)), Match(namespaces=(exact("shop"),))
X, Y = Match(destination_ports=(1,)), Match(namespaces=(exact("evil"),))

NESTED: dict[str, tuple[tuple[Any, ...], bool]] = {
    "one of two rules": ((((X,),), ((A,),)), True),
    "none of two rules": ((((X,),), ((Y,),)), False),
    "both clauses": ((((A,), (B,)),), True),
    "one of two clauses": ((((A,), (Y,)),), False),
    "other of two clauses": ((((X,), (B,)),), False),
    "one of two matches in each clause": ((((A, Y), (X, B)),), True),
    "one of two matches in one clause, none in the other": ((((A, Y), (X, Y)),), False),
    "matches over three clauses": ((((A, X), (B,), (Y, A)),), True),
    "last of three clauses fails": ((((A, X), (B,), (Y, X)),), False),
    "rule of clauses fails, next rule fits": ((((A,), (X,)), ((B,),)), True),
    "rule fails, rule of clauses fits": ((((X,),), ((A,), (B,))), True),
    "both fields": ((rule(Match(destination_ports=(8080,), namespaces=(exact("shop"),))),), True),
    "one of two fields": ((rule(Match(destination_ports=(8080,), namespaces=(exact("evil"),))),), False),
    "one of a field's values": ((rule(Match(destination_ports=(1, 8080, 2))),), True),
    "none of a not field's values": ((rule(Match(not_destination_ports=(1, 2))),), True),
    "one of a not field's values": ((rule(Match(not_destination_ports=(1, 8080))),), False),
    "a field and its not": (
        (rule(Match(source_ips=(ip_network("10.0.0.0/8"),), not_source_ips=(ip_network("10.1.0.0/16"),))),),
        False,
    ),
    "a field and a not that leaves it": (
        (rule(Match(source_ips=(ip_network("10.0.0.0/8"),), not_source_ips=(ip_network("10.2.0.0/16"),))),),
        True,
    ),
}


@pytest.mark.parametrize("form", NESTED)
@pytest.mark.parametrize("action", Action)
def test_nesting(ask: Callable[..., Verdict], action: Action, form: str) -> None:
    rules, matches = NESTED[form]
    assert ask(policy("p", action, *rules)).allowed is (matches if action is ALLOW else not matches)


# The fields.

V4, V6, PLAIN = {}, {"ip": "2001:db8::1", "to": "2001:db8::2"}, {"who": None}


def account(namespace: str, name: str) -> ServiceAccount:
    return ServiceAccount(namespace=namespace, service_account=name)


#: Field, its value, flows that it fits, flows that it does not fit. A ``not_`` field is the opposite in each case.
FIELDS: list[tuple[str, Any, list[dict[str, Any]], list[dict[str, Any]]]] = [
    ("namespaces", exact("shop"), [V4, {"who": "other.example/ns/shop/sa/x"}], [{"who": "cluster.local/ns/s/sa/x"}]),
    ("namespaces", exact("shop"), [], [PLAIN, {"who": "cluster.local/shop"}, {"who": "cluster.local"}]),
    ("namespaces", exact(""), [PLAIN, {"who": "cluster.local/shop"}], [V4]),
    ("namespaces", PRESENT, [V4], [PLAIN, {"who": "cluster.local/ns/shop"}]),
    ("service_accounts", account("shop", "cart"), [V4, {"who": "other.example/ns/shop/sa/cart"}], [PLAIN]),
    ("service_accounts", account("shop", "web"), [], [V4, {"who": "cluster.local/ns/web/sa/shop"}]),
    ("service_accounts", account("web", "cart"), [], [V4, {"who": "cluster.local/web/cart"}]),
    ("principals", exact(CART), [V4], [PLAIN, {"who": "other.example/ns/shop/sa/cart"}]),
    ("principals", exact(f"spiffe://{CART}"), [], [V4]),
    ("principals", exact("cluster.local/batch/a"), [{"who": "cluster.local/batch/a"}], [V4]),
    ("principals", PRESENT, [V4, {"who": "cluster.local"}], [PLAIN]),
    ("principals", exact(""), [], [PLAIN, V4]),
    ("principals", prefix(""), [V4], [PLAIN]),
    ("source_ips", ip_network("10.1.2.3/32"), [V4, {"ip": "::ffff:10.1.2.3"}], [{"ip": "10.1.2.4"}, V6]),
    ("source_ips", ip_network("2001:db8::/32"), [V6], [V4, {"ip": "2001:db9::1"}]),
    ("destination_ips", ip_network("10.1.9.9/32"), [V4, {"to": "::ffff:10.1.9.9"}], [{"to": "10.1.2.3"}, V6]),
    ("destination_ips", ip_network("2001:db8::2/128"), [V6], [V4, {"to": "2001:db8::1"}]),
    ("destination_ports", 8080, [V4], [{"port": 80}, {"port": 8081}]),
    # CIDR ranges
    ("source_ips", ip_network("10.1.2.0/24"), [V4, {"ip": "10.1.2.255"}], [{"ip": "10.1.3.0"}, {"ip": "10.1.1.255"}]),
    ("source_ips", ip_network("0.0.0.0/0"), [V4, {"ip": "::ffff:1.2.3.4"}], [V6]),
    ("source_ips", ip_network("::/0"), [V6], [V4]),
    ("source_ips", ip_network("::ffff:10.1.0.0/112"), [V4], [V6, {"ip": "10.2.0.0"}]),
    ("destination_ips", ip_network("10.1.9.8/31"), [V4, {"to": "10.1.9.8"}], [{"to": "10.1.9.7"}, {"to": "10.1.9.10"}]),
]


@pytest.mark.parametrize("number", range(len(FIELDS)), ids=lambda n: f"{FIELDS[n][0]} {FIELDS[n][1]}")
def test_fields(ask: Callable[..., Verdict], number: int) -> None:
    name, value, fitting, failing = FIELDS[number]
    wanting = policy("p", ALLOW, rule(Match(**{name: (value,)})))
    unwanting = policy("p", ALLOW, rule(Match(**{f"not_{name}": (value,)})))
    for about, fits in [(f, True) for f in fitting] + [(f, False) for f in failing]:
        assert ask(wanting, asked=flow(**about)).allowed is fits
        assert ask(unwanting, asked=flow(**about)).allowed is not fits


TEXTS = [
    (exact("shop"), "shop", True),
    (exact("shop"), "shop2", False),
    (exact("shop"), "Shop", False),
    (prefix("sh"), "shop", True),
    (prefix("shop"), "shop", True),
    (prefix("shop2"), "shop", False),
    (prefix("op"), "shop", False),
    (suffix("op"), "shop", True),
    (suffix("shop"), "shop", True),
    (suffix("ashop"), "shop", False),
    (suffix("sh"), "shop", False),
    (prefix(""), "shop", True),
    (suffix(""), "shop", True),
    (PRESENT, "shop", True),
]


@pytest.mark.parametrize(("pattern", "namespace", "fits"), TEXTS, ids=str)
def test_texts(ask: Callable[..., Verdict], pattern: StringMatch, namespace: str, fits: bool) -> None:
    asked = flow(who=f"cluster.local/ns/{namespace}/sa/x")
    assert ask(policy("p", ALLOW, rule(Match(namespaces=(pattern,)))), asked=asked).allowed is fits


# Who decides.

WHO: dict[str, tuple[list[AuthorizationPolicy], tuple[bool, str | None, str]]] = {
    "no policies": ([], NO_ALLOW),
    "DENY that fits": ([policy("d", DENY, FITS)], denied("shop/d")),
    "DENY that fails": ([policy("d", DENY, FAILS)], NO_ALLOW),
    "ALLOW that fits": ([policy("a", ALLOW, FITS)], allowed("shop/a")),
    "ALLOW that fails": ([policy("a", ALLOW, FAILS)], NONE_ALLOWED),
    "one of two ALLOWs": ([policy("a", ALLOW, FAILS), policy("b", ALLOW, FITS)], allowed("shop/b")),
    "DENY before ALLOW": ([policy("a", ALLOW, FITS), policy("d", DENY, FITS)], denied("shop/d")),
    "DENY fails, ALLOW fits": ([policy("a", ALLOW, FITS), policy("d", DENY, FAILS)], allowed("shop/a")),
    "DENY fails, ALLOW fails": ([policy("a", ALLOW, FAILS), policy("d", DENY, FAILS)], NONE_ALLOWED),
    "two DENYs: the first by name": ([policy("e", DENY, FITS), policy("d", DENY, FITS)], denied("shop/d")),
    "two ALLOWs: the first by name": ([policy("b", ALLOW, FITS), policy("a", ALLOW, FITS)], allowed("shop/a")),
    "ALLOW without rules": ([policy("nobody", ALLOW)], NONE_ALLOWED),
    "DENY without rules": ([policy("nobody", DENY)], NO_ALLOW),
}


@pytest.mark.parametrize("case", WHO)
def test_who_decides(ask: Callable[..., Verdict], case: str) -> None:
    policies, (is_allowed, key, reason) = WHO[case]
    for order in (policies, policies[::-1]):
        assert ask(*order) == Verdict(is_allowed, key, reason)


def test_a_dry_run_is_reported_and_decides_nothing(ask: Callable[..., Verdict]) -> None:
    dry_deny = policy("dd", DENY, FITS, dry_run=True)
    dry_allow = policy("da", ALLOW, FITS, dry_run=True)
    silent = [policy("sd", DENY, FAILS, dry_run=True), policy("sa", ALLOW, FAILS, dry_run=True)]
    both = (DryRunMatch("shop/dd", DENY), DryRunMatch("shop/da", ALLOW))
    assert ask(dry_deny, dry_allow, *silent) == Verdict(*NO_ALLOW, both)
    assert ask(dry_deny, dry_allow, *silent, policy("a", ALLOW, FITS)) == Verdict(*allowed("shop/a"), both)
    assert ask(dry_deny, dry_allow, *silent, policy("a", ALLOW, FAILS)) == Verdict(*NONE_ALLOWED, both)
    # When something denies, nobody asks any more who allows.
    assert ask(dry_deny, dry_allow, *silent, policy("d", DENY, FITS)) == Verdict(*denied("shop/d"), both[:1])


def test_dry_runs_of_several_scopes_come_in_the_order_of_their_names(ask: Callable[..., Verdict]) -> None:
    policies = [
        policy("b", DENY, FITS, dry_run=True),
        policy("a", DENY, FITS, dry_run=True, namespace="z", scope=Scope.GLOBAL),
        policy("a", DENY, FITS, dry_run=True, namespace="a", scope=Scope.WORKLOAD_SELECTOR),
        policy("c", DENY, FITS, dry_run=True),
    ]
    to = Workload(uid="u", name="w", namespace="shop", authorization_policies=("a/a",))
    assert [found.policy for found in ask(*policies, to=to).dry_run] == ["a/a", "shop/b", "shop/c", "z/a"]


# Which policies are asked.

SELECTOR = Scope.WORKLOAD_SELECTOR
SCOPES: dict[str, tuple[AuthorizationPolicy, tuple[str, ...], bool]] = {
    "global": (policy("p", DENY, FITS, namespace="istio-system", scope=Scope.GLOBAL), (), True),
    "own namespace": (policy("p", DENY, FITS), (), True),
    "another namespace": (policy("p", DENY, FITS, namespace="web"), (), False),
    "another namespace, named": (policy("p", DENY, FITS, namespace="web"), ("web/p",), True),
    "selector, not named": (policy("p", DENY, FITS, scope=SELECTOR), (), False),
    "selector, named": (policy("p", DENY, FITS, scope=SELECTOR), ("shop/p",), True),
    "selector of another namespace, named": (
        policy("p", DENY, FITS, namespace="istio-system", scope=SELECTOR),
        ("istio-system/p",),
        True,
    ),
    "selector, another one is named": (policy("p", DENY, FITS, scope=SELECTOR), ("shop/q", "p", "web/p"), False),
    "own namespace, named too": (policy("p", DENY, FITS), ("shop/p", "shop/p"), True),
    "global, named too": (policy("p", DENY, FITS, scope=Scope.GLOBAL), ("shop/p",), True),
}


@pytest.mark.parametrize("case", SCOPES)
def test_which_policies_are_asked(ask: Callable[..., Verdict], case: str) -> None:
    asked, named, counts = SCOPES[case]
    to = Workload(uid="u", name="w", namespace="shop", authorization_policies=named)
    assert ask(asked, to=to).allowed is not counts
    # An ALLOW that is not asked does not make others needed either.
    other = policy(asked.name, ALLOW, FAILS, namespace=asked.namespace, scope=asked.scope)
    assert ask(other, to=to).allowed is not counts


def test_named_policies_that_do_not_exist_are_left_out_and_reported(ask: Callable[..., Verdict]) -> None:
    to = Workload(uid="u", name="w", namespace="shop", authorization_policies=("shop/b", "shop/gone", "a/gone"))
    snapshot = MeshSnapshot.build(policies=[policy("b", ALLOW, FITS, scope=SELECTOR)])
    found = policies_for(snapshot.policies, to)
    assert [key for key, _ in found.policies] == ["shop/b"]
    assert found.missing == ("a/gone", "shop/gone")
    assert ask(*snapshot.policies.values(), to=to) == Verdict(*allowed("shop/b"))


def test_a_policy_that_changes_its_scope() -> None:
    authorizer = Authorizer()
    snapshot = MeshSnapshot.build(policies=[policy("p", DENY, FITS)])
    elsewhere = Workload(uid="v", name="w", namespace="web")
    assert not authorizer.authorize(snapshot, WORKLOAD, flow()).allowed
    assert authorizer.authorize(snapshot, elsewhere, flow()).allowed
    snapshot = snapshot.with_changes(upsert=[policy("p", DENY, FITS, scope=Scope.GLOBAL)])
    assert not authorizer.authorize(snapshot, elsewhere, flow()).allowed
    snapshot = snapshot.with_changes(upsert=[policy("p", DENY, FITS, scope=SELECTOR)])
    assert authorizer.authorize(snapshot, WORKLOAD, flow()).allowed
    assert authorizer.authorize(snapshot, elsewhere, flow()).allowed


# STRICT mutual TLS is a DENY of connections without a principal.

STRICT = policy("strict", DENY, rule(Match(not_principals=(PRESENT,))), scope=Scope.GLOBAL)
STRICT_BUT_9090 = policy("strict", DENY, ((Match(not_principals=(PRESENT,)),), (Match(not_destination_ports=(9090,)),)))


@pytest.mark.parametrize(
    ("strict", "who", "port", "passes"),
    [
        (STRICT, CART, 8080, True),
        (STRICT, "cluster.local/batch/a", 8080, True),
        (STRICT, None, 8080, False),
        (STRICT_BUT_9090, CART, 8080, True),
        (STRICT_BUT_9090, None, 8080, False),
        (STRICT_BUT_9090, None, 9090, True),
    ],
)
def test_strict(
    ask: Callable[..., Verdict], strict: AuthorizationPolicy, who: str | None, port: int, passes: bool
) -> None:
    assert ask(strict, asked=flow(who=who, port=port)).allowed is passes


def test_a_flow_has_one_spelling_of_each_address() -> None:
    identity = SpiffeIdentity.parse(f"spiffe://{CART}")
    mapped, four = (
        Flow(source_ip=ip_address(a), source_identity=identity, destination_ip=ip_address(b), destination_port=1)
        for a, b in (("::ffff:10.0.0.1", "::ffff:10.0.0.2"), ("10.0.0.1", "10.0.0.2"))
    )
    assert mapped == four
    assert hash(mapped) == hash(four)
