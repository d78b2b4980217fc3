"""``python -m hbone_cli`` is ``hbone``."""

from __future__ import annotations

from hbone_cli import main

if __name__ == "__main__":
    main()
