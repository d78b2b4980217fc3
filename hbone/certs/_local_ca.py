"""A certificate authority of one's own: for tests, for a laptop, for two machines without a mesh.

The root comes from `trustme` and is as good as where its key is kept. Leaves are made here, as strict X509-SVIDs with
fresh keys: they exist in memory only, unless written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn, TypeAlias

import trio
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID

from hbone.errors import InvalidCertificate, InvalidIdentity
from hbone.identity import SpiffeIdentity, TrustDomain
from hbone.tls import Svid
from hbone.tls._pem import Pem
from hbone.tls._rules import check_authority

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hbone.tls import PrivateKey

__all__ = ["CaSvidSource", "LocalCA", "SvidFiles", "write_svid"]

StrPath: TypeAlias = "str | os.PathLike[str]"

ROOT_FILE = "root.pem"
ROOT_KEY_FILE = "root-key.pem"
TRUST_DOMAIN_FILE = "trust-domain"

DEFAULT_TTL = timedelta(hours=24)
BACKDATE = timedelta(minutes=2)
"""How far clocks may be apart for a certificate to be valid at once."""

_LONGEST_SLEEP = 60.0


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class SvidFiles:
    """Where `write_svid` put an SVID."""

    cert: Path
    key: Path
    roots: Path


class LocalCA:
    """A root, its key, and the trust domain it stands for. Made by `create`, `open`, `open_or_create`, `in_memory`."""

    def __init__(self, root: x509.Certificate, key: PrivateKey, trust_domain: TrustDomain) -> None:
        self._root = root
        self._key = key
        self._trust_domain = trust_domain

    @classmethod
    def in_memory(cls, *, trust_domain: TrustDomain | str = "cluster.local") -> LocalCA:
        """A new CA that is gone with the process.

        Raises:
            InvalidIdentity: the trust domain is none.
        """
        return _decode(*_new_root(), _trust_domain(trust_domain).name.encode(), Path("new CA"))

    @classmethod
    def create(cls, directory: StrPath, *, trust_domain: TrustDomain | str = "cluster.local") -> LocalCA:
        """Make a new CA and keep it, with its key, in a new directory that only we can read.

        The directory appears complete or not at all. Where there is an empty one that cannot be replaced, since it is
        a mount point or its parent is not ours, it is filled under a lock, and the root comes last.

        Raises:
            InvalidIdentity: the trust domain is none.
            InvalidCertificate: the directory holds a CA or anything else, or cannot be made.
        """
        target = Path(directory)
        domain = _trust_domain(trust_domain)
        root, key = _new_root()
        files = {ROOT_FILE: root, ROOT_KEY_FILE: key, TRUST_DOMAIN_FILE: domain.name.encode() + b"\n"}
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            making = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))  # 0700
            try:
                for name, content in files.items():
                    _write_new(making / name, content)
                # Fails when the target is a directory with anything in it, so the second of two creators loses.
                making.rename(target)
            except BaseException:
                shutil.rmtree(making, ignore_errors=True)
                raise
        except OSError as problem:
            if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST) and _is_empty(target):
                _fill(target, files)
            else:
                _refuse_to_create(target, problem)
        return _decode(root, key, domain.name.encode(), target)

    @classmethod
    def open(cls, directory: StrPath) -> LocalCA:
        """The CA that `create` keeps in a directory. Several processes may have it open.

        Raises:
            InvalidCertificate: there is none, or its files are damaged.
        """
        path = Path(directory)
        if not _has_root(path):
            raise InvalidCertificate(f"{path}: holds no CA ({ROOT_FILE} is missing); create one first")
        texts = [Pem.read(path / name).text for name in (ROOT_FILE, ROOT_KEY_FILE, TRUST_DOMAIN_FILE)]
        return _decode(texts[0], texts[1], texts[2], path)

    @classmethod
    def open_or_create(cls, directory: StrPath, *, trust_domain: TrustDomain | str = "cluster.local") -> LocalCA:
        """The CA in a directory, made if there is none; of several processes that do this at once, one makes it.

        Raises:
            InvalidIdentity: the trust domain is none.
            InvalidCertificate: neither works, or the CA there is one of another trust domain.
        """
        domain = _trust_domain(trust_domain)
        path = Path(directory)
        if not _has_root(path):
            try:
                return cls.create(path, trust_domain=domain)
            except InvalidCertificate:
                if not _has_root(path):
                    raise
        ca = cls.open(path)
        if ca.trust_domain != domain:
            raise InvalidCertificate(f"{path}: is the CA of {ca.trust_domain}, not of {domain}; choose another")
        return ca

    @property
    def trust_domain(self) -> TrustDomain:
        """Whose identities it issues."""
        return self._trust_domain

    @property
    def roots(self) -> tuple[x509.Certificate, ...]:
        """What others need in order to trust it."""
        return (self._root,)

    @property
    def roots_pem(self) -> bytes:
        """The same as PEM."""
        return _pem(*self.roots)

    def issue(
        self,
        identity: SpiffeIdentity | str,
        *,
        ttl: timedelta = DEFAULT_TTL,
        now: datetime | None = None,
        federated: Mapping[TrustDomain, tuple[x509.Certificate, ...]] | None = None,
    ) -> Svid:
        """A new SVID with a new key (ECDSA P-256), kept nowhere.

        Args:
            identity: a workload's id in the CA's trust domain.
            ttl: how long it is valid from now; cut at the root's own end.
            now: an aware time; the wall clock's if absent.
            federated: roots of other trust domains that the SVID shall check peers with.

        Raises:
            InvalidIdentity: the identity is not one of a workload in the trust domain.
            InvalidCertificate: the root is not valid now.
            ValueError: ``ttl`` is not positive.
        """
        if isinstance(identity, str):
            identity = SpiffeIdentity.parse(identity)
        if identity.trust_domain != self._trust_domain:
            raise InvalidIdentity(f"the CA of {self._trust_domain} cannot issue {identity}")
        if not identity.path:
            raise InvalidIdentity(f"{identity} names a trust domain; a workload's id has a path")
        if ttl <= timedelta(0):
            raise ValueError(f"ttl must be positive, not {ttl}")
        start = (_utc_now() if now is None else now).replace(microsecond=0)
        if not self._root.not_valid_before_utc <= start < self._root.not_valid_after_utc:
            raise InvalidCertificate(f"the root of {self._trust_domain} is not valid at {start:%F %T}; create a new CA")
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._root.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(start - BACKDATE, self._root.not_valid_before_utc))
            .not_valid_after(min(start + ttl, self._root.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_signing_only(), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            # Critical because the subject is empty (RFC 5280 section 4.2.1.6).
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))]), critical=True)
            .add_extension(_authority_key(self._root), critical=False)
            .sign(self._key, None if isinstance(self._key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
        )
        bundles = {**(federated or {}), self._trust_domain: self.roots}
        return Svid(identity=identity, chain=(leaf,), private_key=key, bundles=MappingProxyType(bundles))

    def write(self, svid: Svid, directory: StrPath) -> SvidFiles:
        """Keep an SVID in files; see `write_svid`."""
        return write_svid(svid, directory)

    def __repr__(self) -> str:
        return f"<LocalCA of {self._trust_domain}>"


class CaSvidSource:
    """An `SvidSource` that issues its own SVIDs, each when half of the last one's time is over.

    The wall clock decides, so that a machine that slept renews when it wakes. `current` renews what is due;
    `run` in a nursery does so between handshakes too.

    Args:
        ca: who signs.
        identity: for whom.
        ttl: how long each SVID is valid.
        now: tells the wall time.
        on_renew: called with each new SVID but the first.

    Raises:
        InvalidIdentity: the CA cannot issue that identity.
    """

    def __init__(
        self,
        ca: LocalCA,
        identity: SpiffeIdentity | str,
        ttl: timedelta = DEFAULT_TTL,
        *,
        now: Callable[[], datetime] = _utc_now,
        on_renew: Callable[[Svid], None] | None = None,
    ) -> None:
        self._ca = ca
        self._ttl = ttl
        self._now = now
        self._on_renew = on_renew
        self._svid = ca.issue(identity, ttl=ttl, now=now())
        self._due = self._half_life()

    @property
    def identity(self) -> SpiffeIdentity:
        """For whom it issues."""
        return self._svid.identity

    def current(self) -> Svid:
        """The newest SVID, made now (in less than a millisecond) when the last one is past its half.

        Raises:
            InvalidCertificate: it is due, and the CA's root has expired.
        """
        if self._now() >= self._due:
            self._svid = self._ca.issue(self.identity, ttl=self._ttl, now=self._now())
            self._due = self._half_life()
            if self._on_renew is not None:
                self._on_renew(self._svid)
        return self._svid

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Renew at half life until cancelled. A root that has expired is `current`'s to report."""
        task_status.started()
        while True:
            # In short steps: trio's clock stands still while the machine sleeps, wall time does not.
            left = (self._due - self._now()).total_seconds()
            await trio.sleep(min(max(left, 1.0), _LONGEST_SLEEP))
            with contextlib.suppress(InvalidCertificate):
                self.current()

    def _half_life(self) -> datetime:
        now = self._now()
        return now + (self._svid.not_after - now) / 2


def write_svid(svid: Svid, directory: StrPath) -> SvidFiles:
    """Write ``cert.pem``, ``key.pem`` and ``roots.pem`` of an SVID, each replaced in one step.

    The directory is made if need be (0700), the key is readable by us only from its first byte on. Roots of other
    trust domains are not written.

    Raises:
        InvalidCertificate: the directory cannot be written to.
    """
    path = Path(directory)
    files = SvidFiles(cert=path / "cert.pem", key=path / "key.pem", roots=path / "roots.pem")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _replace(files.roots, _pem(*svid.bundles[svid.identity.trust_domain]))
        _replace(files.key, _key_pem(svid.private_key))
        _replace(files.cert, _pem(*svid.chain))
    except OSError as problem:
        why = problem.strerror or type(problem).__name__
        raise InvalidCertificate(f"{path}: cannot be written: {why}; choose another directory") from None
    return files


def _new_root() -> tuple[bytes, bytes]:
    ca = trustme.CA(organization_name="hbone local CA")
    return ca.cert_pem.bytes(), ca.private_key_pem.bytes()


def _decode(root: bytes, key: bytes, trust_domain: bytes, path: Path) -> LocalCA:
    root_pem, key_pem = Pem(str(path / ROOT_FILE), root), Pem(str(path / ROOT_KEY_FILE), key)
    certificate, private_key = root_pem.certificates()[0], key_pem.private_key()
    try:
        check_authority(certificate)
    except InvalidCertificate as problem:
        root_pem.refuse(f"{problem}; restore the CA's file")
    if certificate.public_key() != private_key.public_key():
        key_pem.refuse(f"is not the key of {ROOT_FILE}; restore the CA's files")
    try:
        domain = TrustDomain(trust_domain.decode("ascii").strip())
    except ValueError as problem:
        raise InvalidCertificate(f"{path / TRUST_DOMAIN_FILE}: {problem}; write the name of the trust domain") from None
    return LocalCA(certificate, private_key, domain)


def _is_empty(directory: Path) -> bool:
    """Whether nothing is in there but what a creator that died has left, and what file systems put there."""
    ours = (ROOT_FILE, ROOT_KEY_FILE, TRUST_DOMAIN_FILE)
    expected = ("lost+found", *ours[1:])
    drafts = tuple(f".{name}." for name in ours)
    try:
        return all(path.name in expected or path.name.startswith(drafts) for path in directory.iterdir())
    except OSError:
        return False


def _fill(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write a CA into a directory that is there; of several at once, one does."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if (directory / ROOT_FILE).exists():
                raise FileExistsError
            for name in sorted(files, key=lambda name: name == ROOT_FILE):  # who finds the root finds all
                _replace(directory / name, files[name])
        finally:
            os.close(descriptor)
    except OSError as problem:
        _refuse_to_create(directory, problem)


def _has_root(directory: Path) -> bool:
    """Whether there is a CA.

    Raises:
        InvalidCertificate: nobody lets us see.
    """
    try:
        return (directory / ROOT_FILE).exists()
    except OSError as problem:
        why = f"cannot be read: {problem.strerror}; check the path and its permissions"
        raise InvalidCertificate(f"{directory}: {why}") from None


def _refuse_to_create(directory: Path, problem: OSError) -> NoReturn:
    if _has_root(directory):
        raise InvalidCertificate(f"{directory}: holds a CA already; open that one, or choose another directory")
    why = problem.strerror or type(problem).__name__
    raise InvalidCertificate(f"{directory}: no CA can be made here: {why}; choose a new directory") from None


def _trust_domain(value: TrustDomain | str) -> TrustDomain:
    return TrustDomain.parse(value) if isinstance(value, str) else value


def _signing_only() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_key(root: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        subject_key = root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key())  # type: ignore[arg-type]
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject_key)


def _pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


def _key_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_new(path: Path, content: bytes) -> None:
    # The mode goes with the creation: a chmod afterwards would leave a moment in which others can open the file.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        _write_new(draft, content)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
