"""Workloads, services and policies in one line each, for tests over a mesh."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

from hbone.mesh import (
    Action,
    AuthorizationPolicy,
    NamespacedHostname,
    NetworkAddress,
    NetworkCidr,
    Scope,
    Service,
    Workload,
)


def name(text: str) -> NamespacedHostname:
    """``namespace/hostname``."""
    namespace, _, hostname = text.partition("/")
    return NamespacedHostname(namespace, hostname)


def workload(
    uid: str, *addresses: str, endpoint_of: dict[str, dict[int, int]] | None = None, **fields: Any
) -> Workload:
    """A workload named as the last part of its uid, in namespace ``shop``."""
    return Workload(
        uid=uid,
        name=fields.pop("name", uid.rpartition("/")[2]),
        namespace=fields.pop("namespace", "shop"),
        addresses=tuple(map(ip_address, addresses)),
        services={name(key): ports for key, ports in (endpoint_of or {}).items()},
        **fields,
    )


def service(key: str, *vips: str, **fields: Any) -> Service:
    """A service by ``namespace/hostname``; its VIPs are ``network/ip`` or, for a range, ``network/ip/length``."""
    namespace, hostname = (parsed := name(key)).namespace, parsed.hostname
    exact, ranges = [], []
    for vip in vips:
        network, _, address = vip.partition("/")
        if "/" in address:
            ranges.append(NetworkCidr(network, ip_network(address)))
        else:
            exact.append(NetworkAddress(network, ip_address(address)))
    return Service(
        name=hostname.partition(".")[0],
        namespace=namespace,
        hostname=hostname,
        vips=tuple(exact),
        cidr_vips=tuple(ranges),
        ports=fields.pop("ports", {80: 8080}),
        **fields,
    )


def policy(key: str, **fields: Any) -> AuthorizationPolicy:
    """A policy by ``namespace/name`` that denies nothing yet."""
    namespace, _, short = key.partition("/")
    return AuthorizationPolicy(
        name=short,
        namespace=namespace,
        scope=fields.pop("scope", Scope.NAMESPACE),
        action=fields.pop("action", Action.DENY),
        **fields,
    )
