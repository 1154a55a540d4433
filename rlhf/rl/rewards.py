"""The score of an answer from its parts: the reward model's, and those of functions in code.

    total = sum over parts of  weight * transform(part)  - baseline - penalty where the answer was cut

A function that does not apply to an answer (None) adds nothing to its total, and counts in no mean. Several reward
models are one part of the total: their scores, each in standard deviations of the SFT model's own answers, combined.
"""

import math
import warnings

import torch
from torch import Tensor

from rlhf.models.generation import Rollout
from rlhf.reward import ensemble
from rlhf.rl import experience
from rlhf.rl.loop import PPOLoop
from rlhf.rl.reward_functions import call_function
from rlhf.run.log import read_metrics

# The part that a reward adapter plays, beside the functions' own names.
REWARD_MODEL = "reward_model"

# Share of the parts' variance from which on one of them decides alone, and standard deviations of its start that
# another has to have fallen by.
DOMINANT = 0.9
FALLEN = 0.5


def part_names(loop: PPOLoop) -> list[str]:
    """The parts of the total, in the order of --reward_weights."""
    model = [REWARD_MODEL] if loop.args.reward_model_lora_path else []
    return model + [function.name for function in loop.functions]


def members(loop: PPOLoop) -> dict[str, str]:
    """Name -> role of each reward model: {"reward_model": "reward", "reward_model_2": "reward_2"} of two."""
    return {role.replace("reward", REWARD_MODEL): role for role in loop.args.reward_roles}


def raw_parts(loop: PPOLoop, rollout: Rollout, prompts: list[dict]) -> dict[str, Tensor]:
    """Name -> [B] float32, what each reward model and function says by itself; NaN where one does not apply.

    Args:
        prompts: the row of each answer, in the rollout's order.
    Raises: ValueError where a function breaks its promise.
    """
    parts = {}
    for number, (name, role) in enumerate(members(loop).items()):
        parts[name] = without_length(loop, rollout, experience.score_responses(loop, rollout, role), number)
    if loop.functions:
        # Without template and control tokens: a function is written for what people read.
        texts = [row["prompt"] for row in prompts]
        real = zip(rollout.response_ids, rollout.mask, strict=True)
        responses = [loop.prompt_format.decode(ids[mask].tolist()) for ids, mask in real]
        sizes = zip(prompts, rollout.lengths().tolist(), strict=True)
        most = loop.sampling.max_new_tokens
        # Ours win over columns of the same names, which functions could not rely on otherwise.
        rows = [row.get("columns", {}) | {"response_tokens": size, "max_tokens": most} for row, size in sizes]
        for function in loop.functions:
            # A function may change what it is given: each has its own copies.
            given = list(texts), list(responses), [dict(row) for row in rows]
            scores = call_function(function, *given, loop.args.reward_timeout)
            parts[function.name] = scores.to(rollout.mask.device)
    return parts


def without_length(loop: PPOLoop, rollout: Rollout, scores: Tensor, member: int = 0) -> Tensor:
    """[B] float32: a reward model's own scores without what length alone adds to them (--length_calibration).

    `member`: its number among the reward adapters, each of which has a calibration of its own.
    """
    if not loop.calibrations:
        return scores
    return scores - loop.calibrations[member].correction(rollout.lengths())


def weighted(loop: PPOLoop, parts: dict[str, Tensor]) -> Tensor:
    """[B] float32: sum of the parts by their weights, as they are; what does not apply counts 0."""
    weights = loop.args.reward_weights or [1.0] * len(parts)
    # 0 for what does not apply: it neither rewards nor punishes.
    terms = [weight * part.nan_to_num(nan=0.0) for weight, part in zip(weights, parts.values(), strict=True)]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def raw_score(loop: PPOLoop, parts: dict[str, Tensor]) -> Tensor:
    """[B] float32: the reward model's own score; without one, the weighted sum of what the functions say."""
    return model_score(loop, parts) if REWARD_MODEL in parts else weighted(loop, parts)


def model_score(loop: PPOLoop, parts: dict[str, Tensor]) -> Tensor:
    """[B] float32: the reward model's own score, or several combined as --reward_ensemble says."""
    if len(members(loop)) == 1:
        return parts[REWARD_MODEL]
    return ensemble.combined(comparable(loop, parts), loop.args.reward_ensemble, loop.args.ensemble_penalty)


def comparable(loop: PPOLoop, parts: dict[str, Tensor]) -> Tensor:
    """[K, B] float32: scores of the K reward models, each in standard deviations of the SFT model's own answers."""
    names = list(members(loop))
    scores = torch.stack([parts[name] for name in names])
    means = scores.new_tensor([loop.reward_stats[f"{prefix(name)}mean"] for name in names])
    stds = scores.new_tensor([loop.reward_stats[f"{prefix(name)}std"] for name in names])
    return ensemble.standardised(scores, means, stds)


def transform_of(loop: PPOLoop, part: str) -> str:
    """How a part is transformed before it is weighed: raw, sigmoid or standardize."""
    args = loop.args
    if part == REWARD_MODEL:
        return args.reward_transform
    chosen = args.function_transforms or ["raw"]
    # By place and not by name: the flags follow the order of --reward_functions.
    place = [function.name for function in loop.functions].index(part)
    return chosen[place] if len(chosen) > 1 else chosen[0]


def total(loop: PPOLoop, parts: dict[str, Tensor], rollout: Rollout) -> Tensor:
    """[B] float32: the scores that PPO maximises."""
    args = loop.args
    changed = {}
    for name in part_names(loop):
        part = model_score(loop, parts) if name == REWARD_MODEL else parts[name]
        changed[name] = _transformed(loop, name, part)
    scores = weighted(loop, changed)

    # An answer cut at the maximum length never reached its end.
    unfinished = ~rollout.ended(loop.sampling.stop_ids)
    scores = scores - args.reward_baseline - args.missing_eos_penalty * unfinished
    return scores.clamp(-args.score_clip, args.score_clip) if args.score_clip else scores


def prefix(name: str) -> str:
    """Beginning of a part's keys in the statistics; the first reward model's have none."""
    return "" if name == REWARD_MODEL else f"{name}/"


def _transformed(loop: PPOLoop, name: str, part: Tensor) -> Tensor:
    how = transform_of(loop, name)
    if how == "sigmoid":
        return part.sigmoid()
    if how == "standardize":
        # Several reward models were standardized before they were combined, so that what disagreement costs stays.
        if name != REWARD_MODEL or len(members(loop)) == 1:
            part = (part - loop.reward_stats[f"{prefix(name)}mean"]) / loop.reward_stats[f"{prefix(name)}std"]
        # The clamp keeps one outlier from dominating a batch.
        return part.clamp(-5, 5)
    if how != "raw":
        raise ValueError(f"--reward_transform {how} was not settled before the first score")
    return part


def to_measure(loop: PPOLoop) -> list[str]:
    """Parts whose mean and deviation on the SFT model's answers are needed; of several reward models each one's."""
    standardized = [name for name in part_names(loop) if transform_of(loop, name) == "standardize"]
    several = list(members(loop)) if len(members(loop)) > 1 else []
    return list(dict.fromkeys(several + standardized))


def statistics(loop: PPOLoop, parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean and deviation of the parts to be standardised, over all ranks: "mean", "std", "<part>/mean" and so on.

    Raises: ValueError where a part gives all of these answers one score.
    """
    stats = {}
    roles = members(loop)
    for name in to_measure(loop):
        scores = torch.cat([batch[name] for batch in parts])
        mean, std = moments(loop, scores)
        # Written so that NaN, of a part that applied to nothing, is refused too.
        if not std > 0:
            who = f"the reward function {name}"
            if name in roles:
                who = "the reward model" + (f" {loop.args.reward_roles[roles[name]]}" if len(roles) > 1 else "")
            raise ValueError(f"{who} gives all answers of the SFT model one score: it cannot teach anything")
        stats |= {f"{prefix(name)}mean": mean, f"{prefix(name)}std": std}
    return stats


def moments(loop: PPOLoop, part: Tensor) -> tuple[float, float]:
    """Mean and standard deviation over all ranks of the answers that a part applies to; NaN where it is none."""
    mean, variance = experience.global_moments(loop.accelerator, part.nan_to_num(), ~part.isnan())
    return mean.item(), variance.sqrt().item()


def part_columns(loop: PPOLoop, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """reward/<part> -> [B], for samples.jsonl and metrics; {} where a reward model scores alone."""
    alone = not loop.functions and len(parts) == 1
    return {} if alone else {f"reward/{name}": part for name, part in parts.items()}


def describe_parts(loop: PPOLoop, parts: dict[str, Tensor]) -> dict[str, float]:
    """reward/<part>/mean and /std over all ranks; {} where a reward model scores alone.

    Of several reward models score/spread as well: the standard deviation over them, mean over the answers.
    """
    record = {}
    for name, part in part_columns(loop, parts).items():
        mean, std = moments(loop, part)
        # A part that applied to nothing has nothing to report.
        if math.isfinite(mean):
            record |= {f"{name}/mean": mean, f"{name}/std": std}
    if len(members(loop)) > 1:
        record["score/spread"] = moments(loop, ensemble.spread(comparable(loop, parts)))[0]
    return record


def warn_of_dominating(loop: PPOLoop, record: dict[str, float]) -> None:
    """Say once that one part of the score has come to decide alone, compared with the run's first step."""
    if not loop.functions:
        return
    # A run that goes on finds its first step in the log; the log is read once.
    if loop.first_parts is None:
        loop.first_parts = read_metrics(loop.args.output_dir)[0]
    sentence = dominating_part(loop, record, loop.first_parts)
    if sentence:
        # Nothing is compared with it any more.
        loop.first_parts = {}
        warnings.warn(sentence, stacklevel=2)


def dominating_part(loop: PPOLoop, record: dict[str, float], first: dict[str, float]) -> str | None:
    """A sentence where one part makes up nearly all of the score's variance while another falls; else None.

    Args:
        record, first: `describe_parts` of this step and of the first one.
    """
    # Of several reward models the first stands for all.
    names = [name for name in part_names(loop) if f"reward/{name}/std" in record and f"reward/{name}/std" in first]
    weights = dict(zip(part_names(loop), loop.args.reward_weights or [1.0] * len(part_names(loop)), strict=True))
    # Of the weighted parts: what moves the total most is what PPO follows.
    variances = {name: (weights[name] * record[f"reward/{name}/std"]) ** 2 for name in names}
    whole = sum(variances.values())
    # One part alone always decides.
    if len(names) < 2 or not whole > 0:
        return None

    largest = max(variances, key=variances.get)
    fallen = [
        name
        for name in names
        if name != largest
        and record[f"reward/{name}/mean"] < first[f"reward/{name}/mean"] - FALLEN * first[f"reward/{name}/std"]
    ]
    if variances[largest] < DOMINANT * whole or not fallen:
        return None
    return (
        f"{largest} makes up {variances[largest] / whole:.0%} of the score's variance, and {fallen[0]} has fallen "
        f"from {first[f'reward/{fallen[0]}/mean']:.2f} to {record[f'reward/{fallen[0]}/mean']:.2f}: the other parts "
        "hardly count; change --reward_weights, or standardize the parts"
    )
