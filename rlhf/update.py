"""The update of one PPO batch: epochs, mini-batches, accumulation, early stopping, with denominators over all ranks.

Nothing is wrapped in DDP. Backward accumulates the gradients of *sums* over real tokens; an optimizer step divides
them by the token count of its whole window on all ranks. So neither the mini-batches nor the number of processes
change what is optimised, and every decision is taken on reduced values at a point that all ranks reach.
"""

import copy

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf.ppo import policy_loss, value_loss
from rlhf.roles import Roles
from rlhf.rollout import Rollout, Sampling, response_logprobs

# A window whose mean ratio is beyond this tells more of a broken batch than of a better policy: it is skipped.
MAX_MEAN_RATIO = 10.0
# Sums over real tokens, collected at every backward; divided by the first they are the metrics of the step.
SUMS = ("tokens", "policykl", "approxkl", "clipfrac", "ratio/mean", "loss/policy", "loss/value", "value/clipfrac")


def update(
    roles: Roles,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    sampling: Sampling,
    args,
    accelerator: Accelerator,
    generator: torch.Generator,
) -> dict[str, float]:
    """`args.ppo_epochs` shuffled passes over the batch, training policy adapter and value head only.

    Args:
        rollout: this rank's rows, with advantages and returns. sampling: as it was at sampling.
        args: the flags of the group "update". generator: for the order of the rows; may differ between ranks.
    Returns: means over all real tokens and ranks under the names of SUMS, ratio/max, grad_norm, skipped and epochs.
    Raises: FloatingPointError on a non-finite gradient; parameters and optimizer are then as before the call.
    """
    parameters = list(roles.trainable().values())
    before = snapshot(parameters, optimizer)
    roles.train(True)
    optimizer.zero_grad(set_to_none=True)
    try:
        return _epochs(roles, optimizer, parameters, rollout, sampling, args, accelerator, generator)
    except FloatingPointError:
        restore(parameters, optimizer, before)
        raise
    finally:
        optimizer.zero_grad(set_to_none=True)


def _epochs(roles, optimizer, parameters, rollout, sampling, args, accelerator, generator) -> dict[str, float]:
    totals, window = torch.zeros(2, len(SUMS), device=rollout.mask.device, dtype=torch.float64)
    largest, norms, skipped, pending = [], [], 0, 0
    for epoch in range(args.ppo_epochs):  # noqa: B007 (how far it came is reported)
        start = totals
        for rows in mini_batches(rollout, args.mini_batch_size, args.gradient_accumulation_steps, generator):
            sums, ratio_max = _backward(roles, rollout.rows(rows), sampling, args)
            totals, window, pending = totals + sums, window + sums, pending + 1
            largest.append(ratio_max)
            if pending == args.gradient_accumulation_steps:
                skipped += not _optimizer_step(optimizer, parameters, window, args, accelerator, norms)
                window, pending = torch.zeros_like(window), 0
        # All ranks must leave together, or the next reduction waits forever for the one that left.
        if args.early_stopping and _mean(totals - start, "policykl", accelerator) > 1.5 * args.target_kl:
            pending = 0
            break
    if pending:
        skipped += not _optimizer_step(optimizer, parameters, window, args, accelerator, norms)
    totals = accelerator.reduce(totals, "sum")
    metrics = {name: (totals[i] / totals[0]).item() for i, name in enumerate(SUMS) if name != "tokens"}
    metrics["ratio/max"] = accelerator.gather(torch.stack(largest).max()[None]).max().item()
    return metrics | {"grad_norm": sum(norms) / max(1, len(norms)), "skipped": skipped, "epochs": epoch + 1}


def mini_batches(rollout: Rollout, size: int, accumulation: int, generator: torch.Generator) -> list[Tensor]:
    """Row indices of one epoch: shuffled into optimizer windows, sorted by length within each, where order is free."""
    shuffled = torch.randperm(len(rollout.mask), generator=generator, device=generator.device).to(rollout.mask.device)
    lengths = rollout.query_mask.sum(1) + rollout.mask.sum(1)
    windows = shuffled.split(size * accumulation)
    return [rows for window in windows for rows in window[lengths[window].argsort(stable=True)].split(size)]


def _backward(roles: Roles, part: Rollout, sampling: Sampling, args) -> tuple[Tensor, Tensor]:
    """Add the gradient of one mini-batch's summed loss; returns its SUMS (float64) and its largest ratio."""
    logprobs, hidden = response_logprobs(roles.model, part, sampling)
    policy, stats = policy_loss(logprobs, part.logprobs, part.advantages, part.mask, args.cliprange, n_tokens=1)
    value, value_stats = value_loss(
        roles.values(hidden), part.values, part.returns, part.mask, args.cliprange_value, n_tokens=1
    )
    (policy + args.vf_coef * value).backward()
    found = {**stats, **value_stats, "tokens": part.mask.sum(), "loss/policy": policy, "loss/value": value}
    return torch.stack([found[name].detach().double() for name in SUMS]), stats["ratio/max"]


def _optimizer_step(optimizer, parameters: list[nn.Parameter], window: Tensor, args, accelerator, norms: list) -> bool:
    """One flat all-reduce of gradients and counts, the division by the window's tokens, the step; False if skipped."""
    counts = window[[SUMS.index(name) for name in ("tokens", "ratio/mean", "loss/policy", "loss/value")]].float()
    gradients = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]
    flat = accelerator.reduce(torch.cat([*(g.float() for g in gradients), counts]), "sum")
    gradient, (tokens, ratio, *_) = flat[:-4] / flat[-4], flat[-4:]
    norm = gradient.norm().item()
    if not torch.isfinite(flat).all():
        raise FloatingPointError("a loss or gradient of the PPO update is not finite; nothing of this step was kept")
    norms.append(norm)
    skip = (ratio / tokens).item() > MAX_MEAN_RATIO
    gradient = gradient * min(1.0, args.max_grad_norm / (norm + 1e-6))
    for p, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).to(p.dtype)
    if not skip:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return not skip


def _mean(sums: Tensor, name: str, accelerator: Accelerator) -> float:
    """Mean over real tokens of all ranks of one of SUMS."""
    sums = accelerator.reduce(sums, "sum")
    return (sums[SUMS.index(name)] / sums[0]).item()


def snapshot(parameters: list[nn.Parameter], optimizer) -> tuple[list[Tensor], dict]:
    """Copies of all that an update changes: a few MB of adapter and twice that of optimizer state."""
    state = {
        index: {key: value.clone() if torch.is_tensor(value) else value for key, value in entry.items()}
        for index, entry in optimizer.state_dict()["state"].items()
    }
    return [p.detach().clone() for p in parameters], state


@torch.no_grad()
def restore(parameters: list[nn.Parameter], optimizer, copies: tuple[list[Tensor], dict]) -> None:
    """Put back what `snapshot` copied; the copies stay good for another time."""
    for p, saved in zip(parameters, copies[0], strict=True):
        p.copy_(saved)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": copy.deepcopy(copies[1])})
