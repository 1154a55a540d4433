"""The end of a reward training in words."""

from rlhf.data.template import CHAT
from rlhf.endings import say_end


def say_finished(args, metrics: dict[str, float], pairs: int) -> None:
    """Say where the adapter is, how many of the `pairs` held-out pairs it has right, and how PPO starts."""
    right = metrics.get("eval_accuracy")
    quality = None if right is None else f"right on {right:.1%} of {pairs:,} held-out pairs"
    # A chat model needs no SFT before PPO.
    sft = None if args.prompt_template == CHAT else "runs/sft"
    more = {"base_model_name": args.model_name, "sft_model_lora_path": sft, "dataset_name": "prompts.jsonl"}
    made = f"reward adapter in {args.output_dir}"
    say_end(made, quality, args, "rl_training.py", reward_model_lora_path=args.output_dir, **more)
