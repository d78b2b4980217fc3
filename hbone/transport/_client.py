"""`HBONEClient`: one session to one peer, from inside a Python program.

Three entrances, each thin on the next: `HBONEClient.connect` owns everything, `HBONEClient.over_stream` takes your
stream, `open_session` takes your nursery (the pool uses it).
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from hbone.address import Endpoint
from hbone.errors import ConnectFailed, HboneError
from hbone.identity import SpiffeIdentity
from hbone.protocol import Limits
from hbone.tls import PeerPolicy, client_connection, peer_facts
from hbone.transport._background import background_tasks
from hbone.transport._carrier import SocketCarrier, StreamCarrier
from hbone.transport._session import Session
from hbone.transport._tcp import connect_tcp
from hbone.transport._values import Peer, Timeouts

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Iterable

    from hbone.address import Authority, IPAddress
    from hbone.tls import SvidSource
    from hbone.transport._carrier import Carrier
    from hbone.transport._observer import Observer
    from hbone.transport._options import SocketOptions
    from hbone.transport._tunnel import Tunnel
    from hbone.transport._values import SessionStatistics

__all__ = ["HBONE_PORT", "HBONEClient", "expected_peers", "open_session"]

#: The port of HBONE (wire profile, transport).
HBONE_PORT = 15008


def expected_peers(
    expect: PeerPolicy | SpiffeIdentity | str | Iterable[SpiffeIdentity | str] | None, svid: SvidSource
) -> PeerPolicy:
    """What `expect=` means: exact identities, or anybody of our own trust domain when nothing is said.

    Raises:
        InvalidIdentity: a text is not a SPIFFE id.
        ValueError: an empty collection: nobody could ever match.
    """
    if expect is None:
        return PeerPolicy.trust_domain(svid.identity.trust_domain)
    if isinstance(expect, PeerPolicy):
        return expect
    if isinstance(expect, (str, SpiffeIdentity)):
        return PeerPolicy.exact(expect)
    return PeerPolicy.exact(*expect)


async def open_session(
    nursery: trio.Nursery,
    host: str,
    port: int = HBONE_PORT,
    *,
    svid: SvidSource,
    policy: PeerPolicy,
    source_ip: str | IPAddress | None = None,
    limits: Limits | None = None,
    timeouts: Timeouts | None = None,
    observer: Observer | None = None,
    socket_options: SocketOptions | None = None,
) -> Session:
    """Connect, shake hands, wait for the peer's SETTINGS, and leave the session running in `nursery`.

    Raises:
        ConnectFailed: and its subclasses; see `HBONEClient.connect`.
    """
    timeouts = timeouts or Timeouts()
    sock = await connect_tcp(host, port, timeout=timeouts.connect, source_ip=source_ip, options=socket_options)
    try:
        carrier = SocketCarrier(sock, client_connection(svid.current(), policy, sock))
    except BaseException:  # no SVID
        sock.close()
        raise
    return await _start(nursery, carrier, sock, limits or Limits(), timeouts, observer)


async def open_session_over(
    nursery: trio.Nursery,
    stream: trio.abc.Stream,
    *,
    svid: SvidSource,
    policy: PeerPolicy,
    limits: Limits | None = None,
    timeouts: Timeouts | None = None,
    observer: Observer | None = None,
) -> Session:
    """The same over a stream that you have."""
    try:
        carrier = StreamCarrier(stream, client_connection(svid.current(), policy))
    except BaseException:  # no SVID
        await trio.aclose_forcefully(stream)
        raise
    return await _start(nursery, carrier, None, limits or Limits(), timeouts or Timeouts(), observer)


async def shake_hands(
    carrier: Carrier, sock: socket.socket | None, *, client: bool, timeouts: Timeouts, observer: Observer | None
) -> tuple[Peer, Endpoint | None]:
    """The TLS handshake, bounded and told of. Returns the peer and our own end of the socket.

    Raises:
        ConnectFailed: and its subclasses.
    """
    began = trio.current_time()
    try:
        address = local = None
        if sock is not None:
            # Not after the handshake: a server may have judged our certificate and closed by then, and its alert,
            # which says why, is still to be read.
            try:
                address, local = Endpoint.from_sockaddr(sock.getpeername()), Endpoint.from_sockaddr(sock.getsockname())
            except OSError as exc:
                raise ConnectFailed("the peer closed the connection before the TLS handshake") from exc
        with trio.move_on_after(timeouts.handshake) as scope:
            await carrier.handshake()
        if scope.cancelled_caught:
            raise ConnectFailed(f"the TLS handshake did not end within {timeouts.handshake:g} s")
        facts = peer_facts(carrier.connection)
    except HboneError as exc:
        if observer is not None:
            seconds = trio.current_time() - began
            observer.handshake_finished(client=client, seconds=seconds, peer=None, error=exc)
        raise
    peer = Peer(
        identity=facts.identity,
        address=address,
        tls_version=facts.version,
        cipher=facts.cipher,
        group=facts.group,
        chain=facts.chain,
    )
    if observer is not None:
        seconds = trio.current_time() - began
        observer.handshake_finished(client=client, seconds=seconds, peer=peer, error=None)
    return peer, local


async def _start(
    nursery: trio.Nursery,
    carrier: Carrier,
    sock: socket.socket | None,
    limits: Limits,
    timeouts: Timeouts,
    observer: Observer | None,
) -> Session:
    session: Session | None = None
    try:
        peer, local = await shake_hands(carrier, sock, client=True, timeouts=timeouts, observer=observer)
        session = Session(
            carrier, client=True, peer=peer, local_address=local, limits=limits, timeouts=timeouts, observer=observer
        )
        nursery.start_soon(session.run)
        await session.wait_ready()
    except BaseException:
        if session is not None:
            session.kill()
        else:
            carrier.close()
            if isinstance(carrier, StreamCarrier):
                await trio.aclose_forcefully(carrier.stream)
        raise
    return session


class HBONEClient:
    """One session to a peer: TLS 1.3 with identities on both sides, HTTP/2 inside, tunnels in that.

    Get one from `connect` or `over_stream`. Use a `ConnectionPool` for many peers, or when sessions should be replaced
    as they end.
    """

    def __init__(self, session: Session) -> None:
        """Not for you: see `connect`."""
        self._session = session

    def __repr__(self) -> str:
        return f"<HBONEClient {self._session!r}>"

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        host: str,
        port: int = HBONE_PORT,
        *,
        svid: SvidSource,
        expect: PeerPolicy | SpiffeIdentity | str | Iterable[SpiffeIdentity | str] | None = None,
        source_ip: str | IPAddress | None = None,
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
        observer: Observer | None = None,
        socket_options: SocketOptions | None = None,
    ) -> AsyncIterator[HBONEClient]:
        """Open a session over TCP. "Open" means that the peer's SETTINGS have come: it accepted our identity.

        Leaving the block resets the tunnels that are left and says goodbye (GOAWAY, close_notify), within
        `Timeouts.close`. Cancelled: everything is closed at once.

        Args:
            host: IP address or name of the peer.
            port: its HBONE port.
            svid: who we are; an `Svid`, or a source whose newest SVID is used.
            expect: whom we accept: exact identities or a `PeerPolicy`. Default: anybody of our own trust domain.
            source_ip: local address to connect from.
            limits: what the peer may use.
            timeouts: how long each step may take.
            observer: told of what happens.
            socket_options: mark and keep-alive of the connection.

        Raises:
            ConnectFailed: TCP or TLS failed, no HTTP/2 there, or not in time.
            PeerIdentityMismatch: the peer is somebody else.
            IdentityRefused: the peer does not accept us.
            InvalidIdentity: `expect` is not a SPIFFE id.
            CertificateUnavailable: the source has no SVID.
        """
        policy = expected_peers(expect, svid)
        async with background_tasks() as nursery:
            session = await open_session(
                nursery,
                host,
                port,
                svid=svid,
                policy=policy,
                source_ip=source_ip,
                limits=limits,
                timeouts=timeouts,
                observer=observer,
                socket_options=socket_options,
            )
            try:
                yield cls(session)
            finally:
                await session.aclose()

    @classmethod
    @asynccontextmanager
    async def over_stream(
        cls,
        stream: trio.abc.Stream,
        *,
        svid: SvidSource,
        expect: PeerPolicy | SpiffeIdentity | str | Iterable[SpiffeIdentity | str] | None = None,
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
        observer: Observer | None = None,
    ) -> AsyncIterator[HBONEClient]:
        """Open a session over any trio stream: a tunnel of another session (double HBONE), or memory in a test.

        The stream belongs to the session from now on and is closed with it, also when this fails; only an `expect` that
        is none (`InvalidIdentity`) leaves it to you. Arguments, errors and the end are those of `connect`.
        """
        policy = expected_peers(expect, svid)
        async with background_tasks() as nursery:
            session = await open_session_over(
                nursery, stream, svid=svid, policy=policy, limits=limits, timeouts=timeouts, observer=observer
            )
            try:
                yield cls(session)
            finally:
                await session.aclose()

    @property
    def peer(self) -> Peer:
        """Whom the session was opened with."""
        return self._session.peer

    @property
    def closed(self) -> bool:
        """Whether the session has ended."""
        return self._session.closed

    @property
    def draining(self) -> bool:
        """Whether the peer wants no new tunnels (GOAWAY); those there are go on."""
        return self._session.draining

    def statistics(self) -> SessionStatistics:
        """A snapshot of the session."""
        return self._session.statistics()

    async def open_tunnel(
        self, target: Authority | str, *, headers: Iterable[tuple[str | bytes, str | bytes]] = ()
    ) -> Tunnel:
        """Ask the peer for a tunnel: CONNECT, and wait for its answer (wire profile, CONNECT and statuses).

        Args:
            target: ``"10.0.0.7:8080"``, ``"[::1]:80"`` or ``"name.ns.svc.cluster.local:80"``: the `:authority`.
            headers: further headers in order; names are made lower-case.

        Returns:
            An open tunnel: the peer's policy allowed it, and the peer has connected to the target. Close it.

        Raises:
            PolicyDenied: 401 or 403.
            BadTarget: 400.
            Unreachable: 503.
            TunnelRefused: any other status but 2xx.
            StreamRefused: the peer did not process the request; safe to try on another session.
            ConnectFailed: no answer within `Timeouts.request`.
            SessionClosed: the session ended before the answer.
            TunnelReset: the peer reset the request.
            LocalProtocolError: as many tunnels are open as the peer allows.
            InvalidAddress: `target` is not of one of these forms.

        Cancelled: the request is reset; the session and its other tunnels are unharmed.
        """
        return await self._session.open_tunnel(target, headers=headers)

    async def aclose(self) -> None:
        """End the session now: reset its tunnels and say goodbye, within `Timeouts.close`. Cancelled: at once."""
        await self._session.aclose()
