"""The one place that says what the mesh is now."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, TypeAlias

from hbone.mesh._snapshot import MeshSnapshot

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MeshState"]

Subscriber: TypeAlias = "Callable[[MeshSnapshot, MeshSnapshot], None]"


class MeshState:
    """Holds the snapshot that counts, and tells its subscribers when another one does.

    Whoever decides something reads `snapshot` once and decides by that. All of it belongs to one thread; snapshots may
    be built in others.

    Args:
        snapshot: what to begin with; the empty mesh when not given.
    """

    def __init__(self, snapshot: MeshSnapshot | None = None) -> None:
        self._snapshot = MeshSnapshot() if snapshot is None else snapshot
        self._subscribers: dict[object, Subscriber] = {}
        self._untold: deque[tuple[MeshSnapshot, MeshSnapshot]] = deque()
        self._telling = False

    @property
    def snapshot(self) -> MeshSnapshot:
        """The mesh as it is now."""
        return self._snapshot

    def replace(self, snapshot: MeshSnapshot) -> None:
        """From now on the mesh is this one. Does nothing when it already was.

        Every subscriber has been told when this returns, even when some of them fail. A subscriber may call this too:
        then the subscribers hear of the second change after all of them have heard of the first.

        Raises:
            ExceptionGroup: subscribers failed; the snapshot is in place and all the others have been told.
        """
        if snapshot is self._snapshot:
            return
        self._untold.append((self._snapshot, snapshot))
        self._snapshot = snapshot
        if self._telling:
            return
        failures: list[Exception] = []
        self._telling = True
        try:
            while self._untold:
                old, new = self._untold.popleft()
                for token in tuple(self._subscribers):
                    subscriber = self._subscribers.get(token)
                    if subscriber is None:  # unsubscribed by one of those before it
                        continue
                    try:
                        subscriber(old, new)
                    except Exception as failure:  # noqa: BLE001 - raised below, after the others
                        failures.append(failure)
        finally:
            self._telling = False
        if failures:
            raise ExceptionGroup("the mesh has changed, but not everybody could take it", failures)

    def subscribe(self, callback: Callable[[MeshSnapshot, MeshSnapshot], None]) -> Callable[[], None]:
        """Call ``callback(old, new)`` at each change, in the order of subscription.

        Returns:
            a function that ends the subscription; calling it again does nothing.
        """
        token = object()
        self._subscribers[token] = callback

        def unsubscribe() -> None:
            self._subscribers.pop(token, None)

        return unsubscribe
