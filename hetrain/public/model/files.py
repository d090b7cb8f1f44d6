"""Finding and reading the public weights: an alias, a local Hugging Face directory, or a hub id."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from hetrain.public.disk import is_full, reason_of
from hetrain.public.errors import ModelError, ModelUnreachable, StorageError
from hetrain.public.model.packaged import ALIASES, materialize
from hetrain.public.settings import Settings
from hetrain.public.spelling import did_you_mean

if TYPE_CHECKING:
    import torch

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?$")
_INDEX = "model.safetensors.index.json"
_MISSPELT = 0.75


@dataclass(frozen=True)
class ModelFiles:
    """A Hugging Face directory with safetensors: `tensors` maps each tensor's name to its file."""

    label: str
    directory: Path
    tensors: Mapping[str, Path]

    def read(self, tensor: str) -> torch.Tensor:
        """One tensor, copied out of its memory-mapped file.

        Raises:
            ModelError: the checkpoint has no such tensor, or the file is damaged.
        """
        with self._opened(tensor) as file:
            value: torch.Tensor = file.get_tensor(tensor)
            return value

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of one tensor, which is not read. Raises as `read`."""
        with self._opened(tensor) as file:
            return tuple(file.get_slice(tensor).get_shape())

    @contextmanager
    def _opened(self, tensor: str) -> Iterator[Any]:
        """The file of a tensor; errors of its user are those of `read`."""
        try:
            with safe_open(self.tensors[tensor], framework="pt") as file:
                yield file
        except KeyError as error:
            raise ModelError(f"the checkpoint has no tensor {tensor}", where=self.label) from error
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"tensor {tensor} cannot be read: {error}",
                where=str(self.tensors[tensor]),
                hint="the file is damaged or incomplete: download it again",
            ) from error


def cache_directory() -> Path:
    """Where converted models are kept."""
    return Settings().cache


def label_of(name_or_path: str) -> str:
    """What messages call a model: an alias or hub id as it is, a local directory by its last name."""
    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        return name_or_path
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name).strip("-._") or "model"


def public_name(name_or_path: str) -> str:
    """What others call a model: its hub id where it has one, else its label. Never a path of this machine."""
    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        alias = ALIASES.get(name_or_path)
        return name_or_path if alias is None else alias.hub_id
    # A snapshot in the hub's cache: models--ORGANISATION--NAME/snapshots/COMMIT.
    cached = [re.fullmatch(r"models--(.+?)--(.+)", part) for part in path.resolve().parts]
    match = next((each for each in reversed(cached) if each), None)
    return f"{match[1]}/{match[2]}" if match else label_of(name_or_path)


def resolve(name_or_path: str) -> ModelFiles:
    """Finds a model's directory, converting or downloading it on first use.

    Raises:
        ModelError: there is no such model, it cannot be downloaded, or it has no safetensors.
        StorageError: the disk is full.
    """
    require_model_name(name_or_path)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _open(label_of(name_or_path), path)
    if name_or_path in ALIASES:
        return _open(name_or_path, materialize(name_or_path, cache_directory()))
    return _open(name_or_path, _download(name_or_path))


def require_model_name(name_or_path: str) -> None:
    """Looks at a name without reading or downloading anything.

    Raises:
        ModelError: it is no directory, alias or hub id, or very like an alias.
    """
    if Path(name_or_path).expanduser().is_dir() or name_or_path in ALIASES:
        return
    meant = did_you_mean(name_or_path, ALIASES, likeness=_MISSPELT)
    if meant or not _HUB_ID.match(name_or_path):
        raise ModelError(
            "no such directory, alias or hub id",
            where=name_or_path,
            hint=meant
            or "give a directory with config.json and *.safetensors, a hub id, or one of: "
            f"{', '.join(ALIASES)}",
        )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        if isinstance(error, OSError) and is_full(error):
            what, hint = f"the model cannot be downloaded: {reason_of(error)}", "make room, or set HF_HOME"
            raise StorageError(what, where=hub_id, hint=hint) from error
        kind = ModelUnreachable if _may_pass(error) else ModelError
        raise kind(
            f"neither a local directory nor reachable on the hub: {type(error).__name__}",
            where=hub_id,
            hint=f"check the name and the network, or use one of: {', '.join(ALIASES)}",
        ) from error


def _may_pass(error: Exception) -> bool:
    """Whether a failed download may succeed later: unless the hub, or its client, has refused the request."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        return not isinstance(error, ValueError)
    return status >= 500 or status in (408, 429)


def _open(label: str, directory: Path) -> ModelFiles:
    if not (directory / "config.json").is_file():
        raise ModelError("the directory has no config.json", where=str(directory))
    _refuse_code(directory)
    tensors = _index(directory)
    if not all(name.isprintable() and file.name.isprintable() for name, file in tensors.items()):
        raise ModelError(
            "a tensor, or the file that it lies in, has a name with control characters", where=str(directory)
        )
    return ModelFiles(label, directory, MappingProxyType(tensors))


def _refuse_code(directory: Path) -> None:
    """Raises `ModelError` for a model that brings code of its own, which nothing of hetrain runs."""
    found = [path.name for path in sorted(directory.glob("*.py"))]
    for path in sorted(directory.glob("*config.json")):
        try:
            has_code = "auto_map" in json.loads(path.read_bytes())
        except (OSError, ValueError, TypeError, RecursionError):  # who reads it says what is wrong
            continue
        if has_code:
            found.append(f"`auto_map` in {path.name}")
    if found:
        raise ModelError(
            f"the model brings code of its own, which is never run: {', '.join(found[:5])}",
            where=str(directory),
            hint="use a model that transformers has built in; if it is one, remove these from a copy of it",
        )


def _index(directory: Path) -> dict[str, Path]:
    index, single = directory / _INDEX, directory / "model.safetensors"
    try:
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            return {name: directory / Path(file).name for name, file in weight_map.items()}
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except FileNotFoundError as error:
        raise ModelError(
            "the directory has no model.safetensors",
            where=str(directory),
            hint="save the model with save_pretrained(..., safe_serialization=True)",
        ) from error
    except (
        SafetensorError,
        OSError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ModelError(
            f"{_INDEX if index.is_file() else single.name} cannot be read: {error}",
            where=str(directory),
            hint="the file is damaged or incomplete: download it again",
        ) from error
