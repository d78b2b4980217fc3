"""What a node says of its workloads and of what went wrong: pure."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from hbone.errors import TunnelRefused
from hbone.protocol import Baggage, WorkloadType

if TYPE_CHECKING:
    from hbone.mesh import Workload

__all__ = ["baggage_of", "error_text"]

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
    return str(error) or type(error).__name__
