"""Child processes that talk in JSON lines and do not outlive us.

Each has a process group of its own, so that a Ctrl-C on the terminal is ours alone to deal with, and a pipe of ours as
its standard input, whose end tells it to leave: also when we are killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO, TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["Child", "ChildFailed"]

#: Seconds for a child to leave by itself.
_LEAVE: Final = 4.0
_TAIL: Final = 2000


class ChildFailed(Exception):
    """A process ended, or did not say what it should in time; the message has its last words."""


class Child:
    """One ``hbone demo-node``, from `__init__` to `close`.

    Args:
        name: for messages.
        what: ``node`` or ``app``.
        on_line: called, in a thread, with each line of its access log.

    Attributes:
        lines: of its access log.
        notes: what its library has logged.
    """

    def __init__(self, name: str, what: str, on_line: Callable[[str], None] | None = None) -> None:
        self.name = name
        self.lines: list[str] = []
        self.notes: list[str] = []
        self._on_line = on_line
        self._facts: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._ended = False
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hbone_cli", "demo-node", what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            process_group=0,
        )
        self._reader = threading.Thread(target=self._read, name=f"demo {name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def tell(self, **order: object) -> None:
        """Send an order.

        Raises:
            ChildFailed: it is gone.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failure("has ended") from None

    def hear(self, timeout: float = 30.0) -> dict[str, Any]:
        """The next thing that it says of itself.

        Raises:
            ChildFailed: it ended instead, or took too long.
        """
        self._wait(lambda: bool(self._facts), timeout, "did not start")
        return self._facts.pop(0)

    def wait_lines(self, count: int, timeout: float = 30.0) -> list[str]:
        """Wait until there are so many lines of its access log; gives all of them.

        Raises:
            ChildFailed: it ended instead, or took too long.
        """
        self._wait(lambda: len(self.lines) >= count, timeout, f"wrote fewer than {count} lines of access log")
        return list(self.lines)

    def wait_note(self, timeout: float = 30.0) -> str:
        """Wait for something in the log of its library; gives the last of it.

        Raises:
            ChildFailed: it ended instead, or took too long.
        """
        self._wait(lambda: bool(self.notes), timeout, "logged nothing")
        return self.notes[-1]

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
        self._reader.join(_LEAVE)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode("utf-8", "replace").rstrip("\n")
            facts = json.loads(line) if line.startswith("{") else None
            with self._news:
                if facts is None:
                    self.lines.append(line)
                elif "log" in facts:
                    self.notes.append(facts["log"])
                else:
                    self._facts.append(facts)
                self._news.notify_all()
            if self._on_line is not None and facts is None:
                self._on_line(line)
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _wait(self, happened: Callable[[], bool], timeout: float, otherwise: str) -> None:
        deadline = time.monotonic() + timeout
        with self._news:
            while not happened():
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    break
                self._news.wait(left)
            else:
                return
        raise self._failure("has ended" if self._ended else f"{otherwise} within {timeout:g} s")

    def _failure(self, what: str) -> ChildFailed:
        # pread: the child writes where our common file position is.
        said = os.pread(self._errors.fileno(), 1 << 20, 0).decode("utf-8", "replace").strip()[-_TAIL:]
        return ChildFailed(f"{self.name} {what}" + (f"; it said:\n{said}" if said else ""))
