"""Which correction of staleness learns best? ``python -m benchmarks.corrections --json FILE``, resumable.

Stock peft in fp32, in this process, with a fixed delay: update u is made from gradients at the adapter as it
was after u − s updates, s being the staleness. All runs of a data set and seed have the same micro-batches,
initial adapter, AdamW and schedule. The corrections:

- ``plain``: none.
- ``prediction``: gradients at the weights predicted for s updates later (`hetrain.train.weight_prediction`).
- ``compensation``: g + λ·g⊙g⊙(θ_u − θ_{u−s}), λ = 2/√v with AdamW's second moment v (after DC-ASGD-a,
  arXiv 1609.08326, section 5).
- ``rate``: the learning rate divided by s + 1 (staleness-aware SGD, arXiv 1511.05950; PipeMare's T1, arXiv
  1910.05124).

No staleness while the learning rate warms up (PipeMare, T3), a tenth of the updates. A run that the file has
is not repeated, so a stopped measurement goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import get_scheduler

from benchmarks.data import CORPUS, HANDBOOK, HANDBOOK_EVAL
from benchmarks.output import add_json_option, complete_runs, markdown
from benchmarks.plain import lean_step, plain_model
from hetrain.config import LoraConfig
from hetrain.data.packing import MicroBatch, epochs, micro_batches, pack
from hetrain.data.tokenization import Row, read_rows
from hetrain.nn.lora import adapter_parameters, add_adapter
from hetrain.nn.split import split_model
from hetrain.public.protocol.plan import stack_group
from hetrain.train.session import BaseModelFiles, open_base
from hetrain.train.updater import Tensors
from hetrain.train.weight_prediction import predicted

CORRECTIONS = ("plain", "prediction", "compensation", "rate")
RATES: Mapping[str, float] = MappingProxyType({"handbook": 2e-3, "text": 5e-4})
"""Peak learning rate by data set."""
WARM_UP = 10
"""One update in so many warms up."""
_LORA = LoraConfig()
_COMPENSATION = 2.0
_LAST = 5
_TEXT_TOKENS, _HELD_OUT_ROWS = 128, 10


@dataclass(frozen=True)
class Run:
    """One training: its data and its updates, and how staleness is corrected."""

    data: str
    updates: int
    tokens: int
    seed: int
    staleness: int = 0
    correction: str = "plain"
    learning_rate: float | None = None

    @property
    def peak_rate(self) -> float:
        """The peak of the learning rate: `learning_rate`, or else that of its data."""
        return RATES[self.data] if self.learning_rate is None else self.learning_rate

    @property
    def name(self) -> str:
        """The name of its figures."""
        how = f"staleness {self.staleness}, {self.correction}" if self.staleness else "lock step"
        rate = "" if self.learning_rate is None else f", rate {self.learning_rate:g}"
        return f"{self.data}, {self.updates} updates of {self.tokens} tokens, seed {self.seed}, {how}{rate}"

    @property
    def warm_up(self) -> int:
        """Updates of linear warm-up."""
        return self.updates // WARM_UP

    def staleness_at(self, update: int) -> int:
        """Staleness of the gradients of an update, counted from 0."""
        return self.staleness if update >= self.warm_up else 0


class DelayedTraining:
    """A stock peft model, AdamW, and the snapshots of the last updates."""

    def __init__(self, model: PeftModel, run: Run) -> None:
        self._model, self._run = model, run
        self._parameters = adapter_parameters(model)
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=run.peak_rate, weight_decay=0.0)
        self._schedule = get_scheduler("cosine", self._optimizer, run.warm_up, run.updates)
        self._versions: deque[list[Tensors]] = deque(maxlen=run.staleness + 1)
        self._keep()

    def update(self, batches: Sequence[MicroBatch]) -> float:
        """Makes an update. Returns the mean loss over its targets."""
        made = self._schedule.last_epoch
        staleness = min(self._run.staleness_at(made), len(self._versions) - 1)
        now, past = self._versions[-1][0], self._versions[-1 - staleness]
        self._load(past[staleness if self._run.correction == "prediction" else 0])
        steps = [lean_step(self._model, batch) for batch in batches]
        self._load(now)
        n_targets = sum(batch.n_targets for batch in batches)
        for name, parameter in self._parameters.items():
            parameter.grad = torch.stack([gradients[name] for _, gradients in steps]).sum(0) / n_targets
            if self._run.correction == "compensation" and staleness:
                self._compensate(parameter, now[name] - past[0][name])
        nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        (group,) = self._optimizer.param_groups
        if self._run.correction == "rate":
            group["lr"] /= staleness + 1
        self._optimizer.step()
        self._schedule.step()
        self._keep()
        losses = zip((loss for loss, _ in steps), batches, strict=True)
        return sum(loss * batch.n_targets for loss, batch in losses) / n_targets

    def _compensate(self, parameter: nn.Parameter, moved: torch.Tensor) -> None:
        assert parameter.grad is not None
        deviation = self._optimizer.state[parameter]["exp_avg_sq"].sqrt() + 1e-8
        parameter.grad += _COMPENSATION / deviation * parameter.grad**2 * moved

    def _load(self, values: Tensors) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(values[name])

    def _keep(self) -> None:
        """The values now, and those expected after 1, 2, ... more updates."""
        (group,), (factor,) = self._optimizer.param_groups, self._schedule.lr_lambdas
        begin = self._schedule.last_epoch
        rates = [self._run.peak_rate * factor(begin + ahead) for ahead in range(self._run.staleness)]
        fresh = {"step": torch.zeros(())}  # AdamW has no state before its first update
        self._versions.append(
            [
                {
                    name: predicted(
                        parameter, self._optimizer.state.get(parameter, fresh), group, sum(rates[:ahead])
                    )
                    for name, parameter in self._parameters.items()
                }
                for ahead in range(self._run.staleness + 1)
            ]
        )


@dataclass(frozen=True)
class Setup:
    """What all runs of a data set and seed share."""

    values: Tensors
    updates: list[list[MicroBatch]]
    held_out: list[MicroBatch]


def set_up(base: BaseModelFiles, run: Run, micro_batch_tokens: int, lora: LoraConfig = _LORA) -> Setup:
    """The initial adapter and the micro-batches that ``hetrain submit`` makes from the run's seed."""
    adapted = add_adapter(split_model(base.files), lora, run.seed)
    values = {name: value.detach().clone() for name, value in adapter_parameters(adapted).items()}
    rows, held_out = rows_of(base, run.data)
    width = -(-run.tokens // micro_batch_tokens)
    drawn = list(islice(epochs(rows, run.tokens // width, run.seed, None), run.updates * width))
    return Setup(
        values,
        [drawn[first : first + width] for first in range(0, len(drawn), width)],
        list(micro_batches(held_out, pack(held_out, 512, range(len(held_out))))),
    )


def rows_of(base: BaseModelFiles, data: str) -> tuple[list[Row], list[Row]]:
    """Rows to learn and rows held out: of the handbook, or running text in consecutive pieces."""
    if data == "handbook":
        return tuple(read_rows(path, base.tokenizer, 512) for path in (HANDBOOK, HANDBOOK_EVAL))  # type: ignore[return-value]
    tokens = base.tokenizer(CORPUS.read_text(encoding="utf-8"))["input_ids"]
    firsts = range(0, len(tokens) - _TEXT_TOKENS + 1, _TEXT_TOKENS)
    pieces = [base.tokenizer.decode(tokens[first : first + _TEXT_TOKENS]) for first in firsts]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.jsonl"
        path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), encoding="utf-8")
        rows = read_rows(path, base.tokenizer, _TEXT_TOKENS)
    return rows[:-_HELD_OUT_ROWS], rows[-_HELD_OUT_ROWS:]


Rounding = Callable[[PeftModel, BaseModelFiles], dict[nn.Parameter, torch.Tensor]]
"""Rounds the weights of the blocks' linears. Returns what they were."""


def train(
    base: BaseModelFiles,
    run: Run,
    micro_batch_tokens: int = 2048,
    change: float = 0.0,
    *,
    rounding: Rounding | None = None,
) -> dict[str, Any]:
    """Losses of all updates, and the held-out loss after the last.

    The initial adapter is multiplied by normal numbers of mean 1 and standard deviation `change`. With
    `rounding` the linears' weights are rounded until the held-out loss is computed.
    """
    setup = set_up(base, run, micro_batch_tokens)
    random = torch.Generator().manual_seed(run.seed)
    values = {
        name: value * (1 + change * torch.randn(value.shape, generator=random))
        for name, value in setup.values.items()
    }
    model = plain_model(base.files.directory, LoraConfig(), values)
    stored = rounding(model, base) if rounding else {}
    training = DelayedTraining(model, run)
    losses = [training.update(batches) for batches in setup.updates]
    with torch.no_grad():
        for parameter, value in stored.items():
            parameter.copy_(value)
    return {"held_out": held_out_loss(model, setup.held_out), "losses": losses}


@torch.no_grad()
def round_to_int8(model: PeftModel, base: BaseModelFiles) -> dict[nn.Parameter, torch.Tensor]:
    """A `Rounding` to diag(s)·Q·diag(c), by groups as in a plan."""
    stored = {}
    causal = model.get_base_model()
    for group in split_model(base.files).plan.groups:
        matrix = stack_group(group.members, base.files.read)
        rounded = matrix.scales.outputs[:, None] * matrix.values * matrix.scales.inputs
        widths = [member.out_features for member in group.members]
        for member, weight in zip(group.members, rounded.split(widths), strict=True):
            parameter = causal.get_submodule(member.module).base_layer.weight
            stored[parameter] = parameter.clone()
            parameter.copy_(weight)
    return stored


@torch.no_grad()
def round_to_bfloat16(model: PeftModel, base: BaseModelFiles) -> dict[nn.Parameter, torch.Tensor]:
    """A `Rounding` to the type in which most models are published and trained."""
    stored = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            parameter = module.base_layer.weight
            stored[parameter] = parameter.clone()
            parameter.copy_(parameter.to(torch.bfloat16))
    return stored


def held_out_loss(model: PeftModel, batches: Sequence[MicroBatch]) -> float:
    """Mean loss over all targets."""
    total = sum(lean_step(model, batch)[0] * batch.n_targets for batch in batches)
    return total / sum(batch.n_targets for batch in batches)


def table(runs: Mapping[str, Any]) -> str:
    """Means over the seeds: held-out loss, loss of the last updates, and both against lock step."""
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, run in runs.items():
        what, _, rest = name.partition(", seed ")
        losses = run["held_out"], statistics.mean(run["losses"][-_LAST:])
        groups.setdefault(what, {}).setdefault(rest.partition(", ")[2], []).append(losses)
    rows = []
    for what, hows in groups.items():
        means = {how: tuple(map(statistics.mean, zip(*each, strict=True))) for how, each in hows.items()}
        for how, (held_out, last) in means.items():
            base = means["lock step"]
            apart = (f"{held_out / base[0] - 1:+.1%}", f"{last / base[1] - 1:+.1%}")
            rows.append((what, how, f"{held_out:.3f}", apart[0], f"{last:.3f}", apart[1]))
    header = ("", "", "held-out loss", "against lock step", f"last {_LAST} updates", "against lock step")
    return markdown(header, rows)


def main() -> None:
    """Parses arguments, makes the runs that are missing, writes after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_json_option(parser)
    parser.add_argument("--data", choices=RATES, default="handbook")
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=512, help="of an update")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--staleness", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--corrections", nargs="+", choices=CORRECTIONS, default=CORRECTIONS)
    arguments = parser.parse_args()
    base = open_base("smollm2-135m")
    stale = [(n, how) for n in arguments.staleness for how in arguments.corrections]
    trainings = {}
    for seed in arguments.seeds:
        lock_step = Run(arguments.data, arguments.updates, arguments.tokens, seed)
        for run in (lock_step, *(replace(lock_step, staleness=n, correction=how) for n, how in stale)):
            trainings[run.name] = partial(train, base, run)
    print(table(complete_runs(trainings, arguments.json)))


if __name__ == "__main__":
    main()
