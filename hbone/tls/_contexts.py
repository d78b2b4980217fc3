"""TLS as HBONE wants it, and the check of the peer inside its handshake.

A context is made once for each SVID and role and shared by all its handshakes, because pyOpenSSL lets a context change
no more after its first connection, and because contexts cost memory. What differs from peer to peer, the policy and the
outcome, sits on the connection.

OpenSSL builds the peer's chain, checks signatures, validity, and what each certificate may be used for, and calls
`_judge` with each certificate from the root down. With the leaf come our rules: it is an X509-SVID, its chain ends in a
root of *its own* trust domain (the context holds the roots of all, and one domain's CA must not vouch for another's
workloads), and the policy takes its identity. A peer that fails gets an alert that says which.
"""

from __future__ import annotations

import enum
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

from cryptography.hazmat.primitives import serialization
from OpenSSL import SSL, crypto

from hbone.errors import ConnectFailed, InvalidCertificate, LocalProtocolError, PeerIdentityMismatch
from hbone.tls._explain import explain_tls_error, explain_verify_error
from hbone.tls._rules import check_svid_leaf
from hbone.tls._svid import MAX_CHAIN

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

    from cryptography import x509

    from hbone.identity import SpiffeIdentity, TrustDomain
    from hbone.tls._policy import PeerPolicy
    from hbone.tls._svid import Svid

__all__ = ["PeerTls", "client_connection", "peer_facts", "server_connection", "verification_error"]

ALPN = b"h2"
CIPHER_SUITES = b"TLS_AES_256_GCM_SHA384:TLS_AES_128_GCM_SHA256"

KeyLog: TypeAlias = "Callable[[bytes], None]"
_Anchor: TypeAlias = tuple[bytes, bytes]
_Anchors: TypeAlias = "Mapping[TrustDomain, frozenset[_Anchor]]"


class _Role(enum.Enum):
    CLIENT = "client"
    SERVER = "server"


class _Refusal(enum.IntEnum):
    """Why we refuse a chain that OpenSSL accepts, as the X509_V_ERR_* code that makes OpenSSL send the alert."""

    UNKNOWN_CA = 20
    BAD_CERTIFICATE = 28
    CERTIFICATE_UNKNOWN = 29


@dataclass(slots=True)
class _State:
    """What a handshake knows of its peer."""

    policy: PeerPolicy
    anchor: _Anchor | None = None
    identity: SpiffeIdentity | None = None
    error: ConnectFailed | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerTls:
    """What is known of a peer after the handshake.

    Attributes:
        identity: who it proved to be.
        chain: its verified certificates, leaf first, root last.
        version: ``TLSv1.3``.
        cipher: the cipher suite, ``TLS_AES_256_GCM_SHA384`` for example.
        group: the key exchange group, ``X25519MLKEM768`` for example; None where OpenSSL does not tell.
        alpn: ``h2``, or None when the peer does without ALPN.
    """

    identity: SpiffeIdentity
    chain: tuple[x509.Certificate, ...]
    version: str
    cipher: str
    group: str | None
    alpn: str | None


def client_connection(
    svid: Svid, policy: PeerPolicy, sock: socket.socket | None = None, *, keylog: KeyLog | None = None
) -> SSL.Connection:
    """The client's end of an HBONE session, before its handshake.

    Args:
        svid: who we are, and the roots to check the peer with.
        policy: who the peer may be.
        sock: a non-blocking socket, or None to move the bytes with ``bio_read`` and ``bio_write``.
        keylog: called with each line of an ``SSLKEYLOGFILE``. Whoever reads them can decrypt the session.

    Raises:
        InvalidCertificate: OpenSSL does not take the SVID.
    """
    connection = _connection(svid, _Role.CLIENT, policy, sock, keylog)
    connection.set_connect_state()
    return connection


def server_connection(
    svid: Svid, policy: PeerPolicy, sock: socket.socket | None = None, *, keylog: KeyLog | None = None
) -> SSL.Connection:
    """The server's end of an HBONE session, before its handshake; otherwise as `client_connection`.

    Raises:
        InvalidCertificate: OpenSSL does not take the SVID.
    """
    connection = _connection(svid, _Role.SERVER, policy, sock, keylog)
    connection.set_accept_state()
    return connection


def peer_facts(connection: SSL.Connection) -> PeerTls:
    """Who is at the other end, and how the session is protected.

    Raises:
        LocalProtocolError: the handshake has not succeeded yet.
    """
    state: _State = connection.get_app_data()
    chain = connection.get_verified_chain(as_cryptography=True)
    version = connection.get_protocol_version_name()
    cipher = connection.get_cipher_name()
    if state.identity is None or chain is None or cipher is None:
        raise LocalProtocolError("the TLS handshake is not over: nothing is known of the peer yet")
    return PeerTls(
        identity=state.identity,
        chain=tuple(chain),
        version=version,
        cipher=cipher,
        group=connection.get_group_name(),
        alpn=connection.get_alpn_proto_negotiated().decode("ascii", "replace") or None,
    )


def verification_error(connection: SSL.Connection) -> ConnectFailed | None:
    """Why we refused the peer: set when the handshake failed by our own decision, None when it did not."""
    state: _State = connection.get_app_data()
    return state.error


# ---------------------------------------------------------------------------------------------------------------------

_contexts: WeakKeyDictionary[Svid, dict[tuple[_Role, KeyLog | None], SSL.Context]] = WeakKeyDictionary()


def _connection(
    svid: Svid, role: _Role, policy: PeerPolicy, sock: socket.socket | None, keylog: KeyLog | None
) -> SSL.Connection:
    made = _contexts.setdefault(svid, {})
    context = made.get((role, keylog))
    if context is None:
        context = made[role, keylog] = _context(svid, role, keylog)
    connection = SSL.Connection(context, sock)
    connection.set_app_data(_State(policy))
    return connection


def _context(svid: Svid, role: _Role, keylog: KeyLog | None) -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_max_proto_version(SSL.TLS1_3_VERSION)
    context.set_tls13_ciphersuites(CIPHER_SUITES)
    # No resumption: every session proves both identities anew, with the certificates of now.
    context.set_options(SSL.OP_NO_TICKET)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    try:
        context.use_certificate(svid.chain[0])
        for intermediate in svid.chain[1:]:
            context.add_extra_chain_cert(intermediate)
        context.use_privatekey(svid.private_key)
        context.check_privatekey()
    except SSL.Error as problem:
        raise InvalidCertificate(
            f"OpenSSL does not take the SVID of {svid.identity}: {explain_tls_error(problem)}"
        ) from None
    store = context.get_cert_store()
    assert store is not None
    # A root is what the bundle says it is, even if another CA signed it.
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    for bundle in svid.bundles.values():
        for root in bundle:
            store.add_cert(crypto.X509.from_cryptography(root))
    context.set_verify_depth(MAX_CHAIN)
    # The callback must not hold the SVID: the cache of contexts would keep it alive for ever.
    anchors = {domain: frozenset(map(_anchor, bundle)) for domain, bundle in svid.bundles.items()}
    _set_verify(context, anchors)
    if role is _Role.CLIENT:
        context.set_alpn_protos([ALPN])
    else:
        context.set_alpn_select_callback(_select_alpn)
    if keylog is not None:
        context.set_keylog_callback(lambda _, line: keylog(line))
    return context


def _select_alpn(connection: SSL.Connection, offered: list[bytes]) -> bytes:
    if ALPN in offered:
        return ALPN
    names = ", ".join(repr(name.decode("ascii", "backslashreplace")) for name in offered[:4])
    state: _State = connection.get_app_data()
    state.error = ConnectFailed(f"the peer does not offer HTTP/2 in ALPN but {names}")
    # OpenSSL sends no_application_protocol when the callback fails, and do_handshake() raises this very exception;
    # NO_OVERLAPPING_PROTOCOLS would mean "go on without".
    raise SSL.Error([("SSL routines", "", "no application protocol")])


def _judge(
    connection: SSL.Connection, anchors: _Anchors, certificate: crypto.X509, code: int, depth: int, ok: int
) -> int:
    """Judge one certificate of the peer's chain; returns 0, or the code to fail with."""
    state: _State = connection.get_app_data()
    try:
        if not ok:
            where = "" if depth == 0 else f" (certificate {depth + 1} of its chain)"
            state.error = ConnectFailed(f"we do not accept the peer's certificate: {explain_verify_error(code)}{where}")
            return code
        # The first to be reported is the last of the chain: the root.
        if state.anchor is None:
            state.anchor = _anchor(certificate.to_cryptography())
        if depth:
            return 0
        identity = check_svid_leaf(certificate.to_cryptography())
        if state.anchor not in anchors.get(identity.trust_domain, ()):
            state.error = ConnectFailed(_wrong_root(identity, anchors))
            return _Refusal.UNKNOWN_CA
        state.policy.check(identity)
    except PeerIdentityMismatch as mismatch:
        state.error = mismatch
        return _Refusal.CERTIFICATE_UNKNOWN
    except InvalidCertificate as problem:
        state.error = ConnectFailed(f"we do not accept the peer's certificate: it {problem}")
        return _Refusal.BAD_CERTIFICATE
    # The certificate is the peer's, and parsers raise what they like; whatever happens here, the peer is refused.
    except Exception as problem:  # noqa: BLE001
        state.error = ConnectFailed(f"the peer's certificate cannot be checked: {problem!r}")
        return _Refusal.BAD_CERTIFICATE
    state.identity = identity
    return 0


def _wrong_root(identity: SpiffeIdentity, anchors: _Anchors) -> str:
    if identity.trust_domain in anchors:
        return f"the peer claims to be {identity}, but its root is not one of trust domain {identity.trust_domain}"
    return (
        f"the peer claims to be {identity}, but we have no roots for trust domain {identity.trust_domain}; "
        "federate with it to talk to its workloads"
    )


def _anchor(certificate: x509.Certificate) -> _Anchor:
    """A trust anchor is a name and a key (RFC 5280 section 6.1.1): a root that was issued anew is the same root."""
    key = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return certificate.subject.public_bytes(), key


_verdict: ContextVar[int] = ContextVar("_verdict")
"""From the inner to the outer callback; not an attribute, because threads may share a context."""


def _set_verify(context: SSL.Context, anchors: _Anchors) -> None:
    """Have `_judge` asked about each certificate, and the alert sent that fits its answer.

    pyOpenSSL's callback can only say no, for which OpenSSL sends internal_error: a lie that sends the operator of the
    other end looking for a crash. So its C callback is wrapped in one that also names the reason. This uses private
    names of pyOpenSSL; should they change one day, the peer is still refused, with the wrong alert.
    """
    mode = SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT

    def asked(connection: SSL.Connection, certificate: crypto.X509, code: int, depth: int, ok: int) -> bool:
        verdict = _judge(connection, anchors, certificate, code, depth, ok)
        _verdict.set(verdict)
        return not verdict

    context.set_verify(mode, asked)
    private: Any = context
    try:
        lib, ffi = vars(SSL)["_lib"], vars(SSL)["_ffi"]
        inner = vars(private)["_verify_helper"].callback
        set_error, set_verify, pointer = lib.X509_STORE_CTX_set_error, lib.SSL_CTX_set_verify, vars(private)["_context"]
    except (KeyError, AttributeError):
        return

    def outer(ok: int, store: object) -> int:
        _verdict.set(_Refusal.BAD_CERTIFICATE)
        accepted: int = inner(ok, store)
        if not accepted:
            set_error(store, _verdict.get())
        return accepted

    callback = ffi.callback("int (*)(int, X509_STORE_CTX *)", outer)
    set_verify(pointer, mode, callback)
    # Nothing else keeps the C function alive as long as the context.
    context.set_app_data(callback)
