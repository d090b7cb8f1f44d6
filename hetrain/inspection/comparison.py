"""A planned job over a link, beside the same training on this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hetrain.config import MEASURED, ComparisonConfig, TrainingConfig
from hetrain.data.updates import Course
from hetrain.inspection.choice import Judgement, choose
from hetrain.inspection.estimate import Estimate, Link, MachineCosts, Memory, Rates, Work, estimate
from hetrain.inspection.link import measure_link
from hetrain.inspection.local_probe import Probe, free_memory, probe
from hetrain.nn.loss import MOST_LOGITS, MOST_TOKENS
from hetrain.nn.remote import MOST_REMOTE_LOGITS
from hetrain.public.errors import ModelError, UsageError
from hetrain.public.lattice.parameters import SLOTS, parameters_for
from hetrain.public.lattice.result_format import ResultFormat
from hetrain.public.model.files import ModelFiles
from hetrain.public.protocol.plan import Group
from hetrain.public.system import available_cores
from hetrain.secret.verification.rows import KEPT_ROWS

_log = logging.getLogger(__name__)

WITHOUT_DATA = 1_000_000
"""Tokens that are compared where there is no data set."""
_ROW_TOKENS = 256
_PROCESS_BYTES = 600e6
_FORMAT = ResultFormat(parameters_for(SLOTS))


@dataclass(frozen=True)
class ModelFacts:
    """A model in figures.

    Attributes:
        parameters: all of them.
        linear_weights: of these, weights of the decoder blocks' linears, outsourced or not.
        vocabulary: rows of the output head.
        stored_bytes: of a number of embeddings and output head.
        head: name of the output head.
        head_weights: its numbers; 0 if they are those of the embeddings.
    """

    parameters: int
    linear_weights: int
    vocabulary: int
    stored_bytes: int
    head: str = ""
    head_weights: int = 0

    def is_head(self, group: Group) -> bool:
        """Whether the group is a slice of the output head."""
        return group.members[0].module == self.head


@dataclass(frozen=True)
class Comparison:
    """A job over a link and the same training here.

    Attributes:
        tokens: of the job, or a million without a data set.
        link: the way to the broker.
        link_measured: whether it was measured rather than given.
        bytes_up: that the client sends in all; the estimate has what it fetches.
        rates: what is assumed of workers and egress.
        cores: of this machine.
        probe: this machine, measured; None where it was not.
        costs: processor seconds of a token; None without `probe`.
        memory: bytes; None without `probe`.
        estimate: the job in hours, and what to do.
        note: why this machine was not measured; empty if it was.
    """

    tokens: int
    link: Link
    link_measured: bool
    bytes_up: float
    rates: Rates
    cores: int
    probe: Probe | None = field(repr=False)
    costs: MachineCosts | None
    memory: Memory | None
    estimate: Estimate
    note: str


@dataclass(frozen=True)
class Surroundings:
    """All that groups are judged by. Made once, it compares as many choices as needed.

    Attributes:
        facts: the model.
        training: its micro-batches.
        tokens: that the job computes.
        row_tokens: of the rows, for each of these: more than one where rows share a prompt.
        link: to the broker.
        link_measured: whether it was measured.
        rates: what is assumed.
        probe: this machine, measured.
        limit: bytes that there are.
        note: why there is no probe.
    """

    facts: ModelFacts
    training: TrainingConfig
    tokens: int
    row_tokens: float
    link: Link
    link_measured: bool
    rates: Rates
    probe: Probe | None
    limit: float
    note: str = ""

    def compare(self, groups: Sequence[Group]) -> Comparison:
        """The job in which `groups` leave."""
        work = self._work(groups)
        costs = memory = None
        if self.probe is not None:
            costs, memory = self._costs(self.probe, groups, work), self._memory(self.probe, groups)
        return Comparison(
            tokens=self.tokens,
            link=self.link,
            link_measured=self.link_measured,
            bytes_up=work.bytes_up * work.tokens,
            rates=self.rates,
            cores=available_cores(),
            probe=self.probe,
            costs=costs,
            memory=memory,
            estimate=estimate(work, self.link, self.rates, costs, memory),
            note=self.note,
        )

    def choose(self, groups: Sequence[Group]) -> tuple[Group, ...]:
        """The groups that pay: see `hetrain.inspection.choice.choose`.

        Raises:
            UsageError: this machine was not measured.
        """
        if self.probe is None:
            raise UsageError(
                f"auto needs a measurement of this machine{f', but {self.note}' if self.note else ''}",
                field="outsource",
                hint="name the groups yourself, or leave `probe` on",
            )

        def judge(chosen: tuple[Group, ...]) -> Judgement:
            found = self.compare(chosen)
            assert found.memory is not None
            return Judgement(found.estimate.job_s, found.memory.client)

        return choose(groups, judge, self.limit)

    def _inside(self, groups: Sequence[Group]) -> list[Group]:
        """Those of the decoder's blocks."""
        return [group for group in groups if not self.facts.is_head(group)]

    def _work(self, groups: Sequence[Group]) -> Work:
        fill, tokens = _fill(self.training.tokens_per_micro_batch), self.training.tokens_per_micro_batch
        shapes = [(group.in_features, group.out_features) for group in groups]
        both = [pair for k, n in shapes for pair in ((k, n), (n, k))]
        return Work(
            tokens=self.tokens,
            bytes_up=fill * sum(_FORMAT.operand_bytes(k) for k, _ in both) / SLOTS,
            bytes_down=fill * sum(_FORMAT.result_bytes(n) for _, n in both) / SLOTS,
            weights=count_weights(groups),
            products=len(both),
            micro_batches=self.tokens / tokens,
            at_once=self.training.replicas,
        )

    def _costs(self, measured: Probe, groups: Sequence[Group], work: Work) -> MachineCosts:
        """Client: blocks without products, head or loss, linears that stayed, values and bytes of others.

        Of a shared prompt local training computes each row's tokens, and so do both heads.
        """
        crypto, values = measured.crypto, _values(groups) * _fill(self.training.tokens_per_micro_batch)
        kept = self.facts.linear_weights - count_weights(self._inside(groups))
        leaves = len(self._inside(groups)) < len(groups)
        client_s = (
            measured.layers * measured.client_block_s
            + self.row_tokens * (measured.client_softmax_s if leaves else measured.client_head_s)
            + kept * measured.weight_s
            + values * (crypto.seal_s + crypto.open_s)
            + (work.bytes_up + work.bytes_down) * crypto.byte_s
        )
        local_s = self.row_tokens * (measured.layers * measured.local_block_s + measured.local_head_s)
        return MachineCosts(client_s, local_s, available_cores())

    def _memory(self, measured: Probe, groups: Sequence[Group]) -> Memory:
        """With T tokens a micro-batch, V words, L blocks and r micro-batches at once:

        client    stored·(embeddings, head, norms) + 4·(linears that stayed)
                  + min(r·T·L·(saved), `activation_memory`)
                  + r·2048·(11·k + 8·n) of the largest product + 5·rows·Σ(K + n) of verification
                  + logits: 8·min(256·V, 2^26), or r·4·min(T·V, 2^27) of an outsourced head + the process
        local     4·(all parameters) + T·(L·(saved) + 12·V) + the process

        `saved` is what a block keeps of a token for its backward pass. Buffers that the allocator does not
        give back are not counted; they may be half as much again.
        """
        facts, tokens, at_once = self.facts, self.training.tokens_per_micro_batch, self.training.replicas
        inside = self._inside(groups)
        leaves = len(inside) < len(groups)
        logits = 8 * min(MOST_TOKENS * facts.vocabulary, MOST_LOGITS)
        if leaves:
            logits = at_once * 4 * min(tokens * facts.vocabulary, MOST_REMOTE_LOGITS)
        wide = [(group.in_features, group.out_features) for group in groups]
        largest = max((11 * max(pair) + 8 * min(pair) for pair in wide), default=0)
        client = (
            facts.stored_bytes * (facts.parameters - facts.linear_weights - leaves * facts.head_weights)
            + 4 * (facts.linear_weights - count_weights(inside))
            + min(at_once * tokens * measured.layers * measured.client_saved, self.training.activation_memory)
            + at_once * SLOTS * largest
            + 5 * KEPT_ROWS * _values(groups)
            + logits
        )
        local = 4 * facts.parameters + tokens * (
            measured.layers * measured.local_saved + 12 * facts.vocabulary
        )
        return Memory(client + _PROCESS_BYTES, local + _PROCESS_BYTES, self.limit)


def survey(
    files: ModelFiles,
    facts: ModelFacts,
    config: ComparisonConfig,
    training: TrainingConfig,
    course: Course | None,
    workers: str | None,
) -> Surroundings:
    """Measures what `config` asks for: the link, and this machine.

    Raises:
        UsageError: the link is to be measured, and no broker is given.
        BrokerError: the broker cannot be reached, or is full.
    """
    limit = float(config.client_memory or free_memory())  # before the probe, which takes some of it
    link = _link(config, workers)
    measured, note = _probe(files, config, training, course)
    return Surroundings(
        facts=facts,
        training=training,
        tokens=WITHOUT_DATA if course is None else course.tokens,
        row_tokens=1.0 if course is None or not course.rows else course.row_tokens / course.epoch_tokens,
        link=link,
        link_measured=config.link == MEASURED,
        rates=Rates(1e12 * config.worker_speed, config.egress_price),
        probe=measured,
        limit=limit,
        note=note,
    )


def _link(config: ComparisonConfig, workers: str | None) -> Link:
    if config.bits_per_s is not None:
        return Link(config.bits_per_s, (config.round_trip_ms or 0.0) / 1000)
    if workers is None:
        raise UsageError(
            "there is no broker to measure it against",
            field="link",
            hint="give `workers`, or a rate as 1gbit",
        )
    found = measure_link(workers)
    return found if config.round_trip_ms is None else Link(found.bits_per_s, config.round_trip_ms / 1000)


def _probe(
    files: ModelFiles, config: ComparisonConfig, training: TrainingConfig, course: Course | None
) -> tuple[Probe | None, str]:
    """This machine, or why it was not measured."""
    if not config.probes:
        return None, ""
    _log.info("measuring this machine for about 20 seconds")
    row = _ROW_TOKENS if course is None or not course.rows else course.row_tokens // course.rows
    try:
        return probe(files, max(min(row, training.longest_row), 1), training.tokens_per_micro_batch), ""
    except ModelError as error:
        return None, str(error)


def _fill(tokens: int) -> float:
    """Slots that travel for each token: rings have 256, 512, 1024 or 2048, and need not be full."""
    whole, rest = divmod(tokens, SLOTS)
    return (whole * SLOTS + (parameters_for(rest).ring_degree if rest else 0)) / tokens


def count_weights(groups: Iterable[Group]) -> int:
    """Numbers in the groups' matrices."""
    return sum(group.in_features * group.out_features for group in groups)


def _values(groups: Sequence[Group]) -> int:
    """Values up for a token in both passes, and as many down."""
    return sum(group.in_features + group.out_features for group in groups)
