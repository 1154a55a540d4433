"""Flags that make a stage fit a card, and the rows of a backward pass that a machine takes."""

import math
import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from rlhf.cost.needs import memory_of, precision_here
from rlhf.cost.skeleton import Base
from rlhf.run.launch import is_launched, rank_and_size
from rlhf.run.startup import wanted_processes

# Shares of a machine's memory that a run may plan with: a card is nearly its own, other programs live on a CPU too.
CARD_SHARE = 0.9
CPU_SHARE = 0.5

# Rows of a pass without gradient, where 32 are too many.
FEW_ROWS = 4


def divisors(number: int) -> list[int]:
    """All divisors, the largest first."""
    return [size for size in range(number, 0, -1) if number % size == 0]


# ---- flags that fit ----
def remedies(args, kind: str) -> Iterator[dict]:
    """Changes of flags that lower the memory, those that cost least first; each goes on top of the ones before."""
    if not args.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    # Fewer rows a pass and as many more passes: the optimizer step stays the same.
    name = "mini_batch_size" if kind == "ppo" else "per_device_train_batch_size"
    # PPO's mini-batch may be left out, and one row is the least it can be.
    rows = getattr(args, name) or 1
    if kind == "ppo" and args.tokens_per_backward:
        yield {"tokens_per_backward": args.max_prompt_length + args.output_max_length}
        rows = 1
    # Divisors alone: any other number would change how many rows an optimizer step sees, and with that the training.
    for size in divisors(rows)[1:]:
        yield {name: size, "gradient_accumulation_steps": args.gradient_accumulation_steps * rows // size}

    if kind == "ppo":
        if args.forward_batch_size > FEW_ROWS:
            # Passes without gradient cost nothing but time where they are smaller.
            yield {"forward_batch_size": FEW_ROWS}
        if args.merged_sft_model_path:
            yield {"merged_sft_model_path": None}
    # Quantised weights cannot be cut.
    if not args.load_in_4bit and args.shard_base == "0":
        yield {"load_in_4bit": True}
    if kind == "ppo" and args.batched_gen:
        yield {"batched_gen": False}


def fitting_flags(args, base: Base, kind: str, limit: float) -> dict | None:
    """The fewest changes of flags by which the stage's peak is within `limit` bytes; None where none suffice."""

    def fits(changes: dict) -> bool:
        # A copy, for the flags themselves must stay as they were given.
        return memory_of(replace(args, **changes), base, kind).peak() <= limit

    applied = [{}]
    made: dict = {}
    for change in remedies(args, kind):
        if fits(made):
            break
        applied.append(change)
        made = made | change
    if not fits(made):
        return None

    # A late change may have made an early one needless.
    for change in applied:
        fewer = {name: value for name, value in made.items() if name not in change}
        if change and fits(fewer):
            made = fewer
    return made


def flags_in_words(changes: dict) -> str:
    """Changes of flags as a command line has them."""
    return " ".join(f"without --{name}" if value is None else f"--{name} {value}" for name, value in changes.items())


# ---- rows of a backward pass ----
def processes(args) -> int:
    """Processes that this command runs in."""
    # Under a launcher its environment has the number; without one, the command would start the processes itself.
    return rank_and_size()[1] if is_launched() else wanted_processes(args.nproc)


def memory_here(args) -> float:
    """Bytes that one process of this command may plan with, the same on all processes of a machine."""
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(card) for card in range(torch.cuda.device_count())]
        return CARD_SHARE * min(card.total_memory for card in cards)
    # All of it, not what is free now: the same command on the same machine gives the same bytes.
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return CPU_SHARE * total / processes(args)


def rows_that_fit(args, base: Base, limit: float, precision=None) -> int:
    """Most rows of one backward pass of PPO whose peak is within `limit` bytes; 1 where not even that one is.

    An optimizer step has --gradient_accumulation_steps rows where no mini-batch is given. A size that divides these
    and --batch_size leaves every optimizer step the rows it has with a mini-batch of 1.
    """
    for size in divisors(math.gcd(args.batch_size, args.gradient_accumulation_steps)):
        if memory_of(replace(args, mini_batch_size=size), base, "ppo", precision).peak() <= limit:
            return size
    return 1


def settle_mini_batch(args, rows: int) -> None:
    """Set the mini-batch, and as many fewer backward passes an optimizer step."""
    args.mini_batch_size = rows
    args.gradient_accumulation_steps //= rows


def choose_mini_batch(args) -> None:
    """Set --mini_batch_size to what this machine takes, where the command left it out."""
    base = Base.of(args.base_model_name, "--base_model_name")
    settle_mini_batch(args, rows_that_fit(args, base, memory_here(args), precision_here(args)))
