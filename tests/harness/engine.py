"""One engine's two halves around a worker's service, on int8 matrices whose products are known exactly."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file

from hetrain.public.lattice.parameters import parameters_for
from hetrain.public.lattice.result_format import largest_operand, switching_error_bound
from hetrain.public.model.files import resolve
from hetrain.public.model.quantization import max_l1
from hetrain.public.protocol.messages import (
    Blob,
    Direction,
    EvaluateTask,
    Header,
    PrepareTask,
    new_token,
    parse,
)
from hetrain.public.protocol.plan import Group, Member, Plan, group_of, stack_group
from hetrain.public.protocol.product import Part, Product, ProductKey, RowRange
from hetrain.secret.activation_quantization import quantize_operand
from hetrain.secret.engine import JobOptions, Sealed, Sealer, client_engine
from hetrain.secret.engines.rlwe.hints import HintStore, sketches_of
from hetrain.secret.verification import Sketch
from hetrain.transport.in_process import InProcessChannel
from hetrain.transport.requests.request import evaluate_task
from worker_gpu.device import choose_compute, choose_device
from worker_gpu.service import Service
from worker_gpu.weights.store import WeightStore

COMPUTE = choose_compute(choose_device())


@dataclass(frozen=True)
class Guarantee:
    """What an engine guarantees for W·x: the largest entry of x it takes, and the largest error of a product.

    Both are given the tokens of x and the int8 matrix W [n, K]; the error is one for each row.
    """

    x_max: Callable[[int, torch.Tensor], int]
    error: Callable[[int, torch.Tensor], torch.Tensor]


def _rlwe_x_max(tokens: int, matrix: torch.Tensor) -> int:
    return largest_operand(parameters_for(tokens), max_l1(matrix)[0])


def _rlwe_error(tokens: int, matrix: torch.Tensor) -> torch.Tensor:
    parameters = parameters_for(tokens)
    return parameters.eta * matrix.to(torch.int64).abs().sum(1) + switching_error_bound(parameters)


def _exact(tokens: int, matrix: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(matrix), dtype=torch.int64)


GUARANTEES: Mapping[str, Guarantee] = MappingProxyType(
    {
        "rlwe": Guarantee(_rlwe_x_max, _rlwe_error),
        "concrete": Guarantee(lambda tokens, matrix: 127, _exact),
        "clear": Guarantee(_rlwe_x_max, _exact),
    }
)


def open_checked(sealed: Sealed, parts: Sequence[Part]) -> torch.Tensor:
    """What `sealed` opens `parts` to, after checking each."""
    for part in parts:
        sealed.opening.check(part)
    return sealed.opening.open(parts)


class EngineHarness:
    """A checkpoint of the given matrices, its plan, a worker that serves it, and a job of one engine."""

    def __init__(
        self, engine: str, weights: Mapping[str, torch.Tensor], folder: Path, *, hints: bool = False
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "none"}))
        save_file(
            {f"{name}.weight": w.contiguous() for name, w in weights.items()}, folder / "model.safetensors"
        )
        checkpoint = resolve(str(folder))
        self.name = engine
        self.matrices: dict[str, torch.Tensor] = {}
        groups = []
        for name, w in weights.items():
            members = (Member(module=name, tensor=f"{name}.weight", out_features=w.shape[0]),)
            values = stack_group(members, checkpoint.read).values
            groups.append(group_of(members, values))
            self.matrices[name] = values
        self.plan = Plan(model=checkpoint.label, groups=tuple(groups))
        self.service = Service(COMPUTE, WeightStore(COMPUTE.device, {checkpoint.label: str(folder)}))
        self._hints_in = folder if hints else None
        self.sealer = self.new_sealer()
        self.channel = InProcessChannel(self.evaluate, self._prepare)
        self.channel.prepare(
            self.plan.model, engine, self.plan.to_bytes(), self.plan.digest, self.sealer.setup
        )

    def _prepare(self, task: PrepareTask, plan: bytes) -> None:
        self.prepared = task
        self.service.prepare(task, lambda: plan)

    def new_sealer(self, bits: int | None = None) -> Sealer:
        """The client half of another job, with its own keys."""
        return client_engine(self.name).open(self.plan, JobOptions(bits, self.new_hints()))

    def new_hints(self) -> HintStore | None:
        """A store of hints, empty; None where this harness has none."""
        if self._hints_in is None:
            return None
        sketches: dict[ProductKey, Sketch] = {}
        for group in self.plan.groups:
            sketches |= sketches_of(group, self.matrices[group.name])
        return HintStore(self.plan, sketches, self._hints_in)

    def evaluate(self, task: EvaluateTask, payload: memoryview) -> list[memoryview]:
        """The worker's results for a task."""
        return self.service.evaluate(task, self.plan.to_bytes, payload)

    def group(self, name: str) -> Group:
        """The group called `name`."""
        return next(group for group in self.plan.groups if group.name == name)

    def product(self, name: str, direction: Direction) -> Product:
        """One of the products with the group called `name`."""
        return Product(self.group(name), direction)

    def seal(self, name: str, direction: Direction, x: torch.Tensor) -> Sealed:
        """One operand, sealed."""
        return self.sealer.seal(x, self.product(name, direction))

    def answer(
        self,
        name: str,
        direction: Direction,
        sealed: Sealed,
        rows: Sequence[RowRange] | None = None,
        payload: bytes | None = None,
        header: Header | None = None,
    ) -> list[Part]:
        """The worker's results for `sealed`, or for another payload or header in its place."""
        product = self.product(name, direction)
        data = memoryview(bytearray().join(sealed.operand.payload) if payload is None else bytearray(payload))
        blob = Blob(job=self.prepared.job, kind="in", token=new_token(), nbytes=data.nbytes)
        chosen = sealed.operand.header if header is None else header
        parts = []
        for piece in rows or [(0, product.n)]:
            task = evaluate_task(self.prepared, new_token(), product, chosen, piece, blob)
            task = parse(EvaluateTask, task.to_json(), where="harness")
            parts.append(Part(piece, memoryview(bytearray().join(self.evaluate(task, data))), "worker"))
        return parts

    def multiply(
        self, name: str, direction: Direction, x: torch.Tensor, rows: Sequence[RowRange] | None = None
    ) -> torch.Tensor:
        """The whole way: sealed, evaluated, checked, opened."""
        sealed = self.seal(name, direction, x)
        return open_checked(sealed, self.answer(name, direction, sealed, rows))

    def matrix(self, name: str, direction: Direction) -> torch.Tensor:
        """W, int8 [n, K], of this direction."""
        values = self.matrices[name]
        return values if direction == "forward" else values.t()

    def excess(self, name: str, direction: Direction, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """By how much entries of y exceed the guaranteed error, [n, T]: 0 where the guarantee is kept."""
        w = self.matrix(name, direction)
        guarantee = GUARANTEES[self.name]
        operand = quantize_operand(x, guarantee.x_max(len(x), w))
        exact = w.to(torch.int64) @ operand.values.to(torch.int64)
        scales = operand.scales.to(torch.float64)
        got = (y.to(torch.float64) / scales[:, None]).t()
        # float32 carries 24 bits of a result and of its scale.
        slack = exact.abs().to(torch.float64) * 2.0**-22 + 0.01
        error = (got - exact.to(torch.float64)).abs()
        return (error - guarantee.error(len(x), w)[:, None] - slack).clamp_min(0)
