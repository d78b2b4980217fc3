"""The files of the page on waypoints and gateways; `tests/interop` runs them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hbone.mesh import parse_mesh

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(
    path.relative_to(ROOT) for name in ("waypoint", "gateway") for path in ROOT.glob(f"examples/{name}/*")
)


@pytest.mark.parametrize("path", [path for path in EXAMPLES if not path.name.startswith("envoy")], ids=str)
def test_meshes_are_right(path: Path) -> None:
    parsed = parse_mesh((ROOT / path).read_text("utf-8"))
    assert (list(map(str, parsed.faults)), list(map(str, parsed.warnings))) == ([], [])


def test_every_file_is_shown() -> None:
    page = (ROOT / "docs" / "howto" / "waypoints.md").read_text("utf-8")
    assert sorted(re.findall(r"\{literalinclude\} \.\./\.\./(.*)", page)) == sorted(map(str, EXAMPLES))
