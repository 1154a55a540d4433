"""Experience of one PPO step: prompts, sampled responses, their scores, rewards and advantages."""

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data import collate_prompts
from rlhf.guard import CollapseGuard
from rlhf.memory import named_when_too_large
from rlhf.metrics import global_moments
from rlhf.ppo import AdaptiveKLController, FixedKLController, gae, group_advantages, token_rewards, whiten
from rlhf.roles import Roles
from rlhf.rollout import Rollout, Sampling, by_length, generate, join, score_logprobs, score_values
from rlhf.signals import stop_if_agreed


@dataclass
class Loop:
    """What the functions of a step share: the roles, what trains them, and the little that a restart brings back."""

    args: Any
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    roles: Roles
    prompts: list[dict]
    eval_prompts: list[dict]
    sampling: Sampling
    optimizer: torch.optim.Optimizer
    kl_controller: FixedKLController | AdaptiveKLController
    guard: CollapseGuard
    reward_stats: dict[str, float] = field(default_factory=dict)
    baseline: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    rollbacks: int = 0
    # Steps left out because of numbers that were not finite.
    left_out: int = 0
    # Weights and optimizer to go back to after a collapse, of rlhf.update.snapshot.
    good: tuple | None = None

    @property
    def processes(self) -> int:
        """Ranks of this run."""
        return self.accelerator.num_processes

    @property
    def total_steps(self) -> int:
        """PPO steps of the whole run: --steps counts responses, and the last batch is a whole one."""
        return -(-self.args.steps // (self.args.batch_size * self.processes))

    def set_learning_rate(self, step: int) -> None:
        """The learning rate of a step, a function of the step alone: a restart needs no state of it."""
        args = self.args
        if step < args.lr_warmup_steps:
            factor = (step + 1) / (args.lr_warmup_steps + 1)
        else:
            progress = (step - args.lr_warmup_steps) / max(1, self.total_steps - args.lr_warmup_steps)
            shapes = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
            factor = shapes[args.lr_scheduler_type]
        for group in self.optimizer.param_groups:
            group["lr"] = args.learning_rate * factor

    def generator(self, step: int, purpose: str) -> torch.Generator:
        """A random source that depends on seed, step, rank and purpose alone, so a restart needs no stored state."""
        return seeded(self.accelerator.device, self.args.seed, step, self.accelerator.process_index, purpose)


def seeded(device, *place) -> torch.Generator:
    """A random source for one place in a run, unrelated to that of any other place."""
    digest = hashlib.sha256(" ".join(map(str, place)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def next_prompts(loop: Loop, step: int) -> list[dict]:
    """This rank's prompts of a step: consecutive slices of a fresh permutation of the data for each pass over it.

    With a group size above 1 each stands that many times, side by side.
    """
    size = loop.args.batch_size // loop.args.group_size
    first = (step * loop.processes + loop.accelerator.process_index) * size
    places = [divmod(place, len(loop.prompts)) for place in range(first, first + size)]
    orders = {
        epoch: torch.randperm(len(loop.prompts), generator=seeded("cpu", loop.args.seed, "prompts", epoch))
        for epoch in {epoch for epoch, _ in places}
    }
    return [loop.prompts[orders[epoch][index]] for epoch, index in places for _ in range(loop.args.group_size)]


def sample_responses(loop: Loop, prompts: list[dict], generator: torch.Generator) -> Rollout:
    """One response to each prompt, under the policy as it is now."""
    batch = collate_prompts([row["query_ids"] for row in prompts], loop.sampling.pad_token_id)
    ids, mask = (batch[name].to(loop.accelerator.device) for name in ("input_ids", "attention_mask"))
    at_once = len(prompts) if loop.args.batched_gen else 1
    with named_when_too_large(
        "sampling", ids.shape, "--batch_size or --output_max_length, or give --batched_gen False"
    ):
        parts = [
            generate(loop.roles.model, loop.roles.values, ids[rows], mask[rows], loop.sampling, generator)
            for rows in torch.arange(len(prompts), device=ids.device).split(at_once)
        ]
    stop_if_agreed(loop.accelerator.device)
    return join(parts, loop.sampling.pad_token_id)


@torch.no_grad()
def score_responses(loop: Loop, rollout: Rollout, role: str = "reward") -> Tensor:
    """[B] float32: the reward model's (or the judge's) own score of each row, on the token ids themselves."""
    scores = torch.empty(len(rollout.mask), device=rollout.mask.device)
    for rows in by_length(rollout, loop.args.forward_batch_size):
        part = rollout.rows(rows)
        scores[rows] = loop.roles.scores(part.input_ids, part.attention_mask, role)
    return scores


def recomputes(loop: Loop) -> bool:
    """Whether the policy's log-probabilities are computed again before the update, not kept from sampling."""
    asked = loop.args.old_logprobs
    return asked == "recomputed" or (asked == "auto" and loop.roles.model.dtype != torch.float32)


@torch.no_grad()
def record_logprobs(loop: Loop, rollout: Rollout) -> None:
    """Fill in the reference's log-probabilities, a separate critic's values and, where asked, the policy's anew."""
    args, roles = loop.args, loop.roles
    if recomputes(loop):
        logprobs, values = score_logprobs(roles, "policy", rollout, loop.sampling, args.mini_batch_size)
        rollout.logprobs, rollout.values = logprobs, values
    if roles.value_adapter:
        rollout.values = score_values(roles, rollout, args.forward_batch_size)
    rollout.ref_logprobs, _ = score_logprobs(roles, "reference", rollout, loop.sampling, args.forward_batch_size)


def transform_scores(loop: Loop, raw_scores: Tensor, rollout: Rollout) -> Tensor:
    """[B] float32: what PPO maximises, from the reward model's own scores."""
    args, scores = loop.args, raw_scores
    if args.reward_transform == "sigmoid":
        scores = raw_scores.sigmoid()
    elif args.reward_transform == "standardize":
        scores = ((raw_scores - loop.reward_stats["mean"]) / loop.reward_stats["std"]).clamp(-5, 5)
    unfinished = ~rollout.ended(loop.sampling.eos_token_id)
    scores = scores - args.reward_baseline - args.missing_eos_penalty * unfinished
    return scores.clamp(-args.score_clip, args.score_clip) if args.score_clip else scores


def set_advantages(loop: Loop, rollout: Rollout, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Fill in the advantages and, for a critic, the returns; gives back rewards and kl, [B, T] each.

    The price of KL is in the rewards whatever the advantages are made of.
    """
    args, mask = loop.args, rollout.mask
    rewards, kl = token_rewards(scores, rollout.logprobs, rollout.ref_logprobs, mask, loop.kl_controller.value)
    learnt = rewards
    if args.whiten_rewards:
        learnt = whiten(rewards, mask, shift_mean=False, moments=global_moments(loop.accelerator, rewards, mask))
    if args.advantage != "gae":
        # A group is its own baseline: every token of a response gets what the response is worth above the others.
        worth = group_advantages(learnt.sum(1), args.group_size, args.advantage)
        rollout.advantages = torch.where(mask, worth[:, None], 0)
        return rewards, kl
    advantages, rollout.returns = gae(learnt, rollout.values, mask, args.gamma, args.lam)
    if args.whiten_advantages:
        advantages = whiten(advantages, mask, moments=global_moments(loop.accelerator, advantages, mask))
    rollout.advantages = advantages
    return rewards, kl
