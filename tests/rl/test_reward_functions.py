"""PPO with reward functions: beside a reward adapter, in place of it, stopped and resumed, and where they fail."""

import json

import pytest
import torch
from adapters import random_adapter
from safetensors.torch import load_file
from stages import words
from test_rl_training import PROMPTS, sharper, timeless

import rl_training
from rlhf.artefacts.run_json import load_run
from rlhf.rl.groups import dead_groups
from rlhf.rl.rewards import dominating_part
from rlhf.run.log import read_metrics

FUNCTIONS = """
calls = 0

def short(prompts, responses, rows):
    return [-float(row["response_tokens"]) for row in rows]

def listed(prompts, responses, rows):
    # Only half of the prompts have something to check.
    return [None if row["number"] % 2 else float(len(response)) for response, row in zip(responses, rows)]

def even(prompts, responses, rows):
    return [float(len(response) > 0 and ord(response[0]) % 2 == 0) for response in responses]

def late(prompts, responses, rows):
    global calls
    calls += 1
    return [1 / (calls < 3) for _ in rows]

def coin(prompts, responses, rows):
    # Alike for all answers of two thirds of the prompts.
    return [float(row["number"] % 3 == 0 and len(response) % 2) for response, row in zip(responses, rows)]
"""


@pytest.fixture(scope="module")
def world(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    prompts = folder / "prompts.jsonl"
    rows = [json.dumps({"prompt": prompt, "number": number}) for number, prompt in enumerate(PROMPTS)]
    prompts.write_text("\n".join(rows), encoding="utf-8")
    (folder / "rewards.py").write_text(FUNCTIONS)
    return {
        "base_model_name": tiny_base, "sft_model_lora_path": random_adapter(tiny_base, folder / "sft"),
        "dataset_name": prompts, "steps": 24, "batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2,
        "gradient_accumulation_steps": 2, "output_max_length": 8, "learning_rate": 1e-3, "check": False,
    }, folder / "rewards.py"  # fmt: skip


def run(world, output_dir, functions: list[str], **changed):
    flags, file = world
    listed = ["--reward_functions", *(name if "=" in name else f"{file}:{name}" for name in functions)]
    given = words(flags | {"output_dir": output_dir} | changed)
    rl_training.main(rl_training.parse_args([*given, *listed]))
    return output_dir


def samples_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_parts_are_weighed_and_logged_beside_a_reward_adapter(world, tiny_base, tmp_path):
    reward = random_adapter(tiny_base, tmp_path / "reward", "reward", seed=1)
    changed = {"reward_model_lora_path": reward, "reward_transform": "sigmoid", "sample_freq": 1, "steps": 8}
    flags, file = world
    given = words(flags | changed | {"output_dir": tmp_path / "out"})
    parts = ["--reward_functions", f"{file}:short", f"{file}:listed", "--reward_weights", "2", "0.5", "0.1"]
    rl_training.main(rl_training.parse_args([*given, *parts]))

    rows = samples_of(tmp_path / "out")
    for row in rows:
        listed = row["reward/listed"]
        model = torch.tensor(row["reward/reward_model"]).sigmoid().item()
        expected = 2 * model + 0.5 * -row["length"] + 0.1 * (listed or 0)
        assert row["score"] == pytest.approx(expected, abs=1e-4)
        assert row["raw_score"] == pytest.approx(row["reward/reward_model"])
    assert {row["reward/listed"] is None for row in rows} == {True, False}
    (record,) = read_metrics(tmp_path / "out")
    applied = [row["reward/listed"] for row in rows if row["reward/listed"] is not None]
    assert record["reward/listed/mean"] == pytest.approx(sum(applied) / len(applied), abs=1e-4)
    assert record["reward/short/mean"] == pytest.approx(-record["len/mean"], abs=1e-4)


@pytest.mark.parametrize("advantage", ["grpo", "gae"])
def test_without_a_reward_adapter_functions_alone_teach(world, tiny_base, tmp_path, advantage):
    base = sharper(tiny_base, tmp_path / "base")
    changed = {
        "base_model_name": base, "sft_model_lora_path": random_adapter(base, tmp_path / "sft"), "steps": 64 * 20,
        "advantage": advantage, "batch_size": 64, "mini_batch_size": 64, "gradient_accumulation_steps": 1,
        "ppo_epochs": 4, "output_max_length": 1, "init_kl_coef": 0.0, "on_collapse": "off", "sample_freq": 1000,
    }  # fmt: skip
    out = run(world, tmp_path / "out", ["even"], **changed)
    scores = [row["score/mean"] for row in read_metrics(out)]
    assert scores[0] < 0.7
    assert sum(scores[-3:]) > 3 * 0.9
    assert load_run(out)["functions"][0]["name"] == "even"
    assert "reward" not in load_run(out)["parents"]


def test_a_stopped_run_goes_on_to_the_same_bytes_and_a_changed_file_is_refused(world, tmp_path):
    changed = {"advantage": "rloo", "save_freq": 1, "drop_dead_groups": True, "resume_from_checkpoint": True}
    whole = run(world, tmp_path / "whole", ["coin"], **changed)
    halves = tmp_path / "halves"
    run(world, halves, ["coin"], **changed | {"steps": 16})
    run(world, halves, ["coin"], **changed)
    assert (
        load_file(whole / "adapter_model.safetensors").keys() == load_file(halves / "adapter_model.safetensors").keys()
    )
    for name, tensor in load_file(whole / "adapter_model.safetensors").items():
        assert torch.equal(load_file(halves / "adapter_model.safetensors")[name], tensor)
    assert timeless(read_metrics(whole)) == timeless(read_metrics(halves))

    _, file = world
    before = file.read_text()
    file.write_text(before + "\nx = 1\n")
    changed |= {"steps": 32, "resume_from_checkpoint": halves / "step_3"}
    try:
        with pytest.raises(ValueError, match="the reward functions"):
            run(world, halves, ["coin"], **changed)
        run(world, halves, ["coin"], **changed | {"allow_changes": True})
    finally:
        file.write_text(before)
    assert len(read_metrics(halves)) == 4


def test_a_function_that_fails_ends_the_run_before_it_learns_from_it(world, tmp_path):
    with pytest.raises(ValueError, match=r"reward function late failed: ZeroDivisionError: .* at rewards.py:"):
        run(world, tmp_path / "out", ["late"], advantage="rloo", save_freq=1)
    assert [row["step"] for row in read_metrics(tmp_path / "out")] == [1, 2]
    assert (tmp_path / "out" / "step_2" / "adapter_model.safetensors").is_file()


def test_dead_groups_are_counted_and_replaced(world, tmp_path):
    shares = {}
    for dropped in (False, True):
        out = run(world, tmp_path / str(dropped), ["coin"], advantage="rloo", drop_dead_groups=dropped, steps=48)
        shares[dropped] = [row["groups/dead_frac"] for row in read_metrics(out)]
    assert sum(shares[True]) < sum(shares[False])
    scores = torch.tensor([1.0, 1, 0, 1, 0, 0])
    assert dead_groups(scores, 2).tolist() == [True, False, True]


def test_nothing_is_learnt_from_answers_that_were_cut(world, tmp_path):
    # Nothing ends within two tokens but what ends by chance: with the mask the policy hardly moves.
    changed = {"advantage": "rloo", "output_max_length": 2, "min_new_tokens": 1, "steps": 8}
    outs = {}
    for masked in (False, True):
        outs[masked] = run(world, tmp_path / str(masked), ["even"], mask_truncated=masked, **changed)
    flags, _ = world
    start = load_file(f"{flags['sft_model_lora_path']}/adapter_model.safetensors")
    moved = {
        masked: sum((load_file(out / "adapter_model.safetensors")[name] - start[name]).abs().sum() for name in start)
        for masked, out in outs.items()
    }
    ended = read_metrics(outs[True])[0]["eos_frac"]
    assert moved[False] > 0
    assert (moved[True] == 0) == (ended == 0)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--advantage", "rloo"], "nothing scores the answers"),
        (["--reward_functions", "repetition", "--reward_weights", "1", "2"], "has 2 numbers for 1 parts"),
        (["--reward_functions", "repetition", "--value_lora", "True"], "there is none"),
        (["--reward_functions", "repetition", "--drop_dead_groups", "True"], "needs groups"),
        (["--reward_functions", "repetition", "--function_transforms", "raw", "raw"], "has 2 names for 1 functions"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(capsys, flags, complaint):
    with pytest.raises(SystemExit):
        rl_training.parse_args(["--base_model_name", "b", *flags])
    assert complaint in capsys.readouterr().err


def test_a_part_that_decides_alone_while_another_falls_is_named():
    class Loop:
        functions = ()

        class args:
            reward_model_lora_path = "r"
            reward_weights = ()

    loop = Loop()
    loop.functions = [type("F", (), {"name": "long"})]
    first = {
        "reward/reward_model/mean": 1.0,
        "reward/reward_model/std": 1.0,
        "reward/long/mean": 5,
        "reward/long/std": 5,
    }
    later = first | {"reward/reward_model/mean": 0.2, "reward/long/mean": 50}
    assert "long makes up 96% of the score's variance, and reward_model has fallen" in dominating_part(
        loop, later, first
    )
    assert dominating_part(loop, first, first) is None
    loop.args.reward_weights = [1.0, 0.1]
    assert dominating_part(loop, later, first) is None
