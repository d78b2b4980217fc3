"""Which of the mesh's workloads a connection of a node belongs to."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from support.meshes import workload

from hbone.mesh import MeshSnapshot, MeshState, NetworkMode
from hbone.proxy._context import LocalWorkloads, WorkloadInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone.mesh import Workload

CART = workload("lab//Pod/shop/cart-0", "10.0.0.1", "fd00::1", service_account="cart", node="a")
STOCK = workload("lab//Pod/shop/stock-0", "10.0.0.2", service_account="stock", node="b")
HOST = workload("lab//Pod/shop/agent", "10.0.0.9", node="a", network_mode=NetworkMode.HOST_NETWORK)
ELSEWHERE = workload("lab//Pod/shop/other-0", "10.0.0.1", network="far", node="a")
INFO = WorkloadInfo(namespace="shop", name="cart-0", service_account="cart")


def state(*workloads: Workload) -> MeshState:
    return MeshState(MeshSnapshot.build(workloads or (CART, STOCK, HOST, ELSEWHERE)))


def names(*workloads: Workload | None) -> list[str | None]:
    return [each.name if each is not None else None for each in workloads]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, ["cart-0", "cart-0", "stock-0", None, None]),
        ({"node": "a"}, ["cart-0", "cart-0", None, None, None]),
        ({"node": "b"}, [None, None, "stock-0", None, None]),
        ({"node": "c"}, [None] * 5),
        ({"network": "far"}, ["other-0", None, None, None, None]),
        ({"dedicated": INFO}, ["cart-0"] * 5),
        ({"dedicated": INFO, "node": "a"}, ["cart-0"] * 5),
        ({"dedicated": INFO, "node": "b"}, [None] * 5),
        ({"dedicated": WorkloadInfo(namespace="shop", name="cart-0", service_account="stock")}, [None] * 5),
        ({"dedicated": WorkloadInfo(namespace="bank", name="cart-0", service_account="cart")}, [None] * 5),
        ({"dedicated": WorkloadInfo(namespace="shop", name="agent", service_account="default")}, ["agent"] * 5),
    ],
    ids=str,
)
def test_whose_an_address_is(options, found) -> None:
    local = LocalWorkloads(state(), **options)
    addresses = [ip_address(text) for text in ("10.0.0.1", "fd00::1", "10.0.0.2", "10.0.0.9", "192.0.2.1")]
    for _ in range(2):  # found, then remembered
        assert names(*map(local.find, addresses)) == found
    assert local.dedicated is options.get("dedicated")


@pytest.mark.parametrize(
    ("options", "served"),
    [
        ({}, {"cart-0", "stock-0", "agent", "other-0"}),
        ({"node": "a"}, {"cart-0", "agent", "other-0"}),
        ({"node": "c"}, set()),
        ({"dedicated": INFO}, {"cart-0"}),
        ({"dedicated": INFO, "node": "b"}, set()),
    ],
    ids=["all", "of one node", "of a node without any", "dedicated", "dedicated to one of elsewhere"],
)
def test_whom_a_node_serves(options, served) -> None:
    assert set(names(*LocalWorkloads(state(), **options).served())) == served


def test_an_answer_lasts_as_long_as_the_mesh() -> None:
    mesh = state()
    local = LocalWorkloads(mesh)
    ip = ip_address("10.0.0.1")
    assert local.find(ip) is CART
    assert local.find(ip_address("10.0.0.7")) is None
    mesh.replace(mesh.snapshot.with_changes(remove_workloads=[CART.uid]))
    assert local.find(ip) is None
    newer = workload("lab//Pod/shop/cart-1", "10.0.0.1", "10.0.0.7")
    mesh.replace(mesh.snapshot.with_changes(upsert=[newer]))
    assert names(local.find(ip), local.find(ip_address("10.0.0.7"))) == ["cart-1", "cart-1"]


def test_strangers_do_not_fill_the_memory() -> None:
    mesh = state()
    local = LocalWorkloads(mesh)
    first = int(ip_address("198.18.0.0"))
    for number in range(10_000):
        assert local.find(ip_address(first + number)) is None
    remembered = [value for value in mesh.snapshot.memo.values() if isinstance(value, dict)]
    assert sum(map(len, remembered)) <= 4096
    assert local.find(ip_address("10.0.0.2")) is STOCK


# === waiting ===


async def test_what_is_there_is_not_waited_for() -> None:
    local = LocalWorkloads(state())
    with trio.testing.assert_no_checkpoints():
        assert await local.wait_for(ip_address("10.0.0.1")) is CART


@pytest.mark.parametrize("options", [{}, {"dedicated": INFO}], ids=["by address", "dedicated"])
async def test_a_workload_that_comes_in_time(options, autojump_clock: trio.testing.MockClock) -> None:
    mesh = state(STOCK)
    local = LocalWorkloads(mesh, **options)
    found: list[Workload | None] = []

    async def wait() -> None:
        found.append(await local.wait_for(ip_address("10.0.0.1")))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(2)
        mesh.replace(mesh.snapshot.with_changes(upsert=[HOST]))  # a change that brings it no nearer
        await trio.sleep(2.9)
        assert not found
        mesh.replace(mesh.snapshot.with_changes(upsert=[CART]))
    assert found == [CART]
    assert trio.current_time() == pytest.approx(4.9)
    assert not subscribers(mesh)


async def test_patience_ends(autojump_clock: trio.testing.MockClock) -> None:
    mesh = state(STOCK)
    assert await LocalWorkloads(mesh).wait_for(ip_address("10.0.0.1")) is None
    assert trio.current_time() == pytest.approx(5)
    assert not subscribers(mesh)


async def test_who_waits_may_go() -> None:
    mesh = state(STOCK)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(LocalWorkloads(mesh).wait_for, ip_address("10.0.0.1"))
            await trio.testing.wait_all_tasks_blocked()
            assert subscribers(mesh)
            scope.cancel()
    assert not subscribers(mesh)


def subscribers(mesh: MeshState) -> list[Callable[..., None]]:
    return list(mesh._subscribers.values())


def test_a_workload_is_named_in_words() -> None:
    assert str(INFO) == "shop/cart-0/cart"
