"""Votes as data for training: pairs for reward_modeling.py, edited answers for SFT, bad answers for the audit."""

import json
import os
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from rlhf.page.results import SIDES, Outcome, outcomes

PAIRS = "pairs.jsonl"
SFT = "sft.jsonl"
BAD = "bad_answers.jsonl"
FILES = (PAIRS, SFT, BAD)

# What becomes of votes and of pairs of answers, in the order in which it is told.
FUNNEL = {
    "votes": "votes",
    "skips": "skipped",
    "repeated": "votes of several people on one pair, taken together",
    "contradicted": "pairs on which people contradict one another (the majority counts)",
    "ties": "ties, left out",
    "bad": "pairs with two bad answers, left out",
    "undecided": "pairs without a majority, left out",
    "empty": "pairs with an empty answer, left out",
    "pairs": f"pairs in {PAIRS}",
    "edited": f"edited answers in {SFT}",
    "bad_answers": f"bad answers in {BAD}",
}


@dataclass
class Export:
    """Rows of the three files, what became of the votes (keys of FUNNEL), and whether any vote has a margin."""

    pairs: list[dict] = field(default_factory=list)
    sft: list[dict] = field(default_factory=list)
    bad: list[dict] = field(default_factory=list)
    funnel: dict[str, int] = field(default_factory=dict)
    with_margin: bool = False

    def in_words(self) -> str:
        """The funnel, a line for each number that is not 0."""
        return "\n".join(f"  {count:>6} {FUNNEL[name]}" for name, count in self.funnel.items() if count)


def collect(votes: list[dict]) -> Export:
    """The rows that the votes make; what several people said of one pair makes one row, by majority."""
    made = Export()
    together = outcomes(votes)
    # One column for the prompts of all rows, or a reader would take one kind of them for malformed.
    as_messages = any(len(json.loads(vote["turns"])) > 1 for vote in votes)

    fates = Counter()
    for outcome in together:
        asked = json.loads(outcome.votes[0]["turns"])
        # A dialogue stays one, for the reader of the pairs to render it as in training.
        prompt = {"messages": as_objects(asked)} if as_messages else {"prompt": asked[0][1]}
        fate = _fate(outcome)
        fates[fate] += 1
        if fate == "pairs":
            # The texts as they were shown; an edited answer is another text, and goes to SFT alone.
            chosen, rejected = outcome.ordered
            margin = _margin(outcome)
            made.pairs.append({**prompt, "chosen": chosen["text"], "rejected": rejected["text"], "margin": margin})
            # One vote with a margin is enough for the flag: pairs without one have a margin of 0, which asks for no
            # distance.
            made.with_margin |= margin > 0
        if fate == "bad":
            made.bad += [{**prompt, "answer": side["text"]} for side in outcome.sides if side["text"]]
        made.sft += [_edited(vote, asked, as_messages) for vote in outcome.votes if vote["edited"]]

    # Every number follows from the others, so that none can be missing from the sum.
    said = sum(len(outcome.votes) for outcome in together)
    counts = {"votes": len(votes), "skips": len(votes) - said, "repeated": said - len(together)}
    counts["contradicted"] = sum(outcome.contradicted for outcome in together)
    counts |= {name: fates[name] for name in ("ties", "bad", "undecided", "empty", "pairs")}
    made.funnel = counts | {"edited": len(made.sft), "bad_answers": len(made.bad)}
    return made


def as_objects(turns: list[list[str]]) -> list[dict]:
    """Turns as messages in OpenAI's form."""
    return [{"role": role, "content": said} for role, said in turns]


def _fate(outcome: Outcome) -> str:
    if outcome.choice not in SIDES:
        return {"tie": "ties", "bad": "bad", None: "undecided"}[outcome.choice]
    # A reader of pairs takes no empty text for an answer.
    return "pairs" if all(side["text"].strip() for side in outcome.sides) else "empty"


def _margin(outcome: Outcome) -> float:
    """How much better, from 1 to 3, as the majority says; a vote that does not say counts as 0."""
    said = zip(outcome.votes, outcome.said, strict=True)
    return float(mean(vote["margin"] or 0 for vote, choice in said if choice == outcome.choice))


def _edited(vote: dict, asked: list, as_messages: bool) -> dict:
    if not as_messages:
        return {"prompt": asked[0][1], "answer": vote["edited"]}
    # Earlier answers of the dialogue are context: of weight 0 they teach nothing.
    turns = [turn | ({"weight": 0} if turn["role"] == "assistant" else {}) for turn in as_objects(asked)]
    return {"messages": [*turns, {"role": "assistant", "content": vote["edited"]}]}


# ---- files ----
def write(votes: list[dict], file: Path, min_pairs: int) -> Export:
    """Write pairs to `file`, edited and bad answers beside it; a file without rows is not left there.

    Raises: ValueError where there are fewer pairs than `min_pairs`: nothing is written then.
    """
    made = collect(votes)
    # Counted before anything is written: an export of few pairs would be trained on.
    count = len(made.pairs)
    if count < min_pairs:
        raise ValueError(
            f"the votes make {count} pairs, and --min_pairs asks for {min_pairs}: vote on at least "
            f"{min_pairs - count} more, or lower it (a reward model of a few pairs learns their noise)"
        )

    file.parent.mkdir(parents=True, exist_ok=True)
    for path, rows in ((file, made.pairs), (file.with_name(SFT), made.sft), (file.with_name(BAD), made.bad)):
        _write_lines(path, rows)
    return made


def _write_lines(path: Path, rows: list[dict]) -> None:
    if not rows:
        # A file of an earlier export would pass for this one's.
        path.unlink(missing_ok=True)
        return
    # Whole or not at all: a training may be reading the file of the export before.
    made = path.with_name(f".{path.name}.new")
    made.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(made, path)


def training_command(made: Export, file: Path, base: str | None) -> str:
    """The command that trains a reward model on an export."""
    # BASE stands for what the page was not told, as where answers came from a file.
    words = ["python", "reward_modeling.py", "--model_name", base or "BASE", "--dataset_name", str(file)]
    if made.with_margin:
        words += ["--margin_field", "margin"]
    if made.bad:
        words += ["--bad_answers", str(file.with_name(BAD))]
    return shlex.join([*words, "--output_dir", "runs/reward_votes"])
