"""Rows of one data file (.json, .jsonl, .csv, .parquet), each with its line.

Every reader yields (where, row): `where` is "file:line" (the row's number where there are no lines), `row` the parsed
object, or a `BadRow` in place of what could not be read. Reading goes on after a bad row if the next row can be told
apart from it.
"""

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from rlhf.data.dialogues import BadRow
from rlhf.run.terminal import printable

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")

# Decoding with surrogateescape turns every byte that is no UTF-8 into one of these.
NOT_UTF8 = re.compile("[\udc80-\udcff]")

Located = tuple[str, object]


def row_or_bad(read: Callable[[], object]) -> object:
    """A row of a table, or a BadRow where Python cannot hold it: text that is no UTF-8, dates beyond the calendar."""
    try:
        return read()
    except UnicodeDecodeError as error:
        return BadRow(not_utf8(error.object.decode("utf-8", "surrogateescape")))
    except (ValueError, OverflowError) as error:
        return BadRow(f"the row cannot be read ({first_sentence(error)})")


def first_sentence(error: Exception) -> str:
    """The first sentence of a library's message, which may run over many lines and quote the bytes of a file."""
    said = str(error).strip()
    first = said.splitlines()[0] if said else type(error).__name__
    return printable(first[:200].rstrip("."))


# ---- files ----
def read_file(path: Path, label: str | None = None) -> Iterator[Located]:
    """Rows of one data file. Raises: ValueError where it is empty, of another kind, or not text at all."""
    # 1. Refuse what is no data file at all.
    label = label or str(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{label} is none of {', '.join(SUFFIXES)}: convert it to one of them")

    try:
        size = path.stat().st_size
        data = b"" if suffix == ".parquet" else path.read_bytes()
    # A failing disk's error does not name the file.
    except OSError as error:
        raise OSError(f"{label} cannot be read ({error.strerror}): check its permissions and its disk") from None

    if size == 0:
        raise ValueError(f"{label} is empty: check how it was made or downloaded")

    # 2. Parquet is binary and read piece by piece; nothing of what follows concerns it.
    if suffix == ".parquet":
        yield from _parquet_rows(path, label)
        return

    # UTF-16 without a byte order mark shows by a zero in its first two bytes, as files nearly always begin with ASCII.
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 0 in data[:2]:
        raise ValueError(f"{label} is UTF-16 text: save it as UTF-8")

    if data.startswith(codecs.BOM_UTF8):
        yield f"{label}:1", BadRow("the file begins with a byte order mark: save it as UTF-8 without BOM")
        data = data.removeprefix(codecs.BOM_UTF8)

    # 3. Bytes that are no UTF-8 become lone surrogates, so that only the rows that hold them are bad.
    text = data.decode("utf-8", "surrogateescape")
    if suffix == ".csv":
        yield from _csv_rows(text, label)
        return

    # The contents decide between an array and lines: many a .json holds one object a line.
    is_array = text.lstrip().startswith("[")
    if is_array and not (suffix == ".jsonl" and _begins_with_a_whole_line(text)):
        yield from _array_rows(text, label)
    else:
        yield from _line_rows(text, label)


def _begins_with_a_whole_line(text: str) -> bool:
    """Return True if the first of several lines holds a whole array: a bad row, not the array of all rows."""
    first, _, rest = text.strip().partition("\n")
    return first.rstrip().endswith("]") and bool(rest)


def _object(pairs: list[tuple[str, object]]) -> object:
    """A JSON object, or a BadRow where it has a name twice: a dict would keep only one of the two values."""
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    repeated = _twice(name for name, _ in pairs)
    return BadRow(f"an object that names {repeated!r:.40} twice", pairs)


def _twice(names: Iterable[str]) -> str | None:
    counts = Counter(names)
    return next((name for name, count in counts.items() if count > 1), None)


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
            yield where, BadRow(reason, line) if reason else row


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


def _csv_rows(text: str, label: str) -> Iterator[Located]:
    # The default limit of 131,072 characters a cell would stop at a long answer; `strict` reports unclosed quotes.
    csv.field_size_limit(2**31 - 1)
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines, strict=True)
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
        elif cells:
            yield where, dict(zip(header, cells, strict=True))


def _header(cells: list[str], reason: str | None, where: str) -> list[str]:
    """Column names. Raises: ValueError where one is no UTF-8 or stands twice (unnamed columns may be many)."""
    twice = _twice(name for name in cells if name)
    if reason or twice is not None:
        raise ValueError(f"{where}: {reason or f'column name {twice!r:.40} stands twice: rename one of them'}")
    return cells


def _parquet_rows(path: Path, label: str) -> Iterator[Located]:
    number = 0
    for batch in _parquet_batches(path, label):
        if twice := _twice(batch.schema.names):
            raise ValueError(f"{label}: column name {twice!r:.40} stands twice: rename one of them")
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


def not_utf8(text: str) -> str | None:
    """The reason why text decoded with surrogateescape was no UTF-8, with a hint at GB18030; None if it was UTF-8."""
    match = NOT_UTF8.search(text)
    if not match:
        return None

    reason = f"byte 0x{ord(match[0]) - 0xDC00:02x} is not UTF-8"
    # A short row of Chinese UTF-8 with one wrong byte often decodes as GB18030 by chance: most of it is whole then.
    whole = sum("\u0800" <= character < "\ud800" for character in text)

    try:
        # Incremental, because `text` may end within a character.
        codecs.getincrementaldecoder("gb18030")().decode(text.encode("utf-8", "surrogateescape"))
    except UnicodeError:
        return f"{reason}: the text is damaged"

    if whole > len(NOT_UTF8.findall(text)):
        return f"{reason}: the text is damaged"
    return f"{reason} but reads as GB18030: convert the file with iconv -f GB18030 -t UTF-8"


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg})"
    return "not JSON (nested or long beyond reason)"
