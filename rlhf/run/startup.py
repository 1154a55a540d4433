"""Before a script's libraries load: command line, environment, signals, one process for each GPU.

Standard library alone, for the libraries take seconds: a wrong flag, --help or Ctrl-C must not wait for them.
"""

import os
import signal
import sys
from importlib.util import find_spec

from rlhf.run import workers
from rlhf.run.environment import leave_aside, read_launch, refuse_unusable
from rlhf.run.terminal import printable_errors

# Packages of requirements.txt that every script loads.
NEEDED = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "sentencepiece", "safetensors")


def begin(parse_args):
    """Parse the command line of a script before its libraries load; see `prepare`. Returns: the parsed arguments."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        _handlers[signum] = signal.signal(signum, _end)
    return prepare(parse_args)


def prepare(parse_args):
    """Parse the command line and look at the environment; start the processes that the machine or --nproc asks for.

    Ends the program where there is nothing to run here: --help (0), a wrong environment (1), a wrong command line (2),
    in the parent of several processes (their exit code).

    Returns: the parsed arguments.
    """
    _print_whatever_comes()
    # A wrong command line ends here, before any process is started.
    with printable_errors():
        args = parse_args()
    # A script without --nproc (merge, compare) is one process, however many GPUs there are.
    nproc = getattr(args, "nproc", 1)
    try:
        refuse_unusable()
        _refuse_missing_packages()
        launch = read_launch(nproc)
    except ValueError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(1)

    workers.follow_parent()
    # Before the libraries are imported, as most of them read their settings then.
    for left in leave_aside():
        if launch.rank == 0:
            print(left, flush=True)

    # A process of a launcher is one of its workers and must start none itself, or each would start as many again.
    if launch.launched or looks_only(args) or wanted_processes(nproc) == 1:
        return args
    sys.exit(workers.start(wanted_processes(nproc)))


def looks_only(args) -> bool:
    """Return True if the command only prints or audits: several processes would each do the whole of it."""
    return any(getattr(args, name, False) for name in ("inspect_data", "plan", "audit_only"))


def wanted_processes(nproc: int) -> int:
    """`nproc`, or one for each visible GPU, or one."""
    if nproc:
        return nproc
    # It alone knows which cards there are and which of them CUDA_VISIBLE_DEVICES leaves.
    import torch

    return max(1, torch.cuda.device_count())


def _refuse_missing_packages() -> None:
    """Raises: ValueError where this Python has not the packages, which are usually in an environment of their own."""
    # Asked without importing them, which would take the seconds that this file is there to save.
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise ValueError(
            f"{sys.executable} has no {', '.join(missing)}: run `source .venv/bin/activate`, or make .venv first: "
            "`source scripts/setup_venv.sh`"
        )


# ---- signals and streams ----
# What Python would do at each signal, while `_end` takes its place.
_handlers: dict[int, object] = {}


def _end(signum: int, frame) -> None:
    """End with one line while libraries load: there is nothing to save yet, and their traceback would say nothing."""
    # Without an exception, which a library that is half imported might catch.
    os.write(2, f"{os.path.basename(sys.argv[0])}: stopped by {signal.Signals(signum).name}\n".encode())
    os._exit(128 + signum)


def hand_signals_back() -> None:
    """Give the signals back that `begin` took: from here on the run itself knows how to stop."""
    for signum, handler in _handlers.items():
        signal.signal(signum, handler)
    _handlers.clear()


def _print_whatever_comes() -> None:
    """Let a terminal of GBK or ASCII show what it cannot print as an escape: a character must not end a training."""
    for stream in (sys.stdout, sys.stderr):
        # Where Python is embedded, a stream may be any object.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
