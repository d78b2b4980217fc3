"""A server that is somebody else at each address: the SVID chosen for each session by what the peer dialled."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from hbone import HBONEClient, HBONEServer, SpiffeIdentity
from hbone.certs import LocalCA, SvidManager, local_ca_issuer
from hbone.errors import CertificateUnavailable, ConnectFailed, PeerIdentityMismatch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from trio.testing import MockClock

    from hbone import Endpoint, Svid, SvidSource

ONE, OTHER = (SpiffeIdentity.parse(f"spiffe://cluster.local/ns/shop/sa/{name}") for name in ("one", "other"))
ME = SpiffeIdentity.parse("spiffe://cluster.local/ns/shop/sa/me")


async def handler(request: Any) -> None:
    async with await request.accept() as tunnel:
        await tunnel.send_eof()
        await tunnel.receive_some()


@dataclass
class Serving:
    server: HBONEServer
    ports: list[int]
    me: Svid
    dialled: list[Endpoint | None] = field(default_factory=list)

    async def connect(self, port: int, expect: SpiffeIdentity) -> SpiffeIdentity:
        async with HBONEClient.connect("127.0.0.1", port, svid=self.me, expect=expect) as client:
            async with await client.open_tunnel("10.0.0.7:80") as tunnel:
                assert await tunnel.receive_some() == b""
            return client.peer.identity


@contextlib.asynccontextmanager
async def serving(choose: Callable[[Serving, Endpoint | None], SvidSource], ca: LocalCA) -> AsyncIterator[Serving]:
    """One server on two ports."""

    def selector(dialled: Endpoint | None) -> SvidSource:
        made.dialled.append(dialled)
        return choose(made, dialled)

    made = Serving(HBONEServer(selector, handler), [], ca.issue(ME))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                made.ports.append((await nursery.start(made.server.serve, "127.0.0.1", 0)).port)
            yield made
            nursery.cancel_scope.cancel()


async def test_each_address_has_its_own_identity() -> None:
    ca = LocalCA.in_memory()
    svids = [ca.issue(ONE), ca.issue(OTHER)]

    def choose(serving: Serving, dialled: Endpoint | None) -> SvidSource:
        assert dialled is not None
        return svids[serving.ports.index(dialled.port)]

    async with serving(choose, ca) as there:
        assert await there.connect(there.ports[0], ONE) == ONE
        assert await there.connect(there.ports[1], OTHER) == OTHER
        with pytest.raises(PeerIdentityMismatch):
            await there.connect(there.ports[1], ONE)
        assert [str(dialled) for dialled in there.dialled] == [f"127.0.0.1:{there.ports[which]}" for which in (0, 1, 1)]
        assert "by address" in repr(there.server)


async def test_who_comes_before_its_certificate_is_refused_and_later_is_not() -> None:
    ca = LocalCA.in_memory()
    manager = SvidManager(local_ca_issuer(ca))
    async with serving(lambda *_: manager.source(ONE), ca) as there, trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        with pytest.raises(ConnectFailed):
            await there.connect(there.ports[0], ONE)
        assert there.server.statistics().failed == 1
        manager.want([ONE])
        await manager.get(ONE)
        assert await there.connect(there.ports[0], ONE) == ONE
        nursery.cancel_scope.cancel()


async def test_refusals_are_told_once_a_second(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    ca = LocalCA.in_memory()

    def choose(dialled: Endpoint | None) -> SvidSource:
        raise CertificateUnavailable(ONE, "it is not served here")

    server = HBONEServer(choose, handler)

    async def refused() -> None:
        near, far = trio.testing.memory_stream_pair()
        await server.serve_stream(far)
        with pytest.raises(ConnectFailed):
            async with HBONEClient.over_stream(near, svid=ca.issue(ME), expect=ONE):
                pass

    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            await refused()
            await trio.sleep(0.2)
        assert [record.message for record in caplog.records] == [
            f"no session: no certificate for {ONE}: it is not served here"
        ]
        await trio.sleep(1)
        await refused()
        assert caplog.records[-1].message.endswith("it is not served here (and 3 more since the last such line)")
        assert len(caplog.records) == 2


async def test_a_choice_that_fails_costs_its_connection(caplog: pytest.LogCaptureFixture) -> None:
    ca = LocalCA.in_memory()
    svid = ca.issue(ONE)

    def choose(serving: Serving, dialled: Endpoint | None) -> SvidSource:
        if len(serving.dialled) == 1:
            raise ZeroDivisionError("oh")
        return svid

    async with serving(choose, ca) as there:
        with pytest.raises(ConnectFailed):
            await there.connect(there.ports[0], ONE)
        assert await there.connect(there.ports[0], ONE) == ONE
        assert there.server.statistics().failed == 1
    assert "ZeroDivisionError('oh')" in caplog.text


async def test_what_does_not_run_on_a_socket_has_no_address() -> None:
    ca = LocalCA.in_memory()
    asked: list[Endpoint | None] = []

    def choose(dialled: Endpoint | None) -> SvidSource:
        asked.append(dialled)
        return ca.issue(ONE)

    near, far = trio.testing.memory_stream_pair()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(HBONEServer(choose, handler).serve_stream, far)
            async with HBONEClient.over_stream(near, svid=ca.issue(ME), expect=ONE) as client:
                assert client.peer.identity == ONE
    assert asked == [None]
