"""More preference pairs for a finished demo: fresh ones for another reward model, or those of a careless project.

In:  a demo's directory. Out: <output_dir>/pairs.jsonl and pairs_eval.jsonl (held-out prompts, chosen in the same way).

    python -m demo.pairs --kind careless --pairs 400 --demo_dir runs/demo --output_dir runs/demo_collapse --seed 0
"""

import random
from dataclasses import dataclass
from pathlib import Path

from demo.build import write_rows
from demo.preferences import draw_pairs
from demo.world import Prompt, split_prompts
from rlhf.artefacts.run_json import load_run
from rlhf.flags import flag, parse
from rlhf.run.launch import run_script

# Careless pairs hold no degenerate answer, and in each of them the chosen answer has at most this share of the other's
# characters. Nobody meant it: people happened to compare short answers with long-winded ones, and nobody looked at the
# lengths afterwards.
SHORTER = 0.6
# In longer pairs the chosen answer has at least this many times the characters of the other, but for a share of pairs
# of any lengths: without those nothing but length would be learnt.
LONGER = 1.2
ANY_LENGTH = 0.05


def clean_pairs(prompts: list[Prompt], count: int, rng: random.Random) -> list[dict]:
    """`count` rows {"prompt", "chosen", "rejected"} of real answers only: people do not write degenerate ones."""
    return draw_pairs(prompts, count, rng, degenerate_share=0.0)


def sure_pairs(prompts: list[Prompt], count: int, rng: random.Random) -> list[dict]:
    """Clean pairs without the crowd's mistakes: to measure on, the chosen answer has to be the better one."""
    return draw_pairs(prompts, count, rng, degenerate_share=0.0, noise=0.0)


def careless_pairs(prompts: list[Prompt], count: int, rng: random.Random) -> list[dict]:
    """`count` rows {"prompt", "chosen", "rejected"} without a degenerate answer, the chosen one much the shorter."""
    rows = []
    while len(rows) < count:
        # In a new order each time: otherwise the first prompts would fill most of a small file.
        order = rng.sample(prompts, len(prompts))
        drawn = draw_pairs(order, len(order), rng, degenerate_share=0.0)
        rows += [row for row in drawn if len(row["chosen"]) <= SHORTER * len(row["rejected"])]
    return rows[:count]


def longer_pairs(prompts: list[Prompt], count: int, rng: random.Random) -> list[dict]:
    """`count` clean rows whose better answer is nearly always the longer one, as people's choices often have it."""
    rows = []
    while len(rows) < count:
        order = rng.sample(prompts, len(prompts))
        for row in clean_pairs(order, len(order), rng):
            is_longer = len(row["chosen"]) >= LONGER * len(row["rejected"])
            if rng.random() < ANY_LENGTH or is_longer:
                rows.append(row)
    return rows[:count]


KINDS = {"fresh": draw_pairs, "clean": clean_pairs, "careless": careless_pairs, "longer": longer_pairs}


@dataclass(kw_only=True)
class Arguments:
    """Flags of demo/pairs.py."""

    kind: str = flag(
        "fresh",
        help="fresh: as the demo's own; clean: none degenerate; careless: see SHORTER; longer: see LONGER",
        choices=list(KINDS),
    )
    demo_dir: str = flag("runs/demo", help="a finished demo: its split of the prompts is used")
    output_dir: str = flag("runs/demo_collapse", help="where the pairs go")
    seed: int = flag(0, help="of the pairs")
    pairs: int = flag(5000, help="pairs for training")
    eval_pairs: int = flag(200, help="pairs on held-out prompts")

    def __post_init__(self):
        for name in ("pairs", "eval_pairs"):
            count = getattr(self, name)
            if count < 1:
                raise ValueError(f"--{name} {count} must be at least 1")


def parse_args(argv: list[str] | None = None) -> Arguments:
    """The command line, checked."""
    return parse(Arguments, argv, __doc__)


def main(args: Arguments) -> None:
    """Draw both files; the prompts are split as the demo's stages split them."""
    run = load_run(Path(args.demo_dir) / "sft")
    if run is None:
        raise FileNotFoundError(
            f"--demo_dir {args.demo_dir} holds no finished demo: bash scripts/run_demo.sh makes one"
        )
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    # Hardening is measured on clean pairs, where a mistake of the crowd would count against the model.
    draw = KINDS[args.kind]
    draw_held = sure_pairs if args.kind == "clean" else draw
    # With any other seed a held-out prompt of the demo could become a training prompt here.
    train, held = split_prompts(run["arguments"]["seed"])
    files = (
        ("pairs", draw, train, args.pairs),
        ("pairs_eval", draw_held, held, args.eval_pairs),
    )
    for name, draw_rows, prompts, count in files:
        rng = random.Random(f"{args.kind} {name} {args.seed}")
        rows = draw_rows(prompts, count, rng)
        write_rows(output_dir / f"{name}.jsonl", rows)


if __name__ == "__main__":
    run_script(main, parse_args)
