"""Loading SVIDs: what works, and for each fault the file, the fault and what to do."""

from __future__ import annotations

import base64
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from support.mint import (
    ALIEN,
    HOUR,
    NOW,
    WEB,
    Made,
    alien_root,
    db,
    intermediate,
    key_pem,
    make,
    make_ca,
    root,
    usage,
    web,
)

from hbone.errors import HboneError, InvalidCertificate
from hbone.identity import TrustDomain
from hbone.tls import PeerPolicy, Svid, client_connection

if TYPE_CHECKING:
    from pathlib import Path


def load(made: Made, **changes: Any) -> Svid:
    options = {"cert": made.chain_pem, "key": made.key_pem, "roots": root().cert_pem} | changes
    return Svid.from_pem(**options)


def fault(made: Made, **changes: Any) -> str:
    with pytest.raises(InvalidCertificate) as caught:
        load(made, **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert isinstance(caught.value, HboneError)
    assert caught.value.__cause__ is None
    return message


def armour(der: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"


def test_a_leaf_below_the_root() -> None:
    svid = load(web())
    assert str(svid.identity) == WEB
    assert svid.chain == (web().certificate,)
    assert svid.bundles == {TrustDomain("cluster.local"): (root().certificate,)}
    assert (svid.not_before, svid.not_after) == (NOW - HOUR, NOW + HOUR)
    assert svid.current() is svid


def test_the_shortest_validity_of_the_chain_counts() -> None:
    middle = make_ca(root(), "middle", start=NOW - HOUR / 2, end=NOW + HOUR / 2)
    svid = load(make(middle, WEB))
    assert (svid.not_before, svid.not_after) == (NOW - HOUR / 2, NOW + HOUR / 2)


@pytest.mark.parametrize("order", ["leaf, intermediate", "intermediate, leaf", "all three", "with others"])
def test_the_chain_is_put_in_order_and_the_root_left_out(order: str) -> None:
    leaf = make(intermediate(), WEB)
    cert = {
        "leaf, intermediate": leaf.cert_pem + intermediate().cert_pem,
        "intermediate, leaf": intermediate().cert_pem + leaf.cert_pem,
        "all three": root().cert_pem + leaf.cert_pem + intermediate().cert_pem,
        "with others": leaf.cert_pem + db().cert_pem + intermediate().cert_pem + alien_root().cert_pem,
    }[order]
    assert load(leaf, cert=cert).chain == (leaf.certificate, intermediate().certificate)


def test_a_cross_signed_root_is_sent_on() -> None:
    crossed = make_ca(alien_root(), "cluster.local", key=root().key)
    svid = load(web(), cert=web().cert_pem + crossed.cert_pem)
    assert svid.chain == (web().certificate, crossed.certificate)


def test_a_trust_anchor_may_be_an_intermediate() -> None:
    leaf = make(intermediate(), WEB)
    assert load(leaf, cert=leaf.cert_pem, roots=intermediate().cert_pem).chain == (leaf.certificate,)
    assert len(load(leaf, roots=intermediate().cert_pem).chain) == 2


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP521R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["P-384", "P-521", "Ed25519", "RSA"],
)
def test_key_types(key: Any) -> None:
    svid = load(make(root(), WEB, key=key))
    client_connection(svid, PeerPolicy.exact())


def test_other_pem_forms_of_the_key() -> None:
    traditional = web().key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    parameters = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
    load(web(), key=parameters + traditional)
    everything = web().cert_pem + web().key_pem
    load(web(), cert=everything, key=everything)


def test_federated_roots() -> None:
    svid = load(web(), federated={"other.example": alien_root().cert_pem + root().cert_pem})
    assert svid.bundles[TrustDomain("other.example")] == (alien_root().certificate, root().certificate)
    with pytest.raises(TypeError):
        svid.bundles[TrustDomain("third.example")] = ()  # type: ignore[index]


def test_no_text_shows_the_key() -> None:
    svid = load(web())
    secret = web().key_pem.decode().splitlines()[1][:20]
    for text in (repr(svid), str(svid), f"{svid}"):
        assert "PrivateKey" not in text
        assert secret not in text
    assert repr(svid) == f"<Svid {WEB} until {NOW + HOUR:%Y-%m-%dT%H:%M:%SZ}>"
    damaged = web().key_pem.replace(secret.encode(), secret.swapcase().encode())
    assert secret not in fault(web(), key=damaged)
    assert secret.swapcase() not in fault(web(), key=damaged)


BAD_LEAVES: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "CA": ((WEB,), {"ca": True}, "certificate: the leaf is a CA certificate"),
    "keyCertSign": ((WEB,), {"key_usage": usage("digital_signature", "key_cert_sign")}, "keyCertSign"),
    "no URI": ((), {}, "certificate: the leaf has no SPIFFE id"),
    "two URIs": ((WEB, ALIEN), {}, "certificate: the leaf has 2 URIs"),
    "root id": (("spiffe://cluster.local",), {}, "certificate: the leaf has the id of a trust domain"),
    "expired": ((WEB,), {"end": NOW - HOUR / 2}, "certificate: it expired at"),
    "not yet valid": ((WEB,), {"start": NOW + HOUR / 2}, "certificate: it is not valid before"),
}


@pytest.mark.parametrize(("uris", "options", "message"), BAD_LEAVES.values(), ids=BAD_LEAVES.keys())
def test_bad_leaves(uris: tuple[str, ...], options: dict[str, Any], message: str) -> None:
    assert message in fault(make(root(), *uris, **options))


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [(0x05, "certificate: it is signed with SHA1"), (0x7F, "certificate: it has an unknown signature algorithm")],
)
def test_signature_algorithms(algorithm: int, message: str) -> None:
    signer = make_ca(name="rsa", key=rsa.generate_private_key(65537, 2048))
    leaf = make(signer, WEB)
    # cryptography signs with neither, so the algorithm's number is changed afterwards.
    sha256_with_rsa = bytes.fromhex("06092a864886f70d01010b")
    der = leaf.certificate.public_bytes(serialization.Encoding.DER)
    der = der.replace(sha256_with_rsa, sha256_with_rsa[:-1] + bytes([algorithm]))
    assert message in fault(leaf, cert=armour(der), roots=signer.cert_pem)


def test_validity_is_judged_by_the_time_given() -> None:
    load(make(root(), WEB, end=NOW - HOUR / 2), now=NOW - HOUR * 3 / 4)
    assert "it expired at" in fault(web(), now=NOW + 2 * HOUR)
    assert "not valid before" in fault(web(), now=NOW - 2 * HOUR)


def test_bad_intermediates() -> None:
    not_ca = make_ca(root(), "not a CA", ca=False)
    message = fault(make(not_ca, WEB))
    assert message.startswith("certificate: certificate 2 of the chain is not a CA certificate")
    cannot_sign = make_ca(root(), "cannot sign", key_usage=usage("digital_signature"))
    assert "certificate 2 of the chain may not sign" in fault(make(cannot_sign, WEB))
    expired = make_ca(root(), "expired", end=NOW - HOUR / 2)
    assert "certificate 2 of the chain expired at" in fault(make(expired, WEB))
    leaf_fault = fault(make(intermediate(), WEB, ca=True))
    assert leaf_fault.startswith("certificate: the leaf is a CA")


def test_a_missing_intermediate() -> None:
    leaf = make(intermediate(), WEB)
    assert "roots: has no root for certificate, which was signed by O=intermediate" in fault(leaf, cert=leaf.cert_pem)


def test_a_very_long_chain_is_cut() -> None:
    above = root()
    for number in range(12):
        above = make_ca(above, f"ca {number}")
    assert "roots: has no root" in fault(make(above, WEB))


def test_wrong_roots() -> None:
    assert "roots: has no root for certificate" in fault(web(), roots=alien_root().cert_pem)
    assert "roots: certificate 2 is not a CA" in fault(web(), roots=root().cert_pem + web().cert_pem)
    nameless = make(make_ca(name=""), WEB)
    assert "an issuer without a name" in fault(nameless)
    expired = make_ca(name="expired", end=NOW - HOUR / 2)
    assert "roots: the root of certificate has expired" in fault(make(expired, WEB), roots=expired.cert_pem)
    # The old one may stay in the file as long as the new one is there too.
    renewed = make_ca(name="expired", key=expired.key)
    load(make(expired, WEB), roots=expired.cert_pem + renewed.cert_pem)


def test_wrong_federated_roots() -> None:
    own = {"cluster.local": alien_root().cert_pem}
    assert "roots of cluster.local: trust domain cluster.local has its roots already" in fault(web(), federated=own)
    assert "roots of Other: " in fault(web(), federated={"Other": alien_root().cert_pem})
    assert "roots of td: has no PEM block" in fault(web(), federated={"td": b""})


def test_wrong_keys() -> None:
    assert "private key: is not the key of any certificate in certificate" in fault(web(), key=db().key_pem)
    encrypted = key_pem(web().key, password=b"secret")
    assert fault(web(), key=encrypted) == "private key: is encrypted; decrypt it with: openssl pkey"
    legacy = b"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nAA==\n"
    legacy += b"-----END RSA PRIVATE KEY-----\n"
    assert fault(web(), key=legacy).startswith("private key: ")
    assert "has no private key in PEM form" in fault(web(), key=web().cert_pem)
    assert "has 2 private keys" in fault(web(), key=web().key_pem + db().key_pem)
    garbage = b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
    assert "damaged or unknown private key" in fault(web(), key=garbage)
    other_curve = ec.generate_private_key(ec.SECP256K1())
    assert "secp256k1, which TLS 1.3 does not know" in fault(web(), key=key_pem(other_curve))
    assert "RSA key of 1024 bits" in fault(web(), key=key_pem(_small_rsa()))
    assert "not ECDSA, RSA or Ed25519" in fault(web(), key=key_pem(dsa.generate_private_key(2048)))


def _small_rsa() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 1024)


def test_wrong_certificates() -> None:
    assert "certificate: has no PEM block" in fault(web(), cert=b"hello")
    assert "certificate: has no PEM block" in fault(web(), cert=b"")
    der = web().certificate.public_bytes(serialization.Encoding.DER)
    assert "certificate: is DER, not PEM" in fault(web(), cert=der)
    assert "has no certificate, but other PEM blocks" in fault(web(), cert=web().key_pem)
    damaged = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    assert "certificate: has a damaged certificate" in fault(web(), cert=damaged)
    cut = web().cert_pem[: len(web().cert_pem) // 2]
    assert "certificate: has a damaged certificate" in fault(web(), cert=cut)


def test_a_certificate_with_an_unknown_key_beside_ours() -> None:
    der = bytearray(db().certificate.public_bytes(serialization.Encoding.DER))
    curve = bytes.fromhex("06082a8648ce3d030107")
    at = der.index(curve)
    der[at + len(curve) - 1] ^= 0x70
    assert load(web(), cert=armour(bytes(der)) + web().cert_pem).chain == (web().certificate,)


def test_files_are_named(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.pem" for name in ("cert", "key", "roots", "far")}
    paths["cert"].write_bytes(web().cert_pem)
    paths["key"].write_bytes(web().key_pem)
    paths["roots"].write_bytes(root().cert_pem)
    paths["far"].write_bytes(alien_root().cert_pem)
    svid = Svid.from_files(paths["cert"], str(paths["key"]), paths["roots"], federated={"other.example": paths["far"]})
    assert len(svid.bundles) == 2
    with pytest.raises(InvalidCertificate, match="expired"):
        Svid.from_files(paths["cert"], paths["key"], paths["roots"], now=NOW + timedelta(days=1))
    for name in ("cert", "key", "roots"):
        swapped = paths | {name: tmp_path / "missing.pem"}
        with pytest.raises(InvalidCertificate, match=r"missing\.pem: cannot be read: No such file or directory"):
            Svid.from_files(swapped["cert"], swapped["key"], swapped["roots"])
    with pytest.raises(InvalidCertificate, match="Is a directory"):
        Svid.from_files(tmp_path, paths["key"], paths["roots"])
    with pytest.raises(InvalidCertificate, match=r"key\.pem: has no certificate, but other PEM blocks"):
        Svid.from_files(paths["key"], paths["cert"], paths["roots"])
