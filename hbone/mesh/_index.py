"""The indexes behind a `MeshSnapshot`: made by editing the indexes of the snapshot before.

An index is a dictionary from what is asked for to a *group*: who has that address, that name. Groups are small and
immutable; an edit copies the dictionary (in C, some 50 microseconds for 10 000 entries) and makes only the groups anew
that it touches. A snapshot from nothing is an edit of the empty one, so there is one way for an index to come about.

Each group has its best member first, or says at once which one that is, so that a look-up takes as long for a large
mesh as for a small one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar

from hbone.mesh._values import (
    HealthPolicy,
    HealthStatus,
    IPAddress,
    IPNetwork,
    NamespacedHostname,
    NetworkMode,
    Service,
    ServiceEndpoint,
    TunnelProtocol,
    Visibility,
    Workload,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = [
    "CidrKey",
    "EndpointIndex",
    "ServiceChoice",
    "ServiceIndex",
    "WorkloadIndex",
    "all_of",
    "best_of",
    "host_key",
    "ip_key",
    "prefixes",
]

_Key = TypeVar("_Key")
_Id = TypeVar("_Id")
_Member = TypeVar("_Member")
_Group = TypeVar("_Group")

AddressKey: TypeAlias = tuple[str, bytes]
"""Network and address."""
CidrKey: TypeAlias = tuple[str, int, int, int]
"""Network, bits of an address, prefix length, the prefix's bits as a number."""
Endpoints: TypeAlias = "dict[str, ServiceEndpoint]"

_MAPPED: Final = bytes(10) + b"\xff\xff"


def ip_key(ip: IPAddress) -> bytes:
    """What equal addresses have in common; an IPv4 address mapped into IPv6 equals the IPv4 address.

    Bytes, because `ipaddress` hashes and compares in Python.
    """
    packed = ip.packed
    return packed[12:] if len(packed) == 16 and packed.startswith(_MAPPED) else packed


def host_key(hostname: str) -> str:
    """What equal host names have in common: neither case nor the final dot counts (RFC 1034 section 3.1)."""
    return hostname.lower().removesuffix(".")


def prefixes(network: str, address: bytes, lengths: Mapping[tuple[str, int], tuple[int, ...]]) -> Iterable[CidrKey]:
    """The ranges that an address (an `ip_key`) is in, for the prefix lengths that its network and family have."""
    bits = 8 * len(address)
    found = lengths.get((network, bits))
    if not found:
        return ()
    number = int.from_bytes(address)
    return ((network, bits, length, number >> (bits - length)) for length in found)


def _cidr_key(network: str, cidr: IPNetwork) -> CidrKey:
    bits = cidr.max_prefixlen
    return network, bits, cidr.prefixlen, int(cidr.network_address) >> (bits - cidr.prefixlen)


class _Edits(Generic[_Key, _Id, _Member]):
    """What changes in the groups of one index."""

    def __init__(self) -> None:
        self._by_key: dict[_Key, dict[_Id, _Member | None]] = {}

    def put(self, key: _Key, member_id: _Id, member: _Member | None) -> None:
        """Put a member into a group, in place of the one with its id, or take that one out."""
        edits = self._by_key.get(key)
        if edits is None:
            self._by_key[key] = {member_id: member}
        else:
            edits[member_id] = member

    def keys(self) -> Iterable[_Key]:
        return self._by_key.keys()

    def to_groups(
        self,
        groups: dict[_Key, _Group],
        members: Callable[[_Group], Iterable[_Member]],
        identify: Callable[[_Member], _Id],
        make: Callable[[list[_Member]], _Group],
    ) -> dict[_Key, _Group]:
        """The groups after the edits."""
        if not self._by_key:
            return groups
        result = groups.copy()
        for key, edits in self._by_key.items():
            group = result.get(key)
            found = [] if group is None else [each for each in members(group) if identify(each) not in edits]
            found.extend(member for member in edits.values() if member is not None)
            if found:
                result[key] = make(found)
            else:
                result.pop(key, None)
        return result

    def to_tables(self, tables: dict[_Key, dict[_Id, _Member]]) -> dict[_Key, dict[_Id, _Member]]:
        """The same for groups that are large and have no best member: dictionaries by id."""
        if not self._by_key:
            return tables
        result = tables.copy()
        for key, edits in self._by_key.items():
            old = result.get(key)
            table = {} if old is None else old.copy()
            for member_id, member in edits.items():
                if member is None:
                    table.pop(member_id, None)
                else:
                    table[member_id] = member
            if table:
                result[key] = table
            else:
                result.pop(key, None)
        return result


# --------------------------------------------------------------------------------------------------------- workloads

_uid: Callable[[Workload], str] = attrgetter("uid")


def _worse(workload: Workload) -> tuple[bool, bool, str]:
    # The uid makes the answer the same whatever order they came in.
    return "//Pod/" not in workload.uid, workload.protocol is not TunnelProtocol.HBONE, workload.uid


_Workloads: TypeAlias = "Workload | tuple[Workload, ...]"
"""One alone, as nearly all are, or several, best first. A tuple for each would be half of what a garbage collection
has to walk for a mesh."""


def _best_first(workloads: list[Workload]) -> _Workloads:
    if len(workloads) == 1:
        return workloads[0]
    workloads.sort(key=_worse)
    return tuple(workloads)


def all_of(group: _Workloads) -> tuple[Workload, ...]:
    """The workloads of a group, best first."""
    return group if isinstance(group, tuple) else (group,)


def best_of(group: _Workloads | None) -> Workload | None:
    """The best workload of a group, if there is a group."""
    return group[0] if isinstance(group, tuple) else group


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadIndex:
    """Workloads by what they are looked up by; of several with the same, pods first, then HBONE, then by uid."""

    by_address: dict[AddressKey, _Workloads] = field(default_factory=dict)
    by_name: dict[tuple[str, str, str], _Workloads] = field(default_factory=dict)
    """By namespace, name and service account."""
    by_hostname: dict[tuple[str, str], _Workloads] = field(default_factory=dict)
    """By namespace and host name."""
    by_node: dict[str, dict[str, Workload]] = field(default_factory=dict)

    def edited(self, removed: Iterable[Workload], added: Iterable[Workload]) -> WorkloadIndex:
        """The index without these, then with those."""
        addresses: _Edits[AddressKey, str, Workload] = _Edits()
        names: _Edits[tuple[str, str, str], str, Workload] = _Edits()
        hostnames: _Edits[tuple[str, str], str, Workload] = _Edits()
        nodes: _Edits[str, str, Workload] = _Edits()
        for workloads, present in ((removed, False), (added, True)):
            for workload in workloads:
                uid = workload.uid
                member = workload if present else None
                # Host-network workloads share their node's address: it says nothing about which one is meant.
                if workload.network_mode is not NetworkMode.HOST_NETWORK:
                    for ip in workload.addresses:
                        addresses.put((workload.network, ip_key(ip)), uid, member)
                names.put((workload.namespace, workload.name, workload.service_account), uid, member)
                if workload.hostname:
                    hostnames.put((workload.namespace, host_key(workload.hostname)), uid, member)
                nodes.put(workload.node, uid, member)
        return WorkloadIndex(
            by_address=addresses.to_groups(self.by_address, all_of, _uid, _best_first),
            by_name=names.to_groups(self.by_name, all_of, _uid, _best_first),
            by_hostname=hostnames.to_groups(self.by_hostname, all_of, _uid, _best_first),
            by_node=nodes.to_tables(self.by_node),
        )


# ---------------------------------------------------------------------------------------------------------- services


@dataclass(frozen=True, slots=True)
class ServiceChoice:
    """The services that have something in common, and which of them a client means.

    A client means its own namespace's service, else one that everybody sees; of several the canonical one, else the
    one that was seen first.
    """

    services: tuple[Service, ...]
    """As they were seen."""
    of_namespace: dict[str, Service]
    public: Service | None


_service_key: Callable[[Service], NamespacedHostname] = attrgetter("key")
_services: Callable[[ServiceChoice], tuple[Service, ...]] = attrgetter("services")


def _choice(services: Iterable[Service]) -> ServiceChoice:
    services = tuple(services)
    of_namespace: dict[str, Service] = {}
    public: Service | None = None
    for service in services:
        own = of_namespace.get(service.namespace)
        if own is None or (service.canonical and not own.canonical):
            of_namespace[service.namespace] = service
        if service.visibility is Visibility.PUBLIC and (public is None or (service.canonical and not public.canonical)):
            public = service
    return ServiceChoice(services, of_namespace, public)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceIndex:
    """Services by what they are looked up by."""

    seen: dict[NamespacedHostname, int] = field(default_factory=dict)
    """Grows in the order in which they were first seen; a service that is replaced keeps its number."""
    next_seen: int = 0
    by_vip: dict[AddressKey, ServiceChoice] = field(default_factory=dict)
    by_cidr: dict[CidrKey, ServiceChoice] = field(default_factory=dict)
    prefix_lengths: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    """By network and bits of an address: the prefix lengths that occur in `by_cidr`, longest first."""
    by_hostname: dict[str, ServiceChoice] = field(default_factory=dict)
    by_written_endpoint: dict[str, tuple[Service, ...]] = field(default_factory=dict)
    """By the uid of a workload that is written at the service itself."""

    def edited(
        self, removed: Mapping[NamespacedHostname, Service], added: Mapping[NamespacedHostname, Service]
    ) -> ServiceIndex:
        """The index without these, then with those."""
        vips: _Edits[AddressKey, NamespacedHostname, Service] = _Edits()
        cidrs: _Edits[CidrKey, NamespacedHostname, Service] = _Edits()
        hostnames: _Edits[str, NamespacedHostname, Service] = _Edits()
        written: _Edits[str, NamespacedHostname, Service] = _Edits()
        seen = self.seen.copy()
        next_seen = self.next_seen
        for key in removed.keys() - added.keys():
            del seen[key]
        for services, present in ((removed, False), (added, True)):
            for key, service in services.items():
                if present and key not in seen:
                    seen[key] = next_seen
                    next_seen += 1
                member = service if present else None
                for vip in service.vips:
                    vips.put((vip.network, ip_key(vip.ip)), key, member)
                for cidr in service.cidr_vips:
                    cidrs.put(_cidr_key(cidr.network, cidr.cidr), key, member)
                hostnames.put(host_key(service.hostname), key, member)
                for endpoint in service.endpoints.values():
                    written.put(endpoint.workload_uid, key, member)

        def as_seen(services: list[Service]) -> tuple[Service, ...]:
            if len(services) > 1:
                services.sort(key=lambda service: seen[service.key])
            return tuple(services)

        def choice(services: list[Service]) -> ServiceChoice:
            return _choice(as_seen(services))

        by_cidr = cidrs.to_groups(self.by_cidr, _services, _service_key, choice)
        lengths = self.prefix_lengths if by_cidr is self.by_cidr else _prefix_lengths(by_cidr)
        return ServiceIndex(
            seen=seen,
            next_seen=next_seen,
            by_vip=vips.to_groups(self.by_vip, _services, _service_key, choice),
            by_cidr=by_cidr,
            prefix_lengths=lengths,
            by_hostname=hostnames.to_groups(self.by_hostname, _services, _service_key, choice),
            by_written_endpoint=written.to_groups(self.by_written_endpoint, tuple, _service_key, as_seen),
        )


def _prefix_lengths(by_cidr: dict[CidrKey, ServiceChoice]) -> dict[tuple[str, int], tuple[int, ...]]:
    found: dict[tuple[str, int], set[int]] = {}
    for network, bits, length, _ in by_cidr:
        found.setdefault((network, bits), set()).add(length)
    return {key: tuple(sorted(lengths, reverse=True)) for key, lengths in found.items()}


# --------------------------------------------------------------------------------------------------------- endpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointIndex:
    """What workloads say that they are endpoints of, whether such a service is known or not."""

    healthy: dict[NamespacedHostname, Endpoints] = field(default_factory=dict)
    unhealthy: dict[NamespacedHostname, Endpoints] = field(default_factory=dict)
    of_service: dict[NamespacedHostname, Mapping[str, ServiceEndpoint]] = field(default_factory=dict)
    """The endpoints that are used, for each service that is known."""

    def edited(
        self,
        removed: Iterable[Workload],
        added: Iterable[Workload],
        services: Mapping[NamespacedHostname, Service],
        changed: Iterable[NamespacedHostname],
    ) -> EndpointIndex:
        """The index after workloads and services have changed.

        Args:
            removed: workloads that are gone, or were replaced.
            added: workloads that are there now.
            services: all services that are known now.
            changed: those that came, went or were replaced.
        """
        healthy: _Edits[NamespacedHostname, str, ServiceEndpoint] = _Edits()
        unhealthy: _Edits[NamespacedHostname, str, ServiceEndpoint] = _Edits()
        for workload in removed:
            edits = healthy if workload.status is HealthStatus.HEALTHY else unhealthy
            for key in workload.services:
                edits.put(key, workload.uid, None)
        for workload in added:
            edits = healthy if workload.status is HealthStatus.HEALTHY else unhealthy
            for key, ports in workload.services.items():
                endpoint = ServiceEndpoint(workload_uid=workload.uid, ports=ports, status=workload.status)
                edits.put(key, workload.uid, endpoint)
        touched = {*healthy.keys(), *unhealthy.keys(), *changed}
        by_healthy = healthy.to_tables(self.healthy)
        by_unhealthy = unhealthy.to_tables(self.unhealthy)
        of_service = self.of_service.copy() if touched else self.of_service
        for key in touched:
            service = services.get(key)
            if service is None:
                of_service.pop(key, None)
            else:
                of_service[key] = MappingProxyType(_used(service, by_healthy.get(key, {}), by_unhealthy.get(key, {})))
        return EndpointIndex(healthy=by_healthy, unhealthy=by_unhealthy, of_service=of_service)

    def staged(
        self, services: Mapping[NamespacedHostname, Any]
    ) -> dict[NamespacedHostname, Mapping[str, ServiceEndpoint]]:
        """The endpoints of services that are not known."""
        return {
            key: MappingProxyType({**self.healthy.get(key, {}), **self.unhealthy.get(key, {})})
            for key in {**self.healthy, **self.unhealthy}
            if key not in services
        }


def _used(service: Service, healthy: Endpoints, unhealthy: Endpoints) -> Endpoints:
    everyone = service.load_balancer is not None and service.load_balancer.health_policy is HealthPolicy.ALLOW_ALL
    if not service.endpoints and not (everyone and unhealthy):
        return healthy
    written = {
        endpoint.workload_uid: endpoint
        for endpoint in service.endpoints.values()
        # What a workload says of itself counts more than what the service says of it.
        if (everyone or endpoint.status is HealthStatus.HEALTHY) and endpoint.workload_uid not in unhealthy
    }
    return {**written, **healthy, **unhealthy} if everyone else {**written, **healthy}
