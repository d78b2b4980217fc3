"""What an explanation is made of: frozen values, what they come to in one line, and their JSON."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from hbone.address import Authority
from hbone.errors import InvalidIdentity
from hbone.routing import NoOutboundRoute, OutboundProtocol, RouteType

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hbone.address import Endpoint, IPAddress
    from hbone.identity import SpiffeIdentity
    from hbone.mesh import Service, Workload
    from hbone.rbac import Explanation, Flow
    from hbone.routing import OutboundRoute

__all__ = ["Arrival", "ConnectionExplanation", "Outcome", "Way", "identity_of"]


class Outcome(Enum):
    """What becomes of a connection. Whether an application listens at its end is for the application to know."""

    THROUGH = "through"
    """It gets to its end."""
    NO_ROUTE = "no-route"
    """The client's node knows no way."""
    WRONG_PEER = "peer-identity"
    """The next hop proves another identity than is expected."""
    DENIED = "denied"
    """Policy says no: status 401, or a reset for plain text."""
    BAD_TARGET = "bad-target"
    """The far node does not serve what it is asked for: status 400."""
    UNREACHABLE = "unreachable"
    """The far node has no way to its application: status 503."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What the node before a workload makes of a connection.

    Attributes:
        workload: whose node it is.
        protocol: how the connection comes: HBONE, or TCP for plain text.
        dialled: the address that it comes to.
        identity: who the node proves to be; None for plain text, or when it can prove nothing.
        steps: how it is decided, one fact a line.
        upstream: where the application is; None when it does not get as far.
        service: what was wanted, as far as it can be told there.
        flow: what policies see; None when they are not asked.
        policy: what they say; None when they are not asked.
        outcome: what becomes of it.
        reason: why, in words.
    """

    workload: Workload
    protocol: OutboundProtocol
    dialled: Endpoint
    identity: SpiffeIdentity | None = None
    steps: tuple[str, ...] = ()
    upstream: Endpoint | None = None
    service: Service | None = None
    flow: Flow | None = None
    policy: Explanation | None = None
    outcome: Outcome
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """It all for JSON."""
        flow = self.flow
        return {
            "workload": _workload(self.workload),
            "protocol": self.protocol.value,
            "dialled": str(self.dialled),
            "identity": _text(self.identity),
            "outcome": self.outcome.value,
            "reason": self.reason,
            "steps": list(self.steps),
            "upstream": _text(self.upstream),
            "service": None if self.service is None else str(self.service.key),
            "flow": None
            if flow is None
            else {
                "sourceIp": str(flow.source_ip),
                "sourceIdentity": _text(flow.source_identity),
                "destinationIp": str(flow.destination_ip),
                "destinationPort": flow.destination_port,
            },
            "policy": None if self.policy is None else self.policy.to_dict(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One of the ways that a connection may take.

    Attributes:
        share: of the connections; None when somebody else decides that, such as a waypoint.
        route: the next hop, or why there is none.
        arrival: what the node of the next hop decides; None when no node stands there, as far as the mesh says.
        behind: how it goes on from a waypoint or a gateway; None when it ends here, or when that is not known.
        note: why there is no `arrival` or no `behind`; empty when that is plain.
    """

    share: float | None
    route: OutboundRoute | NoOutboundRoute
    arrival: Arrival | None = None
    behind: ConnectionExplanation | None = None
    note: str = ""

    @property
    def outcome(self) -> Outcome:
        """What becomes of a connection that takes it."""
        if isinstance(self.route, NoOutboundRoute):
            return Outcome.NO_ROUTE
        if self.arrival is not None and self.arrival.outcome is not Outcome.THROUGH:
            return self.arrival.outcome
        return Outcome.THROUGH if self.behind is None else self.behind.outcome

    @property
    def reason(self) -> str:
        """In words: why it ends where it ends, or how it gets through."""
        route, arrival, behind = self.route, self.arrival, self.behind
        if isinstance(route, NoOutboundRoute):
            return route.reason
        if arrival is not None and arrival.outcome is not Outcome.THROUGH:
            return arrival.reason
        said = [_hop_in_words(route, arrival)]
        if arrival is not None:
            said[0] += f" ({arrival.reason})"
        if behind is not None:
            said.append(f"then {behind.reason}" if behind.possible else f"but then {behind.reason}")
        return ", ".join(said)

    @property
    def possible(self) -> bool:
        """Whether a connection that takes it can get through: there may be several ways behind."""
        return self.outcome is Outcome.THROUGH or (
            self.behind is not None
            and self.behind.possible
            and (self.arrival is None or self.arrival.outcome is Outcome.THROUGH)
        )

    def to_dict(self) -> dict[str, Any]:
        """It all for JSON; what there is not is null."""
        route = self.route
        said: dict[str, Any] = {
            "share": self.share,
            "outcome": self.outcome.value,
            "reason": self.reason,
            "note": self.note,
            "type": None,
            "protocol": None,
            "nextHop": None,
            "authority": None,
            "expected": [],
            "innerExpected": [],
            "workload": None,
            "service": None,
        }
        if not isinstance(route, NoOutboundRoute):
            said |= {
                "type": route.type.value,
                "protocol": route.protocol.value,
                "nextHop": str(route.next_hop),
                "authority": _text(route.authority),
                "expected": [str(identity) for identity in route.expected],
                "innerExpected": [str(identity) for identity in route.inner_expected],
                "workload": _workload(route.workload),
                "service": None if route.service is None else str(route.service.key),
            }
        said["arrival"] = None if self.arrival is None else self.arrival.to_dict()
        said["behind"] = None if self.behind is None else self.behind.to_dict()
        return said


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionExplanation:
    """What becomes of a connection, and why.

    Attributes:
        source: whose it is; None for an address that is not of the mesh.
        source_ip: where it comes from.
        target: where it wants to go.
        network: the network of the node that carries it; for plain text, of the workload that it comes to.
        plain: whether it comes in plain text, past all nodes but the last.
        steps: how it is decided which way it goes, one fact a line; where something is drawn, the likeliest way.
        ways: all that it may take, the likeliest first.
        omitted: the share of further ways, when there are too many to list.
    """

    source: Workload | None
    source_ip: IPAddress
    target: Authority
    network: str
    plain: bool = False
    steps: tuple[str, ...]
    ways: tuple[Way, ...]
    omitted: float = 0.0

    @property
    def identity(self) -> SpiffeIdentity | None:
        """Who the client proves to be; None for plain text."""
        return None if self.plain or self.source is None else identity_of(self.source)

    @property
    def outcome(self) -> Outcome:
        """THROUGH when all ways get through; else what becomes of the likeliest one that does not."""
        return next((way.outcome for way in self.ways if way.outcome is not Outcome.THROUGH), Outcome.THROUGH)

    @property
    def reason(self) -> str:
        """In words: how it gets through, or why not."""
        through = [way for way in self.ways if way.outcome is Outcome.THROUGH]
        failing = [way for way in self.ways if way.outcome is not Outcome.THROUGH]
        if not failing:
            return through[0].reason if len(through) == 1 else f"by any of {len(through)} ways"
        reasons = "; ".join(_few(dict.fromkeys(way.reason for way in failing)))
        if not through:
            return reasons
        return f"by {_part(through, len(self.ways))}: {reasons}"

    @property
    def possible(self) -> bool:
        """Whether any way gets through."""
        return any(way.possible for way in self.ways)

    @property
    def conclusion(self) -> str:
        """All of it in one line."""
        who = str(self.source_ip) if self.source is None else self.source.key
        gets = "gets" if self.possible else "does not get"
        said = f"{who} {gets} to {self.target}{' ' if self.reason.startswith('by ') else ': '}{self.reason}"
        return f"{said}; {100 * self.omitted:.3g} % of the connections go other ways" if self.omitted else said

    def to_dict(self) -> dict[str, Any]:
        """It all for JSON."""
        return {
            "outcome": self.outcome.value,
            "conclusion": self.conclusion,
            "client": {
                "workload": None if self.source is None else _workload(self.source),
                "ip": str(self.source_ip),
                "identity": _text(self.identity),
            },
            "target": str(self.target),
            "network": self.network,
            "plain": self.plain,
            "steps": list(self.steps),
            "ways": [way.to_dict() for way in self.ways],
            "omitted": self.omitted,
        }


def identity_of(workload: Workload) -> SpiffeIdentity | None:
    """Who it is, as far as it can be."""
    try:
        return workload.identity
    except InvalidIdentity:
        return None


def _hop_in_words(route: OutboundRoute, arrival: Arrival | None) -> str:
    workload = route.workload
    at = str(route.next_hop) if workload is None else workload.key
    match route.type:
        case RouteType.TO_SERVER_WAYPOINT:
            return f"over HBONE to the waypoint {at}"
        case RouteType.TO_GATEWAY:
            return f"with a tunnel in a tunnel through the gateway {at}"
    if route.protocol is OutboundProtocol.TCP:
        if arrival is not None:
            return f"in plain text to {arrival.workload.key}"
        if isinstance(route.next_hop, Authority):
            return f"in plain text to whatever address DNS has for {route.next_hop.host}"
        return f"in plain text to {at}, where no node stands"
    return f"over HBONE to {at}"


def _part(ways: list[Way], count: int) -> str:
    """How many connections take some ways."""
    said = f"{len(ways)} of {count} ways only"
    shares = [way.share for way in ways if way.share is not None]
    return said if len(shares) < len(ways) else f"{said} ({100 * sum(shares):.3g} % of the connections)"


def _few(reasons: Iterable[str]) -> list[str]:
    found = list(reasons)
    return found if len(found) <= 3 else [*found[:2], f"and {len(found) - 2} other reasons"]


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _workload(workload: Workload | None) -> dict[str, str] | None:
    if workload is None:
        return None
    return {"uid": workload.uid, "namespace": workload.namespace, "name": workload.name}
