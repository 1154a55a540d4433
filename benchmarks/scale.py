"""The table of docs/scale.md: bases from 7B to 405B on machines of several cards, on paper.

    python -m benchmarks.scale

PPO with the flags of scripts/train_70b.sh. For each base and machine the fewest cards that share a copy of the base;
GiB at the peak of a card; responses an hour of all cards: the time of the arithmetic (rlhf/cost/hours.py), and on top
the time that the bytes take over the links (rlhf/cost/shards.py). Nothing is overlapped, so that a real run may be
faster; nothing of it was measured on these machines.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import rl_training
from rlhf.cost.cuts import Cuts
from rlhf.cost.hours import assumed_lengths, row_seconds
from rlhf.cost.limits import Card
from rlhf.cost.memory import GIB
from rlhf.cost.needs import memory_of
from rlhf.cost.shards import link_of, spared_seconds, step_bytes
from rlhf.cost.skeleton import Base

ROOT = Path(__file__).resolve().parents[1]
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "num_key_value_heads": 8}
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064, "num_key_value_heads": 8}
# Name -> its configuration, as the hub has it.
BASES = {
    "Llama-2 7B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"vocab_size": 32000, "num_key_value_heads": 32},
    "Qwen2.5 14B": QWEN
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40},
    "Qwen2.5 32B": QWEN
    | {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40},
    "Llama-3.3 70B": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "Llama-3.1 405B": LLAMA
    | {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
# Cards of a machine, and the memory of one in GB.
MACHINES = {"RTX 4090": (8, 24), "A100": (8, 80), "H100": (8, 80), "H200": (8, 141)}
FLAGS = [
    "--reward_model_lora_path", "no", "--lora_target_models", "all-linear", "--lora_rank", "16", "--batch_size", "32",
    "--mini_batch_size", "8", "--gradient_accumulation_steps", "1", "--ppo_epochs", "2", "--max_prompt_length", "512",
    "--output_max_length", "256", "--gradient_checkpointing", "True",
]  # fmt: skip


def row(name: str, base: Base, card: str, args) -> str:
    """One line of the table."""
    cards, memory = MACHINES[card]
    for count in [n for n in (0, 2, 4, 8) if n <= cards]:
        shared = replace(args, shard_base=str(count))
        needs = memory_of(shared, base, "ppo")
        if needs.peak() <= memory * 1e9:
            break
    else:
        return f"| {name} | {cards} x {card} | does not fit | {needs.peak() / GIB:.1f} | |"

    lengths = assumed_lengths(shared, "ppo")
    known = Card.of(card, None, None)
    seconds = row_seconds(shared, base, "ppo", known, lengths) * shared.batch_size
    mode = "a copy each"
    if count:
        cuts = Cuts.of(base.model, count)
        moved = sum(step_bytes(shared, base, "ppo", cuts, cards, lengths).values())
        seconds = seconds - spared_seconds(shared, base, known, cuts, lengths) + moved / link_of(shared, known)
        mode = f"{count} share a copy"
    rate = cards * shared.batch_size * 3600 / seconds
    return f"| {name} | {cards} x {card} | {mode} | {needs.peak() / GIB:.1f} | {rate:,.0f} |"


def table() -> str:
    """The table as Markdown."""
    lines = ["| base | cards | mode | GiB a card | responses an hour |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, config) in enumerate(BASES.items()):
            base_dir = Path(folder) / str(number)
            base_dir.mkdir()
            (base_dir / "config.json").write_text(json.dumps(config), encoding="utf-8")
            base = Base.of(str(base_dir), "--base_model_name")
            args = rl_training.parse_args(["--base_model_name", str(base_dir), *FLAGS])
            lines += [row(name, base, card, args) for card in MACHINES]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
