"""The log of a run: metrics.jsonl (the record), samples.jsonl, trackers beside them, time left."""

import json
import math
import os
import time
import warnings
from pathlib import Path

from rlhf.artefacts.damage import refuse_types
from rlhf.artefacts.files import TOKEN

# Answers with text that go to a tracker at one step, at most: a tracker's page is not for reading all of them.
TRACKED_SAMPLES = 16


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
        """Time left as h:mm:ss after `done` steps."""
        # Steps of an earlier process took time that this clock has not seen.
        steps = max(1, done - self.first)
        pace = (time.monotonic() - self.start) / steps
        return duration(pace * (self.total - done))


# Fields of a record that are no measured number.
LOGGED = {"step": int, "guard": str}


def plain(value):
    """A JSON-safe value: non-finite numbers become the strings "nan", "inf", "-inf", so every line stays JSON."""
    if not isinstance(value, float):
        return value
    return round(value, 8) if math.isfinite(value) else str(value)


def _json_lines(rows: list[dict]) -> str:
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
        self.last = records[-1] if records else {}

        # A tracker is three functions, and without one they do nothing.
        tracking = _open_tracker(tracker, Path(output_dir), config or {})
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
            # `repr`: a line end in an answer must not break the log's lines.
            answer = f"{row['query']!r} -> {row['response']!r}"
            print(f"  {answer} (score {row['score']:+.3f}, {row['length']} tokens)", flush=True)

        if rows:
            self._log_samples(rows[:TRACKED_SAMPLES])

    def close(self) -> None:
        """Flush the tracker."""
        self._close()


def _cut_back(file: Path, done: int) -> list[dict]:
    """Keep the records of a file up to step `done`, if there is a file; returns them."""
    rows = [row for row in read_lines(file) if row.get("step", 0) <= done]
    if file.is_file():
        # Rewritten whole, beside it and then in its place: a crash half way leaves the old one.
        part = file.with_name(f".{file.name}.{TOKEN}{os.getpid()}")
        part.write_text(_json_lines(rows), encoding="utf-8")
        os.replace(part, file)
    return rows


# ---- trackers ----
def _open_tracker(tracker: str | None, output_dir: Path, config: dict):
    """Functions (log numbers, log samples, close) of a tracker."""
    if tracker is None:
        return _no_tracker()
    try:
        functions = _open_wandb(output_dir, config) if tracker == "wandb" else _open_tensorboard(output_dir)
    # Whatever a tracker does wrong, the run goes on: metrics.jsonl is the record.
    except Exception as error:
        return _no_tracker(f"{tracker} could not be started ({type(error).__name__}: {error})")
    return tuple(_forgiving(function, tracker) for function in functions)


def _no_tracker(reason: str | None = None):
    """Three functions that do nothing; `reason` is said once."""
    if reason:
        warnings.warn(f"{' '.join(reason.split())[:300]}: the run goes on with metrics.jsonl alone", stacklevel=2)
    return (lambda record: None), (lambda rows: None), (lambda: None)


def _forgiving(function, tracker: str):
    """`function` of a tracker, left alone after its first failure, which is a warning."""
    failed = []

    def call(*given):
        if failed:
            return
        try:
            function(*given)
        except Exception as error:
            failed.append(error)
            _no_tracker(f"{tracker} failed ({type(error).__name__}: {error})")

    return call


def _open_wandb(output_dir: Path, config: dict):
    """Functions of wandb. Without a key or a host it works offline and says how to sync later."""
    # An optional package: only a run that asks for it needs it.
    import wandb

    # In the run's own directory, so that it is found again when it was offline.
    settings = {"project": "lora-rlhf", "dir": str(output_dir), "config": config, "name": output_dir.name}
    # By default it waits 90 seconds for a host that does not answer.
    if "WANDB_INIT_TIMEOUT" not in os.environ:
        settings["settings"] = wandb.Settings(init_timeout=20)

    try:
        run = wandb.init(**settings)
    except wandb.Error as error:
        # No key, a dead host: metrics.jsonl is the truth, and the run must not wait for a tracker.
        why = str(error).partition("\n")[0]
        warnings.warn(f"wandb is offline ({why}); later: wandb sync {output_dir}/wandb/offline-run-*", stacklevel=4)
        run = wandb.init(mode="offline", **settings)

    def log(record: dict) -> None:
        run.log(record, step=record.get("step"))

    def log_samples(rows: list[dict]) -> None:
        # As text: a column of a wandb table has one type, and a row may lack a field.
        names = sorted(set().union(*rows))
        data = [[str(row.get(name, "")) for name in names] for row in rows]
        table = wandb.Table(columns=names, data=data)
        run.log({"samples": table}, step=rows[0]["step"])

    return log, log_samples, run.finish


def _open_tensorboard(output_dir: Path):
    """Functions of TensorBoard, which writes into tensorboard/ of the run's directory."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(output_dir / "tensorboard"))

    def log(record: dict) -> None:
        for key, value in record.items():
            writer.add_scalar(key, value, record.get("step"))

    def log_samples(rows: list[dict]) -> None:
        lines = []
        for row in rows:
            score = f" ({row['score']:+.3f})" if "score" in row else ""
            lines.append(f"- {row['query']} -> {row['response']}{score}")
        writer.add_text("samples", "\n".join(lines), rows[0]["step"])

    return log, log_samples, writer.close


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
    if type(row.get("step", 0)) is not int:
        raise ValueError(f"step {row['step']!r:.40}")
    return row


def read_metrics(output_dir: str | Path) -> list[dict]:
    """The records of metrics.jsonl, in order. Raises: ValueError naming what no run could have logged."""
    file = Path(output_dir) / "metrics.jsonl"
    return _refuse_strange(read_lines(file), file)
