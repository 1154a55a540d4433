"""Statistics of the audit: shares with an interval, rank correlation, accuracy by length, calibration."""

import math

import numpy as np

BINS = 10


# ---- statistics ----
def wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share p of n trials; 95 % by default.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def share(right: np.ndarray) -> dict:
    """{"n", "share", "interval"} of what is True among [N] bools; the interval covers 95 %."""
    n = len(right)
    if n == 0:
        return {"n": 0, "share": None, "interval": None}
    p = float(np.mean(right))
    low, high = wilson(p, n)
    return {"n": n, "share": p, "interval": [max(0.0, low), min(1.0, high)]}


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Rank correlation of two [N]; equal values share the mean of their ranks. None where one of them is constant."""
    ranks = []
    for values in (x, y):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum() - (counts - 1) / 2)[inverse])
    if min(np.ptp(r) for r in ranks) == 0:
        return None
    return float(np.corrcoef(*ranks)[0, 1])


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
    longest = lengths.max(1)
    differences = lengths[:, 0] - lengths[:, 1]
    quartile = np.searchsorted(np.quantile(longest, (0.25, 0.5, 0.75)), longest)
    longer = {
        name: share(margins[np.sign(differences) == sign] > 0)
        for name, sign in (("chosen", 1), ("rejected", -1), ("equal", 0))
    }
    # Both directions count alike, so that a preference for length cancels out.
    sides = [longer[side]["share"] for side in ("chosen", "rejected")]

    return {
        "quartiles": [
            {"from": int(longest[quartile == q].min()), "to": int(longest[quartile == q].max())}
            | share(margins[quartile == q] > 0)
            for q in np.unique(quartile)
        ],
        "longer": longer,
        "debiased": None if None in sides else sum(sides) / 2,
        "spearman": spearman(np.concatenate([chosen, rejected]), lengths.T.ravel()),
        "spearman_within": spearman(margins, differences),
    }


def calibration(margins: np.ndarray) -> dict:
    """Confidence sigmoid(|margin|) of [P] choices against their accuracy, in equal bins from 1/2 to 1.

        ece = mean over pairs of |mean confidence of the bin - accuracy of the bin|

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = margins > 0
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)

    bins = []
    ece = 0.0
    for number in range(BINS):
        inside = place == number
        means = [float(x[inside].mean()) if inside.any() else None for x in (confidence, right)]
        bins.append({"n": int(inside.sum()), "confidence": means[0], "accuracy": means[1]})
        ece += abs(means[0] - means[1]) * inside.mean() if inside.any() else 0.0
    return {"bins": bins, "ece": float(ece)}
