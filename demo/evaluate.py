"""Gold scores of the base, the SFT model and every PPO checkpoint, on prompts no stage trained on.

In:  <output_dir> with base/, data/heldout.jsonl, sft/, ppo/ and ppo/step_<n>/.
Out: <output_dir>/evaluation.json: each version's figures, answers and their gold scores; PPO's win rate over SFT.

One sample a prompt, at temperature 0.7 as one would serve a model, with the suppression of empty answers off.

    python -m demo.evaluate --output_dir runs/demo --seed 0
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from demo.gold import content_correct, gold_score, liveliness
from demo.show import print_answers, sample_answers, shown_prompts
from rlhf.artefacts.checkpoint import numbered
from rlhf.artefacts.files import ADAPTER_FILE
from rlhf.data.encoding import load_tokenizer
from rlhf.flags import flag, parse
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
    follow: bool = flag(False, help="wait for the checkpoints of a PPO run that trains beside this")


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


# ---- versions ----
def versions_so_far(output_dir: Path) -> dict[str, Path | None]:
    """Name -> adapter directory (None for the bare base), in the order of training, of what is finished by now."""
    versions: dict[str, Path | None] = {"base": None, "sft": output_dir / "sft"}
    # A checkpoint gets its name when it is complete.
    versions |= {folder.name: folder for folder in numbered(output_dir / "ppo", "step_")}
    # The last file of a finished run.
    if (output_dir / "ppo" / "run.json").is_file():
        versions["ppo"] = output_dir / "ppo"
    return versions


def each_version(output_dir: Path, follow: bool) -> Iterator[tuple[str, Path | None]]:
    """Every version once; with `follow`, those of a PPO run that is still training as soon as they are saved."""
    seen: set[str] = set()
    while "ppo" not in seen:
        versions = versions_so_far(output_dir)
        new = [name for name in versions if name not in seen]
        for name in new:
            yield name, versions[name]
        seen |= set(new)
        if not new and not follow:
            raise ValueError(f"{output_dir}/ppo holds no finished run: run PPO first, or give --follow True")
        if not new:
            time.sleep(0.3)


class GoldJudge:
    """The gold judge of demo/gold.py with the model to answer it: scores any adapter on the held-out prompts."""

    def __init__(self, base_dir: str, prompts: list[str], args):
        self.args = args
        self.prompts = prompts
        self.model = load_base(base_dir, torch.float32).eval()
        self.tokenizer = load_tokenizer(base_dir)
        self.seen = 0

    def use(self, adapter: Path | None):
        """The model with this adapter alone; the base itself for None, as long as no adapter has been added."""
        if adapter is None:
            return self.model
        self.seen += 1
        # All adapters stay on the one base: a name of its own for each.
        name = f"version_{self.seen}"
        self.model, _ = add_lora(self.model, adapter, name, trainable=False)
        self.model.base_model.set_adapter(name, inference_mode=True)
        self.model.eval()
        return self.model.get_base_model()

    def answers(self, model, prompts: list[str]) -> tuple[list[str], float]:
        """One answer to each prompt, and their mean length in tokens."""
        return sample_answers(model, self.tokenizer, prompts, self.args)

    def figures(self, model) -> dict:
        """Figures of the answers to the held-out prompts, their mean length in tokens among them."""
        answers, tokens = self.answers(model, self.prompts)
        return {**gold_figures(self.prompts, answers), "tokens": tokens}


def main(args: Arguments) -> None:
    """Let every version answer, ask the gold judge, compare PPO with SFT, write."""
    output_dir = Path(args.output_dir)
    rows = read_lines(output_dir / "data" / "heldout.jsonl")
    prompts = [row["prompt"] for row in rows][: args.prompts]
    if not prompts:
        raise ValueError(f"{output_dir}/data/heldout.jsonl holds no prompt: run demo.build first")

    # The same three prompts every time, so that one sees the answers change.
    shown = shown_prompts(output_dir)
    gold_judge = GoldJudge(str(output_dir / "base"), prompts, args)
    versions: dict[str, dict] = {}
    for name, folder in each_version(output_dir, args.follow):
        # The end of a run is often its last checkpoint once more.
        last = list(versions)[-1] if versions else None
        if name == "ppo" and last != "sft" and same_adapter(folder, folder / last):
            versions[name] = versions[last]
            continue
        model = gold_judge.use(folder)
        figures = gold_judge.figures(model)
        versions[name] = figures
        print(
            f"{name}: gold score {figures['gold']:.3f}, right {figures['correct']:.1%}, {figures['tokens']:.1f} tokens"
        )
        print_answers(name, shown, gold_judge.answers(model, shown)[0])

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


def same_adapter(one: Path, other: Path) -> bool:
    """Return True where two directories hold the same adapter, byte for byte."""
    return (one / ADAPTER_FILE).read_bytes() == (other / ADAPTER_FILE).read_bytes()


if __name__ == "__main__":
    run_script(main, parse_args)
