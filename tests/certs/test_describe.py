"""Certificate files in words."""

from __future__ import annotations

import base64
from datetime import timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from support.mint import CLIENT_AUTH, DB, HOUR, NOW, SERVER_AUTH, WEB, intermediate, make, make_ca, root, usage

from hbone.certs import CertificateFacts, LocalCA, describe
from hbone.errors import InvalidCertificate

if TYPE_CHECKING:
    from pathlib import Path


def facts(path: Path, content: bytes, **options: Any) -> CertificateFacts:
    (path / "x.pem").write_bytes(content)
    return describe(path / "x.pem", **({"now": NOW - timedelta(minutes=30)} | options))[0]


def test_a_leaf_of_our_own_ca(tmp_path: Path) -> None:
    ca = LocalCA.in_memory()
    svid = ca.issue(WEB)
    files = ca.write(svid, tmp_path)
    (leaf,) = describe(files.cert)
    assert str(leaf.identity) == WEB
    assert (leaf.subject, leaf.key_type, leaf.is_ca) == ("", "ECDSA P-256", False)
    assert leaf.names == (f"URI:{WEB}",)
    assert (leaf.key_usage, leaf.extended_key_usage) == (("digitalSignature",), ("serverAuth", "clientAuth"))
    assert (leaf.not_before, leaf.not_after) == (svid.not_before, svid.not_after)
    assert int(leaf.serial, 16) == svid.chain[0].serial_number
    assert len(leaf.fingerprint) == 64
    assert leaf.warnings == ()
    (anchor,) = describe(files.roots)
    assert (anchor.identity, anchor.is_ca, anchor.warnings) == (None, True, ())
    assert anchor.subject == anchor.issuer == leaf.issuer


def test_a_chain(tmp_path: Path) -> None:
    (tmp_path / "chain.pem").write_bytes(make(intermediate(), WEB).chain_pem + root().cert_pem)
    assert [one.is_ca for one in describe(tmp_path / "chain.pem")] == [False, True, True]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (ec.generate_private_key(ec.SECP384R1()), "ECDSA P-384"),
        (rsa.generate_private_key(65537, 2048), "RSA 2048"),
        (ed25519.Ed25519PrivateKey.generate(), "Ed25519"),
    ],
)
def test_key_types(tmp_path: Path, key: Any, words: str) -> None:
    assert facts(tmp_path, make(root(), WEB, key=key).cert_pem).key_type == words


WARNINGS: dict[str, tuple[dict[str, Any], str]] = {
    "expired": ({"end": NOW - HOUR * 3 / 4}, "it has expired"),
    "not yet": ({"start": NOW}, "it is not valid yet"),
    "soon": ({"end": NOW}, "it expires in less than an hour"),
    "no usage": ({"key_usage": None}, "it has no key usage, which strict peers require"),
    "bad usage": ({"key_usage": usage("digital_signature", "crl_sign")}, "cRLSign"),
    "one extended usage": ({"extended": (SERVER_AUTH,)}, "it has an extended key usage without clientAuth"),
}


@pytest.mark.parametrize(("options", "warning"), WARNINGS.values(), ids=WARNINGS.keys())
def test_warnings(tmp_path: Path, options: dict[str, Any], warning: str) -> None:
    (only,) = facts(tmp_path, make(root(), WEB, **options).cert_pem).warnings
    assert warning in only


def test_a_ca_that_may_not_sign(tmp_path: Path) -> None:
    (only,) = facts(tmp_path, make_ca(key_usage=usage("crl_sign")).cert_pem).warnings
    assert "may not sign" in only


def test_other_names(tmp_path: Path) -> None:
    names = x509.SubjectAlternativeName(
        [
            x509.DNSName("web.shop.svc"),
            x509.IPAddress(ip_address("10.0.0.1")),
            x509.RFC822Name("a@example.com"),
            x509.UniformResourceIdentifier("https://example.com/"),
        ]
    )
    found = facts(tmp_path, make(root(), extra=((names, True),)).cert_pem)
    assert found.names == ("DNS:web.shop.svc", "IP:10.0.0.1", "RFC822Name:a@example.com", "URI:https://example.com/")
    assert found.identity is None
    assert facts(tmp_path, make(root(), WEB, DB).cert_pem).identity is None
    assert facts(
        tmp_path, make(root(), WEB, extended=(CLIENT_AUTH, x509.ObjectIdentifier("1.2.3"))).cert_pem
    ).extended_key_usage == ("clientAuth", "1.2.3")
    assert facts(tmp_path, make(root(), WEB, extended=None).cert_pem).extended_key_usage is None


def test_a_key_that_is_unknown(tmp_path: Path) -> None:
    der = make(root(), WEB).certificate.public_bytes(serialization.Encoding.DER)
    curve = bytes.fromhex("06082a8648ce3d030107")
    odd = base64.encodebytes(der.replace(curve, curve[:-1] + b"\x77"))
    text = b"-----BEGIN CERTIFICATE-----\n" + odd + b"-----END CERTIFICATE-----\n"
    assert facts(tmp_path, text).key_type == "unknown"


def test_faults(tmp_path: Path) -> None:
    with pytest.raises(InvalidCertificate, match="cannot be read"):
        describe(tmp_path / "missing.pem")
    with pytest.raises(InvalidCertificate, match="has no PEM block"):
        facts(tmp_path, b"")
    broken = x509.UnrecognizedExtension(x509.oid.ExtensionOID.KEY_USAGE, b"\xff\xff")
    with pytest.raises(InvalidCertificate, match=r"x\.pem: has a certificate that cannot be read"):
        facts(tmp_path, make(root(), WEB, key_usage=None, extra=((broken, True),)).cert_pem)


def test_the_wall_clock_is_the_default(tmp_path: Path) -> None:
    assert facts(tmp_path, make(root(), WEB, end=NOW - HOUR / 2).cert_pem, now=None).warnings == ("it has expired",)
