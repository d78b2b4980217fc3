"""`Mesh`: servers and pairs of proxies that run beside a test, which need not know trio."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self, TypeAlias

import trio

from hbone.certs import LocalCA
from hbone.identity import SpiffeIdentity
from hbone.proxy import InboundProxy, OutboundProxy
from hbone.telemetry import AccessLog
from hbone.testing._background import Background
from hbone.testing._identities import identity_of, pattern_of
from hbone.testing._requests import Recorder, authority_of
from hbone.tls import PeerPolicy
from hbone.transport import FixedTarget, HBONEServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from types import TracebackType

    from hbone.address import Authority, Endpoint
    from hbone.identity import IdentityPattern
    from hbone.protocol import Limits
    from hbone.telemetry import AccessRecord
    from hbone.testing._requests import AppAddress, Handler, ReceivedRequest
    from hbone.tls import Svid, SvidSource
    from hbone.transport import PoolStatistics, ServerStatistics, Timeouts

__all__ = ["Mesh", "MeshPair", "MeshServer", "PairStatistics", "Who"]

Who: TypeAlias = "str | SpiffeIdentity | SvidSource"
"""A SPIFFE id or ``"namespace/service-account"``, for which the mesh's CA issues; or an SVID of your own."""

_LOOPBACK = "127.0.0.1"


class Mesh:
    """A CA, and a thread in which servers and proxies run, as a ``with`` block. Nothing of it is left behind.

    Its methods block for milliseconds; call them from a plain test, or from a trio one.

    Args:
        ca: who issues; a new one in memory when None.
    """

    def __init__(self, ca: LocalCA | None = None) -> None:
        self.ca: LocalCA = ca if ca is not None else LocalCA.in_memory()
        self._background = Background()

    def __enter__(self) -> Self:
        self._background.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop everything.

        Raises:
            BackgroundError: a server, a proxy or a handler of yours has failed, and nobody was told yet.
        """
        self._background.__exit__(kind, problem, traceback)

    def svid(self, who: str | SpiffeIdentity) -> Svid:
        """A new SVID.

        Args:
            who: a SPIFFE id of the CA's trust domain, or ``"namespace/service-account"``.

        Raises:
            InvalidIdentity: it is neither.
        """
        return self.ca.issue(identity_of(who, self.ca.trust_domain))

    def server(
        self,
        handler: Handler = "echo",
        *,
        identity: Who = "test/server",
        accept: PeerPolicy | None = None,
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
    ) -> MeshServer:
        """Start an `HBONEServer` on a free port of 127.0.0.1.

        Args:
            handler: ``"echo"``, ``"sink"``, ``"forward"`` or one of yours. What yours raises, but for refusals, is
                raised at the end of the mesh.
            identity: who it is.
            accept: who may open sessions; anybody of its trust domain when None.
            limits: what each session may use.
            timeouts: how long each step may take.
        """
        svid = self._source(identity)
        recorder = Recorder(handler, self._background.note_failure)
        server = HBONEServer(svid, recorder, accept=accept, limits=limits, timeouts=timeouts, observer=recorder)
        endpoint = self._background.start(server.serve, _LOOPBACK, 0)
        return MeshServer(self._background, server, recorder, svid, endpoint)

    def pair(
        self,
        app: AppAddress,
        *,
        client: Who = "test/client",
        server: Who = "test/server",
        allow_peers: Iterable[IdentityPattern | SpiffeIdentity | str] | None = None,
        expect: Iterable[SpiffeIdentity | str] | None = None,
    ) -> MeshPair:
        """Start two proxies around an application: what connects to `MeshPair.address` arrives at `app`.

        ::

            test ── TCP ──▶ outbound proxy ══ HBONE, mutual TLS ══▶ inbound proxy ── TCP ──▶ app

        Args:
            app: where the application listens: a port of 127.0.0.1, ``"host:port"``, or what `socket.getsockname`
                gives. It is connected to for each connection; it may start later.
            client: who the outbound proxy is.
            server: who the inbound proxy is.
            allow_peers: whom the inbound proxy lets through (others get status 401): identities or patterns, also
                ``"namespace/*"``; everybody of the trust domain when None.
            expect: whom the outbound proxy takes for the other side; just `server` when None.
        """
        domain = self.ca.trust_domain
        ours, theirs = self._source(client), self._source(server)
        expected = [theirs.identity] if expect is None else [identity_of(peer, domain) for peer in expect]
        log = _Records()
        inbound = InboundProxy(
            theirs,
            FixedTarget(authority_of(app)),
            peers=None if allow_peers is None else [pattern_of(peer, domain) for peer in allow_peers],
            access_log=log,
        )
        make_outbound = partial(OutboundProxy, ours, expect=PeerPolicy.exact(*expected), access_log=log)
        outbound, ports = self._background.start(_serve_pair, inbound, make_outbound, authority_of(app))
        return MeshPair(self._background, ours.identity, theirs.identity, inbound, outbound, ports, log)

    def check(self) -> None:
        """Do nothing if nothing in the background has failed.

        Raises:
            BackgroundError: something has.
        """
        self._background.check()

    def _source(self, who: Who) -> SvidSource:
        return self.svid(who) if isinstance(who, (str, SpiffeIdentity)) else who


class MeshServer:
    """An `HBONEServer` that runs in the background. Made by `Mesh.server`.

    Attributes:
        svid: who it is.
        address: where it listens, as ``(host, port)``.
    """

    def __init__(
        self, background: Background, server: HBONEServer, recorder: Recorder, svid: SvidSource, endpoint: Endpoint
    ) -> None:
        self.svid = svid
        self.address: tuple[str, int] = (str(endpoint.ip), endpoint.port)
        self._background = background
        self._server = server
        self._recorder = recorder

    @property
    def identity(self) -> SpiffeIdentity:
        """Who it is: what a client should expect."""
        return self.svid.identity

    @property
    def requests(self) -> tuple[ReceivedRequest, ...]:
        """What it was asked for so far, in order."""
        return tuple(self._recorder.requests)

    def wait_for_requests(self, count: int = 1, *, timeout: float = 30.0) -> tuple[ReceivedRequest, ...]:
        """Wait until it is done with so many requests; gives all of them.

        It blocks. From a trio test call it with `trio.to_thread.run_sync`, unless the requests have all ended.

        Raises:
            TimeoutError: they are not there in `timeout` seconds.
        """
        if not self._background.run(_within, timeout, self._recorder.wait_done, count):
            raise TimeoutError(f"not {count} requests were done within {timeout:g} s, only {self.requests}")
        return self.requests

    def statistics(self) -> ServerStatistics:
        """A snapshot."""
        return self._background.run_sync(self._server.statistics)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairStatistics:
    """Both proxies of a pair, now."""

    outbound: PoolStatistics
    inbound: ServerStatistics


class MeshPair:
    """Two proxies around an application. Made by `Mesh.pair`.

    Attributes:
        client: who the outbound proxy is.
        server: who the inbound proxy is.
        address: connect here, in plain TCP: ``(host, port)``.
        url: the same as ``http://host:port``.
        http_proxy: for clients that take a proxy: ``http://host:port``. Whatever they ask for, they reach the
            application. It does CONNECT only, which is what clients use for ``https://``.
        socks: the same as ``socks5h://host:port``.
        hbone_address: where the inbound proxy speaks HBONE, for a client of your own: ``(host, port)``.
    """

    def __init__(
        self,
        background: Background,
        client: SpiffeIdentity,
        server: SpiffeIdentity,
        inbound: InboundProxy,
        outbound: OutboundProxy,
        ports: _Ports,
        log: _Records,
    ) -> None:
        """Not for you: see `Mesh.pair`."""
        self.client = client
        self.server = server
        self.address: tuple[str, int] = (_LOOPBACK, ports.forward)
        self.url: str = f"http://{_LOOPBACK}:{ports.forward}"
        self.http_proxy: str = f"http://{_LOOPBACK}:{ports.http_proxy}"
        self.socks: str = f"socks5h://{_LOOPBACK}:{ports.socks}"
        self.hbone_address: tuple[str, int] = (_LOOPBACK, ports.hbone)
        self._background = background
        self._inbound = inbound
        self._outbound = outbound
        self._log = log

    @property
    def access_log(self) -> tuple[AccessRecord, ...]:
        """What both proxies have logged: for each connection that has ended one record each, inbound before outbound
        or after it.
        """
        return tuple(self._log.records)

    def wait_for_access_log(self, count: int = 2, *, timeout: float = 30.0) -> tuple[AccessRecord, ...]:
        """Wait until the proxies have logged so many records (two a connection); gives all of them.

        It blocks. From a trio test call it with `trio.to_thread.run_sync`, unless the connections have all ended.

        Raises:
            TimeoutError: they are not there in `timeout` seconds.
        """
        if not self._background.run(_within, timeout, self._log.wait_for, count):
            raise TimeoutError(f"not {count} records were logged within {timeout:g} s, only {self.access_log}")
        return self.access_log

    def statistics(self) -> PairStatistics:
        """A snapshot."""
        return PairStatistics(
            outbound=self._background.run_sync(self._outbound.statistics),
            inbound=self._background.run_sync(self._inbound.server.statistics),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ports:
    """Where one of the pair of proxies is to be reached."""

    hbone: int
    forward: int
    http_proxy: int
    socks: int


async def _serve_pair(
    inbound: InboundProxy,
    make_outbound: Callable[..., OutboundProxy],
    target: Authority,
    *,
    task_status: trio.TaskStatus[tuple[OutboundProxy, _Ports]],
) -> None:
    async with trio.open_nursery() as nursery:
        hbone: Endpoint = await nursery.start(inbound.serve, _LOOPBACK, 0)
        async with make_outbound(via=hbone) as outbound, trio.open_nursery() as ways:
            forward: Endpoint = await ways.start(outbound.serve_forward, _LOOPBACK, 0, target)
            proxy: Endpoint = await ways.start(outbound.serve_http_connect, _LOOPBACK, 0)
            socks: Endpoint = await ways.start(outbound.serve_socks, _LOOPBACK, 0)
            ports = _Ports(hbone=hbone.port, forward=forward.port, http_proxy=proxy.port, socks=socks.port)
            task_status.started((outbound, ports))


class _Records(AccessLog):
    """An access log that keeps the records."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.records: list[AccessRecord] = []
        self._change = trio.Event()

    def write(self, record: AccessRecord) -> None:
        """Keep it, and tell who waits."""
        self.records.append(record)
        self._change.set()
        self._change = trio.Event()

    async def wait_for(self, count: int) -> None:
        """Wait until there are this many."""
        while len(self.records) < count:
            await self._change.wait()


async def _within(timeout: float, wait: Callable[[int], Awaitable[None]], count: int) -> bool:
    with trio.move_on_after(timeout):
        await wait(count)
        return True
    return False
