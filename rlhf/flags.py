"""Flags: how a field of a dataclass becomes a command line flag, and how --help shows it.

Standard library alone: a wrong command line is refused before any library that takes seconds to load.

python -m rlhf.flags            writes docs/flags.md from the dataclasses of all scripts
"""

import dataclasses
import math
import sys
from argparse import (
    SUPPRESS,
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    ArgumentTypeError,
    RawDescriptionHelpFormatter,
)
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

REQUIRED = dataclasses.MISSING
Arguments = TypeVar("Arguments")

# Headings of --help in this order; a script shows those that it has flags for.
GROUPS = (
    "required", "artefacts", "data", "prompts", "adapter", "sampling", "reward", "training", "update", "loss",
    "evaluation", "audit", "watch", "machine", "run",
)  # fmt: skip
METAVARS = {int: "N", float: "X", str: "TEXT", bool: "True|False"}


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
    # argparse formats a help text with %, and a bare percent sign would end --help in a traceback.
    metadata = {"help": help.replace("%", "%%"), "group": group, "resume": resume, "expert": expert, **kwargs}

    if aliases:
        metadata["aliases"] = aliases
    if isinstance(default, list):
        # One list for all instances would carry a change from one to the next, so dataclasses refuse it.
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
            # In Python True and False are integers.
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
    """Refuse the first of these flags whose value is below `minimum` (None is none). Raises: ValueError naming it."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise ValueError(f"--{name} {value} must be at least {minimum}")


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


def _boolean(text: str) -> bool:
    """The value of a switch. Raises: ArgumentTypeError for any other word."""
    for value, words in ((True, "yes true t y 1"), (False, "no false f n 0")):
        # argparse's own type=bool would take every word for True, "False" among them.
        if text.lower() in words.split():
            return value
    raise ArgumentTypeError(f"{text!r} is neither True nor False")


def _value_settings(field: dataclasses.Field, hint: Any) -> dict:
    """What `argparse.add_argument` has to know of a flag's value: its type, its default, how many words it takes."""
    # `float | None` and `list[str]` name their kind among their arguments.
    kinds = getattr(hint, "__args__", (hint,))
    kind = next(kind for kind in kinds if kind in METAVARS)
    settings = {"type": _boolean if kind is bool else kind, "metavar": METAVARS[kind]}

    if field.default is not REQUIRED:
        settings["default"] = field.default
    elif field.default_factory is not REQUIRED:
        settings["default"] = field.default_factory()
    else:
        settings["required"] = True

    if getattr(hint, "__origin__", None) is list:
        settings["nargs"] = "+"
    # A switch may stand alone; one that may also be None says which with a word.
    if hint is bool:
        settings |= {"nargs": "?", "const": True}
    return settings


class _GroupedParser(ArgumentParser):
    """Parser of a dataclass of `flag` fields: its help grouped by `group`, without the flags marked as `expert`."""

    def __init__(self, cls: type, **settings):
        # An abbreviation that is unique today may not be so after the next new flag: old commands have to parse for
        # ever.
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormat, **settings)
        hints = get_type_hints(cls)
        headings = {name: self.add_argument_group(name) for name in GROUPS}
        # Action -> its help, for --help_all.
        self.hidden: dict[Action, str] = {}
        for field in dataclasses.fields(cls):
            self._add_field(field, hints[field.name], headings)

    def _add_field(self, field: dataclasses.Field, hint: Any, headings: dict) -> None:
        """Add one field's flag under its heading; every name parses with dashes as well."""
        own = {name: field.metadata.get(name) for name in ("group", "expert", "aliases")}
        given = {name: value for name, value in field.metadata.items() if name not in (*own, "resume")}
        settings = _value_settings(field, hint) | given
        # Without a metavar argparse lists the choices.
        if "choices" in given and "metavar" not in given:
            del settings["metavar"]
        heading = headings["required" if settings.get("required") else own["group"] or "run"]
        # A name without an underscore is the same with dashes, and stands once.
        names = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}", *(own["aliases"] or [])])
        action = heading.add_argument(*names, **settings)
        if own["expert"]:
            self.hidden[action] = action.help
            # Hidden from --help alone; the flag itself parses like any other.
            action.help = SUPPRESS

        # A switch that is on can be put out by --no_x as well.
        if hint is bool and field.default is True:
            # Its own default counts for nothing: argparse takes that of the first flag of a `dest`.
            off = (f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}")
            heading.add_argument(*off, action="store_false", dest=field.name, default=False, help=SUPPRESS)

    def refuse_unknown(self, words: list[str]) -> None:
        """End the program at a flag that is none of these, with the nearest one: before what the others lack."""
        for word in words:
            name = word.partition("=")[0]
            # What follows a bare -- , and what holds a space, is a value.
            if name == "--":
                return
            if not name.startswith("--") or " " in word or name in self._option_string_actions:
                continue
            known = [option for option in self._option_string_actions if "-" not in option[2:]]
            # Compared with underscores throughout, and with the two dashes in front put back.
            near = get_close_matches(name.replace("-", "_").replace("__", "--", 1), known, n=1)
            self.error(f"unrecognized arguments: {name}; {f'did you mean {near[0]}?' if near else 'see --help'}")


def build_parser(cls: type, description: str | None) -> _GroupedParser:
    """The parser of a dataclass of `flag` fields; `description` is printed as it stands at the top of `--help`."""
    parser = _GroupedParser(cls, description=description)
    if parser.hidden:
        more = f"show all flags, also the {len(parser.hidden)} that few people change, and exit"
        parser.add_argument("--help_all", "--help-all", action=_HelpAll, help=more)
    # Sixty flags as usage would push the wrong value or the description off the screen: the required ones are enough.
    required = [f"{action.option_strings[0]} ..." for action in parser._actions if action.required]
    parser.usage = " ".join(["%(prog)s", *required, "[other flags: see --help]"])
    return parser


def parse(cls: type[Arguments], argv: list[str] | None, description: str | None) -> Arguments:
    """Parse a command line into `cls`; a wrong value ends the program with the usage and exit code 2.

    Args:
        cls: dataclass of `flag` fields; its `__post_init__` raises ValueError on bad values or combinations.
        argv: arguments without the program's name; None reads sys.argv.
        description: first lines of `--help`.
    """
    parser = build_parser(cls, description)
    words = sys.argv[1:] if argv is None else argv
    # Before argparse, whose own complaint would be the missing required flags, and the mistyped one may be among them.
    parser.refuse_unknown(words)
    namespace = parser.parse_args(words)
    try:
        # Combinations are refused by the dataclass, whoever makes one: a test or another script needs no command line.
        return cls(**vars(namespace))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    # It reads the scripts, and they read this file.
    from rlhf.flags_page import write_page

    write_page()
