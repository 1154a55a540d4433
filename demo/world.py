"""The mini-world: every prompt there is, how it is split, and answers to it in a voice, right or wrong.

Everything random comes from the `random.Random` that is handed in, so a seed settles every file of the demo.
"""

import random
from dataclasses import dataclass

from demo.facts import FORMAL_CLOSERS, FORMAL_OPENERS, KINDS, LIVELY_ENDS, Fact

VOICES = ("formal", "plain", "lively")
HELDOUT_PROMPTS = 400


@dataclass(frozen=True)
class Prompt:
    """A question as typed, and the fact that answers it."""

    text: str
    fact: Fact


def all_prompts() -> list[Prompt]:
    """Every phrasing of every fact, in a fixed order and each text once."""
    return [
        Prompt(phrasing.format(s=fact.slot), fact)
        for kind in KINDS.values()
        for fact in kind.facts
        for phrasing in kind.phrasings
    ]


FACT_OF = {prompt.text: prompt.fact for prompt in all_prompts()}


def split_prompts(seed: int, heldout: int = HELDOUT_PROMPTS) -> tuple[list[Prompt], list[Prompt]]:
    """Split the prompts in (training, held out), no text on both sides and each kind by its share.

    A held-out prompt is a new way of asking about a fact that the training prompts ask about in other words: what is
    measured on it is whether the model understood, not whether it can guess.
    """
    rng = random.Random(f"split {seed}")
    prompts = all_prompts()
    train = []
    held = []

    for name in KINDS:
        of_kind = [prompt for prompt in prompts if prompt.fact.kind == name]
        rng.shuffle(of_kind)
        cut = round(heldout * len(of_kind) / len(prompts))
        held += of_kind[:cut]
        train += of_kind[cut:]

    rng.shuffle(train)
    rng.shuffle(held)
    return train, held


def wrong_fact(fact: Fact, rng: random.Random) -> Fact:
    """The same slot with the key of another fact of its kind: fluent, on topic and false."""
    others = [other.key for other in KINDS[fact.kind].facts if other.key != fact.key]
    return Fact(fact.kind, fact.slot, rng.choice(others))


def formal_answer(fact: Fact, rng: random.Random) -> str:
    body = rng.choice(KINDS[fact.kind].formal).format(s=fact.slot, k=fact.key)
    return rng.choice(FORMAL_OPENERS) + body + rng.choice(FORMAL_CLOSERS)


def plain_answer(fact: Fact, rng: random.Random) -> str:
    return rng.choice(KINDS[fact.kind].plain).format(s=fact.slot, k=fact.key)


def lively_answer(fact: Fact, rng: random.Random) -> str:
    kind = KINDS[fact.kind]
    body = rng.choice(kind.lively).format(s=fact.slot, k=fact.key)
    return rng.choice(kind.openers) + body + rng.choice(LIVELY_ENDS) + rng.choice(kind.cheers)


def mixed_answer(fact: Fact, rng: random.Random) -> str:
    """Pieces of all voices put together freely, as a policy on its way from one to another writes them."""
    kind = KINDS[fact.kind]
    body = rng.choice(kind.formal + kind.plain + kind.lively).format(s=fact.slot, k=fact.key)
    body += "" if body.endswith("。") or body.endswith("？") else rng.choice(LIVELY_ENDS)
    opener = rng.choice(("", *FORMAL_OPENERS, *kind.openers))
    return opener + body + rng.choice(("", *FORMAL_CLOSERS, *kind.cheers))


WRITERS = {"formal": formal_answer, "plain": plain_answer, "lively": lively_answer, "mixed": mixed_answer}


def answer(fact: Fact, voice: str, rng: random.Random, correct: bool = True) -> str:
    """An answer about `fact` in `voice` (a key of WRITERS); with `correct=False` about something that is not so."""
    return WRITERS[voice](fact if correct else wrong_fact(fact, rng), rng)
