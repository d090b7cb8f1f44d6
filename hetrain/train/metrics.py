"""The metrics of one micro-batch: what `on_step` receives and a line of metrics.jsonl holds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from hetrain.train.loop import AppliedUpdate
from hetrain.train.step import StepResult


@dataclass(frozen=True)
class MicroBatchMetrics:
    """One micro-batch that has moved the adapter, or whose update was skipped.

    `step` of `total_steps` is the update that it was part of, with `update_tokens` in all. `skipped_updates`
    counts those up to it that were skipped since loss or gradients were not finite: the `grad_norm` of such
    an update is not, and `loss` may be NaN. `loss` is the mean over its `targets` supervised tokens;
    `staleness` counts the updates between its snapshot and its own. Times are seconds of this micro-batch:
    `wait_s` from the first byte sent to the last received and verified, `server_s` workers' computing and
    `verify_s` verification within it; since training began, `begin_s` to its start and `elapsed_s` to its
    update. `products` counts results that were verified, `rejected` those that failed verification, which
    `rejected_workers` had computed. `devices` are those that workers report, `workers` their seconds of
    computing by name.
    """

    step: int
    total_steps: int
    update_tokens: int
    skipped_updates: int
    micro_batch: int
    loss: float
    tokens: int
    targets: int
    seconds: float
    bytes_up: int
    bytes_down: int
    encrypt_s: float
    wait_s: float
    verify_s: float
    decrypt_s: float
    server_s: float
    products: int
    rejected: int
    rejected_workers: tuple[str, ...]
    devices: tuple[str, ...]
    workers: Mapping[str, float]
    staleness: int
    learning_rate: float
    grad_norm: float
    begin_s: float
    elapsed_s: float

    def record(self) -> dict[str, object]:
        """The fields as JSON has them: None in place of what is not finite."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }

    def __str__(self) -> str:
        return (
            f"step {self.step}/{self.total_steps}: loss {self.loss:.4f}, {self.tokens} tokens in "
            f"{self.seconds:.1f} s (encrypt {self.encrypt_s:.1f}, wait {self.wait_s:.1f}, "
            f"decrypt {self.decrypt_s:.1f})"
        )


def metrics_of(
    applied: AppliedUpdate, total_steps: int, skipped_updates: int, since: float
) -> list[MicroBatchMetrics]:
    """The metrics of each micro-batch of an update that was made now.

    Args:
        applied: the update.
        total_steps: see `MicroBatchMetrics`.
        skipped_updates: see `MicroBatchMetrics`.
        since: when training began, as `time.perf_counter` counts.
    """
    elapsed_s = time.perf_counter() - since
    return [
        _of(applied, result, total_steps, skipped_updates, since, elapsed_s) for result in applied.results
    ]


def _of(
    applied: AppliedUpdate,
    result: StepResult,
    total_steps: int,
    skipped_updates: int,
    since: float,
    elapsed_s: float,
) -> MicroBatchMetrics:
    update, batch = applied.update, result.batch
    return MicroBatchMetrics(
        step=update.step,
        total_steps=total_steps,
        update_tokens=sum(each.batch.n_tokens for each in applied.results),
        skipped_updates=skipped_updates,
        micro_batch=batch.index,
        loss=result.summed_loss / batch.n_targets,
        tokens=batch.n_tokens,
        targets=batch.n_targets,
        seconds=result.seconds,
        **asdict(result.stats),
        staleness=result.staleness,
        learning_rate=update.learning_rate,
        grad_norm=update.grad_norm,
        begin_s=result.begin - since,
        elapsed_s=elapsed_s,
    )
