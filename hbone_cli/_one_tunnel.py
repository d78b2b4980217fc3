"""The work of ``hbone connect``: a session, a tunnel on it, and standard input and output at its other end."""

from __future__ import annotations

import signal
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

import trio

import hbone
from hbone.transport import resolve
from hbone_cli._errors import BrokenTunnel, Interrupted, NoSession, NoTunnel
from hbone_cli._life import stop_signals
from hbone_cli._stdio import StandardStreams

if TYPE_CHECKING:
    from hbone_cli._output import Reporter

__all__ = ["run_tunnel"]

#: A slow line needs time for the last bytes of an upload, and who waits for the end of a pipe would rather have them.
_TIMEOUTS: Final = hbone.Timeouts(close=10.0)


def run_tunnel(
    svid: hbone.Svid,
    target: hbone.Authority,
    via: hbone.Authority | hbone.Endpoint | None,
    expect: hbone.PeerPolicy | None,
    reporter: Reporter | None,
) -> None:
    """Carry bytes until both directions have ended.

    Raises:
        ConnectFailed: there is no session.
        NoTunnel: there is no tunnel on it.
        BrokenTunnel: it broke under way.
        Interrupted: by a signal.
    """
    trio.run(_run, svid, target, via, expect, reporter)


async def _run(
    svid: hbone.Svid,
    target: hbone.Authority,
    via: hbone.Authority | hbone.Endpoint | None,
    expect: hbone.PeerPolicy | None,
    reporter: Reporter | None,
) -> None:
    stopped: list[int] = []
    with trio.open_signal_receiver(*stop_signals(hang_up=True)) as signals:
        async with trio.open_nursery() as nursery:

            async def stop_on_signal() -> None:
                stopped.append(await anext(signals))
                nursery.cancel_scope.cancel()

            nursery.start_soon(stop_on_signal)
            await _carry(svid, target, via, expect, reporter)
            nursery.cancel_scope.cancel()
    if stopped:
        raise Interrupted(stopped[0])


class _EndOfTunnel(hbone.BaseObserver):
    """Hears of a reset also when nobody reads from the tunnel any more, because its direction has ended.

    Until then the reader sees it, behind what came before it.
    """

    def __init__(self) -> None:
        self.error: hbone.HboneError | None = None
        self.scope = trio.CancelScope()
        self._all_received = False

    def tunnel_closed(self, tunnel: hbone.Tunnel, error: hbone.HboneError | None) -> None:
        self.error = error
        self._look()

    def all_received(self) -> None:
        """The tunnel's direction to us has ended, and all of it is written."""
        self._all_received = True
        self._look()

    def _look(self) -> None:
        if self._all_received and self.error is not None:
            self.scope.cancel()


async def _carry(
    svid: hbone.Svid,
    target: hbone.Authority,
    via: hbone.Authority | hbone.Endpoint | None,
    expect: hbone.PeerPolicy | None,
    reporter: Reporter | None,
) -> None:
    end = _EndOfTunnel()
    hop = via if via is not None else hbone.Authority(target.host, hbone.HBONE_PORT)
    host = hop.host if isinstance(hop, hbone.Authority) else str(hop.ip)
    async with AsyncExitStack() as stack:
        connecting = hbone.HBONEClient.connect(
            host, hop.port, svid=svid, expect=expect, timeouts=_TIMEOUTS, observer=end
        )
        try:
            targets = await resolve(target) if via is not None else (target,)
            client = await stack.enter_async_context(connecting)
        except hbone.HboneError as error:
            raise NoSession(str(hop)) from error
        try:
            tunnel = await _open(client, targets)
        except hbone.HboneError as error:
            raise NoTunnel from error
        if reporter is not None:
            peer = client.peer
            how = f"{peer.tls_version}, {peer.group}, {peer.cipher}"
            text = f"tunnel to {target} by {peer.identity} at {peer.address}: {how}"
            reporter.event("tunnel", text, target=target, peer=peer.identity, address=peer.address)
        streams = StandardStreams(None if sys.stdin is None else 0, 1, on_output_end=end.all_received)
        result = None
        with end.scope:
            result = await hbone.relay(streams, tunnel)
        if streams.failure is not None:
            raise _local_failure(streams.failure) from streams.failure
        broken = end.error or (result.error if result is not None else None)
        if broken is not None:
            raise BrokenTunnel from _root(broken)
        await tunnel.session.wait_uncongested()


async def _open(client: hbone.HBONEClient, targets: tuple[hbone.Authority, ...]) -> hbone.Tunnel:
    """A tunnel to the first of the targets that the node serves. It serves addresses: never ask for a name."""
    first: hbone.TunnelRefused | None = None
    for target in targets:
        if target.ip is None and client.peer.address is not None:  # the name led us here
            target = hbone.Authority(str(client.peer.address.ip).partition("%")[0], target.port)
        try:
            return await client.open_tunnel(target)
        except (hbone.BadTarget, hbone.Unreachable) as error:
            first = first or error
    assert first is not None
    raise first


def _local_failure(failure: OSError) -> Exception:
    if isinstance(failure, BrokenPipeError):  # as a program that had not asked for an error instead of SIGPIPE
        return Interrupted(signal.SIGPIPE)
    return BrokenTunnel()


def _root(error: Exception) -> Exception:
    """Streams break with trio's exceptions, whose causes say why."""
    cause = error.__cause__
    return cause if isinstance(error, trio.BrokenResourceError) and isinstance(cause, Exception) else error
