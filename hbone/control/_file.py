"""The mesh from a file that people edit, a script writes, or Kubernetes mounts.

The file is looked at, not watched by the kernel: that also sees the symlink swap by which a ConfigMap is updated, and
works on network file systems. A change is taken when the file has rested for a moment, so that it is not read while
somebody still writes it, and becomes one new snapshot. What is wrong in it is reported; then an entry with a fault
stays as it was, and a file of which nothing can be made changes nothing.

Reading happens in a worker thread that gives way to the event loop every millisecond. Trio's thread only puts the
finished snapshot in place.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import trio

from hbone.control._collector import full_collections_wait
from hbone.errors import MeshConfigError, MeshFault
from hbone.mesh import ParsedMesh, parse_mesh, read_mesh_file

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from hbone.mesh import MeshSnapshot, MeshState

__all__ = ["FileMeshSource", "FileMeshStatus"]

_log = logging.getLogger("hbone.control")

_SETTLE: Final = 0.1
"""Seconds for which a file must not have changed. Longer than a step of any file system's clock."""
_PAUSE: Final = 0.0005

_T = TypeVar("_T")
_Signature: TypeAlias = "tuple[int, int, int, int] | None"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileMeshStatus:
    """What became of the newest text of a mesh file.

    Attributes:
        path: the file.
        read_at: when it was last read; None before that.
        seconds: how long reading it took.
        workloads: how many good ones are in it.
        services: how many good ones are in it.
        policies: how many good ones are in it.
        faults: what is wrong in it. Then what is in force is older than the file, in whole or in part.
        used: whether what is right in it is in force; if not, nothing of it is.
        warnings: what is no fault but will hardly do what was meant.
    """

    path: str
    read_at: datetime | None = None
    seconds: float = 0.0
    workloads: int = 0
    services: int = 0
    policies: int = 0
    faults: tuple[MeshFault, ...] = ()
    used: bool = True
    warnings: tuple[MeshFault, ...] = ()


def _utc_now() -> datetime:
    return datetime.now(UTC)


class FileMeshSource:
    """Keeps a `MeshState` as a mesh file says.

    Args:
        path: the file.
        state: what to keep up to date.
        on_faults: called in trio's thread with what is wrong in the file, whenever that has changed; with nothing when
            all is well again.
        on_read: called in trio's thread each time that the file has been read, whatever came of it, before what is in
            it is in force.
        poll_interval: seconds between two looks at the file.
        now: tells the wall time, for the status.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        state: MeshState,
        *,
        on_faults: Callable[[tuple[MeshFault, ...]], object],
        on_read: Callable[[FileMeshStatus], object] | None = None,
        poll_interval: float = 1.0,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        if poll_interval <= 0:
            raise ValueError(f"poll_interval must be more than 0 seconds, not {poll_interval}")
        self._path = Path(path)
        self._state = state
        self._on_faults = on_faults
        self._on_read = on_read
        self._poll_interval = poll_interval
        self._now = now
        self._seen: _Signature = None
        self._digest = b""
        self._status = FileMeshStatus(path=str(path))

    @property
    def status(self) -> FileMeshStatus:
        """What became of the newest text of the file."""
        return self._status

    async def load(self) -> None:
        """Read the file for the first time. When cancelled, nothing has changed.

        Raises:
            MeshConfigError: it cannot be read, or something is wrong in it; has every fault. Nothing has changed.
            ExceptionGroup: subscribers of the state failed; the mesh is in force.
        """
        # Taken before the file is read: a change in between is then seen as a change.
        self._seen = await _in_thread(partial(_signature, self._path))
        with full_collections_wait():
            read = await _in_thread(partial(_read, self._path, self._state.snapshot))
            assert read is not None
            if read.parsed.faults:
                raise MeshConfigError(read.parsed.faults)
            await self._take(read)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the file until cancelled. Faults are reported, never raised."""
        task_status.started()
        while True:
            await trio.sleep(self._poll_interval)
            seen = await _in_thread(partial(_signature, self._path))
            if seen == self._seen:
                continue
            seen = await self._settled(seen)
            with full_collections_wait():
                await self._follow(seen)

    async def _follow(self, seen: _Signature) -> None:
        """Read the file again, and take what is in it unless it changes meanwhile."""
        read = await _in_thread(partial(_read, self._path, self._state.snapshot, digest=self._digest, pause=_pause))
        if await _in_thread(partial(_signature, self._path)) != seen:
            return
        self._seen = seen
        if read is None:
            return
        try:
            await self._take(read)
        except ExceptionGroup:  # the mesh is in force, and all others have been told
            _log.exception("somebody could not take the new mesh")

    async def _settled(self, seen: _Signature) -> _Signature:
        while True:
            await trio.sleep(_SETTLE)
            again = await _in_thread(partial(_signature, self._path))
            if again == seen:
                return seen
            seen = again

    async def _take(self, read: _Read) -> None:
        while self._state.snapshot is not read.previous:  # somebody else has changed it
            read = await _in_thread(partial(read.again, self._state.snapshot))
        parsed = read.parsed
        before = self._status
        self._digest = read.digest
        self._status = FileMeshStatus(
            path=str(self._path),
            read_at=self._now(),
            seconds=read.seconds,
            workloads=len(parsed.workloads),
            services=len(parsed.services),
            policies=len(parsed.policies),
            faults=parsed.faults,
            used=parsed.readable,
            warnings=parsed.warnings,
        )
        if self._on_read is not None:
            self._on_read(self._status)
        if parsed.faults != before.faults:
            self._on_faults(parsed.faults)
        for warning in parsed.warnings:
            if warning not in before.warnings:
                _log.warning("%s", warning)
        self._state.replace(read.snapshot)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A reading of the file, and what follows from it."""

    digest: bytes
    parsed: ParsedMesh
    previous: MeshSnapshot
    snapshot: MeshSnapshot
    seconds: float

    def again(self, previous: MeshSnapshot) -> _Read:
        """What follows from it after another snapshot."""
        snapshot = self.parsed.snapshot_after(previous)
        return _Read(digest=self.digest, parsed=self.parsed, previous=previous, snapshot=snapshot, seconds=self.seconds)


def _read(
    path: Path, previous: MeshSnapshot, *, digest: bytes = b"", pause: Callable[[], None] | None = None
) -> _Read | None:
    """Read the file; None when its text is the one that has this digest."""
    start = time.monotonic()
    try:
        data = read_mesh_file(path)
    except MeshConfigError as problem:
        parsed = ParsedMesh(source=str(path), faults=problem.faults, readable=False)
        return _Read(digest=b"", parsed=parsed, previous=previous, snapshot=previous, seconds=0.0)
    new_digest = hashlib.blake2b(data, digest_size=16).digest()
    if new_digest == digest:
        return None
    parsed = parse_mesh(data, source=str(path), previous=previous, pause=pause)
    return _Read(
        digest=new_digest,
        parsed=parsed,
        previous=previous,
        snapshot=parsed.snapshot_after(previous),
        seconds=time.monotonic() - start,
    )


def _pause() -> None:
    time.sleep(_PAUSE)


def _signature(path: Path) -> _Signature:
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


async def _in_thread(function: Callable[[], _T]) -> _T:
    return await trio.to_thread.run_sync(function, abandon_on_cancel=True)
