"""Merging file by file: the tensors of a merge in memory, within the memory of one file."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from conftest import TINY
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import merge_lora
from rlhf.models.merging import FileMerge

MB = 2**20


@pytest.fixture(scope="module")
def split_base(tiny_llama, tmp_path_factory):
    """The tiny Llama in files of 40 kB, with its tokenizer, and an adapter on it."""
    folder = tmp_path_factory.mktemp("split")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(folder / "base", max_shard_size="40KB")
    for file in Path(tiny_llama).glob("tokenizer*"):
        shutil.copy(file, folder / "base")
    assert len(list((folder / "base").glob("*.safetensors"))) > 2
    return str(folder / "base"), random_adapter(str(folder / "base"), folder / "sft")


def merged(base: str, adapter: str, target, *flags: str) -> dict[str, torch.Tensor]:
    argv = ["--base_model_name", base, "--lora_path", adapter, "--output_dir", str(target), *flags]
    merge_lora.main(merge_lora.parse_args(argv))
    tensors = {}
    for file in sorted(target.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_hold_the_tensors_of_a_merge_in_memory_and_the_same_settings(split_base, tmp_path, monkeypatch, dtype):
    base, adapter = split_base
    by_file = merged(base, adapter, tmp_path / "files", "--dtype", dtype)
    monkeypatch.setattr(FileMerge, "of", lambda *given: None)
    in_memory = merged(base, adapter, tmp_path / "memory", "--dtype", dtype)
    assert by_file.keys() == in_memory.keys()
    for name, tensor in in_memory.items():
        assert tensor.dtype == by_file[name].dtype and torch.equal(tensor, by_file[name]), name
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "files" / name).read_text() == (tmp_path / "memory" / name).read_text()
    # Stock transformers finds the files.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "files", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(plain, adapter)(input_ids=ids).logits
        atol = 0.2 if dtype == "bfloat16" else 1e-4
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=atol, rtol=0)


def test_ranks_and_strengths_of_single_layers_are_peft_s(split_base, tmp_path, monkeypatch):
    base, _ = split_base
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 5}}
    config = LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **patterns)
    adapter = str(tmp_path / "adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(adapter)
    assert len(set(FileMerge.of(base, adapter).scalings.values())) == 3

    by_file = merged(base, adapter, tmp_path / "files", "--dtype", "float32")
    monkeypatch.setattr(FileMerge, "of", lambda *given: None)
    in_memory = merged(base, adapter, tmp_path / "memory", "--dtype", "float32")
    assert all(torch.equal(tensor, by_file[name]) for name, tensor in in_memory.items())


def test_tensors_of_another_rank_than_the_config_says_are_refused(split_base, tmp_path):
    base, adapter = split_base
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"r": config["r"] // 2}))
    (tmp_path / "adapter" / "run.json").unlink(missing_ok=True)
    assert FileMerge.of(base, str(tmp_path / "adapter")) is None
    with pytest.raises((RuntimeError, ValueError), match=r"shape|size|rank"):
        merged(base, str(tmp_path / "adapter"), tmp_path / "out")


def test_a_model_too_large_for_memory_is_proved_by_its_matrices(split_base, tmp_path, monkeypatch, capsys):
    base, adapter = split_base
    monkeypatch.setattr(FileMerge, "fits", lambda *given: False)
    monkeypatch.setattr(merge_lora, "load_pair", None)
    merged(base, adapter, tmp_path / "out", "--dtype", "float32")
    assert "from base + adapter" in capsys.readouterr().out

    # A broken product shows.
    usual = FileMerge.delta
    calls = []

    def wrong(self, name):
        calls.append(name)
        change = usual(self, name)
        return change if change is None or len(calls) > 21 else 1.1 * change

    monkeypatch.setattr(FileMerge, "delta", wrong)
    with pytest.raises(ValueError, match="away from base"):
        merged(base, adapter, tmp_path / "wrong", "--dtype", "float32")
    assert not (tmp_path / "wrong").exists()


def test_a_merge_takes_the_memory_of_one_file(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "vocab_size": 512}
    config = LlamaConfig(**(TINY | sizes))
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base", max_shard_size="40MB")
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    del model
    files = sorted((tmp_path / "base").glob("*.safetensors"))
    whole = sum(file.stat().st_size for file in files)
    assert whole > 160 * MB

    # In a process of its own, whose highest mark is its own.
    (tmp_path / "out").mkdir()
    pid = os.fork()
    if not pid:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        FileMerge.of(str(tmp_path / "base"), str(tmp_path / "adapter")).write(tmp_path / "out", torch.float32)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os._exit(min(255, grown // 1024))
    grown = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert 20 < grown < 120, f"{grown} MB"
