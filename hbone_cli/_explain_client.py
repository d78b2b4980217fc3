"""Who is meant by ``--from``, and what somebody may have got wrong about names."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final, TypeAlias

import click

from hbone.mesh import NetworkMode

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

    from hbone import Authority
    from hbone.mesh import MeshSnapshot, Workload

    IPAddress: TypeAlias = IPv4Address | IPv6Address

__all__ = ["Client", "find_client", "hints"]

#: How many of several are named.
_NAMED: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Who connects.

    Attributes:
        workload: None for an address that is not of the mesh.
        ip: where it connects from.
        network: the network of its node.
        notes: what is worth a word about it.
    """

    workload: Workload | None
    ip: IPAddress
    network: str
    notes: tuple[str, ...] = ()


def find_client(
    snapshot: MeshSnapshot, text: str, *, network: str | None, node: str | None, source_ip: IPAddress | None
) -> Client:
    """The client that a text means.

    Args:
        snapshot: the mesh.
        text: an address, ``namespace/name``, ``namespace/name/service-account`` or a uid.
        network: of its node; that of the workload when None.
        node: its node, if it has to be there.
        source_ip: where it connects from, if that is not its address.

    Raises:
        UsageError: it means nobody, or several.
    """
    try:
        ip = ip_address(text)
    except ValueError:
        return _by_name(snapshot, text, network, node, source_ip)
    return _by_address(snapshot, _unmapped(ip), network, node, source_ip)


def _by_address(
    snapshot: MeshSnapshot, ip: IPAddress, network: str | None, node: str | None, source_ip: IPAddress | None
) -> Client:
    named = [each for each in snapshot.workloads.values() if ip in each.addresses]
    networks = sorted({each.network for each in named}) if network is None else [network]
    owners = [owner for one in networks if (owner := snapshot.workload_by_address(one, ip)) is not None]
    if node is not None:
        owners = [each for each in owners if each.node == node]
    if len(owners) > 1:
        said = ", ".join(f'"{each.network}" ({each.key})' for each in owners[:_NAMED])
        raise _bad(f"{ip} is an address in several networks: {said}; say which one with --network")
    if owners:
        (owner,) = owners
        return Client(workload=owner, ip=source_ip or ip, network=owner.network if network is None else network)
    hosts = sorted(each.key for each in named if each.network_mode is NetworkMode.HOST_NETWORK)
    notes = []
    if hosts:
        notes.append(f"{ip} is the address of a node, which {', '.join(hosts[:_NAMED])} has too: say which by its name")
    where = f"in the network {_quoted(network or '')}" if node is None else f"on the node {_quoted(node)}"
    notes.append(
        f"{ip} is no workload's address {where}: no node would carry its connection, so it comes in plain text"
    )
    return Client(workload=None, ip=source_ip or ip, network=network or "", notes=tuple(notes))


def _by_name(
    snapshot: MeshSnapshot, text: str, network: str | None, node: str | None, source_ip: IPAddress | None
) -> Client:
    workloads = snapshot.workloads
    if text in workloads:
        found = [workloads[text]]
    else:
        found = [each for each in workloads.values() if text in (each.key, f"{each.key}/{each.service_account}")]
    if not found:
        raise _bad(f"there is no workload {text!r}{_did_you_mean(snapshot, text)}")
    if node is not None:
        here = [each for each in found if each.node == node]
        if not here:
            nodes = ", ".join(sorted({_quoted(each.node) for each in found}))
            raise _bad(f"{text} is not on the node {_quoted(node)}, but on {nodes}")
        found = here
    if len(found) > 1:
        said = ", ".join(sorted(each.uid for each in found)[:_NAMED])
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise _bad(f"{text} are {len(found)} workloads; say which by its uid: {said}{more}")
    (workload,) = found
    ip = source_ip or next(iter(workload.addresses), None)
    if ip is None:
        raise _bad(f"{text} has no address: say where it connects from with --source-ip")
    network = workload.network if network is None else network
    return Client(workload=workload, ip=ip, network=network, notes=tuple(_notes(snapshot, workload, ip, network)))


def _notes(snapshot: MeshSnapshot, workload: Workload, ip: IPAddress, network: str) -> list[str]:
    owner = snapshot.workload_by_address(network, ip)
    if owner is workload:
        return []
    if workload.network_mode is NetworkMode.HOST_NETWORK:
        whose = f"{ip} is the address of {workload.key}'s node"
    elif owner is None:
        whose = f"{ip} is no address of {workload.key} in the network {_quoted(network)}"
    else:
        whose = f"a node takes {ip} for the address of {owner.key} ({owner.uid})"
    return [f"{whose}: only a node that is dedicated to {workload.key} knows its connections"]


def _did_you_mean(snapshot: MeshSnapshot, text: str) -> str:
    keys = {each.key for each in snapshot.workloads.values()}
    names = [key for key in keys if key.partition("/")[2] == text.rpartition("/")[2]]  # of another namespace, or none
    near = sorted(names)[:_NAMED] or get_close_matches(text, sorted(keys), n=3, cutoff=0.85)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return "; write NAMESPACE/NAME, a uid or an IP address" if "/" not in text else ""


def hints(snapshot: MeshSnapshot, client: Client, target: Authority) -> list[str]:
    """What is worth a word about a target that the mesh does not know, or that the client does not see."""
    ip = target.ip
    if ip is not None:
        return _address_hints(snapshot, client, ip)
    namespace = None if client.workload is None else client.workload.namespace
    if snapshot.service_by_hostname(target.host, namespace) is not None:
        return []
    if namespace is not None and snapshot.workload_by_hostname(namespace, target.host) is not None:
        return []
    hidden = snapshot.services_by_hostname(target.host)
    if hidden:
        return [f"{each.key} has that name, but only clients of its own namespace see it" for each in hidden[:_NAMED]]
    hostnames = {each.hostname for each in snapshot.services.values()}
    hostnames |= {each.hostname for each in snapshot.workloads.values() if each.hostname}
    host = target.host.removesuffix(".")
    near = sorted(name for name in hostnames if name.startswith(f"{host}."))[:_NAMED]
    near = near or get_close_matches(host, sorted(hostnames), n=3, cutoff=0.8)
    return [f"the mesh does not know {target.host}; did you mean {' or '.join(near)}?"] if near else []


def _address_hints(snapshot: MeshSnapshot, client: Client, ip: IPAddress) -> list[str]:
    networks = {client.network} | ({client.workload.network} if client.workload is not None else set())
    for network in networks:
        if snapshot.workload_by_address(network, ip) is not None or snapshot.services_by_vip(network, ip):
            return []
    found = [
        f"{ip} is an address of {each.key} in the network {_quoted(each.network)}"
        for each in snapshot.workloads.values()
        if ip in each.addresses and each.network not in networks
    ]
    found += [
        f"{ip} is a VIP of {each.key} in the network {_quoted(vip.network)}"
        for each in snapshot.services.values()
        for vip in each.vips
        if vip.ip == ip and vip.network not in networks
    ]
    return found[:_NAMED]


def _bad(message: str) -> click.BadParameter:
    return click.BadParameter(message, ctx=click.get_current_context(), param_hint="'--from'")


def _unmapped(ip: IPAddress) -> IPAddress:
    return getattr(ip, "ipv4_mapped", None) or ip


def _quoted(name: str) -> str:
    return f'"{name}"'
