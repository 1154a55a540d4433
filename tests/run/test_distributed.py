"""Two gloo processes against one: the same update in all three stages."""

import pytest
import torch
from forked import group
from launched import launch, make_rows, make_world
from safetensors.torch import load_file
from stages import words
from test_rl_training import PROMPTS, stored_rollout

from rlhf.run.log import read_metrics

# tests/test_gpu.py takes it from here.
__all__ = ["launch"]

FLAGS = ["--output_dir", "unused", "--learning_rate", "1e-2", "--output_max_length", "8", "--ppo_epochs", "1"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tiny_base, tmp_path_factory):
    return make_world(tiny_base, PROMPTS, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("rows"))


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
        log = tmp_path / f"{processes}.log"
        code = zygote.run_script(stage, words(flags | own), log, **group(processes))
        assert code == 0, zygote.said()

    # The weights, of which some have to have moved.
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("1", "2"))
    assert any(tensor.abs().max() > 0 for name, tensor in one.items() if "lora_B" in name)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0)

    # What is said on the way: means over both processes, not over the first.
    compared = {"loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_margin"}
    for alone, together in zip(read_metrics(tmp_path / "1"), read_metrics(tmp_path / "2"), strict=True):
        for name in alone.keys() & compared:
            assert together[name] == pytest.approx(alone[name], abs=1e-4), (name, alone["step"])


# A target so small that both ranks have to leave after the first of three epochs, and to leave together.
STOPS = ["--ppo_epochs", "3", "--early_stopping", "True", "--target_kl", "1e-9"]


@pytest.mark.parametrize(
    ("order", "more"),
    [("by length", []), ("random", []), ("by length", STOPS), ("by length", ["--value_lora", "True"])],
    ids=["by length", "random", "early stopping", "own critic"],
)
def test_two_processes_with_half_the_rows_each_make_the_update_of_one(world, zygote, tmp_path, order, more):
    tensors = vars(stored_rollout(None))
    rollout = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    outputs = []

    # One window holds the whole batch either way: 8 rows of one process, or 4 of each of two.
    for processes, rows in ((1, 8), (2, 4)):
        flags = [*world, *FLAGS, "--batch_size", str(rows), "--mini_batch_size", "2",
                 "--gradient_accumulation_steps", str(rows // 2), *more]  # fmt: skip
        inputs = tmp_path / f"inputs_{processes}.pt"
        output = tmp_path / f"output_{processes}.pt"
        torch.save({"rollout": rollout, "flags": flags, "order": order}, inputs)

        log = tmp_path / f"{processes}.log"
        code = zygote.run_script("update_worker", [str(inputs), str(output)], log, **group(processes))
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
    # A process that waits for one that has finished its step would wait for ever.
    argv = [*world, *words(flags)]
    assert zygote.run_script("uneven_lengths", argv, tmp_path / "log", **group(2)) == 0, zygote.said()

    metrics = read_metrics(tmp_path / "out")
    assert len(metrics) == 2
    for record in metrics:
        assert record["len/min"] == 1
        # Four answers of one token, four that end at the maximum but by chance.
        assert record["len/mean"] > 8
