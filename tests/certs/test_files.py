"""SVIDs from files that change under us, in the ways in which they do."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import trio
from support.mint import DB, HOUR, NOW, WEB, Made, alien_root, make, root

from hbone.certs import FileSvidSource
from hbone.errors import CertificateUnavailable, InvalidCertificate
from hbone.identity import TrustDomain
from hbone.tls import Svid

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trio.testing import MockClock

    from hbone.tls import SvidSource


class Files:
    """The three files, and a source over them with all that it reported."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cert, self.key, self.roots = (directory / f"{name}.pem" for name in ("cert", "key", "roots"))
        self.reloaded: list[Svid] = []
        self.errors: list[str] = []
        self.now = NOW
        self._written = 0
        self.write(make(root(), WEB))

    def write(self, made: Made) -> Made:
        self._written += 1
        for path, content in ((self.roots, root().cert_pem), (self.key, made.key_pem), (self.cert, made.chain_pem)):
            path.write_bytes(content)
            # The kernel's time stamps may be as coarse as 10 ms: no two of ours are to be the same.
            os.utime(path, (self._written, self._written))
        return made

    def source(self, **options: Any) -> FileSvidSource:
        return FileSvidSource(
            self.cert,
            self.key,
            self.roots,
            on_reload=self.reloaded.append,
            on_error=lambda error: self.errors.append(str(error)),
            now=lambda: self.now,
            **options,
        )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_it_is_a_source(files: Files) -> None:
    source: SvidSource = files.source()
    assert str(source.identity) == WEB
    assert source.current() is source.current()
    assert files.reloaded == []


def test_faults_at_the_start_are_raised(files: Files) -> None:
    files.key.unlink()
    with pytest.raises(InvalidCertificate, match=r"key\.pem: cannot be read"):
        files.source()
    with pytest.raises(ValueError, match="poll_interval"):
        files.source(poll_interval=0)


def test_without_callbacks_and_with_the_real_clock(files: Files) -> None:
    source = FileSvidSource(str(files.cert), str(files.key), str(files.roots))
    new = files.write(make(root(), WEB))
    assert source.reload()
    assert source.current().chain == (new.certificate,)


def test_reload_on_demand(files: Files) -> None:
    source = files.source()
    first = source.current()
    assert not source.reload()
    assert source.current() is first
    new = files.write(make(root(), WEB))
    assert source.reload()
    assert source.current().chain == (new.certificate,)
    assert files.reloaded == [source.current()]
    files.cert.write_bytes(b"")
    with pytest.raises(InvalidCertificate, match="has no PEM block"):
        source.reload()
    assert source.current().chain == (new.certificate,)
    assert "has no PEM block" in str(source.last_error)


def test_an_identity_never_changes(files: Files) -> None:
    source = files.source()
    files.write(make(root(), DB))
    with pytest.raises(InvalidCertificate, match=f"is now for {DB}, not for {WEB}"):
        source.reload()
    assert str(source.current().identity) == WEB


def test_new_roots_are_a_new_svid(files: Files) -> None:
    far = files.directory / "far.pem"
    far.write_bytes(alien_root().cert_pem)
    source = files.source(federated={"other.example": far})
    far.write_bytes(alien_root().cert_pem + root().cert_pem)
    assert source.reload()
    assert len(source.current().bundles[TrustDomain("other.example")]) == 2


def test_an_expired_svid_is_unavailable(files: Files) -> None:
    source = files.source()
    files.now = NOW + HOUR + timedelta(seconds=1)
    with pytest.raises(CertificateUnavailable, match=rf"{WEB}: .*cert\.pem expired at") as caught:
        source.current()
    assert caught.value.identity == source.identity
    files.cert.write_bytes(b"")
    with pytest.raises(InvalidCertificate):
        source.reload()
    with pytest.raises(CertificateUnavailable, match=r"the newer files are of no use: .*has no PEM block"):
        source.current()


class TestRun:
    """The watcher, on a clock that jumps."""

    @pytest.fixture(autouse=True)
    def _no_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The clock would jump while a thread reads."""

        async def run_sync(function: Callable[..., Any], *args: Any) -> Any:
            await trio.lowlevel.checkpoint()
            return function(*args)

        monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)

    async def test_new_files_are_taken(self, autojump_clock: MockClock, files: Files) -> None:
        source = files.source()
        async with trio.open_nursery() as nursery:
            await nursery.start(source.run)
            new = files.write(make(root(), WEB))
            await trio.sleep(6)
            nursery.cancel_scope.cancel()
        assert source.current().chain == (new.certificate,)
        assert files.reloaded == [source.current()]
        assert files.errors == []

    async def test_files_left_alone_are_not_read(
        self, autojump_clock: MockClock, files: Files, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = files.source()
        monkeypatch.setattr(source, "_load", pytest.fail)
        with trio.move_on_after(60):
            await source.run()
        assert files.reloaded == []

    async def test_touched_files_are_no_rotation(self, autojump_clock: MockClock, files: Files) -> None:
        source = files.source()
        first = source.current()
        files.cert.write_bytes(files.cert.read_bytes() + b"\n")
        with trio.move_on_after(60):
            await source.run()
        assert source.current() is first
        assert files.reloaded == []

    async def test_files_that_come_one_by_one_are_no_fault(self, autojump_clock: MockClock, files: Files) -> None:
        source = files.source()
        new = make(root(), WEB)
        async with trio.open_nursery() as nursery:
            await nursery.start(source.run)
            files.cert.write_bytes(new.chain_pem)
            await trio.sleep(6)
            assert source.current().chain != (new.certificate,)
            files.key.write_bytes(new.key_pem + b"\n")
            await trio.sleep(5)
            nursery.cancel_scope.cancel()
        assert source.current().chain == (new.certificate,)
        assert files.errors == []
        assert source.last_error is None

    async def test_useless_files_are_reported_once_and_retried(self, autojump_clock: MockClock, files: Files) -> None:
        source = files.source(poll_interval=1)
        first = source.current()
        async with trio.open_nursery() as nursery:
            await nursery.start(source.run)
            files.cert.write_bytes(b"not a certificate")
            await trio.sleep(20)
            assert source.current() is first
            assert len(files.errors) == 1
            assert "has no PEM block" in files.errors[0] == str(source.last_error)
            files.cert.unlink()
            await trio.sleep(20)
            assert len(files.errors) == 2
            assert "cannot be read" in files.errors[1]
            new = files.write(make(root(), WEB))
            await trio.sleep(20)
            nursery.cancel_scope.cancel()
        assert source.current().chain == (new.certificate,)
        assert source.last_error is None
        assert len(files.errors) == 2

    async def test_the_old_files_come_back(self, autojump_clock: MockClock, files: Files) -> None:
        source = files.source(poll_interval=1)
        aside = files.cert.rename(files.directory / "aside.pem")
        async with trio.open_nursery() as nursery:
            await nursery.start(source.run)
            await trio.sleep(20)
            assert len(files.errors) == 1
            aside.rename(files.cert)
            await trio.sleep(20)
            nursery.cancel_scope.cancel()
        assert source.last_error is None
        assert len(files.errors) == 1

    async def test_nobody_listens(self, autojump_clock: MockClock, files: Files) -> None:
        source = FileSvidSource(files.cert, files.key, files.roots, poll_interval=1)
        files.cert.write_bytes(b"not a certificate")
        with trio.move_on_after(20):
            await source.run()
        assert source.last_error is not None

    async def test_a_certificate_of_the_future_is_taken_when_its_time_comes(
        self, autojump_clock: MockClock, files: Files
    ) -> None:
        source = files.source(poll_interval=1)
        new = make(root(), WEB, start=NOW + HOUR / 2)
        async with trio.open_nursery() as nursery:
            await nursery.start(source.run)
            files.write(new)
            await trio.sleep(20)
            assert "not valid before" in str(source.last_error)
            files.now = NOW + HOUR * 3 / 4
            await trio.sleep(20)
            nursery.cancel_scope.cancel()
        assert source.current().chain == (new.certificate,)

    async def test_kubernetes_swaps_a_symlink(self, autojump_clock: MockClock, tmp_path: Path) -> None:
        def revision(name: str) -> Files:
            (tmp_path / name).mkdir()
            return Files(tmp_path / name)

        revision("..1")
        (tmp_path / "..data").symlink_to("..1")
        for name in ("cert.pem", "key.pem", "roots.pem"):
            (tmp_path / name).symlink_to(f"..data/{name}")
        source = FileSvidSource(tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "roots.pem")
        first = source.current()
        async with trio.open_nursery() as nursery:
            await nursery.start(source.run)
            second = revision("..2")
            (tmp_path / "..new").symlink_to("..2")
            (tmp_path / "..new").rename(tmp_path / "..data")
            await trio.sleep(6)
            nursery.cancel_scope.cancel()
        assert source.current() is not first
        assert source.current().chain == Svid.from_files(second.cert, second.key, second.roots).chain
