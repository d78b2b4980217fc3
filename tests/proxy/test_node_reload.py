"""The mesh file of a running node: whatever becomes of it, connections go on, and the node says what is wrong."""

from __future__ import annotations

import json
import os
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from support.whole_nodes import VIP, WAIT, application, connect, dump, end_of, fetch, node_config, read
from support.wrong_meshes import CASES, RUNNING, over

import hbone.control._file
from hbone.errors import MeshConfigError
from hbone.proxy import Node, ProxyMode, WorkloadInfo

DENY = """\
- name: nobody
  namespace: shop
  scope: Namespace
  action: Deny
  dryRun: false
  rules:
  - - - notDestinationPorts: [1]
"""


@pytest.fixture(autouse=True)
async def _bounded():
    with trio.fail_after(WAIT):
        yield


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch):
    """Files are whole when they are here: nobody writes them bit by bit."""
    monkeypatch.setattr(hbone.control._file, "_SETTLE", 0.001)


def local(port, revision="v1"):
    """This machine's workload and its service, by section."""
    return {
        "workloads": (
            "- {uid: local, name: web-0, namespace: shop, serviceAccount: web, workloadIps: [127.0.0.1], "
            f"protocol: HBONE, services: {{shop/web.shop: {{80: {port}}}}}, canonicalRevision: {revision}}}\n"
        ),
        "services": f"- {{name: web, namespace: shop, hostname: web.shop, vips: [/{VIP}], ports: {{80: {port}}}}}\n",
        "policies": "",
    }


class File:
    """The mesh file; and how the node has read it last."""

    def __init__(self, path, port):
        self.path = path
        self.port = port
        self.node = None
        self._writes = 0

    def text(self, *, policies="", revision="v1"):
        """What runs."""
        sections = {**local(self.port, revision), "policies": policies}
        # The policy of the running mesh denies everything; this one is for a namespace that nobody is in.
        running = {name: text.replace("scope: Global", "scope: WorkloadSelector") for name, text in RUNNING.items()}
        return "".join(
            text.lstrip().replace(f"{name}:\n", f"{name}:\n{sections[name]}") for name, text in running.items()
        )

    def wrong(self, case):
        text = over(case, RUNNING, local(self.port))
        return text.replace("scope: Global", "scope: WorkloadSelector") if isinstance(text, str) else text

    def write(self, text):
        self._writes += 1
        self.path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        # Time stamps may be as coarse as 10 ms: no two of ours are to be the same.
        os.utime(self.path, (self._writes, self._writes))

    @property
    def status(self):
        return self.node._source.status

    async def becomes(self, text):
        """Write it, and wait until it has been read."""
        before = self.status
        self.write(text)
        await self.read_after(before)

    async def read_after(self, before):
        while self.status is before:
            await trio.sleep(0.001)

    async def in_force(self, condition):
        while not condition(self.node.mesh.snapshot):
            await trio.sleep(0.001)


@pytest.fixture
async def file(tmp_path):
    async with application() as port:
        found = File(tmp_path / "mesh.yaml", port)
        found.write(found.text())
        yield found


@asynccontextmanager
async def running(file, ca_dir, **more):
    """A node that follows the file, and a connection through it."""
    async with Node(node_config(ca_dir, mesh=file.path, mesh_interval=0.001, **more)) as node:
        file.node = node
        await node.ready.wait()
        async with await connect(node, VIP, 80) as stream:
            assert await read(stream, 6) == b"hello "
            yield node, stream


async def goes_on(stream, text=b"still here"):
    await stream.send_all(text)
    assert await read(stream, len(text)) == text


def counts(text):
    """The metrics of the mesh file."""
    names = {f'hbone_mesh_reads_total{{result="{result}"}}': result for result in ("ok", "partial", "failed")}
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("hbone_mesh_"))
    return {word: int(float(found.get(name, 0))) for name, word in names.items()}, float(found["hbone_mesh_faults"])


def said(caplog, level="ERROR"):
    records = (record for record in caplog.records if record.name == "hbone.proxy.node" and record.levelname == level)
    return [record.getMessage() for record in records]


async def test_a_wrong_file_changes_nothing(file, ca_dir, caplog):
    """Each of more than a hundred, one after the other, and good ones in between."""
    caplog.set_level("INFO", "hbone.proxy.node")
    expected = {"ok": 1, "partial": 0, "failed": 0}
    async with running(file, ca_dir) as (node, stream):
        await goes_on(stream)
        before = await dump(node)
        snapshot = node.mesh.snapshot
        for number, case in enumerate(CASES):
            caplog.clear()
            try:
                known = file.status.faults
                await file.becomes(file.wrong(case))
                await goes_on(stream)
                assert node.mesh.snapshot is snapshot
                lines = [f"mesh file: {fault}" for fault in file.status.faults]
                assert len(lines) == len(case.faults)
                assert said(caplog) == ([] if file.status.faults == known else lines)
                begins = [f"mesh file: {file.path}:"] * len(lines)
                if not case.readable:  # other entries are further down in this file than in their own
                    begins = [f"{begin}{fault.rstrip()}" for begin, fault in zip(begins, case.faults, strict=True)]
                if case.name == "half a letter":  # which is bytes in a file
                    begins = [f"mesh file: {file.path}:2:9: expected a text in UTF-8:"]
                assert [line[: len(begin)] for line, begin in zip(lines, begins, strict=True)] == begins
                expected["partial" if case.readable else "failed"] += 1
                page = json.loads((await fetch(node, "admin", "/debug/mesh"))[1])
                assert page["inForce"] == {"policies": 1, "services": 2, "workloads": 2}
                assert [f"mesh file: {fault}" for fault in page["file"]["faults"]] == lines
                assert page["file"]["used"] is case.readable
                if number % 10 == 0:  # it is the same snapshot, and this is slow
                    assert await dump(node) == before
                    metrics = (await fetch(node, "stats", "/metrics"))[1]
                    assert counts(metrics) == (expected, len(lines))
                if number % 20 == 0:
                    await file.becomes(file.text())
                    expected["ok"] += 1
                    assert node.mesh.snapshot is snapshot
                    assert said(caplog, "INFO") == ["the mesh file is right again"]
            except BaseException as problem:
                problem.add_note(f"the case {case.name!r}")
                raise
        await file.becomes(file.text(policies=DENY, revision="v2"))
        await file.in_force(lambda now: now.workloads["local"].canonical_revision == "v2")
        assert await end_of(stream) == "reset"
        assert file.status.faults == ()


async def test_a_fault_is_told_once_and_the_rest_is_taken(file, ca_dir, caplog):
    caplog.set_level("INFO", "hbone.proxy.node")
    async with running(file, ca_dir) as (node, stream):
        caplog.clear()
        text = file.text(revision="v2")
        broken = text.replace("uid: a,", "uid: a, nod: x,")
        await file.becomes(broken)
        await file.in_force(lambda now: now.workloads["local"].canonical_revision == "v2")
        await file.becomes(broken + "# a comment\n")
        await goes_on(stream)
        (line,) = said(caplog)
        assert line.startswith(f"mesh file: {file.path}:3:")
        assert line.endswith("workloads[1].nod: unknown key; did you mean node?")
        assert counts((await fetch(node, "stats", "/metrics"))[1]) == ({"ok": 1, "partial": 2, "failed": 0}, 1)
        await file.becomes(text)
        assert "the mesh file is right again" in said(caplog, "INFO")
        assert "v2" in json.dumps((await dump(node))["workloads"])


async def disappears(file):
    file.path.unlink()
    return "cannot be read: no such file or directory"


async def becomes_a_directory(file):
    file.path.unlink()
    file.path.mkdir()
    return "cannot be read: is a directory"


async def leads_nowhere(file):
    file.path.unlink()
    file.path.symlink_to(file.path.with_name("nowhere"))
    return "cannot be read: no such file or directory"


async def leads_to_itself(file):
    file.path.unlink()
    file.path.symlink_to(file.path)
    return "cannot be read: too many levels of symbolic links"


async def is_emptied(file):
    file.path.write_bytes(b"")
    return "1:1: the file is empty; write {} for a mesh with nothing in it"


async def is_cut(file):
    file.path.write_text(file.text()[:-60])
    return "expected YAML: "


@pytest.mark.parametrize(
    "happens", [disappears, becomes_a_directory, leads_nowhere, leads_to_itself, is_emptied, is_cut]
)
async def test_a_file_that_is_no_more(file, ca_dir, caplog, happens):
    async with running(file, ca_dir) as (node, stream):
        before, snapshot = file.status, node.mesh.snapshot
        expected = await happens(file)
        await file.read_after(before)
        await goes_on(stream)
        assert node.mesh.snapshot is snapshot
        (line,) = said(caplog)
        assert line.startswith(f"mesh file: {file.path}:")
        assert expected in line
        async with await connect(node, VIP, 80) as another:
            await read(another, 6)
        before = file.status
        if file.path.is_dir() and not file.path.is_symlink():
            file.path.rmdir()
        new = file.path.with_name("new")
        new.write_text(file.text(revision="v3"))
        new.replace(file.path)
        await file.in_force(lambda now: now.workloads["local"].canonical_revision == "v3")
        await goes_on(stream)


async def test_a_mounted_config_map(file, ca_dir, tmp_path):
    """Kubernetes replaces a link to a directory."""
    for name, revision in (("..1", "v1"), ("..2", "v2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mesh.yaml").write_text(file.text(revision=revision))
    (tmp_path / "..data").symlink_to("..1")
    file.path.unlink()
    file.path.symlink_to("..data/mesh.yaml")
    async with running(file, ca_dir) as (_node, stream):
        (tmp_path / "..new").symlink_to("..2")
        (tmp_path / "..new").rename(tmp_path / "..data")
        await file.in_force(lambda now: now.workloads["local"].canonical_revision == "v2")
        await goes_on(stream)


async def test_at_the_start_every_fault_is_an_error(file, ca_dir):
    """Of each wrong file: nothing listens, nothing is left."""
    for case in CASES:
        file.write(file.wrong(case))
        with pytest.raises(MeshConfigError) as raised:
            async with Node(node_config(ca_dir, mesh=file.path)):
                raise AssertionError(case.name)
        assert len(raised.value.faults) == len(case.faults), case.name
        assert {fault.source for fault in raised.value.faults} == {str(file.path)}


async def test_a_workload_that_comes_later(file, ca_dir, caplog):
    """A dedicated node whose workload is not in the mesh: it says so, waits, and serves it when it is there."""
    who = WorkloadInfo(namespace="shop", name="web-0", service_account="web")
    config = replace(node_config(ca_dir, mesh=file.path, mesh_interval=0.001), mode=ProxyMode.DEDICATED, workload=who)
    whole = file.text()
    file.write(whole.replace("name: web-0,", "name: web-1,"))
    async with Node(config) as node:
        file.node = node
        (line,) = said(caplog, "WARNING")
        assert line == "the mesh has no workload for this node: shop/web-0/web; nothing can be served until it has"
        assert (await dump(node))["certificates"] == []
        async with trio.open_nursery() as nursery:

            async def application_waits():
                async with await connect(node, VIP, 80) as stream:
                    assert await read(stream, 6) == b"hello "

            nursery.start_soon(application_waits)
            while node.statistics().outbound == 0:
                await trio.sleep(0.001)
            await file.becomes(whole)
        (certificate,) = (await dump(node))["certificates"]
        assert certificate["identity"] == "spiffe://cluster.local/ns/shop/sa/web"
        assert certificate["state"] == "Available"
        await node.ready.wait()
