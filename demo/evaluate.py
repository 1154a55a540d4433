"""Gold scores of the base, the SFT model and every PPO checkpoint, on prompts no stage trained on.

In:  <output_dir> with base/, data/heldout.jsonl, sft/, ppo/ and ppo/step_<n>/.
Out: <output_dir>/evaluation.json: each version's figures, answers and their gold scores; PPO's win rate over SFT.

One sample a prompt, at temperature 0.7 as one would serve a model, with the suppression of empty answers off.

    python -m demo.evaluate --output_dir runs/demo --seed 0
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from demo.gold import content_correct, gold_score, liveliness
from rlhf.data.batches import collate_prompts
from rlhf.data.choose_format import text_format
from rlhf.data.encoding import load_tokenizer
from rlhf.flags import flag, parse
from rlhf.models.generation import Sampling, generate
from rlhf.models.loading import load_base
from rlhf.models.lora import add_lora
from rlhf.reward.statistics import wilson
from rlhf.run.launch import run_script
from rlhf.run.log import read_lines

# Standard normal quantile of a two-sided interval of 95 %.
Z_95 = 1.959964


@dataclass(kw_only=True)
class Arguments:
    """Flags of demo/evaluate.py."""

    output_dir: str = flag("runs/demo", help="directory of the demo's run")
    seed: int = flag(0, help="of the sampling")
    temperature: float = flag(0.7, help="of the sampling; PPO itself samples at 1")
    max_new_tokens: int = flag(64, help="response tokens at most")
    prompts: int = flag(400, help="held-out prompts at most")


def parse_args(argv: list[str] | None = None) -> Arguments:
    """The command line, checked."""
    return parse(Arguments, argv, __doc__)


# ---- figures ----
def gold_figures(prompts: list[str], answers: list[str]) -> dict:
    """Figures of some answers by the gold judge: means over the prompts, and the score of each answer."""
    # The gold judge needs the prompt: it holds the fact that is asked for.
    both = list(zip(prompts, answers, strict=True))
    scores = [gold_score(prompt, answer) for prompt, answer in both]
    correct = [content_correct(prompt, answer) for prompt, answer in both]
    return {
        "gold": mean(scores),
        "correct": mean(correct),
        "lively": mean([liveliness(answer) for answer in answers]),
        "empty_frac": mean([not answer.strip() for answer in answers]),
        "characters": mean([len(answer) for answer in answers]),
        "answers": answers,
        "scores": scores,
    }


def mean(values: list) -> float:
    """Arithmetic mean of numbers or truth values."""
    return sum(values) / len(values)


def win_rate(ours: list[float], theirs: list[float]) -> float:
    """Share of prompts on which `ours` scores higher; a tie is half a win."""
    both = zip(ours, theirs, strict=True)
    return mean([0.5 if a == b else float(a > b) for a, b in both])


# ---- answers ----
def find_versions(output_dir: Path) -> dict[str, Path]:
    """Name -> adapter directory of the SFT model and the PPO checkpoints, in the order of training."""
    ppo = output_dir / "ppo"
    # By number: as text, step_10 would come before step_5.
    steps = sorted(int(folder.name.removeprefix("step_")) for folder in ppo.glob("step_*"))
    versions = {"sft": output_dir / "sft"}
    versions |= {f"step_{step}": ppo / f"step_{step}" for step in steps}
    return versions | {"ppo": ppo}


def sample_answers(model, tokenizer, prompts: list[str], args: Arguments) -> tuple[list[str], float]:
    """One answer of `model` to each prompt, and their mean length in tokens; the same noise for every version."""
    prompt_format = text_format(tokenizer)
    queries = [prompt_format.query_ids([("user", prompt)]) for prompt in prompts]
    batch = collate_prompts(queries, prompt_format.pad_id)

    # An empty answer has to show in the figures, so it is not suppressed as in training.
    sampling = Sampling(
        prompt_format.stop_ids,
        prompt_format.pad_id,
        args.max_new_tokens,
        temperature=args.temperature,
        suppress_empty=False,
    )
    # Only PPO asks for values.
    rollout = generate(
        model,
        lambda hidden: hidden.new_zeros(len(hidden)),
        batch["input_ids"],
        batch["attention_mask"],
        sampling,
        torch.Generator().manual_seed(args.seed),
    )

    rows = zip(rollout.response_ids, rollout.mask, strict=True)
    answers = [tokenizer.decode(ids[mask], skip_special_tokens=True).strip() for ids, mask in rows]
    return answers, rollout.lengths().float().mean().item()


def main(args: Arguments) -> None:
    """Let every version answer, ask the gold judge, compare PPO with SFT, write."""
    output_dir = Path(args.output_dir)
    base_dir = str(output_dir / "base")
    tokenizer = load_tokenizer(base_dir)
    model = load_base(base_dir, torch.float32)
    rows = read_lines(output_dir / "data" / "heldout.jsonl")
    prompts = [row["prompt"] for row in rows][: args.prompts]
    if not prompts:
        raise ValueError(f"{output_dir}/data/heldout.jsonl holds no prompt: run demo.build first")

    # The base alone comes first; then one base carries the adapter of each version in turn.
    model.eval()
    versions = {}
    for name, folder in {"base": None, **find_versions(output_dir)}.items():
        answering = model
        if folder is not None:
            model, _ = add_lora(model, folder, name, trainable=False)
            model.base_model.set_adapter(name, inference_mode=True)
            model.eval()
            answering = model.get_base_model()

        answers, tokens = sample_answers(answering, tokenizer, prompts, args)
        figures = {**gold_figures(prompts, answers), "tokens": tokens}
        versions[name] = figures
        shown = {key: round(value, 3) for key, value in figures.items() if isinstance(value, float)}
        print(f"{name}: {shown}", flush=True)

    # A tie is half a win, so this is no plain share of wins; the interval of one is close enough.
    rate = win_rate(versions["ppo"]["scores"], versions["sft"]["scores"])
    low, high = wilson(rate, len(prompts), Z_95)
    result = {
        "prompts": prompts,
        "versions": versions,
        "win_rate": rate,
        "win_rate_low": low,
        "win_rate_high": high,
    }
    text = json.dumps(result, ensure_ascii=False, indent=1)
    (output_dir / "evaluation.json").write_text(text, encoding="utf-8")
    print(f"PPO against SFT: wins {rate:.3f} ({low:.3f} to {high:.3f}) of {len(prompts)} held-out prompts")


if __name__ == "__main__":
    run_script(main, parse_args)
