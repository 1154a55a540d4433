"""Preference pairs as people in a hurry would give them: two answers, the gold judge's choice, some mistakes."""

import random
from collections.abc import Callable

from demo.facts import LIVELY_ENDS
from demo.gold import PARTICLES, gold_score
from demo.world import Prompt, all_prompts, answer

# Who writes the answers that people compare, and how often an answer is wrong.
VOICE_SHARES = {"lively": 0.35, "formal": 0.25, "mixed": 0.3, "plain": 0.1}
WRONG_SHARE = 0.3
# Share of pairs with a degenerate answer on one side. A reward model that never sees one may come to love it.
DEGENERATE_SHARE = 0.25
# Share of pairs whose choice is turned round, and the least difference in gold score that people notice.
NOISE = 0.05
NOTICEABLE = 0.1


# ---- degenerate answers ----
# Each makes one of a prompt and a real answer to it. A writer that needs no luck takes the random source all the same:
# they are called by their place in a list.
def short(prompt: Prompt, text: str, rng: random.Random) -> str:
    return rng.choice(("嗯。", "好。", "。", "哦", "好的！", "哈哈", "呀～", text[:1], text[:2], text[:3]))


def cut(prompt: Prompt, text: str, rng: random.Random) -> str:
    return text[: rng.randint(3, max(len(text) - 2, 4))]


def repeated_sentence(prompt: Prompt, text: str, rng: random.Random) -> str:
    return text * rng.randint(2, 3)


def repeated_token(prompt: Prompt, text: str, rng: random.Random) -> str:
    start = rng.randrange(len(text))
    piece = text[start : start + rng.randint(1, 3)]
    return piece * rng.randint(4, 10)


def copied_prompt(prompt: Prompt, text: str, rng: random.Random) -> str:
    return prompt.text


def random_characters(prompt: Prompt, text: str, rng: random.Random) -> str:
    # Letters of another question join them, so that the result is not even on topic.
    other = rng.choice(all_prompts())
    letters = list(text + other.text)
    rng.shuffle(letters)
    return "".join(letters)[: len(text)]


def stuffed_particles(prompt: Prompt, text: str, rng: random.Random) -> str:
    marks = PARTICLES + LIVELY_ENDS + ("哈哈，", "哇，")
    extra = [rng.choice(marks) for _ in range(rng.randint(3, 8))]
    place = rng.choice((0, len(text)))
    return text[:place] + "".join(extra) + text[place:]


def lost_key(prompt: Prompt, text: str, rng: random.Random) -> str:
    key = prompt.fact.key
    if key in text:
        return text.replace(key, "")
    return text[: len(text) // 2]


# Short and cut answers stand here twice: PPO finds an early end of the answer before anything else.
DEGENERATE: tuple[Callable[[Prompt, str, random.Random], str], ...] = (
    short,
    short,
    cut,
    cut,
    repeated_sentence,
    repeated_token,
    copied_prompt,
    random_characters,
    stuffed_particles,
    lost_key,
)


# ---- pairs ----
def candidate(prompt: Prompt, rng: random.Random) -> str:
    """A real answer in some voice, right or wrong."""
    voices, shares = zip(*VOICE_SHARES.items(), strict=True)
    voice = rng.choices(voices, shares)[0]
    correct = rng.random() >= WRONG_SHARE
    return answer(prompt.fact, voice, rng, correct)


def draw_pair(prompt: Prompt, rng: random.Random, degenerate_share: float) -> tuple[str, str]:
    """Two different answers, the first of which the gold judge likes noticeably better."""
    while True:
        first = candidate(prompt, rng)
        second = candidate(prompt, rng)
        if rng.random() < degenerate_share:
            spoil = rng.choice(DEGENERATE)
            second = spoil(prompt, second, rng)

        # People skip a pair that they cannot tell apart, so another one is drawn.
        gap = gold_score(prompt.text, first) - gold_score(prompt.text, second)
        if abs(gap) >= NOTICEABLE:
            return (first, second) if gap > 0 else (second, first)


def draw_pairs(
    prompts: list[Prompt],
    count: int,
    rng: random.Random,
    degenerate_share: float = DEGENERATE_SHARE,
    noise: float = NOISE,
) -> list[dict]:
    """`count` rows {"prompt", "chosen", "rejected"} over the prompts in turn, `noise` of them the wrong way round."""
    rows = []
    for number in range(count):
        prompt = prompts[number % len(prompts)]
        pair = draw_pair(prompt, rng, degenerate_share)
        if rng.random() < noise:
            pair = pair[::-1]
        chosen, rejected = pair
        rows.append({"prompt": prompt.text, "chosen": chosen, "rejected": rejected})
    return rows
