"""What a mesh is made of: workloads, services, policies. Frozen values with Istio's names and no behaviour to speak of.

An absent field has the default that istiod would have meant: trust domain ``cluster.local``, service account
``default``, cluster ``Kubernetes``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, TypeAlias

from hbone.identity import SpiffeIdentity

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "Action",
    "ApplicationTunnel",
    "ApplicationTunnelProtocol",
    "AuthorizationPolicy",
    "Clause",
    "GatewayAddress",
    "HealthPolicy",
    "HealthStatus",
    "IpFamilies",
    "LoadBalancer",
    "LoadBalancerMode",
    "Locality",
    "Match",
    "NamespacedHostname",
    "NetworkAddress",
    "NetworkCidr",
    "NetworkMode",
    "RoutingPreference",
    "Rule",
    "Scope",
    "Service",
    "ServiceAccount",
    "ServiceEndpoint",
    "StringMatch",
    "StringMatchKind",
    "TunnelProtocol",
    "Visibility",
    "WeightedGateway",
    "Workload",
]

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPNetwork: TypeAlias = IPv4Network | IPv6Network


class TunnelProtocol(Enum):
    """How a workload is reached."""

    TCP = "TCP"
    HBONE = "HBONE"


class NetworkMode(Enum):
    """Whether a workload has an address of its own, or its node's."""

    STANDARD = "Standard"
    HOST_NETWORK = "HostNetwork"


class HealthStatus(Enum):
    """Whether a workload passes its probes."""

    HEALTHY = "Healthy"
    UNHEALTHY = "Unhealthy"


class ApplicationTunnelProtocol(Enum):
    """What an application wants before the bytes of a connection."""

    NONE = "NONE"
    PROXY = "PROXY"


class LoadBalancerMode(Enum):
    """How strictly a service's routing preferences are taken."""

    STANDARD = "Standard"
    STRICT = "Strict"
    FAILOVER = "Failover"
    PASSTHROUGH = "Passthrough"


class RoutingPreference(Enum):
    """What a client and an endpoint may have in common."""

    NETWORK = "Network"
    REGION = "Region"
    ZONE = "Zone"
    SUBZONE = "Subzone"
    NODE = "Node"
    CLUSTER = "Cluster"


class HealthPolicy(Enum):
    """Which endpoints of a service are used."""

    ONLY_HEALTHY = "OnlyHealthy"
    ALLOW_ALL = "AllowAll"


class IpFamilies(Enum):
    """Which IP families a service has."""

    DUAL = "Dual"
    IPV4 = "IPv4"
    IPV6 = "IPv6"


class Visibility(Enum):
    """Who sees a service."""

    PUBLIC = "Public"
    NAMESPACE = "Namespace"


class Scope(Enum):
    """Which workloads a policy is about."""

    GLOBAL = "Global"
    NAMESPACE = "Namespace"
    WORKLOAD_SELECTOR = "WorkloadSelector"


class Action(Enum):
    """What a policy does with what it matches."""

    ALLOW = "Allow"
    DENY = "Deny"


class StringMatchKind(Enum):
    """How a `StringMatch` compares; the value is its tag in files and dumps."""

    EXACT = "Exact"
    PREFIX = "Prefix"
    SUFFIX = "Suffix"
    PRESENCE = "Presence"


@dataclass(frozen=True, slots=True)
class NetworkAddress:
    """An address in a network of the mesh; the empty network is the default one. Text: ``network/ip``."""

    network: str
    ip: IPAddress

    def __str__(self) -> str:
        return f"{self.network}/{self.ip}"


@dataclass(frozen=True, slots=True)
class NetworkCidr:
    """A range of addresses in a network of the mesh."""

    network: str
    cidr: IPNetwork

    def __str__(self) -> str:
        return f"{self.network}/{self.cidr}"


@dataclass(frozen=True, slots=True)
class NamespacedHostname:
    """How a service is named everywhere. Text: ``namespace/hostname``."""

    namespace: str
    hostname: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.hostname}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayAddress:
    """Where a waypoint or an east-west gateway is."""

    destination: NetworkAddress | NamespacedHostname
    hbone_mtls_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedGateway:
    """One of several waypoints; per connection each is chosen in proportion to its weight."""

    destination: GatewayAddress
    weight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Locality:
    """Where in the world."""

    region: str = ""
    zone: str = ""
    subzone: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplicationTunnel:
    """How the inbound proxy speaks to the application."""

    protocol: ApplicationTunnelProtocol
    port: int | None = None
    """Instead of the port that was asked for."""


@lru_cache(maxsize=65536)
def _identity(trust_domain: str, namespace: str, service_account: str) -> SpiffeIdentity:
    return SpiffeIdentity.for_workload(namespace=namespace, service_account=service_account, trust_domain=trust_domain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One instance of an application: a pod, a virtual machine, a host that is only known by name."""

    uid: str
    name: str
    namespace: str
    addresses: tuple[IPAddress, ...] = ()
    network: str = ""
    protocol: TunnelProtocol = TunnelProtocol.TCP
    network_mode: NetworkMode = NetworkMode.STANDARD
    trust_domain: str = "cluster.local"
    service_account: str = "default"
    waypoint: GatewayAddress | None = None
    network_gateway: GatewayAddress | None = None
    node: str = ""
    hostname: str = ""
    workload_name: str = ""
    workload_type: str = "pod"
    """Lower case: deployment, cronjob, pod, job."""
    canonical_name: str = ""
    canonical_revision: str = ""
    native_tunnel: bool = False
    application_tunnel: ApplicationTunnel | None = None
    authorization_policies: tuple[str, ...] = ()
    """Policies that select this workload, as ``namespace/name``."""
    status: HealthStatus = HealthStatus.HEALTHY
    cluster_id: str = "Kubernetes"
    locality: Locality = Locality()
    capacity: int = 1
    """Weight among the endpoints of a service; 0 is never chosen."""
    services: Mapping[NamespacedHostname, Mapping[int, int]] = field(default_factory=dict)
    """The services that it is an endpoint of: service port -> its own port. Not to be changed."""

    @property
    def identity(self) -> SpiffeIdentity:
        """Who it is.

        Raises:
            InvalidIdentity: its trust domain, namespace or service account cannot be part of a SPIFFE id.
        """
        return _identity(self.trust_domain, self.namespace, self.service_account)

    @property
    def key(self) -> str:
        """``namespace/name``, for people."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceEndpoint:
    """One workload as an endpoint of one service."""

    workload_uid: str
    ports: Mapping[int, int] = field(default_factory=dict)
    """Service port -> the workload's port. Not to be changed."""
    status: HealthStatus = HealthStatus.HEALTHY


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBalancer:
    """How endpoints are chosen."""

    preferences: tuple[RoutingPreference, ...] = ()
    mode: LoadBalancerMode = LoadBalancerMode.STANDARD
    health_policy: HealthPolicy = HealthPolicy.ONLY_HEALTHY


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A name, its addresses and ports. Its endpoints come from the workloads that name it, and from `endpoints`."""

    name: str
    namespace: str
    hostname: str
    vips: tuple[NetworkAddress, ...] = ()
    cidr_vips: tuple[NetworkCidr, ...] = ()
    ports: Mapping[int, int] = field(default_factory=dict)
    """Service port -> target port; 0 for a named port, which each endpoint maps. Not to be changed."""
    endpoints: Mapping[str, ServiceEndpoint] = field(default_factory=dict)
    """What was written at the service itself, by workload uid. Not to be changed."""
    subject_alt_names: tuple[str, ...] = ()
    waypoint: GatewayAddress | None = None
    weighted_waypoints: tuple[WeightedGateway, ...] = ()
    load_balancer: LoadBalancer | None = None
    ip_families: IpFamilies | None = None
    canonical: bool = False
    visibility: Visibility = Visibility.PUBLIC

    @property
    def key(self) -> NamespacedHostname:
        """Its name in the mesh."""
        return NamespacedHostname(self.namespace, self.hostname)


@dataclass(frozen=True, slots=True)
class StringMatch:
    """A pattern for a text; `value` is empty for PRESENCE."""

    kind: StringMatchKind
    value: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceAccount:
    """A service account, whatever its trust domain."""

    namespace: str
    service_account: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Constraints that all must hold; each field is any-of, each ``not_`` none-of, an empty one no constraint.

    A match without any constraint matches nothing.
    """

    namespaces: tuple[StringMatch, ...] = ()
    not_namespaces: tuple[StringMatch, ...] = ()
    service_accounts: tuple[ServiceAccount, ...] = ()
    not_service_accounts: tuple[ServiceAccount, ...] = ()
    principals: tuple[StringMatch, ...] = ()
    """Against the SPIFFE id without ``spiffe://``."""
    not_principals: tuple[StringMatch, ...] = ()
    source_ips: tuple[IPNetwork, ...] = ()
    not_source_ips: tuple[IPNetwork, ...] = ()
    destination_ips: tuple[IPNetwork, ...] = ()
    not_destination_ips: tuple[IPNetwork, ...] = ()
    destination_ports: tuple[int, ...] = ()
    not_destination_ports: tuple[int, ...] = ()


Clause: TypeAlias = tuple[Match, ...]
"""Any of its matches; an empty one matches everything."""

Rule: TypeAlias = tuple[Clause, ...]
"""All of its clauses; an empty one matches everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorizationPolicy:
    """An L4 authorization policy: any of its rules; one without rules matches nothing."""

    name: str
    namespace: str
    scope: Scope
    action: Action
    rules: tuple[Rule, ...] = ()
    dry_run: bool = False

    @property
    def key(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"
