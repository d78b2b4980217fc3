"""``hbone connect``: one tunnel on standard input and output."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from hbone_cli._options import (
    AUTHORITY,
    IdentityOptions,
    common_options,
    examples,
    expect_option,
    identity_options,
    via_option,
)

if TYPE_CHECKING:
    from hbone import Authority, Endpoint, IdentityPattern

__all__ = ["command"]


@click.command(
    "connect",
    short_help="One tunnel on standard input and output.",
    epilog=examples(
        "ssh through a tunnel:",
        "  ssh -o 'ProxyCommand hbone connect %h:%p --cert me.pem --key me.key --roots ca.pem' 10.0.0.7",
        "A request by hand:",
        "  printf 'GET / HTTP/1.0\\r\\n\\r\\n' | hbone connect 10.0.0.7:80 --cert me.pem --key me.key --roots ca.pem",
    ),
)
@click.argument("target", type=AUTHORITY, metavar="HOST:PORT")
@identity_options
@via_option
@expect_option
@common_options("Say what goes wrong as a JSON object on standard error.")
def command(
    *,
    target: Authority,
    via: Authority | Endpoint | None,
    expect: tuple[IdentityPattern, ...],
    who: IdentityOptions,
    json: bool,
    verbose: int,
) -> None:
    """Open one tunnel to HOST:PORT, from standard input and to standard output.

    The end of the input ends that direction only: we go on until the other side has ended its own. A tunnel that
    breaks is not an end of data: the exit code says so.
    """
    import hbone
    from hbone_cli._one_tunnel import run_tunnel
    from hbone_cli._output import Reporter, start_logging

    start_logging(verbose=verbose, as_json=json)
    if sys.stdout is None:
        raise click.UsageError("standard output is closed, and it is where the tunnel's bytes would go")
    run_tunnel(
        who.svid(),
        target,
        via,
        hbone.PeerPolicy.matching(*expect) if expect else None,
        Reporter(as_json=json) if verbose else None,
    )
