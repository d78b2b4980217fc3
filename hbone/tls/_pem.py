"""PEM texts from the user: what is read out of them, and the fault named when it cannot be."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from hbone.errors import InvalidCertificate

if TYPE_CHECKING:
    import os

__all__ = ["Pem", "PrivateKey"]

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey

_MIN_RSA_BITS = 2048
# The curves that TLS 1.3 has signature schemes for (RFC 8446 section 4.2.3).
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_KEY_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]*)PRIVATE KEY-----.*?-----END \1PRIVATE KEY-----", re.DOTALL)


@dataclass(frozen=True, slots=True, repr=False)
class Pem:
    """A PEM text and the name that faults in it are reported under.

    All its methods raise `InvalidCertificate`.
    """

    name: str
    text: bytes

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Pem:
        """The text of a file, named by its path."""
        try:
            return cls(str(path), Path(path).read_bytes())
        except OSError as problem:
            why = problem.strerror or type(problem).__name__
            raise InvalidCertificate(f"{path}: cannot be read: {why}; check the path and its permissions") from None

    def refuse(self, fault: object) -> NoReturn:
        """Raise `InvalidCertificate` for a fault in this text."""
        raise InvalidCertificate(f"{self.name}: {fault}") from None

    def certificates(self) -> list[x509.Certificate]:
        """All certificates in it, at least one."""
        if b"-----BEGIN" not in self.text:
            if self.text.startswith(b"\x30"):
                self.refuse("is DER, not PEM; convert it with: openssl x509 -inform der -outform pem")
            self.refuse("has no PEM block; give a file with -----BEGIN CERTIFICATE-----")
        if b"-----BEGIN CERTIFICATE-----" not in self.text:
            self.refuse("has no certificate, but other PEM blocks; were two files swapped?")
        try:
            return x509.load_pem_x509_certificates(self.text)
        except ValueError:
            self.refuse("has a damaged certificate; write the file again")

    def private_key(self) -> PrivateKey:
        """The one private key in it, of a kind that works in TLS 1.3."""
        blocks = list(_KEY_BLOCK.finditer(self.text))
        if not blocks:
            self.refuse("has no private key in PEM form; give a file with -----BEGIN PRIVATE KEY-----")
        if len(blocks) > 1:
            self.refuse(f"has {len(blocks)} private keys; leave only the certificate's")
        try:
            key = serialization.load_pem_private_key(blocks[0][0], password=None)
        except TypeError:
            self.refuse("is encrypted; decrypt it with: openssl pkey")
        # The reasons come from a parser that has read the secret: they are not repeated.
        except (ValueError, UnsupportedAlgorithm):
            self.refuse("has a damaged or unknown private key; write the file again")
        match key:
            case ec.EllipticCurvePrivateKey(curve=curve):
                if curve.name not in _CURVES:
                    self.refuse(f"has an ECDSA key on {curve.name}, which TLS 1.3 does not know; use P-256")
                return key
            case rsa.RSAPrivateKey(key_size=bits):
                if bits < _MIN_RSA_BITS:
                    self.refuse(f"has an RSA key of {bits} bits; use at least {_MIN_RSA_BITS}, or ECDSA on P-256")
                return key
            case ed25519.Ed25519PrivateKey():
                return key
        return self.refuse("has a key that is not ECDSA, RSA or Ed25519; use ECDSA on P-256")
