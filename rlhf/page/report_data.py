"""A run's directory, read for its report: all that is there; what is missing or damaged becomes a sentence.

Standard library alone: a report is also made where no model could be loaded.
"""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

# English and Chinese of one sentence, title or label.
Words = tuple[str, str]

# One metric over the steps: (step, value), in order, finite values only.
Points = list[tuple[int, float]]

# Bytes of a log that are read, of a longer one the beginning and the end: a report must not take seconds.
MAX_METRICS = 1 << 24
MAX_SAMPLES = 1 << 22

# Bytes of a JSON file, at most.
MAX_JSON = 1 << 24

# Numbers beyond this count as infinite.
HUGE = 1e30

# A metric by which a log without run.json shows its stage.
SIGNS = (("kl/mean", "ppo"), ("eval_accuracy", "reward"), ("mean_token_accuracy", "sft"))


@dataclass
class Run:
    """What a run's directory says.

    Attributes:
        name: as the report calls it. folder: where it lies.
        about: of run.json, {} where there is none. origin: the file it was read from, "" for none.
        rows, samples: records of metrics.jsonl and samples.jsonl, by step.
        audit: of the reward model that this run made or trained against; {} for none.
        best: step and value of best/; {} for none.
        writer: number of the process that still writes here, None for none.
        notes: what could not be read, in words.
    """

    name: str
    folder: Path
    about: dict
    origin: str
    rows: list[dict]
    samples: list[dict]
    audit: dict = field(default_factory=dict)
    best: dict = field(default_factory=dict)
    writer: int | None = None
    notes: list[Words] = field(default_factory=list)

    @property
    def stage(self) -> str:
        """ "sft", "reward", "ppo", another word of run.json, or "" where nothing tells."""
        named = self.about.get("stage")
        if isinstance(named, str):
            return named
        # By what it logged, for a run that was killed early has no run.json.
        return next((stage for key, stage in SIGNS if any(key in row for row in self.rows)), "")

    @property
    def finished(self) -> bool:
        """True where the run has written its result."""
        return self.origin == "run.json"

    def part(self, name: str) -> dict:
        """One of run.json's objects; {} where it is missing or something else."""
        value = self.about.get(name)
        return value if isinstance(value, dict) else {}

    def points(self, key: str) -> Points:
        """A metric over the steps; what was evaluated before the first step stands at step 0."""
        points = [(row["step"], number(row[key])) for row in self.rows if key in row]
        before = key.replace("eval/", "eval_start/", 1)
        if before != key and self.rows:
            points.insert(0, (0, number(self.rows[0].get(before))))
        # Beyond this nothing can be drawn, and nothing of ours is measured.
        return [(step, value) for step, value in points if value is not None and abs(value) < HUGE]

    def metrics(self) -> list[str]:
        """Names of all metrics that are numbers, in the order in which they appear."""
        seen = {}
        for row in self.rows:
            for key, value in row.items():
                if key not in seen and number(value) is not None:
                    seen[key] = None
        return list(seen)

    def events(self) -> list[tuple[int, str]]:
        """(step, reason) of each step at which the guard stepped in."""
        return [(row["step"], str(row["guard"])) for row in self.rows if row.get("guard")]


def number(value) -> float | None:
    """A measured number, NaN and infinity written as text included; None for anything else."""
    if type(value) is float:
        return value
    # Texts too: NaN and Inf stand in the log as texts, because JSON has neither.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    # A whole number may have more digits than a float can hold.
    except (ValueError, OverflowError):
        return None


# ---- files ----
def read_object(file: Path, notes: list[Words]) -> dict:
    """A JSON object; {} where there is no such file, or with a note where it cannot be read."""
    try:
        if not file.is_file():
            return {}
        if file.stat().st_size > MAX_JSON:
            raise ValueError(f"{file.stat().st_size:,} bytes")
        content = json.loads(file.read_text(encoding="utf-8", errors="replace"))
        if not isinstance(content, dict):
            raise ValueError("no object")
    # Brackets nested by the thousand end Python's parser in its own way.
    except (OSError, ValueError, RecursionError) as error:
        why = str(error)[:80]
        notes.append((f"{file.name} cannot be read ({why}).", f"{file.name} 无法读取（{why}）。"))
        return {}
    return content


def read_log(file: Path, notes: list[Words], most: int = MAX_METRICS) -> list[dict]:
    """Records of a .jsonl file that name a step, in the order of their steps; other lines are counted in `notes`."""
    lines = _log_text(file, notes, most).split("\n")
    rows = []
    damaged = []
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _record(line)
        if row is not None:
            rows.append(row)
        # A run may be writing its last line at this moment, or have been killed in it.
        elif place < len(lines):
            damaged.append(place)

    if damaged:
        count = len(damaged)
        first = damaged[0]
        notes.append(
            (
                f"{file.name}: {count} damaged lines are left out, line {first} the first of them.",
                f"{file.name} 有 {count} 行已损坏，未计入，第一处在第 {first} 行。",
            )
        )
    # Sorted stably: a resumed run writes its steps behind those that it takes the place of.
    return sorted(rows, key=lambda row: row["step"])


def _log_text(file: Path, notes: list[Words], most: int) -> str:
    """The text of a log, of a very long one without its middle; "" where there is none."""
    try:
        # A pipe would be read for ever.
        if not file.is_file():
            return ""
        with file.open("rb") as log:
            size = os.fstat(log.fileno()).st_size
            if size <= most:
                return log.read().decode("utf-8", errors="replace")
            head = log.read(most // 2)
            log.seek(size - most // 2)
            tail = log.read(most // 2)
    except OSError as error:
        why = error.strerror
        notes.append((f"{file.name} cannot be read ({why}).", f"{file.name} 无法读取（{why}）。"))
        return ""

    # Lines that the cut goes through are left out.
    half = most >> 21
    notes.append(
        (
            f"{file.name} is long: its first and last {half} MB are shown.",
            f"{file.name} 很长：只显示开头和结尾各 {half} MB。",
        )
    )
    whole = head[: head.rfind(b"\n") + 1] + tail[tail.find(b"\n") + 1 :]
    return whole.decode("utf-8", errors="replace")


def _record(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    # A step that is True, 1.5 or of a hundred digits is none.
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < 1 << 53:
        return None
    return row


# ---- a run ----
def load_run(folder: Path, name: str) -> Run:
    """Read a run's directory, finished or not.

    Raises: FileNotFoundError where there is no directory; ValueError where it holds no run.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no directory: give the --output_dir of a run")

    # 1. What it was: its own run.json, or that of its newest checkpoint.
    notes: list[Words] = []
    about = read_object(folder / "run.json", notes)
    origin = "run.json" if about else ""
    # From the newest on, until one can be read.
    for place in () if about else _checkpoints(folder):
        about = about or read_object(place / "run.json", notes)
        origin = origin or (f"{place.name}/run.json" if about else "")

    # 2. What it logged.
    rows = read_log(folder / "metrics.jsonl", notes)
    samples = read_log(folder / "samples.jsonl", notes, MAX_SAMPLES)
    if not about and not rows:
        inner = sorted(file.parent for file in folder.glob("*/metrics.jsonl"))
        hint = f": give {inner[0]}, for one" if inner else ": give the --output_dir of a run"
        raise ValueError(f"{folder} holds no run, neither run.json nor metrics.jsonl{hint}")
    if not rows:
        notes.append(("There are no metrics (metrics.jsonl): no curves.", "没有指标（metrics.jsonl），因此没有曲线。"))

    # 3. What stands beside it.
    run = Run(name, folder, about, origin, rows, samples, writer=_writer(folder), notes=notes)
    best = read_object(folder / "best" / "state.json", notes).get("best")
    run.best = best if isinstance(best, dict) else {}
    run.audit = read_object(_audit_file(run), notes)
    return run


def _checkpoints(folder: Path) -> list[Path]:
    """Directories of a run's checkpoints, the newest first."""
    numbered = []
    for place in folder.glob("*"):
        match = re.fullmatch(r"(?:step_|checkpoint-)(\d{1,15})", place.name)
        if match and place.is_dir():
            numbered.append((int(match[1]), place))
    return [place for _, place in sorted(numbered, reverse=True)]


def _writer(folder: Path) -> int | None:
    """Number of another process that has claimed this directory and is still there."""
    try:
        pid = int((folder / ".lock").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # This very process writes the report at the end of its run.
    if pid <= 0 or pid == os.getpid():
        return None
    try:
        # Signal 0 only asks whether a process is there.
        os.kill(pid, 0)
    except PermissionError:
        return pid
    except (OSError, OverflowError):
        return None
    return pid


def _audit_file(run: Run) -> Path:
    """audit.json of the reward model: beside it, or where PPO's reward adapter lies."""
    if run.stage != "ppo":
        return run.folder / "audit.json"
    reward = run.part("parents").get("reward")
    path = reward.get("path") if isinstance(reward, dict) else None
    return Path(path if isinstance(path, str) else run.folder) / "audit.json"
