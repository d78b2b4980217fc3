"""Reading and writing mesh files: every kind of entry, what an absent key means, and that what is written is read."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.meshes import name, policy, service, workload

from hbone.mesh import (
    Action,
    ApplicationTunnel,
    ApplicationTunnelProtocol,
    AuthorizationPolicy,
    GatewayAddress,
    HealthPolicy,
    HealthStatus,
    IpFamilies,
    LoadBalancer,
    LoadBalancerMode,
    Locality,
    Match,
    MeshSnapshot,
    NamespacedHostname,
    NetworkAddress,
    NetworkCidr,
    NetworkMode,
    ParsedMesh,
    RoutingPreference,
    Scope,
    Service,
    ServiceAccount,
    ServiceEndpoint,
    StringMatch,
    StringMatchKind,
    TunnelProtocol,
    Visibility,
    WeightedGateway,
    Workload,
    dump_policy,
    dump_service,
    dump_workload,
    load_mesh,
    mesh_schema,
    parse_mesh,
)

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
EXACT, PREFIX, SUFFIX, PRESENCE = StringMatchKind


def good(text: str | bytes) -> ParsedMesh:
    parsed = parse_mesh(text, source="m")
    assert [str(fault) for fault in parsed.faults] == []
    return parsed


def only_workload(text: str) -> Workload:
    (found,) = good(f"workloads:\n- {{{text}}}").workloads
    return found


def only_match(text: str) -> Match:
    (found,) = good(
        f"policies: [{{name: p, namespace: n, scope: Global, action: Deny, dryRun: false, rules: [[[{{{text}}}]]]}}]"
    ).policies
    return found.rules[0][0][0]


# === what there can be ===


def test_the_example_has_every_kind_of_entry() -> None:
    parsed = load_mesh(EXAMPLES / "everything.yaml")
    assert parsed.warnings == ()
    plain, stock, *_ = parsed.workloads
    waypoint = GatewayAddress(destination=name("shop/waypoint.shop.svc.cluster.local"), hbone_mtls_port=15008)
    assert plain == workload("Kubernetes//Pod/shop/plain", "10.0.0.1")
    assert stock == Workload(
        uid="lab//Pod/shop/stock-0",
        name="stock-0",
        namespace="shop",
        addresses=(ip_address("10.0.0.2"), ip_address("fd00::2")),
        network="net1",
        protocol=TunnelProtocol.HBONE,
        trust_domain="example.org",
        service_account="stock",
        waypoint=waypoint,
        network_gateway=GatewayAddress(
            destination=NetworkAddress("net1", ip_address("192.0.2.1")), hbone_mtls_port=15008
        ),
        node="node-a",
        hostname="stock-0.stock.shop.svc.cluster.local",
        workload_name="stock",
        workload_type="deployment",
        canonical_name="stock",
        canonical_revision="v2",
        application_tunnel=ApplicationTunnel(protocol=ApplicationTunnelProtocol.PROXY, port=9000),
        authorization_policies=("shop/strict", "shop/callers"),
        cluster_id="lab",
        locality=Locality(region="eu", zone="eu-1", subzone="rack-9"),
        capacity=3,
        services={name("shop/stock.shop.svc.cluster.local"): {80: 8080, 9090: 9091}},
    )
    assert parsed.services[1] == Service(
        name="stock",
        namespace="shop",
        hostname="stock.shop.svc.cluster.local",
        vips=(NetworkAddress("", ip_address("10.96.0.20")), NetworkAddress("net1", ip_address("fd00:96::20"))),
        cidr_vips=(NetworkCidr("", ip_network("198.51.100.0/24")),),
        ports={80: 8080, 9090: 0},
        endpoints={plain.uid: ServiceEndpoint(workload_uid=plain.uid, ports={80: 80})},
        subject_alt_names=("spiffe://example.org/ns/shop/sa/stock",),
        waypoint=waypoint,
        weighted_waypoints=(
            WeightedGateway(destination=waypoint, weight=9),
            WeightedGateway(
                destination=GatewayAddress(
                    destination=NetworkAddress("", ip_address("10.0.0.50")), hbone_mtls_port=15008
                ),
                weight=1,
            ),
        ),
        load_balancer=LoadBalancer(preferences=tuple(RoutingPreference), mode=LoadBalancerMode.FAILOVER),
        ip_families=IpFamilies.DUAL,
        canonical=True,
    )
    shop, cart = (ServiceAccount(namespace="shop", service_account=account) for account in ("stock", "cart"))
    assert parsed.policies[0] == AuthorizationPolicy(
        name="everything",
        namespace="istio-system",
        scope=Scope.GLOBAL,
        action=Action.DENY,
        dry_run=True,
        rules=(
            (
                (
                    Match(
                        namespaces=(
                            StringMatch(EXACT, "evil"),
                            StringMatch(PREFIX, "evil-"),
                            StringMatch(SUFFIX, "-evil"),
                        ),
                        not_namespaces=(StringMatch(EXACT, "shop"),),
                    ),
                    Match(service_accounts=(shop,), not_service_accounts=(cart,)),
                ),
                (
                    Match(
                        principals=(StringMatch(EXACT, "cluster.local/ns/shop/sa/cart"), StringMatch(PRESENCE)),
                        not_principals=(StringMatch(SUFFIX, "/sa/admin"),),
                    ),
                    Match(
                        source_ips=(ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")),
                        not_source_ips=(ip_network("192.0.2.7/32"),),
                    ),
                    Match(
                        destination_ips=(ip_network("10.0.0.0/8"),), not_destination_ips=(ip_network("10.0.0.1/32"),)
                    ),
                    Match(destination_ports=(8080, 9090), not_destination_ports=(9999,)),
                ),
            ),
        ),
    )


def test_the_example_for_one_machine() -> None:
    parsed = load_mesh(EXAMPLES / "localhost.yaml")
    assert parsed.warnings == ()
    snapshot = parsed.snapshot()
    local = snapshot.workload_by_address("", ip_address("127.0.0.1"))
    assert local is not None
    assert (local.name, local.protocol) == ("local", TunnelProtocol.HBONE)
    found = snapshot.service_by_hostname("local.default.svc.cluster.local", "default")
    assert found is not None
    assert list(snapshot.endpoints(found)) == [local.uid]


def test_every_key_is_in_an_example_and_in_the_reference() -> None:
    example = (EXAMPLES / "everything.yaml").read_text("utf-8")
    reference = (ROOT / "docs" / "reference" / "mesh-file.md").read_text("utf-8")
    models = mesh_schema()["$defs"].values()
    keys = {key for model in models for key in model.get("properties", {})}
    assert len(keys) > 50
    assert {key for key in keys if f"{key}:" not in example} == set()
    assert {key for key in keys if f"`{key}`" not in reference} == set()
    words = {word for model in models for word in model.get("enum", ())}
    assert {word for word in words if f"`{word}`" not in reference} == set()


def test_the_published_schema_is_that_of_the_code() -> None:
    published = ROOT / "hbone" / "mesh" / "mesh.schema.json"
    assert json.loads(published.read_text("utf-8")) == mesh_schema()


# === what texts mean ===


def test_absent_keys_have_the_defaults_of_a_cluster() -> None:
    found = only_workload("name: a, namespace: shop, workloadIps: [], services: {}")
    assert found == Workload(uid="Kubernetes//Pod/shop/a", name="a", namespace="shop")
    assert str(found.identity) == "spiffe://cluster.local/ns/shop/sa/default"
    empty = "trustDomain: '', serviceAccount: '', clusterId: ''"
    assert only_workload(f"name: a, namespace: shop, workloadIps: [], services: {{}}, {empty}") == found
    assert (good("{}").workloads, good("policies:\nservices: []\n").policies) == ((), ())


def test_a_gateway_has_the_port_of_hbone() -> None:
    found = only_workload("name: a, namespace: b, workloadIps: [], services: {}, waypoint: {destination: /10.0.0.1}")
    assert found.waypoint is not None
    assert found.waypoint.hbone_mtls_port == 15008


@pytest.mark.parametrize("word", ["no", "on", "1.10", "0x1f", "1e3", "2026-01-01", "true", "'null'", "! x"])
def test_a_text_needs_no_quotes(word: str) -> None:
    found = only_workload(f"name: a, namespace: b, workloadIps: [], services: {{}}, canonicalRevision: {word}")
    assert found.canonical_revision == word.strip("'").removeprefix("! ")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("!Exact a", StringMatch(EXACT, "a")),
        ("!Exact 'a'", StringMatch(EXACT, "a")),
        ('{"Exact": "a"}', StringMatch(EXACT, "a")),
        ("!Exact null", StringMatch(EXACT, "null")),
        ("!Prefix a", StringMatch(PREFIX, "a")),
        ("{Suffix: a}", StringMatch(SUFFIX, "a")),
        ("!Presence []", StringMatch(PRESENCE)),
        ("!Presence {}", StringMatch(PRESENCE)),
        ("!Presence ", StringMatch(PRESENCE)),
        ("{Presence: []}", StringMatch(PRESENCE)),
        ("{Presence: }", StringMatch(PRESENCE)),
    ],
)
def test_patterns_as_tags_and_as_json(text: str, match: StringMatch) -> None:
    assert only_match(f"principals: [{text}]").principals == (match,)


def test_addresses_have_one_spelling() -> None:
    found = only_workload("name: a, namespace: b, workloadIps: ['::ffff:10.0.0.1', 'FD00:0::1'], services: {}")
    assert found.addresses == (ip_address("10.0.0.1"), ip_address("fd00::1"))
    match = only_match("sourceIps: [10.1.2.3/8, 10.0.0.1, '::ffff:10.0.0.0/104']")
    assert match.source_ips == tuple(map(ip_network, ("10.0.0.0/8", "10.0.0.1/32", "10.0.0.0/8")))


def test_host_names_have_one_spelling() -> None:
    parsed = good("""
workloads: [{name: a, namespace: shop, workloadIps: [], hostname: A.example, services: {shop/Stock.Shop.: {80: 80}}}]
services: [{name: stock, namespace: shop, hostname: STOCK.shop, vips: [], ports: {80: 80}}]
""")
    assert parsed.warnings == ()
    assert parsed.workloads[0].hostname == "a.example"
    assert len(parsed.snapshot().endpoints(name("shop/stock.shop"))) == 1


def test_json_is_yaml() -> None:
    mesh = {
        "workloads": [{"uid": "a", "namespace": "b", "workloadIps": ["10.0.0.1"], "services": {"b/c": {"80": 8080}}}]
    }
    for indent in (None, 1, "\t"):
        (found,) = good(json.dumps(mesh, indent=indent)).workloads
        assert found.services == {name("b/c"): {80: 8080}}


def test_aliases_repeat_what_was_written() -> None:
    parsed = good("""
workloads:
- {uid: a, name: a, namespace: n, workloadIps: [], locality: &here {region: r, zone: z, subzone: s}, services: {}}
- {uid: b, name: b, namespace: n, workloadIps: [], locality: *here, services: {}}
""")
    assert [found.locality.zone for found in parsed.workloads] == ["z", "z"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(encoding: str) -> None:
    text = "workloads:\n- {name: a, namespace: b, workloadIps: [], services: {}, node: kühl}\n"
    assert good(text.encode(encoding)).workloads[0].node == "kühl"


def test_what_equals_the_previous_is_the_previous() -> None:
    text = (EXAMPLES / "everything.yaml").read_text("utf-8")
    first = good(text).snapshot()
    again = parse_mesh(text, previous=first)
    assert all(found is first.workloads[found.uid] for found in again.workloads)
    assert all(found is first.services[found.key] for found in again.services)
    assert all(found is first.policies[found.key] for found in again.policies)
    assert again.snapshot_after(first) is first


def test_a_large_file_pauses_often() -> None:
    entries = "\n".join(
        f"- {{name: a{n}, namespace: b, workloadIps: [], hostname: h, services: {{}}}}" for n in range(99)
    )
    pauses: list[None] = []
    parsed = parse_mesh(f"workloads:\n{entries}", pause=lambda: pauses.append(None))
    assert len(parsed.workloads) == 99
    assert len(pauses) == 10


# === what is right but will not do what was meant ===


def test_warnings() -> None:
    parsed = good("""
workloads:
- uid: a
  name: a
  namespace: shop
  workloadIps: []
  services: {shop/gone: {80: 80}}
  authorizationPolicies: [shop/gone, shop/there]
  waypoint: {destination: shop/gone}
  networkGateway: {destination: /10.9.9.9}
- {uid: b, name: b, namespace: shop, workloadIps: [10.0.0.1], services: {shop/gone: {80: 80}}}
- {uid: c, name: c, namespace: shop, workloadIps: [], services: {}}
services:
- name: s
  namespace: shop
  hostname: s
  vips: [/10.96.0.1]
  ports: {}
  endpoints: {gone: {workloadUid: gone, port: {}}}
  waypoint: {destination: /10.96.0.1}
  weightedWaypoints:
  - {destination: {destination: /10.0.0.1}, weight: 1}
  - {destination: {destination: shop/gone}, weight: 1}
policies:
- {name: there, namespace: shop, scope: WorkloadSelector, action: Allow, dryRun: false, rules: []}
- {name: lonely, namespace: shop, scope: WorkloadSelector, action: Allow, dryRun: false, rules: []}
""")
    assert [str(warning) for warning in parsed.warnings] == [
        'm:7:25: workloads[0].services["shop/gone"]: there is no service shop/gone in this file, '
        "so nothing gets to the workload by it",
        "m:8:27: workloads[0].authorizationPolicies[0]: there is no policy shop/gone in this file",
        "m:9:27: workloads[0].waypoint.destination: there is no service or workload shop/gone in this file, "
        "so what has to go by it fails",
        "m:10:33: workloads[0].networkGateway.destination: there is no service or workload /10.9.9.9 in this file, "
        "so what has to go by it fails",
        "m:12:3: workloads[2]: it has no address, no host name and no gateway, so nothing gets to it",
        "m:19:21: services[0].endpoints.gone: there is no workload gone in this file",
        "m:26:3: policies[1]: no workload names it in authorizationPolicies, so it does nothing",
    ]


# === reloads ===

MESH = """
workloads:
- {uid: a, name: a, namespace: shop, workloadIps: [10.0.0.1], services: {}}
- {uid: b, name: b, namespace: shop, workloadIps: [10.0.0.2], services: {}}
services:
- {name: one, namespace: shop, hostname: one, vips: [/10.96.0.1], ports: {}}
- {name: two, namespace: shop, hostname: two, vips: [/10.96.0.1], ports: {}}
- {name: three, namespace: shop, hostname: three, vips: [/10.96.0.1], ports: {}}
policies:
- {name: p, namespace: shop, scope: Global, action: Deny, dryRun: false, rules: []}
"""


def reload(*changes: tuple[str, str]) -> tuple[MeshSnapshot, MeshSnapshot]:
    text = MESH
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    before = good(MESH).snapshot()
    return before, parse_mesh(text, previous=before).snapshot_after(before)


def test_a_broken_entry_stays_as_it_was_and_everything_else_is_taken() -> None:
    before, after = reload(("uid: a, ", "uid: a, port: 1, "), ("10.0.0.2", "10.0.0.3"))
    assert after.workloads["a"] is before.workloads["a"]
    assert after.workloads["b"].addresses == (ip_address("10.0.0.3"),)
    assert after.policies is before.policies


def test_a_broken_workload_without_its_uid_is_known_by_its_name() -> None:
    before, after = reload(("uid: a, ", "uidd: a, "), ("uid: b, name: b", "uid: c, name: c"))
    assert after.workloads["a"] is before.workloads["a"]
    assert set(after.workloads) == {"a", "c"}


def test_a_broken_entry_keeps_its_place() -> None:
    before, after = reload(("hostname: two, ", "hostname: two, vip: x, "), ("- {name: one", "- {name: uno"))
    assert list(after.services) == list(before.services)
    assert after.services[name("shop/one")].name == "uno"


def test_who_may_be_meant_by_a_broken_entry_is_not_removed() -> None:
    _, after = reload(("name: two, namespace: shop, hostname: two", "hostnam: two"))
    assert set(after.services) == set(map(name, ("shop/one", "shop/two", "shop/three")))
    _, after = reload(("uid: b", "uid: a"))
    assert set(after.workloads) == {"a", "b"}


def test_a_broken_entry_that_was_not_there_is_left_out() -> None:
    _, after = reload(("services:\n", "services:\n- {name: new, namespace: shop, hostname: new, vips: 1, ports: {}}\n"))
    assert name("shop/new") not in after.services
    assert len(after.services) == 3


def test_what_is_no_longer_in_the_file_is_gone() -> None:
    (start, end) = MESH.index("policies:"), len(MESH)
    _, after = reload((MESH[start:end], ""), (", hostname: two", ", hostname: zwei"))
    assert not after.policies
    assert list(map(str, after.services)) == ["shop/one", "shop/zwei", "shop/three"]


# === what is written is read ===

texts = st.text(st.characters(max_codepoint=0xFFFD, exclude_categories=("Cc", "Cs", "Cn")), max_size=6)
names = texts.filter(bool)
segments = st.text("abcXYZ019-_", min_size=1, max_size=6)
hosts = st.text("abc-.*", min_size=1, max_size=8).filter(lambda text: not text.endswith("."))
networks = texts.filter(lambda text: "/" not in text)
ports = st.dictionaries(st.integers(1, 65535), st.integers(0, 65535), max_size=2)
ips = st.ip_addresses().filter(lambda ip: getattr(ip, "ipv4_mapped", None) is None)
cidrs = st.builds(
    lambda ip, length: ip_network((ip, length % (ip.max_prefixlen + 1)), strict=False), ips, st.integers(0)
)
service_names = st.builds(NamespacedHostname, names.filter(lambda text: "/" not in text), hosts)
addresses = st.builds(NetworkAddress, networks, ips)
gateways = st.builds(
    GatewayAddress,
    destination=addresses | service_names.filter(lambda key: not key.hostname.isdecimal()),
    hbone_mtls_port=st.integers(1, 65535),
)
numbers = st.integers(0, 2**32 - 1)
workloads = st.builds(
    Workload,
    uid=names,
    name=texts,
    namespace=segments,
    addresses=st.lists(ips, max_size=2).map(tuple),
    network=texts,
    protocol=st.sampled_from(TunnelProtocol),
    network_mode=st.sampled_from(NetworkMode),
    trust_domain=st.text("ab9.-_", min_size=1, max_size=8),
    service_account=segments,
    waypoint=st.none() | gateways,
    network_gateway=st.none() | gateways,
    node=texts,
    hostname=st.just("") | hosts,
    workload_name=texts,
    workload_type=st.sampled_from(("", "pod", "deployment", "job")),
    canonical_name=texts,
    canonical_revision=texts,
    native_tunnel=st.booleans(),
    application_tunnel=st.none()
    | st.builds(
        ApplicationTunnel,
        protocol=st.sampled_from(ApplicationTunnelProtocol),
        port=st.none() | st.integers(1, 65535),
    ),
    authorization_policies=st.lists(st.builds("{}/{}".format, names, names), max_size=2).map(tuple),
    status=st.sampled_from(HealthStatus),
    cluster_id=names,
    locality=st.builds(Locality, region=texts, zone=texts, subzone=texts),
    capacity=numbers,
    services=st.dictionaries(service_names, ports, max_size=2),
)
services = st.builds(
    lambda endpoints, **fields: Service(
        endpoints={
            uid: ServiceEndpoint(workload_uid=uid, ports=ports, status=status)
            for uid, (ports, status) in endpoints.items()
        },
        **fields,
    ),
    endpoints=st.dictionaries(names, st.tuples(ports, st.sampled_from(HealthStatus)), max_size=2),
    name=names,
    namespace=names,
    hostname=hosts,
    vips=st.lists(addresses, max_size=2).map(tuple),
    cidr_vips=st.lists(st.builds(NetworkCidr, texts, cidrs), max_size=2).map(tuple),
    ports=ports,
    subject_alt_names=st.lists(texts, max_size=2).map(tuple),
    waypoint=st.none() | gateways,
    weighted_waypoints=st.lists(st.builds(WeightedGateway, destination=gateways, weight=numbers), max_size=2).map(
        tuple
    ),
    load_balancer=st.none()
    | st.builds(
        LoadBalancer,
        preferences=st.lists(st.sampled_from(RoutingPreference), max_size=3).map(tuple),
        mode=st.sampled_from(LoadBalancerMode),
        health_policy=st.sampled_from(HealthPolicy),
    ),
    ip_families=st.none() | st.sampled_from(IpFamilies),
    canonical=st.booleans(),
    visibility=st.sampled_from(Visibility),
)
patterns = st.lists(
    st.builds(StringMatch, st.sampled_from((EXACT, PREFIX, SUFFIX)), names) | st.just(StringMatch(PRESENCE)), max_size=2
).map(tuple)
accounts = st.lists(st.builds(ServiceAccount, namespace=names, service_account=names), max_size=2).map(tuple)
ranges = st.lists(cidrs.filter(lambda cidr: not str(cidr).startswith("::ffff")), max_size=2).map(tuple)
many_ports = st.lists(st.integers(0, 65535), max_size=2).map(tuple)
matches = st.builds(
    Match,
    namespaces=patterns,
    not_namespaces=patterns,
    service_accounts=accounts,
    not_service_accounts=accounts,
    principals=patterns,
    not_principals=patterns,
    source_ips=ranges,
    not_source_ips=ranges,
    destination_ips=ranges,
    not_destination_ips=ranges,
    destination_ports=many_ports,
    not_destination_ports=many_ports,
)
policies = st.builds(
    AuthorizationPolicy,
    name=networks.filter(bool),
    namespace=networks,
    scope=st.sampled_from(Scope),
    action=st.sampled_from(Action),
    rules=st.lists(st.lists(st.lists(matches, max_size=2).map(tuple), max_size=2).map(tuple), max_size=2).map(tuple),
    dry_run=st.booleans(),
)


def as_json(mesh: dict[str, Any]) -> str:
    return json.dumps(mesh)


def as_yaml(mesh: dict[str, Any]) -> str:
    return yaml.safe_dump(mesh)


@pytest.mark.parametrize("write", [as_json, as_yaml])
@given(workloads, services, policies)
def test_what_is_written_is_read(write: Any, one: Workload, two: Service, three: AuthorizationPolicy) -> None:
    mesh = {"workloads": [dump_workload(one)], "services": [dump_service(two)], "policies": [dump_policy(three)]}
    parsed = good(write(mesh))
    assert parsed.workloads == (one,)
    assert parsed.services == (two,)
    assert parsed.policies == (three,)


def test_a_dump_leaves_out_what_istio_leaves_out() -> None:
    assert dump_workload(workload("x//Pod/shop/a", "10.0.0.1")) == {
        "capacity": 1,
        "clusterId": "Kubernetes",
        "name": "a",
        "namespace": "shop",
        "networkMode": "Standard",
        "protocol": "TCP",
        "serviceAccount": "default",
        "services": {},
        "status": "Healthy",
        "trustDomain": "cluster.local",
        "uid": "x//Pod/shop/a",
        "workloadIps": ["10.0.0.1"],
        "workloadType": "pod",
    }
    assert dump_service(service("shop/stock.shop", "/10.96.0.1")) == {
        "canonical": False,
        "endpoints": {},
        "hostname": "stock.shop",
        "name": "stock",
        "namespace": "shop",
        "ports": {"80": 8080},
        "subjectAltNames": [],
        "vips": ["/10.96.0.1"],
        "visibility": "Public",
    }
    match = Match(principals=(StringMatch(EXACT, "x"), StringMatch(PRESENCE)), source_ips=(ip_network("10.0.0.0/8"),))
    assert dump_policy(policy("shop/p", rules=(((match,),),))) == {
        "action": "Deny",
        "dryRun": False,
        "name": "p",
        "namespace": "shop",
        "rules": [[[{"principals": [{"Exact": "x"}, {"Presence": []}], "sourceIps": ["10.0.0.0/8"]}]]],
        "scope": "Namespace",
    }


def test_a_service_is_dumped_with_the_endpoints_in_force() -> None:
    stock = service("shop/stock.shop")
    endpoint = ServiceEndpoint(workload_uid="a", ports={80: 8080}, status=HealthStatus.UNHEALTHY)
    written = dump_service(stock, {"a": endpoint})
    assert written["endpoints"] == {"a": {"port": {"80": 8080}, "status": "Unhealthy", "workloadUid": "a"}}
    assert good(as_json({"services": [written]})).services == (replace(stock, endpoints={"a": endpoint}),)


# === anything else is a fault ===

EVERYTHING = (EXAMPLES / "everything.yaml").read_bytes()


@given(
    st.integers(0, len(EVERYTHING)), st.integers(0, 20), st.binary(max_size=3) | st.sampled_from(b"{}[]:-!&*# \n\t,'\"")
)
def test_a_damaged_file_never_raises_and_never_takes_the_mesh_down(where: int, cut: int, put: bytes | int) -> None:
    data = EVERYTHING[:where] + (bytes([put]) if isinstance(put, int) else put) + EVERYTHING[where + cut :]
    before = good(EVERYTHING).snapshot()
    parsed = parse_mesh(data, previous=before)
    lines = len(data.splitlines()) + 4  # YAML knows more ends of lines
    for fault in (*parsed.faults, *parsed.warnings):
        assert fault.message
        assert 0 <= fault.line <= lines
        assert (fault.column >= 1) == (fault.line >= 1)
    after = parsed.snapshot_after(before)
    if not parsed.readable:
        assert after is before
    elif parsed.faults:
        # What a fault is in stays, and so does what it may have been.
        for section in {entry.section for entry in parsed.broken}:
            assert len(getattr(after, section)) >= len(getattr(before, section))


@given(st.text(st.sampled_from("{}[]:-!&*# \n,'\"a1"), max_size=40) | st.binary(max_size=40))
def test_no_text_raises(text: str | bytes) -> None:
    parsed = parse_mesh(text)
    assert parsed.faults or parsed.readable
