"""``hbone explain`` as a command: what it takes, what it says when that is of no use, exit codes, JSON, completion."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest
from click.testing import CliRunner
from support.command import environment, hbone

from hbone_cli import cli

if TYPE_CHECKING:
    from click.testing import Result

ROOT = Path(__file__).parents[2]
SHOP = ROOT / "docs" / "howto" / "examples" / "shop.yaml"
STOCK = "stock.shop.svc.cluster.local:80"

MORE = """
workloads:
- {uid: a/one, name: twin, namespace: shop, workloadIps: [10.1.0.1], protocol: HBONE, node: n1, services: {}}
- {uid: a/two, name: twin, namespace: shop, workloadIps: [10.1.0.2], protocol: HBONE, node: n2, services: {}}
- {uid: a/three, name: three, namespace: shop, serviceAccount: three, workloadIps: [], services: {}}
- {uid: a/net, name: near, namespace: shop, workloadIps: [10.2.0.1], network: one, protocol: HBONE, services: {}}
- {uid: a/net2, name: far, namespace: shop, workloadIps: [10.2.0.1], network: two, protocol: HBONE, services: {}}
- {uid: a/only, name: only, namespace: shop, workloadIps: [10.2.0.2], network: two, protocol: HBONE, services: {}}
- {uid: a/host, name: host, namespace: shop, workloadIps: [10.3.0.1], networkMode: HostNetwork, services: {}}
- {uid: a//Pod/best, name: best, namespace: shop, workloadIps: [10.4.0.1], services: {}}
- {uid: a/vm, name: vm, namespace: shop, workloadIps: [10.4.0.1], services: {}, hostname: vm.example}
services:
- {name: hidden, namespace: web, hostname: hidden.example, vips: [two/10.96.0.9], ports: {}, visibility: Namespace}
- {name: shown, namespace: web, hostname: shown.web.example, vips: [two/10.96.0.8], ports: {80: 80}}
"""


@pytest.fixture(autouse=True)
def _nothing_said_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NETWORK", "LOCAL_XDS", "LOCAL_XDS_PATH", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def more(tmp_path: Path) -> Path:
    """A mesh in which names and addresses are hard to tell apart."""
    path = tmp_path / "more.yaml"
    path.write_text(MORE)
    return path


def run(*words: object, mesh: object = SHOP, **options: Any) -> Result:
    given = () if mesh is None else ("--mesh", str(mesh))
    return CliRunner().invoke(cli, ["explain", *given, *map(str, words)], **options)


def explain(*words: object, mesh: object = SHOP) -> dict[str, Any]:
    result = run(*words, "--json", mesh=mesh)
    assert result.stderr == ""
    said: dict[str, Any] = json.loads(result.stdout)
    return said


# === answers ===

ANSWERS = {
    "through": (["shop/cart-0", STOCK], 0),
    "by uid": (["lab//Pod/shop/cart-0", STOCK], 0),
    "by name and service account": (["shop/cart-0/cart", STOCK], 0),
    "by address": (["10.0.0.1", STOCK], 0),
    "by address mapped into IPv6": (["::ffff:10.0.0.1", STOCK], 0),
    "denied": (["web/page-0", "10.0.1.2:8080"], 9),
    "some ways": (["web/page-0", STOCK], 9),
    "one of them": (["web/page-0", STOCK, "--way", 1], 0),
    "the other": (["web/page-0", STOCK, "--way", 2], 9),
    "no route": (["shop/cart-0", "10.96.0.20:81"], 15),
    "far node has no way": (["shop/cart-0", "10.0.1.1:15006"], 11),
    "plain": (["shop/cart-0", "10.0.1.1:8080", "--plain"], 9),
    "stranger": (["192.0.2.1", "10.0.9.1:80"], 0),
    "stranger to a service": (["192.0.2.1", STOCK], 15),
    "own port": (["shop/cart-0", "127.0.0.1:15080"], 15),
}


@pytest.mark.parametrize(("words", "code"), ANSWERS.values(), ids=ANSWERS)
def test_exit_code(words: list[object], code: int) -> None:
    client, target, *rest = words
    result = run("--from", client, "--to", target, *rest)
    assert result.exit_code == code
    assert result.stderr == ""
    said = explain("--from", client, "--to", target, *rest)
    assert result.stdout.splitlines()[-1] == said["conclusion"]
    assert (said["outcome"] == "through") is (code == 0)


def test_as_a_process() -> None:
    words = ["explain", "--from", "web/page-0", "--to", STOCK]
    result = hbone(*words, env=environment(LOCAL_XDS_PATH=str(SHOP)))
    assert (result.code, result.err) == (9, "")
    assert b"\x1b" not in result.out
    assert b"would be allowed (allowed by: shop/callers), if there was no shop/no-pages\n" in result.out


def test_colours_are_for_terminals() -> None:
    plain = run("--from", "web/page-0", "--to", STOCK).stdout
    assert "\x1b" not in plain
    coloured = run("--from", "web/page-0", "--to", STOCK, env={"FORCE_COLOR": "1", "TERM": "xterm"}).stdout
    assert re.search(r"\x1b\[31m.*explicitly denied by: shop/no-pages", coloured)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def test_ways() -> None:
    one = run("--from", "web/page-0", "--to", STOCK).stdout
    assert "way 2: at the node of shop/stock-1" in one  # the one that fails
    assert "way 1: at the node" not in one
    every = run("--from", "web/page-0", "--to", STOCK, "--all").stdout
    assert every.index("way 1: at the node of shop/stock-0") < every.index("way 2: at the node of shop/stock-1")
    chosen = run("--from", "web/page-0", "--to", STOCK, "--way", "2").stdout
    assert "note  the steps at the client's node are those of way 1" in chosen
    assert "stock-0 (allowed" not in chosen
    (way,) = explain("--from", "web/page-0", "--to", STOCK, "--way", 2)["ways"]
    assert (way["share"], way["workload"]["name"]) == (0.25, "stock-1")
    few = explain("--from", "web/page-0", "--to", STOCK, "--limit", 1)
    assert (len(few["ways"]), few["omitted"]) == (1, 0.25)


# === where the mesh comes from ===


def test_a_mesh_from_the_environment_or_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--from", "shop/cart-0", "--to", STOCK]
    assert run(*words, "--mesh", "-", mesh=None, input=SHOP.read_bytes()).exit_code == 0
    monkeypatch.setenv("LOCAL_XDS", SHOP.read_text())
    assert run(*words, mesh=None).exit_code == 0
    monkeypatch.setenv("LOCAL_XDS", "{}")
    monkeypatch.setenv("LOCAL_XDS_PATH", str(SHOP))
    assert run(*words, mesh=None).exit_code == 0


def test_a_mesh_with_faults(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text("workloads:\n- {name: a}\n- {name: b, namespace: c, protocol: TLS}\n")
    result = run("--from", "c/b", "--to", "10.0.0.1:80", mesh=path)
    assert (result.exit_code, result.stdout) == (14, "")
    lines = result.stderr.splitlines()
    assert len(lines) > 1
    assert all(line.startswith(f"hbone: {path}:") for line in lines)
    gone = run("--from", "c/b", "--to", "10.0.0.1:80", mesh=tmp_path / "none.yaml")
    assert (gone.exit_code, gone.stderr) == (
        14,
        f"hbone: {tmp_path / 'none.yaml'}: cannot be read: no such file or directory\n",
    )


# === who and where ===

SEE = "; see: hbone explain --help"
FROM, TO = "Invalid value for '--from': ", "Invalid value for '--to': "
NONE, FORMS = f"{FROM}there is no workload", "write NAMESPACE/NAME, a uid or an IP address"
TWO_NETWORKS = '"one" (shop/near), "two" (shop/far)'

#: With one mesh, then with the other.
WRONG = {
    "shop/cart-0 --to stock": f"{TO}'stock': the port is missing; write host:port",
    "shop/cart-0 --to stock:http": f"{TO}'stock:http': the port is not a plain decimal number",
    "shop/cart-0 --source-ip x": "Invalid value for '--source-ip': 'x' is not an IP address",
    "shop/card-0": f"{NONE} 'shop/card-0'; did you mean shop/cart-0?",
    "web/cart-0": f"{NONE} 'web/cart-0'; did you mean shop/cart-0?",
    "cart-0": f"{NONE} 'cart-0'; did you mean shop/cart-0?",
    "zzz": f"{NONE} 'zzz'; {FORMS}",
    "zzz/y": f"{NONE} 'zzz/y'",
    "10.0.0": f"{NONE} '10.0.0'; {FORMS}",
    "shop/cart-0 --way 3": "Invalid value for '--way': there is no way 3; there are 2",
    "shop/cart-0 --way 1 --all": "--way is one way and --all is all of them: give one of the two",
}
MORE_WRONG = {
    "shop/twin": f"{FROM}shop/twin are 2 workloads; say which by its uid: a/one, a/two",
    "shop/twin --node-name n3": f'{FROM}shop/twin is not on the node "n3", but on "n1", "n2"',
    "shop/three": f"{FROM}shop/three has no address: say where it connects from with --source-ip",
    "10.2.0.1": f"{FROM}10.2.0.1 is an address in several networks: {TWO_NETWORKS}; say which one with --network",
}


@pytest.mark.parametrize(("words", "message"), [*WRONG.items(), *MORE_WRONG.items()])
def test_what_is_wrong(words: str, message: str, more: Path) -> None:
    result = run("--to", STOCK, "--from", *words.split(), mesh=more if words in MORE_WRONG else SHOP)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"hbone: {message}{SEE}\n")


def test_no_mesh() -> None:
    result = run("--from", "shop/cart-0", "--to", STOCK, mesh=None)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"hbone: there is no mesh: give --mesh FILE, or set LOCAL_XDS_PATH{SEE}\n"


def test_who_is_missing() -> None:
    assert "Missing option '--from'" in run("--to", STOCK).stderr
    assert "Missing option '--to'" in run("--from", "shop/cart-0").stderr


def only(whose: str, workload: str) -> list[str]:
    return [f"{whose}: only a node that is dedicated to {workload} knows its connections"]


def nobody(whose: str) -> str:
    return f"{whose}: no node would carry its connection, so it comes in plain text"


WHO: dict[str, tuple[str | None, str, list[str]]] = {
    "shop/twin --node-name n2": ("a/two", "", []),
    "10.1.0.2 --node-name n2": ("a/two", "", []),
    "shop/three --source-ip 10.9.9.9": (
        "a/three",
        "",
        only('10.9.9.9 is no address of shop/three in the network ""', "shop/three"),
    ),
    "shop/far": ("a/net2", "two", []),
    "10.2.0.1 --network one": ("a/net", "one", []),
    "10.2.0.2": ("a/only", "two", []),
    "shop/host": ("a/host", "", only("10.3.0.1 is the address of shop/host's node", "shop/host")),
    "shop/vm": ("a/vm", "", only("a node takes 10.4.0.1 for the address of shop/best (a//Pod/best)", "shop/vm")),
    "10.3.0.1": (
        None,
        "",
        [
            "10.3.0.1 is the address of a node, which shop/host has too: say which by its name",
            nobody('10.3.0.1 is no workload\'s address in the network ""'),
        ],
    ),
    "10.1.0.2 --node-name n1": (None, "", [nobody('10.1.0.2 is no workload\'s address on the node "n1"')]),
}


@pytest.mark.parametrize(("words", "uid", "network", "hints"), [(words, *who) for words, who in WHO.items()], ids=WHO)
def test_who_is_meant(words: str, uid: str | None, network: str, hints: list[str], more: Path) -> None:
    said = explain("--to", "192.0.2.1:80", "--from", *words.split(), mesh=more)
    workload = said["client"]["workload"]
    assert (workload and workload["uid"], said["network"], said["hints"]) == (uid, network, hints)
    assert said["plain"] is (uid is None)


HINTS = {
    "a prefix": ("shown.web:80", ["the mesh does not know shown.web; did you mean shown.web.example?"]),
    "misspelt": ("show.web.example:80", ["the mesh does not know show.web.example; did you mean shown.web.example?"]),
    "known": ("shown.web.example:80", []),
    "a workload's": ("vm.example:80", []),
    "unknown": ("www.python.org:80", []),
    "somebody else's": (
        "hidden.example:80",
        ["web/hidden.example has that name, but only clients of its own namespace see it"],
    ),
    "in another network": (
        "10.2.0.1:80",
        [
            '10.2.0.1 is an address of shop/near in the network "one"',
            '10.2.0.1 is an address of shop/far in the network "two"',
        ],
    ),
    "a VIP of another network": ("10.96.0.8:80", ['10.96.0.8 is a VIP of web/shown.web.example in the network "two"']),
    "an address of this one": ("10.1.0.2:80", []),
}


@pytest.mark.parametrize(("target", "hints"), HINTS.values(), ids=HINTS)
def test_what_may_be_meant(target: str, hints: list[str], more: Path) -> None:
    assert explain("--from", "10.1.0.1", "--to", target, mesh=more)["hints"] == hints
    said = run("--from", "10.1.0.1", "--to", target, mesh=more).stdout
    assert [line.removeprefix("note  ") for line in said.splitlines() if line.startswith("note  ")] == hints


# === JSON ===


def test_the_reference_has_every_key() -> None:
    page = (ROOT / "docs" / "reference" / "cli.md").read_text("utf-8").partition("## hbone explain")[2]
    documented: dict[str, set[str]] = {}
    name = ""
    for first, key in re.findall(r"^\| (\w*) ?\| `(\w+)` \|", page.partition("\n## ")[0], re.MULTILINE):
        name = first or name
        documented.setdefault(name, set()).add(key)
    found: dict[str, set[str]] = {name: set() for name in documented}

    def look(name: str, value: Any) -> None:
        if isinstance(value, list):
            for one in value:
                look(name, one)
        elif isinstance(value, dict):
            found[name] |= value.keys()
            for key, below in value.items():
                if (name, key) in BELOW:
                    look(BELOW[name, key], below)

    said = explain("--from", "web/page-0", "--to", STOCK)
    look("explanation", said)
    look("explanation", explain("--from", "shop/cart-0", "--to", "report.shop.svc.cluster.local:80"))
    for way in said["ways"]:
        for policy in way["arrival"]["policy"]["policies"]:
            for rule in policy["rules"]:
                assert rule.keys() == {"matched", "clauses"}
                for clause in rule["clauses"]:
                    assert clause.keys() == {"matched", "matches"}
                    for match in clause["matches"]:
                        assert match.keys() == {"matched", "fields"}
                        look("field", match["fields"])
    assert found == documented


BELOW = {
    ("explanation", "client"): "client",
    ("explanation", "ways"): "way",
    ("client", "workload"): "workload",
    ("way", "workload"): "workload",
    ("way", "arrival"): "arrival",
    ("way", "behind"): "explanation",
    ("arrival", "workload"): "workload",
    ("arrival", "flow"): "flow",
    ("arrival", "policy"): "verdict",
    ("verdict", "policies"): "policy",
    ("verdict", "changes"): "change",
    ("change", "fields"): "field",
}


# === policies in words ===

EMPTY = """
workloads:
- {uid: a, name: a, namespace: n, workloadIps: [10.0.0.1], protocol: HBONE, services: {}}
- {uid: b, name: b, namespace: n, workloadIps: [10.0.0.2], services: {}, authorizationPolicies: [n/gone]}
policies:
- {name: none, namespace: n, scope: Namespace, action: Deny, dryRun: false, rules: []}
- {name: always, namespace: n, scope: Namespace, action: Allow, dryRun: false, rules: [[]]}
- {name: clause, namespace: n, scope: Namespace, action: Allow, dryRun: false, rules: [[[]]]}
- {name: match, namespace: n, scope: Namespace, action: Deny, dryRun: false, rules: [[[{}]]]}
"""


def test_what_is_empty_in_words(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(EMPTY)
    lines = run("--from", "n/a", "--to", "10.0.0.2:80", mesh=path).stdout.splitlines()
    start = lines.index("policy for n/b")
    assert lines[start + 2 : start + 13] == [
        "  allowed by: n/always",
        "  ALLOW n/always matches, and decides",
        "    rule 1 holds: it has no clauses, and so always holds",
        "  ALLOW n/clause matches",
        "    rule 1 holds: a clause without matches always holds",
        "  DENY n/match does not match",
        "    rule 1 fails: a match without fields never holds",
        "  DENY n/none does not match",
        "    it has no rules, and so never matches",
        "  the workload names n/gone, which does not exist",
        "  would be allowed (no allow policies), if there was no n/always and no n/clause",
    ]


def test_many_policies_are_not_all_told(tmp_path: Path) -> None:
    rule = "[[{principals: [!Exact a/b]}]]"
    many = "\n".join(
        f"- {{name: {name}, namespace: n, scope: Namespace, action: Allow, dryRun: false, rules: [{rule}]}}"
        for name in [f"p{number:03}" for number in range(100)]
    )
    some = ", ".join([rule] * 30 + ["[]"])
    last = f"- {{name: z, namespace: n, scope: Namespace, action: Allow, dryRun: false, rules: [{some}]}}\n"
    path = tmp_path / "mesh.yaml"
    path.write_text(f"{EMPTY.partition('policies:')[0]}policies:\n{many}\n{last}")
    lines = run("--from", "n/a", "--to", "10.0.0.2:80", mesh=path).stdout.splitlines()
    assert sum(line.endswith(" does not match") for line in lines) == 20
    start = lines.index("  80 more do not match") - 3
    assert lines[start : start + 4] == [
        "    rule 20 fails: principals: the client has none, that could fit Exact a/b",
        "    rule 31 holds: it has no clauses, and so always holds",
        "    10 more rules fail",
        "  80 more do not match",
    ]
    path.write_text(f"{EMPTY.partition('policies:')[0]}policies:\n{many}\n")
    lines = run("--from", "n/a", "--to", "10.0.0.2:80", mesh=path).stdout.splitlines()
    assert sum(line.startswith("  would be ") for line in lines) == 20
    assert "  81 more things would change it" in lines
    path.write_text(f"{EMPTY.partition('policies:')[0]}policies:\n{many.replace('principals: [!Exact a/b]', '')}\n")
    (line,) = [
        line for line in run("--from", "n/a", "--to", "10.0.0.2:80", mesh=path).stdout.splitlines() if "would" in line
    ]
    assert len(line) == 1006
    assert line.endswith(" ...")


# === completion ===


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (f"--mesh {SHOP} --from shop/s", ["shop/stock-0", "shop/stock-1"]),
        (f"--mesh {SHOP} --from web", ["web/page-0"]),
        (f"--mesh {SHOP} --to st", [STOCK]),
        ("--from s", []),
        ("--mesh - --from s", []),
        ("--mesh /nowhere --to s", []),
        ("--res", ["--resolves-to"]),
    ],
)
def test_completion(line: str, found: list[str]) -> None:
    from click.shell_completion import ShellComplete

    *words, incomplete = line.split()
    complete = ShellComplete(cli, {}, "hbone", "_HBONE_COMPLETE")
    assert [item.value for item in complete.get_completions(["explain", *words], incomplete)] == found


def test_help_has_examples() -> None:
    result = CliRunner().invoke(cli, ["explain", "--help"])
    assert result.exit_code == 0
    assert "hbone explain" in result.stdout.partition("Examples:")[2]
    assert isinstance(cli.get_command(click.Context(cli), "explain"), click.Command)
