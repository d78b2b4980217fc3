"""Tests over real sockets, with a hand-made peer on the other side."""

from __future__ import annotations

import pytest
from support.certs import Pki
from support.certs import pki as _pki


@pytest.fixture(scope="session")
def pki() -> Pki:
    return _pki()
