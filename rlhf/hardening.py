"""Hardening a reward model: training pairs of a good answer against a hopeless one, made on the fly."""

import random
from itertools import cycle

from rlhf.degenerate import HARDENING_KINDS, degenerate, same_question
from rlhf.funnel import Funnel

# These are not seen by their looks alone: they take more examples than the others.
MORE_OF = ("other_answer",) * 5 + ("copied_prompt",) * 2 + ("repeated_sentence",) * 4 + ("repeated_token",)
# Tries for each wanted pair: some kinds cannot be made of some answers.
TRIES = 20


def kinds_of(spec: str) -> list[str]:
    """The kinds named by 'a|b', or all that may be trained against for "all".

    Raises: ValueError naming an unknown kind.
    """
    named = HARDENING_KINDS + MORE_OF if spec == "all" else [kind.strip() for kind in spec.split("|") if kind.strip()]
    unknown = [kind for kind in named if kind not in HARDENING_KINDS]
    if unknown or not named:
        raise ValueError(f"--degenerate_kinds {spec}: {unknown or 'nothing'} is none of {'|'.join(HARDENING_KINDS)}")
    return list(named)


def degenerate_pairs(
    rows: list[dict],
    share: float,
    kinds: list[str],
    tokenizer,
    template: str,
    max_length: int,
    seed: int,
    funnel: Funnel,
) -> list[dict]:
    """`share` times as many further pairs as there are rows: a row's chosen answer against a hopeless one.

    Args:
        rows: of `preference_rows`. kinds: taken in turn. max_length: tokens of query and answer.
        funnel: where the made pairs are counted by kind.
    Returns: rows of the same form; the same for the same rows and seed.
    """
    rng, wanted, made = random.Random(f"hardening {seed}"), round(share * len(rows)), []
    order = cycle(rng.sample(range(len(rows)), len(rows)))
    for attempt, number in enumerate(order):
        if len(made) >= wanted or attempt >= TRIES * wanted:
            break
        row, kind = rows[number], kinds[attempt % len(kinds)]
        other = rng.choice(rows)
        # An answer to the same question may be a good one here, too.
        elsewhere = "" if same_question(row, other) else other["chosen"]
        answer = degenerate(kind, row, elsewhere, tokenizer, template, rng)
        if answer is not None and len(row["query_ids"]) + len(answer) <= max_length:
            funnel.made[f"chosen against {kind}"] += 1
            made.append({name: value for name, value in row.items() if name != "margin"} | {"rejected_ids": answer})
    return made
