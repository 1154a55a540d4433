"""Experience of one PPO step: sampled responses, their scores, log-probabilities, rewards and advantages."""

import torch
from torch import Tensor

from rlhf.data.batches import collate_prompts
from rlhf.models.generation import Rollout, generate, join
from rlhf.ppo import gae, group_advantages, token_rewards, whiten
from rlhf.rl.loop import PPOLoop, global_moments
from rlhf.rl.roles import by_length, critic_values, role_logprobs
from rlhf.run.stopping import explain_out_of_memory, stop_if_agreed


def sample_responses(loop: PPOLoop, prompts: list[dict], generator: torch.Generator) -> Rollout:
    """One response to each prompt, under the policy as it is now."""
    batch = collate_prompts([row["query_ids"] for row in prompts], loop.sampling.pad_token_id)
    ids, mask = (batch[name].to(loop.accelerator.device) for name in ("input_ids", "attention_mask"))
    at_once = len(prompts) if loop.args.batched_gen else 1
    with explain_out_of_memory(
        "sampling", ids.shape, "--batch_size or --output_max_length, or give --batched_gen False"
    ):
        parts = [
            generate(loop.roles.model, loop.roles.values, ids[rows], mask[rows], loop.sampling, generator)
            for rows in torch.arange(len(prompts), device=ids.device).split(at_once)
        ]
    stop_if_agreed(loop.accelerator.device)
    return join(parts, loop.sampling.pad_token_id)


@torch.no_grad()
def score_responses(loop: PPOLoop, rollout: Rollout, role: str = "reward") -> Tensor:
    """[B] float32: the reward model's (or the judge's) own score of each row, on the token ids themselves."""
    scores = torch.empty(len(rollout.mask), device=rollout.mask.device)
    for rows in by_length(rollout, loop.args.forward_batch_size):
        part = rollout.rows(rows)
        scores[rows] = loop.roles.scores(part.input_ids, part.attention_mask, role)
    return scores


def recomputes(loop: PPOLoop) -> bool:
    """Return True if the policy's log-probabilities are computed again before the update, not kept from sampling."""
    asked = loop.args.old_logprobs
    return asked == "recomputed" or (asked == "auto" and loop.roles.model.dtype != torch.float32)


@torch.no_grad()
def record_logprobs(loop: PPOLoop, rollout: Rollout) -> None:
    """Fill in the reference's log-probabilities, a separate critic's values and, where asked, the policy's anew."""
    args = loop.args
    roles = loop.roles
    if recomputes(loop):
        logprobs, values = role_logprobs(roles, "policy", rollout, loop.sampling, args.mini_batch_size)
        rollout.logprobs = logprobs
        rollout.values = values
    if roles.value_adapter:
        rollout.values = critic_values(roles, rollout, args.forward_batch_size)
    rollout.ref_logprobs, _ = role_logprobs(roles, "reference", rollout, loop.sampling, args.forward_batch_size)


def transform_scores(loop: PPOLoop, raw_scores: Tensor, rollout: Rollout) -> Tensor:
    """[B] float32: what PPO maximises, from the reward model's own scores."""
    args = loop.args
    scores = raw_scores
    if args.reward_transform == "sigmoid":
        scores = raw_scores.sigmoid()
    elif args.reward_transform == "standardize":
        scores = ((raw_scores - loop.reward_stats["mean"]) / loop.reward_stats["std"]).clamp(-5, 5)
    unfinished = ~rollout.ended(loop.sampling.eos_token_id)
    scores = scores - args.reward_baseline - args.missing_eos_penalty * unfinished
    return scores.clamp(-args.score_clip, args.score_clip) if args.score_clip else scores


def set_advantages(loop: PPOLoop, rollout: Rollout, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Fill in the advantages and, for a critic, the returns; gives back rewards and kl, [B, T] each.

    The KL penalty is in the rewards, whatever the advantages are made of.
    """
    args = loop.args
    mask = rollout.mask
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
