"""Files for tests/long/fuzz_data.py: rows written in every format, and damage to their bytes.

Every function takes its random source, and a file depends on that alone: the order of the draws must not change.
"""

import csv
import io
import json
import random
import re
from itertools import chain
from pathlib import Path

import pyarrow
import pyarrow.parquet
from fuzz_rows import HUGE, NESTED, ROW_DAMAGE, SHAPES

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


# ---- writing ----
def _cell(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _named(rows: list) -> list[dict]:
    """Rows as a table must have them; a row that is no object becomes one of a single cell."""
    return [row if isinstance(row, dict) else {"prompt": _cell(row)} for row in rows]


def _as_json(rows: list, suffix: str, draw: random.Random) -> bytes:
    # One array, on one line or on many, or an object a line.
    ascii_only = draw.random() < 0.5
    if suffix == ".json" and draw.random() < 0.6:
        indent = draw.choice((None, 1))
        text = json.dumps(rows, ensure_ascii=ascii_only, indent=indent)
    else:
        lines = [json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows]
        text = "".join(lines)

    # A name that stands in an object twice: json.loads would keep the last one without a word.
    if draw.random() < 0.1:
        braces = [brace.end() for brace in re.finditer(r"\{", text)]
        at = draw.choice(braces or [0])
        text = text[:at] + '"prompt": "twice", ' * draw.randint(1, 2) + text[at:]

    # Around Python's own limit of recursion, and far beyond it.
    depth = draw.choice((2, 500, draw.randint(900, 1000), 5000))
    text = text.replace(NESTED, "[" * depth + "]" * depth)
    text = text.replace(HUGE, "9" * draw.choice((400, 5000)))
    return text.encode("utf-8", "surrogatepass")


def _as_csv(rows: list, draw: random.Random) -> bytes:
    rows = _named(rows)
    out = io.StringIO(newline="")
    names = list(dict.fromkeys(chain.from_iterable(rows)))
    writer = csv.writer(out)

    # One header of ten has a name twice, one row of ten a cell too many.
    writer.writerow(names + draw.choice([[]] * 9 + [names[:1]]))
    for row in rows:
        extra = draw.choice([[]] * 9 + [["more"]])
        cells = [_cell(row.get(name, "")) for name in names]
        writer.writerow(cells + extra)
    return out.getvalue().encode("utf-8", "surrogatepass")


def _as_parquet(rows: list, draw: random.Random) -> bytes:
    try:
        return _table_bytes(pyarrow.Table.from_pylist(_named(rows)), draw)
    except (pyarrow.ArrowException, UnicodeError, OverflowError, TypeError):
        # A column has one type. Values that no type holds together are written as bytes, odd characters and all.
        damaged = [_as_bytes(row) for row in _named(rows)]
        return _table_bytes(pyarrow.Table.from_pylist(damaged), draw)


def _as_bytes(row: dict) -> dict[str, bytes]:
    cells = [_cell(value) for value in row.values()]
    return {str(n): cell.encode("utf-8", "surrogatepass") for n, cell in enumerate(cells)}


def _table_bytes(table: pyarrow.Table, draw: random.Random) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(_with_odd_types(table, draw), out)
    return out.getvalue()


def _with_odd_types(table: pyarrow.Table, draw: random.Random) -> pyarrow.Table:
    """Add, now and then, a time no calendar has, bytes under a type that says they are text, a name that is there."""
    rows = len(table)
    if draw.random() < 0.1:
        moments = pyarrow.array([2**62] * rows, pyarrow.timestamp("us", "Moon/Mare"))
        table = table.append_column("when", moments)

    # pyarrow checks no buffer that it is given.
    if draw.random() < 0.1:
        encoding = draw.choice(("gb18030", "utf-8"))
        raw = pyarrow.array(["问题".encode(encoding)] * rows, pyarrow.binary())
        text = pyarrow.Array.from_buffers(pyarrow.utf8(), len(raw), raw.buffers())
        table = table.append_column("text", text)

    if draw.random() < 0.05 and table.num_columns:
        table = table.append_column(table.column_names[0], table.column(0))
    return table


# ---- damage to bytes ----
# Pieces of JSON and CSV, halves of characters, and text that looks like nothing.
PIECES = (
    b"", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"\n\n", b"\xff", b"\xe4\xbd", b"\x00",
    b"null", b"\\ud800", b"\\u0000", b"NaN", b"-Infinity", b"1e999", b"\xef\xbb\xbf", "\u200b".encode(),
    "\u2028".encode(), b'"a":1,',
)  # fmt: skip
ENCODINGS = ("gb18030", "utf-16", "utf-16-le", "utf-32", "utf-8-sig", "big5", "latin-1", "utf-7")


def _flip_bytes(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 5)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def _insert_a_piece(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    piece = draw.choice(PIECES)
    times = draw.choice((1, 1, 1, 50))
    rest = at + draw.randint(0, 3)
    return data[:at] + piece * times + data[rest:]


def _copy_a_part(data: bytes, draw: random.Random) -> bytes:
    ends = [draw.randrange(len(data) + 1) for _ in range(2)]
    first, last = sorted(ends)
    at = draw.randrange(len(data) + 1)
    return data[:at] + data[first:last] + data[at:]


def _encode_otherwise(data: bytes, draw: random.Random) -> bytes:
    text = data.decode("utf-8", "replace")
    return text.encode(draw.choice(ENCODINGS), "replace")


def _drop_the_first_line(data: bytes, draw: random.Random) -> bytes:
    return data.partition(b"\n")[2]


def _wrap_in_an_object(data: bytes, draw: random.Random) -> bytes:
    return b'{"data": ' + draw.choice((b"", b"\n")) + data + b"}"


def _shuffle_lines(data: bytes, draw: random.Random) -> bytes:
    lines = data.split(b"\n")
    draw.shuffle(lines)
    return b"\n".join(lines)


def _join_lines(data: bytes, draw: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    between = draw.choice((b"", b" ", b"\r"))
    return b"\n".join(lines[:at]) + between + b"\n".join(lines[at:])


def _end_lines_otherwise(data: bytes, draw: random.Random) -> bytes:
    ending = draw.choice((b"\r\n", b"\r", b"\n\n", b"\x0b"))
    return data.replace(b"\n", ending)


def _add_an_end(data: bytes, draw: random.Random) -> bytes:
    ends = (b"garbage", b"[]", b"{}", b"\x00" * 100, data, b"\n" * 9, b'{"prompt": "cut', b"\xe4")
    return data + draw.choice(ends)


BYTE_DAMAGE = (
    _flip_bytes, _truncate, _insert_a_piece, _copy_a_part, _encode_otherwise, _shuffle_lines, _join_lines,
    _end_lines_otherwise, _add_an_end, _drop_the_first_line, _wrap_in_an_object,
)  # fmt: skip


# ---- a whole file ----
def write_file(path: Path, shape: str, draw: random.Random) -> int | None:
    """Write rows of `shape` in the format of the path's suffix (now and then of another), damaged a little.

    Returns: how many rows there are to read; None where damage to the bytes may have changed that.
    """
    # Rows, and damage to them, which leaves their number known.
    suffix = path.suffix if draw.random() < 0.95 else draw.choice(SUFFIXES)
    rows: list = [SHAPES[shape](draw) for _ in range(draw.randint(1, 12))]
    for _ in range(draw.choice((0, 0, 1, 1, 2, 4))):
        damage_rows = draw.choice(ROW_DAMAGE)
        damage_rows(rows, draw)

    # A file of another format than its name says is damage, too.
    if suffix == ".csv":
        data = _as_csv(rows, draw)
    elif suffix == ".parquet":
        data = _as_parquet(rows, draw)
    else:
        data = _as_json(rows, suffix, draw)

    # Almost any damage to the bytes of a Parquet file makes all of it unreadable.
    times = draw.choice((0, 0, 0, 1, 1, 2) if suffix != ".parquet" else (0, 0, 0, 1))
    for _ in range(times):
        if data:
            damage_bytes = draw.choice(BYTE_DAMAGE)
            data = damage_bytes(data, draw)

    path.write_bytes(data)
    if times or suffix != path.suffix:
        return None
    return len(rows)
