"""Which endpoints of a service a client may get, and how one of them is chosen.

Three steps. An endpoint that could not serve the connection is left out: its workload is unknown, has no address, has
no such port, or has capacity 0. Then the service's load balancer ranks the rest by what they have in common with the
client, and unless it wants them all only the best rank stays. Of these, one is drawn in proportion to its capacity.

The first two steps depend on nothing that changes while a snapshot lives, so their result, `Candidates`, can be kept;
the draw is cheap.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from hbone.mesh import LoadBalancerMode, NamespacedHostname, RoutingPreference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hbone.mesh import MeshSnapshot, Service, ServiceEndpoint, Workload
    from hbone.routing._values import Note

__all__ = ["Candidates", "KeptCandidates", "Rank", "Weights", "candidates", "is_passthrough", "port_of", "rank"]

_SPOKEN = 16
"""Endpoints that a note names one by one."""


class Weights:
    """Draws one of several by weight.

    Args:
        weights: at least one, none negative, not all 0. One with weight 0 is never drawn.
    """

    __slots__ = ("_count", "_sums")

    def __init__(self, weights: Sequence[int]) -> None:
        self._count = len(weights)
        # Nearly always all weigh the same, and then no table is needed.
        same = weights[0] > 0 and weights.count(weights[0]) == self._count
        self._sums = None if same else list(accumulate(weights))

    def draw(self, random: float) -> int:
        """The index of the one that a number from 0 up to 1 stands for."""
        sums = self._sums
        if sums is None:
            return min(int(random * self._count), self._count - 1)
        # A last one that weighs nothing must not be reached, not even by a random number that rounding made 1.
        return bisect_right(sums, min(int(random * sums[-1]), sums[-1] - 1))

    def share(self, index: int) -> float:
        """How likely it is to be drawn, 0 to 1."""
        sums = self._sums
        if sums is None:
            return 1 / self._count
        return (sums[index] - (sums[index - 1] if index else 0)) / sums[-1]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The endpoints of which one is drawn; none when `weights` is None."""

    endpoints: tuple[ServiceEndpoint, ...]
    weights: Weights | None


@dataclass(frozen=True, slots=True)
class Rank:
    """How near an endpoint is to a client."""

    matched: int
    """How many of the service's preferences hold, up to the first that does not."""
    value: int
    """What is compared: more is nearer."""


def is_passthrough(service: Service) -> bool:
    """Whether a service's traffic goes where the application sent it."""
    balancer = service.load_balancer
    return balancer is not None and balancer.mode is LoadBalancerMode.PASSTHROUGH


def rank(preferences: tuple[RoutingPreference, ...], client: Workload, workload: Workload) -> Rank:
    """What a workload has in common with a client, in the order of a service's preferences.

    The first preference that does not hold ends it. A leading NETWORK is special: every endpoint of the client's own
    network is nearer than any of another, and those of other networks are still told apart by the preferences after it.
    """
    return _rank(preferences, _traits(preferences)(client), _traits(preferences)(workload))


def _rank(preferences: tuple[RoutingPreference, ...], wanted: tuple[str, ...], found: tuple[str, ...]) -> Rank:
    matched = bonus = 0
    for position, preference in enumerate(preferences):
        leading_network = position == 0 and preference is RoutingPreference.NETWORK
        if wanted[position] == found[position]:
            matched += 1
            bonus = len(preferences) - 1 if leading_network else bonus
        elif not leading_network:
            break
    return Rank(matched, matched + bonus)


_TRAIT: Final = {
    RoutingPreference.NETWORK: "network",
    RoutingPreference.REGION: "locality.region",
    RoutingPreference.ZONE: "locality.zone",
    RoutingPreference.SUBZONE: "locality.subzone",
    RoutingPreference.NODE: "node",
    RoutingPreference.CLUSTER: "cluster_id",
}


def _traits(preferences: tuple[RoutingPreference, ...]) -> Callable[[Workload], tuple[str, ...]]:
    """Takes from a workload what its rank depends on."""
    names = [_TRAIT[preference] for preference in preferences]
    if len(names) < 2:  # an attrgetter of one name gives no tuple
        return lambda workload: tuple(attrgetter(name)(workload) for name in names)
    return attrgetter(*names)


def port_of(service: Service, endpoint: ServiceEndpoint, workload: Workload, port: int) -> int | None:
    """The port of an endpoint that stands behind a port of its service; None when there is none."""
    target = endpoint.ports.get(port) or service.ports.get(port)
    if target:
        return target
    tunnel = workload.application_tunnel
    return port if tunnel is not None and tunnel.port is not None else None


def candidates(
    snapshot: MeshSnapshot,
    client: Workload,
    service: Service,
    port: int,
    *,
    waypoint: bool = False,
    note: Note | None = None,
) -> Candidates:
    """The endpoints of a service that a client may get for a port.

    Args:
        snapshot: what there is.
        client: who asks.
        service: whose endpoints.
        port: of the service.
        waypoint: whether the service is looked up as a waypoint, which need not have the port if its workloads have an
            application tunnel.
        note: hears which endpoints were left out and why.
    """
    if port not in service.ports and not waypoint:
        if note is not None:
            note(f"{service.key} has no port {port}; it has {_ports(service)}")
        return Candidates((), None)
    found = _usable(snapshot, client, service, port, waypoint)
    if note is not None:
        _note_left_out(
            snapshot, client, service, port, waypoint, {endpoint.workload_uid for endpoint, _ in found}, note
        )
    balancer = service.load_balancer
    if balancer is not None and balancer.mode not in (LoadBalancerMode.STANDARD, LoadBalancerMode.PASSTHROUGH):
        found = _nearest(client, service, found, note)
    elif note is not None and found:
        note(f"{service.key} takes every endpoint alike, near or far")
    if not found:
        if note is not None:
            note(f"no endpoint of {service.key} can be used")
        return Candidates((), None)
    return Candidates(
        tuple([endpoint for endpoint, _ in found]),
        Weights([workload.capacity for _, workload in found]),
    )


def _usable(
    snapshot: MeshSnapshot, client: Workload, service: Service, port: int, waypoint: bool
) -> list[tuple[ServiceEndpoint, Workload]]:
    workloads = snapshot.workloads
    network = client.network
    # With a target port at the service nothing needs to be asked of an endpoint; this loop is run for all of them.
    named = service.ports.get(port, 0) == 0
    found = []
    for endpoint in snapshot.endpoints(service).values():
        workload = workloads.get(endpoint.workload_uid)
        if workload is None or workload.capacity == 0:
            continue
        if not workload.addresses and not _reachable_without_address(workload, network):
            continue
        if named and not (_serves(service, endpoint, workload, port) if waypoint else endpoint.ports.get(port)):
            continue
        found.append((endpoint, workload))
    return found


def _reachable_without_address(workload: Workload, network: str) -> bool:
    # A gateway is for clients of other networks; in its own network a workload without address is nowhere.
    return bool(workload.hostname) or (workload.network != network and workload.network_gateway is not None)


def _serves(service: Service, endpoint: ServiceEndpoint, workload: Workload, port: int) -> bool:
    """Whether a waypoint serves a port that its service has not, or has by name only."""
    if port not in service.ports and workload.application_tunnel is None:
        return False
    return port_of(service, endpoint, workload, port) is not None


def _nearest(
    client: Workload,
    service: Service,
    found: list[tuple[ServiceEndpoint, Workload]],
    note: Note | None,
) -> list[tuple[ServiceEndpoint, Workload]]:
    balancer = service.load_balancer
    assert balancer is not None
    preferences = balancer.preferences
    traits = _traits(preferences)
    wanted = traits(client)
    # Thousands of endpoints are in a handful of places.
    places = [traits(workload) for _, workload in found]
    ranks = {place: _rank(preferences, wanted, place) for place in set(places)}
    ranked = list(zip(map(ranks.__getitem__, places), found, strict=True))
    if note is not None:
        _note_ranks(service, ranked, note)
    if balancer.mode is LoadBalancerMode.STRICT:
        return [each for one, each in ranked if one.matched == len(preferences)]
    best = max((one.value for one, _ in ranked), default=0)
    return [each for one, each in ranked if one.value == best]


class KeptCandidates:
    """Candidates of clients that are alike, found once for each snapshot, or taken over from the one before."""

    __slots__ = ("_found",)

    def __init__(self) -> None:
        self._found: dict[
            tuple[NamespacedHostname, int, bool], tuple[Service, Mapping[str, ServiceEndpoint], Candidates]
        ] = {}

    def find(
        self, snapshot: MeshSnapshot, client: Workload, service: Service, port: int, *, waypoint: bool
    ) -> Candidates:
        """What `candidates` answers."""
        key = (service.key, port, waypoint)
        known = self._found.get(key)
        if known is not None:
            return known[2]
        found = candidates(snapshot, client, service, port, waypoint=waypoint)
        if waypoint or port in service.ports:  # the answer for other ports is no work, and there are many of them
            self._found[key] = (service, snapshot.endpoints(service), found)
        return found

    def still_true(self, snapshot: MeshSnapshot) -> KeptCandidates:
        """Those of a snapshot before that hold for this one too.

        A service's endpoints are the same object as long as neither the service nor a workload that names it changes.
        Of endpoints that are written at the service, the workload may change alone.
        """
        kept = KeptCandidates()
        kept._found = {
            key: (service, endpoints, found)
            for key, (service, endpoints, found) in self._found.items()
            if not service.endpoints and snapshot.service(key[0]) is service and snapshot.endpoints(key[0]) is endpoints
        }
        return kept

    def clear(self) -> None:
        """Forget them."""
        self._found.clear()

    def __len__(self) -> int:
        return len(self._found)


# ------------------------------------------------------------------------------------------------------------- in words


def _ports(service: Service) -> str:
    return ", ".join(str(port) for port in sorted(service.ports)) or "none"


def _note_left_out(
    snapshot: MeshSnapshot,
    client: Workload,
    service: Service,
    port: int,
    waypoint: bool,
    used: set[str],
    note: Note,
) -> None:
    endpoints = snapshot.endpoints(service)
    key = service.key
    reasons: dict[str, str] = {}
    for uid, endpoint in endpoints.items():
        if endpoint.workload_uid in used:
            continue
        workload = snapshot.workloads.get(endpoint.workload_uid)
        if workload is None:
            reasons[uid] = "no such workload is known"
        elif workload.capacity == 0:
            reasons[uid] = "its capacity is 0"
        elif not workload.addresses and not _reachable_without_address(workload, client.network):
            reasons[uid] = "it has neither address nor host name" + (
                "" if workload.network == client.network else ", and its network has no gateway"
            )
        elif waypoint and port not in service.ports and workload.application_tunnel is None:
            reasons[uid] = f"the service has no port {port} and the workload no application tunnel"
        else:
            reasons[uid] = f"it has no port for the service's port {port}"
    # The snapshot keeps unhealthy endpoints away from us; whoever wants to know why needs them.
    for uid, workload in snapshot.workloads.items():
        if uid not in endpoints and (key in workload.services or uid in service.endpoints):
            reasons[uid] = "it is unhealthy"
    note(f"{key} has {len(used) + len(reasons)} endpoint(s), of which {len(used)} can be used")
    for uid in sorted(reasons)[:_SPOKEN]:
        workload = snapshot.workloads.get(uid)
        note(f"left out: {uid if workload is None else workload.key}: {reasons[uid]}")
    if len(reasons) > _SPOKEN:
        note(f"left out: {len(reasons) - _SPOKEN} more")


def _note_ranks(service: Service, ranked: list[tuple[Rank, tuple[ServiceEndpoint, Workload]]], note: Note) -> None:
    balancer = service.load_balancer
    assert balancer is not None
    wanted = ", ".join(preference.value for preference in balancer.preferences) or "nothing"
    strict = balancer.mode is LoadBalancerMode.STRICT
    note(f"{service.key} {'insists on' if strict else 'prefers'} the client's {wanted} ({balancer.mode.value})")
    best = max((one.value for one, _ in ranked), default=0)
    order = sorted(ranked, key=lambda each: (-each[0].value, each[1][1].uid))
    for one, (_, workload) in order[:_SPOKEN]:
        if strict:
            kept = one.matched == len(balancer.preferences)
            told = f"{one.matched} of {len(balancer.preferences)} in common"
        else:
            kept = one.value == best
            told = f"rank {one.value}"
        note(f"{workload.key}: {told}" + ("" if kept else ": left out"))
    if len(order) > _SPOKEN:
        note(f"{len(order) - _SPOKEN} more with the same or a lower rank")
