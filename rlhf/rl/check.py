"""Start-up checks of a PPO run: a few seconds on one batch find defects that would otherwise show after a night."""

import math
import warnings

import torch
from torch import Tensor

from rlhf.models.generation import Rollout, Sampling
from rlhf.rl import rewards
from rlhf.rl.evaluation import sft_answers
from rlhf.rl.experience import sample_responses
from rlhf.rl.loop import PPOLoop, next_prompts
from rlhf.rl.roles import Roles, role_logprobs
from rlhf.run.launch import say

# Largest and mean difference, in nats, between log-probabilities that are equal on paper (by dtype of the weights).
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (0.3, 0.03), torch.float16: (0.3, 0.03)}

# Difference between scores that are equal on paper, as a share of the largest score (at least 1).
SCORE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}

# A merged reference is rounded once more than an adapter on its base: mean difference, in nats, that warns.
MERGED_WARNS = 0.01
# Rounding does not reach this mean difference, in nats: the reference is another model.
MERGED_REFUSES = 0.1

# Standard deviation under which a sigmoid, whose range is 1, is saturated: every answer gets the same.
SATURATED = 0.05

# The best policy under a KL penalty raises the mean score by variance / kl_coef. Less than this share of a standard
# deviation shows in no log: the penalty alone moves the rewards.
LEAST_GAIN = 0.1

# Prompts of the sampled batch, and its rows in one forward pass.
CHECKED_ROWS = 8


def check_run(roles: Roles, tokenizer, rollout: Rollout, sampling: Sampling, fresh: bool) -> list[str]:
    """Look for the defects that make PPO silently wrong, on one sampled batch.

    Args:
        rollout: a batch just sampled by this policy. fresh: the policy is still the SFT model (not a resumed run).
    Returns: warnings, each one sentence.
    Raises: ValueError that names the defect and how to mend it.
    """
    _check_tokens(roles, tokenizer, sampling)
    _check_finite(rollout)
    _check_recorded(roles, rollout, sampling)
    # Functions see text, which has no padding.
    for role in [role for role in roles.score_heads if role != "judge"]:
        _check_scores(roles, role, rollout, sampling)
    return _check_reference(roles, rollout, sampling) if fresh else []


def _check_tokens(roles: Roles, tokenizer, sampling: Sampling) -> None:
    """Refuse a stop token that cannot end an answer, and a tokenizer that does not fit the model."""
    vocabulary = roles.model.get_output_embeddings().weight.shape[0]
    for stop in sampling.stop_ids:
        if not 0 <= stop < vocabulary:
            raise ValueError(
                f"the stop token {stop} is not among the model's {vocabulary} outputs: no answer could ever end with "
                "it; tokenizer and base do not belong together"
            )

    # The model may have more outputs than the tokenizer has tokens: many bases pad their embedding.
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {vocabulary}: they do not belong together"
        )


def _check_finite(rollout: Rollout) -> None:
    """Refuse a batch with NaN or Inf in it: half precision that overflows, or broken weights."""
    for name in ("logprobs", "values", "entropy"):
        recorded = getattr(rollout, name)
        if not recorded.isfinite().all():
            raise ValueError(f"{name} of the first sampled batch are not finite: try --bf16 False, or another base")


def _check_recorded(roles: Roles, rollout: Rollout, sampling: Sampling) -> None:
    """Refuse a ratio other than 1 before the first update: sampling and scoring give the same log-probabilities."""
    largest, mean = TOLERANCE[roles.model.dtype]
    logprobs, _ = role_logprobs(roles, "policy", rollout, sampling, CHECKED_ROWS)
    moved = (logprobs - rollout.logprobs)[rollout.mask].abs()

    # Written so that NaN, which compares as False, is refused.
    if not (moved.max() <= largest and moved.mean() <= mean):
        raise ValueError(
            f"log-probabilities recorded while sampling differ from those scored afterwards by up to "
            f"{moved.max():.2g} nats (mean {moved.mean():.2g}; {largest:g} and {mean:g} are rounding): the ratio "
            "would not start at 1; something drops out, or depends on padding or on the cache"
        )


def _check_scores(roles: Roles, role: str, rollout: Rollout, sampling: Sampling) -> None:
    """Refuse a reward model whose score of an answer changes with padding on either side, or with its batch."""
    # 1. A few rows together, with three pad tokens more on each side.
    rows = torch.arange(min(4, len(rollout.mask)), device=rollout.mask.device)
    together = rollout.rows(rows)
    # Three on each side: positions that count padding shift by it, and a pool at the last column lands in it.
    pads = torch.full((len(rows), 3), sampling.pad_token_id, device=rollout.mask.device)
    unreal = torch.zeros_like(pads, dtype=torch.bool)
    padded_ids = torch.cat([pads, together.input_ids, pads], 1)
    padded_mask = torch.cat([unreal, together.attention_mask, unreal], 1)
    padded = roles.scores(padded_ids, padded_mask, role)

    # 2. The same rows one by one.
    singles = [rollout.rows(row[None]) for row in rows]
    alone = torch.cat([roles.scores(single.input_ids, single.attention_mask, role) for single in singles])

    # 3. Rounding grows with the scores, so the bound does.
    difference = (padded - alone).abs().max().item()
    spread = max(1.0, alone.abs().max().item())
    if not difference <= SCORE_TOLERANCE[roles.model.dtype] * spread:
        raise ValueError(
            f"the score of an answer depends on its padding (by {difference:.2g}): the reward model pools at the "
            "wrong token or its positions count padding"
        )


def _is_bare_base(roles: Roles) -> bool:
    """Return True if a separate reference has the base's own weights wherever the SFT adapter changes them."""
    theirs = dict(roles.separate_reference.named_parameters())
    ours = {
        name.replace(".base_layer", ""): p
        for name, p in roles.model.named_parameters()
        if name.endswith("base_layer.weight")
    }
    # A reference in Llama format has other names: the difference of the log-probabilities alone must tell.
    return bool(ours) and all(name in theirs and torch.equal(p, theirs[name]) for name, p in ours.items())


def _check_reference(roles: Roles, rollout: Rollout, sampling: Sampling) -> list[str]:
    """Refuse a KL other than 0 before the first update: policy and reference are the same SFT model then.

    Returns: a warning where a merged reference differs by more than usual rounding.
    """
    logprobs, _ = role_logprobs(roles, "policy", rollout, sampling, CHECKED_ROWS)
    reference, _ = role_logprobs(roles, "reference", rollout, sampling, CHECKED_ROWS)
    moved = (logprobs - reference)[rollout.mask].abs()
    largest = moved.max().item()
    mean = moved.mean().item()

    # An adapter on the same base rounds in the same way, so a difference means another model.
    if roles.separate_reference is None:
        if not largest <= TOLERANCE[roles.model.dtype][0]:
            raise ValueError(
                f"policy and reference differ by up to {largest:.2g} nats a token before any training: the KL would "
                "be measured from the wrong model"
            )
        return []
    return _check_merged(roles, largest, mean)


def _check_merged(roles: Roles, largest: float, mean: float) -> list[str]:
    """Judge a merged reference by its differences from the SFT adapter (nats a token): refuse, warn, or accept it."""
    # A merged model is rounded once more, so its bound is wider.
    if not mean <= MERGED_REFUSES or math.isnan(largest):
        raise ValueError(
            f"--merged_sft_model_path differs from the base with --sft_model_lora_path by {mean:.2g} nats a token: it "
            "was merged from another adapter or base; merge again with merge_lora.py, or leave the flag out"
        )

    # A short SFT run may move log-probabilities by less than that bound; then only the weights tell.
    if largest > 1e-6 and _is_bare_base(roles):
        raise ValueError(
            "--merged_sft_model_path has the weights of the bare base: the KL would be measured from a model without "
            "SFT; merge with merge_lora.py, or leave the flag out"
        )

    if mean > MERGED_WARNS:
        return [f"the merged reference differs from the SFT adapter by {mean:.2g} nats a token: rounding of the merge"]
    return []


# ---- the score ----
def _check_spread(loop: PPOLoop, rollout: Rollout, prompts: list[dict]) -> None:
    """Refuse scores that hardly vary after the transform: nothing could be learnt from them.

    Collective: all ranks call it, and come to one decision.
    """
    args = loop.args
    needed = LEAST_GAIN * args.init_kl_coef
    if args.reward_transform == "sigmoid":
        needed = max(needed, SATURATED)

    # A few answers are enough to see that scores vary, and too few to say that they do not.
    few = _gathered(loop, rewards.total(loop, rewards.raw_parts(loop, rollout, prompts), rollout))
    if few.std() > 2 * needed:
        return
    rollouts, parts = sft_answers(loop)
    batches = list(zip(rollouts, parts, strict=True))
    scores = _gathered(loop, torch.cat([rewards.total(loop, part, batch) for batch, part in batches]))
    # NaN, which compares as False, is refused.
    if scores.std() > needed:
        return

    # What helps depends on what is at fault: a transform that flattens the scores, or a KL penalty that drowns them.
    raw = _gathered(loop, torch.cat([rewards.raw_score(loop, part) for part in parts]))
    mean, std = scores.mean().item(), scores.std().item()
    reason = f"a sigmoid needs {SATURATED}"
    if needed > SATURATED or args.reward_transform != "sigmoid":
        reason = f"against --init_kl_coef {args.init_kl_coef:g} it needs {needed:.2g}, or the KL penalty alone decides"
    mend = "--reward_transform standardize"
    if args.reward_transform == "standardize":
        mend = f"a lower --init_kl_coef, under {std / LEAST_GAIN:.2g}"
    raise ValueError(
        f"the scores that PPO would learn from hardly vary: mean {mean:.3f}, standard deviation {std:.3f} over "
        f"{len(scores)} answers of the SFT model, by --reward_transform {args.reward_transform} (raw: mean "
        f"{raw.mean():.2f}, standard deviation {raw.std():.2f}); {reason}. Give {mend}, or --check False to start all "
        "the same"
    )


def _gathered(loop: PPOLoop, scores: Tensor) -> Tensor:
    """The scores of all ranks."""
    return loop.accelerator.gather(scores)


# ---- start ----
def check_start(loop: PPOLoop, fresh: bool) -> None:
    """Refuse to start on a defect that would make PPO silently wrong; a few seconds on a few answers."""
    prompts = next_prompts(loop, 0)[:CHECKED_ROWS]
    loop.roles.train(False)
    # Drawn for a purpose of its own, so that the run samples the same without the check.
    rollout = sample_responses(loop, prompts, loop.generator(0, "check"))
    for warning in check_run(loop.roles, loop.tokenizer, rollout, loop.sampling, fresh):
        warnings.warn(warning, stacklevel=2)
    if fresh:
        _check_spread(loop, rollout, prompts)

    if rollout.ended(loop.sampling.stop_ids).any():
        say("check: log-probabilities, scores, reference and stop token are as they should be")
        return
    warnings.warn(
        f"none of the {len(prompts)} answers of the check ended within --output_max_length "
        f"{loop.args.output_max_length}: a model that never stops is scored on cut answers; raise the limit, or look "
        "whether its training ended answers with a stop token of this format",
        stacklevel=2,
    )
    say("check: log-probabilities, scores and reference are as they should be; no answer ended")
