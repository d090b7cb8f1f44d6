"""Damaged variants of valid inputs, each a function of its seed and number alone.

JSON is changed as a tree as well as as bytes: most changes of bytes end at the first bracket. Feedback from
coverage is not used: nearly all of these parsers are in C and Rust, which a tracer of Python does not see.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

LONGEST = 1 << 20
"""No case is longer, unless a seed is."""
_PARSED = 1 << 16
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_NUMBERS = (
    *(sign * (1 << bits) + offset
      for bits in (0, 7, 8, 15, 16, 31, 32, 53, 63, 64, 1000) for offset in (-1, 0, 1) for sign in (-1, 1)),
    0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
_TEXTS = (
    "", " ", "\0", "a\nb", "\r", "\x1b[31m", "\u2028", "\u202e", "\ud800", "\U0010ffff", "ä", "٣", "-",
    "x" * 5000, "../../etc", "/dev/zero", "~nobody/x", "%s%n", "{0.__class__}", "{{ 7 * 7 }}", "null",
    "1", "0x10", "true", "gpu", "a" * 32,
)  # fmt: skip
_TOKENS = (
    b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\t", b'"', b"'", b"\\", b"\\u",
    b"\\ud800", b"\xed\xa0\x80", b"{", b"}", b"[", b"]", b",", b":", b"null",
    b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b"[]", b"{}", b'""', b'{"a":1}', b"\x1f\x8b\x08", b"PAR1",
    b"GGUF", b"$-1\r\n", b"*-1\r\n", b"$0\r\n\r\n", b"+OK\r\n",
    b"-OOM \r\n", b":9223372036854775808\r\n", b"*2147483647\r\n", b"$536870912\r\n", b"%1\r\n", b"__proto__",
    *(value.to_bytes(size, "little") for size in (4, 8)
      for value in (0, 1, (1 << 8 * size - 1) - 1, 1 << 8 * size - 1, (1 << 8 * size) - 1, 1 << 20, 1 << 31)),
)  # fmt: skip
_LONG = (
    b"[" * 5000,
    b'{"a":' * 5000,
    b"9" * 5000,
    b"(" * 100_000,
    b"[" * 200_000,
    b" " * 70_000,
    b"\\" * 1001,
)


def case(seeds: Sequence[bytes], text: str, longest: int = LONGEST) -> bytes:
    """One input: a seed, changed in one to six places.

    Args:
        seeds: valid inputs.
        text: decides all that is drawn.
        longest: the most bytes that it may have, if the seeds have no more.
    """
    random = Random(text)
    data = random.choice(seeds)
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        data = random.choice(_CHANGES)(data, random, seeds)
    return data[: max(longest, max(map(len, seeds)))]


def _place(data: bytes, random: Random) -> int:
    # What decides about a file stands at its beginning, and often at its end.
    end = random.choice((len(data), len(data), min(len(data), 64), min(len(data), 512)))
    place = random.randint(0, end)
    return place if random.random() < 0.8 else len(data) - place


def _flip(data: bytes, random: Random, _: Sequence[bytes]) -> bytes:
    place = _place(data, random)
    return (
        data[:place]
        + bytes(byte ^ 1 << random.randrange(8) for byte in data[place : place + 1])
        + data[place + 1 :]
    )


def _byte(data: bytes, random: Random, _: Sequence[bytes]) -> bytes:
    place = _place(data, random)
    return data[:place] + random.randbytes(random.choice((0, 1, 1, 4, 8))) + data[place + 1 :]


def _token(data: bytes, random: Random, _: Sequence[bytes]) -> bytes:
    place, token = _place(data, random), random.choice(_TOKENS if random.random() < 0.97 else _LONG)
    return data[:place] + token + data[place + random.choice((0, 0, 1, len(token))) :]


def _cut(data: bytes, random: Random, _: Sequence[bytes]) -> bytes:
    first, last = sorted((_place(data, random), _place(data, random)))
    return random.choice((data[:first], data[:first] + data[last:], data[:first] + data[last:], data[last:]))


def _repeat(data: bytes, random: Random, _: Sequence[bytes]) -> bytes:
    first = _place(data, random)
    piece = data[first : first + random.choice((1, 2, 8, 100))]
    return data[:first] + piece * random.choice((1, 2, 10, 300)) + data[first:]


def _splice(data: bytes, random: Random, seeds: Sequence[bytes]) -> bytes:
    other = random.choice(seeds)
    return data[: _place(data, random)] + other[_place(other, random) :]


def _number(data: bytes, random: Random, _: Sequence[bytes]) -> bytes:
    """Another number in place of one that is written in digits."""
    found = list(_NUMBER.finditer(data[:_PARSED]))
    if not found:
        return _byte(data, random, _)
    match = random.choice(found)
    return data[: match.start()] + json.dumps(random.choice(_NUMBERS)).encode() + data[match.end() :]


def _tree(data: bytes, random: Random, _: Sequence[bytes]) -> bytes:
    """Another value, key or object somewhere in a JSON text, or in one of its lines."""
    lines = data[:_PARSED].split(b"\n")
    line = random.randrange(len(lines))
    try:
        value = json.loads(lines[line])
        lines[line] = _written(_changed(value, random), random)
    except (ValueError, RecursionError):
        return _byte(data, random, _)
    return b"\n".join(lines) + data[_PARSED:]


def _written(value: Any, random: Random) -> bytes:
    text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    if random.random() < 0.1 and "{" in text:  # a key twice
        text = text.replace("{", '{"a": 1, "a": 2, ' if "{}" not in text else '{"a": 1, "a": 2', 1)
    return text.encode("utf-8", "surrogatepass")


def _changed(value: Any, random: Random) -> Any:
    """`value` with one change at a place drawn on the way down."""
    inner = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    if not inner or random.random() < 0.15:
        return random.choice(_VALUE_CHANGES)(value, random)
    key = random.choice(inner)
    copied = dict(value) if isinstance(value, dict) else list(value)
    kind = random.random()
    if kind < 0.75:
        copied[key] = _changed(value[key], random)
    elif kind < 0.85:
        del copied[key]
    elif isinstance(copied, dict):
        copied[random.choice((*_TEXTS, *inner))] = copied.pop(key) if kind < 0.92 else _value(value, random)
    else:
        copied[key:key] = [copied[key]] * random.choice((1, 2, 1000))
    return copied


def _value(_: Any, random: Random) -> Any:
    return random.choice(
        (None, True, False, [], {}, [None], {"a": 1}, [[]], random.choice(_NUMBERS), random.choice(_TEXTS))
    )


def _wrapped(value: Any, random: Random) -> Any:
    for _ in range(random.choice((1, 1, 5, 50))):
        value = [value] if random.random() < 0.5 else {random.choice(_TEXTS): value}
    return value


def _retyped(value: Any, random: Random) -> Any:
    text = value if isinstance(value, str) else json.dumps(value)
    return random.choice(
        (text, [value], text + random.choice(_TEXTS), random.choice(_TEXTS) + text, text[:-1])
    )


_VALUE_CHANGES: tuple[Callable[[Any, Random], Any], ...] = (_value, _value, _value, _retyped, _wrapped)
_CHANGES: tuple[Callable[[bytes, Random, Sequence[bytes]], bytes], ...] = (
    _flip, _byte, _token, _cut, _repeat, _splice, _number, _number, _tree, _tree, _tree, _tree,
)  # fmt: skip
