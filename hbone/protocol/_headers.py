"""The header lists of HBONE: what a CONNECT and its answer say, and how to read what a stranger says.

An HBONE request has two pseudo-headers (``:method`` and ``:authority``) and a few regular fields, of which four mean
something: ``baggage``, ``forwarded``, ``traceparent`` and ``x-forwarded-network`` (wire profile, request).

Theory of operation. Reading is split in two, because the two halves fail differently:

* `connect_request_untrusted` and `connect_response_untrusted` check the *form* of a header list (RFC 9113 sections 8.2,
  8.3 and 8.5). A fault costs the stream: `MalformedRequest` says whether the answer is a status or a reset.
* The values of the regular fields are advice about the peer (labels, log ids). They are parsed when somebody asks,
  and a value that makes no sense is as good as none: no exception.

Writing is the other way round: `ConnectRequest.build` and `ConnectResponse.build` refuse to make a header list that a
strict peer would call malformed, and the encoders give exactly the bytes that Istio's proxies give.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote

from hbone.address import Authority, Endpoint, parse_authority_untrusted
from hbone.errors import InvalidAddress, LocalProtocolError, RemoteProtocolError
from hbone.protocol._frames import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "Baggage",
    "ConnectRequest",
    "ConnectResponse",
    "Forwarded",
    "MalformedRequest",
    "TraceParent",
    "WorkloadType",
    "connect_request_untrusted",
    "connect_response_untrusted",
]

Headers = tuple[tuple[bytes, bytes], ...]

_REQUEST_PSEUDO: Final = frozenset((b":method", b":authority", b":scheme", b":path", b":protocol"))

# Fields that need a look at their value, or that must not be there at all (RFC 9113 section 8.2.2).
_CONNECTION_SPECIFIC: Final = frozenset(
    (b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade")
)
_INSPECTED: Final = frozenset((b"host", b"te", b"content-length"))

# Names that every HBONE peer sends. Being in this set is cheaper to ask than the grammar of a name.
_FAMILIAR: Final = frozenset(
    (
        b"baggage",
        b"forwarded",
        b"traceparent",
        b"x-forwarded-network",
        b"x-istio-source",
        b"user-agent",
        b"accept-encoding",
        b"date",
        b"server",
    )
)

# A token without upper-case letters (RFC 9110 section 5.1, RFC 9113 section 8.2.1).
_is_name = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+").fullmatch
# No NUL, CR or LF anywhere, no space or tab at either end (RFC 9113 section 8.2.1).
_is_value = re.compile(rb"(?:[^\0\r\n\t ](?:[^\0\r\n]*[^\0\r\n\t ])?)?").fullmatch
_is_digits = re.compile(rb"[0-9]+").fullmatch
_is_status = re.compile(rb"[1-9][0-9]{2}").fullmatch
# What a Rust or Go peer calls a readable header value: visible ASCII, space and tab.
_is_readable = re.compile(rb"[\t\x20-\x7e]*").fullmatch


class MalformedRequest(RemoteProtocolError):
    """A request that opens no tunnel. It costs its own stream and nothing else.

    Attributes:
        status: the status that answers it, or None if there is no answer but a reset.
        error_code: the code of the RST_STREAM, where ``status`` is None.
    """

    def __init__(self, message: str, *, status: int | None = None, error_code: int = ErrorCode.PROTOCOL_ERROR) -> None:
        super().__init__(message, error_code)
        self.status = status


class WorkloadType(Enum):
    """What kind of Kubernetes object runs a workload; the value is the word in the baggage key."""

    DEPLOYMENT = "deployment"
    CRONJOB = "cronjob"
    POD = "pod"
    JOB = "job"


@dataclass(frozen=True, slots=True, kw_only=True)
class Baggage:
    """What a peer says about its workload: labels for metrics and logs, never a ground for a decision.

    A field that is None (or empty) is not sent. Wire profile, baggage.
    """

    cluster: str | None = None
    namespace: str | None = None
    workload_type: WorkloadType = WorkloadType.DEPLOYMENT
    workload: str | None = None
    service: str | None = None
    version: str | None = None
    region: str | None = None
    zone: str | None = None

    @classmethod
    def parse_untrusted(cls, values: Iterable[bytes]) -> Baggage:
        """Read all ``baggage`` values of a message.

        Unknown keys are ignored and of a key said twice the last one counts. White space around keys and values,
        percent-encoding and ``;`` properties are taken as W3C Baggage has them. A value with a byte outside visible
        ASCII makes the whole baggage unreadable, which reads as empty.
        """
        found: dict[str, str | None] = {}
        kind = WorkloadType.DEPLOYMENT
        for raw in values:
            if not _is_readable(raw):
                return cls()
            for member in raw.decode("ascii").split(","):
                key, _, rest = member.partition("=")
                name = _BAGGAGE_FIELDS.get(key.strip())
                if name is None:
                    continue
                text = rest.partition(";")[0].strip()
                if "%" in text:
                    text = unquote(text)
                if isinstance(name, WorkloadType):
                    kind = name if text else WorkloadType.DEPLOYMENT
                    name = "workload"
                found[name] = text or None
        return cls(
            cluster=found.get("cluster"),
            namespace=found.get("namespace"),
            workload_type=kind,
            workload=found.get("workload"),
            service=found.get("service"),
            version=found.get("version"),
            region=found.get("region"),
            zone=found.get("zone"),
        )

    def encode(self) -> bytes:
        """The header value; empty if nothing is known."""
        parts = []
        for key, text in (
            ("k8s.cluster.name", self.cluster),
            ("k8s.namespace.name", self.namespace),
            (f"k8s.{self.workload_type.value}.name", self.workload),
            ("service.name", self.service),
            ("service.version", self.version),
            ("cloud.region", self.region),
            ("cloud.availability_zone", self.zone),
        ):
            if text:
                parts.append(f"{key}={text if _is_plain_baggage(text) else quote(text, safe='', errors='replace')}")
        return ",".join(parts).encode("ascii")


_BAGGAGE_FIELDS: Final[dict[str, str | WorkloadType]] = {
    "k8s.cluster.name": "cluster",
    "k8s.namespace.name": "namespace",
    **{f"k8s.{kind.value}.name": kind for kind in WorkloadType},
    "service.name": "service",
    "service.version": "version",
    "cloud.region": "region",
    "cloud.availability_zone": "zone",
}

# What is written as it is: W3C's baggage-octet without "%" (it would be decoded) and "=" (ztunnel would cut there).
_is_plain_baggage = re.compile(r"[!#-$&-+\--:<>-\[\]-~]+").fullmatch

_is_forwarded_host = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z:\[\]]+").fullmatch
_is_token = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwarded:
    """Who the application was, and the service that it asked for (RFC 7239, of which HBONE uses two parameters).

    Attributes:
        source: address of the application's connection.
        host: name of the destination service, if the request was for one.

    Raises:
        ValueError: ``host`` has characters that no host name has.
    """

    source: Endpoint | None = None
    host: str | None = None

    def __post_init__(self) -> None:
        if self.host is not None and not _is_forwarded_host(self.host):
            raise ValueError(f"not a host for the forwarded header: {self.host!r}")

    @classmethod
    def parse_untrusted(cls, value: bytes) -> Forwarded | None:
        """Read one ``forwarded`` value (of a list, its first element); None if it says neither thing readably."""
        if not _is_readable(value):
            return None
        source: Endpoint | None = None
        host: str | None = None
        for part in value.decode("ascii").partition(",")[0].split(";"):
            key, _, text = part.partition("=")
            key = key.strip().lower()
            text = text.strip().removeprefix('"').removesuffix('"')
            if key == "host" and host is None and _is_forwarded_host(text):
                host = text
            elif key == "for" and source is None:
                try:
                    source = Endpoint.parse(text)
                except InvalidAddress:
                    continue
        return None if source is None and host is None else cls(source=source, host=host)

    def encode(self) -> bytes:
        """The header value: ``for="10.0.0.1:40000";host=cart.shop.svc.cluster.local``."""
        parts = []
        if self.source is not None:
            ip = str(self.source.ip).partition("%")[0]  # a zone means nothing to a peer
            where = f"[{ip}]" if self.source.ip.version == 6 else ip
            parts.append(f'for="{where}:{self.source.port}"')
        if self.host is not None:
            parts.append(f"host={self.host}" if _is_token(self.host) else f'host="{self.host}"')
        return ";".join(parts).encode("ascii")


_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})").fullmatch


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceParent:
    """The id that ties the log lines of one application connection together (W3C Trace Context, version 00).

    Attributes:
        trace_id: 16 bytes, not all zero.
        parent_id: 8 bytes, not all zero.
        flags: 0 to 255; bit 0 is "sampled".

    Raises:
        ValueError: a part has the wrong size or is all zero.
    """

    trace_id: bytes
    parent_id: bytes
    flags: int = 0

    def __post_init__(self) -> None:
        if len(self.trace_id) != 16 or not any(self.trace_id):
            raise ValueError("trace_id must be 16 bytes, not all zero")
        if len(self.parent_id) != 8 or not any(self.parent_id):
            raise ValueError("parent_id must be 8 bytes, not all zero")
        if not 0 <= self.flags <= 255:
            raise ValueError("flags must be 0 to 255")

    @classmethod
    def from_random(cls, bits: bytes) -> TraceParent:
        """A fresh one of 24 random bytes, drawn by the caller (this package has no randomness of its own)."""
        return cls(trace_id=bits[:16], parent_id=bits[16:])

    @classmethod
    def parse_untrusted(cls, value: bytes) -> TraceParent | None:
        """Read a ``traceparent``; None unless it is one of exactly 55 characters.

        A later version than 00 is read as if it were 00, as W3C asks; version ff and all-zero ids are none.
        """
        match = _TRACEPARENT(value)
        if match is None or match[1] == b"ff":
            return None
        trace_id = bytes.fromhex(match[2].decode("ascii"))
        parent_id = bytes.fromhex(match[3].decode("ascii"))
        if not any(trace_id) or not any(parent_id):
            return None
        return cls(trace_id=trace_id, parent_id=parent_id, flags=int(match[4], 16))

    def encode(self) -> bytes:
        """The header value, 55 bytes."""
        return f"00-{self.trace_id.hex()}-{self.parent_id.hex()}-{self.flags:02x}".encode("ascii")


def _first(headers: Headers, name: bytes) -> bytes | None:
    for key, value in headers:
        if key == name:
            return value
    return None


_USUAL: Final = frozenset((b"baggage", b"forwarded", b"traceparent"))


def _local_headers(headers: Iterable[tuple[str | bytes, str | bytes]]) -> Headers:
    """Check fields that our own user wants to send; names are lower-cased.

    Raises:
        LocalProtocolError: a peer that follows RFC 9113 would call the message malformed.
    """
    checked = []
    for raw_name, raw_value in headers:
        # What a proxy sends with each connection; only a value can be wrong.
        if isinstance(raw_name, bytes) and raw_name in _USUAL and isinstance(raw_value, bytes) and _is_value(raw_value):
            checked.append((raw_name, raw_value))
            continue
        try:
            name = (raw_name.encode("ascii") if isinstance(raw_name, str) else bytes(raw_name)).lower()
            value = raw_value.encode("ascii") if isinstance(raw_value, str) else bytes(raw_value)
        except UnicodeEncodeError:
            raise LocalProtocolError(f"header {raw_name!r} must be ASCII (give bytes for anything else)") from None
        if not _is_name(name):
            raise LocalProtocolError(f"not a header name: {raw_name!r}")
        if not _is_value(value):
            raise LocalProtocolError(f"header {raw_name!r} has a value with CR, LF, NUL or white space at an end")
        if name in _CONNECTION_SPECIFIC or name in _INSPECTED:
            raise LocalProtocolError(f"header {raw_name!r} has no place on a tunnel")
        checked.append((name, value))
    return tuple(checked)


@dataclass(frozen=True, slots=True)
class ConnectRequest:
    """A CONNECT: the target as it was written, and the regular fields in order, names in lower case.

    Attributes:
        authority: text of ``:authority``.
        headers: the regular fields.
    """

    authority: str
    headers: Headers = ()
    _target: Authority | None = field(default=None, repr=False, compare=False, kw_only=True)

    @classmethod
    def build(cls, target: Authority | str, headers: Iterable[tuple[str | bytes, str | bytes]] = ()) -> ConnectRequest:
        """A request of our own, checked before it is sent.

        Raises:
            InvalidAddress: the target is not ``host:port``.
            LocalProtocolError: a header that would make the request malformed.
        """
        if isinstance(target, str):
            target = Authority.parse(target)
        return cls(str(target), _local_headers(headers), _target=target)

    @property
    def target(self) -> Authority:
        """The authority, parsed.

        Raises:
            InvalidAddress: only for a request that was made by hand with an authority that is none.
        """
        return self._target if self._target is not None else Authority.parse(self.authority)

    @property
    def baggage(self) -> Baggage:
        """What the peer says of the source workload; empty if it says nothing readable."""
        return Baggage.parse_untrusted(value for name, value in self.headers if name == b"baggage")

    @property
    def forwarded(self) -> Forwarded | None:
        """The first ``forwarded`` field, if readable."""
        value = _first(self.headers, b"forwarded")
        return None if value is None else Forwarded.parse_untrusted(value)

    @property
    def traceparent(self) -> TraceParent | None:
        """The ``traceparent`` field, if it is one."""
        value = _first(self.headers, b"traceparent")
        return None if value is None else TraceParent.parse_untrusted(value)

    @property
    def forwarded_network(self) -> str | None:
        """The network that an inner request of double HBONE comes from; None if not said."""
        value = _first(self.headers, b"x-forwarded-network")
        return value.decode("ascii") if value and _is_readable(value) else None

    def crossed_networks(self, own_network: str) -> bool:
        """Whether the request came through a gateway from another network, so that the peer's address says nothing."""
        network = self.forwarded_network
        return network is not None and network.lower() != own_network.lower()

    def encode(self) -> list[tuple[bytes, bytes]]:
        """The header list: ``:method``, ``:authority``, then the regular fields (RFC 9113 section 8.5)."""
        return [(b":method", b"CONNECT"), (b":authority", self.authority.encode("ascii")), *self.headers]


@dataclass(frozen=True, slots=True)
class ConnectResponse:
    """The answer to a CONNECT.

    Attributes:
        status: 100 to 999.
        headers: the regular fields in order, names in lower case.
    """

    status: int
    headers: Headers = ()

    @classmethod
    def build(cls, status: int, headers: Iterable[tuple[str | bytes, str | bytes]] = ()) -> ConnectResponse:
        """An answer of our own, checked before it is sent.

        Raises:
            LocalProtocolError: not a status (200 to 599), or a header that would make the response malformed.
        """
        if not 200 <= status <= 599:
            raise LocalProtocolError(f"not a final status: {status}")
        return cls(status, _local_headers(headers))

    @property
    def informational(self) -> bool:
        """A 1xx: the real answer is still to come."""
        return self.status < 200

    @property
    def success(self) -> bool:
        """A 2xx: the tunnel is open."""
        return 200 <= self.status <= 299

    @property
    def baggage(self) -> Baggage:
        """What the peer says of the destination workload; empty if it says nothing readable."""
        return Baggage.parse_untrusted(value for name, value in self.headers if name == b"baggage")

    def encode(self) -> list[tuple[bytes, bytes]]:
        """The header list: ``:status``, then the regular fields."""
        return [(b":status", b"%d" % self.status), *self.headers]


def connect_request_untrusted(headers: Sequence[tuple[bytes, bytes]]) -> ConnectRequest:
    """Judge the header list of a request (RFC 9113 sections 8.2, 8.3.1 and 8.5; wire profile, request).

    Raises:
        MalformedRequest: with a status (400) if it is a request of HTTP/2 but none that opens a tunnel (another
            method, or an authority that is not ``host:port``); otherwise to be reset with PROTOCOL_ERROR.
    """
    pseudo: dict[bytes, bytes] = {}
    regular: list[tuple[bytes, bytes]] = []
    inspect = False
    for name, value in headers:
        if not _is_value(value):
            raise MalformedRequest(f"forbidden byte or white space around the value of {name[:100]!r}")
        if name in _FAMILIAR:
            regular.append((name, value))
        elif name[:1] == b":":
            if regular:
                raise MalformedRequest(f"pseudo-header {name[:100]!r} after a regular field")
            if name in pseudo:
                raise MalformedRequest(f"pseudo-header {name!r} twice")
            if name not in _REQUEST_PSEUDO:
                raise MalformedRequest(f"unknown pseudo-header {name[:100]!r}")
            pseudo[name] = value
        else:
            if fault := _name_fault(name):
                raise MalformedRequest(fault)
            inspect = inspect or name in _INSPECTED
            regular.append((name, value))

    method = pseudo.get(b":method")
    if method is None:
        raise MalformedRequest("no :method")
    authority = pseudo.get(b":authority")
    if inspect and (fault := _request_fault(regular, authority)):
        raise MalformedRequest(fault)
    if method != b"CONNECT":
        if b":protocol" in pseudo:
            raise MalformedRequest(":protocol with a method other than CONNECT")
        if b":scheme" not in pseudo or b":path" not in pseudo:
            raise MalformedRequest("no :scheme or no :path")
        raise MalformedRequest(f"method {method!r}, not CONNECT", status=400)
    if authority is None:
        raise MalformedRequest("CONNECT without :authority")
    if len(pseudo) != 2:
        extra = ", ".join(sorted(name.decode("ascii") for name in pseudo.keys() - {b":method", b":authority"}))
        raise MalformedRequest(f"CONNECT with {extra}")
    try:
        target = parse_authority_untrusted(authority)
        text = authority.decode("ascii")
    except (RemoteProtocolError, UnicodeDecodeError) as error:
        raise MalformedRequest(f"authority is not host:port: {authority[:300]!r}", status=400) from error
    return ConnectRequest(text, tuple(regular), _target=target)


def connect_response_untrusted(headers: Sequence[tuple[bytes, bytes]]) -> ConnectResponse:
    """Judge the header list of a response to CONNECT (RFC 9113 sections 8.2 and 8.3.2; wire profile, responses).

    A content-length on a 2xx means nothing and is not looked at (RFC 9110 section 9.3.6).

    Raises:
        RemoteProtocolError: a malformed response; the stream is to be reset with its error code.
    """
    status: int | None = None
    regular: list[tuple[bytes, bytes]] = []
    inspect = False
    for name, value in headers:
        if not _is_value(value):
            raise RemoteProtocolError(f"forbidden byte or white space around the value of {name[:100]!r}")
        if name in _FAMILIAR:
            regular.append((name, value))
        elif name[:1] == b":":
            if regular:
                raise RemoteProtocolError(f"pseudo-header {name[:100]!r} after a regular field")
            if name != b":status":
                raise RemoteProtocolError(f"pseudo-header {name[:100]!r} in a response")
            if status is not None:
                raise RemoteProtocolError(":status twice")
            if not _is_status(value):
                raise RemoteProtocolError(f"not a status: {value[:20]!r}")
            status = int(value)
        else:
            if fault := _name_fault(name):
                raise RemoteProtocolError(fault)
            inspect = inspect or name == b"content-length"
            regular.append((name, value))
    if status is None:
        raise RemoteProtocolError("a response without :status")
    if status == 101:
        raise RemoteProtocolError("status 101 does not exist in HTTP/2")
    if inspect and not 200 <= status <= 299 and (fault := _content_length_fault(regular)):
        raise RemoteProtocolError(fault)
    return ConnectResponse(status, tuple(regular))


def _name_fault(name: bytes) -> str | None:
    """The name of a regular field must be a lower-case token, and nothing about the connection."""
    if not _is_name(name):
        return f"not a header name: {name[:100]!r}"
    if name in _CONNECTION_SPECIFIC:
        return f"{name.decode('ascii')} is connection-specific: not in HTTP/2"
    return None


def _request_fault(regular: Sequence[tuple[bytes, bytes]], authority: bytes | None) -> str | None:
    """The few regular fields whose value can make a request malformed."""
    hosts = 0
    for name, value in regular:
        if name == b"te" and value.lower() != b"trailers":
            return "te other than trailers"
        if name == b"host":
            hosts += 1
            if hosts > 1 or (authority is not None and value.lower() != authority.lower()):
                return "host given twice, or other than :authority"
    return _content_length_fault(regular)


def _content_length_fault(regular: Sequence[tuple[bytes, bytes]]) -> str | None:
    """A content-length is harmless; one that is no number, or two that differ, are not."""
    lengths = {value for name, value in regular if name == b"content-length"}
    if len(lengths) > 1 or not all(_is_digits(value) for value in lengths):
        return "content-length is no number, or contradicts itself"
    return None
