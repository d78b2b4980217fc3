"""An explanation for people: lines, each with a style."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

from hbone.explain import Outcome
from hbone.routing import NoOutboundRoute

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hbone.explain import Arrival, ConnectionExplanation, Way
    from hbone.rbac import ClauseFinding, Explanation, PolicyFinding, RuleFinding

__all__ = ["lines"]

Line: TypeAlias = "tuple[str, str]"

_HEADING: Final = "bold"
_GOOD: Final = "green"
_BAD: Final = "red"
_WORTH_A_WORD: Final = "yellow"
#: How many of the things that did not match are told, and how much of a sentence. JSON has all.
_TOLD: Final = 20
_LONGEST: Final = 1000


def lines(
    explanation: ConnectionExplanation, numbers: Sequence[int], hints: Sequence[str], *, everything: bool
) -> Iterator[Line]:
    """All that is to be said.

    Args:
        explanation: what to say.
        numbers: of its ways.
        hints: what else is worth a word.
        everything: whether to tell all about each way, and not only about the first that fails, or the first.
    """
    who = f"{explanation.source_ip}"
    if explanation.source is not None:
        who = f"{explanation.source.key} at {who}"
    yield f"from  {who}, {explanation.identity or 'without identity'}", ""
    yield f"to    {explanation.target}", ""
    for hint in hints:
        yield f"note  {hint}", _WORTH_A_WORD
    yield "", ""
    heading = "in plain text" if explanation.plain else "at the client's node"
    yield from _connection(explanation, tuple(map(str, numbers)), everything, heading, "")
    yield explanation.conclusion, _style(explanation.outcome)


def _connection(
    explanation: ConnectionExplanation, names: Sequence[str], everything: bool, heading: str, indent: str
) -> Iterator[Line]:
    yield f"{indent}{heading}", _HEADING
    yield from ((f"{indent}  {step}", "") for step in explanation.steps)
    yield "", ""
    ways = tuple(zip(names, explanation.ways, strict=True))
    if len(ways) > 1 or explanation.omitted:
        yield f"{indent}{len(ways)} ways", _HEADING
        for name, way in ways:
            share = "" if way.share is None else f"{100 * way.share:6.3g} %"
            yield f"{indent}  {name}{share}  {way.route}", ""
            yield f"{indent}  {' ' * len(name + share)}  {way.reason}", _style(way.outcome)
        yield "", ""
    failing = [each for each in ways if each[1].outcome is not Outcome.THROUGH]
    for name, way in ways if everything else (failing or ways)[:1]:
        title = f"way {name}: " if len(ways) > 1 else ""
        yield from _way(way, name, title, everything, indent)


def _way(way: Way, name: str, title: str, everything: bool, indent: str) -> Iterator[Line]:
    route = way.route
    if isinstance(route, NoOutboundRoute):
        return
    if way.arrival is not None:
        yield from _arrival(way.arrival, title, indent)
    elif way.note:
        yield f"{indent}{title}{way.note}", _WORTH_A_WORD
        yield "", ""
    if way.behind is not None:
        heading = title + ("behind it" if route.workload is None else f"behind {route.workload.key}")
        names = [f"{name}.{number}" for number in range(1, len(way.behind.ways) + 1)]
        yield from _connection(way.behind, names, everything, heading, f"{indent}  ")


def _arrival(arrival: Arrival, title: str, indent: str) -> Iterator[Line]:
    yield f"{indent}{title}at the node of {arrival.workload.key}", _HEADING
    yield from ((f"{indent}  {step}", "") for step in arrival.steps)
    yield "", ""
    if arrival.flow is None or arrival.policy is None:
        return
    flow = arrival.flow
    yield f"{indent}{title}policy for {arrival.workload.key}", _HEADING
    who = flow.source_identity or "nobody with an identity"
    yield f"{indent}  {who} at {flow.source_ip} to {flow.destination_ip} port {flow.destination_port}", ""
    yield from ((f"{indent}  {line}", style) for line, style in _policy(arrival.policy))
    yield "", ""


# ------------------------------------------------------------------------------------------------------------- policy


def _policy(explanation: Explanation) -> Iterator[Line]:
    verdict = explanation.verdict
    word = "" if verdict.policy is not None else "allowed: " if verdict.allowed else "denied: "
    yield f"{word}{verdict.reason}", _GOOD if verdict.allowed else _BAD
    without = [policy.policy for policy in explanation.policies if not policy.matched]
    omitted = frozenset(without[_TOLD:])
    for policy in explanation.policies:
        if policy.policy not in omitted:
            yield from _one_policy(policy)
    if omitted:
        yield f"{len(omitted)} more do not match", ""
    for name in explanation.missing:
        yield f"the workload names {name}, which does not exist", _WORTH_A_WORD
    for match in verdict.dry_run:
        yield f"dry run: {match.policy} would have said {match.action.name}", _WORTH_A_WORD
    for change in explanation.changes[:_TOLD]:
        text = f"would be {change.text}"
        yield text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ...", ""
    if len(explanation.changes) > _TOLD:
        yield f"{len(explanation.changes) - _TOLD} more things would change it", ""


def _one_policy(policy: PolicyFinding) -> Iterator[Line]:
    dry_run = " (dry run)" if policy.dry_run else ""
    answer = "matches" if policy.matched else "does not match"
    decides = ", and decides" if policy.decides else ""
    yield f"{policy.action.name} {policy.policy}{dry_run} {answer}{decides}", ""
    if not policy.rules:
        yield "  it has no rules, and so never matches", ""
    failing = 0
    for number, rule in enumerate(policy.rules, 1):
        failing += not rule.matched
        if rule.matched or failing <= _TOLD:
            yield f"  rule {number} {'holds' if rule.matched else 'fails'}: {_rule(rule)}", ""
    if failing > _TOLD:
        yield f"  {failing - _TOLD} more rules fail", ""


def _rule(rule: RuleFinding) -> str:
    if not rule.clauses:
        return "it has no clauses, and so always holds"
    return "; and ".join(_clause(clause) for clause in rule.clauses if clause.matched is rule.matched)


def _clause(clause: ClauseFinding) -> str:
    if not clause.matches:
        return "a clause without matches always holds"
    said = []
    for match in clause.matches:
        if match.matched is not clause.matched:
            continue
        fields = [str(field) for field in match.fields if field.holds is match.matched]
        said.append(", ".join(fields) or "a match without fields never holds")
    return "; or ".join(said)


def _style(outcome: Outcome) -> str:
    return _GOOD if outcome is Outcome.THROUGH else _BAD
