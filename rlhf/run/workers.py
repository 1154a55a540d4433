"""Several processes on one machine: started by torch's launcher, meeting each other, ending with their parent."""

import ctypes
import os
import shutil
import signal
import sys
import tempfile
import uuid

from rlhf.run.environment import LAUNCHER_VARIABLES, read_launch

# The launcher of this project leaves its number here, for its workers to end with it.
PARENT = "RLHF_LAUNCHER"

# The file in which the processes that it starts find each other.
MEETING = "RLHF_MEETING"

# What tells gloo and NCCL which interface to listen on.
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def start(processes: int) -> int:
    """Run this command line in `processes` workers of torch's launcher.

    Returns: 0, or the exit code of the worker that failed first (128 + the number of the signal that ended it).
    """
    # Imported here: a single process needs none of it.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # A single process of another launcher gives way to --nproc.
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ[PARENT] = str(os.getpid())
    # The processes of one machine meet in a file that only this user can read, not at ports of all its interfaces.
    meeting = tempfile.mkdtemp(prefix="rlhf-")
    os.environ[MEETING] = f"{meeting}/store"
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for name in INTERFACES:
        os.environ.setdefault(name, "lo" if sys.platform == "linux" else "lo0")
    # The workers get this very command line. Each sees that it was launched, and starts none of its own.
    print(f"starting {processes} processes, one for each GPU (--nproc 1 for one)", flush=True)
    # Each process would otherwise use every core for its own matrix products.
    cores = os.cpu_count() or 1
    threads = max(1, cores // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

    # One machine. A worker that fails is not started again: the same error would meet it.
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{meeting}/launcher",
        rdzv_configs={"store_type": "file"},
        local_addr="127.0.0.1",
        max_restarts=0,
    )

    try:
        # Unbuffered, so that the lines of several workers do not come late.
        elastic_launch(config, sys.executable)("-u", *sys.argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code < 0:
            # It could say nothing itself.
            print(f"process {rank} was ended by {signal.Signals(-code).name}; the others end too", file=sys.stderr)
        # torch gives -n for a process that signal n has ended, where a shell says 128 + n.
        return code if code > 0 else 128 - code
    except SignalException as stop:
        # The workers got the same signal and have saved what there was to save.
        return 128 + stop.sigval
    finally:
        shutil.rmtree(meeting, ignore_errors=True)
    return 0


def lost_another(error: Exception) -> bool:
    """Return True if an error says that another process of this run is gone, in whichever words."""
    from torch.distributed import DistError

    gone = ("connection closed by peer", "connection reset by peer", "broken pipe", "socket closed")
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in gone)
    )


def meet() -> None:
    """Wait for the other processes of this run, where there are any; a signal meanwhile ends this one at once.

    Below Python, where it waits, no handler of ours would be called.
    """
    launch = read_launch()
    if launch.size == 1:
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    place = {}
    if os.environ.get(MEETING):
        place = {"init_method": f"file://{os.environ[MEETING]}", "rank": launch.rank, "world_size": launch.size}
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **place)
    for number, handler in before.items():
        signal.signal(number, handler)


def follow_parent() -> None:
    """Let a worker get SIGTERM when the launcher that started it is gone: it saves itself, and frees its directory."""
    if os.environ.get(PARENT) != str(os.getppid()) or sys.platform != "linux":
        return
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # It may have died before that was set.
    if os.environ[PARENT] != str(os.getppid()):
        os.kill(os.getpid(), signal.SIGTERM)
