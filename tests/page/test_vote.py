"""Which pair comes next: for one person, for several, in two tabs, after a restart; what is hidden before a vote."""

import json

from pages import answer_rows, filled, give, prompts

from rlhf.page.app import in_view
from rlhf.page.store import Store, Version
from rlhf.page.vote import Plan


def vote_on_all(plan: Plan, person: str, side: str = "left") -> list[int]:
    pairs = []
    while shown := plan.next(person, f"tab of {person}", 1):
        pairs.append(shown[0].pair)
        give(plan, person, side, pairs[-1])
    return pairs


def test_one_person_votes_once_on_every_prompt_and_their_sides_are_mapped_back(tmp_path):
    page = filled(tmp_path, answer_rows(prompts(30)))
    plan = page.plan
    lefts = []
    while shown := plan.next("me", "tab", 1):
        lefts.append(shown[0].left_side)
        give(plan, "me", "left", shown[0].pair)
    assert len(lefts) == 30
    # Swapped at random: all on one side has a chance of 2 in a thousand million.
    assert {"first", "second"} == set(lefts)
    assert [row["choice"] for row in page.store.votes()] == lefts
    assert plan.progress("me") == {"done": 30, "total": 30, "waiting": 0, "same": 0, "round": 1, "rounds": 1}


def test_a_share_of_the_prompts_goes_to_everybody_and_the_others_get_one_vote(tmp_path):
    plan = filled(tmp_path, answer_rows(prompts(20)), overlap=0.2).plan
    seen = {}
    people = ("a", "b", "c")
    # In turns, as people do who sit there at the same time.
    while any(person not in seen or seen[person][-1] is not None for person in people):
        for person in people:
            shown = plan.next(person, person, 1)
            seen.setdefault(person, []).append(shown[0].pair if shown else None)
            if shown:
                give(plan, person, "right", shown[0].pair)
    votes = {person: {pair for pair in pairs if pair} for person, pairs in seen.items()}
    shared = votes["a"] & votes["b"] & votes["c"]
    assert len(shared) == 4
    assert sum(len(pairs - shared) for pairs in votes.values()) == 16
    assert len(set.union(*votes.values())) == 20


def test_two_tabs_of_one_person_show_different_pairs(tmp_path):
    plan = filled(tmp_path, answer_rows(prompts(2)), overlap=1.0).plan
    first = plan.next("me", "one tab", 1)[0].pair
    assert plan.next("me", "one tab", 1)[0].pair == first
    second = plan.next("me", "another tab", 1)[0].pair
    assert second != first
    # The last one is rather shown twice than nowhere.
    give(plan, "me", "tie", second)
    assert plan.next("me", "another tab", 1)[0].pair == first


def test_a_shared_pair_is_for_one_tab_of_each_whoever_else_looks_at_it(tmp_path):
    plan = filled(tmp_path, answer_rows(prompts(2)), overlap=1.0).plan
    first = plan.next("me", "one tab", 1)[0].pair
    assert plan.next("somebody else", "tab", 1)[0].pair == first
    assert plan.next("me", "another tab", 1)[0].pair != first


def test_what_one_person_skips_another_may_know(tmp_path):
    plan = filled(tmp_path, answer_rows(prompts(1))).plan
    pair = plan.next("a", "a", 1)[0].pair
    give(plan, "a", "skip", pair)
    assert plan.next("a", "a", 1) == []
    assert plan.next("b", "b", 1)[0].pair == pair


def test_a_restart_goes_on_where_it_stopped_with_the_same_sides(tmp_path):
    page = filled(tmp_path, answer_rows(prompts(10)))
    for _ in range(4):
        give(page.plan, "me", "left", page.plan.next("me", "tab", 1)[0].pair)
    before = page.plan.next("me", "tab", 3)
    page.store.close()
    store = Store(tmp_path)
    again = Plan(store, page.plan.versions, 0)
    assert again.next("me", "tab", 3) == before
    # A vote on what lay on the screen is taken even before anything is asked.
    number, shown = give(Plan(store, page.plan.versions, 0), "me", "right", before[0].pair)
    assert number == 5 and shown == before[0]
    store.close()


def test_an_undone_vote_comes_back_as_it_was_shown(tmp_path):
    plan = filled(tmp_path, answer_rows(prompts(3))).plan
    shown = plan.next("me", "tab", 1)[0]
    number, _ = give(plan, "me", "left", shown.pair)
    assert plan.progress("me")["done"] == 1
    assert plan.undo(number, "somebody else", "tab") is None
    assert plan.undo(number, "me", "tab") == shown
    assert plan.progress("me")["done"] == 0
    assert plan.next("me", "tab", 1) == [shown]


def test_every_pair_of_versions_has_a_round_and_equal_texts_are_left_out(tmp_path):
    rows = answer_rows(prompts(4), ("base", "sft", "ppo"))
    for row in rows:
        if row["prompt"] == prompts(1)[0]:
            row["answer"] = "一样"
    plan = filled(tmp_path, rows).plan
    assert plan.progress("me") | {"round": 1} == {
        "done": 0, "total": 3, "waiting": 0, "same": 1, "round": 1, "rounds": 3,
    }  # fmt: skip

    assert len(vote_on_all(plan, "me")) == 9
    assert {row["first_version"] for row in plan.store.votes()} == {"base", "sft"}


def test_nothing_says_who_wrote_what_before_the_vote(tmp_path):
    rows = answer_rows(prompts(5), ("secret one", "secret two"))
    for number, row in enumerate(rows):
        row["answer"] = f"answer {number}"
    plan = filled(tmp_path, rows).plan
    told = json.dumps([in_view(shown) for shown in plan.next("me", "tab", 5)])
    assert "secret" not in told and "adapter" not in told and "score" not in told


def test_missing_answers_are_wanted_for_the_next_pairs_only(tmp_path):
    store = Store(tmp_path)
    ids = store.add_prompts([[("user", text)] for text in prompts(50)], 0.0)
    versions = [Version("sft"), Version("ppo")]
    plan = Plan(store, versions, 0)
    assert plan.next("me", "tab", 1) == [] and plan.progress("me")["waiting"] == 50
    wanted = plan.wanted(3)
    assert [(prompt.id, version) for prompt, version in wanted] == [(n, v) for n in ids[:3] for v in versions]
    for prompt, version in wanted[:2]:
        row = {"prompt": prompt.id, "version": version, "sampling": {}, "seed": 0, "text": version.name, "score": None}
        plan.note_answers(store.add_answers([row]))
    assert len(plan.wanted(3)) == 4
    pair = plan.next("me", "tab", 5)
    assert [shown.prompt.id for shown in pair] == ids[:1]
    give(plan, "me", "tie", pair[0].pair)
    assert len(plan.wanted(3)) == 6
    # A prompt from the chat comes before those of the file.
    new = store.add_prompts([[("user", "来自对话")]], 1.0, "chat")
    plan.refresh()
    assert plan.wanted(1)[0][0].id == new[0]
    store.close()
