"""The layering: which package may import which, as data, held by reading every import (lazy ones too) with ``ast``.

Dependencies point one way: a module imports its own package and lower rows. Nothing is imported here, so the table
is checked for modules that this platform could not even load.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. Attributes of a package, that is, of all its modules."""

    height: float
    third_party: frozenset[str] = frozenset()
    pure: bool = False
    """Decides and parses only: no I/O, clock, logger or randomness of its own."""
    public_only: bool = False
    """Uses other packages as a user would: no ``_private`` module, no ``_private`` name."""


def row(height: float, *third_party: str, pure: bool = False, public_only: bool = False) -> Row:
    return Row(height=height, third_party=frozenset(third_party), pure=pure, public_only=public_only)


TABLE = {
    "hbone.errors": row(0, pure=True),
    "hbone.identity": row(1, pure=True),
    "hbone.address": row(1, pure=True),
    "hbone.protocol": row(2, "h2", "hpack", "hyperframe", pure=True),
    "hbone.mesh": row(2, "pydantic", "pydantic_core", "yaml", pure=True),
    "hbone.routing": row(3, pure=True),
    "hbone.rbac": row(3, pure=True),
    "hbone.explain": row(3.5, pure=True),
    "hbone.tls": row(3, "OpenSSL", "cryptography", pure=True),
    "hbone.transport": row(4, "OpenSSL", "cryptography", "trio"),
    "hbone.certs": row(5, "cryptography", "trio", "trustme"),
    "hbone.telemetry": row(5, "prometheus_client", "trio"),
    "hbone.admin": row(5, "h11", "prometheus_client", "trio"),
    "hbone.control": row(6, "trio"),
    "hbone.proxy": row(7, "h11", "trio", "yaml", public_only=True),
    # The facade only re-exports; only the two rows above it import it.
    "hbone": row(7.5),
    "hbone.testing": row(8, "cryptography", "pytest", "trio", "trustme"),
    "hbone_cli": row(8, "click", "rich", "trio", public_only=True),
}

# "Sans-IO" as a list: what a pure row never imports when it runs.
IMPURE = frozenset({
    *("asyncio", "concurrent", "logging", "multiprocessing", "queue", "random", "sched", "secrets", "select"),
    *("selectors", "signal", "socket", "socketserver", "ssl", "subprocess", "threading", "time", "trio"),
})  # fmt: skip

# The test kit works without pytest; its fixtures are in the plugin.
PYTEST_ONLY_IN = frozenset({"hbone.testing.plugin"})

ROOTS = {
    name: Path(spec.origin).parent
    for name in ("hbone", "hbone_cli")
    if (spec := importlib.util.find_spec(name)) and spec.origin
}


def modules() -> dict[str, Path]:
    found = {}
    for package, root in ROOTS.items():
        for path in sorted(root.rglob("*.py")):
            parts = (package, *path.relative_to(root).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    module: str
    """The module whose import is asked for."""
    name: str | None
    """What ``from module import name`` takes out of it."""
    line: int
    type_only: bool
    """Under ``if TYPE_CHECKING:``: never runs."""


def imports(tree: ast.AST, *, type_only: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module=alias.name, name=None, line=node.lineno, type_only=type_only)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides its layer"
            assert node.module
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in MODULES:
                    yield Import(module=full, name=None, line=node.lineno, type_only=type_only)
                else:
                    yield Import(module=node.module, name=alias.name, line=node.lineno, type_only=type_only)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from imports(ast.Module(body=[child], type_ignores=[]), type_only=True)
            for child in node.orelse:
                yield from imports(ast.Module(body=[child], type_ignores=[]), type_only=type_only)
        else:
            yield from imports(node, type_only=type_only)


def package_of(module: str) -> str:
    """The key of TABLE that a module belongs to: the longest that is it or a parent of it."""
    if module == "hbone":
        return module
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in TABLE and name != "hbone":
            return name
    raise AssertionError(f"{module} is in no row: add its package to TABLE")


def is_private(dotted: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def complaints(module: str, source: str) -> Iterator[str]:
    package = package_of(module)
    mine = TABLE[package]
    for found in imports(ast.parse(source)):
        root = found.module.partition(".")[0]
        if root in ("hbone", "hbone_cli"):
            theirs = package_of(found.module)
            if theirs == package:
                continue
            if TABLE[theirs].height >= mine.height:
                yield f"line {found.line}: {package} must not know {theirs}, which is not below it"
            if mine.public_only and (is_private(found.module) or is_private(found.name or "")):
                yield f"line {found.line}: {package} uses public names only, not {found.module}.{found.name or ''}"
        elif root == "__future__":
            continue
        elif root in sys.stdlib_module_names:
            if mine.pure and root in IMPURE and not found.type_only:
                yield f"line {found.line}: {package} is pure and imports {found.module}"
        elif root not in mine.third_party:
            yield f"line {found.line}: {package} imports {found.module}, which its row does not allow"
        elif root == "pytest" and module not in PYTEST_ONLY_IN:
            yield f"line {found.line}: only {', '.join(PYTEST_ONLY_IN)} imports pytest"


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_row_allows(module: str) -> None:
    assert not list(complaints(module, MODULES[module].read_text("utf-8")))


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_it_is_for_and_what_it_offers(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    assert ast.get_docstring(tree), "opens with a docstring"
    if module.endswith(".__main__"):
        return
    targets = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    names = {
        target.id
        for node in targets
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    assert "__all__" in names, "has __all__"


def test_every_row_of_the_table_exists() -> None:
    packages = {package_of(module) for module in MODULES}
    assert packages == set(TABLE)


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("hbone.identity", "import hbone.protocol", "not below it"),
        ("hbone.identity", "def f():\n    from hbone.tls import Svid", "not below it"),
        ("hbone.identity", "from hbone import address", "not below it"),
        ("hbone.protocol._engine", "from hbone import Tunnel", "must not know hbone,"),
        ("hbone.tls._svid", "import time", "is pure"),
        ("hbone.protocol._engine", "import trio", "does not allow"),
        ("hbone.transport._relay", "import prometheus_client", "does not allow"),
        ("hbone.proxy._node", "from hbone.transport._session import Session", "public names only"),
        ("hbone_cli.main", "from hbone.tls import _secret", "public names only"),
        ("hbone.testing.memory", "import pytest", "only hbone.testing.plugin"),
        ("hbone.proxy._node", "import hbone.testing", "not below it"),
        ("hbone_cli._demo", "import hbone.testing", "not below it"),
    ],
)
def test_the_check_sees_what_it_should(module: str, source: str, complaint: str) -> None:
    (found,) = complaints(module, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hbone.tls._svid", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import socket"),
        ("hbone.protocol._engine", "from hbone.protocol._frames import Frame"),
        ("hbone.protocol._engine", "from __future__ import annotations\nimport h2.connection"),
        ("hbone_cli.main", "from hbone import Svid\nfrom hbone.proxy import Node"),
        ("hbone.testing.plugin", "import pytest\nfrom hbone import HBONEServer"),
    ],
)
def test_the_check_lets_pass_what_it_should(module: str, source: str) -> None:
    assert not list(complaints(module, source))
