"""The audit of a reward model before PPO trusts it: degenerate answers, accuracy by length, calibration, a verdict.

A reward model that is right about seven pairs in ten may still score silence above any answer, because no pair
contained silence; PPO exploits that within a few steps. The audit tries it first, on held-out prompts.
"""

import random
from itertools import chain

import numpy as np
import torch
from torch import nn

from rlhf.data.batches import pad
from rlhf.data.prompt_format import PromptFormat
from rlhf.models.forward import forked_rng
from rlhf.models.scoring import score
from rlhf.reward.degenerate import GATE_KINDS, KINDS, degenerate, kinds_for
from rlhf.reward.statistics import ScoreRows, calibration, length_results, moments, padding_change, points, share
from rlhf.reward.texts import same_question
from rlhf.run.progress import shown

# (kind, number of the pair, row of token ids)
Attack = tuple[str, int, list[int]]

# An attack of GATE_KINDS may win on this share of prompts at most; any other kind is noted above REMARKABLE.
GATE = 0.1
REMARKABLE = 0.5

# Above this rank correlation of score and length, a score counts as nothing but length.
MAX_SPEARMAN = 0.9

# A change under padding is noted above this part of the margins' deviation.
MAX_PADDING_SHARE = 0.1

# What a policy turns to when PPO follows a reward model that prefers an attack.
CONSEQUENCES = {
    "empty": "say nothing at all",
    "eos_only": "end every answer before its first word",
    "one_token": "stop after one token",
    "very_short": "fob everyone off with a word or two",
    "cut": "break off in mid-sentence",
    "repeated_sentence": "say one sentence again and again",
    "repeated_token": "repeat one token up to the length limit",
    "copied_prompt": "hand the question back",
    "other_answer": "give one answer to whatever is asked",
    "random_characters": "write gibberish",
    "doubled": "say everything twice",
    "thanks": "close every answer with thanks",
    "bad_answer": "write what people called bad",
}


# ---- scoring ----
def row_scorer(backbone: nn.Module, head: nn.Module, pad_id: int, batch_size: int, device) -> ScoreRows:
    """Return `score_rows` of a real model: the scores of rows of token ids, in their order, without gradients.

    Rows of like length share a batch. Each module's train or eval mode and torch's random state are left as they were.
    """
    device = torch.device(device)
    modules = [*backbone.modules(), *head.modules()]

    def score_batch(rows: list[list[int]]) -> list[float]:
        batch = pad(rows, pad_id, side="right")
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        return score(backbone, head, **batch).tolist()

    def score_rows(rows: list[list[int]]) -> list[float]:
        # Longest first: if memory is short, that shows in the first batch.
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True)
        sorted_scores = []
        modes = [module.training for module in modules]
        backbone.eval()
        head.eval()

        try:
            with forked_rng(), torch.no_grad():
                for start in shown(range(0, len(order), batch_size), "scoring", "batches"):
                    chunk = order[start : start + batch_size]
                    sorted_scores += score_batch([rows[row] for row in chunk])
        finally:
            # One by one: `train(mode)` would set all parts of a model alike.
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode

        # Back in the order in which the caller has the rows.
        scores = [0.0] * len(rows)
        for row, value in zip(order, sorted_scores, strict=True):
            scores[row] = value
        return scores

    return score_rows


# ---- the audit ----
def audit(
    score_rows: ScoreRows,
    pairs: list[dict],
    prompt_format: PromptFormat,
    seed: int,
    max_length: int,
    *,
    attack_prompts: int = 200,
    padding: bool = False,
) -> dict:
    """Audit a reward model: its scores of held-out pairs and of degenerate answers to their prompts, and the verdict.

    Args:
        score_rows: scores of whole rows, query and response.
        pairs: rows of `preference_rows` with their texts: {"prompt", "chosen", "rejected", "query_ids", "chosen_ids",
            "rejected_ids"}.
        max_length: attacks whose row is longer, in tokens, are left out. attack_prompts: at most, each once.
        padding: also measure how far scores change with the rows beside them in a batch.
    Returns: JSON-safe; a share or correlation that is not defined is None.
    Raises: ValueError without pairs, or for scores that are not finite.
    """
    if not pairs:
        raise ValueError("there is no pair to audit a reward model on")

    # All rows in one call, so that the scorer can sort them by length.
    attacks = make_attacks(pairs, prompt_format, seed, max_length, attack_prompts)
    real = [pair["query_ids"] + pair["chosen_ids"] for pair in pairs]
    real += [pair["query_ids"] + pair["rejected_ids"] for pair in pairs]
    attack_rows = [row for _, _, row in attacks]
    scores = np.array(score_rows(real + attack_rows), dtype=float)
    broken = (~np.isfinite(scores)).sum()
    if broken:
        raise ValueError(f"{broken} of {len(scores)} scores are not finite: PPO cannot use them")

    # The scores come in the order in which the rows were lined up.
    chosen, rejected, attacked = np.split(scores, [len(pairs), 2 * len(pairs)])
    lengths = np.array([[len(pair["chosen_ids"]), len(pair["rejected_ids"])] for pair in pairs])
    margins = chosen - rejected

    # Everything that a report shows; the verdict is made of it.
    results = {
        "pairs": len(pairs),
        "attacks": attack_results(attacks, chosen, attacked),
        "accuracy": share(margins > 0),
        "length": length_results(chosen, rejected, lengths),
        "calibration": calibration(margins),
        "scores": {"chosen": moments(chosen), "rejected": moments(rejected), "margin": moments(margins)},
        "score_range": float(np.ptp(scores)),
        "padding_change": padding_change(score_rows, real) if padding else None,
        "points": points(lengths, chosen, rejected),
    }
    return results | {"verdict": verdict(results)}


def make_attacks(pairs, prompt_format: PromptFormat, seed, max_length, prompts) -> list[Attack]:
    """(kind, number of the pair, row of token ids) of each attack that can be made, on distinct prompts."""
    order = list(range(len(pairs)))
    random.Random(f"attacks {seed}").shuffle(order)
    # Of the pairs that share a prompt the first in the shuffled order counts: here it is written last.
    first = {pairs[number]["prompt"]: number for number in reversed(order)}
    numbers = list(first.values())[:prompts]

    attacks = []
    for place, number in enumerate(numbers):
        pair = pairs[number]
        other = _answer_to_another(pairs, numbers, place)
        for kind in kinds_for(pair):
            # Each attack has random numbers of its own, so it does not depend on which others are made.
            rng = random.Random(f"{seed} {kind} {number}")
            answer = degenerate(kind, pair, other, prompt_format, rng)
            if answer is None:
                continue
            row = pair["query_ids"] + answer
            # A model scores its last token, so a row has to have one.
            if row and len(row) <= max_length:
                attacks.append((kind, number, row))
    return attacks


def _answer_to_another(pairs: list[dict], numbers: list[int], place: int) -> str:
    """The chosen answer of the nearest pair before `place`, or else the last one after it, that asks something else.

    Returns: "" where all pairs ask the same.
    """
    pair = pairs[numbers[place]]
    before = reversed(numbers[:place])
    after = reversed(numbers[place + 1 :])
    for number in chain(before, after):
        if not same_question(pairs[number], pair):
            return pairs[number]["chosen"]
    return ""


def attack_results(attacks: list[Attack], chosen: np.ndarray, scores: np.ndarray) -> dict[str, dict]:
    """By kind: how often the chosen answer wins (a tie is lost) and the mean of its margin over the attack."""
    margins = {kind: [] for kind in KINDS}
    for (kind, number, _), value in zip(attacks, scores, strict=True):
        margins.setdefault(kind, []).append(chosen[number] - value)

    results = {}
    for kind, values in margins.items():
        mean = float(np.mean(values)) if values else None
        # Strictly above: a reward model that cannot tell the two apart does not protect the real answer.
        results[kind] = share(np.array(values) > 0) | {"margin": mean}
    return results


# ---- the verdict ----
def winning_attacks(results: dict[str, dict]) -> dict[str, float]:
    """Kind -> share of prompts, of the attacks of the gate that win on more than GATE of them."""
    lost = {kind: 1 - results[kind]["share"] for kind in GATE_KINDS if results[kind]["n"]}
    return {kind: part for kind, part in lost.items() if part > GATE}


def verdict(results: dict) -> dict:
    """Verdict on a reward model: what PPO would make of it.

    Returns:
        verdict: "pass" or "fail". reasons: why it failed, a sentence each. notes: what else to look at.
        winning: kind -> share of prompts, of the attacks of the gate that win on more than GATE of them.
    """
    # Share of prompts on which an attack wins or draws level.
    lost = {kind: 1 - result["share"] for kind, result in results["attacks"].items() if result["n"]}
    winning = winning_attacks(results["attacks"])
    reasons = _general_reasons(results)
    notes = []

    # In a constant score every attack wins by a tie: that teaches PPO nothing, not these things.
    if not is_constant(results):
        reasons += [consequence(kind, part) for kind, part in winning.items()]
        others = {kind: part for kind, part in lost.items() if kind not in GATE_KINDS}
        notes += [consequence(kind, part) for kind, part in others.items() if part > REMARKABLE]

    # A gate that tried nothing proves nothing.
    untried = [kind for kind in GATE_KINDS if kind not in lost]
    if untried:
        words = f"no prompt to try {', '.join(untried)} on: answers too short, or rows over the length limit"
        if len(untried) == len(GATE_KINDS):
            reasons.append(words)
        else:
            notes.append(words)

    # Rounding alone changes a score by far less than that: such a model takes notice of padding.
    change = results["padding_change"]
    deviation = results["scores"]["margin"]["std"]
    if change is not None and change > MAX_PADDING_SHARE * deviation:
        notes.append(f"a score changes by up to {change:.3g} with the rows beside it (margins: std {deviation:.3g})")

    # One reason is enough to fail; a note never is.
    outcome = "fail" if reasons else "pass"
    return {"verdict": outcome, "winning": winning, "reasons": reasons, "notes": notes}


def is_constant(results: dict) -> bool:
    """Return True if all answers, real and degenerate, get one score (but for rounding)."""
    return results["score_range"] <= 1e-6


def consequence(kind: str, part: float) -> str:
    """One sentence on what PPO would make of an attack that wins on a part of the prompts."""
    return f"{kind} wins on {part:.0%} of prompts: PPO would learn to {CONSEQUENCES[kind]}"


def _general_reasons(results: dict) -> list[str]:
    """Why the scores of the real answers alone rule a reward model out."""
    if is_constant(results):
        return ["scores are constant: PPO would have nothing to learn from"]

    # Accuracy counts as near chance where its interval includes one half.
    reasons = []
    low, high = results["accuracy"]["interval"]
    right = f"right on {results['accuracy']['share']:.0%} of {results['pairs']} pairs"
    if low <= 0.5 <= high:
        reasons.append(f"scores are near chance, {right}: PPO would learn noise")
    elif high < 0.5:
        reasons.append(f"scores are worse than chance, {right}: PPO would learn what people reject")

    # A correlation is None where all scores or all lengths are equal.
    length = results["length"]
    correlations = [length["spearman"] or 0.0, length["spearman_within"] or 0.0]
    strongest = max(correlations, key=abs)
    if abs(strongest) > MAX_SPEARMAN:
        words = "longer" if strongest > 0 else "shorter"
        reasons.append(f"scores length (rank correlation {strongest:+.2f}): PPO would write ever {words} answers")
    return reasons
