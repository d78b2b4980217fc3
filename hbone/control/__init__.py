"""Where the picture of the mesh comes from."""

from hbone.control._file import FileMeshSource, FileMeshStatus

__all__ = ["FileMeshSource", "FileMeshStatus"]
