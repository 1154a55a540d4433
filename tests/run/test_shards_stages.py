"""A base in shards: the bytes of unsharded processes in every stage, with any number of shards, after a resume too."""

import json
import shutil
import time
from pathlib import Path

import pytest
from adapters import random_adapter
from aligned import align
from forked import KILL, TERM, group, result
from launched import make_world
from stages import words, write_answers, write_pairs
from test_rl_training import PROMPTS

import merge_lora
from rlhf.artefacts.checkpoint import numbered

pytestmark = pytest.mark.slow

PPO = {
    "steps": 16, "batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2, "gradient_accumulation_steps": 2,
    "output_max_length": 6, "decode": "gathered", "learning_rate": 1e-3, "eval_freq": 2, "eval_size": 5,
    "eval_prompts": 5, "save_freq": 1, "reward_transform": "raw", "check": False, "on_collapse": "off",
}  # fmt: skip
TRAINER = {
    "max_steps": 3, "learning_rate": 5e-3, "per_device_train_batch_size": 4, "save_steps": 2, "eval_steps": 2,
    "lora_dropout": 0.1, "eval_size": 7, "per_device_eval_batch_size": 2,
}  # fmt: skip
# Each way to train that parts of a base could break: script, flags, and whether answers end at very different times.
WAYS = {
    "ppo, value head, uneven answers": (
        "rl_training", {"reward_transform": "standardize", "tokens_per_backward": 24}, True,
    ),
    "ppo, own critic, judge, checkpointing": (
        "rl_training",
        {"value_lora": True, "gradient_checkpointing": True, "old_logprobs": "recomputed", "check": True},
        False,
    ),
    "ppo, rloo, one query at a time": (
        "rl_training", {"advantage": "rloo", "group_size": 2, "batched_gen": False}, True,
    ),
    "ppo, grpo, dead groups replaced": (
        "rl_training", {"advantage": "grpo", "group_size": 2, "drop_dead_groups": True}, False,
    ),
    "ppo, merged reference": ("rl_training", {"check": True}, False),
    "sft, checkpointing": ("sft_training", {"gradient_checkpointing": True, "sample_max_new_tokens": 4}, False),
    "reward, audit": ("reward_modeling", {"audit_prompts": 4}, False),
    "reward, shared prompt": (
        "reward_modeling", {"share_prompt": True, "gradient_checkpointing": True, "audit": False}, False,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(tiny_base, tmp_path_factory) -> dict[str, dict]:
    """Name of WAYS -> a job of in_turn.py without its output directory."""
    folder = tmp_path_factory.mktemp("world")
    base = align(shutil.copytree(tiny_base, folder / "base"))
    world = make_world(base, PROMPTS, folder)
    judge = random_adapter(base, folder / "judge", "reward", seed=2)
    merge = ["--base_model_name", base, "--lora_path", str(folder / "sft"), "--output_dir", str(folder / "merged")]
    merge_lora.main(merge_lora.parse_args([*merge, "--dtype", "float32"]))
    align(folder / "merged")

    own = {
        "ppo, own critic, judge, checkpointing": {"judge_lora_path": judge},
        "ppo, merged reference": {"merged_sft_model_path": folder / "merged"},
    }
    given = {
        "rl_training": [*world, *words(PPO)],
        "sft_training": words(TRAINER | {"model_name": base, "dataset_name": write_answers(folder / "a.jsonl", 31)}),
        "reward_modeling": words(TRAINER | {"model_name": base, "dataset_name": write_pairs(folder / "p.jsonl", 31)}),
    }
    return {
        name: {"script": script, "argv": given[script] + words(flags | own.get(name, {})), "uneven": uneven}
        for name, (script, flags, uneven) in WAYS.items()
    }


def run(zygote, jobs: dict[str, dict], folder: Path, processes: int, *more: str) -> dict[str, Path]:
    """Run the jobs in turn on so many processes; returns the directory of each."""
    folder.mkdir()
    folders = {name: folder / str(number) for number, name in enumerate(jobs)}
    given = [job | {"argv": [*job["argv"], "--output_dir", str(folders[name]), *more]} for name, job in jobs.items()]
    file = folder / "jobs.json"
    file.write_text(json.dumps(given), encoding="utf-8")
    assert zygote.run_script("in_turn", [str(file)], folder / "log", **group(processes)) == 0, zygote.said()[-5000:]
    return folders


@pytest.fixture(scope="module")
def both(zygote, jobs, tmp_path_factory) -> tuple[dict, dict]:
    """Directories of all jobs on two processes: each with a base of its own, and both with parts of one."""
    folder = tmp_path_factory.mktemp("two")
    whole = run(zygote, jobs, folder / "whole", 2)
    return whole, run(zygote, jobs, folder / "parts", 2, "--shard_base", "2")


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_with_parts_of_one_base_end_with_the_bytes_of_two_with_a_base_each(both, name):
    whole, parts = (folders[name] for folders in both)
    assert result(parts)["metrics"] == result(whole)["metrics"]
    assert result(parts) == result(whole)
    # A critic's own adapter lies in a folder of its own.
    for file in sorted(whole.rglob("*.safetensors")):
        assert (parts / file.relative_to(whole)).read_bytes() == file.read_bytes(), file
    for extra in ("audit.json", "samples.jsonl"):
        assert (parts / extra).is_file() == (whole / extra).is_file()
        if (whole / extra).is_file():
            assert (parts / extra).read_bytes() == (whole / extra).read_bytes()


def test_four_processes_as_two_copies_of_two_end_with_the_bytes_of_four_with_a_base_each(zygote, jobs, tmp_path):
    some = {name: jobs[name] for name in ("ppo, value head, uneven answers", "sft, checkpointing")}
    whole = run(zygote, some, tmp_path / "whole", 4)
    parts = run(zygote, some, tmp_path / "parts", 4, "--shard_base", "2")
    for name in some:
        assert result(parts[name]) == result(whole[name])


FOLDERS = ("base_model_name", "sft_model_lora_path", "reward_model_lora_path")

# A blow in the second step, after the first checkpoint.
BLOWS = {
    "ppo, own critic, judge, checkpointing": {"target": "rlhf.rl.update:policy_loss", "call": 6},
    "sft, checkpointing": {"target": "torch.optim:AdamW.step", "call": 3},
}


@pytest.mark.parametrize(
    ("name", "first", "then"),
    [("ppo, own critic, judge, checkpointing", "2", "0"), ("sft, checkpointing", "0", "2")],
    ids=["ppo", "sft"],
)
def test_after_the_death_of_a_process_a_run_goes_on_with_another_number_of_shards(
    zygote, jobs, both, tmp_path, name, first, then
):
    out = tmp_path / "out"
    job = jobs[name]
    argv = [*job["argv"], "--output_dir", str(out), "--resume_from_checkpoint", "True"]
    begin = time.monotonic()
    blow = {"signum": KILL, "rank": 1, "when": "before", **BLOWS[name]}
    code = zygote.run_script(job["script"], [*argv, "--shard_base", first], tmp_path / "log", **group(2), **blow)
    assert code == 128 + KILL, zygote.said()[-3000:]
    assert time.monotonic() - begin < 60
    assert "another process of this run has ended" in zygote.said()
    assert "Traceback" not in zygote.said()

    code = zygote.run_script(job["script"], [*argv, "--shard_base", then], tmp_path / "log", **group(2))
    assert code == 0, zygote.said()[-3000:]
    assert result(out) == result(both[0][name])


def test_a_signal_to_one_process_in_the_rollout_ends_both_with_one_checkpoint(zygote, jobs, both, tmp_path):
    job = jobs["ppo, own critic, judge, checkpointing"]
    out = tmp_path / "out"
    argv = [*job["argv"], "--output_dir", str(out), "--resume_from_checkpoint", "True", "--shard_base", "True"]
    # The first process writes, the second gets the signal, when the second step samples.
    blow = {"signum": TERM, "rank": 1, "when": "before", "target": "rlhf.rl.experience:sample_responses"}
    where = {"caller": "train_step", "call": 2}
    code = zygote.run_script("rl_training", argv, tmp_path / "log", **group(2), **blow, **where)
    assert code == 128 + TERM, zygote.said()[-3000:]
    assert "Traceback" not in zygote.said() and "saved in" in zygote.said()
    assert [folder.name for folder in numbered(out, "step_")] == ["step_1"]
    assert not (out / "adapter_model.safetensors").exists()

    assert zygote.run_script("rl_training", argv, tmp_path / "log", **group(2)) == 0, zygote.said()[-3000:]
    assert result(out) == result(both[0]["ppo, own critic, judge, checkpointing"])


def test_a_run_that_decodes_in_place_samples_what_one_over_whole_bases_does(zygote, jobs, both, tmp_path):
    name = "ppo, merged reference"
    folder = run(zygote, {name: jobs[name]}, tmp_path / "out", 2, "--shard_base", "2", "--decode", "auto")[name]
    # After an update rounding is another one, and a draw may be another.
    whole, parts = (result(run_dir)["metrics"][0] for run_dir in (both[0][name], folder))
    assert parts.keys() == whole.keys()
    assert parts == pytest.approx(whole, abs=1e-4)


def test_compare_shows_the_same_answers_over_a_base_in_shards(zygote, jobs, tmp_path):
    argv = jobs["ppo, merged reference"]["argv"]
    base, sft, reward = (argv[argv.index(f"--{name}") + 1] for name in FOLDERS)
    flags = ["--base_model_name", base, "--adapters", f"sft={sft}", "--reward_model_lora_path", reward,
             "--prompts", *PROMPTS[:3], "--max_new_tokens", "8", "--output_dir"]  # fmt: skip
    tables = []
    for number, more in enumerate(([], ["--decode", "gathered"], ["--decode", "auto"])):
        out = tmp_path / str(number)
        words = [*flags, str(out), *more, *(["--shard_base", "2"] if more else [])]
        code = zygote.run_script("compare", words, tmp_path / "log", **(group(2) if more else {}))
        assert code == 0, zygote.said()[-3000:]
        tables.append((out / "comparison.csv").read_bytes())
    assert tables[1] == tables[0]
    assert tables[2] == tables[0]
