"""What a node says of its workloads and of what went wrong: pure."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from hbone.errors import RequestRejected, TunnelRefused
from hbone.protocol import Baggage, WorkloadType
from hbone.telemetry import AccessRecord, Direction

if TYPE_CHECKING:
    from hbone.address import Endpoint
    from hbone.identity import SpiffeIdentity
    from hbone.mesh import Service, Workload
    from hbone.telemetry import LogNames

__all__ = ["baggage_of", "error_text", "inbound_record"]

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
    counts: tuple[int, int],
    seconds: float,
    error: Exception | None,
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
        counts: bytes from the peer, and to it.
        seconds: from its beginning to its end.
        error: what ended it, if not its ends.
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
        bytes_sent=counts[1],
        bytes_recv=counts[0],
        duration=seconds,
        error=error_text(error) if error is not None else None,
    )
