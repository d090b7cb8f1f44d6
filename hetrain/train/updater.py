"""The adapter in training, and its optimizer."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from hetrain.config import TrainingConfig
from hetrain.train.weight_prediction import predicted

Tensors = Mapping[str, torch.Tensor]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The adapter's values for a micro-batch whose update comes after `staleness` others."""

    values: Tensors
    staleness: int = 0


@dataclass(frozen=True)
class Update:
    """One optimizer update: its number from 1, its learning rate, the gradients' norm before clipping.

    With a `grad_norm` that is not finite it was skipped: adapter and moments have stayed as they were.
    """

    step: int
    learning_rate: float
    grad_norm: float

    @property
    def is_skipped(self) -> bool:
        """Whether it has changed nothing."""
        return not math.isfinite(self.grad_norm)


class Updater:
    """AdamW on the adapter's parameters. Called by one thread; snapshots may be read by any."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: TrainingConfig, total_steps: int
    ) -> None:
        self._parameters = dict(parameters)
        self._max_grad_norm = config.max_grad_norm
        self._predicts = config.staleness_correction == "prediction"
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        # AdamW would make these with its first update, which may be skipped.
        for parameter in self._parameters.values():
            self._optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._scheduler = get_scheduler(
            config.lr_scheduler_type,
            self._optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=total_steps,
        )
        self._version = 0

    @property
    def version(self) -> int:
        """Updates so far."""
        return self._version

    @property
    def learning_rate(self) -> float:
        """That of the next update."""
        return float(self._scheduler.get_last_lr()[0])

    def optimizer_state(self) -> Tensors:
        """A copy of AdamW's moments and counts: ``{parameter}/{exp_avg, exp_avg_sq, step}``."""
        return {
            f"{name}/{key}": value.detach().clone()
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state[parameter].items()
        }

    def schedule_state(self) -> dict[str, object]:
        """The schedule's state: numbers and lists of numbers."""
        return dict(self._scheduler.state_dict())

    def restore(self, values: Tensors, moments: Tensors, schedule: dict[str, Any], version: int) -> None:
        """Goes on from where `snapshot`, `optimizer_state` and `schedule_state` were taken.

        If that was in a run of another number of updates, the learning rate is from here on that of this one.

        Raises:
            ValueError: names or shapes are not those of this adapter, or the schedule is of other settings.
        """
        expected = {name: parameter.shape for name, parameter in self._parameters.items()}
        if {name: value.shape for name, value in values.items()} != expected:
            raise ValueError("the adapter has other tensors")
        _require_schedule(schedule, self._scheduler.state_dict(), version)
        state = {
            name: _moments_of(name, parameter, moments, version)
            for name, parameter in self._parameters.items()
        }
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(values[name])
        numbered = {index: state[name] for index, name in enumerate(self._parameters)}
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": numbered})
        self._scheduler.load_state_dict(schedule)
        (group,), (rate_of,) = self._optimizer.param_groups, self._scheduler.lr_lambdas
        (peak,) = self._scheduler.base_lrs
        group["lr"] = peak * rate_of(self._scheduler.last_epoch)
        self._scheduler._last_lr = [group["lr"]]
        self._version = version

    def start_from(self, values: Tensors) -> None:
        """Gives the adapter its initial values, by the names of its parameters."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(values[name])

    def snapshot(self, staleness: int = 0) -> Snapshot:
        """A copy of the adapter's values.

        With the correction "prediction" they are those that the adapter is expected to have after `staleness`
        more updates (`hetrain.train.weight_prediction`), else those that it has.
        """
        rates = self._rates_ahead(staleness) if self._predicts else 0.0
        (group,) = self._optimizer.param_groups
        values = {
            name: predicted(parameter, self._optimizer.state[parameter], group, rates)
            for name, parameter in self._parameters.items()
        }
        return Snapshot(values, staleness)

    def _rates_ahead(self, updates: int) -> float:
        """Sum of the learning rates of the next `updates` updates."""
        (rate_of,), (peak,) = self._scheduler.lr_lambdas, self._scheduler.base_lrs
        return float(sum(peak * rate_of(self._scheduler.last_epoch + ahead) for ahead in range(updates)))

    def apply(self, gradients: Sequence[Tensors | None], n_targets: int) -> Update:
        """Adds up gradients of summed losses, in the order given, divides by the targets, clips and steps.

        If they have a NaN or an infinity, the update is skipped, and takes its place in the schedule.

        Args:
            gradients: by parameter name, one mapping per micro-batch; None for one that is not finite.
            n_targets: supervised tokens of all of them: the loss that is minimised is their mean.
        """
        complete = [each for each in gradients if each is not None]
        norm = self._set_gradients(complete, n_targets) if len(complete) == len(gradients) else math.nan
        update = Update(self._version + 1, self.learning_rate, norm)
        if update.is_skipped:
            _log.warning("update %d is skipped: its loss or its gradients are not finite", update.step)
            self._optimizer.zero_grad(set_to_none=True)  # without gradients a step changes nothing
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._version = update.step
        return update

    def _set_gradients(self, gradients: Sequence[Tensors], n_targets: int) -> float:
        """Gives the parameters their clipped gradients. Returns the norm before."""
        for name, parameter in self._parameters.items():
            total = gradients[0][name].clone()
            for other in gradients[1:]:
                total += other[name]
            parameter.grad = total.to(parameter.device) / n_targets
        # A limit of zero means no clipping, as in transformers' trainer; the norm is computed all the same.
        limit = self._max_grad_norm or math.inf
        return float(nn.utils.clip_grad_norm_(self._parameters.values(), limit))


def _moments_of(
    name: str, parameter: nn.Parameter, moments: Tensors, version: int
) -> dict[str, torch.Tensor]:
    """AdamW's state of one parameter. Raises `ValueError` unless it can be one after `version` updates."""
    like = {"exp_avg": parameter, "exp_avg_sq": parameter, "step": torch.zeros(())}
    state = {key: moments[f"{name}/{key}"] for key in like if f"{name}/{key}" in moments}
    found, fitting = ({key: (v.shape, v.dtype) for key, v in each.items()} for each in (state, like))
    if found != fitting or not 0 <= state["step"] <= version:
        raise ValueError(f"the optimizer has no fitting state for {name}")
    return state


def _require_schedule(found: Mapping[str, Any], own: Mapping[str, Any], version: int) -> None:
    """Raises `ValueError` unless it is after `version` updates, with the form and base rates of `own`."""
    is_own = _form(found) == _form(own) and found["base_lrs"] == own["base_lrs"]
    if (
        not is_own
        or found["last_epoch"] != version
        or not all(0 <= rate <= max(own["base_lrs"]) for rate in found["_last_lr"])
    ):
        raise ValueError("the state of the learning rate's schedule is not one of these settings")


def _form(value: Any) -> Any:
    """`value` with a word in place of each number."""
    if isinstance(value, Mapping):
        return {name: _form(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_form(each) for each in value]
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value)
