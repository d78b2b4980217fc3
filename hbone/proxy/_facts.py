"""What a node says of its workloads and of what went wrong. Decisions only."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

import trio

from hbone.errors import ConnectFailed, HboneError, InvalidIdentity, RequestRejected, TunnelRefused
from hbone.protocol import Baggage, Forwarded, WorkloadType
from hbone.telemetry import AccessRecord, Direction, reset_in_words

if TYPE_CHECKING:
    from hbone.address import Endpoint
    from hbone.identity import SpiffeIdentity
    from hbone.mesh import Service, Workload
    from hbone.telemetry import LogNames

__all__ = [
    "baggage_of",
    "cause_of",
    "error_text",
    "forwarded_host",
    "identity_of",
    "inbound_record",
    "outcome",
    "stopped",
]

_TYPES = {kind.value: kind for kind in WorkloadType}


def baggage_of(workload: Workload) -> Baggage:
    """What the other side is told of a workload, for its metrics and logs. Wire profile, baggage."""
    locality = workload.locality
    return Baggage(
        cluster=workload.cluster_id,
        namespace=workload.namespace,
        workload_type=_TYPES.get(workload.workload_type.lower(), WorkloadType.POD),
        workload=workload.workload_name,
        service=workload.canonical_name,
        version=workload.canonical_revision,
        region=locality.region,
        zone=locality.zone,
    )


def identity_of(workload: Workload | None) -> SpiffeIdentity | None:
    """Who it is, as far as it can be: one that is reached in plain text need not be anybody."""
    try:
        return workload.identity if workload is not None else None
    except InvalidIdentity:
        return None


def forwarded_host(hostname: str | None) -> str | None:
    """The name of a service as a ``forwarded`` header can carry it; None when it cannot."""
    try:
        return Forwarded(host=hostname).host
    except ValueError:
        return None


def cause_of(error: Exception) -> Exception:
    """What a stream's error was raised from, if that is one of ours: it says more."""
    return error.__cause__ if isinstance(error.__cause__, HboneError) else error


def outcome(error: Exception | None) -> tuple[Exception | None, str | None]:
    """What a relay ended with, as it is told: what failed, and how an application reset it, which is no failure."""
    reset = reset_in_words(error) if error is not None else None
    return (error, None) if reset is None else (None, reset)


def stopped(exc: BaseException) -> HboneError:
    """What is told of a connection that something else ended."""
    if isinstance(exc, trio.Cancelled):
        return ConnectFailed("the node was stopped")
    return ConnectFailed(f"unexpected: {exc!r}")


def error_text(error: BaseException) -> str:
    """The ``error`` of an access-log line: a refusal begins with the words that Istio's tools look for."""
    if isinstance(error, TunnelRefused):
        try:
            phrase = HTTPStatus(error.status).phrase
        except ValueError:
            phrase = "an unknown status"
        return f"http status: {error.status} {phrase}: {error.reason or error.default_reason}"
    if isinstance(error, RequestRejected) and error.reason:
        return error.reason
    return str(error) or type(error).__name__


def inbound_record(
    *,
    source: Endpoint | None,
    source_names: LogNames,
    dialled: Endpoint | None,
    workload: Workload,
    service: Service | None,
    counts: tuple[int, int] | None,
    seconds: float | None,
    error: Exception | None,
    reset: str | None = None,
    peer: SpiffeIdentity | None = None,
    authority: str | None = None,
) -> AccessRecord:
    """The line of a connection into a workload.

    Args:
        source: who connected.
        source_names: what that is called.
        dialled: the address of ours that it reached.
        workload: where it went.
        service: what was wanted, if known.
        counts: bytes from the peer, and to it; None for the line of its beginning.
        seconds: from its beginning to its end; None for the line of its beginning.
        error: what ended it, if not its ends.
        reset: how an application reset it.
        peer: the identity that the source proved; None for plain text.
        authority: what the CONNECT asked for; None for plain text.
    """
    return AccessRecord(
        direction=Direction.INBOUND,
        src_addr=source,
        src_workload=source_names.workload,
        src_namespace=source_names.namespace,
        src_identity=peer,
        src_cluster=source_names.cluster,
        dst_addr=dialled,
        dst_hbone_addr=authority,
        dst_service=service.hostname if service is not None else None,
        dst_workload=workload.name or None,
        dst_namespace=workload.namespace or None,
        dst_identity=workload.identity if peer is not None else None,
        dst_cluster=workload.cluster_id or None,
        bytes_sent=counts[1] if counts is not None else None,
        bytes_recv=counts[0] if counts is not None else None,
        duration=seconds,
        error=error_text(error) if error is not None else None,
        reset=reset,
        opened=counts is None,
    )
