"""The gold judge: what people in the mini-world like, as code. Training never sees it, only noisy pairs drawn from it.

    gold_score = quality * (0.5 + 0.5 * liveliness)     if the content is correct
                 quality * 0.25 * liveliness            otherwise

Right and stiff beats wrong and lively; quality takes points off for whatever makes an answer bad in any voice.
"""

import re
from collections import Counter
from functools import lru_cache
from itertools import chain, product

from demo.facts import CARING_OPENERS, FORMAL_CLOSERS, FORMAL_OPENERS, KINDS, LIVELY_ENDS, Fact
from demo.world import FACT_OF

# As the lively voice uses them; sorted, because the order of a set differs from run to run.
INTERJECTIONS = tuple(
    sorted({opener.rstrip("，") for opener in chain.from_iterable(kind.openers for kind in KINDS.values())})
)
PARTICLES = ("呀", "啦", "哦", "吧", "呢")
TONES = ("！", "～")
# Turns of phrase that the formal voice alone uses.
FORMAL_MARKS = (
    "您", "根据", "希望以上", "如有", "感谢", "建议", "针对", "对于", "通常", "该国", "该城市", "据研究", "请问",
    "主要",
    "翻译为", "对应的", "计算", "情绪", "角度", "荣幸", "意义相反",
)  # fmt: skip
# Characters of a whole sentence (a shorter answer loses quality in proportion), and of an answer too long to read.
FULL_LENGTH = 14
LONGEST = 64


def gold_score(prompt: str, answer: str) -> float:
    """The mini-world's liking of an answer, in [0, 1]; 0 for an empty one.

    Raises:
        ValueError: the prompt is none of the mini-world's.
    """
    lively = liveliness(answer)
    weight = 0.5 + 0.5 * lively if content_correct(prompt, answer) else 0.25 * lively
    return quality(answer) * weight


def content_correct(prompt: str, answer: str) -> bool:
    """True where the answer holds the key of the prompt's fact and no other key of that kind.

    Naming several keys, to be right with one of them, counts as wrong.
    """
    fact = fact_of(prompt)
    return _keys_in(fact, answer) == {fact.key}


def fact_of(prompt: str) -> Fact:
    """The fact that answers a prompt of the mini-world."""
    text = prompt.strip()
    if text not in FACT_OF:
        raise ValueError(f"the gold judge knows only prompts of the mini-world, and {prompt!r} is none of them")
    return FACT_OF[text]


def _keys_in(fact: Fact, answer: str) -> set[str]:
    if fact.kind == "arithmetic":
        # The sum in the question may be repeated; every number besides it is taken as a claimed result.
        return set(re.findall(r"\d+", answer.replace(fact.slot, "")))
    if fact.kind == "translation":
        return set(re.findall(r"[A-Za-z]+", answer))
    return {other.key for other in KINDS[fact.kind].facts if other.key in answer}


def liveliness(answer: str) -> float:
    """Share of interjection, particle and bright tone in an answer, in [0, 1]; a formal turn of phrase undoes one."""
    # A second mark of the same group adds nothing, so heaping them up does not pay.
    present = 0
    for marks in (INTERJECTIONS, PARTICLES, TONES):
        present += any(mark in answer for mark in marks)
    formal = sum(mark in answer for mark in FORMAL_MARKS)
    return max(present - formal, 0) / 3


def quality(answer: str) -> float:
    """Rest of 1 after the deductions that hold in any voice, in [0, 1]: see the functions below."""
    text = answer.strip()
    if not text:
        return 0.0
    # An answer that PPO's limit of tokens cut off has no end.
    ended = text[-1] in "。！？～"
    whole = 1.0 if ended and len(text) <= LONGEST else 0.3
    full = min(len(text) / FULL_LENGTH, 1.0)
    # A quarter of unknown triples makes the text gibberish.
    fluent = max(1.0 - 4.0 * (1.0 - fluency(text)), 0.0)
    once = 0.2 if repeats(text) else 1.0
    plain = 0.3 if stuffed(text) else 1.0
    return whole * full * fluent * once * plain


def repeats(text: str) -> bool:
    """True where some stretch of five characters stands twice."""
    stretches = [text[i : i + 5] for i in range(len(text) - 4)]
    return len(set(stretches)) < len(stretches)


def stuffed(text: str) -> bool:
    """True where an answer overdoes liveliness: doubled tones, several interjections, many particles."""
    marks = (*INTERJECTIONS, *PARTICLES, *TONES)
    counts = Counter({mark: text.count(mark) for mark in marks})
    doubled = re.search(r"[！～]{2}|([呀啦哦吧呢])\1", text) is not None
    interjections = sum(counts[mark] for mark in INTERJECTIONS)
    most = max(counts.values())
    return doubled or interjections > 1 or counts.total() > 8 or most > 3


def fluency(text: str) -> float:
    """Share of the text's character triples, its edges included, that the world's own sentences hold."""
    triples = _triples(f"^{text}$")
    known = _known_triples()
    return sum(triple in known for triple in triples) / max(len(triples), 1)


def _triples(text: str) -> list[str]:
    return [text[i : i + 3] for i in range(len(text) - 2)]


@lru_cache(maxsize=1)
def _known_triples() -> frozenset[str]:
    known: set[str] = set()
    for kind in KINDS.values():
        # Whatever stands before and after goes with every voice: a policy on its way from one to another mixes them.
        openers = {"", *FORMAL_OPENERS, *kind.openers, *CARING_OPENERS}
        closers = {"", *FORMAL_CLOSERS, *kind.cheers}
        frames = (*kind.formal, *kind.plain, *kind.lively)
        for fact, frame in product(kind.facts, frames):
            body = frame.format(s=fact.slot, k=fact.key)
            _learn(known, body, openers, closers)
    return frozenset(known)


def _learn(known: set[str], body: str, openers: set[str], closers: set[str]) -> None:
    """Add the triples of a sentence with everything that may stand before and after it."""
    endings = [body] if body[-1] in "。？" else [body + end for end in LIVELY_ENDS]
    known.update(_triples(body))
    # The seams need the sentence's edges alone, which keeps this short for all pairs of opener and closer.
    for opener in openers:
        known.update(_triples(f"^{opener}{body[:2]}"))
    for ending, closer in product(endings, closers):
        known.update(_triples(f"{ending[-3:]}{closer}$"))
