"""Pictures of every view, in both languages, light and dark, wide and narrow; some of them are those of the documents.

PAGE_PICTURES=docs/images writes those there; PAGE_PICTURES=all:FOLDER writes every one.
"""

import os
import random
from itertools import product
from pathlib import Path

import pytest
from pages import Visitor, chromium, filled, give, needs_browser, served

from demo.gold import gold_score
from demo.world import answer, split_prompts

__all__ = ["chromium"]
pytestmark = needs_browser
DOCUMENTS = {
    ("vote", "en-US", "light", 1280): "vote.png", ("vote", "zh-CN", "light", 1280): "vote_zh.png",
    ("results", "en-US", "light", 1280): "results.png", ("results", "zh-CN", "light", 1280): "results_zh.png",
    ("vote", "en-US", "dark", 390): "phone.png", ("vote", "zh-CN", "dark", 390): "phone_zh.png",
}  # fmt: skip


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page with votes of two people with different tastes, and a reward model that agrees with most of them."""
    draw = random.Random(1)
    train, _ = split_prompts(0)
    rows = []
    for prompt in draw.sample(train, 60):
        for version, voice in (("sft", "formal"), ("ppo", "lively")):
            text = answer(prompt.fact, voice, draw, correct=draw.random() < 0.8)
            score = gold_score(prompt.text, text) + draw.gauss(0, 0.3)
            row = {"prompt": prompt.text, "version": version, "answer": text, "score": score, "seed": 0}
            rows.append(row | {"sampling": {}, "adapter": version})
    site = filled(tmp_path_factory.mktemp("page"), rows, overlap=0.3)
    for person in ("小明", "Ada"):
        for shown in site.plan.next(person, person, 24):
            prompt = shown.prompt.turns[0][1]
            left, right = (gold_score(prompt, side.text) + draw.gauss(0, 0.2) for side in (shown.left, shown.right))
            side = "left" if left > right else "right"
            if abs(left - right) < 0.1:
                side = "bad" if max(left, right) < 0.25 else "tie"
            give(site.plan, person, side, shown.pair)
    with served(site) as found:
        yield found


@pytest.mark.parametrize(("view", "locale", "scheme", "width"), [
    *product(("vote", "results"), ("en-US", "zh-CN"), ("light", "dark"), (1280, 390)),
])  # fmt: skip
def test_a_picture_of_a_view_is_taken(chromium, address, tmp_path, view, locale, scheme, width):
    wanted = os.environ.get("PAGE_PICTURES", "")
    name = DOCUMENTS.get((view, locale, scheme, width))
    everything = wanted.removeprefix("all:") if wanted.startswith("all:") else None
    if not wanted and name is None:
        pytest.skip("one of those that are only taken with PAGE_PICTURES=all:FOLDER")
    phone = {"is_mobile": True, "has_touch": True} if width == 390 else {}
    person = Visitor(
        chromium, address, name="小明", locale=locale, color_scheme=scheme,
        viewport={"width": width, "height": 760 if width > 400 else 780}, **phone,
    )  # fmt: skip
    page = person.open(view)
    page.wait_for_selector("#ballot:not([hidden])" if view == "vote" else "#numbers:not([hidden])")
    page.wait_for_timeout(150)
    folder = Path(everything) if everything else Path(wanted) if wanted and name else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (f"{view}_{locale}_{scheme}_{width}.png" if everything else name or "picture.png")
    page.screenshot(path=str(file), full_page=bool(everything) or view == "results")
    person.close()
    assert person.errors == []
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size < 300_000
