"""Files written whole or not at all, tensors read without running code, a full disk reported in one sentence."""

import errno
import json
import os
import pickle
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

# With fewer free bytes than this, a failed write is blamed on the full disk.
NEARLY_NONE = 1 << 16

# The disk is full, or the user's quota is used up.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

# The name that peft gives it.
ADAPTER_FILE = "adapter_model.safetensors"

GO_ON = (
    "Earlier checkpoints are untouched: make room, or lower --save_total_limit, and give the same command with "
    "--resume_from_checkpoint True"
)


class DiskFull(OSError):
    """A write failed for want of room; the message is the sentence for the user."""


# ---- writing ----
def write_json(path: Path | str, content: dict) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    text = json.dumps(content, ensure_ascii=False, indent=2, default=str)
    # In the same folder, for only within one file system is a rename a single step.
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def readable_when_full(folder: Path, name: str, min_bytes: int = 0, mend: str = GO_ON):
    """Turn what libraries raise on a full disk (OSError, SafetensorError, RuntimeError) into one `DiskFull`.

    Args:
        folder: what is being filled; it will be removed when that fails. name: of the whole, in the message.
        min_bytes: bytes that the whole will take at least, as far as known. mend: what the user is told to do.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_full(error, folder.parent):
            raise

        # What was begun will be gone: its bytes count as free.
        free = shutil.disk_usage(folder.parent).free + size_of(folder)
        raise DiskFull(
            f"the disk of {folder.parent} is full: {name} needs at least {max(min_bytes, free + 1):,} bytes and "
            f"{free:,} are free; what was begun is removed. {mend}"
        ) from error


def is_full(error: Exception, folder: Path) -> bool:
    """Return True if a full disk made a write fail, whichever library says so and how."""
    if isinstance(error, DiskFull) or getattr(error, "errno", None) in NO_ROOM:
        return True
    # Some libraries only pass on the words, and torch.save not even those.
    return "No space left" in str(error) or shutil.disk_usage(folder).free < NEARLY_NONE


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where it is missing."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# ---- reading ----
def load_tensors(file: Path, mmap: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of an old .bin with weights_only=True, so that no pickle code runs.

    Raises: ValueError in one sentence where the file is damaged or holds anything but tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Without weights_only, a .bin may run any code it holds.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(damaged(file, error)) from error


def damaged(file: Path, error: Exception) -> str:
    """One sentence on a file that no tensors can be read from."""
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
        return f"{file} holds more than tensors, and no code of it was run: train or download it as safetensors"

    # Libraries go on for several lines; an error without words is named by its class.
    why = str(error).partition("\n")[0] or type(error).__name__
    return f"{file} is damaged ({why}): train, download or copy it again"


def read_object(file: Path) -> dict:
    """A JSON file that holds an object. Raises: ValueError in one sentence where it does not."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise ValueError(f"{file} is not readable JSON ({error}): it is damaged, or was never finished") from error
    return content
