"""The data funnel: what became of every row, counted; rows drawn, and rows set aside for evaluation."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rlhf.data.rows import column, pick

# Reasons that a flag asked for: no matter how many rows they take.
BEYOND_SUBSET = "beyond the subset"
OTHER_HALF = "in the other half"
OTHER_FOLD = "in the other folds"
ASKED_FOR = (BEYOND_SUBSET, OTHER_HALF, OTHER_FOLD)


@dataclass
class Funnel:
    """Counts of what became of every row: read + expanded + made = kept + all dropped.

    Attributes:
        read: rows in the sources. expanded: examples beyond one a row (several answers, several turns).
        made: rows that are in no source, by what they are (degenerate answers).
        dropped: rows by reason. places: up to three "file:line" for each reason.
        bad_rows: "file:line: reason" of each malformed row.
        formats: how the columns of each source were read.
        lengths: tokens of every row that was encoded (of a pair, of its longer side), kept or not.
    """

    read: int = 0
    expanded: int = 0
    made: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """Rows left now, by the identity above: no count of its own that could disagree."""
        return self.read + self.expanded + self.made.total() - self.dropped.total()

    def drop(self, reason: str, where: str) -> None:
        """Count one row out."""
        self.dropped[reason] += 1
        places = self.places.setdefault(reason, [])
        # Three places are enough to look at; millions of them would fill the memory.
        if len(places) < 3:
            places.append(where)

    def table(self) -> str:
        """The counts as lines of text, with places to look at."""
        lines = [("read", self.read, "; ".join(self.formats))]

        # What adds rows, what takes rows away, and the sum, as a reader would check them.
        if self.expanded:
            lines.append(("+ expanded", self.expanded, "further answers or turns of the same rows"))
        for name, count in sorted(self.made.items()):
            lines.append((f"+ {name}", count, "made here, for training only"))
        # The largest loss first, as it is the one to look at.
        for reason, count in self.dropped.most_common():
            lines.append((f"- {reason}", count, ", ".join(self.places[reason])))
        lines.append(("kept", self.kept, ""))

        width = max(len(name) for name, _, _ in lines)
        table = [f"{name:<{width}} {count:>9,}  {note}".rstrip() for name, count, note in lines]
        return "\n".join(table + self._warnings())

    def _warnings(self) -> list[str]:
        """A line for a reason that takes more than half of the rows: data, flags and format hardly fit each other."""
        # Without the rows made here, behind which the loss of half of the data could hide.
        half = (self.read + self.expanded) / 2
        return [
            f"! more than half of the rows are dropped: {reason} ({', '.join(self.places[reason])})"
            for reason, count in self.dropped.items()
            if count > half and reason not in ASKED_FOR
        ]

    def summary(self) -> str:
        """The counts as a part of a sentence, for error messages."""
        first = {reason: places[0] for reason, places in self.places.items()}
        # Of a malformed row the reason is known too, not the place alone.
        if self.bad_rows:
            first["malformed"] = self.bad_rows[0]

        reasons = [f"{count} {reason} ({first[reason]})" for reason, count in self.dropped.items()]
        dropped = f", dropped: {', '.join(reasons)}" if reasons else ""
        return f"{self.read} read{dropped}"

    def as_dict(self) -> dict:
        """The counts for run.json."""
        made = {"made": dict(self.made)} if self.made else {}
        return {
            "read": self.read,
            "expanded": self.expanded,
            **made,
            "kept": self.kept,
            "dropped": dict(self.dropped),
        }


def _openings(rows: Sequence[dict]) -> Iterator[str]:
    """The first question of each row's dialogue; all rows of one dialogue share it."""
    for opening, prompt in zip(column(rows, "opening"), column(rows, "prompt"), strict=True):
        # The prompt of a single question is its own opening, and is not stored twice.
        yield prompt if opening is None else opening


def split_eval(rows: Sequence[dict], size: float, seed: int) -> tuple[Sequence[dict], Sequence[dict]]:
    """Set evaluation rows aside by whole dialogues: neither a prompt nor a dialogue's opening is on both sides.

    Args:
        rows: of `load_rows`.
        size: a share of the rows below 1, or about how many (all rows of one opening go together).
    Returns: training rows and evaluation rows, both in their old order.
    Raises: ValueError where there are too few different prompts to split.
    """
    # A share of few rows may round to 0, and one row is wanted all the same.
    wanted = round(size * len(rows)) if size < 1 else round(size)
    wanted = max(1, wanted)
    # By hash and not by position, so that a prompt's rank does not depend on the other rows or their order.
    ranks = [_hash(f"{seed} {opening}") for opening in _openings(rows)]
    groups = Counter(ranks)
    # Both sides need a prompt at least.
    if len(groups) < 2 or wanted >= len(rows):
        raise ValueError(
            f"{len(rows)} rows with {len(groups)} different prompts cannot give {wanted} evaluation rows: "
            "lower --eval_size, or set it to 0 for none"
        )

    aside: set[bytes] = set()
    count = 0
    # The last opening is never set aside: training needs at least one.
    for rank in sorted(groups)[:-1]:
        if count >= wanted:
            break
        aside.add(rank)
        count += groups[rank]

    sides: tuple[list[int], list[int]] = ([], [])
    for number, rank in enumerate(ranks):
        # False is 0, the side of training.
        sides[rank in aside].append(number)
    return pick(rows, sides[0]), pick(rows, sides[1])


def _hash(text: str) -> bytes:
    # Python's own hash() of a text differs from process to process.
    return hashlib.sha256(text.encode()).digest()


def subset(rows: Sequence[dict], limit: int, seed: int, funnel: Funnel) -> Sequence[dict]:
    """`limit` rows drawn at random but left in their order (data files are often sorted by topic); -1 keeps all."""
    if limit < 0 or limit >= len(rows):
        return rows

    # From the seed alone: the global source has been drawn from by now, and differently in each stage.
    drawn = set(random.Random(seed).sample(range(len(rows)), limit))
    for number, where in enumerate(column(rows, "where")):
        if number not in drawn:
            funnel.drop(BEYOND_SUBSET, where)
    return pick(rows, sorted(drawn))


def one_half(rows: Sequence[dict], half: int, funnel: Funnel) -> Sequence[dict]:
    """The rows of one half (0 or 1) of the prompts: two models trained on different halves share no prompt.

    The hash of the dialogue's opening alone decides, so neither the seed nor the other rows change a row's half.

    Raises: ValueError for an empty half.
    """
    # The parity of the first byte; the word before the opening keeps it independent of `split_eval`.
    kept = _share(rows, lambda opening: _hash(f"half {opening}")[0] % 2 == half, OTHER_HALF, funnel)
    if not kept:
        raise ValueError(f"no prompt falls into half {half} of the data: there are too few to split")
    return pick(rows, kept)


def one_fold(rows: Sequence[dict], number: int, count: int, funnel: Funnel) -> Sequence[dict]:
    """The rows of one fold (1 to `count`) of the prompts: models of different folds share no prompt.

    As in `one_half` the hash of the dialogue's opening alone decides, and independently of the half.

    Raises: ValueError for an empty fold.
    """

    def inside(opening: str) -> bool:
        # Eight bytes: the remainder of a single one would favour the first folds.
        return int.from_bytes(_hash(f"fold {opening}")[:8], "big") % count == number - 1

    kept = _share(rows, inside, OTHER_FOLD, funnel)
    if not kept:
        raise ValueError(f"no prompt falls into fold {number}/{count} of the data: there are too few to split")
    return pick(rows, kept)


def _share(rows: Sequence[dict], inside: Callable[[str], bool], reason: str, funnel: Funnel) -> list[int]:
    """Numbers of the rows whose opening is `inside`; the others are counted under `reason`."""
    kept = []
    for number, (opening, where) in enumerate(zip(_openings(rows), column(rows, "where"), strict=True)):
        if inside(opening):
            kept.append(number)
        else:
            funnel.drop(reason, where)
    return kept


def without_overlap(rows: Sequence[dict], evaluation: Sequence[dict], funnel: Funnel) -> Sequence[dict]:
    """The training rows whose prompt is in no evaluation row; the others are counted in `funnel`.

    Raises: ValueError where no training row is left.
    """
    # Hashes of 32 bytes, for the prompts themselves may not fit into memory.
    prompts = {_hash(prompt) for prompt in column(evaluation, "prompt")}
    train = []
    for number, (prompt, where) in enumerate(zip(column(rows, "prompt"), column(rows, "where"), strict=True)):
        if _hash(prompt) in prompts:
            funnel.drop("prompt is in the evaluation rows", where)
        else:
            train.append(number)

    if not train:
        raise ValueError(
            "every training prompt is in the evaluation rows: name another --eval_split or --dataset_name"
        )
    return pick(rows, train)
