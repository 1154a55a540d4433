"""The same three prompts answered by one version of the demo's model, so that one sees it change.

In:  <output_dir> with base/, data/compare.txt and the version's adapter. Out: three lines on the screen.

    python -m demo.show --output_dir runs/demo --version sft
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from demo.facts import KINDS
from rlhf.data.batches import collate_prompts
from rlhf.data.choose_format import text_format
from rlhf.data.encoding import load_tokenizer
from rlhf.flags import flag, parse
from rlhf.models.generation import Sampling, generate
from rlhf.models.loading import load_base
from rlhf.models.lora import add_lora
from rlhf.run.launch import run_script

# A question of fact, an explanation, and one where the tone counts.
SHOWN_KINDS = ("capital", "explain", "mood")


@dataclass(kw_only=True)
class Arguments:
    """Flags of demo/show.py."""

    output_dir: str = flag("runs/demo", help="directory of the demo's run")
    version: str = flag("base", help="base, sft, ppo or step_<n>")
    seed: int = flag(0, help="of the sampling")
    temperature: float = flag(0.7, help="of the sampling; PPO itself samples at 1")
    max_new_tokens: int = flag(64, help="response tokens at most")


def parse_args(argv: list[str] | None = None) -> Arguments:
    """The command line, checked."""
    return parse(Arguments, argv, __doc__)


def adapter_of(output_dir: Path, version: str) -> Path | None:
    """Directory of a version's adapter; None for the bare base."""
    if version == "base":
        return None
    return output_dir / version if version in ("sft", "ppo") else output_dir / "ppo" / version


def sample_answers(model, tokenizer, prompts: list[str], args) -> tuple[list[str], float]:
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


def shown_prompts(output_dir: Path) -> list[str]:
    """The three prompts: held out, one of each of SHOWN_KINDS."""
    # A prompt of each kind, in the order of KINDS.
    lines = (output_dir / "data" / "compare.txt").read_text(encoding="utf-8").splitlines()
    by_kind = dict(zip(KINDS, lines, strict=True))
    return [by_kind[kind] for kind in SHOWN_KINDS]


def print_answers(name: str, prompts: list[str], answers: list[str]) -> None:
    """A line a prompt."""
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"  {name:>7} | {prompt} -> {answer or '(empty)'}", flush=True)


def main(args: Arguments) -> None:
    """Load one version, let it answer, print."""
    output_dir = Path(args.output_dir)
    base_dir = str(output_dir / "base")
    model = load_base(base_dir, torch.float32)
    folder = adapter_of(output_dir, args.version)
    if folder is not None:
        model, _ = add_lora(model, folder, "version", trainable=False)
        model = model.get_base_model()

    model.eval()
    prompts = shown_prompts(output_dir)
    answers, _ = sample_answers(model, load_tokenizer(base_dir), prompts, args)
    print_answers(args.version, prompts, answers)


if __name__ == "__main__":
    run_script(main, parse_args)
