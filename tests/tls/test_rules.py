"""X509-SVID section 2 to 5, a fault at a time."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography import x509
from support.mint import (
    CLIENT_AUTH,
    DB,
    SERVER_AUTH,
    WEB,
    Made,
    intermediate,
    make,
    make_ca,
    root,
    usage,
    web,
)

from hbone.errors import InvalidCertificate
from hbone.tls import check_svid_chain
from hbone.tls._rules import check_authority, check_svid_leaf, is_issued_by, is_self_signed

GOOD_LEAVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no basic constraints": {"ca": None},
    "no extended key usage": {"extended": None},
    "keyEncipherment too": {"key_usage": usage("digital_signature", "key_encipherment")},
    "keyAgreement too": {"key_usage": usage("digital_signature", "key_agreement")},
    "DNS names too": {"dns": ("web.shop.svc",)},
    "subject, uncritical names": {"name": "web", "san_critical": False},
    "more extended usages": {"extended": (SERVER_AUTH, CLIENT_AUTH, x509.ObjectIdentifier("1.2.3.4"))},
    # ztunnel and Envoy take it, so there are meshes with it.
    "no key usage": {"key_usage": None},
    "neither key usage nor basic constraints": {"key_usage": None, "ca": None},
}

BAD_LEAVES: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "CA": ((WEB,), {"ca": True}, "is a CA certificate"),
    "keyCertSign": ((WEB,), {"key_usage": usage("digital_signature", "key_cert_sign")}, "keyCertSign"),
    "cRLSign": ((WEB,), {"key_usage": usage("digital_signature", "crl_sign")}, "cRLSign"),
    "no digitalSignature": ((WEB,), {"key_usage": usage("key_encipherment")}, "without digitalSignature"),
    "empty key usage": ((WEB,), {"key_usage": usage("key_agreement")}, "without digitalSignature"),
    "uncritical key usage": ((WEB,), {"usage_critical": False}, "not critical"),
    "no clientAuth": ((WEB,), {"extended": (SERVER_AUTH,)}, "without clientAuth"),
    "no serverAuth": ((WEB,), {"extended": (CLIENT_AUTH,)}, "without serverAuth"),
    "other extended key usage": ((WEB,), {"extended": (x509.ObjectIdentifier("1.2.3.4"),)}, "without serverAuth"),
    "no names": ((), {}, "no SPIFFE id"),
    "DNS names only": ((), {"dns": ("web.shop.svc",)}, "no SPIFFE id"),
    "two ids": ((WEB, DB), {}, "has 2 URIs"),
    "the same id twice": ((WEB, WEB), {}, "has 2 URIs"),
    "an id and another URI": ((WEB, "https://example.com/"), {}, "has 2 URIs"),
    "another URI": (("https://example.com/",), {}, "must start with spiffe://"),
    "malformed id": (("spiffe://cluster.local//web",), {}, "empty path segment"),
    "upper-case trust domain": (("spiffe://Cluster.local/web",), {}, "'C' at position 10"),
    "trust domain only": (("spiffe://cluster.local",), {}, "id of a trust domain"),
    "empty subject, uncritical names": ((WEB,), {"san_critical": False}, "must be critical"),
}


@pytest.mark.parametrize("options", GOOD_LEAVES.values(), ids=GOOD_LEAVES.keys())
def test_good_leaves(options: dict[str, Any]) -> None:
    assert str(check_svid_chain([make(root(), WEB, **options).certificate])) == WEB


@pytest.mark.parametrize(("uris", "options", "message"), BAD_LEAVES.values(), ids=BAD_LEAVES.keys())
def test_bad_leaves(uris: tuple[str, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidCertificate, match=message) as caught:
        check_svid_leaf(make(root(), *uris, **options).certificate)
    assert "\n" not in str(caught.value)


def test_empty_chain() -> None:
    with pytest.raises(InvalidCertificate, match="no certificate"):
        check_svid_chain([])


def test_chain_with_intermediate() -> None:
    leaf = make(intermediate(), WEB)
    assert str(check_svid_chain([leaf.certificate, intermediate().certificate])) == WEB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ca": False}, "certificate 2 of the chain is not a CA"),
        ({"ca": None}, "certificate 2 of the chain is not a CA"),
        ({"key_usage": usage("digital_signature")}, "certificate 2 of the chain may not sign"),
    ],
)
def test_bad_intermediates(options: dict[str, Any], message: str) -> None:
    middle = make_ca(root(), "middle", **options)
    with pytest.raises(InvalidCertificate, match=message):
        check_svid_chain([make(middle, WEB).certificate, middle.certificate])


def test_an_intermediate_that_did_not_sign() -> None:
    with pytest.raises(InvalidCertificate, match="did not sign"):
        check_svid_chain([web().certificate, intermediate().certificate])
    impostor = make_ca(root(), name="intermediate")
    leaf = make(intermediate(), WEB)
    with pytest.raises(InvalidCertificate, match="did not sign"):
        check_svid_chain([leaf.certificate, impostor.certificate])


def test_authorities() -> None:
    check_authority(root().certificate)
    check_authority(make_ca(key_usage=None).certificate)
    with pytest.raises(InvalidCertificate, match="not a CA"):
        check_authority(web().certificate)


def test_issuers() -> None:
    assert is_self_signed(root().certificate)
    assert not is_self_signed(intermediate().certificate)
    assert not is_self_signed(web().certificate)
    assert is_issued_by(web().certificate, root().certificate)


def test_unreadable_extensions() -> None:
    broken = x509.UnrecognizedExtension(x509.oid.ExtensionOID.KEY_USAGE, b"\xff\xff")
    leaf = make(root(), WEB, key_usage=None, extra=((broken, True),))
    with pytest.raises(InvalidCertificate, match="cannot be read"):
        check_svid_leaf(leaf.certificate)


def test_made_is_what_the_tests_think() -> None:
    leaf: Made = make(intermediate(), WEB)
    assert leaf.chain_pem == leaf.cert_pem + intermediate().cert_pem
    assert leaf.root_pem == root().cert_pem
