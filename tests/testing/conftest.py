"""The fixtures under test, also where hbone runs from its source tree and pytest has not found its plugin."""

from hbone.testing.plugin import *  # noqa: F403
