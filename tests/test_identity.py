"""SPIFFE ids and identity patterns, against vectors made from the SPIFFE-ID standard."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbone.errors import HboneError, InvalidIdentity
from hbone.identity import MAX_TRUST_DOMAIN, MAX_URI, IdentityPattern, SpiffeIdentity, TrustDomain

TRUST_DOMAIN_CHARS = string.ascii_lowercase + string.digits + "._-"
SEGMENT_CHARS = string.ascii_letters + string.digits + "._-"
BYTES = [chr(value) for value in range(256)]

trust_domains = st.text(TRUST_DOMAIN_CHARS, min_size=1, max_size=40)
segments = st.text(SEGMENT_CHARS, min_size=1, max_size=20).filter(lambda segment: segment not in (".", ".."))


@st.composite
def uris(draw: st.DrawFn) -> str:
    return "/".join(["spiffe:/", draw(trust_domains), *draw(st.lists(segments, max_size=6))])


@given(uris())
def test_a_valid_id_comes_back_as_it_was_written(uri: str) -> None:
    identity = SpiffeIdentity.parse(uri)
    assert str(identity) == uri
    assert SpiffeIdentity(identity.trust_domain, identity.path) == identity
    assert hash(SpiffeIdentity.parse(uri)) == hash(identity)


@given(
    st.one_of(st.text(), st.text().map(lambda text: "spiffe://" + text), st.text().map(lambda t: "spiffe://td/" + t))
)
def test_any_text_is_an_id_or_invalid(text: str) -> None:
    try:
        identity = SpiffeIdentity.parse(text)
    except InvalidIdentity:
        return
    assert str(identity) == text
    assert set(text) <= set(SEGMENT_CHARS + ":/")


@pytest.mark.parametrize("char", BYTES)
def test_every_byte_value_in_a_trust_domain(char: str) -> None:
    for name in (f"td{char}", f"{char}td", f"t{char}d"):
        if char in TRUST_DOMAIN_CHARS:
            assert SpiffeIdentity.parse(f"spiffe://{name}/a").trust_domain == TrustDomain(name)
        else:
            with pytest.raises(InvalidIdentity):
                TrustDomain(name)
            # A slash ends the trust domain instead.
            if char != "/" or name == "/td":
                with pytest.raises(InvalidIdentity):
                    SpiffeIdentity.parse(f"spiffe://{name}/a")


@pytest.mark.parametrize("char", BYTES)
def test_every_byte_value_in_a_path(char: str) -> None:
    for path in (f"/path{char}", f"/{char}path", f"/pa{char}th", f"/a/b{char}/c"):
        if char in SEGMENT_CHARS or (char == "/" and path == "/pa/th"):
            assert SpiffeIdentity.parse(f"spiffe://td{path}").path == path
        else:
            with pytest.raises(InvalidIdentity):
                SpiffeIdentity.parse(f"spiffe://td{path}")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "s",
        "spiffe",
        "spiffe:/",
        "spiffe:/td",
        "spiffe:td/a",
        "Spiffe://td/a",
        "SPIFFE://td/a",
        " spiffe://td/a",
        "http://td/a",
        "//td/a",
        "td/a",
        "spiffe://",
        "spiffe:///",
        "spiffe:///a",
        "spiffe://Td/a",
        "spiffe://td:80/a",
        "spiffe://user@td/a",
        "spiffe://[::1]/a",
        "spiffe://td?query",
        "spiffe://td#fragment",
        "spiffe://td/a?query",
        "spiffe://td/a#fragment",
        "spiffe://t%64/a",
        "spiffe://td/%61",
        "spiffe://td/%F0%9F%A4%AF",
        "spiffe://td/\N{OCTOPUS}",
        "spiffe://\N{OCTOPUS}/a",
        "spiffe://td/",
        "spiffe://td/a/",
        "spiffe://td//",
        "spiffe://td//a",
        "spiffe://td/a//b",
        "spiffe://td/.",
        "spiffe://td/..",
        "spiffe://td/./",
        "spiffe://td/./a",
        "spiffe://td/a/./b",
        "spiffe://td/../a",
        "spiffe://td/a/..",
        "spiffe://td/a\n",
        "spiffe://td\n",
        "spiffe://td/a\x00",
        "spiffe://td/\N{KELVIN SIGN}",
        "spiffe://td/\N{ARABIC-INDIC DIGIT ONE}",
    ],
)
def test_refused(uri: str) -> None:
    with pytest.raises(InvalidIdentity) as caught:
        SpiffeIdentity.parse(uri)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, HboneError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/.path", "/..path", "/...", "/a/.b", "/a..b", "/-", "/_", "/A", "/a/b/c/d"])
def test_dots_are_fine_within_a_segment(path: str) -> None:
    assert SpiffeIdentity.parse(f"spiffe://td{path}").path == path


@pytest.mark.parametrize("name", ["1.2.3.4", "a.b.c", "..", "-", "_"])
def test_unusual_trust_domains(name: str) -> None:
    assert str(SpiffeIdentity.parse(f"spiffe://{name}")) == f"spiffe://{name}"


def test_lengths() -> None:
    name = "a" * MAX_TRUST_DOMAIN
    assert SpiffeIdentity.parse(f"spiffe://{name}").path == ""
    with pytest.raises(InvalidIdentity, match="256 bytes long"):
        TrustDomain(name + "a")
    fits = "spiffe://td/".ljust(MAX_URI, "x")
    assert str(SpiffeIdentity.parse(fits)) == fits
    with pytest.raises(InvalidIdentity, match="2049 bytes long") as caught:
        SpiffeIdentity.parse(fits + "x")
    assert len(str(caught.value)) < 200


def test_messages_say_where_and_why() -> None:
    with pytest.raises(InvalidIdentity, match="the trust domain has 'L' at position 18"):
        SpiffeIdentity.parse("spiffe://cluster.Local/ns/a/sa/b")
    with pytest.raises(InvalidIdentity, match="the path has '%' at position 15"):
        SpiffeIdentity.parse("spiffe://td/ns%2fa")
    with pytest.raises(InvalidIdentity, match=r"segment '\.\.' at position 15"):
        SpiffeIdentity.parse("spiffe://td/a/../b")
    with pytest.raises(InvalidIdentity, match="empty path segment at position 15"):
        SpiffeIdentity.parse("spiffe://td/a/")
    with pytest.raises(InvalidIdentity, match="must start with spiffe://"):
        SpiffeIdentity.parse("cluster.local/ns/a/sa/b")


def test_istio_view() -> None:
    web = SpiffeIdentity.for_workload(namespace="shop", service_account="web")
    assert str(web) == "spiffe://cluster.local/ns/shop/sa/web"
    assert (web.trust_domain, web.namespace, web.service_account) == (TrustDomain("cluster.local"), "shop", "web")
    assert web == SpiffeIdentity.parse(str(web))
    other = SpiffeIdentity.for_workload(namespace="shop", service_account="web", trust_domain=TrustDomain("td"))
    assert str(other) == "spiffe://td/ns/shop/sa/web"


@pytest.mark.parametrize("path", ["", "/web", "/ns/a", "/ns/a/sa", "/ns/a/sa/b/c", "/sa/a/ns/b", "/x/ns/a/sa/b"])
def test_other_paths_have_no_istio_view(path: str) -> None:
    identity = SpiffeIdentity.parse(f"spiffe://td{path}")
    assert identity.namespace is None
    assert identity.service_account is None


@pytest.mark.parametrize(
    ("namespace", "account"), [("", "a"), ("a", ""), ("a/b", "c"), ("a", "b/c"), ("a", ".."), ("*", "a")]
)
def test_workload_parts_are_single_segments(namespace: str, account: str) -> None:
    with pytest.raises(InvalidIdentity):
        SpiffeIdentity.for_workload(namespace=namespace, service_account=account)


def test_the_constructor_checks_too() -> None:
    with pytest.raises(InvalidIdentity, match="must start with '/'"):
        SpiffeIdentity(TrustDomain("td"), "a")
    with pytest.raises(InvalidIdentity, match="empty"):
        TrustDomain("")


def test_trust_domain_text() -> None:
    assert TrustDomain.parse("spiffe://td") == TrustDomain.parse("td") == TrustDomain("td")
    assert str(TrustDomain("td")) == "td"
    with pytest.raises(InvalidIdentity):
        TrustDomain.parse("spiffe://td/")


@pytest.mark.parametrize(
    ("pattern", "uri", "matches"),
    [
        ("*", "spiffe://td", True),
        ("*", "spiffe://td/a/b", True),
        ("spiffe://td/*", "spiffe://td/a", True),
        ("spiffe://td/*", "spiffe://td/a/b/c", True),
        ("spiffe://td/*", "spiffe://td", False),
        ("spiffe://td/*", "spiffe://td2/a", False),
        ("spiffe://td/ns/shop/*", "spiffe://td/ns/shop/sa/web", True),
        ("spiffe://td/ns/shop/*", "spiffe://td/ns/shop", False),
        ("spiffe://td/ns/shop/*", "spiffe://td/ns/shop2/sa/web", False),
        ("spiffe://td/ns/shop/*", "spiffe://other/ns/shop/sa/web", False),
        ("spiffe://td/ns/shop/sa/web", "spiffe://td/ns/shop/sa/web", True),
        ("spiffe://td/ns/shop/sa/web", "spiffe://td/ns/shop/sa/web2", False),
        ("spiffe://td", "spiffe://td", True),
        ("spiffe://td", "spiffe://td/a", False),
    ],
)
def test_patterns(pattern: str, uri: str, matches: bool) -> None:
    assert IdentityPattern.parse(pattern).matches(SpiffeIdentity.parse(uri)) is matches
    assert str(IdentityPattern.parse(pattern)) == pattern


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "**",
        "/*",
        "spiffe://*",
        "spiffe://*/a",
        "spiffe://td*",
        "spiffe://td/a*",
        "spiffe://td/*/a",
        "spiffe://td/*/*",
        "spiffe://td/a/**",
        "spiffe://td//*",
        "td/*",
        "spiffe:///*",
        "Spiffe://td/*",
    ],
)
def test_refused_patterns(pattern: str) -> None:
    with pytest.raises(InvalidIdentity):
        IdentityPattern.parse(pattern)


@given(uris())
def test_an_id_is_a_pattern_for_itself(uri: str) -> None:
    identity = SpiffeIdentity.parse(uri)
    assert IdentityPattern.parse(uri).matches(identity)
    assert not IdentityPattern.parse(uri + "/*").matches(identity)
    assert IdentityPattern.parse(uri + "/*").matches(SpiffeIdentity.parse(uri + "/more"))
