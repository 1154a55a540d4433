"""DeepSpeed on two processes, where it is installed: the adapter of two plain processes, and Inf or NaN seen."""

import re
import shutil
from importlib.util import find_spec

import pytest
import torch
from forked import free_port
from launched import ENVIRONMENT, ROOT, launch, make_rows
from safetensors.torch import load_file
from stages import words

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("deepspeed") is None, reason="deepspeed is not installed (requirements-optional.txt)"
    ),
]


def two_processes(script: str) -> list[str]:
    """Words of a python command that starts a script twice, as one group."""
    return ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), script]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
@pytest.mark.parametrize("stage", ["sft_training", "reward_modeling"])
def test_deepspeed_trains_and_resumes_to_what_two_plain_processes_train(
    tiny_base, rows, tmp_path, monkeypatch, stage, zero
):
    monkeypatch.setitem(ENVIRONMENT, "DS_ACCELERATOR", "cpu")
    plain = tmp_path / "plain"
    out = tmp_path / zero
    flags = {
        "model_name": tiny_base, "dataset_name": rows[stage], "max_steps": 4, "lora_dropout": 0, "save_steps": 2,
        "per_device_train_batch_size": 4, "learning_rate": 1e-2,
    }  # fmt: skip
    own = {"output_dir": out, "deepspeed": ROOT / "scripts" / "deepspeed" / f"{zero}.json"}
    launch(*two_processes(f"{stage}.py"), *words(flags | {"output_dir": plain}))
    launch(*two_processes(f"{stage}.py"), *words(flags | own))
    wanted = load_file(plain / "adapter_model.safetensors")
    trained = load_file(out / "adapter_model.safetensors")

    # Back to the checkpoint of step 2, as after a kill.
    half = load_file(out / "checkpoint-2" / "adapter_model.safetensors")
    shutil.rmtree(out / "checkpoint-4")
    for file in ("adapter_model.safetensors", "run.json"):
        (out / file).unlink()
    launch(*two_processes(f"{stage}.py"), *words(flags | own | {"resume_from_checkpoint": True}))
    resumed = load_file(out / "adapter_model.safetensors")

    # A checkpoint holds whole tensors, also where every process trained a part of them.
    assert half.keys() == wanted.keys() == trained.keys()
    for name, tensor in wanted.items():
        assert half[name].shape == tensor.shape
        torch.testing.assert_close(trained[name], tensor, atol=1e-5, rtol=0)
        torch.testing.assert_close(resumed[name], trained[name], atol=1e-6, rtol=0)
    assert any((half[name] - tensor).abs().max() > 1e-4 for name, tensor in wanted.items())


@pytest.mark.parametrize(("zero", "mode", "code"), [("zero2", "stop", 1), ("zero2", "skip", 0), ("zero3", "skip", 0)])
def test_a_gradient_that_is_not_finite_is_seen_under_deepspeed(
    tiny_base, rows, tmp_path, monkeypatch, zero, mode, code
):
    monkeypatch.setitem(ENVIRONMENT, "DS_ACCELERATOR", "cpu")
    flags = {
        "model_name": tiny_base, "dataset_name": rows["sft_training"], "max_steps": 6, "on_non_finite": mode,
        # Each step multiplies the weights by some billions.
        "per_device_train_batch_size": 4, "learning_rate": 1, "weight_decay": 2e9, "eval_size": 0,
        "output_dir": tmp_path / "out", "deepspeed": ROOT / "scripts" / "deepspeed" / f"{zero}.json",
    }  # fmt: skip
    said = launch(*two_processes("sft_training.py"), *words(flags), code=code)

    # Left out, or the end of training without an adapter.
    end = ": left out" if mode == "skip" else "; training stops"
    assert re.search(rf"the gradient of step \d is not finite{end}", said)
    adapter = tmp_path / "out" / "adapter_model.safetensors"
    assert adapter.exists() == (mode == "skip")
    assert mode == "stop" or all(tensor.isfinite().all() for tensor in load_file(adapter).values())
