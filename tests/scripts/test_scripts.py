"""The 7B shell scripts one after the other on the tiny model: base and data by environment, sizes by further flags."""

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from warm_python import WarmPython

from rlhf.artefacts.checkpoint import newest_complete

ROOT = Path(__file__).resolve().parents[2]
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
def warm():
    """A python that starts in a moment: the scripts start one about twenty times here, at several seconds each."""
    made = WarmPython()
    yield made
    made.close()


@pytest.fixture(scope="module")
def world(tiny_base, warm, tmp_path_factory):
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
    environment = {"BASE": tiny_base, "PYTHON": str(warm.python), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
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


def test_an_ensemble_is_trained_on_folds_by_one_card_after_another_or_side_by_side(world):
    folder, environment = world
    flags = [*SIZES[2:], "--max_steps", "1", "--audit", "False", "--save_steps", "0"]
    two = (folder, environment | {"MEMBERS": "2"})
    said = bash(two, "train_rm_ensemble.sh", *flags, DATA="pairs.jsonl", OUTPUT="in_turn")
    assert said.index("== reward model 1 of 2") < said.index("== reward model 2 of 2")
    beside = (folder, environment | {"MEMBERS": "2", "GPUS": "0 1"})
    bash(beside, "train_rm_ensemble.sh", *flags, DATA="pairs.jsonl", OUTPUT="beside")
    runs = {}
    for name, number in product(("in_turn", "beside"), (1, 2)):
        runs[name, number] = json.loads((folder / f"{name}_{number}" / "run.json").read_text(encoding="utf-8"))
        assert runs[name, number]["arguments"]["fold"] == f"{number}/2"
        weights = (folder / f"{name}_{number}" / "adapter_model.safetensors").read_bytes()
        assert weights == (folder / f"in_turn_{number}" / "adapter_model.safetensors").read_bytes()
    assert runs["in_turn", 1]["data"]["fingerprint"] != runs["in_turn", 2]["data"]["fingerprint"]

    # A model that fails does not take the others' time away, and the script says that something failed.
    (folder / "beside_2" / "run.json").unlink()
    shutil.rmtree(folder / "beside_1")
    (folder / "beside_1").write_text("in the way")
    bash(beside, "train_rm_ensemble.sh", *flags, code=1, DATA="pairs.jsonl", OUTPUT="beside")
    assert (folder / "beside_2" / "run.json").is_file()


def test_a_stage_that_fails_stops_the_script_with_one_sentence(world):
    folder, environment = world
    cold = (folder, environment | {"PYTHON": sys.executable})
    said = bash(cold, "train_ppo.sh", code=1, DATA="sft.jsonl", SFT_LORA="nowhere", REWARD_LORA="nowhere", OUTPUT="no")
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


def test_the_recipe_of_a_chat_model_plans_and_trains_both_stages_in_its_own_format(world, tiny_chat):
    folder, environment = world
    sizes = " ".join([*SIZES, "--max_length", "64"])
    ppo = "--steps 8 --batch_size 8 --output_max_length 6 --eval_size 4 --eval_freq 0 --reward_gate warn"
    more = {"BASE": tiny_chat, "RM_FLAGS": f"{sizes} --per_device_eval_batch_size 4", "PPO_FLAGS": ppo}
    environment = environment | more
    paths = {"DATA": "pairs.jsonl", "RUNS": "chat"}
    planned = bash((folder, environment), "train_chat.sh", "--plan", **paths)
    assert planned.count("fits a card of") == 2 and not (folder / "chat").exists()

    said = bash((folder, environment), "train_chat.sh", **paths)
    assert "the tokenizer's chat template" in said and "policy: a fresh adapter of rank 16 on the base" in said
    stored = json.loads((folder / "chat" / "ppo" / "run.json").read_text(encoding="utf-8"))["prompt_format"]
    assert stored["chat_template_kwargs"] == {"enable_thinking": False}


def stopped(environment, command: list[str], sign: str, signum: int, group: bool) -> tuple[int, str]:
    """Exit code and output of a script that gets a signal at the first line that starts with `sign`.

    Args:
        group: whether the whole process group gets it, as from a Ctrl-C, or the script alone, as from `kill`.
    """
    process = subprocess.Popen(
        ["bash", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True, cwd=ROOT,
        # A shell can trap no signal that it was started without, as everything behind a "&" is.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith(sign):
            (os.killpg if group else os.kill)(process.pid, signum)
            break
    said.append(process.communicate(timeout=60)[0])
    return process.returncode, "".join(said)


@pytest.mark.parametrize(
    ("signum", "group"), [(signal.SIGTERM, False), (signal.SIGINT, True)], ids=["kill of the script", "Ctrl-C"]
)
def test_an_interrupted_pipeline_ends_in_order_and_goes_on_where_it_stopped(world, tmp_path, signum, group):
    folder, environment = world
    sizes = " ".join([*SIZES[2:], "--lr_scheduler_type constant --logging_steps 1 --max_steps"])
    environment = environment | {
        "RUNS": str(tmp_path), "SFT_DATA": str(folder / "sft.jsonl"), "SFT_FLAGS": f"{sizes} 100000",
        "RM_DATA": str(folder / "missing.jsonl"),
    }  # fmt: skip
    command = [str(ROOT / "scripts" / "train_all.sh")]
    code, said = stopped(environment, command, "step 3/", signum, group)
    assert code == 128 + signum, said
    assert f"stopped by {signal.Signals(signum).name}; saved in" in said
    assert "== train_rm.sh" not in said and "Traceback" not in said
    saved = newest_complete(tmp_path / "sft", "checkpoint-")
    assert saved is not None and not (tmp_path / "sft" / "adapter_model.safetensors").exists()
    steps = int(saved.name.removeprefix("checkpoint-")) + 1
    again = subprocess.run(
        ["bash", *command], env=environment | {"SFT_FLAGS": f"{sizes} {steps}"}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert f"going on from {saved}" in again.stdout, again.stdout + again.stderr
    assert (tmp_path / "sft" / "run.json").is_file()
    # The next stage's turn has come.
    assert again.returncode == 1 and "missing.jsonl" in again.stderr


def test_an_interrupted_demo_starts_no_further_stage(tmp_path):
    command = ["scripts/run_demo.sh", "--smoke", "True", "--output_dir", str(tmp_path)]
    code, said = stopped(
        os.environ | {"OMP_NUM_THREADS": "1"}, command, "$ python -m demo.build", signal.SIGTERM, False
    )
    # Between the printed line and the stage's start the signal ends the script itself: a shell says 143 of both.
    assert code in (128 + signal.SIGTERM, -signal.SIGTERM), said
    assert "[1/7]" in said and "[2/7]" not in said
