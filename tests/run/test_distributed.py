"""Two gloo processes against one: the same update in all three stages; launchers, signals and machines."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from forked import free_port, group
from safetensors.torch import load_file
from stages import words, write_answers, write_pairs
from test_rl_training import PROMPTS, stored_rollout

from rlhf.artefacts.checkpoint import newest_complete
from rlhf.run.log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable,
}  # fmt: skip
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


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Stage script -> a data file of 60 rows, of which 57 train: groups of 8 leave one over."""
    folder = tmp_path_factory.mktemp("rows")
    return {
        "sft_training": write_answers(folder / "answers.jsonl"),
        "reward_modeling": write_pairs(folder / "pairs.jsonl"),
    }


def launch(*command, code=0):
    found = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=300, check=False
    )
    assert found.returncode == code, found.stdout + found.stderr
    return found.stdout + found.stderr


# ---- the same update ----
@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("sft_training", {"sample_max_new_tokens": 0}),
        ("reward_modeling", {"audit": False}),
        ("reward_modeling", {"audit": False, "share_prompt": True, "center_rewards_coefficient": 0.1}),
    ],
    ids=["sft", "reward", "reward, shared prompt"],
)
def test_two_processes_train_a_whole_epoch_as_one_with_twice_the_batch(tiny_base, rows, zygote, tmp_path, stage, more):
    # Three batches a step leave an incomplete step at the end of the epoch, whose last batch is incomplete as well.
    flags = {
        "model_name": tiny_base, "dataset_name": rows[stage], "num_train_epochs": 1, "lora_dropout": 0,
        "gradient_accumulation_steps": 3, "eval_steps": 2, "save_steps": 0, "learning_rate": 1e-2,
    } | more  # fmt: skip
    for processes in (1, 2):
        own = {"output_dir": tmp_path / str(processes), "per_device_train_batch_size": 8 // processes}
        code = zygote.run_script(
            stage, words(flags | own), tmp_path / f"{processes}.log", ranks=processes, port=free_port()
        )
        assert code == 0, zygote.said()
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("1", "2"))
    assert any(tensor.abs().max() > 0 for name, tensor in one.items() if "lora_B" in name)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0)
    for ours, theirs in zip(read_metrics(tmp_path / "1"), read_metrics(tmp_path / "2"), strict=True):
        for name in ours.keys() & {"loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_margin"}:
            assert theirs[name] == pytest.approx(ours[name], abs=1e-4), (name, ours["step"])


# A target so small that both ranks have to leave after the first of three epochs, and to leave together.
STOPS = ["--ppo_epochs", "3", "--early_stopping", "True", "--target_kl", "1e-9"]


@pytest.mark.parametrize(
    ("order", "more"),
    [("by length", []), ("random", []), ("by length", STOPS), ("by length", ["--value_lora", "True"])],
    ids=["by length", "random", "early stopping", "own critic"],
)
def test_two_processes_with_half_the_rows_each_make_the_update_of_one(world, zygote, tmp_path, order, more):
    rollout = {name: tensor for name, tensor in vars(stored_rollout(None)).items() if tensor is not None}
    outputs = []
    # One window holds the whole batch either way: 8 rows of one process, or 4 of each of two.
    for processes, rows in ((1, 8), (2, 4)):
        flags = [*world, *FLAGS, "--batch_size", str(rows), "--mini_batch_size", "2",
                 "--gradient_accumulation_steps", str(rows // 2), *more]  # fmt: skip
        inputs, output = tmp_path / f"inputs_{processes}.pt", tmp_path / f"output_{processes}.pt"
        torch.save({"rollout": rollout, "flags": flags, "order": order}, inputs)
        files = [str(inputs), str(output)]
        code = zygote.run_script(
            "update_worker", files, tmp_path / f"{processes}.log", ranks=processes, port=free_port()
        )
        assert code == 0, zygote.said()
        outputs.append(torch.load(output, weights_only=True))
    one, two = outputs
    assert one["metrics"]["epochs"] == 1
    for name, parameter in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], parameter, atol=1e-5, rtol=0)
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, abs=1e-4), name


def test_answers_of_very_different_length_on_the_processes_keep_them_in_step(world, zygote, tmp_path):
    flags = {
        "output_dir": tmp_path / "out", "steps": 16, "batch_size": 4, "mini_batch_size": 1, "ppo_epochs": 2,
        "gradient_accumulation_steps": 3, "output_max_length": 24, "early_stopping": True, "eval_freq": 1,
        "eval_size": 4, "reward_transform": "standardize", "on_collapse": "off",
    }  # fmt: skip
    argv = [*world, *words(flags)]
    assert zygote.run_script("uneven_lengths", argv, tmp_path / "log", **group(2)) == 0, zygote.said()
    metrics = read_metrics(tmp_path / "out")
    assert len(metrics) == 2
    for record in metrics:
        assert record["len/min"] == 1
        # Four answers of one token, four that end at the maximum but by chance.
        assert record["len/mean"] > 8


# ---- DeepSpeed ----
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed (requirements-optional.txt)"
)


@needs_deepspeed
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
@pytest.mark.parametrize("stage", ["sft_training", "reward_modeling"])
def test_deepspeed_trains_and_resumes_to_what_two_plain_processes_train(
    tiny_base, rows, tmp_path, monkeypatch, stage, zero
):
    monkeypatch.setitem(ENVIRONMENT, "DS_ACCELERATOR", "cpu")
    found = {}
    for name in ("plain", zero):
        flags = {
            "model_name": tiny_base, "dataset_name": rows[stage], "max_steps": 4, "lora_dropout": 0, "save_steps": 2,
            "per_device_train_batch_size": 4, "learning_rate": 1e-2, "output_dir": tmp_path / name,
        } | ({} if name == "plain" else {"deepspeed": ROOT / "scripts" / "deepspeed" / f"{zero}.json"})  # fmt: skip
        port = str(free_port())
        command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, f"{stage}.py"]
        launch(*command, *words(flags))
        found[name] = load_file(tmp_path / name / "adapter_model.safetensors")
        if name == zero:
            half = load_file(tmp_path / name / "checkpoint-2" / "adapter_model.safetensors")
            shutil.rmtree(tmp_path / name / "checkpoint-4")
            for file in ("adapter_model.safetensors", "run.json"):
                (tmp_path / name / file).unlink()
            launch(*command, *words(flags | {"resume_from_checkpoint": True}))
            found["resumed"] = load_file(tmp_path / name / "adapter_model.safetensors")
    assert half.keys() == found["plain"].keys() == found[zero].keys()
    for name, tensor in found["plain"].items():
        assert half[name].shape == tensor.shape
        torch.testing.assert_close(found[zero][name], tensor, atol=1e-5, rtol=0)
        torch.testing.assert_close(found["resumed"][name], found[zero][name], atol=1e-6, rtol=0)
    assert any((half[name] - tensor).abs().max() > 1e-4 for name, tensor in found["plain"].items())


@needs_deepspeed
@pytest.mark.parametrize(("zero", "mode", "code"), [("zero2", "stop", 1), ("zero2", "skip", 0), ("zero3", "skip", 0)])
def test_a_gradient_that_is_not_finite_is_seen_under_deepspeed(
    tiny_base, rows, tmp_path, monkeypatch, zero, mode, code
):
    monkeypatch.setitem(ENVIRONMENT, "DS_ACCELERATOR", "cpu")
    flags = {
        "model_name": tiny_base, "dataset_name": rows["sft_training"], "max_steps": 3, "on_non_finite": mode,
        "per_device_train_batch_size": 4, "learning_rate": 1e30, "output_dir": tmp_path / "out", "eval_size": 0,
        "deepspeed": ROOT / "scripts" / "deepspeed" / f"{zero}.json",
    }  # fmt: skip
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    said = launch(*command, "sft_training.py", *words(flags), code=code)
    assert f"the gradient of step 2 is not finite{': left out' if mode == 'skip' else '; training stops'}" in said
    adapter = tmp_path / "out" / "adapter_model.safetensors"
    assert adapter.exists() == (mode == "skip")
    assert mode == "stop" or all(tensor.isfinite().all() for tensor in load_file(adapter).values())


# ---- launchers ----
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
    said = process.communicate(timeout=240)[0]
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


# ---- machines ----
def start_node(rank: int, port: int, *words: str) -> subprocess.Popen:
    """scripts/multi_node.sh as it is started on one of two machines, here both this one."""
    place = {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NPROC": "1"}
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "multi_node.sh"), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=ENVIRONMENT | place, cwd="/",
    )  # fmt: skip


def test_two_launchers_find_each_other_and_train_one_policy_into_one_directory(world, tmp_path):
    out, port = tmp_path / "out", free_port()
    flags = ["--output_dir", str(out), "--steps", "8", "--batch_size", "4", "--mini_batch_size", "2",
             "--output_max_length", "6", "--save_freq", "1"]  # fmt: skip
    nodes = [start_node(rank, port, "rl_training.py", *world, *flags) for rank in (0, 1)]
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "1 steps of 8 responses" in said[0]
    # What is written and said comes from the first machine alone.
    assert "step 1/1" in said[0] and "step 1/1" not in said[1]
    assert len(read_metrics(out)) == 1
    assert (out / "step_1" / "MANIFEST.json").is_file() and (out / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "place", "sentence"),
    [
        ([], {}, "give the stage"),
        (["nowhere.py"], {}, "no script nowhere.py"),
        (["rl_training.py"], {"NNODES": "2"}, "MASTER_ADDR"),
    ],
    ids=["no stage", "unknown stage", "no address"],
)
def test_a_machine_with_too_little_said_is_told_what_is_missing(words, place, sentence):
    command = ["bash", str(ROOT / "scripts" / "multi_node.sh"), *words]
    found = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | place, check=False, timeout=60)
    assert found.returncode == 2
    assert sentence in found.stderr
