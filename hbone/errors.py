"""Every exception that hbone raises, in one tree.

The first question is whose fault it was: ours (`LocalProtocolError`), theirs (`RemoteProtocolError`), a
decision (`TunnelRefused`), or the way there (`ConnectFailed`). Facts are attributes, never text to be searched.

A `Tunnel` raises only trio's stream errors, with one of these as ``__cause__``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "BadTarget",
    "CertificateUnavailable",
    "ConfigError",
    "ConfigFault",
    "ConnectFailed",
    "HboneError",
    "IdentityRefused",
    "InvalidAddress",
    "InvalidCertificate",
    "InvalidIdentity",
    "ListenFailed",
    "LocalProtocolError",
    "MeshConfigError",
    "MeshFault",
    "NoRoute",
    "PeerIdentityMismatch",
    "PolicyDenied",
    "ProtocolError",
    "RemoteProtocolError",
    "RequestRejected",
    "SessionClosed",
    "StreamRefused",
    "TunnelRefused",
    "TunnelReset",
    "Unreachable",
]


class HboneError(Exception):
    """Base of all errors of this library."""


class ProtocolError(HboneError):
    """HTTP/2 or HBONE was not spoken as it should be. Abstract: one of the two below is raised."""

    def __init__(self, message: str) -> None:
        if type(self) is ProtocolError:
            raise TypeError("ProtocolError is abstract: raise LocalProtocolError or RemoteProtocolError")
        super().__init__(message)


class LocalProtocolError(ProtocolError):
    """You asked for something that the state of the tunnel or session does not allow."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol.

    Attributes:
        error_code: the HTTP/2 error code that answers it (RFC 9113 section 7).
    """

    def __init__(self, message: str, error_code: int = 0x1) -> None:
        super().__init__(message)
        self.error_code = error_code


class TunnelRefused(HboneError):
    """The peer answered our CONNECT with a status other than 2xx.

    Attributes:
        status: the HTTP status.
        reason: what the peer said besides, if anything (a short body, cut to a line).
    """

    default_reason = "the peer refused the tunnel"

    def __init__(self, status: int, reason: str | None = None, *, target: str | None = None) -> None:
        self.status = status
        self.reason = reason
        self.target = target
        where = f" to {target}" if target else ""
        super().__init__(f"tunnel{where} refused with status {status}: {reason or self.default_reason}")

    @staticmethod
    def for_status(status: int, reason: str | None = None, *, target: str | None = None) -> TunnelRefused:
        """The most telling class for a status (wire profile, statuses)."""
        kind = {400: BadTarget, 401: PolicyDenied, 403: PolicyDenied, 503: Unreachable}.get(status, TunnelRefused)
        return kind(status, reason, target=target)


class PolicyDenied(TunnelRefused):
    """Status 401 (or 403): the peer's authorization policy does not let our identity in."""

    default_reason = "the peer's authorization policy does not allow our identity"


class BadTarget(TunnelRefused):
    """Status 400: the peer does not serve this target (its own address is another, or the authority is malformed)."""

    default_reason = "the peer does not serve this target"


class Unreachable(TunnelRefused):
    """Status 503: the peer could not connect to the target, or does not know it."""

    default_reason = "the peer could not connect to the target"


class RequestRejected(HboneError):
    """Raised by a server's handler to refuse a request: the one way to say no.

    Attributes:
        status: the HTTP status that the peer gets; 400 to 599.
        flag: a short word for logs and metrics (``DENY``, ``CONNECT``), or None.
        reason: for our own log; never sent.
    """

    def __init__(self, status: int, *, flag: str | None = None, reason: str | None = None) -> None:
        if not 400 <= status <= 599:
            raise ValueError(f"a refusal needs a status from 400 to 599, not {status}")
        super().__init__(f"refused with status {status}" + (f": {reason}" if reason else ""))
        self.status = status
        self.flag = flag
        self.reason = reason


class ConnectFailed(HboneError):
    """TCP, TLS or the HTTP/2 opening failed; the message names the likely cause."""


class PeerIdentityMismatch(ConnectFailed):
    """The peer proved an identity, but not one that was expected.

    Attributes:
        expected: what would have been accepted, as text.
        presented: the peer's identity, as text.
    """

    def __init__(self, *, expected: Iterable[str], presented: str) -> None:
        self.expected: tuple[str, ...] = tuple(expected)
        self.presented = presented
        super().__init__(f"peer is {presented}, expected {' or '.join(self.expected) or 'nobody'}")


class IdentityRefused(ConnectFailed):
    """The peer closed after it saw our certificate: it does not trust our root or does not accept our identity.

    In TLS 1.3 our handshake is over before the peer has judged our certificate, so this shows as an alert or a
    bare end of stream before the peer's SETTINGS.
    """


class SessionClosed(ConnectFailed):
    """The session to the peer has ended, or ended under way; the message says why."""


class StreamRefused(HboneError):
    """The peer did not process the request (REFUSED_STREAM, or GOAWAY below it): trying again elsewhere is safe."""


class TunnelReset(HboneError):
    """The tunnel was reset before both directions had ended.

    Attributes:
        error_code: the HTTP/2 error code, ours or the peer's.
        remote: whether the peer sent it.
    """

    def __init__(self, message: str, *, error_code: int, remote: bool) -> None:
        super().__init__(message)
        self.error_code = error_code
        self.remote = remote


class NoRoute(HboneError):
    """The mesh has no way to a target: it says why.

    Attributes:
        target: what was asked for, as text.
        why: in words.
    """

    def __init__(self, target: object, why: str) -> None:
        super().__init__(why)
        self.target: str = str(target)
        self.why = why


class CertificateUnavailable(HboneError):
    """No usable SVID for an identity, now.

    Attributes:
        identity: whose; or the address that somebody dialled and that is nobody's.
        why: in words.
    """

    def __init__(self, identity: object, why: str) -> None:
        super().__init__(f"no certificate for {identity}: {why}")
        self.identity = identity
        self.why = why


class InvalidIdentity(HboneError, ValueError):
    """The text is not a SPIFFE id, trust domain or identity pattern."""


class InvalidAddress(HboneError, ValueError):
    """The text is not an address of the form that is needed here."""


class InvalidCertificate(HboneError, ValueError):
    """Certificate, key or root material that cannot be used; the message names the file, the fault and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFault:
    """One setting that cannot be used as it is."""

    source: str
    """Where it was set: the environment variable, ``file:line`` or the option; or where it could have been set."""
    problem: str
    """What is wrong with it, and what was expected. Never the value of a secret."""
    advice: str = ""
    """What to do about it; empty where that is plain."""

    def __str__(self) -> str:
        return f"{self.source}: {self.problem}" + (f"; {self.advice}" if self.advice else "")


class ConfigError(HboneError, ValueError):
    """Settings that cannot be used: all that are wrong, at once.

    Attributes:
        faults: each of them.
    """

    def __init__(self, faults: Iterable[ConfigFault]) -> None:
        self.faults: tuple[ConfigFault, ...] = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshFault:
    """One thing that is wrong in a mesh file. As text: ``mesh.yaml:12:5: workloads[3].node: expected ...``.

    Attributes:
        source: the file, or what stands for one.
        line: from 1; 0 when it is about the file as a whole.
        column: from 1, in characters; 0 when it is about the file as a whole.
        path: where in the mesh: ``workloads[3].workloadIps[0]``; empty for the whole.
        message: what is wrong, and what was expected.
    """

    source: str
    line: int = 0
    column: int = 0
    path: str = ""
    message: str

    def __str__(self) -> str:
        place = f":{self.line}:{self.column}" if self.line else ""
        path = f"{self.path}: " if self.path else ""
        return f"{self.source}{place}: {path}{self.message}"


class MeshConfigError(HboneError, ValueError):
    """A mesh file cannot be used. The message is every fault, a line each.

    Attributes:
        faults: all of them, in the order of the file; at least one.
        source: the file of the first one.
        path: where in the mesh the first one is; empty for the whole file.
        line: the line of the first one; 0 for the whole file.
    """

    def __init__(self, faults: Iterable[MeshFault]) -> None:
        self.faults: tuple[MeshFault, ...] = tuple(faults)
        if not self.faults:
            raise ValueError("an error about a mesh file needs a fault")
        first = self.faults[0]
        self.source: str = first.source
        self.path: str = first.path
        self.line: int = first.line
        super().__init__("\n".join(map(str, self.faults)))


class ListenFailed(HboneError):
    """Addresses that cannot be listened on: all of them, at once.

    Attributes:
        problems: for each of them what for, the address, and the `OSError`.
    """

    def __init__(self, problems: Iterable[tuple[str, str, OSError]]) -> None:
        self.problems: tuple[tuple[str, str, OSError], ...] = tuple(problems)
        lines = (f"{what} cannot listen on {where}: {why.strerror or why}" for what, where, why in self.problems)
        super().__init__("\n".join(lines))
