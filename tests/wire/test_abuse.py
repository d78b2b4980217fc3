"""An abuser loses its own connection, costs little memory, and hurts nobody else.

The server runs in a process of its own, where its memory can be measured. Beside each attack another client echoes
through a tunnel of its own session the whole time; at the end every byte must be right and no answer late.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from support import frames
from support.backends import Backend, echo, generate, hold, pattern
from support.certs import pki
from support.frames import Code, Kind, Setting
from support.rawpeer import WAIT, Ended, RawPeer

import hbone

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")

MIB = 1 << 20
MOST_GROWTH = 20 * MIB
"""RSS; the bound that is promised."""
MOST_DELAY = 15.0
"""Seconds that an honest client may wait for one answer while an attack runs: both share two cores with the test, and
with whatever else runs there."""


PATIENT = 3.0
"""Seconds in which a client that is not stalled does what it has to, also when it shares its cores."""


class Server:
    """The server's process."""

    def __init__(self, **options):
        leaf = pki().server
        script = Path(__file__).parent.parent / "support" / "serve.py"
        argv = [sys.executable, str(script), str(leaf.cert), str(leaf.key), str(leaf.roots), json.dumps(options)]
        # the product that these tests import, wherever that is
        env = {**os.environ, "PYTHONPATH": str(Path(hbone.__file__).parent.parent)}
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.port = int(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.stdin.close()
        try:
            code = self.process.wait(WAIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.process.stdout.close()
        if exc == (None, None, None):
            assert code == 0

    def rss(self):
        for line in Path(f"/proc/{self.process.pid}/status").read_text().split("\n"):
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the server is gone")

    def peak(self):
        """The highest RSS since `forget_peak`."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().split("\n"):
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the server is gone")

    def forget_peak(self):
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def sockets(self):
        """How many descriptors it has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def settle(self):
        """Its own word that it works."""
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def dial(self, **options):
        return RawPeer.dial(self.port, options.pop("leaf", pki().other), **options)


class Bystander:
    """An honest client in a thread: echoes all the time on one tunnel, checks each byte, remembers the longest wait."""

    def __init__(self, server, app):
        self._server = server
        self._app = app
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self.started = threading.Event()
        self.error = None
        self.longest = 0.0
        self.echoed = 0

    def _work(self):
        try:
            with self._server.dial(leaf=pki().client) as peer:
                peer.open()
                assert peer.tunnel(1, self._app.target) == 200
                sent, got = hashlib.sha256(), hashlib.sha256()
                pieces = list(pattern(MIB, piece=65_536))
                while not self._stop.is_set():
                    piece = pieces[self.echoed % len(pieces)]
                    since = time.monotonic()
                    peer.upload(1, [piece], end=False)
                    sent.update(piece)
                    left = len(piece)
                    while left:
                        data = peer.wait_for(Kind.DATA, stream=1).data
                        got.update(data)
                        left -= len(data)
                    self.longest = max(self.longest, time.monotonic() - since)
                    self.echoed += 1
                    self.started.set()
                    time.sleep(0.002)
                peer.send(frames.data(1, end=True))
                assert peer.take_data(1) == b""
                assert got.digest() == sent.digest()
                assert peer.goaway_code() is None
        except BaseException as error:
            self.error = error
            self.started.set()

    def __enter__(self):
        self._thread.start()
        assert self.started.wait(WAIT)
        return self

    def __exit__(self, *exc):
        self._stop.set()
        self._thread.join(WAIT)
        if exc[0] is None:
            if self.error is not None:
                raise self.error
            assert not self._thread.is_alive(), "the honest client is stuck"
            assert self.echoed > 1
            assert self.longest < MOST_DELAY


@contextlib.contextmanager
def under_attack(**options):
    """A server with an honest client on it; afterwards both are well, and memory has not grown beyond the bound."""
    with Backend(echo) as app, Server(**options) as server, Bystander(server, app):
        # one whole session first, so that what is made once is not counted as growth
        with server.dial() as peer:
            peer.open()
            assert peer.tunnel(1, app.target) == 200
            peer.send(frames.data(1, b"warm", end=True))
            peer.take_data(1)
        server.forget_peak()
        before = server.rss()
        yield server, app
        grown = server.peak() - before
        server.settle()
        with server.dial() as peer:  # newcomers are served
            peer.open()
            assert peer.tunnel(1, app.target) == 200
        assert grown <= MOST_GROWTH, f"RSS grew by {grown / MIB:.1f} MiB"
        print(f"RSS grew by {grown / MIB:.1f} MiB")


def flood(peer, raw, times, *, batch=100):
    """Sends `raw` over and over until it is done or cut off; returns how often it got through, about."""
    for n in range(0, times, batch):
        try:
            peer.send(raw * batch)
        except Ended:
            return n
    return times


def cut_off(peer, code=Code.ENHANCE_YOUR_CALM):
    """The abuser has lost its connection, with this word."""
    peer.wait_end()
    assert peer.goaway_code() == code


@pytest.mark.wire("W-LIM-5", "W-LIM-10")
def test_rapid_reset():
    with Backend(hold) as victim, under_attack() as (server, _), server.dial() as peer:
        peer.open()
        for stream in range(1, 40_001, 2):
            try:
                peer.send(frames.connect(stream, victim.target) + frames.rst(stream))
            except Ended:
                break
        cut_off(peer)
        for seen in list(victim.connections):
            assert seen.done.wait(WAIT), "a connection to the backend outlived its session"


@pytest.mark.wire("W-LIM-5")
def test_requests_that_make_us_reset_them():
    # CVE-2025-8671: the same with the roles turned; WINDOW_UPDATE of 0 makes the server send the reset.
    with Backend(hold) as victim, under_attack() as (server, _), server.dial() as peer:
        peer.open()
        for stream in range(1, 40_001, 2):
            try:
                peer.send(frames.connect(stream, victim.target) + frames.window_update(stream, 0))
            except Ended:
                break
        cut_off(peer)


def test_malformed_requests_without_end():
    with under_attack() as (server, _), server.dial() as peer:
        peer.open()
        for stream in range(1, 40_001, 2):
            try:
                peer.send(frames.headers(stream, [(":method", "CONNECT")]))
            except Ended:
                break
        cut_off(peer)


def test_requests_beyond_the_limit_without_end():
    with under_attack(limits={"max_concurrent_streams": 5}) as (server, app), server.dial() as peer:
        peer.open()
        for stream in range(1, 40_001, 2):
            try:
                peer.send(frames.connect(stream, app.target))
            except Ended:
                break
        cut_off(peer)


FLOODS = {
    "ping": frames.ping(),
    "ping_ack": frames.ping(ack=True),
    "settings": frames.settings({Setting.INITIAL_WINDOW_SIZE: 65_535}),
    "settings_empty": frames.settings(),
    "settings_ack": frames.settings(ack=True),
    "empty_data": frames.data(1),
    "empty_padded_data": frames.data(1, pad=0),
    "padding_only_data": frames.data(1, pad=255),
    "window_update": frames.window_update(1, 1),
    "window_update_session": frames.window_update(0, 1),
    "priority": frames.priority(1),
    "unknown_frames": frames.frame(0x42, 0, 0, b"?"),
    "rst_of_a_closed_stream": frames.rst(3),
    "data_on_a_closed_stream": frames.data(3, b"x"),
    "headers_on_a_reset_stream": frames.connect(5, "127.0.0.1:1"),
    "goaway": frames.goaway(0),
}


@pytest.mark.parametrize(
    ("kind", "reading"),
    [*((kind, True) for kind in FLOODS), ("ping", False), ("settings", False), ("data_on_a_closed_stream", False)],
    ids=lambda value: value if isinstance(value, str) else "reading" if value else "never_reading",
)
@pytest.mark.wire("W-LIM-4", "W-LIM-6", "W-LIM-7", "W-LIM-10")
def test_flood(kind, reading):
    timeouts = {"ping_interval": 1.0, "ping_timeout": PATIENT, "close": 0.5}
    with under_attack(timeouts=timeouts) as (server, app), server.dial() as peer:
        peer.open()
        assert peer.tunnel(1, app.target) == 200
        if kind.endswith("closed_stream"):
            assert peer.tunnel(3, app.target) == 200
            peer.send(frames.data(3, end=True))
            peer.take_data(3)
        if kind == "headers_on_a_reset_stream":
            peer.send(frames.headers(5, [(":method", "CONNECT")]))
            peer.wait_for(Kind.RST_STREAM, stream=5)
        peer.reading = reading
        try:
            flood(peer, FLOODS[kind], 200_000)
        except TimeoutError:
            assert not reading, "the server neither read nor let go"
        peer.wait_end()
        codes = {f.code for f in peer.log if f.kind == Kind.GOAWAY}
        assert codes <= {Code.ENHANCE_YOUR_CALM, Code.NO_ERROR}
        if reading:
            assert Code.ENHANCE_YOUR_CALM in codes


@pytest.mark.wire("W-LIM-2")
def test_continuation_without_end():
    with under_attack() as (server, _), server.dial() as peer:
        peer.open()
        peer.send(frames.headers(1, b"", end_headers=False))
        piece = frames.continuation(1, frames.block([("x", "y" * 60)]))
        flood(peer, piece, 200_000)
        cut_off(peer)


def test_empty_continuation_without_end():
    with under_attack() as (server, _), server.dial() as peer:
        peer.open()
        peer.send(frames.headers(1, b"", end_headers=False))
        flood(peer, frames.continuation(1, b""), 200_000)
        cut_off(peer)


@pytest.mark.wire("W-LIM-2")
def test_header_block_of_many_megabytes():
    with under_attack() as (server, _), server.dial() as peer:
        peer.open()
        peer.send_some(frames.headers(1, frames.block([("x", "y" * 16_000)] * 60), end_headers=True))
        cut_off(peer)


@pytest.mark.wire("W-LIM-1")
def test_hpack_bomb():
    # One large field goes into the table, then thousands of one-byte references to it: 40 MB out of 10 kB.
    large = b"\x40\x01x" + b"\x7f\x9d\x1e" + b"v" * 3996
    with under_attack() as (server, _), server.dial() as peer:
        peer.open()
        for stream in range(1, 401, 2):
            block = frames.block(frames.connect_headers("127.0.0.1:1")) + (large if stream == 1 else b"")
            try:
                peer.send(frames.headers(stream, block + b"\xbe" * 10_000))
            except Ended:
                break
        cut_off(peer)


def test_large_header_lists_without_end():
    block = frames.block(frames.connect_headers("127.0.0.1:1", *[(f"x-{n}", "v" * 1000) for n in range(100)]))
    # They are so large that with little of a processor they may be fewer than what is usually allowed in each second.
    limits = {"control_burst": 500, "control_per_second": 1}
    with under_attack(limits=limits, timeouts={"ping_timeout": WAIT}) as (server, _):
        with server.dial() as peer:
            peer.open()
            for stream in range(1, 20_001, 2):
                try:
                    peer.send(frames.headers(stream, block))
                except Ended:
                    break
            cut_off(peer)


@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.wire("W-FLOW-6", "W-ERR-2")
def test_window_overflow(stream):
    with under_attack() as (server, app), server.dial() as peer:
        peer.open()
        assert peer.tunnel(1, app.target) == 200
        peer.send(frames.window_update(stream, 2**31 - 1))
        if stream == 0:
            cut_off(peer, Code.FLOW_CONTROL_ERROR)
        else:
            assert peer.wait_for(Kind.RST_STREAM, stream=1).code == Code.FLOW_CONTROL_ERROR


def test_more_data_than_the_window():
    stop = threading.Event()
    with (
        under_attack() as (server, _),
        Backend(lambda sock, seen: stop.wait(WAIT), receive_buffer=4096) as app,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(stop.set)
        with server.dial() as peer:
            peer.open()
            assert peer.tunnel(1, app.target) == 200
            flood(peer, frames.data(1, bytes(16_384)), 4000, batch=16)
            first = peer.wait_for(where=lambda f: f.kind in (Kind.RST_STREAM, Kind.GOAWAY))
            assert first.code in (Code.FLOW_CONTROL_ERROR, Code.ENHANCE_YOUR_CALM)


# === who stalls ===


def stall_in_the_handshake(server, raw):
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(server.dial(handshake=False)) for _ in range(50)]
        for peer in peers:
            with contextlib.suppress(ConnectionError):  # if it was quicker
                peer.sock.send(raw) if raw else None
        for peer in peers:
            assert peer.wait_end() in ("eof", "reset", "alert", "close_notify")


def stall_in_the_preface(server, raw):
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(server.dial(quiet=True)) for _ in range(20)]
        if raw is None:  # a byte now and then does not buy more time
            with contextlib.suppress(Ended):
                for byte in frames.PREFACE + frames.settings()[:8]:
                    for peer in peers:
                        peer.send(bytes([byte]))
                    time.sleep(PATIENT * 0.06)
        for peer in peers:
            with contextlib.suppress(Ended):  # if it was quicker
                peer.send(raw or b"")
        for peer in peers:
            peer.wait_end()


def ask_for_nothing(server):
    with server.dial() as peer:
        peer.open()
        cut_off(peer, Code.NO_ERROR)


def answer_no_ping(server, app):
    with server.dial() as peer:
        peer.open()
        assert peer.tunnel(1, app.target) == 200
        peer.ack_pings = False
        peer.wait_end()


@pytest.fixture(scope="module")
def stalled():
    """What became of each kind of client that stalls. Each has to wait, so they wait at the same time."""
    times = dict.fromkeys(("handshake", "settings", "first_request", "ping_timeout"), PATIENT)
    ended = {}
    with under_attack(timeouts={**times, "ping_interval": 0.3, "close": 0.5}) as (server, app):
        kinds = {
            "nothing of a handshake": partial(stall_in_the_handshake, server, b""),
            "half a hello": partial(stall_in_the_handshake, server, bytes.fromhex("16030106000100")),
            "nothing": partial(stall_in_the_preface, server, b""),
            "half_a_preface": partial(stall_in_the_preface, server, frames.PREFACE[:12]),
            "preface_only": partial(stall_in_the_preface, server, frames.PREFACE),
            "drip": partial(stall_in_the_preface, server, None),
            "no request": partial(ask_for_nothing, server),
            "no ping": partial(answer_no_ping, server, app),
        }

        def stall(kind):
            try:
                kinds[kind]()
                ended[kind] = None
            except BaseException as error:
                ended[kind] = error

        threads = [threading.Thread(target=stall, args=[kind], daemon=True) for kind in kinds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * WAIT)

    def check(kind):
        error = ended.get(kind, TimeoutError("it has not ended"))
        if error is not None:
            raise error

    return check


@pytest.mark.parametrize("kind", ["nothing of a handshake", "half a hello"])
@pytest.mark.wire("W-LIM-9")
def test_stalled_handshakes(stalled, kind):
    stalled(kind)


@pytest.mark.parametrize("stage", ["nothing", "half_a_preface", "preface_only", "drip"])
def test_stalled_preface(stalled, stage):
    stalled(stage)


@pytest.mark.wire("W-LIM-9")
def test_no_connect_ever(stalled):
    stalled("no request")


@pytest.mark.wire("W-PING-3")
def test_no_answer_to_ping(stalled):
    stalled("no ping")


@pytest.mark.wire("W-LIM-7", "W-LIM-10")
def test_a_peer_that_never_reads():
    # It asks for downloads without end, grants all the credit there is, and reads nothing.
    timeouts = {"ping_interval": 0.3, "ping_timeout": PATIENT, "close": 0.5}
    with Backend(generate(64 * MIB)) as app, under_attack(timeouts=timeouts) as (server, _):
        with server.dial(receive_buffer=4096) as peer:
            peer.open({Setting.INITIAL_WINDOW_SIZE: 2**31 - 1, Setting.MAX_FRAME_SIZE: 2**24 - 1})
            peer.send(frames.window_update(0, 2**31 - 1 - 2**24))
            for stream in range(1, 101, 2):
                peer.send(frames.connect(stream, app.target, end_stream=True))
            deadline = time.monotonic() + WAIT
            while any(not seen.done.is_set() for seen in app.connections) or len(app.connections) < 50:
                assert time.monotonic() < deadline, "its backends are still held"
                time.sleep(0.05)


def test_unread_downloads_are_bounded_per_session():
    # It reads and grants credit for the session, but takes all it can get of many streams at once.
    with Backend(generate(8 * MIB)) as app, under_attack() as (server, _), server.dial() as peer:
        peer.keep_data = False
        peer.open({Setting.INITIAL_WINDOW_SIZE: 65_535})
        peer.give_credit = False
        for stream in range(1, 201, 2):
            peer.send(frames.connect(stream, app.target, end_stream=True))
        for stream in range(1, 201, 2):
            peer.wait_for(Kind.HEADERS, stream=stream)
        peer.fence()


@pytest.mark.wire("W-LIM-9", "W-LIM-10")
def test_ten_thousand_half_open_connections():
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 12_000:
        pytest.skip(f"needs 12000 file descriptors, may have {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held = []
    try:
        with under_attack(timeouts={"handshake": PATIENT, "close": 0.5}) as (server, _):
            for n in range(10_000):
                sock = socket.socket()
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    sock.connect(("127.0.0.1", server.port))
                held.append(sock)
                if n % 500 == 499:
                    time.sleep(0.01)
            for sock in held[1000:]:
                sock.close()
            deadline = time.monotonic() + WAIT
            with contextlib.suppress(TimeoutError):  # a newcomer gets in after the thousand that stall before it
                while time.monotonic() < deadline:
                    with contextlib.suppress(Ended, OSError), server.dial() as peer:
                        peer.open()
                        break
            assert time.monotonic() < deadline
            for sock in held:
                sock.close()
            while server.sockets() > 100:
                assert time.monotonic() < deadline + 15, "half-open connections are still held"
                time.sleep(0.05)
    finally:
        for sock in held:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_peer_that_acknowledges_each_byte_is_no_abuser():
    # Two WINDOW_UPDATE frames for each byte of an interactive session, as simple stacks send them.
    with under_attack() as (server, app), server.dial() as peer:
        peer.open()
        assert peer.tunnel(1, app.target) == 200
        for _ in range(3000):
            peer.send(frames.data(1, b"k"))
            assert peer.take_data(1, 1) == b"k"
        peer.send(frames.data(1, end=True))
        assert peer.take_data(1) == b""
        assert peer.goaway_code() is None
