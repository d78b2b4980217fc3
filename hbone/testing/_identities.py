"""Short names for identities: ``"shop/cart"`` is a service account of a namespace, as tests write it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hbone.errors import InvalidIdentity
from hbone.identity import IdentityPattern, SpiffeIdentity

if TYPE_CHECKING:
    from hbone.identity import TrustDomain

__all__ = ["identity_of", "pattern_of"]


def identity_of(name: SpiffeIdentity | str, trust_domain: TrustDomain) -> SpiffeIdentity:
    """From a SPIFFE id, or ``"namespace/service-account"``.

    Raises:
        InvalidIdentity: it is neither.
    """
    if isinstance(name, SpiffeIdentity):
        return name
    if "://" in name:
        return SpiffeIdentity.parse(name)
    namespace, slash, service_account = name.partition("/")
    if not slash:
        raise InvalidIdentity(f"{name!r} is neither a SPIFFE id nor 'namespace/service-account'")
    return SpiffeIdentity.for_workload(
        namespace=namespace, service_account=service_account, trust_domain=str(trust_domain)
    )


def pattern_of(name: IdentityPattern | SpiffeIdentity | str, trust_domain: TrustDomain) -> IdentityPattern:
    """From a pattern, ``"namespace/*"``, or what `identity_of` takes.

    Raises:
        InvalidIdentity: it is none of them.
    """
    if isinstance(name, IdentityPattern):
        return name
    if isinstance(name, str) and (name == "*" or "://" in name):
        return IdentityPattern.parse(name)
    if isinstance(name, str) and name.endswith("/*"):
        return IdentityPattern.parse(f"spiffe://{trust_domain}/ns/{name}")
    return IdentityPattern.parse(str(identity_of(name, trust_domain)))
