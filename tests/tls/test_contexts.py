"""Handshakes in memory: each peer to let in or keep out, from both sides, with the alert that the other end sees."""

from __future__ import annotations

import gc
import weakref
from typing import Any, ClassVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import SSL, crypto
from support.memory_tls import Outcome, shake
from support.mint import (
    ALIEN,
    CLIENT_AUTH,
    DB,
    HOUR,
    NOW,
    SERVER_AUTH,
    WEB,
    Made,
    alien,
    alien_root,
    db,
    intermediate,
    make,
    make_ca,
    root,
    usage,
    web,
)

from hbone.errors import ConnectFailed, HboneError, InvalidCertificate, LocalProtocolError, PeerIdentityMismatch
from hbone.identity import SpiffeIdentity, TrustDomain
from hbone.tls import (
    PeerPolicy,
    Svid,
    _contexts,
    client_connection,
    explain_tls_error,
    peer_facts,
    received_alert,
    server_connection,
    verification_error,
)

ANYONE = PeerPolicy.matching("*")
LOCAL = PeerPolicy.trust_domain("cluster.local")


def svid(made: Made, **roots: Made) -> Svid:
    """An SVID of whatever quality, as a peer may have it: unchecked. ``roots`` are by trust domain, _ for a dot."""
    chain = [made]
    while (issuer := chain[-1].issuer) is not None and issuer.issuer is not None:
        chain.append(issuer)
    trusted = {"cluster_local": root()} | roots
    return Svid(
        identity=SpiffeIdentity.parse(WEB),
        chain=tuple(one.certificate for one in chain),
        private_key=made.key,
        bundles={TrustDomain(name.replace("_", ".")): (one.certificate,) for name, one in trusted.items()},
    )


def good(made: Made) -> Svid:
    return Svid.from_pem(made.chain_pem, made.key_pem, made.root_pem)


def raw(
    made: Made | None, *, version: int | None = None, alpn: tuple[bytes, ...] = (b"h2",), trust: bool = True
) -> SSL.Context:
    """A context made by hand, for peers that are not of this library."""
    context = SSL.Context(SSL.TLS_METHOD)
    if version is not None:
        context.set_max_proto_version(version)
    if made is not None:
        context.use_certificate(made.certificate)
        context.use_privatekey(made.key)
    if trust:
        store = context.get_cert_store()
        assert store is not None
        store.add_cert(crypto.X509.from_cryptography(root().certificate))
        context.set_verify(SSL.VERIFY_PEER, lambda *args: bool(args[-1]))
    if alpn:
        context.set_alpn_protos(list(alpn))
    return context


def raw_client(context: SSL.Context) -> SSL.Connection:
    connection = SSL.Connection(context)
    connection.set_connect_state()
    return connection


def raw_server(context: SSL.Context) -> SSL.Connection:
    connection = SSL.Connection(context)
    connection.set_accept_state()
    return connection


@pytest.mark.wire("W-TLS-1")
@pytest.mark.wire("W-TLS-2")
@pytest.mark.wire("W-TLS-3")
@pytest.mark.wire("W-TLS-6")
def test_two_good_peers() -> None:
    client = client_connection(good(web()), PeerPolicy.exact(DB))
    server = server_connection(good(db()), LOCAL)
    assert shake(client, server).succeeded
    at_client, at_server = peer_facts(client), peer_facts(server)
    assert (str(at_client.identity), str(at_server.identity)) == (DB, WEB)
    assert at_client.chain == (db().certificate, root().certificate)
    assert at_server.chain == (web().certificate, root().certificate)
    for facts in (at_client, at_server):
        assert (facts.version, facts.cipher, facts.alpn) == ("TLSv1.3", "TLS_AES_256_GCM_SHA384", "h2")
        assert facts.group == "X25519MLKEM768"
    assert verification_error(client) is None
    assert verification_error(server) is None
    assert server.get_servername() is None
    client.send(b"there")
    server.bio_write(client.bio_read(4096))
    assert server.recv(10) == b"there"


@pytest.mark.wire("W-TLS-7")
def test_nothing_can_be_resumed() -> None:
    own, peer = good(web()), good(db())
    client = client_connection(own, LOCAL)
    assert shake(client, server_connection(peer, LOCAL)).succeeded
    session = client.get_session()
    assert session is not None
    again, server = client_connection(own, LOCAL), server_connection(peer, LOCAL)
    again.set_session(session)
    outcome = shake(again, server)
    assert outcome.succeeded
    # Both identities were proved anew: a resumed session sends no certificates, and asks no callback.
    assert outcome.bytes_to_server > len(web().certificate.public_bytes(serialization.Encoding.DER))
    assert str(peer_facts(again).identity) == DB
    assert str(peer_facts(server).identity) == WEB


GOOD: dict[str, dict[str, Any]] = {
    "plain": {},
    "DNS names too": {"dns": ("web.shop.svc",)},
    "no extended key usage": {"extended": None},
    "as of a bare-bones CA": {"key_usage": None, "ca": None},
    "as of Istio": {"key_usage": usage("digital_signature", "key_encipherment")},
    "with a subject": {"name": "cluster.local", "san_critical": False},
    "P-384": {"key": ec.generate_private_key(ec.SECP384R1())},
    "Ed25519": {"key": ed25519.Ed25519PrivateKey.generate()},
    "RSA": {"key": rsa.generate_private_key(65537, 2048)},
}


@pytest.mark.parametrize("options", GOOD.values(), ids=GOOD.keys())
@pytest.mark.parametrize("judge", ["client", "server"])
def test_good_peers(judge: str, options: dict[str, Any]) -> None:
    outcome, connection, _ = judged_by(judge, svid(make(root(), WEB, **options)))
    assert outcome.succeeded
    assert str(peer_facts(connection).identity) == WEB


def judged_by(judge: str, peer: Svid, policy: PeerPolicy = ANYONE, own: Svid | None = None) -> tuple[Any, Any, Any]:
    """A handshake of a good SVID, which judges, with a peer that accepts it; the judge's end and the peer's."""
    own = own or svid(db())
    if judge == "client":
        mine, theirs = client_connection(own, policy), server_connection(peer, ANYONE)
        return shake(mine, theirs), mine, theirs
    mine, theirs = server_connection(own, policy), client_connection(peer, ANYONE)
    return shake(theirs, mine), mine, theirs


def refused(judge: str, outcome: Outcome) -> tuple[SSL.Error, SSL.Error]:
    mine, theirs = (outcome.client, outcome.server) if judge == "client" else (outcome.server, outcome.client)
    assert mine is not None
    assert theirs is not None
    return mine, theirs


def below(*intermediates: dict[str, Any]) -> Made:
    issuer = root()
    for number, options in enumerate(intermediates):
        issuer = make_ca(issuer, f"ca {number}", **options)
    return make(issuer, WEB)


BAD: dict[str, tuple[Made, str, str]] = {
    # Faults that OpenSSL finds.
    "expired": (make(root(), WEB, end=NOW - HOUR / 2), "expired", "certificate expired"),
    "not yet valid": (make(root(), WEB, start=NOW + HOUR / 2), "not valid yet", "bad certificate"),
    "foreign root": (make(make_ca(name="foreign"), WEB), "not among our roots", "unknown ca"),
    "same-named root": (make(alien_root(), WEB), "not among our roots", "unknown ca"),
    "self-signed": (make(None, WEB, name="self"), "self-signed", "unknown ca"),
    "expired intermediate": (below({"end": NOW - HOUR / 2}), "expired (certificate 2", "certificate expired"),
    "intermediate not a CA": (below({"ca": False}), "without being a CA", "unknown ca"),
    "intermediate without keyCertSign": (below({"key_usage": usage("crl_sign")}), "certificate", "unknown ca"),
    "path too long": (below({"path_length": 0}, {}), "longer than one of its CAs allows", "unknown ca"),
    "no extended key usage that fits": (
        make(root(), WEB, extended=(ExtendedKeyUsageOID.EMAIL_PROTECTION,)),
        "extended key usage",
        "unsupported certificate",
    ),
    "unknown critical extension": (
        make(root(), WEB, extra=((x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"\x05\x00"), True),)),
        "critical extension",
        "certificate unknown",
    ),
    # Faults that we find.
    "CA": (make(root(), WEB, ca=True), "is a CA certificate", "bad certificate"),
    "keyCertSign": (make(root(), WEB, key_usage=usage("digital_signature", "crl_sign")), "cRLSign", "bad certificate"),
    "no URI": (make(root(), dns=("web.shop.svc",)), "no SPIFFE id", "bad certificate"),
    "two URIs": (make(root(), WEB, DB), "has 2 URIs", "bad certificate"),
    "root id": (make(root(), "spiffe://cluster.local"), "id of a trust domain", "bad certificate"),
    "malformed id": (make(root(), "spiffe://cluster.local//"), "no usable SPIFFE id", "bad certificate"),
    "other trust domain, our root": (make(root(), ALIEN), "no roots for trust domain other.example", "unknown ca"),
}


@pytest.mark.wire("W-ID-1")
@pytest.mark.parametrize(("peer", "message", "alert"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("judge", ["client", "server"])
def test_bad_peers(judge: str, peer: Made, message: str, alert: str) -> None:
    outcome, connection, other = judged_by(judge, svid(peer))
    mine, theirs = refused(judge, outcome)
    error = verification_error(connection)
    assert type(error) is ConnectFailed
    assert message in str(error)
    assert "\n" not in str(error)
    assert received_alert(theirs) == alert
    assert received_alert(mine) is None
    assert explain_tls_error(mine) == "we do not accept the peer's certificate"
    assert verification_error(other) is None
    with pytest.raises(LocalProtocolError):
        peer_facts(connection)


@pytest.mark.parametrize(("judge", "usages"), [("client", (CLIENT_AUTH,)), ("server", (SERVER_AUTH,))])
def test_the_extended_key_usage_of_the_other_role(judge: str, usages: Any) -> None:
    outcome, connection, _ = judged_by(judge, svid(make(root(), WEB, extended=usages)))
    assert received_alert(refused(judge, outcome)[1]) == "unsupported certificate"
    assert "extended key usage" in str(verification_error(connection))


@pytest.mark.parametrize(("judge", "usages"), [("client", (SERVER_AUTH,)), ("server", (CLIENT_AUTH,))])
def test_an_svid_needs_both_extended_key_usages(judge: str, usages: Any) -> None:
    outcome, connection, _ = judged_by(judge, svid(make(root(), WEB, extended=usages)))
    assert received_alert(refused(judge, outcome)[1]) == "bad certificate"
    assert "extended key usage without" in str(verification_error(connection))


@pytest.mark.parametrize("judge", ["client", "server"])
def test_the_policy_has_the_last_word(judge: str) -> None:
    outcome, connection, other = judged_by(judge, svid(web()), PeerPolicy.exact(DB))
    error = verification_error(connection)
    assert isinstance(error, PeerIdentityMismatch)
    assert (error.expected, error.presented) == ((DB,), WEB)
    assert received_alert(refused(judge, outcome)[1]) == "certificate unknown"
    assert verification_error(other) is None


@pytest.mark.parametrize("judge", ["client", "server"])
def test_intermediates(judge: str) -> None:
    outcome, connection, _ = judged_by(judge, svid(make(intermediate(), WEB)))
    assert outcome.succeeded
    assert len(peer_facts(connection).chain) == 3
    alone = Svid(
        identity=SpiffeIdentity.parse(WEB),
        chain=svid(make(intermediate(), WEB)).chain[:1],
        private_key=make(intermediate(), WEB).key,
        bundles={},
    )
    with pytest.raises(InvalidCertificate, match="OpenSSL does not take the SVID"):
        client_connection(alone, ANYONE)


@pytest.mark.parametrize("judge", ["client", "server"])
def test_a_missing_intermediate(judge: str) -> None:
    leaf = make(intermediate(), WEB)
    outcome, connection, _ = judged_by(judge, svid(Made(leaf.certificate, leaf.key, root())))
    assert received_alert(refused(judge, outcome)[1]) == "unknown ca"
    assert "left out an intermediate" in str(verification_error(connection))


@pytest.mark.parametrize("judge", ["client", "server"])
def test_an_intermediate_as_trust_anchor(judge: str) -> None:
    leaf = make(intermediate(), WEB)
    outcome, connection, _ = judged_by(judge, svid(leaf), own=svid(db(), cluster_local=intermediate()))
    # The peer is judged by its intermediate; it knows the root, and so takes us.
    assert outcome.succeeded
    assert peer_facts(connection).chain == (leaf.certificate, intermediate().certificate)


class TestFederation:
    both: ClassVar = {"other_example": alien_root()}

    @pytest.mark.parametrize("judge", ["client", "server"])
    def test_each_trust_domain_with_its_own_root(self, judge: str) -> None:
        outcome, connection, _ = judged_by(judge, svid(alien(), **self.both), own=svid(db(), **self.both))
        assert outcome.succeeded
        assert str(peer_facts(connection).identity) == ALIEN

    @pytest.mark.wire("W-ID-2")
    @pytest.mark.parametrize("judge", ["client", "server"])
    def test_one_trust_domain_cannot_vouch_for_another(self, judge: str) -> None:
        for signer, claimed in ((alien_root(), WEB), (root(), ALIEN)):
            outcome, connection, _ = judged_by(
                judge, svid(make(signer, claimed), **self.both), own=svid(db(), **self.both)
            )
            assert received_alert(refused(judge, outcome)[1]) == "unknown ca"
            error = verification_error(connection)
            assert type(error) is ConnectFailed
            assert f"claims to be {claimed}, but its root is not one of trust domain" in str(error)

    def test_a_federated_peer_still_needs_the_policy(self) -> None:
        _, connection, _ = judged_by("server", svid(alien(), **self.both), LOCAL, own=svid(db(), **self.both))
        assert isinstance(verification_error(connection), PeerIdentityMismatch)

    def test_a_root_that_was_issued_anew_is_the_same_root(self) -> None:
        again = make_ca(name="cluster.local", key=root().key)
        peer = Svid(
            identity=SpiffeIdentity.parse(WEB),
            chain=(web().certificate, again.certificate),
            private_key=web().key,
            bundles={TrustDomain("cluster.local"): (root().certificate,)},
        )
        for own in (svid(db()), svid(db(), cluster_local=again)):
            assert judged_by("server", peer, own=own)[0].succeeded


class TestForeignPeers:
    """Peers that speak something else, or less."""

    @pytest.mark.wire("W-TLS-1")
    def test_tls_1_2_client(self) -> None:
        server = server_connection(good(db()), LOCAL)
        outcome = shake(raw_client(raw(web(), version=SSL.TLS1_2_VERSION)), server)
        assert outcome.server is not None
        assert explain_tls_error(outcome.server) == "the peer does not speak TLS 1.3"
        assert outcome.client is not None
        assert received_alert(outcome.client) == "protocol version"
        assert verification_error(server) is None

    @pytest.mark.wire("W-TLS-1")
    def test_tls_1_2_server(self) -> None:
        client = client_connection(good(web()), LOCAL)
        outcome = shake(client, raw_server(raw(db(), version=SSL.TLS1_2_VERSION)))
        assert outcome.client is not None
        assert explain_tls_error(outcome.client) == "the peer does not speak TLS 1.3"

    @pytest.mark.wire("W-TLS-2")
    def test_chacha_only(self) -> None:
        context = raw(web())
        context.set_tls13_ciphersuites(b"TLS_CHACHA20_POLY1305_SHA256")
        outcome = shake(raw_client(context), server_connection(good(db()), LOCAL))
        assert outcome.server is not None
        assert "cipher suite" in explain_tls_error(outcome.server)
        assert outcome.client is not None
        assert received_alert(outcome.client) == "handshake failure"

    @pytest.mark.wire("W-TLS-8")
    def test_no_client_certificate(self) -> None:
        server = server_connection(good(db()), LOCAL)
        outcome = shake(raw_client(raw(None)), server)
        assert outcome.server is not None
        assert explain_tls_error(outcome.server) == "the peer has no client certificate, and HBONE requires one"
        assert outcome.client is not None
        assert received_alert(outcome.client) == "certificate required"

    def test_a_server_that_wants_no_certificate_is_still_judged(self) -> None:
        client = client_connection(good(web()), PeerPolicy.exact(WEB))
        assert not shake(client, raw_server(raw(db(), trust=False))).succeeded
        assert isinstance(verification_error(client), PeerIdentityMismatch)

    @pytest.mark.wire("W-TLS-5")
    def test_no_alpn_at_all(self) -> None:
        server = server_connection(good(db()), LOCAL)
        assert shake(raw_client(raw(web(), alpn=())), server).succeeded
        assert peer_facts(server).alpn is None
        client = client_connection(good(web()), LOCAL)
        assert shake(client, raw_server(raw(db(), alpn=()))).succeeded
        assert peer_facts(client).alpn is None

    @pytest.mark.wire("W-TLS-5")
    def test_h2_among_others(self) -> None:
        server = server_connection(good(db()), LOCAL)
        assert shake(raw_client(raw(web(), alpn=(b"http/1.1", b"h2"))), server).succeeded
        assert peer_facts(server).alpn == "h2"

    @pytest.mark.wire("W-TLS-5")
    def test_alpn_without_h2(self) -> None:
        server = server_connection(good(db()), LOCAL)
        outcome = shake(raw_client(raw(web(), alpn=(b"http/1.1", b"\xff"))), server)
        assert outcome.client is not None
        assert received_alert(outcome.client) == "no application protocol"
        error = verification_error(server)
        assert type(error) is ConnectFailed
        assert "'http/1.1', '\\\\xff'" in str(error)
        assert outcome.server is not None
        assert "no h2 in common" in explain_tls_error(outcome.server)
        # The fault was that peer's: the context serves the next one.
        assert shake(raw_client(raw(web())), server_connection(good(db()), LOCAL)).succeeded

    @pytest.mark.wire("W-TLS-4")
    def test_a_server_that_refuses_our_alpn(self) -> None:
        context = raw(db(), alpn=())

        def refuse(_: SSL.Connection, offered: list[bytes]) -> bytes:
            assert offered == [b"h2"]
            raise SSL.Error([])

        context.set_alpn_select_callback(refuse)
        client = client_connection(good(web()), LOCAL)
        outcome = shake(client, raw_server(context))
        assert outcome.client is not None
        assert "no h2 in common" in explain_tls_error(outcome.client)

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "plain HTTP, not TLS"),
            (b"CONNECT x:80 HTTP/1.1\r\n\r\n", "plain HTTP"),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "not TLS"),
            (b"SSH-2.0-OpenSSH_9.2\r\n", "not TLS"),
            (b"\x00" * 64, "not TLS"),
        ],
    )
    @pytest.mark.wire("W-TCP-3")
    @pytest.mark.parametrize("role", ["client", "server"])
    def test_plain_text(self, role: str, data: bytes, words: str) -> None:
        make_connection = client_connection if role == "client" else server_connection
        connection = make_connection(good(web()), LOCAL)
        with pytest.raises(SSL.WantReadError):
            connection.do_handshake()
        connection.bio_write(data)
        with pytest.raises(SSL.Error) as caught:
            connection.do_handshake()
        assert not isinstance(caught.value, SSL.WantReadError)
        if not (role == "client" and b"HTTP/1" in data):
            assert words in explain_tls_error(caught.value)
        assert verification_error(connection) is None

    def test_the_peer_goes_away(self) -> None:
        connection = server_connection(good(web()), LOCAL)
        with pytest.raises(SSL.WantReadError):
            connection.do_handshake()
        connection.bio_shutdown()
        with pytest.raises(SSL.Error) as caught:
            connection.do_handshake()
        assert explain_tls_error(caught.value) == "the peer closed the connection in the middle of TLS"

    def test_close_notify(self) -> None:
        client, server = client_connection(good(web()), LOCAL), server_connection(good(db()), LOCAL)
        assert shake(client, server).succeeded
        client.shutdown()
        server.bio_write(client.bio_read(4096))
        with pytest.raises(SSL.ZeroReturnError) as caught:
            server.recv(1)
        assert explain_tls_error(caught.value) == "the peer closed TLS"


class TestContexts:
    def test_one_for_each_svid_role_and_key_log(self) -> None:
        one, two = good(web()), good(web())
        lines: list[bytes] = []
        log = lines.append
        contexts = [
            make_connection(owner, LOCAL, keylog=keylog).get_context()
            for owner in (one, two)
            for make_connection in (client_connection, server_connection)
            for keylog in (None, log)
        ]
        assert len({id(context) for context in contexts}) == 8
        assert client_connection(one, ANYONE).get_context() is contexts[0]

    def test_they_go_with_the_svid(self) -> None:
        owner = good(web())
        connection = client_connection(owner, LOCAL)
        gone = weakref.ref(owner)
        del owner
        gc.collect()
        assert gone() is None
        # A live session keeps what it needs.
        assert shake(connection, server_connection(good(db()), LOCAL)).succeeded

    def test_key_log(self) -> None:
        lines: list[bytes] = []
        client = client_connection(good(web()), LOCAL, keylog=lines.append)
        assert shake(client, server_connection(good(db()), LOCAL)).succeeded
        labels = {line.split()[0] for line in lines}
        assert {b"CLIENT_TRAFFIC_SECRET_0", b"SERVER_TRAFFIC_SECRET_0"} <= labels

    def test_nothing_is_known_before_the_handshake(self) -> None:
        with pytest.raises(LocalProtocolError):
            peer_facts(client_connection(good(web()), LOCAL))

    def test_a_key_of_another_certificate(self) -> None:
        wrong = svid(Made(web().certificate, db().key, root()))
        with pytest.raises(InvalidCertificate, match=f"OpenSSL does not take the SVID of {WEB}") as caught:
            server_connection(wrong, LOCAL)
        assert isinstance(caught.value, HboneError)

    def test_a_fault_of_our_own_refuses_the_peer(self) -> None:
        class Broken(PeerPolicy):
            def check(self, identity: SpiffeIdentity) -> None:
                raise RuntimeError("no")

        outcome, connection, _ = judged_by("server", svid(web()), Broken(frozenset()))
        assert not outcome.succeeded
        assert "cannot be checked: RuntimeError('no')" in str(verification_error(connection))

    def test_without_private_names_the_peer_is_refused_all_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kept = dict(vars(SSL))
        monkeypatch.setattr(_contexts, "vars", lambda thing: {} if thing is SSL else kept, raising=False)
        outcome, connection, _ = judged_by("server", svid(web()), PeerPolicy.exact(DB))
        assert isinstance(verification_error(connection), PeerIdentityMismatch)
        assert received_alert(refused("server", outcome)[1]) == "internal error"
