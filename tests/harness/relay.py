"""A relay before a broker's Unix socket that counts round trips: requests, or pipelines, and their answer."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path


class Relay:
    """Listens at `path`, passes everything on to `target`, and counts.

    A round trip begins with the first byte after an answer, so a pipeline is one, and so is a value of many
    megabytes. `commands` counts them by the name of their first command.
    """

    def __init__(self, path: Path, target: Path) -> None:
        self.commands: Counter[str] = Counter()
        self._target = str(target)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Takes no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(self._target)
                answered = threading.Event()
                answered.set()
                for source, sink, is_request in ((near, far, True), (far, near, False)):
                    arguments = (source, sink, answered, is_request)
                    threading.Thread(target=self._pass_on, args=arguments, daemon=True).start()

    def _pass_on(
        self, source: socket.socket, sink: socket.socket, answered: threading.Event, is_request: bool
    ) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 20):
                if not is_request:
                    answered.set()
                elif answered.is_set():
                    answered.clear()
                    self.commands[_command(data)] += 1
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _command(data: bytes) -> str:
    """The first command's name: ``*N\\r\\n$LENGTH\\r\\nNAME\\r\\n...`` in RESP."""
    return data.split(b"\r\n", 3)[2].decode("ascii", "replace").upper()
