"""What became of several PPO runs on one demo: the gold judge over their checkpoints, in a table and a chart.

In:  a finished demo, the output directories of some PPO runs on its SFT model, by name.
Out: <output_dir>/story.json, story.png, and the table on the screen.

    python -m demo.story --demo_dir runs/demo --output_dir runs/demo_collapse --title "..." \\
        --runs "without guards=runs/demo_collapse/ppo" "with guards=runs/demo_collapse/guarded"
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from demo.evaluate import judge, sample_answers
from rlhf.artefacts.files import write_json
from rlhf.artefacts.run_json import load_run
from rlhf.data.encoding import load_tokenizer
from rlhf.flags import flag, parse
from rlhf.models.loading import add_lora, load_base
from rlhf.rl.charts import draw_against_kl, overoptimization
from rlhf.rl.evaluation import CLEAR
from rlhf.run.launch import run_script
from rlhf.run.log import read_lines, read_metrics
from rlhf.run.pictures import pyplot

plt = pyplot()

# The gold score is between 0 and 1, the others are some units wide: so it shares their axis.
GOLD_SCALE = 4
COLOURS = ("tab:red", "tab:blue", "tab:green", "tab:orange")


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
class Judge:
    """Answers of any adapter to the held-out prompts, as the gold judge sees them."""

    def __init__(self, args: Arguments):
        demo_dir = Path(args.demo_dir)
        self.args = args
        self.model = load_base(str(demo_dir / "base"), torch.float32)
        self.tokenizer = load_tokenizer(str(demo_dir / "base"))
        self.prompts = [row["prompt"] for row in read_lines(demo_dir / "data" / "heldout.jsonl")][: args.prompts]
        self.seen = 0

    def look_at(self, adapter: Path) -> dict:
        """Gold score, share of right and of empty answers, and length of one adapter's answers."""
        self.seen += 1
        name = f"version_{self.seen}"
        self.model, _ = add_lora(self.model, adapter, name, trainable=False)
        self.model.base_model.set_adapter(name, inference_mode=True)
        self.model.eval()
        answers, tokens = sample_answers(self.model.get_base_model(), self.tokenizer, self.prompts, self.args)
        found = judge(self.prompts, answers)
        kept = {key: value for key, value in found.items() if isinstance(value, float)}
        return kept | {"tokens": tokens, "examples": answers[:3]}


def follow(run_dir: Path, hidden: Judge, sft: dict) -> dict:
    """One run: its steps, the gold judge at every checkpoint, its evaluations, and what one would keep of it."""
    saved = sorted(int(folder.name.removeprefix("step_")) for folder in run_dir.glob("step_*"))
    if not saved:
        raise ValueError(f"{run_dir} has no checkpoint step_<n>: run PPO with --save_freq")
    checkpoints = {0: sft} | {step: hidden.look_at(run_dir / f"step_{step}") for step in saved}
    rows = read_metrics(run_dir)
    return {
        "steps": [{k: row.get(k) for k in ("step", "score/mean", "kl/mean", "len/mean", "guard")} for row in rows],
        "evaluations": {name: (d.tolist(), gain.tolist()) for name, (d, gain) in overoptimization(rows).items()},
        "checkpoints": checkpoints,
        "end": checkpoints[saved[-1]],
        "kept": kept(run_dir, saved[-1], hidden, checkpoints),
    }


def kept(run_dir: Path, last: int, hidden: Judge, checkpoints: dict) -> dict:
    """The last step of a run without guards; else best/, if its judge found it clearly better than the SFT model."""
    run = load_run(run_dir / f"step_{last}")
    if run["arguments"]["on_collapse"] == "off":
        return {"what": "the last step", **checkpoints[last]}
    best = run_dir / "best" / "state.json"
    if best.is_file():
        found = json.loads(best.read_text(encoding="utf-8"))["best"]
        if found["gain"] > CLEAR * found["error"]:
            return {"what": f"best/ (step {found['step']})", **hidden.look_at(best.parent)}
    return {"what": "the SFT model", **checkpoints[0]}


# ---- words and picture ----
def table(story: dict) -> str:
    """The story in figures."""
    rows = [("", "score", "tokens", "right", "empty", "gold", "kept", "its gold")]
    sft = story["sft"]
    rows.append(("SFT model", "", *_figures(sft), "", ""))

    for name, run in story["runs"].items():
        first = run["steps"][0]["score/mean"]
        last = run["steps"][-1]["score/mean"]
        rows.append(
            (
                name,
                f"{first:+.2f} to {last:+.2f}",
                *_figures(run["end"]),
                run["kept"]["what"],
                f"{run['kept']['gold']:.3f}",
            )
        )

    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _figures(found: dict) -> tuple[str, str, str, str]:
    return f"{found['tokens']:.1f}", f"{found['correct']:.1%}", f"{found['empty_frac']:.1%}", f"{found['gold']:.3f}"


def events(story: dict) -> list[str]:
    """What the guard said, run by run."""
    return [
        f"{name}, step {row['step']}: {row['guard']}"
        for name, run in story["runs"].items()
        for row in run["steps"]
        if row["guard"]
    ]


def draw(story: dict, title: str, file: Path) -> None:
    """Score, length and gold score over the steps of all runs, and gold score and proxy against sqrt(KL)."""
    figure = plt.figure(figsize=(12, 9), constrained_layout=True)
    grid = figure.add_gridspec(6, 2)
    axes = [figure.add_subplot(grid[2 * row : 2 * row + 2, 0]) for row in range(3)]

    for colour, (name, run) in zip(COLOURS, story["runs"].items(), strict=False):
        steps = [row["step"] for row in run["steps"]]
        axes[0].plot(steps, [row["score/mean"] for row in run["steps"]], color=colour, label=name)
        axes[1].plot(steps, [row["len/mean"] for row in run["steps"]], color=colour)
        points = sorted((step, found["gold"]) for step, found in run["checkpoints"].items())
        axes[2].plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour)
        for row in run["steps"]:
            if row["guard"]:
                for axis in axes:
                    axis.axvline(row["step"], color=colour, linestyle=":", linewidth=1)

    labels = (
        "score of the reward model\n(what PPO maximises)",
        "response length (tokens)",
        "gold score (gold judge)",
    )

    for axis, label in zip(axes, labels, strict=True):
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)

    axes[0].legend(fontsize=8)
    axes[0].set_title(title, fontsize=10)
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(0, 1)
    axes[2].axhline(story["sft"]["gold"], color="gray", linestyle="--", linewidth=1)
    axes[2].set_xlabel("PPO step (dashed: the SFT model; dotted: the guard stepped in)")

    for place, name in enumerate(story["runs"]):
        height = 6 // len(story["runs"])
        axis = figure.add_subplot(grid[place * height : (place + 1) * height, 1])
        draw_against_kl(axis, against_kl(story["runs"][name], story["sft"]["gold"]))
        axis.set_title(name, fontsize=9)

    figure.savefig(file, dpi=100)
    plt.close(figure)


def against_kl(run: dict, sft_gold: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Gains over the SFT model against sqrt(KL): the run's own evaluations, and the gold score times GOLD_SCALE."""
    curves = {name: (np.array(d), np.array(gain)) for name, (d, gain) in run["evaluations"].items()}
    kl = {row["step"]: max(row["kl/mean"], 0.0) for row in run["steps"]}
    steps = [step for step in run["checkpoints"] if step in kl]
    gains = [GOLD_SCALE * (run["checkpoints"][step]["gold"] - sft_gold) for step in steps]
    return curves | {f"gold score x {GOLD_SCALE}": (np.sqrt([kl[step] for step in steps]), np.array(gains))}


def main(args: Arguments) -> None:
    """Judge, write, draw, tell."""
    hidden = Judge(args)
    sft = hidden.look_at(Path(args.demo_dir) / "sft")
    runs = dict(run.split("=", 1) for run in args.runs)
    story = {"sft": sft, "runs": {name: follow(Path(folder), hidden, sft) for name, folder in runs.items()}}
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "story.json", story)
    draw(story, args.title, output_dir / "story.png")
    print(f"\n{table(story)}\n")
    for line in events(story):
        print(f"guard, {line}")

    print(f"tokens, right, empty and gold: answers to {len(hidden.prompts)} held-out prompts after the last step")
    print(f"look at {output_dir}/story.png", flush=True)


if __name__ == "__main__":
    run_script(main, parse_args)
