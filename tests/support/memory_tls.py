"""Two ends of TLS, talking through memory in one thread."""

from __future__ import annotations

from dataclasses import dataclass

from OpenSSL import SSL


@dataclass
class Outcome:
    """How a handshake ended for each end: the exception that its pyOpenSSL calls raised, or None."""

    client: SSL.Error | None
    server: SSL.Error | None
    bytes_to_client: int
    bytes_to_server: int

    @property
    def succeeded(self) -> bool:
        return self.client is None and self.server is None


def shake(client: SSL.Connection, server: SSL.Connection) -> Outcome:
    """Runs both ends until neither has anything to say, alerts after the handshake included."""
    ends = {"client": client, "server": server}
    failed: dict[str, SSL.Error] = {}
    shaken: set[str] = set()
    moved = {"client": 0, "server": 0}
    for _ in range(8):
        for name, other in (("client", "server"), ("server", "client")):
            if name not in failed:
                try:
                    if name in shaken:
                        ends[name].recv(1)
                    else:
                        ends[name].do_handshake()
                        shaken.add(name)
                except SSL.WantReadError:
                    pass
                except SSL.Error as error:
                    failed[name] = error
            try:
                data = ends[name].bio_read(1 << 20)
            except SSL.WantReadError:
                continue
            moved[other] += len(data)
            ends[other].bio_write(data)
    return Outcome(failed.get("client"), failed.get("server"), moved["client"], moved["server"])
