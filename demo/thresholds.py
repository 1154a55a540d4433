"""Run the demo for several seeds and hold each summary against what the demo promises.

python -m demo.thresholds --seeds 0 1 2 --output_dir runs/thresholds | tee demo/results/thresholds.log
"""

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rlhf.flags import flag, parse

ROOT = Path(__file__).resolve().parents[1]


# What is promised, as (name, function of the summary, what it must be).
PROMISES = (
    ("win rate >= 0.75", lambda s: s["gold/win_rate"], lambda x: x >= 0.75),
    ("its lower bound > 0.65", lambda s: s["gold/win_rate_low"], lambda x: x > 0.65),
    ("reward accuracy >= 0.85", lambda s: s["rm/eval_accuracy"], lambda x: x >= 0.85),
    ("empty answers <= 0.01", lambda s: s["empty_frac/ppo"], lambda x: x <= 0.01),
    ("right content, PPO - SFT >= -0.05", lambda s: s["correct/ppo"] - s["correct/sft"], lambda x: x >= -0.05),
    (
        "SFT loss falls by >= 0.20",
        lambda s: 1 - s["sft/eval_loss_after"] / s["sft/eval_loss_before"],
        lambda x: x >= 0.2,
    ),
    (
        "last mean of 3 gold, of best >= -0.05",
        lambda s: s["gold/running_last"] - s["gold/running_best"],
        lambda x: x >= -0.05,
    ),
    ("held-out prompts >= 200", lambda s: s["heldout_prompts"], lambda x: x >= 200),
    ("minutes < 10", lambda s: s["seconds/all"] / 60, lambda x: x < 10),
    # Three minutes of two cores, the base of another seed aside.
    ("core minutes < 6", lambda s: (s["cpu/all"] - s["cpu/base"]) / 60, lambda x: x < 6),
)


@dataclass(kw_only=True)
class Arguments:
    """Flags of demo/thresholds.py."""

    seeds: list[int] = flag([0, 1, 2], help="seeds of the runs")
    build_base: bool = flag(False, help="pretrain the base of every seed, that of the shipped one too")
    output_dir: str = flag("runs/thresholds", help="each run goes to <output_dir>/seed_<n>; a finished one is kept")


def run_demo(seed: int, folder: Path, build_base: bool) -> dict:
    """The summary of one run, which is started unless its summary is there already."""
    summary = folder / "summary.json"
    if not summary.is_file():
        script = str(ROOT / "scripts" / "run_demo.sh")
        command = ["bash", script, "--seed", str(seed), "--output_dir", str(folder), "--build_base", str(build_base)]
        # The table alone belongs on stdout, which goes into a log.
        subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads(summary.read_text(encoding="utf-8"))


def main(args: Arguments) -> int:
    """Print the table; 1 where a promise is broken."""
    output_dir = Path(args.output_dir).resolve()
    summaries = [run_demo(seed, output_dir / f"seed_{seed}", args.build_base) for seed in args.seeds]

    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"commit {commit.stdout.strip()}, {machine}")
    print(f"{'promise':<40}" + "".join(f"{f'seed {seed}':>12}" for seed in args.seeds))

    # A promise has to hold on every seed; a mark stands where it does not.
    broken = 0
    for name, value, holds in PROMISES:
        values = [value(summary) for summary in summaries]
        broken += sum(not holds(x) for x in values)
        cells = [f"{x:>11.3f}{' ' if holds(x) else '!'}" for x in values]
        print(f"{name:<40}" + "".join(cells))

    # Nothing is promised of these; they explain the ones above.
    for name in ("gold/sft", "gold/ppo", "ppo/kl_last", "len/sft", "len/ppo"):
        print(f"{name:<40}" + "".join(f"{summary[name]:>11.3f} " for summary in summaries))

    print(f"{broken} promises broken" if broken else "all promises kept")
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main(parse(Arguments, None, __doc__)))
