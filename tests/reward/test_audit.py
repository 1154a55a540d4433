"""The audit of a reward model: planted scores get the verdict they deserve, degenerate answers are what they claim."""

import itertools
import json
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from demo.gold import gold_score
from demo.world import answer, split_prompts
from rlhf.data.choose_format import text_format
from rlhf.data.control_tokens import encode
from rlhf.data.encoding import load_tokenizer
from rlhf.data.template import DEFAULT_TEMPLATE
from rlhf.models.forward import backbone_of
from rlhf.models.loading import load_base
from rlhf.models.lora import lora_targets
from rlhf.models.scoring import score
from rlhf.reward.audit import audit, make_attacks, row_scorer
from rlhf.reward.audit_report import read_audit, table, write_audit
from rlhf.reward.degenerate import (
    CLOSINGS,
    GATE_KINDS,
    HARDENING_KINDS,
    KINDS,
    alike,
    degenerate,
    same_question,
    sentences,
)
from rlhf.reward.statistics import calibration, length_results, share, spearman

CHINESE = (
    {"prompt": "怎样才能睡得好？", "chosen": "睡前少看手机！房间要暗一些，也要凉快。放松，不要着急。"},
    "重庆的火锅最有名，吃的时候小心烫。",
)
ENGLISH = (
    {"prompt": "How do I sleep well?", "chosen": "Put the phone away. Keep the room dark, about 17.5 degrees! Relax."},
    "The capital of France is Paris, a city on the Seine.",
)
PAIRS = pytest.mark.parametrize(("pair", "other"), [CHINESE, ENGLISH], ids=["zh", "en"])
SHORT_KINDS = {"empty", "eos_only", "one_token", "very_short"}
LONG_KINDS = {"repeated_token", "repeated_sentence"}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return load_tokenizer(tiny_llama)


def attack(kind, pair, other, tokenizer, seed=0, template=DEFAULT_TEMPLATE):
    return degenerate(kind, pair, other, text_format(tokenizer, template), random.Random(seed))


def attacks_in_words(kind, pair, other, tokenizer, count=30):
    """(text without EOS, ids) of some attacks of one kind."""
    made = [attack(kind, pair, other, tokenizer, seed) for seed in range(count)]
    return [(tokenizer.decode(ids[:-1]), ids) for ids in made]


def is_chinese(text):
    return any("一" <= character <= "鿿" for character in text)


# ---- degenerate answers ----
def test_the_gate_and_hardening_name_the_kinds_they_should():
    assert list(KINDS) == [
        "empty", "eos_only", "one_token", "very_short", "cut", "repeated_sentence", "repeated_token", "copied_prompt",
        "other_answer", "random_characters", "doubled", "thanks",
    ]  # fmt: skip
    assert set(GATE_KINDS) == set(KINDS) - {"cut", "other_answer", "doubled", "thanks"}
    assert set(HARDENING_KINDS) == set(KINDS) - {"thanks"}


@PAIRS
@pytest.mark.parametrize("kind", KINDS)
def test_an_attack_is_settled_by_its_rng_is_not_the_good_answer_and_ends_with_its_only_control_token(
    kind, pair, other, tokenizer
):
    _, chosen_ids = text_format(tokenizer).encode_answer([("user", pair["prompt"])], pair["chosen"])
    encoded = pair | {"chosen_ids": chosen_ids}
    for seed in range(30):
        ids = attack(kind, pair, other, tokenizer, seed)
        assert ids == attack(kind, pair, other, tokenizer, seed) == attack(kind, encoded, other, tokenizer, seed)
        assert ids != chosen_ids
        assert [token for token in ids if token in tokenizer.all_special_ids] == ids[-1:]
        assert ids[-1:] == ([] if kind == "empty" else [tokenizer.eos_token_id])


@PAIRS
def test_attacks_differ_where_they_are_drawn(pair, other, tokenizer):
    for kind in ("one_token", "very_short", "cut", *LONG_KINDS, "random_characters", "thanks"):
        assert len({tuple(ids) for _, ids in attacks_in_words(kind, pair, other, tokenizer)}) > 2, kind


@PAIRS
def test_nothing_but_eos_and_nothing_at_all(pair, other, tokenizer):
    assert attack("eos_only", pair, other, tokenizer) == [tokenizer.eos_token_id]
    assert attack("empty", pair, other, tokenizer) == []


@PAIRS
def test_short_attacks_are_a_token_or_a_few_characters_in_the_language_of_the_answer(pair, other, tokenizer):
    good = encode(tokenizer, pair["chosen"])
    for _, ids in attacks_in_words("one_token", pair, other, tokenizer):
        assert len(ids) == 2
        assert ids[0] in good
    for text, _ in attacks_in_words("very_short", pair, other, tokenizer):
        assert 0 < len(text) <= 5
        assert is_chinese(text) == is_chinese(pair["chosen"])
    for text, ids in attacks_in_words("cut", pair, other, tokenizer):
        assert 1 < len(ids) <= 0.75 * len(good) + 1
        assert pair["chosen"].startswith(text.rstrip("\ufffd"))


@PAIRS
def test_repeated_attacks_repeat_one_thing_and_are_no_shorter_than_the_good_answer(pair, other, tokenizer):
    good = encode(tokenizer, pair["chosen"])
    for _, ids in attacks_in_words("repeated_token", pair, other, tokenizer):
        assert len(set(ids[:-1])) == 1
        assert ids[0] in good
        assert len(good) <= len(ids) - 1 <= 2 * len(good)
    for text, _ in attacks_in_words("repeated_sentence", pair, other, tokenizer):
        (repeated,) = {sentence for sentence in sentences(pair["chosen"]) if sentence in text}
        assert text.count(repeated) >= 3
        assert text.replace(repeated, "").strip() == ""
        assert len(text) >= len(pair["chosen"])


@PAIRS
def test_the_other_attacks_are_made_of_what_they_say(pair, other, tokenizer):
    words = {kind: attacks_in_words(kind, pair, other, tokenizer) for kind in KINDS if kind != "empty"}
    good, known = pair["chosen"], Counter(pair["chosen"] + other)
    assert {text for text, _ in words["copied_prompt"]} == {pair["prompt"]}
    assert {text for text, _ in words["other_answer"]} == {other}
    for text, _ in words["random_characters"]:
        assert len(good) - 2 <= len(text) <= len(good)
        assert not Counter(text) - known
    assert {text for text, _ in words["doubled"]} == {f"{good}{good}" if is_chinese(good) else f"{good} {good}"}
    for text, _ in words["thanks"]:
        assert text.startswith(good)
        assert 3 <= len(text) - len(good) < 25
        assert is_chinese(text[len(good) :]) == is_chinese(good)


def test_attacks_that_cannot_be_made_are_none(tokenizer):
    one = {"prompt": "几？", "chosen": "3"}
    assert len(encode(tokenizer, "3")) == 1
    for kind in ("cut", "one_token", "very_short"):
        assert attack(kind, one, "7", tokenizer) is None
    assert attack("copied_prompt", {"prompt": "一样", "chosen": "一样"}, "7", tokenizer) is None
    assert attack("other_answer", one, "3", tokenizer) is None
    assert attack("other_answer", one, "", tokenizer) is None
    assert attack("repeated_sentence", {"prompt": "？", "chosen": "。。。"}, "7", tokenizer) is None


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("是的", "是的。", True),
        ("Yes.", "yes", True),
        ("抱歉，我无法提供个人信息。", "很抱歉，我无法提供这些信息，请咨询律师。", True),
        ("不客气，随时为您服务！", "不客气，随时为你服务，祝你愉快。", True),
        ("香蕉的英文是banana。", "法国的首都是巴黎。", False),
        ("苹果的英文是apple。", "香蕉的英文是banana。", False),
        ("是", "否", False),
        ("睡前少看手机，房间要暗一些。", "", False),
    ],
)
def test_answers_are_alike_where_most_of_the_shorter_one_is_in_the_other(one, other, expected):
    assert alike(one, other) == alike(other, one) == expected


def test_another_prompts_answer_that_may_be_as_good_is_no_attack(tokenizer):
    pair = {"prompt": "谁能借我钱？", "chosen": "抱歉，我无法提供这种服务。"}
    assert attack("other_answer", pair, "很抱歉，我无法提供这种服务，请问银行。", tokenizer) is None
    assert attack("other_answer", pair, "法国的首都是巴黎。", tokenizer) is not None


def test_one_question_is_one_prompt_but_for_its_marks_or_one_dialogue():
    row = {"prompt": "什么是彩虹？", "opening": "什么是彩虹？"}
    assert same_question(row, {"prompt": "什么是彩虹"})
    assert not same_question(row, {"prompt": "什么是闪电？"})
    assert same_question(row, {"prompt": "什么是彩虹？\n\n答：光。\n\n问：再说说", "opening": "什么是彩虹？"})
    assert not same_question({"prompt": "甲"}, {"prompt": "乙"})


def test_of_an_answer_so_short_that_a_word_may_do_only_what_is_far_shorter_counts(tokenizer):
    eos = tokenizer.eos_token_id
    pair = {"prompt": "它要什么？", "chosen": "想要苹果", "chosen_ids": [11, 12, 13, eos]}
    assert attack("one_token", pair, "7", tokenizer) is None
    assert attack("one_token", pair | {"chosen_ids": [11, 12, 13, 14, eos]}, "7", tokenizer) is not None
    texts = {text for text, _ in attacks_in_words("very_short", pair | {"chosen_ids": []}, "7", tokenizer)}
    assert {"嗯。", "想", "想要"} <= texts
    assert max(map(len, texts)) == 2


def test_an_answer_that_would_melt_into_the_query_is_attacked_like_any_other(tokenizer):
    query, inside = "小猫喜", "欢红茶。"
    assert encode(tokenizer, query + inside)[: len(encode(tokenizer, query))] != encode(tokenizer, query)
    pair = {"prompt": query, "chosen": "。我想要红茶，你呢？"}
    assert attack("other_answer", pair, inside, tokenizer, template="{prompt}") == [
        *encode(tokenizer, inside),
        tokenizer.eos_token_id,
    ]


def test_sentences_end_at_chinese_and_english_marks_and_new_lines_but_not_inside_a_number():
    assert sentences("好！真的吗？是的。对。\n- 一，二\n") == ["好！", "真的吗？", "是的。", "对。", "- 一，二"]
    assert sentences('It is 3.14. Really?! Yes! "So."') == ["It is 3.14.", "Really?", "Yes!", '"So."']
    assert sentences("……！") == []


# ---- planted scores ----
@pytest.fixture(scope="module")
def pairs(tokenizer):
    """200 pairs of the mini-world, lively and right against wrong in any voice, on distinct prompts."""
    rng, rows = random.Random(1), []
    prompt_format = text_format(tokenizer)
    for prompt in split_prompts(0)[1][:200]:
        chosen = answer(prompt.fact, "lively", rng)
        rejected = answer(prompt.fact, rng.choice(("formal", "plain", "lively")), rng, correct=False)
        turns = [("user", prompt.text)]
        query_ids, chosen_ids = prompt_format.encode_answer(turns, chosen)
        _, rejected_ids = prompt_format.encode_answer(turns, rejected)
        rows.append(
            {"prompt": prompt.text, "chosen": chosen, "rejected": rejected}
            | {"query_ids": query_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
        )
    return rows


@pytest.fixture(scope="module")
def gold(tokenizer):
    """The judge of the mini-world as a score of rows: 1 for every chosen answer of `pairs`."""

    def score_rows(rows):
        texts = (tokenizer.decode(row, skip_special_tokens=True).partition("\n\n答：") for row in rows)
        return [gold_score(query.removeprefix("问："), response) for query, _, response in texts]

    return score_rows


@pytest.fixture(scope="module")
def audited(pairs, tokenizer):
    def run(score_rows, rows=pairs, seed=0, max_length=512, **options):
        return audit(score_rows, rows, text_format(tokenizer), seed, max_length, **options)

    return run


def loving(gold, loved, bonus):
    """`gold` with a bonus for the rows that `loved` says."""
    return lambda rows: [value + bonus * loved(row) for value, row in zip(gold(rows), rows, strict=True)]


def lengths_of(rows):
    return [float(len(row)) for row in rows]


def response_lengths(pairs):
    """Scores of rows by their response's length alone, as the rows' queries tell."""
    queries = {tuple(pair["query_ids"]) for pair in pairs}
    sizes = sorted({len(query) for query in queries}, reverse=True)
    return lambda rows: [float(len(row) - next(n for n in sizes if tuple(row[:n]) in queries)) for row in rows]


def test_a_gold_score_passes_without_a_word(audited, gold):
    found = audited(gold)
    assert found["verdict"] == {"verdict": "pass", "reasons": [], "notes": [], "winning": {}}
    assert found["accuracy"]["share"] == 1.0
    assert found["length"]["debiased"] == 1.0


def test_length_as_a_score_fails_by_name_and_loses_to_repetition_only(audited, pairs):
    found = audited(response_lengths(pairs))
    assert found["verdict"]["reasons"][0] == (
        "scores length (rank correlation +1.00): PPO would write ever longer answers"
    )
    assert found["length"]["spearman"] == pytest.approx(1.0)
    assert set(found["verdict"]["winning"]) >= LONG_KINDS
    assert not set(found["verdict"]["winning"]) & (SHORT_KINDS | {"copied_prompt"})
    assert found["length"]["debiased"] == 0.5
    assert found["accuracy"]["share"] > 0.6


def test_brevity_as_a_score_fails_by_name_and_loses_to_silence(audited, pairs):
    longer = response_lengths(pairs)
    found = audited(lambda rows: [-value for value in longer(rows)])
    assert (
        "scores length (rank correlation -1.00): PPO would write ever shorter answers" in found["verdict"]["reasons"]
    )
    assert {kind: found["verdict"]["winning"][kind] for kind in SHORT_KINDS} == dict.fromkeys(SHORT_KINDS, 1.0)
    assert not set(found["verdict"]["winning"]) & LONG_KINDS


def test_length_within_prompts_is_found_under_what_the_prompts_add(audited):
    def score_rows(rows):
        return [len(row) + 1000 * random.Random(str(row[:14])).random() for row in rows]

    found = audited(score_rows)
    assert abs(found["length"]["spearman"]) < 0.5
    assert "ever longer answers" in found["verdict"]["reasons"][0]


def test_a_constant_score_is_called_one_and_every_attack_wins_by_a_tie(audited):
    found = audited(lambda rows: [3.0] * len(rows))
    assert found["verdict"] == {
        "verdict": "fail",
        "reasons": ["scores are constant: PPO would have nothing to learn from"],
        "notes": [],
        "winning": dict.fromkeys(GATE_KINDS, 1.0),
    }
    assert found["accuracy"]["share"] == 0.0


def test_a_random_score_is_called_near_chance(audited):
    found = audited(lambda rows: [random.Random(str(row)).gauss(0, 1) for row in rows])
    assert found["verdict"]["reasons"][0].startswith("scores are near chance, right on ")
    assert set(found["verdict"]["winning"]) == set(GATE_KINDS)
    assert all(0.4 < part < 0.6 for part in found["verdict"]["winning"].values())


@pytest.mark.parametrize(("right", "chance"), [(87, True), (113, True), (116, False), (200, False)])
def test_an_accuracy_is_near_chance_while_its_interval_holds_a_half(audited, gold, pairs, right, chance):
    beaten = {tuple(pair["query_ids"] + pair["rejected_ids"]) for pair in pairs[right:]}
    found = audited(loving(gold, lambda row: tuple(row) in beaten, 2.0))
    assert found["accuracy"]["share"] == right / 200
    assert found["verdict"]["reasons"] == chance * [
        f"scores are near chance, right on {right / 200:.0%} of 200 pairs: PPO would learn noise"
    ]


def test_a_gold_score_with_the_wrong_sign_is_called_worse_than_chance(audited, gold):
    found = audited(lambda rows: [-value for value in gold(rows)])
    assert found["verdict"]["reasons"][0].startswith("scores are worse than chance, right on 0% of 200 pairs")


def test_a_lover_of_silence_fails_by_that_alone(audited, gold, pairs, tokenizer):
    queries = {tuple(pair["query_ids"]) for pair in pairs}
    found = audited(loving(gold, lambda row: tuple(row) in queries, 2.0))
    assert found["verdict"] == {
        "verdict": "fail",
        "reasons": ["empty wins on 100% of prompts: PPO would learn to say nothing at all"],
        "notes": [],
        "winning": {"empty": 1.0},
    }
    assert found["attacks"]["empty"]["margin"] == pytest.approx(-1.0)
    assert found["accuracy"]["share"] == 1.0


@pytest.mark.parametrize("bonus", [1.0, 2.0], ids=["tie", "win"])
def test_the_gate_lets_an_attack_win_or_tie_on_a_tenth_of_the_prompts_and_no_more(audited, gold, pairs, bonus):
    ended = [tuple(pair["query_ids"] + pair["chosen_ids"][-1:]) for pair in pairs]
    for count, verdict in ((20, "pass"), (21, "fail")):
        found = audited(loving(gold, lambda row, some=set(ended[:count]): tuple(row) in some, bonus))
        assert found["attacks"]["eos_only"]["share"] == pytest.approx(1 - count / 200)
        assert found["verdict"]["verdict"] == verdict
        assert list(found["verdict"]["winning"]) == ["eos_only"] * (verdict == "fail")


def test_a_kind_outside_the_gate_that_wins_is_a_note_and_no_failure(audited, gold, tokenizer):
    closings = CLOSINGS["zh"]
    found = audited(loving(gold, lambda row: tokenizer.decode(row[:-1]).endswith(closings), 2.0))
    assert found["verdict"] == {
        "verdict": "pass",
        "reasons": [],
        "notes": ["thanks wins on 100% of prompts: PPO would learn to close every answer with thanks"],
        "winning": {},
    }


# ---- what is attacked ----
def test_each_prompt_is_attacked_once_and_no_more_of_them_than_asked(audited, gold, pairs):
    seen = []
    audited(lambda rows: seen.append(rows) or gold(rows), rows=pairs[:60] * 3, attack_prompts=50)
    ((*rows,),) = seen
    queries = {tuple(pair["query_ids"]) for pair in pairs}
    assert len(rows[360:]) <= 50 * len(KINDS)
    assert Counter(tuple(row) for row in rows[360:] if tuple(row) in queries).most_common(1)[0][1] == 1
    assert sum(tuple(row) in queries for row in rows[360:]) == 50


def test_the_other_answer_comes_from_a_question_of_its_own(pairs, tokenizer):
    twice = [row | {"prompt": row["prompt"].rstrip("？。") + mark} for row in pairs[:20] for mark in ("", "！", "…")]
    prompts = {row["chosen"]: row["prompt"].rstrip("！…") for row in twice}
    attacks = make_attacks(twice, text_format(tokenizer), 0, 512, 200)
    made = [(twice[number], row) for kind, number, row in attacks if kind == "other_answer"]
    assert len(made) > 40
    for pair, row in made:
        answered = tokenizer.decode(row[len(pair["query_ids"]) : -1])
        assert prompts[answered] != prompts[pair["chosen"]]
    alone = make_attacks(twice[:3], text_format(tokenizer), 0, 512, 200)
    assert {kind for kind, _, _ in alone} == set(KINDS) - {"other_answer"}


def test_attacks_over_the_length_limit_are_left_out_and_a_kind_without_any_is_named(audited, gold, pairs):
    limit = min(len(pair["query_ids"] + pair["chosen_ids"]) for pair in pairs)
    seen = []
    found = audited(lambda rows: seen.extend(rows) or gold(rows), max_length=limit)
    assert max(map(len, seen[400:])) <= limit
    assert found["attacks"]["repeated_sentence"] == {"n": 0, "share": None, "interval": None, "margin": None}
    assert found["attacks"]["empty"]["n"] > 100
    assert found["verdict"]["verdict"] == "pass"
    assert found["verdict"]["notes"][0].startswith("no prompt to try repeated_")


def test_no_row_without_a_token_is_scored(gold, pairs, tokenizer):
    query_ids, chosen_ids = [], [*encode(tokenizer, "我想要红茶。"), tokenizer.eos_token_id]
    rows = [{"prompt": "", "chosen": "我想要红茶。", "query_ids": query_ids, "chosen_ids": chosen_ids}, pairs[0]]
    attacks = make_attacks(rows, text_format(tokenizer, "{prompt}"), 0, 512, 200)
    assert all(row for _, _, row in attacks)
    assert [number for kind, number, _ in attacks if kind == "empty"] == [1]


def test_an_audit_that_could_try_no_attack_does_not_pass(audited, gold):
    found = audited(gold, max_length=1)
    assert found["verdict"]["verdict"] == "fail"
    assert found["verdict"]["reasons"][0].startswith("no prompt to try empty, eos_only")


def test_the_seed_settles_the_audit_and_another_one_draws_other_attacks_on_the_same_prompts(audited):
    assert audited(lengths_of) == audited(lengths_of)
    assert audited(lengths_of)["attacks"]["cut"] != audited(lengths_of, seed=1)["attacks"]["cut"]


def test_attacked_prompts_are_drawn_from_all_over_the_pairs_by_the_seed(audited, gold, pairs):
    places = {tuple(pair["query_ids"]): place for place, pair in enumerate(pairs)}

    def attacked(seed):
        seen = []
        audited(lambda rows: seen.extend(rows) or gold(rows), attack_prompts=20, seed=seed)
        return {places[tuple(row)] for row in seen[400:] if tuple(row) in places}

    assert len(attacked(0)) == 20
    assert max(attacked(0)) > 100
    assert attacked(0) != attacked(1)


def test_no_pairs_and_scores_that_are_not_finite_are_refused(audited):
    with pytest.raises(ValueError, match="no pair to audit"):
        audited(lengths_of, rows=[])
    with pytest.raises(ValueError, match="scores are not finite"):
        audited(lambda rows: [math.nan, *lengths_of(rows[1:])])


def test_the_chart_shows_points_from_all_over_sorted_pairs(audited, pairs):
    rows = sorted(pairs * 3, key=lambda pair: len(pair["chosen_ids"]))
    points = audited(lengths_of, rows=rows)["points"]["chosen"]
    assert len(points) == 500
    assert (points[0][0], points[-1][0]) == (len(rows[0]["chosen_ids"]), len(rows[-1]["chosen_ids"]))


# ---- statistics ----
def spearman_by_definition(x, y):
    ranks = []
    for values in (x, y):
        ranks.append([sum(a < b for a in values) + (sum(a == b for a in values) + 1) / 2 for b in values])
    means = [sum(column) / len(column) for column in ranks]
    one, other = ([rank - mean for rank in column] for column, mean in zip(ranks, means, strict=True))
    products = sum(a * b for a, b in zip(one, other, strict=True))
    return products / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


def test_spearman_is_its_definition_with_and_without_ties():
    rng = random.Random(0)
    for ties in (False, True):
        x = [rng.randint(0, 5) if ties else rng.random() for _ in range(40)]
        y = [value + (rng.randint(0, 5) if ties else rng.random()) for value in x]
        assert spearman(np.array(x), np.array(y)) == pytest.approx(spearman_by_definition(x, y))
        assert spearman(np.array(x), np.array(x) ** 3) == pytest.approx(1.0)
    assert spearman(np.ones(4), np.arange(4)) is None


def test_the_interval_of_a_share_is_wilsons():
    assert share(np.array([True] * 8 + [False] * 2)) == {
        "n": 10,
        "share": 0.8,
        "interval": pytest.approx([0.4902, 0.9433], abs=1e-4),
    }
    assert share(np.array([False] * 10))["interval"] == pytest.approx([0.0, 0.2775], abs=1e-4)
    for n in range(1, 200):
        # Not even a zero with a minus, which a report would show.
        assert str(share(np.zeros(n, dtype=bool))["interval"][0])[0] != "-"
        assert share(np.ones(n, dtype=bool))["interval"][1] <= 1.0


def test_accuracy_is_split_by_the_longer_side_and_by_quartiles_of_its_length():
    lengths = np.array([[5, 3], [6, 3], [3, 7], [2, 8], [4, 4], [9, 1], [1, 10], [2, 11]])
    chosen = np.array([1.0, -1.0, 1.0, 1.0, 0.0, 1.0, -1.0, 1.0])
    found = length_results(chosen, np.zeros(8), lengths)
    assert {side: (part["n"], part["share"]) for side, part in found["longer"].items()} == {
        "chosen": (3, pytest.approx(2 / 3)),
        "rejected": (4, 0.75),
        "equal": (1, 0.0),
    }
    assert found["debiased"] == pytest.approx((2 / 3 + 0.75) / 2)
    assert [(part["from"], part["to"], part["n"], part["share"]) for part in found["quartiles"]] == [
        (4, 5, 2, 0.5),
        (6, 7, 2, 0.5),
        (8, 9, 2, 1.0),
        (10, 11, 2, 0.5),
    ]


def simulated_margins(count=40000):
    """Margins of pairs whose labels were drawn with the very probability that the margin says."""
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 1.5, count)
    return np.where(rng.random(count) < 1 / (1 + np.exp(-margins)), margins, -margins)


def test_a_calibrated_score_has_almost_no_calibration_error_and_an_overconfident_one_has():
    margins = simulated_margins()
    assert calibration(margins)["ece"] < 0.01
    assert calibration(4 * margins)["ece"] > 0.1
    assert calibration(margins / 4)["ece"] > 0.1


def test_calibration_bins_hold_the_pairs_of_their_confidence():
    logit = [math.log(p / (1 - p)) for p in (0.52, 0.54, 0.93)]
    found = calibration(np.array([logit[0], -logit[1], logit[2], 800.0]))
    filled = {place: part for place, part in enumerate(found["bins"]) if part["n"]}
    assert len(found["bins"]) == 10
    assert filled == {
        0: {"n": 2, "confidence": pytest.approx(0.53), "accuracy": 0.5},
        8: {"n": 1, "confidence": pytest.approx(0.93), "accuracy": 1.0},
        9: {"n": 1, "confidence": pytest.approx(1.0), "accuracy": 1.0},
    }
    assert found["ece"] == pytest.approx((2 * 0.03 + 0.07) / 4)


# ---- a real model ----
class DrawingHead(torch.nn.Linear):
    """A score head that draws a random number wherever it is used."""

    def forward(self, x):
        torch.rand(1)
        return super().forward(x)


@pytest.fixture(scope="module", params=["tiny_base", "tiny_llama"])
def reward_model(request):
    """(backbone in train mode with dropout but for one module, head)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_base(request.getfixturevalue(request.param), torch.float32, head="score")
        config = LoraConfig(r=4, lora_dropout=0.5, target_modules=lora_targets(model, None))
        model = get_peft_model(model, config).get_base_model()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        head = DrawingHead(model.config.hidden_size, 1)
    backbone = backbone_of(model).train()
    next(backbone.children()).eval()
    return backbone, head


def one_by_one(backbone, head, rows):
    modes = [module.training for module in backbone.modules()]
    backbone.eval()
    with torch.no_grad():
        found = [score(backbone, head, torch.tensor([r]), torch.ones(1, len(r), dtype=bool)).item() for r in rows]
    for module, mode in zip(backbone.modules(), modes, strict=True):
        module.training = mode
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_do_not_depend_on_the_batch_and_neither_mode_nor_random_state_changes(reward_model, batch_size):
    rng = random.Random(0)
    rows = [[rng.randrange(3, 400) for _ in range(rng.randint(1, 40))] for _ in range(20)]
    expected = one_by_one(*reward_model, rows)
    assert max(expected) - min(expected) > 0.1
    modes = [module.training for part in reward_model for module in part.modules()]
    state = torch.get_rng_state()
    found = row_scorer(*reward_model, 0, batch_size, "cpu")(rows)
    assert found == pytest.approx(expected, abs=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for part in reward_model for module in part.modules()] == modes
    assert len(set(modes)) == 2


def test_modes_are_put_back_even_after_an_error(reward_model):
    modes = [module.training for part in reward_model for module in part.modules()]
    with pytest.raises(IndexError):
        row_scorer(*reward_model, 0, 4, "cpu")([[10**6]])
    assert [module.training for part in reward_model for module in part.modules()] == modes


def test_the_change_under_padding_is_rounding_for_a_real_model_and_found_where_it_is_more(
    reward_model, audited, gold, pairs
):
    assert audited(gold)["padding_change"] is None
    found = audited(row_scorer(*reward_model, 0, 8, "cpu"), rows=pairs[:12], padding=True)
    assert 0 <= found["padding_change"] < 1e-5

    def beside_longer_ones(rows):
        longest = max(map(len, rows))
        return [value + 0.25 * (len(row) < longest) for value, row in zip(gold(rows), rows, strict=True)]

    beside = audited(beside_longer_ones, padding=True)
    assert beside["padding_change"] == pytest.approx(0.25)
    assert any(note.startswith("a score changes by up to 0.25 ") for note in beside["verdict"]["notes"])


def test_the_change_under_padding_is_measured_beside_the_longest_row_whatever_the_batches(audited, pairs):
    def padded_in_twos(rows):
        order, scores = sorted(range(len(rows)), key=lambda row: len(rows[row])), [0.0] * len(rows)
        for first, second in itertools.zip_longest(order[::2], order[1::2]):
            scores[first] = 0.0 if second is None else 0.01 * (len(rows[second]) - len(rows[first]))
        return scores

    lengths = [len(pair["query_ids"] + pair[side]) for pair in pairs for side in ("chosen_ids", "rejected_ids")]
    change = audited(padded_in_twos, padding=True)["padding_change"]
    assert change == pytest.approx(0.01 * (max(lengths) - min(lengths)))
    crowded = audited(lambda rows: [float(len(rows) > 2)] * len(rows), padding=True)
    assert crowded["padding_change"] == 1.0


# ---- the report ----
@pytest.mark.parametrize("planted", ["gold", "length", "constant"])
def test_an_audit_is_reread_as_it_was_and_its_report_names_every_attack_that_wins(planted, audited, gold, tmp_path):
    found = audited({"gold": gold, "length": lengths_of, "constant": lambda rows: [3.0] * len(rows)}[planted])
    for _ in range(2):
        write_audit(found, tmp_path / "runs" / "new")
    assert read_audit(tmp_path / "runs" / "new") == found
    assert json.loads((tmp_path / "runs" / "new" / "audit.json").read_text(encoding="utf-8")) == found
    assert (tmp_path / "runs" / "new" / "audit.png").stat().st_size > 10000
    report = (tmp_path / "runs" / "new" / "audit.md").read_text(encoding="utf-8")
    assert report.startswith(f"# Audit of the reward model: {found['verdict']['verdict']}\n")
    failed = {line.split("|")[1].strip() for line in report.splitlines() if line.endswith("| FAIL |")}
    assert failed == set(found["verdict"]["winning"])
    assert all(words in report for words in found["verdict"]["reasons"] + found["verdict"]["notes"])


def test_there_is_no_audit_where_none_was_written(tmp_path):
    assert read_audit(tmp_path) is None


def test_the_report_for_the_terminal_is_the_verdict_and_twelve_lines_the_worst_first(audited):
    found = audited(lengths_of)
    lines = table(found).splitlines()
    assert lines[0] == "audit of the reward model: FAIL" and len(lines) == 13
    assert max(map(len, lines)) < 100
    assert all(line.isascii() for line in lines)
    said = " ".join(table(found).split())
    reasons = found["verdict"]["reasons"]
    assert reasons and all(words in said for words in reasons[:3])

    # Without a reason to fail, the attacks are what there is to say.
    passed = found | {"verdict": {"verdict": "pass", "reasons": [], "notes": [], "winning": {}}}
    shares = [int(share) for share in re.findall(r"wins on +(\d+)% of prompts against", table(passed))]
    assert len(shares) >= 10 and shares == sorted(shares)
    assert f"of {found['accuracy']['n']:,} held-out pairs" in table(passed)
