"""Numbers of the results, each against two plain loops or against a count by hand."""

import itertools
import random

import pytest

from rlhf.page.results import outcomes, results
from rlhf.reward.statistics import wilson


def vote(pair: int, person: str, choice: str, first=("sft", "short", 0.0), second=("ppo", "longer", 1.0)) -> dict:
    row = {"pair": pair, "person": person, "choice": choice, "turns": f'[["user", "{pair}"]]', "margin": None}
    for side, (version, text, score) in (("first", first), ("second", second)):
        row |= {f"{side}_version": version, f"{side}_adapter": version, f"{side}_text": text, f"{side}_score": score}
    return row


def test_wins_losses_and_ties_are_counted_for_every_pair_of_versions():
    said = ["first"] * 2 + ["second"] * 5 + ["tie", "bad", "skip"]
    votes = [vote(number, "me", choice) for number, choice in enumerate(said)]
    # The same two versions the other way round: one more win of ppo.
    votes.append(vote(90, "me", "first", ("ppo", "a", None), ("sft", "b", None)))
    votes.append(vote(91, "me", "second", ("base", "a", None), ("sft", "b", None)))
    found = {(row["first"], row["second"]): row for row in results(votes)["pairs"]}
    row = found["ppo", "sft"]
    assert [row[name] for name in ("wins", "losses", "ties", "bad", "n")] == [6, 2, 1, 1, 10]
    assert row["share"] == 0.7
    assert row["interval"] == pytest.approx(wilson(0.7, 10))
    assert found["base", "sft"]["losses"] == 1 and len(found) == 2


def test_two_answers_count_once_however_many_people_voted():
    votes = [vote(1, person, "second") for person in "abcde"] + [vote(2, "a", "first")]
    row = results(votes)["pairs"][0]
    assert (row["wins"], row["losses"], row["n"]) == (1, 1, 2)
    alone = results(votes, "b")
    assert alone["votes"] == 1 and alone["pairs"][0]["n"] == 1
    assert [person["name"] for person in alone["people"]] == list("abcde")


def test_the_majority_decides_and_a_draw_decides_nothing():
    votes = [vote(1, "a", "first"), vote(1, "b", "first"), vote(1, "c", "second")]
    votes += [vote(2, "a", "first"), vote(2, "b", "second")]
    # The same texts in the other order are the same pair.
    votes += [vote(3, "a", "tie"), vote(3, "b", "tie"), vote(3, "c", "first")]
    turned = vote(1, "d", "second", ("ppo", "longer", 1.0), ("sft", "short", 0.0))
    found = outcomes([*votes, turned])
    assert [(outcome.choice, outcome.contradicted) for outcome in found] == [
        ("first", True), (None, True), ("tie", False),
    ]  # fmt: skip
    assert found[0].said == ["first", "first", "second", "first"]


def test_agreement_is_the_share_of_couples_that_say_the_same():
    draw = random.Random(0)
    votes = []
    parts = []
    for pair in range(40):
        said = [draw.choice(("first", "second", "tie", "bad")) for _ in range(draw.randint(1, 4))]
        votes += [vote(pair, f"person {number}", choice) for number, choice in enumerate(said)]
        couples = list(itertools.combinations(["tie" if choice == "bad" else choice for choice in said], 2))
        if couples:
            parts.append(sum(a == b for a, b in couples) / len(couples))
    found = results(votes)["agreement"]
    assert found["n"] == len(parts)
    assert found["share"] == pytest.approx(sum(parts) / len(parts))


def test_the_reward_model_agrees_where_it_scores_the_preferred_answer_higher():
    votes = [vote(number, "me", "second") for number in range(3)] + [vote(3, "me", "first"), vote(4, "me", "tie")]
    votes.append(vote(5, "me", "first", ("sft", "a", 1.0), ("ppo", "b", 1.0)))
    votes.append(vote(6, "me", "first", ("sft", "a", None), ("ppo", "b", 1.0)))
    found = results(votes)["reward"]
    assert (found["n"], found["share"]) == (5, 0.6)


@pytest.mark.parametrize(("longer", "warned"), [(9, True), (6, False)])
def test_a_warning_comes_where_the_longer_answer_mostly_wins(longer, warned):
    votes = [vote(number, "me", "second" if number < longer else "first") for number in range(10)]
    found = results(votes)["length"]
    assert found["longer"]["share"] == longer / 10
    assert found["winners"] == pytest.approx((6 * longer + 5 * (10 - longer)) / 10)
    assert found["losers"] == pytest.approx((5 * longer + 6 * (10 - longer)) / 10)
    assert found["warning"] == warned


def test_versions_of_one_name_are_told_apart_by_their_adapter():
    other = vote(2, "me", "first")
    other["first_adapter"] = "0123456789"
    names = {row["second"] for row in results([vote(1, "me", "first"), other])["pairs"]}
    assert names == {"sft (sft)", "sft (012345)"}


def test_no_votes_are_no_numbers():
    found = results([])
    assert found["pairs"] == [] and found["length"]["winners"] is None and found["agreement"]["share"] is None
