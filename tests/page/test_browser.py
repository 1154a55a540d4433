"""The page in a real browser: votes by mouse and keys, undo, kills, five people, hostile texts, a full disk."""

import json
import time

import pytest
from pages import (
    Playground,
    Visitor,
    answer_rows,
    chromium,
    filled,
    give,
    needs_browser,
    prompts,
    served,
    visitor,
    write_rows,
)

__all__ = ["chromium"]
pytestmark = needs_browser
NASTY = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>\n'; DROP TABLE votes; --"
PHONE = {"viewport": {"width": 390, "height": 800}, "has_touch": True, "is_mobile": True}


def votes_of(page) -> list[dict]:
    return [dict(row) for row in page.store.votes()]


def texts(row: dict) -> tuple[str, str]:
    """Left and right answer of a vote, as the person saw them."""
    both = (row["first_text"], row["second_text"])
    return both if row["left_side"] == "first" else both[::-1]


def wait_for_votes(site, count: int, seconds: float = 10) -> list[dict]:
    end = time.monotonic() + seconds
    while len(found := votes_of(site)) != count:
        assert time.monotonic() < end, f"{len(found)} votes"
        time.sleep(0.02)
    return found


# ---- votes ----
def test_every_vote_by_mouse_and_by_key_is_what_was_on_the_screen(chromium, tmp_path):
    site = filled(tmp_path, answer_rows(prompts(12)))
    with served(site) as address, visitor(chromium, address, name="小明") as person:
        page = person.open()
        page.wait_for_selector("#ballot:not([hidden])")
        assert "sft" not in page.inner_text("header.top") and "ppo" not in page.inner_text(".extras")
        seen = []
        for side, key in (("left", "1"), ("right", "2"), ("tie", "3"), ("bad", "0"), ("skip", "s")):
            for how in ("mouse", "key"):
                seen.append((side, person.sides()))
                if how == "key":
                    person.vote(key)
                else:
                    with page.expect_response("**/page/vote"):
                        page.click(f".choice[data-side={side}]")
                page.wait_for_function("() => !document.querySelector('#receipt').textContent.includes('Storing')")
        for (side, shown), row in zip(seen, wait_for_votes(site, 10), strict=True):
            assert texts(row) == shown and row["person"] == "小明" and 0 <= row["seconds"] < 60
            preferred = {row["left_side"]: "left"}.get(
                row["choice"], "right" if row["choice"] in ("first", "second") else None
            )
            assert preferred == side if side in ("left", "right") else row["choice"] == side
        # The names come after the vote.
        assert page.inner_text("#receipt .names").startswith("Answer 1 was by ")
        assert {"sft", "ppo"} <= set(page.inner_text("#receipt .names").replace(",", "").split())
        assert page.inner_text("#progress-text") == "10 of 12 prompts"


def test_margin_reason_and_an_edited_answer_go_with_the_vote_by_keys_alone(chromium, tmp_path):
    site = filled(tmp_path, answer_rows(prompts(4)))
    with served(site) as address, visitor(chromium, address) as person:
        page = person.open()
        page.wait_for_selector("#ballot:not([hidden])")
        page.keyboard.press("m")
        page.keyboard.press("m")
        page.keyboard.press("r")
        # Digits in a field are text, and no vote.
        page.keyboard.type("1 更自然 2")
        page.keyboard.press("Escape")
        person.vote("2")
        page.keyboard.press("e")
        page.keyboard.press("2")
        right = page.inner_text("#right")
        assert page.input_value("#edited") == right
        page.keyboard.press("End")
        page.keyboard.type(" 好！")
        with page.expect_response("**/page/vote"):
            page.keyboard.press("Control+Enter")
        first, second = wait_for_votes(site, 2)
        assert (first["margin"], first["reason"], first["edited"]) == (2, "1 更自然 2", None)
        assert second["edited"] == f"{right} 好！" and second["margin"] is None and second["reason"] is None
        assert second["choice"] != second["left_side"]
        # Escape closes the editor, and nothing is voted.
        page.keyboard.press("e")
        page.keyboard.press("Escape")
        assert page.locator("#editor").is_hidden() and len(votes_of(site)) == 2


def test_votes_are_taken_back_one_after_another_and_their_pairs_come_again(chromium, tmp_path):
    site = filled(tmp_path, answer_rows(prompts(4)))
    with served(site) as address, visitor(chromium, address) as person:
        page = person.open()
        page.wait_for_selector("#ballot:not([hidden])")
        shown = []
        for _ in range(3):
            shown.append(person.sides())
            person.vote("1")
            page.wait_for_selector("#receipt .names:has-text('was by')")
        for _ in range(2):
            with page.expect_response("**/page/undo"):
                page.keyboard.press("u")
            page.wait_for_function("() => document.querySelector('#toast').classList.contains('shown')")
        wait_for_votes(site, 1)
        assert person.sides() == shown[1]
        person.vote("2")
        assert person.sides() == shown[2]
        wait_for_votes(site, 2)
        assert page.inner_text("#progress-text") == "2 of 4 prompts"


def test_the_first_pair_is_there_within_a_second_and_the_next_at_once(chromium, tmp_path):
    site = filled(tmp_path, answer_rows(prompts(300)))
    with served(site) as address:
        with visitor(chromium, address) as warm:
            warm.open()
        seconds = []
        # The best of a few: other tests run on the same cores.
        while len(seconds) < 5 and min(seconds, default=1) >= 1:
            with visitor(chromium, address) as person:
                begin = time.perf_counter()
                person.open().wait_for_selector("#ballot:not([hidden])")
                seconds.append(time.perf_counter() - begin)
        assert min(seconds) < 1, seconds
        with visitor(chromium, address) as person:
            page = person.open()
            page.wait_for_selector("#ballot:not([hidden])")
            before = person.sides()
            # Without a look at the network: the next pair lies ready.
            page.evaluate("document.querySelector('.choice').click()")
            assert person.sides() != before


# ---- kills and crowds ----
def test_after_a_kill_in_mid_vote_the_same_page_goes_on_and_no_vote_is_lost(chromium, tmp_path):
    words = ("--answers", write_rows(tmp_path / "answers.jsonl", answer_rows(prompts(12))), "--overlap", "0",
             "--output_dir", str(tmp_path / "page"))  # fmt: skip
    server = Playground(*words)
    person = Visitor(chromium, server.address)
    try:
        page = person.open()
        page.wait_for_selector("#ballot:not([hidden])")
        seen = []
        for _ in range(3):
            seen.append(person.sides())
            person.vote("1")
        server.kill()
        # Those that lie ready in the browser can still be voted on.
        for _ in range(2):
            seen.append(person.sides())
            page.keyboard.press("2")
        page.wait_for_selector("#banner:not([hidden])")
        assert "kept in this browser" in page.inner_text("#banner")
        # Loaded again while the server is gone, the votes are still there.
        page.evaluate("window.same = true")
        server = Playground(*words, port=server.port)
        page.wait_for_selector("#banner", state="hidden", timeout=15_000)
        assert page.evaluate("window.same") and page.inner_text("#progress-text") == "5 of 12 prompts"
        server.kill()
        server = Playground(*words, port=server.port)
        page.reload()
        page.wait_for_selector("#ballot:not([hidden])")
        assert page.inner_text("#progress-text") == "5 of 12 prompts"
        assert person.sides() not in seen
    finally:
        server.kill()
        person.close()
    rows = [row for row in _stored(tmp_path / "page")]
    assert [texts(row) for row in rows] == seen


def _stored(folder) -> list[dict]:
    from rlhf.page.store import Store

    store = Store(folder)
    rows = [dict(row) for row in store.votes()]
    store.close()
    return rows


def test_five_people_and_a_second_tab_lose_no_vote(chromium, tmp_path):
    # More than all of them vote on and hold ready.
    site = filled(tmp_path, answer_rows(prompts(60)), overlap=0.2)
    with served(site) as address:
        people = [Visitor(chromium, address, name=f"person {number}") for number in range(5)]
        # A second tab of the first one: the same storage, and from the name that is typed on the same person.
        tab = people[0].context.new_page()
        tab.goto(address)
        windows = [person.open() for person in people] + [tab]
        for window in windows:
            window.wait_for_selector("#ballot:not([hidden])")
        cast = 0
        for _ in range(4):
            for window in windows:
                # On a slow machine the next pair may still be on its way.
                window.wait_for_selector("#ballot:not([hidden])")
                window.keyboard.press("123"[cast % 3])
                cast += 1
        rows = wait_for_votes(site, cast)
        assert len({(row["pair"], row["person"]) for row in rows}) == cast == 24
        unshared = [row["pair"] for row in rows if not row["shared"]]
        assert len(unshared) == len(set(unshared))
        for person in people:
            assert person.errors == []
            person.close()


def test_on_a_full_disk_votes_stay_in_the_browser_until_they_are_stored(chromium, tmp_path):
    site = filled(tmp_path, answer_rows(prompts(8)))
    with served(site) as address:
        person = Visitor(chromium, address)
        page = person.open()
        page.wait_for_selector("#ballot:not([hidden])")
        person.vote("1")
        connection = site.store.connection
        size = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={size}")
        # Until the pages that there are have no room left.
        page.keyboard.press("r")
        page.keyboard.insert_text("x" * 2000)
        page.keyboard.press("Escape")
        page.keyboard.press("2")
        page.keyboard.press("r")
        page.keyboard.insert_text("y" * 2000)
        page.keyboard.press("Escape")
        page.keyboard.press("2")
        page.wait_for_selector("#banner:not([hidden])")
        assert "disk of the server is full" in page.inner_text("#banner")
        stored = len(votes_of(site))
        assert stored < 3
        page.reload()
        page.wait_for_selector("#banner:not([hidden])")
        connection.execute("PRAGMA max_page_count=1000000")
        assert len(wait_for_votes(site, 3)) == 3
        page.wait_for_selector("#banner", state="hidden")
        person.close()


# ---- texts ----
@pytest.mark.parametrize("view", ["vote", "results"])
def test_markup_is_shown_as_text_wherever_it_comes_from(chromium, tmp_path, view):
    rows = answer_rows([NASTY, NASTY + "2"], (NASTY + "a", NASTY + "b"))
    for row in rows:
        row["answer"] += NASTY
    site = filled(tmp_path, rows)
    with served(site) as address, visitor(chromium, address, name=NASTY[:60]) as person:
        page = person.open()
        page.wait_for_selector("#ballot:not([hidden])")
        assert page.inner_text("#prompt") == NASTY
        assert page.inner_text("#left").endswith(NASTY)
        person.vote("1")
        page.wait_for_selector("#receipt .names:has-text('was by')")
        assert NASTY.split("\n")[0] in page.inner_text("#receipt")
        if view == "results":
            page.goto(f"{address}/#results")
            page.wait_for_selector("#version-pairs h3")
            assert NASTY.split("\n")[0] in page.inner_text("#version-pairs")
            assert NASTY[:60] in page.inner_text("#whose")
        assert page.title() == "Playground" and page.locator("script:not([src]), img").count() == 0


# Squares that stand for characters without a font are all alike.
DRAWN = """(characters) => {
  const canvas = document.createElement("canvas");
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.font = "24px " + getComputedStyle(document.body).fontFamily;
  return characters.map((character) => {
    pen.clearRect(0, 0, 40, 40);
    pen.fillText(character, 4, 28);
    return pen.getImageData(0, 0, 40, 40).data.reduce((sum, value, place) => (sum * 31 + value + place) % 1000003, 7);
  });
}"""


def test_chinese_is_drawn_in_the_language_of_the_browser_and_the_switch_is_kept(chromium, tmp_path):
    site = filled(tmp_path, answer_rows(prompts(3)))
    with served(site) as address, visitor(chromium, address, locale="zh-CN") as person:
        page = person.open()
        page.wait_for_selector("#ballot:not([hidden])")
        assert page.title() == "试验场" and page.get_attribute("html", "lang") == "zh-CN"
        assert page.inner_text("#progress-text") == "已完成 0 / 3 个提示"
        assert page.get_attribute("#left", "lang") == "zh-CN"
        page.click("#language")
        assert page.inner_text("#tab-vote") == "Vote"
        page.reload()
        page.wait_for_selector("#ballot:not([hidden])")
        assert page.inner_text("#tab-vote") == "Vote"
        drawn = page.evaluate(DRAWN, ["投", "票", "国", "\ue123", "\ue124"])
        if drawn[3] == drawn[4] and drawn[0] == drawn[3]:
            pytest.skip("this system has no Chinese font")
        assert len(set(drawn[:3])) == 3


# ---- people and machines of every kind ----
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_a_phone_needs_no_sideways_scrolling_in_any_view(chromium, tmp_path, locale):
    rows = answer_rows(prompts(4))
    for row in rows:
        row["answer"] += "x" * 300
    site = filled(tmp_path, rows)
    with served(site) as address, visitor(chromium, address, locale=locale, **PHONE) as person:
        page = person.open()
        page.wait_for_selector("#ballot:not([hidden])")
        with page.expect_response("**/page/vote"):
            page.tap(".choice[data-side=left]")
        for view in ("vote", "chat", "results"):
            page.goto(f"{address}/#{view}")
            page.wait_for_timeout(100)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator("kbd").first.is_hidden()


def test_every_control_has_a_name_and_the_keyboard_reaches_the_votes_in_order(chromium, tmp_path):
    site = filled(tmp_path, answer_rows(prompts(4)))
    with served(site) as address, visitor(chromium, address) as person:
        page = person.open()
        page.wait_for_selector("#ballot:not([hidden])")
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("button, input, select, textarea, a, [role=progressbar]")]
            .filter((one) => one.checkVisibility() && !(one.labels?.length || one.getAttribute("aria-label")
            || one.textContent.trim())).map((one) => one.outerHTML)"""
        )
        assert nameless == []
        reached = []
        for _ in range(14):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.dataset.side ?? document.activeElement.id"))
        assert reached[:5] == ["tab-vote", "tab-chat", "tab-results", "person", "language"]
        assert [one for one in reached if one in ("left", "right", "tie", "bad", "skip")] == [
            "left", "right", "tie", "bad", "skip",
        ]  # fmt: skip
        # A vote puts the focus at the new prompt, from where a screen reader reads on.
        person.vote("1")
        assert page.evaluate("document.activeElement.id") == "prompt-title"
        assert page.get_attribute("#receipt", "role") == "status"


def test_results_show_every_number_and_the_export_can_be_taken_away(chromium, tmp_path):
    site = filled(tmp_path, answer_rows(prompts(12)), overlap=1.0)
    for person in ("甲", "乙"):
        for shown in site.plan.next(person, person, 12):
            side = "left" if shown.left.version.name == "ppo" else "right"
            give(site.plan, person, side, shown.pair)
    with served(site) as address, visitor(chromium, address) as person:
        page = person.open("results")
        page.wait_for_selector("#numbers:not([hidden])")
        assert page.inner_text("#summary") == "24 votes of 2 people on 12 prompts"
        assert "ppo is better" in page.inner_text("#version-pairs")
        plain = page.inner_text("#version-pairs").replace("\u00a0", " ")
        assert "ppo against sft: 100 % won · 95 % interval: 76 % to 100 %" in plain
        facts = page.inner_text("#facts").replace("\u00a0", " ")
        assert facts.count("100 %") >= 2 and "on 12 pairs that several people saw" in facts
        page.select_option("#whose", "乙")
        page.wait_for_function("() => document.querySelector('#summary').textContent.startsWith('12 votes')")
        page.click("#export")
        page.wait_for_selector(".command")
        assert "python reward_modeling.py" in page.inner_text(".command")
        with page.expect_download() as download:
            page.click(".files a")
        rows = [json.loads(line) for line in download.value.path().read_text(encoding="utf-8").splitlines()]
        assert len(rows) == 12 and all(row["chosen"].startswith("ppo") for row in rows)
        assert "12\npairs to train on" in page.inner_text(".funnel")
        site.min_pairs = 50
        page.click("#export")
        page.wait_for_selector("#exported .warning")
        assert "vote on at least 38 more" in page.inner_text("#exported")
