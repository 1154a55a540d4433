"""Rows with their places, and what is wrong with those that cannot be read: for the readers of all kinds of files."""

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from rlhf.artefacts.files import TOKEN
from rlhf.data.dialogues import BadRow
from rlhf.run.terminal import printable

# Decoding with surrogateescape turns every byte that is no UTF-8 into one of these.
NOT_UTF8 = re.compile("[\udc80-\udcff]")

# What the text of a file in the old Chinese encoding is told; one row of it speaks for all.
GB18030_HINT = "but reads as GB18030: convert the file with iconv -f GB18030 -t UTF-8"

# (place, row): "file:line", and the parsed object or a BadRow.
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
    # Without a full stop, as it goes into a sentence of ours.
    return printable(first[:200].rstrip("."))


def twice(names: Iterable[str]) -> str | None:
    """The first name that stands twice, or None."""
    counts = Counter(names)
    return next((name for name, count in counts.items() if count > 1), None)


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
    return f"{reason} {GB18030_HINT}"


def write_bad_rows(path: Path, rows: list[dict]) -> None:
    """Write malformed rows with their places and reasons, a JSON object a line."""
    # Under another name first: a reader never sees half of the rows.
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{TOKEN}{os.getpid()}")
    part.write_text("".join(_as_line(row) for row in rows), encoding="utf-8")
    os.replace(part, path)


def _as_line(row: dict) -> str:
    try:
        return json.dumps(row, default=str) + "\n"
    # Writing recurses a little deeper than reading did.
    except RecursionError:
        return _as_line({**row, "row": "brackets nested by the thousand"})
