"""``/debug/pool``, ``/debug/sessions``, ``/debug/tunnels``: what the data plane holds, for who looks for a fault.

Values in, JSON out. Sizes are bytes, times seconds. Of very many entries the first ones are shown, and how many there
are.
"""

from __future__ import annotations

import dataclasses
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hbone.identity import SpiffeIdentity
    from hbone.proxy._node_outbound import OutboundConnection
    from hbone.transport import (
        ConnectionPool,
        Peer,
        PooledSessionStatistics,
        ServerStatistics,
        Session,
        TunnelStatistics,
    )

__all__ = ["pool_json", "sessions_json", "tunnels_json"]

Json: TypeAlias = "dict[str, Any]"

#: Entries of one list: more would be megabytes that the event loop has to write.
_SHOWN: Final = 1000


def pool_json(pools: Mapping[SpiffeIdentity, ConnectionPool]) -> Json:
    """The pool of each identity: its numbers and its sessions."""
    shown: Json = {}
    for identity, pool in sorted(pools.items(), key=lambda item: str(item[0])):
        statistics = pool.statistics()
        numbers = {
            field.name: getattr(statistics, field.name)
            for field in dataclasses.fields(statistics)
            if field.name != "sessions"
        }
        shown[str(identity)] = {**numbers, **_some("sessions", map(_pooled, statistics.sessions))}
    return shown


def sessions_json(
    pools: Mapping[SpiffeIdentity, ConnectionPool], sessions: Iterable[Session], server: ServerStatistics | None
) -> Json:
    """All sessions, those that we opened and those that peers did."""
    opened = (
        {"source": str(identity), **_pooled(one)}
        for identity, pool in pools.items()
        for one in pool.statistics().sessions
    )
    taken = (
        {
            "local": _text(session.local_address),
            "peer": _peer(session.peer),
            **dataclasses.asdict(session.statistics()),
        }
        for session in sessions
    )
    return {
        **_some("inbound", taken),
        **_some("outbound", opened),
        "server": dataclasses.asdict(server) if server is not None else None,
    }


def tunnels_json(outbound: Iterable[OutboundConnection], sessions: Iterable[Session]) -> Json:
    """All tunnels with their windows and buffers."""
    opened = (
        {
            "authority": tunnel.request.authority,
            "nextHop": _text(connection.actual),
            "peer": str(tunnel.peer.identity),
            "source": str(connection.source),
            "target": str(connection.original),
            **_tunnel(tunnel.statistics()),
        }
        for connection in outbound
        if (tunnel := connection.tunnel) is not None
    )
    taken = (
        {
            "authority": tunnel.request.authority,
            "local": _text(session.local_address),
            "peer": str(session.peer.identity),
            "source": _text(session.peer.address),
            **_tunnel(tunnel.statistics()),
        }
        for session in sessions
        for tunnel in session.tunnels
    )
    return {**_some("inbound", taken), **_some("outbound", opened)}


def _some(name: str, entries: Iterable[Json]) -> Json:
    iterator = iter(entries)
    shown = list(islice(iterator, _SHOWN))
    more = sum(1 for _ in iterator)
    return {name: shown, **({f"{name}NotShown": more} if more else {})}


def _tunnel(statistics: TunnelStatistics) -> Json:
    return dataclasses.asdict(statistics)


def _pooled(pooled: PooledSessionStatistics) -> Json:
    return {
        "expect": str(pooled.key.expect),
        "limit": pooled.limit,
        "nextHop": str(pooled.key.next_hop),
        "served": pooled.served,
        "sourceIp": _text(pooled.key.source_ip),
        "state": pooled.state.value,
        "statistics": dataclasses.asdict(pooled.session) if pooled.session is not None else None,
        "tunnels": pooled.tunnels,
    }


def _peer(peer: Peer) -> Json:
    return {
        "address": _text(peer.address),
        "cipher": peer.cipher,
        "group": peer.group,
        "identity": str(peer.identity),
        "tls": peer.tls_version,
    }


def _text(value: object) -> str | None:
    return None if value is None else str(value)
