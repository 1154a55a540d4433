"""A PPO run between two steps: copied in memory for undoing a step, saved on disk for resuming.

In memory: `snapshot` copies the whole run before each step, and `restore` undoes that step. `last_good` names the
weights and optimizer state of the last step that the guard accepted, and `roll_back` returns to them after a collapse.
On disk: `save_checkpoint` and `save_interrupted` write a run, and `resume` reads it.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rlhf.artefacts.adapters import save_adapter
from rlhf.artefacts.checkpoint import publish, rotate, why_incomplete
from rlhf.artefacts.output_dir import finished_together
from rlhf.artefacts.run_json import write_run
from rlhf.models import trial
from rlhf.rl.loop import PPOLoop
from rlhf.rl.roles import save_critic
from rlhf.rl.state_file import Copies, load_last_good, load_state, save_last_good, save_state
from rlhf.run.launch import say
from rlhf.run.stopping import Collapse

# KL penalty after a roll back of a run that had none to double.
FIRST_KL_PENALTY = 0.1

# Fields of the PPOLoop that snapshots and checkpoints hold as they are: all are JSON.
KEPT = ("reward_stats", "baseline", "best", "rollbacks", "left_out")


# ---- files ----
def save_stage(loop: PPOLoop, folder: Path, run: dict, metrics: dict) -> None:
    """Write the policy's adapter, its critic, tokenizer and run.json: all that later stages and other tools need."""
    # The tokenizer, often the largest, first: a full disk then leaves no adapter that looks like a finished run's.
    loop.tokenizer.save_pretrained(folder)
    save_adapter(loop.roles.peft_model, folder, "policy")
    save_critic(loop.roles, folder)
    write_run(folder, stage="ppo", args=loop.args, tokenizer=loop.tokenizer, metrics=metrics, **run)


def save_finished(loop: PPOLoop, run: dict, metrics: dict) -> None:
    """Save what a finished run leaves at the top of its directory: all of it or nothing."""
    with finished_together(loop.args.output_dir) as folder:
        save_stage(loop, folder, run, metrics)


# ---- undoing a step ----
@dataclass
class Snapshot:
    """A copy of a run as it is between two steps: `snapshot` makes it, `restore` puts it back.

    weights: copies of the trained parameters and of the optimizer's state (of `loop_weights`).
    state: the rest that a step may change: the fields KEPT, the KL penalty and the guard's memory.
    """

    weights: Copies
    state: dict


def snapshot(loop: PPOLoop) -> Snapshot:
    """Copy all that a step may change, so that `restore` can undo the step; the run itself stays as it is."""
    # Deep, as the guard's memory goes on growing in place.
    return Snapshot(loop_weights(loop), copy.deepcopy(_state(loop)))


def _state(loop: PPOLoop) -> dict:
    """The part of a run that is JSON, not a copy: the fields KEPT, the KL penalty and the guard's memory."""
    state = {name: getattr(loop, name) for name in KEPT}
    # A product rounds as its way does: a run that is resumed keeps its own.
    kernels = trial.in_use()
    return state | {"kl_coef": loop.kl_controller.value, "guard": loop.guard.state_dict(), "kernels": kernels}


def restore(loop: PPOLoop, kept: Snapshot) -> None:
    """Undo a step: put the whole run back to the snapshot that was taken before it."""
    restore_weights(list(loop.roles.trainable().values()), loop.optimizer, kept.weights)
    _put_back(loop, kept.state)


def _put_back(loop: PPOLoop, state: dict) -> None:
    """Set what `_state` read, from a snapshot or from a checkpoint's JSON."""
    for name in KEPT:
        setattr(loop, name, state[name])
    loop.kl_controller.value = state["kl_coef"]
    loop.guard.load_state_dict(state["guard"])
    trial.use(state.get("kernels", {}))


# ---- checkpoints ----
def save_checkpoint(loop: PPOLoop, name: str, run: dict, metrics: dict) -> None:
    """Save the run as step_<n>/ or best/: the stage's files and what a restart needs, complete or not there at all."""
    step = metrics["step"]
    rolls_back = loop.args.on_collapse == "rollback"

    def write(folder: Path) -> None:
        save_stage(loop, folder, run, metrics)
        save_state(folder, loop.optimizer, _state(loop) | {"step": step})
        if rolls_back:
            save_last_good(folder, loop.last_good)

    # All ranks have the same weights, so one of them writes for all.
    if loop.accelerator.is_main_process:
        about = {"step": step, "processes": loop.processes, "base": run["base"]["weights"]}
        # The weights and Adam's two moments of them, and the same again for the last good ones.
        copies = 6 if rolls_back else 3
        min_bytes = copies * sum(p.nbytes for p in loop.roles.trainable().values())
        publish(Path(loop.args.output_dir), name, write, about, min_bytes)
        # best/ has no number: the best policy so far is never rotated away.
        rotate(loop.args.output_dir, "step_", loop.args.save_total_limit)
    # The others wait, or one of them could look for the folder before it is there.
    loop.accelerator.wait_for_everyone()


def save_interrupted(loop: PPOLoop, start: Snapshot, run: dict, metrics: dict) -> str | None:
    """Save the run as it was at the start of the step that a signal cut short; `metrics` names the steps done.

    Returns: the checkpoint's path, or None before the first step is done.
    """
    # Half a step is worth nothing: the resumed run makes it again from its start.
    restore(loop, start)
    if metrics["step"] == 0:
        return None

    # After a step that was due to be saved, the checkpoint is there already.
    name = f"step_{metrics['step']}"
    folder = Path(loop.args.output_dir) / name
    missing = not folder.is_dir() or why_incomplete(folder) is not None

    # Every process must have looked before the first of them writes, or they would decide differently.
    loop.accelerator.wait_for_everyone()
    if missing:
        save_checkpoint(loop, name, run, metrics)
    return str(folder)


def resume(loop: PPOLoop, folder: Path) -> int:
    """Put back the state of a checkpoint (its weights are loaded already); returns the steps that are done."""
    state = load_state(folder, loop.optimizer)
    # Exactly as many steps as asked for are fine: then only the end of the run is left to do.
    if state["step"] > loop.total_steps:
        raise ValueError(
            f"--steps {loop.args.steps} asks for {loop.total_steps} steps, but {state['step']} are done: ask for more"
        )
    _put_back(loop, state)
    loop.last_good = load_last_good(folder, loop.accelerator.device)
    say(f"going on from {folder}")
    if loop.accelerator.is_main_process and loop.args.resume_from_checkpoint == "True":
        # A run that was killed between its last checkpoint and the rotation left one checkpoint too many.
        rotate(loop.args.output_dir, "step_", loop.args.save_total_limit)
    return state["step"]


# ---- rolling back after a collapse ----
def loop_weights(loop: PPOLoop) -> Copies:
    """Copies of the run's trained parameters and of its optimizer's state, of `copy_weights`."""
    return copy_weights(list(loop.roles.trainable().values()), loop.optimizer)


def last_good(loop: PPOLoop, metrics: dict, start: Copies) -> Copies:
    """Choose the copies that `roll_back` would put back, after a step that the guard accepted; changes nothing.

    The answers of a step came from the weights it began with, so the guard accepted those: without a judge they are
    the last good ones. With a judge, only weights that an evaluation has approved are.

    Args:
        metrics: of the step. start: copies made before the step, of `loop_weights`.
    """
    if not loop.args.judge_lora_path:
        return start
    return loop_weights(loop) if "eval/judge/mean" in metrics else loop.last_good


def roll_back(loop: PPOLoop, reason: str) -> None:
    """Put back the last good weights and optimizer state, at twice the KL penalty, or stop the run (--on_collapse).

    Unlike `restore` it leaves the guard and its counts as they are. Data and random draws go on with the next step, so
    what led into the collapse is not played again.

    Raises: Collapse (exit code 3) with the reason.
    """
    # `rollbacks` counts over resumes as well: a run that collapses again and again is to end.
    if loop.args.on_collapse == "stop" or loop.rollbacks == loop.args.max_rollbacks:
        raise Collapse(
            f"stopped by the guard: {reason}; no final adapter was written, earlier step_<n> and best/ are in "
            f"{loop.args.output_dir}. The reward model is the first to look at (docs/ppo.md)"
        )

    restore_weights(list(loop.roles.trainable().values()), loop.optimizer, loop.last_good)
    loop.rollbacks += 1
    # Twice nothing would be nothing.
    loop.kl_controller.value = 2 * loop.kl_controller.value or FIRST_KL_PENALTY
    say(f"rollback {loop.rollbacks}: {reason}; KL penalty now {loop.kl_controller.value:.3g}")


# ---- copies of weights ----
def copy_weights(parameters: list[nn.Parameter], optimizer) -> Copies:
    """Copy all that an update changes: the parameters and the optimizer's state.

    They are a few MB of adapter and twice that of optimizer state, so a copy before each step costs little.
    """
    state = {}
    for index, entry in optimizer.state_dict()["state"].items():
        # The optimizer changes these tensors in place.
        state[index] = {key: value.clone() if torch.is_tensor(value) else value for key, value in entry.items()}
    return [p.detach().clone() for p in parameters], state


@torch.no_grad()
def restore_weights(parameters: list[nn.Parameter], optimizer, copies: Copies) -> None:
    """Put the copies that `copy_weights` made back into the parameters and the optimizer.

    The copies themselves stay unchanged afterwards, so they can be put back again.
    """
    weights, state = copies
    for p, saved in zip(parameters, weights, strict=True):
        p.copy_(saved)
    # The groups of the optimizer stay as they are, for the learning rate is set anew in every step.
    # The optimizer may keep and change the very tensors it is given.
    optimizer.load_state_dict(optimizer.state_dict() | {"state": copy.deepcopy(state)})
