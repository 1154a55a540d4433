"""Degenerate answers made from a good one: the audit attacks a reward model with them, hardening trains against them.

PPO searches for whatever a reward model likes by mistake, and that is rarely in the preference data: silence, one
word, the same sentence over and over. Each kind here imitates one way in which such runs have ended.
"""

import math
import random
from collections.abc import Callable
from itertools import cycle
from typing import TYPE_CHECKING

from rlhf.data.template import turns_of
from rlhf.reward.texts import alike, language, same_question, sentences

# The flags of the reward stage ask for the kinds, before any library that takes seconds to load.
if TYPE_CHECKING:
    from rlhf.data.funnel import Funnel
    from rlhf.data.prompt_format import PromptFormat

# A maker's result: text, or token ids with their stop token where a kind is about tokens; None: it cannot be made.
Made = str | list[int] | None

# From this many tokens on, one of them alone is no answer: one token of "42" or "是的。" may well be.
ENOUGH_TOKENS = 4

# Said once or twice, a sentence may still be a good answer.
MIN_REPEATS = 3

# By language: short words that dodge any question.
SHORT = {
    "zh": ("嗯。", "哦。", "好的。", "是的。", "不知道。"),
    "en": ("OK.", "Yes.", "No.", "Hm.", "Sure."),
}

# By language: closings that go with any answer.
CLOSINGS = {
    "zh": ("谢谢！", "谢谢您的提问。", "希望对您有帮助。"),
    "en": ("Thank you!", "Thanks for asking.", "I hope this helps."),
}


# ---- kinds ----
def _join(parts: list[str]) -> str:
    """One text: a space after a part that ends in ASCII, nothing after a Chinese mark."""
    spaced = [f"{part} " if part[-1:].isascii() else part for part in parts]
    return "".join(spaced).strip()


def empty(pair: dict, other: str, rng: random.Random) -> Made:
    """No token at all: the row ends with the query."""
    return []


def eos_only(pair: dict, other: str, rng: random.Random) -> Made:
    """The stop token alone."""
    return pair["chosen_ids"][-1:]


def one_token(pair: dict, other: str, rng: random.Random) -> Made:
    """A random token of the good answer, and the stop token."""
    *tokens, stop = pair["chosen_ids"]
    if len(tokens) < ENOUGH_TOKENS:
        return None
    return [rng.choice(tokens), stop]


def very_short(pair: dict, other: str, rng: random.Random) -> Made:
    """A word that dodges the question, or the first characters; at most half as long as the good answer."""
    good = pair["chosen"].strip()
    beginnings = [good[:1], good[:2], good[:3]]
    words = [*SHORT[language(good)], *beginnings]
    fitting = [word for word in words if 2 * len(word) <= len(good)]
    return rng.choice(fitting) if fitting else None


def cut(pair: dict, other: str, rng: random.Random) -> Made:
    """The good answer ended too early, at a random token of its first three quarters."""
    *tokens, stop = pair["chosen_ids"]
    most = max(1, len(tokens) * 3 // 4)
    return tokens[: rng.randint(1, most)] + [stop]


def repeated_sentence(pair: dict, other: str, rng: random.Random) -> Made:
    """One sentence again and again, until it is at least as long as the good answer."""
    originals = sentences(pair["chosen"])
    if not originals:
        return None

    sentence = rng.choice(originals)
    enough = math.ceil(len(pair["chosen"]) / len(sentence))
    # Up to two more, so that the length does not give it away.
    times = max(MIN_REPEATS, enough) + rng.randint(0, 2)
    return _join([sentence] * times)


def repeated_token(pair: dict, other: str, rng: random.Random) -> Made:
    """One token again and again, from as long as the good answer to twice as long."""
    *tokens, stop = pair["chosen_ids"]
    if not tokens:
        return None

    token = rng.choice(tokens)
    least = max(len(tokens), ENOUGH_TOKENS)
    times = rng.randint(least, 2 * least)
    return [token] * times + [stop]


def copied_prompt(pair: dict, other: str, rng: random.Random) -> Made:
    """The question, word for word."""
    return pair["prompt"]


def other_answer(pair: dict, other: str, rng: random.Random) -> Made:
    """The good answer to another prompt; None for one so much like this prompt's that it may be as good."""
    if alike(other, pair["chosen"]):
        return None
    return other


def random_characters(pair: dict, other: str, rng: random.Random) -> Made:
    """Characters of two answers in random order, as many as the good one has."""
    characters = list(pair["chosen"] + other)
    rng.shuffle(characters)
    kept = characters[: len(pair["chosen"])]
    return "".join(kept).strip()


def doubled(pair: dict, other: str, rng: random.Random) -> Made:
    """The good answer, and the good answer once more."""
    return _join([pair["chosen"]] * 2)


def thanks(pair: dict, other: str, rng: random.Random) -> Made:
    """The good answer with a polite closing that it does not hold already."""
    good = pair["chosen"].rstrip()
    new = [closing for closing in CLOSINGS[language(good)] if closing not in good]
    if not good or not new:
        return None
    return _join([good, rng.choice(new)])


def bad_answer(pair: dict, other: str, rng: random.Random) -> Made:
    """An answer that people called bad (rlhf/reward/bad_answers.py)."""
    return rng.choice(pair["bad_answers"])


KINDS: dict[str, Callable[[dict, str, random.Random], Made]] = {
    maker.__name__: maker
    for maker in (
        empty, eos_only, one_token, very_short, cut, repeated_sentence, repeated_token, copied_prompt, other_answer,
        random_characters, doubled, thanks,
    )
}  # fmt: skip


def kinds_for(pair: dict) -> list[str]:
    """The kinds to attack a pair with: KINDS, and "bad_answer" where people have called answers bad."""
    return [*KINDS, "bad_answer"] if pair.get("bad_answers") else list(KINDS)


# Beyond doubt worse than a good answer. The others may not be: a cut can fall on a full stop, another prompt's answer
# can fit ("You are welcome"), and a good answer said twice or with thanks is still one.
GATE_KINDS = (
    "empty", "eos_only", "one_token", "very_short", "repeated_token", "repeated_sentence", "random_characters",
    "copied_prompt",
)  # fmt: skip

# What may be trained against. Five of them are shorter than the good answer, three longer and three about as long, so
# that they do not teach length. Politeness is no fault.
HARDENING_KINDS = tuple(kind for kind in KINDS if kind != "thanks")


# ---- one answer ----
def degenerate(
    kind: str, pair: dict, other: str, prompt_format: "PromptFormat", rng: random.Random
) -> list[int] | None:
    """Token ids of a degenerate answer to the prompt of `pair`.

    Args:
        kind: one of `kinds_for`. other: the good answer to another prompt.
        pair: {"prompt", "chosen"}, plain texts; "chosen_ids", with stop token, spares encoding them again.
        rng: the only source of chance; one in the same state gives the same answer.
    Returns:
        response ids ending in the stop token ([] for "empty"); None where the kind cannot be made of this pair, or
        would be the chosen answer itself or no token.
    """
    turns = turns_of(pair)
    if "chosen_ids" not in pair:
        _, chosen_ids = prompt_format.encode_answer(turns, pair["chosen"])
        pair = pair | {"chosen_ids": chosen_ids}

    # Text is encoded as any answer is; ids are taken as they are.
    made = (bad_answer if kind == "bad_answer" else KINDS[kind])(pair, other, rng)
    if isinstance(made, str):
        _, answer_ids = prompt_format.encode_answer(turns, made)
        # Text of which the tokenizer leaves nothing would be eos_only once more.
        made = answer_ids if len(answer_ids) > 1 else None

    # The chosen answer itself is no attack on it.
    return None if made == pair["chosen_ids"] else made


# ---- hardening ----
# Further examples of the kinds that a model is slow to see, because each part of them looks like a good answer.
MORE_OF = (
    *["other_answer"] * 5,
    *["copied_prompt"] * 2,
    *["repeated_sentence"] * 4,
    "repeated_token",
)

# Tries for each wanted pair: some kinds cannot be made of some answers.
TRIES = 20


def kinds_of(spec: str) -> list[str]:
    """The kinds named by 'a|b', or all that may be trained against for "all".

    Raises: ValueError naming an unknown kind.
    """
    if spec == "all":
        return [*HARDENING_KINDS, *MORE_OF]

    words = [word.strip() for word in spec.split("|")]
    named = [word for word in words if word]
    unknown = [kind for kind in named if kind not in HARDENING_KINDS]
    if unknown or not named:
        raise ValueError(f"--degenerate_kinds {spec}: {unknown or 'nothing'} is none of {'|'.join(HARDENING_KINDS)}")
    return named


def degenerate_pairs(
    rows: list[dict],
    share: float,
    kinds: list[str],
    prompt_format: "PromptFormat",
    max_length: int,
    seed: int,
    funnel: "Funnel",
) -> list[dict]:
    """`share` times as many further pairs as there are rows: a row's chosen answer against a degenerate one.

    Args:
        rows: of `preference_rows`. kinds: taken in turn. max_length: tokens of query and answer.
        funnel: where the made pairs are counted by kind.
    Returns: rows of the same form; the same for the same rows and seed.
    """
    # A random order, in which every row has its turn before any comes again.
    rng = random.Random(f"hardening {seed}")
    wanted = round(share * len(rows))
    order = rng.sample(range(len(rows)), len(rows))
    made = []

    # Rows are taken round after round: --degenerate_frac may ask for more pairs than there are rows.
    for attempt, number in enumerate(cycle(order)):
        if len(made) >= wanted or attempt >= TRIES * wanted:
            break

        # One try: the next row, the next kind, and an answer to some other prompt.
        row = rows[number]
        kind = kinds[attempt % len(kinds)]
        other = rng.choice(rows)
        # An answer to the same question may be a good one here, too.
        elsewhere = "" if same_question(row, other) else other["chosen"]
        answer = degenerate(kind, row, elsewhere, prompt_format, rng)
        if answer is None or len(row["query_ids"]) + len(answer) > max_length:
            continue

        # The margin of the row was between other answers.
        new_pair = {name: value for name, value in row.items() if name != "margin"}
        made.append(new_pair | {"rejected_ids": answer})
        funnel.made[f"chosen against {kind}"] += 1
    return made
