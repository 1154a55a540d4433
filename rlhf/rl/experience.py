"""Experience of one PPO step: sampled responses, their scores, log-probabilities, rewards and advantages."""

import torch
from torch import Tensor

from rlhf.data.batches import collate_prompts
from rlhf.models import generation
from rlhf.models.generation import Rollout, generate
from rlhf.models.rollouts import by_length, join
from rlhf.models.shards import mesh_of, missing
from rlhf.models.shared_decoding import idle
from rlhf.ppo import gae, group_advantages, token_rewards, whiten
from rlhf.rl.loop import PPOLoop, global_moments
from rlhf.rl.roles import critic_values, role_logprobs
from rlhf.run.stopping import explain_out_of_memory, stop_if_agreed


def sample_responses(loop: PPOLoop, prompts: list[dict], generator: torch.Generator) -> Rollout:
    """Sample one response to each prompt from the policy as it is now."""
    batch = collate_prompts([row["query_ids"] for row in prompts], loop.sampling.pad_token_id)
    ids = batch["input_ids"].to(loop.accelerator.device)
    mask = batch["attention_mask"].to(loop.accelerator.device)

    # One query at a time is slow, but needs the least memory.
    at_once = len(prompts) if loop.args.batched_gen else 1
    batches = torch.arange(len(prompts), device=ids.device).split(at_once)
    flags = "--batch_size or --output_max_length, or give --batched_gen False"
    spare = missing(mesh_of(loop.roles.model), len(batches))
    with explain_out_of_memory("sampling", ids.shape, flags):
        parts = [
            generate(loop.sampler, loop.roles.values, ids[rows], mask[rows], loop.sampling, generator)
            for rows in batches
        ]
        for _ in range(spare):
            generation.take_part(loop.sampler, loop.sampling, ids.device)

    # Sampling takes longest, so a signal is answered right after it, by all ranks together.
    stop_if_agreed(loop.accelerator.device)
    return join(parts, loop.sampling.pad_token_id)


@torch.no_grad()
def score_responses(loop: PPOLoop, rollout: Rollout, role: str = "reward") -> Tensor:
    """[B] float32: the reward model's (or the judge's) own score of each row, on the token ids themselves."""
    scores = torch.empty(len(rollout.mask), device=rollout.mask.device)
    batches = by_length(rollout, loop.args.forward_batch_size)
    spare = missing(mesh_of(loop.roles.model), len(batches))
    for rows in batches:
        part = rollout.rows(rows)
        scores[rows] = loop.roles.scores(part.input_ids, part.attention_mask, role)
    for _ in range(spare):
        idle(loop.roles.model)
    return scores


def take_part(loop: PPOLoop, reward_models: int) -> None:
    """Do the share of a process without a prompt in what `sample_responses` and `score_responses` do on others."""
    mesh = mesh_of(loop.roles.model)
    for _ in range(missing(mesh, 0)):
        generation.take_part(loop.sampler, loop.sampling, loop.accelerator.device)
    stop_if_agreed(loop.accelerator.device)
    for _ in range(reward_models):
        for _ in range(missing(mesh, 0)):
            idle(loop.roles.model)


def recomputes(loop: PPOLoop) -> bool:
    """Return True if the policy's log-probabilities are computed again before the update, not kept from sampling."""
    asked = loop.args.old_logprobs
    # In half precision sampling and the update round differently, so that the ratio would not start at 1.
    return asked == "recomputed" or (asked == "auto" and loop.roles.model.dtype != torch.float32)


@torch.no_grad()
def record_logprobs(loop: PPOLoop, rollout: Rollout) -> None:
    """Fill in the reference's log-probabilities, a separate critic's values and, where asked, the policy's anew."""
    args = loop.args
    roles = loop.roles

    if recomputes(loop):
        # The batches are of the update's size, so that both round alike and the ratio starts at 1.
        logprobs, values = role_logprobs(roles, "policy", rollout, loop.sampling, args.mini_batch_size)
        rollout.logprobs = logprobs
        rollout.values = values

    if roles.value_adapter:
        rollout.values = critic_values(roles, rollout, args.forward_batch_size)
    rollout.ref_logprobs, _ = role_logprobs(roles, "reference", rollout, loop.sampling, args.forward_batch_size)


def set_advantages(loop: PPOLoop, rollout: Rollout, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Fill in the advantages and, for a critic, the returns.

    The KL penalty is in the rewards, whatever the advantages are made of.

    Returns: rewards [B, T], as they are before whitening, and kl [B, T].
    """
    args = loop.args
    mask = rollout.mask
    # The last token of a response gets its score, and each token pays for its own KL.
    rewards, kl = token_rewards(scores, rollout.logprobs, rollout.ref_logprobs, mask, loop.kl_controller.value)

    # The log reports rewards as they are; only the advantages are made of whitened ones.
    learnt = rewards
    if args.mask_truncated:
        rollout.learn = mask & rollout.ended(loop.sampling.stop_ids)[:, None]
    if args.whiten_rewards:
        moments = global_moments(loop.accelerator, rewards, mask)
        learnt = whiten(rewards, mask, shift_mean=False, moments=moments)

    if args.advantage != "gae":
        # A group is its own baseline: every token of a response gets what the response is worth above the others.
        worth = group_advantages(learnt.sum(1), args.group_size, args.advantage, args.scale_by_std)
        rollout.advantages = torch.where(mask, worth[:, None], 0)
        return rewards, kl

    # With a critic every token has an advantage of its own.
    advantages, rollout.returns = gae(learnt, rollout.values, mask, args.gamma, args.lam)

    # The moments are those of all ranks, so the number of processes does not change what is optimised.
    if args.whiten_advantages:
        moments = global_moments(loop.accelerator, advantages, mask)
        advantages = whiten(advantages, mask, moments=moments)
    rollout.advantages = advantages
    return rewards, kl
