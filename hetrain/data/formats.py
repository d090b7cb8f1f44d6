"""What a file of rows is, by its first bytes: JSON lines, a JSON array, CSV or Parquet, text also in gzip."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

from hetrain.data.json_rows import read_json_array, read_json_lines
from hetrain.data.records import Item, Record, present
from hetrain.public.errors import DatasetError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
GZIP_SUFFIX = ".gz"

_HEAD = 8192
_BOM = b"\xef\xbb\xbf"
_LONGEST_CELL = 1 << 30
_DELIMITERS = ",;\t"
_COLUMNS = {"text", "prompt", "completion", "messages", "conversations", "instruction", "output"}

# What is no file of rows, by its first bytes: what it is, and what to do.
_FOREIGN = {
    b"PK\x03\x04": ("a ZIP archive or an Excel workbook", "Unpack it, or save the sheet as CSV"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "Decompress it, or compress it with gzip"),
    b"BZh": ("compressed with bzip2", "Decompress it, or compress it with gzip"),
    b"\xfd7zXZ\x00": ("compressed with xz", "Decompress it, or compress it with gzip"),
    b"ARROW1": ("an Arrow file", "Save it as Parquet, as with to_parquet of datasets"),
    b"\xff\xff\xff\xff": ("an Arrow stream", "Save it as Parquet, as with to_parquet of datasets"),
    b"ORC": ("an ORC file", "Save it as Parquet"),
    b"Obj\x01": ("an Avro file", "Save it as Parquet"),
    b"SQLite format 3": ("an SQLite database", "Save the table as CSV"),
    b"%PDF": ("a PDF", "Give its text in rows, as JSON lines or CSV"),
    b"\x89HDF": ("an HDF5 file", "Save it as Parquet"),
    **{
        bytes([0x80, version]): ("a pickle, which could run code", "Save it as JSON lines")
        for version in (2, 3, 4, 5)
    },
    b"\xff\xfe": ("text in UTF-16", "Save it in UTF-8"),
    b"\xfe\xff": ("text in UTF-16", "Save it in UTF-8"),
}

Reader = Callable[[BinaryIO, str], Iterator[Item]]


def read_rows_of(stream: BinaryIO, name: str) -> Iterator[Item]:
    """The rows of one file, and what is wrong with those that cannot be read.

    Args:
        stream: the file, at its beginning; seekable.
        name: what messages call it; its suffix decides where the first bytes leave it open.

    Raises:
        DatasetError: no row of it can be read.
    """
    buffered = io.BufferedReader(cast(io.RawIOBase, stream), _HEAD)
    if not buffered.peek(_HEAD).startswith(b"\x1f\x8b"):
        yield from _recognize(buffered.peek(_HEAD), name)(buffered, name)
        return
    try:
        inner = io.BufferedReader(gzip.GzipFile(fileobj=buffered), _HEAD)
        head, inner_name = inner.peek(_HEAD), name.removesuffix(GZIP_SUFFIX)
        reader = _recognize(head, inner_name, shown=name)
        if reader is _read_parquet or head.startswith(b"\x1f\x8b"):
            raise DatasetError(
                "what this gzip file holds is no text", where=name, hint="Decompress it once, and give that"
            )
        yield from reader(inner, name)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        hint = "Copy or download it again"
        raise DatasetError(f"the gzip file is damaged: {error}", where=name, hint=hint) from error


def _recognize(head: bytes, name: str, shown: str = "") -> Reader:
    # A header may begin with the letters that mark a binary file, as ORCID does.
    is_csv = name.endswith((".csv", ".tsv"))
    is_text = is_csv and b"\x00" not in head
    if head.startswith(b"PAR1") and not is_text:
        return _read_parquet
    foreign = [
        reason
        for magic, reason in _FOREIGN.items()
        if head.startswith(magic) and not (is_text and _is_printable(magic))
    ]
    if head[257:262] == b"ustar":
        foreign.append(("a tar archive", "Unpack it, and give the folder"))
    if foreign:
        what, hint = foreign[0]
        raise DatasetError(f"this is {what}, not rows", where=shown or name, hint=hint)
    if is_csv:
        return _read_csv
    start = head.removeprefix(_BOM).lstrip()
    if start.startswith(b"["):
        return read_json_array
    if not start.startswith(b"{") and not name.endswith((".jsonl", ".ndjson", ".json")):
        header = start.split(b"\n", 1)[0].decode("utf-8", errors="replace")
        if _COLUMNS & set(_cells(header)):
            return _read_csv
    return read_json_lines


def _is_printable(magic: bytes) -> bool:
    return magic.isascii() and magic.decode().isprintable()


def _cells(header: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([header], delimiter=_delimiter(header)), [])]
    except csv.Error:  # no header of a CSV
        return []


def _delimiter(header: str) -> str:
    return max(_DELIMITERS, key=header.count)


def _lines(stream: BinaryIO, name: str) -> Iterator[str]:
    for number, encoded in enumerate(stream, start=1):
        try:
            yield (encoded.removeprefix(_BOM) if number == 1 else encoded).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DatasetError(
                f"byte {error.start + 1} of this line is not UTF-8",
                where=f"{name}:{number}",
                hint="Save the file in UTF-8",
            ) from error


def _read_csv(stream: BinaryIO, name: str) -> Iterator[Item]:
    """CSV with a header; commas, semicolons or tabs, whichever the header has most of."""
    csv.field_size_limit(_LONGEST_CELL)
    lines = _lines(stream, name)
    first = next(lines, "")
    delimiter = _delimiter(first)
    rows = csv.reader(_again(first, lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    begin = 1
    while True:
        try:
            cells = next(rows, None)
        except (csv.Error, DatasetError) as error:
            # What follows an open quotation mark cannot be told apart.
            known = error if isinstance(error, DatasetError) else None
            hint = "Write quotation marks within a cell twice"
            yield known or DatasetError(f"this is not CSV: {error}", where=f"{name}:{begin}", hint=hint)
            return
        if cells is None:
            return
        if header is None and cells:
            header = [cell.strip() for cell in cells]
            if twice := sorted({repr(cell) for cell in header if header.count(cell) > 1}):
                hint = "Give each column a name of its own"
                raise DatasetError(f"two columns are called {twice[0]}", where=f"{name}:1", hint=hint)
        elif header and any(cells):
            yield _csv_record(header, cells, name, begin)
        begin = rows.line_num + 1


def _csv_record(header: list[str], cells: list[str], name: str, number: int) -> Item:
    if len(cells) == len(header):
        return Record(dict(zip(header, cells, strict=True)), name, number)
    return DatasetError(
        f"this row has {len(cells)} cells, the header {len(header)}",
        where=f"{name}:{number}",
        hint="Put cells that contain the delimiter in quotation marks",
    )


def _again(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _read_parquet(stream: BinaryIO, name: str) -> Iterator[Item]:
    """Parquet, by pyarrow; null counts as absent, also within objects."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        hint = 'Install it with: pip install "hetrain[data]"'
        raise DatasetError(
            "this is Parquet, which needs the package pyarrow", where=name, hint=hint
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(stream)
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise DatasetError("two columns have the same name", where=name, hint="Rename one of them")
        number = 0
        for batch in file.iter_batches(1024):
            for columns in batch.to_pylist():
                number += 1
                yield Record(present(columns), name, number)
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError) as error:
        hint = "Copy or download it again"
        raise DatasetError(f"the Parquet file cannot be read: {error}", where=name, hint=hint) from error
