"""Microseconds of a routing decision: the first of a service, and each one after it, by the number of endpoints.

A first decision works out which endpoints a client may get; `Router` keeps that until one of them changes. Each number
is the best of several runs: what it costs when nothing disturbs it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from ipaddress import ip_address
from typing import TYPE_CHECKING

from hbone import Authority, Endpoint
from hbone.mesh import (
    GatewayAddress,
    LoadBalancer,
    LoadBalancerMode,
    Locality,
    MeshSnapshot,
    NamespacedHostname,
    NetworkAddress,
    RoutingPreference,
    Service,
    TunnelProtocol,
    Workload,
)
from hbone.routing import Router, RoutingConfig, route_inbound

if TYPE_CHECKING:
    from collections.abc import Callable

RUNS = 5
STOCK = NamespacedHostname("shop", "stock.shop.svc.cluster.local")
NEAR = (RoutingPreference.NETWORK, RoutingPreference.REGION, RoutingPreference.ZONE, RoutingPreference.SUBZONE)
CLIENT = Workload(
    uid="bench//Pod/shop/cart-0",
    name="cart-0",
    namespace="shop",
    addresses=(ip_address("10.0.0.1"),),
    protocol=TunnelProtocol.HBONE,
    locality=Locality(region="eu", zone="eu-1"),
)
CONFIG = RoutingConfig()


def mesh(endpoints: int, *, mode: LoadBalancerMode, named: bool, weighted: bool) -> MeshSnapshot:
    """A client and a service with this many endpoints, in ten zones."""
    base = int(ip_address("10.1.0.0"))
    workloads = [
        Workload(
            uid=f"bench//Pod/shop/stock-{index}",
            name=f"stock-{index}",
            namespace="shop",
            addresses=(ip_address(base + index),),
            protocol=TunnelProtocol.HBONE,
            service_account="stock",
            locality=Locality(region="eu", zone=f"eu-{index % 10}"),
            services={STOCK: {80: 8080}},
            capacity=1 + index % 7 if weighted else 1,
        )
        for index in range(endpoints)
    ]
    service = Service(
        name="stock",
        namespace="shop",
        hostname=STOCK.hostname,
        vips=(NetworkAddress("", ip_address("10.96.0.1")),),
        ports={80: 0 if named else 8080},
        load_balancer=LoadBalancer(mode=mode, preferences=NEAR),
    )
    waypoint = Workload(
        uid="bench//Pod/shop/waypoint-0",
        name="waypoint-0",
        namespace="shop",
        addresses=(ip_address("10.0.0.9"),),
        protocol=TunnelProtocol.HBONE,
    )
    guarded = Service(
        name="guarded",
        namespace="shop",
        hostname="guarded.shop.svc.cluster.local",
        vips=(NetworkAddress("", ip_address("10.96.0.2")),),
        ports={80: 8080},
        waypoint=GatewayAddress(destination=NetworkAddress("", ip_address("10.0.0.9")), hbone_mtls_port=15008),
    )
    return MeshSnapshot.build([CLIENT, waypoint, *workloads], [service, guarded])


def best(work: Callable[[], object], count: int) -> float:
    """Seconds of one call."""
    found = float("inf")
    for _ in range(RUNS):
        began = time.perf_counter()
        for _ in range(count):
            work()
        found = min(found, (time.perf_counter() - began) / count)
    return found


def told(what: str, endpoints: int, seconds: float) -> None:
    print(json.dumps({"what": what, "endpoints": endpoints, "us": round(seconds * 1e6, 2)}), flush=True)


def bench_size(endpoints: int, count: int) -> None:
    vip, own = Authority("10.96.0.1", 80), Authority("10.1.0.0", 8080)
    targets = {
        "a VIP": vip,
        "a host name": Authority(STOCK.hostname, 80),
        "a workload": own,
        "through a waypoint": Authority("10.96.0.2", 80),
        "not of the mesh": Authority("192.0.2.1", 443),
    }
    kinds = {
        "all alike": {"mode": LoadBalancerMode.STANDARD, "named": False, "weighted": False},
        "weighted": {"mode": LoadBalancerMode.STANDARD, "named": False, "weighted": True},
        "a named port": {"mode": LoadBalancerMode.STANDARD, "named": True, "weighted": False},
        "ranked": {"mode": LoadBalancerMode.FAILOVER, "named": False, "weighted": False},
    }
    for kind, fields in kinds.items():
        snapshot = mesh(endpoints, **fields)  # type: ignore[arg-type]
        router = Router(CONFIG, random.Random(1).random)

        def first(snapshot: MeshSnapshot = snapshot) -> None:
            Router(CONFIG, random.random).outbound(snapshot, CLIENT, None, vip)
            snapshot.memo.clear()

        told(f"first decision for a VIP, {kind}", endpoints, best(first, max(1, 20_000 // endpoints)))
        router.outbound(snapshot, CLIENT, None, vip)

        def changed(snapshot: MeshSnapshot = snapshot, router: Router = router) -> None:
            # As after a change elsewhere: another snapshot, the same endpoints.
            snapshot.memo.clear()
            router.outbound(snapshot, CLIENT, None, vip)

        told(f"first decision after a change elsewhere, {kind}", endpoints, best(changed, max(1, 20_000 // endpoints)))
        for name, target in targets.items() if kind == "all alike" else (("a VIP", vip),):

            def again(target: Authority = target, snapshot: MeshSnapshot = snapshot, router: Router = router) -> None:
                router.outbound(snapshot, CLIENT, None, target)

            again()
            told(f"decision for {name}, {kind}", endpoints, best(again, count))

        if kind == "all alike":
            workload = snapshot.workloads["bench//Pod/shop/stock-0"]
            dialled = Endpoint.parse("10.1.0.0:15008")
            told(
                "inbound decision",
                endpoints,
                best(
                    lambda snapshot=snapshot, workload=workload, dialled=dialled: route_inbound(  # type: ignore[misc]
                        snapshot, CONFIG, workload=workload, dialled=dialled, authority=own, forwarded_host=None
                    ),
                    count,
                ),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything")
    options = parser.parse_args()
    for endpoints in (10, 1_000, 10_000):
        bench_size(endpoints, 2_000 if options.quick else 20_000)


if __name__ == "__main__":
    main()
