"""Checkpoints of the PPO loop: complete and verified, or ignored."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rlhf.artefacts import write_json

MANIFEST = "MANIFEST.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
GOOD_FILE = "good.safetensors"


def publish(output_dir: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Let `write(folder)` fill a temporary folder, list its files with their hashes, and give it its name at once.

    A reader finds either no folder of that name or a complete one, whenever the process dies.
    """
    scratch = Path(tempfile.mkdtemp(dir=output_dir, prefix=f".{name}."))
    try:
        write(scratch)
        write_manifest(scratch)
        scratch.chmod(0o755)
        target = output_dir / name
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def write_manifest(folder: Path) -> None:
    """List the files of a finished checkpoint with size and sha256; `defect` goes by this list."""
    files = {str(p.relative_to(folder)): _entry(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    write_json(folder / MANIFEST, {"files": files})


def _entry(file: Path) -> dict:
    return {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def defect(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be used, or None when every file is as its manifest says."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} is missing or unreadable ({type(error).__name__})"
    for name, entry in listed.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _entry(folder / name) != entry:
            return f"{name} is not what the manifest lists"
    return None


def newest_complete(output_dir: str | Path, prefix: str = "step_") -> Path | None:
    """The complete checkpoint with the highest number, or None; incomplete ones are reported and passed over."""
    folders = [p for p in Path(output_dir).glob(f"{prefix}*") if p.name.removeprefix(prefix).isdigit()]
    for folder in sorted(folders, key=lambda p: int(p.name.removeprefix(prefix)), reverse=True):
        reason = defect(folder)
        if reason is None:
            return folder
        print(f"ignoring checkpoint {folder}: {reason}", flush=True)
    return None


def to_resume(wish: str | None, output_dir: str | Path) -> Path | None:
    """The checkpoint of `--resume_from_checkpoint`: newest complete one for "True" (None if there is none), or a path.

    Raises: ValueError naming what is wrong with a checkpoint that was asked for by its path.
    """
    if wish in (None, "True"):
        return newest_complete(output_dir) if wish else None
    reason = defect(Path(wish))
    if reason:
        raise ValueError(f"--resume_from_checkpoint {wish} cannot be used: {reason}")
    return Path(wish)


def save_state(folder: Path, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write the optimizer's tensors as safetensors ("<parameter index>.<key>") and `state` as JSON."""
    save_file(_flat(optimizer.state_dict()["state"]), folder / OPTIMIZER_FILE)
    write_json(folder / STATE_FILE, state)


def load_state(folder: Path, optimizer: torch.optim.Optimizer) -> dict:
    """Put back what `save_state` wrote of the optimizer (same parameters, same order); returns the rest."""
    optimizer.load_state_dict(optimizer.state_dict() | {"state": _nested(load_file(folder / OPTIMIZER_FILE))})
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))


def save_good(folder: Path, good: tuple[list[torch.Tensor], dict]) -> None:
    """Write the weights and optimizer state that a rollback would go back to (of rlhf.update.snapshot)."""
    parameters = {f"parameter.{index}": tensor.cpu().contiguous() for index, tensor in enumerate(good[0])}
    save_file(parameters | _flat(good[1]), folder / GOOD_FILE)


def load_good(folder: Path, device: torch.device) -> tuple[list[torch.Tensor], dict] | None:
    """What `save_good` wrote, or None for a run that never rolls back."""
    if not (folder / GOOD_FILE).is_file():
        return None
    tensors = load_file(folder / GOOD_FILE, device=str(device))
    count = sum(name.startswith("parameter.") for name in tensors)
    parameters = [tensors.pop(f"parameter.{index}") for index in range(count)]
    return parameters, _nested(tensors)


def _flat(state: dict[int, dict]) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for index, entry in state.items()
        for key, value in entry.items()
    }


def _nested(tensors: dict[str, torch.Tensor]) -> dict[int, dict]:
    state: dict[int, dict] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    return state
