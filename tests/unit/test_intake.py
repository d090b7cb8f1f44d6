"""What a worker takes from its broker: a client's own messages, and nothing else."""

from __future__ import annotations

import json
from math import isfinite
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetrain.public.protocol.messages import CONTROL_REPORT
from tasks.intake.control_message import COMMANDS, check_command
from tasks.intake.envelope import MAX_MESSAGE_BYTES, Accepted, Refused
from tasks.intake.strict_json import parse_json
from tasks.intake.task_message import check_task
from tests.harness.queue_messages import RUBBISH, body, task_message
from tests.harness.queue_messages import command_message as command

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


def paths(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values in `value`."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(path for key, each in inner for path in paths(each, (*place, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


GOOD = json.loads(task_message())
# Its value is the client's choice; all others are given, or must agree with another one.
FREE = {("properties", "reply_to"), ("properties", "delivery_tag"), ("body",)}


def test_a_client_s_message_is_accepted_as_kombu_parses_it() -> None:
    for queue in ("gpu", "gpu.0-7of32"):
        data = task_message(body(["any text, which the task parses: ä\u2028"]), queue=queue)
        assert check_task(data, queue) == Accepted(json.loads(data))
        assert isinstance(check_task(data, "gpu.other"), Refused)


@pytest.mark.parametrize("name", RUBBISH)
def test_everything_else_is_refused_with_a_printable_reason(name: str) -> None:
    verdict = check_task(RUBBISH[name], "gpu")
    assert isinstance(verdict, Refused)
    assert verdict.reason.isprintable()
    assert 0 < len(verdict.reason) <= 200


@given(path=st.sampled_from(paths(GOOD)), value=values)
def test_no_part_may_have_another_value(path: tuple[Any, ...], value: Any) -> None:
    changed = replaced(GOOD, path, value)
    same = json.dumps(changed) == json.dumps(GOOD)
    verdict = check_task(json.dumps(changed).encode(), "gpu")
    assert isinstance(verdict, Refused) or same or path in FREE


@given(
    data=st.binary(max_size=300)
    | st.text(max_size=300).map(str.encode)
    | values.map(json.dumps).map(str.encode)
)
def test_no_other_bytes_are_accepted(data: bytes) -> None:
    assert isinstance(check_task(data, "gpu"), Refused)
    assert isinstance(check_command(data), Refused)


@given(position=st.integers(0, len(task_message()) - 1), byte=st.binary(max_size=2))
def test_a_damaged_message_is_refused_or_means_what_it_says(position: int, byte: bytes) -> None:
    data = bytearray(task_message())
    data[position : position + 1] = byte
    verdict = check_task(bytes(data), "gpu")
    assert isinstance(verdict, Refused) or verdict.message == json.loads(data)


@given(value=values, depth=st.integers(1, 8))
def test_json_has_one_reading_or_none(value: Any, depth: int) -> None:
    data = json.dumps(value).encode()
    if len(data) > 1000 or depth_of(value) > depth or not is_finite(value):
        with pytest.raises(ValueError, match=r"bytes|nested|finite"):
            parse_json(data, max_bytes=1000, max_depth=depth)
    else:
        assert parse_json(data, max_bytes=1000, max_depth=depth) == value


def is_finite(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not (isinstance(value, float) and not isfinite(value)) and all(map(is_finite, inner))


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


def test_length_and_depth_are_bounds() -> None:
    assert parse_json(b"[[0]]", max_bytes=5, max_depth=2) == [[0]]
    for data in (b"[[0]] ", b"[[[]]"):
        with pytest.raises(ValueError, match=r"5 at most|deeper than 2"):
            parse_json(data, max_bytes=5, max_depth=2)
    assert parse_json(rb'"[[[\"[[[\\"', max_bytes=20, max_depth=0) == '[[["[[[\\'
    padding = MAX_MESSAGE_BYTES - len(task_message())
    assert isinstance(check_task(task_message() + b" " * padding, "gpu"), Accepted)
    assert isinstance(check_task(task_message() + b" " * (padding + 1), "gpu"), Refused)


ARGUMENTS = {"query_task": {"ids": ["a"]}, "registered": {"taskinfoitems": []}, "active": {"safe": True}}


def test_questions_are_accepted() -> None:
    for method in COMMANDS:
        assert isinstance(check_command(command(method, ARGUMENTS.get(method))), Accepted)
    assert isinstance(check_command(command(CONTROL_REPORT, destination=["worker@host"])), Accepted)


@pytest.mark.parametrize(
    "data",
    [
        *map(
            command,
            ["shutdown", "revoke", "revoke_by_stamped_headers", "terminate", "rate_limit", "time_limit",
             "pool_grow", "pool_shrink", "pool_restart", "autoscale", "add_consumer", "cancel_consumer",
             "election", "hello", "disable_events", "heartbeat", "memdump", "objgraph", "__class__", "", 5,
             [], {}],
        ),
        command("ping", {"x": 1}),
        command("ping", []),
        command("query_task", {"ids": "abc"}),
        command("query_task", {}),
        command("conf", {"with_defaults": 1}),
        command(more=1),
        command(destination="worker@host"),
        command(destination=[5]),
        command(pattern="(a+)+$", matcher="pcre"),
        command(reply_to={"exchange": "", "routing_key": "gpu"}),
        command(reply_to={"exchange": "reply.celery.pidbox", "routing_key": [1]}),
        command(ticket={}),
        command().replace(b'"clock": 1', b'"clock": "x"'),
        command().replace(b'"clock": 1', b'"clock": 1e300'),
        command().replace(b'"clock": 1', b'"clock": 99999999999999999999'),
        b"[" * 200_000,
    ],
)  # fmt: skip
def test_no_command_that_changes_anything_is_accepted(data: bytes) -> None:
    assert isinstance(check_command(data), Refused)
