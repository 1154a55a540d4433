"""Stages 1 and 2 from start or checkpoint to the last evaluation: resuming, signals, processes."""

import gc
import math
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from rlhf.artefacts.adapters import read_adapter
from rlhf.artefacts.checkpoint import listed_files, read_manifest, rotate, to_resume, why_incomplete
from rlhf.artefacts.damage import refuse_types, refused
from rlhf.artefacts.files import read_object
from rlhf.artefacts.output_dir import claim_output_dir
from rlhf.artefacts.resume import refuse_changes
from rlhf.data.batches import LengthGroupedSampler
from rlhf.data.cache import Prepare, Prepared, prepared
from rlhf.data.inspection import inspect_rows
from rlhf.data.prompt_format import PromptFormat
from rlhf.models.forward import backbone_of
from rlhf.models.shards import mesh_of, trained_from_first
from rlhf.reward.audit_report import audit_model
from rlhf.run.launch import rank_and_size, say
from rlhf.run.stopping import Interrupted
from rlhf.trainer.best import OutOfPatience
from rlhf.trainer.log import CHECKPOINT_PREFIX, StageLog
from rlhf.trainer.stage_trainer import is_zero3

# What trainer_state.json holds, of the fields that training goes on by.
STATE_KINDS = {
    "global_step": int, "max_steps": int, "num_train_epochs": int, "epoch": float, "log_history": list,
    "num_input_tokens_seen": int, "total_flos": float, "stateful_callbacks": dict,
}  # fmt: skip


def bad_rows_file(args) -> Path | None:
    """File that --bad_rows skip writes malformed rows to; None where this process owns no output directory."""
    # A look at the data, or an audit alone, must not write into a directory that may be another run's.
    idle = args.inspect_data or getattr(args, "audit_only", False) or rank_and_size()[0] != 0
    return None if idle else Path(args.output_dir) / "bad_rows.jsonl"


# ---- data ----
def load_prepared(args, prompt_format: PromptFormat, prepare: Prepare, unit: str) -> Prepared:
    """The rows that `prepare` makes or has made, "train" and "evaluation" among them.

    What became of them is printed; `about` gets all that run.json says of the data.

    Raises: ValueError where no row is left to train on.
    """
    dataset = prepared(args, prompt_format, prepare, bad_rows_file(args))
    rows = dataset.rows["train"]
    if args.inspect_data:
        inspect_rows(prompt_format, rows, dataset.funnel)
    else:
        say(f"{prompt_format.describe()}\n{dataset.funnel.table()}")

    if not rows:
        raise ValueError(f"{args.dataset_name} leaves no {unit} to train on: {dataset.funnel.summary()}")
    counts = {"rows": len(rows), "eval_rows": len(dataset.rows["evaluation"]), "funnel": dataset.funnel.as_dict()}
    dataset.about |= counts
    return dataset


# ---- start ----
def claim(args) -> list[Path]:
    """Claim the output directory for this run, on the first process; a run that only looks at data claims nothing.

    Returns: what an earlier run left, for `clear` to remove once every input has been read.
    """
    if rank_and_size()[0] != 0 or args.inspect_data:
        return []
    names = ("previous_lora_weights", "dataset_name", "eval_dataset_name", "model_name", "chat_template")
    inputs = {f"--{name}": getattr(args, name, None) for name in names}
    return claim_output_dir(args.output_dir, bool(args.resume_from_checkpoint), args.overwrite_output_dir, inputs)


def row_order(args, lengths: Sequence[int]) -> LengthGroupedSampler:
    """Order of the training rows, with rows of like length in one batch of all processes; `lengths`: tokens a row."""
    # Several processes need batches of their own at every step: blank rows fill the last group.
    processes = rank_and_size()[1]
    group_size = args.per_device_train_batch_size * processes
    return LengthGroupedSampler(lengths, group_size, args.seed, filled=processes > 1)


def resume_point(args, about: dict) -> str | None:
    """Path of the checkpoint to go on from: the newest complete one, or the one named; None for a fresh start.

    Args:
        about: what this command would write into run.json (see `write_run`).
    Raises: ValueError where the named checkpoint is not complete, or was written by another command.
    """
    checkpoint = to_resume(args.resume_from_checkpoint, args.output_dir, CHECKPOINT_PREFIX)
    if checkpoint is None:
        if args.resume_from_checkpoint:
            say(f"no checkpoint in {args.output_dir} yet: starting fresh")
        return None

    # Before the model is loaded, so that a wrong command fails early.
    refuse_changes(checkpoint, args, about, rank_and_size()[1])
    done = read_manifest(checkpoint).get("step", 0)
    if 0 < args.max_steps < done:
        raise ValueError(f"--max_steps {args.max_steps} is less than the {done} steps that are done: ask for more")
    # Read here because the Trainer's own error names no damaged file.
    read_adapter(checkpoint)
    read_trainer_state(checkpoint)
    if rank_and_size()[0] == 0 and args.resume_from_checkpoint == "True":
        # What a run killed between its last checkpoint and the rotation left over.
        rotate(args.output_dir, CHECKPOINT_PREFIX, args.save_total_limit)
    say(f"going on from {checkpoint}")
    return str(checkpoint)


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """trainer_state.json of a checkpoint. Raises: ValueError naming what the Trainer would not have written so."""
    file = checkpoint / TRAINER_STATE_NAME
    content = refuse_types(read_object(file), file, STATE_KINDS, required=tuple(STATE_KINDS))
    # Other fields have the kind of their default, where that says one.
    defaults = asdict(TrainerState())
    for name, value in defaults.items():
        if name in content and name not in STATE_KINDS and value is not None:
            refuse_types(content, file, {name: float if type(value) in (int, float) else (type(value), type(None))})
    refuse_types(content, file, {"train_batch_size": (int, type(None)), "best_metric": (int, float, type(None))})
    entries = {f"log_history {number}": entry for number, entry in enumerate(content["log_history"])}
    refuse_types(entries, file, dict.fromkeys(entries, dict))
    for entry in entries.values():
        refuse_types(entry, file, {"step": int, "eval_loss": (int, float)}, required=("step",))
    with refused(str(file)):
        return TrainerState.load_from_json(str(file))


def train(trainer, resume_from: str | None, log: StageLog) -> None:
    """Train from the start or from a checkpoint; one made after the last step only has its adapter loaded.

    The last step is the planned one, or the one that early stopping ended the run at. The Trainer would make one step
    more, because it looks for the end only after a step.

    Raises: Interrupted after a signal, once the run is saved as a checkpoint.
    """
    trainer.add_callback(log)
    if resume_from is not None:
        # 1. A checkpoint made after the last step has nothing left to train.
        state = read_trainer_state(Path(resume_from))
        trainer.best.load(resume_from, trainer.model)
        # The Trainer's own count, from rows, epochs, accumulation and processes.
        planned = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
        if state.global_step >= planned or trainer.best.exhausted:
            trainer.model.load_adapter(resume_from, "default", is_trainable=True)
            # Its last step and its evaluations are what the end of the run goes by.
            trainer.state = state
            return
        # A signal kept the run from an evaluation: it comes before the next step.
        if evaluation_pending(trainer, state):
            trainer.add_callback(CatchUp(trainer))

    # 2. Train; a signal ends it with a checkpoint.
    with (
        suppress(OutOfPatience),
        saved_when_stopped(trainer),
        listed_files(resume_from and Path(resume_from)) as folder,
    ):
        trainer.train(resume_from_checkpoint=folder and str(folder))
        # After a signal the Trainer ends as if all were done, so the exception has to come from here.
        if log.signum:
            raise Interrupted(log.signum)


@contextmanager
def saved_when_stopped(trainer):
    """Let a signal that came within leave a checkpoint of the last step behind; the exception names it."""
    try:
        yield
    except Interrupted as stop:
        name = f"{CHECKPOINT_PREFIX}{trainer.state.global_step}"
        folder = Path(trainer.args.output_dir) / name
        # Before the first step there is nothing to save.
        if trainer.state.global_step == 0:
            raise
        missing = not folder.is_dir() or why_incomplete(folder) is not None
        # All processes have looked before the first of them writes.
        trainer.accelerator.wait_for_everyone()
        if missing:
            # The signal came in an evaluation, before the Trainer had saved this step.
            trainer._save_checkpoint(trainer.model, trial=None)
            # This writes the manifest, without which the folder counts as no checkpoint.
            trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        raise Interrupted(stop.signum, str(folder)) from None


def evaluation_pending(trainer, state: TrainerState) -> bool:
    """Return True if a signal stopped the run before the evaluation that was due after its last step."""
    args = trainer.args
    step = state.global_step
    due = args.eval_strategy == "steps" and step and step % args.eval_steps == 0
    return bool(due) and not any("eval_loss" in entry and entry["step"] == step for entry in state.log_history)


class CatchUp(TrainerCallback):
    """Evaluate before the first step: the evaluation that a signal kept the run from.

    Raises: OutOfPatience where an uninterrupted run would have ended with it; the Trainer looks only after a step.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.evaluate()
        if self.trainer.best.exhausted:
            raise OutOfPatience


def end(trainer) -> None:
    """Leave the process group, all processes together.

    DistributedDataParallel has to go first: if it held the last reference to the group, that would be destroyed under
    Python's global lock while gloo's threads wait for the same lock, and the process would hang instead of ending.
    """
    trainer.accelerator.wait_for_everyone()
    # Trainer and accelerator both hold the wrapped model, so both have to let it go.
    trainer.model_wrapped = None
    trainer.accelerator.free_memory()
    gc.collect()
    trainer.end()


def final_evaluation(trainer) -> None:
    """Evaluate the trained model, unless the last step ended with an evaluation.

    Raises: FloatingPointError where its loss is not finite.
    """
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    # Where --eval_steps divides the number of steps, this evaluation has been made.
    if trainer.state.global_step == 0 or trainer.state.global_step not in steps:
        with saved_when_stopped(trainer):
            trainer.evaluate()
    last = next(entry["eval_loss"] for entry in reversed(trainer.state.log_history) if "eval_loss" in entry)
    if not math.isfinite(last):
        raise FloatingPointError(
            "the trained model's evaluation loss is not finite: no adapter is written; train again with a lower "
            "--learning_rate, or go on from an earlier checkpoint"
        )


def audit_of(args, model, prompt_format: PromptFormat, eval_rows: Sequence[dict]) -> dict | None:
    """The audit of the trained model, made by the first process, or by all where they share the base; or None."""
    inner = model.get_base_model()
    in_shards = mesh_of(inner) is not None
    if not args.audit or not eval_rows or (rank_and_size()[0] and not in_shards):
        return None
    if is_zero3():
        say("no audit: under ZeRO-3 one process alone cannot make it; --audit_only True can, later")
        return None
    if in_shards:
        # The first process alone has put the best evaluation's weights back.
        trained_from_first(model)
    return audit_model(args, backbone_of(inner), inner.score, prompt_format, eval_rows)
