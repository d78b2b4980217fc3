"""The life of a proxy process: from its certificates to its last tunnel.

The first SIGTERM or SIGINT starts the drain: no new connections, GOAWAY to the peers, not ready any more, and tunnels
go on until they end or the deadline comes. A second signal ends them at once.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import trio

from hbone.telemetry import AccessLog, LogFormat
from hbone_cli._errors import CannotListen, Interrupted
from hbone_cli._output import Reporter, start_logging

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from hbone import Endpoint, InvalidCertificate, Svid, SvidSource
    from hbone.admin import Readiness
    from hbone.telemetry import Metrics
    from hbone_cli._options import IdentityOptions, Listen, NodeOptions

__all__ = ["Node", "Way", "drain", "raise_file_limit", "run_node", "standard_output", "stop_signals"]

#: More would only make whoever closes "all descriptors" slow.
_ENOUGH_FILES: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One port to listen on."""

    name: str
    """What for: the option's name."""
    listen: Listen
    serve: Callable[..., Awaitable[None]]
    """``serve(host, port, task_status=...)``, as the proxies have it."""
    target: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A proxy that is to be run."""

    ways: tuple[Way, ...]
    drain: Callable[[float], Awaitable[None]]
    live: Callable[[], int]
    """How many connections are open."""


def run_node(
    who: IdentityOptions,
    options: NodeOptions,
    open_node: Callable[[SvidSource, AccessLog, Metrics | None], AbstractAsyncContextManager[Node]],
    *,
    warnings: tuple[str, ...] = (),
) -> None:
    """Run a proxy until it is told to stop.

    Raises:
        InvalidCertificate: no SVID to begin with.
        CannotListen: one of the ways in cannot be opened.
        Interrupted: a second signal came.
    """
    reporter = Reporter(as_json=options.json)
    start_logging(verbose=options.verbose, as_json=options.json)
    for warning in warnings:
        reporter.warning(warning)

    def renewed(svid: Svid) -> None:
        until = f"{svid.not_after:%Y-%m-%dT%H:%M:%SZ}"
        text = f"new certificate for {svid.identity}, valid until {until}; open tunnels keep the old one"
        reporter.event("certificate", text, identity=svid.identity, not_after=until)

    def useless(problem: InvalidCertificate) -> None:
        reporter.warning(f"certificate not taken: {problem}; the old one stays in use")

    source = who.source(interval=options.reload_interval, on_new=renewed, on_error=useless)
    raise_file_limit()
    trio.run(_run, source, options, open_node, reporter)


async def _run(
    source: SvidSource,
    options: NodeOptions,
    open_node: Callable[[SvidSource, AccessLog, Metrics | None], AbstractAsyncContextManager[Node]],
    reporter: Reporter,
) -> None:
    metrics = None
    if options.admin is not None:
        from hbone.telemetry import Metrics

        metrics = Metrics()
    async with (
        AccessLog(standard_output(), LogFormat(options.log_format)) as access_log,
        open_node(source, access_log, metrics) as node,
        trio.open_nursery() as nursery,
    ):
        with trio.open_signal_receiver(*stop_signals()) as signals:
            nursery.start_soon(source.run)  # type: ignore[attr-defined]
            readiness = await _serve_admin(nursery, options, metrics, reporter)
            for way in node.ways:
                await _listen(nursery, way, source, reporter)
            if readiness is not None:
                readiness.unblock("listeners")
            # What is there now stays: the collector need not walk it again and again.
            gc.collect()
            gc.freeze()
            reporter.event("ready", f"ready as {source.identity}", identity=source.identity)

            number = await anext(signals)
            if readiness is not None:
                readiness.block("draining")
            what = signal.Signals(number).name
            await drain(node.drain, node.live(), options.drain_deadline, what, signals, reporter)
        nursery.cancel_scope.cancel()


async def _listen(nursery: trio.Nursery, way: Way, source: SvidSource, reporter: Reporter) -> None:
    try:
        bound: Endpoint = await nursery.start(way.serve, way.listen.host, way.listen.port)
    except OSError as problem:
        raise CannotListen(way.name, str(way.listen), problem) from problem
    target = {"target": way.target} if way.target is not None else {}
    arrow = f" -> {way.target}" if way.target is not None else ""
    reporter.event("listening", f"{way.name} listens on {bound}{arrow}", way=way.name, address=str(bound), **target)


async def _serve_admin(
    nursery: trio.Nursery, options: NodeOptions, metrics: Metrics | None, reporter: Reporter
) -> Readiness | None:
    if options.admin is None or metrics is None:
        return None
    from hbone.admin import AdminServer, Readiness, standard_routes

    readiness = Readiness(["listeners"])
    server = AdminServer(standard_routes(render_metrics=metrics.render, readiness=readiness))
    where = options.admin
    try:
        bound: Endpoint = await nursery.start(server.serve, where.host, where.port)
    except OSError as problem:
        raise CannotListen("admin", str(where), problem) from problem
    reporter.event("listening", f"admin listens on {bound}", way="admin", address=str(bound))
    return readiness


async def drain(
    stop: Callable[[float], Awaitable[None]],
    live: int,
    deadline: float,
    why: str,
    signals: object,
    reporter: Reporter,
) -> None:
    """Stop in good order, but at once when another signal comes.

    Args:
        stop: does it, within the seconds that it is given.
        live: how many connections are open.
        deadline: how long they get, in seconds.
        why: who told us to.
        signals: where further signals come from.
        reporter: hears of it.

    Raises:
        Interrupted: another signal came.
    """
    text = f"{why}: draining {live} connection{'' if live == 1 else 's'}, {deadline:g} s at most"
    reporter.event("draining", text, signal=why, connections=live, deadline=deadline)

    async def quit_on_second() -> None:
        raise Interrupted(await anext(signals))  # type: ignore[call-overload]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(quit_on_second)
        await stop(deadline)
        nursery.cancel_scope.cancel()
    reporter.event("stopped", "stopped")


def standard_output() -> BinaryIO:
    """Where the access log goes; nowhere, when it was closed."""
    if sys.stdout is None:  # it was closed when we were started
        return Path(os.devnull).open("wb")
    return sys.stdout.buffer


def stop_signals(*, hang_up: bool = False) -> set[signal.Signals]:
    """What ends us: SIGINT, SIGTERM and, if asked for, SIGHUP; but for those that nohup or a shell made us ignore."""
    wanted = {signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hang_up else ())}
    return {number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN}


def raise_file_limit() -> None:
    """Let this process have as many open files as it may: each tunnel needs one."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        pass  # macOS has a lower bound of its own, which it does not tell
