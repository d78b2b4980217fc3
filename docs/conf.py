"""The documentation site: ``nox -s docs`` builds it, with every warning an error."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "hbone"
author = "the hbone contributors"
project_copyright = author
release = version = version_of("hbone")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser", "hbone_reference"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

html_theme = "furo"
html_title = f"hbone {release}"
html_theme_options = {"source_directory": "docs/"}

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 4

default_role = "code"  # docstrings quote `names` with single backticks
nitpicky = True
# Other projects' names are not resolved: a build must not need their sites. Our own must all exist.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(abc|builtins|collections|contextlib|contextvars|cryptography|datetime|enum|h2|ipaddress|logging|OpenSSL|os"
        r"|pathlib|prometheus_client|pytest|socket|ssl|SSL|trio|trustme|types|typing|x509)(\..*)?",
    ),
    ("py:(class|obj|exc|func|meth|attr|data)", r"optional"),
]

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
