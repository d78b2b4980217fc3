"""One connection pool for each identity that a node speaks for."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Self

import trio

from hbone.errors import CertificateUnavailable, SessionClosed
from hbone.transport import ConnectionPool

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType

    from hbone.identity import SpiffeIdentity
    from hbone.proxy._context import NodeContext
    from hbone.transport import Observer

__all__ = ["IdentityPools"]


class IdentityPools:
    """Pools by source identity, each made when it is first used. An ``async with`` block.

    Nothing of one identity is ever used for another: they share no session, no key and no certificate.

    Args:
        context: where the SVIDs come from, and the bounds of each pool.
        observer: told of each session and tunnel.
        patience: seconds to wait for a first certificate.
    """

    def __init__(self, context: NodeContext, *, observer: Observer | None = None, patience: float = 10.0) -> None:
        self._context = context
        self._observer = observer
        self._patience = patience
        self._pools: dict[SpiffeIdentity, ConnectionPool] = {}
        self._opening: dict[SpiffeIdentity, trio.Event] = {}
        self._retired: dict[SpiffeIdentity, trio.Event] = {}
        self._closing = False
        self._manager = trio.open_nursery()
        self._nursery: trio.Nursery | None = None

    async def __aenter__(self) -> Self:
        self._nursery = await self._manager.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        assert self._nursery is not None
        self._closing = True
        self._nursery.cancel_scope.cancel()
        return await self._manager.__aexit__(kind, problem, traceback)

    @property
    def pools(self) -> Mapping[SpiffeIdentity, ConnectionPool]:
        """Those that there are now."""
        return self._pools

    def ready(self, identity: SpiffeIdentity) -> ConnectionPool | None:
        """The pool of an identity, if it was used before."""
        return self._pools.get(identity)

    async def get(self, identity: SpiffeIdentity) -> ConnectionPool:
        """The pool of an identity, which has a certificate then.

        Raises:
            CertificateUnavailable: it has none, and did not get one in time.
            SessionClosed: we are stopping.
        """
        while (pool := self._pools.get(identity)) is None:
            self._check_open()
            # Each waits for itself: who comes late must not wait for those before it, one after the other.
            with trio.move_on_after(self._patience) as scope:
                await self._context.svids.get(identity)
            if scope.cancelled_caught:
                raise CertificateUnavailable(identity, f"none came within {self._patience:g} s")
            nursery = self._check_open()
            if identity in self._pools:
                continue
            opening = self._opening.get(identity)
            if opening is None:
                # A task of ours: who asked may go, and others may have found the pool by then.
                opening = self._opening[identity] = trio.Event()
                nursery.start_soon(self._run, identity, opening, name=f"hbone pool of {identity}")
            await opening.wait()
        return pool

    def _check_open(self) -> trio.Nursery:
        if self._closing or self._nursery is None:
            raise SessionClosed("the node is stopping")
        return self._nursery

    async def drain(self, deadline: float) -> None:
        """Stop all: no new tunnels, `deadline` seconds for those that are open."""
        self._closing = True
        async with trio.open_nursery() as nursery:
            for pool in tuple(self._pools.values()):
                nursery.start_soon(pool.drain, deadline)

    def retain(self, identities: Iterable[SpiffeIdentity]) -> None:
        """Drain the pools of identities that are not among these: they are no longer ours to use."""
        keep = frozenset(identities)
        for identity in [known for known in self._pools if known not in keep]:
            del self._pools[identity]
            self._retired.pop(identity).set()

    async def _run(self, identity: SpiffeIdentity, opened: trio.Event) -> None:
        settings, metrics = self._context.settings, self._context.metrics
        retired = trio.Event()
        try:
            async with ConnectionPool(
                self._context.svids.source(identity),
                limits=settings.pool_limits,
                session_limits=settings.limits,
                timeouts=settings.timeouts,
                observer=self._observer,
                socket_options=settings.socket_options,
            ) as pool:
                self._pools[identity], self._retired[identity] = pool, retired
                forget = metrics.add_pool(pool.statistics) if metrics is not None else None
                self._tell_opened(identity, opened)
                try:
                    await retired.wait()
                    await pool.drain(inf)
                finally:
                    if forget is not None:
                        forget()
                    if self._pools.get(identity) is pool:
                        del self._pools[identity], self._retired[identity]
        finally:
            self._tell_opened(identity, opened)

    def _tell_opened(self, identity: SpiffeIdentity, opened: trio.Event) -> None:
        if self._opening.get(identity) is opened:
            del self._opening[identity]
        opened.set()
