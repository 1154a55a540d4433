"""The comparison table as Markdown, HTML, CSV and terminal text. Columns are versions, rows are prompts."""

import csv
import html
import re
import shutil
from itertools import product
from pathlib import Path
from statistics import mean

from rlhf.compare.answers import Answer
from rlhf.run.terminal import labelled, printable

# Version name -> its answers, one a prompt.
Columns = dict[str, list[Answer]]


def summarize(columns: Columns) -> list[list[str]]:
    """A header and a line a version: mean tokens, empty and cut answers, mean score where there is one."""
    header = ["version", "mean tokens", "empty", "cut"]
    lines = []
    for name, cells in columns.items():
        counts = [sum(not cell.text for cell in cells), sum(not cell.ended for cell in cells)]
        lines.append([name, f"{mean(cell.tokens for cell in cells):.1f}", *map(str, counts)])
        scores = [cell.score for cell in cells if cell.score is not None]
        if scores:
            header = [*header[:4], "mean score"]
            lines[-1].append(f"{mean(scores):.3f}")
    return [header, *lines]


def write_markdown(path: Path, prompts: list[str], columns: Columns, made: list[tuple[str, str]]) -> None:
    """The table and its summary in Markdown; whatever would be markup in an answer is escaped."""

    def plain(text: str) -> str:
        text = re.sub(r"([\\|`*_\[\]~#])", r"\\\1", html.escape(printable(text), quote=False))
        return text.replace("\n", "<br>")

    lines = ["# Comparison", "", _line(["prompt", *map(plain, columns)]), _line(["---"] * (len(columns) + 1))]
    for row, prompt in enumerate(prompts):
        cells = [cells[row] for cells in columns.values()]
        lines.append(
            _line([plain(prompt)] + [f"{plain(cell.text) or '*(empty)*'}<br>*{cell.note()}*" for cell in cells])
        )
    summary = summarize(columns)
    lines += ["", _line(summary[0]), _line(["---"] * len(summary[0]))]
    lines += [_line(list(map(plain, line))) for line in summary[1:]]
    lines += [""] + [f"- {plain(name)}: {plain(value)}" for name, value in made]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>Comparison</title><style>
body {{ font-family: sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; margin-bottom: 2em; }}
th, td {{ border: 1px solid #bbb; padding: 0.5em; vertical-align: top; text-align: left; }}
td {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
small {{ display: block; color: #666; }}
</style></head><body>
<h1>Comparison</h1>
{tables}
<ul>
{made}
</ul>
</body></html>
"""


def write_html(path: Path, prompts: list[str], columns: Columns, made: list[tuple[str, str]]) -> None:
    """Write the table as one page without scripts or links; every text is escaped."""

    def row(tag: str, cells: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    def plain(text: str) -> str:
        return html.escape(printable(text))

    table = [row("th", ["prompt", *map(plain, columns)])]
    for number, prompt in enumerate(prompts):
        cells = [cells[number] for cells in columns.values()]
        texts = [f"{plain(cell.text) or '<em>(empty)</em>'}<small>{cell.note()}</small>" for cell in cells]
        table.append(row("td", [plain(prompt), *texts]))
    summary = summarize(columns)
    numbers = [row("th", summary[0])] + [row("td", list(map(plain, line))) for line in summary[1:]]
    tables = "\n".join("<table>\n" + "\n".join(rows) + "\n</table>" for rows in (table, numbers))
    items = "\n".join(f"<li>{plain(name)}: {plain(value)}</li>" for name, value in made)
    path.write_text(PAGE.format(tables=tables, made=items), encoding="utf-8")


def write_csv(path: Path, prompts: list[str], columns: Columns) -> None:
    """Write the table for programs: texts unchanged, then tokens, ended and (if known) score of each version."""
    extras = ["tokens", "ended"]
    if next(iter(columns.values()))[0].score is not None:
        extras.append("score")
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        titles = [f"{name}/{extra}" for extra, name in product(extras, columns)]
        writer.writerow(["prompt", *columns, *titles])
        for number, prompt in enumerate(prompts):
            cells = [cells[number] for cells in columns.values()]
            numbers = [getattr(cell, extra) for extra, cell in product(extras, cells)]
            writer.writerow([prompt, *(cell.text for cell in cells), *numbers])


def print_table(prompts: list[str], columns: Columns) -> None:
    """One block a prompt, one row a version: readable at any width of the terminal."""
    for number, prompt in enumerate(prompts):
        print(f"\n[{number + 1}/{len(prompts)}] {printable(prompt)}")
        print_answers({name: cells[number] for name, cells in columns.items()})
    print()
    width = shutil.get_terminal_size((100, 40)).columns
    rows = [(name, " ".join(f"{cell:>11}" for cell in numbers)) for name, *numbers in summarize(columns)]
    print("\n".join(labelled(rows, width)))


def print_answers(cells: dict[str, Answer]) -> None:
    """Answers of some versions to one prompt."""
    width = shutil.get_terminal_size((100, 40)).columns
    rows = []
    for name, cell in cells.items():
        rows += [(name, cell.text or "(empty)"), ("", f"({cell.note()})")]
    print("\n".join(labelled(rows, width)))
