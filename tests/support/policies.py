"""What policies mean, once more: written from the tables of docs/design/policy.md alone, with none of hbone's code.

Slow, obvious, and what the three ways of `hbone.rbac` are compared with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from hbone.identity import SpiffeIdentity
from hbone.mesh import (
    Action,
    AuthorizationPolicy,
    Match,
    Scope,
    ServiceAccount,
    StringMatch,
    StringMatchKind,
    Workload,
)
from hbone.rbac import Flow

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

from ipaddress import ip_address, ip_network

__all__ = ["any_flows", "any_policies", "any_workloads", "exact", "flow", "naive", "naive_matches", "policy", "rule"]


# --- the tables ------------------------------------------------------------------------------------------------------


def naive(policies: Mapping[str, AuthorizationPolicy], workload: Workload, asked: Flow) -> dict[str, Any]:
    """Allowed or not, by which policy, and the dry-run policies that matched."""
    subject = []
    for key in sorted(policies):
        scope, namespace = policies[key].scope.value, policies[key].namespace
        in_scope = scope == "Global" or (scope == "Namespace" and namespace == workload.namespace)
        if in_scope or key in workload.authorization_policies:
            subject.append(key)

    def those(action: str, dry_run: bool) -> list[str]:
        return [k for k in subject if policies[k].action.value == action and policies[k].dry_run == dry_run]

    dry = [(key, "Deny") for key in those("Deny", True) if naive_matches(policies[key], asked)]
    for key in those("Deny", False):
        if naive_matches(policies[key], asked):
            return {"allowed": False, "policy": key, "reason": f"explicitly denied by: {key}", "dry_run": dry}
    dry += [(key, "Allow") for key in those("Allow", True) if naive_matches(policies[key], asked)]
    if not those("Allow", False):
        return {"allowed": True, "policy": None, "reason": "no allow policies", "dry_run": dry}
    for key in those("Allow", False):
        if naive_matches(policies[key], asked):
            return {"allowed": True, "policy": key, "reason": f"allowed by: {key}", "dry_run": dry}
    return {"allowed": False, "policy": None, "reason": "allow policies exist, but none allowed", "dry_run": dry}


def naive_matches(found: AuthorizationPolicy, asked: Flow) -> bool:
    rules = []
    for each in found.rules:
        clauses = []
        for clause in each:
            matches = [_match(match, asked) for match in clause]
            clauses.append(True if len(matches) == 0 else True in matches)
        rules.append(True if len(clauses) == 0 else False not in clauses)
    return False if len(rules) == 0 else True in rules


def _match(match: Match, asked: Flow) -> bool:
    principal = None if asked.source_identity is None else str(asked.source_identity)[len("spiffe://") :]
    parts = [] if principal is None else principal.split("/")
    istio = len(parts) == 5 and parts[1] == "ns" and parts[3] == "sa"
    compared = [
        (match.namespaces, match.not_namespaces, _text, parts[2] if istio else ""),
        (match.service_accounts, match.not_service_accounts, _account, (parts[2], parts[4]) if istio else None),
        (match.principals, match.not_principals, _text, principal),
        (match.source_ips, match.not_source_ips, _inside, asked.source_ip),
        (match.destination_ips, match.not_destination_ips, _inside, asked.destination_ip),
        (match.destination_ports, match.not_destination_ports, _same, asked.destination_port),
    ]
    answers = []
    for wanted, unwanted, fits, actual in compared:
        if len(wanted) > 0:
            answers.append(True in [fits(value, actual) for value in wanted])
        if len(unwanted) > 0:
            answers.append(True not in [fits(value, actual) for value in unwanted])
    return len(answers) > 0 and False not in answers


def _text(pattern: StringMatch, text: str | None) -> bool:
    if text is None:
        return False
    if pattern.kind.value == "Presence":
        return len(text) > 0
    size = len(pattern.value)
    if pattern.kind.value == "Exact":
        return text == pattern.value
    if size > len(text):
        return False
    return pattern.value == (text[:size] if pattern.kind.value == "Prefix" else text[len(text) - size :])


def _account(wanted: ServiceAccount, actual: tuple[str, str] | None) -> bool:
    return actual is not None and (wanted.namespace, wanted.service_account) == actual


def _inside(network: Any, ip: Any) -> bool:
    # By bits. What is mapped into IPv6 is IPv4.
    def bits(address: Any) -> str:
        return f"{int(address):0{address.max_prefixlen}b}"

    wanted, actual = bits(network.network_address)[: network.prefixlen], bits(ip)
    mapped = "0" * 80 + "1" * 16
    if ip.version == 4 and network.version == 6:
        return network.prefixlen >= 96 and wanted.startswith(mapped) and actual.startswith(wanted[96:])
    return ip.version == network.version and actual.startswith(wanted)


def _same(wanted: int, actual: int) -> bool:
    return wanted == actual


# --- by hand ---------------------------------------------------------------------------------------------------------


def exact(text: str) -> StringMatch:
    return StringMatch(StringMatchKind.EXACT, text)


def rule(*matches: Match) -> tuple[tuple[Match, ...], ...]:
    """A rule of one clause."""
    return (matches,)


def policy(
    name: str,
    action: Action,
    *rules: Any,
    namespace: str = "shop",
    scope: Scope = Scope.NAMESPACE,
    dry_run: bool = False,
) -> AuthorizationPolicy:
    return AuthorizationPolicy(name=name, namespace=namespace, scope=scope, action=action, rules=rules, dry_run=dry_run)


def flow(
    *, ip: str = "10.1.2.3", who: str | None = "cluster.local/ns/shop/sa/cart", to: str = "10.1.9.9", port: int = 8080
) -> Flow:
    return Flow(
        source_ip=ip_address(ip),
        source_identity=None if who is None else SpiffeIdentity.parse(f"spiffe://{who}"),
        destination_ip=ip_address(to),
        destination_port=port,
    )


# --- by chance: few different values, so that much fits ---------------------------------------------------------------

_PRINCIPALS = (
    "cluster.local/ns/shop/sa/cart",
    "cluster.local/ns/shop/sa/web",
    "cluster.local/ns/shop-2/sa/cart",
    "other.example/ns/shop/sa/cart",
    "cluster.local/batch/nightly",
    "cluster.local",
)
_TEXTS = ("", "s", "shop", "shop-2", "-2", "op", "cluster.local", "cluster.local/", "/sa/cart", "t", *_PRINCIPALS)
_IPS = ("10.1.2.3", "10.1.2.4", "10.2.0.1", "::ffff:10.1.2.3", "2001:db8::1", "2001:db8:1::1", "::1")
_NETWORKS = (
    *("0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.3/32", "10.1.2.2/31", "192.0.2.0/24"),
    *("::/0", "2001:db8::/32", "2001:db8::1/128", "::ffff:10.1.0.0/112", "::ffff:0:0/96", "::/80"),
)
_PORTS = (80, 443, 8080)

_texts = st.builds(
    lambda kind, text: StringMatch(kind, "" if kind is StringMatchKind.PRESENCE else text),
    st.sampled_from(StringMatchKind),
    st.sampled_from(_TEXTS),
)
_accounts = st.builds(
    ServiceAccount, namespace=st.sampled_from(("shop", "shop-2")), service_account=st.sampled_from(("cart", "web"))
)
_networks = st.sampled_from([ip_network(text) for text in _NETWORKS])
_ports = st.sampled_from(_PORTS)


def _some(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, min_size=1, max_size=3).map(tuple)


_VALUES = {
    "namespaces": _texts,
    "service_accounts": _accounts,
    "principals": _texts,
    "source_ips": _networks,
    "destination_ips": _networks,
    "destination_ports": _ports,
}
_CONSTRAINTS = {prefix + name: _some(values) for name, values in _VALUES.items() for prefix in ("", "not_")}

any_matches = st.lists(st.sampled_from(sorted(_CONSTRAINTS)), max_size=3, unique=True).flatmap(
    lambda names: st.builds(Match, **{name: _CONSTRAINTS[name] for name in names})
)
any_clauses = st.lists(any_matches, max_size=3).map(tuple)
any_rules = st.lists(any_clauses, max_size=3).map(tuple)

_NAMES = tuple(f"p{number}" for number in range(6))
_NAMESPACES = ("shop", "shop-2", "")


def _unique(found: Iterable[AuthorizationPolicy]) -> dict[str, AuthorizationPolicy]:
    return {each.key: each for each in found}


any_policies = st.lists(
    st.builds(
        AuthorizationPolicy,
        name=st.sampled_from(_NAMES),
        namespace=st.sampled_from(_NAMESPACES),
        scope=st.sampled_from(Scope),
        action=st.sampled_from(Action),
        rules=st.lists(any_rules, max_size=3).map(tuple),
        dry_run=st.sampled_from((False, False, True)),
    ),
    max_size=8,
).map(_unique)

any_workloads = st.builds(
    Workload,
    uid=st.sampled_from(("u", "v")),
    name=st.just("w"),
    namespace=st.sampled_from(_NAMESPACES),
    authorization_policies=st.lists(
        st.sampled_from([f"{namespace}/{name}" for namespace in _NAMESPACES for name in _NAMES]), max_size=5
    ).map(tuple),
)

any_flows = st.builds(
    Flow,
    source_ip=st.sampled_from([ip_address(text) for text in _IPS]),
    source_identity=st.sampled_from([None, *(SpiffeIdentity.parse(f"spiffe://{text}") for text in _PRINCIPALS)]),
    destination_ip=st.sampled_from([ip_address(text) for text in _IPS]),
    destination_port=_ports,
)
