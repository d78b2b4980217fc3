"""What each child process of ``hbone demo`` runs: a command of ours that ends with the demo, however that ends.

The demo holds the other end of our standard input. It first sends what to run as one line of JSON: a directory and the
words of the command, which are those of ``hbone node`` or ``app ADDRESS``. Loading code takes longer than all the rest,
so what a node needs is loaded before that line comes. The end of the input is the end of the process, as SIGTERM.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading

__all__ = ["main"]


def main() -> None:
    """Wait for the order, and follow it."""
    if sys.argv[1] == "node":
        for module in ("hbone.control", "hbone.proxy", "hbone_cli._life", "hbone_cli._node"):
            importlib.import_module(module)
    line = sys.stdin.buffer.readline()
    if not line:
        return
    order = json.loads(line)
    threading.Thread(target=_wait_for_the_end, daemon=True).start()
    # Settings in somebody's environment or Istio's documents where we are started are for other nodes than these.
    os.environ.clear()
    os.chdir(order["directory"])
    words = order["words"]
    if words[0] == "app":
        _serve(words[1])
    else:
        from hbone_cli import main as hbone_main

        hbone_main(words)


def _wait_for_the_end() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _serve(host: str) -> None:
    from hbone_cli._demo_app import Application
    from hbone_cli._output import Reporter

    with Application(host) as application:
        address = f"{host}:{application.server_port}"
        Reporter(as_json=True).event("listening", "", way="app", address=address)
        application.serve_forever()


if __name__ == "__main__":
    main()
