"""Certificates made to measure, in memory: every extension can be left out or made wrong.

Like the rest of `support`, it imports nothing of the product.
"""

from __future__ import annotations

import datetime
import functools
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
HOUR = datetime.timedelta(hours=1)

WEB = "spiffe://cluster.local/ns/shop/sa/web"
DB = "spiffe://cluster.local/ns/shop/sa/db"
ALIEN = "spiffe://other.example/ns/shop/sa/web"

SERVER_AUTH = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT_AUTH = ExtendedKeyUsageOID.CLIENT_AUTH


def usage(*names: str) -> x509.KeyUsage:
    flags = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
    flags += ["key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]
    return x509.KeyUsage(**{flag: flag in names for flag in flags})


LEAF_USAGE = usage("digital_signature")
CA_USAGE = usage("key_cert_sign", "crl_sign")


@dataclass(frozen=True)
class Made:
    """A certificate, its key and those that signed it."""

    certificate: x509.Certificate
    key: Any
    issuer: Made | None

    @property
    def cert_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @functools.cached_property
    def key_pem(self) -> bytes:
        return key_pem(self.key)

    @property
    def chain_pem(self) -> bytes:
        """Leaf and intermediates, without the root."""
        above = b"" if self.issuer is None or self.issuer.issuer is None else self.issuer.chain_pem
        return self.cert_pem + above

    @property
    def root_pem(self) -> bytes:
        return self.cert_pem if self.issuer is None else self.issuer.root_pem


def key_pem(key: Any, *, password: bytes | None = None) -> bytes:
    cipher: Any = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    encoded: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, cipher)
    return encoded


def make(
    issuer: Made | None,
    *uris: str,
    name: str = "",
    ca: bool | None = False,
    key: Any = None,
    key_usage: x509.KeyUsage | None = LEAF_USAGE,
    usage_critical: bool = True,
    extended: tuple[x509.ObjectIdentifier, ...] | None = (SERVER_AUTH, CLIENT_AUTH),
    dns: tuple[str, ...] = (),
    san_critical: bool = True,
    start: datetime.datetime = NOW - HOUR,
    end: datetime.datetime = NOW + HOUR,
    path_length: int | None = None,
    extra: tuple[tuple[x509.ExtensionType, bool], ...] = (),
    algorithm: hashes.HashAlgorithm | None = None,
) -> Made:
    """A good leaf, unless told otherwise. ``None`` leaves an extension out."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    signer = key if issuer is None else issuer.key
    subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, name)] if name else [])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
    if key_usage is not None:
        builder = builder.add_extension(key_usage, critical=usage_critical)
    if extended is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(list(extended)), critical=False)
    if uris or dns:
        names = [*(x509.UniformResourceIdentifier(uri) for uri in uris), *(x509.DNSName(one) for one in dns)]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=san_critical)
    for extension, critical in extra:
        builder = builder.add_extension(extension, critical=critical)
    if algorithm is None and not isinstance(signer, ed25519.Ed25519PrivateKey):
        algorithm = hashes.SHA256()
    return Made(builder.sign(signer, algorithm), key, issuer)  # type: ignore[arg-type]


def make_ca(issuer: Made | None = None, name: str = "root", **changes: Any) -> Made:
    """A root, or an intermediate when it has an issuer. As Istio's, it has no URI."""
    options: dict[str, Any] = {"ca": True, "key_usage": CA_USAGE, "extended": None, "end": NOW + 2 * HOUR} | changes
    return make(issuer, name=name, **options)


@functools.cache
def root() -> Made:
    """The root of cluster.local."""
    return make_ca(name="cluster.local")


@functools.cache
def alien_root() -> Made:
    """The root of other.example, which Istio's habit gives the same name."""
    return make_ca(name="cluster.local")


@functools.cache
def intermediate() -> Made:
    return make_ca(root(), name="intermediate")


@functools.cache
def web() -> Made:
    return make(root(), WEB)


@functools.cache
def db() -> Made:
    return make(root(), DB)


@functools.cache
def alien() -> Made:
    return make(alien_root(), ALIEN)
