"""Wrong mesh files: what is said of each, and that a running mesh stays as it was when its file becomes like that."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.wrong_meshes import CASES, RUNNING, Case, over

import hbone.mesh._file
import hbone.mesh._file_yaml
from hbone import MeshConfigError, MeshFault
from hbone.mesh import load_mesh, parse_mesh, read_mesh_file

if TYPE_CHECKING:
    from pathlib import Path


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
    snapshot = running.snapshot()
    parsed = parse_mesh(over(case, RUNNING), previous=snapshot)
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
