"""Replicas: several micro-batches in flight, each on a copy of the adapter, all on one set of weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel

from hetrain.nn.attention import RowLayout
from hetrain.nn.dropout import SeededDropout
from hetrain.nn.lora import adapter_parameters, take_branch
from hetrain.nn.loss import LocalHead, OutputHead, summed_loss
from hetrain.nn.memory.saved_tensors import HalfSaver
from hetrain.nn.predicting import PredictingGroup, PredictingTokens
from hetrain.nn.prefix import FrozenPrefix, PrefixStore
from hetrain.nn.remote import ProductStats, RemoteGroup, RemoteHead, RemoteLinear, RemoteMatmul
from hetrain.nn.split import SplitModel
from hetrain.nn.trial_run import hidden_states
from hetrain.secret.engine import Sealer
from hetrain.transport.channel import Channel


class Replica:
    """One micro-batch's view of the model. Not thread-safe: a replica serves one thread at a time.

    Args:
        split: the model without what leaves it.
        model: with the adapter that is copied.
        channel: the way to the workers.
        sealer: encrypts operands.
        prefixes: keeps what lies below the adapters; None: nothing is kept.
        activation_memory: bytes of activations that stay in memory; None: all.
    """

    def __init__(
        self,
        split: SplitModel,
        model: PeftModel,
        channel: Channel,
        sealer: Sealer,
        prefixes: PrefixStore | None = None,
        activation_memory: int | None = None,
    ) -> None:
        self.stats = ProductStats()
        self.model = _share_frozen_copy(model)
        self.parameters = adapter_parameters(self.model)
        self._causal = self.model.get_base_model()
        self._device = next(iter(self._causal.get_output_embeddings().parameters())).device
        self._saver = HalfSaver(self.model.parameters(), activation_memory)
        self._dropouts = [m for m in self.model.modules() if isinstance(m, SeededDropout)]
        self._prefix = None if prefixes is None else FrozenPrefix(self._causal, prefixes)
        self._sealer = sealer
        self._matmul = RemoteMatmul(channel, sealer, self.stats)
        self._head = OutputHead.of(self._causal, self._projection(split))
        self._predicting = PredictingTokens()
        self._bind(split, self._matmul)

    def load(self, snapshot: Mapping[str, torch.Tensor]) -> None:
        """Copies adapter values into this replica."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(snapshot[name])

    def seed_dropout(self, seed: int | None) -> None:
        """Makes LoRA dropout a function of `seed`; None turns it off."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for dropout in self._dropouts:
            dropout.generator = generator

    def summed_loss(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        places: Sequence[torch.Tensor],
        targets: torch.Tensor,
        rows: Sequence[int] = (),
    ) -> torch.Tensor:
        """Σ −log p(target) over the supervised tokens of packed rows.

        Args:
            tokens: int64 [T]; `positions` [T] restart at each row.
            places: for each row int64 [L], which of the T tokens it has; rows may share their first ones.
            targets: int64 [Σ L] for the tokens of each row, -100 where unsupervised.
            rows: numbers of the rows, by which their frozen prefix is kept; none: it is not.
        """
        if self._prefix is not None:
            self._prefix.start(rows, places)
        self._matmul.sealer = self._sealer.for_micro_batch()
        counts = targets >= 0
        predicting = torch.cat(list(places))[counts].to(self._device)
        self._predicting.start(predicting)
        layout = RowLayout.of(places, self._device)
        with self._saver.saving():
            states = hidden_states(
                self._causal, tokens[None].to(self._device), positions[None].to(self._device), layout
            )
        states = states[0].index_select(0, predicting)
        return summed_loss(states, targets[counts].to(self._device), self._head)

    def take_gradients(self) -> dict[str, torch.Tensor]:
        """The adapter's gradients by name, removed from the replica; zeros where there is none."""
        gradients = {}
        for name, parameter in self.parameters.items():
            gradients[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
        return gradients

    def _projection(self, split: SplitModel) -> RemoteHead | LocalHead:
        """To logits, by workers where the plan has the output head."""
        head = self._causal.get_output_embeddings()
        return (
            RemoteHead(split.head, split.scales, self._matmul, head.bias) if split.head else LocalHead(head)
        )

    def _bind(self, split: SplitModel, matmul: RemoteMatmul) -> None:
        """Gives every `RemoteLinear` its group, and the group the adapters of its linears."""
        for group in split.block_groups:
            branches, end = [], 0
            linears = [self._causal.get_submodule(member.module) for member in group.members]
            for linear, member in zip(linears, group.members, strict=True):
                branch = take_branch(linear, slice(end, end := end + member.out_features))
                branches += [] if branch is None else [branch]
            bound = RemoteGroup(group, split.scales[group.name], matmul, branches)
            narrow = PredictingGroup(bound, len(linears), self._predicting)
            for index, linear in enumerate(linears):
                remote = getattr(linear, "base_layer", linear)
                assert isinstance(remote, RemoteLinear)
                remote.group, remote.index = narrow if remote.is_past_attention else bound, index


def _share_frozen_copy(model: PeftModel) -> PeftModel:
    """A deep copy in which all that is frozen is the very same tensor."""
    shared = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
