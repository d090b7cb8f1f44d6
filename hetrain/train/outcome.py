"""How a job ended: its figures, or the error that says what was saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hetrain.public.errors import Interrupted, StorageError
from hetrain.train.checkpoint import checkpoint_path, checkpoint_steps
from hetrain.train.evaluation import Evaluation
from hetrain.train.metrics import MicroBatchMetrics
from hetrain.train.storage import after_failure


@dataclass(frozen=True)
class JobResult:
    """How a job ended: updates, tokens, seconds of training, the last metrics, the adapter's directory.

    Of the `steps` updates `skipped_updates` have changed nothing, since values were not finite. `rejected`
    results of workers failed verification in this run. With fewer `steps` than `total_steps` the run
    ended early, as `early_stopping_patience` says. The adapter is that of update `adapter_step`, which is not
    the last one where `load_best_model_at_end` found a better one. `evaluation` is that of the adapter on the
    rows that were held out, if there are any.
    """

    steps: int
    total_steps: int
    tokens: int
    skipped_updates: int
    rejected: int
    seconds: float
    last: MicroBatchMetrics = field(repr=False)
    output_dir: Path
    adapter_step: int
    evaluation: Evaluation | None = None

    def __str__(self) -> str:
        skipped = f" ({self.skipped_updates} of them skipped)" if self.skipped_updates else ""
        rejected = f", {self.rejected} results of workers rejected" if self.rejected else ""
        held_out = f", held-out loss {self.evaluation.loss:.3f}" if self.evaluation else ""
        early = f" of {self.total_steps}, ended early," if self.steps < self.total_steps else ""
        best = f" of update {self.adapter_step}" if self.adapter_step != self.steps else ""
        return (
            f"{self.steps} updates{early}{skipped} over {self.tokens} tokens in {self.seconds:.0f} s"
            f"{rejected}, last loss {self.last.loss:.3f}{held_out}. Adapter{best} in {self.output_dir}"
        )


def stored_in_part(error: StorageError, step: int, output: Path, *, has_adapter: bool) -> StorageError:
    """`error`, with what was written of update `step`."""
    checkpoint = checkpoint_path(output, step)
    parts = ["the adapter"] * has_adapter + [checkpoint.name] * checkpoint.is_dir()
    saved = f"{' and '.join(parts) or 'nothing'} {'were' if len(parts) > 1 else 'was'} written"
    steps = checkpoint_steps(output)
    newest = checkpoint_path(output, steps[-1]).name if steps else ""
    return after_failure(error, output, f"after update {step} {saved}", newest)


def interrupted(step: int, total_steps: int, output: Path) -> Interrupted:
    """The error of a run that was stopped after update `step`, and how to go on."""
    text = f"stopped after {step} of {total_steps} updates; the adapter as it stood was written"
    saved = checkpoint_path(output, step)
    if not saved.is_dir():
        return Interrupted(f"{text}, but no checkpoint", where=str(output))
    return Interrupted(
        f"{text}, and {saved.name}",
        where=str(output),
        hint="Go on with the same settings and `resume_from_checkpoint` latest",
    )
