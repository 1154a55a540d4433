"""The comparison as one HTML page: a table on a wide screen, a card a prompt on a narrow one; light and dark."""

import html
import re
from pathlib import Path

from rlhf.compare.answers import Answer
from rlhf.compare.tables import Columns, best_scores, summarize
from rlhf.run.terminal import printable

# Style braces are doubled for `format`. No address and no script in it: the page opens without a network.
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Comparison</title><style>
:root {{ color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --line: #c4c4c4; --soft: #5b5b5b; --head: #f1f3f5;
  --best: #e3f1ea; --mark: #00674b; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e6e6; --paper: #17191c; --line: #454a50; --soft: #a9adb2;
  --head: #22262b; --best: #17332a; --mark: #6fd3ae; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 1.5rem; color: var(--ink); background: var(--paper); }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
p, li {{ color: var(--soft); max-width: 70ch; overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; }}
th, td {{ border: 1px solid var(--line); padding: .5rem .65rem; vertical-align: top; text-align: left; }}
th {{ background: var(--head); }}
.answers {{ width: 100%; table-layout: fixed; }}
.answers td {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
.answers td:first-child {{ font-weight: 600; }}
.best {{ background: var(--best); }} .best small {{ color: var(--mark); font-weight: 600; }}
small {{ display: block; margin-top: .25rem; color: var(--soft); }}
.summary td:not(:first-child) {{ text-align: right; font-variant-numeric: tabular-nums; }}
@media (max-width: 700px) {{
  body {{ margin: .75rem; }}
  .answers, .answers tbody, .answers tr, .answers td {{ display: block; width: auto; }}
  .answers tr:first-child {{ display: none; }}
  .answers tr {{ border: 1px solid var(--line); border-radius: .5rem; margin: 0 0 1rem; overflow: hidden; }}
  .answers td {{ border: 0; border-top: 1px solid var(--line); }}
  .answers td:first-child {{ border-top: 0; background: var(--head); }}
  .answers td[data-version]::before {{ content: attr(data-version); display: block; font-size: .8rem;
    font-weight: 600; color: var(--soft); }}
  .summary {{ font-size: .8rem; }} .summary th, .summary td {{ padding: .3rem; }}
}}
</style></head><body>
<h1>Comparison</h1>
<p>{legend}</p>
<table class="answers">
{answers}
</table>
<h2>Summary</h2>
<table class="summary">
{summary}
</table>
<h2>Made with</h2>
<ul>
{made}
</ul>
</body></html>
"""
LEGEND = "Each prompt was answered once by every version, with the same random numbers."
SCORED = " ★ marks the answer that the reward model scores highest."
WINS = " Win rate: against each other version on each prompt, by score; a tie counts half."
CHINESE = re.compile(r"[\u3400-\u9fff]")


def write_html(path: Path, prompts: list[str], columns: Columns, made: list[tuple[str, str]]) -> None:
    """Write the table, the summary and what they were made with; every text is escaped."""
    answers = [_row("th", ["prompt", *map(_plain, columns)])]
    for number, prompt in enumerate(prompts):
        row = {name: cells[number] for name, cells in columns.items()}
        answers.append(_answers_row(prompt, row))

    # The summary has numbers of ours, but also the names of the versions, which are not.
    header, *versions = summarize(columns)
    summary = [_row("th", header)]
    for version in versions:
        summary.append(_row("td", [_plain(cell) for cell in version]))

    legend = LEGEND
    if "mean score" in header:
        legend += SCORED
    if "win rate" in header:
        legend += WINS
    items = [f"<li>{_plain(name)}: {_plain(value)}</li>" for name, value in made]
    page = PAGE.format(legend=legend, answers="\n".join(answers), summary="\n".join(summary), made="\n".join(items))
    path.write_text(page, encoding="utf-8")


def _answers_row(prompt: str, row: dict[str, Answer]) -> str:
    """A prompt and its answers, the best score marked; the version's name is in each cell, for the cards."""
    best = best_scores(row)
    cells = [f"<td{_language(prompt)}>{_plain(prompt)}</td>"]
    for name, cell in row.items():
        # By colour and by a star: not everybody tells the colours apart, and a printer has none.
        mark = ' class="best"' if name in best else ""
        star = "★ " if name in best else ""
        text = _plain(cell.text) or "<em>(empty)</em>"
        opened = f'<td{mark} data-version="{_plain(name)}"{_language(cell.text)}>'
        cells.append(f'{opened}{text}<small lang="en">{star}{cell.note()}</small></td>')
    return f"<tr>{''.join(cells)}</tr>"


def _row(tag: str, cells: list[str]) -> str:
    """A row of cells that are HTML by now, their texts escaped."""
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _plain(text: str) -> str:
    # Escaped last: what `printable` puts in place of a control character is text as well.
    return html.escape(printable(text))


def _language(text: str) -> str:
    # Browsers choose the shapes of Chinese characters by it, and screen readers their voice.
    return ' lang="zh"' if CHINESE.search(text) else ""
