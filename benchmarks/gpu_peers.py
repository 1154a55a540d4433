"""The three stages beside TRL's trainers on one GPU, at baichuan-7B's shape: seconds a step, rate, peak memory.

    python -m benchmarks.gpu_peers | tee benchmarks/results/gpu_peers.log

Each contender has a process of its own, random bfloat16 weights, LoRA r=8 on queries, keys and values (baichuan's
W_pack holds all three), Adam, and batches of one shape, so that nobody pads. A first step is left out; of the others
the medians count. TRL computes with transformers alone: without vLLM, flash-attn or Liger, as pip installs it.

    sft       4 rows of 512 tokens, loss on 384 of them
    reward    10 pairs of 2 x 300 tokens
    grpo      64 answers of 256 tokens to 8 prompts of 128, KL penalty against the base, one pass, 16 rows a backward;
              ours scores every answer with a reward adapter besides, TRL's reward is a constant of no cost

`--shape tiny --device cpu` runs the same code in seconds, where numbers say nothing.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.common import random_ids
from benchmarks.gpu_7b import machine_line, ppo
from benchmarks.gpu_measure import Arguments as BenchArguments
from benchmarks.gpu_measure import Bench, Row
from benchmarks.gpu_trainers import reward, supervised, timed_training, trainer_settings
from benchmarks.gpu_workload import SHAPES, pair_rows, sft_rows
from benchmarks.model import tokenizer
from rlhf.arguments import LoraArguments
from rlhf.cost.flops import this_card
from rlhf.cost.limits import Card, Cost
from rlhf.flags import flag, parse
from rlhf.run.launch import silence_libraries

# Answers to one prompt.
GROUP = 8
# Of the tokenizer of benchmarks/model.py, whose words are the only text that there is.
WORDS = 500


@dataclass(kw_only=True)
class Arguments:
    """Flags of benchmarks/gpu_peers.py."""

    only: str = flag("", help="one contender, in this process")
    shape: str = flag("7b", help="of model and batches", choices=list(SHAPES))
    device: str = flag("cuda", help="where it runs", choices=["cuda", "cpu"])
    steps: int = flag(3, help="steps that are measured, after one that is not")

    def __post_init__(self):
        if self.only and self.only not in CONTENDERS:
            raise ValueError(f"--only {self.only}: there are {', '.join(CONTENDERS)}")


# ---- TRL ----
def peer_model(bench: Bench, head: str):
    """A Llama of the same sizes as the base, its weights drawn on the device."""
    shape = bench.shape.config()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = LlamaConfig(
        **{name: getattr(shape, name) for name in names}, pad_token_id=0, bos_token_id=1, num_labels=1
    )
    kind = LlamaForCausalLM if head == "causal" else LlamaForSequenceClassification
    with torch.device(bench.args.device):
        # `from_config` is of the auto classes; this is what it calls.
        return kind._from_config(config, dtype=bench.dtype)


def peer_lora(task_type: str):
    """The adapter of every contender, without dropout."""
    from peft import LoraConfig

    return LoraConfig(
        task_type=task_type, r=LoraArguments.lora_rank, lora_alpha=LoraArguments.lora_alpha, lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj"],
    )  # fmt: skip


def timed(bench: Bench, trainer, name: str, count: int, tokens: int) -> list[Row]:
    """The row of one of TRL's trainers."""
    seconds, peak = timed_training(bench, trainer)
    return [Row(name, seconds, count, tokens, peak, Cost.of(0))]


def trl_sft(bench: Bench) -> list[Row]:
    """SFTTrainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = bench.shape.sft
    model = peer_model(bench, "causal")
    encoded = sft_rows(rows, bench.all_steps * rows.count, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        config = trainer_settings(bench, SFTConfig, folder, rows, completion_only_loss=True, max_length=None)
        data = Dataset.from_list(encoded)
        trainer = SFTTrainer(
            model, config, train_dataset=data, processing_class=tokenizer(), peft_config=peer_lora("CAUSAL_LM")
        )
        return timed(bench, trainer, "sft, TRL", rows.count, rows.count * (rows.query + rows.answer))


def trl_reward(bench: Bench) -> list[Row]:
    """RewardTrainer."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = bench.shape.reward
    model = peer_model(bench, "score")
    joined = []
    for row in pair_rows(rows, bench.all_steps * rows.count, model.config.vocab_size):
        joined.append({side: row["query_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")})
    with tempfile.TemporaryDirectory() as folder:
        config = trainer_settings(bench, RewardConfig, folder, rows, max_length=None)
        trainer = RewardTrainer(
            model, config, train_dataset=Dataset.from_list(joined), processing_class=tokenizer(),
            peft_config=peer_lora("SEQ_CLS"),
        )  # fmt: skip
        return timed(bench, trainer, "reward, TRL", rows.count, rows.count * 2 * (rows.query + rows.answer))


def trl_grpo(bench: Bench) -> list[Row]:
    """GRPOTrainer; answers may end only at their last token."""
    import random

    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = bench.shape.ppo
    rng = random.Random(0)
    texts = []
    for _ in range(bench.all_steps * rows.count):
        texts.append(" ".join(f"t{number}" for number in random_ids(rng, rows.query, WORDS)))

    with tempfile.TemporaryDirectory() as folder:
        windows = rows.count // bench.shape.mini_batch
        config = trainer_settings(
            bench, GRPOConfig, folder, rows, num_generations=min(GROUP, rows.count), beta=0.05,
            max_completion_length=rows.answer, generation_kwargs={"min_new_tokens": rows.answer},
            gradient_accumulation_steps=windows, max_steps=bench.all_steps,
        )  # fmt: skip
        config.per_device_train_batch_size = bench.shape.mini_batch
        trainer = GRPOTrainer(
            peer_model(bench, "causal"), reward_funcs=length_of,
            args=config, train_dataset=Dataset.from_dict({"prompt": texts}), processing_class=tokenizer(),
            peft_config=peer_lora("CAUSAL_LM"),
        )  # fmt: skip
        return timed(bench, trainer, "grpo, TRL", rows.count, rows.count * rows.answer)


# ---- ours ----
def ours_grpo(bench: Bench) -> list[Row]:
    """rl_training.train_step with --advantage grpo: its whole step."""
    group = min(GROUP, bench.shape.ppo.count)
    flags = ("--advantage", "grpo", "--group_size", str(group), "--ppo_epochs", "1")
    windows = ("--mini_batch_size", str(bench.shape.mini_batch))
    accumulation = str(bench.shape.ppo.count // bench.shape.mini_batch)
    rows = ppo(
        bench, bench.shape.ppo, "grpo, ours", None, *flags, *windows, "--gradient_accumulation_steps", accumulation
    )
    return rows[-1:]


CONTENDERS = {
    "sft-ours": partial(supervised, checkpointing=False),
    "sft-trl": trl_sft,
    "reward-ours": partial(reward, share_prompt=False),
    "reward-ours-shared": partial(reward, share_prompt=True),
    "reward-trl": trl_reward,
    "grpo-ours": ours_grpo,
    "grpo-trl": trl_grpo,
}

HEAD = f"{'':<32}{'s':>8}{'samples/s':>12}{'tokens/s':>12}{'GB':>8}"


def line(row: Row) -> str:
    """A contender's line of the table."""
    rates = f"{row.samples / row.seconds:>12.2f}{row.tokens / row.seconds:>12,.0f}"
    return f"{row.name:<32}{row.seconds:>8.3f}{rates}{row.peak_gb:>8.1f}"


def length_of(completions, **rest) -> list[float]:
    """A reward of no cost."""
    return [float(len(completion)) for completion in completions]


def main(args: Arguments) -> None:
    """Run one contender, or all of them in turn."""
    if args.only:
        silence_libraries()
        name = this_card() if args.device == "cuda" else ""
        shape = BenchArguments(shape=args.shape, device=args.device, steps=args.steps)
        bench = Bench(shape, Card.of(name, None, None))
        for row in CONTENDERS[args.only](bench):
            print(line(row), flush=True)
        return

    shape = BenchArguments(shape=args.shape, device=args.device, steps=args.steps)
    print(machine_line(Bench(shape, Card.of("", None, None))), flush=True)
    print(f"medians of {args.steps} steps after one left out\n{HEAD}", flush=True)
    flags = ["--shape", args.shape, "--device", args.device, "--steps", str(args.steps)]
    for contender in CONTENDERS:
        command = [sys.executable, "-m", "benchmarks.gpu_peers", "--only", contender, *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [""]
            print(f"{contender}: not measured ({lines[-1]})", flush=True)
        else:
            print(done.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main(parse(Arguments, None, __doc__))
