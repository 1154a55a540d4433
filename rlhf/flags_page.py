"""docs/flags.md: a table of the flags of all scripts, made from their dataclasses by `python -m rlhf.flags`."""

import dataclasses
import importlib
from pathlib import Path

from rlhf.flags import REQUIRED

TRAINING_SCRIPTS = ("sft_training", "reward_modeling", "rl_training")
SCRIPTS = (*TRAINING_SCRIPTS, "merge_lora", "compare", "playground")


def _rows(script: str) -> dict[str, tuple[str, str]]:
    """Flag name -> (default as the table shows it, help) of one script."""
    rows = {}
    # Importing a script does nothing but define, so that its flags can be read without running it.
    for field in dataclasses.fields(importlib.import_module(script).ScriptArguments):
        required = field.default is REQUIRED and field.default_factory is REQUIRED
        shown = "required" if required else ""
        if field.default not in (REQUIRED, None):
            # A new line would end the row of the table.
            shown = f"`{field.default}`".replace("\n", "\\n")
        # A bar would end the cell of the table, and `%%` is argparse's way to write one percent sign.
        meaning = field.metadata["help"].replace("%%", "%").replace("|", "\\|")
        rows[field.name] = (shown, meaning)
    return rows


def sections() -> list[tuple[tuple[str, ...], dict[str, tuple[str, str]]]]:
    """(scripts, rows) of each table: flags that stages have in common with one default and help stand once."""
    rest = {script: _rows(script) for script in SCRIPTS}
    tables = []
    # From the widest group to single scripts: what an earlier table has shown is taken out of the later ones.
    for scripts in (TRAINING_SCRIPTS, TRAINING_SCRIPTS[:2], *((script,) for script in SCRIPTS)):
        first = rest[scripts[0]]
        shared = {name: row for name, row in first.items() if all(rest[other].get(name) == row for other in scripts)}
        tables.append((scripts, shared))
        for script in scripts:
            rest[script] = {name: row for name, row in rest[script].items() if name not in shared}
    return tables


def flags_page() -> str:
    """The text of docs/flags.md."""
    # 1. The head.
    lines = [
        "# Flags",
        "",
        "Every flag of every script, with its default. `python -m rlhf.flags` makes this page from the scripts.",
        "Switches take `True` or `False`. `--help` shows the flags that people change, `--help_all` shows all.",
    ]

    # 2. A table for each group of scripts.
    for scripts, rows in sections():
        names = " ".join(f"{script}.py" for script in scripts)
        title = "All three training stages" if scripts == TRAINING_SCRIPTS else " and ".join(names.split())
        lines += [
            "",
            f"## {title}",
            "",
            f"<!-- flags: {names} -->",
            "",
            "| flag | default | meaning |",
            "|---|---|---|",
        ]
        lines += [f"| `--{name}` | {default} | {meaning} |" for name, (default, meaning) in rows.items()]
    return "\n".join(lines) + "\n"


def write_page() -> None:
    """Write docs/flags.md."""
    target = Path(__file__).resolve().parents[1] / "docs" / "flags.md"
    target.write_text(flags_page(), encoding="utf-8")
    print(f"written: {target}")
