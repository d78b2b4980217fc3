"""A decision with its reasons: what each policy said, down to the value that fitted or did not, and what would help."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

from hbone.mesh import Action, ServiceAccount, StringMatch, StringMatchKind
from hbone.rbac._evaluate import FIELDS, decide, policies_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hbone.mesh import AuthorizationPolicy, Clause, Match, Rule, Scope, Workload
    from hbone.rbac._evaluate import Field
    from hbone.rbac._values import Flow, HasPolicies, Verdict

__all__ = [
    "Change",
    "ChangeKind",
    "ClauseFinding",
    "Explanation",
    "FieldFinding",
    "MatchFinding",
    "PolicyFinding",
    "RuleFinding",
    "explain_verdict",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldFinding:
    """What one field of a match said.

    Attributes:
        field: its name as in files: ``principals``, ``notPrincipals``.
        holds: whether the constraint holds.
        actual: what was compared; None where the flow has nothing of the kind, as plain text has no principal.
        values: what the field lists, as ``Exact shop``, ``10.0.0.0/8``, ``shop/cart``, ``8080``.
        fits: the first of those that fits, or None.
    """

    field: str
    holds: bool
    actual: str | None
    values: tuple[str, ...]
    fits: str | None

    def __str__(self) -> str:
        if self.actual is None:
            return f"{self.field}: the client has none, that could fit {_any_of(self.values)}"
        if self.fits is not None:
            return f"{self.field}: {self.shown} fits {self.fits}"
        return f"{self.field}: {self.shown} does not fit {_any_of(self.values)}"

    @property
    def shown(self) -> str:
        """What was compared, for people."""
        return "none" if self.actual is None else self.actual or "the empty text"


def _any_of(values: tuple[str, ...]) -> str:
    return " or ".join(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchFinding:
    """What a match said: it holds when all its fields do and there is any."""

    matched: bool
    fields: tuple[FieldFinding, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClauseFinding:
    """What a clause said: it holds when any of its matches does or there is none."""

    matched: bool
    matches: tuple[MatchFinding, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleFinding:
    """What a rule said: it holds when all its clauses do."""

    matched: bool
    clauses: tuple[ClauseFinding, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFinding:
    """What a policy said: it matches when any of its rules does.

    Attributes:
        policy: its ``namespace/name``.
        action: what it is for.
        scope: why it is asked.
        dry_run: whether it is only asked.
        matched: its answer.
        decides: whether it is the one that the verdict names.
        rules: its rules, all of them.
    """

    policy: str
    action: Action
    scope: Scope
    dry_run: bool
    matched: bool
    decides: bool
    rules: tuple[RuleFinding, ...]


class ChangeKind(Enum):
    """What would have to be different."""

    REMOVE = "remove"
    """The policies are not there."""
    ENFORCE = "enforce"
    """The dry-run policy is enforced."""
    FLOW = "flow"
    """The connection is another one, in the named fields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something that would change the verdict, or for REMOVE, what would be decided then.

    Attributes:
        kind: what would have to be different.
        allowed: whether the flow would pass then.
        policies: those that are meant. For FLOW, the one that would match then, or those that would not deny.
        rule: for one that would match, the number of its nearest rule, from 1; else 0.
        fields: for FLOW, what would have to say the opposite: all of these for a rule to match; for policies not to
            deny, enough of these that none of the rules matches.
        text: the same in words.
    """

    kind: ChangeKind
    allowed: bool
    policies: tuple[str, ...]
    rule: int = 0
    fields: tuple[FieldFinding, ...] = ()
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A verdict with its reasons.

    Attributes:
        verdict: the same as `authorize` says.
        policies: what each policy said that the workload is subject to, in the order of their names.
        missing: names of policies that the workload has and that do not exist.
        changes: what would change the verdict, nearest first.
    """

    verdict: Verdict
    policies: tuple[PolicyFinding, ...]
    missing: tuple[str, ...]
    changes: tuple[Change, ...]

    def lines(self) -> Iterator[str]:
        """It all in words, indented."""
        yield f"{'allowed' if self.verdict.allowed else 'denied'}: {self.verdict.reason}"
        for policy in self.policies:
            mode = " (dry run)" if policy.dry_run else ""
            answer = "matches" if policy.matched else "does not match"
            decides = ", decides" if policy.decides else ""
            yield f"{policy.action.name} {policy.policy}{mode}: {answer}{decides}"
            if not policy.rules:
                yield "  without rules it never matches"
            for number, rule in enumerate(policy.rules, 1):
                yield f"  rule {number}: {_says(rule.matched)}"
                if not rule.clauses:
                    yield "    without clauses it always holds"
                for at, clause in enumerate(rule.clauses, 1):
                    yield f"    clause {at}: {_says(clause.matched)}"
                    if not clause.matches:
                        yield "      without matches it always holds"
                    for which, match in enumerate(clause.matches, 1):
                        yield f"      match {which}: {_says(match.matched)}"
                        if not match.fields:
                            yield "        without fields it never holds"
                        for field in match.fields:
                            yield f"        {_says(field.holds)}: {field}"
        for name in self.missing:
            yield f"missing: the workload names {name}, which does not exist"
        for change in self.changes:
            yield f"to change: {change.text}"

    def to_dict(self) -> dict[str, Any]:
        """It all for JSON, with names as in files and dumps."""
        return {
            "allowed": self.verdict.allowed,
            "policy": self.verdict.policy,
            "reason": self.verdict.reason,
            "dryRun": [{"policy": found.policy, "action": found.action.value} for found in self.verdict.dry_run],
            "policies": [
                {
                    "policy": policy.policy,
                    "action": policy.action.value,
                    "scope": policy.scope.value,
                    "dryRun": policy.dry_run,
                    "matched": policy.matched,
                    "decides": policy.decides,
                    "rules": [
                        {
                            "matched": rule.matched,
                            "clauses": [
                                {
                                    "matched": clause.matched,
                                    "matches": [
                                        {"matched": match.matched, "fields": [_field_dict(f) for f in match.fields]}
                                        for match in clause.matches
                                    ],
                                }
                                for clause in rule.clauses
                            ],
                        }
                        for rule in policy.rules
                    ],
                }
                for policy in self.policies
            ],
            "missing": list(self.missing),
            "changes": [
                {
                    "kind": change.kind.value,
                    "allowed": change.allowed,
                    "policies": list(change.policies),
                    "rule": change.rule or None,
                    "fields": [_field_dict(field) for field in change.fields],
                    "text": change.text,
                }
                for change in self.changes
            ],
        }


def _says(holds: bool) -> str:
    return "yes" if holds else "no"


def _field_dict(field: FieldFinding) -> dict[str, Any]:
    return {
        "field": field.field,
        "holds": field.holds,
        "actual": field.actual,
        "values": list(field.values),
        "fits": field.fits,
    }


_Keyed: TypeAlias = "tuple[tuple[str, AuthorizationPolicy], ...]"


def explain_verdict(snapshot: HasPolicies, workload: Workload, flow: Flow) -> Explanation:
    """What `authorize` says and why.

    Args:
        snapshot: the mesh.
        workload: the destination.
        flow: the connection.
    """
    found = policies_for(snapshot.policies, workload)
    rules = {key: tuple(_rule(rule, flow) for rule in policy.rules) for key, policy in found.policies}
    matching = {key for key, said in rules.items() if any(rule.matched for rule in said)}
    verdict = _verdict(found.policies, matching)
    return Explanation(
        verdict=verdict,
        policies=tuple(
            PolicyFinding(
                policy=key,
                action=policy.action,
                scope=policy.scope,
                dry_run=policy.dry_run,
                matched=key in matching,
                decides=key == verdict.policy,
                rules=rules[key],
            )
            for key, policy in found.policies
        ),
        missing=found.missing,
        changes=tuple(_changes(found.policies, rules, matching, verdict)),
    )


def _verdict(policies: _Keyed, matching: set[str]) -> Verdict:
    return decide(policies, lambda key, _: key in matching)


def _shown(value: object) -> str | None:
    match value:
        case None:
            return None
        case StringMatch(kind=StringMatchKind.PRESENCE):
            return "Presence"
        case StringMatch():
            return f"{value.kind.value} {value.value}"
        case ServiceAccount():
            return f"{value.namespace}/{value.service_account}"
    return str(value)


def _field(field: Field, match: Match, flow: Flow) -> Iterator[FieldFinding]:
    actual = field.value(flow)
    for negated in (False, True):
        values = getattr(match, field.negation if negated else field.name)
        if not values:
            continue
        fits = next((value for value in values if field.holds(value, actual)), None)
        yield FieldFinding(
            field=f"not{field.text[0].upper()}{field.text[1:]}" if negated else field.text,
            holds=(fits is None) is negated,
            actual=_shown(actual),
            values=tuple(str(_shown(value)) for value in values),
            fits=_shown(fits),
        )


def _match(match: Match, flow: Flow) -> MatchFinding:
    fields = tuple(finding for field in FIELDS for finding in _field(field, match, flow))
    return MatchFinding(matched=bool(fields) and all(field.holds for field in fields), fields=fields)


def _clause(clause: Clause, flow: Flow) -> ClauseFinding:
    matches = tuple(_match(match, flow) for match in clause)
    return ClauseFinding(matched=not matches or any(match.matched for match in matches), matches=matches)


def _rule(rule: Rule, flow: Flow) -> RuleFinding:
    clauses = tuple(_clause(clause, flow) for clause in rule)
    return RuleFinding(matched=all(clause.matched for clause in clauses), clauses=clauses)


def _changes(
    policies: _Keyed, rules: dict[str, tuple[RuleFinding, ...]], matching: set[str], verdict: Verdict
) -> Iterator[Change]:
    enforced = {action: [k for k, p in policies if p.action is action and not p.dry_run] for action in Action}
    denying = [key for key in enforced[Action.DENY] if key in matching]
    if denying:
        then = _verdict(tuple((key, policy) for key, policy in policies if key not in denying), matching)
        yield from _avoiding(denying, rules, then)
        yield from _without(denying, policies, matching)
    elif not verdict.allowed:
        # Any one of them is enough.
        yield from _near(enforced[Action.ALLOW], rules, allowed=True)
        yield from _without(enforced[Action.ALLOW], policies, matching)
    else:
        yield from _near(enforced[Action.DENY], rules, allowed=False)
        if verdict.policy is not None:
            yield from _without([key for key in enforced[Action.ALLOW] if key in matching], policies, matching)
    for number, (key, policy) in enumerate(policies):
        if policy.dry_run:
            changed = (*policies[:number], (key, replace(policy, dry_run=False)), *policies[number + 1 :])
            then = _verdict(changed, matching)
            if then.allowed is not verdict.allowed:
                yield Change(
                    kind=ChangeKind.ENFORCE,
                    allowed=then.allowed,
                    policies=(key,),
                    text=f"{_outcome(then)}, if {key} was enforced instead of dry run",
                )


def _outcome(verdict: Verdict) -> str:
    return f"{'allowed' if verdict.allowed else 'denied'} ({verdict.reason})"


def _without(keys: list[str], policies: _Keyed, matching: set[str]) -> Iterator[Change]:
    then = _verdict(tuple((key, policy) for key, policy in policies if key not in keys), matching)
    yield Change(
        kind=ChangeKind.REMOVE,
        allowed=then.allowed,
        policies=tuple(keys),
        text=f"{_outcome(then)}, if there was no {' and no '.join(keys)}",
    )


def _near(keys: list[str], rules: dict[str, tuple[RuleFinding, ...]], *, allowed: bool) -> Iterator[Change]:
    """For each policy that could match another flow, what its nearest rule lacks."""
    found = []
    for key in keys:
        lacking = [(number, fields) for number, rule in enumerate(rules[key], 1) if (fields := _lacking(rule))]
        if lacking:
            number, fields = min(lacking, key=lambda rule: len(rule[1]))
            found.append((key, number, fields))
    for key, number, fields in sorted(found, key=lambda near: len(near[2])):
        wanted = " and ".join(_otherwise(field) for field in fields)
        yield Change(
            kind=ChangeKind.FLOW,
            allowed=allowed,
            policies=(key,),
            rule=number,
            fields=fields,
            text=f"{'allowed' if allowed else 'denied'} by {key}, rule {number}, if {wanted}",
        )


def _otherwise(field: FieldFinding) -> str:
    if field.fits is not None:
        return f"{field.field} was not {field.shown}, which fits {field.fits}"
    return f"{field.field} was not {field.shown} but {_any_of(field.values)}"


def _avoiding(keys: list[str], rules: dict[str, tuple[RuleFinding, ...]], then: Verdict) -> Iterator[Change]:
    """What makes policies match, if another flow could avoid it."""
    found: list[FieldFinding] = []
    said = []
    for key in keys:
        for number, rule in enumerate(rules[key], 1):
            if not rule.matched:
                continue
            fields = tuple(
                _distinct(
                    f for clause in rule.clauses for match in clause.matches if match.matched for f in match.fields
                )
            )
            if not fields:
                return
            found += fields
            said.append(f"{key}, rule {number} ({', '.join(str(field) for field in fields)})")
    yield Change(
        kind=ChangeKind.FLOW,
        allowed=then.allowed,
        policies=tuple(keys),
        fields=tuple(_distinct(found)),
        text=f"{_outcome(then)}, if it was not for {' and '.join(said)}",
    )


def _lacking(rule: RuleFinding) -> tuple[FieldFinding, ...]:
    """The fewest fields that would have to say the opposite for a rule to hold; none when that cannot be."""
    found: list[FieldFinding] = []
    for clause in rule.clauses:
        if clause.matched:
            continue
        possible = [[field for field in match.fields if not field.holds] for match in clause.matches if match.fields]
        if not possible:
            return ()
        nearest = min(possible, key=len)
        found += nearest
    return tuple(_distinct(found))


def _distinct(fields: Iterable[FieldFinding]) -> Iterator[FieldFinding]:
    seen = set()
    for field in fields:
        if field not in seen:
            seen.add(field)
            yield field
