"""Before the first step of a PPO run: what the policy starts from, its first evaluation, the checks and the gate."""

import warnings
from pathlib import Path

from rlhf.artefacts.output_dir import claim_output_dir
from rlhf.data import encoding, reading
from rlhf.data.cache import Prepared
from rlhf.data.funnel import subset
from rlhf.data.prompt_format import PromptFormat
from rlhf.data.rows import Rows
from rlhf.data.template import CHAT
from rlhf.models.untrained import warn_of_untrained
from rlhf.rl import evaluation
from rlhf.rl.check import check_start
from rlhf.rl.gate import quick_gate, stored_audit
from rlhf.rl.loop import PPOLoop
from rlhf.run.launch import say


def claim(args) -> list[Path]:
    """Claim the output directory; returns what an earlier run left, for `clear` once every input has been read."""
    names = ("sft_model_lora_path", "reward_model_lora_path", "judge_lora_path", "merged_sft_model_path")
    names += ("base_model_name", "dataset_name", "eval_dataset_name", "chat_template")
    inputs = {f"--{name}": getattr(args, name) for name in names}
    return claim_output_dir(args.output_dir, bool(args.resume_from_checkpoint), args.overwrite_output_dir, inputs)


def say_start(loop: PPOLoop) -> None:
    """Say what the policy starts from, and warn of a base that has never learnt to answer or to stop."""
    args = loop.args
    if args.sft_model_lora_path:
        say(f"policy: goes on from {args.sft_model_lora_path}")
    else:
        say(f"policy: a fresh adapter of rank {args.lora_rank} on the base, which is the reference")
        if args.prompt_template != CHAT:
            warnings.warn(
                "no SFT adapter and no chat template: a base that was never taught to answer learns little from a "
                "reward; train one with sft_training.py, or take a chat model",
                stacklevel=2,
            )
    warn_of_untrained(loop.roles.model, loop.prompt_format)


def measure_start(loop: PPOLoop, fresh: bool) -> None:
    """Measure the SFT model's scores and evaluate it (once), and refuse to start on a silent defect."""
    args = loop.args
    if args.reward_transform == "standardize" and not loop.reward_stats:
        if not fresh:
            raise ValueError("the checkpoint was made without --reward_transform standardize: go on as it began")
        loop.reward_stats = evaluation.measure_sft_scores(loop)

    if args.eval_freq and fresh:
        loop.baseline = evaluation.evaluate(loop)[0]
    if args.check:
        check_start(loop, fresh)
    if fresh and stored_audit(args.reward_model_lora_path) is None:
        quick_gate(loop)


def prepare(args, prompt_format: PromptFormat, bad_rows_file: Path | None) -> Prepared:
    """Read and encode the prompts; held-out ones only where --eval_freq asks for them."""
    held_out = Rows([])
    if args.eval_freq:
        rows, held_out, funnel = reading.load_splits(args, "prompt", args.seed, bad_rows_file)
    else:
        rows, funnel = reading.load_rows(
            args.dataset_name, "prompt", args.train_split, args=args, bad_rows_file=bad_rows_file
        )
    held_out = subset(held_out, args.eval_prompts, args.seed, funnel)

    prompts = encoding.prompt_rows(prompt_format, rows, args.max_prompt_length, funnel)
    eval_prompts = encoding.prompt_rows(prompt_format, held_out, args.max_prompt_length, funnel)
    return Prepared({"train": prompts, "evaluation": eval_prompts}, funnel, {})
