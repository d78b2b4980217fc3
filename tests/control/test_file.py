"""A mesh from a file that changes under us, in the ways in which files do."""

from __future__ import annotations

import logging
import os
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
import trio

from hbone import MeshConfigError
from hbone.control import FileMeshSource
from hbone.mesh import MeshSnapshot, MeshState, NamespacedHostname

if TYPE_CHECKING:
    from pathlib import Path

    from trio.testing import MockClock

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def workload(uid: str, address: str, more: str = "") -> str:
    return f"- {{uid: {uid}, namespace: shop, workloadIps: [{address}], services: {{}}{more}}}\n"


class File:
    """The file, and a source over it with all that it reported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = MeshState()
        self.reports: list[list[str]] = []
        self.snapshots: list[MeshSnapshot] = []
        self.state.subscribe(lambda _old, new: self.snapshots.append(new))
        self._written = 0

    def write(self, *entries: str, text: str | None = None) -> None:
        self._written += 1
        self.path.write_text("workloads:\n" + "".join(entries) if text is None else text)
        # The kernel's time stamps may be as coarse as 10 ms: no two of ours are to be the same.
        os.utime(self.path, (self._written, self._written))

    def source(self, path: Path | None = None, **options: Any) -> FileMeshSource:
        return FileMeshSource(
            path or self.path,
            self.state,
            on_faults=lambda faults: self.reports.append([str(fault).replace(str(self.path), "m") for fault in faults]),
            now=lambda: NOW,
            **options,
        )

    @property
    def addresses(self) -> dict[str, str]:
        return {uid: str(found.addresses[0]) for uid, found in self.state.snapshot.workloads.items()}


@pytest.fixture
def file(tmp_path: Path) -> File:
    found = File(tmp_path / "mesh.yaml")
    found.write(workload("a", "10.0.0.1"), workload("b", "10.0.0.2"))
    return found


async def test_load_reads_in_another_thread(file: File) -> None:
    threads: set[int] = set()
    source = file.source()
    file.state.subscribe(lambda _old, _new: threads.add(threading.get_ident()))
    with trio.fail_after(60):
        await source.load()
    assert file.addresses == {"a": "10.0.0.1", "b": "10.0.0.2"}
    assert threads == {threading.get_ident()}
    assert (source.status.read_at, source.status.workloads, source.status.faults) == (NOW, 2, ())
    assert file.reports == []


async def test_load_has_every_fault_and_changes_nothing(file: File) -> None:
    file.write(workload("a", "10.0.0.1", ", nod: x"), workload("b", "localhost"))
    source = file.source()
    with trio.fail_after(60), pytest.raises(MeshConfigError) as caught:
        await source.load()
    assert [fault.path for fault in caught.value.faults] == ["workloads[0].nod", "workloads[1].workloadIps[0]"]
    assert file.snapshots == []
    assert source.status.read_at is None


async def test_load_needs_the_file(tmp_path: Path) -> None:
    source = FileMeshSource(str(tmp_path / "none.yaml"), MeshState(), on_faults=pytest.fail)
    with trio.fail_after(60), pytest.raises(MeshConfigError, match=r"none\.yaml: cannot be read: no such file"):
        await source.load()
    with pytest.raises(ValueError, match="poll_interval"):
        FileMeshSource("mesh.yaml", MeshState(), on_faults=pytest.fail, poll_interval=0)


async def test_load_reports_subscribers_that_fail(file: File) -> None:
    def fail(_old: MeshSnapshot, _new: MeshSnapshot) -> None:
        raise RuntimeError("no")

    file.state.subscribe(fail)
    source = file.source()
    with trio.fail_after(60), pytest.raises(ExceptionGroup, match="not everybody"):
        await source.load()
    assert len(file.snapshots) == 1


class TestRun:
    """The watcher, on a clock that jumps."""

    @pytest.fixture(autouse=True)
    def _no_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The clock would jump while a thread reads."""

        async def run_sync(function: Any, *args: Any, abandon_on_cancel: bool = False) -> Any:
            await trio.lowlevel.checkpoint()
            return function(*args)

        monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)

    async def test_a_change_is_one_snapshot(self, autojump_clock: MockClock, file: File) -> None:
        source = file.source()
        await source.load()
        before = file.state.snapshot
        async with trio.open_nursery() as nursery:
            await nursery.start(source.run)
            file.write(workload("a", "10.0.0.1"), workload("b", "10.0.0.3"), workload("c", "10.0.0.4"))
            await trio.sleep(5)
            nursery.cancel_scope.cancel()
        assert len(file.snapshots) == 2
        assert file.addresses == {"a": "10.0.0.1", "b": "10.0.0.3", "c": "10.0.0.4"}
        assert file.state.snapshot.workloads["a"] is before.workloads["a"]
        assert source.status.workloads == 3

    async def test_a_file_left_alone_or_touched_is_no_change(self, autojump_clock: MockClock, file: File) -> None:
        source = file.source()
        await source.load()
        async with trio.open_nursery() as nursery:
            await nursery.start(source.run)
            await trio.sleep(20)
            os.utime(file.path, (100, 100))
            await trio.sleep(20)
            file.path.write_text(file.path.read_text() + "# a comment\n")
            await trio.sleep(20)
            nursery.cancel_scope.cancel()
        assert len(file.snapshots) == 1
        assert file.reports == []

    async def test_a_broken_entry_stays_and_is_reported_once(self, autojump_clock: MockClock, file: File) -> None:
        source = file.source()
        await source.load()
        before = file.state.snapshot
        async with trio.open_nursery() as nursery:
            await nursery.start(source.run)
            file.write(workload("a", "10.0.0.9", ", nod: x"), workload("b", "10.0.0.3"))
            await trio.sleep(20)
            assert file.addresses == {"a": "10.0.0.1", "b": "10.0.0.3"}
            assert file.state.snapshot.workloads["a"] is before.workloads["a"]
            assert file.reports == [["m:2:68: workloads[0].nod: unknown key; did you mean node?"]]
            assert len(source.status.faults) == 1
            file.write(workload("a", "10.0.0.9"), workload("b", "10.0.0.3"))
            await trio.sleep(20)
            nursery.cancel_scope.cancel()
        assert file.addresses == {"a": "10.0.0.9", "b": "10.0.0.3"}
        assert file.reports[1:] == [[]]

    async def test_a_file_that_is_gone_or_of_no_use_changes_nothing(
        self, autojump_clock: MockClock, file: File
    ) -> None:
        source = file.source()
        await source.load()
        text = file.path.read_text()
        async with trio.open_nursery() as nursery:
            await nursery.start(source.run)
            for wrong in ("", "workload: []", "workloads: [", "- a", "\0"):
                file.write(text=wrong)
                await trio.sleep(20)
            file.path.unlink()
            await trio.sleep(20)
            file.path.mkdir()
            await trio.sleep(20)
            file.path.rmdir()
            file.write(text=text)
            await trio.sleep(20)
            nursery.cancel_scope.cancel()
        assert len(file.snapshots) == 1
        assert [report[0].split(": ")[1] if report else "" for report in file.reports] == [
            "the file is empty; write {} for a mesh with nothing in it",
            "workload",
            "expected YAML",
            "expected a map with workloads, services and policies, not a list",
            "expected a text in UTF-8",
            "cannot be read",
            "cannot be read",
            "",
        ]

    async def test_a_file_is_read_when_it_rests(self, autojump_clock: MockClock, file: File) -> None:
        """What somebody writes piece by piece is right YAML many times before it is whole."""
        source = file.source()
        await source.load()
        async with trio.open_nursery() as nursery:
            await nursery.start(source.run)
            for count in range(1, 101):
                file.write(*(workload(f"w{number}", "10.0.0.1") for number in range(count)))
                await trio.sleep(0.05)
            assert len(file.snapshots) == 1
            await trio.sleep(5)
            nursery.cancel_scope.cancel()
        assert len(file.snapshots) == 2
        assert len(file.addresses) == 100

    async def test_a_file_that_changes_while_it_is_read_is_read_again(
        self, autojump_clock: MockClock, file: File, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import hbone.control._file as module

        source = file.source()
        await source.load()
        read = module.read_mesh_file

        def read_and_change(path: Path) -> bytes:
            data = read(path)
            monkeypatch.setattr(module, "read_mesh_file", read)
            file.write(workload("a", "10.0.0.7"))
            return data

        monkeypatch.setattr(module, "read_mesh_file", read_and_change)
        async with trio.open_nursery() as nursery:
            await nursery.start(source.run)
            file.write(workload("a", "10.0.0.6"))
            await trio.sleep(20)
            nursery.cancel_scope.cancel()
        assert len(file.snapshots) == 2
        assert file.addresses == {"a": "10.0.0.7"}

    async def test_what_somebody_else_changed_meanwhile_counts(
        self, autojump_clock: MockClock, file: File, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A snapshot that was built on another one than that in force is built anew."""
        import hbone.control._file as module

        source = file.source()
        await source.load()
        parse = module.parse_mesh

        def parse_and_change(*args: Any, **options: Any) -> Any:
            monkeypatch.setattr(module, "parse_mesh", parse)
            file.state.replace(file.state.snapshot.with_changes(remove_workloads=["a"]))
            return parse(*args, **options)

        monkeypatch.setattr(module, "parse_mesh", parse_and_change)
        async with trio.open_nursery() as nursery:
            await nursery.start(source.run)
            file.write(workload("a", "10.0.0.1"), workload("b", "10.0.0.5"))
            await trio.sleep(20)
            nursery.cancel_scope.cancel()
        assert [set(snapshot.workloads) for snapshot in file.snapshots] == [{"a", "b"}, {"b"}, {"a", "b"}]
        assert file.addresses == {"a": "10.0.0.1", "b": "10.0.0.5"}

    async def test_kubernetes_swaps_a_symlink(self, autojump_clock: MockClock, tmp_path: Path) -> None:
        for revision, address in (("..1", "10.0.0.1"), ("..2", "10.0.0.2")):
            (tmp_path / revision).mkdir()
            (tmp_path / revision / "mesh.yaml").write_text("workloads:\n" + workload("a", address))
            os.utime(tmp_path / revision / "mesh.yaml", (1, 1))
        (tmp_path / "..data").symlink_to("..1")
        (tmp_path / "mesh.yaml").symlink_to("..data/mesh.yaml")
        file = File(tmp_path / "mesh.yaml")
        source = file.source()
        await source.load()
        assert file.addresses == {"a": "10.0.0.1"}
        async with trio.open_nursery() as nursery:
            await nursery.start(source.run)
            (tmp_path / "..new").symlink_to("..2")
            (tmp_path / "..new").rename(tmp_path / "..data")
            await trio.sleep(5)
            nursery.cancel_scope.cancel()
        assert file.addresses == {"a": "10.0.0.2"}

    async def test_subscribers_that_fail_do_not_end_it(
        self, autojump_clock: MockClock, file: File, caplog: pytest.LogCaptureFixture
    ) -> None:
        source = file.source()
        await source.load()

        def fail(_old: MeshSnapshot, _new: MeshSnapshot) -> None:
            raise RuntimeError("no")

        file.state.subscribe(fail)
        async with trio.open_nursery() as nursery:
            await nursery.start(source.run)
            for address in ("10.0.0.3", "10.0.0.4"):
                file.write(workload("a", address))
                await trio.sleep(5)
                assert file.addresses == {"a": address}
            nursery.cancel_scope.cancel()
        assert [record.getMessage() for record in caplog.records] == ["somebody could not take the new mesh"] * 2

    async def test_a_warning_is_logged_once(
        self, autojump_clock: MockClock, file: File, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "hbone.control")
        policy = (
            "policies: [{name: p, namespace: n, scope: WorkloadSelector, action: Deny, dryRun: false, rules: []}]\n"
        )
        file.write(text=policy)
        source = file.source()
        await source.load()
        async with trio.open_nursery() as nursery:
            await nursery.start(source.run)
            file.write(text=policy + "workloads: []\n")
            await trio.sleep(5)
            nursery.cancel_scope.cancel()
        (record,) = caplog.records
        assert record.getMessage().endswith(
            ":1:12: policies[0]: no workload names it in authorizationPolicies, so it does nothing"
        )
        assert len(source.status.warnings) == 1


async def test_a_reload_beside_live_work(tmp_path: Path) -> None:
    """With real threads and a real clock: what the loop does goes on, and the change comes."""
    file = File(tmp_path / "mesh.yaml")
    entry = "- {{name: s{0}, namespace: shop, hostname: s{0}, vips: [/10.96.{1}.{2}], ports: {{80: {3}}}}}\n"

    def write(port: int) -> None:
        file.write(text="services:\n" + "".join(entry.format(n, n // 256, n % 256, port) for n in range(500)))

    write(80)
    source = file.source(poll_interval=0.01)
    with trio.fail_after(60):
        await source.load()
        changed = trio.Event()
        file.state.subscribe(lambda _old, _new: changed.set())
        async with trio.open_nursery() as nursery:
            await nursery.start(source.run)
            write(81)
            await changed.wait()
            nursery.cancel_scope.cancel()
    assert file.state.snapshot.services[NamespacedHostname("shop", "s7")].ports == {80: 81}
