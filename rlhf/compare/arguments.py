"""Flags that compare.py and playground.py share: the versions, and the prompts to begin with."""

import re
from pathlib import Path

# Name of the column of the bare base, and of the version without an adapter.
BASE = "base"

# One of each kind that shows a change of style: a translation, small talk, health, mood, an explanation.
DEFAULT_PROMPTS = [
    "帮我把“今晚的月亮真圆”翻译成英文",
    "你今天过得怎么样？",
    "天天坐办公室，怎样才能少生病？",
    "最近压力好大，晚上睡不着怎么办？",
    "用一两句话说说什么是大语言模型",
]

# A weight and a directory of a sum of adapters: 0.4*runs/sft.
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
TERM = re.compile(rf"({NUMBER})\*(.+?)(?=[+-](?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?\*|$)")

# Shares of the second adapter at the points of --slide.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def named_adapters(specs: list[str], include_base: bool) -> dict[str, str | None]:
    """Column name -> adapter directory or sum of some, None for the bare base.

    Raises: ValueError for a bad or repeated name.
    """
    versions: dict[str, str | None] = {BASE: None} if include_base else {}

    for spec in specs:
        name, equals, folder = spec.partition("=")
        if not equals or not folder or not re.fullmatch(r"[\w.()-]+", name):
            raise ValueError(f"--adapters {spec}: write NAME=DIR, the name without spaces, e.g. sft=runs/sft")
        if name in versions or name == BASE:
            raise ValueError(f"--adapters names {name} twice ({BASE} is the bare base): give each column its own name")
        versions[name] = folder

    if not versions:
        raise ValueError("nothing to compare: give --adapters NAME=DIR, or leave --include_base at True")
    return versions


def terms_of(value: str) -> list[tuple[float, str]]:
    """(weight, directory) of each adapter of a column: of 0.4*runs/sft+0.6*runs/ppo, or of one directory, weight 1."""
    terms = list(TERM.finditer(value))
    # What only looks like a sum may be the name of a directory.
    if not terms or "".join(term[0] for term in terms) != value or Path(value).exists():
        return [(1.0, value)]
    return [(float(term[1]), term[2]) for term in terms]


def slide_versions(first: str, second: str) -> dict[str, str]:
    """The columns of --slide: from the first adapter to the second, by the second's share."""
    versions = {}
    for share in SHARES:
        # At either end the adapter itself, as it was trained.
        ends = {0.0: first, 1.0: second}
        versions[f"slide_{share:.2f}"] = ends.get(share, f"{1 - share:g}*{first}+{share:g}*{second}")
    return versions


def check_best_of(args) -> None:
    """Refuse --best_of where nothing could choose, or all answers would be one. Raises: ValueError."""
    if args.best_of < 0 or args.best_of == 1:
        raise ValueError(f"--best_of {args.best_of} must be at least 2, or 0 for none")
    if args.best_of and not args.reward_model_lora_path:
        raise ValueError("--best_of needs a reward model that chooses: give --reward_model_lora_path")
    if args.best_of and not args.do_sample:
        raise ValueError("--best_of compares several answers to one prompt: greedy decoding has only one")
