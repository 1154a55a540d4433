"""What the two Trainer stages (SFT, reward) share round their training: log, checkpoints to be trusted, processes."""

import gc
import math
import pickle
import shutil
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from transformers import TrainerCallback, TrainerState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME

from rlhf.artefacts import read_adapter, save_adapter, write_run
from rlhf.batches import LengthGroupedSampler
from rlhf.checkpoint import complete_or_gone, defect, read_manifest, rotate, to_resume, write_manifest
from rlhf.flops import in_words, mfu, this_card, training_flops, work_of
from rlhf.launch import say, world
from rlhf.report import Eta, MetricsLog
from rlhf.resume import refuse_changes
from rlhf.signals import Interrupted, agreed, stop_if_agreed

CHECKPOINT_PREFIX = "checkpoint-"


# ---- processes ----
def announce_batches(args, rows: int, unit: str) -> None:
    """Say how many rows an optimizer step sees on all processes together."""
    processes = world()[1]
    size = args.per_device_train_batch_size * processes * args.gradient_accumulation_steps
    say(
        f"{rows:,} {unit}; {size} a step = {args.per_device_train_batch_size} a device x {processes} process(es) "
        f"x {args.gradient_accumulation_steps} accumulated"
    )


def bad_rows_file(args) -> Path | None:
    """Where --bad_rows skip writes malformed rows; None where this process has no claim on the output directory."""
    idle = args.inspect_data or getattr(args, "audit_only", False) or world()[0] != 0
    return None if idle else Path(args.output_dir) / "bad_rows.jsonl"


# ---- starting again ----
def resume_point(args, about: dict) -> str | None:
    """The checkpoint to go on from: the newest complete one, the one named, or None for a fresh start.

    Args:
        about: what this command would write into run.json (see `write_run`).
    Raises: ValueError where the named checkpoint is not complete, or was written by another command.
    """
    found = to_resume(args.resume_from_checkpoint, args.output_dir, CHECKPOINT_PREFIX)
    if found is None:
        if args.resume_from_checkpoint:
            say(f"no checkpoint in {args.output_dir} yet: starting fresh")
        return None
    refuse_changes(found, args, about, world()[1])
    # The Trainer's own words on a damaged file name none.
    read_adapter(found)
    if world()[0] == 0 and args.resume_from_checkpoint == "True":
        # What a run killed between its last checkpoint and the rotation left over.
        rotate(args.output_dir, CHECKPOINT_PREFIX, args.save_total_limit)
    say(f"going on from {found}")
    return str(found)


def open_log(args, resume_from: str | None) -> MetricsLog | None:
    """metrics.jsonl cut back to the checkpoint, as later steps will be run again; None but on the first process."""
    if world()[0] != 0:
        return None
    done = 0
    if resume_from is None:
        for name in ("metrics.jsonl", "samples.jsonl"):
            (Path(args.output_dir) / name).unlink(missing_ok=True)
    else:
        done = read_manifest(Path(resume_from))["step"]
    return MetricsLog(args.output_dir, args.log_with, asdict(args), done)


# ---- weights in pieces ----
def in_pieces() -> bool:
    """Whether DeepSpeed spreads the weights over the processes (ZeRO-3): a forward is then a matter of all of them."""
    return is_deepspeed_zero3_enabled()


@contextmanager
def trained_weights_whole(model):
    """Within the block, which all processes have to enter, each of them holds all of what is trained."""
    if not in_pieces():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad]):
        yield


# ---- while training ----
def save_checkpoint(trainer, output_dir: str | None, state_dict: dict | None) -> None:
    """What a Trainer stage writes of its model: adapter, tokenizer and run.json, no pickled arguments beside them."""
    if trainer.args.should_save:
        folder = output_dir or trainer.args.output_dir
        save_adapter(trainer.model, folder, state_dict=state_dict if in_pieces() else None)
        trainer.processing_class.save_pretrained(folder)
        write_run(folder, **trainer.about)


@contextmanager
def writing_checkpoint(trainer):
    """Where the Trainer writes its next checkpoint in place: the folder is empty before, and gone after a failure."""
    folder = Path(trainer.args.output_dir) / f"{CHECKPOINT_PREFIX}{trainer.state.global_step}"
    if trainer.args.should_save and folder.is_dir() and defect(folder) is not None:
        # A killed run's leftovers would be listed as parts of this checkpoint.
        shutil.rmtree(folder)
    # The adapter and Adam's two moments of it.
    least = 3 * sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    with complete_or_gone(folder, least):
        yield


def gradients_are_finite(model, engine) -> bool:
    """Whether a step's gradients are numbers. DeepSpeed's `engine` shows their norm only, and left such a step out."""
    if engine is None:
        return all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    norm = engine.get_global_grad_norm()
    # DeepSpeed's norm of what is not finite is infinite, or -1.
    return norm is None or 0 <= float(norm) < math.inf


class StageLog(TrainerCallback):
    """metrics.jsonl at every step, a readable line every few, and a manifest for every checkpoint.

    A training record: step, epoch, loss (of the step's batches), lr, grad_norm (before clipping), tokens/s (real
    tokens of all processes), samples/s (rows or pairs), mfu (where the card's peak is known), time/step (seconds,
    without evaluation and saving), and the `extra` names of the stage.
    An evaluation record: step and the metrics the stage names, eval_loss among them.

    Args:
        log: None on all processes but the first. flags: the script's.
        sampler: told the epoch at its start. accelerate does that too, but not on several processes after a resume.
        extra: further names of the Trainer's log to keep. sequences: of a row (2: both answers of a pair).
    """

    def __init__(self, log: MetricsLog | None, flags, sampler: LengthGroupedSampler, extra=(), sequences: int = 1):
        self.log, self.flags, self.sampler, self.extra, self.sequences = log, flags, sampler, extra, sequences
        self.mark, self.tokens, self.marked_step, self.epoch = time.monotonic(), 0, 0, 0.0
        self.signum = self.left_out = 0
        # Set by `train`; DeepSpeed is asked through it.
        self.trainer = None

    def _restart_clock(self, state) -> None:
        self.mark, self.tokens, self.marked_step = time.monotonic(), state.num_input_tokens_seen, state.global_step
        self.epoch = state.epoch or 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.work = work_of(model, model.config)
        self.eta = Eta(state.max_steps, state.global_step)
        self._restart_clock(state)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        # With float16 the gradient scaler leaves such a step out and goes on with a smaller scale.
        if args.fp16 or gradients_are_finite(model, getattr(self.trainer, "deepspeed", None)):
            return
        words = f"the gradient of step {state.global_step + 1} is not finite"
        if self.flags.on_non_finite == "stop":
            raise FloatingPointError(
                f"{words}; training stops before it is applied: lower --learning_rate, look for broken rows with "
                "--inspect_data True, or leave such steps out with --on_non_finite skip"
            )
        self.left_out += 1
        say(f"{words}: left out, {self.left_out} so far")
        for parameter in model.parameters():
            # A parameter without a gradient is left alone by the optimizer, its moments too.
            parameter.grad = None

    def on_step_end(self, args, state, control, **kwargs):
        self.signum = agreed(args.device)
        if self.signum:
            # What an evaluation due now would say is caught up on by the resumed run.
            control.should_save, control.should_training_stop, control.should_evaluate = True, True, False
        return control

    def on_prediction_step(self, args, state, control, **kwargs):
        stop_if_agreed(args.device)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.log is None or "loss" not in logs:
            return
        seconds = max(time.monotonic() - self.mark, 1e-9)
        record = {
            "step": state.global_step,
            "epoch": logs["epoch"],
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            **self.speed(state, seconds),
            "time/step": seconds / max(1, state.global_step - self.marked_step),
        }
        if self.left_out:
            record["left_out"] = self.left_out
        self.log.write(record | {name: logs[name] for name in self.extra if name in logs})
        if state.global_step % self.flags.logging_steps == 0 or state.global_step in (1, state.max_steps):
            print(
                f"step {state.global_step}/{state.max_steps} | loss {logs['loss']:.4f} | "
                f"lr {logs['learning_rate']:.2e} | grad_norm {logs.get('grad_norm', 0):.2f} | "
                f"{record['tokens/s']:,} tokens/s, {record['samples/s']:.1f} samples/s"
                f"{', ' + in_words(record['mfu']) if 'mfu' in record else ''} | {record['time/step']:.2f} s/step | "
                f"ETA {self.eta.left(state.global_step)}",
                flush=True,
            )
        self._restart_clock(state)

    def speed(self, state, seconds: float) -> dict[str, float]:
        """What all processes got through in a second since the last record, and its share of the cards' peak.

        The output layer counts at every position of SFT, prompts too: at 7B that is 4 % too much at most.
        """
        tokens, rows = (
            state.num_input_tokens_seen - self.tokens,
            (state.epoch - self.epoch) * len(self.sampler.lengths),
        )
        found = {"tokens/s": round(tokens / seconds), "samples/s": rows / seconds}
        sequences = max(1, round(rows * self.sequences))
        head = tokens if self.sequences == 1 else 0
        flops = training_flops(self.work, [tokens / sequences] * sequences, head, self.flags.gradient_checkpointing)
        share = mfu(flops, seconds, this_card(), world()[1])
        return found if share is None else found | {"mfu": share}

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        measured = {k: v for k, v in metrics.items() if k.startswith("eval_") and not k.endswith(EVAL_NOISE)}
        if self.log is not None:
            self.log.write({"step": state.global_step, **measured})
            shown = " | ".join(f"{name} {value:.4f}" for name, value in measured.items())
            print(f"step {state.global_step} | {shown} | {metrics['eval_runtime']:.1f} s", flush=True)
        self._restart_clock(state)

    def on_save(self, args, state, control, **kwargs):
        # The random states of all processes must be on disk before the list of files is drawn up.
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        if self.log is not None:
            about = {"step": state.global_step, "processes": world()[1]}
            folder = Path(args.output_dir) / f"{CHECKPOINT_PREFIX}{state.global_step}"
            with complete_or_gone(folder):
                write_manifest(folder, about)
            rotate(args.output_dir, CHECKPOINT_PREFIX, self.flags.save_total_limit)
        self._restart_clock(state)


# Timings of the Trainer's own evaluation record; they are printed, and no business of metrics.jsonl.
EVAL_NOISE = ("_runtime", "_per_second", "_time", "_num_tokens")


def train(trainer, resume_from: str | None, log: StageLog) -> None:
    """Train from the start or from a checkpoint; one made after the last step only has its adapter loaded.

    There the Trainer would make one step too many, because it looks at the number of steps only after each of them.

    Raises: Interrupted after a signal, once the run is saved as a checkpoint.
    """
    if resume_from is not None:
        state = TrainerState.load_from_json(str(Path(resume_from) / TRAINER_STATE_NAME))
        planned = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
        if state.global_step >= planned:
            trainer.model.load_adapter(resume_from, "default", is_trainable=True)
            trainer.state = state
            return
        if evaluation_pending(trainer, state):
            trainer.add_callback(CatchUp(trainer))
    log.trainer = trainer
    with saved_when_stopped(trainer), plain_tensors_only(resume_from):
        trainer.train(resume_from_checkpoint=resume_from)
        if log.signum:
            raise Interrupted(log.signum)


@contextmanager
def plain_tensors_only(resume_from: str | None):
    """One sentence where the Trainer, which reads its optimizer and random states safely, finds code in them."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{resume_from} holds more than tensors in its optimizer or random states, and no code of it was run: go "
            "on from a checkpoint of your own"
        ) from error


@contextmanager
def saved_when_stopped(trainer):
    """Let a signal that came within leave a checkpoint of the last step behind; the exception names it."""
    try:
        yield
    except Interrupted as stop:
        name = f"{CHECKPOINT_PREFIX}{trainer.state.global_step}"
        folder = Path(trainer.args.output_dir) / name
        if trainer.state.global_step == 0:
            raise
        missing = not folder.is_dir() or defect(folder) is not None
        # All processes have looked before the first of them writes.
        trainer.accelerator.wait_for_everyone()
        if missing:
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        raise Interrupted(stop.signum, str(folder)) from None


def evaluation_pending(trainer, state: TrainerState) -> bool:
    """Whether the run was stopped before the evaluation that its last step was due to."""
    args, step = trainer.args, state.global_step
    due = args.eval_strategy == "steps" and step and step % args.eval_steps == 0
    return bool(due) and not any("eval_loss" in entry and entry["step"] == step for entry in state.log_history)


class CatchUp(TrainerCallback):
    """Evaluate before the first step: the evaluation that a signal kept the run from."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.evaluate()


def end(trainer) -> None:
    """Leave the process group, all processes together.

    DistributedDataParallel has to go first: if it held the last reference to the group, that would be destroyed under
    Python's global lock while gloo's threads wait for the same lock, and the process would hang instead of ending.
    """
    trainer.accelerator.wait_for_everyone()
    trainer.model_wrapped = None
    trainer.accelerator.free_memory()
    gc.collect()
    trainer.end()


def final_evaluation(trainer) -> None:
    """Evaluate the trained model, unless the last step ended with an evaluation.

    Raises: FloatingPointError where its loss is not finite.
    """
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if trainer.state.global_step == 0 or trainer.state.global_step not in steps:
        with saved_when_stopped(trainer):
            trainer.evaluate()
    last = next(entry["eval_loss"] for entry in reversed(trainer.state.log_history) if "eval_loss" in entry)
    if not math.isfinite(last):
        raise FloatingPointError(
            "the trained model's evaluation loss is not finite: no adapter is written; train again with a lower "
            "--learning_rate, or go on from an earlier checkpoint"
        )
