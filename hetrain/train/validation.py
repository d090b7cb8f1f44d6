"""The evaluations of held-out rows while a job trains."""

from __future__ import annotations

from hetrain.config import TrainingConfig
from hetrain.train.callbacks import Callbacks
from hetrain.train.early_stopping import EvaluationState
from hetrain.train.evaluation import Evaluation, Evaluator
from hetrain.train.signals import Stop, never
from hetrain.train.updater import Tensors


def is_due(step: int, total_steps: int, config: TrainingConfig, epoch_ends: frozenset[int]) -> bool:
    """Whether rows are to be evaluated after update `step`: if at all, after the last one in any case."""
    if not config.evaluates:
        return False
    if step == total_steps:
        return True
    return (
        step % config.updates_per_evaluation == 0 if config.eval_strategy == "steps" else step in epoch_ends
    )


class Validation:
    """Evaluates when it is due, and keeps count of what came out.

    Args:
        evaluator: of the rows that are held out; None: there are none.
        config: when, and for how long without improvement.
        total_steps: updates of the run.
        epoch_ends: updates that complete a pass over the rows.
        state: what an earlier run has seen.
        callbacks: what to call.

    Attributes:
        state: what has been seen so far.
        made: the evaluations of this run, by update.
    """

    def __init__(
        self,
        evaluator: Evaluator | None,
        config: TrainingConfig,
        total_steps: int,
        epoch_ends: frozenset[int],
        state: EvaluationState,
        callbacks: Callbacks,
    ) -> None:
        self.state = state
        self.made: dict[int, Evaluation] = {}
        self._evaluator, self._config, self._callbacks = evaluator, config, callbacks
        self._total_steps, self._epoch_ends = total_steps, epoch_ends

    @property
    def is_over(self) -> bool:
        """Whether training has gone on long enough without a better evaluation."""
        return self.state.ends_training(self._config.early_stopping_patience)

    def is_due(self, step: int) -> bool:
        """Whether rows are to be evaluated after update `step`, and were not yet."""
        if step in (0, self.state.step) or self.is_over:
            return False
        return is_due(step, self._total_steps, self._config, self._epoch_ends)

    def evaluate(self, step: int, values: Tensors, stop: Stop = never) -> Evaluation:
        """Evaluates the adapter `values` of update `step`. Raises as `Evaluator`."""
        assert self._evaluator is not None
        evaluation = self._evaluator(values, self._callbacks.on_evaluating, stop)
        self.made[step] = evaluation
        self.state = self.state.after(step, evaluation.loss, self._config.early_stopping_threshold)
        self._callbacks.on_evaluation(step, evaluation)
        return evaluation

    def of_output(self, step: int, values: Tensors) -> Evaluation | None:
        """The evaluation of the finished adapter, that of update `step`; None without rows."""
        if self._evaluator is None:
            return None
        if step not in self.made:
            self.made[step] = self._evaluator(values, self._callbacks.on_evaluating)
            self._callbacks.on_evaluation(step, self.made[step])
        return self.made[step]
