"""Text in a terminal: the width of Chinese characters, wrapping by width, control characters made visible."""

import io
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


def display_width(text: str) -> int:
    """Terminal columns of `text`: two for a wide character, none for a combining one."""
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    # Combining marks and format characters take no column of their own.
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    # Wide and full-width characters.
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


# Marks that turn the direction of writing: behind one of them a text shows in another order than it has.
BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """Foreign text, safe to show: what would steer a terminal, a page or the order of letters is made visible.

    All output of text that is not ours goes through here: answers, prompts, file names, contents of files.
    """
    # A tab is a control character, too, but only stands for spaces.
    return "".join(map(_shown, text.expandtabs(4)))


def _shown(character: str) -> str:
    # Control characters but for the new line; separators of lines and paragraphs; half a surrogate pair.
    unsafe = character in BIDI or unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs")
    return "\ufffd" if unsafe and character != "\n" else character


# Characters of a sentence on standard error, at most.
MAX_SENTENCE = 2000


def shortened(text: str) -> str:
    """`text` without its middle where it is longer than a sentence: a value may be pages long."""
    return text if len(text) <= MAX_SENTENCE else f"{text[: MAX_SENTENCE // 2]} ... {text[-MAX_SENTENCE // 2 :]}"


@contextmanager
def printable_errors():
    """Let what the block writes to standard error through at its end only, made printable: argparse repeats values."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    finally:
        sys.stderr.write(shortened(printable(said.getvalue())))


def wrap(text: str, columns: int) -> list[str]:
    """Lines of at most `columns` terminal columns; Chinese breaks anywhere, a Latin word stays whole where it fits."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for piece in _pieces(paragraph, columns):
            width = display_width(line) + display_width(piece)
            # A piece that is alone on its line may be too wide: it was cut before as far as it can be.
            if line and width > columns:
                # The space between two words is lost where the line breaks there.
                lines.append(line.rstrip())
                line = piece.lstrip()
            else:
                line += piece
        lines.append(line.rstrip())
    return lines


def _pieces(paragraph: str, columns: int) -> Iterator[str]:
    """Parts of a line that stay whole: a Latin word, or one other character; a word too long for a line is cut."""
    # From ! to ~ is all of ASCII that leaves a mark, so a run of it is a word.
    for piece in re.findall(r"[!-~]+|[^!-~]", paragraph):
        if display_width(piece) <= columns:
            yield piece
        else:
            yield from piece


def columns_here() -> int:
    """Width of the terminal; 100 where the output goes into a file."""
    return shutil.get_terminal_size((100, 24)).columns


def labelled(rows: list[tuple[str, str]], columns: int) -> list[str]:
    """Lines of a two-column block: each row's label on the left, its text wrapped on the right.

    Args:
        rows: (label, text) pairs; an empty label goes on with the row above. columns: width of the terminal.
    """
    left = max((display_width(label) for label, _ in rows), default=0)
    # Five columns are taken by the margin and the rule; a very long label must leave some room for the text.
    right = max(columns - left - 5, 20)

    lines = []
    for label, text in rows:
        for line in wrap(printable(text), right):
            # `ljust` would count a Chinese character as one column.
            gap = " " * (left - display_width(label))
            lines.append(f"  {label}{gap} │ {line}".rstrip())
            # Only the first line of a text has the label.
            label = ""
    return lines
