"""One decision, the plain way: the semantics of L4 policies, to be read from top to bottom.

A policy matches when any of its rules does, a rule when all of its clauses do, a clause when any of its matches does, a
match when all of its fields do, a field when any of its values does, a ``not_`` field when none does. Empty:

    policy without rules         never matches
    rule without clauses         always matches
    clause without matches       always matches
    match without any field      never matches

Which policies are asked: the global ones, those of the workload's namespace, and those that the workload names. Who
decides: any DENY that matches; else, if there are ALLOW policies, one of them has to match; else everything passes.
Dry-run policies are asked and reported, and are not there otherwise.

Policies are asked in the order of their keys, so the policy that is named does not depend on where it came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, Any, TypeAlias

from hbone.mesh import Action, Scope, ServiceAccount, StringMatch, StringMatchKind
from hbone.rbac._values import DryRunMatch, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hbone.identity import SpiffeIdentity
    from hbone.mesh import AuthorizationPolicy, Clause, Match, Rule, Workload
    from hbone.rbac._values import Flow, HasPolicies, IPAddress

__all__ = [
    "FIELDS",
    "Field",
    "PolicySet",
    "Source",
    "authorize",
    "canonical_network",
    "decide",
    "is_void",
    "policies_for",
    "source_of",
]

IPNetwork: TypeAlias = IPv4Network | IPv6Network

NONE_ALLOWED = Verdict(False, None, "allow policies exist, but none allowed")
NO_ALLOW = Verdict(True, None, "no allow policies")


@dataclass(frozen=True, slots=True)
class Source:
    """A source identity in the forms that policies compare with. `principal` is None for plain text."""

    namespace: str
    service_account: ServiceAccount | None
    principal: str | None


_PLAIN_TEXT = Source("", None, None)


@lru_cache(maxsize=4096)
def source_of(identity: SpiffeIdentity | None) -> Source:
    """The forms of an identity. One that has not Istio's form is a principal without namespace and service account."""
    if identity is None:
        return _PLAIN_TEXT
    principal = identity.trust_domain.name + identity.path
    namespace, account = identity.namespace, identity.service_account
    if namespace is None or account is None:
        return Source("", None, principal)
    return Source(namespace, ServiceAccount(namespace=namespace, service_account=account), principal)


def canonical_network(network: IPNetwork) -> IPNetwork:
    """The range as flows are compared with it: one inside the IPv4-mapped part of IPv6 is the IPv4 range."""
    if isinstance(network, IPv6Network) and network.prefixlen >= 96:
        plain = network.network_address.ipv4_mapped
        if plain is not None:
            return IPv4Network((plain, network.prefixlen - 96))
    return network


def _text_holds(pattern: StringMatch, text: str | None) -> bool:
    if text is None:
        return False
    match pattern.kind:
        case StringMatchKind.EXACT:
            return text == pattern.value
        case StringMatchKind.PREFIX:
            return text.startswith(pattern.value)
        case StringMatchKind.SUFFIX:
            return text.endswith(pattern.value)
        case StringMatchKind.PRESENCE:
            return text != ""


def _network_holds(network: IPNetwork, ip: IPAddress) -> bool:
    # Of different versions: not in.
    return ip in canonical_network(network)


@dataclass(frozen=True, slots=True)
class Field:
    """A field that a match can constrain."""

    name: str
    """As in `hbone.mesh.Match`; with ``not_`` in front, its negation."""
    text: str
    """As in files and dumps."""
    value: Callable[[Flow], Any]
    """What of a flow is compared."""
    holds: Callable[[Any, Any], bool]
    """Whether one of the field's values fits what is compared."""

    @property
    def negation(self) -> str:
        """Its ``not_`` name in `hbone.mesh.Match`."""
        return f"not_{self.name}"

    def passes(self, match: Match, flow: Flow) -> bool:
        """Whether the constraints of a match on this field hold."""
        wanted = getattr(match, self.name)
        unwanted = getattr(match, self.negation)
        if not wanted and not unwanted:
            return True
        value, holds = self.value(flow), self.holds
        if wanted and not any(holds(pattern, value) for pattern in wanted):
            return False
        return not any(holds(pattern, value) for pattern in unwanted)


FIELDS = (
    Field("namespaces", "namespaces", lambda flow: source_of(flow.source_identity).namespace, _text_holds),
    Field(
        "service_accounts",
        "serviceAccounts",
        lambda flow: source_of(flow.source_identity).service_account,
        lambda wanted, account: wanted == account,
    ),
    Field("principals", "principals", lambda flow: source_of(flow.source_identity).principal, _text_holds),
    Field("source_ips", "sourceIps", lambda flow: flow.source_ip, _network_holds),
    Field("destination_ips", "destinationIps", lambda flow: flow.destination_ip, _network_holds),
    Field(
        "destination_ports",
        "destinationPorts",
        lambda flow: flow.destination_port,
        lambda wanted, port: wanted == port,
    ),
)


def is_void(match: Match) -> bool:
    """Whether a match has no constraint at all."""
    return not any(getattr(match, field.name) or getattr(match, field.negation) for field in FIELDS)


def _match_passes(match: Match, flow: Flow) -> bool:
    return not is_void(match) and all(field.passes(match, flow) for field in FIELDS)


def _clause_passes(clause: Clause, flow: Flow) -> bool:
    return not clause or any(_match_passes(match, flow) for match in clause)


def _rule_passes(rule: Rule, flow: Flow) -> bool:
    return all(_clause_passes(clause, flow) for clause in rule)


def _policy_matches(policy: AuthorizationPolicy, flow: Flow) -> bool:
    return any(_rule_passes(rule, flow) for rule in policy.rules)


@dataclass(frozen=True, slots=True)
class PolicySet:
    """The policies that a workload is subject to."""

    policies: tuple[tuple[str, AuthorizationPolicy], ...]
    """With their keys, in the order of these."""
    missing: tuple[str, ...]
    """What the workload names and does not exist."""


def policies_for(policies: Mapping[str, AuthorizationPolicy], workload: Workload) -> PolicySet:
    """The policies that a destination workload is subject to. A name without a policy is left out and reported."""
    keys = {
        key
        for key, policy in policies.items()
        if policy.scope is Scope.GLOBAL or (policy.scope is Scope.NAMESPACE and policy.namespace == workload.namespace)
    }
    named = set(workload.authorization_policies)
    keys |= named & policies.keys()
    return PolicySet(tuple((key, policies[key]) for key in sorted(keys)), tuple(sorted(named - policies.keys())))


def decide(
    policies: tuple[tuple[str, AuthorizationPolicy], ...], matches: Callable[[str, AuthorizationPolicy], bool]
) -> Verdict:
    """The verdict of some policies, when asking whether one matches is left to the caller."""
    dry_run = [
        DryRunMatch(key, Action.DENY)
        for key, policy in policies
        if policy.dry_run and policy.action is Action.DENY and matches(key, policy)
    ]
    for key, policy in policies:
        if not policy.dry_run and policy.action is Action.DENY and matches(key, policy):
            return Verdict(False, key, f"explicitly denied by: {key}", tuple(dry_run))
    dry_run += [
        DryRunMatch(key, Action.ALLOW)
        for key, policy in policies
        if policy.dry_run and policy.action is Action.ALLOW and matches(key, policy)
    ]
    verdict = NO_ALLOW
    for key, policy in policies:
        if not policy.dry_run and policy.action is Action.ALLOW:
            if matches(key, policy):
                return Verdict(True, key, f"allowed by: {key}", tuple(dry_run))
            verdict = NONE_ALLOWED
    return Verdict(verdict.allowed, None, verdict.reason, tuple(dry_run)) if dry_run else verdict


def authorize(snapshot: HasPolicies, workload: Workload, flow: Flow) -> Verdict:
    """Whether a flow may pass to a workload. For many flows against the same policies see `Authorizer`.

    Args:
        snapshot: the mesh.
        workload: the destination.
        flow: the connection.
    """
    found = policies_for(snapshot.policies, workload)
    return decide(found.policies, lambda _, policy: _policy_matches(policy, flow))
