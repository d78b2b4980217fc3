"""SVIDs from files that somebody else renews: cert-manager, SPIRE's helper, a Kubernetes secret, a cron job.

The files are looked at every few seconds, not watched by the kernel: that also sees the symlink swap by which
Kubernetes updates a mounted secret, and works on network file systems. New files are taken only when together they make
a valid SVID of the same identity. Until then the old one stays, since whoever writes them cannot replace
three files at once.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import trio

from hbone.errors import CertificateUnavailable, InvalidCertificate
from hbone.tls import Svid

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from hbone.identity import SpiffeIdentity

__all__ = ["FileSvidSource"]

_Signature: TypeAlias = tuple[tuple[int, int, int, int] | None, ...]


def _utc_now() -> datetime:
    return datetime.now(UTC)


class FileSvidSource:
    """An `SvidSource` over PEM files that are renewed in place.

    The files are read once at construction; `run` in a nursery keeps up with them afterwards.

    Args:
        cert: the leaf and its intermediates.
        key: its private key.
        roots: the roots of our own trust domain.
        federated: files with the roots of other trust domains, by the name of the domain.
        poll_interval: seconds between two looks at the files.
        on_reload: called in trio's thread with each new SVID.
        on_error: called in trio's thread when new files are of no use, once for each state of the files.
        now: tells the wall time, for validity.

    Raises:
        InvalidCertificate: the files are of no use now.
    """

    def __init__(
        self,
        cert: str | os.PathLike[str],
        key: str | os.PathLike[str],
        roots: str | os.PathLike[str],
        *,
        federated: Mapping[str, str | os.PathLike[str]] | None = None,
        poll_interval: float = 5.0,
        on_reload: Callable[[Svid], None] | None = None,
        on_error: Callable[[InvalidCertificate], None] | None = None,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        if poll_interval <= 0:
            raise ValueError(f"poll_interval must be more than 0 seconds, not {poll_interval}")
        self._cert, self._key, self._roots = Path(cert), Path(key), Path(roots)
        self._federated = {domain: Path(path) for domain, path in (federated or {}).items()}
        self._poll_interval = poll_interval
        self._on_reload = on_reload
        self._on_error = on_error
        self._now = now
        self._last_error: InvalidCertificate | None = None
        # Taken before the files are read: a change in between is then seen as a change.
        self._seen = self._signature()
        self._svid = self._load()

    @property
    def identity(self) -> SpiffeIdentity:
        """The identity in the files when they were first read; files for another one are refused."""
        return self._svid.identity

    @property
    def last_error(self) -> InvalidCertificate | None:
        """Why the newest files are of no use; None when they are the SVID in use."""
        return self._last_error

    def current(self) -> Svid:
        """The newest usable SVID. Does no I/O.

        Raises:
            CertificateUnavailable: it has expired, and no new one has come.
        """
        svid = self._svid
        if self._now() > svid.not_after:
            because = f"; the newer files are of no use: {self._last_error}" if self._last_error else ""
            raise CertificateUnavailable(svid.identity, f"{self._cert} expired at {svid.not_after:%F %T} UTC{because}")
        return svid

    def reload(self) -> bool:
        """Read the files now, whether they look changed or not. Blocks for as long as that takes.

        Returns:
            Whether there is a new SVID.

        Raises:
            InvalidCertificate: they are of no use; the SVID in use stays.
        """
        seen = self._signature()
        try:
            svid = self._load()
        except InvalidCertificate as problem:
            self._last_error = problem
            raise
        return self._take(svid, seen)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the files until cancelled. Useless files are reported, never raised."""
        task_status.started()
        failed: _Signature | None = None
        reported = False
        while True:
            await trio.sleep(self._poll_interval)
            seen = await trio.to_thread.run_sync(self._signature)
            if seen == self._seen:
                failed = self._last_error = None
                continue
            try:
                svid = await trio.to_thread.run_sync(self._load)
            except InvalidCertificate as problem:
                # Fresh files may be half written: only files that stay useless from one look to the next are at fault.
                if seen != failed:
                    failed, reported = seen, False
                    continue
                self._last_error = problem
                if not reported and self._on_error is not None:
                    self._on_error(problem)
                reported = True
            else:
                failed = None
                self._take(svid, seen)

    def _take(self, svid: Svid, seen: _Signature) -> bool:
        self._seen = seen
        self._last_error = None
        # A touched file is no rotation: keeping the SVID keeps its TLS contexts.
        if svid.chain == self._svid.chain and svid.bundles == self._svid.bundles:
            return False
        self._svid = svid
        if self._on_reload is not None:
            self._on_reload(svid)
        return True

    def _load(self) -> Svid:
        svid = Svid.from_files(self._cert, self._key, self._roots, federated=self._federated, now=self._now())
        first: Svid | None = getattr(self, "_svid", None)
        if first is not None and svid.identity != first.identity:
            raise InvalidCertificate(
                f"{self._cert}: is now for {svid.identity}, not for {first.identity}; "
                "restart to become somebody else, or put the right certificate back"
            )
        return svid

    def _signature(self) -> _Signature:
        return tuple(map(_stat, (self._cert, self._key, self._roots, *self._federated.values())))


def _stat(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
