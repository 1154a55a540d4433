"""The shortest command line of each script, on one tiny base: a step of training, a merge, an answer."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from adapters import random_adapter
from stages import words, write_answers, write_pairs

STAGES = ("sft_training", "reward_modeling", "rl_training")
SCRIPTS = (*STAGES, "merge_lora", "compare")


@dataclass
class Inputs:
    """What the five command lines read."""

    base: str
    answers: str
    pairs: str
    sft: str
    reward: str


def make_inputs(base: str, folder: Path) -> Inputs:
    """Write rows and two adapters of `base` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return Inputs(
        base=base,
        answers=write_answers(folder / "answers.jsonl", 24),
        pairs=write_pairs(folder / "pairs.jsonl", 24),
        sft=random_adapter(base, folder / "sft"),
        reward=random_adapter(base, folder / "reward", "reward", seed=1),
    )


def short_run(script: str, inputs: Inputs) -> list[str]:
    """The command line of a script without its output directory."""
    step = {"max_steps": 1, "per_device_train_batch_size": 4, "eval_size": 4, "save_steps": 1, "eval_steps": 0}
    flags = {
        "sft_training": {
            "model_name": inputs.base, "dataset_name": inputs.answers, "sample_max_new_tokens": 4, **step,
        },
        "reward_modeling": {"model_name": inputs.base, "dataset_name": inputs.pairs, "audit": False, **step},
        "rl_training": {
            "base_model_name": inputs.base, "sft_model_lora_path": inputs.sft,
            "reward_model_lora_path": inputs.reward, "dataset_name": inputs.answers, "reward_gate": "warn",
            "steps": 4, "batch_size": 4, "mini_batch_size": 4, "ppo_epochs": 1, "output_max_length": 6, "eval_size": 4,
        },
        "merge_lora": {"base_model_name": inputs.base, "lora_path": inputs.sft},
        "compare": {
            "base_model_name": inputs.base, "adapters": f"sft={inputs.sft}",
            "reward_model_lora_path": inputs.reward, "prompts": "小猫喜欢什么？", "max_new_tokens": 4,
        },
    }  # fmt: skip
    return words(flags[script])


@pytest.fixture(scope="session")
def short_inputs(tiny_base, tmp_path_factory) -> Inputs:
    return make_inputs(tiny_base, tmp_path_factory.mktemp("short"))
