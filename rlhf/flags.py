"""Flags: how a field of a dataclass becomes a command line flag, and how --help shows it.

python -m rlhf.flags            writes docs/flags.md from the dataclasses of all scripts
"""

import copy
import dataclasses
import importlib
import math
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from transformers import HfArgumentParser

REQUIRED = dataclasses.MISSING
Arguments = TypeVar("Arguments")

# Headings of --help in this order; a script shows those that it has flags for.
GROUPS = (
    "required", "artefacts", "data", "prompts", "adapter", "sampling", "reward", "training", "update", "loss",
    "evaluation", "audit", "watch", "machine", "run",
)  # fmt: skip
METAVARS = {int: "N", float: "X", str: "TEXT", bool: "True|False"}
TRAINING_SCRIPTS = ("sft_training", "reward_modeling", "rl_training")
SCRIPTS = (*TRAINING_SCRIPTS, "merge_lora", "compare")


# ---- a flag ----
def flag(
    default: Any = REQUIRED,
    *,
    help: str,
    group: str = "run",
    aliases: list[str] | None = None,
    resume: str = "same",
    expert: bool = False,
    **kwargs,
):
    """A dataclass field that `parse` turns into a command line flag.

    Args:
        default: value when the flag is not given; without it the flag is required. A list is copied per instance.
        help, group: one sentence for `--help`, and the heading it stands under.
        aliases: other spellings, dashes included (old names are aliased for ever, never renamed).
        resume: what a resumed run may do with it (rlhf/artefacts/resume.py): "same" value; "free" to change, because
            the result does not depend on it; a "path", whose contents are compared instead; a length that may get
            "longer".
        expert: shown by `--help_all` only.
        kwargs: passed to `argparse.add_argument` (`choices`, `metavar`, ...).
    """
    metadata = {"help": help.replace("%", "%%"), "group": group, "resume": resume, "expert": expert, **kwargs}

    if aliases:
        metadata["aliases"] = aliases
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# No count is larger, and no sum of a few of them overflows.
MAX_COUNT = 2**31 - 1

# Rows, ranks and tokens at once: beyond this nothing fits anywhere.
MAX_SIZE = 10_000_000
SIZES = ("batch_size", "rank", "length", "new_tokens", "tokens", "epochs", "limit", "prompts", "accumulation_steps")


class Flags:
    """End of the chain of `super().__post_init__()`: each group of flags checks its own values, then the next."""

    def __post_init__(self):
        """Refuse numbers that no computation could use, in any flag. Raises: ValueError naming the flag."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                raise ValueError(f"--{field.name} {value} is no finite number")
            most = MAX_SIZE if field.name.endswith(SIZES) else MAX_COUNT
            # A seed may be any number of 32 bits.
            if field.name != "seed" and abs(value) > most:
                raise ValueError(f"--{field.name} {value:g} is out of range: {most:,} at most")


def resume_rules(cls: type) -> dict[str, str]:
    """Flag name -> its `resume` rule, for every field of a dataclass of flags."""
    return {field.name: field.metadata.get("resume", "same") for field in dataclasses.fields(cls)}


def at_least(args, minimum: float, *names: str) -> None:
    """Refuse the first of these flags whose value is below `minimum`. Raises: ValueError naming it."""
    for name in names:
        if getattr(args, name) < minimum:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least {minimum}")


# ---- the parser ----
class _HelpFormat(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """Help with the script's own lines first, then each flag once, with its default."""

    def _format_action_invocation(self, action):
        # Every flag also parses with dashes in its name; showing both would double the help.
        names = ", ".join(option for option in action.option_strings if "-" not in option[2:])
        if action.nargs == 0:
            return names
        return f"{names} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_help_string(self, action):
        # A default of None says nothing, and a new line in one (the template's) would be lost among the spaces.
        if action.default is None or action.default is SUPPRESS:
            return action.help
        if isinstance(action.default, str) and "\n" in action.default:
            return f"{action.help} (default: {repr(action.default).replace('%', '%%')})"
        return super()._get_help_string(action)


class _HelpAll(Action):
    """--help_all: --help with the flags that few people change."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest=SUPPRESS, default=SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        for action, full_help in parser.hidden.items():
            action.help = full_help
        parser.print_help()
        parser.exit()


def _metavar(hint: type) -> str:
    """Placeholder of a value in the help: N for a whole number, TEXT for text, whatever None or a list adds."""
    kinds = (hint, *getattr(hint, "__args__", ()))
    return next((METAVARS[kind] for kind in kinds if kind in METAVARS), "TEXT")


class _GroupedParser(HfArgumentParser):
    """HfArgumentParser whose help is grouped by the field's `group`, and hides the flags marked as `expert`."""

    def _add_dataclass_arguments(self, dtype):
        hints = get_type_hints(dtype)
        headings = {name: self.add_argument_group(name) for name in GROUPS}
        # Action -> its help, for --help_all.
        self.hidden: dict[Action, str] = {}
        for field in dataclasses.fields(dtype):
            self._add_field(field, hints[field.name], headings)

    def _add_field(self, field: dataclasses.Field, hint: type, headings: dict) -> None:
        """Add one field's flag under its heading."""
        field = copy.copy(field)
        field.type = hint
        metadata = dict(field.metadata)
        own = {name: metadata.pop(name, None) for name in ("group", "resume", "expert")}
        field.metadata = metadata

        required = field.default is REQUIRED and field.default_factory is REQUIRED
        count = len(self._actions)
        self._parse_dataclass_field(headings["required" if required else own["group"] or "run"], field)
        for action in self._actions[count:]:
            # The parser adds a `--no_x` beside each default-True bool; it still parses, but would double the help.
            if action.option_strings[0].startswith("--no_"):
                action.help = SUPPRESS
                continue
            if not action.choices and not action.metavar:
                action.metavar = _metavar(hint)
            if own["expert"]:
                self.hidden[action] = action.help
                action.help = SUPPRESS


def build_parser(cls: type, description: str) -> HfArgumentParser:
    """The parser of a dataclass of `flag` fields; `description` is printed as it stands at the top of `--help`."""
    parser = _GroupedParser(cls, description=description, allow_abbrev=False, formatter_class=_HelpFormat)
    if parser.hidden:
        more = f"show all flags, also the {len(parser.hidden)} that few people change, and exit"
        parser.add_argument("--help_all", "--help-all", action=_HelpAll, help=more)
    # Sixty flags as usage would push the wrong value or the description off the screen: the required ones are enough.
    required = [f"{action.option_strings[0]} ..." for action in parser._actions if action.required]
    parser.usage = " ".join(["%(prog)s", *required, "[other flags: see --help]"])
    return parser


def parse(cls: type[Arguments], argv: list[str] | None, description: str) -> Arguments:
    """Parse a command line into `cls`; a wrong value ends the program with the usage and exit code 2.

    Args:
        cls: dataclass of `flag` fields; its `__post_init__` raises ValueError on bad values or combinations.
        argv: arguments without the program's name; None reads sys.argv.
        description: first lines of `--help`.
    """
    parser = build_parser(cls, description)
    namespace = parser.parse_args(argv)
    try:
        return cls(**vars(namespace))
    except ValueError as error:
        parser.error(str(error))


# ---- docs/flags.md ----
def _rows(script: str) -> dict[str, tuple[str, str]]:
    """Flag name -> (default as the table shows it, help) of one script."""
    rows = {}
    for field in dataclasses.fields(importlib.import_module(script).ScriptArguments):
        required = field.default is REQUIRED and field.default_factory is REQUIRED
        shown = "required" if required else ""
        if field.default not in (REQUIRED, None):
            shown = f"`{field.default}`".replace("\n", "\\n")
        meaning = field.metadata["help"].replace("%%", "%").replace("|", "\\|")
        rows[field.name] = (shown, meaning)
    return rows


def sections() -> list[tuple[tuple[str, ...], dict[str, tuple[str, str]]]]:
    """(scripts, rows) of each table: flags that stages have in common with one default and help stand once."""
    rest = {script: _rows(script) for script in SCRIPTS}
    tables = []
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


if __name__ == "__main__":
    target = Path(__file__).resolve().parents[1] / "docs" / "flags.md"
    target.write_text(flags_page(), encoding="utf-8")
    print(f"written: {target}")
