"""TLS identities: our own (`Svid`), whom we accept (`PeerPolicy`), and the handshake that checks both.

No I/O but reading the files of an SVID, no clock but in its validity, no trio: `hbone.transport` moves the bytes.
"""

from __future__ import annotations

from hbone.tls._contexts import PeerTls, client_connection, peer_facts, server_connection, verification_error
from hbone.tls._explain import explain_tls_error, received_alert
from hbone.tls._pem import PrivateKey
from hbone.tls._policy import PeerPolicy
from hbone.tls._rules import check_svid_chain
from hbone.tls._svid import Svid, SvidSource

__all__ = [
    # who we are
    "PrivateKey",
    "Svid",
    "SvidSource",
    "check_svid_chain",
    # whom we accept
    "PeerPolicy",
    # the handshake
    "PeerTls",
    "client_connection",
    "explain_tls_error",
    "peer_facts",
    "received_alert",
    "server_connection",
    "verification_error",
]
