"""JSON from strangers: bounded in length and depth before it is parsed, and without two readings."""

from __future__ import annotations

import json
from typing import Any, NoReturn

_BRACKETS = b"[]{}"
_OTHER_BYTES = bytes(set(range(256)) - set(_BRACKETS))


class _Malformed(ValueError):
    """The text of this one is ours, unlike that of other errors."""


def parse_json(data: bytes, *, max_bytes: int, max_depth: int) -> Any:
    """The value of a JSON text.

    Args:
        data: the text, of unknown content.
        max_bytes: the most that it may be long; compared before anything is decoded.
        max_depth: the most arrays and objects that may lie in each other; counted before anything is parsed.

    Raises:
        ValueError: it is longer or deeper, is no JSON in UTF-8, has a key twice in one object, or a number
            that is not finite. The error's text repeats nothing of `data`.
    """
    if len(data) > max_bytes:
        raise _Malformed(f"{len(data)} bytes, of {max_bytes} at most")
    if _depth(data) > max_depth:
        raise _Malformed(f"nested deeper than {max_depth}")
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except _Malformed:
        raise
    except (ValueError, RecursionError) as error:  # its text may quote the data
        raise _Malformed("no JSON") from error


def _depth(data: bytes) -> int:
    """How deep brackets outside of strings are nested; linear in the length, for anything."""
    without_escapes = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = b"".join(without_escapes.split(b'"')[::2]).translate(None, _OTHER_BYTES)
    depth = deepest = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Malformed("an object has a key twice")
    return found


def _refuse_constant(_: str) -> NoReturn:
    raise _Malformed("a number is not finite")


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise _Malformed("a number is not finite")
    return value
