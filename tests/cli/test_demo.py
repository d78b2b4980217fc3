"""``hbone demo``: what it says is what happened, it fails when something does, and it leaves nothing behind."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hbone_cli import _demo_steps, main
from hbone_cli._demo_app import pattern
from hbone_cli._demo_children import Child, ChildFailed
from hbone_cli._demo_steps import CONNECTIONS, HOSTNAME, TUNNELS, VIP, Demo, DemoFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

CART = "spiffe://cluster.local/ns/shop/sa/cart"
WEB = "spiffe://cluster.local/ns/shop/sa/web"
COMMAND = [sys.executable, "-m", "hbone_cli", "demo"]
MIB = 1 << 20

#: Seconds that only something that hangs needs: for a whole demo, and for the rest.
RUN = 110
WAIT = 60


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the demo makes its temporary files."""
    path = tmp_path / "tmp"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    return path


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=RUN,
        check=False,
        env=os.environ | {"COLUMNS": "80"} | environment,
    )


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # A child of init that nobody has collected yet is as good as gone.
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return status.stdout.strip().startswith("Z") or not status.stdout.strip()


def wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + WAIT
    while [pid for pid in pids if not is_gone(pid)]:
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.05)


# === what it shows ===


def test_each_step_and_what_it_says_to_machines(temporary: Path) -> None:
    size = 256
    result = run("--json")
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert document["ok"] is True
    assert 0 < document["seconds"] < RUN
    steps = {step["name"]: step for step in document["steps"]}
    assert list(steps) == [
        *("start", "request", "upload", "download", "connections", "denied", "foreign", "change", "counters"),
    ]
    assert all(step["ok"] for step in steps.values())
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    assert re.findall("^✓ (.*?): ", readme, re.MULTILINE) == [step["title"] for step in steps.values()]
    digest = hashlib.sha256()
    for piece in pattern(size * MIB):
        digest.update(piece)
    for name in ("upload", "download"):
        assert (steps[name]["bytes"], steps[name]["sha256"]) == (size * MIB, digest.hexdigest())
        assert steps[name]["megabytes_per_second"] > 0
    assert steps["connections"]["connections"] == CONNECTIONS
    assert steps["request"]["hosts"] == [HOSTNAME, VIP]
    assert steps["denied"]["status"] == 401
    assert "policy rejection: explicitly denied by: shop/not-the-bank" in steps["denied"]["log"]
    assert "issuer is not among our roots" in steps["foreign"]["log"]
    assert "policy change: explicitly denied by: shop/closed-today" in steps["change"]["log"]
    assert 0 < steps["change"]["seconds"] < RUN
    route = document["route"]
    assert (route["source"], route["destination"], route["tls_version"]) == (CART, WEB, "TLSv1.3")
    assert route["cipher"] in ("TLS_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256")
    assert len(document["access_log"]["node a"]) == TUNNELS
    assert len(document["access_log"]["node b"]) == TUNNELS + 1
    for line in document["access_log"]["node a"]:
        assert f'dst.service="{HOSTNAME}" dst.workload="web-0"' in line
    a, b = document["counters"]["node a"], document["counters"]["node b"]
    assert (a["connections opened"], b["connections opened"]) == (TUNNELS, TUNNELS + 1)
    assert a["bytes up"] == b["bytes up"] > size * MIB
    assert (b["closed by policy"], b["tunnels refused (401)"], b["handshakes failed"]) == (2, 1, 1)
    assert list(temporary.iterdir()) == []


def test_what_people_read_without_a_terminal(temporary: Path) -> None:
    result = run("--size", "1", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"ok a request to {HOSTNAME}, and one to its address {VIP}" in result.stdout
    assert "\x1b" not in result.stdout
    assert "\r" not in result.stdout
    for words in (
        CART,
        WEB,
        "TLSv1.3",
        "upload 1 MiB",
        "SHA-256 equal",
        "status 401: explicitly denied by: shop/not-the-bank",
        "another CA",
        "s: explicitly denied by: shop/closed-today",
        "All of it worked",
    ):
        assert words in result.stdout
    assert re.search(r"connections opened +206 +207", result.stdout)
    assert re.findall(r"\.\.\. (\d+) more", result.stdout) == ["204", "203"]
    assert result.stdout.count(" error access connection complete ") == 2  # who is denied is an error of node b's


def test_a_terminal_gets_a_progress_bar_and_its_cursor_back(temporary: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*COMMAND, "--size", "16"], stdin=theirs, stdout=theirs, stderr=theirs, env=terminal())
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO is how Linux says that the other end is closed
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    assert process.wait(WAIT) == 0
    text = shown.decode()
    assert "━" in text
    assert "MB/s" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") > 0


def terminal() -> dict[str, str]:
    return {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"} | {"NO_COLOR": ""}


# === when it fails ===


class Quiet:
    """A show that interferes."""

    def __init__(self, **hooks: Any) -> None:
        self.hooks = hooks

    def begins(self, title: str, size: int | None = None) -> None:
        if title.split()[0] in self.hooks:
            self.hooks[title.split()[0]]()

    def moved(self, done: int) -> None:
        if "moved" in self.hooks:
            self.hooks["moved"](done)

    def ended(self, step: Any) -> None:
        pass

    def route(self, route: Any) -> None:
        pass

    def log_line(self, line: str) -> None:
        pass


def test_a_node_that_dies_fails_the_step_in_which_it_does(temporary: Path) -> None:
    def kill(done: int) -> None:
        if done >= 4 * MIB:
            os.kill(demo.b.pid, signal.SIGKILL)

    with Demo(Quiet(moved=kill), 64 * MIB) as demo, pytest.raises(DemoFailed) as failure:
        demo.run()
    assert failure.value.step == "upload 64 MiB"
    assert [step.name for step in demo.steps] == ["start", "request"]
    assert list(temporary.iterdir()) == []


def test_bytes_that_differ_fail_the_step(temporary: Path) -> None:
    with Demo(Quiet(), 2 * MIB) as demo:
        digest = demo._digest
        demo._digest = lambda: (digest(), setattr(demo, "_expected", "0" * 64))  # type: ignore[method-assign]
        with pytest.raises(DemoFailed, match="upload 2 MiB: SHA-256 is .* instead of 000"):
            demo.run()


def test_a_stranger_who_is_let_in_fails_the_step(temporary: Path) -> None:
    with Demo(Quiet(), MIB) as demo:

        def issue_as_cart() -> None:
            issue = demo._ca.issue
            demo._ca.issue = lambda _: issue(CART)  # type: ignore[method-assign, assignment]

        demo._show = Quiet(a=issue_as_cart)
        with pytest.raises(DemoFailed, match="a request from bank/teller, which policy denies: it was let in"):
            demo.run()


def test_traffic_that_nobody_asked_for_fails_the_count(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_more() -> None:
        monkeypatch.setattr(_demo_steps, "_SETTLE", 0.0)
        assert greeting(demo.ports).startswith("hello")

    with Demo(Quiet(the=one_more), MIB) as demo, pytest.raises(DemoFailed, match="connections opened is 207, not 206"):
        demo.run()


def test_where_there_is_one_loopback_address_and_an_environment_for_other_nodes(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_demo_steps, "_ADDRESSES", ("192.0.2.1", "127.0.0.1"))
    for name in ("CRL_PATH", "HBONE_NODE_SOCKS5", "PROXY_CONFIG", "XDS_ADDRESS"):
        monkeypatch.setenv(name, "nonsense")
    with Demo(Quiet(), MIB) as demo:
        demo.run()
        assert demo.route is not None
        assert demo.route.inbound.startswith("127.0.0.1:")


def test_a_connection_that_is_closed_for_another_reason_fails_the_step(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_demo_steps, "_CLOSED", _demo_steps._CLOSED.replace("closed-today", "something-else"))
    with Demo(Quiet(), MIB) as demo, pytest.raises(DemoFailed, match=r"log does not say so: .*: shop/something-else"):
        demo.run()


@pytest.mark.parametrize("as_json", [False, True])
def test_a_failure_names_its_step(
    as_json: bool, temporary: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Demo, "_connections", lambda demo: demo.a.wait_lines(99, timeout=0.1))
    with pytest.raises(SystemExit) as leaving:
        main(["demo", "--size", "1", *(["--json"] if as_json else [])])
    assert leaving.value.code == 1
    output, errors = capfd.readouterr()
    why = "node a wrote fewer than 99 lines of access log within 0.1 s"
    if as_json:
        document = json.loads(output)
        assert (document["ok"], document["failed_step"], document["error"]) == (False, "download 1 MiB", why)
        assert [step["name"] for step in document["steps"]] == ["start", "request", "upload", "download"]
    else:
        assert re.fullmatch(rf"hbone: the demo failed after .* s, in step 'download 1 MiB': {why}\n", errors)


def test_a_failure_at_the_very_start(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_demo_steps, "_own_address", lambda: "192.0.2.1")
    with pytest.raises(SystemExit) as leaving:
        main(["demo", "--json"])
    assert leaving.value.code == 1
    document = json.loads(capfd.readouterr().out)
    assert (document["failed_step"], document["mesh"]) == ("start two nodes and an application", None)
    assert "the application has ended; it said:\nTraceback" in document["error"]


def test_a_child_that_does_not_start_says_why() -> None:
    with Child("node c", "node") as child:
        child.run(Path(os.sep), "node", "--json", "--socks5", "nowhere")
        with pytest.raises(ChildFailed, match=r"(?s)^node c has ended; it said:.*--socks5: 'nowhere' cannot be used"):
            child.wait_ready()


# === keeping it ===


@contextlib.contextmanager
def kept(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any], list[int]]]:
    """A demo that goes on, what it has said, and the processes that it has started."""
    process = subprocess.Popen(
        [*COMMAND, "--keep", "--json", "--size", "1", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        text = ""
        for line in process.stdout:
            text += line
            if line == "}\n":
                break
        children = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        pids = [int(row.split()[0]) for row in children if int(row.split()[1]) == process.pid]
        assert len(pids) == 3
        yield process, json.loads(text), pids
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def get(port: int, path: str, through: str | None = None) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
    if through is not None:
        connection.set_tunnel(through, 80)
    connection.request("GET", path)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def greeting(ports: dict[str, dict[str, int]]) -> str:
    """What the application says, through the mesh."""
    return get(ports["a"]["http_proxy"], "/", HOSTNAME)


def test_kept_it_works_until_it_is_told_to_end(temporary: Path) -> None:
    with kept() as (process, document, pids):
        assert document["ok"]
        assert greeting(document["ports"]).startswith("hello")
        assert "istio_tcp_connections_opened_total" in get(document["ports"]["b"]["stats"], "/metrics")
        assert Path(document["mesh"]).is_file()
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 128 + signal.SIGTERM
        wait_gone(pids)
    assert list(temporary.iterdir()) == []


def test_nobody_outlives_a_demo_that_is_killed(temporary: Path) -> None:
    with kept() as (process, _, pids):
        process.kill()
        process.wait(WAIT)
        wait_gone(pids)


def test_interrupted_in_the_middle_it_leaves_nobody(temporary: Path) -> None:
    process = subprocess.Popen([*COMMAND, "--size", "65536"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "application " in line:  # the last line of the drawing; the upload is next
            break
    rows = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pids = [int(row.split()[0]) for row in rows.splitlines() if int(row.split()[1]) == process.pid]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    assert "Traceback" not in errors
    wait_gone(pids)
    assert list(temporary.iterdir()) == []


def test_what_it_invites_to_try_until_ctrl_c(temporary: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--keep", "--size", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.strip())
        if "Ctrl-C" in line:
            break
    tries = [re.split("    #| [|]", line)[0] for line in lines if line.startswith("curl ")]
    assert len(tries) == 9
    assert f"http://{HOSTNAME}/" in tries[0]
    (port,) = re.findall(r"^curl -p -x http://127.0.0.1:(\d+) ", "\n".join(tries), re.MULTILINE)
    assert get(int(port), "/", VIP).startswith("hello")
    for line in process.stdout:  # the log follows
        if "connection complete" in line:
            break
    (mesh,) = [line for line in lines if line.endswith(".yaml")]
    assert Path(mesh).read_text().startswith("# The mesh of this demo")
    if _curl_works():
        for line in tries:
            words = line.replace("/bytes/1000000000", "/bytes/1000000").split()
            proxies = "" if "-x" in words else "*"
            done = subprocess.run(
                [words[0], "-q", "-sS", "--fail", "--noproxy", proxies, *words[1:]],
                capture_output=True,
                text=True,
                timeout=WAIT,
                check=False,
            )
            assert done.returncode == 0, (line, done.stderr)
    process.send_signal(signal.SIGINT)
    reader = threading.Thread(target=process.stdout.read)
    reader.start()
    assert process.wait(WAIT) == 0
    reader.join()
    process.communicate()


def _curl_works() -> bool:
    try:
        return subprocess.run(["curl", "--version"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
