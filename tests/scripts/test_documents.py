"""README and docs say the same in both languages; their commands parse, their links lead to files, README is short."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("sft_training", "reward_modeling", "rl_training", "merge_lora", "compare")
PAGES = (
    "start",
    "stages",
    "models",
    "data",
    "reward",
    "preferences",
    "ppo",
    "experiments",
    "running",
    "scale",
    "speed",
    "flags",
    "design",
)
# English page and Chinese page, as paths from the project's root.
PAIRS = [("README.md", "README_zh.md"), *((f"docs/{name}.md", f"docs/zh/{name}.md") for name in PAGES)]
ENGLISH = [english for english, _ in PAIRS]
DOCUMENTS = [*ENGLISH, *(chinese for _, chinese in PAIRS), "CONTRIBUTING.md", "CHANGELOG.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """Fenced blocks of one language, in order."""
    return [body for kind, body in FENCE.findall(text_of(name)) if kind == language]


def headings(name: str) -> list[str]:
    """Level of each heading outside code, in order: "#", "##", ..."""
    return re.findall(r"^(#+) ", FENCE.sub("", text_of(name)), re.MULTILINE)


def commands(name: str) -> list[list[str]]:
    """Every command of a document as words, without comments and variables that stand before it."""
    lines = "".join(blocks(name, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def script_commands() -> list[list[str]]:
    """Script name and arguments of the commands that run one of the stages."""
    found = {}
    for name in [*ENGLISH, "CONTRIBUTING.md"]:
        for words in commands(name):
            for place, word in enumerate(words):
                if word.removesuffix(".py") in STAGES:
                    found[" ".join(words[place:])] = words[place:]
    return list(found.values())


def cut_at_pipe(words: list[str]) -> list[str]:
    """Words of the first command of a pipeline."""
    ends = [place for place, word in enumerate(words) if word in ("|", ">", "&", "&&", ";", "2>&1")]
    return words[: ends[0]] if ends else words


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_have_the_same_headings_and_tables(english, chinese):
    assert headings(english) == headings(chinese)
    sizes = [re.findall(r"^\|---.*$", text_of(name), re.MULTILINE) for name in (english, chinese)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("language", ["bash", "python", "json"])
@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_have_the_same_code(english, chinese, language):
    assert blocks(english, language) == blocks(chinese, language)


def numbers(name: str) -> list[str]:
    """Figures in the tables of a page, in order."""
    rows = "\n".join(re.findall(r"^\|.*\|$", FENCE.sub("", text_of(name)), re.MULTILINE))
    return re.findall(r"\d+(?:\.\d+)?", rows)


@pytest.mark.parametrize(("english", "chinese"), [pair for pair in PAIRS if "flags" not in pair[0]])
def test_both_languages_have_the_same_figures_in_their_tables(english, chinese):
    assert sorted(numbers(english)) == sorted(numbers(chinese))


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_readme_is_five_minutes_long(name):
    assert len(text_of(name).splitlines()) <= 230


@pytest.mark.parametrize("words", script_commands(), ids=lambda words: " ".join(words)[:60])
def test_every_command_parses(words):
    script, *argv = cut_at_pipe(words)
    importlib.import_module(script.removesuffix(".py")).parse_args(argv)


def test_every_stage_has_a_command():
    assert {script.removesuffix(".py") for script, *_ in script_commands()} == set(STAGES)


@pytest.mark.parametrize("name", ENGLISH)
def test_every_shell_script_and_module_of_the_commands_exists(name):
    for words in commands(name):
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file(), words
        if "-m" in words and words[words.index("-m") + 1].split(".")[0] in ("demo", "benchmarks", "rlhf"):
            assert (ROOT / f"{words[words.index('-m') + 1].replace('.', '/')}.py").is_file(), words


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_to_a_file(name):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", FENCE.sub("", text_of(name)))
    missing = [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]
    assert missing == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_is_named_exists(name):
    """Paths in backquotes that look like the project's own."""
    named = re.findall(
        r"`((?:rlhf|demo|benchmarks|tests|scripts|docs)/[\w./-]+\.(?:py|sh|md|png|log|json))`", text_of(name)
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_tree_names_what_is_there(name):
    tree = blocks(name, "text")[-1]
    assert "sft_training.py" in tree
    for line in tree.splitlines():
        path = line.split()[0]
        assert (ROOT / ("rlhf" if line.startswith(" ") else "") / path).exists(), path


@pytest.mark.parametrize("name", [chinese for _, chinese in PAIRS])
def test_chinese_uses_one_word_for_one_thing(name):
    text = text_of(name)
    assert [word for word in ("无望", "KL 价格", "KL价格", "评委", "非有限") if word in text] == []


@pytest.mark.parametrize("name", [english for english in ENGLISH])
def test_english_uses_the_fields_words(name):
    text = text_of(name)
    assert [
        word for word in ("hopeless", "price of KL", "side by side in one sequence", "likewise") if word in text
    ] == []
