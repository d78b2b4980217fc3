"""Three directives of the reference pages, so that no page repeats what the code says.

``hbone-api``: the public names of packages, each under the shortest name that a user can import it by.
``hbone-help``: what ``hbone COMMAND --help`` prints.
``hbone-limits``: a frozen dataclass of defaults as a table.
"""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import dataclasses
import importlib
import inspect
import ipaddress
import os
import pathlib
import subprocess
import sys
import textwrap
import types
import typing
from typing import TYPE_CHECKING

import prometheus_client.metrics_core
import trio
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

if TYPE_CHECKING:
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

logger = logging.getLogger(__name__)

# Signatures show annotations as they are written, short names too. These modules are where such names come from.
FOREIGN = (
    collections.abc,
    typing,
    types,
    contextlib,
    ipaddress,
    pathlib,
    prometheus_client.metrics_core,
    trio,
    trio.abc,
)


def parse(directive: SphinxDirective, lines: list[str]) -> list[nodes.Node]:
    """Rst from inside a Markdown page."""
    text = "\n".join(["```{eval-rst}", *lines, "```"])
    container = nodes.container()
    directive.state.nested_parse(StringList(text.splitlines(), directive.get_source_info()[0]), 0, container)
    return container.children


class ApiDirective(SphinxDirective):
    """``hbone-api`` with package names as content."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        facade = importlib.import_module("hbone")
        documented: set[str] = self.env.__dict__.setdefault("hbone_documented", set())
        lines = []
        for package in " ".join(self.content).split():
            module = importlib.import_module(package)
            for name in module.__all__:
                value = getattr(module, name)
                home = "hbone" if getattr(facade, name, None) is value and name in facade.__all__ else package
                full = f"{home}.{name}"
                if full in documented:
                    continue
                documented.add(full)
                if isinstance(value, type):
                    kind = "autoexception" if issubclass(value, BaseException) else "autoclass"
                elif inspect.isroutine(value):
                    kind = "autofunction"
                else:
                    kind = "autodata"
                lines += [f".. {kind}:: {full}", ""]
        return parse(self, lines)


class HelpDirective(SphinxDirective):
    """``hbone-help`` with a command's words as content."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        words = " ".join(self.content).split()
        result = subprocess.run(
            [sys.executable, "-m", "hbone_cli", *words, "--help"],
            env=os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            logger.warning("hbone %s --help failed: %s", " ".join(words), result.stderr, location=self.get_location())
        return [nodes.literal_block(text=result.stdout.rstrip(), language="text")]


class LimitsDirective(SphinxDirective):
    """``hbone-limits`` with ``module.Class`` as content: each field, its default and the docstring below it."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        module_name, _, class_name = self.content[0].strip().rpartition(".")
        cls = getattr(importlib.import_module(module_name), class_name)
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        words: dict[str, str] = {}
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                value = below.value if isinstance(below, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    words[field.target.id] = inspect.cleandoc(value.value).replace("\n", " ")
        rows = [
            f"   * - ``{field.name}``\n     - {field.default}\n     - {words.get(field.name, '')}"
            for field in dataclasses.fields(cls)
        ]
        head = [".. list-table::", "   :header-rows: 1", "", "   * - field\n     - default\n     - bounds"]
        return parse(self, "\n".join([*head, *rows]).splitlines())


def is_internal(name: str) -> bool:
    """Whether a name in a signature is a type of ours that has no page: an alias, or what only we construct with."""
    module_name, _, last = name.rpartition(".")
    modules = [module for key, module in sys.modules.items() if key.partition(".")[0] == "hbone"]
    return any(hasattr(module, last) for module in modules if module_name in {"", module.__name__})


def keep_colons(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Napoleon takes what is before a colon for a type: in "Peer: who it is" below an attribute, and in what a
    function returns. Our types are annotations. An empty comment in front keeps the sentence whole.
    """
    if what == "data" and "\n".join(lines).strip() == inspect.getdoc(type(obj)):
        lines.clear()  # what an int is needs no saying
    if what in {"attribute", "data", "property"} and lines:
        lines[:0] = ["..", ""]
    for index, line in reversed(list(enumerate(lines[:-1]))):
        if line.strip() in {"Returns:", "Yields:"}:
            indent = " " * (len(lines[index + 1]) - len(lines[index + 1].lstrip()))
            lines[index + 1 : index + 1] = [f"{indent}..", ""]


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element) -> nodes.Node | None:
    """A short or internal name in a signature leads to the public name that is documented, if there is one."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].lstrip(".")
    if "." not in target and (target.startswith("_") or any(hasattr(module, target) for module in FOREIGN)):
        return contnode
    domain = env.domains.python_domain
    last = target.rpartition(".")[2]
    found = [
        (name, entry)
        for name, entry in domain.objects.items()
        if name.rpartition(".")[2] == last and entry.objtype in {"class", "exception", "function", "data"}
    ]
    found += [
        (name, entry)
        for name, entry in domain.objects.items()
        if not found and "." in target and name.split(".")[-2:] == target.split(".")[-2:]
    ]
    if len(found) != 1:
        return contnode if is_internal(target) else None
    name, entry = found[0]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)


def check_complete(app: Sphinx, env: BuildEnvironment) -> None:
    """Every name of the facade is on some page."""
    facade = importlib.import_module("hbone")
    documented: set[str] = env.__dict__.get("hbone_documented", set())
    for name in facade.__all__:
        if not name.startswith("__") and f"hbone.{name}" not in documented:
            logger.warning("hbone.%s is public and on no reference page", name)


def hide_factories(
    _app: Sphinx, _what: str, _name: str, _obj: object, _options: object, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """A dataclass shows a default that is made for each instance as ``<factory>``, which is no Python."""
    return None if signature is None else (signature.replace("<factory>", "..."), returns)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("hbone-api", ApiDirective)
    app.add_directive("hbone-help", HelpDirective)
    app.add_directive("hbone-limits", LimitsDirective)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)
    app.connect("autodoc-process-signature", hide_factories)
    app.connect("missing-reference", resolve)
    app.connect("env-check-consistency", check_complete)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
