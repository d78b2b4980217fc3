"""``hbone ca``: a certificate authority for laptops and tests, and what certificates say."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hbone_cli._options import ParamType, examples

if TYPE_CHECKING:
    from hbone.certs import CertificateFacts

__all__ = ["command"]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class _Duration(ParamType):
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"([0-9]{1,9})([smhd])", value)
        if found is None or not int(found[1]):
            self.fail(f"{value!r} is not a time such as 90m, 24h or 7d", param, ctx)
        return timedelta(seconds=int(found[1]) * _UNITS[found[2]])


@click.group(
    "ca",
    short_help="A CA for laptops and tests; what certificates say.",
    epilog=examples(
        "hbone ca init ca",
        "hbone ca issue ca spiffe://cluster.local/ns/shop/sa/cart -o cart",
        "hbone ca show cart/cert.pem",
    ),
)
def command() -> None:
    """A certificate authority for laptops and tests. Not for production: it asks nobody who you are."""


@command.command("init", short_help="Make a CA.", epilog=examples("hbone ca init ca"))
@click.argument("directory", type=click.Path())
@click.option("--trust-domain", default="cluster.local", show_default=True, metavar="NAME", help="Whose identities.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object.")
def init(*, directory: str, trust_domain: str, as_json: bool) -> None:
    """Make a CA: a root certificate and its key, in a new DIRECTORY that only you can read."""
    from hbone import LocalCA

    ca = LocalCA.create(directory, trust_domain=trust_domain)
    key = Path(directory) / "root-key.pem"
    if as_json:
        click.echo(json.dumps({"directory": directory, "trust_domain": str(ca.trust_domain), "key": str(key)}))
    else:
        click.echo(f"CA for {ca.trust_domain} in {directory}: whoever has {key} can be anybody there")


@command.command(
    "issue",
    short_help="Issue a certificate.",
    epilog=examples("hbone ca issue ca spiffe://cluster.local/ns/shop/sa/cart -o cart"),
)
@click.argument("directory", type=click.Path())
@click.argument("identity", metavar="IDENTITY")
@click.option("-o", "--output", required=True, type=click.Path(), metavar="DIR", help="Where to put the files.")
@click.option(
    "--ttl", type=_Duration(), default="24h", show_default=True, metavar="TIME", help="How long it is valid: 90m, 7d."
)
@click.option("--json", "as_json", is_flag=True, help="A JSON object.")
def issue(*, directory: str, identity: str, output: str, ttl: timedelta, as_json: bool) -> None:
    """Issue a certificate for IDENTITY (spiffe://...) from the CA in DIRECTORY.

    Writes cert.pem, key.pem (0600) and roots.pem. Do it again to renew: proxies that use the files take the new ones.
    """
    from hbone import LocalCA

    ca = LocalCA.open(directory)
    svid = ca.issue(identity, ttl=ttl)
    files = ca.write(svid, output)
    if as_json:
        names = {"cert": str(files.cert), "key": str(files.key), "roots": str(files.roots)}
        click.echo(json.dumps({"identity": str(svid.identity), "not_after": _utc(svid.not_after), **names}))
    else:
        click.echo(f"{svid.identity}, valid until {_utc(svid.not_after)}")
        click.echo(f"--cert {files.cert} --key {files.key} --roots {files.roots}")


@command.command(
    "show",
    short_help="Say what certificates are.",
    epilog=examples("hbone ca show cart/cert.pem", "hbone ca show --json roots.pem | jq -r '.[].not_after'"),
)
@click.argument("file", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="A JSON array.")
def show(*, file: str, as_json: bool) -> None:
    """Say what the certificates in FILE (PEM) are, and what is wrong with them."""
    from hbone.certs import describe

    facts = describe(file)
    if as_json:
        click.echo(json.dumps([_plain(one) for one in facts], indent=2))
    else:
        _print(file, facts)


def _utc(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def _plain(facts: CertificateFacts) -> dict[str, Any]:
    texts = {"not_before": _utc(facts.not_before), "not_after": _utc(facts.not_after)}
    return {**asdict(facts), "identity": str(facts.identity) if facts.identity else None, **texts}


def _print(file: str, facts: list[CertificateFacts]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)

    def say(name: str, value: str, style: str = "") -> None:
        for index, line in enumerate(value.splitlines()):
            # Text: what is in a certificate is no markup.
            label = (f"{'' if index else name:<20}", style or "dim")
            console.print(Text.assemble(label, (line, style)), soft_wrap=True)

    for number, one in enumerate(facts, 1):
        if len(facts) > 1:
            console.print(Text(f"{file}, certificate {number} of {len(facts)}", "bold"), soft_wrap=True)
        if one.identity is not None:
            say("identity", str(one.identity))
        say("subject", one.subject or "(empty)")
        say("issuer", one.issuer or "(empty)")
        say("valid", f"{_utc(one.not_before)} to {_utc(one.not_after)}{_left(one)}")
        say("key", one.key_type)
        say("names", "\n".join(one.names) or "(none)")
        say("may sign others", "yes: a CA" if one.is_ca else "no: a leaf")
        say("key usage", _words(one.key_usage))
        say("extended key usage", _words(one.extended_key_usage))
        say("serial", one.serial)
        say("SHA-256", one.fingerprint)
        for warning in one.warnings:
            say("warning", warning, "yellow")
        if number < len(facts):
            console.print()


def _left(facts: CertificateFacts) -> str:
    left = facts.not_after - datetime.now(UTC)
    if left <= timedelta(0):
        return ""
    hours = left.total_seconds() / 3600
    return f" ({hours / 24:.0f} days left)" if hours >= 48 else f" ({hours:.1f} hours left)"


def _words(usages: tuple[str, ...] | None) -> str:
    return "(not restricted)" if usages is None else ", ".join(usages) or "(none)"
