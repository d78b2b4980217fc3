"""The end of a node: what is under way may finish, nothing new begins, and nothing is left; and its beginning."""

from __future__ import annotations

import gc
import logging
import socket
import ssl
import threading
from dataclasses import replace
from datetime import datetime

import pytest
import trio
from support.backends import pattern
from support.steps import everywhere, in_one_order
from support.whole_nodes import VIP, WAIT, application, connect, dump, fetch, mesh, read

import hbone.proxy._node
from hbone import HBONEClient, StreamRefused
from hbone.certs import LocalCA, local_ca_issuer, write_svid
from hbone.errors import CertificateUnavailable
from hbone.proxy import Node

WEB = "spiffe://cluster.local/ns/shop/sa/web"
SIZE = 1 << 20
NEVER = 3600.0


@pytest.fixture(autouse=True)
async def _bounded():
    with trio.fail_after(WAIT):
        yield


# === the beginning ===


async def wait_for_listener(node, name):
    while name not in node.addresses:
        await trio.sleep(0.001)


async def blockers(node):
    """What a probe is told."""
    status, body = await fetch(node, "readiness", "/healthz/ready")
    assert (status == 200) is (body == "ready\n")
    return [] if status == 200 else body.splitlines()[1:]


async def metric(node, sample):
    """What a scrape says of it."""
    _, body = await fetch(node, "stats", "/metrics")
    (line,) = (line for line in body.splitlines() if line.startswith(f"{sample} "))
    return float(line.split()[-1])


class Gate:
    """An issuer that waits, or fails."""

    def __init__(self, ca_dir, monkeypatch):
        self.open = trio.Event()
        self.broken = False
        self._issue = local_ca_issuer(LocalCA.open(ca_dir))
        monkeypatch.setattr(hbone.proxy._node, "local_ca_issuer", lambda _ca, ttl: self.issue)

    async def issue(self, identity):
        await self.open.wait()
        if self.broken:
            raise CertificateUnavailable(identity, "the CA is away")
        return await self._issue(identity)


async def test_pages_first_then_certificates_then_the_data_plane(config, ca_dir, monkeypatch):
    """Not ready before all of it; whoever comes too early finds nobody."""
    gate = Gate(ca_dir, monkeypatch)
    async with application() as port, trio.open_nursery() as nursery:
        node = Node(replace(config, start_timeout=NEVER), mesh=mesh(port))

        async def run():
            async with node:
                await node.ready.wait()
                assert await blockers(node) == []
                async with await connect(node, VIP, 80) as stream:
                    await read(stream, 6)

        nursery.start_soon(run)
        await wait_for_listener(node, "admin")
        assert await blockers(node) == ["certificates", "proxy"]
        (certificate,) = (await dump(node))["certificates"]
        assert certificate["state"] == "Initializing"
        assert not {"inbound", "socks5", "outbound"} & node.addresses.keys()
        gate.open.set()


async def test_certificates_that_take_too_long(config, ca_dir, monkeypatch):
    """Then the node listens without them, says that it is not ready, and is when they are there."""
    gate = Gate(ca_dir, monkeypatch)
    async with application() as port, Node(replace(config, start_timeout=0.01), mesh=mesh(port)) as node:
        assert await blockers(node) == ["certificates"]
        assert not node.ready.is_set()
        gate.open.set()
        await node.ready.wait()
        assert await blockers(node) == []
        async with await connect(node, VIP, 80) as stream:
            await read(stream, 6)


async def test_renewals_that_fail_do_not_make_it_unready(config, ca_dir, monkeypatch, caplog):
    """What there is stays in use, and the dump, the metrics and the log say what does not work."""
    gate = Gate(ca_dir, monkeypatch)
    gate.open.set()
    caplog.set_level("WARNING", "hbone.proxy.node")

    async def counted():
        return {
            "states": [
                await metric(node, f'hbone_certificates{{state="{state}"}}') for state in ("available", "renewal_fails")
            ],
            "failed": await metric(node, 'hbone_certificate_requests_total{result="failed"}'),
        }

    async with application() as port, Node(config, mesh=mesh(port)) as node:
        await node.ready.wait()
        assert await counted() == {"states": [1, 0], "failed": 0}
        (before,) = (await dump(node))["certificates"]
        expires = datetime.fromisoformat(before["certChain"][0]["expirationTime"]).timestamp()
        assert await metric(node, "hbone_certificate_expiry_timestamp_seconds") == expires
        gate.broken = True
        (identity,) = node._svids.identities
        node._svids.renew(identity)
        while node._svids.states()[0].problem is None:
            await trio.sleep(0.001)
        assert await blockers(node) == []
        (after,) = (await dump(node))["certificates"]
        renewal = after.pop("renewal")
        assert after == before
        assert after["state"] == "Available"
        assert renewal["error"] == "the CA is away"
        now = await counted()
        assert (now["states"], now["failed"] >= 1) == ([0, 1], True)
        (line, *_) = (record for record in caplog.records if "certificate" in record.getMessage())
        assert line.getMessage() == "certificate not renewed, the old one stays in use"
        assert line.fields["error"] == "the CA is away"
        async with await connect(node, VIP, 80) as stream:
            await read(stream, 6)
        gate.broken = False
        node._svids.renew(identity)
        while "renewal" in (await dump(node))["certificates"][0]:
            await trio.sleep(0.001)
        assert (await counted())["states"] == [1, 0]


# === the end ===


class Transfer:
    """Through a tunnel and back: half of it, and the rest when `go_on` is set."""

    def __init__(self):
        self.half = trio.Event()
        self.go_on = trio.Event()

    async def run(self, client, port):
        async with await client.open_tunnel(f"127.0.0.1:{port}") as tunnel, trio.open_nursery() as nursery:
            assert await read(tunnel, 6) == b"hello "
            got = bytearray()

            async def receive():
                async for data in tunnel:
                    got.extend(data)
                    if len(got) >= SIZE // 2:
                        self.half.set()

            nursery.start_soon(receive)
            for number, piece in enumerate(pattern(SIZE, SIZE // 8)):
                if number == 4:
                    await self.go_on.wait()
                await tunnel.send_all(piece)
            await tunnel.send_eof()
        assert got == b"".join(pattern(SIZE))


async def refused(endpoint):
    """Until nobody listens there: a listener closes as soon as that is worked off."""
    try:
        while True:
            await (await trio.open_tcp_stream(str(endpoint.ip), endpoint.port)).aclose()
    except OSError:
        pass


async def test_what_is_under_way_finishes_and_nothing_new_begins(config, ca_dir):
    svid = LocalCA.open(ca_dir).issue(WEB)
    async with application() as port, Node(config, mesh=mesh(port)) as node:
        await node.ready.wait()
        inbound = node.addresses["inbound"][0]
        async with HBONEClient.connect(str(inbound.ip), inbound.port, svid=svid, expect=WEB) as client:
            drained = trio.Event()

            async def drain():
                await node.drain(NEVER)
                drained.set()

            async with trio.open_nursery() as nursery:
                transfers = [Transfer() for _ in range(20)]
                for each in transfers:
                    nursery.start_soon(each.run, client, port)
                for each in transfers:
                    await each.half.wait()
                nursery.start_soon(drain)
                while not client.draining:
                    await trio.sleep(0.001)
                with pytest.raises(StreamRefused):
                    await client.open_tunnel(f"127.0.0.1:{port}")
                await refused(inbound)
                assert (node.statistics().live, drained.is_set()) == (20, False)
                for each in transfers:
                    each.go_on.set()
            await drained.wait()
            assert (node.statistics().live, node.statistics().sessions) == (0, 0)
            while not client.closed:
                await trio.sleep(0.001)
            assert client._session.error is None
        assert await blockers(node) == ["draining"]


def idle_peer(address, svid, directory, report):
    """A peer that opens a session and then only listens: what it hears, and how that ends."""
    files = write_svid(svid, directory)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_cert_chain(files.cert, files.key)
    context.load_verify_locations(files.roots)
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(address, WAIT) as plain:
        # False: an end without close_notify is an error.
        with context.wrap_socket(plain, suppress_ragged_eofs=False) as sock:
            sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
            heard = b""
            while len(heard) < 9:
                heard += sock.recv(65536)
            report("settled", None)
            while data := sock.recv(65536):
                heard += data
            report("ended", heard)


def frame_types(data):
    types = []
    while data:
        length = int.from_bytes(data[:3])
        types.append(data[3])
        data = data[9 + length :]
    return types


async def test_idle_sessions_end_at_once_and_in_good_order(config, ca_dir, tmp_path):
    """Those of others, with GOAWAY and close_notify, and ours."""
    svid = LocalCA.open(ca_dir).issue(WEB)
    async with application() as port, Node(config, mesh=mesh(port)) as node:
        await node.ready.wait()
        async with await connect(node, VIP, 80) as stream:
            await read(stream, 6)
            await stream.send_eof()
            assert await stream.receive_some() == b""
        events, told = {}, trio.lowlevel.current_trio_token()
        settled, ended = trio.Event(), trio.Event()

        def report(what, heard):
            events[what] = heard
            told.run_sync_soon({"settled": settled, "ended": ended}[what].set)

        inbound = node.addresses["inbound"][0]
        peer = threading.Thread(
            target=idle_peer, args=((str(inbound.ip), inbound.port), svid, tmp_path, report), daemon=True
        )
        peer.start()
        await settled.wait()
        while node.statistics().sessions < 2:
            await trio.sleep(0.001)
        await node.drain(NEVER)
        await ended.wait()
        peer.join()
        assert 7 in frame_types(events["ended"])  # GOAWAY
        assert node.statistics().sessions == 0
        await node.drain(NEVER)  # again is harmless


async def test_a_drain_of_nothing(config):
    async with Node(config, mesh=mesh(9)) as node:
        await node.drain(NEVER)
    async with Node(config, mesh=mesh(9)) as node:
        with trio.CancelScope() as scope:
            scope.cancel()
            await node.drain(NEVER)
        assert await blockers(node) == ["draining"]


# === everything, stopped everywhere ===


@pytest.mark.parametrize("waking", [False, True], ids=["waiting", "waking"])
async def test_stopped_at_every_step_of_its_life(config, tmp_path, monkeypatch, waking):
    """Start, a connection, a drain: no task, file, socket or log handler is left behind."""
    in_one_order(monkeypatch)
    path = tmp_path / "mesh.yaml"
    loggers = logging.root.manager.loggerDict

    def handlers():
        found = {name: tuple(one.handlers) for name, one in loggers.items() if isinstance(one, logging.Logger)}
        return {name: some for name, some in found.items() if some}, tuple(logging.root.handlers)

    async with application() as port:
        path.write_text(
            "workloads:\n- {uid: u, name: web-0, namespace: shop, serviceAccount: web, workloadIps: [127.0.0.1], "
            f"protocol: HBONE, services: {{shop/web.shop: {{80: {port}}}}}}}\n"
            f"services:\n- {{name: web, namespace: shop, hostname: web.shop, vips: [/{VIP}], ports: {{80: {port}}}}}\n"
        )
        usual, thresholds = handlers(), gc.get_threshold()

        async def live():
            async with Node(replace(config, mesh=path)) as node:
                await node.ready.wait()
                async with await connect(node, VIP, 80) as stream:
                    await read(stream, 6)
                await node.drain(NEVER)

        async def check():
            assert handlers() == usual
            assert gc.get_threshold() == thresholds

        assert await everywhere(live, check, waking=waking) > 50
