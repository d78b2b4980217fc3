"""What the tests of a node's data plane share."""

from __future__ import annotations

import pytest
from support.dataplanes import Captures

from hbone.certs import LocalCA


@pytest.fixture(scope="session")
def ca() -> LocalCA:
    """Whom all nodes of a test trust."""
    return LocalCA.in_memory()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    """Connections that netfilter would have redirected."""
    return Captures(monkeypatch)
