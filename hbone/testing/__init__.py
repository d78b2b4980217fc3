"""A mesh for tests: a CA, SVIDs, sessions in memory, servers, and two proxies around an application.

`Mesh` is the whole for synchronous tests, `memory_session` for trio ones. The pytest plugin makes fixtures of them;
this package works without pytest. Importing it loads nothing; each name loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hbone.testing._background import Background as Background
    from hbone.testing._background import BackgroundError as BackgroundError
    from hbone.testing._memory import MemorySession as MemorySession
    from hbone.testing._memory import memory_session as memory_session
    from hbone.testing._mesh import Mesh as Mesh
    from hbone.testing._mesh import MeshPair as MeshPair
    from hbone.testing._mesh import MeshServer as MeshServer
    from hbone.testing._mesh import PairStatistics as PairStatistics
    from hbone.testing._requests import ReceivedRequest as ReceivedRequest
else:

    def __getattr__(name: str) -> object:
        if name in __all__:
            for package in _MODULES:
                module = importlib.import_module(package)
                if name in module.__all__:
                    value = globals()[name] = getattr(module, name)
                    return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


_MODULES = (
    "hbone.testing._background",
    "hbone.testing._requests",
    "hbone.testing._memory",
    "hbone.testing._mesh",
)

__all__ = [
    "Background",
    "BackgroundError",
    "MemorySession",
    "Mesh",
    "MeshPair",
    "MeshServer",
    "PairStatistics",
    "ReceivedRequest",
    "memory_session",
]
