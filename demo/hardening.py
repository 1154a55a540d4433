"""What hardening does to a reward model: the same clean pairs with and without it, audited on held-out prompts.

In:  finished demos, one a seed. Out: <output_dir>/seed_<n>/{careless,hardened}, and the table on the screen.

    python -m demo.hardening --demo_dirs runs/thresholds/seed_0 runs/thresholds/seed_1 runs/thresholds/seed_2 \\
        --output_dir runs/hardening | tee demo/results/hardening.log
"""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rlhf.artefacts.run_json import load_run
from rlhf.flags import flag, parse
from rlhf.reward.degenerate import GATE_KINDS, KINDS

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = {"careless": [], "hardened": ["--degenerate_frac", "0.5"]}
# What a hardened reward model has to win against, as shares of prompts; the clean accuracy it may lose, in the mean.
GATE_WINS = 0.98
OTHER_WINS = 0.90
LOSS = 0.01
OTHERS = ("cut", "other_answer")


@dataclass(kw_only=True)
class Arguments:
    """Flags of demo/hardening.py."""

    demo_dirs: list[str] = flag(["runs/demo"], help="finished demos, whose bases are used", nargs="+")
    output_dir: str = flag("runs/hardening", help="where the pairs and reward models go; finished ones are kept")


def run(*command: str) -> None:
    """One stage, its words on stderr. Raises: CalledProcessError."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr, cwd=ROOT, env=environment)


def train(demo_dir: Path, folder: Path) -> dict[str, dict]:
    """run.json of both reward models of one demo, which are trained unless they are there already."""
    seed = str(load_run(demo_dir / "sft")["arguments"]["seed"])
    if not (folder / "pairs.jsonl").is_file():
        where = ["--demo_dir", str(demo_dir), "--output_dir", str(folder), "--seed", seed]
        run("-m", "demo.pairs", "--kind", "clean", *where, "--pairs", "10000", "--eval_pairs", "2000")

    for name, flags in VERSIONS.items():
        run(
            "reward_modeling.py", "--model_name", str(demo_dir / "base"), "--seed", seed,
            "--lora_target_models", "W_pack|o_proj|gate_proj|up_proj|down_proj", "--lora_rank", "16",
            "--lora_dropout", "0", "--max_length", "128", "--per_device_train_batch_size", "16",
            "--per_device_eval_batch_size", "64", "--learning_rate", "2e-3", "--eval_steps", "0", "--save_steps", "0",
            "--dataset_name", str(folder / "pairs.jsonl"), "--eval_dataset_name", str(folder / "pairs_eval.jsonl"),
            "--output_dir", str(folder / name), "--resume_from_checkpoint", "True", "--logging_steps", "100",
            "--audit_prompts", "400", *flags,
        )  # fmt: skip
    return {name: load_run(folder / name) for name in VERSIONS}


def table(found: list[dict[str, dict]], seeds: list[int]) -> tuple[str, list[str]]:
    """Clean accuracy and the share of prompts won against each attack, by version and seed; and broken promises."""
    header = [f"{name} {seed}" for name in VERSIONS for seed in seeds]
    lines = [f"{'':<26}" + "".join(f"{name:>13}" for name in header)]

    for kind in ("clean accuracy", *KINDS):
        key = "eval_accuracy" if kind == "clean accuracy" else f"audit/{kind}"
        values = [metrics[name].get(key) for name in VERSIONS for metrics in found]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"{kind + ' (gate)' * (kind in GATE_KINDS):<26}" + "".join(f"{cell:>13}" for cell in cells))

    loss = sum(m["careless"]["eval_accuracy"] - m["hardened"]["eval_accuracy"] for m in found) / len(found)
    broken = [
        f"{kind} wins too often"
        for kind, least in [(k, GATE_WINS) for k in GATE_KINDS] + [(k, OTHER_WINS) for k in OTHERS]
        if any(m["hardened"][f"audit/{kind}"] < least for m in found)
    ]
    broken += [f"clean accuracy falls by {loss:.3f}"] * (round(loss, 9) > LOSS)
    broken += ["a careless model passes on empty answers"] * any(m["careless"]["audit/empty"] >= 0.9 for m in found)
    return "\n".join([*lines, f"clean accuracy falls by {loss:+.4f} in the mean"]), broken


def main(args: Arguments) -> int:
    """Print the table; 1 where a promise is broken."""
    demos = [Path(folder).resolve() for folder in args.demo_dirs]
    found = [train(demo, Path(args.output_dir).resolve() / f"seed_{n}") for n, demo in enumerate(demos)]
    seeds = [records["hardened"]["arguments"]["seed"] for records in found]
    words, broken = table([{name: record["metrics"] for name, record in records.items()} for records in found], seeds)
    commits = {(record["git_commit"] or "unknown")[:7] for records in found for record in records.values()}
    print(f"trained by commit {', '.join(sorted(commits))}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(words)
    print("\n".join(broken) if broken else "all promises kept")
    return min(len(broken), 1)


if __name__ == "__main__":
    sys.exit(main(parse(Arguments, None, __doc__)))
