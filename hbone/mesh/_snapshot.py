"""An immutable picture of the mesh: everything that a decision may depend on, and how to find it.

Who holds a snapshot sees one state of the mesh, however long it looks. A change makes a new snapshot that shares with
the old one whatever did not change; `MeshState` says which snapshot holds now.
"""

from __future__ import annotations

from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Generic, TypeVar, final

from hbone.mesh._index import (
    EndpointIndex,
    ServiceIndex,
    WorkloadIndex,
    all_of,
    best_of,
    host_key,
    ip_key,
    prefixes,
)
from hbone.mesh._values import AuthorizationPolicy, NamespacedHostname, Service, Workload

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hbone.mesh._index import ServiceChoice
    from hbone.mesh._values import IPAddress, ServiceEndpoint

__all__ = ["MeshSnapshot"]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

_NO_ENDPOINTS: Final[Mapping[str, ServiceEndpoint]] = MappingProxyType({})


@final
class MeshSnapshot:
    """All workloads, services and policies at one moment, with look-ups that take as long for 10 000 as for 100.

    Made by `build` and `with_changes`, in any thread. Nothing in it changes but `memo`. An answer depends on the order
    in which things came only where several services are equally good: then the one that was seen first is meant, and
    `services` is in that order.
    """

    __slots__ = ("_endpoint_index", "_policies", "_service_index", "_services", "_workload_index", "_workloads", "memo")

    memo: dict[object, object]
    """What others have worked out from this snapshot; gone when it is."""

    def __init__(self) -> None:
        """The empty mesh."""
        self._workloads: MappingProxyType[str, Workload] = MappingProxyType({})
        self._services: MappingProxyType[NamespacedHostname, Service] = MappingProxyType({})
        self._policies: MappingProxyType[str, AuthorizationPolicy] = MappingProxyType({})
        self._workload_index = WorkloadIndex()
        self._service_index = ServiceIndex()
        self._endpoint_index = EndpointIndex()
        self.memo = {}

    @classmethod
    def build(
        cls,
        workloads: Iterable[Workload] = (),
        services: Iterable[Service] = (),
        policies: Iterable[AuthorizationPolicy] = (),
    ) -> MeshSnapshot:
        """A snapshot of these. Of several with the same uid or name, the last counts."""
        return cls().with_changes(upsert=chain(workloads, services, policies))

    @property
    def workloads(self) -> Mapping[str, Workload]:
        """All workloads, by uid."""
        return self._workloads

    @property
    def services(self) -> Mapping[NamespacedHostname, Service]:
        """All services, as they were first seen."""
        return self._services

    @property
    def policies(self) -> Mapping[str, AuthorizationPolicy]:
        """All policies, by ``namespace/name``. The same object in another snapshot means: the same policies."""
        return self._policies

    def __repr__(self) -> str:
        return (
            f"<MeshSnapshot: {len(self._workloads)} workloads, {len(self._services)} services,"
            f" {len(self._policies)} policies>"
        )

    # -------------------------------------------------------------------------------------------------------- changes

    def with_changes(
        self,
        *,
        upsert: Iterable[Workload | Service | AuthorizationPolicy] = (),
        remove_workloads: Iterable[str] = (),
        remove_services: Iterable[NamespacedHostname] = (),
        remove_policies: Iterable[str] = (),
    ) -> MeshSnapshot:
        """A snapshot without these, and with those in place of what has their uid or name.

        Takes time for what changes, and some to copy dictionaries: one workload of 10 000 takes half a millisecond.
        What is removed need not be there; what is in both lists is replaced. What is put in and equals what is there
        changes nothing: the old object stays, and `workloads`, `services` and `policies` are the old objects where
        nothing in them changed.

        Returns:
            the new snapshot; this one when nothing changed.
        """
        workloads: dict[str, Workload] = {}
        services: dict[NamespacedHostname, Service] = {}
        policies: dict[str, AuthorizationPolicy] = {}
        for value in upsert:
            if isinstance(value, Workload):
                workloads[value.uid] = value
            elif isinstance(value, Service):
                services[value.key] = value
            else:
                policies[value.key] = value
        of_workloads = _Change(self._workloads, workloads, remove_workloads)
        of_services = _Change(self._services, services, remove_services)
        of_policies = _Change(self._policies, policies, remove_policies)
        if not (of_workloads or of_services or of_policies):
            return self

        changed = MeshSnapshot()
        changed._workloads = of_workloads.result
        changed._services = of_services.result
        changed._policies = of_policies.result
        changed._workload_index = self._workload_index
        changed._service_index = self._service_index
        changed._endpoint_index = self._endpoint_index
        if of_workloads:
            changed._workload_index = self._workload_index.edited(
                of_workloads.before.values(), of_workloads.after.values()
            )
        if of_services:
            changed._service_index = self._service_index.edited(of_services.before, of_services.after)
        if of_workloads or of_services:
            changed._endpoint_index = self._endpoint_index.edited(
                of_workloads.before.values(),
                of_workloads.after.values(),
                of_services.result,
                {**of_services.before, **of_services.after},
            )
        return changed

    def replaced_by(
        self,
        workloads: Iterable[Workload] = (),
        services: Iterable[Service] = (),
        policies: Iterable[AuthorizationPolicy] = (),
    ) -> MeshSnapshot:
        """A snapshot of exactly these, as `build` would make it, that shares with this one whatever is equal.

        Returns:
            the new snapshot; this one when nothing changed.
        """
        wanted_workloads = {workload.uid: workload for workload in workloads}
        wanted_policies = {policy.key: policy for policy in policies}
        wanted_services: dict[NamespacedHostname, Service] = {}
        for service in services:
            old = self._services.get(service.key)
            wanted_services[service.key] = old if old is not None and old == service else service
        base = self
        known = [key for key in self._services if key in wanted_services]
        if list(wanted_services)[: len(known)] != known:  # another order: some are now seen before others
            base = base.with_changes(remove_services=self._services)
        return base.with_changes(
            upsert=chain(wanted_workloads.values(), wanted_services.values(), wanted_policies.values()),
            remove_workloads=self._workloads.keys() - wanted_workloads.keys(),
            remove_services=self._services.keys() - wanted_services.keys(),
            remove_policies=self._policies.keys() - wanted_policies.keys(),
        )

    # ------------------------------------------------------------------------------------------------------ workloads

    def workload_by_address(self, network: str, ip: IPAddress) -> Workload | None:
        """Whose address this is: of several, pods first, then those that speak HBONE, then by uid.

        A workload in its node's network is not found: its address is the node's.
        """
        return best_of(self._workload_index.by_address.get((network, ip_key(ip))))

    def find_workload(
        self, namespace: str, name: str, service_account: str, node: str | None = None
    ) -> Workload | None:
        """The workload of this name; with `node`, only if it is there. Several are ranked as for an address."""
        for workload in all_of(self._workload_index.by_name.get((namespace, name, service_account), ())):
            if node is None or workload.node == node:
                return workload
        return None

    def workload_by_hostname(self, namespace: str, hostname: str) -> Workload | None:
        """The workload that is known by this host name in a namespace. Several are ranked as for an address."""
        return best_of(self._workload_index.by_hostname.get((namespace, host_key(hostname))))

    def workloads_on_node(self, node: str | None) -> tuple[Workload, ...]:
        """The workloads of a node, of all nodes when None, by uid. Takes time for as many as there are."""
        found = self._workloads if node is None else self._workload_index.by_node.get(node, {})
        return tuple(found[uid] for uid in sorted(found))

    # ------------------------------------------------------------------------------------------------------- services

    def service(self, name: NamespacedHostname) -> Service | None:
        """The service of exactly this name, whoever sees it."""
        return self._services.get(name)

    def service_by_vip(self, network: str, ip: IPAddress, client_namespace: str | None) -> Service | None:
        """The service that a client means by an address.

        A service that is visible in its namespace only does not exist for clients of others. A VIP counts before a
        range of VIPs. Then: the client's own namespace, the longest prefix (of ranges), the canonical service, the one
        that was seen first.
        """
        index = self._service_index
        address = ip_key(ip)
        choice = index.by_vip.get((network, address))
        if choice is not None and (found := _meant(choice, client_namespace)) is not None:
            return found
        public: Service | None = None
        for key in prefixes(network, address, index.prefix_lengths):
            choice = index.by_cidr.get(key)
            if choice is not None:
                own = None if client_namespace is None else choice.of_namespace.get(client_namespace)
                if own is not None:
                    return own
                public = public or choice.public
        return public

    def service_by_hostname(self, hostname: str, client_namespace: str | None) -> Service | None:
        """The service that a client means by a host name, with the preferences of `service_by_vip`."""
        choice = self._service_index.by_hostname.get(host_key(hostname))
        return None if choice is None else _meant(choice, client_namespace)

    def services_by_vip(self, network: str, ip: IPAddress) -> tuple[Service, ...]:
        """All services that have an address, whoever sees them: by VIP, then by range, the longest prefix first."""
        index = self._service_index
        address = ip_key(ip)
        choices = [index.by_vip.get((network, address))]
        choices += [index.by_cidr.get(key) for key in prefixes(network, address, index.prefix_lengths)]
        found = {service.key: service for choice in choices if choice is not None for service in choice.services}
        return tuple(found.values())

    def services_by_hostname(self, hostname: str) -> tuple[Service, ...]:
        """All services with a host name, whoever sees them, as they were first seen."""
        choice = self._service_index.by_hostname.get(host_key(hostname))
        return () if choice is None else choice.services

    # ------------------------------------------------------------------------------------------------------ endpoints

    def endpoints(self, service: Service | NamespacedHostname) -> Mapping[str, ServiceEndpoint]:
        """The endpoints of a known service by workload uid, in no particular order.

        They are the workloads that name the service, and what was written at the service itself, of which the workload
        may be unknown. Unhealthy ones are there only if the service's health policy allows all.
        """
        key = service.key if isinstance(service, Service) else service
        return self._endpoint_index.of_service.get(key, _NO_ENDPOINTS)

    @property
    def staged_endpoints(self) -> Mapping[NamespacedHostname, Mapping[str, ServiceEndpoint]]:
        """What workloads say that they are endpoints of, where there is no such service: for a dump."""
        return self._endpoint_index.staged(self._services)

    def services_of(self, workload: Workload) -> tuple[Service, ...]:
        """The known services that a workload is an endpoint of, healthy or not, as they were first seen."""
        found = {key: self._services[key] for key in workload.services if key in self._services}
        for service in self._service_index.by_written_endpoint.get(workload.uid, ()):
            found[service.key] = service
        seen = self._service_index.seen
        return tuple(found[key] for key in sorted(found, key=seen.__getitem__))


class _Change(Generic[_Key, _Value]):
    """What really changes in one of the three: without what is equal to what is there."""

    __slots__ = ("after", "before", "result")

    def __init__(self, old: MappingProxyType[_Key, _Value], upsert: dict[_Key, _Value], remove: Iterable[_Key]) -> None:
        before: dict[_Key, _Value] = {key: old[key] for key in remove if key in old and key not in upsert}
        gone = tuple(before)
        after: dict[_Key, _Value] = {}
        for key, value in upsert.items():
            known = old.get(key)
            if known is not None:
                if known is value or known == value:
                    continue
                before[key] = known
            after[key] = value
        self.before = before
        """What is gone or was replaced."""
        self.after = after
        """What is there instead, or is new."""
        self.result = old
        if before or after:
            result = old.copy()
            for key in gone:
                del result[key]
            result.update(after)
            self.result = MappingProxyType(result)

    def __bool__(self) -> bool:
        return bool(self.before or self.after)


def _meant(choice: ServiceChoice, client_namespace: str | None) -> Service | None:
    if client_namespace is not None and (own := choice.of_namespace.get(client_namespace)) is not None:
        return own
    return choice.public
