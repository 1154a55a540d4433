"""Parts that several benchmarks use: the machine in words, row lengths, trainers timed in turn."""

import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import PrinterCallback, Trainer, TrainerCallback, trainer_pt_utils

# Of every trainer that is timed, ours or not.
TRAINING = {
    "num_train_epochs": 1, "learning_rate": 1e-4, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
    "logging_steps": 1000, "use_cpu": True, "seed": 0, "log_level": "error", "bf16": False,
}  # fmt: skip


def machine() -> str:
    """Processor, cores, threads and versions, in one line."""
    # Linux alone says what a processor is called; elsewhere its architecture has to do.
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = named[0] if named else platform.machine()
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def lora(task_type: str) -> LoraConfig:
    """r=8 on the attention projections, no dropout."""
    return LoraConfig(
        task_type=task_type, r=8, lora_alpha=32, lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )  # fmt: skip


def random_ids(rng: random.Random, length: int, vocabulary: int) -> list[int]:
    """That many tokens, none of them special; at least one."""
    # 0, 1 and 2 are PAD, BOS and EOS.
    return [rng.randrange(3, vocabulary) for _ in range(max(1, length))]


class Clock(TrainerCallback):
    """Notes when training began and when each step ended."""

    def __init__(self):
        self.ticks = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.ticks.append(time.perf_counter())


def group_by_length(trainer: Trainer, batch: int, lengths: list[int]) -> None:
    """transformers' own length grouping, in pools of 50 batches as it has them on a large set.

    Its flag finds no lengths, because TRL has dropped the column by then, and on few rows it would hardly group.
    """
    order = trainer_pt_utils.get_length_grouped_indices(lengths, batch, mega_batch_mult=50)
    # The Trainer has no public way in for a sampler.
    trainer._get_train_sampler = lambda *args: order


def seconds_a_row(trainer_of: Callable, name: str, rows: list[dict], batch: int) -> float:
    """Mean over the rows; every contender has the same ones, each once.

    Args:
        trainer_of: (name, rows, folder, clock) -> a trainer on a fresh model.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The first step allocates: one of its own, on another trainer, so that the clock sees every row once.
        for part in (rows[:batch], rows):
            clock = Clock()
            trainer = trainer_of(name, part, folder, clock)
            trainer.remove_callback(PrinterCallback)
            trainer.train()

        # Loading and saving lie outside this span.
        seconds = clock.ticks[-1] - clock.begin
        return seconds / len(rows)


def take_turns(trainer_of: Callable, names: tuple[str, ...], rows: list[dict], batch: int, repeats: int) -> dict:
    """Name -> seconds a row of each run; contenders alternate, so that a busy minute hits them all."""
    seconds = {name: [] for name in names}
    for _, name in product(range(repeats), names):
        seconds[name].append(seconds_a_row(trainer_of, name, rows, batch))
    return seconds
