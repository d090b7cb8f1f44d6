"""Rows in JSON: one object a line, or an array of objects. A key that an object has twice is refused."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from hetrain.data.records import Item, Record
from hetrain.public.errors import DatasetError

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20
_NOT_UTF8 = "Save the file in UTF-8"
_ONE_OBJECT = "Write one complete JSON object per line, or an array of objects"


class _Parser:
    """A JSON decoder that notes keys which an object has twice."""

    def __init__(self) -> None:
        self._twice: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self._twice.append(key)
                seen.add(key)
        return found

    def parse(self, text: str, position: int = 0) -> tuple[Any, int]:
        """The value that starts at `position`, and where it ends. Raises as `json.JSONDecoder` does."""
        self._twice.clear()
        return self._decoder.raw_decode(text, position)

    def item(self, value: Any, source: str, number: int) -> Item:
        """The row that the value parsed last is."""
        where = f"{source}:{number}"
        if not isinstance(value, dict):
            return DatasetError("this is not a JSON object", where=where, hint=_ONE_OBJECT)
        if self._twice:
            what = f"the key '{self._twice[0]}' stands there twice"
            return DatasetError(what, where=where, hint="Keep one of the two")
        return Record(value, source, number)


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"this line is not JSON: {error.msg} (character {error.colno})"
    return "this line is not JSON: bad value"


def read_json_lines(stream: BinaryIO, name: str) -> Iterator[Item]:
    """The rows of a file of JSON lines; blank ones are skipped."""
    parser = _Parser()
    # Only \n ends a line: str.splitlines would also cut at U+2028, which JSON strings may contain.
    for number, encoded in enumerate(stream, start=1):
        where = f"{name}:{number}"
        try:
            text = (encoded.removeprefix(_BOM) if number == 1 else encoded).decode("utf-8").strip()
            if not text:
                continue
            value, end = parser.parse(text)
            if end < len(text):
                raise json.JSONDecodeError("Extra data", text, end)
            yield parser.item(value, name, number)
        except UnicodeDecodeError as error:
            what = f"byte {error.start + 1} of this line is not UTF-8"
            yield DatasetError(what, where=where, hint=_NOT_UTF8)
        except (ValueError, RecursionError) as error:
            yield DatasetError(_not_json(error), where=where, hint=_ONE_OBJECT)


def read_json_array(stream: BinaryIO, name: str) -> Iterator[Item]:
    """The rows of a JSON array, each read when its turn comes: never the whole file at once."""
    text, parser = _Text(stream), _Parser()
    try:
        text.skip("[")
        is_next = not text.at("]")
        while is_next:
            text.more()
            number = text.line
            yield parser.item(text.value(parser), name, number)
            if is_next := text.at(","):
                text.skip(",")
        text.skip("]")
        if text.more():
            raise json.JSONDecodeError("Extra data", text.rest, 0)
    except UnicodeDecodeError:
        what = "a byte after this line is not UTF-8"
        yield DatasetError(what, where=f"{name}:{text.line}", hint=_NOT_UTF8)
    except (ValueError, RecursionError) as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else "bad value"
        what = f"from here on this is no JSON array: {message}"
        yield DatasetError(what, where=f"{name}:{text.line}", hint="Separate objects by commas, end with ]")


class _Text:
    """The part of a text that has been read and not yet parsed; `line` is that of its first character."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._ended = False
        self._position = 0
        self._text = ""
        self.line = 1

    @property
    def rest(self) -> str:
        """What has been read and not yet parsed."""
        return self._text[self._position :]

    def _read(self) -> None:
        """Reads at least as much as is left, so that a long value is tried a few times only."""
        left = self.rest
        chunk = self._stream.read(max(_CHUNK, len(left)))
        self._ended = not chunk
        self._text, self._position = left + self._decoder.decode(chunk, self._ended), 0

    def _advance(self, position: int) -> None:
        self.line += self._text.count("\n", self._position, position)
        self._position = position

    def more(self) -> bool:
        """Whether anything but white space follows; passes over the white space."""
        while True:
            for position in range(self._position, len(self._text)):
                if self._text[position] not in " \t\r\n":
                    self._advance(position)
                    return True
            self._advance(len(self._text))
            if self._ended:
                return False
            self._read()

    def at(self, character: str) -> bool:
        """Whether the next character but white space is this one."""
        return self.more() and self._text[self._position] == character

    def skip(self, character: str) -> None:
        """Passes over a character. Raises `json.JSONDecodeError` if another one follows."""
        if not self.at(character):
            raise json.JSONDecodeError(f"Expecting '{character}'", self._text, self._position)
        self._advance(self._position + 1)

    def value(self, parser: _Parser) -> Any:
        """The next value. Raises `json.JSONDecodeError`."""
        if not self.more():
            raise json.JSONDecodeError("Expecting value", self._text, self._position)
        while True:
            try:
                value, end = parser.parse(self._text, self._position)
            except json.JSONDecodeError:
                if self._ended:
                    raise
                self._read()
            else:
                self._advance(end)
                return value
