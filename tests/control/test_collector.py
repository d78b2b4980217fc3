"""Full garbage collections that wait: for as long as asked, and not a moment longer."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import trio

from hbone import MeshConfigError
from hbone.control import FileMeshSource, full_collections_wait
from hbone.mesh import MeshState

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

USUAL = (700, 10, 10)


@pytest.fixture(autouse=True)
def _usual() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*USUAL)
    yield
    gc.set_threshold(*before)


def test_blocks_may_overlap() -> None:
    one, two = full_collections_wait(), full_collections_wait()
    one.__enter__()
    young, middle, full = gc.get_threshold()
    assert (young, middle) == USUAL[:2]
    assert full > 10**9
    two.__enter__()
    one.__exit__(None, None, None)
    assert gc.get_threshold()[2] == full
    two.__exit__(None, None, None)
    assert gc.get_threshold() == USUAL


def test_what_somebody_else_says_meanwhile_counts() -> None:
    with full_collections_wait():
        gc.set_threshold(50, 5, 5)
    assert gc.get_threshold() == (50, 5, 5)
    with full_collections_wait():
        gc.set_threshold(0, *gc.get_threshold()[1:])
    assert gc.get_threshold() == (0, 5, 5)


def test_put_back_whatever_happens() -> None:
    with pytest.raises(ZeroDivisionError), full_collections_wait():
        _ = 1 / 0
    assert gc.get_threshold() == USUAL


async def test_while_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text("{}")
    state = MeshState()
    seen: list[tuple[int, int, int]] = []
    state.subscribe(lambda _old, _new: seen.append(gc.get_threshold()))
    source = FileMeshSource(path, state, on_faults=pytest.fail)
    with trio.fail_after(60):
        await source.load()
    path.write_text("workloads: [{uid: a, namespace: n, workloadIps: [10.0.0.1], services: {}}]")
    again = FileMeshSource(path, state, on_faults=pytest.fail)
    with trio.fail_after(60):
        await again.load()
    assert seen[-1][2] > 10**9
    path.write_text("[")
    with trio.fail_after(60), pytest.raises(MeshConfigError):
        await again.load()
    with trio.CancelScope() as scope:
        scope.cancel()
        await again.load()
    assert gc.get_threshold() == USUAL
