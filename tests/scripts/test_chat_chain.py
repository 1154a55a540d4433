"""A chat model through all scripts: rows, SFT, reward model, PPO without SFT, compare and merge in its own format."""

import json
import re
from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from peft import PeftModel
from safetensors.torch import load_file
from stages import words, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

import compare
import merge_lora
import reward_modeling
import rl_training
import sft_training
from rlhf.artefacts.run_json import load_run, write_json
from rlhf.data.batches import collate_prompts
from rlhf.data.choose_format import stored_format, text_format
from rlhf.data.encoding import load_tokenizer
from rlhf.data.prompt_format import PromptFormat
from rlhf.models.generation import Sampling, generate, greedy_answers
from rlhf.models.loading import load_base
from rlhf.rl.roles import load_roles
from rlhf.run.log import read_metrics

LESSONS = [("What do you like?", "I think tea."), ("Capital of France?", "Paris."), ("你喜欢什么？", "红茶，很好！")]
FAST = {
    "per_device_train_batch_size": 3, "eval_size": 0, "eval_steps": 0, "save_steps": 0, "sample_max_new_tokens": 0,
    "audit": "False", "train_subset": -1,
}  # fmt: skip


def flags_of(script, **flags) -> list[str]:
    known = {name for name in script.ScriptArguments.__dataclass_fields__}
    return words({name: value for name, value in flags.items() if name in known})


@pytest.fixture(scope="module")
def chat(tiny_chat) -> PromptFormat:
    tokenizer = load_tokenizer(tiny_chat)
    return PromptFormat(tokenizer, "chat", chat_template=tokenizer.chat_template, base_stop_ids=(1, 4))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lessons = [{"prompt": prompt, "answer": answer} for prompt, answer in LESSONS]
    pairs = [
        {"prompt": f"{prompt} {n}", "chosen": f"{answer}!", "rejected": "No."}
        for n in range(8)
        for prompt, answer in LESSONS
    ]
    return {
        "sft": write_lines(folder / "lessons.jsonl", lessons),
        "reward": write_lines(folder / "pairs.jsonl", pairs),
        "prompts": write_lines(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in pairs]),
    }


@pytest.fixture(scope="module")
def sft(tiny_chat, files, tmp_path_factory):
    """An SFT adapter that knows its lessons by heart."""
    out = tmp_path_factory.mktemp("runs") / "sft"
    flags = flags_of(
        sft_training, model_name=tiny_chat, dataset_name=files["sft"], output_dir=out, max_steps=120, lora_rank=16,
        learning_rate=2e-2, lora_dropout=0, use_rslora=True, **FAST,
    )  # fmt: skip
    sft_training.main(sft_training.parse_args(flags))
    return out


@pytest.fixture(scope="module")
def reward(tiny_chat, files, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "reward"
    flags = flags_of(
        reward_modeling, model_name=tiny_chat, dataset_name=files["reward"], output_dir=out, max_steps=2, **FAST
    )
    reward_modeling.main(reward_modeling.parse_args(flags))
    return out


# ---- SFT and what a later stage knows of it ----
def test_sft_learns_to_answer_and_to_stop_with_the_end_of_turn(tiny_chat, sft, chat):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_chat, dtype="float32"), sft).eval()
    base = model.get_base_model()
    queries = [chat.query_ids([("user", prompt)]) for prompt, _ in LESSONS]
    assert greedy_answers(base, chat, queries, 24) == [answer for _, answer in LESSONS]

    batch = collate_prompts(queries, chat.pad_id)
    rollout = generate(
        base, None, batch["input_ids"], batch["attention_mask"], Sampling(chat.stop_ids, chat.pad_id, 24)
    )
    ends = [ids[mask][-1].item() for ids, mask in zip(rollout.response_ids, rollout.mask, strict=True)]
    assert set(ends) == {chat.tokenizer.convert_tokens_to_ids("<|eot_id|>")}


def test_run_json_keeps_the_format_and_another_one_is_refused_by_name(tiny_chat, sft, reward, files, tmp_path):
    stored = load_run(sft)["prompt_format"]
    assert stored["prompt_template"] == "chat"
    assert stored["stop_tokens"] == ["<|eot_id|>", "<|end_of_text|>"]
    assert stored["text"] == load_tokenizer(tiny_chat).chat_template
    assert json.loads((sft / "adapter_config.json").read_text())["use_rslora"] is True
    assert not any("split_special_tokens" in file.read_text() for file in sft.glob("tokenizer_config.json"))

    common = {"base_model_name": tiny_chat, "reward_model_lora_path": reward, "dataset_name": files["prompts"]}
    for change, words_of_it in (
        ({"prompt_template": "{prompt}\\n"}, "another prompt_template"),
        ({"chat_template_kwargs": '{"x": 1}'}, "another chat_template_kwargs"),
        ({"system_prompt": "Be brief."}, "another system_prompt"),
        ({"stop_tokens": "!"}, "another stop_tokens"),
        ({"bos": "False"}, "another bos"),
    ):
        flags = flags_of(rl_training, **common, sft_model_lora_path=sft, output_dir=tmp_path / "x", **change)
        with pytest.raises(ValueError, match=words_of_it):
            rl_training.main(rl_training.parse_args(flags))
    file = tmp_path / "other.jinja"
    file.write_text(stored["text"] + " ", encoding="utf-8")
    flags = flags_of(rl_training, **common, sft_model_lora_path=sft, output_dir=tmp_path / "x", chat_template=file)
    with pytest.raises(ValueError, match="another chat template"):
        rl_training.main(rl_training.parse_args(flags))


def test_an_adapter_of_an_older_version_knew_no_bos(tiny_chat, sft, tmp_path):
    tokenizer = load_tokenizer(tiny_chat)
    run = load_run(sft) | {"prompt_template": "{prompt}\n"}
    del run["prompt_format"]
    assert stored_format(run, tokenizer, tiny_chat).query_ids([("user", "hi")]) == tokenizer.encode(
        "hi\n", add_special_tokens=False
    )
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).symlink_to(sft / file)
    write_json(tmp_path / "run.json", run)
    flags = flags_of(
        sft_training, model_name=tiny_chat, previous_lora_weights=tmp_path, prompt_template="{prompt}\\n",
        output_dir=tmp_path / "x", dataset_name=tmp_path / "none",
    )  # fmt: skip
    with pytest.raises(ValueError, match="another bos: False there, True here"):
        sft_training.main(sft_training.parse_args(flags))


# ---- sampling ----
@pytest.mark.parametrize("place", [0, 1])
def test_a_rollout_stops_at_every_member_of_the_stop_set(tiny_chat, chat, place):
    model = load_base(tiny_chat, torch.float32).eval()
    stop = chat.stop_ids[place]
    batch = collate_prompts(
        [chat.query_ids([("user", "hi")]), chat.query_ids([("user", "a longer one")])], chat.pad_id
    )

    def prefer(module, inputs, logits):
        logits[..., stop] += 100
        return logits

    handle = model.get_output_embeddings().register_forward_hook(prefer)
    try:
        for suppress, length in ((True, 2), (False, 1)):
            sampling = Sampling(chat.stop_ids, chat.pad_id, 8, suppress_empty=suppress)
            rollout = generate(model, None, batch["input_ids"], batch["attention_mask"], sampling)
            assert rollout.lengths().tolist() == [length, length]
            assert rollout.ended(chat.stop_ids).all()
            assert (rollout.response_ids[:, -1] == stop).all()
            # No member of the set may come first where empty answers are forbidden.
            assert suppress == (not set(rollout.response_ids[:, 0].tolist()) & set(chat.stop_ids))
    finally:
        handle.remove()


# ---- PPO from the bare chat model ----
def ppo_flags(tiny_chat, reward, files, out, **changed) -> list[str]:
    flags = {
        "base_model_name": tiny_chat, "reward_model_lora_path": reward, "dataset_name": files["prompts"],
        "output_dir": out, "batch_size": 4, "mini_batch_size": 2, "gradient_accumulation_steps": 1, "steps": 16,
        "output_max_length": 8, "learning_rate": 1e-3, "reward_transform": "raw", "save_freq": 2, "lora_rank": 2,
    } | changed  # fmt: skip
    return flags_of(rl_training, **flags)


def test_ppo_starts_without_sft_from_the_bare_chat_model(tiny_chat, reward, files, tmp_path, capsys):
    rl_training.main(rl_training.parse_args(ppo_flags(tiny_chat, reward, files, tmp_path / "a")))
    said = capsys.readouterr().out
    assert "policy: a fresh adapter of rank 2 on the base, which is the reference" in said
    records = read_metrics(tmp_path / "a")
    assert abs(records[0]["kl/mean"]) < 1e-5 and records[-1]["kl/mean"] != 0
    assert set(load_run(tmp_path / "a")["parents"]) == {"reward"}
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_chat, dtype="float32"), tmp_path / "a")
    assert any("gate_proj" in name for name, _ in plain.named_parameters() if "lora_" in name)

    # Stopped after two steps and gone on: the same bytes.
    rl_training.main(rl_training.parse_args(ppo_flags(tiny_chat, reward, files, tmp_path / "b", steps=8)))
    more = ppo_flags(tiny_chat, reward, files, tmp_path / "b", resume_from_checkpoint="True")
    rl_training.main(rl_training.parse_args(more))
    for file in ("adapter_model.safetensors", "value_head.safetensors"):
        one, other = (load_file(tmp_path / name / file) for name in ("a", "b"))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_reference_of_a_fresh_policy_is_the_bare_base(tiny_chat, reward):
    args = rl_training.parse_args(ppo_flags(tiny_chat, reward, {"prompts": "x"}, "x"))
    roles = load_roles(tiny_chat, None, reward, dtype=torch.float32, device="cpu", new_adapter=args)
    roles.train(False)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_chat, dtype="float32").eval()(ids).logits
        for parameter in roles.adapter("policy").values():
            parameter.copy_(torch.randn_like(parameter))
        with roles.use("reference") as model:
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
        assert (roles.model(ids).logits - expected).abs().max() > 0.1
    # The policy goes on taking gradients after the base has played the reference.
    assert all(parameter.requires_grad for parameter in roles.adapter("policy").values())


def test_a_merged_reference_needs_its_adapter():
    command = ["--base_model_name", "b", "--reward_model_lora_path", "r", "--merged_sft_model_path", "m"]
    with pytest.raises(SystemExit):
        rl_training.parse_args(command)


def test_a_base_without_chat_template_and_sft_is_warned_of(tiny_llama, files, tmp_path):
    reward = random_adapter(tiny_llama, tmp_path / "reward", "reward", 1)
    with pytest.warns(UserWarning, match="no SFT adapter and no chat template"):
        rl_training.main(rl_training.parse_args(ppo_flags(tiny_llama, reward, files, tmp_path / "out", steps=4)))


# ---- compare and merge ----
def test_compare_answers_what_generate_does_on_the_chat_template(tiny_chat, sft, tmp_path, capsys):
    prompts = [prompt for prompt, _ in LESSONS]
    flags = [
        "--base_model_name",
        tiny_chat,
        "--adapters",
        f"sft={sft}",
        "--do_sample",
        "False",
        "--max_new_tokens",
        "12",
    ]
    compare.main(compare.parse_args([*flags, "--output_dir", str(tmp_path), "--prompts", *prompts]))
    assert "prompt format: the tokenizer's chat template" in capsys.readouterr().out
    table = (tmp_path / "comparison.csv").read_text(encoding="utf-8")

    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    model = AutoModelForCausalLM.from_pretrained(tiny_chat, dtype="float32").eval()
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**ids, do_sample=False, max_new_tokens=12)[0, ids["input_ids"].shape[1] :]
        said = tokenizer.decode([token for token in answer.tolist() if token not in (1, 4)]).strip()
        assert said.replace('"', '""') in table
    for _, answer in LESSONS:
        assert answer in table


def test_a_merged_chat_model_is_what_a_server_needs(tiny_chat, sft, chat, tmp_path, capsys):
    target = tmp_path / "merged"
    flags = [
        "--base_model_name",
        tiny_chat,
        "--lora_path",
        str(sft),
        "--output_dir",
        str(target),
        "--dtype",
        "float32",
    ]
    merge_lora.main(merge_lora.parse_args(flags))
    assert re.search(rf"serve it: vllm serve {target} .*stops where training did", capsys.readouterr().out)

    # Everything from the directory, by stock transformers.
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype="float32").eval()
    assert "split_special_tokens" not in (target / "tokenizer_config.json").read_text()
    assert model.generation_config.eos_token_id == list(chat.stop_ids)
    for prompt, answer in LESSONS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert ids["input_ids"][0].tolist() == chat.query_ids([("user", prompt)])
        said = model.generate(**ids, do_sample=False, max_new_tokens=24)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(said, skip_special_tokens=True) == answer


@pytest.mark.parametrize("form", ["baichuan", "llama"])
def test_a_merged_text_model_asks_in_the_tutorials_format(tiny_base, tmp_path, form):
    adapter = random_adapter(tiny_base, tmp_path / "sft")
    flags = ["--base_model_name", tiny_base, "--lora_path", adapter, "--output_dir", str(tmp_path / "merged")]
    merge_lora.main(merge_lora.parse_args([*flags, "--dtype", "float32", "--format", form]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    messages = [{"role": "user", "content": "你喜欢什么？"}, {"role": "assistant", "content": "红茶。"}]
    messages += [{"role": "user", "content": "为什么？"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    turns = [(message["role"], message["content"]) for message in messages]
    assert ids == text_format(load_tokenizer(tiny_base)).query_ids(turns)
    assert json.loads(Path(tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == 2
