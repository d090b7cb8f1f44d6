"""Messages as they lie on a queue: a client's own, and variations of it that no client sends."""

from __future__ import annotations

import bz2
import json
from base64 import b64encode
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from hetrain.public.protocol.messages import QUEUE, TASK_EVALUATE, new_token

NO_CANVAS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
Changes = Mapping[str, Any]
MISSING: Any = object()


def body(arguments: Any = ("{}",), keywords: Any = None, canvas: Any = None) -> bytes:
    """A body with these parts."""
    return json.dumps(
        [arguments, {} if keywords is None else keywords, NO_CANVAS if canvas is None else canvas]
    ).encode()


def task_message(
    content: bytes | None = None,
    *,
    queue: str = QUEUE,
    headers: Changes | None = None,
    properties: Changes | None = None,
    envelope: Changes | None = None,
) -> bytes:
    """What a client sends to `queue`, with changed parts; one that is `MISSING` is left out."""
    request = new_token()
    shown = {"argsrepr": "forward 0:1 w", "kwargsrepr": "job …0123 model tiny", "origin": "hetrain"}
    all_headers = {
        "lang": "py",
        "task": TASK_EVALUATE,
        "id": request,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": request,
        "parent_id": None,
        **shown,
        "ignore_result": True,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
    }
    all_properties = {
        "correlation_id": request,
        "reply_to": "hetrain",
        **shown,
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": queue},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": str(uuid4()),
    }
    message = {
        "body": b64encode(body() if content is None else content).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": _changed(all_headers, headers),
        "properties": _changed(all_properties, properties),
    }
    return json.dumps(_changed(message, envelope)).encode()


def command_message(method: Any = "ping", arguments: Any = None, **more: Any) -> bytes:
    """What ``celery inspect`` publishes, with other parts."""
    content = {
        "method": method,
        "arguments": {} if arguments is None else arguments,
        "destination": None,
        "pattern": None,
        "matcher": None,
        "ticket": "a6502831-8911-4826-a741-5475f5bd719e",
        "reply_to": {"exchange": "reply.celery.pidbox", "routing_key": "21cc6bae-e648-3a29-a42d"},
    }
    message = {
        "body": b64encode(json.dumps(content | more).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"clock": 1, "expires": 1795993409.7},
        "properties": {
            "delivery_mode": 2,
            "delivery_info": {"exchange": "celery.pidbox", "routing_key": ""},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": "83b82f8e-a27b-4573-baa2-4da20847549b",
        },
    }
    return json.dumps(message).encode()


def _changed(values: dict[str, Any], changes: Changes | None) -> dict[str, Any]:
    merged = values | dict(changes or {})
    return {name: value for name, value in merged.items() if value is not MISSING}


def _signature(task: str) -> dict[str, Any]:
    options = {"exchange": "celery.pidbox", "routing_key": "x"}
    return {
        "task": task,
        "args": [],
        "kwargs": {},
        "options": options,
        "subtask_type": None,
        "immutable": True,
    }


def _twice(message: bytes, name: str, first: str) -> bytes:
    """`message` with the key `name` in it twice: first with another value, then with its own."""
    key = f'"{name}": '
    return message.replace(key.encode(), f"{key}{first}, {key}".encode(), 1)


_PICKLE = b"cos\nsystem\n(S'true'\ntR."
RUBBISH: dict[str, bytes] = {
    "nothing": b"",
    "a letter": b"x",
    "not UTF-8": b"\xff\xfe\x00",
    "null bytes": bytes(1000),
    "a number": b"5",
    "a number of many digits": b"9" * 60_000,
    "null": b"null",
    "a list": b"[]",
    "an object": b"{}",
    "no properties": json.dumps({"body": "", "headers": {}, "properties": {}}).encode(),
    "nested deeply": b"[" * 200_000,
    "nested deeply, and short": b"[" * 50_000,
    "nested objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "cut off": task_message()[:-1],
    "followed by more": task_message() + b"{}",
    "too long": task_message(body(["x" * 100_000])),
    "many megabytes": b'"' + b"x" * (7 << 20) + b'"',
    "unterminated escapes": b'"\\' * 30_000,
    "a body that is nested deeply": task_message(b"[" * 20_000),
    "a body that is no JSON": task_message(b"x"),
    "a body that is not base64": task_message(envelope={"body": "A"}),
    "a body that is a list": task_message(envelope={"body": [1]}),
    "an empty body": task_message(b""),
    "half of a surrogate pair": task_message(b'[["\\ud800"], {}, ' + json.dumps(NO_CANVAS).encode() + b"]"),
    "NaN in the body": task_message(b"[[NaN], {}, {}]"),
    "an infinite retry": task_message(headers={"retries": 0}).replace(b'"retries": 0', b'"retries": 1e999'),
    "a key twice": _twice(task_message(), "retries", '"x"'),
    "a key twice, then right": _twice(task_message(), "body", '"AAAA"'),
    "another body encoding": task_message(properties={"body_encoding": "rot13"}),
    "no body encoding": task_message(properties={"body_encoding": MISSING}),
    "another charset": task_message(envelope={"content-encoding": "nonsense"}),
    "pickle": task_message(
        _PICKLE,
        envelope={"content-type": "application/x-python-serialize", "content-encoding": "binary"},
    ),
    "yaml": task_message(envelope={"content-type": "application/x-yaml"}),
    "a content type that is a list": task_message(envelope={"content-type": ["application/json"]}),
    "compressed": task_message(bz2.compress(b"0" * 1000), headers={"compression": "bzip2"}),
    "compression of a strange type": task_message(headers={"compression": {"a": 1}}),
    "a type from kombu's JSON": task_message(headers={"stamps": {"__type__": "uuid", "__value__": "x"}}),
    "more at the top": task_message(envelope={"redelivered": True}),
    "headers that are text": task_message(envelope={"headers": "abc"}),
    "headers that are a list": task_message(envelope={"headers": []}),
    "properties that are null": task_message(envelope={"properties": None}),
    **{f"no {name}": task_message(headers={name: MISSING})
       for name in ("task", "id", "root_id", "timelimit")},
    **{f"no property {name}": task_message(properties={name: MISSING})
       for name in ("delivery_tag", "delivery_info", "correlation_id", "reply_to")},
    **{f"eta {value!r}": task_message(headers={"eta": value})
       for value in ("nonsense", 5, "2999-01-01T00:00:00", [])},
    **{f"expires {value!r}": task_message(headers={"expires": value})
       for value in ("nonsense", "2999-01-01T00:00:00", 1e300, {})},
    **{f"time limits {value!r}": task_message(headers={"timelimit": value})
       for value in ("abc", ["a", "b"], [1, 1], [None], [None, None, None], None, {})},
    **{f"id {value!r}": task_message(headers={"id": value, "root_id": value},
                                     properties={"correlation_id": value})
       for value in (5, None, [], {}, "", "../x", "A" * 32, "a" * 32 + "\n")},
    **{f"task {value!r}"[:60]: task_message(headers={"task": value})
       for value in ([1], {}, None, 5, "celery.chord_unlock", "celery.backend_cleanup", "celery.accumulate",
                     "hetrain.other", "hetrain.evaluate\n", "x" * 10_000)},
    **{f"retries {value!r}": task_message(headers={"retries": value})
       for value in ("x", -1, 1, False, 0.0, None, 10**30)},
    **{f"{name} {value!r}"[:60]: task_message(headers={name: value})
       for name in ("argsrepr", "kwargsrepr") for value in (5, None, "\x1b[31m", "a\nb", "x" * 10_000)},
    **{f"{name}": task_message(headers={name: value})
       for name, value in {
           "another origin": "gen1@host", "group": {"a": 1}, "group_index": "x", "parent_id": 5,
           "shadow": "celery.ping", "stamped_headers": [5], "stamps": 5, "replaced_task_nesting": "x",
           "ignore_result": 1, "lang": "c", "clock": "x", "x-delay": 5,
       }.items()
       for name in ([name] if name != "another origin" else ["origin"])},
    **{f"another {name}": task_message(properties={name: value})
       for name, value in {
           "reply_to": {"a": 1}, "priority": 9, "delivery_mode": "x", "delivery_tag": [1],
           "correlation_id": "x", "expiration": "1",
       }.items()},
    **{f"delivery_info {value!r}"[:60]: task_message(properties={"delivery_info": value})
       for value in (None, {}, "x", {"exchange": "", "routing_key": "gpu.x"},
                     {"exchange": "celery.pidbox", "routing_key": QUEUE},
                     {"exchange": "", "routing_key": QUEUE, "redelivered": True})},
    **{f"arguments {value!r}"[:60]: task_message(body(value))
       for value in ([], [5], [None], ["{}", "{}"], [["{}"]], "ab", {"0": "{}"}, None)},
    **{f"keywords {value!r}": task_message(body(keywords=value)) for value in ([], "x", {"a": 1}, 5)},
    **{f"canvas {name}": task_message(body(canvas=NO_CANVAS | {name: value}))
       for name, value in {
           "callbacks": [_signature("hetrain.prepare")], "errbacks": [5], "chain": 7, "chord": "x",
           "more": None,
       }.items()},
    "a canvas that is text": task_message(body(canvas="abc")),
    "an empty canvas": task_message(json.dumps([["{}"], {}, {}]).encode()),
    "a body in two parts": task_message(json.dumps([["{}"], {}]).encode()),
    "the first protocol": json.dumps({"id": "1", "task": TASK_EVALUATE, "args": ["{}"]}).encode(),
}  # fmt: skip
"""By what is wrong with it; each of them is pushed by a party that may push to the queue."""
