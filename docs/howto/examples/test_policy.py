import socket

import pytest


def test_who_may_not(app_port, hbone_pair):
    pair = hbone_pair(app_port, client="bank/teller", server="shop/web", allow_peers=["shop/*"])

    with pytest.raises(ConnectionResetError), socket.create_connection(pair.address, timeout=60) as sock:
        sock.recv(1000)

    refused = [record for record in pair.wait_for_access_log() if record.status == 401]
    assert str(refused[0].src_identity) == "spiffe://cluster.local/ns/bank/sa/teller"
