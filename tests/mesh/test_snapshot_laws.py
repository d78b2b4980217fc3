"""Laws of the picture of the mesh: every look-up agrees with a plain search through everything, however it was made."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from support.meshes import name, policy, service, workload

from hbone.mesh import (
    AuthorizationPolicy,
    HealthPolicy,
    HealthStatus,
    LoadBalancer,
    MeshSnapshot,
    NamespacedHostname,
    NetworkMode,
    Service,
    ServiceEndpoint,
    TunnelProtocol,
    Visibility,
    Workload,
)

# A small world, in which much coincides.
NETWORKS = ("", "remote")
NAMESPACES = ("n1", "n2", "n3")
IPS = ("10.0.0.1", "10.0.0.2", "10.0.1.1", "2001:db8::1", "::ffff:10.0.0.1")
RANGES = ("10.0.0.0/24", "10.0.0.0/31", "10.0.0.2/32", "0.0.0.0/0", "2001:db8::/32", "::/0")
HOSTNAMES = ("cart", "stock.example.com")
UIDS = ("c//Pod/n1/a", "c//Pod/n1/b", "entry-a", "entry-b", "z//Pod/n2/c")
NODES = ("", "node-a", "node-b")
NAMES = ("a", "b")
KEYS = tuple(f"{namespace}/{hostname}" for namespace in NAMESPACES for hostname in HOSTNAMES)

ports = st.dictionaries(st.sampled_from((80, 443)), st.sampled_from((0, 8080)), max_size=2)
statuses = st.sampled_from(HealthStatus)

workloads = st.builds(
    lambda uid, ips, endpoint_of, **fields: workload(uid, *ips, endpoint_of=endpoint_of, **fields),
    st.sampled_from(UIDS),
    st.lists(st.sampled_from(IPS), max_size=3),
    st.dictionaries(st.sampled_from(KEYS), ports, max_size=2),
    name=st.sampled_from(NAMES),
    namespace=st.sampled_from(NAMESPACES),
    network=st.sampled_from(NETWORKS),
    protocol=st.sampled_from(TunnelProtocol),
    network_mode=st.sampled_from((NetworkMode.STANDARD, NetworkMode.STANDARD, NetworkMode.HOST_NETWORK)),
    service_account=st.sampled_from(("default", "robot")),
    hostname=st.sampled_from(("", *HOSTNAMES)),
    node=st.sampled_from(NODES),
    status=statuses,
)
services = st.builds(
    lambda key, vips, written, **fields: service(
        key,
        *vips,
        endpoints={
            uid: ServiceEndpoint(workload_uid=uid, ports={80: 1}, status=status) for uid, status in written.items()
        },
        **fields,
    ),
    st.sampled_from(KEYS),
    st.lists(st.tuples(st.sampled_from(NETWORKS), st.sampled_from(IPS + RANGES)).map("/".join), max_size=3),
    st.dictionaries(st.sampled_from((*UIDS, "unknown")), statuses, max_size=2),
    canonical=st.booleans(),
    visibility=st.sampled_from(Visibility),
    load_balancer=st.none() | st.builds(LoadBalancer, health_policy=st.sampled_from(HealthPolicy)),
)
policies = st.builds(policy, st.sampled_from(("n1/p", "n2/p")), dry_run=st.booleans())
changes = st.fixed_dictionaries(
    {
        "upsert": st.lists(workloads | services | policies, max_size=6),
        "remove_workloads": st.lists(st.sampled_from(UIDS), max_size=2),
        "remove_services": st.lists(st.sampled_from(KEYS).map(name), max_size=2),
        "remove_policies": st.lists(st.sampled_from(("n1/p", "n2/p")), max_size=1),
    }
)
contents = st.tuples(st.lists(workloads, max_size=6), st.lists(services, max_size=6), st.lists(policies, max_size=2))


@dataclass
class Plain:
    """The same without an index: what there is, and every question answered by looking at all of it."""

    workloads: dict[str, Workload] = field(default_factory=dict)
    services: dict[NamespacedHostname, Service] = field(default_factory=dict)
    policies: dict[str, AuthorizationPolicy] = field(default_factory=dict)

    def change(self, upsert: Any, remove_workloads: Any, remove_services: Any, remove_policies: Any) -> None:
        put: dict[Any, Any] = {each.uid if isinstance(each, Workload) else each.key: each for each in upsert}
        for table, keys in (
            (self.workloads, remove_workloads),
            (self.services, remove_services),
            (self.policies, remove_policies),
        ):
            for key in keys:
                if key not in put:
                    table.pop(key, None)
        for key, value in put.items():
            table = {Workload: self.workloads, Service: self.services, AuthorizationPolicy: self.policies}[type(value)]
            table[key] = value

    def best(self, having: Any) -> Workload | None:
        def rank(each: Workload) -> tuple[int, str]:
            pod, hbone = "//Pod/" in each.uid, each.protocol is TunnelProtocol.HBONE
            return {(True, True): 0, (True, False): 1, (False, True): 2, (False, False): 3}[pod, hbone], each.uid

        return min(filter(having, self.workloads.values()), key=rank, default=None)

    def workload_by_address(self, network: str, ip: Any) -> Workload | None:
        return self.best(
            lambda each: (
                each.network == network
                and each.network_mode is NetworkMode.STANDARD
                and plain_ip(ip) in map(plain_ip, each.addresses)
            )
        )

    def find_workload(self, namespace: str, name: str, account: str, node: str | None) -> Workload | None:
        return self.best(
            lambda each: (
                (each.namespace, each.name, each.service_account) == (namespace, name, account)
                and node in (None, each.node)
            )
        )

    def workload_by_hostname(self, namespace: str, hostname: str) -> Workload | None:
        return self.best(lambda each: (each.namespace, each.hostname) == (namespace, hostname))

    def workloads_on_node(self, node: str | None) -> tuple[Workload, ...]:
        found = [each for each in self.workloads.values() if node in (None, each.node)]
        return tuple(sorted(found, key=lambda each: each.uid))

    def service_by_vip(self, network: str, ip: Any, client: str | None) -> Service | None:
        ranked = []
        for each in self.visible(client):
            own = each.namespace == client
            if any(vip.network == network and plain_ip(vip.ip) == plain_ip(ip) for vip in each.vips):
                ranked.append(((True, own, 0, each.canonical), each))
            ranked.extend(
                ((False, own, vip.cidr.prefixlen, each.canonical), each)
                for vip in each.cidr_vips
                if vip.network == network and plain_ip(ip) in vip.cidr
            )
        return max(ranked, key=lambda pair: pair[0], default=(None, None))[1]

    def service_by_hostname(self, hostname: str, client: str | None) -> Service | None:
        found = [each for each in self.visible(client) if each.hostname == hostname]
        return max(found, key=lambda each: (each.namespace == client, each.canonical), default=None)

    def visible(self, client: str | None) -> list[Service]:
        public = Visibility.PUBLIC
        return [each for each in self.services.values() if each.visibility is public or each.namespace == client]

    def said(self, key: NamespacedHostname) -> dict[str, ServiceEndpoint]:
        return {
            each.uid: ServiceEndpoint(workload_uid=each.uid, ports=each.services[key], status=each.status)
            for each in self.workloads.values()
            if key in each.services
        }

    def endpoints(self, each: Service) -> dict[str, ServiceEndpoint]:
        anybody = each.load_balancer is not None and each.load_balancer.health_policy is HealthPolicy.ALLOW_ALL
        everybody = {**each.endpoints, **self.said(each.key)}
        return {uid: one for uid, one in everybody.items() if anybody or one.status is HealthStatus.HEALTHY}

    def staged_endpoints(self) -> dict[NamespacedHostname, dict[str, ServiceEndpoint]]:
        named = {key for each in self.workloads.values() for key in each.services}
        return {key: self.said(key) for key in named - self.services.keys()}

    def services_of(self, one: Workload) -> tuple[Service, ...]:
        return tuple(each for each in self.services.values() if each.key in one.services or one.uid in each.endpoints)


def plain_ip(ip: Any) -> Any:
    return getattr(ip, "ipv4_mapped", None) or ip


def check(snapshot: MeshSnapshot, plain: Plain) -> None:
    assert list(snapshot.services) == list(plain.services)
    assert (snapshot.workloads, snapshot.services, snapshot.policies) == (
        plain.workloads,
        plain.services,
        plain.policies,
    )
    clients = (*NAMESPACES, "elsewhere", None)
    for network in NETWORKS:
        for ip in map(ip_address, (*IPS, "10.0.0.3", "192.0.2.1")):
            assert snapshot.workload_by_address(network, ip) == plain.workload_by_address(network, ip)
            for client in clients:
                assert snapshot.service_by_vip(network, ip, client) == plain.service_by_vip(network, ip, client)
    for hostname in HOSTNAMES:
        for client in clients:
            assert snapshot.service_by_hostname(hostname, client) == plain.service_by_hostname(hostname, client)
        for namespace in NAMESPACES:
            expected = plain.workload_by_hostname(namespace, hostname)
            assert snapshot.workload_by_hostname(namespace, hostname) == expected
    for node in (*NODES, "node-c", None):
        assert snapshot.workloads_on_node(node) == plain.workloads_on_node(node)
        for namespace in NAMESPACES:
            for short in NAMES:
                for account in ("default", "robot"):
                    expected = plain.find_workload(namespace, short, account, node)
                    assert snapshot.find_workload(namespace, short, account, node) == expected
    for key, each in plain.services.items():
        assert snapshot.service(key) == each
        assert snapshot.endpoints(each) == plain.endpoints(each)
    assert snapshot.staged_endpoints == plain.staged_endpoints()
    for one in plain.workloads.values():
        assert snapshot.services_of(one) == plain.services_of(one)


@given(st.lists(changes, max_size=4))
def test_after_any_changes_look_ups_are_those_of_a_plain_search(history: list[dict[str, Any]]) -> None:
    snapshot, plain = MeshSnapshot.build(), Plain()
    versions = []
    for change in history:
        snapshot = snapshot.with_changes(**change)
        plain.change(**change)
        versions.append((snapshot, replace(plain, **{what: dict(getattr(plain, what)) for what in vars(plain)})))
    # Each version still says what it said, whatever was made from it.
    for version, then in versions:
        check(version, then)
    check(MeshSnapshot.build(plain.workloads.values(), plain.services.values(), plain.policies.values()), plain)


@given(contents, contents)
def test_replaced_by_is_a_build(before: Any, after: Any) -> None:
    old = MeshSnapshot.build(*before)
    snapshot = old.replaced_by(*after)
    plain = Plain()
    plain.change([*after[0], *after[1], *after[2]], (), (), ())
    check(snapshot, plain)
    for what in ("workloads", "services", "policies"):
        mine, theirs = getattr(snapshot, what), getattr(old, what)
        assert all(value is theirs[key] for key, value in mine.items() if theirs.get(key) == value)
        if list(mine.items()) == list(theirs.items()):
            assert mine is theirs


@given(contents, st.randoms(use_true_random=False))
def test_the_order_of_workloads_and_policies_means_nothing(content: Any, random: Any) -> None:
    by_uid = {each.uid: each for each in content[0]}
    by_key = {each.key: each for each in content[2]}
    shuffled, of_policies = list(by_uid.values()), list(by_key.values())
    random.shuffle(shuffled)
    random.shuffle(of_policies)
    plain = Plain()
    plain.change([*by_uid.values(), *content[1], *by_key.values()], (), (), ())
    one_by_one = MeshSnapshot.build()
    for each in (*of_policies, *content[1], *shuffled):
        one_by_one = one_by_one.with_changes(upsert=[each])
    check(one_by_one, plain)
