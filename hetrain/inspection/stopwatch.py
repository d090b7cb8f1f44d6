"""Processor time of a step per token, measured within a budget of seconds."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter, process_time

_FIRST_TOKENS = 64
_REPEATS = 3


def seconds_per_token(step: Callable[[int], None], most_tokens: int, budget_s: float) -> float:
    """Processor seconds, of all threads of this process, that `step` takes for a token.

    The number of tokens doubles as long as the next step is likely to end within the budget. The best of up
    to three steps of the largest number counts. A first step, which is not measured, loads what is needed.

    Args:
        step: takes the number of tokens.
        most_tokens: where doubling ends.
        budget_s: elapsed time, which the first two steps may exceed.
    """
    tokens, end = min(_FIRST_TOKENS, most_tokens), perf_counter() + budget_s
    step(tokens)
    while True:
        cpu_s, elapsed_s = _time(step, tokens)
        if tokens >= most_tokens or perf_counter() + 2.5 * elapsed_s > end:
            break
        tokens = min(2 * tokens, most_tokens)
    for _ in range(_REPEATS - 1):
        if perf_counter() + elapsed_s > end:
            break
        cpu_s = min(cpu_s, _time(step, tokens)[0])
    return cpu_s / tokens


def _time(step: Callable[[int], None], tokens: int) -> tuple[float, float]:
    cpu, elapsed = process_time(), perf_counter()
    step(tokens)
    return process_time() - cpu, perf_counter() - elapsed
