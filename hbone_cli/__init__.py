"""The ``hbone`` command: a node of a mesh, two proxies, one tunnel, a local CA.

Parse, call the library by its public names, print. `main` is the entry point. Each command is a module of its own,
imported when it is asked for; the table is in `hbone_cli._main`. What is heavy (trio, OpenSSL, prometheus) is imported
by the command that runs, so help and completion are quick.
"""

from __future__ import annotations

from hbone_cli._main import cli, main

__all__ = ["cli", "main"]
