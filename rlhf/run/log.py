"""The log of a run: metrics.jsonl (the record), samples.jsonl, trackers beside them, time left."""

import json
import math
import os
import time
import warnings
from pathlib import Path

# Answers with text that go to a tracker at a time.
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
        pace = (time.monotonic() - self.start) / max(1, done - self.first)
        return duration(pace * (self.total - done))


def plain(value):
    """A JSON-safe value: non-finite numbers become the strings "nan", "inf", "-inf", so every line stays JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return round(value, 8) if isinstance(value, float) else value


class MetricsLog:
    """Appends one JSON object a step to metrics.jsonl and hands its numbers to a tracker, if there is one."""

    def __init__(self, output_dir: str | Path, tracker: str | None = None, config: dict | None = None, done: int = 0):
        """Cut metrics.jsonl and samples.jsonl back to the first `done` steps (of a resumed run), then append."""
        self.file = Path(output_dir) / "metrics.jsonl"
        self.samples = Path(output_dir) / "samples.jsonl"
        kept = {
            file: [row for row in read_lines(file) if row.get("step", 0) <= done] for file in (self.file, self.samples)
        }
        for file, rows in ((file, rows) for file, rows in kept.items() if file.is_file()):
            file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        self.last = kept[self.file][-1] if kept[self.file] else {}
        self._log, self._log_samples, self._close = _open_tracker(tracker, Path(output_dir), config or {})

    def write(self, record: dict) -> None:
        """Append `record` (it names its own "step")."""
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps({key: plain(value) for key, value in record.items()}, ensure_ascii=False) + "\n")
        self._log({key: value for key, value in record.items() if isinstance(value, int | float)})

    def write_samples(self, rows: list[dict], shown: int = 3) -> None:
        """Append answers with text ({"step", "query", "response", ...}) to samples.jsonl, print and track a few."""
        with self.samples.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for row in rows[:shown]:
            print(
                f"  {row['query']!r} -> {row['response']!r} (score {row['score']:+.3f}, {row['length']} tokens)",
                flush=True,
            )
        if rows:
            self._log_samples(rows[:TRACKED_SAMPLES])

    def close(self) -> None:
        """Flush the tracker."""
        self._close()


def _open_tracker(tracker: str | None, output_dir: Path, config: dict):
    """Functions (log numbers, log samples, close) of a tracker."""
    if tracker == "wandb":
        return _open_wandb(output_dir, config)
    if tracker == "tensorboard":
        return _open_tensorboard(output_dir)
    return (lambda record: None), (lambda rows: None), (lambda: None)


def _open_wandb(output_dir: Path, config: dict):
    """wandb without a key or a host works offline and says how to sync later."""
    import wandb

    # Its own patience with a dead host is 90 seconds.
    patience = {} if "WANDB_INIT_TIMEOUT" in os.environ else {"settings": wandb.Settings(init_timeout=20)}
    settings = {"project": "lora-rlhf", "dir": str(output_dir), "config": config, "name": output_dir.name, **patience}
    try:
        run = wandb.init(**settings)
    except wandb.Error as error:
        # No key, a dead host: metrics.jsonl is the truth, and the run must not wait for a tracker.
        why = str(error).partition("\n")[0]
        warnings.warn(f"wandb is offline ({why}); later: wandb sync {output_dir}/wandb/offline-run-*", stacklevel=4)
        run = wandb.init(mode="offline", **settings)

    def log_samples(rows: list[dict]) -> None:
        names = sorted(set().union(*rows))
        table = wandb.Table(columns=names, data=[[str(row.get(name, "")) for name in names] for row in rows])
        run.log({"samples": table}, step=rows[0]["step"])

    return (lambda record: run.log(record, step=record.get("step"))), log_samples, run.finish


def _open_tensorboard(output_dir: Path):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(output_dir / "tensorboard"))

    def log(record: dict) -> None:
        for key, value in record.items():
            writer.add_scalar(key, value, record.get("step"))

    def log_samples(rows: list[dict]) -> None:
        lines = [
            f"- {row['query']} -> {row['response']}" + (f" ({row['score']:+.3f})" if "score" in row else "")
            for row in rows
        ]
        writer.add_text("samples", "\n".join(lines), rows[0]["step"])

    return log, log_samples, writer.close


def read_lines(file: Path) -> list[dict]:
    """The records of a .jsonl file, in order; none where it does not exist. A line cut by a crash ends it."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def read_metrics(output_dir: str | Path) -> list[dict]:
    """The records of metrics.jsonl, in order."""
    return read_lines(Path(output_dir) / "metrics.jsonl")
