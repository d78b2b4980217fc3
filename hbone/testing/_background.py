"""trio in a thread of its own, for tests that are not async: start tasks in it, run functions in it, end it.

What goes wrong in there must not stay there. A task that fails ends all others, so that a test which waits for one of
their sockets goes on; from then on every call raises `BackgroundError` with the failure as its cause. If there was no
call, the end of the block raises it.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

__all__ = ["Background", "BackgroundError"]

T = TypeVar("T")

#: Seconds for a cancelled nursery to end. Only a task that does not let itself be cancelled needs more.
_STOP_TIMEOUT = 30.0


class BackgroundError(Exception):
    """Something in the background failed: ``__cause__`` is what."""


class Background:
    """A running trio, as a ``with`` block. Its methods are called from other threads, those of another trio too.

    They block the caller. What they start is cancelled when the block ends.
    """

    def __init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="hbone testing", daemon=True)
        self._ready = threading.Event()
        self._pending: set[Future[Any]] = set()
        self._failures: list[BaseException] = []
        self._told = False
        self._token: trio.lowlevel.TrioToken
        self._nursery: trio.Nursery

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._token.run_sync_soon(self._nursery.cancel_scope.cancel)
        except trio.RunFinishedError:
            pass
        self._thread.join(_STOP_TIMEOUT)
        if self._thread.is_alive():
            raise RuntimeError(f"a task in the background did not end within {_STOP_TIMEOUT:g} s of being cancelled")
        if problem is None:
            if not self._told:
                self.check()
        elif self._failures and not isinstance(problem, BackgroundError):
            problem.add_note(f"besides, in the background: {self._failures[0]!r}")

    def run(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run an async function in the background and wait for its result.

        Raises:
            BackgroundError: the background has failed or ended, before or while it ran.
            BaseException: what the function raises.
        """
        return self._call(function, *args)

    def run_sync(self, function: Callable[..., T], *args: Any) -> T:
        """The same for a function that is not async: what reads the state of tasks there."""

        async def call() -> T:
            await trio.lowlevel.checkpoint()
            return function(*args)

        return self._call(call)

    def start(self, function: Callable[..., Awaitable[object]], *args: Any) -> Any:
        """Start a task as `trio.Nursery.start` does, and wait for the value that it reports.

        Raises:
            BackgroundError: as `run`.
            BaseException: what the function raises before it reports that it has started.
        """
        return self._call(self._nursery.start, function, *args)

    def note_failure(self, error: BaseException) -> None:
        """Remember a failure that ends nothing but is to be raised all the same. Called from the background."""
        self._failures.append(error)

    def check(self) -> None:
        """Do nothing if nothing has failed.

        Raises:
            BackgroundError: something has.
        """
        if not self._failures:
            return
        self._told = True
        first, *others = self._failures
        also = f" (and {len(others)} more)" if others else ""
        raise BackgroundError(f"in the background: {type(first).__name__}: {first}{also}") from first

    # === in the thread ===

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the thread that waits for us
            self._failures.append(_the_only_one(error))
        finally:
            for future in list(self._pending):
                self._settle(future, error=BackgroundError("the background has ended"))
            self._ready.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self._nursery:
            self._ready.set()
            await trio.sleep_forever()

    def _call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        if not self._thread.is_alive():
            self.check()
            raise BackgroundError("the background has ended" if self._thread.ident else "the background has not begun")
        future: Future[T] = Future()
        self._pending.add(future)
        try:
            self._token.run_sync_soon(partial(self._spawn, future, function, args))
        except trio.RunFinishedError:
            self._settle(future, error=BackgroundError("the background has ended"))
        try:
            return future.result()
        except BackgroundError:
            self._thread.join(_STOP_TIMEOUT)
            self.check()
            raise

    def _spawn(self, future: Future[T], function: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> None:
        async def call() -> None:
            try:
                result = await function(*args)
            except trio.Cancelled:
                self._settle(future, error=BackgroundError("the background has ended"))
                raise
            except BaseException as error:  # noqa: BLE001 - it is raised in the thread that asked
                self._settle(future, error=_the_only_one(error))
            else:
                self._settle(future, result=result)

        try:
            self._nursery.start_soon(call)
        except RuntimeError:  # closed: all its tasks have ended already
            self._settle(future, error=BackgroundError("the background has ended"))

    def _settle(self, future: Future[T], *, result: T | None = None, error: BaseException | None = None) -> None:
        if future not in self._pending:
            return
        self._pending.discard(future)
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]


def _the_only_one(error: BaseException) -> BaseException:
    """Out of the groups that nurseries wrap around one failure."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
