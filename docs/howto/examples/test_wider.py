import httpx
import pytest

from hbone.testing import Mesh


@pytest.fixture(scope="module")
def mesh(hbone_ca):
    with Mesh(hbone_ca) as mesh:
        yield mesh


def test_one(app_port, mesh):
    assert httpx.get(mesh.pair(app_port).url, timeout=60).text == "hello\n"
