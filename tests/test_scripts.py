"""The 7B shell scripts one after the other on the tiny model: base and data by environment, sizes by further flags."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIZES = [
    "--max_steps",
    "2",
    "--eval_size",
    "4",
    "--per_device_train_batch_size",
    "4",
    "--gradient_accumulation_steps",
    "1",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tiny_base, tmp_path_factory):
    """A folder with data files, and the environment that points the scripts at it."""
    folder = tmp_path_factory.mktemp("world")
    pairs = list(product(("我", "小猫", "老师", "医生"), ("喜欢", "想要", "不喜欢"), ("苹果", "红茶")))
    rows = {
        "sft": [{"prompt": f"{a}{b}什么？", "answer": f"{a}{b}{c}。"} for a, b, c in pairs],
        "pairs": [{"prompt": f"{a}{b}什么？", "chosen": f"{a}{b}{c}！", "rejected": f"{c}"} for a, b, c in pairs],
    }
    for name, found in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    environment = {"BASE": tiny_base, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return folder, os.environ | environment


def bash(world, script, *flags, code=0, **variables):
    folder, environment = world
    found = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *flags],
        capture_output=True, text=True, cwd="/", timeout=300, check=False,
        env=environment | {name: str(folder / value) for name, value in variables.items()},
    )  # fmt: skip
    assert found.returncode == code, found.stdout + found.stderr
    return found.stdout + found.stderr


def test_the_scripts_of_the_four_stages_run_in_turn_and_again(world):
    folder, _ = world
    bash(world, "train_sft.sh", *SIZES, DATA="sft.jsonl", OUTPUT="sft")
    bash(world, "train_rm.sh", *SIZES, DATA="pairs.jsonl", OUTPUT="rm")
    bash(world, "merge_sft.sh", "--dtype", "float32", SFT_LORA="sft", OUTPUT="merged")
    ppo = ("train_ppo.sh", "--steps", "16", "--output_max_length", "6", "--save_freq", "1", "--reward_gate", "warn")
    paths = {"DATA": "pairs.jsonl", "SFT_LORA": "sft", "REWARD_LORA": "rm", "MERGED": "merged", "OUTPUT": "ppo"}
    said = bash(world, *ppo, **paths)
    assert "2 steps of 8 responses" in said
    for stage in ("sft", "rm", "ppo", "ppo/step_1"):
        for name in ("adapter_config.json", "adapter_model.safetensors", "run.json", "tokenizer.model"):
            assert (folder / stage / name).is_file(), f"{stage}/{name}"
    again = bash(world, "merge_sft.sh", SFT_LORA="sft", OUTPUT="merged")
    assert "is there already" in again


def test_a_stage_that_fails_stops_the_script_with_one_sentence(world):
    said = bash(
        world, "train_ppo.sh", code=1, DATA="sft.jsonl", SFT_LORA="nowhere", REWARD_LORA="nowhere", OUTPUT="no"
    )
    assert "nowhere is no adapter directory" in said
    assert "Traceback" not in said


def test_the_pipeline_stops_at_the_stage_that_fails_and_goes_on_there_when_given_again(world):
    sizes = " ".join(SIZES)
    paths = {"RUNS": "all", "SFT_DATA": "sft.jsonl", "RM_DATA": "missing.jsonl", "PPO_DATA": "pairs.jsonl"}
    folder, environment = world
    environment |= {
        "SFT_FLAGS": sizes, "RM_FLAGS": sizes, "MERGE_FLAGS": "--dtype float32",
        "PPO_FLAGS": "--steps 8 --output_max_length 6 --reward_gate warn",
    }  # fmt: skip
    said = bash((folder, environment), "train_all.sh", code=1, **paths)
    assert "missing.jsonl" in said and "== train_ppo.sh" not in said
    before = (folder / "all" / "sft" / "run.json").stat().st_mtime_ns
    said = bash((folder, environment), "train_all.sh", **paths | {"RM_DATA": "pairs.jsonl"})
    assert "is finished" in said
    assert (folder / "all" / "sft" / "run.json").stat().st_mtime_ns == before
    assert (folder / "all" / "ppo" / "run.json").is_file()
