"""Groups of answers to one prompt: those from which nothing can be learnt, counted and replaced.

Where all answers of a group have one score, its advantages are 0: on tasks that are right or wrong a growing part of
the batch ends so.
Source: Yu et al. 2025, arXiv:2503.14476, section 3.2 (dynamic sampling).
"""

import torch
from torch import Tensor

from rlhf.models.generation import Rollout
from rlhf.models.rollouts import join
from rlhf.rl import rewards
from rlhf.rl.experience import sample_responses, take_part
from rlhf.rl.loop import PPOLoop, seeded

# Times that a step asks fresh prompts before it takes its groups as they are.
ROUNDS = 3

Batch = tuple[Rollout, list[dict], dict[str, Tensor]]


def dead_groups(scores: Tensor, group_size: int) -> Tensor:
    """[B / group_size] bool: groups whose answers all have one score, from which nothing can be learnt.

    Args:
        scores: [B] float32, the answers to a prompt next to each other.
    """
    groups = scores.view(-1, group_size)
    # Not equality: one answer scored in two batches may differ in its last digit.
    return (groups.max(1).values - groups.min(1).values) < 1e-6


def replace_dead_groups(loop: PPOLoop, step: int, batch: Batch) -> Batch:
    """A step's batch, its dead groups replaced by groups of other prompts as far as ROUNDS tries find some.

    Args:
        batch: rollout, the row of each answer, the raw parts of the score.
    """
    size = loop.args.group_size
    for round_number in range(1, ROUNDS + 1):
        rollout, prompts, parts = batch
        dead = dead_groups(rewards.total(loop, parts, rollout), size)
        # All ranks go on as long as one of them has to: sampling meets the others.
        if not loop.accelerator.reduce(dead.sum(), "sum"):
            break
        if not dead.any():
            take_part(loop, len(rewards.members(loop)))
            continue

        fresh = _spare_prompts(loop, step, round_number, int(dead.sum()))
        sampled = sample_responses(loop, fresh, loop.generator(step, f"rollout {round_number}"))
        scored = rewards.raw_parts(loop, sampled, fresh)
        alive = (~dead).repeat_interleave(size).nonzero().flatten()
        kept = [rollout.rows(alive)] if len(alive) else []
        batch = (
            # The answers to a prompt stay next to each other, which `group_advantages` relies on.
            join([*kept, sampled], loop.sampling.pad_token_id),
            [*(prompts[row] for row in alive.tolist()), *fresh],
            {name: torch.cat([part[alive], scored[name]]) for name, part in parts.items()},
        )
    return batch


def _spare_prompts(loop: PPOLoop, step: int, round_number: int, count: int) -> list[dict]:
    """Prompts for that many groups, drawn by seed, step, round and rank alone, so that a restart draws the same."""
    source = seeded("cpu", loop.args.seed, step, loop.accelerator.process_index, f"spare {round_number}")
    order = torch.randperm(len(loop.prompts), generator=source)[:count].tolist()
    # Fewer prompts than groups: some come twice.
    prompts = []
    for number in range(count):
        prompts += [loop.prompts[order[number % len(order)]]] * loop.args.group_size
    return prompts


def describe_groups(loop: PPOLoop, scores: Tensor) -> dict[str, float]:
    """{"groups/dead_frac"}: the share of this batch's groups from which nothing is learnt, over all ranks."""
    # Every answer alone would be a group of one score, and so a dead one.
    if loop.args.group_size == 1:
        return {}
    dead = dead_groups(scores, loop.args.group_size).float().mean()
    return {"groups/dead_frac": loop.accelerator.reduce(dead, "mean").item()}
