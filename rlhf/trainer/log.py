"""The log of stages 1 and 2: a record at every step, a printed line now and then, a manifest for every checkpoint."""

import math
import time
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from transformers import TrainerCallback

from rlhf.artefacts.checkpoint import complete_or_gone, read_manifest, rotate, write_manifest
from rlhf.cost.flops import flop_counts, format_mfu, mfu, this_card, training_flops
from rlhf.run.launch import rank_and_size, say
from rlhf.run.log import Eta, MetricsLog
from rlhf.run.progress import Progress
from rlhf.run.stopping import agreed, stop_if_agreed

CHECKPOINT_PREFIX = "checkpoint-"


# ---- processes ----
def announce_batches(args, rows: int, unit: str) -> None:
    """Say how many rows an optimizer step sees on all processes together."""
    processes = rank_and_size()[1]
    size = args.per_device_train_batch_size * processes * args.gradient_accumulation_steps
    say(
        f"{rows:,} {unit}; {size} a step = {args.per_device_train_batch_size} a device x {processes} process(es) "
        f"x {args.gradient_accumulation_steps} accumulated"
    )


def open_log(args, resume_from: str | None) -> MetricsLog | None:
    """metrics.jsonl cut back to the checkpoint, as later steps will be run again; None but on the first process."""
    if rank_and_size()[0] != 0:
        return None
    # A fresh start must not append to the records of an earlier run in the same directory.
    done = 0
    if resume_from is None:
        for name in ("metrics.jsonl", "samples.jsonl"):
            (Path(args.output_dir) / name).unlink(missing_ok=True)
    else:
        done = read_manifest(Path(resume_from))["step"]
    # Answers are shown before the first step and after the last: a checkpoint of the last one may stand before them.
    return MetricsLog(args.output_dir, args.log_with, asdict(args), done, samples_done=min(0, done))


def gradients_are_finite(model, engine) -> bool:
    """Return True if a step's gradients are finite. DeepSpeed's `engine` shows only their norm."""
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
        trainer: of the stage; DeepSpeed is asked through it. Its sampler is told the epoch at its start: accelerate
            does that too, but not on several processes after a resume.
        extra: further names of the Trainer's log to keep. sequences: sequences in a row (2: both answers of a pair).
    """

    def __init__(self, log: MetricsLog | None, flags, trainer, extra: tuple[str, ...] = (), sequences: int = 1):
        self.log = log
        self.flags = flags
        self.trainer = trainer
        self.sampler = trainer.sampler
        self.extra = extra
        self.sequences = sequences
        self.signum = 0
        self.left_out = 0
        # State at the last record, from which speed is measured.
        self.mark = time.monotonic()
        self.tokens = 0
        self.marked_step = 0
        self.epoch = 0.0
        self.evaluating: Progress | None = None

    # Evaluations and saving end with this too, so that neither counts as training time.
    def _restart_clock(self, state) -> None:
        self.mark = time.monotonic()
        self.tokens = state.num_input_tokens_seen
        self.marked_step = state.global_step
        self.epoch = state.epoch or 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # Only here does the Trainer know how many steps there will be.
        self.work = flop_counts(model, model.config)
        self.eta = Eta(state.max_steps, state.global_step)
        self._restart_clock(state)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # After a resume inside an epoch it is a fraction, such as 2.4 in the third.
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
        # Every process asks, at the same step: if one of them stopped alone, the others would wait for it forever.
        self.signum = agreed(args.device)
        if self.signum:
            control.should_save = True
            control.should_training_stop = True
            # The resumed run makes up for an evaluation that is due now.
            control.should_evaluate = False
        return control

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        # It begins with the first batch, whose time is lost to the pace: an evaluation that takes long has many.
        self.evaluating = self.evaluating or Progress("evaluation", len(eval_dataloader), "batches")
        self.evaluating.advance()
        # An evaluation can take long, and nothing of it is worth waiting for.
        stop_if_agreed(args.device)

    def on_log(self, args, state, control, logs=None, **kwargs):
        # The Trainer sends evaluations and the summary of the run here as well.
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
        # A stage's own names are kept only where the Trainer has them: not every step does.
        self.log.write(record | {name: logs[name] for name in self.extra if name in logs})

        # metrics.jsonl has every step; the screen gets some of them.
        if state.global_step % self.flags.logging_steps == 0 or state.global_step in (1, state.max_steps):
            print(self.line(state, record), flush=True)
        self._restart_clock(state)

    def line(self, state, record: dict) -> str:
        """One record in one line."""
        utilisation = f", {format_mfu(record['mfu'])}" if "mfu" in record else ""
        # A step without gradients has no norm.
        norm = record["grad_norm"] or 0
        return (
            f"step {state.global_step}/{state.max_steps} | loss {record['loss']:.4f} | lr {record['lr']:.2e} | "
            f"grad_norm {norm:.2f} | {record['tokens/s']:,} tokens/s, {record['samples/s']:.1f} samples/s"
            f"{utilisation} | {record['time/step']:.2f} s/step{self.eta.left(state.global_step)}"
        )

    def speed(self, state, seconds: float) -> dict[str, float]:
        """Tokens and rows of all processes per second since the last record, and their share of the cards' peak.

        The output layer counts at every position of SFT, prompts too: at 7B that is 4 % too much at most.
        """
        tokens = state.num_input_tokens_seen - self.tokens
        # The Trainer counts tokens and epochs, but no rows.
        rows = (state.epoch - self.epoch) * len(self.sampler.lengths)
        rates = {"tokens/s": round(tokens / seconds), "samples/s": rows / seconds}

        # As if all were equally long: attention alone depends on that, and it is the smallest term.
        sequences = max(1, round(rows * self.sequences))
        # A reward model has no output layer.
        head = tokens if self.sequences == 1 else 0
        flops = training_flops(self.work, [tokens / sequences] * sequences, head, self.flags.gradient_checkpointing)
        share = mfu(flops, seconds, this_card(), rank_and_size()[1])
        return rates if share is None else rates | {"mfu": share}

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.evaluating:
            self.evaluating.close()
            self.evaluating = None
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
            about = {"step": state.global_step, "processes": rank_and_size()[1]}
            folder = Path(args.output_dir) / f"{CHECKPOINT_PREFIX}{state.global_step}"
            with complete_or_gone(folder):
                write_manifest(folder, about)
            rotate(args.output_dir, CHECKPOINT_PREFIX, self.flags.save_total_limit)
        self._restart_clock(state)


# Timings of the Trainer's own evaluation record; they are printed, and no business of metrics.jsonl.
EVAL_NOISE = ("_runtime", "_per_second", "_time", "_num_tokens")
