"""The ``hbone`` command as a process: what it says, when it says it, and how it ends.

with Node.outbound(leaf, "--socks", "0", "--via", inbound.address()) as out:
    dial(out.port("socks"))
    ...
    assert out.stop() == 0
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.certs import Leaf

__all__ = ["HBONE", "Finished", "Lines", "Node", "files", "hbone", "hbone_of_anybody"]

HBONE = (sys.executable, "-m", "hbone_cli")
WAIT = 60.0
"""Bound of every wait, in seconds: reached only when something hangs."""

# Root reads every file and gets every port by its capabilities, not by its number. What it drops here is gone with
# exec: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_NET_BIND_SERVICE, by PR_CAPBSET_DROP. It stays the owner of its
# files, so it still finds its Python wherever that is.
_AS_ANYBODY = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for capability in (1, 2, 10):
    if libc.prctl(24, capability, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
os.execv(sys.argv[1], sys.argv[1:])
"""


def environment(**more: str) -> dict[str, str]:
    """Ours, without options that somebody has in theirs."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HBONE_")} | more


def files(leaf: Leaf) -> list[str]:
    """The options that name a leaf's files."""
    return ["--cert", str(leaf.cert), "--key", str(leaf.key), "--roots", str(leaf.roots)]


class Finished:
    """A command that has ended."""

    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code = code
        self.out = out
        self.err = err.decode()

    @property
    def line(self) -> str:
        """What it said on standard error, which must be one line and no traceback."""
        assert "Traceback" not in self.err
        (line,) = self.err.splitlines()
        return line


def hbone(*words: str, input: bytes = b"", env: dict[str, str] | None = None, timeout: float = WAIT) -> Finished:
    """Run a command to its end."""
    result = subprocess.run(
        [*HBONE, *words], input=input, capture_output=True, timeout=timeout, check=False, env=env or environment()
    )
    return Finished(result.returncode, result.stdout, result.stderr)


def hbone_of_anybody(*words: str) -> Finished:
    """The same by somebody who may no more than others, also when we are root (on Linux)."""
    drop = [sys.executable, "-c", _AS_ANYBODY] if os.geteuid() == 0 else []
    command = [*drop, *HBONE, *words]
    result = subprocess.run(command, input=b"", capture_output=True, timeout=WAIT, check=False, env=environment())
    return Finished(result.returncode, result.stdout, result.stderr)


class Lines:
    """The lines of a pipe, as they come, in a thread."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._lines: list[str] = []
        self._came = threading.Condition()
        self._ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for raw in self._pipe:
            with self._came:
                self._lines.append(raw.decode().rstrip("\n"))
                self._came.notify_all()
        self._pipe.close()
        with self._came:
            self._ended = True
            self._came.notify_all()

    @property
    def now(self) -> list[str]:
        """Those that have come."""
        with self._came:
            return list(self._lines)

    def all(self) -> list[str]:
        """All of them, once there will be no more."""
        with self._came:
            assert self._came.wait_for(lambda: self._ended, WAIT), "the output goes on"
            return list(self._lines)

    def wait_number(self, wanted: Callable[[str], bool], number: int, what: str) -> None:
        """Until so many lines that are wanted have come."""
        with self._came:
            self._came.wait_for(lambda: self._ended or sum(map(wanted, self._lines)) >= number, WAIT)
            assert sum(map(wanted, self._lines)) >= number, f"waiting for {number} {what}; there was {self._lines}"

    def wait(self, wanted: Callable[[str], bool], what: str) -> str:
        """The first line that is wanted."""

        def found() -> str | None:
            return next((line for line in self._lines if wanted(line)), None)

        with self._came:
            self._came.wait_for(lambda: found() is not None or self._ended, WAIT)
            line = found()
            assert line is not None, f"waiting for {what}; there was {self._lines}"
            return line


class Node:
    """A proxy that runs, and says what happens as JSON (unless told otherwise; then nobody waits until it is ready)."""

    def __init__(
        self, *words: str, json_lines: bool = True, env: dict[str, str] | None = None, prefix: tuple[str, ...] = ()
    ) -> None:
        self.process = subprocess.Popen(
            [*prefix, *HBONE, *words, *(["--json"] if json_lines else [])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(**(env or {})),
        )
        self.log = Lines(self.process.stdout)
        self.said = Lines(self.process.stderr)
        if json_lines:
            try:
                self.event("ready")
            except BaseException:
                self.kill()
                raise

    @classmethod
    def inbound(cls, leaf: Leaf, *words: str) -> Self:
        """On a free port of the loopback; to it, unless told otherwise."""
        return cls("inbound", "--listen", "127.0.0.1:0", *files(leaf), *words)

    @classmethod
    def outbound(cls, leaf: Leaf, *words: str) -> Self:
        return cls("outbound", *files(leaf), *words)

    def event(self, name: str, **facts: object) -> dict[str, Any]:
        """The first event of this name with these facts, waited for."""

        def wanted(line: str) -> bool:
            event = json.loads(line)
            return event["event"] == name and all(event.get(key) == value for key, value in facts.items())

        event: dict[str, Any] = json.loads(self.said.wait(wanted, f"{name} {facts}"))
        return event

    def address(self, way: str = "inbound") -> str:
        """Where it listens."""
        return str(self.event("listening", way=way)["address"])

    def port(self, way: str = "inbound") -> int:
        return int(self.address(way).rpartition(":")[2])

    def access(self, wanted: str) -> str:
        """The access-log line that contains a text, waited for."""
        return self.log.wait(lambda line: wanted in line, f"an access line with {wanted!r}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """How it ends."""
        return self.process.wait(WAIT)

    def stop(self) -> int:
        """Tell it to stop, and see how it does."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(WAIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        self.log.all()
        self.said.all()
