"""Ensembles, best of n and length calibration against loops and enumeration."""

import math
from itertools import combinations, pairwise

import pytest
import torch

from rlhf.reward import best_of_n, ensemble
from rlhf.reward.length_calibration import FEWEST, fit_length_calibration


# ---- ensembles ----
def test_members_are_combined_as_a_loop_would():
    torch.manual_seed(0)
    scores = torch.randn(4, 6)
    for b in range(6):
        members = scores[:, b].tolist()
        mean = sum(members) / 4
        std = math.sqrt(sum((score - mean) ** 2 for score in members) / 3)
        assert ensemble.combined(scores, "mean")[b].item() == pytest.approx(mean, abs=1e-6)
        assert ensemble.combined(scores, "min")[b].item() == min(members)
        assert ensemble.combined(scores, "mean_minus_std", 0.5)[b].item() == pytest.approx(mean - 0.5 * std, abs=1e-6)
        assert ensemble.spread(scores)[b].item() == pytest.approx(std, abs=1e-6)
    means, stds = torch.tensor([1.0, -1, 0, 5]), torch.tensor([2.0, 1, 0.5, 3])
    assert torch.allclose(ensemble.standardised(scores, means, stds)[1], scores[1] + 1)
    with pytest.raises(ValueError, match="none of mean, min, mean_minus_std"):
        ensemble.combined(scores, "median")


@pytest.mark.parametrize("how", ensemble.COMBINATIONS)
def test_one_member_is_itself(how):
    scores = torch.randn(1, 5)
    assert torch.equal(ensemble.combined(scores, how), scores[0])
    assert torch.equal(ensemble.spread(scores), torch.zeros(5))


# ---- best of n ----
@pytest.mark.parametrize("ties", [False, True])
def test_the_estimator_equals_the_mean_over_all_subsets(ties):
    torch.manual_seed(1)
    scores, judged = torch.randn(3, 6), torch.randn(3, 6)
    if ties:
        scores = scores.round()
    for n in range(1, 7):
        for p in range(3):
            values = []
            for subset in combinations(range(6), n):
                best = max(scores[p, i].item() for i in subset)
                chosen = [i for i in range(6) if scores[p, i].item() == best]
                # By chance among equals: each of the whole tie counts alike.
                values.append(sum(judged[p, i].item() for i in chosen) / len(chosen))
            found = best_of_n.best_of_n(scores, judged, n)[p].item()
            assert found == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert best_of_n.kl_of_best(1) == 0
    assert best_of_n.kl_of_best(64) == pytest.approx(math.log(64) - 63 / 64)
    with pytest.raises(ValueError, match="the best of 7 needs 1 to 6 answers"):
        best_of_n.best_weights(6, 7)


def test_a_score_that_follows_the_judge_up_to_a_point_is_found_out():
    torch.manual_seed(2)
    scores = torch.randn(200, 64)
    sizes = (1, 2, 4, 8, 16, 32, 64)
    honest = scores + torch.randn(200, 64)
    assert best_of_n.turning_point(scores, honest, sizes) is None
    # What the score likes most is bad: the judge falls where the score is over 1.
    hacked = torch.where(scores > 1, -3.0, scores)
    assert best_of_n.turning_point(scores, hacked, sizes) in (1, 2, 4)
    rows = best_of_n.curve(scores, hacked, sizes)
    assert [row["n"] for row in rows] == list(sizes)
    assert all(later["score"] > row["score"] for row, later in pairwise(rows))
    # The best of all 64 is always one that the judge dislikes.
    assert rows[0]["judged_half"] > rows[-1]["judged_half"] == 0


# ---- length ----
def ranks(x: torch.Tensor) -> torch.Tensor:
    return x.argsort().argsort().double()


def rank_correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()


def test_what_length_adds_is_taken_out_and_the_rest_stays():
    torch.manual_seed(3)
    lengths = torch.randint(5, 300, (600,))
    worth = torch.randn(600)
    # Not a line: it rises fast and levels off.
    scores = worth + 3 * (lengths / 40.0).sqrt()
    assert rank_correlation(lengths, scores) > 0.6
    calibration = fit_length_calibration(lengths, scores)
    calibrated = scores - calibration.correction(lengths)
    assert abs(rank_correlation(lengths, calibrated)) < 0.1
    assert torch.corrcoef(torch.stack([calibrated, worth]))[0, 1] > 0.95
    assert calibrated.mean().item() == pytest.approx(scores.mean().item(), abs=1e-4)


def test_beyond_the_data_the_end_value_stays_and_too_little_data_is_refused():
    lengths = torch.arange(10, 60)
    calibration = fit_length_calibration(lengths, lengths / 10.0)
    ends = calibration.correction(torch.tensor([0, 10, 59, 1000]))
    assert ends[0] == ends[1]
    assert ends[2] == ends[3]
    # On a line the local lines are that line.
    assert calibration.correction(torch.tensor([30, 40])).diff().item() == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(ValueError, match=f"needs {FEWEST} held-out answers, there are 3"):
        fit_length_calibration(torch.tensor([1, 2, 3]), torch.ones(3))
    with pytest.raises(ValueError, match="all have 7 tokens"):
        fit_length_calibration(torch.full((30,), 7), torch.randn(30))
