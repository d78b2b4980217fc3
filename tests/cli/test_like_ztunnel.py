"""Two nodes tell of a small mesh what ztunnel tells of it: `support.ztunnel`, less `support.differences`.

Here for everybody, on loopback addresses and through SOCKS; with captured connections in tests/netns.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from support.differences import DIFFERENCES, TRAPS, tables
from support.likeness import Difference, check, plain_scrape, read_line, scrape
from support.two_nodes import PLAIN, on_loopback
from support.ztunnel import CONNECTIONS, REQUEST

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the loopback is one address")

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "design" / "ztunnel-differences.md"
#: What does not depend on where the nodes listen, and how connections get to them.
DUMPED = "certificates policies services stagedServices staticConfig version workloadState workloads".split()
PARTS = (("access log",), ("scopes",), ("metrics",), *(("config_dump", key) for key in DUMPED))


def twice(sock, seen):
    """Sends everything two times."""
    received = b""
    while chunk := sock.recv(1024):
        received += chunk
    sock.sendall(2 * received)


@linux_only
def test_everybody_sees_what_ztunnel_shows(tmp_path):
    with on_loopback(tmp_path) as two:
        answers = two.make(CONNECTIONS)
        assert answers == [REQUEST if one.sees == "11 bytes" else None for one in CONNECTIONS]
        said = two.stop()
    check(said, DIFFERENCES, parts=PARTS)
    # The comparison finds what is there and not listed, and what is listed and not there.
    some = [one for one in DIFFERENCES if "dst.service" not in one.where]
    with pytest.raises(AssertionError, match=r"not listed: b / access log / 1 workload / dst.service: ztunnel nothing"):
        check(said, some, parts=PARTS)
    same = Difference(where="a / access log / 1 workload / bytes_sent", ztunnel=11, here=12, why="")
    with pytest.raises(AssertionError, match=r"^listed, but the same: a / access log / 1 workload / bytes_sent: 11$"):
        check(said, [*DIFFERENCES, same], parts=PARTS)
    none = Difference(where="a / metrics / nothing / type", ztunnel="gauge", here="counter", why="")
    with pytest.raises(AssertionError, match=r"^listed, but there is nothing: a / metrics / nothing / type$"):
        check(said, [*DIFFERENCES, none], parts=PARTS)


@linux_only
def test_eleven_bytes_and_twenty_two(tmp_path):
    """Request and response, on both reporters, in text that was scraped; both logs, as JSON."""
    with on_loopback(tmp_path, log_format="json", habit=twice) as two:
        (answer,) = two.make(CONNECTIONS[1:2])
        assert answer == 2 * REQUEST
        scraped = {name: (two.metrics(name), two.metrics(name, PLAIN)) for name in two.nodes}
        said = two.stop()
    for name, reporter in (("a", "source"), ("b", "destination")):
        openmetrics, plain = scraped[name]
        for families in (scrape(openmetrics), plain_scrape(plain)):
            numbers = {}
            for family in families.values():
                if family.name.startswith("istio_tcp_") and family.type == "counter":
                    (sample,) = (sample for sample in family.samples if sample.name.endswith("_total"))
                    assert sample.labels["reporter"] == reporter
                    assert sample.labels["destination_service"] == "stock.shop.svc.cluster.local"
                    numbers[family.name] = sample.value
            assert numbers == {
                "istio_tcp_connections_opened": 1,
                "istio_tcp_connections_closed": 1,
                "istio_tcp_received_bytes": 11,
                "istio_tcp_sent_bytes": 22,
            }
    for name, direction, sent, received in (("a", "outbound", 11, 22), ("b", "inbound", 22, 11)):
        lines = [read_line(line, "json") for line in said[name].log]
        (line,) = (line for line in lines if line.scope == "access")
        assert (line.level, line.message, line.fields["direction"]) == ("info", "connection complete", direction)
        assert (line.fields["bytes_sent"], line.fields["bytes_recv"]) == (sent, received)


# === the page ===


def test_the_page_is_made_from_the_lists():
    page = PAGE.read_text()
    for part in re.split(r"^(?=### )", tables(), flags=re.MULTILINE):
        assert part.strip() in page


@pytest.mark.parametrize("name", sorted({test for trap in TRAPS for test in trap.tests}))
def test_what_the_page_names_is_a_test(name):
    file, _, function = name.partition("::")
    assert re.search(rf"^ *(async )?def {function}\(", (TESTS / file).read_text(), re.MULTILINE)
