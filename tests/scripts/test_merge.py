"""merge_lora.py: what it writes equals base + adapter, stock transformers reads it, and bad input is refused."""

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from adapters import random_adapter
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig, DPOTrainer

import merge_lora
from merge_lora import BOUNDS, check_parity
from rlhf.baichuan import BaichuanForCausalLM, BaichuanTokenizer
from rlhf.baichuan.to_fast_tokenizer import fast_tokenizer, save_tokenizer
from rlhf.baichuan.to_llama import split_adapter
from rlhf.run.launch import run_script

TEXTS = [
    "问：你喜欢苹果？\n\n答：我喜欢42个橘子。",
    "0开头",
    "。句号开头",
    "<h1>标题</h1>",
    "两  个   空格 ",
    "生僻字龘🀄é",
    "</s>是文字，<s>也是",
    "（①…％）\r\n\t全角０",
    "<reserved_7> <!---->",
    "",
]


def merge(base, adapter, target, *flags):
    """Run the script on float32 weights unless flags say otherwise; returns the directory it wrote."""
    argv = ["--base_model_name", base, "--output_dir", str(target), "--dtype", "float32", *flags]
    merge_lora.main(merge_lora.parse_args(argv + (["--lora_path", adapter] if adapter else [])))
    return str(target)


def probe_ids(rows=3, length=12, vocabulary=500):
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(7))


def with_adapter(base, adapter, auto=AutoModelForCausalLM, **extra):
    """Plain peft's own base + adapter, in float32."""
    return PeftModel.from_pretrained(auto.from_pretrained(base, dtype=torch.float32, **extra), adapter).eval()


@pytest.fixture(scope="module")
def sft(tiny_base, tmp_path_factory):
    return random_adapter(tiny_base, tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def reward(tiny_base, tmp_path_factory):
    return random_adapter(tiny_base, tmp_path_factory.mktemp("reward"), stage="reward", seed=1)


@pytest.fixture(scope="module")
def merged_llama(tiny_base, sft, tmp_path_factory):
    return merge(tiny_base, sft, tmp_path_factory.mktemp("merged") / "llama", "--format", "llama")


# ---- the merged model is base + adapter ----


@pytest.mark.parametrize("flags", [(), ("--format", "baichuan"), ("--format", "llama")])
def test_merged_logits_equal_base_plus_adapter(tiny_base, sft, tmp_path, flags):
    merged = merge(tiny_base, sft, tmp_path / "merged", *flags)
    ids = probe_ids()
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert type(model) is (LlamaForCausalLM if "llama" in flags else BaichuanForCausalLM)
    assert model.dtype == torch.float32 and model.config.use_cache
    expected = with_adapter(tiny_base, sft)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)(ids).logits
    assert (base - expected).abs().max() > 0.01
    run = json.loads((Path(merged) / "run.json").read_text())
    assert run["stage"] == "merge" and run["metrics"]["distance"] <= BOUNDS["float32"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_within_its_bound(tiny_base, sft, tmp_path, dtype):
    merged = merge(tiny_base, sft, tmp_path / "merged", "--dtype", dtype)
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == getattr(torch, dtype)
    assert 0 < json.loads((Path(merged) / "run.json").read_text())["metrics"]["distance"] <= BOUNDS[dtype]


def test_the_tokenizer_comes_along(tiny_base, sft, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(merge(tiny_base, sft, tmp_path / "merged"))
    assert type(tokenizer) is BaichuanTokenizer
    assert tokenizer(TEXTS).input_ids == AutoTokenizer.from_pretrained(tiny_base)(TEXTS).input_ids


def test_other_architectures_merge_in_their_own_format(tiny_llama, tmp_path):
    adapter = random_adapter(tiny_llama, tmp_path / "adapter")
    merged = merge(tiny_llama, adapter, tmp_path / "merged")
    ids = probe_ids(vocabulary=400)
    expected = with_adapter(tiny_llama, adapter)(ids).logits
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(merged)(ids).logits, expected, rtol=0, atol=1e-4)
    assert (
        AutoTokenizer.from_pretrained(merged)(TEXTS).input_ids
        == AutoTokenizer.from_pretrained(tiny_llama)(TEXTS).input_ids
    )
    with pytest.raises(ValueError, match="does not fit a llama base"):
        merge(tiny_llama, adapter, tmp_path / "other", "--format", "baichuan")


def test_without_an_adapter_the_base_is_converted(tiny_base, tmp_path):
    converted = LlamaForCausalLM.from_pretrained(merge(tiny_base, None, tmp_path / "llama", "--format", "llama"))
    # llama.cpp puts a BOS in front of every text unless this says no, and answers otherwise than it was trained to.
    assert json.loads((tmp_path / "llama" / "tokenizer_config.json").read_text())["add_bos_token"] is False
    ids = probe_ids()
    expected = AutoModelForCausalLM.from_pretrained(tiny_base)(ids).logits
    torch.testing.assert_close(converted(ids).logits, expected, rtol=0, atol=1e-4)


def test_a_norm_head_becomes_a_plain_one(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"norm_head": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    ids = probe_ids()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids).logits
    converted = LlamaForCausalLM.from_pretrained(
        merge(str(tmp_path / "base"), None, tmp_path / "llama", "--format", "llama")
    )
    torch.testing.assert_close(converted(ids).logits, expected, rtol=0, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)(ids).logits
    assert (plain - expected).abs().max() > 0.1


@pytest.mark.parametrize("form", ["baichuan", "llama"])
def test_a_reward_adapter_keeps_its_head(tiny_base, reward, tmp_path, form):
    merged = merge(tiny_base, reward, tmp_path / "merged", "--format", form)
    model, info = AutoModelForSequenceClassification.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"] and isinstance(model, LlamaForSequenceClassification) == (form == "llama")
    ids, mask = probe_ids(), torch.ones(3, 12, dtype=torch.long)
    ids[1, 8:], mask[1, 8:] = 0, 0
    peft = with_adapter(tiny_base, reward, AutoModelForSequenceClassification, num_labels=1)
    expected = peft(input_ids=ids, attention_mask=mask).logits
    assert expected.shape == (3, 1)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected, rtol=0, atol=1e-4)


# ---- stock transformers, without our package ----


def test_stock_transformers_gives_the_same_ids_text_and_logits(tiny_base, sft, merged_llama, tmp_path):
    reader = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, texts = json.loads(sys.argv[1])
tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
ids = tokenizer(texts, split_special_tokens=True).input_ids
found = {"ids": ids, "texts": tokenizer.batch_decode(ids), "logits": model(torch.tensor(ids[:1])).logits.tolist(),
         "pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id, "ours": "rlhf" in sys.modules}
print(json.dumps(found))
"""
    command = [sys.executable, "-I", "-c", reader, json.dumps([merged_llama, TEXTS])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    assert not found["ours"] and (found["pad"], found["eos"]) == (0, 2)
    assert found["ids"] == tokenizer(TEXTS).input_ids
    assert found["texts"] == tokenizer.batch_decode(found["ids"])
    expected = with_adapter(tiny_base, sft)(torch.tensor(found["ids"][:1])).logits
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def exported_64k(shared_data, tmp_path_factory):
    """The exported 64k tokenizer read back by AutoTokenizer, and raw sentencepiece."""
    directory = tmp_path_factory.mktemp("exported_64k")
    model = str(shared_data / "baichuan_64k.model")
    save_tokenizer(BaichuanTokenizer(vocab_file=model), directory)
    return AutoTokenizer.from_pretrained(directory), sentencepiece.SentencePieceProcessor(model_file=model)


def test_exported_ids_equal_sentencepieces_on_every_real_line(exported_64k, sample_lines):
    exported, raw = exported_64k
    assert not isinstance(exported, BaichuanTokenizer)
    assert len(sample_lines) > 10_000
    assert exported(sample_lines).input_ids == raw.encode(sample_lines)
    sample = raw.encode(sample_lines[::20])
    assert exported.batch_decode(sample) == raw.decode(sample)


@pytest.mark.parametrize("text", [*TEXTS, "--->", "<!--->", "``````", " " * 30, "▁▁x", "＝①⑵㍿ﬁ", "。</s>。"])
def test_exported_ids_of_awkward_texts(exported_64k, text):
    exported, raw = exported_64k
    assert exported(text).input_ids == raw.encode(text)
    assert exported.decode(raw.encode(text)) == raw.decode(raw.encode(text))


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "char"},
        {"remove_extra_whitespaces": True, "normalization_rule_name": "identity"},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["ab", "b<", "▁▁", "\n"]},
    ],
)
def test_export_follows_the_flags_of_any_model(settings, tmp_path):
    text = ["我喜欢苹果 and  12 pears。", "ab<c 你好\t！", "小猫 ab ab<"] * 5
    settings = {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["\n"], **settings}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(tmp_path / "m"), vocab_size=330, hard_vocab_limit=False,
        minloglevel=2, **settings,
    )  # fmt: skip
    raw = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    exported = fast_tokenizer(raw, unk_token="<unk>", split_special_tokens=True)
    for line in [*text, *TEXTS, "  ", "ab<b<ab  \n ab "]:
        assert exported(line).input_ids == raw.encode(line), line


def test_a_unigram_model_is_not_exported(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["我喜欢苹果", "你喜欢红茶"] * 5), model_prefix=str(tmp_path / "m"), vocab_size=15,
        model_type="unigram", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="only a SentencePiece model of type bpe or char"):
        fast_tokenizer(sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model")))


def test_trl_takes_the_merged_model_as_reference(tiny_base, merged_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(merged_llama)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    rows = [{"prompt": "问：你喜欢什么？\n\n答：", "chosen": "我喜欢苹果！", "rejected": "不喜欢。"}] * 2
    policy, reference = (AutoModelForCausalLM.from_pretrained(merged_llama) for _ in range(2))
    before = policy.model.layers[0].self_attn.q_proj.weight.clone()
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, bf16=False,
            use_cpu=True, report_to="none", save_strategy="no", gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    result = trainer.train()
    # At the first step policy and reference are equal, so the loss is that of a coin.
    assert result.training_loss == pytest.approx(0.6931, abs=1e-3)
    assert not torch.equal(policy.model.layers[0].self_attn.q_proj.weight, before)


# ---- a W_pack adapter as one on q, k and v ----


def test_a_converted_adapter_is_exactly_the_same_update(tiny_base, sft, tmp_path):
    argv = ["--adapter_only", "True", "--lora_path", sft, "--output_dir", str(tmp_path / "qkv")]
    merge_lora.main(merge_lora.parse_args(argv))
    old, new = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (sft, tmp_path / "qkv"))
    assert len(new) == 3 * len(old)
    for name, weight in old.items():
        parts = [new[name.replace("W_pack", part)] for part in ("q_proj", "k_proj", "v_proj")]
        whole = torch.cat(parts) if "lora_B" in name else parts[0]
        assert torch.equal(whole, weight) and ("lora_B" in name or all(torch.equal(part, weight) for part in parts))

    llama = merge(tiny_base, None, tmp_path / "llama", "--format", "llama")
    ids = probe_ids()
    expected = with_adapter(tiny_base, sft)(ids).logits
    torch.testing.assert_close(with_adapter(llama, str(tmp_path / "qkv"))(ids).logits, expected, rtol=0, atol=1e-5)


def test_rank_patterns_follow_and_other_modules_stay():
    config = LoraConfig(r=2, target_modules=["W_pack", "o_proj"], rank_pattern={"layers.0.self_attn.W_pack": 4})
    layer = "base_model.model.model.layers.0.self_attn"
    weights = {
        f"{layer}.W_pack.lora_A.weight": torch.ones(4, 8),
        f"{layer}.W_pack.lora_B.weight": torch.arange(96.0).view(24, 4),
        f"{layer}.o_proj.lora_A.weight": torch.ones(2, 8),
    }
    converted, found = split_adapter(config, weights)
    assert set(converted.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert converted.rank_pattern == {f"layers.0.self_attn.{part}_proj": 4 for part in "qkv"}
    assert found[f"{layer}.k_proj.lora_B.weight"][0, 0] == 32
    with pytest.raises(ValueError, match="only plain LoRA"):
        split_adapter(config, {f"{layer}.W_pack.lora_magnitude_vector": torch.ones(24)})
    with pytest.raises(ValueError, match="not on W_pack"):
        split_adapter(LoraConfig(target_modules=["q_proj"]), {f"{layer}.q_proj.lora_A.weight": torch.ones(2, 8)})


# ---- refusals ----


def spoiled(adapter, folder):
    """A copy of an adapter with one NaN in it."""
    folder.mkdir()
    weights = load_file(Path(adapter) / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors")
    for name in ("adapter_config.json", "run.json"):
        (folder / name).write_text((Path(adapter) / name).read_text())
    return str(folder)


def test_nan_is_refused_before_the_base_loads(tiny_base, sft, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_lora.loading, "load_base", lambda *args, **kwargs: pytest.fail("the base was loaded"))
    with pytest.raises(ValueError, match=r"adapter .* holds NaN or infinity in base_model"):
        merge(tiny_base, spoiled(sft, tmp_path / "bad"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_directory_in_use_is_refused_and_left_alone(tiny_base, sft, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        merge(tiny_base, sft, tmp_path / "used")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]


def test_an_empty_directory_is_filled(tiny_base, sft, tmp_path):
    (tmp_path / "empty").mkdir()
    assert (Path(merge(tiny_base, sft, tmp_path / "empty")) / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_adapter_of_another_base_is_refused(tiny_base, tiny_llama, sft, tmp_path):
    with pytest.raises(ValueError, match="was trained with another base"):
        merge(tiny_llama, sft, tmp_path / "merged")


def test_nothing_is_left_when_the_result_is_not_equal(tiny_base, sft, tmp_path, monkeypatch):
    monkeypatch.setitem(BOUNDS, "float32", 0.0)
    with pytest.raises(ValueError, match="away from base"):
        merge(tiny_base, sft, tmp_path / "merged", "--format", "llama")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_merge_left_is_swept_and_one_at_work_is_left_alone(tiny_base, sft, tmp_path):
    left, other = tmp_path / ".merged.abcd1234", tmp_path / ".merged.notes"
    for folder in (left, other):
        folder.mkdir()
    (left / ".lock").touch()
    with (left / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="another run"):
            merge(tiny_base, sft, tmp_path / "merged")
    assert left.is_dir() and not (tmp_path / "merged").exists()
    merge(tiny_base, sft, tmp_path / "merged")
    assert not left.exists() and other.is_dir()


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_parity_refuses_the_wrong_model_and_nan(tiny_base, sft, dtype):
    ids = probe_ids()
    base, adapted = (
        AutoModelForCausalLM.from_pretrained(tiny_base)(ids).logits,
        with_adapter(tiny_base, sft)(ids).logits,
    )
    assert check_parity(adapted, adapted.clone(), dtype) == 0
    for wrong in (base, torch.full_like(base, float("nan"))):
        with pytest.raises(ValueError, match="away from base"):
            check_parity(adapted, wrong, dtype)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_dir", "o", "--lora_path", "a"], "--base_model_name is missing"),
        (["--output_dir", "o", "--base_model_name", "b"], "nothing to do"),
        (["--output_dir", "o", "--adapter_only", "True"], "--adapter_only True needs --lora_path"),
        (["--base_model_name", "b", "--lora_path", "a"], "--output_dir"),
        (["--output_dir", "o", "--base_model_name", "b", "--lora_path", "a", "--dtype", "int8"], "invalid choice"),
    ],
)
def test_wrong_flags_end_with_usage(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        merge_lora.parse_args(flags)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_the_command_line_says_one_sentence_and_fails(tiny_base, tmp_path, monkeypatch, capsys):
    argv = ["merge_lora.py", "--base_model_name", tiny_base, "--lora_path", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", [*argv, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        run_script(merge_lora.main, merge_lora.parse_args)
    message = capsys.readouterr().err
    assert end.value.code == 1 and len(message.splitlines()) == 1
    assert "is no adapter directory" in message
