"""The effect of hardening on a reward model: the same clean pairs with and without it, audited on held-out prompts.

In:  finished demos, one a seed. Out: <output_dir>/seed_<n>/{careless,hardened}, and the table on the screen.

    python -m demo.hardening --demo_dirs runs/thresholds/seed_0 runs/thresholds/seed_1 runs/thresholds/seed_2 \\
        --output_dir runs/hardening | tee demo/results/hardening.log
"""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

from rlhf.artefacts.run_json import load_run
from rlhf.flags import flag, parse
from rlhf.reward.degenerate import GATE_KINDS, KINDS

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = {"careless": [], "hardened": ["--degenerate_frac", "0.5"]}
# Share of prompts on which a hardened reward model has to prefer the real answer to each kind of degenerate one: to
# the kinds that the gate of PPO checks, and to the others that are promised.
GATE_WINS = 0.98
OTHER_WINS = 0.90
# Clean accuracy that hardening may cost, in the mean over the seeds.
LOSS = 0.01
OTHERS = ("cut", "other_answer")


@dataclass(kw_only=True)
class Arguments:
    """Flags of demo/hardening.py."""

    demo_dirs: list[str] = flag(["runs/demo"], help="finished demos, whose bases are used", nargs="+")
    output_dir: str = flag("runs/hardening", help="where the pairs and reward models go; finished ones are kept")


def run(*command: str) -> None:
    """One stage, its words on stderr. Raises: CalledProcessError."""
    # The models are far too small for a GPU, and nothing is fetched from a hub.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr, cwd=ROOT, env=environment)


def train(demo_dir: Path, folder: Path) -> dict[str, dict]:
    """run.json of both reward models of one demo, which are trained unless they are there already."""
    seed = str(load_run(demo_dir / "sft")["arguments"]["seed"])
    if not (folder / "pairs.jsonl").is_file():
        where = ["--demo_dir", str(demo_dir), "--output_dir", str(folder), "--seed", seed]
        run("-m", "demo.pairs", "--kind", "clean", *where, "--pairs", "10000", "--eval_pairs", "2000")

    # A finished model is left as it is, because its stage is told to resume.
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


def table(runs: list[dict[str, dict]], seeds: list[int]) -> tuple[str, list[str]]:
    """Clean accuracy and the share of prompts won against each attack, by version and seed; and broken promises.

    Args:
        runs: version -> metrics, once a seed.
    """
    columns = list(product(VERSIONS, range(len(runs))))
    header = [f"{name} {seed}" for name, seed in product(VERSIONS, seeds)]
    lines = [f"{'':<26}" + "".join(f"{name:>13}" for name in header)]

    for kind in ("clean accuracy", *KINDS):
        key = "eval_accuracy" if kind == "clean accuracy" else f"audit/{kind}"
        values = [runs[number][name].get(key) for name, number in columns]
        # A kind that came after a model was trained is missing in its run.json.
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        title = f"{kind} (gate)" if kind in GATE_KINDS else kind
        lines.append(f"{title:<26}" + "".join(f"{cell:>13}" for cell in cells))

    losses = [metrics["careless"]["eval_accuracy"] - metrics["hardened"]["eval_accuracy"] for metrics in runs]
    loss = sum(losses) / len(runs)
    lines.append(f"clean accuracy falls by {loss:+.4f} in the mean")
    return "\n".join(lines), broken_promises(runs, loss)


def broken_promises(runs: list[dict[str, dict]], loss: float) -> list[str]:
    """One sentence for each promise that does not hold on every seed; loss: of clean accuracy, in the mean."""
    broken = []
    promised = {kind: GATE_WINS for kind in GATE_KINDS} | {kind: OTHER_WINS for kind in OTHERS}
    for kind, least in promised.items():
        if any(metrics["hardened"][f"audit/{kind}"] < least for metrics in runs):
            broken.append(f"{kind} wins too often")

    # Rounded, because a loss of exactly the limit is a little more than it in binary.
    if round(loss, 9) > LOSS:
        broken.append(f"clean accuracy falls by {loss:.3f}")
    # Where the careless model withstands the attack already, the comparison shows nothing.
    if any(metrics["careless"]["audit/empty"] >= 0.9 for metrics in runs):
        broken.append("a careless model passes on empty answers")
    return broken


def main(args: Arguments) -> int:
    """Print the table; 1 where a promise is broken."""
    output_dir = Path(args.output_dir).resolve()
    demos = [Path(folder).resolve() for folder in args.demo_dirs]
    trained = [train(demo, output_dir / f"seed_{number}") for number, demo in enumerate(demos)]

    seeds = [records["hardened"]["arguments"]["seed"] for records in trained]
    metrics = [{name: record["metrics"] for name, record in records.items()} for records in trained]
    words, broken = table(metrics, seeds)

    # Models of an earlier call may have been trained by another commit than those of this one.
    commits = set()
    for record in chain.from_iterable(records.values() for records in trained):
        commits.add((record["git_commit"] or "unknown")[:7])
    print(f"trained by commit {', '.join(sorted(commits))}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(words)
    print("\n".join(broken) if broken else "all promises kept")
    return min(len(broken), 1)


if __name__ == "__main__":
    sys.exit(main(parse(Arguments, None, __doc__)))
