"""Samples of chosen steps under their prompts, two steps beside one another, searched by the page's script."""

import re

from rlhf.page.report_data import Run, Words, number
from rlhf.page.report_html import both, short, text

# Steps of a run whose answers are shown, and answers of one step.
MOST_STEPS = 12
MOST_ROWS = 16

# Numbers of a sample that stand under it: (key, label).
SHOWN = (
    ("score", ("score", "得分")),
    ("judge", ("judge", "裁判")),
    ("kl", ("KL", "KL")),
    ("length", ("tokens", "token 数")),
)

# One column of answers: (run, step, held-out prompts or not).
Column = tuple[int, int, bool]


def samples(runs: list[Run]) -> str:
    """The samples with their choice of two steps and their search; "" where no run has any."""
    # 1. Answers by column, as many as a mail can carry.
    answers: dict[Column, list[dict]] = {}
    total = 0
    for place, run in enumerate(runs):
        by_step = _by_step(run)
        total += sum(len(rows) for rows in by_step.values())
        for step, held_out in _chosen(run, list(by_step)):
            answers[place, step, held_out] = by_step[step, held_out][:MOST_ROWS]
    if not answers:
        return ""

    # 2. Prompts that several columns share stand first: the same question, before and after.
    columns = list(answers)
    prompts: dict[str, dict[int, list[dict]]] = {}
    for place, column in enumerate(columns):
        for row in answers[column]:
            prompt = _prompt(row, runs[column[0]])
            prompts.setdefault(prompt, {}).setdefault(place, []).append(row)
    # A stable sort: prompts of as many columns stay in the order of the log.
    order = sorted(prompts, key=lambda prompt: -len(prompts[prompt]))
    cards = "".join(_card(prompt, prompts[prompt], columns, runs) for prompt in order)

    # 3. The controls.
    left, right = _first_pair(columns)
    count = sum(len(rows) for rows in answers.values())
    note = (
        f"{count} of {total} logged answers are in this page; samples.jsonl holds all of them.",
        f"本页收录了记录下来的 {total} 个回答中的 {count} 个；samples.jsonl 里有全部。",
    )
    controls = (
        f'<p class="controls"><label>{both(("Left", "左"))} {_select("left", columns, runs, left)}</label>'
        f"<label>{both(('Right', '右'))} {_select('right', columns, runs, right)}</label>"
        f'<label>{both(("Search", "搜索"))} <input type="search" id="search" autocomplete="off"></label>'
        f'<output id="found"></output></p><p class="hint">{both(note)}</p>\n'
    )
    return f'{controls}<div id="samples">{cards}</div>\n'


def _prompt(row: dict, run: Run) -> str:
    """The prompt of a sample, without the text template around it."""
    query = str(row.get("query", "")).strip()
    template = run.about.get("prompt_template")
    before, _, after = template.partition("{prompt}") if isinstance(template, str) else ("", "", "")
    # Of the text template alone; a chat template's markers are no part of the logged text.
    inner = query.removeprefix(before.strip()).removesuffix(after.strip()).strip()
    # Blank lines between turns would fill the page.
    return re.sub(r"\n\s*\n", "\n", inner or query)


def _by_step(run: Run) -> dict[tuple[int, bool], list[dict]]:
    """A run's samples by step, those of held-out prompts apart; the answers of SFT are all to held-out prompts."""
    groups: dict[tuple[int, bool], list[dict]] = {}
    for row in run.samples:
        held_out = bool(row.get("evaluation")) or run.stage == "sft"
        groups.setdefault((row["step"], held_out), []).append(row)
    return groups


def _chosen(run: Run, steps: list[tuple[int, bool]]) -> list[tuple[int, bool]]:
    """MOST_STEPS of a run's steps at most: first, last, best and the guard's, then others evenly; held-out first."""
    marked = {step for step, _ in run.events()} | {number(run.best.get("step"))}
    wanted = []
    for held_out in (True, False):
        kind = [place for place in steps if place[1] == held_out]
        ends = [*kind[:1], *kind[-1:]]
        # Evenly over the run, for the last steps alone show no change.
        stride = max(1, len(kind) // MOST_STEPS)
        wanted += [*ends, *(place for place in kind if place[0] in marked), *kind[::stride]]
    kept = list(dict.fromkeys(wanted))[:MOST_STEPS]
    return [place for place in steps if place in kept]


def _first_pair(columns: list[Column]) -> tuple[int, int]:
    """Columns that the page opens with: first and last of the held-out prompts, of several runs the ends of two."""
    places = [place for place, column in enumerate(columns) if column[2]] or list(range(len(columns)))
    # Of two runs the end of each: that is what one wants to compare.
    last = {columns[place][0]: place for place in places}
    if len(last) > 1:
        ends = list(last.values())
        return ends[0], ends[1]
    return places[0], places[-1]


def _select(name: str, columns: list[Column], runs: list[Run], chosen: int) -> str:
    options = []
    for place, column in enumerate(columns):
        mark = " selected" if place == chosen else ""
        # An option holds text alone: both languages in one.
        english, chinese = column_name(column, runs)
        options.append(f'<option value="{place}"{mark}>{text(english)} / {text(chinese)}</option>')
    return f'<select id="{name}">{"".join(options)}</select>'


def column_name(column: Column, runs: list[Run]) -> Words:
    """The name of a column of answers."""
    place, step, held_out = column
    run = runs[place]
    words = [(f"step {step}", f"第 {step} 步")]
    if len(runs) > 1:
        words.insert(0, (run.name, run.name))
    if run.stage == "ppo" and not held_out:
        words.append(("training", "训练"))
    return (", ".join(english for english, _ in words), "，".join(chinese for _, chinese in words))


def _card(prompt: str, answers: dict[int, list[dict]], columns: list[Column], runs: list[Run]) -> str:
    """A prompt and its answers, each marked with its column."""
    cells = []
    for place, rows in answers.items():
        for row in rows:
            name = both(column_name(columns[place], runs))
            said = text(str(row.get("response", ""))) or f"<em>{both(('(empty)', '（空）'))}</em>"
            inner = f"<small>{name}</small><p>{said}</p>{_note(row)}"
            cells.append(f'<div class="answer" data-column="{place}">{inner}</div>')
    return f'<article><p class="prompt">{text(prompt)}</p><div class="answers">{"".join(cells)}</div></article>\n'


def _note(row: dict) -> str:
    """The numbers of an answer, and whether it was cut."""
    parts = []
    named = [(key, (key[len("reward/") :],) * 2) for key in row if key.startswith("reward/")]
    for key, label in (*SHOWN, *named):
        value = number(row.get(key))
        if value is not None:
            parts.append(f"{both(label)} {short(value)}")
    if row.get("ended") is False:
        parts.append(both(("cut at the limit", "到上限被截断")))
    return f"<small>{' · '.join(parts)}</small>" if parts else ""
