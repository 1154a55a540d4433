"""--plan against computed and measured figures, operations against counted ones, flags of optional packages."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from conftest import BaichuanConfig, BaichuanForCausalLM, save_random_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from stages import words, write_answers, write_pairs
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import reward_modeling
import rl_training
import sft_training
from rlhf.cost import flops
from rlhf.cost import memory as plan
from rlhf.cost.memory import GIB, Precision
from rlhf.cost.skeleton import shape_of, skeleton
from rlhf.models.forward import forward
from rlhf.ppo import selective_logprobs
from rlhf.run.launch import check_deepspeed
from rlhf.run.log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
BF16, SFT_7B = Precision(2), {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "kv_heads": 32}
SEVEN_B = plan.ModelShape(**SFT_7B, head_dim=128, vocab=64000, parameters=7_000_559_616, linear=6_476_005_376)
# r = 8 on W_pack.
ADAPTER = 32 * 8 * (4096 + 3 * 4096)


def sizes(checkpointing, batch=8):
    return plan.PpoSizes(
        batch=batch, mini_batch=batch, forward_batch=32, query=256, response=256, rows_sampled=batch,
        checkpointing=checkpointing,
    )  # fmt: skip


# ---- memory ----
@pytest.mark.parametrize(
    ("bases", "checkpointing", "gib"), [(1, True, 19.1), (1, False, 35.6), (3, True, 45.2), (3, False, 61.7)]
)
def test_ppo_at_7b_needs_what_was_computed_by_hand(bases, checkpointing, gib):
    adapters = dict.fromkeys(("policy", "reference", "reward"), ADAPTER)
    needs = plan.ppo_needs(SEVEN_B, BF16, adapters, ADAPTER + 4097, sizes(checkpointing), bases)
    # By hand, all logits had a copy, a log-softmax and a gradient in float32: 2 + 3 * 4 bytes an entry.
    spared = (2 + 3 * 4) * 8 * 256 * 64000 - plan.logits_bytes(SEVEN_B, BF16, 8 * 256, gradient=True)
    assert needs.peak() / GIB == pytest.approx(gib - spared / GIB, abs=0.06)
    assert needs.fits()[40] == (gib < 37)


def test_logits_and_their_gradient_stay_in_half_precision_but_for_a_few_rows():
    few = 2 * 4 * 256 * 64000
    assert plan.logits_bytes(SEVEN_B, BF16, 8 * 256, gradient=True) == 4 * 8 * 256 * 64000 + few
    assert plan.logits_bytes(SEVEN_B, BF16, 10, gradient=False) == 2 * 10 * 64000 + 2 * 4 * 10 * 64000


def test_four_bits_hold_the_base_in_a_third():
    assert plan.weight_bytes(SEVEN_B, Precision(2, four_bit=True)) / GIB == pytest.approx(4.09, abs=0.02)


MIDDLE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8}
KINDS = {"baichuan": (BaichuanConfig, BaichuanForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


def middle_model(kind, **more):
    config, model = KINDS[kind]
    model = model(config(vocab_size=2000, **MIDDLE, **more))
    return get_peft_model(
        model, LoraConfig(r=8, target_modules=["W_pack"] if kind == "baichuan" else ["q_proj", "v_proj"])
    ).train()


def saved_bytes(model, checkpointing) -> int:
    """Distinct storages, weights aside, that one forward of PPO's update keeps for backward."""
    base = model.get_base_model()
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    weights, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(5, 1999, (4, 128))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, _ = forward(base, (slice(None), slice(63, 127)), ids)
        selective_logprobs(logits, ids[:, 64:])
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_planned_activations_are_those_that_a_forward_keeps(kind, dtype):
    model = middle_model(kind)
    model.get_base_model().to(dtype)
    shape, precision = shape_of(model.get_base_model()), Precision(torch.finfo(dtype).bits // 8)
    positions = 4 * 64
    # Backward has not begun: of the logits, they alone wait for it.
    logits = precision.size * positions * shape.vocab
    planned = plan.activation_bytes(shape, precision, 4 * 128, checkpointing=False) + logits
    assert planned == pytest.approx(saved_bytes(model, checkpointing=False), rel=0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_keeps_the_layers_inputs_alone(kind):
    model = middle_model(kind)
    shape, precision, tokens = shape_of(model.get_base_model()), Precision(4), 4 * 128
    kept = plan.activation_bytes(shape, precision, tokens, True) - plan.layer_bytes(shape, precision) * tokens
    logits = 4 * 4 * 64 * shape.vocab
    assert kept + logits == pytest.approx(saved_bytes(model, checkpointing=True), rel=0.25)


# ---- operations ----
@pytest.mark.parametrize("checkpointing", [False, True])
def test_counted_operations_are_those_torch_counts(checkpointing):
    # Eager attention, because torch's counter sees no fused one on a CPU; it computes both halves of the square.
    model = middle_model("llama", attn_implementation="eager")
    base = model.get_base_model()
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(5, 1999, (2, 64))
    work = flops.flop_counts(model, base.config)
    with FlopCounterMode(display=False) as counted:
        logits, _ = forward(base, (slice(None), slice(31, 63)), ids)
        forward_only = counted.get_total_flops()
        logits.sum().backward()
    upper_half = 2 * work.attention * 2 * 64 * 63
    # Half of the tokens need nothing of the last feed-forward part, which the count has whole.
    spared = 0 if checkpointing else 2 * 3 * base.config.hidden_size * base.config.intermediate_size * 64
    assert flops.forward_flops(work, [64, 64], 64) == pytest.approx(forward_only - upper_half + spared, rel=0.03)
    passes = 4 if checkpointing else 3
    planned = flops.training_flops(work, [64, 64], 64, checkpointing)
    # torch stops computing a layer again before its last matrix, whose output nothing needs.
    rel = 0.08 if checkpointing else 0.03
    assert planned == pytest.approx(counted.get_total_flops() - passes * upper_half + 2 * spared, rel=rel)


def test_a_ppo_step_is_its_passes_and_epochs():
    work = flops.FlopCounts(body=1000, head=100, trained=10, attention=0)
    found = flops.ppo_flops(work, [3, 2], [2, 1], passes=2, epochs=4, checkpointing=False)
    assert found == 3 * (2000 * 8 + 200 * 3) + 4 * (2 * (2000 * 8 + 200 * 3) + 4 * 10 * 8)


@pytest.mark.parametrize(
    ("card", "peak"),
    [("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H20", 148), ("NVIDIA H200", 989),
     ("NVIDIA A800-SXM4-80GB", 312), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA T4", None), ("", None)],
)  # fmt: skip
def test_utilisation_is_told_where_the_peak_is_known(card, peak):
    share = flops.mfu(4e14, 2.0, card, cards=2)
    assert share == (peak and pytest.approx(1e14 / (peak * 1e12)))


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_every_stage_says_its_utilisation_on_a_card_whose_peak_is_known(
    tiny_base, tmp_path, monkeypatch, capsys, stage
):
    monkeypatch.setattr("rlhf.trainer.log.this_card", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr("rlhf.rl.metrics.this_card", lambda: "NVIDIA A100-SXM4-80GB")
    flags, out = {"output_dir": tmp_path / "out"}, tmp_path / "out"
    if stage == "ppo":
        flags |= {
            "base_model_name": tiny_base, "dataset_name": write_pairs(tmp_path / "pairs.jsonl"), "steps": 8,
            "sft_model_lora_path": random_adapter(tiny_base, tmp_path / "sft"), "batch_size": 8,
            "reward_model_lora_path": random_adapter(tiny_base, tmp_path / "rm", "reward"), "output_max_length": 8,
        }  # fmt: skip
        rl_training.main(rl_training.parse_args(words(flags)))
    else:
        flags |= {"model_name": tiny_base, "max_steps": 1, "save_steps": 0}
        script, write = (sft_training, write_answers) if stage == "sft" else (reward_modeling, write_pairs)
        flags |= {"dataset_name": write(tmp_path / "rows.jsonl")} | ({} if stage == "sft" else {"audit": False})
        script.main(script.parse_args(words(flags)))
    record = next(row for row in read_metrics(out) if "tokens/s" in row)
    assert 0 < record["mfu"] < 0.01
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/1"))
    assert "MFU 0.0%" in line and ("samples/s" in line or stage == "ppo")


# ---- the command line ----
def config_only(folder: Path) -> str:
    """A directory with baichuan-7B's config.json and nothing else."""
    BaichuanConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    ).save_pretrained(folder)
    return str(folder)


def test_a_skeleton_has_every_parameter_and_no_memory(tmp_path):
    model = skeleton(config_only(tmp_path), "--model_name")
    assert all(p.is_meta for p in model.parameters())
    shape = shape_of(model)
    assert (shape.parameters, shape.linear) == (SEVEN_B.parameters, SEVEN_B.linear)


def test_ppo_is_planned_before_anything_exists_but_a_config(tmp_path, capsys):
    flags = {
        "base_model_name": config_only(tmp_path / "base"), "sft_model_lora_path": "not/yet", "plan": True,
        "reward_model_lora_path": "nor/this", "batch_size": 8, "mini_batch_size": 8, "max_prompt_length": 256,
        "output_max_length": 256, "gradient_checkpointing": True, "output_dir": tmp_path / "out", "steps": 100,
    }  # fmt: skip
    rl_training.main(rl_training.parse_args(words(flags)))
    said = capsys.readouterr().out
    assert "7,000,559,616" in said and "4,194,304 (trained)" in said
    assert "peak of a process: 18.00 GiB, in the update" in said
    assert "24 GB yes" in said
    assert "steps: 13, 104 responses in total" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", [sft_training, reward_modeling])
def test_the_trainer_stages_are_planned_with_the_rows_at_hand(tmp_path, capsys, stage):
    data = (write_answers if stage is sft_training else write_pairs)(tmp_path / "rows.jsonl")
    flags = {"model_name": config_only(tmp_path / "base"), "dataset_name": data, "plan": True,
             "output_dir": tmp_path / "out", "gradient_accumulation_steps": 2, "num_train_epochs": 2}  # fmt: skip
    stage.main(stage.parse_args(words(flags)))
    said = capsys.readouterr().out
    assert "8 rows" in said or "8 pairs" in said
    assert "steps: about 16 for 60" in said
    assert not (tmp_path / "out").exists()


def test_a_stored_adapters_own_rank_counts(tiny_base, tmp_path, capsys):
    sft, reward = random_adapter(tiny_base, tmp_path / "sft"), random_adapter(tiny_base, tmp_path / "rm", "reward")
    stored = sum(tensor.numel() for tensor in load_file(Path(sft) / "adapter_model.safetensors").values())
    flags = {"base_model_name": tiny_base, "sft_model_lora_path": sft, "reward_model_lora_path": reward, "plan": True}
    rl_training.main(rl_training.parse_args(words(flags)))
    assert f"{stored:,} (trained)" in capsys.readouterr().out


# ---- optional packages ----
@pytest.mark.parametrize(
    ("flag", "value", "package"), [("load_in_4bit", "True", "bitsandbytes"), ("deepspeed", "zero2.json", "deepspeed")]
)
def test_a_flag_whose_package_is_missing_is_refused_before_anything_loads(tmp_path, monkeypatch, flag, value, package):
    monkeypatch.setattr("rlhf.run.launch.find_spec", lambda name: None)
    args = sft_training.parse_args(["--model_name", str(tmp_path / "nowhere"), f"--{flag}", value])
    with pytest.raises(ValueError, match=f"pip install {package}=="):
        sft_training.main(args)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "does not exist"), ("{", "is not JSON"), ('{"zero_optimization": {"stage": 3}}', "empty adapters")],
    ids=["missing", "broken", "stage 3"],
)
def test_a_deepspeed_file_that_cannot_work_is_refused(tmp_path, monkeypatch, content, sentence):
    monkeypatch.setattr("rlhf.run.launch.find_spec", lambda name: name)
    file = tmp_path / "config.json"
    if content:
        file.write_text(content, encoding="utf-8")
    args = sft_training.parse_args(["--model_name", str(tmp_path / "nowhere"), "--deepspeed", str(file)])
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        sft_training.main(args)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_deepspeed_files_leave_the_sizes_to_the_flags(stage):
    file = ROOT / "scripts" / "deepspeed" / f"zero{stage}.json"
    check_deepspeed(str(file))
    config = json.loads(file.read_text(encoding="utf-8"))
    assert config["zero_optimization"]["stage"] == stage
    for name in ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size",
                 "train_micro_batch_size_per_gpu"):  # fmt: skip
        assert config[name] == "auto"
    # The optimizer and its schedule stay the Trainer's.
    assert not config.keys() & {"optimizer", "scheduler"}


@pytest.fixture
def wide_base(tiny_base, tmp_path):
    """Like the tiny base, with matrices wide enough for blocks of 64."""
    folder = tmp_path / "wide"
    folder.mkdir()
    for file in Path(tiny_base).glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = BaichuanConfig.from_pretrained(
        tiny_base, hidden_size=128, intermediate_size=256, num_attention_heads=4, head_dim=32
    )
    save_random_model(BaichuanForCausalLM, config, folder)
    return str(folder)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes (requirements-optional.txt) is missing")
def test_all_stages_train_on_a_base_in_4_bits(wide_base, tmp_path):
    common = {"model_name": wide_base, "max_steps": 2, "learning_rate": 1e-3, "save_steps": 0, "load_in_4bit": True}
    sft, reward, ppo = (tmp_path / name for name in ("sft", "reward", "ppo"))
    answers, pairs = write_answers(tmp_path / "answers.jsonl"), write_pairs(tmp_path / "pairs.jsonl")
    sft_training.main(sft_training.parse_args(words(common | {"dataset_name": answers, "output_dir": sft})))
    flags = common | {"dataset_name": pairs, "output_dir": reward, "audit": False}
    reward_modeling.main(reward_modeling.parse_args(words(flags)))
    flags = {
        "base_model_name": wide_base, "dataset_name": pairs, "output_dir": ppo, "sft_model_lora_path": sft,
        "reward_model_lora_path": reward, "load_in_4bit": True, "steps": 8, "batch_size": 8, "output_max_length": 8,
    }  # fmt: skip
    rl_training.main(rl_training.parse_args(words(flags)))
    for folder in (sft, reward, ppo):
        # Sampling comes before training in two of them: no gradient may be lost by it.
        assert all(record["grad_norm"] > 0.1 for record in read_metrics(folder) if "grad_norm" in record)
    # The adapter is a plain one: it fits the base in full precision.
    base = AutoModelForCausalLM.from_pretrained(wide_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(ppo))
    assert sum(p.abs().sum() for name, p in model.named_parameters() if "lora_B" in name) > 0
    assert load_file(reward / "adapter_model.safetensors")["base_model.model.score.weight"].dtype == torch.float32
