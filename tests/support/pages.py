"""Runs what a page of the documentation tells its readers to run, and compares what it shows with what comes.

    with Reader(tmp_path) as reader:
        reader.follow(ROOT / "docs" / "tutorial" / "mesh.md")

A block of ``sh`` is run, and has to go well. A block of ``console`` is run, too, and has to show what follows its
commands. A block of ``text`` has lines of the node's log. What a reader starts in a terminal of its own (a server, a
node) goes on until the end, or until the next node is started.

Ports are free ones, wherever a page names one: an application says which it has got, and so does a node. Times,
lengths and ports that the system has chosen are not compared; ``...`` in what a page shows stands for anything.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from support.command import WAIT, Lines

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ROOT", "Reader", "blocks"]

ROOT: Final = Path(__file__).parents[2]

_BLOCK: Final = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SERVER: Final = re.compile(r"^python3 -m http\.server (\d+)")
_NODE: Final = re.compile(r"([A-Z_]+=\S* )*hbone node\b")
_ASKS_NODE: Final = re.compile(r"curl -s localhost:15")
#: What is different each time.
_VARIES: Final = (
    (r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME"),
    (r"\b\d+(\.\d+)?ms\b", "DURATION"),
    (r"\b(src\.addr=[^ ]*):\d+", r"\1:PORT"),
    (r"\b(bytes_sent|bytes_recv)=\d+", r"\1=SIZE"),
    (r"[ \t]+", " "),
)
#: The ports of a node, and the component that says in the log where it listens.
_LISTENERS: Final = {
    15000: "admin",
    15001: "outbound",
    15006: "inbound plaintext",
    15008: "inbound",
    15020: "stats",
    15021: "readiness",
    15080: "socks5",
}
_FREE: Final = {
    "HBONE_NODE_ADMIN": "127.0.0.1:0",
    "HBONE_NODE_HBONE_PORT": "0",
    "HBONE_NODE_INBOUND": "*:0",
    "HBONE_NODE_OUTBOUND": "127.0.0.1:0",
    "HBONE_NODE_PLAINTEXT": "127.0.0.1:0",
    "HBONE_NODE_READINESS": "127.0.0.1:0",
    "HBONE_NODE_SOCKS5": "127.0.0.1:0",
    "HBONE_NODE_STATS": "127.0.0.1:0",
    "HBONE_NODE_MESH_INTERVAL": "50ms",
}


def blocks(page: Path, section: str | None = None) -> Iterator[tuple[str, str]]:
    """The code of a page, or of one section of it, as language and text."""
    text = page.read_text("utf-8")
    if section is not None:
        _, found, text = text.partition(f"\n## {section}\n")
        assert found, f"{page.name} has no section {section!r}"
        text = text.partition("\n## ")[0]
    for match in _BLOCK.finditer(text):
        yield match[1], match[2]


class Reader:
    """Somebody in a directory of their own, with ``hbone``, ``python3`` and the examples."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ports: dict[int, int] = {}
        self._node: _Running | None = None
        self._running: list[_Running] = []
        programs = directory / "bin"
        programs.mkdir()
        for name, words in (("hbone", "-m hbone_cli "), ("python3", "")):
            path = programs / name
            path.write_text(f'#!/bin/sh\nexec {sys.executable} {words}"$@"\n')
            path.chmod(0o755)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HBONE_", "XDG_"))}
        self._environment = {key: value for key, value in environment.items() if not key.lower().endswith("_proxy")}
        self._environment |= _FREE | {
            "HOME": str(directory),
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
        }
        if not os.environ.get("PYTHONSAFEPATH"):  # then it is the wheel that is tested
            self._environment["PYTHONPATH"] = str(ROOT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        for one in reversed(self._running):
            one.end()

    def follow(self, page: Path, section: str | None = None) -> None:
        """Do all that a page says, in order."""
        for language, text in blocks(page, section):
            if language == "sh":
                self._run(text)
            elif language == "console":
                self._compare(text)
            elif language == "text":
                self._look_for(text)

    def serve(self, port: int) -> None:
        """Have an application there, before a page begins that speaks of one."""
        self._start(f"python3 -m http.server {port}")

    # === blocks ===

    def _run(self, text: str) -> None:
        lines = text.replace("\\\n", " ").splitlines()
        here: list[str] = []
        for line in lines:
            if _SERVER.match(line) or _NODE.match(line):
                self._start(line.partition("  #")[0])
            elif line.endswith("&"):
                self._shell("\n".join(here))
                here = []
                self._launch(self._localized(line.removesuffix("&")))
            else:
                here.append(line)
        if here:
            self._shell("\n".join(here))

    def _compare(self, text: str) -> None:
        commands, wanted = [], []
        for line in text.splitlines():
            if line.startswith("$ "):
                commands.append(line[2:])
            else:
                wanted.append(line)
        expected = self._localized("\n".join(wanted))
        # What a node shows of itself may come a moment later; to ask again changes nothing.
        ending = time.monotonic() + (WAIT if all(_ASKS_NODE.match(command) for command in commands) else 0)
        while True:
            shown = self._shell("\n".join(commands), check=False)
            if _fits(expected, shown):
                return
            assert time.monotonic() < ending, f"{commands} shows\n{shown}\nand not\n{expected}"
            time.sleep(0.02)

    def _look_for(self, text: str) -> None:
        assert self._node is not None
        for line in self._localized(text).splitlines():
            self._node.take(line)

    # === running ===

    def _localized(self, text: str) -> str:
        """With the ports that there are."""
        return re.sub(r"(?<![\d.])\d{4,5}(?!\d)", lambda found: str(self._ports.get(int(found[0]), found[0])), text)

    def _write_examples(self) -> None:
        target = self._directory / "examples"
        target.mkdir(exist_ok=True)
        for path in (ROOT / "examples").glob("*.yaml"):
            (target / path.name).write_text(self._localized(path.read_text("utf-8")))

    def _shell(self, script: str, *, check: bool = True) -> str:
        self._write_examples()
        result = subprocess.run(
            ["bash", "-c", self._localized(script)],
            cwd=self._directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WAIT,
            check=False,
        )
        assert not check or result.returncode == 0, f"{script}\n{result.stdout}"
        return result.stdout

    def _start(self, command: str) -> None:
        server = _SERVER.match(command)
        if server:
            started = self._launch(command.replace(server[1], "0", 1))
            line = started.lines.wait(lambda said: " port " in said, f"the port of {command}")
            self._ports[int(server[1])] = int(line.partition(" port ")[2].split()[0])
            return
        if self._node is not None:
            self._node.end()
        self._write_examples()
        self._node = self._launch(self._localized(command))
        self._node.lines.wait(lambda said: "marking server ready" in said, command)
        for line in self._node.lines.now:
            found = re.search(r'listener established\s+address=\S*:(\d+) component="([^"]*)"', line)
            for port, component in _LISTENERS.items():
                if found is not None and found[2] == component:
                    self._ports[port] = int(found[1])

    def _launch(self, command: str) -> _Running:
        running = _Running(command, self._directory, self._environment)
        self._running.append(running)
        return running


class _Running:
    """A command in a terminal of its own."""

    def __init__(self, command: str, directory: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec env {command}"],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.lines = Lines(self._process.stdout)
        self._taken: set[int] = set()

    def take(self, wanted: str) -> None:
        """Wait for a line; each is taken once. In which order several come is not for a page to say."""
        pattern = _pattern(wanted)

        def find() -> int | None:
            said = enumerate(self.lines.now)
            return next((at for at, line in said if at not in self._taken and pattern.fullmatch(_plain(line))), None)

        self.lines.wait(lambda _: find() is not None, wanted)
        at = find()
        assert at is not None
        self._taken.add(at)

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        if self.runs:
            self._process.terminate()
        try:
            self._process.wait(WAIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        self.lines.all()


def _plain(line: str) -> str:
    for pattern, replacement in _VARIES:
        line = re.sub(pattern, replacement, line)
    return line.strip()


def _pattern(line: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, _plain(line).split("..."))))


def _fits(wanted: str, shown: str) -> bool:
    """Whether it is what is wanted; a line that is only ``...`` stands for any number of lines."""
    parts = [r"(?:.*\n)*" if line == "..." else _pattern(line).pattern + r"\n" for line in wanted.splitlines()]
    return re.fullmatch("".join(parts), "".join(_plain(line) + "\n" for line in shown.splitlines())) is not None
