"""Where the picture of the mesh comes from."""

from hbone.control._collector import full_collections_wait
from hbone.control._file import FileMeshSource, FileMeshStatus

__all__ = ["FileMeshSource", "FileMeshStatus", "full_collections_wait"]
