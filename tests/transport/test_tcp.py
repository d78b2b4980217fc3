"""Plain TCP: options of sockets, foreign source addresses, names with several addresses."""

from __future__ import annotations

import errno
import logging
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from hbone.errors import ConnectFailed
from hbone.transport import SocketOptions, _netfilter, _tcp, accept_from, connect_tcp, listen_tcp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from trio.testing import MockClock

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it")


@pytest.fixture(autouse=True)
def warn_anew() -> Iterator[None]:
    _netfilter._warn_once.cache_clear()
    yield
    _netfilter._warn_once.cache_clear()


@pytest.fixture
def unprivileged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the tests run as root."""
    real = socket.socket.setsockopt

    def setsockopt(self: socket.socket, level: int, option: int, *value: Any) -> None:
        if (level, option) in ((socket.SOL_SOCKET, 36), (socket.IPPROTO_IP, 19)):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        real(self, level, option, *value)

    monkeypatch.setattr(socket.socket, "setsockopt", setsockopt)


def tcp(sock: socket.socket, option: str) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, option))


def keepalive(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))


# === options ===


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mark": -1}, "a packet mark is 0 to 0xffffffff, not -1"),
        ({"mark": 1 << 32}, "a packet mark is"),
        ({"keepalive_time": 0}, "keepalive_time is 1 to 32767, not 0"),
        ({"keepalive_interval": 32_768}, "keepalive_interval is 1 to 32767"),
        ({"keepalive_retries": 128}, "keepalive_retries is 1 to 127"),
    ],
)
def test_options_out_of_range(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SocketOptions(**wrong)  # type: ignore[arg-type]


@linux_only
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_what_is_connected_gets_its_options(host: str) -> None:
    options = SocketOptions(keepalive_time=11, keepalive_interval=12, keepalive_retries=3, user_timeout=True)
    with listen_tcp("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with await connect_tcp(host, port, timeout=30) as sock:
            assert keepalive(sock)
            assert [tcp(sock, f"TCP_KEEP{name}") for name in ("IDLE", "INTVL", "CNT")] == [180, 180, 9]
            assert tcp(sock, "TCP_USER_TIMEOUT") == 0
            assert tcp(sock, "TCP_NODELAY")
        with await connect_tcp(host, port, timeout=30, options=options) as sock:
            assert [tcp(sock, f"TCP_KEEP{name}") for name in ("IDLE", "INTVL", "CNT")] == [11, 12, 3]
            assert tcp(sock, "TCP_USER_TIMEOUT") == (11 + 3 * 12) * 1000
        with await connect_tcp(host, port, timeout=30, options=SocketOptions(keepalive=False)) as sock:
            assert not keepalive(sock)
            assert tcp(sock, "TCP_NODELAY")


@linux_only
@pytest.mark.parametrize("options", [None, SocketOptions(keepalive_time=11)])
async def test_what_is_accepted_gets_its_options(options: SocketOptions | None) -> None:
    async with trio.open_nursery() as nursery:

        def handle(sock: socket.socket) -> None:
            with sock:
                assert tcp(sock, "TCP_NODELAY")
                assert keepalive(sock) == (options is not None)
                assert options is None or tcp(sock, "TCP_KEEPIDLE") == 11
            nursery.cancel_scope.cancel()

        listener = listen_tcp("127.0.0.1", 0, options=options)
        nursery.start_soon(lambda: accept_from(listener, handle, options=options))
        (await connect_tcp("127.0.0.1", listener.getsockname()[1], timeout=30)).close()
        await trio.sleep_forever()
    listener.close()


async def test_what_has_gone_when_it_is_accepted_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some systems say so when its options are set."""
    tune = SocketOptions.tune
    gone: list[socket.socket] = []

    def first_is_gone(self: SocketOptions, sock: socket.socket) -> None:
        if self.keepalive_time == 7 and not gone:
            gone.append(sock)
            raise OSError(errno.EINVAL, "Invalid argument")
        tune(self, sock)

    monkeypatch.setattr(SocketOptions, "tune", first_is_gone)
    monkeypatch.setattr(_tcp, "_INHERITED", False)
    async with trio.open_nursery() as nursery:

        def handle(sock: socket.socket) -> None:
            sock.close()
            nursery.cancel_scope.cancel()

        listener = listen_tcp("127.0.0.1", 0)
        nursery.start_soon(lambda: accept_from(listener, handle, options=SocketOptions(keepalive_time=7)))
        for _ in range(2):
            (await connect_tcp("127.0.0.1", listener.getsockname()[1], timeout=30)).close()
        await trio.sleep_forever()
    listener.close()
    assert gone[0].fileno() == -1


@pytest.mark.usefixtures("unprivileged")
@linux_only
async def test_a_mark_without_the_privilege_says_what_is_missing() -> None:
    options = SocketOptions(mark=0x539)
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(ConnectFailed, match=r"setting the packet mark 0x539 needs CAP_NET_ADMIN"):
            await connect_tcp(host, 80, timeout=30, options=options)
    with pytest.raises(PermissionError, match="CAP_NET_ADMIN"):
        listen_tcp("127.0.0.1", 0, options=options)


async def test_a_mark_on_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_netfilter.sys, "platform", "darwin")
    with pytest.raises(OSError, match="packet marks exist on Linux only"):
        listen_tcp("127.0.0.1", 0, options=SocketOptions(mark=1))


# === foreign source addresses ===


@pytest.mark.parametrize("case", ["no privilege", "not Linux", "ourselves", "other version"])
async def test_where_a_foreign_address_cannot_be_it_is_one_of_ours(
    case: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = {"ourselves": "127.0.0.1", "other version": "2001:db8::7"}.get(case, "192.0.2.7")
    if case in ("no privilege", "ourselves", "other version"):
        request.getfixturevalue("unprivileged")
    else:
        monkeypatch.setattr(_netfilter.sys, "platform", "darwin")
    with listen_tcp("127.0.0.1", 0) as listener, caplog.at_level(logging.WARNING):
        for _ in range(2):
            with await connect_tcp(
                "127.0.0.1", listener.getsockname()[1], timeout=30, source_ip=source, transparent=True
            ) as sock:
                assert sock.getsockname()[0] == "127.0.0.1"
    told = [record.message for record in caplog.records]
    if case in ("no privilege", "not Linux"):
        assert len(told) == 1
        assert told[0].startswith("applications see this proxy's address instead of their clients'")
    else:
        assert not told


# === names ===


class Resolver(trio.abc.HostnameResolver):
    def __init__(self, *addresses: tuple[int, tuple[Any, ...]]) -> None:
        self.addresses = addresses

    async def getaddrinfo(
        self, host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> Any:
        return [(family, socket.SOCK_STREAM, 6, "", address) for family, address in self.addresses]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


def resolving(*hosts: str) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(*((socket.AF_INET, (host, 80)) for host in hosts)))


class Net:
    """Which address answers when, instead of the kernel; and when each was tried."""

    def __init__(self, **answers: Callable[[], Awaitable[None]]) -> None:
        self.answers = answers
        self.tried: list[tuple[str, float]] = []
        self.socks: list[socket.socket] = []
        self.began = trio.current_time()

    async def connect(self, sock: socket.socket, address: Any) -> None:
        self.socks.append(sock)
        self.tried.append((address[0], trio.current_time() - self.began))
        await self.answers[address[0][-1:]]()


async def never() -> None:
    await trio.sleep_forever()


async def at_once() -> None:
    await trio.lowlevel.checkpoint()


async def refuse() -> None:
    raise OSError(errno.ECONNREFUSED, "Connection refused")


def after(seconds: float, then: Callable[[], Awaitable[None]] = at_once) -> Callable[[], Awaitable[None]]:
    async def answer() -> None:
        await trio.sleep(seconds)
        await then()

    return answer


@pytest.mark.parametrize(
    ("answers", "tried", "winner"),
    [
        ({"1": at_once}, {"1": 0}, "1"),
        ({"1": refuse, "2": at_once}, {"1": 0, "2": 0}, "2"),
        ({"1": never, "2": never, "3": at_once}, {"1": 0, "2": 0.25, "3": 0.5}, "3"),
        ({"1": after(0.4), "2": never, "3": never}, {"1": 0, "2": 0.25}, "1"),
        ({"1": after(0.1, refuse), "2": refuse, "3": after(1)}, {"1": 0, "2": 0.1, "3": 0.1}, "3"),
        ({"1": after(1), "2": after(0.75), "3": after(0.5)}, {"1": 0, "2": 0.25, "3": 0.5}, None),
    ],
    ids=["first", "refused", "head start", "late first", "failures", "all at the same time"],
)
async def test_addresses_of_a_name_in_turn(
    answers: dict[str, Any],
    tried: dict[str, float],
    winner: str | None,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = Net(**answers)
    monkeypatch.setattr(_tcp, "_connect", net.connect)
    monkeypatch.setattr(SocketOptions, "tune", lambda self, sock: None)
    resolving(*(f"192.0.2.{last}" for last in answers))
    with await connect_tcp("name.example", 80, timeout=10) as sock:
        open_ones = [one for one in net.socks if one.fileno() >= 0]
        assert open_ones == [sock]
        if winner is not None:
            assert net.socks[list(answers).index(winner)] is sock
    assert {host[-1]: when for host, when in net.tried} == pytest.approx(tried)


async def test_when_no_address_answers_the_first_says_why(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable() -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    net = Net(**{"1": unreachable, "2": refuse})
    monkeypatch.setattr(_tcp, "_connect", net.connect)
    resolving("192.0.2.1", "192.0.2.2")
    with pytest.raises(ConnectFailed, match=r"connecting to name\.example:80 failed: network is unreachable"):
        await connect_tcp("name.example", 80, timeout=10)
    assert {sock.fileno() for sock in net.socks} == {-1}


@pytest.mark.parametrize("answer", [never, at_once])
async def test_cancelled_it_leaves_no_socket(
    answer: Any, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it is cancelled in the moment in which an address answers."""
    scope = trio.CancelScope()

    async def cancelling() -> None:
        if answer is at_once:
            scope.cancel()
        await trio.sleep_forever() if answer is never else None

    net = Net(**{"1": cancelling})
    monkeypatch.setattr(_tcp, "_connect", net.connect)
    resolving("192.0.2.1")
    with scope:
        if answer is never:
            scope.deadline = trio.current_time() + 1
        await connect_tcp("name.example", 80, timeout=10)
    assert scope.cancelled_caught
    assert {sock.fileno() for sock in net.socks} == {-1}


def test_addresses_of_both_versions_take_turns() -> None:
    def turns(text: str) -> str:
        return "".join(str(address) for _, address in _tcp._in_turns((ord(c.lower()), c) for c in text))

    assert turns("") == ""
    assert turns("a") == "a"
    assert turns("aAb") == "abA"
    assert turns("abBcC".replace("c", "b").replace("C", "b")) == "abB"
    assert turns("aABb") == "aBAb"
