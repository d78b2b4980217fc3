"""Where the picture of the mesh comes from."""

__all__: list[str] = []
