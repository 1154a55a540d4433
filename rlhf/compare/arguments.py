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
