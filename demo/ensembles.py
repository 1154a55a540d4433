"""One reward model against four: PPO without a KL penalty by every way to combine them, told by the gold judge.

In:  seeds. Out: <output_dir>/seed_<n> (world, SFT model, reward models, runs), ensembles.png, the table on the screen.

    python -m demo.ensembles --seeds 0 1 2 --output_dir runs/ensembles | tee demo/results/ensembles.log

Every seed has prompts, SFT model and reward models of its own on the shipped base. A finished stage is kept: the same
command, given again, goes on where it stopped.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from demo.commands import PPO, REWARD, SFT, Command, command
from demo.run import Processes, warm_up
from rlhf.flags import flag, parse
from rlhf.rl.guard import disagreement
from rlhf.run.log import read_metrics
from rlhf.run.pictures import BLACK, BLUE, GREEN, ORANGE, PURPLE, pyplot

ROOT = Path(__file__).resolve().parents[1]
MEMBERS = 4
# Half of the demo's batch at as many optimizer steps: as much happens in a step, at half of its time.
SHORT = f"{PPO} --batch_size 32 --mini_batch_size 16 --save_freq 10 --sample_freq 1000 --on_collapse off"
ALL = tuple(f"reward_{number}" for number in range(1, MEMBERS + 1))
# Run -> reward models, further flags, colour. The last one is healthy: the guard should find nothing in it.
RUNS = {
    "one": (ALL[:1], "--init_kl_coef 0", BLACK),
    "mean_minus_std": (ALL, "--init_kl_coef 0 --reward_ensemble mean_minus_std", ORANGE),
    "mean": (ALL, "--init_kl_coef 0 --reward_ensemble mean", BLUE),
    "min": (ALL, "--init_kl_coef 0 --reward_ensemble min", GREEN),
    "average": (("reward_average",), "--init_kl_coef 0", PURPLE),
    "mean, KL 0.1": (ALL, "--init_kl_coef 0.1 --reward_ensemble mean", "#999999"),
}
# A fall of the gold score by as much as this from its height is no chance.
FALL = 0.05


@dataclass(kw_only=True)
class Arguments:
    """Flags of demo/ensembles.py."""

    seeds: list[int] = flag([0, 1, 2], help="seeds of world, models and runs", nargs="+")
    output_dir: str = flag("runs/ensembles", help="where everything goes; what is finished is kept")
    ppo_steps: int = flag(100, help="PPO steps of each run")
    reward_steps: int = flag(200, help="optimizer steps of each reward model")
    limits: list[float] = flag(
        [1.25, 1.5, 2.0], help="multiples of the spread's start to be tried as the guard's limit"
    )


def parse_args(argv: list[str] | None = None) -> Arguments:
    """The command line, checked."""
    return parse(Arguments, argv, __doc__)


# ---- running ----
def place(run: str) -> str:
    """The directory of a run."""
    return "ppo_" + run.replace(", ", "_").replace(" ", "_")


def models(args: Arguments, seed: int, folder: Path) -> list[Command]:
    """The command lines of a seed's world, SFT model and reward models."""
    out = shlex.quote(str(folder))
    data = f"{out}/data"
    common = "--resume_from_checkpoint True --logging_steps 100"
    made = []
    # The world is written anew each time: only where it is not there.
    if not (folder / "base" / "config.json").is_file():
        made.append(command("world", f"-m demo.build --output_dir {out} --seed {seed} --shipped_base True"))
    made.append(
        command(
            "sft",
            f"sft_training.py --model_name {out}/base {SFT} --dataset_name {data}/sft.jsonl --eval_dataset_name "
            f"{data}/sft_eval.jsonl --num_train_epochs 2 --seed {seed} {common} --output_dir {out}/sft",
        )
    )
    # As the reward models of the long story: no hardening.
    for number, name in enumerate(ALL, 1):
        words = (
            f"reward_modeling.py --model_name {out}/base {REWARD} --dataset_name {data}/preferences.jsonl "
            f"--eval_dataset_name {data}/preferences_eval.jsonl --fold {number}/{MEMBERS} --audit False --max_steps "
            f"{args.reward_steps} --seed {MEMBERS * seed + number} {common} --output_dir {out}/{name}"
        )
        made.append(command(name, words))
    if not (folder / "reward_average").is_dir():
        members = " ".join(f"{out}/{name}" for name in ALL)
        made.append(command("reward_average", f"merge_lora.py --average {members} --output_dir {out}/reward_average"))
    return made


def runs(args: Arguments, seed: int, folder: Path) -> list[Command]:
    """The command lines of a seed's PPO runs, and of the gold judge after each."""
    out = shlex.quote(str(folder))
    made = []
    for run, (members, flags, _) in RUNS.items():
        rewards = " ".join(f"{out}/{name}" for name in members)
        words = (
            f"rl_training.py --base_model_name {out}/base --sft_model_lora_path {out}/sft --reward_model_lora_path "
            f"{rewards} --dataset_name {out}/data/prompts.jsonl {SHORT} {flags} --steps {32 * args.ppo_steps} "
            f"--seed {seed} --resume_from_checkpoint True --output_dir {out}/{place(run)}"
        )
        made.append(command(run, words))
        words = f"-m demo.story --demo_dir {out} --output_dir {out}/gold_{place(run)} --prompts 200 --runs"
        if not (folder / f"gold_{place(run)}" / "story.json").is_file():
            made.append(command(f"gold of {run}", words, f"{run}={folder / place(run)}"))
    return made


def train(args: Arguments, seed: int, processes: Processes, folder: Path) -> None:
    """Run what is not finished of a seed; what the commands print goes into files beside the runs."""
    folder.mkdir(parents=True, exist_ok=True)
    for each in [*models(args, seed, folder), *runs(args, seed, folder)]:
        print(f"seed {seed}: {each.name}", file=sys.stderr, flush=True)
        log = folder / f"{each.name.replace(', ', '_').replace(' ', '_')}.log"
        processes.run((Command(each.name, each.argv, str(log)),), folder / "seconds.txt")


# ---- figures ----
def figures(folder: Path, run: str, limits: list[float]) -> dict:
    """What became of a run: gold by step, its height and end, where it fell, the spread, and the guard's first words.

    Returns: steps are None where there was no such step.
    """
    story = json.loads((folder / f"gold_{place(run)}" / "story.json").read_text(encoding="utf-8"))
    gold = {int(step): each["gold"] for step, each in story["runs"][run]["checkpoints"].items()}
    height = max(gold, key=gold.get)
    fallen = [step for step in sorted(gold) if step > height and gold[step] < gold[height] - FALL]

    rows = read_metrics(folder / place(run))
    warned = {limit: [row["step"] for row in rows if disagreement(row, rows[0], limit)] for limit in limits}
    spread = [row["score/spread"] / rows[0]["score/spread"] for row in rows if "score/spread" in row]
    return {
        "gold": gold, "height": height, "end": gold[max(gold)], "fell": fallen[0] if fallen else None,
        "spread": spread, "warned": warned, "steps": len(rows), "score": rows[-1]["score/mean"],
    }  # fmt: skip


def table(measured: dict[tuple[int, str], dict], limits: list[float]) -> str:
    """A line a run: gold score, where it fell, the spread at its height and end, the first warning at each limit."""
    head = ["seed", "reward model", "gold: SFT", "most", "at step", "end", "fell at", "spread then", "spread at end"]
    lines = [[*head, *(f"x{limit:g} at (steps)" for limit in limits)]]
    for (seed, run), each in measured.items():
        gold = each["gold"]
        spread = each["spread"]
        at = each["fell"] or each["height"]
        cells = [str(seed), run, f"{gold[0]:.3f}", f"{gold[each['height']]:.3f}", str(each["height"])]
        cells += [f"{each['end']:.3f}", str(each["fell"] or "-")]
        cells += [f"{spread[max(at, 1) - 1]:.2f}", f"{spread[-1]:.2f}"] if spread else ["", ""]
        for limit in limits:
            steps = each["warned"][limit]
            cells.append(f"{steps[0]} ({len(steps)})" if steps else "-" if spread else "")
        lines.append(cells)

    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def draw(measured: dict[tuple[int, str], dict], file: Path) -> None:
    """Gold score and spread over the steps, a line a run, one look a way of combining."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True)
    seen = set()
    for (_, run), each in measured.items():
        colour = RUNS[run][2]
        # One entry of the legend for all seeds.
        label = None if run in seen else run
        seen.add(run)
        steps = sorted(each["gold"])
        left.plot(steps, [each["gold"][step] for step in steps], color=colour, label=label, linewidth=1.4)
        if each["spread"]:
            right.plot(range(1, len(each["spread"]) + 1), each["spread"], color=colour, linewidth=0.9)

    left.set_ylim(0, 1)
    left.set_title("Gold judge, which no run sees: 0 to 1", fontsize=10, loc="left")
    left.legend(fontsize=9)
    right.set_title("Spread of the four reward models, of its start", fontsize=10, loc="left")
    for axis in (left, right):
        axis.set_xlabel("PPO step")
        axis.grid(alpha=0.3)
    figure.suptitle("One reward model, four on folds of the same pairs: a line a seed")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main(args: Arguments) -> None:
    """Train what is missing, then table and chart of all seeds."""
    output_dir = Path(args.output_dir).resolve()
    folders = {seed: output_dir / f"seed_{seed}" for seed in args.seeds}
    output_dir.mkdir(parents=True, exist_ok=True)
    processes = Processes()
    # What it says is no part of the table.
    sys.stdout, screen = sys.stderr, sys.stdout
    warm_up(output_dir / "seconds.txt")
    for seed, folder in folders.items():
        train(args, seed, processes, folder)
    sys.stdout = screen

    measured = {}
    for (seed, folder), run in product(folders.items(), RUNS):
        measured[seed, run] = figures(folder, run, args.limits)
    draw(measured, output_dir / "ensembles.png")
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"commit {commit.stdout.strip()}, {machine}; {args.ppo_steps} PPO steps of 32 answers, no KL penalty but in")
    print(f"the last run of a seed; {MEMBERS} reward models on folds of the prompts, {args.reward_steps} steps each\n")
    print(table(measured, args.limits))


if __name__ == "__main__":
    main(parse_args())
