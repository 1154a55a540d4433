"""Which pair a person sees next, on which side each answer stands, and what becomes of a vote."""

import hashlib
import random
import threading
import time
from dataclasses import dataclass
from itertools import combinations, groupby

from rlhf.page.store import Prompt, Store, Version, Written

# A pair on somebody's screen is kept from others for so long.
RESERVED_SECONDS = 900

Couple = tuple[Written, Written]


class UnknownPair(ValueError):
    """A vote names a pair that there is not."""


@dataclass(frozen=True)
class Match:
    """Two versions to be compared on a prompt; each version pair of a prompt has its turn in another round."""

    round: int
    prompt: Prompt
    versions: tuple[Version, Version]


@dataclass(frozen=True)
class Shown:
    """A pair as a person sees it; `left_side` says which of the pair stands on the left."""

    pair: int
    prompt: Prompt
    left: Written
    right: Written
    left_side: str


class Plan:
    """The matches in their order, what is voted of them, and what lies on whose screen. Any thread may call it."""

    def __init__(self, store: Store, versions: list[Version], seed: int):
        self.store = store
        self.versions = versions
        self.seed = seed
        # Re-entrant, because `undo` holds it and calls `show`.
        self.lock = threading.RLock()
        # (prompt, version) -> its answer; where several draws are stored, the first.
        self.written: dict[tuple[int, Version], Written] = {}
        # (first answer, second answer) -> pair, and the way back.
        self.pairs: dict[tuple[int, int], int] = {}
        self.couples: dict[int, Couple] = {}
        # Pair -> person -> choice.
        self.voted: dict[int, dict[str, str]] = {}
        # Pair -> person -> (tab, until when).
        self.reserved: dict[int, dict[str, tuple[str, float]]] = {}
        self.prompts: dict[int, Prompt] = {}
        self.matches: list[Match] = []

        # What was shown before a restart may still lie on somebody's screen.
        answers = store.answers()
        self.note_answers(answers)
        by_id = {answer.id: answer for answer in answers}
        for pair, first, second in store.pairs():
            self._note_pair(pair, (by_id[first], by_id[second]))
        for vote in store.votes():
            self.voted.setdefault(vote["pair"], {})[vote["person"]] = vote["choice"]
        self.refresh()

    def refresh(self) -> None:
        """Make the matches of all prompts in the store; prompts from the chat come first in each round."""
        matches = []
        couples = list(combinations(self.versions, 2))
        prompts = self.store.prompts()
        for prompt in prompts:
            # Drawn by the prompt alone, so that a restart goes on with the same plan.
            draw = random.Random(f"{self.seed} {prompt.turns}")
            # Rounds: everybody votes on all prompts once before a prompt comes with its next two versions.
            order = draw.sample(couples, len(couples))
            matches += [Match(number, prompt, couple) for number, couple in enumerate(order)]

        with self.lock:
            self.prompts = {prompt.id: prompt for prompt in prompts}
            self.matches = sorted(matches, key=lambda m: (m.round, m.prompt.origin != "chat", m.prompt.id))

    def note_answers(self, answers: list[Written]) -> None:
        """Take note of answers that the store has."""
        with self.lock:
            for answer in answers:
                self.written.setdefault((answer.prompt, answer.version), answer)

    def _note_pair(self, pair: int, couple: Couple) -> None:
        self.pairs[couple[0].id, couple[1].id] = pair
        self.couples[pair] = couple

    # ---- what is next ----
    def next(self, person: str, tab: str, count: int) -> list[Shown]:
        """Up to `count` prepared pairs for a person, held for this tab of the browser."""
        with self.lock:
            # Different pairs for different people first: the fewest votes are spent twice.
            pairs = self._free(person, tab, count, heed_others=True)
            # Rather a pair that lies on another screen too than none.
            pairs = pairs or self._free(person, tab, count, heed_others=False)
            for shown in pairs:
                self._reserve(shown.pair, person, tab)
            return pairs

    def _free(self, person: str, tab: str, count: int, heed_others: bool) -> list[Shown]:
        pairs = []
        for match in self.matches:
            couple = self._couple(match)
            if couple is None or is_same(couple) or self._is_done(couple, match.prompt, person):
                continue
            if heed_others and self._is_taken(couple, match.prompt, person, tab):
                continue
            pairs.append(self.show(self._pair(couple), person))
            if len(pairs) == count:
                break
        return pairs

    def _couple(self, match: Match) -> Couple | None:
        """Both answers of a match; None while one is missing."""
        first, second = (self.written.get((match.prompt.id, version)) for version in match.versions)
        return None if first is None or second is None else (first, second)

    def _pair(self, couple: Couple) -> int:
        ids = (couple[0].id, couple[1].id)
        if ids not in self.pairs:
            self._note_pair(self.store.pair(*ids), couple)
        return self.pairs[ids]

    def _votes(self, couple: Couple) -> dict[str, str]:
        return self.voted.get(self._id(couple), {})

    def _id(self, couple: Couple) -> int | None:
        """Id of a pair of answers, None before it is first shown."""
        return self.pairs.get((couple[0].id, couple[1].id))

    def _is_done(self, couple: Couple, prompt: Prompt, person: str) -> bool:
        votes = self._votes(couple)
        if person in votes:
            return True
        # One vote is enough where the prompt is not shared; what one skips another may know.
        return not prompt.shared and any(choice != "skip" for choice in votes.values())

    def _is_taken(self, couple: Couple, prompt: Prompt, person: str, tab: str) -> bool:
        now = time.monotonic()
        for holder, (held_by, until) in self.reserved.get(self._id(couple), {}).items():
            # A shared pair is for everybody, but for one tab of each.
            others = held_by != tab if holder == person else not prompt.shared
            if others and until > now:
                return True
        return False

    def _reserve(self, pair: int, person: str, tab: str) -> None:
        self.reserved.setdefault(pair, {})[person] = (tab, time.monotonic() + RESERVED_SECONDS)

    def show(self, pair: int, person: str) -> Shown:
        """A pair as this person sees it. Raises: UnknownPair."""
        if pair not in self.couples:
            raise UnknownPair("there is no such pair")
        first, second = self.couples[pair]
        prompt = self.prompts[first.prompt]
        # By a hash and not by a draw: a pair that comes again stands as it stood, and the secret keeps the side from
        # being computed outside.
        digest = hashlib.sha256(f"{self.store.secret} {pair} {person}".encode()).digest()
        if digest[0] % 2:
            return Shown(pair, prompt, second, first, "second")
        return Shown(pair, prompt, first, second, "first")

    def wanted(self, count: int) -> list[tuple[Prompt, Version]]:
        """Missing answers of the next `count` matches that nobody has voted on."""
        missing = {}
        with self.lock:
            for match in self.matches:
                couple = self._couple(match)
                # What is voted, or cannot be because both answers are one text, needs no room.
                if couple is not None and (is_same(couple) or self._votes(couple)):
                    continue
                for version in match.versions:
                    if (match.prompt.id, version) not in self.written:
                        # Once each, although several matches may wait for one answer.
                        missing[match.prompt.id, version] = (match.prompt, version)
                count -= 1
                if count == 0:
                    break
        return list(missing.values())

    def progress(self, person: str) -> dict:
        """{"done", "total", "waiting", "same", "round", "rounds"} of the first round not finished by this person."""
        with self.lock:
            rounds = [list(matches) for _, matches in groupby(self.matches, lambda match: match.round)] or [[]]
            for number, matches in enumerate(rounds, 1):
                counted = self._counted(matches, person) | {"round": number, "rounds": len(rounds)}
                if counted["done"] < counted["total"]:
                    break
            return counted

    def _counted(self, matches: list[Match], person: str) -> dict:
        """Matches of a round: voted, all to vote on, not written yet, and those of two equal texts."""
        done = 0
        total = 0
        waiting = 0
        same = 0
        for match in matches:
            couple = self._couple(match)
            if couple and is_same(couple):
                same += 1
                continue
            total += 1
            waiting += couple is None
            done += couple is not None and self._is_done(couple, match.prompt, person)
        return {"done": done, "total": total, "waiting": waiting, "same": same}

    # ---- votes ----
    def vote(self, given: dict) -> tuple[int, Shown]:
        """Store a vote ("side" is left, right, tie, bad or skip); its id, and the pair with its names.

        Raises: as `Store.add_vote`; UnknownPair.
        """
        shown = self.show(given["pair"], given["person"])
        other = "second" if shown.left_side == "first" else "first"
        sides = {"left": shown.left_side, "right": other}
        choice = sides.get(given["side"], given["side"])
        fields = {name: given[name] for name in ("key", "pair", "person", "margin", "reason", "edited", "seconds")}
        # On the disk first: what is in memory only follows it, so that no error leaves the two apart.
        number = self.store.add_vote({**fields, "choice": choice, "left_side": shown.left_side})

        with self.lock:
            self.voted.setdefault(given["pair"], {})[given["person"]] = choice
            self.reserved.get(given["pair"], {}).pop(given["person"], None)
        return number, shown

    def undo(self, number: int, person: str, tab: str) -> Shown | None:
        """Take a vote back and show its pair again; None where this person has no such vote."""
        pair = self.store.remove_vote(number, person)
        if pair is None:
            return None
        with self.lock:
            self.voted.get(pair, {}).pop(person, None)
            self._reserve(pair, person, tab)
            return self.show(pair, person)


def is_same(couple: Couple) -> bool:
    """Return True for two answers of one text, between which nobody can choose."""
    return couple[0].text == couple[1].text
