"""Wrong mesh files: what is said of each, and that a running mesh stays as it was when its file becomes like that.

Most cases are in ``wrong_files.txt``; those that cannot be written there are here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import hbone.mesh._file
import hbone.mesh._file_yaml
from hbone import MeshConfigError, MeshFault
from hbone.mesh import load_mesh, parse_mesh, read_mesh_file

if TYPE_CHECKING:
    from collections.abc import Iterator

# Entries of the same names are in the cases.
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


def written_cases() -> Iterator[Case]:
    for block in Path(__file__).with_name("wrong_files.txt").read_text("utf-8").split("\n==== ")[1:]:
        name, _, rest = block.partition("\n#### ")[0].partition("\n")
        text, *said = re.split("^>>> ", rest, flags=re.M)
        yield Case(
            name=name,
            text=text,
            faults=tuple(line.removeprefix("FILE ").strip() for line in said),
            readable=not said[0].startswith("FILE "),
        )


def case(name: str, text: str | bytes, *faults: str, readable: bool = False) -> Case:
    return Case(name=name, text=text, faults=faults, readable=readable)


CASES = [
    *written_cases(),
    case("not UTF-8", b"workloads:\n- name: \xff\xfe\n", "2:9: expected a text in UTF-8:"),
    case("not UTF-8 after other letters", b"# \xc3\xa4\xc3\xb6 \xff\n{}\n", "1:6: expected a text in UTF-8:"),
    case("a program", b"\x7fELF\x02\x01\x01\x00\x00", "1:1: expected a text in UTF-8:"),
    case("a NUL", b"workloads:\n- name: a\0b\n", "2:10: expected a text in UTF-8:"),
    case("UTF-16 that was cut", b"\xff\xfew\x00o", " expected a text in UTF-8:"),
    case("half a letter", "workloads:\n- name: \ud800\n", " expected a text in UTF-8:"),
    case("a tab", "workloads:\n\t- uid: a\n", "2:1: expected YAML:"),
    case(
        "a control character",
        WORKLOAD % r'node: "a\nb"',
        r"2:74: workloads[0].node: expected a text without control characters, not 'a\nb'",
        readable=True,
    ),
    case(
        "a long text",
        WORKLOAD % f"node: {'a' * 1001}",
        "2:74: workloads[0].node: expected a text of at most 1000 characters",
        readable=True,
    ),
    case("deep", "workloads:\n- " + "[" * 50 + "]" * 50, "2:35: workloads[0][0][0]"),
    case("deep without an end", "workloads:\n- uid: " + "[" * 100_000, "2:39: workloads[0].uid[0][0]"),
    case("deep blocks", "workloads:\n" + "- " * 100_000, "2:67: workloads[0][0][0]"),
    case("directives", "".join(f"%TAG !{number}! x\n" for number in range(100_000)), "1:1: expected no %TAG"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_fault_has_its_place_and_what_was_expected(case: Case) -> None:
    parsed = parse_mesh(case.text, source="m")
    assert parsed.readable == case.readable
    found = [str(fault).removeprefix("m:") for fault in parsed.faults]
    assert [fault[: len(expected)] for fault, expected in zip(found, case.faults, strict=True)] == list(case.faults)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_running_mesh_stays_as_it_was(case: Case) -> None:
    running = parse_mesh("".join(RUNNING.values()))
    assert running.faults == ()
    text = case.text
    if case.readable:  # the other sections stay as they are
        assert isinstance(text, str)
        text += "".join(section for name, section in RUNNING.items() if not re.search(f"^{name}:", text, re.M))
    snapshot = running.snapshot()
    parsed = parse_mesh(text, previous=snapshot)
    assert parsed.faults
    after = parsed.snapshot_after(snapshot)
    assert after.workloads is snapshot.workloads
    assert after.services is snapshot.services
    assert after.policies is snapshot.policies


def test_what_an_entry_and_aliases_stand_for_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbone.mesh._file_yaml, "MAX_NODES", 200)
    monkeypatch.setattr(hbone.mesh._file_yaml, "MAX_ALIASED", 1000)

    def last(text: str) -> str:
        parsed = parse_mesh(text, source="m")
        assert not parsed.readable
        return str(parsed.faults[-1])

    endless = "workloads:\n- uid: [" + "a, " * 300
    assert last(endless) == "m:2:603: workloads[0].uid[198]: expected an entry of at most 200 values"
    repeated = "workloads:\n- &a [" + "a, " * 150 + "]\n" + "- *a\n" * 10
    assert last(repeated) == "m:9:3: workloads[7]: expected aliases that stand for at most 1000 values"


def test_there_are_many_cases() -> None:
    assert len(CASES) > 100
    assert len({case.name for case in CASES}) == len(CASES)


def test_faults_beyond_a_thousand_are_counted() -> None:
    parsed = parse_mesh("workloads:\n" + "- a\n" * 1500, source="m")
    assert len(parsed.faults) == 1001
    assert str(parsed.faults[-1]) == "m: and 500 more"
    assert len(parsed.broken) == 1500


# === files ===


def fails(path: Path | str) -> list[str]:
    with pytest.raises(MeshConfigError) as caught:
        load_mesh(path)
    error = caught.value
    assert str(error) == "\n".join(map(str, error.faults))
    assert (error.source, error.line, error.path) == (str(path), error.faults[0].line, error.faults[0].path)
    return [str(fault).replace(str(path), "FILE") for fault in error.faults]


def test_a_file_has_all_its_faults_in_one_error(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text("policies: [{}]\nworkloads: [{node: []}]\n")
    assert fails(path) == [
        *(f"FILE:1:12: policies[0].{key}: expected {key}, which is missing" for key in ("name", "namespace", "scope")),
        *(f"FILE:1:12: policies[0].{key}: expected {key}, which is missing" for key in ("action", "rules", "dryRun")),
        *(
            f"FILE:2:13: workloads[0].{key}: expected {key}, which is missing"
            for key in ("namespace", "workloadIps", "services")
        ),
        "FILE:2:20: workloads[0].node: expected a text, not a list",
    ]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert fails(tmp_path / "none.yaml") == ["FILE: cannot be read: no such file or directory"]
    assert fails(tmp_path) == ["FILE: cannot be read: is a directory"]
    assert fails("a\0b") == ["FILE: cannot be read: embedded null byte"]


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbone.mesh._file, "MAX_MESH_FILE", 2 * 1024 * 1024)
    path = tmp_path / "mesh.yaml"
    path.write_text("{}")
    with path.open("r+") as file:
        file.truncate(1024**3)
    assert fails(path) == ["FILE: expected a file of at most 2 MiB"]
    assert str(parse_mesh("#" * 3_000_000).faults[0]) == "<mesh>: expected a file of at most 2 MiB"


def test_what_is_read_is_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_bytes(b"{}\r\n")
    assert read_mesh_file(path) == b"{}\r\n"


def test_an_error_needs_a_fault() -> None:
    with pytest.raises(ValueError, match="needs a fault"):
        MeshConfigError([])
    assert str(MeshFault(source="m", message="why")) == "m: why"
