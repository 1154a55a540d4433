"""Text in a terminal: the width of Chinese characters, wrapping by width, no control characters from a model."""

import re
import unicodedata
from collections.abc import Iterator


def display_width(text: str) -> int:
    """Terminal columns of `text`: two for a wide character, none for a combining one."""
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def printable(text: str) -> str:
    """`text` with control characters other than a new line made visible: an answer must not steer the terminal."""
    return "".join(c if c == "\n" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text.expandtabs(4))


def wrap(text: str, columns: int) -> list[str]:
    """Lines of at most `columns` terminal columns; Chinese breaks anywhere, a Latin word stays whole where it fits."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for piece in _pieces(paragraph, columns):
            if line and display_width(line) + display_width(piece) > columns:
                lines.append(line.rstrip())
                line = piece.lstrip()
            else:
                line += piece
        lines.append(line.rstrip())
    return lines


def _pieces(paragraph: str, columns: int) -> Iterator[str]:
    for piece in re.findall(r"[!-~]+|[^!-~]", paragraph):
        yield from [piece] if display_width(piece) <= columns else piece


def labelled(rows: list[tuple[str, str]], columns: int) -> list[str]:
    """Lines of a two-column block: each row's label on the left, its text wrapped on the right.

    Args:
        rows: (label, text) pairs; an empty label goes on with the row above. columns: width of the terminal.
    """
    left = max((display_width(label) for label, _ in rows), default=0)
    lines = []
    for label, text in rows:
        for line in wrap(printable(text), max(columns - left - 5, 20)):
            lines.append(f"  {label}{' ' * (left - display_width(label))} │ {line}".rstrip())
            label = ""
    return lines
