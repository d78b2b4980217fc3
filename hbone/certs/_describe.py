"""What a certificate file says, as facts for people: what ``hbone ca show`` prints."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hbone.errors import InvalidCertificate, InvalidIdentity
from hbone.identity import SpiffeIdentity
from hbone.tls._pem import Pem
from hbone.tls._rules import check_authority, check_svid_leaf

if TYPE_CHECKING:
    import os

__all__ = ["CertificateFacts", "describe"]

SOON = timedelta(hours=1)
"""How much validity must be left for a leaf to raise no warning."""

_KEY_USAGES = {
    "digital_signature": "digitalSignature",
    "content_commitment": "contentCommitment",
    "key_encipherment": "keyEncipherment",
    "data_encipherment": "dataEncipherment",
    "key_agreement": "keyAgreement",
    "key_cert_sign": "keyCertSign",
    "crl_sign": "cRLSign",
}
_CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
# cryptography has names for these, but only in private.
_EXTENDED = {"1.3.6.1.5.5.7.3.1": "serverAuth", "1.3.6.1.5.5.7.3.2": "clientAuth", "2.5.29.37.0": "any"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateFacts:
    """One certificate in words.

    Attributes:
        identity: the SPIFFE id, if it has one that is valid.
        subject: RFC 4514 text; often empty.
        issuer: RFC 4514 text.
        serial: in hexadecimal.
        not_before: UTC.
        not_after: UTC.
        key_type: ``ECDSA P-256``, ``RSA 2048``, ``Ed25519``.
        names: all subject alternative names, as ``URI:...`` or ``DNS:...``.
        is_ca: whether it may sign others.
        key_usage: in the words of RFC 5280; None when absent.
        extended_key_usage: ``serverAuth``, ``clientAuth`` or OIDs; None when absent.
        fingerprint: SHA-256, in hexadecimal.
        warnings: what will or may not work.
    """

    identity: SpiffeIdentity | None
    subject: str
    issuer: str
    serial: str
    not_before: datetime
    not_after: datetime
    key_type: str
    names: tuple[str, ...]
    is_ca: bool
    key_usage: tuple[str, ...] | None
    extended_key_usage: tuple[str, ...] | None
    fingerprint: str
    warnings: tuple[str, ...]


def describe(path: str | os.PathLike[str], *, now: datetime | None = None) -> list[CertificateFacts]:
    """The facts of each certificate in a PEM file, in its order.

    Args:
        path: a leaf, a chain or roots.
        now: an aware time to judge validity by; the wall clock's if absent.

    Raises:
        InvalidCertificate: the file cannot be read or has no certificate.
    """
    pem = Pem.read(path)
    when = datetime.now(UTC) if now is None else now
    try:
        return [_facts(certificate, when) for certificate in pem.certificates()]
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as problem:
        if isinstance(problem, InvalidCertificate):
            raise
        pem.refuse(f"has a certificate that cannot be read: {problem}")


def _facts(certificate: x509.Certificate, when: datetime) -> CertificateFacts:
    extensions = {type(extension.value): extension.value for extension in certificate.extensions}
    constraints = extensions.get(x509.BasicConstraints)
    usage = extensions.get(x509.KeyUsage)
    extended = extensions.get(x509.ExtendedKeyUsage)
    alternative = extensions.get(x509.SubjectAlternativeName)
    is_ca = isinstance(constraints, x509.BasicConstraints) and constraints.ca
    names = list(alternative) if isinstance(alternative, x509.SubjectAlternativeName) else []
    return CertificateFacts(
        identity=_identity(names),
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        serial=f"{certificate.serial_number:x}",
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        key_type=_key_type(certificate),
        names=tuple(map(_name, names)),
        is_ca=is_ca,
        key_usage=(
            tuple(word for name, word in _KEY_USAGES.items() if getattr(usage, name))
            if isinstance(usage, x509.KeyUsage)
            else None
        ),
        extended_key_usage=(
            tuple(_EXTENDED.get(oid.dotted_string, oid.dotted_string) for oid in extended)
            if isinstance(extended, x509.ExtendedKeyUsage)
            else None
        ),
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        warnings=tuple(_warnings(certificate, is_ca=is_ca, has_usage=usage is not None, when=when)),
    )


def _identity(names: list[x509.GeneralName]) -> SpiffeIdentity | None:
    uris = [name.value for name in names if isinstance(name, x509.UniformResourceIdentifier)]
    try:
        return SpiffeIdentity.parse(uris[0]) if len(uris) == 1 else None
    except InvalidIdentity:
        return None


def _name(name: x509.GeneralName) -> str:
    match name:
        case x509.UniformResourceIdentifier():
            return f"URI:{name.value}"
        case x509.DNSName():
            return f"DNS:{name.value}"
        case x509.IPAddress():
            return f"IP:{name.value}"
    return f"{type(name).__name__}:{name.value}"


def _key_type(certificate: x509.Certificate) -> str:
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return "unknown"
    match key:
        case ec.EllipticCurvePublicKey(curve=curve):
            return f"ECDSA {_CURVES.get(curve.name, curve.name)}"
        case rsa.RSAPublicKey(key_size=bits):
            return f"RSA {bits}"
    return type(key).__name__.removesuffix("PublicKey").lstrip("_")


def _warnings(certificate: x509.Certificate, *, is_ca: bool, has_usage: bool, when: datetime) -> list[str]:
    warnings = []
    if when < certificate.not_valid_before_utc:
        warnings.append("it is not valid yet")
    elif when > certificate.not_valid_after_utc:
        warnings.append("it has expired")
    elif not is_ca and certificate.not_valid_after_utc - when < SOON:
        warnings.append("it expires in less than an hour")
    try:
        if is_ca:
            check_authority(certificate)
        else:
            check_svid_leaf(certificate)
    except InvalidCertificate as problem:
        warnings.append(f"it {problem}")
    if not has_usage:
        warnings.append("it has no key usage, which strict peers require")
    return warnings
