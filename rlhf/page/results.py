"""What the votes say: wins of every pair of versions, agreement of people, of the reward model, and length."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations
from statistics import mean

import numpy as np

from rlhf.reward.statistics import share, wilson

SIDES = ("first", "second")


@dataclass(frozen=True)
class Outcome:
    """What people said together of two answers to one prompt.

    votes, said: every vote, and its choice in the order of the first vote's pair. choice: the most frequent one; None
    where two are equally frequent.
    """

    votes: list[dict]
    said: list[str]
    choice: str | None

    @property
    def contradicted(self) -> bool:
        """True where some preferred the first answer and some the second."""
        return set(SIDES) <= set(self.said)

    @property
    def sides(self) -> tuple[dict, dict]:
        """Both answers as {"text", "version", "adapter", "score"}."""
        names = ("text", "version", "adapter", "score")
        made = []
        for side in SIDES:
            made.append({name: self.votes[0][f"{side}_{name}"] for name in names})
        return made[0], made[1]

    @property
    def ordered(self) -> tuple[dict, dict]:
        """The preferred and the other answer, where one is preferred."""
        first, second = self.sides
        return (first, second) if self.choice == "first" else (second, first)


def outcomes(votes: list[dict]) -> list[Outcome]:
    """One outcome for each two texts to a prompt, in the order of their first votes; skips say nothing."""
    # By their texts: two draws or two versions may have written the same.
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for vote in votes:
        if vote["choice"] != "skip":
            texts = sorted([vote["first_text"], vote["second_text"]])
            groups[vote["turns"], *texts].append(vote)
    return [_outcome(group) for group in groups.values()]


def _outcome(group: list[dict]) -> Outcome:
    turned = dict(zip(SIDES, reversed(SIDES), strict=True))
    said = []
    for vote in group:
        # Two people may have seen the same texts as two pairs, in either order.
        same_order = vote["first_text"] == group[0]["first_text"]
        said.append(vote["choice"] if same_order else turned.get(vote["choice"], vote["choice"]))
    counts = Counter(said).most_common()
    # A draw among choices is no choice: the first of them would win by chance of the order.
    is_clear = len(counts) == 1 or counts[0][1] > counts[1][1]
    return Outcome(group, said, counts[0][0] if is_clear else None)


def preferences(together: list[Outcome]) -> list[tuple[dict, dict]]:
    """(preferred, other) of every outcome that prefers an answer."""
    return [outcome.ordered for outcome in together if outcome.choice in SIDES]


# ---- tables ----
def results(votes: list[dict], person: str | None = None) -> dict:
    """Everything that the view shows, JSON-safe, of one person's votes or of all.

    Two answers count once in every share, however many people voted on them: votes on one pair are not independent,
    and an interval over them would be too narrow.
    """
    # Of all votes, so that the list of people stays whole while one of them is looked at.
    people = Counter(vote["person"] for vote in votes)
    own = [vote for vote in votes if person in (None, vote["person"])]
    together = outcomes(own)
    return {
        "people": [{"name": name, "votes": count} for name, count in sorted(people.items())],
        "votes": len(own),
        "skips": sum(vote["choice"] == "skip" for vote in own),
        "prompts": len({vote["turns"] for vote in own}),
        "pairs": version_pairs(together),
        # Of everybody's votes: one person alone agrees with nobody.
        "agreement": agreement(outcomes(votes)),
        "reward": reward_agreement(together),
        "length": lengths(together),
    }


def version_pairs(together: list[Outcome]) -> list[dict]:
    """Wins, losses, ties of every two versions that met, and the share of wins, to which a tie adds half of one."""
    names = labels(together)
    counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for outcome in together:
        pair = [names[side["version"], side["adapter"]] for side in outcome.sides]
        # One order of two versions, whichever was first in the pair of answers.
        key = tuple(sorted(pair))
        if outcome.choice in SIDES:
            winner = pair[SIDES.index(outcome.choice)]
            counts[key]["wins" if winner == key[0] else "losses"] += 1
        else:
            counts[key]["bad" if outcome.choice == "bad" else "ties"] += 1

    rows = []
    for (first, second), count in sorted(counts.items()):
        # Two bad answers are a tie as far as the versions are concerned.
        won = count["wins"] + (count["ties"] + count["bad"]) / 2
        row = {"first": first, "second": second, **interval(won / count.total(), count.total())}
        rows.append(row | {name: count[name] for name in ("wins", "losses", "ties", "bad")})
    return rows


def labels(together: list[Outcome]) -> dict[tuple[str, str], str]:
    """(version, adapter) -> name to show: with the fingerprint's beginning where one name had several adapters."""
    known = set()
    for outcome in together:
        known |= {(side["version"], side["adapter"]) for side in outcome.sides}
    times = Counter(name for name, _ in known)
    return {(name, adapter): name if times[name] == 1 else f"{name} ({adapter[:6]})" for name, adapter in known}


def agreement(together: list[Outcome]) -> dict:
    """How often two people say the same of two answers; n counts the pairs that several people saw."""
    parts = []
    for outcome in together:
        # A tie and two bad answers both prefer neither.
        said = ["tie" if choice == "bad" else choice for choice in outcome.said]
        # A person who saw the same two texts as two pairs counts once.
        by_person = dict(zip((vote["person"] for vote in outcome.votes), said, strict=True))
        if len(by_person) > 1:
            parts.append(mean(a == b for a, b in combinations(by_person.values(), 2)))
    return interval(mean(parts), len(parts)) if parts else {"n": 0, "share": None, "interval": None}


def reward_agreement(together: list[Outcome]) -> dict:
    """Accuracy of the reward model on what people preferred; equal scores are wrong."""
    scores = [(won["score"], lost["score"]) for won, lost in preferences(together)]
    right = [won > lost for won, lost in scored(scores)]
    return share(np.array(right, dtype=bool))


def scored(scores: list[tuple]) -> list[tuple]:
    """The pairs of which both have a score."""
    return [pair for pair in scores if None not in pair]


def lengths(together: list[Outcome]) -> dict:
    """Mean characters of preferred and other answers, and how often the longer one is preferred.

    "warning" is True where the interval of that share lies above one half.
    """
    pairs = [(len(won["text"]), len(lost["text"])) for won, lost in preferences(together)]
    # Answers of one length say nothing of it.
    longer = share(np.array([won > lost for won, lost in pairs if won != lost], dtype=bool))
    return {
        "winners": mean(won for won, _ in pairs) if pairs else None,
        "losers": mean(lost for _, lost in pairs) if pairs else None,
        "longer": longer,
        "warning": bool(longer["n"] and longer["interval"][0] > 0.5),
    }


def interval(part: float, n: int) -> dict:
    """{"n", "share", "interval"} of a share of n pairs of answers; the interval covers 95 %."""
    # Wilson's interval also holds for a mean of half points: they vary less than wins and losses.
    low, high = wilson(part, n)
    # Rounding can carry an end of the interval just outside [0, 1].
    return {"n": n, "share": part, "interval": [max(0.0, low), min(1.0, high)]}
