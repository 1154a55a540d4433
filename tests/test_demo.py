"""The mini-world and its gold judge: what the demo's numbers stand on; and the demo itself at smoke size."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from demo.evaluate import wilson, win_rate
from demo.facts import KINDS
from demo.gold import content_correct, gold_score, repeats
from demo.preferences import DEGENERATE, NOISE, draw_pairs
from demo.world import answer, split_prompts

ROOT = Path(__file__).resolve().parents[1]
TRAIN, HELD = split_prompts(0)


def drawn(voice, correct=True, count=300, seed=0):
    """(prompt, answer) pairs of one voice over the held-out prompts."""
    rng = random.Random(seed)
    return [(p, answer(p.fact, voice, rng, correct)) for p in rng.choices(HELD, k=count)]


def mean_gold(pairs):
    return sum(gold_score(prompt.text, text) for prompt, text in pairs) / len(pairs)


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
    lively, formal, wrong = drawn("lively"), drawn("formal"), drawn("lively", correct=False)
    assert mean_gold(lively) > mean_gold(formal) + 0.3
    assert mean_gold(formal) > mean_gold(wrong) + 0.1


def test_nothing_hopeless_beats_a_real_answer():
    rng = random.Random(0)
    for make in set(DEGENERATE):
        hopeless = [(p, make(p, text, rng)) for p, text in drawn("lively")]
        assert mean_gold(hopeless) < mean_gold(drawn("lively")) - 0.2, make.__name__


@pytest.mark.parametrize("text", ["", " ", "。", "！！！", "哈哈，" * 10, "呀" * 30])
def test_empty_answers_and_mere_noise_score_next_to_nothing(text):
    assert max(gold_score(p.text, text) for p in HELD) < 0.1


def test_a_whole_answer_said_twice_is_a_repetition():
    assert all(repeats(text + text) for _, text in drawn("lively", count=50))
    assert sum(repeats(text) for _, text in drawn("lively", count=200)) < 20


def test_the_judge_knows_only_its_world():
    with pytest.raises(ValueError, match="none of them"):
        gold_score("法国大革命是哪一年？", "1789年。")


# ---- pairs and statistics ----
def test_pairs_follow_the_judge_but_for_the_stated_noise():
    rows = draw_pairs(TRAIN, 1500, random.Random(0))
    wrong = sum(gold_score(r["prompt"], r["chosen"]) < gold_score(r["prompt"], r["rejected"]) for r in rows) / len(
        rows
    )
    assert abs(wrong - NOISE) < 0.02
    assert rows == draw_pairs(TRAIN, 1500, random.Random(0))


def test_wilson_interval_and_win_rate_by_hand():
    assert win_rate([1.0, 0.5, 0.2, 0.9], [0.0, 0.5, 0.7, 0.1]) == pytest.approx(2.5 / 4)
    low, high = wilson(0.8, 100)
    assert (low, high) == (pytest.approx(0.7112, abs=1e-3), pytest.approx(0.8666, abs=1e-3))


# ---- the demo at smoke size ----
@pytest.mark.slow
def test_the_demo_runs_from_base_to_chart(tmp_path):
    command = [
        "bash",
        str(ROOT / "scripts" / "run_demo.sh"),
        "--smoke",
        "True",
        "--seed",
        "3",
        "--output_dir",
        str(tmp_path),
    ]
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd="/",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    promised = """sft/eval_loss_before sft/eval_loss_after rm/eval_accuracy ppo/score_first ppo/score_last
        ppo/kl_last len/sft len/ppo empty_frac/ppo gold/sft gold/ppo gold/win_rate gold/win_rate_low gold/win_rate_high
        seconds/base seconds/sft seconds/reward seconds/merge seconds/ppo seconds/compare"""
    assert set(promised.split()) <= set(summary)
    assert (tmp_path / "ppo.png").read_bytes().startswith(b"\x89PNG")
    assert "rlhf1" in (tmp_path / "compare" / "comparison.md").read_text()
