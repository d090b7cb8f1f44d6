"""A short run of every target of `tests.fuzz`, what it once found, and that it finds what it should."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from tests.fuzz.run import TRACED_EVERY, Opened, Target, attempt, input_of, open_target, run_cases
from tests.fuzz.targets import TARGETS

CASES = 200
SEED = 1


@contextmanager
def opened(name: str) -> Iterator[Opened]:
    with ExitStack() as stack:
        yield open_target(TARGETS[name], stack)


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_raised_that_is_not_declared(name: str, one_thread: None) -> None:
    target = TARGETS[name]
    with opened(name) as ready:
        ready.run(ready.seeds[0])  # a valid input raises nothing
        found = {
            problem: f"python -m tests.fuzz --target {name} --seed {SEED} --case {number}"
            for number in range(CASES)
            if (problem := attempt(target, ready, input_of(target, ready, SEED, number)))
        }
    assert not found


def object_with(**values: Any) -> Callable[[Sequence[bytes]], bytes]:
    return lambda seeds: json.dumps(json.loads(seeds[0]) | values).encode()


def schedule_with(**values: Any) -> Callable[[Sequence[bytes]], bytes]:
    def change(seeds: Sequence[bytes]) -> bytes:
        state = json.loads(seeds[0])
        return json.dumps(state | {"schedule": state["schedule"] | values}).encode()

    return change


def replaced(old: bytes, new: bytes) -> Callable[[Sequence[bytes]], bytes]:
    def change(seeds: Sequence[bytes]) -> bytes:
        assert old in seeds[0]
        return seeds[0].replace(old, new)

    return change


def steps_of(count: float) -> Callable[[Sequence[bytes]], bytes]:
    return lambda seeds: save(
        {
            name: torch.tensor(count) if name.endswith("/step") else value
            for name, value in load(seeds[0]).items()
        }
    )


FOUND: Mapping[str, tuple[str, Callable[[Sequence[bytes]], bytes]]] = {
    "a name that ends on a terminal": ("completion", object_with(**{"\x1b[31m": 1})),
    "a name that turns a line around": ("plan", object_with(**{"\u202e": 1})),
    "a name of many characters": ("prepare-task", object_with(**{"x" * 50_000: 1})),
    "a tensor's name with a line end": ("model-index", object_with(weight_map={"a\nb": "c"})),
    "a file's name with a line end": ("model-index", object_with(weight_map={"g0.weight": "a\nb"})),
    "a model's index that is nested deeply": ("model-index", lambda _: b"[" * 5000),
    "a header that is no CSV": ("rows-csv", lambda _: b"prompt,com\rpletion\n"),
    "a Parquet column that is not UTF-8": ("rows-binary", replaced(b"prompt", b"\xb1rompt")),
    "a GGUF that ends early": ("gguf", lambda seeds: seeds[0][:40]),
    "a GGUF of endless lists": ("gguf", lambda seeds: seeds[0][:16] + b"\xff" * 6 + seeds[0][22:]),
    "a GGUF of a kind with a line end": ("gguf", replaced(b"adapter", b"a\n\npter")),
    "a hint's head that is nested deeply": ("hint-file", lambda _: b"[" * 4096),
    "a record that is nested deeply": ("run-records", lambda _: b"[" * 5000),
    "a model that was found by no name": ("run-records", lambda _: b'{"model_path": null}'),
    "a model's path that is a list": ("run-records", lambda _: b'{"model_path": []}'),
    "a dataset that is a list": ("run-records", lambda _: b'{"dataset": [["x"]]}'),
    "a dataset that is a number": ("run-records", lambda _: b'{"dataset": 5}'),
    "a rate that is text": ("checkpoint-state", schedule_with(_last_lr=["0.1"])),
    "a rate that overflows": ("checkpoint-state", schedule_with(base_lrs=[1e308], _last_lr=[1e308])),
    "a schedule at an update that has no float": ("checkpoint-state", schedule_with(last_epoch=1 << 2000)),
    "a schedule at another update": ("checkpoint-state", schedule_with(last_epoch=-(10**300))),
    "more steps than updates": ("checkpoint-optimizer", steps_of(1e30)),
    "fewer steps than none": ("checkpoint-optimizer", steps_of(-1e30)),
    "a run of another model with a line end": ("checkpoint-state", replaced(b"tiny", b"ti\\ny")),
    "a count with two signs": ("resp", replaced(b":2", b":--2")),
    "a schedule's state that is a number": ("checkpoint-state", schedule_with(lr_lambdas=[0.5])),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found_once(what: str, one_thread: None) -> None:
    name, change = FOUND[what]
    with opened(name) as ready:
        data = change(ready.seeds)
        # The length chooses the name of a file of rows.
        for case in (data, data + b"\n", data + b"\n\n"):
            assert attempt(TARGETS[name], ready, case, is_traced=True) is None


def misbehave(data: bytes) -> None:
    match data:
        case b"raise":
            raise KeyError("x")
        case b"declared":
            raise ValueError("fine")
        case b"terminal":
            raise ValueError("\x1b[31m")
        case b"die":
            os._exit(3)
        case b"memory":
            bytearray(1 << 40)
    assert data != b"traced" or len(bytearray(64 << 20))


def test_what_a_parser_may_not_do_is_found_and_can_be_repeated() -> None:
    kinds = (b"raise", b"declared", b"terminal", b"die", b"memory")
    seeds = [b"fine"] * TRACED_EVERY + [b"traced", *kinds]
    target = Target("bad", lambda path, stack: Opened(seeds, misbehave), (ValueError,))
    found, number = {}, 0
    while number < len(seeds):  # once more after the death of its process
        number, findings = run_cases(target, 1, number, len(seeds), 60.0)
        found |= {seeds[finding.case]: finding.problem for finding in findings}
    assert found == {
        b"traced": "more memory than 4 MiB and 64 times the input",
        b"raise": "builtins.KeyError at the target",
        b"terminal": "an error's text that is not printable",
        b"die": "its process ended with status 3",
        b"memory": "builtins.MemoryError at the target",
    }
    ready = Opened([b"one", b'{"a": [1, 2]}'], misbehave)
    drawn = [input_of(target, ready, 7, number) for number in range(500)]
    assert drawn == [input_of(target, ready, 7, number) for number in range(500)]
    assert len(set(drawn)) > 300
