"""Files of a PPO checkpoint beside its adapter: optimizer, the rest of the state as JSON, the last good weights."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf.artefacts.checkpoint import read_manifest
from rlhf.artefacts.damage import refuse_other_shapes, refuse_types, refused
from rlhf.artefacts.files import load_tensors, read_object, write_json
from rlhf.models import trial

OPTIMIZER_FILE = "optimizer.safetensors"

STATE_FILE = "state.json"

GOOD_FILE = "good.safetensors"

# Copies of all trained parameters, in their order, and of the optimizer's state (parameter index -> key -> value).
Copies = tuple[list[Tensor], dict]

# What state.json holds, and what some of its fields hold: float is a finite number, and a gain over an
# evaluation that was not made is NaN.
STATE_KINDS = {
    "step": int, "rollbacks": int, "left_out": int, "kl_coef": float, "reward_stats": dict, "baseline": dict,
    "best": dict, "guard": dict,
}  # fmt: skip
FIELD_KINDS = {
    "best": {"step": int, "value": float, "gain": (int, float), "error": (int, float)},
}


def save_state(folder: Path, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write the optimizer's tensors as safetensors ("<parameter index>.<key>") and `state` as JSON."""
    # As plain tensors: reading a checkpoint from elsewhere must run no code.
    save_file(_flat(optimizer.state_dict()["state"]), folder / OPTIMIZER_FILE)
    write_json(folder / STATE_FILE, state)


def load_state(folder: Path, optimizer: torch.optim.Optimizer) -> dict:
    """Put what `save_state` wrote back into the optimizer (same parameters, same order); returns `state`."""
    tensors = load_tensors(folder / OPTIMIZER_FILE)
    # Learning rate and betas follow from the flags: they are the new optimizer's.
    with refused(str(folder / OPTIMIZER_FILE)):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": _nested(tensors)})
        refuse_other_shapes(optimizer)
    return read_state(folder)


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint. Raises: ValueError naming the field that a run would not have written so."""
    file = folder / STATE_FILE
    state = refuse_types(read_object(file), file, STATE_KINDS, required=tuple(STATE_KINDS))
    # Each is empty until there is something to hold.
    for name, kinds in FIELD_KINDS.items():
        if state[name]:
            refuse_types(state[name], file, kinds, required=tuple(kinds))
    refuse_types(state["baseline"], file, dict.fromkeys(state["baseline"], (int, float)))
    # A run of an earlier version has none of them.
    kernels = refuse_types({"kernels": {}} | state, file, {"kernels": dict})["kernels"]
    if not all(way in list(trial.WAYS) for way in kernels.values()):
        raise ValueError(f"{file}: its kernels are none of {', '.join(trial.WAYS)}: it is damaged, or was changed")
    # A mean and a deviation for each part of the score.
    parts = sorted({name.removesuffix("mean").removesuffix("std") for name in state["reward_stats"]})
    needed = [f"{part}mean" for part in parts] + [f"{part}std" for part in parts]
    refuse_types(state["reward_stats"], file, dict.fromkeys(state["reward_stats"], float), required=tuple(needed))

    guard = refuse_types(state["guard"], file, {"start": dict, "recent_kl": list}, required=("start", "recent_kl"))
    refuse_types(guard["start"], file, dict.fromkeys(guard["start"], float))
    recent = {f"recent_kl {number}": value for number, value in enumerate(guard["recent_kl"])}
    refuse_types(recent, file, dict.fromkeys(recent, float))
    return state


def save_last_good(folder: Path, good: Copies) -> None:
    """Write the copies of weights and optimizer state (of `copy_weights`) that `roll_back` would put back."""
    weights, optimizer_state = good
    parameters = {f"parameter.{index}": tensor.cpu().contiguous() for index, tensor in enumerate(weights)}
    # One file for both, so that neither can be of another step than the other.
    save_file(parameters | _flat(optimizer_state), folder / GOOD_FILE)


def load_last_good(folder: Path, device: torch.device) -> Copies | None:
    """Read what `save_last_good` wrote, or return None for a run that never rolls back."""
    # Listed, for anybody may have put a file of that name there.
    if GOOD_FILE not in read_manifest(folder)["files"]:
        return None
    tensors = {name: tensor.to(device) for name, tensor in load_tensors(folder / GOOD_FILE).items()}

    # By number, not in the file's order, in which 10 stands before 2. The rest is the optimizer's.
    with refused(str(folder / GOOD_FILE)):
        count = sum(name.startswith("parameter.") for name in tensors)
        parameters = [tensors.pop(f"parameter.{index}") for index in range(count)]
        return parameters, _nested(tensors)


def _flat(state: dict[int, dict]) -> dict[str, Tensor]:
    """An optimizer's state under the names "<parameter index>.<key>", on the CPU; its numbers become tensors."""
    tensors = {}
    for index, entry in state.items():
        for key, value in entry.items():
            tensors[f"{index}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def _nested(tensors: dict[str, Tensor]) -> dict[int, dict]:
    """The inverse of `_flat`: parameter index -> key -> tensor."""
    state: dict[int, dict] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    return state
