"""OpenSSL's errors in words: what happened and, where there is a usual one, the cause."""

from __future__ import annotations

import re

from OpenSSL import SSL

__all__ = ["explain_tls_error", "explain_verify_error", "received_alert"]

# Keys are what OpenSSL calls the alert, without the protocol name in front, which differs from alert to alert.
_ALERTS = {
    "access denied": "the peer does not let our identity in",
    "bad certificate": "the peer does not accept our certificate",
    "bad record mac": "the peer could not decrypt what arrived: something on the way changed the bytes",
    "certificate expired": "the peer says that our certificate has expired, or its clock is wrong",
    "certificate required": "the peer requires a client certificate and got none",
    "certificate revoked": "the peer says that our certificate has been revoked",
    "certificate unknown": "the peer does not accept our certificate or the identity in it",
    "decode error": "the peer could not read our handshake",
    "decrypt error": "the peer could not verify a signature of our handshake or certificate chain",
    "handshake failure": "the peer shares no TLS parameters with us, or wants no certificate like ours",
    "illegal parameter": "the peer refuses a parameter of our handshake",
    "inappropriate fallback": "the peer suspects a downgrade",
    "insufficient security": "the peer wants stronger TLS parameters than ours",
    "internal error": "the peer had an internal error, or refused our certificate without saying why",
    "missing extension": "the peer misses an extension in our handshake",
    "no application protocol": "the peer does not speak HTTP/2 here (ALPN has no h2 in common)",
    "protocol version": "the peer does not speak TLS 1.3",
    "record overflow": "the peer says that a record of ours was too long",
    "unexpected message": "the peer did not expect our TLS message",
    "unknown ca": "the peer does not have the root that our certificate was signed by",
    "unrecognized name": "the peer wants a server name",
    "unsupported certificate": "the peer does not accept a certificate like ours (its key usage, for example)",
    "unsupported extension": "the peer refuses an extension of our handshake",
    "user cancelled": "the peer gave up the handshake",
}

_REASONS = {
    "bad extension": "the peer's handshake has a malformed extension",
    "certificate verify failed": "we do not accept the peer's certificate",
    "decryption failed or bad record mac": "what arrived cannot be decrypted: something on the way changed the bytes",
    "http request": "the peer speaks plain HTTP, not TLS",
    "https proxy request": "the peer speaks plain HTTP (a CONNECT without TLS), not TLS",
    "length mismatch": "the peer's handshake is malformed",
    "no application protocol": "the peer does not speak HTTP/2 here (ALPN has no h2 in common)",
    "no protocols available": "the peer offers no TLS version that we allow",
    "no shared cipher": "the peer shares no TLS 1.3 cipher suite with us (AES-256-GCM or AES-128-GCM)",
    "no shared group": "the peer shares no key exchange group with us",
    "no suitable groups": "the peer shares no key exchange group with us",
    "no suitable key share": "the peer shares no key exchange group with us",
    "no suitable signature algorithm": "the peer accepts no signature algorithm of our key",
    "packet length too long": "what arrived is not TLS: the peer speaks plain text, or is not there for HBONE",
    "peer did not return a certificate": "the peer has no client certificate, and HBONE requires one",
    "record layer failure": "what arrived is not TLS: the peer speaks plain text, or is not there for HBONE",
    "unexpected eof while reading": "the peer closed the connection in the middle of TLS",
    "unexpected message": "the peer sent a TLS message out of order",
    "unsupported protocol": "the peer does not speak TLS 1.3",
    "wrong ssl version": "the peer does not speak TLS 1.3",
    "wrong version number": "what arrived is not TLS: the peer speaks plain text, or is not there for HBONE",
}

# X509_V_ERR_* of OpenSSL's x509_vfy.h.
_VERIFY = {
    2: "its issuer is unknown",
    7: "its signature is wrong",
    9: "it is not valid yet; check both clocks",
    10: "it has expired",
    18: "it is self-signed",
    19: "its root is not one of ours",
    20: "its issuer is not among our roots, or the peer left out an intermediate",
    21: "its issuer is not among our roots, or the peer left out an intermediate",
    22: "its chain is too long",
    23: "it has been revoked",
    24: "a certificate of its chain signs others without being a CA",
    25: "its chain is longer than one of its CAs allows",
    26: "its extended key usage does not allow this use",
    32: "a certificate of its chain signs others without keyCertSign",
    34: "it has a critical extension that is not understood",
    47: "a CA of its chain does not permit its name",
    48: "a CA of its chain excludes its name",
    66: "its key is too weak",
    67: "a CA of its chain has too weak a key",
    68: "its chain is signed with too weak a hash",
    79: "a certificate of its chain signs others without being a CA",
}

_ALERT = re.compile(r"(?:(?:ssl|sslv3|tls|tlsv1|tlsv13|ssl/tls) )?alert (.+)")


def received_alert(error: BaseException) -> str | None:
    """The alert by which the peer ended TLS, in OpenSSL's words such as ``unknown ca``; None if it was none."""
    for reason in _reasons(error):
        if (found := _ALERT.fullmatch(reason)) is not None:
            return found[1]
    return None


def explain_tls_error(error: BaseException) -> str:
    """What a pyOpenSSL exception means, in one line without a full stop."""
    if isinstance(error, SSL.ZeroReturnError):
        return "the peer closed TLS"
    if isinstance(error, SSL.SysCallError):
        number, text = error.args
        return _REASONS["unexpected eof while reading"] if number == -1 else f"the connection broke ({text})"
    alert = received_alert(error)
    if alert is not None:
        return _ALERTS.get(alert, f"the peer ended TLS with the alert '{alert}'")
    reasons = _reasons(error)
    for reason in reasons:
        if reason in _REASONS:
            return _REASONS[reason]
    return f"TLS failed: {', '.join(reasons) or 'no reason given'}"


def explain_verify_error(code: int) -> str:
    """What is wrong with a certificate, after OpenSSL's verification code."""
    return _VERIFY.get(code, f"it cannot be verified (OpenSSL code {code})")


def _reasons(error: BaseException) -> list[str]:
    if not isinstance(error, SSL.Error) or not error.args or not isinstance(error.args[0], list):
        return []
    return [entry[-1].lower() for entry in error.args[0] if entry[-1]]
