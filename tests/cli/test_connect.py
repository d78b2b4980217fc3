"""``hbone connect``: exact half-close over whatever standard input and output are, fast, and honest about its end."""

from __future__ import annotations

import hashlib
import os
import pty
import shutil
import signal
import socket
import subprocess
import threading

import pytest
from support.backends import Backend, echo, ends_first, generate, pattern, pattern_sha, resets_after, sink
from support.command import HBONE, WAIT, Node, environment, files, hbone

MIB = 1 << 20
BULK = 64 * MIB


@pytest.fixture
def words(pki, near):
    """What each of these commands is called with, but for the target."""
    return ["--via", near.address(), *files(pki.client)]


def start(*words, **pipes):
    return subprocess.Popen([*HBONE, "connect", *words], env=environment(), **pipes)


def read_all(stream):
    digest, size = hashlib.sha256(), 0
    while chunk := stream.read(1 << 18):
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def feed(stream, size):
    """Writes `pattern(size)` and the end, in a thread."""

    def write():
        for piece in pattern(size):
            stream.write(piece)
        stream.close()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


def test_the_end_of_the_input_is_not_the_end_of_the_tunnel(words):
    with Backend(sink) as app:
        result = hbone("connect", app.target, *words, input=b"all of it")
        assert result.out == hashlib.sha256(b"all of it").hexdigest().encode()
        assert (result.code, result.err) == (0, "")
        assert app.wait_connection().end == "eof"


def test_the_end_of_the_output_is_not_the_end_of_the_input(words):
    """As ssh's ProxyCommand: the other side has said all; what we say still arrives."""
    with Backend(ends_first(1000)) as app:
        process = start(app.target, *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert read_all(process.stdout) == (1000, pattern_sha(1000))  # to its end, while our input is open
        assert process.poll() is None
        process.stdin.write(b"afterwards")
        process.stdin.close()
        assert process.wait(WAIT) == 0
        seen = app.wait_connection()
        assert (seen.received, seen.end) == (10, "eof")
        process.stdout.close()


def test_a_conversation(words):
    """Nothing waits for more input than there is."""
    with Backend(echo) as app:
        process = start(app.target, *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for line in (b"first\n", b"second\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline() == line
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.wait(WAIT) == 0
        process.stdout.close()


def test_bulk_through_pipes(words):
    with Backend(echo) as app:
        process = start(app.target, *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        feeder = feed(process.stdin, BULK)
        assert read_all(process.stdout) == (BULK, pattern_sha(BULK))
        feeder.join()
        assert process.wait(WAIT) == 0
        process.stdout.close()


def test_names_are_resolved_here(words, near):
    with Backend(echo) as app:
        result = hbone("connect", f"localhost:{app.port}", *words, input=b"x")
        assert (result.code, result.out) == (0, b"x")
        assert f"dst.hbone_addr={app.target} " in near.access(app.target)


def test_files(words, tmp_path):
    source, result = tmp_path / "in", tmp_path / "out"
    with source.open("wb") as file:
        file.writelines(pattern(8 * MIB))
    with Backend(echo) as app, source.open("rb") as stdin, result.open("wb") as stdout:
        assert start(app.target, *words, stdin=stdin, stdout=stdout).wait(WAIT) == 0
    assert hashlib.sha256(result.read_bytes()).hexdigest() == pattern_sha(8 * MIB)


def test_dev_null(words):
    with Backend(generate(1000)) as app:
        process = start(app.target, *words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert read_all(process.stdout) == (1000, pattern_sha(1000))
        assert process.wait(WAIT) == 0
        process.stdout.close()
        assert start(app.target, *words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).wait(WAIT) == 0


def test_one_socket_for_both(words):
    """As inetd and ssh's ProxyUseFdpass start programs."""
    ours, theirs = socket.socketpair()
    with Backend(echo) as app, ours:
        process = start(app.target, *words, stdin=theirs, stdout=theirs)
        theirs.close()
        feeder = feed(ours.makefile("wb"), 8 * MIB)
        received, digest = 0, hashlib.sha256()
        while received < 8 * MIB:
            chunk = ours.recv(1 << 18)
            received += len(chunk)
            digest.update(chunk)
        feeder.join()
        ours.shutdown(socket.SHUT_WR)
        assert ours.recv(1) == b""
        assert (received, digest.hexdigest()) == (8 * MIB, pattern_sha(8 * MIB))
        assert process.wait(WAIT) == 0


def test_terminal(words):
    """A terminal is shared with the shell: it must be as it was."""
    with Backend(echo) as app:
        control, terminal = pty.openpty()
        process = start(app.target, *words, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE)
        os.write(control, b"typed\n")
        shown = b""
        while shown.count(b"typed") < 2:  # the terminal's own echo, and ours
            shown += os.read(control, 100)
        assert os.get_blocking(terminal)
        os.write(control, b"\x04")  # Ctrl-D
        assert process.wait(WAIT) == 0
        assert process.stderr.read() == b""
        process.stderr.close()
        os.close(control)
        os.close(terminal)


def test_pipes_are_as_they_were(words):
    reading, writing = os.pipe()
    with Backend(echo) as app:
        process = start(app.target, *words, stdin=subprocess.DEVNULL, stdout=writing)
        assert process.wait(WAIT) == 0
        assert os.get_blocking(writing)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_closed_descriptors(words, closed):
    with Backend(generate(10)) as app:
        shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *HBONE, "connect", app.target, *words]
        result = subprocess.run(shell, capture_output=True, timeout=WAIT, check=False, env=environment())
        if closed == "<&-":
            assert (result.returncode, len(result.stdout), result.stderr) == (0, 10, b"")
        else:
            assert result.returncode == 2
            assert b"standard output is closed" in result.stderr


def test_nobody_reads_the_output(words):
    with Backend(generate(BULK)) as app:
        process = start(app.target, *words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(WAIT) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b"hbone: standard output: nobody reads it any more\n"
        process.stderr.close()
        app.wait_connection()


def test_full_disk(words):
    if not os.path.exists("/dev/full"):  # noqa: PTH110
        pytest.skip("no /dev/full here")
    with Backend(generate(1000)) as app, open("/dev/full", "wb") as full:  # noqa: PTH123
        process = start(app.target, *words, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE)
        assert process.wait(WAIT) == 13
        assert b"No space left" in process.stderr.read()
        process.stderr.close()


def test_a_reset_is_not_an_end(words):
    with Backend(resets_after(100, read=5)) as app:
        process = start(app.target, *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdin.write(b"hello")
        process.stdin.flush()  # and stays open
        assert process.wait(WAIT) == 13
        assert process.stderr.read().startswith(b"hbone: tunnel broken: the peer reset the tunnel: ")
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def test_a_reset_after_the_end_of_output_is_seen_at_once(words):
    """Also when nothing is read from the tunnel any more, and the input says nothing."""

    go = threading.Event()

    def habit(sock, seen):
        sock.shutdown(socket.SHUT_WR)
        go.wait(WAIT)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with Backend(habit) as app:
        process = start(app.target, *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout.read() == b""
        go.set()
        assert process.wait(WAIT) == 13
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals(words, number):
    with Backend(echo) as app:
        process = start(app.target, *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.stdout.read(1) == b"x"  # the application is reached before the tunnel stands: not that alone
        process.send_signal(number)
        assert process.wait(WAIT) == 128 + number
        assert process.stderr.read() == f"hbone: interrupted by {number.name}\n".encode()
        assert app.wait_connection().end == "reset"  # never an end of data
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def test_verbose_says_how(words, near, pki):
    with Backend(echo) as app:
        result = hbone("connect", app.target, *words, "-v", input=b"x")
    assert (result.code, result.out) == (0, b"x")
    line = f"hbone: tunnel to {app.target} by spiffe://cluster.local/ns/shop/sa/stock at {near.address()}: TLSv1.3, "
    assert line in result.err


def test_a_peer_that_goes_away_breaks_the_tunnel(pki):
    with Backend(echo) as app, Node.inbound(pki.server, "--to", app.target) as node:
        process = start(
            app.target,
            *("--via", node.address(), *files(pki.client)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.stdout.read(1) == b"x"
        node.kill()
        assert process.wait(WAIT) == 13
        assert process.stderr.read().startswith(b"hbone: tunnel broken: ")
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def test_a_slow_reader_loses_nothing(words):
    with Backend(generate(3 * MIB)) as app:
        process = start(app.target, *words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        app.wait_connection()  # it has sent all, and nobody has read
        assert read_all(process.stdout) == (3 * MIB, pattern_sha(3 * MIB))
        assert process.wait(WAIT) == 0
        process.stdout.close()


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar here")
def test_tar_through_a_pipe(words, tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "from" / "file").write_bytes(b"".join(pattern(MIB)))
    with Backend(echo) as app:
        inner = " ".join([*HBONE, "connect", app.target, *words])
        shell = f"tar c -C {tmp_path}/from . | {inner} | tar x -C {tmp_path}/to"
        subprocess.run(["sh", "-c", shell], check=True, timeout=WAIT, env=environment())
    assert (tmp_path / "to" / "file").read_bytes() == (tmp_path / "from" / "file").read_bytes()
