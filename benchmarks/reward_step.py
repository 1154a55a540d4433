"""Reward training against TRL's RewardTrainer: the same model, pairs, batch, dtype; pairs and real tokens a second.

Workload: 33-million-parameter Llama (benchmarks/model.py), LoRA r=8 on the attention projections, fp32, batches of 8
pairs of at most 512 tokens a side. The lengths are drawn from log-normals fitted to a Chinese preference set (medians:
query 60, chosen 95, rejected 87 tokens). Runs take turns, the median of --repeats counts.

    python -m benchmarks.reward_step --repeats 3 | tee benchmarks/results/reward_step.log
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
from transformers import Trainer, TrainingArguments
from trl import RewardConfig
from trl import RewardTrainer as TrlRewardTrainer

import reward_modeling
from benchmarks.common import TRAINING, Clock, group_by_length, lora, machine, random_ids, take_turns
from benchmarks.model import EOS, PAD, VOCABULARY, score_model, tokenizer
from rlhf.data.batches import LengthGroupedSampler
from rlhf.flags import flag, parse
from rlhf.models.forward import backbone_of, enable_packing
from rlhf.reward import pairs
from rlhf.reward.pairs import PairCollator, SharedPromptCollator
from rlhf.run.launch import silence_libraries

# Pairs of a step, and tokens of a side at most.
BATCH = 8
MAX_LENGTH = 512
# Mean and deviation of the logarithm of the lengths in tokens, and how the answers' go together.
QUERY = (4.09, 0.96)
CHOSEN = (4.56, 1.37)
REJECTED = (4.47, 1.11)
TOGETHER = 0.41
CONTENDERS = ("ours", "ours, shared prompt", "TRL", "TRL, length grouping")


@dataclass(kw_only=True)
class Arguments:
    """Flags of benchmarks/reward_step.py."""

    pairs: int = flag(64, help="pairs of one run, each once")
    repeats: int = flag(3, help="runs of each contender, in turn")
    threads: int = flag(0, help="of torch; 0: as many as there are cores")


def draw_rows(count: int, seed: int = 0) -> list[dict]:
    """Encoded pairs of random tokens, those over MAX_LENGTH left out."""
    rng = random.Random(seed)
    rows = []

    def ids(logarithm: float) -> list[int]:
        return random_ids(rng, round(math.exp(logarithm)), VOCABULARY)

    while len(rows) < count:
        # Two standard normals of correlation TOGETHER.
        a = rng.gauss(0, 1)
        b = rng.gauss(0, 1)
        b = TOGETHER * a + (1 - TOGETHER**2) ** 0.5 * b

        # An answer far beyond MAX_LENGTH is cut before the check: tokens that are thrown away cost time to draw.
        row = {
            "query_ids": ids(rng.gauss(*QUERY)),
            "chosen_ids": ids(CHOSEN[0] + CHOSEN[1] * a)[: 2 * MAX_LENGTH] + [EOS],
            "rejected_ids": ids(REJECTED[0] + REJECTED[1] * b)[: 2 * MAX_LENGTH] + [EOS],
        }
        if pairs.pair_length(row) <= MAX_LENGTH:
            rows.append(row)
    return rows


def trainer_of(name: str, rows: list[dict], folder: str, clock: Clock) -> Trainer:
    """A trainer of one contender on a fresh model."""
    settings = {"output_dir": folder, "per_device_train_batch_size": BATCH, **TRAINING}
    if name.startswith("TRL"):
        return _trl_trainer(rows, clock, settings, grouping="grouping" in name)

    # As reward_modeling.py sets its model up: plain pairs are packed, a shared prompt has a layout of its own.
    model = score_model()
    shared = "shared" in name
    pairs.score_by_mask(model)
    if not shared:
        enable_packing(backbone_of(model))

    length = pairs.shared_length if shared else pairs.pair_length
    collator = SharedPromptCollator if shared else PairCollator
    lengths = [length(row) for row in rows]
    return reward_modeling.RewardTrainer(
        get_peft_model(model, lora("SEQ_CLS")),
        TrainingArguments(remove_unused_columns=False, **settings),
        sampler=LengthGroupedSampler(lengths, BATCH, 0),
        loss_options={},
        about={},
        train_dataset=rows,
        data_collator=collator(PAD),
        callbacks=[clock],
    )


def _trl_trainer(rows: list[dict], clock: Clock, settings: dict, grouping: bool) -> TrlRewardTrainer:
    # Its own columns: each side with the query before it.
    joined = []
    for row in rows:
        joined.append({side: row["query_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")})

    trainer = TrlRewardTrainer(
        score_model(),
        RewardConfig(max_length=MAX_LENGTH, gradient_checkpointing=False, **settings),
        train_dataset=Dataset.from_list(joined),
        processing_class=tokenizer(),
        peft_config=lora("SEQ_CLS"),
        callbacks=[clock],
    )
    if grouping:
        group_by_length(trainer, BATCH, [pairs.pair_length(row) for row in rows])
    return trainer


def main(args: Arguments) -> None:
    """Let the contenders take turns, print the table."""
    silence_libraries()
    disable_progress_bars()
    torch.set_num_threads(args.threads or os.cpu_count())
    rows = draw_rows(args.pairs)
    # The query counts twice for everyone, also where it is computed once: the work done is the same.
    tokens = sum(2 * len(row["query_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    seconds = take_turns(trainer_of, CONTENDERS, rows, BATCH, args.repeats)

    print(f"{machine()}, transformers {transformers.__version__}, trl {trl.__version__}")
    print(f"{args.pairs} pairs of {tokens / len(rows):.0f} real tokens (both rows), median of {args.repeats}")
    slowest = statistics.median(seconds["TRL"])
    print(f"{'':<24}{'pairs/s':>10}{'real tokens/s':>16}{'times TRL':>12}")
    for name, values in seconds.items():
        middle = statistics.median(values)
        rate = tokens / len(rows) / middle
        print(f"{name:<24}{1 / middle:>10.2f}{rate:>16,.0f}{slowest / middle:>12.2f}")


if __name__ == "__main__":
    main(parse(Arguments, None, __doc__))
