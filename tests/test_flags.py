"""Flags: help that people can read, rules of resuming at the flags themselves, docs/flags.md made from both."""

import dataclasses
import importlib
import re
from pathlib import Path
from typing import get_type_hints

import pytest
from transformers import HfArgumentParser, SchedulerType
from transformers.training_args import OptimizerNames

from rlhf.arguments import OPTIMIZERS, SCHEDULES
from rlhf.flags import build_parser, flag, parse, resume_rules
from rlhf.flags_page import SCRIPTS, flags_page

ROOT = Path(__file__).resolve().parents[1]
TRAINING = ("sft_training", "reward_modeling", "rl_training")
# What a resumed run may change, by name: the rules stand at the flags, and may not get lost when one is overridden.
FREE = {
    "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "allow_changes", "plan", "device_flops", "nproc",
    "local_rank", "log_with", "logging_steps", "sample_freq", "save_freq", "save_steps", "save_total_limit", "check",
    "reward_gate", "audit", "audit_prompts", "sample_max_new_tokens", "per_device_eval_batch_size",
    "reward_timeout", "data_cache", "inspect_rows", "best_of", "best_of_prompts", "write_best", "bad_answers",
    "shard_base", "link_gbps",
}  # fmt: skip
PATHS = {
    "model_name", "base_model_name", "tokenizer_name", "dataset_name", "eval_dataset_name", "sft_model_lora_path",
    "reward_model_lora_path", "judge_lora_path", "merged_sft_model_path", "deepspeed",
    "chat_template", "reward_functions",
}  # fmt: skip
LONGER = {"steps", "max_steps", "num_train_epochs"}


def arguments_of(script: str) -> type:
    return importlib.import_module(script).ScriptArguments


def help_of(script: str, *words: str, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).parse_args([*words])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("script", TRAINING)
def test_the_rule_of_resuming_stands_at_every_flag(script):
    rules = resume_rules(arguments_of(script))
    expected = {}
    for name in rules:
        kinds = [kind for kind, names in (("free", FREE), ("path", PATHS), ("longer", LONGER)) if name in names]
        expected[name] = kinds[0] if kinds else "same"
    assert rules == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_flags_that_people_change_and_help_all_shows_every_one(script, capsys):
    fields = dataclasses.fields(arguments_of(script))
    short = help_of(script, "--help", capsys=capsys)
    shown = set(re.findall(r"^  --(\w+)", short, re.MULTILINE))
    assert shown - {"help_all"} == {field.name for field in fields if not field.metadata["expert"]}
    assert len(shown) <= 43
    if any(field.metadata["expert"] for field in fields):
        every = help_of(script, "--help_all", capsys=capsys)
        assert {field.name for field in fields} <= set(re.findall(r"^  --(\w+)", every, re.MULTILINE))


def test_required_flags_come_first_and_a_value_is_named_once(capsys):
    text = help_of("rl_training", "--help", capsys=capsys)
    assert re.findall(r"^  --(\w+)", text, re.MULTILINE)[1] == "base_model_name"
    assert "--base_model_name, --model_name TEXT\n" in text
    assert "BASE_MODEL_NAME" not in text
    assert "--batch_size N" in text and "--learning_rate X" in text and "--plan [True|False]" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_help_text_does_not_begin_in_mid_sentence(script):
    for field in dataclasses.fields(arguments_of(script)):
        assert not re.match(r"(of|for|in|to|as|by) ", field.metadata["help"]), field.name
        assert not re.search(r"likewise|of old|\bas ever\b|hopeless|price of", field.metadata["help"]), field.name


def test_dashes_aliases_and_switches_parse():
    @dataclasses.dataclass(kw_only=True)
    class Arguments:
        some_name: int = flag(1, help="a number", aliases=["--old_name"], expert=True)
        a_switch: bool = flag(True, help="a switch")
        words: list[str] = flag([], help="words")

    assert parse(Arguments, ["--some-name", "3", "--a_switch", "False"], "").a_switch is False
    assert parse(Arguments, ["--old_name", "3", "--no_a_switch", "--words", "a", "b"], "") == Arguments(
        some_name=3, a_switch=False, words=["a", "b"]
    )
    assert "--old_name" not in build_parser(Arguments, "").format_help()


def parser_of_transformers(cls: type) -> HfArgumentParser:
    """The parser that the flags had until they got one of their own: its spellings stay for ever."""
    parser = HfArgumentParser(allow_abbrev=False)
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        twin = (
            dataclasses.field(default=field.default)
            if field.default_factory is dataclasses.MISSING
            else (dataclasses.field(default_factory=field.default_factory))
        )
        twin.name = field.name
        twin.type = hints[field.name]
        ours = ("group", "resume", "expert")
        twin.metadata = {name: value for name, value in field.metadata.items() if name not in ours}
        parser._parse_dataclass_field(parser, twin)
    return parser


def outcome(parser, words: list[str]):
    """What a parser makes of a command line: its values, or None where it refuses."""
    try:
        return vars(parser.parse_args(words))
    except SystemExit:
        return None


VALUES = ("", "-1", "1.5", "-1e-5", "True", "t", "text", "--x y", "-x", "stop")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_spelling_parses_as_in_transformers_parser(script, capsys):
    cls = arguments_of(script)
    theirs = parser_of_transformers(cls)
    ours = build_parser(cls, "")
    # Required flags aside: each line below is about one flag.
    for parser in (theirs, ours):
        for action in parser._actions:
            action.required = False
    assert outcome(ours, []) == outcome(theirs, [])

    shared = set(ours._option_string_actions) - {"--help_all", "--help-all"}
    assert shared == set(theirs._option_string_actions)
    refused = 0
    for option in sorted(shared - {"-h", "--help"}):
        lines = [[option], [option, "1", "2"], [option[:-1]], [f"{option}="], [f"{option}=1"], [f"{option}=False"]]
        for words in [*lines, *([option, value] for value in VALUES)]:
            mine = outcome(ours, words)
            assert repr(mine) == repr(outcome(theirs, words)), words
            refused += mine is None
    assert refused > len(shared)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--datset_name", "--dataset_name"),
        ("--base-model-nam", "--base_model_name"),
        ("--learning_rat=3", "--learning_rate"),
        ("--no_suppres_empty", "--no_suppress_empty"),
    ],
)
def test_a_mistyped_flag_is_told_from_a_missing_one(typed, meant, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module("rl_training").parse_args([typed, "x"])
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"error: unrecognized arguments: {typed.partition('=')[0]}; did you mean {meant}?")


def test_the_names_that_the_trainer_flags_know_are_transformers_own():
    assert tuple(OptimizerNames) == OPTIMIZERS
    assert tuple(SchedulerType) == SCHEDULES


def test_a_value_that_looks_like_a_flag_is_no_mistyped_one():
    @dataclasses.dataclass(kw_only=True)
    class Arguments:
        words: list[str] = flag([], help="words")

    assert parse(Arguments, ["--words", "--not a flag"], "").words == ["--not a flag"]


def test_the_page_of_flags_is_the_scripts_own():
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == flags_page()


def test_the_chinese_page_has_the_same_flags_and_defaults():
    row = re.compile(r"^(?:\| `(--\w+)` \| (.*?) \||<!-- (.*) -->)", re.MULTILINE)
    chinese = (ROOT / "docs" / "zh" / "flags.md").read_text(encoding="utf-8").replace("| 必填 |", "| required |")
    assert row.findall(chinese) == row.findall(flags_page())
