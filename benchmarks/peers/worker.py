"""Parts that all contenders use.

It must run in the environment of each: torch and the standard library, nothing else.
"""

import json
import re
import sys
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch

# Whatever a library prints does not begin with it.
MARK = "measured: "


def read_workload() -> tuple[dict, Path]:
    """Settings and folder of the workload that the command line names; torch gets its threads and its seed."""
    folder = Path(sys.argv[1])
    workload = json.loads((folder / "workload.json").read_text(encoding="utf-8"))
    torch.set_num_threads(workload["threads"])
    torch.manual_seed(workload["seed"])
    return workload, folder


def peak_gb() -> float:
    """Most memory this process has had at once, as the system counts it, in GB.

    Linux: ru_maxrss would begin with the size of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        most = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(most[1]) * 1024 / 1e9
    # macOS counts bytes here, others kilobytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return getrusage(RUSAGE_SELF).ru_maxrss * unit / 1e9


class Movement:
    """Change of parameters by training: 0 would mean that a contender does not train."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.before = [p.detach().clone() for p in self.parameters]

    def largest(self) -> float:
        """The largest change of any element since the start."""
        pairs = zip(self.parameters, self.before, strict=True)
        return max((p.detach() - old).abs().max().item() for p, old in pairs)


# ---- turns ----
def say(**record) -> None:
    """Print one line that benchmarks/ppo_step.py reads among whatever a library prints."""
    print(MARK + json.dumps(record), flush=True)


def steps_in_turn(count: int):
    """Step numbers, each when benchmarks/ppo_step.py gives the turn, so that contenders never run at the same time."""
    for step in range(count):
        wait_for_turn()
        yield step


def wait_for_turn() -> None:
    """Return when the turn is given. Raises: SystemExit where benchmarks/ppo_step.py has gone."""
    say(waiting=True)
    # An empty line is a turn; no line at all means that the other end is closed.
    if not sys.stdin.readline():
        raise SystemExit("nobody gives turns any more")


def report(versions: dict, moved: float) -> None:
    """Print the last line, on the whole run.

    Each step has printed before, by `say`, its seconds of rollout, score, update and total, and the response tokens
    it sampled.
    """
    say(versions=versions, moved=moved, peak_gb=peak_gb())
