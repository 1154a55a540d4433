"""Several PPO runs on one demo compared: the gold score of their checkpoints, in a table and a chart.

In:  a finished demo, the output directories of some PPO runs on its SFT model, by name.
Out: <output_dir>/story.json, story.png, and the table on the screen.

    python -m demo.story --demo_dir runs/demo --output_dir runs/demo_collapse --title "..." \\
        --runs "without guards=runs/demo_collapse/ppo" "with guards=runs/demo_collapse/guarded"
"""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from demo.evaluate import GoldJudge
from rlhf.artefacts.files import write_json
from rlhf.artefacts.run_json import load_run
from rlhf.flags import flag, parse
from rlhf.rl.charts import draw_against_kl, overoptimization
from rlhf.rl.evaluation import CLEAR
from rlhf.run.launch import run_script
from rlhf.run.log import read_lines, read_metrics
from rlhf.run.pictures import BLACK, BLUE, GREEN, ORANGE, pyplot

plt = pyplot()

# The gold score is between 0 and 1, the other curves are some units wide: times this, it shares their axis.
GOLD_SCALE = 4
# Colour and line of a run, in the order of --runs: they differ in grey print, too.
LOOKS = ((ORANGE, "-"), (BLUE, "--"), (GREEN, "-."), (BLACK, ":"))


@dataclass(kw_only=True)
class Arguments:
    """Flags of demo/story.py."""

    demo_dir: str = flag("runs/demo", help="the demo whose base and SFT model the runs started from")
    output_dir: str = flag("runs/demo_collapse", help="where story.json and story.png go")
    runs: list[str] = flag([], help="runs as NAME=DIR", nargs="+")
    title: str = flag("PPO in the mini-world", help="of the chart")
    seed: int = flag(0, help="of the sampling")
    temperature: float = flag(0.7, help="of the sampling; PPO itself samples at 1")
    max_new_tokens: int = flag(64, help="response tokens at most")
    prompts: int = flag(400, help="held-out prompts at most")

    def __post_init__(self):
        if not self.runs or any("=" not in run for run in self.runs):
            raise ValueError("--runs needs one NAME=DIR or more")


def parse_args(argv: list[str] | None = None) -> Arguments:
    """The command line, checked."""
    return parse(Arguments, argv, __doc__)


# ---- figures ----
class Looks:
    """The gold judge's figures of one adapter after another."""

    def __init__(self, args: Arguments):
        demo_dir = Path(args.demo_dir)
        rows = read_lines(demo_dir / "data" / "heldout.jsonl")
        self.prompts = [row["prompt"] for row in rows][: args.prompts]
        self.gold_judge = GoldJudge(str(demo_dir / "base"), self.prompts, args)

    def look_at(self, adapter: Path) -> dict:
        """Gold score, share of right and of empty answers, and length of one adapter's answers."""
        figures = self.gold_judge.figures(self.gold_judge.use(adapter))
        # Four hundred answers of every checkpoint would fill story.json; the means and three answers stay.
        means = {key: value for key, value in figures.items() if isinstance(value, float)}
        return means | {"examples": figures["answers"][:3]}


def follow(run_dir: Path, looks: Looks, sft: dict) -> dict:
    """One run: its steps, the gold score of every checkpoint, its evaluations, and what one would keep of it."""
    saved = sorted(int(folder.name.removeprefix("step_")) for folder in run_dir.glob("step_*"))
    if not saved:
        raise ValueError(f"{run_dir} has no checkpoint step_<n>: run PPO with --save_freq")

    # The gold judge looks on from outside: the run itself never asks it.
    checkpoints = {0: sft}
    for step in saved:
        checkpoints[step] = looks.look_at(run_dir / f"step_{step}")

    # What the run logged itself: steps, and evaluations by its reward model (proxy) and by its judge.
    rows = read_metrics(run_dir)
    columns = ("step", "score/mean", "kl/mean", "len/mean", "guard")
    steps = [{name: row.get(name) for name in columns} for row in rows]
    evaluations = {}
    for name, (distance, gain) in overoptimization(rows).items():
        evaluations[name] = (distance.tolist(), gain.tolist())

    last = saved[-1]
    return {
        "steps": steps,
        "evaluations": evaluations,
        "checkpoints": checkpoints,
        "end": checkpoints[last],
        "kept": kept(run_dir, last, looks, checkpoints),
    }


def kept(run_dir: Path, last: int, looks: Looks, checkpoints: dict) -> dict:
    """The last step of a run without guards; else best/, if its judge calls it clearly better than the SFT model."""
    run = load_run(run_dir / f"step_{last}")
    if run["arguments"]["on_collapse"] == "off":
        return {"what": "the last step", **checkpoints[last]}

    state = run_dir / "best" / "state.json"
    if state.is_file():
        best = json.loads(state.read_text(encoding="utf-8"))["best"]
        # The gold score decides nothing here: in a real project there is none.
        if best["gain"] > CLEAR * best["error"]:
            return {"what": f"best/ (step {best['step']})", **looks.look_at(state.parent)}
    return {"what": "the SFT model", **checkpoints[0]}


# ---- words and picture ----
def table(story: dict) -> str:
    """The SFT model, and each run at its end and in what one would keep of it, as lines of a table."""
    rows = [("", "score", "tokens", "right", "empty", "gold", "kept", "its gold")]
    rows.append(("SFT model", "", *_cells(story["sft"]), "", ""))

    for name, run in story["runs"].items():
        first = run["steps"][0]["score/mean"]
        last = run["steps"][-1]["score/mean"]
        score = f"{first:+.2f} to {last:+.2f}"
        keep = run["kept"]
        rows.append((name, score, *_cells(run["end"]), keep["what"], f"{keep['gold']:.3f}"))

    # Every column is as wide as its longest cell.
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(cell.ljust(width) for cell, width in cells))
    return "\n".join(lines)


def _cells(figures: dict) -> tuple[str, str, str, str]:
    return (
        f"{figures['tokens']:.1f}",
        f"{figures['correct']:.1%}",
        f"{figures['empty_frac']:.1%}",
        f"{figures['gold']:.3f}",
    )


def events(story: dict) -> list[str]:
    """Lines on the steps at which the guard stepped in, run by run."""
    lines = []
    for name, run in story["runs"].items():
        warned = [row for row in run["steps"] if row["guard"]]
        lines += [f"{name}, step {row['step']}: {row['guard']}" for row in warned]
    return lines


def draw(story: dict, title: str, file: Path) -> None:
    """Score, length and gold score over the steps of all runs, and gold score and proxy against sqrt(KL)."""
    figure = plt.figure(figsize=(12, 9), constrained_layout=True)
    grid = figure.add_gridspec(6, 2)
    _draw_steps(figure, grid, story, title)

    # On the right a panel for each run, one below the other.
    height = 6 // len(story["runs"])
    for place, (name, run) in enumerate(story["runs"].items()):
        axis = figure.add_subplot(grid[place * height : (place + 1) * height, 1])
        draw_against_kl(axis, against_kl(run, story["sft"]["gold"]))
        axis.set_title(name, fontsize=9)

    figure.savefig(file, dpi=100)
    plt.close(figure)


def _draw_steps(figure, grid, story: dict, title: str) -> None:
    """Score, length and gold score over the steps, all runs in each of the three panels on the left."""
    axes = [figure.add_subplot(grid[2 * row : 2 * row + 2, 0]) for row in range(3)]
    for look, (name, run) in zip(LOOKS, story["runs"].items(), strict=False):
        _draw_run(axes, name, run, *look)

    labels = (
        "Score of the reward model: what PPO raises",
        "Length of an answer (tokens)",
        "Gold judge, which no run sees: 0 to 1 (grey: the SFT model)",
    )
    for axis, label in zip(axes, labels, strict=True):
        axis.set_title(label, fontsize=10, loc="left")
        axis.grid(alpha=0.3)

    # The gold score has the same scale in every story, so that their charts can be compared.
    axes[0].legend(fontsize=9)
    figure.suptitle(title)
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(0, 1)
    axes[2].axhline(story["sft"]["gold"], color="gray", linewidth=1)
    axes[2].set_xlabel("PPO step" + (" (upright dotted lines: the guard stepped in)" if events(story) else ""))


def _draw_run(axes: list, name: str, run: dict, colour: str, line: str) -> None:
    rows = run["steps"]
    steps = [row["step"] for row in rows]
    axes[0].plot(steps, [row["score/mean"] for row in rows], line, color=colour, label=name)
    axes[1].plot(steps, [row["len/mean"] for row in rows], line, color=colour)
    points = sorted((step, figures["gold"]) for step, figures in run["checkpoints"].items())
    axes[2].plot(*zip(*points, strict=True), marker="o", markersize=4, linestyle=line, color=colour)

    warned = [row["step"] for row in rows if row["guard"]]
    for step, axis in product(warned, axes):
        axis.axvline(step, color=colour, linestyle=":", linewidth=1)


def against_kl(run: dict, sft_gold: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Gains over the SFT model against sqrt(KL): the run's own evaluations, and the gold score times GOLD_SCALE."""
    curves = {}
    for name, (distance, gain) in run["evaluations"].items():
        curves[name] = (np.array(distance), np.array(gain))

    # The estimate of KL can fall below zero, where it has no root.
    kl = {row["step"]: max(row["kl/mean"], 0.0) for row in run["steps"]}
    # A checkpoint without a logged step, as step 0, has no place on this axis.
    steps = [step for step in run["checkpoints"] if step in kl]
    distances = np.sqrt([kl[step] for step in steps])
    gains = [GOLD_SCALE * (run["checkpoints"][step]["gold"] - sft_gold) for step in steps]
    return curves | {f"gold score x {GOLD_SCALE}": (distances, np.array(gains))}


def main(args: Arguments) -> None:
    """Ask the gold judge, write, draw, print."""
    looks = Looks(args)
    sft = looks.look_at(Path(args.demo_dir) / "sft")

    runs = {}
    for run in args.runs:
        name, folder = run.split("=", 1)
        runs[name] = Path(folder)
    followed = {name: follow(folder, looks, sft) for name, folder in runs.items()}
    story = {"sft": sft, "runs": followed}

    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "story.json", story)
    draw(story, args.title, output_dir / "story.png")

    print(f"\n{table(story)}\n")
    for line in events(story):
        print(f"guard, {line}")

    print(f"tokens, right, empty and gold: answers to {len(looks.prompts)} held-out prompts after the last step")
    print(f"look at {output_dir}/story.png", flush=True)


if __name__ == "__main__":
    run_script(main, parse_args)
