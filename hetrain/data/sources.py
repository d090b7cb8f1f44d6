"""Where rows come from: files, folders, standard input, data sets of the hub. Opens all of them."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from hetrain.config import DataConfig
from hetrain.data.formats import GZIP_SUFFIX, SUFFIXES, read_rows_of
from hetrain.data.records import Item
from hetrain.public.errors import DatasetError
from hetrain.public.spelling import did_you_mean

STANDARD_INPUT = "-"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class HubSplit:
    """What is read of a data set on the hub: `config` is None for its default."""

    config: str | None = None
    split: str = "train"

    @staticmethod
    def to_train(config: DataConfig) -> HubSplit:
        """The split to learn."""
        return HubSplit(config.dataset_config, config.dataset_train_split)

    @staticmethod
    def to_evaluate(config: DataConfig) -> HubSplit:
        """The split to evaluate on."""
        return HubSplit(config.dataset_config, config.dataset_test_split)


def read_sources(names: Sequence[str], hub: HubSplit) -> Iterator[tuple[str, Iterator[Item]]]:
    """What messages call each file, and its rows.

    Args:
        names: files, folders, ``-``, or ids of the hub.
        hub: what is read of data sets on the hub.

    Raises:
        DatasetError: something is not there or cannot be read. What is wrong with single rows is yielded.
    """
    for name in names:
        path = Path(name).expanduser()
        if name == STANDARD_INPUT:
            yield "standard input", _read_standard_input()
        elif path.is_dir():
            for file in _files_in(path):
                yield str(file), _read_file(file)
        elif _may_be_on_the_hub(name):
            from hetrain.data.hub import read_hub

            yield name, read_hub(name, hub.config, hub.split)
        else:
            yield str(path), _read_file(path)


def _may_be_on_the_hub(name: str) -> bool:
    """Whether it is no path: a name in a folder that exists is rather a file that is missing."""
    path = Path(name)
    is_path = path.exists() or path.parent.exists() or _has_data_suffix(path)
    return _HUB_ID.fullmatch(name) is not None and not is_path


def _has_data_suffix(path: Path) -> bool:
    return path.name.removesuffix(GZIP_SUFFIX).endswith((*SUFFIXES, ".txt"))


def _files_in(folder: Path) -> list[Path]:
    """Its files of rows, in the order of their names; what lies in folders below is not among them."""
    try:
        shown = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        found = sorted(filter(_has_data_suffix, shown))
    except OSError as error:
        raise _cannot_read(folder, error) from error
    if not found:
        raise DatasetError(
            "there is no file of rows in this folder",
            where=str(folder),
            hint=f"Give one with files that end in {', '.join(SUFFIXES)}, or these with {GZIP_SUFFIX}",
        )
    return found


def _read_file(path: Path) -> Iterator[Item]:
    try:
        with path.open("rb", buffering=0) as file:
            stream = cast(BinaryIO, file)
            # A pipe, as of <(command): Parquet and compressed text need to go back.
            yield from read_rows_of(stream if file.seekable() else io.BytesIO(file.readall()), str(path))
    except OSError as error:
        raise _cannot_read(path, error) from error


def _read_standard_input() -> Iterator[Item]:
    return read_rows_of(io.BytesIO(sys.stdin.buffer.read()), "standard input")


def _cannot_read(path: Path, error: OSError) -> DatasetError:
    hint = "Give the path of a file of rows that you may read"
    if isinstance(error, FileNotFoundError) and path.parent.is_dir():
        hint = did_you_mean(path.name, (other.name for other in path.parent.iterdir())) or hint
    return DatasetError(f"the data set cannot be read: {error.strerror or error}", where=str(path), hint=hint)
