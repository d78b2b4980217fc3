"""Where SVIDs come from: files that somebody renews, or a CA of one's own; and how many of them are kept fresh."""

from __future__ import annotations

from hbone.certs._describe import CertificateFacts, describe
from hbone.certs._dump import dump_certificates
from hbone.certs._files import FileSvidSource
from hbone.certs._local_ca import CaSvidSource, LocalCA, SvidFiles, write_svid
from hbone.certs._manager import SvidManager, SvidState, SvidStatus, SvidSummary, local_ca_issuer

__all__ = [
    # files
    "FileSvidSource",
    "SvidFiles",
    "write_svid",
    # a CA of one's own
    "CaSvidSource",
    "LocalCA",
    # many identities
    "SvidManager",
    "SvidState",
    "SvidStatus",
    "SvidSummary",
    "local_ca_issuer",
    # what a certificate says
    "CertificateFacts",
    "describe",
    "dump_certificates",
]
