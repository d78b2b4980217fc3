"""One TLS record in, one out: the two OpenSSL calls that all bytes go through.

pyOpenSSL's `recv_into` and `send` cost as much as the cryptography: each makes a buffer, copies, and reports "would
block" by an exception. Called directly, a full record costs 3.0 us instead of 4.8 to read and 2.7 instead of 3.9 to
write, and a 1 KiB message there and back half as much (docs/design/performance.md). The names used for that are not
public, so they are looked up once, and when one of them is gone everything still works, by the public calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from OpenSSL import SSL

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RECORD", "read_records", "write_records"]

#: A TLS record holds at most this much.
RECORD: Final = 16_384


def _read_public(connection: SSL.Connection, buffer: memoryview) -> tuple[int, SSL.Error | None]:
    """Read whole records into `buffer` until none is left, or less than one fits.

    Returns:
        Bytes read, and what ended the reading if it was not that there is nothing more now: `ZeroReturnError` and the
        others. It is returned, not left for the next call, because OpenSSL keeps errors in one queue a thread: what
        stays in there would be taken for another connection's.
    """
    got, size = 0, len(buffer)
    try:
        while size - got >= RECORD:
            # pyOpenSSL allocates what one asks for, so ask for one record.
            got += connection.recv_into(buffer[got : got + RECORD])
    except (SSL.WantReadError, SSL.WantWriteError):
        pass
    except SSL.Error as exc:
        return got, exc
    return got, None


def _write_public(connection: SSL.Connection, data: memoryview) -> int:
    """Encrypt and send `data`, record by record, until the network takes no more.

    Returns:
        Bytes written.

    Raises:
        SSL.Error: the connection is broken.
    """
    done, size = 0, len(data)
    try:
        while done < size:
            done += connection.send(data[done:])
    except (SSL.WantReadError, SSL.WantWriteError):
        pass
    return done


def _direct() -> tuple[
    Callable[[SSL.Connection, memoryview], tuple[int, SSL.Error | None]], Callable[[SSL.Connection, memoryview], int]
]:
    private: Any = SSL
    lib, ffi = private._lib, private._ffi  # noqa: SLF001
    ssl_read, ssl_write, get_error, from_buffer = lib.SSL_read, lib.SSL_write, lib.SSL_get_error, ffi.from_buffer
    would_block = {lib.SSL_ERROR_WANT_READ, lib.SSL_ERROR_WANT_WRITE}
    probe: Any = SSL.Connection(SSL.Context(SSL.TLS_METHOD), None)
    if probe._ssl is None or not callable(probe._raise_ssl_error):  # noqa: SLF001
        raise AttributeError("pyOpenSSL's Connection has changed")

    def read(connection: Any, buffer: memoryview) -> tuple[int, SSL.Error | None]:
        ssl = connection._ssl  # noqa: SLF001
        got, last = 0, len(buffer) - RECORD
        with from_buffer(buffer) as start:
            while got <= last:
                count = ssl_read(ssl, start + got, RECORD)
                if count <= 0:
                    if get_error(ssl, count) in would_block:
                        break
                    try:
                        connection._raise_ssl_error(ssl, count)  # noqa: SLF001
                    except SSL.Error as exc:
                        return got, exc
                    break  # it found no error after all
                got += count
        return got, None

    def write(connection: Any, data: memoryview) -> int:
        ssl = connection._ssl  # noqa: SLF001
        done, size = 0, len(data)
        with from_buffer(data) as start:
            while done < size:
                count = ssl_write(ssl, start + done, size - done)
                if count <= 0:
                    if get_error(ssl, count) not in would_block:
                        connection._raise_ssl_error(ssl, count)  # noqa: SLF001
                    break
                done += count
        return done

    return read, write


try:
    read_records, write_records = _direct()
except AttributeError:  # pragma: no cover - another pyOpenSSL
    read_records, write_records = _read_public, _write_public
