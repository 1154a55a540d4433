"""The data funnel: what became of every row, counted; rows drawn, and rows set aside for evaluation."""

import hashlib
import random
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Funnel:
    """Counts of what became of every row: read + expanded + made = kept + all dropped.

    Attributes:
        read: rows in the sources. expanded: examples beyond one a row (several answers, several turns).
        made: rows that are in no source, by what they are (degenerate answers).
        dropped: rows by reason. places: up to three "file:line" for each reason.
        bad_rows: "file:line: reason" of each malformed row.
        formats: how the columns of each source were read.
    """

    read: int = 0
    expanded: int = 0
    made: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)

    @property
    def kept(self) -> int:
        return self.read + self.expanded + self.made.total() - self.dropped.total()

    def drop(self, reason: str, where: str) -> None:
        """Count one row out."""
        self.dropped[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < 3:
            places.append(where)

    def table(self) -> str:
        """The counts as lines of text, with places to look at."""
        lines = [("read", self.read, "; ".join(self.formats))]
        if self.expanded:
            lines.append(("+ expanded", self.expanded, "further answers or turns of the same rows"))
        for name, count in sorted(self.made.items()):
            lines.append((f"+ {name}", count, "made here, for training only"))
        for reason, count in self.dropped.most_common():
            lines.append((f"- {reason}", count, ", ".join(self.places[reason])))
        lines.append(("kept", self.kept, ""))
        width = max(len(name) for name, _, _ in lines)
        return "\n".join(f"{name:<{width}} {count:>9,}  {note}".rstrip() for name, count, note in lines)

    def summary(self) -> str:
        """The counts in half a sentence, for an error."""
        first = {reason: places[0] for reason, places in self.places.items()}
        if self.bad_rows:
            first["malformed"] = self.bad_rows[0]
        reasons = ", ".join(f"{count} {reason} ({first[reason]})" for reason, count in self.dropped.items())
        return f"{self.read} read" + (f", dropped: {reasons}" if reasons else "")

    def as_dict(self) -> dict:
        """The counts for run.json."""
        made = {"made": dict(self.made)} if self.made else {}
        return {"read": self.read, "expanded": self.expanded, **made, "kept": self.kept, "dropped": dict(self.dropped)}


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
