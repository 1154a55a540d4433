"""Reward models by size of data: which learning rate, rank and number of epochs order held-out pairs best.

    python -m benchmarks.settings --model runs/demo/base --pairs 500 3000 20000 | tee benchmarks/results/settings.log

The pairs are the mini-world's (demo/preferences.py) with the crowd's 5 % of mistakes; the held-out pairs have none, so
that the best accuracy is 1. One setting at a time differs from the first of each list, which is trained at every size.
Any base will do that reads Chinese; a model of 135 million parameters takes minutes a setting on one core.
"""

import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import reward_modeling
from benchmarks.common import machine
from demo.build import write_rows
from demo.pairs import sure_pairs
from demo.preferences import draw_pairs
from demo.world import split_prompts
from rlhf.artefacts.files import read_object
from rlhf.flags import REQUIRED, flag, parse
from rlhf.reward.statistics import wilson
from rlhf.run.launch import silence_libraries


@dataclass(kw_only=True)
class Arguments:
    """Flags of benchmarks/settings.py."""

    model: str = flag(REQUIRED, help="directory of a base")
    pairs: list[int] = flag([500], help="sizes of the data, in pairs", nargs="+")
    learning_rates: list[float] = flag(
        [1e-3], help="learning rates; the first goes with every other setting", nargs="+"
    )
    ranks: list[int] = flag([16], help="ranks; the first goes with every other setting", nargs="+")
    epochs: list[float] = flag([1.0], help="epochs; the first goes with every other setting", nargs="+")
    held_out: int = flag(400, help="held-out pairs, without mistakes")
    batch: int = flag(16, help="pairs of an optimizer step")
    seed: int = flag(0, help="seed of pairs and training")


def settings(args: Arguments) -> list[tuple[float, int, float]]:
    """(learning rate, rank, epochs): each list in turn, with the first of the others."""
    rate, rank, epochs = args.learning_rates[0], args.ranks[0], args.epochs[0]
    made = [(other, rank, epochs) for other in args.learning_rates]
    made += [(rate, other, epochs) for other in args.ranks[1:]]
    return made + [(rate, rank, other) for other in args.epochs[1:]]


def measure(args: Arguments, folder: Path, pairs: int, rate: float, rank: int, epochs: float) -> str:
    """One reward model: a line of the table."""
    flags = {
        "model_name": args.model, "dataset_name": folder / f"pairs_{pairs}.jsonl", "lora_target_models": "all-linear",
        "eval_dataset_name": folder / "held_out.jsonl", "prompt_template": "问：{prompt}\n\n答：", "lora_rank": rank,
        "lora_alpha": 2 * rank, "lora_dropout": 0, "learning_rate": rate, "num_train_epochs": epochs,
        "max_length": 192, "per_device_train_batch_size": args.batch, "per_device_eval_batch_size": 32,
        "eval_steps": 0, "save_steps": 0, "logging_steps": 10000, "audit": False, "seed": args.seed,
        "overwrite_output_dir": True, "output_dir": folder / "out",
    }  # fmt: skip
    start = time.perf_counter()
    reward_modeling.main(reward_modeling.parse_args([word for pair in flags.items() for word in _words(*pair)]))
    seconds = time.perf_counter() - start

    metrics = read_object(folder / "out" / "run.json")["metrics"]
    accuracy, loss = metrics["eval_accuracy"], metrics["eval_loss"]
    low, high = wilson(accuracy, args.held_out)
    steps = -(-pairs // args.batch) * epochs
    cells = f"{pairs:>7,} {rate:>9g} {rank:>5} {epochs:>7g} {steps:>7.0f}"
    return f"{cells} {accuracy:>9.3f} [{low:.3f}, {high:.3f}] {loss:>7.3f} {seconds:>6.0f}"


def _words(name: str, value) -> tuple[str, str]:
    return f"--{name}", str(value)


def main(args: Arguments) -> None:
    """Make the pairs, train every setting at every size, print a line each."""
    silence_libraries()
    train, held = split_prompts(args.seed)
    lines = [f"{'pairs':>7} {'rate':>9} {'rank':>5} {'epochs':>7} {'steps':>7} {'accuracy':>9} {'95 % interval':<14} "
             f"{'loss':>7} {'s':>6}"]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "held_out.jsonl", sure_pairs(held, args.held_out, random.Random(f"sure {args.seed}")))
        for pairs in args.pairs:
            rows = draw_pairs(train, pairs, random.Random(f"pairs {args.seed}"), degenerate_share=0.0)
            write_rows(folder / f"pairs_{pairs}.jsonl", rows)
            for setting in settings(args):
                lines.append(measure(args, folder, pairs, *setting))
                print(f"RESULT {lines[-1]}", flush=True)
    print(machine(), f"model {args.model}", *lines, sep="\n", flush=True)


if __name__ == "__main__":
    main(parse(Arguments, None, __doc__))
