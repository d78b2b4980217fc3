"""What docs/howto/policies.md shows: its policies are good ones and do what it says, its output is what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.policies import flow

from hbone.mesh import MeshSnapshot, Workload, parse_mesh
from hbone.rbac import Authorizer, explain_verdict

PAGE = (Path(__file__).parents[2] / "docs" / "howto" / "policies.md").read_text("utf-8")
BLOCKS = [parse_mesh(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
SHOWN = {policy.name: MeshSnapshot.build(policies=[policy]) for block in BLOCKS for policy in block.policies}

STOCK = Workload(uid="u", name="stock-0", namespace="shop", authorization_policies=("shop/no-admin",))
CART, MONITOR, OPS = (f"cluster.local/ns/{name}" for name in ("shop/sa/cart", "monitoring/sa/m", "ops/sa/admin"))


def test_every_example_is_a_policy() -> None:
    assert [[str(fault) for fault in block.faults] for block in BLOCKS] == [[] for _ in BLOCKS]
    assert set(SHOWN) == {name for name, _, _ in CLAIMS}


CLAIMS: list[tuple[str, dict[str, Any], bool]] = [
    ("stock-callers", {"who": CART, "port": 8080}, True),
    ("stock-callers", {"who": MONITOR, "port": 9090}, True),
    ("stock-callers", {"who": CART, "port": 9090}, False),
    ("stock-callers", {"who": None, "port": 8080}, False),
    ("no-admin", {"who": OPS, "port": 9000}, True),
    ("no-admin", {"who": CART, "port": 9000}, False),
    ("no-admin", {"who": CART, "port": 8080}, True),
    ("no-admin", {"who": None, "port": 9000}, False),
    ("strict", {"who": CART}, True),
    ("strict", {"who": None}, False),
    ("strict-but-probes", {"who": None, "port": 8080}, False),
    ("strict-but-probes", {"who": None, "port": 9090}, True),
    ("strict-but-probes", {"who": CART, "port": 8080}, True),
    ("strict-soon", {"who": None}, True),
]


@pytest.mark.parametrize(("name", "about", "passes"), CLAIMS)
def test_it_does_what_the_page_says(name: str, about: dict[str, Any], passes: bool) -> None:
    verdict = Authorizer().authorize(SHOWN[name], STOCK, flow(**about))
    assert verdict.allowed is passes
    assert [found.policy for found in verdict.dry_run] == (["istio-system/strict-soon"] if "soon" in name else [])


def test_the_explanation_shown_is_the_one_given() -> None:
    stock = Workload(uid="u", name="stock-0", namespace="shop")
    explanation = explain_verdict(SHOWN["stock-callers"], stock, flow(who=CART, port=9090))
    assert "\n".join(explanation.lines()) in PAGE
