"""Several reward models at once: their scores made comparable, combined, and how far they disagree.

Shapes: K members, B responses. torch and nothing else.
Source: Coste et al. 2023, arXiv:2310.02743 (minimum, mean minus spread); Zhai et al. 2024, arXiv:2401.00243 (members
that are LoRA adapters of one base).
"""

import torch
from torch import Tensor

# Ways to combine members, as --reward_ensemble has them.
COMBINATIONS = ("mean", "min", "mean_minus_std")


def standardised(scores: Tensor, means: Tensor, stds: Tensor) -> Tensor:
    """Each member's scores in units of its own spread: (score - mean) / (std + 1e-8).

    Args:
        scores: [K, B] float32. means, stds: [K], of the members on one set of answers.
    """
    # Without this a member with a larger scale would be the mean, and never the least.
    return (scores - means[:, None]) / (stds[:, None] + 1e-8)


def spread(scores: Tensor) -> Tensor:
    """[B]: standard deviation over the members of scores [K, B], with K - 1 below; 0 for one member."""
    # torch's deviation of one number is NaN.
    return scores.std(0) if len(scores) > 1 else torch.zeros_like(scores[0])


def combined(scores: Tensor, how: str, penalty: float = 1.0) -> Tensor:
    """One score a response.

        mean    mean over members;  min    the least;  mean_minus_std    mean - penalty * spread

    Args:
        scores: [K, B] float32, comparable with each other. penalty: of mean_minus_std alone.
    Returns: [B] float32; with one member its scores, whatever `how` is.
    Raises: ValueError for a combination that is none of COMBINATIONS.
    """
    if how == "mean":
        return scores.mean(0)
    if how == "min":
        return scores.min(0).values
    if how == "mean_minus_std":
        return scores.mean(0) - penalty * spread(scores)
    raise ValueError(f"--reward_ensemble {how!r} is none of {', '.join(COMBINATIONS)}")
