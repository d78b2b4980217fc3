"""OpenSSL's errors in words; the common ones are met for real in test_contexts."""

from __future__ import annotations

import pytest
from OpenSSL import SSL

from hbone.tls import explain_tls_error, received_alert
from hbone.tls._explain import explain_verify_error


def error(*reasons: str) -> SSL.Error:
    return SSL.Error([("SSL routines", "", reason) for reason in reasons])


@pytest.mark.parametrize("prefix", ["ssl/tls ", "sslv3 ", "tlsv1 ", "tlsv13 ", "tls ", ""])
def test_alerts_of_all_spellings(prefix: str) -> None:
    caught = error(f"{prefix}alert unknown ca")
    assert received_alert(caught) == "unknown ca"
    assert explain_tls_error(caught) == "the peer does not have the root that our certificate was signed by"


def test_unknown_ones_are_passed_on() -> None:
    assert explain_tls_error(error("tlsv1 alert out of tea")) == "the peer ended TLS with the alert 'out of tea'"
    assert explain_tls_error(error("some fault", "another")) == "TLS failed: some fault, another"
    assert explain_tls_error(error()) == "TLS failed: no reason given"
    assert explain_tls_error(SSL.Error()) == "TLS failed: no reason given"
    assert explain_tls_error(ValueError("x")) == "TLS failed: no reason given"
    assert received_alert(ValueError("x")) is None


def test_the_first_known_reason_counts() -> None:
    assert explain_tls_error(error("some fault", "http request")) == "the peer speaks plain HTTP, not TLS"


def test_system_errors() -> None:
    assert explain_tls_error(SSL.SysCallError(-1, "Unexpected EOF")).startswith("the peer closed the connection")
    assert explain_tls_error(SSL.SysCallError(104, "ECONNRESET")) == "the connection broke (ECONNRESET)"
    assert explain_tls_error(SSL.ZeroReturnError()) == "the peer closed TLS"


def test_verification_codes() -> None:
    assert explain_verify_error(10) == "it has expired"
    assert explain_verify_error(999) == "it cannot be verified (OpenSSL code 999)"
