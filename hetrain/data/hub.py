"""Data sets of the Hugging Face hub, by the package `datasets`. No code of theirs is run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hetrain.data.records import Item, Record, present
from hetrain.public.errors import DatasetError

_log = logging.getLogger(__name__)

# Builders of `datasets` that parse data: others unpickle, or decode media.
_SAFE_BUILDERS = ("json", "csv", "parquet", "arrow")
_DECODED = ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh")


def read_hub(name: str, config: str | None, split: str) -> Iterator[Item]:
    """The rows of one split; null counts as absent, also within objects.

    Raises:
        DatasetError: `datasets` is not installed, there is no such data set or split, the hub cannot be
            reached, or the data set is no JSON, CSV, Parquet or Arrow.
    """
    for number, columns in enumerate(_rows(name, config, split), start=1):
        yield Record(present(columns), name, number)


def _rows(name: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise DatasetError(
            "there is no such file, and to look for it on the hub needs the package datasets",
            where=name,
            hint='Check the path, or install it with: pip install "hetrain[data]"',
        ) from error
    _log.info("%s: no such file, so it is looked for on the Hugging Face hub", name)
    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(name, config)
        _require_harmless(builder, name)
        builder.download_and_prepare()
        dataset = builder.as_dataset(split=split)
    except (DatasetsError, HfHubHTTPError, OSError, ValueError, TypeError, RuntimeError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise DatasetError(
            f"there is no such file, and on the hub it cannot be read: {type(error).__name__}: {first_line}",
            where=name,
            hint="Check the name, `dataset_config`, the split and the network",
        ) from error
    media = [key for key, feature in dataset.features.items() if type(feature).__name__ in _DECODED]
    for columns in dataset.remove_columns(media):
        yield {**columns, **dict.fromkeys(media, "")}


def _require_harmless(builder: Any, name: str) -> None:
    """Refuses data sets that are more than data, or whose files lie elsewhere. Raises `DatasetError`."""
    kind = type(builder).__module__.split(".")
    if kind[:2] != ["datasets", "packaged_modules"] or kind[2] not in _SAFE_BUILDERS:
        raise DatasetError(
            f"this data set is of the kind {kind[-1]}, which is not read",
            where=name,
            hint=f"Save it as Parquet, and give the files; read are: {', '.join(_SAFE_BUILDERS)}",
        )
    own = str(Path(name).resolve()) if Path(name).is_dir() else "hf://datasets/"
    files = [str(file) for part in (builder.config.data_files or {}).values() for file in part]
    if foreign := [file for file in files if not file.startswith(own)]:
        # Its description may name any path or address.
        what = f"this data set names a file that is not its own: {foreign[0]}"
        raise DatasetError(what, where=name, hint="Do not use it")
