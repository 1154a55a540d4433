"""Held-out evaluation of PPO: the same prompts and random draws each time, the judge, the best policy so far."""

import math

import torch

from rlhf.rl.experience import record_logprobs, sample_responses, score_responses, transform_scores
from rlhf.rl.loop import PPOLoop, global_moments, next_prompts
from rlhf.rl.metrics import describe_samples, sample_records

# Answers of the SFT model that --reward_transform standardize takes its mean and deviation from.
STATISTICS_SAMPLES = 128

# Held-out answers with text that go to samples.jsonl at every evaluation.
SHOWN = 8

# Standard errors above which a gain over the SFT model is called one.
CLEAR = 2.0


def evaluate(loop: PPOLoop) -> tuple[dict[str, float], list[dict]]:
    """The policy on the held-out prompts: metrics over all ranks under eval/, and some of this rank's answers."""
    rank = loop.accelerator.process_index
    # As many on every rank, so that they gather; the few left over are not asked.
    prompts = loop.eval_prompts[rank : len(loop.eval_prompts) // loop.processes * loop.processes : loop.processes]
    loop.roles.train(False)
    rollout = sample_responses(loop, prompts, loop.generator(0, "evaluation"))
    raw_scores = score_responses(loop, rollout)
    record_logprobs(loop, rollout)
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(1)
    scores = transform_scores(loop, raw_scores, rollout)
    columns = {"score": scores, "raw_score": raw_scores, "kl": kl, "reward": scores - loop.kl_controller.value * kl}
    judged = None
    if loop.args.judge_lora_path:
        judged = columns["judge"] = score_responses(loop, rollout, "judge")

    samples = sample_records(loop.tokenizer, rollout, columns, loop.sampling.eos_token_id)
    measured = describe_samples(loop.accelerator, rollout, samples)
    if judged is not None:
        measured["judge/mean"], measured["judge/error"] = mean_and_error(loop.accelerator.gather(judged))

    measured["score/error"] = mean_and_error(loop.accelerator.gather(scores))[1]
    return {f"eval/{name}": value for name, value in measured.items() if name != "env/reward_mean"}, samples[:SHOWN]


def mean_and_error(x: torch.Tensor) -> tuple[float, float]:
    """Mean of `x` [N] and its standard error (0 for one element)."""
    error = x.std() / math.sqrt(len(x)) if len(x) > 1 else torch.zeros(())
    return x.mean().item(), error.item()


def is_best(loop: PPOLoop, metrics: dict, step: int) -> bool:
    """Return True if this evaluation is the best so far (judge, or score within the KL budget), and remember it."""
    judge = loop.args.judge_lora_path
    name = criterion(loop)
    value = metrics[f"eval/{name}/mean"]
    if not judge and metrics["eval/kl/mean"] > loop.args.best_kl_budget:
        return False
    if loop.best and value <= loop.best["value"]:
        return False
    before = loop.baseline.get(f"eval/{name}/mean", math.nan)
    error = math.hypot(metrics[f"eval/{name}/error"], loop.baseline.get(f"eval/{name}/error", math.nan))
    loop.best = {"step": step, "value": value, "gain": value - before, "error": error}
    return True


def criterion(loop: PPOLoop) -> str:
    """Name of what best/ is chosen by: "judge" where there is one, else "score"."""
    return "judge" if loop.args.judge_lora_path else "score"


def best_in_words(loop: PPOLoop) -> str:
    """Which evaluation was the best, and whether that is more than chance."""
    best = loop.best
    name = criterion(loop)
    words = (
        f"best evaluation, kept in best/: step {best['step']}, {name} {best['value']:+.3f}, "
        f"{best['gain']:+.3f} from the SFT model's (standard error {best['error']:.3f})"
    )
    if best["gain"] <= CLEAR * best["error"]:
        words += "; that is no clear gain: the SFT model may be the better choice"
    return words


def measure_sft_scores(loop: PPOLoop) -> dict[str, float]:
    """Mean and standard deviation of the raw scores of the SFT model's own answers: what `standardize` stands on."""
    batches = max(1, round(STATISTICS_SAMPLES / (loop.args.batch_size * loop.processes)))
    loop.roles.train(False)
    rollouts = [sample_responses(loop, next_prompts(loop, n), loop.generator(n, "statistics")) for n in range(batches)]
    scores = torch.cat([score_responses(loop, rollout) for rollout in rollouts])
    mean, variance = global_moments(loop.accelerator, scores, torch.ones_like(scores, dtype=torch.bool))
    if variance == 0:
        raise ValueError("the reward model gives all answers of the SFT model one score: it cannot teach anything")
    return {"mean": mean.item(), "std": variance.sqrt().item()}
