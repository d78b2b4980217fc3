"""``hbone explain``: which way a connection goes through a mesh, who lets it in, and why."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import click

from hbone_cli._errors import ExitCode
from hbone_cli._options import AUTHORITY, IP_ADDRESS, examples

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

    from hbone import Authority
    from hbone.explain import ConnectionExplanation
    from hbone.mesh import MeshSnapshot
    from hbone.routing import RoutingConfig
    from hbone_cli._explain_client import Client

__all__ = ["command"]

#: By `Outcome`'s values, which are also the kinds of failures.
_EXIT_CODES: Final = {
    "through": ExitCode.OK,
    "no-route": ExitCode.NO_ROUTE,
    "peer-identity": ExitCode.PEER_IDENTITY,
    "denied": ExitCode.DENIED,
    "bad-target": ExitCode.BAD_TARGET,
    "unreachable": ExitCode.UNREACHABLE,
}
#: Of a node's SOCKS5 proxy, unless told otherwise.
_SOCKS: Final = 15080


def _complete_client(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    snapshot = _mesh_for_completion(ctx)
    names = () if snapshot is None else {workload.key for workload in snapshot.workloads.values()}
    return sorted(name for name in names if name.startswith(incomplete))


def _complete_target(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    snapshot = _mesh_for_completion(ctx)
    services = () if snapshot is None else snapshot.services.values()
    names = {f"{service.hostname}:{port}" for service in services for port in service.ports}
    return sorted(name for name in names if name.startswith(incomplete))


def _mesh_for_completion(ctx: click.Context) -> MeshSnapshot | None:
    from hbone import MeshConfigError

    file = ctx.params.get("mesh")
    if file == "-":  # a shell asks, and gives no file
        return None
    try:
        return _load(file)
    except (MeshConfigError, click.ClickException):
        return None


@click.command(
    "explain",
    short_help="Say which way a connection goes, and who lets it in.",
    epilog=examples(
        "hbone explain --mesh mesh.yaml --from shop/cart-0 --to stock.shop.svc.cluster.local:80",
        "hbone explain --mesh mesh.yaml --from 10.0.0.1 --to 10.96.0.20:80 --all",
        "Plain text that no node of the client carries, to a pod's own address:",
        "  hbone explain --mesh mesh.yaml --plain --from 192.0.2.9 --to 10.0.1.2:8080",
        "For a script: does it get through, and if not, why?",
        "  hbone explain --mesh mesh.yaml --from shop/cart-0 --to 10.96.0.20:80 --json | jq -r .conclusion",
    ),
)
@click.option(
    "--mesh",
    envvar="LOCAL_XDS_PATH",
    type=click.Path(allow_dash=True),
    metavar="FILE",
    help='The mesh file; "-": standard input.  [env: LOCAL_XDS_PATH, or its text in LOCAL_XDS]',
)
@click.option(
    "--from",
    "client",
    required=True,
    metavar="NS/NAME|IP",
    shell_complete=_complete_client,
    help="Who connects: a workload, by namespace/name, by uid or by address; or any address.",
)
@click.option(
    "--to",
    "target",
    required=True,
    type=AUTHORITY,
    metavar="HOST|IP:PORT",
    shell_complete=_complete_target,
    help="Where to, as the application says it.",
)
@click.option("--plain", is_flag=True, help="It comes in plain text: no node of the client carries it.")
@click.option(
    "--network",
    envvar="NETWORK",
    metavar="NAME",
    help="The network that the client's node is in.  [default: that of its workload; env: NETWORK]",
)
@click.option("--node-name", metavar="NAME", help="The client is a workload of this node.")
@click.option(
    "--source-ip", type=IP_ADDRESS, metavar="IP", help="Where it connects from.  [default: the workload's address]"
)
@click.option(
    "--resolves-to",
    "resolved",
    type=IP_ADDRESS,
    metavar="IP",
    help="What DNS says, where the mesh leaves a name to it.  [default: nobody is asked]",
)
@click.option(
    "--hbone-port",
    type=click.IntRange(1, 65535),
    default=15008,
    show_default=True,
    metavar="PORT",
    help="Where the workloads of the mesh are reached by HBONE.",
)
@click.option("--way", type=click.IntRange(min=1), metavar="N", help="Only this one of several ways.")
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Details of all ways, and not only of one: the likeliest that fails, else the likeliest.",
)
@click.option(
    "--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, metavar="N", help="Ways to look at."
)
@click.option("--json", "as_json", is_flag=True, help="A JSON object.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    mesh: str | None,
    client: str,
    target: Authority,
    plain: bool,
    network: str | None,
    node_name: str | None,
    source_ip: IPv4Address | IPv6Address | None,
    resolved: IPv4Address | IPv6Address | None,
    hbone_port: int,
    way: int | None,
    everything: bool,
    limit: int,
    as_json: bool,
) -> None:
    """Say what nodes with this mesh file do with a connection, step by step.

    Which way does it go, and which others might it go? What does the node at the other end say to it? Which policy
    decides, and what would change that? Nothing is sent, and nobody is asked.

    The exit code is 0 if the connection gets through whichever way it takes; otherwise it says what becomes of it:
    15 for no way at all, 9 for a policy that says no, 6, 10 or 11 for what the far node makes of it.
    """
    from hbone.routing import ILLEGAL_PORTS, RoutingConfig
    from hbone_cli._explain_client import find_client, hints

    if way is not None and everything:
        raise click.UsageError("--way is one way and --all is all of them: give one of the two")
    snapshot = _load(mesh)
    found = find_client(snapshot, client, network=network, node=node_name, source_ip=source_ip)
    config = RoutingConfig(
        network=found.network, hbone_port=hbone_port, illegal_ports=ILLEGAL_PORTS | {hbone_port, _SOCKS}
    )
    explanation = _explain(snapshot, config, found, target, plain, resolved, limit)
    numbers = range(1, len(explanation.ways) + 1)
    if way is not None:
        if way not in numbers:
            raise click.BadParameter(f"there is no way {way}; there are {len(numbers)}", param_hint="'--way'")
        numbers = range(way, way + 1)
        explanation = replace(explanation, ways=explanation.ways[way - 1 : way], omitted=0.0)
    advice = [*found.notes, *hints(snapshot, found, target)]
    if way is not None and way > 1:
        advice.append("the steps at the client's node are those of way 1")
    if as_json:
        click.echo(json.dumps({**explanation.to_dict(), "hints": advice}, indent=2))
    else:
        _print(explanation, numbers, advice, everything)
    ctx.exit(_EXIT_CODES[explanation.outcome.value])


def _load(file: str | None) -> MeshSnapshot:
    """The mesh.

    Raises:
        MeshConfigError: it has faults.
        UsageError: there is none.
    """
    from hbone.mesh import parse_mesh, read_mesh_file

    text = os.environ.get("LOCAL_XDS", "")
    if file == "-":
        parsed = parse_mesh(sys.stdin.buffer.read(), source="<stdin>")
    elif file:
        parsed = parse_mesh(read_mesh_file(file), source=file)
    elif text:
        parsed = parse_mesh(text, source="LOCAL_XDS")
    else:
        raise click.UsageError("there is no mesh: give --mesh FILE, or set LOCAL_XDS_PATH")
    parsed.check()
    return parsed.snapshot()


def _explain(
    snapshot: MeshSnapshot,
    config: RoutingConfig,
    client: Client,
    target: Authority,
    plain: bool,
    resolved: IPv4Address | IPv6Address | None,
    limit: int,
) -> ConnectionExplanation:
    from hbone.explain import explain_connection, explain_plain_connection

    if plain or client.workload is None:
        return explain_plain_connection(
            snapshot, config, source=client.workload, source_ip=client.ip, target=target, resolved=resolved
        )
    return explain_connection(
        snapshot, config, source=client.workload, source_ip=client.ip, target=target, resolved=resolved, limit=limit
    )


def _print(explanation: ConnectionExplanation, numbers: range, advice: list[str], everything: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    from hbone_cli._explain_text import lines

    # Colours only for people: rich looks whether this is a terminal.
    console = Console(highlight=False)
    for line, style in lines(explanation, numbers, advice, everything=everything):
        console.print(Text(line, style), soft_wrap=True)
