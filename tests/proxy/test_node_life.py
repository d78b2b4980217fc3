"""A whole node in this process, on free ports of the loopback: start, pages, change, drain, and what may go wrong."""

from __future__ import annotations

import errno
import io
import json
import socket
import sys
from dataclasses import replace
from ipaddress import ip_address

import pytest
import trio
import trio.testing
from support.backends import own_loopback
from support.meshes import policy, workload
from support.routes import app_tunnel
from support.whole_nodes import NAME, VIP, WAIT, application, connect, dump, end_of, fetch, mesh, read

from hbone.certs import LocalCA, write_svid
from hbone.errors import ConfigError, InvalidCertificate, ListenFailed, MeshConfigError
from hbone.mesh import (
    Clause,
    Match,
    MeshSnapshot,
    Rule,
    Scope,
    StringMatch,
    StringMatchKind,
    TunnelProtocol,
)
from hbone.proxy import ListenAddress, Node, NodeConfig, ProxyMode, WorkloadInfo
from hbone.rbac import _index as rbac_index
from hbone.telemetry import AccessLog, LogLevels, log_to


@pytest.fixture(autouse=True)
async def _bounded():
    with trio.fail_after(WAIT):
        yield


def denying(name="shop/no-web"):
    match = Match(principals=(StringMatch(StringMatchKind.EXACT, "cluster.local/ns/shop/sa/web"),))
    clause: Clause = (match,)
    rule: Rule = (clause,)
    return policy(name, scope=Scope.NAMESPACE, rules=(rule,))


# === a start, a connection, the pages ===


@pytest.mark.parametrize("host", [VIP, NAME])
async def test_a_service_by_vip_and_by_name(config, host):
    log = io.BytesIO()
    async with application() as port, AccessLog(log, flush_interval=0) as access_log:
        async with Node(config, mesh=mesh(port), access_log=access_log) as node:
            await node.ready.wait()
            assert node.readiness.ready
            async with await connect(node, host, 80) as stream:
                await stream.send_all(b"ping")
                assert await read(stream, 10) == b"hello ping"
                assert node.statistics().live == 2
                shown = await dump(node)
                await stream.send_eof()
                assert await stream.receive_some() == b""
            await node.drain(WAIT)
            _, metrics = await fetch(node, "stats", "/metrics")
    for reporter in ("source", "destination"):
        (line,) = [
            line
            for line in metrics.splitlines()
            if line.startswith("istio_tcp_sent_bytes_total{") and f'reporter="{reporter}"' in line
        ]
        assert line.endswith(" 10.0")
        assert 'destination_workload="web"' in line
        assert 'connection_security_policy="mutual_tls"' in line
    lines = [line for line in log.getvalue().decode().splitlines() if "\taccess\t" in line]
    assert len(lines) == 2
    for direction in ("outbound", "inbound"):
        (line,) = [line for line in lines if f'direction="{direction}"' in line]
        assert 'dst.service="web.shop.svc.cluster.local" dst.workload="web-0"' in line
        assert "error" not in line
    connections = shown["workloadState"]["c//Pod/shop/web-0"]["connections"]
    (inbound,), (outbound,) = connections["inbound"], connections["outbound"]
    hbone_port = node.addresses["inbound"][0].port
    assert (outbound["originalDst"], outbound["protocol"]) == (f"{host}:80", "HBONE")
    assert outbound["actualDst"] == f"127.0.0.1:{hbone_port}"
    assert (inbound["actualDst"], inbound["protocol"]) == (f"127.0.0.1:{port}", "HBONE")


async def test_pages(config):
    async with Node(config, mesh=mesh(9)) as node:
        await node.ready.wait()
        assert await fetch(node, "readiness", "/healthz/ready") == (200, "ready\n")
        assert (await fetch(node, "readiness", "/config_dump"))[0] == 404
        assert (await fetch(node, "stats", "/config_dump"))[0] == 404
        for listener, path in (("stats", "/stats/prometheus"), ("stats", "/metrics"), ("admin", "/metrics")):
            status, body = await fetch(node, listener, path)
            assert (status, "istio_build{" in body) == (200, True)
        status, index = await fetch(node, "admin", "/")
        assert status == 200
        for page in ("/config_dump", "/debug/pool", "/debug/sessions", "/debug/tunnels", "/quitquitquit"):
            assert page in index
        for page in ("/debug/pool", "/debug/sessions", "/debug/tunnels", "/config_dump"):
            status, body = await fetch(node, "admin", page)
            assert status == 200
            json.loads(body)
        assert (await fetch(node, "admin", "/quitquitquit"))[0] == 405
        assert not node.stop_requested.is_set()
        assert (await fetch(node, "admin", "/quitquitquit", "POST"))[0] == 200
        await node.stop_requested.wait()


async def test_debug_pages_show_what_is_under_way(config):
    async with application() as port, Node(config, mesh=mesh(port)) as node:
        async with await connect(node, VIP, 80) as stream:
            await read(stream, 6)
            who = "spiffe://cluster.local/ns/shop/sa/web"
            pool = json.loads((await fetch(node, "admin", "/debug/pool"))[1])
            assert (pool[who]["ready"], pool[who]["sessions"][0]["tunnels"]) == (1, 1)
            sessions = json.loads((await fetch(node, "admin", "/debug/sessions"))[1])
            (inbound,), (outbound,) = sessions["inbound"], sessions["outbound"]
            assert (inbound["peer"]["identity"], outbound["source"]) == (who, who)
            tunnels = json.loads((await fetch(node, "admin", "/debug/tunnels"))[1])
            (inbound,), (outbound,) = tunnels["inbound"], tunnels["outbound"]
            assert (inbound["bytes_sent"], outbound["bytes_received"]) == (6, 6)
            assert outbound["send_window"] > 0
            assert outbound["target"] == f"{VIP}:80"


async def test_log_levels_by_page_and_what_is_logged(config):
    log = io.BytesIO()
    async with AccessLog(log, flush_interval=0) as access_log:
        with log_to(access_log, LogLevels.parse("info")) as levels:
            async with Node(config, mesh=mesh(9), access_log=access_log, log_levels=levels) as node:
                await node.ready.wait()
                status, body = await fetch(node, "admin", "/logging?level=proxy::outbound=debug", "POST")
                assert (status, "proxy::outbound=debug" in body) == (200, True)
                await node.drain()
    lines = log.getvalue().decode().splitlines()
    listening = [line for line in lines if "\tlistener established\t" in line]
    assert len(listening) == len(node.addresses) == 8
    assert f"address={node.addresses['socks5'][0]} " in "".join(listening)
    assert any("marking server ready" in line for line in lines)
    assert any("\tmesh loaded\tworkloads=1 services=1 policies=0" in line for line in lines)


async def test_dedicated(config):
    """All connections are the workload's; live ones are shown too."""
    dedicated = replace(
        config,
        mode=ProxyMode.DEDICATED,
        workload=WorkloadInfo(namespace="shop", name="web-0", service_account="web"),
        node_name="na",
    )
    async with application() as port:
        async with Node(dedicated, mesh=mesh(port, node="na")) as node:
            async with await connect(node, VIP, 80) as stream:
                await read(stream, 6)
                state = (await dump(node))["workloadState"]
                assert [len(value) for value in state["c//Pod/shop/web-0"]["connections"].values()] == [1, 1]
        async with Node(replace(dedicated, node_name="nb"), mesh=mesh(port, node="na")) as node:
            assert (await dump(node))["workloadState"] == {}


async def test_an_exception_comes_out_as_it_is(config):
    with pytest.raises(ZeroDivisionError):
        async with Node(config, mesh=mesh(9)):
            _ = 1 / 0


# === what may be wrong ===


async def test_taken_ports_are_named_at_once(config):
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [sock.getsockname()[1] for sock in (one, two)]
        taken = [ListenAddress("127.0.0.1", port) for port in ports]
        with pytest.raises(ListenFailed) as raised:
            async with Node(replace(config, stats=taken[0], socks5=taken[1]), mesh=mesh(9)):
                raise AssertionError
    assert [(what, where, why.errno) for what, where, why in raised.value.problems] == [
        ("stats", str(taken[0]), errno.EADDRINUSE),
        ("socks5", str(taken[1]), errno.EADDRINUSE),
    ]
    assert str(raised.value).count("\n") == 1


async def test_wildcards_and_localhost(config):
    wide = replace(config, stats=ListenAddress("*", 0), admin=ListenAddress("localhost", 0))
    async with Node(wide, mesh=mesh(9)) as node:
        (stats,) = node.addresses["stats"]
        assert stats.ip.is_unspecified
        for host in ("127.0.0.1", "::1") if stats.ip.version == 6 else ("127.0.0.1",):
            await (await trio.open_tcp_stream(host, stats.port)).aclose()
        assert {str(endpoint.ip) for endpoint in node.addresses["admin"]} <= {"127.0.0.1", "::1"}
    async with Node(replace(wide, ipv6=False), mesh=mesh(9)) as node:
        assert [str(endpoint.ip) for endpoint in node.addresses["stats"]] == ["0.0.0.0"]
        assert [str(endpoint.ip) for endpoint in node.addresses["admin"]] == ["127.0.0.1"]


async def test_a_machine_without_ipv6(config, monkeypatch):
    from hbone.proxy import _node

    def listen(host, port, **options):
        if ":" in host:
            raise OSError(errno.EADDRNOTAVAIL, "no such address")
        return listen_tcp(host, port, **options)

    listen_tcp = _node.listen_tcp
    monkeypatch.setattr(_node, "listen_tcp", listen)
    wide = replace(config, stats=ListenAddress("*", 0), admin=ListenAddress("localhost", 0))
    async with Node(wide, mesh=mesh(9)) as node:
        assert [str(endpoint.ip) for endpoint in node.addresses["stats"]] == ["0.0.0.0"]
        assert [str(endpoint.ip) for endpoint in node.addresses["admin"]] == ["127.0.0.1"]
    with pytest.raises(ListenFailed):  # asked for by its address, it must be there
        async with Node(replace(config, stats=ListenAddress("::1", 0)), mesh=mesh(9)):
            raise AssertionError


async def test_settings_that_do_not_go_together(config):
    with pytest.raises(ConfigError, match="there is no mesh"):
        async with Node(config):
            raise AssertionError
    with pytest.raises(ConfigError, match="a dedicated node needs a workload"):
        async with Node(replace(config, mode=ProxyMode.DEDICATED), mesh=mesh(9)):
            raise AssertionError


async def test_what_it_was_told_is_in_the_log(config, caplog):
    caplog.set_level("INFO", "hbone.proxy.node")
    told = replace(config, notes=("X has no effect: why",), socks5=ListenAddress("*", 0), admin=ListenAddress("*", 0))
    async with Node(told, mesh=mesh(9)):
        pass
    said = caplog.messages
    assert "X has no effect: why" in said
    everywhere = [line for line in said if "whoever reaches it" in line]
    assert [line.partition(" ")[0] for line in everywhere] == ["socks5", "admin"]


async def test_a_mesh_in_the_environment(config):
    text = "workloads:\n- {uid: u, name: n, namespace: shop, workloadIps: [127.0.0.1], services: {}}\n"
    async with Node(replace(config, mesh_text=text)) as node:
        assert list(node.mesh.snapshot.workloads) == ["u"]
        state = json.loads((await fetch(node, "admin", "/debug/mesh"))[1])
        assert state == {"file": None, "inForce": {"policies": 0, "services": 0, "workloads": 1}}
    with pytest.raises(MeshConfigError) as raised:
        async with Node(replace(config, mesh_text=text.replace("uid: u", "uuid: u, nome: n"))):
            raise AssertionError
    assert len(raised.value.faults) > 1
    assert str(raised.value).startswith("LOCAL_XDS:2:")


async def test_no_workload_and_then_one(config):
    async with application() as port:
        async with Node(config, mesh=MeshSnapshot()) as node:
            await node.ready.wait()
            node.mesh.replace(mesh(port))
            async with await connect(node, VIP, 80) as stream:
                assert await read(stream, 6) == b"hello "
            assert [one["state"] for one in (await dump(node))["certificates"]] == ["Available"]
            node.mesh.replace(MeshSnapshot())
            assert (await dump(node))["certificates"] == []


async def test_a_workload_without_certificate_is_not_ready(config):
    """The CA is of another trust domain. Whoever asks is told why."""
    async with Node(config, mesh=mesh(9, trust_domain="elsewhere.example")) as node:
        status, body = await fetch(node, "readiness", "/healthz/ready")
        assert (status, body) == (503, "not ready, waiting for:\ncertificates\n")
        (certificate,) = (await dump(node))["certificates"]
        assert certificate["state"].startswith("Unavailable: the CA of cluster.local cannot issue")
        assert certificate["certChain"] == []


async def test_of_very_many_workloads_only_those_that_are_here_get_certificates(config):
    others = [
        workload(f"o{n}", f"198.51.{n // 250}.{n % 250}", protocol=TunnelProtocol.HBONE, service_account=f"o{n}")
        for n in range(300)
    ]
    full = mesh(9).with_changes(upsert=others)
    async with Node(config, mesh=full) as node:
        await node.ready.wait()
        assert [one["identity"].rpartition("/")[2] for one in (await dump(node))["certificates"]] == ["web"]
        node.mesh.replace(full.with_changes(remove_workloads=["c//Pod/shop/web-0"]))
        assert (await dump(node))["certificates"] == []
    async with Node(replace(config, node_name="nb"), mesh=full) as node:
        assert (await dump(node))["certificates"] == []


async def test_ca_of_another_trust_domain(config, tmp_path):
    with pytest.raises(InvalidCertificate, match="is the CA of cluster.local, not of corp"):
        async with Node(replace(config, trust_domain="corp"), mesh=mesh(9)):
            raise AssertionError
    other = tmp_path / "ca"
    LocalCA.create(other, trust_domain="corp")
    async with Node(replace(config, ca_dir=other), mesh=mesh(9, trust_domain="corp")) as node:
        await node.ready.wait()


async def test_policies_that_cannot_be_prepared(config, monkeypatch, caplog):
    """Who is subject to them is not let in; the node goes on, and follows its mesh."""
    async with application() as port:
        right = mesh(port)
        async with Node(config, mesh=right) as node:
            await node.ready.wait()
            real = rbac_index._Builder.place

            def place(builder, key, policy):
                if key == "shop/no-web":
                    raise ZeroDivisionError
                return real(builder, key, policy)

            monkeypatch.setattr(rbac_index._Builder, "place", place)
            bad = right.with_changes(upsert=[denying()])
            await node._take(bad)
            assert node.mesh.snapshot is bad
            assert "the policies of the mesh could not be prepared" in caplog.text
            with pytest.raises(ConnectionError):
                await connect(node, VIP, 80)
            await node._take(right)
            async with await connect(node, VIP, 80) as stream:
                assert await read(stream, 6) == b"hello "


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the loopback is one address")
@pytest.mark.parametrize("variable", [None, "true", "false"])
async def test_where_application_tunnels_are(config, ca_dir, variable):
    """`LOCALHOST_APP_TUNNEL`: one that wants a PROXY header is called at loopback, or at its workload's address."""
    environ = {"XDS_ADDRESS": "", "LOCAL_XDS": "{}", "FAKE_CA": "true", "HBONE_CA_DIR": str(ca_dir)}
    if variable is not None:
        environ["LOCALHOST_APP_TUNNEL"] = variable
    told = NodeConfig.from_environment(environ).localhost_app_tunnel
    dedicated = WorkloadInfo(namespace="shop", name="web-0", service_account="web")
    config = replace(config, localhost_app_tunnel=told, mode=ProxyMode.DEDICATED, workload=dedicated)
    here = own_loopback(70)
    async with application() as port:
        web = replace(mesh(port).workloads["c//Pod/shop/web-0"], addresses=(ip_address(here),), **app_tunnel(port))
        async with Node(
            replace(config, inbound=ListenAddress(here, 0)), mesh=mesh(port).with_changes(upsert=[web])
        ) as node:
            await node.ready.wait()
            if variable == "false":  # the application is at 127.0.0.1 only
                with pytest.raises(ConnectionError):
                    await connect(node, VIP, 80)
                return
            async with await connect(node, VIP, 80) as stream:
                assert await read(stream, 6) == b"hello "


# === certificates from files ===


@pytest.fixture
def files(config, ca_dir, tmp_path):
    """A dedicated node with files for the identity of a service account."""
    ca = LocalCA.open(ca_dir)

    def make(account):
        svid = ca.issue(f"spiffe://cluster.local/ns/shop/sa/{account}")
        paths = write_svid(svid, tmp_path / "svid")
        return replace(
            config,
            fake_ca=False,
            ca_dir=None,
            mode=ProxyMode.DEDICATED,
            workload=WorkloadInfo(namespace="shop", name="web-0", service_account="web"),
            cert=paths.cert,
            key=paths.key,
            roots=paths.roots,
        )

    return make


async def test_certificates_from_files_and_their_renewal(files):
    async with Node(files("web"), mesh=mesh(9)) as node:
        await node.ready.wait()
        (first,) = (await dump(node))["certificates"]
        files("web")
        assert node._files.reload()  # what is done every few seconds
        while (await dump(node))["certificates"] == [first]:
            await trio.lowlevel.checkpoint()
        (second,) = (await dump(node))["certificates"]
        assert (second["identity"], second["state"]) == (first["identity"], "Available")


async def test_files_that_are_of_no_use_any_more(files):
    """The node goes on with what it has, and shows that: an expiry must not come as a surprise."""
    config = files("web")
    async with Node(config, mesh=mesh(9)) as node:
        await node.ready.wait()
        (good,) = (await dump(node))["certificates"]
        right = config.cert.read_bytes()
        config.cert.write_bytes(b"half a certif")
        with pytest.raises(InvalidCertificate) as problem:
            node._files.reload()
        node._files._on_error(problem.value)  # both is what is done every few seconds
        while "renewal" not in (shown := (await dump(node))["certificates"][0]):
            await trio.sleep(0.001)
        assert shown.pop("renewal")["error"] == str(problem.value)
        assert shown == good
        _, metrics = await fetch(node, "stats", "/metrics")
        assert 'hbone_certificates{state="renewal_fails"} 1' in metrics
        config.cert.write_bytes(right)
        files("web")
        assert node._files.reload()
        while "renewal" in (await dump(node))["certificates"][0]:
            await trio.sleep(0.001)


async def test_files_of_somebody_else(files):
    with pytest.raises(
        ConfigError, match="is of spiffe://cluster.local/ns/shop/sa/db, and the workload shop/web-0/web"
    ):
        async with Node(files("db"), mesh=mesh(9)):
            raise AssertionError
    with pytest.raises(ConfigError, match="is service account web of namespace shop"):
        async with Node(files("db"), mesh=MeshSnapshot()):
            raise AssertionError


async def test_files_that_are_not_there(files, tmp_path):
    config = replace(files("web"), cert=tmp_path / "none")
    with pytest.raises(InvalidCertificate, match="none"):
        async with Node(config, mesh=mesh(9)):
            raise AssertionError


# === change and end ===


async def test_a_policy_closes_what_it_forbids(config):
    log = io.BytesIO()
    async with application() as port, AccessLog(log, flush_interval=0) as access_log:
        async with Node(config, mesh=mesh(port), access_log=access_log) as node:
            async with await connect(node, VIP, 80) as stream:
                await read(stream, 6)
                node.mesh.replace(mesh(port, denying()))
                assert await end_of(stream) == "reset"
            with pytest.raises(ConnectionError):
                await connect(node, VIP, 80)
            await node.drain(WAIT)
            _, metrics = await fetch(node, "stats", "/metrics")
    lines = log.getvalue().decode()
    assert "policy change: explicitly denied by: shop/no-web" in lines
    assert "policy rejection: explicitly denied by: shop/no-web" in lines
    assert 'response_flags="DENY"' in metrics


async def test_drain_lets_connections_finish(config):
    async with application() as port, Node(config, mesh=mesh(port)) as node:
        await node.ready.wait()
        stream = await connect(node, VIP, 80)
        await read(stream, 6)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.drain, WAIT)
            while node.readiness.ready:
                await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked()
            assert await fetch(node, "readiness", "/healthz/ready") == (503, "not ready, waiting for:\ndraining\n")
            endpoint = node.addresses["socks5"][0]
            with pytest.raises(OSError, match="all attempts to connect"):
                await trio.open_tcp_stream(str(endpoint.ip), endpoint.port)
            await stream.send_all(b"still here")
            assert await read(stream, 10) == b"still here"
            await stream.send_eof()
            assert await stream.receive_some() == b""
            await stream.aclose()
        assert node.statistics().live == 0


async def test_the_deadline_ends_the_rest(config):
    async with application() as port, Node(config, mesh=mesh(port)) as node:
        async with await connect(node, VIP, 80) as stream:
            await read(stream, 6)
            await node.drain(0.01)
            assert await end_of(stream) == "reset"
        assert node.statistics().live == 0
