"""The pages that readers follow on a terminal, followed: each command is run, and shows what the page says."""

from __future__ import annotations

import shutil
import socket
from typing import TYPE_CHECKING

import pytest
from support.pages import ROOT, Reader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("bash", "curl", "jq")), reason="no bash, curl or jq here"
)


def has_more_than_one_loopback_address() -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.2", 0))
        except OSError:
            return False
    return True


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    with Reader(tmp_path) as reader:
        yield reader


def test_the_node_of_the_readme(reader: Reader) -> None:
    reader.follow(ROOT / "README.md", "A node in one command")


@pytest.mark.skipif(not has_more_than_one_loopback_address(), reason="needs 127.0.0.2")
def test_the_mesh_tutorial(reader: Reader) -> None:
    reader.follow(ROOT / "docs" / "tutorial" / "mesh.md")


def test_the_page_for_users_of_ztunnel(reader: Reader) -> None:
    reader.serve(8080)
    reader.follow(ROOT / "docs" / "howto" / "ztunnel.md")
