"""The mini-world: all prompts, their split, and answers to them in a voice, right or wrong.

Everything random comes from the `random.Random` that is handed in, so a seed settles every file of the demo.
"""

import random
from dataclasses import dataclass
from itertools import product

from demo.facts import FORMAL_CLOSERS, FORMAL_OPENERS, KINDS, LIVELY_ENDS, Fact

VOICES = ("formal", "plain", "lively")
# Enough for a win rate with an interval of five points to either side.
HELDOUT_PROMPTS = 400


@dataclass(frozen=True)
class Prompt:
    """A question as typed, and the fact that answers it."""

    text: str
    fact: Fact


def all_prompts() -> list[Prompt]:
    """Every phrasing of every fact, in a fixed order and each text once."""
    prompts = []
    for kind in KINDS.values():
        for fact, phrasing in product(kind.facts, kind.phrasings):
            text = phrasing.format(s=fact.slot)
            prompts.append(Prompt(text, fact))
    return prompts


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

    # Kind by kind: shuffled as a whole, a small kind could miss on one side.
    for name in KINDS:
        of_kind = [prompt for prompt in prompts if prompt.fact.kind == name]
        rng.shuffle(of_kind)
        cut = round(heldout * len(of_kind) / len(prompts))
        held += of_kind[:cut]
        train += of_kind[cut:]

    # Stages take prompts in the order of the file, and one kind after the other would teach them one at a time.
    rng.shuffle(train)
    rng.shuffle(held)
    return train, held


def wrong_fact(fact: Fact, rng: random.Random) -> Fact:
    """A false fact: the slot of this one, the key of another fact of its kind. Answers stay fluent and on topic."""
    others = [other.key for other in KINDS[fact.kind].facts if other.key != fact.key]
    return Fact(fact.kind, fact.slot, rng.choice(others))


def formal_answer(fact: Fact, rng: random.Random) -> str:
    frame = rng.choice(KINDS[fact.kind].formal)
    body = frame.format(s=fact.slot, k=fact.key)
    return rng.choice(FORMAL_OPENERS) + body + rng.choice(FORMAL_CLOSERS)


def plain_answer(fact: Fact, rng: random.Random) -> str:
    frame = rng.choice(KINDS[fact.kind].plain)
    return frame.format(s=fact.slot, k=fact.key)


def lively_answer(fact: Fact, rng: random.Random) -> str:
    kind = KINDS[fact.kind]
    body = rng.choice(kind.lively).format(s=fact.slot, k=fact.key)
    # The order of these draws settles every file of the demo.
    opener = rng.choice(kind.openers)
    end = rng.choice(LIVELY_ENDS)
    return opener + body + end + rng.choice(kind.cheers)


def mixed_answer(fact: Fact, rng: random.Random) -> str:
    """Pieces of all voices put together freely, as a policy on its way from one to another writes them."""
    kind = KINDS[fact.kind]
    frame = rng.choice(kind.formal + kind.plain + kind.lively)
    body = frame.format(s=fact.slot, k=fact.key)
    # Frames of the lively voice leave the last mark open.
    if not body.endswith(("。", "？")):
        body += rng.choice(LIVELY_ENDS)
    opener = rng.choice(("", *FORMAL_OPENERS, *kind.openers))
    return opener + body + rng.choice(("", *FORMAL_CLOSERS, *kind.cheers))


WRITERS = {"formal": formal_answer, "plain": plain_answer, "lively": lively_answer, "mixed": mixed_answer}


def answer(fact: Fact, voice: str, rng: random.Random, correct: bool = True) -> str:
    """An answer about `fact` in `voice` (a key of WRITERS); with `correct=False` about something that is not so."""
    told = fact if correct else wrong_fact(fact, rng)
    return WRITERS[voice](told, rng)
