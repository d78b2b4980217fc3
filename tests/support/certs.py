"""Throw-away CAs and SPIFFE leaves, good ones and each kind of bad one.

Made with `cryptography` alone. One set is made a process (`pki()`), in a temporary directory that goes when the
process does, because foreign peers can only read certificates from files.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import shutil
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CLIENT", "OTHER", "SERVER", "Leaf", "Pki", "TestCa", "pki"]

CLIENT = "spiffe://cluster.local/ns/shop/sa/cart"
OTHER = "spiffe://cluster.local/ns/bank/sa/teller"
SERVER = "spiffe://cluster.local/ns/shop/sa/stock"

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A certificate chain, its key and the roots to check peers with, as PEM files."""

    name: str
    cert: Path
    key: Path
    roots: Path

    def client_context(self, *, alpn: Sequence[str] = ("h2",)) -> ssl.SSLContext:
        """A stdlib context for the client role: TLS 1.3, no host name check, our certificate."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT, alpn)

    def server_context(self, *, alpn: Sequence[str] = ("h2",)) -> ssl.SSLContext:
        """A stdlib context for the server role: TLS 1.3, client certificate required."""
        return self._context(ssl.PROTOCOL_TLS_SERVER, alpn)

    def _context(self, role: int, alpn: Sequence[str]) -> ssl.SSLContext:
        context = ssl.SSLContext(role)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(self.roots)
        context.load_cert_chain(self.cert, self.key)
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context


class TestCa:
    """One root that signs leaves of any quality."""

    __test__ = False

    def __init__(self, directory: Path, trust_domain: str, *, name: str = "root") -> None:
        self.directory = directory
        self.trust_domain = trust_domain
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"{trust_domain} test root")])
        now = datetime.datetime.now(datetime.UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 30 * _DAY)
            .not_valid_after(now + 30 * _DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(cert_sign=True), critical=True)
            .add_extension(_san([f"spiffe://{trust_domain}"]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.roots = directory / f"{name}.pem"
        self.roots.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        name: str,
        uris: Sequence[str],
        *,
        roots: Path | None = None,
        dns: Sequence[str] = (),
        ca: bool = False,
        cert_sign: bool = False,
        start: datetime.timedelta = -_DAY,
        end: datetime.timedelta = _DAY,
        wrong_key: bool = False,
    ) -> Leaf:
        """Signs a leaf and writes it; the arguments choose what is wrong with it.

        Args:
            name: of the files.
            uris: URI subject alternative names; none and two are faults.
            roots: the roots that its holder trusts, if not this CA.
            dns: DNS names besides.
            ca: sets the CA flag.
            cert_sign: sets keyCertSign.
            start: of the validity, from now.
            end: of the validity, from now.
            wrong_key: writes a key that is not the certificate's.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + start)
            .not_valid_after(now + end)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(_usage(signature=True, cert_sign=cert_sign), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if uris or dns:
            builder = builder.add_extension(_san(uris, dns), critical=True)
        cert = builder.sign(self._key, hashes.SHA256())
        stored = ec.generate_private_key(ec.SECP256R1()) if wrong_key else key
        leaf = Leaf(
            name=name,
            cert=self.directory / f"{name}.pem",
            key=self.directory / f"{name}.key",
            roots=roots or self.roots,
        )
        leaf.cert.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        leaf.key.touch(mode=0o600)
        leaf.key.write_bytes(
            stored.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return leaf


def _san(uris: Sequence[str], dns: Sequence[str] = ()) -> x509.SubjectAlternativeName:
    names = [x509.UniformResourceIdentifier(uri) for uri in uris]
    return x509.SubjectAlternativeName([*names, *(x509.DNSName(name) for name in dns)])


def _usage(*, signature: bool = False, cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=cert_sign,
        crl_sign=cert_sign,
        encipher_only=False,
        decipher_only=False,
    )


class Pki:
    """The certificates that tests use, by what they are; each is made when first asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca = TestCa(directory, "cluster.local")
        self.foreign_ca = TestCa(directory, "cluster.local", name="foreign-root")
        self.both_roots = directory / "both-roots.pem"
        self.both_roots.write_bytes(self.ca.roots.read_bytes() + self.foreign_ca.roots.read_bytes())
        self._leaves: dict[str, Leaf] = {}

    def leaf(self, identity: str) -> Leaf:
        """A good leaf of our CA."""
        name = identity.removeprefix("spiffe://").replace("/", ".")
        if name not in self._leaves:
            self._leaves[name] = self.ca.issue(name, [identity])
        return self._leaves[name]

    @functools.cached_property
    def client(self) -> Leaf:
        return self.leaf(CLIENT)

    @functools.cached_property
    def other(self) -> Leaf:
        return self.leaf(OTHER)

    @functools.cached_property
    def server(self) -> Leaf:
        return self.leaf(SERVER)

    @functools.cached_property
    def foreign(self) -> Leaf:
        """Claims `CLIENT`, signed by a root that nobody else trusts; itself trusts both roots."""
        return self.foreign_ca.issue("foreign", [CLIENT], roots=self.both_roots)

    @functools.cached_property
    def foreign_server(self) -> Leaf:
        """Claims `SERVER`, signed by a root that nobody else trusts; itself trusts both roots."""
        return self.foreign_ca.issue("foreign-server", [SERVER], roots=self.both_roots)

    @functools.cached_property
    def other_trust_domain(self) -> Leaf:
        """Signed by our root, but of another trust domain."""
        return self.ca.issue("other-td", ["spiffe://elsewhere.example/ns/shop/sa/cart"])

    @functools.cached_property
    def expired(self) -> Leaf:
        return self.ca.issue("expired", [CLIENT], start=-2 * _DAY, end=-_DAY)

    @functools.cached_property
    def not_yet_valid(self) -> Leaf:
        return self.ca.issue("not-yet", [CLIENT], start=_DAY, end=2 * _DAY)

    @functools.cached_property
    def ca_flagged(self) -> Leaf:
        return self.ca.issue("ca-flagged", [CLIENT], ca=True)

    @functools.cached_property
    def cert_sign(self) -> Leaf:
        return self.ca.issue("cert-sign", [CLIENT], cert_sign=True)

    @functools.cached_property
    def no_uri(self) -> Leaf:
        return self.ca.issue("no-uri", [], dns=["cart.shop.svc"])

    @functools.cached_property
    def two_uris(self) -> Leaf:
        return self.ca.issue("two-uris", [CLIENT, OTHER])

    @functools.cached_property
    def wrong_key(self) -> Leaf:
        return self.ca.issue("wrong-key", [CLIENT], wrong_key=True)


@functools.cache
def pki() -> Pki:
    """The one set of this process."""
    directory = Path(tempfile.mkdtemp(prefix="hbone-test-pki-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Pki(directory)
