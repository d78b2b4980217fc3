"""The pytest plugin: `hbone.testing` as fixtures, for plain and for trio tests alike.

pytest finds it by itself wherever hbone is installed, so it loads nothing until a fixture is asked for.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from hbone import LocalCA, Svid
    from hbone.testing import MemorySession, Mesh, MeshPair, MeshServer

__all__ = ["hbone_ca", "hbone_memory_session", "hbone_mesh", "hbone_pair", "hbone_server", "hbone_svid"]


@pytest.fixture(scope="session")
def hbone_ca() -> LocalCA:
    """A certificate authority in memory, an `hbone.LocalCA`. Override it to have another trust domain."""
    from hbone import LocalCA

    return LocalCA.in_memory()


@pytest.fixture(scope="session")
def hbone_svid(hbone_ca: LocalCA) -> Callable[..., Svid]:
    """Makes SVIDs of that CA: ``hbone_svid("shop/cart")``, or the whole SPIFFE id. See `hbone.testing.Mesh.svid`."""
    from hbone.testing import Mesh

    return Mesh(hbone_ca).svid


@pytest.fixture
def hbone_mesh(hbone_ca: LocalCA) -> Iterator[Mesh]:
    """The `hbone.testing.Mesh` of this test, in which the two fixtures below run what they start."""
    from hbone.testing import Mesh

    with Mesh(hbone_ca) as mesh:
        yield mesh


@pytest.fixture
def hbone_server(hbone_mesh: Mesh) -> Callable[..., MeshServer]:
    """Starts an HBONE server in the background: ``hbone_server("echo")``. See `hbone.testing.Mesh.server`."""
    return hbone_mesh.server


@pytest.fixture
def hbone_pair(hbone_mesh: Mesh) -> Callable[..., MeshPair]:
    """Starts two proxies around an application: ``hbone_pair(app_port).address``. See `hbone.testing.Mesh.pair`."""
    return hbone_mesh.pair


@pytest.fixture
def hbone_memory_session(hbone_ca: LocalCA) -> Callable[..., AbstractAsyncContextManager[MemorySession]]:
    """A client and a server on one session in memory, for trio tests. See `hbone.testing.memory_session`."""
    from hbone.testing import memory_session

    return partial(memory_session, ca=hbone_ca)
