from datetime import timedelta

import httpx
import pytest

from hbone import LocalCA


def test_the_application_is_down(hbone_pair, unused_port):
    pair = hbone_pair(unused_port)
    with pytest.raises(httpx.TransportError):
        httpx.get(pair.url)
    assert {record.status for record in pair.wait_for_access_log()} == {503}


def test_the_other_side_is_somebody_else(app_port, hbone_pair):
    pair = hbone_pair(app_port, server="shop/web", expect=["shop/db"])
    with pytest.raises(httpx.TransportError):
        httpx.get(pair.url)
    (record,) = pair.wait_for_access_log(1)
    assert "peer is spiffe://cluster.local/ns/shop/sa/web" in record.error


def test_a_certificate_from_elsewhere(app_port, hbone_pair):
    foreign = LocalCA.in_memory().issue("spiffe://cluster.local/ns/shop/sa/cart")
    with pytest.raises(httpx.TransportError):
        httpx.get(hbone_pair(app_port, client=foreign).url)


def test_a_certificate_that_has_expired(app_port, hbone_pair, hbone_ca, hbone_svid):
    then = hbone_svid("shop/cart").not_before - timedelta(days=2)
    expired = hbone_ca.issue("spiffe://cluster.local/ns/shop/sa/cart", now=then, ttl=timedelta(hours=1))
    with pytest.raises(httpx.TransportError):
        httpx.get(hbone_pair(app_port, client=expired).url)
