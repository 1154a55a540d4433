"""baichuan-7B on one GPU: steps of all stages, their memory, and how near they come to what the card could do at best.

    python -m benchmarks.gpu_7b | tee benchmarks/results/gpu_7b.log

The model has the real shape and random weights, drawn on the card in bfloat16: nothing is downloaded, and no disk or
host memory is needed. A first step of each row is left out; of the others the medians count, of memory the peak of
PyTorch's own allocations. No answer ends early.

    sft       SupervisedTrainer, 4 rows of 512 tokens; without trl the same model, optimizer and loss in a plain loop
    reward    RewardTrainer, 10 pairs of 2 x 300 tokens, plain and with --share_prompt
    ppo       rl_training.train_step, 64 prompts of 128 tokens, 256 new ones, 4 epochs
    memory    the same for 8 x (256 + 256) tokens with gradient checkpointing; also in 4 bits, where bitsandbytes is

tokens: real ones, of the prompts too; of PPO the sampled ones. MFU: operations (rlhf/cost/flops.py; what checkpointing
computes again counts) over the card's peak. limit: the seconds of a step on a card at its peak, in rollouts one that
reads its memory at full speed. `--shape tiny --device cpu` runs the same code in seconds, where numbers say nothing.
"""

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import peft
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainingArguments

import reward_modeling
import rl_training
from benchmarks.common import TRAINING, machine
from benchmarks.gpu_limits import Card, Cost, ppo_costs
from benchmarks.gpu_measure import HEAD, Meter, Row, Target, Ticks, cells, line
from benchmarks.gpu_workload import (
    SHAPES,
    Numbers,
    Rows,
    adapted,
    instead_of_a_checkpoint,
    pair_rows,
    prompt_rows,
    random_model,
    sft_rows,
    write_adapter,
)
from benchmarks.model import PAD, tokenizer
from rlhf.arguments import LoraArguments
from rlhf.cost.flops import flop_counts, this_card, training_flops
from rlhf.cost.memory import Precision
from rlhf.data.batches import LengthGroupedSampler
from rlhf.flags import flag, parse
from rlhf.models.forward import forward
from rlhf.models.loading import pick_dtype
from rlhf.reward.pairs import PairCollator, SharedPromptCollator
from rlhf.rl.experience import recomputes
from rlhf.rl.loop import PPOLoop
from rlhf.rl.state import snapshot
from rlhf.run.launch import silence_libraries

EPOCHS = 4
# GB that one row may leave behind before the next one's peak means something else.
LEFT_BEHIND_GB = 0.5
# Readings of the meter in a PPO step: before it, before each of its three phases, after the last of them, at its end.
READINGS = 6
PHASES = {"rollout": (1, 2), "score": (2, 3), "update": (3, 4), "step": (0, 5)}


@dataclass(kw_only=True)
class Arguments:
    """Flags of benchmarks/gpu_7b.py."""

    only: str = flag("all", help="one part of it", choices=["all", "sft", "reward", "ppo", "memory"])
    shape: str = flag("7b", help="of model and batches", choices=list(SHAPES))
    device: str = flag("cuda", help="where it runs", choices=["cuda", "cpu"])
    steps: int = flag(3, help="steps of a row that are measured, after one that is not")
    peak_tflops: float | None = flag(None, help="the card's peak, where rlhf/cost/flops.py does not know its name")
    bandwidth_tb: float | None = flag(None, help="TB/s of its memory, where benchmarks/gpu_limits.py does not")

    def __post_init__(self):
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("no GPU is visible; --shape tiny --device cpu tries the code without one")
        if self.device == "cpu" and self.shape != "tiny":
            raise ValueError(f"--shape {self.shape} needs a GPU: with --device cpu give --shape tiny")
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps} must be at least 1")


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    args: Arguments
    card: Card

    @property
    def shape(self):
        """Sizes of model and batches."""
        return SHAPES[self.args.shape]

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's weights, as the stages choose it."""
        return pick_dtype(self.args.device == "cuda")

    @property
    def all_steps(self) -> int:
        """Measured or not."""
        return 1 + self.args.steps

    def base(self):
        """Within this context the stages' bases are random."""
        return instead_of_a_checkpoint(self.shape.config(), self.args.device, self.dtype)

    def target(self, **wanted) -> Target | None:
        """One for the real shape alone."""
        return Target(**wanted) if self.args.shape == "7b" else None


def trainer_settings(bench: Bench, config_class: type, folder: str, rows: Rows, **extra):
    """Every trainer's arguments here; checkpointing is turned on at the model, by a name that all versions know."""
    config = config_class(**TRAINING | {
        "output_dir": folder, "per_device_train_batch_size": rows.count, "use_cpu": bench.args.device == "cpu",
        "bf16": bench.dtype == torch.bfloat16, "fp16": bench.dtype == torch.float16, "gradient_checkpointing": False,
    }, **extra)  # fmt: skip
    # One process trains on one card: on a machine of several the Trainer would use DataParallel.
    config._n_gpu = min(1, config.n_gpu)
    return config


def timed_training(bench: Bench, trainer: Trainer) -> tuple[float, float]:
    """Seconds of a step and peak memory of a trainer's own loop."""
    meter = Meter(bench.args.device)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Ticks(meter))
    trainer.train()
    return meter.spans(0, 1, 1)


# ---- SFT ----
def supervised(bench: Bench, checkpointing: bool) -> list[Row]:
    """A step of SFT; its output layer counts at the places of answer tokens."""
    rows = bench.shape.sft
    torch.manual_seed(0)
    base = random_model(bench.shape.config(), "causal", bench.args.device, bench.dtype)
    model = adapted(base, LoraArguments.lora_rank, dropout=LoraArguments.lora_dropout)
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})

    ours = find_spec("trl") is not None and find_spec("datasets") is not None
    encoded = sft_rows(rows, bench.all_steps * rows.count, base.config.vocab_size)
    seconds, peak = (supervised_by_trainer if ours else supervised_by_hand)(bench, model, encoded)
    lengths = [rows.query + rows.answer] * rows.count
    flops = training_flops(flop_counts(model, base.config), lengths, rows.count * rows.answer, checkpointing)
    name = f"SFT {rows.count} x {lengths[0]}{', checkpointing' if checkpointing else ''}"
    return [Row(name if ours else f"{name} (no trl)", seconds, rows.count, sum(lengths), peak, Cost.of(flops))]


def supervised_by_trainer(bench: Bench, model, encoded: list[dict]) -> tuple[float, float]:
    """As sft_training.build_trainer has it."""
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig

    import sft_training

    disable_progress_bars()
    rows = bench.shape.sft
    with tempfile.TemporaryDirectory() as folder:
        trainer = sft_training.SupervisedTrainer(
            model,
            trainer_settings(bench, SFTConfig, folder, rows, completion_only_loss=True, max_length=None),
            sampler=LengthGroupedSampler([rows.query + rows.answer] * len(encoded), rows.count, 0),
            about={},
            train_dataset=Dataset.from_list(encoded),
            processing_class=tokenizer(),
        )
        return timed_training(bench, trainer)


def supervised_by_hand(bench: Bench, model, encoded: list[dict]) -> tuple[float, float]:
    """The same without trl: cross-entropy at the answer tokens, autocast and AdamW as the Trainer has them."""
    rows = bench.shape.sft
    device = bench.args.device
    meter = Meter(bench.args.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=TRAINING["learning_rate"], fused=device == "cuda")
    model.train()
    meter.read()

    for start in range(0, len(encoded), rows.count):
        ids = torch.tensor([row["input_ids"] for row in encoded[start : start + rows.count]], device=device)
        places = (slice(None), slice(rows.query - 1, -1))
        with torch.autocast(device, bench.dtype, enabled=bench.dtype != torch.float32):
            logits, _ = forward(model.get_base_model(), places, ids, use_cache=False)
            loss = cross_entropy(logits.flatten(0, 1).float(), ids[:, rows.query :].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.read()
    return meter.spans(0, 1, 1)


# ---- reward model ----
def reward(bench: Bench, share_prompt: bool) -> list[Row]:
    """A step of reward training, as reward_modeling builds and runs it."""
    rows = bench.shape.reward
    args = reward_modeling.parse_args([])
    with bench.base():
        model = reward_modeling.build_model(args, "random")

    pairs = pair_rows(rows, bench.all_steps * rows.count, model.config.vocab_size)
    length = reward_modeling.pairs.shared_length if share_prompt else reward_modeling.pairs.pair_length

    with tempfile.TemporaryDirectory() as folder:
        trainer = reward_modeling.RewardTrainer(
            model,
            trainer_settings(bench, TrainingArguments, folder, rows, remove_unused_columns=False),
            sampler=LengthGroupedSampler([length(pair) for pair in pairs], rows.count, 0),
            loss_options={},
            about={},
            train_dataset=pairs,
            data_collator=(SharedPromptCollator if share_prompt else PairCollator)(PAD),
        )
        seconds, peak = timed_training(bench, trainer)

    whole = rows.query + rows.answer
    work = flop_counts(model, model.config)
    flops = training_flops(work, [whole] * (2 * rows.count), 0, checkpointing=False)
    if share_prompt:
        flops -= training_flops(work, [rows.query] * rows.count, 0, checkpointing=False)

    tokens = rows.count * (2 * whole - share_prompt * rows.query)
    name = f"reward {rows.count} x 2 x {whole}{', shared prompt' if share_prompt else ''}"
    return [Row(name, seconds, rows.count, tokens, peak, Cost.of(flops), bench.target(rate=15))]


# ---- PPO ----
def ppo_loop(bench: Bench, rows: Rows, folder: Path, *flags: str) -> PPOLoop:
    """What rl_training.make_loop makes of these flags, a random base and adapters with random weights in `folder`."""
    for name, rank in (("sft", LoraArguments.lora_rank), ("reward", reward_modeling.ScriptArguments.lora_rank)):
        write_adapter(bench.shape.config(), folder / name, rank, score_head=name == "reward")

    settings = {
        "base_model_name": "random", "sft_model_lora_path": folder / "sft",
        "reward_model_lora_path": folder / "reward", "output_dir": folder / "out", "batch_size": rows.count,
        "output_max_length": rows.answer, "min_new_tokens": rows.answer - 1, "ppo_epochs": EPOCHS,
        "steps": bench.all_steps * rows.count, "learning_rate": 1e-5,
    }  # fmt: skip
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    args = rl_training.parse_args([*words, *flags])
    # The trainers before may have left their precision behind.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=bench.args.device == "cpu", mixed_precision="no")
    with bench.base():
        prompts = prompt_rows(rows, bench.shape.config().vocab_size)
        return rl_training.make_loop(args, accelerator, Numbers(), (prompts, []), None)


def ppo(bench: Bench, rows: Rows, title: str, target: Target | None, *flags: str) -> list[Row]:
    """The phases of a PPO step, and the whole of it, for which `target` is meant. flags: of rl_training.py."""
    meter = Meter(bench.args.device)
    with tempfile.TemporaryDirectory() as folder:
        loop = ppo_loop(bench, rows, Path(folder), *flags)

    for step in range(bench.all_steps):
        meter.read()
        # What a run keeps to fall back on is part of its step.
        kept = snapshot(loop)
        rl_training.train_step(loop, step, clock=meter.read)
        meter.read()
        del kept

    if len(meter.times) != READINGS * bench.all_steps:
        raise ValueError("rl_training.train_step reads its clock more or less than four times: PHASES is wrong")

    args = loop.args
    model = loop.roles.model
    precision = Precision(bench.dtype.itemsize, args.load_in_4bit)
    work = flop_counts(model, model.config)
    again = recomputes(loop)
    costs = ppo_costs(work, precision, rows, again, EPOCHS, args.gradient_checkpointing)
    costs["step"] = costs["rollout"] + costs["score"] + costs["update"]
    found = []

    for phase, (first, last) in PHASES.items():
        seconds, peak = meter.spans(first, last, READINGS)
        row = Row(f"{title} {phase}", seconds, rows.count, rows.count * rows.answer, peak, costs[phase])
        found.append(replace(row, target=target) if phase == "step" else row)
    return found


def ppo_speed(bench: Bench) -> list[Row]:
    """Samples a second."""
    mini_batch = bench.shape.mini_batch
    windows = ("--mini_batch_size", str(mini_batch), "--gradient_accumulation_steps", "1")
    return ppo(bench, bench.shape.ppo, "PPO", bench.target(rate=4), *windows)


def ppo_memory(bench: Bench, four_bit: bool) -> list[Row]:
    """The peak with gradient checkpointing, all rows in one backward."""
    rows = bench.shape.memory
    title = "memory"
    flags = ["--mini_batch_size", str(rows.count), "--gradient_checkpointing", "True"]
    if four_bit:
        if find_spec("bitsandbytes") is None:
            print("memory, 4-bit: not measured, bitsandbytes is not installed", flush=True)
            return []
        flags = [*flags, "--load_in_4bit", "True"]
        title = "memory, 4-bit"
    return ppo(bench, rows, title, bench.target(memory=24 if four_bit else 40), *flags)


# ---- the table ----
def machine_line(bench: Bench) -> str:
    """The card, or the processor, and versions."""
    place = machine()
    dtype = str(bench.dtype).removeprefix("torch.")
    if bench.args.device == "cuda":
        size = torch.cuda.get_device_properties(0).total_memory / 1e9
        place = f"{bench.card.name} of {size:.0f} GB, torch {torch.__version__}"
    return f"{place}, transformers {transformers.__version__}, peft {peft.__version__}; {dtype}"


CASES: dict[str, tuple[Callable[[Bench], list[Row]], ...]] = {
    "sft": (partial(supervised, checkpointing=False), partial(supervised, checkpointing=True)),
    "reward": (partial(reward, share_prompt=False), partial(reward, share_prompt=True)),
    "ppo": (ppo_speed,),
    "memory": (partial(ppo_memory, four_bit=False), partial(ppo_memory, four_bit=True)),
}


def measure(bench: Bench, part: str, case: Callable[[Bench], list[Row]]) -> list[Row]:
    """A case's rows; none, and a line that says why, where the card is too small for it."""
    try:
        return case(bench)
    except (MemoryError, torch.OutOfMemoryError) as error:
        print(f"{part}: not measured, {' '.join(str(error).split())}", flush=True)
        return []
    finally:
        # The next case's peak is its own only where this one's model is gone; what forms a cycle waits for this.
        gc.collect()
        torch.cuda.empty_cache()


def main(args: Arguments) -> list[Row]:
    """Each part's rows as they are found; returns them."""
    silence_libraries()
    start = time.perf_counter()
    name = this_card() if args.device == "cuda" else ""
    bench = Bench(args, Card.of(name, args.peak_tflops, args.bandwidth_tb))
    print(f"{machine_line(bench)}\nmedians of {args.steps} steps after one left out\n{line(HEAD)}", flush=True)
    rows = []

    for part in CASES if args.only == "all" else [args.only]:
        for case in CASES[part]:
            found = measure(bench, part, case)
            for row in found:
                print(line(cells(row, bench.card)), flush=True)
            left = torch.cuda.memory_allocated() / 1e9 if args.device == "cuda" else 0.0
            if left > LEFT_BEHIND_GB:
                print(f"{left:.1f} GB are still held, and count in the rows below: run those with --only", flush=True)
            rows += found

    print(f"{time.perf_counter() - start:.0f} s in all", flush=True)
    return rows


if __name__ == "__main__":
    main(parse(Arguments, None, __doc__))
