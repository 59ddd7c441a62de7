"""Rows of a data file, which may hold anything: JSON, JSONL, CSV or Parquet."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from procon.errors import ProConError
from procon.files import MAX_TEXT, parse_json

Row = dict[str, Any]

#: Bytes of a line of JSONL that are read at a time: a line has a few texts, and none may be longer than MAX_TEXT.
_LONGEST_LINE = 64 * MAX_TEXT

#: Rows of a Parquet file that are taken into memory at a time.
_PARQUET_ROWS = 256


def read_rows(path: Path, wanted: Collection[str]) -> Iterator[Row]:
    """The rows of the file, in their order; no more than it needs is in memory at a time, but all of a JSON list is.

    Args:
        wanted: columns that matter; others may be left out.

    Raises:
        ProConError: if there is no such file, its name ends in nothing known, or it cannot be read.
    """
    check_file(path)
    reader = _READERS[path.suffix.lower()]
    try:
        yield from reader(path, wanted)
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"not UTF-8: {error}") from error
    # pyarrow has errors of its own for what is no Parquet; the others are Python's for the rest.
    except (OSError, ValueError, csv.Error, NotImplementedError, OverflowError, MemoryError) as error:
        if isinstance(error, ProConError):
            raise
        raise _unreadable(path, next(iter(str(error).splitlines()), type(error).__name__)) from error


def check_file(path: Path) -> None:
    """Raise ProConError unless the file is there, of a known type and not empty."""
    if not os.path.isfile(path):
        raise ProConError(f"data file {str(path)!r} does not exist: check the path")
    if not is_data_file(path):
        raise ProConError(f"data file {str(path)!r} is of no known type: give .json, .jsonl, .csv or .parquet")
    if path.stat().st_size == 0:
        raise ProConError(f"data file {str(path)!r} is empty: give one with rows")


def is_data_file(path: Path) -> bool:
    """Whether its name is that of a data file."""
    return path.suffix.lower() in _READERS


def content_hash(path: Path) -> str:
    """SHA-256 of the file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreadable(path: Path, reason: str) -> ProConError:
    return ProConError(
        f"data {str(path)!r} cannot be read as {path.suffix.lower().lstrip('.')} ({reason:.200}): "
        "give a .json, .jsonl, .csv or .parquet file, or a dataset name"
    )


def _json_rows(path: Path, wanted: Collection[str]) -> Iterator[Row]:
    """Of a list of objects, or of objects on a line each: files of both kinds go by both names."""
    with path.open("rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":  # a byte order mark
            file.seek(0)
        start = file.tell()
        first = file.read(64).lstrip()
        file.seek(start)
        if first.startswith(b"["):
            values = parse_json(file.read().decode())
            yield from (_object(path, number, value) for number, value in enumerate(values, 1))
            return
        number = 0
        while line := file.readline(_LONGEST_LINE + 1):
            if not line.strip():
                continue
            number += 1
            try:
                if len(line) > _LONGEST_LINE:
                    raise ValueError(f"more than {_LONGEST_LINE} bytes")
                value = parse_json(line.decode())
            except UnicodeDecodeError as error:
                raise _unreadable(path, f"row {number} is not UTF-8: {error}") from error
            except ValueError as error:
                raise _unreadable(path, f"row {number}: {error}") from error
            yield _object(path, number, value)


def _object(path: Path, number: int, value: object) -> Row:
    if not isinstance(value, dict):
        raise ProConError(f"data {str(path)!r}, row {number} is {value!r:.60}: give an object with the columns as keys")
    return value


def _csv_rows(path: Path, wanted: Collection[str]) -> Iterator[Row]:
    """Every cell as the text it is: ``datasets`` would make numbers of answers such as 12, and nothing of "None"."""
    before = csv.field_size_limit(MAX_TEXT)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            for column in columns:
                if columns.count(column) > 1:
                    raise ProConError(f"data {str(path)!r} has the column {column!r:.60} twice: rename one")
            for number, row in enumerate(rows, 1):
                if None in row or None in row.values():
                    raise ProConError(
                        f"data {str(path)!r}, row {number}: not as many cells as columns; quote cells with commas"
                    )
                yield row
    finally:
        csv.field_size_limit(before)


def _parquet_rows(path: Path, wanted: Collection[str]) -> Iterator[Row]:
    """Of the columns that matter: others may have types that Python has not."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            known = [name for name in there if name in wanted]
            if not known and file.metadata.num_rows:
                yield dict.fromkeys(there)
                return
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=known):
                yield from batch.to_pylist()
    except (pa.ArrowException, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error


_READERS = {".json": _json_rows, ".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
