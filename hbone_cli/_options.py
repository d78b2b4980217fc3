"""Options that commands share, and what their texts mean."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone import Authority, CaSvidSource, Endpoint, FileSvidSource, InvalidCertificate, Svid

    ParamType = click.ParamType[Any]
else:  # older releases of click have no brackets
    ParamType = click.ParamType

__all__ = [
    "ALLOWED_NETWORKS",
    "AUTHORITY",
    "FORWARD",
    "IP_ADDRESS",
    "NEXT_HOP",
    "PATTERN",
    "IdentityOptions",
    "Listen",
    "ListenType",
    "NodeOptions",
    "common_options",
    "ParamType",
    "examples",
    "expect_option",
    "identity_options",
    "node_options",
    "via_option",
]

Command: TypeAlias = "Callable[..., Any]"


def examples(*lines: str) -> str:
    """An epilog for help: a line of words, a command, and so on; kept as it is (click's backspace says so)."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


# === what texts mean ===


@dataclass(frozen=True, slots=True)
class Listen:
    """An address to listen on."""

    host: str
    port: int

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        import ipaddress

        return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class _Text(ParamType):
    """A text that a function of ours reads."""

    def __init__(self, name: str, read: Callable[[str], Any]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._read(value)
        except ValueError as problem:  # all of the library's Invalid... are
            self.fail(str(problem), param, ctx)


class ListenType(_Text):
    """``PORT`` or ``ADDRESS:PORT``.

    Args:
        host: for a port alone.
    """

    def __init__(self, host: str) -> None:
        super().__init__("address", functools.partial(_read_listen, host=host))


def _read_listen(text: str, *, host: str) -> Listen:
    from hbone import Endpoint, InvalidAddress

    if text.isascii() and text.isdigit():
        text = f"[{host}]:{text}" if ":" in host else f"{host}:{text}"
    name, _, port = text.rpartition(":")
    if name == "localhost":
        text = f"127.0.0.1:{port}"
    try:
        endpoint = Endpoint.parse(text)
    except InvalidAddress as problem:
        what = str(problem).partition("; ")[0]
        raise InvalidAddress(f"{what}; write PORT, ADDRESS:PORT or [IPV6]:PORT") from None
    return Listen(str(endpoint.ip), endpoint.port)


def _read_forward(text: str) -> tuple[Listen, Authority]:
    from hbone import Authority, InvalidAddress

    listen, equals, target = text.partition("=")
    if not equals:
        raise InvalidAddress(f"{text!r} has no target: write [BIND:]PORT=HOST:PORT, as in 5432=10.0.0.9:5432")
    return _read_listen(listen, host="127.0.0.1"), Authority.parse(target)


def _read_authority(text: str) -> Authority:
    from hbone import Authority

    return Authority.parse(text)


def _read_next_hop(text: str) -> Authority | Endpoint:
    from hbone import HBONE_PORT, Authority, Endpoint

    if text.startswith("["):
        text = f"{text}:{HBONE_PORT}" if text.endswith("]") else text
    elif text.count(":") > 1:
        text = f"[{text}]:{HBONE_PORT}"
    elif ":" not in text:
        text = f"{text}:{HBONE_PORT}"
    # A zone (fe80::1%eth0) is our own side's business, so it cannot be in an authority.
    return Endpoint.parse(text) if "%" in text else Authority.parse(text)


def _read_ip(text: str) -> Any:
    import ipaddress

    from hbone import Endpoint

    try:
        return Endpoint(ipaddress.ip_address(text), 0).ip
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address") from None


def _read_pattern(text: str) -> Any:
    from hbone import IdentityPattern

    return IdentityPattern.parse(text)


def _read_networks(text: str) -> Any:
    from hbone import AllowNetworks

    return AllowNetworks.parse([text]).networks


AUTHORITY = _Text("host:port", _read_authority)
IP_ADDRESS = _Text("ip", _read_ip)
NEXT_HOP = _Text("host[:port]", _read_next_hop)
FORWARD = _Text("forward", _read_forward)
PATTERN = _Text("pattern", _read_pattern)
ALLOWED_NETWORKS = _Text("network", _read_networks)


# === who we are ===


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityOptions:
    """Either three files, or a CA and whom to be."""

    cert: str | None
    key: str | None
    roots: str | None
    ca: str | None
    identity: str | None

    def source(
        self,
        *,
        interval: float,
        on_new: Callable[[Svid], None],
        on_error: Callable[[InvalidCertificate], None],
    ) -> FileSvidSource | CaSvidSource:
        """SVIDs that are kept up to date.

        Args:
            interval: seconds between two looks at the files.
            on_new: called with each new SVID.
            on_error: called when changed files are of no use.

        Raises:
            InvalidCertificate: there is none to begin with.
        """
        import hbone

        if self.ca is not None:
            assert self.identity is not None
            return hbone.CaSvidSource(hbone.LocalCA.open(self.ca), self.identity, on_renew=on_new)
        assert self.cert is not None
        assert self.key is not None
        assert self.roots is not None
        return hbone.FileSvidSource(
            self.cert, self.key, self.roots, poll_interval=interval, on_reload=on_new, on_error=on_error
        )

    def svid(self) -> Svid:
        """One SVID, for a command that is soon over.

        Raises:
            InvalidCertificate: there is none.
        """
        return self.source(interval=1, on_new=lambda _: None, on_error=lambda _: None).current()


def _identity(
    cert: str | None, key: str | None, roots: str | None, ca: str | None, identity: str | None
) -> IdentityOptions:
    files = {"cert": cert, "key": key, "roots": roots}
    authority = {"ca": ca, "identity": identity}
    if any(files.values()) and any(authority.values()):
        # What is on the command line wins over what is only in the environment.
        if not any(map(_typed, files)):
            files = dict.fromkeys(files)
        elif not any(map(_typed, authority)):
            authority = dict.fromkeys(authority)
        else:
            raise click.UsageError("say who we are in one way: --cert, --key and --roots, or --ca and --identity")
    wanted = authority if any(authority.values()) else files
    missing = [f"--{name}" for name, value in wanted.items() if not value]
    if len(missing) == len(wanted):
        raise click.UsageError("say who we are: --cert, --key and --roots, or --ca DIR and --identity spiffe://...")
    if missing:
        raise click.UsageError(
            f"{' and '.join(missing)} missing: {', '.join(f'--{name}' for name in wanted)} go together"
        )
    if authority["identity"]:
        from hbone import InvalidIdentity, SpiffeIdentity

        try:
            SpiffeIdentity.parse(authority["identity"])
        except InvalidIdentity as problem:
            raise click.BadParameter(str(problem), param_hint="'--identity'") from None
    return IdentityOptions(**files, **authority)


def _typed(name: str) -> bool:
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def identity_options(function: Command) -> Command:
    """``--cert --key --roots`` or ``--ca --identity``, as one argument `who`."""

    @functools.wraps(function)
    def with_identity(
        *, cert: str | None, key: str | None, roots: str | None, ca: str | None, identity: str | None, **rest: Any
    ) -> Any:
        return function(who=_identity(cert, key, roots, ca, identity), **rest)

    return _decorate(
        with_identity,
        click.option("--cert", envvar="HBONE_CERT", metavar="FILE", help="Our certificate and intermediates (PEM)."),
        click.option("--key", envvar="HBONE_KEY", metavar="FILE", help="Its private key (PEM)."),
        click.option("--roots", envvar="HBONE_ROOTS", metavar="FILE", help="The roots to check peers with (PEM)."),
        click.option("--ca", envvar="HBONE_CA", metavar="DIR", help='Or: a CA made by "hbone ca init" ...'),
        click.option("--identity", envvar="HBONE_IDENTITY", metavar="ID", help="... and whom it shall make us."),
    )


# === what commands share ===


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """How a proxy lives."""

    log_format: str
    admin: Listen | None
    drain_deadline: float
    reload_interval: float
    json: bool
    verbose: int


def node_options(function: Command) -> Command:
    """What both proxies take besides, as one argument `options`."""

    @functools.wraps(function)
    def with_node(
        *, log_format: str, admin: Listen | None, drain_deadline: float, reload_interval: float, **rest: Any
    ) -> Any:
        options = NodeOptions(
            log_format=log_format,
            admin=admin,
            drain_deadline=drain_deadline,
            reload_interval=reload_interval,
            json=rest.pop("json"),
            verbose=rest.pop("verbose"),
        )
        return function(options=options, **rest)

    return _decorate(
        with_node,
        click.option(
            "--log-format",
            type=click.Choice(["plain", "json"]),
            default="plain",
            show_default=True,
            help="The access log on standard output: one line a connection.",
        ),
        click.option(
            "--admin",
            type=ListenType("127.0.0.1"),
            metavar="[HOST:]PORT",
            help="Serve /metrics and /healthz/ready here (HTTP).",
        ),
        click.option(
            "--drain-deadline",
            type=click.FloatRange(min=0),
            default=5.0,
            show_default=True,
            metavar="SECONDS",
            help="On SIGTERM or Ctrl-C: how long tunnels may go on. A second signal ends them at once.",
        ),
        click.option(
            "--reload-interval",
            type=click.FloatRange(min=0, min_open=True),
            default=5.0,
            show_default=True,
            metavar="SECONDS",
            help="How often to look whether the certificate files have changed.",
        ),
        common_options("Say where we listen, and what goes wrong, as JSON objects on standard error."),
    )


def common_options(json_help: str) -> Callable[[Command], Command]:
    """``--json`` and ``-v``."""

    def decorate(function: Command) -> Command:
        return _decorate(
            function,
            click.option("--json", is_flag=True, help=json_help),
            click.option("-v", "--verbose", count=True, help="Log what happens on standard error; -vv: more."),
        )

    return decorate


def via_option(function: Command) -> Command:
    """``--via``."""
    return click.option(
        "--via",
        envvar="HBONE_VIA",
        type=NEXT_HOP,
        metavar="HOST[:PORT]",
        help="The next hop for all tunnels.  [default: the target's own address, port 15008]",
    )(function)


def expect_option(function: Command) -> Command:
    """``--expect``."""
    return click.option(
        "--expect",
        envvar="HBONE_EXPECT",
        type=PATTERN,
        multiple=True,
        metavar="ID",
        help="Whom to accept as the next hop; a final * takes all that begin so. Repeatable."
        "  [default: anybody of our own trust domain]",
    )(function)


def _decorate(function: Command, *decorators: Callable[[Command], Command]) -> Command:
    for decorator in reversed(decorators):  # click shows the last one first
        function = decorator(function)
    return function
