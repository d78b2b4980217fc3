"""Which peers we talk to, once they have proved who they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from hbone.errors import PeerIdentityMismatch
from hbone.identity import IdentityPattern, SpiffeIdentity, TrustDomain

__all__ = ["PeerPolicy"]

_Rule: TypeAlias = SpiffeIdentity | TrustDomain | IdentityPattern


@dataclass(frozen=True, slots=True)
class PeerPolicy:
    """A set of rules, one of which a peer's identity must fit. A value: equal rules make equal policies.

    ``a | b`` takes who fits either. A policy without rules takes nobody.

    Attributes:
        rules: an identity is itself, a trust domain everybody in it, a pattern all that it matches.
    """

    rules: frozenset[_Rule]

    @classmethod
    def exact(cls, *identities: SpiffeIdentity | str) -> PeerPolicy:
        """Just these identities.

        Raises:
            InvalidIdentity: a text is not a SPIFFE id.
        """
        return cls(frozenset(SpiffeIdentity.parse(one) if isinstance(one, str) else one for one in identities))

    @classmethod
    def trust_domain(cls, *domains: TrustDomain | str) -> PeerPolicy:
        """Every workload of these trust domains.

        Raises:
            InvalidIdentity: a text is not a trust domain.
        """
        return cls(frozenset(TrustDomain.parse(one) if isinstance(one, str) else one for one in domains))

    @classmethod
    def matching(cls, *patterns: IdentityPattern | str) -> PeerPolicy:
        """Whoever matches one of these patterns; ``"*"`` is everybody whose trust domain we have roots for.

        Raises:
            InvalidIdentity: a text is not a pattern.
        """
        return cls(frozenset(IdentityPattern.parse(one) if isinstance(one, str) else one for one in patterns))

    def __or__(self, other: PeerPolicy) -> PeerPolicy:
        return PeerPolicy(self.rules | other.rules)

    def allows(self, identity: SpiffeIdentity) -> bool:
        """Whether one of the rules fits."""
        return any(_fits(rule, identity) for rule in self.rules)

    def check(self, identity: SpiffeIdentity) -> None:
        """Do nothing for an allowed identity.

        Raises:
            PeerIdentityMismatch: none of the rules fits.
        """
        if not self.allows(identity):
            raise PeerIdentityMismatch(expected=self._in_words(), presented=str(identity))

    def _in_words(self) -> list[str]:
        return sorted(map(_words, self.rules))

    def __str__(self) -> str:
        return " or ".join(self._in_words()) or "nobody"


def _fits(rule: _Rule, identity: SpiffeIdentity) -> bool:
    match rule:
        case SpiffeIdentity():
            return rule == identity
        case TrustDomain():
            return rule == identity.trust_domain
    return rule.matches(identity)


def _words(rule: _Rule) -> str:
    match rule:
        case TrustDomain():
            return f"anyone in {rule}"
        case IdentityPattern(text="*"):
            return "anyone"
        case _:
            return str(rule)
