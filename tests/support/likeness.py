"""How much two nodes are like two ztunnels: what they show becomes facts, and facts are compared.

A fact is a path, such as ``a / access log / 3 denied / error``, and a value. `shown` makes them of what a node printed
and served, `support.ztunnel.recorded` has those of ztunnel, and `check` holds that they are the same, but for
`support.differences.DIFFERENCES`: one that is not listed is a fault, and so is one that is listed and is not there.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain_families

from support.ztunnel import ACCESS_FIELDS, CONNECTIONS, recorded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from prometheus_client.metrics_core import Metric

__all__ = [
    "ABSENT",
    "Difference",
    "Line",
    "Said",
    "Some",
    "access_lines",
    "check",
    "flat",
    "read_line",
    "scrape",
    "shown",
]

Path = tuple[str, ...]
Facts = dict[Path, Any]


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


#: Instead of a value: there is no such fact.
ABSENT = _Absent()


@dataclass(frozen=True)
class Some:
    """Instead of a value: there is one, and it is not always the same."""

    words: str


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Something that is not as with ztunnel, and should not be."""

    where: str
    """The paths: ``{a,b}`` stands for each of them, ``*`` for any one part, a final ``**`` for all that is below."""
    ztunnel: Any
    here: Any
    why: str
    only: str = ""
    """The log format in which alone it shows."""

    def patterns(self) -> list[Path]:
        """Each must match something."""
        parts = re.split(r"\{([^}]*)\}", self.where)
        choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
        return [tuple("".join(words).split(" / ")) for words in product(*choices)]


def _matches(path: Path, pattern: Path) -> bool:
    if pattern[-1] == "**":
        path = path[: len(pattern) - 1]
        pattern = pattern[:-1]
    return len(path) == len(pattern) and all(map(fnmatchcase, path, pattern))


def _is(value: Any, wanted: Any) -> bool:
    return value is not ABSENT if isinstance(wanted, Some) else type(value) is type(wanted) and value == wanted


def check(said: Mapping[str, Said], differences: Iterable[Difference], *, parts: Sequence[Path] = ((),)) -> None:
    """Compare with what is recorded.

    Args:
        said: by node, what it printed and served.
        differences: all that may and must differ.
        parts: the beginnings of the paths, behind the node, that can be compared here.
    """
    formats = {one.log_format for one in said.values()}
    here = {path: value for node, one in said.items() for path, value in flat((node,), shown(node, one)).items()}
    there = {path: value for node in said for path, value in flat((node,), recorded(node)).items()}
    keys = [one.key_of_certificate() for one in said.values()]
    here["both", "config_dump", "certificates", "keys"], there["both", "config_dump", "certificates", "keys"] = (
        len(set(keys)),
        1,
    )
    if "json" not in formats:
        for facts in (here, there):
            for node in said:
                facts.pop((node, "scopes", "in front, in JSON"), None)
    paths = [path for path in {**there, **here} if any(path[1 : 1 + len(part)] == part for part in parts)]
    faults: list[str] = []
    listed: set[Path] = set()
    for difference in differences:
        if difference.only and difference.only not in formats:
            continue
        for pattern in difference.patterns():
            if not any(_overlap(pattern[1:], part) for part in parts):
                continue
            found = [path for path in paths if _matches(path, pattern)]
            if not found:
                faults.append(f"listed, but there is nothing: {' / '.join(pattern)}")
            for path in found:
                theirs, ours = there.get(path, ABSENT), here.get(path, ABSENT)
                if path in listed:
                    faults.append(f"listed twice: {' / '.join(path)}")
                elif _is(ours, theirs):
                    faults.append(f"listed, but the same: {' / '.join(path)}: {ours!r}")
                elif not _is(theirs, difference.ztunnel) or not _is(ours, difference.here):
                    faults.append(f"listed otherwise: {' / '.join(path)}: ztunnel {theirs!r}, here {ours!r}")
                listed.add(path)
    for path in paths:
        theirs, ours = there.get(path, ABSENT), here.get(path, ABSENT)
        if path not in listed and not _is(ours, theirs):
            faults.append(f"not listed: {' / '.join(path)}: ztunnel {theirs!r}, here {ours!r}")
    assert not faults, "\n".join(faults)


def _overlap(pattern: Path, part: Path) -> bool:
    """Whether what the pattern means can be in that part."""
    return all(word in ("*", "**", wanted) for word, wanted in zip(pattern, part, strict=False))


def flat(path: Path, value: Any) -> Facts:
    """A fact for each value in dicts; lists of things with a name are taken as dicts, and their order as a fact."""
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        key = "name" if "name" in value[0] else "identity"
        if all(key in one for one in value):
            facts = {(*path, "order"): [one[key] for one in value]}
            for one in value:
                facts |= flat((*path, one[key]), one)
            return facts
        if path[-1] in ("certChain", "rootCerts"):
            facts = {(*path, "number"): len(value)}
            for one in value:
                facts |= flat(path, one)
            return facts
    if isinstance(value, dict) and value:
        return {deeper: fact for key, one in value.items() for deeper, fact in flat((*path, key), one).items()}
    return {path: value}


# === what a node shows ===


@dataclass(kw_only=True)
class Said:
    """All that a node printed and served."""

    log: list[str]
    metrics: str
    """As OpenMetrics."""
    dump: str
    log_format: str = "plain"
    names: Mapping[str, str] = field(default_factory=dict)
    """What was something else with ztunnel: addresses, and addresses with ports, in the order to replace them."""
    ports: Mapping[int, int] = field(default_factory=dict)
    """The same of numbers in the dump."""

    def as_there(self, text: str) -> str:
        """With the addresses that were recorded."""
        for ours, theirs in self.names.items():
            text = re.sub(rf"(?<![\d.]){re.escape(ours)}(?!\d)", theirs, text)
        return text

    def key_of_certificate(self) -> bytes:
        """The public key of the node's certificate, as it is written."""
        (one,) = json.loads(self.dump)["certificates"]
        key = _certificate_of(one["certChain"][0]).public_key()
        return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def shown(node: str, said: Said) -> dict[str, Any]:
    """What a node showed, as `recorded` has it of ztunnel."""
    lines = [read_line(said.as_there(line), said.log_format) for line in said.log]
    return {
        "access log": dict(_access_facts(node, [line for line in lines if line.scope == "access"])),
        "log": dict(_log_facts([line for line in lines if line.scope != "access"])),
        "scopes": {"in front, in JSON": _front(lines)},
        "metrics": _metrics_facts(node, scrape(said.metrics)),
        "config_dump": _dump_facts(said),
    }


# === logs ===


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the log."""

    level: str
    scope: str
    """Without what is in front of it in JSON."""
    message: str
    fields: dict[str, Any]
    front: str = ""


_PAIR = re.compile(r'(\S+?)=("(?:[^"\\]|\\.)*"|\S+)(?: |$)')
_BARE = ("src.addr", "dst.addr", "dst.hbone_addr", "address")


def read_line(line: str, log_format: str) -> Line:
    """Read it, and hold that it is written as Istio's tools want it, byte for byte."""
    if log_format == "json":
        fields = json.loads(line)
        level, time, scope, message = (fields.pop(key) for key in ("level", "time", "scope", "message"))
        again = {"level": level, "time": time, "scope": scope, "message": message, **fields}
        assert line == json.dumps(again, separators=(",", ":"))
        front, _, rest = scope.partition("::")
        if scope != "access":
            return Line(level=level, scope=rest, message=message, fields=fields, front=front)
    else:
        time, level, scope, message, text = line.split("\t")
        fields = {name: _value(value) for name, value in _PAIR.findall(text)}
        again = " ".join(f"{name}={_written(name, value)}" for name, value in fields.items())
        assert line == f"{time}\t{level}\t{scope}\t{message}\t{again}"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", time)
    return Line(level=level, scope=scope, message=message, fields=fields)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _written(name: str, value: Any) -> str:
    return str(value) if name in _BARE else json.dumps(value)


def access_lines(node: str) -> list[str]:
    """The names of the connections of which a node has a line, in order."""
    return [connection.name for connection in CONNECTIONS[: None if node == "a" else 4]]


def _access_facts(node: str, lines: list[Line]) -> Iterator[tuple[str, dict[str, Any]]]:
    names = access_lines(node)
    names += [f"one more {number}" for number in range(1, len(lines) - len(names) + 1)]
    for name, line in zip(names, lines, strict=False):
        assert list(line.fields) == [name for name in ACCESS_FIELDS if name in line.fields]
        fields = line.fields | {"src.addr": re.sub(r":\d+$", ":*", line.fields["src.addr"])}
        if "duration" in fields:
            fields["duration"] = re.sub(r"^\d+", "*", fields["duration"])
        yield name, {"level": line.level, "scope": line.scope, "message": line.message, **fields}


def _log_facts(lines: list[Line]) -> Iterator[tuple[str, dict[str, Any]]]:
    seen: dict[str, int] = {}
    for line in lines:
        message = re.sub(r"\d+\.\d+ms", "*ms", line.message)
        name = message
        if message == "listener established":
            name = f"listener {line.fields['component']}"
        elif found := re.match(r"Task '(.*)' complete", message):
            name = f"task {found[1]}"
        elif message.startswith("running with config"):
            name, message = "running with config", "running with config: *"
        elif found := re.match(r"proxy to (\S+)", message):
            name = f"way to {found[1]}"
        seen[name] = seen.get(name, 0) + 1
        name = name if seen[name] == 1 else f"{name} ({seen[name]})"
        yield name, {"level": line.level, "scope": line.scope, "message": message, **line.fields}


def _front(lines: list[Line]) -> str:
    return " ".join(sorted({line.front for line in lines if line.front}))


# === metrics ===


def scrape(text: str) -> dict[str, Metric]:
    """The families of an OpenMetrics text, by name; the strictest parser that there is reads it."""
    return {family.name: family for family in openmetrics.text_string_to_metric_families(text)}


def plain_scrape(text: str) -> dict[str, Metric]:
    """The same of the older text format."""
    return {family.name: family for family in plain_families(text)}


def _metrics_facts(node: str, families: Mapping[str, Metric]) -> dict[str, Any]:
    there = recorded(node)["metrics"]
    facts = {}
    for name, family in families.items():
        exact = name.startswith("istio_")
        samples = [
            {**sample.labels, "value": int(sample.value) if exact else "*"}
            for sample in family.samples
            if exact or sample.name in (name, f"{name}_total", f"{name}_count")
        ]
        named = _named(samples, there[name]["samples"] if name in there else {})
        facts[name] = {"type": family.type, "help": family.documentation, "samples": named}
    return facts


def _named(samples: list[dict[str, Any]], there: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each under the name of the recorded one that it is most like."""
    left = dict(enumerate(samples))
    named: dict[str, dict[str, Any]] = {}
    distances = sorted(
        (len(set(sample.items()) ^ set(wanted.items())), name, index)
        for index, sample in left.items()
        for name, wanted in there.items()
    )
    for _, name, index in distances:
        if index in left and name not in named:
            named[name] = left.pop(index)
    for sample in left.values():
        labels = " ".join(f"{key}={value}" for key, value in sample.items() if key != "value")
        named[labels or "process"] = sample
    return named


# === /config_dump ===


def _dump_facts(said: Said) -> dict[str, Any]:
    dump = json.loads(said.dump)
    assert said.dump.strip() == json.dumps(dump, indent=2, sort_keys=True)
    for one in dump["certificates"]:
        for chain in ("certChain", "rootCerts"):
            one[chain] = [_certificate(certificate) for certificate in one[chain]]
    dump["config"]["illegalPorts"].sort()
    return {key: _renamed(value, said) for key, value in dump.items()}


def _renamed(value: Any, said: Said) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(one, said) for key, one in value.items()}
    if isinstance(value, list):
        return [_renamed(one, said) for one in value]
    if isinstance(value, str):
        return said.as_there(value)
    return said.ports.get(value, value) if type(value) is int else value


def _certificate_of(one: dict[str, str]) -> x509.Certificate:
    return x509.load_pem_x509_certificate(base64.b64decode(one["pem"]))


def _certificate(one: dict[str, str]) -> dict[str, Any]:
    """In place of the PEM, what is in it."""
    certificate = _certificate_of(one)
    assert int(one["serialNumber"]) == certificate.serial_number
    for key, moment in (
        ("validFrom", certificate.not_valid_before_utc),
        ("expirationTime", certificate.not_valid_after_utc),
    ):
        assert one[key] == f"{moment:%Y-%m-%dT%H:%M:%SZ}"
    names: list[str] = []
    issuers_key = False
    for extension in certificate.extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            names = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
        issuers_key |= isinstance(extension.value, x509.AuthorityKeyIdentifier)
    elliptic = isinstance(certificate.public_key(), EllipticCurvePublicKey)
    return {
        **{key: value if key == "pem" else "*" for key, value in one.items() if key != "pem"},
        "key": "EC" if elliptic else "RSA",
        "signature": "EC" if "ecdsa" in certificate.signature_algorithm_oid._name else "RSA",
        "subject": certificate.subject.rfc4514_string(),
        "names": names,
        "days": (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days,
        "names its issuer's key": issuers_key,
    }
