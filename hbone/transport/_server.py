"""`HBONEServer`: accepts sessions, and calls your handler once for each CONNECT.

The handler decides before any tunnel exists: `TunnelRequest.accept`, or raise `RequestRejected`. Handlers run beside
the session, so a stalled one stalls nobody; as long as it has not accepted, it is cancelled when its request goes
away.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import trio

from hbone.address import Endpoint
from hbone.errors import ConnectFailed, HboneError, RequestRejected, SessionClosed, TunnelReset
from hbone.protocol import ConnectResponse, ErrorCode, Limits
from hbone.tls import PeerPolicy, server_connection
from hbone.transport._carrier import SocketCarrier, StreamCarrier
from hbone.transport._client import HBONE_PORT, shake_hands
from hbone.transport._options import SocketOptions
from hbone.transport._session import Session
from hbone.transport._tcp import accept_from, listen_tcp
from hbone.transport._values import Timeouts

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Iterable

    from hbone.address import Authority
    from hbone.identity import SpiffeIdentity
    from hbone.protocol import ConnectRequest
    from hbone.tls import Svid, SvidSource
    from hbone.transport._carrier import Carrier
    from hbone.transport._observer import Observer
    from hbone.transport._tunnel import Tunnel
    from hbone.transport._values import Peer, TunnelStatistics

__all__ = ["HBONEServer", "ServerStatistics", "TunnelRequest"]

_log: Final = logging.getLogger("hbone")

#: Seconds between two lines about connections that we have no SVID for.
_TELL_AGAIN: Final = 1.0

#: A half-open connection older than this makes room for a new one when there are too many.
_STALLED: Final = 0.5


class TunnelRequest:
    """One CONNECT, and the one who asks. Accept it, or raise `RequestRejected`."""

    __slots__ = ("_answered", "_scope", "_session", "_tunnel")

    def __init__(self, session: Session, tunnel: Tunnel) -> None:
        """Not for you: the server makes it."""
        self._session = session
        self._tunnel = tunnel
        self._answered = False
        self._scope: trio.CancelScope | None = None

    def __repr__(self) -> str:
        return f"<TunnelRequest {self._tunnel.request.authority} from {self.peer.identity}>"

    @property
    def peer(self) -> Peer:
        """Who asks, as its certificate proves."""
        return self._session.peer

    @property
    def target(self) -> Authority:
        """What for: the parsed `:authority`."""
        return self._tunnel.request.target

    @property
    def headers(self) -> ConnectRequest:
        """The request's headers: raw, and parsed (`.baggage`, `.forwarded`, `.traceparent`). Said, not proven."""
        return self._tunnel.request

    @property
    def local_address(self) -> Endpoint | None:
        """The address that the peer dialled; None when the session does not run on a socket."""
        return self._session.local_address

    @property
    def local_identity(self) -> SpiffeIdentity | None:
        """Who we proved to be when its session was opened."""
        return self._session.local_identity

    def tunnel_statistics(self) -> TunnelStatistics:
        """A snapshot of its tunnel, also before it is accepted."""
        return self._tunnel.statistics()

    def received_and_sent(self) -> tuple[int, int]:
        """Bytes of its tunnel so far: from the peer, and to it."""
        return self._tunnel.bytes_received, self._tunnel.bytes_sent

    def abort(self, error_code: ErrorCode = ErrorCode.CANCEL) -> None:
        """Reset it, accepted or not; harmless when it is over. Whoever uses its tunnel sees it broken."""
        if self._tunnel.stream.open:
            self._tunnel.abort(error_code)

    @property
    def answered(self) -> bool:
        """Whether it was accepted or rejected, or is gone."""
        return self._answered or not self._tunnel.stream.open

    async def accept(self, *, headers: Iterable[tuple[str | bytes, str | bytes]] = ()) -> Tunnel:
        """Send 200 and get the tunnel.

        Send it only when what the peer asked for works: after policy, and after the connection to the target stands.

        Args:
            headers: further response headers (`baggage`).

        Raises:
            trio.BrokenResourceError: the peer has taken the request back, or the session has ended.
            RuntimeError: it was answered before.
        """
        self._check_unanswered()
        response = ConnectResponse.build(200, headers)
        await trio.lowlevel.checkpoint()
        return self.accept_nowait(response)

    def accept_nowait(self, response: ConnectResponse) -> Tunnel:
        """`accept` without the checkpoint, with a response that was made before."""
        self._check_unanswered()
        tunnel, session = self._tunnel, self._session
        self._answered = True
        tunnel.response = response
        tunnel.established = True
        session.engine.accept(tunnel.stream.id, response.headers)
        session.tunnels_opened += 1
        session.tell("tunnel_opened", tunnel)
        session.flush()
        return tunnel

    async def reject(self, status: int, *, reason: str = "") -> None:
        """Refuse it. The same as raising `RequestRejected` in the handler.

        Args:
            status: 400 to 599; the profile uses 400 (not served here), 401 (policy), 503 (cannot be reached).
            reason: for observers; not sent.

        Raises:
            RuntimeError: it was answered before.
        """
        if self._answered:
            raise RuntimeError("this request was answered")
        self.reject_nowait(status, reason)
        await trio.lowlevel.checkpoint()

    def reject_nowait(self, status: int, reason: str) -> None:
        """`reject` without the checkpoint; does nothing when the request is gone."""
        if self.answered:
            return
        self._answered = True
        tunnel, session = self._tunnel, self._session
        tunnel.on_gone = None  # the handler may go on after its answer
        session.engine.refuse(tunnel.stream.id, status)
        session.tunnels_refused += 1
        session.tell("tunnel_refused", session, tunnel.request.authority, status, reason)
        session.flush()
        session.forget(tunnel, None)

    def _check_unanswered(self) -> None:
        if self._answered:
            raise RuntimeError("this request was answered")
        if not self._tunnel.stream.open:
            raise trio.BrokenResourceError("the request is gone") from self._tunnel.reset_error


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatistics:
    """What a server has now, and has had."""

    sessions: int
    tunnels: int
    half_open: int
    """Connections whose TLS handshake or HTTP/2 opening is under way."""
    accepted: int
    """Sessions opened since the start."""
    failed: int
    """Connections that never became a session."""
    evicted: int
    """Half-open connections given up because too many came."""


class HBONEServer:
    """Terminates HBONE: TLS 1.3 with client certificates, HTTP/2, CONNECT.

    Unknown peers get nothing: without `accept` only identities of our own trust domain come in, and without a
    handler that accepts there is no tunnel.
    """

    def __init__(
        self,
        svid: SvidSource | Callable[[Endpoint | None], SvidSource],
        handler: Callable[[TunnelRequest], Awaitable[Any]],
        *,
        accept: PeerPolicy | None = None,
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
        observer: Observer | None = None,
        max_sessions: int = 4096,
        max_half_open: int = 128,
        socket_options: SocketOptions | None = None,
    ) -> None:
        """
        Args:
            svid: who we are; an `Svid`, or a source whose newest SVID is used for each new session. Or a function that
                says who we are for each new session, from the address that the peer dialled (None when the session
                does not run on a socket); when it or its source raises `CertificateUnavailable`, the connection is
                closed.
            handler: called for each request. What it raises refuses the request: `RequestRejected` with its status,
                anything else with 503, and is logged. A tunnel that is left open when it returns is reset.
            accept: which peers may open sessions. Default: any identity of our own trust domain.
            limits: what each session may use.
            timeouts: how long each step may take.
            observer: told of what happens.
            max_sessions: sessions at once; more are closed right after TCP accept.
            max_half_open: connections in the handshake at once; then the oldest stalled one makes room.
            socket_options: mark of the listener, keep-alive of what it accepts.
        """
        self._svid = svid
        self._socket_options = socket_options or SocketOptions()
        self._handler = handler
        self._policy = accept
        self._limits = limits or Limits()
        self._timeouts = timeouts or Timeouts()
        self._observer = observer
        self._max_sessions = max_sessions
        self._max_half_open = max_half_open
        self._sessions: set[Session] = set()
        self._half_open: dict[trio.CancelScope, float] = {}
        self._room = trio.Event()
        self._listening: set[trio.CancelScope] = set()
        self._draining = False
        self._nobody = trio.Event()
        self._accepted = self._failed = self._evicted = 0
        self._told = -math.inf
        self._untold = 0

    def __repr__(self) -> str:
        whose = "by address" if callable(self._svid) else self._svid.identity
        return f"<HBONEServer {whose} sessions={len(self._sessions)}>"

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The live sessions."""
        return tuple(self._sessions)

    def statistics(self) -> ServerStatistics:
        """A snapshot."""
        return ServerStatistics(
            sessions=len(self._sessions),
            tunnels=sum(s.open_streams for s in self._sessions),
            half_open=len(self._half_open),
            accepted=self._accepted,
            failed=self._failed,
            evicted=self._evicted,
        )

    # === entrances ===

    async def serve(
        self,
        host: str,
        port: int = HBONE_PORT,
        *,
        task_status: trio.TaskStatus[Endpoint] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen and serve until `drain` or cancelled. ``await nursery.start(...)`` gives the bound `Endpoint`.

        Args:
            host: IP address to listen on.
            port: 0 for a free one.
            task_status: for `nursery.start`.

        Raises:
            OSError: it cannot listen there.
        """
        listener = listen_tcp(host, port, options=self._socket_options)
        await self.serve_listener(listener, task_status=task_status)

    async def serve_listener(
        self, listener: socket.socket, *, task_status: trio.TaskStatus[Endpoint] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve on a listening, non-blocking socket of yours, which is closed in the end."""
        try:
            async with trio.open_nursery() as nursery:
                with trio.CancelScope() as scope:
                    self._listening.add(scope)
                    if self._draining:
                        scope.cancel()
                    task_status.started(Endpoint.from_sockaddr(listener.getsockname()))
                    await self._accept(listener, nursery)
                trio.lowlevel.notify_closing(listener)
                listener.close()
        finally:
            self._listening.discard(scope)
            listener.close()

    async def serve_stream(self, stream: trio.abc.Stream) -> None:
        """Serve one session over a stream of yours, which is closed in the end: a tunnel in a tunnel, or memory.

        Returns when the session and its handlers have ended, however that came; raises nothing but cancellation.
        """
        async with trio.open_nursery() as nursery:
            try:
                svid, policy = self._who(None)
                carrier = StreamCarrier(stream, server_connection(svid, policy))
            except HboneError as exc:
                self._refused(exc)
                await trio.aclose_forcefully(stream)
                return
            await self._serve_session(carrier, None, nursery, self._begin_half_open(), svid.identity)

    async def drain(self, deadline: float) -> None:
        """Stop: close the listeners, tell the peers to go elsewhere (GOAWAY), let tunnels finish, then end.

        Requests that still come are refused with REFUSED_STREAM, so that peers retry elsewhere.

        Args:
            deadline: seconds that tunnels get to finish.
        """
        self._draining = True
        for scope in self._listening:
            scope.cancel()
        for half_open in list(self._half_open):
            half_open.cancel()
        for session in self.sessions:
            session.begin_drain()
        with trio.move_on_after(deadline):
            while self._sessions or self._half_open:
                self._nobody = trio.Event()
                await self._nobody.wait()
        async with trio.open_nursery() as nursery:
            for session in self.sessions:
                nursery.start_soon(session.aclose)

    # === accepting ===

    async def _accept(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        def handle(sock: socket.socket) -> None:
            if len(self._sessions) >= self._max_sessions:
                self._failed += 1
                sock.close()
            else:
                # Counted here and not in the task: a full backlog is accepted before any task has run.
                nursery.start_soon(self._serve_socket, sock, nursery, self._begin_half_open())

        def room() -> Callable[[], Awaitable[None]] | None:
            return self._make_room if len(self._half_open) >= self._max_half_open else None

        await accept_from(listener, handle, room=room, options=self._socket_options)

    async def _make_room(self) -> None:
        """Too many half-open connections. The oldest goes if it has stalled, otherwise wait until it ends or does."""
        oldest, since = next(iter(self._half_open.items()))
        patience = since + _STALLED - trio.current_time()
        if patience <= 0:
            del self._half_open[oldest]
            self._evicted += 1
            oldest.cancel()
            return
        self._room = trio.Event()
        with trio.move_on_after(patience):
            await self._room.wait()

    def _begin_half_open(self) -> trio.CancelScope:
        scope = trio.CancelScope()
        self._half_open[scope] = trio.current_time()
        if self._draining:  # it was accepted in the very moment in which that began
            scope.cancel()
        return scope

    def _end_half_open(self, scope: trio.CancelScope) -> None:
        self._half_open.pop(scope, None)
        self._room.set()
        self._look_for_nobody()

    def _look_for_nobody(self) -> None:
        if not self._sessions and not self._half_open:
            self._nobody.set()

    async def _serve_socket(self, sock: socket.socket, nursery: trio.Nursery, scope: trio.CancelScope) -> None:
        try:
            svid, policy = self._who(sock)
            carrier = SocketCarrier(sock, server_connection(svid, policy, sock))
        except (HboneError, OSError) as exc:
            self._failed += 1
            self._end_half_open(scope)
            self._refused(exc)
            sock.close()
            return
        await self._serve_session(carrier, sock, nursery, scope, svid.identity)

    def _who(self, sock: socket.socket | None) -> tuple[Svid, PeerPolicy]:
        source = self._svid
        if callable(source):
            dialled = None if sock is None else Endpoint.from_sockaddr(sock.getsockname())
            try:
                source = source(dialled)
            except HboneError:
                raise
            except Exception as exc:
                raise ConnectFailed(f"the choice of an SVID for {dialled or 'a stream'} failed: {exc!r}") from exc
        policy = self._policy or PeerPolicy.trust_domain(source.identity.trust_domain)
        return source.current(), policy

    def _refused(self, exc: Exception) -> None:
        """Whoever connects can make us say this."""
        now = trio.current_time()
        if now < self._told + _TELL_AGAIN:
            self._untold += 1
            return
        if self._untold:
            _log.warning("no session: %s (and %d more since the last such line)", exc, self._untold)
        else:
            _log.warning("no session: %s", exc)
        self._told, self._untold = now, 0

    async def _serve_session(
        self,
        carrier: Carrier,
        sock: socket.socket | None,
        nursery: trio.Nursery,
        scope: trio.CancelScope,
        identity: SpiffeIdentity,
    ) -> None:
        session = await self._open(carrier, sock, nursery, scope)
        if session is None:
            return
        session.local_identity = identity
        self._sessions.add(session)
        if self._draining:  # its handshake ended in the very moment in which that began, too late to be cancelled
            session.begin_drain()
        try:
            await session.run()
        finally:
            self._sessions.discard(session)
            self._look_for_nobody()

    async def _open(
        self, carrier: Carrier, sock: socket.socket | None, nursery: trio.Nursery, scope: trio.CancelScope
    ) -> Session | None:
        """The TLS handshake, under every bound. None when it came to nothing; the connection is closed then."""
        session: Session | None = None
        where = carrier_name(sock)  # now: it may be gone when there is something to say of it
        try:
            with scope:
                peer, local = await shake_hands(
                    carrier, sock, client=False, timeouts=self._timeouts, observer=self._observer
                )

                def on_request(session: Session, tunnel: Tunnel) -> None:
                    request = TunnelRequest(session, tunnel)
                    nursery.start_soon(self._handle, request)

                session = Session(
                    carrier,
                    client=False,
                    peer=peer,
                    local_address=local,
                    limits=self._limits,
                    timeouts=self._timeouts,
                    observer=self._observer,
                    on_request=on_request,
                )
                self._accepted += 1
        except HboneError as exc:
            _log.info("no session with %s: %s", where, exc)
        finally:
            self._end_half_open(scope)
            if session is None:
                self._failed += 1
                carrier.close()
                if isinstance(carrier, StreamCarrier):
                    with trio.CancelScope(shield=True):
                        await trio.aclose_forcefully(carrier.stream)
        return session

    # === handling ===

    async def _handle(self, request: TunnelRequest) -> None:
        tunnel = request._tunnel  # noqa: SLF001 - made for each other
        error: Exception | None = None
        with trio.CancelScope() as scope:
            tunnel.on_gone = scope.cancel
            try:
                if not tunnel.stream.open:
                    return
                await self._handler(request)
            except RequestRejected as exc:
                request.reject_nowait(exc.status, exc.reason or exc.flag or "")
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                error = exc
                cause = exc.__cause__
                if not isinstance(cause, (TunnelReset, SessionClosed)) and tunnel.stream.open:
                    _log.exception("the handler of %r failed", request)
            except Exception as exc:  # noqa: BLE001 - a handler's failure is its request's, not the server's
                error = exc
                _log.exception("the handler of %r failed", request)
            finally:
                tunnel.on_gone = None
                if not request.answered:
                    request.reject_nowait(503, f"the handler {'failed' if error else 'did not answer'}")
                elif tunnel.stream.open:
                    tunnel.abort(ErrorCode.INTERNAL_ERROR if error is not None else ErrorCode.CANCEL)


def carrier_name(sock: socket.socket | None) -> str:
    """Where a connection comes from, for a log line."""
    if sock is None:
        return "a stream"
    try:
        return str(Endpoint.from_sockaddr(sock.getpeername()))
    except OSError:
        return "a peer that is gone"
