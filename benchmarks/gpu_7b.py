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
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import peft
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import reward_modeling
import rl_training
from benchmarks.common import machine
from benchmarks.gpu_measure import HEAD, Arguments, Bench, Meter, Row, Target, cells, line
from benchmarks.gpu_trainers import reward, supervised
from benchmarks.gpu_workload import Numbers, prompt_rows, write_adapter
from rlhf.arguments import LoraArguments
from rlhf.cost.flops import flop_counts, this_card
from rlhf.cost.limits import Card, Cost, Rows, ppo_costs
from rlhf.cost.memory import Precision
from rlhf.flags import parse
from rlhf.rl.experience import recomputes
from rlhf.rl.loop import PPOLoop
from rlhf.rl.state import snapshot
from rlhf.run.launch import silence_libraries

# PPO epochs of a step, as PPO is usually run.
EPOCHS = 4
# GB that one row may leave behind before the next one's peak means something else.
LEFT_BEHIND_GB = 0.5
# Readings of the meter in a PPO step: before it, before each of its three phases, after the last of them, at its end.
READINGS = 6
PHASES = {"rollout": (1, 2), "score": (2, 3), "update": (3, 4), "step": (0, 5)}


# ---- PPO ----
def ppo_loop(bench: Bench, rows: Rows, folder: Path, *flags: str) -> PPOLoop:
    """A loop of rl_training.make_loop on these flags, a random base, and random adapters in `folder`."""
    config = bench.shape.config()
    write_adapter(config, folder / "sft", LoraArguments.lora_rank, score_head=False)
    write_adapter(config, folder / "reward", reward_modeling.ScriptArguments.lora_rank, score_head=True)

    # An answer may end only at its last token, so that all are equally long.
    settings = {
        "base_model_name": "random", "sft_model_lora_path": folder / "sft",
        "reward_model_lora_path": folder / "reward", "output_dir": folder / "out", "batch_size": rows.count,
        "output_max_length": rows.answer, "min_new_tokens": rows.answer - 1, "ppo_epochs": EPOCHS,
        "steps": bench.all_steps * rows.count, "learning_rate": 1e-5,
        "reward_transform": "sigmoid", "init_kl_coef": 0.5,
    }  # fmt: skip
    words = []
    for name, value in settings.items():
        words += [f"--{name}", str(value)]
    args = rl_training.parse_args([*words, *flags])

    # The trainers before may have left their precision behind.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=bench.args.device == "cpu", mixed_precision="no")
    with bench.base():
        prompts = prompt_rows(rows, config.vocab_size)
        return rl_training.make_loop(args, accelerator, Numbers(), (prompts, []), None)


def ppo(bench: Bench, rows: Rows, title: str, target: Target | None, *flags: str) -> list[Row]:
    """Rows of the phases of a PPO step, and of the whole of it, for which `target` is meant.

    Args:
        flags: of rl_training.py.
    """
    meter = Meter(bench.args.device)
    with tempfile.TemporaryDirectory() as folder:
        loop = ppo_loop(bench, rows, Path(folder), *flags)

    for step in range(bench.all_steps):
        meter.read()
        # The snapshot that a run keeps to roll back to is part of its step.
        kept = snapshot(loop)
        rl_training.train_step(loop, step, clock=meter.read)
        meter.read()
        del kept

    if len(meter.times) != READINGS * bench.all_steps:
        raise ValueError("rl_training.train_step reads its clock more or less than four times: PHASES is wrong")

    costs = _costs(bench, rows, loop)
    measured = []
    for phase, (first, last) in PHASES.items():
        seconds, peak = meter.spans(first, last, READINGS)
        row = Row(f"{title} {phase}", seconds, rows.count, rows.count * rows.answer, peak, costs[phase])
        # No phase has an aim of its own.
        measured.append(replace(row, target=target) if phase == "step" else row)
    return measured


def _costs(bench: Bench, rows: Rows, loop: PPOLoop) -> dict[str, Cost]:
    """Cost of each phase, and of the whole step."""
    args = loop.args
    model = loop.roles.model
    precision = Precision(bench.dtype.itemsize, args.load_in_4bit)
    work = flop_counts(model, model.config)
    again = recomputes(loop)
    costs = ppo_costs(work, precision, rows, again, EPOCHS, args.gradient_checkpointing)
    costs["step"] = costs["rollout"] + costs["score"] + costs["update"]
    return costs


def ppo_speed(bench: Bench) -> list[Row]:
    """The rows that count samples a second."""
    mini_batch = bench.shape.mini_batch
    windows = ("--mini_batch_size", str(mini_batch), "--gradient_accumulation_steps", "1")
    return ppo(bench, bench.shape.ppo, "PPO", bench.target(rate=4), *windows)


def ppo_memory(bench: Bench, four_bit: bool) -> list[Row]:
    """The rows that count peak memory: gradient checkpointing, and one backward for the whole batch."""
    rows = bench.shape.memory
    flags = ["--mini_batch_size", str(rows.count), "--gradient_checkpointing", "True"]
    if not four_bit:
        return ppo(bench, rows, "memory", bench.target(memory=40), *flags)

    # An optional package: without it the other rows are worth having all the same.
    if find_spec("bitsandbytes") is None:
        print("memory, 4-bit: not measured, bitsandbytes is not installed", flush=True)
        return []
    flags += ["--load_in_4bit", "True"]
    return ppo(bench, rows, "memory, 4-bit", bench.target(memory=24), *flags)


# ---- the table ----
def machine_line(bench: Bench) -> str:
    """The card, or the processor, and versions."""
    place = machine()
    dtype = str(bench.dtype).removeprefix("torch.")
    if bench.args.device == "cuda":
        # One name stands for cards of several sizes.
        size = torch.cuda.get_device_properties(0).total_memory / 1e9
        place = f"{bench.card.name} of {size:.0f} GB, torch {torch.__version__}"
    return f"{place}, transformers {transformers.__version__}, peft {peft.__version__}; {dtype}"


# Each case loads a model of its own, so that one that is too large for the card costs no other.
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
    """Print the rows of each part as they are measured; returns them all."""
    silence_libraries()
    start = time.perf_counter()
    name = this_card() if args.device == "cuda" else ""
    bench = Bench(args, Card.of(name, args.peak_tflops, args.bandwidth_tb))
    print(f"{machine_line(bench)}\nmedians of {args.steps} steps after one left out\n{line(HEAD)}", flush=True)

    rows = []
    for part in CASES if args.only == "all" else [args.only]:
        for case in CASES[part]:
            measured = measure(bench, part, case)
            # At once, because a case takes minutes and the next one may fail.
            for row in measured:
                print(line(cells(row, bench.card)), flush=True)
            rows += measured
            warn_of_leftovers(args)

    print(f"{time.perf_counter() - start:.0f} s in all", flush=True)
    return rows


def warn_of_leftovers(args: Arguments) -> None:
    """Say that memory is still held between two cases: the peaks below would mean something else."""
    held = torch.cuda.memory_allocated() / 1e9 if args.device == "cuda" else 0.0
    if held > LEFT_BEHIND_GB:
        print(f"{held:.1f} GB are still held, and count in the rows below: run those with --only", flush=True)


if __name__ == "__main__":
    main(parse(Arguments, None, __doc__))
