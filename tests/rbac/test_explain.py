"""What an explanation says, as people and programs read it."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_network

from support.policies import exact, flow, policy, rule

from hbone.mesh import (
    Action,
    AuthorizationPolicy,
    Match,
    MeshSnapshot,
    ServiceAccount,
    StringMatch,
    StringMatchKind,
    Workload,
)
from hbone.rbac import ChangeKind, Explanation, explain_verdict

CART = "cluster.local/ns/shop/sa/cart"
WORKLOAD = Workload(uid="u", name="stock-0", namespace="shop")
PRESENT = StringMatch(StringMatchKind.PRESENCE)

CALLERS = policy("callers", Action.ALLOW, rule(Match(principals=(exact(CART),))))
NO_ADMIN = policy(
    "no-admin", Action.DENY, ((Match(destination_ports=(9000, 9001)),), (Match(not_namespaces=(exact("ops"),)),))
)
MAYBE = policy("maybe", Action.DENY, rule(Match(source_ips=(ip_network("10.1.0.0/16"),))), dry_run=True)


def explain(*policies: AuthorizationPolicy, to: Workload = WORKLOAD, **about: object) -> Explanation:
    return explain_verdict(MeshSnapshot.build(policies=policies), to, flow(**about))


def changes(explanation: Explanation) -> list[str]:
    return [change.text for change in explanation.changes]


def test_all_of_it_in_words() -> None:
    to = replace(WORKLOAD, authorization_policies=("shop/gone",))
    assert list(explain(CALLERS, NO_ADMIN, MAYBE, to=to).lines()) == [
        "allowed: allowed by: shop/callers",
        "ALLOW shop/callers: matches, decides",
        "  rule 1: yes",
        "    clause 1: yes",
        "      match 1: yes",
        f"        yes: principals: {CART} fits Exact {CART}",
        "DENY shop/maybe (dry run): matches",
        "  rule 1: yes",
        "    clause 1: yes",
        "      match 1: yes",
        "        yes: sourceIps: 10.1.2.3 fits 10.1.0.0/16",
        "DENY shop/no-admin: does not match",
        "  rule 1: no",
        "    clause 1: no",
        "      match 1: no",
        "        no: destinationPorts: 8080 does not fit 9000 or 9001",
        "    clause 2: yes",
        "      match 1: yes",
        "        yes: notNamespaces: shop does not fit Exact ops",
        "missing: the workload names shop/gone, which does not exist",
        "to change: denied by shop/no-admin, rule 1, if destinationPorts was not 8080 but 9000 or 9001",
        "to change: allowed (no allow policies), if there was no shop/callers",
        "to change: denied (explicitly denied by: shop/maybe), if shop/maybe was enforced instead of dry run",
    ]


def test_what_is_empty_in_words() -> None:
    explanation = explain(
        policy("a", Action.ALLOW),
        policy("b", Action.ALLOW, rule(Match())),
        policy("c", Action.DENY, (), ((),), dry_run=True),
    )
    lines = [line.strip() for line in explanation.lines()]
    assert "without rules it never matches" in lines
    assert "without fields it never holds" in lines
    assert "without clauses it always holds" in lines
    assert "without matches it always holds" in lines
    # No flow helps against policies that no flow matches.
    assert changes(explanation) == ["allowed (no allow policies), if there was no shop/a and no shop/b"]


def test_a_denial_says_what_it_was_denied_for() -> None:
    assert changes(explain(CALLERS, NO_ADMIN, port=9000)) == [
        "allowed (allowed by: shop/callers), if it was not for shop/no-admin, rule 1"
        " (destinationPorts: 9000 fits 9000, notNamespaces: shop does not fit Exact ops)",
        "allowed (allowed by: shop/callers), if there was no shop/no-admin",
    ]
    always = policy("always", Action.DENY, ())
    assert changes(explain(CALLERS, NO_ADMIN, always, port=9000)) == [
        "allowed (allowed by: shop/callers), if there was no shop/always and no shop/no-admin",
    ]


def test_a_client_that_nothing_allows_hears_what_would() -> None:
    far = policy(
        "a",
        Action.ALLOW,
        rule(
            Match(principals=(exact(CART),), destination_ports=(1, 2)),
            Match(namespaces=(PRESENT,), source_ips=(ip_network("192.0.2.0/24"),), destination_ports=(3,)),
        ),
    )
    account = policy(
        "b",
        Action.ALLOW,
        rule(Match(service_accounts=(ServiceAccount(namespace="shop", service_account="web"),))),
        rule(Match(not_destination_ports=(8080,), not_source_ips=(ip_network("10.0.0.0/8"),))),
    )
    explanation = explain(far, account, who=None)
    assert changes(explanation) == [
        "allowed by shop/b, rule 1, if serviceAccounts was not none but shop/web",
        f"allowed by shop/a, rule 1, if principals was not none but Exact {CART}"
        " and destinationPorts was not 8080 but 1 or 2",
        "allowed (no allow policies), if there was no shop/a and no shop/b",
    ]
    (_, wide, _) = explanation.changes
    assert wide.kind is ChangeKind.FLOW
    assert [field.field for field in wide.fields] == ["principals", "destinationPorts"]
    lines = list(explanation.lines())
    assert f"        no: principals: the client has none, that could fit Exact {CART}" in lines
    assert "        no: namespaces: the empty text does not fit Presence" in lines
    assert "        no: notSourceIps: 10.1.2.3 fits 10.0.0.0/8" in lines


def test_a_not_field_in_words() -> None:
    strict = policy("strict", Action.DENY, rule(Match(not_principals=(PRESENT,))))
    assert changes(explain(strict)) == [
        f"denied by shop/strict, rule 1, if notPrincipals was not {CART}, which fits Presence"
    ]


def test_enforcing_an_allow_that_does_not_match_denies() -> None:
    dry = policy("a", Action.ALLOW, rule(Match(destination_ports=(1,))), dry_run=True)
    assert changes(explain(dry)) == [
        "denied (allow policies exist, but none allowed), if shop/a was enforced instead of dry run"
    ]


def test_nothing_to_say_about_no_policies() -> None:
    assert list(explain().lines()) == ["allowed: no allow policies"]


def test_for_programs() -> None:
    found = json.loads(json.dumps(explain(CALLERS, MAYBE).to_dict()))
    principals = {
        "field": "principals",
        "holds": True,
        "actual": CART,
        "values": [f"Exact {CART}"],
        "fits": f"Exact {CART}",
    }
    assert found["policies"][0] == {
        "policy": "shop/callers",
        "action": "Allow",
        "scope": "Namespace",
        "dryRun": False,
        "matched": True,
        "decides": True,
        "rules": [
            {"matched": True, "clauses": [{"matched": True, "matches": [{"matched": True, "fields": [principals]}]}]}
        ],
    }
    assert {key: found[key] for key in ("allowed", "policy", "reason", "dryRun", "missing")} == {
        "allowed": True,
        "policy": "shop/callers",
        "reason": "allowed by: shop/callers",
        "dryRun": [{"policy": "shop/maybe", "action": "Deny"}],
        "missing": [],
    }
    assert [change["kind"] for change in found["changes"]] == ["remove", "enforce"]
