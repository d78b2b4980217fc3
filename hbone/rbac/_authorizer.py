"""The same decisions, many of them: policies are prepared once and asked often."""

from __future__ import annotations

from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from hbone.mesh import Action, Scope
from hbone.rbac._evaluate import NO_ALLOW, NONE_ALLOWED
from hbone.rbac._index import PolicyIndex, facts_of
from hbone.rbac._values import DryRunMatch, PolicyFailed, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping

    from hbone.mesh import AuthorizationPolicy, Workload
    from hbone.rbac._values import Flow, HasPolicies

__all__ = ["Authorizer"]

_Keyed: TypeAlias = "tuple[tuple[str, AuthorizationPolicy], ...]"
_T = TypeVar("_T")

_NOTHING: Final[Mapping[Any, Any]] = MappingProxyType({})

_CHUNK: Final = 2000
_MAX_REMEMBERED: Final = 4096
"""Workloads that are asked about; more than a node has."""


class Authorizer:
    """Decides as `authorize` does, and remembers what it has worked out while the policies are the same object.

    One evaluation takes a few microseconds with a few policies, and a fraction of a millisecond with a hundred thousand
    rules. To work that out takes a second for so many; it is done when it is first needed, or ahead by `prepare`.

    Belongs to one thread, but for `prepare`.
    """

    def __init__(self) -> None:
        self._current = _Prepared({})
        self._coming: _Prepared | None = None

    def authorize(self, snapshot: HasPolicies, workload: Workload, flow: Flow) -> Verdict:
        """Whether a flow may pass to a workload.

        Args:
            snapshot: the mesh.
            workload: the destination.
            flow: the connection.

        Raises:
            PolicyFailed: a policy that the workload is subject to cannot be made sense of: let nobody in. What is for
                other workloads is not touched by that.
        """
        prepared = self._current
        if prepared.policies is not snapshot.policies:
            coming = self._coming
            if coming is not None and coming.policies is snapshot.policies:
                prepared = coming
                self._coming = None
            else:
                prepared = prepared.after(snapshot.policies)
            self._current = prepared
        parts = prepared.known(workload)
        if parts is None:
            parts = _all_of(prepared.parts(workload))
        return _decide(parts, flow) if parts else NO_ALLOW

    def prepare(
        self,
        snapshot: HasPolicies,
        workloads: Iterable[Workload] | None = None,
        *,
        pause: Callable[[], object] | None = None,
    ) -> None:
        """Work out ahead what `authorize` will need of a snapshot that is not in force yet; safe in another thread.

        What did not change since the last policies is taken over, in groups: the global policies, those of each
        namespace, those that workloads select.

        Args:
            snapshot: the mesh to come.
            workloads: the destinations that will be asked about. None: of every namespace, without the policies that
                workloads select one by one.
            pause: called about every millisecond of work. In a thread beside an event loop let it sleep a moment, to
                give the loop the interpreter.

        Raises:
            PolicyFailed: see `authorize`, which will say the same.
        """
        current, coming = self._current, self._coming
        if snapshot.policies is current.policies:
            prepared = current
        elif coming is not None and snapshot.policies is coming.policies:
            prepared = coming
        else:
            prepared = current.after(snapshot.policies)
        try:
            for _ in prepared.everything() if workloads is None else prepared.everything_for(workloads):
                if pause is not None:
                    pause()
        finally:
            if prepared is not current:
                self._coming = prepared


class _Prepared:
    """What is worked out of one collection of policies.

    Args:
        policies: the collection.
        indexes: of the policies before, by namespace.
        selected: of the policies before, by names.
    """

    def __init__(
        self,
        policies: Mapping[str, AuthorizationPolicy],
        indexes: Mapping[str | None, PolicyIndex] = _NOTHING,
        selected: Mapping[tuple[str, ...], PolicyIndex] = _NOTHING,
    ) -> None:
        self.policies = policies
        self._by_namespace: dict[str | None, _Keyed] | None = None
        """Policies by the namespace that they are in force for; None: for all."""
        self._indexes: dict[str | None, PolicyIndex] = {}
        self._selected: dict[tuple[str, ...], PolicyIndex] = {}
        self._parts: dict[str, tuple[Workload, tuple[PolicyIndex, ...]]] = {}
        """By uid. To look up by what decides, the named policies, takes long for many of them."""
        self._failed: dict[str | tuple[str, ...] | None, PolicyFailed] = {}
        """By what `_indexes` and `_selected` are by: whoever asks next need not take as long to fail."""
        self._indexes_before = dict(indexes)
        self._selected_before = dict(selected)

    def after(self, policies: Mapping[str, AuthorizationPolicy]) -> _Prepared:
        """The same for other policies, which may be mostly the same."""
        return _Prepared(policies, self._indexes, self._selected)

    def known(self, workload: Workload) -> tuple[PolicyIndex, ...] | None:
        known = self._parts.get(workload.uid)
        # The same uid may be another workload by now.
        return known[1] if known is not None and known[0] is workload else None

    def everything(self) -> Iterator[None]:
        grouped = yield from self._grouped()
        failed: PolicyFailed | None = None
        for namespace in grouped:
            try:
                yield from self._index(namespace)
            except PolicyFailed as exc:
                failed = exc
        self._indexes_before.clear()
        if failed is not None:
            raise failed

    def everything_for(self, workloads: Iterable[Workload]) -> Iterator[None]:
        failed: PolicyFailed | None = None
        for workload in workloads:
            if self.known(workload) is None:
                try:
                    yield from self.parts(workload)
                except PolicyFailed as exc:
                    failed = exc
        self._indexes_before.clear()
        self._selected_before.clear()
        if failed is not None:
            raise failed

    def parts(self, workload: Workload) -> Generator[None, None, tuple[PolicyIndex, ...]]:
        """The indexes of the policies that a workload is subject to, each policy in one of them."""
        found = []
        for namespace in (None, workload.namespace):
            index = yield from self._index(namespace)
            if index is not None:
                found.append(index)
        names = tuple(sorted(set(workload.authorization_policies)))
        selected = tuple(
            (name, policy)
            for name in names
            if (policy := self.policies.get(name)) is not None and not _in_force_anyway(policy, workload)
        )
        if selected:
            keys = tuple(key for key, _ in selected)
            # Another thread may clear it between any two steps.
            index = self._selected.get(keys)
            if index is None:
                index = yield from self._made(keys, selected, self._selected_before.pop(keys, None))
                if len(self._selected) >= _MAX_REMEMBERED:
                    self._selected.clear()
                self._selected[keys] = index
            found.append(index)
        if len(self._parts) >= _MAX_REMEMBERED:
            self._parts.clear()
        parts = tuple(found)
        self._parts[workload.uid] = workload, parts
        return parts

    def _index(self, namespace: str | None) -> Generator[None, None, PolicyIndex | None]:
        grouped = yield from self._grouped()
        if namespace not in grouped:
            return None
        index = self._indexes.get(namespace)
        if index is None:
            index = yield from self._made(namespace, grouped[namespace], self._indexes_before.pop(namespace, None))
            self._indexes[namespace] = index
        return index

    def _made(
        self, which: str | tuple[str, ...] | None, policies: _Keyed, before: PolicyIndex | None
    ) -> Generator[None, None, PolicyIndex]:
        failed = self._failed.get(which)
        if failed is not None:
            raise PolicyFailed(failed.policy, failed.why)
        try:
            return (yield from _made(policies, before))
        except PolicyFailed as exc:
            self._failed[which] = PolicyFailed(exc.policy, exc.why)  # without what its traceback holds on to
            raise

    def _grouped(self) -> Generator[None, None, dict[str | None, _Keyed]]:
        if self._by_namespace is None:
            groups: dict[str | None, list[tuple[str, AuthorizationPolicy]]] = {}
            for count, key in enumerate(sorted(self.policies)):
                policy = self.policies[key]
                if policy.scope is not Scope.WORKLOAD_SELECTOR:
                    namespace = None if policy.scope is Scope.GLOBAL else policy.namespace
                    groups.setdefault(namespace, []).append((key, policy))
                if count % _CHUNK == 0:
                    yield
            self._by_namespace = {namespace: tuple(group) for namespace, group in groups.items()}
        return self._by_namespace


def _in_force_anyway(policy: AuthorizationPolicy, workload: Workload) -> bool:
    return policy.scope is Scope.GLOBAL or (policy.scope is Scope.NAMESPACE and policy.namespace == workload.namespace)


def _made(policies: _Keyed, before: PolicyIndex | None) -> Generator[None, None, PolicyIndex]:
    """An index of policies: the one from before, if those have not changed."""
    if before is not None and len(before.policies) == len(policies):
        pairs = zip(before.policies, policies, strict=True)
        if all(old is new and old_key == new_key for (old_key, old), (new_key, new) in pairs):
            return before
    return (yield from PolicyIndex.build(policies))


def _all_of(work: Generator[None, None, _T]) -> _T:
    """Do work without a pause."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            result: _T = done.value
            return result


def _decide(parts: tuple[PolicyIndex, ...], flow: Flow) -> Verdict:
    facts = facts_of(flow)
    asked = [(part, part.matched(facts)) for part in parts]
    dry_run = _dry_run(asked, Action.DENY)
    key = _first(asked, Action.DENY)
    if key is not None:
        return Verdict(False, key, f"explicitly denied by: {key}", dry_run)
    dry_run += _dry_run(asked, Action.ALLOW)
    key = _first(asked, Action.ALLOW)
    if key is not None:
        return Verdict(True, key, f"allowed by: {key}", dry_run)
    verdict = NONE_ALLOWED if any(part.has_allow for part in parts) else NO_ALLOW
    return Verdict(verdict.allowed, None, verdict.reason, dry_run) if dry_run else verdict


_Asked: TypeAlias = list[tuple[PolicyIndex, int]]


def _first(asked: _Asked, action: Action) -> str | None:
    return min([key for part, matched in asked if (key := part.first(matched, action)) is not None], default=None)


def _dry_run(asked: _Asked, action: Action) -> tuple[DryRunMatch, ...]:
    found = [matches for part, matched in asked if (matches := part.dry_run(matched, action))]
    if len(found) <= 1:
        return found[0] if found else ()
    return tuple(sorted(chain.from_iterable(found), key=lambda match: match.policy))
