"""Linears whose frozen product runs on a worker, as the client's model holds them.

forward   y  = x·Wᵀ + adapter + bias          x·Wᵀ on the worker
backward  dx = dy·W + that of the adapter     dy·W on the worker, the gradients of a group side by side
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from itertools import chain
from typing import Protocol

import torch
from torch import nn

from hetrain.nn.lora_branches import Branches, LoraBranch
from hetrain.nn.loss import PullBack
from hetrain.public.errors import ResultRejected, UnsupportedArchitecture
from hetrain.public.lattice.parameters import SLOTS
from hetrain.public.model.quantization import Scales
from hetrain.public.protocol.plan import Group
from hetrain.public.protocol.product import Part, Product
from hetrain.public.system import flush_denormals
from hetrain.secret.engine import Sealed, Sealer
from hetrain.transport.channel import Channel, Reply

MOST_REMOTE_LOGITS = 1 << 27


@dataclass
class ProductStats:
    """What one replica's remote products have cost since the last `reset`: seconds, bytes, and on what.

    `wait_s` includes `verify_s`. `products` counts those that were verified and opened, `rejected` results
    that were refused, of `rejected_workers`. `workers` maps those that computed to the seconds of it.
    """

    encrypt_s: float = 0.0
    wait_s: float = 0.0
    verify_s: float = 0.0
    decrypt_s: float = 0.0
    server_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    products: int = 0
    rejected: int = 0
    rejected_workers: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    workers: Mapping[str, float] = field(default_factory=dict)

    def reset(self) -> None:
        """Sets all to zero."""
        for each in fields(self):
            setattr(self, each.name, {} if each.default is MISSING else each.default)

    def add(self, reply: Reply) -> None:
        """Counts one verified reply: its bytes, seconds of computing, devices and workers."""
        self.products += 1
        self.server_s += reply.server_s
        self.bytes_up += reply.bytes_up
        self.bytes_down += reply.bytes_down
        self.devices = tuple(sorted({*self.devices, *reply.devices}))
        workers = dict(self.workers)  # a new one: copies of these figures share the old
        for part in reply.parts:
            workers[part.worker] = workers.get(part.worker, 0.0) + part.seconds
        self.workers = workers


@dataclass(frozen=True, eq=False)
class Multiplication:
    """An operand and what it is multiplied by: Y = ((X·diag(c))·Wᵀ)·diag(s).

    Attributes:
        product: the matrix and its direction.
        x: [T, K], T ≤ 2048.
        channels: s and c; None: all are one.
    """

    product: Product
    x: torch.Tensor
    channels: Scales | None = None


@dataclass
class RemoteMatmul:
    """Multiplies by outsourced matrices over one channel, and keeps count.

    Attributes:
        channel: the way to the workers.
        sealer: that of the micro-batch at hand.
        stats: the count.
    """

    channel: Channel
    sealer: Sealer
    stats: ProductStats

    def multiply(self, product: Product, x: torch.Tensor, channels: Scales | None = None) -> torch.Tensor:
        """Y = ((X·diag(c))·Wᵀ)·diag(s), float32 [T, n] on the CPU; see `Multiplication`.

        Every 2048 of the T tokens travel as one ciphertext.
        """
        # The recorder of cheap operations would note hundreds of calls here that it cannot use.
        with torch._C.DisableTorchFunction():
            blocks = (Multiplication(product, block, channels) for block in x.split(SLOTS))
            results = list(self.multiply_each(blocks))
            return results[0] if len(results) == 1 else torch.cat(results)

    def multiply_each(self, operands: Iterable[Multiplication]) -> Iterator[torch.Tensor]:
        """The products one after the other: each operand is sealed while the one before it is away."""
        remaining = iter(operands)
        first, second = next(remaining), next(remaining, None)
        if second is None:
            yield self._open(*self._exchange(*self._seal(first)))
            return
        with ThreadPoolExecutor(1, "remote-matmul", flush_denormals) as thread:
            away = thread.submit(self._exchange, *self._seal(first))
            for each in chain((second,), remaining):
                sealed = self._seal(each)
                opened = self._open(*away.result())
                away = thread.submit(self._exchange, *sealed)
                yield opened
            yield self._open(*away.result())

    def _seal(self, each: Multiplication) -> tuple[Sealed, Product]:
        begin = time.perf_counter()
        sealed = self.sealer.seal(each.x, each.product, each.channels)
        self.stats.encrypt_s += time.perf_counter() - begin
        return sealed, each.product

    def _exchange(self, sealed: Sealed, product: Product) -> tuple[Sealed, Reply]:
        begin = time.perf_counter()
        reply = self.channel.multiply(product, sealed.operand, partial(self._check, sealed))
        self.stats.wait_s += time.perf_counter() - begin
        return sealed, reply

    def _check(self, sealed: Sealed, part: Part) -> None:
        begin = time.perf_counter()
        try:
            sealed.opening.check(part)
        except ResultRejected as error:
            self.stats.rejected += 1
            self.stats.rejected_workers = tuple(sorted({*self.stats.rejected_workers, *error.workers}))
            raise
        finally:
            self.stats.verify_s += time.perf_counter() - begin

    def _open(self, sealed: Sealed, reply: Reply) -> torch.Tensor:
        begin = time.perf_counter()
        y = sealed.opening.open()
        self.stats.decrypt_s += time.perf_counter() - begin
        self.stats.add(reply)
        return y


class _GroupProduct(torch.autograd.Function):
    """(y_1, ..., y_m) = split(((x·diag(c))·Qᵀ)·diag(s)); dx = ((cat(dy_i)·diag(s))·Q)·diag(c).

    `LoraBranch`es are added to both.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: torch.Tensor, group: RemoteGroup, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        y = group.matmul.multiply(Product(group.group, "forward"), flat, group.scales).to(x.device)
        ctx.group, ctx.branches = group, None
        if group.branches:
            ctx.branches = Branches(group.branches)
            ctx.save_for_backward(x, ctx.branches.add(y, flat))
        ctx.shape = x.shape
        return tuple(part.view(*x.shape[:-1], -1) for part in y.split(group.widths, dim=1))

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[no-untyped-def]
        group, branches, found = ctx.group, ctx.branches, []
        dy = _side_by_side([each.reshape(-1, each.shape[-1]) for each in gradients])
        if branches is not None:
            x, h = ctx.saved_tensors
            g, found = branches.gradients(dy, x.reshape(len(dy), -1), h)
            del x
        if not ctx.needs_input_grad[0]:
            return None, None, *found
        dx = group.matmul.multiply(Product(group.group, "backward"), dy, group.scales.transposed).to(
            dy.device
        )
        if branches is not None:
            branches.add_input_gradient(dx, g)
        return dx.view(ctx.shape), None, *found


def _side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    """Matrices [T, n_i] as one [T, Σ n_i]; not copied where they are its columns already, as a gate's are."""
    first, width = parts[0], sum(part.shape[1] for part in parts)
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for part in parts:
        place = (part.untyped_storage().data_ptr(), part.storage_offset(), part.stride())
        if place != (storage, offset, (width, 1)):
            return torch.cat(parts, dim=1)
        offset += part.shape[1]
    return first.as_strided((len(first), width), (width, 1))


class RemoteGroup:
    """The linears of one group in one replica: the first to be called evaluates for all.

    Args:
        group: of the plan.
        scales: of its int8 matrix.
        matmul: the way to the workers.
        branches: the adapters of those linears that have one.
    """

    def __init__(
        self, group: Group, scales: Scales, matmul: RemoteMatmul, branches: Sequence[LoraBranch] = ()
    ) -> None:
        self.group = group
        self.scales = scales
        self.matmul = matmul
        self.branches = tuple(branches)
        self.widths = [member.out_features for member in group.members]
        self._parameters = [value for branch in self.branches for value in (branch.a, branch.b)]
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    def output(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Member `index` of the product of x; the others are kept until asked for with the same x."""
        if self._input is not x or index not in self._outputs:
            self._input = x
            self._outputs = dict(enumerate(_GroupProduct.apply(x, self, *self._parameters)))  # type: ignore[no-untyped-call]
        y = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return y


class LinearGroup(Protocol):
    """Evaluates the product of a `RemoteLinear`, together with those of others or alone."""

    def output(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """What linear `index` makes of x, without bias."""
        ...


class RemoteLinear(nn.Linear):
    """A linear without its matrix. A subclass of `nn.Linear`, so that peft wraps it as one.

    `weight` has the right shape and the storage of one number. `bias`, if any, is real and stays here.
    `is_past_attention` says whether no attention comes after it or those that share its input.
    """

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(1, 1).expand(out_features, in_features), requires_grad=False)
        self.register_parameter("bias", bias)
        self.group: LinearGroup | None = None
        self.index = 0
        self.is_past_attention = False

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RemoteLinear:
        # Moving an expanded tensor would materialise the matrix that must not be here.
        del self._parameters["weight"]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        expanded = fn(torch.zeros(1, 1)).expand(self.out_features, self.in_features)
        self.weight = nn.Parameter(expanded, requires_grad=False)
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x·Wᵀ + bias."""
        if self.group is None:
            raise UnsupportedArchitecture("this linear belongs to no group", where=repr(self))
        y = self.group.output(input, self.index)
        return y if self.bias is None else y + self.bias


class RemoteHead:
    """The output head, evaluated by workers slice by slice: see `hetrain.nn.loss.Projection`.

    z_i = h·W_iᵀ + b_i          dh = Σ_i dz_i·W_i

    Args:
        groups: slices of the head, in order.
        scales: of their int8 matrices, by group.
        matmul: the way to the workers.
        bias: b [V], if there is one.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        scales: Mapping[str, Scales],
        matmul: RemoteMatmul,
        bias: torch.Tensor | None,
    ) -> None:
        self._groups = groups
        self._scales = scales
        self._matmul = matmul
        self._bias = bias

    @property
    def most_tokens(self) -> int:
        """As many as have 2^27 logits, and no more than a ciphertext has."""
        vocabulary = sum(group.out_features for group in self._groups)
        return min(max(MOST_REMOTE_LOGITS // vocabulary, 1), SLOTS)

    def __call__(self, hidden: torch.Tensor) -> tuple[Iterator[torch.Tensor], PullBack]:
        """Slices of the logits of hidden states [n, H], n ≤ 2048, and the way back."""
        return self._logits(hidden), self._input_gradient

    def _logits(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        operands = (
            Multiplication(Product(group, "forward"), hidden, self._scales[group.name])
            for group in self._groups
        )
        products, first = self._matmul.multiply_each(operands), 0
        for group, y in zip(self._groups, products, strict=True):
            y = y.to(hidden.device)
            if self._bias is not None:
                y += self._bias[first : first + group.out_features]
            first += group.out_features
            yield y

    def _input_gradient(self, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        operands = (
            Multiplication(Product(group, "backward"), gradient, self._scales[group.name].transposed)
            for group, gradient in zip(self._groups, gradients, strict=True)
        )
        products = self._matmul.multiply_each(operands)
        total = next(products)
        for each in products:
            total += each
        return total
