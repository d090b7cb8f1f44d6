"""The prompt that rows begin with: a system prompt, or the first words of every question.

With causal attention its hidden states are the same in each row, so a micro-batch computes them once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import takewhile

from hetrain.data.tokenization import Row

_LEAST_PART = 0.01


def shared_prompts(rows: Sequence[Row]) -> tuple[int, ...]:
    """How many of each row's first tokens are the data set's shared prompt: all of the prompt's, or none.

    That is the beginning which saves most tokens if every row that has it shares it: length · (rows − 1). A
    row goes on after it with at least one token. There is none where it saves less than a hundredth of all
    tokens, as chance alone does.
    """
    beginnings = [row.tokens[:-1] for row in rows]
    prompt, saved = _heaviest(beginnings)
    size = len(prompt)
    if saved < _LEAST_PART * sum(len(row.tokens) for row in rows):
        return (0,) * len(rows)
    return tuple(size if each[:size] == prompt else 0 for each in beginnings)


def _heaviest(rows: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], int]:
    """The prefix with the largest length · (rows − 1), the first of several; and this product."""
    best: tuple[int, ...] = ()
    most = 0
    groups = [(0, rows)]
    while groups:
        depth, group = groups.pop()
        by_token: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for row in group:
            if len(row) > depth:
                by_token[row[depth]].append(row)
        for members in by_token.values():
            if max(map(len, members)) * (len(members) - 1) <= most:
                continue
            common = _common(members)
            if len(common) * (len(members) - 1) > most:
                best, most = common, len(common) * (len(members) - 1)
            groups.append((len(common), members))
    return best, most


def _common(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all rows begin with: what the least and the greatest begin with."""
    first, last = min(rows), max(rows)
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return first[: sum(1 for _ in alike)]
