"""``hbone mesh``: what is wrong in a mesh file, and what may be in one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from hbone_cli._errors import ExitCode
from hbone_cli._options import examples

if TYPE_CHECKING:
    from hbone import MeshFault
    from hbone.mesh import ParsedMesh

__all__ = ["command"]


@click.group(
    "mesh",
    short_help="Check a mesh file; its JSON schema.",
    epilog=examples("hbone mesh check mesh.yaml", "hbone mesh schema > mesh.schema.json"),
)
def command() -> None:
    """The file that says what a mesh is made of: workloads, services, policies."""


@command.command(
    "check",
    short_help="Say what is wrong in a mesh file.",
    epilog=examples(
        "hbone mesh check mesh.yaml",
        "kubectl get configmap mesh -o jsonpath='{.data.mesh\\.yaml}' | hbone mesh check -",
        "hbone mesh check --json mesh.yaml | jq -r '.faults[].path'",
    ),
)
@click.argument("file", type=click.Path(allow_dash=True))
@click.option("--json", "as_json", is_flag=True, help="A JSON object.")
@click.pass_context
def check(ctx: click.Context, *, file: str, as_json: bool) -> None:
    """Say everything that is wrong in FILE ("-": standard input), a line each, and what is in it.

    A fault is what a node would not start with. A warning is what it takes, but what will hardly do what was meant: a
    name that nothing has, for example.
    """
    parsed = _parse(file)
    if as_json:
        click.echo(json.dumps(_facts(parsed), indent=2))
    else:
        _print(parsed)
    ctx.exit(ExitCode.CONFIG if parsed.faults else ExitCode.OK)


@command.command("schema", short_help="Print the JSON schema.", epilog=examples("hbone mesh schema > mesh.schema.json"))
def schema() -> None:
    """Print the JSON schema of mesh files, for editors and other tools."""
    from hbone.mesh import mesh_schema

    click.echo(json.dumps(mesh_schema(), indent=2))


def _parse(file: str) -> ParsedMesh:
    from hbone import MeshConfigError
    from hbone.mesh import ParsedMesh, parse_mesh, read_mesh_file

    if file == "-":
        return parse_mesh(sys.stdin.buffer.read(), source="<stdin>")
    try:
        return parse_mesh(read_mesh_file(file), source=file)
    except MeshConfigError as problem:
        return ParsedMesh(source=file, faults=problem.faults, readable=False)


def _facts(parsed: ParsedMesh) -> dict[str, Any]:
    return {
        "file": parsed.source,
        "workloads": len(parsed.workloads),
        "services": len(parsed.services),
        "policies": len(parsed.policies),
        "faults": [_plain(fault) for fault in parsed.faults],
        "warnings": [_plain(warning) for warning in parsed.warnings],
    }


def _plain(fault: MeshFault) -> dict[str, Any]:
    return {key: value for key, value in asdict(fault).items() if key != "source"}


def _print(parsed: ParsedMesh) -> None:
    found = [(fault.line, fault.column, str(fault)) for fault in parsed.faults]
    found += [(each.line, each.column, f"{each} (warning)") for each in parsed.warnings]
    # What is about the file as a whole has no line; it comes last if it says that there is more.
    for _, _, line in sorted(found, key=lambda each: (each[0] == 0, each[:2])):
        click.echo(line)
    counts = [_count(len(parsed.faults), "fault"), _count(len(parsed.warnings), "warning")]
    if parsed.readable:
        counts += [
            _count(len(parsed.workloads), "good workload"),
            _count(len(parsed.services), "good service"),
            _count(len(parsed.policies), "good policy"),
        ]
    click.echo(f"{parsed.source}: {', '.join(counts)}")


def _count(number: int, what: str) -> str:
    several = what.removesuffix("y") + "ies" if what.endswith("y") else f"{what}s"
    return f"{number or 'no'} {what if number == 1 else several}"
