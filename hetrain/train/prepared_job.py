"""A job, checked as far as it can be without workers."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass

from peft import PeftModel

from hetrain.config import JobSpec, TrainingConfig
from hetrain.data.dataset import JobRows
from hetrain.data.tokenization import Row, tokenize_rows
from hetrain.data.updates import Position, count_updates
from hetrain.nn.initial_adapter import initial_values, require_alike
from hetrain.nn.lora import adapter_parameters
from hetrain.public.errors import UsageError
from hetrain.train.adapter_base import require_base
from hetrain.train.checkpoint import Checkpoint, Identity, checkpoint_path, find_checkpoint, rows_digest
from hetrain.train.session import BaseModelFiles, open_base
from hetrain.train.updater import Updater

_log = logging.getLogger(__name__)

# Settings that a resumed run may change. Most decide neither what is computed nor in which micro-batches; the
# number of updates may grow, and batch_tokens stands for all settings that give it.
_FREE = (
    "verify_rows",
    "in_flight",
    "max_bytes_in_flight",
    "activation_memory",
    "max_skipped_updates",
    "save_steps",
    "save_total_limit",
    "max_steps",
    "num_train_epochs",
    "gradient_accumulation_steps",
    "eval_strategy",
    "eval_steps",
    "early_stopping_patience",
    "early_stopping_threshold",
    "load_best_model_at_end",
    "report_to",
)


@dataclass(frozen=True)
class PreparedJob:
    """A job, its rows as tokens, and where it goes on.

    Attributes:
        spec: the job.
        base: the model's files and tokenizer.
        rows: the rows to learn.
        held_out: the rows to evaluate; may be none.
        total_steps: updates of the whole run.
        checkpoint: from which the run goes on; None starts anew.
        identity: what decides its course, but for the plan; see `Checkpoint.require`.
    """

    spec: JobSpec
    base: BaseModelFiles
    rows: list[Row]
    held_out: list[Row]
    total_steps: int
    checkpoint: Checkpoint | None
    identity: Identity

    @property
    def start(self) -> Position:
        """How far an earlier run has come."""
        return _position(self.checkpoint)

    @property
    def training(self) -> TrainingConfig:
        """The settings, for a training of this many updates."""
        return self.spec.training.over(self.total_steps)

    @property
    def kept_steps(self) -> int | None:
        """The last update whose files in the output directory are this run's own."""
        if self.checkpoint is None or self.checkpoint.path.resolve().parent != self.spec.output_dir.resolve():
            return None
        return self.checkpoint.state.step


def prepare_job(spec: JobSpec, raw_rows: JobRows) -> PreparedJob:
    """Finds the model, tokenizes all rows, and finds and checks what the run goes on from.

    Raises:
        ModelError: there is no such model, or it has no tokenizer.
        DatasetError: rows cannot be used.
        UsageError: checkpoint or adapter do not belong to this job, or nothing is left to do.
    """
    base = open_base(spec.model)
    if spec.init_from is not None:
        require_base(spec.init_from, spec.model, base.files)
        require_alike(spec.init_from, spec.lora)
    rows, held_out = (
        tokenize_rows(raw, base.tokenizer, spec.training.longest_row, spec.data) if raw else []
        for raw in (raw_rows.learned, raw_rows.held_out)
    )
    identity = _identity(spec, rows)
    checkpoint = None
    if spec.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(spec.resume_from_checkpoint, spec.output_dir)
        checkpoint.require(identity)
    total_steps = count_updates(rows, spec.training, _position(checkpoint))
    if checkpoint is not None:
        _require_work(checkpoint, spec, total_steps)
    if warning := spec.training.warning(total_steps):
        _log.warning(warning)
    return PreparedJob(spec, base, rows, held_out, total_steps, checkpoint, identity)


def _position(checkpoint: Checkpoint | None) -> Position:
    if checkpoint is None:
        return Position()
    return Position(checkpoint.state.step, checkpoint.state.micro_batches)


def _require_work(checkpoint: Checkpoint, spec: JobSpec, total_steps: int) -> None:
    """Raises `UsageError` where a run cannot go on, or has nothing left to do."""
    state, where = checkpoint.state, str(checkpoint.path)
    longer = "give more `max_steps` or `num_train_epochs` to extend it"
    if total_steps < state.total_steps:
        raise UsageError(
            f"the run was to make {state.total_steps} updates: {total_steps} are fewer",
            where=where,
            hint="give as many, or more",
        )
    if state.step >= total_steps:
        raise UsageError(
            f"all {total_steps} updates have been made",
            where=where,
            hint=f"the checkpoint holds the finished adapter; {longer}",
        )
    if state.evaluations.ends_training(spec.training.early_stopping_patience):
        raise UsageError(
            f"training has ended early: {state.evaluations.not_improved} evaluations in a row were no better",
            where=where,
            hint="raise `early_stopping_patience`, or leave it out",
        )
    best = state.evaluations.best_step
    is_there = best in (0, state.step) or checkpoint_path(spec.output_dir, best).is_dir()
    if spec.training.load_best_model_at_end and not is_there:
        raise UsageError(
            f"the least held-out loss was that of update {best}, and checkpoint-{best} is not in "
            f"{spec.output_dir}",
            field="load_best_model_at_end",
            hint="leave it out, or name the `output_dir` with that checkpoint",
        )


def _identity(spec: JobSpec, rows: list[Row]) -> Identity:
    settings = {**asdict(spec.lora), **asdict(spec.training), **asdict(spec.outsourcing)}
    return {
        **{name: value for name, value in settings.items() if name not in _FREE},
        "batch_tokens": spec.training.tokens_per_update,
        "dataset_sha256": rows_digest(rows),
    }


def make_updater(job: PreparedJob, model: PeftModel) -> Updater:
    """The owner of the adapter of `model`: fresh, from another adapter, or as a checkpoint has it.

    Raises:
        UsageError: the other adapter, or the checkpoint, has other modules or shapes.
    """
    parameters = adapter_parameters(model)
    updater = Updater(parameters, job.training, job.total_steps)
    if job.checkpoint is None:
        if job.spec.init_from is not None:
            updater.start_from(initial_values(job.spec.init_from, parameters))
        return updater
    job.checkpoint.restore(updater)
    if (planned := job.checkpoint.state.total_steps) != job.total_steps:
        _log.info(
            "%d updates instead of %d: from here on the learning rate is that of %s over %d updates, "
            "%.3g in update %d",
            job.total_steps,
            planned,
            job.training.lr_scheduler_type,
            job.total_steps,
            updater.learning_rate,
            updater.version + 1,
        )
    return updater
