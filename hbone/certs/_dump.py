"""What a `SvidManager` has, in the shape in which ``/config_dump`` shows it: certificates, never keys."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.serialization import Encoding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime

    from cryptography import x509

    from hbone.certs._manager import SvidStatus

__all__ = ["dump_certificates"]


def dump_certificates(states: Iterable[SvidStatus]) -> Iterator[dict[str, Any]]:
    """One JSON object for each identity, sorted by identity: chain, roots, state. Each is made when its turn comes.

    One whose renewal fails is ``Available`` until it expires, and has a ``renewal`` besides, with why it fails and when
    it is tried again.
    """
    return map(_status, sorted(states, key=lambda status: str(status.identity)))


def _status(status: SvidStatus) -> dict[str, Any]:
    svid = status.svid
    roots = () if svid is None else svid.bundles.get(status.identity.trust_domain, ())
    renewal = {}
    if status.renewal_fails:
        due = status.next_attempt
        renewal = {"renewal": {"error": status.problem, "nextAttempt": None if due is None else _time(due)}}
    return {
        **renewal,
        "certChain": [] if svid is None else [_certificate(certificate) for certificate in svid.chain],
        "identity": str(status.identity),
        "rootCerts": [_certificate(certificate) for certificate in roots],
        "state": str(status),
    }


def _certificate(certificate: x509.Certificate) -> dict[str, str]:
    return {
        "expirationTime": _time(certificate.not_valid_after_utc),
        # As Istio has it: the PEM text, in base64 once more.
        "pem": base64.b64encode(certificate.public_bytes(Encoding.PEM)).decode("ascii"),
        "serialNumber": str(certificate.serial_number),
        "validFrom": _time(certificate.not_valid_before_utc),
    }


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"
