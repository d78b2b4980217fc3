"""Relays between two sockets: every byte, every end as it was, a reset for everything else, and nothing left behind.

All of it three times: by splice wherever possible, by copies only, and as the relay chooses.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import os
import random
import socket
import struct
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from support.tcp import connected_pair, receive_all, receive_exactly

from hbone.transport import PlainRelay, RelayResult, _ends, _splice, relay_sockets
from hbone.transport._hub import shared_hub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

UP = bytes(range(256)) * 1500
DOWN = bytes(reversed(range(256))) * 1700
#: Only a hang reaches it.
LIMIT = 60


@pytest.fixture(params=["splice", "copy", "as it chooses"], autouse=True)
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_ends, "_LET_READ", 0.01)
    if request.param == "splice":
        if not hasattr(os, "splice"):
            pytest.skip("no splice here")
        monkeypatch.setattr(_splice, "_BULK", 1)
    elif request.param == "copy":
        monkeypatch.setattr(_splice, "_SPLICE", False)
    return str(request.param)


class Bridge:
    """Two applications, a and b, and the relay between them: a is downstream."""

    def __init__(self, *, buffer: int | None = None, first: bytes = b"") -> None:
        self.a, near = connected_pair()
        self.b, far = connected_pair()
        if buffer:
            for sock in (self.a.socket, self.b.socket, near, far):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socks = near, far
        self.relay = PlainRelay(near, far, first=first)
        self.done = trio.Event()
        self._result: RelayResult | None = None

    async def run(self) -> None:
        self._result = await self.relay.run()
        self.done.set()

    async def result(self) -> RelayResult:
        await self.done.wait()
        assert self._result is not None
        assert [sock.fileno() for sock in self.socks] == [-1, -1]
        assert self.relay.buffered == 0
        return self._result


@contextlib.asynccontextmanager
async def bridge(**options: Any) -> AsyncIterator[Bridge]:
    made = Bridge(**options)
    with trio.fail_after(LIMIT):
        async with made.a, made.b, trio.open_nursery() as nursery:
            nursery.start_soon(made.run)
            yield made
            nursery.cancel_scope.cancel()


async def expect_reset(stream: trio.SocketStream) -> None:
    """Reads on until the reset; an end of file is what must not be."""
    with pytest.raises(trio.BrokenResourceError) as caught:
        await receive_all(stream)
    assert isinstance(caught.value.__cause__, ConnectionResetError)


def reset(stream: trio.SocketStream) -> None:
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.sleep(0.001)


async def fill(between: Bridge, stream: trio.SocketStream) -> int:
    """Send until nothing more is taken and the relay holds something. Returns how much that was."""
    sent = 0
    while True:
        try:
            sent += stream.socket._sock.send(bytes(65_536))
        except BlockingIOError:
            with trio.move_on_after(0.1) as scope:
                await trio.lowlevel.wait_writable(stream.socket)
            if scope.cancelled_caught and between.relay.buffered:
                return sent
        await trio.lowlevel.checkpoint()


def pipes() -> _splice.Pipes:
    return _splice._get_shared().pipes


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# === ends ===


@pytest.mark.parametrize("order", ["a then b", "b then a", "both at once, a first", "both at once, b first"])
async def test_all_four_orders_of_ending(order: str) -> None:
    async with bridge() as between, trio.open_nursery() as nursery:
        got: dict[str, bytes] = {}

        async def receive(name: str, stream: trio.SocketStream) -> None:
            got[name] = await receive_all(stream)

        async def a() -> None:
            if order == "b then a":
                await receive("a", between.a)
            await between.a.send_all(UP)
            await between.a.send_eof()
            if order != "b then a":
                await receive("a", between.a)

        async def b() -> None:
            if order == "a then b":
                await receive("b", between.b)
            await between.b.send_all(DOWN)
            await between.b.send_eof()
            if order != "a then b":
                await receive("b", between.b)

        for task in (a, b) if order.endswith("a first") else (b, a):
            nursery.start_soon(task)
        assert await between.result() == RelayResult(bytes_up=len(UP), bytes_down=len(DOWN), error=None)
        await until(lambda: len(got) == 2)
        assert got == {"a": DOWN, "b": UP}


@pytest.mark.parametrize("ended", ["nobody", "a", "b"])
@pytest.mark.parametrize("breaks", ["a", "b"])
async def test_a_reset_when_one_breaks(breaks: str, ended: str) -> None:
    """Who waits for more gets a reset; who has had its end keeps it."""
    async with bridge() as between:

        async def send(stream: trio.SocketStream, data: bytes, *, end: bool) -> None:
            await stream.send_all(data)
            if end:
                await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(send, between.a, UP, end=ended == "a"))
            nursery.start_soon(partial(send, between.b, DOWN, end=ended == "b"))
            if ended == "a":
                assert await receive_all(between.b) == UP
            elif ended == "b":
                assert await receive_all(between.a) == DOWN
            if ended != "a":
                assert await receive_exactly(between.b, len(UP)) == UP
            if ended != "b":
                assert await receive_exactly(between.a, len(DOWN)) == DOWN
        broken, other = (between.a, between.b) if breaks == "a" else (between.b, between.a)
        reset(broken)
        if ended in ("nobody", "a" if breaks == "b" else "b"):
            await expect_reset(other)
        result = await between.result()
        assert isinstance(result.error, OSError)
        assert (result.bytes_up, result.bytes_down) == (len(UP), len(DOWN))


async def test_what_was_sent_before_a_break_does_not_look_whole() -> None:
    async with bridge() as between:
        await between.a.send_all(UP[:50_000])
        assert await receive_exactly(between.b, 1000) == UP[:1000]
        reset(between.a)
        await expect_reset(between.b)


@pytest.mark.parametrize("size", [0, 1, len(UP), 8 << 20])
async def test_who_was_told_its_end_gets_all_before_the_reset(size: int) -> None:
    """a ends, does not wait for its answer and goes, while b has much to read."""
    async with bridge(buffer=65_536) as between:
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await between.a.send_all(bytes(size))
                await between.a.send_eof()

            nursery.start_soon(send)
            await receive_exactly(between.b, max(0, size - 50_000))
            await until(lambda: between.relay._up.ended)
        reset(between.a)
        assert await receive_exactly(between.b, min(size, 50_000)) == bytes(min(size, 50_000))
        assert await between.b.receive_some() == b""
        assert isinstance((await between.result()).error, OSError)


# === bytes ===


@pytest.mark.parametrize("seed", range(4))
async def test_random_sizes_both_ways(seed: int) -> None:
    chance = random.Random(seed)
    data = [chance.randbytes(chance.choice([1, 1000, 100_000, 3_000_000]) + chance.randrange(5000)) for _ in "ab"]
    async with bridge(buffer=chance.choice([None, 32_768])) as between:

        async def send(stream: trio.SocketStream, what: bytes, chance: random.Random) -> None:
            start = 0
            while start < len(what):
                end = start + chance.choice([1, 100, 5000, 70_000, 600_000])
                await stream.send_all(what[start:end])
                start = end
                if chance.random() < 0.2:
                    await trio.lowlevel.checkpoint()
            await stream.send_eof()

        async def receive(stream: trio.SocketStream, expected: bytes, chance: random.Random) -> None:
            digest = hashlib.sha256()
            while got := await stream.receive_some(chance.choice([10, 1000, 100_000])):
                digest.update(got)
            assert digest.digest() == hashlib.sha256(expected).digest()

        async with trio.open_nursery() as nursery:
            for number, (near, far) in enumerate(((between.a, between.b), (between.b, between.a))):
                nursery.start_soon(send, near, data[number], random.Random(seed + 10 + number))
                nursery.start_soon(receive, far, data[number], random.Random(seed + 20 + number))
        assert await between.result() == RelayResult(bytes_up=len(data[0]), bytes_down=len(data[1]), error=None)


async def test_first_bytes_go_first() -> None:
    async with bridge(first=b"read before, ") as between:
        await between.a.send_all(b"and after")
        await between.a.send_eof()
        assert await receive_all(between.b) == b"read before, and after"
        assert between.relay.bytes_up == 22


async def test_many_first_bytes_wait_for_who_reads_slowly() -> None:
    async with bridge(first=bytes(6 << 20), buffer=32_768) as between:
        await until(lambda: between.relay.buffered > 0)
        await between.a.send_all(b"x")
        await between.a.send_eof()
        got = await receive_all(between.b)
        assert (len(got), got[-1:]) == ((6 << 20) + 1, b"x")


async def test_counters_are_live() -> None:
    async with bridge() as between:
        assert (between.relay.bytes_up, between.relay.bytes_down, between.relay.over) == (0, 0, False)
        for round_ in (1, 2):
            await between.a.send_all(bytes(1000))
            await receive_exactly(between.b, 1000)
            await between.b.send_all(bytes(70_000))
            await receive_exactly(between.a, 70_000)
            await until(lambda: between.relay.bytes_down == 70_000 * round_)  # noqa: B023
            assert between.relay.bytes_up == 1000 * round_
            assert not between.relay.over
        assert "2000 up, 140000 down" in repr(between.relay)


@pytest.mark.skipif(not hasattr(socket, "MSG_OOB"), reason="no urgent data here")
async def test_urgent_data_is_left_out_and_stops_nothing() -> None:
    """To splice an urgent byte looks like nothing to read, and then like an end."""
    async with bridge() as between:
        await between.a.send_all(b"before")
        assert await receive_exactly(between.b, 6) == b"before"
        between.a.socket._sock.send(b"!", socket.MSG_OOB)
        await between.a.send_all(b"after")
        await between.a.send_eof()
        assert await receive_all(between.b) == b"after"
        await between.b.send_all(b"answer")
        await between.b.send_eof()
        assert await receive_all(between.a) == b"answer"
        assert (await between.result()).error is None


# === back-pressure ===


@pytest.mark.parametrize("way", ["up", "down"])
async def test_an_application_that_does_not_read_stops_the_other(way: str) -> None:
    async with bridge(buffer=32_768) as between:
        source, sink = (between.a, between.b) if way == "up" else (between.b, between.a)
        sent = await fill(between, source)
        assert 0 < between.relay.buffered <= _splice._PIPE_SIZE
        assert sent < 3_000_000
        # The other way goes on.
        await sink.send_all(b"other way")
        assert await receive_exactly(source, 9) == b"other way"
        async with trio.open_nursery() as nursery:

            async def rest() -> None:
                await source.send_all(bytes(500_000))
                await source.send_eof()

            nursery.start_soon(rest)
            assert len(await receive_all(sink)) == sent + 500_000


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("breaks", ["source", "sink"])
async def test_a_break_is_noticed_while_the_sink_is_full(way: str, breaks: str) -> None:
    async with bridge(buffer=32_768) as between:
        source, sink = (between.a, between.b) if way == "up" else (between.b, between.a)
        await fill(between, source)
        broken, other = (source, sink) if breaks == "source" else (sink, source)
        reset(broken)
        assert isinstance((await between.result()).error, OSError)
        await expect_reset(other)


async def test_a_relay_waits_in_peace_when_one_has_ended_both_ways() -> None:
    """The kernel reports such a socket for ever; the hub must not spin, and the bytes must still arrive."""
    async with bridge() as between:
        for sock in (between.socks[1], between.b.socket):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32_768)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        sent = 300_000  # more than b's kernel takes, which takes some of it only when it is probed
        await between.a.send_all(bytes(sent))
        await between.b.send_eof()
        assert await receive_all(between.a) == b""
        await between.a.send_eof()
        # All that a sent, and its end, are with the relay's kernel.
        await until(lambda: _ends._unsent(between.a.socket._sock) == 0)
        await trio.testing.wait_all_tasks_blocked(0.01)  # never, if it spins
        assert between.relay.buffered
        assert len(await receive_all(between.b)) == sent
        assert (await between.result()).error is None


async def test_there_are_only_so_many_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_splice, "_MAX_PIPES", 2)
    monkeypatch.setattr(_splice, "_SPARE_PIPES", 1)
    async with contextlib.AsyncExitStack() as stack:
        relays = [await stack.enter_async_context(bridge(buffer=32_768)) for _ in range(5)]
        sizes = dict.fromkeys(relays, 0)

        async def stall(between: Bridge) -> None:
            sizes[between] = await fill(between, between.a)

        async with trio.open_nursery() as filling:
            for between in relays:
                filling.start_soon(stall, between)
        assert pipes().count <= 2

        async def finish(between: Bridge) -> None:
            await between.a.send_eof()
            assert len(await receive_all(between.b)) == sizes[between]
            await between.b.send_eof()
            assert (await between.result()).error is None

        async with trio.open_nursery() as ending:
            for between in relays:
                ending.start_soon(finish, between)
        assert pipes().count <= 1


async def test_without_descriptors_for_a_pipe_it_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(flags: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "pipe2", none_left, raising=False)
    async with bridge() as between, trio.open_nursery() as nursery:
        nursery.start_soon(between.a.send_all, UP * 4)
        assert await receive_exactly(between.b, len(UP) * 4) == UP * 4
        assert pipes().count == 0


async def test_what_cannot_be_spliced_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*args: Any, **options: Any) -> int:
        raise OSError(errno.EINVAL, "invalid argument")

    monkeypatch.setattr(os, "splice", cannot, raising=False)
    async with bridge() as between, trio.open_nursery() as nursery:
        nursery.start_soon(between.a.send_all, UP * 4)
        assert await receive_exactly(between.b, len(UP) * 4) == UP * 4


async def test_small_pipes_serve_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_splice, "_PIPE_SIZE", 1 << 30)  # more than anybody may have
    async with bridge() as between, trio.open_nursery() as nursery:
        nursery.start_soon(between.a.send_all, UP * 4)
        assert await receive_exactly(between.b, len(UP) * 4) == UP * 4


# === what is left behind ===


async def test_nothing_is_left_behind() -> None:
    async def one(how: str) -> None:
        async with bridge(buffer=65_536) as between:
            await between.a.send_all(UP[:1000])
            assert await receive_exactly(between.b, 1000) == UP[:1000]
            match how:
                case "ends":
                    await between.a.send_eof()
                    await between.b.send_eof()
                    assert (await between.result()).error is None
                case "breaks":
                    await fill(between, between.a)
                    reset(between.b)
                    assert (await between.result()).error is not None
                case "cancelled":
                    await fill(between, between.a)

    await one("ends")
    await trio.testing.wait_all_tasks_blocked()
    gc.collect()  # of tests before
    files, tasks = open_files() - 2 * pipes().count, trio.lowlevel.current_statistics().tasks_living
    for how in ("ends", "breaks", "cancelled") * 2:
        await one(how)
        await trio.testing.wait_all_tasks_blocked()
        assert (open_files() - 2 * pipes().count, trio.lowlevel.current_statistics().tasks_living) == (files, tasks)
        assert pipes().count == len(pipes()._spare) <= _splice._SPARE_PIPES
        assert len(shared_hub()._watchers) <= 1  # trio's own


def test_nothing_is_left_behind_of_the_pipes() -> None:
    async def work() -> None:
        async with bridge() as between, trio.open_nursery() as nursery:
            nursery.start_soon(between.a.send_all, UP)
            await receive_exactly(between.b, len(UP))

    trio.run(work)
    gc.collect()  # of tests before
    files = open_files()
    trio.run(work)
    assert open_files() == files


@pytest.mark.parametrize("held", [True, False])
async def test_a_cancelled_relay_resets_both_ends_at_once(held: bool) -> None:
    between = Bridge(buffer=65_536)
    with trio.fail_after(LIMIT):
        async with between.a, between.b, trio.open_nursery() as nursery:
            nursery.start_soon(between.run)
            if held:
                await fill(between, between.a)
            else:
                await between.a.send_all(b"x")
                assert await receive_exactly(between.b, 1) == b"x"
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await until(lambda: [sock.fileno() for sock in between.socks] == [-1, -1])
                await expect_reset(between.a)
                await expect_reset(between.b)
    assert pipes().count == len(pipes()._spare)


async def test_a_relay_that_is_cancelled_before_it_began_closes_its_sockets() -> None:
    between = Bridge()
    async with between.a, between.b:
        with trio.CancelScope() as scope:
            scope.cancel()
            await between.run()
        assert scope.cancelled_caught
        await expect_reset(between.a)
        await expect_reset(between.b)


async def test_a_relay_of_sockets_that_have_ended_or_broken_before() -> None:
    (a, near), (b, far) = connected_pair(), connected_pair()
    async with a, b:
        for stream in (a, b):
            await stream.send_all(b"early")
            await stream.send_eof()
        assert await relay_sockets(near, far) == RelayResult(bytes_up=5, bytes_down=5, error=None)
        assert (await receive_all(a), await receive_all(b)) == (b"early", b"early")
    (a, near), (b, far) = connected_pair(), connected_pair()
    async with a, b:
        reset(b)
        assert isinstance((await relay_sockets(near, far)).error, OSError)
        await expect_reset(a)


async def test_a_mistake_costs_one_relay(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def wrong(self: Any) -> None:
        raise ZeroDivisionError

    async with bridge() as one, bridge() as other:
        await trio.testing.wait_all_tasks_blocked()
        with monkeypatch.context() as patch:
            patch.setattr(_splice._Way, "move", wrong)
            await one.a.send_all(b"x")
            assert isinstance((await one.result()).error, ZeroDivisionError)
        await expect_reset(one.a)
        await other.a.send_all(b"x")
        assert await receive_exactly(other.b, 1) == b"x"
    assert "a relay failed" in caplog.text


async def test_many_relays_at_once() -> None:
    async def one(number: int) -> None:
        data = bytes([number]) * (number * 10_007)
        async with bridge() as between, trio.open_nursery() as nursery:

            async def send() -> None:
                await between.a.send_all(data)
                await between.a.send_eof()

            nursery.start_soon(send)
            assert await receive_all(between.b) == data
            await between.b.send_eof()
            assert (await between.result()).bytes_up == len(data)

    async with trio.open_nursery() as nursery:
        for number in range(60):
            nursery.start_soon(one, number)
