"""Ways a run ends early, each with its exit code: signals, a collapse, out of memory."""

import os
import signal
import time
from collections.abc import Iterable
from contextlib import contextmanager

import torch
import torch.distributed as dist


class Collapse(RuntimeError):
    """A run was stopped by the guard; the process ends with exit code 3."""


# A terminal's Ctrl-C reaches a worker twice, from the terminal and from its launcher: that is one wish, not two.
SAME_WISH_SECONDS = 1.0

_first: dict[str, float] = {}


class Interrupted(Exception):
    """The run was asked to stop and has done so in order; the process ends with exit code 128 + `signum`."""

    def __init__(self, signum: int, saved: str | None = None):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.saved = saved


def listen() -> None:
    """From now on the first SIGTERM or SIGINT is only noted; the next, a second later or more, ends the process."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _note)


def _note(signum: int, frame) -> None:
    if not _first:
        _first.update(signum=signum, time=time.monotonic())
        print(f"{signal.Signals(signum).name}: stopping at the next safe point; once more stops at once", flush=True)
    elif time.monotonic() - _first["time"] >= SAME_WISH_SECONDS:
        os._exit(128 + signum)


def received() -> int:
    """The number of the signal this process got, or 0."""
    return int(_first.get("signum", 0))


def forget() -> None:
    """Forget any signal (for tests, which share one process)."""
    _first.clear()


def agreed(device: torch.device | str = "cpu") -> int:
    """The number of a signal that any process got, or 0, the same on all: so all must ask at the same point."""
    signum = torch.tensor([received()], device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(signum, dist.ReduceOp.MAX)
    return int(signum)


def stop_if_agreed(device: torch.device | str = "cpu") -> None:
    """Raises: Interrupted on all processes, if any of them got a signal."""
    signum = agreed(device)
    if signum:
        raise Interrupted(signum)


# What PyTorch says when it is a RuntimeError like any other (CPU) or comes from a library below it (CUDA).
SIGNS = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory")


@contextmanager
def explain_out_of_memory(what: str, shape: Iterable[int], flags: str):
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
