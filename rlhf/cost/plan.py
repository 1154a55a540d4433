"""--plan True: a stage in numbers, from its command line and the config.json of the base alone."""

from dataclasses import dataclass, replace
from pathlib import Path

from rlhf.cost.fitting import fitting_flags, flags_in_words, processes, rows_that_fit
from rlhf.cost.hours import (
    SOURCE,
    Lengths,
    assumed_lengths,
    card_of,
    disk_lines,
    memory_of_this_card,
    own_card,
    row_seconds,
)
from rlhf.cost.limits import Card
from rlhf.cost.memory import CARDS_GB, GIB, MemoryNeeds
from rlhf.cost.needs import SIDES, adapters_of, head_of, memory_of
from rlhf.cost.shards import shard_lines
from rlhf.cost.skeleton import Base
from rlhf.data.reading import load_rows

# What a row is called, by stage.
UNITS = {"sft": "rows", "reward": "pairs", "ppo": "responses"}

# What the tutorial saw, in its own steps: a batch of PPO had 8 responses and 2 optimizer steps (4 epochs, 16 a step).
TUTORIAL = {
    "reward": "the tutorial's reward model: 3,972 optimizer steps of 10 pairs a device, accuracy 71.9 %",
    "ppo": "the tutorial's PPO, batches of 8 responses and 2 optimizer steps each: another style after 10 batches, "
    "the best answers after 16 (32 optimizer steps), a few words in place of answers after 100 (200)",
}


@dataclass(frozen=True)
class Plan:
    """A stage to be planned: its flags, its base, its kind ("sft", "reward", "ppo"), and rows in all if known."""

    args: object
    base: Base
    kind: str
    rows: int | None
    lengths: Lengths

    @property
    def unit(self) -> str:
        """What a row is called."""
        return UNITS[self.kind]


# ---- stages ----
def plan_trainer(args, script: str, sides: int) -> str:
    """The plan of SFT (`sides` 1) or of reward training (2: both answers of a pair in one forward)."""
    kind = next(name for name, number in SIDES.items() if number == sides)
    base = Base.of(args.model_name, "--model_name")
    rows, lines, steps = trainer_steps(args, kind)
    plan = Plan(args, base, kind, rows, assumed_lengths(args, kind))
    return in_words(plan, title(args, script, args.model_name), lines, steps)


def trainer_steps(args, kind: str) -> tuple[int | None, list[str], float | None]:
    """(rows trained on in all, lines, steps) as far as the number of rows is known: a hub's are not counted."""
    # As many as this command would start here: --nproc plans for a machine with another number of cards.
    ranks = processes(args)
    unit = UNITS[kind]
    batch = args.per_device_train_batch_size * ranks * args.gradient_accumulation_steps
    lines = [
        f"an optimizer step: {batch} {unit} = {args.per_device_train_batch_size} a device x {ranks} process(es) x "
        f"{args.gradient_accumulation_steps} accumulated; the longest of {args.max_length} tokens"
    ]
    # --max_steps overrules the number of epochs, as it does in the Trainer.
    if args.max_steps > 0:
        total = args.max_steps * batch
        return total, [*lines, f"steps: {args.max_steps}, {total:,} {unit} with repetition"], args.max_steps

    # Rows on the hub would have to be downloaded before they could be counted.
    if not Path(args.dataset_name).exists():
        words = f"steps: {args.num_train_epochs:g} x {unit} / {batch}; {args.dataset_name} is not at hand"
        return None, [*lines, words], None

    rows_kind = "preference" if kind == "reward" else kind
    # Read and not encoded, as a plan should take seconds: rows that will turn out too long still count.
    rows = len(load_rows(args.dataset_name, rows_kind, args.train_split, args=args)[0])
    rows = min(rows, args.train_subset) if args.train_subset > 0 else rows
    # Rounded up: the last step of an epoch may have fewer rows than the others.
    steps = -(-rows // batch) * args.num_train_epochs
    lines.append(f"steps: about {steps:.0f} for {rows:,} {unit}, before any is dropped or held out")
    return round(rows * args.num_train_epochs), lines, steps


def plan_ppo(args, script: str) -> str:
    """The plan of PPO; adapters that do not exist yet are taken to have the stages' own defaults."""
    base = Base.of(args.base_model_name, "--base_model_name")
    batch = args.batch_size * processes(args)
    steps = -(-args.steps // batch)
    # --steps counts responses, and the last batch is a whole one.
    plan = Plan(args, base, "ppo", steps * batch, assumed_lengths(args, "ppo"))
    return in_words(plan, title(args, script, args.base_model_name), ppo_steps(args, base), steps)


def ppo_steps(args, base: Base) -> list[str]:
    """Steps, responses, and rows of an optimizer step."""
    ranks = processes(args)
    batch = args.batch_size * ranks
    steps = -(-args.steps // batch)
    # Of one process. A window may begin in one epoch and end in the next, so all epochs are divided together.
    window = (args.mini_batch_size or 1) * args.gradient_accumulation_steps
    updates = -(-args.batch_size * args.ppo_epochs // window)
    lines = [
        f"a step: {batch} responses = {args.batch_size} a process x {ranks} process(es), queries of at most "
        f"{args.max_prompt_length} and answers of at most {args.output_max_length} tokens",
        f"an optimizer step: {window * ranks} responses; {updates} of them a step ({args.ppo_epochs} epochs)",
        f"steps: {steps:,}, {steps * batch:,} responses in total, {steps * updates:,} optimizer steps",
    ]
    if args.mini_batch_size is None:
        # The mini-batch follows from the card where it is left out, so a plan for any card names one for each size.
        fitting = [f"{size} GB {rows_that_fit(args, base, size * 1e9)}" for size in CARDS_GB]
        lines.append(f"rows a backward pass, as many as fit a card of: {', '.join(fitting)}")
    return lines


# ---- words ----
def title(args, script: str, base: str) -> str:
    """First line of the plan."""
    # Of the base alone: adapters, heads and their gradients are float32 in any case.
    weights = "4-bit" if args.load_in_4bit else "bfloat16" if args.bf16 else "float32"
    checkpointing = "with" if args.gradient_checkpointing else "without"
    return f"plan of {script}: {base}, {weights} weights, {checkpointing} gradient checkpointing"


def in_words(plan: Plan, first: str, step_lines: list[str], steps: float | None) -> str:
    """All that the plan says."""
    args, base, kind = plan.args, plan.base, plan.kind
    needs = memory_of(args, base, kind)
    lines = [first, *memory_lines(plan, needs), *step_lines]
    if kind in TUTORIAL:
        lines.append(TUTORIAL[kind])
    cards = {size: card_of(size) for size in CARDS_GB}
    shared = shard_lines(args, base, kind, plan.lengths, cards)
    return "\n".join([*lines, *card_lines(plan), *shared, *disk_lines(args, base, kind, steps)])


def number(parameters: int, trained: bool = False) -> str:
    return f"{parameters:,}" + (" (trained)" if trained else "")


def gib(needed: float) -> str:
    return f"{needed / GIB:.2f}"


def memory_lines(plan: Plan, needs: MemoryNeeds) -> list[str]:
    """Parameters, and bytes by role and phase."""
    parameters = {"base": number(plan.base.shape.parameters)}
    for role, size in adapters_of(plan.args, plan.base, plan.kind).items():
        name = role if plan.kind != "ppo" else f"{role} adapter"
        # Reference, reward model and judge are frozen.
        parameters[name] = number(size, role in ("adapter", "policy", "value"))
    for name, size in head_of(plan.args, plan.base, plan.kind).items():
        parameters[name] = number(size, True)

    kinds = [("parameters", parameters)]
    kinds.append(("always in memory, GiB", {name: gib(size) for name, size in needs.roles.items()}))
    kinds.append(("on top while it lasts, GiB", {name: gib(size) for name, size in needs.phases.items()}))
    lines = []
    for heading, rows in kinds:
        lines += [f"{heading}:", *(f"  {name:<24} {value:>20}" for name, value in rows.items())]
    cards = ", ".join(f"{size} GB {'yes' if fits else 'no'}" for size, fits in needs.fits().items())
    lines.append(f"peak of a process: {gib(needs.peak())} GiB, in the {max(needs.phases, key=needs.phases.get)}")
    return [*lines, f"fits a card of: {cards}"]


def card_lines(plan: Plan) -> list[str]:
    """What a card of each size takes and how long it needs, with the flags that make the stage fit."""
    ranks = processes(plan.args)
    name = {"sft": "row", "reward": "pair", "ppo": "response"}[plan.kind]
    lines = [
        f"time of training alone, with {plan.lengths.words()}, on {ranks} card(s); shares of a card's limits as on "
        f"{SOURCE}:",
        f"  {'card':<24} {'GiB':>7} {name + 's/hour':>15} {'hours':>8}  flags that make it fit",
    ]
    own = own_card(plan.args.device_flops)
    # The card at hand first, by its own limits; those below stand for their size.
    if own:
        lines.append(card_line(plan, own.name, own, memory_of_this_card(), ranks))
    for size in CARDS_GB:
        card = card_of(size)
        lines.append(card_line(plan, f"{size} GB, {card.name}", card, size * 1e9, ranks))
    return lines


def card_line(plan: Plan, words: str, card: Card, limit: float | None, ranks: int) -> str:
    """One card: the peak, the rate and the hours, as the flags are or as they make it fit."""
    # Of a card whose memory is unknown the flags are taken as they are.
    changes = fitting_flags(plan.args, plan.base, plan.kind, limit or float("inf"))
    if changes is None:
        shorter = "--output_max_length and --max_prompt_length" if plan.kind == "ppo" else "--max_length"
        return f"  {words:<24} {'':>7} {'':>15} {'':>8}  none: lower {shorter}, or take a smaller base"

    args = replace(plan.args, **changes)
    peak = gib(memory_of(args, plan.base, plan.kind).peak())
    # As if no card ever waited for another.
    rate = ranks * 3600 / row_seconds(args, plan.base, plan.kind, card, plan.lengths)
    # Without the number of rows, only the rate is known.
    hours = f"{plan.rows / rate:.1f}" if plan.rows else "-"
    return f"  {words:<24} {peak:>7} {rate:>15,.0f} {hours:>8}  {flags_in_words(changes)}".rstrip()
