"""A disk that a test can fill: a small tmpfs, or a limit on files where that cannot be mounted."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_BLOCK = bytes(4096)


class SmallDisk:
    """A directory whose disk can be filled up.

    Attributes:
        path: the directory.
        is_mounted: whether it is a disk of its own, on which one file's room can be given to another.
    """

    def __init__(self, path: Path, *, is_mounted: bool) -> None:
        self.path, self.is_mounted = path, is_mounted

    def fill(self, leave: int = 0) -> None:
        """Leaves room for so many bytes; in one file of this process where the disk is no disk of its own."""
        if not self.is_mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (leave, resource.RLIM_INFINITY))
            return
        with (self.path / "ballast").open("ab", buffering=0) as ballast:
            with suppress(OSError):
                while ballast.write(_BLOCK):
                    pass
            ballast.truncate(max(ballast.tell() - leave, 0))

    def free(self) -> None:
        """Undoes `fill`."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (self.path / "ballast").unlink(missing_ok=True)


@contextmanager
def small_disk(path: Path, nbytes: int) -> Iterator[SmallDisk]:
    """A disk of so many bytes at `path`, until the block ends."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(path)]
    is_mounted = bool(shutil.which("mount")) and not subprocess.run(mount, capture_output=True).returncode
    disk = SmallDisk(path, is_mounted=is_mounted)
    try:
        yield disk
    finally:
        disk.free()
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=True)
