"""``hbone mesh``: all that is wrong in a file, for people and for scripts; the schema for editors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.command import hbone

from hbone.mesh import mesh_schema
from hbone_cli import cli

EXAMPLES = Path(__file__).parents[2] / "examples"

WRONG = """\
services:
- {name: stock, namespace: shop, hostname: stock.shop, vips: [10.0.0.1], ports: {}}
workloads:
- {name: a, namespace: shop, workloadIps: [10.0.0.1], services: {shop/gone: {80: 80}}}
- {name: b, namespace: shop, workloadIps: [10.0.0.2], services: {}, nod: x}
"""


def run(*words, **options):
    return CliRunner().invoke(cli, ["mesh", *map(str, words)], **options)


@pytest.fixture
def wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mesh.yaml").write_text(WRONG)


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_right(example):
    result = run("check", example)
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    assert ": no faults, no warnings, " in line


def test_every_fault_has_a_line(wrong):
    result = run("check", "mesh.yaml")
    assert (result.exit_code, result.stderr) == (14, "")
    assert result.stdout.splitlines() == [
        "mesh.yaml:2:63: services[0].vips[0]: expected NETWORK/IP such as net1/10.0.0.1, "
        "or /10.0.0.1 in the network without a name, not '10.0.0.1'",
        'mesh.yaml:4:77: workloads[0].services["shop/gone"]: there is no service shop/gone in this file, '
        "so nothing gets to the workload by it (warning)",
        "mesh.yaml:5:69: workloads[1].nod: unknown key; did you mean node?",
        "mesh.yaml: 2 faults, 1 warning, 1 good workload, no good services, no good policies",
    ]


def test_faults_as_json(wrong):
    result = run("check", "--json", "mesh.yaml")
    assert (result.exit_code, result.stderr) == (14, "")
    found = json.loads(result.stdout)
    assert {key: found[key] for key in ("file", "workloads", "services", "policies")} == {
        "file": "mesh.yaml",
        "workloads": 1,
        "services": 0,
        "policies": 0,
    }
    assert found["faults"][1] == {
        "line": 5,
        "column": 69,
        "path": "workloads[1].nod",
        "message": "unknown key; did you mean node?",
    }
    assert [warning["line"] for warning in found["warnings"]] == [4]


def test_warnings_are_no_fault():
    result = run(
        "check", "-", input="workloads: [{name: a, namespace: b, workloadIps: [10.0.0.1], services: {b/c: {}}}]"
    )
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("<stdin>: no faults, 1 warning, 1 good workload, ")


def test_a_file_that_cannot_be_read(tmp_path):
    result = run("check", tmp_path / "none.yaml")
    assert result.exit_code == 14
    assert result.stdout.splitlines() == [
        f"{tmp_path / 'none.yaml'}: cannot be read: no such file or directory",
        f"{tmp_path / 'none.yaml'}: 1 fault, no warnings",
    ]


def test_the_schema():
    result = run("schema")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == mesh_schema()


def test_in_a_process(wrong):
    result = hbone("mesh", "check", "mesh.yaml")
    assert result.code == 14
    assert result.out.count(b"\n") == 4
    assert hbone("mesh", "check").code == 2
