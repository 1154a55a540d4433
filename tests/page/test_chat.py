"""Conversations with versions in memory: streamed, stopped, mixed, scored, sent to the vote; answers made ahead."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from adapters import random_adapter
from pages import answer_rows, chromium, filled, needs_browser, prompts, served, visitor
from stages import words

import playground
from rlhf.page.chat import weights_of
from rlhf.page.engine import Settings
from rlhf.page.store import Store

__all__ = ["chromium"]


@pytest.fixture(scope="module")
def folders(tiny_base, tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    stages = {"sft": "sft", "ppo.2": "ppo", "reward": "reward"}
    return {
        name: random_adapter(tiny_base, root / name, stage=stage, seed=seed, scale=0.3)
        for seed, (name, stage) in enumerate(stages.items())
    }


@pytest.fixture
def site(tiny_base, folders, tmp_path):
    """A page with the base, two adapters and a reward model, and four prompts."""
    flags = {"base_model_name": tiny_base, "reward_model_lora_path": folders["reward"], "output_dir": tmp_path}
    flags |= {"max_new_tokens": 12, "overlap": 0}
    adapters = ["--adapters", *(f"{name}={folders[name]}" for name in ("sft", "ppo.2"))]
    prompts = ["--prompts", "小猫喜欢什么？", "1 + 2 = 3，对吗？", "你今天看见了什么？", "老师喜欢什么？"]
    args = playground.parse_args([*words(flags), *adapters, *prompts])
    page = playground.open_page(args, Store(args.output_dir))
    page.chat.engine.start()
    yield page
    page.chat.engine.close()


def test_answers_are_written_ahead_with_their_seed_scores_and_fingerprints(site):
    with served(site) as address:
        asked = {"person": "me", "tab": "t"}
        while httpx.get(f"{address}/page/next", params=asked).json()["progress"]["waiting"]:
            pass
        found = site.store.answers()
        rows = [dict(row) for row in site.store.connection.execute("SELECT * FROM answers")]
    # Four prompts, the first round's two versions of each at least.
    assert len(found) >= 8
    assert all(isinstance(answer.score, float) for answer in found)
    assert {answer.version.name for answer in found} <= {"base", "sft", "ppo.2"}
    assert {bool(answer.version.adapter) for answer in found if answer.version.name != "base"} == {True}
    assert json.loads(rows[0]["sampling"]) == {
        "do_sample": True,
        "max_new_tokens": 12,
        "temperature": 1.0,
        "top_p": 0.9,
    }
    # Two versions of one prompt are drawn with one seed.
    seeds = {}
    for row in rows:
        seeds.setdefault(row["prompt"], set()).add(row["seed"])
    assert all(len(drawn) == 1 for drawn in seeds.values()) and len(seeds) == 4


def test_a_mix_of_nothing_is_the_base_and_of_all_is_the_version_and_leaves_no_trace(site):
    query = site.chat.encode([("user", "小猫喜欢什么？")], 12)
    greedy = Settings(max_new_tokens=12, do_sample=False)

    def text(version) -> str:
        ticket = site.chat.engine.submit(version, query, greedy, 0)
        # In a thread of its own: the browser's library has this one's event loop.
        with ThreadPoolExecutor() as pool:
            return pool.submit(lambda: asyncio.run(ticket.result()).text).result()

    found = {name: text(name) for name in ("base", "sft", "ppo.2")}
    assert len(set(found.values())) == 3
    assert text(weights_of({"base": 0.0, "sft": 1.0})) == found["sft"]
    assert text(weights_of({"base": 1.0, "sft": 0.0})) == found["base"]
    assert text(weights_of({"sft": 1.0, "ppo.2": 0.0})) == found["sft"]
    assert weights_of({"sft": -0.2, "ppo.2": 1.2}) == {"sft": -0.2, "ppo.2": 1.2}
    text({"sft": -0.2, "ppo.2": 1.2})
    assert {name: text(name) for name in found} == found
    site.store.close()


@needs_browser
def test_two_versions_answer_side_by_side_and_what_they_say_is_streamed_scored_and_drawn_again(chromium, site):
    with served(site) as address, visitor(chromium, address) as person:
        page = person.open("chat")
        page.wait_for_selector("#talk:not([hidden])")
        assert page.locator(".column").count() == 2
        pieces = []
        page.expose_function("grown", lambda text: pieces.append(text))
        page.evaluate(
            """() => new MutationObserver(() => {
              const last = document.querySelector(".turn.assistant .text");
              if (last) window.grown(last.textContent);
            }).observe(document.querySelector("#columns"), { subtree: true, childList: true, characterData: true })"""
        )
        page.fill("#temperature", "1.5")
        page.fill("#message", "小猫喜欢什么？")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelectorAll('.note').length === 2")
        assert "score" in page.inner_text(".note") and "tokens" in page.inner_text(".note")
        # More than once, and each time longer.
        grown = [text for text in dict.fromkeys(pieces) if text != "answering …"]
        assert len(grown) >= 3
        first = page.locator(".turn.assistant .text").first.inner_text()
        page.locator("button:has-text('Another draw')").first.click()
        page.wait_for_function("() => document.querySelectorAll('.note').length === 2")
        assert page.locator(".turn.assistant .text").first.inner_text() != first
        # A second turn sees the first, and a mix has a slider.
        page.fill("#message", "为什么？")
        page.click("#send")
        page.wait_for_function("() => document.querySelectorAll('.turn.assistant .note').length === 4")
        page.locator(".column select").first.select_option(label="mix of two …")
        page.fill(".mix input", "60")
        assert page.inner_text(".mix output").endswith("60 %")
        page.fill("#message", "好吧")
        page.click("#send")
        page.wait_for_function("() => document.querySelectorAll('.turn.assistant .note').length === 6")
        assert page.locator(".note .warning").count() == 0


@needs_browser
def test_the_stop_button_ends_an_answer_and_frees_the_model(chromium, site):
    with served(site) as address, visitor(chromium, address) as person:
        page = person.open("chat")
        page.wait_for_selector("#talk:not([hidden])")
        page.fill("#max_new_tokens", "400")
        # At a high temperature the tiny model hardly ever stops by itself.
        page.fill("#temperature", "5")
        page.fill("#top_p", "1")
        page.fill("#message", "小猫")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelector('.turn.assistant .text')?.textContent.length > 12")
        page.click("#stop")
        page.wait_for_selector(".note:has-text('stopped')")
        page.wait_for_selector("#send:not([hidden])")
        page.click("#new-chat")
        page.fill("#max_new_tokens", "4")
        page.fill("#message", "小猫")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelectorAll('.note').length === 2")
        assert "stopped" not in page.inner_text("#columns")


@needs_browser
def test_a_conversation_is_sent_to_the_vote_and_comes_first(chromium, site):
    with served(site) as address, visitor(chromium, address) as person:
        page = person.open("chat")
        page.wait_for_selector("#talk:not([hidden])")
        page.fill("#message", "你是谁？")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelectorAll('.note').length === 2")
        page.locator("button:has-text('Send to vote')").first.click()
        page.wait_for_selector("#toast:has-text('first on the list')")
        page.goto(f"{address}/#vote")
        # Behind the pairs that lay ready in the browser.
        for _ in range(12):
            page.wait_for_selector("#ballot:not([hidden])")
            if page.inner_text("#prompt") == "你是谁？":
                break
            person.vote("3")
        assert page.inner_text("#prompt") == "你是谁？"


def test_what_does_not_fit_the_model_is_said_and_not_asked(site):
    with served(site) as address:
        fields = {
            "version": "sft",
            "turns": [["user", "好"]],
            "temperature": 1,
            "top_p": 1,
            "max_new_tokens": 4,
            "seed": 0,
        }
        wrong = [
            ({"version": "nobody"}, "version must be one"),
            ({"version": {"sft": 2}}, "sft must be a number from -0.2"),
            ({"version": {}}, "a mix has one or two"), ({"turns": [["user", "很" * 3000]]}, "begin a new one"),
            ({"max_new_tokens": 600}, "begin a new one"), ({"turns": [["assistant", "好"]]}, "last turn must be"),
            ({"turns": [["user", " "]]}, "must not be empty"), ({"turns": [["nobody", "x"]]}, "its role"),
            ({"temperature": "hot"}, "temperature"), ({"top_p": 0}, "top_p"), ({"seed": 1.5}, "seed"),
        ]  # fmt: skip
        for change, words_of_it in wrong:
            answer = httpx.post(f"{address}/page/chat", json=fields | change)
            assert answer.status_code == 400 and words_of_it in answer.json()["error"]["message"]
        answer = httpx.post(f"{address}/page/chat", json=fields | {"temperature": 0})
        last = json.loads(answer.text.splitlines()[-1])
        assert answer.status_code == 200 and last["finish"] in ("stop", "length") and last["tokens"] <= 4


@needs_browser
def test_without_a_model_the_page_says_how_to_get_one(chromium, tmp_path):
    with served(filled(tmp_path, answer_rows(prompts(2)))) as address, visitor(chromium, address) as person:
        page = person.open("chat")
        page.wait_for_selector("#chat-empty:not([hidden])")
        assert "--base_model_name" in page.inner_text("#chat-empty")


def test_the_api_stands_beside_the_page_behind_the_same_token(site):
    site.token = "secret0123"
    with served(site) as address:
        asked = {"model": "ppo.2", "messages": [{"role": "user", "content": "小猫喜欢什么？"}], "max_tokens": 4}
        assert httpx.post(f"{address}/v1/chat/completions", json=asked).status_code == 401
        bearer = {"authorization": "Bearer secret0123"}
        answer = httpx.post(f"{address}/v1/chat/completions", json=asked, headers=bearer).json()
        assert answer["choices"][0]["message"]["role"] == "assistant"
        names = [model["id"] for model in httpx.get(f"{address}/v1/models", headers=bearer).json()["data"]]
        assert names == ["base", "sft", "ppo.2"]
        foreign = httpx.post(f"{address}/v1/chat/completions", json=asked, headers=bearer | {"origin": "http://evil"})
        assert foreign.status_code == 403 and foreign.json()["error"]["code"] == "origin"
