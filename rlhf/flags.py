"""Flags: how a field of a dataclass becomes a command line flag, and how --help shows it."""

import copy
import dataclasses
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from typing import Any, TypeVar, get_type_hints

from transformers import HfArgumentParser

REQUIRED = dataclasses.MISSING

Arguments = TypeVar("Arguments")


def flag(default: Any = REQUIRED, *, help: str, group: str = "run", aliases: list[str] | None = None, **kwargs):
    """A dataclass field that `parse` turns into a command line flag.

    Args:
        default: value when the flag is not given; without it the flag is required. A list is copied per instance.
        help, group: one phrase for `--help`, and the heading it stands under.
        aliases: other spellings, dashes included (old names are aliased for ever, never renamed).
        kwargs: passed to `argparse.add_argument` (`choices`, `metavar`, ...).
    """
    metadata = {"help": help.replace("%", "%%"), "group": group, **kwargs}
    if aliases:
        metadata["aliases"] = aliases
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _HelpFormat(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """The script's own lines first, then each flag with its default."""

    def _format_action_invocation(self, action):
        # Every flag also parses with dashes in its name; showing both would double the help.
        shown = copy.copy(action)
        shown.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action):
        # No default is worth no words, and a new line in one (the template's) would be lost among the spaces.
        if action.default is None:
            return action.help
        if isinstance(action.default, str) and "\n" in action.default:
            return f"{action.help} (default: {repr(action.default).replace('%', '%%')})"
        return super()._get_help_string(action)


class _GroupedParser(HfArgumentParser):
    """HfArgumentParser whose `--help` is grouped by the field's `group`, not by its dataclass."""

    def _add_dataclass_arguments(self, dtype):
        hints, groups = get_type_hints(dtype), {}
        for field in dataclasses.fields(dtype):
            field = copy.copy(field)
            field.type = hints[field.name]
            name = field.metadata.get("group", "run")
            field.metadata = {key: value for key, value in field.metadata.items() if key != "group"}
            if name not in groups:
                groups[name] = self.add_argument_group(name)
            self._parse_dataclass_field(groups[name], field)
        for action in self._actions:
            # The parser adds a `--no_x` beside each default-True bool; it still parses, but would double the help.
            if any(option.startswith("--no_") for option in action.option_strings):
                action.help = SUPPRESS


def build_parser(cls: type, description: str) -> HfArgumentParser:
    """The parser of a dataclass of `flag` fields; `description` is printed as it stands at the top of `--help`."""
    parser = _GroupedParser(cls, description=description, allow_abbrev=False, formatter_class=_HelpFormat)
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


def at_least(args, least: float, *names: str) -> None:
    """Raises: ValueError naming the first of these flags whose value is below `least`."""
    for name in names:
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least {least}")
