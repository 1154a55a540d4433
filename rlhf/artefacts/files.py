"""Files written whole or not at all, tensors read without running code, a full disk reported in one sentence."""

import errno
import json
import os
import pickle
import resource
import shutil
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rlhf.artefacts.damage import damaged, refuse_nonfinite

# With fewer free bytes than this, a failed write is blamed on the full disk.
NEARLY_NONE = 1 << 16

# Bytes of a JSON file of ours or of a model's, at most.
MAX_JSON = 1 << 28

# Part of the name of every temporary file and folder of ours: nobody else would write it.
TOKEN = "rlhf-"

# The umask can only be read by setting it; at import no other thread is at work.
UMASK = os.umask(0)
os.umask(UMASK)

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
def follow_umask(path: Path) -> None:
    """Give a file or folder, and all in it, the permissions that the umask allows.

    safetensors and mkdtemp create for their owner alone, whatever the user has asked for.
    """
    for each in (path, *(path.rglob("*") if path.is_dir() else ())):
        if not each.is_symlink():
            each.chmod((0o777 if each.is_dir() else 0o666) & ~UMASK)


def write_json(path: Path | str, content: dict) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    text = json.dumps(content, ensure_ascii=False, indent=2, default=str)
    # In the same folder, for only within one file system is a rename a single step.
    # The process's number keeps two writers of one file apart.
    part = path.with_name(f".{path.name}.{TOKEN}{os.getpid()}")
    try:
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        # Gone after the rename; what is left of it after an error is half a file.
        part.unlink(missing_ok=True)


@contextmanager
def readable_when_full(folder: Path, name: str, min_bytes: int = 0, mend: str = GO_ON):
    """Turn whatever libraries raise on a full disk, or at the shell's limit for files, into one `DiskFull`.

    Args:
        folder: what is being filled; it will be removed when that fails. name: of the whole, in the message.
        min_bytes: bytes that the whole will take at least, as far as known. mend: what the user is told to do.
    """
    try:
        yield
    # tokenizers raise a bare Exception, safetensors and torch errors of their own.
    except Exception as error:
        if is_too_large(error):
            raise DiskFull(f"{name}: {limit_of_files()}; what was begun is removed. {mend}") from error
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


def is_too_large(error: Exception) -> bool:
    """Return True if a file grew beyond what the shell allows (ulimit -f), whichever library says so and how."""
    if getattr(error, "errno", None) == errno.EFBIG or "File too large" in str(error):
        return True
    # torch.save says only that it could not write.
    limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    return limited and isinstance(error, RuntimeError) and "writ" in str(error)


def limit_of_files() -> str:
    """Half a sentence on the shell's limit for the size of a file, and how to raise it."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    allowed = f" of {limit:,} bytes" if limit != resource.RLIM_INFINITY else ""
    return f"a file would be larger than this shell's limit{allowed}: raise it with ulimit -f unlimited"


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where it is missing."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# ---- reading ----
def nearest(name: str) -> str:
    """A hint for a path that does not exist: what of a similar name lies beside it, in brackets; else nothing."""
    path = Path(name)
    try:
        names = [other.name for other in path.parent.iterdir()]
    except OSError:
        return ""
    close = get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f" (did you mean {path.with_name(close[0])}?)" if close else ""


def load_tensors(file: Path, mmap: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of an old .bin with weights_only=True, so that no pickle code runs.

    Raises: ValueError in one sentence where the file is damaged or holds anything but tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Without weights_only, a .bin may run any code it holds.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    # torch's unpickler fails on rubbish in as many ways as a small interpreter can.
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError,
            AttributeError) as error:  # fmt: skip
        raise ValueError(damaged(file, error)) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{file} holds something else than tensors by name: train, download or copy it again")
    return content


def read_object(file: Path) -> dict:
    """A JSON file that holds an object. Raises: ValueError in one sentence where it does not."""
    # A pipe or a device would be read for ever.
    if not file.is_file():
        raise ValueError(f"{file} is no regular file: put the file itself there")
    if file.stat().st_size > MAX_JSON:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, more than a description ever has: copy it again")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    # Brackets nested by the thousand end Python's parser in its own way.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON ({error}): it is damaged, or was never finished") from error
    return content


def refuse_written(file: Path, owner: str) -> None:
    """Refuse to publish tensors that are not finite. Raises: FloatingPointError naming the first of them."""
    try:
        refuse_nonfinite(load_file(file), owner)
    except ValueError as error:
        raise FloatingPointError(f"{error}; it is not saved, and earlier checkpoints are as they were") from None
