"""The count of what became of every row of data."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Funnel:
    """What became of every row: read + expanded + made = kept + all dropped.

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
