"""What a node is told: every variable, file and option, what wins, and every fault at once."""

from __future__ import annotations

import re
from dataclasses import fields
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbone.errors import ConfigError, HboneError
from hbone.proxy._node_config import SETTINGS, NodeConfig, ProxyMode, settings_table
from hbone.proxy._node_environment import VARIABLES, environment_table
from hbone.proxy._node_values import (
    ListenAddress,
    format_duration,
    read_duration,
    read_listen,
    read_path,
    read_text,
)

DOCS = Path(__file__).parents[2] / "docs" / "reference"

#: The least that makes a node.
LEAST = {"FAKE_CA": "true", "LOCAL_XDS_PATH": "mesh.yaml", "XDS_ADDRESS": "", "HOME": "/home/me"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(_environ=None, /, *, least=True, config_file=None, overrides=None, **environ):
    return NodeConfig.from_environment(
        {**(LEAST if least else {}), **(_environ or {}), **environ}, config_file=config_file, overrides=overrides
    )


def faults(_environ=None, /, **options):
    with pytest.raises(ConfigError) as raised:
        read(_environ, **options)
    assert isinstance(raised.value, HboneError)
    assert isinstance(raised.value, ValueError)
    lines = [str(fault) for fault in raised.value.faults]
    assert str(raised.value) == "\n".join(lines)
    return lines


# === the defaults ===


def test_the_least_that_makes_a_node():
    config = read()
    assert config.mesh == Path("mesh.yaml")
    assert config.ca_dir == Path("/home/me/.local/share/hbone/ca")
    assert config.mode is ProxyMode.SHARED
    assert str(config.socks5) == "127.0.0.1:15080"
    assert config.http_proxy is None
    assert [str(getattr(config, name)) for name in ("outbound", "plaintext", "inbound", "stats", "readiness")] == [
        "*:15001",
        "*:15006",
        "*:15008",
        "*:15020",
        "*:15021",
    ]
    assert str(config.admin) == "localhost:15000"
    assert config.notes == ()
    limits = config.limits()
    assert (limits.stream_window, limits.connection_window, limits.max_frame_size) == (4194304, 16777216, 1048576)
    assert (config.pool_limits().max_streams_per_session, config.pool_limits().idle_timeout) == (100, 300)
    options = config.socket_options()
    assert (options.keepalive, options.keepalive_time, options.keepalive_interval) == (True, 180, 180)
    assert (options.keepalive_retries, options.user_timeout, options.mark) == (9, False, None)
    settings = config.settings()
    assert (settings.keep_source, settings.response_baggage, config.localhost_app_tunnel) == (None, True, True)


def test_every_setting_is_a_field_and_the_other_way_round():
    told = {setting.name for setting in SETTINGS}
    assert told | {"proxy_metadata", "notes"} == {one.name for one in fields(NodeConfig)}
    for names in ([s.option for s in SETTINGS], [s.key for s in SETTINGS], [s.variable for s in SETTINGS]):
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_default_is_written_as_it_is_read(setting):
    if setting.default_text:
        assert setting.read(setting.default_text) == setting.default


# === ztunnel's environment ===

HONOURED = [
    ("HTTP2_STREAM_WINDOW_SIZE", "100000", "stream_window", 100000),
    ("HTTP2_CONNECTION_WINDOW_SIZE", "33554432", "connection_window", 33554432),
    ("HTTP2_FRAME_SIZE", "16384", "frame_size", 16384),
    ("POOL_MAX_STREAMS_PER_CONNECTION", "7", "pool_streams", 7),
    ("POOL_UNUSED_RELEASE_TIMEOUT", "1h30m", "pool_idle", 5400.0),
    ("UNSTABLE_ENABLE_SOCKS5", "true", "socks5", ListenAddress("127.0.0.1", 15080)),
    ("UNSTABLE_ENABLE_SOCKS5", "false", "socks5", None),
    ("PROXY_MODE", "shared", "mode", ProxyMode.SHARED),
    ("NETWORK", "east", "network", "east"),
    ("NODE_NAME", "na", "node_name", "na"),
    ("CLUSTER_ID", "c1", "cluster_id", "c1"),
    ("ISTIO_META_CLUSTER_ID", "c2", "cluster_id", "c2"),
    ("CLUSTER_DOMAIN", "corp.local", "cluster_domain", "corp.local"),
    ("TRUST_DOMAIN", "corp.example", "trust_domain", "corp.example"),
    ("LOCAL_XDS_PATH", "other.yaml", "mesh", Path("other.yaml")),
    ("FAKE_CA", "true", "fake_ca", True),
    ("HBONE_CA_DIR", "/ca", "ca_dir", Path("/ca")),
    ("SECRET_TTL", "10m", "secret_ttl", 600.0),
    ("ENABLE_ORIG_SRC", "true", "orig_src", True),
    ("ENABLE_ORIG_SRC", "false", "orig_src", False),
    ("PACKET_MARK", "1337", "packet_mark", 1337),
    ("PACKET_MARK", "0x539", "packet_mark", 1337),
    ("LOCALHOST_APP_TUNNEL", "false", "localhost_app_tunnel", False),
    ("ENABLE_RESPONSE_BAGGAGE", "false", "response_baggage", False),
    ("IPV6_ENABLED", "false", "ipv6", False),
    ("KEEPALIVE_ENABLED", "false", "keepalive", False),
    ("KEEPALIVE_TIME", "10s", "keepalive_time", 10.0),
    ("KEEPALIVE_INTERVAL", "20s", "keepalive_interval", 20.0),
    ("KEEPALIVE_RETRIES", "3", "keepalive_retries", 3),
    ("USER_TIMEOUT_ENABLED", "true", "user_timeout", True),
    ("CONNECTION_TERMINATION_DEADLINE", "100ms", "drain_deadline", 0.1),
    ("TERMINATION_GRACE_PERIOD_SECONDS", "30", "drain_deadline", 25.0),
    ("TERMINATION_GRACE_PERIOD_SECONDS", "10", "drain_deadline", 9.0),
    ("TERMINATION_GRACE_PERIOD_SECONDS", "1", "drain_deadline", 1.0),
    ("TERMINATION_GRACE_PERIOD_SECONDS", "0", "drain_deadline", 1.0),
    ("RUST_LOG", "debug", "log_level", "debug"),
    ("RUST_LOG", "info,access=debug", "log_level", "info,access=debug"),
    ("LOG_FORMAT", "json", "log_format", "json"),
    ("AUTHZ_POLICY_INFO_LOGGING", "true", "log_policies", True),
    ("ISTIO_META_ISTIO_VERSION", "1.31", "istio_version", "1.31"),
]


@pytest.mark.parametrize(("variable", "text", "field", "value"), HONOURED)
def test_honoured(variable, text, field, value):
    config = read({variable: text})
    assert getattr(config, field) == value
    assert config.notes == ()


def test_dedicated():
    config = read(PROXY_MODE="dedicated", PROXY_WORKLOAD_INFO="shop/cart-0/cart")
    assert config.mode is ProxyMode.DEDICATED
    assert str(config.workload) == "shop/cart-0/cart"


def test_mesh_in_the_environment():
    assert read(LOCAL_XDS_PATH="", LOCAL_XDS="workloads: []").mesh_text == "workloads: []"


def test_files_instead_of_a_ca():
    config = read(
        FAKE_CA="",
        HBONE_CERT="c",
        HBONE_KEY="k",
        HBONE_ROOTS="r",
        PROXY_MODE="dedicated",
        PROXY_WORKLOAD_INFO="a/b/c",
    )
    assert (config.cert, config.key, config.roots, config.ca_dir) == (Path("c"), Path("k"), Path("r"), None)


WITHOUT_EFFECT = [
    ("ISTIO_META_DNS_PROXY_ADDR", "localhost:15053"),
    ("POD_NAME", "x"),
    ("POD_NAMESPACE", "x"),
    ("SERVICE_ACCOUNT", "x"),
    ("INSTANCE_IP", "10.0.0.1"),
    ("XDS_ROOT_CA", "SYSTEM"),
    ("CA_ROOT_CA", "./x"),
    ("ALT_XDS_HOSTNAME", "x"),
    ("ALT_CA_HOSTNAME", "x"),
    ("AUTH_TOKEN", "s3cret"),
    ("XDS_ON_DEMAND", "true"),
    ("XDS_HEADER_X", "s3cret"),
    ("CA_HEADER_X", "s3cret"),
    ("PREFERED_SERVICE_NAMESPACE", "x"),
    ("INPOD_PORT_REUSE", "false"),
    ("ZTUNNEL_WORKER_THREADS", "50%"),
    ("ZTUNNEL_CPU_LIMIT", "2"),
    ("ZTUNNEL_RESOURCE_CPU_LIMIT", "2"),
    ("ZTUNNEL_RESOURCE_CPU_REQUEST", "2"),
    ("ISTIO_META_MESH_ID", "x"),
    ("ISTIO_METAJSON_X", "{}"),
    ("CA_ADDRESS", "https://istiod:15012"),  # as in ztunnel, while FAKE_CA is on
]


@pytest.mark.parametrize(("variable", "text"), WITHOUT_EFFECT)
def test_without_effect_is_said_once(variable, text):
    (note,) = read({variable: text}).notes
    assert note.startswith(f"{variable} has no effect")
    assert "s3cret" not in note


def test_no_control_plane_is_said_when_nobody_said_so():
    environ = {name: text for name, text in LEAST.items() if name != "XDS_ADDRESS"}
    (note,) = read(environ, least=False).notes
    assert note == "XDS_ADDRESS is not set: there is no control plane, only the mesh file"


REFUSED = [
    ("ENABLE_PROXY", "false", "true"),
    ("ISTIO_META_DNS_CAPTURE", "true", "false"),
    ("XDS_ADDRESS", "https://istiod.istio-system.svc:15012", ""),
    ("CRL_PATH", "/crl.pem", ""),
    ("TLS12_ENABLED", "true", "false"),
    ("COMPLIANCE_POLICY", "pqc", ""),
    ("INPOD_UDS", "/var/run/ztunnel/ztunnel.sock", ""),
]


@pytest.mark.parametrize(("variable", "text", "taken"), REFUSED)
def test_refused(variable, text, taken):
    (line,) = faults({variable: text})
    assert line.startswith(f"{variable}: '{text}' cannot be had: ")
    assert read({variable: taken}).notes == ()


def test_a_ca_is_refused_unless_we_are_our_own():
    lines = faults(FAKE_CA="", CA_ADDRESS="https://istiod:15012")
    assert any(line.startswith("CA_ADDRESS: 'https://istiod:15012' cannot be had: ") for line in lines)


def test_every_variable_has_a_case():
    tried = {row[0] for row in [*HONOURED, *WITHOUT_EFFECT, *REFUSED]} | {
        *("PROXY_WORKLOAD_INFO", "LOCAL_XDS", "HBONE_CERT", "HBONE_KEY", "HBONE_ROOTS"),  # above
    }
    missing = [one.name for one in VARIABLES if not any(one.matches(name) for name in tried)]
    assert missing == []
    assert {variable for variable, *_ in HONOURED} <= {one.name for one in VARIABLES if one.honoured}


WRONG = [
    ("FAKE_CA", "yes", "FAKE_CA: 'yes' cannot be used; expected true or false"),
    ("FAKE_CA", "True", "FAKE_CA: 'True' cannot be used; expected true or false"),
    ("IPV6_ENABLED", "1", "IPV6_ENABLED: '1' cannot be used; expected true or false"),
    ("XDS_ON_DEMAND", "x", "XDS_ON_DEMAND: 'x' cannot be used; expected true or false"),
    (
        "POOL_UNUSED_RELEASE_TIMEOUT",
        "300",
        "POOL_UNUSED_RELEASE_TIMEOUT: '300' cannot be used; expected a number with its unit: 100ms, 10s, 5m or 1h30m",
    ),
    ("SECRET_TTL", "0s", "SECRET_TTL: '0s' cannot be used; expected a duration above 0, such as 10s or 5m"),
    (
        "HTTP2_FRAME_SIZE",
        "100",
        "HTTP2_FRAME_SIZE: '100' cannot be used; expected a number from 16384 to 16777215",
    ),
    (
        "HTTP2_STREAM_WINDOW_SIZE",
        "-1",
        "HTTP2_STREAM_WINDOW_SIZE: '-1' cannot be used; expected a number from 65535 to 2147483647",
    ),
    (
        "POOL_MAX_STREAMS_PER_CONNECTION",
        "70000",
        "POOL_MAX_STREAMS_PER_CONNECTION: '70000' cannot be used; expected a number from 1 to 65535",
    ),
    ("PROXY_MODE", "sidecar", "PROXY_MODE: 'sidecar' cannot be used; expected shared or dedicated"),
    (
        "PROXY_WORKLOAD_INFO",
        "a/b",
        "PROXY_WORKLOAD_INFO: 'a/b' cannot be used; expected namespace/name/serviceaccount",
    ),
    ("LOG_FORMAT", "xml", "LOG_FORMAT: 'xml' cannot be used; expected plain or json"),
    ("PACKET_MARK", "0xgg", "PACKET_MARK: '0xgg' cannot be used; expected a number from 0 to 4294967295"),
    ("HBONE_NODE_SOCKS5", "x", "HBONE_NODE_SOCKS5: 'x' cannot be used; expected PORT, ADDRESS:PORT, "),
    ("HBONE_NODE_SOCKS", "1", "HBONE_NODE_SOCKS: there is no such setting; did you mean HBONE_NODE_SOCKS5?"),
    ("HTTP2_CONNECTION_WINDOW_SIZE", "70000", "HTTP2_CONNECTION_WINDOW_SIZE: 70000 is less than one tunnel's window"),
    ("HBONE_NODE_STATS", "15021", "--readiness: *:15021 is where --stats listens; give one of them another port"),
    ("HBONE_NODE_SOCKS5", "*:15001", "--socks5: *:15001 is where --outbound listens; give one of them another port"),
    ("HBONE_NODE_ADMIN", "127.0.0.1:15080", "--admin: 127.0.0.1:15080 is where --socks5 listens"),
    ("TRUST_DOMAIN", "A B", "TRUST_DOMAIN: 'A B' cannot be used; expected a trust domain ("),
    ("PROXY_MODE", "dedicated", "PROXY_WORKLOAD_INFO: a dedicated node needs a workload; set PROXY_WORKLOAD_INFO "),
    ("LOCAL_XDS", "workloads: []", "LOCAL_XDS: there is a mesh in LOCAL_XDS_PATH (--mesh) too; set one of the two"),
    ("HBONE_CERT", "x", "HBONE_CERT: certificates come from the local CA already; set FAKE_CA=false to use files"),
    ("RUST_LOG", "loud", "RUST_LOG: 'loud' cannot be used; expected levels such as info,access=debug"),
    ("PROXY_CONFIG", "- a", "PROXY_CONFIG:1: must be a mapping of keys to values"),
    ("PROXY_CONFIG", "a: [", "PROXY_CONFIG:1: is not YAML: "),
    ("PROXY_CONFIG", "statsPort: x", "PROXY_CONFIG:1: statsPort 'x' cannot be used; expected a number from 0 to 65535"),
]


@pytest.mark.parametrize(("variable", "text", "said"), WRONG)
def test_wrong(variable, text, said):
    (line,) = faults({variable: text})
    assert line.startswith(said)


def test_all_faults_at_once_and_no_follow_up():
    """No certificate because FAKE_CA is misspelt: that is one fault."""
    lines = faults(FAKE_CA="on", LOCAL_XDS_PATH="", KEEPALIVE_TIME="1", CRL_PATH="x")
    assert [line.partition(":")[0] for line in lines] == ["FAKE_CA", "KEEPALIVE_TIME", "CRL_PATH", "LOCAL_XDS_PATH"]


#: Settings that not every text can be.
CHOOSY = [setting for setting in SETTINGS if setting.read not in (read_text, read_path)]


@pytest.mark.parametrize("setting", CHOOSY, ids=lambda setting: setting.name)
def test_nonsense_is_named_wherever_it_comes_from(setting, tmp_path):
    """All at once: the option, each variable, and the line in the file."""
    path = write(tmp_path, f"# ours\n{setting.key}: '!?'\n")
    environ = dict.fromkeys((setting.variable, *setting.variables), "!?")
    lines = faults(environ, config_file=path, overrides={setting.name: "!?"})
    sources = [setting.option, *environ, f"{path}:2: {setting.key}"]
    assert [line.partition(": '!?' cannot be used; expected ")[0] for line in lines] == sources


def test_everything_wrong_at_once():
    """Every variable of ztunnel's that can be wrong, and every one of ours: a line for each."""
    environ = {name: "!?" for setting in CHOOSY for name in (setting.variable, *setting.variables)}
    named = [line.partition(": ")[0] for line in faults(environ)]
    assert len(named) == len(set(named))
    assert set(named) == set(environ)


@pytest.mark.parametrize("name", ["HBONE_KEY", "HBONE_NODE_KEY", "HBONE_CERT", "LOCAL_XDS_PATH", "FAKE_CA"])
def test_a_key_where_its_path_belongs_is_not_shown(name):
    key = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49\n-----END PRIVATE KEY-----\n"
    files = {"HBONE_CERT": "c", "HBONE_KEY": "k", "HBONE_ROOTS": "r", "PROXY_MODE": "dedicated"}
    environ = {"LOCAL_XDS_PATH": "m", **files, "PROXY_WORKLOAD_INFO": "a/b/c", name: key}
    (line,) = faults(environ, least=False)
    assert line.startswith(f"{name}: '-----BEGIN...' cannot be used; expected ")
    assert "MIGH" not in line


def test_nothing_at_all():
    lines = faults(least=False)
    assert lines == [
        "LOCAL_XDS_PATH: there is no mesh; set LOCAL_XDS_PATH (or --mesh) to a file; "
        "this version has no client for a control plane",
        "FAKE_CA: there is nothing to get certificates from; "
        "set FAKE_CA=true for a local CA, or give --cert, --key and --roots",
    ]


def test_files_of_a_shared_node_and_half_of_them():
    environ = {"LOCAL_XDS_PATH": "m", "HBONE_CERT": "c", "HBONE_KEY": "k"}
    (line,) = faults(environ, least=False)
    assert line == "HBONE_ROOTS: is missing; --cert, --key and --roots go together"
    (line,) = faults({**environ, "HBONE_ROOTS": "r"}, least=False)
    assert line.startswith("HBONE_CERT: files hold the certificate of one workload")


def test_no_way_in():
    off = {f"HBONE_NODE_{name}": "off" for name in ("OUTBOUND", "PLAINTEXT", "INBOUND", "SOCKS5")}
    assert faults(off) == ["--outbound: every way in is off; leave at least one of them on"]


def test_a_long_value_is_cut_and_stays_on_one_line():
    (line,) = faults(PROXY_MODE="x\n" * 1000)
    assert len(line) < 200
    assert "\n" not in line


# === what wins ===


def write(tmp_path, text):
    path = tmp_path / "node.yaml"
    path.write_text(text)
    return path


def test_precedence(tmp_path):
    path = write(tmp_path, "poolStreams: 4\npoolIdle: 4s\nnetwork: four\nclusterId: four\nstats: 4444\n")
    environ = {
        "PROXY_CONFIG": "statsPort: 5555\nproxyAdminPort: 5556",
        "POOL_MAX_STREAMS_PER_CONNECTION": "3",
        "POOL_UNUSED_RELEASE_TIMEOUT": "3s",
        "NETWORK": "three",
        "HBONE_NODE_POOL_STREAMS": "2",
        "HBONE_NODE_POOL_IDLE": "2s",
    }
    config = read(environ, config_file=path, overrides={"pool_streams": "1"})
    assert (config.pool_streams, config.pool_idle, config.network, config.cluster_id) == (1, 2.0, "three", "four")
    assert (str(config.stats), str(config.admin)) == ("*:4444", "localhost:5556")


def test_what_loses_must_be_right_too(tmp_path):
    path = write(tmp_path, "\npoolStreams: x\n")
    lines = faults(config_file=path, POOL_MAX_STREAMS_PER_CONNECTION="y", overrides={"pool_streams": "1"})
    assert [line.partition(" cannot")[0] for line in lines] == [
        "POOL_MAX_STREAMS_PER_CONNECTION: 'y'",
        f"{path}:2: poolStreams: 'x'",
    ]


def test_what_says_the_same_in_another_way():
    assert read(LOCAL_XDS="x", LOCAL_XDS_PATH="", overrides={"mesh": "m"}).mesh_text is None
    files = {"cert": "c", "key": "k", "roots": "r", "mode": "dedicated", "workload": "a/b/c"}
    assert not read(overrides=files).fake_ca
    environ = {"HBONE_CERT": "c", "HBONE_KEY": "k", "HBONE_ROOTS": "r", "FAKE_CA": ""}
    assert read(environ, overrides={"fake_ca": "true"}).cert is None


def test_typed_overrides_are_taken_as_they_are():
    assert read(overrides={"pool_streams": 5, "socks5": None}).pool_streams == 5
    with pytest.raises(TypeError, match="no setting"):
        read(overrides={"nonsense": 1})


def test_the_config_file_may_be_named_in_the_environment(tmp_path):
    path = write(tmp_path, "network: n\nsocks5: off\nmesh: ~\nworkload:\nfakeCa: true\nadmin: '[::1]:7'\n")
    config = read(HBONE_NODE_CONFIG=str(path))
    assert (config.network, config.socks5, str(config.admin)) == ("n", None, "[::1]:7")


BAD_FILES = [
    (b"nonsense: 1\n", ":1: there is no setting 'nonsense'; hbone node --help lists them"),
    (b"\npoolStream: 1\n", ":2: there is no setting 'poolStream'; did you mean poolStreams?"),
    (b"network: [a]\n", ":1: network must be a plain value, not a list or a mapping; write network: NAME"),
    (b"network: a\nnetwork: b\n", ":2: network is there twice, first in line 1"),
    (b"? [a]\n: b\n", ":1: a key must be a plain word"),
    (b"a: b: c\n", ":1: is not YAML: mapping values are not allowed here"),
    (b"- a\n", ":1: must be a mapping of keys to values; write key: value, one a line"),
    (b"network: &a x\nclusterId: *a\n", ":2: this YAML is too much: aliases are not taken here"),
    (b"network: a\n\xff\n", ":2: is not UTF-8; save it as UTF-8 text"),
    (b"network: " + b"[" * 5000 + b"]" * 5000, ":1: this YAML is too much: it is nested too deeply"),
    (b"#" * 300_000, ": is larger than 262144 bytes; is that the configuration file?"),
    (b"fakeCa: yes\n", ":1: fakeCa: 'yes' cannot be used; expected true or false"),
    (b"poolStreams: 1.5\n", ":1: poolStreams: '1.5' cannot be used; expected a number from 1 to 65535"),
    (b"\0", ": is not YAML: "),
]


@pytest.mark.parametrize(("content", "said"), BAD_FILES)
def test_bad_files(tmp_path, content, said):
    path = tmp_path / "node.yaml"
    path.write_bytes(content)
    (line,) = faults(config_file=path)
    assert line.startswith(f"{path}{said}")


def test_files_that_cannot_be_read(tmp_path):
    assert faults(config_file=tmp_path / "none") == [
        f"{tmp_path / 'none'}: cannot be read: no such file or directory; check the path and its permissions"
    ]
    assert faults(config_file=tmp_path) == [
        f"{tmp_path}: cannot be read: is a directory; check the path and its permissions"
    ]


def test_an_empty_file_says_nothing(tmp_path):
    assert read(config_file=write(tmp_path, "# nothing\n")) == read()


@given(st.binary(max_size=200))
def test_any_file_is_taken_or_named(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    try:
        read(config_file=path)
        found = ()
    except ConfigError as error:
        found = error.faults
    assert all(fault.source.startswith(str(path)) for fault in found)


# === Istio's documents ===


def test_istios_documents(tmp_path):
    mesh_config = tmp_path / "etc" / "istio" / "config" / "mesh"
    mesh_config.parent.mkdir(parents=True)
    mesh_config.write_text(
        "defaultConfig:\n  statsPort: 1\n  proxyAdminPort: 2\n  concurrency: 4\n  discoveryAddress: istiod:15012\n"
        "  proxyMetadata:\n    A: b\n    C: d\nother: true\n"
    )
    config = read(PROXY_CONFIG="statsPort: 3\nproxyMetadata: {A: x}\n")
    assert (str(config.stats), str(config.admin)) == ("*:3", "localhost:2")
    assert config.proxy_metadata == {"A": "x", "C": "d"}
    (note,) = config.notes
    assert note == "of Istio's proxy configuration these keys have no effect here: proxyMetadata, concurrency"
    environ = {name: text for name, text in LEAST.items() if name != "XDS_ADDRESS"}
    (line,) = faults(environ, least=False)
    assert line.startswith("etc/istio/config/mesh:5: discoveryAddress 'istiod:15012' cannot be had: ")


# === forms ===


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5m", 300), ("1h30m", 5400), ("10s", 10), ("100ms", 0.1), ("1.5s", 1.5), ("1d", 86400), ("1m 30s", 90)],
)
def test_durations(text, seconds):
    assert read_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "m", "-1s", "1y", "1s2", "1e3s", "s1", "9" * 50 + "s"])
def test_no_durations(text):
    with pytest.raises(ValueError, match="a number with its unit"):
        read_duration(text)


@given(st.integers(0, 10**9))
def test_durations_are_written_as_they_are_read(milliseconds):
    assert read_duration(format_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000)


@pytest.mark.parametrize(
    ("text", "shown", "addresses"),
    [
        ("80", "127.0.0.1:80", ("127.0.0.1",)),
        ("*:80", "*:80", ("::",)),
        ("localhost:80", "localhost:80", ("127.0.0.1", "::1")),
        ("10.0.0.1:0", "10.0.0.1:0", ("10.0.0.1",)),
        ("[::1]:80", "[::1]:80", ("::1",)),
        ("[::]:80", "[::]:80", ("::",)),
    ],
)
def test_listen_addresses(text, shown, addresses):
    address = read_listen("127.0.0.1")(text)
    assert (str(address), address.addresses()) == (shown, addresses)
    assert ListenAddress("*", 1).addresses(ipv6=False) == ("0.0.0.0",)
    assert ListenAddress("localhost", 1).addresses(ipv6=False) == ("127.0.0.1",)
    assert read_listen("127.0.0.1")("off") is None


@pytest.mark.parametrize("text", ["", "x", "1:2:3", "::1:80", "example.com:80", "70000", "1.2.3.4:", ":80", "-1"])
def test_no_listen_addresses(text):
    with pytest.raises(ValueError, match="PORT, ADDRESS:PORT"):
        read_listen("127.0.0.1")(text)


# === the reference pages ===


def test_the_page_of_the_environment_is_the_table():
    rows = re.findall(r"^\| `([^`]+)` \| (.*?) \| (.*) \|$", (DOCS / "node-environment.md").read_text(), re.MULTILINE)
    assert rows == list(environment_table())


def test_the_page_of_the_settings_is_the_table():
    page = (DOCS / "node-config.md").read_text()
    for group, rows in groupby(settings_table(), key=lambda row: row[0]):
        body = "\n".join(f"| {option} | {key} | {words} |" for _, option, key, words in rows)
        assert f"## {group}\n\n| option | in a file | |\n|---|---|---|\n{body}\n" in page


def test_the_example_of_the_page_is_one(tmp_path):
    example = re.search(r"```yaml\n(.*?)```", (DOCS / "node-config.md").read_text(), re.DOTALL)
    config = read(least=False, config_file=write(tmp_path, example[1]))
    assert (config.socks5, str(config.http_proxy)) == (None, "127.0.0.1:3128")
