"""Best of n: what a policy that trusts this reward model will find, without training one.

Of N answers to a prompt the best of n is the one that the reward model likes most among n of them; what somebody else
says of that answer tells whether the reward model can be trusted that far. All subsets of size n count, none is drawn:

    value(n) = sum over i of  C(i - 1, n - 1) / C(N, n)  judged[i]        answers in rising order of their score

Choosing the best of n moves as far from the policy as KL(n) = log n - (n - 1) / n nats.
Source: Stiennon et al. 2020, arXiv:2009.01325 (best of n); Nakano et al. 2021, arXiv:2112.09332, appendix I (the
estimator over all subsets); Hilton and Gao 2022, openai.com/research/measuring-goodharts-law (the KL).
"""

import math

import torch
from torch import Tensor


def kl_of_best(n: int) -> float:
    """Nats between the best of n and a single draw."""
    return math.log(n) - (n - 1) / n


def best_weights(count: int, n: int) -> Tensor:
    """[count] float64: the share of the subsets of size n whose best is the answer of that rank, worst first.

    Raises: ValueError where n is not between 1 and `count`.
    """
    if not 1 <= n <= count:
        raise ValueError(f"the best of {n} needs 1 to {count} answers a prompt")
    subsets = math.comb(count, n)
    # In whole numbers up to the division: binomials of 64 answers are beyond a float's digits.
    return torch.tensor([math.comb(rank, n - 1) / subsets for rank in range(count)], dtype=torch.float64)


def best_of_n(scores: Tensor, judged: Tensor, n: int) -> Tensor:
    """[P] float64: what is said of the best of n, expected over all subsets of each prompt's N answers.

    Args:
        scores: [P, N], what chooses; ties are broken by chance, so equal scores share their weight.
        judged: [P, N], what the chosen answer is worth to somebody else (or `scores` themselves).
    """
    weights = best_weights(scores.shape[1], n).to(scores.device).expand(scores.shape)
    # Stable, so that ties stand in one order on every machine.
    ordered, order = scores.sort(dim=1, stable=True)
    values = judged.double().gather(1, order)
    # The answers of one tie stand next to each other: each gets the mean of what the others are worth.
    same = ordered[:, :, None] == ordered[:, None, :]
    values = (same * values[:, None, :]).sum(2) / same.sum(2)
    return (weights * values).sum(1)


def curve(scores: Tensor, judged: Tensor, sizes: tuple[int, ...]) -> list[dict[str, float]]:
    """For each n: KL, mean score and mean judged value of the best, and the 95 % half-widths over prompts.

    The gain over a single answer has an interval of its own: prompts differ more than what is chosen for them.

    Args:
        scores, judged: [P, N] of P prompts. sizes: the n.
    Returns: rows of n, kl, and of score and judged each: itself, _half, _gain, _gain_half.
    """
    rows = []
    single = {"score": scores.double().mean(1), "judged": judged.double().mean(1)}
    for n in sizes:
        row = {"n": n, "kl": kl_of_best(n)}
        for name, values in (("score", scores), ("judged", judged)):
            each = best_of_n(scores, values, n)
            row |= {name: each.mean().item(), f"{name}_half": _half_width(each)}
            # Prompt by prompt, so that how much prompts differ cancels.
            gains = each - single[name]
            row |= {f"{name}_gain": gains.mean().item(), f"{name}_gain_half": _half_width(gains)}
        rows.append(row)
    return rows


def _half_width(values: Tensor) -> float:
    """Half of the 95 % interval of the mean of [P] values."""
    return 1.96 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0


def turning_point(scores: Tensor, judged: Tensor, sizes: tuple[int, ...]) -> int | None:
    """The n up to which the judged value still grows, where it falls afterwards beyond chance; None: it never does.

    A fall counts where the paired difference over prompts is more than two standard errors below 0 at a larger n.
    """
    each = {n: best_of_n(scores, judged, n) for n in sizes}
    best = max(sizes, key=lambda n: each[n].mean().item())
    for n in sizes:
        if n <= best or len(each[n]) < 2:
            continue
        # Paired over prompts, for the same reason.
        difference = each[n] - each[best]
        if difference.mean() < -2 * difference.std() / math.sqrt(len(difference)):
            return best
    return None
