"""A relay before a broker's Unix socket that counts round trips, and can cut connections.

A round trip is a request, or a pipeline, and its answer.
"""

from __future__ import annotations

import socket
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path


class Relay:
    """Listens at `path`, passes everything on to `target`, counts, and cuts connections when it is asked to.

    A round trip begins with the first byte after an answer, so a pipeline is one, and so is a value of many
    megabytes. `commands` counts them by the name of their first command. While nothing listens at `target`,
    connections are closed as soon as they are made.
    """

    def __init__(self, path: Path, target: Path) -> None:
        self.commands: Counter[str] = Counter()
        self._cut: tuple[bool, int] | None = None
        self._target = str(target)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Takes no more connections."""
        self._listener.close()

    def cut_next(self, *, is_request: bool, nbytes: int) -> None:
        """Cuts the connection on which at least `nbytes` pass at once next, after half of them.

        Args:
            is_request: on the way to the broker, else on the way back.
            nbytes: more than anything but the middle of a blob has.
        """
        self._cut = is_request, nbytes

    def keep_all(self) -> None:
        """Cuts no connection from now on."""
        self._cut = None

    @property
    def will_cut(self) -> bool:
        """Whether it waits for a connection to cut."""
        return self._cut is not None

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                try:
                    far.connect(self._target)
                except OSError:
                    near.close()
                    continue
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
                if self._is_to_cut(is_request, len(data)):
                    sink.sendall(data[: len(data) // 2])
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _is_to_cut(self, is_request: bool, nbytes: int) -> bool:
        cut = self._cut
        if cut is None or cut[0] is not is_request or nbytes < cut[1]:
            return False
        self._cut = None
        return True


def _command(data: bytes) -> str:
    """The first command's name: ``*N\\r\\n$LENGTH\\r\\nNAME\\r\\n...`` in RESP."""
    return data.split(b"\r\n", 3)[2].decode("ascii", "replace").upper()
