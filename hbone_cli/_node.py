"""``hbone node``: a node of a mesh, told by ztunnel's environment, a file, or options."""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from hbone_cli._options import examples

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hbone.proxy import Node, NodeConfig, Setting
    from hbone_cli._output import Reporter

__all__ = ["command"]

_SWITCH: Final = "true|false"


class _NodeCommand(click.Command):
    """Has an option for each setting of a node. They are asked for only by who runs the command or wants its help."""

    _made = False

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not self._made:
            from hbone.proxy import node_settings

            self._made = True
            self.params[:0] = [_option(setting) for setting in node_settings()]
        return super().get_params(ctx)

    def make_parser(self, ctx: click.Context) -> Any:
        self.get_params(ctx)
        return super().make_parser(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """By what they are about: they are many."""
        from hbone.proxy import node_settings

        groups: dict[str, list[tuple[str, str]]] = {}
        by_name = {setting.name: setting for setting in node_settings()}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                setting = by_name.get(parameter.name or "")
                groups.setdefault(setting.group if setting is not None else "Options", []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


def _option(setting: Setting) -> click.Option:
    default = setting.unset or setting.default_text
    facts = [f"default: {default}"] if default else []
    facts += ["env: " + ", ".join(setting.variables)] if setting.variables else []
    # A switch alone is one that is on.
    switch: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if setting.form == _SWITCH else {}
    return click.Option(
        [setting.option, setting.name],
        metavar=setting.form,
        help=setting.words + (f"  [{'; '.join(facts)}]" if facts else ""),
        allow_from_autoenv=False,  # `NodeConfig.from_environment` reads HBONE_NODE_..., and says which it did not like
        **switch,
    )


@click.command(
    "node",
    cls=_NodeCommand,
    short_help="Run a node of a mesh: outbound, inbound, policy.",
    epilog=examples(
        "What a mesh file says, with a CA of our own; applications use the SOCKS5 proxy on port 15080:",
        "  hbone node --mesh mesh.yaml --fake-ca",
        "The same in ztunnel's words:",
        '  FAKE_CA=true XDS_ADDRESS="" LOCAL_XDS_PATH=mesh.yaml hbone node',
        "One workload, with certificates from files:",
        "  hbone node --mesh mesh.yaml --mode dedicated --workload shop/cart-0/cart \\",
        "    --cert cart.pem --key cart.key --roots ca.pem",
        "Look at it:",
        "  curl localhost:15000/config_dump",
        "  curl -X POST 'localhost:15000/logging?level=proxy::outbound=debug'",
    ),
)
@click.option("--config", "config_file", metavar="FILE", help="A YAML file with settings: keys such as poolStreams.")
@click.option(
    "--json", is_flag=True, help="Say where we listen, and what goes wrong, as JSON objects on standard error."
)
def command(*, config_file: str | None, json: bool, **given: str | None) -> None:
    """Be a node of an ambient mesh, as ztunnel is.

    It carries the connections of this machine's workloads through the mesh, and takes those that come for them, as the
    mesh file and its policies say.

    Connections come from SOCKS5 or HTTP CONNECT, or are captured by a firewall rule. In mode shared, which is the
    default, a connection belongs to the workload that has its address, so several workloads of one machine can be
    told apart; in mode dedicated all are one workload's.

    Everything can be said in an option, in the environment (ztunnel's variables, and HBONE_NODE_POOL_STREAMS=50 for
    --pool-streams 50), or in a file; the first of these wins. The mesh file is watched: a change is in force within a
    second or so, also for connections that are open. Certificates are renewed by themselves.

    The log goes to standard output: one line for each connection, and what happens. SIGTERM, Ctrl-C or a POST to
    /quitquitquit drains; a second signal ends everything at once.
    """
    import trio

    from hbone.proxy import NodeConfig
    from hbone_cli._life import raise_file_limit
    from hbone_cli._output import Reporter

    overrides = {name: text for name, text in given.items() if text is not None}
    config = NodeConfig.from_environment(os.environ, config_file=config_file, overrides=overrides)
    raise_file_limit()
    # While a thread reads a large mesh file, the event loop waits this long for the interpreter each time that it has
    # been away from it; a small request is several such times under way.
    usual = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    try:
        # Without --json the log says it all.
        trio.run(_run, config, Reporter(as_json=json, events=json))
    finally:
        sys.setswitchinterval(usual)


async def _run(config: NodeConfig, reporter: Reporter) -> None:
    import trio

    from hbone.proxy import Node
    from hbone.telemetry import AccessLog, LogFormat, LogLevels, log_to
    from hbone_cli._life import standard_output, stop_signals

    async with AccessLog(standard_output(), LogFormat(config.log_format)) as access_log:
        with (
            log_to(access_log, LogLevels.parse(config.log_level)) as levels,
            trio.open_signal_receiver(*stop_signals()) as signals,
        ):
            await _live(Node(config, access_log=access_log, log_levels=levels), signals, reporter)


async def _live(node: Node, signals: AsyncIterator[int], reporter: Reporter) -> None:
    """From the start to the end of the drain."""
    import trio

    from hbone_cli._errors import Interrupted
    from hbone_cli._life import drain

    why: list[str] = []
    told = trio.Event()
    first, first_is_over = trio.CancelScope(), trio.Event()
    started = False

    async def wait_for_signal() -> None:
        with first:
            number = await anext(signals)
            if not started:
                raise Interrupted(number)
            why.append(signal.Signals(number).name)
            told.set()
        first_is_over.set()

    async def wait_for_request() -> None:
        await node.stop_requested.wait()
        why.append("/quitquitquit")
        told.set()

    async def announce() -> None:
        await node.ready.wait()
        # What is there now stays: the collector need not walk it again and again.
        gc.collect()
        gc.freeze()
        reporter.event("ready", "ready")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_signal)
        async with node:
            started = True
            for name, addresses in node.addresses.items():
                for address in addresses:
                    reporter.event("listening", f"{name} listens on {address}", way=name, address=str(address))
            nursery.start_soon(announce)
            nursery.start_soon(wait_for_request)
            await told.wait()
            first.cancel()  # the next signal is the drain's
            await first_is_over.wait()
            live = node.statistics().live
            await drain(node.drain, live, node.config.drain_deadline, why[0], signals, reporter)
        nursery.cancel_scope.cancel()
