"""Which evaluation was the best, and when training has gone on long enough without a better one."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field


class EvaluationState(BaseModel):
    """What the evaluations of a run have shown so far. As transformers' `EarlyStoppingCallback` counts.

    Attributes:
        step: the update after which rows were evaluated last; 0 before the first time.
        best_step: the update with the least loss; 0 before a loss was finite.
        best_loss: that loss.
        not_improved: evaluations in a row that were not better than the best one before them by more than
            the threshold.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    step: int = Field(default=0, ge=0)
    best_step: int = Field(default=0, ge=0)
    best_loss: float | None = None
    not_improved: int = Field(default=0, ge=0)

    def after(self, step: int, loss: float, threshold: float) -> EvaluationState:
        """The state after the evaluation of update `step`. A loss that is not finite is no improvement."""
        best = math.inf if self.best_loss is None else self.best_loss
        is_better = math.isfinite(loss) and loss < best
        return EvaluationState(
            step=step,
            best_step=step if is_better else self.best_step,
            best_loss=loss if is_better else self.best_loss,
            not_improved=0 if is_better and best - loss > threshold else self.not_improved + 1,
        )

    def ends_training(self, patience: int | None) -> bool:
        """Whether so many evaluations in a row were no better."""
        return patience is not None and self.not_improved >= patience
