"""Hours of a run: the time that a card's limits allow, over the shares of them that were measured."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rlhf.cost.flops import FlopCounts, this_card, training_flops
from rlhf.cost.limits import Card, Rows, ppo_costs
from rlhf.cost.memory import GIB
from rlhf.cost.needs import SIDES, precision_of, trained_of
from rlhf.cost.skeleton import Base

# Shares of a card's limit (rlhf/cost/limits.py) that the phases of a step at baichuan-7B's shape reached, the lower
# one where two were measured.
SOURCE = "an H200, benchmarks/results/gpu_7b.log"
REACHED = {"sft": 0.349, "reward": 0.330, "rollout": 0.377, "score": 0.429, "update": 0.402}
# Decoding in 4 bits unpacks the weights for every token.
REACHED_4BIT = {"rollout": 0.080, "score": 0.373, "update": 0.375}

# A card for each size of memory.
CARD_OF = {
    16: "RTX 4080",
    24: "RTX 4090",
    32: "RTX 5090",
    40: "A100-SXM4-40GB",
    48: "L40S",
    80: "A100",
    141: "H200",
}

# Bytes that a card moves for a thousand operations, where only its operations are given: an A100's 6.5, an H100's 3.4.
BYTES_A_KILOFLOP = 5.0


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a row: of the query, and of an answer."""

    query: int
    answer: int

    def words(self) -> str:
        """As the plan has them."""
        return f"queries of {self.query} and answers of {self.answer} tokens"


def assumed_lengths(args, kind: str) -> Lengths:
    """Lengths where nobody has counted: a Trainer stage's rows half as long as allowed, a quarter of that the query.

    PPO's queries are a quarter of what is allowed, and its answers as long as is allowed: sampling goes on until the
    last of a batch has ended.
    """
    if kind == "ppo":
        return Lengths(max(1, args.max_prompt_length // 4), args.output_max_length)
    query = max(1, args.max_length // 8)
    return Lengths(query, max(1, args.max_length // 2 - query))


def own_card(tflops: float) -> Card | None:
    """The card of --device_flops (1e12 a second), else this machine's; None where neither is known."""
    if tflops:
        # Named after the flag, so that the table says where its numbers come from.
        return Card.of("--device_flops", tflops, tflops * BYTES_A_KILOFLOP / 1000)
    card = Card.of(this_card(), None, None)
    return card if card.flops and card.bandwidth else None


def card_of(size: int) -> Card:
    """The card that stands for a size of memory, in GB."""
    return Card.of(CARD_OF[size], None, None)


def memory_of_this_card() -> float | None:
    """Bytes of the first card; None without one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


# ---- seconds ----
def row_seconds(args, base: Base, kind: str, card: Card, lengths: Lengths) -> float:
    """Seconds that one card takes for a row of SFT, a pair of reward training or a response of PPO."""
    work = replace(base.work, trained=trained_of(args, base, kind))
    if kind == "ppo":
        return ppo_seconds(args, work, card, lengths) / args.batch_size

    length = lengths.query + lengths.answer
    # A reward model has no output layer.
    heads = lengths.answer if kind == "sft" else 0
    flops = training_flops(work, [length] * SIDES[kind], heads * SIDES[kind], args.gradient_checkpointing)
    return flops / (card.flops * REACHED[kind])


def ppo_seconds(args, work: FlopCounts, card: Card, lengths: Lengths) -> float:
    """Seconds of one PPO step on one card."""
    reached = REACHED_4BIT if args.load_in_4bit else REACHED
    # Half precision computes the policy's log-probabilities again before the update.
    recomputed = args.old_logprobs != "sampled" and (args.bf16 or args.old_logprobs == "recomputed")
    at_once = args.batch_size if args.batched_gen else 1
    settings = {"recomputed": recomputed, "epochs": args.ppo_epochs, "checkpointing": args.gradient_checkpointing}
    settings["scorers"] = max(1, len(args.reward_roles))
    rows = Rows(at_once, lengths.query, lengths.answer)
    rollout = ppo_costs(work, precision_of(args), rows, **settings)["rollout"]
    costs = ppo_costs(work, precision_of(args), replace(rows, count=args.batch_size), **settings)

    costs["rollout"] = rollout
    seconds = {phase: cost.limit(card) / reached[phase] for phase, cost in costs.items()}
    # Row by row, each rollout reads all weights once more.
    return seconds["rollout"] * args.batch_size / at_once + seconds["score"] + seconds["update"]


# ---- disk ----
def disk_lines(args, base: Base, kind: str, steps: float | None) -> list[str]:
    """Bytes that base, checkpoints and a merged model take on disk, in words."""
    half = 2 * base.shape.parameters / GIB
    # Adapter, gradient-free, and both moments of Adam; PPO keeps the same once more for a rollback.
    copies = 6 if kind == "ppo" else 3
    checkpoint = copies * 4 * trained_of(args, base, kind) / GIB
    every = args.save_freq if kind == "ppo" else args.save_steps
    words = f"disk: the base {half:.1f} GiB in half precision"
    if every and steps:
        # --save_total_limit keeps the newest alone, however long the run.
        kept = int(steps // every)
        kept = min(kept, args.save_total_limit or kept)
        words += f"; {kept:,} checkpoints of {checkpoint:.2f} GiB: {kept * checkpoint:.1f} GiB"
    else:
        words += f"; a checkpoint {checkpoint:.2f} GiB"
    downloaded = "" if Path(getattr(args, "base_model_name", None) or args.model_name).is_dir() else " to download"
    return [words.replace("the base", f"the base{downloaded}") + f"; a merged model {half:.1f} GiB more"]
