"""The comparison table as Markdown, CSV and terminal text. Columns are versions, rows are prompts."""

import csv
import html
import re
import shutil
from itertools import product
from pathlib import Path
from statistics import mean

from rlhf.compare.answers import Answer
from rlhf.run.terminal import labelled, printable

# Version name -> its answers, one for each prompt.
Columns = dict[str, list[Answer]]


def summarize(columns: Columns) -> list[list[str]]:
    """A header and a line a version: mean tokens, empty and cut answers; mean score and win rate where known."""
    header = ["version", "mean tokens", "empty", "cut"]
    lines = []
    for name, cells in columns.items():
        length = mean(cell.tokens for cell in cells)
        empty = sum(not cell.text for cell in cells)
        cut = sum(not cell.ended for cell in cells)
        line = [name, f"{length:.1f}", str(empty), str(cut)]

        scores = [cell.score for cell in cells if cell.score is not None]
        if scores:
            line.append(f"{mean(scores):.3f}")
            header = [*header[:4], "mean score"]
        if scores and len(columns) > 1:
            line.append(f"{win_rate(name, columns):.0%}")
            header.append("win rate")
        lines.append(line)
    return [header, *lines]


def win_rate(name: str, columns: Columns) -> float:
    """Share of wins of a version by score, against each other version on each prompt; a tie counts half."""
    wins = []
    for other, cells in columns.items():
        if other == name:
            continue
        for ours, theirs in zip(columns[name], cells, strict=True):
            wins.append(0.5 if ours.score == theirs.score else float(ours.score > theirs.score))
    return mean(wins)


def best_scores(row: dict[str, Answer]) -> set[str]:
    """Versions with the highest score among the answers to one prompt; none without scores or without a second."""
    scores = {name: cell.score for name, cell in row.items() if cell.score is not None}
    if len(scores) < 2:
        return set()
    highest = max(scores.values())
    return {name for name, score in scores.items() if score == highest}


def write_markdown(path: Path, prompts: list[str], columns: Columns, made: list[tuple[str, str]]) -> None:
    """Write the table and its summary in Markdown; whatever would be markup in an answer is escaped."""

    # Texts are not ours: neither HTML nor Markdown in them may take effect.
    def plain(text: str) -> str:
        text = html.escape(printable(text), quote=False)
        text = re.sub(r"([\\|`*_\[\]~#])", r"\\\1", text)
        # A line end would end the row of the table.
        return text.replace("\n", "<br>")

    # An empty cell would look like a mistake of the table.
    def answer(cell: Answer) -> str:
        return f"{plain(cell.text) or '*(empty)*'}<br>*{cell.note()}*"

    # The table: a row for each prompt, a cell for each version.
    titles = ["prompt", *map(plain, columns)]
    lines = ["# Comparison", "", _line(titles), _line(["---"] * len(titles))]
    for row, prompt in enumerate(prompts):
        cells = [answer(cells[row]) for cells in columns.values()]
        lines.append(_line([plain(prompt), *cells]))

    # Titles of the summary are ours, so only the lines below them are escaped.
    header, *versions = summarize(columns)
    lines += ["", _line(header), _line(["---"] * len(header))]
    for version in versions:
        lines.append(_line([plain(cell) for cell in version]))

    # What the table was made with, so that it can be made again.
    lines.append("")
    lines += [f"- {plain(name)}: {plain(value)}" for name, value in made]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_csv(path: Path, prompts: list[str], columns: Columns) -> None:
    """Write the table for programs: the texts, then tokens, ended and (if known) score of each version.

    A spreadsheet would run a text that begins like a formula: an apostrophe in front of it keeps it a text.
    """
    # Either every answer has a score or none has.
    extras = ["tokens", "ended"]
    first = next(iter(columns.values()))
    if first[0].score is not None:
        extras.append("score")

    # The csv module writes its own line ends.
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        titles = [f"{name}/{extra}" for extra, name in product(extras, columns)]
        writer.writerow(["prompt", *columns, *titles])
        for number, prompt in enumerate(prompts):
            cells = [cells[number] for cells in columns.values()]
            texts = [no_formula(cell.text) for cell in cells]
            numbers = [getattr(cell, extra) for extra, cell in product(extras, cells)]
            writer.writerow([no_formula(prompt), *texts, *numbers])


def no_formula(text: str) -> str:
    """`text` as a spreadsheet takes it for a text."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def print_table(prompts: list[str], columns: Columns) -> None:
    """Print a block for each prompt, with a row for each version: readable at any width of the terminal."""
    for number, prompt in enumerate(prompts):
        print(f"\n[{number + 1}/{len(prompts)}] {printable(prompt)}")
        print_answers({name: cells[number] for name, cells in columns.items()})
    print()

    # As wide as the longest title, "mean tokens".
    rows = []
    for name, *numbers in summarize(columns):
        rows.append((name, " ".join(f"{cell:>11}" for cell in numbers)))
    _print_labelled(rows)


def print_answers(cells: dict[str, Answer]) -> None:
    """Print the answers of some versions to one prompt."""
    rows = []
    for name, cell in cells.items():
        rows.append((name, cell.text or "(empty)"))
        rows.append(("", f"({cell.note()})"))
    _print_labelled(rows)


def _print_labelled(rows: list[tuple[str, str]]) -> None:
    # The size that is given counts where the output is no terminal.
    width = shutil.get_terminal_size((100, 40)).columns
    print("\n".join(labelled(rows, width)))


def wins_in_words(columns: Columns) -> str | None:
    """On which share of the prompts the last version scores above the first; None without scores or with one version.

    Two equal scores count as half a win.
    """
    first = next(iter(columns))
    last = next(reversed(columns))
    pairs = [(a.score, b.score) for a, b in zip(columns[first], columns[last], strict=True)]
    if first == last or not pairs or any(None in pair for pair in pairs):
        return None
    wins = sum(1.0 if after > before else 0.5 if after == before else 0.0 for before, after in pairs)
    return f"{last} scores above {first} on {wins / len(pairs):.0%} of {len(pairs)} prompts"
