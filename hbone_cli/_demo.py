"""``hbone demo``: see it work, on one machine, within half a minute."""

from __future__ import annotations

import json
import signal
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from hbone_cli._errors import ExitCode, Interrupted
from hbone_cli._options import examples

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from rich.console import Console
    from rich.progress import Progress

    from hbone_cli._demo_steps import Demo, DemoFailed, Route, Step

__all__ = ["command"]

_SIZE: Final = 256
_MIB: Final = 1 << 20
_LOG_ERRORS: Final = 3


@click.command(
    "demo",
    short_help="See it work: two nodes, real traffic.",
    epilog=examples("hbone demo", "hbone demo --keep", "hbone demo --json | jq .steps"),
)
@click.option("--keep", is_flag=True, help="Leave it running until Ctrl-C, and say what to try.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of words.")
@click.option("--size", type=click.IntRange(1, 65536), default=_SIZE, hidden=True, help="MiB of each bulk transfer.")
def command(*, keep: bool, as_json: bool, size: int) -> int:
    """Start two nodes and an application on free ports, send real traffic through the mesh, show what happened.

    Each node is "hbone node" with a mesh file and a SPIFFE identity, from a CA that is thrown away in the end. The
    client asks for a service, and reaches it over HBONE as far as policy lets it. Needs no root, no network and no
    cluster. The exit code is 0 only if each step did what it should.
    """
    from hbone_cli._demo_steps import Demo, DemoFailed

    show = _Json() if as_json else _People()
    began = time.monotonic()
    with _stopped_by_signals(), Demo(show, size * _MIB) as demo:
        try:
            demo.run()
            show.succeeded(demo, time.monotonic() - began)
            if keep:
                show.invite(demo)
                _wait_for_interrupt()
        except DemoFailed as failure:
            show.failed(demo, failure, time.monotonic() - began)
            return int(ExitCode.BUG)
        finally:
            show.leaves()
    return int(ExitCode.OK)


class _Json:
    """Nothing but one document on standard output."""

    def begins(self, title: str, size: int | None = None) -> None:
        pass

    def moved(self, done: int) -> None:
        pass

    def ended(self, step: Step) -> None:
        pass

    def route(self, route: Route) -> None:
        pass

    def log_line(self, line: str) -> None:
        pass

    def failed(self, demo: Demo, failure: DemoFailed, seconds: float) -> None:
        self._print(demo, seconds, ok=False, failed_step=failure.step, error=failure.why)

    def succeeded(self, demo: Demo, seconds: float) -> None:
        self._print(demo, seconds, ok=True)

    def invite(self, demo: Demo) -> None:
        pass

    def leaves(self) -> None:
        pass

    @staticmethod
    def _print(demo: Demo, seconds: float, **outcome: Any) -> None:
        from dataclasses import asdict

        document = {
            **outcome,
            "seconds": round(seconds, 3),
            "route": asdict(demo.route) if demo.route is not None else None,
            "steps": [{"name": step.name, "title": step.title, "ok": True, **step.facts} for step in demo.steps],
            "counters": demo.counters,
            "access_log": demo.access_log,
            "ports": demo.ports,
            "mesh": str(demo.mesh_file) if demo.mesh_file is not None else None,
        }
        click.echo(json.dumps(document, indent=2))


class _People:
    """Lines and a progress bar; on a terminal with colours."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console: Console = Console(highlight=False, soft_wrap=True)
        fancy = (self._console.encoding or "").lower().startswith("utf")
        self._yes, self._no, self._arrow = ("✓", "✗", "▼") if fancy else ("ok", "FAILED", "v")
        self._line, self._double = ("│", "║") if fancy else ("|", "#")
        self._progress: Progress | None = None
        self._live = False

    def begins(self, title: str, size: int | None = None) -> None:
        if not self._console.is_terminal:
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

        moving = (BarColumn(), TransferSpeedColumn()) if size is not None else (SpinnerColumn(),)
        self._progress = Progress(TextColumn("  {task.description}"), *moving, console=self._console, transient=True)
        self._progress.add_task(title, total=size)
        self._progress.start()

    def moved(self, done: int) -> None:
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=done)

    def ended(self, step: Step) -> None:
        self._end_progress()
        self._say(f"{self._yes} {step.title}: {step.result}", mark="green")

    def route(self, route: Route) -> None:
        how = ", ".join(fact for fact in (route.group, route.cipher) if fact)
        for line in (
            "",
            "    client",
            f"      {self._line} {route.service}, by SOCKS5 or HTTP CONNECT",
            f"      {self._arrow}",
            f"    node a       {route.outbound:<17} {route.source}",
            f"      {self._double} HBONE: HTTP/2 CONNECT {route.application}, in {route.tls_version}",
            f"      {self._double} {how}",
            f"      {self._arrow}",
            f"    node b       {route.inbound:<17} {route.destination}",
            f"      {self._line} TCP",
            f"      {self._arrow}",
            f"    application  {route.application}",
            "",
        ):
            self._say(line)

    def log_line(self, line: str) -> None:
        if self._live:
            self._say(line, style="dim")

    def failed(self, demo: Demo, failure: DemoFailed, seconds: float) -> None:
        self._end_progress()
        self._say(f"{self._no} {failure.step}", mark="red")
        click.echo(f"hbone: the demo failed after {seconds:.1f} s, in step {failure.step!r}: {failure.why}", err=True)

    def succeeded(self, demo: Demo, seconds: float) -> None:
        self._logs(demo)
        self._counters(demo.counters)
        self._say()
        self._say(f"All of it worked, in {seconds:.1f} s.", style="bold")

    def invite(self, demo: Demo) -> None:
        from hbone_cli._demo_steps import HOSTNAME, VIP

        a, b = demo.ports["a"], demo.ports["b"]
        curl = f"curl -x socks5h://127.0.0.1:{a['socks']}"
        self._say()
        self._say("It goes on running. In another terminal, to the application through the mesh:")
        self._say()
        for line in (
            f"{curl} http://{HOSTNAME}/",
            f"{curl} http://{VIP}/",
            f"curl -p -x http://127.0.0.1:{a['http_proxy']} http://{HOSTNAME}/",
            f"{curl} -o /dev/null http://{HOSTNAME}/bytes/1000000000",
            f"{curl} -T {sys.executable} http://{HOSTNAME}/upload    # says its SHA-256",
        ):
            self._say(f"  {line}")
        self._say()
        self._say("What the nodes know and count (a, then b):")
        self._say()
        for node in (a, b):
            self._say(f"  curl localhost:{node['admin']}/config_dump | jq .workloads")
            self._say(f"  curl localhost:{node['stats']}/metrics")
        self._say()
        self._say("The mesh, which may be changed while connections are open:")
        self._say()
        self._say(f"  {demo.mesh_file}")
        self._say()
        self._say("The logs of both nodes follow. Ctrl-C ends it.")
        self._live = True

    def leaves(self) -> None:
        self._live = False
        self._end_progress()  # it has hidden the cursor

    def _logs(self, demo: Demo) -> None:
        for node, lines in demo.access_log.items():
            self._say()
            self._say(f"Access log of {node}:", style="bold")
            shown = [0, *[at for at, line in enumerate(lines) if "error=" in line][:_LOG_ERRORS], len(lines) - 1]
            before = -1
            for at in sorted(set(shown)):
                if at > before + 1:
                    self._say(f"  ... {at - before - 1} more", style="dim")
                self._say(f"  {lines[at].expandtabs(1)}")
                before = at

    def _counters(self, counters: dict[str, dict[str, int]]) -> None:
        self._say()
        self._say(f"{'Counters':<24}" + "".join(f"{node:>16}" for node in counters), style="bold")
        for name in next(iter(counters.values())):
            self._say(f"  {name:<22}" + "".join(f"{values[name]:>16,.0f}" for values in counters.values()))

    def _end_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _say(self, line: str = "", *, style: str | None = None, mark: str | None = None) -> None:
        from rich.text import Text

        text = Text(line, style=style or "")
        if mark is not None:
            text.stylize(mark, 0, line.index(" "))
        self._console.print(text)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end us as Ctrl-C does, so that nothing is left behind. One is enough: we leave in time."""
    ends = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.getsignal(number) for number in ends}

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in ends:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else Interrupted(number)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for_interrupt() -> None:
    try:
        while True:
            signal.pause()
    except KeyboardInterrupt:
        pass
