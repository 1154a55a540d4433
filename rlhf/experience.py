"""Experience of one PPO step: prompts, sampled responses, their scores, rewards and advantages."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data import collate_prompts
from rlhf.guard import CollapseGuard
from rlhf.metrics import global_moments
from rlhf.ppo import AdaptiveKLController, FixedKLController, gae, token_rewards, whiten
from rlhf.roles import Roles
from rlhf.rollout import Rollout, Sampling, by_length, generate, join, score_logprobs


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
    best: dict[str, float] = field(default_factory=dict)
    rollbacks: int = 0

    def generator(self, step: int, purpose: str) -> torch.Generator:
        """A random source that depends on seed, step, rank and purpose alone, so a restart needs no stored state."""
        return seeded(self.accelerator.device, self.args.seed, step, self.accelerator.process_index, purpose)


def seeded(device, *place) -> torch.Generator:
    """A random source for one place in a run, unrelated to that of any other place."""
    digest = hashlib.sha256(" ".join(map(str, place)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def next_prompts(loop: Loop, step: int) -> list[dict]:
    """This rank's prompts of a step: consecutive slices of a fresh permutation of the data for each pass over it."""
    size, ranks = loop.args.batch_size, loop.accelerator.num_processes
    first = (step * ranks + loop.accelerator.process_index) * size
    places = [divmod(place, len(loop.prompts)) for place in range(first, first + size)]
    orders = {
        epoch: torch.randperm(len(loop.prompts), generator=seeded("cpu", loop.args.seed, "prompts", epoch))
        for epoch in {epoch for epoch, _ in places}
    }
    return [loop.prompts[orders[epoch][index]] for epoch, index in places]


def sample_responses(loop: Loop, prompts: list[dict], generator: torch.Generator) -> Rollout:
    """One response to each prompt, under the policy as it is now."""
    batch = collate_prompts([row["query_ids"] for row in prompts], loop.sampling.pad_token_id)
    ids, mask = (batch[name].to(loop.accelerator.device) for name in ("input_ids", "attention_mask"))
    at_once = len(prompts) if loop.args.batched_gen else 1
    parts = [
        generate(loop.roles.model, loop.roles.values, ids[rows], mask[rows], loop.sampling, generator)
        for rows in torch.arange(len(prompts), device=ids.device).split(at_once)
    ]
    return join(parts, loop.sampling.pad_token_id)


@torch.no_grad()
def score_responses(loop: Loop, rollout: Rollout, role: str = "reward") -> Tensor:
    """[B] float32: the reward model's (or the judge's) own score of each row, on the token ids themselves."""
    scores = torch.empty(len(rollout.mask), device=rollout.mask.device)
    for rows in by_length(rollout, loop.args.forward_batch_size):
        part = rollout.rows(rows)
        scores[rows] = loop.roles.scores(part.input_ids, part.attention_mask, role)
    return scores


@torch.no_grad()
def record_logprobs(loop: Loop, rollout: Rollout) -> None:
    """Fill in the reference's log-probabilities and, where asked, the policy's own and its values once more."""
    recompute = loop.args.old_logprobs == "recomputed" or (
        loop.args.old_logprobs == "auto" and loop.roles.model.dtype != torch.float32
    )
    if recompute:
        logprobs, values = score_logprobs(loop.roles, "policy", rollout, loop.sampling, loop.args.mini_batch_size)
        rollout.logprobs, rollout.values = logprobs, values
    rollout.ref_logprobs, _ = score_logprobs(
        loop.roles, "reference", rollout, loop.sampling, loop.args.forward_batch_size
    )


def transform_scores(loop: Loop, raw_scores: Tensor, rollout: Rollout) -> Tensor:
    """[B] float32: what PPO maximises, from the reward model's own scores."""
    scores = raw_scores
    if loop.args.reward_transform == "sigmoid":
        scores = raw_scores.sigmoid()
    elif loop.args.reward_transform == "standardize":
        scores = ((raw_scores - loop.reward_stats["mean"]) / loop.reward_stats["std"]).clamp(-5, 5)
    unfinished = ~rollout.ended(loop.sampling.eos_token_id)
    return scores - loop.args.reward_baseline - loop.args.missing_eos_penalty * unfinished


def set_advantages(loop: Loop, rollout: Rollout, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Fill in returns and advantages (whitened over all ranks); gives back rewards and kl, [B, T] each."""
    rewards, kl = token_rewards(scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, loop.kl_controller.value)
    advantages, rollout.returns = gae(rewards, rollout.values, rollout.mask, loop.args.gamma, loop.args.lam)
    moments = global_moments(loop.accelerator, advantages, rollout.mask)
    rollout.advantages = whiten(advantages, rollout.mask, moments=moments)
    return rewards, kl
