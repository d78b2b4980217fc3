"""Where SVIDs come from: files that somebody renews, or a certificate authority of one's own."""

from __future__ import annotations

from hbone.certs._describe import CertificateFacts, describe
from hbone.certs._files import FileSvidSource
from hbone.certs._local_ca import CaSvidSource, LocalCA, SvidFiles, write_svid

__all__ = [
    # files
    "FileSvidSource",
    "SvidFiles",
    "write_svid",
    # a CA of one's own
    "CaSvidSource",
    "LocalCA",
    # what a certificate says
    "CertificateFacts",
    "describe",
]
