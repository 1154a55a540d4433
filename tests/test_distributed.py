"""Two gloo processes against one, by torch's own launcher and by ours."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from test_rl_training import PROMPTS, stored_rollout

from rlhf.checkpoint import newest_complete
from rlhf.report import read_metrics

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
FLAGS = ["--output_dir", "unused", "--learning_rate", "1e-2", "--output_max_length", "8", "--ppo_epochs", "1"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS), encoding="utf-8")
    sft, reward = random_adapter(tiny_base, folder / "sft"), random_adapter(tiny_base, folder / "rm", "reward", seed=1)
    return ["--base_model_name", tiny_base, "--sft_model_lora_path", sft, "--reward_model_lora_path", reward,
            "--dataset_name", str(prompts)]  # fmt: skip


def launch(*command, code=0):
    found = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=300, check=False
    )
    assert found.returncode == code, found.stdout + found.stderr
    return found.stdout + found.stderr


# A target so small that both ranks have to leave after the first of three epochs, and to leave together.
STOPS = ["--ppo_epochs", "3", "--early_stopping", "True", "--target_kl", "1e-9"]


@pytest.mark.parametrize(
    ("order", "more"),
    [("by length", []), ("random", []), ("by length", STOPS), ("by length", ["--value_lora", "True"])],
    ids=["by length", "random", "early stopping", "own critic"],
)
def test_two_processes_with_half_the_rows_each_make_the_update_of_one(world, tmp_path, order, more):
    rollout = {name: tensor for name, tensor in vars(stored_rollout(None)).items() if tensor is not None}
    outputs = []
    # One window holds the whole batch either way: 8 rows of one process, or 4 of each of two.
    for processes, rows in ((1, 8), (2, 4)):
        flags = [*world, *FLAGS, "--batch_size", str(rows), "--mini_batch_size", "2",
                 "--gradient_accumulation_steps", str(rows // 2), *more]  # fmt: skip
        inputs, output = tmp_path / f"inputs_{processes}.pt", tmp_path / f"output_{processes}.pt"
        torch.save({"rollout": rollout, "flags": flags, "order": order}, inputs)
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        launch(*torchrun, "tests/update_worker.py", str(inputs), str(output))
        outputs.append(torch.load(output, weights_only=True))
    one, two = outputs
    assert one["metrics"]["epochs"] == 1
    for name, parameter in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], parameter, atol=1e-5, rtol=0)
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, abs=1e-4), name


def test_nproc_starts_the_processes_itself_and_counts_their_responses_together(world, tmp_path):
    out = tmp_path / "out"
    flags = ["--output_dir", str(out), "--nproc", "2", "--steps", "16", "--batch_size", "4", "--mini_batch_size", "2"]
    said = launch("rl_training.py", *world, *flags, "--output_max_length", "6", "--save_freq", "1")
    assert "starting 2 processes" in said
    assert "2 steps of 8 responses" in said
    assert len(read_metrics(out)) == 2
    assert (out / "adapter_model.safetensors").is_file()


def test_both_processes_stop_together_on_a_signal_to_their_launcher_and_go_on_later(world, tmp_path):
    out = tmp_path / "out"
    flags = [*world, "--output_dir", str(out), "--nproc", "2", "--batch_size", "4", "--mini_batch_size", "2",
             "--output_max_length", "6", "--resume_from_checkpoint", "True"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "rl_training.py", *flags, "--steps", "80000"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, cwd=ROOT,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, said
    saved = newest_complete(out)
    done = int(saved.name.removeprefix("step_"))
    assert done >= 2
    assert not (out / "adapter_model.safetensors").exists()
    launch("rl_training.py", *flags, "--steps", str(8 * (done + 1)))
    assert [row["step"] for row in read_metrics(out)] == list(range(1, done + 2))


def test_a_failing_worker_hands_on_its_exit_code_and_its_sentence(world, tmp_path):
    flags = ["--output_dir", str(tmp_path), "--nproc", "2", "--prompt_template", "x{prompt}"]
    said = launch("rl_training.py", *world, *flags, code=1)
    assert "another prompt_template" in said
