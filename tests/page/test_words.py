"""Words of the page in both languages, and commands of the documents and of the demo that open it."""

import re

import pytest
from pages import answer_rows, chromium, filled, needs_browser, prompts, served, visitor
from test_documents import commands

import playground
from demo.commands import page_command

__all__ = ["chromium"]


@needs_browser
def test_both_languages_have_the_same_words_with_the_same_places(chromium, tmp_path):
    with served(filled(tmp_path, answer_rows(prompts(2)))) as address, visitor(chromium, address) as person:
        page = person.open()
        words = page.evaluate("async () => (await import('/static/words.js')).LANGUAGES")
        used = page.evaluate(
            """() => [...document.querySelectorAll("[data-t], [data-t-label], [data-t-placeholder]")]
            .flatMap((one) => Object.values(one.dataset))"""
        )
    english, chinese = words["en"], words["zh"]
    assert english.keys() == chinese.keys() and english["funnel"].keys() == chinese["funnel"].keys()
    for name, text in english.items():
        if name != "funnel":
            assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", chinese[name])), name
    assert {name for name in used if not name.isdecimal()} - {"left", "right", "tie", "bad", "skip"} <= english.keys()


def test_the_export_tells_every_number_that_the_page_has_words_for():
    from rlhf.page.export import FUNNEL, collect

    assert list(collect([]).funnel) == list(FUNNEL)


def documented() -> list[list[str]]:
    found = [words for words in commands("docs/preferences.md") if "playground.py" in words]
    return [words[words.index("playground.py") + 1 :] for words in found]


@pytest.mark.parametrize("words", [*documented(), page_command("runs/my demo")[1:]], ids=" ".join)
def test_a_command_that_opens_the_page_parses(words):
    args = playground.parse_args(words)
    assert args.output_dir.startswith("runs/")
