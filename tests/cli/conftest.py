from __future__ import annotations

import signal
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


@pytest.fixture(scope="session", autouse=True)
def _signals_as_usual() -> None:
    """A shell's background job or nohup ignores some, and so would the processes that we start and then signal."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual)


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
