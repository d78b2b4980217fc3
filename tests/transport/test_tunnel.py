"""`Tunnel` is a trio stream, by trio's own measure, and ends as the wire profile says."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from support import frames
from support.certs import CLIENT, SERVER
from support.frames import Code, Kind, Setting
from support.pairs import (
    SMALL,
    TARGET,
    Pair,
    Scripted,
    memory_pair,
    scripted_client,
    scripted_server,
    server_svid,
    socket_pair,
)
from support.tcp import receive_all

from hbone import ErrorCode, HBONEServer, Limits, SessionClosed, StreamRefused, Timeouts, TunnelReset

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

WINDOW = SMALL.stream_window


@contextlib.asynccontextmanager
async def tunnel_in_tunnel(**options: Any) -> AsyncIterator[Pair]:
    async with memory_pair(limits=SMALL) as outer, memory_pair(streams=await outer.open(), **options) as inner:
        yield inner


def makers(pair: Pair) -> tuple[Callable[[], Any], Callable[[], Any]]:
    async def clogged() -> tuple[Any, Any]:
        near, far = await pair.open()
        await near.send_all(bytes(WINDOW))
        await far.send_all(bytes(WINDOW))
        return near, far

    return pair.open, clogged


# === a trio stream ===


@pytest.mark.wire("W-CLOSE-1", "W-CLOSE-2", "W-CLOSE-3", "W-FLOW-5")
@pytest.mark.parametrize("make", [memory_pair, socket_pair, tunnel_in_tunnel])
async def test_trios_own_checks_of_a_half_closeable_stream(make: Any) -> None:
    async with make(limits=SMALL) as pair:
        await trio.testing.check_half_closeable_stream(*makers(pair))
        await trio.testing.check_two_way_stream(*makers(pair))


@pytest.mark.wire("W-DBL-1", "W-DBL-4", "W-DATA-1")
async def test_a_tunnel_in_a_tunnel_carries_bytes_both_ways() -> None:
    async with tunnel_in_tunnel() as pair:
        near, far = await pair.open("inner.example:80")
        assert (str(near.target), str(far.target)) == ("inner.example:80", "inner.example:80")
        assert str(near.peer.identity) == SERVER
        assert str(far.peer.identity) == CLIENT
        assert near.peer.address is None
        await trio.testing.check_two_way_stream(pair.open, None)


async def test_statistics_count_bytes_and_what_waits() -> None:
    async with memory_pair(limits=SMALL) as pair:
        near, far = await pair.open()
        await near.send_all(bytes(1000))
        await trio.testing.wait_all_tasks_blocked()
        assert near.statistics().bytes_sent == 1000
        assert near.statistics().send_window == WINDOW - 1000
        assert far.statistics().receive_buffered == 1000
        assert len(await far.receive_some(400)) == 400
        assert (far.statistics().bytes_received, far.statistics().receive_buffered) == (400, 600)
        session = pair.far_session.statistics()
        assert (session.open_streams, session.receive_buffered, session.bytes_received) == (1, 600, 1000)
        assert far.statistics().open
        await near.aclose()
        assert not near.statistics().open
        assert "closed" in repr(near)
        await trio.testing.wait_all_tasks_blocked()
        assert "ended" in repr(far)


async def test_max_bytes_is_checked() -> None:
    async with memory_pair() as pair:
        near, _ = await pair.open()
        with pytest.raises(ValueError, match="at least 1"):
            await near.receive_some(0)
        with pytest.raises(TypeError):
            await near.receive_some(1.5)  # type: ignore[arg-type]


# === two tasks in each other's way ===


async def test_two_receivers_are_one_too_many() -> None:
    async with memory_pair() as pair:
        near, _ = await pair.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.receive_some)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await near.receive_some()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("what", ["send_all", "send_eof", "wait_send_all_might_not_block"])
async def test_two_senders_are_one_too_many(what: str) -> None:
    async with memory_pair(limits=SMALL) as pair:
        near, _ = await pair.open()
        await near.send_all(bytes(WINDOW))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.send_all, b"x")
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await (near.send_all(b"y") if what == "send_all" else getattr(near, what)())
            nursery.cancel_scope.cancel()


async def test_a_receiver_that_was_cancelled_does_not_harm_the_next_one() -> None:
    """The next one begins in the moment between the first one's cancellation and its end."""
    async with memory_pair() as pair:
        near, far = await pair.open()

        async def first(scope: trio.CancelScope) -> None:
            with scope:
                await near.receive_some()

        async def second(begin: trio.Event) -> None:
            await begin.wait()
            while True:
                try:
                    assert await near.receive_some() == b"x"
                except trio.BusyResourceError:
                    await trio.lowlevel.checkpoint()
                else:
                    return

        for _ in range(20):  # trio runs the tasks of a round in any order
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    scope, begin = trio.CancelScope(), trio.Event()
                    nursery.start_soon(first, scope)
                    nursery.start_soon(second, begin)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
                    begin.set()
                    await trio.testing.wait_all_tasks_blocked()
                    await far.send_all(b"x")


async def test_an_answer_that_crosses_the_cancellation_of_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in one round of the scheduler: the request is cancelled, and the session's reader has the 200."""

    async def script(peer: Scripted) -> None:
        await peer.open()
        for stream in range(1, 41, 2):
            await peer.wait_for(Kind.HEADERS, stream=stream)
            await peer.send(frames.response(stream))
            await peer.wait_for(Kind.RST_STREAM, stream=stream)
        await peer.wait_end()

    async with scripted_server(script) as client:
        session = client._session
        dispatch = session._dispatch
        scopes: list[trio.CancelScope] = []

        def cancel_first(events: Any) -> bool:
            if events:
                scopes[-1].cancel()
            return dispatch(events)

        monkeypatch.setattr(session, "_dispatch", cancel_first)
        for _ in range(20):
            with trio.CancelScope() as scope:
                scopes.append(scope)
                async with await client.open_tunnel(TARGET):
                    await trio.sleep_forever()
            await trio.testing.wait_all_tasks_blocked()
        assert client.statistics().open_streams == 0


# === errors and their causes ===


async def test_a_reset_is_told_with_its_code() -> None:
    async with memory_pair() as pair:
        near, far = await pair.open()
        far.abort(ErrorCode.CONNECT_ERROR)
        with pytest.raises(trio.BrokenResourceError, match="CONNECT_ERROR") as caught:
            await near.receive_some()
        assert isinstance(caught.value.__cause__, TunnelReset)
        assert caught.value.__cause__.remote
        assert caught.value.__cause__.error_code == ErrorCode.CONNECT_ERROR
        for again in (near.send_all(b"x"), near.send_eof(), near.wait_send_all_might_not_block(), near.receive_some()):
            with pytest.raises(trio.BrokenResourceError) as caught:
                await again
            assert isinstance(caught.value.__cause__, TunnelReset)
        with pytest.raises(trio.BrokenResourceError) as caught:
            await far.receive_some()
        assert isinstance(caught.value.__cause__, TunnelReset)
        assert not caught.value.__cause__.remote


@pytest.mark.wire("W-RST-4")
async def test_the_end_of_the_session_is_told_to_each_tunnel_and_each_waiter() -> None:
    async with memory_pair(limits=SMALL) as pair:
        near, _ = await pair.open()
        other, _ = await pair.open()
        await near.send_all(bytes(WINDOW))
        errors: list[BaseException | None] = []

        async def expect(operation: Any) -> None:
            with pytest.raises(trio.BrokenResourceError) as caught:
                await operation
            errors.append(caught.value.__cause__)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect, near.receive_some())
            nursery.start_soon(expect, near.send_all(b"x"))
            nursery.start_soon(expect, other.receive_some())
            await trio.testing.wait_all_tasks_blocked()
            pair.far_session.kill()
        assert [type(error) for error in errors] == [SessionClosed] * 3
        assert not near.statistics().open
        near.abort()  # nothing happens
        await near.aclose()


async def test_waiters_are_woken_by_a_reset() -> None:
    async with memory_pair(limits=SMALL) as pair:
        near, far = await pair.open()
        await near.send_all(bytes(WINDOW))

        async def expect(operation: Any) -> None:
            with pytest.raises(trio.BrokenResourceError):
                await operation

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect, near.receive_some())
            nursery.start_soon(expect, near.send_all(b"x"))
            await trio.testing.wait_all_tasks_blocked()
            far.abort()


# === closing ===


@contextlib.asynccontextmanager
async def against_a_hand_made_client(**options: Any) -> AsyncIterator[tuple[Scripted, Any]]:
    """A tunnel of our server, to a client made by hand; stream 1."""
    send, receive = trio.open_memory_channel[Any](10)

    async def handler(request: Any) -> None:
        tunnel = await request.accept()
        send.send_nowait(tunnel)
        await trio.sleep_forever()

    server = HBONEServer(server_svid(), handler, **options)
    async with trio.open_nursery() as nursery:
        peer = scripted_client(server, nursery)
        await peer.open({Setting.INITIAL_WINDOW_SIZE: 100_000})
        await peer.send(frames.connect(1, TARGET))
        await peer.wait_for(Kind.HEADERS, stream=1)
        yield peer, await receive.receive()
        nursery.cancel_scope.cancel()


def sent(peer: Scripted, stream: int = 1) -> list[tuple[str, int]]:
    """What came on a stream: ``("DATA", length)``, ``("END", 0)``, ``("RST", code)``."""
    seen = []
    for frame in peer.log:
        if frame.stream == stream and frame.kind == Kind.DATA:
            seen += [("DATA", len(frame.data))] if frame.data else []
            seen += [("END", 0)] if frame.end_stream else []
        elif frame.stream == stream and frame.kind == Kind.RST_STREAM:
            seen.append(("RST", frame.code))
    return seen


@pytest.mark.wire("W-RST-7", "W-CLOSE-1")
async def test_aclose_ends_our_direction_and_then_gives_the_tunnel_up() -> None:
    async with against_a_hand_made_client() as (peer, tunnel):
        await tunnel.send_all(b"abc")
        await tunnel.aclose()
        await peer.fence()
        assert sent(peer) == [("DATA", 3), ("END", 0), ("RST", Code.CANCEL)]
        await tunnel.aclose()
        for operation in (tunnel.receive_some, tunnel.send_eof, tunnel.wait_send_all_might_not_block):
            with pytest.raises(trio.ClosedResourceError):
                await operation()
        with pytest.raises(trio.ClosedResourceError):
            await tunnel.send_all(b"x")
        await peer.fence()
        assert len(sent(peer)) == 3


@pytest.mark.wire("W-CLOSE-5")
async def test_aclose_after_the_peers_end_is_only_our_end() -> None:
    async with against_a_hand_made_client() as (peer, tunnel):
        await peer.send(frames.data(1, b"unread", end=True))
        await peer.fence()
        await tunnel.aclose()
        await peer.fence()
        assert sent(peer) == [("END", 0)]


@pytest.mark.wire("W-CLOSE-5")
async def test_aclose_after_both_ends_says_nothing() -> None:
    async with against_a_hand_made_client() as (peer, tunnel):
        await tunnel.send_eof()
        await tunnel.send_eof()
        await peer.send(frames.data(1, end=True))
        assert await tunnel.receive_some() == b""
        await tunnel.aclose()
        await peer.fence()
        assert sent(peer) == [("END", 0)]


async def test_aclose_after_send_eof_only_gives_up() -> None:
    async with against_a_hand_made_client() as (peer, tunnel):
        await tunnel.send_eof()
        await tunnel.aclose()
        await peer.fence()
        assert sent(peer) == [("END", 0), ("RST", Code.CANCEL)]


@pytest.mark.wire("W-RST-7")
async def test_a_block_that_is_left_by_an_exception_looks_incomplete() -> None:
    async with against_a_hand_made_client() as (peer, tunnel):

        async def work() -> None:
            async with tunnel:
                await tunnel.send_all(b"half")
                raise KeyError

        with pytest.raises(KeyError):
            await work()
        await peer.fence()
        assert sent(peer) == [("DATA", 4), ("RST", Code.CANCEL)]


@pytest.mark.wire("W-RST-7")
@pytest.mark.parametrize("block", [True, False])
async def test_a_cancelled_tunnel_looks_incomplete(block: bool) -> None:
    async with against_a_hand_made_client() as (peer, tunnel):
        with trio.CancelScope() as scope:
            scope.cancel()
            if block:
                async with tunnel:
                    await trio.sleep_forever()
            else:
                await tunnel.aclose()
        assert scope.cancelled_caught
        await peer.fence()
        assert sent(peer) == [("RST", Code.CANCEL)]


async def test_aclose_wakes_those_who_wait() -> None:
    async with memory_pair(limits=SMALL) as pair:
        near, _ = await pair.open()
        await near.send_all(bytes(WINDOW))

        async def expect(operation: Any) -> None:
            with pytest.raises(trio.ClosedResourceError):
                await operation

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect, near.receive_some())
            nursery.start_soon(expect, near.send_all(b"x"))
            await trio.testing.wait_all_tasks_blocked()
            await near.aclose()


@pytest.mark.wire("W-RST-8", "W-RST-9", "W-FLOW-9")
async def test_what_comes_after_our_reset_is_ignored() -> None:
    async with against_a_hand_made_client() as (peer, tunnel):
        await tunnel.aclose()
        await peer.fence()
        await peer.send(*[frames.data(1, bytes(16_000))] * 270)  # more than a quarter of the session's window
        await peer.send(frames.window_update(1, 1000), frames.data(1, end=True), frames.rst(1))
        await peer.fence()
        assert peer.ended is None
        assert sum(f.increment for f in peer.log if f.kind == Kind.WINDOW_UPDATE and f.stream == 0) > 4_000_000
        await peer.send(frames.connect(3, TARGET))
        assert (await peer.wait_for(Kind.HEADERS, stream=3)).status == 200


# === resets and ends ===


@pytest.mark.wire("W-RST-5", "W-RST-3")
@pytest.mark.parametrize("code", [Code.NO_ERROR, Code.CANCEL, Code.INTERNAL_ERROR, 0xDEAD])
async def test_a_reset_before_the_end_is_never_an_end(code: int) -> None:
    async with against_a_hand_made_client() as (peer, tunnel):
        await peer.send(frames.data(1, b"abc"), frames.rst(1, code))
        await peer.fence()
        assert await tunnel.receive_some() == b"abc"
        with pytest.raises(trio.BrokenResourceError) as caught:
            await tunnel.receive_some()
        assert isinstance(caught.value.__cause__, TunnelReset)
        assert caught.value.__cause__.error_code == code


@pytest.mark.wire("W-RST-6")
async def test_a_reset_after_the_end_takes_away_only_our_direction() -> None:
    async with against_a_hand_made_client() as (peer, tunnel):
        await peer.send(frames.data(1, b"all there is", end=True), frames.rst(1, Code.CANCEL))
        await peer.fence()
        assert await tunnel.receive_some(3) == b"all"
        with pytest.raises(trio.BrokenResourceError):
            await tunnel.send_all(b"x")
        assert await tunnel.receive_some() == b" there is"
        assert await tunnel.receive_some() == b""
        assert await tunnel.receive_some() == b""


@pytest.mark.wire("W-RST-6", "W-RST-4")
async def test_the_end_of_the_session_after_the_end_of_the_tunnel_takes_away_only_our_direction() -> None:
    async with memory_pair() as pair:
        near, far = await pair.open()
        await far.send_all(b"all there is")
        await far.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        pair.far_session.kill()
        await trio.testing.wait_all_tasks_blocked()
        assert pair.client.closed
        assert await near.receive_some() == b"all there is"
        assert await near.receive_some() == b""
        with pytest.raises(trio.BrokenResourceError):
            await near.send_all(b"x")


@pytest.mark.wire("W-CLOSE-6", "W-ERR-1")
async def test_data_after_the_end_costs_the_stream() -> None:
    async with against_a_hand_made_client() as (peer, tunnel):
        await peer.send(frames.data(1, b"abc", end=True), frames.data(1, b"more"))
        assert (await peer.wait_for(Kind.RST_STREAM, stream=1)).code == Code.STREAM_CLOSED
        assert await tunnel.receive_some() == b"abc"
        assert await tunnel.receive_some() == b""
        await peer.fence()


# === windows ===


@pytest.mark.wire("W-LIM-8", "W-FLOW-6", "W-FLOW-3")
async def test_what_is_not_read_is_bounded_by_the_window() -> None:
    async with against_a_hand_made_client(limits=SMALL) as (peer, tunnel):
        await peer.send(*[frames.data(1, bytes(13_107))] * 5)
        await peer.fence()
        assert tunnel.statistics().receive_buffered == WINDOW
        await tunnel.receive_some(WINDOW // 8)
        await peer.fence()
        assert not [
            f for f in peer.log if f.kind == Kind.WINDOW_UPDATE and f.stream == 1
        ]  # in steps, not for each byte
        await tunnel.receive_some(WINDOW // 4)
        credit = (await peer.wait_for(Kind.WINDOW_UPDATE, stream=1)).increment
        assert credit == WINDOW // 8 + WINDOW // 4
        await peer.send(frames.data(1, bytes(13_107)))
        await peer.send(frames.data(1, bytes(13_107)))
        assert (await peer.wait_for(Kind.RST_STREAM, stream=1)).code == Code.FLOW_CONTROL_ERROR
        with pytest.raises(trio.BrokenResourceError):
            await receive_all(tunnel)


@pytest.mark.wire("W-FLOW-5", "W-SET-4")
async def test_the_peers_windows_hold_us_as_they_are_now() -> None:
    async with against_a_hand_made_client() as (peer, tunnel), trio.open_nursery() as nursery:
        done = trio.Event()

        async def send() -> None:
            await tunnel.send_all(bytes(150_000))
            done.set()

        nursery.start_soon(send)
        await peer.fence()

        def total() -> int:
            return sum(length for what, length in sent(peer) if what == "DATA")

        assert total() == 100_000
        await peer.send(frames.settings({Setting.INITIAL_WINDOW_SIZE: 60_000}), frames.window_update(1, 30_000))
        await peer.fence()
        assert total() == 100_000  # the window is still negative
        assert tunnel.statistics().send_window == -10_000
        await peer.send(frames.settings({Setting.INITIAL_WINDOW_SIZE: 80_000}))
        await peer.fence()
        assert total() == 110_000
        await peer.send(frames.window_update(1, 40_000))
        await done.wait()
        await peer.fence()
        assert total() == 150_000
        assert max(length for _, length in sent(peer)) <= 16_384


@pytest.mark.wire("W-SET-4", "W-FLOW-5")
@pytest.mark.parametrize("largest", [16_384, 20_000, 65_536, 1 << 20])
async def test_frames_are_no_longer_than_the_peer_takes(largest: int) -> None:
    async with against_a_hand_made_client() as (peer, tunnel):
        await peer.send(
            frames.settings({Setting.MAX_FRAME_SIZE: largest, Setting.INITIAL_WINDOW_SIZE: 1 << 20}),
        )
        await peer.fence()
        await tunnel.send_all(bytes(300_000))
        await peer.fence()
        lengths = [length for what, length in sent(peer) if what == "DATA"]
        assert sum(lengths) == 300_000
        assert max(lengths) <= largest


@pytest.mark.wire("W-FLOW-8", "W-POOL-2")
async def test_tunnels_that_wait_for_the_sessions_window_take_turns() -> None:
    """A window of 64 KiB for the whole session, and five uploads: each gets its share."""
    roomy = Limits(stream_window=1 << 20, connection_window=65_535)
    async with memory_pair(server_limits=roomy) as pair, trio.open_nursery() as nursery:
        tunnels = [await pair.open() for _ in range(5)]
        received = [0] * 5

        async def sink(index: int) -> None:
            far = tunnels[index][1]
            while data := await far.receive_some():
                received[index] += len(data)
                if sum(received) > 20 * 65_535:
                    nursery.cancel_scope.cancel()

        for index, (near, _) in enumerate(tunnels):
            nursery.start_soon(sink, index)
            nursery.start_soon(near.send_all, bytes(2_000_000))
    assert min(received) * 2 > max(received), received


@pytest.mark.wire("W-FLOW-1", "W-FLOW-2", "W-LIM-8")
async def test_tunnels_that_nobody_reads_do_not_stop_the_others() -> None:
    async with memory_pair(limits=Limits(stream_window=65_535, connection_window=65_535)) as pair:
        for _ in range(8):
            near, far = await pair.open()
            await near.send_all(bytes(65_535))
            await far.send_all(bytes(65_535))
        await trio.testing.check_two_way_stream(pair.open, None)


async def test_a_sender_that_was_cancelled_leaves_whole_frames_behind() -> None:
    async with memory_pair(limits=SMALL) as pair:
        near, far = await pair.open()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(near.send_all, bytes(3 * WINDOW))
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert near.statistics().bytes_sent == WINDOW
        near.abort()
        await trio.testing.wait_all_tasks_blocked()
        assert len(await far.receive_some()) == WINDOW
        with pytest.raises(trio.BrokenResourceError):
            await far.receive_some()
        await trio.testing.check_two_way_stream(pair.open, None)


async def test_wait_send_all_might_not_block_waits_for_credit() -> None:
    async with memory_pair(limits=SMALL) as pair, trio.open_nursery() as nursery:
        near, far = await pair.open()
        await near.wait_send_all_might_not_block()
        await near.send_all(bytes(WINDOW))
        waited = False

        async def wait() -> None:
            nonlocal waited
            await near.wait_send_all_might_not_block()
            waited = True

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not waited
        await far.receive_some()
        await trio.testing.wait_all_tasks_blocked()
        assert waited


# === answers ===


async def test_a_request_that_is_never_answered_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    async def script(peer: Scripted) -> None:
        await peer.open()
        assert (await peer.wait_for(Kind.RST_STREAM, stream=1)).code == Code.CANCEL
        await peer.wait_end()

    async with scripted_server(script, timeouts=Timeouts(request=7)) as client:
        began = trio.current_time()
        with pytest.raises(Exception, match="no tunnel to 10.0.0.7:8080") as caught:
            await client.open_tunnel(TARGET)
        assert type(caught.value).__name__ == "ConnectFailed"
        assert trio.current_time() - began == pytest.approx(7)
        assert client.statistics().open_streams == 0


@pytest.mark.wire("W-GOAWAY-2")
async def test_goaway_below_a_request_makes_it_safe_to_ask_elsewhere() -> None:
    async def script(peer: Scripted) -> None:
        await peer.open()
        await peer.wait_for(Kind.HEADERS, stream=1)
        await peer.send(frames.goaway(0))
        await peer.wait_end()

    async with scripted_server(script) as client:
        with pytest.raises(StreamRefused):
            await client.open_tunnel(TARGET)
        with pytest.raises((StreamRefused, SessionClosed)):
            await client.open_tunnel(TARGET)
