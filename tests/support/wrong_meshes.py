"""Wrong mesh files, and what is said of each.

Most are in ``tests/mesh/wrong_files.txt``; those that cannot be written there are here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CASES", "RUNNING", "WORKLOAD", "Case", "over"]

#: A mesh that runs. Entries of the same names are in the cases.
RUNNING = {
    "workloads": """
workloads:
- {uid: a, namespace: shop, workloadIps: [10.0.0.1], services: {}}
""",
    "services": """
services:
- {name: stock, namespace: shop, hostname: stock.shop, vips: [/10.96.0.1], ports: {80: 8080}}
""",
    "policies": """
policies:
- {name: p, namespace: shop, scope: Global, action: Deny, dryRun: false, rules: [[[{}]]]}
""",
}
WORKLOAD = "workloads:\n- {uid: a, namespace: shop, workloadIps: [10.0.0.1], services: {}, %s}\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    text: str | bytes
    faults: tuple[str, ...]
    """How each begins, after the name of the file and a colon."""
    readable: bool
    """Whether the fault is an entry's, not the whole file's."""


def _written() -> Iterator[Case]:
    path = Path(__file__).parents[1] / "mesh" / "wrong_files.txt"
    for block in path.read_text("utf-8").split("\n==== ")[1:]:
        name, _, rest = block.partition("\n#### ")[0].partition("\n")
        text, *said = re.split("^>>> ", rest, flags=re.M)
        yield Case(
            name=name,
            text=text,
            faults=tuple(line.removeprefix("FILE ").strip() for line in said),
            readable=not said[0].startswith("FILE "),
        )


def _case(name: str, text: str | bytes, *faults: str, readable: bool = False) -> Case:
    return Case(name=name, text=text, faults=faults, readable=readable)


CASES = (
    *_written(),
    _case("not UTF-8", b"workloads:\n- name: \xff\xfe\n", "2:9: expected a text in UTF-8:"),
    _case("not UTF-8 after other letters", b"# \xc3\xa4\xc3\xb6 \xff\n{}\n", "1:6: expected a text in UTF-8:"),
    _case("a program", b"\x7fELF\x02\x01\x01\x00\x00", "1:1: expected a text in UTF-8:"),
    _case("a NUL", b"workloads:\n- name: a\0b\n", "2:10: expected a text in UTF-8:"),
    _case("UTF-16 that was cut", b"\xff\xfew\x00o", " expected a text in UTF-8:"),
    _case("half a letter", "workloads:\n- name: \ud800\n", " expected a text in UTF-8:"),
    _case("a tab", "workloads:\n\t- uid: a\n", "2:1: expected YAML:"),
    _case(
        "a control character",
        WORKLOAD % r'node: "a\nb"',
        r"2:74: workloads[0].node: expected a text without control characters, not 'a\nb'",
        readable=True,
    ),
    _case(
        "a long text",
        WORKLOAD % f"node: {'a' * 1001}",
        "2:74: workloads[0].node: expected a text of at most 1000 characters",
        readable=True,
    ),
    _case("deep", "workloads:\n- " + "[" * 50 + "]" * 50, "2:35: workloads[0][0][0]"),
    _case("deep without an end", "workloads:\n- uid: " + "[" * 100_000, "2:39: workloads[0].uid[0][0]"),
    _case("deep blocks", "workloads:\n" + "- " * 100_000, "2:67: workloads[0][0][0]"),
    _case("directives", "".join(f"%TAG !{number}! x\n" for number in range(100_000)), "1:1: expected no %TAG"),
)


def over(case: Case, running: dict[str, str], more: dict[str, str] | None = None) -> str | bytes:
    """The text of a case in a file whose other sections are those of a running mesh.

    Args:
        case: one of `CASES`. The text of one that is not readable is the whole file.
        running: the sections.
        more: what is in each section first, in the running mesh and therefore here.
    """
    text, more = case.text, more or {}
    if not case.readable:
        return text
    assert isinstance(text, str)
    for name, section in running.items():
        first = f"{name}:\n{more.get(name, '')}"
        if not re.search(f"^{name}:", text, re.M):
            text += section
        text = re.sub(f"^{name}:\n", lambda _, first=first: first, text, count=1, flags=re.M)  # type: ignore[misc]
    return text
