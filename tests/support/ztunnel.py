"""What ztunnel shows of one small mesh and eight connections: recorded from 1.31-alpha, as facts.

Node ``a`` is the node of the workload ``a`` alone, node ``b`` that of ``b`` (both in mode dedicated, with a local CA
and ``ENABLE_ORIG_SRC=false``). `CONNECTIONS` are made by an application of ``a``, one after the other. `recorded` is
what both nodes then say of themselves, in the logs, in ``/metrics`` and in ``/config_dump``, as paths and values:
`support.likeness` makes the same of what our nodes say. What is another one in each run is ``*``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["ACCESS_FIELDS", "ADDRESSES", "CONNECTIONS", "MESH", "PORTS", "REQUEST", "Connection", "recorded"]

ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2", "db": "10.77.0.3"}
#: Of the workload ``b``: one that answers, one that a policy forbids, one at which nobody listens.
PORTS = (7001, 7002, 7003)
#: What the application sends; it is echoed.
REQUEST = b"E0123456789"


class Connection(NamedTuple):
    """One of the application's connections."""

    name: str
    target: str
    sees: str
    """What the application sees: how many bytes, or a reset."""


CONNECTIONS = (
    Connection("1 workload", "10.77.0.2:7001", "11 bytes"),
    Connection("2 service", "10.96.0.20:80", "11 bytes"),
    Connection("3 denied", "10.96.0.20:81", "reset"),
    Connection("4 nobody listens", "10.96.0.20:82", "reset"),
    Connection("5 no endpoint", "10.96.0.21:80", "reset"),
    Connection("6 plain", "10.77.0.3:7001", "11 bytes"),
    Connection("7 no such port", "10.96.0.20:99", "reset"),
    Connection("8 refused", "10.77.0.3:7999", "reset"),
)

# === the mesh, as it is written ===

_STOCK = "shop/stock.shop.svc.cluster.local"
_MAPPED = {"80": 7001, "81": 7002, "82": 7003}
MESH: dict[str, list[dict[str, Any]]] = {
    "workloads": [
        {
            "uid": "lab//Pod/shop/cart-0",
            "name": "a",
            "namespace": "shop",
            "serviceAccount": "cart",
            "trustDomain": "cluster.local",
            "workloadIps": ["10.77.0.1"],
            "node": "na",
            "protocol": "HBONE",
            "workloadName": "cart",
            "workloadType": "deployment",
            "canonicalName": "cart",
            "canonicalRevision": "v2",
            "clusterId": "Kubernetes",
            "locality": {"region": "eu", "zone": "eu-1", "subzone": ""},
            "services": {},
        },
        {
            "uid": "lab//Pod/shop/stock-0",
            "name": "b",
            "namespace": "shop",
            "serviceAccount": "stock",
            "trustDomain": "cluster.local",
            "workloadIps": ["10.77.0.2"],
            "node": "nb",
            "protocol": "HBONE",
            "workloadName": "stock",
            "workloadType": "deployment",
            "canonicalName": "stock",
            "canonicalRevision": "v1",
            "clusterId": "Kubernetes",
            "services": {_STOCK: _MAPPED},
        },
        {
            "uid": "lab//Pod/legacy/db-0",
            "name": "db-0",
            "namespace": "legacy",
            "serviceAccount": "db",
            "trustDomain": "cluster.local",
            "workloadIps": ["10.77.0.3"],
            "node": "nb",
            "protocol": "TCP",
            "workloadName": "db",
            "workloadType": "pod",
            "canonicalName": "db",
            "clusterId": "Kubernetes",
            "services": {},
        },
    ],
    "services": [
        {
            "name": "stock",
            "namespace": "shop",
            "hostname": "stock.shop.svc.cluster.local",
            "vips": ["/10.96.0.20"],
            "ports": _MAPPED,
            "canonical": True,
        },
        {
            "name": "empty",
            "namespace": "shop",
            "hostname": "empty.shop.svc.cluster.local",
            "vips": ["/10.96.0.21"],
            "ports": {"80": 7001},
        },
    ],
    "policies": [
        {
            "name": "deny-7002",
            "namespace": "shop",
            "scope": "Namespace",
            "action": "Deny",
            "dryRun": False,
            "rules": [[[{"destinationPorts": [7002]}]]],
        },
        {
            "name": "callers",
            "namespace": "shop",
            "scope": "Namespace",
            "action": "Allow",
            "dryRun": False,
            "rules": [[[{"principals": [{"Exact": "cluster.local/ns/shop/sa/cart"}]}]]],
        },
        {
            "name": "maybe",
            "namespace": "shop",
            "scope": "Namespace",
            "action": "Deny",
            "dryRun": True,
            "rules": [[[{"sourceIps": ["10.77.0.0/24"]}]]],
        },
    ],
}

# === the access log ===

#: The fields of a line, in their order.
ACCESS_FIELDS = (
    *("src.addr", "src.workload", "src.namespace", "src.identity", "src.cluster"),
    *("dst.addr", "dst.hbone_addr", "dst.service", "dst.workload", "dst.namespace", "dst.identity", "dst.cluster"),
    *("direction", "bytes_sent", "bytes_recv", "duration", "error"),
)
_CART_ID, _STOCK_ID, _DB_ID = (
    f"spiffe://cluster.local/ns/{who}" for who in ("shop/sa/cart", "shop/sa/stock", "legacy/sa/db")
)
_FROM = {"src.workload": "a", "src.namespace": "shop", "src.cluster": "Kubernetes"}
_TO_B = {"dst.workload": "b", "dst.namespace": "shop", "dst.cluster": "Kubernetes"}
_TO_DB = {"dst.workload": "db-0", "dst.namespace": "legacy", "dst.cluster": "Kubernetes"}
_MUTUAL = {"src.identity": _CART_ID, "dst.identity": _STOCK_ID, "dst.addr": "10.77.0.2:15008"}
_SERVICE = {"dst.service": "stock.shop.svc.cluster.local"}


def _access(direction: str, *parts: dict[str, str], size: int | None, error: str = "", **fields: str) -> dict[str, Any]:
    early = size is None
    line = {
        "level": "warn" if early else "error" if error else "info",
        "message": "connection failed" if early else "connection complete",
        "scope": "access",
        "src.addr": "10.77.0.1:*",
        "direction": direction,
    }
    counts = {} if early else {"bytes_sent": size, "bytes_recv": size, "duration": "*ms"}
    for part in parts:
        line |= part
    line |= {f"dst.{name}": value for name, value in fields.items()}
    return {**line, **counts, **({"error": error} if error else {})}


def _hbone(
    port: int, *parts: dict[str, str], size: int, error: str = "", direction: str = "outbound"
) -> dict[str, Any]:
    authority = f"10.77.0.2:{port}"
    return _access(direction, _FROM, _TO_B, _MUTUAL, *parts, size=size, error=error, hbone_addr=authority)


_ACCESS = {
    "a": {
        "1 workload": _hbone(7001, size=11),
        "2 service": _hbone(7001, _SERVICE, size=11),
        "3 denied": _hbone(7002, _SERVICE, size=0, error="http status: 401 Unauthorized"),
        "4 nobody listens": _hbone(7003, _SERVICE, size=0, error="http status: 503 Service Unavailable"),
        "5 no endpoint": _access(
            "outbound", size=None, addr="10.96.0.21:80", error="no healthy upstream: 10.96.0.21:80"
        ),
        "6 plain": _access("outbound", _FROM, _TO_DB, size=11, addr="10.77.0.3:7001"),
        "7 no such port": _access(
            "outbound", size=None, addr="10.96.0.20:99", error="no healthy upstream: 10.96.0.20:99"
        ),
        "8 refused": _access(
            "outbound",
            _FROM,
            _TO_DB,
            size=0,
            addr="10.77.0.3:7999",
            error="io error: Connection refused (os error 111)",
        ),
    },
    "b": {
        "1 workload": _hbone(7001, size=11, direction="inbound"),
        "2 service": _hbone(7001, size=11, direction="inbound"),
        "3 denied": _hbone(
            7002,
            size=0,
            direction="inbound",
            error="connection closed due to policy rejection: explicitly denied by: shop/deny-7002",
        ),
        "4 nobody listens": _hbone(
            7003, size=0, direction="inbound", error="connection failed: Connection refused (os error 111)"
        ),
    },
}

# === what a node says of itself ===


def _listener(component: str, address: str, scope: str, **more: Any) -> dict[str, Any]:
    return {
        "level": "info",
        "scope": scope,
        "message": "listener established",
        "address": address,
        "component": component,
        **more,
    }


def _task(name: str, then: str) -> dict[str, str]:
    return {"level": "info", "scope": "readiness", "message": f"Task '{name}' complete (*ms), {then}"}


_LOG = {
    "running with config": {"level": "info", "scope": "", "message": "running with config: *"},
    "listener readiness": _listener("readiness", "[::]:15021", "hyper_util"),
    "listener inbound": _listener("inbound", "[::]:15008", "proxy::inbound", transparent=False),
    "listener inbound plaintext": _listener(
        "inbound plaintext", "[::]:15006", "proxy::inbound_passthrough", transparent=False
    ),
    "listener outbound": _listener("outbound", "[::]:15001", "proxy::outbound", transparent=False),
    "task proxy": _task("proxy", "still awaiting 2 tasks"),
    "task dns proxy": _task("dns proxy", "still awaiting 1 tasks"),
    "listener admin": _listener("admin", "127.0.0.1:15000", "hyper_util"),
    "listener stats": _listener("stats", "[::]:15020", "hyper_util"),
    "task state manager": _task("state manager", "marking server ready"),
    "listener drained": {
        "level": "info",
        "scope": "hyper_util",
        "message": "listener drained",
        "address": "[::]:15021",
        "component": "readiness",
    },
}

# === metrics ===

_FAMILIES = {
    "process_open_fds": ("gauge", "Number of open file descriptors"),
    "process_max_fds": ("gauge", "Maximum number of file descriptors"),
    "tokio_num_workers": ("gauge", "the number of worker threads used by the runtime"),
    "tokio_global_queue_depth": ("gauge", "the number of tasks currently scheduled in the runtime's global queue"),
    "tokio_num_alive_tasks": ("gauge", "the number of alive tasks in the runtime"),
    "tokio_worker_total_busy_duration_seconds": ("counter", "the amount of time worker threads have been busy"),
    "tokio_worker_park_count": ("counter", "the total number of times the given worker thread has parked"),
    "tokio_worker_park_unpark_count": (
        "counter",
        "the total number of times the given worker thread has parked and unparked",
    ),
    "istio_build": ("gauge", "Istio component build info."),
    "istio_tcp_connections_opened": ("counter", "The total number of TCP connections opened."),
    "istio_tcp_connections_closed": ("counter", "The total number of TCP connections closed."),
    "istio_tcp_received_bytes": (
        "counter",
        "The size of total bytes received during request in case of a TCP connection.",
    ),
    "istio_tcp_sent_bytes": ("counter", "The size of total bytes sent during response in case of a TCP connection."),
    "istio_tcp_connections_failed": (
        "counter",
        "The total number of TCP connections that failed to establish (unstable).",
    ),
    "istio_tcp_sockets_open": ("gauge", "The current number of open TCP sockets (unstable)."),
}


def _party(
    side: str, name: str, revision: str, namespace: str, region: str, zone: str, principal: str
) -> dict[str, str]:
    values = {
        "workload": name,
        "canonical_service": name,
        "canonical_revision": revision,
        "workload_namespace": namespace,
        "principal": principal,
        "app": name,
        "version": revision,
        "cluster": "Kubernetes",
        "region": region,
        "zone": zone,
    }
    return {f"{side}_{label}": value for label, value in values.items()}


_NO_SERVICE = dict.fromkeys(
    ("destination_service", "destination_service_namespace", "destination_service_name"), "unknown"
)
_THE_SERVICE = {
    "destination_service": "stock.shop.svc.cluster.local",
    "destination_service_namespace": "shop",
    "destination_service_name": "stock",
}
_CART = _party("source", "cart", "v2", "shop", "eu", "eu-1", _CART_ID)
_TO_STOCK = _party("destination", "stock", "v1", "shop", "unknown", "unknown", _STOCK_ID)
_DB = _party("destination", "db", "unknown", "legacy", "unknown", "unknown", _DB_ID)
_TLS = {"request_protocol": "tcp", "connection_security_policy": "mutual_tls"}
_PLAIN = {"request_protocol": "tcp", "connection_security_policy": "unknown", "source_principal": "unknown"}

#: Sets of labels, without the response flag, by a name for them.
_LABELS = {
    "to b": {"reporter": "source", **_CART, **_TO_STOCK, **_NO_SERVICE, **_TLS},
    "to the service": {"reporter": "source", **_CART, **_TO_STOCK, **_THE_SERVICE, **_TLS},
    "to db": {"reporter": "source", **_CART, **_DB, **_NO_SERVICE, **_PLAIN},
    "into b": {"reporter": "destination", **_CART, **_TO_STOCK, **_NO_SERVICE, **_TLS},
}
_TRAFFIC: dict[str, dict[str, dict[tuple[str, str], int]]] = {
    "a": {
        "istio_tcp_connections_opened": {("to b", "-"): 1, ("to the service", "-"): 3, ("to db", "-"): 2},
        "istio_tcp_connections_closed": {
            ("to b", "-"): 1,
            ("to the service", "-"): 1,
            ("to the service", "CONNECT"): 2,
            ("to db", "-"): 1,
            ("to db", "CONNECT"): 1,
        },
        "istio_tcp_received_bytes": {("to b", "-"): 11, ("to the service", "-"): 11, ("to db", "-"): 11},
        "istio_tcp_sent_bytes": {("to b", "-"): 11, ("to the service", "-"): 11, ("to db", "-"): 11},
        "istio_tcp_connections_failed": {("to the service", "CONNECT"): 2, ("to db", "CONNECT"): 1},
    },
    "b": {
        "istio_tcp_connections_opened": {("into b", "-"): 4},
        "istio_tcp_connections_closed": {("into b", "-"): 2, ("into b", "CONNECT"): 1, ("into b", "DENY"): 1},
        "istio_tcp_received_bytes": {("into b", "-"): 22},
        "istio_tcp_sent_bytes": {("into b", "-"): 22},
        "istio_tcp_connections_failed": {("into b", "CONNECT"): 1, ("into b", "DENY"): 1},
    },
}
_SOCKETS = {"a": ("source", 0), "b": ("destination", 1)}


def _samples(node: str, family: str) -> dict[str, dict[str, Any]]:
    if family in _TRAFFIC[node]:
        return {
            f"{name} {flag}": {**_LABELS[name], "response_flags": flag, "value": value}
            for (name, flag), value in _TRAFFIC[node][family].items()
        }
    if family == "istio_build":
        return {"build": {"component": "ztunnel", "tag": "unknown", "value": 1}}
    if family == "istio_tcp_sockets_open":
        reporter, value = _SOCKETS[node]
        return {reporter: {"reporter": reporter, "value": value}}
    if family.startswith("tokio_worker_"):
        return {f"worker {number}": {"worker": str(number), "value": "*"} for number in range(2)}
    return {"process": {"value": "*"}}


# === /config_dump ===

_DAY = {"nanos": 0, "secs": 86400}
_CONFIG: dict[str, Any] = {
    "adminAddr": {"Localhost": [True, 15000]},
    "altCaHostname": None,
    "altXdsHostname": None,
    "caAddress": None,
    "caHeaders": [],
    "caRootCert": "Static",
    "clusterDomain": "cluster.local",
    "clusterId": "Kubernetes",
    "connectionWindowSize": 16777216,
    "crlPath": None,
    "dnsProxy": True,
    "dnsProxyAddr": {"Localhost": [True, 15053]},
    "enableEnhancedBaggage": True,
    "fakeCa": True,
    "fakeSelfInbound": False,
    "frameSize": 1048576,
    "illegalPorts": [15001, 15006, 15008],
    "inboundAddr": "[::]:15008",
    "inboundPlaintextAddr": "[::]:15006",
    "inpodPortReuse": True,
    "inpodUds": "/var/run/ztunnel/ztunnel.sock",
    "ipv6Enabled": True,
    "localhostAppTunnel": True,
    "network": "",
    "numWorkerThreads": 2,
    "outboundAddr": "[::]:15001",
    "packetMark": None,
    "poolMaxStreamsPerConn": 100,
    "poolUnusedReleaseTimeout": {"nanos": 0, "secs": 300},
    "preferedServiceNamespace": None,
    "proxy": True,
    "proxyArgs": "",
    "proxyMetadata": {},
    "proxyMode": "Dedicated",
    "readinessAddr": {"SocketAddr": "[::]:15021"},
    "requireOriginalSource": False,
    "secretTtl": _DAY,
    "selfTerminationDeadline": {"nanos": 0, "secs": 5},
    "socketConfig": {
        "keepaliveEnabled": True,
        "keepaliveInterval": {"nanos": 0, "secs": 180},
        "keepaliveRetries": 9,
        "keepaliveTime": {"nanos": 0, "secs": 180},
        "userTimeoutEnabled": False,
    },
    "socks5Addr": None,
    "statsAddr": {"SocketAddr": "[::]:15020"},
    "windowSize": 4194304,
    "xdsAddress": None,
    "xdsHeaders": [],
    "xdsOnDemand": False,
    "xdsRootCert": "Static",
    "ztunnelIdentity": None,
    "ztunnelWorkload": None,
}
_OF_NODE = {
    "a": {
        "localNode": "na",
        "proxyWorkloadInformation": {"name": "a", "namespace": "shop", "serviceAccount": "cart"},
    },
    "b": {
        "localNode": "nb",
        "proxyWorkloadInformation": {"name": "b", "namespace": "shop", "serviceAccount": "stock"},
    },
}
_VERSION = {
    "buildProfile": "quick-release",
    "buildStatus": "Modified",
    "cryptoProvider": "tls-aws-lc",
    "gitRevision": "62d826530e5ce85764e309170205b293efcbc80b-dirty",
    "istioVersion": "unknown",
    "rustVersion": "1.95.0",
    "version": "62d826530e5ce85764e309170205b293efcbc80b-dirty",
}


def _certificates(node: str) -> list[dict[str, Any]]:
    """In place of the PEM, what is in it."""
    identity = {"a": _CART_ID, "b": _STOCK_ID}[node]
    usual = {"expirationTime": "*", "serialNumber": "*", "validFrom": "*"}
    leaf = {
        "key": "EC",
        "signature": "RSA",
        "subject": "O=cluster.local",
        "names": [identity],
        "days": 1,
        "names its issuer's key": False,
    }
    root = {"key": "RSA", "signature": "RSA", "subject": "O=cluster.local", "names": [], "days": 100_000}
    return [
        {
            "identity": identity,
            "state": "Available",
            "certChain": [{**usual, **leaf}],
            "rootCerts": [{**usual, **root, "names its issuer's key": True}],
        }
    ]


def _dump(node: str) -> dict[str, Any]:
    """The whole page, keys in their order."""
    written = [
        {**workload, "capacity": 1, "networkMode": "Standard", "status": "Healthy"} for workload in MESH["workloads"]
    ]
    services = [
        {"canonical": False, "endpoints": {}, "subjectAltNames": [], "visibility": "Public", **service}
        for service in MESH["services"]
    ]
    endpoint = {"port": _MAPPED, "status": "Healthy", "workloadUid": "lab//Pod/shop/stock-0"}
    stock = {**services[0], "endpoints": {"lab//Pod/shop/stock-0": endpoint}}
    workloads = [{key: value for key, value in workload.items() if key != "services"} for workload in written]
    return {
        "certificates": _certificates(node),
        "config": {**_CONFIG, **_OF_NODE[node]},
        "policies": sorted(MESH["policies"], key=lambda policy: policy["name"]),
        "services": [services[1], stock],
        "stagedServices": {},
        "staticConfig": {"policies": MESH["policies"], "services": services, "workloads": written},
        "version": _VERSION,
        "workloads": [workloads[2], workloads[0], workloads[1]],
    }


def recorded(node: str) -> dict[str, Any]:
    """What there is of one node, part by part, as `support.likeness.flat` takes it."""
    dump = _dump(node)
    return {
        "access log": _ACCESS[node],
        "log": _LOG,
        "scopes": {"in front, in JSON": "ztunnel"},
        "metrics": {
            name: {"type": kind, "help": text, "samples": _samples(node, name)}
            for name, (kind, text) in _FAMILIES.items()
        },
        "config_dump": dump,
    }
