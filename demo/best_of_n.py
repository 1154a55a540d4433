"""Best of n before PPO: how far two judges agree with a careless reward model, and with the demo's own.

In:  a finished demo. Out: <output_dir>/{careless,own} (reward models with their audits), best_of_n.png, and the table.

Both choose among the same 64 answers of the SFT model to each held-out prompt. The careless reward model is the one of
the collapse (demo/commands.py); the demo's own one is hardened. The judge is the demo's, which neither has seen.

    python -m demo.best_of_n --demo_dir runs/demo --output_dir runs/best_of_n | tee demo/results/best_of_n.log
"""

import os
import platform
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from demo.commands import REWARD
from demo.gold import gold_score
from demo.hardening import run
from rlhf.artefacts.run_json import load_run
from rlhf.flags import flag, parse
from rlhf.reward import best_of, best_of_report
from rlhf.run.log import read_lines
from rlhf.run.pictures import BLUE, GREEN, ORANGE, pyplot

NAMES = {"careless": "careless reward model", "own": "the demo's own, hardened"}


@dataclass(kw_only=True)
class Arguments:
    """Flags of demo/best_of_n.py."""

    demo_dir: str = flag("runs/demo", help="a finished demo, whose base, SFT model, reward model and judge are used")
    output_dir: str = flag(
        "runs/best_of_n", help="where the reward models and their audits go; finished ones are kept"
    )
    best_of: int = flag(64, help="answers to each prompt")
    prompts: int = flag(100, help="held-out prompts")


def make_reward_models(args: Arguments, demo_dir: Path, output_dir: Path) -> None:
    """The careless reward model, trained as for the collapse, and a copy of the demo's own for an audit of its own."""
    seed = str(load_run(demo_dir / "sft")["arguments"]["seed"])
    if not (output_dir / "pairs.jsonl").is_file():
        where = ["--demo_dir", str(demo_dir), "--output_dir", str(output_dir), "--seed", seed]
        run("-m", "demo.pairs", "--kind", "careless", *where, "--pairs", "400", "--eval_pairs", "200")
    files = ["--dataset_name", str(output_dir / "pairs.jsonl")]
    files += [
        "--eval_dataset_name",
        str(output_dir / "pairs_eval.jsonl"),
        "--output_dir",
        str(output_dir / "careless"),
    ]
    # A finished model is left as it is, because its stage is told to resume.
    run(
        "reward_modeling.py", "--model_name", str(demo_dir / "base"), *shlex.split(REWARD), *files, "--seed", seed,
        "--max_steps", "60", "--resume_from_checkpoint", "True",
    )  # fmt: skip
    if not (output_dir / "own").is_dir():
        shutil.copytree(demo_dir / "reward", output_dir / "own")


def audit(args: Arguments, demo_dir: Path, reward: Path) -> dict:
    """best_of_n.json of a reward model, with the gold judge's curve over the same answers as "gold"."""
    data = demo_dir / "data"
    if not (reward / "best_of_n.json").is_file():
        run(
            "reward_modeling.py", "--model_name", str(demo_dir / "base"), "--max_length", "128",
            "--audit_only", "True", "--dataset_name", str(data / "preferences.jsonl"), "--eval_dataset_name",
            str(data / "preferences_eval.jsonl"), "--reward_model_lora_path", str(reward), "--sft_model_lora_path",
            str(demo_dir / "sft"), "--judge_lora_path", str(demo_dir / "judge"), "--best_of", str(args.best_of),
            "--best_of_prompts", str(args.prompts), "--output_max_length", "48", "--per_device_eval_batch_size", "64",
        )  # fmt: skip

    # The judge's verdict is replaced by the gold judge's, over the same choices.
    rows = read_lines(reward / "best_of_n.jsonl")
    scores = torch.tensor([row["scores"] for row in rows], dtype=torch.float64)
    judged = torch.tensor([row["judged"] for row in rows], dtype=torch.float64)
    gold = torch.tensor([[gold_score(row["prompt"], text) for text in row["answers"]] for row in rows])
    return best_of.summary(scores, judged) | {"gold": best_of.summary(scores, gold.double())}


def table(audits: dict[str, dict]) -> str:
    """A line for each n: what both reward models choose, by their own score, the judge's and the gold judge's."""
    lines = [f"{'':>14}" + "".join(f"{NAMES[name]:^36}" for name in audits)]
    lines.append(f"{'n':>4}{'KL (nats)':>10}" + f"{'score':>12}{'judge':>12}{'gold':>12}" * len(audits))
    for place, first in enumerate(audits["careless"]["curve"]):
        cells = ""
        for each in audits.values():
            row = each["curve"][place]
            gold = each["gold"]["curve"][place]["judged"]
            cells += f"{row['score']:>12.3f}{row['judged']:>12.3f}{gold:>12.3f}"
        lines.append(f"{first['n']:>4}{first['kl']:>10.2f}{cells}")
    return "\n".join(lines)


def draw(audits: dict[str, dict], file: Path) -> None:
    """A panel for each reward model: gains in score, judge and gold score against KL."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True, constrained_layout=True)
    for axis, (name, each) in zip(axes, audits.items(), strict=True):
        best_of_report.draw_curve(axis, each, ("score", "reward model, which chooses", ORANGE, "s--"))
        best_of_report.draw_curve(axis, each, ("judged", "judge", BLUE, "o-"))
        best_of_report.draw_curve(axis, each["gold"], ("judged", "gold judge", GREEN, "^-."))
        axis.axhline(0, color="grey", linewidth=1, linestyle=":", label="a random choice")
        best_of_report.label_sizes(axis, each)
        axis.set_title(NAMES[name])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("gain over a single answer\n(standard deviations of the answers to one prompt)")
    axes[0].legend(fontsize=9)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main(args: Arguments) -> int:
    """Train or copy, audit, print, draw; 1 where the careless curve does not turn or the demo's own does."""
    demo_dir = Path(args.demo_dir).resolve()
    output_dir = Path(args.output_dir).resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    make_reward_models(args, demo_dir, output_dir)
    audits = {name: audit(args, demo_dir, output_dir / name) for name in NAMES}
    draw(audits, output_dir / "best_of_n.png")

    commit = (load_run(output_dir / "careless")["git_commit"] or "unknown")[:7]
    print(f"trained by commit {commit}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"{args.best_of} answers of the SFT model to each of {audits['own']['prompts']} held-out prompts\n")
    print(table(audits))
    for name, each in audits.items():
        print(f"\n{NAMES[name]}: {best_of_report.sentence(each)}")
        print(f"  by the gold judge instead: {best_of_report.sentence(each['gold'])}")
    kept = audits["careless"]["turns"] is not None and audits["own"]["turns"] is None
    print("\nthe careless curve turns, the hardened one does not" if kept else "\nbroken: the curves do not part")
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main(parse(Arguments, None, __doc__)))
