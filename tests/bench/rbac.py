"""What policies cost: one evaluation, and what has to be worked out before it.

``python tests/bench/rbac.py`` prints JSON lines: microseconds of one evaluation and seconds of the preparation, for
each kind of policies, with 10 000 policies of 10 rules. ``--check`` exits with 1 when an evaluation takes more than two
milliseconds. ``prepare`` lines: the longest time that an event loop, which ticks every millisecond, was held up while a
thread beside it prepared.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
import tracemalloc
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING

import trio

from hbone.identity import SpiffeIdentity
from hbone.mesh import (
    Action,
    AuthorizationPolicy,
    Match,
    MeshSnapshot,
    Scope,
    ServiceAccount,
    StringMatch,
    StringMatchKind,
    Workload,
)
from hbone.rbac import Authorizer, Flow, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone.mesh import Rule

FLOW = Flow(
    source_ip=ip_address("10.1.2.3"),
    source_identity=SpiffeIdentity.parse("spiffe://cluster.local/ns/shop/sa/cart"),
    destination_ip=ip_address("10.1.9.9"),
    destination_port=8080,
)
SIX = Flow(
    source_ip=ip_address("2001:db8:1:2::3"),
    source_identity=FLOW.source_identity,
    destination_ip=ip_address("2001:db8:9::9"),
    destination_port=8080,
)
PRINCIPAL = "cluster.local/ns/shop/sa/cart"
PLAIN = Flow(source_ip=FLOW.source_ip, source_identity=None, destination_ip=FLOW.destination_ip, destination_port=8080)
LIMIT = 2e-3


def exact(text: str) -> StringMatch:
    return StringMatch(StringMatchKind.EXACT, text)


def prefix(text: str) -> StringMatch:
    return StringMatch(StringMatchKind.PREFIX, text)


def suffix(text: str) -> StringMatch:
    return StringMatch(StringMatchKind.SUFFIX, text)


PRESENT = StringMatch(StringMatchKind.PRESENCE)


def one(match: Match) -> Rule:
    return ((match,),)


def v4(number: int, length: int) -> IPv4Network:
    return IPv4Network((number * 2_654_435_761 % 2**32 >> 32 - length << 32 - length, length))


def around(ip: IPv4Address | IPv6Address, length: int) -> IPv4Network | IPv6Network:
    """The network of that length that an address is in."""
    bits = ip.max_prefixlen
    kind = IPv4Network if bits == 32 else IPv6Network
    return kind((int(ip) >> bits - length << bits - length, length))


def mixed(n: int) -> Rule:
    """Whatever people write, all at once."""
    r = random.Random(n)
    port = r.choice((8080, 9090, 9091))
    return (
        (
            Match(principals=(exact(f"cluster.local/ns/n{n % 500}/sa/a{n}"), prefix("cluster.local/ns/shop/"))),
            Match(namespaces=(exact(f"n{n % 500}"), suffix("op")), destination_ports=(port,)),
        ),
        (
            Match(source_ips=(v4(n, r.randrange(8, 33)), around(FLOW.source_ip, 8)), not_source_ips=(v4(n, 24),)),
            Match(not_destination_ports=(n % 65536,), not_namespaces=(exact("evil"),)),
        ),
        (
            Match(service_accounts=(ServiceAccount(namespace=f"n{n % 500}", service_account=f"a{n}"),)),
            Match(not_principals=(PRESENT,)),
        ),
    )


def one_of_each(n: int) -> Rule:
    """A rule as most are: one match of a principal, a port and a network."""
    return one(
        Match(
            principals=(exact(f"cluster.local/ns/n{n % 500}/sa/a{n}"),),
            destination_ports=(8000 + n % 50,),
            source_ips=(v4(n, 8 + n % 25),),
        )
    )


#: What each rule says; its number is n, 0 to 99 999.
RULES: dict[str, tuple[Callable[[int], Rule], Flow]] = {
    "exact principals, none fits": (lambda n: one(Match(principals=(exact(f"cluster.local/ns/x/sa/a{n}"),))), FLOW),
    "exact principals, all fit": (lambda n: one(Match(principals=(exact(PRINCIPAL),))), FLOW),
    "principals by prefix, 30 lengths, all fit": (
        lambda n: one(Match(principals=(prefix(PRINCIPAL[: n % 30]),))),
        FLOW,
    ),
    "principals by suffix, 30 lengths, all fit": (
        lambda n: one(Match(principals=(suffix(PRINCIPAL[n % 30 :]),))),
        FLOW,
    ),
    "principals by prefix, 100 000 different": (lambda n: one(Match(principals=(prefix(f"{PRINCIPAL}{n}/"),))), FLOW),
    "namespaces present": (lambda n: one(Match(namespaces=(PRESENT,))), FLOW),
    "service accounts": (
        lambda n: one(
            Match(service_accounts=(ServiceAccount(namespace="shop", service_account="cart" if n % 2 else f"a{n}"),))
        ),
        FLOW,
    ),
    "source IPs, 100 000 networks": (lambda n: one(Match(source_ips=(v4(n, 8 + n % 25),))), FLOW),
    "source IPs, 25 networks around it": (
        lambda n: one(Match(source_ips=(around(FLOW.source_ip, 8 + n % 25),))),
        FLOW,
    ),
    "source IPs, 129 IPv6 networks around it": (
        lambda n: one(Match(source_ips=(around(SIX.source_ip, n % 129),))),
        SIX,
    ),
    "source IPs, 129 IPv6 networks around it, 100 rules each": (
        lambda n: one(
            Match(source_ips=(around(SIX.source_ip, n % 129),) if n < 12_900 else (IPv6Network((n << 80, 48)),))
        ),
        SIX,
    ),
    "destination IPs and ports": (
        lambda n: one(Match(destination_ips=(around(FLOW.destination_ip, 24),), destination_ports=(n % 65536,))),
        FLOW,
    ),
    "not principals, none of them": (
        lambda n: one(Match(not_principals=(exact(f"cluster.local/ns/x/sa/a{n}"),))),
        FLOW,
    ),
    "not principals, all of them": (lambda n: one(Match(not_principals=(exact(PRINCIPAL),))), FLOW),
    "not present, plain text": (lambda n: one(Match(not_principals=(PRESENT,))), PLAIN),
    "not source IPs, 25 lengths": (lambda n: one(Match(not_source_ips=(v4(n, 8 + n % 25),))), FLOW),
    "all twelve fields": (
        lambda n: one(
            Match(
                namespaces=(exact("shop"), exact(f"n{n}")),
                not_namespaces=(exact(f"n{n}"),),
                service_accounts=(ServiceAccount(namespace="shop", service_account="cart"),),
                not_service_accounts=(ServiceAccount(namespace="shop", service_account=f"a{n}"),),
                principals=(prefix("cluster.local/"), exact(f"a{n}")),
                not_principals=(suffix(f"a{n}"),),
                source_ips=(around(FLOW.source_ip, 16), v4(n, 24)),
                not_source_ips=(v4(n, 30),),
                destination_ips=(around(FLOW.destination_ip, 24),),
                not_destination_ips=(v4(n, 32),),
                destination_ports=(8080, n % 65536),
                not_destination_ports=(n % 60000 + 1,),
            )
        ),
        FLOW,
    ),
    "three clauses of two matches": (mixed, FLOW),
    "only the last rule of each fits": (lambda n: one(Match(destination_ports=(8080 if n % 10 == 9 else 1,))), FLOW),
}


def policies(
    rule: Callable[[int], Rule],
    count: int,
    *,
    action: Action = Action.DENY,
    scope: Scope = Scope.GLOBAL,
    dry: bool = False,
) -> list[AuthorizationPolicy]:
    return [
        AuthorizationPolicy(
            name=f"p{number}",
            namespace="shop",
            scope=scope,
            action=action,
            dry_run=dry,
            rules=tuple(rule(number * 10 + which) for which in range(10)),
        )
        for number in range(count)
    ]


def cases(count: int) -> dict[str, tuple[Callable[[], list[AuthorizationPolicy]], Flow]]:
    found = {name: (lambda rule=rule: policies(rule, count), flow) for name, (rule, flow) in RULES.items()}
    everything, nothing, mix = (
        RULES[name][0]
        for name in ("exact principals, all fit", "exact principals, none fits", "three clauses of two matches")
    )
    found["dry run, all fit"] = (lambda: policies(everything, count, dry=True), FLOW)
    found["allow, none fits"] = (lambda: policies(nothing, count, action=Action.ALLOW), FLOW)
    selected = Scope.WORKLOAD_SELECTOR
    found["selected by the workload, allow, mixed"] = (
        lambda: policies(mix, count, action=Action.ALLOW, scope=selected),
        FLOW,
    )
    return found


def best_of(work: Callable[[], object], *, runs: int = 20, each: float = 0.005) -> float:
    """Processor seconds of one call, in the best of some runs."""
    best = float("inf")
    for _ in range(runs):
        calls = 0
        began = time.thread_time()
        while True:
            work()
            calls += 1
            took = time.thread_time() - began
            if took >= each:
                break
        best = min(best, took / calls)
    return best


def measure(name: str, made: list[AuthorizationPolicy], flow: Flow, *, memory: bool) -> float:
    snapshot = MeshSnapshot.build(policies=made)
    named = tuple(sorted(snapshot.policies)) if made[0].scope is Scope.WORKLOAD_SELECTOR else ()
    workload = Workload(uid="w", name="w", namespace="shop", authorization_policies=named)
    authorizer = Authorizer()
    began = time.thread_time()
    authorizer.prepare(snapshot, [workload])
    prepared = time.thread_time() - began
    verdict = authorizer.authorize(snapshot, workload, flow)
    evaluation = best_of(lambda: authorizer.authorize(snapshot, workload, flow))
    line: dict[str, object] = {
        "what": name,
        "evaluation_us": round(evaluation * 1e6, 1),
        "prepare_s": round(prepared, 2),
        "verdict": shown(verdict),
    }
    if memory:
        tracemalloc.start()
        again = Authorizer()
        again.prepare(snapshot, [workload])
        line["kept_mb"], line["peak_mb"] = (round(size / 1e6, 1) for size in tracemalloc.get_traced_memory())
        tracemalloc.stop()
    print(json.dumps(line), flush=True)
    return evaluation


def shown(verdict: Verdict) -> str:
    return verdict.reason + (f", {len(verdict.dry_run)} in dry run" if verdict.dry_run else "")


def measure_small() -> None:
    """What a connection pays in a mesh of everyday size."""
    rule = RULES["exact principals, none fits"][0]
    for count in (0, 1, 10, 100, 1000):
        snapshot = MeshSnapshot.build(policies=policies(rule, count, scope=Scope.NAMESPACE))
        workload = Workload(uid="w", name="w", namespace="shop")
        authorizer = Authorizer()
        took = best_of(lambda a=authorizer, s=snapshot, w=workload: a.authorize(s, w, FLOW))
        print(json.dumps({"what": f"{count} policies of 10 rules", "evaluation_us": round(took * 1e6, 1)}), flush=True)


def measure_beside_loop(name: str, made: list[AuthorizationPolicy], pause: Callable[[], object] | None) -> None:
    snapshot = MeshSnapshot.build(policies=made)
    authorizer = Authorizer()

    async def ticks(ends: trio.Event) -> list[float]:
        late = []
        while not ends.is_set():
            began = time.perf_counter()
            await trio.sleep(0.001)
            late.append(time.perf_counter() - began - 0.001)
        return late

    async def run() -> None:
        found: list[float] = []
        quiet = trio.Event()
        done = trio.Event()

        async def tick() -> None:
            async with trio.open_nursery() as nursery:

                async def calm() -> None:
                    await trio.sleep(0.5)
                    quiet.set()

                nursery.start_soon(calm)
                alone.extend(await ticks(quiet))
            started.set()
            found.extend(await ticks(done))

        began_collecting = collecting = 0.0

        def watch(phase: str, _info: dict[str, int]) -> None:
            nonlocal began_collecting, collecting
            if phase == "start":
                began_collecting = time.perf_counter()
            else:
                collecting = max(collecting, time.perf_counter() - began_collecting)

        gc.callbacks.append(watch)
        alone: list[float] = []
        started = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tick)
            await started.wait()
            began = time.perf_counter()
            await trio.to_thread.run_sync(lambda: authorizer.prepare(snapshot, pause=pause))
            took = time.perf_counter() - began
            done.set()
        gc.callbacks.remove(watch)
        found.sort()
        line = {
            "what": name,
            "prepare_s": round(took, 2),
            "late_ms_max": round(found[-1] * 1e3, 1),
            "late_ms_99": round(found[len(found) * 99 // 100] * 1e3, 1),
            "late_ms_median": round(found[len(found) // 2] * 1e3, 2),
            "late_ms_max_alone": round(max(alone) * 1e3, 1),
            "gc_ms_max": round(collecting * 1e3, 1),
        }
        print(json.dumps(line), flush=True)

    trio.run(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", type=int, default=10_000, help="of ten rules each")
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--memory", action="store_true", help="measure that too (slow)")
    parser.add_argument("--check", action="store_true", help="fail when an evaluation takes more than 2 ms")
    options = parser.parse_args()
    slow = []
    for name, (make, flow) in cases(options.policies).items():
        if options.only in name and measure(name, make(), flow, memory=options.memory) > LIMIT:
            slow.append(name)
    if options.only in "small":
        measure_small()
    if options.only in "beside a loop":
        made = policies(one_of_each, options.policies)
        gc.collect()
        gc.freeze()  # as a node does after loading its mesh
        for name, pause in (
            ("never pauses", None),
            ("sleeps 0 s", lambda: time.sleep(0)),
            ("sleeps 0.1 ms", lambda: time.sleep(1e-4)),
            ("sleeps 0.5 ms", lambda: time.sleep(5e-4)),
        ):
            measure_beside_loop(f"prepare beside a loop, {name}", made, pause)
    if options.check and slow:
        sys.exit(f"more than {LIMIT * 1e3:g} ms: {', '.join(slow)}")


if __name__ == "__main__":
    main()
