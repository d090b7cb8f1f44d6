"""What lies in the cache of this user, and clearing it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hetrain.public.disk import cache_errors
from hetrain.public.errors import UsageError
from hetrain.public.model.files import cache_directory
from hetrain.public.model.packaged import ALIASES
from hetrain.secret.engines.rlwe.hints import HINTS

_WHAT = {HINTS: "products with your public masks; jobs make them again"}
_MODEL = "a converted model; jobs convert it again"


@dataclass(frozen=True)
class CacheEntry:
    """One part of the cache: its name, what it is, files and bytes."""

    name: str
    what: str
    path: Path
    files: int
    nbytes: int


@dataclass(frozen=True)
class CacheReport:
    """The cache's directory, and its entries; `cleared` says whether they were removed."""

    directory: Path
    entries: tuple[CacheEntry, ...]
    cleared: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(entry.nbytes for entry in self.entries)


def inspect_cache(names: Sequence[str] = (), *, clear: bool = False) -> CacheReport:
    """Lists the cache, or removes what it lists. Other files in its directory are never touched.

    Args:
        names: the entries; none for all.
        clear: whether to remove them. Jobs that run now may need them.

    Raises:
        UsageError: there is no such entry, or the cache cannot be used.
    """
    directory = cache_directory()
    with cache_errors(directory):
        entries = {entry.name: entry for entry in _entries(directory)}
        if unknown := sorted({*names} - entries.keys()):
            raise UsageError(
                f"the cache has no {unknown[0]!r}",
                where=str(directory),
                hint=f"it has: {', '.join(entries) or 'nothing'}",
            )
        chosen = tuple(entry for name, entry in entries.items() if not names or name in names)
        if clear:
            for entry in chosen:
                _clear(entry)
    return CacheReport(directory, chosen, clear)


def _entries(directory: Path) -> Iterator[CacheEntry]:
    for name in (HINTS, *ALIASES):
        path = directory / name
        files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else []
        if files:
            size = sum(each.stat().st_size for each in files)
            yield CacheEntry(name, _WHAT.get(name, _MODEL), path, len(files), size)


def _clear(entry: CacheEntry) -> None:
    if entry.path.is_symlink():
        entry.path.unlink()
    else:
        shutil.rmtree(entry.path)
