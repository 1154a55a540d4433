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
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from rlhf.data.dialogues import BadRow
from rlhf.data.located import Located, first_sentence, not_utf8, twice
from rlhf.data.tables import csv_rows, parquet_rows

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

    # What a file is shows at its beginning, but for Parquet, which is checked by its reader.
    begin = b"" if suffix == ".parquet" else _begin_of(path, label)
    if path.stat().st_size == 0:
        raise ValueError(f"{label} is empty: check how it was made or downloaded")
    if begin.startswith(LFS_POINTER):
        raise ValueError(f"{label} is a Git LFS pointer, not the data: run git lfs pull where it was cloned")

    # 2. Parquet is binary and read piece by piece; nothing of what follows concerns it.
    if suffix == ".parquet":
        yield from parquet_rows(path, label)
        return

    # UTF-16 without a byte order mark shows by a zero in its first two bytes, as files nearly always begin with ASCII.
    if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 0 in begin[:2]:
        raise ValueError(f"{label} is UTF-16 text: save it as UTF-8")

    # 3. Lines are read one by one, whatever the size of the file.
    if suffix == TEXT:
        for number, line in enumerate(_lines(path, label), start=1):
            if line.strip():
                reason = not_utf8(line)
                yield f"{label}:{number}", BadRow(reason, line) if reason else line
        return

    # The contents decide between an array and lines: many a .json holds one object a line.
    is_array = begin.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape").lstrip().startswith("[")
    if suffix != ".csv" and not is_array:
        yield from _line_rows(_lines(path, label), label)
        return

    # 4. A table or an array is one text: a cell or an element may span lines.
    text = "\n".join(_lines(path, label))
    if suffix == ".csv":
        yield from csv_rows(text, label)
    elif suffix == ".jsonl" and _begins_with_a_whole_line(text):
        yield from _line_rows(iter(text.split("\n")), label)
    else:
        yield from _array_rows(text, label)


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


def _begin_of(path: Path, label: str) -> bytes:
    """The bytes of a file up to the end of its first line that is not blank, unpacked where it is compressed."""
    begin = b""
    for line in _raw_lines(path, label):
        is_blank = not line.removeprefix(b"" if begin else codecs.BOM_UTF8).decode("utf-8", "surrogateescape").strip()
        begin += line
        if not is_blank:
            break
    return begin


def _lines(path: Path, label: str) -> Iterator[str]:
    """The lines of a file without their ends; a file that ends with a new line has an empty last line.

    Only "\\n" ends a line: str.splitlines also splits at U+2028 and the like, which JSON may hold inside a text. Bytes
    that are no UTF-8 become lone surrogates, so that only the rows that hold them are bad.
    """
    line = b"\n"
    for number, line in enumerate(_raw_lines(path, label)):
        # Editors on Windows put a mark at the start; it is no part of the text.
        content = line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
        # A carriage return stays: JSON takes it for space, and csv for a part of a line's end.
        yield content.removesuffix(b"\n").decode("utf-8", "surrogateescape")
    if line.endswith(b"\n"):
        yield ""


def _raw_lines(path: Path, label: str) -> Iterator[bytes]:
    """The lines of a file, unpacked where it is compressed. Raises: ValueError or OSError that name the file."""
    unpacked = 0
    is_packed = path.suffix.lower() == COMPRESSED
    try:
        with path.open("rb") as file, gzip.open(file) if is_packed else file as content:
            # A line is read up to a limit: a small file may unpack to one without end.
            while line := content.readline(MAX_UNPACKED + 1):
                unpacked += len(line)
                if is_packed and unpacked > MAX_UNPACKED:
                    raise ValueError(
                        f"{label} unpacks to more than {MAX_UNPACKED:,} bytes: unpack it, and cut it into parts"
                    )
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{label} is no whole gzip file ({first_sentence(error)}): download it again") from None
    # A failing disk's error does not name the file.
    except OSError as error:
        raise OSError(f"{label} cannot be read ({error.strerror}): check its permissions and its disk") from None


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


def _line_rows(lines: Iterator[str], label: str) -> Iterator[Located]:
    # Two lines ahead are known: the last one may be cut off, and a file of one may hold a whole table.
    ahead = deque(islice(lines, 3))
    # A table of columns is one line, so only a file of one or two is looked at as such.
    is_long = len(ahead) > 2
    is_first = True
    number = 0
    while ahead:
        line = ahead.popleft()
        ahead.extend(islice(lines, 1))
        number += 1
        if not line.strip():
            continue
        if is_first and line.strip() == "{":
            raise ValueError(f"{label} is one indented JSON object: give a list of rows, or one object a line")
        is_first = False
        where = f"{label}:{number}"
        try:
            row = json.loads(line, object_pairs_hook=_object)
        # RecursionError: brackets nested by the thousand. ValueError: bad JSON, or a number of thousands of digits.
        except (ValueError, RecursionError) as error:
            # Only the last line can have lost its end.
            is_cut = not ahead and _is_cut(line)
            reason = "the last line is cut off" if is_cut else not_utf8(line) or _not_json(error)
            yield where, BadRow(reason, line)
        else:
            # Wrong bytes inside a text make valid JSON.
            reason = not_utf8(line)
            table = None if reason or is_long else _table_of_columns(row)
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
    if len(counts) != 1 or min(counts) < 2 or any(isinstance(value[0], dict) for value in row.values()):
        return None
    return [dict(zip(row, values, strict=True)) for values in zip(*row.values(), strict=True)]


def _is_cut(line: str) -> bool:
    """Return True if an object begins on the line and does not end there, whatever the last bytes are."""
    content = line.strip()
    return content.startswith("{") and not content.endswith("}")


def _array_rows(text: str, label: str) -> Iterator[Located]:
    """Elements of one JSON array, each with the line on which it begins."""
    # Element by element, because json.loads gives all of them or none, and no lines.
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
