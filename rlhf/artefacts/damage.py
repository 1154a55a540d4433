"""Files that are not what they should be: one sentence with the file, what is wrong, and what to do."""

import errno
import math
import pickle
from contextlib import contextmanager
from pathlib import Path

import torch


# ---- tensors ----
def damaged(file: Path, error: Exception) -> str:
    """One sentence on a file that no tensors can be read from."""
    if _is_unsafe(error):
        return f"{file} holds more than tensors, and no code of it was run: train or download it as safetensors"

    # Libraries go on for several lines; an error without words is named by its class.
    why = str(error).partition("\n")[0] or type(error).__name__
    return f"{file} is damaged ({why}): train, download or copy it again"


def refuse_nonfinite(weights: dict[str, torch.Tensor], owner: str) -> None:
    """Raises: ValueError naming the first tensor that holds NaN or infinity."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{owner} holds NaN or infinity in {name}: its training diverged, or the file is damaged")


def refuse_other_shapes(optimizer: torch.optim.Optimizer) -> None:
    """Raises: ValueError where a loaded moment has another shape than its weight, or holds NaN or infinity."""
    # PyTorch takes over moments of any shape: only the first step would fail, or broadcast them.
    for p, entry in optimizer.state.items():
        for key, value in entry.items():
            # A count of steps is a number.
            if torch.is_tensor(value) and value.dim() and value.shape != p.shape:
                raise ValueError(f"{key} is {list(value.shape)} for a weight of {list(p.shape)}")
            if torch.is_tensor(value) and not torch.isfinite(value).all():
                raise ValueError(f"{key} holds NaN or infinity")


# ---- JSON ----
def refuse_types(content: dict, file: Path, kinds: dict[str, type | tuple], required: tuple[str, ...] = ()) -> dict:
    """Return `content` where each of its fields has the kind that this project writes.

    Args:
        kinds: field -> type or types; float alone is any finite number. A field may be missing unless `required`.
    Raises: ValueError naming the file and the first field that is missing or of another kind.
    """
    missing = [name for name in required if name not in content]
    if missing:
        raise ValueError(f"{file} has no field {missing[0]!r}: it is damaged, or this project has not written it")
    for name, kind in kinds.items():
        if name in content and not _is_of(content[name], kind if isinstance(kind, tuple) else (kind,)):
            value = repr(content[name])[:40]
            raise ValueError(f"{file}: the field {name!r} cannot be {value}: it is damaged, or was changed by hand")
    return content


def _is_of(value, kinds: tuple) -> bool:
    """Return True if a value read from JSON has one of these kinds; True and False are no numbers."""
    # In Python True is an integer, and a count of True would pass for 1.
    if isinstance(value, bool):
        return bool in kinds
    if kinds == (float,):
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kinds)


# ---- libraries ----
@contextmanager
def refused(what: str, mend: str = "copy, download or train it again"):
    """Turn whatever a library raises while it reads `what` into one ValueError that names it and the cause.

    A damaged file may hold a value of any type in any place, so that any error may come of it. For reading alone: an
    error in a step of training is a bug of ours, and keeps its traceback. Errors of the system pass as they are.
    """
    try:
        yield
    # Their sentence is made at the end of the run: a full disk or a lack of memory is no damage of this file.
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # Too little memory is told at one place for all, in rlhf/run/launch.py.
        if is_out_of_memory(error):
            raise
        # Some sentence of ours has named it already.
        if isinstance(error, ValueError) and what in str(error):
            raise
        raise ValueError(f"{what} cannot be used ({_cause(error)}): {mend}") from error


def _cause(error: Exception) -> str:
    """The first line of an error, with its class where the words alone would say nothing."""
    if _is_unsafe(error):
        return "it holds more than tensors, and no code of it was run"
    # Below the first line libraries give advice, and paths of their own files.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = lines[0][:200] if lines else ""
    # The message of a KeyError is a key, and of many others half a sentence.
    return why if isinstance(error, ValueError | ImportError) and why else f"{type(error).__name__} {why}".strip()


def _is_unsafe(error: Exception) -> bool:
    """Return True where torch refused to run code that stands among tensors."""
    return isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower()


# Words of an allocation that failed where the error's class says nothing: on a CPU, or below PyTorch.
NO_MEMORY = (
    "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory",
    "can't start new thread", "Cannot allocate memory", "bad_alloc", "failed to map segment",
    "Failed to launch worker thread",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an allocation that failed, whichever library says so and how."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # A library that is loaded late is mapped into memory too; Arrow's errors have a class of their own.
    return isinstance(error, Exception) and any(words in str(error) for words in NO_MEMORY)
