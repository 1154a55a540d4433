"""A report of one run, or of several beside one another, as one file that opens anywhere without a network.

In:  the output directory of a stage, finished or not; several of them are laid over one another.
Out: report.html in the directory (of several report_compared.html in the first): what it was, what came out, curves,
samples, audit, warnings in words.

    python -m rlhf.page.report runs/ppo
    python -m rlhf.page.report runs/ppo runs/ppo_2 --output both.html
"""

import argparse
import base64
import hashlib
import os
import sys
from pathlib import Path

from rlhf.page import report_audit, report_parts
from rlhf.page.report_charts import further_charts, main_charts, step_range
from rlhf.page.report_data import Run, Words, load_run, number
from rlhf.page.report_html import both, folded, items, section, text
from rlhf.page.report_samples import samples
from rlhf.page.report_svg import Event, draw
from rlhf.page.report_warnings import warnings_of
from rlhf.page.report_words import gain, standing
from rlhf.run.pictures import attempt
from rlhf.run.terminal import printable, printable_errors

FILE_NAME = "report.html"
# Beside it, for a stage's own report must not be lost for a comparison.
FILE_OF_SEVERAL = "report_compared.html"

# More runs than this are told apart by nobody.
MOST_RUNS = 6

# No address in it: the page opens without a network, and its policy forbids to ask for anything.
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title><style>{style}</style></head><body>
<input class="switch" type="radio" name="language" id="use-en" aria-label="English" checked>
<input class="switch" type="radio" name="language" id="use-zh" aria-label="中文">
<header><h1>{heading}</h1><p class="languages"><label for="use-en">English</label> <label for="use-zh">中文</label></p>
<nav>{links}</nav></header>
<main>
{body}</main>
<script>{script}</script></body></html>
"""


# ---- the page ----
def page(runs: list[Run]) -> str:
    """The whole report; every text that is not ours is escaped."""
    parts: list[tuple[str, Words, str]] = [
        ("short", ("In short", "概要"), "".join(_in_short(run, len(runs) > 1) for run in runs)),
        ("outcome", ("What came out", "结果"), report_parts.outcome(runs)),
        ("charts", ("Curves", "曲线"), _charts(runs)),
        ("samples", ("Answers", "回答"), samples(runs)),
        ("audit", ("Audit of the reward model", "奖励模型的审计"), _each(runs, report_audit.audit)),
        ("origin", ("What it was", "训练设置"), _each(runs, report_parts.origin) + report_parts.flags(runs)),
    ]
    # Before the links are made, or some would lead to a heading that is not there.
    parts = [part for part in parts if part[2]]
    links = " ".join(f'<a href="#{name}">{both(title)}</a>' for name, title, _ in parts)

    # A script or a style that is not exactly ours does not run.
    # Read here and not at import: the file is small, and a script that draws no report needs none of it.
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    script = Path(__file__).with_name("report.js").read_text(encoding="utf-8")
    policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'"
    names = ", ".join(run.name for run in runs)
    # Only the braces of PAGE itself are filled in: what goes in is not formatted once more, whatever braces it holds.
    return PAGE.format(
        policy=f"{policy}; form-action 'none'",
        title=text(f"Run report: {names}"),
        heading=both((f"Run report: {names}", f"训练报告：{names}")),
        style=style,
        script=script,
        links=links,
        body="".join(section(*part) for part in parts),
    )


def _digest(content: str) -> str:
    """How a Content-Security-Policy names a script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _each(runs: list[Run], part) -> str:
    """A part of every run, under its name where there are several."""
    made = [(run, part(run)) for run in runs]
    made = [(run, body) for run, body in made if body]
    # A single run needs no name above each of its parts.
    if len(runs) == 1:
        return "".join(body for _, body in made)
    return "".join(f"<h3>{text(run.name)}</h3>\n{body}" for run, body in made)


def _in_short(run: Run, named: bool) -> str:
    """Stage and standing of a run, and what its owner should look at."""
    stage = report_parts.STAGES.get(run.stage, (run.stage or "?",) * 2)
    english, chinese = standing(run)
    shown = f"<h3>{text(run.name)}</h3>\n" if named else ""
    shown += f"<p>{both((f'{stage[0]}. {english}', f'{stage[1]}。{chinese}'))}</p>\n"

    if words := gain(run):
        shown += f"<p>{both(words)}</p>\n"

    warnings = warnings_of(run)
    if not warnings:
        return shown + f"<p>{both(('Nothing in the numbers asks for a warning.', '数字里没有需要警告的地方。'))}</p>\n"
    return shown + items(warnings, "warnings")


def _charts(runs: list[Run]) -> str:
    """All curves on one axis of steps, events marked, those that few people read folded away."""
    charts = main_charts(runs)
    further = further_charts(runs)
    if not charts and not further:
        return ""

    # Of the folded charts too, so that a step stands at the same place in all of them.
    steps = step_range(charts + further)
    events = _events(runs, steps)
    hint = (
        "All charts share one axis, the steps (0: before training). Point at one, or use the arrow keys in it: all "
        "show their values at that step.",
        "横轴都是步数（0 是训练之前）。把指针移到图上，或在图里按方向键，所有的图都显示那一步的数值。",
    )
    shown = "".join(draw(chart, steps, events) for chart in charts)
    rest = "".join(draw(chart, steps, events) for chart in further)
    return f'<p class="hint">{both(hint)}</p>{_marks(events)}<div class="charts">{shown}</div>\n' + (
        folded(("Further curves", "其他曲线"), f'<div class="charts">{rest}</div>') if rest else ""
    )


def _marks(events: list[Event]) -> str:
    """What the lines across the charts mean."""
    shown = [f'<li><b class="mark {kind}">│</b> {both(words)}</li>' for _, kind, words in events]
    return f'<ul class="events">{"".join(shown)}</ul>' if shown else ""


def _events(runs: list[Run], steps: tuple[int, int]) -> list[Event]:
    """Steps at which the guard stepped in, and the best evaluation, of all runs."""
    events = []
    for run in runs:
        owner = f"{run.name}: " if len(runs) > 1 else ""
        for step, reason in run.events():
            words = (f"{owner}step {step}, the guard: {reason}", f"{owner}第 {step} 步，保护机制：{reason}")
            events.append((step, "guard", words))
        best = number(run.best.get("step"))
        if best is not None:
            words = (
                f"{owner}step {best:.0f}, the best evaluation (best/)",
                f"{owner}第 {best:.0f} 步，最好的一次评估（best/）",
            )
            events.append((best, "best", words))
    # An event outside of all curves would be drawn on the edge, where nothing happened.
    return [event for event in events if steps[0] <= event[0] <= steps[1]]


# ---- files ----
def write_report(folders: list[Path], file: Path | None = None) -> Path:
    """Write the report of these runs, by default into the first of their directories; returns the file.

    Raises: FileNotFoundError or ValueError where a directory holds no run.
    """
    runs = [load_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    content = page(runs)

    file = file or folders[0] / (FILE_NAME if len(folders) == 1 else FILE_OF_SEVERAL)
    # A reader of the page sees the old one or the new one; the name is one that a later run clears away.
    part = file.with_name(f".{file.name}.rlhf-{os.getpid()}")
    try:
        part.write_text(content, encoding="utf-8")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return file


def _names(folders: list[Path]) -> list[str]:
    """A short name for each run: the last part of its path, or as many as tell it from the others."""
    # The shortest names that differ: runs/ppo and old/ppo are both called ppo otherwise.
    for count in range(1, 4):
        names = ["/".join(folder.absolute().parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def write_at_end(output_dir: str | Path) -> None:
    """Write report.html of a stage that ends, and say where; if it cannot be written, a warning says so."""

    def write() -> None:
        print(f"report: {printable(str(write_report([Path(output_dir)])))}", flush=True)

    # The run is finished and saved by now: nothing about its report may end it with an error.
    attempt(write, failed="the report could not be written")


# ---- the command ----
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line; a wrong one ends the program with exit code 2."""
    # By hand and not by rlhf.flags: it takes directories without the name of a flag.
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.page.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output directory of a stage")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where to write (default: RUN/report.html, of several RUN/report_compared.html)",
    )
    args = parser.parse_args(argv)
    if len(args.runs) > MOST_RUNS:
        parser.error(f"{len(args.runs)} runs in one report cannot be told apart: give {MOST_RUNS} at most")
    return args


def main(args: argparse.Namespace) -> int:
    """Write the report and say where it is; returns the exit code."""
    try:
        file = write_report(args.runs, args.output)
    except (OSError, ValueError) as error:
        print(f"report: error: {printable(str(error))}", file=sys.stderr)
        return 1
    print(f"written: {printable(str(file))} (one file, opens without a network)")
    return 0


if __name__ == "__main__":
    with printable_errors():
        given = parse_args()
    sys.exit(main(given))
