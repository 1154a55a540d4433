"""How far a long piece of work has come, on stderr: in place on a terminal, a line now and then in a file."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized

from rlhf.run.environment import read_launch
from rlhf.run.log import duration

# Work that takes less time, in seconds, says nothing.
QUIET = 2.0

# Seconds between two lines of a file, and between two states of the line on a terminal.
IN_FILE = 5.0
ON_TERMINAL = 0.2


class Progress:
    """Counter of one piece of work; the first process of a run shows it once the work has taken QUIET seconds.

    Args:
        what: what is done, such as "encoding". total: how many there are, where that is known.
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "rows"):
        self.what = what
        self.total = total
        self.unit = unit
        self.done = 0
        # The clock of a machine may be set back while it works; this one only goes on.
        self.start = time.monotonic()
        self.stream = sys.stderr
        # A file keeps every line that is written into it, so there each state is a line of its own, and they come less
        # often.
        self.in_place = self.stream.isatty()
        # Only one of several processes may print.
        self.due = self.start + QUIET if read_launch().rank == 0 else float("inf")
        self.shown = False

    def advance(self, count: int = 1) -> None:
        """Count `count` more, and show it where that is due."""
        self.done += count
        now = time.monotonic()
        if now >= self.due:
            self.due = now + (ON_TERMINAL if self.in_place else IN_FILE)
            self._show(self.line(now))

    def line(self, now: float) -> str:
        """The state in words: count, pace and, of a known total, the time left."""
        pace = self.done / max(now - self.start, 1e-9)
        counted = f"{self.done:,} {self.unit}"
        rest = ""
        if self.total:
            counted = f"{self.done:,} of {self.total:,} {self.unit} ({self.done / self.total:.0%})"
            rest = f", {duration((self.total - self.done) / max(pace, 1e-9))} left"
        return f"{self.what}: {counted}, {pace:,.0f} a second{rest}"

    def close(self) -> None:
        """End the line, where there is one."""
        if self.shown and self.in_place:
            self.stream.write("\r\033[K")
            self.stream.flush()
        elif self.shown:
            self._show(f"{self.what}: {self.done:,} {self.unit} in {duration(time.monotonic() - self.start)}")
        self.shown = False

    def _show(self, line: str) -> None:
        self.shown = True
        # On a terminal the line is written over the one before it, what is left of that cleared.
        self.stream.write(f"\r{line}\033[K" if self.in_place else f"{line}\n")
        self.stream.flush()


def shown(items: Iterable, what: str, unit: str = "rows", total: int | None = None) -> Iterator:
    """`items` one by one, with a line of progress where they take long."""
    progress = Progress(what, len(items) if isinstance(items, Sized) else total, unit)
    try:
        for item in items:
            yield item
            progress.advance()
    # The caller may stop early, or an error may pass: what is printed next must begin at the left.
    finally:
        progress.close()
