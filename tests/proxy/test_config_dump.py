"""The configuration dump: the keys and values that Istio's tools know."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from support.meshes import policy, service, workload

from hbone.address import Authority, Endpoint
from hbone.admin import json_pieces
from hbone.certs import LocalCA, SvidManager, SvidState, SvidStatus, dump_certificates, local_ca_issuer
from hbone.errors import CertificateUnavailable
from hbone.identity import SpiffeIdentity
from hbone.mesh import Action, HealthStatus, MeshSnapshot, TunnelProtocol
from hbone.proxy import ListenAddress, NodeConfig, ProxyMode, WorkloadInfo
from hbone.proxy._config_dump import config_dump, config_json, mesh_json, workload_state_json

#: What ztunnel shows of its configuration.
ZTUNNEL = """
adminAddr altCaHostname altXdsHostname caAddress caHeaders caRootCert clusterDomain clusterId connectionWindowSize
crlPath dnsProxy dnsProxyAddr enableEnhancedBaggage fakeCa fakeSelfInbound frameSize illegalPorts inboundAddr
inboundPlaintextAddr inpodPortReuse inpodUds ipv6Enabled localNode localhostAppTunnel network numWorkerThreads
outboundAddr packetMark poolMaxStreamsPerConn poolUnusedReleaseTimeout preferedServiceNamespace proxy proxyArgs
proxyMetadata proxyMode proxyWorkloadInformation readinessAddr requireOriginalSource secretTtl selfTerminationDeadline
socketConfig socks5Addr statsAddr windowSize xdsAddress xdsHeaders xdsOnDemand xdsRootCert ztunnelIdentity
ztunnelWorkload
""".split()

#: What only we show.
OURS = {"caDir", "hbonePort", "httpProxyAddr", "localXdsPath", "logFormat", "logLevel", "trustDomain"}


def as_json(value):
    return json.loads(b"".join(json_pieces(value)))


def dump(snapshot, **more):
    arguments = {
        "config": NodeConfig(),
        "snapshot": snapshot,
        "certificates": (),
        "served": (),
        "inbound": (),
        "outbound": (),
        "up": True,
        **more,
    }
    return as_json(config_dump(**arguments))


def test_the_keys_of_the_whole():
    assert set(dump(MeshSnapshot())) == {
        *("certificates", "config", "policies", "services", "stagedServices", "staticConfig", "version", "workloads"),
        "workloadState",
    }


def test_the_keys_of_the_configuration():
    assert set(config_json(NodeConfig())) == set(ZTUNNEL) | OURS


def test_the_defaults_in_ztunnels_form():
    config = config_json(NodeConfig(socks5=None, mode=ProxyMode.DEDICATED, node_name="na"))
    expected = {
        "adminAddr": {"Localhost": [True, 15000]},
        "clusterDomain": "cluster.local",
        "clusterId": "Kubernetes",
        "connectionWindowSize": 16777216,
        "enableEnhancedBaggage": True,
        "frameSize": 1048576,
        "illegalPorts": [15001, 15006, 15008],
        "inboundAddr": "[::]:15008",
        "inboundPlaintextAddr": "[::]:15006",
        "ipv6Enabled": True,
        "localNode": "na",
        "localhostAppTunnel": True,
        "network": "",
        "outboundAddr": "[::]:15001",
        "packetMark": None,
        "poolMaxStreamsPerConn": 100,
        "poolUnusedReleaseTimeout": {"nanos": 0, "secs": 300},
        "proxyMode": "Dedicated",
        "readinessAddr": {"SocketAddr": "[::]:15021"},
        "secretTtl": {"nanos": 0, "secs": 86400},
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
    }
    assert {key: config[key] for key in expected} == expected


def test_other_settings():
    config = config_json(
        NodeConfig(
            mode=ProxyMode.DEDICATED,
            workload=WorkloadInfo(namespace="shop", name="a", service_account="cart"),
            ipv6=False,
            drain_deadline=0.25,
            stats=ListenAddress("10.0.0.1", 9),
            admin=None,
        )
    )
    assert config["proxyWorkloadInformation"] == {"name": "a", "namespace": "shop", "serviceAccount": "cart"}
    assert config["outboundAddr"] == "0.0.0.0:15001"
    assert config["selfTerminationDeadline"] == {"nanos": 250_000_000, "secs": 0}
    assert (config["statsAddr"], config["adminAddr"]) == ({"SocketAddr": "10.0.0.1:9"}, None)
    assert config["illegalPorts"] == [15001, 15006, 15008, 15080]


def test_the_mesh():
    snapshot = MeshSnapshot.build(
        [
            workload("z", "10.0.0.2", endpoint_of={"shop/b.example": {80: 8080}, "shop/gone.example": {80: 1}}),
            workload("a", "10.0.0.1", protocol=TunnelProtocol.HBONE, status=HealthStatus.UNHEALTHY),
        ],
        [service("shop/b.example", "/10.1.0.1"), service("aaa/a.example", "/10.1.0.2")],
        [policy("shop/z"), policy("shop/a", action=Action.ALLOW, dry_run=True)],
    )
    shown = as_json(mesh_json(snapshot))
    assert [one["uid"] for one in shown["workloads"]] == ["a", "z"]
    assert shown["workloads"][1]["services"] == ["shop/b.example", "shop/gone.example"]
    assert "services" not in shown["workloads"][0]
    assert (shown["workloads"][0]["protocol"], shown["workloads"][0]["status"]) == ("HBONE", "Unhealthy")
    assert [one["hostname"] for one in shown["services"]] == ["a.example", "b.example"]
    endpoint = {"port": {"80": 8080}, "status": "Healthy", "workloadUid": "z"}
    assert [one["endpoints"] for one in shown["services"]] == [{}, {"z": endpoint}]
    assert shown["stagedServices"] == {"shop/gone.example": {"z": {**endpoint, "port": {"80": 1}}}}
    assert [one["name"] for one in shown["policies"]] == ["a", "z"]
    static = shown["staticConfig"]
    assert [one["name"] for one in static["policies"]] == ["z", "a"]
    assert [one["uid"] for one in static["workloads"]] == ["z", "a"]
    assert static["workloads"][0]["services"] == {"shop/b.example": {"80": 8080}, "shop/gone.example": {"80": 1}}
    assert static["services"][0]["endpoints"] == {}


def connection(workload, **facts):
    defaults = {"source": None, "original": None, "actual": None, "protocol": "HBONE"}
    return SimpleNamespace(workload=workload, **{**defaults, **facts})


def test_live_connections_both_ways():
    one, two, gone = (workload(uid, "10.0.0.1") for uid in ("one", "two", "gone"))
    source = Endpoint.parse("10.0.0.9:1234")
    inbound = connection(one, source=source, original="web.example", actual=Endpoint.parse("10.0.0.1:80"))
    target = Authority.parse("web.example:80")
    outbound = connection(one, source=source, original=target, actual=target, protocol="DOUBLEHBONE")
    lists = [inbound, connection(gone, protocol="TCP")], [outbound, connection(None)]
    state = as_json(workload_state_json((one, two), *lists, up=True))
    assert state["one"] == {
        "connections": {
            "inbound": [
                {
                    "actualDst": "10.0.0.1:80",
                    "originalDst": "web.example",
                    "protocol": "HBONE",
                    "src": "10.0.0.9:1234",
                }
            ],
            "outbound": [
                {
                    "actualDst": "web.example:80",
                    "originalDst": "web.example:80",
                    "protocol": "DOUBLEHBONE",
                    "src": "10.0.0.9:1234",
                }
            ],
        },
        "info": {"name": "one", "namespace": "shop", "serviceAccount": "default"},
        "state": "Up",
    }
    assert state["two"] == {"info": {"name": "two", "namespace": "shop", "serviceAccount": "default"}, "state": "Up"}
    assert state["gone"]["connections"]["inbound"][0]["protocol"] == "TCP"
    assert as_json(workload_state_json((two,), (), (), up=False))["two"]["state"] == "Pending"


async def test_certificates_without_keys(nursery):
    ca = LocalCA.in_memory()
    known, refused = (
        SpiffeIdentity.parse("spiffe://cluster.local/ns/b/sa/x"),
        SpiffeIdentity.parse("spiffe://a/ns/b/sa/x"),
    )
    manager = SvidManager(local_ca_issuer(ca))
    manager.want([known, refused])
    await nursery.start(manager.run)
    svid = await manager.get(known)
    with pytest.raises(CertificateUnavailable):
        await manager.get(refused)
    waiting = SvidManager(local_ca_issuer(ca))
    waiting.want([known])
    assert [one["state"] for one in dump_certificates(waiting.states())] == ["Initializing"]
    first, second = as_json(dump_certificates(manager.states()))
    assert (first["identity"], first["certChain"], first["rootCerts"]) == (str(refused), [], [])
    assert first["state"].startswith("Unavailable: ")
    assert (second["identity"], second["state"]) == (str(known), "Available")
    (leaf,), (root,) = second["certChain"], second["rootCerts"]
    assert leaf["serialNumber"] == str(svid.chain[0].serial_number)
    assert leaf["validFrom"] == f"{svid.not_before:%Y-%m-%dT%H:%M:%SZ}"
    assert leaf["expirationTime"] == f"{svid.not_after:%Y-%m-%dT%H:%M:%SZ}"
    import base64

    assert base64.b64decode(root["pem"]) == ca.roots_pem
    assert base64.b64decode(leaf["pem"]).startswith(b"-----BEGIN CERTIFICATE-----\n")
    assert b"PRIVATE" not in b"".join(json_pieces(dump_certificates(manager.states())))


async def test_a_certificate_that_is_not_renewed():
    """It is available, as long as it is valid, and has something besides that ztunnel's has not."""
    identity = SpiffeIdentity.parse("spiffe://cluster.local/ns/b/sa/x")
    svid = LocalCA.in_memory().issue(identity)

    def shown(**fields):
        state = {"identity": identity, "state": SvidState.AVAILABLE, "problem": None, "svid": svid}
        (one,) = as_json(dump_certificates([SvidStatus(**{**state, "next_attempt": None, **fields})]))
        return one

    good = shown()
    assert good["state"] == "Available"
    assert "renewal" not in good
    when = datetime(2030, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
    assert shown(problem="no", next_attempt=when) == {
        **good,
        "renewal": {"error": "no", "nextAttempt": "2030-01-02T03:04:05Z"},
    }
    assert shown(problem="no")["renewal"] == {"error": "no", "nextAttempt": None}
    expired = shown(problem="no", state=SvidState.UNAVAILABLE)
    assert expired == {**good, "state": "Unavailable: no"}
