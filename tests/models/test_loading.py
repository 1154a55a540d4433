"""Bases that cannot be used are refused in one sentence, before anything is built or any foreign code could run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from commands import run_here
from stages import words, write_answers, write_pairs
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf.artefacts.files import nearest
from rlhf.models.loading import load_base, read_config, refuse_small_base, resolve_model
from rlhf.models.lora import lora_targets


@pytest.fixture
def copied(tiny_llama, tmp_path):
    """A copy of a stock Llama to damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


def change(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


# ---- refused ----
PLANTED = "from pathlib import Path\nPath({!r}).write_text('run')\n"


@pytest.mark.parametrize("kind", ["unheard_of", "llama"])
def test_code_beside_the_weights_is_never_run(copied, tmp_path, kind):
    seen = tmp_path / "seen"
    (copied / "modeling_x.py").write_text(PLANTED.format(str(seen)))
    names = {"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M", "AutoTokenizer": "modeling_x.T"}
    change(copied, model_type=kind, auto_map=names)
    if kind == "llama":
        load_base(str(copied), torch.float32)
    else:
        with pytest.raises(
            ValueError, match=r"model_type 'unheard_of' is unknown .* its own code \(auto_map\) is never"
        ):
            load_base(str(copied), torch.float32)
    flags = {"model_name": copied, "dataset_name": write_answers(tmp_path / "a.jsonl", 8), "inspect_data": True}
    code, _, _ = run_here("sft_training", *words(flags | {"output_dir": tmp_path / "out"}))
    assert code == (0 if kind == "llama" else 1)
    assert not seen.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**7}, "says num_hidden_layers 1e\\+07, which no model has"),
        ({"vocab_size": 10**12}, "says vocab_size 1e\\+12"),
        ({"model_type": None}, "model_type None is unknown"),
        ({"model_type": ["llama"]}, "is unknown to this version"),
        ({"num_attention_heads": "four"}, "config.json cannot be used"),
        ({"num_attention_heads": 0}, "config.json cannot be used|without attention"),
    ],
)
def test_a_damaged_or_malicious_config_is_named(copied, fields, message):
    change(copied, **fields)
    with pytest.raises(ValueError, match=message):
        read_config(str(copied))


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"model_type": 1e999}'])
def test_a_config_that_is_no_object_is_named(copied, content):
    (copied / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        resolve_model(str(copied))


def test_an_adapter_in_the_bases_directory_is_not_loaded_unasked(copied, tmp_path):
    adapter = Path(random_adapter(str(copied), tmp_path / "sft"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, copied)
    with pytest.raises(ValueError, match=r"--base_model_name .* holds an adapter .* beside the base's files"):
        resolve_model(str(copied), "--base_model_name")


def test_a_mistyped_path_gets_a_hint_and_a_cache_directory_its_snapshot(copied, tmp_path):
    assert nearest(str(tmp_path / "bse")) == f" (did you mean {tmp_path / 'base'}?)"
    assert nearest(str(tmp_path / "unlike")) == ""
    with pytest.raises(FileNotFoundError, match="did you mean"):
        resolve_model(str(tmp_path / "bse"))

    cache = tmp_path / "models--owner--name"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    shutil.copytree(copied, cache / "snapshots" / "abc")
    assert resolve_model(str(cache)) == str(cache / "snapshots" / "abc")


# ---- positions ----
@pytest.fixture
def gpt2(tmp_path, tiny_llama):
    """A GPT-2 of 32 learnt positions."""
    folder = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=700, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    for file in Path(tiny_llama).glob("tokenizer*"):
        shutil.copy(file, folder)
    return str(folder)


def test_rows_beyond_learnt_positions_are_refused_in_every_stage(gpt2, tmp_path):
    answers = write_answers(tmp_path / "a.jsonl", 8)
    flags = {"model_name": gpt2, "dataset_name": answers, "output_dir": tmp_path / "out", "max_length": 33}
    for script in ("sft_training", "reward_modeling"):
        code, _, errors = run_here(script, *words(flags))
        assert code == 1 and "--max_length 33: a row may have 33 tokens, but this base has 32 positions" in errors
    reward = random_adapter(gpt2, tmp_path / "reward", "reward", 1)
    flags = {"base_model_name": gpt2, "reward_model_lora_path": reward, "dataset_name": answers}
    more = {"max_prompt_length": 20, "output_max_length": 13, "output_dir": tmp_path / "out"}
    code, _, errors = run_here("rl_training", *words(flags | more))
    assert code == 1 and "a row may have 33 tokens, but this base has 32 positions" in errors


def test_a_linear_layer_of_gpt2_takes_an_adapter(gpt2):
    model = load_base(gpt2, torch.float32)
    assert lora_targets(model, "c_attn") == ["c_attn"]
    assert lora_targets(model, None) == ["c_attn", "c_fc", "c_proj"]
    assert lora_targets(model, r".*h\.0\.attn\.c_attn") == r".*h\.0\.attn\.c_attn"
    for spec, message in (("nothing", "no module"), (r"h\.[0-9", "no regular expression"), (r"x\.\d+", "matches no")):
        with pytest.raises(ValueError, match=message):
            lora_targets(model, spec)


def test_positions_that_depend_on_the_longest_row_are_refused_beyond_their_switch(copied, tiny_llama):
    change(copied, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0,
                                    "original_max_position_embeddings": 64})  # fmt: skip
    from rlhf.data.encoding import load_tokenizer

    tokenizer = load_tokenizer(tiny_llama)
    refuse_small_base(str(copied), tokenizer, 64, "--max_length 64")
    with pytest.raises(ValueError, match="beyond 64 this base computes all positions"):
        refuse_small_base(str(copied), tokenizer, 65, "--max_length 65")
    change(copied, vocab_size=5)
    with pytest.raises(ValueError, match=r"the tokenizer has .* tokens, the base .* only 5"):
        refuse_small_base(str(copied), tokenizer, 64, "--max_length 64")


# ---- the shared cases ----
def test_a_hybrid_with_linear_attention_goes_through_ppo(shared_data, tmp_path):
    cases = shared_data.parent / "cases"
    data = cases / "data"
    flags = {
        "base_model_name": cases / "base_hybrid", "sft_model_lora_path": cases / "adapters" / "plain_hybrid",
        "reward_model_lora_path": cases / "adapters" / "reward_base_hybrid",
        "dataset_name": data / "good_prompts.jsonl", "output_dir": tmp_path / "out", "output_max_length": 64,
        "steps": 16, "batch_size": 8, "reward_gate": "warn", "on_collapse": "off", "mini_batch_size": 4,
    }  # fmt: skip
    code, _, errors = run_here("rl_training", *words(flags))
    assert code == 0, errors


def test_pairs_in_one_sequence_are_refused_for_linear_attention(shared_data, tmp_path):
    base = shared_data.parent / "cases" / "base_hybrid"
    flags = {
        "model_name": base, "dataset_name": write_pairs(tmp_path / "p.jsonl", 20), "output_dir": tmp_path / "out",
        "share_prompt": True, "max_steps": 1, "eval_size": 4,
    }  # fmt: skip
    code, _, errors = run_here("reward_modeling", *words(flags))
    assert code == 1 and "--share_prompt True" in errors
