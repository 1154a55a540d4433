"""Statistics of the audit: shares with an interval, rank correlation, length, calibration, change under padding."""

import math
from collections.abc import Callable, Sequence

import numpy as np

# Scores of rows of token ids, in the order of the rows.
ScoreRows = Callable[[list[list[int]]], Sequence[float]]

# Bins of confidence that calibration is measured in.
BINS = 10

# Points of each side that the chart shows.
POINTS = 500

# Rows on which the change under padding is measured.
PADDING_ROWS = 16


# ---- shares and ranks ----
def wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share p of n trials; 95 % by default.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    # Wilson's interval and not p plus or minus: that one is empty where nothing, or everything, was right.
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (centre - spread) / scale, (centre + spread) / scale


def share(right: np.ndarray) -> dict:
    """{"n", "share", "interval"} of what is True among [N] bools; the interval covers 95 %."""
    n = len(right)
    if n == 0:
        return {"n": 0, "share": None, "interval": None}

    p = float(np.mean(right))
    low, high = wilson(p, n)
    # Rounding can carry an end of the interval just outside [0, 1].
    interval = [max(0.0, low), min(1.0, high)]
    return {"n": n, "share": p, "interval": interval}


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Rank correlation of two [N]; equal values share the mean of their ranks. None where one of them is constant."""
    ranks = []
    for values in (x, y):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        last = counts.cumsum()
        # A value that occurs k times takes k ranks, of which its last one is the highest.
        mean_rank = last - (counts - 1) / 2
        ranks.append(mean_rank[inverse])

    if min(np.ptp(r) for r in ranks) == 0:
        return None
    return float(np.corrcoef(*ranks)[0, 1])


# ---- length and calibration ----
def length_results(chosen: np.ndarray, rejected: np.ndarray, lengths: np.ndarray) -> dict:
    """Accuracy by length, and how far the score is length.

    Args:
        chosen, rejected: [P] scores. lengths: [P, 2] tokens of the two responses.
    Returns:
        quartiles: accuracy by the length of the longer response. longer: accuracy by which side is longer.
        debiased: mean of the accuracies where the chosen and where the rejected side is longer: 1/2 for length alone.
        spearman: of score and length over all responses. spearman_within: of their differences within the pairs.
    """
    margins = chosen - rejected

    # A pair belongs to a quartile by its longer response. A quartile may be empty where many lengths are equal.
    longest = lengths.max(1)
    edges = np.quantile(longest, (0.25, 0.5, 0.75))
    quartile = np.searchsorted(edges, longest)
    quartiles = []
    for number in np.unique(quartile):
        inside = quartile == number
        bounds = {"from": int(longest[inside].min()), "to": int(longest[inside].max())}
        quartiles.append(bounds | share(margins[inside] > 0))

    # A score that grows with length alone is right where the chosen answer is longer, and wrong where it is shorter.
    differences = lengths[:, 0] - lengths[:, 1]
    longer = {}
    for name, sign in (("chosen", 1), ("rejected", -1), ("equal", 0)):
        inside = np.sign(differences) == sign
        longer[name] = share(margins[inside] > 0)

    # Both directions count alike, so that a preference for length cancels out.
    sides = [longer[side]["share"] for side in ("chosen", "rejected")]
    debiased = None if None in sides else sum(sides) / 2

    scores = np.concatenate([chosen, rejected])
    return {
        "quartiles": quartiles,
        "longer": longer,
        "debiased": debiased,
        "spearman": spearman(scores, lengths.T.ravel()),
        "spearman_within": spearman(margins, differences),
    }


def calibration(margins: np.ndarray) -> dict:
    """Confidence sigmoid(|margin|) of [P] choices against their accuracy, in equal bins from 1/2 to 1.

        ece = mean over pairs of |mean confidence of the bin - accuracy of the bin|

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    # A margin is the log-odds that the chosen answer is the better one.
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = margins > 0
    place = ((confidence - 0.5) * 2 * BINS).astype(int)
    # A confidence of exactly 1 belongs to the last bin.
    place = np.minimum(place, BINS - 1)

    # Each bin's part of the error weighs as much as it has pairs.
    bins = []
    ece = 0.0
    for number in range(BINS):
        inside = place == number
        if not inside.any():
            bins.append({"n": 0, "confidence": None, "accuracy": None})
            continue

        mean_confidence = float(confidence[inside].mean())
        accuracy = float(right[inside].mean())
        bins.append({"n": int(inside.sum()), "confidence": mean_confidence, "accuracy": accuracy})
        ece += abs(mean_confidence - accuracy) * inside.mean()
    return {"bins": bins, "ece": float(ece)}


# ---- numbers of scores ----
def moments(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "std": float(values.std())}


def points(lengths: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> dict[str, list]:
    """[tokens, score] of up to POINTS answers of each side, for the chart.

    Args:
        lengths: [P, 2] tokens of the two responses. chosen, rejected: [P] scores.
    """
    # Spread over all pairs: a caller may have sorted them by length.
    shown = np.unique(np.linspace(0, len(lengths) - 1, POINTS).astype(int))
    sides = {}
    for side, (name, scores) in enumerate((("chosen", chosen), ("rejected", rejected))):
        sides[name] = [[int(lengths[pair, side]), round(float(scores[pair]), 6)] for pair in shown]
    return sides


def padding_change(score_rows: ScoreRows, rows: list[list[int]]) -> float:
    """The largest difference between the score of a row alone and beside others, the longest row among them."""
    by_length = sorted(rows, key=len)
    count = min(PADDING_ROWS, len(rows))
    places = np.linspace(0, len(rows) - 1, count).astype(int)
    picked = [by_length[place] for place in places]
    longest = by_length[-1]

    # The longest row beside it gives a row the most padding; all of them together are an ordinary batch.
    alone = np.array([score_rows([row])[0] for row in picked])
    beside_longest = np.array([score_rows([row, longest])[0] for row in picked])
    together = np.array(score_rows(picked))
    changes = [np.abs(alone - scores).max() for scores in (beside_longest, together)]
    return float(max(changes))
