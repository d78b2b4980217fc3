"""The command that holds the others, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from hbone_cli._errors import EXIT_CODES_HELP, ExitCode, explain
from hbone_cli._output import Reporter

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["COMMANDS", "cli", "main"]

#: Where each command is: a module with a `command`.
COMMANDS: Final = {
    "node": "hbone_cli._node",
    "inbound": "hbone_cli._inbound",
    "outbound": "hbone_cli._outbound",
    "connect": "hbone_cli._connect",
    "mesh": "hbone_cli._mesh",
    "explain": "hbone_cli._explain",
    "ca": "hbone_cli._ca",
    "demo": "hbone_cli._demo",
    "completion": "hbone_cli._completion",
}


class _Hbone(click.Group):
    """Loads a command when it is needed, and reports errors as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        command: click.Command = importlib.import_module(module).command
        return command

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        words = list(sys.argv[1:] if args is None else args)
        # The parser may be what fails, so the flag is looked for by hand.
        options = words[: words.index("--")] if "--" in words else words
        extra["standalone_mode"] = False
        try:
            code = super().main(words, prog_name or "hbone", **extra)
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, click.exceptions.NoArgsIsHelpError):  # its message is the whole help
                error.show()
                sys.exit(ExitCode.USAGE)
            failure = explain(error)
            Reporter(as_json="--json" in options).failure(failure)
            if failure.bug and {"-v", "-vv", "--verbose"} & set(options):
                raise
            code = failure.code
        sys.exit(code if isinstance(code, int) else 0)


def _show_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version("hbone")
    except PackageNotFoundError:
        number = "(not installed)"
    click.echo(f"hbone {number}")
    ctx.exit()


@click.group(
    "hbone",
    cls=_Hbone,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "HBONE", "max_content_width": 100},
    epilog=EXIT_CODES_HELP,
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
def cli() -> None:
    """Tunnels of Istio's ambient mesh: TCP in HTTP/2 CONNECT in TLS 1.3, with SPIFFE identities on both sides.

    "hbone node" is both sides of a mesh in one process, told by a mesh file. "hbone inbound" stands before an
    application, "hbone outbound" before its clients. "hbone COMMAND --help" has examples.

    Every option of a command can be given in the environment: HBONE_OUTBOUND_SOCKS=1080 is --socks 1080 of
    "hbone outbound". Those that say who we are, --via and --expect are also read from HBONE_CERT, HBONE_VIA and so
    on, for all commands.
    """


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code."""
    cli.main(args)
