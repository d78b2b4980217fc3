"""What a decision is about and what it says: frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Protocol, TypeAlias

from hbone.errors import HboneError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hbone.identity import SpiffeIdentity
    from hbone.mesh import Action, AuthorizationPolicy

__all__ = ["DryRunMatch", "Flow", "HasPolicies", "PolicyFailed", "Verdict"]

IPAddress: TypeAlias = IPv4Address | IPv6Address


class PolicyFailed(HboneError):
    """A policy cannot be made sense of, so nobody can be told what it says: a fault in `hbone`.

    Attributes:
        policy: its ``namespace/name``.
        why: in words.
    """

    def __init__(self, policy: str, why: str) -> None:
        super().__init__(f"policy {policy} cannot be evaluated: {why}")
        self.policy = policy
        self.why = why


class HasPolicies(Protocol):
    """What is needed of a `hbone.mesh.MeshSnapshot`."""

    @property
    def policies(self) -> Mapping[str, AuthorizationPolicy]:
        """All policies by ``namespace/name``: another object whenever any of them is another."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A connection, as policies see it. An IPv4 address mapped into IPv6 becomes the IPv4 address.

    Attributes:
        source_ip: of the client.
        source_identity: what the client has proved, or None for plain text.
        destination_ip: of the workload, not of a service in front of it.
        destination_port: that the application listens on, after all translation.
    """

    source_ip: IPAddress
    source_identity: SpiffeIdentity | None
    destination_ip: IPAddress
    destination_port: int

    def __post_init__(self) -> None:
        if self.source_ip.version == 6 and (plain := self.source_ip.ipv4_mapped) is not None:
            object.__setattr__(self, "source_ip", plain)
        if self.destination_ip.version == 6 and (plain := self.destination_ip.ipv4_mapped) is not None:
            object.__setattr__(self, "destination_ip", plain)


@dataclass(frozen=True, slots=True)
class DryRunMatch:
    """A policy that matched and was only asked what it would do."""

    policy: str
    """Its ``namespace/name``."""
    action: Action


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a flow may pass.

    Attributes:
        allowed: the answer.
        policy: the ``namespace/name`` of the policy that decided; None when no single one did.
        reason: the same in words, as they are logged: ``explicitly denied by: shop/no-admin``,
            ``allow policies exist, but none allowed``, ``allowed by: shop/callers`` or ``no allow policies``.
        dry_run: the dry-run policies that matched, in the order they were asked: those that deny, and when nothing
            denied, those that allow.
    """

    allowed: bool
    policy: str | None
    reason: str
    dry_run: tuple[DryRunMatch, ...] = ()
