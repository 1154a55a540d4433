"""Classic TRL 0.7.11: PPOTrainer and AutoModelForCausalLMWithValueHead on the libraries of its time.

The leanest arrangement it offers. The merged SFT model with a fresh LoRA adapter is the policy and, through the value
head, the critic; with the adapter disabled it is the reference (what the trainer does by itself with PEFT). A second
copy of the base, the reward adapter merged, is the reward model, given the token ids as they are.

rollout: trainer.generate, all 16 prompts in one batch. score: rewards, 16 rows at once; then, inside trainer.step, the
log-probabilities and values of policy and reference (4 rows at once: its mini_batch_size), rewards and advantages.
update: its "time/ppo/optimize_step". total: all three and its statistics. batch_size 16, mini_batch_size 4 and
gradient_accumulation_steps 4 are one optimizer step an epoch.
"""

import time

import torch
import transformers
import trl
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

from benchmarks.peers.worker import Movement, read_workload, report, say, steps_in_turn


def make_trainer(workload: dict, folder, tokenizer) -> PPOTrainer:
    """The workload in its own terms."""
    # With the trainer's own default of an adaptive coefficient the KL penalty would differ from ours.
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=workload["lora_rank"], lora_alpha=workload["lora_alpha"], lora_dropout=0.0,
        target_modules=workload["lora_modules"],
    )  # fmt: skip
    config = PPOConfig(
        batch_size=workload["batch_size"], mini_batch_size=workload["mini_batch_size"],
        gradient_accumulation_steps=workload["accumulation"], ppo_epochs=workload["ppo_epochs"],
        learning_rate=workload["learning_rate"], init_kl_coef=workload["kl_coef"], adap_kl_ctrl=False,
        seed=workload["seed"], accelerator_kwargs={"cpu": True},
    )  # fmt: skip
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(folder / "sft_merged"), peft_config=lora)
    return PPOTrainer(config, model, None, tokenizer)


@torch.no_grad()
def reward_scores(model, queries: list[torch.Tensor], responses: list[torch.Tensor], pad: int) -> list[torch.Tensor]:
    """One score a row, all rows in one batch padded on the right."""
    # Its pipeline would decode the answers and encode them again.
    rows = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return list(model(input_ids=ids, attention_mask=mask).logits.squeeze(-1))


def one_step(trainer: PPOTrainer, reward_model, queries: list[torch.Tensor], workload: dict) -> dict:
    """Generate, score, step; seconds of each phase and the tokens sampled."""
    # Phases that its own loop leaves to the caller.
    start = time.perf_counter()
    responses = trainer.generate(
        queries, batch_size=workload["batch_size"], return_prompt=False, do_sample=True, top_k=0, top_p=1.0,
        max_new_tokens=workload["max_new_tokens"], pad_token_id=workload["pad"], eos_token_id=workload["eos"],
    )  # fmt: skip
    generated = time.perf_counter()
    scores = reward_scores(reward_model, queries, responses, workload["pad"])
    scored = time.perf_counter()

    # The first parts of its step are what our score phase does.
    stats = trainer.step(queries, responses, scores)
    parts = ("forward_pass", "compute_rewards", "compute_advantages")
    inside = sum(stats[f"time/ppo/{part}"] for part in parts)
    return {
        "rollout": generated - start,
        "score": scored - generated + float(inside),
        "update": float(stats["time/ppo/optimize_step"]),
        "total": time.perf_counter() - start,
        "tokens": sum(len(response) for response in responses),
    }


def main() -> None:
    """Compute the steps in turn, report."""
    workload, folder = read_workload()
    # From the file alone: the settings beside it were written by a much newer transformers than the one here.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "base/tokenizer.json"), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    trainer = make_trainer(workload, folder, tokenizer)
    reward_model = AutoModelForSequenceClassification.from_pretrained(folder / "reward_merged", num_labels=1).eval()
    movement = Movement(p for p in trainer.model.parameters() if p.requires_grad)
    queries = [torch.tensor(ids) for ids in workload["prompts"]]

    for _ in steps_in_turn(workload["steps"]):
        say(**one_step(trainer, reward_model, queries, workload))

    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    report(versions, movement.largest())


if __name__ == "__main__":
    main()
