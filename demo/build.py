"""Build the demo's world on disk: a tiny native Baichuan that has read about it, and the data of every stage.

The base of seed 0 ships with the project (demo/shipped_base); that of any other seed is pretrained here, because
another seed holds out other prompts, which the shipped base has read.

In:  a seed.
Out: <output_dir>/base (model and tokenizer) and <output_dir>/data: sft.jsonl and preferences.jsonl with their _eval
     files, prompts.jsonl for PPO, heldout.jsonl (prompts no stage trains on), compare.txt (one of each kind).

    python -m demo.build --output_dir runs/demo --seed 0
"""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from demo.base import PAGES, build_base, copy_shipped, shipped_for
from demo.facts import KINDS
from demo.preferences import DEGENERATE_SHARE, draw_pairs
from demo.world import Prompt, answer, split_prompts
from rlhf.flags import flag, parse
from rlhf.run.launch import run_script

# Nobody writes a thousand answers in one voice: share of SFT answers with something of another voice in them.
SLIPS = 0.05


@dataclass(kw_only=True)
class Arguments:
    """Flags of demo/build.py."""

    output_dir: str = flag("runs/demo", help="where base/ and data/ go; both are replaced")
    seed: int = flag(0, help="everything random starts here")
    base_pages: int = flag(PAGES, help="questions with an answer that the base reads in pretraining")
    build_base: bool = flag(False, help="pretrain the base even where the shipped one would do")
    shipped_base: bool = flag(False, help="take the shipped base for any seed, for a run whose figures do not count")
    sft_rows: int = flag(1500, help="formal answers for SFT")
    pairs: int = flag(13000, help="preference pairs, a half for each of two reward models")
    eval_pairs: int = flag(600, help="preference pairs on held-out prompts")
    degenerate_share: float = flag(DEGENERATE_SHARE, help="share of pairs with a degenerate answer on one side")

    def __post_init__(self):
        # No stage can train on an empty file, and the error of that stage would name another flag.
        for name in ("base_pages", "sft_rows", "pairs", "eval_pairs"):
            count = getattr(self, name)
            if count < 1:
                raise ValueError(f"--{name} {count} must be at least 1")
        if not 0 <= self.degenerate_share <= 1:
            raise ValueError(f"--degenerate_share {self.degenerate_share} must be between 0 and 1")


def parse_args(argv: list[str] | None = None) -> Arguments:
    """The command line, checked."""
    return parse(Arguments, argv, __doc__)


def sft_rows(prompts: list[Prompt], count: int, rng: random.Random) -> list[dict]:
    """`count` SFT rows {"prompt", "answer"}, the prompts in turn: all right, and formal but for the odd slip."""
    rows = []
    for number in range(count):
        prompt = prompts[number % len(prompts)]
        voice = "mixed" if rng.random() < SLIPS else "formal"
        text = answer(prompt.fact, voice, rng)
        rows.append({"prompt": prompt.text, "answer": text})
    return rows


def one_of_each_kind(prompts: list[Prompt]) -> list[Prompt]:
    """The first prompt of every kind, for the comparison table."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.fact.kind, prompt)
    return [first[kind] for kind in KINDS]


def write_rows(file: Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")
    print(f"{file}: {len(rows)} rows", flush=True)


def write_data(args: Arguments, train: list[Prompt], held: list[Prompt], directory: Path) -> None:
    """Every file of <output_dir>/data; each has a random source of its own, so one size changes no other file."""
    directory.mkdir(parents=True, exist_ok=True)
    names = ("sft", "sft_eval", "pairs", "pairs_eval")
    sources = {name: random.Random(f"{name} {args.seed}") for name in names}

    # SFT: the evaluation rows ask each held-out prompt once; no more of them than there are rows to train on.
    answers = sft_rows(train, args.sft_rows, sources["sft"])
    write_rows(directory / "sft.jsonl", answers)
    answers = sft_rows(held, min(len(held), args.sft_rows), sources["sft_eval"])
    write_rows(directory / "sft_eval.jsonl", answers)

    # Reward model: the held-out pairs keep the usual share of degenerate answers, whatever training gets, so that
    # accuracies of different runs can be compared.
    pairs = draw_pairs(train, args.pairs, sources["pairs"], args.degenerate_share)
    write_rows(directory / "preferences.jsonl", pairs)
    pairs = draw_pairs(held, args.eval_pairs, sources["pairs_eval"])
    write_rows(directory / "preferences_eval.jsonl", pairs)

    # PPO and whatever looks at its results need no answers.
    write_rows(directory / "prompts.jsonl", [{"prompt": prompt.text} for prompt in train])
    write_rows(directory / "heldout.jsonl", [{"prompt": prompt.text} for prompt in held])
    shown = "".join(f"{prompt.text}\n" for prompt in one_of_each_kind(held))
    (directory / "compare.txt").write_text(shown, encoding="utf-8")


def main(args: Arguments) -> None:
    """Split the prompts, write the data, copy or pretrain the base."""
    output_dir = Path(args.output_dir)
    train, held = split_prompts(args.seed)

    # Files that an earlier build left beside the new ones would be read as if they belonged to it.
    for part in ("data", "base"):
        shutil.rmtree(output_dir / part, ignore_errors=True)

    write_data(args, train, held, output_dir / "data")
    if not args.build_base and (args.shipped_base or shipped_for(args.seed)):
        copy_shipped(output_dir / "base")
    else:
        build_base(train, args.base_pages, args.seed, output_dir / "base")
    print(f"base model in {output_dir / 'base'}, data in {output_dir / 'data'}", flush=True)


if __name__ == "__main__":
    run_script(main, parse_args)
