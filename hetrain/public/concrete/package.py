"""Zama Concrete's package at arm's length: loading it, and ciphertexts without their wrapping.

Concrete's parsers trust their input (sizes and offsets of a foreign message are followed without bounds), so
they must never see a peer's bytes. What crosses the queue are the bare words of ciphertexts: their number is
checked, and a `Frame` that this process made itself is put around them.
"""

from __future__ import annotations

import atexit
import ctypes
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from hetrain.public.errors import ParameterError, UsageError, WireError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PACKAGE = "concrete-python"
_SIGACTION_BYTES = 1024  # more than any system's structure has
_HEAD_BYTES = 64
# A linear circuit has no bootstrap, so its evaluation keys are empty: always these bytes, and never a peer's.
_NO_KEYS = bytes.fromhex(
    "0000000007000000000000000000030009000000070000000900000007000000"
    "0900000007000000000000000000020000000000000002000000000000000200"
)


def package_version() -> str:
    """The version of concrete-python that is installed here. Raises `UsageError` when there is none."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        raise UsageError(
            f"the package {PACKAGE} is not installed",
            hint="pip install 'hetrain[concrete]', on Python 3.11 or 3.12",
        ) from None


@lru_cache(maxsize=1)
def load_fhe() -> ModuleType:
    """Concrete's module. Importing it takes seconds and 300 MB, so it is done on demand.

    Raises:
        UsageError: it is not installed, or does not load.
    """
    package_version()
    if shutil.which("ld") is None:
        raise UsageError(
            f"{PACKAGE} needs the linker `ld` to compile circuits", hint="install the system package binutils"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it uses pkg_resources, which is being retired
            from concrete import compiler, fhe
    except (ImportError, OSError) as error:
        raise UsageError(
            f"{PACKAGE} is installed but does not load: {error}",
            hint="it needs numpy 1.26 and setuptools < 81: pip install 'hetrain[concrete]'",
        ) from error
    # At exit it stops a runtime for clusters, which ends the process with status 0, whatever status it had.
    atexit.unregister(compiler._terminate_df_parallelization)
    module: ModuleType = fhe
    return module


@dataclass(frozen=True)
class Frame:
    """The bytes that Concrete writes around a ciphertext's words: constant for a circuit."""

    head: bytes
    tail: bytes
    nbytes: int

    @staticmethod
    def of(value: Any, nbytes: int) -> Frame:
        """The frame of a value whose words take `nbytes`."""
        data = value.serialize()
        return Frame(data[:_HEAD_BYTES], data[_HEAD_BYTES + nbytes :], nbytes)

    def value(self, words: bytes | memoryview) -> Any:
        """A ciphertext of Concrete around foreign words, whatever they are.

        Raises:
            WireError: they are not as many as the circuit asks for.
        """
        if len(words) != self.nbytes:
            raise WireError(f"a ciphertext has {len(words)} bytes, not {self.nbytes}")
        return load_fhe().Value.deserialize(b"".join((self.head, words, self.tail)))

    def words(self, value: Any) -> bytes:
        """The bare words of a ciphertext that this process computed."""
        data: bytes = value.serialize()
        if not data.startswith(self.head) or len(data) != len(self.head) + self.nbytes + len(self.tail):
            raise ParameterError(f"{PACKAGE} {package_version()} lays its ciphertexts out in an unknown way")
        return data[_HEAD_BYTES : _HEAD_BYTES + self.nbytes]


def switch(words: NDArray[np.uint64], nbytes: int) -> bytes:
    """Rounds words to their top 8·nbytes bits: uint32 high parts, then, for five bytes, uint8 low parts."""
    shift = np.uint64(64 - 8 * nbytes)
    rounded = (words + (np.uint64(1) << (shift - np.uint64(1)))) >> shift
    if nbytes == 4:
        return rounded.astype("<u4").tobytes()
    return (rounded >> np.uint64(8)).astype("<u4").tobytes() + rounded.astype(np.uint8).tobytes()


def unswitch(data: memoryview, nbytes: int) -> NDArray[np.uint64]:
    """Words from what `switch` made of them, their lost bits zero."""
    count = len(data) // nbytes
    words = np.frombuffer(data[: 4 * count], "<u4").astype(np.uint64) << np.uint64(32)
    if nbytes == 5:
        words |= np.frombuffer(data[4 * count :], np.uint8).astype(np.uint64) << np.uint64(24)
    return words


@lru_cache(maxsize=1)
def evaluation_keys() -> Any:
    """The empty evaluation keys of a linear circuit."""
    return load_fhe().EvaluationKeys.deserialize(_NO_KEYS)


def security_level(bits: int) -> Any:
    """Concrete's name for a level of security."""
    from concrete.fhe.compilation.configuration import SecurityLevel

    return SecurityLevel(bits)


def prepare_thread() -> None:
    """Concrete gives only the thread that imported it the state that compiling needs."""
    from concrete.fhe.extensions.tag import tag_context

    if not hasattr(tag_context, "stack"):
        tag_context.stack = []


@contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Gives the process its handlers of signals back at the end of a block.

    Concrete's runtime takes over all of them: Ctrl-C would kill the process, and so would a write to a
    connection that its peer has closed (SIGPIPE), without a word. The system is asked, since Python sets
    handlers in its main thread alone.
    """
    libc = ctypes.CDLL(None)
    kept = {number: ctypes.create_string_buffer(_SIGACTION_BYTES) for number in signal.valid_signals()}
    kept = {number: old for number, old in kept.items() if libc.sigaction(int(number), None, old) == 0}
    try:
        yield
    finally:
        for number, old in kept.items():
            libc.sigaction(int(number), old, None)
