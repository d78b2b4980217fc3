from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support import certs
from support.command import Node

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.certs import Pki


@pytest.fixture(scope="session")
def pki() -> Pki:
    return certs.pki()


@pytest.fixture(autouse=True)
def _no_options_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("HBONE_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def near(pki: Pki) -> Iterator[Node]:
    """A node that lets the client's namespace reach the loopback."""
    with Node.inbound(
        pki.server, "--allow-target", "127.0.0.0/8", "--allow-peer", "spiffe://cluster.local/ns/shop/*"
    ) as node:
        yield node
