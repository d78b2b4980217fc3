"""A client and a server on one session through memory: no port, no thread, any clock."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio
import trio.testing

from hbone.certs import LocalCA
from hbone.identity import SpiffeIdentity
from hbone.testing._identities import identity_of
from hbone.testing._requests import Recorder
from hbone.transport import HBONEClient, HBONEServer
from hbone.transport._background import background_tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hbone.protocol import Limits
    from hbone.testing._mesh import Who
    from hbone.testing._requests import Handler, ReceivedRequest
    from hbone.tls import SvidSource
    from hbone.transport import Timeouts

__all__ = ["MemorySession", "memory_session"]


@dataclass(frozen=True, slots=True)
class MemorySession:
    """Both ends of a session."""

    client: HBONEClient
    server: HBONEServer
    recorder: Recorder

    @property
    def requests(self) -> tuple[ReceivedRequest, ...]:
        """What the server was asked for so far, in order."""
        return tuple(self.recorder.requests)


@asynccontextmanager
async def memory_session(
    handler: Handler = "echo",
    *,
    ca: LocalCA | None = None,
    client: Who = "test/client",
    server: Who = "test/server",
    limits: Limits | None = None,
    timeouts: Timeouts | None = None,
) -> AsyncIterator[MemorySession]:
    """A session between an `HBONEClient` and an `HBONEServer`, with real TLS, over trio's memory streams.

    Args:
        handler: ``"echo"``, ``"sink"``, ``"forward"`` or one of yours. What yours raises, but for refusals, is
            raised at the end of the block.
        ca: who issues; a new one when None.
        client: a SPIFFE id or ``"namespace/service-account"``, or an SVID of your own.
        server: the same; the client expects just this one.
        limits: what the session may use, for both.
        timeouts: how long each step may take, for both.

    Raises:
        ConnectFailed: and its subclasses, when they do not accept each other; see `hbone.HBONEClient.connect`.
    """
    issuer = ca if ca is not None else LocalCA.in_memory()

    def source(who: Who) -> SvidSource:
        return issuer.issue(identity_of(who, issuer.trust_domain)) if isinstance(who, (str, SpiffeIdentity)) else who

    ours, theirs = source(client), source(server)
    failures: list[Exception] = []
    recorder = Recorder(handler, failures.append)
    near, far = trio.testing.memory_stream_pair()
    hbone_server = HBONEServer(theirs, recorder, limits=limits, timeouts=timeouts, observer=recorder)
    async with background_tasks() as nursery:
        nursery.start_soon(hbone_server.serve_stream, far)
        async with HBONEClient.over_stream(
            near, svid=ours, expect=theirs.identity, limits=limits, timeouts=timeouts
        ) as hbone_client:
            yield MemorySession(hbone_client, hbone_server, recorder)
    if failures:
        raise failures[0]
