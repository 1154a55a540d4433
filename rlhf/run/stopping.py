"""Ways a run ends early, each with its exit code: signals, a collapse, out of memory."""

import os
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import contextmanager

import torch
import torch.distributed as dist

from rlhf.artefacts.damage import is_out_of_memory


# ---- reasons to stop ----
class Collapse(RuntimeError):
    """A run was stopped by the guard; the process ends with exit code 3."""


class Interrupted(Exception):
    """The run was asked to stop and has done so in order; the process ends with exit code 128 + `signum`."""

    def __init__(self, signum: int, saved: str | None = None):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.saved = saved


# ---- signals ----
# A terminal's Ctrl-C reaches a worker twice, from the terminal and from its launcher: together they count as one.
SAME_WISH_SECONDS = 1.0

# Schedulers and launchers send the first, a terminal's Ctrl-C the second.
STOPS = (signal.SIGTERM, signal.SIGINT)

# Number of the first signal; empty until it comes.
_first: dict[str, int] = {}


def listen() -> None:
    """Note the first SIGTERM or SIGINT from now on; let the next, a second later or more, end the process."""
    for signum in STOPS:
        signal.signal(signum, _note)
    reader, writer = os.pipe()
    # Python asks for it: writing the signal's number must never wait for a reader.
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # A daemon, so that it keeps no finished process from ending.
    threading.Thread(target=_end_at_the_next, args=(reader,), daemon=True).start()


def _note(signum: int, frame) -> None:
    # Only noted: a step, or a checkpoint, must not be left half done.
    if not _first:
        _first.update(signum=signum)
        text = f"{signal.Signals(signum).name}: stopping at the next safe point; once more stops at once"
        try:
            print(text, flush=True)
        except RuntimeError:
            # The signal came in the middle of a print, whose buffer takes no second one.
            os.write(2, f"{text}\n".encode())


def _end_at_the_next(reader: int) -> None:
    """End the process at the second signal."""
    # In a thread of its own: where the main one waits for other processes, below Python, no handler is called.
    first = None
    while True:
        for signum in os.read(reader, 64):
            if signum not in STOPS:
                continue
            first = first or time.monotonic()
            if time.monotonic() - first >= SAME_WISH_SECONDS:
                # Without a clean-up, which could hang on other processes.
                os._exit(128 + signum)


def received() -> int:
    """The number of the signal this process got, or 0."""
    return _first.get("signum", 0)


def forget() -> None:
    """Forget any signal (for tests, which share one process)."""
    _first.clear()


def agreed(device: torch.device | str = "cpu") -> int:
    """The number of a signal that any process got, or 0; the same number on all, so all must ask at the same point."""
    # With several processes the signal may have reached one of them only.
    signum = torch.tensor([received()], device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(signum, dist.ReduceOp.MAX)
    return int(signum)


def stop_if_agreed(device: torch.device | str = "cpu") -> None:
    """Raise Interrupted on all processes, if any of them got a signal."""
    signum = agreed(device)
    if signum:
        raise Interrupted(signum)


# ---- out of memory ----
@contextmanager
def explain_out_of_memory(what: str, shape: Iterable[int], flags: str):
    """Turn a failed allocation into a MemoryError that names the batch's shape and the flags to lower.

    Args:
        what: "a training batch", "sampling", ... shape: of the token ids, padding included. flags: those to lower.
    """
    try:
        yield
    # RuntimeError as well: on a CPU a failed allocation has no class of its own.
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise

        rows, longest = shape
        raise MemoryError(
            f"out of memory in {what} of {rows} rows, the longest of {longest} tokens: lower {flags}, or give "
            "--gradient_checkpointing True"
        ) from error
