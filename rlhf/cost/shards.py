"""A base in shards on paper: how many processes it needs, what each receives in a phase, and in how many seconds.

    gathering the layers once    m * (N - 1) / N           m: bytes of their matrices, shared by N processes
    summing activations          2 * a * (N - 1) / N       a: bytes of the sum; as a ring of processes does it
    gathering activations        a * (N - 1) / N

Forward gathers every layer once, and backward once more. Decoding in place sums (or gathers) what each token leaves in
the layers that are cut by inputs; over gathered layers it gathers the base for every token. Counts of rows, tokens and
signals are left out: they are a few numbers.
"""

import math
from dataclasses import replace

from rlhf.cost.cuts import Cuts, count_of
from rlhf.cost.fitting import processes
from rlhf.cost.hours import REACHED
from rlhf.cost.limits import Card
from rlhf.cost.memory import CARDS_GB, FP32, GIB
from rlhf.cost.needs import memory_of, precision_of, trained_of
from rlhf.cost.skeleton import Base
from rlhf.models.forward import PART_ROWS, PARTS

# What a process of a machine of such cards receives, 1e9 bytes a second, as the makers state it: NVLink, else PCIe.
LINK_GB = {
    "H200": 450.0,
    "H100 PCIe": 64.0,
    "H100": 450.0,
    "H800": 200.0,
    "H20": 450.0,
    "A100": 300.0,
    "A800": 200.0,
    "L40S": 32.0,
    "RTX 5090": 64.0,
    "RTX 4090": 32.0,
    "RTX 4080": 32.0,
    "RTX 3090": 32.0,
    "V100": 150.0,
}

# Numbers of processes that a machine may have.
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 32)


# ---- traffic ----
def parts_of(rows: int) -> int:
    """Forwards that the queries of so many rows take."""
    # As `parts_by_length` cuts them.
    return min(PARTS, max(1, rows // PART_ROWS))


def rollout_bytes(cuts: Cuts, size: int, rows: int, query: int, answer: int, in_place: bool) -> float:
    """Bytes that a process receives while `rows` answers a process are sampled.

    Args:
        query, answer: tokens of each row. in_place: decode on the shards, if they can.
    """
    if in_place and cuts.exchanged is not None:
        return cuts.in_place(cuts.count * rows, query, answer, size)
    return (parts_of(rows) + answer - 1) * cuts.layers_once(size)


def step_bytes(args, base: Base, kind: str, cuts: Cuts, ranks: int, lengths) -> dict[str, float]:
    """Phase -> bytes that a process receives in an optimizer step of a Trainer stage, or in a PPO step.

    Args:
        ranks: processes of the run. lengths: of a row's query and answer.
    """
    size = precision_of(args).size
    once = cuts.layers_once(size)
    # A ring of processes sends every number twice: once to be summed, once as the sum.
    gradients = 2 * FP32 * trained_of(args, base, kind) * (ranks - 1) / ranks
    if kind != "ppo":
        # Forward and backward gather the layers once each.
        return {"update": 2 * args.gradient_accumulation_steps * once + gradients}

    # Rows are sampled at once, or one by one.
    at_once = args.batch_size if args.batched_gen else 1
    in_place = args.decode == "auto"
    sampled = rollout_bytes(cuts, size, at_once, lengths.query, lengths.answer, in_place) * args.batch_size / at_once

    # The reference always, then whatever else looks at the answers.
    mini = args.mini_batch_size or 1
    batches = math.ceil(args.batch_size / args.forward_batch_size)
    recomputed = args.old_logprobs == "recomputed" or (args.old_logprobs == "auto" and args.bf16)
    passes = (1 + len(args.reward_roles) + args.value_lora) * batches
    passes += math.ceil(args.batch_size / mini) if recomputed else 0

    backwards = args.ppo_epochs * args.batch_size // mini
    steps = math.ceil(backwards / args.gradient_accumulation_steps)
    update = 2 * (1 + args.value_lora) * backwards * once + steps * gradients
    return {"rollout": sampled, "score": passes * once, "update": update}


def link_of(args, card: Card) -> float | None:
    """Bytes a second that a process receives from the others: --link_gbps, else by the card's name."""
    if args.link_gbps:
        # Bits are what makers of networks count, and bytes what memory is counted in.
        return args.link_gbps * 1e9 / 8
    return next((rate * 1e9 for name, rate in LINK_GB.items() if name in card.name), None)


def spared_seconds(args, base: Base, card: Card, cuts: Cuts, lengths) -> float:
    """Seconds of a PPO step that decoding in place spares: each card reads its own part of the weights alone."""
    if args.decode != "auto" or cuts.exchanged is None:
        return 0.0
    # Row by row the weights are read as often as there are rows.
    rounds = 1 if args.batched_gen else args.batch_size
    read = precision_of(args).size * cuts.matrices * (lengths.answer - 1) * rounds
    return cuts.others * read / card.bandwidth / REACHED["rollout"]


# ---- words ----
def shard_lines(args, base: Base, kind: str, lengths, cards: dict[int, Card]) -> list[str]:
    """How many processes a base needs to share a copy, and what a step moves; in words.

    Args:
        cards: size of a card in GB -> the card that stands for it.
    """
    ranks = processes(args)
    fits = {}
    for size in CARDS_GB:
        # The same flags but for the number of processes: what else could be lowered is another line of the plan.
        enough = [n for n in COUNTS if memory_of(replace(args, shard_base=str(n)), base, kind).peak() <= size * 1e9]
        fits[size] = str(enough[0]) if enough else "none"
    by_card = ", ".join(f"{size} GB {count}" for size, count in fits.items())
    lines = [f"processes that have to share a copy of the base (--shard_base), by card: {by_card}"]

    count = count_of(args)
    if not count:
        return lines
    cuts = Cuts.of(base.model, count)
    moved = step_bytes(args, base, kind, cuts, max(ranks, count), lengths)
    words = ", ".join(f"{phase} {amount / GIB:.2f}" for phase, amount in moved.items())
    lines.append(f"a process receives in a step, GiB: {words}")
    if kind == "ppo":
        where = "on the shards where they lie"
        if args.decode == "gathered" or cuts.exchanged is None:
            where = "over gathered layers"
        lines.append(f"decoding: {where}")
    links = {size: link_of(args, card) for size, card in cards.items()}
    seconds = [f"{size} GB {sum(moved.values()) / link:.1f}" for size, link in links.items() if link]
    return [*lines, f"seconds of that over the link of a card of: {', '.join(seconds)}"]
