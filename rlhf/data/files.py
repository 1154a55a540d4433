"""Rows of one data file (.json, .jsonl, .csv, .parquet), each with its line.

Every reader yields (where, row): `where` is "file:line" (the row's number where there are no lines), `row` the parsed
object, or a `BadRow` in place of what could not be read. Reading goes on after a bad row if the next row can be told
apart from it.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from rlhf.data.dialogues import BadRow
from rlhf.data.located import Located, first_sentence, not_utf8, twice
from rlhf.data.tables import csv_rows, parquet_rows
from rlhf.run.launch import say

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")

# Beside these: a prompt a line (given by its name, never found in a directory), and any text file compressed.
TEXT = ".txt"
COMPRESSED = ".gz"

# The separator is found in the file; by this name people expect a tab.
TABS = ".tsv"

# What stands in place of a file that Git LFS keeps elsewhere.
LFS_POINTER = b"version https://git-lfs.github.com/spec"

# Bytes that a compressed file may unpack to.
MAX_UNPACKED = 1 << 33


# ---- files ----
def read_file(path: Path, label: str | None = None) -> Iterator[Located]:
    """Rows of one data file. Raises: ValueError where it is empty, of another kind, or not text at all."""
    # 1. Refuse what is no data file at all.
    label = label or str(path)
    suffix = kind_of(path)
    if suffix not in (*SUFFIXES, TEXT):
        raise ValueError(f"{label} is none of {', '.join(SUFFIXES)}: convert it to one of them")

    try:
        size = path.stat().st_size
        data = b"" if suffix == ".parquet" else _bytes_of(path, label)
    # A failing disk's error does not name the file.
    except OSError as error:
        raise OSError(f"{label} cannot be read ({error.strerror}): check its permissions and its disk") from None

    if size == 0:
        raise ValueError(f"{label} is empty: check how it was made or downloaded")
    if data.startswith(LFS_POINTER):
        raise ValueError(f"{label} is a Git LFS pointer, not the data: run git lfs pull where it was cloned")

    # 2. Parquet is binary and read piece by piece; nothing of what follows concerns it.
    if suffix == ".parquet":
        yield from parquet_rows(path, label)
        return

    # UTF-16 without a byte order mark shows by a zero in its first two bytes, as files nearly always begin with ASCII.
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 0 in data[:2]:
        raise ValueError(f"{label} is UTF-16 text: save it as UTF-8")

    # Editors on Windows put it there; it is no part of the text.
    if data.startswith(codecs.BOM_UTF8):
        data = data.removeprefix(codecs.BOM_UTF8)
        say(f"{label} begins with a byte order mark, which is left out")

    # 3. Bytes that are no UTF-8 become lone surrogates, so that only the rows that hold them are bad.
    text = data.decode("utf-8", "surrogateescape")
    if suffix == ".csv":
        yield from csv_rows(text, label)
        return
    if suffix == TEXT:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                reason = not_utf8(line)
                yield f"{label}:{number}", BadRow(reason, line) if reason else line
        return

    # The contents decide between an array and lines: many a .json holds one object a line.
    is_array = text.lstrip().startswith("[")
    if is_array and not (suffix == ".jsonl" and _begins_with_a_whole_line(text)):
        yield from _array_rows(text, label)
    else:
        yield from _line_rows(text, label)


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read: that of "rows.jsonl.gz" is ".jsonl", that of "rows.tsv" ".csv"."""
    suffix = path.suffix.lower()
    if suffix == COMPRESSED:
        suffix = Path(path.stem).suffix.lower()
    return ".csv" if suffix == TABS else suffix


def has_mark(path: Path) -> bool:
    """Return True if a text file begins with a byte order mark, which is read as no part of its first column."""
    opened = gzip.open if path.suffix.lower() == COMPRESSED else open
    with opened(path, "rb") as content:
        return content.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def _bytes_of(path: Path, label: str) -> bytes:
    """Contents of a file, unpacked where it is compressed. Raises: ValueError where that fails or has no end."""
    if path.suffix.lower() != COMPRESSED:
        return path.read_bytes()
    try:
        with gzip.open(path) as content:
            data = content.read(MAX_UNPACKED + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{label} is no whole gzip file ({first_sentence(error)}): download it again") from None
    if len(data) > MAX_UNPACKED:
        raise ValueError(f"{label} unpacks to more than {MAX_UNPACKED:,} bytes: unpack it, and cut it into parts")
    return data


def _begins_with_a_whole_line(text: str) -> bool:
    """Return True if the first of several lines holds a whole array: a bad row, not the array of all rows."""
    first, _, rest = text.strip().partition("\n")
    return first.rstrip().endswith("]") and bool(rest)


def _object(pairs: list[tuple[str, object]]) -> object:
    """A JSON object, or a BadRow where it has a name twice: a dict would keep only one of the two values."""
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    repeated = twice(name for name, _ in pairs)
    return BadRow(f"an object that names {repeated!r:.40} twice", pairs)


def _line_rows(text: str, label: str) -> Iterator[Located]:
    # Not str.splitlines, which also splits at U+2028 and the like: JSON may hold them inside a text.
    lines = text.split("\n")
    if text.lstrip().partition("\n")[0].rstrip() == "{":
        raise ValueError(f"{label} is one indented JSON object: give a list of rows, or one object a line")

    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{label}:{number}"
        try:
            row = json.loads(line, object_pairs_hook=_object)
        # RecursionError: brackets nested by the thousand. ValueError: bad JSON, or a number of thousands of digits.
        except (ValueError, RecursionError) as error:
            is_cut = number == len(lines) and _is_cut(line)
            reason = "the last line is cut off" if is_cut else not_utf8(line) or _not_json(error)
            yield where, BadRow(reason, line)
        else:
            # Wrong bytes inside a text make valid JSON.
            reason = not_utf8(line)
            table = None if reason or len(lines) > 2 else _table_of_columns(row)
            if table:
                yield from ((f"{label}:row {place}", made) for place, made in enumerate(table, start=1))
            else:
                yield where, BadRow(reason, line) if reason else row


def _table_of_columns(row) -> list[dict] | None:
    """The rows of an object that holds a whole table, a list for each column; None for any other object."""
    if not isinstance(row, dict) or not row or not all(isinstance(value, list) for value in row.values()):
        return None
    counts = {len(value) for value in row.values()}
    # A single row may hold lists too: those of messages, or of one answer.
    if len(counts) != 1 or counts < {2} or any(isinstance(value[0], dict) for value in row.values()):
        return None
    return [dict(zip(row, values, strict=True)) for values in zip(*row.values(), strict=True)]


def _is_cut(line: str) -> bool:
    """Return True if an object begins on the line and does not end there, whatever the last bytes are."""
    content = line.strip()
    return content.startswith("{") and not content.endswith("}")


def _array_rows(text: str, label: str) -> Iterator[Located]:
    """Elements of one JSON array, each with the line on which it begins."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    gap = re.compile(r"[\s,]*")
    at = text.index("[") + 1
    line = 1
    counted = 0

    while True:
        # Count lines from the last element on, not from the start of the file: that would take quadratic time.
        at = gap.match(text, at).end()
        line = line + text.count("\n", counted, at)
        counted = at
        where = f"{label}:{line}"

        # The array ends with its bracket; a file that ends earlier was cut.
        if text.startswith("]", at):
            if text[at + 1 :].strip():
                yield where, BadRow("there is more text after the closed array", text[at + 1 :][:2000])
            return
        if at == len(text):
            yield where, BadRow("the file is cut off: its array is never closed")
            return

        try:
            # The decoder says where an element ends, so the next one is found whatever it holds.
            row, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            rest = text[at : at + 2000]
            reason = not_utf8(rest) or f"{_not_json(error)}; nothing after it can be read"
            yield where, BadRow(reason, rest)
            return

        # Wrong bytes inside a text make valid JSON.
        element = text[at:end]
        reason = not_utf8(element)
        yield where, BadRow(reason, element) if reason else row
        at = end


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg})"
    return "not JSON (nested or long beyond reason)"
