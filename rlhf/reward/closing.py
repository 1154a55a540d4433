"""The end of a reward training: its last evaluation, in metrics and in words."""

from rlhf.data.template import CHAT
from rlhf.endings import say_end
from rlhf.run.log import read_metrics


def last_metrics(args) -> dict[str, float]:
    """The last evaluation in metrics.jsonl; empty without evaluation pairs."""
    evaluations = [record for record in read_metrics(args.output_dir) if "eval_loss" in record]
    last = evaluations[-1] if evaluations else {}
    return {name: value for name, value in last.items() if name != "step"}


def say_finished(args, metrics: dict[str, float], pairs: int) -> None:
    """Say where the adapter is, how many of the `pairs` held-out pairs it has right, and how PPO starts."""
    right = metrics.get("eval_accuracy")
    quality = None if right is None else f"right on {right:.1%} of {pairs:,} held-out pairs"
    # A chat model needs no SFT before PPO.
    sft = None if args.prompt_template == CHAT else "runs/sft"
    more = {"base_model_name": args.model_name, "sft_model_lora_path": sft, "dataset_name": "prompts.jsonl"}
    made = f"reward adapter in {args.output_dir}"
    say_end(made, quality, args, "rl_training.py", reward_model_lora_path=args.output_dir, **more)
