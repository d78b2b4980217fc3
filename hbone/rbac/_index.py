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

from array import array
from typing import TYPE_CHECKING, Any, Final, TypeAlias, final

from hbone.mesh import Action, StringMatchKind
from hbone.rbac._evaluate import canonical_network, is_void, source_of
from hbone.rbac._values import DryRunMatch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from ipaddress import IPv4Network, IPv6Network

    from hbone.mesh import AuthorizationPolicy, Clause, Match, Rule, StringMatch
    from hbone.rbac._values import Flow, IPAddress

__all__ = ["Facts", "PolicyIndex", "facts_of"]

Facts: TypeAlias = tuple[Any, ...]
"""What fields compare, in the order of `_FIELDS`."""

# Between two chances to pause: about a millisecond.
_CHUNK: Final = 200
_ROW_CHUNK: Final = 5000


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


def _row_in_steps(positions: list[int], size: int) -> Generator[None, None, int]:
    """`_row` for many."""
    row = 0
    for start in range(0, len(positions), _ROW_CHUNK):
        row |= _row(positions[start : start + _ROW_CHUNK], size)
        yield
    return row


class _Postings:
    """Positions by value, compact: where there are many as a row of bits, else as a packed array.

    A row costs memory whatever is in it, an array costs time for each position: a row from 1/64 of its bytes on keeps
    both within bounds, since positions of all values together are as many as policies have values.
    """

    __slots__ = ("_found", "_size")

    def __init__(self) -> None:
        # While it grows: a position or a list of them. Then what `get` returns.
        self._found: dict[Any, Any] = {}
        self._size = 0

    def add(self, value: object, position: int) -> None:
        found = self._found.setdefault(value, position)
        if found == position:
            return
        if isinstance(found, int):
            self._found[value] = [found, position]
        else:
            found.append(position)

    def finish(self, size: int) -> Iterator[None]:
        """From what is easy to add to, to what is quick to ask."""
        self._size = size
        found = self._found
        work = 0
        for value, positions in found.items():
            listed = [positions] if isinstance(positions, int) else positions
            if len(listed) * 64 >= size:
                found[value] = yield from _row_in_steps(listed, size)
            else:
                found[value] = array("I", listed).tobytes()
                work += 4 + len(listed)
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
        sparse = b""
        for hit in hits:
            if isinstance(hit, int):
                row |= hit
            else:
                sparse += hit
        if not sparse:
            return row
        positions = memoryview(sparse).cast("I")
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
        match pattern.kind:
            case StringMatchKind.EXACT:
                self._exact.add(pattern.value, position)
            case StringMatchKind.PREFIX:
                self._prefix.add(pattern.value, position)
                self._prefix_lengths.add(len(pattern.value))
            case StringMatchKind.SUFFIX:
                self._suffix.add(pattern.value, position)
                self._suffix_lengths.add(len(pattern.value))
            case StringMatchKind.PRESENCE:
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


class _Builder:
    """Gives positions to matches, one policy after the other."""

    def __init__(self) -> None:
        self.position = 0
        self.since_pause = 0
        self.wanted: list[Any] = [made() for _, made in _FIELDS]
        self.unwanted: list[Any] = [made() for _, made in _FIELDS]
        # Lists of positions. A range is given by its first position and by its guard, the one after its last.
        self.wanting: list[list[int]] = [[] for _ in _FIELDS]
        self.not_wanting: list[bool] = [False for _ in _FIELDS]
        self.matches: list[int] = []
        self.simple: list[int] = []
        self.single: list[int] = []
        self.clause_starts: list[int] = []
        self.clause_guards: list[int] = []
        self.rule_starts: list[int] = []
        self.rule_guards: list[int] = []
        self.policy_starts: list[int] = []
        self.policy_guards: list[int] = []
        self.always: list[int] = []
        self.classes: dict[tuple[Action, bool], list[int]] = {(act, dry): [] for act in Action for dry in (False, True)}

    def _next(self) -> int:
        position = self.position
        self.position += 1
        return position

    def _place(self, match: Match) -> int:
        position = self._next()
        self.matches.append(position)
        for number, (name, _) in enumerate(_FIELDS):
            if values := getattr(match, name):
                self.wanting[number].append(position)
                add = self.wanted[number].add
                for value in values:
                    add(value, position)
                self.since_pause += len(values)
            if values := getattr(match, _NOT[number]):
                self.not_wanting[number] = True
                add = self.unwanted[number].add
                for value in values:
                    add(value, position)
                self.since_pause += len(values)
        return position

    def place(self, policy: AuthorizationPolicy) -> Iterator[None]:
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
        if rules is None:
            self.always.append(guard)
        self.classes[policy.action, policy.dry_run].append(guard)
        self.since_pause += 1
        if self.since_pause >= _CHUNK:
            self.since_pause = 0
            yield


_NOT: Final = tuple(f"not_{name}" for name, _ in _FIELDS)


def _undecided(rules: tuple[Rule, ...]) -> list[list[Clause]] | None:
    """What a flow has to be asked for: rules of clauses of matches, all of them with something in them.

    None when the rules match whatever comes.
    """
    found = []
    for rule in rules:
        clauses = [tuple(match for match in clause if not is_void(match)) for clause in rule if clause]
        if not clauses:
            return None
        if all(clauses):
            found.append(clauses)
    return found


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
    _always: int
    """Guards of policies that match whatever comes."""
    _classes: dict[tuple[Action, bool], int]
    """Guards by action and by dry run."""
    _keys: dict[int, str]
    """Keys of enforced policies, by guard."""
    _dry_runs: dict[int, DryRunMatch]
    """What there is to say of the others."""

    @classmethod
    def build(cls, policies: tuple[tuple[str, AuthorizationPolicy], ...]) -> Generator[None, None, PolicyIndex]:
        """Make one of policies and their keys, which are in order. Yields about every millisecond."""
        builder = _Builder()
        for _, policy in policies:
            yield from builder.place(policy)
        size = builder.position // 8 + 1
        self = cls()
        self.policies = policies
        self.has_allow = bool(builder.classes[Action.ALLOW, False])
        self._wanted = []
        self._unwanted = []
        for number in range(len(_FIELDS)):
            if builder.wanting[number]:
                index = builder.wanted[number]
                yield from index.finish(size)
                self._wanted.append((number, index.hits, (yield from _row_in_steps(builder.wanting[number], size))))
            if builder.not_wanting[number]:
                index = builder.unwanted[number]
                yield from index.finish(size)
                self._unwanted.append((number, index.hits))
        self._matches = yield from _row_in_steps(builder.matches, size)
        self._simple = yield from _row_in_steps(builder.simple, size)
        self._single = yield from _row_in_steps(builder.single, size)
        # Of all ranges together: 2**guard - 2**start is ones from start to below guard.
        self._clause_guards = yield from _row_in_steps(builder.clause_guards, size)
        self._clause_lows = self._clause_guards - (yield from _row_in_steps(builder.clause_starts, size))
        self._heads = self._clause_guards | self._single
        self._rule_guards = yield from _row_in_steps(builder.rule_guards, size)
        self._rule_lows = self._rule_guards - (yield from _row_in_steps(builder.rule_starts, size))
        self._policy_guards = yield from _row_in_steps(builder.policy_guards, size)
        self._policy_lows = self._policy_guards - (yield from _row_in_steps(builder.policy_starts, size))
        self._always = yield from _row_in_steps(builder.always, size)
        self._classes = {}
        for which, guards in builder.classes.items():
            self._classes[which] = yield from _row_in_steps(guards, size)
        self._keys = {}
        self._dry_runs = {}
        for guard, (key, policy) in zip(builder.policy_guards, policies, strict=True):
            if policy.dry_run:
                self._dry_runs[guard] = DryRunMatch(key, policy.action)
            else:
                self._keys[guard] = key
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
        return tuple(map(self._dry_runs.__getitem__, _positions(guards))) if guards else ()


def _positions(row: int) -> Iterator[int]:
    """The bits that are set, lowest first, in linear time."""
    text = bin(row)[:1:-1]
    at = text.find("1")
    while at >= 0:
        yield at
        at = text.find("1", at + 1)
