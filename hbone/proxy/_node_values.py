"""How the settings of a node are written: durations, switches, addresses to listen on.

One reader for each form, whatever the setting comes from: the environment, a file, an option. A reader raises
`ValueError` with what it expected, to be put after "expected".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any, Final, TypeAlias

from hbone.errors import InvalidIdentity
from hbone.identity import SpiffeIdentity, TrustDomain
from hbone.proxy._context import WorkloadInfo

__all__ = [
    "ListenAddress",
    "Reader",
    "choice",
    "format_duration",
    "number",
    "read_auto_switch",
    "read_duration",
    "read_listen",
    "read_path",
    "read_port",
    "read_switch",
    "read_text",
    "read_trust_domain",
    "read_workload",
]

Reader: TypeAlias = Callable[[str], Any]

_UNITS: Final = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
_PART: Final = re.compile(r"\s*(\d{1,12}(?:\.\d{1,9})?)\s*(ns|us|µs|ms|s|m|h|d)")
_DURATION: Final = "a number with its unit: 100ms, 10s, 5m or 1h30m"
_LISTEN: Final = "PORT, ADDRESS:PORT, [IPV6]:PORT, localhost:PORT, *:PORT or off"


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where to listen.

    Attributes:
        host: an IP address of this machine; ``*`` for all of them, IPv6 and IPv4; ``localhost`` for 127.0.0.1 and ::1.
        port: 0 for a free one.

    Raises:
        ValueError: the host is none of these, or the port is out of range.
    """

    host: str
    port: int

    def __post_init__(self) -> None:
        if self.host not in ("*", "localhost"):
            object.__setattr__(self, "host", str(ip_address(self.host)))
        if not 0 <= self.port <= 65535:
            raise ValueError(f"a port is from 0 to 65535, not {self.port}")

    def addresses(self, *, ipv6: bool = True) -> tuple[str, ...]:
        """The IP addresses to bind, all of them; ``::`` takes IPv4 too.

        Args:
            ipv6: whether ``*`` and ``localhost`` mean IPv6 too.
        """
        match self.host:
            case "*":
                return ("::",) if ipv6 else ("0.0.0.0",)  # noqa: S104 - that is what it means
            case "localhost":
                return ("127.0.0.1", "::1") if ipv6 else ("127.0.0.1",)
            case host:
                return (host,)

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host == "localhost" or (self.host != "*" and ip_address(self.host).is_loopback)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def read_text(text: str) -> str:
    """Any text."""
    return text


def read_path(text: str) -> Path:
    """A path; ``~`` is the home directory."""
    if not text or "\0" in text:
        raise ValueError("a path")
    if "-----BEGIN" in text:
        raise ValueError("the path of a file, not what is in it")
    return Path(text).expanduser()


def read_switch(text: str) -> bool:
    """``true`` or ``false``, nothing else: a switch that was meant must not be lost to its spelling."""
    match text:
        case "true":
            return True
        case "false":
            return False
    raise ValueError("true or false")


def read_auto_switch(text: str) -> bool | None:
    """``true``, ``false`` or ``auto``."""
    if text == "auto":
        return None
    try:
        return read_switch(text)
    except ValueError:
        raise ValueError("true, false or auto") from None


def read_duration(text: str) -> float:
    """Seconds: one or more numbers, each with its unit."""
    position, seconds = 0, 0.0
    while position < len(text):
        part = _PART.match(text, position)
        if part is None:
            raise ValueError(_DURATION)
        seconds += float(part[1]) * _UNITS[part[2]]
        position = part.end()
    if not text:
        raise ValueError(_DURATION)
    return seconds


def format_duration(seconds: float) -> str:
    """The shortest text that `read_duration` reads as this."""
    if seconds == 0:
        return "0s"
    left, parts = round(seconds * 1000), []
    for unit, size in (("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


def number(lowest: int, highest: int) -> Reader:
    """A reader of whole numbers, decimal or hexadecimal with ``0x``."""

    def read(text: str) -> int:
        if re.fullmatch(r"[0-9]{1,10}|0x[0-9a-fA-F]{1,8}", text):
            value = int(text, 16 if text.startswith("0x") else 10)
            if lowest <= value <= highest:
                return value
        raise ValueError(f"a number from {lowest} to {highest}")

    return read


read_port: Final = number(0, 65535)


def choice(*words: str) -> Reader:
    """A reader of one of some words."""

    def read(text: str) -> str:
        if text in words:
            return text
        raise ValueError(" or ".join(words))

    return read


def read_listen(host: str) -> Callable[[str], ListenAddress | None]:
    """A reader of `ListenAddress`; a port alone is one at `host`, ``off`` is None."""

    def read(text: str) -> ListenAddress | None:
        if text == "off":
            return None
        name, colon, port = text.rpartition(":")
        try:
            if not colon:
                name = host
            elif name.startswith("[") and name.endswith("]"):
                name = str(IPv6Address(name[1:-1]))
            elif ":" in name:
                raise ValueError(_LISTEN)
            return ListenAddress(name, read_port(port))
        except ValueError:
            raise ValueError(_LISTEN) from None

    return read


def read_workload(text: str) -> WorkloadInfo:
    """``namespace/name/serviceaccount``."""
    parts = text.split("/")
    if len(parts) != 3 or not all(parts):
        raise ValueError("namespace/name/serviceaccount")
    namespace, name, account = parts
    try:
        SpiffeIdentity.for_workload(namespace=namespace, service_account=account)
    except InvalidIdentity as problem:
        raise ValueError(f"namespace/name/serviceaccount that can be part of a SPIFFE id ({problem})") from None
    return WorkloadInfo(namespace=namespace, name=name, service_account=account)


def read_trust_domain(text: str) -> str:
    """The name of a trust domain."""
    try:
        return TrustDomain.parse(text).name
    except InvalidIdentity as problem:
        raise ValueError(f"a trust domain ({problem})") from None
