"""Rows of table files, each with its line or its number: CSV (or separated by semicolons or tabs) and Parquet."""

import csv
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rlhf.data.dialogues import BadRow
from rlhf.data.located import Located, first_sentence, not_utf8, row_or_bad, twice


def csv_rows(text: str, label: str) -> Iterator[Located]:
    # The default limit of 131,072 characters a cell would stop at a long answer; `strict` reports unclosed quotes.
    csv.field_size_limit(2**31 - 1)
    # Without translation, which would change the ends of lines inside a cell.
    lines = list(io.StringIO(text, newline=""))
    mark, spaced = _delimiter(lines)
    reader = csv.reader(lines, strict=True, delimiter=mark, skipinitialspace=spaced)
    header: list[str] | None = None

    while True:
        before = reader.line_num
        where = f"{label}:{before + 1}"
        try:
            # A record may span lines: its place is the line after the last one read.
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # An unclosed quote takes all lines after it: the message says how many.
            reason = f"not CSV ({error})"
            if header is None:
                raise ValueError(f"{where}: {reason}: mend the column names") from None
            if reader.line_num > before + 1:
                reason += f"; nothing from here to line {reader.line_num} can be read"
            unread = "".join(lines[before : reader.line_num])
            yield where, BadRow(reason, unread[:2000])
            continue

        # The first line that is not blank holds the column names.
        reason = not_utf8(",".join(cells))
        if header is None:
            header = _header(cells, reason, where) if cells else None
        elif reason or len(cells) not in (0, len(header)):
            yield where, BadRow(reason or f"{len(cells)} cells under {len(header)} column names", cells)
        # A blank line is no row, and no mistake.
        elif cells:
            yield where, dict(zip(header, cells, strict=True))


def _delimiter(lines: list[str]) -> tuple[str, bool]:
    """What separates the column names (a comma, or where there is none a semicolon or a tab); if a space follows."""
    # By the column names alone: the texts below them hold marks of every kind.
    first = next((line for line in lines if line.strip()), "")
    mark = next((mark for mark in (",", ";", "\t") if mark in first), ",")
    return mark, f"{mark} " in first


def _header(cells: list[str], reason: str | None, where: str) -> list[str]:
    """Column names. Raises: ValueError where one is no UTF-8 or stands twice (unnamed columns may be many)."""
    # A name of nothing but blanks stays what it is: other names may be empty.
    cells = [name.strip() or name for name in cells]
    repeated = twice(name for name in cells if name)
    if reason or repeated is not None:
        raise ValueError(f"{where}: {reason or f'column name {repeated!r:.40} stands twice: rename one of them'}")
    return cells


def parquet_rows(path: Path, label: str) -> Iterator[Located]:
    number = 0
    for batch in _parquet_batches(path, label):
        if name := twice(batch.schema.names):
            raise ValueError(f"{label}: column name {name!r:.40} stands twice: rename one of them")
        # Row by row, as one value that Python cannot hold would make the whole batch unreadable.
        for index in range(batch.num_rows):
            number += 1
            read = partial(_first_row, batch.slice(index, 1))
            yield f"{label}:{number}", row_or_bad(read)


def _first_row(batch) -> dict:
    return batch.to_pylist()[0]


def _parquet_batches(path: Path, label: str) -> Iterator:
    # Imported where needed: `--help` should not wait for it.
    import pyarrow
    import pyarrow.parquet

    try:
        yield from pyarrow.parquet.ParquetFile(path).iter_batches(1000)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{label} is no readable Parquet file ({first_sentence(error)}): download it again") from None
