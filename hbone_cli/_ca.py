"""``hbone ca``: a certificate authority for laptops and tests, and what certificates say."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from hbone_cli._options import common_options

if TYPE_CHECKING:
    from hbone.certs import CertificateFacts

__all__ = ["command"]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class _Duration(click.ParamType):
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"([0-9]{1,9})([smhd])", value)
        if found is None or not int(found[1]):
            self.fail(f"{value!r} is not a time such as 90m, 24h or 7d", param, ctx)
        return timedelta(seconds=int(found[1]) * _UNITS[found[2]])


@click.group("ca")
def command() -> None:
    """A certificate authority for laptops and tests. Not for production: it asks nobody who you are.

    \b
    hbone ca init ca
    hbone ca issue ca spiffe://cluster.local/ns/shop/sa/cart -o cart
    hbone ca show cart/cert.pem
    """


@command.command("init")
@click.argument("directory", type=click.Path())
@click.option("--trust-domain", default="cluster.local", show_default=True, metavar="NAME", help="Whose identities.")
def init(*, directory: str, trust_domain: str) -> None:
    """Make a CA: a root certificate and its key, in a new DIRECTORY that only you can read.

    \b
    hbone ca init ca
    """
    from hbone import LocalCA

    ca = LocalCA.create(directory, trust_domain=trust_domain)
    click.echo(f"CA for {ca.trust_domain} in {directory}: who has {directory}/root-key.pem can be anybody there")


@command.command("issue")
@click.argument("directory", type=click.Path())
@click.argument("identity", metavar="IDENTITY")
@click.option("-o", "--output", required=True, type=click.Path(), metavar="DIR", help="Where to put the files.")
@click.option(
    "--ttl", type=_Duration(), default="24h", show_default=True, metavar="TIME", help="How long it is valid: 90m, 7d."
)
def issue(*, directory: str, identity: str, output: str, ttl: timedelta) -> None:
    """Issue a certificate for IDENTITY (spiffe://...) from the CA in DIRECTORY.

    Writes cert.pem, key.pem (0600) and roots.pem. Do it again to renew: proxies that use the files take the new ones.

    \b
    hbone ca issue ca spiffe://cluster.local/ns/shop/sa/cart -o cart
    """
    from hbone import LocalCA

    ca = LocalCA.open(directory)
    svid = ca.issue(identity, ttl=ttl)
    files = ca.write(svid, output)
    click.echo(f"{svid.identity}, valid until {svid.not_after:%Y-%m-%dT%H:%M:%SZ}")
    click.echo(f"--cert {files.cert} --key {files.key} --roots {files.roots}")


@command.command("show")
@click.argument("file", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="A JSON array.")
def show(*, file: str, as_json: bool) -> None:
    """Say what the certificates in FILE (PEM) are, and what is wrong with them.

    \b
    hbone ca show cart/cert.pem
    hbone ca show --json roots.pem | jq -r '.[].not_after'
    """
    from hbone.certs import describe

    facts = describe(file)
    if as_json:
        click.echo(json.dumps([_plain(one) for one in facts], indent=2))
    else:
        _print(file, facts)
