"""A PPO run between two steps: kept in memory for a rollback, on disk for resuming."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf.artefacts.adapters import save_adapter
from rlhf.artefacts.checkpoint import publish, rotate, why_incomplete
from rlhf.artefacts.files import load_tensors, write_json
from rlhf.artefacts.run_json import write_run
from rlhf.rl.loop import PPOLoop
from rlhf.rl.roles import save_critic
from rlhf.run.stopping import Collapse

OPTIMIZER_FILE = "optimizer.safetensors"

STATE_FILE = "state.json"

GOOD_FILE = "good.safetensors"


def save_state(folder: Path, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write the optimizer's tensors as safetensors ("<parameter index>.<key>") and `state` as JSON."""
    save_file(_flat(optimizer.state_dict()["state"]), folder / OPTIMIZER_FILE)
    write_json(folder / STATE_FILE, state)


def load_state(folder: Path, optimizer: torch.optim.Optimizer) -> dict:
    """Put back what `save_state` wrote of the optimizer (same parameters, same order); returns the rest."""
    optimizer.load_state_dict(optimizer.state_dict() | {"state": _nested(load_tensors(folder / OPTIMIZER_FILE))})
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))


def save_last_good(folder: Path, good: tuple[list[torch.Tensor], dict]) -> None:
    """Write the weights and optimizer state that a rollback would go back to (of `copy_weights`)."""
    parameters = {f"parameter.{index}": tensor.cpu().contiguous() for index, tensor in enumerate(good[0])}
    save_file(parameters | _flat(good[1]), folder / GOOD_FILE)


def load_last_good(folder: Path, device: torch.device) -> tuple[list[torch.Tensor], dict] | None:
    """Read what `save_last_good` wrote, or return None for a run that never rolls back."""
    if not (folder / GOOD_FILE).is_file():
        return None
    tensors = {name: tensor.to(device) for name, tensor in load_tensors(folder / GOOD_FILE).items()}
    count = sum(name.startswith("parameter.") for name in tensors)
    parameters = [tensors.pop(f"parameter.{index}") for index in range(count)]
    return parameters, _nested(tensors)


def _flat(state: dict[int, dict]) -> dict[str, torch.Tensor]:
    tensors = {}
    for index, entry in state.items():
        for key, value in entry.items():
            tensors[f"{index}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def _nested(tensors: dict[str, torch.Tensor]) -> dict[int, dict]:
    state: dict[int, dict] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    return state


# KL penalty after a rollback of a run that had none to double.
FIRST_PRICE = 0.1

# Fields of the PPOLoop that a checkpoint keeps as they are.
KEPT = ("reward_stats", "baseline", "best", "rollbacks", "left_out")


def save_stage(loop: PPOLoop, folder: Path, run: dict, metrics: dict) -> None:
    """The policy's adapter, its critic, tokenizer and run.json: all that later stages and other tools need."""
    # The largest first: on a full disk no adapter is left that looks like a finished run's.
    loop.tokenizer.save_pretrained(folder)
    save_adapter(loop.roles.peft_model, folder, "policy")
    save_critic(loop.roles, folder)
    write_run(folder, stage="ppo", args=loop.args, tokenizer=loop.tokenizer, metrics=metrics, **run)


@dataclass
class Snapshot:
    """A run as it is between two steps: `restore` puts it back, `save_checkpoint` writes it."""

    weights: tuple
    state: dict


def snapshot(loop: PPOLoop) -> Snapshot:
    """Copy all that a step may change: weights, optimizer, and what a checkpoint keeps as JSON."""
    return Snapshot(loop_weights(loop), copy.deepcopy(_state(loop)))


def _state(loop: PPOLoop) -> dict:
    state = {name: getattr(loop, name) for name in KEPT}
    return state | {"kl_coef": loop.kl_controller.value, "guard": loop.guard.state_dict()}


def restore(loop: PPOLoop, kept: Snapshot) -> None:
    """Put the run back to a snapshot, as if the step since then had not begun."""
    restore_weights(list(loop.roles.trainable().values()), loop.optimizer, kept.weights)
    _put_back(loop, kept.state)


def _put_back(loop: PPOLoop, state: dict) -> None:
    for name in KEPT:
        setattr(loop, name, state[name])
    loop.kl_controller.value = state["kl_coef"]
    loop.guard.load_state_dict(state["guard"])


def save_checkpoint(loop: PPOLoop, name: str, run: dict, metrics: dict) -> None:
    """step_<n>/ or best/: the stage's files and what a restart needs, complete or not there at all."""
    step = metrics["step"]

    def write(folder: Path) -> None:
        save_stage(loop, folder, run, metrics)
        save_state(folder, loop.optimizer, _state(loop) | {"step": step})
        if loop.args.on_collapse == "rollback":
            save_last_good(folder, loop.last_good)

    if loop.accelerator.is_main_process:
        about = {"step": step, "processes": loop.processes, "base": run["base"]["weights"]}
        # Weights and Adam's two moments of them, and as much again for what a rollback goes back to.
        min_bytes = (6 if loop.args.on_collapse == "rollback" else 3) * sum(
            p.nbytes for p in loop.roles.trainable().values()
        )
        publish(Path(loop.args.output_dir), name, write, about, min_bytes)
        rotate(loop.args.output_dir, "step_", loop.args.save_total_limit)
    loop.accelerator.wait_for_everyone()


def save_interrupted(loop: PPOLoop, start: Snapshot, run: dict, metrics: dict) -> str | None:
    """Save the run as it was at the start of the step that a signal cut short; `metrics` names the steps done.

    Returns: the checkpoint's path, or None before the first step is done.
    """
    restore(loop, start)
    if metrics["step"] == 0:
        return None
    name = f"step_{metrics['step']}"
    folder = Path(loop.args.output_dir) / name
    missing = not folder.is_dir() or why_incomplete(folder) is not None
    # All processes have looked before the first of them writes.
    loop.accelerator.wait_for_everyone()
    if missing:
        save_checkpoint(loop, name, run, metrics)
    return str(folder)


def resume(loop: PPOLoop, folder: Path) -> int:
    """Put back the state of a checkpoint (its weights are loaded already); returns the steps that are done."""
    state = load_state(folder, loop.optimizer)
    _put_back(loop, state)
    loop.last_good = load_last_good(folder, loop.accelerator.device)
    if loop.accelerator.is_main_process and loop.args.resume_from_checkpoint == "True":
        # What a run killed between its last checkpoint and the rotation left over.
        rotate(loop.args.output_dir, "step_", loop.args.save_total_limit)
    return state["step"]


def loop_weights(loop: PPOLoop) -> tuple:
    """Copies of all that a step may change in weights and optimizer, for `roll_back`."""
    return copy_weights(list(loop.roles.trainable().values()), loop.optimizer)


def last_good(loop: PPOLoop, metrics: dict, start: tuple) -> tuple:
    """Weights and optimizer to go back to after a good step that began at `start`.

    The answers of a step came from the weights it began with, so those are known to be good. With a judge, only what
    it has approved is.
    """
    if not loop.args.judge_lora_path:
        return start
    return loop_weights(loop) if "eval/judge/mean" in metrics else loop.last_good


def roll_back(loop: PPOLoop, reason: str) -> None:
    """Go back to the last good weights at twice the KL penalty, if --on_collapse says so; else stop the run.

    Data and random draws go on from here, so what led into the collapse is not played again.

    Raises: Collapse (exit code 3) with the reason.
    """
    if loop.args.on_collapse == "stop" or loop.rollbacks == loop.args.max_rollbacks:
        raise Collapse(
            f"stopped by the guard: {reason}; no final adapter was written, earlier step_<n> and best/ are in "
            f"{loop.args.output_dir}. The reward model is the first to look at (docs/ppo.md)"
        )
    restore_weights(list(loop.roles.trainable().values()), loop.optimizer, loop.last_good)
    loop.rollbacks += 1
    loop.kl_controller.value = 2 * loop.kl_controller.value or FIRST_PRICE
    if loop.accelerator.is_main_process:
        print(f"rollback {loop.rollbacks}: {reason}; KL penalty now {loop.kl_controller.value:.3g}", flush=True)


def copy_weights(parameters: list[nn.Parameter], optimizer) -> tuple[list[Tensor], dict]:
    """Copies of all that an update changes: a few MB of adapter and twice that of optimizer state."""
    state = {
        index: {key: value.clone() if torch.is_tensor(value) else value for key, value in entry.items()}
        for index, entry in optimizer.state_dict()["state"].items()
    }
    return [p.detach().clone() for p in parameters], state


@torch.no_grad()
def restore_weights(parameters: list[nn.Parameter], optimizer, copies: tuple[list[Tensor], dict]) -> None:
    """Put back what `copy_weights` copied; the copies stay good for another time."""
    for p, saved in zip(parameters, copies[0], strict=True):
        p.copy_(saved)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": copy.deepcopy(copies[1])})
