"""Child processes that say in JSON lines what happens, write a log, and do not outlive us.

Each has a process group of its own, so that a Ctrl-C on the terminal is ours alone to deal with, and a pipe of ours as
its standard input, whose end tells it to leave: also when we are killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import IO, TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

__all__ = ["Child", "ChildFailed"]

#: Seconds for a child to leave by itself.
_LEAVE: Final = 4.0
_TAIL: Final = 2000
_ACCESS: Final = "\taccess\t"


class ChildFailed(Exception):
    """A process ended, or did not say what it should in time; the message has its last words."""


class Child:
    """A process of the demo, from `__init__` to `close`. It loads what it needs and waits for what `run` tells it.

    Args:
        name: for messages.
        what: ``node`` or ``app``.
        on_line: called, in a thread, with each line of its log.

    Attributes:
        lines: of its access log.
        notes: all other lines of its log.
    """

    def __init__(self, name: str, what: str, on_line: Callable[[str], None] | None = None) -> None:
        self.name = name
        self.lines: list[str] = []
        self.notes: list[str] = []
        self._on_line = on_line
        self._events: list[dict[str, Any]] = []
        self._words: list[str] = []
        self._news = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hbone_cli._demo_guard", what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        self._streams = (self._process.stdout, self._process.stderr)
        self._open = len(self._streams)
        self._readers = [
            threading.Thread(target=self._read, args=(stream, hear), name=f"demo {name}", daemon=True)
            for stream, hear in zip(self._streams, (self._hear_log, self._hear_event), strict=True)
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def run(self, directory: Path, *words: str) -> None:
        """Let it do something in a directory: the words of a command.

        Raises:
            ChildFailed: it is gone.
        """
        assert self._process.stdin is not None
        order = {"directory": str(directory), "words": words}
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failure("has ended") from None

    def address(self, way: str, timeout: float = 30.0) -> str:
        """Where it listens, as soon as it does.

        Raises:
            ChildFailed: it ended instead, or took too long. The same for all that wait.
        """

        def said() -> list[str]:
            return [event["address"] for event in self._events if event.get("way") == way]

        self._wait(lambda: bool(said()), timeout, "did not start")
        return said()[0]

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Wait until it says so."""
        self._wait(lambda: {"event": "ready"} in self._events, timeout, "was not ready")

    def wait_lines(self, count: int, timeout: float = 30.0) -> list[str]:
        """Wait until there are so many lines of its access log; gives all of them."""
        self._wait(lambda: len(self.lines) >= count, timeout, f"wrote fewer than {count} lines of access log")
        return list(self.lines)

    def wait_note(self, words: str, count: int = 1, timeout: float = 30.0) -> str:
        """Wait for so many lines of its log that have these words; gives the last of them."""

        def said() -> list[str]:
            return [note for note in self.notes if words in note]

        self._wait(lambda: len(said()) >= count, timeout, f"logged no {words!r}")
        return said()[-1]

    def close_soon(self) -> None:
        """Tell it to leave."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:
            pass

    def close(self) -> None:
        """Make sure that it is gone."""
        self.close_soon()
        try:
            self._process.wait(_LEAVE)
        except subprocess.TimeoutExpired:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()
        for reader, stream in zip(self._readers, self._streams, strict=True):
            reader.join(_LEAVE)
            assert stream is not None
            stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, stream: IO[bytes], hear: Callable[[str], None]) -> None:
        for raw in stream:
            line = raw.decode("utf-8", "replace").rstrip("\n")
            with self._news:
                hear(line)
                self._news.notify_all()
            if self._on_line is not None and stream is self._process.stdout:
                self._on_line(line)
        with self._news:
            self._open -= 1
            self._news.notify_all()

    def _hear_log(self, line: str) -> None:
        (self.lines if _ACCESS in line else self.notes).append(line)

    def _hear_event(self, line: str) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            event = {"message": line}
        self._events.append(event)
        if "message" in event:
            self._words += event.get("messages", [event["message"]])

    def _wait(self, happened: Callable[[], bool], timeout: float, otherwise: str) -> None:
        deadline = time.monotonic() + timeout
        with self._news:
            while not happened():
                left = deadline - time.monotonic()
                if not self._open or left <= 0:
                    break
                self._news.wait(left)
            else:
                return
        raise self._failure(f"{otherwise} within {timeout:g} s" if self._open else "has ended")

    def _failure(self, what: str) -> ChildFailed:
        said = "\n".join(self._words)[-_TAIL:]
        return ChildFailed(f"{self.name} {what}" + (f"; it said:\n{said}" if said else ""))
