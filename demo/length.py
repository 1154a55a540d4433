"""Length calibration in the mini-world: a reward model that learnt from longer answers, as it is and without length.

In:  a finished demo. Out: <output_dir>/{reward,fresh,balanced,plain,calibrated}, story.png, the table on the screen.

In nearly every pair that it learns from the better answer is the longer one. Its audit, on held-out pairs of any
length, fits what its score owes to length; fresh held-out pairs measure what is left, and PPO shows where lengths go.

    python -m demo.length --demo_dir runs/demo --output_dir runs/length | tee demo/results/length.log
"""

import os
import platform
import random
import shlex
import shutil
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch

from demo.build import write_rows
from demo.commands import PPO, REWARD
from demo.hardening import run
from demo.pairs import clean_pairs, longer_pairs, sure_pairs
from demo.world import split_prompts
from rlhf.artefacts.files import read_object
from rlhf.artefacts.run_json import load_run
from rlhf.flags import flag, parse
from rlhf.reward.length_file import read_length_file
from rlhf.reward.statistics import length_results

# What is promised: the rank correlation that may be left, and the drift of the policy's length as a share of SFT's.
MOST_CORRELATION = 0.1
MOST_DRIFT = 0.1
# What is measured on: fresh pairs drawn as those of the fit, and pairs whose longer answer is the better one in half.
TESTS = ("fresh", "balanced")


@dataclass(kw_only=True)
class Arguments:
    """Flags of demo/length.py."""

    demo_dir: str = flag("runs/demo", help="a finished demo, whose base and SFT model are used")
    output_dir: str = flag("runs/length", help="where everything goes; finished parts are kept")
    pairs: int = flag(3000, help="pairs for training, the better answer nearly always the longer one")
    ppo_steps: int = flag(24, help="PPO steps of either run")
    kl_coef: float = flag(0.05, help="KL penalty of either run")


# ---- the reward model ----
def write_pairs(args: Arguments, seed: int, folder: Path) -> None:
    """pairs.jsonl to train on, fit.jsonl for the audit's fit, and to measure on fresh.jsonl and balanced.jsonl."""
    train, held = split_prompts(seed)
    draws = {name: random.Random(f"length {name} {seed}") for name in ("pairs", "fit", "fresh", "balanced")}
    write_rows(folder / "pairs.jsonl", longer_pairs(train, args.pairs, draws["pairs"]))
    write_rows(folder / "fit.jsonl", clean_pairs(held, 500, draws["fit"]))
    write_rows(folder / "fresh.jsonl", clean_pairs(held, 500, draws["fresh"]))
    write_rows(folder / "balanced.jsonl", balanced(sure_pairs(held, 2000, draws["balanced"]), 250))


def balanced(rows: list[dict], count: int) -> list[dict]:
    """`count` of the rows whose chosen answer is the longer one, and as many whose rejected one is."""
    longer = [row for row in rows if len(row["chosen"]) > len(row["rejected"])]
    shorter = [row for row in rows if len(row["chosen"]) < len(row["rejected"])]
    if min(len(longer), len(shorter)) < count:
        raise ValueError(f"too few pairs to balance: {len(longer)} and {len(shorter)} for {count} each")
    return longer[:count] + shorter[:count]


def train_reward(demo_dir: Path, folder: Path, seed: str) -> None:
    """The reward model with its audit on fit.jsonl; and two copies of it, audited on what is to be measured on."""
    base = ["--model_name", str(demo_dir / "base"), "--dataset_name", str(folder / "pairs.jsonl"), "--seed", seed]
    run(
        "reward_modeling.py", *base, *shlex.split(REWARD), "--eval_dataset_name", str(folder / "fit.jsonl"),
        "--output_dir", str(folder / "reward"), "--resume_from_checkpoint", "True",
    )  # fmt: skip
    for name in TESTS:
        if (folder / name).is_dir():
            continue
        shutil.copytree(folder / "reward", folder / name)
        run(
            "reward_modeling.py", *base, "--max_length", "128", "--per_device_eval_batch_size", "64",
            "--audit_only", "True", "--eval_dataset_name", str(folder / f"{name}.jsonl"),
            "--reward_model_lora_path", str(folder / name),
        )  # fmt: skip


def measure(folder: Path, name: str) -> dict[str, dict]:
    """Rank correlation with length and accuracy over the pairs of one test, of the score as it is and calibrated."""
    points = read_object(folder / name / "audit.json")["points"]
    sides = [np.array(points[side]).T for side in ("chosen", "rejected")]
    lengths = np.stack([tokens for tokens, _ in sides])
    scores = np.stack([score for _, score in sides])
    calibration = read_length_file(folder / "reward")
    calibrated = scores - calibration.correction(torch.tensor(lengths)).numpy()

    measured = {}
    for version, values in (("as it is", scores), ("calibrated", calibrated)):
        within = length_results(*values, lengths.T.astype(int))
        measured[version] = {"spearman": within["spearman"], "accuracy": float((values[0] > values[1]).mean())}
    return measured


# ---- PPO ----
def train_policies(args: Arguments, demo_dir: Path, folder: Path, seed: str) -> dict:
    """story.json of both PPO runs, which maximise the score as it is and without what length adds."""
    for name, more in (("plain", []), ("calibrated", ["--length_calibration", "True"])):
        run(
            "rl_training.py", "--base_model_name", str(demo_dir / "base"), "--sft_model_lora_path",
            str(demo_dir / "sft"), "--reward_model_lora_path", str(folder / "reward"), "--judge_lora_path",
            str(demo_dir / "judge"), "--dataset_name", str(demo_dir / "data" / "prompts.jsonl"), *shlex.split(PPO),
            "--steps", str(64 * args.ppo_steps), "--save_freq", str(max(1, args.ppo_steps // 4)), "--eval_freq",
            str(max(1, args.ppo_steps // 4)), "--eval_size", "100", "--eval_prompts", "100", "--init_kl_coef",
            str(args.kl_coef), "--on_collapse", "off", "--sample_freq", "1000", "--seed", seed, "--output_dir",
            str(folder / name), "--resume_from_checkpoint", "True", *more,
        )  # fmt: skip
    if not (folder / "story.json").is_file():
        run(
            "-m", "demo.story", "--demo_dir", str(demo_dir), "--output_dir", str(folder), "--seed", seed, "--title",
            "A reward model that likes length: PPO on its score, and on what length does not explain", "--runs",
            f"the score as it is={folder / 'plain'}", f"length calibrated={folder / 'calibrated'}",
        )  # fmt: skip
    return read_object(folder / "story.json")


def broken_promises(measured: dict[str, dict], lengths: dict[str, float]) -> list[str]:
    """One sentence for each promise that does not hold; measured: of `measure`, by test."""
    broken = []
    left = measured["fresh"]["calibrated"]["spearman"]
    if abs(left) > MOST_CORRELATION:
        broken.append(f"the rank correlation left is {left:+.3f}")
    if measured["balanced"]["calibrated"]["accuracy"] < measured["balanced"]["as it is"]["accuracy"]:
        broken.append("accuracy on length-balanced pairs falls")
    if abs(lengths["calibrated"] / lengths["sft"] - 1) > MOST_DRIFT:
        broken.append("the policy's length drifts all the same")
    if abs(lengths["plain"] / lengths["sft"] - 1) <= MOST_DRIFT:
        broken.append("without calibration nothing drifts: the comparison shows nothing")
    return broken


def main(args: Arguments) -> int:
    """Train, measure, print; 1 where a promise is broken."""
    demo_dir = Path(args.demo_dir).resolve()
    folder = Path(args.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    seed = load_run(demo_dir / "sft")["arguments"]["seed"]
    if not (folder / "balanced.jsonl").is_file():
        write_pairs(args, seed, folder)
    train_reward(demo_dir, folder, str(seed))
    measured = {name: measure(folder, name) for name in TESTS}
    story = train_policies(args, demo_dir, folder, str(seed))

    commit = (load_run(folder / "reward")["git_commit"] or "unknown")[:7]
    print(f"trained by commit {commit}, {platform.machine()}, {os.cpu_count()} cores, seed {seed}")
    print(f"{'':<56}{'as it is':>12}{'calibrated':>12}")
    titles = {"fresh": "500 fresh held-out pairs", "balanced": "500 length-balanced pairs"}
    for test, key in product(TESTS, ("spearman", "accuracy")):
        what = "rank correlation with length" if key == "spearman" else "accuracy"
        cells = "".join(f"{row[key]:>12.3f}" for row in measured[test].values())
        print(f"{f'{what}, {titles[test]}':<56}{cells}")
    ends = [run_["end"] for run_ in story["runs"].values()]
    lengths = {"sft": story["sft"]["tokens"], "plain": ends[0]["tokens"], "calibrated": ends[1]["tokens"]}
    print(f"{'tokens of an answer after PPO (SFT: ' + format(lengths['sft'], '.1f') + ')':<56}"
          f"{lengths['plain']:>12.1f}{lengths['calibrated']:>12.1f}")  # fmt: skip
    print(f"{'gold score after PPO (SFT: ' + format(story['sft']['gold'], '.3f') + ')':<56}"
          f"{ends[0]['gold']:>12.3f}{ends[1]['gold']:>12.3f}")  # fmt: skip
    broken = broken_promises(measured, lengths)
    print("\n".join(broken) if broken else "all promises kept")
    return min(len(broken), 1)


if __name__ == "__main__":
    sys.exit(main(parse(Arguments, None, __doc__)))
