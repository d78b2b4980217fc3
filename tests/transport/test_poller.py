"""The relay's poller, both ways of doing it: by epoll, and by `selectors` where there is no epoll."""

from __future__ import annotations

import importlib.util
import selectors
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from support.pairs import memory_pair
from support.tcp import connected_pair, receive_all

from hbone import relay
from hbone.transport import _hub, _poller
from hbone.transport._poller import READABLE, WRITABLE

if TYPE_CHECKING:
    from types import ModuleType


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as it is on a system that is not Linux, with this system's selector in place of kqueue."""
    assert _poller.__file__ is not None
    spec = importlib.util.spec_from_file_location("_poller_elsewhere", _poller.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        spec.loader.exec_module(module)
    monkeypatch.setattr(selectors, "KqueueSelector", selectors.DefaultSelector, raising=False)
    return module


@pytest.fixture(params=["here", "elsewhere"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    return _poller.Poller if request.param == "here" else elsewhere(monkeypatch).Poller


def test_what_is_ready_is_told_until_it_is_not(kind: Any) -> None:
    poller = kind()
    one, other = socket.socketpair()
    with one, other:
        fd = one.fileno()
        poller.add(fd, READABLE)
        assert poller.poll() == []
        other.send(b"x")
        assert poller.poll() == poller.poll() == [(fd, READABLE)]
        poller.change(fd, READABLE | WRITABLE)
        assert poller.poll() == [(fd, READABLE | WRITABLE)]
        poller.change(fd, WRITABLE)
        assert poller.poll() == [(fd, WRITABLE)]
        poller.change(fd, 0)
        assert poller.poll() == []
        poller.change(fd, 0)
        poller.change(fd, READABLE)
        assert poller.poll() == [(fd, READABLE)]
        poller.remove(fd)
        assert poller.poll() == []
        poller.add(fd, 0)
        assert poller.poll() == []
        poller.remove(fd)
    assert poller.fileno() >= 0
    poller.close()


def test_a_socket_that_breaks_is_told_whatever_is_wanted() -> None:
    """What `selectors` cannot do: without it a broken application is noticed when credit comes."""
    poller = _poller.Poller()
    one, other = socket.socketpair()
    with one:
        poller.add(one.fileno(), 0)
        other.close()
        if sys.platform == "linux":
            assert poller.poll() == [(one.fileno(), READABLE | WRITABLE)]
        poller.remove(one.fileno())
    poller.close()


async def test_relays_run_on_it(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hub, "Poller", kind)
    monkeypatch.setattr(_hub, "_beside_trio", lambda _: None)
    async with memory_pair() as pair, trio.open_nursery() as nursery:
        near, far = await pair.open()
        app, sock = connected_pair()
        nursery.start_soon(relay, sock, near)
        async with app:
            data = bytes(range(256)) * 2000
            async with trio.open_nursery() as sending:
                sending.start_soon(app.send_all, data)
                sending.start_soon(far.send_all, data)
                size = 0
                while size < len(data):
                    size += len(await far.receive_some())
            await far.send_eof()
            assert await receive_all(app) == data
            await app.send_eof()
            assert await far.receive_some() == b""
