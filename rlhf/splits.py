"""Rows for training and rows for evaluation, and never a prompt in both."""

import hashlib
import random
from collections import Counter

from rlhf.funnel import Funnel


def split_eval(rows: list[dict], size: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Set evaluation rows aside by whole dialogues: neither a prompt nor a dialogue's opening is on both sides.

    Args:
        rows: of `load_rows`.
        size: a share of the rows below 1, or about how many (all rows of one opening go together).
    Returns: training rows and evaluation rows, both in their old order.
    Raises: ValueError where there are too few different prompts to split.
    """
    wanted = max(1, round(size * len(rows)) if size < 1 else round(size))
    groups = Counter(row.get("opening", row["prompt"]) for row in rows)
    if len(groups) < 2 or wanted >= len(rows):
        raise ValueError(
            f"{len(rows)} rows with {len(groups)} different prompts cannot give {wanted} evaluation rows: "
            "lower --eval_size, or set it to 0 for none"
        )
    # By hash and not by position, so that a prompt's rank does not depend on the other rows or their order.
    ranked = sorted(groups, key=lambda opening: hashlib.sha256(f"{seed} {opening}".encode()).digest())
    aside: set[str] = set()
    count = 0
    for opening in ranked[:-1]:
        if count >= wanted:
            break
        aside.add(opening)
        count += groups[opening]
    sides: tuple[list, list] = ([], [])
    for row in rows:
        sides[row.get("opening", row["prompt"]) in aside].append(row)
    return sides


def subset(rows: list[dict], limit: int, seed: int, funnel: Funnel) -> list[dict]:
    """`limit` rows drawn at random but left in their order (data files are often sorted by topic); -1 keeps all."""
    if limit < 0 or limit >= len(rows):
        return rows
    drawn = set(random.Random(seed).sample(range(len(rows)), limit))
    for number, row in enumerate(rows):
        if number not in drawn:
            funnel.drop("beyond the subset", row["where"])
    return [row for number, row in enumerate(rows) if number in drawn]


def one_half(rows: list[dict], half: int, funnel: Funnel) -> list[dict]:
    """The rows of one half (0 or 1) of the prompts: two models trained on different halves share no prompt.

    By hash of the dialogue's opening alone, whatever the seed and the other rows.

    Raises: ValueError for an empty half.
    """
    kept = []
    for row in rows:
        opening = row.get("opening", row["prompt"])
        if hashlib.sha256(f"half {opening}".encode()).digest()[0] % 2 == half:
            kept.append(row)
        else:
            funnel.drop("in the other half", row["where"])
    if not kept:
        raise ValueError(f"no prompt falls into half {half} of the data: there are too few to split")
    return kept


def without_overlap(rows: list[dict], evaluation: list[dict], funnel: Funnel) -> list[dict]:
    prompts = {row["prompt"] for row in evaluation}
    train = [row for row in rows if row["prompt"] not in prompts]
    for row in rows:
        if row["prompt"] in prompts:
            funnel.drop("prompt is in the evaluation rows", row["where"])
    if not train:
        raise ValueError(
            "every training prompt is in the evaluation rows: name another --eval_split or --dataset_name"
        )
    return train
