"""What can be done with a trained adapter, in clear on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hetrain.export.merge import Export


def merge(
    adapter: str | PathLike[str],
    output_dir: str | PathLike[str],
    *,
    dtype: str = "bfloat16",
    model: str | None = None,
    check: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Export:
    """Merges an adapter into its base model: a Hugging Face directory, in clear on this machine.

    It appears whole or not at all: its loss on held-out rows must be the trained adapter's, within
    `hetrain.export.check.LOSS_BOUNDS`.

    Args:
        adapter: output directory of a job, one of its checkpoints, or another PEFT LoRA adapter.
        output_dir: a directory that is new or empty.
        dtype: of the weights: ``bfloat16``, ``float16`` or ``float32``. Merging itself is done in float32.
        model: the base model; None takes the adapter's.
        check: held-out rows; None takes those that the adapter was evaluated on last, or else a fixed text.
        device: torch device to compute on.

    Raises:
        UsageError: a setting makes no sense, or `output_dir` cannot be written.
        ModelError: the base model cannot be loaded, or the losses differ.
        DatasetError: the rows cannot be read.
    """
    from hetrain.export.merge import merge as run

    return run(Path(adapter), Path(output_dir), dtype, model, None if check is None else Path(check), device)


def export_gguf(
    adapter: str | PathLike[str],
    output: str | PathLike[str],
    *,
    model: str | None = None,
    check: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Export:
    """Writes an adapter as llama.cpp reads it: a LoRA GGUF in float32, checked before it gets its name.

    Args:
        adapter: as of `merge`.
        output: a file that does not exist yet.
        model: as of `merge`.
        check: as of `merge`.
        device: as of `merge`.

    Raises:
        UnsupportedArchitecture: the base model's layout in llama.cpp is not known.
        HetrainError: as `merge`.
    """
    from hetrain.export.gguf_adapter import export_gguf as run

    return run(Path(adapter), Path(output), model, None if check is None else Path(check), device)


def ask(
    adapter: str | PathLike[str],
    questions: str | Sequence[str],
    *,
    model: str | None = None,
    prompt_template: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    base_only: bool = False,
    device: str = "cpu",
) -> list[str]:
    """Answers of an adapter, in clear on this machine, by transformers and peft.

    Args:
        adapter: as of `merge`.
        questions: one or several.
        model: as of `merge`.
        prompt_template: a text with ``{}`` in the place of the question; None words questions as the training
            rows did.
        max_new_tokens: the most tokens of an answer.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        seed: of the draws.
        base_only: ask the base model without the adapter, with the same prompts.
        device: as of `merge`.

    Raises:
        UsageError: there is no adapter, it does not fit, or a question is empty.
        ModelError: the base model cannot be found or loaded.
    """
    from hetrain.export.asking import Generation, Respondent

    how = Generation(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    respondent = Respondent(Path(adapter), model, prompt_template, device)
    return respondent.answer(
        [questions] if isinstance(questions, str) else questions, how, adapted=not base_only
    )


def report(output_dir: str | PathLike[str], output: str | PathLike[str] | None = None) -> Path:
    """Writes one HTML page on a run, from its own records.

    Args:
        output_dir: output directory of a job.
        output: the page's file; None is ``report.html`` in `output_dir`.

    Returns:
        The page's file.

    Raises:
        UsageError: there are no records, or the page cannot be written.
    """
    from hetrain.export.report.page import write_report

    return write_report(Path(output_dir), None if output is None else Path(output))
