"""Reads the replies to SET and GET from a Redis connection's socket, large values into the caller's memory.

The protocol is RESP 2 (https://valkey.io/topics/protocol/). redis-py sends buffers as they are, but copies
what it receives (0.9-2.4 GB/s on a Unix socket); here a value passes from the socket into its own buffer (4-6
GB/s). The peer is not trusted: lengths are compared with what the caller expects before a byte is stored, and
lines are bounded.
"""

from __future__ import annotations

import re
import socket

from redis import exceptions as foreign

from hetrain.public.errors import WireError

_LINE_LIMIT = 4096
_READ_BYTES = 4096
_INTEGER = re.compile(rb":(-?\d{1,19})")


class Replies:
    """Reads replies from `sock` in order.

    All methods raise `WireError` for what RESP does not allow or the caller does not expect, redis-py's
    errors for error replies, and `OSError` when the socket fails. After any of them but an error reply the
    connection is out of step and must be closed.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._ahead = bytearray()

    def ok(self) -> None:
        """Reads one ``+OK``."""
        line = self._line()
        if line != b"+OK":
            raise _refusal(line)

    def count(self) -> int:
        """Reads one integer."""
        line = self._line()
        if not (match := _INTEGER.fullmatch(line)):
            raise _refusal(line)
        return int(match[1])

    def value_into(self, target: memoryview) -> bool:
        """Reads a bulk string of exactly ``len(target)`` bytes into `target`; False if the key is absent."""
        line = self._line()
        if line == b"$-1":
            return False
        if line[:1] != b"$":
            raise _refusal(line)
        digits = bytes(line[1:])
        if not digits.isdigit() or len(digits) > 10:
            raise WireError("the broker sent a malformed length")
        if int(digits) != len(target):
            raise WireError(f"a chunk has {int(digits)} bytes instead of {len(target)}")
        self._fill(target)
        if self._exactly(2) != b"\r\n":
            raise WireError("the broker sent a value that does not end where it should")
        return True

    def _line(self) -> bytes:
        while (end := self._ahead.find(b"\r\n")) < 0:
            if len(self._ahead) > _LINE_LIMIT:
                raise WireError("the broker sent an endless line")
            self._more()
        line = bytes(self._ahead[:end])
        del self._ahead[: end + 2]
        return line

    def _more(self) -> None:
        data = self._sock.recv(_READ_BYTES)
        if not data:
            raise ConnectionResetError("the connection was closed")
        self._ahead += data

    def _exactly(self, count: int) -> bytes:
        while len(self._ahead) < count:
            self._more()
        data = bytes(self._ahead[:count])
        del self._ahead[:count]
        return data

    def _fill(self, target: memoryview) -> None:
        early = min(len(self._ahead), len(target))
        target[:early] = self._ahead[:early]
        del self._ahead[:early]
        filled = early
        while filled < len(target):
            count = self._sock.recv_into(target[filled:])
            if not count:
                raise ConnectionResetError("the connection was closed")
            filled += count


def _refusal(line: bytes) -> Exception:
    text = "".join(char if char.isprintable() else " " for char in line[:200].decode("ascii", "replace"))
    error: Exception = WireError("the broker sent a reply of another kind than asked for")
    if text.startswith("-OOM"):
        error = foreign.OutOfMemoryError(text[1:])
    elif text.startswith(("-NOAUTH", "-WRONGPASS")):
        error = foreign.AuthenticationError(text[1:])
    elif text.startswith("-NOPERM"):
        error = foreign.NoPermissionError(text[1:])
    elif text.startswith("-"):
        error = foreign.ResponseError(text[1:])
    return error
