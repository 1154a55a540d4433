"""SFT against TRL's SFTTrainer: the same model, rows, batch, dtype, no checkpointing; rows and real tokens a second.

Workload: 33-million-parameter Llama (benchmarks/model.py), LoRA r=8 on the attention projections, fp32, batches of 8
rows of at most 512 tokens. The lengths are drawn from log-normals fitted to a Chinese instruction set (median query 20
tokens, answer 95; batches of random rows are 48 % padding, as there). Runs take turns, the median of --repeats counts.

    python -m benchmarks.sft_step --repeats 3 | tee benchmarks/results/sft_step.log
"""

import math
import os
import random
import statistics
from dataclasses import dataclass

import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from peft import get_peft_model
from trl import SFTConfig, SFTTrainer

import sft_training
from benchmarks.common import TRAINING, Clock, group_by_length, lora, machine, random_ids, take_turns
from benchmarks.model import EOS, VOCABULARY, causal_model, tokenizer
from rlhf.data.batches import LengthGroupedSampler
from rlhf.flags import flag, parse
from rlhf.run.launch import silence_libraries

# Rows of a step, and tokens of a row at most.
BATCH = 8
MAX_LENGTH = 512
# Mean and deviation of the logarithm of the lengths in tokens, and the longest answer: the set's own tail is short.
QUERY = (2.98, 0.38)
ANSWER = (4.55, 0.85)
LONGEST_ANSWER = 330
CONTENDERS = ("ours", "TRL", "TRL, length grouping")


@dataclass(kw_only=True)
class Arguments:
    """Flags of benchmarks/sft_step.py."""

    rows: int = flag(96, help="rows of one run, each once")
    repeats: int = flag(3, help="runs of each contender, in turn")
    threads: int = flag(0, help="of torch; 0: as many as there are cores")


def draw_rows(count: int, seed: int = 0) -> list[dict]:
    """Encoded rows of random tokens with a loss on the answer; answers over LONGEST_ANSWER are drawn again."""
    rng = random.Random(seed)
    rows = []
    while len(rows) < count:
        query = round(math.exp(rng.gauss(*QUERY)))
        answer = round(math.exp(rng.gauss(*ANSWER)))
        if answer > LONGEST_ANSWER:
            continue

        # Random tokens cost as much as text, and no tokenizer has to be the same for all.
        query_ids = random_ids(rng, query, VOCABULARY)
        answer_ids = random_ids(rng, answer, VOCABULARY) + [EOS]
        mask = [0] * len(query_ids) + [1] * len(answer_ids)
        rows.append({"input_ids": query_ids + answer_ids, "completion_mask": mask})
    return rows


def trainer_of(name: str, rows: list[dict], folder: str, clock: Clock) -> SFTTrainer:
    """A trainer of one contender on a fresh model."""
    lengths = [len(row["input_ids"]) for row in rows]
    # As in sft_training.build_trainer; TRL is given the same rows, of which it cuts none.
    config = SFTConfig(
        output_dir=folder, per_device_train_batch_size=BATCH, completion_only_loss=True,
        max_length=None if name == "ours" else MAX_LENGTH, packing=False, gradient_checkpointing=False, **TRAINING,
    )  # fmt: skip

    # The same model and data for all; ours brings its own order of the rows.
    model = get_peft_model(causal_model(), lora("CAUSAL_LM"))
    parts = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer(), "callbacks": [clock]}
    if name == "ours":
        sampler = LengthGroupedSampler(lengths, BATCH, 0)
        return sft_training.SupervisedTrainer(model, config, sampler=sampler, about={}, **parts)

    trainer = SFTTrainer(model, config, **parts)
    if "grouping" in name:
        group_by_length(trainer, BATCH, lengths)
    return trainer


def main(args: Arguments) -> None:
    """Let the contenders take turns, print the table."""
    silence_libraries()
    disable_progress_bars()
    torch.set_num_threads(args.threads or os.cpu_count())
    rows = draw_rows(args.rows)
    # Padding is no work: a contender that pads less gets through more real tokens a second.
    tokens = statistics.mean(len(row["input_ids"]) for row in rows)
    seconds = take_turns(trainer_of, CONTENDERS, rows, BATCH, args.repeats)

    print(f"{machine()}, transformers {transformers.__version__}, trl {trl.__version__}")
    print(f"{args.rows} rows of {tokens:.0f} real tokens, median of {args.repeats}")
    slowest = statistics.median(seconds["TRL"])
    print(f"{'':<24}{'rows/s':>10}{'real tokens/s':>16}{'times TRL':>12}")
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"{name:<24}{1 / middle:>10.2f}{tokens / middle:>16,.0f}{slowest / middle:>12.2f}")


if __name__ == "__main__":
    main(parse(Arguments, None, __doc__))
