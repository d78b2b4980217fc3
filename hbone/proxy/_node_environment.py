"""The environment of a node: every variable that ztunnel reads, and what becomes of it here.

`VARIABLES` is the one table. A variable is *honoured* (it is a setting, `hbone.proxy._node_config.SETTINGS`), or it is
*without effect*, because what it is about does not exist here: then the log says so once; or it would change something
that we cannot do: then only the value that asks for what we do anyway is taken, and every other one is *refused*. Never
is one ignored silently. An empty variable counts as one that is not set, but for ``XDS_ADDRESS``, where it says "no".

The table of the reference page is made from this one, by `environment_table`.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from hbone.errors import ConfigFault
from hbone.proxy._node_config import SETTINGS, Setting, shown
from hbone.proxy._node_values import ListenAddress, Reader, number, read_switch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["VARIABLES", "Found", "Variable", "environment_table", "gather"]

_MAX_FILE: Final = 256 * 1024
_MAX_DEPTH: Final = 32

_BY_NAME: Final = {setting.name: setting for setting in SETTINGS}
_BY_KEY: Final = {setting.key: setting for setting in SETTINGS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One variable of ztunnel's environment, or one of ours with a name of its own."""

    name: str
    """A final ``*`` stands for any ending."""
    setting: str | None = None
    """The setting that it gives; None for one that gives none."""
    read: Reader | None = None
    """How its text is read, where that is not how the setting's is."""
    why: str = ""
    """For one without effect: why. For one that is refused: why only those values are taken. Otherwise a remark."""
    only: tuple[str, ...] | None = None
    """For one that may be refused: the values that ask for what we do anyway."""
    advice: str = ""
    """What to do about a refusal."""
    unless: str | None = None
    """A switch among the settings: while it is on, the variable is without effect instead of refused."""

    def matches(self, name: str) -> bool:
        """Whether the variable of this name is meant."""
        return name.startswith(self.name[:-1]) if self.name.endswith("*") else name == self.name

    @property
    def honoured(self) -> bool:
        """Whether it is a setting of ours."""
        return self.setting is not None


def _honoured(name: str, setting: str, remark: str = "", *, read: Reader | None = None) -> Variable:
    return Variable(name=name, setting=setting, why=remark, read=read)


def _without_effect(name: str, why: str, *, read: Reader | None = None) -> Variable:
    return Variable(name=name, why=why, read=read)


def _refused(name: str, why: str, advice: str, *only: str, unless: str | None = None) -> Variable:
    return Variable(name=name, why=why, advice=advice, only=only, unless=unless)


def _read_grace_period(text: str) -> float:
    """A pod's grace period, less what Kubernetes needs: as ztunnel reckons."""
    seconds: int = number(0, 86_400)(text)
    return float(max(1, seconds - 5 if seconds > 10 else seconds - 1))


def _read_socks5(text: str) -> ListenAddress | None:
    return ListenAddress("127.0.0.1", 15080) if read_switch(text) else None


_NO_XDS: Final = "for a control plane, and this version has no client for one"
_NO_CA: Final = "for a certificate authority of a control plane, and this version has no client for one"
_NO_DNS: Final = "there is no DNS proxy here"
_ONE_LOOP: Final = "one event loop serves everything, in one thread"

#: Where several give one setting, the first that is set wins.
VARIABLES: Final = (
    # what the node does
    _refused("ENABLE_PROXY", "there is nothing else that a node could do", "unset it, or set it to true", "true"),
    _refused(
        "ISTIO_META_DNS_CAPTURE",
        "there is no DNS proxy here, so captured DNS requests would find nobody",
        "set ISTIO_META_DNS_CAPTURE=false and leave DNS to the system",
        "false",
    ),
    _without_effect("ISTIO_META_DNS_PROXY_ADDR", _NO_DNS),
    _honoured("HTTP2_STREAM_WINDOW_SIZE", "stream_window"),
    _honoured("HTTP2_CONNECTION_WINDOW_SIZE", "connection_window"),
    _honoured("HTTP2_FRAME_SIZE", "frame_size"),
    _honoured("POOL_MAX_STREAMS_PER_CONNECTION", "pool_streams"),
    _honoured("POOL_UNUSED_RELEASE_TIMEOUT", "pool_idle"),
    _honoured("UNSTABLE_ENABLE_SOCKS5", "socks5", "true: 127.0.0.1:15080, false: off", read=_read_socks5),
    _honoured("PROXY_MODE", "mode"),
    _honoured("PROXY_WORKLOAD_INFO", "workload"),
    _honoured("NETWORK", "network"),
    _honoured("NODE_NAME", "node_name"),
    _honoured("ISTIO_META_CLUSTER_ID", "cluster_id", "wins over CLUSTER_ID"),
    _honoured("CLUSTER_ID", "cluster_id"),
    _honoured("CLUSTER_DOMAIN", "cluster_domain", "only shown; it is for the DNS proxy, which there is not"),
    _honoured("TRUST_DOMAIN", "trust_domain", "of the local CA; a node has no identity besides its workloads'"),
    # a control plane
    _without_effect("POD_NAME", "a node has no identity of its own here, and asks no control plane"),
    _without_effect("POD_NAMESPACE", "a node has no identity of its own here, and asks no control plane"),
    _without_effect("SERVICE_ACCOUNT", "a node has no identity of its own here, and asks no control plane"),
    _without_effect("INSTANCE_IP", "a node has no identity of its own here, and asks no control plane"),
    _refused(
        "XDS_ADDRESS",
        "this version has no client for a control plane",
        'set XDS_ADDRESS="" and LOCAL_XDS_PATH to a mesh file',
        "",
    ),
    _refused(
        "CA_ADDRESS",
        "this version has no client for a certificate authority",
        "unset it, and set FAKE_CA=true or HBONE_CERT, HBONE_KEY and HBONE_ROOTS",
        "",
        unless="fake_ca",
    ),
    _without_effect("XDS_ROOT_CA", _NO_XDS),
    _without_effect("CA_ROOT_CA", _NO_CA),
    _without_effect("ALT_XDS_HOSTNAME", _NO_XDS),
    _without_effect("ALT_CA_HOSTNAME", _NO_CA),
    _without_effect("AUTH_TOKEN", _NO_XDS),
    _without_effect("XDS_ON_DEMAND", _NO_XDS, read=read_switch),
    _without_effect("XDS_HEADER_*", _NO_XDS),
    _without_effect("CA_HEADER_*", _NO_CA),
    _honoured("LOCAL_XDS_PATH", "mesh"),
    _honoured("LOCAL_XDS", "mesh_text"),
    # certificates
    _honoured("FAKE_CA", "fake_ca", "the CA is in HBONE_CA_DIR, and not the one that all ztunnels share"),
    _honoured("HBONE_CA_DIR", "ca_dir", "ours"),
    _honoured("HBONE_CERT", "cert", "ours"),
    _honoured("HBONE_KEY", "key", "ours"),
    _honoured("HBONE_ROOTS", "roots", "ours"),
    _honoured("SECRET_TTL", "secret_ttl"),
    _without_effect("PREFERED_SERVICE_NAMESPACE", _NO_DNS),
    _refused("CRL_PATH", "revocation lists are not checked", "unset it, and use certificates of a short life"),
    _refused("TLS12_ENABLED", "tunnels are TLS 1.3 only", "unset it", "false"),
    _refused(
        "COMPLIANCE_POLICY",
        "tunnels use X25519MLKEM768 where the peer can, but we do not insist",
        "unset it",
    ),
    # the data plane
    _honoured("ENABLE_ORIG_SRC", "orig_src", "auto when unset"),
    _honoured("PACKET_MARK", "packet_mark", "none when unset, in both modes"),
    _refused(
        "INPOD_UDS",
        "there is no in-pod mode: nobody hands us the network namespaces of pods",
        "unset it; a node serves the network namespace that it runs in",
    ),
    _without_effect("INPOD_PORT_REUSE", "for in-pod mode, which there is not", read=read_switch),
    _honoured(
        "LOCALHOST_APP_TUNNEL",
        "localhost_app_tunnel",
        "whether applications that want a PROXY header are called at loopback, or else at their workload's address",
    ),
    _honoured("ENABLE_RESPONSE_BAGGAGE", "response_baggage"),
    _honoured("IPV6_ENABLED", "ipv6"),
    _honoured("KEEPALIVE_ENABLED", "keepalive"),
    _honoured("KEEPALIVE_TIME", "keepalive_time"),
    _honoured("KEEPALIVE_INTERVAL", "keepalive_interval"),
    _honoured("KEEPALIVE_RETRIES", "keepalive_retries"),
    _honoured("USER_TIMEOUT_ENABLED", "user_timeout"),
    # life and log
    _honoured("CONNECTION_TERMINATION_DEADLINE", "drain_deadline", "wins over TERMINATION_GRACE_PERIOD_SECONDS"),
    _honoured(
        "TERMINATION_GRACE_PERIOD_SECONDS",
        "drain_deadline",
        "n - 5 for n above 10, otherwise n - 1, and 1 at least",
        read=_read_grace_period,
    ),
    _without_effect("ZTUNNEL_WORKER_THREADS", _ONE_LOOP),
    _without_effect("ZTUNNEL_CPU_LIMIT", _ONE_LOOP),
    _without_effect("ZTUNNEL_RESOURCE_CPU_LIMIT", _ONE_LOOP),
    _without_effect("ZTUNNEL_RESOURCE_CPU_REQUEST", _ONE_LOOP),
    _honoured("RUST_LOG", "log_level"),
    _honoured("LOG_FORMAT", "log_format"),
    _honoured("AUTHZ_POLICY_INFO_LOGGING", "log_policies"),
    _honoured("ISTIO_META_ISTIO_VERSION", "istio_version"),
    _without_effect("ISTIO_META_*", _NO_XDS),
    _without_effect("ISTIO_METAJSON_*", _NO_XDS),
)

#: Not settings, but of the command.
_COMMANDS_OWN: Final = frozenset({"HBONE_NODE_CONFIG", "HBONE_NODE_JSON"})


def environment_table() -> Iterator[tuple[str, str, str]]:
    """The table of variables for people: name, what becomes of it, and more about that."""
    for variable in VARIABLES:
        if variable.setting is not None:
            setting = _BY_NAME[variable.setting]
            default = f", default `{setting.default_text}`" if setting.default_text else ""
            remark = f"; {variable.why}" if variable.why else ""
            yield variable.name, "honoured", f"`{setting.option}`{default}{remark}"
        elif variable.only is None:
            yield variable.name, "without effect", variable.why
        else:
            words = ["empty" if not value else f"`{value}`" for value in variable.only]
            but = f", but for {' and '.join(words)}" if words else ""
            aside = f"; without effect while `{_BY_NAME[variable.unless].option}` is on" if variable.unless else ""
            yield variable.name, f"refused{but}", f"{variable.why}: {variable.advice}{aside}"


# ---------------------------------------------------------------------------------------------------------------------


def gather(
    environ: Mapping[str, str],
    *,
    config_file: Path | str | None,
    overrides: Mapping[str, object],
    mesh_config: Path | str | None,
) -> Found:
    """What somebody said, from all sources, with every fault; see `NodeConfig.from_environment`."""
    found = Found()
    found.options(overrides)
    found.level = 1
    found.environment(environ)
    found.level = 2
    path = config_file if config_file is not None else environ.get("HBONE_NODE_CONFIG") or None
    if path is not None:
        found.file(Path(path))
    found.level = 3
    if mesh_config is not None:
        found.istio(environ.get("PROXY_CONFIG", ""), Path(mesh_config), xds_decided="XDS_ADDRESS" in environ)
    found.settle_rivals()
    found.judge(environ)
    return found


class _Fault(Exception):
    """YAML that is right, and more than we take."""

    def __init__(self, what: str, mark: Any) -> None:
        super().__init__(what)
        self.line = int(mark.line) + 1


class Found:
    """What was said so far. Whoever comes first wins: sources are asked in the order of precedence.

    Attributes:
        values: of settings, by name.
        notes: what is without effect, with why.
        metadata: ``proxyMetadata``.
        faults: what cannot be used.
        failed: the settings that have a fault.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.level = 0
        self.levels: dict[str, int] = {}
        self.notes: list[str] = []
        self.metadata: dict[str, str] = {}
        self.faults: list[ConfigFault] = []
        self.failed: set[str] = set()

    def fault(self, source: str, problem: str, advice: str = "") -> None:
        self.faults.append(ConfigFault(source=source, problem=problem, advice=advice))

    def set(self, setting: Setting, text: str, source: str, read: Reader | None = None) -> None:
        """A setting is read even when another source has won: what is wrong is wrong."""
        try:
            self.give(setting.name, (read or setting.read)(text))
        except ValueError as problem:
            self.failed.add(setting.name)
            self.fault(source, f"{shown(text)} cannot be used; expected {problem}")

    def give(self, name: str, value: object) -> None:
        self.values.setdefault(name, value)
        self.levels.setdefault(name, self.level)

    def settle_rivals(self) -> None:
        """Two ways to say one thing: the one from the source that comes first wins; of one source it is a fault."""
        rivals: list[tuple[tuple[str, ...], tuple[str, ...]]] = [(("mesh",), ("mesh_text",))]
        if self.values.get("fake_ca"):
            rivals.append((("fake_ca",), ("cert", "key", "roots")))
        for one, other in rivals:
            ours, theirs = (min((self.levels.get(name, 99) for name in names), default=99) for names in (one, other))
            for name in other if ours < theirs else one if theirs < ours else ():
                self.values.pop(name, None)

    # === options ===

    def options(self, overrides: Mapping[str, object]) -> None:
        for name, value in overrides.items():
            setting = _BY_NAME.get(name)
            if setting is None:
                raise TypeError(f"there is no setting {name!r}")
            if isinstance(value, str):
                self.set(setting, value, setting.option)
            else:
                self.give(name, value)

    # === environment ===

    def environment(self, environ: Mapping[str, str]) -> None:
        own = {setting.variable: setting for setting in SETTINGS}
        for name, text in environ.items():
            if name.startswith("HBONE_NODE_") and name not in _COMMANDS_OWN and text:
                setting = own.get(name)
                if setting is None:
                    self.fault(name, "there is no such setting", _did_you_mean(name, own))
                else:
                    self.set(setting, text, name)
        for variable in VARIABLES:
            if variable.setting is not None and (text := environ.get(variable.name, "")):
                self.set(_BY_NAME[variable.setting], text, variable.name, variable.read)

    def judge(self, environ: Mapping[str, str]) -> None:
        """Those that are no settings: refused, or said to be without effect. Some depend on what was set."""
        handled = {variable.name for variable in VARIABLES if variable.honoured}
        for variable in VARIABLES:
            if variable.honoured:
                continue
            for name in sorted(environ):
                if name in handled or not variable.matches(name):
                    continue
                handled.add(name)
                if not variable.name.endswith("*") and not environ[name]:
                    continue
                self.no_setting(variable, name, environ[name])
        if "XDS_ADDRESS" not in environ and ("mesh" in self.values or "mesh_text" in self.values):
            self.notes.append("XDS_ADDRESS is not set: there is no control plane, only the mesh file")
        if self.values.get("workload") is not None and not self._dedicated():
            self.notes.append("PROXY_WORKLOAD_INFO has no effect: PROXY_MODE is not dedicated")

    def _dedicated(self) -> bool:
        mode = self.values.get("mode")
        return mode is not None and mode.value == "dedicated"

    def no_setting(self, variable: Variable, name: str, text: str) -> None:
        if variable.read is not None:
            try:
                variable.read(text)
            except ValueError as problem:
                self.fault(name, f"{shown(text)} cannot be used; expected {problem}")
                return
        if variable.only is None:
            self.notes.append(f"{name} has no effect: {variable.why}")
        elif variable.unless is not None and self.values.get(variable.unless):
            self.notes.append(f"{name} has no effect while {variable.unless.upper()} is true")
        elif text not in variable.only:
            self.fault(name, f"{shown(text)} cannot be had: {variable.why}", variable.advice)

    # === files ===

    def file(self, path: Path) -> None:
        """Our own configuration file: a mapping of keys to plain values."""
        text = self.read(path)
        if text is None:
            return
        for key, node in self.mapping(text, str(path)):
            source = f"{path}:{_line(node)}"
            setting = _BY_KEY.get(key)
            if setting is None:
                self.fault(source, f"there is no setting {shown(key)}", _did_you_mean(key, _BY_KEY))
            elif not isinstance(node, yaml.ScalarNode):
                self.fault(
                    source, f"{key} must be a plain value, not a list or a mapping", f"write {key}: {setting.form}"
                )
            elif node.tag != "tag:yaml.org,2002:null":
                self.set(setting, node.value, f"{source}: {key}")

    def read(self, path: Path) -> str | None:
        try:
            with path.open("rb") as stream:
                data = stream.read(_MAX_FILE + 1)
        except OSError as problem:
            why = (problem.strerror or type(problem).__name__).lower()
            self.fault(str(path), f"cannot be read: {why}", "check the path and its permissions")
            return None
        if len(data) > _MAX_FILE:
            self.fault(str(path), f"is larger than {_MAX_FILE} bytes", "is that the configuration file?")
            return None
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as problem:
            line = data.count(b"\n", 0, problem.start) + 1
            self.fault(f"{path}:{line}", "is not UTF-8", "save it as UTF-8 text")
            return None

    def mapping(self, text: str, source: str) -> list[tuple[str, yaml.Node]]:
        """The entries of a YAML mapping, with their nodes, which know their lines."""
        try:
            root = _compose(text)
        except _Fault as problem:
            self.fault(f"{source}:{problem.line}", f"this YAML is too much: {problem}")
            return []
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{source}:{mark.line + 1}" if mark is not None else source
            what = getattr(error, "problem", None) or str(error).partition("\n")[0]
            self.fault(where, f"is not YAML: {what}")
            return []
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            self.fault(f"{source}:{_line(root)}", "must be a mapping of keys to values", "write key: value, one a line")
            return []
        return self.entries(root, source)

    def entries(self, node: yaml.MappingNode, source: str) -> list[tuple[str, yaml.Node]]:
        entries: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                self.fault(f"{source}:{_line(key_node)}", "a key must be a plain word")
            elif key in entries:
                self.fault(f"{source}:{_line(key_node)}", f"{key} is there twice, first in line {_line(entries[key])}")
            else:
                entries[key] = value
        return list(entries.items())

    # === Istio's own documents ===

    def istio(self, proxy_config: str, mesh_config: Path, *, xds_decided: bool) -> None:
        """``PROXY_CONFIG``, then ``defaultConfig`` of the mesh configuration; only what a node has a use for."""
        unused: list[str] = []
        discovery: list[tuple[str, str]] = []
        for key, node in self.mapping(proxy_config, "PROXY_CONFIG"):
            self.istio_key(key, node, "PROXY_CONFIG", unused, discovery)
        if mesh_config.exists() and (text := self.read(mesh_config)) is not None:
            for key, node in self.mapping(text, str(mesh_config)):
                if key == "defaultConfig" and isinstance(node, yaml.MappingNode):
                    for inner, value in self.entries(node, str(mesh_config)):
                        self.istio_key(inner, value, str(mesh_config), unused, discovery)
        if discovery and not xds_decided:
            source, address = discovery[0]
            if address:
                (xds,) = (variable for variable in VARIABLES if variable.name == "XDS_ADDRESS")
                self.fault(source, f"discoveryAddress {shown(address)} cannot be had: {xds.why}", xds.advice)
        if unused:
            names = ", ".join(dict.fromkeys(unused))
            self.notes.append(f"of Istio's proxy configuration these keys have no effect here: {names}")

    def istio_key(
        self, key: str, node: yaml.Node, source: str, unused: list[str], discovery: list[tuple[str, str]]
    ) -> None:
        where = f"{source}:{_line(node)}"
        if key == "proxyMetadata" and isinstance(node, yaml.MappingNode):
            for name, value in self.entries(node, source):
                self.metadata.setdefault(name, value.value if isinstance(value, yaml.ScalarNode) else "...")
            if self.metadata:
                unused.append(key)
        elif key in ("proxyAdminPort", "statsPort", "discoveryAddress"):
            text = node.value if isinstance(node, yaml.ScalarNode) else ""
            if key == "discoveryAddress":
                discovery.append((where, text))
                return
            setting = _BY_NAME["admin" if key == "proxyAdminPort" else "stats"]
            try:
                port = number(0, 65535)(text)
            except ValueError as problem:
                self.fault(where, f"{key} {shown(text)} cannot be used; expected {problem}")
            else:
                assert isinstance(setting.default, ListenAddress)
                self.give(setting.name, ListenAddress(setting.default.host, port))
        else:
            unused.append(key)


def _compose(text: str) -> yaml.Node | None:
    """The tree of a document. A few lines with aliases make a tree without end; nothing here nests deeply."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise _Fault("aliases are not taken here", event.start_mark)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise _Fault("it is nested too deeply", event.start_mark)
    return yaml.compose(text, Loader=yaml.SafeLoader)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.7)
    return f"did you mean {close[0]}?" if close else "hbone node --help lists them"
