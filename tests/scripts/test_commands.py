"""Every command of a stage that README and docs show runs, on a tiny base, small data and one step."""

import io
import json
import sys

import pytest
from adapters import random_adapter
from commands import run_here
from stages import write_answers, write_pairs
from test_documents import cut_at_pipe, script_commands

from rlhf.data.choose_format import generation_stop_ids
from rlhf.data.encoding import load_tokenizer
from rlhf.data.prompt_format import PromptFormat

pytestmark = pytest.mark.slow

# What makes a command small; given last, it wins.
SMALL = {
    "sft_training": ["--max_steps", "1", "--eval_steps", "0", "--save_steps", "0", "--sample_max_new_tokens", "4"],
    "reward_modeling": ["--max_steps", "1", "--eval_steps", "0", "--save_steps", "0", "--audit_prompts", "4",
                        "--eval_size", "12"],
    "rl_training": ["--steps", "8", "--batch_size", "8", "--output_max_length", "8", "--eval_prompts", "4",
                    "--eval_size", "4", "--reward_gate", "warn", "--on_collapse", "off"],
    "merge_lora": [],
    "compare": ["--max_new_tokens", "4"],
}  # fmt: skip
# The tutorial's data are longer than what a model of 512 positions takes.
DROPPED = ("--log_with", "--max_length", "--nproc", "--margin_field")


@pytest.fixture(scope="module")
def chat_places(tiny_chat, tmp_path_factory):
    """`places` of the commands for a chat model, whose adapters know its format with thinking off."""
    tokenizer = load_tokenizer(tiny_chat)
    chat = PromptFormat(
        tokenizer, "chat", chat_template=tokenizer.chat_template, kwargs={"enable_thinking": False},
        base_stop_ids=generation_stop_ids(tiny_chat),
    )  # fmt: skip
    return made_places(tiny_chat, tmp_path_factory.mktemp("chat"), chat)


@pytest.fixture(scope="module")
def places(tiny_base, tmp_path_factory):
    """Flag -> what stands for its value here; data by script."""
    return made_places(tiny_base, tmp_path_factory.mktemp("places"))


def made_places(tiny_base: str, folder, prompt_format=None) -> dict[str, str]:
    sft = random_adapter(tiny_base, folder / "sft", prompt_format=prompt_format)
    reward = random_adapter(tiny_base, folder / "reward", "reward", seed=1, prompt_format=prompt_format)
    # A judge that is the reward model is refused.
    judge = random_adapter(tiny_base, folder / "judge", "reward", seed=2, prompt_format=prompt_format)
    code, _, errors = run_here(
        "merge_lora", "--base_model_name", tiny_base, "--lora_path", sft, "--output_dir", str(folder / "merged"),
        "--dtype", "float32",
    )  # fmt: skip
    assert code == 0, errors

    prompts = folder / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"我喜欢什么？{i}", "answer": i}) + "\n" for i in range(24)), encoding="utf-8"
    )
    functions = folder / "rewards.py"
    functions.write_text("def brevity(prompts, responses, rows):\n    return [-len(text) for text in responses]\n")
    bad = folder / "bad_answers.jsonl"
    bad.write_text(json.dumps({"prompt": "我喜欢什么？", "answer": "不知道"}) + "\n", encoding="utf-8")
    lines = folder / "prompts.txt"
    lines.write_text("我喜欢什么？\n小猫想要什么？\n", encoding="utf-8")
    return {
        "--model_name": tiny_base, "--base_model_name": tiny_base, "--sft_model_lora_path": sft, "--lora_path": sft,
        "--previous_lora_weights": sft, "--reward_model_lora_path": reward, "--judge_lora_path": judge,
        "--merged_sft_model_path": str(folder / "merged"), "--prompts": str(lines), "adapter": sft,
        "--bad_answers": str(bad), "--write_best": str(folder / "best.jsonl"), "functions": f"{functions}:",
        "sft_training": write_answers(folder / "answers.jsonl"),
        "reward_modeling": write_pairs(folder / "pairs.jsonl"), "rl_training": str(prompts),
    }  # fmt: skip


def small_command(words: list[str], places: dict[str, str], output_dir: str) -> tuple[str, list[str]]:
    """Script and flags of a documented command with paths replaced and sizes lowered."""
    script, *words = cut_at_pipe(words)
    script = script.removesuffix(".py")
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            flags[word] = []
        else:
            flags[list(flags)[-1]].append(word)

    flags = {name: values for name, values in flags.items() if name not in DROPPED}
    for name in flags:
        # Of several reward models no two may have one name.
        count = len(flags[name]) if name == "--reward_model_lora_path" else 1
        if name in places:
            flags[name] = [places[name] + "/." * number for number in range(count)]
    if "--reward_functions" in flags:
        specs = flags["--reward_functions"]
        flags["--reward_functions"] = [spec.replace("rewards.py:", places["functions"]) for spec in specs]
    # Values without a name of their own.
    for name in ("--slide", "--average"):
        if name in flags:
            flags[name] = [places["adapter"]] * len(flags[name])
    if "--adapters" in flags:
        flags["--adapters"] = [f"{spec.partition('=')[0]}={places['adapter']}" for spec in flags["--adapters"]]
    if script in places:
        flags["--dataset_name"] = [places[script]]
    flags["--output_dir"] = [output_dir]
    return script, [word for name, values in flags.items() for word in (name, *values)] + SMALL[script]


@pytest.mark.parametrize("words", script_commands(), ids=lambda words: " ".join(words)[:70])
def test_a_command_of_the_documents_runs(words, places, chat_places, tmp_path, monkeypatch):
    # A conversation ends with its input.
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    chosen = chat_places if any(word.startswith("Qwen/") for word in words) else places
    script, argv = small_command(words, chosen, str(tmp_path / "out"))
    code, said, errors = run_here(script, *argv)
    assert code == 0, f"{script}.py {' '.join(argv)}\n{said[-2000:]}{errors[-2000:]}"
