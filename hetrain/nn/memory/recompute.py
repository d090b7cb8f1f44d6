"""What autograd saves but need not: results of cheap operations on what it saves anyway.

For its gradients it keeps the gate of an MLP, SiLU of that gate, and the product of both branches; a residual
stream, and its norm. All but the first of each follow from the others in a pass or two over memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hetrain.nn.fused import gated_gelu, gated_silu, rms_norm

_MOST_OPERATIONS = 8

# Deterministic, and bound by memory rather than by arithmetic.
_CHEAP: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.mul,
        torch.Tensor.mul,
        torch.add,
        torch.Tensor.add,
        torch.Tensor.div,
        functional.silu,
        functional.gelu,
        functional.relu,
        functional.layer_norm,
        functional.rms_norm,
        rms_norm,
        gated_silu,
        gated_gelu,
        torch.Tensor.index_select,
        torch.cat,
    }
)

Sizes = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where values lie, and which: two tensors at one place hold the same numbers in the same order.

    Attributes:
        storage: address of the storage; a `StorageWeakRef` keeps it from being given away.
        offset: of the first value.
        count: how many values.
        version: how often the storage has been written to.
        layout: shape and strides when the values do not lie side by side, else None.
    """

    storage: int
    offset: int
    count: int
    version: int
    layout: tuple[Sizes, Sizes] | None

    @staticmethod
    def of(tensor: torch.Tensor, reference: StorageWeakRef) -> Place:
        """The place of a tensor whose storage `reference` refers to."""
        layout = None if is_dense(tensor) else (tuple(tensor.shape), tensor.stride())
        return Place(reference.cdata, int(tensor.storage_offset()), tensor.numel(), tensor._version, layout)


class Source(Protocol):
    """The values of one place, to be had again later."""

    @property
    def operations(self) -> int:
        """How many it takes to compute them."""
        ...

    def restore(self) -> torch.Tensor:
        """The values in their order in memory, float32 [count]."""
        ...


@dataclass(frozen=True, eq=False)
class View:
    """A tensor over the values of a source."""

    source: Source
    shape: Sizes
    stride: Sizes

    def restore(self) -> torch.Tensor:
        """The tensor."""
        return self.source.restore().as_strided(self.shape, self.stride)


@dataclass(frozen=True, eq=False)
class Recipe:
    """function(*arguments, **keywords), with a `View` for every tensor that is restored first."""

    function: Callable[..., torch.Tensor]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    stride: Sizes
    operations: int

    def restore(self) -> torch.Tensor:
        """Computes the values."""
        arguments = (_map(View, View.restore, argument) for argument in self.arguments)
        result = self.function(*arguments, **self.keywords)
        if result.stride() != self.stride:
            result = torch.empty_strided(result.shape, self.stride, device=result.device).copy_(result)
        return result.as_strided((result.numel(),), (1,))


@dataclass(frozen=True, eq=False)
class _Operand:
    """Stands for a tensor in a note, without keeping it alive."""

    place: Place
    reference: StorageWeakRef
    shape: Sizes
    stride: Sizes


@dataclass(frozen=True, eq=False)
class _Note:
    function: Callable[..., torch.Tensor]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    result: StorageWeakRef
    stride: Sizes


class Recorder(TorchFunctionMode):
    """While entered, notes in this thread how results of cheap operations come about.

    Args:
        is_large: whether a tensor is one that would be saved in a form of its own. Others may be kept as they
            are.
    """

    def __init__(self, is_large: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self._is_large = is_large
        self._notes: dict[Place, _Note] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _CHEAP and torch.is_grad_enabled() and self._is_large(result):
            self._note(func, args, kwargs or {}, result)
        return result

    def recipe(self, place: Place, find: Callable[[Place], Source | None]) -> Recipe | None:
        """How to compute the values at `place` from what `find` knows; None if that does not suffice."""
        note = self._notes.get(place)
        if note is None:
            return None
        operations, missing = 1, False

        def view(operand: _Operand) -> View | None:
            nonlocal operations, missing
            source = None if missing else find(operand.place)
            if source is None:
                missing = True
                return None
            operations += source.operations
            return View(source, operand.shape, operand.stride)

        arguments = tuple(_map(_Operand, view, argument) for argument in note.arguments)
        if missing or operations > _MOST_OPERATIONS:
            return None
        return Recipe(note.function, arguments, note.keywords, note.stride, operations)

    def clear(self) -> None:
        """Forgets everything."""
        self._notes.clear()

    def _note(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        keywords: Mapping[str, Any],
        result: torch.Tensor,
    ) -> None:
        if not is_dense(result) or any(self._is_large(value) for value in keywords.values()):
            return
        reference = StorageWeakRef(result.untyped_storage())
        operands = tuple(_map(torch.Tensor, self._operand, argument) for argument in arguments)
        note = _Note(function, operands, keywords, reference, result.stride())
        self._notes[Place.of(result, reference)] = note

    def _operand(self, tensor: torch.Tensor) -> _Operand | torch.Tensor:
        if not self._is_large(tensor):
            return tensor.detach()
        reference = StorageWeakRef(tensor.untyped_storage())
        return _Operand(Place.of(tensor, reference), reference, tuple(tensor.shape), strides_of(tensor))


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the values lie side by side, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def strides_of(tensor: torch.Tensor) -> Sizes:
    """Strides that give values that lie side by side the tensor's shape: its own, or else those of a copy."""
    return tensor.stride() if is_dense(tensor) else torch.empty(tensor.shape, device="meta").stride()


def _map(kind: type[T], function: Callable[[T], object], argument: Any) -> Any:
    """`argument` after `function`, if it is of `kind`, or its elements if it is a list or tuple of such."""
    if isinstance(argument, kind):
        return function(argument)
    if isinstance(argument, list | tuple):
        return type(argument)(_map(kind, function, each) for each in argument)
    return argument
