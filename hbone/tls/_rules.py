"""What makes a certificate an X509-SVID: the rules of the SPIFFE standard, for peers and for ourselves.

Pure functions over parsed certificates. Signatures up to a root, validity and revocation are somebody else's: OpenSSL's
inside a handshake, `Svid`'s when it loads its own files.

Messages are a fault and no more, so that they can follow the name of a file or of a peer.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.x509.oid import ExtendedKeyUsageOID

from hbone.errors import InvalidCertificate, InvalidIdentity
from hbone.identity import SpiffeIdentity

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["check_authority", "check_svid_chain", "check_svid_leaf", "is_issued_by", "is_self_signed"]

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


def check_svid_chain(chain: Sequence[x509.Certificate]) -> SpiffeIdentity:
    """Check a leaf and its intermediates, leaf first, each issued by the next (X509-SVID sections 2 to 5).

    Returns:
        The identity in the leaf.

    Raises:
        InvalidCertificate: the chain is empty, the leaf is no SVID, or another certificate may not sign or did not.
    """
    if not chain:
        raise InvalidCertificate("there is no certificate")
    identity = check_svid_leaf(chain[0])
    for position, (certificate, issuer) in enumerate(pairwise(chain), start=2):
        try:
            check_authority(issuer)
        except InvalidCertificate as problem:
            raise InvalidCertificate(f"certificate {position} of the chain {problem}") from None
        if not is_issued_by(certificate, issuer):
            raise InvalidCertificate(f"certificate {position} of the chain did not sign the one before it")
    return identity


def check_svid_leaf(leaf: x509.Certificate) -> SpiffeIdentity:
    """Check the leaf of an SVID: what it may be used for, and the one identity in it (X509-SVID sections 2 and 4).

    One leniency: a leaf without any key usage is taken, although the standard wants one. ztunnel and Envoy take it, so
    meshes have such leaves. A key usage that is present must be right.

    Returns:
        The identity in the leaf.

    Raises:
        InvalidCertificate: it breaks a rule.
    """
    constraints = _extension(leaf, x509.BasicConstraints)
    if constraints is not None and constraints.value.ca:
        raise InvalidCertificate("is a CA certificate; an SVID's leaf must not be one")
    _check_key_usage(leaf)
    extended = _extension(leaf, x509.ExtendedKeyUsage)
    if extended is not None:
        for name, usage in (
            ("serverAuth", ExtendedKeyUsageOID.SERVER_AUTH),
            ("clientAuth", ExtendedKeyUsageOID.CLIENT_AUTH),
        ):
            if usage not in extended.value:
                raise InvalidCertificate(f"has an extended key usage without {name}")
    return _identity(leaf)


def check_authority(certificate: x509.Certificate) -> None:
    """Check that a certificate may sign others: a CA and, if it has a key usage, one for that (X509-SVID section 4).

    It need not name a trust domain: roots in the field have no URI at all.

    Raises:
        InvalidCertificate: it may not sign.
    """
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is None or not constraints.value.ca:
        raise InvalidCertificate("is not a CA certificate (its basic constraints do not say CA)")
    usage = _extension(certificate, x509.KeyUsage)
    if usage is not None and not usage.value.key_cert_sign:
        raise InvalidCertificate("may not sign certificates (its key usage lacks keyCertSign)")


def is_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether the issuer's name and key fit the certificate's issuer and signature."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def is_self_signed(certificate: x509.Certificate) -> bool:
    """Whether the certificate is its own issuer, as roots are."""
    return certificate.subject == certificate.issuer and is_issued_by(certificate, certificate)


def _check_key_usage(leaf: x509.Certificate) -> None:
    extension = _extension(leaf, x509.KeyUsage)
    if extension is None:
        return
    usage = extension.value
    if not extension.critical:
        raise InvalidCertificate("has a key usage that is not critical")
    if not usage.digital_signature:
        raise InvalidCertificate("has a key usage without digitalSignature")
    if usage.key_cert_sign:
        raise InvalidCertificate("has the key usage keyCertSign, which is for CAs only")
    if usage.crl_sign:
        raise InvalidCertificate("has the key usage cRLSign, which is for CAs only")


def _identity(leaf: x509.Certificate) -> SpiffeIdentity:
    extension = _extension(leaf, x509.SubjectAlternativeName)
    uris = [] if extension is None else extension.value.get_values_for_type(x509.UniformResourceIdentifier)
    if extension is None or not uris:
        raise InvalidCertificate("has no SPIFFE id: no URI among its subject alternative names")
    if len(uris) > 1:
        raise InvalidCertificate(f"has {len(uris)} URIs among its subject alternative names; an SVID has exactly one")
    if not extension.critical and not leaf.subject.rdns:
        raise InvalidCertificate("has an empty subject, so its subject alternative name must be critical")
    try:
        identity = SpiffeIdentity.parse(uris[0])
    except InvalidIdentity as problem:
        raise InvalidCertificate(f"has no usable SPIFFE id: {problem}") from None
    if not identity.path:
        raise InvalidCertificate(f"has the id of a trust domain, {identity}; a workload's id has a path")
    return identity


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> x509.Extension[_Extension] | None:
    try:
        return certificate.extensions.get_extension_for_class(kind)
    except x509.ExtensionNotFound:
        return None
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as problem:
        raise InvalidCertificate(f"has extensions that cannot be read: {problem}") from None
