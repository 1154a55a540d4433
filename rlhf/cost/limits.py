"""The limit of a card for a step: operations over its peak, bytes over its bandwidth.

rlhf/cost/flops.py has the operations and the peaks. Decoding reads the layers, the output layer, and the keys and
values of all rows once for every token of a row, and computes so little with them that memory sets the limit.
"""

from dataclasses import dataclass

from rlhf.cost.flops import FlopCounts, forward_flops, peak_tflops, training_flops
from rlhf.cost.memory import BYTES_4BIT, Precision

# Of the memory, 1e12 bytes a second, as the makers state it. The first name that the card's own contains counts.
BANDWIDTH_TB = {
    # As in PEAK_TFLOPS, a name that contains another stands before it.
    "H200": 4.8,
    "H100 PCIe": 2.0,
    "H100": 3.35,
    "H800": 3.35,
    "H20": 4.0,
    "A100-SXM4-40GB": 1.555,
    "A100-PCIE-40GB": 1.555,
    "A100": 2.04,
    "A800": 2.04,
    "L40S": 0.864,
    "RTX 5090": 1.79,
    "RTX 4090": 1.01,
    "RTX 4080": 0.717,
    "RTX 3090": 0.936,
    "V100": 0.9,
}


@dataclass(frozen=True)
class Rows:
    """Rows (or pairs) of a step, and the tokens of each: of the query, and of the answer (of either)."""

    count: int
    query: int
    answer: int


@dataclass(frozen=True)
class Card:
    """A card's name and limits; None where one is not known."""

    name: str
    flops: float | None
    bandwidth: float | None

    @classmethod
    def of(cls, name: str, tflops: float | None, terabytes: float | None) -> "Card":
        """By its name, unless numbers (1e12 a second) are given."""
        tflops = tflops or peak_tflops(name)
        named = [rate for part, rate in BANDWIDTH_TB.items() if part in name]
        terabytes = terabytes or (named[0] if named else None)
        # None stays None, and the table has a dash there.
        return cls(name, tflops and tflops * 1e12, terabytes and terabytes * 1e12)


@dataclass(frozen=True)
class Cost:
    """Operations that count as work, those of them that the card's arithmetic limits, and bytes to be read besides."""

    flops: float
    computed: float
    read: float = 0.0

    @classmethod
    def of(cls, flops: float) -> "Cost":
        """Of work that arithmetic alone limits."""
        return cls(flops, flops)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.computed + other.computed, self.read + other.read)

    def limit(self, card: Card) -> float | None:
        """Seconds that it takes at best."""
        if card.flops is None or (self.read and card.bandwidth is None):
            return None
        # One after the other: prefill computes before decoding reads.
        computing = self.computed / card.flops
        reading = self.read / card.bandwidth if self.read else 0.0
        return computing + reading

    def mfu(self, seconds: float, card: Card) -> float | None:
        """Share of the card's peak."""
        if card.flops is None:
            return None
        return self.flops / seconds / card.flops


def decoding_bytes(work: FlopCounts, precision: Precision, rows: Rows) -> float:
    """Weights, and keys and values of the tokens so far, for every answer token but the first, which prefill gives.

    sum over t = 1 .. answer - 1 of  weights + rows * (query + t) * 2 * attention * size
    """
    # Four bits are for the layers; the output layer stays as it is.
    body = BYTES_4BIT if precision.four_bit else precision.size
    steps = rows.answer - 1
    weights = steps * (body * work.body + precision.size * work.head)
    seen = sum(rows.query + t for t in range(1, rows.answer))
    # Keys and values make the 2. Grouped queries keep fewer heads of them than `attention` counts: there this is too
    # much.
    return weights + rows.count * seen * 2 * work.attention * precision.size


def ppo_costs(
    work: FlopCounts,
    precision: Precision,
    rows: Rows,
    recomputed: bool,
    epochs: int,
    checkpointing: bool,
    scorers: int = 1,
) -> dict:
    """Phase -> Cost of one PPO step of answers all equally long.

    Args:
        recomputed: whether the policy's log-probabilities are computed again before the update.
        scorers: reward models that score each answer.
    """
    lengths = [rows.query + rows.answer] * rows.count
    answers = rows.count * rows.answer

    # All tokens count as work, but of the rollout the arithmetic of the prompts alone takes time.
    # The output layer makes one row of logits for each prompt.
    prefill = forward_flops(work, [rows.query] * rows.count, rows.count)
    sampled = forward_flops(work, lengths, answers)
    rollout = Cost(sampled, prefill, decoding_bytes(work, precision, rows))

    # The reference always, the policy where it is computed again, and reward models, which have no output layer.
    scored = (1 + recomputed) * sampled + scorers * forward_flops(work, lengths, 0)
    trained = epochs * training_flops(work, lengths, answers, checkpointing)
    return {"rollout": rollout, "score": Cost.of(scored), "update": Cost.of(trained)}
