"""Flags: help that people can read, rules of resuming at the flags themselves, docs/flags.md made from both."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from rlhf import flags
from rlhf.flags import SCRIPTS, build_parser, flag, parse, resume_rules

ROOT = Path(__file__).resolve().parents[1]
TRAINING = ("sft_training", "reward_modeling", "rl_training")
# What a resumed run may change, by name: the rules stand at the flags, and may not get lost when one is overridden.
FREE = {
    "data_cache",
    "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "allow_changes", "plan", "nproc", "local_rank",
    "log_with", "logging_steps", "sample_freq", "save_freq", "save_steps", "save_total_limit", "check", "reward_gate",
    "audit", "audit_prompts", "sample_max_new_tokens", "per_device_eval_batch_size", "eval_steps", "eval_first_step",
}  # fmt: skip
PATHS = {
    "model_name", "base_model_name", "tokenizer_name", "dataset_name", "eval_dataset_name", "sft_model_lora_path",
    "reward_model_lora_path", "judge_lora_path", "merged_sft_model_path", "deepspeed",
    "chat_template",
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
    assert len(shown) <= 42
    if any(field.metadata["expert"] for field in fields):
        every = help_of(script, "--help_all", capsys=capsys)
        assert {field.name for field in fields} <= set(re.findall(r"^  --(\w+)", every, re.MULTILINE))


def test_required_flags_come_first_and_a_value_is_named_once(capsys):
    text = help_of("rl_training", "--help", capsys=capsys)
    first = re.findall(r"^  --(\w+)", text, re.MULTILINE)[1:3]
    assert first == ["base_model_name", "reward_model_lora_path"]
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


def test_the_page_of_flags_is_the_scripts_own():
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == flags.flags_page()


def test_the_chinese_page_has_the_same_flags_and_defaults():
    row = re.compile(r"^(?:\| `(--\w+)` \| (.*?) \||<!-- (.*) -->)", re.MULTILINE)
    chinese = (ROOT / "docs" / "zh" / "flags.md").read_text(encoding="utf-8").replace("| 必填 |", "| required |")
    assert row.findall(chinese) == row.findall(flags.flags_page())
