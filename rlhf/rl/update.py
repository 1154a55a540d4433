"""The update of one PPO batch: epochs, mini-batches, accumulation, early stopping, with denominators over all ranks.

Nothing is wrapped in DDP. Backward accumulates the gradients of *sums* over real tokens; an optimizer step divides
them by the token count of its whole window on all ranks. So neither the mini-batches nor the number of processes
change what is optimised, and every decision is taken on reduced values at a point that all ranks reach.
"""

import signal
from collections.abc import Iterator
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import Adafactor

from rlhf.models.forward import scatter_by_mask
from rlhf.models.generation import Rollout, Sampling
from rlhf.models.rollouts import by_tokens
from rlhf.models.shards import mesh_of, missing
from rlhf.ppo import policy_loss, value_loss
from rlhf.rl.roles import Roles, response_hidden, response_logprobs
from rlhf.rl.state import copy_weights, restore_weights
from rlhf.run.stopping import Interrupted, explain_out_of_memory, received

# A window whose mean ratio is beyond this comes from a broken batch, not from a better policy: it is skipped.
MAX_MEAN_RATIO = 10.0

# Sums over real tokens, collected at every backward; divided by the first they are the metrics of the step.
SUMS = ("tokens", "policykl", "approxkl", "clipfrac", "ratio/mean", "loss/policy", "loss/value", "value/clipfrac")


def make_optimizer(args, roles: Roles) -> torch.optim.Optimizer:
    """Adam (or Adafactor) over policy adapter and critic."""
    trained = list(roles.trainable().values())
    if args.adafactor:
        return Adafactor(trained, lr=args.learning_rate, scale_parameter=False, relative_step=False, warmup_init=False)
    return torch.optim.Adam(trained, lr=args.learning_rate, eps=1e-5, fused=trained[0].device.type == "cuda")


def update(
    roles: Roles,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    sampling: Sampling,
    args,
    accelerator: Accelerator,
    generator: torch.Generator,
    critic_only: bool = False,
) -> dict[str, float]:
    """Train the policy adapter and the critic, if there is one, in `args.ppo_epochs` shuffled passes over the batch.

    Args:
        rollout: this rank's rows, with advantages and (for a critic) returns. sampling: as it was at sampling.
        args: the flags of the group "update". generator: for the order of the rows; may differ between ranks.
        critic_only: leave the policy as it is (--critic_warmup_steps).
    Returns: means over all real tokens and ranks under the names of SUMS, ratio/max, grad_norm, skipped and epochs.
    Raises: FloatingPointError on a non-finite gradient, Interrupted on a signal to any process; parameters and
        optimizer are then as before the call.
    """
    # The copies are for an update that ends half way.
    learner = Learner(roles, optimizer, sampling, args, accelerator, critic_only)
    everything = list(roles.trainable().values())
    before = copy_weights(everything, optimizer)

    # Only train() lets gradient checkpointing work; dropout is off in either mode.
    roles.train(True)
    optimizer.zero_grad(set_to_none=True)
    try:
        return learner.epochs(rollout, generator)
    except (FloatingPointError, Interrupted):
        # Some optimizer steps of this batch may be done already.
        restore_weights(everything, optimizer, before)
        raise
    finally:
        optimizer.zero_grad(set_to_none=True)


class Learner:
    """One update in progress: the open window's sums, and what the optimizer steps so far have seen."""

    def __init__(self, roles: Roles, optimizer, sampling: Sampling, args, accelerator: Accelerator, critic_only: bool):
        self.roles = roles
        self.optimizer = optimizer
        self.sampling = sampling
        self.args = args
        self.accelerator = accelerator
        self.critic_only = critic_only
        trained = roles.critic() if critic_only else roles.trainable()
        self.parameters = list(trained.values())
        # What bounds a backward pass, for whoever has too little memory.
        self.bound = "--tokens_per_backward" if args.tokens_per_backward else "--mini_batch_size"
        # SUMS of the open window; in float64 many small terms add up without loss.
        self.window = torch.zeros(len(SUMS), device=accelerator.device, dtype=torch.float64)
        # Norm of each optimizer step's gradient, largest ratio of each backward.
        self.norms: list[float] = []
        self.largest: list[Tensor] = []
        # Mini-batches in the open window, and windows that were skipped.
        self.pending = 0
        self.skipped = 0

    def epochs(self, rollout: Rollout, generator: torch.Generator) -> dict[str, float]:
        """Make all passes over the batch, or fewer with early stopping; returns the metrics of `update`."""
        args = self.args
        totals = torch.zeros_like(self.window)

        for epoch in range(args.ppo_epochs):  # noqa: B007 (how far it came is reported)
            start = totals
            batches = mini_batches(rollout, args.mini_batch_size, args.gradient_accumulation_steps, generator)
            while batches:
                # Those up to the next optimizer step, which the epoch before may have begun.
                due = args.gradient_accumulation_steps - self.pending
                for part in self.parts(rollout, batches[:due]):
                    with explain_out_of_memory("the update", part.input_ids.shape, self.bound):
                        totals = totals + self.backward(part)
                self.pending += len(batches[:due])
                batches = batches[due:]
                if self.pending == args.gradient_accumulation_steps:
                    self.step()
            # All ranks must leave together, or the next reduction waits forever for the one that left.
            if args.early_stopping and self.mean(totals - start, "policykl") > 1.5 * args.target_kl:
                self.pending = 0
                break

        # The last window may be smaller than the others.
        if self.pending:
            self.step()
        return self.metrics(totals) | {"skipped": self.skipped, "epochs": epoch + 1}

    def parts(self, rollout: Rollout, batches: list[Tensor]) -> Iterator[Rollout]:
        """The rows of each backward pass of some mini-batches: their own, or cut by --tokens_per_backward."""
        limit = self.args.tokens_per_backward
        spare = 0
        if limit:
            lengths = rollout.query_mask.sum(1) + rollout.mask.sum(1)
            batches = by_tokens(torch.cat(batches), lengths, limit)
            spare = missing(mesh_of(self.roles.model), len(batches))
        for rows in batches:
            yield rollout.rows(rows)

        # Of a base in shards all processes make as many: nothing is learnt from a row that counts nowhere.
        for _ in range(spare):
            row = rollout.rows(torch.zeros(1, dtype=torch.long, device=rollout.mask.device))
            yield replace(row, learn=torch.zeros_like(row.mask))

    def metrics(self, totals: Tensor) -> dict[str, float]:
        """Means over real tokens of all ranks of SUMS, the largest ratio, and the mean gradient norm."""
        totals = self.accelerator.reduce(totals, "sum")
        # Of nothing but masked answers every sum is 0.
        totals[0] = totals[0].clamp(min=1)
        means = {name: (totals[i] / totals[0]).item() for i, name in enumerate(SUMS) if name != "tokens"}
        largest = torch.stack(self.largest).max()
        means["ratio/max"] = self.accelerator.gather(largest[None]).max().item()
        if self.roles.value_head is None:
            means = {name: value for name, value in means.items() if "value" not in name}

        # Mean over the optimizer steps of this batch, before clipping.
        norm = sum(self.norms) / max(1, len(self.norms))
        return means | {"grad_norm": norm}

    def backward(self, part: Rollout) -> Tensor:
        """Add the gradient of one mini-batch's summed loss; returns its SUMS (float64)."""
        args = self.args
        critic = self.roles.value_head is not None
        own_critic = critic and self.roles.value_adapter

        # 1. The policy's loss; with critic_only just for the metrics, without a graph.
        with torch.set_grad_enabled(not self.critic_only):
            logprobs, hidden = response_logprobs(self.roles.model, part, self.sampling)
            given = logprobs, part.logprobs, part.advantages, part.learnt, args.cliprange
            loss, stats = policy_loss(*given, n_tokens=1, cliprange_high=args.cliprange_high)
        stats |= {"tokens": part.learnt.sum(), "loss/policy": loss}

        # 2. The value loss of a head on the policy's hidden states goes through the same graph.
        if critic and not own_critic:
            stats |= self.value_sums(hidden, part)
            loss = loss + args.vf_coef * stats["loss/value"]
        if loss.requires_grad:
            loss.backward()

        # 3. A critic with an adapter of its own has a pass of its own.
        if own_critic:
            # Backward while this adapter is the active one: recomputed layers would otherwise use the policy's.
            with self.roles.use("value") as model:
                hidden = response_hidden(model, part)
                stats |= self.value_sums(hidden, part)
                value_term = args.vf_coef * stats["loss/value"]
                value_term.backward()

        # 4. The sums stay on the device: reading them here would wait for the GPU at every mini-batch.
        self.largest.append(stats["ratio/max"])
        nothing = torch.zeros((), device=part.mask.device)
        sums = torch.stack([stats.get(name, nothing).detach().double() for name in SUMS])
        self.window = self.window + sums
        return sums

    def value_sums(self, hidden: Tensor, part: Rollout) -> dict[str, Tensor]:
        """The value loss of one mini-batch as a sum over its tokens, and its statistics."""
        values = scatter_by_mask(self.roles.values(hidden), part.mask)
        loss, stats = value_loss(values, part.values, part.returns, part.learnt, self.args.cliprange_value, n_tokens=1)
        return {**stats, "loss/value": loss}

    def step(self) -> None:
        """One flat all-reduce of gradients and counts, the division by the window's tokens, the optimizer's step."""
        # 1. One reduction for all: each would be a synchronisation. A signal rides along, so that all processes learn
        # of it at the same point.
        names = ("tokens", "ratio/mean", "loss/policy", "loss/value")
        places = [SUMS.index(name) for name in names]
        counts = torch.cat([self.window[places].float(), self.signal()])
        gradients = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in self.parameters]
        flat = torch.cat([*(g.float() for g in gradients), counts])
        flat = self.accelerator.reduce(flat, "sum")
        if flat[-1] > 0:
            raise Interrupted(received() or signal.SIGTERM)

        # 2. The gradient of the mean over the window's real tokens on all ranks. The losses are in `flat` for the
        # check that they are finite.
        # A window of nothing but masked answers has none.
        tokens = flat[-len(counts)].clamp(min=1)
        ratio = flat[1 - len(counts)]
        gradient = flat[: -len(counts)] / tokens
        norm = gradient.norm().item()
        if not torch.isfinite(flat).all():
            raise FloatingPointError(
                "a loss or gradient of the PPO update is not finite; nothing of this step was kept"
            )

        # 3. Clipped, and back in the parameters' shapes.
        self.norms.append(norm)
        gradient = gradient * min(1.0, self.args.max_grad_norm / (norm + 1e-6))
        sizes = [p.numel() for p in self.parameters]
        for p, part in zip(self.parameters, gradient.split(sizes), strict=True):
            p.grad = part.view_as(p).to(p.dtype)

        # 4. The optimizer's step, and a new window.
        mean_ratio = (ratio / tokens).item()
        if mean_ratio > MAX_MEAN_RATIO:
            self.skipped += 1
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.window = torch.zeros_like(self.window)
        self.pending = 0

    def signal(self) -> Tensor:
        """[1] float32: above 0 where this process got a signal."""
        # A sum over processes of signal numbers is above 0 if any got one.
        return torch.tensor([float(received())], device=self.window.device)

    def mean(self, sums: Tensor, name: str) -> float:
        """Mean over real tokens of all ranks of one of SUMS."""
        sums = self.accelerator.reduce(sums, "sum")
        total = sums[SUMS.index(name)]
        return (total / sums[0].clamp(min=1)).item()


def mini_batches(rollout: Rollout, size: int, accumulation: int, generator: torch.Generator) -> list[Tensor]:
    """Row indices of one epoch: shuffled into optimizer windows, sorted by length within each, where order is free."""
    shuffled = torch.randperm(len(rollout.mask), generator=generator, device=generator.device)
    shuffled = shuffled.to(rollout.mask.device)
    lengths = rollout.query_mask.sum(1) + rollout.mask.sum(1)

    # A window's gradient is a sum, so the order of its rows changes rounding alone; similar lengths need less padding.
    batches = []
    for window in shuffled.split(size * accumulation):
        order = lengths[window].argsort(stable=True)
        batches += window[order].split(size)
    return batches
