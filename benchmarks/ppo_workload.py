"""The workload of benchmarks/ppo_step.py on disk: models, adapters and prompts that all contenders read."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.common import random_ids
from benchmarks.model import BOS, EOS, PAD, VOCABULARY, causal_model, tokenizer
from rlhf.artefacts.adapters import save_adapter
from rlhf.artefacts.fingerprints import base_fingerprint
from rlhf.artefacts.run_json import write_run
from rlhf.data.choose_format import text_format

PROMPTS = 16
# Longest answer, and the chance of EOS at each token: 0 makes every answer that long, the others a quarter of it in
# the mean. With the long ones decoding is most of the work, and bound by the reading of weights for everyone.
WORKLOADS = {"even": (64, 0.0), "variable": (64, 1 / 16), "long": (256, 1 / 64)}
# Each contender samples answers of its own: where they vary, it takes more steps for their lengths to be alike.
STEPS = {"even": 6, "variable": 11, "long": 6}
SETTINGS = {
    "batch_size": PROMPTS, "mini_batch_size": 4, "accumulation": 4, "ppo_epochs": 4, "learning_rate": 1e-6,
    "kl_coef": 0.05, "seed": 0, "pad": PAD, "eos": EOS, "lora_rank": 8, "lora_alpha": 32,
    "lora_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}  # fmt: skip


@dataclass
class Adapter:
    """Stands where run.json keeps the flags of the stage that trained an adapter."""

    seed: int = 0


def prompts() -> list[list[int]]:
    """Random tokens, 16 to 96 a prompt, 44 in the mean; the same ones at every step."""
    rng = random.Random(0)
    # Short prompts are more frequent than long ones, as in a real set.
    lengths = [round(16 + 80 * (number / (PROMPTS - 1)) ** 2) for number in range(PROMPTS)]
    rng.shuffle(lengths)
    return [random_ids(rng, length, VOCABULARY) for length in lengths]


@torch.no_grad()
def set_chance_of_eos(model: LlamaForCausalLM, chance: float) -> None:
    """Give the random weights an EOS probability that hardly depends on the text.

    Element 0 of the residual stream becomes a constant (all embeddings hold it, no layer writes to it), which only the
    EOS row of the output layer reads: a bias in the weights, so that all contenders sample under it without a setting.
    Pad and BOS, which some contenders would mistake for padding, get none of the probability.
    """
    # The constant, and no layer that changes it.
    model.model.embed_tokens.weight[:, 0] = 2.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0

    # What the other tokens add up to on random text: the chance is measured against it.
    ids = torch.randint(3, VOCABULARY, (8, 96), generator=torch.Generator().manual_seed(0))
    hidden = model.model(ids).last_hidden_state[:, 16:]
    head = model.lm_head.weight
    head[:, 0] = 0
    others = (hidden @ head[EOS + 1 :].T).logsumexp(-1).mean()
    wanted = others + math.log(chance / (1 - chance)) if chance else -50.0

    # The final norm scales the constant a little differently at each place: its mean has to do.
    constant = hidden[..., 0].mean()
    head[EOS] = 0
    head[EOS, 0] = wanted / constant
    head[[PAD, BOS], 0] = -50.0 / constant


def add_adapter(model, folder: Path, stage: str, base: dict):
    """Store an adapter of `stage` with small random weights, as after a little training; returns the merged model."""
    task = {"task_type": "CAUSAL_LM"}
    if stage == "reward":
        task = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    lora = LoraConfig(
        r=SETTINGS["lora_rank"], lora_alpha=SETTINGS["lora_alpha"], target_modules=SETTINGS["lora_modules"], **task
    )
    model = get_peft_model(model, lora)

    # A new adapter has zeros here, and does nothing.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)

    save_adapter(model, folder)
    record = text_format(tokenizer()).record()
    write_run(folder, stage=stage, args=Adapter(), base=base, tokenizer=tokenizer(), prompt_format=record)
    return model.merge_and_unload()


def write_workload(folder: Path, name: str, steps: int, seed: int, threads: int) -> dict:
    """Write everything into `folder`; returns what workload.json holds. `seed` is that of sampling.

    base/, sft/ and reward/ are what this project's stages leave. sft_merged/ (policy and reference of the peers) and
    reward_merged/ (their reward model, a sequence classification model) are the same functions in one piece.
    """
    torch.manual_seed(SETTINGS["seed"])
    max_new_tokens, chance = WORKLOADS[name]
    model = causal_model()
    set_chance_of_eos(model, chance)
    model.save_pretrained(folder / "base")
    # The peers load models in one piece, tokenizer included.
    for place in ("base", "sft_merged", "reward_merged"):
        tokenizer().save_pretrained(folder / place)

    # Each adapter alone for us, merged into its base for them.
    base = base_fingerprint(str(folder / "base"))
    merged = add_adapter(model, folder / "sft", "sft", base)
    merged.save_pretrained(folder / "sft_merged")
    scorer = LlamaForSequenceClassification.from_pretrained(folder / "base", num_labels=1, dtype=torch.float32)
    merged = add_adapter(scorer, folder / "reward", "reward", base)
    merged.save_pretrained(folder / "reward_merged")

    workload = SETTINGS | {
        "steps": steps, "seed": seed, "threads": threads, "max_new_tokens": max_new_tokens, "prompts": prompts()
    }  # fmt: skip
    (folder / "workload.json").write_text(json.dumps(workload), encoding="utf-8")
    return workload
