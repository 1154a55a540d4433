"""TRL 1.12.0, trl.experimental.ppo: the last PPO trainer of TRL, driven with PEFT as its documentation shows.

Three copies do the work of four models: the merged SFT model with a fresh LoRA adapter is the policy, without it the
reference; the reward model and the value model (which starts as the reward model and is trained whole) are two more,
with the reward adapter merged. That is its own design: `peft_config` is for the policy alone.

rollout: its generation, all 16 prompts in one batch. score: reference log-probabilities, values, rewards, advantages,
16 rows at once. update: from the first forward pass with gradients to the end of the step. total: from one step's end
to the next.
"""

import time
from functools import partial

import torch
import transformers
import trl
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.peers.worker import Movement, read_workload, report, say, wait_for_turn


class PhaseClock(TrainerCallback):
    """Times the phases from outside: the trainer's module functions are called through it, nothing else changes."""

    def __init__(self, eos: int):
        self.eos = eos
        self.marks = {}
        # The trainer looks these two up in its module at every call.
        self.generation = ppo_trainer.batch_generation
        self.forward = ppo_trainer.forward
        ppo_trainer.batch_generation = self.timed_generation
        ppo_trainer.forward = self.marked_forward

    def timed_generation(self, model, queries, *rest):
        start = time.perf_counter()
        rows, logits = self.generation(model, queries, *rest)
        self.marks["generated"] = time.perf_counter()
        self.marks["rollout"] = self.marks["generated"] - start

        # A token counts up to the first EOS, that one included.
        ended = (rows[:, queries.shape[1] :] == self.eos).cumsum(1)
        self.marks["tokens"] = ((ended == 0).sum() + (ended.max(1).values > 0).sum()).item()
        return rows, logits

    def marked_forward(self, *inputs):
        # Scoring runs without gradients.
        if torch.is_grad_enabled():
            self.marks.setdefault("update", time.perf_counter())
        return self.forward(*inputs)

    def on_train_begin(self, args, state, control, **kwargs):
        wait_for_turn()
        self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        marks = self.marks
        say(
            rollout=marks["rollout"], score=marks["update"] - marks["generated"], update=now - marks["update"],
            total=now - self.last, tokens=marks["tokens"],
        )  # fmt: skip
        # After the last step the report follows, for which there is no turn.
        if state.global_step < state.max_steps:
            wait_for_turn()
        self.last = time.perf_counter()
        self.marks = {}


def settings(workload: dict, folder) -> PPOConfig:
    """The workload in its own terms: a batch is per_device_train_batch_size x gradient_accumulation_steps rows."""
    return PPOConfig(
        output_dir=str(folder / "out"), per_device_train_batch_size=workload["mini_batch_size"],
        gradient_accumulation_steps=workload["accumulation"], num_mini_batches=1,
        num_ppo_epochs=workload["ppo_epochs"], total_episodes=workload["steps"] * workload["batch_size"],
        learning_rate=workload["learning_rate"], lr_scheduler_type="constant", num_sample_generations=0,
        local_rollout_forward_batch_size=workload["batch_size"], response_length=workload["max_new_tokens"],
        stop_token="eos", temperature=1.0, kl_coef=workload["kl_coef"],
        gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, seed=workload["seed"],
    )  # fmt: skip


def same_prompts(trainer: PPOTrainer, rows: Dataset, workload: dict) -> DataLoader:
    """A loader that gives the workload's prompts at every step, and holds one batch more than there are steps."""
    # At the last batch of a loader accelerate accumulates no gradients: every micro-batch would be an optimizer step.
    repeated = concatenate_datasets([rows] * (workload["steps"] + 1))
    loader = DataLoader(repeated, batch_size=workload["batch_size"], collate_fn=trainer.data_collator)
    return trainer.accelerator.prepare(loader)


def main() -> None:
    """Compute the steps in turn, report."""
    workload, folder = read_workload()
    transformers.logging.disable_progress_bar()

    # The tokenizer and the three models. The value model starts as a second copy of the reward model.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "sft_merged", padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(folder / "sft_merged", dtype=torch.float32)
    load_scorer = partial(
        AutoModelForSequenceClassification.from_pretrained,
        folder / "reward_merged",
        num_labels=1,
        dtype=torch.float32,
    )
    reward = load_scorer()
    value = load_scorer()
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=workload["lora_rank"], lora_alpha=workload["lora_alpha"], lora_dropout=0.0,
        target_modules=workload["lora_modules"],
    )  # fmt: skip

    # No reference model: with a PEFT config it is the policy without its adapter.
    clock = PhaseClock(workload["eos"])
    rows = Dataset.from_dict({"input_ids": workload["prompts"]})
    trainer = PPOTrainer(
        settings(workload, folder), tokenizer, policy, None, reward, rows, value, eval_dataset=rows, peft_config=lora,
        callbacks=[clock],
    )  # fmt: skip
    trainer.dataloader = same_prompts(trainer, rows, workload)

    # The clock speaks after every step, and waits there for the next turn.
    movement = Movement(p for p in trainer.policy_model.parameters() if p.requires_grad)
    trainer.train()
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    report(versions, movement.largest())


if __name__ == "__main__":
    main()
