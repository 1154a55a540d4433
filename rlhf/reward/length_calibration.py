"""Taking length out of a reward model's score, after it was trained: score - what its length alone predicts.

The prediction is a local linear regression of the score on the answer's length (tokens), because the influence of
length is not a line; outside the data the value at its end counts.
Source: Huang et al. 2024, arXiv:2409.17407; Cleveland 1979, JASA 74:829-836 (locally weighted regression).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Share of the answers that a local line is fitted to, places where it is evaluated, and answers that it needs.
SHARE = 0.3
PLACES = 40
FEWEST = 20


@dataclass(frozen=True)
class LengthCalibration:
    """Predicted score at each of some rising lengths, and the mean that stays in the score."""

    lengths: list[float]
    predicted: list[float]
    mean: float

    def correction(self, lengths: Tensor) -> Tensor:
        """[B] float32: what to subtract from the scores of answers of lengths [B]; 0 in the mean over the fit."""
        x = torch.tensor(self.lengths, dtype=torch.float64)
        y = torch.tensor(self.predicted, dtype=torch.float64)
        # Outside of what was seen the value at the end holds: a line drawn on would reward ever longer answers.
        at = lengths.detach().cpu().double().clamp(x[0], x[-1])
        right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
        left = right - 1
        part = (at - x[left]) / (x[right] - x[left])
        value = y[left] + part * (y[right] - y[left])
        return (value - self.mean).float().to(lengths.device)


def fit_length_calibration(lengths: Tensor, scores: Tensor) -> LengthCalibration:
    """Fit the prediction to answers of lengths [N] (tokens) and scores [N].

    Raises: ValueError where there are too few answers, or where all are of one length.
    """
    x, order = lengths.cpu().double().sort()
    y = scores.cpu().double()[order]
    if len(x) < FEWEST:
        raise ValueError(f"length calibration needs {FEWEST} held-out answers, there are {len(x)}")
    # At quantiles, so that as many answers lie between any two places; equal lengths give one place.
    places = torch.quantile(x, torch.linspace(0, 1, PLACES, dtype=torch.float64)).unique()
    if len(places) < 2:
        raise ValueError(f"length calibration needs answers of several lengths, all have {x[0]:.0f} tokens")

    predicted = [_local_line(x, y, place) for place in places.tolist()]
    calibration = LengthCalibration(places.tolist(), predicted, 0.0)
    # Taken out is what length adds to the mean answer, not the score's own level.
    return LengthCalibration(places.tolist(), predicted, calibration.correction(x).double().mean().item())


def _local_line(x: Tensor, y: Tensor, place: float) -> float:
    """The value at `place` of a line fitted to its nearest neighbours, the nearer the heavier (tricube weights)."""
    count = max(FEWEST // 2, int(SHARE * len(x)))
    distance = (x - place).abs()
    # Beyond the neighbours, so that the farthest of them still counts; all may be of one length.
    width = distance.kthvalue(min(count, len(x))).values * 1.001 + 1e-9
    weight = (1 - (distance / width).clamp(max=1) ** 3) ** 3
    mean_x = (weight * x).sum() / weight.sum()
    mean_y = (weight * y).sum() / weight.sum()
    variance = (weight * (x - mean_x) ** 2).sum()
    # Neighbours of one length have no slope, and their mean is the value.
    slope = (weight * (x - mean_x) * (y - mean_y)).sum() / variance if variance > 1e-9 else 0.0
    return float(mean_y + slope * (place - mean_x))
