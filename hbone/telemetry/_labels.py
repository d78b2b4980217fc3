"""The labels of a connection in the metrics, and the rules by which the mesh's values become labels. Pure.

The rules are ztunnel's, because dashboards are made for them. Two of them surprise: the source's principal never comes
from what the mesh says of a workload, only from a certificate, while the destination's does even for plain TCP; and
``source_app`` is the canonical name of a workload that the mesh knows, but the workload's name when all we have is
baggage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from hbone.errors import InvalidIdentity
from hbone.protocol import Baggage

if TYPE_CHECKING:
    from hbone.identity import SpiffeIdentity
    from hbone.mesh import Service, Workload

__all__ = ["OTHER", "UNKNOWN", "LogNames", "TrafficLabels", "labels_for", "log_names"]

UNKNOWN: Final = "unknown"
OTHER: Final = "other"
_MAX_VALUE: Final = 256


class TrafficLabels(NamedTuple):
    """One set of labels of the ``istio_tcp_`` counters; the names of the fields are those of the labels, in order.

    A tuple, because it is the key that each connection is counted under. Whoever has many connections of one kind
    makes it once and keeps it.
    """

    reporter: str
    """``source`` (outbound) or ``destination`` (inbound)."""
    source_workload: str = UNKNOWN
    source_canonical_service: str = UNKNOWN
    source_canonical_revision: str = UNKNOWN
    source_workload_namespace: str = UNKNOWN
    source_principal: str = UNKNOWN
    source_app: str = UNKNOWN
    source_version: str = UNKNOWN
    source_cluster: str = UNKNOWN
    destination_service: str = UNKNOWN
    destination_service_namespace: str = UNKNOWN
    destination_service_name: str = UNKNOWN
    destination_workload: str = UNKNOWN
    destination_canonical_service: str = UNKNOWN
    destination_canonical_revision: str = UNKNOWN
    destination_workload_namespace: str = UNKNOWN
    destination_principal: str = UNKNOWN
    destination_app: str = UNKNOWN
    destination_version: str = UNKNOWN
    destination_cluster: str = UNKNOWN
    request_protocol: str = "tcp"
    response_flags: str = "-"
    connection_security_policy: str = UNKNOWN
    """``mutual_tls`` or ``unknown``."""
    source_region: str = UNKNOWN
    source_zone: str = UNKNOWN
    destination_region: str = UNKNOWN
    destination_zone: str = UNKNOWN

    def without_peer(self) -> TrafficLabels:
        """The same with ``other`` for all that is said of the far side: bounds how many sets there can be."""
        far = _SOURCE if self.reporter == "destination" else _DESTINATION
        return self._replace(**dict.fromkeys(far, OTHER))

    def without_parties(self) -> TrafficLabels:
        """The same with ``other`` for all that is said of both sides."""
        return self._replace(**dict.fromkeys(_SOURCE + _DESTINATION, OTHER))


_SOURCE: Final = tuple(name for name in TrafficLabels._fields if name.startswith("source_"))
_DESTINATION: Final = tuple(name for name in TrafficLabels._fields if name.startswith("destination_"))


def labels_for(
    reporter: str,
    *,
    source: Workload | Baggage | None = None,
    destination: Workload | Baggage | None = None,
    service: Service | None = None,
    source_principal: SpiffeIdentity | str | None = None,
    destination_principal: SpiffeIdentity | str | None = None,
    mutual_tls: bool = False,
) -> TrafficLabels:
    """The labels of a connection; costs a few microseconds, so keep them where connections repeat.

    A workload of the mesh is the better source of labels than what the peer says about itself: give the baggage only
    where the mesh has no workload for the peer. At the far end of two networks it is the other way round: the workload
    is the gateway's, and the baggage of the answer tells who is behind it.

    Args:
        reporter: ``source`` or ``destination``.
        source: who connects.
        destination: the next hop (outbound), the workload itself (inbound).
        service: what the source wanted, if that is a service.
        source_principal: who the source proved to be (inbound) or we are to the next hop (outbound); None for TCP.
        destination_principal: who the destination proved to be; the identity of a workload `destination` when None.
        mutual_tls: whether the connection is protected by it.
    """
    from_ = _party(source)
    to = _party(destination)
    if destination_principal is None and destination is not None and not isinstance(destination, Baggage):
        destination_principal = _identity(destination)
    return TrafficLabels(
        reporter,
        from_[0],
        from_[1],
        from_[2],
        from_[3],
        str(source_principal) if source_principal else UNKNOWN,
        from_[4],
        from_[2],
        from_[5],
        service.hostname or UNKNOWN if service is not None else UNKNOWN,
        service.namespace or UNKNOWN if service is not None else UNKNOWN,
        service.name or UNKNOWN if service is not None else UNKNOWN,
        to[0],
        to[1],
        to[2],
        to[3],
        str(destination_principal) if destination_principal else UNKNOWN,
        to[4],
        to[2],
        to[5],
        "tcp",
        "-",
        "mutual_tls" if mutual_tls else UNKNOWN,
        from_[6],
        from_[7],
        to[6],
        to[7],
    )


class LogNames(NamedTuple):
    """How the access log names one side of a connection; None for what is not known."""

    workload: str | None = None
    namespace: str | None = None
    cluster: str | None = None


def log_names(who: Workload | Baggage | None) -> LogNames:
    """The name (a workload's own one, that is a pod's; else its canonical service), namespace and cluster of a side."""
    if who is None:
        return LogNames()
    if isinstance(who, Baggage):
        return LogNames(_cut(who.service), _cut(who.namespace), _cut(who.cluster))
    return LogNames(who.name or who.canonical_name or None, who.namespace or None, who.cluster_id or None)


_Party = tuple[str, str, str, str, str, str, str, str]
_NOBODY: Final[_Party] = (UNKNOWN,) * 8


def _party(who: Workload | Baggage | None) -> _Party:
    """Workload, canonical service, revision, namespace, app, cluster, region, zone."""
    if who is None:
        return _NOBODY
    if isinstance(who, Baggage):
        workload = _said(who.workload)
        return (
            workload,
            _said(who.service),
            _said(who.version),
            _said(who.namespace),
            workload,
            _said(who.cluster),
            _said(who.region),
            _said(who.zone),
        )
    canonical = who.canonical_name or UNKNOWN
    locality = who.locality
    return (
        who.workload_name or UNKNOWN,
        canonical,
        who.canonical_revision or UNKNOWN,
        who.namespace or UNKNOWN,
        canonical,
        who.cluster_id or UNKNOWN,
        locality.region or UNKNOWN,
        locality.zone or UNKNOWN,
    )


def _said(text: str | None) -> str:
    """What a peer says of itself, as a label: not endless, and nothing that is not text."""
    if not text:
        return UNKNOWN
    text = text[:_MAX_VALUE]
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return text


def _cut(text: str | None) -> str | None:
    return text[:_MAX_VALUE] if text else None


def _identity(workload: Workload) -> SpiffeIdentity | None:
    try:
        return workload.identity
    except InvalidIdentity:
        return None
