"""What only a GPU can show: bfloat16, NCCL, 4 bits and ZeRO there, and that the numbers are those of a CPU.

python -m pytest tests/test_gpu.py
"""

import warnings
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from adapters import random_adapter
from forked import free_port
from safetensors.torch import load_file
from stages import words, write_answers, write_pairs
from test_distributed import launch
from test_rl_training import stored_rollout
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import merge_lora
import reward_modeling
import rl_training
import sft_training
from rlhf.artefacts.run_json import load_run
from rlhf.models import kernels
from rlhf.models.forward import backbone_of, enable_packing, hidden_at, pack
from rlhf.models.fusing import fuse_norms
from rlhf.models.generation import Rollout, Sampling, generate
from rlhf.models.loading import load_base
from rlhf.rl.roles import load_roles, response_logprobs
from rlhf.rl.update import update
from rlhf.run.log import read_metrics

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_answers(folder / "answers.jsonl"), write_pairs(folder / "pairs.jsonl")


def train_all(base: str, data: tuple[str, str], folder: Path, **changed) -> tuple[Path, Path, Path]:
    """All three stages in this process; returns their directories."""
    sft, reward, ppo = (folder / name for name in ("sft", "reward", "ppo"))
    common = {"model_name": base, "max_steps": 6, "learning_rate": 1e-2, "save_steps": 3} | changed
    sft_training.main(sft_training.parse_args(words(common | {"dataset_name": data[0], "output_dir": sft})))
    reward_modeling.main(reward_modeling.parse_args(words(common | {"dataset_name": data[1], "output_dir": reward})))
    flags = {
        "base_model_name": base, "dataset_name": data[1], "output_dir": ppo, "sft_model_lora_path": sft,
        "reward_model_lora_path": reward, "steps": 24, "batch_size": 8, "output_max_length": 16, "save_freq": 1,
        "learning_rate": 1e-3,
    } | changed  # fmt: skip
    rl_training.main(rl_training.parse_args(words(flags)))
    return sft, reward, ppo


def finite(folder: Path) -> bool:
    """Return True if every number of a run's metrics is one."""
    rows = read_metrics(folder)
    values = [value for row in rows for value in row.values() if isinstance(value, float)]
    return bool(rows) and all(torch.tensor(values).isfinite())


def test_all_stages_train_in_bfloat16_and_what_they_leave_merges(tiny_base, data, tmp_path):
    sft, reward, ppo = train_all(tiny_base, data, tmp_path)
    assert all(finite(folder) for folder in (sft, reward, ppo))
    assert "audit/empty" in load_run(reward)["metrics"]
    # At the first pass the policy is the one that sampled: what the ratio says then is rounding.
    assert all(0.9 < row["ratio/mean"] < 1.1 for row in read_metrics(ppo))
    # Adapters train in float32 whatever the base is held in.
    for folder in (sft, reward, ppo):
        weights = load_file(folder / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    merged = tmp_path / "merged"
    merge_lora.main(
        merge_lora.parse_args(words({"lora_path": ppo, "output_dir": merged, "base_model_name": tiny_base}))
    )
    assert (merged / "model.safetensors").is_file()


def test_a_stopped_ppo_run_goes_on_as_if_it_had_not_been_stopped(tiny_base, tmp_path):
    sft, reward = random_adapter(tiny_base, tmp_path / "sft"), random_adapter(tiny_base, tmp_path / "rm", "reward", 1)
    pairs, found = write_pairs(tmp_path / "pairs.jsonl"), {}
    for name, steps in (("whole", [32]), ("halves", [16, 32])):
        for count in steps:
            flags = {
                "base_model_name": tiny_base, "dataset_name": pairs, "output_dir": tmp_path / name, "steps": count,
                "sft_model_lora_path": sft, "reward_model_lora_path": reward, "batch_size": 8, "save_freq": 1,
                "output_max_length": 16, "resume_from_checkpoint": True, "learning_rate": 1e-3,
                "lr_scheduler_type": "constant",
            }  # fmt: skip
            rl_training.main(rl_training.parse_args(words(flags)))
        found[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    for name, tensor in found["whole"].items():
        torch.testing.assert_close(found["halves"][name], tensor, atol=1e-4, rtol=0)


def on(device: str, rollout: Rollout) -> Rollout:
    """The same rollout on that device."""
    values = {field.name: getattr(rollout, field.name) for field in fields(rollout)}
    return Rollout(**{name: x.to(device) if torch.is_tensor(x) else x for name, x in values.items()})


def updated(base: str, folder: Path, device: str, dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    """Parameters and metrics after one update of a stored rollout."""
    sft, reward = random_adapter(base, folder / "sft"), random_adapter(base, folder / "rm", "reward", seed=1)
    roles = load_roles(base, sft, reward, dtype=dtype, device=device)
    rollout = on(device, stored_rollout(None))
    flags = {"base_model_name": base, "sft_model_lora_path": sft, "reward_model_lora_path": reward}
    args = rl_training.parse_args(words(flags | {"batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2}))
    optimizer = torch.optim.SGD(roles.trainable().values(), lr=0.1)
    sampling = Sampling(stop_ids=(2,), pad_token_id=0, max_new_tokens=8)
    found = update(
        roles, optimizer, rollout, sampling, args, Accelerator(cpu=device == "cpu"), torch.Generator().manual_seed(0)
    )
    return {name: p.detach().float().cpu() for name, p in roles.trainable().items()}, found


def test_an_update_on_a_gpu_is_that_of_a_cpu(tiny_base, tmp_path):
    from accelerate.state import AcceleratorState

    outcomes = []
    for device in ("cpu", "cuda"):
        AcceleratorState._reset_state(reset_partial_state=True)
        outcomes.append(updated(tiny_base, tmp_path / device, device))
    AcceleratorState._reset_state(reset_partial_state=True)
    (ours, metrics), (theirs, others) = outcomes
    for name, parameter in ours.items():
        torch.testing.assert_close(theirs[name], parameter, atol=1e-4, rtol=0)
    for name, value in metrics.items():
        assert others[name] == pytest.approx(value, abs=1e-3), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_on_a_gpu_hardly_depends_on_padding_and_batch(tiny_base, tmp_path, dtype):
    sft, reward = random_adapter(tiny_base, tmp_path / "sft"), random_adapter(tiny_base, tmp_path / "rm", "reward", 1)
    roles = load_roles(tiny_base, sft, reward, dtype=dtype, device="cuda")
    roles.train(False)
    torch.manual_seed(0)
    ids, mask = torch.randint(5, 500, (6, 40), device="cuda"), torch.ones(6, 40, dtype=torch.bool, device="cuda")
    for row, length in enumerate((40, 33, 20, 9, 3, 1)):
        mask[row, length:] = False
    with torch.no_grad():
        together = roles.scores(ids, mask)
        alone = torch.cat([roles.scores(ids[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(mask.sum(1))])
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, alone, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=0)


@pytest.mark.parametrize("base", ["tiny_base", "tiny_llama"])
def test_greedy_tokens_are_those_of_transformers(request, base):
    model = load_base(request.getfixturevalue(base), torch.float32, device="cuda").eval()
    assert enable_packing(backbone_of(model))
    ids = torch.randint(5, 400, (5, 12), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    mask = torch.ones_like(ids).bool()
    for row, padding in enumerate((0, 3, 11, 7, 5)):
        mask[row, :padding] = False
    sampling = Sampling(stop_ids=(2,), pad_token_id=0, max_new_tokens=40, min_new_tokens=40)
    ours = generate(model, None, ids, mask, sampling)
    theirs = model.generate(
        ids, attention_mask=mask, max_new_tokens=40, min_new_tokens=40, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    assert torch.equal(ours.response_ids, theirs[:, 12:])


@pytest.mark.parametrize("base", ["tiny_base", "tiny_llama"])
def test_kernels_of_half_precision_compute_rows_and_norms_as_they_are_alone(request, monkeypatch, base):
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(base), dtype=torch.bfloat16).cuda()
    backbone, calls, flash = backbone_of(model), [], kernels.flash_by_row
    monkeypatch.setattr(kernels, "flash_by_row", lambda *args: calls.append(1) or flash(*args))
    torch.manual_seed(0)
    lengths = torch.tensor([200, 131, 64, 7, 1], device="cuda")
    ids = torch.randint(3, 400, (5, 200), device="cuda")
    real = torch.arange(200, device="cuda") < lengths[:, None]
    found = []
    for fused in (False, True):
        if fused:
            assert fuse_norms(model) == 2 * model.config.num_hidden_layers + 1
            assert all(hasattr(module.forward, "fused") for module in model.modules() if type(module) is LlamaRMSNorm)
            assert enable_packing(backbone)
            calls.clear()
        model.zero_grad()
        states = hidden_at(backbone, pack(backbone, ids, real), *real.nonzero(as_tuple=True))
        # A direction at random: the mean square of normed states hardly varies, and its gradient is noise.
        direction = torch.randn(states.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
        (states.float() * direction).mean().backward()
        gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
        found.append([states.detach().float(), *gradients])
    assert len(calls) == model.config.num_hidden_layers
    for usual, one in zip(*found, strict=True):
        assert (one - usual).norm() <= 0.05 * usual.norm()


def test_a_group_of_nccl_trains(tiny_base, data, tmp_path):
    sft, reward = random_adapter(tiny_base, tmp_path / "sft"), random_adapter(tiny_base, tmp_path / "rm", "reward", 1)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "--master-port", str(free_port())]
    flags = {
        "base_model_name": tiny_base, "dataset_name": data[1], "output_dir": tmp_path / "ppo", "steps": 16,
        "sft_model_lora_path": sft, "reward_model_lora_path": reward, "batch_size": 8, "output_max_length": 16,
    }  # fmt: skip
    launch(*command, "rl_training.py", *words(flags))
    assert finite(tmp_path / "ppo")


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed (requirements-optional.txt)")
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_deepspeed_trains_on_a_gpu(tiny_base, data, tmp_path, zero):
    for stage, dataset in (("sft_training", data[0]), ("reward_modeling", data[1])):
        flags = {
            "model_name": tiny_base, "dataset_name": dataset, "max_steps": 4, "learning_rate": 1e-2, "save_steps": 2,
            "output_dir": tmp_path / stage, "deepspeed": ROOT / "scripts" / "deepspeed" / f"{zero}.json",
        }  # fmt: skip
        port = str(free_port())
        launch(
            "-m", "torch.distributed.run", "--nproc-per-node", "1", "--master-port", port, f"{stage}.py", *words(flags)
        )
        assert finite(tmp_path / stage)
        weights = load_file(tmp_path / stage / "adapter_model.safetensors")
        assert all(tensor.numel() and tensor.isfinite().all() for tensor in weights.values())


def test_a_backward_waits_for_the_gpu_only_to_learn_lengths(tiny_base, tmp_path):
    sft, reward = random_adapter(tiny_base, tmp_path / "sft"), random_adapter(tiny_base, tmp_path / "rm", "reward", 1)
    roles = load_roles(tiny_base, sft, reward, dtype=torch.bfloat16, device="cuda")
    rollout, sampling = on("cuda", stored_rollout(None)), Sampling(stop_ids=(2,), pad_token_id=0, max_new_tokens=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            response_logprobs(roles.model, rollout, sampling)[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    # None of them in a layer, where they would come once for each.
    assert len(waits) == len(set(waits)) <= 12, waits
