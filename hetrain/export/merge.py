"""An adapter merged into its base model: a Hugging Face directory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from hetrain.export.check import LOSS_BOUNDS, LossCheck, held_out_rows, mean_loss
from hetrain.export.loading import load_adapted, open_adapter, quiet_transformers
from hetrain.public.errors import UsageError


@dataclass(frozen=True)
class Export:
    """What was written, and its check."""

    path: Path
    dtype: str
    check: LossCheck

    def __str__(self) -> str:
        return f"{self.path} in {self.dtype}; {self.check}"


def merge(
    adapter: Path, output: Path, dtype: str, model: str | None, check: Path | None, device: str
) -> Export:
    """Merges in float32, rounds to `dtype`, and checks what was written before it gets its name.

    Args:
        adapter: see `open_adapter`.
        output: a directory that does not exist yet, or is empty.
        dtype: a key of `LOSS_BOUNDS`.
        model: see `open_adapter`.
        check: held-out rows; None takes those that the adapter was evaluated on last, or else a fixed text.
        device: torch device to compute on.

    Raises:
        UsageError: a setting makes no sense, `output` cannot be written, or the adapter changes one end alone
            of a model whose embeddings are its output head.
        ModelError: the base model cannot be loaded, or the merged model's loss is not the adapter's.
        DatasetError: the rows of `check` cannot be read.
    """
    require_dtype(dtype)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(
            "is there already", where=str(output), hint="choose a directory that is new or empty"
        )
    source = open_adapter(adapter, model)
    tokenizer = source.tokenizer()
    held_out = held_out_rows(check, adapter, tokenizer)
    adapted = load_adapted(source, device)
    _require_mergeable(adapted, adapter)
    trained = mean_loss(adapted, held_out.rows, device)
    merged = adapted.merge_and_unload().to(getattr(torch, dtype))
    merged.config.dtype = dtype
    with whole_directory(output) as scratch:
        with quiet_transformers():
            merged.save_pretrained(scratch)
        tokenizer.save_pretrained(str(scratch))
        del adapted, merged
        with quiet_transformers():
            written = AutoModelForCausalLM.from_pretrained(scratch, dtype="auto").to(device).eval()
        result = held_out.compare(trained, mean_loss(written, held_out.rows, device), dtype)
    return Export(output, dtype, result)


def require_dtype(dtype: str) -> None:
    """Raises `UsageError` unless it is one that an export has a bound for."""
    if dtype not in LOSS_BOUNDS:
        raise UsageError(f"{dtype!r} is not known", field="dtype", hint=f"one of: {', '.join(LOSS_BOUNDS)}")


def _require_mergeable(adapted: PeftModel, adapter: Path) -> None:
    """Merged into tied embeddings, an adapter of one end would change the other too."""
    ends = (adapted.get_input_embeddings(), adapted.get_output_embeddings())
    wrapped = any(isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends)
    if wrapped and adapted.config.get_text_config().tie_word_embeddings:
        raise UsageError(
            "the base model's embeddings are its output head too, so that an adapter of one of them cannot "
            "be merged",
            where=str(adapter),
            hint="use it with peft as it is, or train it without `embed_tokens` and `lm_head`",
        )


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A directory that becomes `target` when the block ends well, and is removed when it does not.

    Raises:
        UsageError: something cannot be written.
    """
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        yield scratch
        scratch.chmod(0o755)
        os.replace(scratch, target)  # also in place of an empty directory
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot be written: {reason}", where=str(target)) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
