"""The arithmetic of PPO: pure functions of tensors, torch and nothing else.

Shapes: B responses, T padded response, V vocabulary. `mask` is True on real response tokens (the first EOS included);
values on padding, NaN included, change nothing.
"""

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` over the True entries of `mask`.

    Raises: ValueError where the mask selects nothing (a mean of nothing would be a silent NaN).
    """
    count = mask.sum()
    if count == 0:
        raise ValueError("masked_mean: the mask selects no element")
    return torch.where(mask, x, 0).sum() / count


def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """[3] float64: count, sum and sum of squares over the True entries; add those of all ranks before `moments_of`."""
    real = x[mask].double()
    return torch.stack([torch.tensor(float(real.numel()), device=x.device).double(), real.sum(), (real * real).sum()])


def moments_of(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance (0 for one element) from the count, sum and sum of squares of `masked_moments`."""
    count, total, squares = sums
    # In float64 all along: squares less count * mean^2 cancels where the spread is small beside the mean, and what
    # float32 would leave is rounding. So would a variance below 0.
    mean = total / count
    return mean, ((squares - count * mean * mean) / (count - 1).clamp(min=1)).clamp(min=0)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, moments: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Scale to unit variance over real entries.

        whitened = (x - mean) / sqrt(var + 1e-8), with the unbiased variance; plus the mean again without shift_mean

    Args:
        x: [B, T] float. mask: [B, T] bool. shift_mean: False keeps the mean where it was.
        moments: (mean, var) over all ranks, in place of those of this tensor.
    Returns: [B, T] like x, 0 on padding; a single element is centred only.
    Raises: ValueError where the mask selects nothing.
    """
    if not mask.any():
        raise ValueError("whiten: the mask selects no element")
    mean, var = moments_of(masked_moments(x, mask)) if moments is None else moments
    mean, var = torch.as_tensor(mean, device=x.device), torch.as_tensor(var, device=x.device)
    single = moments is None and int(mask.sum()) == 1
    scale = 1.0 if single else torch.rsqrt(var + 1e-8).to(x.dtype)
    whitened = (x - mean.to(x.dtype)) * scale
    if not shift_mean:
        whitened = whitened + mean.to(x.dtype)
    return torch.where(mask, whitened, 0)


def token_rewards(
    scores: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """Reward of each token: the KL penalty, plus the score on the last real token.

        rewards = -kl_coef * (old_logprobs - ref_logprobs);  rewards[last real token] += score

    Args:
        scores: [B] float32. old_logprobs, ref_logprobs: [B, T] float32, nats. mask: [B, T] bool, no row all False.
    Returns: rewards [B, T] and kl [B, T] (k1, may be negative), both 0 on padding.
    Raises: ValueError for a row without a real token, which has no place for its score.
    Source: Ziegler et al. 2019, arXiv:1909.08593, equation 2.
    """
    if not mask.any(-1).all():
        raise ValueError("token_rewards: a response has no real token")
    # k1 is signed, and its mean under the policy that sampled is the KL itself: cut at 0 it would charge for noise.
    kl = torch.where(mask, old_logprobs - ref_logprobs, 0)
    rewards = -kl_coef * kl
    # A real token counts its place and padding 0, so that the largest entry is the last real token, whatever lies
    # between.
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(-1, keepdim=True)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype)), kl


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over each row's real tokens.

        delta[t] = rewards[t] + gamma * values[t + 1] - values[t];  A[t] = delta[t] + gamma * lam * A[t + 1]

    Args:
        rewards, values: [B, T] float32, score; the value after the last real token is 0. mask: [B, T] bool.
    Returns: advantages (not whitened) and returns = advantages + values, [B, T], 0 on padding.
    Source: Schulman et al. 2016, arXiv:1506.02438, equations 11 and 16.
    """
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # A padded column starts the row afresh: nothing of it reaches the real token before.
        following = torch.where(mask[:, t], delta + gamma * lam * following, 0)
        next_value = values[:, t]
        advantages[:, t] = following
    return advantages, torch.where(mask, advantages + values, 0)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float,
    n_tokens: float | Tensor | None = None, cliprange_high: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Clipped surrogate objective, signed so that lower is better.

        loss = mean over real tokens of max(-A * ratio, -A * clip(ratio, 1 - cliprange, 1 + cliprange_high))

    Args:
        logprobs: [B, T] float32, nats, under the policy being trained (carries the gradient).
        old_logprobs, advantages: [B, T] float32, fixed since the rollout. mask: [B, T] bool.
        n_tokens: denominator of every mean in place of the local token count (1 gives sums, to be divided globally).
        cliprange_high: the bound above, where it is another (Yu et al. 2025, arXiv:2503.14476, section 3.1).
    Returns: the loss (scalar) and {"policykl", "approxkl", "clipfrac", "ratio/mean"} over n_tokens, and "ratio/max".
    Source: Schulman et al. 2017, arXiv:1707.06347, equation 7; estimators k1, k2: joschu.net/blog/kl-approx.html.
    """
    n_tokens = _denominator(mask, n_tokens)
    # Masked before exp: an infinity on padding would turn the gradient of a plain product with the mask into NaN.
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    advantages = torch.where(mask, advantages, 0)
    ratio = log_ratio.exp()
    high = cliprange if cliprange_high is None else cliprange_high
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + high)
    loss = torch.where(mask, torch.maximum(unclipped, clipped), 0).sum() / n_tokens

    with torch.no_grad():
        stats = {
            "policykl": -log_ratio.sum() / n_tokens,
            "approxkl": 0.5 * log_ratio.square().sum() / n_tokens,
            "clipfrac": ((clipped > unclipped) & mask).sum() / n_tokens,
            "ratio/mean": torch.where(mask, ratio, 0).sum() / n_tokens,
            "ratio/max": torch.where(mask, ratio, 0).max(),
        }
    return loss, stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float,
    n_tokens: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Half the squared error of the critic, with steps beyond `cliprange_value` from the old values not rewarded.

        loss = 0.5 * mean over real tokens of max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)

    Args:
        values: [B, T] float32 (carries the gradient). old_values, returns: [B, T] float32. mask: [B, T] bool.
        n_tokens: denominator in place of the local token count.
    Returns: the loss (scalar) and {"value/clipfrac", "value/error"}; error is the mean squared error without clipping.
    Source: the value clipping of the PPO reference code, see Engstrom et al. 2020, arXiv:2005.12729, section 3.
    """
    n_tokens = _denominator(mask, n_tokens)
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    clipped_values = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    unclipped, clipped = (values - returns).square(), (clipped_values - returns).square()
    loss = 0.5 * torch.maximum(unclipped, clipped).sum() / n_tokens
    with torch.no_grad():
        stats = {"value/clipfrac": (clipped > unclipped).sum() / n_tokens, "value/error": unclipped.sum() / n_tokens}
    return loss, stats


def _denominator(mask: Tensor, n_tokens: float | Tensor | None) -> float | Tensor:
    if n_tokens is not None:
        return n_tokens
    count = mask.sum()
    if count == 0:
        raise ValueError("the mask selects no token: a loss over nothing is undefined")
    return count


def token_entropy(logits: Tensor) -> Tensor:
    """[...] float32, nats: entropy of each distribution of logits [..., V]; suppressed tokens (-inf) contribute 0."""
    logprobs = logits.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0)).sum(-1)


def masked_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean entropy in nats over real tokens of logits [B, T, V]; suppressed tokens (-inf) contribute 0, never NaN."""
    return masked_mean(token_entropy(logits), mask)


# Rows of logits that are in float32 at a time, whatever their dtype.
ROWS_AT_ONCE = 256


class _SelectiveLogprobs(torch.autograd.Function):
    """Log-probabilities of chosen ids; backward makes the softmax anew in place of keeping it.

    d logprob / d logits = onehot(id) - softmax(logits)
    """

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(logits, ids)
        parts = zip(logits.split(ROWS_AT_ONCE), ids.split(ROWS_AT_ONCE), strict=True)
        return torch.cat([part.float().log_softmax(-1).gather(-1, own[:, None])[:, 0] for part, own in parts])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        logits, ids = ctx.saved_tensors
        out = torch.empty_like(logits)
        pieces = (tensor.split(ROWS_AT_ONCE) for tensor in (logits, ids[:, None], grad[:, None], out))
        for part, own, weight, target in zip(*pieces, strict=True):
            probs = part.float().softmax(-1)
            # In place over one piece: the softmax becomes -weight * softmax, plus the weight at the id itself.
            target.copy_(probs.mul_(-weight).scatter_add_(-1, own, weight))
        return out, None


def selective_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each id, in float32; no second tensor of the logits' size is held until backward.

        logprob = logits[id] - logsumexp(logits)

    Args:
        logits: [..., V] any float dtype. ids: [...] long.
    Returns: [...] float32, nats; differentiable once.
    """
    return _SelectiveLogprobs.apply(logits.flatten(0, -2), ids.flatten()).view_as(ids)


def group_advantages(scores: Tensor, group_size: int, kind: str, scale_by_std: bool = True) -> Tensor:
    """Advantages without a critic, from several answers to one prompt.

        rloo: score - mean of the other scores of its group;  grpo: (score - group mean) / (group std + 1e-4)

    Args:
        scores: [B] float32, the `group_size` answers to a prompt next to each other. kind: "rloo" or "grpo".
        scale_by_std: False leaves out grpo's division, which favours very easy and very hard prompts.
    Returns: [B] float32.
    Raises: ValueError where B is no multiple of group_size, group_size < 2, or the kind is unknown.
    Source: Ahmadian et al. 2024, arXiv:2402.14740; Shao et al. 2024, arXiv:2402.03300; Liu et al. 2025, 2503.20783.
    """
    if group_size < 2 or len(scores) % group_size:
        raise ValueError(f"group_advantages: {len(scores)} scores do not form groups of {group_size} (at least 2)")
    groups = scores.view(-1, group_size)
    if kind == "rloo":
        others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
        return (groups - others).flatten()
    if kind == "grpo":
        # Where all scores of a group are equal the deviation is 0, and the 1e-4 below keeps 0 / 0 from being NaN.
        centred = groups - groups.mean(1, keepdim=True)
        return (centred / (groups.std(1, keepdim=True) + 1e-4) if scale_by_std else centred).flatten()
    raise ValueError(f"group_advantages: unknown kind {kind!r}, use rloo or grpo")


class FixedKLController:
    """A constant KL penalty per nat."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, kl: float, n_steps: int) -> None:
        """Does nothing: the price is fixed."""


class AdaptiveKLController:
    """A KL penalty per nat that rises while the KL is over its target and falls while it is under.

        error = clip(kl / target - 1, -0.2, 0.2);  value *= 1 + error * n_steps / horizon

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: int):
        if target <= 0 or horizon <= 0:
            raise ValueError("AdaptiveKLController: target and horizon must be positive")
        self.value, self.target, self.horizon = init_kl_coef, target, horizon

    def update(self, kl: float, n_steps: int) -> None:
        """Move the price after `n_steps` responses whose mean KL (nats a response) was `kl`."""
        # `n_steps` and the horizon both count responses, so that the price moves alike however the batch is cut.
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon
