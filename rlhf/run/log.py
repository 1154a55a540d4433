"""The log of a run: metrics.jsonl (the record), samples.jsonl, what the screen shows of them, time left."""

import json
import math
import os
import time
from pathlib import Path

from rlhf.artefacts.damage import refuse_types
from rlhf.artefacts.files import TOKEN
from rlhf.run.terminal import columns_here, labelled
from rlhf.run.trackers import TRACKED_SAMPLES, open_tracker

# Steps of a process before it says how long the rest takes: the first ones are the slowest.
STEPS_BEFORE_ETA = 20


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    seconds = max(0, round(seconds))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class Eta:
    """Time left, from the mean pace since the first step of this process."""

    def __init__(self, total: int, done: int = 0):
        self.total = total
        self.first = done
        self.start = time.monotonic()

    def left(self, done: int) -> str:
        """The end of a step's line: " | ETA h:mm:ss" after `done` steps, "" where there are too few to tell."""
        # Steps of an earlier process took time that this clock has not seen.
        steps = done - self.first
        if steps < STEPS_BEFORE_ETA:
            return ""
        pace = (time.monotonic() - self.start) / steps
        return f" | ETA {duration(pace * (self.total - done))}"


# Fields of a record that are no measured number.
LOGGED = {"step": int, "guard": str}


def plain(value):
    """A JSON-safe value: non-finite numbers become the strings "nan", "inf", "-inf", so every line stays JSON."""
    if not isinstance(value, float):
        return value
    # Digits and not decimals, which would make a learning rate of 1e-9 a 0; nine tell any two float32 numbers apart.
    return float(f"{value:.9g}") if math.isfinite(value) else str(value)


def _json_lines(rows: list[dict]) -> str:
    # Chinese stays readable for whoever looks into the file.
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class MetricsLog:
    """The log of one run: appends a JSON object a step to metrics.jsonl and hands its numbers to a tracker, if any."""

    def __init__(
        self,
        output_dir: str | Path,
        tracker: str | None = None,
        config: dict | None = None,
        done: int = 0,
        samples_done: int | None = None,
    ):
        """Cut metrics.jsonl and samples.jsonl back to the first `done` steps (of a resumed run), then append.

        `samples_done`: the last step whose samples stay, where the end of the run will show those of `done` again.
        """
        self.file = Path(output_dir) / "metrics.jsonl"
        self.samples = Path(output_dir) / "samples.jsonl"
        # Steps after the checkpoint that a run goes on from will be written once more.
        records = _refuse_strange(_cut_back(self.file, done), self.file)
        _cut_back(self.samples, done if samples_done is None else samples_done)
        # What a resumed run reports that has no step left to do.
        self.last = records[-1] if records else {}

        # A tracker is three functions, and without one they do nothing.
        tracking = open_tracker(tracker, Path(output_dir), config or {})
        self._log, self._log_samples, self._close = tracking

    def write(self, record: dict) -> None:
        """Append `record` (it names its own "step")."""
        # Opened anew for each step, so that a crash loses no earlier line.
        with self.file.open("a", encoding="utf-8") as out:
            out.write(_json_lines([{key: plain(value) for key, value in record.items()}]))

        # A tracker draws curves: texts are for the file alone.
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        self._log(numbers)

    def write_samples(self, rows: list[dict], shown: int = 3) -> None:
        """Append answers with text ({"step", "query", "response", ...}) to samples.jsonl, print and track a few."""
        with self.samples.open("a", encoding="utf-8") as out:
            out.write(_json_lines(rows))

        for row in rows[:shown]:
            show_answer(row["query"], row["response"], f"score {row['score']:+.2f}, {row['length']} tokens")

        if rows:
            self._log_samples(rows[:TRACKED_SAMPLES])

    def close(self) -> None:
        """Flush the tracker."""
        self._close()


def show_answer(query: str, response: str, about: str) -> None:
    """Print a query and its answer as text, a rule beside them; `about` stands under the answer."""
    lines = labelled([("prompt", query.strip()), ("answer", response), ("", f"({about})")], columns_here())
    print(*lines, "", sep="\n", flush=True)


def _cut_back(file: Path, done: int) -> list[dict]:
    """Keep the records of a file up to step `done`, if there is a file; returns them."""
    rows = [row for row in read_lines(file) if row.get("step", 0) <= done]
    if file.is_file():
        # Rewritten whole, beside it and then in its place: a crash half way leaves the old one.
        part = file.with_name(f".{file.name}.{TOKEN}{os.getpid()}")
        part.write_text(_json_lines(rows), encoding="utf-8")
        os.replace(part, file)
    return rows


# ---- reading ----
def read_lines(file: Path) -> list[dict]:
    """The records of a .jsonl file, in order; none where it does not exist. A last line cut by a crash is left out.

    Raises: ValueError naming the line that holds something else than a record.
    """
    if not file.is_file():
        return []

    # Not by splitlines, which also cuts at separators that an answer may hold, such as U+2028.
    # A byte that is no UTF-8 spoils its own line only.
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line]
    rows = []
    for number, line in numbered:
        try:
            rows.append(_record(line))
        except (ValueError, RecursionError) as error:
            # A crash may cut the last line, and nothing before it.
            # A whole line ends with a new line, so what stands last has none.
            if number == len(lines):
                break
            raise ValueError(
                f"{file}:{number} is no record of a run ({error}): take the line out, or give another directory"
            ) from error
    return rows


def _refuse_strange(rows: list[dict], file: Path) -> list[dict]:
    """`rows` of a metrics.jsonl. Raises: ValueError naming what no run could have logged."""
    for row in rows:
        refuse_types(row, file, {name: kind for name, kind in LOGGED.items() if name in row}, required=("step",))
        numbers = {name: _number(value) for name, value in row.items() if name not in LOGGED}
        refuse_types(numbers, file, dict.fromkeys(numbers, (int, float, bool, type(None))))
    return rows


def _number(value):
    """A number that was written as text, because JSON has no NaN, as a number again; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _record(line: str) -> dict:
    """A line of a log. Raises: ValueError where it is no object, or names no step that could be one."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("no object")
    # By the type itself, because True is an integer to isinstance.
    if type(row.get("step", 0)) is not int:
        raise ValueError(f"step {row['step']!r:.40}")
    return row


def read_metrics(output_dir: str | Path) -> list[dict]:
    """The records of metrics.jsonl, in order. Raises: ValueError naming what no run could have logged."""
    file = Path(output_dir) / "metrics.jsonl"
    return _refuse_strange(read_lines(file), file)
