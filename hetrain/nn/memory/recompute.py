"""Decoder blocks that are computed again in the backward pass, and remote products that are not.

`torch.utils.checkpoint` keeps a block's input alone and runs the block again when its gradients are due. A
remote product must not be evaluated again, which would be a second message under another secret at twice the
cost: its result is kept, too. Torch's selective checkpointing keeps results as well, but in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hetrain.nn.memory.saved_tensors import Half, HalfSaver
from hetrain.public.allocator import release_freed_memory

Context = AbstractContextManager[None]


class RecomputedBlocks:
    """The blocks of one replica, from now on checkpointed where gradients are asked for.

    Args:
        blocks: modules whose `forward` is replaced.
        saver: keeps their inputs, while it is saving, and remote products.
        conditions: called when a block begins; returns the context in which it gives the same result again.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], saver: HalfSaver, conditions: Callable[[], Context]
    ) -> None:
        self._saver, self._conditions = saver, conditions
        self._phase: Literal["neither", "keeping", "recomputing"] = "neither"
        self._products: dict[str, torch.Tensor | Half] = {}
        for block in blocks:
            trainable = any(parameter.requires_grad for parameter in block.parameters())
            block.forward = partial(self._run, block.forward, trainable)

    def product(self, name: str, evaluate: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`evaluate()`; while a block is computed again, the result that `name` had."""
        if self._phase == "recomputing":
            return self._saver.unpack(self._products[name])
        y = evaluate()
        if self._phase == "keeping":
            packed = self._saver.pack(y)
            self._products[name] = y.clone() if packed is y else packed
        return y

    def _run(self, forward: Callable[..., Any], trainable: bool, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not (trainable or any(map(_needs_gradient, args))):
            return forward(*args, **kwargs)
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (self._in("keeping"), self._in("recomputing", self._conditions())),
            **kwargs,
        )

    @contextmanager
    def _in(
        self, phase: Literal["keeping", "recomputing"], conditions: Context | None = None
    ) -> Iterator[None]:
        self._phase = phase
        try:
            with conditions or nullcontext():
                yield
        finally:
            self._phase = "neither"
            release_freed_memory()


def _needs_gradient(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
