"""What a node can be told, where from, and what comes first: one table of settings, read the same way from everywhere.

A setting is given by an option of ``hbone node``, by a variable of the environment, or in a configuration file, in this
order of precedence; then come what Istio's own documents say (``PROXY_CONFIG``, ``./etc/istio/config/mesh``) and the
default. Which variables there are is the table of `hbone.proxy._node_environment`. Every fault is collected, and
`ConfigError` has them all.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from hbone.errors import ConfigError, ConfigFault
from hbone.proxy._context import NodeSettings, WorkloadInfo
from hbone.proxy._node_values import (
    ListenAddress,
    Reader,
    choice,
    format_duration,
    number,
    read_auto_switch,
    read_duration,
    read_listen,
    read_path,
    read_port,
    read_switch,
    read_text,
    read_trust_domain,
    read_workload,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from hbone.protocol import Limits
    from hbone.transport import PoolLimits, SocketOptions

__all__ = ["GROUPS", "SETTINGS", "NodeConfig", "ProxyMode", "Setting", "node_settings", "settings_table", "shown"]


class ProxyMode(Enum):
    """How connections are told apart; the values are those of ``PROXY_MODE``."""

    SHARED = "shared"
    """By address: the node serves all workloads that the mesh places on it."""
    DEDICATED = "dedicated"
    """All are one workload's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One thing that a node can be told."""

    name: str
    """The field of `NodeConfig`."""
    group: str
    """The heading that it belongs under."""
    read: Reader
    form: str
    """How a value looks, in a word or two for a usage line."""
    words: str
    """What it means, in a sentence or two."""
    option: str
    """Of ``hbone node``."""
    unset: str = ""
    """What it means when nobody says anything, where the default does not tell."""

    @property
    def key(self) -> str:
        """Its name in a configuration file."""
        first, *rest = self.name.split("_")
        return first + "".join(map(str.capitalize, rest))

    @property
    def variable(self) -> str:
        """Its own variable in the environment. Some have others besides, which ztunnel has too."""
        return f"HBONE_NODE_{self.option.removeprefix('--').replace('-', '_').upper()}"

    @property
    def variables(self) -> tuple[str, ...]:
        """Those of ztunnel's variables that give it, and others with a name of their own; the first one wins."""
        from hbone.proxy._node_environment import VARIABLES

        return tuple(variable.name for variable in VARIABLES if variable.setting == self.name)

    @property
    def default(self) -> Any:
        """What it is when nobody says anything."""
        return _FIELDS[self.name].default

    @property
    def default_text(self) -> str:
        """The default as somebody would write it; empty when there is none."""
        return show(self.default)


def show(value: object) -> str:
    """A value as somebody would write it."""
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case float():
            return format_duration(value)
        case Enum():
            return str(value.value)
    return str(value)


_LOOPBACK_SOCKS: Final = ListenAddress("127.0.0.1", 15080)
_ADMIN: Final = ListenAddress("localhost", 15000)
_OUTBOUND, _PLAINTEXT, _INBOUND, _STATS, _READINESS = (
    ListenAddress("*", port) for port in (15001, 15006, 15008, 15020, 15021)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """Everything that a node can be told. The defaults are ztunnel's, but for the SOCKS5 proxy, which is on.

    Made from the environment by `from_environment`, or by hand; `check` says whether it can be run. Times are in
    seconds, sizes in bytes. `node_settings` says what each field means.
    """

    mesh: Path | None = None
    mesh_text: str | None = None
    mesh_interval: float = 1.0
    mode: ProxyMode = ProxyMode.SHARED
    workload: WorkloadInfo | None = None
    node_name: str | None = None
    network: str = ""
    cluster_id: str = "Kubernetes"
    cluster_domain: str = "cluster.local"

    fake_ca: bool = False
    ca_dir: Path | None = None
    trust_domain: str | None = None
    secret_ttl: float = 86400.0
    cert: Path | None = None
    key: Path | None = None
    roots: Path | None = None

    outbound: ListenAddress | None = _OUTBOUND
    plaintext: ListenAddress | None = _PLAINTEXT
    inbound: ListenAddress | None = _INBOUND
    hbone_port: int = 15008
    socks5: ListenAddress | None = _LOOPBACK_SOCKS
    http_proxy: ListenAddress | None = None
    admin: ListenAddress | None = _ADMIN
    stats: ListenAddress | None = _STATS
    readiness: ListenAddress | None = _READINESS
    ipv6: bool = True

    stream_window: int = 4 * 2**20
    connection_window: int = 16 * 2**20
    frame_size: int = 2**20
    pool_streams: int = 100
    pool_idle: float = 300.0
    orig_src: bool | None = None
    response_baggage: bool = True
    localhost_app_tunnel: bool = True

    packet_mark: int | None = None
    keepalive: bool = True
    keepalive_time: float = 180.0
    keepalive_interval: float = 180.0
    keepalive_retries: int = 9
    user_timeout: bool = False

    drain_deadline: float = 5.0
    start_timeout: float = 10.0

    log_format: str = "plain"
    log_level: str = "info"
    log_policies: bool = False
    istio_version: str = "unknown"

    proxy_metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    """What ``proxyMetadata`` of Istio's documents says: shown, never used."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What was said and has no effect, with why: one line each for the log."""

    @classmethod
    def from_environment(
        cls,
        environ: Mapping[str, str],
        *,
        config_file: Path | str | None = None,
        overrides: Mapping[str, object] | None = None,
        mesh_config: Path | str | None = "etc/istio/config/mesh",
    ) -> NodeConfig:
        """What options, environment and files say, together.

        Args:
            environ: the environment, ``os.environ`` for example.
            config_file: YAML with the keys of the settings; the one that ``HBONE_NODE_CONFIG`` names when None.
            overrides: what wins over everything, by the name of the field; a text is read as the option would be.
            mesh_config: Istio's mesh configuration; read if it is there.

        Raises:
            ConfigError: with every fault.
        """
        from hbone.proxy._node_environment import gather

        found = gather(environ, config_file=config_file, overrides=overrides or {}, mesh_config=mesh_config)
        values = found.values
        if values.get("ca_dir") is None and values.get("fake_ca"):
            default = _default_ca_dir(environ)
            if default is not None:
                values["ca_dir"] = default
        config = cls(**values, proxy_metadata=MappingProxyType(found.metadata), notes=tuple(found.notes))
        # What follows from a fault that was named already is not another one.
        faults = [*found.faults, *(fault for names, fault in _faults(config) if not found.failed & names)]
        if faults:
            raise ConfigError(faults)
        return config

    def check(self, *, mesh: bool = True) -> None:
        """See whether these settings go together; each of them can be used as it is.

        Args:
            mesh: whether they must name a mesh.

        Raises:
            ConfigError: with every reason why not.
        """
        faults = [fault for names, fault in _faults(self) if mesh or "mesh" not in names]
        if faults:
            raise ConfigError(faults)

    # === for the parts of a node ===

    def limits(self) -> Limits:
        """What each session may use."""
        from hbone.protocol import Limits

        return Limits(
            stream_window=self.stream_window,
            connection_window=self.connection_window,
            max_frame_size=self.frame_size,
        )

    def pool_limits(self) -> PoolLimits:
        """Bounds of the pools."""
        from hbone.transport import PoolLimits

        return PoolLimits(max_streams_per_session=self.pool_streams, idle_timeout=self.pool_idle)

    def socket_options(self) -> SocketOptions:
        """How sockets are set up."""
        from hbone.transport import SocketOptions

        return SocketOptions(
            mark=self.packet_mark,
            keepalive=self.keepalive,
            keepalive_time=_whole_seconds(self.keepalive_time),
            keepalive_interval=_whole_seconds(self.keepalive_interval),
            keepalive_retries=self.keepalive_retries,
            user_timeout=self.user_timeout,
        )

    def settings(self) -> NodeSettings:
        """What the data plane needs to know."""
        return NodeSettings(
            network=self.network,
            keep_source=self.orig_src,
            response_baggage=self.response_baggage,
            socket_options=self.socket_options(),
            limits=self.limits(),
            pool_limits=self.pool_limits(),
        )


_FIELDS: Final = {one.name: one for one in dataclasses.fields(NodeConfig)}


def _whole_seconds(value: float) -> int:
    # The kernel counts these in seconds, and 0 is none of them.
    return max(1, round(value))


def _default_ca_dir(environ: Mapping[str, str]) -> Path | None:
    """``$XDG_DATA_HOME/hbone/ca``, or the same below ``~/.local/share``; None for somebody without a home."""
    data = environ.get("XDG_DATA_HOME", "")
    if data.startswith("/"):
        return Path(data) / "hbone" / "ca"
    try:
        home = Path(environ.get("HOME") or Path.home())
    except RuntimeError:
        return None
    return home / ".local" / "share" / "hbone" / "ca"


# ---------------------------------------------------------------------------------------------------------------------

GROUPS: Final = ("Mesh", "Who we are", "Where to listen", "Tunnels", "Sockets", "Life", "Log")


def _settings() -> tuple[Setting, ...]:
    rows: list[Setting] = []

    def add(name: str, read: Callable[[str], object], form: str, words: str, *, group: int, unset: str = "") -> None:
        option = "--" + name.replace("_", "-")
        rows.append(
            Setting(name=name, group=GROUPS[group], read=read, form=form, words=words, option=option, unset=unset)
        )

    add("mesh", read_path, "FILE", "The mesh: workloads, services and policies, as YAML or JSON.", group=0)
    add("mesh_text", read_text, "YAML", "The same, given here and not in a file. One of the two.", group=0)
    add("mesh_interval", _positive, "DURATION", "How often to look whether the file has changed.", group=0)
    add(
        "mode",
        _read_mode,
        "shared|dedicated",
        "shared: a connection belongs to the workload that has its address. dedicated: all are one workload's.",
        group=0,
    )
    add("workload", read_workload, "NS/NAME/SA", "The one workload of mode dedicated.", group=0)
    add("node_name", read_text, "NAME", "Serve only workloads of this node.", unset="of all nodes", group=0)
    add("network", read_text, "NAME", "The network that this node is in.", group=0)
    add("cluster_id", read_text, "NAME", "The cluster that this node is in.", group=0)
    add("cluster_domain", read_text, "NAME", "Shown in the configuration dump; nothing else uses it.", group=0)

    add("fake_ca", read_switch, "true|false", "Issue certificates ourselves, from the CA in --ca-dir.", group=1)
    add(
        "ca_dir",
        read_path,
        "DIR",
        "The CA, made if there is none. Nodes that share it trust each other.",
        unset="~/.local/share/hbone/ca",
        group=1,
    )
    add(
        "trust_domain",
        read_trust_domain,
        "NAME",
        "The trust domain of that CA.",
        unset="the CA's own; cluster.local for a new one",
        group=1,
    )
    add("secret_ttl", _positive, "DURATION", "How long its certificates are valid.", group=1)
    add("cert", read_path, "FILE", "Or, for mode dedicated: our certificate and intermediates (PEM).", group=1)
    add("key", read_path, "FILE", "Its private key (PEM).", group=1)
    add("roots", read_path, "FILE", "The roots to check peers with (PEM).", group=1)

    add("outbound", read_listen("*"), "ADDRESS", "Captured connections of applications.", group=2)
    add("plaintext", read_listen("*"), "ADDRESS", "Captured connections to applications, without HBONE.", group=2)
    add("inbound", read_listen("*"), "ADDRESS", "HBONE.", group=2)
    add(
        "hbone_port",
        read_port,
        "PORT",
        "Where the workloads of the mesh are reached by HBONE. Another one than 15008 is for tests; 0: where we are.",
        group=2,
    )
    add("socks5", read_listen("127.0.0.1"), "ADDRESS", "A SOCKS5 proxy for applications.", group=2)
    add(
        "http_proxy",
        read_listen("127.0.0.1"),
        "ADDRESS",
        "An HTTP proxy for applications, which does CONNECT.",
        unset="off",
        group=2,
    )
    add("admin", read_listen("localhost"), "ADDRESS", "Configuration dump, log levels, debugging (HTTP).", group=2)
    add("stats", read_listen("*"), "ADDRESS", "Metrics (HTTP).", group=2)
    add("readiness", read_listen("*"), "ADDRESS", "/healthz/ready (HTTP).", group=2)
    add("ipv6", read_switch, "true|false", "Listen on IPv6 too where * or localhost is to be listened on.", group=2)

    add("stream_window", number(65_535, 2**31 - 1), "BYTES", "What a peer may send ahead on one tunnel.", group=3)
    add("connection_window", number(65_535, 2**31 - 1), "BYTES", "The same, on one session.", group=3)
    add("frame_size", number(2**14, 2**24 - 1), "BYTES", "The largest HTTP/2 frame that we take.", group=3)
    add("pool_streams", number(1, 65_535), "COUNT", "Tunnels on one session.", group=3)
    add("pool_idle", _positive, "DURATION", "How long a session without tunnels is kept.", group=3)
    add(
        "orig_src",
        read_auto_switch,
        "true|false|auto",
        "Whether applications see their peers' addresses: true: it must work, auto: where we may.",
        unset="auto",
        group=3,
    )
    add(
        "response_baggage",
        read_switch,
        "true|false",
        "Tell peers who answered, and believe them.",
        group=3,
    )
    add(
        "localhost_app_tunnel",
        read_switch,
        "true|false",
        "Reach an application that takes the PROXY protocol at the loopback address.",
        group=3,
    )

    add("packet_mark", number(0, 2**32 - 1), "NUMBER", "SO_MARK of our sockets; needs CAP_NET_ADMIN.", group=4)
    add("keepalive", read_switch, "true|false", "TCP keep-alive.", group=4)
    add("keepalive_time", _positive, "DURATION", "Idle time before the first probe.", group=4)
    add("keepalive_interval", _positive, "DURATION", "Time between probes.", group=4)
    add("keepalive_retries", number(1, 127), "COUNT", "Probes without an answer.", group=4)
    add("user_timeout", read_switch, "true|false", "TCP_USER_TIMEOUT: as long as all probes together.", group=4)

    add("drain_deadline", read_duration, "DURATION", "How long connections may go on when we stop.", group=5)
    add("start_timeout", _positive, "DURATION", "How long to wait for certificates before we listen.", group=5)

    add("log_format", choice("plain", "json"), "plain|json", "Of the log on standard output.", group=6)
    add("log_level", _read_levels, "LEVELS", "Such as info,access=debug,proxy::outbound=trace.", group=6)
    add("log_policies", read_switch, "true|false", "Log policy decisions at level info.", group=6)
    add("istio_version", read_text, "TEXT", "The tag of the metric istio_build.", group=6)
    return tuple(rows)


def _positive(text: str) -> float:
    seconds = read_duration(text)
    if seconds <= 0:
        raise ValueError("a duration above 0, such as 10s or 5m")
    return seconds


def _read_mode(text: str) -> ProxyMode:
    try:
        return ProxyMode(text)
    except ValueError:
        raise ValueError("shared or dedicated") from None


def _read_levels(text: str) -> str:
    from hbone.telemetry import LogLevels

    try:
        LogLevels.parse(text)
    except ValueError as problem:
        raise ValueError(f"levels such as info,access=debug,proxy::outbound=trace ({problem})") from None
    return text


SETTINGS: Final = _settings()


def node_settings() -> tuple[Setting, ...]:
    """Every setting of a node, in the order in which to show them."""
    return SETTINGS


def settings_table() -> Iterator[tuple[str, str, str, str]]:
    """The settings for people: group, option, key in a file, and what it means with its default."""
    for setting in SETTINGS:
        default = setting.unset or (f"`{setting.default_text}`" if setting.default_text else "")
        form = setting.form.replace("|", "\\|")
        words = f"{setting.words} Default: {default}." if default else setting.words
        yield setting.group, f"`{setting.option} {form}`", f"`{setting.key}`", words


def shown(text: str) -> str:
    """A text that somebody wrote, short enough for a message and on one line, and without a key that is in it."""
    if "-----BEGIN" in text:
        return "'-----BEGIN...'"
    text = re.sub(r"\s+", " ", text)
    return repr(text if len(text) <= 60 else text[:57] + "...")


# ---------------------------------------------------------------------------------------------------------------------


def _faults(config: NodeConfig) -> Iterator[tuple[frozenset[str], ConfigFault]]:
    """What does not go together, each with the settings that it is about."""

    def fault(settings: str, source: str, problem: str, advice: str) -> tuple[frozenset[str], ConfigFault]:
        return frozenset(settings.split()), ConfigFault(source=source, problem=problem, advice=advice)

    if config.mesh is None and config.mesh_text is None:
        yield fault(
            "mesh mesh_text",
            "LOCAL_XDS_PATH",
            "there is no mesh",
            "set LOCAL_XDS_PATH (or --mesh) to a file; this version has no client for a control plane",
        )
    elif config.mesh is not None and config.mesh_text is not None:
        yield fault(
            "mesh mesh_text", "LOCAL_XDS", "there is a mesh in LOCAL_XDS_PATH (--mesh) too", "set one of the two"
        )
    if config.mode is ProxyMode.DEDICATED and config.workload is None:
        yield fault(
            "mode workload",
            "PROXY_WORKLOAD_INFO",
            "a dedicated node needs a workload",
            "set PROXY_WORKLOAD_INFO (or --workload) to namespace/name/serviceaccount",
        )
    yield from _certificate_faults(config)
    ways = ("outbound", "plaintext", "inbound", "socks5", "http_proxy")
    if not any(getattr(config, name) for name in ways):
        yield fault(" ".join(ways), "--outbound", "every way in is off", "leave at least one of them on")
    if config.hbone_port == 0 and config.inbound is None:
        yield fault("hbone_port inbound", "--hbone-port", "0 means our own port, and --inbound is off", "give the port")
    if config.connection_window < config.stream_window:
        yield fault(
            "connection_window stream_window",
            "HTTP2_CONNECTION_WINDOW_SIZE",
            f"{config.connection_window} is less than one tunnel's window, {config.stream_window}",
            "make it four times that, so that one tunnel cannot hold up its neighbours",
        )
    yield from _port_faults(config)


def _certificate_faults(config: NodeConfig) -> Iterator[tuple[frozenset[str], ConfigFault]]:
    files = {"HBONE_CERT": config.cert, "HBONE_KEY": config.key, "HBONE_ROOTS": config.roots}
    given = [name for name, value in files.items() if value is not None]
    missing = [name for name, value in files.items() if value is None]
    about = frozenset(("fake_ca", "ca_dir", "cert", "key", "roots", "mode"))

    def fault(source: str, problem: str, advice: str) -> tuple[frozenset[str], ConfigFault]:
        return about, ConfigFault(source=source, problem=problem, advice=advice)

    if config.fake_ca:
        if given:
            yield fault(given[0], "certificates come from the local CA already", "set FAKE_CA=false to use files")
        if config.ca_dir is None:
            yield fault("HBONE_CA_DIR", "there is no home directory for the CA", "set HBONE_CA_DIR (or --ca-dir)")
    elif not given:
        yield fault(
            "FAKE_CA",
            "there is nothing to get certificates from",
            "set FAKE_CA=true for a local CA, or give --cert, --key and --roots",
        )
    elif missing:
        yield fault(missing[0], "is missing", "--cert, --key and --roots go together")
    elif config.mode is not ProxyMode.DEDICATED:
        yield fault(
            "HBONE_CERT",
            "files hold the certificate of one workload, and a shared node serves many",
            "set PROXY_MODE=dedicated and PROXY_WORKLOAD_INFO, or FAKE_CA=true",
        )


def _port_faults(config: NodeConfig) -> Iterator[tuple[frozenset[str], ConfigFault]]:
    """Two of our own listeners at one address."""
    taken: list[tuple[ListenAddress, Setting]] = []
    for setting in SETTINGS:
        value = getattr(config, setting.name)
        if not isinstance(value, ListenAddress) or value.port == 0:
            continue
        for other, rival in taken:
            everywhere = "*" in (value.host, other.host)
            if other.port == value.port and (everywhere or set(value.addresses()) & set(other.addresses())):
                yield (
                    frozenset((setting.name, rival.name)),
                    ConfigFault(
                        source=setting.option,
                        problem=f"{value} is where {rival.option} listens",
                        advice="give one of them another port",
                    ),
                )
                break
        taken.append((value, setting))
