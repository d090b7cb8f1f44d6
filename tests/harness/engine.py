"""One engine's two halves around a worker's service, on int8 matrices whose products are known exactly."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file

from hetrain.public.lattice.bounds import (
    LARGEST_ENTRY,
    OPERAND_ERROR,
    RESULT_ERROR,
    OperandBound,
    operand_bound,
)
from hetrain.public.model.files import resolve
from hetrain.public.model.quantization import norms_of
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
from hetrain.public.protocol.product import Part, Product, RowRange
from hetrain.secret.activation_quantization import quantize_operand
from hetrain.secret.engine import JobOptions, Sealed, Sealer, client_engine
from hetrain.secret.engines.rlwe.hints import HintStore
from hetrain.secret.verification.job import Verification, kept_rows
from hetrain.train.hints import ignore_progress, make_hints
from hetrain.transport.in_process import InProcessChannel
from hetrain.transport.requests.request import evaluate_task
from worker_gpu.device import choose_compute, choose_device
from worker_gpu.service import Service
from worker_gpu.weights.store import WeightStore

COMPUTE = choose_compute(choose_device())


@dataclass(frozen=True)
class Guarantee:
    """What an engine guarantees for W·x, for the int8 matrix W [n, K]: how it quantizes x, and the largest
    error of each row.
    """

    bound: Callable[[torch.Tensor], OperandBound]
    bits: int | None
    error: Callable[[torch.Tensor], torch.Tensor]


def _bound(matrix: torch.Tensor) -> OperandBound:
    return operand_bound(norms_of(matrix)[0], len(matrix))


def _rlwe_error(matrix: torch.Tensor) -> torch.Tensor:
    return OPERAND_ERROR * matrix.to(torch.int64).abs().sum(1) + int(RESULT_ERROR) + 1


def _exact(matrix: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(matrix), dtype=torch.int64)


GUARANTEES: Mapping[str, Guarantee] = MappingProxyType(
    {
        "rlwe": Guarantee(_bound, None, _rlwe_error),
        "concrete": Guarantee(lambda matrix: OperandBound(LARGEST_ENTRY, 0.0), 8, _exact),
        "clear": Guarantee(_bound, None, _exact),
    }
)


def open_checked(sealed: Sealed, parts: Sequence[Part]) -> torch.Tensor:
    """What `sealed` opens to, after checking each of `parts`."""
    for part in parts:
        sealed.opening.check(part)
    return sealed.opening.open()


class EngineHarness:
    """A checkpoint of the given matrices, its plan, a worker that serves it, and a job of one engine."""

    def __init__(
        self, engine: str, weights: Mapping[str, torch.Tensor], folder: Path, *, rows: int = 16
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
        self.verification = Verification(
            {
                key: kept
                for group in self.plan.groups
                for key, kept in kept_rows(group, self.matrices[group.name]).items()
            },
            self.weights,
            rows,
        )
        self.hints = HintStore(folder / "hints")
        self.sealer = self.new_sealer()
        self.channel = InProcessChannel(self.evaluate, self._prepare)
        self.channel.prepare(
            self.plan.model, engine, self.plan.to_bytes(), self.plan.digest, self.sealer.setup
        )
        if engine == "rlwe":
            make_hints(self.hints, self.plan, self.channel, self.weights, ignore_progress)

    def _prepare(self, task: PrepareTask, plan: bytes) -> None:
        self.prepared = task
        self.service.prepare(task, lambda: plan)

    def new_sealer(self, bits: int | None = None) -> Sealer:
        """The client half of another job, with its own keys."""
        return client_engine(self.name).open(self.plan, JobOptions(self.verification, bits, self.hints))

    def weights(self, product: Product) -> torch.Tensor:
        """W, int8 [n, K]."""
        return self.matrix(product.group.name, product.direction)

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
        """By how much entries of y exceed the guaranteed error, [T, n]: 0 where the guarantee is kept."""
        w = self.matrix(name, direction)
        guarantee = GUARANTEES[self.name]
        operand = quantize_operand(x, guarantee.bound(w), guarantee.bits)
        exact = operand.values.to(torch.int64) @ w.to(torch.int64).t()
        scales = operand.scales.to(torch.float64)
        got = y.to(torch.float64) / scales[:, None]
        # float32 carries 24 bits of a result and of its scale.
        slack = exact.abs().to(torch.float64) * 2.0**-22 + 0.01
        error = (got - exact.to(torch.float64)).abs()
        return (error - guarantee.error(w) - slack).clamp_min(0)
