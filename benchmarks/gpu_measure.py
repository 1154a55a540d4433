"""The meter of benchmarks/gpu_7b.py, its flags, and a line of its table."""

import statistics
import time
from dataclasses import dataclass

import torch
from transformers import TrainerCallback

from benchmarks.gpu_workload import SHAPES, instead_of_a_checkpoint
from benchmarks.peers.worker import peak_gb
from rlhf.cost.limits import Card, Cost
from rlhf.flags import flag
from rlhf.models.loading import pick_dtype


# ---- measuring ----
class Meter:
    """Readings of the clock, each when the device has nothing left to do, and the peak of memory up to each."""

    def __init__(self, device: str):
        self.on_card = device == "cuda"
        self.times: list[float] = []
        self.peaks: list[float] = []

    def read(self) -> float:
        """Seconds, as time.perf_counter has them."""
        # Kernels run on after the call that starts them has returned.
        if self.on_card:
            torch.cuda.synchronize()
            self.peaks.append(torch.cuda.max_memory_allocated() / 1e9)
            torch.cuda.reset_peak_memory_stats()
        else:
            self.peaks.append(peak_gb())
        # The clock last, so that none of this counts as time of the step that ends here.
        self.times.append(time.perf_counter())
        return self.times[-1]

    def spans(self, first: int, last: int, every: int) -> tuple[float, float]:
        """Median seconds between readings `first` and `last` of each step of `every` readings, and the peak in GB.

        The first step is left out.
        """
        seconds = []
        peaks = []
        for start in range(every, len(self.times) - last, every):
            seconds.append(self.times[start + last] - self.times[start + first])
            # A reading holds the peak since the one before it.
            peaks += self.peaks[start + first + 1 : start + last + 1]
        return statistics.median(seconds), max(peaks)


class Ticks(TrainerCallback):
    """Reads a meter when training begins and after every step."""

    # transformers calls these by keyword, with more than is needed here.

    def __init__(self, meter: Meter):
        self.meter = meter

    def on_train_begin(self, args, state, control, **kwargs):
        self.meter.read()

    def on_step_end(self, args, state, control, **kwargs):
        self.meter.read()


# ---- the table ----
@dataclass(frozen=True)
class Target:
    """The aim of a row in its own unit: at least a rate, or less than so many GB."""

    rate: float | None = None
    memory: float | None = None

    def words(self) -> str:
        """As the table has it."""
        return f">= {self.rate:g} samples/s" if self.rate else f"< {self.memory:g} GB"

    def met(self, row: "Row") -> bool:
        """Return True if the row reaches it."""
        if self.rate:
            return row.samples / row.seconds >= self.rate
        return row.peak_gb < self.memory


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds of a step, what it got through in them, its peak memory, what it costs."""

    name: str
    seconds: float
    samples: int
    tokens: int
    peak_gb: float
    cost: Cost
    target: Target | None = None


@dataclass(kw_only=True)
class Arguments:
    """Flags of benchmarks/gpu_7b.py."""

    only: str = flag("all", help="one part of it", choices=["all", "sft", "reward", "ppo", "memory"])
    shape: str = flag("7b", help="of model and batches", choices=list(SHAPES))
    device: str = flag("cuda", help="where it runs", choices=["cuda", "cpu"])
    steps: int = flag(3, help="steps of a row that are measured, after one that is not")
    peak_tflops: float | None = flag(None, help="the card's peak, where rlhf/cost/flops.py does not know its name")
    bandwidth_tb: float | None = flag(None, help="TB/s of its memory, where rlhf/cost/limits.py does not")

    def __post_init__(self):
        # A model of 7B on a CPU would run for hours before the first row.
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("no GPU is visible; --shape tiny --device cpu tries the code without one")
        if self.device == "cpu" and self.shape != "tiny":
            raise ValueError(f"--shape {self.shape} needs a GPU: with --device cpu give --shape tiny")
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps} must be at least 1")


@dataclass(frozen=True)
class Bench:
    """The flags, and what follows from them for every row."""

    args: Arguments
    card: Card

    @property
    def shape(self):
        """Sizes of model and batches."""
        return SHAPES[self.args.shape]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the base's weights, as the stages choose it."""
        return pick_dtype(self.args.device == "cuda")

    @property
    def all_steps(self) -> int:
        """Steps of a row, the first of which is not measured."""
        return 1 + self.args.steps

    def base(self):
        """A context in which the stages get random bases."""
        return instead_of_a_checkpoint(self.shape.config(), self.args.device, self.dtype)

    def target(self, **wanted) -> Target | None:
        """The aim of a row at the real shape; None at another, whose numbers say nothing."""
        return Target(**wanted) if self.args.shape == "7b" else None


# Of a line of the table, and the characters of each column.
HEAD = ("", "s", "samples/s", "tokens/s", "GB", "MFU", "limit s", "of limit", "target", "met")
WIDTHS = (36, 9, 10, 10, 7, 7, 9, 9, 16, 5)


def line(cells: tuple[str, ...]) -> str:
    """One line of the table."""
    numbers = zip(cells[1:], WIDTHS[1:], strict=True)
    padded = [f"{cell:>{width}}" for cell, width in numbers]
    # Without a target the line ends before its columns.
    return f"{cells[0]:<{WIDTHS[0]}}{''.join(padded)}".rstrip()


def cells(row: Row, card: Card) -> tuple[str, ...]:
    """A row in words; "-" for what is not known of this card, nothing where there is no target."""
    limit = row.cost.limit(card)
    mfu = row.cost.mfu(row.seconds, card)
    target = met = ""
    if row.target:
        target = row.target.words()
        met = "yes" if row.target.met(row) else "no"

    return (
        row.name,
        f"{row.seconds:.3g}",
        f"{row.samples / row.seconds:.2f}",
        f"{row.tokens / row.seconds:,.0f}",
        f"{row.peak_gb:.2f}",
        "-" if mfu is None else f"{mfu:.1%}",
        "-" if limit is None else f"{limit:.3g}",
        "-" if limit is None else f"{limit / row.seconds:.1%}",
        target,
        met,
    )
