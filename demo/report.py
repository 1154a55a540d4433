"""The demo's results: summary.json, the chart ppo.png and the closing words.

In:  <output_dir> after demo.evaluate. Out: <output_dir>/summary.json, <output_dir>/ppo.png.

    python -m demo.report --output_dir runs/demo
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from demo.commands import page_command
from rlhf.artefacts.files import write_json
from rlhf.artefacts.run_json import load_run
from rlhf.flags import flag, parse
from rlhf.rl.charts import Event, Panel, draw_panels, save
from rlhf.run.launch import run_script
from rlhf.run.log import read_metrics
from rlhf.run.pictures import BLACK, BLUE, GREEN, ORANGE, chinese_font, lettering, pyplot

# The words of the picture, by language.
WORDS = {
    "en": {
        "score": "Score of the reward model: what PPO raises",
        "gold": "Gold judge, which no stage sees: 0 to 1, held-out prompts",
        "kl": "KL: distance to the SFT model (nats a response)",
        "length": "Length of an answer (tokens)",
        "saved": "saved checkpoint",
        "steps": "PPO step (0: the SFT model)",
        "title": "PPO in the mini-world",
    },
    "zh": {
        "score": "奖励模型的得分：PPO 要提高的就是它",
        "gold": "隐藏评分（各阶段都看不到）：0 到 1，留出的问题",
        "kl": "KL：离 SFT 模型有多远（奈特/回答）",
        "length": "回答长度（token）",
        "saved": "保存的检查点",
        "steps": "PPO 步数（0 是 SFT 模型）",
        "title": "小世界里的 PPO",
    },
}


@dataclass(kw_only=True)
class Arguments:
    """Flags of demo/report.py."""

    output_dir: str = flag("runs/demo", help="directory of the demo's run")
    language: str = flag("en", help="language of the picture's words; Chinese needs a font", choices=list(WORDS))


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


def draw(output_dir: Path, language: str) -> None:
    """ppo.png: score, gold score, KL and length over the steps, saved checkpoints as dotted lines."""
    rows = read_metrics(output_dir / "ppo")
    steps = [row["step"] for row in rows]
    saved, gold = gold_curve(output_dir)

    font = chinese_font() if language == "zh" else None
    # Without a font of theirs Chinese characters would be boxes.
    words = WORDS[language if language == "en" or font else "en"]
    panels = [
        Panel(words["score"], steps, [row["score/mean"] for row in rows], BLUE),
        Panel(words["gold"], saved, gold, BLACK, dotted=True),
        Panel(words["kl"], steps, [row["kl/mean"] for row in rows], ORANGE),
        Panel(words["length"], steps, [row["len/mean"] for row in rows], GREEN, from_zero=True),
    ]

    with lettering(font):
        figure = draw_panels(pyplot(), panels, [Event(words["saved"], saved[1:], "gray", ":")], words["steps"])
        figure.suptitle(words["title"])
        save(pyplot(), figure, output_dir / "ppo.png")


def closing_words(s: dict[str, float], output_dir: Path) -> str:
    """The summary for someone who sees RLHF for the first time."""
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
    minutes = s["seconds/all"] / 60
    core_minutes = s["cpu/all"] / 60
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
            f"Empty answers: {s['empty_frac/ppo']:.1%}. All stages took {minutes:.1f} minutes, and {core_minutes:.1f} "
            "minutes of one processor core.",
            "",
            f"Look at {output_dir}/ppo.png and {output_dir}/compare/comparison.html.",
            "",
            "Talk to it:",
            f"  python compare.py --base_model_name {output_dir}/base --adapters sft={output_dir}/sft "
            f"rlhf={output_dir}/ppo --interactive True --max_new_tokens 64",
            "Vote between SFT and PPO without knowing which is which, in the browser (docs/preferences.md):",
            f"  {shlex.join(['python', *page_command(str(output_dir))])}",
            "It knows its toy world only. Ask for example: " + "  ".join(known_prompts(output_dir)),
            "",
            "Next, your own data: see what the stages make of a file before a model is loaded,",
            "  python sft_training.py --model_name YOUR_BASE --dataset_name YOUR.jsonl --inspect_data True",
            "and read docs/data.md.",
        ]
    )


def known_prompts(output_dir: Path) -> list[str]:
    """Prompts that the toy world knows, one of each kind."""
    return (output_dir / "data" / "compare.txt").read_text(encoding="utf-8").splitlines()


def main(args: Arguments) -> None:
    """Write the summary, draw the chart, say it in words."""
    output_dir = Path(args.output_dir)
    summary = summarize(output_dir)
    write_json(output_dir / "summary.json", summary)
    draw(output_dir, args.language)
    print(closing_words(summary, output_dir), flush=True)


if __name__ == "__main__":
    run_script(main, parse_args)
