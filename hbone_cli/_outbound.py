"""``hbone outbound``: TCP in, HBONE out."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from hbone_cli._options import (
    FORWARD,
    IdentityOptions,
    Listen,
    ListenType,
    NodeOptions,
    examples,
    expect_option,
    identity_options,
    node_options,
    via_option,
)

if TYPE_CHECKING:
    from hbone import Authority, Endpoint, IdentityPattern
    from hbone.proxy import OutboundProxy
    from hbone_cli._life import Way

__all__ = ["command"]


@click.command(
    "outbound",
    short_help="Carry applications' connections through the mesh.",
    epilog=examples(
        "A local port for a database:",
        "  hbone outbound --ca ca --identity spiffe://cluster.local/ns/shop/sa/cart --forward 5432=10.0.0.9:5432",
        "Proxies for anything else, through one node:",
        "  hbone outbound --cert cart.pem --key cart.key --roots ca.pem --via 10.0.0.7 --socks 1080 --http-proxy 3128",
        "Everything that the firewall redirects here:",
        "  hbone outbound --cert cart.pem --key cart.key --roots ca.pem --capture --listen 0.0.0.0:15001",
    ),
)
@click.option("--capture", is_flag=True, help="Take connections that the firewall redirects to --listen. Linux.")
@click.option(
    "--listen",
    type=ListenType("0.0.0.0"),  # noqa: S104 - a redirected connection comes to any address
    default="0.0.0.0:15001",
    show_default=True,
    metavar="[HOST:]PORT",
    help="For --capture.",
)
@click.option("--tproxy", is_flag=True, help="For --capture with TPROXY instead of REDIRECT; needs CAP_NET_ADMIN.")
@click.option(
    "--forward",
    type=FORWARD,
    multiple=True,
    metavar="[BIND:]PORT=HOST:PORT",
    help="A local port for one target. Repeatable.",
)
@click.option(
    "--socks",
    type=ListenType("127.0.0.1"),
    multiple=True,
    metavar="[BIND:]PORT",
    help="A SOCKS5 proxy.",
)
@click.option(
    "--http-proxy",
    type=ListenType("127.0.0.1"),
    multiple=True,
    metavar="[BIND:]PORT",
    help="An HTTP proxy that does CONNECT: for curl -x and https_proxy.",
)
@via_option
@expect_option
@identity_options
@node_options
def command(
    *,
    capture: bool,
    listen: Listen,
    tproxy: bool,
    forward: tuple[tuple[Listen, Authority], ...],
    socks: tuple[Listen, ...],
    http_proxy: tuple[Listen, ...],
    via: Authority | Endpoint | None,
    expect: tuple[IdentityPattern, ...],
    who: IdentityOptions,
    options: NodeOptions,
) -> None:
    """Take applications' TCP connections and carry them through the mesh.

    At least one way in is needed; several can be had at once. Those that an application is pointed at listen on
    127.0.0.1, unless an address is given: whoever can connect to them acts in our name.

    An application whose tunnel cannot be had sees a reset connection, a SOCKS reply or an HTTP status; the access log
    on standard output says why. SIGTERM drains; new certificate files are taken up without a restart.
    """
    if not (capture or forward or socks or http_proxy):
        raise click.UsageError("no way in: give at least one of --capture, --forward, --socks, --http-proxy")
    if capture and sys.platform != "linux":
        raise click.UsageError("--capture needs Linux; --forward, --socks and --http-proxy work everywhere")
    if tproxy and not capture:
        raise click.UsageError("--tproxy is for --capture")

    from contextlib import asynccontextmanager

    import hbone
    from hbone.proxy import OutboundProxy
    from hbone_cli._life import Node, run_node

    policy = hbone.PeerPolicy.matching(*expect) if expect else None

    @asynccontextmanager
    async def open_node(source: Any, access_log: Any, metrics: Any) -> Any:
        async with OutboundProxy(source, via=via, expect=policy, access_log=access_log, metrics=metrics) as proxy:
            ways = _ways(proxy, listen if capture else None, tproxy, forward, socks, http_proxy)
            yield Node(ways=ways, drain=proxy.drain, live=lambda: proxy.connections)

    entrances = [
        *(("--forward", at) for at, _ in forward),
        *(("--socks", at) for at in socks),
        *(("--http-proxy", at) for at in http_proxy),
    ]
    warnings = tuple(
        f"{option} {at}: whoever reaches it goes through the mesh in our name; 127.0.0.1 keeps it to this machine"
        for option, at in entrances
        if not at.local
    )
    run_node(who, options, open_node, warnings=warnings)


def _ways(
    proxy: OutboundProxy,
    capture: Listen | None,
    tproxy: bool,
    forward: tuple[tuple[Listen, Authority], ...],
    socks: tuple[Listen, ...],
    http_proxy: tuple[Listen, ...],
) -> tuple[Way, ...]:
    from hbone_cli._life import Way

    ways = []
    if capture is not None:
        ways.append(Way(name="capture", listen=capture, serve=partial(proxy.serve_captured, transparent=tproxy)))
    for at, target in forward:
        serve = partial(proxy.serve_forward, target=target)
        ways.append(Way(name="forward", listen=at, serve=serve, target=str(target)))
    ways += [Way(name="socks", listen=at, serve=proxy.serve_socks) for at in socks]
    ways += [Way(name="http-proxy", listen=at, serve=proxy.serve_http_connect) for at in http_proxy]
    return tuple(ways)
