"""Flags of compare.py: the columns of the table."""

import re

# Name of the column of the bare base, and of the version without an adapter.
BASE = "base"


def named_adapters(specs: list[str], include_base: bool) -> dict[str, str | None]:
    """Column name -> adapter directory, None for the bare base. Raises: ValueError for a bad or repeated name."""
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


def check_best_of(args) -> None:
    """Refuse --best_of where nothing could choose, or all answers would be one. Raises: ValueError."""
    if args.best_of < 0 or args.best_of == 1:
        raise ValueError(f"--best_of {args.best_of} must be at least 2, or 0 for none")
    if args.best_of and not args.reward_model_lora_path:
        raise ValueError("--best_of needs a reward model that chooses: give --reward_model_lora_path")
    if args.best_of and not args.do_sample:
        raise ValueError("--best_of compares several answers to one prompt: greedy decoding has only one")
