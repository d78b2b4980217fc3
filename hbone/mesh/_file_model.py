"""What may be written in a mesh file, as pydantic models: each entry of the file, and the value that it stands for.

Every scalar comes here as the text that was written, because the field knows what it wants and YAML can only guess:
``canonicalRevision: 1.10`` and ``name: no`` are texts, ``80: "8080"`` are two ports.

The published JSON schema is made from these models, so what a validator here refuses the schema has to describe.
"""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, TypeAlias, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StringConstraints, ValidationError, WithJsonSchema
from pydantic.alias_generators import to_camel

from hbone.errors import InvalidIdentity
from hbone.identity import SpiffeIdentity
from hbone.mesh._file_yaml import Problem
from hbone.mesh._values import (
    Action,
    ApplicationTunnel,
    ApplicationTunnelProtocol,
    AuthorizationPolicy,
    Clause,
    GatewayAddress,
    HealthPolicy,
    HealthStatus,
    IpFamilies,
    LoadBalancer,
    LoadBalancerMode,
    Locality,
    Match,
    NamespacedHostname,
    NetworkAddress,
    NetworkCidr,
    NetworkMode,
    RoutingPreference,
    Rule,
    Scope,
    Service,
    ServiceAccount,
    ServiceEndpoint,
    StringMatch,
    StringMatchKind,
    TunnelProtocol,
    Visibility,
    WeightedGateway,
    Workload,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from hbone.mesh._file_yaml import Path

__all__ = [
    "ENTRIES",
    "Entry",
    "MeshFile",
    "PolicyEntry",
    "ServiceEntry",
    "WorkloadEntry",
    "problems_of",
    "schema",
    "suggestion",
]

Complain: TypeAlias = "Callable[[Path, str], None]"

_LONGEST_TEXT: Final = 1000
_SHOWN: Final = 60
_MAX_U32: Final = 2**32 - 1


# === texts and what they mean ===


def _shown(value: object) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= _SHOWN else value[:_SHOWN] + "...")
    if value is None:
        return "nothing"
    return "a map" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)


def _expected(what: str, value: object) -> ValueError:
    return ValueError(f"expected {what}, not {_shown(value)}")


def _number(what: str, low: int, high: int) -> Callable[[object], int]:
    longest = len(str(high))

    def read(value: object) -> int:
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= longest:
            number = int(value)
            if low <= number <= high and (value[0] != "0" or len(value) == 1):
                return number
        raise _expected(f"{what} from {low} to {high}", value)

    return read


def _flag(value: object) -> bool:
    if value in ("true", "True", "TRUE"):
        return True
    if value in ("false", "False", "FALSE"):
        return False
    raise _expected("true or false", value)


def _parse_ip(text: str) -> IPv4Address | IPv6Address:
    ip = ip_address(text)
    if isinstance(ip, IPv6Address):
        if ip.scope_id is not None:
            raise ValueError("a zone")
        return ip.ipv4_mapped or ip
    return ip


def _ip(value: object) -> IPv4Address | IPv6Address:
    if isinstance(value, str):
        try:
            return _parse_ip(value)
        except ValueError:
            pass
    raise _expected("an IP address such as 10.0.0.1 or fd00::1", value)


@lru_cache(maxsize=4096)
def _parse_cidr(text: str) -> IPv4Network | IPv6Network:
    ip, slash, length = text.partition("/")
    if "%" in ip or (slash and not (length.isascii() and length.isdigit())):
        raise ValueError("a zone, or a netmask")
    cidr = ip_network(text, strict=False)
    if isinstance(cidr, IPv6Network) and (ip4 := cidr.network_address.ipv4_mapped) and cidr.prefixlen >= 96:
        return IPv4Network((ip4, cidr.prefixlen - 96))
    return cidr


def _cidr(value: object) -> IPv4Network | IPv6Network:
    if isinstance(value, str):
        try:
            return _parse_cidr(value)
        except ValueError:
            pass
    raise _expected("a range of addresses such as 10.0.0.0/8 or fd00::/8", value)


@lru_cache(maxsize=16384)
def _parse_hostname(text: str) -> NamespacedHostname | None:
    namespace, _, hostname = text.partition("/")
    hostname = hostname.lower().removesuffix(".")
    fine = namespace and hostname and "/" not in hostname and not _UNPRINTABLE.search(text)
    return NamespacedHostname(namespace, hostname) if fine and len(text) <= _LONGEST_TEXT else None


def _namespaced_hostname(value: object) -> NamespacedHostname:
    name = _parse_hostname(value) if isinstance(value, str) else None
    if name is None:
        raise _expected("NAMESPACE/HOSTNAME such as shop/stock.shop.svc.cluster.local", value)
    return name


def _network_address(value: object) -> NetworkAddress:
    if isinstance(value, str) and not _UNPRINTABLE.search(value):
        network, slash, ip = value.rpartition("/")
        if slash and "/" not in network:
            try:
                return NetworkAddress(network, _parse_ip(ip))
            except ValueError:
                pass
    raise _expected("NETWORK/IP such as net1/10.0.0.1, or /10.0.0.1 in the network without a name", value)


def _destination(value: object) -> NetworkAddress | NamespacedHostname:
    try:
        return _network_address(value)
    except ValueError:
        pass
    try:
        return _namespaced_hostname(value)
    except ValueError:
        raise _expected("NAMESPACE/HOSTNAME, or NETWORK/IP such as /10.0.0.1", value) from None


def _policy_name(value: object) -> str:
    if isinstance(value, str) and len(value) <= _LONGEST_TEXT and not _UNPRINTABLE.search(value):
        namespace, slash, name = value.partition("/")
        if name or (not slash and namespace):
            return value
    raise _expected("the NAMESPACE/NAME of a policy", value)


_KINDS: Final = {kind.value: kind for kind in StringMatchKind}


def _string_match(value: object) -> StringMatch:
    if isinstance(value, dict) and len(value) == 1:
        ((word, text),) = value.items()
        kind = _KINDS.get(word)
        if kind is StringMatchKind.PRESENCE:
            if text in ([], {}, None, ""):
                return StringMatch(kind)
            raise ValueError(f"expected !Presence [] without a text, not {_shown(text)}")
        if kind is not None:
            if isinstance(text, str) and 0 < len(text) <= _LONGEST_TEXT:
                return StringMatch(kind, text)
            raise _expected(f"a text after !{word}", text)
        hint = suggestion(word, [f"!{each}" for each in _KINDS])
        raise ValueError(f"expected !Exact, !Prefix, !Suffix or !Presence, not !{word}{hint}")
    raise _expected('!Exact TEXT (or {"Exact": TEXT}), !Prefix TEXT, !Suffix TEXT or !Presence []', value)


def suggestion(word: str, choices: Any) -> str:
    """``; did you mean X?`` when one of the choices is close, else nothing."""
    for choice in choices:
        if choice.lower().lstrip("!") == word.lower().replace("_", ""):
            return f"; did you mean {choice}?"
    close = difflib.get_close_matches(word[:_SHOWN], choices, n=1)
    return f"; did you mean {close[0]}?" if close else ""


_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f]")

Text: TypeAlias = Annotated[str, StringConstraints(max_length=_LONGEST_TEXT, pattern=r"^[^\x00-\x1f\x7f]*$")]
Name: TypeAlias = Annotated[
    str, StringConstraints(min_length=1, max_length=_LONGEST_TEXT, pattern=r"^[^\x00-\x1f\x7f]*$")
]
Flag: TypeAlias = Annotated[bool, PlainValidator(_flag), WithJsonSchema({"type": "boolean"})]
Capacity: TypeAlias = Annotated[
    int,
    PlainValidator(_number("a number", 0, _MAX_U32)),
    WithJsonSchema({"type": "integer", "minimum": 0, "maximum": _MAX_U32}),
]
Port: TypeAlias = Annotated[
    int,
    PlainValidator(_number("a port", 1, 65535)),
    WithJsonSchema({"type": "integer", "minimum": 1, "maximum": 65535}),
]
PortOrNone: TypeAlias = Annotated[
    int,
    PlainValidator(_number("a port", 0, 65535)),
    WithJsonSchema({"type": "integer", "minimum": 0, "maximum": 65535}),
]
Ports: TypeAlias = Annotated[
    dict[Port, PortOrNone],
    WithJsonSchema({
        "type": "object",
        "patternProperties": {"^[1-9][0-9]{0,4}$": {"type": "integer", "minimum": 0, "maximum": 65535}},
        "additionalProperties": False,
    }),
]  # fmt: skip
Ip: TypeAlias = Annotated[
    IPv4Address | IPv6Address,
    PlainValidator(_ip),
    WithJsonSchema({"type": "string", "anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]}),
]
Cidr: TypeAlias = Annotated[
    IPv4Network | IPv6Network,
    PlainValidator(_cidr),
    WithJsonSchema({"type": "string", "pattern": r"^[0-9a-fA-F:.]+(/[0-9]{1,3})?$"}),
]
Vip: TypeAlias = Annotated[
    NetworkAddress,
    PlainValidator(_network_address),
    WithJsonSchema({"type": "string", "pattern": r"^[^/]*/[0-9a-fA-F:.]+$"}),
]
ServiceName: TypeAlias = Annotated[
    NamespacedHostname,
    PlainValidator(_namespaced_hostname),
    WithJsonSchema({"type": "string", "pattern": "^[^/]+/[^/]+$"}),
]
Destination: TypeAlias = Annotated[
    NetworkAddress | NamespacedHostname,
    PlainValidator(_destination),
    WithJsonSchema({"type": "string", "pattern": "^[^/]*/[^/]+$"}),
]
PolicyName: TypeAlias = Annotated[str, PlainValidator(_policy_name), WithJsonSchema({"type": "string", "minLength": 1})]
Pattern: TypeAlias = Annotated[
    StringMatch,
    PlainValidator(_string_match),
    WithJsonSchema({
        # What an editor sees of a tagged value is the value without the tag.
        "anyOf": [
            {
                "type": "object",
                "minProperties": 1,
                "maxProperties": 1,
                "additionalProperties": False,
                "properties": {
                    "Exact": {"type": "string"},
                    "Prefix": {"type": "string"},
                    "Suffix": {"type": "string"},
                    "Presence": {"type": ["array", "object", "null"], "maxItems": 0, "maxProperties": 0},
                },
            },
            {"type": "string", "description": "!Exact TEXT, !Prefix TEXT or !Suffix TEXT"},
            {"type": "array", "maxItems": 0, "description": "!Presence []"},
        ]
    }),
]  # fmt: skip


# === entries ===


class Entry(BaseModel):
    """A part of the file: a map with known keys."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", alias_generator=to_camel)


class GatewayEntry(Entry):
    """Where a waypoint or an east-west gateway is."""

    destination: Destination = Field(description="NAMESPACE/HOSTNAME of a service, or NETWORK/IP.")
    hbone_mtls_port: Port = Field(default=15008, description="Its port for HBONE.")

    def to_value(self) -> GatewayAddress:
        """The value that this stands for."""
        return GatewayAddress(destination=self.destination, hbone_mtls_port=self.hbone_mtls_port)


class LocalityEntry(Entry):
    """Where in the world; all three are needed, and may be empty."""

    region: Text
    zone: Text
    subzone: Text


class ApplicationTunnelEntry(Entry):
    """How the inbound proxy speaks to the application."""

    protocol: ApplicationTunnelProtocol = Field(description="PROXY: a PROXY protocol header (version 2) comes first.")
    port: PortOrNone | None = Field(default=None, description="Instead of the port that was asked for.")


class WorkloadEntry(Entry):
    """One instance of an application: a pod, a virtual machine, a host that is only known by name."""

    uid: Text = Field(default="", description="Its key; CLUSTER//Pod/NAMESPACE/NAME when not given.")
    name: Text = ""
    namespace: Name
    workload_ips: list[Ip]
    services: dict[ServiceName, Ports] = Field(
        description="The services that it is an endpoint of, as NAMESPACE/HOSTNAME: service port -> its own port."
    )
    network: Text = Field(default="", description="The network that its addresses are in.")
    protocol: TunnelProtocol = TunnelProtocol.TCP
    network_mode: NetworkMode = NetworkMode.STANDARD
    trust_domain: Text = Field(default="cluster.local", description="Empty is the same as not given.")
    service_account: Text = Field(default="default", description="Empty is the same as not given.")
    waypoint: GatewayEntry | None = None
    network_gateway: GatewayEntry | None = Field(default=None, description="The way into its network from others.")
    node: Text = ""
    hostname: Text = Field(default="", description="For one that is only known by name.")
    workload_name: Text = ""
    workload_type: Text = Field(default="pod", description="deployment, cronjob, pod, job.")
    canonical_name: Text = ""
    canonical_revision: Text = ""
    native_tunnel: Flag = Field(default=False, description="The application speaks HBONE itself.")
    application_tunnel: ApplicationTunnelEntry | None = None
    authorization_policies: list[PolicyName] = Field(
        default=[], description="The policies with scope WorkloadSelector that are about it, as NAMESPACE/NAME."
    )
    status: HealthStatus = HealthStatus.HEALTHY
    cluster_id: Text = Field(default="Kubernetes", description="Empty is the same as not given.")
    locality: LocalityEntry | None = None
    capacity: Capacity = Field(default=1, description="Its weight among the endpoints of a service; 0: never chosen.")

    def to_value(self, complain: Complain) -> Workload:
        """The value that this stands for; complaints are about what no single field can know."""
        trust_domain = self.trust_domain or "cluster.local"
        service_account = self.service_account or "default"
        cluster_id = self.cluster_id or "Kubernetes"
        uid = self.uid
        if not uid:
            uid = workload_uid(cluster_id, self.namespace, self.name)
            if not uid:
                complain((), "expected a uid, or a name to make one of")
        tunnel, locality = self.application_tunnel, self.locality
        workload = Workload(
            uid=uid,
            name=self.name,
            namespace=self.namespace,
            addresses=tuple(self.workload_ips),
            network=self.network,
            protocol=self.protocol,
            network_mode=self.network_mode,
            trust_domain=trust_domain,
            service_account=service_account,
            waypoint=None if self.waypoint is None else self.waypoint.to_value(),
            network_gateway=None if self.network_gateway is None else self.network_gateway.to_value(),
            node=self.node,
            hostname=self.hostname.lower(),
            workload_name=self.workload_name,
            workload_type=self.workload_type.lower(),
            canonical_name=self.canonical_name,
            canonical_revision=self.canonical_revision,
            native_tunnel=self.native_tunnel,
            application_tunnel=None
            if tunnel is None
            else ApplicationTunnel(protocol=tunnel.protocol, port=tunnel.port or None),
            authorization_policies=tuple(self.authorization_policies),
            status=self.status,
            cluster_id=cluster_id,
            locality=_NOWHERE if locality is None else _locality(locality.region, locality.zone, locality.subzone),
            capacity=self.capacity,
            services=_services(tuple([(key, tuple(ports.items())) for key, ports in self.services.items()])),
        )
        try:
            _ = workload.identity
        except InvalidIdentity:
            _complain_of_identity(workload, complain)
        return workload


# Many workloads are in one place, and are endpoints of the same services. What they share, the garbage collector has to
# look at only once.

_NOWHERE: Final = Locality()


@lru_cache(maxsize=16384)
def _locality(region: str, zone: str, subzone: str) -> Locality:
    return Locality(region=region, zone=zone, subzone=subzone)


@lru_cache(maxsize=16384)
def _services(
    services: tuple[tuple[NamespacedHostname, tuple[tuple[int, int], ...]], ...],
) -> Mapping[NamespacedHostname, Mapping[int, int]]:
    return MappingProxyType({key: MappingProxyType(dict(ports)) for key, ports in services})


def workload_uid(cluster_id: str, namespace: str, name: str) -> str:
    """The uid of a workload that was given none; empty when there is nothing to make it of."""
    return f"{cluster_id}//Pod/{namespace}/{name}" if namespace and name else ""


def _complain_of_identity(workload: Workload, complain: Complain) -> None:
    def possible(**parts: str) -> bool:
        try:
            SpiffeIdentity.for_workload(**{"namespace": "n", "service_account": "s", **parts})
        except InvalidIdentity:
            return False
        return True

    usual = "a-z A-Z 0-9 . _ -"
    if not possible(trust_domain=workload.trust_domain):
        complain(("trustDomain",), f"expected a trust domain (a-z 0-9 . _ -), not {_shown(workload.trust_domain)}")
    if not possible(namespace=workload.namespace):
        complain(("namespace",), f"expected a name for a SPIFFE id ({usual}), not {_shown(workload.namespace)}")
    if not possible(service_account=workload.service_account):
        what = _shown(workload.service_account)
        complain(("serviceAccount",), f"expected a name for a SPIFFE id ({usual}), not {what}")


class EndpointEntry(Entry):
    """One workload as an endpoint of a service."""

    workload_uid: Name
    port: Ports = Field(description="Service port -> the workload's port.")
    status: HealthStatus = HealthStatus.HEALTHY


class WeightedWaypointEntry(Entry):
    """One of several waypoints; each connection chooses one in proportion to its weight."""

    destination: GatewayEntry
    weight: Capacity


class CidrVipEntry(Entry):
    """A range of addresses that all mean a service."""

    network: Text = ""
    cidr: Cidr


class LoadBalancerEntry(Entry):
    """How endpoints are chosen."""

    routing_preferences: list[RoutingPreference] = Field(
        default=[], description="What an endpoint should have in common with the client, most important first."
    )
    mode: LoadBalancerMode = LoadBalancerMode.STANDARD
    health_policy: HealthPolicy = HealthPolicy.ONLY_HEALTHY


class ServiceEntry(Entry):
    """A name, its addresses and ports. Its endpoints come from the workloads that name it."""

    name: Name
    namespace: Name
    hostname: Name
    vips: list[Vip] = Field(description="NETWORK/IP; /10.0.0.1 is in the network without a name.")
    ports: Ports = Field(
        description="Service port -> target port; 0 for a port that each endpoint has another one for."
    )
    cidr_vips: list[CidrVipEntry] = []
    endpoints: dict[Name, EndpointEntry] = Field(
        default={}, description="Endpoints by workload uid, besides those that name the service themselves."
    )
    subject_alt_names: list[Text] = Field(
        default=[], description="SPIFFE ids that its endpoints may also have, from another cluster for example."
    )
    waypoint: GatewayEntry | None = None
    weighted_waypoints: list[WeightedWaypointEntry] = []
    load_balancer: LoadBalancerEntry | None = None
    ip_families: IpFamilies | None = None
    canonical: Flag = Field(default=False, description="The one that is meant when several have this host name.")
    visibility: Visibility = Visibility.PUBLIC

    def to_value(self, complain: Complain) -> Service:
        """The value that this stands for; complaints are about what no single field can know."""
        if "/" in self.hostname:
            complain(("hostname",), f"expected a host name, not {_shown(self.hostname)}")
        for uid, endpoint in self.endpoints.items():
            if uid != endpoint.workload_uid:
                complain(("endpoints", uid, "workloadUid"), f"expected {_shown(uid)} as in the key")
        balancer = self.load_balancer
        return Service(
            name=self.name,
            namespace=self.namespace,
            hostname=self.hostname.lower().removesuffix("."),
            vips=tuple(self.vips),
            cidr_vips=tuple(NetworkCidr(each.network, each.cidr) for each in self.cidr_vips),
            ports=self.ports,
            endpoints={
                uid: ServiceEndpoint(workload_uid=uid, ports=each.port, status=each.status)
                for uid, each in self.endpoints.items()
            },
            subject_alt_names=tuple(self.subject_alt_names),
            waypoint=None if self.waypoint is None else self.waypoint.to_value(),
            weighted_waypoints=tuple(
                WeightedGateway(destination=each.destination.to_value(), weight=each.weight)
                for each in self.weighted_waypoints
            ),
            load_balancer=None
            if balancer is None
            else LoadBalancer(
                preferences=tuple(balancer.routing_preferences),
                mode=balancer.mode,
                health_policy=balancer.health_policy,
            ),
            ip_families=self.ip_families,
            canonical=self.canonical,
            visibility=self.visibility,
        )


class ServiceAccountEntry(Entry):
    """A service account, whatever its trust domain."""

    namespace: Name
    service_account: Name

    def to_value(self) -> ServiceAccount:
        """The value that this stands for."""
        return ServiceAccount(namespace=self.namespace, service_account=self.service_account)


class MatchEntry(Entry):
    """Constraints that all must hold; each is any-of, each "not" none-of. One without constraints matches nothing."""

    namespaces: list[Pattern] = []
    not_namespaces: list[Pattern] = []
    service_accounts: list[ServiceAccountEntry] = []
    not_service_accounts: list[ServiceAccountEntry] = []
    principals: list[Pattern] = Field(default=[], description="Against the SPIFFE id without spiffe://.")
    not_principals: list[Pattern] = []
    source_ips: list[Cidr] = []
    not_source_ips: list[Cidr] = []
    destination_ips: list[Cidr] = []
    not_destination_ips: list[Cidr] = []
    destination_ports: list[PortOrNone] = []
    not_destination_ports: list[PortOrNone] = []

    def to_value(self) -> Match:
        """The value that this stands for."""
        return Match(
            namespaces=tuple(self.namespaces),
            not_namespaces=tuple(self.not_namespaces),
            service_accounts=tuple([each.to_value() for each in self.service_accounts]),
            not_service_accounts=tuple([each.to_value() for each in self.not_service_accounts]),
            principals=tuple(self.principals),
            not_principals=tuple(self.not_principals),
            source_ips=tuple(self.source_ips),
            not_source_ips=tuple(self.not_source_ips),
            destination_ips=tuple(self.destination_ips),
            not_destination_ips=tuple(self.not_destination_ips),
            destination_ports=tuple(self.destination_ports),
            not_destination_ports=tuple(self.not_destination_ports),
        )


class PolicyEntry(Entry):
    """An authorization policy for connections: any of its rules; one without rules matches nothing."""

    name: Name
    namespace: Text
    scope: Scope
    action: Action
    rules: list[list[list[MatchEntry]]] = Field(
        description="Any of the rules, all clauses of a rule, any match of a clause."
    )
    dry_run: Flag = Field(description="Only say what it would do.")

    def to_value(self, complain: Complain) -> AuthorizationPolicy:
        """The value that this stands for; complaints are about what no single field can know."""
        if "/" in self.name:
            complain(("name",), f"expected a name without '/', not {_shown(self.name)}")
        if "/" in self.namespace:
            complain(("namespace",), f"expected a name without '/', not {_shown(self.namespace)}")
        rules: list[Rule] = []
        for rule in self.rules:
            clauses: list[Clause] = [tuple([match.to_value() for match in clause]) for clause in rule]
            rules.append(tuple(clauses))
        return AuthorizationPolicy(
            name=self.name,
            namespace=self.namespace,
            scope=self.scope,
            action=self.action,
            rules=tuple(rules),
            dry_run=self.dry_run,
        )


class MeshFile(Entry):
    """A mesh: what there is, and who may talk to whom."""

    workloads: list[WorkloadEntry] = []
    services: list[ServiceEntry] = []
    policies: list[PolicyEntry] = []


ENTRIES: Final[dict[str, type[WorkloadEntry | ServiceEntry | PolicyEntry]]] = {
    "workloads": WorkloadEntry,
    "services": ServiceEntry,
    "policies": PolicyEntry,
}


def schema() -> dict[str, Any]:
    """What may be in a mesh file, as a JSON schema."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **MeshFile.model_json_schema()}


# === what is wrong, in our words ===


def problems_of(error: ValidationError, model: type[Entry]) -> Iterator[Problem]:
    """Each thing that is wrong with an entry, in our words."""
    for detail in error.errors(include_url=False):
        path = detail["loc"]
        at_key = path[-1:] == ("[key]",) and detail["type"] != "extra_forbidden"
        if at_key:
            path = path[:-1]
        message = _message(detail["type"], detail["input"], detail.get("ctx", {}), path, model)
        yield Problem(path, message, at_key=at_key or detail["type"] == "extra_forbidden")


def _message(kind: str, value: object, context: dict[str, Any], path: Path, model: type[Entry]) -> str:
    match kind:
        case "value_error":
            return str(context["error"])
        case "missing":
            return f"expected {path[-1]}, which is missing"
        case "extra_forbidden":
            choices = _known_keys(model, path[:-1])
            return "unknown key" + (suggestion(str(path[-1]), choices) or f"; expected one of {', '.join(choices)}")
        case "enum":
            words = re.findall(r"'([^']*)'", str(context["expected"]))
            hint = suggestion(value, words) if isinstance(value, str) else ""
            return f"expected {' or '.join(words)}, not {_shown(value)}{hint}"
        case "string_too_short":
            return "expected a text that is not empty"
        case "string_too_long":
            return f"expected a text of at most {_LONGEST_TEXT} characters"
        case "string_pattern_mismatch":
            return f"expected a text without control characters, not {_shown(value)}"
    wanted = {
        "string_type": "a text",
        "list_type": "a list",
        "dict_type": "a map",
        "model_type": "a map",
        "model_attributes_type": "a map",
    }.get(kind)
    return f"expected {wanted}, not {_shown(value)}" if wanted else f"not as expected: {kind}"


def _known_keys(model: type[Entry], path: Path) -> list[str]:
    """The keys that the entry at a path may have."""
    found: Any = model
    for step in path:
        found = _bare(found)
        if isinstance(found, type) and issubclass(found, Entry):
            found = {field.alias: field.annotation for field in found.model_fields.values()}[str(step)]
        else:
            found = get_args(found)[-1]
    return [str(field.alias) for field in _bare(found).model_fields.values()]


def _bare(annotation: Any) -> Any:
    """An annotation without what is said about it, and without None."""
    while get_origin(annotation) not in (None, list, dict):
        annotation = get_args(annotation)[0]
    return annotation
