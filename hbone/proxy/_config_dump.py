"""``/config_dump``: what a node knows and does, in the shape that Istio's tools read. Pure: values in, JSON out.

The shape is ztunnel's, but for what does not exist here. No private keys are in it. The live connections, which
ztunnel shows in shared mode only, are shown in both.

What can be long is made bit by bit, in iterators and a mapping for `hbone.admin.json_response`: a mesh of ten thousand
workloads, or as many connections, are never turned into JSON all at once. What is shown is one snapshot nevertheless.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, TypeAlias

from hbone.certs import dump_certificates
from hbone.proxy._node_config import ProxyMode
from hbone.proxy._node_values import ListenAddress
from hbone.routing import ILLEGAL_PORTS

if TYPE_CHECKING:
    from hbone.certs import SvidStatus
    from hbone.mesh import MeshSnapshot, ServiceEndpoint, Workload
    from hbone.proxy._connections import ShownConnection
    from hbone.proxy._node_config import NodeConfig

__all__ = ["config_dump", "config_json", "mesh_json", "version_json", "workload_state_json"]

Json: TypeAlias = "dict[str, Any]"


def config_dump(
    *,
    config: NodeConfig,
    snapshot: MeshSnapshot,
    certificates: Iterable[SvidStatus],
    served: Iterable[Workload],
    inbound: Iterable[ShownConnection],
    outbound: Iterable[ShownConnection],
    up: bool,
) -> Json:
    """All of it.

    Args:
        config: what the node was told.
        snapshot: the mesh.
        certificates: of each identity that the node speaks for.
        served: the workloads of this node.
        inbound: live connections to workloads.
        outbound: live connections from workloads.
        up: whether workloads are served yet.
    """
    return {
        "certificates": dump_certificates(certificates),
        "config": config_json(config),
        **mesh_json(snapshot),
        "version": {**version_json(), "istioVersion": config.istio_version},
        "workloadState": workload_state_json(served, inbound, outbound, up=up),
    }


def mesh_json(snapshot: MeshSnapshot) -> Json:
    """What is known of the mesh, and what of it was written in the mesh file."""
    from hbone.mesh import dump_policy, dump_service, dump_workload

    policies, workloads, services = snapshot.policies, snapshot.workloads, snapshot.services
    by_hostname = sorted(services, key=lambda key: (key.hostname, key.namespace))
    return {
        "policies": (dump_policy(policies[key]) for key in sorted(policies)),
        "services": (dump_service(services[key], snapshot.endpoints(services[key])) for key in by_hostname),
        "stagedServices": {str(key): _endpoints(staged) for key, staged in snapshot.staged_endpoints.items()},
        "staticConfig": {
            "policies": map(dump_policy, policies.values()),
            "services": map(dump_service, services.values()),
            "workloads": map(dump_workload, workloads.values()),
        },
        "workloads": (_workload(dump_workload(workloads[uid])) for uid in sorted(workloads)),
    }


def _workload(written: Json) -> Json:
    """A workload as known: the services by their names only."""
    known = {key: value for key, value in written.items() if key != "services"}
    if written.get("services"):
        known["services"] = sorted(written["services"])
    return known


def _endpoints(endpoints: Mapping[str, ServiceEndpoint]) -> Json:
    return {
        uid: {
            "port": {str(port): target for port, target in endpoint.ports.items()},
            "status": endpoint.status.value,
            "workloadUid": endpoint.workload_uid,
        }
        for uid, endpoint in endpoints.items()
    }


def workload_state_json(
    served: Iterable[Workload],
    inbound: Iterable[ShownConnection],
    outbound: Iterable[ShownConnection],
    *,
    up: bool,
) -> Mapping[str, Json]:
    """The workloads of this node and their live connections. A connection that nobody owns (yet) is not shown."""
    return _WorkloadStates(served, inbound, outbound, up=up)


class _WorkloadStates(Mapping[str, Json]):
    """By uid; each is made when it is asked for."""

    def __init__(
        self,
        served: Iterable[Workload],
        inbound: Iterable[ShownConnection],
        outbound: Iterable[ShownConnection],
        *,
        up: bool,
    ) -> None:
        self._state = "Up" if up else "Pending"
        self._workloads = {workload.uid: workload for workload in served}
        self._connections: dict[str, dict[str, list[ShownConnection]]] = {}
        for direction, shown in (("inbound", inbound), ("outbound", outbound)):
            for connection in shown:
                owner = connection.workload
                if owner is not None:
                    # A workload that has left the mesh is shown as long as it has connections.
                    self._workloads.setdefault(owner.uid, owner)
                    lists = self._connections.setdefault(owner.uid, {"inbound": [], "outbound": []})
                    lists[direction].append(connection)

    def __iter__(self) -> Iterator[str]:
        return iter(self._workloads)

    def __len__(self) -> int:
        return len(self._workloads)

    def __getitem__(self, uid: str) -> Json:
        workload, lists = self._workloads[uid], self._connections.get(uid)
        connections = {} if lists is None else {"connections": {name: map(_connection, lists[name]) for name in lists}}
        return {
            **connections,
            "info": {
                "name": workload.name,
                "namespace": workload.namespace,
                "serviceAccount": workload.service_account,
            },
            "state": self._state,
        }


def _connection(connection: ShownConnection) -> Json:
    return {
        "actualDst": _text(connection.actual),
        "originalDst": _text(connection.original),
        "protocol": connection.protocol,
        "src": _text(connection.source),
    }


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def version_json() -> Json:
    """Which hbone, and what it runs on."""
    try:
        number = version("hbone")
    except PackageNotFoundError:
        number = "unknown"
    return {
        "buildProfile": "release",
        "buildStatus": "unknown",
        "cryptoProvider": "openssl",
        "gitRevision": "unknown",
        "pythonVersion": platform.python_version(),
        "version": number,
    }


def config_json(config: NodeConfig) -> Json:
    """The settings under ztunnel's names, then those that only we have under ours."""
    dedicated = config.mode is ProxyMode.DEDICATED
    workload = config.workload if dedicated else None
    illegal = ILLEGAL_PORTS | ({config.socks5.port} if config.socks5 is not None else set())
    return {
        "adminAddr": _address(config.admin),
        "altCaHostname": None,
        "altXdsHostname": None,
        "caAddress": None,
        "caDir": _text(config.ca_dir),
        "caHeaders": [],
        "caRootCert": "Static",
        "clusterDomain": config.cluster_domain,
        "clusterId": config.cluster_id,
        "connectionWindowSize": config.connection_window,
        "crlPath": None,
        "dnsProxy": False,
        "dnsProxyAddr": None,
        "enableEnhancedBaggage": config.response_baggage,
        "fakeCa": config.fake_ca,
        "fakeSelfInbound": False,
        "frameSize": config.frame_size,
        "hbonePort": config.hbone_port,
        "httpProxyAddr": _text(config.http_proxy),
        "illegalPorts": sorted(illegal),
        "inboundAddr": _bound(config.inbound, config),
        "inboundPlaintextAddr": _bound(config.plaintext, config),
        "inpodPortReuse": False,
        "inpodUds": None,
        "ipv6Enabled": config.ipv6,
        "localNode": config.node_name,
        "localXdsPath": _text(config.mesh),
        "localhostAppTunnel": config.localhost_app_tunnel,
        "logFormat": config.log_format,
        "logLevel": config.log_level,
        "network": config.network,
        "numWorkerThreads": 1,
        "outboundAddr": _bound(config.outbound, config),
        "packetMark": config.packet_mark,
        "poolMaxStreamsPerConn": config.pool_streams,
        "poolUnusedReleaseTimeout": _duration(config.pool_idle),
        "preferedServiceNamespace": None,
        "proxy": True,
        "proxyArgs": "",
        "proxyMetadata": dict(config.proxy_metadata),
        "proxyMode": "Dedicated" if dedicated else "Shared",
        "proxyWorkloadInformation": None
        if workload is None
        else {
            "name": workload.name,
            "namespace": workload.namespace,
            "serviceAccount": workload.service_account,
        },
        "readinessAddr": _address(config.readiness),
        "requireOriginalSource": config.orig_src,
        "secretTtl": _duration(config.secret_ttl),
        "selfTerminationDeadline": _duration(config.drain_deadline),
        "socketConfig": {
            "keepaliveEnabled": config.keepalive,
            "keepaliveInterval": _duration(config.keepalive_interval),
            "keepaliveRetries": config.keepalive_retries,
            "keepaliveTime": _duration(config.keepalive_time),
            "userTimeoutEnabled": config.user_timeout,
        },
        "socks5Addr": _text(config.socks5),
        "statsAddr": _address(config.stats),
        "trustDomain": config.trust_domain,
        "windowSize": config.stream_window,
        "xdsAddress": None,
        "xdsHeaders": [],
        "xdsOnDemand": False,
        "xdsRootCert": "Static",
        "ztunnelIdentity": None,
        "ztunnelWorkload": None,
    }


def _duration(seconds: float) -> Json:
    whole = int(seconds)
    return {"nanos": round((seconds - whole) * 1_000_000_000), "secs": whole}


def _bound(address: ListenAddress | None, config: NodeConfig) -> str | None:
    """As an address and a port; localhost is its IPv4 address here."""
    if address is None:
        return None
    return str(ListenAddress(address.addresses(ipv6=config.ipv6)[0], address.port))


def _address(address: ListenAddress | None) -> Json | None:
    if address is None:
        return None
    if address.host == "localhost":
        return {"Localhost": [True, address.port]}
    return {"SocketAddr": str(ListenAddress(address.addresses()[0], address.port))}
