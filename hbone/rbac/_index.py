"""Many policies at once: an evaluation takes as long for the worst of policies as for the best.

Theory of operation. Every match of every policy has a position in one row of bits, a Python integer. Each field has an
index from what policies may say about it (an exact text, a prefix, a network, ...) to the positions that say so. For a
flow, a field's index tells which positions it hits; positions that want the field and are not hit, and positions that
do not want it and are hit, are dead. What no field has killed has matched: at most two operations on whole rows a
field, however many matches there are, and whether a few of them hit or all.

From matches to policies by carries. The positions of a policy lie together, with one more above them, its guard:

        guard  matches            guard  matches
          0    0 1 0 0              0    0 0 0        what has matched
    +          1 1 1 1                   1 1 1        ones below each guard
    =     1    0 0 1 1              0    1 1 1        the guard tells whether any has

A sum never reaches beyond its guard, so one addition does this for all policies. Rules of several clauses, which all
have to hold, lie inside their policy in the same way, with guards of their own: one addition tells which clauses of
several matches hold, another one, over the clauses that do not, which rules fail.

Policies and clauses that are decided by their form alone (see `hbone.rbac._evaluate`) have no positions: they are
settled when the index is made.
"""

from __future__ import annotations

import sys
from array import array
from itertools import compress
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, TypeAlias, final

from hbone.mesh import Action, StringMatchKind
from hbone.rbac._evaluate import canonical_network, source_of
from hbone.rbac._values import DryRunMatch, PolicyFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
    from ipaddress import IPv4Network, IPv6Network

    from hbone.mesh import AuthorizationPolicy, Clause, Match, Rule, StringMatch
    from hbone.rbac._values import Flow, IPAddress

__all__ = ["Facts", "PolicyIndex", "facts_of"]

Facts: TypeAlias = tuple[Any, ...]
"""What fields compare, in the order of `_FIELDS`."""

# Between two chances to pause: about a millisecond.
_CHUNK: Final = 200
_ROW_CHUNK: Final = 5000

_ROW_PER_PACKED: Final = 32


def facts_of(flow: Flow) -> Facts:
    """What of a flow the fields compare."""
    source = source_of(flow.source_identity)
    return (
        source.namespace,
        source.service_account,
        source.principal,
        flow.source_ip,
        flow.destination_ip,
        flow.destination_port,
    )


def _row(positions: Iterable[int], size: int) -> int:
    """A row of bits with these set, ``size`` bytes long."""
    row = bytearray(size)
    for position in positions:
        row[position >> 3] |= 1 << (position & 7)
    return int.from_bytes(row, "little")


def _row_in_steps(positions: Sequence[int], size: int) -> Generator[None, None, int]:
    """`_row` for many."""
    row = 0
    for start in range(0, len(positions), _ROW_CHUNK):
        row |= _row(positions[start : start + _ROW_CHUNK], size)
        yield
    return row


def _row_of_all(positions: list[int], size: int) -> Generator[None, None, int]:
    """`_row_in_steps` of a list that is not needed after that: to free a long one at once takes long, too."""
    row = 0
    while positions:
        row |= _row(positions[-_ROW_CHUNK:], size)
        del positions[-_ROW_CHUNK:]
        yield
    return row


_BYTES: Final = array("I").itemsize


def _packed(position: int) -> bytes:
    return position.to_bytes(_BYTES, sys.byteorder)


def _unpacked(positions: bytes | bytearray) -> memoryview:
    return memoryview(positions).cast("I")


class _Postings:
    """Positions by value, compact: where there are many as a row of bits, else as a packed array.

    A row costs memory whatever is in it, an array costs time for each position. Rows only from where the array would
    have 1/32 of its size keep both within bounds: there are no more positions in all than policies have values.
    """

    __slots__ = ("_found", "_size")

    def __init__(self) -> None:
        # While it grows: a position or packed positions, but no lists: so many would make the garbage collector run
        # over everything there is. Then what `get` returns.
        self._found: dict[Any, Any] = {}
        self._size = 0

    def add(self, value: object, position: int) -> None:
        found = self._found.setdefault(value, position)
        if found == position:
            return
        if isinstance(found, int):
            self._found[value] = found = bytearray(_packed(found))
        found += _packed(position)

    def finish(self, size: int) -> Iterator[None]:
        """From what is easy to add to, to what is quick to ask."""
        self._size = size
        found = self._found
        work = 0
        for value, grown in found.items():
            packed = _packed(grown) if isinstance(grown, int) else grown
            if len(packed) * _ROW_PER_PACKED >= size:
                found[value] = yield from _row_in_steps(_unpacked(packed), size)
            else:
                found[value] = bytes(packed)
                work += 10
                if work >= _ROW_CHUNK:
                    work = 0
                    yield

    def get(self, value: object) -> int | bytes:
        """A row or packed positions."""
        hit: int | bytes = self._found.get(value, 0)
        return hit

    def merge(self, hits: Iterable[int | bytes]) -> int:
        """One row of what several values have hit."""
        row = 0
        packed = b""
        for hit in hits:
            if isinstance(hit, int):
                row |= hit
            else:
                packed += hit
        if not packed:
            return row
        positions = _unpacked(packed)
        if len(positions) > 2:
            return row | _row(positions, self._size)
        for position in positions:
            row |= 1 << position
        return row


class _Exact:
    """Values that are compared as they are."""

    __slots__ = ("_postings",)

    def __init__(self) -> None:
        self._postings = _Postings()

    def add(self, value: object, position: int) -> None:
        self._postings.add(value, position)

    def finish(self, size: int) -> Iterator[None]:
        return self._postings.finish(size)

    def hits(self, value: object) -> int:
        postings = self._postings
        found = postings.get(value)
        return found if isinstance(found, int) else postings.merge((found,))


class _Texts:
    """Patterns for a text."""

    __slots__ = ("_exact", "_prefix", "_prefix_lengths", "_presence", "_suffix", "_suffix_lengths")

    def __init__(self) -> None:
        self._exact = _Postings()
        self._prefix = _Postings()
        self._suffix = _Postings()
        self._presence = _Postings()
        self._prefix_lengths: set[int] = set()
        self._suffix_lengths: set[int] = set()

    def add(self, pattern: StringMatch, position: int) -> None:
        kind, value = pattern.kind, pattern.value
        if kind is StringMatchKind.EXACT:
            self._exact.add(value, position)
        elif kind is StringMatchKind.PREFIX:
            self._prefix.add(value, position)
            self._prefix_lengths.add(len(value))
        elif kind is StringMatchKind.SUFFIX:
            self._suffix.add(value, position)
            self._suffix_lengths.add(len(value))
        else:
            self._presence.add(True, position)

    def finish(self, size: int) -> Iterator[None]:
        for postings in (self._exact, self._prefix, self._suffix, self._presence):
            yield from postings.finish(size)

    def hits(self, text: str | None) -> int:
        if text is None:
            return 0
        whole = len(text)
        found = [self._exact.get(text)]
        if text:
            found.append(self._presence.get(True))
        found += [self._prefix.get(text[:length]) for length in self._prefix_lengths if length <= whole]
        found += [self._suffix.get(text[whole - length :]) for length in self._suffix_lengths if length <= whole]
        return self._exact.merge(found)


class _Networks:
    """Ranges of addresses, by version and prefix length."""

    __slots__ = ("_any", "_by_length")

    def __init__(self) -> None:
        self._by_length: dict[int, dict[int, _Postings]] = {4: {}, 6: {}}
        self._any = _Postings()

    def add(self, network: IPv4Network | IPv6Network, position: int) -> None:
        network = canonical_network(network)
        shift = network.max_prefixlen - network.prefixlen
        postings = self._by_length[network.version].get(shift)
        if postings is None:
            postings = self._by_length[network.version][shift] = _Postings()
        postings.add(int(network.network_address) >> shift, position)

    def finish(self, size: int) -> Iterator[None]:
        yield from self._any.finish(size)
        for lengths in self._by_length.values():
            for postings in lengths.values():
                yield from postings.finish(size)

    def hits(self, ip: IPAddress) -> int:
        number = int(ip)
        by_length = self._by_length[ip.version].items()
        return self._any.merge([postings.get(number >> shift) for shift, postings in by_length])


_FIELDS: Final[tuple[tuple[str, type[_Exact | _Texts | _Networks]], ...]] = (
    ("namespaces", _Texts),
    ("service_accounts", _Exact),
    ("principals", _Texts),
    ("source_ips", _Networks),
    ("destination_ips", _Networks),
    ("destination_ports", _Exact),
)

_constraints: Final = attrgetter(*(prefix + name for name, _ in _FIELDS for prefix in ("", "not_")))


class _Builder:
    """Gives positions to matches, one policy after the other."""

    def __init__(self) -> None:
        self.position = 0
        self.since_pause = 0
        self.indexes: list[Any] = [None for _ in _FIELDS for _ in range(2)]
        """Of each field, of each field's negation, where there is any."""
        # Lists of positions. A range is given by its first position and by its guard, the one after its last.
        self.wanting: list[list[int]] = [[] for _ in _FIELDS]
        self.matches: list[int] = []
        self.simple: list[int] = []
        self.single: list[int] = []
        self.clause_starts: list[int] = []
        self.clause_guards: list[int] = []
        self.rule_starts: list[int] = []
        self.rule_guards: list[int] = []
        self.policy_starts: list[int] = []
        self.policy_guards: list[int] = []
        self.keys: dict[int, str] = {}
        self.always: list[int] = []
        self.classes: dict[tuple[Action, bool], list[int]] = {(act, dry): [] for act in Action for dry in (False, True)}

    def _next(self) -> int:
        position = self.position
        self.position += 1
        return position

    def _place(self, match: Match) -> int:
        position = self._next()
        self.matches.append(position)
        for number, values in enumerate(_constraints(match)):
            if not values:
                continue
            index = self.indexes[number]
            if index is None:
                index = self.indexes[number] = _FIELDS[number >> 1][1]()
            if not number & 1:
                self.wanting[number >> 1].append(position)
            add = index.add
            for value in values:
                add(value, position)
            self.since_pause += len(values)
        return position

    def place(self, key: str, policy: AuthorizationPolicy) -> Iterator[None]:
        """Give positions to a policy: its guard is the last one."""
        rules = _undecided(policy.rules)
        start = self.position
        for rule in rules or ():
            if len(rule) == 1:
                for match in rule[0]:
                    self.simple.append(self._place(match))
                    if self.since_pause >= _CHUNK:
                        self.since_pause = 0
                        yield
                continue
            self.rule_starts.append(self.position)
            for clause in rule:
                if len(clause) == 1:
                    self.single.append(self._place(clause[0]))
                else:
                    self.clause_starts.append(self.position)
                    for match in clause:
                        self._place(match)
                        if self.since_pause >= _CHUNK:
                            self.since_pause = 0
                            yield
                    self.clause_guards.append(self._next())
            self.rule_guards.append(self._next())
        guard = self._next()
        self.policy_starts.append(start)
        self.policy_guards.append(guard)
        self.keys[guard] = key
        if rules is None:
            self.always.append(guard)
        self.classes[policy.action, policy.dry_run].append(guard)
        self.since_pause += 1
        if self.since_pause >= _CHUNK:
            self.since_pause = 0
            yield


def _undecided(rules: tuple[Rule, ...]) -> list[list[Clause]] | None:
    """Rules of clauses of matches that a flow has to be asked for; None when the rules match whatever comes.

    A clause that is left without matches never holds: its range is empty.
    """
    found = []
    for rule in rules:
        clauses = [tuple(match for match in clause if any(_constraints(match))) for clause in rule if clause]
        if not clauses:
            return None
        found.append(clauses)
    return found


_TRUTH: Final = bytes.maketrans(b"01", b"\0\1")


@final
class PolicyIndex:
    """Some policies, ready to be asked all at once. Never changes; made by `build`.

    Attributes:
        policies: with their keys, in the order of these.
        has_allow: whether an enforced ALLOW policy is among them.
    """

    policies: tuple[tuple[str, AuthorizationPolicy], ...]
    has_allow: bool

    # By number of the field: what its index hits, and which positions want it.
    _wanted: list[tuple[int, Callable[[Any], int], int]]
    _unwanted: list[tuple[int, Callable[[Any], int]]]

    _matches: int
    _simple: int
    """Matches that are a rule: they belong to their policy directly."""
    _single: int
    """Matches that are a clause."""
    _heads: int
    """What stands for a clause: its guard, or the one match that it is."""
    _clause_guards: int
    _clause_lows: int
    _rule_guards: int
    _rule_lows: int
    _policy_guards: int
    _policy_lows: int
    _end: int
    """One bit above all others."""
    _always: int
    """Guards of policies that match whatever comes."""
    _classes: dict[tuple[Action, bool], int]
    """Guards by action and by dry run."""
    _keys: dict[int, str]
    """Of policies, by guard."""
    _dry_runs: dict[Action, tuple[list[int], list[DryRunMatch]]]
    """Guards of dry-run policies, and what there is to say when they match."""

    @classmethod
    def build(cls, policies: tuple[tuple[str, AuthorizationPolicy], ...]) -> Generator[None, None, PolicyIndex]:
        """Make one of policies and their keys, which are in order. Yields about every millisecond.

        Raises:
            PolicyFailed: one of them cannot be made sense of.
        """
        builder = _Builder()
        for key, policy in policies:
            try:
                yield from builder.place(key, policy)
            except Exception as exc:
                raise PolicyFailed(key, repr(exc)) from exc
        size = builder.position // 8 + 1
        self = cls()
        self.policies = policies
        self._end = 1 << builder.position
        self.has_allow = bool(builder.classes[Action.ALLOW, False])
        self._wanted = []
        self._unwanted = []
        for number, index in enumerate(builder.indexes):
            if index is None:
                continue
            yield from index.finish(size)
            field = number >> 1
            if number & 1:
                self._unwanted.append((field, index.hits))
            else:
                self._wanted.append((field, index.hits, (yield from _row_of_all(builder.wanting[field], size))))
        self._keys = builder.keys
        self._dry_runs = {
            action: (guards, [DryRunMatch(builder.keys[guard], action) for guard in guards])
            for action in Action
            if (guards := list(builder.classes[action, True]))
        }
        yield
        self._classes = {}
        for which, guards in builder.classes.items():
            self._classes[which] = yield from _row_of_all(guards, size)
        self._matches = yield from _row_of_all(builder.matches, size)
        self._simple = yield from _row_of_all(builder.simple, size)
        self._single = yield from _row_of_all(builder.single, size)
        # Of all ranges together: 2**guard - 2**start is ones from start to below guard.
        self._clause_guards = yield from _row_of_all(builder.clause_guards, size)
        self._clause_lows = self._clause_guards - (yield from _row_of_all(builder.clause_starts, size))
        self._heads = self._clause_guards | self._single
        self._rule_guards = yield from _row_of_all(builder.rule_guards, size)
        self._rule_lows = self._rule_guards - (yield from _row_of_all(builder.rule_starts, size))
        self._policy_guards = yield from _row_of_all(builder.policy_guards, size)
        self._policy_lows = self._policy_guards - (yield from _row_of_all(builder.policy_starts, size))
        self._always = yield from _row_of_all(builder.always, size)
        return self

    def matched(self, facts: Facts) -> int:
        """The guards of the policies that match, to be asked about with the methods below."""
        dead = 0
        for number, hits, constrained in self._wanted:
            dead |= constrained ^ hits(facts[number])
        for number, hits in self._unwanted:
            dead |= hits(facts[number])
        alive = self._matches ^ dead
        holding = alive & self._simple
        if self._rule_guards:
            lows = self._clause_lows
            clauses = (((alive & lows) + lows) & self._clause_guards) | (alive & self._single)
            failing = self._heads ^ clauses
            guards = self._rule_guards
            holding |= guards ^ ((failing + self._rule_lows) & guards)
        return ((holding + self._policy_lows) & self._policy_guards) | self._always

    def first(self, matched: int, action: Action) -> str | None:
        """The first enforced policy with an action among those."""
        guards = matched & self._classes[action, False]
        return self._keys[(guards & -guards).bit_length() - 1] if guards else None

    def dry_run(self, matched: int, action: Action) -> tuple[DryRunMatch, ...]:
        """All dry-run policies with an action among those."""
        guards = matched & self._classes[action, True]
        if not guards:
            return ()
        at, matches = self._dry_runs[action]
        bits = bin(guards | self._end)[:1:-1].encode().translate(_TRUTH)
        return tuple(compress(matches, map(bits.__getitem__, at)))
