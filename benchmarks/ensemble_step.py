"""PPO with several reward models against PPO with one: time of a step and peak memory, on the workload of ppo_step.py.

    python benchmarks/ensemble_step.py --members 4 | tee benchmarks/results/ensemble_step.log

Both are this project's own step, each in a process of its own; they take turns step by step, the other waiting. The
first step is left out.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Started as a file and not with -m, Python would look for the project's modules beside this one.
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.common import machine  # noqa: E402
from benchmarks.ppo_step import PHASES, Contender  # noqa: E402
from benchmarks.ppo_workload import STEPS, WORKLOADS, write_workload  # noqa: E402
from rlhf.flags import flag, parse  # noqa: E402
from rlhf.run.launch import silence_libraries  # noqa: E402


@dataclass(kw_only=True)
class Arguments:
    """Flags of benchmarks/ensemble_step.py."""

    members: int = flag(4, help="reward models of the one that is held against one")
    workload: str = flag("even", help="answers of one length, or of very different length", choices=list(WORKLOADS))
    steps: int = flag(0, help="PPO steps of each, the first left out; 0: as ppo_step.py")
    threads: int = flag(0, help="of torch; 0: as many as there are cores")
    cpu_seconds: bool = flag(False, help="count processor time, in which other work on the machine hardly shows")

    def __post_init__(self):
        if self.members < 2 or self.steps == 1:
            raise ValueError("--members and --steps must be at least 2: one is the baseline, the first step left out")


def with_members(folder: Path, members: int, cpu_seconds: bool) -> Path:
    """A copy of the workload with that many reward adapters: of a size, and it does not matter of what."""
    several = folder.with_name(f"{folder.name}_{members}")
    shutil.copytree(folder, several)
    for number in range(2, members + 1):
        shutil.copytree(folder / "reward", several / f"reward_{number}")
    file = several / "workload.json"
    workload = json.loads(file.read_text(encoding="utf-8"))
    workload |= {"members": members, "cpu_seconds": cpu_seconds}
    file.write_text(json.dumps(workload), encoding="utf-8")
    return several


def table(runs: dict[int, dict]) -> str:
    """Medians of all steps but the first by number of members, and how they compare with one."""
    lines = [
        f"{'reward models':<16}" + "".join(f"{phase:>9}" for phase in PHASES) + f"{'GB':>8}{'time':>9}{'memory':>9}"
    ]
    medians = {}
    for members, run in runs.items():
        steps = run["steps"][1:]
        medians[members] = {phase: statistics.median(step[phase] for step in steps) for phase in PHASES}
        slower = medians[members]["total"] / medians[1]["total"]
        larger = run["peak_gb"] / runs[1]["peak_gb"]
        seconds = "".join(f"{value:>9.2f}" for value in medians[members].values())
        lines.append(f"{members:<16}{seconds}{run['peak_gb']:>8.3f}{slower:>7.3f} x{larger:>7.3f} x")
    return "\n".join(lines)


def main(args: Arguments) -> None:
    """Take the steps in turn, print the table."""
    silence_libraries()
    torch.set_num_threads(args.threads or os.cpu_count())
    steps = args.steps or STEPS[args.workload]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch) / "one"
        folder.mkdir()
        write_workload(folder, args.workload, steps, 0, torch.get_num_threads())
        running = {}
        for members in (1, args.members):
            running[members] = Contender("ours", with_members(folder, members, args.cpu_seconds))
            stack.callback(running[members].close)
        for _, contender in product(range(steps), running.values()):
            contender.take_turn()
        runs = {members: each.last_words | {"steps": each.steps} for members, each in running.items()}

    print(machine())
    kind = "processor seconds" if args.cpu_seconds else "seconds"
    print(f"{args.workload}: {kind} a step, medians of {steps - 1} steps taken in turn\n{table(runs)}", flush=True)


if __name__ == "__main__":
    main(parse(Arguments, None, __doc__))
