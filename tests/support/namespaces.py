"""A network namespace of the test's own, for what needs routes and firewall rules. Linux, root."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest
import trio

from hbone.transport import set_mark, set_transparent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["MARK", "Namespace", "accept", "made_namespace", "skip_unless_possible"]

T = TypeVar("T")
#: What a proxy marks its own connections with.
MARK = 0x539
CLONE_NEWNET = 0x4000_0000


def skip_unless_possible() -> None:
    """Skip the whole module where there can be none."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root", allow_module_level=True)
    for program in ("ip", "iptables", "ip6tables"):
        if shutil.which(program) is None:
            pytest.skip(f"the program {program} is not installed", allow_module_level=True)


class Namespace:
    """A network namespace. Sockets stay in the namespace in which they were made, whoever uses them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, command: str) -> None:
        done = subprocess.run(["ip", "netns", "exec", self.name, *command.split()], capture_output=True, text=True)
        if done.returncode:
            pytest.fail(f"{command}: {done.stderr}")

    def call(self, function: Callable[[], T]) -> T:
        """Calls `function` in a thread that lives in the namespace."""
        results: list[T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                with Path(f"/run/netns/{self.name}").open("rb") as file:
                    libc = ctypes.CDLL(None, use_errno=True)
                    if libc.setns(file.fileno(), CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                results.append(function())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def listener(self, host: str, port: int, *, transparent: bool = False) -> socket.socket:
        def make() -> socket.socket:
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            if transparent:
                set_transparent(sock)
            sock.bind((host, port))
            sock.listen()
            sock.setblocking(False)
            return sock

        return self.call(make)

    def dial(self, host: str, port: int, *, mark: int = 0) -> trio.SocketStream:
        def make() -> socket.socket:
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            if mark:
                set_mark(sock, mark)
            sock.settimeout(60)
            sock.connect((host, port))
            sock.setblocking(False)
            return sock

        return trio.SocketStream(trio.socket.from_stdlib_socket(self.call(make)))


@contextlib.contextmanager
def made_namespace(purpose: str, setup: str) -> Iterator[Namespace]:
    """A new namespace in which the commands of `setup`, one a line, were run."""
    name = f"hbone-{purpose}-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"this machine makes no network namespaces: {made.stderr.strip()}")
    try:
        namespace = Namespace(name)
        for command in setup.strip().splitlines():
            namespace.run(command)
        yield namespace
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


async def accept(listener: socket.socket) -> socket.socket:
    """The next connection, non-blocking."""
    await trio.lowlevel.wait_readable(listener)
    sock, _ = listener.accept()
    sock.setblocking(False)
    return sock
