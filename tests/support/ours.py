"""Our own side of a test against a foreign or hand-made peer: a server that forwards, and threads for the other side.

The only module of this package that imports the product.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from hbone import DialledAddress, ForwardHandler, HBONEServer, Svid
from support.certs import pki
from support.rawpeer import RawListener, RawPeer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from support.certs import Leaf

__all__ = ["Serving", "against", "forward", "forwarding", "run", "serving", "svid"]

T = TypeVar("T")

#: No test here needs longer; one that hangs ends with a traceback of its own task.
PATIENCE = 100.0


def svid(leaf: Leaf) -> Svid:
    """The product's form of a test leaf."""
    return Svid.from_files(leaf.cert, leaf.key, leaf.roots)


async def run(script: Callable[..., T], *args: Any, **options: Any) -> T:
    """Runs a blocking script in a thread; abandoned (not awaited) when the test is over."""
    return await trio.to_thread.run_sync(functools.partial(script, *args, **options), abandon_on_cancel=True)


@dataclass(frozen=True, slots=True)
class Serving:
    """A server of ours that runs."""

    server: HBONEServer
    port: int

    def dial(self, leaf: Leaf | None = None, **options: Any) -> RawPeer:
        """A hand-made client, handshaken. Blocking: for scripts."""
        return RawPeer.dial(self.port, leaf or pki().client, **options)


def forward() -> Any:
    """A handler that dials any port of the address that it was reached on."""
    return ForwardHandler(DialledAddress())


@contextlib.asynccontextmanager
async def serving(handler: Any, *, leaf: Leaf | None = None, **options: Any) -> AsyncIterator[Serving]:
    """An `HBONEServer` on a free port of the loopback."""
    server = HBONEServer(svid(leaf or pki().server), handler, **options)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            endpoint = await nursery.start(server.serve, "127.0.0.1", 0)
            yield Serving(server, endpoint.port)
            nursery.cancel_scope.cancel()


def forwarding(**options: Any) -> contextlib.AbstractAsyncContextManager[Serving]:
    """A server that forwards to any port of the loopback."""
    return serving(forward(), **options)


@contextlib.asynccontextmanager
async def against(
    script: Callable[[RawListener], None], *, leaf: Leaf | None = None, **options: Any
) -> AsyncIterator[int]:
    """Runs a hand-made server's script in a thread; gives its port. The script must end for the block to end."""
    with RawListener(leaf or pki().server, **options) as listener, trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, script, listener)
            yield listener.port
