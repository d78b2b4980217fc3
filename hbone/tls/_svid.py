"""Our own identity document: chain, key and the roots to check others with, loaded and checked as one thing.

Everything that could make a handshake fail later is looked for when an SVID is made, where the file at fault can be
named. Each fault is an `InvalidCertificate` of one line: which file, what is wrong, what to do. Keys stay out of texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from hbone.errors import InvalidCertificate
from hbone.identity import TrustDomain
from hbone.tls._pem import Pem
from hbone.tls._rules import check_authority, check_svid_chain, is_issued_by, is_self_signed

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from cryptography import x509

    from hbone.identity import SpiffeIdentity
    from hbone.tls._pem import PrivateKey

__all__ = ["Svid", "SvidSource"]

MAX_CHAIN = 10
"""Most certificates in a chain; the handshake allows no more either."""

_WEAK_HASHES = ("md5", "sha1")


class SvidSource(Protocol):
    """Where the SVID of one identity comes from; it may hand out a newer one at any time."""

    @property
    def identity(self) -> SpiffeIdentity:
        """Whose SVIDs these are; it never changes."""

    def current(self) -> Svid:
        """The newest SVID. Cheap: called for each handshake.

        Raises:
            CertificateUnavailable: there is none now.
        """


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False, weakref_slot=True)
class Svid:
    """An X509-SVID with its key, and the roots of the trust domains whose peers it can check.

    Compared by identity, never by content. `from_files` and `from_pem` check all of it; the constructor checks nothing.

    Attributes:
        identity: the SPIFFE id in the leaf.
        chain: leaf first, then intermediates; no root.
        private_key: the leaf's key; shown in no text.
        bundles: the roots of each trust domain, our own among them.
    """

    identity: SpiffeIdentity
    chain: tuple[x509.Certificate, ...]
    private_key: PrivateKey = field(repr=False)
    bundles: Mapping[TrustDomain, tuple[x509.Certificate, ...]]
    _not_after: datetime = field(init=False, repr=False, compare=False)  # asked for with each connection

    def __post_init__(self) -> None:
        object.__setattr__(self, "_not_after", min(certificate.not_valid_after_utc for certificate in self.chain))

    @classmethod
    def from_files(
        cls,
        cert: str | os.PathLike[str],
        key: str | os.PathLike[str],
        roots: str | os.PathLike[str],
        *,
        federated: Mapping[str, str | os.PathLike[str]] | None = None,
        now: datetime | None = None,
    ) -> Svid:
        """Load and check an SVID from PEM files.

        Args:
            cert: the leaf and its intermediates. A root at the end, as Istio writes it, is taken but not sent.
            key: the leaf's private key, not encrypted: ECDSA, RSA or Ed25519.
            roots: one or more roots of our own trust domain.
            federated: files with the roots of other trust domains, by the name of the domain.
            now: an aware time to check validity against; the wall clock's if absent.

        Raises:
            InvalidCertificate: a file is missing or of no use.
        """
        return _load(
            Pem.read(cert),
            Pem.read(key),
            Pem.read(roots),
            {domain: Pem.read(path) for domain, path in (federated or {}).items()},
            now,
        )

    @classmethod
    def from_pem(
        cls,
        cert: bytes,
        key: bytes,
        roots: bytes,
        *,
        federated: Mapping[str, bytes] | None = None,
        now: datetime | None = None,
    ) -> Svid:
        """Make and check an SVID from PEM texts; otherwise as `from_files`.

        Raises:
            InvalidCertificate: something in them is of no use.
        """
        return _load(
            Pem("certificate", cert),
            Pem("private key", key),
            Pem("roots", roots),
            {domain: Pem(f"roots of {domain}", text) for domain, text in (federated or {}).items()},
            now,
        )

    def current(self) -> Svid:
        """This SVID: one that never rotates is its own source."""
        return self

    @property
    def not_before(self) -> datetime:
        """From when on the whole chain is valid (UTC)."""
        return max(certificate.not_valid_before_utc for certificate in self.chain)

    @property
    def not_after(self) -> datetime:
        """Until when the whole chain is valid (UTC)."""
        return self._not_after

    def __repr__(self) -> str:
        return f"<Svid {self.identity} until {self.not_after:%Y-%m-%dT%H:%M:%SZ}>"


def _load(cert: Pem, key: Pem, roots: Pem, federated: Mapping[str, Pem], now: datetime | None) -> Svid:
    when = datetime.now(UTC) if now is None else now
    certificates = cert.certificates()
    private_key = key.private_key()
    leaf = _leaf(certificates, private_key, cert, key)
    chain = _chain(leaf, certificates)
    try:
        identity = check_svid_chain(chain)
    except InvalidCertificate as problem:
        # "certificate 2 of the chain ..." names its own subject.
        cert.refuse(problem if len(chain) > 1 and str(problem).startswith("certificate ") else f"the leaf {problem}")
    for position, certificate in enumerate(chain, start=1):
        _check_usable(certificate, f"certificate {position} of the chain" if len(chain) > 1 else "it", when, cert)
    anchors = _roots(roots)
    _check_anchored(chain, anchors, when, cert, roots)
    bundles = {identity.trust_domain: anchors}
    for name, pem in federated.items():
        try:
            domain = TrustDomain.parse(name)
        except ValueError as problem:
            pem.refuse(problem)
        if domain in bundles:
            pem.refuse(f"trust domain {domain} has its roots already; put them all into one file")
        bundles[domain] = _roots(pem)
    return Svid(identity=identity, chain=chain, private_key=private_key, bundles=MappingProxyType(bundles))


def _leaf(certificates: Sequence[x509.Certificate], key: PrivateKey, cert: Pem, key_pem: Pem) -> x509.Certificate:
    public = _spki(key.public_key())
    for certificate in certificates:
        try:
            if _spki(certificate.public_key()) == public:
                return certificate
        except (ValueError, UnsupportedAlgorithm):
            continue
    return key_pem.refuse(
        f"is not the key of any certificate in {cert.name}; give the key that was made with the certificate"
    )


def _chain(leaf: x509.Certificate, certificates: Iterable[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    """The leaf and what leads from it towards a root, in the order that TLS wants; the root itself is the peer's."""
    chain = [leaf]
    others = [certificate for certificate in certificates if certificate != leaf and not is_self_signed(certificate)]
    while len(chain) < MAX_CHAIN:
        issuer = next((one for one in others if one not in chain and is_issued_by(chain[-1], one)), None)
        if issuer is None:
            break
        chain.append(issuer)
    return tuple(chain)


def _check_usable(certificate: x509.Certificate, what: str, when: datetime, pem: Pem) -> None:
    if when < certificate.not_valid_before_utc:
        pem.refuse(
            f"{what} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC; check the clock"
        )
    if when > certificate.not_valid_after_utc:
        pem.refuse(f"{what} expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC; get a new certificate")
    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        pem.refuse(f"{what} has an unknown signature algorithm; get one signed with ECDSA and SHA-256")
    if algorithm is not None and algorithm.name in _WEAK_HASHES:
        pem.refuse(
            f"{what} is signed with {algorithm.name.upper()}, which no peer accepts; get one signed with SHA-256"
        )


def _roots(pem: Pem) -> tuple[x509.Certificate, ...]:
    anchors = tuple(pem.certificates())
    for position, anchor in enumerate(anchors, start=1):
        try:
            check_authority(anchor)
        except InvalidCertificate as problem:
            pem.refuse(f"certificate {position} {problem}; leave only roots in the file")
    return anchors


def _check_anchored(
    chain: Sequence[x509.Certificate], anchors: Sequence[x509.Certificate], when: datetime, cert: Pem, roots: Pem
) -> None:
    issuers = [anchor for anchor in anchors if any(is_issued_by(one, anchor) or one == anchor for one in chain)]
    if not issuers:
        wanted = chain[-1].issuer.rfc4514_string() or "an issuer without a name"
        roots.refuse(f"has no root for {cert.name}, which was signed by {wanted}; add that CA's certificate")
    if all(when > anchor.not_valid_after_utc for anchor in issuers):
        roots.refuse(f"the root of {cert.name} has expired; get certificates from a new root")


def _spki(key: object) -> bytes:
    return key.public_bytes(  # type: ignore[attr-defined, no-any-return]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
