"""A forwarding server of ours in a process of its own, so that its memory can be measured: run by `support.serving`.

    python serve.py CERT KEY ROOTS '{"limits": {...}, "timeouts": {...}}'

Prints its port, then serves until its standard input ends. Each line that comes there is answered with the server's
statistics, once all that came before has been worked off.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from functools import partial

import trio

from hbone import DialledAddress, ForwardHandler, HBONEServer, Limits, Svid, Timeouts


async def main(cert: str, key: str, roots: str, options: str) -> None:
    values = json.loads(options)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = HBONEServer(
        Svid.from_files(cert, key, roots),
        ForwardHandler(DialledAddress()),
        limits=Limits(**values.get("limits", {})),
        timeouts=Timeouts(**values.get("timeouts", {})),
    )
    async with trio.open_nursery() as nursery:
        endpoint = await nursery.start(partial(server.serve, "127.0.0.1", 0))
        print(endpoint.port, flush=True)
        async for _ in trio.lowlevel.FdStream(sys.stdin.fileno()):
            gc.collect()
            print(json.dumps({"tasks": len(nursery.child_tasks), "statistics": repr(server.statistics())}), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
