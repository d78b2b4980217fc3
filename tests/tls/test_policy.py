"""Who is let in, and what is said to whom is not."""

from __future__ import annotations

import pytest
from support.mint import ALIEN, DB, WEB

from hbone.errors import InvalidIdentity, PeerIdentityMismatch
from hbone.identity import IdentityPattern, SpiffeIdentity, TrustDomain
from hbone.tls import PeerPolicy

web, db, alien = map(SpiffeIdentity.parse, (WEB, DB, ALIEN))


@pytest.mark.parametrize(
    ("policy", "allowed", "words"),
    [
        (PeerPolicy.exact(), set(), "nobody"),
        (PeerPolicy.exact(WEB), {web}, WEB),
        (PeerPolicy.exact(web, DB), {web, db}, f"{DB} or {WEB}"),
        (PeerPolicy.trust_domain("cluster.local"), {web, db}, "anyone in cluster.local"),
        (PeerPolicy.trust_domain(TrustDomain("other.example")), {alien}, "anyone in other.example"),
        (PeerPolicy.matching("spiffe://cluster.local/ns/shop/*"), {web, db}, "spiffe://cluster.local/ns/shop/*"),
        (PeerPolicy.matching(IdentityPattern.parse("*")), {web, db, alien}, "anyone"),
        (PeerPolicy.exact(WEB) | PeerPolicy.trust_domain("other.example"), {web, alien}, None),
    ],
)
def test_policies(policy: PeerPolicy, allowed: set[SpiffeIdentity], words: str | None) -> None:
    for identity in (web, db, alien):
        assert policy.allows(identity) is (identity in allowed)
        if identity in allowed:
            policy.check(identity)
        else:
            with pytest.raises(PeerIdentityMismatch) as caught:
                policy.check(identity)
            assert caught.value.presented == str(identity)
            assert " or ".join(caught.value.expected) == ("" if str(policy) == "nobody" else str(policy))
    if words is not None:
        assert str(policy) == words


def test_policies_are_values() -> None:
    assert PeerPolicy.exact(WEB, DB) == PeerPolicy.exact(db, web) == PeerPolicy.exact(WEB) | PeerPolicy.exact(DB)
    assert len({PeerPolicy.exact(WEB), PeerPolicy.exact(web), PeerPolicy.trust_domain("td")}) == 2


def test_texts_are_checked() -> None:
    with pytest.raises(InvalidIdentity):
        PeerPolicy.exact("cluster.local/ns/shop/sa/web")
    with pytest.raises(InvalidIdentity):
        PeerPolicy.trust_domain("Cluster.local")
    with pytest.raises(InvalidIdentity):
        PeerPolicy.matching("spiffe://cluster.local/ns/*/sa/web")
