"""Flags: how a dataclass field becomes one, and the flags every training stage shares."""

import copy
import dataclasses
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass
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


@dataclass(kw_only=True)
class CommonArguments:
    """Flags that mean the same in every training stage."""

    # ---- artefacts ----
    output_dir: str = flag("runs/", help="where the adapter, run.json and metrics.jsonl go", group="artefacts")
    overwrite_output_dir: bool = flag(False, help="clear what an earlier run left in output_dir", group="artefacts")
    resume_from_checkpoint: str | None = flag(
        None,
        help="True: go on from the newest complete checkpoint in output_dir, or start fresh; or the path of one",
        group="artefacts",
    )
    allow_changes: bool = flag(
        False,
        help="resume although flags, data or processes differ, and the rest is not exact",
        group="artefacts",
    )
    save_total_limit: int | None = flag(None, help="checkpoints to keep; none: all", group="artefacts")
    tokenizer_name: str | None = flag(None, help="tokenizer directory or hub id, if not the base's", group="artefacts")
    # ---- machine ----
    bf16: bool = flag(True, help="bfloat16 weights; fp16 on a card without it, float32 on a CPU", group="machine")
    load_in_4bit: bool = flag(
        False,
        help="hold the base's matrices in 4 bits (NF4); needs bitsandbytes",
        group="machine",
    )
    gradient_checkpointing: bool = flag(False, help="recompute activations in backward: less memory", group="machine")
    nproc: int = flag(0, help="processes to start; 0 means one for each visible GPU, one on a CPU", group="machine")
    local_rank: int = flag(
        -1, help="set by launchers; LOCAL_RANK is what counts", group="machine", aliases=["--local-rank"]
    )
    # ---- run ----
    seed: int = flag(0, help="everything random starts here")
    log_with: str | None = flag(None, help="tracker beside metrics.jsonl: wandb or tensorboard")
    on_non_finite: str = flag(
        "stop",
        help="when a loss, gradient or score is not finite: stop, or skip that step, unlearnt, and count it",
        choices=["stop", "skip"],
    )
    inspect_data: bool = flag(False, help="print the data funnel and three rendered rows, then exit")
    plan: bool = flag(
        False, help="print parameters, memory, steps and the cards that fit, from the configuration alone, then exit"
    )

    def __post_init__(self):
        if self.resume_from_checkpoint in ("False", "false", "None", ""):
            self.resume_from_checkpoint = None
        if self.resume_from_checkpoint in ("true", "1"):
            self.resume_from_checkpoint = "True"
        if self.log_with in ("none", "None", ""):
            self.log_with = None
        if self.log_with not in (None, "wandb", "tensorboard"):
            raise ValueError(f"--log_with {self.log_with} is unknown: use wandb or tensorboard, or leave it out")
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError("--overwrite_output_dir and --resume_from_checkpoint contradict each other: give one")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ValueError(f"--save_total_limit {self.save_total_limit} must be at least 1, or be left out")
        if self.nproc < 0:
            raise ValueError(f"--nproc {self.nproc} is negative: give the number of processes, or 0 to have it found")


@dataclass(kw_only=True)
class LoraArguments:
    """Shape of a new adapter. The defaults are those of the SFT stage; others override them."""

    lora_rank: int = flag(8, help="rank r of the adapter", group="adapter", aliases=["--lora_r"])
    lora_alpha: float = flag(32, help="the update is scaled by alpha / r", group="adapter")
    lora_dropout: float = flag(0.1, help="dropout on the adapter's input while training", group="adapter")
    lora_target_models: str | None = flag(
        None,
        help="modules that get an adapter, as 'a|b' (W_pack on Baichuan); by default the attention projections",
        group="adapter",
        aliases=["--lora_target_modules"],
    )

    def __post_init__(self):
        if self.lora_rank < 1:
            raise ValueError(f"--lora_rank {self.lora_rank} must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout {self.lora_dropout} must be in [0, 1)")
