"""Interop: everything here needs a foreign peer; its logs go into the report of a test that fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import foreign
from support.certs import Pki
from support.certs import pki as _pki


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.interop)


@pytest.fixture(scope="session", autouse=True)
def every_foreign_peer() -> None:
    """In CI a missing peer is a failure, said once and first."""
    if os.environ.get("CI") == "true" and (missing := foreign.check_all()):
        pytest.fail(f"CI must have every foreign peer; missing: {', '.join(missing)}")


@pytest.fixture(scope="session")
def pki() -> Pki:
    return _pki()


@pytest.fixture(autouse=True)
def _forget_logs() -> None:
    foreign.LIVE_LOGS.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.when == "call" and report.failed:
        for log in foreign.LIVE_LOGS:
            if log.exists():
                report.sections.append((f"log of {log.name}", log.read_text(errors="replace")[-6000:]))
    return report
