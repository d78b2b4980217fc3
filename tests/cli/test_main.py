"""The command line itself: help, version, completion, options from the environment, and what loading costs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.command import WAIT, environment, files, hbone

from hbone_cli import cli

COMMANDS = [
    "inbound",
    "outbound",
    "connect",
    "ca",
    "ca init",
    "ca issue",
    "ca show",
    "node",
    "explain",
    "mesh",
    "mesh check",
    "mesh schema",
    "completion",
]


def run(*words, **options):
    return CliRunner().invoke(cli, words, **options)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Examples:\n" in result.stdout
    assert f"hbone {command}" in result.stdout.partition("Examples:")[2]


def test_help_lists_the_exit_codes():
    result = run("--help")
    assert result.exit_code == 0
    for code in range(14):
        assert f"\n    {code:>3}  " in result.stdout


def test_no_arguments_show_help():
    result = hbone()
    assert (result.code, "Usage: hbone" in result.err) == (2, True)


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("hbone ")


@pytest.mark.parametrize(
    ("shell", "part"), [("zsh", "#compdef hbone"), ("fish", "complete --no-files --command hbone")]
)
def test_completion_scripts(shell, part):
    result = run("completion", shell)
    assert result.exit_code == 0
    assert part in result.stdout


def test_bash_completes_options():
    words = environment(_HBONE_COMPLETE="bash_complete", COMP_WORDS="hbone outbound --so", COMP_CWORD="2")
    result = hbone(env=words)
    assert (result.code, result.out) == (0, b"plain,--socks\n")


def test_help_and_certificates_do_not_load_what_they_do_not_use():
    script = (
        "import sys\n"
        "from hbone_cli import cli\n"
        "try:\n    cli.main(['outbound', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'trio', 'OpenSSL', 'prometheus_client', 'rich'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=WAIT)


def test_a_node_without_admin_port_loads_no_http_server_for_it(pki):
    script = (
        "import sys, trio\n"
        "from hbone_cli import cli, _life\n"
        "trio.run = lambda *_: print(*sorted(sys.modules))\n"
        "cli.main(sys.argv[1:])\n"
    )
    words = ["inbound", "--listen", "127.0.0.1:0", *files(pki.server)]
    result = subprocess.run([sys.executable, "-c", script, *words], check=True, capture_output=True, timeout=WAIT)
    loaded = set(result.stdout.decode().split())
    assert "hbone.proxy" in loaded
    assert not {"hbone.admin", "rich"} & loaded


def test_options_from_the_environment(pki, tmp_path):
    target = "127.0.0.1:80"
    env = environment(HBONE_CERT=str(tmp_path / "none.pem"), HBONE_KEY="k", HBONE_ROOTS="r")
    result = hbone("connect", target, env=env)
    assert result.code == 3
    assert "none.pem" in result.line
    env = environment(HBONE_CONNECT_CERT=str(tmp_path / "none.pem"), HBONE_CONNECT_KEY="k", HBONE_CONNECT_ROOTS="r")
    assert "none.pem" in hbone("connect", target, env=env).line
    env = environment(HBONE_VIA="127.0.0.1:x")
    assert "--via" in hbone("connect", target, *files(pki.client), env=env).line


def test_the_command_line_wins_over_the_environment(pki, tmp_path):
    env = environment(HBONE_CERT="c", HBONE_KEY="k", HBONE_ROOTS="r")
    words = ["--ca", str(tmp_path / "ca"), "--identity", "spiffe://cluster.local/ns/a/sa/b"]
    result = hbone("connect", "127.0.0.1:80", *words, env=env)
    assert (result.code, "holds no CA" in result.line) == (3, True)
    env = environment(HBONE_CA="ca", HBONE_IDENTITY="spiffe://cluster.local/ns/a/sa/b")
    words = ["--cert", str(tmp_path / "none.pem"), "--key", "k", "--roots", "r"]
    assert "none.pem" in hbone("connect", "127.0.0.1:80", *words, env=env).line


def test_errors_as_json():
    result = run("connect", "nonsense", "--json")
    assert result.exit_code == 2
    error = json.loads(result.stderr)
    assert {key: error[key] for key in ("event", "kind", "exit_code")} == {
        "event": "error",
        "kind": "usage",
        "exit_code": 2,
    }
    assert "nonsense" in error["message"]


def test_a_bug_is_one_line_too(monkeypatch):
    from hbone_cli import _ca

    def broken(*_args, **_options):
        raise RuntimeError("no\nsuch\nluck")

    monkeypatch.setattr(_ca.show, "callback", broken)
    result = run("ca", "show", "x")
    assert result.exit_code == 1
    assert result.stderr == (
        "hbone: internal error: RuntimeError: no such luck; this should not happen: please report it, with -v\n"
    )


def test_the_reference_lists_the_exit_codes():
    from hbone_cli._errors import ExitCode

    page = Path(__file__).parents[2].joinpath("docs", "reference", "cli.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \|[^|]*\| (.*) \|$", page, re.MULTILINE))
    assert rows == {str(code.value): code.__doc__ for code in ExitCode}
