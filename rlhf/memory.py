"""Out of memory in one sentence: what was being computed, how large it was, and which flags make it smaller."""

from collections.abc import Iterable
from contextlib import contextmanager

import torch

# What PyTorch says when it is a RuntimeError like any other (CPU) or comes from a library below it (CUDA).
SIGNS = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory")


@contextmanager
def named_when_too_large(what: str, shape: Iterable[int], flags: str):
    """Turn an allocation that failed within into a MemoryError with the batch's shape and the flags to turn.

    Args:
        what: "a training batch", "sampling", ... shape: of the token ids, padding included. flags: those to lower.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in SIGNS):
            raise
        rows, longest = shape
        raise MemoryError(
            f"out of memory in {what} of {rows} rows, the longest of {longest} tokens: lower {flags}, or give "
            "--gradient_checkpointing True"
        ) from error
