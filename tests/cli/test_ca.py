"""``hbone ca``: files that the proxies take, keys that only we can read, facts for people and for scripts."""

from __future__ import annotations

import json
import stat

import pytest
from click.testing import CliRunner
from support.command import Node, hbone

from hbone import Svid
from hbone_cli import cli

CART = "spiffe://cluster.local/ns/shop/sa/cart"


def run(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture
def ca(tmp_path):
    result = run("ca", "init", tmp_path / "ca")
    assert result.exit_code == 0, result.stderr
    return tmp_path / "ca"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_init_keeps_the_key_to_ourselves(ca):
    assert mode(ca) == 0o700
    assert {mode(path) for path in ca.iterdir()} == {0o600}


def test_issue_writes_an_svid(ca, tmp_path):
    result = run("ca", "issue", ca, CART, "-o", tmp_path / "cart", "--ttl", "90m")
    assert result.exit_code == 0, result.stderr
    names = [tmp_path / "cart" / name for name in ("cert.pem", "key.pem", "roots.pem")]
    assert mode(names[1]) == 0o600
    svid = Svid.from_files(*names)
    assert str(svid.identity) == CART
    assert 5300 < (svid.not_after - svid.not_before).total_seconds() < 5700
    assert f"--cert {names[0]} --key {names[1]} --roots {names[2]}" in result.stdout


def test_issue_as_json(ca, tmp_path):
    made = json.loads(run("ca", "issue", ca, CART, "-o", tmp_path / "cart", "--json").stdout)
    assert made["identity"] == CART
    assert str(Svid.from_files(made["cert"], made["key"], made["roots"]).identity) == CART


def test_init_as_json(tmp_path):
    made = json.loads(run("ca", "init", tmp_path / "ca", "--trust-domain", "example.org", "--json").stdout)
    assert made == {
        "directory": str(tmp_path / "ca"),
        "trust_domain": "example.org",
        "key": str(tmp_path / "ca" / "root-key.pem"),
    }


def test_show_says_what_is_in_it(pki):
    result = run("ca", "show", pki.client.cert)
    assert result.exit_code == 0
    assert pki.client.cert.read_text() not in result.stdout
    for part in ("spiffe://cluster.local/ns/shop/sa/cart", "no: a leaf", "ECDSA P-256", "hours left"):
        assert part in result.stdout
    assert "\x1b[" not in result.stdout


def test_show_warns(pki):
    assert "it has expired" in run("ca", "show", pki.expired.cert).stdout


def test_show_as_json(pki):
    (facts,) = json.loads(run("ca", "show", pki.client.cert, "--json").stdout)
    assert facts["identity"] == "spiffe://cluster.local/ns/shop/sa/cart"
    assert facts["is_ca"] is False
    assert facts["not_after"].endswith("Z")


def test_show_of_a_chain(pki, tmp_path):
    both = tmp_path / "both.pem"
    both.write_bytes(pki.client.cert.read_bytes() + pki.ca.roots.read_bytes())
    result = run("ca", "show", both)
    assert "certificate 2 of 2" in result.stdout
    assert "yes: a CA" in result.stdout


def test_a_node_lives_on_the_ca_alone(ca):
    with Node("inbound", "--listen", "127.0.0.1:0", "--ca", str(ca), "--identity", CART) as node:
        assert node.event("ready")["identity"] == CART
        assert node.stop() == 0


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["init", "{ca}"], 3, "holds a CA already"),
        (["init", "{tmp}/new", "--trust-domain", "No Domain"], 2, "No Domain"),
        (["issue", "{ca}", "spiffe://other.example/ns/a/sa/b", "-o", "{tmp}/x"], 2, "cannot issue"),
        (["issue", "{ca}", "cart", "-o", "{tmp}/x"], 2, "spiffe://"),
        (["issue", "{tmp}/none", CART, "-o", "{tmp}/x"], 3, "holds no CA"),
        (["issue", "{ca}", CART], 2, "--output"),
        (["issue", "{ca}", CART, "-o", "{tmp}/x", "--ttl", "soon"], 2, "90m"),
        (["issue", "{ca}", CART, "-o", "/dev/null/x"], 3, "cannot be written"),
        (["show", "{tmp}/none.pem"], 3, "none.pem"),
        (["show", "{ca}/root-key.pem"], 3, "root-key.pem"),
    ],
)
def test_bad_use(ca, tmp_path, words, code, part):
    result = run("ca", *(word.format(ca=ca, tmp=tmp_path) for word in words))
    assert result.exit_code == code
    (line,) = result.stderr.splitlines()
    assert line.startswith("hbone: ")
    assert part in line


def test_nobody_reads(pki):
    assert hbone("ca", "show", str(pki.client.cert)).err == ""
