"""A CA of one's own: what it issues, what it keeps and who can read it, and several processes at once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from cryptography import x509
from support.memory_tls import shake
from support.mint import alien_root, make_ca, web

from hbone.certs import CaSvidSource, LocalCA, write_svid
from hbone.certs import _local_ca as module
from hbone.errors import InvalidCertificate, InvalidIdentity
from hbone.identity import SpiffeIdentity, TrustDomain
from hbone.tls import PeerPolicy, Svid, check_svid_chain, client_connection, peer_facts, server_connection

if TYPE_CHECKING:
    from trio.testing import MockClock

    from hbone.tls import SvidSource

NOW = datetime(2030, 1, 1, tzinfo=UTC)
WEB = "spiffe://cluster.local/ns/shop/sa/web"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_it_issues_is_a_strict_svid() -> None:
    ca = LocalCA.in_memory()
    svid = ca.issue(WEB, now=NOW, ttl=timedelta(hours=1))
    assert str(check_svid_chain(svid.chain)) == WEB == str(svid.identity)
    assert (svid.not_before, svid.not_after) == (NOW - timedelta(minutes=2), NOW + timedelta(hours=1))
    (leaf,) = svid.chain
    assert not leaf.subject.rdns
    critical = {extension.oid: extension.critical for extension in leaf.extensions}
    assert critical == {
        x509.BasicConstraints.oid: True,
        x509.KeyUsage.oid: True,
        x509.SubjectAlternativeName.oid: True,
        x509.ExtendedKeyUsage.oid: False,
        x509.AuthorityKeyIdentifier.oid: False,
    }
    assert svid.bundles == {TrustDomain("cluster.local"): ca.roots}
    assert ca.issue(WEB).private_key.private_numbers() != svid.private_key.private_numbers()  # type: ignore[union-attr]
    assert "cluster.local" in repr(ca)
    assert "PrivateKey" not in repr(ca)


def test_two_of_its_svids_shake_hands() -> None:
    ca = LocalCA.in_memory(trust_domain="td")
    one = ca.issue(SpiffeIdentity.parse("spiffe://td/one"))
    two = ca.issue("spiffe://td/two")
    client = client_connection(one, PeerPolicy.exact("spiffe://td/two"))
    server = server_connection(two, PeerPolicy.exact("spiffe://td/one"))
    assert shake(client, server).succeeded
    assert peer_facts(server).identity == one.identity


def test_two_cas_federate() -> None:
    near, far = LocalCA.in_memory(trust_domain="near"), LocalCA.in_memory(trust_domain="far")
    one = near.issue("spiffe://near/one", federated={far.trust_domain: far.roots})
    two = far.issue("spiffe://far/two", federated={near.trust_domain: near.roots})
    anyone = PeerPolicy.matching("*")
    assert shake(client_connection(one, anyone), server_connection(two, anyone)).succeeded


@pytest.mark.parametrize("identity", ["spiffe://other.example/a", "spiffe://cluster.local", "web"])
def test_identities_it_cannot_issue(identity: str) -> None:
    ca = LocalCA.in_memory()
    with pytest.raises(InvalidIdentity):
        ca.issue(identity)
    with pytest.raises(InvalidIdentity):
        CaSvidSource(ca, identity)


def test_times() -> None:
    ca = LocalCA.in_memory()
    (root,) = ca.roots
    end = root.not_valid_after_utc
    clamped = ca.issue(WEB, now=end - timedelta(hours=1), ttl=timedelta(days=1))
    assert clamped.not_after == end
    first = ca.issue(WEB, now=root.not_valid_before_utc)
    assert first.not_before == root.not_valid_before_utc
    with pytest.raises(InvalidCertificate, match="create a new CA"):
        ca.issue(WEB, now=end)
    with pytest.raises(ValueError, match="must be positive"):
        ca.issue(WEB, ttl=timedelta(0))


def test_it_is_kept_for_us_only(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "ca"
    made = LocalCA.create(directory, trust_domain="td")
    assert sorted(path.name for path in directory.iterdir()) == ["root-key.pem", "root.pem", "trust-domain"]
    assert mode(directory) == 0o700
    assert {mode(path) for path in directory.iterdir()} == {0o600}
    opened = LocalCA.open(directory)
    assert opened.trust_domain == TrustDomain("td") == LocalCA.open_or_create(directory, trust_domain="td").trust_domain
    assert opened.roots == made.roots
    assert opened.roots_pem == (directory / "root.pem").read_bytes()
    assert opened.issue("spiffe://td/a").bundles == made.issue("spiffe://td/b").bundles
    assert [path.name for path in directory.parent.iterdir()] == ["ca"]


def test_an_empty_directory_may_become_a_ca(tmp_path: Path) -> None:
    tmp_path.joinpath("ca").mkdir(mode=0o755)
    LocalCA.create(tmp_path / "ca")
    assert mode(tmp_path / "ca") == 0o700


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    LocalCA.create(tmp_path / "ca")
    before = (tmp_path / "ca" / "root.pem").read_bytes()
    with pytest.raises(InvalidCertificate, match="holds a CA already"):
        LocalCA.create(tmp_path / "ca")
    assert (tmp_path / "ca" / "root.pem").read_bytes() == before
    with pytest.raises(InvalidCertificate, match="not empty"):
        LocalCA.create(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidCertificate, match="no CA can be made here"):
        LocalCA.create(tmp_path / "file")
    with pytest.raises(InvalidCertificate, match="no CA can be made here"):
        LocalCA.open_or_create(tmp_path / "file" / "ca")
    with pytest.raises(InvalidIdentity):
        LocalCA.create(tmp_path / "other", trust_domain="TD")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca", "file"]


def test_faults_of_a_kept_ca(tmp_path: Path) -> None:
    with pytest.raises(InvalidCertificate, match=r"holds no CA \(root.pem is missing\); create one first"):
        LocalCA.open(tmp_path)
    LocalCA.create(tmp_path / "ca")
    with pytest.raises(InvalidCertificate, match=r"is the CA of cluster\.local, not of td"):
        LocalCA.open_or_create(tmp_path / "ca", trust_domain="td")
    for name, content, message in (
        ("trust-domain", b"TD", r"trust-domain: invalid"),
        ("trust-domain", b"\xff", r"trust-domain: "),
        ("root-key.pem", web().key_pem, r"root-key\.pem: is not the key of root\.pem"),
        ("root-key.pem", b"", r"root-key\.pem: has no private key"),
        ("root.pem", web().cert_pem, r"root\.pem: is not a CA certificate"),
        ("root.pem", b"", r"root\.pem: has no PEM block"),
    ):
        path = tmp_path / "ca" / name
        kept = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(InvalidCertificate, match=message):
            LocalCA.open(tmp_path / "ca")
        path.write_bytes(kept)
    (tmp_path / "ca" / "root-key.pem").unlink()
    with pytest.raises(InvalidCertificate, match=r"root-key\.pem: cannot be read"):
        LocalCA.open(tmp_path / "ca")


def test_a_root_of_somebody_else(tmp_path: Path) -> None:
    """Without a subject key identifier, the root's own key says who signed."""
    from cryptography.hazmat.primitives import hashes

    signer = make_ca(name="plain")
    builder = x509.CertificateBuilder(
        issuer_name=signer.certificate.subject,
        subject_name=signer.certificate.subject,
        public_key=signer.key.public_key(),
        serial_number=1,
        not_valid_before=signer.certificate.not_valid_before_utc.replace(tzinfo=None),
        not_valid_after=signer.certificate.not_valid_after_utc.replace(tzinfo=None),
    ).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    ca = LocalCA(builder.sign(signer.key, hashes.SHA256()), signer.key, TrustDomain("cluster.local"))
    svid = ca.issue(WEB)
    anyone = PeerPolicy.matching("*")
    assert shake(client_connection(svid, anyone), server_connection(svid, anyone)).succeeded


def test_many_openers_share_one_ca(tmp_path: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        cas = list(pool.map(LocalCA.open_or_create, [tmp_path / "ca"] * 24))
    assert len({ca.roots for ca in cas}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ca"]


def test_processes_that_start_at_the_same_moment_share_one_ca(tmp_path: Path) -> None:
    program = (
        "import sys; from hbone.certs import LocalCA; print('ready', flush=True); sys.stdin.readline();"
        "print(LocalCA.open_or_create(sys.argv[1]).roots[0].serial_number)"
    )
    argv = [sys.executable, "-c", program, str(tmp_path / "ca")]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(3)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        answers = [process.communicate(timeout=60)[0] for process in processes]
    assert set(answers) == {f"{LocalCA.open(tmp_path / 'ca').roots[0].serial_number}\n"}
    assert [path.name for path in tmp_path.iterdir()] == ["ca"]


class TestADirectoryThatCannotBeReplaced:
    """A mount point, or one in a directory of somebody else."""

    @pytest.fixture(autouse=True)
    def a_mount_point(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        def busy(self: Path, target: Path) -> Path:
            raise OSError(errno.EBUSY, "Device or resource busy")

        monkeypatch.setattr(Path, "rename", busy)
        (tmp_path / "ca").mkdir()
        return tmp_path / "ca"

    def test_is_filled_when_it_is_empty(self, a_mount_point: Path) -> None:
        (a_mount_point / "lost+found").mkdir()
        (a_mount_point / "root-key.pem").write_text("left by one that died")
        (a_mount_point / ".root.pem.0123").write_text("left by one that died")
        made = LocalCA.create(a_mount_point)
        assert LocalCA.open_or_create(a_mount_point).roots == made.roots
        assert {mode(a_mount_point / name) for name in ("root.pem", "root-key.pem", "trust-domain")} == {0o600}
        with pytest.raises(InvalidCertificate, match="holds a CA already"):
            LocalCA.create(a_mount_point)

    def test_is_left_alone_when_it_is_not(self, a_mount_point: Path) -> None:
        (a_mount_point / "something").touch()
        with pytest.raises(InvalidCertificate, match=r"no CA can be made here: Device or resource busy"):
            LocalCA.create(a_mount_point)
        assert [path.name for path in a_mount_point.iterdir()] == ["something"]

    def test_many_openers_share_one_ca(self, a_mount_point: Path) -> None:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            cas = list(pool.map(LocalCA.open_or_create, [a_mount_point] * 24))
        assert len({ca.roots for ca in cas}) == 1
        assert sorted(path.name for path in a_mount_point.iterdir()) == ["root-key.pem", "root.pem", "trust-domain"]

    def test_that_cannot_be_written_to(self, a_mount_point: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(path: Path, content: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(module, "_replace", full)
        with pytest.raises(InvalidCertificate, match=r"no CA can be made here: No space left"):
            LocalCA.open_or_create(a_mount_point)


def test_a_creator_that_comes_second_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def beaten(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        LocalCA.create(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", beaten)
    ca = LocalCA.open_or_create(tmp_path / "ca")
    assert ca.roots == LocalCA.open(tmp_path / "ca").roots
    assert [path.name for path in tmp_path.iterdir()] == ["ca"]


def test_written_svids(tmp_path: Path) -> None:
    ca = LocalCA.in_memory()
    svid = ca.issue(WEB)
    files = ca.write(svid, tmp_path / "web")
    assert mode(tmp_path / "web") == 0o700
    assert {mode(path) for path in (tmp_path / "web").iterdir()} == {0o600}
    loaded = Svid.from_files(files.cert, files.key, files.roots)
    assert (loaded.chain, loaded.bundles) == (svid.chain, svid.bundles)
    write_svid(ca.issue(WEB), tmp_path / "web")
    assert Svid.from_files(files.cert, files.key, files.roots).chain != svid.chain
    assert len(list((tmp_path / "web").iterdir())) == 3


def test_writing_where_one_cannot(tmp_path: Path) -> None:
    svid = LocalCA.in_memory().issue(WEB)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidCertificate, match="cannot be written"):
        write_svid(svid, tmp_path / "file")
    (tmp_path / "out" / "key.pem").mkdir(parents=True)
    with pytest.raises(InvalidCertificate, match="cannot be written"):
        write_svid(svid, tmp_path / "out")
    # No draft with the key in it is left behind.
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["key.pem", "roots.pem"]


class WallClock:
    """Wall time that goes with trio's, as far as no test moves it."""

    def __init__(self, start: datetime = NOW) -> None:
        self.start = start

    def __call__(self) -> datetime:
        try:
            return self.start + timedelta(seconds=trio.current_time())
        except RuntimeError:
            return self.start


def test_a_source_renews_on_demand() -> None:
    clock = WallClock()
    renewed: list[Svid] = []
    source = CaSvidSource(LocalCA.in_memory(), WEB, timedelta(hours=2), now=clock, on_renew=renewed.append)
    protocol: SvidSource = source
    first = protocol.current()
    assert str(protocol.identity) == WEB
    clock.start += timedelta(minutes=59)
    assert source.current() is first
    clock.start += timedelta(minutes=2)
    second = source.current()
    assert renewed == [second]
    assert second.not_after == first.not_after + timedelta(minutes=61)
    clock.start += timedelta(days=30)
    assert source.current().not_after > clock()


async def test_a_source_renews_by_itself(autojump_clock: MockClock) -> None:
    clock = WallClock()
    renewed: list[datetime] = []
    source = CaSvidSource(
        LocalCA.in_memory(), WEB, timedelta(hours=2), now=clock, on_renew=lambda _: renewed.append(clock())
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(source.run)
        await trio.sleep(3600 * 3.5)
        # The machine slept for a day: renewal comes with the next look at the wall clock.
        clock.start += timedelta(days=1)
        await trio.sleep(61)
        nursery.cancel_scope.cancel()
    hours = [round((when - NOW).total_seconds() / 3600, 1) for when in renewed]
    assert hours == [1.0, 2.0, 3.0, 27.5]


async def test_an_expired_root_is_told_to_who_asks(autojump_clock: MockClock) -> None:
    ca = LocalCA.in_memory()
    clock = WallClock(ca.roots[0].not_valid_after_utc - timedelta(hours=1))
    source = CaSvidSource(ca, WEB, now=clock)
    async with trio.open_nursery() as nursery:
        await nursery.start(source.run)
        await trio.sleep(7200)
        nursery.cancel_scope.cancel()
    with pytest.raises(InvalidCertificate, match="create a new CA"):
        source.current()


def test_the_default_clock_is_the_wall() -> None:
    assert abs(module._utc_now() - datetime.now(UTC)) < timedelta(minutes=1)
    assert CaSvidSource(LocalCA.in_memory(), WEB).current().not_after > datetime.now(UTC)
    assert alien_root().certificate not in LocalCA.in_memory().roots
