"""Attacks that read the training text where results are taken on trust: the first wrong product ends each.

A worker that opens an MLP's gate at one position and closes it elsewhere makes the gradients of that layer
those of one token, which whoever gets the adapter can read. One that scales a product so that it overflows
exactly if a token is the guessed one learns the answer from whether the job goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hetrain.config import LoraConfig
from hetrain.nn.lora import adapter_parameters, add_adapter
from hetrain.nn.replica import Replica
from hetrain.nn.split import split_model
from hetrain.public.errors import ResultRejected
from hetrain.public.lattice.result_format import pack, unpack
from hetrain.public.lattice.ring import RESULT_BITS
from hetrain.public.model.files import resolve
from hetrain.public.protocol.messages import EvaluateTask
from hetrain.public.protocol.plan import stack_group
from hetrain.public.protocol.product import Product, ProductKey
from hetrain.secret.engines.rlwe.hints import HintStore
from hetrain.secret.engines.rlwe.seal import RlweSealer
from hetrain.secret.verification.job import Verification, kept_rows
from hetrain.secret.verification.rows import CheckRows
from hetrain.train.hints import ignore_progress, make_hints
from hetrain.train.step import run_step
from hetrain.train.updater import Snapshot
from hetrain.transport.in_process import InProcessChannel
from tests.harness.engine import COMPUTE
from tests.harness.split_model import FAMILIES, packed, rows, save_model
from worker_gpu.service import Service
from worker_gpu.weights.store import WeightStore

RING, POSITION = 256, 3
SPAN = 1 << RESULT_BITS
CLOSED, OPEN, SLOPE = -SPAN // 3, SPAN // 64, SPAN // 8
Attack = Callable[[EvaluateTask, torch.Tensor], torch.Tensor]
"""What a worker returns in place of u, int64 [N, n]."""


class Victim:
    """A client that trains a tiny model with `rlwe`, and its one worker, which `attack` makes lie."""

    def __init__(self, directory: Path, cache: Path) -> None:
        files = resolve(str(directory))
        kept: dict[ProductKey, CheckRows] = {}
        self.attack: Attack = lambda task, u: u
        self.seen: list[tuple[str, str]] = []
        self._service = Service(COMPUTE, WeightStore(COMPUTE.device, {files.label: str(directory)}))
        self._split = split_model(files, ("*",), lambda group, matrix: kept.update(kept_rows(group, matrix)))
        self._model = add_adapter(self._split, LoraConfig(r=4, alpha=8), seed=0)
        self._plan = self._split.plan.to_bytes()
        self._channel = InProcessChannel(self._evaluate)
        self._channel.prepare(self._split.plan.model, "rlwe", self._plan, self._split.plan.digest)

        def weights(product: Product) -> torch.Tensor:
            matrix = stack_group(product.group.members, files.read).values
            return matrix if product.direction == "forward" else matrix.t()

        store = HintStore(cache)
        make_hints(store, self._split.plan, self._channel, weights, ignore_progress)
        self._sealer = RlweSealer(Verification(kept, weights), store)

    def train(self, seed: int) -> None:
        """One micro-batch, whose text and length depend on `seed`."""
        self.seen.clear()
        replica = Replica(self._split, self._model, self._channel, self._sealer)
        values = {name: p.detach().clone() for name, p in adapter_parameters(self._model).items()}
        batch = packed(rows((13 + seed, 6, 9)))
        result = run_step(replica, batch, Snapshot(values), seed=0)
        assert result.gradients is not None

    def _evaluate(self, task: EvaluateTask, payload: memoryview) -> list[memoryview]:
        honest = self._service.evaluate(task, lambda: self._plan, payload)
        if task.header["operand"] == "mask_seed":
            return honest
        self.seen.append((task.group, task.direction))
        packed_u = torch.frombuffer(bytearray().join(honest), dtype=torch.uint8).view(RING, -1)
        u = unpack(packed_u, task.stop - task.start).to(torch.int64)
        return [memoryview(pack(self.attack(task, u.clone()) % SPAN).numpy()).cast("B")]


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    directory = tmp_path_factory.mktemp("reading")
    save_model(FAMILIES["llama"], directory / "model")
    return Victim(directory / "model", directory / "hints")


def is_gate(task: EvaluateTask) -> bool:
    return task.direction == "forward" and task.group.endswith("gate_proj")


def is_down(task: EvaluateTask) -> bool:
    return task.direction == "backward" and task.group.endswith("down_proj")


def write_chosen_results(task: EvaluateTask, u: torch.Tensor) -> torch.Tensor:
    """One token's gradients alone: the gate is closed but at one position, up and dx are constants."""
    half = u.shape[1] // 2
    if is_gate(task):
        u[:, :half], u[POSITION, :half], u[:, half:] = CLOSED, OPEN, SLOPE
    if is_down(task):
        u[:] = OPEN
    return u


def add_constants(task: EvaluateTask, u: torch.Tensor) -> torch.Tensor:
    """The same where the mask's product is right, as hints make it: constants on top of honest results."""
    half = u.shape[1] // 2
    if is_gate(task):
        u[:, :half] += CLOSED
        u[POSITION, :half] += OPEN - CLOSED
        u[:, half:] += SLOPE
    if is_down(task):
        u += OPEN
    return u


def overflow_if_guessed(task: EvaluateTask, u: torch.Tensor) -> torch.Tensor:
    """Every gate is one linear combination of the token's features, less a threshold."""
    half = u.shape[1] // 2
    if is_gate(task):
        u[:, :half] = u[:, half:].sum(1, keepdim=True) + CLOSED
        u[:, half:] = SPAN // 2 - 1
    return u


def lie_after_right_ones(task: EvaluateTask, u: torch.Tensor) -> torch.Tensor:
    """Right until the last product of the micro-batch but a few, when trust would have been earned."""
    return -u if is_down(task) and ".0." in task.group else u


@pytest.mark.parametrize(
    "attack",
    [write_chosen_results, add_constants, overflow_if_guessed, lie_after_right_ones],
    ids=lambda attack: attack.__name__,
)
def test_an_attack_ends_at_its_first_product_whatever_the_text_is(victim: Victim, attack: Attack) -> None:
    """No update is made, and where it ends does not depend on the data: there is no answer to read."""
    ends = []
    for seed in range(2):
        victim.attack = lambda task, u: u
        victim.train(seed)
        undisturbed = list(victim.seen)
        victim.attack = attack
        with pytest.raises(ResultRejected, match="not decrypted") as error:
            victim.train(seed)
        assert error.value.workers == ("local",)
        assert victim.seen == undisturbed[: len(victim.seen)], "right results change nothing"
        ends.append(victim.seen[-1])
    assert ends[0] == ends[1]
    assert ends[0][0].endswith("down_proj" if attack is lie_after_right_ones else "gate_proj")
