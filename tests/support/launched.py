"""Stages started as commands of their own, by launchers and on several processes, and the files that they need."""

import json
import os
import subprocess
import sys
from pathlib import Path

from adapters import random_adapter
from stages import write_answers, write_pairs

ROOT = Path(__file__).resolve().parents[2]
# A caller's own path stays: the packages of a machine may be there.
_CALLERS_PATH = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *_CALLERS_PATH]),
    "HF_HUB_OFFLINE": "1",
    "PYTHON": sys.executable,
}


def launch(*command, code=0):
    """Output of `python <command>`. Raises: AssertionError with it where the exit code is another one than `code`."""
    finished = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=300, check=False
    )
    said = finished.stdout + finished.stderr
    assert finished.returncode == code, said
    return said


def make_world(base: str, prompts: list[str], folder: Path) -> list[str]:
    """Flags of rl_training.py that name a base, two adapters of it and prompts; all are written into `folder`."""
    file = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
    file.write_text("".join(lines), encoding="utf-8")

    sft = random_adapter(base, folder / "sft")
    reward = random_adapter(base, folder / "rm", "reward", seed=1)
    return ["--base_model_name", base, "--sft_model_lora_path", sft, "--reward_model_lora_path", reward,
            "--dataset_name", str(file)]  # fmt: skip


def make_rows(folder: Path) -> dict[str, str]:
    """Stage script -> a data file of 60 rows, of which 57 train: groups of 8 leave one over."""
    return {
        "sft_training": write_answers(folder / "answers.jsonl"),
        "reward_modeling": write_pairs(folder / "pairs.jsonl"),
    }
