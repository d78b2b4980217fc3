"""For whom a node has certificates ahead: for whom it serves, and of very many only for those that are here."""

from __future__ import annotations

import threading
from ipaddress import ip_address

import pytest
from support.meshes import workload

import hbone.proxy._prefetch as module
from hbone.mesh import MeshSnapshot, TunnelProtocol
from hbone.proxy._prefetch import Prefetch

TD = "spiffe://cluster.local/ns/shop/sa"


def member(number, **fields):
    values = {"protocol": TunnelProtocol.HBONE, "service_account": f"a{number}", **fields}
    return workload(f"w{number}", f"10.0.{number // 250}.{number % 250}", **values)


class Asked:
    """A `Prefetch`, who asked it, and which addresses this machine has."""

    def __init__(self, monkeypatch, *, all_nodes=True):
        self.here = set()
        self.threads = []
        self.tried = []
        monkeypatch.setattr(module, "_own", self._own)
        self.prefetch = Prefetch(self._served, all_nodes=all_nodes, pause=lambda: None)

    def _served(self, snapshot):
        self.threads.append(threading.get_ident())
        return snapshot.workloads_on_node(None)

    def _own(self, addresses, _pause):
        self.tried.append(len(addresses))
        return self.here & addresses

    def ahead(self, snapshot):
        return {str(identity).removeprefix(f"{TD}/") for identity in self.prefetch.ahead(snapshot)}


@pytest.fixture
def asked(monkeypatch):
    return Asked(monkeypatch)


async def test_whom_it_serves(asked):
    snapshot = MeshSnapshot.build(
        [
            member(1),
            member(2, protocol=TunnelProtocol.TCP),
            member(3, native_tunnel=True, protocol=TunnelProtocol.TCP),
        ]
    )
    assert [each.uid for each in await asked.prefetch.look(snapshot)] == ["w1", "w2", "w3"]
    assert asked.ahead(snapshot) == {"a1", "a3"}
    assert {str(identity) for identity in asked.prefetch.identities(snapshot)} == {f"{TD}/a{n}" for n in (1, 2, 3)}
    assert asked.tried == []


async def test_it_is_worked_out_once_and_in_a_thread(asked):
    snapshot = MeshSnapshot.build([member(1)])
    await asked.prefetch.look(snapshot)
    for _ in range(3):
        await asked.prefetch.look(snapshot)
        assert asked.ahead(snapshot) == {"a1"}
        assert asked.prefetch.identities(snapshot)
    (thread,) = asked.threads
    assert thread != threading.get_ident()


async def test_without_a_look_ahead(asked):
    """A snapshot that somebody has put in place by hand."""
    snapshot = MeshSnapshot.build([member(1)])
    assert asked.ahead(snapshot) == {"a1"}
    assert asked.threads == [threading.get_ident()]


@pytest.mark.parametrize("all_nodes", [True, False])
async def test_of_very_many_those_whose_addresses_are_here(monkeypatch, all_nodes):
    asked = Asked(monkeypatch, all_nodes=all_nodes)
    snapshot = MeshSnapshot.build([member(number) for number in range(300)])
    asked.here = {ip_address("10.0.0.7")}
    await asked.prefetch.look(snapshot)
    if not all_nodes:
        assert len(asked.ahead(snapshot)) == 300
        assert asked.tried == []
        return
    assert asked.ahead(snapshot) == {"a7"}
    asked.here = {ip_address("10.0.0.7"), ip_address("10.0.1.0")}
    await asked.prefetch.look(snapshot)
    assert asked.ahead(snapshot) == {"a7", "a250"}
    assert asked.tried == [300, 299]  # what was here is not asked for again
    other = snapshot.with_changes(upsert=[member(400)])
    assert asked.ahead(other) == {"a7", "a250"}


async def test_who_cannot_have_a_certificate_is_told_once(asked, caplog):
    snapshot = MeshSnapshot.build([member(1), member(2, service_account="a b")])
    for _ in range(3):
        await asked.prefetch.look(snapshot)
        assert asked.ahead(snapshot) == {"a1"}
    (record,) = caplog.records
    assert record.getMessage().startswith("workload w2 gets no certificate: ")


def test_addresses_of_this_machine():
    paused = []
    others = [ip_address(f"203.0.113.{number}") for number in range(1, 60)]
    found = module._own([ip_address("127.0.0.1"), *others], lambda: paused.append(1))
    assert ip_address("127.0.0.1") in found
    assert not found.issuperset(others)
    assert paused
