"""The two READMEs say the same; their commands parse, their flag tables are true, their links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from rlhf.flags import build_parser

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README_zh.md")
STAGES = ("sft_training", "reward_modeling", "rl_training", "merge_lora", "compare")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FLAG_TABLE = re.compile(r"^<!-- flags: ([\w. ]+) -->\n\n.*\n\|---\|---\|---\|\n((?:\|.*\n)+)", re.MULTILINE)
FLAG_ROW = re.compile(r"^\| `(--\w+)` \| (.*?) \| (.*) \|$", re.MULTILINE)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """Fenced blocks of one language, in order."""
    return [body for kind, body in FENCE.findall(text_of(name)) if kind == language]


def headings(name: str) -> list[str]:
    """Level of each heading outside code, in order: "#", "##", ..."""
    return re.findall(r"^(#+) ", FENCE.sub("", text_of(name)), re.MULTILINE)


def commands() -> list[list[str]]:
    """Every command of the English README as words; the Chinese one has the same."""
    lines = "".join(blocks("README.md", "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def script_commands() -> list[list[str]]:
    """Script name and arguments of the commands that run one of the stages."""
    return [words[i:] for words in commands() for i, word in enumerate(words) if word.removesuffix(".py") in STAGES]


def scripts_flags(stage: str) -> dict[str, object]:
    """Flag -> default of a script, as its parser has them; aliases and the hidden --no_x aside."""
    actions = build_parser(importlib.import_module(stage).ScriptArguments, "")._actions
    found = {action.option_strings[0]: ... if action.required else action.default for action in actions}
    return {name: value for name, value in found.items() if name != "-h" and not name.startswith("--no_")}


def readme_flags(readme: str, stage: str) -> dict[str, str]:
    """Flag -> default cell of all tables in a README that are for this script."""
    found = {}
    for scripts, rows in FLAG_TABLE.findall(text_of(readme)):
        if f"{stage}.py" in scripts.split():
            table = {name: default for name, default, _ in FLAG_ROW.findall(rows)}
            assert not table.keys() & found.keys()
            found |= table
    return found


def test_both_readmes_have_the_same_headings_and_tables():
    english, chinese = READMES
    assert headings(english) == headings(chinese)
    sizes = [re.findall(r"^\|---.*$", text_of(name), re.MULTILINE) for name in READMES]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("language", ["bash", "python", "json"])
def test_both_readmes_have_the_same_code(language):
    english, chinese = (blocks(name, language) for name in READMES)
    assert english == chinese
    assert english


@pytest.mark.parametrize("words", script_commands(), ids=lambda words: " ".join(words)[:60])
def test_every_command_parses(words):
    script, *argv = words
    importlib.import_module(script.removesuffix(".py")).parse_args(argv)


def test_every_stage_has_a_command():
    assert {script.removesuffix(".py") for script, *_ in script_commands()} == set(STAGES)


def test_every_shell_script_of_the_commands_exists():
    named = [words[1] for words in commands() if words[0] == "bash"]
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("readme", READMES)
def test_the_flag_tables_are_the_scripts_own(readme, stage):
    tables, parser = readme_flags(readme, stage), scripts_flags(stage)
    assert sorted(tables) == sorted(parser)
    for name, default in parser.items():
        if isinstance(default, str | int | float):
            assert tables[name] == f"`{default}`".replace("\n", "\\n"), name
        elif default is None:
            assert tables[name] == "", name


@pytest.mark.parametrize("readme", READMES)
def test_every_link_leads_to_a_file(readme):
    links = re.findall(r"\]\((?!https?://|#)([^)]+)\)", FENCE.sub("", text_of(readme)))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("readme", READMES)
def test_the_tree_names_what_is_there(readme):
    tree = blocks(readme, "text")[-1]
    assert "sft_training.py" in tree
    for line in tree.splitlines():
        name = line.split()[0]
        assert (ROOT / ("rlhf" if line.startswith(" ") else "") / name).exists(), name
