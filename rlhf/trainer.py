"""What the two Trainer stages (SFT, reward) share round their training: log, checkpoints to be trusted, processes."""

import gc
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from rlhf.artefacts import save_adapter
from rlhf.batches import LengthGroupedSampler
from rlhf.checkpoint import defect, newest_complete, write_manifest
from rlhf.report import Eta, MetricsLog

CHECKPOINT_PREFIX = "checkpoint-"


# ---- processes ----
def world() -> tuple[int, int]:
    """(rank, number of processes) as the launcher says, before any process group exists."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def say(*lines: str) -> None:
    """Print on the first process only."""
    if world()[0] == 0:
        print(*lines, sep="\n", flush=True)


def announce_batches(args, rows: int, unit: str) -> None:
    """Say how many rows an optimizer step sees on all processes together."""
    processes = world()[1]
    size = args.per_device_train_batch_size * processes * args.gradient_accumulation_steps
    say(
        f"{rows:,} {unit}; {size} a step = {args.per_device_train_batch_size} a device x {processes} process(es) "
        f"x {args.gradient_accumulation_steps} accumulated"
    )


# ---- starting again ----
def resume_point(args) -> str | None:
    """The checkpoint to go on from: the newest complete one, the one named, or None for a fresh start.

    Raises: ValueError where the named checkpoint is not complete.
    """
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint == "True":
        found = newest_complete(args.output_dir, CHECKPOINT_PREFIX)
        say(f"going on from {found}" if found else f"no checkpoint in {args.output_dir} yet: starting fresh")
        return None if found is None else str(found)
    reason = defect(Path(args.resume_from_checkpoint))
    if reason is not None:
        raise ValueError(f"--resume_from_checkpoint {args.resume_from_checkpoint} cannot be used: {reason}")
    return args.resume_from_checkpoint


def open_log(args, resume_from: str | None) -> MetricsLog | None:
    """metrics.jsonl cut back to the checkpoint, as later steps will be run again; None but on the first process."""
    if world()[0] != 0:
        return None
    done = 0
    if resume_from is None:
        for name in ("metrics.jsonl", "samples.jsonl"):
            (Path(args.output_dir) / name).unlink(missing_ok=True)
    else:
        done = int(Path(resume_from).name.removeprefix(CHECKPOINT_PREFIX))
    return MetricsLog(args.output_dir, args.log_with, asdict(args), done)


# ---- while training ----
def save_checkpoint(trainer, output_dir: str | None) -> None:
    """What a Trainer stage writes of its model: adapter and tokenizer, no pickled arguments beside them."""
    if trainer.args.should_save:
        save_adapter(trainer.model, output_dir or trainer.args.output_dir)
        trainer.processing_class.save_pretrained(output_dir or trainer.args.output_dir)


def forked_rng():
    """Context in which random numbers may be drawn without changing what training draws afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=devices)


class StageLog(TrainerCallback):
    """metrics.jsonl at every step, a readable line every few, and a manifest for every checkpoint.

    A training record: step, epoch, loss (of the step's batches), lr, grad_norm (before clipping), tokens/s (real
    tokens of all processes), time/step (seconds, without evaluation and saving), and the `extra` names of the stage.
    An evaluation record: step and the metrics the stage names, eval_loss among them.

    Args:
        log: None on all processes but the first. print_every: steps between printed lines.
        sampler: told the epoch at its start. accelerate does that too, but not on several processes after a resume.
        extra: further names of the Trainer's log to keep.
    """

    def __init__(self, log: MetricsLog | None, print_every: int, sampler: LengthGroupedSampler, extra=()):
        self.log, self.print_every, self.sampler, self.extra = log, print_every, sampler, extra
        self.mark, self.tokens, self.marked_step = time.monotonic(), 0, 0

    def _restart_clock(self, state) -> None:
        self.mark, self.tokens, self.marked_step = time.monotonic(), state.num_input_tokens_seen, state.global_step

    def on_train_begin(self, args, state, control, **kwargs):
        self.eta = Eta(state.max_steps, state.global_step)
        self._restart_clock(state)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        # With float16 the gradient scaler leaves such a step out and goes on with a smaller scale.
        if not args.fp16 and not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
            raise FloatingPointError(
                f"the gradient of step {state.global_step + 1} is not finite; training stops before it is applied: "
                "lower --learning_rate, or look for broken rows with --inspect_data True"
            )

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
            "tokens/s": round((state.num_input_tokens_seen - self.tokens) / seconds),
            "time/step": seconds / max(1, state.global_step - self.marked_step),
        }
        self.log.write(record | {name: logs[name] for name in self.extra if name in logs})
        if state.global_step % self.print_every == 0 or state.global_step in (1, state.max_steps):
            print(
                f"step {state.global_step}/{state.max_steps} | loss {logs['loss']:.4f} | "
                f"lr {logs['learning_rate']:.2e} | grad_norm {logs.get('grad_norm', 0):.2f} | "
                f"{record['tokens/s']:,} tokens/s | {record['time/step']:.2f} s/step | "
                f"ETA {self.eta.left(state.global_step)}",
                flush=True,
            )
        self._restart_clock(state)

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
            write_manifest(Path(args.output_dir) / f"{CHECKPOINT_PREFIX}{state.global_step}")
        self._restart_clock(state)


# Timings of the Trainer's own evaluation record; they are printed, and no business of metrics.jsonl.
EVAL_NOISE = ("_runtime", "_per_second", "_time", "_num_tokens")


def train(trainer, resume_from: str | None) -> None:
    """Train from the start or from a checkpoint; one made after the last step only has its adapter loaded.

    There the Trainer would make one step too many, because it looks at the number of steps only after each of them.
    """
    if resume_from is not None:
        state = TrainerState.load_from_json(str(Path(resume_from) / TRAINER_STATE_NAME))
        planned = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
        if state.global_step >= planned:
            trainer.model.load_adapter(resume_from, "default", is_trainable=True)
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=resume_from)


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
    """Evaluate the trained model, unless the last step ended with an evaluation."""
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if trainer.state.global_step == 0 or trainer.state.global_step not in steps:
        trainer.evaluate()
