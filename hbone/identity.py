"""SPIFFE ids: who a peer is, as values and never as bare strings.

The grammar is the one of the SPIFFE-ID standard, taken strictly: nothing is lower-cased, decoded or tidied up, because
two spellings of one identity are how an allow list gets bypassed. `SpiffeIdentity` takes any path; the Istio form
``spiffe://<trust domain>/ns/<namespace>/sa/<service account>`` is a view of it that may be absent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from hbone.errors import InvalidIdentity

__all__ = ["IdentityPattern", "SpiffeIdentity", "TrustDomain"]

SCHEME = "spiffe://"
MAX_TRUST_DOMAIN = 255
MAX_URI = 2048
"""Longest URI taken, in bytes: what SPIFFE-ID section 2.3 obliges everybody to support."""

_NOT_TRUST_DOMAIN = re.compile(r"[^a-z0-9._-]")
_NOT_SEGMENT = re.compile(r"[^a-zA-Z0-9._-]")
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class TrustDomain:
    """The name of a trust domain, such as ``cluster.local`` (SPIFFE-ID section 2.1).

    Attributes:
        name: the bare name, with neither scheme nor path.

    Raises:
        InvalidIdentity: the name is empty, too long or has a character other than ``a-z 0-9 . _ -``.
    """

    name: str

    def __post_init__(self) -> None:
        _check_trust_domain(self.name, self.name, 0)

    @classmethod
    def parse(cls, text: str) -> TrustDomain:
        """The trust domain named by ``text``: a bare name, or a SPIFFE id without a path.

        Raises:
            InvalidIdentity: it is neither.
        """
        return cls(text.removeprefix(SCHEME))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class SpiffeIdentity:
    """A parsed SPIFFE id. Equal ids are equal values, so it serves as a dictionary key.

    Attributes:
        trust_domain: who vouches for it.
        path: ``""`` for the id of the trust domain itself, else ``/`` and segments; never normalised.

    Raises:
        InvalidIdentity: the path is not one (see `parse`).
    """

    trust_domain: TrustDomain
    path: str = ""

    def __post_init__(self) -> None:
        if self.path:
            uri = str(self)
            _check_path(self.path, uri, len(uri) - len(self.path))

    @classmethod
    def parse(cls, uri: str) -> SpiffeIdentity:
        """Parse ``spiffe://<trust domain>[/<segment>...]``.

        Raises:
            InvalidIdentity: it is something else; the message says where and why. Upper-case schemes and trust
                domains, ports, user info, queries, fragments, percent encoding, empty and dot segments are all refused.
        """
        if not uri.startswith(SCHEME):
            _refuse(uri, f"it must start with {SCHEME}")
        name, slash, rest = uri[len(SCHEME) :].partition("/")
        _check_trust_domain(name, uri, len(SCHEME))
        return cls(TrustDomain(name), slash + rest)

    @classmethod
    def for_workload(
        cls, *, namespace: str, service_account: str, trust_domain: TrustDomain | str = "cluster.local"
    ) -> SpiffeIdentity:
        """The id that Istio gives to a Kubernetes service account.

        Raises:
            InvalidIdentity: one of the three cannot be part of a SPIFFE id.
        """
        if isinstance(trust_domain, str):
            trust_domain = TrustDomain(trust_domain)
        for what, segment in (("namespace", namespace), ("service account", service_account)):
            if not segment or "/" in segment:
                _refuse(segment, f"a {what} is one path segment, not {'empty' if not segment else 'several'}")
        return cls(trust_domain, f"/ns/{namespace}/sa/{service_account}")

    @property
    def namespace(self) -> str | None:
        """The Kubernetes namespace, when the path has Istio's form."""
        parts = self._istio_parts()
        return parts[0] if parts else None

    @property
    def service_account(self) -> str | None:
        """The Kubernetes service account, when the path has Istio's form."""
        parts = self._istio_parts()
        return parts[1] if parts else None

    def _istio_parts(self) -> tuple[str, str] | None:
        match self.path.split("/"):
            case ["", "ns", namespace, "sa", service_account]:
                return namespace, service_account
        return None

    def __str__(self) -> str:
        return f"{SCHEME}{self.trust_domain.name}{self.path}"


@dataclass(frozen=True, slots=True)
class IdentityPattern:
    """Which identities to take: one, all below a path, or all.

    Attributes:
        text: how it was written: ``spiffe://td/ns/shop/sa/web``, ``spiffe://td/ns/shop/*`` or ``*``.

    Raises:
        InvalidIdentity: see `parse`.
    """

    text: str

    def __post_init__(self) -> None:
        if self.text == "*":
            return
        # `/*` stands for whole segments: `ns/sho*` would also let in a namespace that somebody else may create.
        fixed = self.text.removesuffix("/*")
        if "*" in fixed:
            _refuse(self.text, "'*' may stand only for a whole last segment, or for everything")
        SpiffeIdentity.parse(fixed)

    @classmethod
    def parse(cls, text: str) -> IdentityPattern:
        """Parse an exact SPIFFE id, a SPIFFE id whose last segment is ``*``, or ``*``.

        A last ``*`` stands for one segment or more: ``spiffe://td/*`` is every identity of ``td`` but not ``spiffe://td``.

        Raises:
            InvalidIdentity: it is none of these; the message says where and why.
        """
        return cls(text)

    def matches(self, identity: SpiffeIdentity) -> bool:
        """Whether ``identity`` is one of those meant."""
        if self.text == "*":
            return True
        if self.text.endswith("/*"):
            return str(identity).startswith(self.text[:-1])
        return str(identity) == self.text

    def __str__(self) -> str:
        return self.text


def _check_trust_domain(name: str, whole: str, offset: int) -> None:
    if not name:
        _refuse(whole, "the trust domain is empty")
    if (bad := _NOT_TRUST_DOMAIN.search(name)) is not None:
        position = offset + bad.start() + 1
        _refuse(whole, f"the trust domain has {bad[0]!r} at position {position}; only a-z 0-9 . _ - are allowed")
    if len(name) > MAX_TRUST_DOMAIN:
        _refuse(whole, f"the trust domain is {len(name)} bytes long, more than {MAX_TRUST_DOMAIN}")


def _check_path(path: str, whole: str, offset: int) -> None:
    if not path.startswith("/"):
        _refuse(whole, f"the path must start with '/', not {path[0]!r}")
    position = offset + 1
    for segment in path[1:].split("/"):
        position += 1
        if not segment:
            _refuse(whole, f"an empty path segment at position {position}; no trailing or double slashes")
        if segment in (".", ".."):
            _refuse(whole, f"the path segment {segment!r} at position {position} is not allowed")
        if (bad := _NOT_SEGMENT.search(segment)) is not None:
            at = position + bad.start()
            _refuse(whole, f"the path has {bad[0]!r} at position {at}; only a-z A-Z 0-9 . _ - are allowed")
        position += len(segment)
    if len(whole) > MAX_URI:
        _refuse(whole, f"it is {len(whole)} bytes long, more than {MAX_URI}")


def _refuse(text: str, why: str) -> NoReturn:
    shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    raise InvalidIdentity(f"invalid SPIFFE identity {shown!r}: {why}")
