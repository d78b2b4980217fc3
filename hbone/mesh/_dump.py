"""Workloads, services and policies as plain JSON values, with the keys of the mesh file.

What is written here and read again is the same value. Fields are left out as Istio's node proxy leaves them out of its
configuration dump, unless leaving one out would mean something else when it is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from hbone.mesh._values import Locality, StringMatchKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hbone.mesh._values import (
        AuthorizationPolicy,
        GatewayAddress,
        Match,
        Service,
        ServiceAccount,
        ServiceEndpoint,
        StringMatch,
        Workload,
    )

__all__ = ["dump_policy", "dump_service", "dump_workload"]

Json: TypeAlias = "dict[str, Any]"


def dump_workload(workload: Workload) -> Json:
    """A workload as it is written in a mesh file."""
    written: Json = {
        "capacity": workload.capacity,
        "clusterId": workload.cluster_id,
        "name": workload.name,
        "namespace": workload.namespace,
        "networkMode": workload.network_mode.value,
        "protocol": workload.protocol.value,
        "services": {str(key): _ports(ports) for key, ports in workload.services.items()},
        "status": workload.status.value,
        "workloadIps": [str(ip) for ip in workload.addresses],
        "workloadType": workload.workload_type,
    }
    if workload.waypoint is not None:
        written["waypoint"] = _gateway(workload.waypoint)
    if workload.network_gateway is not None:
        written["networkGateway"] = _gateway(workload.network_gateway)
    if workload.application_tunnel is not None:
        tunnel = workload.application_tunnel
        written["applicationTunnel"] = {
            "protocol": tunnel.protocol.value,
            **({} if tunnel.port is None else {"port": tunnel.port}),
        }
    if workload.authorization_policies:
        written["authorizationPolicies"] = list(workload.authorization_policies)
    if workload.native_tunnel:
        written["nativeTunnel"] = True
    if workload.locality != Locality():
        locality = workload.locality
        written["locality"] = {"region": locality.region, "subzone": locality.subzone, "zone": locality.zone}
    texts = {
        "canonicalName": workload.canonical_name,
        "canonicalRevision": workload.canonical_revision,
        "hostname": workload.hostname,
        "network": workload.network,
        "node": workload.node,
        "serviceAccount": workload.service_account,
        "trustDomain": workload.trust_domain,
        "uid": workload.uid,
        "workloadName": workload.workload_name,
    }
    written |= {key: text for key, text in texts.items() if text}
    return written


def dump_service(service: Service, endpoints: Mapping[str, ServiceEndpoint] | None = None) -> Json:
    """A service as it is written in a mesh file.

    Args:
        service: the service.
        endpoints: instead of those that were written at the service itself, for a dump of what is in force.
    """
    written: Json = {
        "canonical": service.canonical,
        "endpoints": {
            uid: {
                "port": _ports(endpoint.ports),
                "status": endpoint.status.value,
                "workloadUid": endpoint.workload_uid,
            }
            for uid, endpoint in (service.endpoints if endpoints is None else endpoints).items()
        },
        "hostname": service.hostname,
        "name": service.name,
        "namespace": service.namespace,
        "ports": _ports(service.ports),
        "subjectAltNames": list(service.subject_alt_names),
        "vips": [str(vip) for vip in service.vips],
        "visibility": service.visibility.value,
    }
    if service.cidr_vips:
        written["cidrVips"] = [{"cidr": str(each.cidr), "network": each.network} for each in service.cidr_vips]
    if service.waypoint is not None:
        written["waypoint"] = _gateway(service.waypoint)
    if service.weighted_waypoints:
        written["weightedWaypoints"] = [
            {"destination": _gateway(each.destination), "weight": each.weight} for each in service.weighted_waypoints
        ]
    if service.load_balancer is not None:
        balancer = service.load_balancer
        written["loadBalancer"] = {
            "healthPolicy": balancer.health_policy.value,
            "mode": balancer.mode.value,
            "routingPreferences": [preference.value for preference in balancer.preferences],
        }
    if service.ip_families is not None:
        written["ipFamilies"] = service.ip_families.value
    return written


def dump_policy(policy: AuthorizationPolicy) -> Json:
    """A policy as it is written in a mesh file."""
    return {
        "action": policy.action.value,
        "dryRun": policy.dry_run,
        "name": policy.name,
        "namespace": policy.namespace,
        "rules": [[[_match(match) for match in clause] for clause in rule] for rule in policy.rules],
        "scope": policy.scope.value,
    }


def _ports(ports: Mapping[int, int]) -> dict[str, int]:
    return {str(port): target for port, target in ports.items()}


def _gateway(gateway: GatewayAddress) -> Json:
    return {"destination": str(gateway.destination), "hboneMtlsPort": gateway.hbone_mtls_port}


def _match(match: Match) -> Json:
    written: Json = {
        "namespaces": _patterns(match.namespaces),
        "notNamespaces": _patterns(match.not_namespaces),
        "serviceAccounts": _accounts(match.service_accounts),
        "notServiceAccounts": _accounts(match.not_service_accounts),
        "principals": _patterns(match.principals),
        "notPrincipals": _patterns(match.not_principals),
        "sourceIps": list(map(str, match.source_ips)),
        "notSourceIps": list(map(str, match.not_source_ips)),
        "destinationIps": list(map(str, match.destination_ips)),
        "notDestinationIps": list(map(str, match.not_destination_ips)),
        "destinationPorts": list(match.destination_ports),
        "notDestinationPorts": list(match.not_destination_ports),
    }
    return {key: values for key, values in written.items() if values}


def _patterns(patterns: Iterable[StringMatch]) -> list[Json]:
    return [
        {pattern.kind.value: [] if pattern.kind is StringMatchKind.PRESENCE else pattern.value} for pattern in patterns
    ]


def _accounts(accounts: Iterable[ServiceAccount]) -> list[Json]:
    return [{"namespace": each.namespace, "serviceAccount": each.service_account} for each in accounts]
