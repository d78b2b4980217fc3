"""Reading a mesh file: YAML (or JSON) into workloads, services and policies, and every fault with its place.

The file comes as a stream of entries. Each is checked, turned into a value and forgotten, so what is ever held is the
text, one entry, and the values: a large file costs little memory, and the thread that reads it can be interrupted at
any time.

A fault in an entry is that entry's. A fault in the YAML, or above the entries, is the whole file's, and then nothing
of it is to be used: a key ``workload:`` must not read as a mesh without workloads.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from hbone.errors import MeshConfigError, MeshFault
from hbone.mesh._snapshot import MeshSnapshot
from hbone.mesh._values import AuthorizationPolicy, NamespacedHostname, NetworkAddress, Scope, Service, Workload

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from hbone.mesh._file_yaml import Path, Place, RawEntry
    from hbone.mesh._values import GatewayAddress

__all__ = ["MAX_MESH_FILE", "BrokenEntry", "ParsedMesh", "load_mesh", "mesh_schema", "parse_mesh", "read_mesh_file"]

MAX_MESH_FILE: Final = 64 * 1024 * 1024
"""The largest mesh file that is read, in bytes: more than 100 000 workloads."""
MAX_FAULTS: Final = 1000
"""How many faults are told apart, and how many warnings."""
_ENTRIES_A_PAUSE: Final = 10
_SINGULAR: Final = {"workloads": "workload", "services": "service", "policies": "policy"}

_Key = TypeVar("_Key")
_Kept = TypeVar("_Kept")
_Value: TypeAlias = Workload | Service | AuthorizationPolicy
_Target: TypeAlias = "tuple[str, object]"


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenEntry:
    """An entry with a fault, and what it would have been, as far as it says so.

    Attributes:
        section: ``workloads``, ``services`` or ``policies``.
        position: how many good ones of its section are before it.
        uid: of a workload; empty when it says none.
        namespace: empty when it says none.
        name: of a workload or a policy, the host name of a service; empty when it says none.
    """

    section: str
    position: int
    uid: str = ""
    namespace: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedMesh:
    """What a mesh file says.

    Attributes:
        source: the file.
        workloads: the good ones, in the order of the file.
        services: the good ones, in the order of the file.
        policies: the good ones, in the order of the file.
        faults: what is wrong, in the order of the file.
        warnings: what is no fault but will hardly do what was meant, such as a name that nothing has.
        broken: the entries with faults. Of two with the same name the first counts, and what the second was meant to
            be is not known.
        readable: whether the file as a whole makes sense; if not, nothing of it is here but its faults.
    """

    source: str
    workloads: tuple[Workload, ...] = ()
    services: tuple[Service, ...] = ()
    policies: tuple[AuthorizationPolicy, ...] = ()
    faults: tuple[MeshFault, ...] = ()
    warnings: tuple[MeshFault, ...] = ()
    broken: tuple[BrokenEntry, ...] = ()
    readable: bool = True

    def check(self) -> None:
        """Insist that there are no faults.

        Raises:
            MeshConfigError: there are; it has all of them.
        """
        if self.faults:
            raise MeshConfigError(self.faults)

    def snapshot(self) -> MeshSnapshot:
        """A snapshot of what is good."""
        return MeshSnapshot.build(self.workloads, self.services, self.policies)

    def snapshot_after(self, previous: MeshSnapshot) -> MeshSnapshot:
        """The snapshot that follows `previous` when this is the file's new text.

        What is good is taken. A broken entry stays as it was in `previous`. When it cannot be told which one of
        `previous` a broken entry was, nothing of its section is removed. A file that is not readable changes nothing.

        Returns:
            a snapshot that shares with the previous one whatever is equal; the previous one when nothing changes.
        """
        if not self.readable:
            return previous
        broken: dict[str, list[BrokenEntry]] = {"workloads": [], "services": [], "policies": []}
        for entry in self.broken:
            broken[entry.section].append(entry)
        uids: dict[tuple[str, str], str] = {}
        if any(not entry.uid for entry in broken["workloads"]):
            uids = {(each.namespace, each.name): each.uid for each in previous.workloads.values()}
        return previous.replaced_by(
            _with_kept(
                {workload.uid: workload for workload in self.workloads},
                previous.workloads,
                [
                    (entry.position, entry.uid or uids.get((entry.namespace, entry.name), ""))
                    for entry in broken["workloads"]
                ],
            ),
            _with_kept(
                {service.key: service for service in self.services},
                previous.services,
                [(entry.position, NamespacedHostname(entry.namespace, entry.name)) for entry in broken["services"]],
            ),
            _with_kept(
                {policy.key: policy for policy in self.policies},
                previous.policies,
                [(entry.position, f"{entry.namespace}/{entry.name}") for entry in broken["policies"]],
            ),
        )


def _with_kept(
    good: dict[_Key, _Kept], previous: Mapping[_Key, _Kept], broken: Sequence[tuple[int, _Key]]
) -> list[_Kept]:
    """What is good, and of what was before what has to stay.

    Args:
        good: by key, in the order of the file.
        previous: what was before.
        broken: for each broken entry how many good ones are before it, and its key as far as one can tell.
    """
    found = list(good.values())
    kept = {key for _, key in broken if key in previous and key not in good}
    unknown = any(key not in previous for _, key in broken)
    for position, key in reversed(broken):  # from the end, so that positions stay true
        if key in kept:
            kept.remove(key)
            found.insert(position, previous[key])
    if unknown:
        there = good.keys() | {key for _, key in broken}
        found += [value for key, value in previous.items() if key not in there]
    return found


def load_mesh(path: str | os.PathLike[str]) -> ParsedMesh:
    """Read a mesh file that has to be right. Blocks while it does.

    Raises:
        MeshConfigError: it cannot be read, or something is wrong in it; has every fault.
    """
    data = read_mesh_file(path)
    parsed = parse_mesh(data, source=str(path))
    parsed.check()
    return parsed


def read_mesh_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a mesh file. Blocks while it reads.

    Raises:
        MeshConfigError: it cannot be read, or is larger than `MAX_MESH_FILE`.
    """
    try:
        with pathlib.Path(path).open("rb") as file:
            data = file.read(MAX_MESH_FILE + 1)
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        why = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
        raise MeshConfigError([MeshFault(source=str(path), message=f"cannot be read: {why.lower()}")]) from None
    if len(data) > MAX_MESH_FILE:
        raise MeshConfigError([_too_large(str(path))])
    return data


def parse_mesh(
    text: str | bytes,
    *,
    source: str = "<mesh>",
    previous: MeshSnapshot | None = None,
    pause: Callable[[], object] | None = None,
) -> ParsedMesh:
    """Read the text of a mesh file: YAML, or JSON, which is YAML too. Never raises for what is in it.

    Args:
        text: the text; bytes are UTF-8, or UTF-16 with a byte order mark.
        source: what the faults call it: the file.
        previous: what equals something in it is the same object then, so that a large file that changed a little
            leaves little behind.
        pause: called about every millisecond of work. In a thread beside an event loop let it sleep a moment, to give
            the loop the interpreter.
    """
    try:
        data = text.encode() if isinstance(text, str) else text
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            data = data.decode("utf-16").encode()
    except UnicodeError as problem:
        fault = MeshFault(source=source, message=f"expected a text in UTF-8: {problem}")
        return ParsedMesh(source=source, faults=(fault,), readable=False)
    if len(data) > MAX_MESH_FILE:
        return ParsedMesh(source=source, faults=(_too_large(source),), readable=False)
    return _Parser(source, previous or MeshSnapshot(), pause).parse(data)


def _too_large(source: str) -> MeshFault:
    return MeshFault(source=source, message=f"expected a file of at most {MAX_MESH_FILE // 1024 // 1024} MiB")


def mesh_schema() -> dict[str, Any]:
    """What may be in a mesh file, as a JSON schema (draft 2020-12), for editors."""
    from hbone.mesh._file_model import schema

    return schema()


@dataclass(frozen=True, slots=True)
class _Reference:
    """The first time that something is named."""

    place: Place
    path: str
    message: str


class _Faults:
    """What is wrong, as far as there is room."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._found: list[MeshFault] = []
        self._more = 0

    def add(self, place: Place, path: str, message: str) -> None:
        if len(self._found) >= MAX_FAULTS:
            self._more += 1
            return
        line, column = place
        self._found.append(MeshFault(source=self._source, line=line, column=column, path=path, message=message))

    def result(self) -> tuple[MeshFault, ...]:
        found = sorted(self._found, key=lambda fault: (fault.line, fault.column))
        if self._more:
            found.append(MeshFault(source=self._source, message=f"and {self._more} more"))
        return tuple(found)


class _Parser:
    """One reading of one file."""

    def __init__(self, source: str, previous: MeshSnapshot, pause: Callable[[], object] | None) -> None:
        self._source = source
        self._previous: dict[str, Mapping[Any, Any]] = {
            "workloads": previous.workloads,
            "services": previous.services,
            "policies": previous.policies,
        }
        self._pause = pause
        self._faults = _Faults(source)
        self._warnings = _Faults(source)
        self._broken: list[BrokenEntry] = []
        self._workloads: dict[str, Workload] = {}
        self._services: dict[NamespacedHostname, Service] = {}
        self._policies: dict[str, AuthorizationPolicy] = {}
        self._found: dict[str, dict[Any, Any]] = {
            "workloads": self._workloads,
            "services": self._services,
            "policies": self._policies,
        }
        self._lines: dict[tuple[str, object], int] = {}
        self._references: dict[_Target, _Reference] = {}
        self._unselected: dict[str, _Reference] = {}

    def parse(self, data: bytes) -> ParsedMesh:
        from hbone.mesh._file_yaml import Unreadable, entries_of

        readable = True
        for number, entry in enumerate(entries_of(data, tuple(self._found))):
            if self._pause is not None and number % _ENTRIES_A_PAUSE == 0:
                self._pause()
            if isinstance(entry, Unreadable):
                readable = False
                self._faults.add(entry.place, entry.path, entry.message)
            else:
                self._take(entry)
        if not readable:
            return ParsedMesh(source=self._source, faults=self._faults.result(), readable=False)
        self._look_for_references()
        return ParsedMesh(
            source=self._source,
            workloads=tuple(self._workloads.values()),
            services=tuple(self._services.values()),
            policies=tuple(self._policies.values()),
            faults=self._faults.result(),
            warnings=self._warnings.result(),
            broken=tuple(self._broken),
        )

    def _take(self, entry: RawEntry) -> None:
        from pydantic import ValidationError

        from hbone.mesh._file_model import ENTRIES, problems_of
        from hbone.mesh._file_yaml import Problem

        model = ENTRIES[entry.section]
        value: _Value | None = None
        problems = list(entry.problems)
        try:
            value = model.model_validate(entry.value).to_value(
                lambda path, message: problems.append(Problem(path, message))
            )
        except ValidationError as error:
            problems.extend(problems_of(error, model))
        for problem in problems:
            place = problem.place or entry.place(problem.path, key=problem.at_key)
            self._faults.add(place, entry.spell(problem.path), problem.message)
        found = self._found[entry.section]
        if value is None or problems:
            self._broken.append(_broken(entry, len(found)))
            return
        key = value.uid if isinstance(value, Workload) else value.key
        if key in found:
            first = self._lines[entry.section, key]
            message = f"expected each {_SINGULAR[entry.section]} once; {str(key)!r} is also in line {first}"
            self._faults.add(entry.place(), entry.spell(), message)
            self._broken.append(BrokenEntry(section=entry.section, position=len(found)))
            return
        old = self._previous[entry.section].get(key)
        found[key] = value = old if old == value else value
        self._lines[entry.section, key] = entry.place()[0]
        self._note_references(entry, value)

    # -------------------------------------------------------------------------------- what names what, and is not there

    def _note_references(self, entry: RawEntry, value: _Value) -> None:
        if isinstance(value, Workload):
            references = _references_of_workload(value)
            if not (value.addresses or value.hostname or value.network_gateway):
                message = "it has no address, no host name and no gateway, so nothing gets to it"
                self._warnings.add(entry.place(), entry.spell(), message)
        elif isinstance(value, Service):
            references = _references_of_service(value)
        else:
            references = iter(())
            if value.scope is Scope.WORKLOAD_SELECTOR:
                message = "no workload names it in authorizationPolicies, so it does nothing"
                self._unselected[value.key] = _Reference(entry.place(), entry.spell(), message)
        for target, path, message in references:
            if target not in self._references:
                self._references[target] = _Reference(entry.place(path), entry.spell(path), message)

    def _look_for_references(self) -> None:
        there: set[_Target] = {("service", key) for key in self._services}
        there |= {("policy", key) for key in self._policies}
        there |= {("workload", uid) for uid in self._workloads}
        for entry in self._broken:  # what is there but has a fault is not missing
            hostname = NamespacedHostname(entry.namespace, entry.name)
            there |= {("workload", entry.uid), ("policy", str(hostname)), ("service", hostname), ("gateway", hostname)}
        for service in self._services.values():
            there.add(("gateway", service.key))
            there |= {("gateway", vip) for vip in service.vips}
        for workload in self._workloads.values():
            if workload.hostname:
                there.add(("gateway", NamespacedHostname(workload.namespace, workload.hostname)))
        # Addresses are many, and gateways that are named by them few.
        by_address = {target[1] for target in self._references if isinstance(target[1], NetworkAddress)} - there
        if by_address:
            for workload in self._workloads.values():
                there |= {("gateway", NetworkAddress(workload.network, ip)) for ip in workload.addresses}
        missing = [reference for target, reference in self._references.items() if target not in there]
        selected = {("policy", key) for key in self._unselected} & self._references.keys()
        missing += [each for key, each in self._unselected.items() if ("policy", key) not in selected]
        for reference in missing:
            self._warnings.add(reference.place, reference.path, reference.message)


def _references_of_workload(workload: Workload) -> Iterator[tuple[_Target, Path, str]]:
    for key in workload.services:
        message = f"there is no service {key} in this file, so nothing gets to the workload by it"
        yield ("service", key), ("services", str(key)), message
    for index, name in enumerate(workload.authorization_policies):
        yield ("policy", name), ("authorizationPolicies", index), f"there is no policy {name} in this file"
    if workload.waypoint is not None:
        yield _gateway(workload.waypoint, "waypoint")
    if workload.network_gateway is not None:
        yield _gateway(workload.network_gateway, "networkGateway")


def _references_of_service(service: Service) -> Iterator[tuple[_Target, Path, str]]:
    for uid in service.endpoints:
        yield ("workload", uid), ("endpoints", uid), f"there is no workload {uid} in this file"
    if service.waypoint is not None:
        yield _gateway(service.waypoint, "waypoint")
    for index, weighted in enumerate(service.weighted_waypoints):
        yield _gateway(weighted.destination, "weightedWaypoints", index, "destination")


def _gateway(gateway: GatewayAddress, *path: str | int) -> tuple[_Target, Path, str]:
    destination = gateway.destination
    message = f"there is no service or workload {destination} in this file, so what has to go by it fails"
    return ("gateway", destination), (*path, "destination"), message


def _broken(entry: RawEntry, position: int) -> BrokenEntry:
    # With a key twice it may be two entries that ran together.
    said = entry.value if isinstance(entry.value, dict) and not entry.problems else {}

    def text(key: str) -> str:
        value = said.get(key)
        return value if isinstance(value, str) else ""

    name = text("hostname").lower().removesuffix(".") if entry.section == "services" else text("name")
    return BrokenEntry(
        section=entry.section, position=position, uid=text("uid"), namespace=text("namespace"), name=name
    )
