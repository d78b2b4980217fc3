"""Where a connection of a local workload goes.

A decision has a part that only the mesh, the client and the target decide, and a part that is drawn anew for every
connection: which of several endpoints, waypoints or gateways. So it is worked out as a `Plan`: a route, or the reason
why there is none, or a *fork*, at which something is drawn (`Choice`) or asked (`FromWaypoint`). Behind each branch of
a fork is a plan again, worked out when a connection first takes it. `route_outbound` makes a plan and walks it;
`Router` keeps plans, so that both give the same answers.

Nothing in a plan refers to the snapshot that it was made from, which would keep the snapshot alive from within its own
memo; whoever walks a plan has the snapshot at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from hbone.address import Authority, Endpoint
from hbone.errors import InvalidAddress, InvalidIdentity
from hbone.identity import SpiffeIdentity
from hbone.mesh import IpFamilies, NetworkAddress, TunnelProtocol, Visibility
from hbone.routing._balance import Weights, candidates, is_passthrough, port_of
from hbone.routing._values import NoOutboundRoute, OutboundProtocol, OutboundRoute, RouteType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hbone.address import IPAddress
    from hbone.mesh import GatewayAddress, MeshSnapshot, Service, ServiceEndpoint, WeightedGateway, Workload
    from hbone.routing._balance import KeptCandidates
    from hbone.routing._values import Note, RoutingConfig

__all__ = ["Asking", "Choice", "Fork", "FromWaypoint", "Plan", "in_words", "plan_outbound", "route_outbound"]

_Option = TypeVar("_Option")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """On whose behalf a plan is made, out of what, and who hears about it."""

    snapshot: MeshSnapshot
    config: RoutingConfig
    source: Workload
    note: Note | None = None
    kept: KeptCandidates | None = None
    """Candidates that were found before for a client like this one."""


class Fork:
    """Where the way of a connection divides."""

    __slots__ = ("branches",)

    def __init__(self, count: int) -> None:
        self.branches: list[Plan | None] = [None] * count
        """What is behind each branch; None as long as nobody went there."""

    def choose(self, source: Workload, source_ip: IPAddress | None, random: Callable[[], float]) -> int:
        """Which branch a connection takes."""
        raise NotImplementedError

    def shares(self, source: Workload, source_ip: IPAddress | None) -> list[float]:
        """How likely each branch is."""
        raise NotImplementedError

    def tell(self, asking: Asking, source_ip: IPAddress | None, index: int, note: Note) -> None:
        """Say which branch was taken."""
        raise NotImplementedError

    def branch(self, asking: Asking, index: int) -> Plan:
        """What is behind a branch."""
        found = self.branches[index]
        if found is None:
            found = self.branches[index] = self._follow(asking, index)
        return found

    def _follow(self, asking: Asking, index: int) -> Plan:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.branches)


Plan: TypeAlias = OutboundRoute | NoOutboundRoute | Fork


class Choice(Fork, Generic[_Option]):
    """One of several is drawn by weight."""

    __slots__ = ("_behind", "_name", "_options", "_weights")

    def __init__(
        self,
        options: Sequence[_Option],
        weights: Weights,
        behind: Callable[[Asking, _Option], Plan],
        name: Callable[[Asking, _Option], str],
    ) -> None:
        super().__init__(len(options))
        self._options = options
        self._weights = weights
        self._behind = behind
        self._name = name

    def choose(self, source: Workload, source_ip: IPAddress | None, random: Callable[[], float]) -> int:
        return self._weights.draw(random()) if len(self._options) > 1 else 0

    def shares(self, source: Workload, source_ip: IPAddress | None) -> list[float]:
        return [self._weights.share(index) for index in range(len(self))]

    def tell(self, asking: Asking, source_ip: IPAddress | None, index: int, note: Note) -> None:
        name = self._name(asking, self._options[index])
        if len(self) == 1:
            note(f"{name} is the only one")
        else:
            note(f"{name} is drawn, one of {len(self)}, with a share of {100 * self._weights.share(index):.3g} %")

    def _follow(self, asking: Asking, index: int) -> Plan:
        return self._behind(asking, self._options[index])


class FromWaypoint(Fork):
    """Whether the connection comes from a waypoint of its target, which it must not pass again."""

    __slots__ = ("_inside", "_outside", "_waypoints")

    def __init__(
        self,
        waypoints: dict[SpiffeIdentity, frozenset[IPAddress]],
        inside: Callable[[Asking], Plan],
        outside: Callable[[Asking], Plan],
    ) -> None:
        super().__init__(2)
        self._waypoints = waypoints
        self._inside = inside
        self._outside = outside

    def choose(self, source: Workload, source_ip: IPAddress | None, random: Callable[[], float]) -> int:
        identity = _identity(source)
        return 0 if identity is not None and source_ip in self._waypoints.get(identity, ()) else 1

    def shares(self, source: Workload, source_ip: IPAddress | None) -> list[float]:
        index = self.choose(source, source_ip, float)
        return [1.0 - index, float(index)]

    def tell(self, asking: Asking, source_ip: IPAddress | None, index: int, note: Note) -> None:
        if index == 0:
            note(f"{asking.source.key} at {source_ip} is that waypoint: it goes on directly")

    def _follow(self, asking: Asking, index: int) -> Plan:
        return self._outside(asking) if index else self._inside(asking)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What the application asked for."""

    target: Authority
    """As it asked for it; what a waypoint is told."""
    ip: IPAddress | None
    """Of `target`; None for a name that has no address in the mesh."""
    service: Service | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hop:
    """A workload that a connection may go to, and where it is."""

    workload: Workload
    service: Service | None
    """Whose endpoint it is, when it was chosen as one."""
    port: int
    ip: IPAddress | None
    """None when it is only known by name, or not at all in this network."""


_Then: TypeAlias = Callable[[Asking, _Hop], "Plan"]


def route_outbound(
    snapshot: MeshSnapshot,
    config: RoutingConfig,
    *,
    source: Workload,
    source_ip: IPAddress | None,
    target: Authority,
    random: Callable[[], float],
    note: Note | None = None,
) -> OutboundRoute | NoOutboundRoute:
    """Decide where a connection goes.

    Args:
        snapshot: the mesh.
        config: what the node knows besides.
        source: the local workload that connects.
        source_ip: the address that it connects from.
        target: where it wants to go. A name is that of a service, else of a workload that the client's namespace has by
            that name, else none of the mesh's.
        random: draws a number from 0 up to 1, evenly: asked once for each choice between endpoints or gateways.
        note: hears how the decision came about.
    """
    asking = Asking(snapshot=snapshot, config=config, source=source, note=note)
    plan = plan_outbound(asking, target)
    while isinstance(plan, Fork):
        index = plan.choose(source, source_ip, random)
        if note is not None:
            plan.tell(asking, source_ip, index, note)
        plan = plan.branch(asking, index)
    if note is not None:
        note(in_words(plan))
    return plan


def plan_outbound(asking: Asking, target: Authority) -> Plan:
    """The part of a decision that does not change from one connection to the next."""
    note = asking.note
    ip = target.ip
    if note is not None:
        source = asking.source
        note(f"{source.key} (network {_quoted(source.network)}, node {_quoted(source.node)}) connects to {target}")
    if target.port in asking.config.illegal_ports and _is_loopback(target, ip):
        return NoOutboundRoute(reason=f"{target} is a port of the proxy itself: the connection would go in a circle")
    return _to_name(asking, target) if ip is None else _to_address(asking, target, ip)


# --------------------------------------------------------------------------------------------------- what is asked for


def _to_address(asking: Asking, target: Authority, ip: IPAddress) -> Plan:
    snapshot, source, note = asking.snapshot, asking.source, asking.note
    network = asking.config.network
    # Two questions that look alike: whose waypoint guards the address (a workload's own address is no service's), and
    # where its connections end (a service's before a workload's).
    owner = snapshot.workload_by_address(network, ip)
    guarded = None if owner is not None else snapshot.service_by_vip(network, ip, source.namespace)
    service = snapshot.service_by_vip(source.network, ip, source.namespace)
    if note is not None:
        _note_address(asking, ip, owner, guarded or service)
    if guarded is not None:
        plan = _service_waypoint(asking, _Wanted(target=target, ip=ip, service=guarded))
        if plan is not None:
            return plan
    if service is not None:
        if is_passthrough(service):
            if note is not None:
                note(f"{service.key} is passed through: its connections go where the application sent them")
            return _passthrough(Endpoint(ip, target.port))
        wanted = _Wanted(target=target, ip=ip, service=service)
        plan = _balanced(asking, service, target.port, ip, partial(_direct, wanted=wanted))
        if plan is not None:
            return plan
    workload = snapshot.workload_by_address(source.network, ip)
    if workload is not None:
        return _to_workload(asking, workload, _Wanted(target=target, ip=ip))
    if service is not None or (guarded is not None and not is_passthrough(guarded)):
        return NoOutboundRoute(reason=f"no healthy upstream: {target}")
    return _passthrough(Endpoint(ip, target.port))


def _to_name(asking: Asking, target: Authority) -> Plan:
    snapshot, source, note = asking.snapshot, asking.source, asking.note
    service = snapshot.service_by_hostname(target.host, source.namespace)
    if service is None:
        workload = snapshot.workload_by_hostname(source.namespace, target.host)
        if workload is not None:
            if note is not None:
                note(f"{target.host} is the name of the workload {workload.key} ({workload.uid})")
            return _to_workload(asking, workload, _Wanted(target=target, ip=None))
        if note is not None:
            note(f"the mesh has no service and no workload with the name {target.host} that {source.key} can see")
        return _passthrough(target)
    ip = _vip(service, asking.config.network)
    if note is not None:
        note(f"{target.host} is the name of the service {service.key}")
        note(
            f"that service has no VIP in the network {_quoted(asking.config.network)}"
            if ip is None
            else f"its VIP in the network {_quoted(asking.config.network)} is {ip}"
        )
    # From here on it is as if the application had resolved the name and connected to the VIP.
    asked = target if ip is None else Authority(str(ip), target.port)
    wanted = _Wanted(target=asked, ip=ip, service=service)
    plan = _service_waypoint(asking, wanted)
    if plan is not None:
        return plan
    if is_passthrough(service):
        if note is not None:
            note(f"{service.key} is passed through: its connections go where the application sent them")
        return _passthrough(target if ip is None else Endpoint(ip, target.port))
    plan = _balanced(asking, service, target.port, ip, partial(_direct, wanted=wanted))
    return NoOutboundRoute(reason=f"no healthy upstream: {target}") if plan is None else plan


def _to_workload(asking: Asking, workload: Workload, wanted: _Wanted) -> Plan:
    hop = _hop(workload, None, wanted.target.port, wanted.ip)
    direct = partial(_direct, hop=hop, wanted=wanted)
    gateway = workload.waypoint
    if gateway is None:
        return direct(asking)
    if asking.note is not None:
        asking.note(f"the workload {workload.key} has a waypoint: {_told(gateway)}")
    waypoint = partial(_reach, gateway=gateway, of=workload, wanted=wanted, waypoint=True)
    return FromWaypoint(
        _waypoint_workloads(asking, workload, gateway),
        direct,
        partial(waypoint, then=partial(_at_waypoint, wanted=wanted)),
    )


def _passthrough(next_hop: Endpoint | Authority) -> OutboundRoute:
    return OutboundRoute(type=RouteType.PASSTHROUGH, protocol=OutboundProtocol.TCP, next_hop=next_hop)


# -------------------------------------------------------------------------------------------- endpoints and gateways


def _balanced(
    asking: Asking,
    service: Service,
    port: int,
    ip: IPAddress | None,
    then: _Then,
    *,
    waypoint: bool = False,
) -> Plan | None:
    """A choice among the endpoints of a service; None when it has none that can be used."""
    if asking.kept is not None:
        found = asking.kept.find(asking.snapshot, asking.source, service, port, waypoint=waypoint)
    else:
        found = candidates(asking.snapshot, asking.source, service, port, waypoint=waypoint, note=asking.note)
    if found.weights is None:
        return None
    behind = partial(_behind_endpoint, service=service, port=port, ip=ip, then=then)
    return Choice(found.endpoints, found.weights, behind, _endpoint_name)


def _behind_endpoint(
    asking: Asking, endpoint: ServiceEndpoint, *, service: Service, port: int, ip: IPAddress | None, then: _Then
) -> Plan:
    workload = asking.snapshot.workloads[endpoint.workload_uid]
    target_port = port_of(service, endpoint, workload, port)
    assert target_port is not None  # or it would not be among the candidates
    if asking.note is not None:
        asking.note(f"{workload.key} ({workload.uid}) stands behind {service.key} port {port} with port {target_port}")
    return then(asking, _hop(workload, service, target_port, ip))


def _hop(workload: Workload, service: Service | None, port: int, ip: IPAddress | None) -> _Hop:
    families = None if service is None else service.ip_families
    return _Hop(workload=workload, service=service, port=port, ip=_address(workload, ip, families))


def _address(workload: Workload, ip: IPAddress | None, families: IpFamilies | None) -> IPAddress | None:
    """The address of a workload that suits the one that was asked for."""
    if ip is not None and ip in workload.addresses:
        return ip
    version = {IpFamilies.IPV4: 4, IpFamilies.IPV6: 6}.get(families) if families is not None else None
    fitting = [each for each in workload.addresses if version is None or each.version == version]
    if ip is not None:
        for each in fitting:
            if each.version == ip.version:
                return each
    return fitting[0] if fitting else None


def _service_waypoint(asking: Asking, wanted: _Wanted) -> Plan | None:
    """The way through the service's waypoint; None when it has none."""
    service, note = wanted.service, asking.note
    assert service is not None
    then = partial(_at_waypoint, wanted=wanted)
    weighted = service.weighted_waypoints
    if any(each.weight for each in weighted):
        if note is not None:
            for each in weighted:
                note(f"the service {service.key} has a waypoint of weight {each.weight}: {_told(each.destination)}")
        behind = partial(_behind_weighted, service=service, wanted=wanted, then=then)
        return Choice(weighted, Weights([each.weight for each in weighted]), behind, _gateway_name)
    if service.waypoint is None:
        return None
    if note is not None:
        if weighted:
            note(f"all weighted waypoints of {service.key} weigh 0: its other one counts")
        note(f"the service {service.key} has a waypoint: {_told(service.waypoint)}")
    return _reach(asking, gateway=service.waypoint, of=service, wanted=wanted, waypoint=True, then=then)


def _behind_weighted(
    asking: Asking, option: WeightedGateway, *, service: Service, wanted: _Wanted, then: _Then
) -> Plan:
    return _reach(asking, gateway=option.destination, of=service, wanted=wanted, waypoint=True, then=then)


def _reach(
    asking: Asking,
    *,
    gateway: GatewayAddress,
    of: Service | Workload,
    wanted: _Wanted,
    waypoint: bool,
    then: _Then,
) -> Plan:
    """The way to a waypoint or a network's gateway. One that cannot be found is never gone around."""
    snapshot = asking.snapshot
    destination, port = gateway.destination, gateway.hbone_mtls_port
    service: Service | None
    workload: Workload | None
    if isinstance(destination, NetworkAddress):
        # Who gives an address gives an IP family with it. It is meant as in the namespace of who refers to it.
        ip: IPAddress | None = destination.ip
        service = snapshot.service_by_vip(destination.network, destination.ip, of.namespace)
        workload = snapshot.workload_by_address(destination.network, destination.ip) if service is None else None
    else:
        ip = wanted.ip
        service = snapshot.service(destination)
        workload = snapshot.workload_by_hostname(destination.namespace, destination.hostname) if not service else None
    what = "waypoint" if waypoint else "network gateway"
    if workload is not None:
        return then(asking, _hop(workload, None, port, ip))
    if service is None:
        return NoOutboundRoute(
            reason=f"unknown {what}: {of.key} refers to {destination}, and there is no such service or workload"
        )
    plan = None
    if not is_passthrough(service):
        plan = _balanced(asking, service, port, ip, then, waypoint=waypoint)
    if plan is not None:
        return plan
    return NoOutboundRoute(
        reason=f"no healthy {what}: {of.key} refers to {destination}, and {service.key} has no endpoint for port {port}"
    )


def _waypoint_workloads(
    asking: Asking, workload: Workload, gateway: GatewayAddress
) -> dict[SpiffeIdentity, frozenset[IPAddress]]:
    """Who the waypoint of a workload is, and at which addresses."""
    snapshot, destination = asking.snapshot, gateway.destination
    service: Service | None
    if isinstance(destination, NetworkAddress):
        single = snapshot.workload_by_address(destination.network, destination.ip)
        service = snapshot.service_by_vip(destination.network, destination.ip, workload.namespace)
    else:
        single = snapshot.workload_by_hostname(destination.namespace, destination.hostname)
        service = snapshot.service(destination)
    found: dict[SpiffeIdentity, frozenset[IPAddress]] = {}
    uids = () if service is None else [each.workload_uid for each in snapshot.endpoints(service).values()]
    for each in (single, *map(snapshot.workloads.get, uids)):
        if each is not None and (identity := _identity(each)) is not None:
            found[identity] = found.get(identity, frozenset()).union(each.addresses)
    return found


# ----------------------------------------------------------------------------------------------------- what comes next


def _direct(asking: Asking, hop: _Hop, wanted: _Wanted) -> Plan:
    """To the workload that was meant, or to the gateway of its network."""
    workload, service = hop.workload, wanted.service
    if workload.network != asking.source.network:
        return _through_gateway(asking, hop, wanted)
    if workload.protocol is TunnelProtocol.TCP:
        place = _place(hop, hop.port)
        if isinstance(place, NoOutboundRoute):
            return place
        if hop.port in asking.config.illegal_ports and hop.ip is not None and hop.ip.is_loopback:
            return NoOutboundRoute(reason=f"{place} is a port of the proxy itself: the connection would go in a circle")
        return OutboundRoute(
            type=RouteType.DIRECT,
            protocol=OutboundProtocol.TCP,
            next_hop=place,
            workload=workload,
            service=service,
        )
    place = _place(hop, asking.config.hbone_port)
    authority = _place(hop, hop.port)
    if isinstance(place, NoOutboundRoute):
        return place
    if isinstance(authority, NoOutboundRoute):
        return authority
    expected = _expected(asking, hop)
    if not expected:
        return _nobody(hop)
    return OutboundRoute(
        type=RouteType.DIRECT,
        protocol=OutboundProtocol.HBONE,
        next_hop=place,
        authority=authority.authority if isinstance(authority, Endpoint) else authority,
        expected=expected,
        workload=workload,
        service=service,
    )


def _at_waypoint(asking: Asking, hop: _Hop, wanted: _Wanted) -> Plan:
    if hop.workload.network != asking.source.network:
        return _through_gateway(asking, hop, wanted)
    place = _place(hop, hop.port)
    if isinstance(place, NoOutboundRoute):
        return place
    expected = _expected(asking, hop)
    if not expected:
        return _nobody(hop)
    return OutboundRoute(
        type=RouteType.TO_SERVER_WAYPOINT,
        protocol=OutboundProtocol.HBONE,
        next_hop=place,
        authority=wanted.target,
        expected=expected,
        workload=hop.workload,
        service=wanted.service,
    )


def _through_gateway(asking: Asking, hop: _Hop, wanted: _Wanted) -> Plan:
    """A tunnel in a tunnel: the outer one ends at the gateway of the workload's network, the inner one behind it."""
    workload, service = hop.workload, wanted.service
    if asking.note is not None:
        asking.note(
            f"{workload.key} is in the network {_quoted(workload.network)}, the client in"
            f" {_quoted(asking.source.network)}: the way is through that network's gateway, with a tunnel in a tunnel"
        )
    if service is None:
        return NoOutboundRoute(
            reason=f"no valid destination: {workload.key} is in the network {_quoted(workload.network)},"
            f" and only services can be reached in another network"
        )
    gateway = workload.network_gateway
    if gateway is None:
        return NoOutboundRoute(
            reason=f"no valid destination: {workload.key} is in the network {_quoted(workload.network)},"
            " and no gateway to there is known"
        )
    inner = () if hop.service is None else _subject_alt_names(asking, hop.service, where=" behind the gateway")
    if not inner:
        chosen = workload if hop.service is None else hop.service
        return NoOutboundRoute(
            reason=f"no valid destination: nobody is known to be {chosen.key} behind a gateway, it has no"
            " subjectAltNames that are SPIFFE ids"
        )
    try:
        authority = Authority(service.hostname, wanted.target.port)
    except InvalidAddress as problem:
        return NoOutboundRoute(reason=f"no valid destination: {service.key}: {problem}")
    then = partial(_at_gateway, authority=authority, inner_expected=inner, service=service)
    if asking.note is not None:
        asking.note(f"the gateway of {workload.key} is {_told(gateway)}")
    return _reach(asking, gateway=gateway, of=workload, wanted=wanted, waypoint=False, then=then)


def _at_gateway(
    asking: Asking,
    hop: _Hop,
    *,
    authority: Authority,
    inner_expected: tuple[SpiffeIdentity, ...],
    service: Service,
) -> Plan:
    place = _place(hop, hop.port)
    if isinstance(place, NoOutboundRoute):
        return place
    expected = _expected(asking, hop)
    if not expected:
        return _nobody(hop)
    return OutboundRoute(
        type=RouteType.TO_GATEWAY,
        protocol=OutboundProtocol.DOUBLE_HBONE,
        next_hop=place,
        authority=authority,
        expected=expected,
        inner_expected=inner_expected,
        workload=hop.workload,
        service=service,
    )


def _place(hop: _Hop, port: int) -> Endpoint | Authority | NoOutboundRoute:
    """Where a hop is: its address, else its name."""
    workload = hop.workload
    if hop.ip is None and not workload.hostname:
        return NoOutboundRoute(reason=f"no valid destination: {workload.key} has no address that can be used")
    try:
        # An Authority has no port 0, which is fine for an Endpoint, but not to connect to.
        place = Authority(workload.hostname if hop.ip is None else str(hop.ip), port)
    except InvalidAddress as problem:
        return NoOutboundRoute(reason=f"no valid destination: {workload.key}: {problem}")
    return place if hop.ip is None else Endpoint(hop.ip, port)


# ----------------------------------------------------------------------------------------------------- who is expected


def _expected(asking: Asking, hop: _Hop) -> tuple[SpiffeIdentity, ...]:
    """Whom to accept as a hop: whom its service names, and itself."""
    names = () if hop.service is None else _subject_alt_names(asking, hop.service)
    own = _identity(hop.workload)
    if asking.note is not None and own is not None:
        asking.note(f"{own} is expected: it is the identity of {hop.workload.key}")
    return names if own is None or own in names else (*names, own)


def _subject_alt_names(asking: Asking, service: Service, where: str = "") -> tuple[SpiffeIdentity, ...]:
    found: dict[SpiffeIdentity, None] = {}
    for name in service.subject_alt_names:
        try:
            found[SpiffeIdentity.parse(name)] = None
        except InvalidIdentity as problem:
            if asking.note is not None:
                asking.note(f"a subjectAltName of {service.key} is left out: {problem}")
            continue
        if asking.note is not None:
            asking.note(f"{name} is expected{where}: it is among the subjectAltNames of {service.key}")
    return tuple(found)


def _identity(workload: Workload) -> SpiffeIdentity | None:
    try:
        return workload.identity
    except InvalidIdentity:
        return None


def _nobody(hop: _Hop) -> NoOutboundRoute:
    return NoOutboundRoute(
        reason=f"no valid destination: {hop.workload.key} cannot be recognised, its namespace, service account and"
        " trust domain make no SPIFFE id"
    )


# -------------------------------------------------------------------------------------------------------------- helpers


def _is_loopback(target: Authority, ip: IPAddress | None) -> bool:
    if ip is not None:
        return ip.is_loopback
    host = target.host.removesuffix(".")
    return host == "localhost" or host.endswith(".localhost")


def _vip(service: Service, network: str) -> IPAddress | None:
    """The VIP of a service that its name stands for in a network: an IPv4 one if there is one."""
    here = [vip.ip for vip in service.vips if vip.network == network]
    return min(here, key=lambda ip: ip.version, default=None)


# ------------------------------------------------------------------------------------------------------------- in words


def _quoted(name: str) -> str:
    return f'"{name}"'


def _told(gateway: GatewayAddress) -> str:
    return f"{gateway.destination} port {gateway.hbone_mtls_port}"


def _endpoint_name(asking: Asking, endpoint: ServiceEndpoint) -> str:
    return asking.snapshot.workloads[endpoint.workload_uid].key


def _gateway_name(asking: Asking, option: WeightedGateway) -> str:
    return _told(option.destination)


def _note_address(asking: Asking, ip: IPAddress, owner: Workload | None, service: Service | None) -> None:
    note, source = asking.note, asking.source
    assert note is not None
    if service is not None:
        ranges = [str(each.cidr) for each in service.cidr_vips if ip in each.cidr]
        exact = any(vip.ip == ip for vip in service.vips)
        note(f"{ip} is {'a VIP' if exact else 'in the VIP range ' + ', '.join(ranges)} of the service {service.key}")
        _note_other_services(asking, ip, service)
    if owner is not None:
        note(f"{ip} is an address of the workload {owner.key} ({owner.uid})")
    if service is None and owner is None:
        note(
            f"{ip} is no address of the mesh in the network {_quoted(asking.config.network)} that {source.key} can see"
        )
        _note_other_services(asking, ip, None)


def _note_other_services(asking: Asking, ip: IPAddress, chosen: Service | None) -> None:
    note, namespace = asking.note, asking.source.namespace
    assert note is not None
    networks = dict.fromkeys((asking.config.network, asking.source.network))
    found = {each.key: each for network in networks for each in asking.snapshot.services_by_vip(network, ip)}
    for service in found.values():
        if service.visibility is Visibility.NAMESPACE and service.namespace != namespace:
            note(f"{service.key} has that address too, but only clients of its own namespace see it")
        elif chosen is not None and service is not chosen:
            note(f"{service.key} has that address too, but {_why_first(chosen, namespace)}")


def _why_first(chosen: Service, namespace: str) -> str:
    if chosen.namespace == namespace:
        return f"{chosen.key} is of the client's own namespace"
    return f"{chosen.key} is {'the canonical one' if chosen.canonical else 'a better match, or was seen first'}"


def in_words(outcome: OutboundRoute | NoOutboundRoute) -> str:
    """The outcome of a decision."""
    if isinstance(outcome, NoOutboundRoute):
        return f"refused: {outcome.reason}"
    if outcome.type is RouteType.PASSTHROUGH:
        return f"passed through in plain TCP to {outcome.next_hop}"
    if outcome.protocol is OutboundProtocol.TCP:
        return f"in plain TCP to {outcome.next_hop}: its workload does not speak HBONE"
    return f"to {outcome}"
