"""Trackers beside metrics.jsonl: wandb, TensorBoard, SwanLab. Whatever one does wrong, the run goes on without it."""

import os
import warnings
from pathlib import Path

# Answers with text that go to a tracker at one step, at most: a tracker's page is not for reading all of them.
TRACKED_SAMPLES = 16


def open_tracker(tracker: str | None, output_dir: Path, config: dict):
    """Functions (log numbers, log samples, close) of a tracker."""
    if tracker is None:
        return _no_tracker()
    try:
        functions = OPENERS[tracker](output_dir, config)
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
    # Seconds to import: only a run that asks for it needs it.
    import wandb

    # In the run's own directory, so that it is found again when it was offline.
    settings = {"project": "lora-rlhf", "dir": str(output_dir), "config": config, "name": output_dir.name}
    # Quiet, because at the end it would print every curve as text. By default it waits 90 seconds for a host that does
    # not answer.
    waits = {} if "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": 20}
    settings["settings"] = wandb.Settings(quiet=True, **waits)

    try:
        run = wandb.init(**settings)
    except wandb.Error as error:
        # No key, a dead host: metrics.jsonl is the truth, and the run must not wait for a tracker.
        why = str(error).partition("\n")[0]
        warnings.warn(f"wandb is offline ({why}); later: wandb sync {output_dir}/wandb/offline-run-*", stacklevel=4)
        # What is logged offline lies in the run's directory until somebody sends it.
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


def _open_swanlab(output_dir: Path, config: dict):
    """Functions of SwanLab. Without a key or a host it works offline and says how to sync later."""
    # An optional package.
    import swanlab

    folder = output_dir / "swanlab"
    settings = {"project": "lora-rlhf", "log_dir": str(folder), "config": config, "name": output_dir.name}
    # Without a key it would ask for one at the terminal. SWANLAB_MODE=local needs none.
    known = swanlab.Settings()
    mode = "offline" if known.mode == "online" and not known.api_key else known.mode
    try:
        run = swanlab.init(mode=mode, **settings)
    except Exception as error:
        # Which class a dead host raises is not documented; the run must not wait for a tracker.
        warnings.warn(f"swanlab is offline ({str(error).partition(chr(10))[0]})", stacklevel=4)
        mode = "offline"
        run = swanlab.init(mode=mode, **settings)
    if mode == "offline":
        print(f"swanlab writes offline; later: swanlab sync {folder}/run-*", flush=True)

    def log(record: dict) -> None:
        run.log(record, step=record.get("step"))

    def log_samples(rows: list[dict]) -> None:
        run.log({"samples": [swanlab.Text(_as_text(row)) for row in rows]}, step=rows[0]["step"])

    return log, log_samples, run.finish


def _open_tensorboard(output_dir: Path, config: dict):
    """Functions of TensorBoard, which writes into tensorboard/ of the run's directory."""
    from torch.utils.tensorboard import SummaryWriter

    folder = output_dir / "tensorboard"
    writer = SummaryWriter(str(folder))
    print(f"to look at the curves: tensorboard --logdir {folder}", flush=True)

    def log(record: dict) -> None:
        for key, value in record.items():
            writer.add_scalar(key, value, record.get("step"))

    def log_samples(rows: list[dict]) -> None:
        lines = [f"- {_as_text(row)}" for row in rows]
        writer.add_text("samples", "\n".join(lines), rows[0]["step"])

    return log, log_samples, writer.close


def _as_text(row: dict) -> str:
    score = f" ({row['score']:+.3f})" if "score" in row else ""
    return f"{row['query']} -> {row['response']}{score}"


# In the order in which --log_with lists them (rlhf/arguments.py).
OPENERS = {"wandb": _open_wandb, "tensorboard": _open_tensorboard, "swanlab": _open_swanlab}
