"""The mini-world, its gold judge, the pairs drawn from it, and the demo's promises."""

import json
import random
from types import SimpleNamespace

import pytest

from demo.evaluate import win_rate
from demo.facts import KINDS
from demo.gold import content_correct, gold_score, repeats
from demo.hardening import GATE_WINS, LOSS, table
from demo.pairs import careless_pairs
from demo.preferences import DEGENERATE, NOISE, draw_pairs
from demo.story import kept
from demo.world import answer, split_prompts
from rlhf.reward.degenerate import GATE_KINDS
from rlhf.reward.degenerate import KINDS as ATTACKS
from rlhf.reward.statistics import wilson

TRAIN, HELD = split_prompts(0)


def drawn(voice, correct=True, count=300, seed=0):
    """(prompt, answer) pairs of one voice over the held-out prompts."""
    rng = random.Random(seed)
    prompts = rng.choices(HELD, k=count)
    return [(prompt, answer(prompt.fact, voice, rng, correct)) for prompt in prompts]


def mean_gold(pairs):
    scores = [gold_score(prompt.text, text) for prompt, text in pairs]
    return sum(scores) / len(pairs)


# ---- the world ----
def test_there_are_a_thousand_prompts_of_five_kinds_and_200_are_held_out():
    assert len(TRAIN) + len(HELD) >= 1000
    assert len(HELD) >= 200
    assert len(KINDS) >= 5
    assert {p.fact.kind for p in HELD} == set(KINDS)


def test_no_held_out_prompt_is_trained_on_but_every_fact_of_it_is():
    assert not {p.text for p in TRAIN} & {p.text for p in HELD}
    assert {p.fact for p in HELD} <= {p.fact for p in TRAIN}


def test_the_seed_settles_the_split_and_another_seed_changes_it():
    assert split_prompts(0) == (TRAIN, HELD)
    assert split_prompts(1) != (TRAIN, HELD)


# ---- the gold judge ----
@pytest.mark.parametrize("voice", ["formal", "plain", "lively", "mixed"])
def test_right_answers_are_right_and_wrong_ones_wrong_in_every_voice(voice):
    assert all(content_correct(p.text, text) for p, text in drawn(voice))
    assert not any(content_correct(p.text, text) for p, text in drawn(voice, correct=False))


def test_lively_and_right_beats_stiff_and_right_beats_lively_and_wrong():
    lively = drawn("lively")
    formal = drawn("formal")
    wrong = drawn("lively", correct=False)
    # By much, so that noise in the pairs leaves the order as it is.
    assert mean_gold(lively) > mean_gold(formal) + 0.3
    assert mean_gold(formal) > mean_gold(wrong) + 0.1


def test_no_kind_of_degenerate_answer_beats_real_ones():
    rng = random.Random(0)
    for make in set(DEGENERATE):
        degenerate = [(prompt, make(prompt, text, rng)) for prompt, text in drawn("lively")]
        # In the mean: now and then a cut answer is a good one still.
        assert mean_gold(degenerate) < mean_gold(drawn("lively")) - 0.2, make.__name__


@pytest.mark.parametrize("text", ["", " ", "。", "！！！", "哈哈，" * 10, "呀" * 30])
def test_empty_answers_and_mere_noise_score_next_to_nothing(text):
    assert max(gold_score(p.text, text) for p in HELD) < 0.1


def test_a_whole_answer_said_twice_is_a_repetition():
    assert all(repeats(text + text) for _, text in drawn("lively", count=50))
    # A real answer may repeat five characters of a long slot.
    assert sum(repeats(text) for _, text in drawn("lively", count=200)) < 20


def test_the_gold_judge_knows_only_its_world():
    with pytest.raises(ValueError, match="none of them"):
        gold_score("法国大革命是哪一年？", "1789年。")


# ---- pairs and statistics ----
def better(row):
    """Return True if the gold judge prefers the chosen answer of a pair."""
    return gold_score(row["prompt"], row["chosen"]) > gold_score(row["prompt"], row["rejected"])


def test_pairs_follow_the_gold_judge_but_for_the_stated_noise():
    rows = draw_pairs(TRAIN, 1500, random.Random(0))
    wrong = sum(not better(row) for row in rows)
    assert abs(wrong / len(rows) - NOISE) < 0.02
    # The seed settles them.
    assert rows == draw_pairs(TRAIN, 1500, random.Random(0))


def test_wilson_interval_and_win_rate_by_hand():
    assert win_rate([1.0, 0.5, 0.2, 0.9], [0.0, 0.5, 0.7, 0.1]) == pytest.approx(2.5 / 4)
    low, high = wilson(0.8, 100)
    assert (low, high) == (pytest.approx(0.7112, abs=1e-3), pytest.approx(0.8666, abs=1e-3))


# ---- hardening ----
def measured(careless_empty=0.7, accuracy=0.95, **shares):
    """Metrics of both versions of one seed; `shares` are those of the hardened one that are not 0.99."""
    careless = {f"audit/{kind}": 0.7 for kind in ATTACKS}
    careless |= {"audit/empty": careless_empty, "eval_accuracy": 0.95}
    hardened = {f"audit/{kind}": shares.get(kind, 0.99) for kind in ATTACKS}
    hardened |= {"eval_accuracy": accuracy}
    return {"careless": careless, "hardened": hardened}


def broken_by(*seeds):
    """The broken promises of these seeds' metrics."""
    return table(list(seeds), list(range(len(seeds))))[1]


def test_hardening_keeps_its_promises_on_every_seed_or_names_the_broken_ones():
    # A share of exactly the limit is enough.
    assert broken_by(measured(), measured(cut=0.9, other_answer=0.9, empty=GATE_WINS)) == []
    for kind in (*GATE_KINDS, "cut", "other_answer"):
        assert broken_by(measured(), measured(**{kind: 0.89})) == [f"{kind} wins too often"]
    # Nothing is promised of these.
    assert broken_by(measured(), measured(doubled=0.1, thanks=0.1)) == []
    assert broken_by(measured(careless_empty=0.9)) == ["a careless model passes on empty answers"]


def test_the_clean_accuracy_that_hardening_costs_is_a_mean_over_the_seeds():
    words, broken = table([measured(accuracy=0.95 - 3 * LOSS), measured(accuracy=0.95 + 2 * LOSS)], [3, 4])
    assert words.split()[:4] == ["careless", "3", "careless", "4"]
    assert broken == []
    assert words.splitlines()[-1] == "clean accuracy falls by +0.0050 in the mean"
    # 0.95 - 0.94 is a little more than 0.01 in binary.
    assert broken_by(measured(accuracy=0.94)) == []
    assert broken_by(measured(accuracy=0.93)) == ["clean accuracy falls by 0.020"]


# ---- the other stories ----
def test_careless_pairs_are_short_on_the_chosen_side_and_hold_no_degenerate_answer():
    rows = careless_pairs(TRAIN, 200, random.Random(0))
    assert len(rows) == 200
    assert all(len(row["chosen"]) <= 0.6 * len(row["rejected"]) for row in rows)
    assert all(row["chosen"] and not repeats(row["chosen"]) for row in rows)
    # Noise aside, the chosen ones are the better ones: the lengths are the only trap.
    assert sum(better(row) for row in rows) > 0.8 * len(rows)


def test_what_one_keeps_of_a_guarded_run_is_its_best_only_where_that_is_a_clear_gain(tmp_path):
    versions = {0: {"gold": 0.4}, 2: {"gold": 0.1}}
    gold_judge = SimpleNamespace(look_at=lambda folder: {"gold": 0.6, "folder": folder.name})
    run = tmp_path / "step_2" / "run.json"
    best = tmp_path / "best" / "state.json"
    for file in (run, best):
        file.parent.mkdir()

    # A gain is clear when it is more than twice its error.
    run.write_text(json.dumps({"stage": "ppo", "arguments": {"on_collapse": "rollback"}}))
    for gain, what in ((0.3, "best/ (step 1)"), (0.1, "the SFT model")):
        best.write_text(json.dumps({"best": {"step": 1, "gain": gain, "error": 0.1}}))
        assert kept(tmp_path, 2, gold_judge, versions)["what"] == what

    # Without guards a run is taken as it ends.
    run.write_text(json.dumps({"stage": "ppo", "arguments": {"on_collapse": "off"}}))
    assert kept(tmp_path, 2, gold_judge, versions) == {"what": "the last step", "gold": 0.1}
