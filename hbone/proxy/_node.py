"""A node of an ambient mesh: both proxies, a picture of the mesh, policy, certificates and telemetry, in one process.

Theory of operation
===================

*Start.* The mesh is loaded first: what is wrong with it is an error before anything listens. Then the pages for probes
and people open, then the certificates of the served workloads are asked for, and waited for a little, so that the first
connection need not wait; then the data plane listens. Each of these steps is a named blocker of readiness. Ports that
are taken are all reported at once.

*Change.* The mesh file fills a `MeshState` of its own. One task takes each new snapshot from there, lets a thread
prepare its policies, and only then makes it the node's mesh: one assignment, seen by everything at once. What follows
(judging open connections again, certificates for workloads that came, the end of pools of those that went) is told by
`MeshState.subscribe`.

*End.* `Node.drain` closes the listeners, says GOAWAY, refuses new tunnels with REFUSED_STREAM, and gives the open ones
some time. The pages stay, with "draining" as a blocker of readiness, until the block is left.

Everything here is wiring. What it wires are public names of the packages below, so that a program can wire them in
another way.
"""

from __future__ import annotations

import errno
import logging
import random
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

import trio

from hbone.address import Endpoint
from hbone.admin import AdminServer, Readiness, json_response, logging_route, quit_route, standard_routes
from hbone.certs import FileSvidSource, LocalCA, SvidManager, SvidState, local_ca_issuer
from hbone.control import full_collections_wait
from hbone.errors import (
    CertificateUnavailable,
    ConfigError,
    ConfigFault,
    InvalidCertificate,
    ListenFailed,
    MeshConfigError,
)
from hbone.mesh import Action, MeshState
from hbone.proxy._config_dump import config_dump
from hbone.proxy._connections import ConnectionTable
from hbone.proxy._context import LocalWorkloads, NodeContext
from hbone.proxy._debug import pool_json, sessions_json, tunnels_json
from hbone.proxy._node_config import ProxyMode
from hbone.proxy._node_inbound import NodeInbound
from hbone.proxy._node_outbound import NodeOutbound
from hbone.proxy._node_plaintext import NodePlaintext
from hbone.proxy._prefetch import Prefetch, identities_of
from hbone.rbac import Authorizer
from hbone.routing import ILLEGAL_PORTS, Router, RoutingConfig
from hbone.transport import listen_tcp, set_transparent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
    from types import TracebackType

    from hbone.admin import AdminRequest, AdminResponse, Handler, Levels, Route
    from hbone.certs import SvidStatus
    from hbone.control import FileMeshSource
    from hbone.identity import SpiffeIdentity
    from hbone.mesh import MeshSnapshot
    from hbone.proxy._node_config import NodeConfig
    from hbone.proxy._node_values import ListenAddress
    from hbone.rbac import Verdict
    from hbone.telemetry import AccessLog, Metrics
    from hbone.tls import Svid

__all__ = ["Node", "NodeStatistics"]

_log: Final = logging.getLogger("hbone.proxy.node")
_readiness_log: Final = logging.getLogger("hbone.readiness")

_ADDRESSES_EVERY: Final = 10.0
#: Looking for the addresses of ten thousand workloads must not become work without end.
_ADDRESSES_REST: Final = 50
#: A machine without IPv6 says one of these.
_NO_SUCH_FAMILY: Final = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT)

#: Under whose name a listener says that it is there, as ztunnel has it.
_SCOPES: Final = {
    "inbound": "hbone.proxy.inbound",
    "inbound plaintext": "hbone.proxy.inbound_passthrough",
    "outbound": "hbone.proxy.outbound",
    "socks5": "hbone.proxy.socks5",
    "http proxy": "hbone.proxy.http_connect",
}

_STATE, _CERTIFICATES, _PROXY, _DRAINING = "state manager", "certificates", "proxy", "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatistics:
    """A node, now."""

    outbound: int
    """Connections of applications."""
    plaintext: int
    """Connections to applications without HBONE."""
    tunnels: int
    """Tunnels to applications."""
    sessions: int
    """Sessions that peers have opened."""

    @property
    def live(self) -> int:
        """All connections."""
        return self.outbound + self.plaintext + self.tunnels


class Node:
    """A node that serves as long as its ``async with`` block lasts. Entering it waits until it listens.

    Leaving the block ends everything at once; `drain` before that ends it in good order. What is raised in the block
    comes out as it is.

    Args:
        config: what it is told.
        mesh: the mesh to begin with, instead of the one that `config` names; then it changes by `Node.mesh` only.
        access_log: one line for each connection; none without.
        metrics: where to count; its own when None.
        log_levels: what ``/logging`` changes; without, there is no such page.
        random: draws from 0 up to 1, for load balancing.

    Attributes:
        config: what it was told.
        mesh: what it knows of the mesh. Another snapshot put in here is in force at once.
        readiness: what it still waits for.
        ready: set when it waits for nothing any more.
        metrics: where it counts.
        addresses: where it listens, by listener.
        stop_requested: set when somebody has asked for the end, by ``/quitquitquit``; what becomes of that is for the
            program to decide.
    """

    def __init__(
        self,
        config: NodeConfig,
        *,
        mesh: MeshSnapshot | None = None,
        access_log: AccessLog | None = None,
        metrics: Metrics | None = None,
        log_levels: Levels | None = None,
        random: Callable[[], float] = random.random,
    ) -> None:
        if metrics is None:
            from hbone.telemetry import Metrics

            metrics = Metrics(version=config.istio_version)
        self.config = config
        self.mesh: MeshState = MeshState()
        self.metrics = metrics
        self.readiness: Readiness = Readiness([_STATE, _CERTIFICATES, _PROXY])
        self.addresses: dict[str, tuple[Endpoint, ...]] = {}
        self.ready: trio.Event = trio.Event()
        self.stop_requested: trio.Event = trio.Event()
        self._given = mesh
        self._access_log = access_log
        self._log_levels = log_levels
        self._random = random
        self._coming = MeshState()
        self._source: FileMeshSource | None = None
        self._files: FileSvidSource | None = None
        self._certificates_changed = trio.Event()
        self._stack: AsyncExitStack | None = None
        self._began = 0.0

    # === life ===

    async def __aenter__(self) -> Self:
        """Start.

        Raises:
            ConfigError: the settings do not go together.
            MeshConfigError: the mesh cannot be used; has every fault.
            InvalidCertificate: there is nothing to get certificates from.
            ListenFailed: some addresses cannot be listened on; has all of them.
        """
        self._began = trio.current_time()
        self.config.check(mesh=self._given is None)
        self._say_what_it_was_told()
        await self._load_mesh()
        self._make_parts()
        await self._prepare(self.mesh.snapshot)
        async with AsyncExitStack() as stack:
            stack.callback(self.metrics.add_certificates(self._svids.summary))
            background = await stack.enter_async_context(_nursery())
            outbound = self._outbound = await stack.enter_async_context(NodeOutbound(self._context))
            serving = await stack.enter_async_context(_nursery())
            problems: list[tuple[str, str, OSError]] = []
            self._serve_pages(background, problems)
            await self._run_parts(background)
            if not problems:
                self._unblock(_STATE)
                await self._wait_for_certificates()
            await self._serve_data_plane(serving, outbound, problems)
            if problems:
                raise ListenFailed(problems)
            self._unblock(_PROXY)
            background.start_soon(self._watch_certificates)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        assert self._stack is not None
        return await self._stack.__aexit__(kind, problem, traceback)

    async def drain(self, deadline: float | None = None) -> None:
        """Stop in good order: see the module.

        Args:
            deadline: seconds that open connections get; what the configuration says when None.
        """
        seconds = self.config.drain_deadline if deadline is None else deadline
        self.readiness.block(_DRAINING)
        _log.info("draining", extra={"fields": {"connections": self.statistics().live, "deadline": seconds}})
        async with trio.open_nursery() as nursery:
            for part in (self._outbound, self._inbound, self._plaintext):
                nursery.start_soon(part.drain, seconds)

    def statistics(self) -> NodeStatistics:
        """How much goes on."""
        server = self._inbound.server.statistics()
        return NodeStatistics(
            outbound=self._outbound.connections,
            plaintext=self._plaintext.connections,
            tunnels=server.tunnels,
            sessions=server.sessions,
        )

    def _say_what_it_was_told(self) -> None:
        config = self.config
        for note in config.notes:
            _log.info("%s", note)
        who = f"as {config.workload}" if config.mode is ProxyMode.DEDICATED else "as the workload of its address"
        for name, address, what in (
            ("socks5", config.socks5, f"goes through the mesh {who}"),
            ("http proxy", config.http_proxy, f"goes through the mesh {who}"),
            ("admin", config.admin, "sees the configuration and can stop the node"),
        ):
            if address is not None and not address.local:
                _log.warning("%s on %s: whoever reaches it %s; localhost keeps it to this machine", name, address, what)

    # === the mesh ===

    async def _load_mesh(self) -> None:
        config = self.config
        if self._given is not None:
            self._coming.replace(self._given)
        elif config.mesh is not None:
            from hbone.control import FileMeshSource

            self._source = FileMeshSource(
                config.mesh,
                self._coming,
                on_faults=self._mesh_faults,
                on_read=lambda status: self.metrics.mesh_read(len(status.faults), used=status.used),
                poll_interval=config.mesh_interval,
            )
            await self._source.load()
        else:
            from hbone.mesh import parse_mesh

            assert config.mesh_text is not None
            parsed = await trio.to_thread.run_sync(partial(parse_mesh, config.mesh_text, source="LOCAL_XDS"))
            if parsed.faults:
                raise MeshConfigError(parsed.faults)
            self._mesh_warnings(parsed.warnings)
            self._coming.replace(parsed.snapshot())
        self.mesh.replace(self._coming.snapshot)
        _log.info("mesh loaded", extra={"fields": _counts(self.mesh.snapshot)})

    def _mesh_faults(self, faults: Iterable[object]) -> None:
        good = True
        for fault in faults:
            good = False
            _log.error("mesh file: %s", fault)
        if good:
            _log.info("the mesh file is right again")

    def _mesh_warnings(self, warnings: Iterable[object]) -> None:
        for warning in warnings:
            _log.warning("mesh file: %s", warning)

    async def _follow_mesh(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Takes over the newest snapshot that has come, when its policies are prepared."""
        changed = trio.Event()
        waiting = ExitStack()

        def note(_old: MeshSnapshot, _new: MeshSnapshot) -> None:
            # Not only while the file is read: until the old mesh is gone.
            waiting.enter_context(full_collections_wait())
            changed.set()

        unsubscribe = self._coming.subscribe(note)
        try:
            task_status.started()
            while True:
                await changed.wait()
                changed = trio.Event()
                with waiting.pop_all():
                    await self._take(self._coming.snapshot)
        finally:
            unsubscribe()
            waiting.close()

    async def _take(self, snapshot: MeshSnapshot) -> None:
        await self._prepare(snapshot)
        try:
            self.mesh.replace(snapshot)
        except ExceptionGroup:  # the snapshot is in force, and all others have been told
            _log.exception("a part of the node could not take the new mesh")
        _log.info("mesh changed", extra={"fields": _counts(snapshot)})

    async def _prepare(self, snapshot: MeshSnapshot) -> None:
        """Work out ahead, in a thread, what takes time in a large mesh."""
        served = await self._prefetch.look(snapshot)
        try:
            await trio.to_thread.run_sync(partial(self._authorizer.prepare, snapshot, served, pause=_pause))
        except Exception:  # noqa: BLE001 - whom it concerns is not let in; all others are
            _log.exception("the policies of the mesh could not be prepared")

    def _local(self, mesh: MeshState) -> LocalWorkloads:
        config = self.config
        return LocalWorkloads(
            mesh,
            network=config.network,
            dedicated=config.workload if config.mode is ProxyMode.DEDICATED else None,
            node=config.node_name,
        )

    def _mesh_changed(self, _old: MeshSnapshot, new: MeshSnapshot) -> None:
        """Certificates for whom we serve now, pools for no others."""
        self._want(new)
        self._outbound.retain(self._prefetch.identities(new))

    def _want(self, snapshot: MeshSnapshot) -> None:
        wanted, kept = self._prefetch.ahead(snapshot), self._svids.identities
        # Those that were asked for by a connection are kept as long as they are served.
        asked = (kept - wanted) & self._prefetch.identities(snapshot)
        if kept != wanted | asked:
            self._svids.want(sorted(wanted | asked, key=str))

    async def _follow_addresses(self) -> None:
        """An address may come to this machine later than its workload to the mesh."""
        pause = _ADDRESSES_EVERY
        while True:
            await trio.sleep(pause)
            began = trio.current_time()
            snapshot = self.mesh.snapshot
            await self._prefetch.look(snapshot)
            if snapshot is self.mesh.snapshot:
                self._want(snapshot)
            pause = max(_ADDRESSES_EVERY, _ADDRESSES_REST * (trio.current_time() - began))

    # === parts ===

    def _make_parts(self) -> None:
        config = self.config
        self._authorizer = Authorizer()
        self._prefetch = Prefetch(
            lambda snapshot: self._local(MeshState(snapshot)).served(),
            all_nodes=config.mode is ProxyMode.SHARED and config.node_name is None,
            pause=_pause,
        )
        self._svids = SvidManager(self._issuer(), on_change=self._certificate_changed)
        connections = ConnectionTable(
            self.mesh,
            self._authorizer,
            log_level=logging.INFO if config.log_policies else logging.DEBUG,
            on_verdict=self._count_verdict,
        )
        routing = RoutingConfig(
            network=config.network,
            hbone_port=config.hbone_port,
            illegal_ports=ILLEGAL_PORTS.union(_ports(config.outbound, config.plaintext, config.inbound, config.socks5)),
            localhost_app_tunnel=config.localhost_app_tunnel,
        )
        self._context = NodeContext(
            mesh=self.mesh,
            router=Router(routing, self._random),
            authorizer=self._authorizer,
            svids=self._svids,
            local=self._local(self.mesh),
            connections=connections,
            metrics=self.metrics,
            access_log=self._access_log,
            settings=config.settings(),
        )
        self._inbound = NodeInbound(self._context)
        self._plaintext = NodePlaintext(self._context)

    async def _run_parts(self, nursery: trio.Nursery) -> None:
        snapshot = self.mesh.snapshot
        if not self._context.local.served():
            whom = self.config.workload or (f"node {self.config.node_name}" if self.config.node_name else "any address")
            _log.warning("the mesh has no workload for this node: %s; nothing can be served until it has", whom)
        self._want(snapshot)
        self.mesh.subscribe(self._mesh_changed)
        await nursery.start(self._svids.run)
        await nursery.start(self._context.connections.watch)
        await nursery.start(self._follow_mesh)
        if self._files is not None:
            await nursery.start(self._files.run)
        if self._source is not None:
            nursery.start_soon(self._source.run)
        nursery.start_soon(self._follow_addresses)

    def _count_verdict(self, verdict: Verdict) -> None:
        self.metrics.policy_verdict("allow" if verdict.allowed else "deny")
        for match in verdict.dry_run:
            self.metrics.policy_verdict("deny" if match.action is Action.DENY else "allow", dry_run=True)

    # === certificates ===

    def _issuer(self) -> Callable[[SpiffeIdentity], Awaitable[Svid]]:
        from datetime import timedelta

        config = self.config
        if config.fake_ca:
            assert config.ca_dir is not None
            if config.trust_domain is not None:
                ca = LocalCA.open_or_create(config.ca_dir, trust_domain=config.trust_domain)
            else:
                ca = _open_or_create(config.ca_dir)
            return local_ca_issuer(ca, ttl=timedelta(seconds=config.secret_ttl))
        assert config.cert is not None
        assert config.key is not None
        assert config.roots is not None
        files = self._files = FileSvidSource(
            config.cert,
            config.key,
            config.roots,
            on_reload=self._files_reloaded,
            on_error=self._files_useless,
        )
        self._check_identity(files.identity)

        async def issue(identity: SpiffeIdentity) -> Svid:
            await trio.lowlevel.checkpoint()
            if identity != files.identity:
                raise CertificateUnavailable(identity, f"the certificate files are of {files.identity}")
            if files.last_error is not None:
                raise InvalidCertificate(str(files.last_error))
            return files.current()

        return issue

    def _check_identity(self, identity: SpiffeIdentity) -> None:
        """Files must be of the one workload; the mesh says who that is, if it knows it already."""
        workload = self.config.workload
        assert workload is not None
        served = identities_of(self._local(self.mesh).served())
        if served:
            right, wanted = identity in served, " or ".join(map(str, served))
        else:
            right = (identity.namespace, identity.service_account) == (workload.namespace, workload.service_account)
            wanted = f"service account {workload.service_account} of namespace {workload.namespace}"
        if not right:
            raise ConfigError(
                [
                    ConfigFault(
                        source=f"HBONE_CERT: {self.config.cert}",
                        problem=f"is of {identity}, and the workload {workload} is {wanted}",
                        advice="give the certificate of that workload",
                    )
                ]
            )

    def _files_reloaded(self, svid: Svid) -> None:
        self._svids.renew(svid.identity)

    def _files_useless(self, problem: InvalidCertificate) -> None:
        _log.error("certificate files not taken, the old ones stay in use: %s", problem)
        assert self._files is not None
        self._svids.renew(self._files.identity)  # which fails, and is shown

    def _certificate_changed(self, status: SvidStatus) -> None:
        fields = {"identity": status.identity}
        until = None if status.svid is None else f"{status.svid.not_after:%Y-%m-%dT%H:%M:%SZ}"
        if status.renewal_fails:
            failed = {**fields, "until": until, "error": status.problem}
            _log.warning("certificate not renewed, the old one stays in use", extra={"fields": failed})
        elif status.problem is not None:
            _log.warning("no certificate", extra={"fields": {**fields, "error": status.problem}})
        elif until is not None:
            _log.debug("certificate available", extra={"fields": {**fields, "until": until}})
        self._certificates_changed.set()

    def _certificates_missing(self) -> bool:
        """Whether somebody has not been answered yet, or nobody got one."""
        if self._svids.unanswered:
            return True
        states = [status.state for status in self._svids.states()]
        return bool(states) and SvidState.AVAILABLE not in states

    async def _wait_for_certificates(self) -> None:
        with trio.move_on_after(self.config.start_timeout):
            while self._svids.unanswered:
                self._certificates_changed = trio.Event()
                await self._certificates_changed.wait()

    async def _watch_certificates(self) -> None:
        while self._certificates_missing():
            self._certificates_changed = trio.Event()
            await self._certificates_changed.wait()
        self._unblock(_CERTIFICATES)

    def _unblock(self, blocker: str) -> None:
        self.readiness.unblock(blocker)
        left = len(self.readiness.blockers)
        took = f"Task '{blocker}' complete ({1000 * (trio.current_time() - self._began):.3f}ms)"
        if left:
            _readiness_log.info("%s, still awaiting %d tasks", took, left)
        else:
            _readiness_log.info("%s, marking server ready", took)
            self.ready.set()

    # === listening ===

    async def _serve_data_plane(
        self, nursery: trio.Nursery, outbound: NodeOutbound, problems: list[tuple[str, str, OSError]]
    ) -> None:
        config = self.config
        captured = sys.platform == "linux"
        if not captured:
            _log.info("captured connections need Linux: outbound and plaintext do not listen")
        transparent = config.orig_src
        if transparent is None:
            transparent = captured and _may_be_transparent()
        # Peers' port first: what is dialled there can depend on it.
        await self._listen(nursery, "inbound", config.inbound, self._inbound.serve, problems, transparent=False)
        if config.hbone_port == 0 and "inbound" in self.addresses:
            router = self._context.router
            bound = replace(router.config, hbone_port=self.addresses["inbound"][0].port)
            self._context.router = Router(bound, self._random)
        if captured:
            serve = partial(self._plaintext.serve, transparent=transparent)
            await self._listen(nursery, "inbound plaintext", config.plaintext, serve, problems, transparent)
            serve = partial(outbound.serve_captured, transparent=transparent)
            await self._listen(nursery, "outbound", config.outbound, serve, problems, transparent)
        await self._listen(nursery, "socks5", config.socks5, outbound.serve_socks, problems)
        await self._listen(nursery, "http proxy", config.http_proxy, outbound.serve_http_connect, problems)
        for name in ("socks5", "http proxy"):
            self._context.own_ports.update(endpoint.port for endpoint in self.addresses.get(name, ()))

    async def _listen(
        self,
        nursery: trio.Nursery,
        name: str,
        address: ListenAddress | None,
        serve: Callable[..., Awaitable[None]],
        problems: list[tuple[str, str, OSError]],
        transparent: bool | None = None,
    ) -> None:
        if address is None:
            return
        bound: list[Endpoint] = []
        hosts = _Hosts(address, ipv6=self.config.ipv6)
        for host in hosts:
            try:
                bound.append(await nursery.start(serve, host, address.port))
            except OSError as problem:
                if not hosts.absent(problem):
                    problems.append((name, str(address), problem))
        self._listening(name, bound, transparent)

    def _listening(self, name: str, bound: list[Endpoint], transparent: bool | None = None) -> None:
        if bound:
            self.addresses[name] = tuple(bound)
        log = logging.getLogger(_SCOPES.get(name, "hbone.admin"))
        for endpoint in bound:
            fields = {"address": endpoint, "component": name, "transparent": transparent}
            log.info("listener established", extra={"fields": fields})

    # === pages ===

    def _serve_pages(self, nursery: trio.Nursery, problems: list[tuple[str, str, OSError]]) -> None:
        config = self.config
        routes = self._routes()
        stats = {path: routes[path] for path in ("/metrics", "/stats/prometheus")}
        ready = {path: routes[path] for path in ("/healthz/ready",)}
        for name, address, pages in (
            ("readiness", config.readiness, ready),
            ("stats", config.stats, stats),
            ("admin", config.admin, routes),
        ):
            if address is None:
                continue
            server = AdminServer(pages)
            bound: list[Endpoint] = []
            hosts = _Hosts(address, ipv6=config.ipv6)
            for host in hosts:
                try:
                    listener = listen_tcp(host, address.port)
                except OSError as problem:
                    if not hosts.absent(problem):
                        problems.append((name, str(address), problem))
                    continue
                endpoint = Endpoint.from_sockaddr(listener.getsockname())
                bound.append(endpoint)
                nursery.start_soon(_serve_http, server, listener, endpoint.ip.is_loopback)
            self._listening(name, bound)

    def _routes(self) -> Mapping[str, Handler | Route]:
        more: dict[str, Handler | Route] = {
            "/config_dump": self._config_dump,
            "/debug/mesh": lambda _: json_response(self._mesh_status()),
            "/debug/pool": lambda _: json_response(pool_json(self._outbound.pools)),
            "/debug/sessions": lambda _: json_response(
                sessions_json(self._outbound.pools, self._inbound.server.sessions, self._inbound.server.statistics())
            ),
            "/debug/tunnels": lambda _: json_response(
                tunnels_json(self._outbound_connections(), self._inbound.server.sessions)
            ),
            "/quitquitquit": quit_route(self.stop_requested.set),
        }
        if self._log_levels is not None:
            more["/logging"] = logging_route(self._log_levels)
        return standard_routes(
            render_metrics=self.metrics.render, readiness=self.readiness, title="hbone node", more=more
        )

    def _mesh_status(self) -> dict[str, Any]:
        """What is in force, and what became of the file."""
        source = None
        if self._source is not None:
            status = self._source.status
            source = {
                "faults": list(map(str, status.faults)),
                "path": status.path,
                "policies": status.policies,
                "readAt": f"{status.read_at:%Y-%m-%dT%H:%M:%SZ}" if status.read_at is not None else None,
                "seconds": round(status.seconds, 3),
                "services": status.services,
                "used": status.used,
                "warnings": list(map(str, status.warnings)),
                "workloads": status.workloads,
            }
        return {"file": source, "inForce": _counts(self.mesh.snapshot)}

    def _outbound_connections(self) -> tuple[Any, ...]:
        return tuple(self._context.connections.outbound)

    def _config_dump(self, _request: AdminRequest) -> AdminResponse:
        context = self._context
        return json_response(
            config_dump(
                config=self.config,
                snapshot=self.mesh.snapshot,
                certificates=self._svids.states(),
                served=context.local.served(),
                inbound=tuple(context.connections.inbound),
                outbound=self._outbound_connections(),
                up=_PROXY not in self.readiness.blockers,
            )
        )


class _Hosts(Iterator[str]):
    """The IP addresses to bind for one `ListenAddress`; a family that this machine does not have is left out."""

    def __init__(self, address: ListenAddress, *, ipv6: bool) -> None:
        self._hosts = list(address.addresses(ipv6=ipv6))
        self._optional = address.host in ("*", "localhost")
        self._last = ""

    def __next__(self) -> str:
        if not self._hosts:
            raise StopIteration
        self._last = self._hosts.pop(0)
        return self._last

    def absent(self, problem: OSError) -> bool:
        """Whether the last one failed only because there is no IPv6; then what is to be had instead comes next."""
        if not self._optional or ":" not in self._last or problem.errno not in _NO_SUCH_FAMILY:
            return False
        if self._last == "::":
            self._hosts.append("0.0.0.0")  # noqa: S104 - everything, as "::" was
        return True


@asynccontextmanager
async def _nursery() -> AsyncIterator[trio.Nursery]:
    """For what runs until the block is left. One exception comes out as it is, not as a group of one."""
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        only: BaseException = group
        while isinstance(only, BaseExceptionGroup) and len(only.exceptions) == 1:
            only = only.exceptions[0]
        raise only  # noqa: B904 - it is the same failure


async def _serve_http(server: AdminServer, listener: socket.socket, local_only: bool) -> None:
    handler = partial(server.serve_stream, local_only=local_only)
    await trio.serve_listeners(handler, [trio.SocketListener(trio.socket.from_stdlib_socket(listener))])


def _open_or_create(directory: Any) -> LocalCA:
    """The CA in a directory whatever its trust domain is; one of cluster.local if there is none."""
    try:
        return LocalCA.open(directory)
    except InvalidCertificate:
        return LocalCA.open_or_create(directory)


def _may_be_transparent() -> bool:
    """Whether listeners may take TPROXY connections."""
    with socket.socket() as probe:
        try:
            set_transparent(probe)
        except OSError:
            return False
    return True


def _ports(*addresses: ListenAddress | None) -> set[int]:
    return {address.port for address in addresses if address is not None and address.port}


def _counts(snapshot: MeshSnapshot) -> dict[str, int]:
    return {
        "workloads": len(snapshot.workloads),
        "services": len(snapshot.services),
        "policies": len(snapshot.policies),
    }


def _pause() -> None:
    time.sleep(0.0005)
