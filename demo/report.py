"""The demo's results: summary.json, the chart ppo.png and the closing words.

In:  <output_dir> after demo.evaluate. Out: <output_dir>/summary.json, <output_dir>/ppo.png.

    python -m demo.report --output_dir runs/demo
"""

import json
from dataclasses import dataclass
from pathlib import Path

from rlhf.artefacts.files import write_json
from rlhf.artefacts.run_json import load_run
from rlhf.flags import flag, parse
from rlhf.run.launch import run_script
from rlhf.run.log import read_metrics
from rlhf.run.pictures import pyplot

plt = pyplot()

# (key of metrics.jsonl, label, colour) of the panels; the gold score comes from demo.evaluate.
PANELS = (
    ("score/mean", "score\n(reward model, standardized)", "tab:blue"),
    ("kl/mean", "KL to the SFT policy\n(nats a response)", "tab:orange"),
    ("len/mean", "response length\n(tokens)", "tab:green"),
)


@dataclass(kw_only=True)
class Arguments:
    """Flags of demo/report.py."""

    output_dir: str = flag("runs/demo", help="directory of the demo's run")


def parse_args(argv: list[str] | None = None) -> Arguments:
    """The command line, checked."""
    return parse(Arguments, argv, __doc__)


def summarize(output_dir: Path) -> dict[str, float]:
    """The demo in numbers, under the names of summary.json."""
    # The gold scores of demo.evaluate, of which the two ends of PPO count here.
    evaluation = json.loads((output_dir / "evaluation.json").read_text(encoding="utf-8"))
    sft = evaluation["versions"]["sft"]
    ppo = evaluation["versions"]["ppo"]

    # What the stages measured themselves.
    steps = read_metrics(output_dir / "ppo")
    sft_run = load_run(output_dir / "sft")["metrics"]
    reward_run = load_run(output_dir / "reward")["metrics"]
    times = (output_dir / "seconds.txt").read_text(encoding="utf-8")
    seconds = [line.split() for line in times.splitlines()]

    # demo.thresholds holds these names against what is promised.
    return {
        "sft/eval_loss_before": sft_run["eval_loss_before"],
        "sft/eval_loss_after": sft_run["eval_loss_after"],
        "rm/eval_accuracy": reward_run["eval_accuracy"],
        "ppo/score_first": steps[0]["score/mean"],
        "ppo/score_last": steps[-1]["score/mean"],
        "ppo/kl_last": steps[-1]["kl/mean"],
        "len/sft": sft["tokens"],
        "len/ppo": ppo["tokens"],
        "empty_frac/ppo": ppo["empty_frac"],
        "gold/sft": sft["gold"],
        "gold/ppo": ppo["gold"],
        "gold/win_rate": evaluation["win_rate"],
        "gold/win_rate_low": evaluation["win_rate_low"],
        "gold/win_rate_high": evaluation["win_rate_high"],
        **running_gold(gold_curve(output_dir)[1][1:]),
        "correct/sft": sft["correct"],
        "correct/ppo": ppo["correct"],
        "heldout_prompts": len(evaluation["prompts"]),
        **{f"seconds/{name}": float(wall) for name, wall, _ in seconds},
        **{f"cpu/{name}": float(cpu) for name, _, cpu in seconds},
    }


def gold_curve(output_dir: Path) -> tuple[list[int], list[float]]:
    """Steps and gold scores of SFT (step 0) and every saved checkpoint."""
    evaluation = json.loads((output_dir / "evaluation.json").read_text(encoding="utf-8"))
    versions = evaluation["versions"]
    points = {0: versions["sft"]["gold"]}
    for name, figures in versions.items():
        # Neither "base" nor "ppo", which is the last step once more.
        if name.startswith("step_"):
            step = int(name.removeprefix("step_"))
            points[step] = figures["gold"]
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def running_gold(scores: list[float], width: int = 3) -> dict[str, float]:
    """Last and best of the running mean over `width` checkpoints of PPO's gold score: did it end where it was best?"""
    means = [sum(scores[i : i + width]) / width for i in range(len(scores) - width + 1)]
    # A smoke run has fewer checkpoints than one mean takes.
    means = means or scores
    return {"gold/running_last": means[-1], "gold/running_best": max(means)}


def draw(output_dir: Path) -> None:
    """ppo.png: score, KL, length and gold score over the steps, saved checkpoints as dotted lines."""
    rows = read_metrics(output_dir / "ppo")
    steps = [row["step"] for row in rows]
    saved, gold = gold_curve(output_dir)
    figure, axes = plt.subplots(4, 1, figsize=(8, 9.5), sharex=True, constrained_layout=True)

    # What every step logs; of the four panels the last one stays free.
    for axis, (key, label, colour) in zip(axes, PANELS, strict=False):
        axis.plot(steps, [row[key] for row in rows], color=colour)
        axis.set_ylabel(label)

    # From zero, so that a shorter answer looks as much shorter as it is.
    axes[2].set_ylim(bottom=0)

    # The gold score is known at the saved checkpoints alone.
    axes[3].plot(saved, gold, marker="o", color="tab:red")
    axes[3].set_ylabel("gold score, 0 to 1\n(gold judge, held-out prompts)")
    axes[3].set_xlabel("PPO step (dotted: saved checkpoint; step 0 is the SFT model)")

    for axis in axes:
        axis.grid(alpha=0.3)
        for step in saved[1:]:
            axis.axvline(step, color="gray", linestyle=":", linewidth=1)

    axes[0].set_title("PPO in the mini-world")
    figure.savefig(output_dir / "ppo.png", dpi=110)
    plt.close(figure)


def closing_words(s: dict[str, float], output_dir: Path) -> str:
    """The summary for someone who sees RLHF for the first time."""
    seconds = [value for name, value in s.items() if name.startswith("seconds/")]
    minutes = sum(seconds) / 60
    rows = [
        ("what", "before", "after"),
        (
            "SFT: loss on held-out formal answers",
            f"{s['sft/eval_loss_before']:.3f}",
            f"{s['sft/eval_loss_after']:.3f}",
        ),
        ("PPO: score by the reward model", f"{s['ppo/score_first']:+.2f}", f"{s['ppo/score_last']:+.2f}"),
        ("PPO: gold score by the gold judge, 0 to 1", f"{s['gold/sft']:.3f}", f"{s['gold/ppo']:.3f}"),
        ("PPO: answers with the right content", f"{s['correct/sft']:.1%}", f"{s['correct/ppo']:.1%}"),
        ("PPO: length of an answer in tokens", f"{s['len/sft']:.1f}", f"{s['len/ppo']:.1f}"),
    ]

    table = [f"{what:<46}{before:>9}{after:>9}" for what, before, after in rows]
    low = s["gold/win_rate_low"]
    high = s["gold/win_rate_high"]
    return "\n".join(
        [
            "",
            *table,
            "",
            f"The reward model orders {s['rm/eval_accuracy']:.1%} of held-out pairs as the (noisy) crowd did.",
            f"On {s['heldout_prompts']:.0f} prompts that no stage trained on the gold judge prefers PPO's answer to",
            f"SFT's in {s['gold/win_rate']:.1%} of cases (95 % interval {low:.1%} to {high:.1%}; a tie counts half).",
            f"Empty answers: {s['empty_frac/ppo']:.1%}. All stages took {minutes:.1f} minutes.",
            f"Look at {output_dir}/ppo.png and {output_dir}/compare/comparison.html.",
        ]
    )


def main(args: Arguments) -> None:
    """Write the summary, draw the chart, say it in words."""
    output_dir = Path(args.output_dir)
    summary = summarize(output_dir)
    write_json(output_dir / "summary.json", summary)
    draw(output_dir)
    print(closing_words(summary, output_dir), flush=True)


if __name__ == "__main__":
    run_script(main, parse_args)
