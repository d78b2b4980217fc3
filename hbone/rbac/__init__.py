"""Who may connect to whom: pure decisions over the policies of the mesh."""

__all__: list[str] = []
