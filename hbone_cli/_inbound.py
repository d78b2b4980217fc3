"""``hbone inbound``: HBONE in, TCP out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hbone_cli._options import (
    ALLOWED_NETWORKS,
    AUTHORITY,
    PATTERN,
    IdentityOptions,
    Listen,
    ListenType,
    NodeOptions,
    examples,
    identity_options,
    node_options,
)

if TYPE_CHECKING:
    from hbone import Authority, IdentityPattern, TargetRule

__all__ = ["command"]


@click.command(
    "inbound",
    short_help="Take tunnels from the mesh to applications.",
    epilog=examples(
        "One application on this machine:",
        "  hbone inbound --ca ca --identity spiffe://cluster.local/ns/shop/sa/web --to 127.0.0.1:8080",
        "All applications of this machine, for one namespace:",
        "  hbone inbound --cert web.pem --key web.key --roots ca.pem --allow-peer 'spiffe://cluster.local/ns/shop/*'",
        "A gateway to a network:",
        "  hbone inbound --cert gw.pem --key gw.key --roots ca.pem --allow-target 10.1.0.0/16:5432",
    ),
)
@click.option(
    "--listen",
    type=ListenType("0.0.0.0"),  # noqa: S104 - a node is there to be reached
    default="0.0.0.0:15008",
    show_default=True,
    metavar="[HOST:]PORT",
    help="Where peers reach us; port 0 for a free one.",
)
@identity_options
@click.option("--to", type=AUTHORITY, metavar="HOST:PORT", help="Send everything to this one application.")
@click.option(
    "--allow-target",
    type=ALLOWED_NETWORKS,
    multiple=True,
    metavar="CIDR[:PORT]",
    help="Forward to targets in this network too, at all ports or one; IPv6: [CIDR]:PORT. Repeatable.",
)
@click.option(
    "--allow-peer",
    type=PATTERN,
    multiple=True,
    metavar="PATTERN",
    help="Who may ask: a SPIFFE id, or the beginning of some and a *. Repeatable."
    "  [default: anybody of our own trust domain]",
)
@node_options
def command(
    *,
    listen: Listen,
    who: IdentityOptions,
    to: Authority | None,
    allow_target: tuple[Any, ...],
    allow_peer: tuple[IdentityPattern, ...],
    options: NodeOptions,
) -> None:
    """Take tunnels from the mesh and forward them to applications, as plain TCP.

    Without --to and --allow-target a tunnel may go only to the address at which the peer reached us, as in a mesh: a
    node is never an open relay because a flag was forgotten. 401, 400 or 503 tells a peer why it gets no tunnel.

    The access log goes to standard output. SIGTERM drains; new certificate files are taken up without a restart.
    """
    if to is not None and allow_target:
        raise click.UsageError("--to sends everything to one application: --allow-target has no meaning besides it")

    from contextlib import asynccontextmanager

    import hbone
    from hbone.proxy import InboundProxy
    from hbone_cli._life import Node, Way, run_node

    rule: TargetRule
    if to is not None:
        rule = hbone.FixedTarget(to)
    elif allow_target:
        rule = hbone.AllowNetworks(tuple(network for networks in allow_target for network in networks))
    else:
        rule = hbone.DialledAddress()

    @asynccontextmanager
    async def open_node(source: Any, access_log: Any, metrics: Any) -> Any:
        proxy = InboundProxy(source, rule, peers=allow_peer or None, access_log=access_log, metrics=metrics)
        way = Way(name="inbound", listen=listen, serve=proxy.serve, target=str(to) if to is not None else None)
        yield Node(ways=(way,), drain=proxy.drain, live=lambda: proxy.server.statistics().tunnels)

    run_node(who, options, open_node)
