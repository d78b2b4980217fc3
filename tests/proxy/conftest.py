"""What the tests of a node's data plane share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.dataplanes import Captures
from support.whole_nodes import node_config

from hbone.certs import LocalCA

if TYPE_CHECKING:
    from pathlib import Path

    from hbone.proxy import NodeConfig


@pytest.fixture(scope="session")
def ca() -> LocalCA:
    """Whom all nodes of a test trust."""
    return LocalCA.in_memory()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    """Connections that netfilter would have redirected."""
    return Captures(monkeypatch)


@pytest.fixture(scope="module")
def ca_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for whole nodes, which keep it in files."""
    directory = tmp_path_factory.mktemp("ca") / "ca"
    LocalCA.create(directory)
    return directory


@pytest.fixture
def config(ca_dir: Path) -> NodeConfig:
    """Of a whole node."""
    return node_config(ca_dir)
