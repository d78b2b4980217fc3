"""What the picture of a mesh costs: to build, to change, to look something up in, to let go.

``python tests/bench/snapshot.py`` prints JSON lines for meshes of 100, 1 000 and 10 000 workloads with a tenth as many
services. Times are the best of several: microseconds of a look-up or change, milliseconds of a build. ``--check`` exits
with 1 when building the largest takes more than 0.3 seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tracemalloc
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

from hbone.mesh import (
    Action,
    AuthorizationPolicy,
    HealthStatus,
    Locality,
    MeshSnapshot,
    NetworkAddress,
    NetworkCidr,
    Scope,
    Service,
    TunnelProtocol,
    Workload,
)

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT = 0.3
SIZES = ((100, 10), (1_000, 100), (10_000, 1_000))


def mesh(workloads: int, services: int) -> tuple[list[Workload], list[Service]]:
    """Pods on 100 nodes in 50 namespaces, each an endpoint of one service."""
    some = [
        Service(
            name=f"s{i}",
            namespace=f"n{i % 50}",
            hostname=f"s{i}.n{i % 50}.svc.cluster.local",
            vips=(NetworkAddress("", ip_address(0x0A600000 + i)),),
            ports={80: 8080},
            canonical=True,
        )
        for i in range(services)
    ]
    pods = [
        Workload(
            uid=f"Kubernetes//Pod/n{i % 50}/w{i}",
            name=f"w{i}",
            namespace=f"n{i % 50}",
            addresses=(ip_address(0x0A000000 + i),),
            protocol=TunnelProtocol.HBONE,
            service_account=f"a{i % 20}",
            node=f"node-{i % 100}",
            locality=Locality(region="eu", zone=f"eu-{i % 3}"),
            services={some[i % services].key: {80: 8080}},
        )
        for i in range(workloads)
    ]
    return pods, some


def ranges(services: list[Service]) -> list[Service]:
    """The first 30 with a range each, of 30 lengths."""
    return [
        replace(each, cidr_vips=(NetworkCidr("", ip_network(f"192.0.2.0/{length}", strict=False)),))
        for length, each in zip(range(1, 31), services, strict=False)
    ]


def best(call: Callable[[], object], *, times: int, rounds: int = 5) -> float:
    """Seconds of one call."""
    found = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(times):
            call()
        found = min(found, (time.perf_counter() - begin) / times)
    return found


def measure(size: tuple[int, int]) -> float:
    """Prints the figures of one size; returns the seconds of a build."""

    def report(what: str, **figures: float) -> None:
        print(json.dumps({"workloads": size[0], "services": size[1], "what": what, **figures}), flush=True)

    def microseconds(what: str, call: Callable[[], object], *, times: int = 5_000) -> None:
        report(what, us=round(best(call, times=times) * 1e6, 2))

    workloads, services = mesh(*size)
    build = best(lambda: MeshSnapshot.build(workloads, services), times=1)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    snapshot = MeshSnapshot.build(workloads, services)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    report(
        "build", ms=round(build * 1e3, 1), mb=round((after - before) / 1e6, 2), peak_mb=round((peak - before) / 1e6, 2)
    )
    again = mesh(*size)
    report("replaced_by, all equal", ms=round(best(lambda: snapshot.replaced_by(*again), times=1) * 1e3, 1))

    one, some = workloads[len(workloads) // 2], services[len(services) // 2]
    ip, vip, elsewhere = one.addresses[0], some.vips[0].ip, ip_address("192.0.2.1")
    of_ranges = snapshot.with_changes(upsert=ranges(services))
    microseconds("workload_by_address", lambda: snapshot.workload_by_address("", ip))
    microseconds("workload_by_address, unknown", lambda: snapshot.workload_by_address("", elsewhere))
    microseconds("service_by_vip", lambda: snapshot.service_by_vip("", vip, "n1"))
    microseconds("service_by_vip, unknown", lambda: snapshot.service_by_vip("", elsewhere, "n1"))
    microseconds(
        f"service_by_vip, in {len(ranges(services))} ranges", lambda: of_ranges.service_by_vip("", elsewhere, "else")
    )
    microseconds("service_by_hostname", lambda: snapshot.service_by_hostname(some.hostname, "n1"))
    microseconds(
        "find_workload", lambda: snapshot.find_workload(one.namespace, one.name, one.service_account, one.node)
    )
    microseconds("endpoints", lambda: snapshot.endpoints(some))
    microseconds("services_of", lambda: snapshot.services_of(one))

    ill = [replace(each, status=HealthStatus.UNHEALTHY) for each in workloads[: len(workloads) // 10]]
    equal, other = replace(one), replace(some, canonical=False)
    deny = AuthorizationPolicy(name="deny", namespace="n1", scope=Scope.NAMESPACE, action=Action.DENY)
    microseconds("with_changes, one workload", lambda: snapshot.with_changes(upsert=ill[:1]), times=20)
    microseconds("with_changes, one equal workload", lambda: snapshot.with_changes(upsert=(equal,)), times=20)
    microseconds("with_changes, one service", lambda: snapshot.with_changes(upsert=(other,)), times=20)
    microseconds("with_changes, one policy", lambda: snapshot.with_changes(upsert=(deny,)), times=20)
    microseconds(f"with_changes, {len(ill)} workloads", lambda: snapshot.with_changes(upsert=ill), times=1)

    holder: list[object] = [MeshSnapshot.build(workloads, services)]
    begin = time.perf_counter()
    holder.clear()
    report("let go of a snapshot", ms=round((time.perf_counter() - begin) * 1e3, 2))
    return build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a build takes too long")
    arguments = parser.parse_args()
    seconds = [measure(size) for size in SIZES]
    if arguments.check and seconds[-1] > LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    main()
