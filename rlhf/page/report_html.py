"""Pieces of HTML: foreign text escaped, words in both languages, tables, sections."""

import html
import math

from rlhf.page.report_data import Words
from rlhf.run.terminal import printable

# Characters of a value in a table, and of a sample: a mail holds no book.
MAX_VALUE = 600
MAX_TEXT = 2000


def text(foreign: str, most: int = MAX_TEXT) -> str:
    """Foreign text as HTML: control characters visible, markup without effect, a very long text cut."""
    shown = foreign if len(foreign) <= most else foreign[:most] + " …"
    # Made printable before it is escaped: what is put in place of a control character has to pass as text too.
    return html.escape(printable(shown))


def both(words: Words) -> str:
    """Words in both languages, of which the page shows one."""
    english, chinese = words
    # A name or a number is the same in both languages, and stands once.
    if english == chinese:
        return text(english)
    return f'<span class="en" lang="en">{text(english)}</span><span class="zh" lang="zh-CN">{text(chinese)}</span>'


def short(value: float) -> str:
    """A number in few characters."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """A table of cells that are HTML by now; it scrolls by itself where the page is narrow."""
    lines = []
    if head:
        lines.append(_row("th", head))
    lines += [_row("td", cells) for cells in rows]
    named = f' class="{kind}"' if kind else ""
    return f'<div class="scroll"><table{named}>{"".join(lines)}</table></div>'


def _row(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def section(name: str, title: Words, body: str) -> str:
    """A part of the page under its own heading; "" where it would be empty."""
    return f'<section id="{name}"><h2>{both(title)}</h2>\n{body}</section>\n' if body else ""


def folded(title: Words, body: str) -> str:
    """A part that a reader opens; "" where it would be empty."""
    return f"<details><summary>{both(title)}</summary>\n{body}</details>\n" if body else ""


def items(lines: list[Words], kind: str = "") -> str:
    """A list of sentences; "" for none."""
    named = f' class="{kind}"' if kind else ""
    return f"<ul{named}>{''.join(f'<li>{both(line)}</li>' for line in lines)}</ul>\n" if lines else ""
