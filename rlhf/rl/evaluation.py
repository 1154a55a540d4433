"""Held-out evaluation of PPO: the same prompts and random draws each time, the judge, the best policy so far."""

import math

import torch

from rlhf.endings import say_end
from rlhf.models.generation import Rollout
from rlhf.rl import rewards
from rlhf.rl.experience import record_logprobs, sample_responses, score_responses
from rlhf.rl.loop import PPOLoop, next_prompts
from rlhf.rl.metrics import describe_samples, sample_records
from rlhf.run.launch import say
from rlhf.run.log import read_metrics

# Answers of the SFT model that --reward_transform standardize takes its mean and deviation from.
STATISTICS_SAMPLES = 128

# Held-out answers with text that go to samples.jsonl at every evaluation.
SHOWN = 8

# A gain over the SFT model of fewer standard errors than this may be chance.
CLEAR = 2.0


def evaluate(loop: PPOLoop) -> tuple[dict[str, float], list[dict]]:
    """Evaluate the policy on the held-out prompts.

    Returns: metrics over all ranks under eval/, and some of this rank's answers with text.
    """
    # 1. Answers, with the same random draws at every evaluation: a difference comes from the policy alone.
    prompts = _held_out_prompts(loop)
    loop.roles.train(False)
    rollout = sample_responses(loop, prompts, loop.generator(0, "evaluation"))

    # 2. What reward model, reference and judge say of them.
    parts = rewards.raw_parts(loop, rollout, prompts)
    record_logprobs(loop, rollout)
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(1)
    scores = rewards.total(loop, parts, rollout)
    reward = scores - loop.kl_controller.value * kl
    columns = {"score": scores, "raw_score": rewards.raw_score(loop, parts), "kl": kl, "reward": reward}
    judged = None
    if loop.args.judge_lora_path:
        judged = score_responses(loop, rollout, "judge")
        columns["judge"] = judged

    # 3. Metrics over all ranks.
    samples = sample_records(loop.tokenizer, rollout, columns, loop.sampling.stop_ids)
    measured = describe_samples(loop.accelerator, rollout, samples)
    if judged is not None:
        mean, error = mean_and_error(loop.accelerator.gather(judged))
        measured |= {"judge/mean": mean, "judge/error": error}
    measured |= rewards.describe_parts(loop, parts)
    measured["score/error"] = mean_and_error(loop.accelerator.gather(scores))[1]

    # It repeats score/mean under a name for trackers, which is wanted of training only.
    measured.pop("env/reward_mean")
    return {f"eval/{name}": value for name, value in measured.items()}, samples[:SHOWN]


def _held_out_prompts(loop: PPOLoop) -> list[dict]:
    """This rank's held-out prompts, as many on every rank so that metrics can be gathered; a few are left over."""
    shared = len(loop.eval_prompts) // loop.processes * loop.processes
    # Dealt out like cards, so that each rank has its part of every topic of a sorted file.
    return loop.eval_prompts[loop.accelerator.process_index : shared : loop.processes]


def mean_and_error(x: torch.Tensor) -> tuple[float, float]:
    """Mean of `x` [N] and its standard error (0 for one element)."""
    error = x.std() / math.sqrt(len(x)) if len(x) > 1 else torch.zeros(())
    return x.mean().item(), error.item()


def is_best(loop: PPOLoop, metrics: dict, step: int) -> bool:
    """Return True if this evaluation is the best so far (judge, or score within the KL budget), and remember it."""
    name = criterion(loop)
    value = metrics[f"eval/{name}/mean"]
    # NaN is not larger than anything, and nothing is larger than NaN.
    if not math.isfinite(value):
        return False

    # The reward model's own score rises with the KL whether or not answers get better; a judge's needs no such limit.
    if name == "score" and metrics["eval/kl/mean"] > loop.args.best_kl_budget:
        return False
    if loop.best and value <= loop.best["value"]:
        return False

    # The gain over the SFT model, and the standard error of that difference.
    before = loop.baseline.get(f"eval/{name}/mean", math.nan)
    error_now = metrics[f"eval/{name}/error"]
    error_before = loop.baseline.get(f"eval/{name}/error", math.nan)
    error = math.hypot(error_now, error_before)
    loop.best = {"step": step, "value": value, "gain": value - before, "error": error}
    return True


def criterion(loop: PPOLoop) -> str:
    """Name of what best/ is chosen by: "judge" where there is one, else "score"."""
    return "judge" if loop.args.judge_lora_path else "score"


def say_finished(loop: PPOLoop) -> None:
    """Say where the policy is, how much its score rose, which evaluation was the best, and what to look at next."""
    args = loop.args
    scores = [record["score/mean"] for record in read_metrics(args.output_dir) if "score/mean" in record]
    rise = f"score {scores[0]:+.2f} in the first step, {scores[-1]:+.2f} in the last" if scores else None
    if loop.best:
        say(best_in_words(loop))

    # Several versions after one flag.
    versions = [f"ppo={args.output_dir}"]
    if args.sft_model_lora_path:
        versions.insert(0, f"sft={args.sft_model_lora_path}")
    # A comparison shows the score of one reward model.
    more = {"base_model_name": args.base_model_name, "reward_model_lora_path": args.reward_roles.get("reward")}
    made = f"policy adapter in {args.output_dir} (curves: {args.output_dir}/chart.png)"
    say_end(made, rise, args, "compare.py", adapters=versions, **more, prompts="prompts.txt")


def best_in_words(loop: PPOLoop) -> str:
    """Say which evaluation was the best, and if that is more than chance."""
    best = loop.best
    name = criterion(loop)
    words = (
        f"best evaluation, kept in best/: step {best['step']}, {name} {best['value']:+.3f}, "
        f"{best['gain']:+.3f} from the SFT model's (standard error {best['error']:.3f})"
    )
    if best["gain"] <= CLEAR * best["error"]:
        words += "; that is no clear gain: the SFT model may be the better choice"
    return words


def sft_answers(loop: PPOLoop) -> tuple[list[Rollout], list[dict[str, torch.Tensor]]]:
    """About STATISTICS_SAMPLES answers of the SFT model over all ranks, in batches, with the parts of their scores.

    The policy has to be the SFT model still.
    """
    batches = max(1, round(STATISTICS_SAMPLES / (loop.args.batch_size * loop.processes)))
    loop.roles.train(False)

    # All answers are sampled before any is scored.
    rollouts = []
    for n in range(batches):
        rollouts.append(sample_responses(loop, next_prompts(loop, n), loop.generator(n, "statistics")))
    parts = [rewards.raw_parts(loop, rollout, next_prompts(loop, n)) for n, rollout in enumerate(rollouts)]
    return rollouts, parts


def measure_sft_scores(loop: PPOLoop) -> dict[str, float]:
    """Mean and standard deviation of the parts of the SFT model's own scores, which `standardize` uses."""
    return rewards.statistics(loop, sft_answers(loop)[1])
