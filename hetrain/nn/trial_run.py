"""A trial of a split model on a few tokens: which linears share an input, and whether splitting is faithful.

The outsourced matrices are not there, so their linears return features of their input, picked at random but
always the same ones, and so does an outsourced output head; the client's own linears compute their products.
So the model must give the same logits twice: from packed rows, as training runs it, and from each row alone,
with the original attention, positions, norms, gates and output head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from hetrain.nn.attention import OnAttention, RowLayout, end_to_end, packed_rows
from hetrain.nn.families import OWN_ATTENTION
from hetrain.nn.fused import as_in_transformers
from hetrain.nn.loss import plain_logits
from hetrain.nn.remote import RemoteLinear
from hetrain.public.errors import UnsupportedArchitecture

_ROWS = (7, 4, 5)
_TOLERANCE = 1e-3


class InputTracer:
    """The group of all linears of a trial: records their inputs, and returns features of these."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, torch.Tensor]] = []
        self.before_attention: list[int] = []
        self._features: dict[int, torch.Tensor] = {}

    def attach(self, index: int, linear: RemoteLinear) -> None:
        """Records calls of `linear` under `index`."""
        linear.group, linear.index = self, index
        generator = torch.Generator().manual_seed(index)
        self._features[index] = torch.randint(linear.in_features, (linear.out_features,), generator=generator)

    def output(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Features of x, as many as the linear has outputs. Keeps x alive: identity tells inputs apart."""
        self.calls.append((index, x))
        return x.index_select(-1, self._features[index])

    def note_attention(self) -> None:
        """Says that all calls so far come before an attention."""
        self.before_attention = [index for index, _ in self.calls]

    def groups(self) -> list[list[int]]:
        """Indices that were called with the very same tensor, in order of first call."""
        found: dict[int, list[int]] = {}
        for index, x in self.calls:
            found.setdefault(id(x), []).append(index)
        return list(found.values())


def hidden_states(
    causal: PreTrainedModel,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    layout: RowLayout,
    on_attention: OnAttention = lambda: None,
) -> torch.Tensor:
    """The decoder's last hidden states [1, T, hidden] for packed rows; tokens and positions int64 [1, T]."""
    with packed_rows(layout, on_attention):
        output = causal.base_model(
            input_ids=tokens, position_ids=positions, use_cache=False, return_dict=True
        )
    states: torch.Tensor = output.last_hidden_state
    return states


def shared_inputs(causal: PreTrainedModel, remotes: Mapping[str, RemoteLinear]) -> list[list[str]]:
    """Names of the linears that share an input, group by group in order of evaluation, the head left out.

    Those that are called after the last attention are marked so.

    Raises:
        UnsupportedArchitecture: the model cannot run on packed rows, or gives other logits there.
    """
    tracer, head = InputTracer(), causal.get_output_embeddings()
    names = [name for name, remote in remotes.items() if remote is not head]
    for index, remote in enumerate(remotes.values()):
        tracer.attach(index, remote)
    try:
        with torch.inference_mode():
            grouped = _try_out(causal, tracer, names)
    # An architecture that cannot be split may raise any of the errors of a wrong call.
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise UnsupportedArchitecture(
            f"a trial run on packed rows failed: {type(error).__name__}: {error}",
            where=type(causal.base_model).__name__,
        ) from error
    finally:
        for remote in remotes.values():
            remote.group = None
    before = {names[index] for index in tracer.before_attention}
    for members in grouped:
        for name in members:
            remotes[name].is_past_attention = before.isdisjoint(members)
    return grouped


def _try_out(causal: PreTrainedModel, tracer: InputTracer, names: list[str]) -> list[list[str]]:
    embeddings = causal.get_input_embeddings().weight.shape[0]
    tokens = 3 + torch.arange(sum(_ROWS))  # no two alike, and none that is likely to mean padding
    tokens = tokens[None] % embeddings
    positions = torch.cat([torch.arange(length) for length in _ROWS])[None]
    layout = RowLayout.of(end_to_end(_ROWS))
    packed = hidden_states(causal, tokens, positions, layout, tracer.note_attention)[0]
    groups = [[names[index] for index in members] for members in tracer.groups()]
    _require_one_call_each(names, [name for members in groups for name in members])
    if not any(getattr(module, "row_attention_seen", False) for module in causal.modules()):
        raise UnsupportedArchitecture(OWN_ATTENTION, where=type(causal.base_model).__name__)
    tracer.calls.clear()
    _require_same_logits(causal, tokens, plain_logits(causal, packed))
    return groups


def _require_one_call_each(names: list[str], calls: list[str]) -> None:
    for name in names:
        if calls.count(name) != 1:
            raise UnsupportedArchitecture(
                f"this linear is evaluated {calls.count(name)} times in a forward pass instead of once",
                where=name,
                hint="routed or shared layers cannot be split yet",
            )


def _require_same_logits(causal: PreTrainedModel, tokens: torch.Tensor, logits: torch.Tensor) -> None:
    expected = torch.cat([_original_logits(causal, row) for row in tokens.split(_ROWS, dim=1)])
    # What all tokens have in common would hide a difference between them.
    spread = (expected - expected.mean(dim=0)).norm()
    if logits.shape != expected.shape or not (logits - expected).norm() <= _TOLERANCE * spread:
        raise UnsupportedArchitecture(
            "packed rows give other logits than each row alone, so this architecture relates tokens, numbers "
            "positions or computes logits in a way of its own",
            where=type(causal).__name__,
        )


def _original_logits(causal: PreTrainedModel, row: torch.Tensor) -> torch.Tensor:
    config = causal.config
    ours, config._attn_implementation = config._attn_implementation, "eager"
    try:
        with as_in_transformers(causal):
            logits: torch.Tensor = causal(input_ids=row, use_cache=False, return_dict=True).logits[0]
        return logits.to(torch.float32)
    finally:
        config._attn_implementation = ours
